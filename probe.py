"""What do the hidden layers of a frozen language model know? Probes of every layer, in one pass.

    python probe.py                          # the model of train.py on data/grammar, offline
    python probe.py config/probe_gpt2.yaml   # GPT-2; run data/probing/get_data.py first
    torchrun --standalone --nproc_per_node=4 probe.py config/probe_gpt2.yaml
    streamlit run probe_app.py               # explore the results in out/

Each text runs through each model once. Its hidden states are pooled as the model runs, and only the
pooled vectors are kept, in a cache that other embedding studies can read (data/states.py).

Folds are grouped and stratified: one is tested, the next selects penalty, threshold, epoch and
layer, and the rest train the probe. Scores come with the majority guess, the bag of embeddings
(layer 0), the same architecture with random weights, a control task (a random label for each word
type), the description length, and an interval. p-values are corrected over layers and poolings.
Hewitt & Liang 2019 (control tasks); Voita & Titov 2020 (online code); Nadeau & Bengio 2003
(corrected t); Conneau et al. 2018 (SentEval).
"""

import hashlib
import inspect
import json
import math
import sys
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
import scipy.linalg
import scipy.stats
import torch
from sklearn import metrics
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import (
    LinearDiscriminantAnalysis,  # noqa: F401 (users' probes after `from probe import *`)
    QuadraticDiscriminantAnalysis,
)
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

from configurator import InputError, Run, check, check_keys, configure, key_seed, load_function
from convert import HiddenStates
from data import aside, file_hash, write_aside
from data.labelled_texts import LabelledTexts
from data.states import PoolToken, pooled_states

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
GRAMMAR = ["tense", "subj_number", "depth", "bigram_shift", "coord_inversion", "odd_man_out"]
BASELINES = ["layer0", "random_init", "control", "compression"]
HARMLESS = (
    "The least populated|y_pred contains|No (posi|nega)tive|F-score|A single label|An input array"
)
warnings.filterwarnings("ignore", HARMLESS)  # folds without a class, constant predictions


def default(*values):
    """Declare a list option with these default values."""
    return field(default_factory=lambda: list(values))


@dataclass
class Config:
    # ---- input
    lm: list[str] = default("out/train")  # run folders, or Hugging Face models by name or folder
    # NAME/TASK under data/, NAME for all its tasks or its brain responses, or a data-json file
    dataset: list[str] = default(*[f"grammar/{task}" for task in GRAMMAR])
    layers: list[int] = default()  # 0: the embeddings, -1: the last layer; empty: all
    quantiles: list[str] = default("0.5", "1.0", "mean")  # 0: the first token; or max, min
    poolers: list[dict] = default()  # further poolings: {layer: [2, 3], layer_method: extend}
    max_texts: int = 0  # use the first texts of each dataset; 0: all
    force_classification: bool = False  # round regression labels to 0 and 1
    # ---- probes
    probe: list[str] = default("LDA", "Logistic")  # names in PROBES below, or my_file.py:Name
    split: Literal["given", "cv"] = "given"  # the dataset's split, or folds over all texts
    n_folds: int = 5  # outer folds
    n_seeds: int = 1  # repetitions with different folds
    train_sizes: list[int] = default(100, 300, 1000)  # learning curve of the first probe
    baselines: list[str] = default(*BASELINES)  # control, compression: first probe only
    shuffle_labels: bool = False  # null test: scores must fall to chance
    # ---- run
    batch_tokens: int = 4096  # tokens per forward pass, padding included
    cache: str = "out/cache"  # pooled states, shared by all runs
    cache_dtype: Literal["float16", "float32"] = "float32"  # float16 halves the disk space
    keep_predictions: bool = True  # out-of-fold scores and projections for the app
    out_dir: str = "out/probe"  # results.csv, logs/, figures and files for the app
    seed: int = 1337  # folds, probes, random twin
    device: str = "auto"  # for the language model: cuda, mps, cpu; probes run on the CPU
    dtype: str = "float32"  # of the forward pass; auto: bfloat16 where it is faster

    POSITIVE = "batch_tokens n_seeds"

    def check(self):
        check_keys([probe for probe in self.probe if ":" not in probe], PROBES, "probe")
        check_keys(self.baselines, BASELINES, "baselines")
        if self.n_folds < 3:
            raise InputError(f"n_folds={self.n_folds}: use at least 3, to train, select and test")
        if not self.quantiles and not self.poolers:
            raise InputError("quantiles and poolers are both empty: set one of them")
        for quantile in self.quantiles:
            PoolToken(0, quantile)
        for pooler in self.poolers:
            check_keys(pooler, PoolToken.__annotations__, "poolers")
            PoolToken(**pooler)


# ---- data


class NLPDataset(LabelledTexts):
    """Labelled texts (data/labelled_texts.py) that a model can be run on."""

    def load_embeds_into_memory(self, model, pooler, states=None):
        """Embed and pool the whole dataset; return X (N', H), float32, and y (N',).

        self.index (N',) is the text of each row: with 'concat' a text has several, which splits
        keep together (self.row_groups). states: from pooled_states; without them the model runs.
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
    """Load the datasets that dataset= names and apply the options to them."""
    datasets = []
    for spec in specs:
        if isinstance(spec, NLPDataset):
            datasets.append(spec)
        elif isinstance(spec, dict) or Path(spec).is_file():
            datasets.append(NLPDataset(spec, config.force_classification))
        elif spec.endswith(".json"):
            datasets.append(NLPDataset(HERE / "data" / spec, config.force_classification))
        else:
            name = spec
            task = ""
            if "/" in spec and not Path(spec).is_dir() and not (HERE / "data" / spec).is_dir():
                name, _, task = spec.rpartition("/")
            datasets += NLPDataset.from_folder(run.dataset(name), task)
    datasets = [dataset.first(config.max_texts) for dataset in datasets]
    for dataset in datasets:
        if config.split == "cv":
            dataset.split = None
        if config.shuffle_labels:
            rng = np.random.default_rng(key_seed(config.seed, "shuffle"))
            dataset.y = dataset.shuffled_labels(rng)
        dataset.task = make_task(dataset, config)
    return datasets


def check_distinct(names, option):
    """Refuse duplicate names, because results are stored by name."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{option}= has two entries named '{name}': rename or drop one")


def control_labels(dataset, seed):
    """Return Hewitt & Liang's control labels: each text's longest word fixes a random label.

    It is the label of a random text, so labels are as frequent as the real ones, and only
    memorising words can predict them.
    """
    y = dataset.y.copy()
    for i, text in enumerate(dataset.texts):
        word = max(text.split(), key=len).lower()
        y[i] = dataset.y[key_seed(seed, "control", word) % len(dataset)]
    return y


# ---- model


class LMModel(HiddenStates):
    """A frozen language model: convert.HiddenStates, called with texts."""

    def __call__(self, texts):
        """Return hidden_states, (n_layer + 1) x (B, T, H), and attention_mask, input_ids (B, T)."""
        ids, real = self.pad(self.encode(texts)[0])
        states = tuple(self.states(ids, real).values())
        return {"hidden_states": states, "attention_mask": real.long(), "input_ids": ids}

    def fingerprint(self):
        """Hash the tokenizer, architecture, weights and precision."""
        tokenizer = getattr(self.tokenizer, "state", None)
        if hasattr(self.tokenizer, "backend_tokenizer"):  # each call changes its padding
            tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
            tokenizer |= {"truncation": None, "padding": None}
        elif self.foreign_tokenizer:
            tokenizer = sorted(self.tokenizer.get_vocab().items())
        config = getattr(self.model, "config", "")
        facts = f"{tokenizer} {type(self.model)} {config} {self.dtype}"
        digest = hashlib.sha256(facts.encode("utf-8", "replace"))
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            # sum the bits on the device: hashing gigabytes would take as long as a forward pass
            bits = tensor.contiguous().view(-1).view(torch.uint8)
            words = F.pad(bits, (0, -len(bits) % 8192)).view(torch.int64).view(-1, 1024)
            for axis in (0, 1):
                digest.update(words.sum(axis).cpu().numpy())
        return digest.hexdigest()


# ---- probes: fit_sites(X, task, fit, choose, test) trains on the rows `fit` of X (G, N, H) at each
# of G sites and returns scores (G, n, C) for the rows `choose`, followed by the rows `test`


class ClosedForm:
    """Linear probes solved in closed form on standardised features.

    A subclass sets discrete_targets (one-hot classes) and `penalties`, and defines solve(penalty)
    -> coefficients (H, C) and intercept (C,) from the covariances that fit(X, Y) stores.
    """

    def __init__(self, input_size):
        self.name = type(self).__name__

    def fit(self, X, Y):
        """Store the covariances of X (n, H) with itself and with Y (n, C), both float64."""
        self.n = len(Y)
        self.mean = X.mean(0)
        scale = X.std(0)
        self.scale = np.where(scale > 1e-6, scale, 1.0)  # 1 for constant features
        self.target_mean = Y.mean(0)
        Z = (X - self.mean) / self.scale
        self.XX = Z.T @ Z / self.n  # NumPy uses the symmetry and computes one half
        self.XY = Z.T @ (Y - self.target_mean) / self.n
        return self

    def predict(self, X, penalty):
        """Return values, or log-posteriors up to a constant, (n, C)."""
        coefficients, intercept = self.solve(penalty)
        weights = coefficients / self.scale[:, None]
        return X @ weights + (intercept - self.mean @ weights)

    def fit_sites(self, X, task, fit, choose, test):
        """Choose the penalty on the rows `choose`, then refit with them included."""
        kind = "multi" if self.discrete_targets else "regression"
        Y = task.targets().double()
        train = np.concatenate([fit, choose])
        sites = []
        for x in X.numpy():
            x = x.astype(float)
            self.fit(x[fit], Y[fit].numpy())
            outputs = np.stack([self.predict(x[choose], penalty) for penalty in self.penalties])
            best = losses_of(torch.from_numpy(outputs), Y[choose], kind).mean(1).argmin()
            self.fit(x[train], Y[train].numpy())
            sites.append(
                np.concatenate([outputs[best], self.predict(x[test], self.penalties[best])])
            )
        scores = as_scores(torch.from_numpy(np.stack(sites)), kind)
        return scores[:, :, 1:] if task.kind == "binary" else scores


def solve_shifted(A, shift, B):
    """Return (A + shift I)⁻¹ B for a covariance matrix A (H, H)."""
    A = A.copy()
    A[np.diag_indices_from(A)] += shift
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(A), B)


class Ridge(ClosedForm):
    """sklearn's Ridge(penalty) after StandardScaler."""

    discrete_targets = False
    penalties = (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)

    def solve(self, penalty):
        return solve_shifted(self.XX, penalty / self.n + 1e-6, self.XY), self.target_mean


class LDA(ClosedForm):
    """sklearn's LinearDiscriminantAnalysis("lsqr", penalty) after StandardScaler."""

    discrete_targets = True
    penalties = (0.003, 0.03, 0.1, 0.3, 0.7)

    def solve(self, penalty):
        prior = self.target_mean.clip(1e-12)
        means = self.XY / prior  # class means, (H, K)
        within = self.XX - (means * prior) @ means.T
        shift = penalty * within.diagonal().mean() + 1e-6
        coefficients = solve_shifted((1 - penalty) * within, shift, means)
        return coefficients, np.log(prior) - (means * coefficients).sum(0) / 2


# scikit-learn's fits are too small to gain from several threads, which only wait for one another
one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


class SingleStepOpt:
    """A scikit-learn probe.

    A subclass sets self.name, self.discrete_targets (targets are classes) and self.classifier, and
    may set self.grid, the classifier parameters to search. After fit(X, y), probe(X) returns
    scores: (n,), or (n, K) for several classes. Thresholds are set on a validation fold.
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

    @one_thread
    def fit_sites(self, X, task, fit, choose, test):
        """Choose parameters by squared error on rows `choose`, then refit with them included."""
        targets = task.targets()[choose].numpy()
        grid = list(ParameterGrid(self.grid))
        sites = []
        for x in X.numpy():
            scores = []
            for parameters in grid:
                self.classifier.set_params(**parameters)
                scores.append(self.fit(x[fit], task.y[fit])(x[choose]).reshape(len(choose), -1))
            losses = np.square(scores - targets[:, -scores[0].shape[1] :]).mean((1, 2))
            best = losses.argmin()
            self.classifier.set_params(**grid[best])
            train = np.concatenate([fit, choose])
            test_scores = self.fit(x[train], task.y[train])(x[test]).reshape(len(test), -1)
            sites.append(np.concatenate([scores[best], test_scores]))
        return np.stack(sites)


def sklearn_probe(classifier, **grid):
    """Return a constructor, input_size -> probe, for a scikit-learn classifier."""

    def make(input_size):
        probe = SingleStepOpt()
        probe.name = type(classifier).__name__
        probe.grid = grid
        probe.classifier = make_pipeline(StandardScaler(), clone(classifier))
        return probe

    return make


class MultiStepOpt(nn.Module):
    """A PyTorch probe.

    A subclass sets self.name, and self.layers or forward(X) -> (n, 1) logits (binary) or values
    (regression), or (n, K) logits. Adam trains it on standardised features and keeps the epoch that
    is best on a validation fold. The probes of all sites are stacked and trained together.
    """

    name = ""
    discrete_targets = False  # fits both classes and values
    batch_size = 128
    max_epoch = 30
    min_steps = 300  # a few hundred texts need more epochs
    learning_rate = 3e-3
    attention = False  # True: X is (n, T, H), the states of all tokens, padded with NaN

    def forward(self, X):
        return self.layers(X)

    def fit_sites(self, X, task, fit, choose, test):
        Y = task.targets()
        if task.kind == "binary":
            Y = Y[:, 1:]
        if not self.attention:
            X = X - X[:, fit].mean(1, keepdim=True)
            scale = X[:, fit].square().mean(1, keepdim=True).sqrt()
            X = X / torch.where(scale > 1e-6, scale, 1.0)
        params, buffers = torch.func.stack_module_state([self] * len(X))
        stacked = torch.vmap(partial(torch.func.functional_call, self), randomness="different")
        optimizer = torch.optim.Adam(params.values(), lr=self.learning_rate)
        state = {**params, **buffers}
        best = {name: value.detach().clone() for name, value in state.items()}
        lowest_loss = torch.full((len(X),), math.inf)
        n_batches = -(-len(fit) // self.batch_size)
        for epoch in range(max(self.max_epoch, self.min_steps // n_batches)):
            self.train()
            rng = np.random.default_rng(key_seed(task.seed, epoch))
            for rows in torch.from_numpy(rng.permutation(fit)).split(self.batch_size):
                optimizer.zero_grad()
                outputs = stacked((params, buffers), X[:, rows])
                losses_of(outputs, Y[rows], task.kind).mean(1).sum().backward()
                optimizer.step()
            self.eval()
            with torch.no_grad():
                outputs = stacked((params, buffers), X[:, choose])
            losses = losses_of(outputs, Y[choose], task.kind).mean(1)
            better = losses < lowest_loss
            lowest_loss = torch.where(better, losses, lowest_loss)
            for name, value in state.items():
                best[name][better] = value.detach()[better]
        with torch.no_grad():
            outputs = stacked(best, X[:, np.concatenate([choose, test])])
        return as_scores(outputs, task.kind)


class SingleLayer(MultiStepOpt):
    """A linear layer."""

    def __init__(self, input_size, output_size=1):
        super().__init__()
        self.layers = nn.Linear(input_size, output_size)


class DoubleLayer(MultiStepOpt):
    """One hidden layer of ReLU units."""

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

    Training holds the states of all tokens of one layer in memory.
    """

    max_epoch = 10
    attention = True

    def __init__(self, input_size, output_size=1):
        super().__init__()
        self.query = nn.Linear(input_size, 1)
        self.linear = nn.Linear(input_size, output_size)

    def forward(self, X):
        is_padding = X[:, :, 0].isnan()
        X = F.layer_norm(X.nan_to_num(), X.shape[-1:])
        weight = self.query(X)[:, :, 0].masked_fill(is_padding, -1e9).softmax(1)
        return self.linear((weight[:, :, None] * X).sum(1))


PENALTIES = [1e-3, 1e-2, 1e-1]  # C of logistic regression
PROBES = {
    "LDA": LDA,
    "Ridge": Ridge,
    "Logistic": sklearn_probe(LogisticRegression(max_iter=1000), logisticregression__C=PENALTIES),
    "SingleLayer": SingleLayer,
    "DoubleLayer": DoubleLayer,
    "GatedLayer": GatedLayer,
    "AttentionPool": AttentionPool,
    "QDA": sklearn_probe(QuadraticDiscriminantAnalysis(solver="eigen", shrinkage=0.1)),
    "NaiveBayes": sklearn_probe(GaussianNB()),
    "NearestCentroid": sklearn_probe(NearestCentroid()),
    "RandomForest": sklearn_probe(RandomForestClassifier(200, random_state=0)),
}


def constructors(probes):
    """Return {name: constructor} for names in PROBES, my_file.py:Name, and constructors."""
    names = []
    makers = []
    for probe in probes:
        make = probe
        if isinstance(probe, str):
            make = PROBES.get(probe) or load_function(probe, "probe")
        makers.append(make)
        names.append(probe if probe in PROBES else make(4).name or type(make(4)).__name__)
    check_distinct(names, "probe")
    return dict(zip(names, makers))


def build(make, width, task):
    """Build a probe of this input size, with one output per class if it takes output_size."""
    if task.kind == "multi" and "output_size" in inspect.signature(make).parameters:
        return make(width, output_size=task.n_labels)
    model = make(width)
    if task.kind == "multi" and isinstance(model, nn.Module):
        name = type(model).__name__
        raise InputError(f"probe {name} fits only two classes: give its constructor output_size=")
    return model


def losses_of(outputs, Y, kind):
    """Return the losses (..., n) of outputs (..., n, C) for targets (n, C)."""
    if kind == "multi":
        return -(outputs.log_softmax(-1) * Y).sum(-1)
    if kind == "binary":
        Y = Y.expand_as(outputs)
        return F.binary_cross_entropy_with_logits(outputs, Y, reduction="none").sum(-1)
    return (outputs - Y).square().sum(-1)


def as_scores(outputs, kind):
    """Return probabilities or values, in double precision so that confident ones stay distinct."""
    outputs = outputs.double()
    if kind == "multi":
        outputs = outputs.softmax(-1)
    elif kind == "binary":
        outputs = outputs.sigmoid()
    return outputs.numpy()


# ---- the task of a probe


@dataclass
class Task:
    """The rows of a dataset with their labels and folds; a row is a text, or a token of one."""

    kind: str
    n_labels: int  # 0 for regression
    text: np.ndarray  # (N,) the text of each row
    y: np.ndarray  # (N,) classes or values, or (N, V) values
    learn: np.ndarray  # (N,) bool: rows to train and select on
    judge: np.ndarray  # (N,) bool: rows to score
    folds: list  # per repetition, the fold (N,) of each row
    seed: int

    def take(self, index):
        """Return the task for rows that belong to the texts `index`."""
        rows = {key: getattr(self, key)[index] for key in ("text", "y", "learn", "judge")}
        return replace(self, folds=[fold[index] for fold in self.folds], **rows)

    def targets(self):
        """Return one-hot classes, or values, as floats (N, C)."""
        y = torch.as_tensor(self.y)
        if self.kind == "regression":
            return y.float().view(len(y), -1)
        return F.one_hot(y.long(), self.n_labels).float()

    def fewest_folds(self):
        """Count the folds in which the rarest label can be learnt; training leaves out two."""
        y = self.y if self.n_labels else np.zeros(len(self.y), int)
        fewest = math.inf
        for folds in self.folds:
            pairs = pd.DataFrame({"y": y, "fold": folds})[self.learn].drop_duplicates()
            fewest = min(fewest, np.bincount(pairs.y, minlength=max(self.n_labels, 1)).min())
        return fewest


def make_task(dataset, config):
    """Make the dataset's Task: only its test part, if it has one, is scored, and never trained on.

    Groups stay whole, and labels (deciles for a regression) are spread evenly over the folds.
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
        few = f"a label, or the test split, has only {fewest} texts or groups"
        raise InputError(f"{dataset.name}: {few}: set a smaller n_folds=, or split=cv")
    n_labels = len(dataset.label_names or [])
    texts = np.arange(len(dataset))
    task = Task(dataset.kind, n_labels, texts, dataset.y, ~test, judge, [], config.seed)
    for repetition in range(config.n_seeds):
        seed = key_seed(config.seed, repetition) % 2**31
        splitter = StratifiedGroupKFold(config.n_folds, shuffle=True, random_state=seed)
        folds = np.zeros(len(dataset), int)
        for fold, (_, rows) in enumerate(splitter.split(folds, strata, dataset.groups)):
            folds[rows] = fold
        task.folds.append(folds)
    if task.fewest_folds() < 3:
        few = "too few groups of training texts, or none, have one of the labels"
        raise InputError(f"{dataset.name}: {few}: add texts, or drop that label")
    return task


# ---- evaluate


def pearson(y, score):
    """Return Pearson's r, averaged over columns; 0 for constants."""
    return np.mean(np.nan_to_num(scipy.stats.pearsonr(score, y, axis=0).statistic))


def auc(y, score):
    """Return the area under the ROC curve; 0.5 if y has only one class."""
    return metrics.roc_auc_score(y, score) if 0 < np.mean(y) < 1 else 0.5


# ranges of the metrics that do not run from 0 to 1; selectivity is a difference of two scores
BOUNDS = {"mse": (0, np.inf), "r2": (-np.inf, 1)}
BOUNDS |= {"pearson": (-1, 1), "mcc": (-1, 1), "selectivity": (-2, 2)}
# the metric that selects layers and is plotted; any metric of the same kind will do
PRIMARY = {"binary": "accuracy", "multi": "accuracy", "regression": "pearson"}


def best_thresholds(y, score):
    """Return the thresholds that maximise accuracy and F1; score >= threshold predicts 1."""
    fpr, tpr, cuts = metrics.roc_curve(y, score, drop_intermediate=False)
    n_positive = np.sum(y == 1)
    tp = np.nan_to_num(tpr) * n_positive
    fp = np.nan_to_num(fpr) * (len(y) - n_positive)
    cuts[0] = np.nextafter(cuts[1], np.inf)  # predicts no 1
    cuts[1:-1] = (cuts[1:-1] + cuts[2:]) / 2
    f1 = 2 * tp / np.maximum(tp + fp + n_positive, 1)
    return {"accuracy": cuts[np.argmax(tp - fp)], "f1": cuts[np.argmax(f1)]}


def evaluator(y, score, kind="binary", thresholds=None):
    """Return {metric: value} for scores (n,), or (n, K) for several classes. Add your own here.

    Of two classes, score >= threshold predicts 1. F1 is for class 1, or averaged over y's classes.
    """
    if kind == "regression":
        return {
            "mse": metrics.mean_squared_error(y, score),
            "r2": metrics.r2_score(y, score),
            "pearson": pearson(y, score),
        }
    if kind == "multi":
        predictions = score.argmax(1)
        return {
            "accuracy": metrics.accuracy_score(y, predictions),
            "balanced_accuracy": metrics.balanced_accuracy_score(y, predictions),
            "f1": metrics.f1_score(y, predictions, labels=np.unique(y), average="macro"),
        }
    thresholds = thresholds or {"accuracy": 0.5, "f1": 0.5}
    predictions = score >= thresholds["accuracy"]
    return {
        "mse": metrics.mean_squared_error(y, score),
        "accuracy": metrics.accuracy_score(y, predictions),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, predictions),
        "mcc": metrics.matthews_corrcoef(y, predictions),
        "f1": metrics.f1_score(y, score >= thresholds["f1"]),
        "auc": auc(y, score),
    }


def chance_measures(task, test):
    """Return the test metrics of the best constant prediction, learnt from all `learn` rows."""
    y = task.y[task.learn]
    constant = task.targets()[task.learn].mean(0).numpy() if task.kind == "multi" else y.mean(0)
    thresholds = None
    if task.kind == "binary":
        thresholds = best_thresholds(y, np.full(len(y), constant))
    score = np.broadcast_to(constant, (len(test), *np.shape(constant)))
    return evaluator(task.y[test], score, task.kind, thresholds)


def holm(p):
    """Correct p-values (m,) for the family-wise error by Holm's method."""
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(np.take(p, order) * np.arange(len(p), 0, -1))
    return corrected.clip(max=1)[np.argsort(order)]


@one_thread
def online_code(X, y, groups, n_classes, seed):
    """Return the bits (N,) of each label, given X (N, H), in Voita & Titov's online code.

    Labels are sent block by block. A logistic probe trained on the n labels before a block codes
    it, with the penalty that has coded best so far. A uniform guess gets a weight of 1 in n + 1, so
    an unseen label costs finitely many bits.
    """
    group_ids, member = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(key_seed(seed, "online"))
    rank = rng.permutation(len(group_ids))[member]
    order = np.argsort(rank, kind="stable")
    group_ends = np.flatnonzero(np.diff(rank[order], append=-1)) + 1
    shares = np.array([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50, 100]) / 100
    ends = np.maximum(2 * n_classes, np.round(shares * len(y)).astype(int))
    ends = np.unique(group_ends[np.searchsorted(group_ends, ends)])  # groups stay whole
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


# ---- sites

NO_SITE = dict.fromkeys(("layer", "quantile", "layer_method", "quantile_method"), "")


class Sites:
    """The sites at which a model is read on a dataset: one per pooler and per row of `labels`.

    Without poolers, a site is every token of a layer, for probes that pool tokens themselves.
    """

    def __init__(self, model, dataset, poolers, config):
        self.model = model
        self.dataset = dataset
        self.all_tokens = poolers is None
        if self.all_tokens:
            layers = model.layers(config.layers)
            poolers = [PoolToken(layer, "all", None, "concat") for layer in layers]
        self.poolers = poolers
        self.labels = pd.DataFrame([pooler.label(model.n_layer) for pooler in poolers])
        if self.all_tokens:
            self.labels = self.labels.assign(quantile="attention", quantile_method="")
        layers = set()
        poolings = set()
        for pooler in poolers:
            if pooler.cacheable:
                layers.update(pooler.layers(model.n_layer))
                poolings.update(pooler.poolings)
        self.states = None
        if layers:
            args = (config.cache, config.batch_tokens, config.cache_dtype)
            self.states = pooled_states(model, dataset.texts, sorted(layers), poolings, *args)

    def vectors(self, pooler):
        """Return X (N', H), or (N, T, H) padded with NaN for all tokens, and each row's text."""
        X, _ = self.dataset.load_embeds_into_memory(self.model, pooler, self.states)
        index = self.dataset.index
        if not self.all_tokens:
            return X, index
        position = pd.Series(index).groupby(index).cumcount().to_numpy()
        tokens = np.full((index[-1] + 1, position.max() + 1, X.shape[1]), np.nan, np.float32)
        tokens[index, position] = X
        return tokens, np.arange(len(tokens))

    def batches(self):
        """Yield X (G, N, H) and index (N,) of adjacent sites with equal shapes, up to 256 MB."""
        group = []
        index = None
        for pooler in self.poolers:
            X, texts = self.vectors(pooler)
            same_shape = np.array_equal(texts, index) and X.shape == group[0].shape
            if group and (not same_shape or (len(group) + 1) * X.nbytes > 2**28):
                yield torch.from_numpy(np.stack(group)), index
                group = []
            group.append(X)
            index = texts
        yield torch.from_numpy(np.stack(group)), index


def read_sites(model, dataset, poolers, config):
    """Return {baseline: Sites} for the model ('') and the baselines that are read like it."""
    sites = {"": Sites(model, dataset, poolers, config)}
    if "random_init" in config.baselines:
        twin = model.random_twin(key_seed(config.seed, "random twin"))
        sites["random_init"] = Sites(twin, dataset, poolers, config)
    if "layer0" in config.baselines and poolers is not None:  # a bag: always the mean
        sites["layer0"] = Sites(model, dataset, [PoolToken(0, "mean")], config)
    return sites


# ---- measuring


def measure(sites, make, task):
    """Return two DataFrames: a row per site, repetition, fold and metric; and a row per test score.

    Scores (for several classes, the predicted one) come from the first repetition; the second table
    is None for targets with several columns.
    """
    tables = []
    scores = []
    first = 0
    for X, index in sites.batches():
        part = task.take(index)
        n = len(np.unique(index[part.judge]))
        for repetition, fold_of in enumerate(part.folds):
            for fold in range(fold_of.max() + 1):
                table, test, test_scores = measure_fold(make, X, part, fold_of, fold)
                tables.append(table.assign(repetition=repetition, site=first + table.site, n=n))
                if repetition == 0 and test_scores.ndim == 2:
                    columns = {"index": index[test], "y": part.y[test], "fold": fold}
                    for g, score in enumerate(test_scores):
                        scores.append(pd.DataFrame({**columns, "score": score, "site": first + g}))
        first += len(X)
    folds = pd.concat(tables, ignore_index=True).join(sites.labels, on="site")
    return folds, pd.concat(scores) if scores else None


def measure_fold(make, X, task, fold_of, outer):
    """Return the metrics of G sites in one outer fold, its test rows, and their scores.

    The next fold is the validation fold; the rest train. The validation rows set the thresholds,
    and the column `validation` is their primary metric. Scores are (G, n), or (G, n, C).
    """
    n_folds = fold_of.max() + 1
    inner = (outer + 1) % n_folds
    fit = np.flatnonzero(task.learn & (fold_of != outer) & (fold_of != inner))
    choose = np.flatnonzero(task.learn & (fold_of == inner))
    test = np.flatnonzero(task.judge & (fold_of == outer))
    torch.manual_seed(key_seed(task.seed, outer))
    model = build(make, X.size(-1), task)
    scores = model.fit_sites(X, task, fit, choose, test)
    if scores.shape[2] == 1:
        scores = scores[:, :, 0]
    validation_scores, test_scores = np.split(scores, [len(choose)], 1)
    chance = chance_measures(task, test)
    rows = []
    for g in range(len(X)):
        thresholds = {"accuracy": np.nan}
        if task.kind == "binary":
            thresholds = best_thresholds(task.y[choose], validation_scores[g])
        validation = evaluator(task.y[choose], validation_scores[g], task.kind, thresholds)
        row = {"site": g, "threshold": thresholds["accuracy"]}
        row["validation"] = validation[PRIMARY[task.kind]]
        for metric, score in evaluator(task.y[test], test_scores[g], task.kind, thresholds).items():
            rows.append({**row, "metric": metric, "score": score, "chance": chance[metric]})
    train = fit if isinstance(model, nn.Module) else np.concatenate([fit, choose])  # see fit_sites
    n_train = len(np.unique(task.text[train]))
    ratio = len(np.unique(task.text[task.learn])) / n_folds / n_train
    table = pd.DataFrame(rows).assign(fold=outer, n_train=n_train, ratio=ratio)
    return table, test, test_scores.argmax(2) if task.kind == "multi" else test_scores


def statistics(folds):
    """Return the columns of results.csv for the folds of one site and metric.

    Folds share training texts, hence the corrected resampled t-test: ratio is test over training
    size (Nadeau & Bengio 2003). Repetitions reuse the texts and add no degrees of freedom. The
    standard error is at least half a text, in case the folds agree by luck. p is one-sided, for a
    score above chance.
    """
    row = folds[["metric", *NO_SITE, "n"]].iloc[0].to_dict()
    row |= folds[["score", "chance"]].mean()
    variance = (1 / len(folds) + folds.ratio.mean()) * folds.score.var()
    t = {"df": folds.fold.nunique() - 1, "loc": row["score"]}
    t["scale"] = max(variance**0.5, 0.5 / row["n"])
    bounds = BOUNDS.get(row["metric"], (0, 1))
    row["low"], row["high"] = np.clip(scipy.stats.t.interval(0.95, **t), *bounds)
    row["p"] = row["p_holm"] = scipy.stats.t.cdf(row["chance"], **t)
    return {**row, "n_train": round(folds.n_train.mean())}


def chosen_by_validation(folds):
    """Select, in each fold, the site with the best validation score."""
    return folds.loc[folds.groupby(["repetition", "fold"]).validation.idxmax()]


def write_rows(run, folds, keys):
    """Write a row per metric and site, and one for the sites that validation chose in each fold.

    p is corrected over all sites, and left out for baselines and mse.
    """
    for metric, part in folds.groupby("metric", sort=False):
        rows = [statistics(of_site) for _, of_site in part.groupby("site")]
        for row, p in zip(rows, holm([row["p"] for row in rows])):
            row["p_holm"] = p
        if len(rows) > 1:
            best = {**NO_SITE, "layer": "best", "quantile": "best"}
            rows.append(statistics(chosen_by_validation(part).assign(**best)))
        for row in rows:
            if keys["baseline"] or metric == "mse":
                row |= {"p": None, "p_holm": None}
            run.result(**row, **keys)


def print_best(run, folds, keys):
    """Print the score at the layer that validation folds choose, and chance."""
    best = chosen_by_validation(folds[folds.metric.isin(PRIMARY.values())])
    names = [keys[key] for key in ("model", "dataset", "probe", "baseline") if keys[key]]
    values = {**statistics(best), "layer": best.layer.mode()[0], "names": " ".join(names)}
    run.print(
        "{names}: {metric} {score:.3f} [{low:.3f}, {high:.3f}], chance {chance:.3f}, n = {n}, "
        "layer by validation: {layer}".format(**values)
    )


def measure_control(run, sites, make, keys):
    """Measure the control task and selectivity within the training part, whose words recur."""
    task = replace(sites.dataset.task, judge=sites.dataset.task.learn)
    control_task = replace(task, y=control_labels(sites.dataset, task.seed))
    if control_task.fewest_folds() < 3:
        run.print(f"{sites.dataset.name}: a label is too rare for the control task: skipped")
        return
    real, _ = measure(sites, make, task)
    control, _ = measure(sites, make, control_task)
    write_rows(run, control, {**keys, "baseline": "control"})
    gain = real.assign(metric="selectivity", score=real.score - control.score, chance=0.0)
    write_rows(run, gain[real.metric == PRIMARY[task.kind]], {**keys, "baseline": ""})


def measure_compression(run, sites, keys):
    """Measure n log2 K over the bits of the online code, with a normal interval over texts."""
    task = sites[""].dataset.task
    if task.kind == "regression":
        return
    for baseline, part in sites.items():
        for pooler, label in zip(part.poolers, part.labels.to_dict("records")):
            X, index = part.vectors(pooler)
            learn = task.learn[index]
            texts = index[learn]
            groups = part.dataset.groups[texts]
            bits = online_code(X[learn], task.y[texts], groups, task.n_labels, task.seed)
            bits = pd.Series(bits).groupby(texts).sum()  # 'concat' gives a text several rows
            spread = 1.96 * bits.std(ddof=0) * math.sqrt(len(bits))
            sums = np.array([bits.sum(), bits.sum() + spread, bits.sum() - spread])
            score, low, high = len(texts) * math.log2(task.n_labels) / sums.clip(1e-9)
            row = {**keys, **label, "probe": "Logistic", "baseline": baseline}
            row |= {"metric": "compression", "n_train": len(bits), "p": None, "p_holm": None}
            run.result(score, 1.0, low, high, len(bits), **row)


def measure_sizes(run, sites, make, keys):
    """Measure the learning curve: random whole groups, to train on about n texts."""
    n_folds = run.config.n_folds
    task = sites.dataset.task
    rng = np.random.default_rng(key_seed(task.seed, "size"))
    groups = sites.dataset.groups
    sizes = pd.Series(groups[task.learn]).value_counts().sort_index()
    sizes = sizes.iloc[rng.permutation(len(sizes))].cumsum() * (1 - 1 / n_folds)
    smallest = 4 * n_folds * max(task.n_labels, 1)
    for n in run.config.train_sizes:
        part = replace(task, learn=task.learn & np.isin(groups, sizes.index[sizes <= n]))
        if n < smallest or part.fewest_folds() < 3:
            run.print(f"{sites.dataset.name}: {n} texts are too few for its labels or groups")
        elif n < 0.9 * sizes.max():
            folds, _ = measure(sites, make, part)
            write_rows(run, folds, {**keys, "baseline": ""})


# ---- files for the app


def slug(*names, label=None):
    """Join names, and a site's layer and quantile with their methods, into a file name."""
    names = list(names)
    if label:
        for what in ("layer", "quantile"):
            names.append("-".join(filter(None, [label[what], label[f"{what}_method"]])))
    return "__".join(names).replace("/", "-")


def keep_for_app(run, sites, name, folds, scores):
    """Write JSON logs and the out-of-fold scores of each site."""
    names = [sites.model.name, sites.dataset.name, name]
    titles = {"mse": "MSE", "accuracy": "Accuracy", "f1": "F1"}
    logs = {}
    for site, pooler in enumerate(sites.poolers):
        part = folds[folds.site == site]
        expdata = {"model": names[0], "classifier": name, "attention": sites.all_tokens}
        for key in NO_SITE:
            expdata[key] = getattr(pooler, key)
        data = part[part.metric.isin(titles)].groupby("metric").score.apply(list).rename(titles)
        log = {"metadata": sites.dataset.meta, "expdata": expdata, "data": data.to_dict()}
        logs[f"experiment_{site}"] = log
        if run.config.keep_predictions and scores is not None:
            site_scores = scores[scores.site == site].drop(columns="site")
            label = sites.labels.loc[site].to_dict()
            with aside(run.out / "predictions" / f"{slug(*names, label=label)}.npz") as file:
                np.savez(file, **site_scores, threshold=part.threshold.mean())
    write_aside(run.out / "logs" / f"{slug(*names)}.json", json.dumps(logs))


def keep_projections(run, sites):
    """Write the texts, and the first two principal components of each single-layer site."""
    if not run.config.keep_predictions:
        return
    dataset = sites.dataset
    table = pd.DataFrame({"text": dataset.texts, "label": ""}).rename_axis("index")
    if dataset.label_names:
        table["label"] = np.array(dataset.label_names)[dataset.y]
    elif dataset.y.ndim == 1:
        table["label"] = dataset.y
    write_aside(run.out / "texts" / f"{slug(dataset.name)}.csv", table.to_csv())
    for pooler, label in zip(sites.poolers, sites.labels.to_dict("records")):
        if pooler.cacheable and not label["layer_method"] and len(pooler.quantiles) < 2:
            X, index = sites.vectors(pooler)
            pca = PCA(2, svd_solver="covariance_eigh")
            arrays = {"xy": pca.fit_transform(X).astype(np.float32), "index": index}
            name = slug(sites.model.name, dataset.name, label=label)
            with aside(run.out / "projections" / f"{name}.npz") as file:
                np.savez(file, **arrays, explained=pca.explained_variance_ratio_)


# ---- the experiment


def main(config, lms=None, datasets=None, probes=None):
    """Run every probe of every model on every dataset; return the results as a DataFrame."""
    run = Run(config)
    lms = lms or config.lm
    probes = constructors(probes or config.probe)
    datasets = load_datasets(run, config, datasets or config.dataset)
    check_distinct([dataset.name for dataset in datasets], "dataset")
    run.content = hash_content(run, lms, datasets)  # only rows with the same content are reused
    (run.out / "texts").mkdir(exist_ok=True)
    run.own_folder("logs", "*__*.json")
    run.own_folder("predictions", "*__*.npz")
    run.own_folder("projections", "*__*.npz")
    rows = run.rows()
    for lm, dataset in run.share(product(lms, datasets)):  # divided among the ranks
        model = LMModel(lm, run.device, run.dtype)
        usable = usable_probes(run, dataset, probes)
        todo = unfinished(run, rows, model.name, dataset.name, usable)
        if not todo:
            continue
        pooled = read_sites(model, dataset, all_poolers(config, model), config)
        keep_projections(run, pooled[""])
        for probe, make in todo.items():
            sites = pooled
            if getattr(make(4), "attention", False):
                sites = read_sites(model, dataset, None, config)  # every token
            keys = {"model": model.name, "dataset": dataset.name, "probe": probe}
            keys |= {"params": model.params, "synthetic": bool(dataset.meta.get("synthetic"))}
            for baseline, part in sites.items():  # the model, its random twin, its embeddings
                folds, scores = measure(part, make, dataset.task)
                write_rows(run, folds, {**keys, "baseline": baseline})
                print_best(run, folds, {**keys, "baseline": baseline})
                if not baseline:
                    lm_folds = folds
                    keep_for_app(run, part, probe, folds, scores)
            if probe == next(iter(usable)):
                measure_once(run, sites[""], pooled, make, keys)
            # the score of the most common label; written last, it marks the probe as done
            majority = lm_folds[lm_folds.site == 0].assign(score=lm_folds.chance, **NO_SITE)
            write_rows(run, majority, {**keys, "baseline": "majority"})
    table = run.merge()
    if run.master:
        plot_layers(run.out, table)
        run.print(f"results.csv, logs and figures: {run.out}. View: streamlit run probe_app.py")
    run.close()
    return table


def measure_once(run, sites, pooled, make, keys):
    """Measure what only the first probe gets: control task, compression and learning curve."""
    if "control" in run.config.baselines:
        measure_control(run, sites, make, keys)
    if "compression" in run.config.baselines:
        measure_compression(run, pooled, keys)
    measure_sizes(run, sites, make, keys)


def hash_content(run, lms, datasets):
    """Hash the texts, labels, weights and pooling code, which the options only name."""
    content = hashlib.sha256(file_hash(inspect.getsourcefile(PoolToken)).encode())
    for dataset in datasets:
        facts = [dataset.texts, dataset.y, dataset.groups, dataset.split]
        content.update(json.dumps(facts, default=np.ndarray.tolist).encode())
    names = []
    for lm in lms:
        model = LMModel(lm, run.device, run.dtype)
        names.append(model.name)
        all_poolers(run.config, model)  # refuse missing layers before anything runs
        content.update(model.fingerprint().encode())
    check_distinct(names, "lm")
    return content.hexdigest()[:8]


def all_poolers(config, model):
    """Return a pooler per layer and quantile, then those of poolers=, without duplicates."""
    poolers = [PoolToken(*site) for site in product(model.layers(config.layers), config.quantiles)]
    poolers += [PoolToken(**options) for options in config.poolers]
    return list({str(pooler.label(model.n_layer)): pooler for pooler in poolers}.values())


def unfinished(run, rows, model, dataset, probes):
    """Return the probes that an earlier run left without a majority row, their last, or a log."""
    rows = rows.reindex(columns=["model", "dataset", "probe", "baseline"])
    rows = rows[(rows.model == model) & (rows.dataset == dataset) & (rows.baseline == "majority")]
    todo = dict(probes)
    for name in rows.probe.unique():
        if (run.out / "logs" / f"{slug(model, dataset, name)}.json").exists():
            todo.pop(name, None)
    return todo


def usable_probes(run, dataset, probes):
    """Leave out classifiers for a regression, and all but ridge for several target columns."""
    if dataset.kind != "regression":
        return probes
    usable = {}
    if dataset.y.ndim == 1:
        usable = {name: make for name, make in probes.items() if not make(4).discrete_targets}
    usable = usable or {"Ridge": Ridge}
    if usable != probes:
        run.print(f"{dataset.name} is a regression: probing it with {', '.join(usable)}")
    return usable


def run_exp(dataset_paths, model_names, poolers=(), classifiers=("LDA",), **options):
    """Run the experiment from Python; return results.csv as a DataFrame.

    dataset_paths: data-json files, dicts, NLPDatasets or NAME/TASK; model_names: names, folders or
    {'model', 'tokenizer'}; poolers: PoolTokens; classifiers: names, or constructors input_size ->
    SingleStepOpt or MultiStepOpt; options: fields of Config, with logs_folder as its out_dir.
    """
    options["out_dir"] = str(options.pop("logs_folder", "out/probe"))
    if poolers:
        options.setdefault("quantiles", [])
    config = Config(**options, poolers=list(map(asdict, poolers)))
    config.probe = [probe for probe in classifiers if isinstance(probe, str)]
    check(config)
    config.probe = list(constructors(classifiers))
    config.lm = []
    for model in model_names:
        config.lm.append(model.get("name", "") if isinstance(model, dict) else str(model))
    config.dataset = [getattr(data, "name", str(data)[:200]) for data in dataset_paths]
    return main(config, list(model_names), list(dataset_paths), list(classifiers))


# ---- plots

STYLES = {"random_init": "--", "control": ":", "layer0": "-.", "majority": "-"}


def plot_layers(out, table):
    """Draw layers_MODEL.png: scores over layers at one pooling, 95 % bands, a panel per dataset."""
    table = table[table.metric.isin(PRIMARY.values()) & (table.layer_method == "")]
    full_size = table.groupby(["model", "dataset", "probe", "baseline"]).n_train.transform("max")
    table = table[table.n_train == full_size]
    table = table.assign(layer=pd.to_numeric(table.layer, errors="coerce"))
    for model, rows in table.groupby("model"):
        colours = {probe: f"C{i}" for i, probe in enumerate(rows.probe.unique())}
        legend = {}
        panels = list(rows.groupby("dataset", sort=False))
        n_columns = min(len(panels), 3)
        n_rows = -(-len(panels) // n_columns)
        size = (max(3.6 * n_columns, 7.2), 2.8 * n_rows + 0.9)
        figure = plt.figure(figsize=size, layout="constrained")
        for number, (dataset, part) in enumerate(panels, start=1):
            ax = figure.add_subplot(n_rows, n_columns, number, title=dataset)
            draw_panel(ax, part, colours)
            handles, labels = ax.get_legend_handles_labels()
            legend |= dict(zip(labels, handles))
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4)
        note = "; synthetic data" if rows.synthetic.any() else ""
        figure.suptitle(f"{model}: what each layer knows (95 % bands){note}")
        with aside(out / f"layers_{slug(model)}.png") as file:
            figure.savefig(file, dpi=130, format="png")
        plt.close(figure)


def draw_panel(ax, rows, colours):
    """Draw one dataset: the probes in colour, and the first one's baselines in grey."""
    real = rows[(rows.baseline == "") & rows.layer.notna()]
    if real.empty:  # only combined layers
        return
    last_token = real[real["quantile"] == "1.0"]
    pooling = (last_token if len(last_token) else real).iloc[0]  # one that was requested
    drawn = rows["quantile"] == pooling["quantile"]
    drawn &= rows.quantile_method == pooling.quantile_method
    drawn |= (rows["quantile"] == "attention") | rows.baseline.isin(["layer0", "majority"])
    rows = rows[drawn].sort_values("layer")
    for probe, part in rows[rows.baseline == ""].groupby("probe", sort=False):
        ax.plot(part.layer, part.score, "o-", ms=3, c=colours[probe], label=probe)
        ax.fill_between(part.layer, part.low, part.high, color=colours[probe], alpha=0.13, lw=0)
    first = rows[rows.probe == real.probe.iloc[0]]
    for baseline, style in STYLES.items():
        part = first[first.baseline == baseline]
        if len(part) == 1:
            ax.axhline(part.score.iloc[0], ls=style, c="grey", lw=1, label=baseline)
        elif len(part):
            ax.plot(part.layer, part.score, style, c="grey", lw=1, label=baseline)
    name = pooling.quantile_method or f"quantile {pooling['quantile']}"
    ax.set(xlabel=f"layer ({name})", ylabel=pooling.metric)
    ax.xaxis.get_major_locator().set_params(integer=True)


if __name__ == "__main__":
    if "streamlit" in sys.modules:
        sys.modules["streamlit"].code("streamlit run probe_app.py", language="bash")
    else:
        main(configure(Config))
