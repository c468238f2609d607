"""Any EEG, MEG or iEEG in BIDS whose events name what was shown, as recordings: filtered,
re-referenced, resampled; not cut into windows and not whitened.

    python data/bids_eeg/prepare.py root=PATH/ds000000          # words are in events.tsv's 'word'
    python data/bids_eeg/prepare.py root=PATH/ds000000 word_column= object_column=object
    python data/bids_eeg/prepare.py root=PATH/ds000000 subjects=01,02 sfreq=250 h_freq=100 notch=50

data/raw.py reads the files; bad channels are those of channels.tsv and those that are flat or hold
NaN. Windows, baseline and noise normalisation belong to the experiment, which knows its training
trials. Other prepare scripts whose data is BIDS use `convert`.
"""

import hashlib
import re
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import mne
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import (
    InputError,
    check_content,
    column,
    files_state,
    folder_of,
    options_of,
    write_aside,
)
from data import raw as reader
from data.recording import Recording, read_meta, write_raw, write_set

SIGNAL_OPTIONS = ("l_freq", "h_freq", "notch", "reference", "sfreq", "montage", "bads")


@dataclass
class Config:
    root: str = ""  # the BIDS folder (dataset_description.json, sub-*/)
    out_dir: str = ""  # "": data/bids_eeg/NAME OF ROOT
    subjects: list[str] = field(default_factory=list)  # as in the names: 01,02; none: all
    task: str = ""  # only recordings of this task; "": all
    sensors: Literal["", "eeg", "ieeg", "mag", "grad"] = ""  # "": eeg, else MEG's mag, else ieeg
    # ---- columns of events.tsv
    word_column: str = "word"  # what is to be said; "": made from the object, stove2 → stove
    object_column: str = ""  # unique name of what was shown, homographs told apart; "": the word
    image_column: str = ""  # the very picture or sound, which repeats share; "": the object
    synonyms_column: str = ""  # other right answers, separated by | or ,
    category_column: str = ""  # kind of object
    block_column: str = ""  # stretch of the session, run or sequence
    target_column: str = ""  # 1 (or true) for catch trials
    # ---- signal
    l_freq: float = 0.1  # Hz, high-pass; 0: none
    h_freq: float = 40.0  # Hz, low-pass; 0: none
    notch: list[float] = field(default_factory=list)  # Hz, mains and harmonics that h_freq lets by
    reference: str = "average"  # average, channel names (M1,M2), or none; MEG has none
    sfreq: float = 100.0  # Hz after resampling; 0: as recorded
    montage: str = "colin27_1005"  # MNE montage for a recording without positions; none
    # Bad channels: spherical splines (EEG only), or marked, so that no script reads them.
    bads: Literal["interpolate", "mark"] = "interpolate"
    overwrite: bool = False  # convert again what is there

    def check(self):
        check_signal(self)


def check_signal(config):
    """Refuse options that no filter can have."""
    if min(config.l_freq, config.h_freq, config.sfreq, *config.notch) < 0:
        raise InputError("l_freq, h_freq, notch and sfreq are frequencies in Hz, 0 for none")
    if config.h_freq and config.l_freq >= config.h_freq:
        raise InputError(f"l_freq={config.l_freq:g} is not below h_freq={config.h_freq:g}")
    if config.sfreq and config.h_freq > config.sfreq / 2:
        raise InputError(f"h_freq={config.h_freq:g} is above half of sfreq={config.sfreq:g}")
    montages = mne.channels.get_builtin_montages()
    if config.montage not in ("", "none", *montages):
        raise InputError(f"montage='{config.montage}' is none of MNE's: {', '.join(montages)}")


# ---- events


def word_of(thing):
    """The word that a unique name stands for: stove2 → stove, ice_cream → ice cream."""
    return spaced(re.sub(r"(?<=[^\W\d])\d+$", "", str(thing).strip()))


def spaced(text):
    """Text with single blanks for its blanks and underscores."""
    return re.sub(r"[\s_]+", " ", str(text)).strip()


def synonyms_of(text, word=""):
    """'range, cooking_stove' → 'range|cooking stove', without the word itself."""
    words = [spaced(part) for part in re.split(r"[|,;]", str(text))]
    return "|".join(dict.fromkeys(w for w in words if w and w != word))


def events_of(table, path, config, sfreq):
    """events.tsv, a table of text, as our table of events; a row an event.

    Columns: onset, duration (s), object, word, synonyms, image, block, target, and category where
    the set has it. sfreq: Hz of the recording, for sets whose events count samples.
    """
    columns = {}
    for name in ("word", "object", "image", "synonyms", "category", "block", "target"):
        asked = getattr(config, f"{name}_column")
        if asked:
            text = column(table, f"{path} ({name}_column=)", asked).fillna("")
            columns[name] = text.str.normalize("NFC")
    if not columns.keys() & {"word", "object"}:
        raise InputError("word_column and object_column are both empty: one says what was shown")
    nothing = pd.Series("", table.index)
    objects = columns.get("object", columns.get("word"))
    images = columns.get("image", nothing)
    targets = columns.get("target", nothing).str.lower()
    events = pd.DataFrame({"onset": reader.numbers(table, "onset", path), "duration": 0.0})
    if "duration" in table:
        events["duration"] = reader.numbers(table, "duration", path).fillna(0.0)
    events["object"] = objects
    events["word"] = columns["word"].map(spaced) if "word" in columns else objects.map(word_of)
    events["synonyms"] = columns.get("synonyms", nothing).map(synonyms_of)
    events["image"] = images.where(images != "", objects)
    events["block"] = columns.get("block", nothing)
    events["target"] = targets.isin(["1", "1.0", "true", "yes"]).astype(int)
    if "category" in columns:
        events["category"] = columns["category"]
    return events


def keep_events(events, raw, path):
    """(the events that can be used, {why others were left out: how many}): inside the recording,
    outside of bad segments and, unless they are catch trials, with a word. path: for messages."""
    sfreq = raw.info["sfreq"]
    seconds = raw.n_times / sfreq
    dropped = {}
    known = np.isfinite(events["onset"]) & ((events["word"] != "") | (events["target"] == 1))
    events = keep(events, known, "events without onset or word", dropped, path)
    inside = reader.check_onsets(events["onset"], seconds, sfreq, path)
    events = keep(events, inside, "events outside the signal", dropped, path)
    end = events["onset"] + events["duration"].clip(lower=0)
    bad = reader.inside_spans(events["onset"], end, reader.bad_spans(raw))
    events = keep(events, ~bad, "events in BAD segments", dropped, path)
    return events, dropped


def keep(events, kept, what, dropped, path):
    """The kept events; the others are counted. Raises InputError where none is left."""
    dropped[what] = int((~kept).sum())
    events = events[kept].reset_index(drop=True)
    if not (events["target"] == 0).any():
        cure = "name another column, or leave this subject out with subjects="
        raise InputError(f"{path} has no event that can be used, for {what}: {cure}")
    return events


def objects_of(events):
    """One row an object: object, word, synonyms, category. events: of all recordings."""
    shown = events[(events["target"] == 0) & (events["word"] != "")]
    table = shown.drop_duplicates("object").sort_values("object", ignore_index=True)
    if "category" not in table:
        table["category"] = ""
    return table[["object", "word", "synonyms", "category"]]


# ---- signal


def preprocess(raw, config, name, notes):
    """Filter, resample, mend and re-reference an MNE Raw in place; notes: gets what was done."""
    raw.load_data(verbose="error")
    find_bads(raw, name, notes)
    notch = [f for f in config.notch if f < raw.info["sfreq"] / 2]
    if notch:
        raw.notch_filter(notch, picks="all", verbose="error")
    sfreq = config.sfreq or raw.info["sfreq"]
    method = resampling_method(raw.info["sfreq"], sfreq)
    if method == "polyphase":
        resample(raw, sfreq, method)  # first, so that the filter has less to do
    h_freq = config.h_freq if config.h_freq < raw.info["sfreq"] / 2 else 0
    if config.l_freq or h_freq:
        raw.filter(config.l_freq or None, h_freq or None, picks="all", verbose="error")
    if config.l_freq and raw.times[-1] < 3.3 / config.l_freq:
        notes["edges"] = f"too short for l_freq={config.l_freq:g}: distorted by the filter's edges"
    if method == "fft":
        resample(raw, sfreq, method)  # last, since it rings where anything is left to low-pass
    mend(raw, config, notes)
    if notes["sensors"] in ("eeg", "ieeg"):
        rereference(raw, config.reference, name)


def resampling_method(old, new):
    """MNE's method that resamples from one rate (Hz) to another without moving signals.

    The FFT method pads to a power of two and rounds, which moves signals by up to half a sample
    unless a rate is halved, perhaps repeatedly. Polyphase filters are exact, for ratios of small
    numbers.
    """
    if old == new:
        return "none"
    return "polyphase" if small_ratio(old, new) and np.log2(new / old) % 1 else "fft"


def small_ratio(old, new):
    """new / old as a Fraction of small numbers, None where there is none."""
    ratio = Fraction(new / old).limit_denominator(1000)
    return ratio if np.isclose(float(ratio), new / old, rtol=1e-9) else None


def resample(raw, sfreq, method):
    """Resample a Raw, a few samples of which are cut off at the end: both lengths must be whole."""
    ratio = small_ratio(raw.info["sfreq"], sfreq)
    extra = raw.n_times % (2 * ratio.denominator) if ratio else 0
    if extra and extra < raw.n_times:
        raw.crop(tmax=raw.times[-1 - extra])
    raw.resample(sfreq, method=method, verbose="error")


def find_bads(raw, name, notes):
    """Mark channels that are flat or hold NaN, beside those that channels.tsv calls bad."""
    low = np.inf
    high = -np.inf
    for start in range(0, raw.n_times, 1 << 14):  # NaN where there is one
        block = raw.get_data(start=start, stop=min(start + (1 << 14), raw.n_times))
        low = np.minimum(low, block.min(axis=1))
        high = np.maximum(high, block.max(axis=1))
    broken = ~np.isfinite(low + high)
    if broken.any():  # a filter would smear a NaN over its channel, a reference over all of them
        raw.apply_function(lambda x: 0 * np.nan_to_num(x), picks=np.flatnonzero(broken))
    flat = low == high
    names = np.array(raw.ch_names)
    bad = np.isin(names, raw.info["bads"]) | broken | flat
    notes["nan"] = names[broken].tolist()
    notes["flat"] = names[flat].tolist()
    notes["bads"] = raw.info["bads"] = names[bad].tolist()
    if 2 * bad.sum() > len(names):
        found = (
            f"{bad.sum()} of {len(names)} channels are bad ({flat.sum()} flat, {broken.sum()} NaN)"
        )
        raise InputError(f"{name}: {found}: leave this subject out with subjects=")


def mend(raw, config, notes):
    """Interpolate the bad channels of a Raw where config.bads says so."""
    if config.bads == "mark" or notes["sensors"] != "eeg":
        return
    left_out = [name for name in raw.info["bads"] if name in notes["without_position"]]
    if left_out:  # without a place nothing can be interpolated
        raw.drop_channels(left_out)
        notes["left_out"] = left_out
    if raw.info["bads"]:
        raw.interpolate_bads(reset_bads=True, verbose="error")


def rereference(raw, reference, name):
    """Re-reference a Raw to the average, or to channels whose names are separated by commas."""
    if reference in ("", "none"):
        return
    names = "average"
    if reference != "average":
        names = [part.strip() for part in reference.split(",")]
        for part in names:
            if part not in raw.ch_names:
                there = ", ".join(raw.ch_names)
                raise InputError(f"reference={reference}: {name} has no '{part}', only {there}")
    raw.set_eeg_reference(names, projection=False, verbose="error")


# ---- one recording


def there_already(folder, options, overwrite):
    """The events of a whole recording that was made with these options, else None."""
    try:
        recording = Recording(folder)
    except (ValueError, OSError):
        return None
    if overwrite or recording.meta.get("options") != options:
        return None
    print(f"{folder.name}: there already", flush=True)
    return recording.events


def convert_raw(folder, raw, events, config, path, notes, **meta):
    """Preprocess an MNE Raw and write it with its events as one recording; returns the events.

    path: of the events' table; notes: what was done so far; meta: more keys. May raise NoPlaces.
    """
    notes["without_position"] = reader.without_place(raw)
    if len(notes["without_position"]) == len(raw.ch_names) and config.montage not in ("", "none"):
        reader.set_places(raw, config.montage, notes)
        notes["without_position"] = reader.without_place(raw)
    reader.require_places(raw, folder.name)
    seconds = raw.n_times / raw.info["sfreq"]
    events, dropped = keep_events(events, raw, path)
    preprocess(raw, config, folder.name, notes)
    events["onset"] += raw.first_time  # on the recording's own clock
    notes = {key: value for key, value in notes.items() if value}
    dropped = {what: n for what, n in dropped.items() if n}
    meta |= {"preprocessing": notes, "dropped": dropped, "bad_spans": reader.clock_spans(raw)}
    write_raw(folder, raw, events, **meta)
    phrases = [f"{len(events):,} events", f"{len(raw.ch_names)} channels", f"{seconds:.0f} s"]
    phrases += reader.summary(notes)
    phrases += [f"{n:,} {what} left out" for what, n in dropped.items()]
    print(f"{folder.name}: {'; '.join(phrases)}", flush=True)
    return events


def convert_one(folder, path, root, config, to_events, **meta):
    """One BIDS recording → folder, unless it is there of the same files and options; its events."""
    meta["options"] = meta["options"] | {"made_of": made_of(path, root)}
    events = there_already(folder, meta["options"], config.overwrite)
    if events is not None:
        return events
    events_tsv = reader.sidecar(path, root, "_events.tsv")
    if not events_tsv:
        raise InputError(f"{path} has no events.tsv beside it: give task= or subjects= without it")
    raw, notes = reader.open_raw(path, root, getattr(config, "sensors", ""))
    table = reader.read_tsv(events_tsv, "onset")
    named = {"trial_type", getattr(config, "word_column", ""), getattr(config, "object_column", "")}
    n_rows = len(table)
    table = reader.take_segments(raw, table, sorted(named & set(table)), events_tsv)
    notes["segments"] = n_rows - len(table)
    events = to_events(table, events_tsv, config, raw.info["sfreq"])
    subject = re.match(r"sub-([^_]+)", path.name)[1]
    return convert_raw(folder, raw, events, config, events_tsv, notes, subject=subject, **meta)


def made_of(path, root):
    """Hashes of a recording's tables, and of its files: what changes if it is mended."""
    digest = hashlib.sha256()
    tables = ("events.tsv", "channels.tsv", "electrodes.tsv", "coordsystem.json")
    for name in (*tables, f"{path.stem.split('_')[-1]}.json"):
        file = reader.sidecar(path, root, f"_{name}")
        digest.update(check_content(file).read_bytes() if file else b"")
    return f"{digest.hexdigest()[:16]} {files_state(reader.files_of(path))}"


# ---- a whole dataset


def convert(folder, root, config, *, to_events=events_of, table=objects_of, **meta):
    """A whole BIDS folder → dataset; returns the meta of the set. A stopped conversion goes on.

    to_events: like events_of; table: makes objects.csv (object, word, synonyms, category) of all
    events; meta: source, synthetic and more keys of the set.
    """
    folder = Path(folder)
    asked = (getattr(config, "task", ""), getattr(config, "sensors", ""))
    recordings = reader.find_recordings(root, config.subjects, *asked)
    options = options_of(config, "root", "subjects")
    one_meta = {"options": options, "source": meta["source"], "synthetic": meta["synthetic"]}
    (folder / "meta.yaml").unlink(missing_ok=True)
    events = {}
    reason = None
    for name, path in recordings:
        try:
            events[name] = convert_one(folder / name, path, root, config, to_events, **one_meta)
        except reader.NoPlaces as error:
            reason = error
            print(f"left out: {error}", flush=True)
    if not events:
        raise reason
    return finish(folder, events, config, table=table, **meta)


def finish(folder, events, config, *, table=objects_of, **meta):
    """objects.csv and meta.yaml of a set; returns the latter. events: {recording: its events}."""
    objects = table(pd.concat(events.values()))
    write_aside(folder / "objects.csv", objects.to_csv(index=False))
    dropped = {}
    for name in events:
        for what, n in read_meta(folder / name).get("dropped", {}).items():
            dropped[what] = dropped.get(what, 0) + n
    signal = {key: getattr(config, key) for key in SIGNAL_OPTIONS if hasattr(config, key)}
    meta |= {"kind": "eeg", "n_objects": len(objects), "n_words": int(objects["word"].nunique())}
    meta = write_set(folder, list(events), signal=signal, dropped=dropped, **meta)
    print(
        f"{folder}: {len(events)} recordings, {meta['n_objects']:,} objects, "
        f"{meta['n_words']:,} words"
    )
    return meta


def main(config):
    if not config.root:
        raise InputError("root= is missing: give the folder of a BIDS dataset")
    root = Path(config.root)
    folder = folder_of(config, __file__, root.resolve().name)
    description = root / "dataset_description.json"
    facts = reader.read_facts(description if description.is_file() else None)
    name = str(facts.get("Name", ""))
    source = f"BIDS: {name or root.resolve().name}"
    convert(folder, root, config, source=source, synthetic="synthetic" in name.lower())


if __name__ == "__main__":
    main(configure(Config))
