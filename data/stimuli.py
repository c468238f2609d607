"""Labelled sentences, and minimal pairs, as plain files that a person can open.

A dataset is a folder:
    TASK.csv            one labelled sentence a row, columns split (train, val or test), label, text, group, and whatever the maker adds
    pairs/UID.jsonl     minimal pairs in BLiMP's own layout, one JSON object a line: sentence_good, sentence_bad, UID, field, ...
    meta.yaml           format, synthetic, tasks (file, kind, labels, sizes, chance, description, sha256), pairs (file, pairs, ...) and
                        whatever the maker adds; written last, so a folder that has it is complete

A task is a `classification` (labels are names, their order in meta.yaml is their number) or a `regression` (labels are numbers). A group is
what must not be torn apart by a split: the members of a minimal pair, the repetitions of a sentence. BLiMP's files (Warstadt et al. 2020,
github.com/alexwarstadt/blimp, data/*.jsonl) are read as they come.
"""
import csv, hashlib, io, json, os
from pathlib import Path

import pandas as pd
import yaml

FORMAT = "stimuli-1"
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
    files[folder / "meta.yaml"] = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=1000).encode()
    for path, content in files.items():
        _write_aside(path, content)
    return meta


def _write_aside(path, content):
    """Write path.tmp, flush it to the disk, and only then give it its name."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


# ---- reading

def read_meta(folder):
    """meta.yaml of a dataset as a dict. Raises FileNotFoundError when there is no (finished) dataset, ValueError when it is not one of ours."""
    folder = Path(folder)
    path = folder / "meta.yaml"
    if not path.is_file():
        what = "does not exist" if not folder.is_dir() else "holds no finished stimuli (no meta.yaml)"
        raise FileNotFoundError(f"{folder} {what}{_remedy(folder)}")
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{path} is not YAML{_remedy(folder)}") from None
    meta = meta if isinstance(meta, dict) else {}
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {meta.get('format')!r}, and this version reads {FORMAT!r}{_remedy(folder)}")
    for name, entry in (meta.setdefault("tasks", {}) | meta.setdefault("pairs", {})).items():
        wanted = ["file"] if name in meta["pairs"] else ["file", "kind", "sizes", "chance"]
        if lacks := [key for key in wanted if not isinstance(entry, dict) or key not in entry]:
            raise ValueError(f"{path}: '{name}' lacks the key '{lacks[0]}'{_remedy(folder)}")
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
            raise FileNotFoundError(f"{path} holds no minimal pairs (*.jsonl){_remedy(path)}")
    elif path.suffix == ".jsonl":
        files = [path]
    else:
        raise FileNotFoundError(f"{path} does not exist{_remedy(path)}")
    pairs = {}
    for file in files:
        for pair in _parse_pairs(_text(file), file):
            pairs.setdefault(pair["UID"], []).append(pair)
    return pairs


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
        raise FileNotFoundError(f"{path} is missing{_remedy(path.parent)}")
    try:
        return path.read_bytes().decode("utf-8-sig")  # spreadsheets like to put a byte order mark in front
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}): save it as UTF-8") from None


def _remedy(folder):
    """How to make the dataset, for the end of a sentence: `python data/NAME/prepare.py` where there is such a script."""
    for place in (Path(folder), Path(folder).parent):
        if (place / "prepare.py").is_file():
            return f"; make it with: python {place / 'prepare.py'}"
    return ""
