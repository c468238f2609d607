"""What a language model is worth for a task: sentence classification and regression on any of our checkpoints, or on GPT-2.

    python finetune.py                                                        # embedded: which library area a docstring comes from
    python finetune.py dataset=grammar task=grammaticality by=template        # embedded: is the sentence English?
    python finetune.py twin=True                                              # the same shape with random weights, then the paired comparison:
    python finetune.py against=finetuned/docstrings-area-twin
    torchrun --standalone --nproc_per_node=4 finetune.py config/finetune_glue.yaml task=mnli by=set
    python finetune.py init_from=resume                                       # go on after a stop, bit for bit

The mask stays causal and the state of the last real token is read by a linear head. An end-of-text token opens a text and stands between the two
of a pair. The step is chosen on validation data, the test split is scored once. What comes out is a language model like any other: lm=finetuned/...

Wang et al. 2019 (GLUE); Rathi et al. 2025 (TopoLM); Howard & Ruder 2018.
"""
import json
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
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import positions
from configurator import Run, configure, key_seed, write_aside
from data.stimuli import read_meta, read_task
from model import GPT, Tokenizer, lm_from, lm_state, load_lm


@dataclass
class Config:
    # ---- task
    lm: str = "out/train"                          # run folder or checkpoint of ours, or a Hugging Face GPT-2
    twin: bool = False                             # forget the weights: the same shape, freshly initialised
    dataset: str = "docstrings"                    # name under data/, or a folder of labelled sentences (data/stimuli.py)
    task: str = "area"                             # of the dataset
    metric: Literal["", "accuracy", "matthews", "f1", "pearson", "spearman"] = ""  # chooses the step; "": GLUE's own, accuracy, or pearson
    by: str = ""                                   # a column of the task: the test score of each of its values, too
    against: list[str] = field(default_factory=list)  # folders of finished runs on the same test: paired comparison
    # ---- model
    mode: Literal["full", "head", "last_k"] = "full"  # what is trained: everything, the head, or head and last k blocks
    k: int = 1                                     # last_k: blocks
    dropout: float = 0.0                           # probability, in what is trained; harms models that were trained without
    alpha_scale: float = 0.0                       # spatial loss with so many times the checkpoint's alpha
    # ---- optimiser
    batch_size: int = 16                           # texts per micro-batch
    texts_per_step: int = 0                        # texts per optimiser step over all ranks, 0: one micro-batch per rank; accumulation is derived
    epochs: float = 10.0                           # passes over the training texts at most
    max_iters: int = 0                             # optimiser steps at most; 0: epochs
    learning_rate: float = 2e-4                    # AdamW's peak
    schedule: Literal["linear", "constant"] = "linear"  # after the warm-up: down to 0, or level
    warmup_iters: int = 50                         # linear warm-up
    weight_decay: float = 0.1                      # on matrices and embeddings
    grad_clip: float = 1.0                         # total norm; 0: none
    # ---- evaluation
    eval_interval: int = 0                         # steps between validations, 0: an epoch
    patience: int = 4                              # validations without a better one before it stops; 0: never stops early
    resamples: int = 1000                          # bootstrap over groups of texts
    # ---- run
    out_dir: str = ""                              # "": finetuned/DATASET-TASK, with -twin
    init_from: Literal["lm", "resume"] = "lm"      # resume: go on after a stop
    overwrite: bool = False                        # start over in a folder that holds a run
    seed: int = 1337                               # fixes everything
    device: str = "auto"                           # cuda, mps, cpu
    dtype: str = "auto"                            # bfloat16 where the hardware has it; float16, float32
    deterministic: bool = False                    # bit-for-bit repeats on CUDA too, slower
    log_interval: int = 50                         # steps between lines
    save_interval: int = 200                       # steps between checkpoints
    wandb_log: bool = False                        # log to Weights & Biases
    wandb_project: str = "nanocortex"              # its project

    POSITIVE = "batch_size k log_interval save_interval resamples"
    SHARES = "dropout"

    def check(self):
        if self.max_iters < 1 and self.epochs <= 0:
            raise ValueError(f"epochs={self.epochs} and max_iters={self.max_iters} leave nothing to do: one must be above 0")


# ---- data

class Task:
    """One task of a dataset of labelled sentences, in the tokens of a language model.

    parts: {split: DataFrame}; rows: {split: [token ids]}; y: {split: (N,) tensor}, class numbers or, of a regression, numbers standardised by the mean
    and sd of training; labels: names of the classes, None of a regression; metrics; metric, the one that chooses. Raises ValueError or
    FileNotFoundError with one sentence."""

    def __init__(self, config, run, tokenizer, block_size):
        folder = run.dataset(config.dataset)
        table, self.meta = read_task(folder, config.task), read_meta(folder)
        entry, self.name = self.meta["tasks"][config.task], f"{config.dataset} {config.task}"
        self.labels = entry["labels"] if entry["kind"] == "classification" else None
        self.metrics = ["accuracy", "matthews", "f1"] if self.labels else ["pearson", "spearman"]
        self.metric = config.metric or GLUE_METRIC.get(config.task, self.metrics[0])
        self.source = "synthetic" if self.meta.get("synthetic") else "real"
        if self.metric not in self.metrics:
            raise ValueError(f"metric={self.metric} is not for a {entry['kind']}: take {', '.join(self.metrics)}")
        if config.by and config.by not in table:
            raise ValueError(f"task '{config.task}' has no column by={config.by}, only {', '.join(table.columns)}")
        self.parts = {split: table[table.split == split].reset_index(drop=True) for split in ("train", "val", "test") if (table.split == split).any()}
        if missing := [split for split in ("train", "val") if split not in self.parts]:
            raise ValueError(f"{folder}, task '{config.task}', has no text in the split '{missing[0]}': validation chooses the step, give it a share")
        encoded = {split: [encode(tokenizer, text, block_size) for text in part.text] for split, part in self.parts.items()}
        self.rows = {split: [row for row, _ in texts] for split, texts in encoded.items()}
        if cuts := [cut for texts in encoded.values() for _, cut in texts if cut]:
            run.print(f"{len(cuts):,} of {len(table):,} texts are longer than the {block_size} tokens of {config.lm}: their ends were cut, "
                      f"{np.mean(cuts):.0f} tokens on average")
        train = self.parts["train"].y
        self.mean, self.sd = (0.0, 1.0) if self.labels else (float(train.mean()), float(train.std(ddof=0)))
        self.y = {split: torch.tensor((part.y - self.mean).to_numpy() / self.sd, dtype=torch.int64 if self.labels else torch.float32)
                  for split, part in self.parts.items()}
        self.constant = train.mode()[0] if self.labels else train.mean()
        self.baseline = f"majority guess ({self.labels[self.constant]})" if self.labels else "mean guess"

    def loss(self, out, y):
        """Cross-entropy, or mean squared error, of outputs (B, n_out)."""
        return F.cross_entropy(out, y) if self.labels else F.mse_loss(out[:, 0], y)

    def guess(self, out):
        """Class numbers, or numbers as the labels are, (N,) of outputs (N, n_out)."""
        return (out.argmax(1) if self.labels else out[:, 0] * self.sd + self.mean).numpy()


def encode(tokenizer, text, size):
    """(token ids, tokens cut) of a text, or of a pair with a tab between: each part behind an end-of-text token (a line break where the tokenizer has
    none), at most `size` tokens; the longer part is cut first, at its end."""
    mark = [tokenizer.eot] if tokenizer.eot is not None else tokenizer.encode("\n")
    parts = [tokenizer.encode(part) for part in text.split("\t")]
    if len(parts) > 2:
        raise ValueError(f"{text[:60]!r} has {len(parts)} parts, with tabs between: give one or two")
    room = size - len(mark) * len(parts)
    if room < len(parts):
        raise ValueError(f"block_size={size} of the language model has no room for a text: take one that was trained with a longer context")
    cut = max(0, sum(map(len, parts)) - room)
    for _ in range(cut):
        max(parts, key=len).pop()
    return [token for part in parts for token in mark + part], cut


def batch(rows, device):
    """Right-padded ids (B, T) and lengths (B,) of token lists; causal attention never looks at what comes after, so pads change nothing before them."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device), torch.tensor([len(row) for row in rows], device=device)


class Order:
    """The training texts without replacement: text number k of the run (counted over all ranks) by a permutation keyed by (seed, epoch)."""

    def __init__(self, run, rows, per_step):
        self.run, self.rows, self.per_step, self.epoch = run, rows, per_step, None

    def __call__(self, step):
        """Indices of a step's texts, by length: micro-batches of nearly equal lengths have few pads."""
        return sorted((self._text(k) for k in range(step * self.per_step, (step + 1) * self.per_step)), key=lambda i: len(self.rows[i]))

    def _text(self, k):
        epoch, i = divmod(k, len(self.rows))
        if self.epoch != epoch:
            self.epoch, self.order = epoch, np.random.default_rng(key_seed(self.run.seed, "epoch", epoch)).permutation(len(self.rows))
        return self.order[i]


# ---- model

class Reader(nn.Module):
    """A language model, and a linear head on the state of the last real token."""

    def __init__(self, lm, n_out, config):
        super().__init__()
        self.lm, self.head, self.dropout = lm, nn.Linear(lm.config.n_embd, n_out), config.dropout
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(key_seed(config.seed, "head"))) * 0.02)
        if config.mode != "full":
            lm.requires_grad_(False)
        if config.mode == "last_k":
            for part in (*lm.transformer.h[-config.k:], lm.transformer.ln_f):
                part.requires_grad_(True)

    def train(self, mode=True):
        """Dropout is for what is trained: modules whose parameters are frozen stay as in evaluation."""
        super().train(mode)
        for module in self.lm.modules():
            module.training = mode and any(p.requires_grad for p in module.parameters())
        return self

    def forward(self, idx, lengths, windows=None):
        """idx (B, T), lengths (B,) → outputs (B, n_out) float32, and with windows (2 n_layer, K) the spatial loss summed over the sheets, else None."""
        on_sheets = windows is not None and self.lm.config.spatial == "activations"
        x, _, taps = self.lm.trunk(idx, hidden=positions.layer_names(self.lm.config.n_layer) if on_sheets else ())
        last = x[torch.arange(len(idx), device=idx.device), lengths - 1]  # (B, C)
        out = self.head(F.dropout(last, self.dropout, self.training)).float()
        return out, self.spatial(taps, lengths, windows) if on_sheets else self.lm.weight_loss() if windows is not None else None

    def spatial(self, taps, lengths, windows):
        """Over the real tokens: no pad, nor the token that opens every text, at which all texts respond alike."""
        lm, width = self.lm, next(iter(taps.values())).size(1)
        place = torch.arange(width, device=lengths.device)
        real = (place > 0) & (place < lengths[:, None])  # (B, T)
        cells = lm.window_cells[windows.to(lengths.device)]  # (2L, K, n)
        units = lm.unit_at_cell.gather(1, cells.flatten(1)).view(cells.shape)
        return sum(positions.spatial_loss(tap[real], sheet, lm.near, lm.config.spatial_kind, lm.config.accum) for tap, sheet in zip(taps.values(), units))


def build(config, run):
    """(language model, tokenizer, the checkpoint of a resumed run or None)."""
    state = None
    if config.init_from == "resume":
        state, path = run.load("ckpt.pt"), run.out / "ckpt.pt"
        if "task" not in state:
            raise ValueError(f"{path} is no run of finetune.py: give lm={run.out} and another out_dir=")
        for key in ("dataset", "task", "mode", "k", "twin"):
            if (was := state["config"][key]) != getattr(config, key):
                raise ValueError(f"{path} has {key}={was}, the options say {getattr(config, key)}: resume with the options of its own config.yaml")
        lm, tokenizer = lm_from(state, path, dropout=config.dropout), Tokenizer(state["tokenizer"])
    else:
        lm, tokenizer = load_lm(config.lm, dropout=config.dropout)
        if config.twin:
            lm = GPT(lm.config, getattr(lm, "unit_at_cell", None), config.seed)
    c = lm.config
    if tokenizer.n_vocab > c.vocab_size:
        raise ValueError(f"lm={config.lm} has a tokenizer of {tokenizer.n_vocab} tokens and a model of {c.vocab_size}: they do not belong together")
    if config.mode == "last_k" and config.k > c.n_layer:
        raise ValueError(f"k={config.k} is more than the {c.n_layer} blocks of lm={config.lm}: take mode=full")
    if config.alpha_scale and not (c.sheet and c.alpha):
        raise ValueError(f"alpha_scale={config.alpha_scale} scales the alpha of lm={config.lm}, which has {'alpha=0' if c.sheet else 'no positions'}: "
                         "leave it at 0, or take a topographic model")
    return lm, tokenizer, state


def lr_share(step, total, config):
    """Learning rate at a step as a share of its peak."""
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    return 1.0 if config.schedule == "constant" else (total - step) / max(1, total - config.warmup_iters)


# ---- evaluate

GLUE_METRIC = {"cola": "matthews", "mrpc": "f1", "qqp": "f1"}


def score(metric, y, guess):
    """GLUE's metrics. y, guess (N,): class numbers, or floats for pearson and spearman. f1 is that of class 1 of two, the mean over more classes;
    a constant guess correlates with nothing: 0."""
    if metric == "accuracy":
        return float(sklearn.metrics.accuracy_score(y, guess))
    if metric == "f1":
        two = max(y.max(), guess.max()) < 2
        return float(sklearn.metrics.f1_score(y, guess, average="binary" if two else "macro", zero_division=0))
    if np.ptp(y) == 0 or np.ptp(guess) == 0:
        return 0.0
    if metric == "matthews":
        return float(sklearn.metrics.matthews_corrcoef(y, guess))
    return float((scipy.stats.pearsonr if metric == "pearson" else scipy.stats.spearmanr)(y, guess).statistic)


def interval(metric, y, guess, groups, resamples, seed, other=None):
    """95 % bootstrap interval of a score, or of the difference to the score of `other` guesses, over groups (N,): what belongs together (a document, the
    twins of a minimal pair) is drawn together."""
    rng, codes = np.random.default_rng(key_seed(seed, "bootstrap")), np.unique(groups, return_inverse=True)[1]
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    drawn = []
    for _ in range(resamples):
        i = np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
        drawn.append(score(metric, y[i], guess[i]) - (0 if other is None else score(metric, y[i], other[i])))
    return tuple(map(float, np.quantile(drawn, (0.025, 0.975))))


@torch.no_grad()
def predict(model, run, rows, batch_size):
    """Outputs (N, n_out) float64 of all texts, in batches by length that are dealt over the ranks: the same on any number of them."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = torch.zeros(len(rows), model.head.out_features, dtype=torch.float64)
    for at in range(run.rank * batch_size, len(rows), run.world * batch_size):
        members = order[at:at + batch_size]
        with run.autocast():
            out[members] = model(*batch([rows[i] for i in members], run.device))[0].double().cpu()
    model.train()
    return run.reduce(out).cpu()


def report(config, run, task, outs, rivals, step):
    """The chosen model on validation and, once, on test: predictions.csv, and the rows of results.csv beside the constant guess and the rivals."""
    tables, last = [], list(outs)[-1]  # test, where there is one
    for split, out in outs.items():
        part, said = task.parts[split], task.guess(out)
        named = dict(prediction=np.array(task.labels)[said], p=out.softmax(1).amax(1).numpy()) if task.labels else dict(prediction=said)
        tables.append(part[["split", "label", "text", "group"]].assign(**named))
        wanted = [(metric, "all", np.full(len(part), True)) for metric in task.metrics]
        if config.by and split == last:
            wanted += [(task.metric, value, (part[config.by] == value).to_numpy()) for value in sorted(set(part[config.by]))]
        for metric, what, of in wanted:
            y, guess, groups = part.y.to_numpy()[of], said[of], part.group.to_numpy()[of]
            value, chance = score(metric, y, guess), score(metric, y, np.full_like(y, task.constant))
            low, high = interval(metric, y, guess, groups, config.resamples, run.seed)
            run.result(value, chance, low, high, len(y), metric=metric, split=split, part=what, beside=task.baseline, step=step, data=task.source)
            if split == last and metric == task.metric:
                run.print(f"{split} {metric}{f' of {what}' * (what != 'all')}: {value:.3f} [{low:.3f}, {high:.3f}] beside {chance:.3f} of the "
                          f"{task.baseline}, n = {len(y):,} texts in {len(set(groups)):,} groups")
    run.print(f"step {step} was chosen on validation" + (": no test split, so the score above is of the very data that chose" if last == "val" else ""))
    write_aside(run.out / "predictions.csv", pd.concat(tables).to_csv(index=False))
    y, groups = (task.parts[last][column].to_numpy() for column in ("y", "group"))
    for folder, other in rivals.items():
        value = score(task.metric, y, said) - score(task.metric, y, other)
        low, high = interval(task.metric, y, said, groups, config.resamples, run.seed, other)
        run.result(value, 0.0, low, high, len(y), metric=f"{task.metric} difference", split=last, part="all", beside=folder, step=step, data=task.source)
        run.print(f"{last} {task.metric} minus that of {folder}: {value:+.3f} [{low:+.3f}, {high:+.3f}], the same texts in pairs")


def read_rivals(config, task):
    """{folder: guesses (N,)} of the finished runs in `against`, on the split that is reported."""
    part, found = task.parts.get("test", task.parts["val"]), {}
    for folder in config.against:
        path = Path(folder) / "predictions.csv"
        if not path.is_file():
            raise FileNotFoundError(f"against={folder} holds no predictions.csv: finish that run first, or leave it out")
        theirs = pd.read_csv(path, dtype=str, keep_default_na=False)
        theirs = theirs[theirs.split == part.split[0]]
        if list(theirs.text) != list(part.text) or list(theirs.label) != list(part.label.astype(str)):
            raise ValueError(f"{path} is of other texts than {task.name}: compare runs of one task")
        found[folder] = theirs.prediction.map(task.labels.index).to_numpy() if task.labels else theirs.prediction.astype(float).to_numpy()
    return found


# ---- plots

def plot_curves(run, task):
    """curves.png: loss of training and validation, and the metric on validation with the constant guess, from log.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for axis, key, style in ((left, "train_loss", dict(lw=1, alpha=0.7)), (left, "val_loss", dict(lw=2, marker="o", ms=3)),
                             (right, f"val_{task.metric}", dict(lw=2, marker="o", ms=3, c="C1"))):
        axis.plot(*zip(*[(line["step"], line[key]) for line in lines if key in line]), label=key, **style)
    y = task.parts["val"].y.to_numpy()
    right.axhline(score(task.metric, y, np.full_like(y, task.constant)), ls=":", c="gray", label=task.baseline)
    for axis, name in ((left, "loss"), (right, task.metric)):
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
        axis.legend()
    fig.suptitle(f"{run.out}: {task.name} ({task.source} text), lm={run.config.lm}{', random weights' * run.config.twin}, mode={run.config.mode}", fontsize=10)
    fig.savefig(run.out / "curves.png", dpi=120)
    plt.close(fig)


# ---- the run

def main(config):
    config.out_dir = config.out_dir or f"finetuned/{Path(config.dataset).name}-{config.task}{'-twin' * config.twin}"
    run = Run(config)
    lm, tokenizer, state = build(config, run)
    task = Task(config, run, tokenizer, lm.config.block_size)
    rivals, rows, n = read_rivals(config, task), task.rows["train"], len(task.rows["train"])
    model = Reader(lm, len(task.labels or [0]), config).to(run.device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([dict(params=[p for p in trained if p.dim() >= 2], weight_decay=config.weight_decay),
                                   dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0)], lr=config.learning_rate)
    step, best, best_step, waited = 0, -math.inf, 0, 0
    if state:
        model.head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        step, best, best_step, waited = (state[key] for key in ("step", "best", "best_step", "waited"))
        run.rewind(step)
    resumed = step if state else None
    per_step = config.texts_per_step or config.batch_size * run.world
    if per_step % (config.batch_size * run.world):
        raise ValueError(f"texts_per_step={per_step} must be a multiple of batch_size x ranks = {config.batch_size} x {run.world}")
    accum = per_step // config.batch_size  # micro-batches per step over all ranks
    total, every = config.max_iters or math.ceil(config.epochs * n / per_step), config.eval_interval or math.ceil(n / per_step)
    order = Order(run, rows, per_step)
    ddp = DistributedDataParallel(model, device_ids=[run.device] if run.device.type == "cuda" else None, broadcast_buffers=False) if run.world > 1 else model
    run.print(f"{config.lm}{', random weights' * config.twin} | {task.name}, {task.source} text: " + ", ".join(f"{split} {len(r):,}" for split, r in
              task.rows.items()) + f" | {sum(p.numel() for p in trained) / 1e6:.2f} M of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M "
              f"parameters trained | {total:,} steps of {accum} x {config.batch_size} texts at most | {run.device} {str(run.dtype)[6:]}")
    if "seen" in task.meta:
        run.print(task.meta["seen"])

    def train_step():
        """One optimiser step; task and spatial loss (2,) of this rank's micro-batches and the gradient's norm, left on the device."""
        losses, chosen = torch.zeros(2, device=run.device), order(step)
        micros = range(run.rank, accum, run.world)
        for micro in micros:
            members = chosen[micro * config.batch_size:(micro + 1) * config.batch_size]
            windows = lm.draw_windows(run.generator(step, micro, "windows")) if config.alpha_scale else None
            torch.manual_seed(key_seed(run.seed, step, micro, "dropout"))
            if run.world > 1:
                ddp.require_backward_grad_sync = micro == micros[-1]
            with run.autocast():
                out, spatial = ddp(*batch([rows[i] for i in members], run.device), windows)
            loss = task.loss(out, task.y["train"][members].to(run.device))
            losses += torch.stack([loss, loss * 0 if spatial is None else spatial]).detach() / len(micros)
            if spatial is not None:
                loss = loss + config.alpha_scale * lm.config.alpha * spatial
            run.scaler.scale(loss / len(micros)).backward()
        run.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip or math.inf)
        if not run.scaler.is_enabled() and not norm.isfinite():  # the same on every rank; float16's scaler meets overflows by itself
            raise ValueError(f"the gradient is not finite at step {step + 1}: stopped; try a smaller learning_rate, or dtype=float32")
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * lr_share(step, total, config)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return losses, norm

    def validate():
        out = predict(model, run, task.rows["val"], config.batch_size)
        loss = task.loss(out.float(), task.y["val"]).item()
        if not math.isfinite(loss):
            raise ValueError(f"the validation loss is not finite at step {step}: stopped; try a smaller learning_rate, or dtype=float32")
        y = task.parts["val"].y.to_numpy()
        return dict(val_loss=loss, **{f"val_{metric}": score(metric, y, task.guess(out)) for metric in task.metrics})

    def save(name):  # a language model like any other, and its head
        run.save(name, {**lm_state(lm), "head": model.head.state_dict(), "task": dict(name=task.name, labels=task.labels, mean=task.mean, sd=task.sd),
                        "optimizer": optimizer.state_dict(), "scaler": run.scaler.state_dict(), "step": step, "best": best, "best_step": best_step,
                        "waited": waited, "cursor": step * per_step, "config": asdict(config), "tokenizer": tokenizer.state})

    bar = run.progress(total, step, "fine-tune")
    while True:
        ends = step >= total
        if step and step != resumed and (ends or step % every == 0):
            scores = validate()
            run.log(step, **scores)
            waited += 1
            if scores[f"val_{task.metric}"] > best:
                best, best_step, waited = scores[f"val_{task.metric}"], step, 0
                save("best.pt")
        ends = ends or 0 < config.patience <= waited
        if step and step != resumed and (step % config.save_interval == 0 or ends or run.stopped):
            save("ckpt.pt")
        if ends or run.stopped:
            break
        losses, norm = train_step()
        step += 1
        bar.update()
        run.stopping()
        if step % config.log_interval == 0 or step == 1:
            loss, spatial = (run.reduce(losses) / run.world).tolist()
            sheets = dict(train_spatial=spatial / (2 * lm.config.n_layer)) if config.alpha_scale else {}
            run.log(step, train_loss=loss, **sheets, grad_norm=norm.item(), lr=config.learning_rate * lr_share(step - 1, total, config))
    bar.close()
    if not run.stopped:
        run.barrier()  # best.pt is written
        chosen = run.load("best.pt")
        lm.load_state_dict(chosen["model"])
        model.head.load_state_dict(chosen["head"])
        outs = {split: predict(model, run, task.rows[split], config.batch_size) for split in ("val", "test") if split in task.rows}
        if run.master:
            report(config, run, task, outs, rivals, best_step)
            plot_curves(run, task)
        run.merge()
    run.close()


if __name__ == "__main__":
    main(configure(Config))
