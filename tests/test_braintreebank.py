"""data/braintreebank and decode.py's Neuroprobe: the files of a small copy in the real layout come out as they are, labels and splits are the benchmark's."""
import functools
import json
import shutil
import threading
import zipfile
from dataclasses import asdict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import h5py
import numpy as np
import pandas as pd
import pytest
from helpers import refused
from sklearn.model_selection import KFold

import decode as D
from data.braintreebank import prepare as btb
from data.recording import Recording, read_set
from model import EncoderConfig, NeuralEncoder, save_checkpoint

N_WORDS, SECONDS = 90, 200
CONTACTS = ["LA1", "LA2*", "LA3#", "LA4", "LB1", "LB2", "DC1"]


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """(root, package): two films of person 2, one of person 3, made up; the contacts after the first carry the loudness of each word."""
    base = tmp_path_factory.mktemp("btb")
    root, package, rng = base / "braintreebank", base / "neuroprobe", np.random.default_rng(0)
    for folder in (root / "electrode_labels/sub_2", root / "electrode_labels/sub_3", root / "localization/sub_2", root / "localization/sub_3",
                   package / "braintreebank_features_time_alignment", package / "pitch_volume_features"):
        folder.mkdir(parents=True)
    (root / "corrupted_elec.json").write_text(json.dumps({"sub_2": ["LB2"], "sub_3": []}))
    places = pd.DataFrame([dict(Subject=f"sub_{p}", Electrode=c.strip("#"), X=10.0 * i, Y=-20.0, Z=5.0) for p in (2, 3) for i, c in enumerate(CONTACTS[:-2])])
    places.to_csv(root / "localization/elec_coords_full.csv")
    for p in (2, 3):
        (root / f"electrode_labels/sub_{p}/electrode_labels.json").write_text(json.dumps(CONTACTS))
        regions = ["a", "a", "b", "b", "c", "c", ""]
        pd.DataFrame({"Electrode": CONTACTS, "DesikanKilliany": regions}).to_csv(root / f"localization/sub_{p}/depth-wm.csv", index=False)
    films = {(2, 0): "venom", (2, 4): "infinity", (3, 1): "lotr"}
    for (p, t), film in films.items():
        start = 1 + np.arange(N_WORDS) * 1.5 + rng.uniform(0, 0.3, N_WORDS)
        features = pd.DataFrame({c: rng.normal(size=N_WORDS) for c in ("rms", "delta_rms", "gpt2_surprisal", "max_global_magnitude", "max_vector_magnitude",
                                                                         "mean_pixel_brightness")})
        features = features.assign(text="word", start=start, end=start + 0.3, sentence=np.repeat([f"s{i}" for i in range(N_WORDS // 6)], 6),
                                   idx_in_sentence=np.tile(np.arange(6), N_WORDS // 6), is_onset=np.tile([1.0] + 5 * [0], N_WORDS // 6),
                                   face_num=rng.integers(0, 3, N_WORDS), bin_head=rng.integers(0, 2, N_WORDS),
                                   pos=rng.choice(["VERB", "NOUN", "DET"], N_WORDS), word_length=rng.random(N_WORDS))
        (root / "transcripts" / film).mkdir(parents=True)
        features.to_csv(root / "transcripts" / film / "features.csv")  # the index is the column without a name
        words = features[["text", "start", "end", "sentence", "is_onset", "idx_in_sentence", "bin_head", "pos"]].assign(
            original_index=np.arange(N_WORDS), est_idx=np.round(start * 2048), est_end_idx=np.round((start + 0.3) * 2048))
        words.to_csv(package / f"braintreebank_features_time_alignment/subject{p}_trial{t}_words_df.csv", index=False)
        quiet = 2048 * (140 + np.arange(40))
        pd.DataFrame({"start": quiet / 2048, "end": quiet / 2048 + 1, "est_idx": quiet, "est_end_idx": quiet + 2048}).to_csv(
            package / f"braintreebank_features_time_alignment/subject{p}_trial{t}_nonverbal_df.csv", index=False)
        pitch = {str(s): {"enhanced_pitch": i} for i, s in enumerate(start)}
        (package / f"pitch_volume_features/{film}_pitch_volume_features.json").write_text(json.dumps(pitch))
        signal = rng.normal(size=(SECONDS * 2048, len(CONTACTS))).astype("f4")
        for s, loud in zip(start, features.rms):
            signal[int(s * 2048):int(s * 2048) + 1024, 1:] *= 1 + 0.6 * (loud > 0)  # louder in the second's first half
        with h5py.File(root / f"sub_{p}_trial{t:03}.h5", "w") as file:
            for i in range(len(CONTACTS)):
                file[f"data/electrode_{i}"] = signal[:, i]
    lite = {f"btbank{p}": ["LA1", "LA2", "LA3", "LB1", "LB2"] for p in (2, 3)}
    (package / "config.py").write_text("import os\nROOT_DIR = os.environ['ROOT_DIR_BRAINTREEBANK']\nNEUROPROBE_GLOBAL_RANDOM_SEED = 42\n"
                                       "DS_DM_TRAIN_SUBJECT_ID, DS_DM_TRAIN_TRIAL_ID = 2, 4\nNEUROPROBE_LITE_MAX_SAMPLES = 3500\nNEUROPROBE_LITE_N_FOLDS = 2\n"
                                       f"NEUROPROBE_LITE_SUBJECT_TRIALS = {list(films)}\nNEUROPROBE_LITE_ELECTRODES = {lite}\n"
                                       f"BRAINTREEBANK_SUBJECT_TRIAL_MOVIE_NAME_MAPPING = { {f'btbank{p}_{t}': f for (p, t), f in films.items()} }\n")
    return root, package


@pytest.fixture(scope="session")
def made(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "set"
    options = dict(root=str(tree[0]), package=str(tree[1].parent), out_dir=str(folder))  # a clone: the package lies one level down
    btb.main(btb.Config(**options, recordings=["btbank2_0"]))
    first = (folder / "sub_2_trial000/meta.yaml").stat().st_mtime_ns
    btb.main(btb.Config(**options))  # goes on with the others
    assert (folder / "sub_2_trial000/meta.yaml").stat().st_mtime_ns == first
    return folder


def test_recordings_come_out_as_they_are(tree, made):
    assert read_set(made)["recordings"] == ["sub_2_trial000", "sub_2_trial004", "sub_3_trial001"]
    r = Recording(made / "sub_2_trial000")
    assert r.names == ["LA1", "LA2", "LA3", "LB1"] and r.sfreq == 2048 and len(r.signal) == SECONDS * 2048  # LB2 is corrupted, LA4 is not the benchmark's
    with h5py.File(tree[0] / "sub_2_trial000.h5") as file:
        assert np.array_equal(r.signal[:, 2], file["data/electrode_2"][:]) and np.array_equal(r.signal[:, 3], file["data/electrode_4"][:])
    assert np.allclose(r.xyz[1], [0.01, -0.02, 0.005]) and (r.events.kind == "word").sum() == N_WORDS


def test_labels_and_splits_are_the_benchmarks(tree, made):
    table = pd.read_csv(made / "sub_2_trial000/neuroprobe.csv")
    assert list(table.task.unique()) == btb.TASKS and len(btb.TASKS) == 15
    words = pd.read_csv(tree[1] / "braintreebank_features_time_alignment/subject2_trial0_words_df.csv")
    rms = pd.read_csv(tree[0] / "transcripts/venom/features.csv").rms.to_numpy()
    loud = table[table.task == "volume"].reset_index(drop=True)
    at = words.set_index("est_idx").index.get_indexer(np.round(loud.onset * 2048))
    below = np.array([np.mean(rms < x) for x in rms])
    assert (loud.label == np.tile([1, 0], len(loud) // 2)).all() and (below[at[::2]] > 0.75).all() and (below[at[1::2]] < 0.25).all()
    for k, (train, held) in enumerate(KFold(2).split(loud)):  # its first half validates
        half = len(held) // 2
        assert (loud[f"within_{k}"][train] == "train").all() and (loud[f"within_{k}"][held[:half]] == "val").all() and (
            loud[f"within_{k}"][held[half:]] == "test").all()
    speech = table[table.task == "speech"]
    draw = np.random.RandomState(42)
    assert len(speech) == 80 and np.allclose(speech.onset[speech.label == 1], words.est_idx[np.sort(draw.choice(N_WORDS, 40, replace=False))] / 2048)
    assert speech.onset[speech.label == 0].min() >= 140 and table[table.task == "onset"].label.sum() == N_WORDS // 6
    gap = table[table.task == "word_gap"]
    first = words.groupby("sentence", sort=False).est_idx.first() / 2048
    assert not gap.onset.isin(first).any()


@pytest.mark.parametrize("split", ["within", "session", "subject"])
def test_benchmark_runs_by_its_splits(made, tmp_path, split, capsys):
    config = D.Config(direction="neuroprobe", dataset=str(made), out_dir=str(tmp_path / "linear"), task="volume", window=1.0, model="logistic",
                      represent="spectrum", spectrum_segment=0.25, spectrum_max=40, reference="laplacian", split=split, n_shifts=50, device="cpu")
    D.main(config)
    said = capsys.readouterr().out
    results = pd.read_csv(tmp_path / "linear/results.csv")
    assert results[["score", "chance", "low", "high", "n"]].notna().all().all() and "shifted labels" in said
    found = json.loads(next((tmp_path / "linear/leaderboard").rglob("population_volume.json")).read_text())["evaluation_results"]
    assert set(found) == ({"btbank3_1"} if split == "subject" else {"btbank2_0", "btbank2_4"} | ({"btbank3_1"} if split == "within" else set()))
    folds = found["btbank3_1" if split == "subject" else "btbank2_0"]["population"]["one_second_after_onset"]["folds"]
    assert len(folds) == (2 if split == "within" else 1) and {"train_accuracy", "train_roc_auc", "test_accuracy", "test_roc_auc"} <= set(folds[0])
    assert results[results.metric == "roc_auc"].score.mean() > 0.6  # loudness was planted
    D.main(config)  # everything is there
    assert len((tmp_path / "linear/results.part-0.jsonl").read_text().splitlines()) == len(results)


def test_a_frozen_encoder_reads_people_with_other_electrodes(made, tmp_path):
    shape = EncoderConfig(kind="transformer", tokens="electrode", n_embd=6, width=16, n_layer=1, n_head=2, patch=16)
    recipe = dict(sfreq=64.0, window=1.0, patch=16, bands=[], clamp=8.0, grid="", subjects=[], recordings=[])
    save_checkpoint(tmp_path / "best.pt", dict(kind="foundation", encoder_args=asdict(shape), recording=recipe, model={
        f"encoder.{k}": v for k, v in NeuralEncoder(shape).state_dict().items()}))
    scores = []
    for untrained in (0, 1):
        out = tmp_path / str(untrained)
        D.main(D.Config(direction="neuroprobe", dataset=str(made), out_dir=str(out), task="speech", window=1.0, model="logistic", split="subject", device="cpu",
                        preprocess="foundation_model_preprocessing_fn", preprocessor_params=dict(model_dir=str(tmp_path), untrained=untrained), n_shifts=50,
                        cache=""))
        scores.append(pd.read_csv(out / "results.csv").set_index("metric").score)
        assert (out / "leaderboard/Cross-Subject/population_speech.json").is_file()
    assert scores[0].roc_auc != scores[1].roc_auc


def test_fetching_unpacks_what_is_missing(tree, tmp_path, capsys):
    root, package = tree
    page = tmp_path / "page"
    page.mkdir()
    for name in ("localization", "electrode_labels", "transcripts"):
        shutil.make_archive(str(page / name), "zip", root, name)
    with zipfile.ZipFile(page / "sub_2_trial000.h5.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(root / "sub_2_trial000.h5", "sub_2_trial000.h5")
    shutil.copy(root / "corrupted_elec.json", page)
    (page / "index.html").write_text("".join(f"<p><a href='{p.name}'>{p.name}</a>" for p in page.iterdir()))
    handler = functools.partial(type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *a: None}), directory=str(page))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = dict(url=f"http://127.0.0.1:{server.server_port}/", package=str(package), out_dir=str(tmp_path / "out"))
    btb.main(btb.Config(**options, recordings=["btbank2_0"]))
    assert read_set(tmp_path / "out")["recordings"] == ["sub_2_trial000"] and "5 files" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.zip"))
    with pytest.raises((OSError, ValueError), match="no link to sub_3_trial001"):
        btb.main(btb.Config(**options, recordings=["btbank3_1"]))
    server.shutdown()
    with pytest.raises(OSError, match="cannot be reached"):
        btb.main(btb.Config(**{**options, "url": "http://127.0.0.1:1/"}, recordings=["btbank2_4"]))


def test_bad_input_is_a_sentence(tree, tmp_path):
    refused("data/braintreebank/prepare", f"root={tree[0]}", f"package={tree[1]}", "recordings=1_1", says=["sub_1_trial001"])
    given = dict(root=str(tree[0]), package=str(tree[1]), out_dir=str(tmp_path / "out"))
    for options, words in ((dict(package=str(tmp_path)), "braintreebank_features_time_alignment"), (dict(recordings=["btbank9_9"]), "no btbank9_9.*btbank2_0"),
                           (dict(root=str(tmp_path)), "features.csv is missing")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            btb.main(btb.Config(**{**given, **options}))
    torn = tmp_path / "torn"
    torn.mkdir()
    for path in tree[0].iterdir():
        (torn / path.name).symlink_to(path)
    (torn / "sub_2_trial000.h5").unlink()
    (torn / "sub_2_trial000.h5").write_bytes((tree[0] / "sub_2_trial000.h5").read_bytes()[:100_000])
    with pytest.raises(ValueError, match="no whole recording"):
        btb.main(btb.Config(root=str(torn), package=str(tree[1]), out_dir=str(tmp_path / "out2"), recordings=["btbank2_0"]))
