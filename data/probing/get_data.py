"""Texts and labels for probe.py: the embedded grammar and the field's probing datasets.

    python data/probing/get_data.py -data_save_path data/probing    # grammar needs no network
    python data/probing/get_data.py -data_save_path data/probing sets=cola,senteval,blimp
    python data/probing/get_data.py -data_save_path data/probing root=path/to/copies
    python probe.py dataset=probing/ethics.json

It writes one data-json file per task: {data: {sentences: {"0": ...}, labels: {"0": ...}}, name,
link, topic, task, size, average length, multiple, type, n_categories, labels: {"0": name, ...},
language}; readme.md explains the keys. Archives are read in place and never unpacked, so the paths
in them cannot do harm. If one set fails, the others are still made.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data import InputError, aside, fetch, file_hash, read_yaml, write_aside, write_yaml
from data.stimuli import complete, read_meta, read_pairs, read_task

HERE = Path(__file__).resolve().parent
EMBEDDED = False  # most sets must be downloaded: scripts never start this themselves


@dataclass
class Config:
    data_save_path: str = ""  # folder of the .json files; "": this one; also -data_save_path PATH
    sets: list[str] = field(default_factory=lambda: list(SETS))  # sets to make, see readme.md
    root: str = ""  # local copies: archives, their contents, or SET/*.parquet; "": download
    max_texts: int = 20_000  # per file, drawn at random in whole groups; 0: all
    seed: int = 0  # for that draw
    overwrite: bool = False  # rebuild existing files

    def check(self):
        for name in self.sets:
            if name not in SETS:
                raise InputError(f"sets: there is no '{name}', only {', '.join(SETS)}")
        if self.root and not Path(self.root).is_dir():
            remedy = "give the one that holds SST-2.zip, ethics.tar, ..."
            raise InputError(f"root={self.root} is not a folder: {remedy}")


@dataclass
class Table:
    """The contents of one file: labelled texts and the schema's other keys."""

    file: str
    frame: pd.DataFrame  # text, label (name, or for regression number in [0, 1]), group?, split?
    name: str
    link: str
    topic: str
    labels: list  # class names in order, or the names of 0 and 1 for regression
    regression: bool = False
    type: str = "Ordinal"
    language: str = "En"
    synthetic: bool = False


# ---- the schema


def write_table(folder, table, max_texts, seed):
    """Write one data-json file; return its entry for sources.yaml."""
    frame = table.frame.assign(text=table.frame.text.astype(str).str.split().str.join(" "))
    empty = frame.text == ""
    frame = draw(frame[~empty], max_texts, seed)
    data = {"sentences": numbered(frame.text), "labels": numbered(label_values(table, frame.label))}
    for key in ("group", "split"):  # rows that splits keep together; the makers' split
        if key in frame:
            data[key + "s"] = numbered(frame[key].astype(str))
    content = {
        "data": data,
        "name": table.name,
        "link": table.link,
        "topic": table.topic,
        "task": "Regression" if table.regression else "Classification",
        "size": len(frame),
        "average length": round(float(frame.text.str.split().str.len().mean()), 1),
        "multiple": False,
        "type": table.type,
        "n_categories": "inf" if table.regression else len(table.labels),
        "labels": numbered(table.labels),
        "language": table.language,
        "synthetic": table.synthetic,
    }
    text = json.dumps(content, ensure_ascii=False)
    write_aside(folder / table.file, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"texts": len(frame), "empty": int(empty.sum()), "sha256": digest}


def label_values(table, labels):
    """Return labels as numbers. Raises InputError for an unknown label, or only one."""
    if labels.nunique() < 2:
        raise InputError(f"{table.file}: all {len(labels)} texts have the same label, or none")
    if table.regression:
        values = pd.to_numeric(labels, errors="coerce")
        values = values.where(values.between(0, 1))
        expected = "a number from 0 to 1"
    else:
        values = labels.map({label: i for i, label in enumerate(table.labels)})
        expected = f"one of {', '.join(table.labels)}"
    if values.isna().any():
        label = labels[values.isna()].iloc[0]
        raise InputError(f"{table.file}: the label '{label}' is not {expected}")
    return values if table.regression else values.astype(int)


def numbered(values):
    return {str(i): value for i, value in enumerate(values)}


def draw(frame, n, seed):
    """Draw at most n rows (0: all) in random order, groups together.

    The first rows of the result are again a random draw.
    """
    groups = frame.group if "group" in frame else pd.Series(range(len(frame)), frame.index)
    groups = groups.astype(str)
    order = sorted(set(groups))
    random.Random(seed).shuffle(order)
    rank = groups.map({group: i for i, group in enumerate(order)}).sort_values(kind="stable")
    n_rows = rank.map(rank.value_counts().sort_index().cumsum())  # this group included
    return frame.loc[rank.index[n_rows <= (n or len(frame))]].reset_index(drop=True)


# ---- files


def take(root, archive, name):
    """Read a file of a source as bytes: unpacked under root, or from the archive in root."""
    packed = root / archive
    if (root / name).is_file():
        return (root / name).read_bytes()
    if not packed.is_file():
        raise missing(root, f"{name} nor {archive}")
    try:
        if packed.suffix == ".zip":
            with zipfile.ZipFile(packed) as file:
                return file.read(name)  # checks the CRC
        with tarfile.open(packed) as file:
            member = file.getmember(name)
            if not member.isfile():
                raise InputError(f"{packed}: {name} is a link or a folder, not a file")
            return file.extractfile(member).read()
    except KeyError:
        raise InputError(f"{packed} has no {name}: delete it and start again") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{packed} is broken ({error}): delete it and start again") from None


def missing(root, files):
    return InputError(f"{root} has no {files}: set root= to the folder that has it, or omit root=")


def read_rows(raw, name, columns, header=True, **dialect):
    """Read these columns of a delimited text as strings, leaving out broken lines."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start})") from None
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, **dialect}
    rows = list(filter(None, csv.reader(io.StringIO(text, newline=""), **dialect)))
    names = rows.pop(0) if header and rows else columns
    rows = [row for row in rows if len(row) == len(names)]
    return pick_columns(pd.DataFrame(rows, columns=names), name, columns)


def pick_columns(frame, name, columns):
    for column in columns:
        if column not in frame:
            raise InputError(f"{name} has no column '{column}', only {', '.join(frame.columns)}")
    return frame[columns]


def download(url, path, notes):
    """Fetch url to path unless path has the checksum in `notes`. Raises InputError."""
    if path.exists() and notes.get(path.name, {}).get("sha256") == file_hash(path):
        return
    path.unlink(missing_ok=True)
    if "/archive/" in url:  # GitHub packs these on demand, without a length: no resuming
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fetch.request(url) as answer, aside(path) as file:
                shutil.copyfileobj(answer, file)
        except fetch.NETWORK_ERRORS as error:
            raise fetch.unreachable(url, error) from None
    else:
        fetch.download([fetch.need(url, path)], path.parent)
    notes[path.name] = {"url": url, "bytes": path.stat().st_size, "sha256": file_hash(path)}


# ---- the sets: each function yields the Tables of a source in `root`


def grammar(root):
    """The tasks of the embedded grammar, made if missing."""
    folder = HERE.parent / "grammar"
    if not complete(folder):
        subprocess.run([sys.executable, str(folder / "prepare.py")], check=True)
    for task, entry in read_meta(folder)["tasks"].items():
        frame = read_task(folder, task)[["text", "label", "group", "split"]]
        facts = (f"grammar/{task}", "data/grammar/prepare.py", entry["description"])
        labels = entry["labels"]
        yield Table(f"grammar_{task}.json", frame, *facts, labels, type="Nominal", synthetic=True)


def in_splits(parts):
    """Join {split: frame} into one frame."""
    frames = [frame.assign(split=split) for split, frame in parts.items()]
    return pd.concat(frames, ignore_index=True)


def binary(file, parts, names, *facts):
    """Make the Table of {split: frame} with labels 0 and 1."""
    frame = in_splits(parts)
    frame["label"] = frame.label.replace({"0": names[0], "1": names[1]})
    return Table(file, frame[["text", "label", "split"]], *facts, names)


def sst2(root):
    """Socher et al. 2013, as in GLUE, which hides the labels of its own test set."""
    parts = {}
    for split, file in {"train": "train", "test": "dev"}.items():
        raw = take(root, "SST-2.zip", f"SST-2/{file}.tsv")
        frame = read_rows(raw, f"SST-2/{file}.tsv", ["sentence", "label"])
        parts[split] = frame.rename(columns={"sentence": "text"})
    facts = ("SST-2", "https://gluebenchmark.com", "Sentiment")
    yield binary("sst2.json", parts, ["Negative", "Positive"], *facts)


def cola(root):
    """Warstadt et al. 2019, as in GLUE or as its makers publish it (with two dev sets)."""
    files = {"train": ["CoLA/train.tsv"], "test": ["CoLA/dev.tsv"]}
    if (root / "in_domain_train.tsv").is_file():
        files = {"train": ["in_domain_train.tsv"]}
        files["test"] = ["in_domain_dev.tsv", "out_of_domain_dev.tsv"]
    parts = {}
    for split, names in files.items():
        raw = b"".join(take(root, "CoLA.zip", name) for name in names)
        columns = ["source", "label", "mark", "text"]
        parts[split] = read_rows(raw, names[0], columns, header=False)
    facts = ("CoLA", "https://nyu-mll.github.io/CoLA", "Acceptability")
    yield binary("cola.json", parts, ["Unacceptable", "Acceptable"], *facts)


SENTEVAL = """
sentence_length word_content tree_depth top_constituents bigram_shift past_present subj_number
obj_number odd_man_out coordination_inversion
""".split()  # noqa: SIM905


def senteval(root):
    """Conneau et al. 2018: ten files with tab-separated split, label and text."""
    for task in SENTEVAL:
        path = root / f"{task}.txt"
        if not path.is_file():
            path = root / "data/probing" / f"{task}.txt"
        if not path.is_file():
            raise missing(root, f"{task}.txt (nor data/probing/{task}.txt)")
        frame = read_rows(path.read_bytes(), path, ["split", "label", "text"], header=False)
        frame["split"] = frame.split.map({"tr": "train", "va": "val", "te": "test"})
        if frame.split.isna().any():
            raise InputError(f"{path}: a line does not begin with tr, va or te")
        numbers = frame.label.str.isdigit().all()
        labels = sorted(frame.label.unique(), key=int if numbers else str)
        kind = "Ordinal" if numbers else "Nominal"
        link = "https://github.com/facebookresearch/SentEval"
        facts = (f"SentEval {task}", link, task.replace("_", " "))
        yield Table(f"senteval_{task}.json", frame, *facts, labels, type=kind)


def blimp(root):
    """Warstadt et al. 2020: a file per paradigm with both sentences of each pair, grouped."""
    for uid, pairs in blimp_pairs(root).items():
        rows = []
        for i, pair in enumerate(pairs):
            rows.append((pair["sentence_good"], "Acceptable", i))
            rows.append((pair["sentence_bad"], "Unacceptable", i))
        frame = pd.DataFrame(rows, columns=["text", "label", "group"])
        topic = str(pairs[0].get("linguistics_term", uid)).replace("_", " ")
        facts = (f"BLiMP {uid}", "https://github.com/alexwarstadt/blimp", topic)
        yield Table(f"blimp_{uid}.json", frame, *facts, ["Unacceptable", "Acceptable"])


def blimp_pairs(root):
    """Read {paradigm: pairs} from a folder of .jsonl files or the repository's archive."""
    for folder in (root / "blimp-master/data", root / "blimp/data", root / "data", root):
        if any(folder.glob("*.jsonl")):
            return read_pairs(folder)
    path = root / "blimp-master.zip"
    if not path.is_file():
        raise missing(root, "data/*.jsonl nor blimp-master.zip")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if re.fullmatch(r"blimp-[^/]+/data/[^/]+\.jsonl", name):
                        Path(folder, Path(name).name).write_bytes(archive.read(name))
            return read_pairs(folder)
        except (zipfile.BadZipFile, InputError, OSError) as error:
            raise InputError(f"{path} is broken ({error}): delete it and start again") from None


BRYSBAERT = "Concreteness_ratings_Brysbaert_et_al_BRM.txt"


def concreteness(root):
    """Brysbaert et al. 2014: concreteness of words, mean of about 30 raters, 1 to 5."""
    path = root / BRYSBAERT
    if not path.is_file():
        raise missing(root, f"{BRYSBAERT} (the supplement's first sheet as tab-separated text)")
    frame = read_rows(path.read_bytes(), BRYSBAERT, ["Word", "Conc.M"])
    ratings = pd.to_numeric(frame["Conc.M"], errors="coerce")
    frame = pd.DataFrame({"text": frame.Word, "label": ((ratings - 1) / 4).round(4)})
    facts = ("Brysbaert concreteness", "https://doi.org/10.3758/s13428-013-0403-5", "Concreteness")
    yield Table("concreteness.json", frame, *facts, ["Abstract", "Concrete"], regression=True)


def ethics(root):
    """Hendrycks et al. 2021, short commonsense scenarios: is it wrong?"""
    parts = {}
    for split in ("train", "test"):
        name = f"ethics/commonsense/cm_{split}.csv"
        comma = {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL}
        raw = take(root, "ethics.tar", name)
        frame = read_rows(raw, name, ["label", "input", "is_short"], **comma)
        parts[split] = frame[frame.is_short == "True"].rename(columns={"input": "text"})
    link = "https://people.eecs.berkeley.edu/~hendrycks/ethics.tar"
    facts = ("ETHICS Commonsense", link, "Normativity")
    yield binary("ethics.json", parts, ["Normative", "Non-normative"], *facts)


HUB = read_yaml((HERE / "hub.yaml").read_text())


def hub(name, root):
    """A set of hub.yaml, from SET/**/SPLIT*/*.parquet or SET/**/*SPLIT*.parquet in root."""
    entry = HUB[name]
    parts = {}
    for split in entry["splits"]:
        of_split = re.compile(rf"(^|[-_/]){split}([-_/.]|$)")
        files = []
        for path in sorted((root / name).rglob("*.parquet")):
            if of_split.search(str(path.relative_to(root / name))):
                files.append(path)
        if not files:
            branch = f"{entry['repo']}, branch refs/convert/parquet"
            raise missing(root, f"{name}/**/{split}*.parquet ({branch})")
        try:
            frame = pd.concat([pd.read_parquet(file) for file in files])
        except (OSError, ValueError) as error:
            raise InputError(f"{files[0]} is broken ({error}): delete it and start again") from None
        if name == "humicroedit":
            pick_columns(frame, files[0], ["original", "edit"])
            headlines = zip(frame.original, frame.edit)
            frame["original"] = [put_word(headline, word) for headline, word in headlines]
        frame = pick_columns(frame, files[0], [entry["text"], entry["label"]])
        frame.columns = ["text", "label"]
        frame["label"] = hub_labels(entry, frame.label)
        labelled = frame.dropna()
        if len(labelled) < len(frame):
            n = len(frame) - len(labelled)
            print(f"{name}: {n:,} texts of {split} left out: no label, or one not in hub.yaml")
        parts["val" if split == "validation" else split] = labelled
    frame = in_splits(parts)
    if len(parts) == 1:
        del frame["split"]
    regression = "scale" in entry or isinstance(next(iter(entry["values"].values())), float)
    link = f"https://huggingface.co/datasets/{entry['repo']}"
    facts = (entry["name"], link, entry["topic"])
    language = entry.get("language", "En")
    names = entry["labels"]
    yield Table(f"{name}.json", frame, *facts, names, regression=regression, language=language)


def put_word(headline, word):
    """Replace the <marked/> word of a Humicroedit headline by `word`."""
    before, _, rest = headline.partition("<")
    return before + word + rest.partition("/>")[2] if rest else headline


def hub_labels(entry, labels):
    """Turn raw labels into class names or numbers in [0, 1]; NaN for texts to leave out."""
    if "scale" in entry:
        low, high = entry["scale"]
        return (pd.to_numeric(labels, errors="coerce") - low) / (high - low)
    return labels.astype(str).map(entry["values"])


def fetch_from_hub(name, folder):
    """Download a set's parquet files to folder/SET; the hub's client resumes and verifies."""
    from huggingface_hub import snapshot_download

    entry = HUB[name]
    patterns = [f"{entry['config']}/{split}/*.parquet" for split in entry["splits"]]
    options = {"repo_type": "dataset", "revision": "refs/convert/parquet"}
    try:
        snapshot_download(
            entry["repo"], **options, local_dir=folder / name, allow_patterns=patterns
        )
    except Exception as error:  # the client raises many kinds: no network, moved, disk full
        reason = type(error).__name__
        raise InputError(f"downloading {entry['repo']} from the hub failed ({reason})") from None


GLUE = "https://dl.fbaipublicfiles.com/glue/data"
RAW = "https://raw.githubusercontent.com"
PROBING = f"{RAW}/facebookresearch/SentEval/main/data/probing"
URLS = {  # set: {file in downloads/: URL}
    "sst2": {"SST-2.zip": f"{GLUE}/SST-2.zip"},
    "cola": {"CoLA.zip": f"{GLUE}/CoLA.zip"},
    "senteval": {f"{task}.txt": f"{PROBING}/{task}.txt" for task in SENTEVAL},
    "blimp": {
        "blimp-master.zip": "https://github.com/alexwarstadt/blimp/archive/refs/heads/master.zip"
    },
    "concreteness": {BRYSBAERT: f"{RAW}/ArtsEngine/concreteness/master/{BRYSBAERT}"},
    "ethics": {"ethics.tar": "https://people.eecs.berkeley.edu/~hendrycks/ethics.tar"},
}
SETS = {
    "grammar": grammar,
    "sst2": sst2,
    "cola": cola,
    "senteval": senteval,
    "blimp": blimp,
    "concreteness": concreteness,
    "ethics": ethics,
    **{name: partial(hub, name) for name in HUB},
}
# numbers of labelled texts in the published files, before any draw
PUBLISHED = {"sst2.json": 68_221, "cola.json": 9_594, "concreteness.json": 39_954}
PUBLISHED |= {f"senteval_{task}.json": 120_000 for task in SENTEVAL}


# ---- main


def arguments(argv):
    """Rewrite -data_save_path PATH, or a bare folder, as data_save_path=PATH."""
    rest = []
    path = ""
    remaining = iter(argv)
    for argument in remaining:
        if argument in ("-data_save_path", "--data_save_path"):
            path = next(remaining, "")
            if not path:
                print("error: -data_save_path needs a folder after it", file=sys.stderr)
                raise SystemExit(2)
        elif not path and not re.search(r"=|^-|\.ya?ml$", argument):
            path = argument
        else:
            rest.append(argument)
    return [*rest, f"data_save_path={path}"] if path else rest


def make_set(name, folder, config, downloads):
    """Write the files of a set; return their entries for sources.yaml, and notes on lost texts."""
    root = Path(config.root or folder / "downloads")
    if not config.root:
        for file, url in URLS.get(name, {}).items():
            download(url, root / file, downloads)
        if name in HUB:
            fetch_from_hub(name, root)
    files = {}
    notes = []
    for table in SETS[name](root):
        files[table.file] = write_table(folder, table, config.max_texts, config.seed)
        published = PUBLISHED.get(table.file, 0)
        if len(table.frame) < 0.99 * published:
            n = f"{len(table.frame):,} texts, but the published file has {published:,}"
            notes.append(f"{table.file}: {n}")
    if name == "blimp" and len(files) != 67:
        notes.append(f"{len(files)} paradigms, but BLiMP has 67")
    if notes and not config.root:
        raise InputError(f"{notes[0]}: delete {root} and start again")
    return files, notes


def is_made(folder, entry_of_set, options):
    """Return whether a set's files exist and match its entry in sources.yaml."""
    if entry_of_set.get("options") != options:
        return False
    for file, entry in entry_of_set["files"].items():
        if not (folder / file).exists() or file_hash(folder / file) != entry["sha256"]:
            return False
    return True


def main(config):
    folder = Path(config.data_save_path or os.path.relpath(HERE))
    folder.mkdir(parents=True, exist_ok=True)
    sources_path = folder / "sources.yaml"
    sources = {"sets": {}, "downloads": {}}
    if sources_path.exists():
        try:
            sources |= read_yaml(sources_path.read_text()) or {}
        except yaml.YAMLError:
            raise InputError(f"{sources_path} is not YAML: delete it and start again") from None
    options = {"max_texts": config.max_texts, "seed": config.seed}
    failed = []
    for name in dict.fromkeys(config.sets):
        if not config.overwrite and is_made(folder, sources["sets"].get(name, {}), options):
            print(f"{name} already exists (overwrite=True rebuilds it)")
            continue
        try:
            files, notes = make_set(name, folder, config, sources["downloads"])
            source = config.root or "the network"
            sources["sets"][name] = {"files": files, "options": options, "source": source}
            for line in notes:
                print(f"{name}: note: {line}")
            n_texts = sum(entry["texts"] for entry in files.values())
            print(f"{name}: {n_texts:,} texts ({len(files)} .json)", flush=True)
        except (InputError, OSError) as error:
            failed.append(name)
            print(f"{name}: {error}", flush=True)
        write_yaml(sources_path, sources)
    if failed:
        raise InputError(
            f"{', '.join(failed)} failed (see the lines above): give a folder with copies as "
            f"root=; the other sets are in {folder}"
        )
    print(f"{folder}: ready for probe.py dataset={folder}/FILE.json")


if __name__ == "__main__":
    main(configure(Config, arguments(sys.argv[1:])))
