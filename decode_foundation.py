"""Pretrained encoders of recordings for decode.py, plugged in as your own file would be.

    python decode.py config/decode_foundation.yaml                                # frozen
    python decode.py config/decode_foundation_finetune.yaml                       # fine-tuned

preprocess=foundation_model_preprocessing_fn    frozen latents: the encoder's tokens of a window
preprocess=foundation_model_input               the encoder's input, for foundation_finetune
model=foundation_finetune                       the encoder and a linear layer, both trained
config_setter=foundation_model                  sets the window that the encoder was trained on

preprocessor_params: model_dir, a run folder of foundation.py; untrained=K, the same encoder with
random weights number K; foundation_model_batch_size. model_dir may also hold experiment_config.ini
and model.pth of other code (an 8 x 8 grid, as podcast-benchmark documents); then model=
my_file.py:constructor must build the module that model.pth fits.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn as nn

from configurator import InputError, check_keys, choose_device, key_seed, load_function, user_files
from data.podcast.benchmark_yaml import read_ini
from data.podcast.registry import files_in
from data.raw import inside_spans
from data.recording import encoder_input, named_places, places, resampled, robust_scale
from model import NeuralEncoder, load_encoder

PARAMS = {"model_dir", "untrained", "foundation_model_batch_size", "model", "ch_names"}


def model_folder(params):
    """Return preprocessor_params.model_dir as a Path. Raises InputError if it does not exist."""
    check_keys(params, PARAMS, "preprocessor_params")
    folder = Path(params.get("model_dir", ""))
    if not params.get("model_dir") or not folder.exists():
        raise InputError(
            f"preprocessor_params.model_dir={params.get('model_dir', '')} does not exist: give a "
            "run folder of foundation.py (python foundation.py makes out/foundation), or a folder "
            "with experiment_config.ini and model.pth"
        )
    return folder


def pretrained(params):
    """Load NeuralEncoder and its recipe from model_dir; untrained=K replaces the weights."""
    encoder, recipe = load_encoder(model_folder(params))
    if params.get("untrained"):
        torch.manual_seed(key_seed("untrained", params["untrained"]))
        encoder = NeuralEncoder(encoder.config).eval()
    return encoder, recipe


def frozen_latents(montage, params, device):
    """Return the reader for preprocess=foundation_model_preprocessing_fn (see data/montage.py)."""
    if (model_folder(params) / "experiment_config.ini").is_file():
        return ForeignLatents(montage, params, device)
    return FrozenLatents(montage, params, device)


def foundation_model(experiment_config, raws, df_word, word_embeddings):
    """Set channel names and the pretrained model's window, as podcast-benchmark's setter does."""
    data_params = experiment_config.data_params
    params = data_params.preprocessor_params
    params["ch_names"] = []
    for raw in raws:
        params["ch_names"] += raw.ch_names
    folder = model_folder(params)
    if (folder / "experiment_config.ini").is_file():
        data_params.window_width = read_ini(folder).ecog_data_config.sample_length
    else:
        data_params.window_width = load_encoder(folder)[1]["window"]
    return experiment_config


# ---- encoders of foundation.py


class EncoderInput:
    """Windows in the form that an encoder of foundation.py reads: its rate, bands and places.

    Scales come from the stretch used in pretraining if the recording was part of it, otherwise from
    all of it, without BAD segments and without looking at words. The electrodes of all people are
    concatenated: (words, electrodes, samples).
    """

    def __init__(self, montage, params, device):
        self.encoder, self.recipe = pretrained(params)
        self.params = params
        sfreq = self.recipe["sfreq"]
        if sfreq > montage.sfreq:
            raise InputError(
                f"preprocessor_params.model_dir={params['model_dir']} reads {sfreq:g} Hz but the "
                f"recordings have {montage.sfreq:g} Hz: use an encoder with a lower sfreq"
            )
        self.people = []
        for person in montage.people:
            if person.mixing is not None:
                raise InputError("reference=laplacian does not work with an encoder: leave it out")
            self.people.append(self.match(person.recording, person.channels))
        table = pd.DataFrame(self.people)
        places = [xyz.tolist() for xyz in table.xyz]
        subjects = table.subject.tolist()
        bad = [person.recording.meta.get("bad_spans") for person in montage.people]
        facts = type(self).__name__, self.recipe, places, subjects, table.seen.tolist(), bad
        digest = hashlib.sha256(repr(facts).encode())
        for value in self.encoder.state_dict().values():
            digest.update(value.numpy().tobytes())
        self.key = digest.hexdigest()
        self.model_params = {"model_dir": params["model_dir"], "places": places}
        self.model_params |= {"untrained": params.get("untrained", 0), "subjects": subjects}
        counts = pd.DataFrame(table.matched.tolist()).sum()
        self.description = (
            f"{params['model_dir']}: resampled from {montage.sfreq:g} to {sfreq:g} Hz; electrodes: "
            f"{counts['name']} matched by name, {counts['position']} by position only, "
            f"{counts['absent']} left out without a place; pretraining used, without words, "
            f"{', '.join(filter(None, table.heard)) or 'none of these recordings'}"
        )

    def match(self, recording, channels):
        """Match a recording with pretraining: electrode places, person, and the stretch used."""
        names = [recording.names[c] for c in channels]
        good = recording.good[channels]
        xyz = places(names, recording.xyz[channels], good, self.recipe["grid"])
        xyz, matched = named_places(names, xyz, self.recipe)
        person = {"recording": recording, "channels": channels, "xyz": xyz, "matched": matched}
        person |= {"subject": -1, "seen": (0, math.inf), "heard": ""}
        for pretrained_on in self.recipe["recordings"]:
            name = pretrained_on["name"]
            dataset = Path(pretrained_on["dataset"]).name
            if (dataset, name) == (recording.path.parent.name, recording.path.name):
                person["subject"] = self.recipe["subjects"].index(pretrained_on["subject"])
                begin, end = person["seen"] = pretrained_on["seen"]
                person["heard"] = f"{name} from {begin:.0f} to {end:.0f} s"
        return person

    def signal(self, person):
        """Return signal (T', C, F) at the encoder's rate, centre and scale; computed once."""
        if "signal" not in person:
            recording, sfreq = person["recording"], self.recipe["sfreq"]
            x = resampled(recording.signal, recording.sfreq, self.recipe, person["channels"])
            seconds = np.arange(len(x)) / sfreq
            begin, end = person["seen"]
            usable = (seconds >= begin) & (seconds < end)
            seconds += recording.first_sample / recording.sfreq  # on the recording's clock
            bad = recording.meta.get("bad_spans", [])
            usable &= ~inside_spans(seconds, seconds + 1 / sfreq, bad)
            person["signal"] = x, *robust_scale(x[usable])
        return person["signal"]

    def __call__(self, first, width):
        """Return windows (words, ...) of `width` samples from rows `first` (people, words)."""
        parts = []
        for person, row in zip(self.people, first):
            x, centre, scale = self.signal(person)
            rate = self.recipe["sfreq"] / person["recording"].sfreq
            samples = np.arange(round(width * rate))
            if len(samples) < self.recipe["patch"]:
                raise InputError(f"window=: {width} samples hold no patch of the encoder: widen it")
            begin = np.round(row * rate).astype(int).clip(0, len(x) - len(samples))
            windows = x[begin[:, None] + samples]
            parts.append(encoder_input(windows, self.recipe, centre, scale))
        return np.concatenate(parts, axis=1)


class Latents(nn.Module):
    """Concatenated encoder tokens of all people: (words, electrodes, samples) -> (words, latents).

    places and subjects have one entry per person, as in EncoderInput.
    """

    def __init__(self, encoder, places, subjects):
        super().__init__()
        self.encoder = encoder
        self.subjects = list(subjects)
        self.sizes = [len(xyz) for xyz in places]
        for i, xyz in enumerate(places):
            self.register_buffer(f"xyz{i}", torch.tensor(xyz), persistent=False)

    def forward(self, x):
        parts = []
        for i, part in enumerate(x.split(self.sizes, dim=1)):
            subject = torch.full((len(x),), self.subjects[i], device=x.device)
            xyz = getattr(self, f"xyz{i}")
            parts.append(self.encoder(part, xyz, subject).flatten(1))
        return torch.cat(parts, dim=1)


class FrozenLatents(EncoderInput):
    """Tokens of a window from the frozen encoder, concatenated over people: (words, latents)."""

    def __init__(self, montage, params, device):
        super().__init__(montage, params, device)
        self.device = choose_device(device)
        places, subjects = self.model_params["places"], self.model_params["subjects"]
        self.latents = Latents(self.encoder, places, subjects).to(self.device)
        self.model_params = {}  # only FineTune needs them

    @torch.no_grad()
    def __call__(self, first, width):
        x = torch.as_tensor(super().__call__(first, width))
        parts = []
        for batch in x.split(self.params.get("foundation_model_batch_size", 64)):
            parts.append(self.latents(batch.to(self.device)).cpu())
        return torch.cat(parts).numpy()


class FineTune(nn.Module):
    """The pretrained encoder and a linear layer on its tokens, for (words, electrodes, samples)."""

    def __init__(
        self,
        model_dir="",
        untrained=0,
        places=(),
        subjects=(),
        input_shape=(),
        output_dim=50,
        dropout=0.2,
    ):
        super().__init__()
        if not places:
            raise InputError("model=foundation_finetune needs preprocess=foundation_model_input")
        encoder, _ = pretrained({"model_dir": model_dir, "untrained": untrained})
        self.latents = Latents(encoder, places, subjects)
        with torch.no_grad():
            n_latents = self.latents(torch.zeros(1, *input_shape)).shape[1]
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_latents, output_dim)

    def forward(self, x):
        return self.head(self.dropout(self.latents(x)))


# ---- encoders of other code


class ForeignLatents:
    """Latents of a model that reads an 8 x 8 grid: model(batch, forward_features=True).

    A batch is (words, 1, T, 8, 8): block means at new_fs, electrodes G1 to G64 row by row, zeros
    for missing electrodes.
    """

    model_params: dict = {}

    def __init__(self, montage, params, device):
        folder = model_folder(params)
        self.montage = montage
        self.params = params
        self.config = read_ini(folder).ecog_data_config
        if params.get("untrained") or ":" not in str(params.get("model", "")):
            raise InputError(
                f"{folder} holds a model of other code: give preprocessor_params.model="
                "my_file.py:constructor, which builds the module of model.pth, and no untrained="
            )
        sfreq = self.config.original_fs
        if montage.sfreq != sfreq:
            raise InputError(f"{folder} reads recordings at {sfreq:g} Hz, not {montage.sfreq:g} Hz")
        names = pd.Series(montage.names).str.partition(" ")[2]
        grid = pd.Index([f"G{number}" for number in range(1, 65)])
        self.cells = grid.get_indexer(names)  # -1: not on the grid
        on_grid = names[self.cells >= 0]
        if on_grid.empty or not on_grid.is_unique:
            raise InputError(
                f"{folder} reads electrodes G1 to G64 of one person, not "
                f"{', '.join(montage.names[:6])}: choose others with subjects= or channels="
            )
        self.description = f"{folder}: {len(on_grid)} of 64 electrodes exist, the rest are zeros"
        self.model = load_function(params["model"], "preprocessor_params.model")(read_ini(folder))
        code = user_files(params["model"].partition(":")[0])
        self.key = files_in([str(folder), *map(str, code)])
        try:
            state = torch.load(folder / "model.pth", weights_only=True, map_location="cpu")
            self.model.load_state_dict(state)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{folder / 'model.pth'} does not hold the weights of {params['model']}: change "
                f"one of them ({' '.join(str(error).split())[:160]})"
            ) from None
        self.device = choose_device(device)
        self.model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, first, width):
        """Return latents (words, latents) of `width` samples from rows `first` (people, words)."""
        step = int(self.config.original_fs // self.config.new_fs)
        if width % step:
            raise InputError(
                f"a window of {width} samples does not divide into blocks of {step}: use "
                "config_setter=foundation_model, or another window="
            )
        size = self.params.get("foundation_model_batch_size", 64)
        parts = []
        for begin in range(0, first.shape[1], size):
            samples = self.montage.samples(first[:, begin : begin + size], width)
            means = samples.reshape(*samples.shape[:2], -1, step).mean(axis=3)
            grid = np.zeros((len(means), means.shape[2], 64), np.float32)
            on_grid = self.cells >= 0
            grid[:, :, self.cells[on_grid]] = means[:, on_grid].transpose(0, 2, 1)
            batch = torch.as_tensor(grid, device=self.device).view(len(grid), 1, -1, 8, 8)
            latents = self.model(batch, forward_features=True)
            parts.append(latents.flatten(1).float().cpu().numpy())
        return np.concatenate(parts)
