"""podcast-benchmark's registry: its decorators, so that files written for it load unchanged, and
its own preprocessor and config setter.

    @registry.register_model_constructor("name")    # default: the function's own name
    def constructor(model_params): ...

model=my_file.py:name finds it; there is no other register.
"""

import functools
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from configurator import load_function, user_files
from data import InputError
from data.podcast.benchmark_yaml import experiment_config, settings_of, translate


def register_model_constructor(name=None):
    """Return a decorator that makes a function known by `name` in its file."""

    def register(function):
        function.__globals__[name or function.__name__] = function
        return function

    return register


register_data_preprocessor = register_config_setter = register_model_constructor


def resolve(spec, choices, option):
    """Return what an option names: an entry of `choices`, or a function as my_file.py:name."""
    spec = choices.get(spec, spec)
    if not isinstance(spec, str):
        return spec
    if ":" not in spec:
        raise InputError(f"{option}={spec}: give {', '.join(choices)}, or my_file.py:name")
    sys.path += [str(Path(spec).resolve().parent), str(Path(__file__).parent)]
    return load_once(spec, option)


load_once = functools.cache(load_function)  # a run keeps to the code that it has hashed


def preprocess_neural_data(data, preprocessor_params):
    """Average every num_average_samples: (words, electrodes, bins). decode.py uses its Windows."""
    step = preprocessor_params.get("num_average_samples", 32)
    return data.reshape(data.shape[0], data.shape[1], -1, step).mean(-1)


class UserFunction:
    """The reader (see Windows in data/montage.py) for preprocess=my_file.py:f, which turns (windows
    (words, electrodes, samples), preprocessor_params) into an array (words, ...)."""

    model_params: dict = {}

    def __init__(self, spec, function, montage, params):
        self.spec = spec
        self.function = function
        self.montage = montage
        self.description = f"preprocess={spec} reads windows of {len(montage.names)} electrodes"
        names = pd.Series(montage.names).str.partition(" ")[2].tolist()
        self.params = {"ch_names": names, "sfreq": montage.sfreq, **params}
        self.key = files_in([*params.values(), *map(str, user_files(spec.partition(":")[0]))])

    def __call__(self, first, width):
        array = self.function(self.montage.samples(first, width), self.params)
        array = torch.as_tensor(array).detach().cpu().numpy()
        is_usable = array.ndim > 1 and not np.iscomplexobj(array) and np.isfinite(array).all()
        if not is_usable or len(array) != first.shape[1]:
            raise InputError(
                f"preprocess={self.spec} returned {array.dtype} of shape {array.shape} for "
                f"{first.shape[1]} words: return finite real numbers, (words, ...)"
            )
        return array.astype(np.float32)


def files_in(values):
    """Return (path, size, time of change) of all files that the values name."""
    files = []
    for value in values:
        if isinstance(value, str) and value:
            for file in [Path(value), *sorted(Path(value).rglob("*"))]:
                if file.is_file():
                    files.append((str(file), file.stat().st_size, file.stat().st_mtime_ns))
    return files


def neural_conv(experiment_config, raws, df_word, word_embeddings):
    """Set model_params["input_channels"], as podcast-benchmark's setter of that name."""
    n_channels = sum(len(raw.ch_names) for raw in raws)
    experiment_config.model_params["input_channels"] = n_channels
    return experiment_config


def call_setter(config, choices, montage, target):
    """Let config_setter=, a function f(config, raws, words, embeddings) -> config, change options:
    config is podcast-benchmark's nested one, raws are MNE's."""
    if not config.config_setter:
        return
    import mne

    setter = resolve(config.config_setter, choices, "config_setter")
    raws = []
    for person in montage.people:
        recording = person.recording
        names = np.array(recording.names)[person.channels].tolist()
        info = mne.create_info(names, recording.sfreq, "ecog")
        signal = recording.signal[:, person.channels].T.astype(float)
        raws.append(mne.io.RawArray(signal, info, recording.first_sample, verbose="error"))
    words = pd.DataFrame({"word": target.labels, "start": target.start})
    experiment = setter(experiment_config(asdict(config)), raws, words, target.values)
    settings = settings_of(experiment, f"config_setter={config.config_setter}")
    for option, value in translate(settings, config.config_setter, defaults=False).items():
        setattr(config, option, value)


PUBLISHED = """\
podcast-benchmark published (183 electrodes of 8 people; the best lag chosen on test words, @ ms):
    GloVe               auc .6046@400, top-1/5/10 .0091/.0357/.0668@400, cosine .620@400
    "gpt2" (also GloVe) auc .6050@200, top-1/5/10 .0073@400/.0307@800/.0552@800, cosine .619@800
    arbitrary vectors   auc .5549@400, top-1/5/10 .0169@800/.0415@400/.0615@400, cosine .022@400
    whisper 2AFC .7074@400; ROC-AUC of content words .590@200, part of speech .5305@600, sentence
    onset .880@0; r of surprisal .059@400, volume .448@200; always saying 'the': top-1 .058"""
