"""When, where and how well can the word that somebody hears be read from electrodes in the brain? Recordings to word embeddings, lag by lag.

    python decode.py                                                        # embedded: words planted in made-up electrodes
    python decode.py direction=encode                                       # the other way: embeddings to every electrode at every lag
    python decode.py config/decode_podcast.yaml                             # Podcast ECoG, one person, -2 to 2 s (make neural-conv)
    python decode.py model=ridge represent=spectrum reference=laplacian     # another decoder, another representation
    python decode.py task=content                                           # or pos, sentence_onset, surprisal, volume, my_file.py:function
    python decode.py model=my_file.py:constructor preprocess=my_file.py:function model_params.width=64
    python decode.py config/decode_foundation.yaml                          # frozen latents of foundation.py's encoder (make foundation-model)
    python decode.py config/decode_neuroprobe.yaml                          # Neuroprobe's tasks and splits, after data/braintreebank/prepare.py
    python decode.py --config configs/neural_conv_decoder/neural_conv.yml   # a YAML of podcast-benchmark, as it is
    torchrun --standalone --nproc_per_node=4 decode.py config/decode_podcast.yaml

A window of the recording around each word's onset + lag goes in, the word's embedding comes out; predictions of held-out words are scored against the
embeddings of all words. What is fitted (z-scores, PCA, electrode choice, alpha, epoch, lag) is fitted on training or validation words; no test window
shares a sample with either. Every decoder that is trained by gradient is trained in stacks: members x folds x lags in one leading axis.

Goldstein et al. 2022 (Nat Neurosci 25:369, the convolutional decoder); Zada et al. 2025 (Sci Data 12:1135); Dupre la Tour et al. 2022 (himalaya).
"""
import ast
import configparser
import hashlib
import importlib.util
import inspect
import json
import math
import re
import sys
import types
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mne
import numpy as np
import pandas as pd
import scipy.signal
import scipy.stats
import torch
import torch.nn as nn
import yaml
from torch.nn import functional as F

from configurator import Run, aside, configure, key_seed, write_aside
from data import read_table
from data.recording import Recording, encoder_input, named_places, places, read_set, resampled, robust_scale
from model import NeuralEncoder, load_encoder, load_lm, save_checkpoint


@dataclass
class Config:
    direction: Literal["decode", "encode", "neuroprobe"] = "decode"  # recording to target; embeddings to every electrode; Neuroprobe's tasks and splits
    # ---- recording
    dataset: str = "synthetic_podcast"     # name under data/, or a prepared folder (data/recording.py)
    subjects: list[str] = field(default_factory=list)  # sub-03 or 3; none: all, their electrodes side by side as those of one person
    channels: str = ""                     # regular expression, from a name's beginning: LG[AB]*
    electrodes: str = ""                   # CSV with columns subject and elec
    reference: Literal["none", "laplacian"] = "none"  # laplacian: each contact minus the mean of its neighbours on the shaft
    bands: list[list[float]] = field(default_factory=list)  # envelopes of these bands (Hz) of a broadband recording: [[4,8],[70,150]]
    # ---- windows
    min_lag: float = -400.0                # ms from the word's onset to the middle of its window
    max_lag: float = 1000.0                # ms, itself left out
    lag_step: float = 100.0                # ms
    lags: list[float] = field(default_factory=list)  # ms, instead of the three above
    window: float = 0.2                    # s
    represent: Literal["bins", "spectrum"] = "bins"  # bin means, or log power of a short-time spectrum
    bins: int = 10                         # of a window
    spectrum_segment: float = 0.1          # s of a Hann window, half overlapping
    spectrum_max: float = 200.0            # Hz
    preprocess: str = ""                   # my_file.py:function(windows (N, E, T), preprocessor_params) instead; it may return overrides too
    preprocessor_params: dict = field(default_factory=dict)  # for it; foundation_model_preprocessing_fn: model_dir, see Encoder below
    untrained: int = 0                     # twins of the encoder of preprocess= with other random weights, and the windows themselves, into the same ridge
    standardize: bool = True               # z-scores by training words
    select: int = 0                        # electrodes that are kept, those that training words drive most; 0: all
    cache: str = "out/cache"               # of what preprocess= made, by content; "": none
    memory: float = 1.0                    # GB of windows held at a time
    # ---- target
    task: str = "embedding"                # or content, pos, sentence_onset, surprisal, volume, my_file.py:function(words, task_params)
    task_params: dict = field(default_factory=dict)  # for it; volume: step (s), sentence_onset: margin (s)
    split: Literal["within", "session", "subject"] = "within"  # neuroprobe: train on the film itself, on another of the same person, on another person
    embedding: list[str] = field(default_factory=lambda: ["gpt2-xl"])  # released features, lm, static, arbitrary, GloVe file; several: encode only
    layer: int = 24                        # of features that have layers, and of lm=
    lm: str = "out/train"                  # embedding=lm: its contextual embeddings; static: its token embeddings
    pool: Literal["mean", "first", "last"] = "mean"  # of a word's tokens
    pca: int = 16                          # dimensions, fitted on training words; 0: all
    whiten: bool = False                   # every component to unit variance
    word: str = "norm_word"                # column of words.csv that says which words are the same
    # ---- model
    model: str = "ensemble_pitom_model"    # independent_pitom_model, pitom_model, foundation_mlp, foundation_finetune, ridge, linear, logistic, file.py:f
    model_params: dict = field(default_factory=lambda: dict(num_models=4, conv_filters=32))  # for it: see pitom and mlp below
    beside: list[str] = field(default_factory=lambda: ["ridge"])  # other decoders, on the same windows, words and folds
    controls: list[str] = field(default_factory=lambda: ["mean", "unigram", "preceding", "oracle"])  # or arbitrary; see CONTROLS below
    config_setter: str = ""                # my_file.py:function(config, raws, words, embeddings) in podcast-benchmark's manner
    # ---- training
    batch_size: int = 32                   # words
    epochs: int = 60                       # at most
    learning_rate: float = 1e-3            # AdamW
    weight_decay: float = 1e-4             # of every parameter
    patience: int = 10                     # epochs without a better one on the validation fold
    average: int = 0                       # keep the mean of the last so many epochs' weights, not the best epoch's (the original decoder: 20)
    loss: Literal["mse", "cosine", "infonce"] = "mse"  # of embeddings; infonce learns its temperature, the same word is no negative
    stack: int = 0                         # jobs (lag and fold) trained at once; 0: 5 on a CPU, all on a GPU
    # ---- folds and scores
    n_folds: int = 5                       # each word is tested once
    fold_type: Literal["sequential", "zero_shot"] = "sequential"  # contiguous, or by word: test words are never heard in training
    val_share: float = 0.25                # of what is not tested
    embargo: float = 0.0                   # s around test and validation words that are left out; at least the window
    alphas: list[float] = field(default_factory=lambda: [10.0 ** k for k in range(-1, 9)])  # of ridge, chosen on the validation fold
    min_count: int = 5                     # training occurrences of a word whose AUC is counted
    class_vectors: Literal["train", "test", "all"] = "train"  # occurrences whose mean is a word's vector (zero_shot: test)
    top_k: list[int] = field(default_factory=lambda: [1, 5, 10])
    n_shifts: int = 1000                   # circular shifts of the words: the null
    fdr: float = 0.05                      # over lags, or over electrodes and lags
    compare: bool = False                  # print the benchmark's published rows; always, with the podcast
    save_models: bool = True               # models/
    # ---- run
    out_dir: str = "out/decode"            # results.csv, lags.csv, electrodes.csv, figures, models; a stopped sweep goes on
    seed: int = 1337                       # fixes everything
    device: str = "auto"                   # cuda, mps, cpu
    dtype: str = "float32"                 # the decoders are too small for less

    POSITIVE = "spectrum_segment spectrum_max bins memory batch_size epochs learning_rate min_count n_shifts alphas"
    SHARES = "val_share fdr"
    SIGNED = "max_lag window"

    def check(self):
        if self.n_folds < 2:
            raise ValueError(f"n_folds={self.n_folds}: give at least 2, since a word is tested by a model that has not seen it")
        if self.window <= 0 and not (self.config_setter or self.preprocess):
            raise ValueError(f"window={self.window} s holds no sample: give a width in seconds")
        if not self.lags and not (self.lag_step > 0 and self.min_lag < self.max_lag):
            raise ValueError(f"min_lag={self.min_lag} max_lag={self.max_lag} lag_step={self.lag_step} hold no lag: max_lag itself is left out")
        if not self.embedding or self.direction == "decode" and len(self.embedding) > 1:
            raise ValueError(f"embedding={self.embedding}: decoding has one target; several feature spaces are for direction=encode")
        if unknown := set(self.controls) - set(CONTROLS):
            raise ValueError(f"controls: there is no '{sorted(unknown)[0]}', only {', '.join(CONTROLS)}")
        if any(len(band) != 2 or not 0 < band[0] < band[1] for band in self.bands):
            raise ValueError(f"bands={self.bands} must be pairs of rising frequencies in Hz: [[4,8],[70,150]]")
        try:
            re.compile(self.channels)
        except re.error as e:
            raise ValueError(f"channels={self.channels} is no regular expression ({e})") from None

    def all_lags(self):
        """Lags in ms, as numpy.arange has them: the end is left out."""
        return list(map(float, self.lags or np.arange(self.min_lag, self.max_lag, self.lag_step)))


CONTROLS = {"mean": "the mean vector of the training words, whatever is heard", "unigram": "the most frequent training words, whatever is heard",
            "preceding": "ridge on the embeddings of the three words before, no brain", "oracle": "the true embedding: what the scorer can give at most",
            "arbitrary": "ridge from the brain to one random vector a word type"}


def seed_options(argv):
    """The command line with nested options of podcast-benchmark (YAML files, --config PATH, --training_params.batch_size=64) as options of ours, and
    nothing else touched. Keys that such a file leaves out take that code's defaults; `epochs` is training epochs; data_root: data is the podcast set."""
    groups, found, out, whole = ("model_params", "training_params", "data_params"), {}, [], False
    for arg in (a for a in argv if a != "--config"):
        key, _, value = arg.removeprefix("--").removeprefix("config=").partition("=")
        nested = {}
        if "=" not in arg.removeprefix("--config=") and Path(key).is_file():
            try:
                nested = yaml.safe_load(Path(key).read_text())
            except (yaml.YAMLError, UnicodeDecodeError):
                pass  # configure() says so
        elif key.partition(".")[0] in groups[1:] or key in ("model_constructor_name", "config_setter_name", "trial_name"):
            group, _, rest = key.partition(".")
            nested = {group: {rest: yaml.safe_load(value)} if rest else value}
        if isinstance(nested, dict) and nested.keys() & {"model_constructor_name", "training_params", "data_params", "config_setter_name", "trial_name"}:
            whole = whole or Path(key).is_file()
            for name, part in nested.items():
                found[name] = {**found.get(name, {}), **part} if isinstance(part, dict) else part
            if not out or out[-1] is not found:
                out.append(found)  # its place among the other options
        else:
            out.append(arg.removeprefix("--config=") if arg.startswith("--config=") else arg)
    if not found.keys() - {"trial_name"}:
        return [f"out_dir=out/{a['trial_name']}" if a is found else a for a in out]
    names = {"early_stopping_patience": "patience", "lag_step_size": "lag_step", "random_seed": "seed", "window_width": "window", "embedding_layer": "layer",
             "preprocessing_fn_name": "preprocess", "subject_ids": "subjects", "embedding_pca_dim": "pca", "channel_reg_ex": "channels",
             "electrode_file_path": "electrodes", "data_root": "dataset", "embedding_type": "embedding", "min_train_freq_auc": "min_count"}
    flat = dict(batch_size=32, epochs=100, learning_rate=1e-3, weight_decay=1e-4, patience=10, n_folds=5, min_lag=-10000, max_lag=10000, lag_step=1000,
                embedding="gpt-2xl", window=-1, preprocess="", subjects=[], dataset="data", pca=0, channels="", layer=24)
    given = {"lags" if k == "lag" else names.get(k, k) for group in groups[1:] for k in found.get(group) or {}} | {
        k for k, name in (("model", "model_constructor_name"), ("config_setter", "config_setter_name"), ("out_dir", "trial_name")) if name in found}
    for group in groups[1:]:
        flat.update({names.get(key, key): value for key, value in (found.pop(group, None) or {}).items() if value is not None})
    flat["dataset"] = {"data": "podcast"}.get(str(flat["dataset"]), flat["dataset"])
    flat["embedding"] = {"gpt-2xl": "gpt2-xl", "glove": "data/glove/glove.6B.50d.txt"}.get(flat["embedding"], flat["embedding"])
    flat["fold_type"] = {"sequential_folds": "sequential", "zero_shot_folds": "zero_shot"}.get(flat.get("fold_type"), flat.get("fold_type", "sequential"))
    if "lag" in flat:
        flat["lags"] = [flat.pop("lag")]
    model = {"head": "ln_tanh"} | (found.pop("model_params", None) or {})  # layer norm, then tanh: its order
    trial, folder = found.pop("trial_name", ""), found.pop("output_dir", "out")
    flat |= {"model": found.pop("model_constructor_name", ""), "config_setter": found.pop("config_setter_name", None) or "",
             "model_params": model, "out_dir": f"{folder}/{trial or 'decode'}", **found}
    at = next(i for i, a in enumerate(out) if a is found)
    return out[:at] + [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flat.items()
                      if whole or key in given] + out[at + 1:]  # dotted options alone change nothing but what they name


def resolve(spec, known, option):
    """The function that an option names: one of `known`, or my_file.py:function. A file made for podcast-benchmark may keep its registry decorators."""
    if not isinstance(spec, str) or spec in known:
        return known.get(spec, spec)
    file, _, name = spec.rpartition(":")
    if not file:
        raise ValueError(f"{option}={spec} is none of {', '.join(known)}, and no my_file.py:function")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{option}={spec}: there is no file {file}")
    names = {}

    def register(asked=None):
        return lambda function: names.setdefault(asked or function.__name__, function)

    if not hasattr(sys.modules.get("registry"), "__file__"):  # unless there is one
        sys.modules["registry"] = types.SimpleNamespace(**{f"register_{what}": register for what in (
            "model_constructor", "data_preprocessor", "config_setter", "task_data_getter", "metric")})
    sys.path.insert(0, str(Path(file).resolve().parent))  # it may import what lies beside it
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    sys.path.pop(0)
    function = names.get(name) or getattr(module, name, None)
    if not callable(function):
        there = [n for n, f in vars(module).items() if inspect.isfunction(f) or inspect.isclass(f)]
        raise ValueError(f"{option}={spec}: {file} has no function '{name}', only {', '.join(there)}")
    return function


# ---- data: recordings, words, lags

class Montage:
    """Recordings whose electrodes stand side by side. parts: [(Recording, channel indices)]; names: 'sub-01 LGA1', E of them over all; xyz (E, 3) m."""

    def __init__(self, parts):
        self.parts, self.sfreq = parts, parts[0][0].sfreq
        self.names = [f"{r.path.name} {r.names[i]}" for r, picks in parts for i in picks]
        self.xyz = np.concatenate([r.xyz[picks] for r, picks in parts])

    def onsets(self, events):
        """(people, N) rows of the signals where events (DataFrame with start) begin; -2**40 where the start is not finite."""
        start = events.start.to_numpy(float)
        return np.stack([np.where(np.isfinite(start), r.rows(np.nan_to_num(start)), -2 ** 40) for r, _ in self.parts])

    def inside(self, rows, spans):
        """(lags, N) whether the window [row + a, row + b) lies in every person's recording."""
        length = np.array([len(r.signal) for r, _ in self.parts])[:, None]
        return np.stack([((rows + a >= 0) & (rows + b <= length)).all(0) for a, b in spans])


class Podcast(Montage):
    """Recordings of the chosen people and electrodes, and what was said.

    words: DataFrame (words.csv); meta; source: what figures and tables say of the data. Raises FileNotFoundError or ValueError in a sentence."""

    def __init__(self, run, config):
        self.folder = run.dataset(config.dataset)
        self.meta = read_set(self.folder)
        if "words" not in self.meta:
            raise ValueError(f"{self.folder / 'meta.yaml'} names no words: decode.py reads sets made by data/podcast/prepare.py or its like")
        self.source = config.dataset + ", synthetic" * bool(self.meta["synthetic"] and "synthetic" not in config.dataset)
        self.words = read_table(self.folder / self.meta["words"], na_values={"start": [""], "end": [""]})
        if config.word not in self.words:
            raise ValueError(f"word={config.word} is no column of {self.folder / self.meta['words']}: it has {', '.join(self.words)}")
        people = {name: Recording(self.folder / name) for name in self.meta["recordings"]}
        for asked in config.subjects:
            if not any(is_subject(asked, r) for r in people.values()):
                raise ValueError(f"subjects: {self.folder} has no {asked}, only {', '.join(people)}: python data/{Path(config.dataset).name}/prepare.py "
                                 f"subjects={re.sub(r'[^0-9]', '', asked).lstrip('0')} adds it")
        table = None
        if config.electrodes:
            if not Path(config.electrodes).is_file():
                raise FileNotFoundError(f"electrodes={config.electrodes} does not exist: give a CSV with columns subject and elec")
            table = read_table(config.electrodes, dtype=str)
            if missing := {"subject", "elec"} - set(table):
                raise ValueError(f"{config.electrodes} has no column '{sorted(missing)[0]}', only {', '.join(table)}")
        parts = []
        for recording in people.values():
            if config.subjects and not any(is_subject(asked, recording) for asked in config.subjects):
                continue
            listed = None if table is None else set(table.elec[[is_subject(s, recording) for s in table.subject]])
            picks = [i for i, channel in enumerate(recording.names) if recording.good[i] and re.match(config.channels, channel)
                     and (listed is None or channel in listed)]
            if picks:
                parts.append((recording, np.array(picks)))
        if not parts:
            stems = {name: sorted({re.sub(r"\d+$", "", c) for c in r.names}) for name, r in people.items()}
            raise ValueError(f"channels={config.channels} electrodes={config.electrodes} leave no electrode: there are "
                             + "; ".join(f"{name} {', '.join(s)}" for name, s in stems.items()))
        if missing := {r.sfreq for r, _ in parts} - {parts[0][0].sfreq}:
            raise ValueError(f"{self.folder}: recordings of {parts[0][0].sfreq:g} and {missing.pop():g} Hz do not go together; choose subjects=")
        super().__init__(parts)

    def array(self, file):
        """An array of the set, memory-mapped, float32 or float16."""
        entry = self.meta.get("arrays", {}).get(file, {})
        path, dtype = self.folder / file, entry.get("dtype", "float32")
        if not path.is_file() or path.stat().st_size != np.prod(entry.get("shape", [-1])) * np.dtype(dtype).itemsize:
            raise FileNotFoundError(f"{path} is missing or not as long as meta.yaml says: run the set's prepare.py again with overwrite=True")
        return np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r", shape=tuple(entry["shape"]))


def is_subject(asked, recording):
    """Whether 'sub-03', '3' or an nyu_id means this recording."""
    digits = re.sub(r"[^0-9]", "", recording.subject).lstrip("0")
    names = {recording.subject, recording.path.name, str(recording.meta.get("nyu_id", "")), digits, digits.zfill(2)} - {""}
    return str(asked) in names


def lag_windows(signal, picks, rows, offsets, edges, out=None):
    """Bin means of windows of a continuous recording, at every lag: (L, N, C, B) float32, by differences of cumulative sums, each sample read once.
    signal (T, C'); picks (C,) channels; rows (N,) of onsets; offsets (L,) samples from an onset to its window's begin; edges (B + 1,) samples in it."""
    out = np.empty((len(offsets), len(rows), len(picks), len(edges) - 1), np.float32) if out is None else out
    at, width = rows[:, None] + np.asarray(edges), np.diff(edges)[:, None].astype(float)
    for begin in range(0, len(picks), 16):  # a few channels at a time: the sums are float64
        some = picks[begin:begin + 16]
        sums = np.zeros((len(signal) + 1, len(some)))
        edge, bins = np.empty((*at.shape, len(some))), np.empty((len(rows), len(width), len(some)))
        for first in range(0, len(signal), 8192):  # as much as a cache holds
            block = signal[first:first + 8192, some].astype(np.float64)
            block[0] += sums[first]
            np.cumsum(block, axis=0, out=sums[first + 1:first + 1 + len(block)])
        for l, offset in enumerate(offsets):
            np.take(sums, at + offset, axis=0, out=edge, mode="clip")  # (N, B + 1, c); mode says only that out needs no buffer
            np.subtract(edge[:, 1:], edge[:, :-1], out=bins)
            out[l, :, begin:begin + 16] = np.divide(bins, width, out=bins).transpose(0, 2, 1)
    return out


def raw_windows(signal, picks, weights, rows, offset, samples):
    """(N, C, T) float32: the samples themselves, or, given weights (C, C'), these mixtures of the channels picks (C',)."""
    out = np.empty((len(rows), len(picks) if weights is None else len(weights), samples), np.float32)
    for n, row in enumerate(rows + offset):
        window = signal[row:row + samples][:, picks].T
        out[n] = window if weights is None else weights @ window
    return out


def laplacian(names):
    """(C, C): each contact minus the mean of its neighbours on the shaft (same letters, number one less or more); as it is where it has none."""
    parts = [re.fullmatch(r"(.*?)(\d*)", n).groups() for n in names]
    place = {(stem, int(number)): i for i, (stem, number) in enumerate(parts) if number}  # LA01 is beside LA02 too
    weights = np.eye(len(names), dtype=np.float32)
    for i, (stem, number) in enumerate(parts):
        near = [place[stem, int(number) + k] for k in (-1, 1) if (stem, int(number) + k) in place] if number else []
        for j in near:
            weights[i, j] = -1 / len(near)
    return weights


def derived(recording, picks, config):
    """(signal (T, C'), channels (C',), weights (C, C') or None) of one person after reference= and bands=: a reference mixes channels, which a window is
    early enough for, so that the recording stays on disk; bands want all of it."""
    signal, weights = recording.signal, None
    if config.reference == "laplacian":  # over good contacts, before any is left out
        good = np.flatnonzero(recording.good)
        weights = laplacian([recording.names[i] for i in good])[np.searchsorted(good, picks)]
        picks = good
    if config.bands:
        if weights is not None:
            signal, picks, weights = signal[:, picks] @ weights.T, np.arange(len(weights)), None
        parts, nyquist = [], recording.sfreq / 2
        for low, high in config.bands:
            if high >= nyquist:
                raise ValueError(f"bands: {high:g} Hz is not below half of the recording's {recording.sfreq:g} Hz")
            sos = scipy.signal.butter(4, [low / nyquist, high / nyquist], "band", output="sos")
            for c in picks:
                x = scipy.signal.sosfiltfilt(sos, np.asarray(signal[:, c], np.float64))
                parts.append(np.abs(scipy.signal.hilbert(x, scipy.fft.next_fast_len(len(x)))[:len(x)]).astype(np.float32))
        signal, picks = np.stack(parts, 1), np.arange(len(parts))
    return signal, picks, weights


class Windows:
    """Inputs of every word at any lag, as the options represent them; `spans` are their samples (a, b) about the onset, one pair a lag.
    shape: of one word's input; names of its channels (axis 0), as often as they are there."""

    def __init__(self, config, data, lags):
        self.config, self.data, self.lags = config, data, lags
        self.function = resolve(config.preprocess, PREPROCESSORS, "preprocess") if config.preprocess else None
        self.names = [n for r, p in data.parts for b in (config.bands or [None]) for n in
                      (f"{r.path.name} {r.names[i]}" + (f" {b[0]:g}-{b[1]:g} Hz" if b else "") for i in p)]
        self.signals, self.encoder = None, None
        self.set_width(config.window)
        if self.function in FOUNDATION and not (folder_of(config) / "experiment_config.ini").is_file():
            self.encoder = Encoder(config, data)

    def people(self):
        """[(signal (T, C'), channels (C',), weights)] of every person, derived once."""
        self.signals = self.signals or [derived(r, p, self.config) for r, p in self.data.parts]
        return self.signals

    def set_width(self, window):
        self.config.window, self.width = window, round(window * self.data.sfreq) if window > 0 else 0
        first = [round(self.data.sfreq * (lag / 1000 - window / 2)) for lag in self.lags]
        self.spans = [(a, a + self.width) for a in first]
        bins = self.config.bins
        if self.function is bin_means:
            step = self.config.preprocessor_params.get("num_average_samples", 32)
            if self.width % step:
                raise ValueError(f"num_average_samples={step} does not divide the {self.width} samples of a window of {window} s at {self.data.sfreq:g} Hz")
            bins = self.width // step
        if 0 < self.width < bins:
            raise ValueError(f"window={window} s has {self.width} samples at {self.data.sfreq:g} Hz: too few for {bins} bins")
        self.edges = np.round(np.linspace(0, self.width, bins + 1)).astype(int)

    def probe(self, rows):
        """Try preprocess= on two words: may set the window, must keep the words. rows (people, N)."""
        if self.function in (None, bin_means):
            return {}
        if self.encoder:
            self.set_width(self.config.window if self.width else self.encoder.recipe["window"])
            return {"model_params": self.encoder.facts()} if self.function is foundation_model_input else {}
        asked = self.config.window
        if not self.width:  # it may say which
            self.set_width(1.0)
        words = np.flatnonzero(self.data.inside(rows, self.spans[:1])[0])[:2]
        if not len(words):
            raise ValueError(f"preprocess={self.config.preprocess}: no word has a window of {self.config.window} s at {self.lags[0]:g} ms to try it on; "
                             "set window=")
        _, overrides = self.call(self.raw(rows[:, words], 0))
        self.set_width(overrides.get("window_width", overrides.get("window", asked)))
        return overrides

    def call(self, windows):
        """(array (N, ...), overrides) of the user's function, checked."""
        made = self.function(windows, {"ch_names": [n.partition(" ")[2] for n in self.data.names], "sfreq": self.data.sfreq, **self.config.preprocessor_params})
        made, overrides = made if isinstance(made, tuple) else (made, {})
        made = np.asarray(made.detach().cpu() if torch.is_tensor(made) else made)
        if made.ndim < 2 or len(made) != len(windows):
            raise ValueError(f"preprocess={self.config.preprocess} made shape {made.shape} of windows {windows.shape} (words, electrodes, samples): "
                             "its first dimension must stay the words, with at least one feature behind it")
        if not np.issubdtype(made.dtype, np.number) or not np.isfinite(made).all():
            raise ValueError(f"preprocess={self.config.preprocess} made something that is no finite number ({made.dtype})")
        return made.astype(np.float32), overrides

    def raw(self, rows, l):
        """(N, E, T) samples at lag number l of events at rows (people, N)."""
        return np.concatenate([raw_windows(*person, row, self.spans[l][0], self.width) for person, row in zip(self.people(), rows)], 1)

    def bytes(self, n):
        """Of one lag of n words."""
        return 4 * n * len(self.names) * (len(self.edges) if self.config.represent == "bins" else self.width)

    def at(self, which, rows):
        """(len(which), N, ...) float32: the inputs at lags number `which` of events at rows (people, N)."""
        if self.function not in (None, bin_means):
            return np.stack([self.cached(rows, l) for l in which])
        sums = 8 * 16 * max(len(r.signal) for r, _ in self.data.parts)  # bytes that lag_windows() takes; hours of film are read window by window
        if self.config.represent == "spectrum" or sums > 1e9 * self.config.memory:
            make = self.spectrum if self.config.represent == "spectrum" else self.means
            return np.stack([np.concatenate([make(self.raw(rows[:, n:n + 256], l)) for n in range(0, rows.shape[1], 256)]) for l in which])
        out = np.empty((len(which), rows.shape[1], len(self.names), len(self.edges) - 1), np.float32)
        first = 0
        for (signal, picks, weights), row in zip(self.people(), rows):
            here = out[:, :, first:first + len(picks if weights is None else weights)]
            binned = lag_windows(signal, picks, row, [self.spans[l][0] for l in which], self.edges, here if weights is None else None)
            if weights is not None:
                np.matmul(weights, binned, out=here)
            first += here.shape[2]
        return out

    def means(self, x):
        """(N, E, B): bin means of x (N, E, T)."""
        return np.add.reduceat(x, self.edges[:-1], axis=2) / np.diff(self.edges).astype(np.float32)

    def spectrum(self, x):
        """(N, E * F, segments): log power of x (N, E, T)."""
        n = max(4, min(x.shape[2], round(self.config.spectrum_segment * self.data.sfreq)))
        f, _, power = scipy.signal.spectrogram(x, self.data.sfreq, "hann", n, n // 2, detrend="constant")  # (N, E, F, S)
        keep = (f > 0) & (f <= self.config.spectrum_max)
        if not keep.any():
            raise ValueError(f"spectrum_max={self.config.spectrum_max:g} Hz lies below {f[1]:g} Hz, the first frequency of a segment of {n} samples: raise it, "
                             "or spectrum_segment=")
        power = np.log(np.maximum(power[:, :, keep], np.finfo(np.float32).tiny))
        return power.reshape(len(x), -1, power.shape[-1]).astype(np.float32)

    def cached(self, rows, l):
        """What preprocess= makes at one lag, from disk where the same function made it of the same samples before."""
        files = contents(self.config.preprocessor_params) if not self.encoder else []  # an encoder of ours is known by its weights
        key = hashlib.sha256(repr((self.config.preprocess, self.config.preprocessor_params, code_of(self.function), files,
                                   [(r.meta.get("sha256"), p.tolist()) for r, p in self.data.parts], self.spans[l], self.config.reference,
                                   self.config.bands, self.encoder and self.encoder.key)).encode() + rows.tobytes()).hexdigest()[:20]
        path = Path(self.config.cache) / f"{key}.npy"
        if self.config.cache and path.is_file():
            return np.load(path)
        if self.encoder:
            made = self.encoder.of(rows + self.spans[l][0], self.width, self.function is foundation_model_input)
        else:
            made, _ = self.call(self.raw(rows, l))
        if self.config.cache:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside(path) as f:
                np.save(f, made)
        return made


def code_of(function):
    """The text of the file that a function comes from."""
    return Path(inspect.getsourcefile(function)).read_text() if function else ""


def contents(params):
    """(path, size, time of change) of every file under a path among the parameters: a new checkpoint is new content."""
    paths = [Path(v) for v in params.values() if isinstance(v, str) and v and Path(v).exists()]
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def bin_means(data, preprocessor_params):
    """preprocess_neural_data of podcast-benchmark: means of num_average_samples samples. The windows come by cumulative sums; this is what they equal."""
    return data.reshape(data.shape[0], data.shape[1], -1, preprocessor_params.get("num_average_samples", 32)).mean(-1)


# ---- data: a pretrained encoder (foundation.py), or somebody else's

def folder_of(config):
    """preprocessor_params.model_dir as a Path. Raises FileNotFoundError in a sentence."""
    asked = config.preprocessor_params.get("model_dir", "")
    if not asked or not Path(asked).exists():
        raise FileNotFoundError(f"preprocessor_params.model_dir={asked} does not exist: give a run folder of foundation.py (python foundation.py makes "
                                "out/foundation), or a folder with experiment_config.ini and model.pth")
    return Path(asked)


class Encoder:
    """A frozen encoder of foundation.py over the electrodes of a Montage: windows are cut from the continuous recording as the encoder was pretrained on it
    (its rate, bands, robust scale and places), its tokens of a window side by side are the latents. preprocessor_params: model_dir; untrained=k, the same
    encoder with random weights number k; foundation_model_batch_size. Scales are those of pretraining where the recording was in it, else of all of the
    recording, no word looked at."""

    def __init__(self, config, data):
        p = self.params = config.preprocessor_params
        self.encoder, self.recipe = load_encoder(folder_of(config))
        if p.get("untrained"):
            torch.manual_seed(key_seed(config.seed, "untrained", p["untrained"]))
            self.encoder = NeuralEncoder(self.encoder.config).eval()
        weights = b"".join(v.numpy().tobytes() for v in self.encoder.state_dict().values())
        self.device = torch.device("cuda" if config.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
        self.encoder.to(self.device)
        self.people, self.matched = [], []
        for r, picks in data.parts:
            names = [r.names[i] for i in picks]
            xyz, matched = named_places(names, places(names, r.xyz[picks], r.good[picks], self.recipe["grid"]), self.recipe)
            heard = next((s for s in self.recipe["recordings"] if (Path(s["dataset"]).name, s["name"]) == (r.path.parent.name, r.path.name)), None)
            subject = self.recipe["subjects"].index(heard["subject"]) if heard else -1
            self.people.append([r, picks, torch.as_tensor(xyz, dtype=torch.float32, device=self.device), subject, heard and heard["seen"], None])
            self.matched.append(matched)
        self.key = hashlib.sha256(weights + repr((self.recipe, [(x.tolist(), s) for _, _, x, s, _, _ in self.people])).encode()).hexdigest()

    def prepared(self, person):
        """(resampled signal (T', C, F), centre, scale), made once."""
        r, picks, _, _, seen, made = person
        if made is None:
            x = resampled(r.signal, r.sfreq, self.recipe, picks)
            begin, end = np.round(np.array(seen) * self.recipe["sfreq"]).astype(int) if seen else (0, len(x))
            made = person[5] = (x, *robust_scale(x[begin:end]))
        return made

    @torch.no_grad()
    def of(self, rows, width, untouched=False):
        """(N, people * tokens * n_embd) latents of the windows that begin at rows (people, N) of the signals, width samples long; untouched: (N, C, T), what
        the encoder would see, people side by side."""
        out = []
        for person, row in zip(self.people, rows):
            r, _, xyz, subject, _, _ = person
            x, centre, scale = self.prepared(person)
            rate, T = self.recipe["sfreq"], round(width / r.sfreq * self.recipe["sfreq"])
            begin, size, made = np.round(row / r.sfreq * rate).astype(int).clip(0, len(x) - T), self.params.get("foundation_model_batch_size", 64), []
            for at in np.split(begin, range(size, len(begin), size)):
                batch = encoder_input(x[at[:, None] + np.arange(T)], self.recipe, centre, scale)  # (n, C, P * F * patch)
                who = torch.full((len(batch),), subject, device=self.device)
                made.append(batch if untouched else self.encoder(torch.as_tensor(batch, device=self.device), xyz, who).flatten(1).cpu().numpy())
            out.append(np.concatenate(made))
        return np.concatenate(out, 1)

    def facts(self):
        """What foundation_finetune needs to know: plain types."""
        return {"model_dir": self.params["model_dir"], "untrained": self.params.get("untrained", 0),
                "montages": [[xyz.cpu().tolist(), subject] for _, _, xyz, subject, _, _ in self.people]}

    def said(self, config, sweep):
        """A sentence on how the electrodes were matched, and how much of the words' time pretraining has heard."""
        by = ", ".join(f"{sum(m[k] for m in self.matched)} {what}" for k, what in (("name", "known by name"), ("position", "by position only"),
                                                                                   ("absent", "without a place, left out")))
        heard, tokens = np.zeros(len(sweep.start), bool), round(config.window * self.recipe["sfreq"]) // self.recipe["patch"]
        for r, _, _, _, seen, _ in self.people:
            since = sweep.start - r.first_sample / r.sfreq
            heard |= (since >= seen[0]) & (since < seen[1]) if seen else False
        return (f"{self.params['model_dir']}: electrodes {by}; pretraining heard the recording, not the words, at {heard.mean():.0%} of them"
                f"; {len(self.people) * tokens * self.encoder.config.n_embd:,} latents a word")


def foundation_model_input(data, preprocessor_params):
    """preprocess= of that name: windows as the pretrained encoder takes them, for model=foundation_finetune; Encoder makes them of the recording."""
    raise ValueError("preprocess=foundation_model_input is for encoders of foundation.py: give preprocessor_params.model_dir its run folder")


class FineTune(nn.Module):
    """The pretrained encoder and a linear layer on its tokens, both trained: (B, C, T) of people side by side → (B, output_dim). untrained: from scratch."""

    def __init__(self, p):
        super().__init__()
        if "montages" not in p:
            raise ValueError("model=foundation_finetune reads the encoder's own input: give preprocess=foundation_model_input")
        self.encoder, _ = load_encoder(p["model_dir"])
        if p.get("untrained"):
            self.encoder = NeuralEncoder(self.encoder.config)
        self.sizes, self.subjects = [len(xyz) for xyz, _ in p["montages"]], [subject for _, subject in p["montages"]]
        for i, (xyz, _) in enumerate(p["montages"]):
            self.register_buffer(f"xyz{i}", torch.tensor(xyz), persistent=False)
        tokens = p["input_shape"][1] // self.encoder.config.patch + (self.encoder.whole is not None)
        self.dropout, self.head = nn.Dropout(p.get("dropout", 0.2)), nn.Linear(len(self.sizes) * tokens * self.encoder.config.n_embd, p["output_dim"])

    def forward(self, x):
        parts = [self.encoder(part, getattr(self, f"xyz{i}"), torch.full((len(x),), subject, device=x.device)).flatten(1)
                 for i, (part, subject) in enumerate(zip(x.split(self.sizes, 1), self.subjects))]
        return self.head(self.dropout(torch.cat(parts, 1)))


def read_ini(folder):
    """experiment_config.ini as nested namespaces, ini.ecog_data_config.sample_length: sections and keys in lower case, numbers as numbers."""
    ini = configparser.ConfigParser()
    try:
        ini.read(folder / "experiment_config.ini")
    except configparser.Error as e:
        raise ValueError(f"{folder / 'experiment_config.ini'} is no ini file ({' '.join(str(e).split())})") from None

    def value(text):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    made = types.SimpleNamespace(**{s.lower(): types.SimpleNamespace(**{k: value(v) for k, v in ini[s].items()}) for s in ini.sections()})
    for key in ("sample_length", "original_fs", "new_fs"):
        if not isinstance(getattr(getattr(made, "ecog_data_config", None), key, None), (int, float)):
            raise ValueError(f"{folder / 'experiment_config.ini'} has no number '{key}' in its section ecog_data_config")
    return made


def foundation_model_preprocessing_fn(data, preprocessor_params):
    """preprocess= of that name in podcast-benchmark's document, for a model of its kind: model_dir with experiment_config.ini and model.pth, and
    model=my_file.py:constructor, which gets the ini (read_ini) and gives the module that model.pth fits; model(batch, forward_features=True) is called with
    (N, 1, T, 8, 8), electrodes G1 to G64 row by row, zeros where there is none, block means at new_fs. A run folder of foundation.py goes through Encoder."""
    p, folder = preprocessor_params, Path(preprocessor_params["model_dir"])
    ini = read_ini(folder)
    if ":" not in str(p.get("model", "")):
        raise ValueError(f"{folder} holds somebody else's model: give preprocessor_params.model=my_file.py:constructor, which makes the module of model.pth")
    step = ini.ecog_data_config.original_fs // ini.ecog_data_config.new_fs
    if p["sfreq"] != ini.ecog_data_config.original_fs or data.shape[2] % step:
        raise ValueError(f"{folder} takes windows at {ini.ecog_data_config.original_fs:g} Hz in blocks of {step:g} samples, not {data.shape[2]} samples at "
                         f"{p['sfreq']:g} Hz: give config_setter=foundation_model, or another recording")
    model = resolve(p["model"], {}, "preprocessor_params.model")(ini)
    try:
        model.load_state_dict(torch.load(folder / "model.pth", weights_only=True, map_location="cpu"))
    except (OSError, RuntimeError) as e:
        raise ValueError(f"{folder / 'model.pth'} is not the weights of {p['model']} ({' '.join(str(e).split())[:160]})") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    means = data.reshape(*data.shape[:2], -1, int(step)).mean(-1)  # (N, E, T)
    grid = np.zeros((len(data), means.shape[2], 64), np.float32)
    for e, name in enumerate(p["ch_names"]):
        if name[:1] == "G" and name[1:].isdigit() and 1 <= int(name[1:]) <= 64:
            grid[:, :, int(name[1:]) - 1] = means[:, e]
    if not np.any(grid):
        raise ValueError(f"{folder} reads electrodes G1 to G64, and there are {', '.join(p['ch_names'][:6])}, ...: choose others with subjects= or channels=")
    with torch.no_grad():
        return torch.cat([model(torch.as_tensor(part, device=device).view(len(part), 1, -1, 8, 8), forward_features=True).flatten(1).float().cpu()
                          for part in np.split(grid, range(p.get("foundation_model_batch_size", 64), len(grid), p.get("foundation_model_batch_size", 64)))])


FOUNDATION = (foundation_model_preprocessing_fn, foundation_model_input)
PREPROCESSORS = {"preprocess_neural_data": bin_means, **{f.__name__: f for f in FOUNDATION}}


# ---- data: targets

@dataclass
class Target:
    """What is read out. events: DataFrame with start (s), and label (which words are the same) where there are words; values (N, D) float32 vectors,
    (N,) int64 classes or (N,) float32 numbers; kind: vectors, classes or number; names of the classes; notes: what was left out, and why."""
    kind: str
    events: pd.DataFrame
    values: np.ndarray
    names: list = field(default_factory=list)
    notes: dict = field(default_factory=dict)


def word_vectors(run, config, data, name):
    """(words, D) float32 vectors of every word of the transcript, NaN where there is none. name: an entry of embedding=."""
    words = data.words
    if name == "arbitrary":
        dims = config.pca or 50
        return np.stack([np.random.default_rng(key_seed(config.seed, "arbitrary", w)).uniform(-1, 1, dims) for w in words[config.word]]).astype(np.float32)
    if name in ("lm", "static"):
        return lm_vectors(run, config, words, static=name == "static")
    if name in data.meta.get("features", {}):
        layers, tokens = data.meta["features"][name], read_table(data.folder / data.meta["tokens"][name])
        key = next(iter(layers)) if len(layers) == 1 and not next(iter(layers)).startswith("layer-") else f"layer-{config.layer}"
        if key not in layers:
            raise ValueError(f"embedding={name} has no {key} in {data.folder}, only {', '.join(layers)}: set layer=, or prepare it with layers={config.layer}")
        return pool_tokens(np.asarray(data.array(layers[key]), np.float32), tokens.word_idx.to_numpy(), words.word_idx.to_numpy(), config.pool)
    if Path(name).is_file():
        return glove_vectors(name, words[config.word])
    raise ValueError(f"embedding={name} is neither lm, static or arbitrary, nor one of the set's features ({', '.join(data.meta.get('features', {}))}), "
                     "nor a file of vectors (GloVe's text format; glove.6B.50d.txt say)")


def pool_tokens(vectors, word_of_token, word_idx, how):
    """(words, D) of token vectors (tokens, D): their mean, the first or the last; NaN for a word without tokens."""
    out = np.full((len(word_idx), vectors.shape[1]), np.nan, np.float32)
    order = np.argsort(word_of_token, kind="stable")
    known, first, count = np.unique(word_of_token[order], return_index=True, return_counts=True)
    vectors = vectors[order]
    pooled = np.add.reduceat(vectors, first, axis=0) / count[:, None] if how == "mean" else vectors[first if how == "first" else first + count - 1]
    place = pd.Index(known).get_indexer(word_idx)
    out[place >= 0] = pooled[place[place >= 0]]
    return out


def lm_vectors(run, config, words, static):
    """(words, D): hidden states at layer= (numbered as Hugging Face does; -1 the last) of lm= as it reads the transcript, or its token embeddings.
    Each word is tokenised with a space before it, as the released features were; a token is read behind at least half a context."""
    lm, tokenizer = load_lm(config.lm)
    lm = lm.to(run.device).eval()
    layer = config.layer if config.layer >= 0 else lm.config.n_layer + 1 + config.layer
    if not static and layer > lm.config.n_layer:
        raise ValueError(f"layer={config.layer}: lm={config.lm} has the layers 0 to {lm.config.n_layer}")
    pieces = [tokenizer.encode(" " + w) for w in words.word]
    ids, owner = np.concatenate([np.array(p, int) for p in pieces]), np.repeat(words.word_idx.to_numpy(), list(map(len, pieces)))
    if static:
        states = lm.transformer.wte.weight.detach()[torch.as_tensor(ids, device=run.device)].cpu().numpy()
    else:
        states, size = np.zeros((len(ids), lm.config.n_embd), np.float32), lm.config.block_size
        for end in range(min(size, len(ids)), len(ids) + size // 2, size // 2):
            end = min(end, len(ids))
            begin = max(0, end - size)
            new = begin if begin == 0 else max(begin, end - size // 2)
            with torch.no_grad():
                hidden = lm(torch.as_tensor(ids[None, begin:end], device=run.device), hidden=[layer]).hidden[layer][0]
            states[new:end] = hidden[new - begin:].float().cpu().numpy()
    return pool_tokens(states, owner, words.word_idx.to_numpy(), config.pool)


def glove_vectors(path, labels):
    """(words, D) of a text file of vectors (word, then numbers); NaN for words that it has not. Contractions are looked up whole, then as GloVe's own
    tokenizer cuts them (don't: do n't; it's: it 's), then without the apostrophe."""
    def forms(w):
        cut = w.find("n't") if w.endswith("n't") else w.find("'")
        return [[w]] + ([[w[:cut], w[cut:]], [w.replace("'", "")]] if cut > 0 else [])
    wanted, found = {piece for w in set(labels) for form in forms(w) for piece in form}, {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            word, _, rest = line.rstrip().partition(" ")
            if word in wanted:
                found[word] = np.array(rest.split(), np.float32)
    if not found or len({len(v) for v in found.values()}) > 1:
        raise ValueError(f"{path} is no file of vectors for these words: each line must be a word and equally many numbers, with spaces between")
    none = np.full(len(next(iter(found.values()))), np.nan, np.float32)
    return np.stack([next((np.mean([found[p] for p in form], 0) for form in forms(w) if all(p in found for p in form)), none) for w in labels])


def make_target(run, config, data):
    """The Target of task=; events without an onset, a label or a value are left out and counted."""
    words = data.words.copy()
    words["label"] = words[config.word].astype(str)
    params = config.task_params
    if config.task == "embedding":
        if config.direction == "decode":
            values = word_vectors(run, config, data, config.embedding[0])
        else:
            parts = [word_vectors(run, config, data, name) for name in config.embedding]
            values = np.concatenate(parts, 1)
        target = finish_target("vectors", words, values, words.label != "")
        target.names = [p.shape[1] for p in parts] if config.direction == "encode" else []  # how wide each feature space is
        return target
    if config.task in ("content", "pos"):
        return finish_target("classes", words, words[config.task].to_numpy(), words[config.task] != "")
    if config.task == "sentence_onset":
        first = words.start.groupby(words.sentence).transform("min")
        onset = words.start == first
        return finish_target("classes", words, np.where(onset, "onset", "inside"), onset | (words.start - first >= params.get("margin", 0.5)))
    if config.task == "surprisal":
        tables = (read_table(data.folder / f, na_values={"true_prob": [""]}) for f in data.meta.get("tokens", {}).values())
        tokens = next((t for t in tables if "true_prob" in t), None)
        if tokens is None:
            raise ValueError(f"task=surprisal needs the probability of every token (true_prob), which {data.folder} has not: prepare it with features=gpt2-xl")
        bits = -np.log(tokens.true_prob.clip(lower=1e-12)).groupby(tokens.word_idx).agg(lambda x: x.sum(skipna=False))
        return finish_target("number", words, words.word_idx.map(bits).to_numpy(float), True)
    if config.task == "volume":
        if "audio" not in data.meta:
            raise ValueError(f"task=volume needs the audio's loudness, which {data.folder} has not: prepare it with audio_sfreq=100")
        rate, step = data.meta["audio"]["sfreq"], params.get("step", config.window if config.window > 0 else 0.2)
        power = np.square(np.fromfile(data.folder / data.meta["audio"]["file"], "<f4").astype(float))
        sums, width = np.concatenate([[0], np.cumsum(power)]), max(1, round(step * rate))
        begin = np.arange(0, len(power) - width, width)
        level = 10 * np.log10(np.maximum((sums[begin + width] - sums[begin]) / width, 1e-12))  # dB
        return finish_target("number", pd.DataFrame({"start": (begin + width / 2) / rate}), level, True)
    made = resolve(config.task, {}, "task")(data.words.copy(), params)
    if isinstance(made, pd.DataFrame):
        if missing := {"start", "target"} - set(made):
            raise ValueError(f"task={config.task} gave a table without the column '{sorted(missing)[0]}': it needs start (s) and target")
        events, values = made.reset_index(drop=True), np.stack(list(made.target))
    else:
        events, values = words, np.asarray(made)
        if len(values) != len(words) or values.ndim > 2:
            raise ValueError(f"task={config.task} gave shape {values.shape} for {len(words)} words: give one target a word, (words,) or (words, D), "
                             "or a DataFrame with start and target")
    kind = "vectors" if values.ndim == 2 else "number" if values.dtype.kind == "f" else "classes"
    return finish_target(kind, events, values, True)


def finish_target(kind, events, values, keep):
    """A Target of the events that have an onset and a value, in the order of time."""
    start = events.start.to_numpy(float)
    finite = np.isfinite(start)
    known = np.broadcast_to(np.asarray(keep), finite.shape) & (np.isfinite(values.reshape(len(values), -1).astype(float)).all(1) if kind != "classes" else True)
    use = np.flatnonzero(finite & known)
    use = use[np.argsort(start[use], kind="stable")]
    notes = {"without onset": int((~finite).sum()), "without target": int((finite & ~known).sum())}
    events = events.iloc[use].reset_index(drop=True)
    if "label" not in events:
        events["label"] = [str(i) for i in range(len(events))]
    if kind == "classes":
        names = sorted(set(values[use].tolist()))
        if len(names) < 2:
            raise ValueError(f"the target has {len(names)} class{'es' * (len(names) != 1)} ({', '.join(map(str, names))}): two are needed")
        return Target(kind, events, np.array([names.index(v) for v in values[use].tolist()]), list(map(str, names)), notes)
    if not len(use):
        raise ValueError("no word has an onset and a target: look at the transcript and at embedding=")
    return Target(kind, events, values[use].astype(np.float32), notes=notes)


# ---- data: folds

@dataclass
class Fold:
    """One split of the words, rows of the common table: fitted on train, chosen on val, scored once on test."""
    number: int
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def make_folds(config, start, labels, width):
    """Folds of events in the order of time: start (N,) s; labels (N,) of words; width: s of a window. Training and validation words whose windows
    touch a test word's are left out, and training words whose windows touch a validation word's."""
    n, gap = len(start), max(width, config.embargo)
    if config.fold_type == "zero_shot":  # deal word types, not words
        kinds = sorted(set(labels))
        kinds = [kinds[i] for i in np.random.default_rng(key_seed(config.seed, "folds")).permutation(len(kinds))]
        dealt = [np.flatnonzero(np.isin(labels, part)) for part in np.array_split(np.array(kinds, dtype=object), config.n_folds)]
    else:
        dealt = np.array_split(np.arange(n), config.n_folds)
    folds = []
    for k, test in enumerate(dealt):
        rest = np.setdiff1d(np.arange(n), test)
        if config.fold_type == "zero_shot":
            kinds = np.array(sorted(set(labels[rest])), dtype=object)
            kinds = np.random.default_rng(key_seed(config.seed, "val", k)).permutation(kinds)
            val = rest[np.isin(labels[rest], kinds[:max(1, round(config.val_share * len(kinds)))])]
        else:
            val = rest[round((1 - config.val_share) * len(rest)):]
        train = np.setdiff1d(rest, val)
        val = val[away(start[val], start[test], gap)]
        train = train[away(start[train], start[test], gap) & away(start[train], start[val], gap)]
        folds.append(Fold(k, train, val, test))
    for fold in folds:
        for name in ("train", "val", "test"):
            if len(getattr(fold, name)) < 4:
                raise ValueError(f"fold {fold.number} has {len(getattr(fold, name))} {name} words of {n}: take fewer n_folds, a smaller window or embargo")
    return folds


def away(a, b, gap):
    """Whether each time of a (s) is at least `gap` from every time of b."""
    b = np.sort(b)
    if not len(b):
        return np.ones(len(a), bool)
    at = np.searchsorted(b, a)
    near = np.minimum(np.abs(a - b[np.clip(at, 0, len(b) - 1)]), np.abs(a - b[np.clip(at - 1, 0, len(b) - 1)]))
    return near >= gap - 1e-9


def check_apart(folds, start, width, labels=None):
    """Raises ValueError where a test window shares a sample with a training or validation window of its fold, or, given labels, a word with them."""
    for fold in folds:
        for name in ("train", "val"):
            rows = getattr(fold, name)
            if not away(start[rows], start[fold.test], width).all() or set(rows) & set(fold.test):
                raise ValueError(f"fold {fold.number}: {name} and test windows overlap: that is a leak")
            if labels is not None and set(labels[rows]) & set(labels[fold.test]):
                raise ValueError(f"fold {fold.number}: {name} and test share words, which zero-shot folds must not")


def fold_target(config, target, fold):
    """(Y, classes or None): the target as a fold's model sees it, every word's, by training words alone. Vectors: principal components (N, D), one
    scale; numbers: z-scores (N, 1); classes: (N,) int64."""
    if target.kind == "classes":
        return target.values
    y = target.values.reshape(len(target.values), -1).astype(np.float64)
    y = y - y[fold.train].mean(0)
    if target.kind == "vectors" and config.pca:
        components = np.linalg.svd(y[fold.train], full_matrices=False)[2][:config.pca]
        y = y @ components.T
    each = y[fold.train].std(0)
    scale = np.where(each > 1e-12 * max(each.max(), 1e-300), each, 1) if config.whiten or target.kind == "number" else np.sqrt(np.mean(each ** 2)) or 1.0
    return (y / scale).astype(np.float32)


def input_scale(config, X, fold, target, Y):
    """(mean, factor) of a fold's inputs X (N, C, ...): z-scores by training words, channels that select= leaves out times 0. Per channel where there
    is a time axis, else per feature."""
    x = X[fold.train]
    axes = (0, *range(2, x.ndim)) if x.ndim == 3 else (0,)
    mean, sd = x.mean(axes, keepdims=True, dtype=np.float64)[0], x.std(axes, keepdims=True, dtype=np.float64)[0]
    factor = 1 / np.where(sd > 0, sd, 1)
    if not config.standardize:
        mean, factor = np.zeros_like(mean), np.ones_like(factor)
    if config.select:
        drive = electrode_drive((x - mean) * factor, Y[fold.train], target.kind)
        factor = factor * (np.argsort(np.argsort(-drive, kind="stable")) < config.select).reshape(-1, *[1] * (factor.ndim - 1))
    return mean.astype(np.float32), factor.astype(np.float32)


def electrode_drive(x, y, kind):
    """(C,) largest share of variance of a channel's mean over time that the target explains, x (N, C, ...), by training words (an R2 of training)."""
    x = x.reshape(len(x), x.shape[1], -1).mean(2)
    y = np.eye(y.max() + 1)[y][:, 1:] if kind == "classes" else y.reshape(len(y), -1)
    y = np.column_stack([np.ones(len(y)), y])
    left = x - y @ np.linalg.lstsq(y, x, rcond=None)[0]
    return 1 - left.var(0) / np.maximum(x.var(0), 1e-30)


# ---- model: decoders in stacks; every parameter and buffer is (jobs, members, ...)

class Conv(torch.autograd.Function):
    """Convolution over time of a stack as one product of matrices per member: x (G, C_in, T * B), time outside, w (G, C_out, K * C_in) → (G, C_out, T' * B).
    A shift in time is then a shift of columns, so unfolding copies rows of memory, and the products see nothing but large matrices."""

    @staticmethod
    def forward(ctx, x, w, B):
        K = w.shape[2] // x.shape[1]
        n = x.shape[2] - (K - 1) * B
        unfolded = torch.cat([x[:, :, k * B:k * B + n] for k in range(K)], 1)  # (G, K * C_in, T' * B)
        ctx.save_for_backward(unfolded, w)
        ctx.sizes = B, K, x.shape, n
        return torch.bmm(w, unfolded)

    @staticmethod
    def backward(ctx, dy):
        (unfolded, w), (B, K, shape, n), dx = ctx.saved_tensors, ctx.sizes, None
        if ctx.needs_input_grad[0]:
            d = torch.bmm(w.transpose(1, 2), dy)
            dx = d.new_empty(shape)
            dx[:, :, :n] = d[:, :shape[1]]
            dx[:, :, n:] = 0
            for k in range(1, K):
                dx[:, :, k * B:k * B + n] += d[:, k * shape[1]:(k + 1) * shape[1]]
        return dx, torch.bmm(dy, unfolded.transpose(1, 2)), None


class DropPool(torch.autograd.Function):
    """Dropout (without its scale), then max pooling of width 2, stride 2, padding 1 over time: x (G, C, T * B), keep the same in bool or None."""

    @staticmethod
    def forward(ctx, x, keep, T):
        x = (x if keep is None else torch.where(keep, x, 0.0)).view(*x.shape[:2], T, -1)  # (G, C, T, B)
        a, b = x[:, :, 1:T - 1 + T % 2:2], x[:, :, 2::2]
        out = x.new_empty(*x.shape[:2], T // 2 + 1, x.shape[3])
        out[:, :, 0] = x[:, :, 0]
        torch.maximum(a, b, out=out[:, :, 1:1 + b.shape[2]])
        if T % 2 == 0:
            out[:, :, -1] = x[:, :, -1]
        ctx.save_for_backward(keep, a >= b)
        ctx.T = T
        return out.flatten(2)

    @staticmethod
    def backward(ctx, d):
        keep, first = ctx.saved_tensors
        T, pairs = ctx.T, first.shape[2]
        d = d.view(*d.shape[:2], T // 2 + 1, -1)
        dx = d.new_empty(*d.shape[:2], T, d.shape[3])
        dx[:, :, 0] = d[:, :, 0]
        left = d[:, :, 1:1 + pairs] * first
        dx[:, :, 1:T - 1 + T % 2:2] = left
        dx[:, :, 2::2] = d[:, :, 1:1 + pairs] - left
        if T % 2 == 0:
            dx[:, :, -1] = d[:, :, -1]
        dx = dx.flatten(2)
        return dx if keep is None else dx.mul_(keep), None, None


class Pitom(nn.Module):
    """The convolutional decoder of Goldstein et al. 2022, J jobs x M members of it at once: (J, B, E, T) → (J, M, B, D).

    Conv 3 → ReLU → BN → dropout → max pool 2 → conv 2 → ReLU → BN → dropout → conv 2 → BN → ReLU → max over time → linear, then the head.
    head: tanh_ln, LayerNorm(tanh(.)), as in the original, which leaves the output unbounded; ln_tanh, tanh(LayerNorm(.)), as in podcast-benchmark; linear.
    local: the third layer has weights of its own at every time, as in the original (TensorFlow's LocallyConnected1D)."""

    stacked = True

    def __init__(self, J, M, E, T, D, p, draw):
        super().__init__()
        W, self.rate, self.draws = int(p.get("conv_filters", 128)), float(p.get("dropout", 0.2)), None
        if T < 6:
            raise ValueError(f"the convolutional decoder needs 6 bins or more, not {T}: set bins= (or num_average_samples), or a wider window")
        self.T, self.M, self.E, self.W, self.D, self.head, self.local = T, M, E, W, D, p.get("head", "tanh_ln"), bool(p.get("local", False))
        if self.head not in ("tanh_ln", "ln_tanh", "linear"):
            raise ValueError(f"model_params.head={self.head} is none of tanh_ln, ln_tanh, linear")
        self.reg, self.reg_head = float(p.get("reg", 0)), float(p.get("reg_head", 0))
        times = (T - 2) // 2 - 1 if self.local else 1
        self.conv1 = draw("conv1", (M, W, 3, E), 3 * E, channels=3)
        self.conv2 = draw("conv2", (M, W, 2, W), 2 * W)
        self.conv3, self.bias3 = draw("conv3", (M, times, W, 2, W), 2 * W), draw("bias3", (M, times, W, 1), 2 * W)
        self.linear, self.bias = draw("linear", (M, W, D), W), draw("bias", (M, 1, D), W)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(J, M, W)) for _ in range(3)])
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(J, M, W)) for _ in range(3)])
        for k in range(3):
            self.register_buffer(f"mean{k}", torch.zeros(J, M, W))
            self.register_buffer(f"var{k}", torch.ones(J, M, W))
        if self.head != "linear":
            self.ln_scale, self.ln_shift = nn.Parameter(torch.ones(J, M, 1, D)), nn.Parameter(torch.zeros(J, M, 1, D))

    def norm(self, x, k, gain=1.0):
        """Batch norm number k of x (G, W, n) over n; gain: dropout's scale, for free."""
        return F.batch_norm(x.view(1, -1, x.shape[2]), getattr(self, f"mean{k}").view(-1), getattr(self, f"var{k}").view(-1), gain * self.scales[k].view(-1),
                            gain * self.shifts[k].view(-1), self.training).view(x.shape)

    def forward(self, x):
        J, B, E, T = x.shape
        G, W, rate = J * self.M, self.W, self.rate if self.training else 0.0
        gain = 1 / (1 - round(256 * rate) / 256)
        x = x.permute(0, 2, 3, 1).reshape(J, E, T * B)
        y = Conv.apply(x, self.conv1.view(J, self.M * W, 3 * E), B).view(G, W, -1)  # the members of a job read the same words: one product for all
        y = self.norm(F.relu(y), 0, gain)
        y = DropPool.apply(y, keep_mask(self.draws, (J, self.M * W, y.shape[2]), rate, y.device, y.shape), T - 2)
        y = self.norm(F.relu(Conv.apply(y, self.conv2.view(G, W, 2 * W), B)), 1, gain)
        if (keep := keep_mask(self.draws, (J, self.M * W, y.shape[2]), rate, y.device, y.shape)) is not None:
            y = y * keep
        if self.local:
            times = self.conv3.shape[2]
            both = torch.cat([y[:, :, :times * B], y[:, :, B:(times + 1) * B]], 1).view(G, 2 * W, times, B)
            y = torch.einsum("gtok,gktb->gotb", self.conv3.reshape(G, times, W, 2 * W), both) + self.bias3.view(G, times, W, 1).transpose(1, 2)
            y = y.flatten(2)
        else:
            y = Conv.apply(y, self.conv3.view(G, W, 2 * W), B) + self.bias3.view(G, W, 1)
        y = F.relu(self.norm(y, 2)).view(G, W, -1, B).amax(2)  # (G, W, B)
        z = torch.baddbmm(self.bias.view(G, 1, -1), y.transpose(1, 2), self.linear.view(G, W, -1)).view(J, self.M, B, self.D)
        if self.head == "linear":
            return z
        z = F.layer_norm(z if self.head == "ln_tanh" else torch.tanh(z), (self.D,)) * self.ln_scale + self.ln_shift
        return torch.tanh(z) if self.head == "ln_tanh" else z

    def penalty(self):
        """L2 of the weights, summed over the stack."""
        conv = sum(w.square().sum() for w in (self.conv1, self.conv2, self.conv3)) if self.reg else 0.0
        return self.reg * conv + (self.reg_head * self.linear.square().sum() if self.reg_head else 0.0)


class Mlp(nn.Module):
    """Linear → LayerNorm per layer, ReLU and dropout between: J jobs x M members, (J, B, ...) → (J, M, B, D). The last LayerNorm goes where D is 1 or the
    target is no embedding."""

    stacked = True

    def __init__(self, J, M, sizes, p, draw, last_norm, channels):
        super().__init__()
        self.M, self.rate, self.draws, self.last_norm = M, float(p.get("dropout", 0.2)), None, last_norm
        self.weights = nn.ParameterList([draw(f"w{k}", (M, a, b), a, channels=channels if k == 0 else None) for k, (a, b) in enumerate(zip(sizes, sizes[1:]))])
        self.biases = nn.ParameterList([draw(f"b{k}", (M, 1, b), a) for k, (a, b) in enumerate(zip(sizes, sizes[1:]))])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(J, M, 1, b)) for b in sizes[1:]])
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(J, M, 1, b)) for b in sizes[1:]])

    def forward(self, x):
        J, B = x.shape[:2]
        x, rate = x.reshape(J, 1, B, -1).expand(-1, self.M, -1, -1), self.rate if self.training else 0.0
        for k, (w, b) in enumerate(zip(self.weights, self.biases)):
            x = x @ w + b
            if k + 1 == len(self.weights) and not self.last_norm:
                break
            x = F.layer_norm(x, x.shape[-1:]) * self.scales[k] + self.shifts[k]
            if k + 1 < len(self.weights):
                x = F.relu(x)
                if (keep := keep_mask(self.draws, x.shape, rate, x.device)) is not None:
                    x = x * keep / (1 - round(256 * rate) / 256)
        return x

    def penalty(self):
        return 0.0


class Single(nn.Module):
    """A user's module as a stack of one job and one member."""

    stacked = False

    def __init__(self, module, D, spec):
        super().__init__()
        self.module, self.D, self.spec = module, D, spec

    def forward(self, x):
        out = self.module(x[0])
        out = out[:, None] if out.ndim == 1 and self.D == 1 else out
        if out.shape != (x.shape[1], self.D):
            raise ValueError(f"model={self.spec} made shape {tuple(out.shape)} of a batch of {tuple(x.shape[1:])}: (words, {self.D}) is wanted")
        return out[None, None]

    def penalty(self):
        return 0.0


def keep_mask(draws, shape, rate, device, view=None):
    """Dropout mask (bool) of shape (J, ...), or None where rate is 0. draws: a counter of random bytes per job, so that a job draws the same whatever is
    stacked with it: a list, or on a GPU a tensor (J, 2) of seeds and counts. Rates are multiples of 1/256."""
    drop = round(256 * rate)
    if not drop:
        return None
    n = math.prod(shape[1:])
    if torch.is_tensor(draws):  # splitmix64 on the device: eight bytes a number
        z = draws[:, :1] - 0x61C8864680B583EB * (draws[:, 1:] + torch.arange(1, -(-n // 8) + 1, device=device))
        draws[:, 1] += -(-n // 8)
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
        keep = (z.view(torch.uint8)[:, :n] >= drop).reshape(shape)
    else:
        keep = torch.from_numpy(np.stack([d.random_raw(-(-n // 8)).view(np.uint8)[:n] for d in draws]) >= drop).to(device)
    return keep.view(shape if view is None else view)


def drawer(keys, order, init):
    """draw(name, shape, fan_in, channels) → Parameter (J, *shape), uniform as torch has it (or glorot: normal, as TensorFlow), keyed by (job, name). With
    channels the inputs are drawn in the order of the electrodes' names (`order`: their ranks), so that permuting them changes nothing: channels=3 for
    (..., 3, E), channels=(E, T) for (M, E * T, b)."""
    def draw(name, shape, fan_in, channels=None):
        made = []
        for key in keys:
            generator = torch.Generator().manual_seed(key_seed(*key, name))
            if init == "glorot" and not name.startswith("b"):
                fan_out = shape[-1] if name.startswith(("linear", "w")) else shape[-3] * shape[-2]  # of a convolution: filters x width
                w = torch.randn(shape, generator=generator) * math.sqrt(2 / (fan_in + fan_out))
            else:
                w = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)
            if order is not None and channels == 3:
                w = w[..., order]
            elif order is not None and channels is not None:
                w = w.view(shape[0], *channels, shape[2])[:, order].reshape(shape)
            made.append(w)
        return nn.Parameter(torch.stack(made))
    return draw


def build_stack(config, spec, keys, shape, D, kind, order):
    """A model of len(keys) jobs (one where it is a user's) for inputs of `shape` and outputs of D; keys: what each job's random numbers hang on."""
    p, built = dict(config.model_params) if spec == config.model else {}, MODELS.get(spec)
    draw, J = drawer(keys, order if len(shape) == 2 else None, p.get("init", "torch")), len(keys)
    if built == "mlp":
        n = math.prod(shape)
        sizes = list(p.get("layer_sizes") or [n, 128, D])
        if sizes[0] != n or sizes[-1] != D:
            raise ValueError(f"model_params.layer_sizes={sizes} must go from the {n} inputs of a word ({'x'.join(map(str, shape))}) to its {D} outputs: "
                             "set it, bins= or pca=, or leave layer_sizes out")
        return Mlp(J, int(p.get("num_models", 1)), sizes, p, draw, kind == "vectors", shape if len(shape) == 2 else None)
    if built in ("joint", "independent", "one"):
        if len(shape) != 2:
            raise ValueError(f"model={spec} reads (electrodes, time), and preprocess= made {'x'.join(map(str, shape))}: take model=foundation_mlp")
        if kind != "vectors":
            p["head"] = "linear"
        return Pitom(J, 1 if built == "one" else int(p.get("num_models", 10)), *shape, D, p, draw)
    p = {"input_channels": shape[0], "input_shape": list(shape), "embedding_dim": D, "output_dim": D, **p}
    torch.manual_seed(key_seed(*keys[0]))
    module = resolve(spec, MODELS, "model")(p)
    if not isinstance(module, nn.Module):
        raise ValueError(f"model={spec} gave a {type(module).__name__}: the constructor must give a torch.nn.Module")
    return Single(module, D, spec)


MODELS = {"ensemble_pitom_model": "joint", "EnsemblePitomModel": "joint", "independent_pitom_model": "independent", "pitom_model": "one", "PitomModel": "one",
          "foundation_mlp": "mlp", "MLP": "mlp", "foundation_finetune": FineTune, "ridge": "ridge", "linear": "linear", "logistic": "logistic"}
LINEAR = ("ridge", "linear", "logistic")


@dataclass
class Job:
    """One lag and fold to be fitted: l, the lag's number among the windows at hand; Y, the fold's target; mean, factor of its inputs."""
    lag: float
    l: int
    fold: Fold
    Y: np.ndarray
    mean: np.ndarray
    factor: np.ndarray


def losses(config, kind, joint, out, y, same, scale, weight):
    """Sum over jobs and members of the loss of out (J, M, B, D) against y (J, B, D), or (J, B) classes. joint: members' outputs are averaged first.
    same (J, B, B): whether two words of a batch are the same; scale (J,): log of infonce's 1 / temperature; weight (J, K) of classes."""
    out = out.mean(1, keepdim=True) if joint else out
    J, M, B, _ = out.shape
    if kind == "classes":
        w = weight.gather(1, y)  # (J, B)
        nll = -out.log_softmax(-1).gather(-1, y[:, None, :, None].expand(-1, M, -1, -1))[..., 0]  # (J, M, B)
        return (nll * w[:, None]).sum() / B
    y = y[:, None]
    if kind == "number" or config.loss == "mse":
        return (out - y).square().mean((2, 3)).sum()
    if config.loss == "cosine":
        return (1 - F.cosine_similarity(out, y, -1)).mean(2).sum()
    logits = F.normalize(out, dim=-1) @ F.normalize(y, dim=-1).transpose(2, 3) * scale.clamp(max=math.log(100)).exp()[:, None, None, None]
    own = torch.eye(B, dtype=torch.bool, device=out.device)
    logits = logits.masked_fill((same & ~own)[:, None], -math.inf)
    return -logits.log_softmax(-1).diagonal(dim1=2, dim2=3).mean(2).sum()


def train_stack(run, config, spec, target, X, jobs, names, all_folds):
    """Fit a stack of jobs by gradient. X (L, N, ...) tensor on the device. Gives per job (validation output (M, n, D), test output, epochs, state)."""
    kind, joint, device = target.kind, MODELS.get(spec) == "joint", run.device
    D = len(target.names) if kind == "classes" else jobs[0].Y.shape[1]
    labels = torch.as_tensor(pd.factorize(target.events.label)[0], device=device)
    B = min(config.batch_size, *(len(f.train) for f in all_folds))
    steps = min(len(f.train) for f in all_folds) // B  # the same for every job of the sweep, however it is cut into stacks
    keys = [(config.seed, spec, job.lag, job.fold.number) for job in jobs]
    order = np.argsort(np.argsort(names)) if len(names) == X.shape[2] else None
    model = build_stack(config, spec, keys, tuple(X.shape[2:]), D, kind, order).to(device)
    scale = nn.Parameter(torch.full((len(jobs),), math.log(1 / 0.07), device=device))
    lag = torch.tensor([job.l for job in jobs], device=device)
    Y = torch.as_tensor(np.stack([job.Y for job in jobs]), device=device)  # (J, N, D) or (J, N)
    mean, factor = (torch.as_tensor(np.stack([getattr(job, a) for job in jobs])[:, None], device=device) for a in ("mean", "factor"))
    weight = torch.stack([len(job.fold.train) / (D * torch.bincount(Y[j][job.fold.train], minlength=D).clamp_min(1)) for j, job in enumerate(jobs)]).float() \
        if kind == "classes" else None
    model.draws = torch.tensor([[key_seed(*k, "dropout"), 0] for k in keys], device=device) if device.type == "cuda" else \
        [np.random.SFC64(key_seed(*k, "dropout")) for k in keys]
    optimizer = torch.optim.AdamW([*model.parameters(), scale], config.learning_rate, weight_decay=config.weight_decay, fused=device.type in ("cpu", "cuda"))
    alive, best, waited = list(range(len(jobs))), [(-math.inf, None, 0)] * len(jobs), [0] * len(jobs)
    recent = [[] for _ in jobs]

    def inputs(at):  # at (J', b) rows of the words → (J', b, ...)
        return (X[lag[:, None], at] - mean) * factor

    def state_of(i):  # of the i-th living job
        return {k: (v[i] if model.stacked else v).clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def outputs(part):
        """Each living job's output (M, n, D) on its validation or test words."""
        model.eval()
        rows = [getattr(jobs[j].fold, part) for j in alive]
        padded = torch.as_tensor(np.stack([np.resize(r, max(map(len, rows))) for r in rows]), device=device)
        out = torch.cat([model(inputs(at)).float() for at in padded.split(512, 1)], 2).cpu().numpy()
        return [o[:, :len(r)] for o, r in zip(out, rows)]

    for epoch in range(config.epochs):
        model.train()
        at = np.stack([np.random.default_rng(key_seed(config.seed, "order", jobs[j].fold.number, epoch)).permutation(jobs[j].fold.train)[:steps * B]
                       for j in alive])
        for batch in torch.as_tensor(at, device=device).split(B, 1):  # (J', B)
            y = Y[torch.arange(len(alive), device=device)[:, None], batch]
            same = labels[batch][:, :, None] == labels[batch][:, None] if config.loss == "infonce" else None
            loss = losses(config, kind, joint, model(inputs(batch)), y, same, scale, weight) + model.penalty()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        del loss  # its graph remembers the shapes of the parameters, which narrow() may change
        for i, (j, out) in enumerate(zip(alive, outputs("val"))):
            score = quick_score(kind, out, jobs[j].Y[jobs[j].fold.val], joint)
            if not np.isfinite(score):
                raise ValueError(f"model={spec}: not finite at lag {jobs[j].lag:g} ms, fold {jobs[j].fold.number}, epoch {epoch}: try a smaller learning_rate")
            if config.average:
                recent[j] = [*recent[j], state_of(i)][-config.average:]
            if score > best[j][0]:
                best[j], waited[j] = (score, None if config.average else state_of(i), epoch + 1), 0
            else:
                waited[j] += 1
        keep = [i for i, j in enumerate(alive) if waited[j] < config.patience]
        if not keep:
            break
        if len(keep) < len(alive):  # jobs that have stopped make room
            alive = [alive[i] for i in keep]
            narrow(model, optimizer, scale, keep)
            rows = torch.tensor(keep, device=device)
            lag, Y, mean, factor = lag[rows], Y[rows], mean[rows], factor[rows]
            weight = None if weight is None else weight[rows]
            model.draws = [model.draws[i] for i in keep] if isinstance(model.draws, list) else model.draws[rows]
    states = [{k: torch.stack([s[k].float() for s in recent[j]]).mean(0) for k in recent[j][0]} if config.average else best[j][1] for j in range(len(jobs))]
    alive = list(range(len(jobs)))
    for name, tensor in [(n, t) for n, t in [*model.named_parameters(), *model.named_buffers()] if n in states[0]]:  # a buffer may not be persistent
        tensor.data = (torch.stack([s[name] for s in states]) if model.stacked else states[0][name]).to(tensor.dtype)
    lag = torch.tensor([job.l for job in jobs], device=device)
    mean, factor = (torch.as_tensor(np.stack([getattr(job, a) for job in jobs])[:, None], device=device) for a in ("mean", "factor"))
    return list(zip(outputs("val"), outputs("test"), [b[2] for b in best], states))


def narrow(model, optimizer, scale, keep):
    """Leave the jobs `keep` (positions) in a stack and in its optimiser."""
    rows = torch.tensor(keep, device=scale.device)
    for tensor in [*model.parameters(), scale, *model.buffers()]:
        tensor.data = tensor.data[rows]
        tensor.grad = None
        for name, moment in optimizer.state.get(tensor, {}).items():
            if name != "step":
                optimizer.state[tensor][name] = moment[rows]


def quick_score(kind, out, y, joint):
    """What stops training early, larger is better: mean cosine of embeddings over members, else minus the loss. out (M, n, D)."""
    if kind == "vectors":
        return float((unit(out) * unit(y)).sum(-1).mean())
    out = out.mean(0)
    return -float(np.square(out - y).mean()) if kind == "number" else float(scipy.special.log_softmax(out, -1)[np.arange(len(y)), y].mean())


def fit_linear(config, spec, kind, x, job, Y=None):
    """A closed-form decoder of one job: (validation output (1, n, D), test output, 0, state). x (N, ...) are the words' inputs, scaled. ridge: himalaya;
    linear: least squares; logistic: scikit-learn, its strength chosen on the validation fold."""
    x, fold, Y = x.reshape(len(x), -1), job.fold, job.Y if Y is None else Y
    if spec == "logistic":
        if kind != "classes":
            raise ValueError("model=logistic is for classes: task=content, say; take ridge for embeddings and numbers")
        from sklearn.linear_model import LogisticRegression
        basis = None
        if x.shape[1] > len(fold.train):  # a penalised solution lies in the span of the training rows: turned into it, the fit is the same and small
            basis = np.linalg.qr(x[fold.train].T)[0]
            x = x @ basis
        fits = [LogisticRegression(C=c, max_iter=2000, class_weight="balanced").fit(x[fold.train], Y[fold.train]) for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)]

        def log_p(fit, rows):  # (1, n, K): a class that no training word has is all but impossible
            out = np.full((1, len(rows), Y.max() + 1), -30.0)
            out[0][:, fit.classes_] = np.maximum(fit.predict_log_proba(x[rows]), -30)
            return out
        fit = max(fits, key=lambda f: quick_score(kind, log_p(f, fold.val), Y[fold.val], False))
        return log_p(fit, fold.val), log_p(fit, fold.test), 0, {"coef": torch.tensor(fit.coef_ if basis is None else fit.coef_ @ basis.T)}
    y = np.eye(Y.max() + 1, dtype=np.float32)[Y] if kind == "classes" else Y
    val, w, offset = least_squares(x, y, fold) if spec == "linear" else ridge(x, y, fold, config.alphas)
    return val[None], (x[fold.test] @ w + offset)[None], 0, {"coef": torch.as_tensor(w), "offset": torch.as_tensor(offset)}


def ridge(x, y, fold, alphas):
    """himalaya's ridge of y (N, D) on x (N, P): validation predictions of the fit on training words, and (coef (P, D), offset (D,)) of the fit on training
    and validation words; each output's alpha is the one that predicts the validation words best."""
    from himalaya.ridge import solve_ridge_cv_svd, solve_ridge_svd
    rows, n = np.concatenate([fold.train, fold.val]), len(fold.train)
    split = [(np.arange(n), np.arange(n, len(rows)))]
    alpha, w, _, offset = solve_ridge_cv_svd(x[rows], y[rows], np.array(alphas, np.float32), fit_intercept=True, cv=split, warn=False)
    first, first_offset = solve_ridge_svd(x[fold.train], y[fold.train], alpha, fit_intercept=True, warn=False)
    return x[fold.val] @ first + first_offset, w, offset


def least_squares(x, y, fold):
    """As ridge(), without a penalty (the smallest solution where there are many)."""
    def fit(rows):
        mx, my = x[rows].mean(0), y[rows].mean(0)
        w = np.linalg.lstsq(x[rows] - mx, y[rows] - my, rcond=None)[0]
        return w, my - mx @ w
    w, offset = fit(fold.train)
    return x[fold.val] @ w + offset, *fit(np.concatenate([fold.train, fold.val]))


# ---- evaluate

LOWER = {"word_rank", "perplexity", "occ_perplexity", "mse", "cross_entropy"}  # better when small
PRIMARY = {"vectors": "auc", "classes": "roc_auc", "number": "corr"}


def unit(x):
    """Vectors of length 1 (a vector of zeros stays)."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def word_auc(scores, y, orders):
    """One-vs-rest ROC-AUC of every class under each reordering of the labels: (P, V), NaN where a class is absent or alone. scores (N, V) of items for
    classes, y (N,) classes, orders (P, N): item i counts as one of class y[orders[p, i]]. By mid-ranks, which no reordering changes: sorted once,
    AUC = (sum of ranks of the class - n (n + 1) / 2) / (n (N - n))."""
    N, V = scores.shape
    ranks = scipy.stats.rankdata(scores, axis=0)
    labels = y[orders]  # (P, N)
    sums = np.bincount((labels + V * np.arange(len(orders))[:, None]).ravel(), ranks[np.arange(N), labels].ravel(), V * len(orders)).reshape(-1, V)
    n = np.bincount(y, minlength=V)
    with np.errstate(all="ignore"):
        return (sums - n * (n + 1) / 2) / (n * (N - n))


def circular(shifts, n, gap):
    """(1 + P, n) orders: as it is, then circular shifts by at least `gap` items; shifts (P,) in [0, 1)."""
    gap = min(gap, n // 4)
    steps = gap + (shifts * max(1, n - 2 * gap)).astype(int)
    return np.concatenate([[np.arange(n)], (np.arange(n) + steps[:, None]) % n])


class WordScorer:
    """Scores of predicted vectors against words and occurrences, published and otherwise, for the rows (test or validation) of one fold.

    Word level: a word's vector is the mean of its unit embeddings over class_vectors= occurrences; candidates are the words of these rows that have one;
    AUC counts candidates with min_count training occurrences. Occurrence level: candidates are the rows' own embeddings."""

    def __init__(self, config, fold, Y, labels, rows):
        which = "test" if config.fold_type == "zero_shot" else config.class_vectors
        source = dict(train=fold.train, test=rows, all=np.arange(len(Y)))[which]
        kinds, first = np.unique(labels[rows]), unit(Y)
        count = np.array([(labels[source] == k).sum() for k in kinds])
        kinds = kinds[count > 0]
        self.vectors = np.stack([first[source][labels[source] == k].mean(0) for k in kinds]) if len(kinds) else np.zeros((0, Y.shape[1]))
        self.select = np.flatnonzero(np.isin(labels[rows], kinds))  # rows that stand for a candidate
        self.y = np.searchsorted(kinds, labels[rows][self.select])
        self.heard = np.array([(labels[fold.train] == k).sum() for k in kinds])
        self.spoken = np.bincount(self.y, minlength=len(kinds))
        self.counted = (self.spoken if config.fold_type == "zero_shot" else self.heard) >= config.min_count
        self.prior = np.log(self.heard + 0.5)
        self.prior_row = np.log(np.array([(labels[fold.train] == k).sum() for k in labels[rows]]) + 0.5)
        self.occurrences, self.top_k = first[rows], config.top_k

    def matrices(self, out):
        """(similarity to words (n', V), to occurrences (n, n)) of outputs (M, n, D): cosines averaged over members. out 'unigram': how frequent each is."""
        if isinstance(out, str):
            return np.tile(self.prior, (len(self.select), 1)), np.tile(self.prior_row, (len(self.occurrences), 1))
        mean = unit(out).mean(0)
        return mean[self.select] @ self.vectors.T, mean @ self.occurrences.T

    def temperature(self, out):
        """(word, occurrence) factors on the cosines that make these rows likeliest: fitted on validation words, used on test words."""
        if isinstance(out, str):
            return 1.0, 1.0
        grid, found = np.geomspace(0.1, 100, 40), []
        for s, y in zip(self.matrices(out), (self.y, np.arange(len(self.occurrences)))):
            found.append(max(grid, key=lambda t: scipy.special.log_softmax(t * s, 1)[np.arange(len(y)), y].mean()) if s.size else 1.0)
        return found

    def measure(self, out, temperature, shifts=None, gap=0, auc_only=False):
        """{metric: (1 + P,) values, the real one first} and {metric: function of kept rows} for the jackknife."""
        words, pairs = self.matrices(out)
        shifts = np.zeros(0) if shifts is None else shifts
        n, N = len(self.select), len(pairs)
        orders, orders_all = circular(shifts, n, gap), circular(shifts, N, gap)
        log_p = scipy.special.log_softmax(words, 1)
        metrics, per_row = {}, {}

        def auc(log_p, y, orders):
            each = word_auc(log_p, y, orders)[:, self.counted]
            value = {}
            for name, weight in (("auc", np.ones(len(self.heard))), ("auc_train", self.heard), ("auc_test", self.spoken)):
                w = np.broadcast_to(weight[self.counted], each.shape) * np.isfinite(each)
                value[name] = np.nansum(np.nan_to_num(each) * w, 1) / np.maximum(w.sum(1), 1e-12) if w.any() else np.full(len(each), 0.5)
            return value
        metrics |= auc(log_p, self.y, orders)
        if auc_only:
            return metrics, None
        rank = scipy.stats.rankdata(-words, axis=1)[np.arange(n), self.y[orders]]  # (1 + P, n) place of the right word, ties in the middle
        rank_all = scipy.stats.rankdata(-pairs, axis=1)[np.arange(N), orders_all]
        for k in self.top_k:
            per_row[f"top{k}"], per_row[f"occ_top{k}"] = rank <= k, rank_all <= k
        per_row["word_rank"], per_row["two_afc"] = rank, 1 - (rank_all - 1) / max(1, N - 1)
        per_row["cosine"] = pairs[np.arange(N), orders_all]
        nll = {"perplexity": -scipy.special.log_softmax(temperature[0] * words, 1)[np.arange(n), self.y[orders]],
               "occ_perplexity": -scipy.special.log_softmax(temperature[1] * pairs, 1)[np.arange(N), orders_all]}
        if isinstance(out, str):  # frequencies are no cosines
            nll, per_row = {}, {name: rows for name, rows in per_row.items() if name != "cosine"}
        metrics |= {name: rows.mean(1) for name, rows in per_row.items()} | {name: np.exp(rows.mean(1)) for name, rows in nll.items()}

        def without(rows):  # rows of all N that are left
            kept = np.isin(self.select, rows)
            pick = {n: kept, N: rows} if n != N else {N: rows}
            value = auc(log_p[kept], self.y[kept], np.arange(kept.sum())[None])
            return {name: v[0] for name, v in value.items()} | {name: r[0][pick[r.shape[1]]].mean() for name, r in per_row.items()} \
                | {name: np.exp(r[0][pick[r.shape[1]]].mean()) for name, r in nll.items()}
        return metrics, without


def measure_classes(out, y, names, orders):
    """{metric: (P,)} of outputs (n, K) for classes y (n,) under the orders (P, n): ROC-AUC (two classes: of the second; more: mean of one-vs-rest),
    accuracy, balanced accuracy, F1 (mean over classes), each class's recall and precision where there are two, cross-entropy (nats)."""
    K, log_p = out.shape[1], scipy.special.log_softmax(out, 1)
    each = word_auc(log_p, y, orders)
    confusion = np.bincount((np.arange(len(orders))[:, None] * K * K + K * y[orders] + log_p.argmax(1)).ravel(), minlength=len(orders) * K * K)
    confusion = confusion.reshape(-1, K, K).astype(float)  # (P, true, said)
    right, true, said = confusion.diagonal(axis1=1, axis2=2), confusion.sum(2), confusion.sum(1)
    recall, precision = right / np.maximum(true, 1), right / np.maximum(said, 1)
    f1 = 2 * right / np.maximum(true + said, 1)
    there = true[0] > 0
    values = {"roc_auc": np.nan_to_num(each[:, 1] if K == 2 else each[:, np.isfinite(each[0])].mean(1), nan=0.5), "accuracy": right.sum(1) / len(y),
              "balanced_accuracy": recall[:, there].mean(1), "f1": f1[:, there].mean(1), "cross_entropy": -log_p[np.arange(len(y)), y[orders]].mean(1)}
    for k in range(K if K == 2 else 0):
        values |= {f"recall_{names[k]}": recall[:, k], f"precision_{names[k]}": precision[:, k]}
    return values


def measure_numbers(out, y, orders):
    """{metric: (P,)} of numbers out (n,) for y (n,) under the orders (P, n): correlation, R2 and mean squared error."""
    shuffled = y[orders]
    a, b = out - out.mean(), shuffled - shuffled.mean(1, keepdims=True)
    mse = np.square(shuffled - out).mean(1)
    return {"corr": b @ a / np.maximum(np.linalg.norm(a) * np.linalg.norm(b, axis=1), 1e-12), "r2": 1 - mse / np.maximum(y.var(), 1e-12), "mse": mse}


def score(config, target, fold, Y, codes, val, test, shifts, gap, auc_only=False):
    """({metric: (score, low, high, null (P,), n)}, validation score) of outputs on validation and test words, over whole folds. The interval is a jackknife
    over ten stretches of words; the null reorders the test words' labels by the circular `shifts`."""
    n = len(fold.test)
    if target.kind == "vectors":
        scorer, on_val = WordScorer(config, fold, Y, codes, fold.test), WordScorer(config, fold, Y, codes, fold.val)
        if not len(scorer.y):
            raise ValueError(f"fold {fold.number}: no test word has a training occurrence: take class_vectors=test, or fewer n_folds")
        temperature = (1.0, 1.0) if auc_only else on_val.temperature(val)
        metrics, without = scorer.measure(test, temperature, shifts, gap, auc_only)
        val_score = float(on_val.measure(val, (1.0, 1.0), auc_only=True)[0]["auc"][0])
        n = len(scorer.y)
    else:
        measure = partial(measure_classes, names=target.names) if target.kind == "classes" else measure_numbers
        flat = (lambda out: out.mean(0)) if target.kind == "classes" else (lambda out: out.mean(0)[:, 0])
        y = Y if target.kind == "classes" else Y[:, 0]
        metrics = measure(flat(test), y[fold.test], orders=circular(shifts, n, gap))
        val_score = float(measure(flat(val), y[fold.val], orders=np.arange(len(fold.val))[None])[PRIMARY[target.kind]][0])

        def without(rows):
            return {k: v[0] for k, v in measure(flat(test)[rows], y[fold.test][rows], orders=np.arange(len(rows))[None]).items()}
    found, everyone = {}, np.arange(len(fold.test))
    parts = [] if auc_only else [without(np.setdiff1d(everyone, block)) for block in np.array_split(everyone, 10) if len(block)]
    for name, values in metrics.items():
        left = np.array([p[name] for p in parts])
        half = 1.96 * math.sqrt((len(left) - 1) / len(left) * np.square(left - left.mean()).sum()) if parts else 0.0
        found[name] = (float(values[0]), float(values[0]) - half, float(values[0]) + half, values[1:], n)
    return found, val_score


def p_value(observed, null, lower=False):
    """One-sided p of `observed` (...) under null (P, ...): (1 + number at least as good) / (P + 1)."""
    better = null <= observed if lower else null >= observed
    return (1 + better.sum(0)) / (len(null) + 1)


def over_folds(scores):
    """(mean, low, high): 95 % t interval over folds, scores (folds,)."""
    scores = np.asarray(scores, float)
    half = scipy.stats.t.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    return scores.mean(), scores.mean() - half, scores.mean() + half


def control(config, name, target, fold, Y):
    """(validation output, test output) of a control; None where the target has none such."""
    if name == "mean":
        if target.kind == "vectors":
            guess = unit(Y[fold.train]).mean(0)
        else:
            guess = np.log(np.bincount(Y[fold.train], minlength=len(target.names)) + 0.5) if target.kind == "classes" else Y[fold.train].mean(0)
        return tuple(np.tile(guess, (1, len(rows), 1)).astype(np.float32) for rows in (fold.val, fold.test))
    if target.kind != "vectors":
        return None
    if name == "unigram":
        return "unigram", "unigram"
    if name == "oracle":
        return Y[fold.val][None], Y[fold.test][None]
    before = np.concatenate([np.concatenate([np.zeros((k, Y.shape[1]), np.float32), Y[:-k]]) for k in (1, 2, 3)], 1)
    return fit_linear(config, "ridge", "vectors", before, Job(0, 0, fold, Y, None, None))[:2]


BENCHMARK = [  # podcast-benchmark, 183 electrodes, 5 folds, 10 lags of 200 ms: best test mean, at lag (ms). Its "gpt2" run was of GloVe, says its config
    ("GloVe, ensemble of 10 (the run called gpt2)", "auc .6050@200, train-weighted .6012@400, test-weighted .5977@400, word top-1/5/10 "
     ".0073@400/.0307@800/.0552@800, occurrence .0020@800/.0081@400/.0132@800, cosine .619@800, 2AFC .5116@400"),
    ("GloVe, ensemble of 10", "auc .6046@400, train-weighted .6035@400, test-weighted .6025@400, word top-1/5/10 .0091@400/.0357@400/.0668@400, "
     "occurrence .0018@0/.0077@600/.0140@0, cosine .620@400"),
    ("arbitrary vectors", "auc .5549@400, train-weighted .5684@200, test-weighted .5664@400, word top-1/5/10 .0169@800/.0415@400/.0615@400, "
     "occurrence .0021@0/.0084@200/.0160@400, cosine .022@400"),
    ("whisper", "2AFC .7074@400, cosine .119@200"), ("content word", "roc_auc .590@200, f1 .559@200"), ("part of speech", "roc_auc .5305@600"),
    ("surprisal", "corr .059@400"), ("sentence onset", "roc_auc .880@0, f1 .881@0"), ("volume", "corr .448@200"),
    ("always saying 'the'", "word top-1 .058")]


# ---- plots

COLORS = {"ridge": "C1", "linear": "C4", "logistic": "C4", "unigram": "0.45", "mean": "0.7", "preceding": "C2", "oracle": "C3", "arbitrary": "C5"}
SHOWN = {"vectors": ["auc", "top1", "two_afc", "cosine"], "classes": ["roc_auc", "balanced_accuracy", "f1", "cross_entropy"], "number": ["corr", "r2", "mse"]}
SAID = {"auc": "word ROC-AUC", "top1": "right word of all (top-1)", "two_afc": "right of two occurrences (2AFC)", "cosine": "cosine",
        "roc_auc": "ROC-AUC", "balanced_accuracy": "balanced accuracy", "f1": "F1", "cross_entropy": "cross-entropy (nats)", "corr": "correlation",
        "r2": "R²", "mse": "squared error"}


def plot_lags(path, table, flat, kind, title, planted, config):
    """lags.png: every shown metric over lag, with intervals over folds, the null's 95 % band, significant lags, and the controls as lines."""
    metrics = [m for m in SHOWN[kind] if m in set(table.metric)]
    fig, axes = plt.subplots(1, len(metrics), figsize=(4.4 * len(metrics), 4.2), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(table.model))
    for ax, metric in zip(axes[0], metrics):
        part = table[table.metric == metric]
        if planted is not None:
            ax.axvspan(*planted, color="C8", alpha=0.18, lw=0, label="a window here holds planted words")
        for i, name in enumerate(names):
            one = part[part.model == name].sort_values("lag")
            color = COLORS.get(name, f"C{i}" if i == 0 else f"C{i + 5}")
            if i == 0:
                ax.fill_between(one.lag, one.null_low, one.null_high, color="0.85", lw=0, label="95 % of circular shifts")
            ax.errorbar(one.lag, one.score, yerr=[one.score - one.low, one.high - one.score], fmt="-o", ms=3.5, lw=1.3, capsize=2, color=color,
                        label=name, zorder=3)
            top = -0.02 - 0.03 * i
            for column, marker in (("q", "|"), ("p_max", "s")):
                if len(found := one[one[column] < config.fdr]):
                    ax.plot(found.lag, np.full(len(found), top), marker, color=color, ms=6 if marker == "|" else 4, transform=ax.get_xaxis_transform(),
                            clip_on=False)
        for name, value in flat.get(metric, {}).items():
            ax.axhline(value, ls=":", lw=1.4, color=COLORS.get(name, "k"), label=name)
        ax.axvline(0, c="0.6", lw=0.8, zorder=0)
        ax.tick_params(axis="x", pad=4 + 5 * len(names))
        ax.set(xlabel="lag of the window's middle from word onset (ms)", title=SAID.get(metric, metric))
        ax.spines[["top", "right"]].set_visible(False)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    fig.suptitle(f"{title}\nmean of {config.n_folds} folds, 95 % intervals over folds; below: | FDR {config.fdr:g}, ■ family-wise (max over lags)", fontsize=9)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_electrodes(path, table, chance, title, what):
    """electrodes.png: every electrode where it sits, seen from the left, from above and from the front; filled where q < .05; beside them the best."""
    known = table[np.isfinite(table[["x", "y", "z"]]).all(axis=1)]
    fig, axes = plt.subplots(1, 4, figsize=(15, 4.2), layout="constrained", width_ratios=[1, 1, 1, 0.9])
    limit = max(np.abs(table.score - chance).max(), 1e-6)
    for ax, (a, b, name) in zip(axes, (("y", "z", "from the side"), ("x", "y", "from above"), ("x", "z", "from the front"))):
        if len(known):
            theta = np.linspace(0, 2 * np.pi, 200)  # a head for orientation, as wide as MNI's brain
            size = {"x": (70, 0), "y": (88, -18), "z": (62, 12)}
            ax.plot(size[a][1] + size[a][0] * np.cos(theta), size[b][1] + size[b][0] * np.sin(theta), c="0.8", lw=1, zorder=0)
        order = known.score.sub(chance).abs().argsort()
        some = known.iloc[order]
        image = ax.scatter(1000 * some[a], 1000 * some[b], c=some.score, s=16 + 60 * np.abs(some.score - chance) / limit, cmap="RdBu_r", vmin=chance - limit,
                           vmax=chance + limit, edgecolors=np.where(some.q < 0.05, "k", "0.75"), linewidths=np.where(some.q < 0.05, 1.0, 0.5))
        ax.set(xlabel=f"{a} (mm)", ylabel=f"{b} (mm)", aspect="equal")
        ax.set_title(name, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    fig.colorbar(image, ax=axes[:3], shrink=0.5, aspect=40, location="bottom", label=what)
    best = table.sort_values("score", ascending=False).head(16).iloc[::-1]
    axes[3].errorbar(best.score, range(len(best)), xerr=[best.score - best.low, best.high - best.score], fmt="o", ms=4, capsize=2, color="C0")
    axes[3].set_yticks(range(len(best)), best.electrode, fontsize=7)
    axes[3].axvline(chance, c="0.6", lw=0.8)
    axes[3].set_xlabel(what)
    axes[3].set_title("the best", fontsize=9)
    axes[3].spines[["top", "right"]].set_visible(False)
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_encoding(path, lags, r, threshold, title, planted):
    """encoding.png: correlation of every electrode at every lag, and its mean over electrodes; r (L, E)."""
    fig, (ax, below) = plt.subplots(2, 1, figsize=(7.5, 6.5), layout="constrained", sharex=True, height_ratios=[1.4, 1])
    step = np.median(np.diff(lags)) if len(lags) > 1 else 100
    limit, order = max(np.abs(r).max(), 1e-6), np.argsort(-r.max(0))
    image = ax.imshow(r[:, order].T, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, extent=[lags[0] - step / 2, lags[-1] + step / 2, r.shape[1], 0],
                      interpolation="nearest")
    fig.colorbar(image, ax=ax, label="held-out correlation")
    ax.set_ylabel("electrodes, best first")
    mean, sem = r.mean(1), r.std(1, ddof=1) / math.sqrt(r.shape[1]) if r.shape[1] > 1 else np.zeros(len(r))
    below.fill_between(lags, mean - sem, mean + sem, alpha=0.3, lw=0)
    below.plot(lags, mean, label="mean of electrodes (± SEM)")
    below.plot(lags, r.max(1), c="C3", lw=1, label="best electrode")
    below.axhline(threshold, ls=":", c="0.4", label="family-wise 5 % threshold")
    for axis in (ax, below):
        axis.axvline(0, c="k", lw=0.8)
    if planted is not None:
        below.axvspan(*planted, color="C8", alpha=0.18, lw=0, label="planted")
    below.set(xlabel="lag (ms)", ylabel="correlation")
    below.legend(fontsize=7, frameon=False)
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


# ---- the sweep

def settings_by(config, setter, data, target):
    """Let a config setter in podcast-benchmark's manner, setter(config, raws, words, embeddings) → config, change the options it knows; write them back."""
    ours = {"model_params": config.model_params, "training_params": types.SimpleNamespace(**{k: getattr(config, k) for k in (
        "batch_size", "epochs", "learning_rate", "weight_decay", "n_folds", "min_lag", "max_lag")}, early_stopping_patience=config.patience,
        lag_step_size=config.lag_step), "data_params": types.SimpleNamespace(
        window_width=config.window, preprocessor_params=config.preprocessor_params, embedding_type=config.embedding[0], embedding_layer=config.layer,
        embedding_pca_dim=config.pca, channel_reg_ex=config.channels, subject_ids=config.subjects, data_root=config.dataset),
        "model_constructor_name": config.model, "trial_name": Path(config.out_dir).name}
    raws = [mne.io.RawArray(r.signal[:, p].T.astype(np.float64), mne.create_info([r.names[i] for i in p], r.sfreq, "ecog"), first_samp=r.first_sample,
                            verbose="error") for r, p in data.parts]
    changed = setter(types.SimpleNamespace(**ours), raws, target.events.copy(), target.values)
    if not hasattr(changed, "model_params"):
        raise ValueError(f"config_setter={config.config_setter} must give back the config that it was given")
    config.model_params, config.window = dict(changed.model_params), float(changed.data_params.window_width)
    config.preprocessor_params = dict(changed.data_params.preprocessor_params or {})
    for key in ("batch_size", "epochs", "learning_rate", "weight_decay"):
        setattr(config, key, getattr(changed.training_params, key))
    config.patience = changed.training_params.early_stopping_patience


def neural_conv(config, raws, df_word, embeddings):
    """The setter of that name: how many channels there are."""
    config.model_params["input_channels"] = sum(len(raw.ch_names) for raw in raws)
    return config


def foundation_model(config, raws, df_word, embeddings):
    """The setter of that name: which channels there are, and the window that the pretrained model was trained on (s)."""
    p, folder = config.data_params.preprocessor_params, folder_of(config.data_params)
    p["ch_names"] = sum((raw.ch_names for raw in raws), [])
    if (folder / "experiment_config.ini").is_file():
        config.data_params.window_width = read_ini(folder).ecog_data_config.sample_length
    else:
        config.data_params.window_width = load_encoder(folder)[1]["window"]
    return config


SETTERS = {"neural_conv": neural_conv, "foundation_model": foundation_model}


class Sweep:
    """Everything that all jobs share: windows, target, words, folds, the null's shifts, and the folder where finished jobs are kept."""

    def __init__(self, run, config):
        self.run, self.config, self.lags = run, config, config.all_lags()
        self.data = data = Podcast(run, config)
        target = make_target(run, config, data)
        if config.config_setter:
            settings_by(config, resolve(config.config_setter, SETTERS, "config_setter"), data, target)
        self.windows = Windows(config, data, self.lags)
        rows = data.onsets(target.events)
        config.model_params = {**config.model_params, **self.windows.probe(rows).get("model_params", {})}
        self.others = {}  # decoders that read something else than preprocess= makes
        if config.untrained:
            if not self.windows.encoder:
                raise ValueError(f"untrained={config.untrained} needs preprocess=foundation_model_preprocessing_fn and a run folder of foundation.py")
            twins = {f"ridge, untrained {k + 1}": dict(preprocessor_params={**config.preprocessor_params, "untrained": k + 1}) for k in range(config.untrained)}
            self.others = {name: Windows(replace(config, **change), data, self.lags) for name, change in (
                twins | {"ridge, raw signal": dict(preprocess="", preprocessor_params={})}).items()}
        if not self.windows.width:
            raise ValueError("window= is not set, and neither config_setter= nor preprocess= set it: give a width in seconds")
        inside = data.inside(rows, self.windows.spans)  # (L, N)
        if not inside.any(1).all():
            raise ValueError(f"at lag {self.lags[int(np.argmin(inside.any(1)))]:g} ms no word's window lies in the recording of "
                             f"{len(data.parts[0][0].signal) / data.sfreq:.0f} s: narrow min_lag= and max_lag=, or window=")
        keep = np.flatnonzero(inside.all(0))
        if len(keep) < 10 * config.n_folds:
            raise ValueError(f"{len(keep)} words have their window in the recording at every lag from {min(self.lags):g} to {max(self.lags):g} ms: too few "
                             f"for {config.n_folds} folds; narrow min_lag= and max_lag=")
        target.notes["with a window outside a recording at some lag"] = len(target.events) - len(keep)
        target.events, target.values, self.rows = target.events.iloc[keep].reset_index(drop=True), target.values[keep], rows[:, keep]
        self.target, self.start = target, target.events.start.to_numpy(float)
        self.codes, self.kinds = pd.factorize(target.events.label)
        self.width = self.windows.width / data.sfreq
        labels = target.events.label.to_numpy() if config.fold_type == "zero_shot" else None
        self.folds = make_folds(config, self.start, target.events.label.to_numpy(), self.width)
        check_apart(self.folds, self.start, self.width, labels)
        self.Y = [fold_target(config, target, fold) for fold in self.folds]
        self.gap = int(np.ceil(self.width / max(np.median(np.diff(self.start)), 1e-3))) + 1  # words that share a window
        self.shifts = [np.random.default_rng(key_seed(config.seed, "shift", f.number)).random(config.n_shifts) for f in self.folds]  # the same at every lag
        lm = bool({"lm", "static"} & set(config.embedding))  # computed, perhaps on another machine: known by its files, not by its numbers
        code = hashlib.sha256("".join(code_of(resolve(s, k, o)) for s, k, o in (
            (config.model, dict.fromkeys(MODELS), "model"), (config.preprocess or "-", {"-": None, **dict.fromkeys(PREPROCESSORS)}, "preprocess"),
            (config.task, dict.fromkeys([config.task] * (":" not in config.task)), "task"))).encode() + repr((
                data.names, data.meta.get("options"), [r.meta.get("sha256") for r, _ in data.parts], contents({"lm": config.lm} if lm else {}),
                self.windows.encoder.key if self.windows.encoder else contents(config.preprocessor_params))).encode()
            + self.rows.tobytes() + (b"" if lm else target.values.tobytes())).hexdigest()[:6]
        run.content = code  # of results.csv's rows too: other data or another user's file is another experiment
        self.store = run.out / "jobs" / run.options_hash()
        self.store.mkdir(parents=True, exist_ok=True)
        self.keys = dict(data=data.source, target=config.task if config.task != "embedding" else
                         config.embedding[0] + (f" layer {config.layer}" if config.embedding[0] == "lm" or any(
                             k.startswith("layer-") for k in data.meta.get("features", {}).get(config.embedding[0], {})) else ""))
        run.print(f"{data.source}: {len(data.names)} electrodes of {len(data.parts)} people, {len(keep):,} {'words' if target.kind == 'vectors' else 'events'} "
                  f"at every lag ({', '.join(f'{v} {k}' for k, v in target.notes.items() if v) or 'none'} left out), {len(self.kinds):,} types; embargo leaves "
                  f"{np.mean([len(f.train) for f in self.folds]):.0f} to train, {np.mean([len(f.val) for f in self.folds]):.0f} to validate, "
                  f"{np.mean([len(f.test) for f in self.folds]):.0f} to test per fold")
        if self.windows.encoder and run.master:
            run.print(self.windows.encoder.said(config, self))

    def path(self, name, lag, k):
        return self.store / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}_{'none' if lag is None else f'{lag:g}'}_{k}.npz"

    def record(self, name, lag, k, found, val_score, epochs=0):
        """Rows of one finished job, then its null; the job counts as finished when the latter is there."""
        for metric, (value, low, high, null, n) in found.items():
            self.run.result(value, float(null.mean()), low, high, n, model=name, lag=lag, fold=k, metric=metric, **self.keys)
        arrays = {f"null_{m}": v[3] for m, v in found.items()} | {f"score_{m}": np.float64(v[0]) for m, v in found.items()}
        with aside(self.path(name, lag, k)) as f:
            np.savez(f, val=val_score, epochs=epochs, n=next(iter(found.values()))[4], **arrays)

    def jobs(self):
        """[(model, lag or None, fold number)] of the whole sweep."""
        c = self.config
        flat = [name for name in c.controls if name != "arbitrary" and (name == "mean" or self.target.kind == "vectors")]
        swept = [*dict.fromkeys([c.model, *c.beside, *["ridge"] * bool(self.others), *self.others])]
        swept += ["arbitrary"] * ("arbitrary" in c.controls and self.target.kind == "vectors")
        return [(name, lag, k) for lag in self.lags for k in range(c.n_folds) for name in swept] + [(name, None, k) for k in range(c.n_folds) for name in flat]

    def do(self, todo, bar):
        """Do some jobs: controls, then lag after lag as many as fit the memory, decoder by decoder."""
        for name, k in ((name, k) for name, lag, k in todo if lag is None):
            val, test = control(self.config, name, self.target, self.folds[k], self.Y[k])
            self.record(name, None, k, *score(self.config, self.target, self.folds[k], self.Y[k], self.codes, val, test, self.shifts[k], self.gap))
            bar.update()
        lags = list(dict.fromkeys(lag for _, lag, _ in todo if lag is not None))
        at_once = max(1, int(self.config.memory * 1e9 / self.windows.bytes(len(self.start))))
        for begin in range(0, len(lags), at_once):
            some = lags[begin:begin + at_once]
            names = list(dict.fromkeys(name for name, lag, _ in todo if lag in some))
            for windows, group in [(self.windows, [n for n in names if n not in self.others]), *((w, [n]) for n, w in self.others.items() if n in names)]:
                if group:
                    self.fit(windows.at([self.lags.index(lag) for lag in some], self.rows), some, [j for j in todo if j[0] in group and j[1] in some], bar)

    def fit(self, X, some, todo, bar):
        """The decoders of the jobs todo on inputs X (L, N, ...) of the lags `some`."""
        on_device = torch.as_tensor(X, device=self.run.device)
        for name in dict.fromkeys(name for name, _, _ in todo):
            mine = [(lag, k) for n, lag, k in todo if n == name]
            linear = "arbitrary" if name == "arbitrary" else "ridge" if name in self.others else name if name in LINEAR else ""
            size = 1 if linear or MODELS.get(name) is None or MODELS.get(name) is FineTune else self.config.stack or (
                5 if self.run.device.type == "cpu" else len(mine))
            for part in (mine[i:i + size] for i in range(0, len(mine), size)):
                batch = [Job(lag, some.index(lag), self.folds[k], self.Y[k],
                             *input_scale(self.config, X[some.index(lag)], self.folds[k], self.target, self.Y[k])) for lag, k in part]
                if not linear:
                    outs = train_stack(self.run, self.config, name, self.target, on_device, batch, self.windows.names, self.folds)
                else:
                    outs = [fit_linear(self.config, "ridge" if linear == "arbitrary" else linear, self.target.kind, (X[j.l] - j.mean) * j.factor, j,
                                       self.arbitrary(j.fold) if linear == "arbitrary" else None) for j in batch]
                for (lag, k), (val, test, epochs, state) in zip(part, outs):
                    Y = self.arbitrary(self.folds[k]) if name == "arbitrary" else self.Y[k]
                    if self.config.save_models and name == self.config.model:
                        (self.run.out / "models").mkdir(exist_ok=True)
                        save_checkpoint(self.run.out / "models" / f"lag_{lag:g}_fold_{k}.pt", dict(
                            kind="decoder", model=name, lag=lag, fold=k, epochs=epochs, state={n: v.contiguous() for n, v in state.items()},
                            model_params=plain(self.config.model_params), electrodes=self.windows.names))
                    self.record(name, lag, k, *score(self.config, self.target, self.folds[k], Y, self.codes, val, test, self.shifts[k], self.gap), epochs)
                    bar.update()

    def arbitrary(self, fold):
        """Targets of the control: one random vector a word type."""
        vectors = np.stack([np.random.default_rng(key_seed(self.config.seed, "arbitrary", w)).uniform(-1, 1, 50) for w in self.kinds]).astype(np.float32)
        return vectors[self.codes] - vectors[self.codes][fold.train].mean(0)


def plain(value):
    """A dict of options as plain types."""
    return yaml.safe_load(yaml.safe_dump(value))


def summarise(run, sweep):
    """lags.csv and the mean rows of results.csv: per decoder, metric and lag the mean over folds, its interval, the null's band, p, q (FDR over lags) and
    p_max (family-wise, by the maximum over lags). Gives the table, {metric: {control: score}}, and the lag that each fold's validation words choose."""
    config, rows, flat, chosen = sweep.config, [], {}, {}
    names = dict.fromkeys(name for name, _, _ in sweep.jobs())
    for name in names:
        lags = [None] if (name, None, 0) in sweep.jobs() else sweep.lags
        files = [[np.load(sweep.path(name, lag, k)) for k in range(config.n_folds)] for lag in lags]
        choice = np.argmax([[float(f["val"]) for f in row] for row in files], 0)  # of each fold, a lag
        chosen[name] = [lags[c] for c in choice]
        n = int(sum(int(f["n"]) for f in files[0]))
        for metric in (key.removeprefix("score_") for key in files[0][0].files if key.startswith("score_")):
            lower = metric in LOWER
            scores = np.array([[float(f[f"score_{metric}"]) for f in row] for row in files])  # (L, folds)
            null = np.array([np.mean([f[f"null_{metric}"] for f in row], 0) for row in files])  # (L, P)
            p = np.array([p_value(s, x, lower) for s, x in zip(scores.mean(1), null)])
            extreme = null.min(0) if lower else null.max(0)
            p_max, q = np.array([p_value(s, extreme, lower) for s in scores.mean(1)]), mne.stats.fdr_correction(p, config.fdr)[1]
            for l, lag in enumerate(lags):
                mean, low, high = over_folds(scores[l])
                run.result(mean, null[l].mean(), low, high, n, model=name, lag=lag, fold="mean", metric=metric, **sweep.keys)
                band = np.quantile(null[l], [0.025, 0.975])
                rows.append(dict(model=name, metric=metric, lag=lag, score=mean, low=low, high=high, chance=null[l].mean(), null_low=band[0], null_high=band[1],
                                 p=p[l], q=q[l], p_max=p_max[l], n=n, **sweep.keys))
            if lags == [None]:
                flat.setdefault(metric, {})[name] = scores.mean()
            else:
                mean, low, high = over_folds(scores[choice, np.arange(config.n_folds)])
                run.result(mean, null[choice].mean(), low, high, n, model=name, lag="chosen", fold="mean", metric=metric, **sweep.keys)
    for name, (mean, low, high) in worth(sweep, chosen).items():
        run.result(mean, 0.0, low, high, n, model=name, lag="chosen", fold="mean", metric=PRIMARY[sweep.target.kind], **sweep.keys)
    table = pd.DataFrame(rows)
    write_aside(run.out / "lags.csv", table.to_csv(index=False))
    return table, flat, chosen


def worth(sweep, chosen):
    """{what less what: (mean, low, high)} over folds, in pairs: ridge on the pretrained latents less ridge on the untrained ones' (their mean, and each) and
    on the raw signal, each at the lag that its validation words choose. Empty without untrained=."""
    metric, found = PRIMARY[sweep.target.kind], {}

    def of(name):
        return np.array([float(np.load(sweep.path(name, lag, k))[f"score_{metric}"]) for k, lag in enumerate(chosen[name])])
    twins = [name for name in sweep.others if "untrained" in name]
    scores = ({f"mean of {len(twins)} untrained": np.mean([of(t) for t in twins], 0)} if len(twins) > 1 else {}) | {t: of(t) for t in sweep.others}
    for name, other in scores.items():
        found[f"ridge, pretrained - {name.removeprefix('ridge, ')}"] = over_folds(of("ridge") - other)
    return found


def single_electrodes(run, sweep, chosen):
    """Ridge on each electrode alone, at the lag that each fold's validation words chose: a row of results.csv each, dealt over ranks."""
    config, metric = sweep.config, PRIMARY[sweep.target.kind]
    if config.represent != "bins" or sweep.windows.function not in (None, bin_means):
        return  # a feature belongs to an electrode where features are bin means
    channels = {e: [i for i, n in enumerate(sweep.windows.names) if n == e or n.startswith(f"{e} ")] for e in sweep.data.names}
    done = run.rows()
    done = set(done.electrode.dropna()) if "electrode" in done else set()
    mine = [e for e in run.share(sweep.data.names) if e not in done]
    if not mine:
        return
    kept, bar = {}, run.progress(len(chosen), desc="electrodes, fold by fold")
    for k, lag in enumerate(chosen):
        X = sweep.windows.at([sweep.lags.index(lag)], sweep.rows)[0]
        mean, factor = input_scale(types.SimpleNamespace(standardize=config.standardize, select=0), X, sweep.folds[k], sweep.target, sweep.Y[k])
        for e in mine:
            x = (X[:, channels[e]] - mean[channels[e]]) * factor[channels[e]]
            val, test, _, _ = fit_linear(config, "ridge", sweep.target.kind, x, Job(lag, 0, sweep.folds[k], sweep.Y[k], mean, factor))
            kept.setdefault(e, []).append(score(config, sweep.target, sweep.folds[k], sweep.Y[k], sweep.codes, val, test, sweep.shifts[k], sweep.gap,
                                                auc_only=True)[0][metric])
        bar.update()
    for e, folds in kept.items():
        null = np.mean([f[3] for f in folds], 0)
        mean, low, high = over_folds([f[0] for f in folds])
        run.result(mean, null.mean(), low, high, sum(f[4] for f in folds), model="ridge, one electrode", lag="chosen", fold="mean", metric=metric,
                   electrode=e, p=float(p_value(mean, null)), **sweep.keys)
    bar.close()


def decode(run, config):
    """The recording to the target at every lag, with every decoder, fold by fold; then the summary, the electrodes and the figures."""
    sweep = Sweep(run, config)
    reg = {k: config.model_params[k] for k in ("reg", "reg_head") if config.model_params.get(k)}
    if reg and MODELS.get(config.model) in ("joint", "independent", "one"):
        run.print(", ".join(f"{k}={v}" for k, v in reg.items()) + " acts as L2 on convolutions (reg) and head (reg_head); podcast-benchmark never used them")
    jobs = sweep.jobs()
    mine = {(lag, k) for lag, k in run.share(dict.fromkeys((lag, k) for _, lag, k in jobs))}
    todo = [j for j in jobs if (j[1], j[2]) in mine and not sweep.path(*j).exists()]
    bar = run.progress(sum((lag, k) in mine for _, lag, k in jobs), initial=sum((lag, k) in mine for _, lag, k in jobs) - len(todo), desc="jobs")
    sweep.do(todo, bar)
    bar.close()
    run.merge()
    missing = sum(not sweep.path(*j).exists() for j in jobs)
    if missing:  # a SLURM array's other tasks are not done yet
        run.print(f"{len(jobs) - missing} of {len(jobs)} jobs are done; the same command once more, when all are, writes the summary and the figures")
        return
    table, flat, chosen = summarise(run, sweep) if run.master else (None, None, None)
    run.barrier()
    if not run.master:
        chosen = {config.model: [sweep.lags[int(np.argmax([float(np.load(sweep.path(config.model, lag, k))["val"]) for lag in sweep.lags]))]
                                 for k in range(config.n_folds)]}
    single_electrodes(run, sweep, chosen[config.model])
    results = run.merge()
    if not run.master:
        return
    metric = PRIMARY[sweep.target.kind]
    planted = planted_span(sweep.data, sweep.width, config)
    title = f"{sweep.data.source}: {sweep.keys['target']} from {len(sweep.data.names)} electrodes, windows of {1000 * config.window:.0f} ms"
    swept = table[table.lag.notna()]
    plot_lags(run.out / "lags.png", swept, flat, sweep.target.kind, title, planted, config)
    if "electrode" in results and set(sweep.data.names) <= set(results.electrode):  # a SLURM array's other tasks may have some still
        part = results[results.electrode.notna()].set_index("electrode").loc[sweep.data.names].reset_index()
        part[["x", "y", "z"]], part["q"] = sweep.data.xyz, mne.stats.fdr_correction(part.p.to_numpy(float), config.fdr)[1]
        part["subject"] = part.electrode.str.split(" ").str[0]
        columns = ["subject", "electrode", "x", "y", "z", "metric", "score", "low", "high", "chance", "p", "q", "n", "data"]
        write_aside(run.out / "electrodes.csv", part[columns].to_csv(index=False))
        plot_electrodes(run.out / "electrodes.png", part, float(part.chance.mean()), f"{sweep.data.source}: ridge on one electrode at the lag chosen on "
                        f"validation words (black edge: FDR {config.fdr:g})", SAID[metric])
    report(run, sweep, swept, flat, chosen, results)


def report(run, sweep, table, flat, chosen, results):
    """The closing lines: at the lag chosen on validation words, beside its null and the controls; at the best lag of each, for orientation."""
    metric, n = PRIMARY[sweep.target.kind], len(sweep.start)
    for name in dict.fromkeys(table.model):
        row = results[(results.model == name) & (results.lag == "chosen") & (results.metric == metric)].iloc[-1]
        one = table[(table.model == name) & (table.metric == metric)]
        found = ", ".join(f"{lag:g}" for lag in one[one.p_max < 0.05].lag)
        run.print(f"{name}: {SAID[metric]} {row.score:.3f} [{row.low:.3f}, {row.high:.3f}] at the lag chosen on validation words "
                  f"({', '.join(f'{lag:g}' for lag in chosen[name])} ms by fold), shifted words {row.chance:.3f}, n = {n:,}; "
                  f"beyond chance (family-wise .05) at {found or 'no lag'}" + " ms" * bool(found))
    for name, (mean, low, high) in worth(sweep, chosen).items():
        run.print(f"{name}: {mean:+.3f} [{low:+.3f}, {high:+.3f}] {SAID[metric]}, in pairs over {sweep.config.n_folds} folds" + (
            "; better" if low > 0 else "; worse" if high < 0 else "; no difference that folds can tell"))
    if metric in flat:
        run.print("controls: " + ", ".join(f"{name} {value:.3f}" for name, value in flat[metric].items()) + f" ({SAID[metric]}); "
                  + ", ".join(f"{name} {value:.3f}" for name, value in flat.get("top1", {}).items()) + " (top-1)" * ("top1" in flat))
    if sweep.config.compare or not sweep.data.meta["synthetic"]:
        run.print("podcast-benchmark published (183 electrodes of 8 people, its best lag chosen on test words; its top-1 lies below always saying 'the'):\n"
                  + "\n".join(f"    {name}: {values}" for name, values in BENCHMARK))
    run.print(f"lags.png, electrodes.png, lags.csv, electrodes.csv, results.csv in {run.out}")


def planted_span(data, width, config):
    """(from, to) ms of the lags whose window overlaps what was planted; None where nothing was, or the target is something else."""
    planted = data.meta.get("planted")
    if not planted or config.task not in ("embedding", "content", "pos", "volume"):
        return None
    lag = planted["volume_lag_ms" if config.task == "volume" else "lag_ms"]
    reach = 500 * width + planted.get("kernel_ms", 0) / 2
    return lag - reach, lag + reach


# ---- encoding

def encode(run, config):
    """Embeddings to every electrode at every lag: himalaya's ridge, banded when there are several feature spaces; alpha and lag on validation words."""
    from himalaya.ridge import GroupRidgeCV, solve_ridge_cv_svd
    from himalaya.scoring import correlation_score_split
    if config.represent != "bins" or config.preprocess not in ("", "preprocess_neural_data"):
        raise ValueError("direction=encode predicts the mean of a window: leave represent= and preprocess= out")
    config.bins, config.preprocess = 1, ""  # preprocess_neural_data would cut the window into bins
    sweep = Sweep(run, config)
    if sweep.target.kind != "vectors":
        raise ValueError(f"direction=encode goes from embeddings: leave task={config.task} out, or let it give vectors")
    widths = sweep.target.names or [sweep.target.values.shape[1]]
    spaces = np.split(np.arange(sum(widths)), np.cumsum(widths)[:-1])
    L, E, P = len(sweep.lags), len(sweep.windows.names), min(config.n_shifts, max(100, int(5e7 / (len(sweep.lags) * len(sweep.windows.names)))))
    mine = [k for k in run.share(range(config.n_folds)) if not sweep.path("encode", None, k).exists()]
    bar = run.progress(len(mine), desc="folds")
    Y = sweep.windows.at(range(L), sweep.rows)[..., 0].transpose(1, 0, 2).reshape(len(sweep.start), L * E) if mine else None  # (N, L * E)
    for k in mine:
        fold, rows = sweep.folds[k], np.concatenate([sweep.folds[k].train, sweep.folds[k].val])
        split = [(np.arange(len(fold.train)), np.arange(len(fold.train), len(rows)))]
        parts = [fold_target(config, Target("vectors", sweep.target.events, sweep.target.values[:, s]), fold) for s in spaces]
        X, sd = np.concatenate(parts, 1), Y[fold.train].std(0)
        y = ((Y - Y[fold.train].mean(0)) / np.where(sd > 0, sd, 1)).astype(np.float32)
        if len(parts) == 1:
            _, w, val, offset = solve_ridge_cv_svd(X[rows], y[rows], np.array(config.alphas, np.float32), fit_intercept=True, cv=split, warn=False)
            predicted, alone = X[fold.test] @ w + offset, None
        else:
            groups = np.repeat(np.arange(len(parts)), [p.shape[1] for p in parts])
            offset = y[rows].mean(0)
            centre = X[rows].mean(0)
            model = GroupRidgeCV(groups=groups, cv=split, random_state=config.seed % 2 ** 32, solver_params=dict(
                n_iter=20, alphas=np.array(config.alphas, np.float32), progress_bar=False, warn=False)).fit(X[rows] - centre, y[rows] - offset)
            val, predicted = model.cv_scores_.max(0), model.predict(X[fold.test] - centre) + offset
            alone = correlation_score_split(y[fold.test], model.predict(X[fold.test] - centre, split=True))  # (spaces, L * E), they sum to r
        r = correlations(predicted, y[fold.test], circular(sweep.shifts[k][:P], len(fold.test), sweep.gap)).reshape(-1, L, E)  # (1 + P, L, E)
        with aside(sweep.path("encode", None, k)) as f:
            np.savez(f, r=r.astype(np.float32), val=np.asarray(val).reshape(L, E), alone=np.zeros(0) if alone is None else np.asarray(alone).reshape(-1, L, E))
        bar.update()
    bar.close()
    run.barrier()
    if missing := sum(not sweep.path("encode", None, k).exists() for k in range(config.n_folds)):
        return run.print(f"{config.n_folds - missing} of {config.n_folds} folds are done; the same command once more, when all are, writes the summary")
    if run.master:
        encode_summary(run, sweep)
    run.merge()


def correlations(a, b, orders):
    """(P, T): correlation of a's columns (n, T) with b's reordered by orders (P, n). Circular orders cost one FFT for all."""
    a, b = ((x - x.mean(0)) / np.maximum(x.std(0), 1e-12) for x in (a, b))
    steps = orders[:, 0]  # a circular order begins with its shift
    out = np.empty((len(steps), a.shape[1]), np.float32)
    for begin in range(0, a.shape[1], 512):
        some = slice(begin, begin + 512)
        spectrum = np.conj(np.fft.rfft(a[:, some], axis=0)) * np.fft.rfft(b[:, some], axis=0)
        out[:, some] = np.fft.irfft(spectrum, len(a), axis=0)[steps] / len(a)
    return out


def encode_summary(run, sweep):
    """encoding.csv (electrode x lag), electrodes.csv (each at the lag its validation words choose), rows of results.csv and two figures."""
    config, files = sweep.config, [np.load(sweep.path("encode", None, k)) for k in range(sweep.config.n_folds)]
    r, n = np.mean([f["r"] for f in files], 0), sum(len(f.test) for f in sweep.folds)  # (1 + P, L, E)
    L, E = r.shape[1:]
    p = p_value(r[0], r[1:])
    p_max, threshold = p_value(r[0], r[1:].max((1, 2))[:, None, None]), float(np.quantile(r[1:].max((1, 2)), 0.95))
    q, half = mne.stats.fdr_correction(p, config.fdr)[1], 1.96 / math.sqrt(max(n - 3, 1))
    columns = dict(r=r[0], low=np.tanh(np.arctanh(r[0]) - half), high=np.tanh(np.arctanh(r[0]) + half), chance=r[1:].mean(0), p=p, q=q, p_max=p_max)
    table = pd.DataFrame(dict(electrode=np.tile(sweep.windows.names, L), lag=np.repeat(sweep.lags, E), **{k: v.ravel() for k, v in columns.items()}, n=n,
                              data=sweep.data.source))
    for s, name in enumerate(config.embedding if files[0]["alone"].size else ()):
        table[f"r_{Path(name).stem}"] = np.mean([f["alone"][s] for f in files], 0).ravel()
    write_aside(run.out / "encoding.csv", table.to_csv(index=False))
    choice, each = np.stack([f["val"].argmax(0) for f in files]), np.arange(E)  # (folds, E)
    at = np.mean([f["r"][:, c, each] for f, c in zip(files, choice)], 0)  # (1 + P, E)
    p, rows = p_value(at[0], at[1:]), []
    for e, name in enumerate(sweep.windows.names):
        low, high = np.tanh(np.arctanh(at[0, e]) + np.array([-half, half]))
        lag = float(np.median(np.array(sweep.lags)[choice[:, e]]))
        run.result(float(at[0, e]), float(at[1:, e].mean()), float(low), float(high), n, model="ridge, encoding", lag=lag, fold="mean", metric="corr",
                   electrode=name, **sweep.keys)
        rows.append(dict(electrode=name, lag=lag, score=at[0, e], low=low, high=high, chance=at[1:, e].mean(), p=p[e]))
    electrodes = pd.DataFrame(rows).assign(q=mne.stats.fdr_correction(p, config.fdr)[1], subject=[n.split(" ")[0] for n in sweep.windows.names], n=n,
                                           data=sweep.data.source)
    electrodes[["x", "y", "z"]] = np.repeat(sweep.data.xyz, E // len(sweep.data.names), 0) if not config.bands else np.nan
    write_aside(run.out / "electrodes.csv", electrodes.to_csv(index=False))
    title = f"{sweep.data.source}: {' + '.join(config.embedding)} to {E} electrodes, windows of {1000 * config.window:.0f} ms, {n:,} words"
    plot_encoding(run.out / "encoding.png", sweep.lags, r[0], threshold, title, planted_span(sweep.data, sweep.width, config))
    plot_electrodes(run.out / "electrodes.png", electrodes, 0.0, f"{title}; black edge: FDR {config.fdr:g}", "correlation at the chosen lag")
    best = electrodes.sort_values("score").iloc[-1]
    run.print(f"{(electrodes.q < config.fdr).sum()} of {E} electrodes follow the embeddings (FDR {config.fdr:g}); the best, {best.electrode}, with "
              f"r = {best.score:.3f} [{best.low:.3f}, {best.high:.3f}] at {best.lag:g} ms (shifted words {best.chance:.3f}), n = {n:,} words taken as "
              f"independent; family-wise threshold {threshold:.3f}")
    run.print(f"encoding.png, electrodes.png, encoding.csv, electrodes.csv, results.csv in {run.out}")


# ---- Neuroprobe (arXiv 2509.21671)

LEADERBOARD = {"linear on Laplacian-referenced spectrogram": (.660, .648, .539), "linear on spectrogram": (.630, .626, .528),
               "linear on raw voltage": (.606, .576, .510), "BrainBERT, pretrained, frozen": (.587, .581, .522),
               "BrainBERT, untrained, frozen": (.585, .574, .527), "PopulationTransformer": (.545, .566, .526)}  # mean test ROC-AUC by split
SPLITS = {"within": "Within-Session", "session": "Cross-Session", "subject": "Cross-Subject"}  # folders of its leaderboard


def neuroprobe(run, config):
    """Neuroprobe's binary tasks by the splits that its package fixes, prepared by data/braintreebank: one row per recording, task and fold, and a JSON file
    per task in the leaderboard's form. Nothing here chooses a window or a split; validation windows choose the penalty or the epoch."""
    folder = run.dataset(config.dataset)
    meta = read_set(folder)
    if "tasks" not in meta:
        raise ValueError(f"{folder / 'meta.yaml'} names no tasks: direction=neuroprobe reads sets made by data/braintreebank/prepare.py")
    asked = meta["tasks"] if config.task in ("all", "embedding") else [config.task]
    if unknown := set(asked) - set(meta["tasks"]):
        raise ValueError(f"task={unknown.pop()} is none of Neuroprobe's: all, {', '.join(meta['tasks'])}")
    there = [name for name in meta["recordings"] if (folder / name / "neuroprobe.csv").is_file()]
    opened = {name: Recording(folder / name) for name in there}
    tested = [n for n in there if not config.subjects or any(s == n or is_subject(s, opened[n]) for s in config.subjects)]

    def source(name):
        """What a recording is trained from, and not there as long as it is not prepared."""
        others = {"within": [name], "session": [m for m in there if m != name and opened[m].subject == opened[name].subject],
                  "subject": [m for m in there if m == meta["across_people"] and opened[m].subject != opened[name].subject]}
        return next(iter(others[config.split]), None)

    sources = {n: source(n) for n in tested}
    if without := [n for n in tested if sources[n] is None]:
        run.print(f"split={config.split}: nothing to train {', '.join(without)} from, left out"
                  + (f" ({meta['across_people']} trains, its person is not tested)" if config.split == "subject" else ""))
        tested = [n for n in tested if n not in without]
    if not tested:
        raise ValueError(f"split={config.split} subjects={config.subjects}: {folder} leaves no recording to be tested; it has {', '.join(there)}")
    own = code_of(resolve(config.model, dict.fromkeys(MODELS), "model"))
    content = repr(([opened[n].meta.get("sha256") for n in there], contents(config.preprocessor_params), own))
    run.content = hashlib.sha256(content.encode()).hexdigest()[:6]  # other data, another encoder or another file of the user's is another experiment
    done = run.rows()
    done = set(zip(done.recording, done.task)) if len(done) else set()
    mine = [(n, t) for n, t in run.share([(n, t) for n in tested for t in asked]) if (n, t) not in done]
    inputs = {}

    def windows(name, onset):
        """(N, ...) inputs of a recording's windows that begin at onset (s), opened once."""
        if name not in inputs:
            montage = Montage([(opened[name], np.flatnonzero(opened[name].good))])
            if len(inputs) > 1:
                inputs.clear()  # a recording and what trains it, not all
            inputs[name] = Windows(config, montage, [500 * config.window])
        one = inputs[name]
        rows = one.data.onsets(pd.DataFrame({"start": onset}))
        one.probe(rows)
        one.lags = [500 * config.window]  # from the onset on, whatever width the encoder asked for
        one.set_width(config.window)
        if not one.data.inside(rows, one.spans).all():
            raise ValueError(f"{name}: a window of {config.window} s goes beyond the recording of {len(opened[name].signal) / one.data.sfreq:.0f} s: "
                             "the benchmark's is 1 s; set window=1")
        return one.at([0], rows)[0], one.names

    bar = run.progress(len(mine), desc="recordings x tasks")
    for name, task in mine:
        both = list(dict.fromkeys([sources[name], name]))
        tables = [table[table.task == task].sort_values("onset", kind="stable") for table in (pd.read_csv(folder / n / "neuroprobe.csv") for n in both)]
        made = [windows(n, t.onset.to_numpy()) for n, t in zip(both, tables)]
        if config.split == "subject" and not config.preprocess:  # contacts have no counterpart in another person: the means of regions that both have
            regions = [opened[n].channels.region[opened[n].good].fillna("").to_numpy() for n in both]
            shared = sorted(set(regions[0]) & set(regions[1]) - {""})
            if shared:
                made = [(np.stack([X.reshape(len(X), len(r), -1)[:, r == g].mean(1) for g in shared], 1), shared) for (X, _), r in zip(made, regions)]
        if len({m[0].shape[1:] for m in made}) > 1:
            raise ValueError(f"split={config.split}: the inputs of {both[0]} have shape {made[0][0].shape[1:]}, those of {name} {made[-1][0].shape[1:]}: "
                             "they share no region or contacts; take preprocess= an encoder that makes the same of all")
        X, y = np.concatenate([m[0] for m in made]), np.concatenate([t.label for t in tables])
        first, start = len(X) - len(tables[-1]), tables[-1].onset.to_numpy()
        target = Target("classes", pd.DataFrame({"label": y.astype(str)}), y, ["0", "1"])
        folds = []
        for k, part in enumerate(["across"] if config.split != "within" else sorted(c for c in tables[-1] if c.startswith("within_"))):
            val, test = (first + np.flatnonzero(tables[-1][part] == p) for p in ("val", "test"))
            folds.append(Fold(k, np.arange(first) if first else np.flatnonzero(tables[-1][part] == "train"), val, test))
        for fold in folds:
            wide = Fold(fold.number, fold.train, fold.val, np.concatenate([fold.test, fold.train]))  # training windows are predicted too: the leaderboard asks
            job = Job(0.0, 0, wide, y, *input_scale(config, X, fold, target, y))
            if config.model in LINEAR:
                val, out = fit_linear(config, config.model, "classes", (X - job.mean) * job.factor, job)[:2]
            else:
                val, out = train_stack(run, config, config.model, target, torch.as_tensor(X, device=run.device)[None], [job], made[-1][1], [wide])[0][:2]
            test, train = out[:, :len(fold.test)], out[:, len(fold.test):]
            gap = int(np.ceil(config.window / max(np.median(np.diff(start)), 1e-3))) + 1
            shifts = np.random.default_rng(key_seed(config.seed, "shift", fold.number)).random(config.n_shifts)
            found, _ = score(config, target, fold, y, None, val, test, shifts, gap)
            fitted = measure_classes(train.mean(0), y[fold.train], target.names, np.arange(len(fold.train))[None])
            near = 0 if first else int((~away(start[fold.test], start[fold.train], config.window)).sum())
            for metric in ("roc_auc", "accuracy"):
                value, low, high, null, n = found[metric]
                run.result(value, float(null.mean()), low, high, n, model=config.model, data="BrainTreebank", recording=name, task=task, split=config.split,
                           fold=fold.number, metric=metric, train_score=float(fitted[metric][0]), p=float(p_value(value, null)), test_near_train=near)
        bar.update()
    bar.close()
    results = run.merge()
    if run.master and len(results):
        leaderboard(run, config, results, len(tested) * len(asked))


def leaderboard(run, config, results, expected):
    """leaderboard/SPLIT/population_TASK.json of what is done so far, and the closing lines."""
    place = run.out / "leaderboard" / SPLITS[config.split]
    place.mkdir(parents=True, exist_ok=True)
    for task, part in results.groupby("task", sort=False):
        found = {}
        for (name, fold), rows in part.groupby(["recording", "fold"]):
            person, trial = re.fullmatch(r"sub_(\d+)_trial(\d+)", name).groups()
            folds = found.setdefault(f"btbank{person}_{int(trial)}", {"population": {"one_second_after_onset": {
                "time_bin_start": 0.0, "time_bin_end": 1.0, "folds": []}}})["population"]["one_second_after_onset"]["folds"]
            folds.append({f"{which}_{row.metric}": float(row[column]) for which, column in (("train", "train_score"), ("test", "score"))
                          for _, row in rows.iterrows()} | {"fold_idx": int(fold)})
        write_aside(place / f"population_{task}.json", json.dumps({
            "model_name": run.out.name, "description": f"decode.py: {config.model} on {config.preprocess or config.represent}, reference {config.reference}",
            "author": "", "organization": "", "organization_url": "", "timestamp": 0, "evaluation_results": found}, indent=2))
    auc = results[results.metric == "roc_auc"]
    each = auc.groupby(["recording", "task"]).agg(score=("score", "mean"), chance=("chance", "mean"))
    mean, low, high = over_folds(each.groupby("recording").score.mean())
    for task, part in each.groupby("task", sort=False):
        run.print(f"{task}: ROC-AUC {part.score.mean():.3f} over {len(part)} recordings (shifted labels {part.chance.mean():.3f})")
    interval = f" [{low:.3f}, {high:.3f}] over recordings" if auc.recording.nunique() > 1 else ""
    run.print(f"{SPLITS[config.split]}, {config.model} on {config.preprocess or config.represent}: mean test ROC-AUC {mean:.3f}{interval}, shifted labels "
              f"{each.chance.mean():.3f}, {len(each)} of {expected} recordings x tasks, {int(auc.n.sum()):,} test windows"
              + (f", {int(auc.test_near_train.sum()):,} of them share samples with a training window (the split is the benchmark's)"
                 if auc.test_near_train.sum() else ""))
    column = list(SPLITS).index(config.split)
    run.print("its leaderboard, mean over all rows: " + ", ".join(f"{name} {values[column]:.3f}" for name, values in LEADERBOARD.items()))
    run.print(f"{place}: one JSON a task in the leaderboard's form, author, organization and time left for you; results.csv in {run.out}")


def main(config):
    run = Run(config)
    {"decode": decode, "encode": encode, "neuroprobe": neuroprobe}[config.direction](run, config)
    run.close()


if __name__ == "__main__":
    main(configure(Config, seed_options(sys.argv[1:])))
