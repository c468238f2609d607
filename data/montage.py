"""Recordings side by side, as if their electrodes were one person's, and windows cut from them."""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import scipy.signal

from data import InputError, aside, file_hash, files_state, read_table
from data.recording import Recording


@dataclass
class Person:
    """One recording, the numbers of its channels, and what mixes them, (electrodes, channels)."""

    recording: Recording
    channels: np.ndarray
    mixing: np.ndarray | None = None

    def mixed(self, windows):
        """Windows (..., channels, time) as (..., electrodes, time)."""
        return windows if self.mixing is None else self.mixing @ windows


class Montage:
    """The chosen electrodes of one or more recordings.

    people: a Person each; names: 'sub-01 LGA1' and so on, one an electrode; sfreq: Hz; xyz:
    (electrodes, 3) in m; gaps: electrodes that were left out since samples are missing or all the
    same.
    """

    def __init__(self, chosen, reference="none"):
        """chosen: [(Recording, numbers of its channels)]; reference: none or laplacian."""
        self.sfreq = chosen[0][0].sfreq
        self.people = []
        self.names = []
        self.gaps = []
        xyz = []
        for recording, channels in chosen:
            if recording.sfreq != self.sfreq:
                rates = f"{recording.sfreq:g} Hz, the others {self.sfreq:g} Hz"
                raise InputError(f"{recording.path}: {rates}: choose subjects= of one rate")
            names = recording.path.name + " " + np.array(recording.names, dtype=object)
            usable = usable_channels(recording.signal)
            complete = channels[usable[channels]]
            self.names += names[complete].tolist()
            self.gaps += names[channels[~usable[channels]]].tolist()
            xyz.append(recording.xyz[complete])
            person = Person(recording, complete)
            if reference == "laplacian":
                person.channels = np.flatnonzero(recording.good & usable)
                mixing = laplacian(np.array(recording.names)[person.channels])
                person.mixing = mixing[np.searchsorted(person.channels, complete)]
            self.people.append(person)
        self.xyz = np.concatenate(xyz)
        if not self.names:
            raise InputError(f"every electrode is constant or has NaN: {', '.join(self.gaps[:5])}")

    def rows(self, start):
        """(people, events): the row of each person's signal at `start` (s)."""
        return np.stack([person.recording.rows(start) for person in self.people])

    def inside(self, first, width):
        """(events,) whether windows of `width` from rows `first` (people, events) on are whole, and
        clear of segments that were marked BAD."""
        inside = np.ones(first.shape[1], bool)
        for person, begins in zip(self.people, first):
            recording = person.recording
            inside &= (begins >= 0) & (begins + width <= len(recording.signal))
            for span in recording.meta.get("bad_spans", []):
                begin, end = recording.rows(span)
                inside &= (begins >= end) | (begins + width <= begin)
        return inside

    def samples(self, first, width):
        """(events, electrodes, width) float32 from rows `first` (people, events) on."""
        parts = []
        for person, begins in zip(self.people, first):
            windows = np.empty((len(begins), len(person.channels), width), np.float32)
            for n, begin in enumerate(begins):
                windows[n] = person.recording.signal[begin : begin + width][:, person.channels].T
            parts.append(person.mixed(windows))
        return np.concatenate(parts, axis=1)

    def bins(self, first, width, n_bins):
        """(events, electrodes, bins) float32: means over parts of the windows of samples()."""
        edges = np.round(np.linspace(0, width, n_bins + 1)).astype(int)
        parts = []
        for person, begins in zip(self.people, first):
            signal = person.recording.signal
            sums = np.empty((len(begins), n_bins, signal.shape[1]))
            for n, begin in enumerate(begins):
                window = signal[begin : begin + width]
                np.add.reduceat(window, edges[:-1], axis=0, dtype=np.float64, out=sums[n])
            means = sums[:, :, person.channels] / np.diff(edges)[:, None]
            parts.append(person.mixed(means.transpose(0, 2, 1).astype(np.float32)))
        return np.concatenate(parts, axis=1)

    def spectra(self, first, width, segment, highest):
        """(events, electrodes * frequencies, segments) float32: log power of windows.

        segment: s of a Hann window, half overlapping; highest: Hz, from the first above 0 on.
        """
        size = max(4, min(width, round(segment * self.sfreq)))
        parts = []
        for begin in range(0, first.shape[1], 256):
            x = self.samples(first[:, begin : begin + 256], width)
            f, _, power = scipy.signal.spectrogram(x, self.sfreq, "hann", size, size // 2)
            kept = (f > 0) & (f <= highest)
            if not kept.any():
                raise InputError(f"spectrum_max={highest:g} is below {f[1]:g} Hz, the lowest")
            power = np.log(np.maximum(power[:, :, kept], np.finfo(np.float32).tiny))
            parts.append(power.reshape(len(x), -1, power.shape[-1]).astype(np.float32))
        return np.concatenate(parts)

    def bin_means(self, rows, offsets, edges):
        """(lags, events, electrodes, bins): lag_windows of everyone."""
        parts = []
        for person, row in zip(self.people, rows):
            windows = lag_windows(person.recording.signal, person.channels, row, offsets, edges)
            parts.append(person.mixed(windows))
        if len(parts) == 1:  # a gigabyte need not be copied
            return parts[0]
        return np.concatenate(parts, axis=2)

    def checksums(self):
        """What makers of recordings say of their content, one a person."""
        return [person.recording.meta.get("sha256") for person in self.people]


class Windows:
    """Windows around events at a lag, as decoders read them: bins, spectra, or what a reader makes.

    config has window, bins, represent, ..., as in decode.py. A reader(first, width) gives an array
    (events, ...) for windows from rows `first` (people, events) on; its key names what it depends
    on beside the recordings and preprocessor_params.
    """

    def __init__(self, montage, config, cache, reader=None):
        self.montage, self.config, self.cache, self.reader = montage, config, cache, reader
        self.width = round(config.window * montage.sfreq)
        self.n_bins = config.bins
        if config.preprocess == "preprocess_neural_data":  # bins, counted in samples
            step = config.preprocessor_params.get("num_average_samples", 32)
            if self.width % step:
                raise InputError(f"num_average_samples={step} does not divide {self.width} samples")
            self.n_bins = self.width // step
        if self.width < self.n_bins:
            size = f"{self.width} samples at {montage.sfreq:g} Hz"
            raise InputError(f"window={config.window} s has {size}: too few for {self.n_bins} bins")

    def first(self, rows, lag):
        """Row of the first sample of each window, for events at `rows` and a lag (ms)."""
        return rows + round(self.montage.sfreq * (lag / 1000 - self.config.window / 2))

    def at(self, rows, lag):
        """(events, ...) float32 at a lag (ms), for events at rows (people, events)."""
        first = self.first(rows, lag)
        if self.reader:
            return self.read(first)
        if self.config.represent == "bins":
            return self.montage.bins(first, self.width, self.n_bins)
        spectrum = self.config.spectrum_segment, self.config.spectrum_max
        return self.montage.spectra(first, self.width, *spectrum)

    def read(self, first):
        """What the reader makes of every window; kept on disk by content, since it may be slow."""
        key = hashlib.sha256(self.content().encode() + first.tobytes()).hexdigest()[:20]
        path = self.cache / f"{key}.npy"
        if not path.is_file():
            array = self.reader(first, self.width)
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside(path) as file:
                np.save(file, array)
        return np.load(path)

    def content(self):
        """What windows depend on, as text: signals, parameters, the files they name, code."""
        config = self.config
        signals = [person.recording.path / "signal.f32" for person in self.montage.people]
        content = [self.montage.names, self.montage.checksums(), files_state(signals)]
        content += [config.reference, self.width]
        content += [config.preprocess, config.preprocessor_params, file_hash(__file__)]
        if self.reader:
            content.append(self.reader.key)
        return repr(content)


def usable_channels(signal):
    """(channels,) whether every sample is finite (else a channel's sum is not) and some differ."""
    total = np.zeros(signal.shape[1])
    varies = np.zeros(signal.shape[1], bool)
    for begin in range(0, len(signal), 1 << 16):
        block = signal[begin : begin + (1 << 16)]
        total += block.sum(axis=0, dtype=np.float64)
        varies |= (block != signal[0]).any(axis=0)
    return np.isfinite(total) & varies


def lag_windows(signal, channels, rows, offsets, edges):
    """Bin means of windows at many lags, by differences of cumulative sums: (L, N, C, B) float32.

    signal: (T, C'); channels: (C,) of it; rows: (N,) of the events; offsets: (L,) samples from an
    event to its window's first; edges: (B + 1,) of the bins, in samples of the window.
    """
    windows = np.empty((len(offsets), len(rows), len(channels), len(edges) - 1), np.float32)
    at = rows[:, None] + np.asarray(edges)
    widths = np.diff(edges)[:, None]
    for begin in range(0, len(channels), 16):  # the sums are float64: a few channels at a time
        some = channels[begin : begin + 16]
        sums = np.zeros((len(signal) + 1, len(some)))
        for first in range(0, len(signal), 8192):  # as much as a cache holds: four times as fast
            block = signal[first : first + 8192, some].astype(np.float64)
            block[0] += sums[first]
            np.cumsum(block, axis=0, out=sums[first + 1 : first + 1 + len(block)])
        for lag, offset in enumerate(offsets):
            means = np.diff(sums[at + offset], axis=1) / widths  # (N, B, c)
            windows[lag, :, begin : begin + 16] = means.transpose(0, 2, 1)
    return windows


def laplacian(names):
    """(C, C) mixing: each contact minus the mean of its neighbours on the shaft, if it has any:
    those with the same letters and the number before or after; LA01 is beside LA2."""
    place = {}
    for i, name in enumerate(names):
        shaft, number = re.fullmatch(r"(.*?)(\d*)", name).groups()
        if number:
            place[shaft, int(number)] = i
    mixing = np.eye(len(names), dtype=np.float32)
    for (shaft, number), i in place.items():
        neighbours = [key for key in ((shaft, number - 1), (shaft, number + 1)) if key in place]
        for key in neighbours:
            mixing[i, place[key]] = -1 / len(neighbours)
    return mixing


# ---- which electrodes


def choose_electrodes(recordings, subjects=(), channels="", electrodes=""):
    """[(Recording, numbers of its good channels)] of some people. Raises InputError.

    subjects: sub-03, 3 or nyu_ids, none for all; channels: a regular expression, from a name's
    start.
    """
    for asked in subjects:
        if not any(is_subject(asked, recording) for recording in recordings):
            there = ", ".join(recording.path.name for recording in recordings)
            cure = f"its prepare.py adds people with subjects={asked}"
            folder = recordings[0].path.parent
            raise InputError(f"subjects: {folder} has no {asked}, only {there}; {cure}")
    try:
        pattern = re.compile(channels)
    except re.error as error:
        raise InputError(f"channels={channels} is no regular expression: {error}") from None
    if electrodes:
        table = read_table(electrodes, ["subject", "elec"], dtype=str)
    chosen = []
    for recording in recordings:
        if subjects and not any(is_subject(asked, recording) for asked in subjects):
            continue
        wanted = recording.good & [bool(pattern.match(name)) for name in recording.names]
        if electrodes:
            listed = [is_subject(subject, recording) for subject in table.subject]
            wanted &= np.isin(recording.names, table.elec[listed])
        if wanted.any():
            chosen.append((recording, np.flatnonzero(wanted)))
    if not chosen:
        asked = f"channels={channels} electrodes={electrodes}"
        raise InputError(f"{asked} leave no electrode: there are {', '.join(shafts(recordings))}")
    return chosen


def shafts(recordings):
    """The names of all channels without their numbers."""
    names = set()
    for recording in recordings:
        names.update(re.sub(r"\d+$", "", name) for name in recording.names)
    return sorted(names)


def is_subject(asked, recording):
    """Whether 'sub-03', '3', '03' or an nyu_id means this recording."""
    digits = re.sub(r"\D", "", recording.subject).lstrip("0")
    names = {recording.subject, recording.path.name, str(recording.meta.get("nyu_id", ""))}
    return str(asked) in (names | {digits, digits.zfill(2)}) - {""}
