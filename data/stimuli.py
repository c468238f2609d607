"""Labelled sentences, minimal pairs, and stimuli with the responses of brains to them.

A dataset of labelled sentences is a folder of plain files:
    TASK.csv            one labelled sentence per row: split (train, val or test), label, text,
                        group, and any other columns
    pairs/UID.jsonl     minimal pairs in BLiMP's form, one JSON object per line: sentence_good,
                        sentence_bad, UID, field, ...
    meta.yaml           format, synthetic, tasks (file, kind, labels, sizes, chance, description,
                        sha256), pairs (file, pairs, ...) and any other keys; written last, so it
                        marks a complete folder

A task is a `classification` (labels are names, numbered in the order of meta.yaml) or a
`regression` (labels are numbers). A group is never split: the members of a minimal pair, the
repetitions of a sentence. BLiMP's own files (Warstadt et al. 2020) are read as well.

A dataset of responses, for encoding models, is another folder:
    stimuli.csv         one stimulus per row: text, or file (an image's path from the folder),
                        group (equal texts share one, however spelled), split (train, val, test, or
                        empty in all rows: scripts then split by groups), and any other columns
    responses.npy       (P, V) float32: the responses of V units (voxels, electrodes, sites) in P
                        presentations, all finite
    presentations.csv   one presentation per row: stimulus (its row in stimuli.csv, from 0),
                        repeat (0, 1, ... of that stimulus)
    units.csv           one unit per row: roi, subject, ceiling (the highest R² that any model can
                        reach against mean responses; empty if unknown)
    meta.yaml           format, kind (text or image), modality, species, source, synthetic, sizes,
                        sha256 of the responses; written last

People with the same stimuli share a dataset, side by side, with their names in `subject`. Units
that lack stimuli need their own dataset.
"""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

from data import (
    InputError,
    aside,
    check_content,
    column,
    file_hash,
    load_meta,
    read_text,
    remedy,
    write_aside,
    write_yaml,
)

FORMAT = "stimuli-1"
ENCODING_FORMAT = "encoding-1"
COLUMNS = ["split", "label", "text", "group"]
SPLITS = ["train", "val", "test"]
ABOUT = ["modality", "species", "source", "synthetic"]  # in meta.yaml of every set of responses
BLOCK = 4096  # presentations to check at a time


# ---- labelled sentences and minimal pairs


def write_tasks(folder, tasks, pairs=None, **meta):
    """Write a dataset of labelled sentences and return its meta.

    tasks: {name: {frame, kind, labels, description}}, frame: a DataFrame with COLUMNS and any
    others; pairs: {UID: [{sentence_good, sentence_bad, ...}, ...]}; meta: more keys, plain types.
    Raises InputError for what the readers would refuse, before it writes anything.
    """
    folder = Path(folder)
    contents = {}
    entries = {"tasks": {}, "pairs": {}}
    for name, task in tasks.items():
        path = folder / f"{name}.csv"
        contents[path], entries["tasks"][name] = _task_file(path, name, task)
    for uid, members in (pairs or {}).items():
        path = folder / "pairs" / f"{uid}.jsonl"
        contents[path], entries["pairs"][uid] = _pairs_file(path, uid, members)

    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    if (folder / "meta.yaml").exists():
        (folder / "meta.yaml").unlink()
        for path in (folder / "pairs").glob("*.jsonl"):
            if path not in contents:  # from an older version
                path.unlink()
    for path, content in contents.items():
        write_aside(path, content)
    meta = {"format": FORMAT, **entries, **meta}
    write_yaml(folder / "meta.yaml", meta)
    return meta


def _task_file(path, name, task):
    """Check a task; return the text of its CSV and its entry in meta.yaml."""
    frame = task["frame"]
    for needed in COLUMNS:
        column(frame, f"task '{name}'", needed)
    content = _columns_first(frame, COLUMNS).to_csv(index=False, lineterminator="\n")
    entry = {"file": path.name, "kind": task["kind"], "description": task["description"]}
    if task["kind"] == "classification":
        entry["labels"] = list(task["labels"])
    table = _check_task(_csv_table(content, path), path, entry)
    counts = table["split"].value_counts()
    entry["sizes"] = {split: int(counts[split]) for split in SPLITS if split in counts}
    last_split = list(entry["sizes"])[-1]
    entry["chance"] = 0.0
    if task["kind"] == "classification":
        labels = table["label"][table["split"] == last_split]
        entry["chance"] = float(labels.value_counts(normalize=True).max())
    entry["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    return content, entry


def _pairs_file(path, uid, members):
    """Check minimal pairs; return the text of their JSONL file and its entry in meta.yaml."""
    lines = [json.dumps({"UID": uid, **pair}, ensure_ascii=False) + "\n" for pair in members]
    content = "".join(lines)
    _parse_pairs(content, path)
    entry = {"file": f"pairs/{path.name}", "pairs": len(members)}
    for key in ("field", "linguistics_term"):
        if key in members[0]:
            entry[key] = members[0][key]
    entry["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    return content, entry


def read_meta(folder):
    """Return meta.yaml of a dataset of labelled sentences. Raises InputError.

    chance: the score of a constant answer on the test split, i.e. the share of the most frequent
    label, or R² 0 for a regression; sizes: {split: number of sentences}.
    """
    meta = load_meta(folder, "stimuli", FORMAT)
    for part, keys in (("tasks", ["file", "kind", "sizes", "chance"]), ("pairs", ["file"])):
        for name, entry in meta.setdefault(part, {}).items():
            for key in keys:
                if key not in entry:
                    path = Path(folder) / "meta.yaml"
                    raise InputError(f"{path}: '{name}' lacks the key '{key}'{remedy(folder)}")
    return meta


def read_task(folder, name):
    """Return a task's table: COLUMNS, any others as text, and y, the label's number.

    y: its place among the labels (int64), or the label itself for a regression (float64). Raises
    InputError with the line.
    """
    tasks = read_meta(folder)["tasks"]
    if name not in tasks:
        raise InputError(f"{folder} has no task '{name}', only {', '.join(tasks)}")
    path = Path(folder) / tasks[name]["file"]
    return _check_task(read_csv(path), path, tasks[name]).reset_index(drop=True)


def read_pairs(path):
    """Return {UID: [pair, ...]}, each pair the dict of its JSON line. Raises InputError.

    path: a dataset as above, or BLiMP's .jsonl, one or a folder. UID: by default the file name.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        files = [path]
    elif (path / "meta.yaml").is_file():
        files = [path / entry["file"] for entry in read_meta(path)["pairs"].values()]
    else:
        files = sorted(check_content(path).glob("*.jsonl"))
    if not files:
        raise InputError(f"{path} holds no minimal pairs (*.jsonl){remedy(path)}")
    pairs = {}
    for file in files:
        for pair in _parse_pairs(read_text(file), file):
            pairs.setdefault(pair["UID"], []).append(pair)
    return pairs


def complete(folder):
    """Return whether all files of a folder of labelled sentences match their checksums."""
    try:
        meta = read_meta(folder)
        for entry in [*meta["tasks"].values(), *meta["pairs"].values()]:
            if file_hash(Path(folder) / entry["file"]) != entry.get("sha256"):
                return False
    except (ValueError, OSError):
        return False
    return True


# ---- stimuli with responses


def write_encoding(folder, stimuli, responses, presentations=None, units=None, **meta):
    """Write a dataset of stimuli with responses and return its meta. Raises InputError.

    stimuli: DataFrame with text or file (images already in the folder), optionally group (default:
    equal texts share one) and split; responses: (P, V) floats; presentations: stimulus, optionally
    repeat (default: each stimulus once); units: optionally roi, subject, ceiling; meta: ABOUT and
    any other keys.
    """
    folder = Path(folder)
    responses = np.asarray(responses)
    if presentations is None:
        presentations = pd.DataFrame({"stimulus": range(len(stimuli))})
    if units is None:
        units = pd.DataFrame({"subject": [""] * responses.shape[1]})
    stimuli, kind = _check_stimuli(_as_csv(stimuli), folder / "stimuli.csv")
    path = folder / "presentations.csv"
    presentations = _check_presentations(_as_csv(presentations), len(stimuli), path)
    units = _check_units(_as_csv(units), folder / "units.csv")
    path = folder / "responses.npy"
    _check_responses(responses, (len(presentations), len(units)), path)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").unlink(missing_ok=True)
    with aside(path) as file:
        np.save(file, np.ascontiguousarray(responses, "<f4"))
    tables = {"stimuli": stimuli, "presentations": presentations, "units": units}
    for name, table in tables.items():
        write_aside(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    about = {"format": ENCODING_FORMAT, "kind": kind}
    about |= {key: meta.pop(key) for key in ABOUT}
    about["synthetic"] = bool(about["synthetic"])
    about["sizes"] = {name: len(table) for name, table in tables.items()}
    about["sha256"] = file_hash(path)
    write_yaml(folder / "meta.yaml", about | meta)
    return about | meta


class Encoding:
    """A dataset of stimuli with responses (see the top of this file), checked. Raises InputError.

    stimuli, presentations, units: DataFrames of n, P and V rows; responses: (P, V) float32 memmap,
    read-only; kind: text or image; meta: meta.yaml; path: the folder.
    """

    def __init__(self, folder):
        self.path = Path(folder)
        self.meta = load_meta(folder, "stimuli with responses", ENCODING_FORMAT, ("kind", *ABOUT))
        path = self.path / "stimuli.csv"
        self.stimuli, self.kind = _check_stimuli(read_csv(path), path)
        path = self.path / "presentations.csv"
        self.presentations = _check_presentations(read_csv(path), len(self.stimuli), path)
        path = self.path / "units.csv"
        self.units = _check_units(read_csv(path), path)
        path = check_content(self.path / "responses.npy")
        try:
            self.responses = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            reason = " ".join(str(error).split())[:80]
            raise InputError(f"{path} is not a NumPy array ({reason}){remedy(folder)}") from None
        _check_responses(self.responses, (len(self.presentations), len(self.units)), path)
        if self.kind == "image":
            for file in self.stimuli["file"]:
                check_content(self.path / file)

    def inputs(self):
        """Return the texts, or the paths of the images."""
        if self.kind == "text":
            return self.stimuli["text"].tolist()
        return [self.path / file for file in self.stimuli["file"]]

    def select_units(self, subject="", roi=""):
        """Return (V,) bool, the units of one subject and one region; "" means all."""
        selected = np.ones(len(self.units), bool)
        for name, wanted in (("subject", subject), ("roi", roi)):
            if wanted:
                selected &= (self.units[name] == wanted).to_numpy()
            if not selected.any():
                names = ", ".join(sorted(set(self.units[name]) - {""})) or f"no {name} at all"
                raise InputError(f"{self.path} has no units of {name}={wanted}: it has {names}")
        return selected

    def mean_responses(self, units=None):
        """Return (n, V) float64, the mean response to each stimulus; units: (V,) bool or all."""
        responses = self.responses if units is None else self.responses[:, units]
        means = pd.DataFrame(np.asarray(responses, np.float64))
        return means.groupby(self.presentations["stimulus"].to_numpy()).mean().to_numpy()


def complete_encoding(folder):
    """Return whether the folder opens as an Encoding and its responses match their checksum."""
    try:
        return file_hash(Path(folder) / "responses.npy") == Encoding(folder).meta.get("sha256")
    except (ValueError, OSError):
        return False


def link_images(places, folder):
    """Hard-link or else copy images into a dataset; places: {name: path}."""
    for name, path in places.items():
        target = folder / name
        if target.exists() and target.samefile(path):  # already in its place
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(Path(path).resolve(), target)
        except OSError:
            shutil.copyfile(path, target)


def print_sizes(folder, meta):
    """Print the sizes of a dataset of stimuli with responses, and what was left out."""
    counts = [f"{count:,} {what}" for what, count in meta["sizes"].items()]
    print(f"{folder}: {', '.join(counts)}")
    for what in meta.get("left_out", []):
        print(f"left out: {what}")


# ---- words and tables


def word_key(word):
    """Return what spellings of a word or text share: Café and CAFÉ, ice-cream and ice cream."""
    folded = unicodedata.normalize("NFKC", word).casefold()
    return re.sub(r"[\W_]", "", folded) or folded


def to_number(text):
    """Return a text as a number, NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return np.nan


def read_csv(path):
    """Read a table with commas or tabs as text, indexed by line number: "None" stays a word."""
    return _csv_table(read_text(path), path)


def _csv_table(text, path):
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines = []
    rows = []
    try:
        for row in filter(None, reader):
            lines.append(reader.line_num)
            rows.append(row)
            if len(row) != len(rows[0]):
                raise csv.Error(f"{len(row)} fields, but the header has {len(rows[0])}")
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    header = rows[0] if rows else []
    if len(set(header)) < len(header):
        raise InputError(f"{path}, line 1: the header names a column twice ({', '.join(header)})")
    return pd.DataFrame(rows[1:], index=lines[1:], columns=header, dtype=str)


def _as_csv(frame):
    """Return a DataFrame as `read_csv` would read it back from its file."""
    return _csv_table(pd.DataFrame(frame).to_csv(index=False, lineterminator="\n"), "the table")


def _columns_first(table, names):
    """Return the table with these columns first."""
    return table[names + [name for name in table if name not in names]]


# ---- checking


def _refuse(wrong, values, path, what):
    """Raise InputError for the first line where `wrong` is true."""
    if wrong.any():
        line = wrong.idxmax()
        raise InputError(f"{path}, line {line}: the {values.name} '{values[line]}' {what}")


def _refuse_torn(table, name, path):
    """Raise InputError if a group (or text) is in more than one split."""
    splits = table.groupby(name)["split"].unique()
    torn = splits[splits.str.len() > 1]
    if len(torn):
        places = " and in ".join(sorted(torn.iloc[0]))
        where = f"the {name} '{torn.index[0]}' is in {places}"
        raise InputError(f"{path}: {where}, but must stay in one split")


def _check_task(table, path, entry):
    """Check the table of a task, as `read_csv` returns it, and add its column y."""
    labels = entry.get("labels") or []
    for name in COLUMNS:
        column(table, path, name)
    split, label = table["split"], table["label"]
    _refuse(table["text"].str.strip() == "", table["text"], path, "is empty")
    _refuse(~split.isin(SPLITS), split, path, f"is none of {', '.join(SPLITS)}")
    if entry["kind"] == "classification":
        _refuse(~label.isin(labels), label, path, f"is none of {', '.join(labels)}")
        table["y"] = label.map({name: i for i, name in enumerate(labels)}).astype("int64")
    elif entry["kind"] == "regression":
        table["y"] = label.map(to_number).astype("float64")
        _refuse(~np.isfinite(table["y"]), label, path, "is not a number")
        table["label"] = table["y"]
    else:
        kind = entry["kind"]
        raise InputError(f"{path}: the kind '{kind}' is neither classification nor regression")
    _refuse_torn(table, "group", path)
    _refuse_torn(table, "text", path)
    learned = table["label"][split == "train"] if "train" in set(split) else table["label"]
    if learned.nunique() < 2:
        labels = f"only the label {learned.iloc[0]!r}" if len(learned) else "no labels"
        raise InputError(f"{path}: the training sentences have {labels}, but two are needed")
    return table


def _check_stimuli(table, path):
    """Return the stimuli with all their columns, and their kind, text or image."""
    name = column(table, path, "text", "file").name
    _refuse(table[name].str.strip() == "", table[name], path, "is empty")
    if "group" not in table:  # equal texts must stay in one split
        table["group"] = table[name].map(word_key) if name == "text" else table[name]
    if "split" not in table:
        table["split"] = ""
    split = table["split"]
    if (split != "").any():
        _refuse(~split.isin(SPLITS), split, path, f"is none of {', '.join(SPLITS)}")
        _refuse_torn(table, "group", path)
        _refuse_torn(table, name, path)
    table = _columns_first(table, [name, "group", "split"]).reset_index(drop=True)
    return table, "text" if name == "text" else "image"


def _check_presentations(table, n_stimuli, path):
    """Return presentations.csv with stimulus and repeat as whole numbers."""
    table = table.reset_index(drop=True)
    stimulus = column(table, path, "stimulus").map(to_number)
    if "repeat" not in table:
        table["repeat"] = stimulus.groupby(stimulus).cumcount()
    repeat = table["repeat"].map(to_number)
    unseen = set(range(n_stimuli)) - set(stimulus)
    if unseen or repeat.isna().any() or not stimulus.isin(range(n_stimuli)).all():
        never = f"; {len(unseen)} were never presented: remove those" if unseen else ""
        raise InputError(f"{path}: stimulus (of {n_stimuli}) and repeat count from 0{never}")
    table = table.assign(stimulus=stimulus.astype(int), repeat=repeat.astype(int))
    return _columns_first(table, ["stimulus", "repeat"])


def _check_units(table, path):
    """Return units.csv with roi and subject as text, the ceiling as a number (NaN: unknown)."""
    table = table.reset_index(drop=True)
    for name in ("roi", "subject", "ceiling"):
        if name not in table:
            table[name] = ""
    ceiling = table["ceiling"].map(to_number)
    if not ceiling[table["ceiling"].str.strip() != ""].between(0, 1).all():
        raise InputError(f"{path}: the ceiling is an R², between 0 and 1, or empty")
    table["ceiling"] = ceiling.astype(float)
    return _columns_first(table, ["roi", "subject", "ceiling"])


def _check_responses(responses, shape, path):
    """Raise InputError unless these are finite floats, (presentations, units)."""
    if responses.shape != shape or responses.dtype.kind != "f" or not responses.size:
        what = f"{responses.dtype} of shape {responses.shape}"
        wanted = f"floats, {shape[0]} presentations x {shape[1]} units"
        raise InputError(f"{path} is {what}, but should be {wanted}{remedy(path.parent)}")
    for start in range(0, len(responses), BLOCK):
        with np.errstate(over="ignore"):
            finite = np.isfinite(responses[start : start + BLOCK].astype("f4", copy=False))
        if not finite.all():
            row, unit = np.argwhere(~finite)[0]
            where = f"unit {unit} in presentation {start + row}"
            value = f"{responses[start + row, unit]}, not a finite float32"
            cure = "leave out its unit or presentation, or split the units into several datasets"
            raise InputError(f"{path}: the response of {where} is {value}: {cure}")


def _parse_pairs(text, path):
    """Return the pairs of one JSONL file, each with a UID."""
    pairs = []
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            pair = json.loads(row)
            for key in ("sentence_good", "sentence_bad"):
                if not pair[key].strip():
                    raise ValueError(f"an empty {key}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = "a minimal pair is a JSON object with sentence_good and sentence_bad"
            raise InputError(f"{path}, line {line}: {error!r}: {what}") from None
        pairs.append({**pair, "UID": str(pair.get("UID") or Path(path).stem)})
    if not pairs:
        raise InputError(f"{path} holds no minimal pair")
    return pairs
