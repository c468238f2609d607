"""Settings of podcast-benchmark (nested YAML, command line, ini files) as options of decode.py.

    model_constructor_name: ensemble_pitom_model            model: ensemble_pitom_model
    model_params: {num_models: 10}                    ->    model_params: {num_models: 10}
    training_params: {early_stopping_patience: 10}          patience: 10
    data_params: {window_width: 0.625}                      window: 0.625

`command_line` translates what stands on the command line, `translate` a dictionary of settings.
`experiment_config` and `settings_of` are the way there and back for config setters, which read and
change the nested form. `read_ini` reads the experiment_config.ini beside a foundation model.
"""

import ast
import configparser
import difflib
import json
from pathlib import Path
from types import SimpleNamespace

import yaml

from data import InputError, read_yaml

GROUPS = ("model_params", "training_params", "data_params")

# The benchmark's name of a setting -> the option of decode.py.
TOP_LEVEL = {
    "model_constructor_name": "model",
    "config_setter_name": "config_setter",
    "model_params": "model_params",
}
TRAINING = {
    "batch_size": "batch_size",
    "epochs": "epochs",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "early_stopping_patience": "patience",
    "n_folds": "n_folds",
    "fold_type": "fold_type",
    "min_lag": "min_lag",
    "max_lag": "max_lag",
    "lag_step_size": "lag_step",
    "lag": "lags",
    "min_train_freq_auc": "min_count",
    "random_seed": "seed",
    "loss_name": "loss",
}
DATA = {
    "data_root": "dataset",
    "subject_ids": "subjects",
    "channel_reg_ex": "channels",
    "electrode_file_path": "electrodes",
    "window_width": "window",
    "preprocessing_fn_name": "preprocess",
    "preprocessor_params": "preprocessor_params",
    "embedding_type": "embedding",
    "embedding_layer": "layer",
    "embedding_pca_dim": "pca",
    "word_column": "word",
}
TABLES = {"training_params": TRAINING, "data_params": DATA}

# What the benchmark takes for a setting that a YAML file leaves out.
DEFAULTS = {
    "model_constructor_name": "",
    "config_setter_name": "",
    "model_params": {},
    "trial_name": "",
    "training_params": {
        "batch_size": 32,
        "epochs": 100,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "early_stopping_patience": 10,
        "n_folds": 5,
        "min_lag": -10000,
        "max_lag": 10000,
        "lag_step_size": 1000,
        "fold_type": "sequential_folds",
    },
    "data_params": {
        "data_root": "data",
        "subject_ids": [],
        "channel_reg_ex": "",
        "window_width": -1,
        "preprocessing_fn_name": "",
        "embedding_type": "gpt-2xl",
        "embedding_layer": 24,
        "embedding_pca_dim": 0,
    },
}

# Values of a setting that decode.py calls differently.
VALUES = {
    "data_root": {"data": "podcast"},
    "embedding_type": {"gpt-2xl": "gpt2-xl", "glove": "data/glove/glove.6B.50d.txt"},
    "fold_type": {"sequential_folds": "sequential", "zero_shot_folds": "zero_shot"},
    "loss_name": {"mse": "mse", "cosine_dist": "cosine"},
}

# Settings of later versions of the benchmark that decode.py knows only one value of.
ONLY = {
    "top_k": ([1, 5, 10], "decode.py reports top-1, top-5 and top-10"),
    "losses": (["mse"], "choose one loss with loss_name"),
    "loss_weights": ([1], "choose one loss with loss_name"),
    "grad_accumulation_steps": (1, "set batch_size"),
    "clip_grad_norm": (0, "gradients are not clipped"),
    "normalize_targets": (False, "targets are not normalised"),
    "shuffle_targets": (False, "n_shifts= shifts the words for the null"),
    "use_high_gamma": (True, "data/podcast/prepare.py signal=broadband prepares the other signal"),
    "do_drop_bads": (True, "data/podcast/prepare.py leaves bad electrodes out"),
    "model_dir": ("models", "models are kept in out_dir"),
}


# ---- from theirs to ours


def is_benchmark(settings):
    """Whether a dictionary, as YAML holds it, is of podcast-benchmark and not ours."""
    marks = {"model_constructor_name", "config_setter_name", "trial_name", *TABLES}
    return isinstance(settings, dict) and not marks.isdisjoint(settings)


def translate(settings, path, defaults=True):
    """Options of decode.py for nested settings of podcast-benchmark. Raises InputError.

    path: where they stand, for messages; defaults: whether what is left out takes the benchmark's
    own default (a whole file), or is left to decode.py (settings on the command line).
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    if defaults:
        settings = _merged(DEFAULTS, settings)
    options = {}
    folder = settings.pop("output_dir", "out")
    if "trial_name" in settings:
        options["out_dir"] = f"{folder}/{settings.pop('trial_name') or 'decode'}"
    for group, table in TABLES.items():
        group_settings = settings.pop(group, {})
        if not isinstance(group_settings, dict):
            raise InputError(f"{path}: {group} must hold 'key: value' lines, not {group_settings}")
        for key, value in group_settings.items():
            if value is not None:
                _translate_one(options, table, key, value, f"{path}: {group}.{key}")
    for key, value in settings.items():
        _translate_one(options, TOP_LEVEL, key, value, f"{path}: {key}")
    return options


def _translate_one(options, table, key, value, place):
    """Put one setting into `options`; place: where it stands, for messages."""
    if key in ONLY:
        expected, remedy = ONLY[key]
        if value != expected:
            raise InputError(f"{place}={value} is not possible in decode.py: {remedy}")
        return
    if key not in table:
        nearest = difflib.get_close_matches(key, table, 1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"it knows {', '.join(table)}"
        raise InputError(f"{place} is not a setting that decode.py can express: {hint}")
    if key in VALUES:
        value = _renamed(value, key, place)
    if key in ("subject_ids", "embedding_type", "lag") and not isinstance(value, list):
        value = [value]
    if key == "subject_ids":
        value = [str(subject) for subject in value]
    options[table[key]] = value


def _renamed(value, key, place):
    """A value under decode.py's name; folders, features and files keep their own."""
    names = VALUES[key]
    if isinstance(value, str) and value in names:
        return names[value]
    if key in ("fold_type", "loss_name") and value not in names.values():
        raise InputError(f"{place}={value} is not possible in decode.py: give {' or '.join(names)}")
    return value


def _merged(first, second):
    """Nested dictionaries in one; where both have a key, the second one's value stands."""
    merged = dict(first)
    for key, value in second.items():
        if isinstance(value, dict) and isinstance(first.get(key), dict):
            value = first[key] | value
        merged[key] = value
    return merged


# ---- the command line


def command_line(argv):
    """The command line with what is podcast-benchmark's as options of decode.py: its YAML files
    (PATH, --config PATH, --config=PATH), dotted settings (--training_params.batch_size=64),
    trial_name=.

    A dotted setting overrides the files; without a file it changes nothing but what it names.
    """
    settings = {}
    source = "command line"
    position = None
    arguments = []
    for argument in argv:
        if argument == "--config":
            continue
        argument = argument.removeprefix("--config=")
        found = _settings_in(argument)
        if found is None:
            arguments.append(argument)
            continue
        if "=" not in argument:
            source = argument
        if position is None:
            position = len(arguments)
        settings = _merged(settings, found)
    if position is None:
        return arguments
    translated = []
    for key, value in translate(settings, source, defaults=source != "command line").items():
        text = value if isinstance(value, str) else json.dumps(value)
        translated.append(f"{key}={text}")
    return arguments[:position] + translated + arguments[position:]


def _settings_in(argument):
    """The settings that one argument gives as a nested dictionary; None where it is not theirs."""
    if "=" not in argument:
        try:
            content = read_yaml(Path(argument).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return None  # configure says what is wrong with it
        return content if is_benchmark(content) else None
    key, _, text = argument.removeprefix("--").partition("=")
    group, _, name = key.partition(".")
    if not is_benchmark({group: None}) or bool(name) != (group in TABLES):
        return None
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        value = text
    return {group: {name: value}} if name else {group: value}


# ---- what config setters read and change


def experiment_config(options):
    """The benchmark's nested configuration with the values of our options, for a config setter."""
    back = {}
    for group, table in TABLES.items():
        values = {}
        for key, option in table.items():
            if option in options and key != "lag":
                values[key] = _named_back(options[option], key)
        back[group] = SimpleNamespace(**values)
    return SimpleNamespace(
        model_constructor_name=options["model"],
        config_setter_name=options["config_setter"],
        model_params=dict(options["model_params"]),
        trial_name=Path(options["out_dir"]).name,
        **back,
    )


def _named_back(value, key):
    if key == "embedding_type":
        value = value[0]
    for theirs, ours in VALUES.get(key, {}).items():
        if value == ours:
            return theirs
    return value


def settings_of(experiment, option):
    """What a config setter (`option`) gave back, as translate(defaults=False) takes it."""
    settings = {}
    for group in GROUPS:
        values = getattr(experiment, group, None)
        if values is None:
            raise InputError(f"{option} must return the configuration it was given")
        settings[group] = dict(values if isinstance(values, dict) else vars(values))
    return settings


# ---- experiment_config.ini


def read_ini(folder):
    """experiment_config.ini of a foundation model as nested namespaces with lower-case names, such
    as ini.ecog_data_config.sample_length (s), original_fs and new_fs (Hz), which must be there."""
    path = Path(folder) / "experiment_config.ini"
    parser = configparser.ConfigParser()
    try:
        parser.read_string(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise InputError(f"{path} is not an ini file ({' '.join(str(error).split())})") from None
    sections = {}
    for section in parser.sections():
        values = {key: _ini_value(text) for key, text in parser[section].items()}
        sections[section.lower()] = SimpleNamespace(**values)
    ini = SimpleNamespace(**sections)
    for key in ("sample_length", "original_fs", "new_fs"):
        value = getattr(getattr(ini, "ecog_data_config", None), key, None)
        if not isinstance(value, (int, float)):
            raise InputError(f"{path} has no number '{key}' in its section ecog_data_config")
    return ini


def _ini_value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
