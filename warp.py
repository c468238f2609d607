"""Measure d_warp: the fewest dimensions in which a model must be warped to match a brain.

    python warp.py                                # embedded: candidates at known distances, offline
    python warp.py config/warp_planted.yaml planted_warp=0.5  # brains planted nearer or further
    python warp.py config/warp_words_brains.yaml  # linear scores of words in brains, with p
    python warp.py config/warp_tuckute.yaml models=gpt2,gpt2-medium layers=6
    python warp.py head=ols head_dims=0 dims=0 full=False  # a linear encoder alone: ols, pls, ridge
    torchrun --standalone --nproc_per_node=4 warp.py ...  # ranks share the fits

A stopped run continues where it was. warp_intrinsic.py measures d for small networks.

All parameters of a network move along theta = theta0 + lambda_g P z, where P is a fixed random
D x d matrix that is never formed. Only z and one scale for each group of layers are trained. A
ridge readout is solved in closed form in every step, so d = 0 is ridge regression. objective=rsa
and cka need no readout; linear_first fits it once and then warps it along with the model.

Li et al. 2018 and Aghajanyan et al. 2020 (intrinsic dimension); Le et al. 2013 (Fastfood);
Golub & Pereyra 1973 (variable projection).
"""

import copy
import hashlib
import itertools
import re
import zipfile
from collections import OrderedDict
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from typing import Literal
from urllib.parse import quote

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.linalg
import scipy.stats
import torch
from sklearn.cross_decomposition import PLSRegression
from sklearn.isotonic import isotonic_regression
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configurator import (
    Run,
    check_keys,
    configure,
    hash_code,
    hash_options,
    key_seed,
    load_function,
)
from convert import HiddenStates, from_hub, load_weights
from data import InputError, aside, files_state, path_state, read_table, write_aside
from data.stimuli import Encoding, to_number, write_encoding
from model import check_choice

Projection = Literal["fastfood", "fastfood_tensor", "dense"]  # see FastfoodWrapper
# options that change a fit only through its Cell: changing one keeps all other fits
ANALYSIS = "models dataset subject seeds dims full learning_rates common common_share reach draws"
ANALYSIS += " shuffled shuffles"
ALL = np.inf  # number of dimensions that stands for all parameters, trained directly
PLANTED_UNITS = 64  # of the planted brain: random mixtures of
PLANTED_COMPONENTS = 8  # this many principal components of the teacher's features
HEAD_RATE = 3e-3  # learning rate of head=sgd
HEAD_STEPS = 500  # of head=sgd, before any warp
CHUNK = 2**18  # parameters that one Fastfood chunk makes: fits into a CPU's cache
FACTOR_BITS = 6  # the Walsh-Hadamard transform multiplies by dense 64 x 64 factors
PARTS = ["train", "val", "test"]

# candidates of the embedded run, on the line through lm and the planted teacher; random weights
SHORT_NAMES = {
    "teacher": {"toward": "teacher"},
    "halfway": {"toward": "teacher", "share": 0.5},
    "lm": {},
    "twice as far": {"toward": "teacher", "share": -1.0},
    "random": {"toward": "random"},
}


def default(*values):
    """Return the default of an option that is a list."""
    return field(default_factory=partial(list, values))


@dataclass
class Config:
    # ---- data
    dataset: list[str] = default("synthetic_brain")  # stimuli with responses
    subject: str = ""  # units of this person only; each: one study per person; "": all units
    roi: str = ""  # units of this region only
    reliable: float = 0.05  # leave out units whose ceiling (R2) is not above this
    n_folds: int = 0  # folds that test each group once; 0: the dataset's own split or test_share
    val_share: float = 0.2  # of the groups; they choose penalties, learning rates and steps
    test_share: float = 0.25  # of the groups
    # ---- the planted brain (dataset=synthetic_brain)
    planted_stimuli: str = "synthetic_brain"  # folder with stimuli.csv (text, group)
    planted_warp: float = 1.0  # teacher = lm + this times ||theta0|| in a random direction
    planted_ceiling: float = 0.8  # R2 that the teacher itself reaches against mean responses
    repeats: int = 3  # presentations of each stimulus
    # ---- candidates
    lm: str = "out/train"  # the language model called 'lm' below
    # run folders, Hugging Face models, my_file.py:constructor, SHORT_NAMES or Candidate's fields
    models: list[dict | str] = default(*SHORT_NAMES)
    layers: list[str] = default("1")  # hidden states, or names of modules
    pool: Literal["mean", "last", "first", "flatten"] = "mean"  # over a stimulus' tokens or pixels
    # ---- objective
    objective: str = "linear"  # a name in OBJECTIVES: linear, linear_first, rsa, cka
    metric: Literal["r", "r2"] = "r"  # of linear objectives: median over units
    head: str = "ridge"  # how the readout is fitted, a name in HEADS: ridge, ols, pls, sgd
    head_dims: int = 8  # principal components of its features that a readout sees; 0: all features
    # ridge penalties; validation chooses one for each unit
    alphas: list[float] = default(*np.logspace(-1, 6, 15).tolist())
    rdm: Literal["correlation", "euclidean"] = "correlation"  # distances of rsa
    exact: bool = True  # gradients from all training stimuli; False: from batches
    # ---- warping
    dims: list[int] = default(0, 32, 256, 2048)  # d, including the scales
    full: bool = True  # also train all D parameters directly
    projection: Projection = "fastfood"
    layer_groups: str = ""  # one learned scale each: a,b;c (names of modules) or 'blocks'
    seeds: int = 6  # draws of P (and of random weights)
    steps: int = 20  # of Adam; the best by validation is kept
    learning_rates: list[float] = default(0.04, 0.16)  # of ||theta0||
    eval_interval: int = 10  # steps between validations
    batch_size: int = 512  # stimuli per forward pass
    # ---- d_warp and controls
    # absolute d_warp: all models must reach common_share times the lowest or highest full score,
    common: str = "highest"  # or times this number
    common_share: float = 0.95
    reach: float = 0.9  # relative d_warp: each model must reach s0 + this times (full - s0)
    draws: int = 1000  # bootstrap over seeds and test stimuli (groups)
    shuffles: int = 1000  # null at d = 0: responses shuffled and refitted (ridge), or predictions
    shuffled: bool = True  # also warp the first candidate to match shuffled responses
    # ---- run
    out_dir: str = "out/warp"  # results.csv, table.csv and figures
    seed: int = 1337  # splits, planted brain, draws
    device: str = "auto"  # cuda, mps, cpu
    dtype: Literal["float32"] = "float32"  # half precision would round a small warp away

    POSITIVE = "seeds steps eval_interval batch_size draws repeats models layers alphas dataset"
    POSITIVE += " dims learning_rates common_share reach planted_ceiling shuffles"
    SHARES = "reliable val_share test_share planted_ceiling"
    RENAMED = {"head_fit": "head"}

    def check(self):
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("head", self.head, HEADS)
        if self.n_folds and objective_class(self).pairs:
            problem = "pairs of stimuli must be in one split"
            raise InputError(f"objective={self.objective} with n_folds: {problem}, give n_folds=0")
        check_dims(self)
        make_candidates(self)


def check_dims(config):
    """Sort dims; raise InputError for impossible dims, learning rates or common score."""
    config.dims = sorted(set(config.dims))
    if config.dims[0] < 0 or min(config.learning_rates) <= 0:
        raise InputError("dims must be 0 or more, and learning_rates above 0")
    from_full = config.common in ("lowest", "highest") and (config.full or config.dims == [0])
    if not from_full and np.isnan(to_number(config.common)):
        allowed = "a score (with full=False), lowest or highest"
        raise InputError(f"common={config.common} must be {allowed}")


@dataclass(frozen=True)
class Candidate:
    """A model to compare: which one, which layers, and how far it is moved before the first fit."""

    name: str
    model: str = "lm"  # lm, a run folder, a Hugging Face model, my_file.py:constructor
    layers: tuple = ()  # default: the option `layers`
    toward: str = ""  # teacher (of the planted brain) or random (new weights)
    share: float = 1.0  # of the way there; below 0: away from it
    state: str = ""  # hash of its files at the start, so that a retrained model is fitted anew


def make_candidates(config):
    """Return the Candidates that the option `models` lists. Raises InputError."""
    candidates = []
    for fields in config.models:
        if isinstance(fields, str):
            fields = {"name": fields, **SHORT_NAMES.get(fields, {"model": fields})}
        check_keys(fields, ["name", "model", "layers", "toward", "share"], "models")
        layers = np.ravel(fields.get("layers", config.layers))  # a list, or a single one
        model = fields.get("model", "lm")
        state = path_state(config.lm if model == "lm" else model)
        fields = {"name": model, **fields, "layers": tuple(map(str, layers)), "state": state}
        candidate = Candidate(**fields)
        if candidate.toward not in ("", "teacher", "random"):
            toward = f"toward teacher or random, not '{candidate.toward}'"
            raise InputError(f"models: '{candidate.name}' must go {toward}")
        if candidate.name in [earlier.name for earlier in candidates]:
            raise InputError(f"models: two are called '{candidate.name}': give each a name")
        if ".py:" in candidate.model:
            load_function(candidate.model, "models")  # fails early; hash_code then counts the file
        candidates.append(candidate)
    return candidates


# ---- low-dimensional training


@cache
def hadamard(n, device, dtype):
    """Return Sylvester's Hadamard matrix (n, n), entries ±1; n is a power of two."""
    return torch.tensor(scipy.linalg.hadamard(n), device=device, dtype=dtype)


def walsh_hadamard(x):
    """Walsh-Hadamard transform of the columns of x (n, C), unnormalised; n is a power of two.

    H of n = a b c ... is a Kronecker product, so each axis of (a, b, c, ...) is multiplied by a
    small dense matrix: a few passes over memory where a butterfly takes log2 n.
    """
    n, C = x.shape
    bits = n.bit_length() - 1
    before = 1
    for part in np.array_split(np.arange(bits), max(1, -(-bits // FACTOR_BITS))):
        factor = 2 ** len(part)
        x = hadamard(factor, x.device, x.dtype) @ x.reshape(before, factor, -1)
        before *= factor
    return x.reshape(n, C)


def power_of_two(n):
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


class Fastfood:
    """Rows of P (rows, n) from blocks H G Π H B (Le et al. 2013), columns of norm `norm`.

    B = ±1, G is normal, Π a permutation. Blocks share H B, and the blocks of a chunk share Π; their
    own G makes them independent all the same. Keeps four bytes per row.
    """

    def __init__(self, rows, n, norm, generator, device):
        scale = norm / (n * rows) ** 0.5  # ||H G Π H e|| = n where the mean of G² is 1
        sign = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
        self.sign = (sign * scale).to(device)
        self.chunks = []
        n_blocks = -(-rows // n)
        step = max(1, CHUNK // n)
        for first in range(0, n_blocks, step):
            g = torch.randn(n, min(step, n_blocks - first), generator=generator)
            g = g / g.square().mean(0).sqrt()
            order = torch.randperm(n, generator=generator)
            self.chunks.append((g.to(device), order.to(device)))

    def forward(self, z, out):
        """Write P z into out (rows,). Coordinates of z beyond n are cut off."""
        n = len(self.sign)
        x = F.pad(z[:n], (0, max(0, n - len(z)))) * self.sign
        x = walsh_hadamard(x[:, None])
        start = 0
        for g, order in self.chunks:
            part = walsh_hadamard(x[order] * g).flatten()[: len(out) - start]
            out[start : start + len(part)] = part
            start += len(part)

    def transpose(self, grad, total):
        """Add P' grad to total (d,); grad (rows,)."""
        x = grad.new_zeros(len(self.sign), 1)
        start = 0
        for g, order in self.chunks:
            part = grad[start : start + g.numel()]
            start += len(part)
            part = F.pad(part, (0, g.numel() - len(part)))
            part = walsh_hadamard(part.view(g.shape)).mul_(g).sum(1, keepdim=True)
            x.index_add_(0, order, part)
        x = walsh_hadamard(x)[:, 0] * self.sign
        total[: len(x)] += x[: len(total)]


class Dense:
    """P (rows, n), normal and drawn in full: takes D x d memory."""

    def __init__(self, rows, n, norm, generator, device):
        self.p = torch.empty(n, rows)
        for column in self.p:  # one at a time, so that a smaller n gets the first of them
            column.normal_(generator=generator)
        self.p = (self.p * norm / self.p.norm(dim=1, keepdim=True)).to(device)

    def forward(self, z, out):
        out.copy_(z @ self.p[: len(z)])

    def transpose(self, grad, total):
        total += self.p[: len(total)] @ grad


class Identity:
    """All parameters, trained directly."""

    def forward(self, z, out):
        out.copy_(z)

    def transpose(self, grad, total):
        total += grad


class Warp(torch.autograd.Function):
    """theta0 + P z, bundle by bundle: keeps nothing of size D but theta itself.

    Takes z (m + 1, d - m), a row for each group of layers and one for the rest; returns the warped
    tensors. Plain operations take 3.9 times the weights above inference (GPT-2 124M), this 2.4.
    """

    @staticmethod
    def forward(ctx, z, wrapper):
        ctx.wrapper = wrapper
        ctx.shape = z.shape
        tensors = []
        for bundle, P, group in wrapper.parts:
            sizes = [p.numel() for p in bundle.values()]
            out = z.new_empty(sum(sizes))
            P.forward(z[group], out)
            for p, move in zip(bundle.values(), out.split(sizes)):
                tensors.append(move.view(p.shape).add_(p.detach()))
        return tuple(tensors)

    @staticmethod
    def backward(ctx, *grads):
        dz = grads[0].new_zeros(ctx.shape)
        grads = iter(grads)
        for bundle, P, group in ctx.wrapper.parts:
            P.transpose(torch.cat([next(grads).flatten() for _ in bundle]), dz[group])
        return dz, None


class FastfoodWrapper(nn.Module):
    """Train any module in d dimensions: theta = theta0 + lambda_g P z.

        wrapper = FastfoodWrapper(model, d=500, layer_groups=[["conv1", "bn1"], ["layer1"]])
        wrapper(x).sum().backward()
        model.load_state_dict(wrapper.merge())

    Its parameters are z (d - m,), from 0, and the m scales, from 1. It warps the model's parameters
    that require a gradient (tied ones once) by functional_call; buffers and the train/eval mode do
    not change. Move the model to its device first.

    layer_groups: lists of names of modules or parameters, each with one learned scale that counts
    in d (Aghajanyan et al. 2020); all others have scale 1. projection: fastfood, blocks as large as
    d, columns of norm 1 over all parameters; fastfood_tensor, the published one, a transform per
    tensor, which crops z for small tensors; dense; identity.
    """

    def __init__(self, model, d=None, layer_groups=None, projection="fastfood", seed=0):
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: its parameters are not the wrapper's
        self.originals = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.D = sum(p.numel() for p in self.originals.values())
        self.m = len(layer_groups or [])
        d = self.D if d is None else d
        if d > self.D or not self.D:
            raise InputError(f"d={d} needs more than the model's {self.D:,} parameters")
        self.parts = []  # ({name: original}, projection, number of the group or -1) of each bundle
        for bundle, group in make_bundles(self.originals, layer_groups or [], projection):
            first, *_ = bundle
            generator = torch.Generator().manual_seed(key_seed("P", seed, first))
            size = sum(p.numel() for p in bundle.values())
            norm = (size / self.D) ** 0.5  # its share of a column's norm, 1
            device = bundle[first].device
            if projection == "fastfood":
                P = Fastfood(size, power_of_two(d), norm, generator, device)
            elif projection == "fastfood_tensor":
                P = Fastfood(size, power_of_two(size), 1.0, generator, device)
            elif projection == "dense":
                P = Dense(size, d - self.m, norm, generator, device)
            elif projection == "identity":
                P = Identity()
            else:
                raise InputError(f"unknown projection={projection}")
            self.parts.append((bundle, P, group))
        self.norm = float(nn.utils.get_total_norm(self.originals.values()))  # ||theta0||
        self.start(d)

    def start(self, d):
        """Return to theta0, now with d dimensions: the first columns of P."""
        if d <= self.m:
            raise InputError(f"d={d} must be above the {self.m} scales of layer_groups, part of it")
        like = next(iter(self.originals.values()))
        self.d = d
        self.z = nn.Parameter(torch.zeros(d - self.m, device=like.device, dtype=like.dtype))
        self.scales = nn.Parameter(torch.ones(self.m, device=like.device, dtype=like.dtype))
        return self

    def tensors(self):
        """Return {name: warped parameter}."""
        scales = torch.cat([self.scales, self.scales.new_ones(1)])  # 1: what is in no group
        z = scales[:, None] * self.z  # lambda_g P z = P lambda_g z
        return dict(zip(self.originals, Warp.apply(z, self)))

    def call(self, tensors, *args, **kwargs):
        """Return the model's output with these parameters; tied names follow."""
        return functional_call(self.model, tensors, args, kwargs)

    def forward(self, *args, **kwargs):
        return self.call(self.tensors(), *args, **kwargs)

    @torch.no_grad()
    def merge(self):
        """Return the warped model as a plain state_dict."""
        warped = {id(self.originals[name]): tensor for name, tensor in self.tensors().items()}
        state = self.model.state_dict(keep_vars=True)
        return {name: warped.get(id(p), p).detach().clone() for name, p in state.items()}


def make_bundles(originals, layer_groups, projection):
    """Return [({name: parameter}, number of its group or -1)], bundles that share a projection.

    They hold up to CHUNK parameters of a group: few transforms instead of many small ones.
    """
    limit = {"identity": 2**62, "fastfood_tensor": 0}.get(projection, CHUNK)
    group_of = find_groups(originals, layer_groups)
    bundles = []
    size = np.inf
    for name, p in originals.items():
        group = group_of.get(name, -1)
        size += p.numel()
        if size > limit or group != bundles[-1][1]:
            bundles.append(({}, group))
            size = p.numel()
        bundles[-1][0][name] = p
    return bundles


def find_groups(names, layer_groups):
    """Return {parameter name: number of its group}; layer1 does not match layer10."""
    group_of = {}
    for number, prefixes in enumerate(layer_groups):
        for prefix in prefixes:
            matches = [name for name in names if f"{name}.".startswith(f"{prefix}.")]
            if not matches:
                tops = ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))
                raise InputError(f"layer_groups: nothing is called '{prefix}', only {tops}")
            for name in matches:
                if name in group_of:
                    raise InputError(f"layer_groups: '{name}' is in two groups")
                group_of[name] = number
    return group_of


# ---- data


@dataclass
class Study:
    """Stimuli with the responses of one brain."""

    name: str
    kind: str  # text or image
    stimuli: list  # texts, or paths of images
    pieces: list | None = None  # of texts that begin with context: the stimulus at their end
    objective: type | None = None  # a subclass of Objective
    y: np.ndarray | None = None  # (n, V) mean responses
    group: np.ndarray | None = None  # (n,) groups are never split
    folds: list | None = None  # {train, val, test: row numbers} of each fold
    meta: dict = field(default_factory=dict)  # columns of results.csv
    ceiling: float = np.nan  # of the score

    @property
    def tested(self):
        """Rows of the test stimuli, fold after fold."""
        return np.concatenate([fold["test"] for fold in self.folds])

    @cached_property
    def content(self):
        """Hash of stimuli, responses and folds: a change in any of them makes all fits anew."""
        folds = pd.DataFrame(self.folds).map(list).to_dict("records")
        stimuli = list(self.stimuli)
        if self.kind == "image":
            stimuli = [stimuli, files_state(stimuli)]
        text = str([stimuli, self.pieces, folds])
        return hashlib.sha256(self.y.tobytes() + text.encode()).hexdigest()[:8]

    def shuffled(self, number):
        """Return the study with shuffled responses, the same permutation for all; 0: unshuffled."""
        if not number:
            return self
        rng = np.random.default_rng(key_seed("shuffle", int(number)))
        return replace(self, y=self.y[rng.permutation(len(self.y))])


def read_studies(run, config, name):
    """Return the Studies of a dataset, split and checked: one, or one for each person."""
    data = Encoding(plant(run, config) if name == "synthetic_brain" else run.dataset(name))
    if config.n_folds and config.reliable:
        run.print(f"{name}: n_folds tests all stimuli, so reliable= uses published ceilings only")
    people = [config.subject]
    if config.subject == "each":
        people = [person for person in data.units["subject"].unique() if person] or [""]
    studies = []
    for person in people:
        study = read_brain(config, name, data, person)
        studies.append(study)
        n_units = data.select_units(person, config.roi).sum()
        n_out = n_units - study.y.shape[1]
        if n_out:
            run.print(f"{study.name}: {n_out} of {n_units} units left out, constant or unreliable")
    return studies


def read_brain(config, name, data, person):
    """Return the Study of one person, or of everybody: units chosen, repeats averaged, split."""
    group = data.stimuli["group"].to_numpy()
    folds = make_folds(config, group, data.stimuli["split"].to_numpy())
    sizes = pd.DataFrame(folds).map(len).min()
    if sizes["train"] < 20 or sizes.min() < 5:
        raise InputError(
            f"{data.path} has too few stimuli or groups: {sizes.tolist()} in train, val and test, "
            "but 20, 5 and 5 are needed; change val_share, test_share or n_folds, or add stimuli"
        )
    units, ceiling = choose_units(config, data, person, folds)
    y = data.mean_responses(units)
    y = y / (y[folds[0]["train"]].std(0).mean() or 1.0)  # one scale for all units
    if config.objective == "rsa" and config.rdm == "correlation" and y.shape[1] < 3:
        raise InputError(f"{data.path}: rdm=correlation needs 3 units or more: give rdm=euclidean")
    regions = sorted(set(data.units["roi"][units]) - {""})
    meta = {"dataset": name, "subject": person or "all", "roi": "/".join(regions[:6]) or "all"}
    meta |= {key: data.meta[key] for key in ("species", "modality", "synthetic")}
    objective = objective_class(config)
    if objective.pairs:
        ceiling = np.nan
    elif config.metric == "r":
        ceiling **= 0.5
    pieces = data.stimuli["piece"].tolist() if "piece" in data.stimuli else None
    brain = {"y": y, "group": group, "folds": folds, "meta": meta, "ceiling": ceiling}
    return Study(f"{name} {person}".strip(), data.kind, data.inputs(), pieces, objective, **brain)


def choose_units(config, data, person, folds):
    """Return ((V,) bool, reliable units of a person and region; their median ceiling or 1).

    Units are chosen by published ceilings and by stimuli that are not tested.
    """
    units = data.select_units(person, config.roi)
    stimulus = data.presentations["stimulus"].to_numpy()
    responses = np.asarray(data.responses)[:, units].astype(np.float64)
    published = data.units["ceiling"].to_numpy()[units]
    good = ~(published <= config.reliable) & (np.ptp(responses, axis=0) > 0)
    untested = ~np.isin(stimulus, np.concatenate([fold["test"] for fold in folds]))
    if untested.any():
        good &= ~(noise_ceiling(responses[untested], stimulus[untested]) <= config.reliable)
    if not good.any():
        wanted = f"varies and has a ceiling (R2, training stimuli) above {config.reliable}"
        raise InputError(f"{data.path}: none of {len(good)} units {wanted}: lower reliable=")
    units[units] = good
    ceiling = np.where(np.isnan(published), noise_ceiling(responses, stimulus), published)[good]
    if np.isnan(ceiling).any():
        return units, 1.0
    return units, float(np.median(ceiling))


def make_folds(config, group, split):
    """Return [{train, val, test: rows}]: n_folds that test every group once, or one split.

    The latter is the dataset's own, if it has one. Groups are ordered by a hash of their names.
    """
    names = np.array(sorted(set(map(str, group)), key=partial(key_seed, config.seed, "split")))
    n_val = round(config.val_share * len(names))
    splits = []
    if config.n_folds or (split == "").any():
        tested = [names[: round(config.test_share * len(names))]]
        if config.n_folds:
            tested = np.array_split(names, config.n_folds)
        for test in tested:
            names = np.roll(names, -len(test))  # the groups after the tested ones validate
            split = np.where(np.isin(group, names[:n_val]), "val", "train")
            splits.append(np.where(np.isin(group, test), "test", split))
    elif (split == "val").any():
        splits.append(split)
    else:
        names = names[np.isin(names, group[split == "train"])]
        val = np.isin(group, names[: round(config.val_share * len(names))])
        splits.append(np.where(val & (split == "train"), "val", split))
    folds = []
    for split in splits:
        folds.append({part: np.flatnonzero(split == part) for part in PARTS})
    return folds


def noise_ceiling(y, stimulus):
    """Return (V,) the highest R2 against mean responses, from single ones y (P, V).

    s² / (s² + n² / R): n² is the variance within stimuli, s² the rest, R repeats; NaN without them.
    """
    by_stimulus = pd.DataFrame(y).groupby(stimulus)
    repeats = by_stimulus.size().to_numpy()
    if (repeats > 1).sum() < 3:
        return np.full(y.shape[1], np.nan)
    noise = by_stimulus.var(ddof=1).to_numpy()[repeats > 1].mean(0)
    signal = np.maximum(y.var(0, ddof=1) - noise, 0)
    return signal / np.maximum(signal + noise / repeats.mean(), 1e-12)


def plant(run, config):
    """Write the planted brain, noisy mixtures of a teacher's features, and return its folder."""
    folder = run.out / "brain"
    source = run.dataset(config.planted_stimuli) / "stimuli.csv"
    if run.master:
        texts = read_table(source, ["text", "group"], dtype=str)
        teacher = Candidate("teacher", toward="teacher", layers=tuple(config.layers))
        study = Study("", "text", texts["text"].tolist())
        f = load_candidate(run, config, study, teacher, 0).features.double().cpu().numpy()
        u, s, _ = np.linalg.svd(f - f.mean(0), full_matrices=False)
        components = u[:, :PLANTED_COMPONENTS] * s[:PLANTED_COMPONENTS]
        rng = np.random.default_rng(key_seed(config.seed, "brain"))
        signal = components @ rng.standard_normal((components.shape[1], PLANTED_UNITS))
        signal = np.tile(signal / signal.std(0), (config.repeats, 1))
        sd = (config.repeats * (1 - config.planted_ceiling) / config.planted_ceiling) ** 0.5
        signal += sd * rng.standard_normal(signal.shape)
        presentations = pd.DataFrame({"stimulus": np.tile(np.arange(len(texts)), config.repeats)})
        source = f"mixtures of components of {config.lm}, warped by {config.planted_warp}; noise"
        about = {"modality": "planted", "species": "none", "synthetic": True, "source": source}
        write_encoding(folder, texts[["text", "group"]], signal, presentations, **about)
    run.barrier()
    return folder


# ---- models


@dataclass
class Loaded:
    """A candidate, ready for its fits."""

    reader: nn.Module  # inputs -> features (B, p), or logits
    inputs: torch.Tensor  # a row for each stimulus
    features: torch.Tensor  # (n, p) of all stimuli, before any warp


def pool_states(x, inside, how):
    """Pool states (B, T, C), (B, C, H, W) or (B, C) to (B, p); inside (B, T): which tokens."""
    if how == "flatten" or x.dim() == 2:
        return x.flatten(1)
    if x.dim() == 4:
        x = x.flatten(2).mT  # (B, H W, C)
    if inside is None:
        inside = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    number = inside.cumsum(1) * inside  # 1 for a stimulus' first token
    if how == "first":
        inside = number == 1
    if how == "last":
        inside = number == number.amax(1, keepdim=True)
    weight = inside.to(x.dtype)[:, :, None]
    return (x * weight).sum(1) / weight.sum(1)


class TextReader(nn.Module):
    """A language model as features of texts: the chosen layers side by side, pooled."""

    def __init__(self, lm, layers, pool):
        super().__init__()
        self.core = lm.model
        self.lm = lm
        try:
            self.layers = lm.layers([int(layer) for layer in layers])
        except ValueError as error:
            raise InputError(f"layers={','.join(layers)}: {error}") from None
        self.pool = pool

    def forward(self, inputs):
        """(B, 3, T), as `encode` returns it, -> (B, p)."""
        width = int(inputs[:, 1].sum(1).max())  # padding is on the right
        ids, real, inside = inputs[:, :, :width].unbind(1)
        states = self.lm.states(ids, real.bool(), self.layers)
        return torch.cat([pool_states(states[i], inside > 0, self.pool) for i in self.layers], -1)

    def encode(self, texts, pieces):
        """Return inputs (n, 3, T) and how many texts were too long: these lose their beginning.

        Inputs are the ids, 1 where there is no padding, and 1 in the stimuli themselves: `pieces`,
        with which the texts end, or all of the texts where pieces is None.
        """
        rows = []
        masks = []
        n_cut = 0
        for text, piece in zip(texts, pieces or texts):
            n_cut += self.lm.encode([text])[1]
            while self.lm.encode([text])[1]:
                text = text[1 + len(text) // 10 :]
            rows += self.lm.encode([text])[0]
            spans = np.array(self.lm.offsets(text))
            start = len(text) - len(piece) if text.endswith(piece) else 0
            inside = (spans[:, 1] > start) & (spans[:, 1] > spans[:, 0])  # special ones are empty
            if not inside.any():
                inside[-1] = True
            masks.append(torch.from_numpy(inside))
        ids, real = self.lm.pad(rows)
        inside = nn.utils.rnn.pad_sequence(masks, batch_first=True)
        return torch.stack([ids, real.to(ids), inside.to(ids)], 1), n_cut


class ModuleReader(nn.Module):
    """Any other model as features: the outputs of its modules `layers`, side by side, pooled."""

    def __init__(self, model, layers, pool):
        super().__init__()
        self.core = model
        self.layers = layers
        self.pool = pool
        self.states = {}
        modules = dict(model.named_modules())
        for layer in layers:
            if layer not in modules:
                names = ", ".join(list(modules)[1:40])
                raise InputError(f"layers: this model has no layer '{layer}', only {names}")
            modules[layer].register_forward_hook(partial(self.keep, layer))

    def keep(self, layer, module, inputs, output):
        if isinstance(output, tuple):
            output = output[0]
        self.states[layer] = getattr(output, "last_hidden_state", output)

    def forward(self, x):
        self.core(x)
        pooled = []
        for layer in self.layers:
            if layer not in self.states:
                raise InputError(f"layers: the model does not use '{layer}' in its forward pass")
            pooled.append(pool_states(self.states.pop(layer), None, self.pool))
        return torch.cat(pooled, -1).float()


def load_candidate(run, config, study, candidate, weights):
    """Return the Loaded candidate for a study's stimuli; weights: which draw of random ones."""
    load = load_module
    if study.kind == "text" and ".py:" not in candidate.model:
        load = load_language_model
        if config.pool == "flatten":
            raise InputError("pool=flatten is for images: texts have different lengths")
    seed = key_seed(config.seed, "model", candidate.model, weights)
    reader, inputs = load(run, config, study, candidate, seed)
    # parameters above the layers that are read change no feature and are no part of theta
    reader.eval().requires_grad_(True)
    total = reader(inputs[:2]).square().sum()
    if total.requires_grad:  # not of a model without parameters
        total.backward()
    for p in reader.parameters():
        p.requires_grad_(p.grad is not None)
        p.grad = None
    if candidate.toward == "teacher":
        move_toward_teacher(config, reader, candidate.share)
    bar = run.progress(len(inputs), desc=f"{candidate.name} reads")
    features = read_features(reader, inputs, range(len(inputs)), config.batch_size, bar)
    if not features.isfinite().all():
        raise InputError(f"models: some features of '{candidate.name}' are NaN or infinite")
    return Loaded(reader, inputs, features)


def load_language_model(run, config, study, candidate, seed):
    """Return (reader, inputs) of a language model: ours, or any that transformers loads."""
    spec = config.lm if candidate.model == "lm" else candidate.model
    lm = HiddenStates(spec, device=run.device)
    with suppress(InputError):  # a tokenizer without a first token
        lm.write_first_token()
    if candidate.toward == "random":
        blend(lm.model, lm.random_twin(seed).model, candidate.share)
    reader = TextReader(lm, candidate.layers, config.pool)
    inputs, n_cut = reader.encode(study.stimuli, study.pieces)
    if n_cut:
        texts = f"{n_cut} of {len(inputs)} texts exceed its {lm.max_length} tokens"
        run.print(f"{candidate.name}: {texts} and lose their beginning")
    return reader, inputs


def load_module(run, config, study, candidate, seed):
    """Return (reader, inputs) of my_file.py:constructor or a vision model of transformers."""
    if candidate.model == "lm":
        raise InputError(f"models: '{candidate.name}' is a language model and reads no images")
    if ".py:" in candidate.model:
        pair = load_function(candidate.model, "models")()
        if not isinstance(pair, tuple):
            what = f"encode turning a list of {study.kind}s (images: their paths) into a tensor"
            raise InputError(f"models: {candidate.model} must return (module, encode), {what}")
        model, encode = pair
    else:
        from PIL import Image
        from transformers import AutoImageProcessor, AutoModel

        model = load_weights(AutoModel, candidate.model)
        processor = from_hub(AutoImageProcessor, candidate.model)

        def encode(files):
            images = [Image.open(file).convert("RGB") for file in files]
            return processor(images, return_tensors="pt")["pixel_values"]

    if candidate.toward == "random":
        torch.manual_seed(seed)
        if not hasattr(model, "config"):
            raise InputError(f"models: {candidate.model} must draw its random weights itself")
        blend(model, type(model)(model.config), candidate.share)
    inputs = torch.as_tensor(encode(study.stimuli))
    if inputs.shape[:1] != (len(study.stimuli),):
        shape = f"{tuple(inputs.shape)} for {len(study.stimuli)} stimuli"
        raise InputError(f"models: encode of {candidate.model} returns {shape}: return a row each")
    reader = ModuleReader(model, candidate.layers, config.pool).to(run.device)
    return reader, inputs.to(run.device)


@torch.no_grad()
def move_toward_teacher(config, reader, share):
    """Move a student this share of the way to its teacher, planted_warp of its norm away."""
    parameters = [p for p in reader.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(key_seed(config.seed, "teacher"))
    directions = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    norm = nn.utils.parameters_to_vector(parameters).norm()
    length = nn.utils.parameters_to_vector(directions).norm()
    for p, direction in zip(parameters, directions):
        p += direction * (share * config.planted_warp * norm / length)


@torch.no_grad()
def blend(model, target, share):
    """Move a model's parameters this share of the way to those of another."""
    for p, q in zip(model.parameters(), target.parameters()):
        p.lerp_(q.to(p), share)


def split_groups(config, model):
    """Return the option layer_groups as lists of names; 'blocks': each repeated block is one."""
    if config.layer_groups != "blocks":
        return [part.split(",") for part in config.layer_groups.split(";") if part]
    blocks = {}
    for name, p in model.named_parameters():
        block = re.match(r"(.+?\.)??\d+(?=\.|$)", name)
        if p.requires_grad and block:
            blocks[block[0]] = [block[0]]
    return list(blocks.values())


@torch.no_grad()
def read_features(model, inputs, rows, batch_size, bar=None):
    """Return (n, p) features of the stimuli in rows; model: a module or a function."""
    features = []
    for batch in torch.as_tensor(rows, device=inputs.device).split(batch_size):
        features.append(model(inputs[batch]))
        if bar is not None:
            bar.update(len(batch))
    return torch.cat(features)


# ---- objectives: what is trained, and how it is scored


class Objective:
    """What is trained and scored. By default the model's outputs, (n, V), are the predictions.

    To add one, subclass this for predictions or RSA for pairs of stimuli, and name it in
    OBJECTIVES. f: features (n, p), or whatever the model returns; rows: the stimuli's numbers.
    """

    pairs = False  # predict and truth are (n, n), stimulus by stimulus: no n_folds, no ceiling
    parameters = ()  # trained along with the warp

    def __init__(self, config, study, fold, f0):
        """f0: features of the training stimuli before any warp."""
        self.config = config
        self.study = study
        self.fold = fold
        self.y = torch.as_tensor(study.y, device=f0.device)
        if self.y.is_floating_point():
            self.y = self.y.float()

    def fit(self, f_train, f_val):
        """Choose what validation decides; called at every validation."""

    def loss(self, f, rows):
        return F.mse_loss(self.predict(f), self.y[rows])

    def predict(self, f):
        """Return what is compared with the truth: a row for each stimulus; with pairs (n, n)."""
        return f

    @classmethod
    def truth(cls, config, study, rows):
        """Return what predictions are scored against: responses (n, V), or with pairs (n, n)."""
        return study.y[rows]

    @classmethod
    def score(cls, config, predicted, truth, weights):
        """Return (B,) scores under weights (B, n) of the stimuli, with pairs 0 and 1 only."""
        return np.median(unit_scores(config.metric, predicted, truth, weights), axis=1)

    @classmethod
    def score_all(cls, config, predicted, truth):
        """Return the score of all stimuli."""
        return cls.score(config, predicted, truth, np.ones((1, len(truth))))[0]

    @torch.no_grad()
    def validate(self, f_train, f_val):
        """Fit, and return the score of the validation stimuli; NaN where features are NaN."""
        if not f_train.isfinite().all():
            return np.nan
        self.fit(f_train, f_val)
        truth = self.truth(self.config, self.study, self.fold["val"])
        return self.score_all(self.config, self.predict(f_val).cpu().numpy(), truth)

    @torch.no_grad()
    def test(self, f_train, f_val, f_test):
        """Return the predictions of the test stimuli."""
        return self.predict(f_test).cpu().numpy().astype(np.float32)


class RidgeReadout(Objective):
    """The best linear readout of the current features, in closed form at every step.

    The readout is a constant of the loss: the gradient is that of the loss after the fit (envelope
    theorem). Validation stimuli choose a penalty for each unit. The readout sees standardised
    features, or their first head_dims principal components before any warp.
    """

    def __init__(self, config, study, fold, f0):
        super().__init__(config, study, fold, f0)
        self.mean = f0.mean(0)
        sd = f0.std(0).clamp_min(1e-6)
        n = config.head_dims
        if n > min(f0.shape):
            shape = f"{len(f0)} training stimuli x {f0.size(1)} features"
            raise InputError(f"head_dims={n}, but {shape} have fewer components")
        self.basis = torch.diag(1 / sd)
        if n:
            components = torch.linalg.svd((f0 - self.mean) / sd, full_matrices=False)[2][:n]
            self.basis = components.T / sd[:, None]

    def project(self, f):
        return (f - self.mean) @ self.basis

    @torch.no_grad()
    def fit(self, f_train, f_val):
        x = self.project(f_train).double()
        y = self.y[self.fold["train"]].double()
        y_val = self.y[self.fold["val"]].double() - y.mean(0)
        u, s, vt = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        x_val = (self.project(f_val).double() - x.mean(0)) @ vt.T
        uty = u.T @ y  # u has mean 0, so the mean of y does not matter
        errors = []
        for alpha in self.config.alphas:
            shrunk = (s / (s**2 + alpha))[:, None] * uty
            errors.append((x_val @ shrunk - y_val).square().mean(0))
        alphas = torch.tensor(self.config.alphas, dtype=x.dtype, device=x.device)
        self.alpha = alphas[torch.stack(errors).argmin(0)]
        self.refit(f_train, self.fold["train"])

    @torch.no_grad()
    def refit(self, f, rows):
        x = self.project(f).double()
        y = self.y[rows].double()
        weights = self.solve(x - x.mean(0), y - y.mean(0))
        self.bias = (y.mean(0) - x.mean(0) @ weights).float()
        self.weights = weights.float()

    def test(self, f_train, f_val, f_test):
        """Fit the readout to training and validation stimuli, then predict."""
        self.fit(f_train, f_val)
        rows = np.concatenate([self.fold["train"], self.fold["val"]])
        self.refit(torch.cat([f_train, f_val]), rows)
        return super().test(f_train, f_val, f_test)

    def solve(self, x, y):
        """Return the weights (p, V) of y (n, V) on x (n, p), both with mean 0."""
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        s = s[:, None]
        return vt.T @ (s / (s**2 + self.alpha) * (u.T @ y))

    def loss(self, f, rows):
        if self.config.exact:
            self.refit(f.detach(), rows)
        penalty = (self.alpha * self.weights.square()).sum() / len(self.fold["train"])
        return super().loss(f, rows) + penalty.float() / self.y.size(1)

    def predict(self, f):
        return self.project(f) @ self.weights + self.bias


class OLSReadout(RidgeReadout):
    """Ordinary least squares, of minimum norm where features are collinear."""

    def solve(self, x, y):
        self.alpha = torch.zeros(())  # no penalty in the loss
        rtol = max(x.shape) * torch.finfo(torch.float32).eps  # rounding must not become a predictor
        return torch.linalg.pinv(x, rtol=rtol) @ y


class PLSReadout(RidgeReadout):
    """Partial least squares, 25 components as in Brain-Score; OLS if there are no more features."""

    def solve(self, x, y):
        self.alpha = torch.zeros(())  # no penalty in the loss
        pls = PLSRegression(min(25, *x.shape), scale=False).fit(x.cpu().numpy(), y.cpu().numpy())
        return torch.as_tensor(pls.coef_.T).to(x)


class SGDReadout(RidgeReadout):
    """A linear readout trained by Adam, first alone and then along with the warp."""

    def __init__(self, config, study, fold, f0):
        super().__init__(config, study, fold, f0)
        self.weights = torch.zeros(self.basis.size(1), self.y.size(1)).to(f0).requires_grad_()
        self.bias = self.y[fold["train"]].mean(0).requires_grad_()
        self.parameters = (self.weights, self.bias)
        adam = torch.optim.Adam(self.parameters, lr=HEAD_RATE)
        for _ in range(HEAD_STEPS):
            adam.zero_grad()
            self.loss(f0, fold["train"]).backward()
            adam.step()

    fit = Objective.fit
    loss = Objective.loss
    test = Objective.test


class RSA(Objective):
    """Correlation of the model's distances with those of the brain; no readout."""

    pairs = True

    def loss(self, f, rows):
        return 1 - self.similarity(self.predict(f), self.compare(self.config, self.y[rows]))

    def predict(self, f):
        return self.compare(self.config, f)

    @classmethod
    def truth(cls, config, study, rows):
        return cls.compare(config, torch.as_tensor(study.y[rows])).numpy()

    @classmethod
    def score(cls, config, predicted, truth, weights):
        scores = []
        for chosen in weights:
            pair = np.ix_(chosen > 0, chosen > 0)
            a = torch.as_tensor(predicted[pair]).double()
            b = torch.as_tensor(truth[pair]).double()
            # identical features correlate with nothing: 0, not NaN
            scores.append(0.0 if a.std() == 0 else float(cls.similarity(a, b)))
        return np.array(scores)

    @staticmethod
    def compare(config, x):
        """Return the distances (or products) of all pairs of stimuli, (n, n), from x (n, p)."""
        if config.rdm == "correlation":
            x = x - x.mean(1, keepdim=True)
            x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
            return 1 - x @ x.T
        square = x.square().sum(1)
        return (square[:, None] + square[None, :] - 2 * x @ x.T) / x.size(1)

    @staticmethod
    def similarity(a, b):
        """Return how alike two such matrices are, of all stimuli or a subset."""
        i, j = np.triu_indices(len(a), 1)
        return torch.corrcoef(torch.stack([a[i, j], b[i, j]]))[0, 1]


class CKA(RSA):
    """Debiased linear CKA of model and brain; no readout (Nguyen et al. 2021; Song et al. 2012)."""

    @staticmethod
    def compare(config, x):
        x = x - x.mean(0)
        return x @ x.T

    @classmethod
    def similarity(cls, a, b):
        return cls.hsic(a, b) / (cls.hsic(a, a) * cls.hsic(b, b)).clamp_min(1e-24).sqrt()

    @staticmethod
    def hsic(a, b):
        """Return the unbiased HSIC of Gram matrices a, b (n, n), n >= 4."""
        n = len(a)
        a = (a - torch.diag(torch.diagonal(a))).double()
        b = (b - torch.diag(torch.diagonal(b))).double()
        shared = a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(0) @ b.sum(0))
        return ((a * b).sum() + shared) / (n * (n - 3))


HEADS = {"ridge": RidgeReadout, "ols": OLSReadout, "pls": PLSReadout, "sgd": SGDReadout}
# linear: the class that HEADS names
OBJECTIVES = {"linear": RidgeReadout, "linear_first": Objective, "rsa": RSA, "cka": CKA}


def objective_class(config):
    """Return the class of Objective that the options ask for."""
    return HEADS[config.head] if config.objective == "linear" else OBJECTIVES[config.objective]


def unit_scores(metric, predicted, y, weights):
    """Return (B, V) r or R2 of predictions and responses (n, V), under weights (B, n)."""
    w = (weights / weights.sum(1, keepdims=True)).astype(y.dtype)
    sd = y.std(0)
    sd = np.where(sd > 0, sd, 1)  # the limits below must not depend on the unit of measurement
    p = (predicted - y.mean(0)) / sd
    y = (y - y.mean(0)) / sd
    y_var = np.maximum(w @ y**2 - (w @ y) ** 2, 1e-12)
    if metric == "r2":
        return 1 - w @ (y - p) ** 2 / y_var
    p_var = np.maximum(w @ p**2 - (w @ p) ** 2, 0)
    covariance = w @ (p * y) - (w @ p) * (w @ y)
    # a constant prediction scores 0, not NaN
    return np.where(p_var > 1e-10, covariance / np.sqrt(np.maximum(p_var, 1e-10) * y_var), 0)


# ---- fits


@dataclass(frozen=True)
class Cell:
    """What one score belongs to: a candidate at one d in one draw, fitted in all folds."""

    candidate: Candidate
    d: float  # dimensions: 0 without a warp, ALL for all parameters
    seed: int  # draw of P
    weights: int  # draw of random weights
    shuffles: int  # of the null: many at d = 0; with a warp they give a chance level only
    shuffle: int = 0  # of the responses themselves


def list_cells(config, candidates):
    """Return the Cells of a study: all candidates, and the first one on shuffled responses."""
    dims = config.dims + [ALL] * config.full
    cells = []
    for candidate, seed, d in itertools.product(candidates, range(config.seeds), dims):
        weights = seed if candidate.toward == "random" else 0
        shuffles = config.shuffles if d == seed == 0 else 20
        if 0 < d < ALL or seed == weights:  # otherwise there is no P to draw
            cells.append(Cell(candidate, float(d), seed, weights, shuffles))
    if config.shuffled and max(config.dims):
        control = cells[: len(config.dims)]  # the first candidate in its first draw
        n_warps = sum(cell.d > 0 for cell in cells)
        n = n_warps // (10 * np.count_nonzero(config.dims))  # a tenth of the run
        for shuffle in range(1, 1 + max(1, n)):
            for cell in control:
                cells.append(replace(cell, seed=shuffle - 1, shuffles=20, shuffle=shuffle))
    return cells


def fit_all(run, config, studies, cells, load):
    """Make the fits that have no file; ranks share them. load: (candidate, weights) -> Loaded."""
    (run.out / "fits").mkdir(exist_ok=True)
    fits = []
    for cell, study in itertools.product(cells, studies):
        rates = config.learning_rates if cell.d else [0.0]
        for number, rate in itertools.product(range(len(study.folds)), rates):
            fits.append((study, cell, number, rate))
    fits = run.share(fits)
    missing = [fit for fit in fits if read_fit(fit_path(run, config, *fit)) is None]
    if len(missing) < len(fits):
        run.print(f"{len(fits) - len(missing)} of {len(fits)} fits of an earlier run are kept")
    bar = run.progress(len(missing), desc="fits")
    for study, cell, number, rate in missing:
        loaded = load(cell.candidate, cell.weights)
        arrays = run_fit(run, config, study.shuffled(cell.shuffle), cell, number, rate, loaded)
        with aside(fit_path(run, config, study, cell, number, rate)) as file:
            np.savez(file, **arrays)
        bar.update()
    bar.close()
    run.barrier()


def read_cell(run, config, study, cell):
    """Return (the first fold's fit, predictions, truth of the test stimuli of all folds).

    Validation chooses the learning rate in each fold.
    """
    shuffled = study.shuffled(cell.shuffle)
    chosen = []
    truth = []
    for number, fold in enumerate(study.folds):
        fits = []
        for rate in config.learning_rates if cell.d else [0.0]:
            fit = read_fit(fit_path(run, config, study, cell, number, rate))
            fits.append({**fit, "learning_rate": rate})
        validation = [fit["validation"] for fit in fits]
        chosen.append(fits[np.argmax(np.nan_to_num(validation, nan=-np.inf))])
        truth.append(study.objective.truth(config, shuffled, fold["test"]))
    return chosen[0], join_folds([fit["evidence"] for fit in chosen]), join_folds(truth)


def read_fit(path):
    """Return the arrays of a fit, or None where its file is missing or torn."""
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        return None


def fit_path(run, config, study, cell, number, rate):
    """Return the file of a fit, whose name has a hash of whatever can change it."""
    key = asdict(config)
    for option in ANALYSIS.split():
        key.pop(option, None)
    if cell.candidate.model != "lm":
        key.pop("lm", None)
    key |= {"cell": asdict(cell), "fold": number, "rate": rate, "content": study.content}
    key["code"] = hash_code(type(config))
    if 0 < cell.d < ALL:  # P has as many columns as the next power of two of the largest d
        key["P"] = power_of_two(max(config.dims))
    stem = f"{quote(cell.candidate.name, safe='')}-{cell.d:g}-{hash_options(key)}"
    return run.out / "fits" / f"{stem}.npz"


def run_fit(run, config, study, cell, number, rate, loaded):
    """Return the arrays of a Cell's fit in one fold: as from `train`, at d = 0 with the null."""
    fold = study.folds[number]
    reader = loaded.reader
    f = loaded.features
    if config.objective == "linear_first":
        head = fit_head(config, study, fold, f)
        reader = nn.Sequential(OrderedDict(reader=reader, head=head)).eval()
        f = head(f).detach()
    objective = study.objective(config, study, fold, f[fold["train"]])
    if cell.d == 0:
        f_train, f_val, f_test = [f[fold[part]] for part in PARTS]
        score = objective.validate(f_train, f_val)
        arrays = {"validation": score, "step": 0, "curve": np.array([(0, np.nan, score)])}
        arrays["evidence"] = objective.test(f_train, f_val, f_test)
        if study.objective is RidgeReadout and number == cell.shuffle == 0:
            arrays["null"] = null_scores(config, study, f, cell.shuffles)
        return arrays
    if cell.d == ALL:
        wrapper = FastfoodWrapper(reader, projection="identity")
    else:
        groups = split_groups(config, reader)
        P_seed = (config.seed, cell.seed)
        wrapper = FastfoodWrapper(reader, max(config.dims), groups, config.projection, P_seed)
        wrapper.start(int(cell.d))
    arrays = train(config, wrapper, objective, loaded.inputs, rate, cell.seed)
    if arrays["diverged"] >= 0:
        where = f"{cell.candidate.name}, d = {cell.d:g}: learning rate {rate}"
        run.print(f"{where} diverged in step {arrays['diverged']}; its best step before counts")
    return {**arrays, "D": wrapper.D}


def fit_head(config, study, fold, f):
    """Return the option head's readout of training stimuli as an nn.Linear."""
    readout = HEADS[config.head](config, study, fold, f[fold["train"]])
    readout.fit(f[fold["train"]], f[fold["val"]])
    weight = readout.basis @ readout.weights.detach()
    head = nn.Linear(*weight.shape, device=weight.device)
    bias = readout.bias.detach() - readout.mean @ weight
    head.load_state_dict({"weight": weight.T, "bias": bias})
    return head


def train(config, wrapper, objective, inputs, rate, draw):
    """Fit z, the scales and a readout by Adam; the best step on validation stimuli counts.

    rate: of a step, a share of ||theta0||. Returns {evidence: predictions of the test stimuli,
    validation: the best score, step, curve: (step, loss, best), diverged: the step at which the
    loss was NaN or infinite, else -1}.
    """
    params = [wrapper.z, wrapper.scales, *objective.parameters]
    rates = [rate * wrapper.norm / len(wrapper.z) ** 0.5, rate]
    rates += [HEAD_RATE] * len(objective.parameters)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates)]
    adam = torch.optim.Adam(groups, eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, partial(pace, steps=config.steps))
    batches = draw_batches(config, objective.fold["train"], draw)
    best = {"validation": -np.inf, "step": 0, "diverged": -1}
    best_params = copy.deepcopy(params)
    loss = np.nan
    curve = []
    for step in range(config.steps + 1):
        if step % config.eval_interval == 0 or step == config.steps:
            f = warped_features(config, wrapper, inputs, objective.fold, ("train", "val"))
            score = objective.validate(*f)
            if score > best["validation"]:
                best |= {"validation": score, "step": step}
                best_params = copy.deepcopy(params)
            curve.append((step, loss, best["validation"]))
        if step == config.steps:
            break
        adam.zero_grad()
        loss = gradients(config, wrapper, objective, inputs, next(batches))
        if not np.isfinite(loss):
            best["diverged"] = step
            break
        adam.step()
        schedule.step()
    with torch.no_grad():
        for p, value in zip(params, best_params):
            p.copy_(value)
    f = warped_features(config, wrapper, inputs, objective.fold, PARTS)
    return {**best, "curve": np.array(curve), "evidence": objective.test(*f)}


def pace(step, steps):
    """Return the share of the learning rate: a linear warm-up over a tenth, then a cosine to 0."""
    warm = min(1, (step + 1) / max(0.1 * steps, 1))
    return warm * 0.5 * (1 + np.cos(np.pi * step / steps))


def draw_batches(config, rows, draw):
    """Yield the training stimuli of each step: all, or batches without replacement."""
    rows = torch.as_tensor(rows)
    size = min(config.batch_size, len(rows))
    generator = torch.Generator().manual_seed(key_seed(config.seed, "batches", draw))
    if config.exact or size == len(rows):
        yield from itertools.repeat(rows)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for batch in order[: len(rows) // size * size].split(size):
            yield rows[batch]


def gradients(config, wrapper, objective, inputs, rows):
    """Leave the gradients of the loss on the stimuli in rows, and return the loss.

    If they are more than a batch, the backward pass runs the model again, batch by batch: exact for
    any loss of all features, in the memory of one batch.
    """
    batches = rows.to(inputs.device).split(config.batch_size)
    call = wrapper.call
    if len(batches) > 1:
        call = partial(checkpoint, wrapper.call, use_reentrant=False)
    tensors = wrapper.tensors()
    f = torch.cat([call(tensors, inputs[batch]) for batch in batches])
    if not f.isfinite().all():
        return np.nan
    loss = objective.loss(f, rows.numpy())
    loss.backward()
    return loss.item()


@torch.no_grad()
def warped_features(config, wrapper, inputs, fold, parts):
    """Return the features (n, p) of the stimuli in each of these parts of a fold."""
    model = partial(wrapper.call, wrapper.tensors())
    return [read_features(model, inputs, fold[part], config.batch_size) for part in parts]


def null_scores(config, study, f, number):
    """Return (number,) scores at d = 0 with shuffled responses, each fitted anew.

    Shuffled responses are stacked as further units, so that one SVD serves many shuffles.
    """
    scores = []
    n_chunks = -(-study.y.size * number // 2**20)  # each fits a cache
    for numbers in np.array_split(range(1, number + 1), n_chunks):
        y = np.concatenate([study.shuffled(i).y for i in numbers], axis=1)
        predicted = []
        truth = []
        for fold in study.folds:
            readout = RidgeReadout(config, replace(study, y=y), fold, f[fold["train"]])
            predicted.append(readout.test(*[f[fold[part]] for part in PARTS]))
            truth.append(y[fold["test"]])
        equal = np.ones((1, len(study.tested)))
        units = unit_scores(config.metric, join_folds(predicted), join_folds(truth), equal)
        scores.append(np.median(units.reshape(len(numbers), -1), axis=1))
    return np.concatenate(scores)


def join_folds(parts):
    """Stack predictions or responses (n, V) of all folds.

    Several folds are centred first: the mean of held-out stimuli differs from the mean of the rest,
    which would look like a (negative) prediction.
    """
    if len(parts) > 1:
        parts = [part - part.mean(0) for part in parts]
    return np.concatenate(parts)


# ---- evaluate


def resample(config, study, predicted, truth):
    """Return (draws,) scores of resampled test stimuli, a group at a time.

    Groups are drawn with replacement. Not so for pairs, where a stimulus drawn twice would be
    paired with itself: a delete-half jackknife (Shao & Wu 1989) scores half of the groups, scales
    the spread to that of all groups, and centres it on the score of all.
    """
    rng = np.random.default_rng(key_seed(config.seed, "bootstrap"))
    names, number = np.unique(study.group[study.tested], return_inverse=True)
    n = len(names)
    if not study.objective.pairs:
        weights = rng.multinomial(n, np.full(n, 1 / n), config.draws)[:, number]
        return study.objective.score(config, predicted, truth, weights.astype(float))
    n_kept = max(n // 2, min(n - 1, 6))
    kept = rng.permuted(np.tile(np.arange(n) < n_kept, (config.draws, 1)), axis=1)[:, number]
    scores = study.objective.score(config, predicted, truth, kept.astype(float))
    spread = (scores - scores.mean()) * (n_kept / (n - n_kept)) ** 0.5
    return study.objective.score_all(config, predicted, truth) + spread


def shuffle_predictions(config, study, predicted, truth, number):
    """Return (number,) scores of predictions that are shuffled over stimuli."""
    rng = np.random.default_rng(key_seed(config.seed, "chance"))
    scores = []
    for _ in range(number):
        order = rng.permutation(len(truth))
        shuffled = predicted[order][:, order] if study.objective.pairs else predicted[order]
        scores.append(study.objective.score_all(config, shuffled, truth))
    return np.array(scores)


def interval(draws):
    """Return the ends of the middle 95 %, infinities included."""
    return tuple(np.quantile(draws, [0.025, 0.975], method="inverted_cdf"))


def p_value(score, null):
    """Return the share of null scores at least as high, counting the score itself; NaN for NaN."""
    if np.isnan(score):
        return np.nan
    return (1 + (null >= score).sum()) / (1 + len(null))


def score_cells(run, config, study, cells):
    """Write the rows of results; return them with draws (resampled scores), null and curve."""
    rows = []
    for cell in cells:
        fit, predicted, truth = read_cell(run, config, study, cell)
        score = study.objective.score_all(config, predicted, truth)
        draws = resample(config, study, predicted, truth)
        null = fit.get("null")
        if null is None:
            null = shuffle_predictions(config, study, predicted, truth, cell.shuffles)
        D = int(fit.get("D", 0))
        row = {"model": cell.candidate.name, "layer": "+".join(cell.candidate.layers)}
        row |= {"measure": "score", "objective": config.objective, "seed": cell.seed, "D": D}
        row["control"] = "shuffled" if cell.shuffle else "none"
        row["projection"] = "none" if cell.d == ALL else config.projection
        row["d"] = D if cell.d == ALL else int(cell.d)
        row |= {key: fit[key] for key in ("learning_rate", "validation", "step")}
        row |= {"ceiling": study.ceiling, "normalised": score / study.ceiling}
        row |= {"p": p_value(score, null), **study.meta}
        run.result(score, null.mean(), *interval(draws), len(truth), **row)
        name = cell.candidate.name + " (shuffled responses)" * (cell.shuffle > 0)
        row |= {"name": name, "d": cell.d, "score": score}
        rows.append({**row, "draws": draws, "null": null, "curve": fit["curve"]})
    return pd.DataFrame(rows)


def make_curves(config, scores):
    """Return {name: DataFrame (1 + B, d)}: mean scores, then B bootstrap draws of P and stimuli."""
    curves = {}
    for name, rows in scores.groupby("name", sort=False):
        draws = rows.pivot(index="seed", columns="d", values="draws").ffill()  # one if without P
        means = rows.groupby("d")["score"].mean()
        rng = np.random.default_rng(key_seed(config.seed, "seeds"))
        chosen = rng.integers(0, len(draws), (config.draws, len(draws)))
        resampled = {}
        for d in draws:
            values = np.take_along_axis(np.stack(draws[d], axis=1), chosen, axis=1).mean(1)
            resampled[d] = np.append(means[d], values)
        curves[name] = pd.DataFrame(resampled)
    return curves


def crossing(dims, scores, level):
    """Return the d where the isotonic curve over log10(1 + d) reaches level, inf if nowhere."""
    x = np.log10(1 + np.asarray(dims, float))
    rising = isotonic_regression(scores)
    if not rising[-1] >= level:
        return np.inf
    i = np.argmax(rising >= level)
    if i == 0:
        return float(dims[0])
    return float(10 ** np.interp(level, rising[i - 1 : i + 1], x[i - 1 : i + 1]) - 1)


def measure_d_warp(config, curves):
    """Return (level, {(name, kind): d_warp (1 + B,)}), kind being absolute or relative.

    Absolute: all must reach the same level; relative: each a share of its own full score. Levels
    are measured again in every bootstrap draw.
    """
    common = np.full(len(next(iter(curves.values()))), to_number(config.common))
    if config.common in ("lowest", "highest"):
        full = pd.DataFrame({name: curve[ALL] for name, curve in curves.items() if ALL in curve})
        model = full.loc[0].idxmin() if config.common == "lowest" else full.loc[0].idxmax()
        common = config.common_share * full[model].to_numpy()
    d_warp = {}
    for name, curve in curves.items():
        scores = curve[config.dims].to_numpy()
        levels = {"absolute": common}
        if ALL in curve:
            start = scores[:, 0] if config.dims[0] == 0 else 0.0
            levels["relative"] = start + config.reach * (curve[ALL] - start)
        for kind, level in levels.items():
            crossings = map(partial(crossing, config.dims), scores, level)
            d_warp[name, kind] = np.fromiter(crossings, float)
    return common[0], d_warp


def report_d_warp(run, config, study, scores):
    """Write each candidate's d_warp and the ratios of pairs as rows of results, and the figures."""
    curves = make_curves(config, scores)
    level, d_warp = measure_d_warp(config, curves)
    plot(run, config, study, scores, curves, d_warp, level)
    last = max(config.dims)
    shared = {**study.meta, "objective": config.objective, "projection": config.projection}
    shared |= {"d": 0, "seed": -1}
    of_name = scores.drop_duplicates("name").set_index("name")[["model", "control"]]
    for (name, kind), values in d_warp.items():
        columns = {**shared, **of_name.loc[name], "measure": f"d_warp {kind}"}
        censored = np.isinf(values[0]) or values[0] == config.dims[0] > 0
        columns["state"] = "censored" if censored else "reached"
        value, *draws = values.clip(max=last)
        run.result(value, last, *interval(draws), config.draws, **columns)
    for a, b in itertools.combinations(of_name.query("control == 'none'").index, 2):
        log_a = np.log10(1 + d_warp[a, "absolute"].clip(max=last))
        log_b = np.log10(1 + d_warp[b, "absolute"].clip(max=last))
        ratio, *draws = log_b - log_a
        low, high = interval(draws)
        columns = {"measure": "difference of log10(1 + d_warp)", "model": f"{b} - {a}"}
        run.result(ratio, 0.0, low, high, config.draws, **columns, **shared)
        times = f"{10**ratio:.2g} [{10**low:.2g}, {10**high:.2g}]"
        run.print(f"1 + d_warp, cut at {last:,}: {b} needs {times} times that of {a}")


def report_people(run, dataset, people):
    """Write the mean scores over people (each from score_cells) at d = 0 as rows of results.

    p: of the mean, under shuffles that are the same for all; p_people: of a t-test of each person's
    score minus the mean of its null.
    """
    zeros = pd.concat(people).query("d == 0 and seed == 0 and control == 'none'")
    for name, zero in zeros.groupby("model", sort=False):
        scores = zero["score"].to_numpy()
        nulls = np.stack(zero["null"])  # (people, shuffles)
        test = scipy.stats.ttest_1samp(scores - nulls.mean(1), 0)
        low, high = np.array(test.confidence_interval()) + nulls.mean()
        columns = {"measure": "score", "model": name, "dataset": dataset, "subject": "mean", "d": 0}
        p = p_value(scores.mean(), nulls.mean(0))
        columns |= {"control": "none", "p": p, "p_people": test.pvalue}
        run.result(scores.mean(), nulls.mean(), low, high, len(people), **columns)


def make_table(config, rows):
    """Return a table of each model's scores (means over draws) and d_warp, with intervals."""
    first, last = config.dims[0], config.dims[-1]
    what = rows["d"].map("score at {:.0f}".format)
    what = what.mask(rows["projection"] == "none", "score at all")
    what = what.where(rows["measure"] == "score", rows["measure"])
    shown = ["score at 0", f"score at {last}", "score at all", "d_warp absolute", "d_warp relative"]
    rows = rows.assign(what=what)[what.isin(shown)]
    groups = rows.groupby(["dataset", "subject", "model", "control", "what"], sort=False)
    means = groups[["score", "low", "high"]].mean()
    words = means.map("{:.4g}".format)
    is_d_warp = words.index.get_level_values("what").str.startswith("d_warp")
    words[is_d_warp] = words[is_d_warp].mask(means >= last, f"> {last:,}")
    if 0 < first < last:
        words[is_d_warp] = words[is_d_warp].mask(means <= first, f"<= {first:,}")
    table = (words["score"] + " [" + words["low"] + ", " + words["high"] + "]").unstack()
    if first == 0:  # the first draw has all the shuffles
        zero = groups[["chance", "p"]].first().xs("score at 0", level="what")
        zero = zero.map("{:.4g}".format)
        table = table.assign(null=zero["chance"], p=zero["p"])
    return table.fillna("").reset_index()


# ---- plots


def plot_curves(config, scores, curves, d_warp, level):
    """Plot scores over d with the isotonic fit and all parameters; d_warp over the first score."""
    x = np.log10(1 + np.array(config.dims))
    end = 1.08 * max(x[-1], 0.5)  # the place of the full model
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5))
    for i, (name, curve) in enumerate(curves.items()):
        points = scores[(scores["name"] == name) & (scores["d"] < ALL)]
        color = f"C{i}" if points["control"].iloc[0] == "none" else "0.6"
        rising = isotonic_regression(curve.loc[0, config.dims])
        band = np.quantile(curve.loc[1:, config.dims], [0.025, 0.975], axis=0)
        left.fill_between(x, *band, color=color, alpha=0.15, lw=0)
        left.plot(x, rising, color=color, label=name)
        left.plot(np.log10(1 + points["d"]), points["score"], ".", color=color, ms=4)
        if ALL in curve:
            left.plot([x[-1], end], [rising[-1], curve[ALL][0]], ":D", color=color, markevery=[1])
        value, *draws = d_warp[name, "absolute"]
        ends = np.log10(1 + np.array([*interval(draws), value])).clip(max=x[-1])
        first = curve[config.dims[0]][0]
        right.plot([first] * 2, ends[:2], color=color, lw=3, alpha=0.5)
        marker = "^" if np.isinf(value) else "o"
        right.plot(first, ends[2], marker, color=color, ms=9, label=name)
    left.axhline(level, ls="--", c="0.5", lw=1, label=f"level {level:.2f}")
    null = scores["null"].iloc[0].mean()
    left.axhline(null, ls=":", c="0.5", lw=1, label="first model, shuffled")
    left.set_xticks(x, config.dims)
    if config.full:
        left.set_xticks([*x, end], [*config.dims, "all"])
    left.set(xlabel="dimensions of the warp, d", ylabel="test score")
    left.set_title("isotonic fit, draws of P, 95 % band", fontsize=10)
    right.set_yticks(x, config.dims)
    right.set(xlabel=f"score at d = {config.dims[0]}", ylabel="d_warp, absolute (▲: not reached)")
    for axis in (left, right):
        axis.legend(fontsize=8, frameon=False)
    return figure


def plot_training(scores):
    """Plot the best validation score over steps: a panel for each candidate, a line for each d."""
    panels = scores.query("seed == 0").groupby("name", sort=False)
    n = len(panels)
    figure, axes = plt.subplots(1, n, figsize=(3.4 * n, 3.4), sharey=True, squeeze=False)
    for axis, (name, rows) in zip(axes[0], panels):
        for fit in rows.itertuples():
            steps, _, best = fit.curve.T
            label = "all parameters" if fit.d == ALL else f"d = {fit.d:g}"
            axis.plot(steps, best, ".-", label=label)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step, first draw of P")
    axes[0, 0].set_ylabel("best validation score")
    axes[0, 0].legend(fontsize=7, frameon=False)  # the first candidate has every d
    return figure


def plot(run, config, study, scores, curves, d_warp, level):
    """Save the figures of a study, in a folder of its own if there are several."""
    title = f"{study.name}{', synthetic' * study.meta['synthetic']}; {config.objective}"
    if np.isfinite(study.ceiling):
        title += f" ({config.metric})"
    title += f", {config.projection}"
    folder = run.out
    if len(config.dataset) > 1 or config.subject == "each":
        folder = run.out / quote(study.name, safe=" ")
    folder.mkdir(exist_ok=True)
    figures = {"curves": plot_curves(config, scores, curves, d_warp, level)}
    figures["training"] = plot_training(scores)
    for name, figure in figures.items():
        figure.set_layout_engine("constrained")
        figure.suptitle(title, fontsize=10)
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)


# ---- the experiment


def main(config):
    run = Run(config)
    candidates = make_candidates(config)
    cells = list_cells(config, candidates)
    datasets = {name: read_studies(run, config, name) for name in config.dataset}
    content = list(map(asdict, candidates))
    for studies in datasets.values():
        content += [study.content for study in studies]
    run.content = hash_options({"content": content})[:6]  # rows of other content are not reused
    for dataset, studies in datasets.items():
        load = lru_cache(1)(partial(load_candidate, run, config, studies[0]))  # same stimuli in all
        fit_all(run, config, studies, cells, load)
        if run.master:
            people = []
            for study in studies:
                people.append(score_cells(run, config, study, cells))
                if max(config.dims):
                    report_d_warp(run, config, study, people[-1])
            if len(people) > 1 and config.dims[0] == 0:
                report_people(run, dataset, people)
    close(run, config)


def close(run, config):
    """Write and print the table, and end the run."""
    rows = run.merge()
    if run.master:
        table = make_table(config, rows)
        write_aside(run.out / "table.csv", table.to_csv(index=False))
        run.print(table.to_string(index=False))
        run.print(f"figures, table.csv and results.csv in {run.out}")
    run.close()


if __name__ == "__main__":
    main(configure(Config))
