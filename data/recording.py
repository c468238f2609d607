"""Recordings of every kind as plain files: a continuous signal, its channels and its events.

A dataset is a folder with one folder per recording; scripts cut windows at any lag and width:

    NAME/signal.f32     (T, C) float32, little-endian, time-major, without header, for a memmap
    NAME/channels.csv   a row per channel: name, type, x, y, z (m, empty if unknown), status (good
                        or bad), and whatever the prepare script adds
    NAME/events.csv     a row per event, in any order: onset (s, finite), duration (s), and the
                        task's columns (word, object, ...)
    NAME/meta.yaml      format, samples, sfreq (Hz), unit, subject, first_sample, source, synthetic,
                        and whatever the prepare script adds
    meta.yaml           format, recordings (names), synthetic, and whatever the prepare script adds;
                        written last, so that a folder with it is complete

Onsets run on the recording's own clock, on which row 0 of the signal is sample `first_sample`
(MNE's first_samp): an event at `onset` seconds is at row round(sfreq * onset) - first_sample. It
may lie outside the signal, as when a film continues after the amplifier has stopped.

The last part prepares signals for a pretrained NeuralEncoder, see foundation.py.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import pandas as pd

from data import (
    InputError,
    aside,
    check_content,
    check_options,
    column,
    load_meta,
    read_table,
    remedy,
    write_aside,
    write_yaml,
)

FORMAT = "recording-1"
SET_FORMAT = "recordings-1"
CHANNEL_COLUMNS = ["name", "type", "x", "y", "z", "status"]
TEXT_COLUMNS = ["name", "word", "norm_word", "object", "image", "synonyms", "category", "phase"]
PIECE = 2**21  # samples to filter at once
SENSOR_UNITS = {"mag": "T", "grad": "T/m"}  # other types: V


# ---- writing


def write_recording(folder, signal, channels, events, first_sample=0, **meta):
    """Write one recording block by block and return its meta.

    signal: (T, C) array, or an iterable of (t, C) blocks.
    channels: DataFrame with name and, if known, type, x, y, z (m), status.
    events: DataFrame with onset (s) and, if known, duration (s).
    meta: sfreq (Hz), unit ('V', 'a.u.', ...), subject, source, synthetic, and any other keys of
        plain types. An old meta.yaml is removed first, the new one is written last.
    """
    folder = Path(folder)
    channels = check_channels(channels, folder / "channels.csv")
    events = check_events(events, folder / "events.csv")
    sfreq = meta.pop("sfreq")
    if not np.isfinite(sfreq) or sfreq <= 0:
        raise InputError(f"{folder}: sfreq={sfreq} is not a sampling rate in Hz")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").unlink(missing_ok=True)
    if hasattr(signal, "ndim"):
        signal = [signal]
    samples, sha256 = _write_signal(folder / "signal.f32", signal, len(channels))
    write_aside(folder / "channels.csv", channels.to_csv(index=False))
    write_aside(folder / "events.csv", events.to_csv(index=False))
    meta = {
        "format": FORMAT,
        "samples": samples,
        "sfreq": float(sfreq),
        "unit": meta.pop("unit"),
        "subject": str(meta.pop("subject")),
        "first_sample": int(first_sample),
        "source": meta.pop("source"),
        "synthetic": bool(meta.pop("synthetic")),
        "sha256": sha256,
        **meta,
    }
    write_yaml(folder / "meta.yaml", meta)
    return meta


def _write_signal(path, blocks, n_channels):
    """Write blocks (t, C) and return the number of samples and their sha256."""
    samples = 0
    digest = hashlib.sha256()
    with aside(path) as file:
        for block in blocks:
            block = np.ascontiguousarray(block, dtype="<f4")
            if block.ndim != 2 or block.shape[1] != n_channels:
                expected = f"(time, {n_channels} channels)"
                raise InputError(f"{path}: a block has shape {block.shape}, not {expected}")
            content = memoryview(block).cast("B")
            file.write(content)
            digest.update(content)
            samples += len(block)
    return samples, digest.hexdigest()


def write_raw(folder, raw, events, block_s=30.0, **meta):
    """Write all channels of an MNE Raw with types, positions (m), bads and first sample, as
    write_recording does; meta: without sfreq and unit."""
    units = {SENSOR_UNITS.get(kind, "V") for kind in raw.get_channel_types()}
    if len(units) > 1:
        units = " and ".join(sorted(units))
        raise InputError(f"{folder}: one recording cannot hold channels in {units}: pick one kind")
    places = channel_positions(raw)
    status = np.where(np.isin(raw.ch_names, raw.info["bads"]), "bad", "good")
    channels = pd.DataFrame({"name": raw.ch_names, "type": raw.get_channel_types()})
    channels = channels.assign(x=places[:, 0], y=places[:, 1], z=places[:, 2], status=status)
    step = max(1, round(block_s * raw.info["sfreq"]))
    starts = range(0, raw.n_times, step)
    blocks = (raw.get_data(start=a, stop=min(a + step, raw.n_times)).T for a in starts)
    return write_recording(
        folder,
        blocks,
        channels,
        events,
        first_sample=raw.first_samp,
        sfreq=raw.info["sfreq"],
        unit=units.pop(),
        **meta,
    )


def channel_positions(raw):
    """Return the positions (C, 3) in m of an MNE Raw's channels, NaN if unknown."""
    places = np.array([ch["loc"][:3] for ch in raw.info["chs"]], dtype=float).reshape(-1, 3)
    places[~places.any(axis=1)] = np.nan  # MNE's zeros mean unknown
    places[~np.isfinite(places).all(axis=1)] = np.nan
    return places


def write_set(folder, recordings, *, synthetic, **meta):
    """Complete a dataset of written recordings with its meta.yaml, and return its content."""
    if not recordings:
        raise InputError(f"{folder}: a dataset needs at least one recording")
    for name in recordings:
        read_meta(Path(folder) / name)
    meta = {
        "format": SET_FORMAT,
        "recordings": list(recordings),
        "synthetic": bool(synthetic),
        **meta,
    }
    write_yaml(Path(folder) / "meta.yaml", meta)
    return meta


# ---- reading


class Recording:
    """One recording, opened and checked.

    signal: (T, C) float32 memmap, read-only; channels, events: DataFrames; names: list of C channel
    names; xyz: (C, 3) in m, NaN if unknown; good: (C,) bool; sfreq (Hz), unit, subject,
    first_sample, synthetic; meta: all of meta.yaml; path: its folder.

    Raises InputError if a file is missing, damaged, or not as long as meta.yaml says.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.meta = read_meta(path)
        self.sfreq = float(self.meta["sfreq"])
        self.unit = self.meta["unit"]
        self.subject = str(self.meta["subject"])
        self.first_sample = int(self.meta["first_sample"])
        self.synthetic = bool(self.meta["synthetic"])
        self.channels = check_channels(*_read_csv(self.path / "channels.csv"))
        self.events = check_events(*_read_csv(self.path / "events.csv"))
        self.names = self.channels["name"].tolist()
        self.xyz = self.channels[["x", "y", "z"]].to_numpy(float)
        self.good = (self.channels["status"] == "good").to_numpy()
        self.signal = self._open_signal(self.path / "signal.f32")

    def _open_signal(self, file):
        samples = int(self.meta["samples"])
        n_channels = len(self.names)
        expected = 4 * samples * n_channels
        size = check_content(file).stat().st_size
        if size != expected or size == 0:
            needed = f"{samples:,} samples of {n_channels} channels take {expected:,}"
            raise InputError(f"{file} has {size:,} bytes, but {needed}{remedy(self.path)}")
        return np.memmap(file, "<f4", mode="r", shape=(samples, n_channels))

    def rows(self, onset):
        """Return the rows of the signal (int64, maybe outside it) for onsets in s."""
        samples = np.round(np.asarray(onset, dtype=float) * self.sfreq).astype(np.int64)
        return samples - self.first_sample


def read_meta(folder):
    """Read meta.yaml of one recording as a dict."""
    keys = ("samples", "sfreq", "unit", "subject", "first_sample", "synthetic")
    return load_meta(folder, "recording", FORMAT, keys)


def read_set(folder):
    """Read meta.yaml of a dataset; in a set of speech 'words' is the table of the transcript."""
    return load_meta(folder, "recordings", SET_FORMAT, ("recordings", "synthetic"))


def complete(folder):
    """Tell whether the folder holds a whole dataset, of which every recording opens."""
    try:
        for name in read_set(folder)["recordings"]:
            Recording(Path(folder) / name)
    except (ValueError, OSError):
        return False
    return True


def made_recordings(folder, options):
    """Return the names of a whole dataset's recordings, or []; refuse other options."""
    if not complete(folder):
        return []
    meta = read_set(folder)
    check_options(folder, meta.get("options"), options)
    return meta["recordings"]


def _read_csv(path):
    """Return (table, path); only empty numbers are missing: 'null', 'NA' and '007' may be words."""
    missing = dict.fromkeys(("x", "y", "z", "onset", "duration"), [""])
    table = read_table(path, na_values=missing, dtype=dict.fromkeys(TEXT_COLUMNS, str))
    return table, path


def check_channels(table, path):
    """Return a table of channels with all columns of the format, these first."""
    table = pd.DataFrame(table).reset_index(drop=True)
    table["name"] = column(table, path, "name").astype(str)
    defaults = {"type": "eeg", "x": np.nan, "y": np.nan, "z": np.nan, "status": "good"}
    for name, default in defaults.items():
        if name not in table:
            table[name] = default
    problem = ""
    if not len(table):
        problem = "the table has no channel"
    elif table["name"].duplicated().any():
        twice = table["name"][table["name"].duplicated()].iloc[0]
        problem = f"two channels have the name {twice!r}"
    elif not table["status"].isin(["good", "bad"]).all():
        problem = f"status must be good or bad, not {', '.join(map(str, set(table['status'])))}"
    if problem:
        raise InputError(f"{path}: {problem}")
    for axis in "xyz":
        table[axis] = _numbers(table, axis, path)
    return table[CHANNEL_COLUMNS + [c for c in table if c not in CHANNEL_COLUMNS]]


def check_events(table, path):
    """Return a table of events with finite onsets and a duration, these first."""
    table = pd.DataFrame(table).reset_index(drop=True)
    table["onset"] = _numbers(table, "onset", path)
    wrong = np.flatnonzero(~np.isfinite(table["onset"].to_numpy()))
    if len(wrong):
        raise InputError(
            f"{path}: the onset in row {wrong[0] + 1} is not a finite number of seconds: drop such "
            f"events ({len(wrong)} of {len(table)})"
        )
    if "duration" not in table:
        table["duration"] = 0.0
    return table[["onset", "duration"] + [c for c in table if c not in ("onset", "duration")]]


def _numbers(table, name, path):
    try:
        return column(table, path, name).astype(float)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {name} must be a number ({error})") from None


# ---- input for a pretrained encoder
# recipe: a dict of sfreq (Hz), window (s), patch (samples), bands (Hz), clamp, grid


def resampled(signal, sfreq, recipe, channels=None):
    """Resample a signal (T, C') to recipe['sfreq'] by block means: (T', C, F) float32.

    channels: numbers of the C channels wanted, default all. A channel's F features are the
    envelopes of recipe['bands'], or the signal itself. Row i begins i / recipe['sfreq'] s after row
    0. Files are read piece by piece, so that hours take little memory.
    """
    target = recipe["sfreq"]
    bands = recipe["bands"]
    if target > sfreq:
        raise InputError(f"sfreq={target:g} Hz is above the recording's {sfreq:g} Hz")
    for _, high in bands:
        if high >= sfreq / 2:
            raise InputError(f"bands: {high:g} Hz is not below half of the recording's {sfreq:g}")
    if channels is None:
        channels = np.arange(signal.shape[1])
    # blocks differ by a sample if the ratio of the rates is no integer
    n_blocks = int(len(signal) * target / sfreq + 1e-9)
    edges = np.round(np.arange(n_blocks + 1) * sfreq / target).astype(int)
    out = np.empty((n_blocks, len(channels), max(1, len(bands))), np.float32)
    if not bands:
        step = max(1, 2**22 // (signal.shape[1] * max(1, int(sfreq / target))))
        for first in range(0, n_blocks, step):
            some = edges[first : first + step + 1]
            x = _read_rows(signal, some[0], some[-1])[:, channels]
            out[first : first + step, :, 0] = _block_means(x, some - some[0])
        return out
    group = max(1, 2**25 // len(signal))  # channels in memory at once
    for first in range(0, len(channels), group):
        for c, x in enumerate(_read_channels(signal, channels[first : first + group], edges[-1])):
            for f, band in enumerate(bands):
                out[:, first + c, f] = _block_means(_envelope(x, sfreq, *band), edges)
    return out


def _block_means(x, edges):
    """Return the means (n, ...) of x (T, ...) between n + 1 edges."""
    sums = np.add.reduceat(x.astype(np.float64, copy=False), edges[:-1], axis=0)
    return (sums.T / np.diff(edges)).T


def _read_rows(signal, start, stop):
    """Return rows of a signal. A memmap's file is read, since mapped pages would stay in memory."""
    if isinstance(signal, np.memmap) and os.path.getsize(signal.filename) == signal.nbytes:
        width = signal.shape[1]
        offset = int(start) * width * signal.itemsize
        count = int(stop - start) * width
        return np.fromfile(signal.filename, signal.dtype, count, offset=offset).reshape(-1, width)
    return np.asarray(signal[start:stop])


def _read_channels(signal, channels, stop, step=1 << 16):
    """Return some channels of the first `stop` rows of a signal, (C, stop) float32."""
    out = np.empty((len(channels), stop), np.float32)
    for start in range(0, stop, step):
        rows = _read_rows(signal, start, min(start + step, stop))
        out[:, start : start + step] = rows[:, channels].T
    return out


def _envelope(x, sfreq, low, high):
    """Return a channel's envelope, from pieces that overlap by 30 cycles of the band."""
    margin = int(30 * sfreq / low)
    out = np.empty(len(x))
    for start in range(0, len(x), PIECE):
        begin = max(0, start - margin)
        piece = x[begin : start + PIECE + margin, None].astype(np.float64)
        feature = envelope(piece, sfreq, low, high)[start - begin :, 0]
        out[start : start + PIECE] = feature[:PIECE]
    return out


def envelope(x, sfreq, low, high):
    """Return the Hilbert amplitude of x (T, C) in a band (Hz): Butterworth, order 4, zero phase."""
    import scipy.fft
    import scipy.signal

    sos = scipy.signal.butter(4, [low, high], "band", fs=sfreq, output="sos")
    filtered = scipy.signal.sosfiltfilt(sos, x, axis=0)
    length = scipy.fft.next_fast_len(len(x))
    return np.abs(scipy.signal.hilbert(filtered, length, axis=0)[: len(x)])


def robust_scale(x):
    """Return the median and robust SD (C, F) over the first axis of x (T', C, F); the robust SD is
    the interquartile range / 1.349, which is a Gaussian's SD, or 1 for a constant."""
    low, centre, high = np.percentile(x, [25, 50, 75], axis=0)
    return centre, np.where(high > low, (high - low) / 1.349, 1.0)


def places(names, xyz, good, grid=""):
    """Return positions (C, 3) in m for an encoder, NaN (absent) for bad channels. grid='8x8' puts
    channels G1 .. G64 on a grid, row by row, 10 mm apart, whatever xyz is."""
    xyz = np.array(xyz, dtype=float)
    if grid:
        n_rows, n_columns = map(int, grid.split("x"))
        xyz = np.full((len(names), 3), np.nan)
        for i, name in enumerate(names):
            if name[:1] == "G" and name[1:].isdigit() and 1 <= int(name[1:]) <= n_rows * n_columns:
                row, column = divmod(int(name[1:]) - 1, n_columns)
                xyz[i] = column / 100, row / 100, 0.0
    present = np.asarray(good) & np.isfinite(xyz).all(1)
    return np.where(present[:, None], xyz, np.nan)


def encoder_input(windows, recipe, centre, scale):
    """Turn windows (N, T, C, F) of resampled() signals into a NeuralEncoder's input (N, C, P * F *
    patch) float32: in units of `scale` about `centre` (C, F), clipped at recipe['clamp'], a patch's
    features side by side, without the samples after the last whole patch."""
    N, T, C, F = windows.shape
    patch = recipe["patch"]
    x = np.clip((windows - centre) / scale, -recipe["clamp"], recipe["clamp"]).astype(np.float32)
    x = x[:, : T // patch * patch].reshape(N, -1, patch, C, F)
    return x.transpose(0, 3, 1, 4, 2).reshape(N, C, -1)


def named_places(names, xyz, recipe):
    """Fill NaN in positions (C, 3), in m, with the mean of channels of that name in pretraining.
    Also count {name: in pretraining, position: with a position only, absent: without either}."""
    pretrained = {}
    for recording in recipe["recordings"]:
        for name, place in zip(recording["channels"], recording["xyz"]):
            if np.isfinite(place).all():
                pretrained.setdefault(name, []).append(place)
    xyz = np.array(xyz, dtype=float)
    for i, name in enumerate(names):
        if name in pretrained and not np.isfinite(xyz[i]).all():
            xyz[i] = np.mean(pretrained[name], 0)
    placed = np.isfinite(xyz).all(1)
    named = np.array([name in pretrained for name in names], dtype=bool)
    counts = {"name": placed & named, "position": placed & ~named, "absent": ~placed}
    return xyz, {key: int(mask.sum()) for key, mask in counts.items()}
