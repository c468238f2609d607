"""What the hidden layers of an untouched language model know: one pass, every layer, honest probes.

    python probe.py                          # the model of train.py on data/grammar, offline
    python probe.py config/probe_gpt2.yaml   # GPT-2s; first: python data/probing/get_data.py
    torchrun --standalone --nproc_per_node=4 probe.py config/probe_gpt2.yaml
    streamlit run probe_app.py               # look at what is in out/

Each text goes through each model once. Its hidden states are pooled while the model runs, and only
the pooled vectors are kept, in a cache that other embedding studies may read (data/states.py).

Folds are grouped and stratified: one is tested, the next one chooses penalty, threshold, epoch and
layer, the others are learnt from. Beside every score: the majority guess, the bag of embeddings
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
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis  # noqa: F401 (users' probes after `from probe import *`)
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
LACKS = (
    "The least populated|y_pred contains|No (posi|nega)tive|F-score|A single label|An input array"
)
warnings.filterwarnings("ignore", LACKS)  # a fold may lack a class, an answer may be constant


def default(*values):
    """The default of an option that is a list."""
    return field(default_factory=lambda: list(values))


@dataclass
class Config:
    # ---- what is read
    lm: list[str] = default("out/train")  # runs of ours, Hugging Face models by name or folder
    # NAME/TASK under data/, NAME for all of its tasks or its brains, or a data-json file
    dataset: list[str] = default(*[f"grammar/{task}" for task in GRAMMAR])
    layers: list[int] = default()  # 0 the embeddings, -1 the last; none: all
    quantiles: list[str] = default("0.5", "1.0", "mean")  # 0 the first token; or max, min
    poolers: list[dict] = default()  # more poolings: {layer: [2, 3], layer_method: extend}
    max_texts: int = 0  # of a dataset, the first ones; 0: all
    force_classification: bool = False  # round the labels of a regression to 0 and 1
    # ---- probes
    probe: list[str] = default("LDA", "Logistic")  # of PROBES below, or my_file.py:constructor
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
    dtype: str = "float32"  # of the pass; auto: bfloat16 where that is quicker

    POSITIVE = "batch_tokens n_seeds"

    def check(self):
        check_keys([probe for probe in self.probe if ":" not in probe], PROBES, "probe")
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
    """Results are kept by name: refuse two of one name."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{option}= has two of the name '{name}': rename or drop one")


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
        return {"hidden_states": states, "attention_mask": real.long(), "input_ids": ids}

    def fingerprint(self):
        """Hash of tokenizer, architecture, weights and precision."""
        tokenizer = getattr(self.tokenizer, "state", None)
        if hasattr(self.tokenizer, "backend_tokenizer"):  # whose padding is that of the last call
            tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
            tokenizer |= {"truncation": None, "padding": None}
        elif self.foreign_tokenizer:
            tokenizer = sorted(self.tokenizer.get_vocab().items())
        config = getattr(self.model, "config", "")
        facts = f"{tokenizer} {type(self.model)} {config} {self.dtype}"
        digest = hashlib.sha256(facts.encode("utf-8", "replace"))
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            # sums of its bits where it lies: hashing gigabytes would take as long as a pass
            bits = tensor.contiguous().view(-1).view(torch.uint8)
            words = F.pad(bits, (0, -len(bits) % 8192)).view(torch.int64).view(-1, 1024)
            for axis in (0, 1):
                digest.update(words.sum(axis).cpu().numpy())
        return digest.hexdigest()


# ---- probes: fit_sites(X, task, fit, choose, test) learns from the rows `fit` of X (G, N, H) at
# each of G sites, and gives its scores (G, n, C) of the rows `choose`, then of `test`


class ClosedForm:
    """Linear probes that are solved, not trained, on standardised features.

    A subclass has discrete_targets (targets are classes, one-hot), `penalties`, and solve(penalty)
    -> coefficients (H, C) and intercept (C,) from the covariances that fit(X, Y) leaves.
    """

    def __init__(self, input_size):
        self.name = type(self).__name__

    def fit(self, X, Y):
        """Covariances of X (n, H) with itself and with Y (n, C), both float64."""
        self.n = len(Y)
        self.mean = X.mean(0)
        scale = X.std(0)
        self.scale = np.where(scale > 1e-6, scale, 1.0)  # of a feature that never varies: 1
        self.target_mean = Y.mean(0)
        Z = (X - self.mean) / self.scale
        self.XX = Z.T @ Z / self.n  # numpy sees the symmetry and computes one half
        self.XY = Z.T @ (Y - self.target_mean) / self.n
        return self

    def predict(self, X, penalty):
        """Values, or log-posteriors up to a constant, (n, C)."""
        coefficients, intercept = self.solve(penalty)
        weights = coefficients / self.scale[:, None]
        return X @ weights + (intercept - self.mean @ weights)

    def fit_sites(self, X, task, fit, choose, test):
        """The rows to choose on pick the penalty, and are learnt from, too."""
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
    """(A + shift)⁻¹ B of a covariance A (H, H)."""
    A = A.copy()
    A[np.diag_indices_from(A)] += shift
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(A), B)


class Ridge(ClosedForm):
    """sklearn's Ridge(penalty) behind StandardScaler."""

    discrete_targets = False
    penalties = (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)

    def solve(self, penalty):
        return solve_shifted(self.XX, penalty / self.n + 1e-6, self.XY), self.target_mean


class LDA(ClosedForm):
    """sklearn's LinearDiscriminantAnalysis("lsqr", penalty) behind StandardScaler."""

    discrete_targets = True
    penalties = (0.003, 0.03, 0.1, 0.3, 0.7)

    def solve(self, penalty):
        prior = self.target_mean.clip(1e-12)
        means = self.XY / prior  # of the classes, (H, K)
        within = self.XX - (means * prior) @ means.T
        shift = penalty * within.diagonal().mean() + 1e-6
        coefficients = solve_shifted((1 - penalty) * within, shift, means)
        return coefficients, np.log(prior) - (means * coefficients).sum(0) / 2


# scikit-learn's fits are on short vectors: threads, which wait for one another, slow them down
one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


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

    @one_thread
    def fit_sites(self, X, task, fit, choose, test):
        """The rows to choose on pick the best parameters by squared error, and are learnt from."""
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
            tested = self.fit(x[train], task.y[train])(x[test]).reshape(len(test), -1)
            sites.append(np.concatenate([scores[best], tested]))
        return np.stack(sites)


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
    discrete_targets = False  # fits classes and values alike
    batch_size = 128
    max_epoch = 30
    min_steps = 300  # a few hundred texts need more epochs
    learning_rate = 3e-3
    attention = False  # X is (n, T, H), the states of all tokens; pads are NaN

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
        least = torch.full((len(X),), math.inf)
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
            better = losses < least
            least = torch.where(better, losses, least)
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
    """{name: constructor} of names in PROBES, of my_file.py:constructor, and of constructors."""
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
    """A probe of this input size, with an output for each class where it can have them."""
    if task.kind == "multi" and "output_size" in inspect.signature(make).parameters:
        return make(width, output_size=task.n_labels)
    model = make(width)
    if task.kind == "multi" and isinstance(model, nn.Module):
        name = type(model).__name__
        raise InputError(f"the probe {name} has no output_size: it takes two classes only")
    return model


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


# ---- what a probe is asked


@dataclass
class Task:
    """A row is a text, or one of a text's tokens."""

    kind: str
    n_labels: int  # 0 of a regression
    text: np.ndarray  # (N,) which text a row is, or is of
    y: np.ndarray  # (N,) classes or values, or (N, V) values
    learn: np.ndarray  # (N,) bool: rows that may be learnt from
    judge: np.ndarray  # (N,) bool: rows that are scored
    folds: list  # of each repetition: the fold (N,) of each row
    seed: int

    def take(self, index):
        """The task of rows that belong to the texts `index`."""
        rows = {key: getattr(self, key)[index] for key in ("text", "y", "learn", "judge")}
        return replace(self, folds=[fold[index] for fold in self.folds], **rows)

    def targets(self):
        """(N, C), float: one-hot classes, or values."""
        y = torch.as_tensor(self.y)
        if self.kind == "regression":
            return y.float().view(len(y), -1)
        return F.one_hot(y.long(), self.n_labels).float()

    def fewest_folds(self):
        """In how many folds of what may be learnt the rarest label occurs; two are left out."""
        y = self.y if self.n_labels else np.zeros(len(self.y), int)
        fewest = math.inf
        for folds in self.folds:
            pairs = pd.DataFrame({"y": y, "fold": folds})[self.learn].drop_duplicates()
            fewest = min(fewest, np.bincount(pairs.y, minlength=max(self.n_labels, 1)).min())
        return fewest


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
        few = "the texts to learn from have a label in too few groups, or not at all"
        raise InputError(f"{dataset.name}: {few}: give more texts, or leave that label out")
    return task


# ---- evaluate


def pearson(y, score):
    """Pearson's r, the mean over columns; 0 of a constant."""
    return np.mean(np.nan_to_num(scipy.stats.pearsonr(score, y, axis=0).statistic))


def auc(y, score):
    """Area under the ROC curve; 0.5 where there is one class only."""
    return metrics.roc_auc_score(y, score) if 0 < np.mean(y) < 1 else 0.5


# a measure's ends, where they are not 0 and 1; selectivity is a difference of two scores
BOUNDS = {"mse": (0, np.inf), "r2": (-np.inf, 1)}
BOUNDS |= {"pearson": (-1, 1), "mcc": (-1, 1), "selectivity": (-2, 2)}
# what chooses layers, and is shown: any of a kind's measures
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
    """{metric: measure} of scores (n,), or (n, K) of several classes; an entry more is one more.

    Of two classes, score >= threshold says 1. F1 is that of class 1, or the mean over those there.
    """
    if kind == "regression":
        return {
            "mse": metrics.mean_squared_error(y, score),
            "r2": metrics.r2_score(y, score),
            "pearson": pearson(y, score),
        }
    if kind == "multi":
        said = score.argmax(1)
        return {
            "accuracy": metrics.accuracy_score(y, said),
            "balanced_accuracy": metrics.balanced_accuracy_score(y, said),
            "f1": metrics.f1_score(y, said, labels=np.unique(y), average="macro"),
        }
    thresholds = thresholds or {"accuracy": 0.5, "f1": 0.5}
    said = score >= thresholds["accuracy"]
    return {
        "mse": metrics.mean_squared_error(y, score),
        "accuracy": metrics.accuracy_score(y, said),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, said),
        "mcc": metrics.matthews_corrcoef(y, said),
        "f1": metrics.f1_score(y, score >= thresholds["f1"]),
        "auc": auc(y, score),
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
    place = rng.permutation(len(names))[member]
    order = np.argsort(place, kind="stable")
    group_ends = np.flatnonzero(np.diff(place[order], append=-1)) + 1
    shares = np.array([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50, 100]) / 100
    ends = np.maximum(2 * n_classes, np.round(shares * len(y)).astype(int))
    ends = np.unique(group_ends[np.searchsorted(group_ends, ends)])  # no group is parted
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
    """Where one model is read on one dataset: a site for each pooler; `labels` has a row for each.

    Without poolers it is every token of each layer, for probes that pool tokens themselves.
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


def read_sites(model, dataset, poolers, config):
    """{baseline: Sites} of the model ('') and of the baselines read in the same way."""
    sites = {"": Sites(model, dataset, poolers, config)}
    if "random_init" in config.baselines:
        twin = model.random_twin(key_seed(config.seed, "random twin"))
        sites["random_init"] = Sites(twin, dataset, poolers, config)
    if "layer0" in config.baselines and poolers is not None:  # a bag: the mean, whatever is asked
        sites["layer0"] = Sites(model, dataset, [PoolToken(0, "mean")], config)
    return sites


# ---- measuring


def measure(sites, make, task):
    """Two DataFrames: a row for each site, repetition, fold and measure; and one for each score.

    Scores of texts in the test (of several classes the likeliest one) are those of the first
    repetition; there are none for targets of several columns.
    """
    tables = []
    scores = []
    first = 0
    for X, index in sites.batches():
        part = task.take(index)
        n = len(np.unique(index[part.judge]))
        for repetition, fold_of in enumerate(part.folds):
            for fold in range(fold_of.max() + 1):
                table, test, tested = measure_fold(make, X, part, fold_of, fold)
                tables.append(table.assign(repetition=repetition, site=first + table.site, n=n))
                if repetition == 0 and tested.ndim == 2:
                    about = {"index": index[test], "y": part.y[test], "fold": fold}
                    for g, score in enumerate(tested):
                        scores.append(pd.DataFrame({**about, "score": score, "site": first + g}))
        first += len(X)
    folds = pd.concat(tables, ignore_index=True).join(sites.labels, on="site")
    return folds, pd.concat(scores) if scores else None


def measure_fold(make, X, task, fold_of, outer):
    """Measures of each of G sites in one outer fold, the rows of its test, and their scores.

    The next fold is to choose on, the others are learnt from. `validation` is the primary measure
    of the rows to choose on, which give the thresholds. Scores are (G, n), or (G, n, C).
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
    chosen, tested = np.split(scores, [len(choose)], 1)
    chance = chance_measures(task, test)
    rows = []
    for g in range(len(X)):
        thresholds = {"accuracy": np.nan}
        if task.kind == "binary":
            thresholds = best_thresholds(task.y[choose], chosen[g])
        validation = evaluator(task.y[choose], chosen[g], task.kind, thresholds)
        row = {"site": g, "threshold": thresholds["accuracy"]}
        row["validation"] = validation[PRIMARY[task.kind]]
        for metric, score in evaluator(task.y[test], tested[g], task.kind, thresholds).items():
            rows.append({**row, "metric": metric, "score": score, "chance": chance[metric]})
    train = fit if isinstance(model, nn.Module) else np.concatenate([fit, choose])  # see fit_sites
    n_train = len(np.unique(task.text[train]))
    ratio = len(np.unique(task.text[task.learn])) / n_folds / n_train
    table = pd.DataFrame(rows).assign(fold=outer, n_train=n_train, ratio=ratio)
    return table, test, tested.argmax(2) if task.kind == "multi" else tested


def statistics(folds):
    """Columns of results.csv out of the folds of one site at one measure.

    Folds share training texts, hence the corrected resampled t: ratio is a fold's size over that of
    what is learnt from (Nadeau & Bengio 2003). Repetitions have no texts of their own and add no
    degree of freedom; folds that agree by luck are no surer than half a text. p is of a score above
    chance.
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
    """Of each fold, the site that its rows to choose on like best."""
    return folds.loc[folds.groupby(["repetition", "fold"]).validation.idxmax()]


def write_rows(run, folds, keys):
    """A row of each measure for each site, and for the site that is chosen in each fold.

    p is corrected over all sites, and tests nothing for a baseline.
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
    """A line: the score at the layer that validation folds choose, beside chance."""
    best = chosen_by_validation(folds[folds.metric.isin(PRIMARY.values())])
    names = [keys[key] for key in ("model", "dataset", "probe", "baseline") if keys[key]]
    about = {**statistics(best), "layer": best.layer.mode()[0], "names": " ".join(names)}
    run.print(
        "{names}: {metric} {score:.3f} [{low:.3f}, {high:.3f}], chance {chance:.3f}, n = {n}, "
        "layer by validation: {layer}".format(**about)
    )


def measure_control(run, sites, make, keys):
    """Control task and selectivity, both labels learnt and judged where texts share their words."""
    task = replace(sites.dataset.task, judge=sites.dataset.task.learn)
    control_task = replace(task, y=control_labels(sites.dataset, task.seed))
    if control_task.fewest_folds() < 3:
        run.print(f"{sites.dataset.name}: a label is too rare for a control task: it is left out")
        return
    real, _ = measure(sites, make, task)
    control, _ = measure(sites, make, control_task)
    write_rows(run, control, {**keys, "baseline": "control"})
    gain = real.assign(metric="selectivity", score=real.score - control.score, chance=0.0)
    write_rows(run, gain[real.metric == PRIMARY[task.kind]], {**keys, "baseline": ""})


def measure_compression(run, sites, keys):
    """n log2 K over the bits of the online code, with a normal interval over texts."""
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
            bits = pd.Series(bits).groupby(texts).sum()  # 'concat' makes several rows of a text
            spread = 1.96 * bits.std(ddof=0) * math.sqrt(len(bits))
            sums = np.array([bits.sum(), bits.sum() + spread, bits.sum() - spread])
            score, low, high = len(texts) * math.log2(task.n_labels) / sums.clip(1e-9)
            about = {**keys, **label, "probe": "Logistic", "baseline": baseline}
            about |= {"metric": "compression", "n_train": len(bits), "p": None, "p_holm": None}
            run.result(score, 1.0, low, high, len(bits), **about)


def measure_sizes(run, sites, make, keys):
    """The sample-size curve: whole groups at random, to leave about n texts to learn from."""
    n_folds = run.config.n_folds
    task = sites.dataset.task
    rng = np.random.default_rng(key_seed(task.seed, "size"))
    groups = sites.dataset.groups
    sizes = pd.Series(groups[task.learn]).value_counts().sort_index()
    sizes = sizes.iloc[rng.permutation(len(sizes))].cumsum() * (1 - 1 / n_folds)
    few = 4 * n_folds * max(task.n_labels, 1)
    for n in run.config.train_sizes:
        part = replace(task, learn=task.learn & np.isin(groups, sizes.index[sizes <= n]))
        if n < few or part.fewest_folds() < 3:
            run.print(f"{sites.dataset.name}: {n} texts are too few for its labels or groups")
        elif n < 0.9 * sizes.max():
            folds, _ = measure(sites, make, part)
            write_rows(run, folds, {**keys, "baseline": ""})


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
    titles = {"mse": "MSE", "accuracy": "Accuracy", "f1": "F1"}
    logs = {}
    for site, pooler in enumerate(sites.poolers):
        part = folds[folds.site == site]
        about = {"model": names[0], "classifier": name, "attention": sites.all_tokens}
        for key in NO_SITE:
            about[key] = getattr(pooler, key)
        data = part[part.metric.isin(titles)].groupby("metric").score.apply(list).rename(titles)
        log = {"metadata": sites.dataset.meta, "expdata": about, "data": data.to_dict()}
        logs[f"experiment_{site}"] = log
        if run.config.keep_predictions and scores is not None:
            kept = scores[scores.site == site].drop(columns="site")
            label = sites.labels.loc[site].to_dict()
            with aside(run.out / "predictions" / f"{slug(*names, label=label)}.npz") as file:
                np.savez(file, **kept, threshold=part.threshold.mean())
    write_aside(run.out / "logs" / f"{slug(*names)}.json", json.dumps(logs))


def keep_projections(run, sites):
    """The texts, and the first two principal components of each site of a single layer."""
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
    """Every probe of every model on every dataset. Returns the results as a DataFrame."""
    run = Run(config)
    lms = lms or config.lm
    probes = constructors(probes or config.probe)
    datasets = load_datasets(run, config, datasets or config.dataset)
    check_distinct([dataset.name for dataset in datasets], "dataset")
    run.content = hash_content(run, lms, datasets)  # rows of other content are not reused
    (run.out / "texts").mkdir(exist_ok=True)
    run.own_folder("logs", "*__*.json")
    run.own_folder("predictions", "*__*.npz")
    run.own_folder("projections", "*__*.npz")
    rows = run.rows()
    for lm, dataset in run.share(product(lms, datasets)):  # dealt over the ranks
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
                    of_model = folds
                    keep_for_app(run, part, probe, folds, scores)
            if probe == next(iter(usable)):
                measure_once(run, sites[""], pooled, make, keys)
            # what the commonest label gets; written last: the probe is done
            majority = of_model[of_model.site == 0].assign(score=of_model.chance, **NO_SITE)
            write_rows(run, majority, {**keys, "baseline": "majority"})
    table = run.merge()
    if run.master:
        plot_layers(run.out, table)
        run.print(f"results.csv, logs and figures in {run.out}: streamlit run probe_app.py")
    run.close()
    return table


def measure_once(run, sites, pooled, make, keys):
    """What is measured with the first probe alone: controls, and scores over training texts."""
    if "control" in run.config.baselines:
        measure_control(run, sites, make, keys)
    if "compression" in run.config.baselines:
        measure_compression(run, pooled, keys)
    measure_sizes(run, sites, make, keys)


def hash_content(run, lms, datasets):
    """Texts, labels, weights and poolings (data/states.py), which the options only name."""
    content = hashlib.sha256(file_hash(inspect.getsourcefile(PoolToken)).encode())
    for dataset in datasets:
        facts = [dataset.texts, dataset.y, dataset.groups, dataset.split]
        content.update(json.dumps(facts, default=np.ndarray.tolist).encode())
    names = []
    for lm in lms:
        model = LMModel(lm, run.device, run.dtype)
        names.append(model.name)
        all_poolers(run.config, model)  # refuses a layer that is not there, before anything is run
        content.update(model.fingerprint().encode())
    check_distinct(names, "lm")
    return content.hexdigest()[:8]


def all_poolers(config, model):
    """Each layer x each quantile, then the ones written out; of equal ones one."""
    poolers = [PoolToken(*site) for site in product(model.layers(config.layers), config.quantiles)]
    poolers += [PoolToken(**options) for options in config.poolers]
    return list({str(pooler.label(model.n_layer)): pooler for pooler in poolers}.values())


def unfinished(run, rows, model, dataset, probes):
    """The probes that lack their last row, the majority's, or their log, of an earlier run."""
    rows = rows.reindex(columns=["model", "dataset", "probe", "baseline"])
    rows = rows[(rows.model == model) & (rows.dataset == dataset) & (rows.baseline == "majority")]
    todo = dict(probes)
    for name in rows.probe.unique():
        if (run.out / "logs" / f"{slug(model, dataset, name)}.json").exists():
            todo.pop(name, None)
    return todo


def usable_probes(run, dataset, probes):
    """Those that can answer: classifiers do no regression, and only ridge does several columns."""
    if dataset.kind != "regression":
        return probes
    usable = {}
    if dataset.y.ndim == 1:
        usable = {name: make for name, make in probes.items() if not make(4).discrete_targets}
    usable = usable or {"Ridge": Ridge}
    if usable != probes:
        run.print(f"{dataset.name} is a regression: it is probed by {', '.join(usable)}")
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
    config.probe = list(constructors(classifiers))
    config.lm = []
    for model in model_names:
        config.lm.append(model.get("name", "") if isinstance(model, dict) else str(model))
    config.dataset = [getattr(data, "name", str(data)[:200]) for data in dataset_paths]
    return main(config, list(model_names), list(dataset_paths), list(classifiers))


# ---- plots

STYLES = {"random_init": "--", "control": ":", "layer0": "-.", "majority": "-"}


def plot_layers(out, table):
    """layers_MODEL.png: scores over layers at one pooling with 95 % bands, a panel a dataset."""
    table = table[table.metric.isin(PRIMARY.values()) & (table.layer_method == "")]
    usual = table.groupby(["model", "dataset", "probe", "baseline"]).n_train.transform("max")
    table = table[table.n_train == usual]
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
