"""How much faster, smaller or leaner than the alternative, measured here and now.

    python bench.py                  # every claim
    python bench.py swap             # one or some of them
    python bench.py --json           # the same rows as a JSON list

A claim is one function below: it runs ours and an honest alternative in turns, several times, and gives back a row. `ratio` is how many times
faster ours is where the target reads >=, with the smallest and largest ratio of the turns; the alternative is what a careful person writes
first, in the same precision, on the same device.
"""
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

import mne
import numpy as np
import pandas as pd
import torch

import decode
import positions
import topography
from data.recording import write_recording, write_set
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
    ratios = [b / a for a, b in zip(ours, other)]
    return dict(name=name, ours=f"{1e3 * statistics.median(ours):.3g} ms", other=f"{1e3 * statistics.median(other):.3g} ms",
                ratio=round(statistics.median(ratios), 2), low=round(min(ratios), 2), high=round(max(ratios), 2), turns=len(ratios),
                target=target, device=device, note=note)


def within(name, measured, limit, unit, device, note=""):
    """A row of a claim with an absolute limit: ratio is measured over limit."""
    ratios = [m / limit for m in measured]
    return dict(name=name, ours=f"{statistics.median(measured):.3g} {unit}", other=f"{limit:g} {unit}", ratio=round(statistics.median(ratios), 3),
                low=round(min(ratios), 3), high=round(max(ratios), 3), turns=len(ratios), target="<= 1", device=device, note=note)


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


class Decoder(torch.nn.Module):
    """The convolutional decoder of decode.py as one writes it down."""

    def __init__(self, E, W, D):
        super().__init__()
        nn = torch.nn
        self.net = nn.Sequential(nn.Conv1d(E, W, 3, bias=False), nn.ReLU(), nn.BatchNorm1d(W), nn.Dropout(0.2), nn.MaxPool1d(2, 2, 1),
                                 nn.Conv1d(W, W, 2, bias=False), nn.ReLU(), nn.BatchNorm1d(W), nn.Dropout(0.2),
                                 nn.Conv1d(W, W, 2), nn.BatchNorm1d(W), nn.ReLU())
        self.linear, self.norm = nn.Linear(W, D), nn.LayerNorm(D)

    def forward(self, x):
        return self.norm(torch.tanh(self.linear(self.net(x).amax(2))))


def decode_group(words=5000, electrodes=128, bins=10, dims=50, members=10, folds=5, turns=5, epochs=1):
    """Training of 10 members x 5 folds at one lag a turn (5 lags), validation each epoch and the test words at the end included: stacks, against a loop
    over folds and members on prebuilt tensors with torch's fused AdamW. The arithmetic is the same; so must the scores be."""
    rng = np.random.default_rng(0)
    config = decode.Config(n_folds=folds, epochs=epochs, model="independent_pitom_model", model_params=dict(num_models=members, conv_filters=128))
    start, ours, other, scores = np.cumsum(rng.uniform(0.2, 0.4, words)), [], [], []
    splits, W = decode.make_folds(config, start, np.arange(words).astype(str), 0.6), 128
    Y = rng.normal(size=(words, dims)).astype(np.float32)
    target = decode.Target("vectors", pd.DataFrame(dict(start=start, label=np.arange(words).astype(str))), Y)

    class On:
        device = Here.device

    def cosine(out, fold):  # (members, n, D)
        return float((decode.unit(out) * decode.unit(Y[fold.test])).sum(-1).mean())

    def stacked(X, jobs):
        outs = []
        for at in range(0, len(jobs), size := 5 if Here.device.type == "cpu" else len(jobs)):
            outs += decode.train_stack(On(), config, config.model, target, X[None], jobs[at:at + size], [str(i) for i in range(electrodes)], splits)
        return np.mean([cosine(out[1], job.fold) for out, job in zip(outs, jobs)])

    def looping(X, jobs):
        found, y = [], torch.as_tensor(Y, device=Here.device)
        for job in jobs:
            x = (X - torch.as_tensor(job.mean, device=Here.device)) * torch.as_tensor(job.factor, device=Here.device)
            train, val, test = (torch.as_tensor(part, device=Here.device) for part in (job.fold.train, job.fold.val, job.fold.test))
            outs = []
            for _ in range(members):
                net = Decoder(electrodes, W, dims).to(Here.device)
                optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True)
                for _ in range(epochs):
                    net.train()
                    order = train[torch.randperm(len(train), device=Here.device)]
                    for batch in order[:len(order) // 32 * 32].split(32):
                        loss = torch.nn.functional.mse_loss(net(x[batch]), y[batch])
                        optimizer.zero_grad(set_to_none=True)
                        loss.backward()
                        optimizer.step()
                    net.eval()
                    with torch.no_grad():
                        net(x[val])
                with torch.no_grad():
                    outs.append(net(x[test]).cpu().numpy())
            found.append(cosine(np.stack(outs), job.fold))
        return np.mean(found)

    for turn in range(turns + 1):
        X = rng.normal(size=(words, electrodes, bins)).astype(np.float32)
        X[:, :dims] += Y[:, :, None]
        jobs = [decode.Job(float(turn), 0, fold, Y, *decode.input_scale(config, X, fold, target, Y)) for fold in splits]
        X = torch.as_tensor(X, device=Here.device)
        if turn == 0:  # warm up
            stacked(X, jobs[:1]), looping(X, jobs[:1])
            continue
        taken, mine = seconds(partial(stacked, X, jobs))
        ours.append(taken)
        taken, theirs = seconds(partial(looping, X, jobs))
        other.append(taken)
        scores.append((mine, theirs))
        assert abs(mine - theirs) < 0.02 + 0.1 * abs(theirs), f"cosines differ: {mine:.3f} and {theirs:.3f}"
    note = "{} models a turn, test cosine {:.3f} ours, {:.3f} looping".format(members * folds, *np.mean(scores, 0))
    return row("decode_group", ours, other, ">= 2 (CPU), >= 20 (GPU)", cpu() if Here.device.type == "cpu" else torch.cuda.get_device_name(), note)


def lag_windows(turns=3, minutes=30, electrodes=32, words=5000, sfreq=512, bins=10):
    """Bin means of 0.625 s windows at 21 lags: cumulative sums over the recording once, against mne.Epochs at each lag, from memory in both cases."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(minutes * 60 * sfreq, electrodes)).astype(np.float32) + 3
    raw = mne.io.RawArray(signal.T.astype(float), mne.create_info(electrodes, sfreq), verbose="error")
    rows = np.sort(rng.choice(np.arange(4 * sfreq, len(signal) - 4 * sfreq), words, replace=False))
    lags, width = np.arange(-2000, 2001, 200), 320
    offsets, edges = [round(sfreq * lag / 1000) - width // 2 for lag in lags], np.arange(0, width + 1, width // bins)
    events = np.column_stack([rows, 0 * rows, 1 + 0 * rows])

    def cut():
        return decode.lag_windows(signal, np.arange(electrodes), rows, offsets, edges)

    def epochs():
        made = []
        for offset in offsets:
            e = mne.Epochs(raw, events, tmin=offset / sfreq, tmax=(offset + width - 1) / sfreq, baseline=None, preload=True, verbose="error")
            made.append(e.get_data(copy=False).reshape(words, electrodes, bins, -1).mean(-1))
        return made

    ours, other = [], []
    for _ in range(turns):
        taken, mine = seconds(cut)
        ours.append(taken)
        taken, theirs = seconds(epochs)
        other.append(taken)
        worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(mine, theirs))
        assert worst < 1e-6, f"windows differ by {worst:.1e}"
    return row("lag_windows", ours, other, ">= 10", cpu(), f"21 lags, {words} words, {electrodes} electrodes, equal to {worst:.0e}")


def word_auc(turns=5, words=1000, classes=440, shifts=1000):
    """ROC-AUC of every class, and of 1,000 reorderings of the labels."""
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=(words, classes)), np.concatenate([np.arange(classes), rng.zipf(1.5, words) % classes])[:words]
    orders = decode.circular(rng.random(shifts), words, 5)
    measured = [seconds(partial(decode.word_auc, scores, y, orders))[0] for _ in range(turns)]
    return within("word_auc", measured, 1.0, "s", cpu(), f"{words} words, {classes} classes, {shifts} shifts")


MEMORY = """
import resource, sys
import decode
config = decode.configure(decode.Config, sys.argv[1:])
run = decode.Run(config)
sweep = decode.Sweep(run, config)
bar = run.progress(len(sweep.lags))
sweep.do([(config.model, lag, 0) for lag in sweep.lags], bar)
print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9} GB of {len(sweep.start)} words")
"""


def decode_memory(electrodes=183, words=5136, minutes=30, dims=1600):
    """Resident memory at its peak, in a process of its own, mapped pages of the recording included: 21 lags of the whole recording, ten convolutional
    decoders trained for an epoch on one fold of each."""
    rng, sfreq = np.random.default_rng(0), 512
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        onset = np.sort(rng.uniform(3, 60 * minutes - 4, words)).round(3)
        table = pd.DataFrame(dict(word_idx=np.arange(words), word="a", start=onset, end=onset, norm_word=rng.zipf(1.5, words) % 400, sentence=0))
        table.to_csv(folder / "words.csv", index=False)
        table[["word_idx"]].to_csv(folder / "tokens.csv", index=False)
        rng.normal(size=(words, dims)).astype("<f2").tofile(folder / "features.f16")
        blocks = (rng.standard_normal((sfreq * 60, electrodes), np.float32) for _ in range(minutes))
        write_recording(folder / "sub-01", blocks, pd.DataFrame(dict(name=[f"G{i}" for i in range(electrodes)])), pd.DataFrame(dict(onset=onset)),
                        sfreq=sfreq, unit="V", subject="sub-01", source="bench", synthetic=True)
        write_set(folder, ["sub-01"], synthetic=True, words="words.csv", tokens={"gpt2-xl": "tokens.csv"}, features={"gpt2-xl": {"layer-24": "features.f16"}},
                  arrays={"features.f16": {"shape": [words, dims], "dtype": "float16"}})
        options = [f"dataset={folder}", f"out_dir={folder / 'out'}", "min_lag=-2000", "max_lag=2001", "lag_step=200", "window=0.625", "pca=50", "epochs=1",
                   'model_params={"num_models": 10, "conv_filters": 128}', "save_models=False"]
        out = subprocess.run([sys.executable, "-c", MEMORY, *options], capture_output=True, text=True, cwd=Path(__file__).parent)
        if out.returncode:
            raise RuntimeError(out.stderr)
    peak = float(out.stdout.split("peak ")[1].split()[0])
    return within("decode_memory", [peak], 4.0, "GB", cpu(), f"{electrodes} electrodes, {words} words, 21 lags")


CLAIMS = dict(swap=swap, minimal_pairs=minimal_pairs, decode_group=decode_group, lag_windows=lag_windows, word_auc=word_auc, decode_memory=decode_memory)


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
