"""Translate podcast-benchmark's settings (nested YAML, command line, ini) into decode.py's options.

    model_constructor_name: ensemble_pitom_model            model: ensemble_pitom_model
    model_params: {num_models: 10}                    ->    model_params: {num_models: 10}
    training_params: {early_stopping_patience: 10}          patience: 10
    data_params: {window_width: 0.625}                      window: 0.625

`command_line` translates a command line, `translate` a dictionary of settings. Config setters read
and change the nested form, which `experiment_config` makes and `settings_of` reads back. `read_ini`
reads the experiment_config.ini of a foundation model.
"""

import ast
import configparser
import difflib
import json
from pathlib import Path
from types import SimpleNamespace

import yaml

from data import InputError, read_yaml

GROUPS = ("training_params", "data_params")  # other settings are in no group

# the benchmark's setting: (decode.py's option, the benchmark's default or None for decode.py's)
SETTINGS = {
    "model_constructor_name": ("model", ""),
    "config_setter_name": ("config_setter", ""),
    "model_params": ("model_params", {}),
    "trial_name": ("out_dir", ""),
    "training_params.batch_size": ("batch_size", 32),
    "training_params.epochs": ("epochs", 100),
    "training_params.learning_rate": ("learning_rate", 1e-3),
    "training_params.weight_decay": ("weight_decay", 1e-4),
    "training_params.early_stopping_patience": ("patience", 10),
    "training_params.n_folds": ("n_folds", 5),
    "training_params.fold_type": ("fold_type", "sequential_folds"),
    "training_params.min_lag": ("min_lag", -10000),
    "training_params.max_lag": ("max_lag", 10000),
    "training_params.lag_step_size": ("lag_step", 1000),
    "training_params.lag": ("lags", None),
    "training_params.min_train_freq_auc": ("min_count", None),
    "training_params.random_seed": ("seed", None),
    "training_params.loss_name": ("loss", None),
    "data_params.data_root": ("dataset", "data"),
    "data_params.subject_ids": ("subjects", []),
    "data_params.channel_reg_ex": ("channels", ""),
    "data_params.electrode_file_path": ("electrodes", None),
    "data_params.window_width": ("window", -1),
    "data_params.preprocessing_fn_name": ("preprocess", ""),
    "data_params.preprocessor_params": ("preprocessor_params", None),
    "data_params.embedding_type": ("embedding", "gpt-2xl"),
    "data_params.embedding_layer": ("layer", 24),
    "data_params.embedding_pca_dim": ("pca", 0),
    "data_params.word_column": ("word", None),
}

# values of a setting: decode.py's names for them
VALUES = {
    "data_root": {"data": "podcast"},
    "embedding_type": {"gpt-2xl": "gpt2-xl", "glove": "data/glove/glove.6B.50d.txt"},
    "fold_type": {"sequential_folds": "sequential", "zero_shot_folds": "zero_shot"},
    "loss_name": {"mse": "mse", "cosine_dist": "cosine"},
}

# settings of later versions of the benchmark for which decode.py has only this value
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
    "model_dir": ("models", "models are saved in out_dir"),
}


# ---- from the benchmark's settings to options


def is_benchmark(settings):
    """Tell whether the content of a YAML file is podcast-benchmark's rather than ours."""
    marks = {"model_constructor_name", "config_setter_name", "trial_name", *GROUPS}
    return isinstance(settings, dict) and not marks.isdisjoint(settings)


def flat(settings, path):
    """Flatten nested settings to {training_params.batch_size: 32, ...}, leaving None out."""
    values = {}
    for key, value in settings.items():
        if key not in GROUPS:
            values[str(key)] = value
        elif isinstance(value, dict):
            for name, inner in value.items():
                values[f"{key}.{name}"] = inner
        elif value is not None:
            raise InputError(f"{path}: {key} must hold 'key: value' lines, not {value}")
    return {key: value for key, value in values.items() if value is not None}


def translate(settings, path, defaults=True):
    """Return decode.py's options for settings of podcast-benchmark, nested or flat.

    path: their source, for messages; defaults: whether missing settings take the benchmark's
    defaults, as in a file, or stay decode.py's, as on the command line.
    """
    settings = flat(settings, path)
    if defaults:
        for key, (_, default) in SETTINGS.items():
            if default is not None:
                settings.setdefault(key, default)
    options = {}
    folder = settings.pop("output_dir", "out")
    for key, value in settings.items():
        place = f"{path}: {key}"
        name = key.rpartition(".")[2]
        if name in ONLY:
            expected, remedy = ONLY[name]
            if value != expected:
                raise InputError(f"{place}={value} is not possible in decode.py: {remedy}")
            continue
        if key not in SETTINGS:
            nearest = difflib.get_close_matches(key, SETTINGS, 1) or SETTINGS
            hint = f"did you mean {' or '.join(nearest)}?"
            raise InputError(f"{place} is not a setting that decode.py has: {hint}")
        value = value_of(name, value, place)
        if name == "trial_name":
            value = f"{folder}/{value or 'decode'}"
        options[SETTINGS[key][0]] = value
    return options


def value_of(name, value, place):
    """Return decode.py's value of a setting; folders, features and files keep their names."""
    names = VALUES.get(name, {})
    if isinstance(value, str):
        value = names.get(value, value)
    if name in ("fold_type", "loss_name") and value not in names.values():
        raise InputError(f"{place}={value} is not possible in decode.py: give {' or '.join(names)}")
    if name in ("subject_ids", "embedding_type", "lag") and not isinstance(value, list):
        value = [value]
    if name == "subject_ids":
        value = [str(subject) for subject in value]
    return value


# ---- the command line


def command_line(argv):
    """Replace podcast-benchmark's arguments with decode.py's options: YAML files (PATH, --config
    PATH, --config=PATH), dotted settings (--training_params.batch_size=64), trial_name=.

    Dotted settings override files; without a file they set only what they name.
    """
    settings = {}
    source = "command line"
    position = None
    arguments = []
    for argument in argv:
        if argument == "--config":
            continue
        argument = argument.removeprefix("--config=")
        argument_settings = settings_in(argument)
        if not argument_settings:
            arguments.append(argument)
            continue
        if "=" not in argument:
            source = argument
        if position is None:
            position = len(arguments)
        settings |= argument_settings
    if position is None:
        return arguments
    translated = []
    for key, value in translate(settings, source, defaults=source != "command line").items():
        text = value if isinstance(value, str) else json.dumps(value)
        translated.append(f"{key}={text}")
    return arguments[:position] + translated + arguments[position:]


def settings_in(argument):
    """Return the flat settings in one argument, {} if it is not podcast-benchmark's."""
    if "=" not in argument:
        try:
            content = read_yaml(Path(argument).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return {}  # configure reports what is wrong
        return flat(content, argument) if is_benchmark(content) else {}
    key, _, text = argument.removeprefix("--").partition("=")
    group, dot, _ = key.partition(".")
    if not is_benchmark({group: None}) or bool(dot) != (group in GROUPS):
        return {}
    try:
        return {key: read_yaml(text)}
    except yaml.YAMLError:
        return {key: text}


# ---- for config setters


def experiment_config(options):
    """Return the benchmark's nested configuration with the values of our options."""
    groups = {group: SimpleNamespace() for group in GROUPS}
    for key, (option, _) in SETTINGS.items():
        group, _, name = key.partition(".")
        if group in groups and option in options and name != "lag":
            value = options[option]
            if name == "embedding_type":
                value = value[0]
            for benchmark_value, our_value in VALUES.get(name, {}).items():
                if value == our_value:
                    value = benchmark_value
            setattr(groups[group], name, value)
    return SimpleNamespace(
        model_constructor_name=options["model"],
        config_setter_name=options["config_setter"],
        model_params=dict(options["model_params"]),
        trial_name=Path(options["out_dir"]).name,
        **groups,
    )


def settings_of(experiment, option):
    """Return the settings in what a config setter (`option`) returned."""
    settings = {}
    for group in ("model_params", *GROUPS):
        values = getattr(experiment, group, None)
        if values is None:
            raise InputError(f"{option} must return the configuration that it received")
        settings[group] = dict(values if isinstance(values, dict) else vars(values))
    return settings


# ---- experiment_config.ini


def read_ini(folder):
    """Read experiment_config.ini as nested namespaces with lower-case names, such as
    ini.ecog_data_config.sample_length (s), original_fs and new_fs (Hz), which it must have."""
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
