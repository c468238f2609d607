"""decode_neuroprobe.py by the benchmark's splits, on a small set in the prepared layout."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import save_encoder

import decode_neuroprobe
from configurator import InputError
from data.recording import write_recording, write_set
from decode_neuroprobe import Config

NAMES = ["sub_2_trial000", "sub_2_trial004", "sub_3_trial001"]
CONTACTS = ["LA1", "LA2", "LA3", "LB1"]


def splits(n):
    """The columns of n windows: two folds within a film, and across films and people."""
    half, quarter = n // 2, n // 4
    first = ["val"] * quarter + ["test"] * (half - quarter)
    columns = {"within_0": first + ["train"] * (n - half)}
    columns["within_1"] = ["train"] * half + first
    columns["across"] = ["val"] * half + ["test"] * (n - half)
    return columns


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Two films of person 2, one of person 3, in which loud words have power in LA2 to LB1."""
    folder, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for name in NAMES:
        onset = 1 + 1.5 * np.arange(80) + rng.uniform(0, 0.3, 80)
        loud = np.tile([1, 0], 40)
        signal = rng.normal(size=(130 * 256, 4)).astype("f4")
        for start in onset[loud == 1]:
            begin = round(start * 256)
            signal[begin : begin + 128, 1:] *= 1.6
        channels = pd.DataFrame({"name": CONTACTS, "region": ["a", "a", "b", "c"]})
        channels = channels.assign(x=0.01 * np.arange(4), y=0.0, z=0.0)
        if name == NAMES[2]:
            channels["region"] = ["a", "b", "b", ""]
        meta = {"sfreq": 256.0, "unit": "V", "subject": name[:5], "source": "a test"}
        events = pd.DataFrame({"onset": onset})
        write_recording(folder / name, signal, channels, events, synthetic=True, **meta)
        tables = []
        for task, label in (("volume", loud), ("speech", rng.permutation(loud))):
            table = pd.DataFrame({"task": task, "onset": onset, "label": label, **splits(80)})
            tables.append(table)
        pd.concat(tables).to_csv(folder / name / "neuroprobe.csv", index=False)
    tasks = {"tasks": ["volume", "speech"], "across_people": NAMES[1]}
    write_set(folder, NAMES, synthetic=True, **tasks)
    return folder


def options(benchmark, out, **changes):
    settings = {"dataset": str(benchmark), "out_dir": str(out), "task": "volume", "n_shifts": 50}
    return {**settings, "spectrum_max": 60.0, "device": "cpu", **changes}


TESTED = {"within": NAMES, "session": NAMES[:2], "subject": NAMES[2:]}


@pytest.mark.parametrize("split", TESTED)
def test_it_runs_by_the_benchmarks_splits(benchmark, tmp_path, split, capsys):
    settings = options(benchmark, tmp_path, split=split)
    decode_neuroprobe.main(Config(**settings))
    printed = capsys.readouterr().out
    results = pd.read_csv(tmp_path / "results.csv")
    assert set(results.recording) == set(TESTED[split])
    assert results[["score", "chance", "low", "high", "n", "p"]].notna().all(axis=None)
    assert results[results.metric == "roc_auc"].score.mean() > 0.65  # loudness was planted
    assert "shifted labels" in printed and ("left out" in printed) == (split != "within")
    file = next((tmp_path / "leaderboard").rglob("population_volume.json"))
    evaluation = json.loads(file.read_text())["evaluation_results"]
    names = {"sub_2_trial000": "btbank2_0", "sub_2_trial004": "btbank2_4"}
    assert set(evaluation) == {names.get(name, "btbank3_1") for name in TESTED[split]}
    folds = next(iter(evaluation.values()))["population"]["one_second_after_onset"]["folds"]
    assert len(folds) == (2 if split == "within" else 1)
    assert {"train_accuracy", "train_roc_auc", "test_accuracy", "test_roc_auc"} <= set(folds[0])
    rows = (tmp_path / "results.part-0.jsonl").read_text()
    decode_neuroprobe.main(Config(**settings))  # everything is there
    assert (tmp_path / "results.part-0.jsonl").read_text() == rows


def test_other_labels_or_signals_are_tested_again(benchmark, tmp_path):
    data = shutil.copytree(benchmark, tmp_path / "set")
    settings = options(data, tmp_path / "out", subjects=[NAMES[0]])
    rows = tmp_path / "out/results.part-0.jsonl"
    sizes = []
    for file in ("meta.yaml", "neuroprobe.csv", "signal.f32"):
        (data / NAMES[0] / file).write_bytes((data / NAMES[0] / file).read_bytes())
        decode_neuroprobe.main(Config(**settings))
        sizes.append(len(rows.read_text().splitlines()))
    assert sizes == [sizes[0], 2 * sizes[0], 3 * sizes[0]]


def test_voltages_and_trained_decoders(benchmark, tmp_path):
    settings = {"represent": "bins", "bins": 16, "subjects": [NAMES[0]], "epochs": 3}
    for model in ("logistic", "pitom_model"):
        out = tmp_path / model
        decode_neuroprobe.main(Config(**options(benchmark, out, model=model, **settings)))
        results = pd.read_csv(out / "results.csv")
        assert np.isfinite(results.score).all() and set(results.recording) == {NAMES[0]}


def test_a_frozen_encoder_reads_people_with_other_electrodes(benchmark, tmp_path):
    shape = {"kind": "transformer", "tokens": "electrode", "n_embd": 6, "width": 16}
    recipe = {"sfreq": 64.0, "window": 1.0, "patch": 16, "bands": [], "clamp": 8.0, "grid": ""}
    recipe |= {"subjects": [], "recordings": []}
    save_encoder(tmp_path, recipe, **shape, n_layer=1, n_head=2, patch=16)
    scores = []
    for untrained in (0, 1):
        settings = {"split": "subject", "preprocess": "foundation_model_preprocessing_fn"}
        params = {"model_dir": str(tmp_path), "untrained": untrained}
        out = tmp_path / str(untrained) / "out"
        settings |= {"preprocessor_params": params, "reference": "none"}
        decode_neuroprobe.main(Config(**options(benchmark, out, **settings)))
        scores.append(pd.read_csv(out / "results.csv").set_index("metric").score.roc_auc)
    assert scores[0] != scores[1]


def test_contacts_of_other_places_are_not_mixed_up(benchmark, tmp_path):
    shutil.copytree(benchmark, tmp_path / "set")
    for name, changes in ((NAMES[0], {"LA1": "LC1"}), (NAMES[2], {",a\n": ",d\n", ",b\n": ",e\n"})):
        path = tmp_path / "set" / name / "channels.csv"
        text = path.read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
    for split in ("session", "subject"):
        settings = options(tmp_path / "set", tmp_path / "out", split=split)
        with pytest.raises(InputError, match="have different contacts, or no region in common"):
            decode_neuroprobe.main(Config(**settings))


REFUSED = [
    ({"task": "nosuch"}, "take all or one of volume, speech"),
    ({"subjects": ["sub_9"]}, "no recording to test"),
    ({"window": 20.0}, "beyond the recording"),
    ({"dataset": "nosuch"}, "nosuch"),
]


def test_bad_input_is_refused_in_a_sentence(benchmark, tmp_path):
    for changes, words in REFUSED:
        with pytest.raises(InputError, match=words):
            decode_neuroprobe.main(Config(**options(benchmark, tmp_path / "out", **changes)))
