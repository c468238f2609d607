"""How much faster or leaner is our code than an honest alternative, on this machine?

    python bench.py                           # every claim that has a target on this machine
    python bench.py claims=swap,generate      # some of them
    python bench.py claims=swap dtype=float32 # as on a CPU without bfloat16
    python bench.py gpu=True                  # make gpu: tests and numbers of one GPU, docs/gpu.md

A claim is one function. It runs our code and an alternative in turns, in one process and one
precision unless its docstring says otherwise. The alternative is what a careful person would write
first. The table at the end of this file lists the targets and the machines where they hold.
"""

import copy
import ctypes
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
from torch.nn import functional as F

import positions
from configurator import HERE, Run, check_keys, configure
from data import InputError, write_aside
from data.states import pool_tokens
from model import GPT, EncoderConfig, GPTConfig, NeuralEncoder, NeuralGPT, lm_state, save_checkpoint

# Claims import the scripts and rivals that they measure, because imports take time and memory.


@dataclass
class Config:
    claims: list[str] = field(default_factory=list)  # none: all that have a target on this machine
    gpu: bool = False  # instead run the tests marked gpu and GPT-2 124M, and write docs/gpu.md
    out_dir: str = "out/bench"  # bench.md, the table
    seed: int = 1337
    device: str = "auto"  # cuda, cpu
    dtype: str = "auto"  # float32 on a CPU with bfloat16 acts like a CPU without it

    def check(self):
        check_keys(self.claims, [claim.__name__ for claim in CLAIMS], "claims")


# ---- measuring


@dataclass
class Measured:
    """Measurements of our code and the alternative; ours[i] and other[i] ran in the same turn."""

    ours: list
    other: list
    note: str = ""
    unit: str = "s"


def seconds(function):
    """Return the wall time of one call, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def in_turns(ours, other, turns, warm_up=1):
    """Time two functions in turns; return Measured and the last result of each."""
    for _ in range(warm_up):
        ours()
        other()
    measured = Measured([], [])
    for _ in range(turns):
        duration, a = seconds(ours)
        measured.ours.append(duration)
        duration, b = seconds(other)
        measured.other.append(duration)
    return measured, a, b


def peak_in_process(code):
    """Run `code` in a new process; return its peak GPU memory (GB), or resident without a GPU."""
    end = """
import torch
peak = torch.cuda.max_memory_allocated()
if not torch.cuda.is_available():
    peak = 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(peak / 1e9)
"""
    process = subprocess.run([sys.executable, "-c", code + end], cwd=HERE, capture_output=True)
    if process.returncode:
        raise RuntimeError(process.stderr.decode())
    return float(process.stdout.split()[-1])


def peak_above(function):
    """Return how far resident memory (MB) rises during one call; Linux only."""
    status = Path("/proc/self/status")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    function()
    return (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before) / 1024


def random_tokens(run, rows, length, vocab_size):
    """Draw idx and targets (rows, length) with a language's word frequencies: easy to learn."""
    words = np.random.default_rng(0).zipf(1.2, 40 * rows * (length + 1))
    words = words[words < vocab_size][: rows * (length + 1)]
    batch = torch.as_tensor(words).view(rows, length + 1).to(run.device)
    return batch[:, :-1], batch[:, 1:]


def optimisation_step(autocast, optimizer, loss_of):
    """Return a function that takes one optimiser step on loss_of() and returns the loss."""

    def step():
        with autocast():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


class Words:
    """A tokenizer of texts that are numbers, so that neither side pays for encoding."""

    eot = 0

    def encode(self, text):
        return list(map(int, text.split()))


def gpt2_model(**options):
    """Return a GPT in the shape of GPT-2 124M."""
    shape = {"block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    return GPT(GPTConfig(**shape, gelu="tanh", **options))


# ---- training and text


def plain_loss(model, idx, targets):
    """Return the loss of a first version: the library's attention, logits of the whole batch."""
    B, T = idx.shape
    parts = model.transformer
    x = parts.wpe.add(parts.wte(idx), torch.arange(T, device=idx.device))
    for block in parts.h:
        qkv = block.attn.c_attn(block.ln_1(x)).view(B, T, 3, model.config.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, T, -1))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
    logits = F.linear(parts.ln_f(x), parts.wte.weight)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def trainer(run, plain=False):
    """Return a training step: compiled, in the run's precision, chunked head, fused optimiser.

    With `plain`, return a first version: eager, in float32.
    """
    shape = {"block_size": 256, "vocab_size": 50304, "n_layer": 6, "n_head": 6, "n_embd": 384}
    model = GPT(GPTConfig(**shape, bias=False)).to(run.device)
    idx, targets = random_tokens(run, 8, 256, 50304)
    if plain:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return optimisation_step(nullcontext, optimizer, lambda: plain_loss(model, idx, targets))
    model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return optimisation_step(run.autocast, optimizer, lambda: model(idx, targets).loss)


def train_step(run):
    """A training step of 6 layers x 384, 8 x 256 tokens, vocabulary 50,304, against a plain eager
    float32 model.
    """
    measured, a, b = in_turns(trainer(run), trainer(run, plain=True), turns=24, warm_up=2)
    assert abs(a / b - 1) < 0.01, f"the losses {a:.4f} and {b:.4f} differ"
    measured.note = f"losses after 26 steps {a:.3f} and {b:.3f}"
    return measured


def train_memory(run):
    """Peak memory of the two training steps of train_step, each in its own process."""
    measured = Measured([], [], unit="GB")
    with tempfile.TemporaryDirectory() as folder:
        options = f"out_dir={folder!r}, dtype={str(run.dtype)[6:]!r}"
        before = f"import bench\nrun = bench.Run(bench.Config({options}))\nstep = bench.trainer(run"
        after = ")\nfor _ in range(3): step()"
        for _ in range(3):
            measured.ours.append(peak_in_process(before + after))
            measured.other.append(peak_in_process(before + ", plain=True" + after))
    return measured


def spatial_share(run):
    """The spatial loss alone, forward and backward, over the whole step: 12 layers x 784, 4 x 256
    tokens, 5 windows of radius 5 per sheet.
    """
    shape = {"block_size": 256, "vocab_size": 50304, "n_layer": 12, "n_head": 16, "n_embd": 784}
    sheets = {"sheet": True, "radius": 5, "windows": 5, "alpha": 2.5}
    model = GPT(GPTConfig(**shape, **sheets, bias=False)).to(run.device)
    model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    idx, targets = random_tokens(run, 4, 256, 50304)
    generator = torch.Generator().manual_seed(0)
    taps = []
    for _ in range(24):
        tap = torch.randn(4, 256, 784, device=run.device)
        taps.append(tap.to(run.dtype).requires_grad_())
    loss_of = torch.compile(positions.spatial_loss)
    step = optimisation_step(
        run.autocast, optimizer, lambda: model(idx, targets, model.draw_windows(generator)).loss
    )

    def spatial():
        units, near = model.sheets(model.draw_windows(generator))
        losses = []
        for x, u in zip(taps, units.flatten(0, 1)):
            x.grad = None  # so that backward writes and does not add
            losses.append(loss_of(x, u, near))
        sum(losses).backward()

    units, near = model.sheets(model.draw_windows(generator))
    exact = positions.spatial_loss(taps[0].detach().float(), units[0, 0], near)
    assert abs(exact - loss_of(taps[0], units[0, 0], near)) < 1e-5, "not the float32 loss"
    return in_turns(spatial, step, turns=20)[0]


def swap(run):
    """Pre-optimising a sheet of 784 units, radius 10, to the loss of 2,000 trial swaps with
    recomputed correlations, against those swaps.
    """
    n_units, n_trials = 784, 2000
    shape = {"block_size": 256, "vocab_size": 4096, "n_layer": 2, "n_head": 16}
    model = GPT(GPTConfig(**shape, n_embd=n_units, bias=False)).to(run.device)
    idx, _ = random_tokens(run, 16, 256, 4096)
    with torch.no_grad():
        x = model(idx, hidden=["layer.1.mlp"]).hidden["layer.1.mlp"].flatten(0, 1).cpu()
    sheet = positions.Sheet(n_units, 10)
    near = torch.as_tensor(positions.closeness(sheet.cells[0], sheet.side), dtype=torch.float32)

    def loss(unit_at_cell):
        return positions.spatial_loss(x, torch.as_tensor(unit_at_cell[sheet.cells]), near).item()

    measured = Measured([], [])
    for turn in range(3):
        start = positions.random_positions(1, n_units, turn)[0]
        recompute = partial(recomputing_swaps, x, start, sheet.cells, near, n_trials, turn)
        duration, layout = seconds(recompute)
        measured.other.append(duration)
        target = loss(layout)

        def ours(target=target):
            return positions.swap_sheet(positions.correlations(x), sheet, stop_loss=target)[0]

        durations = []
        for _ in range(11):
            duration, layout = seconds(ours)
            durations.append(duration)
        measured.ours.append(statistics.median(durations))
        assert loss(layout) <= target + 1e-6, "ours did not reach the alternative's loss"
    losses = f"alternative {target:.3f}, ours {loss(layout):.3f}"
    measured.note = f"loss at the start {loss(start):.3f}, {losses}"
    return measured


def recomputing_swaps(x, unit_at_cell, cells, near, n_trials, seed):  # noqa: PLR0913
    """Swap as textbooks do: recompute a window's loss from x (T, C); undo swaps that raise it."""
    rng = np.random.default_rng(seed)
    n = cells.shape[1]
    lower = torch.tril_indices(n, n, -1)
    lower = lower[0] * n + lower[1]  # indices into the flattened (n, n)
    d = near.flatten()[lower]
    d = (d - d.mean()) / (d - d.mean()).norm()

    def loss(features):
        r = torch.corrcoef(features.t()).flatten()[lower]
        r = r - r.mean()
        return 0.5 * (1 - (r @ d) / r.norm()).item()

    layout = unit_at_cell.copy()
    for window in rng.permutation(len(cells))[: n_trials // 50]:
        window_cells = cells[window]
        features = x[:, layout[window_cells]]  # (T, n)
        least = loss(features)
        for _ in range(50):
            pair = rng.choice(n, 2, replace=False)
            features[:, pair] = features[:, pair[::-1].copy()]
            new = loss(features)
            if new <= least:
                least = new
                layout[window_cells[pair]] = layout[window_cells[pair[::-1]]]
            else:
                features[:, pair] = features[:, pair[::-1].copy()]
    return layout


def minimal_pairs(run):
    """Scoring 500 minimal pairs in batches by length, against one sentence at a time."""
    import topography
    from convert import HiddenStates

    shape = {"block_size": 128, "vocab_size": 4096, "n_layer": 4, "n_head": 4, "n_embd": 256}
    model = GPT(GPTConfig(**shape, bias=False)).to(run.device).eval()
    rng = np.random.default_rng(0)
    texts = []
    for length in rng.integers(6, 17, 1000):
        texts.append(" ".join(map(str, rng.integers(1, 4096, length))))
    parts = {"model": model, "tokenizer": Words()}
    lm = HiddenStates(parts, run.device, run.dtype, bos=True, head=True)
    rows, _ = lm.encode(texts)

    def score(batch_tokens):
        return topography.sentence_scores(run, lm, rows, batch_tokens)

    # batches of at most one token hold a single sentence
    measured, together, alone = in_turns(partial(score, 2048), partial(score, 1), turns=5)
    assert np.abs(together - alone).max() < 0.02 * np.abs(alone).max(), "the scores differ"
    return measured


def generate(run):
    """128 greedy tokens for 8 prompts, GPT-2 124M shape in float32, against Hugging Face with the
    same weights.
    """
    from transformers import GPT2LMHeadModel

    from convert import export_gpt

    model = gpt2_model()
    with tempfile.TemporaryDirectory() as folder:
        export_gpt(model, folder)
        hf_model = GPT2LMHeadModel.from_pretrained(folder).to(run.device).eval()
    model = model.to(run.device).eval()
    prompts = torch.as_tensor(np.random.default_rng(0).integers(0, 50257, (8, 16)))
    prompts = prompts.to(run.device)
    options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def other():
        mask = torch.ones_like(prompts)
        return hf_model.generate(prompts, attention_mask=mask, **options)[:, 16:].tolist()

    def ours():
        return model.generate(prompts.tolist(), 128, temperature=0)

    measured, a, b = in_turns(ours, other, turns=3)
    assert a == b, "the tokens differ"
    return measured


# ---- probes


def probing(run, n_texts):
    """Return two functions that pool the states of GPT-2's shape over texts of 24 tokens."""
    import probe

    parts = {"model": gpt2_model().to(run.device).eval(), "tokenizer": Words(), "name": "gpt2"}
    model = probe.LMModel(parts, run.device, run.dtype)
    texts = []
    for row in np.random.default_rng(0).integers(1, 50257, (n_texts, 24)):
        texts.append(" ".join(map(str, row)))
    layers = range(1, 13)
    poolings = ["0.0", "0.25", "0.5", "0.75", "1.0", "mean"]

    def on_the_fly():
        with tempfile.TemporaryDirectory() as cache:
            states = probe.pooled_states(model, texts, layers, poolings, cache, batch_tokens=1024)
            return states.arrays["mean"][-1]

    def keep_all():
        """Keep every state of every token of the same batches, then pool."""
        rows, _ = model.encode(texts)
        batches = []
        for first in range(0, len(rows), 1024 // 24):
            ids, real = model.pad(rows[first : first + 1024 // 24])
            batches.append((model.states(ids, real, layers), real))
        pooled = {}
        for pooling in poolings:
            parts = []
            for states, real in batches:
                by_layer = [pool_tokens(states[n].float(), real, pooling) for n in layers]
                parts.append(torch.stack(by_layer, 1).cpu())
            pooled[pooling] = torch.cat(parts)
        with tempfile.TemporaryDirectory() as folder:
            for pooling, array in pooled.items():
                np.save(f"{folder}/{pooling}.npy", array.numpy())
        return pooled["mean"][-1].numpy()

    return on_the_fly, keep_all


def probe_pass(run):
    """Pooling the states of 12 layers on the fly, against a pass that keeps all states and pools
    afterwards.
    """
    measured, a, b = in_turns(*probing(run, 300), turns=3)
    assert np.abs(a - b).max() < 1e-3 * np.abs(b).max(), "the pooled states differ"
    measured.note = "300 texts of 24 tokens, 12 layers, 6 poolings, both written to disk"
    return measured


def probe_memory(run):
    """Peak memory of the two passes of probe_pass above that of the model."""
    ours, other = probing(run, 300)
    ours()
    measured = Measured([], [], unit="MB")
    for _ in range(3):
        measured.ours.append(peak_above(ours))
        measured.other.append(peak_above(other))
    return measured


def probe_fit(run):
    """LDA and ridge at 60 sites of 2,000 x 768 in closed form, against a scikit-learn fit each."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    import probe

    n_sites, n, width, every = 60, 2000, 768, 6
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, n)
    X = np.empty((n_sites, n, width), np.float32)
    for site in X:  # a decaying spectrum, as hidden states have
        rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
        z = rng.normal(size=(n, width))
        z[:, 5] += 0.8 * y
        site[:] = z @ (rotation * (1 + np.arange(width)[:, None]) ** -0.7)
    train, test = slice(0, n * 4 // 5), slice(n * 4 // 5, n)
    labels = np.eye(2)[y]
    classifiers = [LinearDiscriminantAnalysis("lsqr", shrinkage=s) for s in probe.LDA.penalties]
    classifiers += [RidgeClassifier(alpha) for alpha in probe.Ridge.penalties]

    def ours():
        scores = np.empty((n_sites, len(classifiers)))
        for site, x in enumerate(X):
            outputs = []
            for make in (probe.LDA, probe.Ridge):
                model = make(width).fit(x[train].astype(float), labels[train])
                outputs += [model.predict(x[test].astype(float), p) for p in make.penalties]
            scores[site] = (np.argmax(outputs, 2) == y[test]).mean(1)
        return scores

    def sklearn_fits():
        scores = []
        for site in X[::every]:
            scaler = StandardScaler().fit(site[train])
            z, z_test = scaler.transform(site[train]), scaler.transform(site[test])
            scores.append([c.fit(z, y[train]).score(z_test, y[test]) for c in classifiers])
        return np.array(scores)

    measured, a, b = in_turns(ours, sklearn_fits, turns=3)
    measured.other = [every * duration for duration in measured.other]
    assert np.abs(a[::every] - b).max() < 0.011, "the scores differ"
    measured.note = f"11 penalties; scikit-learn on every {every}th site, times {every}"
    return measured


def app_rerun(run):
    """A rerun of the app on 100,000 rows, over 1 s."""
    from streamlit.testing.v1 import AppTest

    columns = {
        "model": [f"model-{i}" for i in range(10)],
        "probe": ["LDA", "Logistic", "Ridge", "SVM"],
        "metric": ["accuracy", "auc", "f1", "mcc"],
        "baseline": ["", "random_init", "control", "layer0", "majority"],
        "layer": range(25),
        "quantile": [0.0, 0.25, 0.5, 0.75, 1.0],
    }
    table = pd.MultiIndex.from_product(columns.values(), names=columns).to_frame(index=False)
    score = np.random.default_rng(0).random(len(table))
    table = table.assign(dataset="grammar/tense", score=score, low=score - 0.05, high=score + 0.05)
    table = table.assign(chance=0.5, n=2000, n_train=1600, p=0.01, p_holm=0.04, params=1e8)
    table = table.assign(synthetic=True, layer_method="", quantile_method="", options="x")
    measured = Measured([], [])
    with tempfile.TemporaryDirectory() as folder:
        table.to_csv(f"{folder}/results.csv", index=False)
        with mock.patch.object(sys, "argv", ["probe_app.py", f"out_dir={folder}"]):
            for _ in range(5):
                app = AppTest.from_file(str(HERE / "probe_app.py"), default_timeout=120).run()
                duration, app = seconds(app.selectbox(key="metric").set_value("mcc").run)
                assert not app.exception and app.get("plotly_chart"), "the app failed"
                measured.ours.append(duration)
                measured.other.append(1.0)
    return measured


# ---- recordings and decoding


def lag_windows(run):
    """Bin means of 5,000 windows at 21 lags, against mne.Epochs at each lag, from memory."""
    import mne

    from data.montage import lag_windows

    sfreq, n_electrodes, n_words, width = 512, 32, 5000, 320
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(30 * 60 * sfreq, n_electrodes)).astype(np.float32) + 3
    info = mne.create_info(n_electrodes, sfreq)
    raw = mne.io.RawArray(signal.T.astype(float), info, verbose="error")
    inside = np.arange(4 * sfreq, len(signal) - 4 * sfreq)
    rows = np.sort(rng.choice(inside, n_words, replace=False))
    events = np.column_stack([rows, 0 * rows, 1 + 0 * rows])
    offsets = [round(sfreq * lag / 1000) - width // 2 for lag in range(-2000, 2001, 200)]
    edges = np.arange(0, width + 1, width // 10)
    options = {"baseline": None, "preload": True, "verbose": "error"}

    def ours():
        return lag_windows(signal, np.arange(n_electrodes), rows, offsets, edges)

    def epochs():
        windows = []
        for offset in offsets:
            ends = {"tmin": offset / sfreq, "tmax": (offset + width - 1) / sfreq}
            data = mne.Epochs(raw, events, **ends, **options).get_data(copy=False)
            windows.append(data.reshape(n_words, n_electrodes, 10, -1).mean(-1))
        return windows

    measured, a, b = in_turns(ours, epochs, turns=3)
    assert np.abs(a[0] - b[0]).max() < 1e-6 * np.abs(b[0]).max(), "the windows differ"
    return measured


def word_auc(run):
    """AUC of 1,000 words x 440 classes with 1,000 shifts, over 1 s."""
    from sklearn.metrics import roc_auc_score

    import decode

    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1000, 440))
    y = np.concatenate([np.arange(440), rng.zipf(1.5, 1000) % 440])[:1000]
    orders = decode.circular(rng.random(1000), 1000, 5)
    measured = Measured([], [])
    for _ in range(5):
        duration, aucs = seconds(partial(decode.word_auc, scores, y, orders))
        measured.ours.append(duration)
        measured.other.append(1.0)
    assert abs(aucs[0, 7] - roc_auc_score(y == 7, scores[:, 7])) < 1e-9
    return measured


def decode_memory(run):
    """Peak memory of decode.py on 183 electrodes, 5,136 words and 21 lags, over 4 GB."""
    from data.recording import write_recording, write_set

    n_electrodes, n_words, sfreq, minutes, width = 183, 5136, 512, 30, 1600
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        onset = np.sort(rng.uniform(3, 60 * minutes - 4, n_words)).round(3)
        table = pd.DataFrame({"word_idx": np.arange(n_words), "start": onset, "end": onset})
        table = table.assign(word="a", norm_word=rng.zipf(1.5, n_words) % 400, sentence=0)
        table.to_csv(folder / "words.csv", index=False)
        table[["word_idx"]].to_csv(folder / "tokens.csv", index=False)
        rng.normal(size=(n_words, width)).astype("<f2").tofile(folder / "features.f16")
        names = pd.DataFrame({"name": [f"G{i}" for i in range(n_electrodes)]})
        blocks = (
            rng.standard_normal((sfreq * 60, n_electrodes), np.float32) for _ in range(minutes)
        )
        facts = {"sfreq": sfreq, "unit": "V", "subject": "sub-01", "source": "bench"}
        events = pd.DataFrame({"onset": onset})
        write_recording(folder / "sub-01", blocks, names, events, **facts, synthetic=True)
        write_set(
            folder,
            ["sub-01"],
            synthetic=True,
            words="words.csv",
            tokens={"gpt2-xl": "tokens.csv"},
            features={"gpt2-xl": {"layer-24": "features.f16"}},
            arrays={"features.f16": {"shape": [n_words, width], "dtype": "float16"}},
        )
        options = [f"dataset={folder}", f"out_dir={folder / 'out'}", "min_lag=-2000"]
        options += ["max_lag=2001", "lag_step=200", "window=0.625", "pca=50", "epochs=1"]
        options += ['model_params={"num_models": 10, "conv_filters": 16}', "n_folds=2"]
        options += ["beside=[]", "controls=[]", "save_models=False"]
        code = f"import decode\ndecode.main(decode.configure(decode.Config, {options}))\n"
        return Measured([peak_in_process(code)], [4.0], unit="GB")


def eeg_prepare(run):
    """Preparing a BIDS recording, against loading and filtering the same file with MNE."""
    import mne

    from data.bids_eeg import prepare
    from data.synthetic_eeg.prepare import write_brainvision, write_json, write_table

    sfreq, n_seconds = 250, 1200
    names = mne.channels.make_standard_montage("biosemi64").ch_names
    signal = 1e-5 * np.random.default_rng(0).standard_normal((64, sfreq * n_seconds), np.float32)
    events = pd.DataFrame({"onset": np.arange(2.0, n_seconds - 3, 2.0), "duration": 0.5})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "bids")
        stem = root / "sub-01/eeg/sub-01_task-words"
        write_brainvision(f"{stem}_eeg", signal, names, sfreq, [0])
        write_table(Path(f"{stem}_events.tsv"), events.assign(word="word"))
        write_json(root / "dataset_description.json", Name="synthetic")
        config = prepare.Config(root=str(root), overwrite=True)

        def ours():
            prepare.convert(Path(folder, "set"), root, config, source="bench", synthetic=True)

        def load_and_filter():
            raw = mne.io.read_raw(f"{stem}_eeg.vhdr", preload=True, verbose="error")
            raw.filter(config.l_freq, config.h_freq, picks="all", verbose="error")

        measured = in_turns(ours, load_and_filter, turns=3)[0]
    measured.note = "64 channels, 250 Hz, 20 minutes of one person; ours also resamples and writes"
    return measured


# ---- telepath, foundation, warp


def neural_gpt(run):
    """Return a GPT of 6 layers x 384 with experts in each, and neural tokens (16, 36, 384)."""
    torch.manual_seed(0)
    shape = {"block_size": 256, "vocab_size": 4096, "n_layer": 6, "n_head": 6, "n_embd": 384}
    lm = GPT(GPTConfig(**shape, bias=False))
    model = NeuralGPT(lm, NeuralEncoder(EncoderConfig(n_embd=384)), "expert").to(run.device)
    return model, torch.randn(16, 36, 384, device=run.device) * 0.02


def expert_step(run):
    """A training step of the experts with 36 neural tokens, against the same GPT unrouted."""
    model, n = neural_gpt(run)
    plain = copy.deepcopy(model.lm)
    model.requires_grad_(False)
    model.experts.requires_grad_(True)
    plain.requires_grad_(False)
    plain.transformer.h.requires_grad_(True)
    # train equally many weights: the last expert has no output projection and no MLP
    for part in (plain.transformer.h[-1].attn.c_proj, plain.transformer.h[-1].mlp):
        part.requires_grad_(False)
    for block in plain.transformer.h:
        block.ln_1.requires_grad_(False)
        block.ln_2.requires_grad_(False)
    n_text = 8
    idx = torch.randint(0, 4096, (16, n.size(1) + 2 + n_text), device=run.device)

    def step(model, states):
        trained = [p for p in model.parameters() if p.requires_grad]
        head = plain.transformer.wte.weight

        def loss_of():
            logits = (states() @ head.t()).float()
            return F.cross_entropy(logits.flatten(0, 1), idx[:, -n_text:].flatten())

        n_trained.append(sum(p.numel() for p in trained))
        return optimisation_step(run.autocast, torch.optim.AdamW(trained, lr=1e-5), loss_of)

    n_trained = []
    ours = step(model, lambda: model.trunk(n, idx[:, -n_text:]))
    other = step(plain, lambda: plain.trunk(idx)[0][:, -n_text:])
    assert n_trained[0] == n_trained[1], n_trained
    return in_turns(ours, other, turns=15, warm_up=3)[0]


def prefix_decode(run):
    """A token generated after a cached neural prefix, against plain GPT after as many tokens."""
    model, n = neural_gpt(run)
    model.eval()
    n_text, n_new = 8, 64
    prompt = list(range(1, n_text + 1))
    longer = list(range(1, n.size(1) + 2 + n_text + 1))

    def decode(row, **options):
        """Return the seconds per token after the first."""
        with run.autocast():
            stream = model.lm.stream([row] * 16, n_new, temperature=0, **options)
            next(stream)  # reads the prompt
            return seconds(partial(list, stream))[0] / (n_new - 1)

    measured = Measured([], [])
    for turn in range(8):
        ours, other = decode(prompt, start=partial(model._start, n)), decode(longer)
        if turn:  # the first is a warm-up
            measured.ours.append(ours)
            measured.other.append(other)
    return measured


def loader_wait(run):
    """Waiting for EEG with every augmentation on each trial, over 5 % of a step."""
    import telepath
    from data.tokens import tokenizer_state

    folder = run.dataset("synthetic_eeg")
    shape = {"block_size": 128, "vocab_size": 4096, "n_layer": 4, "n_head": 4, "n_embd": 256}
    state = lm_state(GPT(GPTConfig(**shape, bias=False)))
    save_checkpoint(
        run.out / "lm.pt", {**state, "tokenizer": tokenizer_state(run.dataset("pydocs"))}
    )
    config = telepath.Config(
        dataset=str(folder),
        lm=str(run.out / "lm.pt"),
        out_dir=str(run.out),
        augment=list(telepath.AUGMENT),
        augment_share=1.0,
        jitter=0.02,
        synonyms=True,
    )
    experiment = telepath.Experiment(run, config, folder)
    training = telepath.Training(run, config, experiment, experiment.sets["train"], alone=True)

    def steps(count):
        waited = training.waited
        for _ in range(count):
            for batch in training.batches():
                loss = telepath.supervised_loss(run, config, experiment, batch)["loss"]
                training.backward(loss)
            training.update()
        return (training.waited - waited) / count

    steps(5)
    measured = Measured([], [])
    for _ in range(3):
        duration, waited = seconds(partial(steps, 40))
        measured.ours.append(waited)
        measured.other.append(0.05 * duration / 40)
    return measured


def mask_step(run):
    """A pretraining step that encodes only the visible quarter, against masking in place."""
    import foundation

    torch.manual_seed(0)
    shape = EncoderConfig(
        kind="transformer", tokens="electrode", n_embd=16, width=128, n_layer=6, n_head=4, patch=16
    )
    shape.reach = True
    C, P, B = 64, 8, 4
    ours = foundation.MaskedAutoencoder(shape, C, P, 64, 2).to(run.device)
    full = nn.ModuleDict({"encoder": copy.deepcopy(ours.encoder), "head": nn.Linear(128, 16)})
    full.token = nn.Parameter(torch.zeros(128))
    full.to(run.device)
    x = torch.randn(B, C, P * 16, device=run.device)
    xyz = torch.randn(B, C, 3, device=run.device)
    subject = torch.zeros(B, dtype=torch.long, device=run.device)
    electrodes = torch.arange(C, device=run.device)
    visible = foundation.draw_mask("random", (B, C, P), 0.75, np.random.default_rng(0))
    visible = torch.as_tensor(visible, device=run.device)

    def in_place():
        """Run the encoder on all tokens, with mask tokens for hidden ones and a linear head."""
        net = full.encoder.net
        hidden = ~visible.flatten(1)
        tokens, present = net.tokenize(x * visible.repeat_interleave(16, 2), xyz, subject)
        tokens = tokens + hidden[..., None] * full.token
        guess = full.head(net.think(tokens, present, net.spots(xyz, P)))
        patches = x.unflatten(2, (P, 16)).flatten(1, 2)
        return (guess - patches)[hidden].square().mean()

    def masked():
        return ours(x, visible, xyz, subject, electrodes)[0].sum()

    steps = []
    for model, loss_of in ((ours, masked), (full, in_place)):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        steps.append(optimisation_step(run.autocast, optimizer, loss_of))
    return in_turns(*steps, turns=7, warm_up=2)[0]


def fastfood(run):
    """Projecting 1,000 dimensions to 2^24 parameters and back, against the textbook butterfly."""
    import warp

    size, d = 2**24, 1000
    holder = nn.Module()
    holder.p = nn.Parameter(torch.zeros(size, device=run.device))
    wrapper = warp.FastfoodWrapper(holder, d)
    grad = torch.randn(size, device=run.device)
    sign = torch.randint(0, 2, (size,), device=run.device) * 2.0 - 1
    gauss = torch.randn(size, device=run.device)
    order = torch.randperm(size, device=run.device)
    z = torch.zeros(d, device=run.device, requires_grad=True)

    def butterfly(x):
        h = 1
        while h < size:
            x = x.view(-1, 2, h)
            x = torch.cat([x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], 1)
            h *= 2
        return x.view(-1)

    def textbook():
        x = butterfly(sign * F.pad(z, (0, size - d)))
        (butterfly(gauss * x[order]) / size).backward(grad)

    def ours():
        wrapper.tensors()["p"].backward(grad)

    return in_turns(ours, textbook, turns=3)[0]


def warp_step(run):
    """A training step of a 784-200-200-10 network in 750 dimensions, against all its weights."""
    import warp

    torch.manual_seed(0)
    sizes = (784, 200, 200, 10)
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    network = nn.Sequential(*layers[:-1]).to(run.device)
    wrapper = warp.FastfoodWrapper(copy.deepcopy(network), 750)
    x = torch.randn(128, 784, device=run.device)
    y = torch.randint(0, 10, (128,), device=run.device)
    steps = []
    for model in (wrapper, network):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

        def forty_steps(model=model, optimizer=optimizer):
            for _ in range(40):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

        steps.append(forty_steps)
    return in_turns(*steps, turns=9)[0]


WARPING = """
import torch, bench, warp
model = bench.gpt2_model().eval()
idx = torch.randint(0, 50257, (2, 32))
if {train}:
    wrapper = warp.FastfoodWrapper(model, 1000)
    adam = torch.optim.Adam(wrapper.parameters(), 1e-3)
    for _ in range(2):
        adam.zero_grad()
        wrapper(idx, hidden=[12]).hidden[12].square().sum().backward()
        adam.step()
else:
    with torch.no_grad():
        model(idx, hidden=[12]).hidden[12]
"""


def warp_memory(run):
    """Peak memory of warping GPT-2 124M beyond that of running it, over its weights."""
    weights = 4 * sum(p.numel() for p in gpt2_model().parameters()) / 1e9
    measured = Measured([], [], unit="GB", note="peak beyond plain inference, over the weights")
    for _ in range(2):
        peaks = [peak_in_process(WARPING.format(train=train)) for train in (True, False)]
        measured.ours.append(peaks[0] - peaks[1])
        measured.other.append(weights)
    return measured


# ---- one GPU: make gpu


def measure_gpu(run):
    """Run the tests marked gpu, train and generate with GPT-2 124M; write docs/gpu.md."""
    if run.device.type != "cuda":
        raise InputError("make gpu needs a CUDA GPU, but torch finds none on this machine")
    files = [f"tests/test_{name}.py" for name in ("gpu", "train", "scripts")]
    tests = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-m", "gpu", *files]
    process = subprocess.run(tests, cwd=HERE, capture_output=True, text=True)
    print(process.stdout)
    rows = [train_on_gpu(run, alpha=alpha) for alpha in (0, 2.5)]
    table = pd.DataFrame(rows).round(3)
    claims = [measure(run, claim) for claim in (generate, probe_pass, expert_step, prefix_decode)]
    text = f"""# One GPU

`make gpu` wrote this on {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA
{torch.version.cuda}, {time.strftime("%F")}.

Tests marked `gpu`: {process.stdout.strip().splitlines()[-1].strip("= ")}.

GPT-2 124M (12 layers x 784 units, 1,024 tokens), `python train.py config/train_gpt2.yaml` with
embedded text and {run.dtype}; MFU is the share of the data sheet's dense 16-bit peak.

{markdown(table)}

{markdown(pd.DataFrame(claims))}
"""
    write_aside(HERE / "docs/gpu.md", text)
    print(text)
    if process.returncode:
        raise InputError("tests marked gpu failed: see the output above")


def train_on_gpu(run, alpha):
    """Run 60 steps of two micro-batches of train.py in this process; return a row of the table."""
    import train

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        options = [f"alpha={alpha}", "dataset=pydocs", "tokens_per_step=98304", "max_iters=60"]
        options += ["warmup_iters=10", "eval_interval=60", "eval_batches=4"]
        options += ["log_interval=20", "wandb_log=False", f"out_dir={folder}"]
        train.main(configure(train.Config, [str(HERE / "config/train_gpt2.yaml"), *options]))
        lines = Path(folder, "log.jsonl").read_text().splitlines()
    logged = {}
    for line in lines:
        logged |= json.loads(line)
    row = {"alpha": alpha, "tokens per s": logged["tokens_per_s"], "MFU": logged.get("mfu", "")}
    return {**row, "peak memory (GB)": torch.cuda.max_memory_allocated() / 1e9}


# ---- the table


# avx2: a CPU in float32; bf16: a CPU that is faster in bfloat16. Claims have targets only for the
# kinds of machine that they list.


def on_cpus(target):
    """Return {kind of machine: target} of a claim that only holds on CPUs."""
    return {"avx2": target, "bf16": target}


def everywhere(target):
    """Return {kind of machine: target} of a claim that holds on every machine."""
    return {"avx2": target, "bf16": target, "cuda": target}


CLAIMS = {
    train_step: {"avx2": ">= 1.0", "bf16": ">= 3.3"},
    train_memory: on_cpus("<= 0.6"),
    spatial_share: on_cpus("<= 0.05"),
    swap: on_cpus(">= 500"),
    minimal_pairs: everywhere(">= 5"),
    generate: everywhere(">= 1.2"),
    probe_pass: everywhere("<= 1.0"),
    probe_memory: on_cpus("<= 0.2"),
    probe_fit: on_cpus(">= 3"),
    app_rerun: on_cpus("<= 1"),
    lag_windows: on_cpus(">= 10"),
    word_auc: on_cpus("<= 1"),
    decode_memory: on_cpus("<= 1"),
    eeg_prepare: on_cpus("<= 1.5"),
    expert_step: everywhere("<= 1.05"),
    prefix_decode: everywhere("<= 1.1"),
    loader_wait: everywhere("<= 1"),
    mask_step: everywhere(">= 2"),
    fastfood: everywhere(">= 8"),
    warp_step: everywhere("<= 2.5"),
    warp_memory: on_cpus("<= 3.5"),
}


def kind_of_machine(run):
    """Return cuda, or avx2 for a CPU in float32, or bf16."""
    if run.device.type != "cpu":
        return run.device.type
    return "avx2" if run.dtype is torch.float32 else "bf16"


def measure(run, claim):
    """Return a claim's row. ratio: how many times faster ours is (>=), ours over the other (<=)."""
    result = claim(run)
    target = CLAIMS[claim].get(kind_of_machine(run), "none on this machine")
    ratios = np.array(result.ours) / np.array(result.other)
    if ">=" in str(CLAIMS[claim]):
        ratios = 1 / ratios
    return {
        "claim": f"`{claim.__name__}`: {' '.join(claim.__doc__.split())}",
        "ours": f"{np.median(result.ours):.3g} {result.unit}",
        "alternative": f"{np.median(result.other):.3g} {result.unit}",
        "ratio": f"{np.median(ratios):.3g} ({ratios.min():.3g} to {ratios.max():.3g})",
        "n": len(ratios),
        "target": target,
        "note": result.note,
    }


def markdown(table):
    """Return a DataFrame as a Markdown table."""
    lines = [list(table), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(config):
    run = Run(config)
    if config.gpu:
        return measure_gpu(run)
    kind = kind_of_machine(run)
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()} CPU"
    threads = torch.get_num_threads()
    run.print(f"{name}, {threads} threads, {str(run.dtype)[6:]}: targets of kind '{kind}'")
    rows = []
    for claim, targets in CLAIMS.items():
        if claim.__name__ in config.claims or (not config.claims and kind in targets):
            rows.append(measure(run, claim))
            run.print(" | ".join(str(value) for value in rows[-1].values()))
    write_aside(run.out / "bench.md", markdown(pd.DataFrame(rows)) + "\n")
    run.close()


if __name__ == "__main__":
    main(configure(Config))
