"""When, where and how well can a word that somebody hears be read from electrodes in the brain?

    python decode.py                                            # embedded: made-up electrodes
    python decode.py config/decode_podcast.yaml                 # Podcast ECoG (make neural-conv)
    python decode.py model=ridge represent=spectrum reference=laplacian
    python decode.py task=content       # or pos, sentence_onset, surprisal, volume, my_file.py:name
    python decode.py model=my_file.py:constructor preprocess=my_file.py:function
    python decode.py config/decode_foundation.yaml              # latents of foundation.py's encoder
    python decode.py --config configs/neural_conv_decoder/neural_conv.yml    # podcast-benchmark's
    python decode.py apply=out/decode recording=PATH            # saved decoders on a new recording
    torchrun --standalone --nproc_per_node=4 decode.py config/decode_podcast.yaml

A window of the recording around each word's onset + lag goes in, the word's embedding comes out,
and predictions for held-out words are scored against the embeddings of all words, lag by lag.
Whatever is fitted or chosen (z-scores, PCA, alpha, epoch, lag) is fitted on training words and
chosen on validation words; no test window shares a sample with theirs. The null shifts the words.

decode_encoding.py asks the reverse; decode_neuroprobe.py runs the Neuroprobe benchmark.
Goldstein et al. 2022 (Nat Neurosci 25:369, the decoder); Zada et al. 2025 (Sci Data 12:1135).
"""

import hashlib
import inspect
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mne
import numpy as np
import pandas as pd
import scipy.signal
import scipy.special
import scipy.stats
import torch
import torch.nn as nn
import yaml
from himalaya.ridge import solve_ridge_cv_svd, solve_ridge_svd
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch.nn import functional as F

from configurator import InputError, Run, check_keys, configure, key_seed, load_function
from convert import HiddenStates
from data import aside, read_table, write_aside
from data.montage import Montage, choose_electrodes
from data.podcast import benchmark_yaml, registry
from data.podcast.tasks import TASKS
from data.recording import Recording, read_set
from data.vectors import contextual_vectors, look_up, released_features, static_vectors
from model import save_checkpoint


@dataclass
class Config:
    # ---- recording
    dataset: str = "synthetic_podcast"  # name under data/, or a prepared folder (data/recording.py)
    subjects: list[str] = field(default_factory=list)  # sub-03 or 3; none: all, side by side
    channels: str = ""  # regular expression, from a name's beginning: LG[AB]*
    electrodes: str = ""  # CSV with columns subject and elec
    reference: Literal["none", "laplacian"] = "none"  # laplacian: minus the shaft's neighbours
    # ---- windows
    min_lag: float = -400.0  # ms from a word's onset to the middle of its window
    max_lag: float = 1000.0  # ms, itself left out
    lag_step: float = 100.0  # ms
    lags: list[float] = field(default_factory=list)  # ms, instead of the three above
    window: float = 0.2  # s
    represent: Literal["bins", "spectrum"] = "bins"  # bin means, or log power over time
    bins: int = 10  # of a window
    spectrum_segment: float = 0.1  # s of a Hann window, half overlapping
    spectrum_max: float = 200.0  # Hz
    preprocess: str = ""  # instead: my_file.py:function(windows, preprocessor_params); see Windows
    preprocessor_params: dict = field(default_factory=dict)  # for it
    untrained: int = 0  # twins of a pretrained encoder with random weights, beside it
    # ---- target
    task: str = "embedding"  # or content, pos, sentence_onset, surprisal, volume, my_file.py:f
    task_params: dict = field(default_factory=dict)  # for my_file.py:f(words, task_params)
    embedding: list[str] = field(default_factory=lambda: ["gpt2-xl"])  # see word_vectors
    layer: int = 24  # of features that have layers, and of lm=
    lm: str = "out/train"  # embedding=lm: its contextual embeddings; static: those of its tokens
    pca: int = 16  # dimensions, fitted on training words; 0: all
    word: str = "norm_word"  # column of words.csv that says which words are the same
    # ---- decoders
    model: str = "ensemble_pitom_model"  # one of DECODERS, or my_file.py:constructor(model_params)
    model_params: dict = field(default_factory=dict)  # for it; none: its own defaults
    beside: list[str] = field(default_factory=lambda: ["ridge"])  # others, on the same windows
    controls: list[str] = field(default_factory=lambda: ["mean", "unigram", "preceding", "oracle"])
    config_setter: str = ""  # one of SETTERS, or my_file.py:function, see change_settings
    # ---- training
    batch_size: int = 32  # words
    epochs: int = 60  # at most
    learning_rate: float = 1e-3  # of AdamW
    weight_decay: float = 1e-4
    patience: int = 10  # epochs without improvement on the validation words
    loss: Literal["mse", "cosine"] = "mse"
    # ---- folds and scores
    n_folds: int = 5  # each word is tested once
    fold_type: Literal["sequential", "zero_shot"] = "sequential"  # in time, or by word
    min_count: int = 5  # training occurrences of a word whose AUC counts
    n_shifts: int = 1000  # circular shifts of the words: the null
    save_models: bool = True  # models/, for apply=
    # ---- saved decoders on a new recording
    apply: str = ""  # out folder of a finished run
    recording: str = ""  # a prepared recording, or a set with the same people
    # ---- run
    out_dir: str = "out/decode"  # tables, figures, models; a stopped run goes on
    seed: int = 1337
    device: str = "auto"  # cuda, mps, cpu

    POSITIVE = "bins spectrum_segment spectrum_max batch_size epochs learning_rate n_shifts"
    SIGNED = "max_lag window"
    RENAMED = {"direction": "decode_encoding.py or decode_neuroprobe.py"}

    def check(self):
        check_folds_and_lags(self)
        if len(self.embedding) != 1:
            raise InputError("embedding: decoding has one target; decode_encoding.py takes several")
        check_keys(self.controls, CONTROLS, "controls")
        if bool(self.apply) != bool(self.recording):
            raise InputError("apply= and recording= go together: the run folder, the recording")


FDR = 0.05  # false discovery rate, over lags or over electrodes
VAL_SHARE = 0.25  # of the words that are not tested
ALPHAS = 10.0 ** np.arange(-1, 9, dtype=np.float32)  # of ridge, chosen on validation words
TOP_K = (1, 5, 10)
HERE = Path(__file__).resolve().parent
FOUNDATION = HERE / "decode_foundation.py"  # pretrained encoders


def check_folds_and_lags(config):
    """What decode_encoding.py checks, too."""
    if config.n_folds < 2:
        raise InputError(f"n_folds={config.n_folds}: give at least 2, so that each word is tested")
    if not all_lags(config):
        raise InputError("min_lag, max_lag and lag_step hold no lag: max_lag itself is left out")


def all_lags(config):
    """Lags in ms, as numpy.arange has them: the end is left out."""
    if config.lags or config.lag_step <= 0:
        return list(config.lags)
    return np.arange(config.min_lag, config.max_lag, config.lag_step).tolist()


def resolve(spec, known, option):
    """What an option names: an entry of `known`, or my_file.py:name.

    What lies beside that file can be imported by it, and so can podcast-benchmark's registry.
    """
    spec = known.get(spec, spec)
    if not isinstance(spec, str):
        return spec
    if ":" not in spec:
        raise InputError(f"{option}={spec} is none of {', '.join(known)}, and no my_file.py:name")
    for folder in (Path(spec.partition(":")[0]).resolve().parent, HERE / "data" / "podcast"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return load_function(spec, option)


# ---- recordings and words


@dataclass
class Podcast:
    """What was said and heard: words (DataFrame), recordings, and what figures call the data."""

    folder: Path
    meta: dict
    words: pd.DataFrame
    montage: Montage
    source: str


def load_podcast(run, config):
    """The Podcast of dataset=, with the chosen people and electrodes. Raises InputError."""
    folder = run.dataset(config.dataset)
    meta = read_set(folder)
    if "words" not in meta:
        raise InputError(
            f"{folder / 'meta.yaml'} names no words: decode.py reads sets of speech with a "
            "transcript, as data/podcast/prepare.py makes them"
        )
    path = folder / meta["words"]
    words = read_table(path, na_values={"start": [""], "end": [""]})
    if config.word not in words:
        raise InputError(f"word={config.word} is no column of {path}: {', '.join(words)}")
    recordings = [Recording(folder / name) for name in meta["recordings"]]
    chosen = choose_electrodes(recordings, config.subjects, config.channels, config.electrodes)
    montage = Montage(chosen, config.reference)
    if montage.gaps:
        run.print(f"left out, since samples are missing (NaN): {', '.join(montage.gaps)}")
    source = config.dataset
    if meta["synthetic"] and "synthetic" not in source:
        source += ", synthetic"
    return Podcast(folder, meta, words, montage, source)


class Windows:
    """What decoders read of every event at any lag, as the options represent it.

    preprocess= may name f(windows, preprocessor_params) -> array: the windows (words, electrodes,
    samples) of one lag go in; the array's first dimension is still the words. Or, for encoders that
    must see the whole recording, a function or class of three arguments, f(montage,
    preprocessor_params, device) -> reader: reader(first, width) gives the array for windows of
    `width` samples from rows `first` (people, words) on; reader.key names its weights,
    reader.description is printed, and reader.model_params go to the decoder.
    """

    def __init__(self, montage, config, cache):
        self.montage = montage
        self.config = config
        self.cache = cache
        self.width = round(config.window * montage.sfreq)
        self.function = self.reader = None
        bins = config.bins
        if config.preprocess:
            self.function = resolve(config.preprocess, PREPROCESSORS, "preprocess")
            parameters = inspect.signature(self.function).parameters.values()
            if [p.default for p in parameters].count(inspect.Parameter.empty) == 3:
                self.reader = self.function(montage, config.preprocessor_params, config.device)
        if self.function is registry.preprocess_neural_data:  # bins
            bins, self.function = benchmark_bins(self.width, config), None
        if self.width < bins:
            size = f"{self.width} samples at {montage.sfreq:g} Hz"
            raise InputError(f"window={config.window} s has {size}: too few for {bins} bins")
        self.edges = np.round(np.linspace(0, self.width, bins + 1)).astype(int)
        self.key = self.reader.key if self.reader else content_of_function(config)
        self.are_bins = self.function is None and config.represent == "bins"

    def first(self, rows, lag):
        """Row of the first sample of each window, for events at `rows` and a lag (ms)."""
        return rows + round(self.montage.sfreq * (lag / 1000 - self.config.window / 2))

    def at(self, rows, lags):
        """[(words, ...) float32 at each lag] for events at rows (people, words)."""
        if self.are_bins:
            offsets = [self.first(0, lag) for lag in lags]
            return self.montage.bin_means(rows, offsets, self.edges)
        make = self.spectra if self.function is None else self.preprocessed
        return [make(self.first(rows, lag)) for lag in lags]

    def spectra(self, first):
        """spectrum() of windows that begin at rows `first`, a few words at a time."""
        parts = []
        for begin in range(0, first.shape[1], 256):
            samples = self.montage.samples(first[:, begin : begin + 256], self.width)
            parts.append(spectrum(samples, self.montage.sfreq, self.config))
        return np.concatenate(parts)

    def preprocessed(self, first):
        """What preprocess= makes of every window; kept on disk by content, since it may be slow."""
        content = [self.key, self.montage.names, self.montage.checksums()]
        content += [self.config.reference, self.width]
        key = hashlib.sha256(repr(content).encode() + first.tobytes()).hexdigest()[:20]
        path = self.cache / f"{key}.npy"
        if not path.is_file():
            array = self.reader(first, self.width) if self.reader else self.call(first)
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside(path) as file:
                np.save(file, array)
        return np.load(path)

    def call(self, first):
        """The array that a user's function makes, checked."""
        names = [name.partition(" ")[2] for name in self.montage.names]
        params = {"ch_names": names, "sfreq": self.montage.sfreq, **self.config.preprocessor_params}
        array = self.function(self.montage.samples(first, self.width), params)
        array = torch.as_tensor(array).detach().cpu().float().numpy()
        option = f"preprocess={self.config.preprocess}"
        if array.ndim < 2 or len(array) != first.shape[1]:
            raise InputError(
                f"{option} returned shape {array.shape} for {first.shape[1]} words: its first "
                "dimension must stay the words, with at least one feature behind it"
            )
        if not np.isfinite(array).all():
            raise InputError(f"{option} returned a number that is not finite")
        return array


def content_of_function(config):
    """What a user's preprocessor depends on: its parameters, the files they name, its code."""
    params = config.preprocessor_params
    file = Path(config.preprocess.partition(":")[0])
    return repr((params, files_in(params), file.read_text() if file.is_file() else ""))


def benchmark_bins(width, config):
    """How many bins a window of `width` samples has for preprocess=preprocess_neural_data."""
    step = config.preprocessor_params.get("num_average_samples", 32)
    if width % step:
        raise InputError(f"num_average_samples={step} does not divide a window of {width} samples")
    return width // step


PREPROCESSORS = {
    "preprocess_neural_data": registry.preprocess_neural_data,
    "foundation_model_preprocessing_fn": f"{FOUNDATION}:frozen_latents",
    "foundation_model_input": f"{FOUNDATION}:EncoderInput",
}


def spectrum(samples, sfreq, config):
    """(words, electrodes * frequencies, segments): log power of samples (words, electrodes, T)."""
    size = max(4, min(samples.shape[2], round(config.spectrum_segment * sfreq)))
    frequencies, _, power = scipy.signal.spectrogram(samples, sfreq, "hann", size, size // 2)
    kept = (frequencies > 0) & (frequencies <= config.spectrum_max)
    if not kept.any():
        lowest = f"{frequencies[1]:g} Hz, the lowest frequency of spectrum_segment="
        raise InputError(f"spectrum_max={config.spectrum_max:g} Hz is below {lowest}")
    power = np.log(np.maximum(power[:, :, kept], np.finfo(np.float32).tiny))
    return power.reshape(len(samples), -1, power.shape[-1]).astype(np.float32)


def lag_by_lag(inputs, rows, lags):
    """(lag, {name: windows (words, ...)}) of {name: Windows}, one lag after the other.

    Bins are cut at as many lags at once as half a gigabyte holds, all else lag by lag.
    """
    size = 1
    if all(windows.are_bins for windows in inputs.values()):
        windows = next(iter(inputs.values()))
        n_values = rows.shape[1] * len(windows.montage.names) * len(windows.edges)
        size = max(1, int(5e8 / (4 * n_values)))
    for begin in range(0, len(lags), size):
        some = lags[begin : begin + size]
        cut = {name: windows.at(rows, some) for name, windows in inputs.items()}
        for i, lag in enumerate(some):
            yield lag, {name: arrays[i] for name, arrays in cut.items()}


def files_in(params):
    """(path, size, time of change) of every file that parameters name: a new file, new content."""
    files = []
    for value in params.values():
        if isinstance(value, str) and value and Path(value).exists():
            files += [Path(value), *sorted(Path(value).rglob("*"))]
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


# ---- targets


@dataclass
class Target:
    """What is read out of the recordings: one row an event, in the order of time.

    kind: vectors, values (N, D) float32; classes, values (N,) int64; or number, (N, 1) float32.
    start: (N,) s; labels: (N,) which events are the same word; names: of the classes; notes:
    {reason: how many events were left out for it}.
    """

    kind: str
    values: np.ndarray
    start: np.ndarray
    labels: np.ndarray
    names: list = field(default_factory=list)
    notes: dict = field(default_factory=dict)

    def only(self, kept, reason):
        """The target of the events `kept` (N,) bool; the others are counted under `reason`."""
        notes = {**self.notes, reason: int((~kept).sum())}
        values, start, labels = self.values[kept], self.start[kept], self.labels[kept]
        return replace(self, values=values, start=start, labels=labels, notes=notes)


def make_target(run, config, podcast):
    """The Target of task=. Raises InputError."""
    events = podcast.words
    if config.task == "embedding":
        values = word_vectors(run, config, podcast, config.embedding[0])
    elif config.task in TASKS:
        events, values = TASKS[config.task](podcast, config.window)
    else:
        events, values = own_task(config, podcast)
    return as_target(events, values, config.word)


def as_target(events, values, word):
    """A Target of values, one an event; events without an onset or a value are left out.

    events: DataFrame with start (s) and, where they are words, the column `word`.
    """
    values = np.asarray(values)
    if values.ndim == 2:
        kind, known = "vectors", np.isfinite(values).all(axis=1)
    elif values.dtype.kind == "f":
        kind, known, values = "number", np.isfinite(values), values[:, None]
    else:
        kind, known = "classes", ~np.isin(values.astype(str), ["", "nan", "None"])
    labels = np.arange(len(events)).astype(str)
    if word in events:
        labels = events[word].to_numpy(str)
    if kind == "vectors":
        known &= labels != ""
    start = events.start.to_numpy(float)
    order = np.argsort(start, kind="stable")
    known = known[order]
    target = Target(kind, values[order], start[order], labels[order])
    timed = np.isfinite(target.start)
    target = target.only(timed, "without onset").only(known[timed], "without target")
    if len(target.start) == 0:
        raise InputError("no word has an onset and a target: look at task= and embedding=")
    if kind == "classes":
        names, target.values = np.unique(target.values.astype(str), return_inverse=True)
        return replace(target, names=names.tolist())
    return replace(target, values=target.values.astype(np.float32))


def own_task(config, podcast):
    """(events, values) that a user's function(words, task_params) gives, checked."""
    result = resolve(config.task, TASKS, "task")(podcast.words.copy(), config.task_params)
    if isinstance(result, pd.DataFrame):
        check_keys(["start", "target"], result, f"task={config.task}")
        return result, np.stack(list(result.target))
    values = np.asarray(result)
    if len(values) != len(podcast.words) or values.ndim > 2:
        raise InputError(
            f"task={config.task} returned shape {values.shape} for {len(podcast.words)} words: "
            "return a target a word, (words,) or (words, D), or a table with start and target"
        )
    return podcast.words, values


def word_vectors(run, config, podcast, name):
    """(words, D) float32, NaN where there is none, of one entry of embedding=.

    name: released features of the set (gpt2-xl), lm (states of lm= at layer= as it reads the
    transcript), static (lm='s embeddings of tokens), arbitrary (a random vector a word), or a file.
    """
    words = podcast.words
    features = podcast.meta.get("features", {})
    spoken = words.word.astype(str).tolist()
    labels = words[config.word].astype(str)
    if name == "arbitrary":
        return arbitrary_vectors(labels, config.pca or 50, config.seed)
    if name == "lm":
        return contextual_vectors(HiddenStates(config.lm, run.device), spoken, config.layer)
    if name == "static":
        return static_vectors(HiddenStates(config.lm, run.device), spoken)
    if name in features:
        return released_features(podcast.folder, podcast.meta, name, config.layer, words.word_idx)
    if Path(name).is_file():
        return look_up(labels, name)
    raise InputError(
        f"embedding={name} is neither lm, static or arbitrary, nor one of the set's features "
        f"({', '.join(features)}), nor a file of vectors (glove.6B.50d.txt, say)"
    )


def arbitrary_vectors(labels, n_dims, seed):
    """(words, n_dims) uniform in (-1, 1): a random vector a word, whatever else is drawn."""
    vectors = {}
    for label in set(labels):
        rng = np.random.default_rng(key_seed(seed, "arbitrary", str(label)))
        vectors[label] = rng.uniform(-1, 1, n_dims).astype(np.float32)
    return np.stack([vectors[label] for label in labels])


# ---- folds


@dataclass
class Fold:
    """One split of the events: fitted on train, chosen on val, scored once on test (row numbers).

    shifts: (n_shifts,) in [0, 1), how far the null shifts the test words, `gap` words at least,
    which is how many share a window. Y: the target as this fold's decoders see it, (N, D) or
    classes (N,); projection: the mean, components and scale that made it.
    """

    number: int
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    shifts: np.ndarray
    gap: int = 1
    Y: np.ndarray | None = None
    projection: tuple = (0.0, 1.0, 1.0)


def make_folds(config, start, labels, width):
    """Folds of events in the order of time: start (N,) s, labels (N,), width of a window in s."""
    everyone = np.arange(len(start))
    tests = np.array_split(everyone, config.n_folds)
    if config.fold_type == "zero_shot":
        tests = deal_words(labels, config.n_folds, key_seed(config.seed, "folds"))
    gap = math.ceil(width / max(np.median(np.diff(start)), 1e-3)) + 1
    folds = []
    for k, test in enumerate(tests):
        rest = np.setdiff1d(everyone, test)
        val = rest[round((1 - VAL_SHARE) * len(rest)) :]
        if config.fold_type == "zero_shot":
            parts = deal_words(labels[rest], round(1 / VAL_SHARE), key_seed(config.seed, "val", k))
            val = rest[parts[0]]
        train = embargo(np.setdiff1d(rest, val), test, start, width)
        val = embargo(val, test, start, width)
        train = embargo(train, val, start, width)
        if min(len(train), len(val), len(test)) < 4:
            raise InputError(
                f"fold {k} of {len(start)} events has {len(train)} to train, {len(val)} to "
                f"validate and {len(test)} to test: take fewer n_folds or a smaller window"
            )
        shifts = np.random.default_rng(key_seed(config.seed, "shift", k)).random(config.n_shifts)
        folds.append(Fold(k, train, val, test, shifts, gap))
    return folds


def deal_words(labels, n_parts, seed):
    """Rows of labels in n_parts parts, no word in two of them."""
    words = np.random.default_rng(seed).permutation(np.unique(labels))
    return [np.flatnonzero(np.isin(labels, part)) for part in np.array_split(words, n_parts)]


def embargo(rows, others, start, width):
    """Those of `rows` whose windows share no sample with a window of `others`."""
    if len(others) == 0:
        return rows
    times = np.sort(start[others])
    at = np.searchsorted(times, start[rows])
    after = times[np.clip(at, 0, len(times) - 1)]
    before = times[np.clip(at - 1, 0, len(times) - 1)]
    distance = np.minimum(np.abs(start[rows] - after), np.abs(start[rows] - before))
    return rows[distance >= width - 1e-9]


def set_target(fold, target, config):
    """Set fold.Y: the target as this fold's decoders see it, by the training words alone."""
    if target.kind == "classes":
        fold.Y = target.values
        for part in ("train", "val", "test"):
            classes = np.unique(fold.Y[getattr(fold, part)])
            if len(classes) < 2:
                raise InputError(
                    f"task={config.task}: the {part} events of fold {fold.number} are all "
                    f"'{target.names[classes[0]]}': take fewer n_folds, or another task"
                )
    else:
        n_dims = config.pca if target.kind == "vectors" else 0
        fold.Y, fold.projection = project(target.values, fold.train, n_dims)


def project(values, train, n_dims):
    """(Y (N, D) float32, (mean, components, scale)) of values (N, D'), by the rows `train`.

    Y are the n_dims principal components (0: all dimensions, as they are), in one unit for all.
    """
    mean = values[train].mean(axis=0, dtype=np.float64)
    components = np.eye(values.shape[1])
    if n_dims:
        components = np.linalg.svd(values[train] - mean, full_matrices=False)[2][:n_dims].T
    y = (values - mean) @ components
    scale = math.sqrt(y[train].var(axis=0).mean()) or 1.0
    return (y / scale).astype(np.float32), (mean, components, scale)


# ---- decoders


class EnsemblePitomModel(nn.Module):
    """Convolutional decoder of Goldstein et al. 2022: an ensemble, whose outputs the loss averages.

    (words, input_channels, bins) -> (words, num_models, output_dim). A member is one group of every
    convolution; published are 10 members of 128 filters. reg, reg_head: L2 on convolutions, head.
    """

    norm_output = True  # layer norm, then tanh, as published; off where the target is no embedding

    def __init__(
        self,
        num_models=4,
        input_channels=64,
        output_dim=50,
        conv_filters=32,
        reg=0.0,
        reg_head=0.0,
        dropout=0.2,
    ):
        super().__init__()
        width = num_models * conv_filters
        self.num_models, self.reg, self.reg_head = num_models, reg, reg_head
        self.conv1 = nn.Conv1d(input_channels, width, kernel_size=3, bias=False)
        self.conv2 = nn.Conv1d(width, width, kernel_size=2, groups=num_models, bias=False)
        self.conv3 = nn.Conv1d(width, width, kernel_size=2, groups=num_models)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv1d(width, num_models * output_dim, kernel_size=1, groups=num_models)
        self.gain = nn.Parameter(torch.ones(num_models, output_dim))
        self.shift = nn.Parameter(torch.zeros(num_models, output_dim))

    def forward(self, x):
        x = self.dropout(self.norms[0](F.relu(self.conv1(x))))
        x = F.max_pool1d(x, kernel_size=2, padding=1)
        x = self.dropout(self.norms[1](F.relu(self.conv2(x))))
        x = F.relu(self.norms[2](self.conv3(x)))
        x = x.amax(dim=-1, keepdim=True)  # over time
        x = self.head(x).view(len(x), self.num_models, -1)  # (words, members, output_dim)
        if self.norm_output:
            x = torch.tanh(F.layer_norm(x, x.shape[-1:]) * self.gain + self.shift)
        return x

    def penalty(self):
        if self.reg == self.reg_head == 0:
            return 0.0
        penalty = self.reg_head * self.head.weight.square().sum()
        for conv in (self.conv1, self.conv2, self.conv3):
            penalty = penalty + self.reg * conv.weight.square().sum()
        return penalty


class PitomModel(EnsemblePitomModel):
    """One member."""

    def __init__(
        self, input_channels=64, output_dim=50, conv_filters=32, reg=0.0, reg_head=0.0, dropout=0.2
    ):
        super().__init__(1, input_channels, output_dim, conv_filters, reg, reg_head, dropout)


class MLP(nn.Module):
    """Linear and layer norm in turns, ReLU and dropout: (words, ...) -> (words, output_dim).

    layer_sizes: from the number of inputs to that of outputs; none: one layer of 128 between.
    """

    norm_output = True  # layer norm at the end; off where the target is no embedding

    def __init__(self, layer_sizes=None, input_shape=(), output_dim=50, dropout=0.2):
        super().__init__()
        sizes = layer_sizes or [math.prod(input_shape), 128, output_dim]
        layers = [nn.Flatten()]
        for n_in, n_out in zip(sizes[:-2], sizes[1:-1]):
            layers += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
        self.norm = nn.LayerNorm(sizes[-1])

    def forward(self, x):
        x = self.layers(x)
        return self.norm(x) if self.norm_output else x


class LinearDecoder(nn.Module):
    """(words, ...) -> (words, output_dim), for the closed forms: they set its weights."""

    def __init__(self, input_shape=(), output_dim=50):
        super().__init__()
        self.linear = nn.Linear(math.prod(input_shape), output_dim)

    def forward(self, x):
        return self.linear(x.flatten(1))

    def set(self, weights, offset):
        """weights: (inputs, output_dim); offset: (output_dim,)."""
        with torch.no_grad():
            self.linear.weight.copy_(torch.as_tensor(weights).T)
            self.linear.bias.copy_(torch.as_tensor(offset))


# A decoder is a torch module: (words, *input_shape) -> (words, output_dim), or (words, members,
# output_dim), an ensemble, of which the mean is trained and cosines are averaged. Its __init__ gets
# those of model_params that it names, and of input_shape, input_channels (the first of it) and
# output_dim where it names them. A constructor in a user's file gets all in one dictionary.
# Two things are looked for on the module: penalty() is added to the loss; norm_output is set to
# whether the target is an embedding.
DECODERS = {
    "ensemble_pitom_model": EnsemblePitomModel,
    "pitom_model": PitomModel,
    "foundation_mlp": MLP,
    "foundation_finetune": f"{FOUNDATION}:FineTune",
    "ridge": LinearDecoder,
    "linear": LinearDecoder,
    "logistic": LinearDecoder,
}


def build_network(spec, model_params, input_shape, output_dim):
    """The module of a decoder, see DECODERS. Raises InputError."""
    constructor = resolve(spec, DECODERS, "model")
    params = {
        "input_shape": list(input_shape),
        "input_channels": input_shape[0],
        "output_dim": output_dim,
        "embedding_dim": output_dim,  # podcast-benchmark's name of it
    }
    if spec not in DECODERS:
        network = constructor({**params, **model_params})
        if not isinstance(network, nn.Module):
            raise InputError(f"model={spec} returned {type(network).__name__}, no torch.nn.Module")
        return network
    named = inspect.signature(constructor).parameters
    check_keys(model_params, {*params, *named}, "model_params")
    params.update(model_params)
    return constructor(**{key: params[key] for key in named if key in params})


class Decoder(nn.Module):
    """A network behind the z-scores of its inputs, from any unit: what is trained, saved, applied.

    (words, *input_shape) -> (words, members, output_dim).
    """

    def __init__(self, spec, model_params, input_shape, output_dim, kind):
        super().__init__()
        self.spec, self.output_dim = spec, output_dim
        self.network = build_network(spec, model_params, input_shape, output_dim)
        if hasattr(self.network, "norm_output"):
            self.network.norm_output = kind == "vectors"
        channels = (input_shape[0], 1) if len(input_shape) == 2 else input_shape
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        try:
            self.eval()(torch.zeros(2, *input_shape))
        except RuntimeError as error:
            shape = "x".join(str(n) for n in input_shape)
            raise InputError(
                f"model={spec} cannot read {shape} inputs a word "
                f"({' '.join(str(error).split())}): set bins=, window= or model_params="
            ) from None

    def set_scale(self, x):
        """z-scores of training words x (words, ...): a channel's where there is time, else all."""
        axes = (0, 2) if x.ndim == 3 else 0
        scale = x.std(axes, keepdims=True, dtype=np.float64)[0]
        self.mean.copy_(torch.as_tensor(x.mean(axes, keepdims=True, dtype=np.float64)[0]))
        self.scale.copy_(torch.as_tensor(np.where(scale > 0, scale, 1)))

    def forward(self, x):
        out = self.network((x - self.mean) / self.scale)
        if out.ndim == 1:
            out = out[:, None]
        if out.ndim == 2:
            out = out[:, None]
        if out.ndim != 3 or (len(out), out.shape[2]) != (len(x), self.output_dim):
            raise InputError(
                f"model={self.spec} returned shape {tuple(out.shape)} for {len(x)} words: "
                f"(words, {self.output_dim}) or (words, members, {self.output_dim}) is wanted"
            )
        return out


# ---- training


def fit_decoder(spec, model_params, X, target, fold, config):
    """(Decoder, its outputs for the validation words, epochs); X: (words, ...), a tensor."""
    output_dim = len(target.names) or fold.Y.shape[1]
    torch.manual_seed(key_seed(config.seed, spec, fold.number))
    decoder = Decoder(spec, model_params, X.shape[1:], output_dim, target.kind).to(X.device)
    if config.preprocess != "foundation_model_input":  # which has units of its own
        decoder.set_scale(X[fold.train].cpu().numpy())
    if spec not in CLOSED_FORM:
        epochs = train(decoder, X, target, fold, config)
        return decoder, predict(decoder, X[fold.val]), epochs
    if spec == "logistic" and target.kind != "classes":
        raise InputError("model=logistic is for classes (task=content, say): take ridge")
    x = ((X - decoder.mean) / decoder.scale).flatten(1).cpu().numpy()
    y = fold.Y
    if target.kind == "classes" and spec != "logistic":
        y = np.eye(output_dim, dtype=np.float32)[y]
    return decoder, CLOSED_FORM[spec](decoder, x, y, fold)[:, None], 0


def train(decoder, X, target, fold, config):
    """Train by AdamW until patience= epochs have not improved the validation words.

    The best epoch's weights stay; its number is returned.
    """
    y = torch.as_tensor(fold.Y, device=X.device)
    weights = None
    if target.kind == "classes":  # all classes count the same
        counts = torch.bincount(y[fold.train], minlength=decoder.output_dim).clamp_min(1)
        weights = len(fold.train) / (decoder.output_dim * counts)
    optimizer = torch.optim.AdamW(
        decoder.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    penalty = getattr(decoder.network, "penalty", None)
    size = min(config.batch_size, len(fold.train))
    best, best_epoch = -math.inf, 0
    for epoch in range(1, config.epochs + 1):
        decoder.train()
        rng = np.random.default_rng(key_seed(config.seed, "order", fold.number, epoch))
        order = torch.as_tensor(rng.permutation(fold.train), device=X.device)
        for rows in order[: len(order) // size * size].split(size):
            loss = loss_of(decoder(X[rows]), y[rows], target.kind, config, weights)
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        score = validation_score(predict(decoder, X[fold.val]), fold.Y[fold.val], target.kind)
        if not math.isfinite(score):
            raise InputError(
                f"model={decoder.spec}: not finite in epoch {epoch} of fold {fold.number}: try a "
                "smaller learning_rate"
            )
        if score > best:
            best, best_epoch = score, epoch
            best_state = {name: value.clone() for name, value in decoder.state_dict().items()}
        elif epoch - best_epoch >= config.patience:
            break
    decoder.load_state_dict(best_state)
    return best_epoch


def loss_of(out, y, kind, config=None, weights=None):
    """Loss of the members' mean: out (words, members, D), y (words, D) or classes (words,)."""
    mean = out.mean(dim=1)
    if kind == "classes":
        return F.cross_entropy(mean, y, weights)
    if kind == "number" or config.loss == "mse":
        return F.mse_loss(mean, y)
    return (1 - F.cosine_similarity(mean, y)).mean()


def validation_score(out, y, kind):
    """What training stops by, larger is better: the members' mean cosine, or minus the loss."""
    if kind == "vectors":
        return float((unit(out) * unit(y)[:, None]).sum(axis=-1).mean())
    return -float(loss_of(torch.as_tensor(out), torch.as_tensor(y), kind))


@torch.no_grad()
def predict(decoder, X):
    """(words, members, output_dim), an array, of a tensor X (words, ...)."""
    decoder.eval()
    return torch.cat([decoder(x) for x in X.split(512)]).float().cpu().numpy()


def fit_ridge(decoder, x, y, fold):
    """himalaya's ridge: each output's alpha is the one that predicts the validation words best.

    The fit is on training and validation words; returned are the validation words' predictions by
    a fit on the training words.
    """
    rows = np.concatenate([fold.train, fold.val])
    n = len(fold.train)
    split = [(np.arange(n), np.arange(n, len(rows)))]
    options = {"fit_intercept": True, "warn": False}
    alphas, weights, _, offset = solve_ridge_cv_svd(x[rows], y[rows], ALPHAS, cv=split, **options)
    decoder.network.set(weights, offset)
    weights, offset = solve_ridge_svd(x[fold.train], y[fold.train], alphas, **options)
    return x[fold.val] @ weights + offset


def fit_least_squares(decoder, x, y, fold):
    """As fit_ridge, without a penalty."""
    rows = np.concatenate([fold.train, fold.val])
    fit = LinearRegression().fit(x[rows], y[rows])
    decoder.network.set(fit.coef_.T, fit.intercept_)
    return LinearRegression().fit(x[fold.train], y[fold.train]).predict(x[fold.val])


def fit_logistic(decoder, x, y, fold):
    """scikit-learn's logistic regression of training words, its C chosen on validation words."""
    basis = np.eye(x.shape[1], dtype=x.dtype)
    if x.shape[1] > len(fold.train):  # the solution lies in the span of the training rows
        basis = np.linalg.qr(x[fold.train].T)[0]
    x = x @ basis
    best = -math.inf
    for C in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        fit = LogisticRegression(C=C, max_iter=2000, class_weight="balanced")
        fit.fit(x[fold.train], y[fold.train])
        weights = np.zeros((x.shape[1], decoder.output_dim))
        offset = np.full(decoder.output_dim, -30.0)  # a class that no training word has
        if len(fit.classes_) == 2:  # scikit-learn gives the second one's
            weights[:, fit.classes_[1]] = fit.coef_[0]
            offset[fit.classes_] = 0.0, fit.intercept_[0]
        else:
            weights[:, fit.classes_] = fit.coef_.T
            offset[fit.classes_] = fit.intercept_
        logits = x[fold.val] @ weights + offset
        score = validation_score(logits[:, None], y[fold.val], "classes")
        if score > best:
            best, best_logits = score, logits
            decoder.network.set(basis @ weights, offset)
    return best_logits


CLOSED_FORM = {"ridge": fit_ridge, "linear": fit_least_squares, "logistic": fit_logistic}


# ---- scores


@dataclass
class Score:
    """A metric's value with its 95 % interval, its values for shifted words, and n."""

    value: float
    low: float
    high: float
    null: np.ndarray
    n: int


PRIMARY = {"vectors": "auc", "classes": "roc_auc", "number": "corr"}  # chooses the lag
LOWER_IS_BETTER = {"word_rank", "perplexity", "occ_perplexity", "mse", "cross_entropy"}
NO_SHIFTS = np.zeros(0)


def unit(x):
    """Vectors of length 1 (a vector of zeros stays)."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def circular(shifts, n, gap):
    """(1 + P, n) orders of n words: as they are, then shifted in a circle, by at least `gap` words.

    shifts: (P,) in [0, 1). A shift keeps what neighbouring words have in common.
    """
    gap = min(gap, n // 4)
    steps = gap + (shifts * max(1, n - 2 * gap)).astype(int)
    return (np.arange(n) + np.concatenate([[0], steps])[:, None]) % n


def word_auc(scores, y, orders):
    """ROC-AUC of every class against the rest, for each reordering of the labels: (P, V).

    scores: (N, V) of items for classes; y: (N,) classes; orders: (P, N), item i counting as one of
    class y[orders[p, i]]. NaN where a class is absent or alone. No reordering changes the ranks:
    AUC = (sum of the class's ranks - n (n + 1) / 2) / (n (N - n)), tied items sharing their rank.
    """
    N, V = scores.shape
    ranks = scipy.stats.rankdata(scores, axis=0)
    labels = y[orders]
    cells = labels + V * np.arange(len(orders))[:, None]
    sums = np.bincount(cells.ravel(), ranks[np.arange(N), labels].ravel(), V * len(orders))
    n = np.bincount(y, minlength=V)
    with np.errstate(all="ignore"):
        return (sums.reshape(-1, V) - n * (n + 1) / 2) / (n * (N - n))


class WordScorer:
    """Scores predicted vectors of some rows (a fold's validation or test words) as words.

    A word's vector is the mean of its unit embeddings over training words (in zero-shot folds over
    the rows themselves); candidates are the words of the rows that have one. For 2AFC, cosine and
    metrics that begin with occ_, candidates are the embeddings of the rows themselves.
    """

    def __init__(self, fold, rows, labels, config):
        zero_shot = config.fold_type == "zero_shot"
        source = rows if zero_shot else fold.train
        means = pd.DataFrame(unit(fold.Y[source])).groupby(labels[source]).mean()
        self.words = np.intersect1d(labels[rows], means.index)
        if len(self.words) == 0:
            raise InputError(f"fold {fold.number}: no word was in training: take fewer n_folds")
        self.vectors = means.loc[self.words].to_numpy()
        self.occurrences = unit(fold.Y[rows])
        self.has_word = np.isin(labels[rows], self.words)
        self.y = np.searchsorted(self.words, labels[rows][self.has_word])
        trained = pd.Series(labels[fold.train]).value_counts()
        self.n_trained = trained.reindex(self.words, fill_value=0).to_numpy()
        self.n_trained_of_rows = trained.reindex(labels[rows], fill_value=0).to_numpy()
        self.n_spoken = np.bincount(self.y, minlength=len(self.words))
        self.counted = (self.n_spoken if zero_shot else self.n_trained) >= config.min_count
        self.gap = fold.gap

    def similarities(self, out):
        """Cosines of outputs (N, members, D), members averaged: to words (n, V), to rows (N, N)."""
        mean = unit(out).mean(axis=1)
        return mean[self.has_word] @ self.vectors.T, mean @ self.occurrences.T

    def frequencies(self):
        """In place of similarities: for whoever says the most frequent words, whatever is heard."""
        words = np.tile(np.log(self.n_trained + 0.5), (len(self.y), 1))
        return words, np.tile(np.log(self.n_trained_of_rows + 0.5), (len(self.has_word), 1))

    def aucs(self, words, shifts, kept=slice(None)):
        """{metric: (1 + shifts,)}: mean AUC of words, plain and weighted by their frequency.

        words: (n, V) similarities; kept: of its rows.
        """
        log_p = scipy.special.log_softmax(words[kept], axis=1)
        y = self.y[kept]
        each = word_auc(log_p, y, circular(shifts, len(y), self.gap))
        weights = {"auc": np.ones(len(self.words)), "auc_train": self.n_trained}
        weights["auc_test"] = self.n_spoken
        values = {}
        for metric, weight in weights.items():
            weight = weight * self.counted * np.isfinite(each)
            total = weight.sum(axis=1)
            values[metric] = np.nansum(each * weight, axis=1) / np.maximum(total, 1e-12)
            values[metric][total == 0] = 0.5
        return values

    def all_metrics(self, words, pairs, temperatures):
        """measure(kept, shifts) -> {metric: (1 + shifts,)} over the rows `kept`, (N,) bool.

        words, pairs: similarities to words and to rows; temperatures: factors on them.
        """
        word_table = rank_table(words, temperatures[0])
        word_table["word_rank"] = word_table.pop("rank")
        pair_table = {f"occ_{name}": x for name, x in rank_table(pairs, temperatures[1]).items()}
        pair_table["two_afc"] = 1 - (pair_table.pop("occ_rank") - 1) / max(1, len(pairs) - 1)
        pair_table["cosine"] = pairs

        def measure(kept, shifts):
            values = self.aucs(words, shifts, kept[self.has_word])
            values |= shifted_means(word_table, self.y, kept[self.has_word], shifts, self.gap)
            values |= shifted_means(pair_table, np.arange(len(pairs)), kept, shifts, self.gap)
            return values

        return measure


def rank_table(scores, temperature):
    """{metric: (rows, candidates)}: what each candidate would score if it were the right one."""
    lowest = scipy.stats.rankdata(-scores, method="min", axis=1)
    tied = scipy.stats.rankdata(-scores, method="max", axis=1) - lowest + 1
    table = {"rank": lowest + (tied - 1) / 2}
    for k in TOP_K:  # ties share, as if they were broken at random
        table[f"top{k}"] = np.clip((k + 1 - lowest) / tied, 0, 1)
    table["perplexity"] = -scipy.special.log_softmax(temperature * scores, axis=1)
    return table


def shifted_means(table, right, kept, shifts, gap):
    """{metric: (1 + shifts,)}: mean over the rows `kept` of a table's `right`, shifted."""
    rows = np.flatnonzero(kept)
    right = right[rows][circular(shifts, len(rows), gap)]
    values = {}
    for metric, scores in table.items():
        values[metric] = scores[rows, right].mean(axis=1)
        if metric.endswith("perplexity"):
            values[metric] = np.exp(values[metric])
    return values


def likeliest_temperature(scores, right):
    """The factor on scores (rows, candidates) that makes the right candidates likeliest."""
    factors = np.geomspace(0.1, 100, 40)
    likelihood = []
    for factor in factors:
        log_p = scipy.special.log_softmax(factor * scores, axis=1)
        likelihood.append(log_p[np.arange(len(right)), right].mean())
    return factors[np.argmax(likelihood)]


def measure_classes(out, y, names, orders):
    """{metric: (P,)} of outputs (n, K) for classes y (n,), reordered by orders (P, n).

    ROC-AUC is that of the second of two classes, or the mean over classes, each against the rest.
    """
    n_classes = len(names)
    log_p = scipy.special.log_softmax(out, axis=1)
    auc = word_auc(log_p, y, orders)
    if n_classes == 2:
        auc = auc[:, 1:]
    truth = y[orders]
    answers = log_p.argmax(axis=1)
    cells = (np.arange(len(orders))[:, None] * n_classes + truth) * n_classes + answers
    confusion = np.bincount(cells.ravel(), minlength=len(orders) * n_classes**2)
    confusion = confusion.reshape(-1, n_classes, n_classes).astype(float)  # (P, truth, answers)
    hits = confusion.diagonal(axis1=1, axis2=2)
    n_true, n_answers = confusion.sum(axis=2), confusion.sum(axis=1)
    recall, precision = hits / np.maximum(n_true, 1), hits / np.maximum(n_answers, 1)
    present = n_true[0] > 0
    f1 = 2 * hits / np.maximum(n_true + n_answers, 1)
    values = {
        "roc_auc": np.nan_to_num(auc[:, np.isfinite(auc[0])].mean(axis=1), nan=0.5),
        "accuracy": hits.sum(axis=1) / len(y),
        "balanced_accuracy": recall[:, present].mean(axis=1),
        "f1": f1[:, present].mean(axis=1),
        "cross_entropy": -log_p[np.arange(len(y)), truth].mean(axis=1),
    }
    if n_classes == 2:
        for k, name in enumerate(names):
            values[f"recall_{name}"] = recall[:, k]
            values[f"precision_{name}"] = precision[:, k]
    return values


def measure_numbers(out, y, orders):
    """{metric: (P,)} of numbers out (n,) for y (n,), reordered by orders (P, n)."""
    y = y[orders]
    a, b = out - out.mean(), y - y.mean(axis=1, keepdims=True)
    mse = np.square(y - out).mean(axis=1)
    corr = b @ a / np.maximum(np.linalg.norm(a) * np.linalg.norm(b, axis=1), 1e-12)
    return {"corr": corr, "r2": 1 - mse / np.maximum(y.var(axis=1), 1e-12), "mse": mse}


def other_metrics(out, rows, target, fold):
    """measure(kept, shifts), as WordScorer.all_metrics, for targets that are no vectors."""
    out = out.mean(axis=1)
    y = fold.Y[rows]

    def measure(kept, shifts):
        orders = circular(shifts, int(kept.sum()), fold.gap)
        if target.kind == "classes":
            return measure_classes(out[kept], y[kept], target.names, orders)
        return measure_numbers(out[kept, 0], y[kept, 0], orders)

    return measure


def primary_scores(out, rows, target, fold, config, shifts=NO_SHIFTS):
    """(1 + shifts,) of the metric that chooses lags, for outputs (rows, members, D)."""
    if target.kind == "vectors":
        scorer = WordScorer(fold, rows, target.labels, config)
        return scorer.aucs(scorer.similarities(out)[0], shifts)["auc"]
    measure = other_metrics(out, rows, target, fold)
    return measure(np.ones(len(rows), bool), shifts)[PRIMARY[target.kind]]


def evaluate(val, test, target, fold, config):
    """{metric: Score} of outputs (words, members, D) for the test events.

    Those for the validation events (val) set the temperature of the perplexities.
    """
    if target.kind != "vectors":
        return with_intervals(other_metrics(test, fold.test, target, fold), fold, len(test))
    on_val = WordScorer(fold, fold.val, target.labels, config)
    words, pairs = on_val.similarities(val)
    temperatures = [likeliest_temperature(words, on_val.y)]
    temperatures.append(likeliest_temperature(pairs, np.arange(len(pairs))))
    on_test = WordScorer(fold, fold.test, target.labels, config)
    measure = on_test.all_metrics(*on_test.similarities(test), temperatures)
    return with_intervals(measure, fold, len(on_test.y))


def with_intervals(measure, fold, n):
    """{metric: Score} of measure(kept, shifts): jackknife over ten stretches of the test words."""
    everyone = np.ones(len(fold.test), bool)
    values = measure(everyone, fold.shifts)
    parts = []
    for stretch in np.array_split(np.arange(len(fold.test)), min(10, len(fold.test))):
        kept = everyone.copy()
        kept[stretch] = False
        parts.append(measure(kept, NO_SHIFTS))
    scores = {}
    for metric, (value, *null) in values.items():
        left = np.array([part[metric][0] for part in parts])
        half = 1.96 * math.sqrt((len(left) - 1) * left.var())
        scores[metric] = Score(value, value - half, value + half, np.array(null), n)
    return scores


def p_value(observed, null, lower=False):
    """One-sided p of observed (...) under null (P, ...); NaN where either is not a number."""
    as_good = (null <= observed) if lower else (null >= observed)
    p = (1 + as_good.sum(axis=0)) / (len(null) + 1)
    return np.where(np.isfinite(observed) & np.isfinite(null).all(axis=0), p, np.nan)


def fdr_q(p):
    """q of p values (Benjamini and Hochberg); NaN stays NaN and does not count."""
    q = np.full(np.shape(p), np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = mne.stats.fdr_correction(p[known])[1]
    return q


def say_few_shifts(run, p, q, n_shifts):
    """Say where p cannot be small enough for FDR, however good a score is."""
    if np.any((p <= 1 / (n_shifts + 1)) & (q >= FDR)):
        n = np.isfinite(p).sum()
        run.print(
            f"n_shifts={n_shifts} is too few: p cannot be below 1/{n_shifts + 1}, which does not "
            f"pass FDR {FDR:g} over {n} tests; give n_shifts={math.ceil(n / FDR)}"
        )


def over_folds(scores):
    """(mean, low, high): 95 % t interval over folds."""
    half = scipy.stats.t.ppf(0.975, len(scores) - 1) * scipy.stats.sem(scores)
    return np.mean(scores), np.mean(scores) - half, np.mean(scores) + half


# ---- controls


def mean_vector(target, fold):
    """The mean of the training words, whatever is heard (of classes, their frequencies)."""
    y = fold.Y[fold.train]
    if target.kind == "classes":
        guess = np.log(np.bincount(y, minlength=len(target.names)) + 0.5)
    elif target.kind == "vectors":
        guess = unit(y).mean(axis=0)
    else:
        guess = y.mean(axis=0)
    return np.tile(guess, (len(fold.val), 1, 1)), np.tile(guess, (len(fold.test), 1, 1))


def preceding_words(target, fold):
    """Ridge on the embeddings of the three words before, no brain."""
    before = []
    for k in (1, 2, 3):
        before.append(np.zeros_like(fold.Y))
        before[-1][k:] = fold.Y[:-k]
    x = torch.as_tensor(np.concatenate(before, axis=1))
    decoder = Decoder("ridge", {}, x.shape[1:], fold.Y.shape[1], target.kind)
    val = fit_ridge(decoder, x.numpy(), fold.Y, fold)
    return val[:, None], predict(decoder, x[fold.test])


def oracle(target, fold):
    """The true embedding: what the scorer can give at most."""
    return fold.Y[fold.val][:, None], fold.Y[fold.test][:, None]


def most_frequent_words(target, fold, config):
    """{metric: Score} of whoever says the most frequent training words, whatever is heard."""
    scorer = WordScorer(fold, fold.test, target.labels, config)
    measure = scorer.all_metrics(*scorer.frequencies(), (1.0, 1.0))
    scores = with_intervals(measure, fold, len(scorer.y))
    for metric in ("cosine", "perplexity", "occ_perplexity"):  # frequencies are no cosines
        del scores[metric]
    return scores


CONTROLS = {
    "mean": mean_vector,
    "unigram": most_frequent_words,
    "preceding": preceding_words,
    "oracle": oracle,
    "arbitrary": "ridge from the brain to a random vector a word, at every lag",
}


def run_controls(config, target, fold):
    """{control: ({metric: Score}, 0)} of the controls that read no brain, and so have no lag."""
    results = {}
    for name in config.controls:
        if name == "unigram" and target.kind == "vectors":
            results[name] = most_frequent_words(target, fold, config), 0.0
        elif name == "mean" or (name in ("preceding", "oracle") and target.kind == "vectors"):
            val, test = CONTROLS[name](target, fold)
            results[name] = evaluate(val, test, target, fold, config), 0.0
    return results


# ---- every lag and fold


@dataclass
class Experiment:
    """What all lags and folds share.

    inputs: {name: Windows}, what decoders read under '', what twins of untrained= read under their
    names; rows: (people, words) where the words begin; keys: what rows of results.csv say of it.
    """

    podcast: Podcast
    target: Target
    inputs: dict
    rows: np.ndarray
    folds: list
    keys: dict


def prepare(run, config):
    """The Experiment that the options describe."""
    podcast = load_podcast(run, config)
    target = make_target(run, config, podcast)
    if config.config_setter:
        change_settings(config, podcast.montage, target)
    inputs = make_inputs(run, config, podcast.montage)
    target, rows = keep_words(target, inputs[""], all_lags(config), config)
    width = inputs[""].width / podcast.montage.sfreq
    folds = make_folds(config, target.start, target.labels, width)
    for fold in folds:
        set_target(fold, target, config)
    run.print(describe(podcast, target, folds))
    run.content = content_of(config, inputs[""], target, rows)
    keys = {"data": podcast.source, "target": name_of_target(config, podcast)}
    return Experiment(podcast, target, inputs, rows, folds, keys)


def change_settings(config, montage, target):
    """Let a config setter, f(config, raws, words, embeddings) -> config, change the options.

    config is podcast-benchmark's nested one; what the setter leaves alone stays as it is.
    """
    setter = resolve(config.config_setter, SETTERS, "config_setter")
    experiment = benchmark_yaml.experiment_config(asdict(config))
    words = pd.DataFrame({"word": target.labels, "start": target.start})
    experiment = registry.call_setter(setter, experiment, montage, words, target.values)
    settings = benchmark_yaml.settings_of(experiment, f"config_setter={config.config_setter}")
    options = benchmark_yaml.translate(settings, config.config_setter, defaults=False)
    for option, value in options.items():
        setattr(config, option, value)


SETTERS = {
    "neural_conv": registry.neural_conv,
    "foundation_model": f"{FOUNDATION}:foundation_model",
}


def make_inputs(run, config, montage):
    """Experiment.inputs. Ridge alone reads the twins: untrained encoders, windows as they are."""
    cache = run.out.parent / "cache"
    inputs = {"": Windows(montage, config, cache)}
    reader = inputs[""].reader
    if reader and reader.description:
        run.print(reader.description)
    config.model_params = {**getattr(reader, "model_params", {}), **config.model_params}
    if config.untrained and reader is None:
        raise InputError(
            f"untrained={config.untrained} needs preprocess=foundation_model_preprocessing_fn and "
            "a run folder of foundation.py"
        )
    for k in range(1, config.untrained + 1):
        params = {**config.preprocessor_params, "untrained": k}
        twin = replace(config, preprocessor_params=params)
        inputs[f"untrained {k}"] = Windows(montage, twin, cache)
    if config.untrained:
        inputs["raw signal"] = Windows(montage, replace(config, preprocess=""), cache)
    return inputs


def keep_words(target, windows, lags, config):
    """(target, rows (people, words)) of the words whose windows are recorded at every lag."""
    rows = windows.montage.rows(target.start)
    inside = np.ones(len(target.start), bool)
    for lag in lags:
        at_lag = windows.montage.inside(windows.first(rows, lag), windows.width)
        if not at_lag.any():
            raise InputError(
                f"at lag {lag:g} ms no word's window lies in the recording: narrow min_lag= and "
                "max_lag=, or window="
            )
        inside &= at_lag
    if inside.sum() < 10 * config.n_folds:
        raise InputError(
            f"{inside.sum()} words have their window in the recording at every lag from "
            f"{min(lags):g} to {max(lags):g} ms: too few for {config.n_folds} folds"
        )
    return target.only(inside, "with a window outside a recording at some lag"), rows[:, inside]


def describe(podcast, target, folds):
    """What is decoded from what, in a sentence."""
    left_out = [f"{n} {reason}" for reason, n in target.notes.items() if n]
    sizes = [(len(fold.train), len(fold.val), len(fold.test)) for fold in folds]
    return (
        f"{podcast.source}: {len(podcast.montage.names)} electrodes of "
        f"{len(podcast.montage.people)} people, {len(target.start):,} events at every lag, "
        f"{len(set(target.labels)):,} types ({', '.join(left_out) or 'none'} left out); per fold "
        "{:.0f} to train, {:.0f} to validate, {:.0f} to test".format(*np.mean(sizes, axis=0))
    )


def name_of_target(config, podcast):
    """How tables call what is decoded."""
    if config.task != "embedding":
        return config.task
    (name,) = config.embedding
    layers = podcast.meta.get("features", {}).get(name, {})
    if name == "lm" or any(key.startswith("layer-") for key in layers):
        return f"{name} layer {config.layer}"
    return name


def content_of(config, windows, target, rows):
    """A hash of what a result depends on and options only name: recordings, targets, files."""
    montage = windows.montage
    content = repr((montage.names, montage.checksums(), windows.key))
    digest = hashlib.sha256(content.encode())
    digest.update(rows.tobytes())
    if {"lm", "static"} & set(config.embedding):  # computed: known by files, not to the last bit
        digest.update(repr(files_in({"lm": config.lm})).encode())
    else:
        digest.update(target.values.tobytes())
    return digest.hexdigest()[:6]


class Store:
    """Finished jobs, a file each, so that a stopped run goes on and ranks share the work."""

    def __init__(self, run, keys):
        self.run, self.keys = run, keys
        self.folder = run.out / "jobs" / run.options_hash()
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, lag, fold):
        return self.folder / f"lag_{lag}_fold_{fold}.npz"

    def write(self, lag, fold, results):
        """results: {decoder: ({metric: Score}, validation score)}; the lag of controls is None."""
        arrays = {}
        for decoder, (scores, val_score) in results.items():
            arrays[f"{decoder}|val"] = np.array([val_score])
            for metric, score in scores.items():
                keys = {"model": decoder, "lag": lag, "fold": fold, "metric": metric, **self.keys}
                chance = score.null.mean()
                self.run.result(score.value, chance, score.low, score.high, score.n, **keys)
                arrays[f"{decoder}|{metric}"] = np.array([score.value, *score.null])
        with aside(self.path(lag, fold)) as file:
            np.savez(file, **arrays)

    def read(self, lags, n_folds):
        """{decoder: {metric: (lags, folds, 1 + shifts)}}; metric val: the validation scores."""
        files = []
        for lag in lags:
            files.append([dict(np.load(self.path(lag, fold))) for fold in range(n_folds)])
        results = {}
        for key in files[0][0]:
            decoder, metric = key.split("|")
            values = [[file[key] for file in row] for row in files]
            results.setdefault(decoder, {})[metric] = np.array(values)
        return results


def decoders_of(config, target, inputs):
    """[(its name in tables, decoder, name of its input)] of every lag and fold."""
    names = [config.model, *config.beside]
    if config.untrained:
        names.append("ridge")
    decoders = [(name, name, "") for name in dict.fromkeys(names)]
    decoders += [(f"ridge, {source}", "ridge", source) for source in inputs if source]
    if "arbitrary" in config.controls and target.kind == "vectors":
        decoders.append(("arbitrary", "ridge", ""))
    return decoders


def fit_and_score(run, config, experiment, X, fold, lag):
    """{decoder: ({metric: Score}, validation score)} of every decoder at one lag in one fold.

    X: {input: windows (words, ...)}.
    """
    target = experiment.target
    results = {}
    for name, spec, source in decoders_of(config, target, X):
        x = torch.as_tensor(X[source], device=run.device)
        job = fold
        if name == "arbitrary":
            vectors = arbitrary_vectors(target.labels, 50, config.seed)
            job = replace(fold, Y=vectors - vectors[fold.train].mean(axis=0))
        params = config.model_params if name == config.model else {}
        decoder, val, epochs = fit_decoder(spec, params, x, target, job, config)
        val_score = float(primary_scores(val, fold.val, target, job, config)[0])
        scores = evaluate(val, predict(decoder, x[fold.test]), target, job, config)
        results[name] = scores, val_score
        if config.save_models and name == config.model:
            facts = {"lag": float(lag), "epochs": epochs, "val": val_score}
            save_decoder(run, config, experiment, decoder, fold, facts)
    return results


def save_decoder(run, config, experiment, decoder, fold, facts):
    """models/lag_L_fold_K.pt for decode_apply.py: weights and z-scores, PCA, words, electrodes."""
    target = experiment.target
    vectors = pd.DataFrame()
    if target.kind == "vectors":
        vectors = pd.DataFrame(unit(fold.Y[fold.train]))
        vectors = vectors.groupby(target.labels[fold.train]).mean()
    mean, components, scale = fold.projection
    montage = experiment.podcast.montage
    state = {
        "kind": "decoder",
        "spec": decoder.spec,
        "weights": decoder.state_dict(),
        "output_dim": decoder.output_dim,
        "target": target.kind,
        "names": target.names or vectors.index.tolist() or ["value"],
        "vectors": torch.tensor(vectors.to_numpy(np.float32)),
        "pca": {"mean": torch.as_tensor(mean), "components": torch.as_tensor(components)},
        "scale": scale,
        "electrodes": montage.names,
        "recordings": montage.checksums(),
        "sfreq": montage.sfreq,
        "config": yaml.safe_load(yaml.safe_dump(asdict(config))),  # plain types
        **facts,
    }
    (run.out / "models").mkdir(exist_ok=True)
    path = run.out / "models" / f"lag_{facts['lag']:g}_fold_{fold.number}.pt"
    save_checkpoint(path, state)


def single_electrodes(run, config, experiment, lags):
    """Ridge on each electrode alone, at each fold's lag of `lags`: a row of results.csv each."""
    target = experiment.target
    windows = experiment.inputs[""]
    names = windows.montage.names
    done = run.rows()
    done = set(done.electrode.dropna()) if "electrode" in done else set()
    todo = [i for i in run.share(range(len(names))) if names[i] not in done]
    if not todo or not windows.are_bins:
        return
    scores = np.zeros((len(todo), len(experiment.folds), 1 + config.n_shifts))
    bar = run.progress(len(lags), desc="single electrodes, fold by fold")
    for fold, lag in zip(experiment.folds, lags):
        X = torch.as_tensor(windows.at(experiment.rows, [lag])[0])
        for i, electrode in enumerate(todo):
            x = X[:, electrode : electrode + 1]
            decoder, _, _ = fit_decoder("ridge", {}, x, target, fold, config)
            out = predict(decoder, x[fold.test])
            null = primary_scores(out, fold.test, target, fold, config, fold.shifts)
            scores[i, fold.number] = null
        bar.update()
    bar.close()
    for i, electrode in enumerate(todo):
        mean, low, high = over_folds(scores[i, :, 0])
        null = scores[i, :, 1:].mean(axis=0)
        row = {"electrode": names[electrode], "metric": PRIMARY[target.kind], **experiment.keys}
        row |= {"model": "ridge, one electrode", "lag": "chosen", "fold": "mean"}
        p = float(p_value(mean, null))
        run.result(mean, null.mean(), low, high, len(target.start), p=p, **row)


# ---- report


def chosen_lags(metrics):
    """(folds,) numbers of the lags that the validation words of each fold choose."""
    return metrics["val"][:, :, 0].argmax(axis=0)


def at_chosen_lags(metrics, metric):
    """(folds, 1 + shifts) of a metric, each fold at its chosen lag."""
    numbers = chosen_lags(metrics)
    return metrics[metric][numbers, np.arange(len(numbers))]


def interval_of(values):
    """Mean over folds of values (folds, 1 + shifts), its interval, the null's level and band."""
    score, low, high = over_folds(values[:, 0])
    null = values[:, 1:].mean(axis=0)
    band = dict(zip(("null_low", "null_high"), np.quantile(null, [0.025, 0.975])))
    return {"score": score, "low": low, "high": high, "chance": null.mean(), **band}


def summarise(results, lags):
    """Means over folds of what Store.read gives: a row a decoder, metric and lag (None: controls).

    q is FDR over lags, p_max family-wise: against the null's maximum over lags.
    """
    columns = ["model", "metric", "lag", "score", "low", "high", "chance", "null_low", "null_high"]
    rows = []
    for decoder, metrics in results.items():
        for metric, values in metrics.items():
            if metric == "val":
                continue
            lower = metric in LOWER_IS_BETTER
            score = values[:, :, 0].mean(axis=1)
            null = values[:, :, 1:].mean(axis=1)  # (lags, shifts)
            extreme = null.min(axis=0) if lower else null.max(axis=0)
            p = p_value(score, null.T, lower)
            p_max = p_value(score, extreme[:, None], lower)
            for lag, *tests, of_lag in zip(lags, p, fdr_q(p), p_max, values):
                row = {"model": decoder, "metric": metric, "lag": lag, **interval_of(of_lag)}
                rows.append({**row, **dict(zip(("p", "q", "p_max"), tests))})
    return pd.DataFrame(rows, columns=[*columns, "p", "q", "p_max"]).astype({"lag": float})


def worth_of_pretraining(results, metric):
    """{what less what: (mean, low, high)} over folds, in pairs, each at its own chosen lags."""
    scores = {}
    for decoder, metrics in results.items():
        if decoder.startswith("ridge"):
            scores[decoder] = at_chosen_lags(metrics, metric)[:, 0]
    twins = [value for name, value in scores.items() if "untrained" in name]
    if len(twins) > 1:
        scores[f"ridge, mean of {len(twins)} untrained"] = np.mean(twins, axis=0)
    differences = {}
    for name, value in scores.items():
        if twins and name != "ridge":
            label = f"ridge, pretrained - {name.removeprefix('ridge, ')}"
            differences[label] = over_folds(scores["ridge"] - value)
    return differences


def write_means(run, table, results, differences, metric):
    """lags.csv, and rows of results.csv: means over folds, at every lag and at the chosen ones."""
    write_aside(run.out / "lags.csv", table.to_csv(index=False))
    n = int(table.n.iloc[0])
    keys = table[["data", "target"]].iloc[0].to_dict()
    rows = table[["model", "metric", "lag", "score", "low", "high", "chance"]].to_dict("records")
    for decoder, metrics in results.items():
        for name in metrics:
            if name != "val":
                row = interval_of(at_chosen_lags(metrics, name))
                rows.append({"model": decoder, "metric": name, "lag": "chosen", **row})
    for name, (score, low, high) in differences.items():
        row = {"model": name, "metric": metric, "lag": "chosen", "chance": 0.0}
        rows.append({**row, "score": score, "low": low, "high": high})
    for row in rows:
        interval = row["score"], row["chance"], row["low"], row["high"], n
        names = {key: row[key] for key in ("model", "metric", "lag")}
        run.result(*interval, fold="mean", **names, **keys)


def electrode_table(run, montage):
    """electrodes.csv: ridge on each electrode alone; None where the windows are no bins."""
    rows = run.merge()
    if "electrode" not in rows:
        return None
    table = rows[rows.electrode.notna()].set_index("electrode").loc[montage.names].reset_index()
    table[["x", "y", "z"]] = montage.xyz
    table["q"] = fdr_q(table.p.to_numpy(float))
    table["subject"] = table.electrode.str.split(" ").str[0]
    columns = ["subject", "electrode", "x", "y", "z", "metric", "score", "low", "high", "chance"]
    table = table[[*columns, "p", "q", "n", "data"]]
    write_aside(run.out / "electrodes.csv", table.to_csv(index=False))
    return table


def say_results(run, config, table, results, metric):
    """The closing lines: at the lags chosen on validation words, beside shifted words."""
    lags = all_lags(config)
    name = METRIC_NAMES[metric]
    for decoder, metrics in results.items():
        row = interval_of(at_chosen_lags(metrics, metric))
        chosen = ", ".join(f"{lags[i]:g}" for i in chosen_lags(metrics))
        one = table[(table.model == decoder) & (table.metric == metric)]
        beyond = [f"{lag:g} ms" for lag in one.lag[one.p_max < FDR]]
        run.print(
            f"{decoder}: {name} {row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}] at the "
            f"lag chosen on validation words ({chosen} ms by fold), shifted words "
            f"{row['chance']:.3f}, n = {table.n.iloc[0]:,}; beyond chance (family-wise {FDR:g}) at "
            f"{', '.join(beyond) or 'no lag'}"
        )
        say_few_shifts(run, one.p, one.q, config.n_shifts)
    for key in (metric, "top1"):
        controls = table[table.lag.isna() & (table.metric == key)]
        scores = [f"{row.model} {row.score:.3f}" for row in controls.itertuples()]
        if scores:
            run.print(f"controls, {METRIC_NAMES[key]}: {', '.join(scores)}")


def report(run, config, experiment, store):
    """Single electrodes, tables, figures and the closing lines, when every job is done."""
    podcast = experiment.podcast
    metric = PRIMARY[experiment.target.kind]
    results = store.read(all_lags(config), config.n_folds)
    table = summarise(results, all_lags(config))
    controls = summarise(store.read([None], config.n_folds), [None])
    differences = worth_of_pretraining(results, metric)
    both = pd.concat([table, controls]).assign(n=len(experiment.target.start), **experiment.keys)
    if run.master:
        write_means(run, both, results, differences, metric)
    chosen = np.array(all_lags(config))[chosen_lags(results[config.model])]
    single_electrodes(run, config, experiment, chosen)
    electrodes = electrode_table(run, podcast.montage)
    if not run.master:
        return
    title = (
        f"{podcast.source}: {experiment.keys['target']} from {len(podcast.montage.names)} "
        f"electrodes, windows of {1000 * config.window:.0f} ms"
    )
    planted = planted_span(podcast, config.window, config.task)
    plot_lags(run.out / "lags.png", table, controls, title, planted)
    if electrodes is not None:
        chance = float(electrodes.chance.mean())
        title = f"{podcast.source}: ridge on one electrode at the lag chosen on validation words"
        plot_electrodes(run.out / "electrodes.png", electrodes, chance, title, METRIC_NAMES[metric])
        say_few_shifts(run, electrodes.p, electrodes.q, config.n_shifts)
    say_results(run, config, both, results, metric)
    for name, (mean, low, high) in differences.items():
        run.print(f"{name}: {mean:+.3f} [{low:+.3f}, {high:+.3f}] {METRIC_NAMES[metric]}, in pairs")
    if not podcast.meta["synthetic"]:
        run.print(registry.PUBLISHED)
    run.print(f"lags.png, electrodes.png, lags.csv, electrodes.csv, results.csv in {run.out}")


# ---- plots

METRIC_NAMES = {
    "auc": "word ROC-AUC",
    "top1": "right word of all (top-1)",
    "two_afc": "right of two occurrences (2AFC)",
    "cosine": "cosine",
    "roc_auc": "ROC-AUC",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "cross_entropy": "cross-entropy (nats)",
    "corr": "correlation",
    "r2": "R²",
    "mse": "squared error",
}


def planted_span(podcast, window, task):
    """(from, to) in ms of the lags whose windows overlap what was planted, or None."""
    planted = podcast.meta.get("planted")
    if not planted or task not in ("embedding", "content", "pos", "volume"):
        return None
    lag = planted["volume_lag_ms" if task == "volume" else "lag_ms"]
    reach = 500 * window + planted.get("kernel_ms", 0) / 2
    return lag - reach, lag + reach


def plot_lags(path, table, controls, title, planted):
    """lags.png: metrics over lag with intervals, the null's band, significant lags, and controls.

    table, controls: of summarise; controls have no lag and are lines.
    """
    metrics = [metric for metric in METRIC_NAMES if metric in set(table.metric)]
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.4 * len(metrics), 4.2), layout="constrained", squeeze=False
    )
    for axis, metric in zip(axes[0], metrics):
        if planted is not None:
            label = "a window here holds planted words"
            axis.axvspan(*planted, color="C8", alpha=0.18, lw=0, label=label)
        part = table[table.metric == metric]
        for i, (decoder, one) in enumerate(part.groupby("model", sort=False)):
            if i == 0:
                band = one.null_low, one.null_high
                axis.fill_between(one.lag, *band, color="0.85", lw=0, label="95 % of shifts")
            bars = [one.score - one.low, one.high - one.score]
            style = {"fmt": "-o", "ms": 3.5, "lw": 1.3, "capsize": 2, "color": f"C{i}"}
            axis.errorbar(one.lag, one.score, bars, label=decoder, **style)
            for column, marker in (("q", "|"), ("p_max", "s")):
                for lag in one.lag[one[column] < FDR]:
                    under = {"transform": axis.get_xaxis_transform(), "clip_on": False}
                    axis.plot(lag, -0.02 - 0.03 * i, marker, color=f"C{i}", ms=4, **under)
        for i, control in enumerate(controls.model.unique()):
            for score in controls.score[(controls.model == control) & (controls.metric == metric)]:
                axis.axhline(score, ls=":", lw=1.4, color=f"C{9 - i}", label=control)
        axis.axvline(0, c="0.6", lw=0.8, zorder=0)
        axis.tick_params(axis="x", pad=4 + 5 * part.model.nunique())
        axis.set(xlabel="lag of the window's middle from word onset (ms)")
        axis.set(title=METRIC_NAMES[metric])
        axis.spines[["top", "right"]].set_visible(False)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize=8, frameon=False)
    marks = f"below: | FDR {FDR:g} over lags, ■ family-wise {FDR:g} (maximum over lags)"
    figure.suptitle(f"{title}\nmean of folds, 95 % intervals over folds; {marks}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_electrodes(path, table, chance, title, label):
    """electrodes.png: every electrode in its place, from three sides, and the best ones' scores.

    table: electrode, x, y, z (m), score, low, high, q; black edges where q < FDR.
    """
    figure, axes = plt.subplots(
        1, 4, figsize=(15, 4.2), layout="constrained", width_ratios=[1, 1, 1, 0.9]
    )
    known = table[np.isfinite(table[["x", "y", "z"]]).all(axis=1)]
    known = known.iloc[(known.score - chance).abs().argsort()]
    limit = max((table.score - chance).abs().max(), 1e-6)
    significant = (known.q < FDR).to_numpy()
    head = {"x": (70, 0), "y": (88, -18), "z": (62, 12)}  # mm, half width and middle of MNI's brain
    angle = np.linspace(0, 2 * np.pi, 200)
    views = (("y", "z", "from the side"), ("x", "y", "from above"), ("x", "z", "from the front"))
    for axis, (a, b, view) in zip(axes, views):
        outline = head[a][1] + head[a][0] * np.cos(angle), head[b][1] + head[b][0] * np.sin(angle)
        axis.plot(*outline, c="0.8", lw=1, zorder=0)
        image = axis.scatter(
            1000 * known[a],
            1000 * known[b],
            c=known.score,
            s=16 + 60 * (known.score - chance).abs() / limit,
            cmap="RdBu_r",
            vmin=chance - limit,
            vmax=chance + limit,
            edgecolors=np.where(significant, "k", "0.75"),
            linewidths=np.where(significant, 1.0, 0.5),
        )
        axis.set(xlabel=f"{a} (mm)", ylabel=f"{b} (mm)", aspect="equal")
        axis.set_title(view, fontsize=9)
    figure.colorbar(image, ax=axes[:3], shrink=0.5, aspect=40, location="bottom", label=label)
    best = table.sort_values("score", ascending=False).head(16).iloc[::-1]
    bars = [best.score - best.low, best.high - best.score]
    axes[3].errorbar(best.score, range(len(best)), xerr=bars, fmt="o", ms=4, capsize=2)
    axes[3].set_yticks(range(len(best)), best.electrode, fontsize=7)
    axes[3].axvline(chance, c="0.6", lw=0.8)
    axes[3].set_xlabel(label)
    axes[3].set_title("the best", fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- main


def main(config):
    if config.apply:
        return load_function(f"{HERE / 'decode_apply.py'}:apply_decoders", "apply")(config)
    run = Run(config)
    experiment = prepare(run, config)
    store = Store(run, experiment.keys)
    lags, folds = all_lags(config), experiment.folds

    for fold in run.share(folds):
        if not store.path(None, fold.number).exists():
            store.write(None, fold.number, run_controls(config, experiment.target, fold))
    jobs = run.share([(lag, fold.number) for lag in lags for fold in folds])
    todo = [job for job in jobs if not store.path(*job).exists()]
    bar = run.progress(len(jobs), initial=len(jobs) - len(todo), desc="lags and folds")
    start = time.time()
    todo_lags = list(dict.fromkeys(lag for lag, _ in todo))
    for lag, X in lag_by_lag(experiment.inputs, experiment.rows, todo_lags):
        for fold in folds:
            if (lag, fold.number) in todo:
                results = fit_and_score(run, config, experiment, X, fold, lag)
                store.write(lag, fold.number, results)
                bar.update()
            if (lag, fold.number) == todo[0]:
                minutes = (time.time() - start) * len(todo) / 60
                run.print(f"{len(todo)} fits of every decoder, about {minutes:.1f} minutes here")
    bar.close()
    run.barrier()
    report(run, config, experiment, store)
    run.close()


if __name__ == "__main__":
    main(configure(Config, benchmark_yaml.command_line(sys.argv[1:])))
