"""Which electrodes follow the words, and when? From embeddings to every electrode at every lag.

    python decode_encoding.py                                         # embedded: made-up electrodes
    python decode_encoding.py dataset=podcast subjects=3 window=0.1    # Podcast ECoG, one person
    python decode_encoding.py embedding=gpt2-xl,lm                     # two feature spaces, banded
    torchrun --standalone --nproc_per_node=5 decode_encoding.py        # ranks share the folds

Ridge (himalaya) predicts the mean of each window around a word's onset + lag; with several feature
spaces each has a penalty of its own (banded ridge), and the correlation is split among them.
Alphas and lags are chosen on validation words; the null shifts the words in a circle.

Huth et al. 2016 (Nature 532:453); Dupre la Tour et al. 2022 (NeuroImage 264:119728, himalaya).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from himalaya.ridge import GroupRidgeCV, solve_ridge_cv_svd
from himalaya.scoring import correlation_score_split, r2_score

import decode
from configurator import Run, configure
from data import aside, write_aside
from decode import ALPHAS, FDR, all_lags, circular, fdr_q, p_value


@dataclass
class Config:
    # ---- recording, as in decode.py
    dataset: str = "synthetic_podcast"  # name under data/, or a prepared folder (data/recording.py)
    subjects: list[str] = field(default_factory=list)  # sub-03 or 3; none: all, side by side
    channels: str = ""  # regular expression, from a name's beginning: LG[AB]*
    electrodes: str = ""  # CSV with columns subject and elec
    reference: Literal["none", "laplacian"] = "none"  # laplacian: minus the shaft's neighbours
    # ---- windows
    min_lag: float = -400.0  # ms from a word's onset to the middle of its window
    max_lag: float = 1000.0  # ms, itself left out
    lag_step: float = 100.0  # ms
    lags: list[float] = field(default_factory=list)  # ms, instead of the three above
    window: float = 0.2  # s, whose mean is predicted
    # ---- features
    embedding: list[str] = field(
        default_factory=lambda: ["gpt2-xl"]
    )  # decode.word_vectors; several
    layer: int = 24  # of features that have layers, and of lm=
    lm: str = "out/train"  # embedding=lm: its contextual embeddings; static: those of its tokens
    pca: int = 16  # dimensions of each space, fitted on training words; 0: all
    word: str = "norm_word"  # column of words.csv that says which words are the same
    # ---- folds and scores
    n_folds: int = 5  # each word is tested once
    fold_type: Literal["sequential", "zero_shot"] = "sequential"  # in time, or by word
    n_shifts: int = 1000  # circular shifts of the words: the null
    # ---- run
    out_dir: str = "out/encoding"  # encoding.csv, electrodes.csv, figures; a stopped run goes on
    seed: int = 1337
    device: str = "auto"  # nothing here needs a GPU

    POSITIVE = "n_shifts embedding"
    SIGNED = "max_lag"

    def check(self):
        decode.check_folds_and_lags(self)


# ---- model


def fit_ridge(X, Y, fold):
    """(predictions for the test words, R2 of the validation words, None) of ridge.

    X (words, features), Y (words, targets); a target's alpha is the one that predicts the
    validation words best, and the fit is on training and validation words.
    """
    rows = np.concatenate([fold.train, fold.val])
    n = len(fold.train)
    split = [(np.arange(n), np.arange(n, len(rows)))]
    options = {"fit_intercept": True, "cv": split, "score_func": r2_score, "warn": False}
    _, weights, scores, offset = solve_ridge_cv_svd(X[rows], Y[rows], ALPHAS, **options)
    return X[fold.test] @ weights + offset, scores, None


def fit_banded_ridge(spaces, Y, fold, seed):
    """As fit_ridge, of several feature spaces [(words, features)]: each has a penalty of its own.

    The third value is the correlation that each space contributes, (spaces, targets).
    """
    X = np.concatenate(spaces, axis=1)
    rows = np.concatenate([fold.train, fold.val])
    n = len(fold.train)
    groups = np.repeat(np.arange(len(spaces)), [space.shape[1] for space in spaces])
    centre, offset = X[rows].mean(axis=0), Y[rows].mean(axis=0)
    model = GroupRidgeCV(
        groups=groups,
        cv=[(np.arange(n), np.arange(n, len(rows)))],
        random_state=seed % 2**32,
        solver_params={
            "n_iter": 20,
            "alphas": ALPHAS,
            "score_func": r2_score,
            "progress_bar": False,
            "warn": False,
        },
    )
    model.fit(X[rows] - centre, Y[rows] - offset)
    parts = model.predict(X[fold.test] - centre, split=True)
    contributions = correlation_score_split(Y[fold.test], parts)
    return parts.sum(axis=0) + offset, model.cv_scores_.max(axis=0), contributions


def encode_fold(spaces, Y, fold, config):
    """{name: array} of a fold: r (1 + shifts, targets), val (targets,), alone (spaces, targets)."""
    features = [decode.project(space, fold.train, config.pca)[0] for space in spaces]
    sd = Y[fold.train].std(axis=0)
    y = ((Y - Y[fold.train].mean(axis=0)) / np.where(sd > 0, sd, 1)).astype(np.float32)
    if len(spaces) == 1:
        predicted, val, alone = fit_ridge(features[0], y, fold)
    else:
        predicted, val, alone = fit_banded_ridge(features, y, fold, config.seed)
    orders = circular(fold.shifts, len(fold.test), fold.gap)
    arrays = {"r": correlations(predicted, y[fold.test], orders), "val": np.asarray(val)}
    if alone is not None:
        arrays["alone"] = np.asarray(alone)
    return arrays


def correlations(a, b, orders):
    """(P, targets): correlation of a's columns (n, targets) with b's, reordered by orders (P, n).

    The orders are circular, so that an FFT gives them all; a constant column correlates with none.
    """
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


def summarise(folds_arrays, lags, names, n):
    """(encoding table, electrode table, r (lags, electrodes), family-wise threshold).

    The first has a row for each electrode and lag; the second each electrode at the lag that its
    validation words choose, fold by fold. q is FDR, p_max family-wise (against the null's maximum).
    """
    shape = len(lags), len(names)
    r = np.mean([arrays["r"] for arrays in folds_arrays], axis=0).reshape(-1, *shape)
    largest = r[1:].max(axis=(1, 2))
    p = p_value(r[0], r[1:])
    table = interval_table(r.reshape(-1, len(lags) * len(names)), n)
    table.insert(0, "electrode", np.tile(names, len(lags)))
    table.insert(1, "lag", np.repeat(lags, len(names)))
    table["p"] = p.ravel()
    table["q"] = fdr_q(p).ravel()
    table["p_max"] = p_value(r[0], largest[:, None, None]).ravel()
    chosen, at_chosen = [], []
    for arrays in folds_arrays:
        best = arrays["val"].reshape(shape).argmax(axis=0)  # a lag for each electrode
        chosen.append(np.array(lags)[best])
        at_chosen.append(arrays["r"].reshape(-1, *shape)[:, best, np.arange(len(names))])
    at_chosen = np.mean(at_chosen, axis=0)  # (1 + shifts, electrodes)
    electrodes = interval_table(at_chosen, n).rename(columns={"r": "score"})
    electrodes.insert(0, "electrode", names)
    electrodes.insert(1, "lag", np.median(chosen, axis=0))
    electrodes["p"] = p_value(at_chosen[0], at_chosen[1:])
    electrodes["q"] = fdr_q(electrodes.p.to_numpy())
    largest_at_chosen = at_chosen[1:].max(axis=1)
    electrodes["p_max"] = p_value(at_chosen[0], largest_at_chosen[:, None])
    return table, electrodes, r[0], np.quantile(largest, 0.95)


def interval_table(r, n):
    """r (1 + P, targets) with 95 % intervals (Fisher's z, words as independent) and chance."""
    half = 1.96 / math.sqrt(max(n - 3, 1))
    z = np.arctanh(np.clip(r[0], -0.999999, 0.999999))
    columns = {"r": r[0], "low": np.tanh(z - half), "high": np.tanh(z + half)}
    return pd.DataFrame({**columns, "chance": r[1:].mean(axis=0), "n": n})


# ---- plots


def plot_encoding(path, lags, r, threshold, title, planted):
    """encoding.png: correlation of every electrode at every lag, and its mean; r (L, E)."""
    figure, (image_axis, axis) = plt.subplots(
        2, 1, figsize=(7.5, 6.5), layout="constrained", sharex=True, height_ratios=[1.4, 1]
    )
    half = (np.median(np.diff(lags)) if len(lags) > 1 else 100) / 2
    limit = max(np.abs(r).max(), 1e-6)
    image = image_axis.imshow(
        r[:, np.argsort(-r.max(axis=0))].T,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        extent=[lags[0] - half, lags[-1] + half, r.shape[1], 0],
        interpolation="nearest",
    )
    figure.colorbar(image, ax=image_axis, label="held-out correlation")
    image_axis.set_ylabel("electrodes, best first")
    mean = r.mean(axis=1)
    sem = r.std(axis=1) / math.sqrt(r.shape[1])
    axis.fill_between(lags, mean - sem, mean + sem, alpha=0.3, lw=0)
    axis.plot(lags, mean, label="mean of electrodes (± SEM)")
    axis.plot(lags, r.max(axis=1), c="C3", lw=1, label="best electrode")
    axis.axhline(threshold, ls=":", c="0.4", label="family-wise 5 % threshold")
    if planted is not None:
        axis.axvspan(*planted, color="C8", alpha=0.18, lw=0, label="planted")
    for each in (image_axis, axis):
        each.axvline(0, c="k", lw=0.8)
    axis.set(xlabel="lag (ms)", ylabel="correlation")
    axis.legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(run, config, podcast, folds_arrays, n):
    """Tables, figures and the closing lines."""
    lags = all_lags(config)
    names = podcast.montage.names
    table, electrodes, r, threshold = summarise(folds_arrays, lags, names, n)
    for i, name in enumerate(config.embedding):
        if "alone" in folds_arrays[0]:
            alone = np.mean([arrays["alone"][i] for arrays in folds_arrays], axis=0)
            table[f"r_{Path(name).stem}"] = alone
    write_aside(run.out / "encoding.csv", table.assign(data=podcast.source).to_csv(index=False))
    keys = {"model": "ridge, encoding", "metric": "corr", "fold": "mean", "data": podcast.source}
    keys["target"] = " + ".join(config.embedding)
    for row in electrodes.itertuples():
        interval = row.score, row.chance, row.low, row.high, n
        run.result(*interval, electrode=row.electrode, lag=row.lag, p=row.p, **keys)
    electrodes[["x", "y", "z"]] = podcast.montage.xyz
    electrodes["subject"] = electrodes.electrode.str.split(" ").str[0]
    electrodes["data"] = podcast.source
    write_aside(run.out / "electrodes.csv", electrodes.to_csv(index=False))
    title = (
        f"{podcast.source}: {keys['target']} to {len(names)} electrodes, windows of "
        f"{1000 * config.window:.0f} ms, {n:,} words"
    )
    planted = decode.planted_span(podcast, config.window, "embedding")
    plot_encoding(run.out / "encoding.png", lags, r, threshold, title, planted)
    label = "correlation at the lag chosen on validation words"
    decode.plot_electrodes(run.out / "electrodes.png", electrodes, 0.0, title, label)
    best = electrodes.sort_values("score").iloc[-1]
    run.print(
        f"{(electrodes.p_max < FDR).sum()} of {len(names)} electrodes follow the embeddings "
        f"(family-wise {FDR:g}; FDR {FDR:g}: {(electrodes.q < FDR).sum()}); the best, "
        f"{best.electrode}, with r = {best.score:.3f} [{best.low:.3f}, {best.high:.3f}] at "
        f"{best.lag:g} ms (shifted words {best.chance:.3f}), n = {n:,} words taken as independent"
    )
    decode.say_few_shifts(run, electrodes.p, electrodes.q, config.n_shifts)
    run.print(f"encoding.png, electrodes.png, encoding.csv, electrodes.csv in {run.out}")


def main(config):
    run = Run(config)
    podcast = decode.load_podcast(run, config)
    spaces = [decode.word_vectors(run, config, podcast, name) for name in config.embedding]
    n_dims = np.cumsum([space.shape[1] for space in spaces])
    target = decode.as_target(podcast.words, np.concatenate(spaces, axis=1), config.word)
    one_bin = decode.Config(window=config.window, bins=1)
    windows = decode.Windows(podcast.montage, one_bin, run.out.parent / "cache")
    lags = all_lags(config)
    target, rows = decode.keep_words(target, windows, lags, config)
    spaces = np.split(target.values, n_dims[:-1], axis=1)
    width = windows.width / podcast.montage.sfreq
    folds = decode.make_folds(config, target.start, target.labels, width)
    run.print(decode.describe(podcast, target, folds))
    run.content = decode.content_of(config, windows, target, rows)

    folder = run.out / "jobs" / run.options_hash()
    folder.mkdir(parents=True, exist_ok=True)
    todo = [fold for fold in run.share(folds) if not (folder / f"fold_{fold.number}.npz").exists()]
    bar = run.progress(len(todo), desc="folds")
    Y = None
    if todo:
        Y = windows.at(rows, lags)[..., 0]  # (lags, words, electrodes)
        Y = Y.transpose(1, 0, 2).reshape(len(target.start), -1)
    for fold in todo:
        arrays = encode_fold(spaces, Y, fold, config)
        with aside(folder / f"fold_{fold.number}.npz") as file:
            np.savez(file, **arrays)
        bar.update()
    bar.close()
    run.barrier()
    if run.master:
        arrays = [dict(np.load(folder / f"fold_{fold.number}.npz")) for fold in folds]
        report(run, config, podcast, arrays, len(target.start))
    run.merge()
    run.close()


if __name__ == "__main__":
    main(configure(Config))
