"""THINGS-EEG1 as recordings: 50 people, 22,248 pictures of 1,854 objects at ten a second.

    python data/things_eeg1/prepare.py subjects=01,02      # fetches them, 0.5 to 1.9 GB each
    python data/things_eeg1/prepare.py root=PATH/ds003825  # converts a copy that is there already
    python data/things_eeg1/prepare.py subjects=01 concepts=PATH/things_concepts.tsv

Grootswagers et al. 2022, OpenNeuro ds003825. `concepts=` is THINGS' table of synonyms and
categories. The events are read with their traps: `sample` before `onset` (which some releases have
in samples), durations in ms, stimulus paths with backslashes, objects with a number where two share
a word (calf1, calf2). Catch trials keep target=1; the repeated test pictures get phase=test.
"""

import os
import shutil
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError
from data import raw as reader
from data.bids_eeg import prepare as bids

HERE = Path(__file__).resolve().parent
COLUMNS = ["onset", "object", "stim", "istarget", "blocksequencenumber"]
PARTS = ["eeg.vhdr", "eeg.vmrk", "eeg.eeg", "events.tsv"]
CATEGORIES = [  # columns of the concept table, the best first
    "Top-down Category (manual selection)",
    "Bottom-up Category (Human Raters)",
    "Top-down Category (WordNet)",
    "category",
]


@dataclass
class Config:
    root: str = ""  # the dataset's folder; "": fetch the chosen subjects to raw/ in out_dir
    out_dir: str = ""  # "": this folder
    subjects: list[str] = field(default_factory=list)  # 01,02 and so on; none: all that root has
    url: str = "https://s3.amazonaws.com/openneuro.org/ds003825"  # where to fetch it from
    concepts: str = ""  # THINGS' concept table (tab-separated); "": words from the object names
    # ---- signal: as data/bids_eeg
    l_freq: float = 0.1  # Hz, high-pass; 0: none
    h_freq: float = 40.0  # Hz, low-pass; 0: none
    notch: list[float] = field(default_factory=list)  # Hz
    reference: str = (
        "average"  # average, channel names, or none (the amplifier's: Cz, not recorded)
    )
    sfreq: float = 100.0  # Hz after resampling; 0: as recorded (1000)
    montage: str = "colin27_1005"  # the set has no electrodes.tsv
    bads: Literal["interpolate", "mark", "drop"] = "interpolate"  # bad channels
    overwrite: bool = False  # convert again what is there

    def check(self):
        bids.check_signal(self)
        self.subjects = [s.removeprefix("sub-").zfill(2) for s in self.subjects]


# ---- fetching


def opened(url, start=0, method="GET"):
    """The response to a request for a file from byte `start`."""
    request = urllib.request.Request(url, method=method)
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        raise InputError(
            f"{url} cannot be fetched (HTTP {error.code}): is there such a subject?"
        ) from None
    except OSError as error:
        raise InputError(
            f"{url} cannot be reached ({error}): go where there is network, or give root= a copy"
        ) from None


def fetch(url, path, size):
    """Fetch a file of a known size; goes on where an earlier attempt stopped."""
    if path.exists() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    part.touch()
    if part.stat().st_size > size:
        part.write_bytes(b"")
    done = part.stat().st_size
    if done < size:
        units = {"unit": "B", "unit_scale": True, "disable": size < 1e7}
        bar = tqdm(total=size, initial=done, desc=path.name, **units)
        with opened(url, done) as response, open(part, "ab") as file, bar:
            if done and response.status != 206:  # a server that cannot go on starts over
                file.truncate(0)
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size != size:
        raise InputError(
            f"{path}: {part.stat().st_size:,} of {size:,} bytes came from {url}; run the same "
            "command again, it goes on from there"
        )
    os.replace(part, path)


def fetch_subjects(url, root, subjects):
    """Fetch these subjects' files into a BIDS folder, after saying how much it is."""
    names = ["dataset_description.json"]
    for subject in subjects:
        names += [f"sub-{subject}/eeg/sub-{subject}_task-rsvp_{part}" for part in PARTS]
    sizes, missing = {}, 0
    for name in names:
        sizes[name] = int(opened(f"{url}/{name}", method="HEAD").headers["Content-Length"])
        path = root / name
        if not path.exists() or path.stat().st_size != sizes[name]:
            missing += sizes[name]
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    print(
        f"sub-{', sub-'.join(subjects)}: {sum(sizes.values()) / 1e9:.2f} GB, "
        f"{missing / 1e9:.2f} GB of it to fetch; {free / 1e9:.0f} GB free",
        flush=True,
    )
    if free < 1.3 * missing:
        raise InputError(
            f"{root}: {missing / 1e9:.1f} GB and their conversion do not fit into the "
            f"{free / 1e9:.1f} GB that are free: choose fewer subjects"
        )
    for name, size in sizes.items():
        fetch(f"{url}/{name}", root / name, size)


# ---- events


def events_of(table, path, config, sfreq):
    """events.tsv of ds003825 as our table of events; see data/bids_eeg."""
    for column in COLUMNS:
        if column not in table:
            raise InputError(
                f"{path} has no column '{column}', only {', '.join(table)}: is this ds003825?"
            )
    onset = reader.numbers(table, "onset", path)
    if "sample" in table:
        onset = reader.numbers(table, "sample", path) / sfreq
    elif np.median(np.diff(np.sort(onset.dropna()))) > 5:  # pictures come every 0.1 s
        onset = onset / sfreq
    duration = pd.Series(0.05, table.index)
    if "duration" in table:
        duration = reader.numbers(table, "duration", path).fillna(0.05)
    if duration.median() > 1:  # 50 ms
        duration = duration / 1000
    events = pd.DataFrame({"onset": onset, "duration": duration})
    events["object"] = table["object"].fillna("")
    events["word"] = events["object"].map(bids.word_of)
    events["synonyms"] = ""
    events["image"] = table["stim"].fillna("").str.replace("\\", "/").str.rsplit("/", n=1).str[-1]
    events["block"] = stretches(onset)
    events["target"] = (reader.numbers(table, "istarget", path) == 1).astype(int)
    test = is_test(table, events["image"], path)
    events["phase"] = np.where(test, "test", "train")
    if config.concepts:
        events = with_concepts(events, read_concepts(config.concepts))
    return events


def is_test(table, image, path):
    """(N,) whether a trial showed one of the repeated test pictures, however a release says so."""
    test = reader.numbers(table, "blocksequencenumber", path) < 0
    if "isteststim" in table:
        test |= reader.numbers(table, "isteststim", path) == 1
    folders = Path(path).parents
    if len(folders) > 2 and (folders[2] / "test_images.csv").is_file():
        lines = (folders[2] / "test_images.csv").read_text().split()  # object/picture.jpg
        test |= image.isin([line.rsplit("/", 1)[-1] for line in lines])
    return test


def stretches(onset, pause=1.0):
    """Number of the stretch, from 1, that each onset (s) is in: a pause of a second ends one."""
    onset = pd.Series(np.asarray(onset, dtype=float)).sort_values(kind="stable")
    return (1 + (onset.diff() > pause).cumsum()).sort_index().to_numpy()


def read_concepts(path):
    """THINGS' concept table, indexed by uniqueID: word, synonyms (a|b), category."""
    if not Path(path).is_file():
        raise InputError(
            f"concepts={path} is not there: give THINGS' concept table (things_concepts.tsv of "
            "osf.io/jum2f), or leave it out"
        )
    table = reader.read_tsv(path, "uniqueID", "Word").fillna("")
    names = table["uniqueID"].str.strip().str.replace(" ", "_")
    concepts = pd.DataFrame({"word": table["Word"].map(bids.word_of)})
    concepts["synonyms"] = ""
    if "WordNet Synonyms" in table:
        pairs = zip(table["WordNet Synonyms"], concepts["word"])
        concepts["synonyms"] = [bids.synonyms_of(synonyms, word) for synonyms, word in pairs]
    concepts["category"] = ""
    for column in CATEGORIES:
        if column in table:
            concepts["category"] = table[column].str.split(",").str[0].str.strip()
            break
    return concepts.set_axis(names)


def with_concepts(events, concepts):
    """Events with word, synonyms and category of the concept table, where it has the object."""
    known = events["object"].isin(concepts.index)
    concepts = concepts[~concepts.index.duplicated()]
    found = concepts.reindex(events["object"]).set_axis(events.index)
    for column in ("word", "synonyms"):
        events[column] = events[column].mask(known, found[column])
    return events.assign(category=found["category"].fillna(""))


def main(config):
    folder = Path(config.out_dir or os.path.relpath(HERE))
    if config.concepts:
        read_concepts(config.concepts)  # refused before hours of work
    root = Path(config.root or folder / "raw")
    if not config.root:
        if not config.subjects:
            raise InputError(
                "subjects= is missing: choose whom to fetch (subjects=01,02; all 50 are 40 GB), or "
                "give root= a copy of ds003825"
            )
        fetch_subjects(config.url, root, config.subjects)
    source = "THINGS-EEG1, OpenNeuro ds003825 (Grootswagers et al. 2022)"
    bids.convert(folder, root, config, to_events=events_of, source=source, synthetic=False)


if __name__ == "__main__":
    main(configure(Config))
