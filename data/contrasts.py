"""Stimulus texts in several conditions, as in a localizer, and contrasts between conditions."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data import InputError, check_content
from data.stimuli import read_csv

DEFAULT_CONTRASTS = [
    "sentences>nonwords",
    "sentences>words",
    "jabberwocky>nonwords",
    "concrete noun+abstract noun>concrete verb+abstract verb",
    "concrete noun+concrete verb>abstract noun+abstract verb",
    "S>N",
]


def read_stimuli(path, text_column="text", condition_column="condition"):
    """Read text and condition from a CSV, or from all CSVs of a folder, into one DataFrame.

    Two published layouts are recognised by their columns: Fedorenko's localizer (stim1 .. stimN:
    number, words, then S or N) and Moseley's list (word, category, class). Raises InputError.
    """
    path = Path(path)
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise InputError(f"no stimuli at {path}: give a CSV, a folder of CSVs, or 'localizer'")
    parts = []
    for file in files:
        table = read_csv(check_content(file))
        if not len(table):
            raise InputError(f"{file} has a header but no rows")
        stims = table.filter(regex=r"^stim\d+$")
        if stims.shape[1] > 3:
            words = stims.iloc[:, 1:-1].agg(" ".join, axis=1)
            text = words.str.lower().str.split().str.join(" ")
            condition = stims.iloc[:, -1]
        elif {"word", "category", "class"} <= set(table.columns):
            text = table["word"]
            condition = table["category"] + " " + table["class"]
        else:
            text = join_columns(table, text_column, file)
            condition = join_columns(table, condition_column, file)
        empty = text.str.strip() == ""
        if empty.any():
            raise InputError(f"{file}, line {empty.idxmax()}: the text is empty")
        parts.append(pd.DataFrame({"text": text, "condition": condition}))
    return pd.concat(parts, ignore_index=True).drop_duplicates(ignore_index=True)


def join_columns(table, names, file):
    """Join the columns 'a,b' of a table into one column of text."""
    names = names.split(",")
    for name in names:
        if name not in table:
            columns = ", ".join(table.columns)
            raise InputError(f"{file} has no column '{name}', only {columns}: see text_column=")
    return table[names].agg(" ".join, axis=1)


@dataclass
class Contrast:
    """The stimuli of some conditions against those of others."""

    name: str  # A>B or A+B>C+D
    a: np.ndarray  # rows of the stimuli left of the >
    b: np.ndarray  # rows of the stimuli right of it
    data: str = ""  # name of the stimuli


def find_contrasts(conditions, wanted=(), data=""):
    """Return {name: Contrast} for the stimuli's conditions (N,).

    By default these are the DEFAULT_CONTRASTS whose conditions exist, or else every pair.
    """
    conditions = np.asarray(conditions)
    names = sorted(set(conditions))
    if len(names) < 2 and not wanted:
        raise InputError(f"{data}: all stimuli have the condition {names[0]}: give at least two")
    defaults = [c for c in DEFAULT_CONTRASTS if set(re.split("[>+]", c)) <= set(names)]
    pairs = map(">".join, itertools.combinations(names, 2))
    contrasts = {}
    for contrast in wanted or defaults or pairs:
        for condition in re.split("[>+]", contrast):
            n = (conditions == condition).sum()
            if n < 4:
                need = f"condition '{condition}' has {n} stimuli but needs at least 4"
                raise InputError(f"contrast '{contrast}': {need}; conditions: {', '.join(names)}")
        left, right = contrast.split(">")
        a = np.flatnonzero(np.isin(conditions, left.split("+")))
        b = np.flatnonzero(np.isin(conditions, right.split("+")))
        if np.isin(a, b).any():
            raise InputError(f"contrast '{contrast}' has a condition on both sides: name it once")
        contrasts[contrast] = Contrast(contrast, a, b, data)
    return contrasts
