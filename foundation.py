"""What can be learned from brain recordings without any label? NeuralEncoder as a masked autoencoder: most patches are hidden, the rest predicts them.

    python foundation.py                                              # embedded: minutes on two cores, synthetic podcast
    python foundation.py dataset=synthetic_eeg,PATH/TO/FIF/FOLDER     # several sets, montages and people in one batch; whatever MNE reads
    torchrun --standalone --nproc_per_node=4 foundation.py config/foundation_podcast.yaml
    python foundation.py init_from=resume                             # go on after a stop, bit for bit

A token is a patch of time of one electrode, which is its place, never its index. The encoder thinks on the visible tokens alone; a small decoder asks
for the others by place and time. Scored on held-out stretches of every recording, as R² on hidden patches, beside interpolation in time, the average
of the nearest electrodes and ridge from the visible patches, on exactly the same masks; predicting the mean is 0.

The latents are encoder(x, xyz, subject) → (B, patches, n_embd). How decode.py and telepath.py come to them, or you:

    encoder, recipe = model.load_encoder("out/foundation")            # best.pt: kind='foundation', encoder_args, model (encoder.*), recording
    y = resampled(recording.signal, recording.sfreq, recipe)          # data/recording.py: (T', C, F) at recipe['sfreq'] Hz
    centre, scale = robust_scale(y[rows of training])                 # (C, F); of a recording seen here: recipe['recordings'][i]
    x = encoder_input(windows (N, T, C, F) of y, recipe, centre, scale)   # (N, C, P x F x patch), T = round(recipe['window'] * recipe['sfreq'])
    xyz = places(recording.names, recording.xyz, recording.good, recipe["grid"])  # (C, 3), nan: absent
    encoder(x, xyz, subject)                                          # subject: number in recipe['subjects'], -1: a stranger

He et al. 2022 (masked autoencoders); Tong et al. 2022 (tubes); Défossez et al. 2023 (electrodes as places).
"""
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.sparse.linalg
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from configurator import Run, aside, configure, key_seed
from data.raw import READABLE, convert_files, converted_files
from data.recording import Recording, encoder_input, places, read_set, resampled, robust_scale
from model import MLP, EncoderConfig, GPTConfig, LayerNorm, NeuralEncoder, Reach

MASKS = ("random", "tube", "span")


@dataclass
class Config:
    # ---- recordings
    dataset: list[str] = field(default_factory=lambda: ["synthetic_podcast"])  # names under data/, prepared folders, or folders of files that MNE reads
    subjects: list[str] = field(default_factory=list)  # only these people; none: all
    channels: str = ""                     # regular expression, from a name's beginning: LG[AB]*; "": all
    montage: str = ""                      # MNE's standard montage for files without places: standard_1005
    grid: str = ""                         # 8x8: channels G1 .. G64 sit on a grid, whatever xyz says, and no others are there
    sfreq: float = 32.0                    # Hz, by block means
    bands: list[list[float]] = field(default_factory=list)  # envelopes of these bands (Hz) side by side instead of the signal: [[4,8],[70,150]]
    clamp: float = 8.0                     # cut beyond so many robust SD (median and interquartile range of training time)
    window: float = 0.5                    # s
    patch: int = 4                         # samples per token
    # ---- splits: training, gap, validation, gap, test, one after the other in each recording
    val_share: float = 0.15                # of its time
    test_share: float = 0.15
    # ---- masks
    masks: list[str] = field(default_factory=lambda: ["random", "tube"])  # of patches, of electrodes over the whole window, span: of all electrodes for a
                                           # while; they take turns over micro-batches
    mask_ratio: float = 0.75               # hidden share
    # ---- model
    n_embd: int = 64                       # of a latent
    width: int = 64                        # of the encoder
    n_layer: int = 3
    n_head: int = 4
    degree: int = 3                        # of the Fourier code of places
    decoder_width: int = 64
    decoder_layers: int = 2
    linear_terms: int = 4                  # the decoder adds to a linear guess: the conditional mean under the recording's covariance, kept to so many
                                           # products of one of electrodes and one of time; 0: it guesses alone
    latent_weight: float = 1.0             # of the second loss: everything, visible or not, from the latents alone
    dropout: float = 0.0                   # in the encoder
    # ---- optimiser
    batch_size: int = 32                   # windows per micro-batch
    windows_per_step: int = 0              # per optimiser step over all ranks, 0: one micro-batch per rank; accumulation is derived
    learning_rate: float = 3e-3            # AdamW's peak
    weight_decay: float = 0.05             # on matrices
    grad_clip: float = 1.0                 # total norm; 0: none
    max_iters: int = 2500                  # optimiser steps
    warmup_iters: int = 100                # linear warm-up, then cosine to 0
    # ---- evaluation
    eval_interval: int = 250               # steps between validations
    eval_windows: int = 256                # windows of each recording that are scored; 0: all, one after the other
    block: float = 5.0                     # s: intervals are over blocks of so long
    bootstraps: int = 1000
    alphas: list[float] = field(default_factory=lambda: [10.0 ** k for k in range(-1, 6)])  # of ridge, chosen on validation windows
    ridge_limit: int = 8192                # values of a window beyond which its ridge is left out
    # ---- run
    out_dir: str = "out/foundation"        # best.pt, results.csv, figures
    init_from: Literal["scratch", "resume"] = "scratch"
    overwrite: bool = False                # start over in a folder that holds a run
    seed: int = 1337                       # fixes everything
    device: str = "auto"                   # cuda, mps, cpu
    dtype: str = "float32"                 # auto: bfloat16 where the hardware has it; at this width it costs a CPU more than it saves
    compile: bool = False                  # compile the encoder's blocks
    deterministic: bool = False            # bit-for-bit repeats on CUDA too, slower
    log_interval: int = 50                 # steps between lines
    save_interval: int = 500               # steps between checkpoints
    wandb_log: bool = False                # log to Weights & Biases
    wandb_project: str = "nanocortex"      # its project

    def check(self):
        for key in ("patch", "batch_size", "max_iters", "eval_interval", "save_interval", "log_interval", "bootstraps", "n_embd", "n_layer", "n_head",
                    "decoder_layers"):
            if getattr(self, key) < 1:
                raise ValueError(f"option '{key}' must be at least 1, not {getattr(self, key)}")
        if not self.dataset:
            raise ValueError("dataset= names no recordings: give names under data/, or folders")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio}: between 0 and 1, of all patches, is hidden")
        if self.linear_terms < 0 or self.eval_windows < 0:
            raise ValueError(f"linear_terms={self.linear_terms} eval_windows={self.eval_windows}: neither can be below 0")
        if not self.masks or set(self.masks) - set(MASKS):
            raise ValueError(f"masks={self.masks}: there are {', '.join(MASKS)}")
        if self.sfreq <= 0 or round(self.window * self.sfreq) < self.patch or round(self.window * self.sfreq) % self.patch:
            raise ValueError(f"window={self.window} s has {round(self.window * self.sfreq)} samples at sfreq={self.sfreq:g} Hz, which patch={self.patch} does "
                             "not divide: change one of the three")
        if "span" in self.masks and round(self.window * self.sfreq) == self.patch:
            raise ValueError(f"masks=span hides a part of the window's time, and patch={self.patch} is all of it: take shorter patches")
        if any(len(band) != 2 or not 0 < band[0] < band[1] for band in self.bands):
            raise ValueError(f"bands={self.bands} must be pairs of rising frequencies in Hz: [[4,8],[70,150]]")
        if not re.fullmatch(r"(\d+x\d+)?", self.grid):
            raise ValueError(f"grid={self.grid} must be rows x columns: 8x8")
        if min(self.val_share, self.test_share) <= 0 or self.val_share + self.test_share >= 0.9:
            raise ValueError(f"val_share={self.val_share} test_share={self.test_share}: both above 0, and a tenth at least left for training")
        if self.width % self.n_head or self.decoder_width % self.n_head:
            raise ValueError(f"n_head={self.n_head} must divide width={self.width} and decoder_width={self.decoder_width}")


# ---- data

def converted(run, folder):
    """Folders of recordings made of the files that MNE reads in `folder`, in out_dir/recordings; rank 0 makes what is missing or older than its file."""
    out = run.out / "recordings"
    if run.master:
        convert_files(folder, out, montage=run.config.montage, places=not run.config.grid)
    run.barrier()
    return converted_files(folder, out)


class Source:
    """One recording, ready to be cut: signal (T', C, F) float32 at config.sfreq, xyz (C, 3), subject (a number), centre, scale and mean (C, F) over training
    time; spans: rows (begin, end) of train, val and test, at least a window apart. Raises ValueError where nothing is left of it."""

    def __init__(self, path, dataset, config):
        rec = Recording(path)
        self.dataset, self.name, self.person, self.synthetic = dataset, Path(path).name, rec.subject, rec.synthetic
        xyz = places(rec.names, rec.xyz, rec.good, config.grid)
        asked = np.array([bool(re.match(config.channels, name)) for name in rec.names])
        if not asked.any():
            raise ValueError(f"{rec.path}: no channel matches channels={config.channels}; there are {', '.join(rec.names[:6])}, ...")
        keep = np.flatnonzero(asked & np.isfinite(xyz).all(1))
        if not len(keep):
            raise ValueError(f"{rec.path}: none of its {len(rec.names)} channels is good and has a place" + (
                f" on grid={config.grid}, whose names are G1, G2, ..." if config.grid else ": give montage= for files of MNE, or prepare it with positions"))
        signal = resampled(rec.signal, rec.sfreq, asdict(config), keep)
        T, W = len(signal), round(config.window * config.sfreq)
        a, b = round(T * (1 - config.val_share - config.test_share)), round(T * (1 - config.test_share))
        self.spans = dict(train=(0, a), val=(a + W, b), test=(b + W, T))
        if min(end - begin for begin, end in self.spans.values()) < W:
            raise ValueError(f"window={config.window} s: {rec.path} has {T / config.sfreq:.1f} s, too few for windows of training, validation and test with a "
                             "window between them")
        # flat, or with nan, and nobody marked it bad: absent
        varies = np.isfinite(signal).all((0, 2)) & (signal[:a].std(0, dtype=float) > 1e-6 * np.abs(signal[:a]).max(0)).all(1)
        if not varies.any():
            raise ValueError(f"{rec.path}: each of its {len(keep)} channels is flat or holds nan in training time")
        self.signal, self.keep, self.left_out = np.ascontiguousarray(signal[:, varies]), keep[varies], [rec.names[i] for i in keep[~varies]]
        self.names, self.xyz = [rec.names[i] for i in self.keep], torch.from_numpy(xyz[self.keep]).float()
        centre, scale = robust_scale(self.signal[:a])
        self.centre, self.scale = centre.astype(np.float32), scale.astype(np.float32)
        self.mean = np.clip((self.signal[:a] - self.centre) / self.scale, -config.clamp, config.clamp).mean(0)
        self.sfreq = config.sfreq

    def starts(self, split, W, most=0):
        """First rows of a split's windows, one after the other; `most` of them, evenly."""
        begin, end = self.spans[split]
        at = np.arange(begin, end - W + 1, W)
        return at[np.linspace(0, len(at) - 1, min(most, len(at))).astype(int)] if most else at

    def cut(self, at, W, config):
        """Windows that begin at rows `at` as the encoder takes them, (N, C, P * F * patch)."""
        rows = np.asarray(at)[:, None] + np.arange(W)
        return encoder_input(self.signal[rows], dict(patch=config.patch, clamp=config.clamp), self.centre, self.scale)

    def facts(self):
        """What the checkpoint says of it: plain types and tensors."""
        seen = [s / self.sfreq for s in self.spans["train"]]
        return dict(dataset=self.dataset, name=self.name, subject=self.person, channels=self.names, xyz=self.xyz, centre=torch.from_numpy(self.centre),
                    scale=torch.from_numpy(self.scale), seen=seen)


def centred(x, source, config):
    """Encoder inputs x (N, C, P * F * patch) less the mean of each channel and feature in training time."""
    mean = np.repeat(source.mean, config.patch, axis=1)  # (C, F * patch)
    return x - np.tile(mean, x.shape[2] // mean.shape[1])


def gram_of(source, W, config):
    """Gram matrix (V, V) of a recording's windows in training time, V = C * P * F * patch values each, and how many windows."""
    begin, end = source.spans["train"]
    at, G = np.arange(begin, end - W + 1, max(1, (end - begin) // 50_000)), 0.0
    for i in range(0, len(at), 1024):
        some = at[i:i + 1024]
        x = centred(source.cut(some, W, config), source, config).reshape(len(some), -1).astype(np.float64)
        G = G + x.T @ x
    return G, len(at)


class Field:
    """Conditional means under a Gaussian with a recording's training covariance, kept to its `terms` largest products of a covariance of electrodes and one
    of time (Van Loan & Pitsianis 1993): the linear guess that the decoder starts from."""

    def __init__(self, source, gram, windows, terms, device):
        C = len(source.xyz)
        V, L = len(gram), len(gram) // C
        products = (gram / windows).reshape(C, L, C, L).transpose(0, 2, 1, 3).reshape(C * C, L * L)
        if terms < min(products.shape):
            u, s, v = scipy.sparse.linalg.svds(products, terms, v0=np.ones(min(products.shape)))
            products = (u * s) @ v
        kept = products.reshape(C, C, L, L).transpose(0, 2, 1, 3).reshape(V, V)
        kept = (kept + kept.T) / 2 + 0.003 * np.trace(kept) / V * np.eye(V)
        self.covariance = torch.from_numpy(kept.astype(np.float32)).to(device)

    def guess(self, x, visible):
        """x, visible (N, V) → all values (N, V), from the visible ones."""
        index, meant = first_true(visible)
        both = meant[:, :, None] & meant[:, None]
        A = torch.where(both, self.covariance[index[:, :, None], index[:, None]], 0.0) + torch.diag_embed((~meant).float())
        weights = torch.linalg.solve(A, torch.where(meant, x.gather(1, index), 0.0)[..., None])[..., 0]
        return torch.zeros_like(x).scatter_add(1, index, weights * meant) @ self.covariance


class Corpus:
    """All recordings of dataset=, and windows of them with masks. subjects: names, in order; recipe: what the checkpoint says."""

    def __init__(self, run, config):
        self.config, self.run, self.W = config, run, round(config.window * config.sfreq)
        self.P, self.F = self.W // config.patch, max(1, len(config.bands))
        self.sources = []
        for name in config.dataset:
            folder = Path(name)
            if folder.is_dir() and not (folder / "meta.yaml").exists() and not (folder / "prepare.py").exists():
                if not (paths := converted(run, folder)):
                    raise FileNotFoundError(f"{folder} holds neither meta.yaml (data/recording.py) nor a file that MNE reads ({', '.join(READABLE)})")
            else:
                folder = run.dataset(name)
                paths = [folder / part for part in read_set(folder)["recordings"]]
            self.sources += [Source(path, name, config) for path in paths if self.wanted(path)]
        if not self.sources:
            raise ValueError(f"subjects={config.subjects}: there is nobody of that name in dataset={','.join(config.dataset)}")
        self.subjects = sorted({(s.dataset, s.person) for s in self.sources})
        for source in self.sources:
            source.subject = self.subjects.index((source.dataset, source.person))
        small = [len(s.xyz) * self.W * self.F <= config.ridge_limit for s in self.sources]
        self.grams = [gram_of(s, self.W, config) if ok else None for s, ok in zip(self.sources, small)]
        self.fields = [Field(s, *g, config.linear_terms, run.device) if config.linear_terms and g else None for s, g in zip(self.sources, self.grams)]
        lengths = np.array([np.diff(s.spans["train"])[0] for s in self.sources], float)
        self.share = lengths / lengths.sum()
        self.synthetic = all(s.synthetic for s in self.sources)
        self.recipe = dict(sfreq=config.sfreq, window=config.window, patch=config.patch, bands=config.bands, clamp=config.clamp, grid=config.grid,
                           subjects=[person for _, person in self.subjects], recordings=[source.facts() for source in self.sources])

    def wanted(self, path):
        wanted = self.config.subjects
        return not wanted or bool({Recording(path).subject, Path(path).name, Path(path).name.removeprefix("sub-").lstrip("0")} & set(wanted))

    def together(self, windows, which, kind, rng):
        """A batch of windows (C, P * F * patch) each, of recordings number `which`: x (B, C, ..), xyz (B, C, 3), subject (B,), visible (B, C, P), and what the
        recordings' fields guess, like x, 0 where there is none; the smaller montages padded with channels that are not there."""
        C = max(len(w) for w in windows)
        x, xyz = np.zeros((len(windows), C, windows[0].shape[1]), np.float32), torch.full((len(windows), C, 3), math.nan)
        for i, (w, r) in enumerate(zip(windows, which)):
            x[i, :len(w)], xyz[i, :len(w)] = w, self.sources[r].xyz
        subject = torch.tensor([self.sources[r].subject for r in which])
        visible = draw_mask(kind, np.array([len(w) for w in windows]), C, self.P, self.config.mask_ratio, rng)
        x, xyz, subject, visible = (t.to(self.run.device) for t in (torch.from_numpy(x), xyz, subject, torch.from_numpy(visible)))
        guess, which = torch.zeros_like(x), np.array(which)
        for r in sorted(set(which)):
            if self.fields[r]:
                rows, n = torch.from_numpy(np.flatnonzero(which == r)).to(x.device), len(self.sources[r].xyz)
                mean = torch.from_numpy(-centred(np.zeros_like(windows[0][None, :1]).repeat(n, 1), self.sources[r], self.config)).to(x.device)
                seen = visible[rows, :n].repeat_interleave(x.size(2) // self.P, 2)
                guess[rows, :n] = self.fields[r].guess((x[rows, :n] - mean).flatten(1), seen.flatten(1)).unflatten(1, (n, -1)) + mean
        return x, xyz, subject, visible, guess

    def batch(self, step, micro):
        """Training windows, anywhere in training time, and their masks: all drawn from (seed, step, micro)."""
        config, rng = self.config, np.random.default_rng(key_seed(self.run.seed, step, micro, "windows"))
        which = rng.choice(len(self.sources), config.batch_size, p=self.share)
        windows = []
        for r in which:
            begin, end = self.sources[r].spans["train"]
            windows.append(self.sources[r].cut([rng.integers(begin, end - self.W + 1)], self.W, config)[0])
        kinds = config.masks
        return self.together(windows, which, kinds[(step + micro) % len(kinds)], rng)

    def held_out(self, split, r, kind, batch=64):
        """(starts, batch) of the windows of recording number r that are scored: the same windows and masks whenever they are asked for."""
        source, rng = self.sources[r], np.random.default_rng(key_seed(self.run.seed, split, r, kind))
        at = source.starts(split, self.W, self.config.eval_windows)
        for i in range(0, len(at), batch):
            some = at[i:i + batch]
            yield some, self.together(list(source.cut(some, self.W, self.config)), [r] * len(some), kind, rng)


def draw_mask(kind, channels, C, P, ratio, rng):
    """Which patches are visible, (B, C, P) bool, where window b has its first channels[b] of C electrodes: 1 - ratio of its patches ('random'), of its
    electrodes, all the time ('tube'), or of its time, all but a run of patches ('span'); one of them visible and one
    hidden at least, where there are two."""
    B = len(channels)
    visible = np.zeros((B, C, P), bool)
    for b, n in enumerate(channels):
        count = dict(random=n * P, tube=n, span=P)[kind]
        hidden = min(max(round(ratio * count), 1), count - 1) if count > 1 else 1
        if kind == "random":
            order = rng.permutation(count)
            visible[b, :n] = (order >= hidden).reshape(n, P)
        elif kind == "tube":
            visible[b, :n] = (rng.permutation(n) >= hidden)[:, None]
        else:
            first = rng.integers(P - hidden + 1)
            visible[b, :n] = (np.arange(P) < first) | (np.arange(P) >= first + hidden)
    return visible


# ---- model

def first_true(mask):
    """Where a mask (B, N) is True, the first ones in each row: index (B, K) with K the most that a row has, and which of them are meant (B, K)."""
    K = max(1, int(mask.sum(1).max()))
    index = mask.int().argsort(dim=1, descending=True, stable=True)[:, :K]
    return index, mask.gather(1, index)


def rows_of(x, index):
    """x (B, N, d) at index (B, K) → (B, K, d)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.size(-1)))


class Ask(nn.Module):
    """A block of the decoder: each query looks at the visible tokens, the near ones first, then thinks by itself; queries do not see one another."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_q, self.ln_kv, self.ln_mlp = (LayerNorm(width, True) for _ in range(3))
        self.q, self.kv, self.c_proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = MLP(GPTConfig(n_embd=width))

    def forward(self, q, tokens, near):
        """q (B, N, d), tokens (B, K, d), near (B, H, N, K): what is added to the scores."""
        heads = lambda t: t.unflatten(2, (self.n_head, -1)).transpose(1, 2)
        k, v = self.kv(self.ln_kv(tokens)).chunk(2, -1)
        y = F.scaled_dot_product_attention(heads(self.q(self.ln_q(q))), heads(k), heads(v), attn_mask=near.to(k.dtype))
        q = q + self.c_proj(y.transpose(1, 2).flatten(2))
        return q + self.mlp(self.ln_mlp(q))


class MaskedAutoencoder(nn.Module):
    """encoder (NeuralEncoder) on the visible patches, and two ways back. The decoder asks the visible tokens for each hidden patch by its place and time,
    and adds to a linear guess, which it is told. `field` reads every patch, hidden or not, out of the latents of its time alone, linearly in them: what the
    electrodes know must be in there."""

    def __init__(self, shape, patches, width, layers, n_head):
        super().__init__()
        self.encoder = NeuralEncoder(shape)
        M = len(self.encoder.place)
        self.told = nn.Linear(shape.patch, width)
        self.place = nn.Parameter(torch.randn(M, width) * M ** -0.5)
        self.time = nn.Parameter(torch.randn(patches, width) * 0.5)
        self.into, self.reach = nn.Linear(shape.width, width), Reach(layers, n_head)
        self.blocks = nn.ModuleList(Ask(width, n_head) for _ in range(layers))
        self.norm, self.head = LayerNorm(width, True), nn.Linear(width, shape.patch)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)  # at first what it makes is the guess
        self.field_place = nn.Parameter(torch.randn(M, 2 * shape.n_embd) * M ** -0.5)
        self.field_in, self.field_out = nn.Linear(shape.n_embd, 2 * shape.n_embd), nn.Linear(2 * shape.n_embd, shape.patch)

    def encode(self, x, xyz, subject, visible):
        """Visible tokens (B, K, width), their index, which are meant, and spots of all; visible (B, C, P)."""
        tokens, present = self.encoder.tokenize(x, xyz, subject)
        index, meant = first_true(visible.flatten(1) & present)
        spots = self.encoder.spots(xyz, visible.size(2)).expand(len(x), -1, -1)
        return self.encoder.think(rows_of(tokens, index), meant, rows_of(spots, index)), index, meant, spots, present

    def forward(self, x, xyz, subject, visible, guess):
        """Losses (2,), of the hidden patches and of all patches from the latents; the hidden patches as predicted (B, N, patch), their index and which
        are meant. x and guess (B, C, P * patch), xyz (B, C, 3), subject (B,), visible (B, C, P)."""
        B, C, P = visible.shape
        h, index, meant, spots, present = self.encode(x, xyz, subject, visible)
        truth = torch.where(present[..., None], self.encoder.patches(torch.nan_to_num(x)).flatten(1, 2), 0.0)  # (B, C P, patch)
        code = self.encoder.code(xyz)[0]
        ask, asked = first_true(present & ~visible.flatten(1))
        q = rows_of(((code @ self.place)[:, :, None] + self.time).flatten(1, 2), ask)
        tokens, guess = self.into(h), rows_of(self.encoder.patches(guess).flatten(1, 2), ask)
        q = q + self.told(guess)
        for block, near in zip(self.blocks, self.reach(rows_of(spots, ask), rows_of(spots, index), meant)):
            q = block(q, tokens, near)
        made = guess + self.head(self.norm(q)).float()
        loss = ((made - rows_of(truth, ask)).square().mean(-1) * asked).sum() / asked.sum()
        whole = h.new_zeros(B, C * P, h.size(2)).scatter(1, index[..., None].expand_as(h), h * meant[..., None])
        z = self.encoder.read(whole, visible.flatten(1) & present, P)  # (B, P, n_embd)
        field = self.field_out(self.field_in(z)[:, None] * (code @ self.field_place)[:, :, None]).flatten(1, 2).float()
        latent = ((field - truth).square().mean(-1) * present).sum() / present.sum()
        return torch.stack([loss, latent]), made, ask, asked


def build(config, corpus):
    """The autoencoder that the options and the recordings ask for."""
    shape = EncoderConfig(kind="transformer", tokens="electrode", n_embd=config.n_embd, width=config.width, n_layer=config.n_layer, n_head=config.n_head,
                          patch=config.patch * corpus.F, degree=config.degree, subjects=len(corpus.subjects), dropout=config.dropout, reach=True)
    return MaskedAutoencoder(shape, corpus.P, config.decoder_width, config.decoder_layers, config.n_head)


# ---- evaluate

def ridge(gram, x, hidden, alpha):
    """Each hidden value from all visible ones of its window: least squares with a penalty over every window of a recording's training time, solved anew for
    every mask, since one Gram matrix (V, V) holds what each of them needs. x, hidden (V,) → the hidden values."""
    seen = ~hidden
    A = gram[np.ix_(seen, seen)]
    A[np.diag_indices(len(A))] += alpha
    return np.linalg.solve(A, x[seen]) @ gram[np.ix_(seen, hidden)]


def interpolate(x, visible):
    """Each channel and feature (V,) over time, linearly between its visible samples, flat beyond them; the mean, 0, where it has none. x, visible (.., T)."""
    out, t = np.zeros_like(x), np.arange(x.shape[-1])
    for i in np.ndindex(x.shape[:-1]):
        if visible[i].any():
            out[i] = np.interp(t, t[visible[i]], x[i][visible[i]])
    return out


def neighbours(x, visible, order, k):
    """The mean of the k nearest channels that are visible at that time; 0 where there is none. x (C, .., T), visible (C, T); order (C, C): by distance."""
    out = np.zeros_like(x)
    for c in range(len(x)):
        seen = visible[order[c, 1:]]  # itself left out
        taken = seen & (seen.cumsum(0) <= k)  # (C - 1, T)
        shape = (len(taken),) + (1,) * (x.ndim - 2) + (taken.shape[1],)
        out[c] = (x[order[c, 1:]] * taken.reshape(shape)).sum(0) / np.maximum(taken.sum(0), 1)
    return out


def baselines(corpus, r, kind, split, alpha, k):
    """Squared errors of each window, {method: (N,)}, on the hidden patches of held_out windows, and of the mean."""
    source, config = corpus.sources[r], corpus.config
    order = torch.cdist(source.xyz, source.xyz).argsort(dim=1, stable=True).numpy()
    order = np.stack([np.r_[c, row[row != c]] for c, row in enumerate(order)])  # two electrodes may share a place
    found = []
    for _, (x, _, _, visible, guess) in corpus.held_out(split, r, kind):
        for w, v, g in zip(*(centred(t.cpu().numpy(), source, config) if t.dtype != torch.bool else t.cpu().numpy() for t in (x, visible, guess))):
            C, P = v.shape
            in_time = w.reshape(C, P, corpus.F, config.patch).transpose(0, 2, 1, 3).reshape(C, corpus.F, -1)  # (C, F, T)
            seen = np.repeat(v, config.patch, axis=1)  # (C, T)
            hidden = np.broadcast_to(~seen[:, None], in_time.shape)
            guesses = dict(mean=0 * in_time, interpolation=interpolate(in_time, ~hidden), neighbours=neighbours(in_time, seen, order, k))
            errors = {name: np.square((guess - in_time)[hidden]).sum() for name, guess in guesses.items()}
            flat, lost = w.reshape(-1), np.repeat(~v, corpus.F * config.patch, axis=1).reshape(-1)
            if corpus.fields[r] is not None:
                errors["linear guess"] = np.square(g.reshape(-1) - flat)[lost].sum()
            if alpha is not None:
                errors["ridge"] = np.square(ridge(corpus.grams[r][0], flat, lost, alpha) - flat[lost]).sum()
            found.append(errors)
    return {name: np.array([errors[name] for errors in found]) for name in found[0]}


def errors_of(run, model, corpus, r, kind, split):
    """Squared errors of the model in each held-out window (N,), of the mean (N,), the second loss, and the windows' starts."""
    source, config, found, total, latent, starts = corpus.sources[r], corpus.config, [], [], [], []
    mean = torch.from_numpy(np.repeat(source.mean, config.patch, axis=1)).to(run.device)  # (C, F * patch)
    model.eval()
    with torch.no_grad():
        for at, (x, xyz, subject, visible, guess) in corpus.held_out(split, r, kind):
            with run.autocast():
                losses, made, ask, asked = model(x, xyz, subject, visible, guess)
            truth = rows_of(model.encoder.patches(x).flatten(1, 2), ask)
            centre = mean[:, None].expand(-1, corpus.P, -1).flatten(0, 1)[ask]  # (B, N, F * patch)
            for values, guess in ((found, made), (total, centre)):
                values.append(((guess - truth).square().sum(-1) * asked).sum(1).cpu())
            latent.append(losses[1].item() * len(at))
            starts.append(at)
    model.train()
    found, total = torch.cat(found).double().numpy(), torch.cat(total).double().numpy()
    return found, total, sum(latent) / len(found), np.concatenate(starts)


def validate(run, model, corpus):
    """R² on hidden patches of validation windows, by mask, and the sum that chooses: the mean over masks less what the latents leave."""
    numbers = {}
    for kind in corpus.config.masks:
        parts = [errors_of(run, model, corpus, r, kind, "val") for r in range(len(corpus.sources))]
        numbers[f"val_r2_{kind}"] = float(1 - sum(p[0].sum() for p in parts) / sum(p[1].sum() for p in parts))
        numbers[f"val_latent_loss_{kind}"] = float(np.mean([p[2] for p in parts]))
    return numbers


def report(run, model, corpus, config):
    """Score the test windows, once: R² of the model and of the baselines on the same masks, differences to each of them; rows of results.csv."""
    alphas = {}
    for source, gram in zip(corpus.sources, corpus.grams):
        if gram is None:
            run.print(f"{source.name}: {len(source.xyz) * corpus.W * corpus.F:,} values in a window are more than ridge_limit={config.ridge_limit}: no ridge "
                      "beside it, and no linear guess")
    rng = np.random.default_rng(key_seed(run.seed, "bootstrap"))
    data = f"{', '.join(config.dataset)}{', synthetic' * corpus.synthetic}"
    for kind in config.masks:
        parts, block, chosen = [], [], []
        for r, source in enumerate(corpus.sources):
            by_k = {k: baselines(corpus, r, kind, "val", None, k)["neighbours"].sum() for k in (1, 2, 3, 4, 6, 8)}
            k, alpha = min(by_k, key=by_k.get), None
            if corpus.grams[r]:
                by_alpha = {a: baselines(corpus, r, kind, "val", a, 1)["ridge"].sum() for a in config.alphas}
                alpha = min(by_alpha, key=by_alpha.get)
            alphas[kind, r] = alpha
            chosen.append(f"{source.name} alpha {alpha}, {k} neighbours")
            errors = baselines(corpus, r, kind, "test", alpha, k)
            found, total, _, starts = errors_of(run, model, corpus, r, kind, "test")
            assert np.allclose(total, errors["mean"], rtol=1e-3)  # the same masks
            parts.append(pd.DataFrame({**errors, "encoder": found, "mean": total}))
            block += [(r, b) for b in (starts / config.sfreq // config.block).astype(int)]
        table = pd.concat(parts, ignore_index=True)
        table = table.dropna(axis=1)  # a baseline that some recordings have none of
        sums = table.groupby(pd.MultiIndex.from_tuples(block)).sum()
        draws = rng.integers(0, len(sums), (config.bootstraps, len(sums)))
        r2 = lambda part: 1 - part.drop(columns="mean").div(part["mean"], axis=0)
        whole = r2(table.sum().to_frame().T).iloc[0]
        drawn = r2(pd.DataFrame(sums.to_numpy()[draws].sum(1), columns=sums.columns))
        rows = {(name, "r2"): (whole[name], drawn[name]) for name in whole.index}
        rows |= {("encoder", f"r2 - {name}"): (whole["encoder"] - whole[name], drawn["encoder"] - drawn[name]) for name in whole.index if name != "encoder"}
        for (name, metric), (score, spread) in rows.items():
            run.result(score, 0.0, *np.quantile(spread, [0.025, 0.975]), len(table), mask=kind, method=name, metric=metric, data=data, set="test")
        run.print(f"{kind}: " + ", ".join(f"{name} {whole[name]:.3f}" for name in whole.index) + f", mean 0, n = {len(table)} windows in {len(sums)} blocks"
                  f" (on validation: {'; '.join(chosen)})")
        if "ridge" in whole:
            low, high = np.quantile(drawn["encoder"] - drawn["ridge"], [0.025, 0.975])
            run.print(f"{kind}: {whole['encoder'] - whole['ridge']:+.4f} [{low:+.4f}, {high:+.4f}] beside ridge")
    return alphas


# ---- plots

def save_figure(fig, path):
    """Write the figure aside, rename, close it."""
    with aside(path) as file:
        fig.savefig(file, dpi=130, format="png")
    plt.close(fig)


def plot_curves(path, log, title):
    """loss.png: both training losses, and R² of hidden validation patches by mask."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, prefix in zip(axes, ("train_", "val_r2_")):
        for key in dict.fromkeys(key for line in lines for key in line if key.startswith(prefix)):
            axis.plot(*zip(*[(line["step"], line[key]) for line in lines if key in line]), label=key.removeprefix(prefix).replace("_", " "))
        axis.set_xlabel("step")
        axis.legend(frameon=False)
    axes[0].set(ylabel="mean squared error", title="training", yscale="log")
    axes[1].set(ylabel="R² of hidden patches", title="validation")
    fig.suptitle(title, fontsize=10)
    save_figure(fig, path)


def plot_reconstruction(path, run, model, corpus, alphas, title):
    """The first test window of the first recording under each mask: truth, what is visible, the model, ridge; and hidden electrodes over time."""
    config, source = corpus.config, corpus.sources[0]
    fig, axes = plt.subplots(len(config.masks), 5, figsize=(15, 3.4 * len(config.masks)), layout="constrained", squeeze=False)
    model.eval()
    for row, kind in zip(axes, config.masks):
        at, batch = next(corpus.held_out("test", 0, kind))
        with torch.no_grad(), run.autocast():
            _, made, ask, asked = model(*batch)
        x, visible = batch[0][0].cpu().numpy(), batch[3][0].cpu().numpy()
        C, P = visible.shape
        patches = x.reshape(C * P, corpus.F, config.patch)
        guess = patches.copy()
        guess[ask[0][asked[0]].cpu().numpy()] = made[0][asked[0]].float().cpu().numpy().reshape(-1, corpus.F, config.patch)
        view = lambda p, C=C: p.reshape(C, -1, corpus.F, config.patch)[:, :, 0].reshape(C, -1)  # the first band
        seen = np.repeat(visible, config.patch, axis=1)
        shown = [("truth", view(patches)), ("visible", np.where(seen, view(patches), np.nan)), ("encoder", view(guess))]
        if alphas[kind, 0] is not None:
            lost = np.repeat(~visible, corpus.F * config.patch, axis=1).reshape(-1)
            flat = centred(x[None], source, config)[0].reshape(-1)
            mean, filled = x.reshape(-1) - flat, flat.copy()
            filled[lost] = ridge(corpus.grams[0][0], flat, lost, alphas[kind, 0])
            shown.append(("ridge", view((filled + mean).reshape(C * P, corpus.F, config.patch))))
        limit, span = np.nanquantile(np.abs(shown[0][1]), 0.98), (0, config.window)
        for axis, (name, image) in zip(row, shown):
            axis.imshow(image, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(*span, C - 0.5, -0.5), interpolation="nearest")
            axis.set(title=f"{kind}: {name}", xlabel="s", ylabel="electrode" if axis is row[0] else None)
        time = np.arange(seen.shape[1]) / config.sfreq
        for i, c in enumerate(np.argsort(seen.mean(1), kind="stable")[:4]):  # most hidden
            for (name, image), colour, width in zip([shown[0], *shown[2:]], ("k", "#c23b22", "#4878a8"), (1.5, 1.5, 1.0)):
                row[4].plot(time, image[c] - 5 * i, c=colour, lw=width, label=name if not i else None)
            row[4].plot(time[seen[c]], shown[0][1][c][seen[c]] - 5 * i, "k.", ms=5, label="visible" if not i else None)
            row[4].text(0, 1 - 5 * i, source.names[c], fontsize=8)
        row[4].set(xlabel="s", yticks=[], title="hidden electrodes")
        row[4].legend(fontsize=7, frameon=False, loc="upper right")
    fig.suptitle(title, fontsize=10)
    model.train()
    save_figure(fig, path)


# ---- the run

def lr_share(step, config):
    """Learning rate at a step as a share of its peak."""
    warmup = min(config.warmup_iters, config.max_iters // 5)
    return (step + 1) / (warmup + 1) if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.max_iters - warmup)))


def main(config):
    run = Run(config)
    corpus = Corpus(run, config)
    torch.manual_seed(key_seed(run.seed, "model"))
    model = build(config, corpus).to(run.device)
    per_step = config.windows_per_step or config.batch_size * run.world
    if per_step % (config.batch_size * run.world):
        raise ValueError(f"windows_per_step={per_step} must be a multiple of batch_size x ranks = {config.batch_size} x {run.world}")
    accum = per_step // config.batch_size
    groups = [dict(params=[p for p in model.parameters() if (p.dim() >= 2) == matrices], weight_decay=config.weight_decay * matrices) for matrices in (1, 0)]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    step, best, best_step, resumed = 0, -math.inf, 0, None
    if config.init_from == "resume":
        state = run.load("ckpt.pt")
        if state.get("kind") != "foundation" or state["encoder_args"] != asdict(model.encoder.config) or not same_data(state["recording"], corpus.recipe):
            raise ValueError(f"{run.out / 'ckpt.pt'} has another shape, or is of other recordings, than the options say: resume with its own config.yaml")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        step = resumed = state["step"]
        best, best_step = state["best"], state["best_step"]
        run.rewind(step)
    if config.compile:
        for block in model.encoder.blocks:
            block.compile()
    ddp = model if run.world == 1 else DistributedDataParallel(model, device_ids=[run.device] if run.device.type == "cuda" else None, broadcast_buffers=False)
    data = f"{', '.join(config.dataset)}{', synthetic' * corpus.synthetic}"
    names, left_out = sum((s.names for s in corpus.sources), []), sum((s.left_out for s in corpus.sources), [])
    seconds = sum(np.diff(s.spans["train"])[0] for s in corpus.sources) / config.sfreq
    size = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.encoder, model)]
    run.print(f"{data}: {len(corpus.sources)} recordings of {len(corpus.subjects)} people, {len(names)} electrodes ({len(left_out)} more flat or with nan), "
              f"{seconds:,.0f} s of training | encoder {size[0]:.2f} M of {size[1]:.2f} M parameters | {per_step} windows a step | {run.device} "
              f"{str(run.dtype)[6:]}")

    def save(name):
        run.save(name, dict(kind="foundation", encoder_args=asdict(model.encoder.config), model=model.state_dict(), recording=corpus.recipe, step=step,
                            best=best, best_step=best_step, optimizer=optimizer.state_dict(), scaler=run.scaler.state_dict(), config=asdict(config)))

    bar = run.progress(config.max_iters, step, "pretrain")
    run.stopping()  # from here on a signal waits for the end of a step
    while True:
        ends = step >= config.max_iters
        if step != resumed and (ends or step % config.eval_interval == 0):
            numbers = validate(run, model, corpus)
            run.log(step, **numbers)
            score = sum(numbers[f"val_r2_{kind}"] - config.latent_weight * numbers[f"val_latent_loss_{kind}"] for kind in config.masks) / len(config.masks)
            if score > best:
                best, best_step = score, step
                save("best.pt")
        if step != resumed and step and (ends or step % config.save_interval == 0 or run.stopped):
            save("ckpt.pt")
        if ends or run.stopped:
            break
        total, micros = torch.zeros(2, device=run.device), range(run.rank, accum, run.world)
        for micro in micros:
            torch.manual_seed(key_seed(run.seed, step, micro, "dropout"))
            if run.world > 1:
                ddp.require_backward_grad_sync = micro == micros[-1]
            with run.autocast():
                losses = ddp(*corpus.batch(step, micro))[0]
            run.scaler.scale((losses[0] + config.latent_weight * losses[1]) / len(micros)).backward()
            total += losses.detach() / len(micros)
        run.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        if not run.scaler.is_enabled() and not norm.isfinite():
            raise ValueError(f"the gradient is not finite at step {step + 1}: stopped; try a smaller learning_rate, or dtype=float32")
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * lr_share(step, config)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        run.stopping()
        if step % config.log_interval == 0 or step == 1:
            hidden, latent = (run.reduce(total) / run.world).tolist()
            run.log(step, train_hidden=hidden, train_from_latents=latent, grad_norm=norm.item())
    bar.close()
    if run.stopped:
        return run.close()
    run.barrier()
    model.load_state_dict(run.load("best.pt")["model"])
    run.print(f"step {best_step} was chosen on validation; encoder and recipe are in {run.out / 'best.pt'}")
    if run.master:
        alphas = report(run, model, corpus, config)
        plot_curves(run.out / "loss.png", run.out / "log.jsonl", data)
        plot_reconstruction(run.out / "reconstruction.png", run, model, corpus, alphas, f"{data}: a test window of {corpus.sources[0].name}")
    run.merge()
    run.close()


def same_data(a, b):
    """Whether two recipes are of the same recordings, made in the same way."""
    plain = lambda r: {k: v for k, v in r.items() if k != "recordings"}
    return plain(a) == plain(b) and [(x["name"], x["channels"], x["seen"]) for x in a["recordings"]] == [(x["name"], x["channels"], x["seen"])
                                                                                                       for x in b["recordings"]]


if __name__ == "__main__":
    main(configure(Config))
