"""Put the electrodes of recordings side by side, as if of one person, and cut windows from them."""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import scipy.signal

from data import InputError, aside, file_hash, files_state, read_table
from data.recording import Recording


@dataclass
class Person:
    """A recording, the numbers of its channels, and their mixing (electrodes, channels), if any."""

    recording: Recording
    channels: np.ndarray
    mixing: np.ndarray | None = None

    def mixed(self, windows):
        """Mix windows (..., channels, time) into (..., electrodes, time)."""
        return windows if self.mixing is None else self.mixing @ windows


class Montage:
    """The chosen electrodes of one or more recordings.

    people: list of Person; names: one per electrode, such as 'sub-01 LGA1'; sfreq: Hz; xyz:
    (electrodes, 3) in m; gaps: electrodes left out because they are constant or lack samples.
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
        """Return rows (people, events) of each person's signal at `start` (s)."""
        return np.stack([person.recording.rows(start) for person in self.people])

    def inside(self, first, width):
        """Return (events,), whether windows of `width` from rows `first` (people, events) are whole
        and outside segments marked BAD."""
        inside = np.ones(first.shape[1], bool)
        for person, begins in zip(self.people, first):
            recording = person.recording
            inside &= (begins >= 0) & (begins + width <= len(recording.signal))
            for span in recording.meta.get("bad_spans", []):
                begin, end = recording.rows(span)
                inside &= (begins >= end) | (begins + width <= begin)
        return inside

    def samples(self, first, width):
        """Return (events, electrodes, width) float32 from rows `first` (people, events) on."""
        parts = []
        for person, begins in zip(self.people, first):
            windows = np.empty((len(begins), len(person.channels), width), np.float32)
            for n, begin in enumerate(begins):
                windows[n] = person.recording.signal[begin : begin + width][:, person.channels].T
            parts.append(person.mixed(windows))
        return np.concatenate(parts, axis=1)

    def bins(self, first, width, n_bins):
        """Return (events, electrodes, bins) float32, means over parts of the same windows."""
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
        """Return (events, electrodes * frequencies, segments) float32, the log power up to
        `highest` (Hz) in Hann windows of `segment` (s) that overlap by half."""
        size = max(4, min(width, round(segment * self.sfreq)))
        parts = []
        for begin in range(0, first.shape[1], 256):
            x = self.samples(first[:, begin : begin + 256], width)
            f, _, power = scipy.signal.spectrogram(x, self.sfreq, "hann", size, size // 2)
            kept = (f > 0) & (f <= highest)
            if not kept.any():
                raise InputError(f"spectrum_max={highest:g} Hz: give at least {f[1]:g} Hz")
            power = np.log(np.maximum(power[:, :, kept], np.finfo(np.float32).tiny))
            parts.append(power.reshape(len(x), -1, power.shape[-1]).astype(np.float32))
        return np.concatenate(parts)

    def bin_means(self, rows, offsets, edges):
        """Return (lags, events, electrodes, bins), see lag_windows."""
        parts = []
        for person, row in zip(self.people, rows):
            windows = lag_windows(person.recording.signal, person.channels, row, offsets, edges)
            parts.append(person.mixed(windows))
        if len(parts) == 1:  # a gigabyte need not be copied
            return parts[0]
        return np.concatenate(parts, axis=2)

    def checksums(self):
        """Return the checksum in each recording's meta.yaml."""
        return [person.recording.meta.get("sha256") for person in self.people]


class Windows:
    """Windows around events at a lag: bins, spectra, or a reader's features.

    config has window, bins, represent, ... as in decode.py. reader(first, width) returns an array
    (events, ...) for windows from rows `first` (people, events) on; reader.key names what this
    depends on besides the recordings and preprocessor_params.
    """

    def __init__(self, montage, config, cache, reader=None):
        self.montage, self.config, self.cache, self.reader = montage, config, cache, reader
        self.width = round(config.window * montage.sfreq)
        self.n_bins = config.bins
        if config.preprocess == "preprocess_neural_data":  # bins, counted in samples
            step = config.preprocessor_params.get("num_average_samples", 32)
            if not isinstance(step, int) or step < 1 or self.width % step:
                raise InputError(f"num_average_samples={step} does not divide {self.width} samples")
            self.n_bins = self.width // step
        if self.width < self.n_bins:
            size = f"{self.width} samples at {montage.sfreq:g} Hz"
            raise InputError(f"window={config.window} s has {size}: too few for {self.n_bins} bins")

    def first(self, rows, lag):
        """Return the first row of each window for events at `rows` and a lag (ms)."""
        return rows + round(self.montage.sfreq * (lag / 1000 - self.config.window / 2))

    def at(self, rows, lag):
        """Return (events, ...) float32 for events at `rows` (people, events) and a lag (ms)."""
        first = self.first(rows, lag)
        if self.reader:
            return self.read(first)
        if self.config.represent == "bins":
            return self.montage.bins(first, self.width, self.n_bins)
        spectrum = self.config.spectrum_segment, self.config.spectrum_max
        return self.montage.spectra(first, self.width, *spectrum)

    def read(self, first):
        """Return the reader's features, cached on disk by content since they may be slow."""
        key = hashlib.sha256(self.content().encode() + first.tobytes()).hexdigest()[:20]
        path = self.cache / f"{key}.npy"
        if not path.is_file():
            array = self.reader(first, self.width)
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside(path) as file:
                np.save(file, array)
        return np.load(path)

    def content(self):
        """Return as text what windows depend on: signals, parameters, files they name, code."""
        config = self.config
        content = [self.montage.names, self.montage.checksums(), config.reference, self.width]
        for person in self.montage.people:
            content.append(files_state([person.recording.path / "signal.f32"]))
            content.append(person.channels.tolist())  # of a Laplacian's neighbours, too
        content += [config.preprocess, config.preprocessor_params, file_hash(__file__)]
        if self.reader:
            content.append(self.reader.key)
        return repr(content)


def usable_channels(signal):
    """Return (channels,), whether all samples are finite (or their sum is not) and some differ."""
    total = np.zeros(signal.shape[1])
    varies = np.zeros(signal.shape[1], bool)
    for begin in range(0, len(signal), 1 << 16):
        block = signal[begin : begin + (1 << 16)]
        total += block.sum(axis=0, dtype=np.float64)
        varies |= (block != signal[0]).any(axis=0)
    return np.isfinite(total) & varies


def lag_windows(signal, channels, rows, offsets, edges):
    """Return bin means at many lags from differences of cumulative sums: (L, N, C, B) float32.

    signal: (T, C'); channels: (C,); rows: (N,) of the events; offsets: (L,) samples from an event
    to the start of its window; edges: (B + 1,) of the bins, in samples of the window.
    """
    windows = np.empty((len(offsets), len(rows), len(channels), len(edges) - 1), np.float32)
    at = rows[:, None] + np.asarray(edges)
    widths = np.diff(edges)[:, None]
    for begin in range(0, len(channels), 16):  # a few at a time: the sums are float64
        some = channels[begin : begin + 16]
        sums = np.zeros((len(signal) + 1, len(some)))
        for first in range(0, len(signal), 8192):  # fits the cache: four times as fast
            block = signal[first : first + 8192, some].astype(np.float64)
            block[0] += sums[first]
            np.cumsum(block, axis=0, out=sums[first + 1 : first + 1 + len(block)])
        for lag, offset in enumerate(offsets):
            means = np.diff(sums[at + offset], axis=1) / widths  # (N, B, c)
            windows[lag, :, begin : begin + 16] = means.transpose(0, 2, 1)
    return windows


def laplacian(names):
    """Return the mixing (C, C): each contact minus the mean of its neighbours on the shaft, if any,
    which have the same letters and the number before or after; LA01 is next to LA2."""
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
    """Return [(Recording, numbers of its good channels)] of the chosen people and electrodes, see
    decode.py's options of these names."""
    try:
        pattern = re.compile(channels)
    except re.error as error:
        raise InputError(f"channels={channels} is no regular expression: {error}") from None
    if electrodes:
        table = read_table(electrodes, ["subject", "elec"], dtype=str)
    chosen = []
    shafts = set()
    for recording in choose_people(recordings, subjects):
        wanted = recording.good.copy()
        for i, name in enumerate(recording.names):
            wanted[i] &= pattern.match(name) is not None
            shafts.add(re.sub(r"\d+$", "", name))
        if electrodes:
            listed = table.elec[[is_subject(subject, recording) for subject in table.subject]]
            missing = sorted(set(listed) - set(recording.names))
            if missing:
                print(f"{recording.path.name} has no {', '.join(missing)} of {electrodes}")
            wanted &= np.isin(recording.names, listed)
        if wanted.any():
            chosen.append((recording, np.flatnonzero(wanted)))
    if not chosen:
        asked = f"channels={channels} electrodes={electrodes}"
        raise InputError(f"{asked} leave no electrode: take {', '.join(sorted(shafts))}")
    return chosen


def choose_people(recordings, subjects):
    """Return the recordings of the subjects (sub-03, 3 or nyu_ids), all if none is named."""
    chosen = []
    for asked in subjects:
        matches = [recording for recording in recordings if is_subject(asked, recording)]
        if not matches:
            available = ", ".join(recording.path.name for recording in recordings)
            cure = f"its prepare.py adds people with subjects={asked}"
            folder = recordings[0].path.parent
            raise InputError(f"subjects: {folder} has no {asked}, only {available}; {cure}")
        chosen += matches
    return [recording for recording in recordings if recording in chosen or not subjects]


def is_subject(asked, recording):
    """Tell whether 'sub-03', '3', '03' or an nyu_id names this recording."""
    digits = re.sub(r"\D", "", recording.subject).lstrip("0")
    names = {recording.subject, recording.path.name, str(recording.meta.get("nyu_id", ""))}
    return str(asked) in (names | {digits, digits.zfill(2)}) - {""}
