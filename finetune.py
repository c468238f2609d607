"""What is a language model worth for a task? Classification and regression of sentences.

    python finetune.py                                                 # embedded: docstrings
    python finetune.py twin=True                                       # its random twin
    python finetune.py against=finetuned/docstrings-area-twin          # paired with that twin
    python finetune.py dataset=grammar task=grammaticality by=template # is the sentence English?
    torchrun --standalone --nproc_per_node=4 finetune.py config/finetune_glue.yaml task=cola
    python finetune.py init_from=resume                                # continue after a stop

A linear head reads the state of the last real token; the mask stays causal. An end-of-text token
opens each text and separates the two parts of a pair. Validation data choose the step, and the test
split is scored once. Other scripts take the result as a language model: lm=finetuned/...

Wang et al. 2019 (GLUE); Rathi et al. 2025 (TopoLM); Howard & Ruder 2018.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import scipy.stats
import sklearn.metrics
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

import positions
from configurator import InputError, Run, configure, key_seed
from convert import load_lm
from data import write_aside
from data.stimuli import read_meta, read_task
from data.tokens import Tokenizer
from model import GPT, check_choice, lm_from, lm_state


@dataclass
class Config:
    # ---- task
    lm: str = "out/train"  # run folder or checkpoint of ours, or a Hugging Face GPT-2
    twin: bool = False  # start from random weights in the same architecture
    dataset: str = "docstrings"  # name under data/, or a folder of labelled sentences
    task: str = "area"  # a task of the dataset
    metric: str = ""  # chooses the step: accuracy, matthews, f1, pearson, spearman; "": GLUE's
    by: str = ""  # a column of the task: also score each of its values on test
    against: list[str] = field(default_factory=list)  # finished runs for paired comparisons
    # ---- model
    mode: str = "full"  # what to train besides the head, a name in MODES: full, head, last_k
    k: int = 1  # blocks that mode=last_k trains
    dropout: float = 0.0  # in the trained parts; harms models that were trained without
    alpha_scale: float = 0.0  # weight of the spatial loss, in multiples of the checkpoint's alpha
    # ---- optimiser
    batch_size: int = 16  # texts per micro-batch
    texts_per_step: int = 0  # over all ranks; 0: one micro-batch per rank
    epochs: float = 10.0  # maximum passes over the training texts
    max_iters: int = 0  # maximum optimiser steps; 0: see epochs
    learning_rate: float = 2e-4  # AdamW's peak
    schedule: Literal["linear", "constant"] = "linear"  # after the warm-up; linear falls to 0
    warmup_iters: int = 50  # steps of linear warm-up
    weight_decay: float = 0.1  # on matrices and embeddings
    grad_clip: float = 1.0  # maximum total norm; 0: none
    # ---- evaluation
    eval_interval: int = 0  # steps between validations; 0: one epoch
    patience: int = 4  # stop after this many validations without improvement; 0: never
    resamples: int = 1000  # bootstrap samples of groups of texts
    # ---- run
    out_dir: str = ""  # "": finetuned/DATASET-TASK, or finetuned/DATASET-TASK-twin
    init_from: Literal["lm", "resume"] = "lm"  # resume: continue after a stop
    overwrite: bool = False  # start over in a folder that holds a run
    seed: int = 1337  # for the head, the order of texts, dropout and the bootstrap
    device: str = "auto"  # cuda, mps, cpu
    dtype: str = "auto"  # bfloat16 where it is faster; float16, float32
    deterministic: bool = False  # bit-for-bit repeats on CUDA too, but slower
    log_interval: int = 50  # steps between log lines
    save_interval: int = 200  # steps between checkpoints
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = "nanocortex"  # project on Weights & Biases

    POSITIVE = "batch_size k log_interval save_interval resamples"
    SHARES = "dropout"

    def check(self):
        check_choice("mode", self.mode, MODES)
        if self.max_iters < 1 and self.epochs <= 0:
            raise InputError("epochs=0 and max_iters=0 leave nothing to do: set one of them")


CLASS_METRICS = ["accuracy", "matthews", "f1"]
NUMBER_METRICS = ["pearson", "spearman"]
GLUE_METRIC = {"cola": "matthews", "mrpc": "f1", "qqp": "f1"}


# ---- data


class Task:
    """One task of a dataset of labelled sentences, in the tokens of a language model.

    splits: {"train", "val" and perhaps "test": table}, one row per text: label, text, group, y,
    tokens and the task's own columns; last: the split to report; labels: names of the n_classes
    classes, None for regression; metrics, and `metric`, which chooses the step; constant: the best
    guess without reading.
    """

    def __init__(self, config, run, tokenizer, block_size):
        folder = run.dataset(config.dataset)
        table = read_task(folder, config.task)
        self.meta = read_meta(folder)
        entry = self.meta["tasks"][config.task]
        self.name = f"{config.dataset} {config.task}"
        self.source = "synthetic" if self.meta.get("synthetic") else "real"
        self.labels = entry.get("labels")
        self.n_classes = len(self.labels or [])
        self.metrics = CLASS_METRICS if self.labels else NUMBER_METRICS
        self.metric = config.metric or GLUE_METRIC.get(config.task, self.metrics[0])
        if self.metric not in self.metrics:
            raise InputError(f"metric={self.metric}: {self.name} has {', '.join(self.metrics)}")
        if config.by and config.by not in table:
            raise InputError(f"by={config.by} is not a column of {self.name}: {', '.join(table)}")
        for split in {"train", "val"} - set(table.split):
            raise InputError(f"{self.name} has no text in the split '{split}': add some")
        train = table[table.split == "train"].y
        self.constant = train.mean()
        self.mean = float(train.mean())
        self.sd = float(train.std(ddof=0))
        self.baseline = "mean guess"
        if self.labels:
            self.mean = 0.0
            self.sd = 1.0
            self.constant = train.mode()[0]
            self.baseline = f"majority guess ({self.labels[self.constant]})"
        tokens, n_cut = zip(*[encode(tokenizer, text, block_size) for text in table.text])
        table["tokens"] = list(tokens)
        self.splits = {}
        for name in ("train", "val", "test"):
            if name in set(table.split):
                self.splits[name] = table[table.split == name].reset_index(drop=True)
                self.last = name
        if any(n_cut):
            run.print(
                f"{np.count_nonzero(n_cut):,} of {len(table):,} texts are longer than the "
                f"{block_size} tokens of {config.lm}: their ends were cut"
            )

    def facts(self):
        """Return what a checkpoint stores about the task."""
        return {"name": self.name, "labels": self.labels, "mean": self.mean, "sd": self.sd}

    def targets(self, y):
        """Return class numbers (N,), or values standardised by the training mean and SD."""
        dtype = torch.int64 if self.labels else torch.float32
        return torch.tensor((y.to_numpy() - self.mean) / self.sd, dtype=dtype)

    def loss(self, out, targets):
        """Return the cross-entropy or mean squared error of outputs (B, n_out)."""
        if self.labels:
            return F.cross_entropy(out, targets)
        return F.mse_loss(out[:, 0], targets)

    def predictions(self, out):
        """Return class numbers, or values on the labels' scale, (N,) from outputs (N, n_out)."""
        if self.labels:
            return out.argmax(1).numpy()
        return (out[:, 0] * self.sd + self.mean).numpy()


def encode(tokenizer, text, size):
    """Return (at most `size` token ids, number of tokens cut) of a text or a tab-separated pair.

    An end-of-text token (a line break if the tokenizer has none) opens each part. The longer part
    of a pair is cut first, at its end.
    """
    mark = [tokenizer.eot] if tokenizer.eot is not None else tokenizer.encode("\n")
    parts = [tokenizer.encode(part) for part in text.split("\t")]
    if len(parts) > 2:
        raise InputError(f"{text[:60]!r} has {len(parts)} tab-separated parts: give 1 or 2")
    room = size - len(mark) * len(parts)
    if room < len(parts):
        raise InputError(f"block_size={size} of the language model has no room for a text")
    cut = max(0, sum(len(part) for part in parts) - room)
    for _ in range(cut):
        max(parts, key=len).pop()
    row = []
    for part in parts:
        row += mark + part
    return row, cut


def pad(rows, device):
    """Return right-padded ids (B, T) and lengths (B,); causal attention never sees the pads."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    idx = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return idx.to(device), lengths


def texts_of_step(step, per_step, lengths, seed):
    """Return the indices of a step's texts, sorted by length so that micro-batches have few pads.

    Every epoch takes each text once, in a permutation keyed by (seed, epoch), on any number of
    ranks.
    """
    n = len(lengths)
    numbers = np.arange(step * per_step, (step + 1) * per_step)
    indices = []
    for epoch in range(numbers[0] // n, numbers[-1] // n + 1):
        order = np.random.default_rng(key_seed(seed, "epoch", epoch)).permutation(n)
        indices += order[numbers[numbers // n == epoch] % n].tolist()
    return sorted(indices, key=lengths.__getitem__)


# ---- model

SMALLER = "try a smaller learning_rate, or dtype=float32"


def train_all(lm, config):
    """Train all weights, as a new GPT does."""


def train_head(lm, config):
    """Train only the head: a linear readout of the last token."""
    lm.requires_grad_(False)


def train_last_blocks(lm, config):
    """Train the last k blocks and the final LayerNorm."""
    lm.requires_grad_(False)
    lm.transformer.h[-config.k :].requires_grad_(True)
    lm.transformer.ln_f.requires_grad_(True)


# Which parts of the language model are trained besides the head; the result is saved as a GPT.
MODES = {"full": train_all, "head": train_head, "last_k": train_last_blocks}


class Reader(nn.Module):
    """A language model, and a linear head on the state of the last real token."""

    def __init__(self, lm, n_out, config):
        super().__init__()
        self.lm = lm
        self.dropout = config.dropout
        self.head = nn.Linear(lm.config.n_embd, n_out)
        generator = torch.Generator().manual_seed(key_seed(config.seed, "head"))
        nn.init.normal_(self.head.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.head.bias)
        MODES[config.mode](lm, config)

    def train(self, mode=True):
        """Keep frozen modules in evaluation mode, so that only trained ones have dropout."""
        super().train(mode)
        for module in self.lm.modules():
            module.training = mode and any(p.requires_grad for p in module.parameters())
        return self

    def forward(self, idx, lengths, windows=None):
        """Map idx (B, T) and lengths (B,) to outputs (B, n_out) in float32 and the spatial loss.

        The spatial loss is summed over sheets; None without windows (2 n_layer, K).
        """
        on_sheets = windows is not None and self.lm.config.spatial == "activations"
        names = positions.layer_names(self.lm.config.n_layer) if on_sheets else ()
        x, _, taps = self.lm.trunk(idx, hidden=names)
        last = x[torch.arange(len(idx), device=idx.device), lengths - 1]  # (B, C)
        out = self.head(F.dropout(last, self.dropout, self.training)).float()
        spatial = None
        if on_sheets:
            spatial = self.spatial_loss(list(taps.values()), lengths, windows)
        elif windows is not None:
            spatial = self.lm.weight_loss()
        return out, spatial

    def spatial_loss(self, taps, lengths, windows):
        """Sum the spatial loss over real tokens: not pads, nor the token that opens every text."""
        c = self.lm.config
        order = torch.arange(taps[0].size(1), device=lengths.device)
        real = (order > 0) & (order < lengths[:, None])  # (B, T)
        units, near = self.lm.sheets(windows)  # (n_layer, 2, K, n)
        total = 0.0
        for tap, sheet in zip(taps, units.flatten(0, 1)):
            total = total + positions.spatial_loss(tap[real], sheet, near, c.spatial_kind, c.accum)
        return total


def build(config, run):
    """Return the language model, its tokenizer, and the checkpoint of a resumed run or None."""
    state = None
    if config.init_from == "resume":
        path = run.out / "ckpt.pt"
        state = run.load("ckpt.pt")
        if "task" not in state:
            raise InputError(f"{path} is not from finetune.py: give it as lm= with a new out_dir=")
        for key in ("dataset", "task", "mode", "k", "twin", "metric"):
            now = getattr(config, key)
            before = state["config"].get(key, now)  # an older checkpoint may lack the option
            if before != now:
                raise InputError(f"{path} has {key}={before}, not {now}: keep that value")
        lm = lm_from(state, path, dropout=config.dropout)
        tokenizer = Tokenizer(state["tokenizer"])
    else:
        lm, tokenizer = load_lm(config.lm, dropout=config.dropout)
        if config.twin:
            lm = GPT(lm.config, getattr(lm, "unit_at_cell", None), config.seed)
    c = lm.config
    spec = f"lm={config.lm}"
    if tokenizer.n_vocab > c.vocab_size:
        sizes = f"a tokenizer of {tokenizer.n_vocab} tokens but a model of {c.vocab_size}"
        raise InputError(f"{spec} has {sizes}: use the tokenizer it was trained with")
    if config.mode == "last_k" and config.k > c.n_layer:
        raise InputError(f"k={config.k} is more than the {c.n_layer} blocks of {spec}")
    if config.alpha_scale and not (c.sheet and c.alpha):
        missing = "alpha=0" if c.sheet else "no positions"
        raise InputError(f"alpha_scale={config.alpha_scale}: {spec} has {missing}; leave it at 0")
    return lm, tokenizer, state


def make_optimizer(model, config):
    """Return AdamW over the trained parameters, with weight decay on matrices and embeddings."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay}
    vectors = {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=config.learning_rate)


def lr_share(step, total, config):
    """Return the learning rate at a step as a share of its peak."""
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return 1.0
    return (total - step) / max(1, total - config.warmup_iters)


def train_step(training, task, config, run, members):
    """Take one optimiser step on the texts `members`, the same over any number of ranks.

    Returns the task and spatial losses (2,) of this rank's micro-batches, and the gradient norm.
    """
    lm = training.model.lm
    step = training.step
    table = task.splits["train"]
    micros = range(run.rank, len(members) // config.batch_size, run.world)
    losses = torch.zeros(2, device=run.device)
    for micro in micros:
        texts = members[micro * config.batch_size : (micro + 1) * config.batch_size]
        idx, lengths = pad(table.tokens[texts], run.device)
        windows = None
        if config.alpha_scale:
            windows = lm.draw_windows(run.generator(step, micro, "windows"))
        torch.manual_seed(key_seed(run.seed, step, micro, "dropout"))
        if run.world > 1:  # synchronise gradients once per step
            training.net.require_backward_grad_sync = micro == micros[-1]
        with run.autocast():
            out, spatial = training.net(idx, lengths, windows)
        loss = task.loss(out, task.targets(table.y[texts]).to(run.device))
        losses[0] += loss.detach() / len(micros)
        if spatial is not None:
            losses[1] += spatial.detach() / len(micros)
            loss = loss + config.alpha_scale * lm.config.alpha * spatial
        run.scaler.scale(loss / len(micros)).backward()
    run.scaler.unscale_(training.optimizer)
    parameters = training.model.parameters()
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
    if not run.scaler.is_enabled() and not norm.isfinite():  # float16's scaler handles overflows
        raise InputError(f"the gradient is not finite at step {step + 1}: {SMALLER}")
    run.scaler.step(training.optimizer)
    run.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    return losses, norm


# ---- evaluate


def score(metric, y, predictions, n_classes):
    """Return a GLUE metric of y and predictions (N,): class numbers, or floats for correlations.

    With two classes f1 is that of class 1; with more, the mean over the classes that occur. The
    correlation of a constant guess is 0.
    """
    if metric == "accuracy":
        return float(sklearn.metrics.accuracy_score(y, predictions))
    if metric == "f1":
        average = "binary" if n_classes <= 2 else "macro"
        return float(sklearn.metrics.f1_score(y, predictions, average=average, zero_division=0))
    if np.ptp(y) == 0 or np.ptp(predictions) == 0:
        return 0.0
    if metric == "matthews":
        return float(sklearn.metrics.matthews_corrcoef(y, predictions))
    correlation = scipy.stats.pearsonr if metric == "pearson" else scipy.stats.spearmanr
    return float(correlation(y, predictions).statistic)


def interval(metric, y, predictions, n_classes, groups, config, other=None):
    """Return the 95 % bootstrap interval of a score, or of its difference from `other` predictions.

    Whole groups (N,) are resampled: a document, or both sentences of a minimal pair.
    """
    rng = np.random.default_rng(key_seed(config.seed, "bootstrap"))
    members = list(pd.Series(groups).groupby(groups).indices.values())  # rows of each group
    scores = []
    for _ in range(config.resamples):
        drawn = rng.integers(len(members), size=len(members))
        i = np.concatenate([members[group] for group in drawn])
        value = score(metric, y[i], predictions[i], n_classes)
        if other is not None:
            value -= score(metric, y[i], other[i], n_classes)
        scores.append(value)
    low, high = np.quantile(scores, (0.025, 0.975))
    return float(low), float(high)


@torch.no_grad()
def predict(model, run, rows, batch_size):
    """Return outputs (N, n_out) in float64 for a Series of token lists; ranks share the batches."""
    model.eval()
    order = np.argsort(rows.map(len).to_numpy(), kind="stable")  # by length
    out = torch.zeros(len(rows), model.head.out_features, dtype=torch.float64)
    for start in range(run.rank * batch_size, len(rows), run.world * batch_size):
        members = order[start : start + batch_size]
        idx, lengths = pad(rows[members], run.device)
        with run.autocast():
            out[members] = model(idx, lengths)[0].double().cpu()
    model.train()
    return run.reduce(out).cpu()


def validate(model, run, task, batch_size, step):
    """Return {"val_loss": loss, "val_METRIC": score for each metric}."""
    table = task.splits["val"]
    out = predict(model, run, table.tokens, batch_size)
    loss = task.loss(out.float(), task.targets(table.y)).item()
    if not math.isfinite(loss):
        raise InputError(f"the validation loss is not finite at step {step}: {SMALLER}")
    scores = {"val_loss": loss}
    predictions = task.predictions(out)
    for metric in task.metrics:
        scores[f"val_{metric}"] = score(metric, table.y.to_numpy(), predictions, task.n_classes)
    return scores


def report(run, task, rivals, step):
    """Report the chosen step against the constant guess and rivals; write predictions.csv."""
    tables = [task.splits[split] for split in dict.fromkeys(("val", task.last))]
    columns = ["split", "label", "text", "group", "prediction", "p"]
    predictions = pd.concat(tables).filter(columns)
    write_aside(run.out / "predictions.csv", predictions.to_csv(index=False))
    for scored in tables:
        for metric in task.metrics:
            report_score(run, task, scored, metric, "all", step)
    table = task.splits[task.last]
    if run.config.by:
        for value, part in table.groupby(run.config.by):
            report_score(run, task, part, task.metric, value, step)
    sentence = f"step {step} was chosen on validation data"
    if task.last == "val":
        sentence += "; there is no test split, so the score above is on the data that chose it"
    run.print(sentence)
    y = table.y.to_numpy()
    guess = table.guess.to_numpy()
    for folder, rival in rivals.items():
        value = score(task.metric, y, guess, task.n_classes)
        value -= score(task.metric, y, rival, task.n_classes)
        low, high = interval(task.metric, y, guess, task.n_classes, table.group, run.config, rival)
        keys = {"metric": f"{task.metric} difference", "split": task.last, "part": "all"}
        keys |= {"beside": folder, "step": step, "data": task.source}
        run.result(value, 0.0, low, high, len(y), **keys)
        run.print(
            f"{task.last} {task.metric} minus that of {folder}: {value:+.3f} "
            f"[{low:+.3f}, {high:+.3f}], paired over texts"
        )


def report_score(run, task, table, metric, part, step):
    """Write a row of results.csv; print a line if the metric chose the step."""
    y = table.y.to_numpy()
    guess = table.guess.to_numpy()
    split = table.split.iloc[0]
    value = score(metric, y, guess, task.n_classes)
    chance = score(metric, y, np.full_like(y, task.constant), task.n_classes)
    low, high = interval(metric, y, guess, task.n_classes, table.group, run.config)
    keys = {"metric": metric, "split": split, "part": part, "beside": task.baseline}
    run.result(value, chance, low, high, len(y), **keys, step=step, data=task.source)
    if split == task.last and metric == task.metric:
        run.print(
            f"{split} {metric}, {part} texts: {value:.3f} [{low:.3f}, {high:.3f}] "
            f"({task.baseline} {chance:.3f}), n = {len(y):,} texts in "
            f"{table.group.nunique():,} groups"
        )


def read_rivals(config, task):
    """Read {folder: predictions (N,)} of the runs in `against`, on the reported split."""
    table = task.splits[task.last]
    rivals = {}
    for folder in config.against:
        path = Path(folder) / "predictions.csv"
        if not path.is_file():
            raise InputError(f"against={folder} holds no predictions.csv: finish that run")
        saved = pd.read_csv(path, dtype=str, keep_default_na=False)
        saved = saved[saved.split == task.last]
        same_texts = list(saved.text) == list(table.text)
        if not same_texts or list(saved.label) != list(table.label.astype(str)):
            raise InputError(f"{path} has other texts than {task.name}: compare runs of one task")
        if task.labels:
            rivals[folder] = saved.prediction.map(task.labels.index).to_numpy()
        else:
            rivals[folder] = saved.prediction.astype(float).to_numpy()
    return rivals


# ---- plots


def plot_curves(run, task):
    """Plot the losses, and the validation metric with its chance level, from log.jsonl."""
    log = pd.read_json(run.out / "log.jsonl", lines=True).set_index("step")
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, pattern in zip(axes, ("^(train|val)_loss$", f"^val_{task.metric}$")):
        for key in log.filter(regex=pattern):
            log[key].dropna().plot(ax=axis, style=".-", grid=True, label=key)
    y = task.splits["val"].y.to_numpy()
    chance = score(task.metric, y, np.full_like(y, task.constant), task.n_classes)
    axes[1].axhline(chance, ls=":", c="gray", label=task.baseline)
    axes[0].legend()
    axes[1].legend()
    figure.suptitle(f"{run.out}: {task.name} ({task.source} text), mode={run.config.mode}")
    figure.savefig(run.out / "curves.png", dpi=120)


# ---- the run


@dataclass
class Training:
    """The state that training changes and a checkpoint holds."""

    model: Reader
    net: nn.Module  # the model or, over several ranks, DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    tokenizer: Tokenizer
    step: int = 0
    best: float = -math.inf  # best validation score so far
    waited: int = 0  # validations since the best one


def set_up(config, run, task, lm, tokenizer, state):
    """Return the Training of a language model, restored from the checkpoint `state` if given."""
    model = Reader(lm, len(task.labels or [0]), config).to(run.device).train()
    net = model
    if run.world > 1:
        net = DistributedDataParallel(model, broadcast_buffers=False)
    training = Training(model, net, make_optimizer(model, config), tokenizer)
    if state:
        if state["task"] != task.facts():
            path = run.out / "ckpt.pt"
            raise InputError(f"{path} has other labels than {task.name} now: start a new run")
        model.head.load_state_dict(state["head"])
        groups = training.optimizer.state_dict()["param_groups"]  # from the current options
        training.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        run.scaler.load_state_dict(state["scaler"])
        training.step = state["step"]
        training.best = state["progress"]["best"]
        training.waited = state["progress"]["waited"]
        run.rewind(training.step)
    return training


def plan(config, run, n_texts):
    """Return texts per step over all ranks, total steps, and steps between validations."""
    per_step = config.texts_per_step or config.batch_size * run.world
    if per_step % (config.batch_size * run.world):
        size = f"{config.batch_size} x {run.world}"
        raise InputError(f"texts_per_step={per_step} must be a multiple of batch x ranks = {size}")
    total = config.max_iters or math.ceil(config.epochs * n_texts / per_step)
    eval_interval = config.eval_interval or math.ceil(n_texts / per_step)
    return per_step, total, eval_interval


def describe(config, run, task, model, total):
    """Print the model, the data and the length of the run."""
    sizes = [f"{name} {len(table):,}" for name, table in task.splits.items()]
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.print(
        f"lm={config.lm}, twin={config.twin} | {task.name}, {task.source} text: {', '.join(sizes)} "
        f"| {n_trained / 1e6:.2f} M trained parameters, at most {total:,} steps | {run.device} "
        f"{str(run.dtype)[6:]}"
    )
    if "seen" in task.meta:
        run.print(task.meta["seen"])


def save(run, task, training, name):
    """Write a checkpoint: a language model, its head, and what a resumed run needs."""
    state = lm_state(training.model.lm)
    state["head"] = training.model.head.state_dict()
    state["task"] = task.facts()
    state["optimizer"] = training.optimizer.state_dict()
    state["scaler"] = run.scaler.state_dict()
    state["progress"] = {"best": training.best, "waited": training.waited}
    state["step"] = training.step
    state["config"] = asdict(run.config)
    state["tokenizer"] = training.tokenizer.state
    run.save(name, state)


def finish(config, run, task, model, rivals):
    """Load the best step, score validation and test once; write tables and curves."""
    run.barrier()  # until best.pt is written
    best = run.load("best.pt")
    model.lm.load_state_dict(best["model"])
    model.head.load_state_dict(best["head"])
    for split in dict.fromkeys(("val", task.last)):
        table = task.splits[split]
        out = predict(model, run, table.tokens, config.batch_size)
        table["guess"] = task.predictions(out)
        table["prediction"] = table.guess
        if task.labels:
            table["prediction"] = np.array(task.labels)[table.guess]
            table["p"] = out.softmax(1).amax(1).numpy()
    if run.master:
        report(run, task, rivals, best["step"])
        plot_curves(run, task)


def main(config):
    if not config.out_dir:
        config.out_dir = f"finetuned/{Path(config.dataset).name}-{config.task}"
        config.out_dir += "-twin" if config.twin else ""
    run = Run(config)
    lm, tokenizer, state = build(config, run)
    task = Task(config, run, tokenizer, lm.config.block_size)
    rivals = read_rivals(config, task)
    lengths = task.splits["train"].tokens.map(len)
    per_step, total, eval_interval = plan(config, run, len(lengths))
    patience = config.patience or math.inf
    training = set_up(config, run, task, lm, tokenizer, state)
    describe(config, run, task, training.model, total)
    bar = run.progress(total, training.step, "fine-tune")
    while training.step < total and training.waited < patience and not run.stopped:
        lr = config.learning_rate * lr_share(training.step, total, config)
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        members = texts_of_step(training.step, per_step, lengths, run.seed)
        losses, norm = train_step(training, task, config, run, members)
        training.step += 1
        bar.update()
        run.stopping()
        if training.step % config.log_interval == 0 or training.step == 1:
            loss, spatial = (run.reduce(losses) / run.world).tolist()
            numbers = {"train_loss": loss, "train_spatial": spatial / (2 * lm.config.n_layer)}
            run.log(training.step, **numbers, grad_norm=norm.item(), lr=lr)
        if training.step % eval_interval == 0 or training.step == total:
            scores = validate(training.model, run, task, config.batch_size, training.step)
            run.log(training.step, **scores)
            training.waited += 1
            if scores[f"val_{task.metric}"] > training.best:
                training.best = scores[f"val_{task.metric}"]
                training.waited = 0
                save(run, task, training, "best.pt")
        if training.step % config.save_interval == 0:
            save(run, task, training, "ckpt.pt")
    save(run, task, training, "ckpt.pt")
    bar.close()
    if not run.stopped:
        finish(config, run, task, training.model, rivals)
        run.merge()
    run.close()


if __name__ == "__main__":
    main(configure(Config))
