"""Words out of EEG: a frozen GPT reads neural tokens before its text, through experts of its own layers, and says what was seen.

    python telepath.py batch_size=16                                  # embedded, after python train.py: minutes on two cores, synthetic EEG
    python telepath.py dataset=synthetic_eeg/null out_dir=out/null    # the null (python data/synthetic_eeg/prepare.py gain=0 out_dir=...): chance
    python telepath.py stage=dpo init_from=out/telepath               # preferences after the supervised stage
    python telepath.py analysis=window                                # or frozen, generalise, architecture: the four questions, as tables and figures
    torchrun --standalone --nproc_per_node=4 telepath.py config/telepath_things_eeg2.yaml
    python telepath.py init_from=resume                               # go on after a stop, bit for bit

Four evaluation sets, by who and what was seen in training: trial (same people, same words, other pictures), subject, object, subject_object. Each
score stands beside chance, the majority word, shuffled EEG and an empty prefix, with an interval over objects. Text is decoded freely and ranked in
a closed set, by log p(word | EEG) - log p(word | no EEG): pointwise mutual information takes what the language model likes anyhow out of it.

Wang et al. 2023 (CogVLM); Rafailov et al. 2023 (DPO); Guggenmos et al. 2018 (multivariate noise normalisation); Grootswagers et al. 2022, Gifford et
al. 2022 (THINGS-EEG1, 2); nostalgebraist 2020 (logit lens); Kilgallen et al. 2025, Jo et al. 2024 (what goes wrong: repeats, missing noise baselines).
"""
import copy
import functools
import hashlib
import itertools
import json
import math
import re
import time
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mne
import numpy as np
import pandas as pd
import scipy.sparse
import scipy.stats
import sklearn.covariance
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from configurator import Run, aside, configure, key_seed, write_aside
from data.recording import Recording, named_places, places, read_set
from model import EncoderConfig, GPT, GPTConfig, NeuralEncoder, NeuralGPT, Tokenizer, load_checkpoint, load_lm, load_matching

SETS = ("trial", "object", "subject", "subject_object")


@dataclass
class Config:
    # ---- data
    dataset: str = "synthetic_eeg"                 # name under data/, or a folder of recordings whose events have a word
    lm: str = "out/train"                          # run folder or checkpoint of ours, or a Hugging Face GPT-2
    t_start: float = 0.0                           # s from the picture's onset: the window
    t_end: float = 0.6                             # s
    widen: float = 0.0                             # s more on both sides of the window
    baseline: float = 0.1                          # s before onset whose mean is taken off; 0: none
    whiten: bool = True                            # multivariate noise normalisation, from training trials only
    clamp: float = 8.0                             # SD beyond which whitened samples are cut
    bad_channels: Literal["refuse", "drop"] = "refuse"  # flat channels, or with nan, that nobody marked bad
    # ---- splits
    held_out_subjects: float = 0.25                # share of subjects never trained on (one at least, where there are two)
    held_out_objects: float = 0.17                 # share of words never trained on
    held_out_trials: float = 0.17                  # share of pictures and their blocks for the evaluation sets, and as many for validation
    split_seed: int = 0                            # draws them
    # ---- augmentation, of training trials before whitening
    synonyms: bool = False                         # a trial's text is its word or one of its synonyms, equally often
    augment: dict = field(default_factory=lambda: dict(pink=0.0, line=0.0, blink=0.0, muscle=0.0, drift=0.0, pop=0.0, drop=0.0, reference=0.0,
                                                       gain=0.0))  # share of trials that get it: augment.pink=0.3
    strength: float = 1.0                          # of all of them
    line_hz: float = 50.0                          # of the mains
    jitter: float = 0.01                           # s, the window's onset is moved by up to so much
    empty: float = 0.1                             # share of training trials whose EEG is silence, so that "no EEG" is a known prefix
    num_workers: int = 2                           # threads that make batches ahead; any number gives the same ones
    # ---- encoder
    encoder: str = "transformer"                   # linear, transformer, conv, tsconv; pretrained:PATH, shape and weights of a run of foundation.py or ours
    checkpoint: str = ""                           # PATH, for encoder=pretrained alone
    match: float = 0.5                             # share of its weights that must fit
    tokens: Literal["time", "electrode"] = "time"  # transformer: a token is a patch of all electrodes, or of one
    patch: int = 10                                # samples per neural token
    whole: bool = True                             # one more token, the first, reads the whole window at once
    width: int = 128                               # of the encoder
    encoder_layers: int = 2                        # blocks, or convolutions
    virtual: int = 32                              # channels the electrodes are mixed into
    dropout: float = 0.2                           # in the encoder
    # ---- fusion with the language model
    fusion: Literal["prefix", "expert", "cross"] = "expert"  # core weights for the prefix, experts, or gated cross-attention
    expert_layers: int = 0                         # the last k layers have experts; 0: all
    text_positions: Literal["zero", "after_prefix"] = "zero"  # text keeps GPT-2's own positions, or they run over prefix and text
    prefix_attention: Literal["causal", "full"] = "causal"  # among neural tokens
    train: Literal["encoder", "encoder+expert", "all", "lm_last_k"] = "encoder+expert"  # what learns; expert: cross-attention, too
    k: int = 1                                     # lm_last_k: blocks of the language model
    prompt: str = "<|endoftext|>The"               # text before the word; <|endoftext|> is the token
    stop: str = "<|endoftext|>"                    # text that ends a word, one token
    # ---- objective and optimiser
    stage: Literal["sft", "dpo"] = "sft"           # supervised, or preferences (init_from= a supervised run)
    align: float = 0.5                             # weight of an auxiliary loss: the first neural token near its word's embedding; 0: none
    temperature: float = 0.1                       # of that loss, over the training words
    beta: float = 0.1                              # dpo: weight of the reference
    dpo_nll: float = 0.0                           # dpo: weight of the preferred word's own loss
    dpo_smoothing: float = 0.0                     # dpo: share of preferences that may be wrong
    dpo_quantile: float = 0.5                      # dpo: negatives are less similar to the word than so many of the others
    dpo_tau: float = 0.2                           # dpo: they are drawn with probability exp(-similarity / tau)
    batch_size: int = 16                           # trials per micro-batch
    trials_per_step: int = 0                       # per optimiser step over all ranks, 0: one micro-batch per rank; accumulation is derived
    learning_rate: float = 1e-3                    # AdamW's peak, of the encoder
    expert_lr: float = 3e-4                        # of experts and cross-attention
    core_lr: float = 3e-5                          # of the language model, where it learns
    weight_decay: float = 0.05                     # on matrices
    grad_clip: float = 1.0                         # total norm; 0: none
    max_iters: int = 1500                          # optimiser steps
    warmup_iters: int = 50                         # linear warm-up, then cosine to 0
    # ---- evaluation
    eval_interval: int = 250                       # steps between validations
    eval_trials: int = 400                         # trials of each set that are scored; 0: all
    shuffles: int = 1000                           # permutations of trials under the null, and bootstraps over objects
    max_new_tokens: int = 6                        # of a generated word
    probes: int = 6                                # validation trials whose prefix is followed through token space
    # ---- analysis
    analysis: Literal["none", "window", "frozen", "generalise", "architecture"] = "none"  # instead of the one run: a table and a figure
    analysis_iters: int = 400                      # optimiser steps of each of its models
    # ---- run
    out_dir: str = ""                              # "": out/telepath, with _dpo or _ANALYSIS
    init_from: str = "scratch"                     # scratch, resume, or the run folder of an earlier stage on the same split: its model's shape, too
    overwrite: bool = False                        # start over in a folder that holds a run
    seed: int = 1337                               # fixes everything
    device: str = "auto"                           # cuda, mps, cpu
    dtype: str = "auto"                            # bfloat16 where the hardware has it; float16, float32
    compile: bool = False                          # compile the language model's blocks
    deterministic: bool = False                    # bit-for-bit repeats on CUDA too, slower
    log_interval: int = 50                         # steps between lines
    save_interval: int = 250                       # steps between checkpoints
    wandb_log: bool = False                        # log to Weights & Biases
    wandb_project: str = "nanocortex"              # its project

    POSITIVE = ("line_hz clamp patch width encoder_layers virtual k temperature dpo_tau batch_size log_interval save_interval eval_interval shuffles "
                "max_new_tokens probes analysis_iters")
    SHARES = "held_out_subjects held_out_objects held_out_trials empty match dropout dpo_smoothing dpo_quantile"
    SIGNED = "t_start t_end"

    def check(self):
        if self.t_end + self.widen <= self.t_start - self.widen:
            raise ValueError(f"the window t_start={self.t_start} to t_end={self.t_end} is empty")
        if unknown := set(self.augment) - set(AUGMENT):
            raise ValueError(f"augment.{sorted(unknown)[0]}: there are {', '.join(AUGMENT)}")
        for key, share in self.augment.items():
            if not (isinstance(share, (int, float)) and 0 <= share <= 1):
                raise ValueError(f"option 'augment.{key}' is a share from 0 to 1, not {share!r}")
        if self.encoder.partition(":")[0] not in ("linear", "transformer", "conv", "tsconv", "pretrained"):
            raise ValueError(f"option 'encoder' must be linear or transformer or conv or tsconv or pretrained:PATH, not '{self.encoder}'")
        if self.encoder == "transformer" and self.width % max(1, self.width // 32):
            raise ValueError(f"width={self.width} is not divided by its {self.width // 32} heads: take a multiple of 32")
        if self.encoder.startswith("pretrained") and not self.pretrained():
            raise ValueError("encoder=pretrained wants checkpoint= the run folder or .pt of a trained encoder: encoder=pretrained:out/foundation")
        if self.stage == "dpo" and self.init_from == "scratch":
            raise ValueError("stage=dpo goes on from a supervised run: give init_from=out/telepath")
        if self.expert_layers and self.fusion == "prefix":
            raise ValueError("expert_layers goes with fusion=expert or cross, prefix has none")
        if self.tokens == "electrode" and self.encoder != "transformer":
            raise ValueError("tokens=electrode goes with encoder=transformer")
        if self.fusion == "cross" and (self.text_positions, self.prefix_attention) != ("zero", "causal"):
            raise ValueError("text_positions and prefix_attention go with fusion=prefix or expert: cross puts nothing before the text")
        if self.fusion == "cross" and self.train == "encoder":
            raise ValueError("fusion=cross with train=encoder never reads EEG, its gates are shut at first: take train=encoder+expert")
        if self.analysis != "none" and (self.stage != "sft" or self.init_from not in ("scratch", "resume")):
            raise ValueError(f"analysis={self.analysis} trains models of its own: leave out stage= and init_from=")
        if self.analysis not in ("none", "window") and not self.held_out_objects:
            raise ValueError(f"analysis={self.analysis} asks about words never trained on: give held_out_objects= more than 0")

    def pretrained(self):
        """The checkpoint of a pretrained encoder (Path), None where there is none to be."""
        kind, _, path = self.encoder.partition(":")
        path = Path(path or self.checkpoint) if kind == "pretrained" and (path or self.checkpoint) else None
        return path if path is None or path.suffix == ".pt" else path / "best.pt"


# ---- data: trials

class Trials:
    """Windows of EEG around pictures that have a name, cut from continuous recordings when asked for.

    table: a row a trial (recording, subject, at: its row of the signal, object, word, synonyms, image, block); subjects, words: names in order.
    Everything in V until `batch` whitens. Raises ValueError, in a sentence, for EEG that cannot be used."""

    def __init__(self, folder, config):
        self.config, self.meta = config, read_set(folder)
        self.source = Path(folder).name
        self.data = self.source + ", synthetic" * self.meta["synthetic"]
        self.recordings = [Recording(Path(folder) / name) for name in self.meta["recordings"]]
        self.sfreq = self.recordings[0].sfreq
        first, last = config.t_start - config.widen, config.t_end + config.widen
        self.offsets = np.arange(round(first * self.sfreq), round(last * self.sfreq))  # samples of the window
        self.before = np.arange(-round(config.baseline * self.sfreq), 0)
        if not len(self.offsets):
            raise ValueError(f"the window {first} to {last} s has no sample at {self.sfreq:g} Hz: widen it")
        read, spare, parts, self.outside = np.concatenate([self.before, self.offsets]), round(config.jitter * self.sfreq), [], 0
        lowest, highest = self.reach = read.min() - spare, read.max() + spare  # samples around `at` that a trial may read
        self.matched = self.match_channels(load_checkpoint(config.pretrained())) if config.pretrained() else ""
        for r, rec in enumerate(self.recordings):
            if rec.sfreq != self.sfreq:
                raise ValueError(f"{rec.path} has {rec.sfreq} Hz, {self.recordings[0].path} {self.sfreq}: prepare all with one sfreq=")
            self._check_channels(rec)
            events = rec.events.assign(recording=r, subject=rec.subject, at=rec.rows(rec.events["onset"]))
            if "word" not in events:
                raise ValueError(f"{rec.path / 'events.csv'} has no column 'word': prepare it with word_column= the column of names")
            events["word"] = events["word"].fillna("").astype(str).str.strip()
            if "target" in events:
                events = events[~events["target"].isin([1, "1", True, "True"])]
            events = events[events["word"] != ""]
            if not len(events):
                raise ValueError(f"{rec.path / 'events.csv'}: subject {rec.subject} has no events with a word; leave the recording out of meta.yaml")
            if epoch := rec.meta.get("epoch_samples"):  # somebody's epochs, one after the other
                begin = round(rec.meta["epoch_tmin"] * rec.sfreq)
                if lowest < begin or highest >= begin + epoch:
                    raise ValueError(f"{rec.path} holds epochs of {begin / rec.sfreq} to {(begin + epoch) / rec.sfreq} s, the window with its baseline and "
                                     f"jitter takes {lowest / rec.sfreq} to {(highest + 1) / rec.sfreq}: change t_start, t_end, widen, baseline or jitter")
            inside = (events["at"] + lowest >= 0) & (events["at"] + highest < len(rec.signal))
            if not inside.any():
                raise ValueError(f"{rec.path}: the window {first} to {last} s lies outside the recording for each of its {len(events)} events: "
                                 "change t_start, t_end or widen")
            self.outside += int((~inside).sum())
            parts.append(events[inside])
        table = pd.concat(parts, ignore_index=True)
        for column, default in (("object", table["word"]), ("synonyms", ""), ("image", [f"{r} {a}" for r, a in zip(table.recording, table["at"])])):
            table[column] = table[column].fillna("").astype(str) if column in table else default
        named = table["block"].fillna("").astype(str) if "block" in table else pd.Series("", table.index)
        table["block"] = named.where(named != "", "minute " + (table["at"] // round(60 * self.sfreq)).astype(str))
        self.table = table[["recording", "subject", "at", "object", "word", "synonyms", "image", "block"]]
        self.subjects, self.words = sorted(set(table["subject"])), sorted(set(table["word"]))
        self.word = table["word"].map({w: i for i, w in enumerate(self.words)}).to_numpy()
        self.subject = table["subject"].map({s: i for i, s in enumerate(self.subjects)}).to_numpy()  # `strangers` makes held-out ones -1
        self.recording, self.at = table["recording"].to_numpy(), table["at"].to_numpy()
        self.C = max(len(rec.names) for rec in self.recordings)
        self.xyz = np.full((len(self.recordings), self.C, 3), np.nan, np.float32)  # nan: absent
        for r, rec in enumerate(self.recordings):
            self.xyz[r, :len(rec.names)] = np.where(rec.good[:, None], rec.xyz, np.nan)
        self.white = np.stack([np.eye(self.C, dtype=np.float32)] * len(self.recordings))
        self.scale = np.ones((len(self.recordings), self.C), np.float32)

    def strangers(self, held_out):
        """Training subjects are numbers from 0 on, held-out ones -1."""
        self.subjects = [s for s in self.subjects if s not in held_out]
        self.subject = self.table["subject"].map({s: i for i, s in enumerate(self.subjects)}).fillna(-1).astype(int).to_numpy()

    def match_channels(self, state):
        """Give channels that have no place the one that pretraining knows by their name. Says how they were matched; "" for a checkpoint that knows none."""
        if "recording" not in state:
            return ""
        recipe, counts = state["recording"], []
        for rec in self.recordings:
            rec.xyz, count = named_places(rec.names, places(rec.names, rec.xyz, np.ones(len(rec.names), bool), recipe["grid"]), recipe)
            counts.append(count)
        last = counts[0]
        if recipe["bands"]:
            raise ValueError(f"{self.config.encoder}: it was pretrained on {len(recipe['bands'])} bands side by side, and windows here are the signal: give "
                             "one of bands=[]")
        return (f"channels of {self.recordings[0].subject}: {last['name']} known by name, {last['position']} by position only, {last['absent']} without a place"
                + (f"; the same of all {len(counts)} recordings" if all(c == last for c in counts) else "; other recordings differ")
                + (f"; it was pretrained at {recipe['sfreq']:g} Hz, these are {self.sfreq:g} Hz: its filters see other frequencies"
                   if recipe["sfreq"] != self.sfreq else ""))

    def _check_channels(self, rec):
        if rec.good.any() and (missing := [n for n, p, g in zip(rec.names, rec.xyz, rec.good) if g and not np.isfinite(p).all()]):
            raise ValueError(f"{rec.path / 'channels.csv'}: channel {missing[0]} ({len(missing)} of {len(rec.names)}) has no position x, y, z in m: "
                             "prepare it with montage=standard_1005, or mark it bad")
        low, high, wrong = np.full(len(rec.names), np.inf), np.full(len(rec.names), -np.inf), np.zeros(len(rec.names), bool)
        for a in range(0, len(rec.signal), 200_000):
            part = np.asarray(rec.signal[a:a + 200_000])
            wrong |= ~np.isfinite(part).all(0)
            low, high = np.minimum(low, part.min(0)), np.maximum(high, part.max(0))
        for bad, what in ((wrong, "holds nan"), (~wrong & (low == high), "is flat")):
            names = [n for n, b, g in zip(rec.names, bad, rec.good) if b and g]
            if names and self.config.bad_channels == "refuse":
                raise ValueError(f"{rec.path}: channel {names[0]} {what} (of {len(names)} such): mark it bad in channels.csv, or set bad_channels=drop")
            rec.good = rec.good & ~bad
        if not rec.good.any():
            raise ValueError(f"{rec.path} has no good channel")

    def cut(self, ids, shift=0):
        """Windows (B, C, T) in V less their baseline, 0 where a channel is absent; shift (B,): samples that each window is late."""
        x = np.zeros((len(ids), self.C, len(self.offsets)), np.float32)
        at = self.at[ids] + shift
        for r in np.unique(self.recording[ids]):
            rec, rows = self.recordings[r], np.flatnonzero(self.recording[ids] == r)
            part = rec.signal[at[rows, None] + self.offsets]  # (b, T, c)
            if len(self.before):
                part = part - rec.signal[at[rows, None] + self.before].mean(1, keepdims=True)
            x[rows, :len(rec.names)] = np.where(rec.good[:, None], part.transpose(0, 2, 1), 0)
        return x

    def finish(self, x, xyz, ids):
        """Whiten and clamp windows in V: what the encoder is given. Tensors x (B, C, T), xyz (B, C, 3), subject (B,)."""
        x = np.clip(self.white[self.recording[ids]] @ x, -self.config.clamp, self.config.clamp)
        return torch.from_numpy(x), torch.from_numpy(xyz), torch.from_numpy(self.subject[ids])

    def batch(self, ids):
        """The windows of trials, without augmentation, as tensors."""
        return self.finish(self.cut(ids), self.xyz[self.recording[ids]], ids)

    def learn(self, train):
        """Noise normalisation and channel scales from the trials `train`; recordings with less than two of them take the mean of the others', by name."""
        named, scale, rng = {}, {}, np.random.default_rng(0)
        for r, rec in enumerate(self.recordings):
            ids = train[self.recording[train] == r]
            if len(ids) > 1:
                x = self.cut(np.sort(rng.permutation(ids)[:600]))[:, :len(rec.names)][:, rec.good]  # (n, c, T)
                scale[r] = np.maximum(1.4826 * np.median(np.abs(x), axis=(0, 2)), 1e-9)
                x = (x - x.mean(0)).transpose(0, 2, 1).reshape(-1, x.shape[1]).astype(float) * 1e6  # µV; the evoked mean is no noise
                x /= np.maximum(1, np.abs(x).max(1, keepdims=True) / (10 * np.median(np.abs(x)) * 1.4826))  # a blink must not own the covariance
                named[r] = pd.DataFrame(sklearn.covariance.ledoit_wolf(x[::2])[0], *[np.array(rec.names)[rec.good]] * 2)
        if not named:
            raise ValueError(f"{self.source}: no recording has two training trials to learn its noise from")
        stacked = pd.concat(named.values())
        mean = stacked.groupby(level=0, sort=False).mean()
        mean = mean[mean.index].fillna(0.0)  # of all training recordings
        for r, rec in enumerate(self.recordings):
            cov, good = named.get(r), np.flatnonzero(rec.good)
            if cov is None:
                names = np.array(rec.names)[good]
                cov = mean.reindex(index=names, columns=names).fillna(0.0)
                cov = cov + np.diag(np.where(np.isin(names, mean.index), 0.0, np.diag(mean).mean()))
                scale[r] = 1e-6 * np.sqrt(np.diag(cov))
            self.scale[r] = np.median(scale[r])  # of absent channels, too
            self.scale[r, good] = scale[r]
            w, v = np.linalg.eigh(cov.to_numpy())
            self.white[r][:] = 0
            root = (v / np.sqrt(np.maximum(w, 1e-2 * np.median(w)))) @ v.T if self.config.whiten else np.eye(len(good)) / np.sqrt(np.diag(cov).mean())
            self.white[r][np.ix_(good, good)] = 1e6 * root  # V to SD of the noise


# ---- data: splits

def split(trials, config):
    """{set: sorted trial numbers} with train, val and the four evaluation sets, and the manifest that says so.

    Words are held out whole, with all objects of that name; people likewise. Pictures and the blocks they are shown in go to training, validation or
    evaluation together, so no repeat of a picture and no stretch of EEG is on both sides; training and validation trials whose window (baseline and
    jitter included) overlaps one of the other side are left out, as are trials of held-out words in training blocks, and validation and
    evaluation trials of words or people that count as seen and have no trial in training."""
    table, rng = trials.table, np.random.default_rng(key_seed(config.split_seed, "split"))

    def hold(names, share, least):
        n = max(least, round(share * len(names))) if share and len(names) > 1 else 0
        return set(rng.permutation(sorted(names))[:min(n, len(names) - 1)])

    words, subjects = hold(set(table.word), config.held_out_objects, 1), hold(set(table.subject), config.held_out_subjects, 1)
    blocks = (table.recording.astype(str) + "/" + table.block).factorize()[0]
    images = table.image.factorize()[0]
    graph = scipy.sparse.coo_matrix((np.ones(len(table)), (blocks, images + blocks.max() + 1)), shape=[blocks.max() + images.max() + 2] * 2)
    n, group = scipy.sparse.csgraph.connected_components(graph, directed=False)

    def part(codes):  # 0 train, 1 val, 2 evaluation
        order = rng.permutation(codes.max() + 1)
        held = max(1, round(config.held_out_trials * len(order)))
        return np.select([np.isin(codes, order[:held]), np.isin(codes, order[held:2 * held])], [2, 1], 0)

    if n >= 6:  # pictures and blocks fall into groups that share nothing
        where = part(group[blocks])
    else:       # they do not: a trial counts where its picture and its block were dealt to the same part
        if blocks.max() < 5 or images.max() < 5:
            raise ValueError(f"{trials.source} has {blocks.max() + 1} blocks and {images.max() + 1} pictures: 6 of each are needed to split it")
        by_block, by_image = part(blocks), part(images)
        where = np.where(by_block == by_image, by_block, -1)
    seen_word, seen_subject = ~table.word.isin(words).to_numpy(), ~table.subject.isin(subjects).to_numpy()
    sets = dict(train=(where == 0) & seen_word & seen_subject, val=(where == 1) & seen_word & seen_subject)
    for name, w, s in (("trial", True, True), ("object", False, True), ("subject", True, False), ("subject_object", False, False)):
        sets[name] = (where == 2) & (seen_word == w) & (seen_subject == s)
    purged, length = 0, trials.reach[1] - trials.reach[0]
    for mine, others in (("val", SETS), ("train", SETS + ("val",))):
        theirs = np.any([sets[o] for o in others], 0)
        for r in range(len(trials.recordings)):
            here = trials.recording == r
            a, b = np.flatnonzero(sets[mine] & here), np.sort(trials.at[theirs & here])
            if len(a) and len(b):
                i = np.searchsorted(b, trials.at[a])
                near = np.minimum(np.abs(trials.at[a] - b[np.maximum(i - 1, 0)]), np.abs(trials.at[a] - b[np.minimum(i, len(b) - 1)]))
                sets[mine][a[near <= length]] = False
                purged += int((near <= length).sum())
    for column, names in (("word", ("val", "trial", "subject")), ("subject", ("val", "trial", "object"))):  # what counts as seen was in training
        seen = table[column].isin(table[column][sets["train"]]).to_numpy()
        for name in names:
            sets[name] &= seen
    found = {name: np.flatnonzero(mask) for name, mask in sets.items()}
    if empty := [name for name in ("train", "val") if not len(found[name])] or ["evaluation"] * (not any(len(found[name]) for name in SETS)):
        one_picture = table.groupby("word").image.nunique().max() == 1
        raise ValueError(f"{trials.source}: the split leaves no trial in '{empty[0]}': " + (
            "every word has one picture, whose repeats stay together: tell pictures apart when preparing it (image_column= of data/bids_eeg)" if one_picture
            else "change held_out_trials, held_out_objects or held_out_subjects"))
    manifest = dict(dataset=trials.source, held_out_words=sorted(words), held_out_subjects=sorted(subjects), purged=purged, outside=trials.outside,
                    sets={name: [f"{trials.recordings[r].path.name}:{a}" for r, a in zip(trials.recording[ids], trials.at[ids])] for name, ids in
                          found.items()})
    manifest["hash"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    return found, manifest


# ---- data: augmentation. Each takes windows x (b, C, T) in V, rng, scale (b, C) robust SD in V, xyz (b, C, 3) with nan for absent, sfreq, strength

def smooth_topography(rng, xyz):
    """Weights (b, C), smooth over the head, of unit RMS: a random plane and its bend."""
    at = np.nan_to_num(xyz) / 0.1
    w = np.einsum("bcf,bf->bc", np.concatenate([np.ones_like(at[..., :1]), at, at[..., :2] ** 2], -1), rng.normal(size=(len(xyz), 6)))
    return w / np.sqrt(np.square(w).mean(1, keepdims=True) + 1e-12)


def pink(x, rng, scale, xyz, sfreq, strength, alpha=1.0):
    """Background: power 1 / f^alpha, shared by neighbours (5 cm)."""
    f = np.fft.rfftfreq(2 * x.shape[2], 1 / sfreq)  # twice as long, so that the ends are not tied together
    shape = (len(x), x.shape[1], len(f))
    spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) * np.where(f > 0, np.maximum(f, f[1]) ** (-alpha / 2), 0)
    at = np.nan_to_num(xyz, nan=9.0)
    kernel = np.exp(-np.square(at[:, :, None] - at[:, None]).sum(-1) / (2 * 0.05 ** 2))  # (b, C, C)
    noise = kernel @ np.fft.irfft(spectrum)[..., :x.shape[2]]
    return x + strength * scale[..., None] * noise / (noise.std(2, keepdims=True) + 1e-12)


def line(x, rng, scale, xyz, sfreq, strength, hz=50.0):
    """Mains and two harmonics below the Nyquist frequency, phase drifting."""
    t, gains = np.arange(x.shape[2]) / sfreq, smooth_topography(rng, xyz)
    noise = 0
    for h in (1, 2, 3):
        if h * hz <= sfreq / 2:
            wander = np.cumsum(rng.normal(size=(len(x), len(t))), 1) * 0.02
            noise = noise + np.sin(2 * np.pi * h * hz * t + rng.uniform(0, 2 * np.pi, (len(x), 1)) + wander) / h ** 2
    return x + strength * (scale * gains)[..., None] * np.reshape(noise, (len(x) if np.ndim(noise) else 1, 1, -1))


def blink(x, rng, scale, xyz, sfreq, strength):
    """A blink of a fifth of a second: largest beside the eyes, fading backwards."""
    at, eyes = np.nan_to_num(xyz), np.array([[0.03, 0.1, -0.02], [-0.03, 0.1, -0.02]])
    near = sum(np.exp(-np.square(at - eye).sum(-1) / (2 * 0.05 ** 2)) for eye in eyes)  # (b, C)
    t = np.arange(x.shape[2]) / sfreq
    shape = np.exp(-0.5 * ((t - rng.uniform(0, t[-1] + 1e-9, (len(x), 1))) / rng.uniform(0.05, 0.1, (len(x), 1))) ** 2)
    return x + strength * 10 * np.median(scale, 1)[:, None, None] * near[..., None] * shape[:, None]


def muscle(x, rng, scale, xyz, sfreq, strength):
    """A burst of 20 Hz and more, at the lower edge of the cap above the jaw."""
    at = np.nan_to_num(xyz) / 0.1
    edge = np.exp(-np.square(np.abs(at[..., 0]) - 0.8) / 0.1) * np.exp(-np.maximum(at[..., 2] - 0.3, 0) / 0.3)  # (b, C)
    f = np.fft.rfftfreq(x.shape[2], 1 / sfreq)
    noise = np.fft.irfft(np.fft.rfft(rng.normal(size=x.shape)) * ((f >= 20) & (f <= 100)), n=x.shape[2])
    t = np.arange(x.shape[2]) / x.shape[2]
    burst = np.exp(-0.5 * ((t - rng.uniform(0, 1, (len(x), 1))) / 0.2) ** 2)
    return x + strength * 3 * (scale * edge)[..., None] * noise * burst[:, None]


def drift(x, rng, scale, xyz, sfreq, strength):
    """A slow wandering, a random walk that is smooth over the head."""
    walk = np.cumsum(rng.normal(size=(len(x), x.shape[2])), 1)
    walk /= np.abs(walk).max(1, keepdims=True)
    return x + strength * 3 * (scale * smooth_topography(rng, xyz))[..., None] * walk[:, None]


def pop(x, rng, scale, xyz, sfreq, strength):
    """One electrode jumps and comes back within some 100 ms."""
    x, t = x.copy(), np.arange(x.shape[2]) / sfreq
    for i in range(len(x)):
        c = rng.choice(np.flatnonzero(np.isfinite(xyz[i, :, 0])))
        t0 = rng.uniform(0, t[-1])
        x[i, c] += strength * rng.choice([-10, 10]) * scale[i, c] * (t >= t0) * np.exp(-np.maximum(t - t0, 0) / 0.1)
    return x


def drop(x, rng, scale, xyz, sfreq, strength):
    """A fifth of the electrodes is absent: nan in xyz, which is changed in place."""
    gone = rng.random(xyz.shape[:2]) < 0.2 * strength
    gone &= ~gone.all(1, keepdims=True)
    xyz[gone] = np.nan
    return np.where(gone[..., None], 0, x)


def reference(x, rng, scale, xyz, sfreq, strength):
    """Another reference: part of one electrode's signal is taken from all."""
    chosen = np.array([rng.choice(np.flatnonzero(np.isfinite(p[:, 0]))) for p in xyz])
    return x - strength * rng.uniform(0, 1, (len(x), 1, 1)) * x[np.arange(len(x)), chosen][:, None]


def gain(x, rng, scale, xyz, sfreq, strength):
    """Another amplifier, or a thicker skull: 0.6 to 1.6 times."""
    return x * np.exp(strength * rng.uniform(-0.5, 0.5, (len(x), 1, 1)))


AUGMENT = dict(pink=pink, line=line, blink=blink, muscle=muscle, drift=drift, pop=pop, drop=drop, reference=reference, gain=gain)


def augment(x, xyz, scale, rng, sfreq, config):
    """Windows (B, C, T) in V and places (B, C, 3) after every augmentation of config.augment, each on its share of the trials."""
    xyz = xyz.copy()
    for name, p in config.augment.items():
        rows = np.flatnonzero(rng.random(len(x)) < p)
        if len(rows):
            places, options = xyz[rows], dict(hz=config.line_hz) if name == "line" else {}
            x[rows] = AUGMENT[name](x[rows], rng, scale[rows], places, sfreq, config.strength, **options)
            xyz[rows] = places
    return np.where(np.isfinite(xyz[..., :1]), x, 0).astype(np.float32), xyz


# ---- data: batches

class Loader:
    """Micro-batches of training trials, made ahead by threads. Trial number i of the run (counted over all ranks) is of subject i mod S, whose trials
    come in an order keyed by (seed, epoch); noise, jitter and synonyms are keyed by (step, micro-batch): the same for any ranks and workers."""

    def __init__(self, run, trials, text, ids, config, accum, step=0, rank=0, world=1):
        self.run, self.trials, self.text, self.config, self.accum = run, trials, text, config, accum
        self.by_subject = [ids[trials.subject[ids] == s] for s in np.unique(trials.subject[ids])]
        self.orders, self.ahead, self.waited = {}, deque(), 0.0
        self.plan = ((s, micro) for s in itertools.count(step) for micro in range(rank, accum, world))
        self.threads = ThreadPoolExecutor(config.num_workers) if config.num_workers else None

    def ids(self, step, micro):
        """Trial numbers of a micro-batch."""
        found, S, B = [], len(self.by_subject), self.config.batch_size
        for i in range((step * self.accum + micro) * B, (step * self.accum + micro + 1) * B):
            mine = self.by_subject[i % S]
            epoch, j = divmod(i // S, len(mine))
            if (i % S, epoch) not in self.orders:
                self.orders[i % S, epoch] = np.random.default_rng(key_seed(self.run.seed, "epoch", i % S, epoch)).permutation(len(mine))
            found.append(mine[self.orders[i % S, epoch][j]])
        return np.array(found)

    def make(self, step, micro):
        """One micro-batch: signal, xyz, subject as the encoder takes them; words: the text of each trial; word: (B,) its number."""
        trials, config = self.trials, self.config
        ids, rng = self.ids(step, micro), np.random.default_rng(key_seed(self.run.seed, step, micro, "augment"))
        shift = round(config.jitter * trials.sfreq)
        x, xyz = augment(trials.cut(ids, rng.integers(-shift, shift + 1, len(ids))), trials.xyz[trials.recording[ids]], trials.scale[trials.recording[ids]],
                         rng, trials.sfreq, config)
        if config.stage == "sft":
            x[rng.random(len(ids)) < config.empty] = 0  # no EEG
        words = [(names := self.text.names(i))[rng.integers(len(names))] for i in ids]
        return (*trials.finish(x, xyz, ids), words, torch.from_numpy(trials.word[ids]), ids)

    def next(self):
        """The next micro-batch, tensors on the device; `waited` sums the seconds that the caller had to wait for it."""
        start = time.perf_counter()
        if self.threads is None:
            batch = self.make(*next(self.plan))
        else:
            while len(self.ahead) < 2 * self.config.num_workers:
                self.ahead.append(self.threads.submit(self.make, *next(self.plan)))
            batch = self.ahead.popleft().result()
        self.waited += time.perf_counter() - start
        return tuple(b.to(self.run.device) if torch.is_tensor(b) else b for b in batch)


# ---- text

def spelled(name):
    """A name as it is written: balance_beam → balance beam."""
    return re.sub(r"[\s_]+", " ", name).strip()


class Text:
    """Names as tokens of a language model: prompt + ' name' + stop. Several names share one pass behind one prompt, each in slots of its own.
    names(i): the texts that trial i may be trained on. Raises ValueError for a name without tokens."""

    def __init__(self, tokenizer, trials, held_out, config):
        self.tokenizer, self.trials, self.synonyms = tokenizer, trials, {}
        self.prompt, stop = self.encode(config.prompt), self.encode(config.stop)
        if not self.prompt or len(stop) != 1:
            raise ValueError(f"prompt={config.prompt!r} is {len(self.prompt)} tokens and stop={config.stop!r} {len(stop)}: one or more, and one, are needed")
        self.stop, table = stop[0], trials.table
        for word, names in table.groupby("word").synonyms.unique().items():  # every other right answer
            self.synonyms[word] = [n for n in dict.fromkeys(map(spelled, re.split(r"[|,]", "|".join(names)))) if n and n != word]
        self.ids = {word: self.name(word) for word in trials.words}
        held = [normalise(w) for w in held_out]  # in any spelling or number
        self.trained = {w: [w] + [s for s in self.synonyms[w] if config.synonyms and normalise(s) not in held] for w in trials.words}
        for names in self.trained.values():
            self.ids |= {n: self.name(n) for n in names}

    def encode(self, text):
        parts = text.split("<|endoftext|>")
        if len(parts) > 1 and self.tokenizer.eot is None:
            raise ValueError("the tokenizer of lm= has no <|endoftext|>: give prompt= and stop= without it, a line break say")
        ids = []
        for i, part in enumerate(parts):
            ids += ([self.tokenizer.eot] if i else []) + (self.tokenizer.encode(part) if part else [])
        return ids

    def name(self, word):
        """Token ids of a name behind a space."""
        ids = self.tokenizer.encode(" " + spelled(word)) if spelled(word) else []
        if not ids or not self.tokenizer.decode(ids).strip("\ufffd "):
            raise ValueError(f"the object name {word!r} has no tokens: give it a word in events.csv")
        return ids

    def names(self, i):
        return self.trained[self.trials.table.word.iat[i]]

    def pack(self, rows):
        """rows: B lists of K lists of token ids → idx (B, T), position (T,), mask (T, T), target (B, K, W + 1) with -1 for "nothing": T = prompt and K
        slots of W. A slot sees the prompt and itself, so one pass gives what K passes would."""
        P, K, W = len(self.prompt), len(rows[0]), max(len(n) for names in rows for n in names)
        idx, target = torch.zeros(len(rows), P + K * W, dtype=torch.int64), torch.full((len(rows), K, W + 1), -1)
        idx[:, :P] = torch.tensor(self.prompt)
        for b, names in enumerate(rows):
            for k, n in enumerate(names):
                idx[b, P + k * W:P + k * W + len(n)] = torch.tensor(n)
                target[b, k, :len(n) + 1] = torch.tensor(n + [self.stop])
        slot = torch.cat([torch.full((P,), -1), torch.arange(K).repeat_interleave(W)])
        position = torch.cat([torch.arange(P), P + torch.arange(W).repeat(K)])
        mask = ((slot[:, None] == slot) | (slot == -1)) & (torch.arange(P + K * W)[:, None] >= torch.arange(P + K * W))
        return idx, position, mask, target


def log_probs(logits, target):
    """Log-probability of every token (B, K, W + 1), 0 where target is -1. logits (B, 1 + K W, V): those of the prompt's last token, then of the slots."""
    B, K, W1 = target.shape
    source = 1 + torch.arange(K, device=logits.device)[:, None] * (W1 - 1) + torch.arange(-1, W1 - 1, device=logits.device)  # what predicts each
    source[:, 0] = 0
    norm = logits.float().logsumexp(-1)  # (B, 1 + K W)
    picked = logits.float().flatten(1).gather(1, (source * logits.size(2) + target.clamp_min(0)).flatten(1)).view_as(target)
    return (picked - norm[:, source.flatten()].view_as(target)) * (target >= 0)


# ---- model

FIXED = ("stage", "fusion", "expert_layers", "text_positions", "prefix_attention", "encoder", "tokens", "patch", "whole", "width", "encoder_layers", "virtual",
         "dropout", "train", "k")  # options that a run cannot be resumed without


def build(config, trials, run):
    """(NeuralGPT, tokenizer, checkpoint or None): from lm= and options, or from the checkpoint that init_from names."""
    state = None
    if config.init_from == "resume":
        state, path = run.load("ckpt.pt"), run.out / "ckpt.pt"
    elif config.init_from != "scratch":
        path = Path(config.init_from)
        path = path if path.suffix == ".pt" else path / "best.pt"
        state = load_checkpoint(path)
    if state:
        if state.get("kind") != "telepath":
            raise ValueError(f"{path} is no run of telepath.py: give lm= a language model, and init_from= an earlier run of this script")
        lm, tokenizer = GPT(GPTConfig(**state["lm_args"])), Tokenizer(state["tokenizer"])
        if Path(config.lm).exists() and load_lm(config.lm)[1].state["ranks"] != state["tokenizer"]["ranks"]:
            raise ValueError(f"{path} was trained with another tokenizer than lm={config.lm} has: give the lm= it was trained with")
        shape, fusion = EncoderConfig(**state["encoder_args"]), state["fusion_args"]
        if config.init_from == "resume" and (other := [key for key in FIXED if state["config"][key] != getattr(config, key)]):
            raise ValueError(f"{path} was trained with {other[0]}={state['config'][other[0]]}, the options say {getattr(config, other[0])}: resume with the "
                             "options of its own config.yaml")
    else:
        sheet, tokenizer = load_lm(config.lm, dropout=0.0)
        lm = GPT(replace(sheet.config, sheet=False, alpha=0.0, activation_decay=0.0))  # the sheet's loss has no part in this
        lm.load_state_dict({k: v for k, v in sheet.state_dict().items() if k != "unit_at_cell"})
        kind = config.encoder
        fusion = dict(fusion=config.fusion, layers=config.expert_layers, text_positions=config.text_positions, attention=config.prefix_attention)
        given = dict(n_embd=lm.config.n_embd, subjects=len(trials.subjects), dropout=config.dropout)
        shape = EncoderConfig(kind=kind, width=config.width, n_layer=config.encoder_layers, n_head=max(1, config.width // 32), patch=config.patch,
                              tokens=config.tokens, virtual=config.virtual, window=len(trials.offsets) // config.patch * config.whole, **given)
        if path := config.pretrained():
            pretrained = load_checkpoint(path)
            if "encoder_args" not in pretrained:
                raise ValueError(f"{path} holds no encoder: give a run of telepath.py or foundation.py")
            window = len(trials.offsets) // pretrained["encoder_args"]["patch"] * config.whole
            shape = EncoderConfig(**{**pretrained["encoder_args"], **given, "window": window})
    if shape.patch > len(trials.offsets):
        raise ValueError(f"patch={shape.patch} is longer than the window of {len(trials.offsets)} samples: take shorter patches, or a wider window")
    if tokenizer.n_vocab > lm.config.vocab_size:
        raise ValueError(f"lm={config.lm} has a tokenizer of {tokenizer.n_vocab} tokens and a model of {lm.config.vocab_size}: they do not belong together")
    model = NeuralGPT(lm, NeuralEncoder(shape), **fusion)
    if state:
        model.load_state_dict(state["model"])
    elif config.pretrained():
        weights = {k.removeprefix("encoder."): v for k, v in pretrained["model"].items() if k.startswith("encoder.") or "lm_args" not in pretrained}
        share, left = load_matching(model.encoder, weights, config.match, path)
        run.print(f"{path}: {share:.1%} of the encoder's weights are pretrained; new: {', '.join(left) or 'none'}"
                  + (f"; {trials.matched}" if trials.matched else ""))
    return model.to(run.device), tokenizer, state


def parameter_sets(model):
    """{set: parameters}: encoder (with BON and EON), expert (or cross-attention), core (the language model)."""
    experts = [p for part in (model.experts, model.crosses) if part is not None for p in part.parameters()]
    edges = [model.bon, model.eon] if model.fusion != "cross" else []
    return dict(encoder=[*model.encoder.parameters(), *edges], expert=experts, core=list(model.lm.parameters()))


def freeze(model, config):
    """Only what config.train names learns; the optimiser's groups."""
    sets = parameter_sets(model)
    learns = dict(encoder=sets["encoder"], expert=sets["expert"] if config.train != "encoder" else [], core=[])
    if config.train == "all":
        learns["core"] = sets["core"]
    elif config.train == "lm_last_k":
        if config.k > model.lm.config.n_layer:
            raise ValueError(f"k={config.k} is more than the {model.lm.config.n_layer} blocks of lm={config.lm}: take train=all")
        learns["core"] = [p for part in (*model.lm.transformer.h[-config.k:], model.lm.transformer.ln_f) for p in part.parameters()]
    model.requires_grad_(False)
    for p in sum(learns.values(), []):
        p.requires_grad_(True)
    rates = dict(encoder=config.learning_rate, expert=config.expert_lr, core=config.core_lr)
    return [dict(params=part, weight_decay=decay, lr=rates[name], peak=rates[name]) for name, params in learns.items()
            for part, decay in (([p for p in params if p.dim() >= 2], config.weight_decay), ([p for p in params if p.dim() < 2], 0.0)) if part]


def state_of(model, tokenizer):
    """What a checkpoint needs to build the model again."""
    return dict(kind="telepath", lm_args=asdict(model.lm.config), encoder_args=asdict(model.encoder.config), fusion_args=model.args,
                model=model.state_dict(), tokenizer=tokenizer.state)


class WordSpace:
    """Names as points of a language model's token embedding: mean over their tokens, less the vocabulary's mean and its two first directions
    (a GPT's embeddings all lean to one side), at unit length. It stays what it was when the embedding learns."""

    def __init__(self, wte):
        self.wte = wte.detach().float().cpu().clone()
        self.mean = self.wte.mean(0)
        axes = torch.linalg.eigh((self.wte - self.mean).t() @ (self.wte - self.mean))[1][:, [-1, -2]]
        self.axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # (C, 2), of one sign, so that a resumed run draws the same picture

    def clean(self, x):
        x = x - self.mean
        return F.normalize(x - (x @ self.axes) @ self.axes.t(), dim=-1)

    def names(self, ids):
        """(N, C) of N lists of token ids."""
        return self.clean(torch.stack([self.wte[n].mean(0) for n in ids]))


def sample_negatives(rng, word, similarity, allowed, quantile, tau):
    """A dispreferred word for each of `word` (B,): among `allowed` (numbers), less similar than the quantile, with probability exp(-similarity / tau);
    never the word itself or a synonym (similarity inf)."""
    out = []
    for w in word:
        others = allowed[(allowed != w) & np.isfinite(similarity[w, allowed])]
        if not len(others):
            raise ValueError("stage=dpo needs training words that are no synonyms of each other, there is but one")
        s = similarity[w, others]
        others, s = others[s <= np.quantile(s, quantile)], s[s <= np.quantile(s, quantile)]
        p = np.exp(-(s - s.min()) / tau)
        out.append(rng.choice(others, p=p / p.sum()))
    return np.array(out)


def dpo_loss(policy, reference, beta, smoothing=0.0):
    """policy, reference (B, 2): log-probabilities of the preferred and the dispreferred word. -log sigmoid of the margin, and the margin (B,)."""
    margin = beta * ((policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1]))
    return (-(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)).mean(), margin


# ---- evaluate: what counts as right

IRREGULAR = dict(men="man", women="woman", children="child", feet="foot", teeth="tooth", geese="goose", mice="mouse", knives="knife", leaves="leaf",
                 wolves="wolf", halves="half", shelves="shelf", loaves="loaf", lives="life", oxen="ox", people="person", dice="die", indices="index",
                 vertices="vertex", matrices="matrix", axes="axis", analyses="analysis", radii="radius", cacti="cactus", scarves="scarf", calves="calf",
                 thieves="thief", wives="wife", elves="elf", hooves="hoof", species="species", series="series", sheep="sheep", glasses="glasses",
                 scissors="scissors", trousers="trousers", shoes="shoe", toes="toe", canoes="canoe", pies="pie", ties="tie", caches="cache", axis="axis",
                 gas="gas", lens="lens", buses="bus", gases="gas", lenses="lens", octopuses="octopus", walruses="walrus", viruses="virus")


def singular(word):
    """The singular of an English noun, by rule and a list of exceptions."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if re.search(r"[^aeiou]ies?$", word) and len(word) > 4:  # berries are a berry, brownies a brownie: either is spelled with y
        return re.sub("ies?$", "y", word)
    if re.search(r"(ch|sh|x|ss|zz|to)es$", word):
        return word[:-2]
    return word[:-1] if re.search(r"[^su]s$", word) and not word.endswith("is") and len(word) > 3 else word


@functools.cache
def normalise(text):
    """Words of a name or an answer: lower case, no marks, no article before, no number behind, singular."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("_", " ").replace("-", " ")
    words = re.findall(r"[^\W\d_]+\d*", re.sub(r"['’]s\b", "", text))
    words = [re.sub(r"\d+$", "", w) for w in words]
    return [singular(w) for w in (words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)]


def naive(answer, word):
    """The very same text."""
    return answer.strip() == spelled(word)


def flexible(answer, word, synonyms=()):
    """Whether the answer names the word or a synonym, as whole words: case, articles, plurals and a uniqueID's number do not count."""
    said = normalise(answer.split("\n")[0])
    return naive(answer, word) or any(name and any(said[i:i + len(name)] == name for i in range(len(said) - len(name) + 1))
                                      for name in map(normalise, (word, *synonyms)))


@torch.no_grad()
def rank(run, model, text, trials, ids, names, batch_size=32, chunk=64, occlude=None):
    """Log-probability (N, K) of each of K names (with its stop) after each trial's EEG, and after silence (K,). Right to the token: every name in one
    pass of its own slot. occlude: numbers of the window's samples that are set to 0."""
    model.eval()
    rows, head = [text.ids[n] for n in names], model.lm.transformer.wte.weight.float()
    if model.fusion == "cross":  # there packed names share the language model's block
        chunk = max(1, min(chunk, (model.lm.config.block_size - len(text.prompt)) // max(map(len, rows))))

    def score(signal, xyz, subject):
        out = []
        with run.autocast():
            n = model.prefix(signal.to(run.device), xyz.to(run.device), subject.to(run.device))
        for a in range(0, len(rows), chunk):
            idx, position, mask, target = (t.to(run.device) for t in text.pack([rows[a:a + chunk]]))
            with run.autocast():
                x = model.trunk(n, idx.expand(len(n), -1), position, mask)[:, len(text.prompt) - 1:]
            out.append(log_probs(F.linear(x.float(), head), target.expand(len(n), -1, -1)).sum(-1))  # half precision would tie names
        return torch.cat(out, 1).double().cpu()

    scores = torch.zeros(len(ids), len(names), dtype=torch.float64)
    for a in range(0, len(ids), batch_size):
        x, xyz, subject = trials.batch(ids[a:a + batch_size])
        if occlude is not None:
            x[..., occlude] = 0
        scores[a:a + batch_size] = score(x, xyz, subject)
    some = trials.batch(ids[:1])
    empty = score(torch.zeros_like(some[0]), some[1], torch.tensor([-1]))[0]
    return scores.numpy(), empty.numpy()


@torch.no_grad()
def say(run, model, text, trials, ids, config, silent=False, batch_size=64, **options):
    """What the model says of each trial: N texts."""
    model.eval()
    said = []
    for a in range(0, len(ids), batch_size):
        x, xyz, subject = (t.to(run.device) for t in trials.batch(ids[a:a + batch_size]))
        if silent:
            x, subject = torch.zeros_like(x), torch.full_like(subject, -1)
        with run.autocast():
            n = model.prefix(x, xyz, subject)
            rows = model.generate(n, text.prompt, config.max_new_tokens, stop=[text.stop], **{"temperature": 0, "seed": key_seed(run.seed, a), **options})
        said += [text.tokenizer.decode(row) for row in rows]
    return said


def over_objects(values, objects, draws, seed):
    """Mean of values (N,) and its 95 % bootstrap interval over objects (N,): all trials of an object are drawn together."""
    code = np.unique(objects, return_inverse=True)[1]
    total, count = np.bincount(code, values), np.bincount(code)
    chosen = np.random.default_rng(key_seed(seed, "bootstrap")).integers(len(total), size=(draws, len(total)))
    means = total[chosen].sum(1) / count[chosen].sum(1)
    return (float(np.mean(values)), *map(float, np.quantile(means, (0.025, 0.975))))


def strata(table, least=10):
    """(N,) within what trials change places under the null: blocks of a recording, so that slow drift cannot pass for knowledge; where a block has
    fewer than `least` of the trials, what is left of its recording, and then of all: a trial that can only stay where it is tests nothing."""
    found = (table.recording.astype(str) + "/" + table.block).to_numpy()
    for wider in (table.recording.astype(str).to_numpy(), "all"):
        _, code, count = np.unique(found, return_inverse=True, return_counts=True)
        found = np.where(count[code] < least, wider, found)
    return found


def permuted(right, strata, draws, seed):
    """Scores of shuffled EEG: right (N, N) the score that trial j's EEG gives for trial i's name; trials change places within strata (N,) only.
    The expected score (N,) of each trial, and p of the mean score: the share of `draws` permutations that reach it."""
    rng, n = np.random.default_rng(key_seed(seed, "shuffle")), len(right)
    members = [np.flatnonzero(strata == s) for s in np.unique(strata)]
    means, each = np.empty(draws), np.zeros(n)
    for d in range(draws):
        other = np.arange(n)
        for m in members:
            other[m] = rng.permutation(m)
        means[d] = right[np.arange(n), other].mean()
    for m in members:
        each[m] = right[np.ix_(m, m)].mean(1)
    return each, (1 + (means >= np.diag(right).mean() - 1e-12).sum()) / (1 + draws)


def top_k(scores, k):
    """Whether each name is among the k best of a trial's scores (N, K): (N, K), ties shared out as chance would."""
    out = np.empty(scores.shape)
    for row, s in zip(out, scores):
        ordered = np.sort(-s)
        above = np.searchsorted(ordered, -s)
        row[:] = np.clip((k - above) / (np.searchsorted(ordered, -s, "right") - above), 0, 1)
    return out


def place(scores):
    """Place of each name among a trial's scores (N, K): 0 the best, 1 the last; ties share theirs, so that 0.5 is chance whatever the scores."""
    return (scipy.stats.rankdata(-scores, axis=1) - 1) / max(1, scores.shape[1] - 1)


def evaluate(run, model, text, trials, ids, name, config, space, common):
    """Every score of one set beside its controls, as rows of results.csv to be written, and its samples. common: training words, most frequent first."""
    ids = subset(ids, config)
    table = trials.table.iloc[ids]
    objects, places, names, everything = table.object.to_numpy(), strata(table), sorted(set(table.word)), sorted(trials.words)
    truth, mine = (np.array([among.index(w) for w in table.word]) for among in (names, everything))
    scores, empty = rank(run, model, text, trials, ids, names)
    lengths, K, rows, n = np.array([len(text.ids[w]) + 1 for w in names]), len(names), [], len(ids)

    def add(metric, values, chance, control="eeg", **more):
        mean, low, high = over_objects(np.asarray(values, float), objects, config.shuffles, run.seed)
        rows.append(dict(score=mean, chance=float(chance), low=low, high=high, n=n, set=name, metric=metric, control=control, **more))

    def add_with_shuffled(metric, good, own, chance=None, sign=1):
        """good (N, K): what each trial's EEG gives for each name; own (N,): the number of the trial's name; sign -1: less is better."""
        each, p = permuted(sign * good[:, own].T, places, config.shuffles, run.seed)
        chance = (sign * each).mean() if chance is None else chance
        add(metric, good[np.arange(n), own], chance, p=p)
        add(metric, sign * each, chance, "shuffled")

    for kind, s in (("pmi", scores - empty), ("pmi per token", (scores - empty) / lengths), ("likelihood", scores)):
        for k in (1, 5) if kind == "pmi" else (1,):
            add_with_shuffled(f"top{k}" + f" by {kind}" * (kind != "pmi"), top_k(s, k), truth, min(1.0, k / K))
    for k in (1, 5):
        add(f"top{k}", top_k(empty[None], k)[0, truth], min(1.0, k / K), "empty")
        add(f"top{k}", table.word.isin(common[:k]), min(1.0, k / K), "majority")
    said, nothing = say(run, model, text, trials, ids, config), say(run, model, text, trials, ids[:1], config, silent=True)[0]
    for metric, right in (("naive accuracy", naive), ("flexible accuracy", lambda a, w: flexible(a, w, text.synonyms[w]))):
        most = [right(common[0], w) for w in table.word]
        add_with_shuffled(metric, np.array([[right(a, w) for w in names] for a in said], float), truth, np.mean(most))
        add(metric, [right(nothing, w) for w in table.word], np.mean(most), "empty")
        add(metric, most, np.mean(most), "majority")
    answers = space.names([text.tokenizer.encode(" " + (a.strip() or "?")) for a in said])
    similar = (answers @ space.names([text.ids[w] for w in everything]).t()).numpy()  # (N, all names)
    add_with_shuffled("similarity", similar, mine)
    add_with_shuffled("similarity rank", place(similar), mine, sign=-1)  # 0: no name is nearer to the answer
    order = np.argsort(empty - scores, axis=1)[:, :5]
    samples = table[["subject", "object", "word", "image"]].assign(set=name, said=[a.strip() for a in said],
                                                                   ranked=[" ".join(names[j] for j in o) for o in order], data=trials.data)
    return rows, samples


def subset(ids, config):
    """Evenly spread trials of a set, so that every block, subject and word keeps its share."""
    return ids if not config.eval_trials or len(ids) <= config.eval_trials else ids[np.linspace(0, len(ids) - 1, config.eval_trials).round().astype(int)]


# ---- interpretation

@torch.no_grad()
def follow_prefix(run, model, text, trials, ids, space, step):
    """Where the neural tokens of probe trials are in token space: rows of trajectory.csv. nearest: the five nearest tokens by cleaned cosine; distance:
    1 - cosine to the word's own embedding, others: mean to all other names'; entropy: nats, of the five cosines' softmax at a temperature of 0.1, 1.61 at
    most; pc1, pc2: on the first axes of the token embedding."""
    model.eval()
    with run.autocast():
        n = model.prefix(*(t.to(run.device) for t in trials.batch(ids))).float().cpu()  # (B, P, C)
    words, vocabulary = sorted(trials.words), space.clean(space.wte)
    names, rows = space.names([text.ids[w] for w in words]), []
    for i, tokens in zip(ids, n):
        word = trials.table.word.iat[i]
        for j, x in enumerate(tokens):
            cosine, near = space.clean(x[None])[0] @ names.t(), (vocabulary @ space.clean(x[None])[0]).topk(5)
            p, at = (near.values / 0.1).softmax(0), (x - space.mean) @ space.axes
            mine = words.index(word)
            nearest = "|".join(repr(text.tokenizer.decode([t]))[1:-1] for t in near.indices.tolist())
            rows.append(dict(data=trials.data, step=step, trial=int(i), word=word, token=j, nearest=nearest, entropy=float(-(p * p.log()).sum()),
                             distance=1 - float(cosine[mine]),
                             others=1 - float((cosine.sum() - cosine[mine]) / max(1, len(words) - 1)), norm=float((x - space.mean).norm()),
                             pc1=float(at[0]), pc2=float(at[1])))
    return rows


def keep_trajectory(run, rows):
    """Append to trajectory.csv; what a resumed run had measured beyond its checkpoint goes."""
    path = run.out / "trajectory.csv"
    table = pd.DataFrame(rows)
    if path.exists() and rows[0]["step"]:
        old = pd.read_csv(path, keep_default_na=False)
        table = pd.concat([old[old.step < rows[0]["step"]], table])
    write_aside(path, table.to_csv(index=False))


@torch.no_grad()
def neural_states(run, model, text, trials, ids):
    """Input of every layer in the neural stream, a list of n_layer (N, P + 1, C) float32."""
    model.eval()
    states = []
    idx, position, mask, _ = (t.to(run.device) for t in text.pack([[text.prompt]]))
    with run.autocast():
        n = model.prefix(*(t.to(run.device) for t in trials.batch(ids)))
        model.trunk(n, idx.expand(len(n), -1), position, mask, states=states)
    return [a.float() for a, _ in states]


@torch.no_grad()
def query_key(run, model, text, trials, ids, words, draws=500):
    """Do neural queries look for the key of the word that was seen? Rows (layer, head, key): cosine of the mean neural query with the key of the
    trial's word, less the mean over all other names; null: the trials' words shuffled, p_corrected against the largest |z| of all rows. key 'context':
    the name read by the plain language model after the prompt; 'embedding': its token embedding alone. Causally neural tokens come before text, so
    this is likeness, not attention paid."""
    states, lm, P = neural_states(run, model, text, trials, ids), model.lm, len(text.prompt)
    truth, shuffled = shuffled_words(run, trials, ids, words, draws)
    largest = np.zeros(draws)
    rows = [(text.prompt + text.ids[w]) for w in words]
    idx = torch.tensor([r + [0] * (max(map(len, rows)) - len(r)) for r in rows], device=run.device)
    last = torch.tensor([len(r) - 1 for r in rows], device=run.device)
    hidden = lm(idx, hidden=range(lm.config.n_layer)).hidden
    wte, found = torch.stack([lm.transformer.wte.weight[r[P:]].mean(0) for r in rows]), []
    for i, block in enumerate(lm.transformer.h[:-1]):  # what neural tokens ask in the last layer nobody hears
        attn = model.experts[i - model.first].attn if model.experts is not None and i >= model.first else block.attn
        q = attn.qkv(block.ln_1(states[i][:, 1:]))[0].mean(2)  # (N, H, hd), over neural tokens
        for kind, h in (("context", hidden[i][torch.arange(len(rows), device=run.device), last]), ("embedding", wte)):
            k = block.attn.qkv(block.ln_1(h)[:, None])[1][:, :, 0]  # (K, H, hd)
            cosine = torch.einsum("nhd,khd->hnk", F.normalize(q, dim=-1), F.normalize(k, dim=-1)).double().cpu().numpy()
            for head, c in enumerate(cosine):
                c = c - (c.sum(1, keepdims=True) - c) / max(1, c.shape[1] - 1)  # less the mean of all other names
                excess, null = c[np.arange(len(c)), truth].mean(), c[np.arange(len(c)), shuffled].mean(1)
                low, high = np.quantile(null, [0.025, 0.975])
                z, nulls = ((x - null.mean()) / (null.std() + 1e-12) for x in (excess, null))
                largest = np.maximum(largest, np.abs(nulls))
                found.append(dict(layer=i, head=head, key=kind, excess=excess, null=null.mean(), null_low=low, null_high=high, z=z, n=len(c),
                                  p=(1 + (np.abs(nulls) >= abs(z)).sum()) / (1 + draws)))
    table = pd.DataFrame(found)
    return table.assign(p_corrected=(1 + (largest >= table.z.abs().to_numpy()[:, None]).sum(1)) / (1 + draws))


def shuffled_words(run, trials, ids, words, draws):
    """Numbers (N,) of the trials' words, and the same (draws, N) with words changing places."""
    truth, rng = np.array([words.index(w) for w in trials.table.word.iloc[ids]]), np.random.default_rng(key_seed(run.seed, "words"))
    return truth, np.stack([rng.permutation(truth) for _ in range(draws)])


@torch.no_grad()
def logit_lens(run, model, text, trials, ids, words, draws=500):
    """What the head would read off the neural tokens themselves at each layer: place (0 best, 0.5 chance) of the seen word's tokens (mean
    logit) among those of all names, mean over trials with its interval over objects, by layer and neural token; null: words shuffled. Rows of
    logit_lens.csv."""
    states, lm, found = neural_states(run, model, text, trials, ids), model.lm, []
    named = torch.stack([lm.transformer.wte.weight[text.ids[w]].mean(0) for w in words])  # (K, C)
    (truth, shuffled), objects = shuffled_words(run, trials, ids, words, draws), trials.table.object.iloc[ids].to_numpy()
    for i, n in enumerate(states):
        logits = F.linear(lm.transformer.ln_f(n[:, 1:]), named).double().cpu().numpy()  # (N, P, K)
        for j in range(logits.shape[1]):
            at = place((logits[:, j] - logits[:, j].mean(0)).round(5))  # (N, K); what every trial says is no reading
            null = at[np.arange(len(truth)), shuffled].mean(1)
            mean, low, high = over_objects(at[np.arange(len(truth)), truth], objects, draws, run.seed)
            found.append(dict(layer=i, token=j, place=mean, low=low, high=high, n=len(truth), null=null.mean(),
                              **dict(zip(("null_low", "null_high"), np.quantile(null, [0.025, 0.975])))))
    return pd.DataFrame(found)


# ---- plots

def save_figure(fig, path):
    with aside(path) as file:
        fig.savefig(file, dpi=130, format="png")
    plt.close(fig)


def spread(rows):
    """Error bars (2, N) of rows with score, low and high."""
    return np.abs(rows[["low", "high"]].T.to_numpy() - rows.score.to_numpy())


def plot_curves(path, log, title):
    """Training and validation over steps, from the log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, keys in zip(axes, (("train_loss", "val_rank_loss"), ("val_top1", "val_chance"))):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points), label=key, lw=1.2 if "train" in key else 2, ls=":" if "chance" in key else "-", c="gray" if "chance" in key else None)
        axis.set_xlabel("step")
        axis.legend()
    axes[0].set_ylabel("nats")
    axes[1].set(ylabel="top-1 among training words", ylim=(0, None))
    fig.suptitle(title, fontsize=10)
    save_figure(fig, path)


def plot_results(path, table, title):
    """Every set beside its controls: dots with 95 % intervals over objects."""
    metrics = ("top1", "top5", "flexible accuracy", "similarity")
    fig, axes = plt.subplots(1, len(metrics), figsize=(13, 3.8), layout="constrained")
    colours = dict(eeg="#c23b22", shuffled="#4878a8", empty="#999999", majority="#d9a441")
    for axis, metric in zip(axes, metrics):
        part = table[table.metric == metric]
        for k, control in enumerate(colours):
            rows = part[part.control == control].set_index("set").reindex([s for s in SETS if s in set(part.set)]).dropna(subset="score")
            x = np.array([SETS.index(s) for s in rows.index]) + 0.16 * (k - 1.5)
            axis.errorbar(x, rows.score, yerr=spread(rows), fmt="o", ms=5 if control == "eeg" else 3.5,
                          capsize=2, c=colours[control], label="EEG" if control == "eeg" else f"{control}{' EEG' * (control == 'shuffled')}"
                          f"{' prefix' * (control == 'empty')}{' word' * (control == 'majority')}")
        for i, s in enumerate(SETS):
            chance = part[(part.set == s) & (part.control == "eeg")].chance
            if len(chance):
                axis.hlines(chance.iloc[0], i - 0.4, i + 0.4, color="k", lw=0.8, ls=":", label="chance" if not i else None)
        axis.set_xticks(range(len(SETS)), [s.replace("_", "\n") for s in SETS], fontsize=8)
        axis.set_title({"top1": "closed-set top-1", "top5": "closed-set top-5", "similarity": "semantic similarity of what is said"}.get(metric, metric),
                       fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if metric != "similarity":
            axis.set_ylim(-0.02, None)
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=5)
    fig.suptitle(title, fontsize=10)
    save_figure(fig, path)


def plot_way(path, trajectory, space, title):
    """The way of the first neural token through token space: plane of the embedding's first two axes, and distance to the word over training."""
    table = trajectory[trajectory.token == 0]
    fig, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.6), layout="constrained")
    cloud = ((space.wte - space.mean) @ space.axes).numpy()
    left.scatter(*cloud[np.linspace(0, len(cloud) - 1, min(len(cloud), 3000)).astype(int)].T, s=2, c="0.8", lw=0, rasterized=True)
    for c, (_, part) in enumerate(table.groupby("trial")):
        colour = plt.cm.tab10(c % 10)
        left.plot(part.pc1, part.pc2, "-o", ms=2.5, lw=1.2, c=colour)
        left.annotate(part.word.iloc[-1], part[["pc1", "pc2"]].iloc[-1], color=colour, fontsize=9, xytext=(4, 4), textcoords="offset points")
        right.plot(part.step, part.distance, "-o", ms=3, c=colour, label=f"{part.word.iloc[-1]}: {part.nearest.iloc[-1].split('|')[0].strip() or '␣'}")
    mean = table.groupby("step").others.mean()
    right.plot(mean.index, mean, c="k", ls=":", label="all other names, mean")
    left.set(xlabel="first axis of the token embedding", ylabel="second axis", title="first neural token of some trials (grey: the vocabulary)")
    right.set(xlabel="step", ylabel="1 − cosine", title="distance to the seen word's embedding")
    right.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), title="word: nearest token")
    fig.suptitle(title, fontsize=10)
    save_figure(fig, path)


def plot_query_key(path, table, title):
    """Likeness of neural queries and the key of the word, by layer and head."""
    kinds = ["context", "embedding"]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    limit = max(4, table.z.abs().max())
    for axis, kind in zip(axes, kinds):
        part = table[table.key == kind]
        grid = part.pivot(index="layer", columns="head", values="z")
        image = axis.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for row in part.itertuples():
            axis.text(row.head, row.layer, f"{row.excess:+.2f}{'*' * (row.p_corrected < 0.05)}", ha="center", va="center", fontsize=8,
                      c="w" if abs(row.z) > 0.7 * limit else "k")
        axis.set(xlabel="head", ylabel="layer", xticks=grid.columns, yticks=grid.index, title=f"key of the seen word: {kind}")
    fig.colorbar(image, ax=axes, label="z against shuffled words")
    fig.suptitle(f"cosine of neural query and target key, less that of other names (* corrected p < .05)\n{title}", fontsize=10)
    save_figure(fig, path)


def plot_lens(path, table, title):
    """Place of the true word among all, read off each layer."""
    fig, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    layers = sorted(set(table.layer))
    for layer in layers:
        part = table[table.layer == layer]
        axis.plot(part.token, part.place, "-o", ms=4, c=plt.cm.viridis(layer / max(1, len(layers))), label=f"before layer {layer}")
    axis.fill_between(part.token, table.groupby("token").null_low.min(), table.groupby("token").null_high.max(), color="0.85", label="words shuffled (95 %)")
    axis.invert_yaxis()
    axis.set(xlabel="neural token, in time", ylabel="place of the seen word (0 best)", xticks=part.token)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    fig.suptitle(f"logit lens on the neural tokens\n{title}", fontsize=9)
    save_figure(fig, path)


# ---- training

def lr_share(step, total, warmup):
    """Learning rate at a step as a share of its peak."""
    return (step + 1) / (warmup + 1) if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def fit(run, model, text, trials, ids, config, steps, space, at=lambda step: None, save=None, state=None, alone=False):
    """Train in place, on all ranks, or `alone` on this one (a job of a sweep). at(step) is called before step 0, after every eval_interval and at the
    end; save(name, step, optimizer) at every save_interval. Returns the loader; the loop stops early when the run is asked to."""
    rank_, world = (0, 1) if alone else (run.rank, run.world)
    groups = freeze(model, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    resumed = state["step"] if state else None
    step = resumed or 0
    if state:
        asked = [dict(peak=group["peak"], weight_decay=group["weight_decay"]) for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, options in zip(optimizer.param_groups, asked):
            group.update(options)
        if state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
    per_step = config.trials_per_step or config.batch_size * world
    if per_step % (config.batch_size * world):
        raise ValueError(f"trials_per_step={per_step} must be a multiple of batch_size x ranks = {config.batch_size} x {world}")
    accum, learned = per_step // config.batch_size, [p for group in groups for p in group["params"]]
    loader = Loader(run, trials, text, ids, config, accum, step, rank_, world)
    ddp = DistributedDataParallel(model, device_ids=[run.device] if run.device.type == "cuda" else None, broadcast_buffers=False) if world > 1 else model
    seen = np.array(sorted({*trials.word[ids]}))  # words of training, by number
    number = {w: i for i, w in enumerate(trials.words)}
    targets = space.names([text.ids[trials.words[w]] for w in seen]).to(run.device)
    reference = {name: p.detach().clone() for name, p in (state or {}).get("reference", {}).items()} or \
        {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad} if config.stage == "dpo" else {}
    reference = {name: p.to(run.device) for name, p in reference.items()}
    everything = space.names([text.ids[w] for w in trials.words])
    similarity = (everything @ everything.t()).numpy()
    for w, names in text.synonyms.items():  # a synonym that is a word of its own is no wrong answer
        for n in (n for n in names if n in number):
            similarity[number[w], number[n]] = similarity[number[n], number[w]] = np.inf

    def losses(batch, micro):
        """Loss of one micro-batch, and what it is made of."""
        signal, xyz, subject, words, word, _ = batch
        rows = [[text.ids[w]] for w in words]
        if config.stage == "dpo":
            rng = np.random.default_rng(key_seed(run.seed, step, micro, "negatives"))
            wrong = sample_negatives(rng, word.cpu().numpy(), similarity, seen, config.dpo_quantile, config.dpo_tau)
            rows = [r + [text.ids[trials.words[w]]] for r, w in zip(rows, wrong)]
        idx, position, mask, target = (t.to(run.device) for t in text.pack(rows))
        inputs = (signal, xyz, subject, idx, position, mask, len(text.prompt) - 1)
        with run.autocast():
            logits, n = ddp(*inputs)
        lp = log_probs(logits, target)  # (B, K, W + 1)
        if config.stage == "dpo":
            with torch.no_grad(), run.autocast():  # the language model is shared, only what learned is there twice
                old = torch.func.functional_call(model, reference, inputs)[0]
            loss, margin = dpo_loss(lp.sum(-1), log_probs(old, target).sum(-1), config.beta, config.dpo_smoothing)
            return loss - config.dpo_nll * lp[:, 0].sum(-1).mean(), dict(margin=margin.mean(), preferred=(margin > 0).float().mean())
        loss = -lp.sum() / (target >= 0).sum()  # of the word and its stop token only
        parts = dict(word=loss)
        if config.align:
            first = F.normalize(n[:, 0].float() - space.mean.to(n.device), dim=-1)
            at_word = torch.as_tensor(np.searchsorted(seen, word.cpu().numpy()), device=n.device)
            parts["align"] = F.cross_entropy(first @ targets.t() / config.temperature, at_word)
            loss = loss + config.align * parts["align"]
        return loss, parts

    bar = run.progress(steps, step, config.stage) if not alone else None
    if not alone:
        run.stopping()
    while True:
        ends = step >= steps
        if step != resumed and (ends or step % config.eval_interval == 0):
            at(step)
        if save and step != resumed and step and (ends or step % config.save_interval == 0 or run.stopped):
            save("ckpt.pt", step, optimizer, reference)
        if ends or not alone and run.stopped:
            break
        model.train(config.stage == "sft")
        total, made = 0.0, {}
        micros = range(rank_, accum, world)
        for micro in micros:
            torch.manual_seed(key_seed(run.seed, step, micro, "dropout"))
            if world > 1:
                ddp.require_backward_grad_sync = micro == micros[-1]
            loss, parts = losses(loader.next(), micro)
            run.scaler.scale(loss / len(micros)).backward()
            total = total + loss.detach() / len(micros)
            made = {k: made.get(k, 0.0) + v.detach() / len(micros) for k, v in parts.items()}
        run.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(learned, config.grad_clip or math.inf)
        if not run.scaler.is_enabled() and not norm.isfinite():
            raise ValueError(f"the gradient is not finite at step {step + 1}: stopped; try a smaller learning_rate, or dtype=float32")
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_share(step, steps, min(config.warmup_iters, steps // 5))
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if not alone:
            bar.update()
            run.stopping()
            if step % config.log_interval == 0 or step == 1:
                numbers = torch.stack([total, *made.values()])
                numbers = (run.reduce(numbers) / world).tolist()
                run.log(step, train_loss=numbers[0], **{f"train_{k}": v for k, v in zip(made, numbers[1:])}, grad_norm=norm.item())
    if bar:
        bar.close()
    return loader


def validate(run, model, text, trials, ids, config, words):
    """Ranking of validation trials among the training words: cross-entropy of the softmax over names, and top-1."""
    ids = subset(ids, config)
    scores, empty = rank(run, model, text, trials, ids, words)
    truth = np.array([words.index(w) for w in trials.table.word.iloc[ids]])
    pmi = torch.from_numpy(scores - empty)
    return dict(val_rank_loss=F.cross_entropy(pmi, torch.from_numpy(truth)).item(), val_top1=float(top_k(pmi.numpy(), 1)[np.arange(len(ids)), truth].mean()),
                val_chance=1 / len(words))


# ---- the run

def prepare(config, folder):
    """(trials, sets, manifest) of a dataset's folder: split, strangers named, noise learned from training trials. Waits for no other rank."""
    trials = Trials(folder, config)
    sets, manifest = split(trials, config)
    trials.strangers(set(manifest["held_out_subjects"]))
    trials.learn(sets["train"])
    return trials, sets, manifest


def main(config):
    config.out_dir = config.out_dir or "out/telepath" + {"none": "_dpo" * (config.stage == "dpo")}.get(config.analysis, f"_{config.analysis}")
    run = Run(config)
    folder = run.dataset(config.dataset)
    if config.analysis != "none":
        return ANALYSES[config.analysis](run, replace(config, dataset=str(folder)))
    trials, sets, manifest = prepare(config, folder)
    if run.master:
        write_aside(run.out / "splits.json", json.dumps(manifest, indent=1))
    model, tokenizer, state = build(config, trials, run)
    if state and state["split"] != manifest["hash"]:
        raise ValueError(f"init_from={config.init_from} was trained on another split than dataset={config.dataset} and the options give now, and may know what "
                         "is held out here: give the data and the options of its own config.yaml, or begin with encoder=pretrained")
    resumed = state if config.init_from == "resume" else None
    text = Text(tokenizer, trials, set(manifest["held_out_words"]), config)
    space = WordSpace((resumed or {}).get("wte", model.lm.transformer.wte.weight))
    model.check_length(1 + len(trials.offsets) // model.encoder.config.patch, len(text.prompt) + max(config.max_new_tokens, *map(len, text.ids.values())))
    if config.compile:
        model.lm.compile_blocks()
    words = sorted(set(trials.table.word.iloc[sets["train"]]))
    probes = sets["val"][np.unique(trials.word[sets["val"]], return_index=True)[1]]  # a trial each of some words
    probes = probes[np.linspace(0, len(probes) - 1, min(config.probes, len(probes))).astype(int)]
    best, best_step = (resumed["best"], resumed["best_step"]) if resumed else (math.inf, 0)
    if resumed:
        run.rewind(resumed["step"])
    data, last = trials.data, {}
    freeze(model, config)
    made_of = ", ".join(f"{k} {sum(p.numel() for p in ps) / 1e6:.2f} M{'' if any(p.requires_grad for p in ps) else ' frozen'}"
                        for k, ps in parameter_sets(model).items() if ps)
    run.print(f"{data}: {len(trials.recordings)} recordings, " + ", ".join(f"{k} {len(v):,}" for k, v in sets.items()) + f" trials; split {manifest['hash']}"
              f" ({manifest['purged']} purged for overlap, {trials.outside} outside) | {made_of} | {run.device} {str(run.dtype)[6:]}")

    def save(name, step, optimizer, reference):
        before = {"wte": space.wte} if config.train == "all" else {}  # the embedding as it was
        run.save(name, {**state_of(model, tokenizer), **before, "optimizer": optimizer.state_dict(), "scaler": run.scaler.state_dict(), "step": step,
                        "best": best, "best_step": best_step, "reference": reference, "split": manifest["hash"], "config": asdict(config)})

    def at(step):
        nonlocal best, best_step
        last.update(validate(run, model, text, trials, sets["val"], config, words))
        run.log(step, **last)
        if run.master:
            keep_trajectory(run, follow_prefix(run, model, text, trials, probes, space, step))
        if last["val_rank_loss"] < best:
            best, best_step = last["val_rank_loss"], step
            run.save("best.pt", {**state_of(model, tokenizer), "step": step, "split": manifest["hash"], "config": asdict(config)})

    loader = fit(run, model, text, trials, sets["train"], config, config.max_iters, space, at, save, resumed)
    if run.stopped:
        return run.close()
    run.barrier()
    model.load_state_dict(run.load("best.pt")["model"])
    run.print(f"step {best_step} was chosen on validation (ranking loss {best:.3f}); the loop waited {loader.waited:.2f} s for data")
    if run.master:
        report(run, model, text, trials, sets, config, space, words, data)
    run.merge()
    run.close()


def report(run, model, text, trials, sets, config, space, words, data):
    """Score the evaluation sets, once, and draw the figures."""
    common = list(trials.table.word.iloc[sets["train"]].value_counts().index)
    names = [name for name in SETS if len(sets[name])]
    for name in set(SETS) - set(names):
        run.print(f"set {name} is empty with this dataset and these options")
    rows, samples = [], []
    for name in names:
        found, said = evaluate(run, model, text, trials, sets[name], name, config, space, common)
        rows, samples = rows + found, samples + [said]
    table = pd.DataFrame(rows)
    decisive = (table.metric == "top1") & (table.control == "eeg")
    table.loc[decisive, "p_corrected"] = mne.stats.bonferroni_correction(table.p[decisive])[1].clip(max=1)
    for row in table.to_dict("records"):
        keys = {k: v for k, v in row.items() if not (isinstance(v, float) and np.isnan(v))}
        run.result(keys.pop("score"), keys.pop("chance"), keys.pop("low"), keys.pop("high"), keys.pop("n"), data=data, **keys)
    samples = pd.concat(samples)
    write_aside(run.out / "samples.csv", samples.to_csv(index=False))
    for name in names:
        of = table[table.set == name].set_index(["metric", "control"])
        one = of.loc[("top1", "eeg")]
        run.print(f"{name}: top-1 {one.score:.3f} [{one.low:.3f}, {one.high:.3f}] beside {one.chance:.3f} of chance, "
                  + ", ".join(f"{of.loc[('top1', c)].score:.3f} {c} [{of.loc[('top1', c)].low:.3f}, {of.loc[('top1', c)].high:.3f}]" for c in
                              ("shuffled", "empty", "majority"))
                  + f"; corrected p {one.p_corrected:.3f} | top-5 {of.loc[('top5', 'eeg')].score:.3f} beside {of.loc[('top5', 'eeg')].chance:.3f} | "
                  + " | ".join(f"{m} {of.loc[(m, 'eeg')].score:.3f} beside {of.loc[(m, 'shuffled')].score:.3f} shuffled" for m in
                               ("naive accuracy", "flexible accuracy", "similarity")) + f" | n = {one.n} trials")
    for row in samples.groupby("set").head(3).itertuples():
        run.print(f"    {row.set}: saw {row.word!r}, said {row.said!r}, ranked {row.ranked}")
    title = f"{data}; lm={config.lm}, {model.encoder.config.kind} encoder, fusion={model.fusion}, train={config.train}"
    plot_curves(run.out / "curves.png", run.out / "log.jsonl", title)
    plot_results(run.out / "results.png", table, f"{title}: 95 % intervals over objects")
    plot_way(run.out / "prefix_way.png", pd.read_csv(run.out / "trajectory.csv", keep_default_na=False), space, title)
    if model.fusion != "cross":  # there neural tokens never ask
        ids = subset(sets["trial"] if len(sets["trial"]) else sets["val"], config)
        for name, measure, draw in (("query_key", query_key, plot_query_key), ("logit_lens", logit_lens, plot_lens)):
            found = measure(run, model, text, trials, ids, words)
            write_aside(run.out / f"{name}.csv", found.assign(data=data).to_csv(index=False))
            draw(run.out / f"{name}.png", found, title)


# ---- the four questions

class Bench:
    """What every job of an analysis begins with: trials cut and split under changed options, a new model and its text."""

    def __init__(self, run, config, **options):
        self.run, self.config = run, replace(config, init_from="scratch", **options)
        self.trials, self.sets, self.manifest = prepare(self.config, self.config.dataset)
        torch.manual_seed(key_seed(run.seed))
        self.model, tokenizer, _ = build(self.config, self.trials, run)
        self.text = Text(tokenizer, self.trials, set(self.manifest["held_out_words"]), self.config)
        self.space = WordSpace(self.model.lm.transformer.wte.weight)

    def fit(self, ids=None, at=lambda step: None):
        return fit(self.run, self.model, self.text, self.trials, self.sets["train"] if ids is None else ids, self.config, self.config.analysis_iters,
                   self.space, at, alone=True)

    def top1(self, name, words=None, occlude=None, **keys):
        """Closed-set top-1 of an evaluation set, among `words` (all of the set's), beside its shuffled EEG: a row of results.csv."""
        run, ids = self.run, self.sets[name]
        words = sorted(words or set(self.trials.table.word.iloc[ids]))
        ids = subset(ids[self.trials.table.word.iloc[ids].isin(words).to_numpy()], self.config)
        table = self.trials.table.iloc[ids]
        truth = np.array([words.index(w) for w in table.word])
        scores, empty = rank(run, self.model, self.text, self.trials, ids, words, occlude=occlude)
        good = top_k(scores - empty, 1)
        observed = good[np.arange(len(ids)), truth]
        each, p = permuted(good[:, truth].T, strata(table), self.config.shuffles, run.seed)
        mean, low, high = over_objects(observed, table.object.to_numpy(), self.config.shuffles, run.seed)
        run.print(f"{' '.join(f'{k}={v}' for k, v in keys.items())} {name}: top-1 {mean:.3f} [{low:.3f}, {high:.3f}] beside {1 / len(words):.3f} of chance, "
                  f"{each.mean():.3f} shuffled, n = {len(ids)}")
        return dict(score=mean, chance=1 / len(words), low=low, high=high, n=len(ids), set=name, metric="top1", shuffled=each.mean(), p=p,
                    data=self.trials.data, **keys)


def sweep(run, jobs, work, draw):
    """Deal jobs (dicts of keys) over the workers, skip those whose rows are there, merge, draw(table) → figure, close. work(job): its rows, written
    when all are there, so that a job that was cut short is done again."""
    done = run.rows()
    for job in run.share(jobs):
        if not len(done) or not np.all([done.get(k, pd.Series(dtype=object)).eq(v) for k, v in job.items()], 0).any():
            for row in work(job):
                run.result(**row)
    table = run.merge()
    if run.master and len(table):
        save_figure(draw(table), run.out / f"{run.config.analysis}.png")
        run.print(f"{run.config.analysis}.png and results.csv in {run.out}")
    run.close()


def analyse_window(run, config):
    """How much does EEG from before or after the picture matter? A model trained and scored on each window (before the picture: must be chance), on
    windows that grow, and the model of the whole window with a part of it silenced."""
    T, step = config.t_end, 0.1
    starts = [round(a, 3) for a in np.arange(-2 * step, T - step / 2, step)]
    jobs = [dict(kind="window", start=a, end=round(a + step, 3)) for a in starts] + [dict(kind="growing", start=0.0, end=round(b, 3)) for b in
                                                                                   np.arange(2 * step, T + step / 2, step)] + [dict(kind="occluded")]

    def work(job):
        if job["kind"] != "occluded":
            bench = Bench(run, config, t_start=job["start"], t_end=job["end"], widen=0.0)
            bench.fit()
            return [bench.top1("trial", **job)]
        bench, rows = Bench(run, config), []
        bench.fit()
        for a in starts:
            samples = np.flatnonzero((bench.trials.offsets >= round(a * bench.trials.sfreq)) & (bench.trials.offsets < round((a + step) * bench.trials.sfreq)))
            if len(samples):
                rows.append(bench.top1("trial", occlude=samples, kind="occluded", start=a, end=round(a + step, 3)))
        return rows

    def draw(table):
        figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
        for k, (kind, part) in enumerate(table.groupby("kind", sort=False)):
            part = part.sort_values("end")
            x = 1e3 * (part.end if kind == "growing" else (part.start + part.end) / 2)
            label = dict(window="trained on these 100 ms", growing="trained from 0 to here", occluded="trained on all, these 100 ms silenced")[kind]
            axis.errorbar(x, part.score, yerr=spread(part), fmt="-o", ms=4, capsize=2, c=f"C{k}", label=label)
        axis.axhline(table.chance.iloc[0], c="k", ls=":", lw=0.8, label="chance")
        part = table[table.kind == "window"].sort_values("start")
        axis.plot(1e3 * (part.start + part.end) / 2, part.shuffled, c="0.6", lw=1, label="shuffled EEG")
        axis.axvline(0, c="0.8", zorder=0)
        axis.set(xlabel="ms from the picture's onset", ylabel="closed-set top-1, trial set", ylim=(0, None))
        axis.legend(fontsize=8, frameon=False)
        axis.set_title(f"which EEG matters; {table.data.iloc[0]}, {config.analysis_iters} steps each (95 % over objects)", fontsize=10)
        return figure

    sweep(run, jobs, work, draw)


def analyse_frozen(run, config, samples=8, length=48):
    """Does fine-tuning a GPT make names that were not in training effectively unsayable? The same run with the language model frozen and with it
    learning: log-probability and place of held-out names for EEG of their objects, how often one is said by sampling, and the drift from the GPT
    (KL, nats per token) on text that the GPT itself wrote."""
    jobs = [dict(train=arm) for arm in ("encoder+expert", "all")]

    def work(job):
        bench = Bench(run, config, train=job["train"], core_lr=config.expert_lr, eval_interval=max(1, config.analysis_iters // 5))
        model, text, trials = bench.model, bench.text, bench.trials
        original = copy.deepcopy(model.lm).eval()
        ids, held = subset(bench.sets["object"], config), sorted(bench.manifest["held_out_words"])
        begin = [text.encode("<|endoftext|>") if text.tokenizer.eot is not None else text.prompt] * samples
        neutral = original.generate(begin, length, seed=key_seed(run.seed, "neutral"))
        neutral = torch.tensor([b + row + [0] * (length - len(row)) for b, row in zip(begin, neutral)], device=run.device)
        truth, objects, rows = np.array([trials.words.index(w) for w in trials.table.word.iloc[ids]]), trials.table.object.iloc[ids].to_numpy(), []
        tokens = np.mean([len(text.ids[w]) + 1 for w in trials.table.word.iloc[ids]])  # of a name and its stop

        def at(step):
            scores, _ = rank(run, model, text, trials, ids, trials.words)
            mine, places = (s[np.arange(len(ids)), truth] for s in (scores, place(scores)))
            said = [say(run, model, text, trials, ids, config, silent=silent, temperature=1.0) for silent in (False, True)]
            with torch.no_grad():
                p, q = (lm(neutral).logits.float().log_softmax(-1) for lm in (original, model.lm))
                kl = (p.exp() * (p - q)).sum(-1).mean(1).cpu().numpy()  # (samples,)
            K = len(trials.words)
            for metric, values, chance in (("log-probability", mine, -math.log(model.lm.config.vocab_size) * tokens),
                                           ("place among all names", places, 0.5),
                                           ("said", [any(flexible(a, w) for w in held) for a in said[0]], len(held) / K),
                                           ("said without EEG", [any(flexible(a, w) for w in held) for a in said[1]], len(held) / K)):
                mean, low, high = over_objects(np.asarray(values, float), objects, config.shuffles, run.seed)
                rows.append(dict(score=mean, chance=chance, low=low, high=high, n=len(ids), metric=metric, step=step, set="object", data=trials.data, **job))
            half = 1.96 * kl.std(ddof=1) / math.sqrt(len(kl))
            rows.append(dict(score=kl.mean(), chance=0.0, low=kl.mean() - half, high=kl.mean() + half, n=len(kl), metric="drift", step=step,
                             set="neutral text", data=trials.data, **job))
            run.print(f"train={job['train']} step {step}: held-out names log-probability {mine.mean():.2f}, place {places.mean():.3f}, "
                      f"drift {kl.mean():.4f} nats")

        bench.fit(at=at)
        return rows + [bench.top1(name, **job) for name in ("trial", "object")]

    def draw(table):
        metrics = ["log-probability", "place among all names", "said", "drift"]
        figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
        for axis, metric in zip(axes, metrics):
            for k, (arm, part) in enumerate(table[table.metric == metric].groupby("train", sort=False)):
                axis.errorbar(part.step, part.score, yerr=spread(part), fmt="-o", ms=4, capsize=2,
                              c=f"C{k}", label="fine-tuned GPT" if arm == "all" else "frozen GPT")
            axis.set(xlabel="step", title={"said": "held-out name said by sampling", "drift": "KL from the GPT, neutral text (nats)"}.get(metric, metric))
            axis.title.set_fontsize(10)
        axes[1].invert_yaxis()
        axes[0].legend(frameon=False)
        figure.suptitle(f"names that were never in training, EEG of their objects; {table.data.iloc[0]} (95 % over objects)", fontsize=10)
        return figure

    sweep(run, jobs, work, draw)


def analyse_generalise(run, config):
    """How well does what was learned from some objects carry over to objects never seen? Top-1 among equally many seen and unseen words, by how many
    words were trained on."""
    trials, sets, _ = prepare(config, config.dataset)
    seen, unseen = (sorted(set(trials.table.word.iloc[sets[name]])) for name in ("train", "object"))
    order = list(np.random.default_rng(key_seed(config.split_seed, "generalise")).permutation(seen))
    least = min(len(unseen), len(seen))
    sizes = sorted({int(n) for n in np.geomspace(least, len(seen), 4).round()})

    def work(job):
        bench = Bench(run, config)
        ids = bench.sets["train"]
        bench.fit(ids[bench.trials.table.word.iloc[ids].isin(order[:job["trained"]]).to_numpy()])
        return [bench.top1("trial", words=order[:least], **job), bench.top1("object", words=unseen[:least], **job)]

    def draw(table):
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        for k, (name, part) in enumerate(table.groupby("set", sort=False)):
            part = part.sort_values("trained")
            axis.errorbar(part.trained, part.score, yerr=spread(part), fmt="-o", ms=4, capsize=2, c=f"C{k}",
                          label=f"{'unseen' if name == 'object' else 'seen'} words")
        axis.axhline(table.chance.iloc[0], c="k", ls=":", lw=0.8, label="chance")
        axis.set(xlabel="words in training", ylabel=f"top-1 among {least} words", ylim=(0, None), xscale="log", xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
        axis.legend(frameon=False)
        axis.set_title(f"seen and unseen objects; {table.data.iloc[0]}, {config.analysis_iters} steps each", fontsize=10)
        return figure

    sweep(run, [dict(trained=n) for n in sizes], work, draw)


def sensible(config):
    """Whether options go together."""
    try:
        return config.check() is None
    except ValueError:
        return False


def analyse_architecture(run, config):
    """Are there better architectures? Encoders, fusions, positions and masks at equal steps, one change at a time."""
    base = dict(encoder=config.encoder, fusion=config.fusion, text_positions=config.text_positions, prefix_attention=config.prefix_attention,
                train=config.train, tokens=config.tokens, whole=config.whole)
    changes = [*[dict(encoder=e) for e in ("linear", "transformer", "conv", "tsconv")], *[dict(fusion=f) for f in ("prefix", "expert", "cross")],
               dict(text_positions="after_prefix"), dict(prefix_attention="full"), dict(train="encoder"), dict(tokens="electrode", encoder="transformer"),
               dict(whole=False)]
    jobs = [base] + [job for job in ({**base, **c} for c in changes) if job != base and sensible(replace(config, **job))]

    def work(job):
        bench = Bench(run, config, **job)
        start = time.perf_counter()
        bench.fit()
        took, learned = time.perf_counter() - start, sum(p.numel() for p in bench.model.parameters() if p.requires_grad)
        run.print(f"    {learned / 1e6:.2f} M parameters learn, {1e3 * took / config.analysis_iters:.0f} ms per step")
        size = dict(learned=learned, encoder_parameters=sum(p.numel() for p in bench.model.encoder.parameters()))
        return [bench.top1(name, **job, **size) for name in ("trial", "object")]

    def draw(table):
        named = ["as it is" if all(row[k] == v for k, v in base.items()) else ", ".join(f"{k}={row[k]}" for k, v in base.items() if row[k] != v)
                 for row in table.to_dict("records")]
        table = table.assign(name=[f"{n} ({m / 1e6:.2f} M)" for n, m in zip(named, table.learned)])
        figure, axes = plt.subplots(1, 2, figsize=(11, 0.32 * len(jobs) + 1.6), layout="constrained", sharey=True)
        for axis, name in zip(axes, ("trial", "object")):
            part = table[table.set == name].iloc[::-1]
            axis.errorbar(part.score, part.name, xerr=spread(part), fmt="o", capsize=2)
            axis.plot(part.shuffled, part.name, "x", c="0.6", label="shuffled EEG")
            axis.axvline(part.chance.iloc[0], c="k", ls=":", lw=0.8, label="chance")
            axis.set(xlabel=f"closed-set top-1, {name} set", xlim=(0, None))
        axes[0].legend(frameon=False, fontsize=8)
        figure.suptitle(f"one change at a time (parameters learned), {config.analysis_iters} steps; {table.data.iloc[0]} (95 % over objects)", fontsize=10)
        return figure

    sweep(run, jobs, work, draw)


ANALYSES = dict(window=analyse_window, frozen=analyse_frozen, generalise=analyse_generalise, architecture=analyse_architecture)


if __name__ == "__main__":
    main(configure(Config))
