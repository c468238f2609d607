"""When, where and how well can heard words be decoded from electrodes in the brain?

    python decode.py                                            # embedded: made-up electrodes
    python decode.py config/decode_podcast.yaml                 # Podcast ECoG (make neural-conv)
    python decode.py task=content       # or pos, sentence_onset, surprisal, volume, my_file.py:name
    python decode.py model=my_file.py:constructor preprocess=my_file.py:function
    python decode.py config/decode_foundation.yaml              # latents of foundation.py's encoder
    python decode.py --config configs/neural_conv_decoder/neural_conv.yml    # podcast-benchmark's
    python decode.py apply=out/decode recording=PATH            # saved decoders on a new recording
    torchrun --standalone --nproc_per_node=4 decode.py config/decode_podcast.yaml

At each lag a decoder maps the window around a word's onset + lag to the word's embedding, and its
predictions for held-out words are scored against the embeddings of all words. Nothing is fitted or
chosen on test words: z-scores and PCA come from training words, alpha, epoch and lag from
validation words, and no test window shares a sample with theirs. The null shifts the words.

decode_encoding.py goes the other way; decode_neuroprobe.py runs the Neuroprobe benchmark.
Goldstein et al. 2022 (Nat Neurosci 25:369, the decoder); Zada et al. 2025 (Sci Data 12:1135).
"""

import functools
import hashlib
import inspect
import itertools
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
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
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from configurator import InputError, Run, check_keys, configure, key_seed, load_function
from convert import HiddenStates
from data import file_hash, read_table, vectors, write_aside
from data.montage import Montage, Windows, choose_electrodes
from data.podcast import benchmark_yaml, registry
from data.podcast.speech import TASKS, as_target, describe, read_podcast
from model import check_choice, save_checkpoint


@dataclass
class Config:
    # ---- recording
    dataset: str = "synthetic_podcast"  # name under data/, or a prepared folder (data/recording.py)
    subjects: list[str] = field(default_factory=list)  # sub-03 or 3; none: all, side by side
    channels: str = ""  # regular expression for the start of a channel's name: LG[AB]*
    electrodes: str = ""  # CSV with the columns subject and elec
    reference: Literal["none", "laplacian"] = "none"  # laplacian: minus the shaft's neighbours
    # ---- windows
    min_lag: float = -400.0  # ms from a word's onset to the middle of its window
    max_lag: float = 1000.0  # ms, not included
    lag_step: float = 100.0  # ms
    lags: list[float] = field(default_factory=list)  # ms, instead of the three above
    window: float = 0.2  # s
    represent: Literal["bins", "spectrum"] = "bins"  # bin means, or log power over time
    bins: int = 10  # per window
    spectrum_segment: float = 0.1  # s, Hann windows that overlap by half
    spectrum_max: float = 200.0  # Hz
    preprocess: str = ""  # instead of represent=: my_file.py:function(windows, preprocessor_params)
    preprocessor_params: dict = field(default_factory=dict)  # for preprocess=
    untrained: int = 0  # copies of the pretrained encoder with random weights, as controls
    # ---- target
    task: str = "embedding"  # or content, pos, sentence_onset, surprisal, volume, my_file.py:f
    task_params: dict = field(default_factory=dict)  # for my_file.py:f(words, task_params)
    # a set's features (gpt2-xl), lm, static, arbitrary, or a file of vectors (GloVe)
    embedding: list[str] = field(default_factory=lambda: ["gpt2-xl"])
    layer: int = 24  # of lm=, and of features that have layers
    lm: str = "out/train"  # embedding=lm: its hidden states; static: its token embeddings
    pca: int = 16  # dimensions, fitted on training words; 0: all
    word: str = "norm_word"  # column of words.csv that tells word types apart
    # ---- decoders
    # a name in DECODERS (pitom_model, foundation_mlp, ridge, ...), or my_file.py:f
    model: str = "ensemble_pitom_model"
    model_params: dict = field(default_factory=dict)  # for model= only
    beside: list[str] = field(default_factory=lambda: ["ridge"])  # more decoders, same windows
    controls: list[str] = field(default_factory=lambda: ["mean", "unigram", "preceding", "oracle"])
    config_setter: str = ""  # neural_conv, foundation_model or my_file.py:f (podcast/registry.py)
    # ---- training
    batch_size: int = 32  # words
    epochs: int = 60  # at most
    learning_rate: float = 1e-3  # for AdamW
    weight_decay: float = 1e-4
    patience: int = 10  # epochs without a better validation cosine, whatever the loss
    loss: str = "mse"  # for embeddings, a name in LOSSES: mse, cosine
    # ---- folds and scores
    n_folds: int = 5  # each word is tested once
    fold_type: Literal["sequential", "zero_shot"] = "sequential"  # split by time, or by word type
    min_count: int = 5  # training words a type needs for its AUC to count; zero_shot: test words
    n_shifts: int = 1000  # circular shifts of the words: the null
    save_models: bool = True  # in models/, for apply=
    # ---- saved decoders on a new recording
    apply: str = ""  # out folder of a finished run
    recording: str = ""  # folder of a prepared recording, or of a set with the same people
    # ---- run
    out_dir: str = "out/decode"  # tables, figures, models; run again to continue
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
        check_choice("loss", self.loss, LOSSES)
        for name in [self.model, *self.beside]:
            registry.resolve(name, DECODERS, "model")
        registry.resolve(self.task, {"embedding": None, **TASKS}, "task")
        registry.resolve(self.preprocess or "preprocess_neural_data", PREPROCESSORS, "preprocess")
        registry.resolve(self.config_setter or "neural_conv", SETTERS, "config_setter")
        if self.untrained and self.preprocess != "foundation_model_preprocessing_fn":
            raise InputError("untrained= needs preprocess=foundation_model_preprocessing_fn")
        if bool(self.apply) != bool(self.recording):
            raise InputError("give both apply= (a finished run's folder) and recording=")


FDR = 0.05  # false discovery rate, over lags or over electrodes
VAL_SHARE = 0.25  # of the words outside the test fold
ALPHAS = 10.0 ** np.arange(-1, 9, dtype=np.float32)  # for ridge, chosen on validation words
FOUNDATION = Path(__file__).with_name("decode_foundation.py")  # pretrained encoders
APPLY = Path(__file__).with_name("decode_apply.py")


def check_folds_and_lags(config):
    """Refuse a single fold, or no lag at all; decode_encoding.py calls this, too."""
    if config.n_folds < 2:
        raise InputError(f"n_folds={config.n_folds}: give at least 2, so that each word is tested")
    if not all_lags(config):
        raise InputError("no lag lies from min_lag up to max_lag, which is not included")


def all_lags(config):
    """Return the lags in ms, ascending and each once, without max_lag itself."""
    lags = config.lags or np.arange(config.min_lag, config.max_lag, config.lag_step).tolist()
    return sorted(set(lags))


# ---- recordings and words


def load_podcast(run, config):
    """Return the Podcast of dataset= and the Montage of the chosen people and electrodes."""
    podcast = read_podcast(run.dataset(config.dataset), config.dataset)
    if config.word not in podcast.words:
        raise InputError(f"word={config.word} is not a column: take {', '.join(podcast.words)}")
    which = config.subjects, config.channels, config.electrodes
    montage = Montage(choose_electrodes(podcast.recordings, *which), config.reference)
    if montage.gaps:
        run.print(f"left out, constant or with missing samples (NaN): {', '.join(montage.gaps)}")
    return podcast, montage


# preprocess= is one of these, or my_file.py:function(windows, preprocessor_params)
PREPROCESSORS = {
    "preprocess_neural_data": registry.preprocess_neural_data,  # Windows makes these bins itself
    "foundation_model_preprocessing_fn": f"{FOUNDATION}:frozen_latents",
    "foundation_model_input": f"{FOUNDATION}:EncoderInput",
}


def make_windows(config, montage, cache):
    """Return the Windows (data/montage.py): bins, spectra, or the output of preprocess=."""
    spec = config.preprocess
    params = config.preprocessor_params
    if params and not spec:
        raise InputError("preprocessor_params= needs preprocess=, whose parameters they are")
    if spec in ("", "preprocess_neural_data"):
        check_keys(params, ["num_average_samples"], "preprocessor_params")
        return Windows(montage, config, cache)
    function = registry.resolve(spec, PREPROCESSORS, "preprocess")
    if spec in PREPROCESSORS:
        reader = function(montage, params, config.device)
    else:
        reader = registry.UserFunction(spec, function, montage, params)
    return Windows(montage, config, cache, reader)


# ---- targets


def make_target(run, config, podcast):
    """Return the Target of task=."""
    events = podcast.words
    if config.task == "embedding":
        values = word_vectors(run, config, podcast, config.embedding[0])
    elif config.task in TASKS:
        events, values = TASKS[config.task](podcast, config.window)
    else:
        events, values = user_target(config, events)
    return as_target(events, values, config.word)


def user_target(config, words):
    """Return (events, targets) of task=my_file.py:f(words, task_params): a target for each word, or
    a table with start and target. Floats are numbers, rows are vectors, all else is a class."""
    values = registry.resolve(config.task, TASKS, "task")(words.copy(), config.task_params)
    try:
        if isinstance(values, pd.DataFrame):
            words = values.astype({"start": float})
            values = values["target"].tolist()
        values = np.squeeze(np.asarray(values))  # one column holds numbers, not vectors
        if values.ndim not in (1, 2) or len(values) != len(words):
            raise ValueError(f"shape {values.shape} for {len(words)} words")
    except (KeyError, ValueError) as error:
        raise InputError(
            f"task={config.task} returned what cannot be decoded ({error}): return a target for "
            "each word, or a table with the columns start (s) and target"
        ) from None
    return words, values


def word_vectors(run, config, podcast, name):
    """Return the vectors (words, D) float32 of one entry of embedding=, NaN where unknown.

    lm: hidden states at layer=; static: token embeddings; arbitrary: a random vector per word type;
    else released features (gpt2-xl) or a file (GloVe).
    """
    words = podcast.words
    features = podcast.meta.get("features", {})
    labels = words[config.word].astype(str)
    spoken = words.word.astype(str).tolist()
    if name == "arbitrary":
        return vectors.arbitrary_vectors(labels, config.pca or 50, config.seed)
    if name == "lm":
        return vectors.contextual_vectors(HiddenStates(config.lm, run.device), spoken, config.layer)
    if name == "static":
        return vectors.static_vectors(HiddenStates(config.lm, run.device), spoken)
    if name in features:
        meta = podcast.meta
        return vectors.released_features(podcast.folder, meta, name, config.layer, words.word_idx)
    if Path(name).is_file():
        return vectors.look_up(labels, name)
    raise InputError(
        f"embedding={name} is neither lm, static or arbitrary, nor one of the set's features "
        f"({', '.join(features)}), nor a file of word vectors such as glove.6B.50d.txt"
    )


def keep_words(target, windows, config):
    """Return the target and rows (people, words) of the words with a whole window at every lag."""
    lags = all_lags(config)
    rows = windows.montage.rows(target.start)
    inside = np.ones(len(target.start), bool)
    for lag in lags:
        inside &= windows.montage.inside(windows.first(rows, lag), windows.width)
    if inside.sum() < 10 * config.n_folds:
        raise InputError(
            f"only {inside.sum()} words have their windows inside the recording and outside BAD "
            f"segments at every lag from {lags[0]:g} to {lags[-1]:g} ms, too few for "
            f"{config.n_folds} folds: narrow min_lag= and max_lag=, or window="
        )
    target = target.only(inside, "with a window outside the recording or in a BAD segment")
    one_word = target.kind == "vectors" and len(set(target.labels)) < 2
    if one_word or (target.values == target.values[0]).all():
        raise InputError(
            f"all {len(target.start)} events are the same word, or have the same target: check the "
            "transcript, word= and embedding="
        )
    return target, rows[:, inside]


def content_of(config, windows, target, rows):
    """Hash what results depend on besides the options: recordings, files, code."""
    values = target.values.tobytes()
    if {"lm", "static"} & set(config.embedding):  # the model's files: its states vary in rounding
        values = repr(registry.files_in([config.lm])).encode()
    content = windows.content() + file_hash(vectors.__file__)
    content = content.encode() + rows.tobytes() + values + repr(list(target.labels)).encode()
    return hashlib.sha256(content).hexdigest()[:6]


# ---- folds


@dataclass
class Fold:
    """One split of the events into train, val and test (row numbers).

    shifts: (n_shifts,) in [0, 1), how far the null shifts the test words, at least `gap` words. Y:
    the fold's target, (N, D) or classes (N,), made by projection: (mean, components, scale).
    """

    number: int
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    shifts: np.ndarray
    gap: int = 1
    Y: np.ndarray | None = None
    projection: tuple = (0.0, 1.0, 1.0)


def make_folds(config, start, labels, seconds):
    """Return the folds of events in order of time: start (N,) in s, labels (N,), window in s."""
    everyone = np.arange(len(start))
    tests = np.array_split(everyone, config.n_folds)
    if config.fold_type == "zero_shot":
        tests = deal_words(labels, config.n_folds, key_seed(config.seed, "folds"))
    gap = math.ceil(seconds / max(np.median(np.diff(start)), 1e-3)) + 1
    folds = []
    for k, test in enumerate(tests):
        rest = np.setdiff1d(everyone, test)
        val = rest[round((1 - VAL_SHARE) * len(rest)) :]
        if config.fold_type == "zero_shot":
            parts = deal_words(labels[rest], round(1 / VAL_SHARE), key_seed(config.seed, "val", k))
            val = rest[parts[0]]
        train = embargo(np.setdiff1d(rest, val), test, start, seconds)
        val = embargo(val, test, start, seconds)
        train = embargo(train, val, start, seconds)
        if min(len(train), len(val), len(test)) < 4:
            raise InputError(
                f"fold {k} of {len(start)} events has {len(train)} training, {len(val)} validation "
                f"and {len(test)} test events: set a smaller n_folds= or window="
            )
        shifts = np.random.default_rng(key_seed(config.seed, "shift", k)).random(config.n_shifts)
        folds.append(Fold(k, train, val, test, shifts, gap))
    return folds


def deal_words(labels, n_parts, seed):
    """Split the rows of labels into n_parts lists, each word type in one of them."""
    words = np.random.default_rng(seed).permutation(np.unique(labels))
    return [np.flatnonzero(np.isin(labels, part)) for part in np.array_split(words, n_parts)]


def embargo(rows, protected, start, seconds):
    """Return the `rows` whose windows share no sample with a window of `protected`."""
    distance, _ = spatial.KDTree(start[protected, None]).query(start[rows, None])
    return rows[distance >= seconds - 1e-9]


def fit_target(fold, target, config):
    """Set fold.Y and fold.projection, whose PCA is fitted on the fold's training words."""
    if target.kind != "classes":
        n_dims = config.pca if target.kind == "vectors" else 0
        fold.Y, fold.projection = vectors.project(target.values, fold.train, n_dims)
        return
    fold.Y = target.values
    for part in ("train", "val", "test"):
        classes = np.unique(fold.Y[getattr(fold, part)])
        if len(classes) < 2:
            raise InputError(
                f"task={config.task}: the {part} events of fold {fold.number} are all "
                f"'{target.names[classes[0]]}': set a smaller n_folds=, or another task="
            )


# ---- decoders

# A decoder is a torch module: (words, *input_shape) -> (words, output_dim), or (words, members,
# output_dim) for an ensemble, trained on the members' mean and scored by their mean cosine.
# input_shape is (electrodes, bins), or the shape that represent= or preprocess= makes. __init__ may
# name model_params, input_shape, input_channels (its first number) and output_dim; a constructor in
# my_file.py gets them all in one dictionary. The module may have penalty(), which is added to the
# loss, and norm_output, which is set to whether the target is an embedding.


class EnsemblePitomModel(nn.Module):
    """Decoder of Goldstein et al. 2022: (words, input_channels, bins) -> (words, num_models, D).

    Each member is one group of every convolution; the published ensemble has 10 members of 128
    filters. reg, reg_head: L2 penalty on the convolutions and on the head.
    """

    norm_output = True  # layer norm, then tanh, as published, for embeddings only

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
    """(words, ...) -> (words, output_dim); layer_sizes include the inputs and the outputs."""

    norm_output = True  # layer norm at the end, for embeddings only

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
    """(words, ...) -> (words, output_dim); closed forms set its weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), output_dim))


DECODERS = {
    "ensemble_pitom_model": EnsemblePitomModel,
    "pitom_model": PitomModel,
    "foundation_mlp": MLP,
    "foundation_finetune": f"{FOUNDATION}:FineTune",
    "ridge": linear_decoder,
    "logistic": linear_decoder,
}


def build_network(spec, model_params, input_shape, output_dim):
    """Construct the module of a decoder."""
    constructor = registry.resolve(spec, DECODERS, "model")
    params = {
        "input_shape": list(input_shape),
        "input_channels": input_shape[0],
        "output_dim": output_dim,
        "embedding_dim": output_dim,  # podcast-benchmark's name for it
        **model_params,
    }
    if spec not in DECODERS:
        return constructor(params)
    named = inspect.signature(constructor).parameters
    check_keys(model_params, {*named, "input_channels", "embedding_dim"}, "model_params")
    return constructor(**{key: params[key] for key in named if key in params})


class Decoder(nn.Module):
    """A network with z-scored inputs: (words, *input_shape) -> (words, members, output_dim)."""

    def __init__(self, spec, model_params, input_shape, output_dim, kind):
        super().__init__()
        self.spec, self.output_dim = spec, output_dim
        channels = (input_shape[0], 1) if len(input_shape) == 2 else input_shape
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        try:
            self.network = build_network(spec, model_params, input_shape, output_dim)
            if hasattr(self.network, "norm_output"):
                self.network.norm_output = kind == "vectors"
            words = torch.arange(3.0).view(3, *[1] * len(input_shape)).expand(3, *input_shape)
            out = self.eval()(words)
            alone = self(words[1:2])
        except InputError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise InputError(
                f"model={spec} cannot read {list(input_shape)} inputs per word, electrodes first "
                f"({' '.join(str(error).split())}): set bins=, window= or model_params=, or fix it"
            ) from None
        if out.ndim != 3 or out.shape[::2] != (3, output_dim):
            raise InputError(
                f"model={spec} returned shape {tuple(out.shape)} for 3 words: return "
                f"(words, {output_dim}) or (words, members, {output_dim})"
            )
        self.n_members = out.shape[1]
        if not torch.allclose(out[1], alone[0], rtol=1e-2, atol=1e-3):
            raise InputError(
                f"model={spec} mixes the words of a batch: the first dimension must stay the words"
            )

    def set_scale(self, x):
        """Fit z-scores to training words x, per channel of (words, channels, time) or feature."""
        axes = (0, 2) if x.ndim == 3 else 0
        scale, mean = torch.std_mean(x.cpu().double(), axes, correction=0, keepdim=True)
        self.mean.copy_(mean[0])
        self.scale.copy_(torch.where(scale > 0, scale, 1)[0])

    def forward(self, x):
        out = self.network((x - self.mean) / self.scale)
        return out if out.ndim > 2 else out.reshape(len(x), 1, -1)


# ---- training


def fit_decoder(spec, X, target, fold, config):
    """Return the fitted Decoder and its validation outputs; X: tensor (words, *input_shape)."""
    output_dim = len(target.names) or fold.Y.shape[1]
    params = config.model_params if spec == config.model else {}
    torch.manual_seed(key_seed(config.seed, spec, fold.number))
    decoder = Decoder(spec, params, X.shape[1:], output_dim, target.kind).to(X.device)
    if config.preprocess != "foundation_model_input":  # which is scaled as in pretraining
        decoder.set_scale(X[fold.train])
    if spec not in CLOSED_FORM:
        train(decoder, X, target, fold, config)
        return decoder, predict(decoder, X[fold.val])
    if spec == "logistic" and target.kind != "classes":
        raise InputError("model=logistic is for classes such as task=content: take ridge")
    x = ((X - decoder.mean) / decoder.scale).flatten(1).cpu().numpy()
    y = np.eye(output_dim, dtype=np.float32)[fold.Y] if target.kind == "classes" else fold.Y
    weights, offset, val = CLOSED_FORM[spec](x, y, fold)
    linear = decoder.network[1].state_dict()  # its tensors: (outputs, inputs), (outputs,)
    linear["weight"].copy_(torch.as_tensor(weights).T)
    linear["bias"].copy_(torch.as_tensor(offset))
    return decoder, val[:, None]


def train(decoder, X, target, fold, config):
    """Train with AdamW and keep the weights of the best epoch on the validation words."""
    y = torch.as_tensor(fold.Y, device=X.device)
    weights = None
    if target.kind == "classes":  # all classes weigh the same
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
            raise InputError(f"model={decoder.spec} diverges: set a smaller learning_rate=")
        if score > best:
            best = score
            decoder.best_epoch = epoch
            best_state = {name: value.clone() for name, value in decoder.state_dict().items()}
        elif epoch - decoder.best_epoch >= config.patience:
            break
    decoder.load_state_dict(best_state)


def cosine_distance(out, y):
    """Return 1 - the mean cosine of predictions and targets (words, D)."""
    return (1 - F.cosine_similarity(out, y)).mean()


LOSSES = {"mse": F.mse_loss, "cosine": cosine_distance}  # of predicted and true embeddings


def loss_of(out, y, kind, config=None, weights=None):
    """Return the loss of the members' mean: out (words, members, D), y (words, D) or (words,)."""
    mean = out.mean(dim=1)
    if kind == "classes":
        return F.cross_entropy(mean, y, weights)
    if kind == "number":
        return F.mse_loss(mean, y)
    return LOSSES[config.loss](mean, y)


def validation_score(out, y, kind):
    """Return the early-stopping score: the members' mean cosine, or minus the loss."""
    if kind == "vectors":
        return float((unit(out) * unit(y)[:, None]).sum(axis=-1).mean())
    return -float(loss_of(torch.as_tensor(out), torch.as_tensor(y), kind))


@torch.no_grad()
def predict(decoder, X):
    """Return the outputs (words, members, output_dim) for a tensor X (words, ...) as an array."""
    decoder.eval()
    return torch.cat([decoder(x) for x in X.split(512)]).float().cpu().numpy()


def fit_ridge(x, y, fold):
    """Return the weights, offset and validation predictions of himalaya's ridge.

    Each output has the alpha with which a fit on training words predicts the validation words best;
    these are the validation predictions. The weights are refitted on both.
    """
    rows = np.concatenate([fold.train, fold.val])
    n = len(fold.train)
    split = [(np.arange(n), np.arange(n, len(rows)))]
    options = {"fit_intercept": True, "warn": False}
    alphas, weights, _, offset = solve_ridge_cv_svd(x[rows], y[rows], ALPHAS, cv=split, **options)
    trained, intercept = solve_ridge_svd(x[fold.train], y[fold.train], alphas, **options)
    return weights, offset, x[fold.val] @ trained + intercept


def fit_logistic(x, y, fold):
    """Return the same of scikit-learn's logistic regression on training words, C by validation."""
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
        if len(fit.classes_) == 2:  # scikit-learn returns the second class only
            coef, intercept = np.concatenate([0 * coef, coef]), np.append(0, intercept)
        weights = np.zeros((x.shape[1], y.shape[1]))
        weights[:, fit.classes_] = coef.T
        offset = np.full(y.shape[1], -30.0)  # for a class without training words
        offset[fit.classes_] = intercept
        logits = x[fold.val] @ weights + offset
        score = validation_score(logits[:, None], labels[fold.val], "classes")
        if score > best:
            best = score
            best_fit = basis @ weights, offset, logits
    return best_fit


CLOSED_FORM = {"ridge": fit_ridge, "logistic": fit_logistic}


# ---- scores


PRIMARY = {"vectors": "auc", "classes": "roc_auc", "number": "corr"}  # chooses the lag
LOWER_IS_BETTER = ["perplexity", "occ_perplexity", "mse", "cross_entropy"]
NO_SHIFTS = np.zeros(0)
FACTS = ["score", "low", "high", "chance", "n"]  # the other columns of scores are shifts


def unit(x):
    """Scale vectors to length 1, zeros excepted."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def circular(shifts, n, gap):
    """Return orders (1 + P, n) of n words: unchanged, then shifted in a circle by `gap` or more.

    shifts: (P,) in [0, 1). Unlike a shuffle, a shift keeps the autocorrelation.
    """
    gap = min(gap, n // 4)
    steps = gap + (shifts * max(1, n - 2 * gap)).astype(int)
    return (np.arange(n) + np.append(0, steps)[:, None]) % n


def word_auc(scores, y, orders):
    """Return the ROC-AUC of each class against the rest under each order of the labels: (P, V).

    scores: (N, V) of items for classes; y: (N,) classes; orders: (P, N), in which item i has class
    y[orders[p, i]]. NaN where a class is absent or the only one. Orders leave the ranks unchanged:
    AUC = (sum of the class's ranks - n (n + 1) / 2) / (n (N - n)), where ties share their rank.
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
    """Return a DataFrame with the mean unit vector of each word type over the rows."""
    return pd.DataFrame(unit(Y[rows])).groupby(labels[rows]).mean()


class WordScorer:
    """Score predicted vectors for some rows, a fold's validation or test words.

    Candidates are the word types among the rows, each with its mean unit embedding over training
    words (zero-shot folds: over the rows). For 2AFC, cosine and the metrics occ_*, candidates are
    the embeddings of the rows themselves.
    """

    def __init__(self, fold, rows, labels, config):
        spoken = labels[rows]
        zero_shot = config.fold_type == "zero_shot"
        means = word_means(fold.Y, labels, rows if zero_shot else fold.train)
        words = np.intersect1d(spoken, means.index)
        trained = pd.Series(labels[fold.train]).value_counts()
        self.vectors = means.loc[words].to_numpy()
        self.occurrences = unit(fold.Y[rows])
        self.has_vector = np.isin(spoken, words)
        self.y = np.searchsorted(words, spoken[self.has_vector])
        self.n_trained = trained.reindex(words, fill_value=0).to_numpy()
        self.n_trained_of_rows = trained.reindex(spoken, fill_value=0).to_numpy()
        self.n_spoken = np.bincount(self.y, minlength=len(words))
        self.counted = (self.n_spoken if zero_shot else self.n_trained) >= config.min_count
        self.gap = fold.gap
        if not self.counted.any():
            raise InputError(
                f"fold {fold.number}: no word occurs min_count={config.min_count} times: set a "
                "smaller min_count= or n_folds="
            )

    def measure(self, words, pairs):
        """Return f(kept, shifts) -> {metric: (1 + shifts,)} for the similarities of rows with a
        word vector to words (n, V), and of all rows to each other's embeddings (N, N)."""
        log_p = special.log_softmax(words, axis=1)
        weights = {"auc": 1, "auc_test": self.n_spoken}
        if self.n_trained.any():  # not in zero-shot folds
            weights["auc_train"] = self.n_trained
        word_table = rank_table(words)
        pair_table = {f"occ_{metric}": values for metric, values in rank_table(pairs).items()}
        pair_table["two_afc"] = (stats.rankdata(pairs, axis=1) - 1) / max(1, len(pairs) - 1)
        pair_table["cosine"] = pairs

        def measure(kept, shifts):
            y = self.y[kept[self.has_vector]]
            orders = circular(shifts, len(y), self.gap)
            each = np.ma.masked_invalid(word_auc(log_p[kept[self.has_vector]], y, orders))
            values = {}
            for metric, weight in weights.items():
                mean = np.ma.average(each, axis=1, weights=weight * self.counted)
                values[metric] = mean.filled(np.nan)
            values |= shifted_means(word_table, self.y, kept[self.has_vector], orders)
            orders = circular(shifts, kept.sum(), self.gap)
            return values | shifted_means(pair_table, np.arange(len(kept)), kept, orders)

        return measure


def rank_table(scores):
    """Return {metric: (rows, candidates)}, what each candidate would score if it were right."""
    lowest = stats.rankdata(-scores, method="min", axis=1)
    tied = stats.rankdata(-scores, method="max", axis=1) - lowest + 1
    table = {"perplexity": -special.log_softmax(scores, axis=1)}
    for k in (1, 5, 10):  # as if ties were broken at random
        table[f"top{k}"] = np.clip((k + 1 - lowest) / tied, 0, 1)
    return table


def shifted_means(table, right, kept, orders):
    """Return {metric: (P,)}, means of the table over the rows `kept`, `right` reordered."""
    rows = np.flatnonzero(kept)
    right = right[rows][orders]
    values = {}
    for metric, scores in table.items():
        values[metric] = scores[rows, right].mean(axis=1)
        if metric.endswith("perplexity"):
            values[metric] = np.exp(values[metric])
    return values


def measure_classes(out, y, names, orders):
    """Return {metric: (P,)} of outputs (n, K) for classes y (n,), reordered by orders (P, n)."""
    log_p = special.log_softmax(out, axis=1)
    auc = word_auc(log_p, y, orders)
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
    """Return {metric: (P,)} of outputs (n,) for numbers y (n,), reordered by orders (P, n)."""
    y = y[orders]
    a, b = out - out.mean(), y - y.mean(axis=1, keepdims=True)
    mse = np.square(y - out).mean(axis=1)
    corr = b @ a / np.maximum(np.linalg.norm(a) * np.linalg.norm(b, axis=1), 1e-12)
    return {"corr": corr, "r2": 1 - mse / np.maximum(y.var(axis=1), 1e-12), "mse": mse}


def measure_of(out, rows, target, fold, config):
    """Return f(kept, shifts) -> {metric: (1 + shifts,)} for outputs (rows, members, D); kept:
    (rows,) bool, which rows count; shifts: see circular."""
    if target.kind == "vectors":
        scorer = WordScorer(fold, rows, target.labels, config)
        mean = unit(out).mean(axis=1)  # its products are cosines, averaged over members
        words = mean[scorer.has_vector] @ scorer.vectors.T
        return scorer.measure(words, mean @ scorer.occurrences.T)

    def measure(kept, shifts):
        orders = circular(shifts, kept.sum(), fold.gap)
        mean, y = out.mean(axis=1)[kept], fold.Y[rows][kept]
        if target.kind == "classes":
            return measure_classes(mean, y, target.names, orders)
        return measure_numbers(mean[:, 0], y[:, 0], orders)

    return measure


def fit_and_score(spec, x, target, fold, config):
    """Fit a decoder and return it with its test scores; the row val is PRIMARY on validation."""
    decoder, out = fit_decoder(spec, x, target, fold, config)
    table = evaluate(predict(decoder, x[fold.test]), target, fold, config)
    val = measure_of(out, fold.val, target, fold, config)(np.ones(len(out), bool), NO_SHIFTS)
    table.loc["val", "score"] = val[PRIMARY[target.kind]][0]
    return decoder, table


def evaluate(out, target, fold, config):
    """Score outputs (words, members, D) for the test events, see with_intervals."""
    return with_intervals(measure_of(out, fold.test, target, fold, config), fold)


def with_intervals(measure, fold):
    """Return a DataFrame with a row per metric: FACTS, then the score of each shift. The 95 %
    intervals are a jackknife over ten stretches of the test events."""
    rows = np.arange(len(fold.test))
    table = pd.DataFrame(measure(rows >= 0, fold.shifts)).T.rename_axis("metric")
    parts = []
    for stretch in np.array_split(rows, min(10, len(rows))):
        parts.append(pd.DataFrame(measure(~np.isin(rows, stretch), NO_SHIFTS)))
    half = 1.96 * np.sqrt((len(parts) - 1) * pd.concat(parts).var(ddof=0))
    score, null = table[0], table.iloc[:, 1:].rename(columns=str)
    facts = {"score": score, "low": score - half, "high": score + half}
    facts |= {"chance": null.mean(axis=1), "n": len(rows)}
    return pd.concat([pd.DataFrame(facts), null], axis=1)


def p_value(observed, null):
    """Return the one-sided p of observed (...) under null (P, ...), NaN where either has a NaN."""
    observed = np.asarray(observed)
    as_good = null >= observed - 1e-8 * np.abs(observed)  # ties, but for rounding
    p = (1 + as_good.sum(axis=0)) / (len(null) + 1)
    return np.where(np.isfinite(observed) & np.isfinite(null).all(axis=0), p, np.nan)


def fdr_q(p):
    """Return Benjamini and Hochberg's q of p values, leaving NaN out."""
    q = np.full(np.shape(p), np.nan)
    finite = np.isfinite(p)
    q[finite] = stats.false_discovery_control(p[finite])
    return q


def say_few_shifts(run, p, q, n_shifts):
    """Report when n_shifts is so small that no p could pass FDR."""
    if np.any((p <= 1 / (n_shifts + 1)) & (q >= FDR)):
        n = np.isfinite(p).sum()
        run.print(
            f"n_shifts={n_shifts} is too few: the smallest p, 1/{n_shifts + 1}, does not pass "
            f"FDR {FDR:g} over {n} tests; set n_shifts={math.ceil(n / FDR)}"
        )


# ---- controls, which do not see the brain


def mean_vector(target, fold, config):
    """Always predict the training mean, or the training frequencies of classes."""
    y = fold.Y[fold.train]
    guess = unit(y).mean(axis=0) if target.kind == "vectors" else y.mean(axis=0)
    if target.kind == "classes":
        guess = np.log(np.bincount(y, minlength=len(target.names)) + 0.5)
    return evaluate(np.tile(guess, (len(fold.test), 1, 1)), target, fold, config)


def most_frequent_words(target, fold, config):
    """Always predict the most frequent training words."""
    scorer = WordScorer(fold, fold.test, target.labels, config)
    words = np.tile(np.log(scorer.n_trained + 0.5), (len(scorer.y), 1))
    pairs = np.tile(np.log(scorer.n_trained_of_rows + 0.5), (len(fold.test), 1))
    scores = with_intervals(scorer.measure(words, pairs), fold)
    return scores.drop(["cosine", "perplexity", "occ_perplexity"])  # frequencies are no cosines


def preceding_words(target, fold, config):
    """Predict each word by ridge from the embeddings of the three words before it."""
    x = np.zeros((len(fold.Y), 3, fold.Y.shape[1]), np.float32)
    for k in (1, 2, 3):
        x[k:, k - 1] = fold.Y[:-k]
    x = x.reshape(len(x), -1)
    weights, offset, _ = fit_ridge(x, fold.Y, fold)
    return evaluate((x[fold.test] @ weights + offset)[:, None], target, fold, config)


def oracle(target, fold, config):
    """Predict the true embedding: the ceiling of the scores."""
    return evaluate(fold.Y[fold.test][:, None], target, fold, config)


CONTROLS = {
    "mean": mean_vector,
    "unigram": most_frequent_words,
    "preceding": preceding_words,
    "oracle": oracle,
}


# ---- the sweep over lags and folds

SETTERS = {
    "neural_conv": registry.neural_conv,
    "foundation_model": f"{FOUNDATION}:foundation_model",
}


def make_inputs(run, config, montage):
    """Return {name: Windows}: '' for every decoder; untrained twins and the raw signal for ridge. A
    reader of preprocess= may add to config.model_params."""
    cache = run.out.parent / "cache"
    inputs = {"": make_windows(config, montage, cache)}
    for k in range(1, config.untrained + 1):
        params = {**config.preprocessor_params, "untrained": k}
        twin = replace(config, preprocessor_params=params)
        inputs[f", untrained {k}"] = make_windows(twin, montage, cache)
    if config.untrained:
        raw = replace(config, preprocess="", preprocessor_params={})
        inputs[", raw signal"] = make_windows(raw, montage, cache)
    reader = inputs[""].reader
    if reader:
        run.print(reader.description)
        config.model_params = {**reader.model_params, **config.model_params}
    return inputs


def save_decoder(run, config, decoder, fold, target, montage, facts):
    """Write models/lag_L_fold_K.pt for decode_apply.py."""
    means = pd.DataFrame()
    if target.kind == "vectors":
        means = word_means(fold.Y, target.labels, fold.train)
    mean, components, scale = fold.projection
    state = {
        "kind": "decoder",
        "spec": decoder.spec,
        "weights": decoder.state_dict(),
        "output_dim": decoder.output_dim,
        "target": target.kind,
        "names": target.names or means.index.tolist() or ["value"],
        "vectors": torch.tensor(means.to_numpy(np.float32)),
        "pca": {"mean": torch.as_tensor(mean), "components": torch.as_tensor(components)},
        "scale": scale,
        "electrodes": montage.names,
        "recordings": montage.checksums(),
        "sfreq": montage.sfreq,
        "config": yaml.safe_load(yaml.safe_dump(asdict(config))),  # plain types
        **facts,
    }
    save_checkpoint(model_file(run, facts["lag"], fold), state)


def model_file(run, lag, fold):
    """Return the path of the decoder of a lag (ms) and fold."""
    return run.out / "models" / f"lag_{lag:g}_fold_{fold.number}.pt"


def job_file(run, lag, fold):
    """Return the path of the scores of a lag and fold, which a restarted run reuses."""
    folder = run.out / "jobs" / run.options_hash()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"lag_{str(lag).removesuffix('.0')}_fold_{fold.number}.csv"


def unfinished(run, config, jobs):
    """Return the jobs (lag, fold) whose scores or decoder are missing, or empty."""
    if config.save_models:
        run.own_folder("models", "lag_*_fold_*.pt")
    todo = []
    for lag, fold in jobs:
        files = [job_file(run, lag, fold)]
        if config.save_models:
            files.append(model_file(run, lag, fold))
        if not all(file.is_file() and file.stat().st_size for file in files):
            todo.append((lag, fold))
    if len(todo) < len(jobs):
        run.print(f"{len(jobs) - len(todo)} lags and folds of an earlier run are reused")
    return todo


# ---- report: scores have the columns lag, fold, model, metric, FACTS and one per shift


def write_results(run, table, **keys):
    """Add the rows of a table with score, chance, low, high and n to results.csv."""
    for row in table.to_dict("records"):
        run.result(**row, **keys)


def all_scores(run, config, target, folds):
    """Return the scores of every job, and of the controls, whose lag is NaN."""
    parts = []
    for lag, fold in itertools.product(all_lags(config), folds):
        parts.append(read_table(job_file(run, lag, fold), na_values=[""]))
    controls = config.controls
    if target.kind != "vectors":
        controls = [name for name in controls if name == "mean"]
        run.print(f"task={config.task}: no control but mean; the others need word vectors")
    for fold, name in itertools.product(folds, controls):
        scores = CONTROLS[name](target, fold, config).reset_index()
        parts.append(scores.assign(model=name, lag=np.nan, fold=fold.number))
    return pd.concat(parts, ignore_index=True)


def at_chosen_lags(scores):
    """Return the scores at the lags that validation words choose, and these lags."""
    val = scores[scores.metric == "val"]
    lags = val.loc[val.groupby(["model", "fold"]).score.idxmax(), ["model", "fold", "lag"]]
    return scores.merge(lags).assign(lag="chosen"), lags


def worth_of_pretraining(chosen):
    """Return scores of ridge on the pretrained encoder minus ridge on each twin, fold by fold."""
    scores = chosen.pivot(index=["fold", "metric"], columns="model", values="score")
    twins = scores.filter(like="ridge, untrained")
    if twins.shape[1] > 1:
        scores[f"ridge, mean of {twins.shape[1]} untrained"] = twins.mean(axis=1)
    gains = scores.filter(like="ridge, ").rsub(scores["ridge"], axis=0)
    gains = gains.rename(columns=lambda name: name.replace("ridge,", "ridge, pretrained -"))
    gains = gains.melt(var_name="model", value_name="score", ignore_index=False).reset_index()
    return gains.assign(lag="chosen").reindex(columns=chosen.columns, fill_value=0.0)


def summarise(scores):
    """Average over folds, per model, metric and lag, with 95 % t intervals over folds, q (FDR over
    lags) and p_max (family-wise, against the best lag of each shift)."""
    scores = scores[scores.metric != "val"].drop(columns="fold")
    groups = scores.groupby(["model", "metric", "lag"], sort=False, dropna=False)
    means = groups.mean()
    half = groups.score.sem() * stats.t.ppf(0.975, groups.size() - 1)
    null = means.drop(columns=FACTS)
    table = pd.DataFrame({"score": means.score, "low": means.score - half})
    table = table.assign(high=means.score + half, chance=null.mean(axis=1))
    table["null_low"], table["null_high"] = null.quantile([0.025, 0.975], axis=1).to_numpy()
    by_metric = ["model", "metric"]
    sign = np.where(table.index.isin(LOWER_IS_BETTER, level="metric"), -1, 1)
    null = null.mul(sign, axis=0)
    best = null.groupby(by_metric).transform("max")
    table["p"] = p_value(sign * table.score, null.T.to_numpy())
    table["q"] = table.groupby(by_metric).p.transform(fdr_q)
    table["p_max"] = p_value(sign * table.score, best.T.to_numpy())
    return table.reset_index()


def report(run, config, podcast, target, folds):
    """Write the tables and the figure, and print the closing lines."""
    scores = all_scores(run, config, target, folds)
    chosen, lags = at_chosen_lags(scores)
    if config.untrained:
        chosen = pd.concat([chosen, worth_of_pretraining(chosen)])
    table, summary = summarise(scores), summarise(chosen)
    name = config.embedding[0] if config.task == "embedding" else config.task
    keys = {"data": podcast.source, "target": name}
    n = len(target.start)
    write_aside(run.out / "lags.csv", table.assign(n=n, **keys).to_csv(index=False))
    columns = ["model", "metric", "lag", "score", "low", "high", "chance"]
    write_results(run, pd.concat([table, summary])[columns], fold="mean", n=n, **keys)
    by_fold = scores.loc[scores.metric != "val", [*columns, "n", "fold"]]
    write_results(run, by_fold.astype({"n": int}), **keys)
    key = "volume_lag_ms" if config.task == "volume" else "lag_ms"
    planted = podcast.meta.get("planted", {}).get(key, np.nan)
    plot_lags(run.out / "lags.png", table, f"{podcast.source}: {name}, {n:,} events", planted)

    metric = PRIMARY[target.kind]
    closing = pd.concat([summary, table[table.lag.isna()]])
    closing = closing[closing.metric == metric].set_index("model")[columns[3:]].round(3)
    closing["lags (ms)"] = lags.lag.map("{:g}".format).groupby(lags.model).agg(" ".join)
    run.print(
        f"{metric} at the lag that each fold's validation words chose, and of the controls; "
        f"n = {n:,}, chance: shifted words\n{closing.to_string(na_rep='')}"
    )
    for _, part in table[(table.metric == metric) & table.lag.notna()].groupby("model"):
        say_few_shifts(run, part.p, part.q, config.n_shifts)
    if not podcast.meta["synthetic"]:
        run.print(registry.PUBLISHED)
    run.print(f"lags.png, lags.csv, results.csv in {run.out}")


PLOTTED = ["auc", "top1", "two_afc", "cosine"]  # for vectors; then for classes and numbers
PLOTTED += ["roc_auc", "balanced_accuracy", "f1", "cross_entropy", "corr", "r2", "mse"]


def plot_lags(path, table, title, planted):
    """Plot the metrics over lag with the first model's null; controls are dotted."""
    metrics = [metric for metric in PLOTTED if metric in set(table.metric)]
    colors = {model: f"C{i}" for i, model in enumerate(table.model.unique())}
    figure, axes = plt.subplots(1, len(metrics), layout="constrained", squeeze=False)
    figure.set_size_inches(4.4 * len(metrics), 4.2)
    for axis, metric in zip(axes[0], metrics):
        for model, part in table[table.metric == metric].groupby("model", sort=False):
            color = colors[model]
            if part.lag.isna().all():  # a control
                axis.axhline(part.score.iloc[0], ls=":", color=color, label=model)
                continue
            if color == "C0":
                band = {"color": "0.85", "lw": 0, "label": f"95 % of shifts, {model}"}
                axis.fill_between(part.lag, part.null_low, part.null_high, **band)
            bars = [part.score - part.low, part.high - part.score]
            axis.errorbar(part.lag, part.score, bars, capsize=2, color=color, label=model)
            for column, marker, fill in (("q", "o", "w"), ("p_max", "s", color)):
                passed = part[part[column] < FDR]
                axis.plot(passed.lag, passed.score, marker, ms=5, color=color, mfc=fill)
        axis.axvline(0, c="0.6", lw=0.8)
        axis.axvline(planted, c="C8", lw=3, alpha=0.4, label="planted")
        axis.set(xlabel="lag of the window's middle (ms)", title=metric)
    labels = axes[0][0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside right center", fontsize=8, frameon=False)
    marks = f"95 % intervals over folds; ring: FDR {FDR:g} over lags, square: family-wise"
    figure.suptitle(f"{title}; {marks}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- main


def main(config):
    if config.apply:
        return load_function(f"{APPLY}:apply_decoders", "apply")(config)
    run = Run(config)
    podcast, montage = load_podcast(run, config)
    target = make_target(run, config, podcast)
    registry.call_setter(config, SETTERS, montage, target)  # may change config
    inputs = make_inputs(run, config, montage)  # may add to config.model_params
    decoders = {name: (name, "") for name in [config.model, *config.beside]}  # (spec, input)
    if config.untrained:
        decoders |= {f"ridge{name}": ("ridge", name) for name in inputs}
    target, rows = keep_words(target, inputs[""], config)
    folds = make_folds(config, target.start, target.labels, inputs[""].width / montage.sfreq)
    for fold in folds:
        fit_target(fold, target, config)
    run.print(describe(podcast, montage, target))
    run.content = content_of(config, inputs[""], target, rows)
    jobs = run.share(itertools.product(all_lags(config), folds))
    todo = unfinished(run, config, jobs)
    bar = run.progress(len(todo), desc="lags and folds")
    for lag, of_lag in itertools.groupby(todo, key=itemgetter(0)):
        X = {name: torch.as_tensor(windows.at(rows, lag)) for name, windows in inputs.items()}
        for _, fold in of_lag:
            tables = {}
            for name, (spec, source) in decoders.items():
                x = X[source].to(run.device)
                decoder, table = fit_and_score(spec, x, target, fold, config)
                tables[lag, fold.number, name] = table
                if bar.n == 0 and decoder.n_members > 1:  # a user may have meant something else
                    run.print(f"{name}: an ensemble of {decoder.n_members} members, averaged")
                if config.save_models and name == config.model:
                    facts = {"lag": float(lag), "val": float(table.score["val"])}
                    save_decoder(run, config, decoder, fold, target, montage, facts)
            scores = pd.concat(tables, names=["lag", "fold", "model"])
            write_aside(job_file(run, lag, fold), scores.to_csv(float_format="%.9g"))
            bar.update()
    bar.close()
    run.barrier()
    if run.master:
        report(run, config, podcast, target, folds)
    run.merge()
    run.close()


if __name__ == "__main__":
    main(configure(Config, benchmark_yaml.command_line(sys.argv[1:])))
