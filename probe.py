"""What the hidden layers of an untouched language model know: one pass, every layer, honest probes.

    python probe.py                          # the model of train.py on data/grammar, offline
    python probe.py config/probe_gpt2.yaml   # GPT-2s; first: python data/probing/get_data.py
    torchrun --standalone --nproc_per_node=4 probe.py config/probe_gpt2.yaml
    streamlit run probe_app.py               # look at what is in out/

Each text goes through each model once. Its hidden states are pooled while the model runs, and only
the pooled vectors are kept, in a cache that other embedding studies may read: one folder for each
model, list of texts and poolings, named by a hash of weights and token ids.

    meta.json      model, texts, layers [i, ...] (0 the embeddings, i after block i, the last one
                   after the final norm), width, dtype, truncated
    lengths.npy    (N,) pooled tokens of each text
    POOLING.npy    (N, layers, width); POOLING is a quantile of the tokens (0.0 the first, 1.0 the
                   last) or a name in REDUCE: np.load(file, mmap_mode="r")
    done           how many texts are finished, from the shortest: a killed pass goes on from there

Folds are grouped and stratified: one is tested, the next one chooses penalty, threshold, epoch and
layer, the others are learnt from. Beside every score: the majority guess, the bag of embeddings
(layer 0), the same architecture with random weights, a control task (a random label for each word
type), the description length, and an interval. p-values are corrected over layers and poolings.
Hewitt & Liang 2019 (control tasks); Voita & Titov 2020 (online code); Nadeau & Bengio 2003
(corrected t); Conneau et al. 2018 (SentEval).
"""

import fcntl
import hashlib
import inspect
import json
import math
import sys
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby, pairwise, product
from operator import itemgetter
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
import scipy.stats
import torch
from sklearn import metrics
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis  # noqa: F401
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import ParameterGrid, StratifiedGroupKFold
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from configurator import InputError, Run, aside, check, check_keys, configure, key_seed, write_aside
from convert import HiddenStates
from data.labelled_texts import LabelledTexts
from data.stimuli import ENCODING_FORMAT, read_meta

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
GRAMMAR = ["tense", "subj_number", "depth", "bigram_shift", "coord_inversion", "odd_man_out"]
BASELINES = ["layer0", "random_init", "control", "compression"]
LACKS = (
    "The least populated|y_pred contains|No (posi|nega)tive|F-score|A single label|An input array"
)
warnings.filterwarnings("ignore", LACKS)  # a fold may lack a class, an answer may be constant


def default(*values):
    return field(default_factory=lambda: list(values))


@dataclass
class Config:
    # ---- what is read
    lm: list[str] = default("out/train")  # runs of ours, Hugging Face models by name or folder
    # NAME/TASK under data/, NAME for all of its tasks or its brains, or a data-json file
    dataset: list[str] = default(*[f"grammar/{task}" for task in GRAMMAR])
    layers: list[int] = default()  # 0 the embeddings, -1 the last; none: all
    quantiles: list[str] = default("0.5", "1.0", "mean")  # 0 the first token; names in REDUCE
    poolers: list[dict] = default()  # more poolings: {layer: [2, 3], layer_method: extend}
    max_texts: int = 0  # of a dataset, the first ones; 0: all
    force_classification: bool = False  # round the labels of a regression to 0 and 1
    bos: bool = False  # begin each text with the first token: context, never pooled
    # ---- probes
    probe: list[str] = default("LDA", "Logistic")  # see CLOSED and PROBES
    split: Literal["given", "cv"] = "given"  # train and test as given, or all texts in folds
    n_folds: int = 5  # outer folds
    n_seeds: int = 1  # repetitions with other folds
    train_sizes: list[int] = default(100, 300, 1000)  # curve of the first probe
    baselines: list[str] = default(*BASELINES)  # control: first probe; majority: always
    shuffle_labels: bool = False  # the null: nothing may be found
    # ---- run
    batch_tokens: int = 4096  # tokens of a forward pass, pads included
    cache: str = "out/cache"  # pooled states, shared by all runs
    cache_dtype: Literal["float16", "float32"] = "float32"  # float16 halves the disk
    keep_predictions: bool = True  # out-of-fold scores and projections for the app
    out_dir: str = "out/probe"  # results.csv, logs/, figures, what the app reads
    seed: int = 1337  # folds, probes, random twin
    device: str = "auto"  # of the language model: cuda, mps, cpu; probes run on the CPU
    dtype: str = "float32"  # of the pass; auto: bfloat16 where the hardware has it

    POSITIVE = "batch_tokens n_seeds"

    def check(self):
        check_keys(self.probe, {**CLOSED, **PROBES}, "probe")
        check_keys(self.baselines, BASELINES, "baselines")
        if self.n_folds < 3:
            raise InputError(f"n_folds={self.n_folds}: to test, to choose and to learn takes three")
        if not self.quantiles and not self.poolers:
            raise InputError("quantiles and poolers are empty: give one of them")
        for quantile in self.quantiles:
            PoolToken(0, quantile)
        for pooler in self.poolers:
            check_keys(pooler, PoolToken.__annotations__, "poolers")
            PoolToken(**pooler)


# ---- data


class NLPDataset(LabelledTexts):
    """Labelled texts (data/labelled_texts.py) that a model can be run on."""

    def load_embeds_into_memory(self, model, pooler, states=None):
        """Embed and pool the whole dataset: X (N', H) float32, y (N',).

        self.index (N',) is the text of each row: with 'concat' a text has several, which no split
        may part (self.row_groups). states: what pooled_states has of the texts; else model runs.
        """
        if states and pooler.cacheable:
            X, self.index = pooler.from_states(states)
        else:
            parts = []
            index = []
            for start in range(0, len(self), 64):
                x, text = pooler.pool(model(self.texts[start : start + 64]))
                parts.append(x.cpu().numpy())
                index.append(text.cpu().numpy() + start)
            X = np.concatenate(parts)
            self.index = np.concatenate(index)
        self.row_groups = self.groups[self.index]
        return X, self.y[self.index]


def load_datasets(run, config, specs):
    """The datasets that the entries of dataset= name, as the options want them."""
    datasets = []
    for spec in specs:
        if isinstance(spec, NLPDataset):
            datasets.append(spec)
        elif isinstance(spec, dict):
            datasets.append(NLPDataset(spec, config.force_classification))
        elif str(spec).endswith(".json"):
            path = Path(spec) if Path(spec).exists() else HERE / "data" / spec
            datasets.append(NLPDataset(path, config.force_classification))
        else:
            datasets += prepared_datasets(run, spec)
    datasets = [dataset.first(config.max_texts) for dataset in datasets]
    for dataset in datasets:
        if config.split == "cv":
            dataset.split = None
        if config.shuffle_labels:
            rng = np.random.default_rng(key_seed(config.seed, "shuffle"))
            dataset.y = shuffled(dataset, rng)
        dataset.task = make_task(dataset, config)
    return datasets


def prepared_datasets(run, spec):
    """The task, all tasks or the brains of a folder that a prepare.py has made."""
    name = spec
    task = ""
    if not Path(spec).is_dir() and not (HERE / "data" / spec / "prepare.py").exists():
        name, _, task = spec.rpartition("/")
    folder = run.dataset(name or spec)
    meta = (folder / "meta.yaml").read_text(encoding="utf-8", errors="replace")
    if ENCODING_FORMAT in meta:
        return [NLPDataset.from_encoding(folder)]
    tasks = [task] if name and task else read_meta(folder)["tasks"]
    return [NLPDataset.from_task(folder, task) for task in tasks]


def shuffled(dataset, rng):
    """Labels with nothing to know: dealt among groups of equal size, within parts of a split."""
    y = dataset.y.copy()
    rows = pd.DataFrame({"row": range(len(y)), "group": dataset.groups, "part": 0})
    if dataset.split is not None:
        rows["part"] = dataset.split == "test"
    rows["size"] = rows.groupby(["part", "group"]).row.transform("size")
    for (_, size), alike in rows.groupby(["part", "size"]):
        targets = alike.sort_values("group").row.to_numpy().reshape(-1, size)  # (groups, size)
        sources = rng.permuted(targets[rng.permutation(len(targets))], axis=1)
        y[targets] = dataset.y[sources]
    return y


def control_labels(dataset, seed):
    """Hewitt & Liang's control task: each text's longest word has a label drawn for the word.

    It is the label of a random text, so labels are as frequent as the real ones, and nothing helps
    but to know the word by heart.
    """
    y = dataset.y.copy()
    for i, text in enumerate(dataset.texts):
        word = max(text.split(), key=len).lower()
        y[i] = dataset.y[key_seed(seed, "control", word) % len(dataset)]
    return y


# ---- model


class LMModel(HiddenStates):
    """A language model that is only listened to: convert.HiddenStates, called with texts."""

    def __call__(self, texts):
        """{'hidden_states': (n_layer + 1) x (B, T, H), 'attention_mask' and 'input_ids' (B, T)}."""
        ids, real = self.pad(self.encode(texts)[0])
        states = tuple(self.states(ids, real).values())
        mask = self.pooled(real).long()
        return {"hidden_states": states, "attention_mask": mask, "input_ids": ids}

    def pooled(self, real):
        """Which tokens (B, T) count: the real ones less the first one that `bos` wrote."""
        mask = real.clone()
        if self.bos:
            mask[torch.arange(len(real)), real.int().argmax(1)] = False
        return mask

    def fingerprint(self):
        """Hash of architecture, weights and precision."""
        config = getattr(self.model, "config", "")
        digest = hashlib.sha256(f"{type(self.model)} {config} {self.dtype} {self.bos}".encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


# ---- pooling

# What makes one vector of several: x (..., T, H) and real (..., T, 1), bool, -> (..., H). One line
# more is one name more for quantiles=, quantile_method= and layer_method=.
REDUCE = {
    "mean": lambda x, real: (x * real).sum(-2) / real.sum(-2),
    "max": lambda x, real: x.masked_fill(~real, -math.inf).amax(-2),
    "min": lambda x, real: x.masked_fill(~real, math.inf).amin(-2),
}


def token_at(lengths, quantile):
    """Which token of texts of these lengths a quantile is (halves go to the even one)."""
    return (quantile * (lengths.double() - 1)).round().long()


def pool_tokens(x, real, pooling):
    """x (B, T, H) pooled over its real (B, T) tokens, pads on either side: (B, H)."""
    if pooling in REDUCE:
        return REDUCE[pooling](x, real[:, :, None])
    first = real.int().argmax(1)
    return x[torch.arange(len(x)), first + token_at(real.sum(1), float(pooling))]


@dataclass
class PoolToken:
    """From a model's output dictionary to one vector a text, or to several.

    layer: index into hidden_states (0 the embeddings, n or -1 the last), a list, or 'all': 1 to
    n - 1. quantile: 0 the first token, 1.0 or -1 the last one; a list; 'all': each token once; a
    name in REDUCE: of all tokens. Where several are selected, their method says what becomes of
    them: a name in REDUCE; 'extend': side by side, H grows; 'concat': rows of their own, at most
    one of the two. Tokens come first, then layers. Quantiles that meet in one token count once.
    """

    layer: int | list | str = -1
    quantile: float | list | str = -1
    layer_method: str | None = None
    quantile_method: str | None = None

    def __post_init__(self):
        if self.quantile in list(REDUCE):
            self.quantile_method = self.quantile
            self.quantile = "all"
        methods = [*REDUCE, "extend", "concat"]
        for what in ("layer", "quantile"):
            value = getattr(self, what)
            method = getattr(self, f"{what}_method")
            several = value == "all" or np.size(value) > 1
            if method not in methods and (several or method):
                wanted = f"must be one of {', '.join(methods)}, not {method}"
                raise InputError(f"poolers: {what}_method of {what}={value} {wanted}")
        if self.layer_method == self.quantile_method == "concat":
            raise InputError("layer_method and quantile_method are both concat: only one can be")
        self.quantiles = []
        if self.quantile != "all":
            numbers = pd.to_numeric(pd.Series(self.quantile), errors="coerce").replace(-1, 1.0)
            self.quantiles = numbers.astype(float).tolist()
            if not numbers.between(0, 1).all():
                names = f"a number from 0 to 1, -1 (the last), 'all', {', '.join(REDUCE)}"
                raise InputError(f"quantile {self.quantile!r} is none of {names}")
            if len(self.quantiles) == 1:
                self.quantile = self.quantiles[0]
        self.poolings = [str(q) for q in self.quantiles] or [self.quantile_method]  # in the cache
        self.cacheable = self.poolings[0] not in ("extend", "concat")

    def layers(self, n_layer):
        """Indices of the hidden states of a model of n_layer blocks."""
        numbers = range(n_layer + 1)
        if self.layer == "all" and n_layer > 1:
            return list(numbers[1:-1])
        try:
            return [numbers[i] for i in np.atleast_1d(self.layer)]
        except (IndexError, TypeError):
            names = f"0 (embeddings) to {n_layer}, -1 (the last), 'all' (neither first nor last)"
            raise InputError(f"there is no layer {self.layer}, only {names}") from None

    def label(self, n_layer):
        """Its columns in the results; poolers of equal labels are one."""
        layers = self.layers(n_layer)
        layer = "+".join(map(str, layers))
        if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
            layer = f"{layers[0]}-{layers[-1]}"
        return {
            "layer": layer,
            "quantile": "+".join(map(str, self.quantiles)) or "all",
            "layer_method": self.layer_method if len(layers) > 1 else "",
            "quantile_method": self.quantile_method if len(self.quantiles) != 1 else "",
        }

    def __call__(self, outputs):
        return self.pool(outputs)[0]

    def pool(self, outputs):
        """Rows (R, H') and the text of each (R,), from {'hidden_states', 'attention_mask'}."""
        real = torch.as_tensor(outputs["attention_mask"]).bool()
        states = outputs["hidden_states"]
        layers = []
        for layer in self.layers(len(states) - 1):
            x = states[layer].float()
            if self.cacheable:
                x = torch.stack([pool_tokens(x, real, pooling) for pooling in self.poolings], 1)
            layers.append(x)
        keep = self._unequal(real.sum(1)) if self.cacheable else real
        return self._combine(torch.stack(layers, 1), keep)

    def from_states(self, states):
        """The same from cached States: X (R, H') and index (R,), as arrays."""
        layers = [states.layers.index(layer) for layer in self.layers(states.n_layer)]
        parts = [states.arrays[pooling][:, layers] for pooling in self.poolings]
        x = torch.from_numpy(np.stack(parts, 2)).float()
        x, index = self._combine(x, self._unequal(torch.from_numpy(states.lengths)))
        return x.numpy(), index.numpy()

    def _unequal(self, lengths):
        """(B, Q): False where an earlier quantile of the text is the same token."""
        at = torch.stack([token_at(lengths, q) for q in self.quantiles or [1.0]], 1)
        return ~(at[:, :, None] == at[:, None, :]).tril(-1).any(2)

    def _combine(self, x, keep):
        """x (B, L, Q, H) of which keep (B, Q) counts -> rows and their texts."""
        if self.quantile == "all" and self.quantile_method == "extend" and not keep.all():
            raise InputError("quantile='all' with extend wants texts of one length")
        x, texts = combine(x, keep, self.quantile_method)  # (R, L, H')
        every = torch.ones_like(x[:, :, 0], dtype=torch.bool)
        x, rows = combine(x[:, None], every, self.layer_method)
        return x[:, 0], texts[rows]


def combine(x, keep, method):
    """x (B, L, S, H) over S, of which keep (B, S) counts: (R, L, H'), and which of B each is."""
    index = torch.arange(len(x), device=x.device)
    if x.size(2) == 1:
        return x[:, :, 0], index
    if method in REDUCE:
        return REDUCE[method](x, keep[:, None, :, None]), index
    if method == "extend":
        return x.flatten(2), index
    return x.transpose(1, 2)[keep], index[:, None].expand_as(keep)[keep]


# ---- the one pass


@dataclass
class States:
    """Pooled states of a list of texts: arrays {pooling: (N, layers, H) memmap}."""

    arrays: dict
    lengths: np.ndarray
    layers: list
    n_layer: int


def pooled_states(model, texts, layers, poolings, cache, batch_tokens=4096, dtype="float32"):
    """States of all texts, out of the cache, which one pass over the texts it lacks fills.

    One layer of one batch is held at a time. The format is in the head of this file.
    """
    rows, truncated = model.encode(texts)
    layers = list(layers)
    poolings = sorted(poolings)
    key = json.dumps([model.fingerprint(), layers, poolings, dtype, rows])
    folder = Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(row) - model.bos for row in rows])
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job that wants the same waits, then reads
        if not (folder / "done").exists():
            shape = (len(rows), len(layers), model.width)
            for name in poolings:
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
            np.save(folder / "lengths.npy", lengths)
            meta = {"model": model.name, "texts": len(rows), "layers": layers}
            meta |= {"width": model.width, "dtype": dtype, "truncated": truncated}
            write_aside(folder / "meta.json", json.dumps(meta))
            write_aside(folder / "done", "0")
        if int((folder / "done").read_text()) < len(rows):
            if truncated:
                limit = f"longer than its {model.max_length} tokens and were cut"
                print(f"{model.name}: {truncated} of {len(rows)} texts are {limit}")
            fill(model, rows, lengths, layers, poolings, folder, batch_tokens)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in poolings}
    return States(arrays, lengths, layers, model.n_layer)


def fill(model, rows, lengths, layers, poolings, folder, batch_tokens):
    """Run the unfinished texts, the shortest first, and write each batch as soon as it is pooled.

    The arrays are opened anew for each batch: what is written does not stay in memory.
    """
    finished = int((folder / "done").read_text())
    order = np.argsort(lengths, kind="stable")[finished:]
    with tqdm(total=len(rows), initial=finished, desc=model.name, mininterval=5) as bar:
        for batch in length_batches(order, lengths, batch_tokens):
            pooled = pool_batch(model, [rows[i] for i in batch], layers, poolings)
            for name, part in zip(poolings, pooled):
                array = np.load(folder / f"{name}.npy", mmap_mode="r+")
                array[batch] = part
                if not np.isfinite(array[batch]).all():
                    cure = f"not finite as {array.dtype}: give cache_dtype=float32, dtype=float32"
                    raise InputError(f"{model.name}: hidden states are {cure}")
            bar.update(len(batch))
            write_aside(folder / "done", str(bar.n))


def pool_batch(model, rows, layers, poolings):
    """(poolings, B, layers, H) of a batch of token lists."""
    ids, real = model.pad(rows)
    mask = model.pooled(real)
    pooled = torch.empty(len(poolings), len(rows), len(layers), model.width)

    def take(layer, state):
        for number, pooling in enumerate(poolings):
            pooled[number, :, layers.index(layer)] = pool_tokens(state.float(), mask, pooling)

    model.run(ids, real, layers, take)
    return pooled.numpy()


def length_batches(order, lengths, batch_tokens):
    """`order` (short texts first) in batches of at most batch_tokens tokens, pads included."""
    start = 0
    for stop in range(1, len(order) + 1):
        is_last = stop == len(order)
        if is_last or lengths[order[stop]] * (stop + 1 - start) > batch_tokens:
            yield order[start:stop]
            start = stop


# ---- LDA and ridge in closed form, at all sites at once; X is (G, N, H): G sites, N texts


class Moments:
    """Covariances of standardised X (G, N, H) with itself and with Y (N, C)."""

    def __init__(self, X, Y):
        self.n = len(Y)
        self.mean = X.mean(1, keepdim=True)
        scale = X.std(1, correction=0, keepdim=True)
        self.scale = torch.where(scale > 1e-6, scale, 1.0)  # of a feature that never varies: 1
        self.target_mean = Y.mean(0).double()
        Z = (X - self.mean) / self.scale
        self.XX = (Z.mT @ Z).double() / self.n
        self.XY = (Z.mT @ (Y - Y.mean(0))).double() / self.n
        self.eye = torch.eye(X.size(2))

    def weights(self, coefficients, intercept):
        """(G, 1 + H, C) for features as they are, the intercept first."""
        W = coefficients / self.scale.mT
        return torch.cat([intercept - self.mean.double() @ W, W], 1).float()


def ridge(m, alphas=(1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)):
    """sklearn's Ridge(alpha) behind StandardScaler: weights (G, 1 + H, alphas, C)."""
    weights = []
    for alpha in alphas:
        coefficients = torch.linalg.solve(m.XX + (alpha / m.n + 1e-6) * m.eye, m.XY)
        weights.append(m.weights(coefficients, m.target_mean))
    return torch.stack(weights, 2)


def lda(m, shrinkages=(0.003, 0.03, 0.1, 0.3, 0.7)):
    """sklearn's LinearDiscriminantAnalysis("lsqr", shrinkage) behind StandardScaler, as `ridge`.

    Targets are one-hot; outputs are log-posteriors up to a constant.
    """
    prior = m.target_mean.clamp_min(1e-12)
    means = m.XY / prior  # of the classes, (G, H, K)
    within = m.XX - (means * prior) @ means.mT
    variance = within.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    weights = []
    for s in shrinkages:
        coefficients = torch.linalg.solve((1 - s) * within + (s * variance + 1e-6) * m.eye, means)
        intercept = prior.log() - (means * coefficients).sum(1, keepdim=True) / 2
        weights.append(m.weights(coefficients, intercept))
    return torch.stack(weights, 2)


def apply(weights, X):
    """Outputs (G, n, penalties, C) of weights (G, 1 + H, penalties, C) for X (G, n, H)."""
    flat = weights.flatten(2)
    return (X @ flat[:, 1:] + flat[:, :1]).unflatten(2, weights.shape[2:])


CLOSED = {"LDA": lda, "Ridge": ridge}


# ---- probes of scikit-learn and of torch


class SingleStepOpt:
    """A probe in the manner of scikit-learn.

    A subclass sets self.name, self.discrete_targets (targets are classes) and self.classifier, and
    may set self.grid, parameters of the classifier to choose from. fit(X, y), then probe(X) gives
    scores: (n,), or (n, K) of several classes. Thresholds are found on a validation fold.
    """

    name = ""
    discrete_targets = True
    grid = {}

    def fit(self, X, y):
        self.classifier.fit(X, np.round(y).astype(int) if self.discrete_targets else y)
        return self

    def forward(self, X):
        methods = ["predict"]
        if self.discrete_targets:
            methods = ["predict_proba", "decision_function", "transform", "predict"]
        method = next(name for name in methods if hasattr(self.classifier, name))
        scores = np.asarray(getattr(self.classifier, method)(X), float)
        return scores[:, -1] if scores.ndim == 2 and scores.shape[1] <= 2 else scores

    __call__ = forward


def sklearn_probe(classifier, **grid):
    """The constructor, input_size -> probe, for a classifier of scikit-learn."""

    def make(input_size):
        probe = SingleStepOpt()
        probe.name = type(classifier).__name__
        probe.grid = grid
        probe.classifier = make_pipeline(StandardScaler(), clone(classifier))
        return probe

    return make


class MultiStepOpt(nn.Module):
    """A probe in the manner of torch.

    A subclass sets self.name, and self.layers or forward(X) -> (n, 1) logits (binary) or values
    (regression), or (n, K) logits. Adam trains it on standardised features; the epoch that is best
    on a validation fold is kept. The probes of all sites are stacked and trained together.
    """

    name = ""
    batch_size = 128
    max_epoch = 30
    min_steps = 300  # a few hundred texts need more epochs
    learning_rate = 3e-3
    attention = False  # X is (n, T, H), the states of all tokens; pads are NaN

    def forward(self, X):
        return self.layers(X)


class SingleLayer(MultiStepOpt):
    """A linear layer."""

    def __init__(self, input_size, output_size=1):
        super().__init__()
        self.layers = nn.Linear(input_size, output_size)


class DoubleLayer(MultiStepOpt):
    """One hidden layer of ReLUs."""

    def __init__(self, input_size, output_size=1, hidden=100):
        super().__init__()
        first = nn.Linear(input_size, hidden)
        self.layers = nn.Sequential(first, nn.ReLU(), nn.Linear(hidden, output_size))


class GatedLayer(MultiStepOpt):
    """One hidden layer of gated linear units."""

    def __init__(self, input_size, output_size=1, hidden=100):
        super().__init__()
        first = nn.Linear(input_size, 2 * hidden)
        self.layers = nn.Sequential(first, nn.GLU(), nn.Linear(hidden, output_size))


class AttentionPool(MultiStepOpt):
    """softmax(q · h_t) pooling over a text's tokens, then a linear layer.

    The states of all tokens of one layer are in memory while it learns.
    """

    max_epoch = 10
    attention = True

    def __init__(self, input_size, output_size=1):
        super().__init__()
        self.query = nn.Linear(input_size, 1)
        self.linear = nn.Linear(input_size, output_size)

    def forward(self, X):
        pads = X[:, :, 0].isnan()
        X = F.layer_norm(X.nan_to_num(), X.shape[-1:])
        weight = self.query(X)[:, :, 0].masked_fill(pads, -1e9).softmax(1)
        return self.linear((weight[:, :, None] * X).sum(1))


PENALTIES = [1e-3, 1e-2, 1e-1]  # C of logistic regression
# its vectors are short: threads that wait for one another make a fit take several times as long
one_thread = threadpool_limits.wrap(limits=1, user_api="blas")
LOGISTIC = LogisticRegression(max_iter=1000)
PROBES = {
    "Logistic": sklearn_probe(LOGISTIC, logisticregression__C=PENALTIES),
    "SingleLayer": SingleLayer,
    "DoubleLayer": DoubleLayer,
    "GatedLayer": GatedLayer,
    "AttentionPool": AttentionPool,
    "QDA": sklearn_probe(QuadraticDiscriminantAnalysis(solver="eigen", shrinkage=0.1)),
    "NaiveBayes": sklearn_probe(GaussianNB()),
    "NearestCentroid": sklearn_probe(NearestCentroid()),
    "RandomForest": sklearn_probe(RandomForestClassifier(200, random_state=0)),
}


def build(probe, width, task):
    """A probe of this input size, with an output for each class where it can have them."""
    make = PROBES.get(probe, probe)
    if task.kind != "multi" or not isinstance(make, type) or not issubclass(make, MultiStepOpt):
        return make(width)
    if "output_size" not in inspect.signature(make).parameters:
        raise InputError(f"the probe {make.__name__} has no output_size: it takes two classes only")
    return make(width, output_size=task.targets().size(1))


def name_of(probe):
    return probe if isinstance(probe, str) else probe(4).name or probe.__name__


def predicts_values(probe):
    """Whether a probe is a regression."""
    if probe in CLOSED:
        return probe == "Ridge"
    return not getattr(PROBES.get(probe, probe)(4), "discrete_targets", False)


def reads_tokens(probe):
    """Whether a probe needs the states of all tokens, not pooled ones."""
    return getattr(PROBES.get(probe, probe), "attention", False)


# ---- fitting, fold by fold


@dataclass
class Task:
    """What a probe is asked. A row is a text, or one of several of a text where it has them."""

    kind: str
    y: np.ndarray  # (N,) classes or values, or (N, V) values
    learn: np.ndarray  # (N,) bool: rows that may be learnt from
    judge: np.ndarray  # (N,) bool: rows that are scored
    folds: list  # of each repetition: the fold (N,) of each row
    seed: int

    def take(self, index):
        """The task of rows that belong to the texts `index`."""
        rows = {key: getattr(self, key)[index] for key in ("y", "learn", "judge")}
        return replace(self, folds=[fold[index] for fold in self.folds], **rows)

    def targets(self):
        """(N, C), float: one-hot classes, or values."""
        y = torch.as_tensor(self.y)
        if self.kind == "regression":
            return y.float().view(len(y), -1)
        return F.one_hot(y.long()).float()


def make_task(dataset, config):
    """Learn from all but the test part of a given split, judge the test part; or all in folds.

    Groups stay whole, and labels (tenths of a regression's) are spread evenly over the folds.
    """
    test = np.zeros(len(dataset), bool)
    if dataset.split is not None:
        test = dataset.split == "test"
    judge = test if test.any() else ~test
    strata = test.astype(int)
    fewest = len(set(dataset.groups[judge]))
    if dataset.kind != "regression":
        strata += 2 * dataset.y
        fewest = min(fewest, np.bincount(dataset.y).min())
    elif dataset.y.ndim == 1:
        parts = np.clip(len(dataset) // (2 * config.n_folds), 1, 10)
        strata += 2 * pd.qcut(dataset.y, parts, labels=False, duplicates="drop")
    if fewest < config.n_folds:
        few = f"a label, or the test, has only {fewest} texts or groups of equal ones"
        raise InputError(f"{dataset.name}: {few}: give fewer n_folds=, or split=cv")
    task = Task(dataset.kind, dataset.y, ~test, judge, [], config.seed)
    for repetition in range(config.n_seeds):
        seed = key_seed(config.seed, repetition) % 2**31
        splitter = StratifiedGroupKFold(config.n_folds, shuffle=True, random_state=seed)
        folds = np.zeros(len(dataset), int)
        for fold, (_, rows) in enumerate(splitter.split(folds, strata, dataset.groups)):
            folds[rows] = fold
        task.folds.append(folds)
    return task


def fit_closed(probe, X, task, fit, choose, test):
    """Scores (G, n, C) of LDA or ridge, fitted again with the rows that chose the penalty.

    As of the two other ways to fit, they are of the rows to choose on, then of the test.
    """
    kind = "multi" if probe == "LDA" else "regression"
    Y = task.targets()
    X = X - X[:, fit].mean(1, keepdim=True)  # any shift: float32 has few digits for large means
    weights = CLOSED[probe](Moments(X[:, fit], Y[fit]))
    outputs = apply(weights, X[:, choose])  # (G, n, penalties, C)
    best = losses_of(outputs, Y[choose][:, None], kind).mean(1).argmin(1)
    sites = torch.arange(len(X))
    train = np.concatenate([fit, choose])
    weights = CLOSED[probe](Moments(X[:, train], Y[train]))[sites, :, best]
    tested = apply(weights[:, :, None], X[:, test])[:, :, 0]
    scores = as_scores(torch.cat([outputs[sites, :, best], tested], 1), kind)
    return scores[:, :, 1:] if task.kind == "binary" else scores


@one_thread
def fit_sklearn(probe, X, task, fit, choose, test):
    """Scores of a scikit-learn probe at each site.

    The rows to choose on pick the best of its grid, by squared error, and are learnt from, too.
    """
    width = X.size(2)
    targets = task.targets()[choose].numpy()
    grid = list(ParameterGrid(build(probe, width, task).grid))

    def fit_and_score(x, learnt, scored, parameters):
        model = build(probe, width, task)
        model.classifier.set_params(**parameters)
        return model.fit(x[learnt], task.y[learnt])(x[scored]).reshape(len(scored), -1)

    sites = []
    for x in X.numpy():
        scores = np.stack([fit_and_score(x, fit, choose, parameters) for parameters in grid])
        losses = np.square(scores - targets[:, -scores.shape[2] :]).mean((1, 2))
        best = losses.argmin()
        tested = fit_and_score(x, np.concatenate([fit, choose]), test, grid[best])
        sites.append(np.concatenate([scores[best], tested]))
    return np.stack(sites)


def fit_torch(model, X, task, fit, choose, test):
    """Scores of copies of a torch probe, one for each site, trained in one optimiser."""
    Y = task.targets()
    if task.kind == "binary":
        Y = Y[:, 1:]
    if not model.attention:
        X = X - X[:, fit].mean(1, keepdim=True)
        scale = X[:, fit].square().mean(1, keepdim=True).sqrt()
        X = X / torch.where(scale > 1e-6, scale, 1.0)
    params, buffers = torch.func.stack_module_state([model] * len(X))
    stacked = torch.vmap(partial(torch.func.functional_call, model), randomness="different")
    optimizer = torch.optim.Adam(params.values(), lr=model.learning_rate)
    best = {name: value.detach().clone() for name, value in params.items()}
    least = torch.full((len(X),), math.inf)
    n_batches = -(-len(fit) // model.batch_size)
    for epoch in range(max(model.max_epoch, model.min_steps // n_batches)):
        model.train()
        rng = np.random.default_rng(key_seed(task.seed, epoch))
        for rows in torch.from_numpy(rng.permutation(fit)).split(model.batch_size):
            optimizer.zero_grad()
            outputs = stacked((params, buffers), X[:, rows])
            losses_of(outputs, Y[rows], task.kind).mean(1).sum().backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            outputs = stacked((params, buffers), X[:, choose])
        losses = losses_of(outputs, Y[choose], task.kind).mean(1)
        better = losses < least
        least = torch.where(better, losses, least)
        for name, value in params.items():
            best[name][better] = value.detach()[better]
    with torch.no_grad():
        return as_scores(stacked((best, buffers), X[:, np.concatenate([choose, test])]), task.kind)


def losses_of(outputs, Y, kind):
    """Losses (..., n) of outputs (..., n, C) for targets (n, C)."""
    if kind == "multi":
        return -(outputs.log_softmax(-1) * Y).sum(-1)
    if kind == "binary":
        Y = Y.expand_as(outputs)
        return F.binary_cross_entropy_with_logits(outputs, Y, reduction="none").sum(-1)
    return (outputs - Y).square().sum(-1)


def as_scores(outputs, kind):
    """Probabilities, or values, in double precision: sure ones stay apart."""
    outputs = outputs.double()
    if kind == "multi":
        outputs = outputs.softmax(-1)
    elif kind == "binary":
        outputs = outputs.sigmoid()
    return outputs.numpy()


# ---- evaluate

BOUNDS = {"mse": (0, np.inf), "r2": (-np.inf, 1), "pearson": (-1, 1), "mcc": (-1, 1)}  # else 0, 1
PRIMARY = {"binary": "accuracy", "multi": "accuracy", "regression": "pearson"}


def best_thresholds(y, score):
    """The thresholds that are best for accuracy and for F1: score >= threshold says 1."""
    fpr, tpr, cuts = metrics.roc_curve(y, score, drop_intermediate=False)
    n_positive = np.sum(y == 1)
    tp = np.nan_to_num(tpr) * n_positive
    fp = np.nan_to_num(fpr) * (len(y) - n_positive)
    cuts[0] = np.nextafter(cuts[1], np.inf)  # nothing is said to be 1
    cuts[1:-1] = (cuts[1:-1] + cuts[2:]) / 2
    f1 = 2 * tp / np.maximum(tp + fp + n_positive, 1)
    return {"accuracy": cuts[np.argmax(tp - fp)], "f1": cuts[np.argmax(f1)]}


def primary_measure(y, score, kind, thresholds=None):
    """Accuracy of classes; Pearson's r of values, the mean over columns."""
    if kind == "multi":
        return np.mean(score.argmax(1) == y)
    if kind == "binary":
        return np.mean((score >= thresholds["accuracy"]) == y)
    r = scipy.stats.pearsonr(score, y, axis=0).statistic
    return np.mean(np.nan_to_num(r))  # 0 of a constant


def evaluator(y, score, kind="binary", thresholds=None):
    """Measures of scores: MSE, R² and Pearson's r of a regression; MSE, accuracy and F1 (each at
    its threshold) and more of two classes; of several classes, score (n, K), no MSE."""
    thresholds = thresholds or {"accuracy": 0.5, "f1": 0.5}
    primary = primary_measure(y, score, kind, thresholds)
    if kind == "regression":
        mse = metrics.mean_squared_error(y, score)
        return {"mse": mse, "r2": metrics.r2_score(y, score), "pearson": primary}
    if kind == "multi":
        predicted = score.argmax(1)
        return {
            "accuracy": primary,
            "balanced_accuracy": metrics.balanced_accuracy_score(y, predicted),
            "f1": metrics.f1_score(y, predicted, labels=np.unique(y), average="macro"),
        }
    predicted = score >= thresholds["accuracy"]
    return {
        "mse": metrics.mean_squared_error(y, score),
        "accuracy": primary,
        "balanced_accuracy": metrics.balanced_accuracy_score(y, predicted),
        "mcc": metrics.matthews_corrcoef(y, predicted),
        "f1": metrics.f1_score(y, score >= thresholds["f1"]),
        "auc": metrics.roc_auc_score(y, score) if 0 < np.mean(y) < 1 else 0.5,
    }


def chance_measures(task, test):
    """What the best constant answer, learnt from all rows to learn from, scores on the test."""
    y = task.y[task.learn]
    constant = task.targets()[task.learn].mean(0).numpy() if task.kind == "multi" else y.mean(0)
    thresholds = None
    if task.kind == "binary":
        thresholds = best_thresholds(y, np.full(len(y), constant))
    score = np.broadcast_to(constant, (len(test), *np.shape(constant)))
    return evaluator(task.y[test], score, task.kind, thresholds)


def holm(p):
    """Holm's correction of p-values (m,): the family-wise error over all of them."""
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(np.take(p, order) * np.arange(len(p), 0, -1))
    return corrected.clip(max=1)[np.argsort(order)]


@one_thread
def online_code(X, y, groups, n_classes, seed):
    """Bits (N,) of each label of X (N, H) in Voita & Titov's online code.

    Labels are sent block by block, each coded by a logistic probe that has learnt those before,
    with the penalty that has coded best so far. One guess in n + 1 is left to chance, so a label
    never seen costs finite bits.
    """
    names, member = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(key_seed(seed, "online"))
    order = np.argsort(rng.permutation(len(names))[member], kind="stable")
    shares = np.array([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50, 100]) / 100
    ends = np.unique(np.maximum(2 * n_classes, np.round(shares * len(y)).astype(int)))
    bits = np.full((len(PENALTIES), len(y)), math.log2(n_classes))
    code_length = np.full(len(y), math.log2(n_classes))
    for start, end in pairwise(ends):
        learn = order[:start]
        block = order[start:end]
        best = bits[:, learn].sum(1).argmin()
        classes = np.unique(y[learn])
        for number, C in enumerate(PENALTIES):
            p = np.full((len(block), n_classes), 1 / n_classes)
            if len(classes) > 1:
                model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
                p[:, classes] += start * model.fit(X[learn], y[learn]).predict_proba(X[block])
            p = p / p.sum(1, keepdims=True)
            bits[number, block] = -np.log2(p[np.arange(len(block)), y[block]])
        code_length[block] = bits[best, block]
    return code_length


# ---- the sweep

NO_SITE = dict.fromkeys(("layer", "quantile", "layer_method", "quantile_method"), "")


class Sites:
    """Where one model is read on one dataset: a site for each pooler.

    Without poolers it is every token of each layer, for probes that pool tokens themselves.
    """

    def __init__(self, model, dataset, poolers, config):
        self.model = model
        self.dataset = dataset
        self.poolers = poolers
        self.states = None
        self.all_tokens = poolers is None
        if self.all_tokens:
            layers = model.layers(config.layers)
            self.poolers = [PoolToken(layer, "all", None, "concat") for layer in layers]
        self.labels = []
        for pooler in self.poolers:
            self.labels.append(pooler.label(model.n_layer))
            if self.all_tokens:
                self.labels[-1] |= {"quantile": "attention", "quantile_method": ""}
        layers = set()
        poolings = set()
        for pooler in self.poolers:
            if pooler.cacheable:
                layers.update(pooler.layers(model.n_layer))
                poolings.update(pooler.poolings)
        if layers:
            args = (config.cache, config.batch_tokens, config.cache_dtype)
            self.states = pooled_states(model, dataset.texts, sorted(layers), poolings, *args)

    def vectors(self, pooler):
        """X (N', H), of all tokens (N, T, H) with NaN for pads, and the text (N',) of each row."""
        X, _ = self.dataset.load_embeds_into_memory(self.model, pooler, self.states)
        index = self.dataset.index
        if not self.all_tokens:
            return X, index
        place = pd.Series(index).groupby(index).cumcount().to_numpy()
        tokens = np.full((index[-1] + 1, place.max() + 1, X.shape[1]), np.nan, np.float32)
        tokens[index, place] = X
        return tokens, np.arange(len(tokens))

    def batches(self):
        """X (G, N, H) and index (N,) of neighbouring sites of equal shape, up to 256 MB of them."""
        group = []
        index = None
        for pooler in self.poolers:
            X, texts = self.vectors(pooler)
            alike = np.array_equal(texts, index) and X.shape == group[0].shape
            if group and (not alike or (len(group) + 1) * X.nbytes > 2**28):
                yield torch.from_numpy(np.stack(group)), index
                group = []
            group.append(X)
            index = texts
        yield torch.from_numpy(np.stack(group)), index


def measure(sites, probe, task):
    """Measures and chance levels of each site and fold; scores of each text in the test.

    Two DataFrames. Scores (of several classes the likeliest one) are those of the first repetition;
    None of several columns.
    """
    rows = []
    scores = []
    first = 0
    for X, index in sites.batches():
        part = task.take(index)
        n = len(np.unique(index[part.judge]))
        texts_per_row = len(np.unique(index)) / len(index)
        for repetition, folds in enumerate(part.folds):
            for fold in range(folds.max() + 1):
                measured, test, tested = measure_fold(probe, X, part, folds, fold)
                for g, row in enumerate(measured):
                    row |= {"repetition": repetition, "site": first + g, "n": n}
                    row["n_train"] *= texts_per_row
                    score = tested[g].argmax(1) if task.kind == "multi" else tested[g]
                    if repetition == 0 and score.ndim == 1:
                        texts = {"index": index[test], "y": part.y[test], "score": score}
                        scores.append(pd.DataFrame({**texts, "site": first + g, "fold": fold}))
                rows += measured
        first += len(X)
    return pd.DataFrame(rows), pd.concat(scores) if scores else None


def measure_fold(probe, X, task, folds, outer):
    """Measures of each of G sites in one outer fold, the rows of its test, and their scores.

    The next fold is to choose on, the others are learnt from. `validation` is the primary measure
    of the rows to choose on, which give the thresholds. Scores are (G, n), or (G, n, C).
    """
    n_folds = folds.max() + 1
    inner = (outer + 1) % n_folds
    fit = np.flatnonzero(task.learn & (folds != outer) & (folds != inner))
    choose = np.flatnonzero(task.learn & (folds == inner))
    test = np.flatnonzero(task.judge & (folds == outer))
    n_train = len(fit) + len(choose)
    torch.manual_seed(key_seed(task.seed, outer))
    model = None if probe in CLOSED else build(probe, X.size(-1), task)
    if model is None:
        scores = fit_closed(probe, X, task, fit, choose, test)
    elif isinstance(model, MultiStepOpt):
        scores = fit_torch(model, X, task, fit, choose, test)
        n_train = len(fit)
    else:
        scores = fit_sklearn(probe, X, task, fit, choose, test)
    if scores.shape[2] == 1:
        scores = scores[:, :, 0]
    chosen, tested = np.split(scores, [len(choose)], 1)
    about = {"fold": outer, "n_train": n_train, "ratio": task.learn.sum() / n_folds / n_train}
    for name, value in chance_measures(task, test).items():
        about[f"chance {name}"] = value
    rows = []
    for g in range(len(X)):
        thresholds = {"accuracy": np.nan}
        if task.kind == "binary":
            thresholds = best_thresholds(task.y[choose], chosen[g])
        row = {**about, **evaluator(task.y[test], tested[g], task.kind, thresholds)}
        row["validation"] = primary_measure(task.y[choose], chosen[g], task.kind, thresholds)
        row["threshold"] = thresholds["accuracy"]
        rows.append(row)
    return rows, test, tested


def statistics(folds, metric):
    """Columns of results.csv out of the folds of one site, which share training texts.

    The corrected resampled t: ratio is a fold's size over that of what is learnt from (Nadeau &
    Bengio 2003). Repetitions have no texts of their own and add no degree of freedom; folds that
    agree by luck are no surer than half a text. p is of a score above chance.
    """
    score = folds[metric].mean()
    chance = folds[f"chance {metric}"].mean()
    n = folds.n.iloc[0]
    variance = (1 / len(folds) + folds.ratio.mean()) * folds[metric].var()
    t = {"df": folds.fold.nunique() - 1, "loc": score, "scale": max(variance**0.5, 0.5 / n)}
    low, high = np.clip(scipy.stats.t.interval(0.95, **t), *BOUNDS.get(metric, (0, 1)))
    row = {"metric": metric, "score": score, "chance": chance, "low": low, "high": high, "n": n}
    return {**row, "n_train": round(folds.n_train.mean()), "p": scipy.stats.t.cdf(chance, **t)}


def chosen_by_validation(folds):
    """Of each fold, the site that its rows to choose on like best."""
    return folds.loc[folds.groupby(["repetition", "fold"]).validation.idxmax()]


def write_rows(run, folds, labels, keys):
    """A row of each measure for each site; of the primary one, also for the site that is chosen.

    p is corrected over all sites, and tests nothing for a baseline.
    """
    for metric in folds.filter(like="chance ").columns.str.removeprefix("chance "):
        rows = [statistics(part, metric) for _, part in folds.groupby("site")]
        for row, label, p in zip(rows, labels, holm([row["p"] for row in rows])):
            row |= {**label, "p_holm": p}
        if metric in PRIMARY.values() and len(labels) > 1:
            best = statistics(chosen_by_validation(folds), metric)
            rows.append({**best, **NO_SITE, "layer": "best", "quantile": "best"})
            rows[-1]["p_holm"] = best["p"]
        for row in rows:
            if keys["baseline"] or metric == "mse":
                row |= {"p": None, "p_holm": None}
            run.result(**row, **keys)


def sites_of(model, dataset, poolers, config):
    """{baseline: Sites} of the model ('') and of what is measured as it is."""
    sites = {"": Sites(model, dataset, poolers, config)}
    if "random_init" in config.baselines:
        twin = model.random_twin(key_seed(config.seed, "random twin"))
        sites["random_init"] = Sites(twin, dataset, poolers, config)
    if "layer0" in config.baselines and poolers is not None:
        sites["layer0"] = Sites(model, dataset, [PoolToken(0, "mean")], config)
    return sites


def probe_pair(run, model, dataset, probes, finished):
    """Everything about one model and one dataset that is not among the finished rows."""
    config = run.config
    keys = {"model": model.name, "dataset": dataset.name, "params": model.params}
    keys["synthetic"] = bool(dataset.meta.get("synthetic"))
    todo = [p for p in probes if (model.name, dataset.name, name_of(p)) not in finished]
    if not todo:
        return
    pooled = sites_of(model, dataset, all_poolers(config, model), config)
    if config.keep_predictions:
        keep_projections(run, pooled[""])
    for probe in todo:
        keys["probe"] = name_of(probe)
        sites = sites_of(model, dataset, None, config) if reads_tokens(probe) else pooled
        folds = measure_baselines(run, sites, probe, keys)
        if probe == probes[0]:
            if "control" in config.baselines:
                measure_control(run, sites[""], probe, keys)
            if "compression" in config.baselines and dataset.kind != "regression":
                measure_compression(run, pooled, keys)
            measure_sizes(run, sites[""], probe, keys)
        write_majority(run, folds, keys)


def measure_baselines(run, sites, probe, keys):
    """Rows of the model, its random twin and its bag of embeddings; the folds of the model."""
    words = []
    for baseline, part in sites.items():
        task = part.dataset.task
        folds, scores = measure(part, probe, task)
        write_rows(run, folds, part.labels, {**keys, "baseline": baseline})
        best = chosen_by_validation(folds)
        row = statistics(best, PRIMARY[task.kind])
        row |= {"name": baseline or keys["probe"], **part.labels[best.site.mode()[0]]}
        words.append("{name} {score:.3f} [{low:.3f}, {high:.3f}] (layer {layer})".format(**row))
        if not baseline:
            real = folds
            words.append("chance {chance:.3f} ({metric}, n = {n})".format(**row))
            keep_for_app(run, part, keys["probe"], folds, scores)
    run.print(f"{keys['model']} {keys['dataset']}, layer by validation: {', '.join(words)}")
    return real


def write_majority(run, folds, keys):
    """What the best constant answer scores; these rows are a probe's last."""
    folds = folds[folds.site == 0]
    for name in folds.filter(like="chance "):
        folds = folds.assign(**{name.removeprefix("chance "): folds[name]})
    write_rows(run, folds, [NO_SITE], {**keys, "baseline": "majority"})


def measure_control(run, sites, probe, keys):
    """Control task and selectivity, both labels learnt and judged where texts share their words."""
    task = sites.dataset.task
    task = replace(task, judge=task.learn)
    real, _ = measure(sites, probe, task)
    control, _ = measure(sites, probe, replace(task, y=control_labels(sites.dataset, task.seed)))
    write_rows(run, control, sites.labels, {**keys, "baseline": "control"})
    metric = PRIMARY[task.kind]
    selectivity = real[metric] - control[metric]
    real = real.drop(columns=real.filter(like="chance "))
    real = real.assign(selectivity=selectivity, **{"chance selectivity": 0.0})
    write_rows(run, real, sites.labels, {**keys, "baseline": ""})


def measure_compression(run, sites, keys):
    """n log2 K over the bits of the online code, with a normal interval over texts."""
    task = sites[""].dataset.task
    n_classes = task.targets().size(1)
    for baseline, part in sites.items():
        labels = iter(part.labels)
        for X, index in part.batches():
            learn = task.learn[index]
            texts = index[learn]
            groups = part.dataset.groups[texts]
            for x in X[:, learn].numpy():
                bits = online_code(x, task.y[texts], groups, n_classes, task.seed)
                spread = 1.96 * bits.std() * math.sqrt(len(bits))
                sums = np.array([bits.sum(), bits.sum() + spread, bits.sum() - spread])
                score, low, high = len(bits) * math.log2(n_classes) / sums.clip(1e-9)
                about = {**keys, **next(labels), "probe": "Logistic", "baseline": baseline}
                about |= {"metric": "compression", "n_train": len(bits), "p": None, "p_holm": None}
                run.result(score, 1.0, low, high, len(bits), **about)


def measure_sizes(run, sites, probe, keys):
    """The sample-size curve: whole groups at random, n texts of which are outside a fold."""
    config = run.config
    task = sites.dataset.task
    rng = np.random.default_rng(key_seed(config.seed, "size"))
    groups = sites.dataset.groups
    sizes = pd.Series(groups[task.learn]).value_counts().sort_index()
    sizes = sizes.iloc[rng.permutation(len(sizes))].cumsum() * (1 - 1 / config.n_folds)
    few = 4 * config.n_folds * task.targets().size(1)
    for n in config.train_sizes:
        if few <= n < 0.9 * sizes.max():
            learn = task.learn & np.isin(groups, sizes.index[sizes <= n])
            folds, _ = measure(sites, probe, replace(task, learn=learn))
            write_rows(run, folds, sites.labels, {**keys, "baseline": ""})


# ---- what the app reads


def slug(*names, label=None):
    """One file name out of several, and of a site's layer and quantile with their methods."""
    names = list(names)
    if label:
        for what in ("layer", "quantile"):
            names.append("-".join(filter(None, [label[what], label[f"{what}_method"]])))
    return "__".join(names).replace("/", "-")


def keep_for_app(run, sites, name, folds, scores):
    """Logs in JSON, and the out-of-fold scores of each site."""
    names = [sites.model.name, sites.dataset.name, name]
    columns = {"mse": "MSE", "accuracy": "Accuracy", "f1": "F1"}
    logs = {}
    for site, pooler in enumerate(sites.poolers):
        part = folds[folds.site == site]
        about = {"model": names[0], "classifier": name, "attention": sites.all_tokens}
        for key in NO_SITE:
            about[key] = getattr(pooler, key)
        data = {title: part[key].tolist() for key, title in columns.items() if key in part}
        meta = sites.dataset.meta
        logs[f"experiment_{site}"] = {"metadata": meta, "expdata": about, "data": data}
        if run.config.keep_predictions and scores is not None:
            kept = scores[scores.site == site]
            path = run.out / "predictions" / f"{slug(*names, label=sites.labels[site])}.npz"
            with aside(path) as file:
                np.savez(file, **kept.drop(columns="site"), threshold=part.threshold.mean())
    write_aside(run.out / "logs" / f"{slug(*names)}.json", json.dumps(logs))


def keep_projections(run, sites):
    """The texts, and the first two principal components of each site of a single layer."""
    dataset = sites.dataset
    if dataset.y.ndim == 1:
        names = np.array(dataset.label_names)[dataset.y] if dataset.label_names else dataset.y
        table = pd.DataFrame({"text": dataset.texts, "label": names}).rename_axis("index")
        write_aside(run.out / "texts" / f"{slug(dataset.name)}.csv", table.to_csv())
    for pooler, label in zip(sites.poolers, sites.labels):
        if pooler.cacheable and not label["layer_method"] and len(pooler.quantiles) < 2:
            X, index = sites.vectors(pooler)
            pca = PCA(2, svd_solver="covariance_eigh")
            arrays = {"xy": pca.fit_transform(X).astype(np.float32), "index": index}
            name = slug(sites.model.name, dataset.name, label=label)
            with aside(run.out / "projections" / f"{name}.npz") as file:
                np.savez(file, **arrays, explained=pca.explained_variance_ratio_)


# ---- the experiment


def main(config, lms=None, datasets=None, probes=None):
    """The sweep: models x datasets dealt over the ranks. Returns the results as a DataFrame."""
    run = Run(config)
    for name in ("logs", "predictions", "projections", "texts"):
        (run.out / name).mkdir(exist_ok=True)
    lms = lms or config.lm
    datasets = load_datasets(run, config, datasets or config.dataset)
    run.content = hash_content(run, lms, datasets)
    finished = set()
    rows = run.rows()
    if len(rows):
        last = rows[rows.baseline == "majority"]  # written when a probe has all its others
        finished.update(zip(last.model, last.dataset, last.probe))
    for lm, pairs in groupby(run.share(product(lms, datasets)), key=itemgetter(0)):
        model = LMModel(lm, run.device, run.dtype, bos=config.bos)
        for _, dataset in pairs:
            usable = usable_probes(run, dataset, probes or config.probe)
            probe_pair(run, model, dataset, usable, finished)
    table = run.merge()
    if run.master:
        plot_layers(run.out, table)
        run.print(f"results.csv, logs and figures in {run.out}: streamlit run probe_app.py")
    run.close()
    return table


def hash_content(run, lms, datasets):
    """Texts, labels and weights, which the options only name; refuses a layer that is not there."""
    content = hashlib.sha256()
    for dataset in datasets:
        facts = [dataset.texts, dataset.y, dataset.groups, dataset.split]
        content.update(json.dumps(facts, default=np.ndarray.tolist).encode())
    for lm in lms:
        model = LMModel(lm, run.device, run.dtype, bos=run.config.bos)
        all_poolers(run.config, model)
        content.update(model.fingerprint().encode())
    return content.hexdigest()[:8]


def all_poolers(config, model):
    """Each layer x each quantile, then the ones written out; of equal ones one."""
    poolers = [PoolToken(*site) for site in product(model.layers(config.layers), config.quantiles)]
    poolers += [PoolToken(**options) for options in config.poolers]
    return list({str(pooler.label(model.n_layer)): pooler for pooler in poolers}.values())


def usable_probes(run, dataset, probes):
    """Those that can answer: classifiers do no regression, and only ridge does several columns."""
    if dataset.kind != "regression":
        return probes
    usable = ["Ridge"]
    if dataset.y.ndim == 1:
        usable = [probe for probe in probes if predicts_values(probe)] or usable
    if usable != probes:
        names = ", ".join(name_of(probe) for probe in usable)
        run.print(f"{dataset.name} is a regression: it is probed by {names}")
    return usable


def run_exp(dataset_paths, model_names, poolers=(), classifiers=("LDA",), **options):
    """The experiment as a function; returns the DataFrame of results.csv.

    dataset_paths: data-json files, dicts, NLPDatasets or NAME/TASK; model_names: names, folders or
    {'model', 'tokenizer'}; poolers: PoolTokens; classifiers: names, or constructors input_size ->
    SingleStepOpt or MultiStepOpt; options: fields of Config, and logs_folder for its out_dir.
    """
    options["out_dir"] = str(options.pop("logs_folder", "out/probe"))
    if poolers:
        options.setdefault("quantiles", [])
    config = Config(**options, poolers=list(map(asdict, poolers)))
    config.probe = [probe for probe in classifiers if isinstance(probe, str)]
    check(config)
    config.probe = [name_of(probe) for probe in classifiers]
    config.lm = []
    for model in model_names:
        config.lm.append(model.get("name", "") if isinstance(model, dict) else str(model))
    config.dataset = [getattr(data, "name", str(data)[:200]) for data in dataset_paths]
    return main(config, list(model_names), list(dataset_paths), list(classifiers))


# ---- plots

STYLES = {"random_init": "--", "control": ":", "layer0": "-.", "majority": "-"}


def plot_layers(out, table):
    """layers_MODEL.png: scores over layers at one pooling with 95 % bands, a panel a dataset."""
    usual = table.groupby(["model", "dataset", "probe", "baseline"]).n_train.transform("max")
    table = table[table.metric.isin(PRIMARY.values()) & (table.layer_method == "")]
    table = table[table.n_train == usual[table.index]]
    for model, rows in table.groupby("model"):
        panels = list(rows.groupby("dataset", sort=False))
        n_columns = min(len(panels), 3)
        n_rows = -(-len(panels) // n_columns)
        size = (max(3.6 * n_columns, 7.2), 2.8 * n_rows + 0.9)
        options = {"figsize": size, "squeeze": False, "layout": "constrained"}
        figure, axes = plt.subplots(n_rows, n_columns, **options)
        for ax in axes.flat[len(panels) :]:
            ax.remove()
        for ax, (dataset, part) in zip(axes.flat, panels):
            draw_panel(ax, part.assign(layer=pd.to_numeric(part.layer, errors="coerce")))
            ax.set_title(dataset, fontsize=9)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        note = "; synthetic sentences" if rows.synthetic.any() else ""
        figure.suptitle(f"{model}: what each layer knows (95 % bands){note}", fontsize=10)
        with aside(out / f"layers_{slug(model)}.png") as file:
            figure.savefig(file, dpi=130, format="png")
        plt.close(figure)


def draw_panel(ax, rows):
    """One dataset: the probes in colour, and the baselines of the first one."""
    real = rows[(rows.baseline == "") & rows.layer.notna()]
    if real.empty:  # joined layers alone
        return
    last_token = real[real["quantile"] == "1.0"]
    pooling = (last_token if len(last_token) else real).iloc[0]  # one of those that were asked for
    drawn = rows["quantile"] == pooling["quantile"]
    drawn &= rows.quantile_method == pooling.quantile_method
    drawn |= (rows["quantile"] == "attention") | rows.baseline.isin(["layer0", "majority"])
    rows = rows[drawn].sort_values("layer")
    for probe, part in rows[rows.baseline == ""].groupby("probe", sort=False):
        ax.plot(part.layer, part.score, "o-", ms=3, label=probe)
        ax.fill_between(part.layer, part.low, part.high, alpha=0.13)
    first = rows[rows.probe == real.probe.iloc[0]]
    for baseline, style in STYLES.items():
        part = first[first.baseline == baseline]
        if len(part) == 1:
            ax.axhline(part.score.iloc[0], ls=style, c="grey", lw=1, label=baseline)
        elif len(part):
            ax.plot(part.layer, part.score, style, c="grey", lw=1, label=baseline)
    ax.set(xlabel="layer", ylabel=real.metric.iloc[0])


if __name__ == "__main__":
    if "streamlit" in sys.modules:
        sys.modules["streamlit"].code("streamlit run probe_app.py", language="bash")
    else:
        main(configure(Config))
