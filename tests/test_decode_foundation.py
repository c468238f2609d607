"""Pretrained encoders in decode.py: frozen, beside untrained twins, tuned, and of another code."""

import shutil

import mne
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import save_encoder
from test_decode import finished, prepared, windows_at

from configurator import InputError
from data.montage import Montage
from data.podcast import benchmark_yaml
from data.recording import Recording, write_recording
from decode_foundation import EncoderInput, ForeignLatents, foundation_model
from model import NeuralEncoder, load_encoder


def make_encoder(folder, podcast, seed=0, bands=()):
    """A run folder of foundation.py: random weights, said to be of the first half of sub-01."""
    recording = Recording(podcast / "sub-01")
    known = {"dataset": str(podcast), "name": "sub-01", "subject": "sub-01", "seen": [0.0, 55.0]}
    known |= {"channels": recording.names, "xyz": recording.xyz.tolist()}
    recipe = {"sfreq": 64.0, "window": 0.5, "patch": 8, "bands": list(bands), "clamp": 8.0}
    recipe |= {"grid": "", "subjects": ["sub-01"], "recordings": [known]}
    shape = {"kind": "transformer", "tokens": "electrode", "n_embd": 6, "width": 16, "n_layer": 1}
    shape |= {"n_head": 2, "patch": 8 * max(1, len(bands)), "degree": 2, "subjects": 1}
    save_encoder(folder, recipe, seed, **shape)
    return folder


def frozen(folder, **options):
    given = {"preprocess": "foundation_model_preprocessing_fn", "lags": [300.0]}
    given |= {"preprocessor_params": {"model_dir": str(folder)}}
    return {**given, "config_setter": "foundation_model", **options}


def test_latents_are_the_encoders_and_cached_by_weights_and_window(podcast, tmp_path, monkeypatch):
    folder = make_encoder(tmp_path / "encoder", podcast)
    config, experiment = prepared(podcast, tmp_path / "runs/a", **frozen(folder))
    assert config.window == 0.5 and experiment.inputs[""].width == 64  # from the pretrained model
    X = windows_at(experiment, 300.0)
    assert X.shape == (len(experiment.target.start), 2 * 4 * 6)  # two people, 4 tokens of 6
    encoder, _ = load_encoder(folder)
    first = experiment.inputs[""].first(experiment.rows, 300.0)
    for i, person in enumerate(experiment.montage.people):
        recording, channels = person.recording, person.channels
        x = recording.signal[: len(recording.signal) // 2 * 2, channels]
        x = x.reshape(-1, 2, len(channels)).mean(1)  # 128 to 64 Hz
        heard = x[: 55 * 64] if i == 0 else x  # a stranger's scale is of all of it
        low, middle, high = np.percentile(heard, [25, 50, 75], axis=0)
        begin = round(first[i, 7] / 2)
        window = (x[begin : begin + 32] - middle) / ((high - low) / 1.349)
        window = torch.tensor(np.clip(window, -8, 8).T[None], dtype=torch.float32)
        xyz = torch.tensor(recording.xyz[channels], dtype=torch.float32)
        with torch.no_grad():
            latents = encoder(window, xyz, torch.tensor([0 if i == 0 else -1]))
        latents = latents.flatten().numpy()
        assert np.allclose(X[7, 24 * i : 24 * i + 24], latents, atol=1e-4)
    cache = tmp_path / "runs/cache"
    assert len(list(cache.glob("*.npy"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(NeuralEncoder, "forward", None)  # not asked again
        _, again = prepared(podcast, tmp_path / "runs/b", **frozen(folder))
        assert np.array_equal(windows_at(again, 300.0), X)
    make_encoder(folder, podcast, seed=1)
    _, other = prepared(podcast, tmp_path / "runs/c", **frozen(folder))
    assert not np.allclose(windows_at(other, 300.0), X) and len(list(cache.glob("*.npy"))) == 2
    narrow = frozen(folder, config_setter="", window=0.25)
    _, narrow = prepared(podcast, tmp_path / "runs/d", **narrow)
    assert windows_at(narrow, 300.0).shape[1] == 2 * 2 * 6


def test_bad_segments_do_not_count_in_a_scale_and_slow_recordings_are_refused(podcast, tmp_path):
    params = {"model_dir": str(make_encoder(tmp_path / "encoder", podcast))}
    loud = shutil.copytree(podcast / "sub-02", tmp_path / "sub-02")
    with open(loud / "meta.yaml", "a") as file:
        file.write("bad_spans: [[10.0, 50.0]]\n")
    first, last = Recording(loud).rows([10.0, 50.0])
    signal = np.memmap(loud / "signal.f32", "<f4", "r+").reshape(-1, 6)
    signal[first:last] *= 1000
    signal.flush()
    scales = []
    for path in (podcast / "sub-02", loud):
        reader = EncoderInput(Montage([(Recording(path), np.arange(5))]), params, "cpu")
        scales.append(reader.signal(reader.people[0])[2])
    assert np.allclose(scales[1], scales[0], rtol=0.2)
    slow = grid_recording(tmp_path / "slow", ["LGA1", "LGA2"], sfreq=32.0)
    with pytest.raises(InputError, match="encoder reads 64 Hz but the recordings have 32 Hz"):
        EncoderInput(slow, params, "cpu")
    with pytest.raises(InputError, match="hold no patch"):
        reader(np.array([[0, 100]]), 10)


def test_pretrained_beside_untrained_and_raw_in_pairs(podcast, tmp_path, capsys):
    folder = make_encoder(tmp_path / "encoder", podcast, bands=[(5, 20), (20, 50)])
    options = frozen(folder, model="foundation_mlp", untrained=2, controls=["mean"])
    table = finished(podcast, tmp_path / "runs/run", **options)
    twins = [table.loc[(f"ridge, untrained {k}", "auc")].score.item() for k in (1, 2)]
    assert twins[0] != twins[1]
    results = pd.read_csv(tmp_path / "runs/run/results.csv")
    pair = results[(results.model == "ridge, pretrained - raw signal") & (results.metric == "auc")]
    (pair,) = pair.itertuples()
    by_fold = results[(results.lag == "300.0") & (results.metric == "auc")]
    by_fold = by_fold.pivot_table(index="fold", columns="model", values="score").drop("mean")
    difference = (by_fold["ridge"] - by_fold["ridge, raw signal"]).mean()
    assert abs(pair.score - difference) < 1e-6 and pair.low < pair.score < pair.high
    said = capsys.readouterr().out
    assert "mean of 2 untrained" in said and "matched by name" in said
    assert "sub-01 from 0 to 55 s" in said and "from 128 to 64 Hz" in said


def test_the_encoder_is_tuned_end_to_end(podcast, tmp_path):
    folder = make_encoder(tmp_path / "encoder", podcast)
    options = frozen(folder, model="foundation_finetune", beside=[], n_folds=2)
    options |= {"preprocess": "foundation_model_input", "subjects": ["1"]}
    table = finished(podcast, tmp_path / "runs/run", epochs=24, learning_rate=2e-2, **options)
    assert table.loc[("foundation_finetune", "auc")].score.item() > 0.6
    with pytest.raises(InputError, match="needs preprocess=foundation_model_input"):
        finished(podcast, tmp_path / "runs/no", model="foundation_finetune", lags=[300.0])
    with pytest.raises(InputError, match="model_dirr"):
        params = {"model_dirr": str(folder)}
        finished(podcast, tmp_path / "runs/no", **frozen(folder, preprocessor_params=params))


VIDEO = """import torch
class Grid(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(64, width, bias=False)
    def forward(self, x, forward_features=False):
        assert forward_features and x.shape[1:] == (1, 32, 8, 8)
        return self.linear(x.mean(2).flatten(1))
def make(ini):
    return Grid(ini.model_config.dim)
"""
INI = """[ECOG_DATA_CONFIG]
original_fs = 512
new_fs = 128
sample_length = 0.25
[MODEL_CONFIG]
dim = 64
"""


def grid_recording(folder, names, sfreq=512.0):
    signal = np.random.default_rng(0).normal(size=(2000, len(names))).astype("f4")
    events = pd.DataFrame({"onset": [1.0]})
    meta = {"sfreq": sfreq, "unit": "V", "subject": "9", "source": "a test", "synthetic": True}
    write_recording(folder, signal, pd.DataFrame({"name": names}), events, **meta)
    return Montage([(Recording(folder), np.arange(len(names)))])


def test_the_documents_model_folder(tmp_path):
    (tmp_path / "video.py").write_text(VIDEO)
    (tmp_path / "experiment_config.ini").write_text(INI)
    torch.save({"linear.weight": torch.eye(64)}, tmp_path / "model.pth")
    params = {"model_dir": str(tmp_path), "foundation_model_batch_size": 2}
    params["model"] = f"{tmp_path / 'video.py'}:make"
    options = {"preprocessor_params": params, "window": -1, "model": "", "config_setter": ""}
    options |= {"model_params": {}, "out_dir": "out/x", "embedding": ["gpt2-xl"]}
    names = ["G2", "LG3", "G64"]
    raw = mne.io.RawArray(np.zeros((3, 10)), mne.create_info(names, 512.0, "ecog"), verbose="error")
    changed = foundation_model(benchmark_yaml.experiment_config(options), [raw], None, None)
    assert changed.data_params.window_width == 0.25
    montage = grid_recording(tmp_path / "sub-09", names)
    read = ForeignLatents(montage, params, "cpu")
    first = np.array([[0, 100, 777, 1000, 1872]])
    expected = np.zeros((5, 64), np.float32)
    expected[:, [1, 63]] = montage.samples(first, 128)[:, [0, 2]].mean(2)
    assert np.allclose(read(first, 128), expected, atol=1e-6)
    both = Montage([(montage.people[0].recording, np.arange(3))] * 2)
    slow = grid_recording(tmp_path / "slow", ["G2"], sfreq=256.0)
    strange = grid_recording(tmp_path / "other", ["A", "B"])
    for other, options, words in (
        (montage, {"model": ""}, "constructor"),
        (both, {}, "of one person"),
        (slow, {}, "512 Hz"),
        (strange, {}, "G1 to G64"),
    ):
        with pytest.raises(InputError, match=words):
            ForeignLatents(other, {**params, **options}, "cpu")
    with pytest.raises(InputError, match="blocks of 4"):
        read(first, 126)
