"""Texts of several conditions, as a localizer has them, and the contrasts between conditions."""

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
    """DataFrame with text and condition of a CSV, or of a folder whose CSVs are read together.

    Two published layouts are known by their columns: Fedorenko's localizer (stim1 .. stimN: number,
    words, S or N at the end) and Moseley's list (word, category, class). Raises InputError.
    """
    path = Path(path)
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise InputError(f"no stimuli at {path}: give a CSV, a folder of CSVs, or 'localizer'")
    parts = []
    for file in files:
        table = read_csv(check_content(file))
        if not len(table):
            raise InputError(f"{file} has a header and no rows")
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
    """Columns 'a,b' of a table as one column of text."""
    names = names.split(",")
    for name in names:
        if name not in table:
            columns = ", ".join(table.columns)
            raise InputError(f"{file} has no column '{name}', only {columns}: see text_column=")
    return table[names].agg(" ".join, axis=1)


@dataclass
class Contrast:
    """Stimuli of some conditions against those of others."""

    name: str  # A>B or A+B>C+D
    a: np.ndarray  # rows of the stimuli before the >
    b: np.ndarray  # and after it
    data: str = ""  # what the stimuli are called


def find_contrasts(conditions, wanted=(), data=""):
    """{name: Contrast} of the stimuli's conditions (N,).

    Where none is wanted, those of DEFAULT_CONTRASTS whose conditions are there, or every pair.
    """
    conditions = np.asarray(conditions)
    names = sorted(set(conditions))
    if len(names) < 2 and not wanted:
        raise InputError(f"{data}: the stimuli are of one condition, {names[0]}: two are needed")
    known = [c for c in DEFAULT_CONTRASTS if set(re.split("[>+]", c)) <= set(names)]
    every = map(">".join, itertools.combinations(names, 2))
    contrasts = {}
    for contrast in wanted or known or every:
        for condition in re.split("[>+]", contrast):
            n = (conditions == condition).sum()
            if n < 4:
                need = f"condition '{condition}' has {n} stimuli, 4 are needed"
                raise InputError(f"contrast '{contrast}': {need}; there are {', '.join(names)}")
        left, right = contrast.split(">")
        a = np.flatnonzero(np.isin(conditions, left.split("+")))
        b = np.flatnonzero(np.isin(conditions, right.split("+")))
        if np.isin(a, b).any():
            raise InputError(f"contrast '{contrast}' has a condition on both sides: name it once")
        contrasts[contrast] = Contrast(contrast, a, b, data)
    return contrasts
