"""data/podcast/benchmark_yaml.py: settings of podcast-benchmark become options of decode.py."""

from types import SimpleNamespace

import pytest

from data import InputError, read_yaml
from data.podcast import benchmark_yaml as benchmark

# The YAML of podcast-benchmark's README, without its comments.
NEURAL_CONV = """
model_constructor_name: ensemble_pitom_model
config_setter_name: neural_conv
model_params:
  conv_filters: 128
  reg: 0.35
  reg_head: 0
  dropout: 0.2
  num_models: 10
  embedding_dim: 50
training_params:
  batch_size: 32
  epochs: 100
  learning_rate: 0.001
  weight_decay: 0.0001
  early_stopping_patience: 10
  n_folds: 5
  min_lag: 0
  max_lag: 1
  lag_step_size: 10
data_params:
  data_root: data
  embedding_type: gpt-2xl
  embedding_layer: 24
  embedding_pca_dim: 50
  window_width: 0.625
  preprocessing_fn_name: preprocess_neural_data
  subject_ids: [1, 2, 3]
  preprocessor_params:
    num_average_samples: 32
trial_name: ensemble_model_10
"""
MODEL = {"conv_filters": 128, "reg": 0.35, "reg_head": 0, "dropout": 0.2, "num_models": 10}
EXPECTED = {"model": "ensemble_pitom_model", "config_setter": "neural_conv"}
EXPECTED |= {"model_params": {**MODEL, "embedding_dim": 50}, "batch_size": 32, "epochs": 100}
EXPECTED |= {"learning_rate": 0.001, "weight_decay": 0.0001, "patience": 10}
EXPECTED |= {"n_folds": 5, "fold_type": "sequential", "min_lag": 0, "max_lag": 1, "lag_step": 10}
EXPECTED |= {"dataset": "podcast", "embedding": ["gpt2-xl"], "layer": 24, "pca": 50}
EXPECTED |= {"window": 0.625, "preprocess": "preprocess_neural_data", "channels": ""}
EXPECTED |= {"preprocessor_params": {"num_average_samples": 32}, "subjects": ["1", "2", "3"]}
EXPECTED |= {"out_dir": "out/ensemble_model_10"}


def test_the_readme_yaml_and_shorter_ones_are_translated_key_by_key():
    assert benchmark.translate(read_yaml(NEURAL_CONV), "neural_conv.yml") == EXPECTED
    settings = {"model_constructor_name": "pitom_model", "data_params": {"embedding_type": "glove"}}
    options = benchmark.translate(settings, "short.yml")
    assert options["embedding"] == ["data/glove/glove.6B.50d.txt"] and options["model_params"] == {}
    assert (options["min_lag"], options["max_lag"], options["lag_step"]) == (-10000, 10000, 1000)
    lag = {"training_params": {"lag": 200, "batch_size": None}, "data_params": None}
    assert benchmark.translate(lag, "", defaults=False) == {"lags": [200]}


def test_files_and_dotted_settings_on_the_command_line(tmp_path):
    path = tmp_path / "neural_conv.yml"
    path.write_text(NEURAL_CONV)
    for spelling in (["--config", str(path)], [f"--config={path}"], [str(path)]):
        argv = [*spelling, "--training_params.batch_size=64", "seed=7"]
        options = dict(argument.split("=", 1) for argument in benchmark.command_line(argv))
        assert options["batch_size"] == "64" and options["seed"] == "7"
        assert options["subjects"] == '["1", "2", "3"]' and options["window"] == "0.625"
    alone = ["ours.yaml", "--data_params.embedding_layer=3", "trial_name=again", "epochs=3"]
    translated = ["ours.yaml", "layer=3", "out_dir=out/again", "epochs=3"]
    assert benchmark.command_line(alone) == translated
    ours = ["decode_podcast.yaml", "epochs=3", "model_params.dropout=0.1"]
    assert benchmark.command_line(ours) == ours


@pytest.mark.parametrize(
    "training_params, sentence",
    [
        ({"batchsize": 3}, "odd.yml: .*params.batchsize .*mean training_params.batch_size"),
        ({"fold_type": "random"}, "sequential_folds or zero_shot_folds"),
        ({"loss_name": "nll"}, "loss_name=nll .* mse or cosine_dist"),
        ({"shuffle_targets": True}, "shuffle_targets=True .* n_shifts"),
        (3, "training_params must hold"),
    ],
)
def test_what_cannot_be_expressed_is_refused(training_params, sentence):
    with pytest.raises(InputError, match=sentence):
        benchmark.translate({"training_params": training_params}, "odd.yml")
    with pytest.raises(InputError, match="odd.yml: tasks is not a setting"):
        benchmark.translate({"trial_name": "x", "tasks": []}, "odd.yml")


def test_a_config_setter_changes_the_nested_form():
    options = {**EXPECTED, "model_params": {}, "out_dir": "out/try"}
    experiment = benchmark.experiment_config(options)
    assert experiment.data_params.embedding_type == "gpt-2xl" and experiment.trial_name == "try"
    assert experiment.data_params.data_root == "data" and experiment.training_params.n_folds == 5
    experiment.model_params["input_channels"] = 127
    experiment.data_params.window_width = 2.0
    settings = benchmark.settings_of(experiment, "config_setter=neural_conv")
    changed = benchmark.translate(settings, "config_setter=neural_conv", defaults=False)
    kept = {key: options[key] for key in changed}
    assert changed == kept | {"model_params": {"input_channels": 127}, "window": 2.0}
    with pytest.raises(InputError, match="config_setter=f must return the configuration"):
        benchmark.settings_of(SimpleNamespace(model_params={}), "config_setter=f")


def test_the_ini_beside_a_foundation_model(tmp_path):
    path = tmp_path / "experiment_config.ini"
    rates = "sample_length = 2\noriginal_fs = 512\nnew_fs = 128\n"
    path.write_text(f"[ECOG_DATA_CONFIG]\n{rates}bands = [[70, 200]]\nnorm = hour\n")
    data = benchmark.read_ini(tmp_path).ecog_data_config
    assert (data.sample_length, data.original_fs, data.new_fs) == (2, 512, 128)
    assert data.bands == [[70, 200]] and data.norm == "hour"
    path.write_text("[ECOG_DATA_CONFIG]\nsample_length = 2\n")
    with pytest.raises(InputError, match="experiment_config.ini has no number 'original_fs'"):
        benchmark.read_ini(tmp_path)
    path.write_text("no ini")
    with pytest.raises(InputError, match="is not an ini file"):
        benchmark.read_ini(tmp_path)
