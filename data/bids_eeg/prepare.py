"""EEG, MEG or iEEG in BIDS, with events that name what was shown, as recordings: filtered,
re-referenced and resampled, neither cut into windows nor whitened.

    python data/bids_eeg/prepare.py root=PATH/ds000000          # words are in events.tsv's 'word'
    python data/bids_eeg/prepare.py root=PATH/ds000000 word_column= object_column=object
    python data/bids_eeg/prepare.py root=PATH/ds000000 subjects=01,02 sfreq=250 h_freq=100 notch=50

data/raw.py reads the files. Channels are bad if channels.tsv says so, if they are flat or contain
NaN. Windows, baseline and noise normalisation are left to the experiment, which knows its training
trials. Prepare scripts of other BIDS datasets use `convert`.
"""

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
from data import InputError, column, file_hash, folder_of, options_of, write_aside
from data import raw as reader
from data.recording import write_raw, write_set


@dataclass
class Config:
    root: str = ""  # the BIDS folder (dataset_description.json, sub-*/)
    out_dir: str = ""  # "": data/bids_eeg/NAME OF ROOT
    subjects: list[str] = field(default_factory=list)  # 01,02 as in the file names; none: all
    task: str = ""  # only recordings of this task; "": all
    sensors: Literal["", "eeg", "ieeg", "mag", "grad"] = ""  # "": eeg, else MEG's mag, else ieeg
    # ---- columns of events.tsv
    word_column: str = "word"  # what to say; "": made from the object, stove2 → stove
    object_column: str = ""  # unique name of what was shown, distinguishes homographs; "": the word
    image_column: str = ""  # the picture or sound itself, the same in its repeats; "": the object
    synonyms_column: str = ""  # other right answers, separated by | or ,
    category_column: str = ""  # kind of object
    block_column: str = ""  # stretch of the session, run or sequence
    target_column: str = ""  # 1 (or true) for catch trials
    # ---- signal
    l_freq: float = 0.1  # Hz, high-pass; 0: none
    h_freq: float = 40.0  # Hz, low-pass; 0: none
    notch: list[float] = field(default_factory=list)  # Hz, mains and harmonics below h_freq
    reference: str = "average"  # average, channel names (M1,M2), or none; not used for MEG
    sfreq: float = 100.0  # Hz after resampling; 0: as recorded
    montage: str = "colin27_1005"  # MNE montage for recordings without positions, or none
    # Bad channels: interpolated by spherical splines (EEG only), or marked: no script reads them
    bads: Literal["interpolate", "mark"] = "interpolate"
    overwrite: bool = False  # convert again what exists

    def check(self):
        check_signal(self)


def check_signal(config):
    """Refuse impossible filter options."""
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
    """Return the word in a unique name: stove2 → stove, ice_cream → ice cream."""
    return spaced(re.sub(r"(?<=[^\W\d])\d+$", "", str(thing).strip()))


def spaced(text):
    """Replace blanks and underscores by single blanks."""
    return re.sub(r"[\s_]+", " ", str(text)).strip()


def synonyms_of(text, word=""):
    """'range, cooking_stove' → 'range|cooking stove', without the word itself."""
    words = [spaced(part) for part in re.split(r"[|,;]", str(text))]
    return "|".join(dict.fromkeys(w for w in words if w and w != word))


def events_of(table, path, config, sfreq):
    """Convert events.tsv (a table of text) to our table of events.

    Columns: onset, duration (s), object, word, synonyms, image, block, target, and category if
    the set has it. sfreq: Hz of the recording, for sets whose onsets count samples.
    """
    if not config.word_column and not config.object_column:
        raise InputError("word_column and object_column are both empty: name one of them")

    def texts(option):
        name = getattr(config, option)
        if not name:
            return pd.Series("", table.index)
        return column(table, f"{path} ({option}=)", name).fillna("").str.normalize("NFC")

    words = texts("word_column")
    objects = texts("object_column") if config.object_column else words
    images = texts("image_column")
    targets = texts("target_column").str.lower()
    events = pd.DataFrame({"onset": reader.numbers(table, "onset", path), "duration": 0.0})
    if "duration" in table:
        events["duration"] = reader.numbers(table, "duration", path).fillna(0.0)
    events["object"] = objects
    events["word"] = words.map(spaced) if config.word_column else objects.map(word_of)
    events["synonyms"] = texts("synonyms_column").map(synonyms_of)
    events["image"] = images.where(images != "", objects)
    events["block"] = texts("block_column")
    events["target"] = targets.isin(["1", "1.0", "true", "yes"]).astype(int)
    if config.category_column:
        events["category"] = texts("category_column")
    return events


def keep_events(events, raw, path):
    """Return the usable events, and {reason: how many were dropped}.

    Usable events lie inside the recording, outside bad segments, and have a word unless they are
    catch trials. Raises InputError if most onsets lie outside. path: for messages.
    """
    sfreq = raw.info["sfreq"]
    seconds = raw.n_times / sfreq
    dropped = {}
    known = np.isfinite(events["onset"]) & ((events["word"] != "") | (events["target"] == 1))
    events = _keep(events, known, "events without onset or word", dropped, path)
    inside = (events["onset"] >= 0) & (events["onset"] < seconds)
    if inside.mean() < 0.5:
        raise InputError(
            f"{path}: {(~inside).sum()} of {len(inside)} onsets lie outside the {seconds:.0f} s of "
            f"the recording: are they in ms, or in samples ({sfreq:g} per second)? Give them in s"
        )
    events = _keep(events, inside, "events outside the signal", dropped, path)
    begin = events["onset"] + raw.first_time
    end = begin + events["duration"].clip(lower=0)
    bad = reader.inside_spans(begin, end, reader.clock_spans(raw))
    return _keep(events, ~bad, "events in BAD segments", dropped, path), dropped


def _keep(events, kept, reason, dropped, path):
    """Return the kept events and count the others. Raises InputError if none is left."""
    if not kept.all():
        dropped[reason] = int((~kept).sum())
    events = events[kept].reset_index(drop=True)
    if not (events["target"] == 0).any():
        cure = "name another column, or leave this subject out with subjects="
        raise InputError(f"{path} has no event that can be used, for {reason}: {cure}")
    return events


def objects_of(events):
    """Return a row per object of all recordings: object, word, synonyms, category."""
    shown = events[(events["target"] == 0) & (events["word"] != "")]
    table = shown.drop_duplicates("object").sort_values("object", ignore_index=True)
    if "category" not in table:
        table["category"] = ""
    return table[["object", "word", "synonyms", "category"]]


# ---- signal


def preprocess(raw, config, name, notes):
    """Filter, resample, mend and re-reference an MNE Raw in place, and note what was done."""
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
        notes["edges"] = f"distorted: too short for l_freq={config.l_freq:g}"
    if method == "fft":
        resample(raw, sfreq, method)  # last, since it rings unless the signal is low-passed
    mend(raw, config, notes)
    if notes["sensors"] in ("eeg", "ieeg"):
        rereference(raw, config.reference, name)


def resampling_method(old, new):
    """Return the MNE method that resamples from one rate (Hz) to another without moving signals.

    The FFT method pads to a power of two and rounds, which moves signals by up to half a sample
    unless a rate is halved, perhaps repeatedly. Polyphase filters are exact, for ratios of small
    numbers.
    """
    if old == new:
        return "none"
    return "polyphase" if small_ratio(old, new) and np.log2(new / old) % 1 else "fft"


def small_ratio(old, new):
    """Return new / old as a Fraction of small numbers, None if there is none."""
    ratio = Fraction(new / old).limit_denominator(1000)
    return ratio if np.isclose(float(ratio), new / old, rtol=1e-9) else None


def resample(raw, sfreq, method):
    """Resample a Raw, cutting off a few samples at the end so that both lengths are whole."""
    ratio = small_ratio(raw.info["sfreq"], sfreq)
    extra = raw.n_times % (2 * ratio.denominator) if ratio else 0
    if extra and extra < raw.n_times:
        raw.crop(tmax=raw.times[-1 - extra])
    raw.resample(sfreq, method=method, verbose="error")


def find_bads(raw, name, notes):
    """Mark flat channels and channels with NaN as bad, besides those that channels.tsv marks."""
    low = np.inf
    high = -np.inf
    for start in range(0, raw.n_times, 1 << 14):  # low and high of a channel with NaN are NaN
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
        counts = f"{bad.sum()} of {len(names)} channels are bad"
        counts += f" ({flat.sum()} flat, {broken.sum()} NaN)"
        raise InputError(f"{name}: {counts}: leave this subject out with subjects=")


def mend(raw, config, notes):
    """Interpolate bad EEG channels if config.bads says so."""
    if config.bads == "mark" or notes["sensors"] != "eeg":
        return
    left_out = [name for name in raw.info["bads"] if name in notes["without_position"]]
    if left_out:  # interpolation needs a position
        raw.drop_channels(left_out)
        notes["left_out"] = left_out
    if raw.info["bads"]:
        raw.interpolate_bads(reset_bads=True, verbose="error")


def rereference(raw, reference, name):
    """Re-reference a Raw to the average, or to good channels, separated by commas."""
    if reference in ("", "none"):
        return
    good = [channel for channel in raw.ch_names if channel not in raw.info["bads"]]
    names = reference
    if reference != "average":
        names = [part.strip() for part in reference.split(",")]
        for part in names:
            if part not in good:
                present = f"it has {', '.join(good)}"
                raise InputError(f"reference={reference}: {name} has no good '{part}', {present}")
    elif len(good) < 2:
        raise InputError(
            f"reference=average: {name} has a single good channel: give reference=none"
        )
    raw.set_eeg_reference(names, projection=False, verbose="error")


# ---- one recording


def convert_raw(folder, raw, events, config, path, notes, **meta):
    """Preprocess an MNE Raw and write it with its events as one recording; returns the events.

    path: of the events; notes: what was done so far; meta: more keys. Raises NoPlaces.
    """
    reader.find_places(raw, config.montage, folder.name, notes)
    seconds = raw.n_times / raw.info["sfreq"]
    events, dropped = keep_events(events, raw, path)
    preprocess(raw, config, folder.name, notes)
    events["onset"] += raw.first_time  # on the recording's clock
    notes = {key: value for key, value in notes.items() if value}
    meta |= {"preprocessing": notes, "dropped": dropped, "bad_spans": reader.clock_spans(raw)}
    write_raw(folder, raw, events, **meta)
    phrases = [f"{len(events):,} events", f"{len(raw.ch_names)} channels", f"{seconds:.0f} s"]
    phrases += reader.summary(notes)
    phrases += [f"{n:,} {reason} dropped" for reason, n in dropped.items()]
    print(f"{folder.name}: {'; '.join(phrases)}", flush=True)
    return events


def convert_one(folder, path, root, config, to_events, **meta):
    """Convert one BIDS recording unless that was done with these options; returns its events."""
    meta["options"] = meta["options"] | {"made_of": reader.made_of(path, root)}
    recording = reader.converted(folder, meta["options"], config.overwrite)
    if recording:
        return recording.events
    events_tsv = reader.sidecar(path, root, "events.tsv")
    if not events_tsv:
        raise InputError(f"{path} has no events.tsv: leave it out with task= or subjects=")
    raw, notes = reader.open_raw(path, root, getattr(config, "sensors", ""))
    table = reader.read_tsv(events_tsv, "onset")
    named = {"trial_type", getattr(config, "word_column", ""), getattr(config, "object_column", "")}
    n_rows = len(table)
    table = reader.take_segments(raw, table, sorted(named & set(table)), events_tsv)
    notes["segments"] = n_rows - len(table)
    events = to_events(table, events_tsv, config, raw.info["sfreq"])
    subject = re.match(r"sub-([^_]+)", path.name)[1]
    return convert_raw(folder, raw, events, config, events_tsv, notes, subject=subject, **meta)


# ---- a whole dataset


def convert(folder, root, config, *, to_events=events_of, table=objects_of, **meta):
    """Convert a BIDS folder to a dataset; returns its meta. A stopped conversion can continue.

    to_events: a function like events_of; table: makes objects.csv (object, word, synonyms,
    category) from all events; meta: source, synthetic and more keys of the set.
    """
    folder = Path(folder)
    wanted = (getattr(config, "task", ""), getattr(config, "sensors", ""))
    recordings = reader.find_recordings(root, config.subjects, *wanted)
    options = options_of(config, "root", "subjects")
    if options.get("concepts"):  # of THINGS; the table may be edited
        options["concepts"] = file_hash(config.concepts)
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
    return finish(folder, events, table, **meta)


def finish(folder, events, table=objects_of, **meta):
    """Write objects.csv and meta.yaml of a set; returns the meta. events: {recording: table}."""
    objects = table(pd.concat(events.values()))
    write_aside(folder / "objects.csv", objects.to_csv(index=False))
    meta |= {"n_objects": len(objects), "n_words": int(objects["word"].nunique())}
    meta = write_set(folder, list(events), **meta)
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
