"""What the hidden layers of an untouched language model know: one pass, every layer, honest probes.

    python probe.py                          # the model of train.py on data/grammar, offline
    python probe.py config/probe_gpt2.yaml   # GPT-2s; first: python data/probing/get_data.py
    torchrun --standalone --nproc_per_node=4 probe.py config/probe_gpt2.yaml
    streamlit run probe_app.py               # look at what is in out/

Each text goes through each model once. Its hidden states are pooled while the model runs, and only
the pooled vectors are kept, in a cache that other embedding studies may read: one folder for each
model and list of texts, named by a hash of the weights and the token ids.

    meta.json      model, texts, layers [i, ...] (0 the embeddings, i after block i, the last one
                   after the final norm), width, dtype, truncated
    lengths.npy    (N,) pooled tokens of each text
    POOLING.npy    (N, layers, width); POOLING is a quantile of the tokens (0.0 the first, 1.0 the
                   last) or a name in REDUCE: np.load(file, mmap_mode="r")
    POOLING.done   how many texts are finished, from the shortest: a killed pass goes on from there

Folds are grouped and stratified: one is tested, the next one chooses penalty, threshold, epoch and
layer, the others are learnt from. Beside every score: the majority guess, the bag of embeddings
(layer 0), the same architecture with random weights, a control task (a random label for each word
type), the description length, and an interval (corrected resampled t). p-values are corrected over
all layers and poolings (Holm).
Hewitt & Liang 2019 (control tasks); Voita & Titov 2020 (online code); Nadeau & Bengio 2003
(corrected t); Conneau et al. 2018 (SentEval).
"""

import fcntl
import hashlib
import inspect
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
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
from data import read_yaml
from data.labelled_texts import LabelledTexts
from data.stimuli import ENCODING_FORMAT, read_meta

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
GRAMMAR = ["tense", "subj_number", "depth", "bigram_shift", "coord_inversion", "odd_man_out"]
BASELINES = ["layer0", "random_init", "control", "compression"]


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
    train_sizes: list[int] = default(100, 300, 1000)  # curve of the first closed-form probe
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
        probes = [*CLOSED, *PROBES]
        for option, allowed in (("probe", probes), ("baselines", BASELINES)):
            for name in getattr(self, option):
                if name not in allowed:
                    names = ", ".join(allowed)
                    raise InputError(f"option '{option}': there is no '{name}', only {names}")
        if self.n_folds < 3:
            raise InputError(f"n_folds={self.n_folds}: to test, to choose and to learn takes three")
        for quantile in self.quantiles:
            token_pooler(0, quantile)
        for pooler in self.poolers:
            check_keys(pooler, inspect.signature(PoolToken).parameters, "poolers")
            PoolToken(**pooler)


# ---- data


class NLPDataset(LabelledTexts):
    """Labelled texts (data/labelled_texts.py) that a model can be run on.

    Attributes: name, texts, y (N,), kind (binary, multi, regression), label_names, groups, split,
    meta; len(), [i] -> (text, label).
    """

    def load_embeds_into_memory(self, model, pooler, cache=None):
        """Embed and pool the whole dataset: X (N', H) float32, y (N',).

        self.index (N',) is the text of each row: with 'concat' a text has several, which no split
        may part (self.row_groups). cache: the folder of pooled states; without one nothing is kept.
        """
        if cache and pooler.cacheable:
            layers = sorted(set(pooler.layers(model.n_layer)))
            states = pooled_states(model, self.texts, layers, pooler.poolings(), cache)
            X, self.index = pooler.from_states(states)
        else:
            parts, index = [], []
            for start in range(0, len(self), 64):
                x, text = pooler.pool(model(self.texts[start : start + 64]))
                parts.append(x.cpu().numpy())
                index.append(text.cpu().numpy() + start)
            X = np.concatenate(parts)
            self.index = np.concatenate(index)
        self.row_groups = self.groups[self.index]
        return X, self.y[self.index]


def load_dataset(run, config, spec):
    """The datasets of one entry: NLPDataset, dict, data-json file, NAME/TASK or NAME."""
    if isinstance(spec, NLPDataset):
        return [spec]
    if isinstance(spec, dict):
        return [NLPDataset(spec, config.force_classification)]
    if str(spec).endswith(".json"):
        path = Path(spec) if Path(spec).exists() else HERE / "data" / spec
        return [NLPDataset(path, config.force_classification)]
    name, task = spec, ""
    if not Path(spec).is_dir() and not (HERE / "data" / spec / "prepare.py").exists():
        name, _, task = spec.rpartition("/")
    folder = run.dataset(name or spec)
    meta = read_yaml((folder / "meta.yaml").read_text(encoding="utf-8"))
    if meta.get("format") == ENCODING_FORMAT:
        return [NLPDataset.from_encoding(folder)]
    tasks = [task] if name and task else read_meta(folder)["tasks"]
    return [NLPDataset.from_task(folder, task) for task in tasks]


def check_folds(dataset, n_folds):
    """Refuse a dataset with too few texts of a label, or groups to test on, for so many folds."""
    tested = dataset.groups
    if dataset.split is not None:
        tested = tested[dataset.split == "test"]
    counts = {"groups of texts to test on": len(set(tested))}
    if dataset.kind != "regression":
        counts["texts of one label"] = np.bincount(dataset.y).min()
    for what, count in counts.items():
        if count < n_folds:
            few = f"there are {count} {what}, fewer than {n_folds} folds"
            raise InputError(f"{dataset.name}: {few}: give fewer n_folds=, or split=cv")


def make_folds(dataset, n_folds, seed):
    """Fold (N,) of each text: groups whole, labels (tenths of a regression's) spread evenly."""
    strata = np.zeros(len(dataset), int)
    if dataset.kind != "regression":
        strata = dataset.y
    elif dataset.y.ndim == 1:
        parts = np.clip(len(dataset) // (2 * n_folds), 1, 10)
        strata = pd.qcut(dataset.y, parts, labels=False, duplicates="drop")
    if dataset.split is not None:
        strata = 2 * strata + (dataset.split == "test")
    folds = np.zeros(len(dataset), int)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label may be rare in one part of a given split
        for fold, (_, test) in enumerate(splitter.split(folds, strata, dataset.groups)):
            folds[test] = fold
    return folds


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
    words = [max(text.split(), key=len).lower() for text in dataset.texts]
    return dataset.y[[key_seed(seed, "control", word) % len(dataset) for word in words]]


# ---- model


class LMModel(HiddenStates):
    """A language model that is only listened to: convert.HiddenStates, called with texts."""

    def __call__(self, texts):
        """{'hidden_states': (n_layer + 1) x (B, T, H), 'attention_mask' and 'input_ids' (B, T)}."""
        texts = [texts] if isinstance(texts, str) else texts
        ids, real = self.pad(self.encode(texts)[0])
        states = self.states(ids, real)
        states = tuple(states[layer] for layer in sorted(states))
        mask = self.pooled(real).long()
        return {"hidden_states": states, "attention_mask": mask, "input_ids": ids}

    def pooled(self, real):
        """Which tokens (B, T) count: the real ones less the first one that `bos` wrote."""
        mask = real.clone()
        if self.bos:
            mask[torch.arange(len(real)), real.int().argmax(1)] = False
        return mask

    def random_twin(self, seed):
        return super().random_twin(key_seed(seed, "random twin"))

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


class PoolToken:
    """From a model's output dictionary to one vector a text, or to several.

    layer: index into hidden_states (0 the embeddings, n or -1 the last), a list, or 'all': 1 to
    n - 1. quantile: 0 the first token, 1.0 or -1 the last one; a list; 'all': each token once.
    Where several are selected, their method says what becomes of them: a name in REDUCE; 'extend':
    side by side, H grows; 'concat': rows of their own, at most one of the two. Tokens come first,
    then layers. Quantiles that meet in one token of a short text count once, unless dedupe=False.
    """

    def __init__(self, layer=-1, quantile=-1, layer_method=None, quantile_method=None, dedupe=True):
        self.layer = layer
        self.layer_method = layer_method
        self.quantile = quantile
        self.quantile_method = quantile_method
        self.dedupe = dedupe
        methods = ", ".join([*REDUCE, "extend", "concat"])
        for what in ("layer", "quantile"):
            value = getattr(self, what)
            method = getattr(self, f"{what}_method")
            if method is not None and method not in methods.split(", "):
                raise InputError(f"{what}_method must be one of {methods}, not '{method}'")
            if isinstance(value, str) and value != "all":
                raise InputError(f"{what} must be a number, a list or 'all', not '{value}'")
            if method is None and (value == "all" or len(as_list(value)) > 1):
                raise InputError(f"{what}={value} selects several: give {what}_method= {methods}")
        if layer_method == quantile_method == "concat":
            raise InputError("layer_method and quantile_method are both concat: only one can be")
        self.quantiles = []
        if quantile != "all":
            self.quantiles = [1.0 if q == -1 else float(q) for q in as_list(quantile)]
        for q in self.quantiles:
            if not 0 <= q <= 1:
                raise InputError(f"quantile {q} is not between 0 and 1 (or -1, the last)")
        self.cacheable = bool(self.quantiles) or quantile_method in REDUCE

    def layers(self, n_layer):
        """Indices of the hidden states of a model of n_layer blocks."""
        if self.layer == "all":
            if n_layer < 2:
                raise InputError("layer='all' leaves out the first and the last state: no other")
            return list(range(1, n_layer))
        for i in as_list(self.layer):
            if not -n_layer - 1 <= i <= n_layer:
                raise InputError(f"no layer {i}: there are 0 (embeddings) to {n_layer}, -1 is last")
        return [i % (n_layer + 1) for i in as_list(self.layer)]

    def poolings(self):
        """The files in the cache that it is made of."""
        return [str(q) for q in self.quantiles] or [self.quantile_method]

    def label(self, n_layer):
        """Its columns in the results; poolers of equal labels are one."""
        layers = self.layers(n_layer)
        layer = "+".join(map(str, layers))
        if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
            layer = f"{layers[0]}-{layers[-1]}"
        label = {"layer": layer, "quantile": "+".join(map(str, self.quantiles)) or "all"}
        label["layer_method"] = self.layer_method if len(layers) > 1 else ""
        label["quantile_method"] = self.quantile_method if len(self.quantiles) != 1 else ""
        return label

    def __call__(self, outputs):
        return self.pool(outputs)[0]

    def pool(self, outputs):
        """Rows (R, H') and the text of each (R,), from {'hidden_states', 'attention_mask'}."""
        real = torch.as_tensor(outputs["attention_mask"]).bool()
        states = outputs["hidden_states"]
        x = [states[layer].float() for layer in self.layers(len(states) - 1)]
        if not self.cacheable:
            return self._combine(torch.stack(x, 1), real)
        parts = []
        for pooling in self.poolings():
            parts.append(torch.stack([pool_tokens(state, real, pooling) for state in x], 1))
        return self._combine(torch.stack(parts, 2), self._unequal(real.sum(1)))

    def from_states(self, states):
        """The same from cached States: X (R, H') and index (R,), as arrays."""
        layers = [states.layers.index(layer) for layer in self.layers(states.n_layer)]
        parts = [states.arrays[pooling][:, layers] for pooling in self.poolings()]
        x = torch.from_numpy(np.stack(parts, 2).astype(np.float32))
        x, index = self._combine(x, self._unequal(torch.from_numpy(states.lengths)))
        return x.numpy(), index.numpy()

    def _unequal(self, lengths):
        """(B, Q): False where an earlier quantile of the text is the same token."""
        unequal = torch.ones(len(lengths), len(self.poolings()), dtype=torch.bool)
        if self.dedupe and self.quantiles:
            at = torch.stack([token_at(lengths, q) for q in self.quantiles], 1)
            unequal = ~(at[:, :, None] == at[:, None, :]).tril(-1).any(2)
        return unequal.to(lengths.device)

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


def as_list(value):
    return list(value) if isinstance(value, (list, tuple)) else [value]


def token_pooler(layer, quantile):
    """PoolToken of one layer and one entry of quantiles=."""
    if quantile in REDUCE:
        return PoolToken(layer, "all", None, quantile)
    try:
        number = float(quantile)
    except ValueError:
        names = ", ".join(REDUCE)
        raise InputError(f"quantiles: '{quantile}' is no number from 0 to 1, nor {names}") from None
    return PoolToken(layer, number)


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
    poolings = list(dict.fromkeys(poolings))
    digest = hashlib.sha256(json.dumps([model.fingerprint(), layers, dtype, rows]).encode())
    folder = Path(cache) / digest.hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(row) - model.bos for row in rows])
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job that wants the same waits, then reads
        unfinished = []
        for pooling in poolings:
            counter = folder / f"{pooling}.done"
            if not counter.exists():
                shape = (len(rows), len(layers), model.width)
                np.lib.format.open_memmap(folder / f"{pooling}.npy", "w+", dtype, shape)
                write_aside(counter, "0")
            if int(counter.read_text()) < len(rows):
                unfinished.append(pooling)
        if unfinished:
            if truncated:
                limit = f"longer than its {model.max_length} tokens and were cut"
                print(f"{model.name}: {truncated} of {len(rows)} texts are {limit}")
            with aside(folder / "lengths.npy") as file:
                np.save(file, lengths)
            meta = {"model": model.name, "texts": len(rows), "layers": layers}
            meta |= {"width": model.width, "dtype": dtype, "truncated": truncated}
            write_aside(folder / "meta.json", json.dumps(meta))
            fill(model, rows, layers, unfinished, folder, batch_tokens)
    arrays = {pooling: np.load(folder / f"{pooling}.npy", mmap_mode="r") for pooling in poolings}
    return States(arrays, lengths, layers, model.n_layer)


def fill(model, rows, layers, poolings, folder, batch_tokens):
    """Run the unfinished texts, the shortest first, and write each batch as soon as it is pooled.

    The arrays are opened anew for each batch: what is written does not stay in memory.
    """
    lengths = np.array([len(row) for row in rows])
    finished = min(int((folder / f"{pooling}.done").read_text()) for pooling in poolings)
    order = np.argsort(lengths, kind="stable")[finished:]
    bar = tqdm(total=len(rows), initial=finished, desc=model.name, mininterval=5)
    saved = time.time()

    def save_counters():
        for pooling in poolings:
            np.load(folder / f"{pooling}.npy", mmap_mode="r+").flush()
            write_aside(folder / f"{pooling}.done", str(finished))

    try:
        for batch in length_batches(order, lengths, batch_tokens):
            pooled = pool_batch(model, [rows[i] for i in batch], layers, poolings)
            for pooling, part in zip(poolings, pooled):
                array = np.load(folder / f"{pooling}.npy", mmap_mode="r+")
                with np.errstate(over="ignore"):
                    array[batch] = part
                if not np.isfinite(array[batch]).all():
                    what = f"hidden states are not finite as {array.dtype}"
                    cure = "give cache_dtype=float32, dtype=float32"
                    raise InputError(f"{model.name}: {what}: {cure}")
            finished += len(batch)
            bar.update(len(batch))
            if time.time() - saved > 10:
                save_counters()
                saved = time.time()
    finally:
        save_counters()
        bar.close()


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
    """Means and covariances from summed products (G, 1 + H, 1 + H + C), features standardised."""

    def __init__(self, sums):
        H = sums.size(1) - 1
        self.n = sums[0, 0, 0]
        mean = sums[:, :1, 1:] / self.n
        covariance = sums[:, 1:, 1:] / self.n - mean[:, :, :H].mT * mean
        scale = covariance.diagonal(dim1=1, dim2=2)[:, :, None].clamp_min(0).sqrt()
        scale = torch.where(scale > 1e-6, scale, 1.0)  # a feature that never varies
        self.mean = mean[:, :, :H]
        self.target_mean = mean[:, :, H:]
        self.scale = scale
        self.XX = covariance[:, :, :H] / (scale * scale.mT)
        self.XY = covariance[:, :, H:] / scale
        self.eye = torch.eye(H, dtype=sums.dtype)

    def weights(self, coefficients, intercept):
        """(G, 1 + H, C) for features as they are, the intercept first."""
        W = coefficients / self.scale
        return torch.cat([intercept - self.mean @ W, W], 1).float()


def summed_products(X, Y):
    """Sums over rows of products of [1, X] with [1, X, Y]; those of two sets of rows add up."""
    Z = torch.cat([torch.ones_like(X[:, :, :1]), X], 2)
    return torch.cat([Z.mT @ Z, Z.mT @ Y.expand(len(X), -1, -1)], 2).double()


def solve(A, B):
    """A⁻¹ B for positive definite A (G, H, H)."""
    return torch.cholesky_solve(B, torch.linalg.cholesky(A))


def ridge(sums, alphas=(1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)):
    """sklearn's Ridge(alpha) behind StandardScaler: weights (G, 1 + H, alphas, C)."""
    m = Moments(sums)
    weights = []
    for alpha in alphas:
        coefficients = solve(m.XX + (alpha / m.n + 1e-6) * m.eye, m.XY)
        weights.append(m.weights(coefficients, m.target_mean))
    return torch.stack(weights, 2)


def lda(sums, shrinkages=(0.003, 0.03, 0.1, 0.3, 0.7)):
    """sklearn's LinearDiscriminantAnalysis("lsqr", shrinkage) behind StandardScaler, as `ridge`.

    Targets are one-hot; outputs are log-posteriors up to a constant.
    """
    m = Moments(sums)
    prior = m.target_mean.clamp_min(1e-12)
    means = m.XY / prior  # of the classes, (G, H, K)
    within = m.XX - (means * prior) @ means.mT
    variance = within.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    weights = []
    for s in shrinkages:
        coefficients = solve((1 - s) * within + (s * variance + 1e-6) * m.eye, means)
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
    classifier = None
    grid = {}

    def fit(self, X, y):
        self.classifier.fit(X, np.round(y).astype(int) if self.discrete_targets else y)
        return self

    def forward(self, X):
        methods = ["predict_proba", "decision_function", "transform"]
        if not self.discrete_targets:
            methods = []
        for method in [*methods, "predict"]:
            if hasattr(self.classifier, method):
                scores = np.asarray(getattr(self.classifier, method)(X), float)
                return scores[:, -1] if scores.ndim == 2 and scores.shape[1] <= 2 else scores

    __call__ = forward


def sklearn_probe(name, classifier, **grid):
    """The constructor, input_size -> probe, for a classifier of scikit-learn."""

    def make(input_size):
        probe = SingleStepOpt()
        probe.name, probe.grid = name, grid
        probe.classifier = make_pipeline(StandardScaler(), clone(classifier))
        return probe

    return make


class MultiStepOpt(nn.Module):
    """A probe in the manner of torch.

    A subclass sets self.name and forward(X) -> (n, 1) logits (binary), values (regression) or
    (n, K) logits. Adam trains it in batches of standardised features; the epoch that is best on a
    validation fold is kept. The probes of all sites are stacked and trained together.
    """

    name = ""
    batch_size = 128
    max_epoch = 30
    min_steps = 300  # a few hundred texts need more epochs
    learning_rate = 3e-3
    attention = False  # X is (n, T, H), the states of all tokens; pads are NaN


class SingleLayer(MultiStepOpt):
    """A linear layer."""

    def __init__(self, input_size, output_size=1):
        super().__init__()
        self.name = "SingleLayer"
        self.linear = nn.Linear(input_size, output_size)

    def forward(self, X):
        return self.linear(X)


class DoubleLayer(MultiStepOpt):
    """One hidden layer of ReLUs."""

    def __init__(self, input_size, output_size=1, hidden=100):
        super().__init__()
        self.name = "DoubleLayer"
        self.hidden = nn.Linear(input_size, hidden)
        self.out = nn.Linear(hidden, output_size)

    def forward(self, X):
        return self.out(F.relu(self.hidden(X)))


class GatedLayer(MultiStepOpt):
    """One hidden layer of gated linear units."""

    def __init__(self, input_size, output_size=1, hidden=100):
        super().__init__()
        self.name = "GatedLayer"
        self.gate = nn.Linear(input_size, 2 * hidden)
        self.out = nn.Linear(hidden, output_size)

    def forward(self, X):
        return self.out(F.glu(self.gate(X)))


class AttentionPool(MultiStepOpt):
    """softmax(q · h_t) pooling over a text's tokens, then a linear layer.

    The states of all tokens of one layer are in memory while it learns.
    """

    max_epoch = 10
    attention = True

    def __init__(self, input_size, output_size=1):
        super().__init__()
        self.name = "AttentionPool"
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
    "Logistic": sklearn_probe("Logistic", LOGISTIC, logisticregression__C=PENALTIES),
    "SingleLayer": SingleLayer,
    "DoubleLayer": DoubleLayer,
    "GatedLayer": GatedLayer,
    "AttentionPool": AttentionPool,
    "QDA": sklearn_probe("QDA", QuadraticDiscriminantAnalysis(reg_param=0.1)),
    "NaiveBayes": sklearn_probe("NaiveBayes", GaussianNB()),
    "NearestCentroid": sklearn_probe("NearestCentroid", NearestCentroid()),
    "RandomForest": sklearn_probe("RandomForest", RandomForestClassifier(200, random_state=0)),
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


def reads_tokens(probe):
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
    """Learn from all but the test part of a given split, judge the test part; or all in folds."""
    test = np.zeros(len(dataset), bool)
    if dataset.split is not None:
        test = dataset.split == "test"
    folds = []
    for repetition in range(config.n_seeds):
        seed = key_seed(config.seed, repetition) % 2**31
        folds.append(make_folds(dataset, config.n_folds, seed))
    judge = test if test.any() else ~test
    return Task(dataset.kind, dataset.y, ~test, judge, folds, config.seed)


@dataclass
class Outcome:
    """Scores (G, n, C) of one outer fold at G sites: of the rows to choose on, and of the test."""

    choose: np.ndarray
    test: np.ndarray
    scores: list
    n_train: int


def fit_folds(probe, X, task, folds):
    """An Outcome for each outer fold; the next fold is to choose on, the others are learnt from."""
    n_folds = folds.max() + 1
    for outer in range(n_folds):
        inner = (outer + 1) % n_folds
        fit = np.flatnonzero(task.learn & (folds != outer) & (folds != inner))
        choose = np.flatnonzero(task.learn & (folds == inner))
        test = np.flatnonzero(task.judge & (folds == outer))
        n_train = len(fit) + len(choose)
        torch.manual_seed(key_seed(task.seed, outer))
        model = None if probe in CLOSED else build(probe, X.size(-1), task)
        if probe in CLOSED:
            scores = fit_closed(probe, X, task, fit, choose, test)
        elif isinstance(model, MultiStepOpt):
            scores = fit_torch(model, X, task, fit, choose, test)
            n_train = len(fit)
        else:
            scores = fit_sklearn(probe, X, task, fit, choose, test)
        yield Outcome(choose, test, scores, n_train)


def fit_closed(probe, X, task, fit, choose, test):
    """Scores of LDA or ridge, fitted again with the rows that chose the penalty."""
    solve_all = CLOSED[probe]
    Y = task.targets()
    X = X - X[:, fit].mean(1, keepdim=True)  # any shift: it keeps the sums small
    sums = summed_products(X[:, fit], Y[fit])
    outputs = apply(solve_all(sums), X[:, choose])  # (G, n, penalties, C)
    losses = (outputs - Y[choose][:, None]).square().sum(3)
    if probe == "LDA":
        losses = -(outputs.log_softmax(3) * Y[choose][:, None]).sum(3)
    best = losses.mean(1).argmin(1)
    sites = torch.arange(len(X))
    sums += summed_products(X[:, choose], Y[choose])
    weights = solve_all(sums)[sites, :, best]
    scores = [outputs[sites, :, best], apply(weights[:, :, None], X[:, test])[:, :, 0]]
    if probe == "LDA":
        scores = [part.double().softmax(2) for part in scores]
    if task.kind == "binary":
        scores = [part[:, :, 1:] for part in scores]
    return [part.numpy() for part in scores]


@one_thread
def fit_sklearn(probe, X, task, fit, choose, test):
    """Scores of a scikit-learn probe at each site.

    The rows to choose on pick the best of its grid, by squared error, and are learnt from, too.
    """
    targets = task.targets()[choose].numpy()
    train = np.concatenate([fit, choose])
    chosen, tested = [], []
    for x in X.numpy():
        best = (None, None, None)
        for parameters in ParameterGrid(build(probe, x.shape[1], task).grid):
            model = build(probe, x.shape[1], task)
            model.classifier.set_params(**parameters)
            scores = model.fit(x[fit], task.y[fit])(x[choose]).reshape(len(choose), -1)
            loss = np.square(scores - targets[:, -scores.shape[1] :]).mean()
            if best[1] is None or loss < best[0]:
                best = (loss, parameters, scores)
        model = build(probe, x.shape[1], task)
        model.classifier.set_params(**best[1])
        tested.append(model.fit(x[train], task.y[train])(x[test]).reshape(len(test), -1))
        chosen.append(best[2])
    return [np.stack(chosen), np.stack(tested)]


def fit_torch(model, X, task, fit, choose, test):
    """Scores of copies of a torch probe, one for each site, trained in one optimiser."""
    y = torch.as_tensor(task.y)
    if not model.attention:
        X = X - X[:, fit].mean(1, keepdim=True)
        scale = X[:, fit].square().mean(1, keepdim=True).sqrt()
        X = X / torch.where(scale > 1e-6, scale, 1.0)
    params, buffers = torch.func.stack_module_state([model] * len(X))

    def one(params, buffers, x):
        return torch.func.functional_call(model, (params, buffers), x)

    stacked = torch.vmap(one, randomness="different")
    optimizer = torch.optim.Adam(params.values(), lr=model.learning_rate)
    best = {name: value.detach().clone() for name, value in params.items()}
    least = torch.full((len(X),), math.inf)
    n_batches = -(-len(fit) // model.batch_size)
    for epoch in range(max(model.max_epoch, model.min_steps // n_batches)):
        model.train()
        rng = np.random.default_rng(key_seed(task.seed, epoch))
        for rows in torch.from_numpy(rng.permutation(fit)).split(model.batch_size):
            optimizer.zero_grad()
            outputs = stacked(params, buffers, X[:, rows])
            losses_of(outputs, y[rows], task.kind).mean(1).sum().backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            outputs = stacked(params, buffers, X[:, choose])
            losses = losses_of(outputs, y[choose], task.kind).mean(1)
            better = losses < least
            least = torch.where(better, losses, least)
            for name, value in params.items():
                best[name][better] = value.detach()[better]
    with torch.no_grad():
        return [as_scores(stacked(best, buffers, X[:, rows]), task.kind) for rows in (choose, test)]


def losses_of(outputs, y, kind):
    """Loss (G, n) of outputs (G, n, C) for y (n,)."""
    if kind == "multi":
        return F.cross_entropy(outputs.mT, y.expand(len(outputs), -1), reduction="none")
    y = y.float().expand(len(outputs), -1)
    if kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs[:, :, 0], y, reduction="none")
    return (outputs[:, :, 0] - y).square()


def as_scores(outputs, kind):
    """Probabilities, or values, in double precision: sure ones stay apart."""
    outputs = outputs.double()
    if kind == "multi":
        outputs = outputs.softmax(2)
    elif kind == "binary":
        outputs = outputs.sigmoid()
    return outputs.numpy()


# ---- evaluate

BOUNDS = {"mse": (0, np.inf), "r2": (-np.inf, 1), "pearson": (-1, 1), "mcc": (-1, 1)}  # else 0, 1
PRIMARY = {"binary": "accuracy", "multi": "accuracy", "regression": "pearson"}


def best_thresholds(y, score):
    """The thresholds that are best for accuracy and for F1: score >= threshold says 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fold may lack a class
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
    a, b = score - score.mean(0), y - y.mean(0)
    norm = np.sqrt(np.square(a).sum(0) * np.square(b).sum(0))
    return np.mean((a * b).sum(0) / np.maximum(norm, 1e-12))


def evaluator(y, score, kind="binary", thresholds=None):
    """Measures of scores: MSE, R² and Pearson's r of a regression; MSE, accuracy and F1 (each at
    its threshold) and more of two classes; of several classes, score (n, K), no MSE."""
    thresholds = thresholds or {"accuracy": 0.5, "f1": 0.5}
    primary = primary_measure(y, score, kind, thresholds)
    if kind == "regression":
        mse = metrics.mean_squared_error(y, score)
        return {"mse": mse, "r2": metrics.r2_score(y, score), "pearson": primary}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fold may lack a class
        if kind == "multi":
            said = score.argmax(1)
            f1 = metrics.f1_score(y, said, labels=np.unique(y), average="macro")
            balanced = metrics.balanced_accuracy_score(y, said)
            return {"accuracy": primary, "balanced_accuracy": balanced, "f1": f1}
        said = score >= thresholds["accuracy"]
        return {
            "mse": np.mean(np.square(score - y)),
            "accuracy": primary,
            "balanced_accuracy": metrics.balanced_accuracy_score(y, said),
            "mcc": metrics.matthews_corrcoef(y, said),
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


def corrected_t(scores, chance, ratio, n_test, n_folds):
    """Mean, 95 % interval and p (above chance) of the scores of folds that share training texts.

    ratio: a fold's size over that of what is learnt from (Nadeau & Bengio 2003). Repetitions have
    no texts of their own and add no degree of freedom; folds that agree by luck are no surer than
    half a text.
    """
    J = len(scores)
    mean = np.mean(scores)
    error = max(math.sqrt((1 / J + ratio) * np.var(scores, ddof=1)), 0.5 / (n_test * J))
    half = scipy.stats.t.ppf(0.975, n_folds - 1) * error
    p = scipy.stats.t.sf((mean - chance) / error, n_folds - 1)
    return mean, mean - half, mean + half, p


def holm(p):
    """Holm's correction of p-values (m,): the family-wise error over all of them."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected


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
        learn, block = order[:start], order[start:end]
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


class AllTokens(PoolToken):
    """Every token of a layer, for probes that pool tokens themselves."""

    def __init__(self, layer):
        super().__init__(layer, "all", None, "concat")

    def label(self, n_layer):
        names = {"quantile": "attention", "quantile_method": "attention"}
        return {**super().label(n_layer), **names}


class Sites:
    """Where one model is read on one dataset: a site for each pooler."""

    def __init__(self, model, dataset, poolers, config):
        self.model = model
        self.dataset = dataset
        self.poolers = poolers
        self.config = config
        self.labels = [pooler.label(model.n_layer) for pooler in poolers]
        layers = set()
        poolings = []
        for pooler in poolers:
            if pooler.cacheable:
                layers.update(pooler.layers(model.n_layer))
                poolings += pooler.poolings()
        if layers:
            args = (config.cache, config.batch_tokens, config.cache_dtype)
            self.states = pooled_states(model, dataset.texts, sorted(layers), poolings, *args)

    def vectors(self, pooler):
        """X (N', H), of AllTokens (N, T, H) with NaN for pads, and the text (N',) of each row."""
        if pooler.cacheable:
            return pooler.from_states(self.states)
        X, _ = self.dataset.load_embeds_into_memory(self.model, pooler)
        index = self.dataset.index
        if isinstance(pooler, AllTokens):
            place = pd.Series(index).groupby(index).cumcount().to_numpy()
            shape = (len(self.dataset), place.max() + 1, self.model.width)
            tokens = np.full(shape, np.nan, np.float32)
            tokens[index, place] = X
            X, index = tokens, np.arange(len(tokens))
        return X, index

    def batches(self):
        """X (G, N, H) and index (N,) of neighbouring sites of equal shape, up to 256 MB of them."""
        group, index = [], None
        for pooler in self.poolers:
            X, texts = self.vectors(pooler)
            alike = group and X.shape == group[0].shape and np.array_equal(texts, index)
            if group and not (alike and (len(group) + 1) * X.nbytes < 2**28):
                yield torch.from_numpy(np.stack(group)), index
                group = []
            group.append(X)
            index = texts
        yield torch.from_numpy(np.stack(group)), index


def measure(sites, probe, task):
    """A DataFrame of measures and chance levels, a row for each site and fold; and one of scores, a
    row for each text tested in the first repetition (None of several classes or columns)."""
    rows, scores = [], []
    first = 0
    for X, index in sites.batches():
        part = task.take(index)
        texts_per_row = len(np.unique(index)) / len(index)
        for repetition, folds in enumerate(part.folds):
            for fold, outcome in enumerate(fit_folds(probe, X, part, folds)):
                about = {"repetition": repetition, "fold": fold}
                about["n"] = len(np.unique(index[part.judge]))
                about["n_train"] = outcome.n_train * texts_per_row
                about["n_test"] = len(outcome.test) * texts_per_row
                about["ratio"] = part.learn.sum() / (folds.max() + 1) / outcome.n_train
                for name, value in chance_measures(part, outcome.test).items():
                    about[f"chance {name}"] = value
                for g in range(len(X)):
                    measures, threshold = judge(part, outcome, g)
                    rows.append({"site": first + g, **about, **measures})
                    tested = outcome.scores[1][g]
                    if repetition == 0 and tested.shape[1] == 1:
                        texts = {"index": index[outcome.test], "y": part.y[outcome.test]}
                        texts |= {"score": tested[:, 0], "threshold": threshold}
                        scores.append(pd.DataFrame({"site": first + g, "fold": fold, **texts}))
        first += len(X)
    return pd.DataFrame(rows), pd.concat(scores) if scores else None


def judge(task, outcome, g):
    """Measures of site g in one fold, thresholds found on the rows to choose on, and the one for
    accuracy; `validation` is the primary measure on the rows to choose on."""
    chosen, tested = (part[g] for part in outcome.scores)
    if chosen.shape[1] == 1:
        chosen, tested = chosen[:, 0], tested[:, 0]
    y_choose, y_test = task.y[outcome.choose], task.y[outcome.test]
    thresholds = {"accuracy": np.nan}
    if task.kind == "binary":
        thresholds = best_thresholds(y_choose, chosen)
    measures = evaluator(y_test, tested, task.kind, thresholds)
    measures["validation"] = primary_measure(y_choose, chosen, task.kind, thresholds)
    return measures, thresholds["accuracy"]


def measures_of(folds):
    return [name.removeprefix("chance ") for name in folds if name.startswith("chance ")]


def statistics(folds, metric):
    """Columns of results.csv out of the folds of one site."""
    chance = folds[f"chance {metric}"].mean()
    sizes = (folds.ratio.mean(), folds.n_test.mean(), folds.fold.nunique())
    score, low, high, p = corrected_t(folds[metric], chance, *sizes)
    low, high = np.clip([low, high], *BOUNDS.get(metric, (0, 1)))
    row = {"score": score, "chance": chance, "low": low, "high": high, "n": folds.n.iloc[0]}
    return {**row, "metric": metric, "n_train": round(folds.n_train.mean()), "p": p}


def write_rows(run, folds, labels, keys, metrics):
    """Rows of every site; p is corrected over all of them, and tests nothing for a baseline."""
    for metric in metrics:
        rows = [statistics(part, metric) for _, part in folds.groupby("site")]
        for row, label, p in zip(rows, labels, holm([row["p"] for row in rows])):
            row["p_holm"] = p
            if keys["baseline"] or metric == "mse":
                row |= {"p": None, "p_holm": None}
            run.result(**row, **keys, **label)


def write_best(run, folds, labels, keys, metric):
    """The row of the site that the rows to choose on liked best, fold by fold; in words."""
    best = folds.loc[folds.groupby(["repetition", "fold"]).validation.idxmax()]
    row = statistics(best, metric)
    if keys["baseline"]:
        row["p"] = None
    row["p_holm"] = row["p"]
    label = {"layer": "best", "quantile": "best", "layer_method": "", "quantile_method": ""}
    words = f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    if len(labels) > 1:
        run.result(**row, **keys, **label)
        words += f" (most often layer {labels[best.site.mode()[0]]['layer']})"
    return words


def probe_pair(run, model, dataset, probes, finished):
    """Everything about one model and one dataset that is not among the finished rows."""
    config = run.config
    keys = {"model": model.name, "dataset": dataset.name, "params": model.params}
    keys["synthetic"] = bool(dataset.meta.get("synthetic"))
    todo = [p for p in probes if (model.name, dataset.name, name_of(p)) not in finished]
    if not todo:
        return
    task = make_task(dataset, config)
    pooled = sites_of(model, dataset, all_poolers(config, model), config)
    if config.keep_predictions:
        keep_projections(run, pooled[""])
    first = [probe for probe in probes if not reads_tokens(probe)][:1]
    first_closed = [probe for probe in probes if probe in CLOSED][:1]
    for probe in todo:
        keys["probe"] = name_of(probe)
        sites = pooled
        if reads_tokens(probe):
            layers = [AllTokens(layer) for layer in model.layers(config.layers)]
            sites = sites_of(model, dataset, layers, config)
        folds = measure_baselines(run, sites, probe, task, keys)
        if probe in first and "control" in config.baselines:
            measure_control(run, sites[""], probe, task, keys)
        if probe in first and "compression" in config.baselines and dataset.kind != "regression":
            measure_compression(run, sites, task, keys)
        if probe in first_closed:
            measure_sizes(run, sites[""], probe, task, keys)
        write_majority(run, folds, keys)


def measure_baselines(run, sites, probe, task, keys):
    """Rows of the model, its random twin and its bag of embeddings; the folds of the model."""
    metric = PRIMARY[task.kind]
    words = []
    for baseline, part in sites.items():
        keys = {**keys, "baseline": baseline}
        folds, scores = measure(part, probe, task)
        write_rows(run, folds, part.labels, keys, measures_of(folds))
        best = write_best(run, folds, part.labels, keys, metric)
        words.append(f"{baseline.replace('_', ' ') or keys['probe']} {best}")
        if not baseline:
            real = folds
            keep_for_app(run, part, keys["probe"], folds, scores)
    chance = f"chance {real[f'chance {metric}'].mean():.3f} ({metric}, n = {len(task.y)})"
    names = f"{keys['model']} {keys['dataset']}"
    run.print(f"{names}, layer by validation: {', '.join([*words, chance])}")
    return real


def write_majority(run, folds, keys):
    """What the best constant answer scores; these rows are a probe's last."""
    folds = folds[folds.site == 0]
    for metric in measures_of(folds):
        folds = folds.assign(**{metric: folds[f"chance {metric}"]})
    label = dict.fromkeys(("layer", "quantile", "layer_method", "quantile_method"), "")
    write_rows(run, folds, [label], {**keys, "baseline": "majority"}, measures_of(folds))


def sites_of(model, dataset, poolers, config):
    """{baseline: Sites} of the model ('') and of what is measured as it is."""
    sites = {"": Sites(model, dataset, poolers, config)}
    if "random_init" in config.baselines:
        sites["random_init"] = Sites(model.random_twin(config.seed), dataset, poolers, config)
    if "layer0" in config.baselines and not isinstance(poolers[0], AllTokens):
        sites["layer0"] = Sites(model, dataset, [PoolToken(0, "all", None, "mean")], config)
    return sites


def measure_control(run, sites, probe, task, keys):
    """Control task and selectivity, both labels learnt and judged where texts share their words."""
    metric = PRIMARY[task.kind]
    keys = {**keys, "baseline": "control"}
    task = replace(task, judge=task.learn)
    real, _ = measure(sites, probe, task)
    y = control_labels(sites.dataset, run.seed)
    control, _ = measure(sites, probe, replace(task, y=y))
    write_rows(run, control, sites.labels, keys, measures_of(control))
    write_best(run, control, sites.labels, keys, metric)
    real["selectivity"] = real[metric] - control[metric]
    real["chance selectivity"] = 0.0
    write_rows(run, real, sites.labels, {**keys, "baseline": ""}, ["selectivity"])


def measure_compression(run, sites, task, keys):
    """n log2 K over the bits of the online code, with a normal interval over texts."""
    n_classes = task.targets().size(1)
    for baseline in [name for name in sites if name != "layer0"]:
        labels = iter(sites[baseline].labels)
        for X, index in sites[baseline].batches():
            learn = task.learn[index]
            texts = index[learn]
            groups = sites[baseline].dataset.groups[texts]
            for x in X[:, learn].numpy():
                bits = online_code(x, task.y[texts], groups, n_classes, run.seed)
                spread = 1.96 * bits.std() * math.sqrt(len(bits))
                sums = np.array([bits.sum(), bits.sum() + spread, bits.sum() - spread])
                score, low, high = len(bits) * math.log2(n_classes) / sums.clip(1e-9)
                about = {**keys, **next(labels), "probe": "Logistic", "baseline": baseline}
                about |= {"metric": "compression", "n_train": len(bits), "p": None, "p_holm": None}
                run.result(score, 1.0, low, high, len(bits), **about)


def measure_sizes(run, sites, probe, task, keys):
    """The sample-size curve: whole groups at random, n texts of which are outside a fold."""
    config = run.config
    keys = {**keys, "baseline": ""}
    rng = np.random.default_rng(key_seed(config.seed, "size"))
    groups = sites.dataset.groups
    sizes = pd.Series(groups[task.learn]).value_counts().sort_index()
    sizes = sizes.iloc[rng.permutation(len(sizes))].cumsum() * (1 - 1 / config.n_folds)
    few = 4 * config.n_folds * task.targets().size(1)
    for n in config.train_sizes:
        if few <= n < 0.9 * sizes.max():
            learn = task.learn & np.isin(groups, sizes.index[sizes <= n])
            folds, _ = measure(sites, probe, replace(task, learn=learn))
            write_rows(run, folds, sites.labels, keys, measures_of(folds))
            write_best(run, folds, sites.labels, keys, PRIMARY[task.kind])


# ---- what the app reads


def slug(*names):
    """One file name out of several names."""
    return "__".join(str(name).replace("/", "-") for name in names)


def keep_for_app(run, sites, name, folds, scores):
    """Logs in JSON, and the out-of-fold scores of each site."""
    names = [sites.model.name, sites.dataset.name, name]
    columns = {"mse": "MSE", "accuracy": "Accuracy", "f1": "F1"}
    logs = {}
    for site, pooler in enumerate(sites.poolers):
        part = folds[folds.site == site]
        about = {"model": names[0], "classifier": name, "attention": isinstance(pooler, AllTokens)}
        for key in ("layer", "quantile", "layer_method", "quantile_method"):
            about[key] = getattr(pooler, key)
        data = {title: part[key].tolist() for key, title in columns.items() if key in part}
        meta = sites.dataset.meta
        logs[f"experiment_{site}"] = {"metadata": meta, "expdata": about, "data": data}
        if run.config.keep_predictions and scores is not None:
            kept = scores[scores.site == site]
            arrays = {key: kept[key].to_numpy() for key in ("index", "y", "score", "fold")}
            arrays["threshold"] = kept.threshold.mean()
            path = folder(run, "predictions") / f"{slug(*names, *place(sites.labels[site]))}.npz"
            with aside(path) as file:
                np.savez(file, **arrays)
    write_aside(folder(run, "logs") / f"{slug(*names)}.json", json.dumps(logs))


def place(label):
    """Layer and quantile of a site, with their methods, as they stand in file names."""
    names = []
    for what in ("layer", "quantile"):
        method = label[f"{what}_method"]
        plain = method in ("", "mean", "attention")
        names.append(label[what] if plain else f"{label[what]}-{method}")
    return names


def folder(run, name):
    path = run.out / name
    path.mkdir(exist_ok=True)
    return path


def keep_projections(run, sites):
    """The texts, and the first two principal components of each site of a single layer."""
    dataset = sites.dataset
    if dataset.y.ndim == 1:
        names = np.array(dataset.label_names)[dataset.y] if dataset.label_names else dataset.y
        table = pd.DataFrame({"text": dataset.texts, "label": names}).rename_axis("index")
        write_aside(folder(run, "texts") / f"{slug(dataset.name)}.csv", table.to_csv())
    for pooler, label in zip(sites.poolers, sites.labels):
        if pooler.cacheable and not label["layer_method"] and len(pooler.quantiles) < 2:
            X, index = sites.vectors(pooler)
            pca = PCA(2, svd_solver="covariance_eigh")
            arrays = {"xy": pca.fit_transform(X).astype(np.float32), "index": index}
            name = slug(sites.model.name, dataset.name, *place(label))
            with aside(folder(run, "projections") / f"{name}.npz") as file:
                np.savez(file, **arrays, explained=pca.explained_variance_ratio_)


# ---- the experiment


def experiment(config, lms=None, datasets=None, probes=None):
    """The sweep: models x datasets dealt over the ranks. Returns the results as a DataFrame."""
    run = Run(config)
    lms = lms or config.lm
    loaded = load_all(run, config, datasets or config.dataset)
    content = hashlib.sha256()
    for dataset in loaded:
        facts = [dataset.texts, dataset.y.tolist(), dataset.groups.tolist()]
        if dataset.split is not None:
            facts.append(dataset.split.tolist())
        content.update(repr(facts).encode())
    for last in lms:
        model = LMModel(last, run.device, run.dtype, bos=config.bos)
        all_poolers(config, model)  # a layer that is not there is told before any work
        content.update(model.fingerprint().encode())
    run.content = content.hexdigest()[:8]
    finished = finished_units(run.rows())
    for spec, dataset in run.share(product(lms, loaded)):
        if spec is not last:
            model = LMModel(spec, run.device, run.dtype, bos=config.bos)
            last = spec
        usable = usable_probes(run, dataset, probes or config.probe)
        probe_pair(run, model, dataset, usable, finished)
    table = run.merge()
    if run.master:
        plot_layers(run.out, table)
        run.print(f"results.csv, logs and figures in {run.out}: streamlit run probe_app.py")
    run.close()
    return table


def load_all(run, config, specs):
    """The datasets that specs name, as the options want them."""
    loaded = []
    for spec in specs:
        for dataset in load_dataset(run, config, spec):
            dataset = dataset.first(config.max_texts)
            if config.split == "cv":
                dataset.split = None
            check_folds(dataset, config.n_folds)
            if config.shuffle_labels:
                rng = np.random.default_rng(key_seed(config.seed, "shuffle"))
                dataset.y = shuffled(dataset, rng)
            loaded.append(dataset)
    return loaded


def all_poolers(config, model):
    """Each layer x each quantile, then the ones written out; of equal ones the first."""
    poolers = []
    for layer in model.layers(config.layers):
        poolers += [token_pooler(layer, quantile) for quantile in config.quantiles]
    poolers += [PoolToken(**options) for options in config.poolers]
    unequal = {}
    for pooler in poolers:
        unequal.setdefault(str(pooler.label(model.n_layer)), pooler)
    return list(unequal.values())


def finished_units(rows):
    """(model, dataset, probe) whose rows are all there: the majority's come last."""
    if not len(rows):
        return set()
    last = rows[rows.baseline == "majority"]
    return set(zip(last.model, last.dataset, last.probe))


def usable_probes(run, dataset, probes):
    """Those that can answer: classifiers do no regression, and only ridge does several columns."""
    if dataset.kind != "regression":
        return probes
    usable = []
    for probe in probes:
        discrete = probe == "LDA"
        if probe not in CLOSED:
            discrete = getattr(PROBES.get(probe, probe)(4), "discrete_targets", False)
        if probe == "Ridge" or not (discrete or dataset.y.ndim > 1):
            usable.append(probe)
    usable = usable or ["Ridge"]
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
    config = Config(**options)
    config.probe = [probe for probe in classifiers if isinstance(probe, str)]
    check(config)
    config.probe = [name_of(probe) for probe in classifiers]
    config.lm = []
    for model in model_names:
        config.lm.append(model.get("name", "") if isinstance(model, dict) else str(model))
    config.dataset = [getattr(data, "name", str(data)[:200]) for data in dataset_paths]
    for pooler in poolers:
        names = inspect.signature(PoolToken).parameters
        config.poolers.append({name: getattr(pooler, name) for name in names})
    return experiment(config, list(model_names), list(dataset_paths), list(classifiers))


# ---- plots

LINES = {
    "random_init": ("--", "#888888", "random weights"),
    "control": (":", "#888888", "control task"),
    "layer0": ("-.", "#b08900", "bag of embeddings"),
    "majority": ("-", "#000000", "majority"),
}


def plot_layers(out, table):
    """layers_MODEL.png: scores over layers at one pooling with 95 % bands, a panel a dataset."""
    kind = ["model", "dataset", "probe", "baseline"]
    usual = table.n_train == table.groupby(kind).n_train.transform("max")
    table = table[usual & table.metric.isin(PRIMARY.values()) & (table.layer_method == "")]
    table = table.assign(number=pd.to_numeric(table.layer, errors="coerce"))
    for model, rows in table.groupby("model"):
        datasets = list(rows.dataset.unique())
        columns = min(len(datasets), 3)
        height = -(-len(datasets) // columns)
        size = (3.6 * columns, 2.8 * height + 0.9)
        figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False)
        for ax, dataset in zip(axes.flat, datasets):
            draw_panel(ax, rows[rows.dataset == dataset])
            ax.set_title(dataset, fontsize=9)
        for ax in axes.flat[len(datasets) :]:
            ax.set_visible(False)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        note = "; synthetic sentences" if rows.synthetic.any() else ""
        figure.suptitle(f"{model}: what each layer knows (95 % bands){note}", fontsize=10)
        figure.set_layout_engine("constrained")
        with aside(out / f"layers_{slug(model)}.png") as file:
            figure.savefig(file, dpi=130, format="png")
        plt.close(figure)


def draw_panel(ax, rows):
    """One dataset: the probes in colour, and the baselines of the first one."""
    real = rows[(rows.baseline == "") & rows.number.notna()]
    quantiles = real["quantile"].unique()
    quantile = "1.0" if "1.0" in quantiles else quantiles[0]
    single = rows.baseline.isin(["layer0", "majority"])
    rows = rows[single | rows["quantile"].isin([quantile, "attention"])].sort_values("number")
    for probe, part in rows[rows.baseline == ""].groupby("probe", sort=False):
        line = ax.plot(part.number, part.score, "o-", ms=3, label=probe)[0]
        ax.fill_between(part.number, part.low, part.high, color=line.get_color(), alpha=0.13, lw=0)
    first = rows[rows.probe == real.probe.iloc[0]]
    for baseline, (style, colour, name) in LINES.items():
        part = first[first.baseline == baseline]
        if baseline in ("layer0", "majority") and len(part):
            ax.axhline(part.score.iloc[0], ls=style, c=colour, lw=1, label=name)
        elif len(part):
            ax.plot(part.number, part.score, style, c=colour, lw=1, label=name)
    ax.set_xlabel("layer", fontsize=8)
    ax.set_ylabel(real.metric.iloc[0], fontsize=8)
    ax.tick_params(labelsize=7)


def main(config):
    experiment(config)


if __name__ == "__main__":
    if "streamlit" in sys.modules:
        print("the app is a script of its own: streamlit run probe_app.py", flush=True)
        sys.modules["streamlit"].code("streamlit run probe_app.py", language="bash")
    else:
        main(configure(Config))
