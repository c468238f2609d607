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
minimal pair, the repetitions of a sentence. The files of BLiMP (Warstadt et al. 2020,
github.com/alexwarstadt/blimp, data/*.jsonl) are read as they come.

A dataset of responses, which encoding models are fitted to, is a folder of its own:
    stimuli.csv         one stimulus a row: text, or file (an image, its path from the folder),
                        group, split (train, val, test, or empty in every row: scripts then split
                        by groups), and whatever the maker adds
    responses.npy       (P, V) float32: the response of each of V units (voxels, electrodes,
                        sites) in each of P presentations; every one is finite
    presentations.csv   one presentation a row: stimulus (its row in stimuli.csv, from 0),
                        repeat (0, 1, ... of that stimulus)
    units.csv           one unit a row: roi, subject, ceiling (the highest R² that any model can
                        reach against mean responses; empty where it is unknown)
    meta.yaml           format, kind (text or image), modality, species, source, synthetic, sizes,
                        sha256 of the responses; written last

One dataset may hold several people who had the same stimuli: their units stand side by side, and
`subject` tells them apart. Units that miss stimuli need a dataset of their own.
"""

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

from data import (
    InputError,
    aside,
    check_content,
    load_meta,
    read_yaml,
    remedy,
    write_aside,
    write_yaml,
)

FORMAT = "stimuli-1"
ENCODING_FORMAT = "encoding-1"
COLUMNS = ["split", "label", "text", "group"]
SPLITS = ["train", "val", "test"]
KINDS = ["classification", "regression"]
ABOUT = ["modality", "species", "source", "synthetic"]  # what every dataset of responses says
BLOCK = 4096  # presentations that are written or checked at a time


# ---- labelled sentences and minimal pairs


def write_tasks(folder, tasks, pairs=None, **meta):
    """Write a dataset of labelled sentences and return its meta.

    tasks: {name: {frame, kind, labels, description}}, frame being a DataFrame with COLUMNS and any
    others, labels the names of a classification's classes; pairs: {UID: [pair, ...]}, a pair being
    a dict with at least sentence_good and sentence_bad; meta: more keys for meta.yaml, plain types.
    Raises InputError for what the readers would refuse, before any file is touched.
    """
    folder = Path(folder)
    contents = {}
    task_entries = {}
    for name, task in tasks.items():
        path = folder / f"{name}.csv"
        contents[path], task_entries[name] = _task_file(path, name, task)
    pair_entries = {}
    for uid, members in (pairs or {}).items():
        path = folder / "pairs" / f"{uid}.jsonl"
        contents[path], pair_entries[uid] = _pairs_file(path, uid, members)

    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").unlink(missing_ok=True)
    for path in (folder / "pairs").glob("*.jsonl"):
        if path not in contents:  # of an older version
            path.unlink()
    for path, content in contents.items():
        write_aside(path, content)
    meta = {"format": FORMAT, "tasks": task_entries, "pairs": pair_entries, **meta}
    write_yaml(folder / "meta.yaml", meta)
    return meta


def _task_file(path, name, task):
    """The bytes of a task's CSV, checked, and its entry in meta.yaml."""
    frame = task["frame"]
    for column in COLUMNS:
        if column not in frame:
            raise InputError(f"task '{name}' has no column '{column}': give {', '.join(COLUMNS)}")
    others = [column for column in frame if column not in COLUMNS]
    content = frame[COLUMNS + others].to_csv(index=False, lineterminator="\n").encode()
    entry = {"file": path.name, "kind": task["kind"], "description": task["description"]}
    if task["kind"] == "classification":
        entry["labels"] = list(task["labels"])
    table = _check_task(_csv_table(content.decode(), path), path, name, entry)
    counts = table["split"].value_counts()
    entry["sizes"] = {split: int(counts[split]) for split in SPLITS if split in counts}
    last_split = list(entry["sizes"])[-1]
    entry["chance"] = 0.0
    if task["kind"] == "classification":
        labels = table["label"][table["split"] == last_split]
        entry["chance"] = float(labels.value_counts(normalize=True).max())
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    return content, entry


def _pairs_file(path, uid, members):
    """The bytes of one JSONL file of minimal pairs, checked, and its entry in meta.yaml."""
    lines = [json.dumps({"UID": uid, **pair}, ensure_ascii=False) + "\n" for pair in members]
    content = "".join(lines).encode()
    _parse_pairs(content.decode(), path)
    entry = {"file": f"pairs/{path.name}", "pairs": len(members)}
    for key in ("field", "linguistics_term"):
        if key in members[0]:
            entry[key] = members[0][key]
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    return content, entry


def read_meta(folder):
    """meta.yaml of a dataset of labelled sentences as a dict. Raises InputError without one."""
    meta = load_meta(folder, "stimuli", FORMAT)
    for part, keys in (("tasks", ["file", "kind", "sizes", "chance"]), ("pairs", ["file"])):
        for name, entry in meta.setdefault(part, {}).items():
            for key in keys:
                if key not in entry:
                    path = Path(folder) / "meta.yaml"
                    raise InputError(f"{path}: '{name}' lacks the key '{key}'{remedy(folder)}")
    return meta


def read_tasks(folder):
    """{name: {file, kind, labels, sizes: {split: sentences}, chance, description, sha256}}.

    `chance` is the share of the most frequent label in the test split, which a constant answer
    scores; 0, a constant's R², for a regression.
    """
    return read_meta(folder)["tasks"]


def read_task(folder, name):
    """DataFrame of one task: split, label, text, group, the maker's own columns as text, and y.

    y is the label as a number: its place among the labels (int64), or the number itself (float64)
    of a regression. Raises InputError, with the line where there is one, for a broken row, an
    empty text, an unknown label or split, a group or text in two splits, or a single class.
    """
    tasks = read_tasks(folder)
    if name not in tasks:
        raise InputError(f"{folder} has no task '{name}', only {', '.join(tasks)}")
    path = Path(folder) / tasks[name]["file"]
    return _check_task(read_csv(path), path, name, tasks[name]).reset_index(drop=True)


def read_pairs(path):
    """{UID: [pair, ...]} of minimal pairs, each the dict of its JSON line.

    path: a dataset of ours, a folder of BLiMP's .jsonl files, or one such file. A pair without a
    UID takes the file's name. Raises InputError, with file and line, for what is no pair.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        files = [path]
    elif (path / "meta.yaml").is_file():
        files = [path / entry["file"] for entry in read_meta(path)["pairs"].values()]
    elif path.is_dir():
        files = sorted(path.glob("*.jsonl"))
    else:
        raise InputError(f"{path} does not exist{remedy(path)}")
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
            if _sha256(Path(folder) / entry["file"]) != entry.get("sha256"):
                return False
    except (ValueError, OSError):
        return False
    return True


# ---- stimuli with responses


def write_encoding(folder, stimuli, responses, presentations=None, units=None, **meta):
    """Write a dataset of stimuli with responses and return its meta.

    stimuli: DataFrame with text or file and, where known, group (default: every stimulus its own)
    and split; responses: (P, V) array or memmap of any float type; presentations: DataFrame with
    stimulus and, where known, repeat (default: each stimulus once, in order); units: DataFrame
    with, where known, roi, subject and ceiling; meta: modality (fMRI, ECoG, spikes, ...), species,
    source and synthetic, which it must have, and more keys, plain types. Images must lie in the
    folder already. Raises InputError for what `Encoding` would refuse.
    """
    folder = Path(folder)
    for key in ABOUT:
        if key not in meta:
            raise TypeError(f"write_encoding needs {key}=")
    if presentations is None:
        presentations = pd.DataFrame({"stimulus": range(len(stimuli))})
    if units is None:
        units = pd.DataFrame({"subject": [""] * responses.shape[1]})
    stimuli, kind = _check_stimuli(_as_csv(stimuli), folder / "stimuli.csv")
    presentations = _check_presentations(
        _as_csv(presentations), len(stimuli), folder / "presentations.csv"
    )
    units = _check_units(_as_csv(units), folder / "units.csv")
    path = folder / "responses.npy"
    _check_responses(responses, len(presentations), len(units), path)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").unlink(missing_ok=True)
    header = {"descr": "<f4", "fortran_order": False, "shape": responses.shape}
    with aside(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(responses), BLOCK):
            file.write(np.asarray(responses[start : start + BLOCK], "<f4").tobytes())
    tables = {"stimuli": stimuli, "presentations": presentations, "units": units}
    for name, table in tables.items():
        write_aside(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    about = {"format": ENCODING_FORMAT, "kind": kind}
    about |= {key: meta[key] for key in ABOUT}
    about["synthetic"] = bool(meta["synthetic"])
    about["sizes"] = {name: len(table) for name, table in tables.items()}
    about["sha256"] = _sha256(path)
    meta = about | {key: value for key, value in meta.items() if key not in ABOUT}
    write_yaml(folder / "meta.yaml", meta)
    return meta


class Encoding:
    """Stimuli with responses, opened and checked; the head of this file says what they are.

    stimuli: DataFrame (text or file, group, split, ...), n rows; responses: (P, V) float32 memmap,
    read-only; presentations: DataFrame (stimulus, repeat), P rows; units: DataFrame (roi, subject,
    ceiling, ...), V rows; kind: text or image; meta: meta.yaml; path: its folder.
    Raises InputError when a file is missing or damaged, or a response is not a finite number.
    """

    def __init__(self, folder):
        self.path = Path(folder)
        self.meta = read_encoding_meta(folder)
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
        _check_responses(self.responses, len(self.presentations), len(self.units), path)
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
        for column, wanted in (("subject", subject), ("roi", roi)):
            if not wanted:
                continue
            selected &= (self.units[column] == wanted).to_numpy()
            if not selected.any():
                names = sorted(set(self.units[column]) - {""})
                raise InputError(
                    f"{self.path} has no units of {column}={wanted}: it has "
                    f"{', '.join(names) or f'no {column} at all'}"
                )
        return selected

    def mean_responses(self, units=None):
        """(n, V) float64: the mean response to each stimulus; units: (V,) bool, None for all."""
        responses = self.responses if units is None else self.responses[:, units]
        means = pd.DataFrame(np.asarray(responses, np.float64))
        return means.groupby(self.presentations["stimulus"].to_numpy()).mean().to_numpy()


def read_encoding_meta(folder):
    """meta.yaml of a dataset of stimuli with responses as a dict. Raises InputError without one."""
    return load_meta(folder, "stimuli with responses", ENCODING_FORMAT, ("kind", *ABOUT))


def complete_encoding(folder):
    """Whether the folder opens as an Encoding whose responses have the checksum of meta.yaml."""
    try:
        return _sha256(Path(folder) / "responses.npy") == Encoding(folder).meta.get("sha256")
    except (ValueError, OSError):
        return False


# ---- what prepare scripts share


def already_made(folder, options, overwrite=False, is_complete=complete_encoding, **version):
    """Whether a dataset is there, made with these options and this version, which it says.

    is_complete: of the folder, such as `complete` for labelled sentences; version: other keys of
    meta.yaml, of which a change makes it again. Raises InputError for other options.
    """
    if overwrite or not is_complete(folder):
        return False
    meta = read_yaml((Path(folder) / "meta.yaml").read_text(encoding="utf-8"))
    made_with = meta.get("options") or {}
    changed = [key for key in options if made_with.get(key) != options[key]]
    if changed:
        before = ", ".join(f"{key}={made_with.get(key)}" for key in changed)
        raise InputError(
            f"{folder} was made with {before}: give overwrite=True to make it again, "
            "or another out_dir"
        )
    for key, value in version.items():
        if meta.get(key) != value:
            print(f"{folder} was made by another version of its sources: it is made again")
            return False
    print(f"{folder} is there already (overwrite=True makes it again)")
    return True


def embedded(name):
    """Folder of an embedded dataset under data/, made first, with a notice, if it is not there."""
    folder = Path(__file__).parent / name
    if not (folder / "meta.yaml").exists():
        print(f"data/{name} is not there: it is made first", flush=True)
        subprocess.run([sys.executable, str(folder / "prepare.py")], check=True)
    return folder


def word_key(word):
    """What spellings of a word (or text) share: Café and CAFÉ, ice-cream and ice cream."""
    folded = unicodedata.normalize("NFKC", word).casefold()
    return re.sub(r"[\W_]", "", folded) or folded


def print_sizes(folder, meta):
    """Say how large a dataset of stimuli with responses is, and what was left out of it."""
    counts = [f"{count:,} {what}" for what, count in meta["sizes"].items()]
    print(f"{folder}: {', '.join(counts)}")
    for what in meta.get("left_out", []):
        print(f"left out: {what}")


# ---- reading files


def read_text(path):
    """The text of a file: UTF-8, or the Windows or Latin-1 bytes of an older table, which is said.

    Raises InputError for a file that is missing, or no text.
    """
    content = check_content(path).read_bytes()
    if b"\0" in content:
        raise InputError(f"{path} is no plain text (it has zero bytes): save it as UTF-8")
    try:
        return content.decode("utf-8-sig")  # spreadsheets like to write a byte order mark
    except UnicodeDecodeError as error:
        print(f"{path} is not UTF-8 (byte {error.start}): read as Latin-1", flush=True)
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_csv(path):
    """A table (commas, or tabs) as a DataFrame of text whose index is the line of each row."""
    return _csv_table(read_text(path), path)


def _csv_table(text, path):
    """CSV as a DataFrame of text whose index is each row's line: "None" and "nan" stay words."""
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines = []
    rows = []
    line = 1
    try:
        for row in reader:
            if row:
                lines.append(line)
                rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not CSV ({error})") from None
    header = rows[0] if rows else []
    for line, row in zip(lines, rows):
        if len(row) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(row)} fields where the header has {len(header)}"
            )
    if len(set(header)) < len(header):
        raise InputError(f"{path}, line 1: the header names a column twice ({', '.join(header)})")
    return pd.DataFrame(rows[1:], index=lines[1:], columns=header, dtype=str)


def _as_csv(frame):
    """A DataFrame as `read_csv` would read it from the file that it is written to."""
    return _csv_table(pd.DataFrame(frame).to_csv(index=False, lineterminator="\n"), "the table")


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- checking


def _refuse(wrong, values, path, what, why):
    """Raise InputError for the first line of a table where `wrong` holds."""
    if not wrong.any():
        return
    line = wrong.idxmax()
    shown = f" '{values[line]}'" if values[line].strip() else ""
    raise InputError(f"{path}, line {line}: {what}{shown} {why}")


def _refuse_torn(table, column, path):
    """Raise InputError where a group, or a text, is in more than one split."""
    places = table[[column, "split"]].drop_duplicates()
    torn = places[column].duplicated()
    if torn.any():
        name = places[column][torn].iloc[0]
        splits = sorted(places["split"][places[column] == name])
        raise InputError(
            f"{path}: the {column} '{name}' is in {' and in '.join(splits)}: what belongs together "
            "must stay in one split"
        )


def to_number(text):
    """The number that a text is; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return np.nan


def _check_task(table, path, name, entry):
    """The table of a task, as `read_csv` reads it, with its column y."""
    kind = entry["kind"]
    labels = entry.get("labels") or []
    if kind not in KINDS:
        raise InputError(f"task '{name}' has the kind {kind!r}: it must be {' or '.join(KINDS)}")
    for column in COLUMNS:
        if column not in table:
            raise InputError(f"{path}, line 1: the header has no column '{column}'")
    text, split, label = table["text"], table["split"], table["label"]
    _refuse(text.str.strip() == "", text, path, "the text", "is empty")
    _refuse(~split.isin(SPLITS), split, path, "the split", f"is none of {', '.join(SPLITS)}")
    if kind == "classification":
        _refuse(~label.isin(labels), label, path, "the label", f"is none of {', '.join(labels)}")
        table["y"] = label.map({name: i for i, name in enumerate(labels)}).astype("int64")
    else:
        numbers = label.map(to_number).astype("float64")
        _refuse(~np.isfinite(numbers), label, path, "the label", "is not a number")
        table["label"] = numbers
        table["y"] = numbers
    _refuse_torn(table, "group", path)
    _refuse_torn(table, "text", path)
    learned = table["label"][split == "train"] if "train" in set(split) else table["label"]
    if learned.nunique() < 2:
        found = f"the one label {learned.iloc[0]!r}" if len(learned) else "no labels"
        raise InputError(f"{path}: the sentences to learn from have {found}, and two are needed")
    return table


def _check_stimuli(table, path):
    """(stimuli with all their columns, text or image)."""
    if ("text" in table) == ("file" in table):
        found = "both" if "text" in table else ", ".join(table) or "none"
        raise InputError(f"{path} needs one of the columns 'text' and 'file', and has {found}")
    column = "text" if "text" in table else "file"
    kind = "text" if column == "text" else "image"
    _refuse(table[column].str.strip() == "", table[column], path, f"the {column}", "is empty")
    table = table.reset_index(drop=True)
    if "group" not in table:
        table["group"] = table.index.astype(str)
    if "split" not in table:
        table["split"] = ""
    for split in table["split"].unique():
        if split not in ("", *SPLITS):
            raise InputError(f"{path}: the split '{split}' is none of {', '.join(SPLITS)} or empty")
    if table["split"].nunique() > 1:
        if (table["split"] == "").any():
            raise InputError(f"{path}: the split is empty in some rows: fill all of them, or none")
        _refuse_torn(table, "group", path)
        _refuse_torn(table, column, path)
    return _columns_first(table, [column, "group", "split"]), kind


def _columns_first(table, names):
    """The table with these columns before all others."""
    return table[names + [column for column in table if column not in names]]


def _check_presentations(table, n_stimuli, path):
    """presentations.csv of n stimuli, with whole numbers in stimulus and repeat."""
    if "stimulus" not in table:
        raise InputError(f"{path} has no column 'stimulus'")
    try:
        stimulus = table["stimulus"].astype(int)
        repeat = table["repeat"].astype(int) if "repeat" in table else None
    except ValueError as error:
        raise InputError(f"{path}: stimulus and repeat are counted from 0 ({error})") from None
    unknown = ~stimulus.between(0, n_stimuli - 1)
    if unknown.any():
        first = stimulus[unknown].iloc[0]
        raise InputError(f"{path}: stimulus {first} is none of the {n_stimuli} (from 0)")
    unseen = sorted(set(range(n_stimuli)) - set(stimulus))
    if unseen:
        raise InputError(
            f"{path}: stimulus {unseen[0]} was never presented: leave such stimuli out of "
            f"stimuli.csv ({len(unseen)} of {n_stimuli})"
        )
    table = table.assign(stimulus=stimulus, repeat=repeat).reset_index(drop=True)
    if repeat is None:
        table["repeat"] = table.groupby("stimulus").cumcount()
    return _columns_first(table, ["stimulus", "repeat"])


def _check_units(table, path):
    """units.csv with roi and subject as text and the ceiling as a number (NaN: unknown)."""
    table = table.reset_index(drop=True)
    for column in ("roi", "subject"):
        if column not in table:
            table[column] = ""
    ceiling = pd.Series(np.nan, table.index)
    if "ceiling" in table:
        ceiling = table["ceiling"].map(to_number)
        known = table["ceiling"].str.strip() != ""
        if not ceiling[known].between(0, 1).all():
            raise InputError(f"{path}: the ceiling is an R², between 0 and 1, or empty")
    table["ceiling"] = ceiling
    return _columns_first(table, ["roi", "subject", "ceiling"])


def _check_responses(responses, n_presentations, n_units, path):
    """Raise InputError unless these are finite floats, (presentations, units)."""
    if responses.shape != (n_presentations, n_units) or responses.dtype.kind != "f":
        raise InputError(
            f"{path} is {responses.dtype} of shape {responses.shape} where numbers with a point, "
            f"({n_presentations} presentations, {n_units} units), were expected"
            f"{remedy(path.parent)}"
        )
    if not responses.size:
        raise InputError(f"{path} is empty{remedy(path.parent)}")
    for start in range(0, n_presentations, BLOCK):
        finite = np.isfinite(responses[start : start + BLOCK])
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise InputError(
                f"{path}: the response of unit {column} in presentation {start + row} is "
                f"{responses[start + row, column]}: leave out units or presentations that were "
                "not recorded, or write one dataset for each set of units with the same stimuli"
            )


def _parse_pairs(text, path):
    """The pairs of one JSONL file, each with a UID."""
    pairs = []
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            pair = json.loads(row)
        except ValueError as error:
            raise InputError(f"{path}, line {line}: not JSON ({error})") from None
        for key in ("sentence_good", "sentence_bad"):
            sentence = pair.get(key) if isinstance(pair, dict) else None
            if not isinstance(sentence, str) or not sentence.strip():
                raise InputError(
                    f"{path}, line {line}: no '{key}', or an empty one; a minimal pair is a JSON "
                    "object with sentence_good and sentence_bad"
                )
        pairs.append({**pair, "UID": str(pair.get("UID") or Path(path).stem)})
    if not pairs:
        raise InputError(f"{path} holds no minimal pair")
    return pairs
