"""THINGS-EEG2 as recordings: 10 people, 16,740 pictures of 1,854 objects, repeated.

    python data/things_eeg2/prepare.py root=PATH                    # continuous
    python data/things_eeg2/prepare.py root=PATH kind=preprocessed  # cut into epochs by others

Gifford et al. 2022, osf.io/3jk45. In PATH are image_metadata.npy and, continuous,
sub-01/ses-01/raw_eeg_training.npy, ..., or sub-01/preprocessed_eeg_training.npy, ... (the authors'
epochs, or NICE's).

The files are pickles in .npy's clothes, which could run anything: the reader here knows arrays,
dicts, lists, strings and numbers, refuses the rest, and maps large arrays instead of loading them.
Epochs that others cut and whitened are written as a recording of one epoch after the other: its
meta.yaml says epoch_tmin (s) and epoch_samples, and no window may leave its epoch. There, the noise
normalisation was the authors' and is not known to have spared the test trials' session.
"""

import codecs
import os
import pickle
import re
import struct
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import mne
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, check_content
from data import raw as reader
from data.bids_eeg import prepare as bids
from data.recording import write_recording
from data.things_eeg1.prepare import read_concepts, stretches, with_concepts

HERE = Path(__file__).resolve().parent
TARGET = 99999  # the code of a catch trial
LARGE = 1 << 20  # bytes from which an array is mapped


@dataclass
class Config:
    root: str = ""  # the folder with sub-01, sub-02, ... (raw: osf.io/crxs4; epochs: osf.io/anp5v)
    kind: Literal["raw", "preprocessed"] = "raw"  # continuous, or cut into epochs by others
    out_dir: str = ""  # "": raw or preprocessed in this folder
    subjects: list[str] = field(default_factory=list)  # 01,02 and so on; none: all that root has
    metadata: str = ""  # image_metadata.npy (osf.io/y63gw); "": in root
    concepts: str = ""  # THINGS' concept table (tab-separated); "": words from the object names
    # ---- signal (montage alone for preprocessed epochs): as data/bids_eeg
    l_freq: float = 0.1  # Hz, high-pass; 0: none
    h_freq: float = 40.0  # Hz, low-pass; 0: none
    notch: list[float] = field(default_factory=list)  # Hz
    reference: str = "average"  # average, channel names, or none
    sfreq: float = 100.0  # Hz after resampling; 0: as recorded (1000)
    montage: str = "colin27_1005"  # MNE montage with the channels' names
    bads: Literal["interpolate", "mark", "drop"] = "interpolate"  # flat channels, those with NaN
    overwrite: bool = False  # convert again what is there

    def check(self):
        bids.check_signal(self)
        self.subjects = [s.removeprefix("sub-").zfill(2) for s in self.subjects]


# ---- pickles without their teeth


class _Array:
    """What a pickled array becomes while it is read: numpy's own would want its bytes in memory."""

    value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if dtype.hasobject:
            if not isinstance(data, list) or len(data) != int(np.prod(shape)):
                raise pickle.UnpicklingError("an array of objects without its objects")
            self.value = data if shape else data[0]
            return
        if isinstance(data, str):  # of Python 2
            data = data.encode("latin1")
        if isinstance(data, bytes):
            data = np.frombuffer(data, np.uint8)
        self.value = data.view(dtype).reshape(shape, order="F" if fortran else "C")


def _new_array(*_):
    return _Array()


def _from_buffer(data, dtype, shape, order):
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _scalar(dtype, data):
    return np.frombuffer(data, dtype)[0].item()


KNOWN = {  # all that a file may name; none of it does more than make plain values
    "numpy.ndarray": _Array,
    "numpy.dtype": np.dtype,
    "_codecs.encode": codecs.encode,  # protocol 2 writes bytes as text
    "multiarray._reconstruct": _new_array,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,  # protocol 5
}


class _Unpickler(pickle._Unpickler):  # the one in Python: C's insists on bytes in memory
    """Reads arrays, dicts, lists, tuples, strings and numbers."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        known = re.sub(r"^numpy\.(_core|core)\.", "", f"{module}.{name}")
        if known not in KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return KNOWN[known]

    def load_build(self):
        if not isinstance(self.stack[-2], (_Array, np.dtype)):
            raise pickle.UnpicklingError(f"it sets the state of a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.load_binbytes8


class _MappedFile:
    """An open file whose large reads are memory maps."""

    def __init__(self, file):
        self.file = file
        self.readline = file.readline

    def read(self, size):
        if size < LARGE:
            return self.file.read(size)
        start = self.file.tell()
        if start + size > os.path.getsize(self.file.name):
            raise EOFError
        self.file.seek(start + size)
        return np.memmap(self.file.name, np.uint8, "r", offset=start, shape=(size,))


def read_dict(path, *keys):
    """A dict out of a .npy that numpy would unpickle, or a plain pickle; large arrays are memmaps.

    Raises InputError for a file that is torn, holds anything but plain data, or lacks a key.
    """
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{path} is not there: fetch it from osf.io/3jk45 (and unpack it)")
    with open(check_content(path), "rb") as file:
        try:
            _skip_header(file)
            found = _plain(_Unpickler(_MappedFile(file), encoding="latin1").load())
        except (EOFError, struct.error) as error:
            reason = type(error).__name__
            raise InputError(
                f"{path} ends too early ({reason}): it is torn, fetch it again"
            ) from None
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{path} is refused: {error}, where only arrays, dictionaries, lists, strings and "
                "numbers are read"
            ) from None
        except Exception as error:  # a pickle may go wrong in any way it likes
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is no pickle of plain data ({reason})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__} where a dictionary was expected")
    for key in keys:
        if key not in found:
            raise InputError(f"{path} lacks the key '{key}', it has {', '.join(map(str, found))}")
    return found


def _skip_header(file):
    """Go to the pickle in a .npy of objects, or to the beginning of a plain pickle."""
    magic = file.read(6)
    file.seek(0)
    if magic == b"\x93NUMPY":
        read_header = np.lib.format.read_array_header_2_0
        if np.lib.format.read_magic(file) == (1, 0):
            read_header = np.lib.format.read_array_header_1_0
        shape, _, dtype = read_header(file)
        if not dtype.hasobject:
            raise pickle.UnpicklingError(f"it is an array of {dtype} {shape}")


def _plain(thing):
    """What was read with arrays for their placeholders."""
    if isinstance(thing, _Array):
        return _plain(thing.value) if isinstance(thing.value, (list, dict)) else thing.value
    if isinstance(thing, dict):
        return {_plain(key): _plain(value) for key, value in thing.items()}
    if type(thing) in (list, tuple):
        return type(thing)(_plain(item) for item in thing)
    return thing


# ---- what was shown


def read_images(path):
    """{phase: table of object, word, synonyms, image, phase}, a row a picture, by its code."""
    found, phases = read_dict(path), {}
    for phase in ("train", "test"):
        concepts, files = f"{phase}_img_concepts_THINGS", f"{phase}_img_files"
        for key in (concepts, files):
            if key not in found:
                raise InputError(f"{path} lacks the key '{key}': is it THINGS-EEG2's?")
        objects = pd.Series(found[concepts], dtype=str).str.partition("_")[2]  # 00001_aardvark
        table = pd.DataFrame({"object": objects, "word": objects.map(bids.word_of)})
        phases[phase] = table.assign(synonyms="", image=[str(f) for f in found[files]], phase=phase)
    return phases


def shown(codes, images, path):
    """Events, without onsets, of a phase's `images` for codes from 1 (TARGET: a catch trial)."""
    codes = np.asarray(codes, dtype=np.int64)
    target = codes == TARGET
    wrong = codes[~target & ((codes < 1) | (codes > len(images)))]
    if wrong.size:
        raise InputError(
            f"{path}: the code {wrong[0]} is none of the {len(images):,} pictures: do "
            "image_metadata.npy and this file belong together?"
        )
    events = images.iloc[np.where(target, 1, codes) - 1].reset_index(drop=True)
    events["target"] = target.astype(int)
    events.loc[target, ["object", "word", "synonyms", "image"]] = ["catch", "", "", "catch"]
    return events


# ---- signal


def convert_continuous(folder, path, images, config, **meta):
    """raw_eeg_training.npy or raw_eeg_test.npy of one session → recording; returns its events."""
    found = read_dict(path, "raw_eeg_data", "ch_names", "ch_types", "sfreq")
    data, sfreq = found["raw_eeg_data"], float(found["sfreq"])
    names, types = np.array(found["ch_names"], dtype=str), np.array(found["ch_types"], dtype=str)
    if np.ndim(data) != 2 or not len(data) == len(names) == len(types):
        raise InputError(
            f"{path}: raw_eeg_data of shape {np.shape(data)} does not fit {len(names)} channel "
            f"names and {len(types)} types"
        )
    eeg, stim = np.flatnonzero(types == "eeg"), np.flatnonzero(types == "stim")
    if len(stim) != 1 or not len(eeg):
        raise InputError(
            f"{path} has {len(stim)} stim channels and {len(eeg)} EEG channels where 1 and many "
            "were expected"
        )
    codes = np.asarray(data[stim[0]]).round().astype(np.int64)
    rows = np.flatnonzero((codes != 0) & (np.diff(codes, prepend=0) != 0))
    if not rows.size:
        raise InputError(
            f"{path} has no event in its stim channel: leave this subject out with subjects="
        )
    onset = rows / sfreq
    events = shown(codes[rows], images, path)
    events = events.assign(onset=onset, duration=0.1, block=stretches(onset))
    info = mne.create_info(names[eeg].tolist(), sfreq, "eeg")
    raw = mne.io.RawArray(np.asarray(data[eeg], dtype=float), info, verbose="error")
    del data, found
    return bids.convert_raw(folder, raw, events, config, path, {"sensors": "eeg"}, **meta)


def convert_epochs(folder, path, images, config, **meta):
    """preprocessed_eeg_training.npy or _test.npy → recording of epoch after epoch; its events.

    Repeats of a picture stand together.
    """
    found = read_dict(path, "preprocessed_eeg_data", "ch_names", "times")
    data, names = found["preprocessed_eeg_data"], np.array(found["ch_names"], dtype=str)
    times = np.asarray(found["times"], dtype=float)
    if np.ndim(data) != 4 or data.shape[2] != len(names):
        raise InputError(
            f"{path}: preprocessed_eeg_data of shape {np.shape(data)} is not (pictures, repeats, "
            f"{len(names)} channels, time)"
        )
    n, repeats, _, length = data.shape
    if len(images) != n:
        raise InputError(
            f"{path} has {n:,} pictures where image_metadata.npy has {len(images):,}: the two do "
            "not belong together"
        )
    if len(times) < length:
        raise InputError(f"{path} has {length} samples an epoch and only {len(times)} times")
    if not np.isfinite(data[0]).all():
        raise InputError(f"{path} holds NaN")
    times = times[-length:]  # NICE's files keep the times of samples that were cut off
    sfreq = float(np.round((length - 1) / (times[-1] - times[0]), 6))
    tmin = round(float(times[0]) * sfreq) / sfreq
    events = shown(np.repeat(np.arange(n), repeats) + 1, images, path)
    onset = np.arange(n * repeats) * length / sfreq - tmin
    events = events.assign(onset=onset, duration=0.1, block="")
    channels = pd.DataFrame({"name": names})
    channels[["x", "y", "z"]] = montage_places(names, config.montage, path)
    meta |= {"epoch_tmin": tmin, "epoch_samples": length, "epochs": n * repeats}
    blocks = (np.asarray(picture).transpose(0, 2, 1).reshape(-1, len(names)) for picture in data)
    write_recording(folder, blocks, channels, events, sfreq=sfreq, unit="a.u.", **meta)
    print(
        f"{folder.name}: {len(events):,} epochs of {tmin:g} to {tmin + length / sfreq:g} s, "
        f"{len(names)} channels",
        flush=True,
    )
    return events


def montage_places(names, montage, path):
    """(C, 3) places (m) that a montage of MNE has for names, NaN where it knows none."""
    known = {}
    if montage not in ("", "none"):
        known = mne.channels.make_standard_montage(montage).get_positions()["ch_pos"]
    places = np.full((len(names), 3), np.nan)
    matched = reader.match_names(names, known)
    for i, name in enumerate(names):
        if name in matched:
            places[i] = known[matched[name]]
    if not matched:
        raise InputError(
            f"{path}: no channel has a position ({', '.join(names[:5])}, ...): give montage= with "
            "these names"
        )
    return places


# ---- a whole dataset


def subject_folders(config):
    """{subject: folder} of the subjects that are asked for."""
    root, folders = Path(config.root), {}
    for path in sorted(root.glob("sub-*")):
        folders[path.name.removeprefix("sub-")] = path
    if not config.root or not folders:
        raise InputError(
            f"root={config.root or '...'} must be the folder with sub-01, sub-02, ... of "
            "THINGS-EEG2 (osf.io/3jk45, 8 GB a subject raw)"
        )
    for subject in config.subjects:
        if subject not in folders:
            raise InputError(f"{root} has no sub-{subject}; there are {', '.join(folders)}")
    return {subject: folders[subject] for subject in config.subjects or folders}


def find_files(config):
    """[(subject, path)] of the training and test files."""
    pattern = "ses-*/raw_eeg_*.npy" if config.kind == "raw" else "preprocessed_eeg_*.npy"
    files = []
    for subject, folder in subject_folders(config).items():
        paths = [*folder.glob(pattern)]
        paths = sorted(p for p in paths if p.stem.endswith(("_training", "_test")))
        if not paths:
            raise InputError(
                f"{folder} has no {pattern}: fetch it, leave the subject out with subjects=, or "
                "give another kind="
            )
        files += [(subject, path) for path in paths]
    return files


def main(config):
    folder = Path(config.out_dir or Path(os.path.relpath(HERE)) / config.kind)
    files = find_files(config)
    images = read_images(config.metadata or Path(config.root) / "image_metadata.npy")
    if config.concepts:
        concepts = read_concepts(config.concepts)
        images = {phase: with_concepts(table, concepts) for phase, table in images.items()}
    convert = convert_continuous if config.kind == "raw" else convert_epochs
    here = ("root", "out_dir", "subjects", "metadata", "overwrite")
    options = {key: value for key, value in asdict(config).items() if key not in here}
    source = f"THINGS-EEG2, osf.io/3jk45, {config.kind} (Gifford et al. 2022)"
    meta = {"source": source, "synthetic": False}
    (folder / "meta.yaml").unlink(missing_ok=True)
    events, epochs = {}, {}
    for subject, path in files:
        phase = "train" if path.stem.endswith("training") else "test"
        session = f"{path.parent.name}_" if config.kind == "raw" else ""
        name = f"sub-{subject}_{session}{phase}"
        options["bytes"] = path.stat().st_size  # of another root, maybe
        old = bids.there_already(folder / name, options, config.overwrite)
        if old:
            print(f"{name}: there already", flush=True)
            events[name] = old.events
            continue
        one = {"subject": subject, "options": options, **meta}
        events[name] = convert(folder / name, path, images[phase], config, **one)
    if config.kind == "preprocessed":
        one = bids.read_meta(folder / next(iter(events)))
        epochs = {key: one[key] for key in ("epoch_tmin", "epoch_samples")}
    bids.finish(folder, events, config, **meta, **epochs)


if __name__ == "__main__":
    main(configure(Config))
