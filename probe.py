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

import copy
import fcntl
import hashlib
import inspect
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
import scipy.sparse
import scipy.stats
import torch
from sklearn import metrics
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis  # noqa: F401
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from configurator import InputError, Run, aside, check, check_keys, configure, key_seed, write_aside
from convert import HiddenStates
from data import read_yaml
from data.data_json import read_data_json
from data.stimuli import ENCODING_FORMAT, Encoding, read_meta, read_task

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


class NLPDataset:
    """Labelled texts: len(), [i] -> (text, label).

    source: a data-json file or dict (data/data_json.py). Attributes: name, texts, y (N,), or (N, V)
    of V brain responses, kind (binary, multi, regression), label_names, meta, groups (N,) of what
    no split may part (equal texts always), split (N,) of train, val, test, or None.
    """

    def __init__(self, source, force_classification=False):
        frame, names, meta = read_data_json(source, force_classification)
        name = source.get("name", "dict") if isinstance(source, dict) else Path(source).stem
        self._set(str(name), frame, frame.y.to_numpy(), names, meta)

    @classmethod
    def from_task(cls, folder, task):
        """A task of a folder of labelled sentences (data/stimuli.py)."""
        frame, meta = read_task(folder, task), read_meta(folder)
        entry = meta["tasks"][task]
        names = entry["labels"] if entry["kind"] == "classification" else None
        name = f"{Path(folder).name}/{task}"
        about = {"name": name, "topic": task, "task": entry["kind"].capitalize()}
        about |= {"link": meta.get("source", ""), "synthetic": bool(meta.get("synthetic"))}
        about["labels"] = dict(enumerate(names or []))
        return cls.__new__(cls)._set(name, frame, frame.y.to_numpy(), names, about)

    @classmethod
    def from_encoding(cls, folder):
        """Texts with the responses of brains to them (data/stimuli.py): a column for each unit."""
        encoding = Encoding(folder)
        if encoding.kind != "text":
            raise InputError(f"{folder} holds responses to pictures: language models read texts")
        stimulus = encoding.presentations.stimulus.to_numpy()
        y = pd.DataFrame(np.asarray(encoding.responses)).groupby(stimulus).mean().to_numpy()
        about = {"name": folder.name, "task": "Regression"}
        about["synthetic"] = bool(encoding.meta["synthetic"])
        return cls.__new__(cls)._set(folder.name, encoding.stimuli, y, None, about)

    def _set(self, name, frame, y, label_names, meta):
        self.name, self.frame, self.y, self.label_names = name, frame, y, label_names
        self.meta = {**meta, "size": len(frame)}
        self.texts = frame.text.tolist()
        for i, text in enumerate(self.texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{name}: sentence {i} is empty or no text: leave it out")
        if len(np.unique(y, axis=0)) < 2:
            raise InputError(f"{name}: all {len(y)} labels are the same: nothing to tell apart")
        self.kind = "regression"
        if label_names:
            self.kind = "binary" if len(label_names) == 2 else "multi"
        self.split = None
        if {"train", "test"} <= set(frame.split):
            self.split = frame.split.to_numpy()
        self.groups = join_equal_texts(frame.group, frame.text)
        return self

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return self.texts[i], self.y[i]

    def first(self, n):
        """The first n texts (0: all); of a given split, of each part its share."""
        if not n:
            return copy.copy(self)
        parts = self.frame.split.fillna("")
        share = n * parts.map(parts.value_counts(normalize=True))
        rows = parts.groupby(parts).cumcount() < share.round().clip(lower=1)
        part, frame = copy.copy(self), self.frame[rows].reset_index(drop=True)
        return part._set(self.name, frame, self.y[rows], self.label_names, self.meta)

    def load_embeds_into_memory(self, model, pooler, cache=None, batch_tokens=4096):
        """Embed and pool the whole dataset: X (N', H) float32, y (N',).

        self.index (N',) is the text of each row: with 'concat' a text has several, which no split
        may part (self.row_groups). cache: a folder; without one nothing is written.
        """
        if cache and pooler.cacheable:
            layers = sorted(set(pooler.layers(model.n_layer)))
            args = (layers, pooler.poolings(), cache, batch_tokens)
            X, index = pooler.from_states(pooled_states(model, self.texts, *args))
        else:
            rows, texts = [], []
            lengths = np.array([len(row) for row in model.encode(self.texts)[0]])
            for batch in length_batches(np.argsort(lengths), lengths, batch_tokens):
                x, of = pooler.pool(model([self.texts[i] for i in batch]))
                rows.append(x.cpu().numpy())
                texts.append(batch[of.cpu().numpy()])
            index = np.concatenate(texts)
            order = np.argsort(index, kind="stable")
            X, index = np.concatenate(rows)[order], index[order]
        self.index, self.row_groups = index, self.groups[index]
        return X, self.y[index]


def join_equal_texts(groups, texts):
    """Group (N,) of each text: the given ones, or each its own; joined where they share a text."""
    n = len(texts)
    groups = pd.Series(range(n)) if groups.isna().all() else groups.astype(str)
    groups = pd.factorize(groups)[0]
    same_text = n + pd.factorize(texts.str.strip().str.lower())[0]
    graph = scipy.sparse.coo_matrix((np.ones(n), (groups, same_text)), shape=(2 * n, 2 * n))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1][groups]


def load_dataset(run, config, spec):
    """The datasets of one entry: NLPDataset, dict, data-json file, NAME/TASK or NAME."""
    if isinstance(spec, NLPDataset):
        return [spec]
    if isinstance(spec, dict) or str(spec).endswith(".json"):
        bundled = HERE / "data" / str(spec)[:200]
        path = bundled if isinstance(spec, str) and bundled.is_file() else spec
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


def make_folds(dataset, n_folds, seed):
    """Fold (N,) of each text: groups whole, labels (tenths of a regression's) spread evenly."""
    strata, tested = np.zeros(len(dataset), int), dataset.groups
    remedy = "give fewer n_folds=, or split=cv"
    if dataset.kind != "regression":
        strata = dataset.y
        rarest = np.bincount(strata).min()
        if rarest < n_folds:
            few = f"a label has {rarest} texts, fewer than {n_folds} folds"
            raise InputError(f"{dataset.name}: {few}: {remedy}, or drop the label")
    elif dataset.y.ndim == 1:
        parts = np.clip(len(dataset) // (2 * n_folds), 1, 10)
        strata = pd.qcut(dataset.y, parts, labels=False, duplicates="drop")
    if dataset.split is not None:
        strata = 2 * strata + (dataset.split == "test")
        tested = dataset.groups[dataset.split == "test"]
    n_groups = len(set(tested))
    if n_groups < n_folds:
        few = f"{n_groups} groups of texts to test on, fewer than {n_folds} folds"
        raise InputError(f"{dataset.name}: {few}: {remedy}")
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
        self.layer, self.layer_method = layer, layer_method
        self.quantile, self.quantile_method = quantile, quantile_method
        self.dedupe = dedupe
        methods = [*REDUCE, "extend", "concat"]
        for what in ("layer", "quantile"):
            value, method = getattr(self, what), getattr(self, f"{what}_method")
            if method not in (None, *methods):
                names = ", ".join(methods)
                raise InputError(f"{what}_method must be one of {names}, not '{method}'")
            if isinstance(value, str) and value != "all":
                raise InputError(f"{what} must be a number, a list or 'all', not '{value}'")
            if method is None and (value == "all" or len(as_list(value)) > 1):
                names = ", ".join(methods)
                raise InputError(f"{what}={value} selects several: give {what}_method= {names}")
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
        return self._combine(torch.stack(parts, 2), self._first_of_equals(real.sum(1)))

    def from_states(self, states):
        """The same from cached States: X (R, H') and index (R,), as arrays."""
        layers = [states.layers.index(layer) for layer in self.layers(states.n_layer)]
        parts = [states.arrays[pooling][:, layers] for pooling in self.poolings()]
        x = torch.from_numpy(np.stack(parts, 2).astype(np.float32))
        x, index = self._combine(x, self._first_of_equals(torch.from_numpy(states.lengths)))
        return x.numpy(), index.numpy()

    def _first_of_equals(self, lengths):
        """(B, Q): False where an earlier quantile of the text is the same token."""
        if not self.quantiles:
            return torch.ones_like(lengths[:, None], dtype=torch.bool)
        at = torch.stack([token_at(lengths, q) for q in self.quantiles], 1)
        again = (at[:, :, None] == at[:, None, :]).tril(-1).any(2)
        return ~again if self.dedupe else torch.ones_like(again)

    def _combine(self, x, keep):
        """x (B, L, Q, H) of which keep (B, Q) counts -> rows and their texts."""
        index = torch.arange(len(x), device=x.device)
        if x.size(2) == 1:
            x = x[:, :, 0]
        elif self.quantile_method in REDUCE:
            x = REDUCE[self.quantile_method](x, keep[:, None, :, None])
        elif self.quantile_method == "concat":
            index = index[:, None].expand_as(keep)[keep]
            x = x.transpose(1, 2)[keep]
        elif self.quantiles or keep.all():
            x = x.flatten(2)
        else:
            raise InputError("quantile='all' with extend wants texts of one length")
        if x.size(1) == 1:
            return x[:, 0], index
        if self.layer_method == "extend":
            return x.flatten(1), index
        if self.layer_method == "concat":
            return x.flatten(0, 1), index.repeat_interleave(x.size(1))
        return REDUCE[self.layer_method](x, torch.ones_like(x[..., :1], dtype=torch.bool)), index


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
    layers, poolings = list(layers), list(dict.fromkeys(poolings))
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
    """Means and covariances out of summed products of [1, X, Y], (G, 1 + H + C, 1 + H + C).

    The sums of several folds add up to those of all their rows. Features are standardised.
    """

    def __init__(self, sums, n_targets):
        H = sums.size(1) - 1 - n_targets
        self.n = sums[0, 0, 0]
        mean = sums[:, :1, 1:] / self.n
        covariance = sums[:, 1:, 1:] / self.n - mean.mT * mean
        scale = covariance.diagonal(dim1=1, dim2=2)[:, :H, None].clamp_min(0).sqrt()
        scale = torch.where(scale > 1e-6, scale, 1.0)  # a feature that never varies
        self.mean, self.target_mean, self.scale = mean[:, :, :H], mean[:, :, H:], scale
        self.XX = covariance[:, :H, :H] / (scale * scale.mT)
        self.XY = covariance[:, :H, H:] / scale
        self.eye = torch.eye(H, dtype=sums.dtype)

    def weights(self, coefficients, intercept):
        """(G, 1 + H, C) for features as they are, the intercept first."""
        W = coefficients / self.scale
        return torch.cat([intercept - self.mean @ W, W], 1).float()


def summed_products(X, Y):
    """Sums over rows of products of [1, X, Y]: X (G, n, H), Y (n, C)."""
    Z = torch.cat([torch.ones_like(X[:, :, :1]), X, Y.expand(len(X), -1, -1)], 2)
    return (Z.mT @ Z).double()


def solve(A, B):
    """A⁻¹ B for positive definite A (G, H, H)."""
    return torch.cholesky_solve(B, torch.linalg.cholesky(A))


def ridge(sums, n_targets, alphas=(1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)):
    """sklearn's Ridge(alpha) behind StandardScaler: weights (G, 1 + H, alphas, C)."""
    m = Moments(sums, n_targets)
    weights = []
    for alpha in alphas:
        coefficients = solve(m.XX + (alpha / m.n + 1e-6) * m.eye, m.XY)
        weights.append(m.weights(coefficients, m.target_mean))
    return torch.stack(weights, 2)


def lda(sums, n_targets, shrinkages=(0.003, 0.03, 0.1, 0.3, 0.7)):
    """sklearn's LinearDiscriminantAnalysis("lsqr", shrinkage) behind StandardScaler, as `ridge`.

    Targets are one-hot; outputs are log-posteriors up to a constant.
    """
    m = Moments(sums, n_targets)
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

    A subclass sets self.name, self.discrete_targets (targets are classes) and self.classifier.
    fit(X, y), then probe(X) gives scores: (n,), or (n, K) of several classes. The thresholds of two
    classes are found on a validation fold.
    """

    name, discrete_targets, classifier = "", True, None

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


def sklearn_probe(name, classifier):
    """The constructor, input_size -> probe, for a classifier of scikit-learn."""

    def make(input_size):
        probe = SingleStepOpt()
        probe.name = name
        probe.classifier = make_pipeline(StandardScaler(), clone(classifier))
        return probe

    return make


class MultiStepOpt(nn.Module):
    """A probe in the manner of torch.

    A subclass sets self.name and forward(X) -> (n, 1) logits (binary), values (regression) or
    (n, K) logits. Adam trains it in batches of standardised features; the epoch that is best on a
    validation fold is kept. The probes of all sites are stacked and trained together.
    """

    name, batch_size, max_epoch, min_steps, learning_rate = "", 128, 30, 300, 3e-3
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

    max_epoch, attention = 10, True

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


LOGISTIC = LogisticRegressionCV(
    Cs=[1e-3, 1e-2, 1e-1], cv=3, scoring="neg_log_loss", max_iter=1000, use_legacy_attributes=False
)
PROBES = {
    "Logistic": sklearn_probe("Logistic", LOGISTIC),
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
    """What a probe is asked; a row is a text, or one of a text's rows where a pooler has several."""

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


def make_task(dataset, config, y=None, within=False, n_train=0):
    """The task of a dataset. within: learn from and judge the same part of a given split."""
    test = np.zeros(len(dataset), bool)
    if dataset.split is not None:
        test = dataset.split == "test"
    learn, judge = ~test, test
    if within or not test.any():
        judge = learn
    if n_train:  # whole groups at random, so many that n_train are left without one fold
        rng = np.random.default_rng(key_seed(config.seed, "size"))
        sizes = pd.Series(dataset.groups[learn]).value_counts().sort_index()
        sizes = sizes.iloc[rng.permutation(len(sizes))].cumsum()
        kept = sizes.index[sizes <= n_train * config.n_folds / (config.n_folds - 1)]
        learn = learn & np.isin(dataset.groups, kept)
    folds = []
    for repetition in range(config.n_seeds):
        seed = key_seed(config.seed, repetition) % 2**31
        folds.append(make_folds(dataset, config.n_folds, seed))
    y = dataset.y if y is None else y
    return Task(dataset.kind, y, learn, judge, folds, config.seed)


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
        if probe in CLOSED:
            scores = fit_closed(probe, X, task, fit, choose, test)
        elif isinstance(model := build(probe, X.size(-1), task), MultiStepOpt):
            scores = fit_torch(model, X, task, fit, choose, test)
            n_train = len(fit)
        else:
            scores = fit_sklearn(probe, X, task, fit, choose, test)
        yield Outcome(choose, test, scores, n_train)


def fit_closed(probe, X, task, fit, choose, test):
    """Scores of LDA or ridge, fitted again with the rows that chose the penalty."""
    solve_all, Y = CLOSED[probe], task.targets()
    X = X - X[:, fit].mean(1, keepdim=True)  # any shift: it keeps the sums small
    sums = summed_products(X[:, fit], Y[fit])
    outputs = apply(solve_all(sums, Y.size(1)), X[:, choose])  # (G, n, penalties, C)
    losses = (outputs - Y[choose][:, None]).square().sum(3)
    if probe == "LDA":
        losses = -(outputs.log_softmax(3) * Y[choose][:, None]).sum(3)
    best = losses.mean(1).argmin(1)
    sites = torch.arange(len(X))
    sums += summed_products(X[:, choose], Y[choose])
    weights = solve_all(sums, Y.size(1))[sites, :, best]
    scores = [outputs[sites, :, best], apply(weights[:, :, None], X[:, test])[:, :, 0]]
    if probe == "LDA":
        scores = [part.double().softmax(2) for part in scores]
    if task.kind == "binary":
        scores = [part[:, :, 1:] for part in scores]
    return [part.numpy() for part in scores]


def fit_sklearn(probe, X, task, fit, choose, test):
    """Scores of a scikit-learn probe at each site, fitted again with the rows to choose on."""
    train = np.concatenate([fit, choose])
    chosen, tested = [], []
    for x in X.numpy():
        model = build(probe, x.shape[1], task).fit(x[fit], task.y[fit])
        chosen.append(model(x[choose]).reshape(len(choose), -1))
        model = build(probe, x.shape[1], task).fit(x[train], task.y[train])
        tested.append(model(x[test]).reshape(len(test), -1))
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
    fpr, tpr, cuts = metrics.roc_curve(y, score, drop_intermediate=False)
    n_positive = np.sum(y == 1)
    tp = np.nan_to_num(tpr) * n_positive
    fp = np.nan_to_num(fpr) * (len(y) - n_positive)
    cuts[0] = np.nextafter(cuts[1], np.inf)  # nothing is said to be 1
    cuts[1:-1] = (cuts[1:-1] + cuts[2:]) / 2
    f1 = 2 * tp / np.maximum(tp + fp + n_positive, 1)
    return {"accuracy": cuts[np.argmax(tp - fp)], "f1": cuts[np.argmax(f1)]}


def evaluator(y, score, kind="binary", thresholds=None):
    """Measures of scores: MSE, R² and Pearson's r of a regression; MSE, accuracy and F1 (each at
    its threshold) and more of two classes; of several classes, score (n, K), no MSE."""
    if kind == "regression":
        a, b = score - score.mean(0), y - y.mean(0)
        norm = np.sqrt(np.square(a).sum(0) * np.square(b).sum(0))
        r = np.mean((a * b).sum(0) / np.maximum(norm, 1e-12))  # mean over columns
        mse, r2 = metrics.mean_squared_error(y, score), metrics.r2_score(y, score)
        return {"mse": mse, "r2": r2, "pearson": r}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fold may lack a class
        if kind == "multi":
            said = score.argmax(1)
            f1 = metrics.f1_score(y, said, labels=np.unique(y), average="macro")
            balanced = metrics.balanced_accuracy_score(y, said)
            return {"accuracy": np.mean(said == y), "balanced_accuracy": balanced, "f1": f1}
        thresholds = thresholds or {"accuracy": 0.5, "f1": 0.5}
        said = score >= thresholds["accuracy"]
        return {
            "mse": np.mean(np.square(score - y)),
            "accuracy": np.mean(said == y),
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


def corrected_t(scores, chance, ratio, n_test):
    """Mean, 95 % interval and p (above chance) of the scores of folds that share training texts.

    ratio: a fold's size over that of what is learnt from (Nadeau & Bengio 2003). Folds that agree
    by luck are no surer than half a text.
    """
    J, mean = len(scores), np.mean(scores)
    error = max(math.sqrt((1 / J + ratio) * np.var(scores, ddof=1)), 0.5 / (n_test * J))
    half = scipy.stats.t.ppf(0.975, J - 1) * error
    return mean, mean - half, mean + half, scipy.stats.t.sf((mean - chance) / error, J - 1)


def holm(p):
    """Holm's correction of p-values (m,): the family-wise error over all of them."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected


def online_code(X, y, groups, n_classes, seed):
    """Bits (N,) of each label of X (N, H) in Voita & Titov's online code.

    Labels are sent block by block, each coded by a logistic probe that has learnt the blocks
    before; one guess in n + 1 is left to chance, so a label never seen costs finite bits.
    """
    names, member = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(key_seed(seed, "online"))
    order = np.argsort(rng.permutation(len(names))[member], kind="stable")
    shares = np.array([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50, 100]) / 100
    ends = np.unique(np.maximum(2 * n_classes, np.round(shares * len(y)).astype(int)))
    bits = np.full(len(y), math.log2(n_classes))
    for start, end in pairwise(ends):
        learn, code = order[:start], order[start:end]
        classes = np.unique(y[learn])
        if len(classes) < 2:
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        p = np.full((len(code), n_classes), 1 / n_classes)
        p[:, classes] += start * model.fit(X[learn], y[learn]).predict_proba(X[code])
        bits[code] = -np.log2(p[np.arange(len(code)), y[code]] / (start + 1))
    return bits


# ---- the sweep


class AllTokens(PoolToken):
    """Every token of a layer: what probes read that pool the tokens themselves."""

    def __init__(self, layer):
        super().__init__(layer, "all", None, "concat")

    def label(self, n_layer):
        names = {"quantile": "attention", "quantile_method": "attention"}
        return {**super().label(n_layer), **names}


class Sites:
    """Where one model is read on one dataset: a site for each pooler."""

    def __init__(self, model, dataset, poolers, config):
        self.model, self.dataset, self.poolers, self.config = model, dataset, poolers, config
        self.labels = [pooler.label(model.n_layer) for pooler in poolers]
        layers, poolings = set(), []
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
        size = self.config.batch_tokens
        rows, _ = self.dataset.load_embeds_into_memory(self.model, pooler, batch_tokens=size)
        index = self.dataset.index
        if not isinstance(pooler, AllTokens):
            return rows, index
        place = pd.Series(index).groupby(index).cumcount().to_numpy()
        X = np.full((len(self.dataset), place.max() + 1, rows.shape[1]), np.nan, np.float32)
        X[index, place] = rows
        return X, np.arange(len(X))

    def batches(self):
        """X (G, N, H) and index (N,) of neighbouring sites of equal shape, up to 256 MB of them."""
        group, index = [], None
        for pooler in self.poolers:
            X, texts = self.vectors(pooler)
            full = group and (len(group) + 1) * X.nbytes > 2**28
            if group and (full or X.shape != group[0].shape or not np.array_equal(texts, index)):
                yield torch.from_numpy(np.stack(group)), index
                group = []
            group.append(X)
            index = texts
        yield torch.from_numpy(np.stack(group)), index


def measure(sites, probe, task):
    """A DataFrame of measures and chance levels, a row for each site and fold; and one of scores, a
    row for each text that was tested in the first repetition, unless there are several a text."""
    rows, scores = [], []
    first = 0
    for X, index in sites.batches():
        part = task.take(index)
        texts_per_row = len(np.unique(index)) / len(index)
        for repetition, folds in enumerate(part.folds):
            fold_size = part.learn.sum() / (folds.max() + 1)
            for fold, outcome in enumerate(fit_folds(probe, X, part, folds)):
                about = {"repetition": repetition, "fold": fold}
                sizes = {"ratio": fold_size / outcome.n_train}
                sizes["n_train"] = outcome.n_train * texts_per_row
                sizes["n_test"] = len(outcome.test) * texts_per_row
                sizes["n"] = len(np.unique(index[part.judge]))
                for name, value in chance_measures(part, outcome.test).items():
                    sizes[f"chance {name}"] = value
                for g in range(len(X)):
                    about["site"] = first + g
                    measures, threshold = judge(part, outcome, g)
                    rows.append({**about, **sizes, **measures})
                    tested = outcome.scores[1][g]
                    if repetition == 0 and tested.shape[1] == 1:
                        texts = {"index": index[outcome.test], "y": part.y[outcome.test]}
                        texts |= {"score": tested[:, 0], "threshold": threshold}
                        scores.append(pd.DataFrame({**about, **texts}))
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
    primary = PRIMARY[task.kind]
    measures["validation"] = evaluator(y_choose, chosen, task.kind, thresholds)[primary]
    return measures, thresholds["accuracy"]


def statistics(folds, metric):
    """Columns of results.csv out of the folds of one site: p is None where nothing is tested."""
    chance, n_test = folds[f"chance {metric}"].mean(), folds.n_test.mean()
    score, low, high, p = corrected_t(folds[metric], chance, folds.ratio.mean(), n_test)
    low, high = np.clip([low, high], *BOUNDS.get(metric, (0, 1)))
    p = None if metric == "mse" else float(p)
    row = {"score": score, "chance": chance, "low": low, "high": high, "n": folds.n.iloc[0]}
    return {**row, "metric": metric, "n_train": round(folds.n_train.mean()), "p": p}


def write_rows(run, folds, labels, keys, primary):
    """Rows of every site, p corrected over all of them, and of the layer that the rows to choose on
    liked best, fold by fold; returns that one, or the only site's."""
    tested = keys["baseline"] == ""
    names = [name.removeprefix("chance ") for name in folds if name.startswith("chance ")]
    for metric in names:
        rows = [statistics(part, metric) for _, part in folds.groupby("site")]
        p_holm = holm([np.nan if row["p"] is None else row["p"] for row in rows])
        for row, label, corrected in zip(rows, labels, p_holm):
            if not tested:
                row["p"] = None
            p = None if row["p"] is None else float(corrected)
            run.result(**{**row, **keys, **label, "p_holm": p})
    best = folds.loc[folds.groupby(["repetition", "fold"]).validation.idxmax()]
    row = statistics(best, primary)
    if not tested:
        row["p"] = None
    if len(labels) > 1:
        label = {"layer": "best", "quantile": "best", "layer_method": "", "quantile_method": ""}
        run.result(**{**row, **keys, **label, "p_holm": row["p"]})
    return {**row, "layer": labels[best.site.mode()[0]]["layer"]}


def slug(*names):
    """One file name out of several names."""
    return "__".join(str(name).replace("/", "-") for name in names)


def keep_for_app(run, sites, name, folds, scores):
    """Logs in JSON, and the out-of-fold scores of each site."""
    model, dataset = sites.model.name, sites.dataset
    logs = {}
    for site, (pooler, label) in enumerate(zip(sites.poolers, sites.labels)):
        part = folds[folds.site == site]
        about = {"model": model, "classifier": name}
        for key in ("layer", "quantile", "layer_method", "quantile_method"):
            about[key] = getattr(pooler, key)
        about["attention"] = isinstance(pooler, AllTokens)
        columns = {"accuracy": "Accuracy", "f1": "F1"}
        if dataset.kind == "regression":
            columns = {"mse": "MSE"}
        data = {title: part[column].tolist() for column, title in columns.items()}
        logs[f"experiment_{site}"] = {"metadata": dataset.meta, "expdata": about, "data": data}
        if run.config.keep_predictions and scores is not None:
            kept = scores[scores.site == site]
            place = []
            for what in ("layer", "quantile"):
                method = label[f"{what}_method"]
                plain = method in ("", "mean", "attention", label[what])
                place.append(label[what] if plain else f"{label[what]}-{method}")
            path = folder(run, "predictions") / f"{slug(model, dataset.name, name, *place)}.npz"
            arrays = {key: kept[key].to_numpy() for key in ("index", "y", "score", "fold")}
            with aside(path) as file:
                np.savez(file, **arrays, threshold=kept.threshold.mean())
    path = folder(run, "logs") / f"{slug(model, dataset.name, name)}.json"
    write_aside(path, json.dumps(logs))


def folder(run, name):
    path = run.out / name
    path.mkdir(exist_ok=True)
    return path


def keep_projections(run, sites):
    """The texts, and the first two principal components of every site of one row a text."""
    dataset = sites.dataset
    labels = dataset.y
    if dataset.label_names:
        labels = np.array(dataset.label_names)[dataset.y]
    if labels.ndim == 1:
        texts = pd.DataFrame({"index": range(len(dataset)), "text": dataset.texts, "label": labels})
        path = folder(run, "texts") / f"{slug(dataset.name)}.csv"
        write_aside(path, texts.to_csv(index=False))
    for pooler, label in zip(sites.poolers, sites.labels):
        if label["layer_method"] or len(pooler.quantiles) > 1:
            continue
        X = torch.from_numpy(sites.vectors(pooler)[0])
        X = X - X.mean(0)
        value, vector = torch.linalg.eigh(X.T @ X)
        vector = vector[:, [-1, -2]]
        xy = X @ (vector * vector.sum(0).sign())  # the same signs on every machine
        method = label["quantile_method"]
        quantile = label["quantile"] if method in ("", "mean") else f"all-{method}"
        name = slug(sites.model.name, dataset.name, label["layer"], quantile)
        explained = (value[[-1, -2]] / value.sum()).numpy()
        with aside(folder(run, "projections") / f"{name}.npz") as file:
            np.savez(file, xy=xy.numpy(), index=np.arange(len(X)), explained=explained)


def usable_probes(dataset, probes):
    """The probes that can answer: no classifier does a regression, only ridge several columns."""
    if dataset.kind != "regression":
        return probes
    usable = []
    for probe in probes:
        is_class = isinstance(PROBES.get(probe, probe), type)
        discrete = probe == "LDA" or (probe in PROBES and not is_class)
        if probe == "Ridge" or (dataset.y.ndim == 1 and not discrete):
            usable.append(probe)
    return usable or ["Ridge"]


class Pair:
    """One model on one dataset: everything that is measured."""

    def __init__(self, run, model, twin, dataset, poolers):
        self.run, self.config = run, run.config
        self.model, self.twin, self.dataset, self.poolers = model, twin, dataset, poolers
        self.primary = PRIMARY[dataset.kind]
        self.task = make_task(dataset, self.config)
        self.sites = Sites(model, dataset, poolers, self.config)
        if self.config.keep_predictions:
            keep_projections(run, self.sites)

    def keys(self, probe, baseline=""):
        model, dataset = self.model, self.dataset
        keys = {"model": model.name, "dataset": dataset.name, "probe": name_of(probe)}
        keys |= {"baseline": baseline, "params": model.params}
        return {**keys, "synthetic": bool(dataset.meta.get("synthetic"))}

    def sites_of(self, probe, model):
        """Of the model or its twin; a probe that reads all tokens has a site for each layer."""
        poolers = self.poolers
        if reads_tokens(probe):
            poolers = [AllTokens(layer) for layer in model.layers(self.config.layers)]
        elif model is self.model:
            return self.sites
        return Sites(model, self.dataset, poolers, self.config)

    def measure(self, probe, is_first, is_first_closed):
        """Everything about one probe; the majority's rows come last, and say that all is there."""
        run, config, primary = self.run, self.config, self.primary
        sites = self.sites_of(probe, self.model)
        folds, scores = measure(sites, probe, self.task)
        best = write_rows(run, folds, sites.labels, self.keys(probe), primary)
        said = f"{name_of(probe)} {in_words(best)} (most often layer {best['layer']})"
        keep_for_app(run, sites, name_of(probe), folds, scores)
        if self.twin is not None:
            said += f", random weights {in_words(self.measure_twin(probe))}"
        if "layer0" in config.baselines and not reads_tokens(probe):
            bag = Sites(self.model, self.dataset, [PoolToken(0, "all", None, "mean")], config)
            part, _ = measure(bag, probe, self.task)
            row = write_rows(run, part, bag.labels, self.keys(probe, "layer0"), primary)
            said += f", bag of embeddings {row['score']:.3f}"
        if "control" in config.baselines and is_first:
            said += f", control task {self.measure_control(probe):.3f}"
        if "compression" in config.baselines and is_first and self.dataset.kind != "regression":
            self.measure_compression()
        if is_first_closed:
            self.measure_sizes(probe, folds.n_train.mean())
        label = dict.fromkeys(("layer", "quantile", "layer_method", "quantile_method"), "")
        one = folds[folds.site == 0]
        for name in [name for name in folds if name.startswith("chance ")]:
            row = statistics(one.assign(**{name[7:]: one[name]}), name[7:])
            row |= {"p": None, "p_holm": None}
            run.result(**{**row, **self.keys(probe, "majority"), **label})
        said += f", majority {one[f'chance {primary}'].mean():.3f}"
        end = f"({primary}, n = {len(self.dataset)})"
        run.print(f"{self.model.name} {self.dataset.name}: best layer on validation: {said} {end}")

    def measure_twin(self, probe):
        sites = self.sites_of(probe, self.twin)
        folds, _ = measure(sites, probe, self.task)
        keys = self.keys(probe, "random_init")
        return write_rows(self.run, folds, sites.labels, keys, self.primary)

    def measure_control(self, probe):
        """Control task and selectivity, both learnt and judged where texts share their words."""
        labels, primary = self.sites.labels, self.primary
        y = control_labels(self.dataset, self.config.seed)
        real, _ = measure(self.sites, probe, make_task(self.dataset, self.config, within=True))
        other, _ = measure(self.sites, probe, make_task(self.dataset, self.config, y, within=True))
        write_rows(self.run, other, labels, self.keys(probe, "control"), primary)
        gap = real.assign(selectivity=real[primary] - other[primary])
        gap["chance selectivity"] = 0.0
        rows = [statistics(part, "selectivity") for _, part in gap.groupby("site")]
        p_holm = holm([row["p"] for row in rows])
        for row, label, p in zip(rows, labels, p_holm):
            self.run.result(**{**row, **self.keys(probe), **label, "p_holm": p})
        return other.groupby("site")[primary].mean().max()

    def measure_compression(self):
        """n log2 K over the bits of the online code, with a normal interval over texts."""
        task, groups = self.task, self.dataset.groups
        n_classes = task.targets().size(1)
        for baseline, model in (("", self.model), ("random_init", self.twin)):
            if model is None:
                continue
            sites = self.sites_of("Logistic", model)
            labels = iter(sites.labels)
            for X, index in sites.batches():
                learn = index[task.learn[index]]
                for x in X[:, task.learn[index]].numpy():
                    seed = self.config.seed
                    bits = online_code(x, task.y[learn], groups[learn], n_classes, seed)
                    spread = 1.96 * bits.std() * math.sqrt(len(bits))
                    uniform = len(bits) * math.log2(n_classes)
                    row = {"score": uniform / bits.sum(), "chance": 1.0, "n": len(bits)}
                    row["low"] = uniform / (bits.sum() + spread)
                    row["high"] = uniform / max(bits.sum() - spread, 1e-9)
                    row |= {"metric": "compression", "n_train": len(bits), "p": None}
                    keys = {**self.keys("Logistic", baseline), **next(labels), "p_holm": None}
                    self.run.result(**row, **keys)

    def measure_sizes(self, probe, most):
        """The sample-size curve."""
        few = 4 * self.config.n_folds * self.task.targets().size(1)
        for n in self.config.train_sizes:
            if few <= n < 0.9 * most:
                folds, _ = measure(
                    self.sites, probe, make_task(self.dataset, self.config, n_train=n)
                )
                write_rows(self.run, folds, self.sites.labels, self.keys(probe), self.primary)


def in_words(row):
    return f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def all_poolers(config, model, extra):
    """Each layer x each quantile, then the ones written out; of equal ones the first."""
    poolers = {}
    plain = []
    for layer in model.layers(config.layers):
        plain += [token_pooler(layer, quantile) for quantile in config.quantiles]
    for pooler in [*plain, *[PoolToken(**options) for options in config.poolers], *extra]:
        poolers.setdefault(str(pooler.label(model.n_layer)), pooler)
    return list(poolers.values())


def experiment(config, lms=None, datasets=None, probes=None, poolers=()):
    """The sweep: models x datasets dealt over the ranks. Returns the results as a DataFrame."""
    run = Run(config)
    lms, probes = lms or config.lm, probes or config.probe
    loaded = []
    for spec in datasets or config.dataset:
        loaded += [part.first(config.max_texts) for part in load_dataset(run, config, spec)]
    content = hashlib.sha256()
    for dataset in loaded:
        if config.split == "cv":
            dataset.split = None
        make_folds(dataset, config.n_folds, 0)  # a rare label is better known now than in an hour
        content.update(repr([dataset.texts, dataset.y.tolist(), dataset.groups.tolist()]).encode())
        if config.shuffle_labels:
            dataset.y = shuffled(dataset, np.random.default_rng(key_seed(config.seed, "shuffle")))
    models = {}
    for number, spec in enumerate(lms):
        models = {number: LMModel(spec, run.device, run.dtype, bos=config.bos)}
        all_poolers(config, models[number], poolers)  # an unknown layer is told before any work
        content.update(models[number].fingerprint().encode())
    run.content = content.hexdigest()[:8]
    rows = run.rows()
    for number, dataset in run.share([(m, d) for m in range(len(lms)) for d in loaded]):
        if number not in models:
            models = {number: LMModel(lms[number], run.device, run.dtype, bos=config.bos)}
        probe_pair(run, models[number], dataset, probes, poolers, rows)
    table = run.merge()
    if run.master:
        plot_layers(run.out, table)
        run.print(f"results.csv, logs and figures in {run.out}: streamlit run probe_app.py")
    run.close()
    return table


def probe_pair(run, model, dataset, probes, poolers, rows):
    """Whatever is not among the rows of one model and one dataset."""
    config = run.config
    probes = usable_probes(dataset, probes)
    first = [probe for probe in probes if not reads_tokens(probe)][:1]
    closed = [probe for probe in probes if probe in CLOSED][:1]
    todo = []
    for probe in probes:
        keys = (model.name, dataset.name, name_of(probe), "majority")
        columns = ["model", "dataset", "probe", "baseline"]
        if not len(rows) or not (rows[columns] == keys).all(axis=1).any():
            todo.append(probe)
    if todo:
        twin = model.random_twin(config.seed) if "random_init" in config.baselines else None
        pair = Pair(run, model, twin, dataset, all_poolers(config, model, poolers))
        for probe in todo:
            pair.measure(probe, probe in first, probe in closed)


def run_exp(dataset_paths, model_names, poolers=(), classifiers=("LDA",), **options):
    """The experiment as a function; returns the DataFrame of results.csv.

    dataset_paths: data-json files, dicts, NLPDatasets or NAME/TASK; model_names: names, folders or
    {'model', 'tokenizer'}; poolers: PoolTokens; classifiers: names, or constructors input_size ->
    SingleStepOpt or MultiStepOpt; options: fields of Config, logs_folder is out_dir.
    """
    if "logs_folder" in options:
        options["out_dir"] = str(options.pop("logs_folder"))
    if poolers:
        options.setdefault("quantiles", [])
    names = []
    for model in model_names:
        names.append(
            str(model.get("name", type(model["model"]).__name__))
            if isinstance(model, dict)
            else str(model)
        )
    datasets = [getattr(data, "name", None) or str(data)[:200] for data in dataset_paths]
    config = Config(lm=names, dataset=datasets, **options)
    config.probe = [probe for probe in classifiers if isinstance(probe, str)]
    check(config)
    config.probe = [name_of(probe) for probe in classifiers]
    config.poolers = [str(vars(pooler)) for pooler in poolers]
    return experiment(config, list(model_names), list(dataset_paths), list(classifiers), poolers)


# ---- plots

COLOURS = ["#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#dfab01"]


def plot_layers(out, table):
    """layers_MODEL.png: scores over layers at one pooling with 95 % bands, a panel a dataset."""
    usual = table.groupby(["model", "dataset", "probe", "baseline"]).n_train.transform("max")
    table = table[(table.n_train == usual) & table.metric.isin(list(PRIMARY.values()))]
    table = table.assign(number=pd.to_numeric(table.layer, errors="coerce"))
    for model, part in table[table.number.notna() | (table.baseline == "majority")].groupby(
        "model"
    ):
        datasets = list(part.dataset.unique())
        columns = min(len(datasets), 3)
        n_rows = -(-len(datasets) // columns)
        size = (3.6 * columns, 2.8 * n_rows + 0.9)
        figure, axes = plt.subplots(
            n_rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for ax in axes.flat[len(datasets) :]:
            ax.set_visible(False)
        handles = {}
        for ax, dataset in zip(axes.flat, datasets):
            draw_panel(ax, part[part.dataset == dataset])
            ax.set_title(dataset, fontsize=9)
            for handle, label in zip(*ax.get_legend_handles_labels()):
                handles[label] = handle
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
        note = "; synthetic sentences" if part.synthetic.astype(bool).any() else ""
        figure.suptitle(f"{model}: what each layer knows (95 % bands){note}", fontsize=10)
        with aside(out / f"layers_{slug(model)}.png") as file:
            figure.savefig(file, dpi=130, format="png")
        plt.close(figure)


def draw_panel(ax, rows):
    """One dataset: probes in colour, the baselines of the first probe in grey."""
    real = rows[(rows.baseline == "") & (rows.layer_method == "")]
    quantiles = [q for q in real["quantile"].unique() if q != "attention"] or ["attention"]
    quantile = "1.0" if "1.0" in quantiles else quantiles[-1]
    at_quantile = rows["quantile"].isin([quantile, "attention"])
    for colour, (probe, part) in zip(COLOURS, real[at_quantile].groupby("probe", sort=False)):
        part = part.drop_duplicates("number").sort_values("number")
        ax.plot(part.number, part.score, "o-", ms=3, c=colour, label=probe)
        ax.fill_between(part.number, part.low, part.high, color=colour, alpha=0.13, lw=0)
    first = rows[(rows.probe == real.probe.iloc[0])]
    styles = {"random_init": ("--", "random weights"), "control": (":", "control task")}
    for baseline, (style, name) in styles.items():
        part = first[(first.baseline == baseline) & at_quantile].sort_values("number")
        if len(part):
            label = f"{name} ({part.probe.iloc[0]})"
            ax.plot(part.number, part.score, style, c="#888888", label=label)
    levels = {"layer0": ("-.", "bag of embeddings"), "majority": ("-", "majority")}
    for baseline, (style, name) in levels.items():
        part = first[first.baseline == baseline]
        if len(part):
            ax.axhline(part.score.iloc[0], ls=style, lw=1, c="#b08900", label=name)
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
