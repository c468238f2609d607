"""THINGS-EEG1 as recordings: 50 people, 22,248 pictures of 1,854 objects, ten per second.

    python data/things_eeg1/prepare.py subjects=01,02      # downloads them, 0.5 to 1.9 GB each
    python data/things_eeg1/prepare.py root=PATH/ds003825  # converts a local copy
    python data/things_eeg1/prepare.py subjects=01 concepts=PATH/things_concepts.tsv

Grootswagers et al. 2022, OpenNeuro ds003825. `concepts=` is THINGS' table of synonyms and
categories. The events have traps: some releases give `onset` in samples or ms, so `sample` is
preferred; durations are in ms; stimulus paths have backslashes; objects that share a word are
numbered (calf1, calf2). Catch trials keep target=1; the repeated test pictures get phase=test.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, column, folder_of
from data import raw as reader
from data.bids_eeg import prepare as bids
from data.fetch import download, need

PARTS = ["eeg.vhdr", "eeg.vmrk", "eeg.eeg", "events.tsv"]
CATEGORIES = [  # columns of the concept table, best first
    "Top-down Category (manual selection)",
    "Bottom-up Category (Human Raters)",
    "Top-down Category (WordNet)",
    "category",
]


@dataclass
class Config:
    root: str = ""  # the dataset's folder; "": download the subjects to raw/ in out_dir
    out_dir: str = ""  # "": this folder
    subjects: list[str] = field(default_factory=list)  # 01,02 and so on; none: all in root
    url: str = "https://s3.amazonaws.com/openneuro.org/ds003825"  # where to download from
    concepts: str = ""  # THINGS' concept table (tab-separated); "": words from the object names
    # ---- signal: see data/bids_eeg
    l_freq: float = 0.1  # Hz, high-pass; 0: none
    h_freq: float = 40.0  # Hz, low-pass; 0: none
    notch: list[float] = field(default_factory=list)  # Hz
    reference: str = "average"  # average, channel names, or none (then Cz, which was not recorded)
    sfreq: float = 100.0  # Hz after resampling; 0: as recorded (1000)
    montage: str = "colin27_1005"  # the set has no electrodes.tsv
    bads: Literal["interpolate", "mark"] = "interpolate"  # bad channels
    overwrite: bool = False  # convert again what exists

    def check(self):
        bids.check_signal(self)
        self.subjects = [s.removeprefix("sub-").zfill(2) for s in self.subjects]


def fetch_subjects(url, root, subjects):
    """Download these subjects' files into a BIDS folder."""
    if not subjects:
        cure = "choose whom to download (all 50 are 40 GB), or give root= a copy of ds003825"
        raise InputError(f"subjects= is missing: {cure}")
    names = ["dataset_description.json"]
    for subject in subjects:
        names += [f"sub-{subject}/eeg/sub-{subject}_task-rsvp_{part}" for part in PARTS]
    files = [need(f"{url}/{name}", root / name) for name in names]
    download(files, root, times=1.3)


# ---- events


def events_of(table, path, config, sfreq):
    """Convert events.tsv of ds003825 to our table of events; see data/bids_eeg."""
    onset = onsets_of(table, path, sfreq)
    events = pd.DataFrame({"onset": onset, "duration": 0.05})
    if "duration" in table:
        duration = reader.numbers(table, "duration", path).fillna(0.05)
        in_ms = duration.median() > 1
        events["duration"] = duration / 1000 if in_ms else duration
    events["object"] = column(table, path, "object").fillna("")
    events["word"] = events["object"].map(bids.word_of)
    events["synonyms"] = ""
    stim = column(table, path, "stim").fillna("")
    events["image"] = stim.str.replace("\\", "/").str.rsplit("/", n=1).str[-1]
    events["block"] = stretches(onset)
    events["target"] = (reader.numbers(table, "istarget", path) == 1).astype(int)
    is_test = reader.numbers(table, "blocksequencenumber", path) < 0
    if "isteststim" in table:
        is_test |= reader.numbers(table, "isteststim", path) == 1
    events["phase"] = np.where(is_test, "test", "train")
    if config.concepts:
        events = with_concepts(events, read_concepts(config.concepts))
    return events


def onsets_of(table, path, sfreq):
    """Return onsets in s, from `sample`, or from `onset` in s, ms or samples.

    The unit is the one in which pictures come every 0.1 s. Raises InputError if there is none.
    """
    name = "sample" if "sample" in table else "onset"
    units = np.array([sfreq] if name == "sample" else [1.0, 1000.0, sfreq])
    onset = reader.numbers(table, name, path)
    step = onset.sort_values().diff().median()
    error = np.abs(step / units - 0.1)
    if error.min() > 0.02:
        cure = "give them in s; pictures come every 0.1 s"
        raise InputError(f"{path}: the column {name} steps by {step:g}, in no known unit: {cure}")
    return onset / units[error.argmin()]


def stretches(onset, pause=1.0):
    """Number the stretches of onsets (s) from 1: each pause of a second starts a new one."""
    onset = pd.Series(np.asarray(onset, dtype=float)).sort_values(kind="stable")
    return (1 + (onset.diff() > pause).cumsum()).sort_index().to_numpy()


def read_concepts(path):
    """Return THINGS' concept table, indexed by uniqueID: word, synonyms (a|b), category."""
    if not Path(path).is_file():
        cure = "give THINGS' concept table (things_concepts.tsv of osf.io/jum2f), or leave it out"
        raise InputError(f"concepts={path} does not exist: {cure}")
    table = reader.read_tsv(path, "uniqueID", "Word").fillna("")
    concepts = pd.DataFrame({"word": table["Word"].map(bids.word_of), "synonyms": ""})
    if "WordNet Synonyms" in table:
        concepts["synonyms"] = list(map(bids.synonyms_of, table["WordNet Synonyms"], concepts.word))
    columns = [name for name in CATEGORIES if name in table]
    concepts["category"] = table[columns[0]].str.split(",").str[0].str.strip() if columns else ""
    concepts.index = table["uniqueID"].str.strip().str.replace(" ", "_")
    return concepts[~concepts.index.duplicated()]


def with_concepts(events, concepts):
    """Add word, synonyms and category of the concept table to the events whose object it has."""
    rows = concepts.reindex(events["object"]).set_axis(events.index)
    for name in ("word", "synonyms"):
        events[name] = rows[name].fillna(events[name])
    return events.assign(category=rows["category"].fillna(""))


def main(config):
    folder = folder_of(config, __file__)
    if config.concepts:
        read_concepts(config.concepts)  # fails before hours of work
    root = Path(config.root or folder / "raw")
    if not config.root:
        fetch_subjects(config.url, root, config.subjects)
    source = "THINGS-EEG1, OpenNeuro ds003825 (Grootswagers et al. 2022)"
    bids.convert(folder, root, config, to_events=events_of, source=source, synthetic=False)


if __name__ == "__main__":
    main(configure(Config))
