"""THINGS-EEG2: 10 people, 16,740 pictures of 1,854 objects, repeated (Gifford et al. 2022, osf.io/3jk45), as recordings.

    python data/things_eeg2/prepare.py root=PATH                       # PATH/sub-01/ses-01/raw_eeg_training.npy, ..., PATH/image_metadata.npy
    python data/things_eeg2/prepare.py root=PATH kind=preprocessed     # PATH/sub-01/preprocessed_eeg_training.npy, ... (the authors' or NICE's epochs)

The files are pickles in .npy's clothes, which could run anything: they are read here by a reader that knows arrays, dicts, lists, strings and numbers and
refuses the rest, and that maps large arrays instead of loading them. Epochs that were cut and whitened before are written as a recording of one epoch
after the other: its meta.yaml says epoch_tmin (s) and epoch_samples, and no window may leave its epoch. There, the noise normalisation was the
authors' and is not known to have spared the test trials' session.
"""
import io, os, pickle, struct, sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import mne
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.bids_eeg import prepare as bids
from data.recording import read_meta, write_recording
from data.things_eeg1.prepare import read_concepts, stretches, with_concepts

HERE = Path(__file__).resolve().parent
TARGET = 99999  # the code of a catch trial
LARGE = 1 << 20  # bytes from which an array is mapped


@dataclass
class Config:
    root: str = ""                    # the folder with sub-01, sub-02, ... from OSF (raw: crxs4; epochs: anp5v; image_metadata.npy: y63gw)
    kind: Literal["raw", "preprocessed"] = "raw"  # continuous, or cut into epochs by others
    out_dir: str = ""                 # "": raw or preprocessed in this folder
    subjects: list[str] = field(default_factory=list)  # 01,02 and so on; none: all that root has
    metadata: str = ""                # image_metadata.npy; "": in root
    concepts: str = ""                # THINGS' concept table (tab-separated: uniqueID, Word, WordNet Synonyms, ...); "": words from the object names
    # ---- signal (montage alone for preprocessed epochs): as data/bids_eeg
    l_freq: float = 0.1               # Hz, high-pass; 0: none
    h_freq: float = 40.0              # Hz, low-pass; 0: none
    notch: list[float] = field(default_factory=list)  # Hz
    reference: str = "average"        # average, channel names, or none
    sfreq: float = 100.0              # Hz after resampling; 0: as recorded (1000)
    montage: str = "colin27_1005"     # MNE montage with the channels' names
    bads: Literal["interpolate", "mark", "drop"] = "interpolate"  # flat channels and those with NaN
    overwrite: bool = False           # convert again what is there

    def check(self):
        bids.check_signal(self)
        self.subjects = [s.removeprefix("sub-").zfill(2) for s in self.subjects]


# ---- pickles without their teeth

class _Array:
    """What a pickled array becomes while the pickle is read: numpy's own would want the bytes in memory."""
    array = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if dtype.dtype.hasobject:
            if not isinstance(data, list) or len(data) != int(np.prod(shape)):
                raise pickle.UnpicklingError("an array of objects without its objects")
            self.items, self.shape = data, shape
            return
        if isinstance(data, str):  # of Python 2
            data = data.encode("latin1")
        flat = np.frombuffer(data, dtype.dtype) if isinstance(data, bytes) else data.view(dtype.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")

    @classmethod
    def of_buffer(cls, data, dtype, shape, order):
        """Protocol 5's way."""
        made = cls()
        made.__setstate__((1, shape, dtype, order == "F", data))
        return made


class _Type:
    """A dtype: numbers, strings and objects, no structures."""
    def __init__(self, name, *_):
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufcSUO":
            raise pickle.UnpicklingError(f"it has an array of type {name!r}")

    def __setstate__(self, state):
        if state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Unpickler(pickle._Unpickler):
    """Reads arrays, dicts, lists, tuples, strings and numbers. Nothing that a pickle names is imported; these names stand for functions of our own."""
    dispatch = dict(pickle._Unpickler.dispatch)
    KNOWN = {"multiarray._reconstruct": lambda *_: _Array(), "ndarray": _Array, "dtype": _Type, "numeric._frombuffer": _Array.of_buffer,
             "multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.dtype)[0].item()}

    def __init__(self, file):
        super().__init__(file, encoding="latin1")
        self.source = file

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):  # protocol 2 writes bytes as text
            return lambda text, code: text.encode({"latin1": "latin1"}[code])
        for place in ("numpy._core.", "numpy.core.", "numpy."):
            if f"{module}.{name}".startswith(place) and f"{module}.{name}".removeprefix(place) in self.KNOWN:
                return self.KNOWN[f"{module}.{name}".removeprefix(place)]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def load_build(self):
        if type(self.stack[-2]) not in (_Array, _Type):
            raise pickle.UnpicklingError(f"it sets the state of a {type(self.stack[-2]).__name__}")
        super().load_build()
    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to something outside of itself")

    def get_extension(self, code):
        raise pickle.UnpicklingError("it uses a copyreg extension")

    def _bytes(self, size):
        """The next bytes of the pickle: mapped where they are many and stand in the file as they are."""
        frame = getattr(self._unframer, "current_frame", None)
        if size < LARGE or (frame is not None and frame.tell() < len(frame.getbuffer())):
            return self.read(size)
        start = self.source.tell()
        if start + size > os.fstat(self.source.fileno()).st_size:
            raise EOFError
        self.source.seek(start + size)
        return np.memmap(self.source.name, np.uint8, "r", offset=start, shape=(size,))

    def load_binbytes(self):
        self.append(self._bytes(struct.unpack("<I", self.read(4))[0]))

    def load_binbytes8(self):
        self.append(self._bytes(struct.unpack("<Q", self.read(8))[0]))
    dispatch[pickle.BINBYTES[0]], dispatch[pickle.BINBYTES8[0]], dispatch[pickle.BYTEARRAY8[0]] = load_binbytes, load_binbytes8, load_binbytes8


def read_dict(path, *keys):
    """A dict out of a .npy that numpy would unpickle, or out of a plain pickle; large arrays are memmaps. Raises FileNotFoundError, and ValueError for a
    file that is torn, holds anything but plain data, or lacks one of `keys`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: fetch it from osf.io/3jk45 (and unpack it)")
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            try:
                version = np.lib.format.read_magic(io.BytesIO(b"\x93NUMPY" + file.read(2)))
                shape, _, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
            except ValueError as e:
                raise ValueError(f"{path} has a damaged header ({e}): fetch it again") from None
            if not dtype.hasobject:
                raise ValueError(f"{path} is an array of {dtype} {shape} where a dictionary was expected")
        else:
            file.seek(0)
        try:
            found = _plain(_Unpickler(file).load())
        except (EOFError, struct.error) as e:
            raise ValueError(f"{path} ends too early ({type(e).__name__}): it is torn, fetch it again") from None
        except pickle.UnpicklingError as e:
            raise ValueError(f"{path} is refused: {e}, where only arrays, dictionaries, lists, strings and numbers are read") from None
        except Exception as e:  # a pickle may go wrong in any way it likes
            raise ValueError(f"{path} is no pickle of plain data ({type(e).__name__}: {e})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} where a dictionary was expected")
    if missing := [k for k in keys if k not in found]:
        raise ValueError(f"{path} lacks the key '{missing[0]}', it has {', '.join(map(str, found))}")
    return found


def _plain(thing):
    """Placeholders replaced by what they stand for; an array of one object is that object, an array of objects a list."""
    if isinstance(thing, _Array):
        if thing.array is not None:
            return thing.array
        items = [_plain(i) for i in thing.items]
        return items[0] if thing.shape == () else items
    if isinstance(thing, dict):
        return {_plain(k): _plain(v) for k, v in thing.items()}
    return type(thing)(_plain(i) for i in thing) if type(thing) in (list, tuple) else thing


# ---- what was shown

def read_images(path):
    """{phase: DataFrame with object, word, synonyms, image} of image_metadata.npy, one row a picture in the order of the codes."""
    found = read_dict(path, *(f"{p}_img_{what}" for p in ("train", "test") for what in ("concepts_THINGS", "files")))
    phases = {}
    for phase in ("train", "test"):
        objects = [str(c).partition("_")[2] for c in found[f"{phase}_img_concepts_THINGS"]]  # 00001_aardvark
        phases[phase] = pd.DataFrame({"object": objects, "word": [bids.word_of(o) for o in objects], "synonyms": "",
                                      "image": [str(f) for f in found[f"{phase}_img_files"]], "phase": phase})
    return phases


def shown(codes, images, path):
    """Rows of a phase's `images` for picture codes from 1 (TARGET: a catch trial). Raises ValueError for a code that no picture has."""
    codes = np.asarray(codes, dtype=np.int64)
    target = codes == TARGET
    if (wrong := codes[~target & ((codes < 1) | (codes > len(images)))]).size:
        raise ValueError(f"{path}: the code {wrong[0]} is none of the {len(images):,} pictures: do image_metadata.npy and this file belong together?")
    events = images.iloc[np.where(target, 1, codes) - 1].reset_index(drop=True).assign(target=target.astype(int))
    events.loc[target, ["object", "word", "synonyms", "image"]] = ["catch", "", "", "catch"]
    return events


# ---- signal

def convert_continuous(folder, path, images, config, **meta):
    """raw_eeg_training.npy or raw_eeg_test.npy of one session → recording. Returns its events."""
    found = read_dict(path, "raw_eeg_data", "ch_names", "ch_types", "sfreq")
    data, names, types = found["raw_eeg_data"], [str(n) for n in found["ch_names"]], [str(t) for t in found["ch_types"]]
    if np.ndim(data) != 2 or not len(data) == len(names) == len(types):
        raise ValueError(f"{path}: raw_eeg_data of shape {np.shape(data)} does not fit {len(names)} channel names and {len(types)} types")
    if types.count("stim") != 1 or "eeg" not in types:
        raise ValueError(f"{path} has {types.count('stim')} stim channels and {types.count('eeg')} EEG channels where 1 and many were expected")
    codes = np.asarray(data[types.index("stim")]).round().astype(np.int64)
    at = np.flatnonzero((codes != 0) & (np.diff(codes, prepend=0) != 0))
    if not at.size:
        raise ValueError(f"{path} has no event in its stim channel: leave this subject out with subjects=")
    eeg, sfreq = [i for i, t in enumerate(types) if t == "eeg"], float(found["sfreq"])
    events = shown(codes[at], images, path).assign(onset=at / sfreq, duration=0.1, block=stretches(at / sfreq))
    raw = mne.io.RawArray(np.asarray(data[eeg], dtype=float), mne.create_info([names[i] for i in eeg], sfreq, "eeg"), verbose="error")
    del data, found
    return bids.convert_raw(folder, raw, *bids.usable(events, path), config, **meta)


def convert_epochs(folder, path, images, config, **meta):
    """preprocessed_eeg_training.npy or _test.npy → recording of one epoch after the other, repeats of a picture together. Returns its events."""
    found = read_dict(path, "preprocessed_eeg_data", "ch_names", "times")
    data, names, times = found["preprocessed_eeg_data"], [str(n) for n in found["ch_names"]], np.asarray(found["times"], dtype=float)
    if np.ndim(data) != 4 or data.shape[2] != len(names):
        raise ValueError(f"{path}: preprocessed_eeg_data of shape {np.shape(data)} is not (pictures, repeats, {len(names)} channels, time)")
    n, repeats, _, length = data.shape
    if len(images) != n:
        raise ValueError(f"{path} has {n:,} pictures where image_metadata.npy has {len(images):,}: the two do not belong together")
    if len(times) < length:
        raise ValueError(f"{path} has {length} samples an epoch and only {len(times)} times")
    times = times[len(times) - length:]  # NICE's files keep the times of the samples before 0 that they cut off
    sfreq = float(np.round((length - 1) / (times[-1] - times[0]), 6))
    tmin = round(float(times[0]) * sfreq) / sfreq
    rows = np.arange(n * repeats) * length
    events = shown(np.repeat(np.arange(n), repeats) + 1, images, path).assign(onset=rows / sfreq - tmin, duration=0.1, block="")
    place = mne.channels.make_standard_montage(config.montage).get_positions()["ch_pos"] if config.montage not in ("", "none") else {}
    xyz = np.array([{k.lower(): v for k, v in place.items()}.get(name.lower(), np.full(3, np.nan)) for name in names])
    if not np.isfinite(xyz).any():
        raise ValueError(f"{path}: no channel has a position ({', '.join(names[:5])}, ...): give a montage= with these names")
    if not np.isfinite(data[0]).all():
        raise ValueError(f"{path} holds NaN")
    channels = pd.DataFrame({"name": names, "x": xyz[:, 0], "y": xyz[:, 1], "z": xyz[:, 2]})
    blocks = (np.asarray(picture).transpose(0, 2, 1).reshape(-1, len(names)) for picture in data)  # (repeats·T, C), whatever the file's size
    write_recording(folder, blocks, channels, events, sfreq=sfreq, unit="a.u.", epoch_tmin=tmin, epoch_samples=length, epochs=n * repeats,
                    dropped={"samples outside the epochs": 0}, **meta)
    print(f"{folder.name}: {len(events):,} epochs of {tmin:g} to {tmin + length / sfreq:g} s, {len(names)} channels", flush=True)
    return events


def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(HERE)) / config.kind
    root = Path(config.root)
    there = {p.name.removeprefix("sub-"): p for p in sorted(root.glob("sub-*")) if p.is_dir()}
    if not config.root or not there:
        raise FileNotFoundError(f"root={config.root or '...'} must be the folder with sub-01, sub-02, ... of THINGS-EEG2 (osf.io/3jk45, 8 GB a subject raw)")
    if missing := [s for s in config.subjects if s not in there]:
        raise FileNotFoundError(f"{root} has no sub-{missing[0]}; there are {', '.join(there)}")
    images = read_images(config.metadata or root / "image_metadata.npy")
    if config.concepts:
        concepts = read_concepts(config.concepts)
        images = {phase: with_concepts(table, concepts) for phase, table in images.items()}
    pattern, convert = ("ses-*/raw_eeg_*.npy", convert_continuous) if config.kind == "raw" else ("preprocessed_eeg_*.npy", convert_epochs)
    options = {k: v for k, v in asdict(config).items() if k not in ("root", "out_dir", "subjects", "metadata", "overwrite")}
    source = f"THINGS-EEG2, osf.io/3jk45, {config.kind} (Gifford et al. 2022)"
    names, events = [], []
    for subject in config.subjects or there:
        files = [p for p in sorted(there[subject].glob(pattern)) if p.stem.split("_")[-1] in ("training", "test")]
        if not files:
            raise FileNotFoundError(f"{there[subject]} has no {pattern}: fetch it, leave the subject out with subjects=, or give another kind=")
        (folder / "meta.yaml").unlink(missing_ok=True)
        for path in files:
            phase = path.stem.split("_")[-1].replace("training", "train")
            names.append("_".join([f"sub-{subject}", *[path.parent.name] * (config.kind == "raw"), phase]))
            options["bytes"] = path.stat().st_size  # of another root, maybe
            if old := bids.there_already(folder / names[-1], options, config.overwrite):
                print(f"{names[-1]}: there already", flush=True)
                events.append(old.events)
            else:
                events.append(convert(folder / names[-1], path, images[phase], config, subject=subject, source=source, synthetic=False, options=options))
    epochs = {k: read_meta(folder / names[0])[k] for k in ("epoch_tmin", "epoch_samples")} if config.kind == "preprocessed" else {}
    meta = bids.finish(folder, names, pd.concat(events), config, source=source, synthetic=False, **epochs)
    print(f"{folder}: {len(meta['recordings'])} recordings, {meta['objects']:,} objects, {meta['words']:,} words")


if __name__ == "__main__":
    main(configure(Config))
