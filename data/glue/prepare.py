"""GLUE, nine tasks of sentence understanding (Wang et al. 2019), as labelled sentences.

    python data/glue/prepare.py                        # download all nine from Hugging Face, once
    python data/glue/prepare.py tasks=cola,rte         # some; more can be added later
    python data/glue/prepare.py root=path/to/glue_data # a local copy: CoLA/*.tsv, cola/*.parquet
    python data/glue/prepare.py root=path/to/cola tasks=cola   # CoLA's release: in_domain_*.tsv

For finetune.py and probe.py. GLUE's development set, which has labels, becomes our test split, and
part of its training set becomes our validation split, so the test split plays no part in choosing
the step. A tab separates the two sentences of a pair in one text.
"""

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, column, folder_of, read_text
from data.stimuli import complete, read_meta, read_task, to_number, write_tasks

EMBEDDED = False  # must be downloaded: scripts never start this themselves
HUB = "nyu-mll/glue"  # parquet files, TASK/SPLIT-*.parquet
PAIR = ["sentence1", "sentence2"]
ENTAILS = ["entailment", "not_entailment"]


@dataclass
class Glue:
    """Where to find one task of GLUE, in the official TSV files and in the hub's parquet files."""

    folder: str  # in the official archives
    description: str
    labels: list = field(default_factory=list)  # in numeric order; []: a regression
    columns: list = field(default_factory=lambda: PAIR)  # one or two texts
    label: str = "label"  # column in the TSV files; on the hub always "label"
    parquet: list = field(default_factory=list)  # text columns on the hub; []: the same


GLUE = {
    "cola": Glue("CoLA", "is it acceptable English?", ["unacceptable", "acceptable"], ["sentence"]),
    "sst2": Glue(
        "SST-2", "sentiment of a phrase from film reviews", ["negative", "positive"], ["sentence"]
    ),
    "mrpc": Glue(
        "MRPC",
        "do two sentences mean the same?",
        ["not_equivalent", "equivalent"],
        ["#1 String", "#2 String"],
        label="Quality",
        parquet=PAIR,
    ),
    "qqp": Glue(
        "QQP",
        "do two questions ask the same?",
        ["not_duplicate", "duplicate"],
        ["question1", "question2"],
        label="is_duplicate",
    ),
    "stsb": Glue("STS-B", "how similar are two sentences, 0 to 5?", label="score"),
    "mnli": Glue(
        "MNLI",
        "does the second follow from the first?",
        ["entailment", "neutral", "contradiction"],
        label="gold_label",
        parquet=["premise", "hypothesis"],
    ),
    "qnli": Glue(
        "QNLI", "does the sentence answer the question?", ENTAILS, ["question", "sentence"]
    ),
    "rte": Glue("RTE", "does the second follow from the first?", ENTAILS),
    "wnli": Glue("WNLI", "does the second follow, with the pronoun replaced?", ENTAILS[::-1]),
}
COLA_HEADER = ["source", "label", "mark", "sentence"]  # its files have none


@dataclass
class Config:
    out_dir: str = ""  # "": this folder
    root: str = ""  # local copy of GLUE, or of CoLA alone; "": the Hugging Face hub
    tasks: list[Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]] = (
        field(default_factory=lambda: list(GLUE))
    )  # tasks to prepare
    val: int = 1000  # GLUE training texts kept for validation, at most a tenth of them
    overwrite: bool = False  # rebuild existing tasks

    POSITIVE = "val"

    def check(self):
        if self.root and not Path(self.root).is_dir():
            remedy = "give the one that holds CoLA/train.tsv, or cola/train-*.parquet"
            raise InputError(f"root={self.root} is not a folder: {remedy}")


# ---- reading


def find_files(root, name):
    """Return {part: [TSV file] or parquet files} for train and each development set."""
    if name == "cola" and (root / "in_domain_train.tsv").is_file():  # the release of CoLA's authors
        return {
            "train": [root / "in_domain_train.tsv"],
            "in_domain": [root / "in_domain_dev.tsv"],
            "out_of_domain": [root / "out_of_domain_dev.tsv"],
        }
    names = {"train": ("train", "train"), "": ("dev", "validation")}
    if name == "mnli":
        del names[""]
        for part in ("matched", "mismatched"):
            names[part] = (f"dev_{part}", f"validation_{part}")
    files = {}
    for part, (tsv, split) in names.items():
        files[part] = [root / GLUE[name].folder / f"{tsv}.tsv"]
        if not files[part][0].is_file():
            files[part] = sorted((root / name).glob(f"{split}-*.parquet"))
        if not files[part]:
            missing = f"{GLUE[name].folder}/{tsv}.tsv nor {name}/{split}-*.parquet"
            remedy = f"give the folder that holds GLUE's folders, or leave '{name}' out of tasks="
            raise InputError(f"root={root} has neither {missing}: {remedy}")
    return files


def read_tsv(path, header=None):
    """Read a GLUE TSV file, which has no quoting, as text; also count its broken lines."""
    rows = [line.rstrip("\r").split("\t") for line in read_text(path).split("\n") if line.strip()]
    if header is None:
        header = rows.pop(0) if rows else []
    complete_rows = [row for row in rows if len(row) == len(header)]
    return pd.DataFrame(complete_rows, columns=header), len(rows) - len(complete_rows)


def read_part(name, files):
    """Return first, text and label of one part of a task, and the number of texts left out."""
    task = GLUE[name]
    columns = task.columns
    label = task.label
    n_broken = 0
    if files[0].suffix == ".parquet":
        table = pd.concat(map(pd.read_parquet, files), ignore_index=True)
        columns = task.parquet or columns
        label = "label"
    else:
        table, n_broken = read_tsv(files[0], COLA_HEADER if name == "cola" else None)
    texts = pd.DataFrame()
    for key in columns:
        words = column(table, files[0], key).fillna("").astype(str).str.split()
        texts[key] = words.str.join(" ")
    part = pd.DataFrame({"first": texts[columns[0]], "text": texts.agg("\t".join, axis=1)})
    part["label"] = read_labels(column(table, files[0], label).astype(str), task.labels)
    kept = (texts != "").all(axis=1) & part["label"].notna()
    return part[kept], n_broken + int((~kept).sum())


def read_labels(labels, names):
    """Return labels by name (as numbers for a regression); NaN if unknown or hidden."""
    if not names:
        numbers = labels.map(to_number)
        return numbers.where(numbers.abs() < float("inf"))
    numbered = {str(number): name for number, name in enumerate(names)}
    labels = labels.replace(numbered)
    return labels.where(labels.isin(names))


def key(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make_task(root, name, n_val):
    """Return {frame, kind, labels, description} of one task, for `write_tasks`."""
    task = GLUE[name]
    files = find_files(root, name)
    train, n_left_out = read_part(name, files.pop("train"))
    tests = []
    for part, paths in files.items():
        test, n = read_part(name, paths)
        n_left_out += n
        tests.append(test.assign(split="test", set=part, group="dev " + test["first"].map(key)))
    test = pd.concat(tests)
    seen = train["text"].isin(set(test["text"]))
    train = train[~seen]
    # texts with the same first sentence stay together; the groups with the lowest hashes are val
    train = train.assign(split="train", set="", group=train["first"].map(key))
    sizes = train.groupby("group").size().sort_index().cumsum()
    val = sizes.index[sizes <= max(1, min(n_val, len(train) // 10))]
    train.loc[train["group"].isin(val), "split"] = "val"
    frame = pd.concat([train, test], ignore_index=True)
    if len(files) == 1:
        del frame["set"]
    frame = frame.drop(columns="first")
    sizes = frame["split"].value_counts()
    counts = ", ".join(f"{split} {sizes.get(split, 0):,}" for split in ("train", "val", "test"))
    print(
        f"{name}: {counts}; left out: {seen.sum():,} training texts that are in the development "
        f"set, {n_left_out:,} texts that are broken or have unknown labels",
        flush=True,
    )
    kind = "classification" if task.labels else "regression"
    entry = {"kind": kind, "labels": task.labels, "description": task.description}
    return {"frame": frame, **entry}


def download(tasks):
    """Return the folder of parquet files, cached, resumed and verified by huggingface_hub."""
    from huggingface_hub import snapshot_download

    patterns = [f"{task}/*.parquet" for task in tasks]
    try:
        return Path(snapshot_download(HUB, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the client raises many kinds: no network, no proxy, disk full
        remedy = "connect to the network, or give a local copy with root="
        problem = f"could not be downloaded from the Hugging Face hub ({type(error).__name__})"
        raise InputError(f"GLUE {problem}: {remedy}") from None


def main(config):
    folder = folder_of(config, __file__)
    options = {"val": config.val}
    tasks = {}
    wanted = list(config.tasks)
    if already_made(folder, options, complete, config.overwrite):
        for name, entry in read_meta(folder)["tasks"].items():  # keep them and add others
            frame = read_task(folder, name).drop(columns="y")
            tasks[name] = {"frame": frame, "labels": [], **entry}
        wanted = [name for name in config.tasks if name not in tasks]
    if not wanted:
        return
    root = Path(config.root) if config.root else download(wanted)
    for name in wanted:
        tasks[name] = make_task(root, name, config.val)
    ordered = {name: tasks[name] for name in GLUE if name in tasks}
    source = config.root or HUB
    write_tasks(folder, ordered, synthetic=False, source=source, options=options)
    print(f"{folder}: {', '.join(ordered)}; test is GLUE's development set")


if __name__ == "__main__":
    main(configure(Config))
