"""Labelled sentences, minimal pairs, and stimuli with the responses of brains to them.

A dataset of labelled sentences is a folder of plain files:
    TASK.csv            one labelled sentence a row: split (train, val or test), label, text, group,
                        and whatever columns the maker adds
    pairs/UID.jsonl     minimal pairs as BLiMP has them, one JSON object a line: sentence_good,
                        sentence_bad, UID, field, ...
    meta.yaml           format, synthetic, tasks (file, kind, labels, sizes, chance, description,
                        sha256), pairs (file, pairs, ...) and whatever the maker adds; written
                        last, so a folder that has it is complete

A task is a `classification` (labels are names, numbered in the order of meta.yaml) or a
`regression` (labels are numbers). A group is what no split may tear apart: the members of a
minimal pair, the repetitions of a sentence. BLiMP's own files (Warstadt et al. 2020) are read, too.

A dataset of responses, which encoding models are fitted to, is a folder of its own:
    stimuli.csv         one stimulus a row: text, or file (an image, its path from the folder),
                        group (equal texts are of one, however spelled), split (train, val, test, or
                        empty in every row: scripts then split by groups), and whatever the maker
                        adds
    responses.npy       (P, V) float32: the response of each of V units (voxels, electrodes,
                        sites) in each of P presentations; every one is finite
    presentations.csv   one presentation a row: stimulus (its row in stimuli.csv, from 0),
                        repeat (0, 1, ... of that stimulus)
    units.csv           one unit a row: roi, subject, ceiling (the highest R² that any model can
                        reach against mean responses; empty where it is unknown)
    meta.yaml           format, kind (text or image), modality, species, source, synthetic, sizes,
                        sha256 of the responses; written last

People who had the same stimuli stand side by side in one dataset, told apart by `subject`. Units
that miss stimuli need a dataset of their own.
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
ABOUT = ["modality", "species", "source", "synthetic"]  # what every dataset of responses says
BLOCK = 4096  # presentations that are checked at a time


# ---- labelled sentences and minimal pairs


def write_tasks(folder, tasks, pairs=None, **meta):
    """Write a dataset of labelled sentences and return its meta.

    tasks: {name: {frame, kind, labels, description}}, frame: a DataFrame with COLUMNS and any
    others; pairs: {UID: [{sentence_good, sentence_bad, ...}, ...]}; meta: more keys, plain types.
    Raises InputError for what the readers would refuse, before any file is touched.
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
            if path not in contents:  # of an older version
                path.unlink()
    for path, content in contents.items():
        write_aside(path, content)
    meta = {"format": FORMAT, **entries, **meta}
    write_yaml(folder / "meta.yaml", meta)
    return meta


def _task_file(path, name, task):
    """The text of a task's CSV, checked, and its entry in meta.yaml."""
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
    """The text of one JSONL file of minimal pairs, checked, and its entry in meta.yaml."""
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
    """meta.yaml of a dataset of labelled sentences. Raises InputError without one.

    chance is what a constant answer scores in the test split: the share of the most frequent label,
    or the R² 0 of a regression; sizes: {split: sentences}.
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
    """DataFrame of one task: split, label, text, group, the maker's own columns as text, and y: the
    label's place among the labels (int64), or the number itself of a regression (float64).

    Raises InputError, with the line, for what a task must not have (see _check_task).
    """
    tasks = read_meta(folder)["tasks"]
    if name not in tasks:
        raise InputError(f"{folder} has no task '{name}', only {', '.join(tasks)}")
    path = Path(folder) / tasks[name]["file"]
    return _check_task(read_csv(path), path, tasks[name]).reset_index(drop=True)


def read_pairs(path):
    """{UID: [pair, ...]} of minimal pairs, each the dict of its JSON line. Raises InputError.

    path: a dataset of ours, or BLiMP's .jsonl files: a folder or one. No UID: the file's name.
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
    """Whether a folder of labelled sentences has every file with the checksum of meta.yaml."""
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

    stimuli: DataFrame with text or file (images are in the folder already), perhaps group (default:
    each its own) and split; responses: (P, V) floats; presentations: stimulus, perhaps repeat
    (default: each stimulus once); units: perhaps roi, subject, ceiling; meta: ABOUT and more keys.
    """
    folder = Path(folder)
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
    """Stimuli with responses, opened and checked; the head of this file says what they are.

    stimuli, presentations, units: DataFrames of n, P and V rows; responses: (P, V) float32 memmap,
    read-only; kind: text or image; meta: meta.yaml; path: its folder. Raises InputError.
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
            raise InputError(f"{path} is no NumPy array ({reason}){remedy(folder)}") from None
        _check_responses(self.responses, (len(self.presentations), len(self.units)), path)
        if self.kind == "image":
            for file in self.stimuli["file"]:
                check_content(self.path / file)

    def inputs(self):
        """What a model is given for each stimulus: texts, or paths of images."""
        if self.kind == "text":
            return self.stimuli["text"].tolist()
        return [self.path / file for file in self.stimuli["file"]]

    def select_units(self, subject="", roi=""):
        """(V,) bool: the units of one subject and of one region; "" takes all."""
        selected = np.ones(len(self.units), bool)
        for name, wanted in (("subject", subject), ("roi", roi)):
            if wanted:
                selected &= (self.units[name] == wanted).to_numpy()
            if not selected.any():
                there = ", ".join(sorted(set(self.units[name]) - {""})) or f"no {name} at all"
                raise InputError(f"{self.path} has no units of {name}={wanted}: it has {there}")
        return selected

    def mean_responses(self, units=None):
        """(n, V) float64: the mean response to each stimulus; units: (V,) bool, None for all."""
        responses = self.responses if units is None else self.responses[:, units]
        means = pd.DataFrame(np.asarray(responses, np.float64))
        return means.groupby(self.presentations["stimulus"].to_numpy()).mean().to_numpy()


def complete_encoding(folder):
    """Whether the folder opens as an Encoding whose responses have the checksum of meta.yaml."""
    try:
        return file_hash(Path(folder) / "responses.npy") == Encoding(folder).meta.get("sha256")
    except (ValueError, OSError):
        return False


def link_images(places, folder):
    """Bring images into a dataset, {name: path}: hard links where the disk allows, else copies."""
    for name, path in places.items():
        target = folder / name
        if target.exists() and target.samefile(path):  # the user's own, in its place already
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(Path(path).resolve(), target)
        except OSError:
            shutil.copyfile(path, target)


def print_sizes(folder, meta):
    """Say how large a dataset of stimuli with responses is, and what was left out of it."""
    counts = [f"{count:,} {what}" for what, count in meta["sizes"].items()]
    print(f"{folder}: {', '.join(counts)}")
    for what in meta.get("left_out", []):
        print(f"left out: {what}")


# ---- words and tables


def word_key(word):
    """What spellings of a word (or text) share: Café and CAFÉ, ice-cream and ice cream."""
    folded = unicodedata.normalize("NFKC", word).casefold()
    return re.sub(r"[\W_]", "", folded) or folded


def to_number(text):
    """The number that a text is; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return np.nan


def read_csv(path):
    """A table (commas, or tabs) of text whose index is each row's line: "None" stays a word."""
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
                raise csv.Error(f"{len(row)} fields where the header has {len(rows[0])}")
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    header = rows[0] if rows else []
    if len(set(header)) < len(header):
        raise InputError(f"{path}, line 1: the header names a column twice ({', '.join(header)})")
    return pd.DataFrame(rows[1:], index=lines[1:], columns=header, dtype=str)


def _as_csv(frame):
    """A DataFrame as `read_csv` would read it from the file that it is written to."""
    return _csv_table(pd.DataFrame(frame).to_csv(index=False, lineterminator="\n"), "the table")


def _columns_first(table, names):
    """The table with these columns before all others."""
    return table[names + [name for name in table if name not in names]]


# ---- checking


def _refuse(wrong, values, path, what):
    """Raise InputError for the first line of a table where `wrong` holds."""
    if wrong.any():
        line = wrong.idxmax()
        raise InputError(f"{path}, line {line}: the {values.name} '{values[line]}' {what}")


def _refuse_torn(table, name, path):
    """Raise InputError where a group, or a text, is in more than one split."""
    splits = table.groupby(name)["split"].unique()
    torn = splits[splits.str.len() > 1]
    if len(torn):
        places = " and in ".join(sorted(torn.iloc[0]))
        raise InputError(
            f"{path}: the {name} '{torn.index[0]}' is in {places}: what belongs together must stay "
            "in one split"
        )


def _check_task(table, path, entry):
    """The table of a task, as `read_csv` reads it, with its column y."""
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
        found = f"the one label {learned.iloc[0]!r}" if len(learned) else "no labels"
        raise InputError(f"{path}: the sentences to learn from have {found}, and two are needed")
    return table


def _check_stimuli(table, path):
    """(stimuli with all their columns, text or image)."""
    name = column(table, path, "text", "file").name
    _refuse(table[name].str.strip() == "", table[name], path, "is empty")
    if "group" not in table:  # equal texts are one group: a split must not tear them apart
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
    """presentations.csv of n stimuli, with whole numbers in stimulus and repeat."""
    table = table.reset_index(drop=True)
    stimulus = column(table, path, "stimulus").map(to_number)
    if "repeat" not in table:
        table["repeat"] = stimulus.groupby(stimulus).cumcount()
    repeat = table["repeat"].map(to_number)
    unseen = set(range(n_stimuli)) - set(stimulus)
    if unseen or repeat.isna().any() or not stimulus.isin(range(n_stimuli)).all():
        never = f"; {len(unseen)} were never presented: leave those out" if unseen else ""
        raise InputError(f"{path}: stimulus (of {n_stimuli}) and repeat count from 0{never}")
    table = table.assign(stimulus=stimulus.astype(int), repeat=repeat.astype(int))
    return _columns_first(table, ["stimulus", "repeat"])


def _check_units(table, path):
    """units.csv with roi and subject as text and the ceiling as a number (NaN: unknown)."""
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
        found = f"{responses.dtype} of shape {responses.shape}"
        wanted = f"floats, {shape[0]} presentations x {shape[1]} units, are expected"
        raise InputError(f"{path} is {found} where {wanted}{remedy(path.parent)}")
    for start in range(0, len(responses), BLOCK):
        with np.errstate(over="ignore"):
            finite = np.isfinite(responses[start : start + BLOCK].astype("f4", copy=False))
        if not finite.all():
            row, unit = np.argwhere(~finite)[0]
            raise InputError(
                f"{path}: the response of unit {unit} in presentation {start + row} is "
                f"{responses[start + row, unit]}, no number of float32: leave out units or "
                "presentations that were not recorded, or write one dataset for each set of units "
                "with the same stimuli"
            )


def _parse_pairs(text, path):
    """The pairs of one JSONL file, each with a UID."""
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
