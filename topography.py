"""What do the sheets of a topographic language model represent, and what does ablation cost?

    python topography.py                                   # the model of train.py, embedded stimuli
    python topography.py twin=out/train_alpha0             # next to its twin without topography
    python topography.py config/topography_localizer.yaml  # your stimuli: texts and conditions
    python topography.py sweep=out/a,out/b,out/c           # Moran's I against validation loss
    python topography.py lm=gpt2 pairs=path/to/blimp       # any language model: minimal pairs only

Maps are unsmoothed: blurring alone raises Moran's I to about 0.6 on a model without topography.
Two nulls accompany every Moran's I: shuffled positions (does place matter?) and shuffled labels
(does this contrast matter, or do neighbours respond alike to anything?).

Fedorenko et al. 2010 (localizer); Margalit et al. 2024 (TDANN); Rathi et al. 2025 (TopoLM);
Warstadt et al. 2020 (BLiMP); Salazar et al. 2020 (masked models).
"""

import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mne
import numpy as np
import pandas as pd
import scipy.ndimage
import scipy.optimize
import scipy.stats
import torch
import yaml
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from torch.nn import functional as F

import positions
from configurator import HERE, InputError, Run, configure, hash_options, key_seed
from convert import HiddenStates
from data import path_state
from data.contrasts import find_contrasts, read_stimuli
from data.stimuli import read_pairs
from data.tokens import split_ids


@dataclass
class Config:
    # ---- model
    lm: str = "out/train"  # run folder, checkpoint, or model of transformers (minimal pairs only)
    twin: str = ""  # its twin without topography, to compare with
    sweep: list[str] = field(default_factory=list)  # compare only these runs of train.py
    # ---- stimuli
    stimuli: str = "localizer"  # dataset under data/, a CSV, or a folder of CSVs
    text_column: str = "text"  # in such a CSV; word pairs have two: word1,word2
    condition_column: str = "condition"  # in such a CSV; joins several: category,class
    # A>B or A+B>C+D; the first selects the language mask; none: published contrasts, or all pairs
    contrasts: list[str] = field(default_factory=list)
    # ---- statistics
    fdr: float = 0.05  # false discovery rate over all units of all sheets
    fwhm: float = 0.0  # also blur maps by this width (cells), with a null of their own; 0: no
    shuffles: int = 200  # shuffles of positions; at most 60 of labels, and 20 of blurred maps
    top_k: int = 0  # units in the language mask; 0: all that survive the false discovery rate
    min_cluster: int = 10  # units in the smallest cluster that counts
    # ---- minimal pairs and ablation
    pairs: str = "grammar"  # dataset under data/, a folder of BLiMP files, or one file; "": none
    max_pairs: int = 200  # first pairs of each paradigm; 0: all
    ablate: list[int] = field(default_factory=lambda: [16, 64, 256])  # units to silence
    ablate_pairs: int = 50  # pairs per paradigm under ablation
    random_sets: int = 2  # random sets of equal size to compare with
    dataset: str = "pydocs"  # validation text for the loss under ablation and for correlations
    val_batches: int = 8  # batches of 16 windows of validation text
    batch_tokens: int = 2048  # tokens per forward pass
    # ---- run
    out_dir: str = "out/topography"  # results.csv and figures
    seed: int = 1337  # for shuffles and random units
    device: str = "auto"  # cuda, mps, cpu
    dtype: str = "auto"  # bfloat16, float16, float32

    POSITIVE = "shuffles random_sets val_batches batch_tokens min_cluster ablate_pairs"
    SHARES = "fdr"

    def check(self):
        for contrast in self.contrasts:
            if contrast.count(">") != 1 or not all(contrast.split(">")):
                raise InputError(f"contrast '{contrast}' must read A>B or A+B>C+D")


# ---- data


def load_stimuli(run, config):
    """Return the stimuli (DataFrame), their contrasts {name: Contrast} and the data's name."""
    name = config.stimuli
    path = Path(name)
    if not path.exists():
        path = run.dataset(name) / "localizer.csv"
        name = called(name, path.parent)
    stimuli = read_stimuli(path, config.text_column, config.condition_column)
    return stimuli, find_contrasts(stimuli.condition, config.contrasts, name), name


def called(name, folder):
    """Return the name of a prepared dataset, marked where it is synthetic."""
    meta = folder / "meta.yaml"
    synthetic = meta.exists() and yaml.safe_load(meta.read_text()).get("synthetic")
    return f"{name}, synthetic" if synthetic else name


# ---- minimal pairs, of any language model


def load_model(spec, run):
    """Load a language model that scores sentences; texts follow its first token, if it has one."""
    lm = HiddenStates(spec, run.device, run.dtype, head=True)
    with suppress(InputError):  # the tokenizer has no first token
        lm.write_first_token()
    return lm


def length_batches(lengths, tokens):
    """Yield batches of indices, longest first, of at most `tokens` tokens including padding."""
    order = np.argsort(lengths, kind="stable")[::-1]
    while len(order):
        size = max(1, tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def sentence_scores(run, lm, rows, batch_tokens=2048):
    """Return the log-probability (nats) of each sentence, given as token ids: (N,) float64.

    A causal model scores every token but the first. A masked model masks every token in turn:
    pseudo-log-likelihood (Salazar et al. 2020).
    """
    inputs, targets, sentences = masked_in_turn(lm, rows)
    scores = np.zeros(len(rows))
    bar = run.progress(len(inputs), desc="sentences")
    for batch in length_batches([len(row) for row in inputs], batch_tokens):
        ids, real = lm.pad([inputs[i] for i in batch])
        wanted = torch.full_like(ids, -100)
        wanted[real] = torch.tensor(np.concatenate([targets[i] for i in batch])).to(ids.device)
        logits = lm.logits(ids, real).float()
        if lm.causal:  # a token is predicted from the state before it
            logits = logits[:, :-1]
            wanted = wanted[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        losses = losses.view(len(batch), -1).double().sum(1).cpu().numpy()
        np.subtract.at(scores, sentences[batch], losses)
        bar.update(len(batch))
    bar.close()
    return scores


def masked_in_turn(lm, rows):
    """Return inputs, targets (-100: none), and the number of each input's sentence.

    A causal model reads the sentences; a masked model reads a copy per token, which masks it.
    """
    if lm.causal:
        ends = {getattr(lm.tokenizer, f"{name}_token_id", None) for name in ("eos", "sep")} - {None}
        targets = [np.where(np.isin(row, list(ends)), -100, row) for row in rows]
        return rows, targets, np.arange(len(rows))
    mask = getattr(lm.tokenizer, "mask_token_id", None)
    if mask is None:
        raise InputError(f"{lm.name} is neither causal nor has a mask token: it cannot score text")
    inputs = []
    targets = []
    sentences = []
    for number, row in enumerate(rows):
        for i in np.flatnonzero(~np.isin(row, lm.tokenizer.all_special_ids)):
            inputs.append([*row[:i], mask, *row[i + 1 :]])
            targets.append([-100] * i + [row[i]] + [-100] * (len(row) - i - 1))
            sentences.append(number)
    return inputs, targets, np.array(sentences)


def score_pairs(run, lm, pairs, max_pairs, batch_tokens):
    """Score minimal pairs {UID: [pair, ...]}, the first `max_pairs` of each (0: all).

    Returns a DataFrame of uid, score (share of pairs whose good sentence is likelier; a tie counts
    half), low and high (Wilson's 95 % interval) and n; and the number of pairs left out because
    they exceed the model's context.
    """
    rows = []
    uids = []
    n_long = 0
    for uid, members in pairs.items():
        for pair in members[: max_pairs or None]:
            both, n_cut = lm.encode([pair["sentence_good"], pair["sentence_bad"]])
            if n_cut:
                n_long += 1
            else:
                rows += both
                uids.append(uid)
    scores = sentence_scores(run, lm, rows, batch_tokens)
    table = pd.DataFrame({"uid": uids, "gain": scores[0::2] - scores[1::2]})
    results = []
    for uid, gain in table.groupby("uid", sort=False).gain:
        n_right = (gain > 0).sum() + 0.5 * (gain == 0).sum()
        test = scipy.stats.binomtest(int(n_right), len(gain))
        low, high = test.proportion_ci(method="wilson")
        results.append([uid, n_right / len(gain), low, high, len(gain)])
    return pd.DataFrame(results, columns=["uid", "score", "low", "high", "n"]), n_long


def report_pairs(run, config, label, lm, pairs, data):
    """Score one model on minimal pairs: write rows of results.csv and print a line."""
    scores, n_long = score_pairs(run, lm, pairs, config.max_pairs, config.batch_tokens)
    size = f"the {lm.max_length} tokens of {lm.name}"
    if n_long:
        run.print(f"{n_long:,} pairs are longer than {size}: left out")
    if scores.empty:
        raise InputError(f"no pair of pairs={config.pairs} fits {size}")
    keys = {"measure": "minimal pairs", "model": label, "blur": 0.0, "sheet": "", "data": data}
    words = []
    for row in scores.itertuples():
        run.result(row.score, 0.5, row.low, row.high, row.n, contrast=row.uid, **keys)
        words.append(f"{row.uid} {row.score:.2f}")
    kind = "" if lm.causal else " (masked model, pseudo-log-likelihood)"
    run.print(
        f"{label}{kind}: minimal pairs {scores.score.mean():.3f} (chance 0.5), mean over "
        f"{len(scores)} paradigms, n = {scores.n.sum():,}: {', '.join(words)}"
    )


# ---- responses of units


@dataclass
class Sheets:
    """A model with sheets, and its responses to the stimuli."""

    label: str  # model or twin
    lm: HiddenStates
    layout: np.ndarray  # unit_at_cell (L, C) of L sheets
    x: np.ndarray  # (N, L, C) mean response of each unit to each stimulus

    @property
    def names(self):
        return positions.layer_names(len(self.layout) // 2)


@torch.no_grad()
def unit_responses(run, lm, texts, batch_tokens):
    """Return each unit's mean response over each text's tokens: (N, 2 n_layer, C) float32.

    The end-of-text token that opens a text does not count.
    """
    names = positions.layer_names(lm.model.config.n_layer)
    rows, _ = lm.encode(texts)
    out = np.zeros((len(rows), len(names), lm.model.config.n_embd), np.float32)
    for batch in length_batches([len(row) for row in rows], batch_tokens):
        ids, real = lm.pad([rows[i] for i in batch])
        if lm.first is not None:
            real[:, 0] = False
        weight = real.float()[:, :, None]  # (B, T, 1)
        with run.autocast():
            hidden = lm.model(ids, hidden=names).hidden
        for layer, name in enumerate(names):
            mean = (hidden[name].float() * weight).sum(1) / weight.sum(1).clamp_min(1)
            out[batch, layer] = mean.cpu().numpy()
    return out


@contextmanager
def silenced(model, mask):
    """Set the output of the units in mask (2 n_layer, C) bool to zero inside the `with` block."""

    def keep_others(keep, module, args, out):
        return out * keep.to(out.device)

    hooks = []
    for i, block in enumerate(model.transformer.h):
        for sublayer, keep in zip((block.attn, block.mlp), ~torch.as_tensor(mask[2 * i :])):
            hooks.append(sublayer.register_forward_hook(partial(keep_others, keep)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- statistics


def welch(a, b):
    """Return Welch's t (...) of samples a (n, ...) against b (m, ...), and its p.

    Units that never vary have t = 0, p = 1.
    """
    with np.errstate(all="ignore"):
        t, p = scipy.stats.ttest_ind(a, b, axis=0, equal_var=False)
    varies = np.isfinite(t)
    return np.where(varies, t, 0), np.where(varies, p, 1)


EFFECT = "Welch t"  # what figures call the value of `effect`


def effect(a, b):
    """Return the value (...) that a map shows, from responses a (n, ...) and b (m, ...)."""
    return welch(a, b)[0]


def on_sheet(values, unit_at_cell):
    """Lay values (..., L, C) of units out as maps (..., L, side, side); unit_at_cell (L, C)."""
    side = positions.sheet_side(values.shape[-1])
    index = np.broadcast_to(unit_at_cell, values.shape)
    return np.take_along_axis(values, index, -1).reshape(*values.shape[:-1], side, side)


def contrast_map(x, a, b, unit_at_cell, fwhm=0.0):
    """Map the effect (L, side, side) in responses x (N, L, C) of rows a against rows b.

    fwhm > 0 first blurs the responses, as a readout of that width (cells) would.
    """
    maps = on_sheet(x, unit_at_cell)
    if fwhm:
        sigma = fwhm / np.sqrt(8 * np.log(2))
        maps = scipy.ndimage.gaussian_filter(maps, sigma, axes=(-2, -1), mode="nearest")
    return effect(maps[a], maps[b])


def jackknife(measure, *rows, parts):
    """Return measure(*rows) and half its 95 % interval, leaving out every parts-th row in turn."""
    parts = min(parts, *map(len, rows))
    replicates = []
    for part in range(parts):
        kept = [np.delete(r, np.arange(part, len(r), parts)) for r in rows]
        replicates.append(measure(*kept))
    variance = (parts - 1) / parts * np.square(replicates - np.mean(replicates, 0)).sum(0)
    return measure(*rows), 1.96 * np.sqrt(variance)


def moran_of_contrast(sheets, a, b, rng, shuffles, fwhm=0.0):
    """Return Moran's I of each map (L,), half its 95 % interval over stimuli, and its null.

    The null (shuffles, L) shuffles positions before any blur: units keep their responses but lose
    their places.
    """

    def measure(a, b):
        return positions.moran(contrast_map(sheets.x, a, b, sheets.layout, fwhm))

    value, half = jackknife(measure, a, b, parts=20)
    of_units = effect(sheets.x[a], sheets.x[b])
    null = []
    for _ in range(shuffles):
        shuffled = rng.permuted(sheets.layout, axis=1)
        maps = on_sheet(of_units, shuffled)
        if fwhm:
            maps = contrast_map(sheets.x, a, b, shuffled, fwhm)
        null.append(positions.moran(maps))
    return value, half, np.stack(null)


def shuffled_labels(sheets, a, b, rng, shuffles):
    """Return Moran's I (shuffles,), mean over sheets, with condition labels shuffled.

    This null says how smooth a map is that reflects no contrast.
    """
    both = np.concatenate([a, b])
    scores = []
    for _ in range(shuffles):
        shuffled = rng.permutation(both)
        maps = contrast_map(sheets.x, shuffled[: len(a)], shuffled[len(a) :], sheets.layout)
        scores.append(np.nanmean(positions.moran(maps)))
    return np.array(scores)


def clusters(t, smallest, stop=0.0):
    """Label the regions of one map t (side, side): 0 for none, 1 for the highest peak's, and so on.

    A region is a connected component (cells that share an edge) where t is above `stop`. Regions of
    fewer than `smallest` cells are dropped.
    """
    above = t.ravel() > stop
    near = positions.neighbours(len(t), "rook") & above & above[:, None]
    _, region = connected_components(near)
    labels = np.zeros(t.size, int)
    for cell in np.argsort(-t, axis=None, kind="stable"):
        members = region == region[cell]
        if above[cell] and not labels[cell] and members.sum() >= smallest:
            labels[members] = labels.max() + 1
    return labels.reshape(t.shape)


def over_distance(values):
    """Average values (C, C) of pairs of cells by rounded distance: 1, 2, ... side - 1 cells."""
    side = positions.sheet_side(len(values))
    offsets = positions.offsets(np.arange(len(values)), side)
    distance = np.linalg.norm(offsets, axis=-1).round().astype(int).ravel()
    return np.bincount(distance, values.ravel())[1:side] / np.bincount(distance)[1:side]


def effective_dimensionality(r):
    """Return the participation ratio of the eigenvalues of correlations r (Del Giudice 2021)."""
    return len(r) ** 2 / np.square(r).sum()


def smoothness(t):
    """Return (max - first) / max of mean |t_i - t_j| over distance (Margalit et al. 2024)."""
    curve = over_distance(np.abs(t.ravel() - t.ravel()[:, None]))
    return (curve.max() - curve[0]) / max(curve.max(), 1e-12)


def wiring_length(t, next_t, share=0.05, reach=2.0):
    """Return the fibre length, in cells, that joins the most active units of two maps (side, side).

    k-means bundles the units of each map, with the fewest fibres that lie within `reach` cells of
    their units on average; fibre ends are matched at least cost. The length adds the distances of
    units to their fibres on both sheets and the fibres across (Margalit et al. 2024).
    """
    points = []
    for values in (t, next_t):
        top = np.argsort(-values.ravel(), kind="stable")[: max(2, round(share * values.size))]
        points.append(positions.places_of(top, len(values)))
    for k in range(1, len(points[0]) + 1):
        ends = []
        distances = []
        for places in points:
            fit = KMeans(k, n_init=2, random_state=0).fit(places)
            ends.append(fit.cluster_centers_)
            distances.append(fit.transform(places).min(axis=1))
        if np.mean(distances, axis=1).max() <= reach:
            break
    cost = np.linalg.norm(ends[0][:, None] - ends[1], axis=-1)
    across = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
    return np.sum(distances) + across


# ---- measurements on sheets


def show_contrast(run, config, models, contrast):
    """Map one contrast on every sheet of every model, and report Moran's I with its two nulls.

    Returns one dict per model for the summary: the means over sheets.
    """
    rows = []
    maps = []
    for sheets in models:
        rows.append(report_moran(run, config, sheets, contrast))
        maps.append(contrast_map(sheets.x, contrast.a, contrast.b, sheets.layout))
        if config.fwhm:
            report_moran(run, config, sheets, contrast, config.fwhm)
    title = (
        f"{contrast.name}: {EFFECT} of every unit on its sheet, unsmoothed; {contrast.data} "
        f"({len(contrast.a)} against {len(contrast.b)})\nMoran's I of the model with shuffled "
        f"positions {rows[0]['chance']:.2f}, with shuffled labels {rows[0]['labels']:.2f}"
    )
    name = re.sub(r"[^a-z0-9A-Z]+", "_", contrast.name)
    plot_contrast(run.out / f"map_{name}.png", title, models, maps)
    return rows


def half_interval(scores):
    """Return half of the 95 % interval of a mean: Student's t, as sheets are few."""
    return scipy.stats.sem(scores) * scipy.stats.t.ppf(0.975, len(scores) - 1)


def report_moran(run, config, sheets, contrast, fwhm=0.0):
    """Report Moran's I of one contrast in one model; return the means over sheets."""
    a = contrast.a
    b = contrast.b
    rng = np.random.default_rng(key_seed(config.seed, contrast.name, fwhm))
    shuffles = min(20, config.shuffles) if fwhm else config.shuffles  # blurring is slow
    scores, half, null = moran_of_contrast(sheets, a, b, rng, shuffles, fwhm)
    keys = {"measure": "moran", "model": sheets.label, "contrast": contrast.name, "blur": fwhm}
    keys["data"] = contrast.data
    for name, score, chance, h in zip(sheets.names, scores, null.mean(0), half):
        run.result(score, chance, score - h, score + h, len(a) + len(b), sheet=name, **keys)
    mean = scores.mean()
    h = half_interval(scores)
    row = {"score": mean, "chance": null.mean(), "low": mean - h, "high": mean + h}
    run.result(**row, n=len(scores), sheet="mean", **keys)
    nulls = f"{null.mean():.3f} with shuffled positions"
    if not fwhm:
        labels = shuffled_labels(sheets, a, b, rng, min(60, config.shuffles))
        low, high = np.quantile(labels, [0.025, 0.975])  # of the null, not of the score
        keys["measure"] = "moran beside shuffled labels"
        run.result(mean, labels.mean(), low, high, len(labels), sheet="mean", **keys)
        nulls += f" and {labels.mean():.3f} [{low:.3f}, {high:.3f}] with shuffled labels"
        row["labels"] = labels.mean()
    _, p = welch(sheets.x[a], sheets.x[b])
    significant = mne.stats.fdr_correction(p, config.fdr)[0].mean()
    run.print(
        f"{sheets.label}: {contrast.name}, blur {fwhm}: Moran's I {mean:.3f} [{row['low']:.3f}, "
        f"{row['high']:.3f}], mean over {len(scores)} sheets ({nulls}); {significant:.0%} of units "
        f"are significant (FDR {config.fdr})"
    )
    return {"model": sheets.label, "contrast": contrast.name, **row}


def language_mask(run, config, sheets, conditions, localizer):
    """Select the units that prefer the localizer's first side to its second.

    Units are selected on every other stimulus of each condition and measured on the rest. Returns
    t (L, C), mask (L, C) bool, and the mask's mean response to each condition in SD units.
    """
    z = (sheets.x - sheets.x.mean(0)) / (sheets.x.std(0) + 1e-9)
    held_out = (conditions.groupby(conditions).cumcount() % 2 == 1).to_numpy()
    a, b = localizer.a, localizer.b
    t, p = welch(z[a[~held_out[a]]], z[b[~held_out[b]]])
    mask = mne.stats.fdr_correction(p, config.fdr)[0] & (t > 0)
    if config.top_k:
        mask = np.zeros(t.shape, bool)
        mask.ravel()[np.argsort(-t, axis=None, kind="stable")[: config.top_k]] = True
    if not mask.any():
        run.print(f"no unit prefers {localizer.name} at FDR {config.fdr}: no mask, no ablation")
        return t, mask, None
    test_a = z[a[held_out[a]]]
    test_b = z[b[held_out[b]]]
    difference = test_a.mean(0) - test_b.mean(0)  # (L, C), SD units
    test = scipy.stats.ttest_ind(test_a[:, mask].mean(1), test_b[:, mask].mean(1), equal_var=False)
    low, high = test.confidence_interval()
    rng = np.random.default_rng(key_seed(config.seed, "mask"))
    random = [rng.permutation(difference.ravel())[: mask.sum()].mean() for _ in range(100)]
    score = difference[mask].mean()
    keys = {"measure": "selectivity", "model": "model", "contrast": localizer.name, "blur": 0.0}
    n = len(test_a) + len(test_b)
    run.result(score, np.mean(random), low, high, n, sheet="all", data=localizer.data, **keys)
    sizes = []
    for name, sheet in zip(sheets.names, on_sheet(t, sheets.layout)):
        labels = clusters(sheet, config.min_cluster)
        sizes.append(f"{name} {np.bincount(labels.ravel())[1:].tolist()}")
    run.print(
        f"mask of {localizer.name}: {mask.sum()} of {mask.size} units; held-out selectivity "
        f"{score:.2f} SD [{low:.2f}, {high:.2f}] (random units {np.mean(random):.2f}); "
        f"units per cluster: {'; '.join(sizes)}"
    )
    responses = pd.Series(z[:, mask].mean(1))[held_out]
    profile = responses.groupby(conditions[held_out], sort=False).agg(["mean", "sem", "count"])
    profile["half"] = profile["sem"] * scipy.stats.t.ppf(0.975, profile["count"] - 1)
    return t, mask, profile


def ablate(run, config, lm, t, pairs, windows, names):
    """Measure what silencing the k most selective units costs, and k random units.

    names: {"contrast": name, "pairs": name}. Returns [(k, kind of units, pair accuracy, loss)].
    """
    data = {"ablation accuracy": names["pairs"], "ablation val_loss": config.dataset}

    @torch.no_grad()
    def measure(units):
        mask = np.zeros(t.size, bool)
        mask[units] = True
        losses = []
        with silenced(lm.model, mask.reshape(t.shape)):
            scores, _ = score_pairs(run, lm, pairs, config.ablate_pairs, config.batch_tokens)
            for part in windows.split(4):
                with run.autocast():
                    losses.append(lm.model(part[:, :-1], part[:, 1:]).task.item())
        half = np.linalg.norm(scores.high - scores.low) / 2 / len(scores)  # from Wilson's
        of_pairs = (scores.score.mean(), half, scores.n.sum())
        of_text = (np.mean(losses), 1.96 * scipy.stats.sem(losses), len(windows))
        return pd.DataFrame([of_pairs, of_text], data, ["score", "half", "n"])

    order = np.argsort(-t, axis=None, kind="stable")
    rng = np.random.default_rng(key_seed(config.seed, "ablate"))
    intact = measure(order[:0]).score
    rows = [(0, "selective", *intact), (0, "random", *intact)]
    for k in [k for k in config.ablate if 0 < k <= t.size]:
        selective = measure(order[:k])
        random = [measure(rng.permutation(t.size)[:k]).score for _ in range(config.random_sets)]
        mean = np.mean(random, 0)
        rows += [(k, "selective", *selective.score), (k, "random", *mean)]
        keys = {"model": "model", "contrast": names["contrast"], "sheet": f"{k} units", "blur": 0.0}
        for chance, row in zip(mean, selective.itertuples()):
            ends = (row.score - row.half, row.score + row.half)
            keys |= {"measure": row.Index, "data": data[row.Index]}
            run.result(row.score, chance, *ends, int(row.n), **keys)
        accuracy, loss = selective.score
        run.print(
            f"{k} units silenced: accuracy {accuracy:.3f} (random units {mean[0]:.3f}, none "
            f"{intact.iloc[0]:.3f}), validation loss {loss:.3f} (random units {mean[1]:.3f}, "
            f"none {intact.iloc[1]:.3f})"
        )
    return rows


def geometry_of_text(run, config, sheets, batch):
    """Report correlation over distance and effective dimensionality of each sheet on text (B, T).

    Their chance levels are shuffled positions and the number of units; 95 % intervals come from a
    jackknife over windows. Returns the mean correlation at distances of 1, 2, ... cells.
    """
    with torch.no_grad(), run.autocast():
        hidden = sheets.lm.model(batch, hidden=sheets.names).hidden
    rng = np.random.default_rng(key_seed(config.seed, "geometry"))
    curves = []

    def measure(states, units, windows):
        r = positions.correlations(states[windows].flatten(0, 1).float())
        np.fill_diagonal(r, 1)
        return np.array([over_distance(r[np.ix_(units, units)])[0], effective_dimensionality(r)])

    for name, units in zip(sheets.names, sheets.layout):
        r = positions.correlations(hidden[name].flatten(0, 1).float())
        curves.append(over_distance(r[np.ix_(units, units)]))
        shuffled = rng.permutation(units)
        chance = (over_distance(r[np.ix_(shuffled, shuffled)])[0], len(r))
        windows = np.arange(len(batch))
        value, half = jackknife(partial(measure, hidden[name], units), windows, parts=10)
        n = (positions.neighbours(positions.sheet_side(len(r))).sum() // 2, batch.numel())
        keys = {"model": sheets.label, "contrast": "", "blur": 0.0, "data": config.dataset}
        for k, title in enumerate(("correlation at distance 1", "effective dimensionality")):
            ends = (value[k] - half[k], value[k] + half[k])
            run.result(value[k], chance[k], *ends, n[k], measure=title, sheet=name, **keys)
    return np.mean(curves, 0)


def geometry_of_maps(run, config, sheets, contrast):
    """Report the smoothness of each map and the wiring length from each sheet to the next.

    Chance is shuffled positions; 95 % intervals come from a jackknife over stimuli.
    """
    labels = [("smoothness", name) for name in sheets.names]
    for name, next_name in pairwise(sheets.names):
        labels.append(("wiring length", f"{name} to {next_name}"))

    def measure_maps(maps):
        smooth = [smoothness(sheet) for sheet in maps]
        wires = [wiring_length(sheet, after) for sheet, after in pairwise(maps)]
        return np.array(smooth + wires)

    def measure(a, b):
        return measure_maps(contrast_map(sheets.x, a, b, sheets.layout))

    value, half = jackknife(measure, contrast.a, contrast.b, parts=10)
    of_units = effect(sheets.x[contrast.a], sheets.x[contrast.b])
    rng = np.random.default_rng(key_seed(config.seed, "geometry of maps"))
    nulls = []
    for _ in range(5):
        nulls.append(measure_maps(on_sheet(of_units, rng.permuted(sheets.layout, axis=1))))
    keys = {"model": sheets.label, "contrast": contrast.name, "blur": 0.0, "data": contrast.data}
    for (title, sheet), v, chance, h in zip(labels, value, np.mean(nulls, 0), half):
        run.result(v, chance, v - h, v + h, of_units.shape[1], measure=title, sheet=sheet, **keys)


# ---- plots


def plot_contrast(path, title, models, maps):
    """Plot every sheet of every model on one colour scale; maps has one entry per model."""
    limit = np.abs(maps).max()
    columns = len(models[0].names)
    size = (1.45 * columns + 1, 1.75 * len(models) + 1)
    fig = plt.figure(figsize=size, layout="constrained")
    axes = fig.subplots(len(models), columns, squeeze=False)
    for row, sheets, of_model in zip(axes, models, maps):
        for axis, sheet, name in zip(row, of_model, sheets.names):
            image = axis.imshow(sheet, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[])
            score = positions.moran(sheet)
            axis.set_title(f"{name.removeprefix('layer.')}  I={score:.2f}", fontsize=7)
        row[0].set_ylabel(sheets.label, fontsize=8)
    fig.colorbar(image, ax=axes, shrink=0.8, label=EFFECT, pad=0.01)
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_summary(path, title, rows, curves, profile, ablation):
    """Plot Moran's I with its nulls, correlation over distance, mask responses and ablation."""
    fig, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    for k, (label, part) in enumerate(pd.DataFrame(rows).groupby("model", sort=False)):
        x = np.arange(len(part)) + 0.2 * k
        half = part.high - part.score
        axes[0].errorbar(x, part.score, yerr=half, fmt="o", capsize=2, label=label)
        axes[0].plot(x, part.chance, "_", c="gray", ms=12, label=f"{label}, shuffled positions")
        axes[0].plot(x, part["labels"], "_", c="C3", ms=12, label=f"{label}, shuffled labels")
    names = [name.replace(">", "\n> ").replace("+", "\n+ ") for name in part.contrast]
    axes[0].set_xticks(range(len(names)), names, fontsize=6)
    axes[0].legend(fontsize=7)
    for label, curve in curves.items():
        axes[1].plot(range(1, len(curve) + 1), curve, label=label)
    axes[1].axhline(0, c="0.8", lw=0.8)
    axes[1].legend(fontsize=7)
    if profile is not None:
        axes[2].bar(profile.index, profile["mean"], yerr=profile.half, capsize=3)
    axes[2].tick_params(axis="x", rotation=30, labelsize=7)
    table = pd.DataFrame(ablation, columns=["k", "units", "accuracy", "loss"])
    for kind, part in table.groupby("units"):
        axes[3].plot(part.k.astype(str), part.accuracy, "o-", label=f"{kind} units")
    axes[3].axhline(0.5, ls=":", c="gray", label="chance")
    axes[3].set_xlabel("units silenced")
    axes[3].legend(fontsize=7)
    axes[0].set_title("Moran's I of maps, mean over sheets (95 %)", fontsize=9)
    axes[1].set_title("correlation between units against distance (cells)", fontsize=9)
    axes[2].set_title("mask response to held-out stimuli (SD units, 95 %)", fontsize=9)
    axes[3].set_title("minimal-pair accuracy under ablation", fontsize=9)
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_sweep(path, table):
    """Plot Moran's I against validation loss: a line per spatial loss, points marked with alpha."""
    fig, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for kind, part in table.sort_values("alpha").groupby("spatial", sort=False):
        label = "alpha = 0" if kind == "none" else kind
        half = part.high - part.score
        axis.errorbar(part.val_loss, part.score, yerr=half, marker="o", capsize=3, label=label)
        for point in part.itertuples():
            axis.annotate(f" {point.alpha:g}", (point.val_loss, point.score), fontsize=8)
    axis.set(xlabel="validation loss (nats per token)", ylabel="Moran's I, unsmoothed (95 %)")
    axis.axhline(0, c="0.8", lw=0.8, zorder=0)
    axis.legend(title="spatial loss on")
    axis.set_title(f"topography against loss, by alpha; {table.data.iloc[0]}", fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


# ---- the run


def content_of(config):
    """Hash the files that options name, so that results.csv drops rows of files that changed."""
    names = [config.lm, config.twin, *config.sweep, config.stimuli, config.pairs, config.dataset]
    states = []
    for name in filter(None, names):
        path = Path(name) if Path(name).exists() else HERE / "data" / name
        states.append(path_state(path))
    return hash_options({"content": states})[:6]


def compare_runs(run, config):
    """Plot Moran's I of every run in `sweep`, mean over contrasts and sheets, against its loss."""
    stimuli, contrasts, data = load_stimuli(run, config)
    run.content = content_of(config)
    for folder in config.sweep:
        try:
            options = yaml.safe_load((Path(folder) / "config.yaml").read_text())
            alpha = options["alpha"]
            kind = options["spatial"] if alpha else "none"
            results = pd.read_csv(Path(folder) / "results.csv")
            loss = results[results.metric == "val_loss"].score.iloc[-1]
        except (OSError, LookupError, AttributeError):
            files = "config.yaml or results.csv is not from one"
            raise InputError(f"sweep={folder} is not a finished run of train.py: {files}") from None
        lm = load_model(folder, run)
        if not hasattr(lm.model, "unit_at_cell"):
            raise InputError(f"sweep={folder} has no sheets (positions=none): leave it out")
        x = unit_responses(run, lm, stimuli.text, config.batch_tokens)
        layout = lm.model.unit_at_cell.cpu().numpy()
        rng = np.random.default_rng(key_seed(config.seed, "sweep"))
        scores = []
        null = []
        for c in contrasts.values():
            scores.append(positions.moran(contrast_map(x, c.a, c.b, layout)))
            null.append(positions.moran(contrast_map(x, c.a, c.b, rng.permuted(layout, axis=1))))
        score = np.mean(scores)
        n = np.size(scores)
        half = half_interval(np.ravel(scores))
        keys = {"measure": "moran", "model": folder, "contrast": "mean", "sheet": "mean"}
        keys |= {"blur": 0.0, "data": data, "spatial": kind, "alpha": alpha, "val_loss": loss}
        run.result(score, np.mean(null), score - half, score + half, n, **keys)
        run.print(
            f"{folder}: {kind}, alpha {alpha}: validation loss {loss:.3f}, Moran's I {score:.3f} "
            f"± {half:.3f} (shuffled positions {np.mean(null):.3f}), n = {n} maps"
        )
    plot_sweep(run.out / "sweep.png", run.merge())
    run.close()


def load_pairs(run, config):
    """Return the minimal pairs {UID: [pair, ...]} of the option `pairs`, and the data's name."""
    if not config.pairs:
        return {}, ""
    if Path(config.pairs).exists():
        return read_pairs(config.pairs), config.pairs
    folder = run.dataset(config.pairs)
    return read_pairs(folder), called(config.pairs, folder)


def text_batches(run, config, lm):
    """Return `val_batches` batches of 16 windows of validation text, block_size + 1 tokens long."""
    ids = split_ids(run.dataset(config.dataset), "val", lm.tokenizer)
    size = lm.model.config.block_size + 1
    if len(ids) < size:
        shortage = f"{len(ids):,} validation tokens, fewer than the {size} of a window"
        raise InputError(f"dataset={config.dataset} has {shortage} of {lm.name}: use a longer text")
    starts = np.linspace(0, len(ids) - size, 16 * config.val_batches).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(ids, size)[starts]
    return torch.from_numpy(windows).to(run.device).split(16)


def all_have_sheets(config, lms):
    """Return whether all models have sheets. Raises InputError if nothing is left to do."""
    layouts = [getattr(lm.model, "unit_at_cell", None) for lm in lms.values()]
    if any(layout is None for layout in layouts):
        if not config.pairs:
            raise InputError(f"nothing to do: {config.lm} has no sheets; give pairs=grammar")
        return False
    if layouts[0].shape != layouts[-1].shape:
        raise InputError(f"twin={config.twin} must have the n_layer and n_embd of {config.lm}")
    return True


def main(config):
    run = Run(config)
    if config.sweep:
        return compare_runs(run, config)
    lms = {"model": load_model(config.lm, run)}
    if config.twin:
        lms["twin"] = load_model(config.twin, run)
    pairs, pairs_data = load_pairs(run, config)
    have_sheets = all_have_sheets(config, lms)
    if have_sheets:
        stimuli, contrasts, data = load_stimuli(run, config)
        batches = {label: text_batches(run, config, lm) for label, lm in lms.items()}
    run.content = content_of(config)
    for label, lm in lms.items():
        if pairs:
            report_pairs(run, config, label, lm, pairs, pairs_data)
    if not have_sheets:
        run.print(f"{config.lm} {config.twin}".strip() + ": no sheets, so minimal pairs only")
        run.merge()
        return run.close()

    localizer = next(iter(contrasts.values()))
    models = []
    for label, lm in lms.items():
        x = unit_responses(run, lm, stimuli.text, config.batch_tokens)
        models.append(Sheets(label, lm, lm.model.unit_at_cell.cpu().numpy(), x))
    rows = []
    for contrast in contrasts.values():
        rows += show_contrast(run, config, models, contrast)
    t, mask, profile = language_mask(run, config, models[0], stimuli.condition, localizer)
    ablation = []
    if pairs and mask.any():
        names = {"contrast": localizer.name, "pairs": pairs_data}
        ablation = ablate(run, config, lms["model"], t, pairs, torch.cat(batches["model"]), names)
    curves = {}
    for sheets in models:
        text = batches[sheets.label][0][:, :-1]
        curves[sheets.label] = geometry_of_text(run, config, sheets, text)
        geometry_of_maps(run, config, sheets, localizer)
    title = f"{config.lm} and its twin {config.twin}" if config.twin else config.lm
    plot_summary(run.out / "summary.png", f"{title}; {data}", rows, curves, profile, ablation)
    run.merge()
    run.print(f"figures and results.csv in {run.out}")
    run.close()


if __name__ == "__main__":
    main(configure(Config))
