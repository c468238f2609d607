"""THINGS-EEG1: 50 people, 22,248 pictures of 1,854 objects at ten a second (Grootswagers et al. 2022, OpenNeuro ds003825), as recordings.

    python data/things_eeg1/prepare.py subjects=01,02                    # fetches these people from OpenNeuro, 0.5 to 1.9 GB each, and converts them
    python data/things_eeg1/prepare.py root=PATH/ds003825                # converts a copy that is there already
    python data/things_eeg1/prepare.py subjects=01 concepts=PATH/things_concepts.tsv   # with THINGS' table of synonyms and categories

The events are read with their traps: `sample` before `onset` (which older releases have in samples), durations in ms, stimulus paths with backslashes,
objects with a number where two share a word (calf1, calf2). Catch trials keep target=1; the repeated test pictures (blocksequencenumber below 0, or named
in test_images.csv) get phase=test.
"""
import os, shutil, sys, urllib.error, urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.bids_eeg import prepare as bids

HERE = Path(__file__).resolve().parent
COLUMNS = ["onset", "object", "stim", "istarget", "blocksequencenumber"]
PARTS = ["eeg.vhdr", "eeg.vmrk", "eeg.eeg", "events.tsv"]


@dataclass
class Config:
    root: str = ""                    # the dataset's folder; "": fetch the chosen subjects to raw/ in out_dir
    out_dir: str = ""                 # "": this folder
    subjects: list[str] = field(default_factory=list)  # 01,02 and so on; none: all that root has
    url: str = "https://s3.amazonaws.com/openneuro.org/ds003825"  # where to fetch it from
    concepts: str = ""                # THINGS' concept table (tab-separated: uniqueID, Word, WordNet Synonyms, ...); "": words from the object names
    # ---- signal: as data/bids_eeg
    l_freq: float = 0.1               # Hz, high-pass; 0: none
    h_freq: float = 40.0              # Hz, low-pass; 0: none
    notch: list[float] = field(default_factory=list)  # Hz
    reference: str = "average"        # average, channel names, or none (the amplifier's: Cz, not recorded)
    sfreq: float = 100.0              # Hz after resampling; 0: as recorded (1000)
    montage: str = "colin27_1005"     # the set has no electrodes.tsv
    bads: Literal["interpolate", "mark", "drop"] = "interpolate"  # bad channels
    overwrite: bool = False           # convert again what is there

    def check(self):
        bids.check_signal(self)
        self.subjects = [s.removeprefix("sub-").zfill(2) for s in self.subjects]


# ---- fetching

def opened(url, start=0, method="GET"):
    """The response to a request for a file from byte `start`. Raises FileNotFoundError or OSError in a sentence."""
    request = urllib.request.Request(url, method=method, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
        raise FileNotFoundError(f"{url} is not to be had (HTTP {e.code}): is there such a subject?") from None
    except OSError as e:
        raise OSError(f"{url} cannot be reached ({e}): go where there is network, or give root= a copy") from None


def fetch(url, path, size):
    """Fetch a file of a known size; goes on where an earlier attempt stopped. Raises OSError when what came is not what was announced."""
    if path.exists() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    if have < size:
        with opened(url, have) as response, open(part, "ab") as file, tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=path.name,
                                                                          disable=size < 1e7) as bar:
            if have and response.status != 206:  # a server that cannot go on starts over
                file.truncate(0)
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size != size:
        raise OSError(f"{path}: {part.stat().st_size:,} of {size:,} bytes came from {url}; run the same command again, it goes on from there")
    os.replace(part, path)


def fetch_subjects(url, root, subjects):
    """Fetch these subjects' files into a BIDS folder, after saying how much it is. Raises OSError where the disk is too small."""
    names = ["dataset_description.json"] + [f"sub-{s}/eeg/sub-{s}_task-rsvp_{part}" for s in subjects for part in PARTS]
    sizes = {name: int(opened(f"{url}/{name}", method="HEAD").headers["Content-Length"]) for name in names}
    missing = sum(size for name, size in sizes.items() if not ((root / name).exists() and (root / name).stat().st_size == size))
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    print(f"sub-{', sub-'.join(subjects)}: {sum(sizes.values()) / 1e9:.2f} GB, {missing / 1e9:.2f} GB of it to fetch; {free / 1e9:.0f} GB free", flush=True)
    if free < 1.3 * missing:
        raise OSError(f"{root}: {missing / 1e9:.1f} GB and their conversion do not fit into the {free / 1e9:.1f} GB that are free: choose fewer subjects")
    for name, size in sizes.items():
        fetch(f"{url}/{name}", root / name, size)


# ---- events

def events_of(table, path, config, sfreq):
    """events.tsv of ds003825 as our table, and how many rows were left out; see data/bids_eeg."""
    if missing := [c for c in COLUMNS if c not in table]:
        raise ValueError(f"{path} has no column '{missing[0]}', only {', '.join(table)}: is this ds003825?")
    onset = bids.numbers(table, "onset", path)
    if "sample" in table:
        onset = bids.numbers(table, "sample", path) / sfreq
    elif np.median(np.diff(np.sort(onset.dropna()))) > 5:  # pictures come every 0.1 s
        onset = onset / sfreq
    duration = bids.numbers(table, "duration", path) if "duration" in table else pd.Series(0.05, table.index)
    if duration.median() > 1:  # 50 ms
        duration = duration / 1000
    thing = table["object"].fillna("")
    image = table["stim"].fillna("").str.replace("\\", "/").str.rsplit("/", n=1).str[-1]
    named = Path(path).parents[2] / "test_images.csv" if len(Path(path).parents) > 2 else None  # lines of object/picture.jpg
    named = [line.strip().rsplit("/", 1)[-1] for line in named.read_text().splitlines()] if named and named.is_file() else []
    test = (bids.numbers(table, "blocksequencenumber", path) < 0) | image.isin(named)
    events = pd.DataFrame({
        "onset": onset, "duration": duration.fillna(0.05), "object": thing, "word": thing.map(bids.word_of), "synonyms": "",
        "image": image, "block": stretches(onset),
        "target": np.where(bids.numbers(table, "istarget", path) == 1, 1, 0), "phase": np.where(test, "test", "train")})
    if config.concepts:
        events = with_concepts(events, read_concepts(config.concepts))
    return bids.usable(events, path)


def stretches(onset, pause=1.0):
    """Number of the stretch, from 1, that each onset (s) is in: a pause of a second ends one."""
    onset = np.asarray(onset, float)
    order, number = np.argsort(onset, kind="stable"), np.empty(len(onset), int)
    number[order] = 1 + np.cumsum(np.diff(onset[order], prepend=onset[order[:1]]) > pause)
    return number


def read_concepts(path):
    """THINGS' concept table as a DataFrame indexed by uniqueID: word, synonyms (a|b), category."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"concepts={path} is not there: give THINGS' concept table (things_concepts.tsv of osf.io/jum2f), or leave it out")
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    if missing := [c for c in ("uniqueID", "Word") if c not in table]:
        raise ValueError(f"{path} has no column '{missing[0]}', only {', '.join(table)[:200]}")
    kind = next((c for c in ("Top-down Category (manual selection)", "Bottom-up Category (Human Raters)", "Top-down Category (WordNet)", "category")
                 if c in table), None)
    word, names = table["Word"].map(bids.word_of), table["uniqueID"].str.strip().str.replace(" ", "_")
    other = table["WordNet Synonyms"] if "WordNet Synonyms" in table else pd.Series("", table.index)
    return pd.DataFrame({"word": word, "synonyms": [bids.synonyms_of(s, w) for s, w in zip(other, word)],
                         "category": table[kind].str.split(",").str[0].str.strip() if kind else ""}).set_axis(names)


def with_concepts(events, concepts):
    """Events with word, synonyms and category of the concept table, where it has the object."""
    known = events["object"].isin(concepts.index)
    found = concepts[~concepts.index.duplicated()].reindex(events["object"]).set_axis(events.index)
    return events.assign(word=events["word"].mask(known, found["word"]), synonyms=events["synonyms"].mask(known, found["synonyms"]),
                         category=found["category"].fillna(""))


def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(HERE))
    root = Path(config.root) if config.root else folder / "raw"
    if not config.root:
        if not config.subjects:
            raise ValueError("subjects= is missing: choose whom to fetch (subjects=01,02; all 50 are 40 GB), or give root= a copy of ds003825")
        fetch_subjects(config.url, root, config.subjects)
    if config.concepts:
        read_concepts(config.concepts)  # refuse it before hours of work
    meta = bids.convert(folder, root, config, source="THINGS-EEG1, OpenNeuro ds003825 (Grootswagers et al. 2022)", synthetic=False, to_events=events_of)
    print(f"{folder}: {len(meta['recordings'])} recordings, {meta['objects']:,} objects, {meta['words']:,} words")


if __name__ == "__main__":
    main(configure(Config))
