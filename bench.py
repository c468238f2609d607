"""How much faster, smaller or leaner than the alternative, measured here and now.

    python bench.py                  # every claim
    python bench.py swap             # one or some of them
    python bench.py --json           # the same rows as a JSON list

A claim is one function below: it runs ours and an honest alternative in turns, several times, and gives back a row. `ratio` is how many times
faster ours is where the target reads >=, with the smallest and largest ratio of the turns; the alternative is what a careful person writes
first, in the same precision, on the same device.
"""
import copy
import difflib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import positions
import topography
import telepath
from configurator import Run
from data.tokens import tokenizer_state
from model import GPT, EncoderConfig, GPTConfig, NeuralEncoder, NeuralGPT, lm_state, save_checkpoint


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
    """A row of the table from times (s) of the turns, ours[i] measured next to other[i]; ours over the other where the target is a <=."""
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


def neural_gpt(P=36, n_embd=384):
    """A frozen GPT of 6 layers x 384 with experts in each, eager, and neural tokens (16, P, C) for it."""
    torch.manual_seed(0)
    lm = GPT(GPTConfig(block_size=256, vocab_size=4096, n_layer=6, n_head=6, n_embd=n_embd, bias=False))
    model = NeuralGPT(lm, NeuralEncoder(EncoderConfig(n_embd=n_embd)), "expert").to(Here.device)
    return model, torch.randn(16, P, n_embd, device=Here.device) * 0.02


def expert_step(turns=15, T=8):
    """A training step of the experts on 16 x (36 neural tokens and 8 of text, BON and EON), against one of the same GPT on as many tokens without
    routes, as many of whose weights learn: its last layer's output projection and MLP do not, as the experts' have none. Loss on the text alone."""
    model, n = neural_gpt()
    plain = copy.deepcopy(model.lm)
    model.requires_grad_(False), plain.requires_grad_(False)
    model.experts.requires_grad_(True), plain.transformer.h.requires_grad_(True)
    for part in (plain.transformer.h[-1].attn.c_proj, plain.transformer.h[-1].mlp):
        part.requires_grad_(False)
    for block in plain.transformer.h:
        block.ln_1.requires_grad_(False), block.ln_2.requires_grad_(False)
    learned = [[p for p in m.parameters() if p.requires_grad] for m in (model, plain)]
    count = [sum(p.numel() for p in ps) for ps in learned]
    assert count[0] == count[1], count
    optimizers = [torch.optim.AdamW(ps, lr=1e-5) for ps in learned]
    idx = torch.randint(0, 4096, (16, n.size(1) + 2 + T), device=Here.device)
    steps = (lambda: model.trunk(n, idx[:, -T:]), lambda: plain.trunk(idx)[0][:, -T:])

    def step(k):
        with Here().autocast():
            loss = torch.nn.functional.cross_entropy((steps[k]() @ model.lm.transformer.wte.weight.t()).float().flatten(0, 1), idx[:, -T:].flatten())
        loss.backward()
        optimizers[k].step()
        optimizers[k].zero_grad(set_to_none=True)

    for _ in range(3):
        step(0), step(1)
    times = [[seconds(partial(step, k))[0] for k in (0, 1)] for _ in range(turns)]
    return row("expert_step", *zip(*times), "<= 1.05", cpu() if Here.device.type == "cpu" else torch.cuda.get_device_name(),
               f"{count[0] / 1e6:.1f} M of weights learn, {str(Here.dtype)[6:]}")


def prefix_decode(turns=7, T=8, new=64):
    """Time per new token, greedy, 16 rows: behind a cached prefix of 36 neural tokens and 8 of text, against the plain GPT behind as many tokens."""
    model, n = neural_gpt()
    model.eval()
    room, prompt = n.size(1) + 2, list(range(1, T + 1))

    def decode(rows, **options):
        with Here().autocast():
            stream = model.lm.stream(rows, new, temperature=0, **options)
            next(stream)  # what was read before is not counted
            return seconds(lambda: sum(1 for _ in stream))[0] / (new - 1)

    def ours():
        return decode([prompt] * 16, start=partial(model._prefill, n, room), room=room)

    def other():
        return decode([list(range(1, room + T + 1))] * 16)

    ours(), other()
    times = [(ours(), other()) for _ in range(turns)]
    return row("prefix_decode", *zip(*times), "<= 1.1", cpu() if Here.device.type == "cpu" else torch.cuda.get_device_name(), f"{str(Here.dtype)[6:]}")


def loader_wait(turns=3, steps=40):
    """Seconds that the embedded training step waits for EEG, every augmentation on each trial, as a share of the step; the ratio is over the 5 % asked
    for. The language model has the embedded shape."""
    data = Path(__file__).resolve().parent / "data/synthetic_eeg"
    if not (data / "meta.yaml").exists():
        subprocess.run([sys.executable, str(data / "prepare.py")], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        lm = GPT(GPTConfig(block_size=128, vocab_size=4096, n_layer=4, n_head=4, n_embd=256, bias=False))
        save_checkpoint(f"{folder}/lm.pt", dict(**lm_state(lm), tokenizer=tokenizer_state(data.parent / "pydocs")))
        config = telepath.Config(dataset=str(data), lm=f"{folder}/lm.pt", out_dir=folder, augment={name: 1.0 for name in telepath.AUGMENT}, jitter=0.02,
                                 synonyms=True, device=Here.device.type)
        run = Run(config)
        trials, sets, _ = telepath.prepare(config, run)
        model, tokenizer, _ = telepath.build(config, trials, run)
        text, space = telepath.Text(tokenizer, trials, set(), config), telepath.WordSpace(model.lm.transformer.wte.weight)
        fit = partial(telepath.fit, run, model, text, trials, sets["train"], config, space=space, alone=True)
        fit(steps=5)
        times = [seconds(partial(fit, steps=steps)) for _ in range(turns)]
        run.close()
    return row("loader_wait", [loader.waited / steps for _, loader in times], [0.05 * taken / steps for taken, _ in times], "<= 1", cpu() if
               Here.device.type == "cpu" else torch.cuda.get_device_name(),
               f"{statistics.median(loader.waited / taken for taken, loader in times):.1%} of a step of "
               f"{1e3 * statistics.median(taken for taken, _ in times) / steps:.0f} ms, {config.num_workers} threads; other is 5 % of it")


CLAIMS = dict(swap=swap, minimal_pairs=minimal_pairs, expert_step=expert_step, prefix_decode=prefix_decode, loader_wait=loader_wait)


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
