"""How far must a model be warped to match the brain? d_warp: the least number of trained dimensions that reach a given encoding score.

    python warp.py                                              # embedded: a planted brain and candidates at known distances from it, offline
    python warp.py config/warp_planted.yaml                     # the same student against brains planted further and further away
    python warp.py config/warp_simulation.yaml                  # three functions bent into a fourth with growing d
    python warp.py config/warp_digits.yaml                      # published check: intrinsic dimension of a classifier, at two widths
    python warp.py config/warp_tuckute.yaml models=gpt2,gpt2-medium layers=6
    torchrun --standalone --nproc_per_node=4 warp.py ...        # fits are dealt over ranks; a stopped sweep goes on where it was

All parameters of a network move along theta = theta0 + lambda_g P z with P a fixed random D x d matrix that is never formed; only z (and a scale for each
group of layers) is trained. A linear readout is fitted to the brain in closed form inside the loop, so d = 0 is exactly ridge regression; `objective=`
rsa or cka needs no readout at all, linear_first fits it once and warps it along with the model.
Li et al. 2018 and Aghajanyan et al. 2020 (intrinsic dimension); Le et al. 2013 (Fastfood); Golub & Pereyra 1973 (variable projection).
"""
import hashlib
import importlib.util
import itertools
import re
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import torch
import torch.nn as nn
from sklearn.isotonic import isotonic_regression
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn import functional as F

from configurator import HERE, Run, aside, configure, key_seed
from data import read_table
from data.stimuli import Encoding, read_meta, read_task, write_encoding
from model import GPT, load_checkpoint, load_lm


# options that no single fit depends on: changed, they count the fits that are there anew
ANALYSIS = ("models", "about", "seeds", "full", "common", "common_share", "reach", "draws", "shuffled", "baselines")


@dataclass
class Config:
    # ---- data
    task: Literal["encoding", "classification", "simulation"] = "encoding"
    dataset: str = "synthetic_brain"       # stimuli with responses (data/stimuli.py); to classify: digits, an image folder, an .npz, or sentences
    sentences: str = ""                    # to classify texts: the task of the dataset (area of docstrings, mrpc of glue)
    roi: str = ""                          # only units of this region
    reliable: float = 0.05                 # only units whose ceiling (R²), from training stimuli or, without repeats, as published, is above this
    val_share: float = 0.2                 # of the groups, where the dataset has no split of its own; validation chooses learning rate and step
    test_share: float = 0.25               # of the groups
    samples: int = 0                       # at most so many stimuli to classify, 0: all
    image_size: int = 224                  # pixels, for models that bring no preprocessing of their own
    # ---- the planted brain (dataset=synthetic_brain)
    planted_stimuli: str = "synthetic_brain"  # its stimuli: a folder with stimuli.csv (text, group)
    planted_warp: float = 1.0              # teacher = lm + this times ||theta0|| in a random direction
    planted_k: int = 0                     # > 0: that direction lies in the first k columns of seed 0's own P, as the sweep has it
    planted_units: int = 64                # voxels, mixtures of
    planted_components: int = 8            # the first principal components of the teacher's features
    planted_ceiling: float = 0.8           # R² that the teacher itself reaches against mean responses
    repeats: int = 3                       # presentations of each stimulus
    # ---- candidates
    lm: str = "out/train"                  # the language model called 'lm' below
    models: list[str] = field(default_factory=lambda: ["teacher", "lm@0.5", "lm", "lm@2", "lm~random"])  # lm, a run folder, a Hugging Face
    # name, my_file.py:constructor, mlp:WIDTH (classification). lm@0.5: so far from the planted teacher (lm@0) on the straight line through it and lm (lm@1);
    # ~0.3: so far towards random weights, ~random: all the way
    layers: list[str] = field(default_factory=lambda: ["1"])  # hidden states (0: embedding, i: after block i) or names of modules, side by side
    pool: Literal["mean", "last", "first", "flatten"] = "mean"  # states of a stimulus to one vector: over its tokens or pixels
    about: dict = field(default_factory=dict)  # columns of results.csv to set: architecture, training_task, pretraining_data
    # ---- objective
    objective: Literal["linear", "linear_first", "rsa", "cka"] = "linear"
    metric: Literal["r", "r2"] = "r"       # median over units, of linear objectives
    head: Literal["ridge", "sgd"] = "ridge"  # linear: closed form inside the loop, or trained beside z
    head_fit: Literal["ridge", "ols", "pls", "sgd"] = "ridge"  # linear_first: how the readout is fitted, once
    head_dims: int = 8                     # equal head size for all: the first so many principal components of each model's own features; 0: all of them
    head_lr: float = 3e-3                  # of head=sgd
    alphas: list[float] = field(default_factory=lambda: [float(10 ** (k / 2)) for k in range(-2, 13)])  # ridge penalties, one chosen per unit
    rdm: Literal["correlation", "euclidean", "crossnobis"] = "correlation"  # rsa: distances (crossnobis: of the brain, euclidean of the model)
    compare: Literal["pearson", "spearman"] = "pearson"  # rsa: of the two sets of distances; trained by soft ranks on at most 64 stimuli a step
    exact: bool = True                     # gradients of the whole training set (two passes where it is larger than a batch); False: of batches
    head_every: int = 1                    # steps between solutions of the ridge readout
    # ---- warping
    dims: list[int] = field(default_factory=lambda: [0, 32, 256, 2048])  # d, the scales counted; the full model comes on top
    full: bool = True                      # all D parameters, trained directly
    projection: Literal["fastfood", "fastfood_tensor", "srht", "onehot", "dense", "sparse"] = "fastfood"
    layer_groups: str = ""                 # one learned scale each: a,b;c (prefixes of parameter names), 'blocks': one a block; "": none
    seeds: int = 3                         # draws of P (and of the model, where its weights are random)
    steps: int = 20                        # of Adam, always all of them; the best by validation is kept
    learning_rates: list[float] = field(default_factory=lambda: [0.04, 0.16])  # chosen per d on validation; a step is about this share of ||theta0||
    eval_interval: int = 10                # steps between validations
    batch_size: int = 512                  # stimuli per forward pass
    fits_per_batch: int = 0                # fits trained side by side (vmap); 0: whatever turns out fastest here
    # ---- d_warp and controls
    common: str = "highest"                # absolute: the score to reach, the same for all: a number, or of the candidates' full scores the lowest or highest
    common_share: float = 0.95             # times this
    reach: float = 0.9                     # relative: s0 + this times (full - s0), each model's own; s0 is the score at d = 0, or 0 where dims has none
    draws: int = 1000                      # bootstrap over seeds and test stimuli (groups)
    shuffled: bool = True                  # the first candidate against shuffled responses, too
    baselines: bool = True                 # OLS, himalaya's ridge and PLS at d = 0
    # ---- run
    out_dir: str = "out/warp"              # results.csv and figures
    seed: int = 1337                       # splits, planted brain, draws
    device: str = "auto"                   # cuda, mps, cpu
    dtype: str = "float32"                 # a small d moves each weight by little: half precision would round it away

    POSITIVE = "image_size planted_units planted_components planted_ceiling models layers alphas head_lr learning_rates common_share reach"
    SHARES = "reliable val_share test_share planted_ceiling"

    def check(self):
        for key in ("seeds", "steps", "eval_interval", "batch_size", "draws", "head_every", "repeats"):
            if getattr(self, key) < 1:
                raise ValueError(f"option '{key}' must be at least 1, not {getattr(self, key)}")
        if self.common in ("lowest", "highest") and not self.full:
            raise ValueError(f"common={self.common} is a score of the full models: with full=False, give a number")
        if not self.dims or min(self.dims) < 0:
            raise ValueError(f"dims={self.dims} must be numbers of dimensions, 0 or more")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates={self.learning_rates} must be numbers above 0")
        if self.planted_k >= max(self.dims) and self.planted_k:
            raise ValueError(f"planted_k={self.planted_k}: the teacher lies in that many columns of P, so dims must go beyond")
        if self.common not in ("lowest", "highest") and not re.fullmatch(r"-?\d*\.?\d+", self.common):
            raise ValueError(f"common={self.common} must be lowest, highest or a score")
        if self.task == "encoding" and self.rdm == "crossnobis" and self.objective == "rsa" and self.repeats < 2 and self.dataset == "synthetic_brain":
            raise ValueError("rdm=crossnobis needs repeats of the stimuli: give repeats=2 or more")
        self.dims, self.models = sorted(set(self.dims)), list(dict.fromkeys(self.models))


# ---- low-dimensional training: projections

def hadamard(n, like, _made={}):  # noqa: B006 (a cache)
    """Sylvester's Hadamard matrix (n, n), entries ±1, n a power of two."""
    key = (n, like.device, like.dtype)
    if key not in _made:
        h = torch.ones(1, 1, device=like.device, dtype=like.dtype)
        while len(h) < n:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        _made[key] = h
    return _made[key]


def fwht(x, largest=0):
    """Walsh-Hadamard transform along the middle axis of x (K, n, C), unnormalised and symmetric. H of n = a b c ... is the Kronecker product of small
    ones, so each axis of (a, b, c, ...) is multiplied by a small dense matrix: a few passes over memory where a butterfly takes log2 n."""
    K, n, C = x.shape
    largest = largest or (16 if x.device.type == "cpu" else 64)
    bits, most = n.bit_length() - 1, largest.bit_length() - 1
    parts, before = max(1, -(-bits // most)), 1
    for i in range(parts):
        f = 2 ** (bits // parts + (i < bits % parts))
        after = n // before // f * C
        if after == 1:
            x = x.reshape(-1, f) @ hadamard(f, x)
        else:
            x = torch.matmul(hadamard(f, x), x.reshape(K * before, f, after))
        before *= f
    return x.view(K, n, C)


class Projection:
    """P (rows, d), columns of norm `norm`, held in a few tensors: forward(z, out) puts P z of z (K, d) into out (K, rows), transpose(read, K, like) gives
    Pᵀ g (K, d) of g read by read(a, b) → (K, b - a)."""

    def to(self, device):
        def moved(v):
            return v.to(device) if torch.is_tensor(v) else [moved(x) for x in v] if isinstance(v, (list, tuple)) else v
        self.__dict__.update({k: moved(v) for k, v in vars(self).items()})
        return self


class Fastfood(Projection):
    """Rows of P from blocks H G Π H B of n = 2^k >= d rows and columns (Le et al. 2013), divided so that a column of P has norm `norm`. B = ±1; G is
    drawn for each block, normal or, with gaussian=False (SRHT), ±1: the columns are then orthogonal. H B is shared by all blocks, Π by those of
    a chunk: given these, blocks with normal G are still independent and their rows N(0, I), and one of the two transforms is done once and not for
    each block. Blocks lie side by side, (n, C) a chunk, so the small matrix products are wide. Two bytes a row are kept (SRHT: one)."""

    def __init__(self, rows, d, norm, generator, n=0, gaussian=True):
        self.rows, self.d, self.n = rows, d, n or 1 << max(d - 1, 1).bit_length()
        blocks = -(-rows // self.n)
        step = max(1, 2 ** 18 // self.n)  # blocks of a chunk: what fits a cache
        self.sign = torch.randint(0, 2, (self.n,), generator=generator) * 2.0 - 1
        self.chunks = []
        for at in range(0, blocks, step):
            shape = (self.n, min(step, blocks - at))
            if gaussian:
                g = torch.randn(shape, generator=generator)
                g = (g / g.square().mean(0).sqrt()).half()
            else:
                g = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
            self.chunks.append((at * self.n, g, torch.randperm(self.n, generator=generator)))
        self.scale = norm / (self.n * rows) ** 0.5  # ‖H G Π H b‖ = n for b = ±1 in one place and mean G² = 1

    def forward(self, z, out):
        z = z[:, :self.n]
        z = F.pad(z * self.sign[:z.size(1)] * self.scale, (0, self.n - z.size(1)))
        z = fwht(z[:, :, None])  # (K, n, 1)
        for at, g, order in self.chunks:
            x = fwht(z.index_select(1, order) * g).flatten(1)
            end = min(at + x.size(1), self.rows)
            out[:, at:end] = x[:, :end - at]

    def transpose(self, read, K, like):
        total, live = like.new_zeros(K, self.n, 1), min(self.n, self.d)
        for at, g, order in self.chunks:
            end = min(at + g.numel(), self.rows)
            x = read(at, end)
            if x.size(1) < g.numel():
                x = F.pad(x, (0, g.numel() - x.size(1)))
            total.index_add_(1, order, fwht(x.reshape(K, *g.shape)).mul_(g).sum(2, keepdim=True))
        return F.pad((fwht(total)[:, :live, 0] * self.sign[:live]) * self.scale, (0, self.d - live))


class OneHot(Projection):
    """Each row of P is one coordinate of z, as many rows for each as for any other (Uni-LoRA's): Pᵀ P = norm² I exactly, in O(D)."""

    def __init__(self, rows, d, norm, generator):
        self.d = d
        self.index = torch.randperm(rows, generator=generator) % d
        self.weight = norm / torch.bincount(self.index, minlength=d).clamp_min(1).sqrt()  # (d,)

    def forward(self, z, out):
        torch.index_select(z * self.weight, 1, self.index, out=out) if out.is_contiguous() else out.copy_((z * self.weight)[:, self.index])

    def transpose(self, read, K, like):
        return like.new_zeros(K, self.d).index_add_(1, self.index, read(0, len(self.index))) * self.weight


class Dense(Projection):
    """P drawn in full, normal, each column of norm `norm`: the one that costs D x d memory."""

    def __init__(self, rows, d, norm, generator):
        p = torch.stack([torch.randn(rows, generator=generator) for _ in range(d)])  # (d, rows), column by column: a smaller d has the first of them
        self.p = p * (norm / p.norm(dim=1, keepdim=True))

    def forward(self, z, out):
        out.copy_(z @ self.p)

    def transpose(self, read, K, like):
        return read(0, self.p.size(1)) @ self.p.t()


class Sparse(Projection):
    """Each column has about sqrt(D) entries, all ± the same, at random rows (Li et al. 2018)."""

    def __init__(self, rows, d, norm, generator):
        per = max(1, round(rows ** 0.5))
        self.at = torch.randint(0, rows, (d, per), generator=generator)
        self.value = (torch.randint(0, 2, (d, per), generator=generator) * 2 - 1) * norm / per ** 0.5
        self.rows = rows

    def forward(self, z, out):
        out.zero_()
        out.index_add_(1, self.at.flatten(), (z[:, :, None] * self.value).flatten(1))

    def transpose(self, read, K, like):
        return (read(0, self.rows)[:, self.at] * self.value).sum(2)


class Identity(Projection):
    """P = I: all parameters, trained directly."""

    def __init__(self, rows, offset, d):
        self.rows, self.offset, self.d = rows, offset, d

    def forward(self, z, out):
        out.copy_(z[:, self.offset:self.offset + self.rows])

    def transpose(self, read, K, like):
        total = like.new_zeros(K, self.d)
        total[:, self.offset:self.offset + self.rows] = read(0, self.rows)
        return total


class Expand(torch.autograd.Function):
    """theta = theta0 + lambda_g P z as the tensors of the model, views of one flat vector; the gradient is read from the pieces as they come, so beside
    theta and its gradient nothing of size D exists. z (K, d - m), scales (K, m) → tensors (K, ...) in the wrapper's order."""

    @staticmethod
    def forward(ctx, z, scales, w):
        ctx.w = w
        ctx.save_for_backward(z, scales)
        theta = z.new_empty(len(z), w.D)
        for a, b, group, p in w.segments:
            part = theta[:, a:b]
            p.forward(z, part)
            if group < w.m:
                part.mul_(scales[:, group, None])
        theta += w.theta0
        ctx.set_materialize_grads(False)
        return tuple(t.unflatten(1, shape) if shape else t[:, 0] for t, shape in zip(theta.split(w.sizes, 1), w.shapes))

    @staticmethod
    def backward(ctx, *grads):
        w, (z, scales), K = ctx.w, ctx.saved_tensors, len(ctx.saved_tensors[0])
        starts = np.cumsum([0, *w.sizes])

        def read(a, b):
            """Elements a to b of the flat gradient (K, b - a)."""
            pieces, i = [], int(np.searchsorted(starts, a, "right")) - 1
            while a < b:
                end = min(b, int(starts[i + 1]))
                flat = None if grads[i] is None else grads[i].reshape(K, -1)
                pieces.append(z.new_zeros(K, end - a) if flat is None else flat[:, a - starts[i]:end - starts[i]])
                a, i = end, i + 1
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

        dz, dscales = torch.zeros_like(z), torch.zeros_like(scales)
        for a, _, group, p in w.segments:
            back = p.transpose(lambda x, y, a=a: read(a + x, a + y), K, z)  # Pᵀ g of the segment
            back = F.pad(back, (0, z.size(1) - back.size(1))) if back.size(1) < z.size(1) else back
            if group < w.m:
                dscales[:, group] += (z * back).sum(1)
                back = back * scales[:, group, None]
            dz += back
        return dz, dscales, None


class FastfoodWrapper(nn.Module):
    """Any module, trained in d dimensions: theta = theta0 + lambda_g P z. Its own parameters are only z (d - m,) and the m scales, from 0 and 1.

        wrapper = FastfoodWrapper(model, d=500, layer_groups=[["conv1", "bn1"], ["layer1"]])
        wrapper(x).sum().backward();  model.load_state_dict(wrapper.merge())

    The model's code is not touched: its parameters (those that require a gradient, tied ones once) are fed by functional_call, its buffers and its
    train/eval mode stay as they are, whatever .train() says to the wrapper. Afterwards its parameters are views of the one vector theta0, with their values.
    layer_groups: lists of names of modules or parameters, each list with one learned scale, taken out of d (Aghajanyan et al. 2020); what is in no
    list moves with scale 1. projection: fastfood (blocks over all parameters), fastfood_tensor (the published one: a transform for each tensor, which
    crops z for small tensors), srht, onehot, dense, sparse, or identity (d = D). Columns have norm 1. n: rows of a Fastfood block, for nested columns.
    copies: K fits side by side, z (K, d - m), outputs (K, ...), by vmap. Raises ValueError for d that does not fit and for names that are none."""

    def __init__(self, model, d, layer_groups=None, projection="fastfood", seed=0, n=0, copies=0):
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: its parameters are not ours
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [[names] if isinstance(names, str) else list(names) for names in layer_groups or []]
        order = []
        for g, prefixes in enumerate(groups):
            for prefix in prefixes:
                inside = [name for name in named if name == prefix or name.startswith(prefix + ".")]  # layer1 is not layer10
                if not inside:
                    tops = sorted({".".join(name.split(".")[:2]) for name in named})
                    raise ValueError(f"layer_groups: no parameter is called '{prefix}' or lies in it; there are {', '.join(tops)}")
                for name in inside:
                    if any(name == other for other, _ in order):
                        raise ValueError(f"layer_groups: '{name}' is in two groups")
                    order.append((name, g))
        taken = {name for name, _ in order}
        order += [(name, len(groups)) for name in named if name not in taken]
        self.names, self.m, self.projection = [name for name, _ in order], len(groups), projection
        tensors = [named[name] for name in self.names]
        self.shapes, self.sizes = [t.shape for t in tensors], [t.numel() for t in tensors]
        self.D, self.d = sum(self.sizes), d
        if d > self.D:
            raise ValueError(f"d={d} is more than the model's {self.D:,} parameters")
        if d <= self.m:
            raise ValueError(f"d={d} leaves nothing beside the {self.m} scales of layer_groups, which are counted in it: give d > {self.m}")
        with torch.no_grad():
            theta0 = torch.cat([t.detach().reshape(-1) for t in tensors])
        self.register_buffer("theta0", theta0, persistent=False)
        self._point()
        generator, made = torch.Generator().manual_seed(key_seed("P", seed)), {"onehot": OneHot, "dense": Dense, "sparse": Sparse}
        free, self.segments, at, parts = d - self.m, [], 0, [(size, g) for size, (_, g) in zip(self.sizes, order)]
        if projection != "fastfood_tensor":  # one stretch for each group
            parts = [(sum(size for size, h in parts if h == g), g) for g in sorted({g for _, g in parts})]
        for size, g in parts:
            share = (size / self.D) ** 0.5  # of a column's norm, 1
            if projection in ("fastfood", "srht"):
                p = Fastfood(size, free, share, generator, n, projection == "fastfood")
            elif projection == "fastfood_tensor":
                whole = 1 << max(size - 1, 1).bit_length()
                p = Fastfood(size, min(free, whole), 1.0, generator, whole)
            elif projection in made:
                p = made[projection](size, free, share, generator)
            elif projection == "identity":
                p = Identity(size, at, free)
            else:
                raise ValueError(f"projection must be fastfood, fastfood_tensor, srht, onehot, dense, sparse or identity, not '{projection}'")
            self.segments.append((at, at + size, g, p.to(theta0.device)))
            at += size
        self.start(copies)

    def start(self, copies=0, dims=None):
        """Begin anew at theta0, with `copies` fits side by side; dims: each one's d (nested: the first d of the columns)."""
        self.copies, K, free = copies, max(copies, 1), self.d - self.m
        self.z = nn.Parameter(self.theta0.new_zeros((K, free) if copies else (free,)))
        self.scales = nn.Parameter(self.theta0.new_ones((K, self.m) if copies else (self.m,)))
        self.columns = None
        if dims is not None and any(d != self.d for d in dims):
            if min(dims) <= self.m:
                raise ValueError(f"d={min(dims)} leaves nothing beside the {self.m} scales of layer_groups: give d > {self.m}")
            free = torch.tensor([d - self.m for d in dims], device=self.theta0.device)[:, None]
            column = torch.arange(self.z.size(-1), device=self.theta0.device)
            if self.projection == "onehot":  # a coarser tying of the same rows; nested where d divides the largest
                index = column % free  # (K, d_max)
                self.columns = (index, 1 / (column.numel() / free).sqrt().expand_as(index))
            else:
                self.columns = (None, (column < free).to(self.theta0.dtype))
        return self

    def tensors(self):
        """The warped parameters, in the order of self.names; with copies, (K, ...) each."""
        z, scales = (self.z, self.scales) if self.copies else (self.z[None], self.scales[None])
        if self.columns is not None:
            index, weight = self.columns
            z = (z if index is None else z.gather(1, index)) * weight
        out = Expand.apply(z, scales, self)
        return out if self.copies else tuple(t[0] for t in out)

    def call(self, tensors, *args, **kwargs):
        """The model's output with these parameters; tied names follow."""
        if not self.copies:
            return functional_call(self.model, dict(zip(self.names, tensors)), args, kwargs)
        if self.copies == 1:  # no need to batch
            return functional_call(self.model, dict(zip(self.names, (t[0] for t in tensors))), args, kwargs)[None]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
            return vmap(lambda ts: functional_call(self.model, dict(zip(self.names, ts)), args, kwargs))(tuple(tensors))

    def forward(self, *args, **kwargs):
        return self.call(self.tensors(), *args, **kwargs)

    @torch.no_grad()
    def merge(self, copy=0):
        """A plain state_dict of the model with the warp in it (of fit number `copy`)."""
        warped = {name: t[copy] if self.copies else t for name, t in zip(self.names, self.tensors())}
        same = {id(p): warped[name] for name, p in self.model.named_parameters() if name in warped}
        every = {name: same[id(p)] for name, p in self.model.named_parameters(remove_duplicate=False) if id(p) in same}
        return {name: every.get(name, value).detach().clone() for name, value in self.model.state_dict().items()}

    def _point(self):
        """Let the model's parameters be views of theta0 (of its first copy)."""
        named, flat = dict(self.model.named_parameters()), self.theta0 if self.theta0.dim() == 1 else self.theta0[0]
        for name, part, shape in zip(self.names, flat.split(self.sizes), self.shapes):
            named[name].data = part.view(shape)

    def _apply(self, fn, recurse=True):  # .to(device) and the like
        super()._apply(fn, recurse)
        self.model._apply(fn)
        self._point()
        for *_, p in self.segments:
            p.to(self.theta0.device)
        if self.columns is not None:
            self.columns = tuple(None if t is None else t.to(self.theta0.device) for t in self.columns)
        return self


# ---- data

@dataclass
class Study:
    """What candidates are fitted to. kind: text, image or vector; stimuli: texts, paths, or an array (n, features); y: (n, V) mean responses, or (n,)
    classes; rows: {train, val, test: row numbers}; group: (n,) whose members are never split; ceiling: (V,) R² or None; meta: columns of results.csv."""
    kind: str
    stimuli: object
    y: np.ndarray
    rows: dict
    group: np.ndarray
    ceiling: np.ndarray | None
    meta: dict
    labels: list | None = None
    starts: list | None = None             # texts: the character where the stimulus begins, behind what is read with it
    brain_rdm: np.ndarray | None = None    # crossnobis distances of all stimuli
    pair_ceiling: float = 1.0              # rsa, cka: what the brain reaches with itself


def read_study(run, config):
    """The stimuli and responses that config asks for, split and checked."""
    if config.task == "classification":
        return read_classes(run, config)
    if config.task == "simulation":
        return read_functions(config)
    folder = plant(run, config) if config.dataset == "synthetic_brain" else run.dataset(config.dataset)
    data = Encoding(folder)
    keep = np.ones(len(data.units), bool) if not config.roi else (data.units.roi == config.roi).to_numpy()
    if not keep.any():
        raise ValueError(f"{folder} has no units of roi={config.roi}, only of {', '.join(sorted(set(data.units.roi))) or 'no region'}")
    rows = split_rows(config, data.stimuli.group.to_numpy(), data.stimuli.split.to_numpy())
    least = {"train": 20, "val": 8, "test": 8}
    if few := [f"{len(rows[part])} in {part} ({n} are needed)" for part, n in least.items() if len(rows[part]) < n]:
        raise ValueError(f"{folder} has too few stimuli: {', '.join(few)} of {len(data.stimuli)} in {data.stimuli.group.nunique()} groups; "
                         "choose val_share and test_share, or take more stimuli")
    stimulus, y = data.presentations.stimulus.to_numpy(), np.asarray(data.responses)[:, keep].astype(np.float64)
    mean = pd.DataFrame(y).groupby(stimulus).mean().to_numpy()  # (n, V), every stimulus was presented
    own, train = data.units.ceiling.to_numpy()[keep], np.isin(stimulus, rows["train"])
    estimated, chosen = noise_ceiling(y, stimulus), noise_ceiling(y[train], stimulus[train])
    if estimated is not None and np.isnan(own).any():
        own = np.where(np.isnan(own), estimated, own)
    good = ~((own if chosen is None else chosen) <= config.reliable)  # chosen on training stimuli, or as published; unknown ones stay
    if good.sum() < 1:
        raise ValueError(f"{folder}: none of {len(good)} units has a ceiling above reliable={config.reliable} (R², training stimuli): choose a lower one")
    meta = dict(dataset=config.dataset, roi=config.roi or "/".join(sorted(set(data.units.roi[keep]) - {""})) or "all", species=data.meta["species"],
                modality=data.meta["modality"], synthetic=bool(data.meta["synthetic"]))
    stimuli = stimuli_of(data)
    starts = [len(t) - len(piece) if t.endswith(piece) else 0 for t, piece in zip(stimuli, data.stimuli["piece"])] if "piece" in data.stimuli else None
    y, mean = y[:, good], mean[:, good]
    scale = mean[rows["train"]].std(0).mean() or 1.0  # one for all units
    study = Study(data.kind, stimuli, mean / scale, rows, data.stimuli.group.to_numpy(), None if np.isnan(own).any() else own[good], meta, starts=starts)
    if config.objective in ("rsa", "cka"):
        pair_targets(config, study, y, stimulus)
    return study


def stimuli_of(data):
    """Texts, or paths of images, of an Encoding."""
    return data.stimuli.text.tolist() if data.kind == "text" else [data.path / f for f in data.stimuli.file]


def split_rows(config, group, split):
    """{train, val, test: row numbers}: the dataset's own split, or groups dealt by a key of their name."""
    if (split == "").any():
        names = sorted(set(group), key=lambda g: key_seed(config.seed, "split", str(g)))
        test, val = round(config.test_share * len(names)), round(config.val_share * len(names))
        part = {g: "test" if i < test else "val" if i < test + val else "train" for i, g in enumerate(names)}
        split = np.array([part[g] for g in group])
    elif not (split == "val").any():
        names = sorted(set(group[split == "train"]), key=lambda g: key_seed(config.seed, "split", str(g)))
        split = np.where(np.isin(group, names[:round(config.val_share * len(names))]) & (split == "train"), "val", split)
    return {part: np.flatnonzero(split == part) for part in ("train", "val", "test")}


def noise_ceiling(y, stimulus):
    """(V,) highest R² against mean responses, from single ones y (P, V): s² / (s² + n² / R), n² the variance within stimuli, s² what is left of the whole
    variance, R presentations of each. None where no stimulus was repeated."""
    frame = pd.DataFrame(y).groupby(stimulus)
    repeats = frame.size().to_numpy()
    if (repeats > 1).sum() < 3:
        return None
    noise = frame.var(ddof=1).to_numpy()[repeats > 1].mean(0)
    signal = np.maximum(y.var(0, ddof=1) - noise, 0)
    return signal / np.maximum(signal + noise / repeats.mean(), 1e-12)


def pair_targets(config, study, y, stimulus):
    """What rsa and cka need of the brain: crossnobis distances, and how well one half of the repeats agrees with the other."""
    repeats = pd.Series(stimulus).groupby(stimulus).cumcount().to_numpy()
    R = np.bincount(stimulus).min()
    if config.objective == "rsa" and config.rdm == "crossnobis":
        if R < 2:
            raise ValueError("rdm=crossnobis needs every stimulus at least twice: take correlation or euclidean")
        noise = pd.DataFrame(y).groupby(stimulus).var(ddof=1).to_numpy().mean(0) ** 0.5
        parts = torch.as_tensor(np.stack([y[repeats == r][np.argsort(stimulus[repeats == r])] for r in range(R)]) / np.maximum(noise, 1e-12))
        both, own = distances(parts.mean(0), "euclidean") * R ** 2, distances(parts, "euclidean").sum(0)
        study.brain_rdm = ((both - own) / (R * (R - 1))).numpy()  # products of different repeats only: noise has no bias
    if R > 1:
        test = study.rows["test"]
        halves = [torch.as_tensor(pd.DataFrame(y[repeats % 2 == h]).groupby(stimulus[repeats % 2 == h]).mean().to_numpy()[test]) for h in (0, 1)]
        kind = "euclidean" if config.rdm == "crossnobis" else config.rdm
        if config.objective == "cka":
            half = float(cka(gram(halves[0]), gram(halves[1])))
        else:
            a, b = (upper(distances(h, kind)).numpy() for h in halves)
            half = np.corrcoef(*((scipy.stats.rankdata(a), scipy.stats.rankdata(b)) if config.compare == "spearman" else (a, b)))[0, 1]
        study.pair_ceiling = float(np.sqrt(np.clip(2 * half / (1 + half), 1e-6, 1)))


def plant(run, config):
    """The planted brain as a dataset in out_dir/brain: units are random mixtures of the teacher's first components, with noise."""
    folder = run.out / "brain"
    if run.master:
        texts = read_table(run.dataset(config.planted_stimuli) / "stimuli.csv", dtype=str)
        if not {"text", "group"} <= set(texts):
            raise ValueError(f"planted_stimuli={config.planted_stimuli}: stimuli.csv must have the columns text and group")
        study = Study("text", texts.text.tolist(), None, {}, None, None, {})
        reader, inputs, _ = build(run, config, "teacher", study, 0)
        f = features(reader, inputs, range(len(texts)), config.batch_size).double().cpu().numpy()
        u, s, _ = np.linalg.svd(f - f.mean(0), full_matrices=False)
        components = min(config.planted_components, len(s))
        rng = np.random.default_rng(key_seed(config.seed, "brain"))
        signal = (u[:, :components] * s[:components]) @ rng.standard_normal((components, config.planted_units))  # (n, V)
        signal /= signal.std(0)
        noise = (config.repeats * (1 - config.planted_ceiling) / config.planted_ceiling) ** 0.5
        y = np.tile(signal, (config.repeats, 1)) + noise * rng.standard_normal((config.repeats * len(texts), config.planted_units))
        write_encoding(folder, texts[["text", "group"]], y, pd.DataFrame({"stimulus": np.tile(np.arange(len(texts)), config.repeats)}),
                       modality="planted", species="none", synthetic=True, teacher=f"{config.lm} warped by {config.planted_warp} of its norm",
                       source="random mixtures of components of a warped language model, with noise", planted_ceiling=config.planted_ceiling)
    else:
        run.dataset(config.planted_stimuli)
    run.barrier()
    return folder


def read_classes(run, config):
    """Stimuli and their classes: scikit-learn's digits as vectors, arrays x_train, y_train, x_test, y_test of an .npz, images (a prepared dataset, or a
    folder with a folder for each class), or sentences."""
    path, labels, split, synthetic = Path(config.dataset), None, None, False
    if config.dataset == "digits":
        from sklearn.datasets import load_digits
        stimuli, y = load_digits(return_X_y=True)
        kind, stimuli = "vector", stimuli / 16
    elif path.suffix == ".npz":
        if not path.is_file():
            raise FileNotFoundError(f"dataset={path}: there is no such file; give an .npz with x_train, y_train, x_test, y_test")
        with np.load(path, allow_pickle=False) as f:
            if lacks := [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in f]:
                raise ValueError(f"{path} has no array '{lacks[0]}', only {', '.join(f)}")
            stimuli, y = np.concatenate([f["x_train"], f["x_test"]]), np.concatenate([f["y_train"], f["y_test"]])
            split = np.repeat(["train", "test"], [len(f["y_train"]), len(f["y_test"])])
        kind, stimuli = "vector", stimuli.reshape(len(y), -1) / max(float(stimuli.max()), 1e-9)
    elif config.sentences:
        folder = run.dataset(config.dataset)
        table, meta = read_task(folder, config.sentences), read_meta(folder)
        entry = meta["tasks"][config.sentences]
        if entry["kind"] != "classification":
            raise ValueError(f"sentences={config.sentences} is a {entry['kind']}: take a classification")
        kind, stimuli, y, split, labels, synthetic = "text", table.text.tolist(), table.y.to_numpy(), table.split.to_numpy(), entry["labels"], meta["synthetic"]
    elif any((place / name).is_file() for place in (path, HERE / "data" / path) for name in ("meta.yaml", "prepare.py")):
        data = Encoding(run.dataset(config.dataset))  # a response is 1 for the class
        y = np.asarray(data.responses).argmax(1)[np.argsort(data.presentations.stimulus, kind="stable")]
        kind, stimuli, synthetic = data.kind, stimuli_of(data), bool(data.meta["synthetic"])
        labels = data.units["label" if "label" in data.units else "roi"].tolist()
        split = data.stimuli.split.to_numpy() if (data.stimuli.split != "").all() else None
    elif path.is_dir() and (files := sorted(f for f in path.glob("*/*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".webp"))):
        kind, stimuli, y = "image", files, [f.parent.name for f in files]
    else:
        raise FileNotFoundError(f"dataset={config.dataset} is nothing to classify: give digits, an .npz, a folder with a folder of images for each class, or "
                                "sentences=TASK of a dataset of labelled sentences (docstrings with sentences=area, glue with sentences=mrpc)")
    if labels is None:
        labels, y = np.unique(y, return_inverse=True)
    rng = np.random.default_rng(key_seed(config.seed, "classes"))
    kept = np.sort(rng.permutation(len(y))[:config.samples or None])
    stimuli = stimuli[kept].astype(np.float32) if kind == "vector" else [stimuli[i] for i in kept]
    y, split = y[kept], None if split is None else split[kept]
    if split is None:
        split = np.full(len(y), "train", dtype="<U5")
        for c in range(len(labels)):  # the same share of each class
            rows = rng.permutation(np.flatnonzero(y == c))
            test, val = round(config.test_share * len(rows)), round(config.val_share * len(rows))
            split[rows[:test]], split[rows[test:test + val]] = "test", "val"
    rows = split_rows(config, np.arange(len(y)), split)
    if min(map(len, rows.values())) < 2 or len(labels) < 2:
        raise ValueError(f"dataset={config.dataset} has too few stimuli: {len(y)} of {len(labels)} classes, " +
                         ", ".join(f"{len(r)} in {part}" for part, r in rows.items()))
    meta = dict(dataset=f"{config.dataset} {config.sentences}".strip(), roi="", species="", modality="labels", synthetic=synthetic)
    return Study(kind, stimuli, y.astype(np.int64), rows, np.arange(len(y)), None, meta, [str(name) for name in labels])


FUNCTIONS = {"x²": lambda x: x ** 2, "x³": lambda x: x ** 3, "sin(πx/2)": lambda x: np.sin(np.pi * x / 2)}  # candidates of the simulation


def read_functions(config):
    """The simulation: normal x, those of the test sorted, and sin(3πx/4), which candidates are bent into."""
    x = np.random.default_rng(key_seed(config.seed, "x")).standard_normal((4000, 1)).astype(np.float32)
    rows = dict(zip(("train", "val", "test"), np.split(np.arange(4000), [2000, 3000])))
    x[rows["test"]] = np.sort(x[rows["test"]], 0)
    meta = dict(dataset="sin(3πx/4)", roi="", species="", modality="function", synthetic=True)
    return Study("vector", x, np.sin(0.75 * np.pi * x), rows, np.arange(4000), None, meta)


# ---- models

class Found(Exception):
    """Every layer asked for has been seen: the rest of the model need not run."""


class Reader(nn.Module):
    """A model as the features of its stimuli: (B, ...) inputs → (B, p), the chosen layers side by side, each pooled to a vector. Numbers are hidden
    states (Hugging Face's numbering), names are modules. mask (B, T): the tokens that are pooled."""

    def __init__(self, model, layers, pool, text):
        super().__init__()
        self.core, self.layers, self.pool, self.text, self.seen, self.reading = model, layers, pool, text, {}, False
        modules = dict(model.named_modules())
        if isinstance(model, GPT):
            names = [*range(model.config.n_layer + 1), *(f"layer.{i}.{part}" for i in range(model.config.n_layer) for part in ("attn", "mlp"))]
        else:
            depth = getattr(getattr(model, "config", None), "num_hidden_layers", None) or len(getattr(getattr(model, "config", None), "depths", []))
            names = [*range(depth + 1 if depth else 0), *(name for name in modules if name)]
        states = sum(isinstance(n, int) for n in names)
        self.layers = [int(layer) + states * layer.startswith("-") if states and re.fullmatch(r"-?\d+", layer) else layer for layer in layers]
        if wrong := [layer for layer in self.layers if layer not in names]:
            shown = [f"0 to {states - 1}"] * bool(states) + [n for n in names if isinstance(n, str)][:40]
            raise ValueError(f"layers: this {type(model).__name__} has no layer '{wrong[0]}'; there are {', '.join(shown)}")
        if isinstance(model, GPT):
            top = max(int(str(layer).split(".")[1]) + 1 if isinstance(layer, str) else layer for layer in self.layers)
            if top < model.config.n_layer:  # what lies above is not run
                model.transformer.h = model.transformer.h[:top]
                model.transformer.ln_f = nn.Identity()
        else:
            for name in self.layers:
                if isinstance(name, str):
                    modules[name].register_forward_hook(lambda module, args, out, name=name: self.keep(name, out))

    def keep(self, name, out):
        if not self.reading:  # the model runs for somebody else
            return
        self.seen[name] = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", out)
        if all(layer in self.seen for layer in self.layers):
            raise Found

    def forward(self, *inputs):
        ids, mask = inputs[0], inputs[1] if self.text else None
        if isinstance(self.core, GPT):
            states = self.core.trunk(ids, hidden=self.layers)[2]
        else:
            self.seen.clear()
            self.reading = True
            numbers = any(isinstance(layer, int) for layer in self.layers)
            try:
                if self.text and len(inputs) > 2:  # a Hugging Face language model: which tokens it may see
                    out = self.core(input_ids=ids, attention_mask=inputs[2], output_hidden_states=numbers)
                else:
                    out = self.core(ids, output_hidden_states=True) if numbers else self.core(ids)
            except Found:
                out = None
            finally:
                self.reading = False
            states = dict(self.seen) | ({i: h for i, h in enumerate(out.hidden_states)} if numbers else {})
            self.seen.clear()
        return torch.cat([self.pooled(states[layer], mask) for layer in self.layers], -1)

    def pooled(self, x, mask):
        """One vector a stimulus from (B, T, C), (B, C, H, W) or (B, C)."""
        if self.pool == "flatten" or x.dim() == 2:
            return x.flatten(1)
        if x.dim() == 4:
            x, mask = x.flatten(2).transpose(1, 2), None  # (B, H W, C)
        if self.pool == "first":
            return x[:, 0]
        if mask is None:
            return x[:, -1] if self.pool == "last" else x.mean(1)
        mask = mask.to(x.dtype)
        if self.pool == "last":
            mask = (mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


class WithHead(nn.Module):
    """Features and a linear map on them, one model."""

    def __init__(self, reader, weight, bias):
        super().__init__()
        self.reader, self.head = reader, nn.Linear(*weight.shape)
        with torch.no_grad():
            self.head.weight.copy_(weight.t())
            self.head.bias.copy_(bias)

    def forward(self, *inputs):
        return self.head(self.reader(*inputs))


def build(run, config, spec, study, seed):
    """(module, inputs, about): a candidate as features of the study's stimuli (as logits, to classify), what it reads for each of them, and its
    columns of results.csv. seed draws random weights."""
    name, _, end = spec.partition("~")
    away = {"": 0.0, "random": 1.0}.get(end, float(end) if re.fullmatch(r"\d*\.?\d+", end) else np.inf)
    if away > 1:
        raise ValueError(f"models: '{spec}' must end with ~random or ~X, X from 0 to 1, so far towards random weights")
    on_path = re.fullmatch(r"lm@(\d*\.?\d+)", name.replace("teacher", "lm@0"))  # so far from the planted teacher, lm itself being at 1
    about = dict(architecture=name, training_task="untrained" if away == 1 else "unknown", pretraining_data="none" if away == 1 else "unknown")
    generator = torch.Generator().manual_seed(key_seed(config.seed, "model", f"{name}~random", seed))  # one end for all on the way
    if name.startswith("mlp:"):
        if study.kind != "vector" or not re.fullmatch(r"mlp:\d+(,\d+)*", name):
            raise ValueError(f"models: '{spec}' must read mlp:WIDTH and goes with vectors (dataset=digits or an .npz)")
        widths = [int(w) for w in name[4:].split(",")]
        sizes = [study.stimuli.shape[1], *(widths * 2 if len(widths) == 1 else widths), len(study.labels)]
        net = nn.Sequential(*[layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())][:-1])
        for layer in net[::2]:  # He
            nn.init.zeros_(layer.bias)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / layer.in_features) ** 0.5)
        about |= dict(architecture="MLP " + "-".join(map(str, sizes)), training_task="untrained", pretraining_data="none")
        return net.eval().to(run.device), (torch.from_numpy(study.stimuli).to(run.device),), about
    if config.task == "simulation":  # a network that is this function
        if name not in FUNCTIONS:
            raise ValueError(f"models: '{spec}' is no function of the simulation, there are {', '.join(FUNCTIONS)}: start from config/warp_simulation.yaml")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            net = nn.Sequential(nn.Linear(1, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1, bias=False)).to(run.device)
        x, w = torch.from_numpy(study.stimuli).to(run.device), FastfoodWrapper(net, 16_896, None, "identity")
        fit(run, config, w, Objective(config, replace(study, y=FUNCTIONS[name](study.stimuli)), x), (x,), [w.D], [0.05], seed, config.steps)
        net.load_state_dict(w.merge())
        return net, (x,), about | dict(architecture="MLP 1-128-128-1", training_task="regression", pretraining_data=name)
    model, encode, found = load_model(config, config.lm if on_path or name == "lm" else name, study.kind, study.starts)
    about |= {k: v for k, v in found.items() if away < 1 or k == "architecture"}
    pairs = list(zip(model.parameters(), random_twin(model, generator))) if away else []  # before what is not read is cut off
    reader = Reader(model, config.layers, config.pool, study.kind == "text").to(run.device).eval()
    inputs = tuple(t.to(run.device) for t in encode(study.stimuli))
    with torch.enable_grad():  # parameters above the layers that are read are no part of theta
        reader(*(t[:2] for t in inputs)).square().sum().backward()
    for p in reader.parameters():
        p.requires_grad_(p.grad is not None)
        p.grad = None
    if on_path:
        bend(config, reader, 1 - float(on_path[1]))
    with torch.no_grad():
        for p, q in pairs:
            p.lerp_(q.to(p), away)
    if config.task == "classification":
        with torch.no_grad():
            width = reader(*(t[:1] for t in inputs)).size(1)
        reader = WithHead(reader, 0.02 * torch.randn(width, len(study.labels), generator=generator), torch.zeros(len(study.labels))).to(run.device).eval()
    return reader, inputs, about | config.about


def bend(config, reader, share):
    """Move a student this share of the way to the teacher, which is planted_warp of its norm away in a direction that the sweep's P does not know, or
    (planted_k) knows in its first columns."""
    if config.planted_k:
        w = FastfoodWrapper(reader, max(config.dims), groups_of(config, reader), config.projection, (config.seed, 0))
        with torch.no_grad():
            w.z[:config.planted_k] = torch.randn(config.planted_k, generator=torch.Generator().manual_seed(key_seed(config.seed, "teacher"))).to(w.z)
            direction = torch.cat([t.flatten() for t in w.tensors()]) - w.theta0
    else:
        w = FastfoodWrapper(reader, 1, projection="onehot")
        direction = torch.randn(w.D, generator=torch.Generator().manual_seed(key_seed(config.seed, "teacher"))).to(w.theta0)
    w.theta0 += direction * (share * config.planted_warp * w.theta0.norm() / direction.norm())  # the model's parameters are views of it


def random_twin(model, generator):
    """Fresh weights of the same shape, drawn as the model's kind draws them."""
    seed = int(torch.randint(0, 2 ** 31, (1,), generator=generator))
    if isinstance(model, GPT):
        return [p.detach() for p in GPT(model.config, seed=seed).parameters()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(model, "config"):
            return [p.detach() for p in type(model)(model.config).parameters()]
        import copy
        twin = copy.deepcopy(model)
        for module in twin.modules():
            getattr(module, "reset_parameters", lambda: None)()
        return [p.detach() for p in twin.parameters()]


def load_model(config, name, kind, starts=None):
    """(module, encode, about): encode maps texts or image files to a tuple of tensors, a row for each stimulus. starts: where each text's stimulus begins."""
    if ".py:" in name:
        file, _, function = name.partition(":")
        if not Path(file).is_file():
            raise FileNotFoundError(f"models: there is no file {file} (of '{name}')")
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ValueError(f"models: {file} defines no '{function}'")
        made = getattr(module, function)()
        model, encode = made if isinstance(made, tuple) else (made, None)
        if encode is None and kind != "image":
            raise ValueError(f"models: {name} must give (module, encode) for {kind} stimuli, encode a function from a list of them to a tensor")
        return model, as_tuple(encode or images_of(config.image_size), kind), dict(architecture=type(model).__name__)
    if kind == "image":
        from transformers import AutoImageProcessor, AutoModel
        model = hugging_face(AutoModel, name)
        try:
            processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        except (OSError, ValueError, ImportError):
            return model, images_of(config.image_size), about_hugging_face(model, name)
        return model, lambda files: (torch.cat([processor(opened(f), return_tensors="pt")["pixel_values"] for f in files]),), about_hugging_face(model, name)
    try:
        model, tokenizer = load_lm(name)
    except ValueError as e:
        if "only GPT-2 weights" not in str(e) and "variant" not in str(e):
            raise
        from transformers import AutoModel, AutoTokenizer
        model, tokenizer = hugging_face(AutoModel, name), AutoTokenizer.from_pretrained(name)
        return model, lambda texts: other_tokens(tokenizer, texts, starts), about_hugging_face(model, name)
    c, data = model.config, "WebText"
    if (path := next((p for p in (Path(name), Path(name) / "best.pt", Path(name) / "ckpt.pt") if p.is_file()), None)) is not None:
        data = (load_checkpoint(path).get("config") or {}).get("dataset", "unknown")
    about = dict(architecture=f"GPT {c.n_layer}x{c.n_embd}", training_task="language modelling", pretraining_data=str(data))
    return model, lambda texts: our_tokens(tokenizer, texts, c.block_size, starts), about


def hugging_face(Auto, spec):
    try:
        return Auto.from_pretrained(spec)
    except OSError as e:
        raise FileNotFoundError(f"no model '{spec}': it is no folder or file here, and not to be had from the Hugging Face hub "
                                f"({str(e).splitlines()[0][:120]})") from None


def about_hugging_face(model, spec):
    tasks = {"bert": "masked language modelling", "roberta": "masked language modelling", "vit": "image classification", "resnet": "image classification"}
    return dict(architecture=f"{type(model).__name__} {spec}", training_task=tasks.get(model.config.model_type, "unknown"))


def our_tokens(tokenizer, texts, size, starts=None):
    """ids (n, T) behind the end-of-text token, padded on the right where no causal attention looks, and the mask (n, T) of the stimuli's own tokens.
    What is too long loses its beginning."""
    head, rows, first = [tokenizer.eot] if tokenizer.eot is not None else [], [], []
    for i, text in enumerate(texts):
        before, own = ([] if not starts or not starts[i] else tokenizer.encode(text[:starts[i]].rstrip())), tokenizer.encode(text.replace("\t", "\n"))
        cut = max(0, len(own) - (size - len(head)))
        rows.append(head + own[cut:])
        first.append(len(head) + min(max(0, len(before) - cut), len(own) - cut - 1))
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    place = torch.arange(width)
    return ids, (place >= torch.tensor(first)[:, None]) & (place < torch.tensor([len(row) for row in rows])[:, None])


def other_tokens(tokenizer, texts, starts=None):
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    out = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, return_special_tokens_mask=True, return_offsets_mapping=bool(starts))
    mask = out["attention_mask"].bool() & ~out["special_tokens_mask"].bool()
    if starts:
        mask &= out["offset_mapping"][:, :, 1] > torch.tensor(starts)[:, None]  # tokens that end inside the stimulus
    return out["input_ids"], mask, out["attention_mask"]


def opened(file):
    from PIL import Image
    return Image.open(file).convert("RGB")


def images_of(size):
    """Pixels (n, 3, size, size), scaled to [-1, 1]."""
    return lambda files: (torch.stack([torch.from_numpy(np.asarray(opened(f).resize((size, size)), np.float32).transpose(2, 0, 1) / 127.5 - 1)
                                       for f in files]),)


def as_tuple(encode, kind):
    def wrapped(stimuli):
        out = encode(stimuli)
        out = out if isinstance(out, tuple) else (out,)
        return out + (torch.ones(out[0].shape[:2], dtype=torch.bool),) if kind == "text" and len(out) == 1 else out
    return wrapped


def groups_of(config, model):
    """layer_groups as lists of prefixes."""
    if config.layer_groups != "blocks":
        return [[name.strip() for name in part.split(",") if name.strip()] for part in config.layer_groups.split(";") if part.strip()]
    blocks = {}
    for name, p in model.named_parameters():
        if p.requires_grad and (found := re.match(r"(.*?\.\d+)\.", name)):
            blocks.setdefault(found[1], None)
    return [[name] for name in blocks]


@torch.no_grad()
def features(model, inputs, rows, batch_size, batched=False):
    """(n, p) or, of several fits, (K, n, p) of the stimuli in rows, without gradients. model: a module, or a function."""
    rows = torch.as_tensor(np.asarray(rows), device=inputs[0].device)
    return torch.cat([model(*(t[part] for t in inputs)) for part in rows.split(batch_size)], 1 if batched else 0)


# ---- objectives; every function takes leading axes of fits, (K, n, p)

def ridge(x, y, alpha, groups=None):
    """Ridge regression with an intercept from one eigendecomposition of the smaller of the two Gram matrices. x (K, n, p), y (n, V);
    alpha (K, V), or a list to choose from for each unit by the error on left-out groups (closed form; leave-one-out where groups is None).
    Returns (weights (K, p, V), intercept (K, V), alpha (K, V)), in float64."""
    x, y = x.double(), y.double()
    mx, my = x.mean(1, keepdim=True), y.mean(0)
    x, yc = x - mx, (y - my).expand(len(x), -1, -1)
    dual = x.size(1) <= x.size(2)
    lam, q = torch.linalg.eigh(x @ x.mT if dual else x.mT @ x)
    lam = lam.clamp_min(0)
    if isinstance(alpha, (list, tuple)):
        u = q if dual else x @ q / lam.clamp_min(1e-10 * lam.amax(1, keepdim=True)).sqrt()[:, None]  # (K, n, r)
        uty, errors = u.mT @ yc, []
        for a in alpha:
            keep = lam / (lam + a)  # (K, r)
            residual = yc - u @ (keep[:, :, None] * uty)
            errors.append(left_out(residual, u, keep, groups).square().mean(1))
        alpha = torch.tensor(alpha, dtype=x.dtype, device=x.device)[torch.stack(errors).argmin(0)]  # (K, V)
    right = q.mT @ (yc if dual else x.mT @ yc)  # (K, r, V)
    w = q @ (right / (lam[:, :, None] + alpha[:, None]).clamp_min(1e-12))
    w = x.mT @ w if dual else w
    return w, my - (mx @ w)[:, 0], alpha


def left_out(residual, u, keep, groups):
    """Errors (K, n, V) of each stimulus when its group is left out, from the residuals of the fit and its hat matrix u diag(keep) uᵀ + 1/n."""
    n = residual.size(1)
    if groups is None or len(np.unique(groups)) == n:
        return residual / (1 - 1 / n - (u.square() * keep[:, None]).sum(2)).clamp_min(1e-6)[:, :, None]
    number = np.unique(groups, return_inverse=True)[1]
    members = [np.flatnonzero(number == g) for g in range(number.max() + 1)]
    at = torch.tensor([np.pad(m, (0, max(map(len, members)) - len(m)), constant_values=n).tolist() for m in members], device=u.device)  # (G, s), n: none
    hat = F.pad((u * keep[:, None]) @ u.mT + 1 / n, (0, 1, 0, 1))  # a row of zeros for 'none'
    hat[:, n], hat[:, :, n] = 0, 0
    block = torch.eye(at.size(1), device=u.device, dtype=u.dtype) - hat[:, at[:, :, None], at[:, None]]  # (K, G, s, s)
    solved = torch.linalg.solve(block, F.pad(residual, (0, 0, 0, 1))[:, at])  # (K, G, s, V)
    out = residual.new_zeros(residual.size(0), n + 1, residual.size(2))
    out[:, at.flatten()] = solved.flatten(1, 2)
    return out[:, :n]


def gram(x):
    return x @ x.mT


def cka(k, l):
    """Debiased linear CKA (..., ) of Gram matrices k, l (..., n, n), n >= 4 (Song et al. 2012; Nguyen et al. 2021)."""
    n = k.size(-1)

    def zero_diagonal(m):
        return m - torch.diag_embed(torch.diagonal(m, dim1=-2, dim2=-1))

    def hsic(a, b):
        ra, rb = a.sum(-1), b.sum(-1)
        return ((a * b).sum((-2, -1)) + ra.sum(-1) * rb.sum(-1) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ra * rb).sum(-1)) / (n * (n - 3))

    k, l = zero_diagonal(k), zero_diagonal(l)
    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).clamp_min(1e-24).sqrt()


def distances(x, kind):
    """Representational dissimilarities (..., n, n) of x (..., n, p): 1 - correlation, or mean squared difference."""
    if kind == "correlation":
        x = x - x.mean(-1, keepdim=True)
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return 1 - gram(x)
    square = x.square().sum(-1)
    return (square[..., :, None] + square[..., None, :] - 2 * gram(x)) / x.size(-1)


def upper(m):
    """The pairs i < j of (..., n, n): (..., n (n - 1) / 2)."""
    i, j = np.triu_indices(m.shape[-1], 1)
    return m[..., i, j]


def pearson(a, b):
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(1e-12)


def soft_ranks(x, tau=0.05):
    """Differentiable ranks (..., m): 1/2 + the sum over the others of a sigmoid of the difference, in units of tau standard deviations."""
    x = x / (tau * x.detach().std(-1, keepdim=True).clamp_min(1e-12))
    return 0.5 + torch.sigmoid(x[..., :, None] - x[..., None, :]).sum(-1)


class Objective:
    """What is trained and how it is scored, of features (K, n, p) of a candidate whose unwarped features of the training stimuli are f0 (n, p)."""

    def __init__(self, config, study, f0, shuffle=None):
        self.kind = "class" if config.task == "classification" else "mse" if config.objective == "linear_first" or config.task == "simulation" else \
            config.head if config.objective == "linear" else config.objective
        self.config, self.study, device = config, study, f0.device
        train, val = study.rows["train"], study.rows["val"]
        order = np.arange(len(study.y))
        for rows in (train, val) if shuffle is not None else ():  # the responses of other stimuli of the same part; those of the test stay true
            order[rows] = rows[shuffle.permutation(len(rows))]
        self.y = torch.as_tensor(study.y[order], dtype=torch.int64 if self.kind == "class" else torch.float32, device=device)
        self.target = None if study.brain_rdm is None else torch.as_tensor(study.brain_rdm[order][:, order], dtype=torch.float32, device=device)
        groups = study.group[train]
        self.groups = groups if len(set(groups)) < len(groups) else None
        self.alpha = self.basis = None
        if self.kind in ("ridge", "sgd"):
            mean, sd = f0.mean(0), f0.std(0).clamp_min(1e-6)
            self.basis = torch.diag(1 / sd)
            if config.head_dims:
                if config.head_dims > min(f0.shape):
                    raise ValueError(f"head_dims={config.head_dims} is more than {min(f0.shape)}, the components of {len(f0)} stimuli x {f0.size(1)} features")
                self.basis = self.basis @ torch.linalg.svd((f0 - mean) / sd, full_matrices=False)[2][:config.head_dims].t()
            self.mean = mean

    def shown(self, f):
        """Features as the head sees them, (K, n, p')."""
        return (f - self.mean) @ self.basis if self.basis is not None else f

    def solve(self, f, rows, choose=False):
        """The ridge readout of training features f; penalties are chosen anew where asked."""
        with torch.no_grad():
            w, b, alpha = ridge(self.shown(f), self.y[rows], list(self.config.alphas) if choose or self.alpha is None else self.alpha, self.groups)
            self.alpha, self.readout = alpha, (w.float(), b.float())

    def pair_target(self, rows):
        """The brain's distances (n, n), or Gram matrix, of these stimuli."""
        if self.kind == "cka":
            y = self.y[rows].double()
            return gram(y - y.mean(0))
        return self.target[rows][:, rows] if self.target is not None else distances(self.y[rows].double(), self.config.rdm)

    def pair_features(self, f):
        if self.kind == "cka":
            return gram(f - f.mean(-2, keepdim=True))
        return distances(f, "correlation" if self.config.rdm == "correlation" else "euclidean")

    def loss(self, f, rows, head=None):
        """(K,) of features f (K, n, p) of the stimuli in rows. The ridge readout is the best one for f and so counts as a constant: the gradient is that of
        the loss after the fit (envelope theorem)."""
        if self.kind == "class":
            return F.cross_entropy(f.flatten(0, 1), self.y[rows].repeat(len(f)), reduction="none").view(len(f), -1).mean(1)
        if self.kind == "mse":
            return (f - self.y[rows]).square().mean((1, 2))
        if self.kind == "ridge":
            w, b = self.readout
            penalty = (self.alpha[:, None] * w.double().square()).sum((1, 2)).float() / self.y[rows].numel()
            return (self.shown(f) @ w + b[:, None] - self.y[rows]).square().mean((1, 2)) + penalty * len(rows) / len(self.study.rows["train"])
        if self.kind == "sgd":
            return (self.shown(f) @ head[0] + head[1][:, None] - self.y[rows]).square().mean((1, 2))
        m, target = self.pair_features(f), self.pair_target(rows)
        if self.kind == "cka":
            return 1 - cka(m.double(), target).float()
        a, b = upper(m), upper(target).to(m.dtype)
        if self.config.compare == "spearman":
            a, b = soft_ranks(a), torch.as_tensor(scipy.stats.rankdata(b.cpu()), dtype=m.dtype, device=m.device)
        return 1 - pearson(a, b)

    @torch.no_grad()
    def evidence(self, f_train, f, head=None, choose=True):
        """What the score is counted from: predictions (K, n, V), or the model's pairs (K, n, n)."""
        if self.kind in ("class", "mse"):
            return f
        if self.kind == "ridge":
            alpha, readout = self.alpha, getattr(self, "readout", None)
            self.solve(f_train, self.study.rows["train"], choose)
            (w, b), self.alpha, self.readout = self.readout, alpha, readout
            return self.shown(f) @ w + b[:, None]
        if self.kind == "sgd":
            return self.shown(f) @ head[0] + head[1][:, None]
        return self.pair_features(f)

    def truth(self, part):
        """What evidence is compared with: responses (n, V), classes (n,), or the brain's pairs (n, n) of a part of the stimuli."""
        rows = self.study.rows[part]
        return (self.y[rows] if self.kind in ("class", "mse", "ridge", "sgd") else self.pair_target(rows)).cpu().numpy()


def scores(kind, config, evidence, truth, weights=None, ceiling=None):
    """(B,) scores of one fit's evidence under B weightings of the stimuli (B, n): counts of a bootstrap, or 0 and 1 for pairs. Without weights, (1,)."""
    n = len(truth)
    weights = np.ones((1, n)) if weights is None else np.asarray(weights, float)
    if kind == "class":
        return weights @ (evidence.argmax(1) == truth) / weights.sum(1)
    if kind in ("rsa", "cka"):
        found = []
        for w in weights:
            at = np.flatnonzero(w)
            a, b = evidence[np.ix_(at, at)].astype(float), truth[np.ix_(at, at)].astype(float)
            if kind == "cka":
                found.append(float(cka(torch.from_numpy(a), torch.from_numpy(b))))
            else:
                a, b = upper(a), upper(b)
                a, b = (scipy.stats.rankdata(a), scipy.stats.rankdata(b)) if config.compare == "spearman" else (a, b)
                found.append(np.corrcoef(a, b)[0, 1])
        return np.nan_to_num(np.array(found))
    y, w = truth.astype(float), weights / weights.sum(1, keepdims=True)
    zero, one = y.mean(0), np.where(y.std(0) > 0, y.std(0), 1)  # scores have no unit: volts are as good as microvolts
    p, y = (evidence - zero) / one, (y - zero) / one
    my = w @ y
    vy = np.maximum(w @ (y * y) - my ** 2, 1e-12)
    if config.metric == "r2":
        unit = 1 - (w @ (y - p) ** 2) / vy
        return np.median(unit if ceiling is None else unit / np.maximum(ceiling, 1e-6), 1)
    mp = w @ p
    vp = np.maximum(w @ (p * p) - mp ** 2, 0)
    unit = np.where(vp > 1e-10, (w @ (p * y) - mp * my) / np.sqrt(np.maximum(vp, 1e-10) * vy), 0)
    return np.median(unit if ceiling is None else unit / np.sqrt(np.maximum(ceiling, 1e-6)), 1)


def resample(config, study, kind):
    """(draws, n) weightings of the test stimuli, the same for every fit: groups with replacement, or, for pairs (a stimulus beside itself is no pair),
    half of the groups, which varies as much."""
    rng, names = np.random.default_rng(key_seed(config.seed, "bootstrap")), study.group[study.rows["test"]]
    number = np.unique(names, return_inverse=True)[1]
    G = number.max() + 1
    if kind in ("rsa", "cka"):
        chosen = np.zeros((min(config.draws, 300), G))
        for row in chosen:
            row[rng.permutation(G)[:max(G // 2, min(G, 6))]] = 1
    else:
        chosen = rng.multinomial(G, np.full(G, 1 / G), config.draws)
    return chosen[:, number]


def readouts(config, x):
    """Linear regressions of other libraries, for features x (n, p)."""
    from himalaya.ridge import RidgeCV
    from sklearn.cross_decomposition import PLSRegression
    from sklearn.linear_model import LinearRegression
    return dict(ols=LinearRegression(), pls=PLSRegression(min(25, *x.shape), scale=False),
                ridge=RidgeCV(alphas=np.array(config.alphas), cv=5, solver_params=dict(warn=False)))


def with_head(config, study, reader, f0, shuffle=None):
    """linear_first: the reader with a readout fitted once to its features, all of them one model from here on."""
    rows = study.rows["train"]
    y = torch.as_tensor(study.y[rows], dtype=torch.float32, device=f0.device)
    if shuffle is not None:
        y = y[torch.as_tensor(shuffle.permutation(len(rows)), device=f0.device)]
    mean, sd = f0.mean(0), f0.std(0).clamp_min(1e-6)
    z = (f0 - mean) / sd
    if config.head_fit == "ridge":
        groups = study.group[rows]
        w, b, _ = ridge(z[None], y, list(config.alphas), groups if len(set(groups)) < len(groups) else None)
        w, b = w[0].float(), b[0].float()
    elif config.head_fit == "sgd":
        w, b = torch.zeros(z.size(1), y.size(1), device=z.device, requires_grad=True), y.mean(0).clone().requires_grad_()
        adam = torch.optim.Adam([w, b], lr=config.head_lr)
        for _ in range(500):
            adam.zero_grad()
            (z @ w + b - y).square().mean().backward()
            adam.step()
        w, b = w.detach(), b.detach()
    else:
        fitted = readouts(config, z)[config.head_fit].fit(z.cpu().numpy(), y.cpu().numpy())
        b, *w = torch.as_tensor(fitted.predict(np.eye(z.size(1) + 1, z.size(1), -1)), dtype=torch.float32, device=z.device)  # of zeros, of each feature
        w = torch.stack(w) - b
    w = w / sd[:, None]
    return WithHead(reader, w, b - mean @ w).to(f0.device).eval()


# ---- fits

def adam_step(state, grads, step, rates):
    """One step of Adam on tensors (K, ...), each fit at its own rate (K,)."""
    for i, (p, g) in enumerate(zip(state["params"], grads)):
        m, v = state["m"][i], state["v"][i]
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        rate = rates[i].view(-1, *[1] * (p.dim() - 1))
        p.sub_(rate / (1 - 0.9 ** step) * m / ((v / (1 - 0.999 ** step)).sqrt() + 1e-12))


def gradients(wrapper, objective, inputs, rows, params, head, batch_size, solve=None):
    """(loss (K,), gradients of params) on the stimuli in rows: in one pass, or, where they are more than a batch, features first, then dL/d features
    chunk by chunk through the model: exact for any loss of all features. solve(features) comes before the loss."""
    at = torch.as_tensor(rows, device=inputs[0].device)
    tensors = wrapper.tensors()
    if len(rows) <= batch_size:
        f = wrapper.call(tensors, *(t[at] for t in inputs))
        f = f if wrapper.copies else f[None]
        if solve:
            solve(f.detach())
        loss = objective.loss(f, at, head)
        return loss.detach(), torch.autograd.grad(loss.sum(), params, allow_unused=True)
    leaves = [t.detach().requires_grad_() for t in tensors]
    f = features(lambda *x: wrapper.call(leaves, *x), inputs, rows, batch_size, batched=True).requires_grad_()
    if solve:
        solve(f.detach())
    loss = objective.loss(f, at, head)
    df, *of_head = torch.autograd.grad(loss.sum(), [f, *(head or [])])
    done = 0
    for part in at.split(batch_size):
        wrapper.call(leaves, *(t[part] for t in inputs)).backward(df[:, done:done + len(part)])
        done += len(part)
    own = torch.autograd.grad(tensors, params[:2], [t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves], allow_unused=True)
    return loss.detach(), [*own, *of_head]


def fit(run, config, wrapper, objective, inputs, dims, rates, seed, steps):
    """Train len(dims) fits side by side. Returns for each (best validation score, evidence on the test stimuli, its step, [(step, loss, validation)])."""
    study, K, size = objective.study, len(dims), max(1, config.batch_size // len(dims)) if config.exact else config.batch_size
    train, val, test = (study.rows[part] for part in ("train", "val", "test"))
    wrapper.start(K, dims)
    objective.alpha, head, generator = None, None, np.random.default_rng(key_seed(config.seed, "batches", seed))
    params = [wrapper.z, wrapper.scales]
    reach = wrapper.theta0.reshape(-1, wrapper.D).norm(dim=1)  # ||theta0||
    free = torch.tensor(dims, device=run.device).sub(wrapper.m).clamp_min(1)
    rates = torch.tensor(rates, device=run.device)
    speeds = [rates * reach / free.sqrt(), rates]  # Adam moves each coordinate by its rate: sqrt(d) of them by this share of ||theta0||
    if objective.kind == "sgd":
        p = objective.basis.size(1)
        head = [torch.zeros(K, p, study.y.shape[1], device=run.device), objective.y[train].mean(0).expand(K, -1).clone()]
        head = [t.requires_grad_() for t in head]
        params, speeds = params + head, speeds + [torch.full((K,), config.head_lr, device=run.device)] * 2
    state = dict(params=[p.data for p in params], m=[torch.zeros_like(p) for p in params], v=[torch.zeros_like(p) for p in params])
    truth, best, curve = objective.truth("val"), torch.full((K,), -np.inf), []
    kept, at_step, order = [p.detach().clone() for p in params], np.zeros(K, int), []
    spearman = objective.kind == "rsa" and config.compare == "spearman"
    exact = config.exact and not (spearman and len(train) > 64)
    batch = min(config.batch_size, 64) if spearman else config.batch_size

    def forward(rows):
        with torch.no_grad():
            tensors = wrapper.tensors()
        return features(lambda *x: wrapper.call(tensors, *x), inputs, rows, size, batched=True)

    for step in range(steps + 1):
        if step % config.eval_interval == 0 or step == steps:
            f = forward(np.concatenate([train, val]) if objective.kind == "ridge" else val)
            shown = objective.evidence(f[:, :len(train)], f[:, -len(val):], head).cpu().numpy()
            found = torch.tensor([scores(objective.kind, config, e, truth)[0] for e in shown])
            better = found > best
            best = torch.where(better, found, best)
            at_step[better.numpy()] = step
            for old, p in zip(kept, params):
                old[better.to(old.device)] = p.detach()[better.to(old.device)]
        if step == steps:
            if curve:
                curve.append((step, curve[-1][1], best.numpy().copy()))
            break
        if exact:
            rows = train
        else:
            if len(order) < min(batch, len(train)):  # a stimulus is never twice in a batch
                order = generator.permutation(train)
            rows, order = order[:batch], order[batch:]
        solve, choose = None, step % config.eval_interval == 0
        if objective.kind == "ridge" and (choose or step % config.head_every == 0):
            solve = partial(objective.solve, rows=train, choose=choose)
            if not exact:
                solve = solve(forward(train))  # on all of them, now
        loss, grads = gradients(wrapper, objective, inputs, rows, params, head, size, solve)
        if not torch.isfinite(loss).all():
            raise ValueError(f"the loss is not finite at step {step} of d={dims[int((~torch.isfinite(loss)).nonzero()[0])]}: "
                             f"give smaller learning_rates than {config.learning_rates}")
        pace = min(1, (step + 1) / (0.1 * steps)) * 0.5 * (1 + np.cos(np.pi * step / steps))
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
        adam_step(state, grads, step + 1, [s * pace for s in speeds])
        curve.append((step, loss.cpu().numpy(), best.numpy().copy()))
    for p, old in zip(params, kept):
        p.data.copy_(old)
    f = forward(np.concatenate([train, test]) if objective.kind == "ridge" else test)
    shown = objective.evidence(f[:, :len(train)], f[:, -len(test):], None if head is None else [h.detach() for h in head]).cpu().numpy()
    return [(float(best[k]), shown[k], int(at_step[k]), [(s, float(l[k]), float(v[k])) for s, l, v in curve]) for k in range(K)]


def fit_all(run, config, wrapper, objective, inputs, jobs, seed):
    """Every (d, learning rate) of jobs, some side by side; yields (job, result of fit). How many is measured: once for problems of one shape (fit_all.best
    remembers), a few steps alone and in a batch are timed, and the quicker way is taken. A model that cannot be batched is fitted alone."""
    jobs, key = list(jobs), (wrapper.D, wrapper.d, len(inputs[0]), objective.kind, str(run.device))
    most = min(3 if run.device.type == "cpu" else 64, max(1, int(1e8 // wrapper.D)), len(jobs))
    if not config.fits_per_batch and most > 1 and len(jobs) > 2 and key not in fit_all.best:
        took = {}
        for K in (1, most, 1):
            start = time.perf_counter()
            try:
                fit(run, config, wrapper, objective, inputs, [wrapper.d] * K, [1e-6] * K, seed, 2)
            except (RuntimeError, NotImplementedError):  # control flow on values, an operation without a batching rule, too little memory
                if K == 1:
                    raise
                continue
            took[K] = min(took.get(K, np.inf), (time.perf_counter() - start) / K)
        fit_all.best[key] = min(took, key=took.get)
    K = config.fits_per_batch or fit_all.best.get(key, 1)
    for at in range(0, len(jobs), K):
        part = jobs[at:at + K]
        yield from zip(part, fit(run, config, wrapper, objective, inputs, [d for d, _ in part], [rate for _, rate in part], seed, config.steps))


fit_all.best = {}


def evidence_file(run, spec, control, seed, projection, d):
    return run.out / "fits" / run.options_hash(ANALYSIS) / f"{quote(spec, '')}-{control or 'none'}-{seed}-{projection}-{d}.npz"


def sweep(run, config, study, spec, seed, control=""):
    """All d of one candidate and seed: rows of the results table and, in fits/, the evidence that d_warp is bootstrapped from."""
    reader, inputs, about = build(run, config, spec, study, seed)
    f0 = features(reader, inputs, study.rows["train"], config.batch_size)
    shuffle = (lambda: np.random.default_rng(key_seed(config.seed, "shuffle", seed)) if control else None)
    if config.task == "encoding" and config.objective == "linear_first":
        reader = with_head(config, study, reader, f0, shuffle())
    objective = Objective(config, study, f0, shuffle())
    kind, truth, d_max = objective.kind, objective.truth("test"), max(config.dims)
    weights = resample(config, study, kind)
    D = sum(p.numel() for p in reader.parameters() if p.requires_grad)
    if kind in ("rsa", "cka", "class") or study.ceiling is None:
        ceiling = study.pair_ceiling
    else:
        ceiling = float(np.median(study.ceiling ** (0.5 if config.metric == "r" else 1)))

    def record(d, projection):
        """The row of a fit, from its file."""
        with np.load(evidence_file(run, spec, control, seed, projection, d)) as f:
            shown, val, step, rate = f["evidence"], float(f["validation"]), int(f["step"]), float(f["rate"])
        score = partial(scores, kind, config)
        value, (low, high) = score(shown, truth)[0], np.quantile(score(shown, truth, weights), [0.025, 0.975])
        rng = np.random.default_rng(key_seed(config.seed, "chance"))
        if kind == "class":
            chance = np.bincount(truth).max() / len(truth)
        elif kind in ("rsa", "cka"):
            chance = np.mean([score(shown[np.ix_(o, o)], truth)[0] for o in (rng.permutation(len(truth)) for _ in range(20))])
        else:
            chance = 0.0 if config.metric == "r2" else np.mean([score(rng.permutation(shown), truth)[0] for _ in range(50)])
        by_unit = study.ceiling if kind not in ("rsa", "cka", "class") else None
        run.result(value, chance, low, high, len(truth), measure="score", model=spec, **about, layer="+".join(config.layers), **study.meta,
                   objective=config.objective if config.task == "encoding" else config.task, projection=projection, d=D if d == "full" else d,
                   D=D, seed=seed, control=control or "none", ceiling=ceiling, validation=val, learning_rate=rate, step=step,
                   normalised=value / ceiling if by_unit is None else score(shown, truth, None, by_unit)[0])

    def keep(d, projection, val, shown, step, curve, rate):
        file = evidence_file(run, spec, control, seed, projection, d)
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside(file) as f:
            np.savez(f, evidence=shown.astype(np.float32), truth=truth, curve=np.array(curve), validation=val, step=step, rate=rate)
        record(d, projection)

    rows = run.rows()
    rows = rows[(rows.model == spec) & (rows.control == (control or "none")) & (rows.seed == seed) & (rows.measure == "score")] if len(rows) else rows
    have = {("full" if p == "identity" else d, p) for d, p in zip(rows.d, rows.projection)} if len(rows) else set()
    todo = []
    for d, projection in [(d, config.projection) for d in config.dims] + [("full", "identity")] * (config.full and not control):
        if not evidence_file(run, spec, control, seed, projection, d).exists():
            todo.append(d)
        elif (d, projection) not in have:
            record(d, projection)
    jobs = [(d, rate) for d in todo if d not in (0, "full") for rate in config.learning_rates]
    bar = run.progress(len(jobs) + ("full" in todo) * len(config.learning_rates), desc=f"{spec} {control} seed {seed}")
    if jobs or 0 in todo:
        wrapper = FastfoodWrapper(reader, max(d_max, 1), groups_of(config, reader) if d_max else None, config.projection, (config.seed, seed))
        if wrong := [d for d in config.dims if 0 < d <= wrapper.m]:
            raise ValueError(f"dims: d={wrong[0]} leaves nothing beside the {wrapper.m} scales of layer_groups={config.layer_groups}: leave it out")
    if 0 in todo:  # no warp: the readout alone
        val, shown, step, curve = fit(run, config, wrapper, objective, inputs, [wrapper.d], [0.0], seed, config.steps if kind == "sgd" else 0)[0]
        keep(0, config.projection, val, shown, step, curve or [(0, 0, val)], 0.0)
    found = []
    for (d, rate), result in fit_all(run, config, wrapper, objective, inputs, jobs, seed) if jobs else ():
        found.append((*result, rate))
        if len(found) == len(config.learning_rates):  # the learning rate by validation
            keep(d, config.projection, *max(found, key=lambda r: r[0]))
            found = []
        bar.update()
    if "full" in todo:
        wrapper = FastfoodWrapper(reader, D, None, "identity")
        for rate in config.learning_rates:
            found.append((*fit(run, config, wrapper, objective, inputs, [D], [rate], seed, config.steps)[0], rate))
            bar.update()
        keep("full", "identity", *max(found, key=lambda r: r[0]))
    bar.close()


def baselines(run, config, study, spec):
    """OLS, himalaya's ridge and PLS on the unwarped features of one candidate: what other tools make of d = 0."""
    reader, inputs, about = build(run, config, spec, study, 0)
    train, test = study.rows["train"], study.rows["test"]
    f, fitted = (features(reader, inputs, rows, config.batch_size).double().cpu().numpy() for rows in (test, train))
    mean, sd, weights, truth = fitted.mean(0), np.maximum(fitted.std(0, ddof=1), 1e-6), resample(config, study, "ridge"), study.y[test]
    for name, model in readouts(config, fitted).items():
        shown = model.fit((fitted - mean) / sd, study.y[train]).predict((f - mean) / sd)
        value, (low, high) = scores("ridge", config, shown, truth)[0], np.quantile(scores("ridge", config, shown, truth, weights), [0.025, 0.975])
        run.result(value, 0.0, low, high, len(truth), measure="baseline", model=spec, **about, layer="+".join(config.layers), **study.meta,
                   objective=name, d=0, D=0, seed=0, control="none", projection="none")
        run.print(f"{spec}: {name} on all unwarped features: {config.metric} {value:.3f} [{low:.3f}, {high:.3f}]")


# ---- d_warp

def crossing(dims, y, level):
    """The least d at which the isotonic curve through scores y over log10(1 + d) reaches level, interpolated; inf where none does."""
    fitted, x = isotonic_regression(y), np.log10(1 + np.asarray(dims, float))
    if not (fitted >= level).any():
        return np.inf
    i = int(np.argmax(fitted >= level))
    if i == 0:
        return float(dims[0])
    t = (level - fitted[i - 1]) / (fitted[i] - fitted[i - 1])
    return float(10 ** (x[i - 1] + t * (x[i] - x[i - 1])) - 1)


def measure_d_warp(dims, point, drawn, full, full_drawn, config, seed_draws):
    """{model: dict} of d_warp, absolute and relative, with draws, from point {model: (S, nd)}, drawn {model: (S, nd, B)}, full {model: (S,)} and
    full_drawn {model: (S, B)}; seed_draws (B, S): the seeds of each draw. The level of `absolute` is the same for all models, in each draw too."""
    B, models = len(seed_draws), list(point)
    mean = {m: point[m].mean(0) for m in models}
    boot = {m: np.stack([drawn[m][seed_draws[b], :, b].mean(0) for b in range(B)]) for m in models}  # (B, nd)
    whole = {m: full[m].mean() for m in full}
    whole_boot = {m: np.array([full_drawn[m][seed_draws[b], b].mean() for b in range(B)]) for m in full}
    if config.common in ("lowest", "highest"):
        which = min(whole, key=whole.get) if config.common == "lowest" else max(whole, key=whole.get)
        level, levels = config.common_share * whole[which], config.common_share * whole_boot[which]
    else:
        level, levels = float(config.common), np.full(B, float(config.common))
    x, found = np.log10(1 + np.asarray(dims, float)), {}
    for m in models:
        f = found[m] = dict(mean=mean[m], boot=boot[m], level=level, full=whole.get(m))
        f["absolute"] = crossing(dims, mean[m], level)
        f["absolute draws"] = np.array([crossing(dims, boot[m][b], levels[b]) for b in range(B)])
        if m in whole:
            f["relative"], *draws = (crossing(dims, y, (start := y[0] if dims[0] == 0 else 0) + config.reach * (w - start))
                                     for y, w in zip([mean[m], *boot[m]], [whole[m], *whole_boot[m]]))
            f["relative draws"] = np.array(draws)
        width = max(x[-1] - x[0], 1e-9)
        f["auc"], f["auc draws"] = np.trapezoid(mean[m], x) / width, np.trapezoid(boot[m], x, axis=1) / width
        if len(point[m]) > 1 and len(dims) > 2:
            f["p"] = scipy.stats.page_trend_test(point[m], predicted_ranks=range(1, len(dims) + 1)).pvalue
        else:
            f["p"] = scipy.stats.kendalltau(dims, mean[m], alternative="greater").pvalue if len(dims) > 1 else 1.0
    return found


def interval(draws):
    """The middle 95 %, infinities included."""
    return tuple(np.quantile(draws, q, method="inverted_cdf") for q in (0.025, 0.975))


def report(run, config, study):
    """d_warp of every candidate from the evidence of all fits: rows, table and figures."""
    kind = "class" if config.task == "classification" else config.objective if config.objective in ("rsa", "cka") else "ridge"
    weights, last = resample(config, study, kind), max(config.dims)
    B, rng = len(weights), np.random.default_rng(key_seed(config.seed, "seeds"))

    def load(spec, control, d, projection):
        """(S,) scores and (S, B) draws over the seeds, and the first one's training curve."""
        point, drawn, curves = [], [], []
        for seed in range(config.seeds):
            with np.load(evidence_file(run, spec, control, seed, projection, d)) as f:
                point.append(scores(kind, config, f["evidence"], f["truth"])[0])
                drawn.append(scores(kind, config, f["evidence"], f["truth"], weights))
                curves.append(f["curve"])
        return np.array(point), np.stack(drawn), curves[0]

    point, drawn, full, full_drawn, training = {}, {}, {}, {}, {}
    for spec, control in candidates(config):
        name = spec + f" ({control} responses)" * bool(control)
        points, draws, curves = zip(*(load(spec, control, d, config.projection) for d in config.dims))
        point[name], drawn[name], training[name] = np.stack(points, 1), np.stack(draws, 1), dict(zip(config.dims, curves))
        if config.full and not control:
            full[name], full_drawn[name], training[name]["full"] = load(spec, control, "full", "identity")
    found = measure_d_warp(config.dims, point, drawn, full, full_drawn, config, rng.integers(0, config.seeds, (B, config.seeds)))

    shared = dict(study.meta, objective=config.objective if config.task == "encoding" else config.task, projection=config.projection, d=0, seed=-1,
                  layer="+".join(config.layers))
    run.print(f"d_warp: least d for a score of {next(iter(found.values()))['level']:.3f} (absolute), or {config.reach:.0%} of the way from "
              f"{'d = 0' if config.dims[0] == 0 else 'a score of 0'} to all (relative); 95 % over draws of P and test stimuli")
    for name, f in found.items():
        row, words = partial(run.result, model=name, control="shuffled" if "(shuffled" in name else "none", **shared), f"{name}: d_warp"
        for which in ("absolute", "relative"):
            if which in f:
                value, ends = f[which], interval(f[f"{which} draws"])
                row(min(value, last), last, *np.minimum(ends, last), B, measure=f"d_warp {which}", state="censored" if np.isinf(value) else "reached")
                words += f" {which} {said(value, last)} [{said(ends[0], last)}, {said(ends[1], last)}]"
        row(f["auc"], f["mean"][0], *interval(f["auc draws"]), B, measure="area under the curve")
        row(f["p"], 0.05, 0, 1, config.seeds * len(config.dims), measure="p of a rising curve")
        run.print(words + f"; score {f['mean'][0]:.3f} at d = {config.dims[0]}, {f['mean'][-1]:.3f} at {last}" +
                  (f", {f['full']:.3f} in full" if f["full"] is not None else "") + f"; area {f['auc']:.3f}; rising with d: p = {f['p']:.2g}")
    for a, b in itertools.combinations([name for name in found if "(shuffled" not in name], 2):
        value, delta = (np.subtract(*(np.log10(1 + np.minimum(found[m][key], last)) for m in (b, a))) for key in ("absolute", "absolute draws"))
        low, high = np.quantile(delta, [0.025, 0.975])
        run.result(value, 0.0, low, high, B, measure="difference of log10(1 + d_warp)", model=f"{b} - {a}", **shared)
        run.print(f"    {b} needs {10 ** value:.2g} [{10 ** low:.2g}, {10 ** high:.2g}] times the d of {a} (1 + d_warp, cut at {last}, paired)")
    about = f"{study.meta['dataset']}{', synthetic' if study.meta['synthetic'] else ''}; {config.projection}, layer {'+'.join(config.layers)}"
    unit = dict({"class": "accuracy"}, ridge=("r" if config.metric == "r" else "R²") + ", median of units").get(kind, kind)
    plot_curves(run.out / "curves.png", config, found, point, about, unit)
    plot_training(run.out / "training.png", training, about, unit)
    if config.task == "simulation":
        plot_simulation(run, config, study.stimuli[study.rows["test"], 0], study.y[study.rows["test"]])


def said(d, last):
    return f"> {last:,}" if np.isinf(d) else f"{d:,.0f}" if d >= 9.95 or d == 0 else f"{d:.1f}"


def candidates(config):
    """(spec, control) of every row of the figure."""
    return [(spec, "") for spec in config.models] + ([(config.models[0], "shuffled")] if config.shuffled and config.task == "encoding" else [])


# ---- plots

def save(fig, path, dpi=130):
    """Write a figure aside, then in place, and close it."""
    with aside(path) as f:
        fig.savefig(f, dpi=dpi, format="png")
    plt.close(fig)


def plot_curves(path, config, found, point, about, unit):
    """Score over d with its isotonic fit and the score of the full model; d_warp with its interval, against the score at the first d."""
    x, last, level = np.log10(1 + np.array(config.dims)), np.log10(1 + max(config.dims)), next(iter(found.values()))["level"]
    labels, end = [f"{d:,}" for d in config.dims], last + 0.08 * max(last, 1)
    fig, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5), layout="constrained", width_ratios=[1.3, 1])
    for i, (name, f) in enumerate(found.items()):
        if "(shuffled" in name:  # far below: a line of words keeps the scale for the others
            left.plot([], [], color="0.6", lw=2, label=f"{name}: {f['mean'][0]:.2f} to {f['mean'][-1]:.2f}, off the scale")
            continue
        colour, rising = plt.cm.viridis(0.9 * i / max(1, len(config.models) - 1)), isotonic_regression(f["mean"])
        left.fill_between(x, *np.quantile(f["boot"], [0.025, 0.975], axis=0), color=colour, alpha=0.13, lw=0)
        left.plot(x, rising, color=colour, lw=2, label=f"{name}, rising: p = {f['p']:.1g}")
        left.plot(np.broadcast_to(x, point[name].shape), point[name], ".", color=colour, ms=4, alpha=0.6)
        if f["full"] is not None:
            left.plot([last, end], [rising[-1], f["full"]], ":D", color=colour, lw=1, ms=6, markevery=[1])
        low, here, high = (min(np.log10(1 + v), last) for v in (interval(f["absolute draws"])[0], f["absolute"], interval(f["absolute draws"])[1]))
        if np.isfinite(f["absolute"]):
            left.plot([here], [level], "v", color=colour, ms=9, mec="white", zorder=5, clip_on=False)
        right.plot([f["mean"][0]] * 2, [low, high], color=colour, lw=3, alpha=0.5, solid_capstyle="round")
        right.plot([f["mean"][0]], [here], "^" if np.isinf(f["absolute"]) else "o", color=colour, ms=9)
        above = sorted(found, key=lambda m: found[m]["mean"][0]).index(name) % 2  # neighbours do not write over each other
        right.annotate(f"{name}: {said(f['absolute'], max(config.dims))}", (f["mean"][0], here), xytext=(8, 4 if above else -12), textcoords="offset points",
                       fontsize=8)
    left.axhline(level, ls="--", c="0.5", lw=1)
    left.text(end, level, f"{level:.2f}", va="bottom", ha="right", fontsize=8, color="0.4")
    left.set_xticks([*x, end], [*labels, "all"], fontsize=8)
    left.set(xlabel="dimensions of the warp, d", ylabel=f"test score ({unit})")
    left.set_title("score over d: isotonic fit, draws of P, 95 % band; ▾ d_warp", fontsize=10)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    right.set_yticks(x, labels, fontsize=8)
    right.set(xlabel=f"score at d = {config.dims[0]} ({unit})", ylabel="d_warp")
    right.margins(0.22, 0.08)
    right.set_title("d_warp, absolute, with 95 % interval, against the " + ("linear" if config.dims[0] == 0 else "first") + " score", fontsize=10)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(about, fontsize=10)
    save(fig, path)


def plot_training(path, training, about, unit):
    """Best validation score over steps, a line for each d, a panel for each candidate (first seed)."""
    fig, axes = plt.subplots(1, len(training), figsize=(3.4 * len(training), 3.4), squeeze=False, sharey=True, layout="constrained")
    for ax, (name, curves) in zip(axes[0], training.items()):
        for i, (d, curve) in enumerate(curves.items()):
            colour = "black" if d == "full" else plt.cm.plasma(0.9 * i / max(1, len(curves) - 1))
            ax.plot(curve[:, 0], curve[:, 2], color=colour, lw=1.3, ls="--" if d == "full" else "-", marker="." if len(curve) == 1 else None,
                    label=f"d = {d}" if d != "full" else "all parameters")
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"best validation score ({unit})", fontsize=8)
    axes[0, -1].legend(fontsize=7, frameon=False)
    fig.suptitle(f"training curves, first seed; {about}", fontsize=9)
    save(fig, path)


def plot_simulation(run, config, x, target):
    """The target, each candidate (a row) and what a warp of d dimensions (a column) makes of it, as the document has it; the first draw."""
    dims = [d for d in config.dims if d]
    fig, axes = plt.subplots(len(config.models), len(dims), figsize=(2.1 * len(dims), 2.2 * len(config.models)), sharex=True, sharey=True,
                             layout="constrained", squeeze=False)

    def answers(spec, d):
        with np.load(evidence_file(run, spec, "", 0, config.projection, d)) as f:
            return f["evidence"][:, 0]

    for (i, j), ax in np.ndenumerate(axes):
        spec, warped = config.models[i], answers(config.models[i], dims[j])
        ax.plot(x, target, color="tab:blue", lw=2.5, alpha=0.8, label="target")
        if 0 in config.dims:
            ax.plot(x, answers(spec, 0), color="tab:orange", lw=1.5, label="candidate")
        ax.plot(x, warped, "--", color="tab:green", lw=1.8, label="warped")
        ax.text(0.03, 0.93, f"R² {scores('mse', config, warped[:, None], target)[0]:.2f}", transform=ax.transAxes, fontsize=8, va="top")
        ax.spines[["top", "right"]].set_visible(False)
        ax.set(xlim=(-1, 1), ylim=(-1.6, 1.6), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        ax.set(title="" if i else f"d = {dims[j]}", ylabel="" if j else f"candidate {spec}")
    axes[-1, -1].legend(fontsize=7, frameon=False, loc="lower right")
    fig.suptitle(f"three candidates, one target, growing d: network 1-128-128-1, D = 16,896, {config.projection}; synthetic", fontsize=11)
    save(fig, run.out / "simulation.png")


def files_of(lm):
    """(name, size, time of change) of a language model's files: trained again, it is another one."""
    found = sorted(p for p in ([Path(lm)] if Path(lm).is_file() else Path(lm).glob("*")) if p.suffix in (".pt", ".safetensors"))
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found]


def main(config):
    run = Run(config)
    study = read_study(run, config)
    run.content = hashlib.sha256(study.y.tobytes() + repr(files_of(config.lm)).encode()).hexdigest()[:6]  # other responses or weights: other fits
    run.print(f"{study.meta['dataset']}: " + ", ".join(f"{len(rows)} {part}" for part, rows in study.rows.items()) + " stimuli, " +
              (f"{len(study.labels)} classes" if study.labels else f"{study.y.shape[1]} units") +
              (f", ceiling R² {np.median(study.ceiling):.2f} (median)" if study.ceiling is not None else ""))
    jobs = [(spec, seed, control) for seed in range(config.seeds) for spec, control in candidates(config)]
    for spec, seed, control in run.share(jobs):
        sweep(run, config, study, spec, seed, control)
    table = run.merge()
    expected = sum(len(config.dims) + (config.full and not control) for _, control in candidates(config)) * config.seeds
    if (have := int((table.measure == "score").sum())) < expected:
        run.print(f"{have} of {expected} fits are done; the figures come with the last of them: run the same command again")
        return run.close()
    if run.master:
        if config.baselines and config.task == "encoding" and (table.measure == "baseline").sum() < 3 * len(config.models):
            for spec in config.models:
                baselines(run, config, study, spec)
        report(run, config, study)
    run.merge()
    run.print(f"figures and results.csv in {run.out}")
    run.close()


if __name__ == "__main__":
    main(configure(Config))
