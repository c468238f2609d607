"""How much faster, smaller or leaner than the alternative, measured here and now.

    python bench.py                  # every claim
    python bench.py swap             # one or some of them
    python bench.py --json           # the same rows as a JSON list

A claim is one function below: it runs ours and an honest alternative in turns, several times, and gives back a row. `ratio` is how many times
faster ours is where the target reads >=, ours over the other where it reads <=, with the smallest and largest ratio of the turns; the alternative
is what a careful person writes first, in the same precision, on the same device.
"""
import difflib
import json
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import positions
import topography
import warp
from model import GPT, GPTConfig


# ---- measuring

def seconds(function):
    """Wall time of one call, and what it returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def row(name, ours, other, target, device, note=""):
    """A row of the table from times (s) of the turns, ours[i] measured next to other[i]."""
    ratios = [a / b if target.startswith("<=") else b / a for a, b in zip(ours, other)]
    return dict(name=name, ours=f"{1e3 * statistics.median(ours):.3g} ms", other=f"{1e3 * statistics.median(other):.3g} ms",
                ratio=round(statistics.median(ratios), 2), low=round(min(ratios), 2), high=round(max(ratios), 2), turns=len(ratios),
                target=target, device=device, note=note)


def cpu():
    """The CPU as the table names it."""
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


# ---- claims

def swap(turns=3, n_units=784, n_head=16, radius=10, samples=4096, trials=2000):
    """Pre-optimisation of one layer's sheet: time to the loss (mean over all windows) that recomputing at each trial swap has after 2,000 trials.

    Ours, from the activations on: correlations once, spectral layout, batches of best swaps until that loss is reached."""
    model = GPT(GPTConfig(block_size=256, vocab_size=4096, n_layer=2, n_head=n_head, n_embd=n_units, bias=False))
    words = np.random.default_rng(0).zipf(1.2, 16 * samples)  # word frequencies like a language's
    idx = torch.as_tensor(words[words < 4096][:samples]).view(-1, 256)
    with torch.no_grad():
        x = model(idx, hidden=["layer.1.mlp"]).hidden["layer.1.mlp"].flatten(0, 1).clone()  # (samples, n_units)
    sheet = positions.Sheet(n_units, radius)
    near = torch.as_tensor(positions.closeness(sheet.cells[0], sheet.side), dtype=torch.float32)

    def loss(unit_at_cell):
        return positions.spatial_loss(x, torch.as_tensor(unit_at_cell[sheet.cells]), near).item()

    def preoptimise(stop_loss):
        return positions.swap_sheet(positions.correlations(x), sheet, stop_loss=stop_loss)[0]

    ours, other, losses = [], [], []
    for turn in range(turns):
        start = positions.random_positions(1, n_units, turn)[0]
        taken, layout = seconds(partial(recomputing_swaps, x, start, sheet.cells, near, trials, turn))
        target = loss(layout)
        times = []
        for _ in range(11):
            t, layout = seconds(partial(preoptimise, target))
            times.append(t)
        assert sorted(layout) == list(range(n_units)) and loss(layout) <= target + 1e-6, "ours did not reach the alternative's loss"
        ours.append(statistics.median(times))
        other.append(taken)
        losses.append((loss(start), target, loss(layout)))
    note = "loss {:.3f} at the start, {:.3f} recomputing, {:.3f} ours".format(*np.median(losses, 0))
    return row("swap", ours, other, ">= 500", cpu(), note)


def recomputing_swaps(x, unit_at_cell, cells, near, trials, seed, per_window=50):
    """The textbook: at each trial swap, features → correlations → loss of the window, kept unless the loss rises. x (T, C) float32."""
    rng, n = np.random.default_rng(seed), cells.shape[1]
    lower = torch.tril_indices(n, n, -1)
    lower = lower[0] * n + lower[1]  # of the flattened (n, n)
    d = near.flatten()[lower]
    d = (d - d.mean()) / (d - d.mean()).norm()

    def loss(features):
        r = torch.corrcoef(features.t()).flatten()[lower]
        r = r - r.mean()
        return 0.5 * (1 - (r @ d) / r.norm()).item()

    row = unit_at_cell.copy()
    for window in rng.permutation(len(cells))[:trials // per_window]:
        at = cells[window]
        features = x[:, row[at]]  # (T, n)
        least = loss(features)
        for _ in range(per_window):
            a, b = rng.choice(n, 2, replace=False)
            features[:, [a, b]] = features[:, [b, a]]
            new = loss(features)
            if new <= least:
                least = new
                row[at[[a, b]]] = row[at[[b, a]]]
            else:
                features[:, [a, b]] = features[:, [b, a]]
    return row


class Here:
    """What a measuring function of a script needs of a Run: this machine's device, and its precision."""

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() else torch.float32

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)


class Words:
    """A tokenizer whose texts are numbers: what encoding costs is left out on both sides."""

    eot = 0

    def encode(self, text):
        return list(map(int, text.split()))


def minimal_pairs(turns=5, pairs=500):
    """Log-probabilities of both sentences of minimal pairs of 6 to 16 tokens under the embedded model's shape: in batches by length, against one
    sentence at a time, in the same precision."""
    model = GPT(GPTConfig(block_size=128, vocab_size=4096, n_layer=4, n_head=4, n_embd=256, bias=False)).to(Here.device).eval()
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(1, 4096, n))) for n in rng.integers(6, 17, 2 * pairs)]

    def score(budget):
        return topography.sentence_logprobs(Here(), model, Words(), texts, budget)

    score(2048), score(1)  # warm up
    ours, other = [], []
    for _ in range(turns):
        taken, together = seconds(partial(score, 2048))
        ours.append(taken)
        taken, single = seconds(partial(score, 1))  # a budget of one token: every sentence alone
        other.append(taken)
    assert np.abs(together - single).max() < 0.02 * np.abs(single).max(), "batched and single scores differ"
    return row("minimal_pairs", ours, other, ">= 5", cpu(), f"{2 * pairs} sentences, {str(Here.dtype)[6:]}")


def fastfood(turns=3, bits=24, d=1000):
    """From z to 2^24 parameters and back, P a Fastfood with normal diagonal: blocks of 2^10 by small matrix products, against one transform of the whole
    length by the textbook butterfly that concatenates sums and differences."""
    size = 2 ** bits
    holder = nn.Module()
    holder.p = nn.Parameter(torch.zeros(size, device=Here.device))
    w, grad = warp.FastfoodWrapper(holder, d), torch.randn(size, device=Here.device)
    sign, g, order = torch.randint(0, 2, (size,), device=Here.device) * 2.0 - 1, torch.randn(size, device=Here.device), torch.randperm(size, device=Here.device)
    z = torch.zeros(d, device=Here.device, requires_grad=True)

    def butterfly(x):
        h = 1
        while h < size:
            x = x.view(-1, 2, h)
            x = torch.cat([x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], 1)
            h *= 2
        return x.view(-1)

    def theirs():
        (butterfly(g * butterfly(sign * F.pad(z, (0, size - d)))[order]) / size).backward(grad)

    def ours():
        w.tensors()[0].backward(grad)

    ours()
    pairs = [(seconds(ours)[0], seconds(theirs)[0]) for _ in range(turns)]
    return row("fastfood", *zip(*pairs), ">= 8", cpu() if Here.device.type == "cpu" else "GPU", f"D = 2^{bits}, d = {d}, forward and backward")


def warp_step(turns=9, steps=40, d=750):
    """A training step of a 784-200-200-10 network in 750 dimensions, against the step of the whole network; batch 128, fused Adam on both sides."""
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)).to(Here.device)

    x, y = torch.randn(128, 784, device=Here.device), torch.randint(0, 10, (128,), device=Here.device)

    def run(model, adam):
        for _ in range(steps):
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()

    models = [warp.FastfoodWrapper(network(), d), network()]
    runs = [partial(run, m, torch.optim.Adam(m.parameters(), 1e-3, fused=True)) for m in models]
    for r in runs:
        r()
    pairs = [[seconds(r)[0] / steps for r in runs] for _ in range(turns)]
    return row("warp_step", *zip(*pairs), "<= 2.5", cpu() if Here.device.type == "cpu" else "GPU", f"D = {models[0].D:,}, d = {d}, batch 128")


def sweep_problem(stimuli=256, tokens=12, width=64, layers=2, units=64):
    """A tiny GPT as a reader, its inputs, and planted responses."""
    rng = np.random.default_rng(0)
    model = GPT(GPTConfig(block_size=tokens, vocab_size=256, n_layer=layers, n_head=2, n_embd=width))
    reader = warp.Reader(model, [str(layers)], "mean", True).to(Here.device).eval()
    inputs = (torch.from_numpy(rng.integers(0, 256, (stimuli, tokens))).to(Here.device), torch.ones(stimuli, tokens, dtype=torch.bool, device=Here.device))
    parts = np.split(rng.permutation(stimuli), [stimuli * 5 // 8, stimuli * 3 // 4])
    rows = dict(zip(("train", "val", "test"), parts))
    f = warp.features(reader, inputs, range(stimuli), 1000).cpu().numpy()
    y = f @ rng.standard_normal((width, units)) + rng.standard_normal((stimuli, units))
    return reader, inputs, warp.Study("text", None, y, rows, np.arange(stimuli), None, {})


def warp_sweep(turns=3, seeds=5, dims=(1, 3, 10, 23, 56, 133, 316, 749, 1000), steps=30):
    """9 d x 5 seeds of a 2-layer, 64-wide GPT on 256 stimuli of 12 tokens, P drawn and the way of batching measured within our time, against the
    loop over the same fits one by one with data and P already built."""
    reader, inputs, study = sweep_problem()
    config = warp.Config(head_dims=0, steps=steps)
    f0 = warp.features(reader, inputs, study.rows["train"], 1000)
    wrappers = [warp.FastfoodWrapper(reader, max(dims), seed=seed) for seed in range(seeds)]

    def ours():
        warp.fit_all.best.clear()
        for seed in range(seeds):
            w, objective = warp.FastfoodWrapper(reader, max(dims), seed=seed), warp.Objective(config, study, f0)
            for _ in warp.fit_all(Here, config, w, objective, inputs, [(d, 0.02) for d in dims], seed):
                pass
        return next(iter(warp.fit_all.best.values()))

    def one_by_one():
        for seed, w in enumerate(wrappers):
            for d in dims:
                warp.fit(Here, config, w, warp.Objective(config, study, f0), inputs, [d], [0.02], seed, steps)

    warp.fit(Here, config, wrappers[0], warp.Objective(config, study, f0), inputs, [dims[-1]], [0.02], 0, 3)  # warm up
    pairs = []
    for _ in range(turns):
        taken, K = seconds(ours)
        pairs.append((taken, seconds(one_by_one)[0]))
    slowest = max(a for a, _ in pairs)
    return row("warp_sweep", *zip(*pairs), ">= 5" if Here.device.type == "cuda" else ">= 1", cpu() if Here.device.type == "cpu" else "GPU",
               f"{len(dims) * seeds} fits of {steps} steps, {K} side by side here; ours takes {slowest:.0f} s of at most 300 s")


MEMORY = """
import resource, sys, torch
sys.path.insert(0, {root!r})
import warp
from model import GPT, GPTConfig
torch.manual_seed(0)
model = GPT(GPTConfig(**{shape})).eval()
reader, idx = warp.Reader(model, ["{layers}"], "mean", True).eval(), torch.randint(0, {vocab}, (2, 32))
inputs = (idx, torch.ones_like(idx, dtype=torch.bool))
if {train}:
    reader.requires_grad_(True)
    w = warp.FastfoodWrapper(reader, {d})
    adam = torch.optim.Adam(w.parameters(), 1e-3)
    for _ in range(2):
        adam.zero_grad()
        w(*inputs).square().sum().backward()
        adam.step()
else:
    with torch.no_grad():
        reader(*inputs)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, sum(p.numel() for p in model.parameters()) * 4)
"""


def warp_memory(turns=2, d=1000, n_layer=12, n_embd=768, vocab=50304):
    """Peak memory of training GPT-2 (124 M parameters) in 1,000 dimensions above that of running it, each in a process of its own, over the size of
    the weights."""
    shape = dict(block_size=1024, vocab_size=vocab, n_layer=n_layer, n_head=12, n_embd=n_embd)
    above, weights = [], 0
    for _ in range(turns):
        peaks = []
        for train in (True, False):
            code = MEMORY.format(root=str(Path(__file__).resolve().parent), shape=shape, layers=n_layer, vocab=vocab, train=train, d=d)
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
            peaks.append(int(out[0]))
            weights = int(out[1])
        above.append(peaks[0] - peaks[1])
    ratios = [a / weights for a in above]
    return dict(name="warp_memory", ours=f"{statistics.median(above) / 2 ** 20:.0f} MiB", other=f"{weights / 2 ** 20:.0f} MiB",
                ratio=round(statistics.median(ratios), 2), low=round(min(ratios), 2), high=round(max(ratios), 2), turns=turns, target="<= 3.5", device=cpu(),
                note=f"peak above plain inference over the weights, {weights // 4:,} parameters, d = {d}")


CLAIMS = dict(swap=swap, minimal_pairs=minimal_pairs, fastfood=fastfood, warp_step=warp_step, warp_sweep=warp_sweep, warp_memory=warp_memory)


# ---- the table

def main(argv):
    if {"-h", "--help"} & set(argv):
        print(__doc__ + "\nclaims: " + ", ".join(CLAIMS))
        return
    names = [a for a in argv if a != "--json"] or list(CLAIMS)
    for name in names:
        if name not in CLAIMS:
            near = difflib.get_close_matches(name, [*CLAIMS, "--json"], 1)
            print(f"error: bench.py: no claim '{name}'; " + (f"did you mean '{near[0]}'?" if near else f"there are {', '.join(CLAIMS)}"),
                  file=sys.stderr)
            raise SystemExit(2)
    rows = []
    for name in names:
        rows.append(CLAIMS[name]())
        if "--json" not in argv:
            print("{name:<14} ours {ours:>9} | other {other:>9} | ratio {ratio:g} ({low:g} to {high:g} in {turns} turns) | target {target} "
                  "| {device} | {note}".format(**rows[-1]), flush=True)
    if "--json" in argv:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
