"""data/podcast and data/synthetic_podcast: what is in the files comes out, the planted truth is
where it is said to be, and bad input is a sentence."""

import h5py
import mne
import numpy as np
import pandas as pd
import pytest
from scipy.io import wavfile
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import PolynomialFeatures

from data import InputError
from data.podcast import prepare as podcast
from data.recording import Recording, complete, read_set
from data.synthetic_podcast import prepare as synthetic
from tests.helpers import real
from tests.test_fetch import serve

FIF = "derivatives/ecogprep/sub-0{n}/ieeg/sub-0{n}_task-podcast_desc-highgamma_ieeg.fif"
CHANNELS = "sub-0{n}/ieeg/sub-0{n}_task-podcast_channels.tsv"
ELECTRODES = "sub-0{n}/ieeg/sub-0{n}_space-MNI152NLin2009aSym_electrodes.tsv"
SMALL = {"minutes": 3.0, "vocabulary": 20, "electrodes": 22}
BARE = {"features": [], "audio_sfreq": 0}  # neither features nor audio


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small set of the synthetic podcast; its tree of ds005574 is raw/ in it."""
    folder = tmp_path_factory.mktemp("podcast") / "set"
    synthetic.main(synthetic.Config(out_dir=str(folder), **SMALL))
    return folder


@pytest.fixture
def tree(made, tmp_path):
    """A copy of the tree that a test may break: links to the files, as git-annex has them."""
    root = tmp_path / "ds005574"
    link_tree(made / "raw", root)
    return root


def link_tree(source, root):
    for path in source.rglob("*"):
        if path.is_file():
            link = root / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


def prepare(root, out, **options):
    podcast.main(podcast.Config(root=str(root), out_dir=str(out), **options))
    return read_set(out)


def replace(root, name, content):
    """Write a file of the tree in place of the link."""
    (root / name).unlink(missing_ok=True)
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def read_words(folder, name="words.csv"):
    missing = {"start": [""], "end": [""]}
    return pd.read_csv(folder / name, keep_default_na=False, na_values=missing)


def read_tsv(path):
    return pd.read_csv(path, sep="\t")


# ---- what is written is what was in the files


def test_a_subject_is_its_fif_file(made):
    for n in (1, 2):
        raw = mne.io.read_raw_fif(made / "raw" / FIF.format(n=n), verbose="error")
        recording = Recording(made / f"sub-0{n}")
        table = read_tsv(made / "raw" / CHANNELS.format(n=n))
        bad = table["name"][table["status"] == "bad"].tolist()
        assert bad == recording.meta["bad_electrodes"] and len(bad) == 1
        assert recording.names == [name for name in raw.ch_names if name not in bad]
        expected = raw.get_data(recording.names).T.astype("f4")
        np.testing.assert_array_equal(recording.signal, expected)
        assert recording.first_sample == raw.first_samp == (1178 if n == 1 else 0)
        assert recording.unit == "V" and 1e-6 < recording.signal.std() < 1e-5
        assert recording.synthetic and recording.meta["nyu_id"] == str(900 + n)
        assert set(recording.channels["type"]) == {"ecog", "seeg"}
        assert {"low_cutoff", "status_description"} <= set(recording.channels)
        assert np.isnan(recording.xyz[-1]).all()
        assert 0.02 < np.nanmax(np.abs(recording.xyz)) < 0.1  # metres out of millimetres


def test_words_keep_what_is_odd_and_events_have_every_onset(made):
    meta, words = read_set(made), read_words(made)
    transcript = read_words(made, "raw/stimuli/podcast_transcript.csv")
    assert words["word"].tolist() == transcript["word"].tolist()
    assert words["word_idx"].tolist() == list(range(len(transcript)))
    np.testing.assert_array_equal(words["start"], transcript["start"])
    facts = meta["transcript"]
    assert facts["without_onset"] == 3 == words["start"].isna().sum()
    assert facts["sentences_by"] == "full stops"
    assert all(word == word.lower().strip(".,?!") for word in words["norm_word"])
    assert {"don't", "it's"} & set(words["norm_word"])
    ends = words["word"].str.contains(r"[.?!]$").to_numpy()
    np.testing.assert_array_equal(np.diff(words["sentence"]), ends[:-1])
    # the closed classes are found without the tag
    np.testing.assert_array_equal(words["content"] == "function", words["pos"] == "function")
    heard = words["word_idx"][np.isfinite(words["start"])].tolist()
    for name in meta["recordings"]:
        recording = Recording(made / name)
        assert recording.events["word_idx"].tolist() == heard
        rows = recording.rows(recording.events["onset"])
        outside = (rows < 0) | (rows >= len(recording.signal))
        assert outside.sum() == recording.meta["events_outside"] > 0  # kept, and counted
        assert recording.meta["dropped"]["words_without_onset"] == 3
    tokens = read_words(made, "tokens.csv")  # which are rows of the features
    with h5py.File(made / "raw/stimuli/gpt2-xl/features.hdf5") as file:
        layer = file["layer-24"][:]
    assert meta["arrays"]["gpt2-xl_layer-24.f16"]["shape"] == [len(tokens), synthetic.DIMS]
    features = np.fromfile(made / "gpt2-xl_layer-24.f16", "f2").reshape(layer.shape)
    np.testing.assert_allclose(features, layer, rtol=1e-3, atol=1e-3)
    joined = tokens.groupby("word_idx")["token"].sum().str.removeprefix("Ġ")
    assert joined.tolist() == words["word"].tolist()
    assert tokens["true_prob"].between(0, 1).all() and tokens["top_pred"].notna().all()


def test_loudness_is_the_root_mean_square(made, tmp_path):
    rng = np.random.default_rng(0)
    audio = rng.integers(-3000, 3000, (44_100 * 2 + 300, 2)).astype(np.int16)
    wavfile.write(tmp_path / "a.wav", 44_100, audio)
    for rate in (100, 64):  # 441 samples each, and 689 or 690
        edges = [round(k * 44_100 / rate) for k in range(2 * rate + 1)]
        squares = [np.mean((audio[a:b] / 32767) ** 2) for a, b in zip(edges, edges[1:])]
        loudness = podcast.loudness(tmp_path / "a.wav", rate)
        np.testing.assert_allclose(loudness, np.sqrt(squares), rtol=1e-5)
    entry = read_set(made)["audio"]
    assert (made / "audio.f32").stat().st_size == 4 * entry["samples"] == 4 * 180 * entry["sfreq"]


def test_other_features_and_positions_in_metres(tree, tmp_path):
    n_words = len(read_words(tree, "stimuli/podcast_transcript.csv"))
    vectors = np.random.default_rng(0).normal(size=(n_words, 7)).astype("f4") * 1e5
    (tree / "stimuli/glove").mkdir()
    with h5py.File(tree / "stimuli/glove/features.hdf5", "w") as file:
        file["vectors"] = vectors  # more than half precision holds
    table = pd.DataFrame({"word_idx": range(n_words)})
    table.to_csv(tree / "stimuli/glove/transcript.tsv", sep="\t")
    electrodes = read_tsv(tree / ELECTRODES.format(n=2))
    electrodes[["x", "y", "z"]] /= 1000
    text = electrodes.to_csv(sep="\t", index=False, na_rep="n/a")
    replace(tree, ELECTRODES.format(n=2), text)
    (tree / ELECTRODES.format(n=2).replace("electrodes.tsv", "coordsystem.json")).unlink()
    options = {"features": ["gpt2-xl", "glove"], "layers": [0, 24], "audio_sfreq": 0}
    meta = prepare(tree, tmp_path / "a", subjects=[2], **options)
    assert set(meta["features"]["gpt2-xl"]) == {"layer-0", "layer-24"}
    assert meta["features"]["glove"] == {"vectors": "glove_vectors.f32"}
    written = np.fromfile(tmp_path / "a/glove_vectors.f32", "f4").reshape(-1, 7)
    np.testing.assert_array_equal(written, vectors)
    assert 0.02 < np.nanmax(np.abs(Recording(tmp_path / "a/sub-02").xyz)) < 0.1
    assert set(read_words(tmp_path / "a")["pos"]) == {""}


def test_words_in_bad_segments_are_dropped(tree, tmp_path):
    path = tree / FIF.format(n=1)
    raw = mne.io.read_raw_fif(path, preload=True, verbose="error")
    raw.set_annotations(mne.Annotations([10.0, 50.0], [5.0, 5.0], ["BAD_noise", "a word"]))
    path.unlink()
    raw.save(path, verbose="error")
    prepare(tree, tmp_path / "a", subjects=[1], **BARE)
    recording = Recording(tmp_path / "a/sub-01")
    start = 10.0 + raw.first_time
    words = read_words(tmp_path / "a").dropna(subset=["start", "end"])
    in_bad = (words["start"] <= start + 5) & (words["end"] >= start)
    assert recording.meta["dropped"]["words_in_bad"] == in_bad.sum() > 5
    assert np.allclose(recording.meta["bad_spans"], [[start, start + 5]])
    assert not set(words["word_idx"][in_bad]) & set(recording.events["word_idx"])


# ---- sentences and parts of speech


def words_of(text, starts, ends=None):
    words = pd.DataFrame({"word": text.split(), "start": starts})
    words["end"] = words["start"] + 0.1 if ends is None else ends
    words["norm_word"] = words["word"].map(podcast.normalised)
    return words


def test_sentences_end_with_full_stops_or_pauses():
    text = "Mr. Fox said hi. And then a B. left!"
    numbers, rule = podcast.number_sentences(words_of(text, np.arange(9.0)), podcast.Config())
    assert numbers.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2] and rule == "full stops"
    # no full stops: 0.4 s after the latest end; words out of order, and one without onset or end
    starts = [0.0, 0.2, 1.0, np.nan, 0.75, 1.7, 1.8]
    ends = [0.1, 0.3, 1.5, np.nan, 0.82, np.nan, 1.9]
    words = words_of("a b d x c e f", starts, ends)
    numbers, rule = podcast.number_sentences(words, podcast.Config(pause=0.4))
    assert numbers.tolist() == [0, 0, 1, -1, 1, 1, 1] and rule == "pauses of 0.4 s"
    numbers, _ = podcast.number_sentences(words, podcast.Config(pause=0.15))
    assert numbers.tolist() == [0, 0, 2, -1, 1, 3, 3]


def test_sentences_of_a_table(tmp_path):
    path = tmp_path / "sentences.csv"
    path.write_text("sentence_onset,sentence_offset\n5.0,6.0\n1.0,3.0\n1.50000001,2.0\n")
    starts = [0.5, 1.0, 1.5, 1.8, 2.5, 4.0, 5.0, np.nan]
    words = words_of("before first second both first between third unknown", starts)
    numbers, rule = podcast.number_sentences(words, podcast.Config(sentences=str(path)))
    assert list(numbers) == [-1, 0, 1, 1, 0, -1, 2, -1] and rule.startswith("table ")
    path.write_text("sentence_onset,sentence_offset\n100,101\n")
    with pytest.raises(InputError, match="none of them holds a word"):
        podcast.number_sentences(words, podcast.Config(sentences=str(path)))


def test_a_word_of_several_tokens_has_the_tag_of_its_first(tmp_path):
    words = words_of("I don't know know", [0.0, 0.5, 0.5, np.nan])
    path = tmp_path / "tags.tsv"
    rows = "I\t0\tPRP\ndon't\t0.5\tVBP\ndon't\t0.5\tRB\nKnow,\t0.5\tVB\nknow\tn/a\tNN\n"
    path.write_text("word\tstart\tpos\n" + rows)
    assert podcast.parts_of_speech(words, path) == ["PRP", "VBP", "VB", "NN"]
    path.write_text("onset\tclass\n0.001\t4\n0.5\t1\n0.5\t3\n")  # by onset alone
    assert podcast.parts_of_speech(words, path) == ["other", "verb", "verb", ""]
    path.write_text("word\tstart\tpos\nelsewhere\t3.1\tNN\n")
    with pytest.raises(InputError, match="has no word of the transcript"):
        podcast.parts_of_speech(words, path)
    path.write_text("word\tstart\nI\t0\n")
    with pytest.raises(InputError, match="no column 'pos_class' or 'class' or 'pos', only word"):
        podcast.parts_of_speech(words, path)


# ---- the release itself


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The released tables of sub-03 and sub-08, with signals and features made up."""
    root = tmp_path_factory.mktemp("released") / "ds005574"
    link_tree(real("podcast_ds005574"), root)
    rng = np.random.default_rng(0)
    for n in (3, 8):
        table = read_tsv(root / CHANNELS.format(n=n))
        names = table["name"][(table["type"] == "ECOG") & (table["status"] == "good")].tolist()
        signal = rng.normal(1e-5, 1e-6, (len(names), 512 * 4))
        info = mne.create_info(names, 512, "ecog")
        (root / FIF.format(n=n)).parent.mkdir(parents=True)
        raw = mne.io.RawArray(signal, info, verbose="error")
        raw.save(root / FIF.format(n=n), verbose="error")
    transcript = pd.read_csv(root / "stimuli/spectral/transcript.tsv", sep="\t", dtype=str)
    transcript = transcript[["word", "start", "end"]]
    transcript.to_csv(root / "stimuli/podcast_transcript.csv", index=False)
    for name in ("gpt2-xl", "syntactic", "whisper-medium"):
        n_rows = len(read_tsv(root / f"stimuli/{name}/transcript.tsv"))
        with h5py.File(root / f"stimuli/{name}/features.hdf5", "w") as file:
            key = "layer-24" if name == "gpt2-xl" else "vectors"
            file[key] = rng.normal(size=(n_rows, 4)).astype("f4")
    return root


def test_the_released_tables_are_read_as_they_are(released, tmp_path):
    features = ["gpt2-xl", "syntactic", "whisper-medium"]
    tables = real("podcast_tables")
    options = {"sentences": str(tables / "all_sentences_podcast.csv")}
    options |= {"pos": str(tables / "df_word_onset_with_pos_class.csv")}
    meta = prepare(released, tmp_path, features=features, audio_sfreq=0, **options)
    assert meta["recordings"] == ["sub-03", "sub-08"] and not meta["synthetic"]
    assert meta["licence"] == "CC0" and meta["source"] == 'The "Podcast" ECoG dataset'
    n_arrays = {file: entry["shape"][0] for file, entry in meta["arrays"].items()}
    assert list(n_arrays.values()) == [5491, 5305, 5134]
    words, tokens = read_words(tmp_path), read_words(tmp_path, "tokens.csv")
    assert len(words) == 5136 and tokens["word_idx"].nunique() == 5136
    assert (tokens["rank"] == 0).mean() == pytest.approx(0.30941540702968495)  # performance.json
    facts = meta["transcript"]
    assert facts["without_onset"] == 0 and (words["start"].diff() < 0).sum() == 19
    # 366 sentences, each of which begins with a word; interjections are in none
    assert facts["sentences"] == 366 and (words["sentence"] == -1).sum() == 52
    sentences = pd.read_csv(tables / "all_sentences_podcast.csv")
    onsets = words[words["sentence"] >= 0].groupby("sentence")["start"].min().sort_index()
    np.testing.assert_allclose(onsets, sentences["sentence_onset"].sort_values(), atol=1e-6)
    assert words["sentence"].iloc[:7].tolist() == [-1] * 6 + [0]
    # 5,031 rows, in one of which "lot" has the onset of "a" before it
    counts = words["pos"].value_counts().to_dict()
    tagged = {"other": 2280, "noun": 1221, "verb": 953, "adjective": 290, "adverb": 286}
    assert counts == {**tagged, "": 5136 - 5030}
    for name, n_electrodes in (("sub-03", 235), ("sub-08", 72)):
        recording = Recording(tmp_path / name)
        assert len(recording.names) == n_electrodes and recording.meta["events_outside"] > 5000
        assert 0.08 < np.abs(recording.xyz).max() < 0.13
    # without the tables, sentences end with pauses and tags are the release's own
    words, facts = podcast.read_words(released / "stimuli/podcast_transcript.csv", podcast.Config())
    assert words["word"].str.endswith(".").sum() == 2
    assert facts["sentences"] == 416 and facts["sentences_by"] == "pauses of 0.4 s"
    tags = podcast.parts_of_speech(words, released / "stimuli/syntactic/transcript.tsv")
    assert tags[:8] == ["NNP", "CD", "NN", "IN", "DT", "NN", "RB", "EX"] and "" not in tags


# ---- the planted truth


def word_vectors(folder):
    """(words, dims): mean of the features over each word's tokens."""
    entry = read_set(folder)["arrays"]["gpt2-xl_layer-24.f16"]
    features = np.fromfile(folder / "gpt2-xl_layer-24.f16", entry["dtype"]).reshape(entry["shape"])
    word_idx = read_words(folder, "tokens.csv")["word_idx"].to_numpy()
    return pd.DataFrame(features.astype("f4")).groupby(word_idx).mean().to_numpy()


def correlations(x, y):
    """(C,) correlation of each column of x with that of y."""
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, y.T)])


def encoding(recording, vectors, words, lag):
    """(C,) correlation of each electrode's 0.1 s mean at `lag` s with its ridge prediction from
    the words' vectors, on the half that was not fitted."""
    rows = recording.rows(words["start"].fillna(-9) + lag)
    inside = (rows >= 26) & (rows + 26 < len(recording.signal))
    z = (recording.signal - recording.signal.mean(0)) / recording.signal.std(0)
    sums = np.cumsum(z, 0, dtype="f8")
    y = (sums[rows[inside] + 26] - sums[rows[inside] - 26]) / 52
    x = (vectors[inside] - vectors[inside].mean(0)) / vectors[inside].std(0)
    half = len(x) // 2
    ridge = Ridge(100, fit_intercept=False).fit(x[:half], y[:half])
    return correlations(ridge.predict(x[half:]), y[half:])


def test_words_are_in_the_named_electrodes_at_the_named_lag_and_nowhere_else(made):
    planted, words, vectors = read_set(made)["planted"], read_words(made), word_vectors(made)
    assert planted["lag_ms"] == 300
    for name, truth in planted["subjects"].items():
        recording = Recording(made / name)
        carries = np.isin(recording.names, truth["electrodes"])
        assert 2 < carries.sum() < len(carries) - 6
        assert not set(truth["electrodes"]) & set(truth["volume_electrodes"])
        at = encoding(recording, vectors, words, 0.3)
        assert at[carries].min() > 0.15 and at[carries].mean() > 0.5
        assert np.abs(at[~carries]).max() < 0.25
        for lag in (-0.5, 0.0, 0.8):
            assert np.abs(encoding(recording, vectors, words, lag)).max() < 0.3


def test_loudness_is_in_the_named_electrodes_a_tenth_of_a_second_later(made):
    audio, planted = np.fromfile(made / "audio.f32", "f4"), read_set(made)["planted"]
    for name, truth in planted["subjects"].items():
        recording = Recording(made / name)
        time = (np.arange(len(recording.signal)) + recording.first_sample) / recording.sfreq
        r = {}
        for lag in (0.1, 0.3):
            heard = np.interp(time - 0.005 - lag, np.arange(len(audio)) / 100, audio)
            heard = np.broadcast_to(heard[:, None], recording.signal.shape)
            r[lag] = correlations(heard, recording.signal)
        carries = np.isin(recording.names, truth["volume_electrodes"])
        assert r[0.1][carries].min() > 0.15 and np.abs(r[0.1][~carries]).max() < 0.15
        assert np.abs(r[0.3][carries]).max() < 0.3 < r[0.1].max()


def subject_of(config):
    """What make_subject gives of the first person."""
    table = synthetic.make_transcript(config)
    z, envelope = synthetic.make_vectors(table, config), synthetic.make_audio(table, config)[1]
    return synthetic.make_subject(1, table, z, envelope, config)


def test_the_same_data_as_ever_and_without_gain_the_same_but_for_words():
    """Results that others report on the default set must not move with a change of the code."""
    config = synthetic.Config(minutes=0.5, electrodes=16)
    channels, signal, truth = subject_of(config)
    words = synthetic.make_transcript(config)["word"]
    assert words[:6].tolist() == ["A", "the.", "Know.", "Time", "friend,", "the."]
    assert truth["word"] == ["LGA1", "LGA2", "LGA3", "LGA5", "LGA6", "LGB1"]
    expected = [[2.7502, 1.5374, -0.8898], [0.8284, 1.2368, -0.0587], [0.2493, 0.1164, 0.1448]]
    np.testing.assert_allclose(signal[2000::5000, [0, 5, 15]], expected, atol=1e-3)
    _, null, nothing = subject_of(synthetic.Config(minutes=0.5, electrodes=16, gain=0.0))
    differs = np.abs(signal - null).max(0) > 1e-4  # the noise is the same, number for number
    assert nothing["word"] == [] and channels["name"][differs].tolist() == truth["word"]


def hidden_r2(signal, model):
    """R² of hidden electrodes from every third one, 0.3 s around, on the last fifth."""
    x = signal[: len(signal) // 16 * 16].reshape(-1, 16, signal.shape[1]).mean(1)  # 32 Hz
    x = (x - x.mean(0)) / x.std(0)
    windows = np.lib.stride_tricks.sliding_window_view(x[:, ::3], 9, axis=0)
    inputs = windows.reshape(len(windows), -1)
    targets = np.delete(x[4:-4], np.s_[::3], axis=1)
    n = int(0.8 * len(inputs))
    return model.fit(inputs[:n], targets[:n]).score(inputs[n:], targets[n:])


def test_products_see_what_a_linear_estimate_misses():
    pairs = make_pipeline(PCA(10, whiten=True), PolynomialFeatures(2))
    products = make_pipeline(make_union("passthrough", pairs), Ridge(300))
    gains = []
    for nonlinear in (0.0, 0.5, 1.0):
        config = synthetic.Config(minutes=3, electrodes=16, nonlinear=nonlinear)
        _, signal, _ = subject_of(config)
        gains.append(hidden_r2(signal, products) - hidden_r2(signal, Ridge(300)))
    assert gains[0] < 0.01 and gains[2] > 0.05 and gains[0] < gains[1] < gains[2], gains


def test_the_broadband_recording(tree, tmp_path):
    highgamma = tree / FIF.format(n=2)
    highgamma.rename(str(highgamma).replace("_desc-highgamma", ""))
    meta = prepare(tree, tmp_path / "b", subjects=[2], signal="broadband", **BARE)
    assert "audio" not in meta and not meta["features"]
    assert Recording(tmp_path / "b/sub-02").meta["kind"] == "broadband"


def test_the_synthetic_set_is_made_once(made, capsys):
    before = (made / "meta.yaml").stat().st_mtime_ns
    synthetic.main(synthetic.Config(out_dir=str(made), **SMALL))
    assert "already" in capsys.readouterr().out
    assert (made / "meta.yaml").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="made with minutes=3.0.* overwrite=True"):
        synthetic.main(synthetic.Config(out_dir=str(made)))
    with pytest.raises(InputError, match="vocabulary=5: give 10 to"):
        synthetic.Config(vocabulary=5).check()


def test_subjects_can_be_added_and_nothing_is_made_twice(tree, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a"
    prepare(tree, out, subjects=[2])
    before = (out / "sub-02/meta.yaml").stat().st_mtime_ns
    monkeypatch.setenv("PODCAST_ROOT", str(tree.parent))  # the folder that holds ds005574/
    podcast.main(podcast.Config(out_dir=str(out)))
    assert read_set(out)["recordings"] == ["sub-01", "sub-02"]
    assert (out / "sub-02/meta.yaml").stat().st_mtime_ns == before
    podcast.main(podcast.Config(out_dir=str(out), subjects=[1]))
    assert "already" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(InputError, match="was made with pause=0.4"):
        prepare(tree, out, pause=0.3)
    prepare(tree, tmp_path / "b", subjects=[1])
    text = (tree / "stimuli/podcast_transcript.csv").read_text()
    replace(tree, "stimuli/podcast_transcript.csv", text.replace("the", "thy", 1))
    with pytest.raises(InputError, match="a different transcript"):
        prepare(tree, tmp_path / "b", subjects=[2])
    (out / "sub-01/meta.yaml").unlink()  # a damaged set is made again, whole
    assert prepare(tree, out, subjects=[2])["recordings"] == ["sub-02"] and complete(out)


# ---- bad input


def test_a_subject_without_the_file(tree, tmp_path):
    out = tmp_path / "a"
    first = tree / FIF.format(n=1)
    path = tree / FIF.format(n=2)
    for content, sentence in (
        (None, "no .*sub-02.* signal=highgamma exists for sub-01"),
        ("link", "git-annex link whose content is missing"),
        ("/annex/objects/MD5E-s1--0.fif\n", "pointer whose content is missing"),
    ):
        path.unlink(missing_ok=True)
        if content == "link":
            path.symlink_to("../.git/annex/objects/nowhere")
        elif content:
            path.write_text(content)
        with pytest.raises(InputError, match=sentence):
            prepare(tree, out, subjects=[2])
    path.unlink()
    assert prepare(tree, out)["recordings"] == ["sub-01"]  # nobody named: those who have it
    first.unlink()
    with pytest.raises(InputError, match="signal=highgamma exists for nobody"):
        prepare(tree, tmp_path / "b")


def test_signals_that_are_torn_or_in_microvolts(tree, made, tmp_path):
    path = tree / FIF.format(n=1)
    whole = path.read_bytes()
    for content in (b"", whole[: int(0.999 * len(whole))]):
        replace(tree, FIF.format(n=1), content)
        with pytest.raises(InputError, match="desc-highgamma_ieeg.fif is not a whole FIF file"):
            prepare(tree, tmp_path / "a", subjects=[1], **BARE)
    path.unlink()
    raw = mne.io.read_raw_fif(made / "raw" / FIF.format(n=1), preload=True, verbose="error")
    raw.apply_function(lambda x: 1e6 * x).save(path, verbose="error")
    with pytest.raises(InputError, match="V is too large for a brain: save it in V"):
        prepare(tree, tmp_path / "a", subjects=[1], **BARE)
    assert not (tmp_path / "a/meta.yaml").exists()


COORDSYSTEM = ELECTRODES.format(n=1).replace("electrodes.tsv", "coordsystem.json")
WORDS = "stimuli/podcast_transcript.csv"
IN_MS = "word,start,end\na,900,990\nb,1200,1300\n"


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        (WORDS, "word,onset\na,1\n", "no column 'start', only word"),
        (WORDS, "word,start,end\na,soon,2\n", "podcast_transcript.csv is not .*'soon'"),
        (WORDS, "word,start,end\na,,\nb,n/a,nan\n", "no word has an"),
        (WORDS, "word,start,end\na,1,2\n", "take both from the same snapshot"),
        (WORDS, IN_MS, "transcript.csv: a word every 300 s .column 'start'.: are they in ms"),
        (WORDS, "word,start,end\na,1,2\nb,2,1\n", "csv: 'b' in row 2 is from 2.0 to 1.0 s"),
        (WORDS, "word,start,end\na,inf,2\n", "'a' .* from inf to 2.0"),
        ("stimuli/gpt2-xl/transcript.tsv", "\tword_idx\n0\t0\n", "shape .* for 1 tokens"),
        ("stimuli/gpt2-xl/features.hdf5", b"\x89HDF\r\n\x1a\n torn", "not a whole HDF5"),
        ("stimuli/podcast.wav", b"RIFF", "not a whole WAV"),
        ("participants.tsv", "who\nme\n", "no column 'participant_id'"),
        (COORDSYSTEM, '{"iEEGCoordinateUnits": "m"}', "outside any head"),
        (COORDSYSTEM, "{", "not JSON"),
        (CHANNELS.format(n=1), "bad", "sub-01: all 22 electrodes are marked bad"),
    ],
)
def test_damaged_files(tree, tmp_path, name, content, sentence):
    if content == "bad":
        content = (tree / name).read_text().replace("\tgood\t", "\tbad\t")
    replace(tree, name, content)
    with pytest.raises(InputError, match=sentence):
        prepare(tree, tmp_path / "a", subjects=[1])
    assert not complete(tmp_path / "a")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"subjects": [2], "layers": [7]}, "no layer 7, only 0, 24"),
        ({"features": ["glove"]}, "leave 'glove' out of features="),
        ({"root": "/nothing"}, "holds no copy of ds005574"),
        ({"root": ""}, "such as subjects=3"),  # nothing is fetched unasked
    ],
)
def test_options_that_lead_nowhere(tree, tmp_path, monkeypatch, options, sentence):
    monkeypatch.delenv("PODCAST_ROOT", raising=False)
    with pytest.raises(InputError, match=sentence):
        prepare(**{"root": tree, "out": tmp_path / "a", **options})


def test_tables_in_latin_1_and_words_like_numbers(tree, tmp_path):
    text = (tree / CHANNELS.format(n=1)).read_text().replace("n/a", "größer als 5 µV")
    replace(tree, CHANNELS.format(n=1), text.encode("latin-1"))
    words = "word,start,end\nNA,0,n/a\nnull,1,n/a\n007,2,n/a\n"
    replace(tree, "stimuli/podcast_transcript.csv", words + "008,NaN,nan\n")
    prepare(tree, tmp_path / "a", subjects=[1], **BARE)
    recording = Recording(tmp_path / "a/sub-01")
    assert "größer als 5 µV" in set(recording.channels["status_description"])
    assert recording.events["word"].tolist() == ["NA", "null", "007"]
    assert read_words(tmp_path / "a")["word"].tolist() == ["NA", "null", "007", "008"]


def fetched(server, out, **options):
    podcast.main(podcast.Config(url=server.url, out_dir=str(out), **options))
    return read_set(out)


def test_what_is_fetched_is_what_a_local_copy_gives(tree, made, tmp_path, capsys):
    n_tokens = len(read_words(made, "tokens.csv"))
    wide = np.random.default_rng(0).normal(size=(n_tokens, 1000)).astype("f4")
    features = tree / "stimuli/gpt2-xl/features.hdf5"
    features.unlink()
    with h5py.File(features, "w") as file:
        for n in range(16):
            file[f"layer-{n + 16}"] = wide + n
    with serve(tree) as bucket:
        meta = fetched(bucket, tmp_path / "a", subjects=[2])
        assert meta["recordings"] == ["sub-02"] and "files, 0.0" in capsys.readouterr().out
        assert not any("sub-01" in name for name in bucket.sent)  # nobody else's
        assert bucket.sent["features.hdf5"] < features.stat().st_size / 4  # one layer of sixteen
        assert prepare(tree, tmp_path / "b", subjects=[2]) == meta
        for path in (tmp_path / "b").rglob("*.*"):
            twin = tmp_path / "a" / path.relative_to(tmp_path / "b")
            assert path.read_bytes() == twin.read_bytes(), path.name
        asked = bucket.asked
        fetched(bucket, tmp_path / "a", subjects=[2], overwrite=True)
        assert bucket.asked == asked  # all of it is here
        with pytest.raises(InputError, match="has no derivatives/ecogprep/sub-09"):
            fetched(bucket, tmp_path / "a", subjects=[9])
        assert read_set(tmp_path / "a")["recordings"] == ["sub-02"]
        bucket.ranges = False
        with pytest.raises(InputError, match="gpt2-xl/features.hdf5 cannot be read in parts"):
            fetched(bucket, tmp_path / "c", subjects=[2])
