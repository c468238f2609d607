"""data/braintreebank: the files of a small copy in the real layout come out as they are, and labels
and splits are Neuroprobe's."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import KFold

from data import InputError
from data.braintreebank import prepare as btb
from data.recording import Recording, read_set
from tests.helpers import prepare

N_WORDS, SECONDS = 90, 200
CONTACTS = ["LA1", "LA2*", "LA3#", "LA4", "LB1", "LB2", "DC1"]
FILMS = {(2, 0): "venom", (2, 4): "infinity", (3, 1): "lotr"}
CONFIG = """
import os
os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"
ROOT_DIR = os.environ["ROOT_DIR_BRAINTREEBANK"]
NEUROPROBE_GLOBAL_RANDOM_SEED = 42
DS_DM_TRAIN_SUBJECT_ID, DS_DM_TRAIN_TRIAL_ID = 2, 4
NEUROPROBE_LITE_MAX_SAMPLES = 3500
NEUROPROBE_LITE_N_FOLDS = 2
NEUROPROBE_LITE_SUBJECT_TRIALS = [(2, 0), (2, 4), (3, 1)]
NEUROPROBE_LITE_ELECTRODES = {"btbank2": ["LA1", "LA2", "LA3", "LB1", "LB2"], "btbank3": ["LA1",
    "LA2", "LA3", "LB1", "LB2"]}
BRAINTREEBANK_SUBJECT_TRIAL_MOVIE_NAME_MAPPING = {"btbank2_0": "venom", "btbank2_4": "infinity",
    "btbank3_1": "lotr"}
"""


def make_features(rng, n_words, words):
    """A film's features.csv: numbers of chance for every column of the benchmark's tasks."""
    columns = [column for column in btb.QUARTERS.values() if column != "enhanced_pitch"]
    features = pd.DataFrame(rng.normal(size=(n_words, 6)), columns=columns[:6])
    features["mean_pixel_brightness"] = rng.normal(size=n_words)
    features["sentence"] = [f"s{i // 6}" for i in range(n_words)]
    features["idx_in_sentence"] = np.arange(n_words) % 6
    features["is_onset"] = 1.0 * (features["idx_in_sentence"] == 0)
    features["face_num"] = rng.integers(0, 3, n_words)
    features["bin_head"] = rng.integers(0, 2, n_words)
    features["pos"] = rng.choice(["VERB", "NOUN", "DET"], n_words)
    return features.assign(**words)


def write_film(root, package, rng, person, trial, film):
    start = 1 + np.arange(N_WORDS) * 1.5 + rng.uniform(0, 0.3, N_WORDS)
    words = {"text": "NA", "start": start, "end": start + 0.3}
    features = make_features(rng, N_WORDS, words)
    features.loc[7, "rms"] = np.nan  # as of a word that could not be measured
    (root / "transcripts" / film).mkdir(parents=True)
    features.to_csv(root / "transcripts" / film / "features.csv")  # the index has no name
    table = features[["start", "end"]].assign(original_index=np.arange(N_WORDS))
    table["est_idx"] = np.round(start * 2048)
    table["est_end_idx"] = np.round((start + 0.3) * 2048)
    stem = package / "braintreebank_features_time_alignment" / f"subject{person}_trial{trial}"
    table.to_csv(f"{stem}_words_df.csv", index=False)
    quiet = 2048 * (140 + np.arange(40))
    silences = pd.DataFrame({"start": quiet / 2048, "end": quiet / 2048 + 1})
    silences = silences.assign(est_idx=quiet, est_end_idx=quiet + 2048)
    silences.to_csv(f"{stem}_nonverbal_df.csv", index=False)
    pitch = {str(s): {"enhanced_pitch": i} for i, s in enumerate(start)}
    path = package / "pitch_volume_features" / f"{film}_pitch_volume_features.json"
    path.write_text(json.dumps(pitch))
    signal = rng.normal(size=(SECONDS * 2048, len(CONTACTS))).astype("f4")
    for first, loud in zip((start * 2048).astype(int), features["rms"]):
        signal[first : first + 1024, 1:] *= 1 + 0.6 * (loud > 0)  # in the second's first half
    with h5py.File(root / f"sub_{person}_trial{trial:03}.h5", "w") as file:
        for i in range(len(CONTACTS)):
            file[f"data/electrode_{i}"] = signal[:, i]


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """(root, package): two films of person 2, one of person 3, made up; the contacts after the
    first carry the loudness of each word."""
    base = tmp_path_factory.mktemp("btb")
    root, package = base / "braintreebank", base / "neuroprobe"
    rng = np.random.default_rng(0)
    for name in ("braintreebank_features_time_alignment", "pitch_volume_features"):
        (package / name).mkdir(parents=True)
    (package / "config.py").write_text(CONFIG)
    places = []
    for person in (2, 3):
        labels = root / f"electrode_labels/sub_{person}/electrode_labels.json"
        regions = root / f"localization/sub_{person}/depth-wm.csv"
        for path in (labels, regions):
            path.parent.mkdir(parents=True)
        labels.write_text(json.dumps(CONTACTS))
        table = pd.DataFrame({"Electrode": CONTACTS, "DesikanKilliany": list("aabbcc") + [""]})
        table.to_csv(regions, index=False)
        for i, contact in enumerate(CONTACTS[:-2]):
            places.append([f"sub_{person}", contact.strip("#"), 10.0 * i, -20.0, 5.0])
    places = pd.DataFrame(places, columns=["Subject", "Electrode", "X", "Y", "Z"])
    places.to_csv(root / "localization/elec_coords_full.csv")
    (root / "corrupted_elec.json").write_text(json.dumps({"sub_2": ["LB2"], "sub_3": []}))
    for (person, trial), film in FILMS.items():
        write_film(root, package, rng, person, trial, film)
    return root, package


@pytest.fixture(scope="session")
def made(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "set"
    options = {"root": tree[0], "package": tree[1].parent, "out_dir": folder}  # as in a clone
    prepare(btb, **options, recordings=["btbank2_0"])
    before = (folder / "sub_2_trial000/meta.yaml").stat().st_mtime_ns
    prepare(btb, **options)  # goes on with the others
    assert (folder / "sub_2_trial000/meta.yaml").stat().st_mtime_ns == before
    return folder


def test_recordings_come_out_as_they_are(tree, made, tmp_path):
    names = ["sub_2_trial000", "sub_2_trial004", "sub_3_trial001"]
    assert read_set(made)["recordings"] == names
    recording = Recording(made / "sub_2_trial000")
    assert recording.names == ["LA1", "LA2", "LA3", "LB1"]  # LB2 is corrupted, LA4 not of the lite
    assert recording.sfreq == 2048 and recording.signal.shape == (SECONDS * 2048, 4)
    with h5py.File(tree[0] / "sub_2_trial000.h5") as file:
        assert np.array_equal(recording.signal[:, 2], file["data/electrode_2"][:])
        assert np.array_equal(recording.signal[:, 3], file["data/electrode_4"][:])
    assert np.allclose(recording.xyz[1], [0.01, -0.02, 0.005])
    assert recording.channels["region"].tolist() == ["a", "a", "b", "c"]
    words = recording.events[recording.events["kind"] == "word"]
    assert len(words) == N_WORDS and set(words["word"]) == {"NA"}
    options = {"root": tree[0], "package": tree[1], "out_dir": tmp_path}
    prepare(btb, **options, recordings=["sub_3_trial001"], electrodes="all")
    recording = Recording(tmp_path / "sub_3_trial001")
    assert recording.names == ["LA1", "LA2", "LA3", "LA4", "LB1", "LB2"] and recording.good.all()
    with pytest.raises(InputError, match="was made with electrodes=all"):
        prepare(btb, **options)


def test_labels_and_splits_follow_the_rules(tree, made):
    table = pd.read_csv(made / "sub_2_trial000/neuroprobe.csv")
    assert list(table["task"].unique()) == btb.TASKS and len(btb.TASKS) == 15
    stem = tree[1] / "braintreebank_features_time_alignment" / "subject2_trial0"
    words = pd.read_csv(f"{stem}_words_df.csv")
    features = pd.read_csv(tree[0] / "transcripts/venom/features.csv")
    loud = table[table["task"] == "volume"].reset_index(drop=True)
    rows = words.set_index("est_idx").index.get_indexer(np.round(loud["onset"] * 2048))
    below = np.array([np.mean(features["rms"] < x) for x in features["rms"]])
    assert (loud["label"] == np.tile([1, 0], len(loud) // 2)).all()
    assert (below[rows[::2]] > 0.75).all() and (below[rows[1::2]] < 0.25).all()
    for k, (train, held_out) in enumerate(KFold(2).split(loud)):  # its first half validates
        half = len(held_out) // 2
        parts = loud[f"within_{k}"]
        assert set(parts[train]) == {"train"} and set(parts[held_out[:half]]) == {"val"}
        assert set(parts[held_out[half:]]) == {"test"}
    speech = table[table["task"] == "speech"]
    drawn = np.sort(np.random.RandomState(42).choice(N_WORDS, 40, replace=False))
    heard = speech["onset"][speech["label"] == 1]
    assert len(speech) == 80 and np.allclose(heard, words["est_idx"][drawn] / 2048)
    assert speech["onset"][speech["label"] == 0].min() >= 140
    assert table["label"][table["task"] == "onset"].sum() == N_WORDS // 6
    first = words["est_idx"][features["is_onset"] == 1] / 2048
    assert not table["onset"][table["task"] == "word_gap"].isin(first).any()


# ---- beside the package's own code


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """(root, neuroprobe's modules), with films whose features are made up: they are not in it."""
    if importlib.util.find_spec("neuroprobe") is None:
        pytest.skip("the package neuroprobe is not installed")
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOT_DIR_BRAINTREEBANK", str(root))
        patch.setenv("HDF5_USE_FILE_LOCKING", "")
        import neuroprobe.train_test_splits as splits
    folder = btb.find_package("")
    films = btb.read_settings(folder)["BRAINTREEBANK_SUBJECT_TRIAL_MOVIE_NAME_MAPPING"]
    rng = np.random.default_rng(0)
    for film in sorted(set(films.values())):
        features = make_features(rng, 12_000, {})
        features = features.mask(rng.random(features.shape) < 0.01)  # missing here and there
        for column in ("idx_in_sentence", "face_num", "bin_head"):
            features[column] = features[column].fillna(0)
        (root / "transcripts" / film).mkdir(parents=True)
        features.to_csv(root / "transcripts" / film / "features.csv")
    return root, folder, splits


def stand_in(person):
    """A subject of the package without its recordings: only windows are asked for."""
    return SimpleNamespace(
        subject_id=person,
        subject_identifier=f"btbank{person}",
        electrode_labels=["LA1"],
        get_electrode_coordinates=lambda: np.zeros((1, 3)),
        load_neural_data=lambda *args, **kwargs: None,
    )


def items_of(dataset, step=1):
    """(samples at which the windows begin, labels) of every step-th item of the package's."""
    items = [dataset[i] for i in range(0, len(dataset), step)]
    return [item["data"][0] for item in items], [item["label"] for item in items]


def windows_of(table, step=1):
    """The same of our table."""
    table = table[::step]
    samples = np.round(table["onset"] * btb.SFREQ).astype(int).tolist()
    return samples, table["label"].tolist()


def indices_of(subset):
    """Items of the whole dataset that a part, or a part of a part, holds."""
    if not hasattr(subset, "indices"):
        return np.arange(len(subset))
    return indices_of(subset.dataset)[np.asarray(subset.indices)]


def all_recordings():
    if importlib.util.find_spec("neuroprobe") is None:
        return [(1, 1)]
    return btb.read_settings(btb.find_package(""))["NEUROPROBE_LITE_SUBJECT_TRIALS"]


@pytest.mark.slow
@pytest.mark.parametrize("person, trial", all_recordings())
def test_labels_and_splits_equal_the_packages(package, person, trial):
    root, folder, splits = package
    settings = btb.read_settings(folder)
    films = settings["BRAINTREEBANK_SUBJECT_TRIAL_MOVIE_NAME_MAPPING"]
    windows = {}
    for p, t in settings["NEUROPROBE_LITE_SUBJECT_TRIALS"]:
        if p == person or (p, t) == (2, 4):
            tables = btb.read_word_tables(root, folder, films[f"btbank{p}_{t}"], p, t)
            table = btb.make_windows(*tables, settings)
            windows[p, t] = dict(list(table.groupby("task")))
    (other,) = [pair for pair in windows if pair[0] == person and pair[1] != trial]
    subject = stand_in(person)
    subjects = {person: subject, 2: stand_in(2)}
    for task in btb.TASKS:
        ours = windows[person, trial][task]
        within = splits.generate_splits_within_session(subject, trial, task, output_indices=True)
        assert items_of(within[0]["train_dataset"].dataset) == windows_of(ours)
        folds = [(f"within_{k}", fold, None) for k, fold in enumerate(within)]
        session = splits.generate_splits_cross_session(subject, trial, task, output_indices=True)
        folds.append(("across", session[0], other))
        if person != 2:
            across = splits.generate_splits_cross_subject(
                subjects, person, trial, task, output_indices=True
            )
            folds.append(("across", across[0], (2, 4)))
        for column, fold, train in folds:
            for part in ("val", "test", "train"):
                package_part = fold[f"{part}_dataset"]
                if part == "train" and train:  # all items of another recording
                    expected = windows[train][task]
                    assert len(package_part) == len(expected)
                    assert items_of(package_part, 10) == windows_of(expected, 10), (task, train)
                else:
                    expected = np.flatnonzero(ours[column] == part)
                    assert np.array_equal(indices_of(package_part), expected), (task, column, part)


def odd_tables(root, folder):
    """{what: copy of the tree in which it has the wrong type}, text for numbers, say."""
    copies = {}
    for what in ("rms", "is_onset", "labels"):
        copies[what] = shutil.copytree(
            root, folder / what, ignore=shutil.ignore_patterns("*.h5"), dirs_exist_ok=True
        )
    for what in ("rms", "is_onset"):
        path = copies[what] / "transcripts/venom/features.csv"
        table = pd.read_csv(path, index_col=0).astype({what: object})
        table.loc[3, what] = "loud"
        table.to_csv(path)
    (copies["labels"] / "electrode_labels/sub_2/electrode_labels.json").write_text("[1, 2]")
    return copies


def test_bad_input_is_a_sentence(tree, tmp_path):
    root, package = tree
    with pytest.raises(InputError, match="sub_1_trial001"):
        btb.Config(recordings=["1_1"]).check()
    torn = tmp_path / "torn"
    torn.mkdir()
    for path in root.iterdir():
        (torn / path.name).symlink_to(path)
    (torn / "sub_2_trial000.h5").unlink()
    content = (root / "sub_2_trial000.h5").read_bytes()
    (torn / "sub_2_trial000.h5").write_bytes(content[:100_000])
    copies = {}
    for content in ("SEED = 42\n", "SEED ="):
        copies[content] = tmp_path / f"package {len(copies)}"
        shutil.copytree(package, copies[content])
        (copies[content] / "config.py").write_text(content)
    odd = odd_tables(root, tmp_path)
    for options, sentence in (
        ({"root": odd["rms"], "recordings": ["btbank2_0"]}, "_2_trial000: a table .*float: 'loud'"),
        ({"root": odd["is_onset"], "recordings": ["btbank2_0"]}, "task onset have the same label"),
        ({"root": odd["labels"], "recordings": ["btbank2_0"]}, "does not hold what neuroprobe"),
        ({"package": tmp_path / "none"}, "braintreebank_features_time_alignment"),
        ({"recordings": ["btbank9_9"]}, "no btbank9_9.*btbank2_0"),
        ({"root": tmp_path}, "features.csv is missing"),
        ({"root": ""}, "give root="),
        ({"root": torn, "recordings": ["btbank2_0"]}, "no whole recording"),
        ({"package": copies["SEED = 42\n"]}, "has no BRAINTREEBANK"),
        ({"package": copies["SEED ="]}, "no Python"),
    ):
        options = {"root": root, "package": package, "out_dir": tmp_path / "out"} | options
        with pytest.raises(InputError, match=sentence):
            prepare(btb, **options)
