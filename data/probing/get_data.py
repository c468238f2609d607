"""Texts and labels for probe.py, one data-json file a task: the embedded grammar, and what the field probes with.

    python data/probing/get_data.py -data_save_path data/probing                              # everything; grammar needs no network
    python data/probing/get_data.py -data_save_path data/probing sets=cola,senteval,blimp     # some; more can be added later
    python data/probing/get_data.py -data_save_path data/probing root=path/to/copies          # from local copies, as they come from their makers
    python probe.py dataset=probing/ethics.json

A data-json file is {data: {sentences: {"0": ...}, labels: {"0": ...}}, name, link, topic, task, size, average length, multiple, type, n_categories,
labels: {"0": name, ...}, language}; readme.md says what each key means. Archives are read where they lie and never unpacked, so no
path in them can lead anywhere. A download is resumed where it stopped, written aside and renamed; a set that cannot be had stops no other.
"""
import csv, gzip, hashlib, http.client, io, json, os, random, re, subprocess, sys, tarfile, urllib.error, urllib.request, zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure, write_aside
from data.stimuli import complete, read_meta, read_pairs, read_task

HERE = Path(__file__).resolve().parent
EMBEDDED = False  # most of it must be downloaded: nobody starts this behind the user's back


@dataclass
class Config:
    data_save_path: str = ""         # where the .json files go; "": this folder. Also as -data_save_path PATH
    sets: list[str] = field(default_factory=lambda: list(SETS))  # which, see readme.md
    root: str = ""                   # local copies: archives, unpacked archives, or NAME/*.parquet of a Hugging Face set; "": download
    max_texts: int = 20_000          # of a file, drawn at random, groups whole; 0: all
    seed: int = 0                    # of that draw
    overwrite: bool = False          # make again what is there

    def check(self):
        for name in self.sets:
            if name not in SETS:
                raise ValueError(f"sets: there is no '{name}', only {', '.join(SETS)}")
        if self.root and not Path(self.root).is_dir():
            raise FileNotFoundError(f"root={self.root} is no folder: give the one that holds SST-2.zip, ethics.tar, ... or what is in them")


class Table(NamedTuple):
    """One file to be: its name, texts with labels, and what the schema says about them."""
    file: str
    frame: pd.DataFrame              # text, label (a name, or a number in [0, 1] of a regression), and, where there are any, group and split
    name: str
    link: str
    topic: str
    labels: list                     # names: of the classes in their order, or of 0 and 1 of a regression
    regression: bool = False
    type: str = "Nominal"
    language: str = "En"
    synthetic: bool = False


# ---- the schema

def write_table(folder, table, max_texts, seed):
    """Write one data-json file; its entry in sources.yaml."""
    frame = table.frame.assign(text=table.frame.text.map(lambda text: " ".join(str(text).split())))
    empty = frame.text == ""
    frame = drawn(frame[~empty], max_texts, seed)
    if frame.label.nunique() < 2:
        raise ValueError(f"{table.file}: {len(frame)} texts with {frame.label.nunique()} different labels, and nothing can be told apart with fewer than two")
    values = frame.label.astype(float) if table.regression else frame.label.map({label: i for i, label in enumerate(table.labels)})
    if values.isna().any() or (table.regression and not values.between(0, 1).all()):
        raise ValueError(f"{table.file}: the label '{frame.label[values.isna() | (values < 0) | (values > 1)].iloc[0]}' is none of {', '.join(table.labels)}")
    data = {"sentences": numbered(frame.text), "labels": numbered(values if table.regression else values.astype(int))}
    for key in ("group", "split"):  # what a split may not part, and the split its makers gave
        if key in frame:
            data[key + "s"] = numbered(frame[key].astype(str))
    content = {"data": data, "name": table.name, "link": table.link, "topic": table.topic, "task": "Regression" if table.regression else "Classification",
               "size": len(frame), "average length": round(float(frame.text.str.split().str.len().mean()), 1), "multiple": False,
               "type": "Ordinal" if table.regression else table.type, "n_categories": "inf" if table.regression else len(table.labels),
               "labels": numbered(table.labels), "language": table.language, "synthetic": table.synthetic}
    text = json.dumps(content, ensure_ascii=False)
    write_aside(folder / table.file, text)
    return {"texts": len(frame), "empty": int(empty.sum()), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def numbered(values):
    return {str(i): value for i, value in enumerate(values)}


def drawn(frame, n, seed):
    """n rows or fewer (0: all) in a random order, so that the first of them are a fair draw too; groups stay together."""
    groups = (frame.group if "group" in frame else pd.Series(range(len(frame)), frame.index)).astype(str)
    order = sorted(groups.unique())
    random.Random(seed).shuffle(order)
    frame = frame.assign(_place=groups.map({group: i for i, group in enumerate(order)}).to_numpy()).sort_values("_place", kind="stable")
    upto = frame.groupby("_place").size().cumsum()
    return frame[frame._place.map(upto) <= (n or len(frame))].drop(columns="_place").reset_index(drop=True)


# ---- files

def take(root, archive, name):
    """Bytes of a file of a source, named by its path in the archive: unpacked under root, or from the archive in root, which stays packed."""
    path, packed = root / name, root / archive
    if path.is_file():
        return path.read_bytes()
    if not packed.is_file():
        raise FileNotFoundError(f"{root} has neither {name} nor {archive}: give root= the folder with either, or leave this set out of sets=")
    try:
        if packed.suffix == ".zip":
            with zipfile.ZipFile(packed) as file:
                return file.read(name)  # checks the CRC
        with tarfile.open(packed) as file:
            member = file.getmember(name)
            if not member.isfile():
                raise ValueError(f"{packed}: {name} is a link or a folder and no file: take the archive from its makers")
            return file.extractfile(member).read()
    except KeyError:
        raise ValueError(f"{packed} has no {name}: it is another archive than its name says; delete it and start again") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, gzip.BadGzipFile) as e:
        raise ValueError(f"{packed} is broken ({e}): delete it and start again") from None


def decode(raw, name):
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{name} is not UTF-8 text (byte {e.start}): take it from its makers again") from None


def table_of(raw, name, columns, header=True, quoting=csv.QUOTE_NONE, sep="\t"):
    """DataFrame of strings with these columns of a delimited text, broken lines left out."""
    rows = [row for row in csv.reader(io.StringIO(decode(raw, name), newline=""), delimiter=sep, quoting=quoting) if row]
    head = rows.pop(0) if header and rows else columns
    if missing := [column for column in columns if column not in head]:
        raise ValueError(f"{name} has no column '{missing[0]}', only {', '.join(head)}: it is another file than its name says")
    return pd.DataFrame([row for row in rows if len(row) == len(head)], columns=head)[columns]


DEAD = {}  # host: why it does not answer, so that each is waited for once


def download(url, path, sources):
    """Fetch url to path unless a file with the noted checksum is there. Resumes PATH.part, checks the length that the server gave, renames, notes
    the checksum in sources. Raises OSError with one sentence when it cannot be had."""
    noted = sources.setdefault("downloads", {}).get(path.name, {})
    if path.exists() and noted.get("sha256") == sha256(path):
        return
    part, host = path.with_name(path.name + ".part"), url.split("/")[2]
    part.parent.mkdir(parents=True, exist_ok=True)
    if host in DEAD:
        raise OSError(f"{url} is not reachable ({DEAD[host]})")
    for attempt in (1, 2, 3):
        start = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                if start and answer.status != 206:  # a server that begins again
                    start = 0
                total = start + int(answer.headers["Content-Length"]) if answer.headers["Content-Length"] else None
                with open(part, "ab" if start else "wb") as file:
                    while block := answer.read(1 << 20):
                        file.write(block)
            if total is None or part.stat().st_size == total:
                break
            reason = f"{part.stat().st_size:,} of {total:,} bytes came"
        except urllib.error.HTTPError as e:
            reason = f"HTTP {e.code}"
            if e.code == 416:  # what is there is longer than the file
                part.unlink()
            elif e.code < 500:
                raise OSError(f"{url} is not to be had ({reason}): it may have moved; give root= a local copy") from None
        except (OSError, http.client.HTTPException) as e:
            reason = str(getattr(e, "reason", e)) or type(e).__name__
            if not part.exists() or attempt == 3:
                DEAD[host] = reason
                raise OSError(f"{url} is not reachable ({reason})") from None
    else:
        raise OSError(f"{url} does not come whole ({reason}); what came is kept, start again to go on") from None
    os.replace(part, path)
    sources["downloads"][path.name] = {"url": url, "bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the sets: each function gives the Tables of a source that lies in `root`

def grammar(root):
    """The embedded grammar's tasks, made on the spot."""
    folder = HERE.parent / "grammar"
    if not complete(folder):
        subprocess.run([sys.executable, str(folder / "prepare.py")], check=True)
    for task, entry in read_meta(folder)["tasks"].items():
        yield Table(f"grammar_{task}.json", read_task(folder, task)[["text", "label", "group", "split"]], f"grammar/{task}", "data/grammar/prepare.py",
                    entry["description"], entry["labels"], synthetic=True)


def sst2(root):
    parts = [table_of(take(root, "SST-2.zip", f"SST-2/{split}.tsv"), "SST-2", ["sentence", "label"]).assign(split=name)
             for split, name in (("train", "train"), ("dev", "test"))]
    frame = pd.concat(parts).rename(columns={"sentence": "text"}).replace({"label": {"0": "Negative", "1": "Positive"}})
    yield Table("sst2.json", frame, "SST-2", "https://gluebenchmark.com", "Sentiment", ["Negative", "Positive"], type="Ordinal")


def cola(root):
    columns = ["source", "label", "mark", "text"]
    parts = [table_of(take(root, "CoLA.zip", f"CoLA/{split}.tsv"), "CoLA", columns, header=False).assign(split=name)
             for split, name in (("train", "train"), ("dev", "test"))]
    frame = pd.concat(parts)[["text", "label", "split"]].replace({"label": {"0": "Unacceptable", "1": "Acceptable"}})
    yield Table("cola.json", frame, "CoLA", "https://nyu-mll.github.io/CoLA", "Acceptability", ["Unacceptable", "Acceptable"], type="Ordinal")


SENTEVAL = ["sentence_length", "word_content", "tree_depth", "top_constituents", "bigram_shift", "past_present", "subj_number", "obj_number",
            "odd_man_out", "coordination_inversion"]


def senteval(root):
    """Conneau et al. 2018: split, label and text by tabs, ten files."""
    for task in SENTEVAL:
        path = next((p for p in (root / f"{task}.txt", root / "data/probing" / f"{task}.txt", root / "probing" / f"{task}.txt") if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{root} has no {task}.txt (nor data/probing/{task}.txt): give root= SentEval's folder, or leave senteval out of sets=")
        frame = table_of(path.read_bytes(), path, ["split", "label", "text"], header=False)
        frame["split"] = frame.split.map({"tr": "train", "va": "val", "te": "test"})
        if frame.split.isna().any():
            raise ValueError(f"{path}: a line begins with none of tr, va, te: it is no file of SentEval's")
        labels = sorted(frame.label.unique(), key=lambda v: (not v.isdigit(), int(v) if v.isdigit() else 0, v))
        yield Table(f"senteval_{task}.json", frame, f"SentEval {task}", "https://github.com/facebookresearch/SentEval", task.replace("_", " "), labels,
                    type="Ordinal" if labels[0].isdigit() else "Nominal")


def blimp(root):
    """Warstadt et al. 2020: both sentences of each minimal pair, which stay together; one file a paradigm."""
    folder = next((p for p in (root / "blimp-master/data", root / "blimp/data", root / "data", root) if any(p.glob("*.jsonl"))), None)
    if folder:
        found = {path.stem: read_pairs(path) for path in sorted(folder.glob("*.jsonl"))}
    elif (root / "blimp-master.zip").is_file():
        found = blimp_zip(root / "blimp-master.zip")
    else:
        raise FileNotFoundError(f"{root} has neither data/*.jsonl nor blimp-master.zip: give root= BLiMP's folder, or leave blimp out of sets=")
    for uid, pairs in ((uid, pairs) for of_file in found.values() for uid, pairs in of_file.items()):
        rows = [(pair[key], label, i) for i, pair in enumerate(pairs) for key, label in (("sentence_good", "Acceptable"), ("sentence_bad", "Unacceptable"))]
        topic = str(pairs[0].get("linguistics_term", uid)).replace("_", " ")
        yield Table(f"blimp_{uid}.json", pd.DataFrame(rows, columns=["text", "label", "group"]), f"BLiMP {uid}", "https://github.com/alexwarstadt/blimp", topic,
                    ["Unacceptable", "Acceptable"], type="Ordinal")


def blimp_zip(path):
    """{file: {UID: pairs}} of the repository's archive."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if re.fullmatch(r"blimp-[^/]+/data/[^/]+\.jsonl", n)):
                pairs = [json.loads(line) for line in decode(archive.read(name), name).splitlines() if line.strip()]
                found[name] = {str(pairs[0].get("UID", Path(name).stem)): pairs}
    except (zipfile.BadZipFile, ValueError, KeyError, IndexError) as e:
        raise ValueError(f"{path} is broken ({e}): delete it and start again") from None
    if not found:
        raise ValueError(f"{path} has no blimp-*/data/*.jsonl: delete it and start again")
    return found


BRYSBAERT = "Concreteness_ratings_Brysbaert_et_al_BRM.txt"


def concreteness(root):
    """Brysbaert et al. 2014: how concrete is a word, mean of about 30 raters, 1 to 5."""
    if not (root / BRYSBAERT).is_file():
        raise FileNotFoundError(f"{root} has no {BRYSBAERT}: save the supplement's first sheet as tab-separated text under this name")
    frame = table_of((root / BRYSBAERT).read_bytes(), BRYSBAERT, ["Word", "Conc.M"])
    frame = pd.DataFrame({"text": frame.Word, "label": ((frame["Conc.M"].astype(float) - 1) / 4).round(4)})
    yield Table("concreteness.json", frame, "Brysbaert concreteness", "https://doi.org/10.3758/s13428-013-0403-5", "Concreteness",
                ["Abstract", "Concrete"], regression=True)


def ethics(root):
    """Hendrycks et al. 2021, commonsense, the short ones: is it wrong?"""
    parts = [table_of(take(root, "ethics.tar", f"ethics/commonsense/cm_{split}.csv"), "ETHICS", ["label", "input", "is_short"], quoting=csv.QUOTE_MINIMAL,
                      sep=",").assign(split=split) for split in ("train", "test")]
    frame = pd.concat(parts)
    frame = frame[frame.is_short == "True"].rename(columns={"input": "text"}).replace({"label": {"0": "Normative", "1": "Non-normative"}})
    yield Table("ethics.json", frame[["text", "label", "split"]], "ETHICS Commonsense", "https://people.eecs.berkeley.edu/~hendrycks/ethics.tar",
                "Normativity", ["Normative", "Non-normative"], type="Ordinal")


class Hub(NamedTuple):
    """A set of the Hugging Face hub, read from the parquet files that the hub keeps of every set (its loading scripts are never run)."""
    repo: str
    config: str
    splits: list
    columns: list                    # of the text and of the label
    name: str
    topic: str
    labels: list
    value: Callable                  # raw label → a name, a number in [0, 1], or None: leave it out
    regression: bool = False
    language: str = "En"


def named(labels, *order):
    """A class number, or the name itself, as one of `labels`; `order` is the order of the hub's numbers where it is another."""
    order = order or labels
    return lambda v: order[int(v)] if str(v).lstrip("-").isdigit() and 0 <= int(v) < len(order) else str(v) if str(v) in order else None


SENTIMENT, HATE = ["Negative", "Positive"], ["Not hateful", "Hateful"]
LIAR = ["false", "half-true", "mostly-true", "true", "barely-true", "pants-fire"]  # the hub's order
TRUTH = ["pants-fire", "false", "barely-true", "half-true", "mostly-true", "true"]
HUB = {
    "amazon_polarity": Hub("fancyzhx/amazon_polarity", "amazon_polarity", ["test"], ["content", "label"], "Amazon polarity", "Sentiment",
                           SENTIMENT, named(SENTIMENT)),
    "app_reviews": Hub("sealuzh/app_reviews", "default", ["train"], ["review", "star"], "App reviews", "Sentiment", SENTIMENT,
                       lambda v: (int(v) - 1) / 4, True),
    "humor": Hub("CreativeLang/ColBERT_Humor_Detection", "default", ["train"], ["text", "humor"], "ColBERT humour", "Humour", ["Not humorous", "Humorous"],
                 lambda v: "Humorous" if str(v) in ("True", "1") else "Not humorous"),
    "dutch_social": Hub("corona-tweet/dutch_social", "dutch_social", ["train"], ["full_text", "label"], "Dutch social", "Sentiment", SENTIMENT,
                        lambda v: {"neg": 0.0, "neu": 0.5, "pos": 1.0, "0": 0.0, "1": 0.5, "2": 1.0}.get(str(v)), True, "Nl"),
    "hate_speech18": Hub("odegiber/hate_speech18", "default", ["train"], ["text", "label"], "Stormfront hate speech", "Hate speech", HATE,
                         lambda v: {"0": HATE[0], "1": HATE[1], "noHate": HATE[0], "hate": HATE[1]}.get(str(v))),  # skips 'idk/skip' and 'relation'
    "liar": Hub("ucsbnlp/liar", "default", ["train", "validation", "test"], ["statement", "label"], "Pants on fire", "Truthfulness", ["False", "True"],
                lambda v: TRUTH.index(named(LIAR)(v)) / 5 if named(LIAR)(v) else None, True),
    "humicroedit": Hub("SemEvalWorkshop/humicroedit", "subtask-1", ["train", "validation", "test"], ["original", "meanGrade"], "Humicroedit", "Humour",
                       ["Not funny", "Funny"], lambda v: float(v) / 3, True),
    "sst": Hub("stanfordnlp/sst", "default", ["train", "validation", "test"], ["sentence", "label"], "Stanford Sentiment Treebank",
               "Sentiment", SENTIMENT, float, True),
    "tweets_hate_speech": Hub("tweets-hate-speech-detection/tweets_hate_speech_detection", "default", ["train"], ["tweet", "label"],
                              "Tweets hate speech", "Hate speech", HATE, named(HATE)),
}


def hub(name, root):
    """One of HUB, from NAME/**/SPLIT*/*.parquet, or NAME/**/*SPLIT*.parquet, under root."""
    source, parts = HUB[name], []
    for split in source.splits:
        files = sorted(p for p in (root / name).rglob("*.parquet") if re.search(rf"(^|[-_/]){split}([-_/.]|$)", str(p.relative_to(root / name))))
        if not files:
            raise FileNotFoundError(f"{root / name} has no parquet files of '{split}': download {source.repo} (branch refs/convert/parquet) there, "
                                    f"or leave {name} out of sets=")
        frame = pd.concat([pd.read_parquet(file) for file in files])
        if missing := [column for column in source.columns if column not in frame]:
            raise ValueError(f"{files[0]} has no column '{missing[0]}', only {', '.join(frame.columns)}: it is no file of {source.repo}")
        if name == "humicroedit":  # the headline with the funny word put in
            frame["original"] = [re.sub(r"<[^<>]*/>", lambda _, word=edit: word, text) for text, edit in zip(frame.original, frame.edit)]
        frame = frame.dropna(subset=source.columns)
        part = pd.DataFrame({"text": frame[source.columns[0]].to_numpy(), "label": [source.value(v) for v in frame[source.columns[1]]]})
        parts.append(part.assign(split={"validation": "val"}.get(split, split)).dropna(subset=["text", "label"]))
    frame = pd.concat(parts)
    if len(source.splits) == 1:
        frame = frame.drop(columns="split")
    yield Table(f"{name}.json", frame, source.name, f"https://huggingface.co/datasets/{source.repo}", source.topic, source.labels, source.regression,
                "Ordinal", source.language)


def from_hub(name, folder):
    """The hub's parquet files of a set under folder/NAME: resumed and verified by huggingface_hub."""
    from huggingface_hub import snapshot_download
    if "huggingface.co" in DEAD:
        raise OSError(f"{HUB[name].repo} could not be had from the Hugging Face hub ({DEAD['huggingface.co']})")
    try:
        snapshot_download(HUB[name].repo, repo_type="dataset", revision="refs/convert/parquet", local_dir=folder / name,
                          allow_patterns=[f"{HUB[name].config}/{split}/*.parquet" for split in HUB[name].splits])
    except Exception as e:  # the hub's client has many: no network, no such proxy, moved, no disk
        if "Connect" in type(e).__name__ or "Offline" in type(e).__name__ or "LocalEntry" in type(e).__name__:
            DEAD["huggingface.co"] = type(e).__name__
        raise OSError(f"{HUB[name].repo} could not be had from the Hugging Face hub ({type(e).__name__})") from None


GLUE, RAW = "https://dl.fbaipublicfiles.com/glue/data", "https://raw.githubusercontent.com"
URLS = {  # set: {file in downloads/: where from}
    "grammar": {},
    "sst2": {"SST-2.zip": f"{GLUE}/SST-2.zip"},
    "cola": {"CoLA.zip": f"{GLUE}/CoLA.zip"},
    "senteval": {f"{task}.txt": f"{RAW}/facebookresearch/SentEval/main/data/probing/{task}.txt" for task in SENTEVAL},
    "blimp": {"blimp-master.zip": "https://github.com/alexwarstadt/blimp/archive/refs/heads/master.zip"},
    "concreteness": {BRYSBAERT: f"{RAW}/ArtsEngine/concreteness/master/{BRYSBAERT}"},
    "ethics": {"ethics.tar": "https://people.eecs.berkeley.edu/~hendrycks/ethics.tar"},
}
SETS = {"grammar": grammar, "sst2": sst2, "cola": cola, "senteval": senteval, "blimp": blimp, "concreteness": concreteness, "ethics": ethics,
        **{name: partial(hub, name) for name in HUB}}
WHOLE = {"sst2.json": 68_221, "cola.json": 9_594, "concreteness.json": 39_954}  # labelled texts of the published files, before any are drawn
WHOLE |= {f"senteval_{task}.json": 120_000 for task in SENTEVAL}


# ---- main

def arguments(argv):
    """The document's own spelling, -data_save_path PATH, and a bare folder, as key=value."""
    argv, path = list(argv), None
    for flag in ("-data_save_path", "--data_save_path"):
        if flag in argv:
            at = argv.index(flag)
            if at + 1 == len(argv):
                print("error: -data_save_path wants a folder after it", file=sys.stderr)
                raise SystemExit(2)
            path = argv[at + 1]
            del argv[at:at + 2]
    bare = [a for a in argv if "=" not in a and not a.startswith("-") and not a.endswith((".yaml", ".yml"))]
    if path is None and len(bare) == 1:
        path = argv.pop(argv.index(bare[0]))
    return [*argv, *([f"data_save_path={path}"] if path else [])]


def main(config):
    folder = Path(config.data_save_path) if config.data_save_path else Path(os.path.relpath(HERE))
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "sources.yaml"
    sources = (yaml.safe_load(note.read_text()) if note.exists() else None) or {}
    options, missing = {"max_texts": config.max_texts, "seed": config.seed}, {}
    for name in dict.fromkeys(config.sets):
        made = sources.setdefault("sets", {}).get(name, {})
        whole = made.get("files") and all((folder / f).exists() and sha256(folder / f) == entry["sha256"] for f, entry in made["files"].items())
        if whole and made.get("options") == options and not config.overwrite:
            print(f"{name}: there already ({len(made['files'])} file{'s' * (len(made['files']) > 1)}; overwrite=True makes them again)")
            continue
        root = Path(config.root) if config.root else folder / "downloads"
        try:
            if not config.root:
                for file, url in URLS.get(name, {}).items():
                    download(url, root / file, sources)
                if name in HUB:
                    from_hub(name, root)
            files, few = {}, []
            for table in SETS[name](root):
                files[table.file] = write_table(folder, table, config.max_texts, config.seed)
                if len(table.frame) < 0.99 * WHOLE.get(table.file, 0):
                    few.append(f"{table.file}: {len(table.frame):,} texts where the published file has {WHOLE[table.file]:,}")
            if name == "blimp" and len(files) != 67:
                few.append(f"{len(files)} paradigms where BLiMP has 67")
            if few and not config.root:
                raise ValueError(f"{few[0]}: delete {root} and start again")
        except (OSError, ValueError) as e:
            missing[name] = e
            print(f"{name}: {e}", flush=True)
            continue
        finally:
            write_aside(note, yaml.safe_dump(sources, sort_keys=False))
        sources["sets"][name] = {"files": files, "options": options, "source": config.root or "the network"}
        write_aside(note, yaml.safe_dump(sources, sort_keys=False))
        for line in few:
            print(f"{name}: note: {line}")
        print(f"{name}: {len(files)} file{'s' * (len(files) > 1)}, {sum(entry['texts'] for entry in files.values()):,} texts", flush=True)
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} could not be had (the lines above say why): go where there is network, or give root= a folder with "
                                f"local copies; what could be had is in {folder}")
    print(f"{folder}: dataset=FILE.json of probe.py")


if __name__ == "__main__":
    main(configure(Config, arguments(sys.argv[1:])))
