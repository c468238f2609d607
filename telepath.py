"""Words from EEG: a frozen GPT reads neural tokens before its text and says what was seen.

    python telepath.py batch_size=16             # embedded, after python train.py: synthetic EEG
    python telepath.py minutes=6                 # as many steps as fit into six minutes
    python telepath.py stage=dpo init_from=out/telepath     # preferences, after supervised training
    torchrun --standalone --nproc_per_node=4 telepath.py config/telepath_things_eeg2.yaml
    python telepath.py init_from=resume          # continue after a stop, bit for bit
    python data/synthetic_eeg/prepare.py gain=0 out_dir=data/synthetic_eeg/null   # EEG of noise:
    python telepath.py dataset=synthetic_eeg/null out_dir=out/null                # scores at chance

Neural tokens pass through trained expert copies of the GPT's layers; text passes through the GPT's
own weights, which stay frozen. The four evaluation sets differ in what is new: trial (only the
pictures), subject, object, subject_object. Every score is reported with chance, shuffled EEG, an
empty prefix, the majority word and an interval over objects. telepath_questions.py asks what
matters, and follows the neural tokens through token space.

Wang et al. 2023 (CogVLM); Rafailov et al. 2023 (DPO); Guggenmos et al. 2018 (noise normalisation);
Grootswagers et al. 2022, Gifford et al. 2022 (THINGS-EEG1, 2); Kilgallen et al. 2025, Jo et al.
2024 (what goes wrong: repeated pictures, missing noise baselines).
"""

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import inflect
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.sparse
import scipy.spatial
import scipy.stats
import sklearn.covariance
import torch
from sklearn.decomposition import PCA
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from configurator import Run, configure, key_seed
from convert import load_lm
from data import InputError, write_aside
from data.recording import Recording, named_places, places, read_set
from data.tokens import Tokenizer
from model import (
    ENCODERS,
    GPT,
    EncoderConfig,
    GPTConfig,
    NeuralEncoder,
    NeuralGPT,
    check_choice,
    load_checkpoint,
    load_matching,
)

plt.switch_backend("Agg")

SETS = ("trial", "object", "subject", "subject_object")
CLAMP = 8.0  # SD beyond which whitened samples are clipped
SILENT = 0.1  # share of training trials with silent EEG, so that the model learns an empty prefix
TEMPERATURE = 0.1  # of the alignment loss, over the training words
NEGATIVES_BELOW = 0.5  # dpo: quantile of similarity to the word below which negatives lie
NEGATIVES_TAU = 0.2  # dpo: negatives are drawn in proportion to exp(-similarity / tau)
MATCH = 0.5  # share of a pretrained encoder's weights that must fit
UNSETTLED = 10**9  # max_iters until `minutes` settles it
PROBES = 6  # validation trials whose neural tokens every validation saves


@dataclass
class Config:
    # ---- data
    dataset: str = "synthetic_eeg"  # name under data/, or a folder of recordings with words
    lm: str = "out/train"  # run folder or checkpoint of ours, or a Hugging Face GPT-2
    t_start: float = 0.0  # s from picture onset: start of the window
    t_end: float = 0.6  # s from picture onset: end of the window
    baseline: float = 0.1  # s before onset whose mean is subtracted; 0: none
    # ---- splits
    held_out_subjects: float = 0.25  # share of people never trained on, at least one; 0: none
    held_out_objects: float = 0.17  # share of words never trained on, at least one; 0: none
    held_out_trials: float = 0.17  # share of pictures for evaluation; as many for validation
    split_seed: int = 0  # for the split
    # ---- augmentation of training trials
    synonyms: bool = False  # train on a trial's word or one of its synonyms, with equal chance
    augment: list[str] = field(default_factory=list)  # [pink,blink,...], any of AUGMENT
    augment_share: float = 0.1  # share of trials for each augmentation
    jitter: float = 0.01  # s, maximum random shift of the window
    num_workers: int = 2  # threads that prepare batches; their number changes no result
    # ---- encoder
    encoder: str = "transformer"  # any kind in model.ENCODERS, or pretrained:PATH, a run of ours
    patch: int = 10  # samples per neural token
    width: int = 128  # width of the encoder: width/32 heads, width/4 virtual channels
    encoder_layers: int = 2  # blocks, or convolutions
    dropout: float = 0.2  # in the encoder
    # ---- fusion with the language model
    fusion: Literal["prefix", "expert", "cross"] = "expert"  # plain, experts, cross-attention
    text_positions: Literal["zero", "after_prefix"] = "zero"  # where text positions start
    prefix_attention: Literal["causal", "full"] = "causal"  # among neural tokens
    train: Literal["encoder", "encoder+expert", "all"] = "encoder+expert"  # what to train
    prompt: str = "<|endoftext|>The"  # text before the word; a leading <|endoftext|> is the token
    # ---- objective and optimiser
    stage: Literal["sft", "dpo"] = "sft"  # supervised, or preferences (needs init_from=)
    align: float = 0.5  # weight of the loss that aligns the first neural token with its word
    beta: float = 0.1  # dpo: weight of the reference
    batch_size: int = 16  # trials per micro-batch
    trials_per_step: int = 0  # over all ranks; 0: one micro-batch per rank
    learning_rate: float = 1e-3  # AdamW's peak, for the encoder
    expert_lr: float = 3e-4  # peak for experts, cross-attention and, with train=all, the GPT
    max_iters: int = 1500  # optimiser steps
    minutes: float = 0.0  # replaces max_iters with the number of steps that fit
    warmup_iters: int = 50  # steps of linear warm-up, then cosine to 0
    # ---- evaluation
    eval_interval: int = 250  # steps between validations
    eval_trials: int = 400  # trials to score in each set; 0: all
    shuffles: int = 1000  # permutations of trials, and bootstrap samples of objects
    max_new_tokens: int = 6  # maximum tokens of a generated word
    # ---- run
    out_dir: str = ""  # "": out/telepath or out/telepath_dpo
    init_from: str = "scratch"  # resume, or the folder of an earlier stage with the same split
    overwrite: bool = False  # start over in a folder that holds a run
    seed: int = 1337  # for weights, batches, dropout, shuffles and sampling
    device: str = "auto"  # cuda, mps, cpu
    dtype: str = "auto"  # bfloat16 where it is faster; float16, float32
    compile: bool = False  # compile the language model's blocks
    log_interval: int = 50  # steps between log lines
    save_interval: int = 250  # steps between checkpoints
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = "nanocortex"  # project on Weights & Biases

    POSITIVE = "patch width encoder_layers batch_size shuffles max_new_tokens"
    POSITIVE += " log_interval save_interval eval_interval"
    SHARES = "held_out_subjects held_out_objects held_out_trials augment_share dropout"
    SIGNED = "t_start t_end"
    RENAMED = {"tokens": "encoder", "checkpoint": "encoder", "core_lr": "expert_lr"}
    RENAMED |= {"widen": "t_end", "analysis": "analysis of telepath_questions.py"}

    def check(self):
        if self.t_end <= self.t_start:
            raise InputError(f"t_end={self.t_end} must be later than t_start={self.t_start}")
        for name in self.augment:
            check_choice("augment", name, AUGMENT)
        kind, _, path = self.encoder.partition(":")
        check_choice("encoder", kind, [*ENCODERS, "pretrained"])
        if kind == "pretrained" and not path:
            raise InputError("encoder=pretrained needs a run: encoder=pretrained:out/foundation")
        if self.stage == "dpo" and self.init_from == "scratch":
            raise InputError("stage=dpo continues a supervised run: give init_from=out/telepath")
        if self.fusion == "cross" and self.train == "encoder":
            raise InputError("fusion=cross keeps its gates shut with train=encoder: train more")


# ---- names: which of them count as the same word

PLURALS = inflect.engine()
PLURALS.classical(all=True)  # cacti, indices


def singular(word):
    """Return the form that singular and plural share: bu for bus and buses; princess stays."""
    shorter = len(word) > 2 and not word.endswith("ss") and PLURALS.singular_noun(word)
    return singular(shorter) if shorter not in (False, word) else word


@functools.cache
def words_of(text):
    """Split a name or answer into words without case, accents, marks, plurals or first article."""
    text = unicodedata.normalize("NFKD", text).casefold()
    words = re.findall(r"[^\W_]+", re.sub(r"[\u0300-\u036f]|['’]s\b", "", text))
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return [singular(word) for word in words]


@functools.cache
def same_word(word):
    """Return a key that spellings of a word share, in any case or number: icecream, Ice-creams."""
    return "".join(words_of(word)) or word


def flexible(answer, word, synonyms=()):
    """Return whether an answer names the word or a synonym, as whole words in any form."""
    first_line = " ".join(words_of(answer.split("\n")[0]))
    names = [" ".join(words_of(name)) for name in (word, *synonyms)]
    return any(name and f" {name} " in f" {first_line} " for name in names)


# ---- data: trials


class Trials:
    """Windows of EEG around named pictures, cut from continuous recordings.

    table: one row per trial (recording: its index, subject, row in the signal, trial: its name,
    object, word, synonyms, image, block). words, subjects: sorted names; word, subject (N,): their
    indices, -1 for held-out people. xyz (R, C, 3): all channels of R recordings, nan where one is
    absent. white (R, C, C), scale (R, C) in V: see learn.
    """

    def __init__(self, folder, config, pretrained=None):
        meta = read_set(folder)
        self.source = Path(folder).name
        self.caption = self.source + ", synthetic" * meta["synthetic"]
        self.recordings = [Recording(Path(folder) / name) for name in meta["recordings"]]
        self.sfreq = self.recordings[0].sfreq
        first, last = round(config.t_start * self.sfreq), round(config.t_end * self.sfreq)
        self.offsets = np.arange(first, last)  # samples of the window, from onset
        self.before = np.arange(-round(config.baseline * self.sfreq), 0)
        if not len(self.offsets):
            raise InputError(f"t_end={config.t_end}: the window has no sample at {self.sfreq:g} Hz")
        margin = round(config.jitter * self.sfreq)
        read = np.concatenate([self.before, self.offsets])
        self.reach = (read.min() - margin, read.max() + margin)  # samples that a trial may read
        self.notes = []
        names = pd.Index(itertools.chain(*(rec.names for rec in self.recordings))).unique()
        self.xyz = np.full((len(self.recordings), len(names), 3), np.nan, np.float32)
        self.columns = []  # indices of each recording's channels in x and xyz
        parts = []
        for number, rec in enumerate(self.recordings):
            self.check_channels(rec, (pretrained or {}).get("recording"))
            self.columns.append(names.get_indexer(rec.names))
            self.xyz[number, self.columns[number]] = np.where(rec.good[:, None], rec.xyz, np.nan)
            parts.append(self.read_events(rec).assign(recording=number, subject=rec.subject))
        self.table = pd.concat(parts, ignore_index=True)
        spellings = self.table.word.groupby(self.table.word.map(same_word))
        self.table["word"] = spellings.transform(lambda words: words.mode()[0])  # most common
        self.words = sorted(set(self.table.word))
        self.word = np.searchsorted(self.words, self.table.word)
        self.recording = self.table.recording.to_numpy()
        self.row = self.table.row.to_numpy()

    def check_channels(self, rec, recipe):
        """Mark channels that are flat or hold nan as bad; refuse those without a place.

        Channels that a pretrained encoder knows by name take their places from its recipe.
        """
        if recipe:
            if recipe["bands"]:
                raise InputError("encoder=: pretrained on bands; give one pretrained with bands=[]")
            xyz = places(rec.names, rec.xyz, np.ones(len(rec.names), bool), recipe["grid"])
            rec.xyz, counts = named_places(rec.names, xyz, recipe)
            self.notes.append(
                f"{rec.path.name}: {counts['name']} channels matched by name, {counts['position']} "
                f"by position, {counts['absent']} without a place; pretrained at "
                f"{recipe['sfreq']:g} Hz, read at {self.sfreq:g} Hz"
            )
        names = np.array(rec.names)
        span = np.ptp(rec.signal, axis=0)  # nan if any sample is
        useless = rec.good & ~((span > 0) & np.isfinite(span))
        rec.good = rec.good & ~useless
        if useless.any():
            listed = ", ".join(names[useless])
            self.notes.append(f"{rec.path.name}: {listed} flat or with nan, left out")
        unplaced = names[rec.good & ~np.isfinite(rec.xyz).all(1)]
        if len(unplaced):
            remedy = "prepare it with montage=colin27_1005, or mark it bad"
            raise InputError(f"{rec.path}: channel {unplaced[0]} has no position x, y, z: {remedy}")
        if rec.sfreq != self.sfreq or not rec.good.any():
            raise InputError(f"{rec.path} has another rate, or no good channel: prepare it again")

    def read_events(self, rec):
        """Return events that have a word and whose window lies inside, clear of BAD segments."""
        events = rec.events.assign(row=rec.rows(rec.events["onset"]))
        events["trial"] = rec.path.name + ":" + events["row"].astype(str)
        minute = "minute " + (events["row"] // round(60 * self.sfreq)).astype(str)
        nothing = pd.Series("", events.index)
        events["word"] = events.get("word", nothing).str.strip()
        defaults = {"object": events["word"], "image": events["trial"], "block": minute}
        for column, default in {**defaults, "synonyms": "", "target": ""}.items():
            values = events.get(column, nothing).fillna("").astype(str)
            events[column] = values.where(values != "", default)
        events = events[(events["word"] != "") & ~events["target"].isin(["1", "1.0", "True"])]
        first, last = self.reach
        inside = (events["row"] + first >= 0) & (events["row"] + last < len(rec.signal))
        if "epoch_samples" in rec.meta:  # ready-made epochs, concatenated
            begin = round(rec.meta["epoch_tmin"] * rec.sfreq)
            inside &= begin <= first and last < begin + rec.meta["epoch_samples"]
        for span in rec.meta.get("bad_spans", []):
            begin, end = rec.rows(span)
            inside &= (events["row"] + last < begin) | (events["row"] + first >= end)
        if not inside.any():
            problem = "has no events with a word whose window lies inside the recording or epoch"
            remedy = "prepare it with word_column=, or change t_start, t_end or jitter"
            raise InputError(f"{rec.path}: subject {rec.subject} {problem}: {remedy}")
        if not inside.all():
            self.notes.append(f"{rec.path.name}: {(~inside).sum()} trials outside or BAD, left out")
        return events[inside]

    def cut(self, ids, shift=0):
        """Cut baseline-corrected windows (B, C, T) in V, `shift` (B,) samples late; absent: 0."""
        x = np.zeros((len(ids), self.xyz.shape[1], len(self.offsets)), np.float32)
        onsets = self.row[ids] + shift
        for number in np.unique(self.recording[ids]):
            rec = self.recordings[number]
            rows = np.flatnonzero(self.recording[ids] == number)
            part = rec.signal[onsets[rows, None] + self.offsets]  # (b, T, c)
            if len(self.before):
                part = part - rec.signal[onsets[rows, None] + self.before].mean(1, keepdims=True)
            part = np.where(rec.good, part, 0).transpose(0, 2, 1)
            x[np.ix_(rows, self.columns[number])] = part
        return x

    def batch(self, ids, device="cpu", x=None, xyz=None):
        """Return whitened x (B, C, T), xyz and subject (B,); x in V and xyz may be augmented."""
        recording = self.recording[ids]
        if x is None:
            x = self.cut(ids)
            xyz = self.xyz[recording]
        x = np.clip(self.white[recording] @ x, -CLAMP, CLAMP)
        return [torch.from_numpy(array).to(device) for array in (x, xyz, self.subject[ids])]

    def learn(self, train, held_out_subjects):
        """Index the people, and learn noise normalisation and scales from the trials `train` alone.

        Recordings with fewer than two such trials take the mean over the rest, channel by channel.
        """
        self.subjects = sorted(set(self.table.subject) - set(held_out_subjects))
        self.subject = pd.Index(self.subjects).get_indexer(self.table.subject)
        rng = np.random.default_rng(0)
        present = np.isfinite(self.xyz[..., 0])
        R, C = present.shape
        covariances = np.zeros((R, C, C))
        for number, channels in enumerate(present):
            ids = train[self.recording[train] == number]
            if len(ids) > 1:
                x = self.cut(np.sort(rng.permutation(ids)[:600]))[:, channels]
                covariances[number][np.ix_(channels, channels)] = noise_covariance(x)
        mean = covariances.sum(0) / np.maximum((covariances != 0).sum(0), 1)
        variance = mean.diagonal()
        mean += np.diag(np.where(variance == 0, variance[variance > 0].mean(), 0))
        self.scale = np.zeros((R, C), np.float32)
        self.white = np.zeros((R, C, C), np.float32)
        for number, channels in enumerate(present):
            covariance = covariances[number] if covariances[number].any() else mean
            covariance = covariance[np.ix_(channels, channels)]
            self.scale[number, channels] = 1e-6 * np.sqrt(covariance.diagonal())
            values, vectors = np.linalg.eigh(covariance)
            values = np.maximum(values, 1e-2 * np.median(values) + 1e-9)
            root = (vectors / np.sqrt(values)) @ vectors.T
            self.white[number][np.ix_(channels, channels)] = 1e6 * root  # V to SD of the noise


def noise_covariance(x):
    """Return the shrunk covariance (c, c) in µV² of windows (n, c, T) in V minus their mean."""
    x = (x - x.mean(0)).transpose(0, 2, 1).reshape(-1, x.shape[1]).astype(float) * 1e6
    limit = 10 * 1.4826 * np.median(np.abs(x)) + 1e-9
    x = x / np.maximum(1, np.abs(x).max(1, keepdims=True) / limit)  # a blink must not dominate
    return sklearn.covariance.ledoit_wolf(x[::2])[0]  # neighbouring samples are nearly the same


# ---- data: splits


def split(trials, config):
    """Return {side: sorted trial indices} of train, val and the evaluation sets, and a manifest.

    Words are held out whole, with all their objects; so are people. Pictures go to training,
    validation or evaluation together with the blocks that show them. The split drops training and
    validation trials whose window overlaps one of another side, and trials whose word or person
    counts as seen but has no training trial.
    """
    table = trials.table
    rng = np.random.default_rng(key_seed(config.split_seed, "split"))
    held_words = hold_out(rng, table.word, config.held_out_objects)
    held_subjects = hold_out(rng, table.subject, config.held_out_subjects)
    part = deal_pictures(trials, rng, config.held_out_trials)
    new_word = table.word.isin(held_words).to_numpy()
    new_subject = table.subject.isin(held_subjects).to_numpy()
    neither_new = ~new_word & ~new_subject
    side = np.select([neither_new, ~new_subject, ~new_word], SETS[:3], SETS[3]).astype(object)
    side[part != 2] = ""
    side[neither_new & (part == 0)] = "train"
    side[neither_new & (part == 1)] = "val"
    n_purged = purge(trials, side, "val", part == 2)
    n_purged += purge(trials, side, "train", (part == 2) | (side == "val"))
    for column, names in (("word", ("trial", "subject")), ("subject", ("trial", "object"))):
        trained = table[column].isin(table[column][side == "train"])
        side[~trained & np.isin(side, ("val", *names))] = ""
    sets = {name: np.flatnonzero(side == name) for name in ("train", "val", *SETS)}
    if not all([len(sets["train"]), len(sets["val"]), sum(len(sets[name]) for name in SETS)]):
        raise InputError(
            f"{trials.source}: the split leaves no trial to train, validate or evaluate on: change "
            "held_out_trials, held_out_objects or held_out_subjects; if every word has only one "
            "picture, name the column that tells pictures apart when preparing (image_column=)"
        )
    manifest = {
        "dataset": trials.source,
        "purged": n_purged,
        "held_out_words": sorted(held_words),
        "held_out_subjects": sorted(held_subjects),
        "sets": {name: table.trial.iloc[ids].tolist() for name, ids in sets.items()},
    }
    text = json.dumps(manifest, sort_keys=True)
    manifest["hash"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return sets, manifest


def hold_out(rng, names, share):
    """Draw a share of the unique names, at least one and never all; none if share is 0."""
    names = sorted(set(names))
    if not share or len(names) < 2:
        return set()
    n_held_out = min(max(1, round(share * len(names))), len(names) - 1)
    return set(rng.permutation(names)[:n_held_out])


def deal_pictures(trials, rng, share):
    """Assign each trial a part: 0 training, 1 validation, 2 evaluation, -1 none."""
    table = trials.table
    blocks = (table.recording.astype(str) + "/" + table.block).factorize()[0]
    images = table.image.factorize()[0]
    n_blocks, n_images = blocks.max() + 1, images.max() + 1
    nodes = [n_blocks + n_images] * 2
    graph = scipy.sparse.coo_matrix((np.ones(len(table)), (blocks, images + n_blocks)), nodes)
    n_groups, group = scipy.sparse.csgraph.connected_components(graph, directed=False)
    if n_groups >= 6:  # groups that share neither pictures nor blocks
        return deal(rng, group[blocks], share)
    by_block = deal(rng, blocks, share)
    by_image = deal(rng, images, share)
    return np.where(by_block == by_image, by_block, -1)


def deal(rng, codes, share):
    """Deal codes (N,) to evaluation (2), as many to validation (1), the rest to training (0)."""
    order = rng.permutation(codes.max() + 1)
    n_held_out = max(1, round(share * len(order)))
    parts = np.zeros(len(order), int)
    parts[order[:n_held_out]] = 2
    parts[order[n_held_out : 2 * n_held_out]] = 1
    return parts[codes]


def purge(trials, side, name, protected):
    """Take trials off a side that may read samples of the protected ones; return how many."""
    ids = np.flatnonzero(side == name)
    length = trials.reach[1] - trials.reach[0]
    times = trials.row + 1e12 * trials.recording  # recordings are far apart
    nearest = scipy.spatial.KDTree(times[protected, None]).query(times[ids, None])[0]
    side[ids[nearest <= length]] = ""
    return (nearest <= length).sum().item()


# ---- data: augmentation
# Each takes a window x (C, T) in V of the electrodes that are present, rng, scale (C,): the SD of
# their noise in V, xyz (C, 3) in m and sfreq (Hz).


def smooth_topography(rng, xyz):
    """Draw weights (C, 1) of unit RMS that vary smoothly over the head: a random curved plane."""
    xyz = xyz / 0.1
    terms = np.column_stack([np.ones(len(xyz)), xyz, xyz[:, :2] ** 2])
    weights = terms @ rng.normal(size=6)
    return weights[:, None] / np.sqrt(np.mean(weights**2))


def pink(x, rng, scale, xyz, sfreq):
    """Add background noise with a 1 / f spectrum that neighbours (5 cm) share."""
    T = x.shape[1]
    f = np.fft.rfftfreq(2 * T, 1 / sfreq)  # twice as long, so that the noise does not wrap around
    f[0] = np.inf
    real, imaginary = rng.normal(size=(2, len(x), len(f))) / np.sqrt(f)
    distance = scipy.spatial.distance.cdist(xyz, xyz)
    noise = np.exp(-(distance**2) / (2 * 0.05**2)) @ np.fft.irfft(real + 1j * imaginary)[:, :T]
    return x + scale[:, None] * noise / noise.std(1, keepdims=True)


def line(x, rng, scale, xyz, sfreq):
    """Add mains noise at 50 or 60 Hz, with harmonics up to half of sfreq and drifting phase."""
    t = np.arange(x.shape[1]) / sfreq
    mains = rng.choice([50, 60])
    noise = np.zeros(len(t))
    for harmonic in (1, 2, 3):
        if harmonic * mains <= sfreq / 2:
            phase = rng.uniform(0, 2 * np.pi) + 0.02 * np.cumsum(rng.normal(size=len(t)))
            noise += np.sin(2 * np.pi * harmonic * mains * t + phase) / harmonic**2
    return x + scale[:, None] * smooth_topography(rng, xyz) * noise


def blink(x, rng, scale, xyz, sfreq):
    """Add a blink of a fifth of a second, largest near the eyes."""
    eyes = [[0.03, 0.1, -0.02], [-0.03, 0.1, -0.02]]
    distance = scipy.spatial.distance.cdist(xyz, eyes)
    near = np.exp(-(distance**2) / (2 * 0.05**2)).sum(1, keepdims=True)  # (C, 1)
    t = np.arange(x.shape[1]) / sfreq
    shape = np.exp(-0.5 * ((t - rng.uniform(0, t[-1])) / rng.uniform(0.05, 0.1)) ** 2)
    return x + 10 * np.median(scale) * near * shape


def muscle(x, rng, scale, xyz, sfreq):
    """Add a burst of 20 to 100 Hz at the lower edge of the cap, above the jaw."""
    side = np.abs(xyz[:, :1]) / 0.1
    height = xyz[:, 2:] / 0.1
    edge = np.exp(-((side - 0.8) ** 2) / 0.1 - np.maximum(height - 0.3, 0) / 0.3)
    T = x.shape[1]
    f = np.fft.rfftfreq(T, 1 / sfreq)
    spectrum = np.fft.rfft(rng.normal(size=x.shape)) * ((f >= 20) & (f <= 100))
    burst = np.exp(-0.5 * ((np.linspace(0, 1, T) - rng.uniform()) / 0.2) ** 2)
    return x + 3 * scale[:, None] * edge * np.fft.irfft(spectrum, n=T) * burst


def drift(x, rng, scale, xyz, sfreq):
    """Add a slow random walk that is smooth over the head."""
    walk = np.cumsum(rng.normal(size=x.shape[1]))
    walk /= np.abs(walk).max()
    return x + 3 * scale[:, None] * smooth_topography(rng, xyz) * walk


def pop(x, rng, scale, xyz, sfreq):
    """Make one electrode jump and recover within some 100 ms."""
    t = np.arange(x.shape[1]) / sfreq
    delay = t - rng.uniform(0, t[-1])  # s since the jump
    electrode = rng.integers(len(x))
    size = rng.choice([-10, 10]) * scale[electrode]
    x[electrode] += np.where(delay >= 0, size * np.exp(-np.abs(delay) / 0.1), 0)
    return x


def drop(x, rng, scale, xyz, sfreq):
    """Drop a fifth of the electrodes: sets nan in xyz, in place."""
    dropped = rng.random(len(x)) < 0.2
    dropped[rng.integers(len(x))] = False
    xyz[dropped] = np.nan
    return np.where(dropped[:, None], 0, x)


def reference(x, rng, scale, xyz, sfreq):
    """Re-reference: subtract part of one electrode's signal from all electrodes."""
    return x - rng.uniform() * x[rng.integers(len(x))]


def gain(x, rng, scale, xyz, sfreq):
    """Scale by 0.6 to 1.6, like another amplifier or a thicker skull."""
    return x * np.exp(rng.uniform(-0.5, 0.5))


AUGMENT = {f.__name__: f for f in (pink, line, blink, muscle, drift, pop, drop, reference, gain)}


def augmented(x, xyz, scale, rng, sfreq, config):
    """Apply every augmentation to its share of trials; return windows (B, C, T) in V and places."""
    xyz = xyz.copy()
    for name in config.augment:
        for i in np.flatnonzero(rng.random(len(x)) < config.augment_share):
            present = np.flatnonzero(np.isfinite(xyz[i, :, 0]))
            present_xyz = xyz[i, present]
            present_scale = scale[i, present]
            x[i, present] = AUGMENT[name](x[i, present], rng, present_scale, present_xyz, sfreq)
            xyz[i, present] = present_xyz  # drop changes it
    return x, xyz


# ---- data: batches


@dataclass
class Batch:
    """A micro-batch of training trials."""

    inputs: list  # of NeuralGPT: signal (B, C, T), xyz, subject, idx (B, L), position, mask
    target: torch.Tensor  # (B, K, W) token ids, see Text.pack
    word: torch.Tensor  # (B,) index among the training words, -1 where the EEG is silence


def draw_trials(training, number):
    """Draw trials (B,) of micro-batch `number`: people in turn, reshuffled every epoch."""
    config = training.config
    ids = []
    for k in range(number * config.batch_size, (number + 1) * config.batch_size):
        turn, person = divmod(k, len(training.by_person))
        person_ids = training.by_person[person]
        epoch, i = divmod(turn, len(person_ids))
        rng = np.random.default_rng(key_seed(config.seed, "epoch", person, epoch))
        ids.append(rng.permutation(person_ids)[i])
    return np.array(ids)


def make_batch(training, number):
    """Make micro-batch `number`, which keys its jitter, noise, silence, synonyms and negatives."""
    config = training.config
    experiment = training.experiment
    trials, text = experiment.trials, experiment.text
    rng = np.random.default_rng(key_seed(*training.key(number), "augment"))
    ids = draw_trials(training, number)
    jitter = round(config.jitter * trials.sfreq)  # samples
    x = trials.cut(ids, rng.integers(-jitter, jitter + 1, len(ids)))
    recording = trials.recording[ids]
    xyz, scale = trials.xyz[recording], trials.scale[recording]
    x, xyz = augmented(x, xyz, scale, rng, trials.sfreq, config)
    words = trials.table.word.iloc[ids]
    word = np.searchsorted(experiment.train_words, words)
    if config.stage == "sft":
        silent = rng.random(len(ids)) < SILENT
        x[silent] = 0
        word[silent] = -1
    names = [[rng.choice(text.trained[word])] for word in words]
    if config.stage == "dpo":
        rng = np.random.default_rng(key_seed(*training.key(number), "negatives"))
        for row, shares in zip(names, experiment.negatives[word]):
            row.append(rng.choice(experiment.train_words, p=shares))
    *packed, target = text.pack(names, training.run.device)
    inputs = [*trials.batch(ids, training.run.device, x, xyz), *packed]
    return Batch(inputs, target, torch.from_numpy(word).to(training.run.device))


# ---- names as tokens


class Text:
    """Names as tokens of the language model: prompt + ' name' + <|endoftext|> (or a line break).

    ids: {name: token ids}; synonyms: {word: other right answers}; trained: {word: names that its
    trials are trained on}, none of them a held-out word in any spelling.
    """

    def __init__(self, tokenizer, trials, held_out, config):
        self.tokenizer = tokenizer
        text = config.prompt.removeprefix("<|endoftext|>")
        self.prompt = [tokenizer.eot] * (text != config.prompt) + tokenizer.encode(text)
        if not self.prompt or self.prompt[0] is None:
            raise InputError("prompt= is empty, or lm= has no <|endoftext|>: give prompt=The")
        self.start = len(self.prompt) - 1  # where slots start in a row, see pack
        self.stop = tokenizer.encode("\n")[-1] if tokenizer.eot is None else tokenizer.eot
        held_out = set(map(same_word, held_out))
        self.ids, self.synonyms, self.trained = {}, {}, {}
        for word, synonyms in trials.table.groupby("word").synonyms.unique().items():
            names = dict.fromkeys("|".join(synonyms).split("|"))
            self.synonyms[word] = [name for name in names if name not in ("", word)]
            self.trained[word] = [word]
            for name in self.synonyms[word]:
                if config.synonyms and same_word(name) not in held_out:
                    self.trained[word].append(name)
            for name in self.trained[word]:
                self.ids[name] = tokenizer.encode(" " + name)

    def pack(self, rows, device="cpu"):
        """Pack B rows of K names: idx (B, T), position (T,), mask (T, T), target (B, K, W).

        A row is the prompt without its last token, which begins each of K slots of W tokens. A slot
        sees only the prompt and itself. Targets are -1 where there is nothing to predict.
        """
        P, B, K = self.start, len(rows), len(rows[0])
        slots, ends = [], []
        for name in itertools.chain(*rows):
            slots.append(torch.tensor([self.prompt[-1], *self.ids[name]]))
            ends.append(torch.tensor([*self.ids[name], self.stop]))
        target = pad_sequence(ends, batch_first=True, padding_value=-1).view(B, K, -1)
        W = target.size(2)
        begin = torch.tensor(self.prompt[:-1], dtype=torch.long).expand(B, -1)
        idx = torch.cat([begin, pad_sequence(slots, batch_first=True).view(B, K * W)], dim=1)
        slot = torch.cat([torch.full((P,), -1), torch.arange(K).repeat_interleave(W)])
        position = torch.cat([torch.arange(P), P + torch.arange(W).repeat(K)])
        mask = (slot[:, None] == slot) | (slot == -1)
        return [tensor.to(device) for tensor in (idx, position, mask.tril(), target)]


def log_probs(logits, target):
    """Return token log-probabilities (B, K, W) from logits (B, K W, V); 0 where target is -1."""
    options = {"ignore_index": -1, "reduction": "none"}
    losses = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), **options)
    return -losses.view_as(target)


def unit(x, smallest=1e-3):
    """Scale x (..., C) to unit length, smoothly near 0, where the direction is undefined."""
    return x / (x.square().sum(-1, keepdim=True) + smallest**2).sqrt()


class WordSpace:
    """Names as points in a token embedding: the mean over their tokens, cleaned, at unit length.

    Cleaning removes the vocabulary's mean and first two principal axes, which all embeddings of a
    GPT share. The space stays fixed while the embedding is trained.
    """

    def __init__(self, wte):
        self.wte = wte.detach().float().cpu().clone()
        pca = PCA(2, svd_solver="covariance_eigh").fit(self.wte.numpy())
        self.mean, self.axes = torch.from_numpy(pca.mean_), torch.from_numpy(pca.components_.T)
        self.size = (self.wte - self.mean).norm(dim=1).mean().item()  # mean norm of a token

    def clean(self, x):
        """Return x (..., C) without the mean and first two axes, at unit length."""
        x = x - self.mean
        return unit(x - (x @ self.axes) @ self.axes.T, 1e-6 * self.size)

    def names(self, ids):
        """Return the points (N, C) of N lists of token ids."""
        return self.clean(torch.stack([self.wte[tokens].mean(0) for tokens in ids]))


# ---- model


def checkpoint_path(path):
    """Return the checkpoint that init_from= or encoder= names: a file, or a run's best.pt."""
    return Path(path) if path.endswith(".pt") else Path(path) / "best.pt"


# options that a checkpoint fixes: its model, the model's input, and the split
FIXED = "lm t_start t_end baseline prompt held_out_subjects held_out_objects held_out_trials"
FIXED += " split_seed encoder patch width encoder_layers dropout fusion text_positions"
FIXED += " prefix_attention"


def earlier(run, config):
    """Load the checkpoint that init_from= names, if any, and adopt its FIXED options."""
    if config.init_from == "scratch":
        return None
    resumed = config.init_from == "resume"
    path = run.out / "ckpt.pt" if resumed else checkpoint_path(config.init_from)
    state = load_checkpoint(path)
    if state["kind"] != "telepath":
        raise InputError(f"{path} is not from telepath.py: give init_from= an earlier run")
    keys = FIXED.split() + ["stage", "train"] * resumed
    user_set = getattr(config, "given", keys)  # a Config made in Python counts as set in full
    for key in keys:
        now = getattr(config, key)
        saved = state["config"].get(key, now)  # an older checkpoint may lack the option
        if saved != now and key in user_set:
            raise InputError(f"{path} has {key}={saved}, not {now}: leave that option out")
        setattr(config, key, saved)
    run.save_config()
    return state


def build(run, config, trials, manifest, pretrained, state):
    """Return NeuralGPT and tokenizer: from lm= and options, or from the checkpoint `state`."""
    if state is None:
        lm, tokenizer = load_lm(config.lm, dropout=0.0)
        encoder = build_encoder(run, config, trials, manifest, pretrained, lm.config.n_embd)
        order = {"text_positions": config.text_positions, "attention": config.prefix_attention}
        model = NeuralGPT(lm, encoder, config.fusion, **order)
        return model.to(run.device), tokenizer
    if state["split"] != manifest["hash"]:
        problem = "was trained on another split and may have seen what is held out here"
        raise InputError(
            f"init_from={config.init_from} {problem}: use the data and options of its config.yaml"
        )
    lm = GPT(GPTConfig(**state["lm_args"]))
    encoder = NeuralEncoder(EncoderConfig(**state["encoder_args"]))
    model = NeuralGPT(lm, encoder, **state["fusion_args"])
    model.load_state_dict(state["model"])
    return model.to(run.device), Tokenizer(state["tokenizer"])


def build_encoder(run, config, trials, manifest, pretrained, n_embd):
    """Build NeuralEncoder from the options, or adapt a pretrained one to people and windows."""
    args = {"kind": config.encoder, "width": config.width, "n_layer": config.encoder_layers}
    args |= {"n_head": math.gcd(config.width, max(1, config.width // 32)), "patch": config.patch}
    args["virtual"] = max(1, config.width // 4)
    if pretrained:
        args = dict(pretrained["encoder_args"])
    args |= {"n_embd": n_embd, "subjects": len(trials.subjects), "dropout": config.dropout}
    args["window"] = len(trials.offsets) // args["patch"]  # the first token reads the whole window
    encoder = NeuralEncoder(EncoderConfig(**args))
    if pretrained:
        seen = eeg_seen(pretrained).get(trials.source)
        if seen not in (None, manifest["hash"]):
            problem = f"encoder={config.encoder} saw EEG of {trials.source} that is held out here"
            raise InputError(f"{problem}: pretrain on other recordings, or on the same split")
        weights = {}
        for name, value in pretrained["model"].items():
            if ".subject_" not in name:  # skip the weights of other people
                weights[name.removeprefix("encoder.")] = value
        load_matching(encoder, weights, 0)  # includes the first token's, if windows are equal
        weights = {name.removeprefix("net."): value for name, value in weights.items()}
        share, new = load_matching(encoder.net, weights, MATCH, config.encoder)
        run.print(f"{config.encoder}: {share:.1%} of the weights are pretrained; new: {new}")
    return encoder


def eeg_seen(state):
    """Return {dataset: split} of all EEG that a checkpoint's encoder was trained on; "": all."""
    if state["kind"] == "telepath":
        return state.get("eeg_seen", {Path(state["config"]["dataset"]).name: state["split"]})
    return {Path(rec["dataset"]).name: "" for rec in state["recording"]["recordings"]}


def freeze(model, config):
    """Freeze all weights but those that config.train names; return the optimiser's groups."""
    parts = {"encoder": 0, "experts": 1, "crosses": 1, "lm": 2}
    n_parts = {"encoder": 1, "encoder+expert": 2, "all": 3}[config.train]
    groups = {}
    for name, p in model.named_parameters():
        part = parts.get(name.split(".")[0], 0)  # BON and EON train with the encoder
        p.requires_grad_(part < n_parts)
        if p.requires_grad:
            peak = config.expert_lr if part else config.learning_rate
            group = {"params": [], "peak": peak, "weight_decay": 0.05 * (p.dim() > 1)}
            groups.setdefault((part, p.dim() > 1), group)["params"].append(p)
    return list(groups.values())


class Experiment:
    """The data, split and model of one run on a dataset's folder. Waits for no other rank.

    trials, text, model, space; sets {name: trial indices}; manifest of the split; state: the
    checkpoint that init_from names, or None; commonest: training words by frequency; train_words:
    the same, sorted; train_points (K, C): these in token space.
    """

    def __init__(self, run, config, folder):
        self.state = earlier(run, config)
        pretrained = None
        kind, _, path = config.encoder.partition(":")
        if kind == "pretrained":
            pretrained = load_checkpoint(checkpoint_path(path))
            if "encoder_args" not in pretrained:
                raise InputError(f"{path} has no encoder: give a run of foundation.py")
        self.trials = Trials(folder, config, pretrained)
        self.sets, self.manifest = split(self.trials, config)
        self.trials.learn(self.sets["train"], self.manifest["held_out_subjects"])
        torch.manual_seed(key_seed(config.seed, "model"))
        args = (run, config, self.trials, self.manifest, pretrained, self.state)
        self.model, tokenizer = build(*args)
        earlier_state = self.state or pretrained
        self.eeg_seen = eeg_seen(earlier_state) if earlier_state else {}
        self.eeg_seen[self.trials.source] = self.manifest["hash"]
        self.text = Text(tokenizer, self.trials, self.manifest["held_out_words"], config)
        wte = self.model.lm.transformer.wte.weight
        self.space = WordSpace((self.state or {}).get("wte", wte))
        n_tokens = 1 + len(self.trials.offsets) // self.model.encoder.config.patch
        n_prompt = len(self.text.prompt)
        options = "prompt= or max_new_tokens="
        self.model.check_length(n_tokens, n_prompt + config.max_new_tokens, options)
        longest = max(self.text.ids, key=lambda name: len(self.text.ids[name]))
        n_name = len(self.text.ids[longest])
        self.model.check_length(n_tokens, n_prompt + n_name, f"the name '{longest}' in {folder}")
        counts = self.trials.table.word.iloc[self.sets["train"]].value_counts()
        self.commonest = counts.index.tolist()
        self.train_words = sorted(self.commonest)
        self.train_points = self.points(self.train_words)

    def points(self, names):
        """Return names as points (N, C) in token space."""
        return self.space.names([self.text.ids[name] for name in names])

    @functools.cached_property
    def negatives(self):
        """Probability (K, K) of each training word as each word's negative; 0 for synonyms."""
        similarity = (self.train_points @ self.train_points.T).double().numpy()
        same = [same_word(word) for word in self.train_words]
        alike = np.zeros(similarity.shape, bool)
        for i, word in enumerate(self.train_words):
            names = [same_word(name) for name in (word, *self.text.synonyms[word])]
            alike[i] = np.isin(same, names)
        alike |= alike.T
        if alike.all(1).any():
            word = self.train_words[alike.all(1).argmax()]
            raise InputError(f"stage=dpo: no training word differs from '{word}': use more words")
        similarity[alike] = np.nan
        highest = np.nanquantile(similarity, NEGATIVES_BELOW, axis=1, keepdims=True)
        weight = np.where(similarity <= highest, np.exp(-similarity / NEGATIVES_TAU), 0)
        return weight / weight.sum(1, keepdims=True)


# ---- training


class Training:
    """The optimiser, batches and counters of a training run, over all ranks or this one `alone`."""

    def __init__(self, run, config, experiment, ids, alone=False):
        self.run = run
        self.config = config
        self.experiment = experiment
        self.rank, self.world = (0, 1) if alone else (run.rank, run.world)
        per_step = config.trials_per_step or config.batch_size * self.world
        self.n_micro = per_step // config.batch_size  # micro-batches per step, over all ranks
        if per_step % (config.batch_size * self.world):
            raise InputError(f"trials_per_step={per_step}: give a multiple of batch_size x ranks")
        subject = experiment.trials.subject[ids]
        self.by_person = [ids[subject == number] for number in np.unique(subject)]
        self.optimizer = torch.optim.AdamW(freeze(experiment.model, config), betas=(0.9, 0.98))
        self.trained = {}  # {name: parameter}
        self.reference = {}  # dpo: initial values of the trained weights
        for name, p in experiment.model.named_parameters():
            if p.requires_grad:
                self.trained[name] = p
                if config.stage == "dpo":
                    self.reference[name] = p.detach().clone()
        self.step = 0
        self.best = math.inf  # best validation score so far
        self.tokens = {}  # {step: neural tokens of some validation trials (N, P, C)}
        self.validation = 0.0  # s of the last validation
        if config.init_from == "resume":
            self.resume(experiment.state)
        self.began = time.time()
        self.first_step = self.step  # in this process
        self.waited = 0.0  # s spent waiting for batches
        if config.compile:
            experiment.model.lm.compile_blocks()
        self.threads = ThreadPoolExecutor(max(1, config.num_workers))
        self.ahead = deque()  # micro-batches in preparation
        self.numbers = itertools.count(self.step * self.n_micro + self.rank, self.world)

    def resume(self, state):
        self.step = state["step"]
        self.best = state["best"]
        if self.config.minutes:
            same = self.config.minutes == state["config"]["minutes"]
            self.config.max_iters = state["config"]["max_iters"] if same else UNSETTLED
        groups = self.optimizer.state_dict()["param_groups"]  # from the current options
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["scaler"]:
            self.run.scaler.load_state_dict(state["scaler"])
        self.tokens = state["tokens"]
        for name, value in state["reference"].items():
            self.reference[name] = value.to(self.run.device)

    def batches(self):
        """Yield a step's micro-batches, made ahead by threads; their number changes no batch."""
        for _ in range(self.n_micro // self.world):
            start = time.perf_counter()
            while len(self.ahead) <= 2 * self.config.num_workers:
                number = next(self.numbers)
                self.ahead.append((number, self.threads.submit(make_batch, self, number)))
            number, future = self.ahead.popleft()
            batch = future.result()
            self.waited += time.perf_counter() - start
            torch.manual_seed(key_seed(*self.key(number), "dropout"))
            yield batch

    def key(self, number):
        """Return the key of everything random in a micro-batch: seed, step, number in the step."""
        return self.config.seed, *divmod(number, self.n_micro)

    def backward(self, loss):
        """Add a micro-batch's share to the gradient."""
        self.run.scaler.scale(loss * self.world / self.n_micro).backward()

    def update(self):
        """Take one optimiser step on the learning-rate schedule; return the gradient norm."""
        for p in self.trained.values() if self.world > 1 else ():
            p.grad = self.run.reduce(p.grad) / self.world
        scaler = self.run.scaler
        scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        if not scaler.is_enabled() and not norm.isfinite():
            raise InputError(f"step {self.step + 1}: no finite gradient; lower learning_rate=")
        config = self.config
        warmup = min(config.warmup_iters, config.max_iters // 5)
        done = (self.step - warmup) / max(1, config.max_iters - warmup)
        share = 0.5 * (1 + math.cos(math.pi * done))  # of the peak
        if self.step < warmup:
            share = (self.step + 1) / (warmup + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm


# ---- evaluate


def subset(ids, config):
    """Take evenly spaced trials of a set, so that blocks, subjects and words keep their shares."""
    if not config.eval_trials or len(ids) <= config.eval_trials:
        return ids
    return ids[np.linspace(0, len(ids) - 1, config.eval_trials).round().astype(int)]


@torch.no_grad()
def neural_tokens(run, experiment, ids, silenced=(), without_eeg=False):
    """Yield (trials (b,), neural tokens (b, P, C)), 64 trials at a time.

    silenced: indices of window samples to set to 0. without_eeg: silence and no subject.
    """
    for part in np.split(ids, range(64, len(ids), 64)):
        x, xyz, subject = experiment.trials.batch(part, run.device)
        x[..., list(silenced)] = 0
        if without_eeg:
            x = torch.zeros_like(x)
            subject = torch.full_like(subject, -1)
        with run.autocast():
            n = experiment.model.eval().prefix(x, xyz, subject)
        yield part, n


@torch.no_grad()
def score_names(run, experiment, ids, names, silenced=()):
    """Return the log-probability of K names after each trial's EEG (N, K) and after silence (K,).

    Names are scored in chunks that fit the GPT's block. The head runs in float32, because half
    precision would tie names.
    """
    model, text = experiment.model, experiment.text
    head = model.lm.transformer.wte.weight.float()
    longest = 1 + max(len(text.ids[name]) for name in names)
    chunk = min(32, (model.lm.config.block_size - text.start) // longest)
    silence = neural_tokens(run, experiment, ids[:1], without_eeg=True)
    rows = []
    for _, n in itertools.chain(neural_tokens(run, experiment, ids, silenced), silence):
        scores = []
        for first in range(0, len(names), chunk):
            idx, position, mask, target = text.pack([names[first : first + chunk]], run.device)
            with run.autocast():
                x = model.trunk(n, idx.expand(len(n), -1), position, mask)[:, text.start :]
            lp = log_probs(F.linear(x.float(), head), target.expand(len(n), -1, -1))
            scores.append(lp.sum(-1))
        rows.append(torch.cat(scores, dim=1).double().cpu().numpy())
    return np.concatenate(rows[:-1]), rows[-1][0]


def say(run, config, experiment, ids, without_eeg=False, temperature=0.0):
    """Generate an answer for each trial: N texts."""
    text = experiment.text
    options = {"stop": [text.stop], "temperature": temperature}
    answers = []
    for part, n in neural_tokens(run, experiment, ids, without_eeg=without_eeg):
        options["seed"] = key_seed(config.seed, int(part[0]))
        with run.autocast():
            rows = experiment.model.generate(n, text.prompt, config.max_new_tokens, **options)
        answers += [text.tokenizer.decode(row).strip() for row in rows]
    return answers


def right_answers(text, names, answers):
    """Return whether N answers match K names, exactly and flexibly: two arrays (N, K)."""
    exact = np.zeros((len(answers), len(names)))
    flexibly = np.zeros((len(answers), len(names)))
    for i, answer in enumerate(answers):
        for j, name in enumerate(names):
            exact[i, j] = answer == name
            flexibly[i, j] = flexible(answer, name, text.synonyms[name])
    return exact, flexibly


def measured(values, chance, objects, config):
    """Return the mean of values (N,) with chance, 95 % bootstrap interval over objects, and n."""
    values = np.asarray(values, float)
    code = np.unique(objects, return_inverse=True)[1]
    total, count = np.bincount(code, values), np.bincount(code)
    rng = np.random.default_rng(key_seed(config.seed, "bootstrap"))
    draws = rng.integers(len(total), size=(config.shuffles, len(total)))
    means = total[draws].sum(1) / count[draws].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    if len(total) == 1:  # one object has no spread
        low, high = -math.inf, math.inf
    return {"score": values.mean(), "chance": chance, "low": low, "high": high, "n": len(values)}


def strata(table, least=10):
    """Return groups (N,) within which to shuffle trials: blocks, so that slow drift cannot help.

    Blocks of fewer than `least` trials merge within their recording, then across recordings.
    """
    recording = table.recording.astype(str)
    codes = recording + "/" + table.block
    for wider in (recording, "all"):
        codes = codes.where(codes.map(codes.value_counts()) >= least, wider)
    return codes.to_numpy()


def shuffles(within, draws, seed):
    """Draw orders (draws, N) of trials, shuffled only within the groups `within` (N,)."""
    rng = np.random.default_rng(key_seed(seed, "shuffle"))
    orders = np.tile(np.arange(len(within)), (draws, 1))
    groups = [np.flatnonzero(within == name) for name in np.unique(within)]
    for order in orders:
        for group in groups:
            order[group] = rng.permutation(group)
    return orders


def permuted(right, within, draws, seed):
    """Return the expected score (N,) of each trial with shuffled EEG, and p of the mean score.

    right (N, N): the score of trial j's EEG for trial i's name.
    """
    each = np.arange(len(right))
    score = right[each, each].mean()
    reached = (right[each, shuffles(within, draws, seed)].mean(1) >= score - 1e-12).sum()
    same = within[:, None] == within
    expected = (right * same).sum(1) / same.sum(1)
    return expected, (1 + reached) / (1 + draws) if math.isfinite(score) else math.nan


def top_k(scores, k):
    """Return whether each name is among a trial's k best scores (N, K); ties share the credit."""
    above = scipy.stats.rankdata(-scores, "min", axis=1) - 1
    ties = scipy.stats.rankdata(-scores, "max", axis=1) - above
    return np.clip((k - above) / ties, 0, 1)


def place(scores):
    """Return each name's place among a trial's scores (N, K): 0 best, 1 last; ties share it."""
    return (scipy.stats.rankdata(-scores, axis=1) - 1) / max(1, scores.shape[1] - 1)


def score_rows(config, table, metric, good, names, chance=None, sign=1, **constants):
    """Return a metric and its controls as rows of results.csv.

    good (N, K): the score of each trial's EEG for each of K names; sign -1: less is better. chance:
    the best control by default. constants {control: (K,)}: what names score whatever the EEG.
    """
    word = np.searchsorted(names, table.word)  # (N,)
    right = sign * good[:, word].T
    expected, p = permuted(right, strata(table), config.shuffles, config.seed)
    values = {"eeg": good[np.arange(len(word)), word], "shuffled": sign * expected}
    for control, constant in constants.items():
        values[control] = constant[word]
    if chance is None:
        means = [np.mean(values[control]) for control in ("shuffled", *constants)]
        chance = sign * max(sign * mean for mean in means)
    rows = []
    for control, value in values.items():
        row = {"metric": metric, "control": control}
        rows.append(row | measured(value, chance, table.object, config))
    rows[0]["p"] = p
    return rows


def evaluate(run, config, experiment, name, prior):
    """Score a set; return its rows of results.csv with controls, and a table of the answers.

    prior (K,): log of each name's mean probability over validation trials.
    """
    words, text = experiment.trials.words, experiment.text
    names = sorted(set(experiment.trials.table.word.iloc[experiment.sets[name]]))
    ids = subset(experiment.sets[name], config)
    table = experiment.trials.table.iloc[ids]
    columns = np.searchsorted(words, names)
    score = functools.partial(score_rows, config, table)
    scores, empty = score_names(run, experiment, ids, words)
    searched = scores - prior  # among all names, held out or not
    information = (scores - empty)[:, columns]  # pointwise mutual information of name and EEG
    rows = score("said by search", top_k(searched, 1), words, 1 / len(words))
    for k in (1, 5):
        controls = {"empty": top_k(empty[None, columns], k)[0]}
        controls["majority"] = np.isin(names, experiment.commonest[:k])
        good = top_k(information, k)
        rows += score(f"top{k}", good, names, min(1.0, k / len(names)), **controls)
    by_token = information / [1 + len(text.ids[name]) for name in names]
    rows += score("top1 by pmi per token", top_k(by_token, 1), names, 1 / len(names))
    answers = say(run, config, experiment, ids)
    without_eeg = say(run, config, experiment, ids[:1], without_eeg=True)
    candidates = [*answers, *without_eeg, experiment.commonest[0]]
    for kind, good in zip(("naive", "flexible"), right_answers(text, names, candidates)):
        controls = {"empty": good[-2], "majority": good[-1]}
        rows += score(f"{kind} accuracy", good[:-2], names, **controls)
    tokens = [text.tokenizer.encode(" " + (answer or "?")) for answer in answers]
    similar = (experiment.space.names(tokens) @ experiment.points(words).T).numpy()
    rows += score("similarity", similar, words)
    rows += score("similarity rank", place(similar), words, sign=-1)  # 0 best
    best = np.array(names)[np.argsort(-information, axis=1, kind="stable")[:, :5]]
    samples = table[["subject", "object", "word", "image"]].assign(set=name, said=answers)
    samples["ranked"] = [" ".join(row) for row in best]
    samples["search"] = np.array(words)[searched.argmax(1)]
    return pd.DataFrame(rows).assign(set=name), samples.assign(data=experiment.trials.caption)


METRICS = {"top1": "closed-set top-1", "top5": "closed-set top-5"}
METRICS |= {"flexible accuracy": "answers correct", "said by search": "correct, by search"}
METRICS |= {"similarity": "similarity of answers"}


def report(run, config, experiment):
    """Score all evaluation sets once with the best model; write tables and a figure."""
    best = run.load("best.pt")
    experiment.model.load_state_dict(best["model"])
    run.print(f"step {best['step']} was chosen on validation data")
    words, ids = experiment.trials.words, experiment.text.ids
    unsayable = [word for word in words if len(ids[word]) > config.max_new_tokens]
    if unsayable:
        limit = f"max_new_tokens={config.max_new_tokens} and cannot be generated"
        run.print(f"{len(unsayable)} of {len(words)} names are longer than {limit}: {unsayable}")
    scores, _ = score_names(run, experiment, subset(experiment.sets["val"], config), words)
    prior = np.logaddexp.reduce(scores, axis=0) - math.log(len(scores))
    tables = []
    for name in SETS:
        if len(experiment.sets[name]):
            tables.append(evaluate(run, config, experiment, name, prior))
    table, samples = map(pd.concat, zip(*tables))
    corrected = (table.metric == "top1") & (table.control == "eeg")
    table["p_corrected"] = (corrected.sum() * table.p.where(corrected)).clip(upper=1)
    table = table.assign(data=experiment.trials.caption, unsayable=len(unsayable))
    for row in table.to_dict("records"):
        run.result(**row)
    write_aside(run.out / "samples.csv", samples.to_csv(index=False))
    run.print(samples.groupby("set", sort=False).head(3).to_string(index=False))
    shown = table[(table.control == "eeg") & table.metric.isin(METRICS)]
    columns = ["set", "metric", "score", "low", "high", "chance", "p", "n"]
    run.print(shown[columns].to_string(index=False, float_format="{:.3f}".format))
    title = f"{experiment.trials.caption}; lm={config.lm}, {config.encoder} encoder"
    plot_results(run.out / "results.png", table, f"{title}: 95 % intervals over objects")


# ---- plots

COLOURS = {"eeg": "#c23b22", "shuffled": "#4878a8", "empty": "#999999", "majority": "#d9a441"}


def save_figure(figure, path, title):
    """Save a figure with a title that names the data."""
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_results(path, table, title):
    """Plot every set with its controls, and 95 % intervals over objects."""
    figure, axes = plt.subplots(1, len(METRICS), figsize=(15, 3.8), layout="constrained")
    for axis, (metric, name) in zip(axes, METRICS.items()):
        rows = table[table.metric == metric].pivot(index="set", columns="control")
        rows = rows.loc[table.set.unique()]
        errors = np.stack([rows.score - rows.low, rows.high - rows.score]).transpose(2, 0, 1)
        errors = errors.clip(min=0)  # with few draws the score may lie outside
        options = {"yerr": errors, "color": COLOURS, "title": name, "legend": False}
        rows.score.plot.bar(ax=axis, xlabel="", rot=20, **options)
        axis.plot(rows.chance.eeg.to_numpy(), "k_", ms=30, label="chance")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save_figure(figure, path, title)


# ---- the run


def write_splits(run, experiment):
    """Write splits.json, and print notes and the size of each set."""
    trials, manifest = experiment.trials, experiment.manifest
    if run.master:
        write_aside(run.out / "splits.json", json.dumps(manifest, indent=1))
    for note in trials.notes:
        run.print(note)
    counts = ", ".join(f"{name} {len(ids):,}" for name, ids in experiment.sets.items())
    run.print(f"{trials.caption}: {counts} trials, {manifest['purged']} purged for overlap")
    if manifest["held_out_subjects"] and not len(experiment.sets["subject"]):
        run.print("no trial of held-out people remains to evaluate: raise held_out_trials=")


def log_step(run, config, training, losses, norm):
    """Log the mean of each loss over the micro-batches of a step on all ranks."""
    if training.step % config.log_interval and training.step > 1:
        return
    numbers = {}
    for name, mean in pd.DataFrame(losses).map(torch.Tensor.item).mean().items():
        numbers[f"train_{name}"] = run.reduce(mean) / run.world
    run.log(training.step, **numbers, grad_norm=norm.item())  # before clipping


def settle(run, config, training):
    """With `minutes`, set max_iters once enough steps after the first 3 have been timed."""
    if config.max_iters != UNSETTLED:
        return
    n_measured = training.step - training.first_step - 3
    if n_measured == 0:
        training.began = time.time()
    seconds = run.reduce(time.time() - training.began, "max")
    if n_measured <= 0 or seconds < min(20.0, 3 * config.minutes):
        return
    per_step = seconds / n_measured + training.validation / config.eval_interval
    elapsed = run.reduce(time.time() - run.start, "max")
    remaining = 60 * config.minutes - elapsed - 10 * training.validation  # for the last evaluation
    config.max_iters = training.step + max(1, int(remaining / per_step))
    run.save_config()
    run.print(f"minutes={config.minutes:g} sets max_iters={config.max_iters} on this machine")


def probes(experiment):
    """Return the validation trials whose neural tokens are saved: one for each of some words."""
    ids = experiment.sets["val"]
    ids = ids[np.unique(experiment.trials.word[ids], return_index=True)[1]]
    return ids[np.linspace(0, len(ids) - 1, min(PROBES, len(ids))).astype(int)]


def validate(run, config, experiment, training):
    """Rank the training words for each validation trial; save neural tokens and the best model."""
    start = time.time()
    ids = subset(experiment.sets["val"], config)
    words = experiment.train_words
    scores, empty = score_names(run, experiment, ids, words)
    information = scores - empty
    word = np.searchsorted(words, experiment.trials.table.word.iloc[ids])
    loss = F.cross_entropy(torch.from_numpy(information), torch.from_numpy(word)).item()
    right = top_k(information, 1)[np.arange(len(ids)), word].mean()
    mean_place = place(information)[np.arange(len(ids)), word].mean().item()
    numbers = {"val_rank_loss": loss, "val_place": mean_place, "val_top1": right}
    run.log(training.step, **numbers, val_chance=1 / len(words))
    _, tokens = next(neural_tokens(run, experiment, probes(experiment)))
    training.tokens[training.step] = tokens.float().cpu()
    # dpo makes the model overconfident, which the loss would punish but the place does not
    score = loss if config.stage == "sft" else mean_place
    if score < training.best:
        training.best = score
        save(run, config, experiment, training, "best.pt")
    training.validation = run.reduce(time.time() - start, "max")


def save(run, config, experiment, training, name):
    """Write a checkpoint."""
    model = experiment.model
    state = {"kind": "telepath", "step": training.step, "config": asdict(config)}
    state |= {"lm_args": asdict(model.lm.config), "encoder_args": asdict(model.encoder.config)}
    state |= {"fusion_args": model.args, "model": model.state_dict()}
    state |= {"tokenizer": experiment.text.tokenizer.state, "wte": experiment.space.wte}
    state |= {"split": experiment.manifest["hash"], "eeg_seen": experiment.eeg_seen}
    state |= {"optimizer": training.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    state |= {"reference": training.reference, "best": training.best, "tokens": training.tokens}
    run.save(name, state)


def supervised_loss(run, config, experiment, batch):
    """Return the losses of a micro-batch whose targets are the names of what was seen."""
    model, space = experiment.model.train(), experiment.space
    with run.autocast():  # [BON, neural tokens, EON | prompt, name]
        logits, neural = model(*batch.inputs, start=experiment.text.start)
    word = log_probs(logits, batch.target).sum() / -(batch.target >= 0).sum()
    # classify the first neural token among the embeddings of training words, except for silence
    points = experiment.train_points.to(run.device)
    first = unit(neural[:, 0].float() - space.mean.to(run.device), 0.01 * space.size)
    options = {"ignore_index": -1, "reduction": "sum"}
    align = F.cross_entropy(first @ points.T / TEMPERATURE, batch.word, **options)
    align = align / (batch.word >= 0).sum().clamp_min(1)
    return {"loss": word + config.align * align, "word": word, "align": align}


def preference_loss(run, config, experiment, batch, weights):
    """Return the losses of a micro-batch: prefer the right name over a dissimilar one.

    weights: initial values of the trained weights; policy and reference share the rest.
    """
    model = experiment.model.eval()  # no dropout between policy and reference
    start = {"start": experiment.text.start}
    with run.autocast():
        policy, _ = model(*batch.inputs, **start)
    with torch.no_grad(), run.autocast():
        reference, _ = torch.func.functional_call(model, weights, tuple(batch.inputs), start)
    gained = log_probs(policy, batch.target) - log_probs(reference, batch.target)
    gained = gained.sum(-1)  # (B, 2): the right name, the other one
    margin = config.beta * (gained[:, 0] - gained[:, 1])
    preferred = (margin > 0).float().mean()
    return {"loss": -F.logsigmoid(margin).mean(), "margin": margin.mean(), "preferred": preferred}


def main(config):
    config.out_dir = config.out_dir or "out/telepath" + "_dpo" * (config.stage == "dpo")
    run = Run(config)
    experiment = Experiment(run, config, run.dataset(config.dataset))
    training = Training(run, config, experiment, experiment.sets["train"])
    write_splits(run, experiment)
    run.rewind(training.step)
    if not training.step:
        validate(run, config, experiment, training)
        if config.minutes:
            config.max_iters = UNSETTLED
    bar = run.progress(config.max_iters, training.step, config.stage)
    run.stopping()  # from now on a signal takes effect after the current step
    while training.step < config.max_iters and not run.stopped:
        losses = []  # one dict per micro-batch
        for batch in training.batches():
            if config.stage == "sft":
                losses.append(supervised_loss(run, config, experiment, batch))
            else:
                losses.append(preference_loss(run, config, experiment, batch, training.reference))
            training.backward(losses[-1]["loss"])
        norm = training.update()
        log_step(run, config, training, losses, norm)
        settle(run, config, training)
        bar.total = config.max_iters
        bar.update()
        run.stopping()
        finished = training.step >= config.max_iters
        if finished or training.step % config.eval_interval == 0:
            validate(run, config, experiment, training)
        if finished or run.stopped or training.step % config.save_interval == 0:
            save(run, config, experiment, training, "ckpt.pt")
    bar.close()
    if not run.stopped:
        run.barrier()
        if run.master:
            report(run, config, experiment)
        run.merge()
    run.close()


if __name__ == "__main__":
    main(configure(Config))
