"""How much faster, smaller or leaner than the alternative, measured here and now.

    python bench.py                  # every claim
    python bench.py swap             # one or some of them
    python bench.py --json           # the same rows as a JSON list

A claim is one function below: it runs ours and an honest alternative in turns, several times, and gives back a row. `ratio` is how many times
faster ours is where the target reads >=, ours over the other where it reads <=, with the smallest and largest ratio of the turns; the alternative
is what a careful person writes first, in the same precision, on the same device.
"""
import copy
import difflib
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from tqdm import tqdm

import positions
from model import GPT, EncoderConfig, GPTConfig, NeuralEncoder, NeuralGPT, lm_state, save_checkpoint

# a script, or a rival, is imported by the claims that measure it: what the others need is memory of theirs


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


def within(name, measured, limit, unit, device, note=""):
    """A row of a claim with an absolute limit: ratio is measured over limit."""
    ratios = [m / limit for m in measured]
    return dict(name=name, ours=f"{statistics.median(measured):.3g} {unit}", other=f"{limit:g} {unit}", ratio=round(statistics.median(ratios), 3),
                low=round(min(ratios), 3), high=round(max(ratios), 3), turns=len(ratios), target="<= 1", device=device, note=note)


def cpu():
    """The CPU as the table names it."""
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def device():
    """What the model runs on, as the table names it."""
    return torch.cuda.get_device_name() if Here.device.type == "cuda" else cpu()


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

    def progress(self, *args, **options):
        return tqdm(disable=True)


class Words:
    """A tokenizer whose texts are numbers: what encoding costs is left out on both sides."""

    eot = 0

    def encode(self, text):
        return list(map(int, text.split()))


def minimal_pairs(turns=5, pairs=500):
    """Log-probabilities of both sentences of minimal pairs of 6 to 16 tokens under the embedded model's shape: in batches by length, against one
    sentence at a time, in the same precision."""
    import topography
    from convert import HiddenStates
    model = GPT(GPTConfig(block_size=128, vocab_size=4096, n_layer=4, n_head=4, n_embd=256, bias=False)).to(Here.device).eval()
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(1, 4096, n))) for n in rng.integers(6, 17, 2 * pairs)]

    lm = HiddenStates({"model": model, "tokenizer": Words()}, Here.device, Here.dtype, bos=True, head=True)
    rows = lm.encode(texts)[0]

    def score(budget):
        return topography.sentence_scores(Here(), lm, rows, budget)

    score(2048), score(1)  # warm up
    ours, other = [], []
    for _ in range(turns):
        taken, together = seconds(partial(score, 2048))
        ours.append(taken)
        taken, single = seconds(partial(score, 1))  # a budget of one token: every sentence alone
        other.append(taken)
    assert np.abs(together - single).max() < 0.02 * np.abs(single).max(), "batched and single scores differ"
    return row("minimal_pairs", ours, other, ">= 5", cpu(), f"{2 * pairs} sentences, {str(Here.dtype)[6:]}")


def random_tokens(rows, length, vocab_size):
    """idx, targets (rows, length) with a language's word frequencies: there is something to learn."""
    words = np.random.default_rng(0).zipf(1.2, 40 * rows * (length + 1))
    batch = torch.as_tensor(words[words < vocab_size][:rows * (length + 1)]).view(rows, length + 1).to(Here.device)
    return batch[:, :-1], batch[:, 1:]


def plain_loss(model, idx, targets):
    """The loss as one writes it first: fused attention of the library, the whole batch's logits, the precision of the weights."""
    (B, T), t, heads = idx.shape, model.transformer, model.config.n_head
    x = t.wte(idx) + t.wpe(torch.arange(T, device=idx.device))
    for block in t.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).view(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
        x = x + block.attn.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    return F.cross_entropy(F.linear(t.ln_f(x), t.wte.weight).flatten(0, 1), targets.flatten())


TRAINED = dict(block_size=256, vocab_size=50304, n_layer=6, n_head=6, n_embd=384, bias=False)


def stepper(ours, batch=8):
    """A training step of the shape above: compiled, in half precision, with the chunked head and a fused optimiser; or plain, eager, float32."""
    model = GPT(GPTConfig(**TRAINED)).to(Here.device)
    if ours:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=ours, foreach=None if ours else False)
    idx, targets = random_tokens(batch, TRAINED["block_size"], TRAINED["vocab_size"])

    def step():
        if ours:
            with Here().autocast():
                loss = model(idx, targets).loss
        else:
            loss = plain_loss(model, idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def train_step(turns=24):
    """A training step, alpha = 0: 6 layers x 384, 8 x 256 tokens, vocabulary 50,304, against a plain model in eager float32."""
    steps = stepper(True), stepper(False)
    times, losses = ([], []), ([], [])
    for _ in range(2 + 2 * turns):  # 50 steps of each; the first two warm up
        for step, took, loss in zip(steps, times, losses):
            taken, value = seconds(step)
            took.append(taken)
            loss.append(value)
    apart = abs(losses[0][-1] / losses[1][-1] - 1)
    assert apart < 0.01, f"after {len(losses[0])} steps the losses {losses[0][-1]:.4f} and {losses[1][-1]:.4f} differ"
    return row("train_step", times[0][2:], times[1][2:], ">= 4", device(), f"loss after {len(losses[0])} steps {losses[0][-1]:.3f} and {losses[1][-1]:.3f}")


# Bytes, in a process of its own on Linux. A child's ru_maxrss begins at its parent's: here, at what other claims took.
PEAK = "(1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))"


def peak_memory(claim):
    """Peak resident memory (bytes) of a process of its own that runs `claim`, an expression over this module, or on a GPU the allocator's peak."""
    code = f"import torch, bench; {claim}; print(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else {PEAK})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def train_memory(turns=3):
    """Peak memory of the step of train_step, each side in its own process (what importing torch takes is in both)."""
    peaks = [[peak_memory(f"step = bench.stepper({ours}); [step() for _ in range(3)]") / 1e9 for ours in (True, False)] for _ in range(turns)]
    ours, other = zip(*peaks)
    return limit("train_memory", ours, other, "<= 0.6", device(), "GB")


def limit(name, ours, other, target, device, unit, note=""):
    """A row whose target is an upper limit: ratio is ours over the other."""
    ratios = [a / b for a, b in zip(ours, other)]
    return dict(name=name, ours=f"{statistics.median(ours):.3g} {unit}", other=f"{statistics.median(other):.3g} {unit}",
                ratio=round(statistics.median(ratios), 3), low=round(min(ratios), 3), high=round(max(ratios), 3), turns=len(ratios),
                target=target, device=device, note=note)


def spatial_share(turns=20, windows=5, target="<= 0.05", name="spatial_share"):
    """The spatial loss, forward and backward alone, over the whole compiled step: 12 layers x 784 units, 4 x 256 tokens, all of them, radius 5."""
    model = GPT(GPTConfig(block_size=256, vocab_size=50304, n_layer=12, n_head=16, n_embd=784, bias=False, sheet=True, radius=5, windows=windows,
                          alpha=2.5)).to(Here.device)
    model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    (idx, targets), generator = random_tokens(4, 256, 50304), torch.Generator().manual_seed(0)
    taps = [torch.randn(4, 256, 784, device=Here.device).to(Here.dtype).requires_grad_() for _ in range(24)]
    loss_of = torch.compile(lambda x, units, near: positions.spatial_loss(x, units, near))

    def step():
        with Here().autocast():
            loss = model(idx, targets, model.draw_windows(generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def spatial():
        units, near = model.sheets(model.draw_windows(generator))
        for x in taps:
            x.grad = None  # to be written, not added to
        sum(loss_of(x, u, near) for x, u in zip(taps, units.flatten(0, 1))).backward()

    warm, _ = seconds(step)
    drawn = model.draw_windows(generator)
    units, near = model.sheets(drawn)
    oracle = positions.spatial_loss(taps[0].detach().float(), model.unit_at_cell[0][model.window_cells[drawn[0]]], model.near)
    assert abs(oracle - loss_of(taps[0], units[0, 0], near)) < 1e-5, "the loss is not the float32 one"
    spatial()
    share, whole = [], []
    for _ in range(turns):
        whole.append(seconds(step)[0])
        share.append(seconds(spatial)[0])
    return limit(name, share, whole, target, device(), "s", f"first step, compilation included: {warm:.1f} s")


def generate(turns=3, dtype=torch.float32, target=">= 1.2", name="generate"):
    """Greedy generation, GPT-2 124M shape, 8 prompts of 16 tokens, 128 new ones, against Hugging Face's generate with the same weights."""
    from transformers import GPT2LMHeadModel
    model = GPT(GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, gelu="tanh"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).to(Here.device, dtype).eval()
    model = model.to(Here.device, dtype).eval()
    prompts = torch.as_tensor(np.random.default_rng(0).integers(0, 50257, (8, 16))).to(Here.device)

    def ours(n=128):
        return model.generate(prompts.tolist(), n, temperature=0)

    def other(n=128):
        with torch.no_grad():
            return theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                                   pad_token_id=0)[:, 16:].tolist()

    ours(8), other(8)  # warm up
    times = []
    for _ in range(turns):
        (a, mine), (b, yours) = seconds(ours), seconds(other)
        times.append((a, b))
    same = np.mean(np.array(mine) == np.array(yours))
    assert dtype is not torch.float32 or same == 1, "the tokens differ"
    return row(name, *zip(*times), target, device(), f"{str(dtype)[6:]}, {same:.0%} of the tokens the same")


def generate_half():
    """The same in bfloat16."""
    return generate(dtype=torch.bfloat16, target=">= 1.5", name="generate_half")


def app_rerun(turns=5, limit=1.0):
    """The app of probe.py on 100,000 result rows: the first interaction after load, a change of metric that filters and draws everything again.
    The server's side, through streamlit.testing; the browser's drawing comes on top."""
    import pandas as pd
    from streamlit.testing.v1 import AppTest
    names = dict(model=[f"model-{i}" for i in range(10)], probe=["LDA", "logistic", "ridge", "QDA"], metric=["accuracy", "auc", "f1", "mcc"],
                 baseline=["", "random_init", "control", "layer0", "majority"], layer=range(25), quantile=[0.0, 0.25, 0.5, 0.75, 1.0])
    table = pd.MultiIndex.from_product(names.values(), names=names).to_frame(index=False)
    score = np.random.default_rng(0).random(len(table))
    table = table.assign(dataset="grammar/polarity", score=score, chance=0.5, low=score - 0.05, high=score + 0.05, n=2000, n_train=1600, p=0.01,
                         p_holm=0.04, params=1e8, synthetic=True)
    times = []
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "argv", ["probe.py", f"out_dir={folder}"]):
            table.to_csv(Path(folder) / "results.csv", index=False)
            app = AppTest.from_file(str(Path(__file__).parent / "probe.py"), default_timeout=120).run()
            taken, app = seconds(app.selectbox(key="metric").set_value("mcc").run)
            assert not app.exception and app.get("plotly_chart"), "the app failed"
            times.append(taken)
    return within("app_rerun", times, limit, "s", cpu(), f"{len(table):,} rows, change of metric")


def peak(function):
    """Peak resident memory (MB) of this process during one call; Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    function()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def probe_pass(turns=3, texts=2000, tokens=24, share=10, quantiles=(0.0, 0.25, 0.5, 0.75, 1.0)):
    """Pooled hidden states of 12 layers × 5 quantiles of the tokens, GPT-2 124M shape: one pass of probe.py with its cache on disk, against one pass of
    transformers' GPT-2 with output_hidden_states per quantile, batches of 32, the same weights and precision. The alternative runs `share` times fewer
    texts, whose time is scaled up."""
    import probe
    from transformers import GPT2Model
    model = GPT(GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, gelu="tanh")).to(Here.device).eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50257, (texts, tokens))
    stimuli = [" ".join(map(str, row)) for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder + "/gpt2")
        theirs = GPT2Model.from_pretrained(folder + "/gpt2").to(Here.device).eval()
        ours = probe.LMModel(dict(model=model, tokenizer=Words(), name="gpt2"), Here.device, Here.dtype)

        def one_pass(n, cache):
            return probe.pooled_states(ours, stimuli[:n], range(1, 13), list(map(str, quantiles)), f"{folder}/{cache}", 1024)

        @torch.no_grad()
        def pass_per_quantile(n):
            found = {}
            for q in quantiles:
                rows = []
                for batch in torch.as_tensor(ids[:n], device=Here.device).split(32):
                    with Here().autocast():
                        hidden = theirs(batch, output_hidden_states=True, use_cache=False).hidden_states[1:]
                    rows.append(torch.stack([h[:, round(q * (tokens - 1))] for h in hidden], 1).float().cpu().numpy())
                found[q] = np.concatenate(rows)  # (n, 12, 768)
            return found

        one_pass(64, "warm"), pass_per_quantile(64)
        times, other, few = [], [], texts // share
        small, large = (peak(partial(one_pass, n, f"peak {n}")) for n in (few, texts))
        for turn in range(turns):
            taken, states = seconds(partial(one_pass, texts, turn))
            times.append(taken)
            taken, found = seconds(partial(pass_per_quantile, few))
            other.append(taken * share)
        worst = max(np.abs(states.arrays[str(q)][:few] - found[q]).max() / np.abs(found[q]).max() for q in quantiles)
        assert worst < (1e-3 if Here.dtype is torch.float32 else 0.05), f"the pooled states differ by {worst}"
    return row("probe_pass", times, other, ">= 5", cpu(), f"{texts:,} texts of {tokens} tokens, {str(Here.dtype)[6:]}; alternative on {few} texts, times "
               f"{share}; peak memory {small:,.0f} MB at {few:,} texts, {large:,.0f} MB at {texts:,}")


def probe_fit(turns=3, sites=60, n=2000, width=768, share=6):
    """LDA with shrinkage and ridge at 60 sites, all penalties at once in closed form, against scikit-learn site by site and penalty by penalty, both float32 on
    standardised features. Features have a decaying spectrum, as hidden states do. Scikit-learn runs every `share`-th site, times `share`."""
    import probe
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, n)
    X = np.empty((sites, n, width), np.float32)
    for site in X:
        mix = np.linalg.qr(rng.normal(size=(width, width)))[0] * (1 + np.arange(width)[:, None]) ** -0.7
        z = rng.normal(size=(n, width))
        z[:, 5] += 0.8 * y
        site[:] = z @ mix
    train, test = slice(0, n * 4 // 5), slice(n * 4 // 5, n)
    labels = F.one_hot(torch.as_tensor(y), 2).float()
    shrinkages, alphas = (0.003, 0.03, 0.1, 0.3, 0.7), (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)

    def ours():
        scores = []
        for x in torch.from_numpy(X).split(1):  # what a CPU's cache holds
            sums = probe.summed_products(x[:, train], labels[train])
            outs = probe.apply(probe.lda(sums, shrinkages), x[:, test]), probe.apply(probe.ridge(sums, alphas), x[:, test])
            scores.append(np.concatenate([(out[0].argmax(-1).numpy() == y[test, None]).mean(0) for out in outs]))
        return np.stack(scores)  # (sites, penalties)

    def theirs():
        scores = []
        for site in X[::share]:
            scale = StandardScaler().fit(site[train])
            z, zt = scale.transform(site[train]), scale.transform(site[test])
            right = [LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s).fit(z, y[train]).score(zt, y[test]) for s in shrinkages]
            for alpha in alphas:
                out = Ridge(alpha).fit(z, labels[train].numpy()).predict(zt)
                right.append((out.argmax(-1) == y[test]).mean())
            scores.append(right)
        return np.array(scores)

    ours()
    times, other = [], []
    for _ in range(turns):
        taken, scores = seconds(ours)
        times.append(taken)
        taken, reference = seconds(theirs)
        other.append(taken * share)
    gap = np.abs(scores[::share] - reference).max()
    assert gap < 0.011, f"scores differ by {gap}"
    return row("probe_fit", times, other, ">= 3", cpu(), f"LDA and ridge with 11 penalties at {sites} sites of {n:,} × {width}, float32; test accuracy "
               f"{scores[::share].mean():.3f} and {reference.mean():.3f}, largest difference {gap:.3f}; scikit-learn on every {share}th site, times {share}")


def lag_windows(turns=3, minutes=30, electrodes=32, words=5000, sfreq=512, bins=10):
    """Bin means of 0.625 s windows at 21 lags: cumulative sums over the recording once, against mne.Epochs at each lag, from memory in both cases."""
    import mne
    from data import montage
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(minutes * 60 * sfreq, electrodes)).astype(np.float32) + 3
    raw = mne.io.RawArray(signal.T.astype(float), mne.create_info(electrodes, sfreq), verbose="error")
    rows = np.sort(rng.choice(np.arange(4 * sfreq, len(signal) - 4 * sfreq), words, replace=False))
    lags, width = np.arange(-2000, 2001, 200), 320
    offsets, edges = [round(sfreq * lag / 1000) - width // 2 for lag in lags], np.arange(0, width + 1, width // bins)
    events = np.column_stack([rows, 0 * rows, 1 + 0 * rows])

    def cut():
        return montage.lag_windows(signal, np.arange(electrodes), rows, offsets, edges)

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
    import decode
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=(words, classes)), np.concatenate([np.arange(classes), rng.zipf(1.5, words) % classes])[:words]
    orders = decode.circular(rng.random(shifts), words, 5)
    measured = [seconds(partial(decode.word_auc, scores, y, orders))[0] for _ in range(turns)]
    return within("word_auc", measured, 1.0, "s", cpu(), f"{words} words, {classes} classes, {shifts} shifts")


DECODING = f"""
import sys
import decode
config = decode.configure(decode.Config, sys.argv[1:])
decode.main(config)
print("peak", {PEAK} / 1e9, "GB")
"""


def decode_memory(electrodes=183, words=5136, minutes=30, dims=1600):
    """Resident memory at its peak, in a process of its own, mapped pages of the recording included: 21 lags of the whole recording, ten small convolutional
    decoders trained for an epoch on two folds of each."""
    import pandas as pd
    from data.recording import write_recording, write_set
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
                   'model_params={"num_models": 10, "conv_filters": 16}', "save_models=False", "n_folds=2", "beside=[]", "controls=[]"]
        out = subprocess.run([sys.executable, "-c", DECODING, *options], capture_output=True, text=True, cwd=Path(__file__).parent)
        if out.returncode:
            raise RuntimeError(out.stderr)
    peak = float(out.stdout.split("peak ")[1].split()[0])
    return within("decode_memory", [peak], 4.0, "GB", cpu(), f"{electrodes} electrodes, {words} words, 21 lags")


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
            loss = F.cross_entropy((steps[k]() @ model.lm.transformer.wte.weight.t()).float().flatten(0, 1), idx[:, -T:].flatten())
        loss.backward()
        optimizers[k].step()
        optimizers[k].zero_grad(set_to_none=True)

    for _ in range(3):
        step(0), step(1)
    times = [[seconds(partial(step, k))[0] for k in (0, 1)] for _ in range(turns)]
    return row("expert_step", *zip(*times), "<= 1.05", device(),
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
        return decode([prompt] * 16, start=partial(model._start, n))

    def other():
        return decode([list(range(1, room + T + 1))] * 16)

    ours(), other()
    times = [(ours(), other()) for _ in range(turns)]
    return row("prefix_decode", *zip(*times), "<= 1.1", device(), f"{str(Here.dtype)[6:]}")


def loader_wait(turns=3, steps=40):
    """Seconds that the embedded training step waits for EEG, every augmentation on each trial, as a share of the step; the ratio is over the 5 % asked
    for. The language model has the embedded shape."""
    import telepath
    from configurator import Run
    from data.tokens import tokenizer_state
    data = Path(__file__).resolve().parent / "data/synthetic_eeg"
    if not (data / "meta.yaml").exists():
        subprocess.run([sys.executable, str(data / "prepare.py")], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        lm = GPT(GPTConfig(block_size=128, vocab_size=4096, n_layer=4, n_head=4, n_embd=256, bias=False))
        save_checkpoint(f"{folder}/lm.pt", dict(**lm_state(lm), tokenizer=tokenizer_state(data.parent / "pydocs")))
        config = telepath.Config(dataset=str(data), lm=f"{folder}/lm.pt", out_dir=folder, augment=list(telepath.AUGMENT), augment_share=1.0, jitter=0.02,
                                 synonyms=True, device=Here.device.type)
        run = Run(config)
        experiment = telepath.Experiment(run, config, data)
        training = telepath.Training(run, config, experiment, experiment.sets["train"], alone=True)

        def steps_of(count):
            waited = training.waited
            for _ in range(count):
                telepath.supervised_step(run, config, experiment, training)
            return training.waited - waited

        steps_of(5)
        times = [seconds(partial(steps_of, steps)) for _ in range(turns)]
        run.close()
    return row("loader_wait", [waited / steps for _, waited in times], [0.05 * taken / steps for taken, _ in times], "<= 1", device(),
               f"{statistics.median(waited / taken for taken, waited in times):.1%} of a step of "
               f"{1e3 * statistics.median(taken for taken, _ in times) / steps:.0f} ms, {config.num_workers} threads; other is 5 % of it")


def mask_step(turns=7, C=64, P=8, patch=16, batch=4, ratio=0.75):
    """A pretraining step of foundation.py's model at 75 % random masking, 64 electrodes x 8 patches, both of its losses, without a linear guess; against the
    same encoder given the full length, mask tokens for what is hidden and a linear head on them, the masked-patch loss alone."""
    import foundation
    torch.manual_seed(0)
    shape = EncoderConfig(kind="transformer", tokens="electrode", n_embd=16, width=128, n_layer=6, n_head=4, patch=patch, reach=True)
    ours = foundation.MaskedAutoencoder(shape, P, 64, 2, 4).to(Here.device)
    full = nn.ModuleDict(dict(encoder=copy.deepcopy(ours.encoder), head=nn.Linear(shape.width, patch))).to(Here.device)
    full.token = nn.Parameter(torch.zeros(shape.width, device=Here.device))
    x, xyz = torch.randn(batch, C, P * patch, device=Here.device), foundation.places([f"G{i + 1}" for i in range(C)], np.zeros((C, 3)), True, "8x8")
    xyz, subject = torch.as_tensor(xyz, device=Here.device).float().expand(batch, -1, -1), torch.zeros(batch, dtype=torch.long, device=Here.device)
    visible = torch.from_numpy(foundation.draw_mask("random", np.full(batch, C), C, P, ratio, np.random.default_rng(0))).to(Here.device)

    def masked_loss():
        hidden = ~visible.flatten(1)
        tokens, present = full.encoder.tokenize(x * visible.repeat_interleave(patch, 2), xyz, subject)
        h = full.encoder.think(tokens + hidden[..., None] * full.token, present, full.encoder.spots(xyz, P))
        return (full.head(h) - full.encoder.patches(x).flatten(1, 2))[hidden].square().mean()

    losses = (lambda: ours(x, xyz, subject, visible, torch.zeros_like(x))[0].sum(), masked_loss)
    optimizers = [torch.optim.AdamW(model.parameters()) for model in (ours, full)]

    def step(k):
        with Here().autocast():
            loss = losses[k]()
        loss.backward()
        optimizers[k].step()
        optimizers[k].zero_grad(set_to_none=True)

    for _ in range(2):
        step(0), step(1)
    times = [[seconds(partial(step, k))[0] for k in (0, 1)] for _ in range(turns)]
    return row("mask_step", *zip(*times), ">= 2", device(), f"{C} electrodes x {P} patches, {str(Here.dtype)[6:]}")


def fastfood(turns=3, bits=24, d=1000):
    """From z to 2^24 parameters and back, P a Fastfood with normal diagonal: blocks of 2^10 by small matrix products, against one transform of the whole
    length by the textbook butterfly that concatenates sums and differences."""
    import warp
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
    return row("fastfood", *zip(*pairs), ">= 8", device(), f"D = 2^{bits}, d = {d}, forward and backward")


def warp_step(turns=9, steps=40, d=750):
    """A training step of a 784-200-200-10 network in 750 dimensions, against the step of the whole network; batch 128, fused Adam on both sides."""
    import warp

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
    return row("warp_step", *zip(*pairs), "<= 2.5", device(), f"D = {models[0].D:,}, d = {d}, batch 128")


def sweep_problem(stimuli=256, tokens=12, width=64, layers=2, units=64):
    """A tiny GPT as a reader, its inputs, and planted responses."""
    import warp
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
    import warp
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
    return row("warp_sweep", *zip(*pairs), ">= 5" if Here.device.type == "cuda" else ">= 1", device(),
               f"{len(dims) * seeds} fits of {steps} steps, {K} side by side here; ours takes {slowest:.0f} s of at most 300 s")


WARPING = """
import sys, torch
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
print({peak}, sum(p.numel() for p in model.parameters()) * 4)
"""


def warp_memory(turns=2, d=1000, n_layer=12, n_embd=768, vocab=50304):
    """Peak memory of training GPT-2 (124 M parameters) in 1,000 dimensions above that of running it, each in a process of its own, over the size of
    the weights."""
    shape = dict(block_size=1024, vocab_size=vocab, n_layer=n_layer, n_head=12, n_embd=n_embd)
    above, weights = [], 0
    for _ in range(turns):
        peaks = []
        for train in (True, False):
            code = WARPING.format(root=str(Path(__file__).resolve().parent), shape=shape, layers=n_layer, vocab=vocab, train=train, d=d, peak=PEAK)
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
            peaks.append(int(out[0]))
            weights = int(out[1])
        above.append(peaks[0] - peaks[1])
    ratios = [a / weights for a in above]
    return dict(name="warp_memory", ours=f"{statistics.median(above) / 2 ** 20:.0f} MiB", other=f"{weights / 2 ** 20:.0f} MiB",
                ratio=round(statistics.median(ratios), 2), low=round(min(ratios), 2), high=round(max(ratios), 2), turns=turns, target="<= 3.5", device=cpu(),
                note=f"peak above plain inference over the weights, {weights // 4:,} parameters, d = {d}")


CLAIMS = {claim.__name__: claim for claim in (
    train_step, train_memory, spatial_share, swap, generate, generate_half, minimal_pairs,
    probe_pass, probe_fit, app_rerun,
    lag_windows, word_auc, decode_memory,
    expert_step, prefix_decode, loader_wait, mask_step,
    fastfood, warp_step, warp_sweep, warp_memory,
)}


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
