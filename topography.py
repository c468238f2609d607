"""What lies on the sheets of a topographic language model: maps of contrasts, a language-selective mask, what ablating it costs.

    python topography.py                                            # the model of `python train.py`, embedded stimuli, offline
    python topography.py twin=out/train_alpha0                      # beside its twin without topography
    python topography.py config/topography_localizer.yaml           # your own stimuli: any CSV with a text and a condition column
    python topography.py sweep=out/a,out/b,out/c                    # runs of train.py: Moran's I against validation loss, one figure
    python topography.py lm=gpt2 pairs=path/to/blimp                # any causal language model: minimal pairs only

Maps are unsmoothed: blurring alone raises Moran's I to about 0.6 on a model without topography. Every Moran's I stands beside that of shuffled
positions (does place matter?) and of shuffled labels (is it this contrast, or are neighbours alike in whatever they do?).
Fedorenko et al. 2010 (localizer); Margalit et al. 2024 (TDANN); Rathi et al. 2025 (TopoLM); Warstadt et al. 2020 (BLiMP).
"""
import re
from dataclasses import dataclass, field
from functools import partial
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
from torch.nn import functional as F

import positions
from configurator import Run, configure, key_seed
from data import read_table
from data.stimuli import read_pairs
from data.tokens import Tokens
from convert import HiddenStates, load_lm
from model import GPT


@dataclass
class Config:
    # ---- model
    lm: str = "out/train"                  # run folder, checkpoint, or Hugging Face causal LM (no sheets: minimal pairs only)
    twin: str = ""                         # its twin without topography, shown beside it
    sweep: list[str] = field(default_factory=list)  # run folders of train.py to compare instead: strengths, spatial=activations or weights
    # ---- stimuli
    stimuli: str = "localizer"             # dataset under data/, a CSV, or a folder of CSVs (Fedorenko's localizer, Moseley's and other word lists)
    text_column: str = "text"              # of such a CSV; several columns, as of Hauptman's word pairs: word1,word2
    condition_column: str = "condition"    # of such a CSV; several columns: category,class
    contrasts: list[str] = field(default_factory=list)  # A>B or A+B>C+D of conditions; none: those of the set, or every pair of conditions
    localizer: str = ""                    # the contrast that selects units; "": the first
    # ---- statistics
    fdr: float = 0.05                      # false discovery rate over all units of all sheets
    fwhm: float = 0.0                      # blur of a readout (cells), shown beside the unsmoothed value with a null of its own; 0: none
    shuffles: int = 200                    # shuffled positions
    top_k: int = 0                         # units of the language mask; 0: all that survive the false discovery rate
    min_cluster: int = 10                  # units of the smallest cluster
    # ---- ablation and minimal pairs
    pairs: str = "grammar"                 # dataset under data/, a folder of BLiMP files, or one such file; none
    max_pairs: int = 200                   # per paradigm, the first ones; 0: all
    ablate: list[int] = field(default_factory=lambda: [16, 64, 256])  # numbers of units to silence, most selective first
    random_sets: int = 3                   # as many random units, drawn so often
    dataset: str = "pydocs"                # its validation text gives the loss under ablation, and the curves
    val_batches: int = 8                   # of 16 windows
    batch_tokens: int = 2048               # tokens per forward pass
    # ---- run
    out_dir: str = "out/topography"        # results.csv and figures
    seed: int = 1337                       # shuffles, random units
    device: str = "auto"                   # cuda, mps, cpu
    dtype: str = "auto"                    # bfloat16, float16, float32

    POSITIVE = "shuffles random_sets val_batches batch_tokens min_cluster"
    SHARES = "fdr"

    def check(self):
        for contrast in self.contrasts + [self.localizer] * bool(self.localizer):
            if contrast.count(">") != 1 or not all(contrast.split(">")):
                raise ValueError(f"contrast '{contrast}' must read A>B or A+B>C+D")


# ---- data

def read_stimuli(path, text_column="text", condition_column="condition"):
    """DataFrame with text and condition. path: a CSV, or a folder whose CSVs are read together. Two published layouts are known by their columns:
    Fedorenko's localizer (stim1..stimN: number, words, S or N at the end) and Moseley's list (word, category, class: concrete noun ...)."""
    files = sorted(Path(path).glob("*.csv")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"no stimuli at {path}: give stimuli= a CSV, a folder of CSVs, or 'localizer' for the embedded set")
    parts = []
    for file in files:
        table = read_table(file, dtype=str)
        stims = [c for c in table.columns if re.fullmatch(r"stim\d+", c)]
        if len(stims) > 3:
            words = table[stims[1:-1]].apply(lambda row: " ".join(w for w in row if w).lower(), axis=1)
            part = pd.DataFrame(dict(text=words, condition=table[stims[-1]]))
        elif {"word", "category", "class"} <= set(table.columns):
            part = pd.DataFrame(dict(text=table["word"], condition=table["category"] + " " + table["class"]))
        else:
            texts, conditions = text_column.split(","), condition_column.split(",")
            if missing := [c for c in texts + conditions if c not in table.columns]:
                raise ValueError(f"{file} has no column '{missing[0]}', only {', '.join(table.columns)}: set text_column= and condition_column=")
            part = pd.DataFrame(dict(text=table[texts].agg(" ".join, axis=1), condition=table[conditions].agg(" ".join, axis=1)))
        if (part.text.str.strip() == "").any():
            raise ValueError(f"{file}, line {2 + int((part.text.str.strip() == '').to_numpy().argmax())}: the text is empty")
        parts.append(part)
    return pd.concat(parts, ignore_index=True).drop_duplicates(ignore_index=True)


def find_contrasts(config, conditions):
    """{contrast: (conditions of A, conditions of B)}; ValueError for a condition that the stimuli have not."""
    names = sorted(set(conditions))
    asked = config.contrasts or [c for c in DEFAULT_CONTRASTS if set(re.split("[>+]", c)) <= set(names)] or \
        [f"{a}>{b}" for i, a in enumerate(names) for b in names[i + 1:]]
    found = {c: tuple(side.split("+") for side in c.split(">")) for c in dict.fromkeys([*asked, *[config.localizer] * bool(config.localizer)])}
    for contrast, sides in found.items():
        for condition in sum(sides, []):
            if (n := list(conditions).count(condition)) < 4:
                raise ValueError(f"contrast '{contrast}': the stimuli hold {n} of condition '{condition}', 4 are needed; there are {', '.join(names)}")
    return found


DEFAULT_CONTRASTS = ["sentences>nonwords", "sentences>words", "jabberwocky>nonwords", "concrete noun+abstract noun>concrete verb+abstract verb",
                     "concrete noun+concrete verb>abstract noun+abstract verb", "S>N"]


# ---- model

def length_batches(rows, tokens):
    """Batches of indices of the rows (token lists), of nearly equal length, at most `tokens` tokens each with their padding."""
    order, batch = sorted(range(len(rows)), key=lambda i: len(rows[i])), []
    for i in order:
        if batch and len(rows[i]) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(rows, device):
    """Right-padded ids (B, T) of token lists; causal attention never looks at what comes after, so pads change nothing before them."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def begin(tokenizer, text, size):
    """Token ids of a text behind the end-of-text token, cut to `size`."""
    return ([tokenizer.eot] if tokenizer.eot is not None else []) + tokenizer.encode(text)[:size - 1]


@torch.no_grad()
def responses(run, model, tokenizer, texts, batch_tokens):
    """Mean response of every unit over each text's own tokens (not the end-of-text token before them): (N, 2 n_layer, C) float32."""
    names = positions.layer_names(model.config.n_layer)
    rows = [begin(tokenizer, text, model.config.block_size) for text in texts]
    first = 0 if tokenizer.eot is None else 1
    out = np.zeros((len(rows), len(names), model.config.n_embd), np.float32)
    for batch in length_batches(rows, batch_tokens):
        with run.autocast():
            hidden = model(pad([rows[i] for i in batch], run.device), hidden=names).hidden
        lengths = torch.tensor([len(rows[i]) for i in batch], device=run.device)
        place = torch.arange(max(lengths), device=run.device)
        real = ((place >= first) & (place < lengths[:, None])).float()[:, :, None]  # (B, T, 1)
        for layer, name in enumerate(names):
            mean = (hidden[name].float() * real).sum(1) / real.sum(1).clamp_min(1)
            out[batch, layer] = mean.cpu().numpy()
    return out


@torch.no_grad()
def sentence_logprobs(run, model, tokenizer, texts, batch_tokens=2048, size=None):
    """Log-probability (nats) of each whole sentence behind the end-of-text token; no pad token is scored. Batched by length. (N,) float64.
    model: our GPT, or a Hugging Face causal LM."""
    size = size or (model.config.block_size if isinstance(model, GPT) else tokenizer.size)
    rows = [begin(tokenizer, text, size) for text in texts]
    scores = np.zeros(len(rows))
    for batch in length_batches(rows, batch_tokens):
        idx = pad([rows[i] for i in batch], run.device)
        with run.autocast():
            logits = model(idx).logits[:, :-1].float()  # (B, T - 1, V)
        right = -F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none").view(len(idx), -1)  # (B, T - 1)
        for row, i in zip(right.double().cpu().numpy(), batch):
            scores[i] = row[:len(rows[i]) - 1].sum()
    return scores


class OtherTokenizer:
    """A Hugging Face tokenizer with the names used here."""

    def __init__(self, lm):
        self.core, self.size = lm.tokenizer, lm.max_length
        self.eot = self.core.bos_token_id if self.core.bos_token_id is not None else self.core.eos_token_id

    def encode(self, text):
        return self.core.encode(text, add_special_tokens=False)


def load_any(spec):
    """(model, tokenizer): our GPT where the spec is one or a Hugging Face GPT-2, else any Hugging Face causal LM."""
    lm = HiddenStates(spec, head=True)
    if not lm.causal:
        raise ValueError(f"{spec} looks at what comes after a token: sentences are scored by a causal language model")
    return (lm.model, lm.tokenizer) if isinstance(lm.model, GPT) else (lm.model, OtherTokenizer(lm))


class silenced:
    """`with silenced(model, mask):` the sublayer outputs of the units in mask (2 n_layer, C) bool are zero. Output units, as they were selected."""

    def __init__(self, model, mask):
        self.model, self.keep = model, ~torch.as_tensor(mask)

    def __enter__(self):
        device = self.model.transformer.wte.weight.device
        sublayers = [s for block in self.model.transformer.h for s in (block.attn, block.mlp)]
        self.hooks = [s.register_forward_hook(partial(self._zero, keep.to(device))) for s, keep in zip(sublayers, self.keep)]

    @staticmethod
    def _zero(keep, module, args, out):
        return out * keep

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


# ---- statistics

def welch(a, b):
    """Welch's t (...) of samples a (n, ...) against b (m, ...) and its p; units that never vary have t = 0, p = 1."""
    with np.errstate(all="ignore"):
        t, p = scipy.stats.ttest_ind(a, b, axis=0, equal_var=False)
    return np.nan_to_num(t), np.nan_to_num(p, nan=1.0)


def on_sheet(values, unit_at_cell):
    """values (..., L, C) of units as maps (..., L, side, side) on their sheets; unit_at_cell (L, C)."""
    side = positions.sheet_side(values.shape[-1])
    index = np.broadcast_to(unit_at_cell, values.shape)
    return np.take_along_axis(values, index, -1).reshape(*values.shape[:-1], side, side)


def blur(maps, fwhm):
    """Maps (..., side, side) as a readout of that width (FWHM, cells) would see them."""
    sigma = fwhm / np.sqrt(8 * np.log(2))
    return scipy.ndimage.gaussian_filter(maps, (0,) * (maps.ndim - 2) + (sigma, sigma), mode="nearest")


def contrast_map(x, a, b, unit_at_cell, fwhm=0.0):
    """t-maps (L, side, side) of responses x (N, L, C), rows a against rows b; blurred responses where fwhm > 0."""
    maps = on_sheet(x, unit_at_cell)
    if fwhm:
        maps = blur(maps, fwhm)
    return welch(maps[a], maps[b])[0]


def moran_of_contrast(x, a, b, unit_at_cell, rng, shuffles, fwhm=0.0, parts=20):
    """Moran's I of each sheet's t-map (L,), its 95 % interval over stimuli (jackknife by groups of stimuli), and I under shuffled positions
    (shuffles, L): units keep their responses and lose their places, before any blur."""
    observed = positions.moran(contrast_map(x, a, b, unit_at_cell, fwhm))
    parts = min(parts, len(a), len(b))
    half = jackknife(positions.moran(contrast_map(x, *(s[without(i, len(s), parts)] for s in (a, b)), unit_at_cell, fwhm)) for i in range(parts))
    if fwhm:
        null = np.stack([positions.moran(contrast_map(x, a, b, rng.permuted(unit_at_cell, axis=1), fwhm)) for _ in range(shuffles)])
    else:  # t belongs to the unit: shuffling the map is shuffling the positions
        t = welch(x[a], x[b])[0]
        null = np.stack([positions.moran(on_sheet(t, rng.permuted(unit_at_cell, axis=1))) for _ in range(shuffles)])
    return observed, observed - half, observed + half, null


def without(i, n, parts):
    """Rows 0 ... n - 1 less part i of `parts`: every so many-th."""
    return np.delete(np.arange(n), np.arange(i, n, parts))


def jackknife(left):
    """Half of a 95 % interval (...) from what is measured with each part of the data left out, an iterable of arrays (...)."""
    left = np.stack(list(left))
    return 1.96 * np.sqrt((len(left) - 1) / len(left) * np.square(left - left.mean(0)).sum(0))


def shuffled_labels(x, a, b, unit_at_cell, rng, shuffles):
    """Moran's I (shuffles,), mean over sheets, of the contrast with its stimuli dealt to the two sides at random: how smooth the map of nothing is."""
    both, found = np.concatenate([a, b]), []
    for _ in range(shuffles):
        dealt = rng.permutation(both)
        found.append(np.nanmean(positions.moran(contrast_map(x, dealt[:len(a)], dealt[len(a):], unit_at_cell))))
    return np.array(found)


def clusters(t, smallest, stop=0.0):
    """Regions of one map t (side, side): from the highest unclaimed cell, the best neighbour (of four) is taken as long as its t is above `stop`;
    regions of fewer than `smallest` cells are dropped. Labels (side, side), 0 for none, 1 the region with the highest peak."""
    labels, free, count = np.zeros(t.shape, int), t > stop, 0
    while free.any():
        peak = np.unravel_index(np.where(free, t, -np.inf).argmax(), t.shape)
        region, edge = [], {peak}
        while edge:
            cell = max(edge, key=lambda c: t[c])
            edge.remove(cell)
            region.append(cell)
            free[cell] = False
            i, j = cell
            edge |= {c for c in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)) if 0 <= c[0] < len(t) and 0 <= c[1] < t.shape[1] and free[c]}
        if len(region) >= smallest:
            count += 1
            labels[tuple(zip(*region))] = count
    return labels


def effective_dimensionality(r):
    """(Σλ)² / Σλ² of the eigenvalues of a correlation matrix r (C, C) with unit diagonal (Del Giudice 2021)."""
    return len(r) ** 2 / np.square(r).sum()


def smoothness(t):
    """(max - first) / max of the curve of mean |t_i - t_j| over distance (1, 2, ... cells) on a map (side, side) (Margalit et al. 2024)."""
    side = len(t)
    at = np.stack(np.divmod(np.arange(side * side), side), 1)
    i, j = np.triu_indices(side * side, 1)
    distance = np.linalg.norm(at[i] - at[j], axis=1).round().astype(int)
    curve = np.bincount(distance, np.abs(t.ravel()[i] - t.ravel()[j]))[1:side] / np.bincount(distance)[1:side]
    return (curve.max() - curve[0]) / max(curve.max(), 1e-12)


def wiring_length(t, next_t, share=0.05, reach=2.0):
    """Cells of fibre from the most active units of one sheet to those of the next (maps (side, side)): both sets are gathered into the fewest
    k-means fibres whose units lie within `reach` cells of them on average; fibre ends are matched at least cost (Margalit et al. 2024).
    Length = way of the units to their fibre on both sheets + way of the fibres across."""
    from sklearn.cluster import KMeans
    ends, inside = [], 0.0
    points = []
    for m in (t, next_t):
        top = np.argsort(-m.ravel(), kind="stable")[:max(2, round(share * m.size))]
        points.append(np.stack(np.divmod(top, len(m)), 1).astype(float))
    for k in range(1, len(points[0]) + 1):
        fits = [KMeans(k, n_init=2, random_state=0).fit(p) for p in points]
        ways = [np.linalg.norm(p - f.cluster_centers_[f.labels_], axis=1) for p, f in zip(points, fits)]
        if max(w.mean() for w in ways) <= reach or k == len(points[0]):
            inside, ends = sum(w.sum() for w in ways), [f.cluster_centers_ for f in fits]
            break
    cost = np.linalg.norm(ends[0][:, None] - ends[1], axis=-1)
    return inside + cost[scipy.optimize.linear_sum_assignment(cost)].sum()


def paradigm_accuracy(good, bad):
    """Share of pairs whose good sentence is the likelier one (a tie counts half), with Wilson's 95 % interval, and n."""
    right = ((good > bad) + 0.5 * (good == bad)).sum()
    n = len(good)
    low, high = scipy.stats.binomtest(int(np.floor(right)), n).proportion_ci(method="wilson")
    return right / n, low, high, n


# ---- evaluate

def score_pairs(run, model, tokenizer, pairs, config):
    """{UID: (accuracy, low, high, n)} of minimal pairs {UID: [pair, ...]}."""
    kept = {uid: members[:config.max_pairs or None] for uid, members in pairs.items()}
    texts = [p[side] for members in kept.values() for p in members for side in ("sentence_good", "sentence_bad")]
    scores = sentence_logprobs(run, model, tokenizer, texts, config.batch_tokens)
    found, at = {}, 0
    for uid, members in kept.items():
        part = scores[at:at + 2 * len(members)]
        found[uid] = paradigm_accuracy(part[::2], part[1::2])
        at += 2 * len(members)
    return found


@torch.no_grad()
def val_loss(run, model, batches):
    """Next-token loss (nats) on batches (B, T + 1)."""
    losses = []
    for batch in batches:
        with run.autocast():
            losses.append(model(batch[:, :-1], batch[:, 1:]).task.item())
    return float(np.mean(losses))


# ---- plots

def plot_contrast(path, title, models):
    """One figure per contrast: every sheet of every model, t-values on one colour scale. models: [(label, t (L, side, side), moran (L,), names)]."""
    limit = max(np.abs(t).max() for _, t, _, _ in models)
    columns = len(models[0][3])
    fig, axes = plt.subplots(len(models), columns, figsize=(1.45 * columns + 1, 1.75 * len(models) + 0.8), squeeze=False, layout="constrained")
    for row, (label, t, scores, names) in zip(axes, models):
        for ax, sheet, score, name in zip(row, t, scores, names):
            image = ax.imshow(sheet, cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name.removeprefix('layer.')}  I={score:.2f}", fontsize=7)
        row[0].set_ylabel(label, fontsize=8)
    fig.colorbar(image, ax=axes, shrink=0.8, label="t", pad=0.01)
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_summary(path, title, rows, curves, profile, ablation):
    """summary.png: Moran's I by contrast with its null, correlation over distance, response profile of the mask, and what ablation costs."""
    fig, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    table = pd.DataFrame(rows)
    for k, (label, part) in enumerate(table.groupby("model", sort=False)):
        x = np.arange(len(part)) + 0.2 * k
        axes[0].errorbar(x, part.score, yerr=[part.score - part.low, part.high - part.score], fmt="o", label=label, capsize=2)
        axes[0].plot(x, part.chance, "_", c="gray", ms=12, label="shuffled positions" if k == 0 else None)
        axes[0].plot(x, part["labels"], "_", c="C3", ms=12, label="shuffled labels" if k == 0 else None)
    axes[0].set_xticks(range(len(part)), [c.replace(">", "\n> ").replace("+", "\n+ ") for c in part.contrast], fontsize=6)
    axes[0].set_title("Moran's I of t-maps, mean over sheets (95 %)", fontsize=9)
    axes[0].legend(fontsize=7)
    for label, (distance, r) in curves.items():
        axes[1].plot(distance, r, label=label)
    axes[1].set_title("correlation of two units over their distance (cells)", fontsize=9)
    axes[1].axhline(0, c="0.8", lw=0.8)
    axes[1].legend(fontsize=7)
    for k, (_, mean, low, high) in enumerate(profile):
        axes[2].bar(k, mean, yerr=[[mean - low], [high - mean]], capsize=3, color="C0")
    axes[2].set_xticks(range(len(profile)), [p[0] for p in profile], rotation=30, ha="right", fontsize=7)
    axes[2].set_title("mask's response to held-out stimuli (SD units, 95 %)", fontsize=9)
    for kind, style in (("selective", "o-"), ("random", "s--")):
        part = [(n, acc) for n, which, acc, _ in ablation if which == kind]
        if part:
            axes[3].plot(*zip(*part), style, label=f"{kind} units")
    axes[3].set(xscale="symlog", xlabel="units silenced")
    axes[3].set_title("minimal-pair accuracy under ablation", fontsize=9)
    axes[3].axhline(0.5, ls=":", c="gray")
    if ablation:
        axes[3].legend(fontsize=7)
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=120)
    plt.close(fig)


# ---- the run

def show_maps(run, config, models, x, layout, condition, contrasts, data):
    """Every contrast as maps of every sheet, and their Moran's I beside that of shuffled positions. Returns the rows of means over sheets."""
    rows = []
    for contrast, sides in contrasts.items():
        a, b = (np.flatnonzero(np.isin(condition, side)) for side in sides)
        shown = []
        for label, (model, _) in models.items():
            names = positions.layer_names(model.config.n_layer)
            for fwhm in [0.0] + [config.fwhm] * (config.fwhm > 0):
                rng = np.random.default_rng(key_seed(config.seed, contrast, fwhm))
                shuffles = min(20, config.shuffles) if fwhm else config.shuffles  # blurred ones need the responses again
                scores, low, high, null = moran_of_contrast(x[label], a, b, layout[label], rng, shuffles, fwhm)
                keys = dict(measure="moran", model=label, contrast=contrast, blur=fwhm, data=data)
                for i, name in enumerate(names):
                    run.result(scores[i], null[:, i].mean(), low[i], high[i], len(a) + len(b), sheet=name, **keys)
                half = 1.96 * scores.std(ddof=1) / np.sqrt(len(scores))  # over sheets
                mean = dict(score=scores.mean(), chance=null.mean(), low=scores.mean() - half, high=scores.mean() + half, n=len(scores))
                run.result(**mean, sheet="mean", **keys)
                significant = mne.stats.fdr_correction(welch(x[label][a], x[label][b])[1], config.fdr)[0].mean()
                run.print(f"{label}: {contrast}{f' blurred {fwhm} cells' if fwhm else ''}: Moran's I {mean['score']:.3f} [{mean['low']:.3f}, "
                          f"{mean['high']:.3f}] beside {mean['chance']:.3f} of shuffled positions, mean over {len(names)} sheets; "
                          f"{significant:.0%} of units significant (FDR {config.fdr})")
                if not fwhm:
                    labels = shuffled_labels(x[label], a, b, layout[label], rng, min(60, config.shuffles))
                    low, high = np.quantile(labels, [0.025, 0.975])  # of the null: units that vary together make any map smooth
                    run.result(mean["score"], labels.mean(), low, high, len(labels), sheet="mean", **{**keys, "measure": "moran beside shuffled labels"})
                    run.print(f"    shuffled labels give {labels.mean():.3f} [{low:.3f}, {high:.3f}]: the contrast itself is "
                              f"{'mapped beyond' if mean['score'] > high else 'no smoother than'} what correlated neighbours do to any map")
                    rows.append(dict(model=label, contrast=contrast, labels=labels.mean(), **mean))
                    shown.append((label, contrast_map(x[label], a, b, layout[label]), scores, names))
        plot_contrast(run.out / f"map_{re.sub(r'[^a-z0-9A-Z]+', '_', contrast)}.png", f"{contrast}: Welch t of every unit on its sheet, unsmoothed; "
                      f"{data} ({len(a)} against {len(b)}); I: Moran's I (shuffled positions {rows[-1]['chance']:.2f})", shown)
    return rows


def language_mask(run, config, x, layout, condition, localizer, sides, names, data):
    """Units that prefer the contrast's first side, selected on every other stimulus and measured on the rest: t (L, C), mask (L, C) bool and the
    mask's held-out response profile [(condition, mean, low, high)] in SD units."""
    a, b = (np.flatnonzero(np.isin(condition, side)) for side in sides)
    z = (x - x.mean(0)) / (x.std(0) + 1e-9)
    t, p = welch(z[a[::2]], z[b[::2]])
    if config.top_k:
        mask = np.zeros(t.shape, bool)
        mask.ravel()[np.argsort(-t, axis=None, kind="stable")[:config.top_k]] = True
    else:
        mask = mne.stats.fdr_correction(p, config.fdr)[0] & (t > 0)
    if not mask.any():
        run.print(f"no unit prefers {localizer.replace('>', ' to ')} at FDR {config.fdr}: no mask, no ablation")
        return t, mask, []
    profile = []
    for c in dict.fromkeys(condition):
        per_text = z[np.flatnonzero(condition == c)[1::2]][:, mask].mean(1)
        half = scipy.stats.t.ppf(0.975, len(per_text) - 1) * per_text.std(ddof=1) / np.sqrt(len(per_text))
        profile.append((c, per_text.mean(), per_text.mean() - half, per_text.mean() + half))
    held_a, held_b = z[a[1::2]], z[b[1::2]]
    d = held_a.mean(0) - held_b.mean(0)  # (L, C), SD units
    ci = scipy.stats.ttest_ind(held_a[:, mask].mean(1), held_b[:, mask].mean(1), equal_var=False).confidence_interval()
    rng = np.random.default_rng(key_seed(config.seed, "mask"))
    chance = np.mean([rng.permutation(d.ravel())[:mask.sum()].mean() for _ in range(100)])
    run.result(d[mask].mean(), chance, ci.low, ci.high, len(held_a) + len(held_b), measure="selectivity", model="model", contrast=localizer, blur=0.0,
               sheet="all", data=data)
    sizes = [np.bincount(clusters(m, config.min_cluster).ravel())[1:].tolist() for m in on_sheet(t, layout)]
    run.print(f"mask of {localizer}: {mask.sum()} of {mask.size} units; held-out selectivity {d[mask].mean():.2f} SD [{ci.low:.2f}, {ci.high:.2f}] "
              f"beside {chance:.2f} of random units; clusters (units): " + "; ".join(f"{name} {s}" for name, s in zip(names, sizes)))
    return t, mask, profile


def ablate(run, config, model, tokenizer, t, pairs, batches, localizer, data):
    """What silencing the k most selective units costs, beside as many random ones: [(k, which, pair accuracy, validation loss)]."""
    def measure(units):
        chosen = np.zeros(t.size, bool)
        chosen[units] = True
        with silenced(model, chosen.reshape(t.shape)):
            return np.mean([s[0] for s in score_pairs(run, model, tokenizer, pairs, config).values()]), val_loss(run, model, batches)

    order, rng = np.argsort(-t, axis=None, kind="stable"), np.random.default_rng(key_seed(config.seed, "ablate"))
    whole = measure(order[:0])
    found = [(0, "selective", *whole), (0, "random", *whole)]
    sizes = [k for k in config.ablate if 0 < k <= t.size]
    bar = run.progress(len(sizes) * (1 + config.random_sets), desc="ablation")
    for k in sizes:
        chosen, others = measure(order[:k]), []
        bar.update()
        for _ in range(config.random_sets):
            others.append(measure(rng.permutation(t.size)[:k]))
            bar.update()
        mean = np.mean(others, 0)
        for i, what in enumerate(("ablation accuracy", "ablation val_loss")):  # chance, low, high: mean and range of the random sets
            run.result(chosen[i], mean[i], np.min(others, 0)[i], np.max(others, 0)[i], config.random_sets, measure=what, model="model",
                       contrast=localizer, blur=0.0, sheet=f"{k} units", data=data[i])
        found += [(k, "selective", *chosen), (k, "random", *mean)]
        run.print(f"{k} units silenced: accuracy {chosen[0]:.3f} beside {mean[0]:.3f} of random units (whole {whole[0]:.3f}), "
                  f"validation loss {chosen[1]:.3f} beside {mean[1]:.3f} (whole {whole[1]:.3f})")
    bar.close()
    return found


def geometry(run, config, label, model, layout, batch, x, a, b, localizer, data, most=10):
    """Correlation over distance, effective dimensionality, smoothness and wiring length of every sheet, beside shuffled positions (for the
    dimensionality, beside the number of units). Intervals: jackknife over at most so many parts of the windows, or of the stimuli.
    Returns the mean curve (distance, r)."""
    names, side = positions.layer_names(model.config.n_layer), positions.sheet_side(model.config.n_embd)
    rng = np.random.default_rng(key_seed(config.seed, "geometry"))
    with torch.no_grad(), run.autocast():
        hidden = model(batch, hidden=names).hidden
    at = np.stack(np.divmod(np.arange(side * side), side), 1)
    i, j = np.triu_indices(side * side, 1)
    steps = np.linalg.norm(at[i] - at[j], axis=1).round().astype(int)
    count = np.bincount(steps)[1:side]

    def curve(r, units):
        return np.bincount(steps, r[np.ix_(units, units)][i, j])[1:side] / count  # mean correlation at 1, 2, ... cells

    t, windows, texts = welch(x[a], x[b])[0], min(most, len(batch)), min(most, len(a), len(b))
    maps, nulls = on_sheet(t, layout), [on_sheet(t, rng.permuted(layout, axis=1)) for _ in range(5)]
    left = [contrast_map(x, *(s[without(i, len(s), texts)] for s in (a, b)), layout) for i in range(texts)]
    curves = []

    def record(measure, value, chance, half, n, sheet, contrast, data):
        run.result(value, chance, value - half, value + half, n, measure=measure, model=label, contrast=contrast, blur=0.0, sheet=sheet, data=data)

    for k, name in enumerate(names):
        def of_text(states):
            """(2,): mean correlation of next neighbours, and effective dimensionality, of states (windows, T, C)."""
            r = positions.correlations(states.flatten(0, 1).float())
            near = curve(r, layout[k])[0]  # noqa: B023 (called at once)
            np.fill_diagonal(r, 1)
            return np.array([near, effective_dimensionality(r)])

        r = positions.correlations(hidden[name].flatten(0, 1).float())
        curves.append(curve(r, layout[k]))
        shuffled = curve(r, rng.permutation(layout[k]))[0]
        (near, wide), half = of_text(hidden[name]), jackknife(of_text(hidden[name][without(i, len(batch), windows)]) for i in range(windows))
        record("correlation at distance 1", near, shuffled, half[0], int(count[0]), name, "", config.dataset)
        record("effective dimensionality", wide, len(r), half[1], batch.numel(), name, "", config.dataset)
        record("smoothness", smoothness(maps[k]), np.mean([smoothness(m[k]) for m in nulls]), jackknife(smoothness(m[k]) for m in left), side * side, name,
               localizer, data)
        if k + 1 < len(names):
            record("wiring length", wiring_length(maps[k], maps[k + 1]), np.mean([wiring_length(m[k], m[k + 1]) for m in nulls]),
                   jackknife(wiring_length(m[k], m[k + 1]) for m in left), side * side, f"{name} to {names[k + 1]}", localizer, data)
    return np.arange(1, side), np.mean(curves, 0)


def compare(run, config):
    """Moran's I of the response maps (unsmoothed, mean over contrasts and sheets, 95 % interval over them) of every run in `sweep` against its
    validation loss: sweep.png and rows of results.csv."""
    embedded = not Path(config.stimuli).exists()
    stimuli = read_stimuli(run.dataset(config.stimuli) / "localizer.csv" if embedded else config.stimuli, config.text_column, config.condition_column)
    condition, data = stimuli.condition.to_numpy(), f"{config.stimuli}, synthetic" if embedded else str(config.stimuli)
    contrasts, points = find_contrasts(config, condition), []
    for folder in config.sweep:
        results = Path(folder) / "results.csv"
        if not results.exists():
            raise FileNotFoundError(f"sweep={folder} holds no results.csv: finish that run of train.py first, or leave it out")
        options = yaml.safe_load((Path(folder) / "config.yaml").read_text())
        loss = pd.read_csv(results).query("metric == 'val_loss'").score.iloc[-1]
        model, tokenizer = load_lm(folder)
        x, layout = responses(run, model.to(run.device).eval(), tokenizer, stimuli.text, config.batch_tokens), model.unit_at_cell.cpu().numpy()
        rng, scores, null = np.random.default_rng(key_seed(config.seed, "sweep")), [], []
        for sides in contrasts.values():
            a, b = (np.flatnonzero(np.isin(condition, side)) for side in sides)
            scores.append(positions.moran(contrast_map(x, a, b, layout)))
            null.append(positions.moran(contrast_map(x, a, b, rng.permuted(layout, axis=1))))
        score, half = np.mean(scores), 1.96 * np.std(scores, ddof=1) / np.sqrt(np.size(scores))
        kind = "none" if not options["alpha"] else options["spatial"]
        points.append((kind, options["alpha"], loss, score, half))
        run.result(score, np.mean(null), score - half, score + half, np.size(scores), measure="moran", model=folder, contrast="mean", sheet="mean", blur=0.0,
                   data=data, spatial=kind, alpha=options["alpha"], val_loss=loss)
        run.print(f"{folder}: spatial={kind} alpha={options['alpha']}: validation loss {loss:.3f}, Moran's I {score:.3f} [{score - half:.3f}, "
                  f"{score + half:.3f}] beside {np.mean(null):.3f} of shuffled positions, n = {np.size(scores)} maps")
    fig, ax = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for kind in dict.fromkeys(p[0] for p in points):
        part = sorted(p[1:] for p in points if p[0] == kind)
        ax.errorbar([p[1] for p in part], [p[2] for p in part], yerr=[p[3] for p in part], marker="o", capsize=3, label={"none": "alpha = 0"}.get(kind, kind))
        for alpha, loss, score, _ in part:
            ax.annotate(f"{alpha:g}", (loss, score), xytext=(5, 5), textcoords="offset points", fontsize=8)
    ax.set(xlabel="validation loss (nats per token)", ylabel="Moran's I of contrast maps, unsmoothed (95 %)")
    ax.axhline(0, c="0.8", lw=0.8, zorder=0)
    ax.legend(title="spatial loss on")
    ax.set_title(f"topography against loss, by strength alpha; {data}", fontsize=10)
    fig.savefig(run.out / "sweep.png", dpi=130)
    run.merge()
    run.close()


def main(config):
    run = Run(config)
    if config.sweep:
        return compare(run, config)
    models = {"model": load_any(config.lm)} | ({"twin": load_any(config.twin)} if config.twin else {})
    for model, _ in models.values():
        model.to(run.device).eval()
    model, tokenizer = models["model"]
    pairs = {}
    if config.pairs not in ("", "none"):
        pairs = read_pairs(config.pairs if Path(config.pairs).exists() else run.dataset(config.pairs))
    pairs_data = config.pairs if Path(config.pairs).exists() else f"{config.pairs}, synthetic"
    for label, (net, words) in models.items() if pairs else ():
        found = score_pairs(run, net, words, pairs, config)
        for uid, (score, low, high, n) in found.items():
            run.result(score, 0.5, low, high, n, measure="minimal pairs", model=label, contrast=uid, blur=0.0, sheet="", data=pairs_data)
        run.print(f"{label}: minimal pairs {np.mean([f[0] for f in found.values()]):.3f} beside 0.5 of chance, mean of {len(found)} paradigms, "
                  f"n = {sum(f[3] for f in found.values()):,}: " + ", ".join(f"{uid} {f[0]:.2f}" for uid, f in found.items()))
    if not all(isinstance(net, GPT) and net.config.sheet for net, _ in models.values()):
        run.print(f"{config.lm} {config.twin}: not all have sheets, so minimal pairs only")
        run.merge()
        return run.close()

    embedded = not Path(config.stimuli).exists()
    stimuli = read_stimuli(run.dataset(config.stimuli) / "localizer.csv" if embedded else config.stimuli, config.text_column, config.condition_column)
    condition, data = stimuli.condition.to_numpy(), f"{config.stimuli}, synthetic" if embedded else str(config.stimuli)
    contrasts = find_contrasts(config, condition)
    localizer = config.localizer or next(iter(contrasts))
    run.print(f"{len(stimuli)} stimuli: " + ", ".join(f"{c} {n}" for c, n in stimuli.condition.value_counts().items()))
    x = {label: responses(run, net, words, stimuli.text, config.batch_tokens) for label, (net, words) in models.items()}  # (N, L, C) each
    layout = {label: net.unit_at_cell.cpu().numpy() for label, (net, _) in models.items()}
    rows = show_maps(run, config, models, x, layout, condition, contrasts, data)
    t, mask, profile = language_mask(run, config, x["model"], layout["model"], condition, localizer, contrasts[localizer],
                                     positions.layer_names(model.config.n_layer), data)
    val, T = Tokens(run.dataset(config.dataset), "val"), model.config.block_size
    starts = np.linspace(0, len(val) - T - 1, 16 * config.val_batches).astype(int)
    batches = torch.from_numpy(val.windows(starts, T + 1)).to(run.device).split(16)
    ablation = ablate(run, config, model, tokenizer, t, pairs, batches, localizer, (pairs_data, config.dataset)) \
        if pairs and mask.any() else []
    a, b = (np.flatnonzero(np.isin(condition, side)) for side in contrasts[localizer])
    curves = {label: geometry(run, config, label, net, layout[label], batches[0][:, :-1], x[label], a, b, localizer, data)
              for label, (net, _) in models.items()}
    title = config.lm + (f" and its twin {config.twin}" if config.twin else "") + f"; {data}"
    plot_summary(run.out / "summary.png", title, rows, curves, profile, ablation)
    run.merge()
    run.print(f"figures and results.csv in {run.out}")
    run.close()


if __name__ == "__main__":
    main(configure(Config))
