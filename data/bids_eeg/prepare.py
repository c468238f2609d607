"""Any EEG in BIDS whose events name what was shown, as recordings: filtered, re-referenced, resampled; not cut into windows and not whitened.

    python data/bids_eeg/prepare.py root=PATH/ds000000                              # the word in events.tsv's column 'word'
    python data/bids_eeg/prepare.py root=PATH/ds000000 word_column= object_column=object image_column=stim_file subjects=01,02
    python data/bids_eeg/prepare.py root=PATH/ds000000 sfreq=250 h_freq=100 notch=50,100 bads=mark

mne-bids finds the files, MNE reads them (BrainVision, EDF, BDF, EEGLAB, FIF). Positions are those of electrodes.tsv, else of the montage; bad
channels those of channels.tsv and those that are flat or hold NaN. Windows, baseline and noise normalisation belong to the experiment, which
knows its training trials. Other prepare scripts whose data is BIDS use `convert`.
"""
import hashlib, json, os, re, sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import mne
import mne_bids
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure, write_aside
from data.recording import Recording, read_meta, write_raw, write_set

EXTENSIONS = [".vhdr", ".edf", ".bdf", ".set", ".fif"]
TYPES = {"EEG": "eeg", "EOG": "eog", "VEOG": "eog", "HEOG": "eog", "ECG": "ecg", "EMG": "emg", "TRIG": "stim"}  # of channels.tsv → MNE's
UNITS = {"m": 1.0, "cm": 1e-2, "mm": 1e-3}
SIGNAL_OPTIONS = ("l_freq", "h_freq", "notch", "reference", "sfreq", "montage", "bads")


@dataclass
class Config:
    root: str = ""                    # the BIDS folder (dataset_description.json, sub-*/)
    out_dir: str = ""                 # "": data/bids_eeg/NAME OF ROOT
    subjects: list[str] = field(default_factory=list)  # as in the names: 01,02; none: all
    task: str = ""                    # only recordings of this task; "": all
    # ---- columns of events.tsv
    word_column: str = "word"         # what is to be said; "": made from the object, stove2 → stove, ice_cream → ice cream
    object_column: str = ""           # unique name of what was shown, homographs told apart; "": the word
    image_column: str = ""            # the very picture or sound, which repeats share; "": the object
    synonyms_column: str = ""         # other right answers, separated by | or ,
    category_column: str = ""         # kind of object
    block_column: str = ""            # stretch of the session, run or sequence
    target_column: str = ""           # 1 (or true) for catch trials
    phase_column: str = ""            # train or test, where the set says so itself
    # ---- signal
    l_freq: float = 0.1               # Hz, high-pass; 0: none
    h_freq: float = 40.0              # Hz, low-pass; 0: none
    notch: list[float] = field(default_factory=list)  # Hz, mains and its harmonics where h_freq lets them through
    reference: str = "average"        # average, channel names (M1,M2), or none
    sfreq: float = 100.0              # Hz after resampling; 0: as recorded
    montage: str = "colin27_1005"     # MNE montage for a recording without positions; none
    bads: Literal["interpolate", "mark", "drop"] = "interpolate"  # bad channels: spherical splines, left as they are, left out
    overwrite: bool = False           # convert again what is there

    def check(self):
        check_signal(self)


def check_signal(config):
    """Refuse options that no filter can have."""
    if min(config.l_freq, config.h_freq, config.sfreq, *config.notch) < 0:
        raise ValueError("l_freq, h_freq, notch and sfreq are frequencies in Hz, 0 for none")
    if config.h_freq and config.l_freq >= config.h_freq:
        raise ValueError(f"l_freq={config.l_freq:g} is not below h_freq={config.h_freq:g}")
    if config.sfreq and config.h_freq > config.sfreq / 2:
        raise ValueError(f"h_freq={config.h_freq:g} is above half of sfreq={config.sfreq:g}: lower it, or raise sfreq")
    if config.montage not in ("", "none", *mne.channels.get_builtin_montages()):
        raise ValueError(f"montage='{config.montage}' is none of MNE's: {', '.join(mne.channels.get_builtin_montages())}")


# ---- the BIDS folder

def find(root, subjects=(), task=""):
    """[(name, path)] of the EEG recordings in a BIDS folder, name as in sub-01 or sub-01_ses-02_run-1: what tells them apart.
    Raises FileNotFoundError, in a sentence, for a folder that is no BIDS and a subject that is not there or has no EEG."""
    root = Path(root)
    there = [p.name.removeprefix("sub-") for p in sorted(root.glob("sub-*")) if p.is_dir()]
    if not there:
        raise FileNotFoundError(f"root={root} is no BIDS folder: give the one that holds dataset_description.json and sub-01, sub-02, ...")
    subjects = [s.removeprefix("sub-") for s in subjects]
    if missing := [s for s in subjects if s not in there]:
        raise FileNotFoundError(f"{root} has no sub-{missing[0]}; there are {', '.join(there)}")
    paths = mne_bids.find_matching_paths(root, subjects=subjects or None, tasks=task or None, suffixes="eeg", extensions=EXTENSIONS, datatypes="eeg")
    paths = [p for p in paths if p.split in (None, "01", "1")]  # MNE follows the other parts of a split FIF
    if silent := [s for s in subjects or there if s not in {p.subject for p in paths}]:
        raise FileNotFoundError(f"{root / f'sub-{silent[0]}'} has no EEG recording ({', '.join(EXTENSIONS)})" + (f" of task '{task}'" if task else "")
                                + ": leave it out with subjects=")
    parts = [Path(p.fpath).name.split("_")[:-1] for p in paths]  # sub-01, ses-02, task-rsvp
    shared = {key for key in {e.partition("-")[0] for part in parts for e in part} - {"sub"}
              if all(len({e for part in parts if part[0] == sub for e in part if e.startswith(f"{key}-")}) <= 1 for sub in {p[0] for p in parts})}
    names = ["_".join(e for e in part if e.partition("-")[0] not in shared | {"split"}) for part in parts]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(f"{root}: {twice[0]} is there in two formats ({', '.join(p.extension for n, p in zip(names, paths) if n == twice[0])}): keep one")
    return [(name, Path(p.fpath)) for name, p in zip(names, paths)]


def sidecar(path, root, suffix):
    """The nearest NAME_suffix that BIDS' inheritance gives to a recording, or None: a file beside it or above whose entities are all its own."""
    own = {""} | set(path.stem.split("_")[:-1])
    for folder in path.parents:
        found = [p for p in folder.glob(f"*{suffix}") if all(e in own or e.startswith("space-") for e in p.name.removesuffix(suffix).split("_"))]
        if found:
            return max(sorted(found), key=lambda p: len(p.name))
        if folder == Path(root):
            return None


def table_of(path, *needed):
    """A BIDS table, all strings; n/a and empty are NaN. Raises ValueError where it is no table or lacks a column."""
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, na_values=["n/a", ""], encoding="utf-8-sig")
    except (ValueError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is no tab-separated table ({' '.join(str(e).split())})") from None
    for column in needed:
        if column not in table:
            raise ValueError(f"{path} has no column '{column}', only {', '.join(map(str, table))}")
    return table


def numbers(table, column, path):
    """A column as floats, NaN where empty. Raises ValueError, with the row, where it holds something else."""
    values = pd.to_numeric(table[column], errors="coerce")
    wrong = np.flatnonzero(values.isna() & table[column].notna())
    if len(wrong):
        raise ValueError(f"{path}: {column} '{table[column].iloc[wrong[0]]}' in row {wrong[0] + 1} is no number")
    return values.astype(float)


# ---- events

def word_of(thing):
    """The word that a unique name stands for: stove2 → stove, ice_cream → ice cream."""
    return re.sub(r"[\s_]+", " ", re.sub(r"(?<=[^\W\d])\d+$", "", str(thing).strip())).strip()


def synonyms_of(text, word=""):
    """'range, cooking_stove' → 'range|cooking stove', without the word itself."""
    words = (re.sub(r"[\s_]+", " ", w).strip() for w in re.split(r"[|,;]", str(text)))
    return "|".join(dict.fromkeys(w for w in words if w and w != word))


def events_of(table, path, config, sfreq):
    """events.tsv as our table (onset, duration, object, word, synonyms, image, block, target; phase and category where the set has them), and
    how many rows had no onset or no word. table: of strings, as `table_of` reads it; sfreq: Hz of the recording.
    Raises ValueError for a column that is not there or a table without a usable row."""
    for option in ("word_column", "object_column", "image_column", "synonyms_column", "category_column", "block_column", "target_column", "phase_column"):
        if (column := getattr(config, option)) and column not in table:
            raise ValueError(f"{path} has no column '{column}' ({option}=), only {', '.join(map(str, table))}")
    if not config.word_column and not config.object_column:
        raise ValueError("word_column and object_column are both empty: one of them must say what was shown")
    thing = table[config.object_column or config.word_column].fillna("")
    word = [re.sub(r"[\s_]+", " ", w).strip() for w in table[config.word_column].fillna("")] if config.word_column else thing.map(word_of)
    target = table[config.target_column].fillna("").str.lower().isin(["1", "1.0", "true", "yes"]) if config.target_column else False
    events = pd.DataFrame({
        "onset": numbers(table, "onset", path), "duration": numbers(table, "duration", path).fillna(0.0) if "duration" in table else 0.0,
        "object": thing, "word": word, "synonyms": table[config.synonyms_column].fillna("").map(synonyms_of) if config.synonyms_column else "",
        "image": table[config.image_column].fillna(thing) if config.image_column else thing,
        "block": table[config.block_column].fillna("") if config.block_column else "", "target": np.where(target, 1, 0)}, index=table.index)
    for name in ("phase", "category"):
        if column := getattr(config, f"{name}_column"):
            events[name] = table[column].fillna("")
    return usable(events, path)


def usable(events, path):
    """(events with an onset and, unless catch trials, a word; how many were left out). Raises ValueError where none is left."""
    kept = np.isfinite(events["onset"]) & ((events["word"] != "") | (events["target"] == 1))
    if not (kept & (events["target"] == 0)).any():
        raise ValueError(f"{path} has no event with an onset and a word: leave this subject out with subjects=, or name another column")
    return events[kept].reset_index(drop=True), int((~kept).sum())


def objects_of(events):
    """One row an object: object, word, synonyms, category. events: of all recordings, catch trials included."""
    shown = events[(events["target"] == 0) & (events["word"] != "")]
    table = shown.drop_duplicates("object").sort_values("object", ignore_index=True)
    return table.assign(category=table["category"] if "category" in table else "")[["object", "word", "synonyms", "category"]]


# ---- signal

def open_raw(path, root):
    """An MNE Raw of one BIDS file, not loaded, EEG channels only: types and bads of channels.tsv, positions of electrodes.tsv (head frame, m).
    Raises ValueError, in a sentence, for a file that is torn or no EEG."""
    try:
        raw = mne.io.read_raw(path, verbose="error")
    except Exception as e:  # each format has errors of its own for a damaged file
        raise ValueError(f"{path} cannot be read ({' '.join(str(e).split())[:200]}): is it complete?") from None
    described = sidecar(path, root, "_eeg.json")
    stated = json.loads(described.read_text(encoding="utf-8-sig")).get("RecordingDuration") if described else None
    if isinstance(stated, (int, float)) and raw.n_times / raw.info["sfreq"] < 0.99 * stated - 1:
        raise ValueError(f"{path} is {raw.n_times / raw.info['sfreq']:.0f} s long where {described.name} says {stated:.0f}: it is torn, fetch it again")
    channels = sidecar(path, root, "_channels.tsv")
    if channels:
        table = table_of(channels, "name").dropna(subset="name").drop_duplicates("name").set_index("name")
        if foreign := [n for n in raw.ch_names if n not in table.index]:
            raise ValueError(f"{channels} does not name the channel '{foreign[0]}' of {path.name}: the two do not belong together")
        if "type" in table:
            raw.set_channel_types({n: TYPES.get(str(table.loc[n, "type"]).upper(), "misc") for n in raw.ch_names}, verbose="error")
        if "status" in table:
            raw.info["bads"] = [n for n in raw.ch_names if str(table.loc[n, "status"]).lower() == "bad"]
    if "eeg" not in raw:
        raise ValueError(f"{path} has no channel of type EEG: look at {channels.name if channels else 'its header'}")
    raw.pick("eeg", exclude=())
    if electrodes := sidecar(path, root, "_electrodes.tsv"):
        place(raw, electrodes, sidecar(path, root, "_coordsystem.json"))
    return raw


def place(raw, electrodes, coordsystem):
    """Give a Raw the positions of an electrodes.tsv; with landmarks in coordsystem.json they are turned into MNE's head frame."""
    table = table_of(electrodes, "name", "x", "y", "z").drop_duplicates("name").set_index("name")
    frame = json.loads(coordsystem.read_text(encoding="utf-8-sig")) if coordsystem else {}
    scale = UNITS.get(str(frame.get("EEGCoordinateUnits", "m")).lower(), 1.0)
    turned = frame.get("EEGCoordinateSystem") in ("EEGLAB", "EEGLAB-HJ", "CTF")  # x to the nose, y to the left
    axes = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]) if turned else np.eye(3)
    xyz = np.stack([numbers(table, axis, electrodes) for axis in "xyz"], 1) @ axes.T * scale  # (electrodes, 3) m
    places = {name: p for name, p in zip(table.index, xyz) if name in raw.ch_names and np.isfinite(p).all()}
    landmarks = frame.get("AnatomicalLandmarkCoordinates") or {}
    landmarks = {mine: axes @ np.array(landmarks[theirs], float) * scale for mine, theirs in (("nasion", "NAS"), ("lpa", "LPA"), ("rpa", "RPA"))
                 if np.shape(landmarks.get(theirs)) == (3,)}
    if places:
        montage = mne.channels.make_dig_montage(places, coord_frame="unknown" if len(landmarks) == 3 else "head", **landmarks)
        raw.set_montage(montage, on_missing="ignore", verbose="error")


def placed(raw):
    """(C,) whether a channel has a position."""
    return np.array([np.isfinite(ch["loc"][:3]).all() and ch["loc"][:3].any() for ch in raw.info["chs"]])


def preprocess(raw, config, name):
    """Filter, re-reference, mend and resample an MNE Raw of EEG channels in place; returns what was found and done, for meta.yaml.
    config: has SIGNAL_OPTIONS; name: of the recording, for messages. Raises ValueError where nothing useful is left or no channel has a place."""
    done = {}
    raw.load_data(verbose="error")
    if config.montage not in ("", "none") and not placed(raw).any():
        raw.set_montage(mne.channels.make_standard_montage(config.montage), match_case=False, on_missing="ignore", verbose="error")
        done["positions"] = config.montage
    if not placed(raw).any():
        raise ValueError(f"{name}: no channel has a position ({', '.join(raw.ch_names[:5])}, ...): add electrodes.tsv, or give a montage= with these names")
    done["without_position"] = [n for n, there in zip(raw.ch_names, placed(raw)) if not there]
    broken = np.array([not np.isfinite(row).all() for row in raw._data])
    raw._data[broken] = 0  # a filter would smear one NaN over the channel, a reference over all of them
    flat = np.ptp(raw._data, axis=1) == 0
    done["nan"], done["flat"] = ([n for n, bad in zip(raw.ch_names, which) if bad] for which in (broken, flat & ~broken))
    done["bads"] = [n for n in raw.ch_names if n in raw.info["bads"] + done["nan"] + done["flat"]]
    raw.info["bads"] = list(done["bads"])
    if 2 * len(done["bads"]) > len(raw.ch_names):
        raise ValueError(f"{name}: {len(done['bads'])} of {len(raw.ch_names)} channels are bad ({len(done['flat'])} flat, {len(done['nan'])} with NaN): "
                         "leave this subject out with subjects=")
    nyquist = raw.info["sfreq"] / 2
    if notch := [f for f in config.notch if f < nyquist]:
        raw.notch_filter(notch, picks="all", verbose="error")
    h_freq = config.h_freq if config.h_freq < nyquist else 0
    if config.l_freq or h_freq:
        raw.filter(config.l_freq or None, h_freq or None, picks="all", verbose="error")
    nowhere = [n for n in done["bads"] if n in done["without_position"]]  # no place to interpolate to
    if lost := {"drop": done["bads"], "interpolate": nowhere, "mark": []}[config.bads]:
        raw.drop_channels(lost)
        done["left_out"] = list(lost)
    if config.bads == "interpolate" and raw.info["bads"]:
        raw.interpolate_bads(reset_bads=True, verbose="error")
    if config.reference not in ("", "none"):
        names = "average" if config.reference == "average" else [n.strip() for n in config.reference.split(",")]
        if names != "average" and (unknown := [n for n in names if n not in raw.ch_names]):
            raise ValueError(f"reference={config.reference}: {name} has no channel '{unknown[0]}', only {', '.join(raw.ch_names)}")
        raw.set_eeg_reference(names, projection=False, verbose="error")
    if config.sfreq and config.sfreq != raw.info["sfreq"]:
        raw.resample(config.sfreq, verbose="error")  # low-passes first
    return {k: v for k, v in done.items() if v}


# ---- a whole dataset

def there_already(folder, options, overwrite):
    """The Recording in a folder if it was made with these options and is whole, else None."""
    try:
        recording = Recording(folder)
    except (ValueError, OSError):
        return None
    return None if overwrite or recording.meta.get("options") != options else recording


def convert_raw(folder, raw, events, dropped, config, **meta):
    """Preprocess an MNE Raw and write it with its events as one recording, with a line about it. events: onsets in s from the first sample;
    dropped: events left out so far; meta: more keys. Returns the events. Raises ValueError where no event lies in the signal."""
    seconds = raw.n_times / raw.info["sfreq"]
    inside = (events["onset"] >= 0) & (events["onset"] < seconds)
    if not (inside & (events["target"] == 0)).any():
        raise ValueError(f"{folder.name}: every onset lies outside the {seconds:.0f} s of the recording: are they in samples or ms?")
    dropped = {"events without onset or word": dropped, "events outside the signal": int((~inside).sum())}
    events = events[inside].reset_index(drop=True)
    done = preprocess(raw, config, folder.name)
    events["onset"] += raw.first_time  # on the recording's own clock
    write_raw(folder, raw, events, picks="eeg", preprocessing=done, dropped=dropped, **meta)
    words = [f"{len(events):,} events", f"{len(raw.ch_names)} channels", f"{seconds:.0f} s"]
    words += [f"{kind.replace('_', ' ')}: {', '.join(done[kind])}" for kind in ("bads", "flat", "nan", "without_position", "left_out") if kind in done]
    print(f"{folder.name}: {'; '.join(words + [f'{n:,} {what} left out' for what, n in dropped.items() if n])}", flush=True)
    return events


def made_of(path, root):
    """What tells a BIDS recording from another one, or from itself before somebody mended it: a hash of its tables and headers, and its size."""
    sides = [sidecar(path, root, f"_{name}") for name in ("events.tsv", "channels.tsv", "electrodes.tsv", "coordsystem.json", "eeg.json")]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sides if p)).hexdigest()[:16]
    return f"{digest}, {sum(p.stat().st_size for p in path.parent.glob(f'{path.stem}.*'))} bytes"


def convert_one(folder, path, root, config, *, options, to_events=events_of, **meta):
    """One BIDS recording → folder; what is there already of the same files with the same options stays. Returns its events (DataFrame).
    to_events(table, path, config, sfreq) → (events, dropped rows), onsets in s from the first sample of the file."""
    options = options | {"made_of": made_of(path, root)}
    if old := there_already(folder, options, config.overwrite):
        print(f"{folder.name}: there already", flush=True)
        return old.events
    if not (tsv := sidecar(path, root, "_events.tsv")):
        raise FileNotFoundError(f"{path} has no events.tsv beside it: leave this subject out with subjects=")
    raw = open_raw(path, root)
    events, dropped = to_events(table_of(tsv, "onset"), tsv, config, raw.info["sfreq"])
    return convert_raw(folder, raw, events, dropped, config, subject=re.match(r"sub-([^_]+)", path.name)[1], options=options, **meta)


def convert(folder, root, config, *, source, synthetic, to_events=events_of, table=objects_of, **meta):
    """A whole BIDS folder → dataset. config: as above; table: a function of all events that makes objects.csv (object, word, synonyms,
    category); meta: more keys of the set. Returns the meta of the set. An interrupted conversion goes on where it was."""
    folder, found = Path(folder), find(root, config.subjects, getattr(config, "task", ""))
    options = {k: v for k, v in asdict(config).items() if k not in ("root", "out_dir", "subjects", "overwrite")}
    (folder / "meta.yaml").unlink(missing_ok=True)
    events = [convert_one(folder / name, path, root, config, options=options, to_events=to_events, source=source, synthetic=synthetic) for name, path in found]
    return finish(folder, [name for name, _ in found], pd.concat(events), config, source=source, synthetic=synthetic, table=table, **meta)


def finish(folder, names, events, config, *, source, synthetic, table=objects_of, **meta):
    """objects.csv and meta.yaml of a set whose recordings are written. events: of all of them; table: a function of the events. Returns the meta."""
    objects, dropped = table(events), {}
    write_aside(folder / "objects.csv", objects.to_csv(index=False))
    for name in names:
        for what, n in read_meta(folder / name).get("dropped", {}).items():
            dropped[what] = dropped.get(what, 0) + n
    return write_set(folder, names, synthetic=synthetic, kind="eeg", source=source, objects=len(objects), words=int(objects["word"].nunique()),
                     signal={k: getattr(config, k) for k in SIGNAL_OPTIONS if hasattr(config, k)}, dropped=dropped, **meta)


def main(config):
    if not config.root:
        raise ValueError("root= is missing: give the folder of a BIDS dataset")
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent / Path(config.root).resolve().name))
    described = Path(config.root) / "dataset_description.json"
    name = json.loads(described.read_text(encoding="utf-8-sig")).get("Name", "") if described.is_file() else ""
    meta = convert(folder, config.root, config, source=f"BIDS: {name or Path(config.root).resolve().name}", synthetic="synthetic" in name.lower())
    print(f"{folder}: {len(meta['recordings'])} recordings, {meta['objects']:,} objects, {meta['words']:,} words")


if __name__ == "__main__":
    main(configure(Config))
