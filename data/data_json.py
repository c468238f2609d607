"""Labelled texts as one JSON file, the schema of data/probing/readme.md; get_data.py writes them.

    {"data": {"sentences": {"0": text, ...}, "labels": {"0": label, ...}, groups and splits alike},
     "name": ..., "task": "Classification" or "Regression", "labels": {"0": name, ...}, ...}

The four parts are matched by key; each may be a list, whose keys are the places.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from data import InputError


def read_data_json(source, force_classification=False):
    """A data-json, file or dict, as (frame, names of the classes or None, meta).

    frame has text, y, group and split (None where it has none). y is the number of the class, or
    the value of a regression, scaled to [0, 1] where it is not in it; force_classification rounds
    it to 0 and 1. meta is all but the data. Raises InputError.
    """
    where = source.get("name", "the dict") if isinstance(source, dict) else source
    raw = source if isinstance(source, dict) else _load(Path(source))
    columns = _columns(raw, where)
    meta = {key: value for key, value in raw.items() if key != "data"}
    named = meta.get("labels") or {}
    if isinstance(named, list):
        named = dict(enumerate(named))
    named = {str(key): str(name) for key, name in named.items()}
    if meta.get("task") != "Regression":
        y, names = _numbered(columns.pop("labels"), named, where)
    else:
        y, names = _scaled(columns.pop("labels"), where), None
        if force_classification:
            y, names = np.round(y).astype(int), [named.get("0", "0"), named.get("1", "1")]
    return pd.DataFrame(columns).assign(y=y), names, meta


def _load(path):
    if not path.exists():
        command = f"python data/probing/get_data.py -data_save_path {path.parent}"
        raise InputError(f"no dataset {path}: write it with {command}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): download it again") from None


def _columns(raw, where):
    """{text, labels, group, split} as lists in the order of the sentences' keys."""
    data = raw.get("data") if isinstance(raw, dict) else None
    if not isinstance(data, dict) or not {"sentences", "labels"} <= set(data):
        schema = "see the schema in data/probing/readme.md"
        raise InputError(f"{where} has no data: sentences and labels: {schema}")
    columns, keys = {}, []
    parts = {"sentences": "text", "labels": "labels", "groups": "group", "splits": "split"}
    for part, column in parts.items():
        values = data.get(part)
        if not values and part in ("groups", "splits"):
            columns[column] = None
            continue
        if isinstance(values, list):
            values = dict(enumerate(values))
        values = {str(key): value for key, value in values.items()}
        keys = keys or list(values)
        if set(values) != set(keys):
            raise InputError(
                f"{where} has {len(keys)} sentences and {len(values)} {part}, or their keys "
                "differ: give each sentence its own under the same key"
            )
        columns[column] = [values[key] for key in keys]
    return columns


def _numbered(labels, named, where):
    """Labels as numbers from 0 (numbers in order, then words), and the names of the classes."""
    for label in labels:
        if not isinstance(label, (str, int, float)) or label != label:
            raise InputError(f"{where} has the label {label}: labels are numbers or names")
    classes = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    names = []
    for label in classes:
        key = label if isinstance(label, str) else str(label + 0).removesuffix(".0")  # True: 1
        names.append(named.get(key, key))
    number = {label: i for i, label in enumerate(classes)}
    return [number[label] for label in labels], names


def _scaled(labels, where):
    y = pd.to_numeric(pd.Series(labels), errors="coerce").to_numpy(float)
    if not np.isfinite(y).all():
        raise InputError(f"{where} is a regression, and not all of its labels are numbers")
    if y.min() < 0 or y.max() > 1:
        y = (y - y.min()) / max(np.ptp(y), 1e-12)
    return y
