"""GLUE, nine tasks of sentence understanding (Wang et al. 2019), as labelled sentences for finetune.py and probe.py.

    python data/glue/prepare.py                                # all nine from the Hugging Face hub (about 170 MB), once
    python data/glue/prepare.py tasks=cola,rte                 # some; more can be added later
    python data/glue/prepare.py root=path/to/glue_data         # from a local copy: CoLA/train.tsv ..., or cola/train-*.parquet ...

GLUE's own development set, which has labels, becomes our test split, and a part of its training set our validation: the step that is chosen
on validation is then scored on text that had no say. The two of a pair stand in one text with a tab between.
"""
import hashlib, os, sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.stimuli import complete, read_meta, read_task, write_tasks

EMBEDDED = False  # must be downloaded: nobody starts this behind the user's back
HUB = "nyu-mll/glue"  # parquet files, TASK/SPLIT-*.parquet


class Glue(NamedTuple):
    """Where one task of GLUE stands in its files."""
    folder: str         # in the official archives
    columns: list       # one or two texts, in the TSV files
    parquet: list       # and on the hub
    label: str          # column of the TSV files; "label" on the hub
    labels: list        # in the order of the hub's numbers; [] of a regression
    description: str


PAIR = ["sentence1", "sentence2"]
ASK = ["question1", "question2"]
GLUE = {
    "cola": Glue("CoLA", ["sentence"], ["sentence"], "label", ["unacceptable", "acceptable"], "is it acceptable English?"),
    "sst2": Glue("SST-2", ["sentence"], ["sentence"], "label", ["negative", "positive"], "sentiment of a phrase from film reviews"),
    "mrpc": Glue("MRPC", ["#1 String", "#2 String"], PAIR, "Quality", ["not_equivalent", "equivalent"], "do two sentences say the same?"),
    "qqp": Glue("QQP", ASK, ASK, "is_duplicate", ["not_duplicate", "duplicate"], "do two questions ask the same?"),
    "stsb": Glue("STS-B", PAIR, PAIR, "score", [], "how alike are two sentences, 0 to 5?"),
    "mnli": Glue("MNLI", PAIR, ["premise", "hypothesis"], "gold_label", ["entailment", "neutral", "contradiction"], "does the second follow from the first?"),
    "qnli": Glue("QNLI", ["question", "sentence"], ["question", "sentence"], "label", ["entailment", "not_entailment"], "does it answer the question?"),
    "rte": Glue("RTE", PAIR, PAIR, "label", ["entailment", "not_entailment"], "does the second follow from the first?"),
    "wnli": Glue("WNLI", PAIR, PAIR, "label", ["not_entailment", "entailment"], "does it follow, with the pronoun replaced?"),
}
DEV = {"mnli": {"matched": ("dev_matched.tsv", "validation_matched"), "mismatched": ("dev_mismatched.tsv", "validation_mismatched")}}  # by column `set`


@dataclass
class Config:
    out_dir: str = ""                # "": this folder
    root: str = ""                   # local copy of GLUE; "": the Hugging Face hub
    tasks: list[Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]] = field(default_factory=lambda: list(GLUE))  # which
    val: int = 1000                  # texts of GLUE's training set kept for validation, at most a tenth of it
    overwrite: bool = False          # make them again although they are there

    def check(self):
        if self.val < 1:
            raise ValueError(f"val={self.val}: validation chooses the step, give it 1 text or more")


# ---- reading

def read_tsv(path, header=None):
    """DataFrame of strings of one of GLUE's TSV files (no quoting), and how many broken lines were left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}): take it from the archive again") from None
    lines = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    header = header or (lines.pop(0) if lines else [])
    whole = [line for line in lines if len(line) == len(header)]
    return pd.DataFrame(whole, columns=header), len(lines) - len(whole)


def read_part(root, name, tsv, split):
    """(DataFrame first, second, label; broken lines) of one file of a task, TSV or parquet, whichever is under root."""
    task = GLUE[name]
    path = root / task.folder / tsv
    files = sorted((root / name).glob(f"{split}-*.parquet"))
    if path.is_file():
        table, broken = read_tsv(path, ["source", "label", "mark", "sentence"] if name == "cola" else None)
        columns, label = task.columns, task.label
    elif files:
        table, broken, columns, label = pd.concat([pd.read_parquet(file) for file in files]), 0, task.parquet, "label"
        path = files[0]
    else:
        raise FileNotFoundError(f"{root} has neither {task.folder}/{tsv} nor {name}/{split}-*.parquet: give root= the folder with GLUE's own folders, "
                                f"or leave '{name}' out of tasks=")
    if missing := [column for column in [*columns, label] if column not in table]:
        raise ValueError(f"{path} has no column '{missing[0]}', only {', '.join(map(str, table.columns))}: it is no file of GLUE's {task.folder}")
    texts = table[columns].map(lambda text: " ".join(text.split()) if isinstance(text, str) else "")
    found = pd.DataFrame(dict(first=texts[columns[0]], text=texts[columns[0]].str.cat([texts[c] for c in columns[1:]], "\t"),
                              label=table[label].map(lambda value: label_of(task, value))))
    kept = (texts != "").all(axis=1) & found.label.notna()
    return found[kept].reset_index(drop=True), broken + int((~kept).sum())


def label_of(task, value):
    """A label's name (or number, of a regression) from a name or a class number; None for what is neither."""
    if not task.labels:
        try:
            return float(value)
        except ValueError:
            return None
    value = str(value)
    return value if value in task.labels else task.labels[int(value)] if value.isdigit() and int(value) < len(task.labels) else None


def key(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make_task(root, name, val):
    """{frame, kind, labels, description} of one task, as `write_tasks` takes it, and a line about it."""
    task = GLUE[name]
    train, broken = read_part(root, name, "train.tsv", "train")
    tests = []
    for which, (tsv, split) in DEV.get(name, {"": ("dev.tsv", "validation")}).items():
        part, bad = read_part(root, name, tsv, split)
        tests.append(part.assign(split="test", set=which, group="dev " + part["first"].map(key)))
        broken += bad
    test = pd.concat(tests)
    seen = train.text.isin(set(test.text))
    train = train[~seen]
    train = train.assign(split="train", set="", group=train["first"].map(key))  # texts with the same first sentence stay together
    sizes = train.groupby("group").size().sort_index().cumsum()  # in the order of their hashes
    train.loc[train.group.isin(sizes.index[sizes <= max(1, min(val, len(train) // 10))]), "split"] = "val"
    frame = pd.concat([train, test], ignore_index=True)[["split", "label", "text", "group", "set"]]
    if name not in DEV:
        frame = frame.drop(columns="set")
    said = f"{name}: " + ", ".join(f"{split} {n:,}" for split, n in frame.split.value_counts(sort=False).items())
    said += f"; {int(seen.sum()):,} training texts that GLUE also has in its development set, and {broken:,} broken lines, left out"
    return dict(frame=frame, kind="classification" if task.labels else "regression", labels=task.labels, description=task.description), said


def download(tasks):
    """Folder of the hub's parquet files of these tasks: cached, resumed and verified by huggingface_hub."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(HUB, repo_type="dataset", allow_patterns=[f"{task}/*.parquet" for task in tasks]))
    except Exception as e:  # the hub's client has many: no network, no such proxy, no disk
        raise OSError(f"GLUE could not be had from the Hugging Face hub ({type(e).__name__}): go where there is network, or give root= a local copy") from None


# ---- main

def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent))
    kept, options = {}, {"val": config.val}
    if not config.overwrite and complete(folder):
        meta = read_meta(folder)
        if meta.get("options") != options:
            raise ValueError(f"{folder} was made with {meta.get('options')}: give overwrite=True to make it again, or another out_dir")
        kept = {name: dict(frame=read_task(folder, name).drop(columns="y"), **{k: entry.get(k) for k in ("kind", "labels", "description")})
                for name, entry in meta["tasks"].items()}
    wanted = [name for name in config.tasks if name not in kept]
    if not wanted:
        print(f"{folder} has {', '.join(kept)} already (overwrite=True makes them again)")
        return
    if config.root and not Path(config.root).is_dir():
        raise FileNotFoundError(f"root={config.root} is no folder: give the one that holds CoLA/train.tsv, or cola/train-*.parquet")
    root = Path(config.root) if config.root else download(wanted)
    for name in wanted:
        kept[name], said = make_task(root, name, config.val)
        print(said, flush=True)
    write_tasks(folder, {name: kept[name] for name in GLUE if name in kept}, synthetic=False, source=config.root or HUB, options=options)
    print(f"{folder}: {', '.join(name for name in GLUE if name in kept)}; test is GLUE's development set")


if __name__ == "__main__":
    main(configure(Config))
