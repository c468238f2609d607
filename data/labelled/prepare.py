r"""Turn a table of words or sentences with labels or ratings into labelled sentences.

    python data/labelled/prepare.py root=Concreteness_ratings_Brysbaert_et_al_BRM.txt \
        text=Word label=Conc.M by=Dom_Pos                                        # ratings
    python data/labelled/prepare.py root=things_concepts.tsv text=Word \
        label="Top-down Category (WordNet)"                                      # classes
    python finetune.py dataset=labelled/things_concepts task=label
    python topography.py stimuli=data/labelled/things_concepts/conditions.csv \
        contrasts="animal>food"

The table has a header and is separated by tabs or commas; words such as null and NA stay words.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, column, file_hash, folder_of, options_of, write_aside
from data.stimuli import complete, read_csv, to_number, word_key, write_tasks

EMBEDDED = False  # needs your table


@dataclass
class Config:
    root: str = ""  # the table
    text: str = "text"  # its column of words or sentences
    label: str = "label"  # its column of classes, or of ratings (more than two numbers)
    group: str = ""  # its column of groups that splits keep whole; "": spellings of one text
    least: int = 10  # leave out classes with fewer texts
    val: float = 0.1  # share of the groups
    test: float = 0.2  # share of the groups
    seed: int = 0  # for the split
    tail: float = 0.25  # share of the ratings in each of the conditions low and high
    by: str = ""  # column that subdivides conditions, such as part of speech: "high Noun"
    synthetic: bool = False  # marks made-up labels as synthetic in every table and figure
    out_dir: str = ""  # "": a subfolder of this one, named after the table
    overwrite: bool = False  # rebuild an existing dataset

    POSITIVE = "val test tail"

    def check(self):
        if not Path(self.root).is_file():
            raise InputError(f"root={self.root or '(nothing)'} does not exist: give a table")
        if self.val + self.test >= 1 or self.tail > 0.5:
            shares = f"val={self.val}, test={self.test}, tail={self.tail}"
            raise InputError(f"{shares}: val + test must be below 1, and tail at most 0.5")


def read_labels(config):
    """Return the columns text, label, group and by; the kind; and the number of rows left out."""
    path = Path(config.root)
    table = read_csv(path)
    rows = pd.DataFrame({"text": column(table, path, config.text)})
    rows["label"] = column(table, path, config.label)
    rows["group"] = rows["text"].map(word_key)
    if config.group:
        rows["group"] = column(table, path, config.group)
    rows["by"] = column(table, path, config.by) if config.by else ""
    kept = (rows["text"].str.strip() != "") & (rows["label"].str.strip() != "")
    numbers = rows["label"].map(to_number)
    kind = "classification"
    if np.isfinite(numbers[kept]).mean() > 0.5 and numbers[kept].nunique() > 2:
        kind = "regression"
        rows["label"] = numbers
        kept &= np.isfinite(numbers)
    else:
        kept &= rows.groupby("label")["text"].transform("size") >= config.least
    rows["text"] = rows["text"].str.split().str.join(" ")
    rows = rows[kept].drop_duplicates(["text", "label"], ignore_index=True)
    return rows, kind, len(table) - len(rows)


def draw_split(groups, config):
    """Assign whole groups to train, val or test; return (n,)."""
    names = np.random.default_rng(config.seed).permutation(sorted(set(groups)))
    n_test = round(config.test * len(names))
    n_val = round(config.val * len(names))
    split = dict.fromkeys(names, "train")
    split |= dict.fromkeys(names[:n_test], "test")
    split |= dict.fromkeys(names[n_test : n_test + n_val], "val")
    return groups.map(split)


def conditions(rows, kind, tail):
    """Return a DataFrame of text and condition: the classes, or the low and high ratings."""
    condition = rows["label"]
    if kind == "regression":
        low, high = rows["label"].quantile([tail, 1 - tail])
        condition = pd.Series("", rows.index)
        condition[rows["label"] <= low] = "low"
        condition[rows["label"] >= high] = "high"
    table = pd.DataFrame({"text": rows["text"]})
    table["condition"] = (condition + " " + rows["by"]).str.strip()
    return table[condition != ""]


def main(config):
    folder = folder_of(config, __file__, Path(config.root).stem)
    options = options_of(config)
    version = {"table": file_hash(config.root)}
    if already_made(folder, options, complete, config.overwrite, **version):
        return
    rows, kind, n_left_out = read_labels(config)
    rows["split"] = draw_split(rows["group"], config)
    labels = sorted(set(rows["label"])) if kind == "classification" else []
    task = {"frame": rows, "kind": kind, "labels": labels, "description": config.label}
    source = Path(config.root).name
    meta = {"synthetic": config.synthetic, "source": source, "options": options, **version}
    meta = write_tasks(folder, {"label": task}, **meta)
    table = conditions(rows, kind, config.tail)
    write_aside(folder / "conditions.csv", table.to_csv(index=False))
    sizes = ", ".join(f"{split} {n:,}" for split, n in meta["tasks"]["label"]["sizes"].items())
    kind_of_labels = f"{len(labels)} classes" if labels else "ratings"
    print(
        f"{folder}: {kind_of_labels}, {len(rows):,} texts in {rows['group'].nunique():,} groups; "
        f"{sizes}; {n_left_out:,} rows left out (no text, no label, a rare class, or a duplicate)"
    )
    print(f"conditions.csv: {table['condition'].value_counts().to_dict()}")


if __name__ == "__main__":
    main(configure(Config))
