"""How far must a model be warped to match a brain? d_warp: the least dimensions that reach a score.

    python warp.py                                # embedded: candidates at known distances, offline
    python warp.py config/warp_planted.yaml planted_warp=0.5  # brains planted nearer or further
    python warp.py config/warp_words_brains.yaml  # linear scores of words in brains, with p
    python warp.py config/warp_tuckute.yaml models=gpt2,gpt2-medium layers=6
    torchrun --standalone --nproc_per_node=4 warp.py ...  # ranks share the fits

A stopped run goes on where it was. warp_intrinsic.py measures d for small networks: a classifier of
digits, whose published numbers it repeats, and functions bent into one another.

All parameters of a network move along theta = theta0 + lambda_g P z with P a fixed random D x d
matrix that is never formed; only z (and a scale for each group of layers) is trained. A ridge
readout is solved in closed form inside the loop, so d = 0 is ridge regression; objective=rsa and
cka need no readout, linear_first fits it once and warps it along with the model.

Li et al. 2018 and Aghajanyan et al. 2020 (intrinsic dimension); Le et al. 2013 (Fastfood);
Golub & Pereyra 1973 (variable projection).
"""

import copy
import hashlib
import itertools
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from operator import attrgetter, itemgetter
from pathlib import Path
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
    InputError,
    Run,
    aside,
    check_keys,
    configure,
    hash_options,
    key_seed,
    load_function,
)
from convert import HiddenStates, from_hub, load_weights
from data import read_table, write_aside
from data.stimuli import Encoding, to_number, write_encoding

# options that no single fit depends on: fits are kept when one of them changes
ANALYSIS = ["models", "dataset", "subject", "seeds", "dims", "full", "learning_rates", "common"]
ANALYSIS += ["common_share", "reach", "draws", "shuffled", "shuffles", "baselines"]
PLANTED_UNITS = 64  # of the planted brain: mixtures of
PLANTED_COMPONENTS = 8  # the first principal components of the teacher's features
HEAD_RATE = 3e-3  # learning rate of a readout that is trained
HEAD_STEPS = 500  # before any warp
CHUNK = 2**18  # parameters that a Fastfood chunk makes: what fits a cache


# candidates of the embedded run, on the line through the planted teacher and lm; random weights
SHORT_NAMES = {
    "teacher": {"toward": "teacher"},
    "halfway": {"toward": "teacher", "share": 0.5},
    "lm": {},
    "twice as far": {"toward": "teacher", "share": -1.0},
    "random": {"toward": "random"},
}


def default(*values):
    """The default of an option that is a list."""
    return field(default_factory=partial(list, values))


@dataclass
class Config:
    # ---- data
    dataset: list[str] = default("synthetic_brain")  # stimuli with responses
    subject: str = ""  # only this person's units; each: every person's by themselves; "": all
    roi: str = ""  # only units of this region
    reliable: float = 0.05  # only units with a ceiling above it (R2; unknown ones stay)
    n_folds: int = 0  # each group is tested once; 0: one split, the dataset's own or test_share
    val_share: float = 0.2  # of the groups: they choose penalties, learning rates and steps
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
    objective: Literal["linear", "linear_first", "rsa", "cka"] = "linear"
    metric: Literal["r", "r2"] = "r"  # median over units, of linear objectives
    head: Literal["ridge", "sgd", "ols", "pls"] = "ridge"  # how the readout is fitted
    head_dims: int = 8  # equal heads: principal components of each model's own features; 0: all
    # ridge penalties; validation chooses one for each unit
    alphas: list[float] = default(*np.logspace(-1, 6, 15).tolist())
    rdm: Literal["correlation", "euclidean"] = "correlation"  # distances of rsa
    exact: bool = True  # gradients of all training stimuli; False: of batches
    # ---- warping
    dims: list[int] = default(0, 32, 256, 2048)  # d, the scales counted
    full: bool = True  # beside them all D parameters, trained directly
    projection: Literal["fastfood", "fastfood_tensor", "dense"] = "fastfood"
    layer_groups: str = ""  # one learned scale each: a,b;c (names of modules) or 'blocks'
    seeds: int = 3  # draws of P (and of random weights)
    steps: int = 20  # of Adam; the best by validation is kept
    learning_rates: list[float] = default(0.04, 0.16)  # of ||theta0||
    eval_interval: int = 10  # steps between validations
    batch_size: int = 512  # stimuli per forward pass
    # ---- d_warp and controls
    common: str = "highest"  # absolute: of the full scores the lowest or highest, or a number,
    common_share: float = 0.95  # times this, is the score to reach, the same for all
    reach: float = 0.9  # relative: s0 + this times (full - s0), each model's own
    draws: int = 1000  # bootstrap over seeds and test stimuli (groups)
    shuffles: int = 1000  # responses dealt to other stimuli, refitted in closed form at d = 0
    shuffled: bool = True  # the first candidate against shuffled responses at every d, too
    baselines: bool = True  # OLS, PLS and ridge on all features at d = 0
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
        if self.n_folds == 1 or (self.n_folds and objective_class(self).pairs):
            raise InputError("n_folds must be 2 or more, and objective linear or linear_first")
        check_dims(self)
        make_candidates(self)


def check_dims(config):
    """Sort dims; raise InputError for impossible dims, learning rates or common score."""
    config.dims = sorted(set(config.dims))
    if config.dims[0] < 0 or min(config.learning_rates) <= 0:
        raise InputError("dims must be 0 or more, and learning_rates above 0")
    if config.common in ("lowest", "highest") and (config.full or config.dims == [0]):
        return
    if np.isnan(to_number(config.common)):
        message = "must be a score (with full=False), lowest or highest"
        raise InputError(f"common={config.common} {message}")


@dataclass(frozen=True)
class Candidate:
    """A model that is compared: which one, read where, and moved how far before the first fit."""

    name: str
    model: str = "lm"  # lm, a run folder, a Hugging Face model, my_file.py:constructor
    layers: tuple = ()  # those of the option `layers` where it names none
    toward: str = ""  # teacher (of the planted brain) or random (new weights)
    share: float = 1.0  # of the way there; below 0: away from it

    @property
    def random(self):
        """Whether its weights are drawn anew for each seed."""
        return self.toward == "random"


def make_candidates(config):
    """The Candidates that the option `models` lists. Raises InputError."""
    candidates = {}
    for given in config.models:
        if isinstance(given, str):
            given = {"name": given, **SHORT_NAMES.get(given, {"model": given})}
        check_keys(given, Candidate.__annotations__, "models")
        layers = np.ravel(given.get("layers", config.layers))  # a list, or a single one
        given = {"name": given.get("model", "lm"), **given, "layers": tuple(map(str, layers))}
        candidate = Candidate(**given)
        name = candidate.name
        if candidate.toward not in ("", "teacher", "random"):
            wrong = f"'{name}' must go toward teacher or random, not '{candidate.toward}'"
            raise InputError(f"models: {wrong}")
        if name in candidates:
            raise InputError(f"models: two are called '{name}': give each a name")
        candidates[name] = candidate
    return list(candidates.values())


# ---- low-dimensional training


@cache
def hadamard(n, device, dtype):
    """Sylvester's Hadamard matrix (n, n), entries ±1, n a power of two."""
    return torch.tensor(scipy.linalg.hadamard(n), device=device, dtype=dtype)


def walsh_hadamard(x, largest=64):
    """Walsh-Hadamard transform of the columns of x (n, C), unnormalised; n is a power of two.

    H of n = a b c ... is the Kronecker product of small ones, so each axis of (a, b, c, ...) is
    multiplied by a small dense matrix: a few passes over memory where a butterfly takes log2 n.
    """
    n, C = x.shape
    bits = n.bit_length() - 1
    n_factors = max(1, -(-bits // (largest.bit_length() - 1)))
    before = 1
    for i in range(n_factors):
        factor = 2 ** (bits // n_factors + (i < bits % n_factors))
        h = hadamard(factor, x.device, x.dtype)
        x = h @ x.reshape(before, factor, -1)
        before *= factor
    return x.reshape(n, C)


def power_of_two(n):
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


class Fastfood:
    """Rows of P (rows, n) from blocks H G Π H B (Le et al. 2013), columns of norm `norm`.

    B = ±1, G is normal, Π a permutation. Within a tensor blocks share H B, and those of a chunk
    Π: with a G of their own they are independent all the same, and one of the two transforms is
    done once. Four bytes a row are kept.
    """

    def __init__(self, rows, n, norm, generator, device):
        self.n = n
        self.scale = norm / (n * rows) ** 0.5  # ||H G Π H e|| = n where the mean of G² is 1
        self.sign = (torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1).to(device)
        self.chunks = []
        n_blocks = -(-rows // n)
        step = max(1, CHUNK // n)
        for first in range(0, n_blocks, step):
            g = torch.randn(n, min(step, n_blocks - first), generator=generator)
            g = g / g.square().mean(0).sqrt()
            order = torch.randperm(n, generator=generator)
            self.chunks.append((first * n, g.to(device), order.to(device)))

    def forward(self, z, out):
        """Write P z into out (rows,); z has the first d <= n coordinates, or more: they are cut."""
        z = z[: self.n]
        x = z.new_zeros(self.n, 1)
        x[: len(z), 0] = z * self.sign[: len(z)] * self.scale
        x = walsh_hadamard(x)
        for start, g, order in self.chunks:
            part = walsh_hadamard(x[order] * g).flatten()
            end = min(start + len(part), len(out))
            out[start:end] = part[: end - start]

    def transpose(self, grad, total):
        """Add P' grad to total (d,); grad (rows,)."""
        x = grad.new_zeros(self.n, 1)
        for start, g, order in self.chunks:
            part = grad[start : start + g.numel()]
            part = F.pad(part, (0, g.numel() - len(part)))
            part = walsh_hadamard(part.view(g.shape)).mul_(g).sum(1, keepdim=True)
            x.index_add_(0, order, part)
        d = min(len(total), self.n)
        total[:d] += walsh_hadamard(x)[:d, 0] * self.sign[:d] * self.scale


class Dense:
    """P (rows, n) drawn in full, normal: the one that costs D x d memory."""

    def __init__(self, rows, n, norm, generator, device):
        self.p = torch.empty(n, rows)
        for column in self.p:  # one by one: a smaller n has the first of them
            column.normal_(generator=generator)
        self.p = (self.p * norm / self.p.norm(dim=1, keepdim=True)).to(device)

    def forward(self, z, out):
        out.copy_(z @ self.p[: len(z)])

    def transpose(self, grad, total):
        total += self.p[: len(total)] @ grad


class Identity:
    """All parameters, trained directly: a tensor's own stretch of z."""

    def __init__(self, start, rows):
        self.stretch = slice(start, start + rows)

    def forward(self, z, out):
        out.copy_(z[self.stretch])

    def transpose(self, grad, total):
        total[self.stretch] += grad


class Warp(torch.autograd.Function):
    """theta0 + P z, tensor by tensor: nothing of size D is kept beside theta itself.

    z (m + 1, d - m), a row for each group of layers and one for the rest -> the wrapper's tensors.
    """

    @staticmethod
    def forward(ctx, z, wrapper):
        ctx.wrapper = wrapper
        ctx.set_materialize_grads(False)
        tensors = []
        for original, projection, group in wrapper.parts:
            out = z.new_empty(original.numel())
            projection.forward(z[-1 if group is None else group], out)
            tensors.append(out.view(original.shape).add_(original.detach()))
        return tuple(tensors)

    @staticmethod
    def backward(ctx, *grads):
        wrapper = ctx.wrapper
        dz = wrapper.z.new_zeros(wrapper.m + 1, len(wrapper.z))
        for grad, (_, projection, group) in zip(grads, wrapper.parts):
            if grad is not None:
                projection.transpose(grad.flatten(), dz[-1 if group is None else group])
        return dz, None


class FastfoodWrapper(nn.Module):
    """Any module, trained in d dimensions: theta = theta0 + lambda_g P z.

        wrapper = FastfoodWrapper(model, d=500, layer_groups=[["conv1", "bn1"], ["layer1"]])
        wrapper(x).sum().backward()
        model.load_state_dict(wrapper.merge())

    Its own parameters are z (d - m,), from 0, and the m scales, from 1. The model's code is not
    touched: those of its parameters that require a gradient (tied ones once) are fed by
    functional_call, its buffers and its train/eval mode stay as they are. The model must be on its
    device already.

    layer_groups: lists of names of modules or parameters, each with one learned scale, taken out
    of d (Aghajanyan et al. 2020); what is in no list moves with scale 1. projection: fastfood,
    blocks as large as d with columns of norm 1 over all parameters; fastfood_tensor, the published
    one: a transform as large as each tensor, which crops z for small tensors; dense; identity.
    Raises InputError for a d that does not fit and for names that are none.
    """

    def __init__(self, model, d=None, layer_groups=None, projection="fastfood", seed=0):
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: its parameters are not ours
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = list(named)
        self.D = sum(p.numel() for p in named.values())
        self.m = len(layer_groups or [])
        d = self.D if d is None else d
        if d > self.D:
            raise InputError(f"d={d} is more than the model's {self.D:,} parameters")
        group_of = find_groups(self.names, layer_groups or [])
        n = power_of_two(d - self.m)
        self.parts = []  # of each tensor: (original, projection, number of its group or None)
        start = 0
        for name, p in named.items():
            generator = torch.Generator().manual_seed(key_seed("P", seed, name))
            size = p.numel()
            norm = (size / self.D) ** 0.5  # its share of a column's norm, 1
            small = size * n <= CHUNK  # not worth transforms
            if projection == "dense" or (projection == "fastfood" and small):
                P = Dense(size, d - self.m, norm, generator, p.device)
            elif projection == "fastfood":
                P = Fastfood(size, n, norm, generator, p.device)
            elif projection == "fastfood_tensor":
                P = Fastfood(size, power_of_two(size), 1.0, generator, p.device)
            else:
                P = Identity(start, size)
            self.parts.append((p, P, group_of.get(name)))
            start += size
        self.norm = float(nn.utils.get_total_norm(named.values()))  # ||theta0||
        self.start(d)

    def start(self, d):
        """Begin anew at theta0, with d dimensions: P's first columns."""
        if d <= self.m:
            raise InputError(
                f"d={d} must be above the {self.m} scales of layer_groups, counted in it"
            )
        like = self.parts[0][0]
        self.d = d
        self.z = nn.Parameter(torch.zeros(d - self.m, device=like.device, dtype=like.dtype))
        self.scales = nn.Parameter(torch.ones(self.m, device=like.device, dtype=like.dtype))
        return self

    def tensors(self):
        """The warped parameters, in the order of self.names."""
        if not self.m:
            return Warp.apply(self.z[None], self)
        scales = torch.cat([self.scales, self.scales.new_ones(1)])  # 1 for what is in no group
        return Warp.apply(scales[:, None] * self.z, self)  # lambda_g P z = P lambda_g z

    def call(self, tensors, *args, **kwargs):
        """The model's output with these parameters; tied names follow."""
        return functional_call(self.model, dict(zip(self.names, tensors)), args, kwargs)

    def forward(self, *args, **kwargs):
        return self.call(self.tensors(), *args, **kwargs)

    @torch.no_grad()
    def merge(self):
        """A plain state_dict of the model with the warp in it."""
        warped = {}
        for (original, _, _), tensor in zip(self.parts, self.tensors()):
            warped[id(original)] = tensor
        state = self.model.state_dict(keep_vars=True)
        return {name: warped.get(id(p), p).detach().clone() for name, p in state.items()}


def find_groups(names, layer_groups):
    """{parameter name: number of its group}; layer1 is not layer10. Raises InputError."""
    group_of = {}
    for number, prefixes in enumerate(layer_groups):
        for prefix in prefixes:
            inside = [name for name in names if f"{name}.".startswith(f"{prefix}.")]
            if not inside:
                tops = sorted({".".join(name.split(".")[:2]) for name in names})
                raise InputError(
                    f"layer_groups: nothing is called '{prefix}', only {', '.join(tops)}"
                )
            for name in inside:
                if name in group_of:
                    raise InputError(f"layer_groups: '{name}' is in two groups")
                group_of[name] = number
    return group_of


# ---- data


@dataclass
class Study:
    """Stimuli with the responses of one brain, and who is compared on them."""

    name: str
    kind: str  # text or image
    stimuli: list  # texts, or paths of images
    y: np.ndarray  # (n, V) mean responses
    group: np.ndarray  # (n,) whose members are never split
    folds: list  # {train, val, test: row numbers} of each
    meta: dict  # columns of results.csv
    candidates: list  # of Candidates
    objective: type  # of Objective
    ceiling: float = 1.0  # median R2
    pieces: list | None = None  # texts: the end that is the stimulus, behind what is read with it
    folder: Path | None = None  # of its fits
    fits: list = field(default_factory=list)

    @property
    def tested(self):
        """Rows of the test stimuli, fold after fold."""
        return np.concatenate([fold["test"] for fold in self.folds])

    def shuffled(self, number):
        """The study with its responses dealt to other stimuli; number 0: as it is."""
        return replace(self, y=self.y[shuffle_order(len(self.y), number)])


def shuffle_order(n, number):
    """Permutation of n stimuli: 0 leaves them, 1, 2, ... are shuffles, the same for everybody."""
    if not number:
        return np.arange(n)
    return np.random.default_rng(key_seed("shuffle", number)).permutation(n)


def read_studies(run, config, name):
    """The Studies of a dataset, one, or one for each person: split and checked."""
    folder = plant(run, config) if name == "synthetic_brain" else run.dataset(name)
    data = Encoding(folder)
    people = [config.subject]
    if config.subject == "each":
        people = data.units["subject"].unique()
    return [read_brain(config, name, data, person) for person in people]


def read_brain(config, name, data, person):
    """The Study of one person, or of all side by side: units chosen, repeats averaged, split."""
    group = data.stimuli["group"].to_numpy()
    folds = make_folds(config, group, data.stimuli["split"].to_numpy())
    sizes = pd.DataFrame(folds).map(len).min()
    if sizes["train"] < 20 or sizes.min() < 5:
        raise InputError(
            f"{data.path} has too few stimuli or groups: {sizes.tolist()} in train, val and test, "
            "where 20, 5 and 5 are needed; choose val_share, test_share and n_folds, or take more"
        )
    units, ceiling = choose_units(config, data, person, folds)
    y = data.mean_responses(units)
    regions = sorted(set(data.units["roi"][units]) - {""})
    meta = {"dataset": name, "subject": person or "all", "roi": "/".join(regions[:6]) or "all"}
    meta |= {key: data.meta[key] for key in ("species", "modality", "synthetic")}
    return Study(
        name=f"{name} {person}".strip(),
        kind=data.kind,
        stimuli=data.inputs(),
        y=y / (y[folds[0]["train"]].std(0).mean() or 1.0),  # one scale for all units
        group=group,
        folds=folds,
        meta=meta,
        candidates=make_candidates(config),
        objective=objective_class(config),
        ceiling=ceiling,
        pieces=data.stimuli["piece"].tolist() if "piece" in data.stimuli else None,
    )


def choose_units(config, data, person, folds):
    """((V,) bool: units of a person and region that are reliable, their median ceiling or 1).

    They are chosen on stimuli that are not tested, or by published ceilings.
    """
    units = data.select_units(person, config.roi)
    stimulus = data.presentations["stimulus"].to_numpy()
    responses = np.asarray(data.responses)[:, units].astype(np.float64)
    published = data.units["ceiling"].to_numpy()[units]
    good = ~(published <= config.reliable)
    seen = ~np.isin(stimulus, np.concatenate([fold["test"] for fold in folds]))
    if seen.any():
        good &= ~(noise_ceiling(responses[seen], stimulus[seen]) <= config.reliable)
    if not good.any():
        ceiling = f"a ceiling (R2, training stimuli) above reliable={config.reliable}"
        raise InputError(f"{data.path}: none of {len(good)} units has {ceiling}: lower it")
    units[units] = good
    ceiling = np.where(np.isnan(published), noise_ceiling(responses, stimulus), published)
    if np.isnan(ceiling).any():
        return units, 1.0
    return units, float(np.median(ceiling[good]))


def make_folds(config, group, split):
    """[{train, val, test: rows}] of one split, or of n_folds in which every group is tested once.

    A dataset's own split is kept; else groups are dealt by a key of their name.
    """
    names = sorted(set(map(str, group)), key=partial(key_seed, config.seed, "split"))
    names = np.array(names)
    if not (split == "").any() and not config.n_folds:
        split = split.copy()
        if not (split == "val").any():
            learned = names[np.isin(names, group[split == "train"])]
            val = learned[: round(config.val_share * len(learned))]
            split[np.isin(group, val) & (split == "train")] = "val"
        return [rows_of_parts(split)]
    tested = [names[: round(config.test_share * len(names))]]
    if config.n_folds:
        tested = np.array_split(names, config.n_folds)
    n_val = round(config.val_share * len(names))
    folds = []
    end = 0
    for test in tested:
        end += len(test)
        val = np.roll(names, -end)[: len(names) - len(test)][:n_val]
        split = np.full(len(group), "train")
        split[np.isin(group, val)] = "val"
        split[np.isin(group, test)] = "test"
        folds.append(rows_of_parts(split))
    return folds


def rows_of_parts(split):
    """{train, val, test: row numbers} of the part (n,) that each row is in."""
    return {part: np.flatnonzero(split == part) for part in ("train", "val", "test")}


def noise_ceiling(y, stimulus):
    """(V,) highest R2 against mean responses, from single ones y (P, V); NaN without repeats.

    s² / (s² + n² / R): n² the variance within stimuli, s² what is left of the whole, R repeats.
    """
    frame = pd.DataFrame(y).groupby(stimulus)
    repeats = frame.size().to_numpy()
    if (repeats > 1).sum() < 3:
        return np.full(y.shape[1], np.nan)
    noise = frame.var(ddof=1).to_numpy()[repeats > 1].mean(0)
    signal = np.maximum(y.var(0, ddof=1) - noise, 0)
    return signal / np.maximum(signal + noise / repeats.mean(), 1e-12)


def plant(run, config):
    """The planted brain, a dataset in out_dir/brain: what its teacher makes of texts, mixed."""
    folder = run.out / "brain"
    source = run.dataset(config.planted_stimuli) / "stimuli.csv"
    if run.master:
        texts = read_table(source, ["text", "group"], dtype=str)
        teacher = Candidate("teacher", toward="teacher", layers=tuple(config.layers))
        stimuli = texts["text"].tolist()
        study = Study("", "text", stimuli, None, None, [], {}, [teacher], None)
        loaded = load_candidate(run, config, teacher, study, 0)
        f = read_features(loaded.reader, loaded.inputs, np.arange(len(texts)), config.batch_size)
        f = f.double().cpu().numpy()
        u, s, _ = np.linalg.svd(f - f.mean(0), full_matrices=False)
        components = u[:, :PLANTED_COMPONENTS] * s[:PLANTED_COMPONENTS]
        rng = np.random.default_rng(key_seed(config.seed, "brain"))
        signal = components @ rng.standard_normal((components.shape[1], PLANTED_UNITS))
        signal = np.tile(signal / signal.std(0), (config.repeats, 1))
        sd = (config.repeats * (1 - config.planted_ceiling) / config.planted_ceiling) ** 0.5
        write_encoding(
            folder,
            texts[["text", "group"]],
            signal + sd * rng.standard_normal(signal.shape),
            pd.DataFrame({"stimulus": np.tile(np.arange(len(texts)), config.repeats)}),
            modality="planted",
            species="none",
            synthetic=True,
            source=f"mixtures of components of {config.lm}, warped by {config.planted_warp}; noise",
        )
    run.barrier()
    return folder


# ---- models


@dataclass
class Loaded:
    """A candidate, ready for its fits."""

    reader: nn.Module  # inputs -> features (B, p), or logits
    inputs: tuple  # tensors with a row for each stimulus
    architecture: str
    features: torch.Tensor | None = None  # (n, p) of all stimuli, before any warp


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
    """A language model as the features of texts, the chosen layers side by side, pooled."""

    def __init__(self, lm, layers, pool):
        super().__init__()
        self.core = lm.model
        self.lm = lm
        try:
            self.layers = lm.layers([int(layer) for layer in layers])
        except ValueError as error:
            raise InputError(f"layers={','.join(layers)}: {error}") from None
        self.pool = pool

    def forward(self, ids, real, inside):
        """ids (B, T), real (B, T): no padding, inside (B, T): tokens of the stimulus -> (B, p)."""
        width = int(real.sum(1).max())  # pads are on the right
        states = self.lm.states(ids[:, :width], real[:, :width], self.layers)
        inside = inside[:, :width]
        return torch.cat([pool_states(states[i], inside, self.pool) for i in self.layers], -1)

    def encode(self, texts, pieces):
        """ids, real and inside (n, T) of texts, whose ends `pieces` are the stimuli themselves."""
        rows = []
        masks = []
        for text, piece in zip(texts, pieces or texts):
            words = text.split(" ")
            while self.lm.encode([text])[1] and len(words) > 1:  # too long: the beginning goes
                words = words[1 + len(words) // 10 :]
                text = " ".join(words)
            rows += self.lm.encode([text])[0]
            spans = np.array(self.lm.offsets(text))
            start = len(text) - len(piece) if text.endswith(piece) else 0
            inside = (spans[:, 1] > start) & (spans[:, 1] > spans[:, 0])  # special ones are empty
            if not inside.any():
                inside[-1] = True
            masks.append(torch.from_numpy(inside))
        ids, real = self.lm.pad(rows)
        return ids, real, nn.utils.rnn.pad_sequence(masks, batch_first=True).to(ids.device)


class ModuleReader(nn.Module):
    """Any other module as features: the outputs of its modules `layers`, side by side, pooled."""

    def __init__(self, model, layers, pool):
        super().__init__()
        self.core = model
        self.layers = layers
        self.pool = pool
        self.states = {}
        modules = dict(model.named_modules())
        for layer in layers:
            if layer not in modules:
                there = ", ".join(list(modules)[1:40])
                raise InputError(f"layers: this model has no layer '{layer}'; there are {there}")
            modules[layer].register_forward_hook(partial(self.keep, layer))

    def keep(self, layer, module, inputs, output):
        if isinstance(output, tuple):
            output = output[0]
        self.states[layer] = getattr(output, "last_hidden_state", output)

    def forward(self, x):
        self.core(x)
        pooled = [pool_states(self.states.pop(layer), None, self.pool) for layer in self.layers]
        return torch.cat(pooled, -1)


class WithHead(nn.Module):
    """Features and a linear map on them, one model."""

    def __init__(self, reader, weight, bias):
        super().__init__()
        self.reader = reader
        self.head = nn.Linear(*weight.shape, device=weight.device)
        with torch.no_grad():
            self.head.weight.copy_(weight.T)
            self.head.bias.copy_(bias)

    def forward(self, *inputs):
        return self.head(self.reader(*inputs))


def load_candidate(run, config, candidate, study, draw):
    """The Loaded candidate for a study's stimuli; draw: of random weights."""
    if study.kind == "text" and ".py:" not in candidate.model:
        loaded = load_language_model(run, config, candidate, study, draw)
    else:
        loaded = load_module(run, config, candidate, study, draw)
    reader = loaded.reader.eval()
    # parameters that no feature depends on, above the layers read, are no part of theta
    reader.requires_grad_(True)
    reader(*take(loaded.inputs, slice(2))).square().sum().backward()
    for p in reader.parameters():
        p.requires_grad_(p.grad is not None)
        p.grad = None
    if candidate.toward == "teacher":
        move_toward_teacher(config, reader, candidate.share)
    return loaded


def load_language_model(run, config, candidate, study, draw):
    """A Loaded language model: ours, or any causal or masked one of transformers."""
    spec = config.lm if candidate.model == "lm" else candidate.model
    lm = HiddenStates(spec, device=run.device)
    with suppress(InputError):  # a tokenizer without a first token
        lm.write_first_token()  # each text stands behind it
    if candidate.toward == "random":
        twin = lm.random_twin(key_seed(config.seed, "model", candidate.model, draw))
        blend(lm.model, twin.model, candidate.share)
    reader = TextReader(lm, candidate.layers, config.pool)
    inputs = reader.encode(study.stimuli, study.pieces)
    return Loaded(reader, inputs, f"{type(lm.model).__name__} {lm.n_layer}x{lm.width}")


def load_module(run, config, candidate, study, draw):
    """A Loaded vision model of transformers, or module of one's own (my_file.py:constructor)."""
    if ".py:" in candidate.model:
        pair = load_function(candidate.model, "models")()
        if not isinstance(pair, tuple):
            raise InputError(
                f"models: {candidate.model} must return (module, encode), encode being a function "
                f"from a list of {study.kind} stimuli (texts, or paths of images) to a tensor"
            )
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
        torch.manual_seed(key_seed(config.seed, "model", candidate.model, draw))
        if not hasattr(model, "config"):
            raise InputError(f"models: random weights of {candidate.model} are for its constructor")
        blend(model, type(model)(model.config), candidate.share)
    reader = ModuleReader(model, candidate.layers, config.pool).to(run.device)
    return Loaded(reader, (encode(study.stimuli).to(run.device),), type(model).__name__)


@torch.no_grad()
def move_toward_teacher(config, reader, share):
    """Move a student this share of the way to its teacher: planted_warp of its norm, anywhere."""
    parameters = [p for p in reader.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(key_seed(config.seed, "teacher"))
    directions = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    norm = nn.utils.parameters_to_vector(parameters).norm()
    length = nn.utils.parameters_to_vector(directions).norm()
    for p, direction in zip(parameters, directions):
        p += direction * (share * config.planted_warp * norm / length)


@torch.no_grad()
def blend(model, other, share):
    """Move a model's parameters this share of the way to another's."""
    for p, q in zip(model.parameters(), other.parameters()):
        p.lerp_(q.to(p), share)


def split_groups(config, model):
    """The option layer_groups as lists of names; 'blocks': every repeated block is a group."""
    if config.layer_groups != "blocks":
        return [part.split(",") for part in config.layer_groups.split(";") if part]
    blocks = {}
    for name, p in model.named_parameters():
        block = re.match(r"(.+?\.)??\d+(?=\.|$)", name)
        if p.requires_grad and block:
            blocks[block[0]] = [block[0]]
    return list(blocks.values())


def take(inputs, rows):
    """The rows of all tensors that a model is given."""
    return [t[rows] for t in inputs]


@torch.no_grad()
def read_features(model, inputs, rows, batch_size):
    """(n, p) of the stimuli in rows, without gradients. model: a module, or a function."""
    rows = torch.as_tensor(rows, device=inputs[0].device)
    return torch.cat([model(*take(inputs, part)) for part in rows.split(batch_size)])


# ---- objectives: what is trained, and how it is scored


class Objective:
    """What is trained and scored. By default the model's outputs, (n, V), are the predictions.

    To add one, write its class and name it in OBJECTIVES and in Config. f: features (n, p) of
    stimuli, or what else the model puts out; rows: the numbers of these stimuli.
    """

    pairs = False  # whether pairs of stimuli are scored, (n, n), not responses to each
    parameters = ()  # what is trained beside the warp

    def __init__(self, config, study, fold, f0):
        """f0: features of the training stimuli before any warp."""
        self.config = config
        self.study = study
        self.fold = fold
        self.y = torch.as_tensor(study.y, device=f0.device)
        if self.y.is_floating_point():
            self.y = self.y.float()

    def fit(self, f_train, f_val):
        """Whatever is chosen on validation stimuli, at every validation."""

    def refit(self, f, rows):
        """Whatever is fitted anew to training and validation stimuli, before the test."""

    def loss(self, f, rows):
        return F.mse_loss(self.predict(f), self.y[rows])

    def predict(self, f):
        """What is scored: predictions (n, V), or the model's pairs of stimuli (n, n)."""
        return f

    @classmethod
    def truth(cls, config, study, rows):
        """What it is scored against: responses (n, V), or the brain's pairs (n, n)."""
        return study.y[rows]

    @classmethod
    def score(cls, config, predicted, truth, weights):
        """(B,) scores under B weightings of the stimuli, (B, n)."""
        return np.median(unit_scores(config.metric, predicted, truth, weights), axis=1)

    @classmethod
    def score_all(cls, config, predicted, truth):
        """The score of all stimuli."""
        return cls.score(config, predicted, truth, np.ones((1, len(truth))))[0]

    @torch.no_grad()
    def validate(self, f_train, f_val):
        """Score of the validation stimuli, once what they choose is chosen; nan after NaNs."""
        if not f_train.isfinite().all():
            return np.nan
        self.fit(f_train, f_val)
        truth = self.truth(self.config, self.study, self.fold["val"])
        return self.score_all(self.config, self.predict(f_val).cpu().numpy(), truth)

    @torch.no_grad()
    def test(self, f_train, f_val, f_test):
        """What is scored of the test stimuli; a readout is fitted to all others."""
        self.fit(f_train, f_val)
        rows = np.concatenate([self.fold["train"], self.fold["val"]])
        self.refit(torch.cat([f_train, f_val]), rows)
        return self.predict(f_test).cpu().numpy().astype(np.float32)


class Ridge:
    """Ridge regression with an intercept on x (n, p): one SVD for all targets and penalties."""

    def __init__(self, x):
        self.x_mean = x.mean(0)
        self.u, self.s, self.vt = torch.linalg.svd(x - self.x_mean, full_matrices=False)

    def fit(self, y):
        """To the targets y (n, V)."""
        self.y_mean = y.mean(0)
        self.uty = self.u.T @ y  # u has mean 0: that of y does not matter
        return self

    def rotated(self, alpha):
        """Weights of the components (r, V), of one penalty or one for each target (V,)."""
        s = self.s[:, None]
        return s / (s**2 + alpha) * self.uty

    def weights(self, alpha):
        """(p, V)"""
        return self.vt.T @ self.rotated(alpha)

    def predict(self, x, alpha):
        x = (x - self.x_mean) @ self.vt.T  # few components first: weights (p, V) may be large
        return x @ self.rotated(alpha) + self.y_mean

    def choose(self, x, y, alphas):
        """(V,): the penalty that predicts each target of other stimuli best."""
        errors = [(self.predict(x, alpha) - y).square().mean(0) for alpha in alphas]
        best = torch.stack(errors).argmin(0)
        return torch.tensor(alphas, dtype=x.dtype, device=x.device)[best]


class RidgeReadout(Objective):
    """The best linear readout of the features as they are, in closed form at every step.

    It counts as a constant of the loss: the gradient is that of the loss after the fit (envelope
    theorem). Validation stimuli choose a penalty for each unit. The readout sees standardised
    features, or head_dims of their principal components before any warp.
    """

    def __init__(self, config, study, fold, f0):
        super().__init__(config, study, fold, f0)
        self.mean, self.basis = head_basis(config, f0)

    def project(self, f):
        return (f - self.mean) @ self.basis

    @torch.no_grad()
    def fit(self, f_train, f_val):
        y_train = self.y[self.fold["train"]].double()
        y_val = self.y[self.fold["val"]].double()
        ridge = Ridge(self.project(f_train).double()).fit(y_train)
        self.alpha = ridge.choose(self.project(f_val).double(), y_val, self.config.alphas)
        self.refit(f_train, self.fold["train"])

    @torch.no_grad()
    def refit(self, f, rows):
        x = self.project(f).double()
        y = self.y[rows].double()
        weights = self.solve(x, y)
        self.bias = (y.mean(0) - x.mean(0) @ weights).float()
        self.weights = weights.float()

    def solve(self, x, y):
        """Weights (p, V) of y (n, V) on x (n, p)."""
        return Ridge(x).fit(y).weights(self.alpha)

    def loss(self, f, rows):
        if self.config.exact:
            self.refit(f.detach(), rows)
        penalty = (self.alpha * self.weights.square()).sum() / len(self.fold["train"])
        return super().loss(f, rows) + penalty.float() / self.y.size(1)

    def predict(self, f):
        return self.project(f) @ self.weights + self.bias


class OLSReadout(RidgeReadout):
    """Ordinary least squares, of the least norm where there are more features than stimuli."""

    def solve(self, x, y):
        self.alpha = torch.zeros(())
        return torch.linalg.pinv(x - x.mean(0)) @ (y - y.mean(0))


class PLSReadout(RidgeReadout):
    """Partial least squares, 25 components, as Brain-Score's vision benchmarks have it."""

    def solve(self, x, y):
        self.alpha = torch.zeros(())
        pls = PLSRegression(min(25, *x.shape), scale=False).fit(x.cpu().numpy(), y.cpu().numpy())
        return torch.as_tensor(pls.coef_.T).to(x)


class SGDReadout(RidgeReadout):
    """A linear readout that is trained, first by itself and then beside the warp."""

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
    refit = Objective.refit
    loss = Objective.loss


class RSA(Objective):
    """One minus the correlation of the model's distances with the brain's; no readout."""

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
            scores.append(float(cls.similarity(a, b)))
        return np.nan_to_num(np.array(scores))

    @staticmethod
    def compare(config, x):
        """What pairs of stimuli are to each other, (n, n), from x (n, p)."""
        return distances(x, config.rdm)

    @staticmethod
    def similarity(a, b):
        """How alike two such matrices are."""
        i, j = np.triu_indices(len(a), 1)
        return torch.corrcoef(torch.stack([a[i, j], b[i, j]]))[0, 1]


class CKA(RSA):
    """One minus the debiased linear CKA of model and brain (Nguyen et al. 2021); no readout."""

    @staticmethod
    def compare(config, x):
        x = x - x.mean(0)
        return x @ x.T

    @staticmethod
    def similarity(a, b):
        return cka(a.double(), b.double())


HEADS = {"ridge": RidgeReadout, "ols": OLSReadout, "pls": PLSReadout, "sgd": SGDReadout}
OBJECTIVES = {"linear": RidgeReadout, "linear_first": Objective, "rsa": RSA, "cka": CKA}


def objective_class(config):
    """The class of Objective that the options ask for."""
    return HEADS[config.head] if config.objective == "linear" else OBJECTIVES[config.objective]


def head_basis(config, f):
    """(mean, basis (p, p')) that turn features f (n, p) into what a readout sees."""
    mean = f.mean(0)
    sd = f.std(0).clamp_min(1e-6)
    if not config.head_dims:
        return mean, torch.diag(1 / sd)
    if config.head_dims > min(f.shape):
        shape = f"{len(f)} training stimuli x {f.size(1)} features"
        raise InputError(f"head_dims={config.head_dims}, but {shape} have fewer components")
    components = torch.linalg.svd((f - mean) / sd, full_matrices=False)[2][: config.head_dims]
    return mean, components.T / sd[:, None]


def cka(k, l):
    """Debiased linear CKA of Gram matrices k, l (n, n), n >= 4 (Song et al. 2012)."""
    n = len(k)

    def hsic(a, b):
        a = a - torch.diag(torch.diagonal(a))
        b = b - torch.diag(torch.diagonal(b))
        shared = a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(0) @ b.sum(0))
        return ((a * b).sum() + shared) / (n * (n - 3))

    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).clamp_min(1e-24).sqrt()


def distances(x, kind):
    """Dissimilarities (n, n) of x (n, p): 1 - correlation, or mean squared difference."""
    if kind == "correlation":
        x = x - x.mean(1, keepdim=True)
        x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return 1 - x @ x.T
    square = x.square().sum(1)
    return (square[:, None] + square[None, :] - 2 * x @ x.T) / x.size(1)


def unit_scores(metric, predicted, y, weights):
    """(B, V): r or R2 of each unit, predictions and responses (n, V), under weights (B, n)."""
    w = (weights / weights.sum(1, keepdims=True)).astype(y.dtype)
    sd = y.std(0)
    sd = np.where(sd > 0, sd, 1)  # scores have no unit: volts are as good as microvolts
    p = (predicted - y.mean(0)) / sd
    y = (y - y.mean(0)) / sd
    y_var = np.maximum(w @ y**2 - (w @ y) ** 2, 1e-12)
    if metric == "r2":
        return 1 - w @ (y - p) ** 2 / y_var
    p_var = np.maximum(w @ p**2 - (w @ p) ** 2, 0)
    covariance = w @ (p * y) - (w @ p) * (w @ y)
    # a constant prediction is no correlation, and no NaN
    return np.where(p_var > 1e-10, covariance / np.sqrt(np.maximum(p_var, 1e-10) * y_var), 0)


# ---- fits


@dataclass(frozen=True)
class Fit:
    """One of the fits of a study; its result is a file."""

    candidate: Candidate
    what: str  # warp, full, shuffles (of d = 0, in closed form), or a baseline: ols, pls, ridge
    d: int = 0
    rate: float = 0.0
    draw: int = 0  # of P, and of random weights
    fold: int = 0
    shuffle: int = 0  # of the responses; 0: the true ones

    def file(self, folder, config):
        """Its file; other weights, or another P, have another one."""
        key = {**asdict(self.candidate), "stamps": []}
        for spec in (config.lm, self.candidate.model):
            for path in [Path(spec), *sorted(Path(spec).glob("*.pt"))]:
                if path.is_file():
                    key["stamps"].append((path.name, path.stat().st_mtime_ns))
        if self.d:  # P has as many columns as a power of two of the largest d
            key["P"] = power_of_two(max(config.dims))
        if self.what == "shuffles":
            key["shuffles"] = config.shuffles
        numbers = f"{self.d}-{self.rate}-{self.draw}-{self.fold}-{self.shuffle}"
        name = quote(self.candidate.name, safe="")
        return folder / f"{name}-{self.what}-{numbers}-{hash_options(key)}.npz"


def list_fits(config, study):
    """Every Fit of a study; those without a P are made once, not for each draw of P."""
    fits = []
    folds = range(len(study.folds))
    for candidate in study.candidates:
        for draw, fold in itertools.product(range(config.seeds), folds):
            fits += fits_of_draw(config, candidate, draw, fold, config.full)
        if study.objective is RidgeReadout and config.dims[0] == 0:
            fits.append(Fit(candidate, "shuffles"))
        if config.baselines:
            for name, fold in itertools.product(("ols", "pls", "ridge"), folds):
                fits.append(Fit(candidate, name, fold=fold))
    if config.shuffled and max(config.dims):
        n_steps = sum(fit.rate > 0 for fit in fits)
        control = []
        for fold in folds:
            control += fits_of_draw(config, study.candidates[0], 0, fold, full=False)
        n_shuffles = max(1, n_steps // (10 * len(control)))  # they cost a tenth of the run
        for number in range(1, n_shuffles + 1):
            for fit in control:
                fits.append(replace(fit, shuffle=number, draw=number - 1))
    return fits


def fits_of_draw(config, candidate, draw, fold, full):
    """The Fits of one draw and fold."""
    fits = []
    first = draw == 0 or candidate.random
    if first and config.dims[0] == 0:
        fits.append(Fit(candidate, "warp", 0, 0.0, draw, fold))
    for d, rate in itertools.product(config.dims, config.learning_rates):
        if d:
            fits.append(Fit(candidate, "warp", d, rate, draw, fold))
    for rate in config.learning_rates:
        if full and first:
            fits.append(Fit(candidate, "full", 0, rate, draw, fold))
    return fits


def run_fits(run, config, studies, load):
    """Run the Fits that have no file yet; the studies share their stimuli."""
    jobs = []
    for study in studies:
        jobs += itertools.product([study], study.fits)
    jobs.sort(key=weights_of)
    todo = []
    n_trained = 0
    for study, fit in run.share(jobs):
        if not fit.file(study.folder, config).exists():
            todo.append((study, fit))
            n_trained += fit.rate > 0
    first = studies[0]
    n_train = len(first.folds[0]["train"])
    run.print(
        f"{first.meta['dataset']}: {len(first.stimuli):,} stimuli, {len(todo):,} fits to do here, "
        f"{n_trained:,} with {config.steps} steps; the bar counts stimuli that models read"
    )
    passes = config.steps + config.steps // config.eval_interval + 3  # validations and the test
    n_read = len(set(map(weights_of, todo))) * len(first.stimuli)
    bar = run.progress(n_read + n_trained * passes * n_train, desc=first.meta["dataset"])
    for weights, group in itertools.groupby(todo, weights_of):
        group = list(group)
        study, fit = group[0]
        loaded = load(run, config, fit.candidate, study, weights[1])
        loaded.reader.register_forward_hook(partial(move_bar, bar))
        rows = np.arange(len(study.stimuli))
        loaded.features = read_features(loaded.reader, loaded.inputs, rows, config.batch_size)
        for study, fit in group:
            arrays = run_fit(run, config, study.shuffled(fit.shuffle), fit, loaded)
            with aside(fit.file(study.folder, config)) as file:
                np.savez(file, architecture=loaded.architecture, **arrays)
    bar.close()


def weights_of(job):
    """(name of the candidate, draw of its random weights): what a (Study, Fit) has to load."""
    fit = job[1]
    return fit.candidate.name, fit.draw if fit.candidate.random else 0


def move_bar(bar, module, inputs, output):
    """A forward hook: the progress bar counts the stimuli that pass through a model."""
    bar.update(len(output))


def run_fit(run, config, study, fit, loaded):
    """The arrays of one Fit: evidence of the test stimuli, validation, step, curve, D."""
    if fit.what == "shuffles":
        numbers = range(1, config.shuffles + 1)
        return {"scores": linear_scores(config, study, loaded.features, numbers)}
    fold = study.folds[fit.fold]
    if fit.what in HEADS:
        config = replace(config, head_dims=0)
        return fit_readout(config, study, fold, loaded, HEADS[fit.what])[1]
    reader = loaded.reader
    if config.objective == "linear_first":
        head, _ = fit_readout(config, study, fold, loaded, HEADS[config.head])
        weight = head.basis @ head.weights.detach()
        reader = WithHead(reader, weight, head.bias.detach() - head.mean @ weight).eval()
    elif fit.what == "warp" and fit.d == 0:
        return fit_readout(config, study, fold, loaded, study.objective)[1]
    objective = study.objective(config, study, fold, loaded.features[fold["train"]])
    if fit.what == "full":
        wrapper = FastfoodWrapper(reader, projection="identity")
    elif fit.d == 0:
        wrapper = FastfoodWrapper(reader, 1)
    else:
        groups = split_groups(config, reader)
        P_seed = (config.seed, fit.draw)
        wrapper = FastfoodWrapper(reader, max(config.dims), groups, config.projection, P_seed)
        wrapper.start(fit.d)
    arrays = train(config, wrapper, objective, loaded.inputs, fit.rate, fit.draw)
    if arrays["diverged"]:
        run.print(
            f"{fit.candidate.name}, d = {fit.d or 'all'}: learning rate {fit.rate} diverged, step "
            f"{arrays['diverged']}; its best step before counts"
        )
    return {**arrays, "D": wrapper.D}


def fit_readout(config, study, fold, loaded, kind):
    """(Objective of a kind, arrays) without a warp, from the features that were read already."""
    f = loaded.features
    objective = kind(config, study, fold, f[fold["train"]])
    parts = [f[rows] for rows in (fold["train"], fold["val"], fold["test"])]
    best = objective.validate(*parts[:2])
    arrays = {"validation": best, "step": 0, "curve": np.array([(0, np.nan, best)])}
    return objective, {**arrays, "evidence": objective.test(*parts)}


def train(config, wrapper, objective, inputs, rate, draw):
    """Fit z, the scales and a readout by Adam; the step that is best on validation stimuli counts.

    rate: of a step, a share of ||theta0||; 0: no step is taken. Returns {evidence: of the test
    stimuli, validation: the best score, step, curve: (step, loss, best), diverged: 0 or the step
    at which the loss was no number}.
    """
    params = [wrapper.z, wrapper.scales, *objective.parameters]
    rates = [rate * wrapper.norm / len(wrapper.z) ** 0.5, rate]
    rates += [HEAD_RATE] * len(objective.parameters)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates)]
    adam = torch.optim.Adam(groups, eps=1e-12)
    steps = config.steps if rate else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, partial(pace, steps=steps))
    batches = draw_batches(config, objective.fold["train"], draw)
    best = {"validation": -np.inf, "step": 0, "diverged": 0}
    best_params = copy.deepcopy(params)
    loss = np.nan
    curve = []
    for step in range(steps + 1):
        if step % config.eval_interval == 0 or step == steps:
            f = warped_features(config, wrapper, inputs, objective.fold, ("train", "val"))
            score = objective.validate(*f)
            if score > best["validation"]:
                best |= {"validation": score, "step": step}
                best_params = copy.deepcopy(params)
            curve.append((step, loss, best["validation"]))
        if step == steps:
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
    f = warped_features(config, wrapper, inputs, objective.fold, ("train", "val", "test"))
    return {**best, "curve": np.array(curve), "evidence": objective.test(*f)}


def pace(step, steps):
    """Share of the learning rate: up over a tenth of the steps, then down along a cosine."""
    warm = min(1, (step + 1) / max(0.1 * steps, 1))
    return warm * 0.5 * (1 + np.cos(np.pi * step / max(steps, 1)))


def draw_batches(config, rows, draw):
    """Rows of training stimuli for each step: all, or batches in which no stimulus is twice."""
    rows = torch.as_tensor(rows)
    size = len(rows) if config.exact else min(config.batch_size, len(rows))
    generator = torch.Generator().manual_seed(key_seed(config.seed, "batches", draw))
    while True:
        order = torch.arange(size)
        if size < len(rows):
            order = torch.randperm(len(rows), generator=generator)
        for batch in order[: len(rows) // size * size].split(size):
            yield rows[batch]


def gradients(config, wrapper, objective, inputs, rows):
    """Leave the gradients of the loss on the stimuli in rows, and return the loss.

    Where they are more than a batch, the model is run again, batch by batch, on the way back: exact
    for any loss of all features, in the memory of one batch.
    """
    batches = rows.to(inputs[0].device).split(config.batch_size)
    call = wrapper.call
    if len(batches) > 1:
        call = partial(checkpoint, wrapper.call, use_reentrant=False)
    tensors = wrapper.tensors()
    f = torch.cat([call(tensors, *take(inputs, batch)) for batch in batches])
    if not f.isfinite().all():
        return np.nan
    loss = objective.loss(f, rows.numpy())
    loss.backward()
    return loss.item()


@torch.no_grad()
def warped_features(config, wrapper, inputs, fold, parts):
    """Features (n, p) of the stimuli of each of these parts of a fold."""
    model = partial(wrapper.call, wrapper.tensors())
    return [read_features(model, inputs, fold[part], config.batch_size) for part in parts]


def linear_scores(config, study, f, numbers):
    """(N,) scores at d = 0 with the responses dealt to other stimuli by shuffles of these numbers.

    Shuffles are further units: one SVD a fold is enough, and penalties are chosen for each.
    """
    y = study.y.astype(np.float32)
    ridges = []
    for fold in study.folds:
        mean, basis = head_basis(config, f[fold["train"]])
        x = ((f - mean) @ basis).cpu()
        others = np.concatenate([fold["train"], fold["val"]])
        ridges.append((x, fold, others, Ridge(x[fold["train"]]), Ridge(x[others])))
    orders = np.array([shuffle_order(len(y), number) for number in numbers])
    scores = []
    n_chunks = -(-y.size * len(orders) // 2**20)  # each fits a cache
    for chunk in np.array_split(orders, n_chunks):
        shuffled = torch.from_numpy(y[chunk].transpose(1, 0, 2).reshape(len(y), -1))
        predicted = []
        truth = []
        for x, fold, others, ridge, refitted in ridges:
            ridge.fit(shuffled[fold["train"]])
            alpha = ridge.choose(x[fold["val"]], shuffled[fold["val"]], config.alphas)
            refitted.fit(shuffled[others])
            predicted.append(refitted.predict(x[fold["test"]], alpha).numpy())
            truth.append(shuffled[fold["test"]].numpy())
        equal = np.ones((1, len(study.tested)))
        units = unit_scores(config.metric, join_folds(predicted), join_folds(truth), equal)
        scores.append(np.median(units.reshape(len(chunk), -1), axis=1))
    return np.concatenate(scores)


def join_folds(parts):
    """Predictions or responses (n, V) of all folds, one below the other.

    Of several folds each is centred: the mean of those left out differs from the mean of the rest,
    which would be taken for a (negative) prediction.
    """
    if len(parts) > 1:
        parts = [part - part.mean(0) for part in parts]
    return np.concatenate(parts)


# ---- evaluate


def assemble(config, study, fits):
    """The arrays of one model at one d, with `predicted` and `truth` of all folds.

    The fits differ in learning rate, which validation chooses, and in fold.
    """
    kind = study.objective
    study = study.shuffled(fits[0].shuffle)
    predicted = []
    truth = []
    for number, fold in enumerate(study.folds):
        tried = []
        for fit in fits:
            if fit.fold == number:
                with np.load(fit.file(study.folder, config)) as file:
                    tried.append({**file, "rate": fit.rate})
        best = max(tried, key=itemgetter("validation"))
        predicted.append(best["evidence"])
        truth.append(kind.truth(config, study, fold["test"]))
    return {**best, "predicted": join_folds(predicted), "truth": join_folds(truth)}


def resample(config, study):
    """(draws, n) weightings of the test stimuli: groups with replacement.

    For pairs (a stimulus beside itself is no pair) half of the groups, which varies as much.
    """
    rng = np.random.default_rng(key_seed(config.seed, "bootstrap"))
    names, number = np.unique(study.group[study.tested], return_inverse=True)
    n_groups = len(names)
    if study.objective.pairs:
        half = np.arange(n_groups) < max(n_groups // 2, min(n_groups, 6))
        chosen = rng.permuted(np.tile(half, (config.draws, 1)), axis=1)
    else:
        chosen = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), config.draws)
    return chosen[:, number].astype(float)


def interval(draws):
    """The middle 95 %, infinities included."""
    return tuple(np.quantile(draws, [0.025, 0.975], method="inverted_cdf"))


def in_words(score, low, high):
    """A score with its interval."""
    return f"{score:.3f} [{low:.3f}, {high:.3f}]"


def null_scores(config, study, fit, cell):
    """Scores without knowledge: refitted to shuffled responses where that is ridge at d = 0.

    Elsewhere predictions are shuffled instead: `shuffles` times at d = 0, 20 times at any other d.
    """
    shuffles = Fit(fit.candidate, "shuffles")
    at_zero = fit == replace(fit, what="warp", d=0, draw=0, shuffle=0)
    if at_zero and shuffles in study.fits:
        with np.load(shuffles.file(study.folder, config)) as file:
            return file["scores"]
    rng = np.random.default_rng(key_seed(config.seed, "chance"))
    scores = []
    for _ in range(config.shuffles if at_zero else 20):
        order = rng.permutation(len(cell["truth"]))
        shuffled = cell["predicted"][order]
        if study.objective.pairs:
            shuffled = shuffled[:, order]
        scores.append(study.objective.score_all(config, shuffled, cell["truth"]))
    return np.array(scores)


@dataclass
class Scored:
    """What one model scores at one d, in one draw."""

    score: float
    draws: np.ndarray  # (B,) bootstrap over test stimuli
    null: np.ndarray  # (N,) scores without knowledge
    steps: np.ndarray  # training curve

    def p(self):
        return (1 + (self.null >= self.score).sum()) / (1 + len(self.null))


def score_fits(run, config, study, fits, weights):
    """Scored, of one model at one d and in one draw; and its row of results."""
    fit = fits[0]
    cell = assemble(config, study, fits)
    predicted = cell["predicted"]
    truth = cell["truth"]
    scored = Scored(
        score=study.objective.score_all(config, predicted, truth),
        draws=study.objective.score(config, predicted, truth, weights),
        null=null_scores(config, study, fit, cell),
        steps=cell["curve"],
    )
    D = int(cell.get("D", 0))
    ceiling = study.ceiling ** (0.5 if config.metric == "r" else 1)
    baseline = fit.what in HEADS
    run.result(
        scored.score,
        scored.null.mean(),
        *interval(scored.draws),
        len(truth),
        p=scored.p(),
        measure="baseline" if baseline else "score",
        model=fit.candidate.name,
        architecture=str(cell["architecture"]),
        layer="+".join(fit.candidate.layers),
        **study.meta,
        objective=fit.what if baseline else config.objective,
        projection=config.projection if fit.what == "warp" else "none",
        control="shuffled" if fit.shuffle else "none",
        d=D if fit.what == "full" else fit.d,
        D=D,
        seed=fit.draw,
        ceiling=ceiling,
        normalised=scored.score / ceiling,
        validation=float(cell["validation"]),
        learning_rate=cell["rate"],
        step=int(cell["step"]),
    )
    return scored


def report_people(run, people):
    """Mean over people of the scores at d = 0: rows of results and of the table.

    people: the Curves of each. p: of the mean, under the same shuffles of stimuli for all; p
    over people: of a t-test of what each person's score has above its own null.
    """
    rows = []
    for curves in zip(*people):  # of one model
        name = curves[0].name
        zeros = pd.DataFrame([vars(curve.first[0]) for curve in curves])
        scores = zeros["score"].to_numpy()
        nulls = np.stack(zeros["null"])  # (people, shuffles)
        mean = Scored(scores.mean(), scores, nulls.mean(0), None)
        test = scipy.stats.ttest_1samp(scores - nulls.mean(1), 0)
        low, high = np.array(test.confidence_interval()) + nulls.mean()
        columns = {"measure": "score", "model": name, "subject": "mean", "d": 0, "control": "none"}
        columns["dataset"] = curves[0].meta["dataset"]
        columns |= {"p": mean.p(), "p_people": test.pvalue}
        run.result(mean.score, nulls.mean(), low, high, len(people), **columns)
        row = {"dataset": columns["dataset"], "person": f"mean of {len(people)}", "model": name}
        row["score at 0"] = in_words(mean.score, low, high)
        row |= {"null": f"{nulls.mean():.3f}", "p": f"{mean.p():.2g}"}
        row["p over people"] = f"{test.pvalue:.2g}"
        p = (1 + (scores <= nulls.T).sum(0)) / (1 + nulls.shape[1])
        row["p < .05"] = str((p < 0.05).sum())
        rows.append(row)
    return rows


@dataclass
class Curve:
    """Scores of one candidate over d, and what they say."""

    name: str
    control: str  # none or shuffled
    meta: dict  # of the study
    points: np.ndarray  # (seeds, dims)
    boot: np.ndarray  # (B, dims), over seeds and test stimuli
    first: dict  # {d or all: Scored} of the first draw
    full: float = np.nan  # score of all parameters
    full_boot: np.ndarray | None = None  # (B,)
    d_warp: dict = field(default_factory=dict)  # {absolute, relative: (value, draws (B,))}
    level: float = np.nan  # of the absolute one
    row: dict = field(default_factory=dict)  # of the table

    @property
    def mean(self):
        return self.points.mean(0)


def read_curves(run, config, study, weights):
    """The Curves of all candidates, and of the first one on shuffled responses."""
    groups = {}
    for fit in study.fits:
        if fit.what in ("warp", "full"):
            d = "all" if fit.what == "full" else fit.d
            cells = groups.setdefault((fit.candidate, fit.shuffle > 0), {})
            cells.setdefault((fit.draw, d), []).append(fit)
    curves = []
    for (candidate, shuffled), cells in groups.items():
        scored = {}
        for (_, d), fits in cells.items():
            draw = score_fits(run, config, study, fits, weights)
            scored.setdefault(d, []).append(draw)
        curve = make_curve(config, candidate.name, study.meta, scored)
        if shuffled:
            curve.name += " (shuffled responses)"
            curve.control = "shuffled"
        curve.row = {"dataset": study.meta["dataset"], "person": study.meta["subject"]}
        curve.row["model"] = curve.name
        if 0 in curve.first:
            zero = curve.first[0]
            curve.row["score at 0"] = in_words(zero.score, *interval(zero.draws))
            curve.row |= {"null": f"{zero.null.mean():.3f}", "p": f"{zero.p():.2g}"}
        curves.append(curve)
    return curves


def make_curve(config, name, meta, scored):
    """The Curve of {d or all: Scored of each draw, or of the only one where there is no P}."""
    n_draws = max(map(len, scored.values()))
    rng = np.random.default_rng(key_seed(config.seed, "seeds"))
    chosen = rng.integers(0, n_draws, (config.draws, n_draws))
    points = {}
    boots = {}
    first = {}
    for d, draws in scored.items():
        first[d] = draws[0]
        if len(draws) == 1:
            draws = draws * n_draws
        points[d] = [draw.score for draw in draws]
        resampled = np.array([draw.draws for draw in draws]).T  # (B, draws)
        boots[d] = np.take_along_axis(resampled, chosen, axis=1).mean(1)
    boots = pd.DataFrame(boots)
    points = pd.DataFrame(points)
    dims = config.dims
    curve = Curve(name, "none", meta, points[dims].to_numpy(), boots[dims].to_numpy(), first)
    if "all" in points:
        curve.full = points["all"].mean()
        curve.full_boot = boots["all"].to_numpy()
    return curve


def crossing(dims, scores, level):
    """The least d where the isotonic curve over log10(1 + d) reaches level; inf where none does."""
    x = np.log10(1 + np.asarray(dims, float))
    rising = isotonic_regression(scores)
    if rising[-1] < level:
        return np.inf
    i = np.argmax(rising >= level)
    if i == 0:
        return float(dims[0])
    return float(10 ** np.interp(level, rising[i - 1 : i + 1], x[i - 1 : i + 1]) - 1)


def measure_d_warp(config, curves):
    """Fill in d_warp: absolute, to a score common to all; relative, to a share of one's own.

    In every bootstrap draw the level is measured again.
    """
    B = len(curves[0].boot)
    if config.common in ("lowest", "highest"):
        pick = min if config.common == "lowest" else max
        model = pick([c for c in curves if c.full_boot is not None], key=attrgetter("full"))
        common = config.common_share * np.append(model.full, model.full_boot)
    else:
        common = np.full(1 + B, float(config.common))
    for curve in curves:
        scores = np.vstack([curve.mean, curve.boot])  # the first row is no draw
        curve.level = common[0]
        levels = {"absolute": common}
        if curve.full_boot is not None:
            full = np.append(curve.full, curve.full_boot)
            start = scores[:, 0] if config.dims[0] == 0 else 0.0
            levels["relative"] = start + config.reach * (full - start)
        for name, values in levels.items():
            crossings = np.array([crossing(config.dims, *row) for row in zip(scores, values)])
            curve.d_warp[name] = crossings[0], crossings[1:]


def report_d_warp(run, config, study, curves):
    """d_warp of every candidate and how pairs compare: rows of results, columns of the table."""
    last = max(config.dims)
    words = partial(dims_in_words, last=last)
    B = len(curves[0].boot)
    shared = {**study.meta, "objective": config.objective, "projection": config.projection}
    shared |= {"d": 0, "seed": -1}
    for curve in curves:
        columns = {**shared, "model": curve.name, "control": curve.control}
        curve.row["level"] = f"{curve.level:.3f}"
        for name, (value, draws) in curve.d_warp.items():
            low, high = interval(draws)
            curve.row[f"d_warp, {name}"] = f"{words(value)} [{words(low)}, {words(high)}]"
            columns["measure"] = f"d_warp {name}"
            columns["state"] = "censored" if np.isinf(value) else "reached"
            run.result(min(value, last), last, min(low, last), min(high, last), B, **columns)
        d = np.broadcast_to(config.dims, curve.points.shape).ravel()
        trend = scipy.stats.kendalltau(d, curve.points.ravel(), alternative="greater")
        curve.row |= {f"at {last}": f"{curve.mean[-1]:.3f}", "at all": f"{curve.full:.3f}"}
        curve.row["p of a rise"] = f"{trend.pvalue:.2g}"
    for a, b in itertools.combinations(curves, 2):
        if "shuffled" in (a.control, b.control):
            continue
        near = np.append(*a.d_warp["absolute"]).clip(max=last)
        far = np.append(*b.d_warp["absolute"]).clip(max=last)
        ratio = np.log10(1 + far) - np.log10(1 + near)
        low, high = interval(ratio[1:])
        columns = {"measure": "difference of log10(1 + d_warp)", "model": f"{b.name} - {a.name}"}
        run.result(ratio[0], 0.0, low, high, B, **columns, **shared)
        run.print(
            f"{b.name} needs {10 ** ratio[0]:.2g} [{10**low:.2g}, {10**high:.2g}] times the d of "
            f"{a.name} (1 + d_warp, cut at {last:,}, paired)"
        )


def dims_in_words(d, last):
    """A number of dimensions for a table."""
    if np.isinf(d):
        return f"> {last:,}"
    return f"{d:.1f}" if 0 < d < 9.95 else f"{d:,.0f}"


# ---- plots


def save(figure, path):
    """Write a figure aside, then in place, and close it."""
    with aside(path) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def plot_curves(path, config, curves, about):
    """Score over d with its isotonic fit and all parameters; d_warp against the first score."""
    x = np.log10(1 + np.array(config.dims))
    end = 1.08 * max(x[-1], 0.5)  # the place of the full model
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5), layout="constrained")
    for i, curve in enumerate(curves):
        color = f"C{i}" if curve.control == "none" else "0.6"
        rising = isotonic_regression(curve.mean)
        band = np.quantile(curve.boot, [0.025, 0.975], axis=0)
        left.fill_between(x, *band, color=color, alpha=0.15, lw=0)
        left.plot(x, rising, color=color, label=curve.name)
        left.plot(x, curve.points.T, ".", color=color, ms=4)
        if curve.full_boot is not None:
            left.plot([x[-1], end], [rising[-1], curve.full], ":D", color=color, markevery=[1])
        value, draws = curve.d_warp["absolute"]
        ends = np.log10(1 + np.array([*interval(draws), value])).clip(max=x[-1])
        right.plot([curve.mean[0]] * 2, ends[:2], color=color, lw=3, alpha=0.5)
        marker = "^" if np.isinf(value) else "o"
        right.plot(curve.mean[0], ends[2], marker, color=color, ms=9, label=curve.name)
    left.axhline(curve.level, ls="--", c="0.5", lw=1, label=f"level {curve.level:.2f}")
    left.set_xticks([*x, end], [*config.dims, "all"])
    left.set(xlabel="dimensions of the warp, d", ylabel="test score")
    left.set_title("isotonic fit, draws of P, 95 % band", fontsize=10)
    right.set_yticks(x, config.dims)
    right.set(xlabel=f"score at d = {config.dims[0]}", ylabel="d_warp, absolute (▲: not reached)")
    for axis in (left, right):
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(about, fontsize=10)
    save(figure, path)


def plot_training(path, curves, about):
    """Best validation score over steps, a line for each d, a panel for each candidate."""
    size = 3.4 * len(curves), 3.4
    figure, axes = plt.subplots(
        1, len(curves), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, curve in zip(axes[0], curves):
        for d, scored in curve.first.items():
            axis.plot(scored.steps[:, 0], scored.steps[:, 2], ".-", label=f"d = {d}")
        axis.set_title(curve.name, fontsize=9)
        axis.set_xlabel("step")
    axes[0, 0].set_ylabel("best validation score")
    axes[0, -1].legend(fontsize=7, frameon=False)
    figure.suptitle(f"training curves, first draw; {about}", fontsize=9)
    save(figure, path)


def report(run, config, study):
    """Write the rows of results and figures of a study; returns its Curves."""
    weights = resample(config, study)
    predictions = replace(study, objective=Objective)  # baselines, whatever the objective is
    baselines = [fit for fit in study.fits if fit.what in HEADS]
    for _, fits in itertools.groupby(baselines, attrgetter("candidate", "what")):
        score_fits(run, config, predictions, list(fits), weights)
    curves = read_curves(run, config, study, weights)
    if max(config.dims):
        measure_d_warp(config, curves)
        report_d_warp(run, config, study, curves)
        about = f"{study.name}{', synthetic' * study.meta['synthetic']}"
        about += f"; {config.objective} ({config.metric}), {config.projection}"
        place = run.out / quote(study.name, safe=" ")
        if len(config.dataset) == 1 and config.subject != "each":
            place = run.out
        place.mkdir(exist_ok=True)
        plot_curves(place / "curves.png", config, curves, about)
        plot_training(place / "training.png", curves, about)
    return curves


def sweep(run, config, studies, load):
    """All fits of one dataset, a study a person, and what they say: rows of the table.

    load(run, config, candidate, study, draw) gives a Loaded.
    """
    options = asdict(config)
    for key in ANALYSIS:
        options.pop(key, None)
    for study in studies:  # other options or responses: other fits
        content = hashlib.sha256(study.y.tobytes()).hexdigest()[:8]
        study.folder = run.out / "fits" / f"{hash_options(options)}-{content}"
        study.folder.mkdir(parents=True, exist_ok=True)
        study.fits = list_fits(config, study)
    run_fits(run, config, studies, load)
    run.barrier()
    rows = []
    if run.master:
        people = []
        for study in studies:
            curves = report(run, config, study)
            people.append(curves)
            rows += [curve.row for curve in curves]
        if len(studies) > 1 and config.dims[0] == 0:
            rows += report_people(run, people)
    return rows


def main(config):
    run = Run(config)
    datasets = [read_studies(run, config, name) for name in config.dataset]
    content = hashlib.sha256()
    for study in itertools.chain(*datasets):
        content.update(study.y.tobytes())
    run.content = content.hexdigest()[:6]
    rows = []
    for studies in datasets:
        rows += sweep(run, config, studies, load_candidate)
    close(run, rows)


def close(run, rows):
    """Write and print the table, and end the run."""
    if run.master:
        table = pd.DataFrame(rows)
        write_aside(run.out / "table.csv", table.to_csv(index=False))
        run.print(table.to_string(index=False, na_rep=""))
        run.print(f"figures, table.csv and results.csv in {run.out}")
    run.merge()
    run.close()


if __name__ == "__main__":
    main(configure(Config))
