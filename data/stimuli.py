"""Labelled sentences, minimal pairs, and stimuli with the responses of a brain to them, as plain files that a person can open.

A dataset of labelled sentences is a folder:
    TASK.csv            one labelled sentence a row, columns split (train, val or test), label, text, group, and whatever the maker adds
    pairs/UID.jsonl     minimal pairs in BLiMP's own layout, one JSON object a line: sentence_good, sentence_bad, UID, field, ...
    meta.yaml           format, synthetic, tasks (file, kind, labels, sizes, chance, description, sha256), pairs (file, pairs, ...) and
                        whatever the maker adds; written last, so a folder that has it is complete

A task is a `classification` (labels are names, their order in meta.yaml is their number) or a `regression` (labels are numbers). A group is
what must not be torn apart by a split: the members of a minimal pair, the repetitions of a sentence. BLiMP's files (Warstadt et al. 2020,
github.com/alexwarstadt/blimp, data/*.jsonl) are read as they come.

A dataset of responses, what encoding models are fitted to, is a folder of its own:
    stimuli.csv         one stimulus a row: text, or file (an image, its path from the folder), group, split (train, val, test, or empty in every row: the
                        scripts then split by groups), and whatever the maker adds
    responses.npy       (P, V) float32, a memmap: the response of each of V units (voxels, electrodes, sites) in each of P presentations, finite
    presentations.csv   one presentation a row: stimulus (its row in stimuli.csv, from 0), repeat (0, 1, ... of that stimulus)
    units.csv           one unit a row: roi, subject, ceiling (the highest R² that any model can reach against mean responses; empty: unknown, or
                        to be estimated from the repeats)
    meta.yaml           format, kind (text or image), modality, species, source, synthetic, sizes, sha256 of the responses; written last
Units that miss stimuli cannot be in one dataset with those that saw them (write one dataset an experiment): a response is never empty.
"""
import csv, hashlib, io, json, os
from pathlib import Path

import numpy as np
import pandas as pd

from data import load_meta, remedy, write_aside, write_yaml

FORMAT, ENCODING_FORMAT = "stimuli-1", "encoding-1"
COLUMNS = ["split", "label", "text", "group"]
SPLITS = ["train", "val", "test"]
KINDS = ["classification", "regression"]


# ---- writing

def write_tasks(folder, tasks, pairs=None, **meta):
    """Write a dataset and return its meta. An older meta.yaml goes first and the new one comes last.
    tasks: {name: {frame: DataFrame with COLUMNS and any others, kind, labels: [name, ...] (classification), description}};
    pairs: {UID: [pair, ...]}, a pair being a dict with at least sentence_good and sentence_bad; meta: more keys for meta.yaml, plain types.
    Raises ValueError for what `read_task` or `read_pairs` would refuse; nothing but meta.yaml is touched then."""
    folder = Path(folder)
    files, entries, pair_entries = {}, {}, {}
    for name, task in tasks.items():
        path, frame = folder / f"{name}.csv", task["frame"]
        if missing := [column for column in COLUMNS if column not in frame]:
            raise ValueError(f"task '{name}' has no column '{missing[0]}': give {', '.join(COLUMNS)}")
        frame = frame[COLUMNS + [column for column in frame if column not in COLUMNS]]
        files[path] = frame.to_csv(index=False, lineterminator="\n").encode()
        entry = {"file": path.name, "kind": task["kind"], "description": task["description"]}
        if task["kind"] == "classification":
            entry["labels"] = list(task["labels"])
        checked = _parse(files[path].decode(), path, name, entry)
        sizes = checked["split"].value_counts()
        entry["sizes"] = {split: int(sizes[split]) for split in SPLITS if split in sizes}
        test = checked["label"][checked["split"] == list(entry["sizes"])[-1]]
        entry["chance"] = float(test.value_counts(normalize=True).max()) if task["kind"] == "classification" else 0.0
        entries[name] = entry | {"sha256": hashlib.sha256(files[path]).hexdigest()}
    for uid, members in (pairs or {}).items():
        path = folder / "pairs" / f"{uid}.jsonl"
        files[path] = "".join(json.dumps({"UID": uid} | pair, ensure_ascii=False) + "\n" for pair in members).encode()
        _parse_pairs(files[path].decode(), path)
        shared = {key: members[0][key] for key in ("field", "linguistics_term") if key in members[0]}
        pair_entries[uid] = {"file": f"pairs/{path.name}", "pairs": len(members), **shared, "sha256": hashlib.sha256(files[path]).hexdigest()}

    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").unlink(missing_ok=True)
    for stale in set((folder / "pairs").glob("*.jsonl")) - set(files):  # of an older version: a reader of the folder would take them along
        stale.unlink()
    meta = {"format": FORMAT, "tasks": entries, "pairs": pair_entries} | meta
    for path, content in files.items():
        write_aside(path, content)
    write_yaml(folder / "meta.yaml", meta)
    return meta


def write_encoding(folder, stimuli, responses, presentations=None, units=None, *, modality, species, source, synthetic, **meta):
    """Write a dataset of stimuli with responses and return its meta. An older meta.yaml goes first and the new one comes last.
    stimuli: DataFrame with text or file, and where known group (default: every stimulus its own) and split; responses: (P, V) array or memmap, any
    float type; presentations: DataFrame with stimulus and where known repeat (default: each stimulus once, in order); units: DataFrame with where
    known roi, subject, ceiling; modality: fMRI, ECoG, spikes ...; meta: more keys, plain types. Images must lie in the folder already.
    Raises ValueError, in a sentence, for what `read_encoding` would refuse."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    presentations = pd.DataFrame({"stimulus": range(len(stimuli))}) if presentations is None else pd.DataFrame(presentations)
    units = pd.DataFrame(index=range(responses.shape[1])) if units is None else pd.DataFrame(units)
    stimuli, kind = _checked_stimuli(pd.DataFrame(stimuli).reset_index(drop=True), folder)
    presentations = _checked_presentations(presentations.reset_index(drop=True), len(stimuli), folder)
    units = _checked_units(units.reset_index(drop=True), folder)
    _check_responses(responses, len(presentations), len(units), folder / "responses.npy")
    (folder / "meta.yaml").unlink(missing_ok=True)
    tmp = folder / "responses.npy.tmp"
    out = np.lib.format.open_memmap(tmp, "w+", "<f4", responses.shape)
    for a in range(0, len(out), 4096):
        out[a:a + 4096] = responses[a:a + 4096]
    out.flush()
    del out
    os.replace(tmp, folder / "responses.npy")
    for name, table in (("stimuli", stimuli), ("presentations", presentations), ("units", units)):
        write_aside(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n").encode())
    meta = {"format": ENCODING_FORMAT, "kind": kind, "modality": modality, "species": species, "source": source, "synthetic": bool(synthetic),
            "sizes": {"stimuli": len(stimuli), "presentations": len(presentations), "units": len(units)}, "sha256": _sha256(folder / "responses.npy"), **meta}
    write_yaml(folder / "meta.yaml", meta)
    return meta


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- reading

def read_meta(folder):
    """meta.yaml of a dataset as a dict. Raises FileNotFoundError when there is no (finished) dataset, ValueError when it is not one of ours."""
    path, meta = Path(folder) / "meta.yaml", load_meta(folder, "stimuli", FORMAT)
    for name, entry in (meta.setdefault("tasks", {}) | meta.setdefault("pairs", {})).items():
        wanted = ["file"] if name in meta["pairs"] else ["file", "kind", "sizes", "chance"]
        if lacks := [key for key in wanted if not isinstance(entry, dict) or key not in entry]:
            raise ValueError(f"{path}: '{name}' lacks the key '{lacks[0]}'{remedy(folder)}")
    return meta


def read_tasks(folder):
    """{name: {file, kind, labels, sizes: {split: sentences}, chance, description, sha256}} of a dataset. `chance` is the share of the most
    frequent label in the test split (what a constant answer scores); 0, a constant's R², for a regression. Raises as `read_meta` does."""
    return read_meta(folder)["tasks"]


def read_task(folder, name):
    """DataFrame of one task: split, label, text, group, the maker's own columns (as strings), and y, the label as a number
    (int64, its place among the labels; float64 of a regression). Raises FileNotFoundError when dataset or file is missing, ValueError for
    an unknown task and, with the line, for a broken row, an empty text, an unknown label or split, a group or text in two splits, one class."""
    tasks = read_tasks(folder)
    if name not in tasks:
        raise ValueError(f"{folder} has no task '{name}', only {', '.join(tasks)}")
    path = Path(folder) / tasks[name]["file"]
    return _parse(_text(path), path, name, tasks[name])


def read_pairs(path):
    """{UID: [pair, ...]} of minimal pairs, each the dict of its JSON line, in order of the files' names. path: a dataset of ours, a folder of
    BLiMP's .jsonl files, or one such file; a pair without a UID takes the file's name. Raises FileNotFoundError when nothing is there,
    ValueError, with file and line, for a line that is not a JSON object or has no (or an empty) sentence_good or sentence_bad."""
    path = Path(path)
    if path.is_dir():
        if (path / "meta.yaml").is_file():
            files = [path / entry["file"] for entry in read_meta(path)["pairs"].values()]
        else:
            files = sorted(path.glob("*.jsonl"))
        if not files:
            raise FileNotFoundError(f"{path} holds no minimal pairs (*.jsonl){remedy(path)}")
    elif path.suffix == ".jsonl":
        files = [path]
    else:
        raise FileNotFoundError(f"{path} does not exist{remedy(path)}")
    pairs = {}
    for file in files:
        for pair in _parse_pairs(_text(file), file):
            pairs.setdefault(pair["UID"], []).append(pair)
    return pairs


class Encoding:
    """Stimuli with responses, opened and checked; see the head of this file.

    stimuli: DataFrame (text or file, group, split, ...), n rows; responses: (P, V) float32 memmap, read-only; presentations: DataFrame (stimulus,
    repeat), P rows; units: DataFrame (roi, subject, ceiling, ...), V rows; kind: text or image; meta: meta.yaml; path: its folder.
    Raises FileNotFoundError or ValueError, in a sentence, when a file is missing or damaged, or a response is not a finite number."""

    def __init__(self, folder):
        self.path, self.meta = Path(folder), read_encoding_meta(folder)
        self.stimuli, self.kind = _checked_stimuli(_frame(self.path / "stimuli.csv"), self.path)
        self.presentations = _checked_presentations(_frame(self.path / "presentations.csv"), len(self.stimuli), self.path)
        self.units = _checked_units(_frame(self.path / "units.csv"), self.path)
        path = self.path / "responses.npy"
        try:
            self.responses = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing{remedy(folder)}") from None
        except (ValueError, EOFError, OSError) as e:
            raise ValueError(f"{path} is not an array of NumPy's ({' '.join(str(e).split())[:80]}){remedy(folder)}") from None
        _check_responses(self.responses, len(self.presentations), len(self.units), path)
        for name, file in enumerate(self.stimuli["file"] if self.kind == "image" else []):
            if not (self.path / file).is_file():
                raise FileNotFoundError(f"{self.path / file}, the image of stimulus {name}, is missing{remedy(folder)}")


def read_encoding_meta(folder):
    """meta.yaml of a dataset of stimuli with responses, as a dict; raises as `read_meta` does."""
    return load_meta(folder, "stimuli with responses", ENCODING_FORMAT, ("kind", "modality", "species", "source", "synthetic"))


def complete_encoding(folder):
    """Whether the folder holds a whole dataset of stimuli with responses: it opens, and the responses have the checksum of meta.yaml."""
    try:
        return _sha256(Path(folder) / "responses.npy") == Encoding(folder).meta.get("sha256")
    except (ValueError, OSError):
        return False


def complete(folder):
    """Whether the folder holds a whole dataset: every file there, with the checksum of meta.yaml."""
    try:
        meta = read_meta(folder)
        entries = [*meta["tasks"].values(), *meta["pairs"].values()]
        return all(hashlib.sha256((Path(folder) / entry["file"]).read_bytes()).hexdigest() == entry.get("sha256") for entry in entries)
    except (ValueError, OSError):
        return False


# ---- checking

def _parse(text, path, name, entry):
    """The CSV `text` of a task as a checked DataFrame. By the csv module and not by pandas: strings stay strings ("None", "nan"), and a
    broken row is known by its line."""
    def wrong(what):
        return ValueError(f"{path}, line {line}: {what}")

    kind, labels = entry["kind"], entry.get("labels") or []
    if kind not in KINDS:
        raise ValueError(f"task '{name}' has the kind {kind!r}: it must be {' or '.join(KINDS)}")
    rows, group_split, text_split, line = [], {}, {}, 1
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if missing := [column for column in COLUMNS if column not in header]:
            raise wrong(f"the header has no column '{missing[0]}'")
        where = [header.index(column) for column in COLUMNS]
        line = reader.line_num + 1
        for row in reader:
            if len(row) != len(header):
                raise wrong(f"{len(row)} fields where the header has {len(header)}")
            split, label, sentence, group = (row[i] for i in where)
            if not sentence.strip():
                raise wrong("the text is empty")
            if split not in SPLITS:
                raise wrong(f"the split is '{split}' and not {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
            if kind == "classification" and label not in labels:
                raise wrong(f"the label '{label}' is none of {', '.join(labels)}")
            if kind == "regression" and not _finite(label):
                raise wrong(f"the label '{label}' is not a number")
            for what, value, seen in (("group", group, group_split), ("text", sentence, text_split)):
                if seen.setdefault(value, split) != split:
                    raise wrong(f"the {what} '{value}' is in {split} and in {seen[value]}: what belongs together must stay in one split")
            rows.append(row)
            line = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"{path}, line {line}: not CSV ({e})") from None
    frame = pd.DataFrame(rows, columns=header)
    kept = frame["label"][frame["split"] == "train"] if "train" in set(frame["split"]) else frame["label"]
    if kept.nunique() < 2:
        raise ValueError(f"{path}: the sentences to learn from have {f'the one label {kept.iloc[0]!r}' if len(kept) else 'no labels'}, "
                         "and nothing can be told apart with fewer than two")
    if kind == "regression":
        frame["label"] = frame["y"] = frame["label"].astype("float64")
    else:
        frame["y"] = frame["label"].map({label: i for i, label in enumerate(labels)}).astype("int64")
    return frame


def _finite(number):
    try:
        return abs(float(number)) < float("inf")
    except ValueError:
        return False


def _frame(path):
    """A CSV as a DataFrame of strings: a stimulus may be the word 'null' or 'NA'."""
    try:
        return pd.read_csv(io.StringIO(_text(path)), dtype=str, keep_default_na=False)
    except pd.errors.ParserError as e:
        raise ValueError(f"{path}: not CSV ({' '.join(str(e).split())}){remedy(path.parent)}") from None


def _checked_stimuli(table, folder):
    """(stimuli with all their columns, text or image), or ValueError."""
    path = folder / "stimuli.csv"
    if ("text" in table) == ("file" in table):
        raise ValueError(f"{path} needs one of the columns 'text' and 'file', and has {'both' if 'text' in table else ', '.join(table) or 'none'}")
    column = "text" if "text" in table else "file"
    table[column] = table[column].astype(str)
    if (empty := np.flatnonzero(table[column].str.strip() == "")).size:
        raise ValueError(f"{path}, line {empty[0] + 2}: the {column} is empty")
    for name, default in (("group", [str(i) for i in range(len(table))]), ("split", "")):
        table[name] = table[name].fillna("").astype(str) if name in table else default
    if unknown := sorted(set(table["split"]) - {*SPLITS, ""}):
        raise ValueError(f"{path}: the split is '{unknown[0]}' and not {', '.join(SPLITS)} or empty")
    if "" in set(table["split"]) and (table["split"] != "").any():
        raise ValueError(f"{path}: the split is empty in some rows and given in others: fill all, or none")
    for what in ("group", column):
        if (torn := table.groupby(what)["split"].nunique() > 1).any():
            raise ValueError(f"{path}: the {what} '{torn.idxmax()}' is in more than one split: what belongs together must stay in one")
    first = [column, "group", "split"]
    return table[first + [c for c in table if c not in first]], "text" if column == "text" else "image"


def _checked_presentations(table, n, folder):
    path = folder / "presentations.csv"
    if "stimulus" not in table:
        raise ValueError(f"{path} has no column 'stimulus'")
    try:
        table["stimulus"] = table["stimulus"].astype(int)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: stimulus is a row of stimuli.csv, from 0 ({e})") from None
    if not table["stimulus"].between(0, n - 1).all():
        raise ValueError(f"{path}: the stimulus {table['stimulus'].iloc[np.flatnonzero(~table['stimulus'].between(0, n - 1))[0]]} is none of the {n} (from 0)")
    if len(unseen := sorted(set(range(n)) - set(table["stimulus"]))):
        raise ValueError(f"{path}: stimulus {unseen[0]} was never presented; leave such out of stimuli.csv ({len(unseen)} of {n})")
    table["repeat"] = table["repeat"].astype(int) if "repeat" in table else table.groupby("stimulus").cumcount()
    return table[["stimulus", "repeat"] + [c for c in table if c not in ("stimulus", "repeat")]]


def _checked_units(table, folder):
    for name in ("roi", "subject"):
        table[name] = table[name].fillna("").astype(str) if name in table else ""
    try:
        table["ceiling"] = pd.to_numeric(table["ceiling"]).astype(float) if "ceiling" in table else np.nan  # an empty string is NaN
    except (ValueError, TypeError) as e:
        raise ValueError(f"{folder / 'units.csv'}: the ceiling is an R² ({e})") from None
    if (table["ceiling"] < 0).any() or (table["ceiling"] > 1).any():
        raise ValueError(f"{folder / 'units.csv'}: the ceiling is an R², between 0 and 1")
    first = ["roi", "subject", "ceiling"]
    return table[first + [c for c in table if c not in first]]


def _check_responses(responses, rows, columns, path):
    if responses.ndim != 2 or responses.shape != (rows, columns) or responses.dtype.kind != "f" or not rows or not columns:
        raise ValueError(f"{path} is {responses.dtype} of shape {responses.shape} where numbers with a point, ({rows} presentations, {columns} units), "
                         f"were expected{remedy(path.parent)}")
    for a in range(0, rows, 4096):
        finite = np.isfinite(responses[a:a + 4096])
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise ValueError(f"{path}: the response of unit {column} in presentation {a + row} is {responses[a + row, column]}: leave out units or "
                             "presentations that were not recorded, or write one dataset for each set of units that saw the same stimuli")


def _parse_pairs(text, path):
    """The checked pairs of one JSONL file, each with a UID."""
    pairs = []
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            pair = json.loads(row)
        except ValueError as e:
            raise ValueError(f"{path}, line {line}: not JSON ({e})") from None
        for key in ("sentence_good", "sentence_bad"):
            if not isinstance(pair, dict) or not isinstance(pair.get(key), str) or not pair[key].strip():
                raise ValueError(f"{path}, line {line}: no '{key}', or an empty one; a minimal pair is a JSON object with sentence_good and sentence_bad")
        pairs.append({**pair, "UID": str(pair.get("UID") or Path(path).stem)})
    if not pairs:
        raise ValueError(f"{path} holds no minimal pair")
    return pairs


def _text(path):
    """Text of a file of a dataset."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing{remedy(path.parent)}")
    try:
        return path.read_bytes().decode("utf-8-sig")  # spreadsheets like to put a byte order mark in front
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}): save it as UTF-8") from None

