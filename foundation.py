"""What can be learned from brain recordings without labels? A masked autoencoder of electrodes.

    python foundation.py                                        # embedded: minutes on two cores
    python foundation.py minutes=4                              # as many steps as fit
    python foundation.py dataset=FOLDER montage=colin27_1005    # files that MNE reads
    torchrun --standalone --nproc_per_node=4 foundation.py config/foundation_podcast.yaml
    python foundation.py init_from=resume                       # continue after a stop, bit for bit

A token is a patch of time of one electrode, known by its place, never its index. Most tokens are
hidden: NeuralEncoder reads the visible ones, and a small decoder fills in the rest. The table
compares R² of hidden patches on held-out stretches of every recording, relative to each channel's
mean, with interpolation in time, the nearest electrodes, and ridge from the visible patches.

decode.py and telepath.py use the latents, encoder(x, xyz, subject) -> (B, patches, n_embd). So can
your code:

    encoder, recipe = model.load_encoder("out/foundation")
    y = resampled(recording.signal, recording.sfreq, recipe)  # data/recording.py: (T, C, F)
    centre, scale = robust_scale(y[rows of training])
    x = encoder_input(windows (N, T, C, F) of y, recipe, centre, scale)
    xyz = places(recording.names, recording.xyz, recording.good, recipe["grid"])
    encoder(x, xyz, subject)               # index in recipe["subjects"]; -1: a new person

He et al. 2022 (masked autoencoders); Tong et al. 2022 (tubes); Défossez et al. 2023 (electrodes as
places).
"""

import math
import re
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
from scipy.spatial.distance import cdist
from torch.nn.parallel import DistributedDataParallel

from configurator import InputError, Run, configure, key_seed
from data.montage import is_subject
from data.raw import READABLE, convert_files, converted_files, inside_spans
from data.recording import Recording, encoder_input, places, read_set, resampled, robust_scale
from model import EncoderConfig, NeuralEncoder, cut_patches

MASKS = ("random", "tube", "span")


def default(*values):
    """Return a dataclass field whose default is a list of values."""
    return field(default_factory=lambda: list(values))


@dataclass
class Config:
    # ---- recordings
    dataset: list[str] = default("synthetic_podcast")  # prepared sets, or folders in formats of MNE
    subjects: list[str] = default()  # only these people; none: all
    channels: str = ""  # regular expression that names start with: LG[AB]*; "": all
    montage: str = ""  # MNE's montage for files without electrode places: colin27_1005
    grid: str = ""  # 8x8: use only channels G1 .. G64, placed on a grid whatever xyz says
    sfreq: float = 32.0  # Hz, after averaging blocks of samples
    bands: list[list[float]] = default()  # envelopes (Hz) instead of the signal: [[4,8],[70,150]]
    clamp: float = 8.0  # clip at this many robust SD of the channel
    window: float = 0.5  # s
    patch: int = 4  # samples per token
    # ---- each recording is split into training, validation and test, one window apart
    val_share: float = 0.15  # share of a recording's time
    test_share: float = 0.15  # share of a recording's time
    # ---- masks
    # random: patches; tube: electrodes, for the whole window; span: one stretch, all electrodes
    masks: list[str] = default("random", "tube")  # micro-batches take them in turn
    mask_ratio: float = 0.75  # hidden share
    # ---- model
    n_embd: int = 64  # values per latent
    width: int = 64  # width of the encoder
    n_layer: int = 3
    n_head: int = 4
    degree: int = 3  # degree of the Fourier code of places
    decoder_width: int = 128  # width of the decoder's state per patch
    decoder_layers: int = 2  # rounds of guessing the hidden patches
    latent_weight: float = 1.0  # weight of the second loss: a linear readout of all patches
    dropout: float = 0.0  # in the encoder
    # ---- optimiser
    batch_size: int = 64  # windows per micro-batch, all of one recording
    windows_per_step: int = 0  # over all ranks; 0: one micro-batch per rank
    learning_rate: float = 2e-3  # AdamW's peak
    weight_decay: float = 0.05  # on matrices
    grad_clip: float = 1.0  # maximum total norm
    max_iters: int = 4000  # optimiser steps
    minutes: float = 0.0  # replaces max_iters with the number of steps that fit
    warmup_iters: int = 100  # steps of linear warm-up, then cosine to 0
    # ---- evaluation
    eval_interval: int = 250  # steps between validations
    eval_windows: int = 256  # windows of each recording to score; 0: all
    block: float = 5.0  # s, length of the blocks that the bootstrap resamples
    bootstraps: int = 1000  # bootstrap samples
    # ridge penalties to choose from on validation windows
    alphas: list[float] = default(0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
    ridge_limit: int = 8192  # skip ridge where a window has more values
    # ---- run
    out_dir: str = "out/foundation"  # best.pt, results.csv, figures
    init_from: Literal["scratch", "resume"] = "scratch"  # resume: continue after a stop
    overwrite: bool = False  # start over in a folder that holds a run
    seed: int = 1337  # for weights, windows, masks, dropout and the bootstrap
    device: str = "auto"  # cuda, mps, cpu
    dtype: str = "float32"  # auto: bfloat16 where it is faster
    compile: bool = False  # compile the encoder's blocks
    deterministic: bool = False  # bit-for-bit repeats on CUDA too, but slower
    log_interval: int = 50  # steps between log lines
    save_interval: int = 500  # steps between checkpoints
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = "nanocortex"  # project on Weights & Biases

    POSITIVE = (
        "dataset masks sfreq window patch clamp mask_ratio val_share test_share n_embd width "
        "n_layer n_head decoder_width decoder_layers batch_size grad_clip max_iters alphas "
        "eval_interval save_interval log_interval block bootstraps"
    )
    SHARES = "mask_ratio val_share test_share"

    def check(self):
        samples = self.samples
        if self.mask_ratio >= 1:
            raise InputError(f"mask_ratio={self.mask_ratio} hides everything: keep it below 1")
        if set(self.masks) - set(MASKS):
            raise InputError(f"masks={','.join(self.masks)}: choose from {', '.join(MASKS)}")
        if samples < self.patch or samples % self.patch:
            raise InputError(
                f"window={self.window:g} s has {samples} samples at sfreq={self.sfreq:g} Hz, which "
                f"patch={self.patch} does not divide: change one of the three"
            )
        if "span" in self.masks and samples == self.patch:
            raise InputError(f"masks=span needs a patch shorter than the window ({self.patch})")
        for band in self.bands:
            if len(band) != 2 or not 0 < band[0] < band[1]:
                raise InputError(f"bands={self.bands} must be pairs of Hz: [[4,8],[70,150]]")
        if not re.fullmatch(r"(\d+x\d+)?", self.grid):
            raise InputError(f"grid={self.grid} must be rows x columns: 8x8")
        if self.width % self.n_head:
            raise InputError(f"n_head={self.n_head} must divide width={self.width}")
        try:
            re.compile(self.channels)
        except re.error as error:
            problem = f"channels={self.channels} is not a regular expression"
            raise InputError(f"{problem}: {error}") from None

    @property
    def samples(self):
        """Samples per window."""
        return round(self.window * self.sfreq)


# ---- data


def find_recordings(run, name):
    """Return the folders of the recordings that one entry of dataset= names.

    Rank 0 converts a folder of files that MNE reads into out_dir/recordings, once.
    """
    folder = Path(name)
    prepared = (folder / "meta.yaml").exists() or (folder / "prepare.py").exists()
    if not folder.is_dir() or prepared:
        folder = run.dataset(name)
        return [folder / part for part in read_set(folder)["recordings"]]
    out = run.out / "recordings"
    if run.master:
        convert_files(folder, out, montage=run.config.montage, places=not run.config.grid)
    run.barrier()
    paths = converted_files(folder, out)
    if not paths:
        endings = ", ".join(READABLE)
        raise InputError(f"{folder} holds neither meta.yaml nor a file that MNE reads ({endings})")
    return paths


def usable_channels(recording, config):
    """Return indices and xyz of the good channels that match channels= and have a place."""
    xyz = places(recording.names, recording.xyz, recording.good, config.grid)
    matches = np.array([bool(re.match(config.channels, name)) for name in recording.names])
    channels = np.flatnonzero(matches & np.isfinite(xyz).all(1))
    if not len(channels):
        raise InputError(
            f"{recording.path}: none of {', '.join(recording.names[:6])}, ... is good, has a place "
            f"and matches channels={config.channels} and grid={config.grid}; a grid needs the "
            "names G1, G2, ...; files that MNE reads may need montage=, prepared sets x, y, z in "
            "channels.csv"
        )
    return channels, xyz[channels]


def clean_rows(recording, n_rows, sfreq):
    """Mark the rows (n_rows,) at sfreq that touch no BAD segment and no seam between epochs."""
    seconds = recording.first_sample / recording.sfreq + np.arange(n_rows) / sfreq
    bad = recording.meta.get("bad_spans", [])
    clean = ~inside_spans(seconds, seconds + 1 / sfreq, bad)
    if "epoch_samples" in recording.meta:  # concatenated epochs: no window may cross a seam
        edges = np.arange(n_rows + 1) * recording.sfreq / sfreq + 1e-6
        epoch = edges // recording.meta["epoch_samples"]
        clean &= epoch[1:] == epoch[:-1]
    return clean


class Source:
    """One recording, resampled, scaled and split in time. Raises InputError if nothing is left.

    signal (T, C, F) float32; names and xyz (C, 3) of its channels; centre and scale (C, F): robust,
    of clean training time; mean (C, F) of the scaled signal; spans {split: (begin, end)} in rows;
    starts {split: first rows of windows}, which overlap in training and nowhere else.
    """

    def __init__(self, recording, dataset, config):
        self.dataset = dataset
        self.name = recording.path.name
        self.person = recording.subject
        self.synthetic = recording.synthetic
        self.config = config
        channels, xyz = usable_channels(recording, config)
        signal = resampled(recording.signal, recording.sfreq, asdict(config), channels)
        clean = clean_rows(recording, len(signal), config.sfreq)
        self.split(clean, recording.path)
        end = self.spans["train"][1]
        train = signal[:end][clean[:end]]
        # a channel may be flat or hold NaN although it is not marked bad
        varies = (train.std(0, dtype=float) > 1e-6 * np.abs(train).max(0)).all(1)
        varies &= np.isfinite(signal).all((0, 2))
        if varies.sum() < 2:
            raise InputError(
                f"{recording.path}: only {varies.sum()} of {len(channels)} channels vary and have "
                "no NaN; predicting one from another needs two"
            )
        names = np.array(recording.names)[channels]
        self.names = names[varies].tolist()
        self.left_out = names[~varies].tolist()
        self.signal = np.ascontiguousarray(signal[:, varies])
        self.xyz = torch.from_numpy(xyz[varies]).float()
        train = train[:, varies]
        centre, scale = robust_scale(train)
        self.centre = centre.astype(np.float32)
        self.scale = scale.astype(np.float32)
        scaled = np.clip((train - self.centre) / self.scale, -config.clamp, config.clamp)
        self.mean = scaled.mean(0)

    def split(self, clean, path):
        """Set spans and starts; windows may only hold the rows in clean (T,)."""
        config = self.config
        width = config.samples
        end = len(clean)
        val = round(end * (1 - config.val_share - config.test_share))
        test = round(end * (1 - config.test_share))
        self.spans = {"train": (0, val), "val": (val + width, test), "test": (test + width, end)}
        self.starts = {}
        n_bad = np.concatenate([[0], np.cumsum(~clean)])
        for split, (first, last) in self.spans.items():
            starts = np.arange(first, last - width + 1, 1 if split == "train" else width)
            starts = starts[n_bad[starts + width] == n_bad[starts]]
            if not len(starts):
                raise InputError(
                    f"{path} has {end / config.sfreq:.1f} s, of which {clean.mean():.0%} are not "
                    f"BAD: too few for {split} windows; shorten window={config.window:g}"
                )
            self.starts[split] = starts

    def cut(self, starts):
        """Cut windows (N, C, P * F * patch), in robust SD, that begin at some rows."""
        windows = self.signal[np.asarray(starts)[:, None] + np.arange(self.config.samples)]
        return encoder_input(windows, asdict(self.config), self.centre, self.scale)

    def centred(self, x):
        """Subtract each channel's mean: windows (N, C, P * F * patch) -> (N, C, P, F * patch)."""
        mean = np.repeat(self.mean, self.config.patch, axis=1)  # (C, F * patch)
        return x.reshape(len(x), len(mean), -1, mean.shape[1]) - mean[:, None]

    def facts(self):
        """Return what the checkpoint stores about the recording."""
        return {
            "dataset": self.dataset,
            "name": self.name,
            "subject": self.person,
            "channels": self.names,
            "xyz": self.xyz,
            "centre": torch.from_numpy(self.centre),
            "scale": torch.from_numpy(self.scale),
            "seen": [row / self.config.sfreq for row in self.spans["train"]],
        }


class Batch(NamedTuple):
    """Windows of one recording and their visible patches."""

    x: torch.Tensor  # (B, C, P * D), D = F * patch values in a patch
    visible: torch.Tensor  # (B, C, P) bool, equally many in each window
    xyz: torch.Tensor  # (C, 3)
    subject: torch.Tensor  # (B,)
    electrodes: torch.Tensor  # (C,) indices among all electrodes of all people


class Corpus:
    """All recordings of dataset= and batches of them; recipe is what a checkpoint stores."""

    def __init__(self, run, config):
        self.run = run
        self.config = config
        self.n_patches = config.samples // config.patch
        self.patch_values = config.patch * max(1, len(config.bands))
        self.sources = self.load()
        people = sorted({(source.dataset, source.person) for source in self.sources})
        numbers = {}
        for source in self.sources:
            person = (source.dataset, source.person)
            source.subject = people.index(person)
            keys = [(*person, name) for name in source.names]
            rows = [numbers.setdefault(key, len(numbers)) for key in keys]
            source.electrodes = torch.tensor(rows)
        self.n_electrodes = len(numbers)
        n_windows = np.array([len(source.starts["train"]) for source in self.sources])
        self.share = n_windows / n_windows.sum()
        synthetic = any(source.synthetic for source in self.sources)
        self.title = ", ".join(config.dataset) + ", synthetic" * synthetic
        names = ("sfreq", "window", "patch", "bands", "clamp", "grid")
        self.recipe = {name: getattr(config, name) for name in names}
        self.recipe["subjects"] = [person for _, person in people]
        self.recipe["recordings"] = [source.facts() for source in self.sources]

    def load(self):
        """Load recordings as Sources; leave out those that cannot be used, and print why."""
        config = self.config
        recordings = []
        for dataset in config.dataset:
            for path in find_recordings(self.run, dataset):
                recordings.append((dataset, Recording(path)))
        for subject in config.subjects:
            if not any(is_subject(subject, recording) for _, recording in recordings):
                raise InputError(f"subjects={subject}: nobody in dataset= has that name")
        sources = []
        for dataset, recording in recordings:
            matches = [is_subject(subject, recording) for subject in config.subjects]
            if matches and not any(matches):
                continue
            try:
                sources.append(Source(recording, dataset, config))
            except InputError as error:
                reason = error
                self.run.print(f"left out: {error}")
        if not sources:
            raise reason
        return sources

    def masked(self, source, starts, kind, rng):
        """Return a Batch of windows of a recording under masks of a kind."""
        shape = (len(starts), len(source.names), self.n_patches)
        visible = draw_mask(kind, shape, self.config.mask_ratio, rng)
        batch = Batch(
            torch.from_numpy(source.cut(starts)),
            torch.from_numpy(visible),
            source.xyz,
            torch.full((len(starts),), source.subject),
            source.electrodes,
        )
        return Batch(*[tensor.to(self.run.device) for tensor in batch])

    def batch(self, step, micro):
        """Draw a training batch: its recording, windows and masks, keyed by (seed, step, micro)."""
        config = self.config
        rng = np.random.default_rng(key_seed(config.seed, step, micro, "windows"))
        source = self.sources[rng.choice(len(self.sources), p=self.share)]
        starts = rng.choice(source.starts["train"], config.batch_size)
        kind = config.masks[(step + micro) % len(config.masks)]
        return self.masked(source, starts, kind, rng)

    def held_out(self, split, source, kind, size=64):
        """Yield (starts, Batch) of all windows to score: the same windows and masks every time."""
        rng = np.random.default_rng(key_seed(self.config.seed, split, source.name, kind))
        starts = source.starts[split]
        n = min(self.config.eval_windows or len(starts), len(starts))
        starts = starts[np.linspace(0, len(starts) - 1, n).astype(int)]
        for part in np.split(starts, range(size, n, size)):
            yield part, self.masked(source, part, kind, rng)


def draw_mask(kind, shape, ratio, rng):
    """Draw what is visible, (B, C, P) bool, in each window; never everything, never nothing."""
    B, C, P = shape
    n = {"random": C * P, "tube": C, "span": P}[kind]
    n_hidden = min(max(round(ratio * n), 1), n - 1)
    if kind == "span":
        after = np.arange(P) - rng.integers(P - n_hidden + 1, size=(B, 1))
        visible = ((after < 0) | (after >= n_hidden))[:, None]
    else:
        order = rng.permuted(np.tile(np.arange(n), (B, 1)), axis=1)
        visible = (order >= n_hidden).reshape(B, C, -1)
    return np.broadcast_to(visible, shape).copy()


# ---- model


class MaskedAutoencoder(nn.Module):
    """NeuralEncoder on the visible patches, and two ways back to the signal.

    The latents average its states over electrodes. A linear readout must recover every patch from
    them, so that they keep what the electrodes carry. The decoder, discarded after training, reads
    the latents and the visible patches and guesses the hidden ones; each further layer reads those
    guesses as if they were visible and corrects them. The encoder knows electrodes by place, the
    decoder by index: every electrode has its own weights into it and out of it.
    """

    def __init__(self, shape, n_electrodes, n_patches, decoder_width, decoder_layers):
        super().__init__()
        n_values = 16 * shape.patch  # roughly how many are visible at a time
        weights = (n_electrodes, shape.patch, decoder_width)
        width = n_patches * decoder_width  # the state of the whole window
        self.encoder = NeuralEncoder(shape)
        self.embed = nn.Parameter(torch.randn(weights) / n_values**0.5)
        self.seen = nn.Parameter(0.02 * torch.randn(n_electrodes, decoder_width))
        self.from_latents = nn.Linear(n_patches * shape.n_embd, width)
        self.mix = nn.Linear(width, width)
        self.blocks = nn.ModuleList()
        for _ in range(decoder_layers):
            layers = [nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()]
            self.blocks.append(nn.Sequential(*layers, nn.Linear(width, width)))
        # zeros, so that every first guess is 0, the median
        self.readout = nn.Parameter(torch.zeros(weights))
        self.latent_readout = nn.Parameter(torch.zeros(n_electrodes, shape.patch, shape.n_embd))

    def latents(self, x, visible, xyz, subject):
        """Return latents (B, P, n_embd) of the visible tokens alone."""
        net = self.encoder.net
        B, C, P = visible.shape
        index = visible.flatten(1).nonzero()[:, 1].view(B, -1, 1)  # K of the C P tokens
        tokens = net.tokenize(x, xyz, subject)[0].take_along_dim(index, 1)
        spots = net.spots(xyz, P).take_along_dim(index, 1)
        h = net.think(tokens, torch.ones_like(index[..., 0], dtype=torch.bool), spots)
        states = h.new_zeros(B, C * P, h.size(2)).scatter(1, index.expand_as(h), h)
        return net.output(net.pool(states, visible.flatten(1), P))

    def decode(self, latents, patches, visible, electrodes):
        """Guess all patches (B, C, P, D) without reading a hidden one."""
        C, P = visible.shape[1:]
        embed = self.embed[electrodes].flatten(0, 1)  # (C D, decoder_width)
        readout = self.readout[electrodes].flatten(0, 1)
        seen = visible.transpose(1, 2).to(embed.dtype) @ self.seen[electrodes]
        context = self.from_latents(latents.flatten(1)) + seen.flatten(1)  # (B, P decoder_width)
        guess = torch.zeros_like(patches)
        for block in self.blocks:
            filled = torch.where(visible[..., None], patches, guess)
            state = filled.transpose(1, 2).flatten(2) @ embed  # (B, P, decoder_width)
            state = self.mix(context + state.flatten(1))
            state = state + block(state)
            change = state.unflatten(1, (P, -1)) @ readout.T  # (B, P, C D)
            guess = guess + change.unflatten(2, (C, -1)).transpose(1, 2).float()
        return guess

    def forward(self, x, visible, xyz, subject, electrodes):
        """Map a Batch to losses (2,), decoder's and latents', and guesses (B, C, P, D)."""
        patches = cut_patches(x, self.encoder.config.patch)
        latents = self.latents(x, visible, xyz, subject)
        guess = self.decode(latents, patches, visible, electrodes)
        hidden_loss = (guess - patches).square()[~visible].mean()
        linear = torch.einsum("bpn,cdn->bcpd", latents, self.latent_readout[electrodes])
        latent_loss = (linear.float() - patches).square().mean()
        return torch.stack([hidden_loss, latent_loss]), guess


def build(config, corpus):
    """Build the autoencoder for the options and the recordings."""
    torch.manual_seed(key_seed(config.seed, "model"))
    args = {"kind": "transformer", "tokens": "electrode", "reach": True}
    for name in ("n_embd", "width", "n_layer", "n_head", "degree", "dropout"):
        args[name] = getattr(config, name)
    args |= {"patch": corpus.patch_values, "subjects": len(corpus.recipe["subjects"])}
    decoder = (config.decoder_width, config.decoder_layers)
    shape = EncoderConfig(**args)
    model = MaskedAutoencoder(shape, corpus.n_electrodes, corpus.n_patches, *decoder)
    return model.to(corpus.run.device)


# ---- baselines: x (N, C, P, D) centred, visible (N, C, P) -> guesses of all patches, like x


def interpolate(x, visible, n_features):
    """Interpolate each channel and feature linearly over time, flat beyond the visible samples."""
    N, C, P, D = x.shape
    x = x.reshape(N, C, P, n_features, -1).transpose(0, 1, 3, 2, 4)  # (N, C, F, P, patch)
    rows = np.where(visible[:, :, None, :, None], x, np.nan).reshape(N * C * n_features, -1)
    filled = pd.DataFrame(rows.T).interpolate(limit_direction="both").fillna(0.0)
    filled = filled.to_numpy().T.reshape(x.shape)
    return filled.transpose(0, 1, 3, 2, 4).reshape(N, C, P, D)


def neighbours(x, visible, xyz, k):
    """Average the k nearest electrodes that are visible at that time; 0 if none is."""
    distance = cdist(xyz, xyz)
    np.fill_diagonal(distance, math.inf)
    order = distance.argsort(axis=1, kind="stable")[:, :-1]  # (C, C - 1)
    seen = visible[:, order]  # (N, C, C - 1, P)
    nearest = (seen & (seen.cumsum(2) <= k)).astype(x.dtype)
    total = np.einsum("ncep,ncepd->ncpd", nearest, x[:, order])
    return total / np.maximum(nearest.sum(2), 1)[..., None]


def gram_matrix(source):
    """Return the Gram matrix (V, V) float64 of training windows of V = C P D values each."""
    starts = source.starts["train"]
    starts = starts[:: math.ceil(len(starts) / 50_000)]
    gram = 0.0
    for part in np.array_split(starts, math.ceil(len(starts) / 1024)):
        x = source.centred(source.cut(part)).reshape(len(part), -1).astype(np.float64)
        gram = gram + x.T @ x
    return gram


def ridge(x, visible, gram, alpha):
    """Predict hidden values from all visible ones of the window, by ridge over training windows.

    Every mask has its own solution, from one Gram matrix.
    """
    out = x.copy()
    for guess, mask in zip(out, visible):
        seen = np.broadcast_to(mask[..., None], guess.shape).ravel()
        values = guess.ravel()  # a view
        A = gram[np.ix_(seen, seen)] + alpha * np.eye(seen.sum())
        values[~seen] = np.linalg.solve(A, values[seen]) @ gram[np.ix_(seen, ~seen)]
    return out


def squared_errors(guess, x, visible):
    """Sum squared errors over the hidden values of each window: (N,)."""
    return (np.square(guess - x) * ~visible[..., None]).sum((1, 2, 3), dtype=float)


def best_on_validation(corpus, source, kind, candidates):
    """Return the candidate method(x, visible) with the least error on validation windows."""
    errors = np.zeros(len(candidates))
    for _, batch in corpus.held_out("val", source, kind):
        x = source.centred(batch.x.cpu().numpy())
        visible = batch.visible.cpu().numpy()
        for i, method in enumerate(candidates):
            errors[i] += squared_errors(method(x, visible), x, visible).sum()
    return candidates[errors.argmin()]


def baselines(corpus, source, kind, gram):
    """Return {name: method(x, visible)} for a recording under a kind of mask."""
    config = corpus.config
    by_k = [partial(neighbours, xyz=source.xyz, k=k) for k in (1, 2, 3, 4, 6, 8)]
    methods = {
        "interpolation": partial(interpolate, n_features=max(1, len(config.bands))),
        "neighbours": best_on_validation(corpus, source, kind, by_k),
    }
    if gram is not None:
        by_alpha = [partial(ridge, gram=gram, alpha=alpha) for alpha in config.alphas]
        methods["ridge"] = best_on_validation(corpus, source, kind, by_alpha)
    return methods


# ---- evaluate


@torch.no_grad()
def model_guess(run, model, source, batch):
    """Return the model's centred guesses (N, C, P, D) and its loss from the latents."""
    model.eval()
    with run.autocast():
        losses, guess = model(*batch)
    model.train()
    return source.centred(guess.flatten(2).cpu().numpy()), losses[1].item()


def score_windows(run, model, corpus, source, kind, split, methods=()):
    """Return one row per window: start, latent (loss), squared errors of model, mean, methods."""
    parts = []
    for starts, batch in corpus.held_out(split, source, kind):
        x = source.centred(batch.x.cpu().numpy())
        visible = batch.visible.cpu().numpy()
        guess, latent = model_guess(run, model, source, batch)
        part = {"start": starts, "latent": latent, "mean": squared_errors(0, x, visible)}
        part["encoder"] = squared_errors(guess, x, visible)
        for name in methods:
            part[name] = squared_errors(methods[name](x, visible), x, visible)
        parts.append(pd.DataFrame(part))
    return pd.concat(parts)


def validate(run, corpus, training):
    """Log R² of hidden patches by mask; save the model if R² minus the latents' loss is best."""
    start = time.time()
    numbers = {}
    score = 0.0
    for kind in corpus.config.masks:
        parts = []
        for source in corpus.sources:
            parts.append(score_windows(run, training.model, corpus, source, kind, "val"))
        table = pd.concat(parts)
        r2 = float(1 - table["encoder"].sum() / table["mean"].sum())
        latent = float(table["latent"].mean())
        numbers |= {f"val_r2_{kind}": r2, f"val_latent_loss_{kind}": latent}
        score += r2 - corpus.config.latent_weight * latent
    run.log(training.step, **numbers)
    if score > training.best:
        training.best = score
        training.save("best.pt")
    training.validation = time.time() - start


def report(run, model, corpus, config):
    """Score the test windows with the best model; write results.csv and figures."""
    state = run.load("best.pt")
    model.load_state_dict(state["model"])
    run.print(f"step {state['step']} was chosen on validation data: {run.out / 'best.pt'}")
    tables: dict = {kind: [] for kind in config.masks}
    for number, source in enumerate(corpus.sources):
        gram = None  # one recording at a time: it may take half a gigabyte
        n_values = len(source.names) * corpus.n_patches * corpus.patch_values
        if n_values <= config.ridge_limit:
            gram = gram_matrix(source)
        else:
            run.print(f"{source.name}: no ridge, {n_values:,} values exceed ridge_limit=")
        for kind, parts in tables.items():
            methods = baselines(corpus, source, kind, gram)
            part = score_windows(run, model, corpus, source, kind, "test", methods)
            block = (part["start"] / config.sfreq // config.block).astype(int)
            parts.append(part.assign(block=block, recording=number))
    for kind, parts in tables.items():
        # drop a method unless it ran on every recording
        report_mask(run, config, kind, pd.concat(parts).dropna(axis=1), corpus.title)
    plot_curves(run.out / "loss.png", run.out / "log.jsonl", corpus.title)
    plot_reconstruction(run.out / "reconstruction.png", run, model, corpus)


def report_mask(run, config, kind, table, data):
    """Report one kind of mask in results.csv and a line; intervals resample blocks of time."""
    sums = table.drop(columns=["start", "latent"]).groupby(["recording", "block"]).sum()
    rng = np.random.default_rng(key_seed(config.seed, "bootstrap"))
    draws = rng.integers(0, len(sums), (config.bootstraps, len(sums)))
    errors = np.vstack([sums.sum(), sums.to_numpy()[draws].sum(1)])  # first row: all blocks
    errors = pd.DataFrame(errors, columns=sums.columns)
    r2 = 1 - errors.drop(columns="mean").div(errors["mean"], axis=0)
    for name in r2.columns.drop("encoder"):
        r2[f"r2 - {name}"] = r2["encoder"] - r2[name]
    words = []
    for name, values in r2.items():
        low, high = values[1:].quantile([0.025, 0.975])
        if len(sums) == 1:  # one block has no spread
            low, high = -math.inf, math.inf
        keys = {"mask": kind, "data": data, "set": "test", "method": name, "metric": "r2"}
        if name.startswith("r2 - "):
            keys |= {"method": "encoder", "metric": name}
        run.result(values[0], 0.0, low, high, len(table), **keys)
        words.append(f"{name} {values[0]:.3f} [{low:.3f}, {high:.3f}]")
    run.print(f"{kind}: R² {', '.join(words)}; n = {len(table)} windows in {len(sums)} blocks")


# ---- plots


def plot_curves(path, log, title):
    """Plot both training losses, and R² of hidden validation patches."""
    table = pd.read_json(log, lines=True).set_index("step")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, prefix in zip(axes, ("train_", "val_r2_")):
        for name in table.filter(like=prefix):
            axis.plot(table[name].dropna(), label=name.removeprefix(prefix).replace("_", " "))
        axis.set_xlabel("step")
        axis.legend(frameon=False)
    axes[0].set(ylabel="mean squared error", title="training", yscale="log")
    axes[1].set(ylabel="R² of hidden patches", title="validation")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_reconstruction(path, run, model, corpus):
    """Plot the first test window of the first recording under each mask: electrodes over time."""
    config = corpus.config
    source = corpus.sources[0]
    n_rows = len(config.masks)
    options = {"squeeze": False, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(n_rows, 3, figsize=(10, 3.2 * n_rows), **options)
    for row, kind in zip(axes, config.masks):
        _, batch = next(corpus.held_out("test", source, kind, size=1))
        x = source.centred(batch.x.cpu().numpy())
        seen = batch.visible.cpu().numpy()[..., None]
        guess, _ = model_guess(run, model, source, batch)
        images = {"truth": x, "visible": np.where(seen, x, np.nan), "encoder": guess}
        limit = np.quantile(np.abs(x), 0.98)
        options = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r", "aspect": "auto"}
        for axis, (name, image) in zip(row, images.items()):
            image = image[0, :, :, : config.patch].reshape(len(source.names), -1)  # first band
            shown = axis.imshow(image, extent=(0, config.window, len(source.names), 0), **options)
            axis.set(title=f"{kind}: {name}", xlabel="s", ylabel="electrode")
        figure.colorbar(shown, ax=row, label="robust SD from the mean")
    figure.suptitle(f"{corpus.title}: a test window of {source.name}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- the run

UNSETTLED = 10**9  # max_iters until `minutes` settles it
WARM_UP = 3  # first steps, which are not timed
# options that a resumed run must keep: model shape, windows, and the score that picks best.pt
FIXED = "sfreq bands clamp window patch grid val_share test_share masks mask_ratio latent_weight"
FIXED += " n_embd width n_layer n_head degree dropout decoder_width decoder_layers"


def lr_share(step, config):
    """Return the share of the peak learning rate at a step: linear warm-up, then cosine to 0."""
    warmup = min(config.warmup_iters, config.max_iters // 5)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, config.max_iters - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


class Training:
    """The optimiser and counters of a run, which a checkpoint saves."""

    def __init__(self, run, config, corpus, model):
        self.run = run
        self.config = config
        self.corpus = corpus
        self.model = model
        per_step = config.windows_per_step or config.batch_size * run.world
        if per_step % (config.batch_size * run.world):
            raise InputError(f"windows_per_step={per_step}: give a multiple of batch_size x ranks")
        self.micros = range(run.rank, per_step // config.batch_size, run.world)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        fused = run.device.type != "mps"
        self.optimizer = torch.optim.AdamW(groups, **rates, betas=(0.9, 0.95), fused=fused)
        self.step = 0
        self.best = -math.inf
        self.durations: list[float] = []  # s per step
        self.validation = 0.0  # s of the last validation
        if config.init_from == "resume":
            self.resume(run.load("ckpt.pt"))
        elif config.minutes:
            config.max_iters = UNSETTLED
        self.net = model
        if run.world > 1:
            devices = [run.device] if run.device.type == "cuda" else None
            self.net = DistributedDataParallel(model, devices, broadcast_buffers=False)

    def resume(self, state):
        saved = state["config"]
        for key in FIXED.split():
            now = getattr(self.config, key)
            if saved.get(key, now) != now:  # an older checkpoint may lack the option
                raise InputError(f"ckpt.pt has {key}={saved[key]}, not {now}: keep that value")
        before = state["recording"]["recordings"]
        if not same_recordings(before, self.corpus.recipe["recordings"]):
            path = self.run.out / "ckpt.pt"
            raise InputError(f"{path} has other recordings than dataset= now: start a new run")
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # from the current options
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.run.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.best = state["best"]
        if self.config.minutes:
            same = self.config.minutes == saved["minutes"]
            self.config.max_iters = saved["max_iters"] if same else UNSETTLED
        self.run.rewind(self.step)

    def save(self, name):
        state = {
            "kind": "foundation",
            "encoder_args": asdict(self.model.encoder.config),
            "model": self.model.state_dict(),
            "recording": self.corpus.recipe,
            "step": self.step,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.run.scaler.state_dict(),
            "config": asdict(self.config),
        }
        self.run.save(name, state)


def same_recordings(before, now):
    """Return whether two recipes hold the same recordings with the same signals."""
    if len(before) != len(now):
        return False
    for a, b in zip(before, now):
        if any(a[key] != b[key] for key in ("name", "channels", "seen")):
            return False
        if not torch.allclose(a["scale"], b["scale"], rtol=1e-3, atol=0):
            return False
    return True


def train_step(run, config, training):
    """Take one optimiser step; return this rank's mean losses (2,) and the gradient norm."""
    model = training.model
    total = torch.zeros(2, device=run.device)
    for micro in training.micros:
        torch.manual_seed(key_seed(config.seed, training.step, micro, "dropout"))
        if run.world > 1:  # synchronise gradients once per step
            training.net.require_backward_grad_sync = micro == training.micros[-1]
        with run.autocast():
            losses, _ = training.net(*training.corpus.batch(training.step, micro))
        loss = losses[0] + config.latent_weight * losses[1]
        run.scaler.scale(loss / len(training.micros)).backward()
        total += losses.detach() / len(training.micros)
    run.scaler.unscale_(training.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    if not run.scaler.is_enabled() and not norm.isfinite():
        raise InputError(f"step {training.step + 1}: no finite gradient; lower learning_rate=")
    for group in training.optimizer.param_groups:
        group["lr"] = config.learning_rate * lr_share(training.step, config)
    run.scaler.step(training.optimizer)
    run.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    training.step += 1
    return total, norm


def settle(run, config, training):
    """With `minutes`, set max_iters once enough steps have been timed."""
    if config.max_iters != UNSETTLED:
        return
    durations = training.durations[WARM_UP:]
    measured = run.reduce(sum(durations), "max")
    if measured < min(20.0, 3 * config.minutes):
        return
    step = measured / len(durations)
    elapsed = run.reduce(time.time() - run.start, "max")
    remaining = 60 * config.minutes - elapsed - 10 * training.validation  # for the last evaluation
    n_steps = remaining / (step + training.validation / config.eval_interval)
    config.max_iters = training.step + max(1, int(n_steps))
    run.save_config()
    run.print(f"minutes={config.minutes:g} sets max_iters={config.max_iters} on this machine")


def describe(run, corpus, model):
    """Print the recordings and the size of the encoder."""
    parts = []
    for source in corpus.sources:
        seconds = source.spans["train"][1] / corpus.config.sfreq
        dropped = f" ({', '.join(source.left_out)} flat or with NaN)" * bool(source.left_out)
        parts.append(f"{source.name} {len(source.names)} electrodes{dropped}, {seconds:.0f} s")
    run.print(f"{corpus.title}, training time: {'; '.join(parts)}")
    n_weights = sum(p.numel() for p in model.encoder.parameters())
    run.print(f"encoder: {n_weights:,} parameters | {run.device} {str(run.dtype)[6:]}")


def main(config):
    run = Run(config)
    corpus = Corpus(run, config)
    model = build(config, corpus)
    training = Training(run, config, corpus, model)
    describe(run, corpus, model)
    if config.compile:
        for block in model.encoder.net.blocks:
            block.compile()
    run.stopping()  # from now on a signal takes effect after the current step
    if not training.step:
        validate(run, corpus, training)
    bar = run.progress(config.max_iters, training.step, "pretrain")
    recent = []  # losses since the last log line, averaged over all masks
    while training.step < config.max_iters and not run.stopped:
        start = time.time()
        losses, norm = train_step(run, config, training)
        recent.append(losses)
        run.stopping()
        if training.step % config.log_interval == 0 or training.step == 1:
            hidden, latents = (run.reduce(torch.stack(recent).mean(0)) / run.world).tolist()
            numbers = {"train_hidden": hidden, "train_from_latents": latents}
            run.log(training.step, **numbers, grad_norm=norm.item())
            recent.clear()
        training.durations.append(time.time() - start)
        settle(run, config, training)
        bar.total = config.max_iters
        bar.update()
        finished = training.step >= config.max_iters
        if finished or training.step % config.eval_interval == 0:
            validate(run, corpus, training)
        if finished or run.stopped or training.step % config.save_interval == 0:
            training.save("ckpt.pt")
    bar.close()
    if not run.stopped:
        run.barrier()
        if run.master:
            report(run, model, corpus, config)
        run.merge()
    run.close()


if __name__ == "__main__":
    main(configure(Config))
