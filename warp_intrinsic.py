"""Measure how many dimensions a task needs, with the warps of warp.py in small networks.

    python warp_intrinsic.py config/warp_digits.yaml      # published check: digits, at two widths
    python warp_intrinsic.py config/warp_simulation.yaml  # three functions bent into a fourth

Digits: the smallest d that reaches 90 % of the accuracy of training everything hardly depends on
the width (Li et al. 2018). Functions: networks that compute x², x³ and sin(πx/2) are bent into
sin(3πx/4); the closest needs the fewest dimensions.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import warp
from configurator import Run, configure, key_seed
from warp import Candidate, FastfoodWrapper, Loaded, Objective, Study

FUNCTIONS = {
    "x²": lambda x: x**2,
    "x³": lambda x: x**3,
    "sin(πx/2)": lambda x: np.sin(np.pi * x / 2),
}


@dataclass
class Config:
    task: Literal["digits", "functions"] = "digits"  # scikit-learn's digits, or the simulation
    widths: list[int] = warp.default(50, 200)  # of the classifiers
    # ---- warping, as in warp.py
    dims: list[int] = warp.default(20, 40, 80, 120, 160, 240)
    full: bool = True
    projection: warp.Projection = "fastfood"
    layer_groups: str = ""
    seeds: int = 3  # draws of P and of the first weights
    steps: int = 400
    learning_rates: list[float] = warp.default(0.03, 0.1)
    eval_interval: int = 40
    batch_size: int = 2000
    exact: bool = True
    # ---- d_warp, as in warp.py
    common: str = "lowest"
    common_share: float = 0.9
    reach: float = 0.9
    draws: int = 1000
    # ---- run
    out_dir: str = "out/warp_digits"
    seed: int = 1337
    device: str = "auto"
    dtype: Literal["float32"] = "float32"

    POSITIVE = "widths dims seeds steps eval_interval batch_size draws learning_rates reach"
    POSITIVE += " common_share"
    # fixed values of warp.py's options
    objective = "output"
    metric = "r2"
    lm = ""
    subject = ""
    dataset = ["one"]
    shuffles = 1000
    shuffled = False
    check = warp.check_dims


class Classes(Objective):
    """The network's outputs are logits; the score is their accuracy."""

    def loss(self, f, rows):
        return F.cross_entropy(f, self.y[rows])

    @classmethod
    def score(cls, config, predicted, truth, weights):
        return weights @ (predicted.argmax(1) == truth) / weights.sum(1)


def read_digits(config):
    """Return Candidates and the Study of scikit-learn's digits: 60 % train, 10 % val, 30 % test."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(key_seed(config.seed, "digits")).permutation(len(y))
    parts = np.split(order, [len(y) * 6 // 10, len(y) * 7 // 10])
    study = Study(
        name="digits",
        kind="vector",
        stimuli=(x / 16).astype(np.float32),
        y=y,
        group=np.arange(len(y)),
        folds=[dict(zip(warp.PARTS, parts))],
        objective=Classes,
        meta={"dataset": "digits", "subject": "", "synthetic": False},
    )
    return [Candidate(f"width {n}", str(n), toward="random") for n in config.widths], study


def read_functions(config):
    """Return Candidates and the Study: normal x (sorted in the test part) and sin(3πx/4)."""
    rng = np.random.default_rng(key_seed(config.seed, "x"))
    x = rng.standard_normal((4000, 1)).astype(np.float32)
    x[3000:] = np.sort(x[3000:], axis=0)
    parts = np.split(np.arange(4000), [2000, 3000])
    study = Study(
        name="sin(3πx over 4)",
        kind="vector",
        stimuli=x,
        y=np.sin(0.75 * np.pi * x),
        group=np.arange(4000),
        folds=[dict(zip(warp.PARTS, parts))],
        objective=Objective,
        meta={"dataset": "sin(3πx/4)", "subject": "", "synthetic": True},
        ceiling=1.0,
    )
    return [Candidate(name, name, toward="random") for name in FUNCTIONS], study


def load_network(run, config, study, candidate, weights):
    """Return a Loaded ReLU network: a new classifier, or one that computes a function already."""
    torch.manual_seed(key_seed(config.seed, "model", candidate.model, weights))
    x = torch.from_numpy(study.stimuli).to(run.device)
    if config.task == "digits":
        width = int(candidate.model)
        sizes = [64, width, width, 10]
    else:
        sizes = [1, 128, 128, 1]
    layers = []
    for before, after in zip(sizes, sizes[1:]):
        layers += [nn.Linear(before, after, bias=after > 1), nn.ReLU()]
        if config.task == "digits":
            nn.init.kaiming_normal_(layers[-2].weight)
            nn.init.zeros_(layers[-2].bias)
    network = nn.Sequential(*layers[:-1]).to(run.device)
    if config.task == "functions":  # fit the candidate's own function first
        source = replace(study, y=FUNCTIONS[candidate.model](study.stimuli))
        wrapper = FastfoodWrapper(network, 16_896, projection="identity")
        objective = Objective(config, source, study.folds[0], x)
        warp.train(config, wrapper, objective, x, 0.05, weights)
        network.load_state_dict(wrapper.merge())
    features = warp.read_features(network, x, np.arange(len(x)), config.batch_size)
    return Loaded(network, x, features)


def plot_functions(run, config, study, cells):
    """Plot the target, each candidate (rows) and its warp in d dimensions (columns)."""
    fitted = {}
    for cell in cells:
        if cell.seed == 0:
            _, predicted, truth = warp.read_cell(run, config, study, cell)
            fitted[cell.candidate.name, cell.d] = predicted
    dims = [d for d in config.dims if d]
    size = (2.1 * len(dims), 2.2 * len(FUNCTIONS))
    figure, axes = plt.subplots(len(FUNCTIONS), len(dims), figsize=size, squeeze=False)
    x = study.stimuli[study.tested, 0]
    for name, row in zip(FUNCTIONS, axes):
        for d, axis in zip(dims, row):
            axis.plot(x, fitted[name, 0], label="d = 0")
            axis.plot(x, fitted[name, d], "--", label="warped")
            axis.plot(x, truth, lw=1, label="target")
            axis.set(xlim=(-1, 1), ylim=(-1.6, 1.6))
            r2 = Objective.score_all(config, fitted[name, d], truth)
            axis.set_title(f"{name}, d = {d}: R² {r2:.2f}", fontsize=8)
    axes[0, 0].legend(fontsize=6, frameon=False)
    figure.suptitle("networks 1-128-128-1 bent into sin(3πx/4); synthetic", fontsize=11)
    figure.set_layout_engine("constrained")
    figure.savefig(run.out / "simulation.png", dpi=130)


def main(config):
    run = Run(config)
    read = read_digits if config.task == "digits" else read_functions
    candidates, study = read(config)
    run.content = study.content
    cells = warp.list_cells(config, candidates)
    load = lru_cache(1)(partial(load_network, run, config, study))
    warp.fit_all(run, config, [study], cells, load)
    if run.master:
        scores = warp.score_cells(run, config, study, cells)
        warp.report_d_warp(run, config, study, scores)
        if config.task == "functions":
            plot_functions(run, config, study, cells)
    warp.close(run, config)


if __name__ == "__main__":
    main(configure(Config))
