"""Read labelled texts from a JSON file, a task of data/stimuli.py, or brain responses to texts.

The JSON file has the schema of data/probing/readme.md; data/probing/get_data.py writes such files:

    {"data": {"sentences": {"0": text, ...}, "labels": {"0": label, ...}, "groups", "splits"},
     "name": ..., "task": "Classification" or "Regression", "labels": {"0": name, ...}, ...}

The four parts of "data" are matched by key; each may also be a list, matched by position.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse

from data import InputError, read_text
from data.stimuli import ENCODING_FORMAT, SPLITS, Encoding, read_meta, read_task


class LabelledTexts:
    """Labelled texts: len(), [i] -> (text, label).

    source: a data-json file or dict. Attributes: name, texts, y (N,), or (N, V) for V brain
    responses, kind (binary, multi, regression), label_names, meta, groups (N,) that splits keep
    together (equal texts always), split (N,) of train, val, test, or None. Raises InputError.
    """

    def __init__(self, source, force_classification=False):
        frame, names, meta = read_data_json(source, force_classification)
        name = source.get("name", "dict") if isinstance(source, dict) else Path(source).stem
        self._set(str(name), frame, frame.y.to_numpy(), names, meta)

    @classmethod
    def from_folder(cls, folder, task=""):
        """Load a prepared folder as a list: one task, all of its tasks, or its brain responses."""
        meta = (folder / "meta.yaml").read_text(encoding="utf-8", errors="replace")
        if ENCODING_FORMAT in meta:
            return [cls.from_encoding(folder)]
        tasks = [task] if task else read_meta(folder)["tasks"]
        return [cls.from_task(folder, task) for task in tasks]

    @classmethod
    def from_task(cls, folder, task):
        """Load one task of a prepared folder."""
        meta = read_meta(folder)
        frame = read_task(folder, task)
        entry = meta["tasks"][task]
        names = entry["labels"] if entry["kind"] == "classification" else None
        name = f"{Path(folder).name}/{task}"
        schema = {"name": name, "topic": task, "task": entry["kind"].capitalize()}
        schema |= {"link": meta.get("source", ""), "synthetic": bool(meta.get("synthetic"))}
        schema["labels"] = dict(enumerate(names or []))
        return cls.__new__(cls)._set(name, frame, frame.y.to_numpy(), names, schema)

    @classmethod
    def from_encoding(cls, folder):
        """Load texts and brain responses to them (data/stimuli.py), a column per unit."""
        encoding = Encoding(folder)
        if encoding.kind != "text":
            raise InputError(f"{folder} holds responses to pictures: give responses to texts")
        meta = {"task": "Regression", "synthetic": bool(encoding.meta["synthetic"])}
        y = encoding.mean_responses().squeeze()
        return cls.__new__(cls)._set(Path(folder).name, encoding.stimuli, y, None, meta)

    def _set(self, name, frame, y, label_names, meta):
        self.name = name
        self.frame = frame
        self.label_names = label_names
        self.y = np.array(y)
        self.meta = {**meta, "size": len(frame)}
        self.texts = frame.text.tolist()
        for i, text in enumerate(self.texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{name}: sentence {i} is empty or not text: leave it out")
        if len(np.unique(y, axis=0)) < 2:
            raise InputError(f"{name}: all {len(y)} labels are the same: give at least two")
        self.kind = "regression"
        if label_names:
            self.kind = "multi"
            if len(label_names) == 2:
                self.kind = "binary"
        self.split = None
        if {"train", "test"} <= set(frame.split):
            self.split = frame.split.to_numpy()
        self.groups = join_equal_texts(frame.group, frame.text)
        return self

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return self.texts[i], self.y[i]

    def first(self, n):
        """Return the first n texts (0: all), keeping the proportions of a given split."""
        if not n:
            return copy.copy(self)
        parts = self.frame.split.fillna("")
        n_of_part = n * parts.map(parts.value_counts(normalize=True))
        rows = parts.groupby(parts).cumcount() < n_of_part.round().clip(lower=1)
        frame = self.frame[rows].reset_index(drop=True)
        return copy.copy(self)._set(self.name, frame, self.y[rows], self.label_names, self.meta)

    def shuffled_labels(self, rng):
        """Return labels shuffled among groups of equal size, within the parts of a split."""
        y = self.y.copy()
        rows = pd.DataFrame({"row": range(len(y)), "group": self.groups, "part": 0})
        if self.split is not None:
            rows["part"] = self.split == "test"
        rows["size"] = rows.groupby(["part", "group"]).row.transform("size")
        for (_, size), part in rows.groupby(["part", "size"]):
            targets = part.sort_values("group").row.to_numpy().reshape(-1, size)  # (groups, size)
            sources = rng.permuted(targets[rng.permutation(len(targets))], axis=1)
            y[targets] = self.y[sources]
        return y


def join_equal_texts(groups, texts):
    """Return each text's group (N,): the given one, or its own; groups with equal texts merge."""
    n = len(texts)
    groups = np.where(groups.isna(), n + np.arange(n), pd.factorize(groups.astype(str))[0])
    same_text = 2 * n + pd.factorize(texts.str.strip().str.lower())[0]
    graph = scipy.sparse.coo_matrix((np.ones(n), (groups, same_text)), shape=(3 * n, 3 * n))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1][groups]


def read_data_json(source, force_classification=False):
    """Read a data-json file or dict as (frame, class names or None, meta). Raises InputError.

    frame: text, y, group (or None) and split (or ''). y: the class's number, or the regression
    value, scaled to [0, 1] if outside it; force_classification rounds it to 0 and 1.
    """
    where = source
    raw = source
    if isinstance(source, dict):
        where = source.get("name", "the dict")
    else:
        raw = _load(Path(source))
    frame = _frame(raw, where)
    meta = {**raw}
    del meta["data"]
    named = _by_key(meta.get("labels")).astype(str)
    labels = frame.pop("labels").tolist()
    if meta.get("task") != "Regression":
        y, names = _numbered(labels, named, where)
        return frame.assign(y=y), names, meta
    y = _scaled(labels, where)
    if force_classification:
        return frame.assign(y=np.round(y).astype(int)), [named.get(key, key) for key in "01"], meta
    return frame.assign(y=y), None, meta


def _by_key(values):
    """Return a numbered dict or a list (or None) as a Series with string keys."""
    values = pd.Series(values or {}, dtype=object)
    return values.set_axis(values.index.map(str))


def _load(path):
    if not path.exists():
        command = f"python data/probing/get_data.py -data_save_path {path.parent}"
        raise InputError(f"no dataset {path}: write it with {command}")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        remedy = "download it again, or convert a table with data/labelled/prepare.py"
        raise InputError(f"{path} is not JSON ({error}): {remedy}") from None


def _frame(raw, where):
    """Return text, labels, group (or None) and split (or ''), in the order of the sentences."""
    data = None
    if isinstance(raw, dict):
        data = raw.get("data")
    if not isinstance(data, dict) or not {"sentences", "labels"} <= set(data):
        schema = "see the schema in data/probing/readme.md"
        raise InputError(f"{where} has no sentences and labels under 'data': {schema}")
    frame = _by_key(data["sentences"]).to_frame("text")
    for part, column in {"labels": "labels", "groups": "group", "splits": "split"}.items():
        values = _by_key(data.get(part))
        if values.empty and part != "labels":
            frame[column] = None
        elif set(values.index) != set(frame.index):
            raise InputError(
                f"{where} has {len(frame)} sentences and {len(values)} {part}, or their keys "
                f"differ: give each sentence an entry of {part} under the same key"
            )
        else:
            frame[column] = values
    frame["split"] = frame.split.fillna("").astype(str).str.strip().str.lower()
    wrong = sorted(set(frame.split) - set(SPLITS))
    if wrong and set(frame.split) != {""}:
        remedy = "set every split to train, val or test, or leave all splits out"
        raise InputError(f"{where} has sentences in the split '{wrong[0]}': {remedy}")
    return frame.reset_index(drop=True)


def _numbered(labels, named, where):
    """Number the labels from 0 (numbers in order, then words); return them and the class names."""
    for label in labels:
        if not isinstance(label, (str, int, float)) or label != label:
            raise InputError(f"{where} has the label {label}: use numbers or names")
    classes = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    numbers = pd.to_numeric(pd.Series(classes, dtype=object), errors="coerce").dropna()
    for _, same in numbers.groupby(numbers):
        if len(same) > 1:
            spellings = " and ".join(repr(classes[i]) for i in same.index)
            raise InputError(f"{where} has the labels {spellings}: spell equal labels alike")
    names = []
    for label in classes:
        key = label if isinstance(label, str) else str(label + 0).removesuffix(".0")  # True: 1
        names.append(named.get(key, key))
    number = {label: i for i, label in enumerate(classes)}
    return [number[label] for label in labels], names


def _scaled(labels, where):
    y = pd.to_numeric(pd.Series(labels), errors="coerce").to_numpy(float)
    if not np.isfinite(y).all():
        raise InputError(f"{where}: not all labels are numbers: fix them, or set another task")
    if y.min() < 0 or y.max() > 1:
        y = (y - y.min()) / max(np.ptp(y), 1e-12)
    return y
