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

import functools
import hashlib
import inspect
import itertools
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import yaml
from himalaya.ridge import solve_ridge_cv_svd, solve_ridge_svd
from scipy import spatial, special, stats
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch.nn import functional as F

from configurator import InputError, Run, check_keys, configure, key_seed, load_function
from convert import HiddenStates
from data import aside, vectors, write_aside
from data.montage import Montage, choose_electrodes
from data.podcast import benchmark_yaml, registry
from data.podcast.speech import TASKS, Podcast, Target, as_target, read_podcast
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

    POSITIVE = (
        "lag_step bins spectrum_segment spectrum_max batch_size epochs learning_rate n_shifts"
    )
    SIGNED = "max_lag window"
    RENAMED = {"direction": "decode_encoding.py or decode_neuroprobe.py"}

    def check(self):
        check_folds_and_lags(self)
        if len(self.embedding) != 1:
            raise InputError("embedding: decoding has one target; decode_encoding.py takes several")
        check_keys(self.controls, CONTROLS, "controls")
        if self.untrained and self.preprocess != "foundation_model_preprocessing_fn":
            raise InputError("untrained= needs preprocess=foundation_model_preprocessing_fn")
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
    return config.lags or np.arange(config.min_lag, config.max_lag, config.lag_step).tolist()


def resolve(spec, known, option):
    """What an option names: one of `known`, or my_file.py:name, which may import its neighbours."""
    spec = known.get(spec, spec)
    if not isinstance(spec, str):
        return spec
    if ":" not in spec:
        raise InputError(f"{option}={spec} is none of {', '.join(known)}, and no my_file.py:name")
    sys.path += [str(Path(spec).resolve().parent), str(HERE / "data" / "podcast")]
    return load_once(spec, option)


load_once = functools.cache(load_function)  # code of a user's file names the run's jobs, once

# ---- recordings and words


def load_podcast(run, config):
    """(Podcast, Montage) of dataset=, with the chosen people and electrodes. Raises InputError."""
    podcast = read_podcast(run.dataset(config.dataset), config.dataset)
    if config.word not in podcast.words:
        raise InputError(f"word={config.word} is no column, only {', '.join(podcast.words)}")
    names = config.subjects, config.channels, config.electrodes
    montage = Montage(choose_electrodes(podcast.recordings, *names), config.reference)
    if montage.gaps:
        run.print(f"left out, since samples are missing (NaN): {', '.join(montage.gaps)}")
    return podcast, montage


PREPROCESSORS = {
    "preprocess_neural_data": registry.preprocess_neural_data,
    "foundation_model_preprocessing_fn": f"{FOUNDATION}:frozen_latents",
    "foundation_model_input": f"{FOUNDATION}:EncoderInput",
}


class Windows:
    """What decoders read of every word at a lag: bins, spectra, or what preprocess= makes.

    preprocess=my_file.py:f: f(windows (words, electrodes, samples), preprocessor_params) gives an
    array whose first dimension is the words. Readers of decode_foundation.py see the whole
    recording: reader(first, width), the same of windows from rows `first` on.
    """

    def __init__(self, montage, config, cache):
        self.montage, self.config, self.cache = montage, config, cache
        self.width = round(config.window * montage.sfreq)
        self.function = self.reader = None
        n_bins = config.bins
        if config.preprocess == "preprocess_neural_data":  # bins, counted in samples
            step = config.preprocessor_params.get("num_average_samples", 32)
            if self.width % step:
                raise InputError(f"num_average_samples={step} does not divide {self.width} samples")
            n_bins = self.width // step
        elif config.preprocess:
            self.function = resolve(config.preprocess, PREPROCESSORS, "preprocess")
            if config.preprocess in PREPROCESSORS:
                self.reader = self.function(montage, config.preprocessor_params, config.device)
        if self.width < n_bins:
            size = f"{self.width} samples at {montage.sfreq:g} Hz"
            raise InputError(f"window={config.window} s has {size}: too few for {n_bins} bins")
        self.n_bins = n_bins
        self.are_bins = self.function is None and config.represent == "bins"

    def first(self, rows, lag):
        """Row of the first sample of each window, for words at `rows` and a lag (ms)."""
        return rows + round(self.montage.sfreq * (lag / 1000 - self.config.window / 2))

    def at(self, rows, lag):
        """(words, ...) float32 at a lag (ms), for words at rows (people, words)."""
        first = self.first(rows, lag)
        if self.function:
            return self.preprocessed(first)
        if self.are_bins:
            return self.montage.bins(first, self.width, self.n_bins)
        spectrum = self.config.spectrum_segment, self.config.spectrum_max
        return self.montage.spectra(first, self.width, *spectrum)

    def content(self):
        """What windows depend on, as text: signals, parameters, the files they name, code."""
        montage, params = self.montage, self.config.preprocessor_params
        content = [montage.names, montage.checksums(), self.config.reference, self.width, params]
        content.append(self.config.preprocess)
        if self.reader is None:
            content += files_in([*params.values(), self.config.preprocess.partition(":")[0]])
        else:
            content.append(self.reader.key)
        return repr(content)

    def preprocessed(self, first):
        """What preprocess= makes of every window; kept on disk by content, since it may be slow."""
        key = hashlib.sha256(self.content().encode() + first.tobytes()).hexdigest()[:20]
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
        if array.ndim < 2 or len(array) != first.shape[1] or not np.isfinite(array).all():
            raise InputError(
                f"preprocess={self.config.preprocess} returned shape {array.shape} for "
                f"{first.shape[1]} words: its first dimension must stay the words, with features "
                "behind it, all of them finite"
            )
        return array


def files_in(values):
    """(path, size, time of change) of every file that values name: a new file, new content."""
    files = []
    for value in values:
        if isinstance(value, str) and value and Path(value).exists():
            files += [Path(value), *sorted(Path(value).rglob("*"))]
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


# ---- targets


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


def own_task(config, podcast):
    """(events, values) that a user's function(words, task_params) gives, checked."""
    events = resolve(config.task, TASKS, "task")(podcast.words.copy(), config.task_params)
    if isinstance(events, pd.DataFrame):
        check_keys(["start", "target"], events, f"task={config.task}")
        return events, np.stack(list(events.target))
    values = np.asarray(events)
    if len(values) != len(podcast.words) or values.ndim > 2:
        raise InputError(
            f"task={config.task} returned shape {values.shape} for {len(podcast.words)} words: "
            "return a target a word, or a table with start and target"
        )
    return podcast.words, values


def word_vectors(run, config, podcast, name):
    """(words, D) float32, NaN where there is none, of one entry of embedding=.

    lm: states of lm= at layer= as it reads the transcript; static: its embeddings of tokens;
    arbitrary: a random vector a word; released features of the set (gpt2-xl), or a file (GloVe).
    """
    words = podcast.words
    features = podcast.meta.get("features", {})
    labels = words[config.word].astype(str)
    if name == "arbitrary":
        return vectors.arbitrary_vectors(labels, config.pca or 50, config.seed)
    if name in ("lm", "static"):
        lm = HiddenStates(config.lm, run.device)
        spoken = words.word.astype(str).tolist()
        if name == "static":
            return vectors.static_vectors(lm, spoken)
        return vectors.contextual_vectors(lm, spoken, config.layer)
    if name in features:
        parts = name, config.layer, words.word_idx
        return vectors.released_features(podcast.folder, podcast.meta, *parts)
    if Path(name).is_file():
        return vectors.look_up(labels, name)
    raise InputError(
        f"embedding={name} is neither lm, static or arbitrary, nor one of the set's features "
        f"({', '.join(features)}), nor a file of vectors (glove.6B.50d.txt, say)"
    )


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
    distance, _ = spatial.KDTree(start[others, None]).query(start[rows, None])
    return rows[distance >= width - 1e-9]


def set_target(fold, target, config):
    """Set fold.Y: the target as this fold's decoders see it, by the training words alone."""
    if target.kind != "classes":
        n_dims = config.pca if target.kind == "vectors" else 0
        fold.Y, fold.projection = project(target.values, fold.train, n_dims)
        return
    fold.Y = target.values
    for part in ("train", "val", "test"):
        classes = np.unique(fold.Y[getattr(fold, part)])
        if len(classes) < 2:
            raise InputError(
                f"task={config.task}: the {part} events of fold {fold.number} are all "
                f"'{target.names[classes[0]]}': take fewer n_folds, or another task"
            )


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
        convs = self.conv1.weight, self.conv2.weight, self.conv3.weight
        penalty = self.reg_head * self.head.weight.square().sum()
        return penalty + self.reg * sum(weight.square().sum() for weight in convs)


PitomModel = functools.partial(EnsemblePitomModel, 1)  # one member


class MLP(nn.Module):
    """(words, ...) -> (words, output_dim); layer_sizes begin with inputs and end with outputs."""

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


def linear_decoder(input_shape=(), output_dim=50):
    """(words, ...) -> (words, output_dim), for the closed forms: they set its weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), output_dim))


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
    "ridge": linear_decoder,
    "linear": linear_decoder,
    "logistic": linear_decoder,
}


def build_network(spec, model_params, input_shape, output_dim):
    """The module of a decoder, see DECODERS. Raises InputError."""
    constructor = resolve(spec, DECODERS, "model")
    params = {
        "input_shape": list(input_shape),
        "input_channels": input_shape[0],
        "output_dim": output_dim,
        "embedding_dim": output_dim,  # podcast-benchmark's name of it
        **model_params,
    }
    if spec not in DECODERS:
        return constructor(params)
    named = inspect.signature(constructor).parameters
    check_keys(model_params, {*named, "input_channels", "embedding_dim"}, "model_params")
    arguments = {key: params[key] for key in named if key in params}
    try:
        return constructor(**arguments)
    except ValueError as error:
        raise InputError(f"model={spec}, its model_params: {error}") from None


class Decoder(nn.Module):
    """A network behind the z-scores of its inputs: (words, *input_shape) -> (words, members, D)."""

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
            out = self.eval()(torch.zeros(2, *input_shape))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shape = "x".join(str(n) for n in input_shape)
            raise InputError(
                f"model={spec} cannot read {shape} inputs a word "
                f"({' '.join(str(error).split())}): set bins=, window= or model_params="
            ) from None
        if out.ndim != 3 or out.shape[::2] != (2, output_dim):
            raise InputError(
                f"model={spec} returned shape {tuple(out.shape)} for 2 words: "
                f"(words, {output_dim}) or (words, members, {output_dim}) is wanted"
            )

    def set_scale(self, x):
        """z-scores of training words x (words, ...): a channel's where there is time, else all."""
        axes = (0, 2) if x.ndim == 3 else 0
        scale, mean = torch.std_mean(x.cpu().double(), axes, correction=0, keepdim=True)
        self.mean.copy_(mean[0])
        self.scale.copy_(torch.where(scale > 0, scale, 1)[0])

    def forward(self, x):
        out = self.network((x - self.mean) / self.scale)
        return out if out.ndim > 2 else out.reshape(len(x), 1, -1)


# ---- training


def fit_decoder(spec, model_params, X, target, fold, config):
    """(Decoder, its outputs for the validation words); X: (words, ...), a tensor."""
    output_dim = len(target.names) or fold.Y.shape[1]
    torch.manual_seed(key_seed(config.seed, spec, fold.number))
    decoder = Decoder(spec, model_params, X.shape[1:], output_dim, target.kind).to(X.device)
    if config.preprocess != "foundation_model_input":  # which has units of its own
        decoder.set_scale(X[fold.train])
    if spec not in CLOSED_FORM:
        train(decoder, X, target, fold, config)
        return decoder, predict(decoder, X[fold.val])
    if spec == "logistic" and target.kind != "classes":
        raise InputError("model=logistic is for classes (task=content, say): take ridge")
    x = ((X - decoder.mean) / decoder.scale).flatten(1).cpu().numpy()
    y = np.eye(output_dim, dtype=np.float32)[fold.Y] if target.kind == "classes" else fold.Y
    weights, offset, val = CLOSED_FORM[spec](x, y, fold)
    linear = decoder.network[1].state_dict()  # its tensors: (outputs, inputs), (outputs,)
    linear["weight"].copy_(torch.as_tensor(weights).T)
    linear["bias"].copy_(torch.as_tensor(offset))
    return decoder, val[:, None]


def train(decoder, X, target, fold, config):
    """AdamW; the weights of the epoch that is best for the validation words stay."""
    y = torch.as_tensor(fold.Y, device=X.device)
    weights = None
    if target.kind == "classes":  # all classes count the same
        counts = torch.bincount(y[fold.train], minlength=decoder.output_dim).clamp_min(1)
        weights = len(fold.train) / (decoder.output_dim * counts)
    optimizer = torch.optim.AdamW(
        decoder.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    size = min(config.batch_size, len(fold.train))
    best = -math.inf
    for epoch in range(1, config.epochs + 1):
        decoder.train()
        rng = np.random.default_rng(key_seed(config.seed, "order", fold.number, epoch))
        order = torch.as_tensor(rng.permutation(fold.train), device=X.device)
        for rows in order[: len(order) // size * size].split(size):
            loss = loss_of(decoder(X[rows]), y[rows], target.kind, config, weights)
            if hasattr(decoder.network, "penalty"):
                loss = loss + decoder.network.penalty()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        score = validation_score(predict(decoder, X[fold.val]), fold.Y[fold.val], target.kind)
        if not math.isfinite(score):
            raise InputError(f"model={decoder.spec} diverges: try a smaller learning_rate")
        if score > best:
            best = score
            decoder.best_epoch = epoch
            best_state = {name: value.clone() for name, value in decoder.state_dict().items()}
        elif epoch - decoder.best_epoch >= config.patience:
            break
    decoder.load_state_dict(best_state)


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


def fit_ridge(x, y, fold):
    """(weights, offset, predictions for the validation words) of himalaya's ridge.

    An output's alpha is the one by which a fit on training words predicts the validation words
    best: those predictions. The weights are fitted on both.
    """
    rows = np.concatenate([fold.train, fold.val])
    n = len(fold.train)
    split = [(np.arange(n), np.arange(n, len(rows)))]
    options = {"fit_intercept": True, "warn": False}
    alphas, weights, _, offset = solve_ridge_cv_svd(x[rows], y[rows], ALPHAS, cv=split, **options)
    trained, intercept = solve_ridge_svd(x[fold.train], y[fold.train], alphas, **options)
    return weights, offset, x[fold.val] @ trained + intercept


def fit_least_squares(x, y, fold):
    """As fit_ridge, without a penalty."""
    rows = np.concatenate([fold.train, fold.val])
    fit = LinearRegression().fit(x[rows], y[rows])
    trained = LinearRegression().fit(x[fold.train], y[fold.train])
    return fit.coef_.T, fit.intercept_, trained.predict(x[fold.val])


def fit_logistic(x, y, fold):
    """scikit-learn's logistic regression of training words, its C chosen on validation words."""
    basis = np.eye(x.shape[1], dtype=x.dtype)
    if x.shape[1] > len(fold.train):  # the solution lies in the span of the training rows
        basis = np.linalg.qr(x[fold.train].T)[0]
    x = x @ basis
    labels = y.argmax(axis=1)
    best = -math.inf
    for C in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        fit = LogisticRegression(C=C, max_iter=2000, class_weight="balanced")
        fit.fit(x[fold.train], labels[fold.train])
        coef, intercept = fit.coef_, fit.intercept_
        if len(fit.classes_) == 2:  # scikit-learn gives the second one's
            coef, intercept = np.concatenate([0 * coef, coef]), np.append(0, intercept)
        weights = np.zeros((x.shape[1], y.shape[1]))
        weights[:, fit.classes_] = coef.T
        offset = np.full(y.shape[1], -30.0)  # a class that no training word has
        offset[fit.classes_] = intercept
        logits = x[fold.val] @ weights + offset
        score = validation_score(logits[:, None], labels[fold.val], "classes")
        if score > best:
            best = score
            best_fit = basis @ weights, offset, logits
    return best_fit


CLOSED_FORM = {"ridge": fit_ridge, "linear": fit_least_squares, "logistic": fit_logistic}


# ---- scores


PRIMARY = {"vectors": "auc", "classes": "roc_auc", "number": "corr"}  # chooses the lag
LOWER_IS_BETTER = ["perplexity", "occ_perplexity", "mse", "cross_entropy"]
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
    return (np.arange(n) + np.append(0, steps)[:, None]) % n


def word_auc(scores, y, orders):
    """ROC-AUC of every class against the rest, for each reordering of the labels: (P, V).

    scores: (N, V) of items for classes; y: (N,) classes; orders: (P, N), item i counting as one of
    class y[orders[p, i]]. NaN where a class is absent or alone. No reordering changes the ranks:
    AUC = (sum of the class's ranks - n (n + 1) / 2) / (n (N - n)), tied items sharing their rank.
    """
    N, V = scores.shape
    ranks = stats.rankdata(scores, axis=0)
    labels = y[orders]
    cells = labels + V * np.arange(len(orders))[:, None]
    sums = np.bincount(cells.ravel(), ranks[np.arange(N), labels].ravel(), V * len(orders))
    n = np.bincount(y, minlength=V)
    with np.errstate(all="ignore"):
        return (sums.reshape(-1, V) - n * (n + 1) / 2) / (n * (N - n))


def word_means(Y, labels, rows):
    """DataFrame with a row a word: the mean of its unit vectors among the rows."""
    return pd.DataFrame(unit(Y[rows])).groupby(labels[rows]).mean()


class WordScorer:
    """Scores predicted vectors of some rows (a fold's validation or test words) as words.

    A word's vector is the mean of its unit embeddings over training words (in zero-shot folds over
    the rows themselves); candidates are the words of the rows that have one. For 2AFC, cosine and
    metrics that begin with occ_, candidates are the embeddings of the rows themselves.
    """

    def __init__(self, fold, rows, labels, config):
        zero_shot = config.fold_type == "zero_shot"
        source = rows if zero_shot else fold.train
        means = word_means(fold.Y, labels, source)
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

    def aucs(self, words, shifts, kept=slice(None)):
        """{metric: (1 + shifts,)} of rows `kept` of words (n, V): mean AUC, plain and weighted."""
        y = self.y[kept]
        log_p = special.log_softmax(words[kept], axis=1)
        each = np.ma.masked_invalid(word_auc(log_p, y, circular(shifts, len(y), self.gap)))
        weights = {"auc": 1, "auc_train": self.n_trained, "auc_test": self.n_spoken}
        values = {}
        for metric, weight in weights.items():
            mean = np.ma.average(each, axis=1, weights=weight * self.counted)
            values[metric] = mean.filled(0.5)
        return values

    def metrics(self, words, pairs):
        """measure(kept, shifts) -> {metric: (1 + shifts,)} of similarities to words and to rows."""
        word_table = rank_table(words)
        pair_table = {f"occ_{metric}": values for metric, values in rank_table(pairs).items()}
        pair_table["two_afc"] = (stats.rankdata(pairs, axis=1) - 1) / max(1, len(pairs) - 1)
        pair_table["cosine"] = pairs

        def measure(kept, shifts):
            values = self.aucs(words, shifts, kept[self.has_word])
            values |= shifted_means(word_table, self.y, kept[self.has_word], shifts, self.gap)
            values |= shifted_means(pair_table, np.arange(len(pairs)), kept, shifts, self.gap)
            return values

        return measure


def rank_table(scores):
    """{metric: (rows, candidates)}: what each candidate would score if it were the right one."""
    lowest = stats.rankdata(-scores, method="min", axis=1)
    tied = stats.rankdata(-scores, method="max", axis=1) - lowest + 1
    table = {"perplexity": -special.log_softmax(scores, axis=1)}
    for k in TOP_K:  # ties share, as if they were broken at random
        table[f"top{k}"] = np.clip((k + 1 - lowest) / tied, 0, 1)
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


def measure_classes(out, y, names, orders):
    """{metric: (P,)} of outputs (n, K) for classes y (n,), reordered by orders (P, n)."""
    log_p = special.log_softmax(out, axis=1)
    auc = word_auc(log_p, y, orders)
    if len(names) == 2:
        auc = auc[:, 1:]
    one_hot = np.eye(len(names))
    confusion = one_hot[y[orders]].transpose(0, 2, 1) @ one_hot[log_p.argmax(axis=1)]
    hits = confusion.diagonal(axis1=1, axis2=2)  # confusion: (P, truth, answers)
    n_true, n_answers = confusion.sum(axis=2), confusion.sum(axis=1)
    recall, precision = hits / np.maximum(n_true, 1), hits / np.maximum(n_answers, 1)
    present = n_true[0] > 0
    f1 = 2 * hits / np.maximum(n_true + n_answers, 1)
    values = {
        "roc_auc": np.nan_to_num(auc[:, np.isfinite(auc[0])].mean(axis=1), nan=0.5),
        "accuracy": hits.sum(axis=1) / len(y),
        "balanced_accuracy": recall[:, present].mean(axis=1),
        "f1": f1[:, present].mean(axis=1),
        "cross_entropy": -log_p[np.arange(len(y)), y[orders]].mean(axis=1),
    }
    if len(names) == 2:
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


def measure_others(out, y, target, gap, kept, shifts):
    """{metric: (1 + shifts,)} over rows `kept`, where the target is no vector."""
    orders = circular(shifts, int(kept.sum()), gap)
    if target.kind == "classes":
        return measure_classes(out[kept], y[kept], target.names, orders)
    return measure_numbers(out[kept, 0], y[kept, 0], orders)


def primary_scores(out, rows, target, fold, config, shifts=NO_SHIFTS):
    """(1 + shifts,) of the metric that chooses lags, for outputs (rows, members, D)."""
    if target.kind == "vectors":
        scorer = WordScorer(fold, rows, target.labels, config)
        return scorer.aucs(scorer.similarities(out)[0], shifts)["auc"]
    everyone = np.ones(len(rows), bool)
    scores = measure_others(out.mean(axis=1), fold.Y[rows], target, fold.gap, everyone, shifts)
    return scores[PRIMARY[target.kind]]


def evaluate(out, target, fold, config):
    """with_intervals of outputs (words, members, D) for the test events."""
    if target.kind != "vectors":
        parts = out.mean(axis=1), fold.Y[fold.test], target, fold.gap
        return with_intervals(functools.partial(measure_others, *parts), fold, len(out))
    scorer = WordScorer(fold, fold.test, target.labels, config)
    return with_intervals(scorer.metrics(*scorer.similarities(out)), fold, len(scorer.y))


def with_intervals(measure, fold, n):
    """A row a metric of measure(kept, shifts): score, low, high, n, then that of every shift.

    95 % intervals: jackknife over ten stretches of the test words.
    """
    rows = np.arange(len(fold.test))
    values = measure(rows >= 0, fold.shifts)
    parts = []
    for stretch in np.array_split(rows, min(10, len(rows))):
        parts.append(pd.DataFrame(measure(~np.isin(rows, stretch), NO_SHIFTS)))
    half = 1.96 * np.sqrt((len(parts) - 1) * pd.concat(parts).var(ddof=0))
    table = pd.DataFrame(np.stack(list(values.values())), list(values)).rename(columns=str)
    score, null = table["0"], table.iloc[:, 1:]
    columns = {"score": score, "low": score - half, "high": score + half, "n": n}
    return pd.concat([pd.DataFrame(columns), null], axis=1)


def p_value(observed, null):
    """One-sided p of observed (...) under null (P, ...), NaN where either is not a number."""
    observed = np.asarray(observed)
    as_good = null >= observed - 1e-8 * np.abs(observed)  # ties count, whatever their rounding
    p = (1 + as_good.sum(axis=0)) / (len(null) + 1)
    return np.where(np.isfinite(observed) & np.isfinite(null).all(axis=0), p, np.nan)


def fdr_q(p):
    """q of p values (Benjamini and Hochberg); NaN stays NaN and does not count."""
    q = np.full(np.shape(p), np.nan)
    known = np.isfinite(p)
    q[known] = stats.false_discovery_control(p[known])
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
    half = stats.t.ppf(0.975, len(scores) - 1) * stats.sem(scores)
    return np.mean(scores), np.mean(scores) - half, np.mean(scores) + half


# ---- controls, which read no brain


def mean_vector(target, fold, config):
    """The mean of the training words, whatever is heard (of classes, their frequencies)."""
    y = fold.Y[fold.train]
    guess = unit(y).mean(axis=0) if target.kind == "vectors" else y.mean(axis=0)
    if target.kind == "classes":
        guess = np.log(np.bincount(y, minlength=len(target.names)) + 0.5)
    return evaluate(np.tile(guess, (len(fold.test), 1, 1)), target, fold, config)


def most_frequent_words(target, fold, config):
    """Whoever says the most frequent training words, whatever is heard."""
    scorer = WordScorer(fold, fold.test, target.labels, config)
    words = np.tile(np.log(scorer.n_trained + 0.5), (len(scorer.y), 1))
    pairs = np.tile(np.log(scorer.n_trained_of_rows + 0.5), (len(fold.test), 1))
    scores = with_intervals(scorer.metrics(words, pairs), fold, len(words))
    return scores.drop(["cosine", "perplexity", "occ_perplexity"])  # frequencies are no cosines


def preceding_words(target, fold, config):
    """Ridge on the embeddings of the three words before."""
    x = np.zeros((len(fold.Y), 3, fold.Y.shape[1]), np.float32)
    for k in (1, 2, 3):
        x[k:, k - 1] = fold.Y[:-k]
    x = x.reshape(len(x), -1)
    weights, offset, _ = fit_ridge(x, fold.Y, fold)
    return evaluate((x[fold.test] @ weights + offset)[:, None], target, fold, config)


def oracle(target, fold, config):
    """The true embedding: what the scorer can give at most."""
    return evaluate(fold.Y[fold.test][:, None], target, fold, config)


CONTROLS = {
    "mean": mean_vector,
    "unigram": most_frequent_words,
    "preceding": preceding_words,
    "oracle": oracle,
    "arbitrary": None,  # ridge from the brain to a random vector a word, at every lag
}


def run_controls(config, target, folds):
    """Scores, with rows (lag, fold, model, metric), of the controls that read no brain."""
    jobs = {}
    for fold, name in itertools.product(folds, config.controls):
        if CONTROLS[name] and (target.kind == "vectors" or name == "mean"):
            jobs[fold.number, name] = CONTROLS[name](target, fold, config)
    if not jobs:
        return pd.DataFrame()
    scores = pd.concat(jobs, names=INDEX[1:]).assign(lag=np.nan)
    return scores.set_index("lag", append=True).reorder_levels(INDEX)


# ---- every lag and fold


@dataclass
class Experiment:
    """What all lags and folds share.

    inputs: {name: Windows}, '' for all decoders, others for twins; rows: (people, words) where the
    words begin; keys: what rows of results.csv say of it.
    """

    podcast: Podcast
    montage: Montage
    target: Target
    inputs: dict
    rows: np.ndarray
    folds: list
    keys: dict


def prepare(run, config):
    """The Experiment that the options describe."""
    for name in (config.model, *config.beside):
        resolve(name, DECODERS, "model")
    podcast, montage = load_podcast(run, config)
    target = make_target(run, config, podcast)
    if config.config_setter:
        setter = resolve(config.config_setter, SETTERS, "config_setter")
        for option, value in registry.call_setter(setter, config, montage, target).items():
            setattr(config, option, value)
    inputs = make_inputs(run, config, montage)
    target, rows = keep_words(target, inputs[""], all_lags(config), config)
    folds = make_folds(config, target.start, target.labels, inputs[""].width / montage.sfreq)
    for fold in folds:
        set_target(fold, target, config)
    run.print(describe(podcast, montage, target))
    run.content = content_of(config, inputs[""], target, rows)
    name = config.embedding[0] if config.task == "embedding" else config.task
    layers = podcast.meta.get("features", {}).get(name, {})
    if name == "lm" or f"layer-{config.layer}" in layers:
        name += f" layer {config.layer}"
    keys = {"data": podcast.source, "target": name}
    return Experiment(podcast, montage, target, inputs, rows, folds, keys)


SETTERS = {
    "neural_conv": registry.neural_conv,
    "foundation_model": f"{FOUNDATION}:foundation_model",
}


def make_inputs(run, config, montage):
    """Experiment.inputs. Ridge alone reads the twins: untrained encoders, windows as they are."""
    configs = {"": config}
    for k in range(1, config.untrained + 1):
        params = {**config.preprocessor_params, "untrained": k}
        configs[f"untrained {k}"] = replace(config, preprocessor_params=params)
    if config.untrained:
        configs["raw signal"] = replace(config, preprocess="")
    inputs = {}
    for name, options in configs.items():
        inputs[name] = Windows(montage, options, run.out.parent / "cache")
    reader = inputs[""].reader
    if reader is not None:
        run.print(reader.description)
        config.model_params = {**reader.model_params, **config.model_params}
    return inputs


def keep_words(target, windows, lags, config):
    """(target, rows (people, words)) of the words whose windows are recorded at every lag."""
    rows = windows.montage.rows(target.start)
    inside = np.ones(len(target.start), bool)
    for lag in lags:
        inside &= windows.montage.inside(windows.first(rows, lag), windows.width)
    if inside.sum() < 10 * config.n_folds:
        raise InputError(
            f"{inside.sum()} words have their window in the recording at every lag from "
            f"{min(lags):g} to {max(lags):g} ms, too few for {config.n_folds} folds: narrow "
            "min_lag= and max_lag=, or window="
        )
    return target.only(inside, "with a window outside a recording at some lag"), rows[:, inside]


def describe(podcast, montage, target):
    """What is decoded from what, in a sentence."""
    left_out = [f"{n} {reason}" for reason, n in target.notes.items() if n]
    return (
        f"{podcast.source}: {len(montage.names)} electrodes of {len(montage.people)} people, "
        f"{len(target.start):,} events at every lag, {len(set(target.labels)):,} types "
        f"({', '.join(left_out) or 'none'} left out)"
    )


def content_of(config, windows, target, rows):
    """A hash of what a result depends on and options only name: recordings, targets, files."""
    digest = hashlib.sha256(windows.content().encode() + rows.tobytes())
    if {"lm", "static"} & set(config.embedding):  # computed: known by files, not to the last bit
        digest.update(repr(files_in([config.lm])).encode())
    else:
        digest.update(target.values.tobytes())
    return digest.hexdigest()[:6]


def fit_and_score(run, config, experiment, X, fold, lag):
    """Scores, with rows (model, metric), of every decoder; X: {input: windows (words, ...)}."""
    target = experiment.target
    decoders = {name: (name, "") for name in [config.model, *config.beside]}
    if config.untrained:
        decoders["ridge"] = "ridge", ""
        decoders.update({f"ridge, {source}": ("ridge", source) for source in X if source})
    if "arbitrary" in config.controls and target.kind == "vectors":
        decoders["arbitrary"] = "ridge", ""
    results = {}
    for name, (spec, source) in decoders.items():
        job = fold
        if name == "arbitrary":
            y = vectors.arbitrary_vectors(target.labels, 50, config.seed)
            job = replace(fold, Y=y - y[fold.train].mean(axis=0))
        params = config.model_params if name == config.model else {}
        decoder, val = fit_decoder(spec, params, X[source], target, job, config)
        val_score = float(primary_scores(val, fold.val, target, job, config)[0])
        results[name] = evaluate(predict(decoder, X[source][fold.test]), target, job, config)
        results[name].loc["val", "score"] = val_score
        if config.save_models and name == config.model:
            facts = {"lag": float(lag), "val": val_score}
            save_decoder(run, config, experiment, decoder, fold, facts)
    return pd.concat(results)


def save_decoder(run, config, experiment, decoder, fold, facts):
    """models/lag_L_fold_K.pt for decode_apply.py: weights and z-scores, PCA, words, electrodes."""
    target, montage = experiment.target, experiment.montage
    of_words = pd.DataFrame()
    if target.kind == "vectors":
        of_words = word_means(fold.Y, target.labels, fold.train)
    mean, components, scale = fold.projection
    state = {
        "kind": "decoder",
        "spec": decoder.spec,
        "weights": decoder.state_dict(),
        "output_dim": decoder.output_dim,
        "target": target.kind,
        "names": target.names or of_words.index.tolist() or ["value"],
        "vectors": torch.tensor(of_words.to_numpy(np.float32)),
        "pca": {"mean": torch.as_tensor(mean), "components": torch.as_tensor(components)},
        "scale": scale,
        "electrodes": montage.names,
        "recordings": montage.checksums(),
        "sfreq": montage.sfreq,
        "config": yaml.safe_load(yaml.safe_dump(asdict(config))),  # plain types
        **facts,
    }
    (run.out / "models").mkdir(exist_ok=True)
    save_checkpoint(run.out / "models" / f"lag_{facts['lag']:g}_fold_{fold.number}.pt", state)


# ---- finished jobs: a file each, so that a stopped run goes on and ranks share the work

INDEX = ["lag", "fold", "model", "metric"]  # of the rows of scores
DIGITS = "%.9g"


def job_file(run, lag, fold):
    """Where the scores of a lag (or those of electrodes) and fold are kept."""
    folder = run.out / "jobs" / run.options_hash()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"lag_{lag}_fold_{fold.number}.csv"


def read_jobs(run, lags, folds):
    """The scores of jobs: a DataFrame with rows (lag, fold, model, metric)."""
    jobs = {}
    for lag, fold in itertools.product(lags, folds):
        jobs[lag, fold.number] = pd.read_csv(job_file(run, lag, fold), index_col=[0, 1])
    return pd.concat(jobs, names=INDEX)


# ---- report


def null_of(scores):
    """Those columns of scores that are of shifted words."""
    return scores.drop(columns=["score", "low", "high", "n"], errors="ignore")


def intervals_of(scores):
    """score, low, high, n and chance of scores."""
    return scores[["score", "low", "high", "n"]].assign(chance=null_of(scores).mean(axis=1))


def write_results(run, table, **keys):
    """Rows of results.csv: those of a table with score, chance, low, high and n."""
    for row in table.to_dict("records"):
        run.result(**row, **keys)


def summarise(scores):
    """Means over folds: a row a model, metric and lag, with 95 % t intervals over folds.

    q is FDR over lags, p_max family-wise: against the best lag of every shift.
    """
    groups = scores.drop("val", level="metric", errors="ignore")
    groups = groups.groupby(["model", "metric", "lag"], sort=False, dropna=False)
    means = groups.mean()
    half = groups.score.sem() * stats.t.ppf(0.975, groups.size() - 1)
    low, high = means.score - half, means.score + half
    null = null_of(means)
    table = pd.DataFrame({"score": means.score, "low": low, "high": high})
    table["chance"] = null.mean(axis=1)
    table["null_low"], table["null_high"] = null.quantile([0.025, 0.975], axis=1).to_numpy()
    sign = np.where(table.index.isin(LOWER_IS_BETTER, level="metric"), -1, 1)
    null = null.mul(sign, axis=0)
    by_metric = ["model", "metric"]
    best = null.groupby(by_metric).transform("max")
    table["p"] = p_value(sign * table.score, null.T.to_numpy())
    table["q"] = table.groupby(by_metric).p.transform(fdr_q)
    table["p_max"] = p_value(sign * table.score, best.T.to_numpy())
    return table.reset_index()


def at_chosen_lags(scores):
    """(scores at the lag that each fold's validation words choose, the lags (model, fold))."""
    lags = scores.score.xs("val", level="metric").unstack("lag").idxmax(axis=1)
    lags = lags.swaplevel()
    chosen = lags.reindex(scores.index.droplevel(["lag", "metric"]).swaplevel()).to_numpy()
    scores = scores[scores.index.get_level_values("lag") == chosen].droplevel("lag")
    return pd.concat({"chosen": scores}, names=INDEX), lags


def worth_of_pretraining(chosen, metric):
    """Ridge on a pretrained encoder less that on each of its twins, in pairs over folds."""
    scores = chosen.score.xs(metric, level="metric").unstack("model")
    twins = scores.filter(like="ridge, untrained")
    if twins.shape[1] > 1:
        scores[f"ridge, mean of {twins.shape[1]} untrained"] = twins.mean(axis=1)
    rows = []
    for name in scores.filter(like="ridge, "):
        score, low, high = over_folds(scores["ridge"] - scores[name])
        interval = {"score": score, "low": low, "high": high, "chance": 0.0}
        rows.append({"model": name.replace("ridge,", "ridge, pretrained -"), **interval})
    return pd.DataFrame(rows).assign(metric=metric, lag="chosen")


def single_electrodes(run, config, experiment, lags):
    """Ridge on each electrode alone, at each fold's lag of `lags`: a job a fold."""
    target, windows = experiment.target, experiment.inputs[""]
    for fold, lag in run.share(zip(experiment.folds, lags)):
        file = job_file(run, "electrodes", fold)
        if file.exists():
            continue
        X = torch.as_tensor(windows.at(experiment.rows, lag))
        scores = {}
        for i, electrode in enumerate(windows.montage.names):
            x = X[:, i : i + 1]
            decoder, _ = fit_decoder("ridge", {}, x, target, fold, config)
            parts = predict(decoder, x[fold.test]), fold.test, target, fold, config
            scores[electrode, PRIMARY[target.kind]] = primary_scores(*parts, fold.shifts)
        scores = pd.DataFrame(scores).T.rename(columns={0: "score"})
        write_aside(file, scores.to_csv(float_format=DIGITS))
    run.barrier()


def electrode_table(run, experiment):
    """electrodes.csv, and rows of results.csv, of single_electrodes."""
    table = summarise(read_jobs(run, ["electrodes"], experiment.folds))
    table = table.rename(columns={"model": "electrode"}).assign(n=len(experiment.target.start))
    keys = {**experiment.keys, "model": "ridge, one electrode", "lag": "chosen", "fold": "mean"}
    columns = ["electrode", "metric", "score", "low", "high", "chance", "p", "n"]
    write_results(run, table[columns], **keys)
    table["q"] = fdr_q(table.p)
    table["subject"] = table.electrode.str.split(" ").str[0]
    table["data"] = experiment.keys["data"]
    table[["x", "y", "z"]] = experiment.montage.xyz
    table = table[["subject", *columns, "q", "x", "y", "z", "data"]]
    write_aside(run.out / "electrodes.csv", table.to_csv(index=False))
    return table


def say_results(run, config, table, summary, lags):
    """The closing table: at the lags chosen on validation words, beside shifted words."""
    metric = summary.metric.iloc[0]
    of_metric = table[table.metric == metric]
    closing = summary.set_index("model")[["score", "low", "high", "chance"]].round(3)
    closing["lags (ms)"] = lags.map("{:g}".format).groupby(level="model").agg(" ".join)
    beyond = of_metric[of_metric.p_max < FDR]
    closing["beyond it at (ms)"] = beyond.lag.map("{:g}".format).groupby(beyond.model).agg(" ".join)
    run.print(
        f"{metric} at the lag that each fold's validation words chose, n = {table.n.iloc[0]:,}; "
        f"chance: shifted words; beyond it: family-wise {FDR:g}\n{closing.to_string(na_rep='')}"
    )
    for _, part in of_metric[of_metric.lag.notna()].groupby("model"):
        say_few_shifts(run, part.p, part.q, config.n_shifts)
    controls = table[table.lag.isna() & table.metric.isin([metric, "top1"])]
    if len(controls):
        run.print(f"controls\n{controls.pivot(index='model', columns='metric', values='score')}")


def report(run, config, experiment):
    """Single electrodes, tables, figures and the closing lines, when every job is done."""
    podcast, target, keys = experiment.podcast, experiment.target, experiment.keys
    metric = PRIMARY[target.kind]
    scores = read_jobs(run, all_lags(config), experiment.folds)
    chosen, lags = at_chosen_lags(scores)
    are_bins = experiment.inputs[""].are_bins
    if are_bins:
        single_electrodes(run, config, experiment, lags[config.model])
    if not run.master:
        return
    scores = pd.concat([scores, run_controls(config, target, experiment.folds)])
    table = summarise(scores).assign(n=len(target.start), **keys)
    write_aside(run.out / "lags.csv", table.to_csv(index=False))
    summary = pd.concat([summarise(chosen), worth_of_pretraining(chosen, metric)])
    columns = ["model", "metric", "lag", "score", "low", "high", "chance"]
    means = pd.concat([table, summary])[columns].assign(n=len(target.start))
    write_results(run, means, fold="mean", **keys)
    by_fold = intervals_of(scores.drop("val", level="metric"))
    write_results(run, by_fold.reset_index().astype({"n": int}), **keys)
    title = f"{podcast.source}: {keys['target']} from {len(experiment.montage.names)} electrodes"
    key = "volume_lag_ms" if config.task == "volume" else "lag_ms"
    planted = podcast.meta.get("planted", {}).get(key, np.nan)
    plot_lags(run.out / "lags.png", table, title, planted)
    if are_bins:
        electrodes = electrode_table(run, experiment)
        title = f"{podcast.source}: ridge on one electrode at the lag chosen on validation words"
        plot_electrodes(run.out / "electrodes.png", electrodes, title, metric)
        say_few_shifts(run, electrodes.p, electrodes.q, config.n_shifts)
    say_results(run, config, table, summary[summary.metric == metric], lags)
    if not podcast.meta["synthetic"]:
        run.print(registry.PUBLISHED)
    run.print(f"lags.png, electrodes.png, lags.csv, electrodes.csv, results.csv in {run.out}")


# ---- plots

PLOTTED = ["auc", "top1", "two_afc", "cosine"]  # of vectors
PLOTTED += ["roc_auc", "balanced_accuracy", "f1", "cross_entropy"]  # of classes
PLOTTED += ["corr", "r2", "mse"]  # of numbers


def plot_lags(path, table, title, planted):
    """lags.png: metrics over lag, the null's band, what is significant; controls are dotted."""
    metrics = [metric for metric in PLOTTED if metric in set(table.metric)]
    colors = {model: f"C{i}" for i, model in enumerate(table.model.unique())}
    size = 4.4 * len(metrics), 4.2
    figure, axes = plt.subplots(1, len(metrics), figsize=size, layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for model, part in table[table.metric == metric].groupby("model", sort=False):
            color = colors[model]
            if part.lag.isna().all():
                axis.axhline(part.score.iloc[0], ls=":", color=color, label=model)
                continue
            if color == "C0":
                band = part.null_low, part.null_high
                axis.fill_between(part.lag, *band, color="0.85", lw=0, label="95 % of shifts")
            bars = [part.score - part.low, part.high - part.score]
            axis.errorbar(part.lag, part.score, bars, capsize=2, color=color, label=model)
            for column, marker, fill in (("q", "o", "w"), ("p_max", "s", color)):
                passed = part[part[column] < FDR]
                axis.plot(passed.lag, passed.score, marker, ms=5, color=color, mfc=fill)
        axis.axvline(0, c="0.6", lw=0.8)
        axis.axvline(planted, c="C8", lw=3, alpha=0.4, label="planted")
        axis.set(xlabel="lag of the window's middle (ms)", title=metric)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize=8, frameon=False)
    marks = f"ring: FDR {FDR:g} over lags, square: family-wise {FDR:g}"
    figure.suptitle(f"{title}\nmean of folds, 95 % intervals over folds; {marks}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_electrodes(path, table, title, label):
    """electrodes.png: electrodes in their places (x, y, z in m), and the best ones' scores."""
    size = {"figsize": (15, 4.2), "width_ratios": [1, 1, 1, 0.9]}
    figure, axes = plt.subplots(1, 4, layout="constrained", **size)
    table = table.sort_values("score")
    chance = table.chance.mean()
    limit = max((table.score - chance).abs().max(), 1e-6)
    for axis, (a, b) in zip(axes, ("yz", "xy", "xz")):
        image = axis.scatter(
            1000 * table[a],
            1000 * table[b],
            c=table.score,
            s=16 + 60 * (table.score - chance).abs() / limit,
            cmap="RdBu_r",
            vmin=chance - limit,
            vmax=chance + limit,
            edgecolors=np.where(table.q < FDR, "k", "0.75"),
        )
        axis.set(xlabel=f"{a} (mm)", ylabel=f"{b} (mm)", aspect="equal")
    figure.colorbar(image, ax=axes[:3], shrink=0.5, aspect=40, location="bottom", label=label)
    best = table.tail(16)
    bars = [best.score - best.low, best.high - best.score]
    axes[3].errorbar(best.score, best.electrode, xerr=bars, fmt="o", ms=4, capsize=2)
    axes[3].axvline(chance, c="0.6", lw=0.8)
    axes[3].tick_params(axis="y", labelsize=7)
    axes[3].set(xlabel=label, title="the best")
    figure.suptitle(f"{title}; black edges: FDR {FDR:g}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- main


def main(config):
    if config.apply:
        return load_function(f"{HERE / 'decode_apply.py'}:apply_decoders", "apply")(config)
    run = Run(config)
    experiment = prepare(run, config)
    jobs = run.share(itertools.product(all_lags(config), range(config.n_folds)))
    bar = run.progress(len(jobs), desc="lags and folds")
    for lag in all_lags(config):
        folds = [fold for fold in experiment.folds if (lag, fold.number) in jobs]
        todo = [fold for fold in folds if not job_file(run, lag, fold).exists()]
        X = {}
        for name, windows in experiment.inputs.items():
            if todo:
                X[name] = torch.as_tensor(windows.at(experiment.rows, lag), device=run.device)
        for fold in todo:
            scores = fit_and_score(run, config, experiment, X, fold, lag)
            write_aside(job_file(run, lag, fold), scores.to_csv(float_format=DIGITS))
            bar.update()
        bar.update(len(folds) - len(todo))
    bar.close()
    run.barrier()
    report(run, config, experiment)
    run.merge()
    run.close()


if __name__ == "__main__":
    main(configure(Config, benchmark_yaml.command_line(sys.argv[1:])))
