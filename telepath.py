"""Words out of EEG: a frozen GPT reads neural tokens before its text and says what was seen.

    python telepath.py batch_size=16             # embedded, after python train.py: synthetic EEG
    python telepath.py minutes=6                 # as many steps as fit into six minutes
    python telepath.py stage=dpo init_from=out/telepath     # preferences after the supervised stage
    torchrun --standalone --nproc_per_node=4 telepath.py config/telepath_things_eeg2.yaml
    python telepath.py init_from=resume          # go on after a stop, bit for bit
    python data/synthetic_eeg/prepare.py gain=0 out_dir=data/synthetic_eeg/null   # the null:
    python telepath.py dataset=synthetic_eeg/null out_dir=out/null                # chance

Neural tokens take experts of the GPT's own layers; text takes the GPT's weights, which stay what
they are. Four evaluation sets, by who and what was seen in training: trial (same people and words,
other pictures), subject, object, subject_object. Each score stands beside chance, shuffled EEG, an
empty prefix and the majority word, with an interval over objects. telepath_questions.py asks what
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
from typing import Any, Literal

import inflect
import matplotlib.pyplot as plt
import mne
import numpy as np
import pandas as pd
import scipy.sparse
import scipy.spatial
import scipy.stats
import sklearn.covariance
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from configurator import Run, configure, key_seed
from convert import load_lm
from data import InputError, aside, read_table, write_aside
from data.recording import Recording, named_places, places, read_set
from data.tokens import Tokenizer
from model import (
    GPT,
    EncoderConfig,
    GPTConfig,
    NeuralEncoder,
    NeuralGPT,
    load_checkpoint,
    load_matching,
)

plt.switch_backend("Agg")

SETS = ("trial", "object", "subject", "subject_object")
CLAMP = 8.0  # SD beyond which whitened samples are cut
SILENT = 0.1  # share of training trials whose EEG is silence: "no EEG" must be a known prefix
TEMPERATURE = 0.1  # of the alignment loss, over the training words
NEGATIVES_BELOW = 0.5  # dpo: negatives are less similar to the word than this share of the others
NEGATIVES_TAU = 0.2  # dpo: they are drawn with probability exp(-similarity / tau)
MATCH = 0.5  # share of a pretrained encoder's weights that must fit
PROBES = 6  # validation trials whose neural tokens are kept at every validation


@dataclass
class Config:
    # ---- data
    dataset: str = "synthetic_eeg"  # name under data/, or a folder of recordings with words
    lm: str = "out/train"  # run folder or checkpoint of ours, or a Hugging Face GPT-2
    t_start: float = 0.0  # s from the picture's onset: the window
    t_end: float = 0.6  # s
    baseline: float = 0.1  # s before onset whose mean is taken off; 0: none
    # ---- splits
    held_out_subjects: float = 0.25  # share of people never trained on; one at least
    held_out_objects: float = 0.17  # share of words never trained on; one at least
    held_out_trials: float = 0.17  # share of pictures for evaluation, and as many for validation
    split_seed: int = 0  # draws them
    # ---- augmentation of training trials
    synonyms: bool = False  # a trial's text is its word or one of its synonyms, equally often
    augment: list[str] = field(default_factory=list)  # [pink,blink,...], any of AUGMENT
    augment_share: float = 0.1  # share of the trials that get each of them
    jitter: float = 0.01  # s, the window's onset is moved by up to this
    num_workers: int = 2  # threads that make batches ahead; any number makes the same ones
    # ---- encoder
    encoder: str = "transformer"  # linear, electrodes, conv, tsconv; pretrained:PATH, ours
    patch: int = 10  # samples per neural token
    width: int = 128  # of the encoder; electrodes are mixed into a quarter as many channels
    encoder_layers: int = 2  # blocks, or convolutions
    dropout: float = 0.2  # in the encoder
    # ---- fusion with the language model
    fusion: Literal["prefix", "expert", "cross"] = "expert"  # none, experts, cross-attention
    text_positions: Literal["zero", "after_prefix"] = "zero"  # where the text's positions begin
    prefix_attention: Literal["causal", "full"] = "causal"  # among neural tokens
    train: Literal["encoder", "encoder+expert", "all"] = "encoder+expert"  # what learns
    prompt: str = "<|endoftext|>The"  # text before the word; <|endoftext|> is the token
    # ---- objective and optimiser
    stage: Literal["sft", "dpo"] = "sft"  # supervised, or preferences (init_from= a run)
    align: float = 0.5  # weight of the loss of the first neural token's way to its word; 0: none
    beta: float = 0.1  # dpo: weight of the reference
    batch_size: int = 16  # trials per micro-batch
    trials_per_step: int = 0  # over all ranks; 0: one micro-batch per rank
    learning_rate: float = 1e-3  # AdamW's peak, of the encoder
    expert_lr: float = 3e-4  # of experts, cross-attention and, with train=all, the GPT
    max_iters: int = 1500  # optimiser steps
    minutes: float = 0.0  # instead of max_iters: what the first steps take settles how many fit
    warmup_iters: int = 50  # linear warm-up, then cosine to 0
    # ---- evaluation
    eval_interval: int = 250  # steps between validations
    eval_trials: int = 400  # trials of each set that are scored; 0: all
    shuffles: int = 1000  # permutations of trials, and bootstraps over objects
    max_new_tokens: int = 6  # of a generated word
    # ---- run
    out_dir: str = ""  # "": out/telepath or out/telepath_dpo
    init_from: str = "scratch"  # resume, or the folder of an earlier stage on the same split
    overwrite: bool = False  # start over in a folder that holds a run
    seed: int = 1337  # fixes everything
    device: str = "auto"  # cuda, mps, cpu
    dtype: str = "auto"  # bfloat16 where the hardware has it; float16, float32
    compile: bool = False  # compile the language model's blocks
    log_interval: int = 50  # steps between lines
    save_interval: int = 250  # steps between checkpoints
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = "nanocortex"  # its project

    POSITIVE = (
        "patch width encoder_layers batch_size log_interval save_interval eval_interval shuffles "
        "max_new_tokens"
    )
    SHARES = "held_out_subjects held_out_objects held_out_trials augment_share dropout"
    SIGNED = "t_start t_end"
    RENAMED = {"tokens": "encoder", "checkpoint": "encoder", "core_lr": "expert_lr"}
    RENAMED |= {"widen": "t_end", "analysis": "analysis of telepath_questions.py"}

    def check(self):
        if self.t_end <= self.t_start:
            raise InputError(f"the window t_start={self.t_start} to t_end={self.t_end} is empty")
        for name in self.augment:
            if name not in AUGMENT:
                raise InputError(f"augment={name}: there are {', '.join(AUGMENT)}")
        kind, _, path = self.encoder.partition(":")
        if kind not in ("linear", "transformer", "electrodes", "conv", "tsconv", "pretrained"):
            raise InputError(
                "option 'encoder' must be linear, transformer, electrodes, conv, tsconv or "
                f"pretrained:PATH, not '{self.encoder}'"
            )
        if kind == "pretrained" and not path:
            raise InputError("encoder=pretrained needs a run: encoder=pretrained:out/foundation")
        if self.width % 32 and self.width > 32:
            raise InputError(f"width={self.width}: take a multiple of 32, a head each")
        if self.stage == "dpo" and self.init_from == "scratch":
            raise InputError("stage=dpo goes on from a supervised run: give init_from=out/telepath")
        if self.fusion == "cross" and self.train == "encoder":
            raise InputError("fusion=cross never reads EEG with train=encoder: its gates stay shut")


# ---- names: what counts as the same word

PLURALS = inflect.engine()
IRREGULAR = {"cacti": "cactus", "indices": "index", "matrices": "matrix", "vertices": "vertex"}
IRREGULAR |= {"axes": "axis", "analyses": "analysis", "radii": "radius", "octopi": "octopus"}


@functools.cache
def singular(word):
    """The singular of an English noun, by inflect, which takes gas and lens for plurals."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) < 4 or re.search(r"(us|is|ss|lens|alias|atlas|bias|canvas)$", word):
        return word
    return PLURALS.singular_noun(word) or word


@functools.cache
def words_of(text):
    """Words of a name or an answer: lower case, no marks, no article in front, singular."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"[^\W_]+", re.sub(r"['’]s\b", "", text))
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return [singular(word) for word in words]


@functools.cache
def same_word(word):
    """What names that differ in case, number or spelling have in common: icecream, Ice-creams."""
    return "".join(words_of(word)) or word


def spelled(name):
    """A name as it is written: balance_beam -> balance beam."""
    return re.sub(r"[\s_]+", " ", name).strip()


def naive(answer, word):
    """The very same text."""
    return answer.strip() == spelled(word)


def flexible(answer, word, synonyms=()):
    """Whether an answer names the word or a synonym, as whole words, in any case or number."""
    if naive(answer, word):
        return True
    said = " ".join(words_of(answer.split("\n")[0]))
    for name in (word, *synonyms):
        name = re.sub(r"(?<=[a-z])\d+\b", "", " ".join(words_of(name)))  # calf1 is a calf
        if name and f" {name} " in f" {said} ":
            return True
    return False


def one_spelling(words):
    """A Series of words in which what is the same word has its most frequent spelling."""
    counts = words.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    chosen = {}
    for word in counts.index:
        chosen.setdefault(same_word(word), word)
    return words.map(lambda word: chosen[same_word(word)])


# ---- data: trials


class Trials:
    """Windows of EEG around pictures that have a name, cut from continuous recordings.

    table: a row a trial (recording, subject, row of its signal, object, word, synonyms, image,
    block). words, subjects: names in order; word, subject (N,): their numbers, -1 for who is held
    out. xyz (R, C, 3) of R recordings, nan where a channel is absent. white (R, C, C), scale
    (R, C): see learn. notes: what was left out.
    """

    def __init__(self, folder, config):
        self.config = config
        meta = read_set(folder)
        self.source = Path(folder).name
        self.data = self.source + ", synthetic" * meta["synthetic"]
        self.recordings = [Recording(Path(folder) / name) for name in meta["recordings"]]
        self.sfreq = self.recordings[0].sfreq
        first, last = round(config.t_start * self.sfreq), round(config.t_end * self.sfreq)
        self.offsets = np.arange(first, last)  # samples of the window
        self.before = np.arange(-round(config.baseline * self.sfreq), 0)
        if not len(self.offsets):
            raise InputError(f"t_end={config.t_end}: no sample of {self.sfreq:g} Hz in the window")
        spare = round(config.jitter * self.sfreq)
        read = np.concatenate([self.before, self.offsets])
        self.reach = (read.min() - spare, read.max() + spare)  # what a trial may read
        self.notes = []
        pretrained = pretrained_state(config) or {}
        parts = []
        for number, rec in enumerate(self.recordings):
            if rec.sfreq != self.sfreq:
                raise InputError(f"{rec.path} has another rate: prepare all with one sfreq=")
            if "recording" in pretrained:
                self.match_channels(rec, pretrained["recording"])
            self.check_channels(rec)
            parts.append(self.read_events(rec).assign(recording=number, subject=rec.subject))
        self.table = complete_table(pd.concat(parts, ignore_index=True), self.sfreq)
        self.words = sorted(set(self.table.word))
        self.word = np.searchsorted(self.words, self.table.word)
        self.recording = self.table.recording.to_numpy()
        self.row = self.table.row.to_numpy()
        self.number_subjects(held_out=())
        shape = (len(self.recordings), max(len(rec.names) for rec in self.recordings))
        self.xyz = np.full((*shape, 3), np.nan, np.float32)
        self.scale = np.ones(shape, np.float32)
        self.white = np.zeros((*shape, shape[1]), np.float32)
        for i, rec in enumerate(self.recordings):
            self.xyz[i, : len(rec.names)] = np.where(rec.good[:, None], rec.xyz, np.nan)

    def number_subjects(self, held_out):
        """Training subjects are numbers from 0 on, held-out ones -1."""
        self.subjects = sorted(set(self.table.subject) - set(held_out))
        self.subject = pd.Index(self.subjects).get_indexer(self.table.subject)

    def match_channels(self, rec, recipe):
        """Give channels without a place the one that a pretrained encoder knows by their name."""
        if recipe["bands"]:
            raise InputError("encoder=: pretrained on bands side by side; give one of bands=[]")
        xyz = places(rec.names, rec.xyz, np.ones(len(rec.names), bool), recipe["grid"])
        rec.xyz, counts = named_places(rec.names, xyz, recipe)
        self.notes.append(
            f"channels of {rec.subject}: {counts['name']} known by name, {counts['position']} by "
            f"position only, {counts['absent']} without a place; pretrained at "
            f"{recipe['sfreq']:g} Hz, these are {self.sfreq:g} Hz"
        )

    def check_channels(self, rec):
        """Mark channels bad that are flat or hold nan; refuse those without a place."""
        low = np.full(len(rec.names), np.inf)
        high = -low
        for start in range(0, len(rec.signal), 200_000):
            part = np.asarray(rec.signal[start : start + 200_000])
            low = np.minimum(low, part.min(0))  # nan stays nan
            high = np.maximum(high, part.max(0))
        useless = rec.good & ~(np.isfinite(high - low) & (high > low))
        rec.good = rec.good & ~useless
        if useless.any():
            names = ", ".join(np.array(rec.names)[useless])
            self.notes.append(f"{rec.path.name}: {names} flat or with nan, left out")
        if not rec.good.any():
            raise InputError(f"{rec.path} has no good channel")
        lost = rec.good & ~np.isfinite(rec.xyz).all(1)
        if lost.any():
            raise InputError(
                f"{rec.path / 'channels.csv'}: channel {np.array(rec.names)[lost][0]} has no "
                "position x, y, z in m: prepare it with montage=standard_1005, or mark it bad"
            )

    def read_events(self, rec):
        """The trials of a recording whose window lies inside it, every column as it is typed."""
        path = rec.path / "events.csv"
        events = read_table(path, dtype=str)
        if "word" not in events:
            raise InputError(f"{path} has no column 'word': prepare it with word_column=")
        events["row"] = rec.rows(rec.events["onset"])
        events["word"] = events["word"].str.strip()
        if "target" in events:
            events = events[~events["target"].isin(["1", "1.0", "True"])]
        events = events[events["word"] != ""]
        if not len(events):
            raise InputError(f"{path}: subject {rec.subject} has no events with a word")
        first, last = self.reach
        if "epoch_samples" in rec.meta:  # epochs of somebody else, one after the other
            begin = round(rec.meta["epoch_tmin"] * rec.sfreq)
            end = begin + rec.meta["epoch_samples"]
            if first < begin or last >= end:
                holds = f"holds epochs of {begin / rec.sfreq} to {end / rec.sfreq} s"
                raise InputError(f"{rec.path} {holds}: change t_start, t_end, baseline or jitter")
        inside = (events["row"] + first >= 0) & (events["row"] + last < len(rec.signal))
        if not inside.any():
            raise InputError(f"{rec.path}: the window lies outside the recording: change t_end")
        if not inside.all():
            self.notes.append(f"{rec.path.name}: {(~inside).sum()} trials outside, left out")
        return events[inside]

    def cut(self, ids, shift=0):
        """Windows (B, C, T) in V less their baseline, 0 where absent; shift (B,): samples late."""
        x = np.zeros((len(ids), self.xyz.shape[1], len(self.offsets)), np.float32)
        at = self.row[ids] + shift
        for number in np.unique(self.recording[ids]):
            rec = self.recordings[number]
            rows = np.flatnonzero(self.recording[ids] == number)
            part = rec.signal[at[rows, None] + self.offsets]  # (b, T, c)
            if len(self.before):
                part = part - rec.signal[at[rows, None] + self.before].mean(1, keepdims=True)
            x[rows, : len(rec.names)] = np.where(rec.good[:, None], part.transpose(0, 2, 1), 0)
        return x

    def finish(self, x, xyz, ids):
        """Whiten windows in V: what the encoder takes, x (B, C, T), xyz (B, C, 3), subject (B,)."""
        x = np.clip(self.white[self.recording[ids]] @ x, -CLAMP, CLAMP)
        return torch.from_numpy(x), torch.from_numpy(xyz), torch.from_numpy(self.subject[ids])

    def batch(self, ids, device="cpu"):
        """The windows of trials as tensors, without augmentation."""
        signals = self.finish(self.cut(ids), self.xyz[self.recording[ids]], ids)
        return [tensor.to(device) for tensor in signals]

    def learn(self, train):
        """Multivariate noise normalisation and channel scales, from the trials `train` alone.

        Recordings with fewer than two of them take the mean of the others', by channel name.
        """
        rng = np.random.default_rng(0)
        covariances, scales = {}, {}
        for number, rec in enumerate(self.recordings):
            ids = train[self.recording[train] == number]
            if len(ids) > 1:
                x = self.cut(np.sort(rng.permutation(ids)[:600]))[:, np.flatnonzero(rec.good)]
                names = np.array(rec.names)[rec.good]
                covariances[number] = pd.DataFrame(noise_covariance(x), names, names)
                scales[number] = np.maximum(1.4826 * np.median(np.abs(x), axis=(0, 2)), 1e-9)
        if not covariances:
            raise InputError(f"{self.source}: no recording has two training trials")
        stacked = pd.concat(covariances.values())
        mean = stacked.groupby(level=0, sort=False).mean()
        mean = mean[mean.index].fillna(0.0)
        for number, rec in enumerate(self.recordings):
            good = np.flatnonzero(rec.good)
            covariance = covariances.get(number)
            if covariance is None:
                names = np.array(rec.names)[good]
                lacking = np.where(np.isin(names, mean.index), 0.0, np.diag(mean).mean())
                covariance = mean.reindex(index=names, columns=names).fillna(0.0)
                covariance = covariance + np.diag(lacking)
                scales[number] = 1e-6 * np.sqrt(np.diag(covariance))
            self.scale[number] = np.median(scales[number])  # of absent channels, too
            self.scale[number, good] = scales[number]
            values, vectors = np.linalg.eigh(covariance.to_numpy())
            values = np.maximum(values, 1e-2 * np.median(values) + 1e-9)
            root = (vectors / np.sqrt(values)) @ vectors.T
            self.white[number][np.ix_(good, good)] = 1e6 * root  # V to SD of the noise


def complete_table(table, sfreq):
    """The table of trials, with what the events leave open."""
    for column in ("object", "synonyms", "image", "block"):
        if column not in table:
            table[column] = ""
        table[column] = table[column].fillna("")
    recording, row = table.recording.astype(str), table.row
    minute = "minute " + (row // round(60 * sfreq)).astype(str)
    table["object"] = table["object"].where(table["object"] != "", table["word"])
    table["image"] = table["image"].where(table["image"] != "", recording + " " + row.astype(str))
    table["block"] = table["block"].where(table["block"] != "", minute)
    table["word"] = one_spelling(table["word"])
    return table[["recording", "subject", "row", "object", "word", "synonyms", "image", "block"]]


def noise_covariance(x):
    """Shrunk covariance (c, c) in µV² of windows (n, c, T) in V less their mean, the response."""
    x = (x - x.mean(0)).transpose(0, 2, 1).reshape(-1, x.shape[1]).astype(float) * 1e6
    limit = 10 * 1.4826 * np.median(np.abs(x)) + 1e-9
    x = x / np.maximum(1, np.abs(x).max(1, keepdims=True) / limit)  # a blink must not own it
    return sklearn.covariance.ledoit_wolf(x[::2])[0]


# ---- data: splits


def split(trials, config):
    """{set: sorted trial numbers}: train, val and the four evaluation sets; and a manifest of it.

    Words are held out whole, with all their objects; so are people. Pictures and the blocks they
    are shown in go to training, validation or evaluation together: no repeat of a picture and no
    stretch of EEG is on two sides. Left out are training and validation trials whose window
    overlaps one of another side, and trials whose word or person counts as seen but has no trial
    in training.
    """
    table = trials.table
    rng = np.random.default_rng(key_seed(config.split_seed, "split"))
    held_words = hold_out(rng, table.word, config.held_out_objects)
    held_subjects = hold_out(rng, table.subject, config.held_out_subjects)
    part = deal_pictures(trials, rng, config.held_out_trials)
    seen_word = ~table.word.isin(held_words).to_numpy()
    seen_subject = ~table.subject.isin(held_subjects).to_numpy()
    masks = {
        "train": (part == 0) & seen_word & seen_subject,
        "val": (part == 1) & seen_word & seen_subject,
        "trial": (part == 2) & seen_word & seen_subject,
        "object": (part == 2) & ~seen_word & seen_subject,
        "subject": (part == 2) & seen_word & ~seen_subject,
        "subject_object": (part == 2) & ~seen_word & ~seen_subject,
    }
    evaluation = np.any([masks[name] for name in SETS], axis=0)
    n_purged = purge(trials, masks["val"], evaluation)
    n_purged += purge(trials, masks["train"], evaluation | masks["val"])
    for column, names in (("word", ("trial", "subject")), ("subject", ("trial", "object"))):
        trained = table[column].isin(table[column][masks["train"]]).to_numpy()
        for name in ("val", *names):
            masks[name] &= trained
    sets = {name: np.flatnonzero(mask) for name, mask in masks.items()}
    check_split(trials, sets)
    manifest = {
        "dataset": trials.source,
        "held_out_words": sorted(held_words),
        "held_out_subjects": sorted(held_subjects),
        "purged": n_purged,
        "sets": {name: trial_names(trials, ids) for name, ids in sets.items()},
    }
    text = json.dumps(manifest, sort_keys=True)
    manifest["hash"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return sets, manifest


def trial_names(trials, ids):
    """Trials as 'recording:row'."""
    names = [rec.path.name for rec in trials.recordings]
    return [f"{names[r]}:{row}" for r, row in zip(trials.recording[ids], trials.row[ids])]


def hold_out(rng, names, share):
    """A share of different names, at least one and never all; none where share is 0."""
    names = sorted(set(names))
    if not share or len(names) < 2:
        return set()
    n_held = min(max(1, round(share * len(names))), len(names) - 1)
    return set(rng.permutation(names)[:n_held])


def deal_pictures(trials, rng, share):
    """Part of each trial: 0 training, 1 validation, 2 evaluation, -1 none of them."""
    table = trials.table
    blocks = (table.recording.astype(str) + "/" + table.block).factorize()[0]
    images = table.image.factorize()[0]
    n_blocks, n_images = blocks.max() + 1, images.max() + 1
    nodes = [n_blocks + n_images] * 2
    graph = scipy.sparse.coo_matrix((np.ones(len(table)), (blocks, images + n_blocks)), nodes)
    n_groups, group = scipy.sparse.csgraph.connected_components(graph, directed=False)
    if n_groups >= 6:  # pictures and blocks fall into groups that share nothing
        return deal(rng, group[blocks], share)
    if n_blocks < 6 or n_images < 6:
        raise InputError(f"{trials.source}: a split needs 6 blocks and 6 pictures at least")
    by_block = deal(rng, blocks, share)
    by_image = deal(rng, images, share)
    return np.where(by_block == by_image, by_block, -1)


def deal(rng, codes, share):
    """Codes (N,) dealt to evaluation (2), validation (1), as many each, and training (0)."""
    order = rng.permutation(codes.max() + 1)
    n_held = max(1, round(share * len(order)))
    parts = np.zeros(len(order), int)
    parts[order[:n_held]] = 2
    parts[order[n_held : 2 * n_held]] = 1
    return parts[codes]


def purge(trials, mask, others):
    """Clear from a mask the trials that may read samples of the others; returns how many."""
    length = trials.reach[1] - trials.reach[0]
    n_purged = 0
    for number in range(len(trials.recordings)):
        here = trials.recording == number
        ids = np.flatnonzero(mask & here)
        rows = trials.row[others & here]
        if len(ids) and len(rows):
            nearest = scipy.spatial.KDTree(rows[:, None]).query(trials.row[ids, None])[0]
            mask[ids[nearest <= length]] = False
            n_purged += int((nearest <= length).sum())
    return n_purged


def check_split(trials, sets):
    """Raises InputError where a part that is needed has no trials."""
    remedy = "change held_out_trials, held_out_objects or held_out_subjects"
    if trials.table.groupby("word").image.nunique().max() == 1:
        remedy = "every word has one picture: tell pictures apart when preparing (image_column=)"
    evaluation = np.concatenate([sets[name] for name in SETS])
    for name, ids in (("train", sets["train"]), ("val", sets["val"]), ("evaluation", evaluation)):
        if not len(ids):
            raise InputError(f"{trials.source}: the split leaves no trial in '{name}': {remedy}")


# ---- data: augmentation
# Each takes windows x (b, C, T) in V, rng, scale (b, C) the robust SD in V, xyz (b, C, 3) with nan
# where absent, sfreq (Hz).


def smooth_topography(rng, xyz):
    """Weights (b, C), smooth over the head, of unit RMS: a random plane and its bend."""
    at = np.nan_to_num(xyz) / 0.1
    terms = np.concatenate([np.ones_like(at[..., :1]), at, at[..., :2] ** 2], axis=-1)
    weights = np.einsum("bcf,bf->bc", terms, rng.normal(size=(len(xyz), 6)))
    return weights / np.sqrt(np.square(weights).mean(1, keepdims=True) + 1e-12)


def pink(x, rng, scale, xyz, sfreq):
    """Background: power 1 / f, shared by neighbours (5 cm)."""
    b, C, T = x.shape
    f = np.fft.rfftfreq(2 * T, 1 / sfreq)  # twice as long, so that the ends are not tied together
    spectrum = rng.normal(size=(b, C, len(f))) + 1j * rng.normal(size=(b, C, len(f)))
    spectrum *= np.where(f > 0, np.maximum(f, f[1]) ** -0.5, 0)
    at = np.nan_to_num(xyz, nan=9.0)
    distance = np.linalg.norm(at[:, :, None] - at[:, None], axis=-1)  # (b, C, C)
    noise = np.exp(-(distance**2) / (2 * 0.05**2)) @ np.fft.irfft(spectrum)[..., :T]
    return x + scale[..., None] * noise / (noise.std(2, keepdims=True) + 1e-12)


def line(x, rng, scale, xyz, sfreq):
    """Mains at 50 or 60 Hz and two harmonics, as far as they exist, with drifting phase."""
    b, _, T = x.shape
    t = np.arange(T) / sfreq
    mains = rng.choice([50.0, 60.0], (b, 1))
    noise = np.zeros((b, T))
    for harmonic in (1, 2, 3):
        wander = 0.02 * np.cumsum(rng.normal(size=(b, T)), 1) + rng.uniform(0, 2 * np.pi, (b, 1))
        wave = np.sin(2 * np.pi * harmonic * mains * t + wander) / harmonic**2
        noise += np.where(harmonic * mains <= sfreq / 2, wave, 0)
    return x + (scale * smooth_topography(rng, xyz))[..., None] * noise[:, None]


def blink(x, rng, scale, xyz, sfreq):
    """A blink of a fifth of a second: largest beside the eyes, fading backwards."""
    near = 0.0
    for eye in ([0.03, 0.1, -0.02], [-0.03, 0.1, -0.02]):
        distance = np.linalg.norm(np.nan_to_num(xyz) - eye, axis=-1)
        near = near + np.exp(-(distance**2) / (2 * 0.05**2))  # (b, C)
    t = np.arange(x.shape[2]) / sfreq
    centre = rng.uniform(0, t[-1] + 1e-9, (len(x), 1))
    shape = np.exp(-0.5 * ((t - centre) / rng.uniform(0.05, 0.1, (len(x), 1))) ** 2)
    size = 10 * np.median(scale, axis=1)
    return x + size[:, None, None] * near[..., None] * shape[:, None]


def muscle(x, rng, scale, xyz, sfreq):
    """A burst of 20 to 100 Hz at the lower edge of the cap, above the jaw."""
    at = np.nan_to_num(xyz) / 0.1
    edge = np.exp(-((np.abs(at[..., 0]) - 0.8) ** 2) / 0.1)
    edge = edge * np.exp(-np.maximum(at[..., 2] - 0.3, 0) / 0.3)  # (b, C)
    f = np.fft.rfftfreq(x.shape[2], 1 / sfreq)
    spectrum = np.fft.rfft(rng.normal(size=x.shape)) * ((f >= 20) & (f <= 100))
    noise = np.fft.irfft(spectrum, n=x.shape[2])
    t = np.linspace(0, 1, x.shape[2])
    burst = np.exp(-0.5 * ((t - rng.uniform(0, 1, (len(x), 1))) / 0.2) ** 2)
    return x + 3 * (scale * edge)[..., None] * noise * burst[:, None]


def drift(x, rng, scale, xyz, sfreq):
    """A slow wandering, a random walk that is smooth over the head."""
    walk = np.cumsum(rng.normal(size=(len(x), x.shape[2])), axis=1)
    walk /= np.abs(walk).max(1, keepdims=True) + 1e-12
    return x + 3 * (scale * smooth_topography(rng, xyz))[..., None] * walk[:, None]


def one_electrode(rng, xyz):
    """For each of b trials the number of an electrode that is there."""
    present = np.isfinite(xyz[..., 0])
    return np.where(present, rng.random(present.shape), -1.0).argmax(1)


def pop(x, rng, scale, xyz, sfreq):
    """One electrode jumps and comes back within some 100 ms."""
    t = np.arange(x.shape[2]) / sfreq
    late = t - rng.uniform(0, t[-1], (len(x), 1))
    jump = np.where(late >= 0, np.exp(-np.maximum(late, 0) / 0.1), 0.0)
    rows = np.arange(len(x))
    electrode = one_electrode(rng, xyz)
    size = rng.choice([-10, 10], len(x)) * scale[rows, electrode]
    x = x.copy()
    x[rows, electrode] += size[:, None] * jump
    return x


def drop(x, rng, scale, xyz, sfreq):
    """A fifth of the electrodes is absent: nan in xyz, which is changed in place."""
    gone = rng.random(xyz.shape[:2]) < 0.2
    gone[np.arange(len(x)), one_electrode(rng, xyz)] = False
    xyz[gone] = np.nan
    return np.where(gone[..., None], 0, x)


def reference(x, rng, scale, xyz, sfreq):
    """Another reference: part of one electrode's signal is taken from all."""
    signal = x[np.arange(len(x)), one_electrode(rng, xyz)]
    return x - rng.uniform(0, 1, (len(x), 1, 1)) * signal[:, None]


def gain(x, rng, scale, xyz, sfreq):
    """Another amplifier, or a thicker skull: 0.6 to 1.6 times."""
    return x * np.exp(rng.uniform(-0.5, 0.5, (len(x), 1, 1)))


AUGMENT = {"pink": pink, "line": line, "blink": blink, "muscle": muscle, "drift": drift}
AUGMENT |= {"pop": pop, "drop": drop, "reference": reference, "gain": gain}


def augmented(x, xyz, scale, rng, sfreq, config):
    """Windows (B, C, T) in V and places after every augmentation, each on its share of trials."""
    xyz = xyz.copy()
    for name in config.augment:
        rows = np.flatnonzero(rng.random(len(x)) < config.augment_share)
        if len(rows):
            some = xyz[rows]
            x[rows] = AUGMENT[name](x[rows], rng, scale[rows], some, sfreq)
            xyz[rows] = some
    present = np.isfinite(xyz[..., :1])
    return np.where(present, x, 0).astype(np.float32), xyz


# ---- data: batches


@dataclass
class Batch:
    """A micro-batch of training trials."""

    signal: Any  # (B, C, T), xyz (B, C, 3) and subject (B,) as the encoder takes them
    xyz: Any
    subject: Any
    heard: Any  # (B,) False where the EEG is silence
    word: Any  # (B,) number of the trial's word
    names: list  # B names to train on: the word, or a synonym


class Loader:
    """Micro-batches made ahead by threads, the same for any number of threads and ranks.

    Trial number i of the run, counted over all ranks, is of subject i mod S, whose trials come in
    an order keyed by (seed, epoch). Noise, jitter and synonyms are keyed by (step, micro-batch).
    n_micro: micro-batches of a step; micros: numbers of those of this rank; step: the first.
    """

    def __init__(self, config, experiment, ids, n_micro, micros, step):
        self.config = config
        self.experiment = experiment
        self.n_micro = n_micro
        self.plan = iter(self.micro_batches(micros, step))
        subject = experiment.trials.subject[ids]
        self.by_subject = [ids[subject == number] for number in np.unique(subject)]
        self.orders = {}
        self.ahead = deque()
        self.waited = 0.0  # seconds that the training loop waited
        self.threads = ThreadPoolExecutor(config.num_workers) if config.num_workers else None

    def micro_batches(self, micros, first):
        for step in itertools.count(first):
            for micro in micros:
                yield step, micro

    def ids(self, step, micro):
        """Trial numbers of a micro-batch."""
        S = len(self.by_subject)
        first = (step * self.n_micro + micro) * self.config.batch_size
        chosen = []
        for i in range(first, first + self.config.batch_size):
            trials = self.by_subject[i % S]
            epoch, j = divmod(i // S, len(trials))
            if (i % S, epoch) not in self.orders:
                rng = np.random.default_rng(key_seed(self.config.seed, "epoch", i % S, epoch))
                self.orders[i % S, epoch] = rng.permutation(trials)
            chosen.append(self.orders[i % S, epoch][j])
        return np.array(chosen)

    def make(self, step, micro):
        """One micro-batch, on the CPU."""
        config, trials, text = self.config, self.experiment.trials, self.experiment.text
        ids = self.ids(step, micro)
        rng = np.random.default_rng(key_seed(config.seed, step, micro, "augment"))
        late = round(config.jitter * trials.sfreq)
        x = trials.cut(ids, rng.integers(-late, late + 1, len(ids)))
        recording = trials.recording[ids]
        xyz, scale = trials.xyz[recording], trials.scale[recording]
        x, xyz = augmented(x, xyz, scale, rng, trials.sfreq, config)
        heard = np.ones(len(ids), bool)
        if config.stage == "sft":
            heard = rng.random(len(ids)) >= SILENT
            x[~heard] = 0
        names = []
        for word in trials.word[ids]:
            names.append(rng.choice(text.trained[trials.words[word]]))
        word = torch.from_numpy(trials.word[ids])
        signal, xyz, subject = trials.finish(x, xyz, ids)
        return Batch(signal, xyz, subject, torch.from_numpy(heard), word, names)

    def next(self, device="cpu"):
        """The next micro-batch, its tensors on the device."""
        start = time.perf_counter()
        if self.threads is None:
            batch = self.make(*next(self.plan))
        else:
            while len(self.ahead) < 2 * self.config.num_workers:
                self.ahead.append(self.threads.submit(self.make, *next(self.plan)))
            batch = self.ahead.popleft().result()
        self.waited += time.perf_counter() - start
        for name in ("signal", "xyz", "subject", "heard", "word"):
            setattr(batch, name, getattr(batch, name).to(device))
        return batch


# ---- names as tokens


class Text:
    """Names as tokens of the language model: prompt + ' name' + <|endoftext|>, or a line break.

    ids: {name: token ids}; synonyms: {word: other right answers}; trained: {word: names that its
    trials are trained on}, none of which is a held-out word in any spelling.
    """

    def __init__(self, tokenizer, trials, held_out, config):
        self.tokenizer = tokenizer
        self.prompt = self.encode(config.prompt)
        if not self.prompt:
            raise InputError("prompt= must be one token at least")
        self.stop = tokenizer.eot
        if self.stop is None:
            self.stop = tokenizer.encode("\n")[-1]
        held_out = {same_word(word) for word in held_out}
        self.ids, self.synonyms, self.trained = {}, {}, {}
        for word, synonyms in trials.table.groupby("word").synonyms.unique().items():
            names = dict.fromkeys(map(spelled, re.split(r"[|,]", "|".join(synonyms))))
            self.synonyms[word] = [name for name in names if name and name != word]
            self.trained[word] = [word]
            for name in self.synonyms[word] if config.synonyms else ():
                if same_word(name) not in held_out:
                    self.trained[word].append(name)
            for name in self.trained[word]:
                self.ids[name] = self.name(name)

    def encode(self, text):
        """Token ids of a text, in which <|endoftext|> is the token."""
        ids = []
        for i, part in enumerate(text.split("<|endoftext|>")):
            if i and self.tokenizer.eot is None:
                raise InputError("the tokenizer of lm= has no <|endoftext|>: give prompt=The")
            if i:
                ids.append(self.tokenizer.eot)
            ids += self.tokenizer.encode(part)
        return ids

    def of(self, names):
        """Token ids of each of some names."""
        return [self.ids[name] for name in names]

    def name(self, word):
        """Token ids of a name behind a space."""
        ids = self.tokenizer.encode(" " + spelled(word))
        if not self.tokenizer.decode(ids).strip("\ufffd "):
            raise InputError(
                f"the object name {word!r} has no tokens: give it a word in events.csv"
            )
        return ids

    def pack(self, rows):
        """B lists of K names' token ids, behind the prompt, in one pass.

        Returns idx (B, T), position (T,), mask (T, T), target (B, K, W + 1) with -1 for nothing:
        T is the prompt and K slots of W tokens. A slot sees the prompt and itself.
        """
        P, K = len(self.prompt), len(rows[0])
        W = max(len(ids) for ids in itertools.chain(*rows))
        idx = torch.zeros(len(rows), P + K * W, dtype=torch.long)
        target = torch.full((len(rows), K, W + 1), -1)
        idx[:, :P] = torch.tensor(self.prompt)
        for b, names in enumerate(rows):
            for k, ids in enumerate(names):
                idx[b, P + k * W : P + k * W + len(ids)] = torch.tensor(ids)
                target[b, k, : len(ids) + 1] = torch.tensor(ids + [self.stop])
        slot = torch.cat([torch.full((P,), -1), torch.arange(K).repeat_interleave(W)])
        position = torch.cat([torch.arange(P), P + torch.arange(W).repeat(K)])
        mask = (slot[:, None] == slot) | (slot == -1)
        return idx, position, mask.tril(), target


def log_probs(logits, target):
    """Log-probability of every token, (B, K, W + 1), 0 where target is -1.

    logits (B, 1 + K W, V): those of the prompt's last token, then of the slots.
    """
    K, W1 = target.shape[1:]
    norm = logits.float().logsumexp(-1)  # (B, 1 + K W)
    wanted = target.clamp_min(0)
    first = logits[:, 0].float().gather(1, wanted[..., 0]) - norm[:, :1]
    rest = logits[:, 1:].unflatten(1, (K, W1 - 1)).float().gather(3, wanted[..., 1:, None])
    rest = rest[..., 0] - norm[:, 1:].unflatten(1, (K, W1 - 1))
    return torch.cat([first[..., None], rest], dim=2) * (target >= 0)


def unit(x, smallest=1e-3):
    """x (..., C) at unit length; smooth at 0, where there is no direction and no gradient."""
    return x / (x.square().sum(-1, keepdim=True) + smallest**2).sqrt()


class WordSpace:
    """Names as points of a token embedding: mean over their tokens, cleaned, at unit length.

    Cleaned of the vocabulary's mean and first two directions: a GPT's embeddings all lean to one
    side. It stays what it was when the embedding learns.
    """

    def __init__(self, wte):
        self.wte = wte.detach().float().cpu().clone()
        self.mean = self.wte.mean(0)
        centred = self.wte - self.mean
        self.size = centred.norm(dim=1).mean().item()  # of a token
        axes = torch.linalg.eigh(centred.T @ centred)[1][:, [-1, -2]]
        sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        self.axes = axes * sign  # (C, 2), of one sign, so that a resumed run draws the same picture

    def clean(self, x):
        x = x - self.mean
        return unit(x - (x @ self.axes) @ self.axes.T, 1e-6 * self.size)

    def names(self, ids):
        """(N, C) of N lists of token ids."""
        return self.clean(torch.stack([self.wte[tokens].mean(0) for tokens in ids]))


# ---- model


def pretrained_state(config):
    """The checkpoint that encoder=pretrained:PATH names; None for other encoders."""
    kind, _, path = config.encoder.partition(":")
    if kind != "pretrained":
        return None
    state = load_checkpoint(checkpoint_path(path))
    if "encoder_args" not in state:
        raise InputError(f"{path} holds no encoder: give a run of foundation.py or telepath.py")
    return state


def checkpoint_path(path):
    return Path(path) if path.endswith(".pt") else Path(path) / "best.pt"


# options that a run cannot be resumed without
FIXED = "stage fusion text_positions prefix_attention encoder patch width encoder_layers train"


def build(run, config, trials):
    """(NeuralGPT, tokenizer, checkpoint or None): of lm= and options, or as init_from says."""
    if config.init_from == "scratch":
        lm, tokenizer = load_lm(config.lm, dropout=0.0)
        if tokenizer.n_vocab > lm.config.vocab_size:
            raise InputError(f"lm={config.lm}: its tokenizer has more tokens than its model")
        fusion = {"fusion": config.fusion, "text_positions": config.text_positions}
        fusion["attention"] = config.prefix_attention
        pretrained = pretrained_state(config)
        shape = encoder_shape(config, trials, lm.config.n_embd, pretrained)
        model = NeuralGPT(lm, NeuralEncoder(shape), **fusion)
        if pretrained:
            load_pretrained(run, config, model.encoder, pretrained)
        return model.to(run.device), tokenizer, None
    path = checkpoint_path(config.init_from)
    if config.init_from == "resume":
        path = run.out / "ckpt.pt"
    state = load_checkpoint(path)
    if state["kind"] != "telepath":
        raise InputError(f"{path} is no run of telepath.py: give init_from= an earlier one")
    for key in FIXED.split() if config.init_from == "resume" else ():
        if state["config"][key] != getattr(config, key):
            was = f"{path} was trained with {key}={state['config'][key]}"
            raise InputError(f"{was}, the options say {getattr(config, key)}: resume with its own")
    lm = GPT(GPTConfig(**state["lm_args"]))
    encoder = NeuralEncoder(EncoderConfig(**state["encoder_args"]))
    model = NeuralGPT(lm, encoder, **state["fusion_args"])
    model.load_state_dict(state["model"])
    return model.to(run.device), Tokenizer(state["tokenizer"]), state


def encoder_shape(config, trials, n_embd, pretrained=None):
    """EncoderConfig of the options, or of a pretrained encoder for these people and windows."""
    kind = config.encoder
    args = {"kind": kind, "width": config.width, "n_layer": config.encoder_layers}
    args |= {"n_head": max(1, config.width // 32), "virtual": max(1, config.width // 4)}
    args |= {"patch": config.patch}
    if kind == "electrodes":
        args |= {"kind": "transformer", "tokens": "electrode"}
    if pretrained:
        args = dict(pretrained["encoder_args"])
    n_samples = len(trials.offsets)
    if args["patch"] > n_samples:
        raise InputError(f"patch={args['patch']} is longer than the window of {n_samples} samples")
    args |= {"n_embd": n_embd, "subjects": len(trials.subjects), "dropout": config.dropout}
    args["window"] = n_samples // args["patch"]  # the first token reads all of it
    return EncoderConfig(**args)


def load_pretrained(run, config, encoder, state):
    """Load what fits of a pretrained encoder, and say how much that is."""
    weights = {}
    for name, value in state["model"].items():
        if name.startswith("encoder."):
            weights[name.removeprefix("encoder.")] = value
    share, new = load_matching(encoder, weights, MATCH, config.encoder)
    run.print(f"{config.encoder}: {share:.1%} of the encoder is pretrained; new: {', '.join(new)}")


def check_pretrained(config, trials, sets, manifest):
    """Refuse a pretrained encoder that saw EEG of people, words or pictures held out here."""
    state = pretrained_state(config)
    if state is None:
        return
    table = trials.table
    held = table.image.isin(table.image.iloc[np.concatenate([sets[name] for name in SETS])])
    held |= table.word.isin(manifest["held_out_words"])
    held |= table.subject.isin(manifest["held_out_subjects"])
    held = np.flatnonzero(held)
    names = trial_names(trials, held)
    if state["kind"] == "telepath":
        known = state["trained_on"]["dataset"] == manifest["dataset"]
        n_seen = len(set(names) & set(state["trained_on"]["trials"])) * known
    else:
        spans = {}  # of time that it was trained on, s
        for recording in state["recording"]["recordings"]:
            if Path(recording["dataset"]).name == manifest["dataset"]:
                spans[recording["name"]] = recording["seen"]
        n_seen = 0
        for name, row in zip(names, trials.row[held]):
            first, last = spans.get(name.rpartition(":")[0], (math.inf, -math.inf))
            n_seen += first <= row / trials.sfreq <= last
    if n_seen:
        raise InputError(
            f"encoder={config.encoder} saw the EEG of {n_seen} trials whose people, words or "
            "pictures are held out here: pretrain on other recordings"
        )


def parameter_sets(model):
    """{set: parameters}: encoder (with BON, EON), expert (or cross-attention), core (the GPT)."""
    encoder = list(model.encoder.parameters())
    if model.fusion != "cross":
        encoder += [model.bon, model.eon]
    expert = []
    for part in (model.experts, model.crosses):
        if part is not None:
            expert += part.parameters()
    return {"encoder": encoder, "expert": expert, "core": list(model.lm.parameters())}


def freeze(model, config):
    """Let only what config.train names learn; returns the optimiser's groups."""
    learns = {"encoder": ["encoder"], "encoder+expert": ["encoder", "expert"]}
    learns["all"] = ["encoder", "expert", "core"]
    model.requires_grad_(False)
    groups = []
    for name, parameters in parameter_sets(model).items():
        if name in learns[config.train]:
            peak = config.learning_rate if name == "encoder" else config.expert_lr
            for decay, matrices in ((0.05, True), (0.0, False)):
                some = [p.requires_grad_(True) for p in parameters if (p.dim() > 1) == matrices]
                if some:
                    groups.append({"params": some, "weight_decay": decay, "peak": peak})
    return groups


@dataclass
class Experiment:
    """What is trained and scored."""

    trials: Trials
    sets: dict  # {set: trial numbers}
    manifest: dict
    model: NeuralGPT
    text: Text
    space: WordSpace
    state: dict | None  # the checkpoint that init_from names

    @functools.cached_property
    def train_words(self):
        return sorted(set(self.trials.table.word.iloc[self.sets["train"]]))

    @functools.cached_property
    def train_points(self):
        """The training words (K, C) in token space."""
        return self.space.names(self.text.of(self.train_words))


def split_trials(folder, config):
    """(trials, sets, manifest) of a dataset: split, its noise learned from training trials."""
    trials = Trials(folder, config)
    sets, manifest = split(trials, config)
    trials.number_subjects(manifest["held_out_subjects"])
    trials.learn(sets["train"])
    check_pretrained(config, trials, sets, manifest)
    return trials, sets, manifest


def prepare(run, config, folder):
    """The Experiment of a dataset's folder. Waits for no other rank."""
    trials, sets, manifest = split_trials(folder, config)
    torch.manual_seed(key_seed(config.seed, "model"))
    model, tokenizer, state = build(run, config, trials)
    if state and state["split"] != manifest["hash"]:
        raise InputError(
            f"init_from={config.init_from} was trained on another split than these data and "
            "options give, and may know what is held out here: give those of its config.yaml"
        )
    text = Text(tokenizer, trials, manifest["held_out_words"], config)
    wte = (state or {}).get("wte", model.lm.transformer.wte.weight)
    n_tokens = 1 + len(trials.offsets) // model.encoder.config.patch
    longest = max(config.max_new_tokens, *map(len, text.ids.values()))
    model.check_length(n_tokens, len(text.prompt) + longest)
    return Experiment(trials, sets, manifest, model, text, WordSpace(wte), state)


# ---- training


class Training:
    """Optimiser, batches and counters of one training run; `alone`: of this rank only."""

    def __init__(self, run, config, experiment, ids, alone=False):
        self.config = config
        self.rank, self.world = (0, 1) if alone else (run.rank, run.world)
        self.run = run
        self.scaler = run.scaler
        groups = freeze(experiment.model, config)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.learned = [p for p in experiment.model.parameters() if p.requires_grad]
        self.step = 0
        self.best = math.inf  # ranking loss, and its step
        self.best_step = 0
        self.durations: list[float] = []  # s of the steps, and of a validation
        self.validation = 0.0
        self.reference = {}  # dpo: what the weights that learn were at first
        if config.stage == "dpo":
            for name, p in experiment.model.named_parameters():
                if p.requires_grad:
                    self.reference[name] = p.detach().clone()
        if config.init_from == "resume":
            self.resume(experiment.state)
        self.resumed = self.step
        per_step = config.trials_per_step or config.batch_size * self.world
        if per_step % (config.batch_size * self.world):
            raise InputError(f"trials_per_step={per_step} is no multiple of batch_size x ranks")
        n_micro = per_step // config.batch_size
        self.micros = range(self.rank, n_micro, self.world)
        self.loader = Loader(config, experiment, ids, n_micro, self.micros, self.step)
        self.net = experiment.model
        if self.world > 1:
            devices = [run.device] if run.device.type == "cuda" else None
            self.net = DistributedDataParallel(self.net, devices, broadcast_buffers=False)

    def resume(self, state):
        self.step = state["step"]
        self.best, self.best_step = state["best"], state["best_step"]
        if self.config.minutes == state["config"]["minutes"]:
            self.config.max_iters = state["config"]["max_iters"]
        groups = self.optimizer.state_dict()["param_groups"]  # as the options ask now
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name, value in state["reference"].items():
            self.reference[name] = value.to(self.run.device)

    def batches(self):
        """(micro-batch number, Batch) of one step; dropout is keyed by them."""
        for micro in self.micros:
            torch.manual_seed(key_seed(self.config.seed, self.step, micro, "dropout"))
            if self.world > 1:  # gradients travel once a step
                self.net.require_backward_grad_sync = micro == self.micros[-1]
            yield micro, self.loader.next(self.run.device)

    def backward(self, loss):
        self.scaler.scale(loss / len(self.micros)).backward()

    def update(self):
        """One optimiser step; returns the gradient's norm."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        if not self.scaler.is_enabled() and not norm.isfinite():
            raise InputError(f"the gradient is not finite at step {self.step + 1}: lower the rates")
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_share(self.step, self.config)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm


def lr_share(step, config):
    """Learning rate at a step as a share of its peak: linear warm-up, then cosine to 0."""
    warmup = min(config.warmup_iters, config.max_iters // 5)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, config.max_iters - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def supervised_step(run, config, experiment, training):
    """One step towards the names of what was seen: losses of each micro-batch, gradient norm."""
    experiment.model.train()
    parts = []
    for _, batch in training.batches():
        rows = [[experiment.text.ids[name]] for name in batch.names]
        text, target = packed(experiment.text, rows, run.device)
        with run.autocast():
            logits, neural = training.net(batch.signal, batch.xyz, batch.subject, **text)
        loss = -log_probs(logits, target).sum() / (target >= 0).sum()  # of word and stop alone
        part = {"word": loss}
        if config.align:
            part["align"] = align_loss(neural[:, 0], batch, experiment)
            loss = loss + config.align * part["align"]
        training.backward(loss)
        parts.append({"loss": loss.detach(), **part})
    return parts, training.update()


def preference_step(run, config, experiment, training):
    """One step towards preferring the right name over one of something unlike it."""
    experiment.model.eval()  # no dropout between policy and reference
    parts = []
    for micro, batch in training.batches():
        rng = np.random.default_rng(key_seed(config.seed, training.step, micro, "negatives"))
        rows = []
        for name, word in zip(batch.names, draw_negatives(rng, batch.word.cpu(), experiment)):
            rows.append([experiment.text.ids[name], experiment.text.ids[word]])
        text, target = packed(experiment.text, rows, run.device)
        signals = (batch.signal, batch.xyz, batch.subject)
        with run.autocast():
            policy = training.net(*signals, **text)[0]
        with torch.no_grad(), run.autocast():  # the frozen GPT is shared
            reference = torch.func.functional_call(
                experiment.model, training.reference, signals, text
            )[0]
        policy = log_probs(policy, target).sum(-1)
        reference = log_probs(reference, target).sum(-1)
        loss, margin = dpo_loss(policy, reference, config.beta)
        training.backward(loss)
        right = (margin > 0).float().mean()
        parts.append({"loss": loss.detach(), "margin": margin.mean(), "preferred": right})
    return parts, training.update()


def packed(text, rows, device):
    """Names as NeuralGPT.forward takes them, and their targets."""
    idx, position, mask, target = (t.to(device) for t in text.pack(rows))
    keys = {"idx": idx, "position": position, "mask": mask, "start": len(text.prompt) - 1}
    return keys, target


def align_loss(first, batch, experiment):
    """Cross-entropy of the first neural token (B, C) among the training words' embeddings.

    Silent trials do not count: they know no word.
    """
    space = experiment.space
    names = experiment.train_points.to(first.device)
    words = [experiment.trials.words[number] for number in batch.word.tolist()]
    target = np.searchsorted(experiment.train_words, words)
    target = torch.from_numpy(target).to(first.device)
    first = unit(first.float() - space.mean.to(first.device), 0.01 * space.size)
    losses = F.cross_entropy(first @ names.T / TEMPERATURE, target, reduction="none")
    return (losses * batch.heard).sum() / batch.heard.sum().clamp_min(1)


def dpo_loss(policy, reference, beta):
    """-log sigmoid of the margin, and the margin (B,).

    policy, reference (B, 2): log-probabilities of the preferred and the dispreferred name.
    """
    gained = policy - reference
    margin = beta * (gained[:, 0] - gained[:, 1])
    return -F.logsigmoid(margin).mean(), margin


def draw_negatives(rng, words, experiment):
    """A training word for each of `words` (B,), unlike it and no synonym of it."""
    text, names, points = experiment.text, experiment.train_words, experiment.train_points
    drawn = []
    for number in words:
        word = experiment.trials.words[number]
        synonyms = {same_word(name) for name in (word, *text.synonyms[word])}
        others = []
        for i, name in enumerate(names):
            if same_word(name) not in synonyms and word not in text.synonyms[name]:
                others.append(i)
        if not others:
            raise InputError("stage=dpo needs training words that are no synonyms of each other")
        similarity = (points[others] @ points[names.index(word)]).numpy()
        drawn.append(names[others[draw_unlike(rng, similarity)]])
    return drawn


def draw_unlike(rng, similarity):
    """One of N by similarity (N,): below a quantile, the less similar the likelier."""
    weight = np.exp(-(similarity - similarity.min()) / NEGATIVES_TAU)
    weight[similarity > np.quantile(similarity, NEGATIVES_BELOW)] = 0
    return rng.choice(len(similarity), p=weight / weight.sum())


# ---- evaluate


def subset(ids, config):
    """Evenly spread trials of a set, so that every block, subject and word keeps its share."""
    if not config.eval_trials or len(ids) <= config.eval_trials:
        return ids
    return ids[np.linspace(0, len(ids) - 1, config.eval_trials).round().astype(int)]


@torch.no_grad()
def rank(run, experiment, ids, names, silenced=()):
    """Log-probability (N, K) of each of K names after each trial's EEG, and after silence (K,).

    silenced: numbers of the window's samples that are set to 0. In float32 from the last layer
    on: half precision would tie names.
    """
    trials = experiment.trials
    packs = pack_names(experiment, names, run.device)
    rows = []
    for part in np.split(ids, range(32, len(ids), 32)):
        signal, xyz, subject = trials.batch(part, run.device)
        signal[..., list(silenced)] = 0
        rows.append(score_packs(run, experiment, packs, signal, xyz, subject))
    silence = silent_batch(trials, ids[:1], run.device)
    empty = score_packs(run, experiment, packs, *silence)
    return np.concatenate(rows), empty[0]


def silent_batch(trials, ids, device):
    """No EEG, of nobody."""
    signal, xyz, subject = trials.batch(ids, device)
    return torch.zeros_like(signal), xyz, torch.full_like(subject, -1)


def score_packs(run, experiment, packs, *signals):
    """Log-probability (N, K) of packed names after signals."""
    model = experiment.model.eval()
    head = model.lm.transformer.wte.weight.float()
    start = len(experiment.text.prompt) - 1
    with run.autocast():
        n = model.prefix(*signals)
    scores = []
    for idx, position, mask, target in packs:
        with run.autocast():
            x = model.trunk(n, idx.expand(len(n), -1), position, mask)[:, start:]
        lp = log_probs(F.linear(x.float(), head), target.expand(len(n), -1, -1))
        scores.append(lp.sum(-1))
    return torch.cat(scores, dim=1).double().cpu().numpy()


def pack_names(experiment, names, device):
    """Names packed some at a time, as many as fit into the GPT's block where that counts."""
    ids = experiment.text.of(names)
    chunk = 64
    if experiment.model.fusion == "cross":
        room = experiment.model.lm.config.block_size - len(experiment.text.prompt)
        chunk = max(1, min(chunk, room // max(map(len, ids))))
    packs = []
    for start in range(0, len(ids), chunk):
        pack = experiment.text.pack([ids[start : start + chunk]])
        packs.append([tensor.to(device) for tensor in pack])
    return packs


@torch.no_grad()
def say(run, config, experiment, ids, silent=False, temperature=0.0):
    """What the model says of each trial: N texts."""
    model, text = experiment.model.eval(), experiment.text
    said = []
    for part in np.split(ids, range(64, len(ids), 64)):
        signals = experiment.trials.batch(part, run.device)
        if silent:
            signals = silent_batch(experiment.trials, part, run.device)
        options = {"temperature": temperature, "seed": key_seed(config.seed, int(part[0]))}
        with run.autocast():
            n = model.prefix(*signals)
            rows = model.generate(
                n, text.prompt, config.max_new_tokens, stop=[text.stop], **options
            )
        said += [text.tokenizer.decode(row).strip() for row in rows]
    return said


def over_objects(values, objects, draws, seed):
    """Mean of values (N,), and its 95 % bootstrap interval over objects (N,)."""
    code = np.unique(objects, return_inverse=True)[1]
    total, count = np.bincount(code, values), np.bincount(code)
    rng = np.random.default_rng(key_seed(seed, "bootstrap"))
    chosen = rng.integers(len(total), size=(draws, len(total)))
    means = total[chosen].sum(1) / count[chosen].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean(values)), float(low), float(high)


def strata(table, least=10):
    """(N,) within what trials change places under the null, so that slow drift is no knowledge.

    Blocks of a recording; where a block has fewer than `least` of the trials, the rest of its
    recording, and then of all: a trial that can only stay where it is tests nothing.
    """
    recording = table.recording.astype(str)
    codes = (recording + "/" + table.block).to_numpy()
    for wider in (recording.to_numpy(), "all"):
        _, code, count = np.unique(codes, return_inverse=True, return_counts=True)
        codes = np.where(count[code] < least, wider, codes)
    return codes


def permuted(right, places, draws, seed):
    """Scores of shuffled EEG: right (N, N), what trial j's EEG gives for trial i's name.

    Trials change places within places (N,) only. Returns the expected score (N,) of each trial,
    and p of the mean score: the share of `draws` permutations that reach it.
    """
    rng = np.random.default_rng(key_seed(seed, "shuffle"))
    groups = [np.flatnonzero(places == place) for place in np.unique(places)]
    own = np.arange(len(right))
    reached = 0
    for _ in range(draws):
        other = own.copy()
        for group in groups:
            other[group] = rng.permutation(group)
        reached += right[own, other].mean() >= right[own, own].mean() - 1e-12
    expected = np.zeros(len(right))
    for group in groups:
        expected[group] = right[np.ix_(group, group)].mean(1)
    return expected, (1 + reached) / (1 + draws)


def top_k(scores, k):
    """Is each name among the k best of a trial's scores (N, K)? Ties are shared out by chance."""
    above = scipy.stats.rankdata(-scores, "min", axis=1) - 1
    ties = scipy.stats.rankdata(-scores, "max", axis=1) - above
    return np.clip((k - above) / ties, 0, 1)


def place(scores):
    """Place of each name among a trial's scores (N, K): 0 the best, 1 the last; ties share it."""
    return (scipy.stats.rankdata(-scores, axis=1) - 1) / max(1, scores.shape[1] - 1)


class Card:
    """The scores of one evaluation set, as rows of results.csv."""

    def __init__(self, config, name, table):
        self.config = config
        self.name = name
        self.objects = table.object.to_numpy()
        self.strata = strata(table)
        self.rows = []

    def add(self, metric, values, chance, control="eeg", **more):
        """values (N,): what each trial scores."""
        values = np.asarray(values, float)
        config = self.config
        mean, low, high = over_objects(values, self.objects, config.shuffles, config.seed)
        row = {"score": mean, "chance": float(chance), "low": low, "high": high, "n": len(values)}
        self.rows.append({"set": self.name, "metric": metric, "control": control, **row, **more})

    def add_with_shuffled(self, metric, good, own, chance=None, sign=1):
        """good (N, K): what each trial's EEG gives for each name; own (N,): the trial's name.

        sign -1: less is better. chance: of shuffled EEG, where none is known.
        """
        right = sign * good[:, own].T
        expected, p = permuted(right, self.strata, self.config.shuffles, self.config.seed)
        if chance is None:
            chance = (sign * expected).mean()
        self.add(metric, good[np.arange(len(own)), own], chance, p=p)
        self.add(metric, sign * expected, chance, "shuffled")


def evaluate(run, config, experiment, name, prior):
    """Every score of a set beside its controls: rows, and what was said of each trial.

    prior (K,): log-probability of each of all names, averaged over validation trials.
    """
    trials, text = experiment.trials, experiment.text
    ids = subset(experiment.sets[name], config)
    table = trials.table.iloc[ids]
    card = Card(config, name, table)
    common = trials.table.word.iloc[experiment.sets["train"]].value_counts().index
    scores, empty = rank(run, experiment, ids, trials.words)
    rank_closed_set(card, text, table, common, scores, empty, trials.words)
    search = top_k(scores - prior, 1)  # among all names, held out or not
    card.add_with_shuffled("said by search", search, trials.word[ids], 1 / len(trials.words))
    said = say(run, config, experiment, ids)
    nothing = say(run, config, experiment, ids[:1], silent=True)[0]
    score_said(card, text, table, common[0], said, nothing)
    points = experiment.space.names(text.of(trials.words))
    answers = [text.tokenizer.encode(" " + (answer or "?")) for answer in said]
    similar = (experiment.space.names(answers) @ points.T).numpy()  # (N, all names)
    card.add_with_shuffled("similarity", similar, trials.word[ids])
    card.add_with_shuffled("similarity rank", place(similar), trials.word[ids], sign=-1)  # 0 best
    samples = table[["subject", "object", "word", "image"]].assign(set=name, said=said)
    return card.rows, samples.assign(
        ranked=best_names(scores - empty, sorted(set(table.word)), trials.words),
        search=np.array(trials.words)[(scores - prior).argmax(1)],
        data=trials.data,
    )


def rank_closed_set(card, text, table, common, scores, empty, words):
    """Top-1 and top-5 among the names of the set; scores (N, K) and empty (K,) of all words."""
    names = sorted(set(table.word))
    columns = np.searchsorted(words, names)
    scores, empty = scores[:, columns], empty[columns]
    own = np.searchsorted(names, table.word)
    lengths = 1 + np.array(list(map(len, text.of(names))))
    information = scores - empty  # pointwise mutual information of name and EEG
    one = 1 / len(names)
    five = min(1.0, 5 * one)
    card.add_with_shuffled("top1", top_k(information, 1), own, one)
    card.add_with_shuffled("top5", top_k(information, 5), own, five)
    card.add_with_shuffled("top1 by pmi per token", top_k(information / lengths, 1), own, one)
    card.add_with_shuffled("top1 by likelihood", top_k(scores, 1), own, one)
    for k, chance in ((1, one), (5, five)):
        card.add(f"top{k}", top_k(empty[None], k)[0, own], chance, "empty")
        card.add(f"top{k}", table.word.isin(common[:k]), chance, "majority")


def score_said(card, text, table, majority, said, nothing):
    """Accuracy of the texts that were said, to the letter and flexibly."""
    names = sorted(set(table.word))
    own = np.searchsorted(names, table.word)
    for metric, right in (("naive accuracy", naive), ("flexible accuracy", flexible)):
        good = np.zeros((len(said), len(names)))
        for j, name in enumerate(names):
            answers = (name, text.synonyms[name]) if right is flexible else (name,)
            good[:, j] = [right(answer, *answers) for answer in said]
        most = [right(majority, word) for word in table.word]
        card.add_with_shuffled(metric, good, own, np.mean(most))
        card.add(metric, [right(nothing, word) for word in table.word], np.mean(most), "empty")
        card.add(metric, most, np.mean(most), "majority")


def best_names(scores, names, words):
    """The five best of a set's names for each trial, as a text."""
    columns = np.searchsorted(words, names)
    best = np.argsort(-scores[:, columns], axis=1, kind="stable")[:, :5]
    return [" ".join(row) for row in np.array(names)[best]]


def validate(run, config, experiment):
    """Ranking of validation trials among the training words: cross-entropy and top-1."""
    ids = subset(experiment.sets["val"], config)
    words = experiment.train_words
    scores, empty = rank(run, experiment, ids, words)
    own = np.searchsorted(words, experiment.trials.table.word.iloc[ids])
    information = scores - empty
    loss = F.cross_entropy(torch.from_numpy(information), torch.from_numpy(own)).item()
    right = top_k(information, 1)[np.arange(len(ids)), own].mean()
    return {"val_rank_loss": loss, "val_top1": float(right), "val_chance": 1 / len(words)}


def prior_of_names(run, config, experiment):
    """log p(name) (K,) of all names: p(name | EEG) averaged over validation trials."""
    ids = subset(experiment.sets["val"], config)
    scores = rank(run, experiment, ids, experiment.trials.words)[0]
    return np.logaddexp.reduce(scores, axis=0) - math.log(len(ids))


def probes(experiment):
    """Validation trials whose neural tokens are kept: one each of some words."""
    ids = experiment.sets["val"]
    ids = ids[np.unique(experiment.trials.word[ids], return_index=True)[1]]
    return ids[np.linspace(0, len(ids) - 1, min(PROBES, len(ids))).astype(int)]


@torch.no_grad()
def keep_tokens(run, experiment, step):
    """Keep the neural tokens of the probes (N, P, C) for telepath_questions.py."""
    signals = experiment.trials.batch(probes(experiment), run.device)
    with run.autocast():
        tokens = experiment.model.eval().prefix(*signals)
    folder = run.out / "tokens"
    folder.mkdir(exist_ok=True)
    for file in folder.glob("*.npy"):
        if int(file.stem) >= step:  # of an earlier run, or beyond the checkpoint
            file.unlink()
    with aside(folder / f"{step:07d}.npy") as file:
        np.save(file, tokens.float().cpu().numpy())


def report(run, config, experiment, training):
    """Score the evaluation sets with the best model, once, and draw the figures."""
    run.barrier()
    experiment.model.load_state_dict(run.load("best.pt")["model"])
    if run.master:
        rows, samples = evaluate_sets(run, config, experiment)
        table = pd.DataFrame(rows)
        decisive = (table.metric == "top1") & (table.control == "eeg")
        corrected = mne.stats.bonferroni_correction(table.p[decisive])[1]
        table.loc[decisive, "p_corrected"] = corrected.clip(max=1)
        for row in table.to_dict("records"):
            run.result(**{key: value for key, value in row.items() if value == value})  # no nan
        write_aside(run.out / "samples.csv", samples.to_csv(index=False))
        run.print(samples.groupby("set", sort=False).head(3).to_string(index=False))
        run.print(summary(table).to_string(float_format="{:.3f}".format))
        title = f"{experiment.trials.data}; lm={config.lm}, {config.encoder} encoder"
        plot_curves(run.out / "curves.png", run.out / "log.jsonl", title)
        plot_results(run.out / "results.png", table, f"{title}: 95 % intervals over objects")
    run.merge()
    run.print(
        f"step {training.best_step} was chosen on validation (ranking loss {training.best:.3f}); "
        f"{training.loader.waited:.2f} s were spent waiting for data"
    )


def evaluate_sets(run, config, experiment):
    """Rows and samples of all evaluation sets that have trials."""
    words, ids = experiment.trials.words, experiment.text.ids
    unsayable = [word for word in words if len(ids[word]) > config.max_new_tokens]
    if unsayable:
        run.print(
            f"{len(unsayable)} of {len(words)} names are longer than max_new_tokens="
            f"{config.max_new_tokens} and cannot be said: {', '.join(unsayable[:10])}"
        )
    prior = prior_of_names(run, config, experiment)
    rows, samples = [], []
    for name in SETS:
        if not len(experiment.sets[name]):
            run.print(f"set {name} is empty with these data and options")
            continue
        set_rows, set_samples = evaluate(run, config, experiment, name, prior)
        samples.append(set_samples)
        for row in set_rows:
            rows.append({**row, "data": experiment.trials.data, "unsayable": len(unsayable)})
    return rows, pd.concat(samples)


def summary(table):
    """A line a set and metric: score, interval, chance and controls."""
    keys = ["set", "metric"]
    main = table[table.control == "eeg"].set_index(keys)
    for control in ("shuffled", "empty", "majority"):
        main[control] = table[table.control == control].set_index(keys).score
    columns = ["score", "low", "high", "chance", "shuffled", "empty", "majority", "p", "n"]
    return main.loc[pd.IndexSlice[:, list(METRICS)], columns].rename(index=METRICS, level=1)


# ---- plots


def save_figure(figure, path):
    with aside(path) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def spread(rows):
    """Error bars (2, N) of rows with score, low and high."""
    return np.abs(rows[["low", "high"]].T.to_numpy() - rows.score.to_numpy())


def plot_curves(path, log, title):
    """Training and validation over steps, from the log."""
    table = pd.read_json(log, lines=True)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, keys in zip(axes, (("train_loss", "val_rank_loss"), ("val_top1", "val_chance"))):
        for key in keys:
            if key in table:
                points = table[table[key].notna()]
                axis.plot(points.step, points[key], label=key)
        axis.set_xlabel("step")
        axis.legend()
    axes[0].set_ylabel("nats")
    axes[1].set_ylabel("top-1 among training words")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


METRICS = {"top1": "closed-set top-1", "top5": "closed-set top-5"}
METRICS |= {"flexible accuracy": "said right", "said by search": "said right, by search"}
METRICS |= {"similarity": "similarity of what is said"}
COLOURS = {"eeg": "#c23b22", "shuffled": "#4878a8", "empty": "#999999", "majority": "#d9a441"}


def plot_results(path, table, title):
    """Every set beside its controls: dots with 95 % intervals over objects."""
    figure, axes = plt.subplots(1, len(METRICS), figsize=(15, 3.8), layout="constrained")
    sets = list(dict.fromkeys(table.set))
    for axis, metric in zip(axes, METRICS):
        for k, (control, colour) in enumerate(COLOURS.items()):
            rows = table[(table.metric == metric) & (table.control == control)]
            x = [sets.index(name) + 0.16 * (k - 1.5) for name in rows.set]
            axis.errorbar(x, rows.score, spread(rows), fmt="o", capsize=2, c=colour, label=control)
        rows = table[(table.metric == metric) & (table.control == "eeg")]
        x = np.arange(len(rows))
        axis.hlines(rows.chance, x - 0.4, x + 0.4, "k", lw=0.8, ls=":", label="chance")
        axis.set_xticks(range(len(sets)), [name.replace("_", "\n") for name in sets], fontsize=8)
        axis.set_title(METRICS[metric], fontsize=10)
    labels = axes[0].get_legend_handles_labels()
    figure.legend(*labels, fontsize=8, frameon=False, loc="outside lower center", ncols=5)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


# ---- the run

UNSETTLED = 10**9  # max_iters until `minutes` has settled it
WARM_UP = 3  # steps that are not measured


def settle(run, config, training):
    """With `minutes`, settle max_iters once enough steps were measured."""
    if config.max_iters != UNSETTLED:
        return
    durations = training.durations[WARM_UP:]
    measured = run.reduce(sum(durations), "max")
    if measured < min(20.0, 3 * config.minutes):
        return
    step = measured / len(durations)
    elapsed = run.reduce(time.time() - run.start, "max")
    left = 60 * config.minutes - elapsed - 10 * training.validation  # the last evaluation
    n_steps = left / (step + training.validation / config.eval_interval)
    config.max_iters = training.step + max(1, int(n_steps))
    run.save_config()
    run.print(f"minutes={config.minutes:g}: that is max_iters={config.max_iters} here")


def describe(run, experiment):
    """Say what is trained on what, and write splits.json."""
    if run.master:
        write_aside(run.out / "splits.json", json.dumps(experiment.manifest, indent=1))
    trials = experiment.trials
    run.print("\n".join(dict.fromkeys(trials.notes)))
    counts = ", ".join(f"{name} {len(ids):,}" for name, ids in experiment.sets.items())
    parts = []
    for name, parameters in parameter_sets(experiment.model).items():
        millions = sum(p.numel() for p in parameters) / 1e6
        learns = any(p.requires_grad for p in parameters)
        parts.append(f"{name} {millions:.2f} M" + " frozen" * (not learns))
    run.print(
        f"{trials.data}: {len(trials.recordings)} recordings, {counts} trials; split "
        f"{experiment.manifest['hash']} ({experiment.manifest['purged']} purged for overlap) | "
        f"{', '.join(parts)} | {run.device} {str(run.dtype)[6:]}"
    )


def save(run, config, experiment, training, name):
    """Write a checkpoint; ckpt.pt has what a resumed run needs, too."""
    model, sets = experiment.model, experiment.sets
    seen = np.concatenate([sets["train"], sets["val"]])
    state = {
        "kind": "telepath",
        "lm_args": asdict(model.lm.config),
        "encoder_args": asdict(model.encoder.config),
        "fusion_args": model.args,
        "model": model.state_dict(),
        "tokenizer": experiment.text.tokenizer.state,
        "step": training.step,
        "split": experiment.manifest["hash"],
        "config": asdict(config),
    }
    state["trained_on"] = {
        "dataset": experiment.manifest["dataset"],
        "trials": trial_names(experiment.trials, seen),
    }
    if name == "ckpt.pt":
        state |= {"optimizer": training.optimizer.state_dict(), "best": training.best}
        state |= {"scaler": run.scaler.state_dict(), "reference": training.reference}
        state |= {"best_step": training.best_step, "wte": experiment.space.wte}
    run.save(name, state)


def validate_and_choose(run, config, experiment, training):
    """Score validation trials, keep the probes' neural tokens, and the model if it is the best."""
    start = time.time()
    scores = validate(run, config, experiment)
    training.validation = run.reduce(time.time() - start, "max")
    run.log(training.step, **scores)
    if run.master:
        keep_tokens(run, experiment, training.step)
    if scores["val_rank_loss"] < training.best:
        training.best = scores["val_rank_loss"]
        training.best_step = training.step
        save(run, config, experiment, training, "best.pt")


def log_step(run, config, training, parts, norm):
    """Log what the losses (a dict of each micro-batch) were made of, mean over ranks."""
    if training.step % config.log_interval == 0 or training.step == 1:
        numbers = {}
        for key in parts[0]:
            mean = torch.stack([part[key].detach() for part in parts]).mean()
            numbers[f"train_{key}"] = run.reduce(mean.item()) / run.world
        run.log(training.step, **numbers, grad_norm=norm.item())


def main(config):
    config.out_dir = config.out_dir or "out/telepath" + "_dpo" * (config.stage == "dpo")
    run = Run(config)
    experiment = prepare(run, config, run.dataset(config.dataset))
    training = Training(run, config, experiment, experiment.sets["train"])
    describe(run, experiment)
    run.rewind(training.step)
    if config.minutes and not training.step:
        config.max_iters = UNSETTLED
    if config.compile:
        experiment.model.lm.compile_blocks()
    train_step = preference_step if config.stage == "dpo" else supervised_step
    bar = run.progress(config.max_iters, training.step, config.stage)
    run.stopping()  # from here on a signal waits for the end of a step
    while True:
        finished = training.step >= config.max_iters
        moved = training.step != training.resumed
        if (moved and (finished or training.step % config.eval_interval == 0)) or not training.step:
            validate_and_choose(run, config, experiment, training)
        if moved and (finished or run.stopped or training.step % config.save_interval == 0):
            save(run, config, experiment, training, "ckpt.pt")
        if finished or run.stopped:
            break
        start = time.time()
        parts, norm = train_step(run, config, experiment, training)
        bar.update()
        run.stopping()
        log_step(run, config, training, parts, norm)
        training.durations.append(time.time() - start)
        settle(run, config, training)
        bar.total = config.max_iters
    bar.close()
    if not run.stopped:
        report(run, config, experiment, training)
    run.close()


if __name__ == "__main__":
    main(configure(Config))
