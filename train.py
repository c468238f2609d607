"""Train a GPT-2 whose units lie on cortical sheets.

The loss is the next-token loss plus alpha times the spatial losses of all sheets.

    python train.py                                    # embedded: real text, minutes on two cores
    python train.py minutes=8                          # as many steps as fit into 8 minutes
    python train.py alpha=0 out_dir=out/train_alpha0   # the twin without topography, same data
    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.yaml
    python train.py init_from=resume                   # resume after a stop, bit for bit

Rathi et al. 2025 (TopoLM); Margalit et al. 2024 (TDANN).
"""

import json
import math
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import positions
from configurator import Run, configure, hash_options, key_seed
from convert import load_lm, load_positions
from data import InputError, write_aside
from data.tokens import Tokens, tokenizer_state
from model import GPT, GPTConfig, check_choice, lm_from, lm_state


@dataclass
class Config:
    # ---- data
    dataset: str = "pydocs"  # name under data/, or a folder of token files (nanoGPT's, llm.c's too)
    batch_size: int = 16  # sequences per micro-batch
    block_size: int = 128  # tokens of context
    tokens_per_step: int = 0  # over all ranks; 0: one micro-batch per rank
    # ---- model
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 256  # units per sheet; must be a square number (16 x 16)
    vocab_size: int = 0  # 0: the dataset's, rounded up to a multiple of 64
    dropout: float = 0.0  # probability
    bias: bool = False  # biases in linear layers and LayerNorms
    gelu: Literal["exact", "tanh"] = "exact"  # tanh as in the released GPT-2
    # ---- sheet
    positions: str = "random"  # none, NAME (gpt2-positions/NAME.npz), a file, or TopoLM's folder
    alpha: float = 0.1  # weight of each sheet's spatial loss; 0: only measured in validation
    radius: int = 4  # a window holds the cells closer than this to its centre
    norm: float = float("inf")  # in this p-norm: 1, 2, inf
    windows: int | Literal["sheet"] = 5  # per sheet and micro-batch; sheet: one, the whole sheet
    spatial: Literal["activations", "weights"] = "activations"  # loss on; weights: TopoLoss
    factor: float = 3.0  # weights: shrink the sheet this much along each axis to blur it
    spatial_kind: str = "relative"  # (1 - corr(r, D)) / 2; absolute: |r - D|
    accum: Literal["mean", "maximum"] = "mean"  # over the windows
    tap: Literal["sublayer", "residual"] = "sublayer"  # on the sheet: its output, or the stream
    activation_decay: float = 0.0  # weight of the mean squared norm of each sheet's activations
    head_loss: bool = False  # attention sheet is a mosaic of heads, without output projection
    attn_proj: bool = False  # add a Linear after attention; its output lies on the sheet
    # ---- optimiser
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for the blocks' matrices, AdamW elsewhere
    learning_rate: float = 3e-3  # AdamW's peak
    muon_lr: float = 0.02  # Muon's peak
    weight_decay: float = 0.1  # on matrices and embeddings
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    momentum: float = 0.95  # Muon
    grad_clip: float = 1.0  # total norm; 0: none
    schedule: str = "wsd"  # after the warm-up: wsd or cosine (a name in SCHEDULES)
    max_iters: int = 1000  # optimiser steps
    minutes: float = 0.0  # sets max_iters from the time of the first steps; 0: use max_iters
    warmup_iters: int = 20  # steps of linear warm-up
    decay_iters: int = 0  # cosine: last step, 0: max_iters; wsd: steps of decay, 0: 60 %
    min_lr: float = 0.0  # at the end of the decay, as a share of the peak
    # ---- evaluation
    eval_interval: int = 250  # steps between validations
    eval_batches: int = 48  # micro-batches of the fixed validation set; 0: all
    eval_only: bool = False  # validate and stop
    baseline_tokens: int = 50_000_000  # training tokens for the n-gram baselines; 0: no baselines
    dry_run: bool = False  # estimate parameters, memory, disk and time, and stop
    # ---- run
    out_dir: str = "out/train"  # checkpoints, log, figures
    init_from: str = "scratch"  # resume, a run folder or checkpoint, or a Hugging Face GPT-2
    overwrite: bool = False  # start over in a folder that holds a run
    seed: int = 1337  # fixes all random numbers
    device: str = "auto"  # cuda, mps, cpu
    dtype: str = "auto"  # bfloat16 where faster; float16, float32
    compile: Literal["auto", True, False] = "auto"  # auto: on CUDA; on a CPU if known to pay off
    recompute: bool = False  # activation checkpointing: less memory, a third more time
    deterministic: bool = False  # bit-for-bit reproducible on CUDA, too, but slower
    log_interval: int = 50  # steps between log lines
    save_interval: int = 250  # steps between checkpoints
    keep_interval: int = 0  # steps between checkpoints to keep as ckpt-STEP.pt; 0: none
    wandb_log: bool = False  # Weights & Biases; WANDB_MODE=offline logs to out_dir/wandb
    wandb_project: str = "nanocortex"  # Weights & Biases project

    POSITIVE = (
        "batch_size block_size n_layer n_head n_embd windows norm factor "
        "eval_interval log_interval save_interval"
    )
    SHARES = "dropout momentum min_lr"

    def check(self):
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            if not 0 <= value < 1:
                raise InputError(f"option '{key}' must be at least 0 and below 1, not {value}")
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.alpha and self.positions == "none":
            raise InputError("alpha > 0 needs positions: set alpha=0 or positions=random")


# ---- data


class Data:
    """Tokens and tokenizer of config.dataset; an embedded dataset is made on first use."""

    def __init__(self, run, config):
        folder = run.dataset(config.dataset)
        self.train = Tokens(folder, "train")
        self.val = Tokens(folder, "val")
        self.val_starts = validation_starts(self.val, config)
        self.vocab_size = self.train.vocab_size
        self.tokenizer = tokenizer_state(folder)


def validation_starts(tokens, config):
    """Return the starts of the validation windows: evenly spaced, disjoint, whole micro-batches."""
    n_windows = (len(tokens) - 1) // config.block_size
    n_batches = n_windows // config.batch_size
    if n_batches < 1:
        remedy = "give smaller ones, or more text"
        size = f"batch_size={config.batch_size} x block_size={config.block_size}"
        raise InputError(f"{tokens.path}: {len(tokens):,} tokens do not fill {size}: {remedy}")
    if config.eval_batches:
        n_batches = min(n_batches, config.eval_batches)
    count = n_batches * config.batch_size
    return (np.arange(count) * n_windows // count) * config.block_size


class Loader:
    """Draw micro-batches of random windows without replacement.

    Window k of the run is the same for any number of ranks and any alpha: epoch k // n_windows
    reads the stream's windows with an order and an offset keyed by (seed, epoch). `cursor` counts
    the windows of finished steps.
    """

    def __init__(self, run, tokens, config, n_micro, cursor=0):
        self.run, self.tokens, self.config = run, tokens, config
        self.n_micro = n_micro  # micro-batches per step, over all ranks
        self.cursor = cursor
        self.n_windows = (len(tokens) - 1) // config.block_size - 1  # one less, for the offset
        if self.n_windows < 1:
            remedy = "give a smaller one, or more text"
            size = f"two windows of block_size={config.block_size}"
            raise InputError(f"{tokens.path}: {len(tokens):,} tokens do not fill {size}: {remedy}")
        self.epoch = None

    def start_of(self, window):
        """Return where a window starts in the stream."""
        epoch, i = divmod(window, self.n_windows)
        if epoch != self.epoch:
            rng = np.random.default_rng(key_seed(self.run.seed, "epoch", epoch))
            self.epoch = epoch
            self.order = rng.permutation(self.n_windows)
            self.offset = int(rng.integers(self.config.block_size))
        return self.order[i] * self.config.block_size + self.offset

    def batch(self, micro):
        """Return idx, targets (B, T), int64 on the device: a micro-batch of the next step."""
        size = self.config.batch_size
        first = self.cursor + micro * size
        starts = [self.start_of(window) for window in range(first, first + size)]
        batch = torch.from_numpy(self.tokens.windows(starts, self.config.block_size + 1))
        if self.run.device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(self.run.device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]


def ngram_losses(train, val, starts, length, vocab_size):
    """Return the cross-entropy (nats per token) of n-gram models on the GPT's validation tokens.

    Interpolated by Witten and Bell's rule (Chen & Goodman 1998).
    """
    train = np.asarray(train, np.int64)
    val = np.asarray(val, np.int64)
    targets = (starts[:, None] + np.arange(1, length + 1)).ravel()  # their indices in val
    targets = targets[targets >= 2]
    p = np.full(len(targets), 1 / vocab_size)
    losses = {}
    for order, name in enumerate(("unigram", "bigram", "trigram")):
        # a context is one number: its `order` tokens in base vocab_size
        train_contexts = np.zeros(len(train) - order, np.int64)
        contexts = np.zeros(len(targets), np.int64)
        for back in range(order, 0, -1):
            train_contexts = train_contexts * vocab_size + train[order - back : len(train) - back]
            contexts = contexts * vocab_size + val[targets - back]
        grams = pd.Series(train_contexts * vocab_size + train[order:]).value_counts()
        followers = pd.Series(grams.index // vocab_size).value_counts()
        c = grams.reindex(contexts * vocab_size + val[targets], fill_value=0).to_numpy()
        n = pd.Series(train_contexts).value_counts().reindex(contexts, fill_value=0).to_numpy()
        t = followers.reindex(contexts, fill_value=0).to_numpy()  # distinct tokens after a context
        p = np.where(n > 0, (c + t * p) / np.maximum(n + t, 1), p)
        losses[name] = float(-np.log(p).mean())
    return losses


def baseline_losses(run, config, data):
    """Return the n-gram losses to beat (rank 0)."""
    if not (config.baseline_tokens and run.master):
        return {}
    train = data.train.tokens[: config.baseline_tokens]
    losses = ngram_losses(
        train, data.val.tokens, data.val_starts, config.block_size, data.vocab_size
    )
    words = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    run.print(f"validation loss to beat, nats per token: {words}")
    return losses


# ---- model


# fields of GPTConfig that a later run may change, as no weight depends on them
FREE = ["dropout", "sheet", "radius", "norm", "windows", "alpha", "spatial", "factor"]
FREE += ["spatial_kind", "accum", "tap", "activation_decay"]
# fields that a loaded model settles, whatever the options say
SHAPE = [f.name for f in fields(GPTConfig) if f.name not in (*FREE, "block_size", "vocab_size")]


def model_options(config, data):
    """Return the fields of GPTConfig, from those of Config with the same names and the data."""
    options = {key: value for key, value in asdict(config).items() if hasattr(GPTConfig, key)}
    options["vocab_size"] = config.vocab_size or math.ceil(data.train.vocab_size / 64) * 64
    options["sheet"] = config.positions != "none"
    return options


def build(run, config, data):
    """Return the GPT to train and, on resume, its checkpoint."""
    options = model_options(config, data)
    state = None
    if config.init_from == "scratch":
        layout = load_layout(config, config.n_layer, config.n_embd)
        model = GPT(GPTConfig(**options), layout, config.seed)
    elif config.init_from == "resume":
        path = run.out / "ckpt.pt"
        state = run.load(path.name)
        check_resumable(path, state, config, data, options)
        model = lm_from(state, path, **{key: options[key] for key in FREE})
    else:
        model = start_from(config, data, options)
    for key in SHAPE:
        shape = getattr(model.config, key)
        if getattr(config, key) != shape and key in getattr(config, "given", ()):
            run.print(f"{key}={getattr(config, key)} is ignored: init_from= has {key}={shape}")
        setattr(config, key, shape)
    check_vocabulary(config, data, model.config)
    return model.to(run.device), state


def check_vocabulary(config, data, shape):
    """Raise InputError where the dataset has more tokens than the model."""
    if data.vocab_size > shape.vocab_size:
        raise InputError(f"dataset={config.dataset} has more tokens than the model: set vocab_size")


def load_layout(config, n_layer, n_units):
    """Load unit_at_cell from a positions file; None where config.positions names none."""
    path = config.positions
    if path in ("random", "none"):
        return None
    if not path.endswith(".npz") and not Path(path).is_dir():
        path = f"gpt2-positions/{path}.npz"
    return load_positions(path, n_layer, n_units)


def check_resumable(path, state, config, data, options):
    """Raise InputError where a checkpoint has another script, optimiser, tokenizer or shape."""
    if "optimizers" not in state:
        remedy = f"start from it with init_from={path} and another out_dir="
        raise InputError(f"{path} has no optimiser state to resume: {remedy}")
    saved = state["config"]["optimizer"]
    if saved != config.optimizer:
        raise InputError(f"{path} has optimizer={saved}, the options say {config.optimizer}")
    if state["tokenizer"]["ranks"] != data.tokenizer["ranks"]:
        raise InputError(f"{path} has another tokenizer than dataset={config.dataset}")
    n_tokens = [len(data.train), len(data.val)]
    if state.get("n_tokens", n_tokens) != n_tokens:
        now = f"{n_tokens} training and validation tokens, {path} had {state['n_tokens']}"
        raise InputError(f"dataset={config.dataset} has {now}: was it prepared again?")
    if state.get("origin", "scratch") != "scratch":
        return  # its shape never came from the options
    for key, value in options.items():
        saved = state["model_args"][key]
        if key not in FREE and saved != value:
            raise InputError(f"{path} has {key}={saved}, the options say {value}")


def start_from(config, data, options):
    """Load the GPT of another checkpoint or from Hugging Face, with the sheet of the options."""
    free = {key: options[key] for key in FREE}
    spec = f"init_from={config.init_from}"
    model, tokenizer = load_lm(config.init_from, **free)
    if tokenizer.state["ranks"] != data.tokenizer["ranks"]:
        raise InputError(f"{spec} has another tokenizer than dataset={config.dataset}")
    longest = model.config.block_size
    if config.block_size > longest:
        size = f"block_size={config.block_size}"
        raise InputError(f"{size} is too long for {spec}: give at most {longest}")
    layout = load_layout(config, model.config.n_layer, model.config.n_embd)
    if layout is not None:
        model.unit_at_cell.copy_(torch.from_numpy(layout))
    return model


def recompute_blocks(model):
    """Keep only each block's input for the backward pass (Chen et al. 2016)."""
    for block in model.transformer.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# ---- optimiser


def orthogonalise(matrix):
    """Return roughly U V^T of `matrix` = U S V^T, in the matrix's own precision.

    Five Newton-Schulz steps take the singular values to about 0.7 to 1.2 (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)  # singular values of at most 1
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalised update of each matrix (Jordan et al. 2024).

    Same updates as torch.optim.Muon, but in the run's `dtype`: torch computes in bfloat16, which is
    a hundred times slower on CPUs that emulate it.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.1, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype if dtype is torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self, closure=None):
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])
                update = orthogonalise(update.to(self.dtype)).to(p.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def make_optimizers(model, config, device, dtype=torch.float32):
    """Return [AdamW] or [AdamW, Muon]; each group keeps its peak learning rate as 'peak'."""
    muon, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif config.optimizer == "muon" and p.dim() == 2 and ".h." in name:
            muon.append(p)
        else:
            matrices.append(p)
    decayed = {"params": matrices, "weight_decay": config.weight_decay}
    groups = [decayed, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    fused = device.type != "mps"
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)]
    if muon:
        optimizers.append(Muon(muon, config.muon_lr, config.momentum, config.weight_decay, dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def wsd(step, config):
    """Return 1, then decay linearly to 0 at max_iters (warm-up, stable, decay)."""
    length = config.decay_iters or round(0.6 * config.max_iters)
    return min(1.0, max(0.0, (config.max_iters - step) / max(1, length)))


def cosine(step, config):
    """Decay along half a cosine to 0 at decay_iters, or max_iters (nanoGPT)."""
    end = config.decay_iters or config.max_iters
    done = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    return 0.5 * (1 + math.cos(math.pi * done))


# After the warm-up these fall from 1 to 0; lr_share scales them to run from the peak to min_lr.
SCHEDULES = {"wsd": wsd, "cosine": cosine}


def lr_share(step, config):
    """Return the learning rate at a step as a share of its peak."""
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    return config.min_lr + (1 - config.min_lr) * SCHEDULES[config.schedule](step, config)


# ---- evaluate


@torch.no_grad()
def evaluate(run, config, data, model, n_batches=0):
    """Compute losses on the fixed validation windows, or n_batches of them, dealt over the ranks.

    Returns a dict: task, spatial (mean over sheets), total, low and high (95 % interval of the
    task loss over micro-batches), n (tokens).
    """
    batches = data.val_starts.reshape(-1, config.batch_size)
    if n_batches:
        batches = batches[:: math.ceil(len(batches) / n_batches)]
    losses = torch.zeros(len(batches), 2)
    model.eval()
    for i in range(run.rank, len(batches), run.world):
        batch = torch.from_numpy(data.val.windows(batches[i], config.block_size + 1))
        batch = batch.to(run.device)
        windows = model.draw_windows(run.generator("val", i)) if model.config.sheet else None
        with run.autocast():
            out = model(batch[:, :-1], batch[:, 1:], windows)
        losses[i, 0] = out.task
        if windows is not None:
            losses[i, 1] = out.spatial
    model.train()
    losses = run.reduce(losses).cpu().double()
    task, spatial = losses.mean(0).tolist()
    half = math.inf  # one batch gives no interval
    if len(losses) > 1:
        half = 1.96 * losses[:, 0].std().item() / math.sqrt(len(losses))
    return {
        "task": task,
        "spatial": spatial / (2 * model.config.n_layer),
        "total": task + config.alpha * spatial,
        "low": task - half,
        "high": task + half,
        "n": batches.size * config.block_size,
    }


# dense products in 16 bits, from the data sheets
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}


def utilisation(run, config, model, tokens_per_s):
    """Return {'mfu': share of the GPUs' peak}, or {} where the peak is unknown."""
    if run.device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(run.device)
    for key, peak in PEAK_TFLOPS.items():
        if key in name:
            c = model.config  # FLOP per token, both passes: Chowdhery et al. 2022, appendix B
            flops = 6 * model.n_params() + 12 * c.n_layer * c.n_embd * config.block_size
            return {"mfu": tokens_per_s * flops / (1e12 * peak * run.world)}
    return {}


# ---- plots


def plot_losses(run, baselines):
    """Draw loss.png from log.jsonl: task loss with the n-gram baselines, and spatial loss."""
    log = pd.read_json(run.out / "log.jsonl", lines=True).set_index("step")
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = ("next-token loss (nats)", "spatial loss, mean over sheets")
    for axis, loss, title in zip(axes, ("task", "spatial"), titles):
        for key, losses in log.filter(like=f"_{loss}").items():
            losses = losses.dropna()
            axis.plot(losses.index, losses, ".-", label=key)
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    for (name, loss), style in zip(baselines.items(), (":", "-.", "--")):
        axes[0].axhline(loss, ls=style, color="gray", label=f"{name} {loss:.2f}")
    for axis in axes:
        axis.legend()
    figure.suptitle(f"{run.out}: {run.config.dataset}, alpha={run.config.alpha}")
    figure.savefig(run.out / "loss.png", dpi=120)


@torch.no_grad()
def component_maps(run, model, idx):
    """Return {sheet: (side, side)}: loadings on the first component of responses to idx (B, T)."""
    names = positions.layer_names(model.config.n_layer)
    side = positions.sheet_side(model.config.n_embd)
    model.eval()
    with run.autocast():
        responses = model(idx, hidden=names).hidden
    maps = {}
    for name, unit_at_cell in zip(names, model.unit_at_cell.cpu()):
        z = positions.normalise(responses[name].flatten(0, 1).T).cpu()  # (C, tokens)
        _, components = torch.linalg.eigh((z @ z.T).double())
        maps[name] = components[:, -1][unit_at_cell].reshape(side, side).numpy()
    return maps


def plot_sheets(run, config, data, model):
    """Draw sheets.png: component_maps with random weights (as in scratch) and after training."""
    idx = torch.from_numpy(data.val.windows(data.val_starts[:8], config.block_size)).to(run.device)
    random = GPT(model.config, model.unit_at_cell.cpu().numpy(), config.seed).to(run.device)
    n_sheets = 2 * model.config.n_layer
    figure = Figure(figsize=(1.7 * n_sheets, 4.2), layout="constrained")
    axes = figure.subplots(2, n_sheets, squeeze=False)
    means = []
    for row, net, label in zip(axes, (random, model), ("random weights", "after training")):
        scores = []
        for axis, (name, sheet) in zip(row, component_maps(run, net, idx).items()):
            scores.append(float(positions.moran(sheet)))
            limit = np.abs(sheet).max()
            axis.imshow(sheet, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{name}\nMoran's I {scores[-1]:.2f}", fontsize=8)
        row[0].set_ylabel(label)
        means.append(np.nanmean(scores))
    title = "loadings on the first principal component of each sheet's responses"
    figure.suptitle(f"{run.out}: {title}, text of {config.dataset}, alpha={config.alpha}")
    figure.savefig(run.out / "sheets.png", dpi=120)
    what = f"Moran's I of the first component on the sheet, mean over {n_sheets} sheets"
    run.print(f"{what}: {means[0]:.3f} with random weights, {means[1]:.3f} after training")


def report(run, config, data, training, scores, baselines):
    """Draw the figures; write and print the validation loss next to the trigram model's."""
    if not config.eval_only:
        plot_losses(run, baselines)
        if training.model.config.sheet:
            plot_sheets(run, config, data, training.model)
    null = "trigram" if baselines else "uniform"
    chance = baselines.get("trigram", math.log(data.vocab_size))
    interval = [scores["low"], scores["high"], scores["n"]]
    keys = {"metric": "val_loss", "step": training.step, "null": null}
    run.result(scores["task"], chance, *interval, **keys, spatial=scores["spatial"])
    run.print(
        "validation loss {task:.3f} [{low:.3f}, {high:.3f}] nats per token".format(**scores),
        f"({null} model: {chance:.3f}), n = {scores['n']:,} tokens",
    )


# ---- time
#
# With `minutes`, the time of the first steps settles max_iters. The cache folder keeps such times:
# after one run with compile=True and one without, compile=auto knows when compiling pays on a CPU.

UNSETTLED = 10**9  # max_iters until `minutes` has settled it
WARM_UP = 2  # unmeasured steps, which compile and allocate memory
EVAL_SHARE = 0.4  # time to validate a micro-batch, relative to training on it
CLOSING = 8.0  # seconds for the last checkpoint and the figures


def settle_options(run, config, model, state):
    """Settle `compile` and, if already possible, max_iters; a resumed run keeps its own."""
    saved = state["config"] if state else {}
    if config.compile == "auto" and state:
        config.compile = saved["compile"]
    elif config.compile == "auto":
        config.compile = run.device.type == "cuda" or compiling_pays(run, config, model)
    if config.minutes and config.minutes == saved.get("minutes"):
        config.max_iters = saved["max_iters"]
    elif config.minutes:
        config.max_iters = UNSETTLED
    if config.max_iters != UNSETTLED:
        run.save_config()
        if config.max_iters != saved.get("max_iters", config.max_iters):
            change = f"from {saved['max_iters']} to {config.max_iters} steps"
            run.print(f"the schedule changes {change}: the learning rate may jump")


def measure(run, config, training):
    """Set training.step_seconds, equal on all ranks, and return True once enough steps are done."""
    min_seconds = min(20.0, 3.0 * (config.minutes or 4.0))
    measured = training.durations[WARM_UP:]
    total = run.reduce(sum(measured), "max")
    if total < min_seconds:
        return False
    training.step_seconds = total / len(measured)
    return True


def plan(run, config, data, training):
    """Print how long the run will take. With `minutes`, settle max_iters."""
    seconds = training.step_seconds
    n_batches = len(data.val_starts) // config.batch_size
    validation = EVAL_SHARE * seconds * n_batches / training.loader.n_micro
    per_step = seconds + validation / config.eval_interval
    closing = validation + CLOSING
    if config.max_iters == UNSETTLED:
        elapsed = run.reduce(time.time() - run.start, "max")
        n_steps = (60 * config.minutes - elapsed - closing) / per_step
        config.max_iters = training.step + max(1, int(n_steps))
        run.save_config()
        run.print(f"minutes={config.minutes:g} allows max_iters={config.max_iters} on this machine")
    left = (config.max_iters - training.step) * per_step + closing
    run.print(
        f"a step takes {seconds:.3g} s: {config.max_iters:,} steps with validations "
        f"will finish in about {left / 60:.1f} minutes"
    )


def read_timings(run, config, model):
    """Return the cache file for this machine, precision and shape, and the seconds in it.

    {"eager", "compiled": of a step, "compiling"}, as far as they are known.
    """
    machine = [platform.node(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    step = [config.batch_size, config.block_size, config.tokens_per_step, config.optimizer]
    key = [*machine, torch.__version__, str(run.dtype), run.world, *step, asdict(model.config)]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    file = Path(cache) / "nanocortex" / f"steps-{hash_options({'key': key})}.json"
    try:
        return file, json.loads(file.read_text())
    except (OSError, ValueError):
        return file, {}


def record_timing(run, config, training):
    """Cache a CPU's step time and, for a compiled run, the time that compiling took."""
    if not run.master or run.device.type != "cpu":
        return
    file, timings = read_timings(run, config, training.model)
    timings["compiled" if config.compile else "eager"] = training.step_seconds
    if config.compile:
        stepping = training.step_seconds * len(training.durations)
        timings["compiling"] = time.time() - training.began - stepping
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file, json.dumps(timings))
    except OSError:
        pass  # the home folder is read-only


def compiling_pays(run, config, model):
    """Return whether compiling pays in this run, from eager and compiled runs on this CPU."""
    _, timings = read_timings(run, config, model)
    pays = False
    if len(timings) == 3:
        n_steps = 60 * config.minutes / timings["eager"] if config.minutes else config.max_iters
        pays = timings["compiling"] < n_steps * (timings["eager"] - timings["compiled"])
    return bool(run.reduce(int(pays and run.master), "max"))


def dry_run(run, config, data):
    """Print what the run needs: parameters, memory, disk and, extrapolated from one layer, time."""
    options = model_options(config, data)
    whole = GPTConfig(**options)
    if config.init_from not in ("scratch", "resume"):
        whole = start_from(config, data, options).config
    check_vocabulary(config, data, whole)
    layer = GPT(replace(whole, n_layer=1), seed=config.seed).to(run.device)
    block = list(layer.transformer.h.parameters())
    params = count(layer.parameters()) + (whole.n_layer - 1) * count(block)
    moments = 2 * params
    if config.optimizer == "muon":  # Muon keeps one moment, AdamW two
        moments -= whole.n_layer * count(p for p in block if p.dim() == 2)
    n_micro = micro_batches_per_step(run, config)
    tokens = n_micro * config.batch_size * config.block_size
    seconds = estimate_step(run, config, data, layer, tokens) * params / count(layer.parameters())
    n_steps = int(60 * config.minutes / seconds) if config.minutes else config.max_iters
    n_files = 2 + (n_steps // config.keep_interval if config.keep_interval else 0)
    run.print(f"""\
parameters         {params:,}
tokens per step    {tokens:,} in {n_micro} micro-batches over {run.world} ranks
total tokens       {tokens * n_steps:,} = {tokens * n_steps / len(data.train):.2f} epochs
memory per rank    {(2 * params + moments) / 2**28:.2f} GiB plus activations
disk               {n_files * (params + moments) / 2**28:.2f} GiB of checkpoints
time per step      about {seconds:.3g} s on this machine, not compiled
total time         about {seconds * n_steps / 3600:.2g} h for {n_steps:,} steps""")
    run.close()


def count(parameters):
    """Return the number of elements of all tensors."""
    return sum(p.numel() for p in parameters)


def estimate_step(run, config, data, model, tokens):
    """Estimate the seconds of a step of `model` on `tokens` from steps on part of a micro-batch."""
    n_rows = max(1, min(config.batch_size, 1024 // config.block_size))
    part = replace(config, batch_size=n_rows, tokens_per_step=0, compile=False)
    training = set_up(run, part, data, model, None)
    seconds = []
    for n_micro in (1, 1, 2):  # the first step warms up
        training.loader = Loader(run, data.train, part, n_micro * run.world)
        start = time.time()
        train_step(run, part, training)[1].item()  # .item() waits for the GPU
        seconds.append(time.time() - start)
    _, one, two = seconds
    per_token = max(two - one, one / 10) / (n_rows * config.block_size)
    fixed = max(0.0, 2 * one - two)  # the optimiser, mostly
    return tokens / run.world * per_token + fixed


# ---- the run

SMALLER = "try a smaller learning_rate, or dtype=float32"


@dataclass
class Training:
    """The state of training; a checkpoint holds all but what belongs to this process."""

    model: GPT
    net: torch.nn.Module  # the model, or DistributedDataParallel around it
    optimizers: list
    loader: Loader
    step: int = 0
    best: float = math.inf  # validation loss of best.pt
    origin: str = "scratch"  # init_from when the run began
    # of this process:
    resumed: int = -1  # step of the checkpoint that it resumes from
    durations: list = field(default_factory=list)  # seconds of each step
    step_seconds: float = 0.0  # mean duration, once measured
    began: float = field(default_factory=time.time)


def micro_batches_per_step(run, config):
    """Return the number of micro-batches of a step over all ranks, equally many on each."""
    tokens = config.batch_size * config.block_size * run.world
    if config.tokens_per_step % tokens:
        option = f"tokens_per_step={config.tokens_per_step}"
        raise InputError(f"{option} must be a multiple of batch x block x ranks = {tokens}")
    return max(1, config.tokens_per_step // tokens) * run.world


def set_up(run, config, data, model, state):
    """Return the Training of a fresh model, or of the checkpoint `state`."""
    if config.recompute:
        recompute_blocks(model)
    if config.compile:
        model.compile_blocks()
    net = model
    if run.world > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizers = make_optimizers(model, config, run.device, run.dtype)
    cursor = state["cursor"] if state else 0
    loader = Loader(run, data.train, config, micro_batches_per_step(run, config), cursor)
    training = Training(model, net, optimizers, loader, origin=config.init_from)
    if state:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # as the current options say
            optimizer.load_state_dict({**saved, "param_groups": groups})
        run.scaler.load_state_dict(state["scaler"])
        run.rewind(state["step"])
        training.step = training.resumed = state["step"]
        training.best = state["best"]
        training.origin = state.get("origin", "scratch")
    return training


def describe(run, config, data, training):
    """Print the sizes of the model, the step and the data, and where it trains."""
    shape = f"{training.loader.n_micro} x {config.batch_size} x {config.block_size}"
    run.print(
        f"{count(training.model.parameters()) / 1e6:.2f} M parameters | {shape} tokens per step, "
        f"ranks: {run.world} | {run.device}, {run.dtype}, compiled: {config.compile} | "
        f"{len(data.train):,} training tokens"
    )


def validate(run, config, data, training, finished):
    """Validate, log, and save best.pt if it is the best so far. Returns evaluate's scores."""
    n_batches = 4 if training.step == 0 and not finished else 0  # untrained: a few will do
    scores = evaluate(run, config, data, training.model, n_batches)
    run.log(training.step, **{f"val_{key}": scores[key] for key in ("task", "spatial", "total")})
    has_trained = training.step not in (0, training.resumed)
    if has_trained and scores["task"] < training.best:
        training.best = scores["task"]
        save(run, config, data, training, "best.pt")
    return scores


def save(run, config, data, training, name):
    """Write a checkpoint to the out folder."""
    state = lm_state(training.model)
    state["optimizers"] = [optimizer.state_dict() for optimizer in training.optimizers]
    state["scaler"] = run.scaler.state_dict()
    state["step"] = training.step
    state["best"] = training.best
    state["origin"] = training.origin
    state["cursor"] = training.loader.cursor
    state["config"] = asdict(config)
    state["tokenizer"] = data.tokenizer
    state["n_tokens"] = [len(data.train), len(data.val)]
    run.save(name, state)


def save_due(run, config, data, training):
    """Write any checkpoints due at this step."""
    step = training.step
    if step in (0, training.resumed):
        return
    if run.stopped or step == config.max_iters or due(step, config.save_interval):
        save(run, config, data, training, "ckpt.pt")
    if due(step, config.keep_interval):
        save(run, config, data, training, f"ckpt-{step:07d}.pt")


def due(step, *intervals):
    """Return whether a step is a multiple of any interval; an interval of 0 never is due."""
    return any(interval and step % interval == 0 for interval in intervals)


def log_step(run, config, training, losses, norm):
    """Log a step at intervals. Raises InputError where the loss is not finite."""
    step = training.step
    intervals = (config.eval_interval, config.save_interval, config.keep_interval)
    logged = step == 1 or due(step, config.log_interval)
    if not (logged or run.stopped or step == config.max_iters or due(step, *intervals)):
        return
    task, spatial = (run.reduce(losses) / run.world).tolist()
    finite = norm.isfinite() or run.scaler.is_enabled()  # the scaler handles overflows
    if not (finite and math.isfinite(task + spatial)):
        ckpt = run.out / "ckpt.pt"
        raise InputError(f"the loss is not finite at step {step}: resume {ckpt} and {SMALLER}")
    if not logged:
        return
    numbers = {"train_task": task}
    if config.alpha:
        numbers["train_spatial"] = spatial / (2 * training.model.config.n_layer)
    numbers["train_total"] = task + config.alpha * spatial
    numbers["grad_norm"] = norm.item()
    share = lr_share(step - 1, config)
    numbers["lr"] = share * config.learning_rate
    if config.optimizer == "muon":
        numbers["muon_lr"] = share * config.muon_lr
    recent = training.durations[-config.log_interval :]
    if recent:
        tokens = training.loader.n_micro * config.batch_size * config.block_size
        speed = tokens * len(recent) / sum(recent)
        numbers["tokens_per_s"] = round(speed)
        numbers.update(utilisation(run, config, training.model, speed))
    run.log(step, **numbers)


def train_step(run, config, training):
    """Take an optimiser step over this rank's micro-batches.

    Returns their mean task and spatial loss (2,) and the gradient's norm, both on the device.
    """
    model, loader, step = training.model, training.loader, training.step
    losses = torch.zeros(2, device=run.device)
    micros = range(run.rank, loader.n_micro, run.world)
    for micro in micros:
        idx, targets = loader.batch(micro)
        windows = None
        if config.alpha:
            windows = model.draw_windows(run.generator(step, micro, "windows"))
        if config.dropout:
            torch.manual_seed(key_seed(run.seed, step, micro, "dropout"))
        if run.world > 1:  # ranks exchange gradients once per step
            training.net.require_backward_grad_sync = micro == micros[-1]
        with run.autocast():
            out = training.net(idx, targets, windows)
        run.scaler.scale(out.loss / len(micros)).backward()
        losses[0] += out.task.detach() / len(micros)
        if config.alpha:
            losses[1] += out.spatial.detach() / len(micros)
    for optimizer in training.optimizers:
        run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_share(step, config)
        run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    loader.cursor += loader.n_micro * config.batch_size
    training.step += 1
    return losses, norm


def main(config):
    if config.dry_run:  # leaves nothing in out_dir
        config = replace(config, out_dir=tempfile.mkdtemp(), wandb_log=False)
    run = Run(config)
    data = Data(run, config)
    if config.dry_run:
        return dry_run(run, config, data)
    model, state = build(run, config, data)
    settle_options(run, config, model, state)
    baselines = baseline_losses(run, config, data)
    training = set_up(run, config, data, model, state)
    describe(run, config, data, training)
    n_steps = None if config.max_iters == UNSETTLED else config.max_iters
    bar = run.progress(n_steps, training.step, "train")
    run.stopping()  # from here on a signal stops the run at the end of a step
    while True:
        finished = config.eval_only or training.step >= config.max_iters
        just_resumed = training.step == training.resumed
        if finished or (due(training.step, config.eval_interval) and not just_resumed):
            scores = validate(run, config, data, training, finished)
        save_due(run, config, data, training)
        if finished or run.stopped:
            break
        start = time.time()
        losses, norm = train_step(run, config, training)
        bar.update()
        run.stopping()
        log_step(run, config, training, losses, norm)
        training.durations.append(time.time() - start)
        if not training.step_seconds and measure(run, config, training):
            record_timing(run, config, training)
            plan(run, config, data, training)
            bar.total = config.max_iters
    bar.close()
    if not run.stopped:
        if run.master:
            report(run, config, data, training, scores, baselines)
        run.merge()
    run.close()


if __name__ == "__main__":
    main(configure(Config))
