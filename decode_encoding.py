"""Which electrodes follow the words, and when? From embeddings to every electrode at every lag.

    python decode_encoding.py                                         # embedded: made-up electrodes
    python decode_encoding.py dataset=podcast subjects=3 window=0.1    # Podcast ECoG, one person
    python decode_encoding.py embedding=gpt2-xl,lm                     # two feature spaces, banded
    torchrun --standalone --nproc_per_node=5 decode_encoding.py        # ranks share the folds

Ridge (himalaya) predicts the mean of each window around a word's onset + lag. Several feature
spaces each get their own penalty (banded ridge), and the correlation is split among them. Alphas
and lags are chosen on validation words; the null shifts the words in a circle.

Huth et al. 2016 (Nature 532:453); Dupre la Tour et al. 2022 (NeuroImage 264:119728, himalaya).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from zipfile import is_zipfile

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from himalaya.ridge import GroupRidgeCV
from himalaya.scoring import correlation_score_split, r2_score

import decode
from configurator import Run, configure
from data import aside, vectors, write_aside
from data.montage import Windows
from data.podcast.speech import as_target, describe
from decode import ALPHAS, FDR, all_lags, circular, fdr_q, p_value


@dataclass
class Config:
    # ---- recording, as in decode.py
    dataset: str = "synthetic_podcast"  # name under data/, or a prepared folder (data/recording.py)
    subjects: list[str] = field(default_factory=list)  # sub-03 or 3; none: all, side by side
    channels: str = ""  # regular expression for the start of a channel's name: LG[AB]*
    electrodes: str = ""  # CSV with the columns subject and elec
    reference: Literal["none", "laplacian"] = "none"  # laplacian: minus the shaft's neighbours
    # ---- windows
    min_lag: float = -400.0  # ms from a word's onset to the middle of its window
    max_lag: float = 1000.0  # ms, not included
    lag_step: float = 100.0  # ms
    lags: list[float] = field(default_factory=list)  # ms, instead of the three above
    window: float = 0.2  # s, whose mean is predicted
    # ---- features
    embedding: list[str] = field(default_factory=lambda: ["gpt2-xl"])  # as in decode.py
    layer: int = 24  # of lm=, and of features that have layers
    lm: str = "out/train"  # embedding=lm: its hidden states; static: its token embeddings
    pca: int = 16  # dimensions of each space, fitted on training words; 0: all
    word: str = "norm_word"  # column of words.csv that tells word types apart
    # ---- folds and scores
    n_folds: int = 5  # each word is tested once
    fold_type: Literal["sequential", "zero_shot"] = "sequential"  # split by time, or by word type
    n_shifts: int = 1000  # circular shifts of the words: the null
    # ---- run
    out_dir: str = "out/encoding"  # encoding.csv, electrodes.csv, figures; run again to continue
    seed: int = 1337
    device: str = "auto"  # for embedding=lm; ridge runs on the CPU

    POSITIVE = "lag_step n_shifts embedding"
    SIGNED = "max_lag"

    def check(self):
        decode.check_folds_and_lags(self)


# ---- model


def fit_banded_ridge(spaces, Y, fold, seed):
    """Fit ridge with one penalty per space (words, features): test predictions, validation R2, and
    what each space adds to the test correlation."""
    X = np.concatenate(spaces, axis=1)
    rows = np.concatenate([fold.train, fold.val])
    n = len(fold.train)
    centre = X[rows].mean(axis=0)
    offset = Y[rows].mean(axis=0)
    solver = {"n_iter": 20, "alphas": ALPHAS, "score_func": r2_score}
    model = GroupRidgeCV(
        groups=np.repeat(np.arange(len(spaces)), [space.shape[1] for space in spaces]),
        cv=[(np.arange(n), np.arange(n, len(rows)))],
        random_state=seed % 2**32,
        solver_params={**solver, "progress_bar": False, "warn": False},
    )
    model.fit(X[rows] - centre, Y[rows] - offset)
    parts = model.predict(X[fold.test] - centre, split=True)
    contributions = correlation_score_split(Y[fold.test], parts)
    return parts.sum(axis=0) + offset, model.cv_scores_.max(axis=0), contributions


def encode_fold(spaces, Y, fold, config):
    """Return {r: (1 + shifts, targets), val: (targets,), alone: (spaces, targets), if several}."""
    features = [vectors.project(space, fold.train, config.pca)[0] for space in spaces]
    sd = Y[fold.train].std(axis=0)
    y = ((Y - Y[fold.train].mean(axis=0)) / np.where(sd > 0, sd, 1)).astype(np.float32)
    arrays = {}
    if len(spaces) == 1:
        weights, offset, val = decode.fit_ridge(features[0], y, fold)
        predicted = features[0][fold.test] @ weights + offset
        arrays["val"] = r2_score(y[fold.val], val)
    else:
        predicted, arrays["val"], arrays["alone"] = fit_banded_ridge(features, y, fold, config.seed)
    orders = circular(fold.shifts, len(fold.test), fold.gap)
    arrays["r"] = correlations(predicted, y[fold.test], orders)
    return arrays


def correlations(a, b, orders):
    """Correlate a's columns (n, targets) with b's, reordered by orders (P, n): (P, targets), 0 for
    a constant column. The orders are circular, so one FFT gives them all."""
    steps = orders[:, 0]
    a = (a - a.mean(axis=0)) / np.maximum(a.std(axis=0), 1e-12)
    b = (b - b.mean(axis=0)) / np.maximum(b.std(axis=0), 1e-12)
    out = np.empty((len(steps), a.shape[1]), np.float32)
    for begin in range(0, a.shape[1], 512):
        some = slice(begin, begin + 512)
        product = np.conj(np.fft.rfft(a[:, some], axis=0)) * np.fft.rfft(b[:, some], axis=0)
        out[:, some] = np.fft.irfft(product, len(a), axis=0)[steps] / len(a)
    return out


# ---- evaluate


def table_of(r, n, columns):
    """Tabulate r (1 + P, targets) next to columns: score, low, high (Fisher's z, as if words were
    independent), chance, p, q (FDR), p_max (family-wise, against each shift's largest r), n."""
    half = 1.96 / math.sqrt(max(n - 3, 1))
    z = np.arctanh(np.clip(r[0], -0.999999, 0.999999))
    table = pd.DataFrame({**columns, "score": r[0]})
    table = table.assign(low=np.tanh(z - half), high=np.tanh(z + half), chance=r[1:].mean(axis=0))
    table["p"] = p_value(r[0], r[1:])
    table["q"] = fdr_q(table.p)
    table["p_max"] = p_value(r[0], r[1:].max(axis=1)[:, None])
    return table.assign(n=n)


def at_chosen_lags(arrays, lags, n_electrodes):
    """Return r (1 + P, electrodes) at the lags that validation words choose, and median lags."""
    scores = []
    chosen = []
    for r, val in zip(arrays["r"], arrays["val"]):
        best = val.reshape(len(lags), n_electrodes).argmax(axis=0)
        chosen.append(np.array(lags)[best])
        r = r.reshape(-1, len(lags), n_electrodes)
        scores.append(r[:, best, np.arange(n_electrodes)])
    return np.mean(scores, axis=0), np.median(chosen, axis=0)


def report(run, config, podcast, montage, arrays, n):
    """Write the tables and figures, and print the closing lines."""
    lags = all_lags(config)
    names = montage.names
    r = np.mean(arrays["r"], axis=0)  # (1 + P, lags * electrodes)
    columns = {"electrode": np.tile(names, len(lags)), "lag": np.repeat(lags, len(names))}
    table = table_of(r, n, columns).rename(columns={"score": "r"})
    if "alone" in arrays:
        for name, alone in zip(config.embedding, np.mean(arrays["alone"], axis=0)):
            table[f"r_{Path(name).stem}"] = alone
    write_aside(run.out / "encoding.csv", table.assign(data=podcast.source).to_csv(index=False))

    at_chosen, median_lags = at_chosen_lags(arrays, lags, len(names))
    electrodes = table_of(at_chosen, n, {"electrode": names, "lag": median_lags})
    target = " + ".join(config.embedding)
    keys = {"model": "ridge, encoding", "metric": "corr", "fold": "mean", "target": target}
    rows = electrodes.drop(columns=["q", "p_max"])
    decode.write_results(run, rows, data=podcast.source, **keys)
    electrodes[["x", "y", "z"]] = montage.xyz
    electrodes["subject"] = electrodes.electrode.str.split(" ").str[0]
    electrodes["data"] = podcast.source
    write_aside(run.out / "electrodes.csv", electrodes.to_csv(index=False))

    title = f"{podcast.source}: {target} to {len(names)} electrodes, {n:,} words"
    threshold = np.quantile(r[1:].max(axis=1), 0.95)
    planted = podcast.meta.get("planted", {}).get("lag_ms", np.nan)
    by_lag = r[0].reshape(len(lags), len(names))
    plot_encoding(run.out / "encoding.png", lags, by_lag, threshold, planted, title)
    plot_electrodes(run.out / "electrodes.png", electrodes, title)
    best = electrodes.sort_values("score").iloc[-1]
    run.print(
        f"{(electrodes.p_max < FDR).sum()} of {len(names)} electrodes follow the embeddings "
        f"(family-wise {FDR:g}; FDR {FDR:g}: {(electrodes.q < FDR).sum()}); the best is "
        f"{best.electrode}, r = {best.score:.3f} [{best.low:.3f}, {best.high:.3f}] at "
        f"{best.lag:g} ms (shifted words {best.chance:.3f}), n = {n:,} words, as if independent"
    )
    decode.say_few_shifts(run, electrodes.p, electrodes.q, config.n_shifts)
    run.print(f"encoding.png, electrodes.png, encoding.csv, electrodes.csv in {run.out}")


def plot_encoding(path, lags, r, threshold, planted, title):
    """Plot the correlation of each electrode at each lag, r (L, E), and its mean."""
    figure, (image_axis, axis) = plt.subplots(
        2, 1, figsize=(7.5, 6.5), layout="constrained", sharex=True, height_ratios=[1.4, 1]
    )
    limit = max(np.abs(r).max(), 1e-6)
    order = np.argsort(-r.max(axis=0))
    lags = np.array(lags)  # maybe not evenly spaced
    half = np.ptp(lags) / max(2 * len(lags) - 2, 1) or 50  # ms, of an average column
    middles = (lags[1:] + lags[:-1]) / 2
    edges = np.concatenate([[lags[0] - half], middles, [lags[-1] + half]])
    colors = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    image = image_axis.pcolormesh(edges, np.arange(len(order) + 1), r[:, order].T, **colors)
    figure.colorbar(image, ax=image_axis, label="held-out correlation")
    image_axis.set(ylabel="electrodes, best first", ylim=(len(order), 0))
    mean = r.mean(axis=1)
    sem = r.std(axis=1) / math.sqrt(r.shape[1])
    axis.fill_between(lags, mean - sem, mean + sem, alpha=0.3, lw=0)
    axis.plot(lags, mean, label="mean of electrodes (± SEM)")
    axis.plot(lags, r.max(axis=1), c="C3", lw=1, label="best electrode")
    axis.axhline(threshold, ls=":", c="0.4", label="family-wise 5 % threshold")
    axis.axvline(planted, c="C8", lw=3, alpha=0.4, label="planted")
    axis.axvline(0, c="k", lw=0.8)
    axis.set(xlabel="lag (ms)", ylabel="correlation")
    axis.legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_electrodes(path, table, title):
    """Plot the electrodes at their positions (mm), seen from three sides."""
    figure, axes = plt.subplots(1, 3, layout="constrained", figsize=(12, 4.2))
    table = table.sort_values("score")
    limit = max(table.score.abs().max(), 1e-6)
    size = 16 + 60 * table.score.abs() / limit
    edges = np.where(table.q < FDR, "k", "0.75")
    colors = {"c": table.score, "cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    for axis, (a, b) in zip(axes, ("yz", "xy", "xz")):
        image = axis.scatter(1000 * table[a], 1000 * table[b], s=size, edgecolors=edges, **colors)
        axis.set(xlabel=f"{a} (mm)", ylabel=f"{b} (mm)", aspect="equal")
    figure.colorbar(image, ax=axes, label="correlation at the lag chosen on validation words")
    figure.suptitle(f"{title}; black edges: FDR {FDR:g}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- main


def main(config):
    run = Run(config)
    podcast, montage = decode.load_podcast(run, config)
    spaces = []
    widths = []
    for name in config.embedding:
        spaces.append(decode.word_vectors(run, config, podcast, name))
        widths.append(spaces[-1].shape[1])
    target = as_target(podcast.words, np.concatenate(spaces, axis=1), config.word)
    one_bin = decode.Config(window=config.window, reference=config.reference, bins=1)
    windows = Windows(montage, one_bin, run.out.parent / "cache")
    target, rows = decode.keep_words(target, windows, config)
    spaces = np.split(target.values, np.cumsum(widths)[:-1], axis=1)
    seconds = windows.width / montage.sfreq
    folds = decode.make_folds(config, target.start, target.labels, seconds)
    run.print(describe(podcast, montage, target))
    run.content = decode.content_of(config, windows, target, rows)

    files = [decode.job_file(run, "all", fold).with_suffix(".npz") for fold in folds]
    shared = run.share(folds)
    todo = [fold for fold in shared if not is_zipfile(files[fold.number])]  # missing, or torn
    if len(todo) < len(shared):
        run.print(f"{len(shared) - len(todo)} folds of an earlier run are reused")
    if todo:
        offsets = [windows.first(0, lag) for lag in all_lags(config)]
        Y = montage.bin_means(rows, offsets, [0, windows.width]).squeeze(-1)
        Y = Y.transpose(1, 0, 2).reshape(len(target.start), -1)  # (words, lags * electrodes)
    bar = run.progress(len(todo), desc="folds")
    for fold in todo:
        with aside(files[fold.number]) as file:
            np.savez(file, **encode_fold(spaces, Y, fold, config))
        bar.update()
    bar.close()
    run.barrier()
    if run.master:
        arrays = {}
        for file in files:
            for name, array in np.load(file).items():
                arrays.setdefault(name, []).append(array)
        report(run, config, podcast, montage, arrays, len(target.start))
    run.merge()
    run.close()


if __name__ == "__main__":
    main(configure(Config))
