"""Brains of every kind as plain files: a continuous signal, where its channels sit, and what happened when. Windows are cut by the scripts.

A dataset is a folder with one folder a recording:
    NAME/signal.f32     (T, C) float32, little-endian, time-major, no header: a memmap reads it
    NAME/channels.csv   one row a channel: name, type, x, y, z (m, empty where unknown), status (good or bad), whatever the maker adds
    NAME/events.csv     one row an event: onset (s, finite), duration (s), then what the task has (word, object, ...), in any order of time
    NAME/meta.yaml      format, samples, sfreq (Hz), unit, subject, first_sample, source, synthetic and whatever the maker adds
    meta.yaml           format, recordings (their names), synthetic and whatever the maker adds; written last: a folder that has it is complete

Onsets run on the recording's own clock, whose sample `first_sample` is row 0 of the signal: an event at `onset` seconds is at row
round(sfreq * onset) - first_sample, which may lie outside the signal (MNE's first_samp; a film goes on after the amplifier stopped).

`write_recording` (arrays) and `write_raw` (an MNE Raw) write one recording, `write_set` completes the dataset, `read_set` and `Recording` read.
`resampled`, `robust_scale`, `places`, `named_places` and `encoder_input` make of it what a pretrained NeuralEncoder takes (foundation.py says how).
"""
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from data import aside, load_meta, read_table, remedy, write_aside, write_yaml

FORMAT, SET_FORMAT = "recording-1", "recordings-1"
CHANNEL_COLUMNS = ["name", "type", "x", "y", "z", "status"]


# ---- writing

def write_recording(folder, signal, channels, events, *, sfreq, unit, subject, source, synthetic, first_sample=0, **meta):
    """Write one recording, streaming, and return its meta; an older meta.yaml goes first and the new one comes last.
    signal: (T, C) array, or an iterable of (t, C) blocks; channels: DataFrame with name and, where known, type, x, y, z (m), status;
    events: DataFrame with onset (s) and, where known, duration (s); sfreq: Hz; unit: 'V', 'a.u.'...; subject: its name;
    source: where it is from; meta: more keys, plain types. Raises ValueError, in a sentence, for anything that does not fit the format."""
    folder = Path(folder)
    channels, events = _checked_channels(channels, folder / "channels.csv"), _checked_events(events, folder / "events.csv")
    if not np.isfinite(sfreq) or sfreq <= 0:
        raise ValueError(f"{folder}: sfreq={sfreq} is no sampling rate in Hz")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").unlink(missing_ok=True)
    samples, digest = 0, hashlib.sha256()
    with aside(folder / "signal.f32") as file:
        for block in [signal] if hasattr(signal, "ndim") else signal:
            block = np.ascontiguousarray(block, dtype="<f4")  # (t, C)
            if block.ndim != 2 or block.shape[1] != len(channels):
                raise ValueError(f"{folder / 'signal.f32'}: a block of shape {block.shape} where (time, {len(channels)} channels) was expected")
            file.write(memoryview(block).cast("B"))
            digest.update(memoryview(block).cast("B"))
            samples += len(block)
    for name, table in (("channels.csv", channels), ("events.csv", events)):
        write_aside(folder / name, table.to_csv(index=False))
    meta = {"format": FORMAT, "samples": samples, "sfreq": float(sfreq), "unit": unit, "subject": str(subject), "first_sample": int(first_sample),
            "source": source, "synthetic": bool(synthetic), "sha256": digest.hexdigest(), **meta}
    write_yaml(folder / "meta.yaml", meta)
    return meta


def write_raw(folder, raw, events, *, subject, source, synthetic, picks="data", block_s=30.0, **meta):
    """Write an MNE Raw (read block by block, in V) as a recording: channel types, positions (m, from its montage or dig points) and bads
    come from its info, first_sample from raw.first_samp. picks: MNE channel picks; meta: more keys. Returns the meta."""
    raw = raw.copy().pick(picks, exclude=())
    xyz = np.array([ch["loc"][:3] for ch in raw.info["chs"]], dtype=float).reshape(-1, 3)
    xyz[~np.isfinite(xyz).all(1) | (xyz == 0).all(1)] = np.nan  # MNE's zeros mean unknown
    channels = pd.DataFrame({"name": raw.ch_names, "type": raw.get_channel_types(), "x": xyz[:, 0], "y": xyz[:, 1], "z": xyz[:, 2],
                             "status": ["bad" if name in raw.info["bads"] else "good" for name in raw.ch_names]})
    step = max(1, round(block_s * raw.info["sfreq"]))
    blocks = (raw.get_data(start=a, stop=min(a + step, raw.n_times)).T for a in range(0, raw.n_times, step))
    return write_recording(folder, blocks, channels, events, sfreq=raw.info["sfreq"], unit="V", subject=subject, first_sample=raw.first_samp,
                           source=source, synthetic=synthetic, **meta)


def write_set(folder, recordings, *, synthetic, **meta):
    """Complete a dataset: meta.yaml with the names of its recordings (all written) and more keys of plain types. Returns the meta."""
    for name in recordings:
        read_meta(Path(folder) / name)
    if not recordings:
        raise ValueError(f"{folder}: a dataset needs at least one recording")
    meta = {"format": SET_FORMAT, "recordings": list(recordings), "synthetic": bool(synthetic), **meta}
    write_yaml(Path(folder) / "meta.yaml", meta)
    return meta


# ---- reading

class Recording:
    """One recording, opened and checked.

    signal: (T, C) float32 memmap, read-only; channels, events: DataFrames; names: list of C channel names; xyz: (C, 3) in m, NaN where unknown;
    good: (C,) bool; sfreq (Hz), unit, subject, first_sample, synthetic; meta: the rest of meta.yaml; path: its folder.
    Raises FileNotFoundError or ValueError, in a sentence, when a file is missing, damaged, or not as long as meta.yaml says."""

    def __init__(self, path):
        self.path = Path(path)
        self.meta = read_meta(path)
        self.sfreq, self.unit, self.subject = float(self.meta["sfreq"]), self.meta["unit"], str(self.meta["subject"])
        self.first_sample, self.synthetic = int(self.meta["first_sample"]), bool(self.meta["synthetic"])
        self.channels = _checked_channels(_table(self.path / "channels.csv"), self.path / "channels.csv")
        self.events = _checked_events(_table(self.path / "events.csv"), self.path / "events.csv")
        self.names = self.channels["name"].tolist()
        self.xyz = self.channels[["x", "y", "z"]].to_numpy(float)
        self.good = (self.channels["status"] == "good").to_numpy()
        file, shape = self.path / "signal.f32", (int(self.meta["samples"]), len(self.names))
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing{remedy(path)}")
        if file.stat().st_size != 4 * shape[0] * shape[1] or 0 in shape:
            raise ValueError(f"{file} is {file.stat().st_size:,} bytes long where {shape[0]:,} samples of {shape[1]} channels take "
                             f"{4 * shape[0] * shape[1]:,}{remedy(path)}")
        self.signal = np.memmap(file, "<f4", mode="r", shape=shape)

    def rows(self, onset):
        """Row of the signal (int64, maybe outside it) for onsets in s."""
        return np.round(np.asarray(onset, dtype=float) * self.sfreq).astype(np.int64) - self.first_sample


def read_meta(folder):
    """meta.yaml of one recording as a dict. Raises FileNotFoundError when it is not there, ValueError when it is not one of ours."""
    return load_meta(folder, "recording", FORMAT, ("samples", "sfreq", "unit", "subject", "first_sample", "synthetic"))


def read_set(folder):
    """meta.yaml of a dataset as a dict, 'recordings' the names of its parts: Recording(folder / name) opens one."""
    return load_meta(folder, "recordings", SET_FORMAT, ("recordings", "synthetic"))


def complete(folder):
    """Whether the folder holds a whole dataset: every recording opens."""
    try:
        for name in read_set(folder)["recordings"]:
            Recording(Path(folder) / name)
    except (ValueError, OSError):
        return False
    return True


def _table(path):
    return read_table(path, na_values={c: [""] for c in ("x", "y", "z", "onset", "duration")})  # 'null' or 'NA' may be a word: only an empty cell is missing


def _checked_channels(table, path):
    table = pd.DataFrame(table).reset_index(drop=True)
    if "name" not in table or not len(table):
        raise ValueError(f"{path} needs a column 'name' and at least one channel")
    table["name"] = table["name"].astype(str)
    for column, default in (("type", "eeg"), ("x", np.nan), ("y", np.nan), ("z", np.nan), ("status", "good")):
        if column not in table:
            table[column] = default
    twice = table["name"][table["name"].duplicated()]
    if len(twice):
        raise ValueError(f"{path}: the channel name {twice.iloc[0]!r} stands there twice")
    if not set(table["status"]) <= {"good", "bad"}:
        raise ValueError(f"{path}: status is good or bad, not {sorted(set(table['status']) - {'good', 'bad'})[0]!r}")
    try:
        table[["x", "y", "z"]] = table[["x", "y", "z"]].astype(float)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: x, y, z are positions in m ({e})") from None
    return table[CHANNEL_COLUMNS + [c for c in table if c not in CHANNEL_COLUMNS]]


def _checked_events(table, path):
    table = pd.DataFrame(table).reset_index(drop=True)
    if "onset" not in table:
        raise ValueError(f"{path} needs a column 'onset' in seconds")
    try:
        table["onset"] = table["onset"].astype(float)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: onset is a time in seconds ({e})") from None
    wrong = np.flatnonzero(~np.isfinite(table["onset"].to_numpy()))
    if len(wrong):
        raise ValueError(f"{path}: the onset in row {wrong[0] + 1} is not a finite number of seconds; drop such events ({len(wrong)} of {len(table)})")
    if "duration" not in table:
        table["duration"] = 0.0
    return table[["onset", "duration"] + [c for c in table if c not in ("onset", "duration")]]


# ---- what a pretrained encoder takes, by its recipe: sfreq (Hz), window (s), patch (samples), bands (Hz), clamp, grid

def resampled(signal, sfreq, recipe, channels=None):
    """A continuous signal (T, C') as the recipe has it, (T', C, F) float32: of `channels` (all), at recipe['sfreq'] by the mean of each block of samples;
    the F features of a channel are the envelopes of recipe['bands'] (Butterworth-4, zero phase, Hilbert), or the signal itself. Row i is of the time from
    i / recipe['sfreq'] s after the signal's row 0. Raises ValueError where the signal is slower than that, or a band beyond its Nyquist frequency."""
    to, bands = recipe["sfreq"], recipe["bands"]
    if to > sfreq:
        raise ValueError(f"sfreq={to:g} Hz is more than the {sfreq:g} Hz of the recording: block means only go down")
    if beyond := [band for band in bands if band[1] >= sfreq / 2]:
        raise ValueError(f"bands: {beyond[0][1]:g} Hz is not below half of the recording's {sfreq:g} Hz")
    channels = np.arange(signal.shape[1]) if channels is None else np.asarray(channels)
    edges = np.round(np.arange(int(len(signal) * to / sfreq + 1e-9) + 1) * sfreq / to).astype(int)  # blocks differ by a sample where the ratio is no integer
    out = np.empty((len(edges) - 1, len(channels), max(1, len(bands))), np.float32)
    for first in range(0, len(channels), 16):  # the file is read once for so many channels
        some = slice(first, first + 16)
        x = np.asarray(signal[:edges[-1], channels[some]], np.float64)
        for f, band in enumerate(bands or [None]):
            out[:, some, f] = np.add.reduceat(envelope(x, sfreq, *band) if band else x, edges[:-1], axis=0) / np.diff(edges)[:, None]
    return out


def envelope(x, sfreq, low, high):
    """Amplitude of a band (Hz) of x (T, C)."""
    import scipy.fft
    import scipy.signal
    x = scipy.signal.sosfiltfilt(scipy.signal.butter(4, [low, high], "band", fs=sfreq, output="sos"), x, axis=0)
    return np.abs(scipy.signal.hilbert(x, scipy.fft.next_fast_len(len(x)), axis=0)[:len(x)])


def robust_scale(x):
    """(median, interquartile range / 1.349, which is the SD of a Gaussian) over the first axis of x (T', C, F), each (C, F); 1 where nothing varies."""
    low, centre, high = np.percentile(x, [25, 50, 75], axis=0)
    return centre, np.where(high > low, (high - low) / 1.349, 1.0)


def places(names, xyz, good, grid=""):
    """Where the channels are for an encoder, (C, 3) in m: xyz, or with grid='8x8' the cells of G1 .. G64, row by row, 10 mm apart. nan for a bad channel, and
    one that nobody knows the place of: absent to an encoder."""
    xyz = np.array(xyz, dtype=float)
    if grid:
        rows, columns = map(int, grid.split("x"))
        number = [int(name[1:]) - 1 if name[:1] == "G" and name[1:].isdigit() else -1 for name in names]
        xyz = np.array([(n % columns / 100, n // columns / 100, 0.0) if 0 <= n < rows * columns else (np.nan,) * 3 for n in number])
    return np.where((np.asarray(good) & np.isfinite(xyz).all(1))[:, None], xyz, np.nan)


def encoder_input(windows, recipe, centre, scale):
    """Windows (N, T, C, F) of resampled() signals as a NeuralEncoder takes them, (N, C, P * F * patch) float32: in units of `scale` about `centre`, (C, F)
    from robust_scale over training time, cut at recipe['clamp']; the features of a patch side by side. Samples beyond the last patch are left out."""
    N, T, C, F = windows.shape
    patch, clamp = recipe["patch"], recipe["clamp"]
    x = np.clip((windows - centre) / scale, -clamp, clamp).astype(np.float32)
    return x[:, :T // patch * patch].reshape(N, -1, patch, C, F).transpose(0, 3, 1, 4, 2).reshape(N, C, -1)


def named_places(names, xyz, recipe):
    """(places (C, 3), {name, position, absent: how many}): xyz, and where it is nan the mean place that channels of the same name had in pretraining. How
    the channels were matched: a name that pretraining knows, else a position of their own, else absent."""
    known, out = {}, np.array(xyz, dtype=float)
    for recording in recipe["recordings"]:
        for name, place in zip(recording["channels"], recording["xyz"]):
            if np.isfinite(place).all():
                known.setdefault(name, []).append(place)
    for i, name in enumerate(names):
        if name in known and not np.isfinite(out[i]).all():
            out[i] = np.mean(known[name], 0)
    here, named = np.isfinite(out).all(1), np.array([name in known for name in names], bool)
    return out, {"name": int((named & here).sum()), "position": int((~named & here).sum()), "absent": int((~here).sum())}
