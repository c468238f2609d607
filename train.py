"""Train a GPT-2 whose units have a place on a cortical sheet: next-word loss + alpha * spatial loss of every layer.

    python train.py                                                  # embedded: minutes on two cores, real text
    python train.py alpha=0 out_dir=out/train_alpha0                 # its twin without topography, on exactly the same data
    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.yaml
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2xl.yaml   # sharded over the GPUs, activations recomputed
    python train.py init_from=resume                                 # go on after a stop, bit for bit

Rathi et al. 2025 (TopoLM); Margalit et al. 2024 (TDANN).
"""
import json
import math
import tempfile
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import positions
from configurator import Run, configure, key_seed
from data.tokens import Tokens, tokenizer_state
from model import GPT, GPTConfig, lm_from, lm_state, load_lm


@dataclass
class Config:
    # ---- data
    dataset: str = "pydocs"                        # name under data/, or a folder of token files: ours, nanoGPT's, llm.c's
    batch_size: int = 16                           # sequences per micro-batch
    block_size: int = 128                          # tokens of context
    tokens_per_step: int = 0                       # tokens per optimiser step over all ranks, 0: one micro-batch per rank; accumulation is derived
    # ---- model
    n_layer: int = 4                               # blocks
    n_head: int = 4                                # attention heads
    n_embd: int = 256                              # units per layer; a square, to fill a sheet (16 x 16)
    vocab_size: int = 0                            # 0: the dataset's, rounded up to a multiple of 64
    dropout: float = 0.0                           # probability
    bias: bool = False                             # biases in linear layers and LayerNorms
    gelu: Literal["exact", "tanh"] = "exact"       # tanh as in the released GPT-2
    # ---- sheet
    positions: str = "random"                      # random (seeded permutation), none, NAME of gpt2-positions/NAME.npz, a file, TopoLM's folder
    alpha: float = 0.1                             # weight of each layer's spatial loss; 0 still measures it on validation data
    radius: int = 4                                # windows: cells closer than this to the centre
    norm: float = float("inf")                     # in this p-norm: 1, 2, inf
    windows: int = 5                               # windows drawn per layer and micro-batch; 0: every window of the sheet
    spatial: Literal["activations", "weights"] = "activations"  # correlations of responses, or the rival: smoothness of weights (TopoLoss)
    factor: float = 3.0                            # weights: the sheet is shrunk so much per axis and enlarged again
    spatial_kind: Literal["relative", "absolute"] = "relative"  # activations: 1/2 (1 - corr(r, D)), or mean |r - D|
    accum: Literal["mean", "maximum"] = "mean"     # over the windows
    tap: Literal["sublayer", "residual"] = "sublayer"  # what lies on the sheet: sublayer outputs, or the residual stream after them
    activation_decay: float = 0.0                  # weight of the mean squared norm of each sheet's activations
    head_loss: bool = False                        # attention sheet as a mosaic of heads, without the attention's output projection
    attn_proj: bool = False                        # one more Linear after attention, the sheet behind it
    # ---- optimiser
    optimizer: Literal["adamw", "muon"] = "muon"   # muon: on the blocks' matrices, AdamW for the rest
    learning_rate: float = 3e-3                    # AdamW's peak
    muon_lr: float = 0.02                          # Muon's peak (its update has the RMS of AdamW's times 0.2 sqrt(max(rows, columns)))
    weight_decay: float = 0.1                      # on matrices and embeddings
    beta1: float = 0.9                             # AdamW
    beta2: float = 0.95                            # AdamW
    momentum: float = 0.95                         # Muon
    grad_clip: float = 1.0                         # total norm; 0: none
    schedule: Literal["cosine", "wsd"] = "wsd"     # cosine, or warm-up, stable, linear decay
    max_iters: int = 1000                          # optimiser steps
    warmup_iters: int = 20                         # linear warm-up
    decay_iters: int = 0                           # cosine: step at which min_lr is reached; wsd: length of the decay; 0: max_iters; 60 % of them
    min_lr: float = 0.0                            # end of the decay, as a share of the peak
    # ---- evaluation
    eval_interval: int = 250                       # steps between validations
    eval_batches: int = 48                         # micro-batches of the one fixed validation set; 0: all of it
    eval_only: bool = False                        # validate and stop
    baseline_tokens: int = 50_000_000              # count n-gram baselines on so many training tokens; 0: no baselines
    dry_run: bool = False                          # say parameters, memory, disk and time, and stop
    # ---- run
    out_dir: str = "out/train"                     # checkpoints, log, pictures
    init_from: str = "scratch"                     # scratch, resume, a checkpoint or run folder (nanoGPT's, TopoLM's too), a Hugging Face GPT-2
    overwrite: bool = False                        # start over in a folder that holds a run
    seed: int = 1337                               # fixes everything
    device: str = "auto"                           # cuda, mps, cpu
    dtype: str = "auto"                            # bfloat16 where the hardware has it; float16, float32
    compile: bool = True                           # compile the blocks (needs a C++ compiler on CPUs)
    recompute: bool = False                        # activation checkpointing: blocks are computed again in backward, for less memory and a third more time
    fsdp: bool = False                             # shard weights, gradients and optimiser state over the ranks (fully_shard) instead of copying them (DDP)
    deterministic: bool = False                    # bit-for-bit repeats on CUDA too, slower
    log_interval: int = 50                         # steps between lines
    save_interval: int = 250                       # steps between checkpoints
    keep_interval: int = 0                         # steps between checkpoints that are kept; 0: none
    wandb_log: bool = False                        # log to Weights & Biases; WANDB_MODE=offline logs to out_dir/wandb without network
    wandb_project: str = "nanocortex"              # its project

    POSITIVE = "batch_size block_size n_layer n_head n_embd norm factor eval_interval log_interval save_interval"
    SHARES = "dropout momentum min_lr"

    def check(self):
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"option '{key}' must be at least 0 and below 1, not {getattr(self, key)}")


# ---- data

class Loader:
    """Micro-batches of random windows without replacement, read ahead by a thread.

    Window k of the run (counted over all ranks) is the same whatever the number of ranks and whatever alpha: epoch k // n reads the n windows of
    the stream in an order, and from an offset, keyed by (seed, epoch). `cursor` counts the windows of the steps that were handed out whole."""

    def __init__(self, run, tokens, config, accum, cursor):
        self.run, self.tokens, self.T, self.B, self.accum, self.cursor = run, tokens, config.block_size, config.batch_size, accum, cursor
        self.n = (len(tokens) - 1) // self.T
        if self.n < 2:
            raise ValueError(f"{tokens.path} holds {len(tokens):,} tokens, less than two windows of block_size={self.T}: take a smaller block_size")
        self.n -= 1  # the offset's room
        self.thread, self.ahead, self.epoch = ThreadPoolExecutor(1), deque(), None
        self.plan = self._plan(cursor)

    def _plan(self, cursor):
        while True:
            for micro in range(self.run.rank, self.accum, self.run.world):
                yield cursor + micro * self.B
            cursor += self.accum * self.B

    def _start(self, k):
        epoch, i = divmod(k, self.n)
        if self.epoch != epoch:
            rng = np.random.default_rng(key_seed(self.run.seed, "epoch", epoch))
            self.epoch, self.order, self.offset = epoch, rng.permutation(self.n), int(rng.integers(self.T))
        return self.order[i] * self.T + self.offset

    def _read(self, at):
        starts = np.array([self._start(at + i) for i in range(self.B)])
        batch = torch.from_numpy(self.tokens.windows(starts, self.T + 1))  # (B, T + 1)
        return batch.pin_memory() if self.run.device.type == "cuda" else batch

    def next(self):
        """idx, targets (B, T) int64 on the device."""
        while len(self.ahead) < 4:
            self.ahead.append(self.thread.submit(self._read, next(self.plan)))
        batch = self.ahead.popleft().result().to(self.run.device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]


def validation_starts(tokens, config):
    """Starts of the fixed validation windows, evenly spread and without overlap; a whole number of micro-batches."""
    n = (len(tokens) - 1) // config.block_size
    batches = n // config.batch_size
    if batches < 1:
        raise ValueError(f"{tokens.path} holds {len(tokens):,} tokens, less than one batch of {config.batch_size} x {config.block_size}: "
                         "take a smaller batch_size or block_size")
    count = config.batch_size * (min(config.eval_batches, batches) if config.eval_batches else batches)
    return (np.arange(count) * n // count) * config.block_size


def ngram_losses(train, val, starts, T, vocab_size):
    """Cross-entropy (nats per token) of unigram, bigram and trigram models of the training tokens, interpolated by Witten and Bell's rule
    (Chen & Goodman 1998), on the very tokens that the model is validated on."""
    train = np.asarray(train, np.int64)
    at = (starts[:, None] + np.arange(1, T + 1)).ravel()
    at = at[at >= 2]
    w, v, u = (np.asarray(val[at - back], np.int64) for back in (0, 1, 2))
    counts = np.bincount(train, minlength=vocab_size)
    kinds = np.count_nonzero(counts)
    p = (counts[w] + kinds / vocab_size) / (len(train) + kinds)
    losses = [-np.log(p).mean()]
    pairs = train[:-1] * vocab_size + train[1:]
    for key, context, asked, about in ((pairs, train[:-1], v * vocab_size + w, v),
                                       (pairs[:-1] * vocab_size + train[2:], pairs[:-1], (u * vocab_size + v) * vocab_size + w, u * vocab_size + v)):
        keys, times = np.unique(key, return_counts=True)
        contexts, seen = np.unique(context, return_counts=True)
        types = np.bincount(np.searchsorted(contexts, keys // vocab_size), minlength=len(contexts))  # kinds of word after each context

        def look(table, values, asked):
            i = np.searchsorted(table, asked).clip(max=len(table) - 1)
            return np.where(table[i] == asked, values[i], 0)

        c, n, t = look(keys, times, asked), look(contexts, seen, about), look(contexts, types, about)
        p = np.where(n > 0, (c + t * p) / np.maximum(n + t, 1), p)
        losses.append(-np.log(p).mean())
    return dict(zip(("unigram", "bigram", "trigram"), map(float, losses)))


# ---- model

def build(config, run, folder, vocab_size):
    """The GPT to train and, on resume, the checkpoint it came from."""
    sheet = dict(sheet=config.positions != "none", radius=config.radius, norm=config.norm, windows=config.windows, alpha=config.alpha,
                 spatial=config.spatial, factor=config.factor, spatial_kind=config.spatial_kind, accum=config.accum, tap=config.tap,
                 activation_decay=config.activation_decay, dropout=config.dropout)
    shape = dict(block_size=config.block_size, vocab_size=config.vocab_size or math.ceil(vocab_size / 64) * 64, n_layer=config.n_layer,
                 n_head=config.n_head, n_embd=config.n_embd, bias=config.bias, gelu=config.gelu, head_loss=config.head_loss, attn_proj=config.attn_proj)
    if config.alpha and not sheet["sheet"]:
        raise ValueError("alpha > 0 wants positions: set alpha=0 or positions=random")
    state = layout = None
    path = config.positions if config.positions.endswith(".npz") or Path(config.positions).is_dir() else f"gpt2-positions/{config.positions}.npz"
    given = config.positions not in ("random", "none")
    if config.init_from == "scratch":
        if given:
            layout = positions.load_positions(path, config.n_layer, config.n_embd)
        elif sheet["sheet"]:
            run.print(f"positions: the seeded random permutation (seed {config.seed}); python init_pos.py makes others")
        model = GPT(GPTConfig(**shape, **sheet), layout, config.seed)
    elif config.init_from == "resume":
        state = run.load("ckpt.pt")
        if "optimizers" not in state:
            raise ValueError(f"{run.out / 'ckpt.pt'} is a checkpoint of another code, which has no state to resume: give init_from={run.out / 'ckpt.pt'} "
                             "and another out_dir")
        for key, value in shape.items():
            if state["model_args"][key] != value:
                raise ValueError(f"{run.out / 'ckpt.pt'} has {key}={state['model_args'][key]}, the options say {value}: resume with the options of "
                                 f"{run.out / 'config.yaml'}")
        model = lm_from(state, run.out / "ckpt.pt", **sheet)
    else:
        model, tokenizer = load_lm(config.init_from, **sheet)
        if tokenizer.state["ranks"] != tokenizer_state(folder)["ranks"]:
            raise ValueError(f"init_from={config.init_from} was trained with the tokenizer '{tokenizer.state['name']}', dataset={config.dataset} "
                             "with another: prepare the text with the model's tokenizer")
        if config.block_size > model.config.block_size:
            raise ValueError(f"block_size={config.block_size} is longer than the {model.config.block_size} of init_from={config.init_from}")
        if given:
            model.unit_at_cell.copy_(torch.from_numpy(positions.load_positions(path, model.config.n_layer, model.config.n_embd)))
        run.print(f"{config.init_from}: {model.config.n_layer} layers x {model.config.n_embd} units; shape options are taken from it")
    if vocab_size > model.config.vocab_size:
        raise ValueError(f"dataset={config.dataset} has {vocab_size} token ids, the model {model.config.vocab_size}: set vocab_size=0")
    return model.to(run.device), state


def recompute_blocks(model):
    """Activation checkpointing (Chen et al. 2016): only each block's input is kept for backward, the rest is computed again; same gradients."""
    def wrap(forward):
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)
    for block in model.transformer.h:
        block.forward = wrap(block.forward)


def shard(model):
    """Shard a model over all ranks, each block by itself (FSDP2): a block's weights are gathered when it is their turn; numbers as with DDP."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # the losses it gives out may be views; nothing is written into them
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


def gathered(value, keep=True):
    """A state with its shards put together on the CPU, a tensor at a time, as an unsharded run has it; every rank must ask, who has keep=False gets None
    for the tensors that were sharded."""
    if isinstance(value, dict):
        return {k: gathered(v, keep) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(v, keep) for v in value)
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    return value


def scattered(state, optimizer):
    """An optimiser's saved state with the moments of sharded parameters sharded likewise."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {key: distribute_tensor(value.to(params[i].device), params[i].device_mesh, params[i].placements, src_data_rank=None)
                   if torch.is_tensor(value) and value.shape == params[i].shape and isinstance(params[i], DTensor) else value for key, value in entry.items()}
               for i, entry in state["state"].items()}
    return {**state, "state": moments}


def orthogonalise(matrix):
    """The matrix U V^T nearest to `matrix` = U S V^T, roughly: five Newton-Schulz steps leave singular values between about 0.7 and 1.2.

    Coefficients of Jordan et al. 2024 (Muon). Computed in the matrix's own precision."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)  # singular values of at most 1
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update of each matrix is orthogonalised (Jordan et al. 2024); the updates of torch.optim.Muon.

    torch's own orthogonalises in bfloat16 always, which a CPU without bfloat16 emulates, a hundred times as slow; this one takes the run's `dtype`."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.1, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype if dtype is torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix that has a gradient."""
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
    """A list: AdamW alone, or Muon for the blocks' matrices and AdamW for the rest. Each group remembers its peak as 'peak'."""
    named = list(model.named_parameters())
    muon = [p for name, p in named if config.optimizer == "muon" and p.dim() == 2 and ".h." in name]
    rest = [p for name, p in named if not any(p is q for q in muon)]
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=config.weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=device.type != "mps")]
    if muon:
        optimizers.append(Muon(muon, config.muon_lr, config.momentum, config.weight_decay, dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def lr_share(step, config):
    """Learning rate at a step as a share of its peak."""
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "cosine":
        end = config.decay_iters or config.max_iters
        done = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
        return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    length = config.decay_iters or round(0.6 * config.max_iters)
    return max(config.min_lr, min(1.0, config.min_lr + (1 - config.min_lr) * (config.max_iters - step) / max(1, length)))


# ---- evaluate

@torch.no_grad()
def evaluate(model, run, tokens, starts, config):
    """Losses over the fixed validation windows, dealt over the ranks in whole micro-batches: dict of task, spatial (mean over sheets), total,
    and the 95 % interval of the task loss over micro-batches."""
    model.eval()
    batches = starts.reshape(-1, config.batch_size)
    table = torch.zeros(len(batches), 2, dtype=torch.float64)
    for turn in range(run.rank, math.ceil(len(batches) / run.world) * run.world, run.world):
        i = turn % len(batches)  # sharded models want every rank in every pass: who has no batch left repeats one
        batch = torch.from_numpy(tokens.windows(batches[i], config.block_size + 1)).to(run.device)
        windows = model.draw_windows(run.generator("val", i)) if model.config.sheet else None
        with run.autocast():
            out = model(batch[:, :-1], batch[:, 1:], windows)
        if turn < len(batches):
            table[i] = torch.tensor([out.task.item(), out.spatial.item() if windows is not None else 0.0])
    table = run.reduce(table.to(run.device) if run.device.type != "mps" else table).cpu()
    model.train()
    task, spatial = table.mean(0).tolist()
    half = 1.96 * table[:, 0].std().item() / math.sqrt(len(table)) if len(table) > 1 else math.inf  # one says nothing about the others
    sheets = 2 * model.config.n_layer
    return dict(task=task, spatial=spatial / sheets, total=task + config.alpha * spatial, low=task - half, high=task + half)


PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
        "RTX 4090": 165e12, "RTX 3090": 71e12, "A6000": 155e12, "V100": 125e12, "T4": 65e12, "MI300X": 1307e12}  # dense 16-bit FLOP/s, data sheets


def peak_flops(device):
    """The device's dense 16-bit peak in FLOP/s, None where it is not in the table (CPUs)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in PEAK.items() if key in name), None)


# ---- plots

def plot_losses(run, baselines):
    """loss.png: task loss of training and validation with the n-gram baselines, and the spatial loss, from log.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for axis, key, title in ((left, "task", "next-token loss (nats)"), (right, "spatial", "spatial loss, mean over sheets")):
        for split, style in (("train", dict(lw=1, alpha=0.7)), ("val", dict(lw=2, marker="o", ms=3))):
            points = [(line["step"], line[f"{split}_{key}"]) for line in lines if f"{split}_{key}" in line]
            if points:
                axis.plot(*zip(*points), label=split, **style)
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    for name, loss in baselines.items():
        left.axhline(loss, ls=":", c="gray")
        left.annotate(f"{name} {loss:.2f}", (0.99, loss), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="gray")
    left.legend(loc="upper center")
    fig.suptitle(f"{run.out}: {run.config.dataset}, alpha={run.config.alpha}")
    fig.savefig(run.out / "loss.png", dpi=120)
    plt.close(fig)


@torch.no_grad()
def plot_sheets(model, before, run, tokens, starts, config):
    """sheets.png: on each sheet, how strongly every unit follows the first principal component of its layer's responses to validation text,
    before and after training, with Moran's I (unsmoothed; near 0 where place means nothing). Returns Moran's I after training, mean over sheets."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = positions.layer_names(model.config.n_layer)
    idx = torch.from_numpy(tokens.windows(starts[:8], config.block_size)).to(run.device)
    side = positions.sheet_side(model.config.n_embd)
    fig, axes = plt.subplots(2, len(names), figsize=(1.7 * len(names), 4.2), squeeze=False, constrained_layout=True)
    scores = {}
    for row, (label, net) in zip(axes, (("before training", before), ("after training", model))):
        net.eval()
        with run.autocast():
            responses = net(idx, hidden=names).hidden
        for axis, name, units in zip(row, names, net.unit_at_cell.cpu()):
            z = positions.normalise(responses[name].flatten(0, 1)).cpu()  # (tokens, C)
            first = torch.linalg.eigh((z.t() @ z).double())[1][:, -1].numpy()  # loading of every unit on the first component
            sheet = first[units.numpy()].reshape(side, side)
            scores[label, name] = float(positions.moran(sheet))
            limit = np.abs(sheet).max()
            axis.imshow(sheet, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[], title=f"{name}\nMoran's I {scores[label, name]:.2f}")
            axis.title.set_fontsize(8)
        row[0].set_ylabel(label)
    fig.suptitle(f"{run.out}: unit loadings on each layer's first principal component, real text ({config.dataset}), alpha={config.alpha}", fontsize=10)
    fig.savefig(run.out / "sheets.png", dpi=120)
    plt.close(fig)
    model.train()
    return [float(np.nanmean([v for (when, _), v in scores.items() if when == label])) for label in ("before training", "after training")]


# ---- the run

def main(config):
    if config.dry_run:
        config.out_dir, config.wandb_log = tempfile.mkdtemp(), False  # leaves nothing in out_dir
    run = Run(config)
    folder = run.dataset(config.dataset)
    train, val = Tokens(folder, "train"), Tokens(folder, "val")
    model, state = build(config, run, folder, train.vocab_size)
    micro_tokens = config.batch_size * config.block_size
    accum = config.tokens_per_step / micro_tokens if config.tokens_per_step else run.world  # micro-batches per step over all ranks
    if accum != int(accum) or accum < 1 or int(accum) % run.world:
        raise ValueError(f"tokens_per_step={config.tokens_per_step} must be a multiple of batch_size x block_size x ranks = "
                         f"{config.batch_size} x {config.block_size} x {run.world} = {micro_tokens * run.world}")
    accum = int(accum)
    sharded = config.fsdp and run.world > 1
    if sharded and (config.spatial == "weights" or run.dtype is torch.float16):
        raise ValueError("fsdp=True goes with neither spatial=weights, which wants whole weights, nor float16: set fsdp=False, or dtype=bfloat16")
    if config.recompute:
        recompute_blocks(model)
    if config.compile:
        model.compile_blocks()
    if sharded:
        shard(model)
    optimizers = make_optimizers(model, config, run.device, run.dtype)
    step, best = 0, float("inf")
    cursor = 0
    if state:
        step, best, cursor = state["step"], state["best"], state["cursor"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(scattered(saved, optimizer))
        run.scaler.load_state_dict(state["scaler"])
        run.rewind(step)
    resumed = step if state else None
    loader = Loader(run, train, config, accum, cursor)
    starts = validation_starts(val, config)
    ddp = model if run.world == 1 or sharded else \
        DistributedDataParallel(model, device_ids=[run.device] if run.device.type == "cuda" else None, broadcast_buffers=False)
    params = sum(p.numel() for p in model.parameters())
    run.print(f"{params / 1e6:.2f} M parameters | {accum * micro_tokens:,} tokens per step ({accum} micro-batches of {config.batch_size} x "
              f"{config.block_size} over {run.world} rank{'s' * (run.world > 1)}) | {run.device} {str(run.dtype)[6:]} | {len(train):,} training tokens, "
              f"validation on {len(starts) * config.block_size:,}")
    tokenizer = tokenizer_state(folder)

    def train_step(step):
        """One optimiser step; task and spatial loss (2,) of this rank's micro-batches and the gradient's norm, left on the device."""
        losses = torch.zeros(2, device=run.device)
        micros = range(run.rank, accum, run.world)
        for micro in micros:
            idx, targets = loader.next()
            windows = model.draw_windows(run.generator(step, micro, "windows")) if config.alpha else None
            if config.dropout:
                torch.manual_seed(key_seed(run.seed, step, micro, "dropout"))
            if sharded:
                model.set_requires_gradient_sync(micro == micros[-1])
            elif run.world > 1:
                ddp.require_backward_grad_sync = micro == micros[-1]
            with run.autocast():
                out = ddp(idx, targets, windows)
            run.scaler.scale(out.loss / len(micros)).backward()
            losses += torch.stack([out.task, out.spatial if windows is not None else out.task * 0]).detach() / len(micros)
        for optimizer in optimizers:
            run.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf"))
        norm = norm.full_tensor() if sharded else norm
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_share(step, config)
            run.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        run.scaler.update()
        loader.cursor += accum * config.batch_size
        return losses, norm

    def save(name):
        state = {**lm_state(model), "optimizers": [optimizer.state_dict() for optimizer in optimizers], "scaler": run.scaler.state_dict(),
                 "step": step, "best": best, "cursor": loader.cursor, "config": asdict(config), "tokenizer": tokenizer}
        run.save(name, gathered(state, run.master) if sharded else state)

    if config.dry_run:
        return dry_run(run, model, train_step, config, accum, params, len(train))
    baselines = {}
    if config.baseline_tokens and run.master:
        baselines = ngram_losses(train.tokens[:config.baseline_tokens], val.tokens, starts, config.block_size, train.vocab_size)
        run.print("validation loss to beat, nats per token: " + ", ".join(f"{k} {v:.3f}" for k, v in baselines.items()))
    first_bad = torch.full((), 2 ** 62, device=run.device)  # first step whose gradient was not finite
    peak, clock, clock_step = peak_flops(run.device), time.time(), step
    sheets = 2 * model.config.n_layer
    bar = run.progress(config.max_iters, step, "train")
    run.stopping()  # from here on a signal waits for the end of a step
    while True:
        ends = config.eval_only or step >= config.max_iters
        if ends or step % config.eval_interval == 0 and step != resumed:
            scores = evaluate(model, run, val, starts, config)
            run.log(step, **{f"val_{k}": scores[k] for k in ("task", "spatial", "total")})
            if config.eval_only:
                break
            if scores["task"] < best and step != resumed:
                best = scores["task"]
                if step:
                    save("best.pt")
            clock, clock_step = time.time(), step
        if step != resumed and step and (step % config.save_interval == 0 or step == config.max_iters or run.stopped):
            save("ckpt.pt")
        if step and config.keep_interval and step % config.keep_interval == 0:
            save(f"ckpt-{step:07d}.pt")
        if ends or run.stopped:
            break
        losses, norm = train_step(step)
        if not run.scaler.is_enabled():  # float16's scaler meets overflows by itself
            first_bad = torch.where(norm.isfinite(), first_bad, first_bad.clamp_max(step + 1))
        step += 1
        bar.update()
        run.stopping()
        if step % config.log_interval == 0 or run.stopped or step in (1, config.max_iters) or any(
                interval and step % interval == 0 for interval in (config.eval_interval, config.save_interval, config.keep_interval)):
            task, spatial = (run.reduce(losses) / run.world).tolist()
            bad = -run.reduce(-first_bad.item(), "max")
            if bad <= step or not math.isfinite(task + spatial):
                raise ValueError(f"the loss is not finite at step {min(bad, step):.0f}: stopped; {run.out / 'ckpt.pt'} holds the last good state; "
                                 "try a smaller learning_rate, or dtype=float32")
            if step % config.log_interval == 0 or step == 1:
                speed = (step - clock_step) * accum * micro_tokens / (time.time() - clock)
                clock, clock_step = time.time(), step
                numbers = dict(train_task=task, train_spatial=spatial / sheets, train_total=task + config.alpha * spatial) if config.alpha else \
                    dict(train_task=task, train_total=task)
                mfu = dict(mfu=speed * model.flops_per_token(config.block_size) / (peak * run.world)) if peak else {}
                run.log(step, **numbers, grad_norm=norm.item(), lr=lr_share(step - 1, config) * config.learning_rate, tokens_per_s=round(speed), **mfu)
    bar.close()
    whole = gathered(lm_state(model), run.master) if sharded and not run.stopped else None
    if run.master and not run.stopped and not config.eval_only:
        plot_losses(run, baselines)
        if model.config.sheet:
            before = GPT(model.config, model.unit_at_cell.cpu().numpy(), config.seed).to(run.device)
            then, now = plot_sheets(lm_from(whole).to(run.device) if whole else model, before, run, val, starts, config)
            run.print(f"Moran's I of the first component on the sheet, mean over {sheets} sheets: {then:.3f} before, {now:.3f} after training")
    if run.master and not run.stopped:
        chance = baselines.get("trigram", math.log(train.vocab_size))
        run.result(scores["task"], chance, scores["low"], scores["high"], len(starts) * config.block_size, metric="val_loss", step=step,
                   null="trigram" if baselines else "uniform", spatial=scores["spatial"])
        run.print(f"validation loss {scores['task']:.3f} [{scores['low']:.3f}, {scores['high']:.3f}] nats per token beside {chance:.3f} of the "
                  f"{'trigram model' if baselines else 'uniform guess'}, n = {len(starts) * config.block_size:,} tokens")
    if not run.stopped:
        run.merge()
    run.close()


def dry_run(run, model, train_step, config, accum, params, n_tokens):
    """Say what the run would need. Time is measured on three micro-steps here; memory is weights, gradients and optimiser state in float32, without
    activations."""
    train_step(0)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.time()
    for step in range(1, 4):
        train_step(step)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.time() - start) / 3
    tokens = accum * config.batch_size * config.block_size
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name)
    moments = 2 * params - (matrices if config.optimizer == "muon" else 0)  # Muon keeps one moment, AdamW two
    kept = config.max_iters // config.keep_interval if config.keep_interval else 0
    stored, ranks = 4 * (params + moments), run.world if config.fsdp else 1
    for line in (f"parameters         {params:,} ({model.n_params():,} without positions)",
                 f"tokens per step    {tokens:,} = {accum} micro-batches x {config.batch_size} x {config.block_size} over {run.world} ranks",
                 f"tokens in all      {tokens * config.max_iters:,} = {tokens * config.max_iters / n_tokens:.2f} epochs of {config.dataset}",
                 f"memory per rank    {4 * (2 * params + moments) / ranks / 2 ** 30:.2f} GiB weights, gradients and optimiser state, and the activations" + (
                     f"; peak measured {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB" if run.device.type == "cuda" else ""),
                 f"disk               {stored * (2 + kept) / 2 ** 30:.2f} GiB: ckpt.pt, best.pt and {kept} kept checkpoints",
                 f"time               {seconds * config.max_iters / 3600:.2f} h here: {seconds:.3f} s per step measured, {config.max_iters:,} steps"):
        run.print(line)
    run.close()


if __name__ == "__main__":
    main(configure(Config))
