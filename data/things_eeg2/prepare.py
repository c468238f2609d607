"""THINGS-EEG2 as recordings: 10 people, 16,740 pictures of 1,854 objects, repeated.

    python data/things_eeg2/prepare.py root=PATH                    # continuous
    python data/things_eeg2/prepare.py root=PATH kind=preprocessed  # epochs cut by others

Gifford et al. 2022, osf.io/3jk45. PATH has image_metadata.npy and, if continuous,
sub-01/ses-01/raw_eeg_training.npy, ..., or else sub-01/preprocessed_eeg_training.npy, ... (the
authors' epochs, or NICE's). Each file is read as a whole; the largest take 8 GB.

Epochs that others cut and whitened become a recording of one epoch after the other: its meta.yaml
has epoch_tmin (s) and epoch_samples, and no window may leave its epoch. Their noise normalisation
is the authors' and may have seen the test trials' session.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import mne
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, file_hash, folder_of, options_of, read_pickle
from data import raw as reader
from data.bids_eeg import prepare as bids
from data.recording import channel_positions, write_recording
from data.things_eeg1.prepare import read_concepts, stretches, with_concepts

TARGET = 99999  # the code of a catch trial


@dataclass
class Config:
    root: str = ""  # the folder with sub-01, sub-02, ... (raw: osf.io/crxs4; epochs: osf.io/anp5v)
    kind: Literal["raw", "preprocessed"] = "raw"  # continuous, or epochs cut by others
    out_dir: str = ""  # "": raw or preprocessed in this folder
    subjects: list[str] = field(default_factory=list)  # 01,02 and so on; none: all in root
    metadata: str = ""  # image_metadata.npy (osf.io/y63gw); "": in root
    concepts: str = ""  # THINGS' concept table (tab-separated); "": words from the object names
    # ---- signal (preprocessed epochs use only montage): see data/bids_eeg
    l_freq: float = 0.1  # Hz, high-pass; 0: none
    h_freq: float = 40.0  # Hz, low-pass; 0: none
    notch: list[float] = field(default_factory=list)  # Hz
    reference: str = "average"  # average, channel names, or none
    sfreq: float = 100.0  # Hz after resampling; 0: as recorded (1000)
    montage: str = "colin27_1005"  # MNE montage with the channels' names
    bads: Literal["interpolate", "mark"] = "interpolate"  # flat channels and those with NaN
    overwrite: bool = False  # convert again what exists

    def check(self):
        bids.check_signal(self)
        if not self.root:
            folder = "the folder with sub-01, sub-02, ... of THINGS-EEG2"
            raise InputError(f"root= is missing: give {folder} (osf.io/3jk45, 8 GB a subject raw)")


def read_dict(path, *keys):
    """Return the dictionary with these keys in a .npy or a pickle. Raises InputError."""
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{path} is missing: fetch it from osf.io/3jk45 (and unpack it)")
    content = read_pickle(path)
    if isinstance(content, np.ndarray) and content.shape == ():
        content = content.item()
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} where a dictionary was expected")
    for key in keys:
        if key not in content:
            present = ", ".join(map(str, content))
            raise InputError(f"{path} lacks the key '{key}', it has {present}")
    return content


def as_numbers(session, key, path):
    """Return an entry of a session as an array of numbers. Raises InputError."""
    try:
        array = np.asarray(session[key])
    except ValueError:  # lists of different lengths
        array = np.array("")
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path}: {key} does not hold numbers: fetch the file again")
    return array


def eeg_info(names, sfreq, path):
    """Return MNE's info of EEG channels. Raises InputError for an impossible rate (Hz)."""
    if not 1 < sfreq < 1e6:
        raise InputError(f"{path}: a rate of {sfreq:g} Hz: sfreq must be in Hz, times in s")
    return mne.create_info(names.tolist(), sfreq, "eeg")


# ---- what was shown


def read_images(path):
    """Return {phase: table of object, word, synonyms, image, phase}; row i has the code i + 1."""
    phases = {}
    for phase in ("train", "test"):
        concepts = f"{phase}_img_concepts_THINGS"
        files = f"{phase}_img_files"
        lists = read_dict(path, concepts, files)
        if np.shape(lists[concepts]) != np.shape(lists[files]):
            raise InputError(f"{path}: {concepts} and {files} are not lists of one length")
        objects = pd.Series(lists[concepts], dtype=str).str.partition("_")[2]  # 00001_aardvark
        table = pd.DataFrame({"object": objects, "word": objects.map(bids.word_of)})
        table["image"] = list(map(str, lists[files]))
        phases[phase] = table.assign(synonyms="", phase=phase)
    return phases


def shown(codes, images, path):
    """Return events, without onsets, for codes from 1 of a phase's images (TARGET: catch trial)."""
    target = codes == TARGET
    wrong = codes[~target & ((codes < 1) | (codes > len(images)))]
    if wrong.size:
        cure = "do image_metadata.npy and this file belong together?"
        raise InputError(f"{path}: code {wrong[0]} is none of {len(images):,} pictures: {cure}")
    events = images.iloc[np.where(target, 1, codes) - 1].reset_index(drop=True)
    events["target"] = target.astype(int)
    events.loc[target, ["object", "word", "synonyms", "image"]] = ["catch", "", "", "catch"]
    return events


# ---- signal


def convert_continuous(folder, path, images, config, **meta):
    """Convert raw_eeg_training.npy or raw_eeg_test.npy of one session; returns the events."""
    session = read_dict(path, "raw_eeg_data", "ch_names", "ch_types", "sfreq")
    data = as_numbers(session, "raw_eeg_data", path)
    sfreq = float(as_numbers(session, "sfreq", path).item(0))
    names = np.array(session["ch_names"], dtype=str, ndmin=1)
    types = np.array(session["ch_types"], dtype=str, ndmin=1)
    eeg = np.flatnonzero(types == "eeg")
    stim = np.flatnonzero(types == "stim")
    if data.ndim != 2 or not len(data) == len(names) == len(types):
        sizes = f"{len(names)} channel names and {len(types)} types"
        raise InputError(f"{path}: raw_eeg_data of shape {data.shape} does not fit {sizes}")
    if len(stim) != 1 or not len(eeg):
        raise InputError(f"{path} has {len(stim)} stim channels and {len(eeg)} EEG channels")
    info = eeg_info(names[eeg], sfreq, path)
    codes = data[stim[0]].round().astype(np.int64)
    rows = np.flatnonzero((codes != 0) & (np.diff(codes, prepend=0) != 0))
    if not rows.size:
        raise InputError(f"{path} has no event in its stim channel: leave it out with subjects=")
    events = shown(codes[rows], images, path)
    events = events.assign(onset=rows / sfreq, duration=0.1, block=stretches(rows / sfreq))
    raw = mne.io.RawArray(data[eeg].astype(float), info, verbose="error")
    del data, session  # gigabytes
    return bids.convert_raw(folder, raw, events, config, path, {"sensors": "eeg"}, **meta)


def convert_epochs(folder, path, images, config, **meta):
    """Convert preprocessed_eeg_training.npy or _test.npy, epoch by epoch; returns the events."""
    session = read_dict(path, "preprocessed_eeg_data", "ch_names", "times")
    data = as_numbers(session, "preprocessed_eeg_data", path)
    names = np.array(session["ch_names"], dtype=str, ndmin=1)
    times = as_numbers(session, "times", path).reshape(-1)
    expected = (len(images), len(names))
    if data.ndim != 4 or data.shape[::2] != expected or len(times) < data.shape[3]:
        wanted = f"({len(images):,} pictures, repeats, {len(names)} channels, {len(times)} times)"
        raise InputError(f"{path}: preprocessed_eeg_data of shape {data.shape} is not {wanted}")
    for number, picture in enumerate(data):  # one at a time: the file is large
        if not np.isfinite(picture).all():
            raise InputError(f"{path}: picture {number} has NaN: leave the file out (subjects=)")
    n, repeats, _, length = data.shape
    times = times[-length:]  # NICE's files keep the times of samples that were cut off
    sfreq = float(np.round((length - 1) / (times[-1] - times[0]), 6))
    info = eeg_info(names, sfreq, path)
    tmin = round(float(times[0]) * sfreq) / sfreq
    events = shown(np.repeat(np.arange(n), repeats) + 1, images, path)
    onset = np.arange(n * repeats) * length / sfreq - tmin
    events = events.assign(onset=onset, duration=0.1, block="")
    raw = mne.io.RawArray(np.zeros((len(names), 1)), info, verbose="error")  # for the positions
    reader.find_places(raw, config.montage, folder.name, {})
    channels = pd.DataFrame({"name": raw.ch_names})
    channels[["x", "y", "z"]] = channel_positions(raw)
    meta |= {"epoch_tmin": tmin, "epoch_samples": length}
    blocks = (np.asarray(picture).transpose(0, 2, 1).reshape(-1, len(names)) for picture in data)
    write_recording(folder, blocks, channels, events, sfreq=sfreq, unit="a.u.", **meta)
    print(f"{folder.name}: {n * repeats:,} epochs, {len(names)} channels", flush=True)
    return events


# ---- a whole dataset


def find_files(config):
    """Return [(subject, path)] of the training and test files of config.subjects."""
    pattern = "ses-*/raw_eeg_*.npy" if config.kind == "raw" else "preprocessed_eeg_*.npy"
    files = []
    for subject in reader.find_subjects(config.root, config.subjects):
        folder = Path(config.root, f"sub-{subject}")
        paths = sorted(folder.glob(pattern))
        paths = [path for path in paths if path.stem.endswith(("_training", "_test"))]
        if not paths:
            cure = "fetch it, leave the subject out with subjects=, or give another kind="
            raise InputError(f"{folder} has no {pattern}: {cure}")
        files += [(subject, path) for path in paths]
    return files


def main(config):
    folder = folder_of(config, __file__, config.kind)
    files = find_files(config)
    images = read_images(config.metadata or Path(config.root) / "image_metadata.npy")
    options = options_of(config, "root", "subjects", "metadata")
    if config.concepts:
        concepts = read_concepts(config.concepts)
        options["concepts"] = file_hash(config.concepts)  # it may be edited
        images = {phase: with_concepts(table, concepts) for phase, table in images.items()}
    convert = convert_continuous if config.kind == "raw" else convert_epochs
    meta = {"source": f"THINGS-EEG2, osf.io/3jk45, {config.kind} (Gifford et al. 2022)"}
    meta["synthetic"] = False
    (folder / "meta.yaml").unlink(missing_ok=True)
    events = {}
    for subject, path in files:
        phase = "train" if path.stem.endswith("training") else "test"
        session = f"{path.parent.name}_" if config.kind == "raw" else ""
        name = f"sub-{subject}_{session}{phase}"
        options["bytes"] = path.stat().st_size  # root may be another one
        recording = reader.converted(folder / name, options, config.overwrite)
        if recording:
            events[name] = recording.events
            continue
        one = {"subject": subject, "options": options, **meta}
        events[name] = convert(folder / name, path, images[phase], config, **one)
    bids.finish(folder, events, **meta)


if __name__ == "__main__":
    main(configure(Config))
