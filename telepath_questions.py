"""The questions behind telepath.py, each answered by a table with its null.

    python telepath_questions.py analysis=window        # does EEG before the picture also matter?
    python telepath_questions.py analysis=frozen        # does a fine-tuned GPT unlearn other names?
    python telepath_questions.py analysis=generalise    # does training transfer to unseen objects?
    python telepath_questions.py analysis=architecture  # which architecture is best?
    python telepath_questions.py analysis=tokens init_from=out/telepath   # after telepath.py

The first four train small models, one per job; ranks share the jobs. `tokens` follows the neural
tokens of a run through token space (trajectory.csv), compares neural queries with the keys of names
(query_key.csv), and reads every layer through the head (logit_lens.csv). All options of telepath.py
apply.

nostalgebraist 2020 (logit lens).
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import telepath
from configurator import Run, configure, hash_options, key_seed
from data import InputError, path_state, write_aside
from data.recording import read_set
from model import ENCODERS, load_checkpoint
from telepath import measured, place, save_figure, score_names, score_rows, subset, top_k

NULLS = 500  # shuffles of words, for query-key and logit lens
SLICE = 0.1  # s of EEG, in analysis=window


@dataclass
class Config(telepath.Config):
    analysis: Literal["window", "frozen", "generalise", "architecture", "tokens"] = "window"
    max_iters: int = 400  # optimiser steps per model

    RENAMED = telepath.Config.RENAMED | {"analysis_iters": "max_iters"}

    def check(self):
        super().check()
        if self.minutes:
            raise InputError("minutes= only works in telepath.py: give max_iters= here")
        if (self.analysis == "tokens") != (self.init_from != "scratch"):
            problem = "only analysis=tokens reads a run, and it needs one (init_from=out/telepath)"
            raise InputError(f"{problem}; the others train new models")
        if self.analysis in ("frozen", "generalise", "architecture") and not self.held_out_objects:
            raise InputError(f"analysis={self.analysis} needs held_out_objects= above 0")


# ---- the models of a job


def fresh(run, config, **options):
    """Return the Config and Experiment of a new model with some options changed."""
    config = replace(config, **options)
    return config, telepath.Experiment(run, config, config.dataset)


def train_step(run, config, experiment, training):
    """Take one supervised step, towards the names of what was seen."""
    for batch in training.batches():
        training.backward(telepath.supervised_loss(run, config, experiment, batch)["loss"])
    training.update()


def fit(run, config, experiment, ids):
    """Train on the trials `ids` for config.max_iters steps, on this rank alone."""
    training = telepath.Training(run, config, experiment, ids, alone=True)
    for _ in range(config.max_iters):
        train_step(run, config, experiment, training)


def top1(run, config, experiment, name, words=None, silenced=()):
    """Return a row: closed-set top-1 of a set among `words` (default: all), and of shuffled EEG."""
    table = experiment.trials.table
    ids = experiment.sets[name]
    words = sorted(words or set(table.word.iloc[ids]))
    ids = subset(ids[table.word.iloc[ids].isin(words).to_numpy()], config)
    scores, empty = score_names(run, experiment, ids, words, silenced)
    good = top_k(scores - empty, 1)
    row, shuffled = score_rows(config, table.iloc[ids], "top1", good, words, 1 / len(words))
    row |= {"set": name, "shuffled": shuffled["score"], "data": experiment.trials.caption}
    run.print(f"    {name}: top-1 {row['score']:.3f}, shuffled EEG {row['shuffled']:.3f}")
    return row


def error_bars(axis, part, x, label):
    """Plot the scores of a table over x with their intervals."""
    errors = np.abs(part[["low", "high"]].T.to_numpy() - part.score.to_numpy())
    axis.errorbar(x, part.score, errors, fmt="-o", ms=4, capsize=2, label=label)


# ---- window: does EEG from before or after the picture matter?
# Models of slices, of growing windows, and of the whole window with one slice silenced.


def slices(config):
    """Return where slices of the window start, in s from picture onset."""
    return np.arange(-2 * SLICE, config.t_end - SLICE / 2, SLICE).round(3).tolist()


def window_jobs(run, config):
    """Return a job per model: the columns that identify its rows. (So does every _jobs.)"""
    jobs = []
    for start in slices(config):
        jobs.append({"kind": "slice", "start": start, "end": round(start + SLICE, 3)})
    for end in np.arange(2 * SLICE, config.t_end + SLICE / 2, SLICE).round(3).tolist():
        jobs.append({"kind": "growing", "start": 0.0, "end": end})
    return [*jobs, {"kind": "silenced"}]


def window_rows(run, config, job):
    """Train a job's model and return its rows of results. (So does every _rows function.)"""
    if job["kind"] != "silenced":
        config, experiment = fresh(run, config, t_start=job["start"], t_end=job["end"])
        fit(run, config, experiment, experiment.sets["train"])
        return [top1(run, config, experiment, "trial")]
    config, experiment = fresh(run, config)
    fit(run, config, experiment, experiment.sets["train"])
    trials = experiment.trials
    rows = []
    for start in slices(config):
        first, last = round(start * trials.sfreq), round((start + SLICE) * trials.sfreq)
        samples = np.flatnonzero((trials.offsets >= first) & (trials.offsets < last))
        if len(samples):
            row = top1(run, config, experiment, "trial", silenced=samples)
            rows.append({**row, "start": start, "end": round(start + SLICE, 3)})
    return rows


def draw_window(table):
    """Return the figure of a table of results. (So does every draw_ function.)"""
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    labels = {"slice": "trained on these 100 ms", "growing": "trained from 0 to here"}
    labels["silenced"] = "trained on the whole window, these 100 ms silenced"
    for kind, label in labels.items():
        part = table[table.kind == kind].sort_values("end")
        x = 1e3 * (part.end if kind == "growing" else (part.start + part.end) / 2)
        error_bars(axis, part, x, label)
        if kind == "slice":
            axis.plot(x, part.shuffled, c="0.6", label="shuffled EEG")
    axis.axhline(table.chance.iloc[0], c="k", ls=":", lw=0.8, label="chance")
    axis.axvline(0, c="0.8", zorder=0)
    axis.set(xlabel="ms from picture onset", ylabel="closed-set top-1, trial set")
    axis.legend(fontsize=8, frameon=False)
    return figure


# ---- frozen: does fine-tuning make a GPT unable to say names that were not in training?
# Probability, place and samples of held-out names, and drift from the original GPT on its own text.


def frozen_jobs(run, config):
    """Return two jobs: a frozen and a fine-tuned GPT."""
    return [{"train": "encoder+expert"}, {"train": "all"}]


def frozen_rows(run, config, job):
    """Measure what each GPT still knows of words that it was not trained on."""
    config, experiment = fresh(run, config, train=job["train"])
    original = copy.deepcopy(experiment.model.lm).eval()
    neutral = neutral_text(run, config, experiment, original)
    training = telepath.Training(run, config, experiment, experiment.sets["train"], alone=True)
    rows = []
    for step in range(config.max_iters + 1):
        if step:
            train_step(run, config, experiment, training)
        if step % max(1, config.max_iters // 5) == 0 or step == config.max_iters:
            drift = drift_on(neutral, original, experiment.model.lm, config)
            run.print(f"    step {step}: drift {drift['score']:.4f} nats")
            for row in [*held_out_names(run, config, experiment), drift]:
                rows.append({**row, "step": step, "data": experiment.trials.caption})
    rows.append(top1(run, config, experiment, "trial"))
    return [*rows, top1(run, config, experiment, "object")]


def neutral_text(run, config, experiment, lm, n_texts=8, length=48):
    """Let the GPT write text (n_texts, length)."""
    text = experiment.text
    begin = text.prompt if text.tokenizer.eot is None else [text.tokenizer.eot]
    rows = lm.generate([begin] * n_texts, length, seed=key_seed(config.seed, "neutral"))
    return torch.tensor([begin + row for row in rows], device=run.device)


def held_out_names(run, config, experiment):
    """Return rows: log-probability, place and sampled share of held-out names, given their EEG."""
    trials, text = experiment.trials, experiment.text
    ids = subset(experiment.sets["object"], config)
    table = trials.table.iloc[ids]
    held_out = experiment.manifest["held_out_words"]
    scores, _ = score_names(run, experiment, ids, trials.words)
    n_tokens = 1 + np.mean([len(text.ids[word]) for word in table.word])
    uniform = -math.log(experiment.model.lm.config.vocab_size) * n_tokens
    right_cells = (np.arange(len(ids)), trials.word[ids])
    values = {"log-probability": (scores[right_cells], uniform)}
    values["place among all names"] = (place(scores)[right_cells], 0.5)
    for metric, without_eeg in (("said", False), ("said without EEG", True)):
        answers = telepath.say(run, config, experiment, ids, without_eeg, temperature=1.0)
        _, right = telepath.right_answers(text, held_out, answers)
        values[metric] = (right.any(1), len(held_out) / len(trials.words))
    rows = []
    for metric, (value, chance) in values.items():
        row = measured(value, chance, table.object, config)
        rows.append({**row, "metric": metric, "set": "object"})
    return rows


@torch.no_grad()
def drift_on(neutral, original, lm, config):
    """Return a row: KL (nats per token) from the original GPT on its own text."""
    p = original(neutral).logits.float().log_softmax(-1)
    q = lm(neutral).logits.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean(1).cpu().numpy()
    return {**measured(kl, 0.0, range(len(kl)), config), "metric": "drift", "set": "neutral text"}


def draw_frozen(table):
    """Plot probability, place, samples and drift of the frozen and the fine-tuned GPT."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, metric in zip(axes, ("log-probability", "place among all names", "said", "drift")):
        for train, label in (("encoder+expert", "frozen GPT"), ("all", "fine-tuned GPT")):
            part = table[(table.metric == metric) & (table.train == train)]
            error_bars(axis, part, part.step, label)
        axis.set(xlabel="step", title=f"{metric} (held-out names)")
    axes[3].set_title("KL from the GPT, neutral text (nats)")
    axes[0].legend(frameon=False)
    return figure


# ---- generalise: does training transfer to unseen objects?
# Top-1 among equally many seen and unseen words, by number of training words.


def seen_and_unseen(config, experiment):
    """Return training words in the order that jobs take them, held-out words, the lesser number."""
    rng = np.random.default_rng(key_seed(config.split_seed, "generalise"))
    seen = rng.permutation(experiment.train_words).tolist()
    unseen = sorted(set(experiment.trials.table.word.iloc[experiment.sets["object"]]))
    return seen, unseen, min(len(seen), len(unseen))


def generalise_jobs(run, config):
    """Return jobs with growing numbers of training words."""
    seen, _, least = seen_and_unseen(config, fresh(run, config)[1])
    sizes = np.unique(np.geomspace(least, len(seen), 4).round().astype(int)).tolist()
    return pd.DataFrame({"trained": sizes}).to_dict("records")


def generalise_rows(run, config, job):
    """Score seen and unseen words after training on some words."""
    config, experiment = fresh(run, config)
    seen, unseen, least = seen_and_unseen(config, experiment)
    ids = experiment.sets["train"]
    trained = experiment.trials.table.word.iloc[ids].isin(seen[: job["trained"]])
    fit(run, config, experiment, ids[trained.to_numpy()])
    seen_row = top1(run, config, experiment, "trial", seen[:least])
    return [seen_row, top1(run, config, experiment, "object", unseen[:least])]


def draw_generalise(table):
    """Plot the accuracy of seen and unseen words over the number of training words."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label in (("trial", "seen words"), ("object", "unseen words")):
        part = table[table.set == name].sort_values("trained")
        error_bars(axis, part, part.trained, label)
    axis.axhline(table.chance.iloc[0], c="k", ls=":", lw=0.8, label="chance")
    axis.set(xlabel="words in training", ylabel=f"top-1 among {1 / table.chance.iloc[0]:.0f} words")
    axis.legend(frameon=False)
    return figure


# ---- architecture: which encoder, fusion, positions and mask are best at equal steps?


def architecture_jobs(run, config):
    """Return jobs: the options as they are, and every change of a single one."""
    choices = {"encoder": ENCODERS, "fusion": ("expert", "prefix", "cross")}
    choices["text_positions"] = ("zero", "after_prefix")
    choices["prefix_attention"] = ("causal", "full")
    choices["train"] = ("encoder+expert", "encoder")
    base = {key: getattr(config, key) for key in choices}
    jobs = [base]
    for key, values in choices.items():
        for value in values:
            if value != base[key]:
                jobs.append({**base, key: value})
    return jobs


def architecture_rows(run, config, job):
    """Score one architecture, with its number of trained weights."""
    config, experiment = fresh(run, config, **job)
    fit(run, config, experiment, experiment.sets["train"])
    n_trained = sum(p.numel() for p in experiment.model.parameters() if p.requires_grad)
    rows = [top1(run, config, experiment, "trial"), top1(run, config, experiment, "object")]
    return [{**row, "learned": n_trained} for row in rows]


def draw_architecture(table):
    """Plot the scores of architectures, labelled with their numbers of trained weights."""
    labels = []
    base = table.iloc[0]  # the options unchanged
    for row in table.to_dict("records"):
        keys = ("encoder", "fusion", "text_positions", "prefix_attention", "train")
        changed = [f"{key}={row[key]}" for key in keys if row[key] != base[key]]
        labels.append(f"{', '.join(changed) or 'unchanged'} ({row['learned'] / 1e6:.2f} M)")
    table = table.assign(label=labels)
    size = (11, 0.16 * len(table) + 1.6)
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    for axis, name in zip(axes, ("trial", "object")):
        part = table[table.set == name].iloc[::-1]
        errors = np.abs(part[["low", "high"]].T.to_numpy() - part.score.to_numpy())
        axis.errorbar(part.score, part.label, xerr=errors, fmt="o", capsize=2)
        axis.plot(part.shuffled, part.label, "x", c="0.6", label="shuffled EEG")
        axis.axvline(part.chance.iloc[0], c="k", ls=":", lw=0.8, label="chance")
        axis.set(xlabel=f"closed-set top-1, {name} set (trained parameters)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


# ---- tokens: where do the neural tokens of a run move, and what do they query?


def analyse_tokens(run, config):
    """Write tables and figures on token space, queries and keys, and the logit lens."""
    experiment = telepath.Experiment(run, config, config.dataset)
    if not run.master:
        return
    ids = experiment.sets["trial"]
    ids = subset(ids if len(ids) else experiment.sets["val"], config)
    last = load_checkpoint(telepath.checkpoint_path(config.init_from).parent / "ckpt.pt")
    tables = {"trajectory": trajectory(experiment, last["tokens"])}
    figures = {"trajectory": draw_way(tables["trajectory"], experiment.space)}
    if experiment.model.fusion != "cross":  # with cross-attention neural tokens have no queries
        tables["query_key"] = query_key(run, config, experiment, ids)
        figures["query_key"] = draw_query_key(tables["query_key"])
        tables["logit_lens"] = logit_lens(run, config, experiment, ids)
        figures["logit_lens"] = draw_lens(tables["logit_lens"])
    caption = experiment.trials.caption
    for name, table in tables.items():
        write_aside(run.out / f"{name}.csv", table.assign(data=caption).to_csv(index=False))
        save_figure(figures[name], run.out / f"{name}.png", f"{caption}; {config.init_from}")
        run.print(f"{name}.csv and {name}.png in {run.out}")


def trajectory(experiment, tokens_by_step):
    """Return rows (step, trial, token) that locate the neural tokens of the probe trials.

    nearest: the five nearest tokens by cleaned cosine; entropy of their softmax (at most 1.61
    nats); distance: 1 - cosine to the word's own embedding; others: its mean over all other names;
    pc1, pc2: coordinates on the first axes of the token embedding.
    """
    space, text, words = experiment.space, experiment.text, experiment.trials.words
    vocabulary = space.clean(space.wte)
    names = experiment.points(words)
    parts = []
    for step, probes in tokens_by_step.items():
        for trial, tokens in zip(telepath.probes(experiment), probes):
            word = experiment.trials.word[trial]
            distance = 1 - space.clean(tokens) @ names.T  # (P, K)
            near = (space.clean(tokens) @ vocabulary.T).topk(5)
            p = (near.values / 0.1).softmax(-1)
            pcs = (tokens - space.mean) @ space.axes
            nearest = []  # joined by |, with special characters escaped
            for row in near.indices.tolist():
                nearest.append("|".join(repr(text.tokenizer.decode([i]))[1:-1] for i in row))
            part = {"step": step, "trial": trial, "token": range(len(tokens))}
            part |= {"word": words[word], "nearest": nearest}
            part |= {"entropy": -(p * p.log()).sum(-1), "distance": distance[:, word]}
            part["others"] = (distance.sum(1) - distance[:, word]) / max(1, len(names) - 1)
            parts.append(pd.DataFrame({**part, "pc1": pcs[:, 0], "pc2": pcs[:, 1]}))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def neural_states(run, experiment, ids):
    """Return the input of every layer in the neural stream: n_layer tensors (N, P, C)."""
    idx = torch.tensor([experiment.text.prompt], device=run.device)
    layers = []
    for _, n in telepath.neural_tokens(run, experiment, ids):
        states = []
        with run.autocast():
            experiment.model.trunk(n, idx.expand(len(n), -1), states=states)
        layers.append([neural[:, 1:].float() for neural, _ in states])
    return list(map(torch.cat, zip(*layers)))


def shuffled_words(config, experiment, ids):
    """Return the trials' words (N,) as indices of training words, and NULLS shuffles of them."""
    table = experiment.trials.table.iloc[ids]
    word = np.searchsorted(experiment.train_words, table.word)
    return word, word[telepath.shuffles(telepath.strata(table), NULLS, config.seed)]


@torch.no_grad()
def query_key(run, config, experiment, ids):
    """Test whether neural queries resemble the key of the word that was seen.

    Rows (layer, head, key): cosine of the mean neural query with the key of the trial's word, minus
    the mean over all other names. The null shuffles words; p_corrected compares with the largest
    |z| of all rows. The key is that of the name read after the prompt ('context') or of its token
    embedding alone ('embedding'). Neural tokens precede text, so they cannot attend to these keys.
    """
    model, text, words = experiment.model, experiment.text, experiment.train_words
    states = neural_states(run, experiment, ids)
    word, shuffled = shuffled_words(config, experiment, ids)
    in_context = name_states(run, model.lm, text, words)
    no_context = mean_embeddings(model.lm, text, words)
    rows, nulls = [], []
    for i, block in enumerate(model.lm.transformer.h[:-1]):  # nothing reads the last one's queries
        attention = block.attn
        if model.experts is not None and i >= model.first:
            attention = model.experts[i - model.first].attn
        q = attention.qkv(block.ln_1(states[i]))[0].mean(2)  # (N, H, hd), over neural tokens
        for kind, h in (("context", in_context[i]), ("embedding", no_context)):
            k = block.attn.qkv(block.ln_1(h)[:, None])[1][:, :, 0]  # (K, H, hd)
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            cosines = torch.einsum("nhd,khd->hnk", q, k).double().cpu().numpy()
            for head, cosine in enumerate(cosines):
                others = (cosine.sum(1, keepdims=True) - cosine) / max(1, len(words) - 1)
                row, null = against_shuffled(cosine - others, word, shuffled)
                rows.append({"layer": i, "head": head, "key": kind, **row})
                nulls.append(null)
    table = pd.DataFrame(rows)
    largest = np.abs(nulls).max(0)
    reached = (largest >= table.z.abs().to_numpy()[:, None]).sum(1)
    return table.assign(p_corrected=(1 + reached) / (1 + NULLS))


def name_states(run, lm, text, words):
    """Return the state (K, C) of each name's last token, after the prompt, at every layer."""
    rows = [torch.tensor(text.prompt + text.ids[word]) for word in words]
    idx = pad_sequence(rows, batch_first=True).to(run.device)
    hidden = lm(idx, hidden=range(lm.config.n_layer)).hidden
    last = [len(row) - 1 for row in rows]
    return [hidden[i][range(len(rows)), last] for i in range(lm.config.n_layer)]


def mean_embeddings(lm, text, words):
    """Return each name's mean token embedding: (K, C)."""
    wte = lm.transformer.wte.weight
    return torch.stack([wte[text.ids[word]].mean(0) for word in words])


def against_shuffled(values, word, shuffled):
    """Compare values (N, K) of the trials' words with shuffled words: a row, and the null's z."""
    each = np.arange(len(values))
    mean = values[each, word].mean()
    null = values[each, shuffled].mean(1)
    low, high = np.quantile(null, [0.025, 0.975])
    z = (mean - null.mean()) / (null.std() + 1e-12)
    nulls = (null - null.mean()) / (null.std() + 1e-12)
    p = (1 + (np.abs(nulls) >= abs(z)).sum()) / (1 + len(null))
    row = {"score": mean, "null": null.mean(), "null_low": low, "null_high": high}
    return {**row, "z": z, "p": p, "n": len(values)}, nulls


@torch.no_grad()
def logit_lens(run, config, experiment, ids):
    """Read the neural tokens at every layer through the head.

    Rows (layer, token): place (0 best, 0.5 chance) of the seen word's tokens among those of all
    training words, by mean logit, with its interval over objects. The null shuffles words.
    """
    lm = experiment.model.lm
    names = mean_embeddings(lm, experiment.text, experiment.train_words)
    word, shuffled = shuffled_words(config, experiment, ids)
    objects = experiment.trials.table.object.iloc[ids]
    rows = []
    for layer, n in enumerate(neural_states(run, experiment, ids)):
        logits = F.linear(lm.transformer.ln_f(n), names).double().cpu().numpy()  # (N, P, K)
        logits = (logits - logits.mean(0)).round(5)  # keep only what differs between trials
        for token in range(logits.shape[1]):
            places = place(logits[:, token])
            row, _ = against_shuffled(places, word, shuffled)
            row |= measured(places[np.arange(len(word)), word], row["null"], objects, config)
            rows.append({"layer": layer, "token": token, **row})
    return pd.DataFrame(rows)


def draw_way(table, space):
    """Plot the first neural token on the embedding's first two axes, and its distance."""
    table = table[table.token == 0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.6), layout="constrained")
    cloud = ((space.wte - space.mean) @ space.axes).numpy()[:: max(1, len(space.wte) // 3000)]
    left.scatter(*cloud.T, s=2, c="0.8", lw=0, rasterized=True)
    for word, part in table.groupby("word"):
        line = left.plot(part.pc1, part.pc2, "-o", ms=2.5)[0]
        left.annotate(word, part[["pc1", "pc2"]].iloc[-1], color=line.get_color())
        nearest = part.nearest.iloc[-1].split("|")[0].strip()
        right.plot(part.step, part.distance, "-o", ms=3, label=f"{word}: {nearest}")
    right.plot(table.groupby("step").others.mean(), c="k", ls=":", label="all other names, mean")
    left.set(xlabel="first axis of the token embedding", ylabel="second axis")
    right.set(xlabel="step", ylabel="1 − cosine to the seen word's embedding")
    right.legend(fontsize=8, frameon=False, title="word: nearest token")
    return figure


def draw_query_key(table):
    """Plot the similarity of neural queries and keys by layer and head; * is corrected p < .05."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    limit = max(4, table.z.abs().max())
    for axis, kind in zip(axes, ("context", "embedding")):
        part = table[table.key == kind]
        grid = part.pivot(index="layer", columns="head", values="z")
        image = axis.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for row in part.itertuples():
            star = "*" * (row.p_corrected < 0.05)
            axis.text(row.head, row.layer, f"{row.score:+.2f}{star}", ha="center", va="center")
        axis.set(xlabel="head", ylabel="layer", title=f"key: {kind} (* corrected p < .05)")
        axis.set(xticks=grid.columns, yticks=grid.index)
    figure.colorbar(image, ax=axes, label="z against shuffled words")
    return figure


def draw_lens(table):
    """Plot the place of the seen word among all, read from each layer."""
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for layer, part in table.groupby("layer"):
        axis.plot(part.token, part.score, "-o", ms=4, label=f"before layer {layer}")
    null = table.groupby("token").agg({"null_low": "min", "null_high": "max"})
    axis.fill_between(null.index, null.null_low, null.null_high, color="0.85", label="shuffled")
    axis.invert_yaxis()
    axis.set(xlabel="neural token, in order of time", ylabel="place of the seen word (0 best)")
    axis.legend(fontsize=8, frameon=False)
    return figure


QUESTIONS = {
    "window": (window_jobs, window_rows, draw_window),
    "frozen": (frozen_jobs, frozen_rows, draw_frozen),
    "generalise": (generalise_jobs, generalise_rows, draw_generalise),
    "architecture": (architecture_jobs, architecture_rows, draw_architecture),
}


def content_of(config):
    """Hash the weights and recordings that the options name."""
    paths = [config.lm, f"{config.dataset}/meta.yaml"]
    for name in read_set(config.dataset)["recordings"]:
        paths.append(f"{config.dataset}/{name}")
    kind, _, path = config.encoder.partition(":")
    if kind == "pretrained":
        paths.append(telepath.checkpoint_path(path))
    return hash_options({"content": list(map(path_state, paths))})[:6]


def main(config):
    config.out_dir = config.out_dir or f"out/telepath_{config.analysis}"
    run = Run(config)
    config.dataset = str(run.dataset(config.dataset))
    if config.analysis == "tokens":
        analyse_tokens(run, config)
        return run.close()
    run.content = content_of(config)
    make_jobs, work, draw = QUESTIONS[config.analysis]
    saved_rows = run.rows()
    for job in run.share(make_jobs(run, config)):  # one model per job
        same = saved_rows.reindex(columns=list(job)) == pd.Series(job)
        if same.all(axis=1).any():
            continue
        run.print(job)
        rows = work(run, config, job)  # a job that was interrupted left no rows and runs again
        for row in rows:
            run.result(**{**job, **row})
    table = run.merge()
    if run.master and len(table):
        title = f"analysis={config.analysis}, {config.max_iters} steps each; {table.data.iloc[0]}"
        path = run.out / f"{config.analysis}.png"
        save_figure(draw(table), path, f"{title} (95 % over objects)")
    run.close()


if __name__ == "__main__":
    main(configure(Config))
