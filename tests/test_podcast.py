"""data/podcast and data/synthetic_podcast: what is in the files is what comes out, the planted truth is where it is said to be, and bad input is a sentence."""
import hashlib, json, os, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import mne
import numpy as np
import pandas as pd
import pytest

from data.podcast import prepare as podcast
from data.recording import Recording, complete, read_set
from data.synthetic_podcast import prepare as synthetic
from helpers import refused, run, start

FIF = "derivatives/ecogprep/sub-0{n}/ieeg/sub-0{n}_task-podcast_desc-highgamma_ieeg.fif"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small set of the synthetic podcast; its BIDS-like tree is raw/ in it."""
    folder = tmp_path_factory.mktemp("podcast") / "set"
    run("data/synthetic_podcast/prepare", f"out_dir={folder}", "minutes=3", "vocabulary=20", "electrodes=22", "broadband=True")
    return folder


@pytest.fixture
def tree(made, tmp_path):
    """A copy of the tree that a test may break: links to the files, as git-annex has them."""
    root = tmp_path / "ds005574"
    for path in (p for p in (made / "raw").rglob("*") if p.is_file()):
        link = root / path.relative_to(made / "raw")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return root


def prepare(root, out, **options):
    podcast.main(podcast.Config(root=str(root), out_dir=str(out), **options))
    return read_set(out)


def replace(root, name, content):
    (root / name).unlink(missing_ok=True)
    (root / name).write_bytes(content) if isinstance(content, bytes) else (root / name).write_text(content)


def read_words(folder, name="words.csv"):
    return pd.read_csv(folder / name, keep_default_na=False, na_values={c: [""] for c in ("start", "end")})


def word_vectors(folder):
    """(words, dims): mean of the features over each word's tokens."""
    meta = read_set(folder)
    file = meta["features"]["gpt2-xl"]["layer-24"]
    features = np.fromfile(folder / file, meta["arrays"][file]["dtype"]).reshape(meta["arrays"][file]["shape"]).astype(np.float32)
    return pd.DataFrame(features).groupby(read_words(folder, "tokens.csv")["word_idx"].to_numpy()).mean().to_numpy()


# ---- what is written is what was in the files

def test_a_subject_is_its_fif_file(made):
    for n in (1, 2):
        raw = mne.io.read_raw_fif(made / "raw" / FIF.format(n=n), verbose="error")
        read = Recording(made / f"sub-0{n}")
        table = pd.read_csv(made / f"raw/sub-0{n}/ieeg/sub-0{n}_task-podcast_channels.tsv", sep="\t")
        bad = table["name"][table["status"] == "bad"].tolist()
        assert len(bad) == 1 and bad == read.meta["bad_electrodes"] and read.names == [name for name in raw.ch_names if name not in bad]
        np.testing.assert_array_equal(read.signal, raw.get_data(read.names).T.astype("f4"))
        assert read.first_sample == raw.first_samp == (1178 if n == 1 else 0) and read.unit == "V" and read.synthetic
        assert 1e-6 < read.signal.std() < 1e-5 and read.meta["nyu_id"] == str(900 + n)
        assert set(read.channels["type"]) == {"ecog", "seeg"} if n == 1 else {"ecog"}
        assert {"low_cutoff", "status_description"} <= set(read.channels)
        assert np.isnan(read.xyz[-1]).all() and 0.02 < np.nanmax(np.abs(read.xyz)) < 0.1  # metres out of millimetres
    assert len(Recording(made / "sub-01").names) > len(Recording(made / "sub-02").names)


def test_words_keep_what_is_odd_and_events_have_every_onset(made):
    meta, words = read_set(made), read_words(made)
    given = pd.read_csv(made / "raw/stimuli/podcast_transcript.csv", keep_default_na=False, na_values={"start": [""], "end": [""]})
    assert words["word"].tolist() == given["word"].tolist() and words["word_idx"].tolist() == list(range(len(given)))
    np.testing.assert_array_equal(words["start"], given["start"])
    odd = meta["transcript"]
    assert odd["without_onset"] == 3 == words["start"].isna().sum() and odd["same_onset_as_another"] == 4 and odd["before_the_word_before"] == 4
    assert all(word == word.lower().strip(".,?!") for word in words["norm_word"]) and {"don't", "it's"} & set(words["norm_word"])
    assert words["word"].str.contains(r"[.,?!]$").any() and words["word"].str.contains("^[A-Z]").any()
    ends = words["word"].str.contains(r"[.?!]$").to_numpy()
    np.testing.assert_array_equal(np.diff(words["sentence"]), ends[:-1])
    assert set(words["content"]) == {"content", "function"}
    np.testing.assert_array_equal(words["content"] == "function", words["pos"] == "function")  # the closed classes, found without the tag
    for name in meta["recordings"]:
        read = Recording(made / name)
        heard = words[np.isfinite(words["start"])]
        assert read.events["word_idx"].tolist() == heard["word_idx"].tolist() and read.events["norm_word"].tolist() == heard["norm_word"].tolist()
        rows = read.rows(read.events["onset"])
        outside = (rows < 0) | (rows >= len(read.signal))
        assert outside.sum() == read.meta["events_outside"] > 0  # kept, and counted
        assert read.meta["dropped"]["words_without_onset"] == 3


def test_tokens_are_rows_of_the_features(made):
    meta, words, tokens = read_set(made), read_words(made), read_words(made, "tokens.csv")
    assert meta["arrays"]["gpt2-xl_layer-24.f16"]["shape"] == [len(tokens), synthetic.DIMS]
    with h5py.File(made / "raw/stimuli/gpt2-xl/features.hdf5") as file:
        given = file["layer-24"][:]
    np.testing.assert_allclose(np.fromfile(made / "gpt2-xl_layer-24.f16", "f2").reshape(given.shape), given, rtol=1e-3, atol=1e-3)
    assert len(tokens) > len(words) and tokens.groupby("word_idx")["token"].sum().str.removeprefix("Ġ").tolist() == words["word"].tolist()
    assert tokens["true_prob"].between(0, 1).all() and tokens["top_pred"].notna().all()


def test_loudness_is_the_root_mean_square(made, tmp_path):
    from scipy.io import wavfile
    rng = np.random.default_rng(0)
    audio = rng.integers(-3000, 3000, (44_100 * 2 + 300, 2)).astype(np.int16)
    wavfile.write(tmp_path / "a.wav", 44_100, audio)
    for rate in (100, 64):  # 441 samples each, and 689 or 690
        edges = [round(k * 44_100 / rate) for k in range(2 * rate + 1)]
        naive = [np.sqrt(np.mean((audio[a:b] / 32767) ** 2)) for a, b in zip(edges, edges[1:])]
        np.testing.assert_allclose(podcast.loudness(tmp_path / "a.wav", rate), naive, rtol=1e-5)
    entry = read_set(made)["audio"]
    assert (made / "audio.f32").stat().st_size == 4 * entry["samples"] == 4 * 180 * entry["sfreq"]
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="no whole WAV"):
        podcast.loudness(tmp_path / "a.wav", 100)


# ---- the planted truth

def test_a_response_is_a_boxcar_around_its_lag():
    rng = np.random.default_rng(0)
    onset, amplitude = rng.uniform(-0.5, 4.5, 30), rng.normal(size=(30, 3))
    naive = np.zeros((2048, 3))
    for t, a in zip(onset, amplitude):
        for row in range(2048):
            after = (row - round(t * 512)) / 512
            naive[row] += a * (0.25 <= after < 0.3496)  # 300 ms ± 50 ms
    np.testing.assert_allclose(synthetic.responses(onset, amplitude, 2048, 300.0), naive, atol=1e-5)


def encoding(read, vectors, words, lag):
    """Correlation (C,) of each electrode's 0.1 s mean at `lag` s with its ridge prediction from the words' vectors, on the half that was not fitted."""
    rows = read.rows(words["start"].fillna(-9) + lag)
    ok = (rows >= 26) & (rows + 26 < len(read.signal))
    sums = np.cumsum((read.signal - read.signal.mean(0)) / read.signal.std(0), 0, dtype="f8")
    y, x = (sums[rows[ok] + 26] - sums[rows[ok] - 26]) / 52, (vectors[ok] - vectors[ok].mean(0)) / vectors[ok].std(0)
    half = len(x) // 2
    fit = np.linalg.solve(x[:half].T @ x[:half] + 100 * np.eye(x.shape[1]), x[:half].T @ y[:half])
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip((x[half:] @ fit).T, y[half:].T)])


def test_words_are_in_the_named_electrodes_at_the_named_lag_and_nowhere_else(made):
    planted, words, vectors = read_set(made)["planted"], read_words(made), word_vectors(made)
    assert planted["lag_ms"] == 300
    for name, truth in planted["subjects"].items():
        read = Recording(made / name)
        carries = np.isin(read.names, truth["electrodes"])
        assert 2 < carries.sum() < len(carries) - 6 and not set(truth["electrodes"]) & set(truth["volume_electrodes"])
        at = encoding(read, vectors, words, 0.3)
        assert at[carries].min() > 0.15 and at[carries].mean() > 0.5 and np.abs(at[~carries]).max() < 0.25
        assert max(np.abs(encoding(read, vectors, words, lag)).max() for lag in (-0.5, 0.0, 0.8)) < 0.3


def test_loudness_is_in_the_named_electrodes_a_tenth_of_a_second_later(made):
    audio, meta = np.fromfile(made / "audio.f32", "f4"), read_set(made)
    for name, truth in meta["planted"]["subjects"].items():
        read = Recording(made / name)
        times = (np.arange(len(read.signal)) + read.first_sample) / read.sfreq - 0.005
        heard = {lag: np.interp(times - lag, np.arange(len(audio)) / 100, audio) for lag in (0.1, 0.3)}
        at, later = (np.array([np.corrcoef(heard[lag], x)[0, 1] for x in read.signal.T]) for lag in heard)
        carries = np.isin(read.names, truth["volume_electrodes"])
        assert at[carries].min() > 0.15 and np.abs(at[~carries]).max() < 0.15 and np.abs(later[carries]).max() < 0.3 < at.max()


def test_without_gain_the_same_recording_without_words(tmp_path):
    """gain=0 changes nothing but the responses: the rest of the noise is the same, number for number."""
    make = lambda gain: synthetic.make_subject(1, *given, synthetic.Config(minutes=1, electrodes=16, gain=gain))
    config = synthetic.Config(minutes=1, electrodes=16)
    table = synthetic.make_transcript(config)
    given = table, synthetic.make_vectors(table, config), synthetic.make_audio(table, config)[1]
    (names, _, _, null, nothing), (_, _, _, signal, truth) = make(0.0), make(2.0)
    differs = np.abs(signal - null).max(0) > 1e-4
    assert nothing["word"] == [] and [name for name, d in zip(names, differs) if d] == truth["word"]


def test_neighbours_share_sources(made):
    read = Recording(made / "sub-01")
    near = [np.corrcoef(read.signal[:, i], read.signal[:, i + 1])[0, 1] for i in range(3)]
    far = np.corrcoef(read.signal[:, 1], read.signal[:, read.names.index("DA2")])[0, 1]
    assert min(near) > 0.4 and abs(far) < 0.2


def test_the_broadband_recording_carries_the_envelope(made, tmp_path):
    meta = prepare(made / "raw", tmp_path / "b", subjects=[2], signal="broadband", features=[], audio_sfreq=0)
    assert "audio" not in meta and not meta["features"]
    broad, envelope = Recording(tmp_path / "b/sub-02"), Recording(made / "sub-02")
    band = np.abs(mne.filter.filter_data(broad.signal[:, :2].T.astype("f8"), 512, 70, 200, verbose="error"))
    bins = lambda x: x[:, :len(envelope.signal) // 102 * 102].reshape(2, -1, 102).mean(-1)  # 0.2 s
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(bins(band), bins(envelope.signal[:, :2].T))) > 0.25


def test_seeds_differ_and_repeat(tmp_path):
    table = lambda seed: synthetic.make_transcript(synthetic.Config(minutes=1, seed=seed))
    pd.testing.assert_frame_equal(table(3), table(3))
    assert table(3)["word"].tolist() != table(4)["word"].tolist()


# ---- choosing

def test_electrodes_by_expression_and_by_table(tree, tmp_path, capsys):
    prepare(tree, tmp_path / "a", subjects=[1], electrodes="LG[AB]*", features=[], audio_sfreq=0)
    names = Recording(tmp_path / "a/sub-01").names
    assert names and all(name.startswith("LG") for name in names) and Recording(tmp_path / "a/sub-01").meta["dropped"]["not_selected"] == 4
    (tmp_path / "sig.csv").write_text("subject,elec,matfile\n902,LF2,x\nsub-01,DA2,x\n1,LGA3,x\n901,ZZ9,x\n")
    meta = prepare(tree, tmp_path / "b", electrodes=str(tmp_path / "sig.csv"), features=[], audio_sfreq=0)
    assert meta["recordings"] == ["sub-01", "sub-02"]
    assert Recording(tmp_path / "b/sub-01").names == ["LGA3", "DA2"] and Recording(tmp_path / "b/sub-02").names == ["LF2"]
    assert "ZZ9" in capsys.readouterr().out and Recording(tmp_path / "b/sub-01").meta["dropped"]["not_in_file"] == ["ZZ9"]
    (tmp_path / "one.csv").write_text("subject,elec\n2,LF2\n")
    assert prepare(tree, tmp_path / "c", electrodes=str(tmp_path / "one.csv"), features=[], audio_sfreq=0)["recordings"] == ["sub-02"]


def test_bad_electrodes_can_stay(tree, tmp_path):
    prepare(tree, tmp_path / "a", subjects=[1], bads="mark", features=[], audio_sfreq=0)
    read = Recording(tmp_path / "a/sub-01")
    assert (~read.good).sum() == 1 and read.channels["status_description"][~read.good].tolist() == ["noisy psd"]


def test_other_features_positions_in_metres_and_parts_of_speech(tree, tmp_path):
    words = len(pd.read_csv(tree / "stimuli/podcast_transcript.csv", keep_default_na=False))
    (tree / "stimuli/en_core_web_lg").mkdir()
    vectors = np.random.default_rng(0).normal(size=(words, 7)).astype("f4") * 1e5  # more than half precision holds
    with h5py.File(tree / "stimuli/en_core_web_lg/features.hdf5", "w") as file:
        file["vectors"] = vectors
    pd.DataFrame({"word_idx": range(words)}).to_csv(tree / "stimuli/en_core_web_lg/transcript.tsv", sep="\t")
    table = pd.read_csv(tree / (name := "sub-02/ieeg/sub-02_space-MNI152NLin2009aSym_electrodes.tsv"), sep="\t")
    table[["x", "y", "z"]] /= 1000
    replace(tree, name, table.to_csv(sep="\t", index=False, na_rep="n/a"))
    (tree / "sub-02/ieeg/sub-02_space-MNI152NLin2009aSym_coordsystem.json").unlink()
    meta = prepare(tree, tmp_path / "a", subjects=[2], features=["gpt2-xl", "en_core_web_lg"], layers=[0, 24], audio_sfreq=0)
    assert set(meta["features"]["gpt2-xl"]) == {"layer-0", "layer-24"} and meta["features"]["en_core_web_lg"] == {"vectors": "en_core_web_lg_vectors.f32"}
    np.testing.assert_array_equal(np.fromfile(tmp_path / "a/en_core_web_lg_vectors.f32", "f4").reshape(-1, 7), vectors)
    assert 0.02 < np.nanmax(np.abs(Recording(tmp_path / "a/sub-02").xyz)) < 0.1
    assert set(read_words(tmp_path / "a")["pos"]) == {""}


def test_subjects_can_be_added_and_nothing_is_made_twice(tree, tmp_path, capsys, monkeypatch):
    prepare(tree, tmp_path / "a", subjects=[2])
    before = (tmp_path / "a/sub-02/meta.yaml").stat().st_mtime_ns
    monkeypatch.setenv("PODCAST_ROOT", str(tree.parent))  # the folder that holds ds005574/
    podcast.main(podcast.Config(out_dir=str(tmp_path / "a")))
    assert read_set(tmp_path / "a")["recordings"] == ["sub-01", "sub-02"] and (tmp_path / "a/sub-02/meta.yaml").stat().st_mtime_ns == before
    podcast.main(podcast.Config(out_dir=str(tmp_path / "a"), subjects=[1]))
    assert "already" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match="was made with bads=drop"):
        prepare(tree, tmp_path / "a", bads="mark")
    replace(tree, "stimuli/podcast_transcript.csv", (tree / "stimuli/podcast_transcript.csv").read_text().replace("the", "thy", 1))
    (tmp_path / "b").mkdir()
    prepare(tree, tmp_path / "b", subjects=[1])
    (tmp_path / "a/sub-01/meta.yaml").unlink()  # a damaged set is made again, whole
    assert read_words(tmp_path / "a")["word"].tolist() != read_words(tmp_path / "b")["word"].tolist()
    assert prepare(tree, tmp_path / "a", subjects=[2])["recordings"] == ["sub-02"] and complete(tmp_path / "a")


def test_the_synthetic_set_is_made_once(made):
    out, _ = run("data/synthetic_podcast/prepare", f"out_dir={made}", "minutes=3", "vocabulary=20", "electrodes=22", "broadband=True")
    assert "already" in out
    refused("data/synthetic_podcast/prepare", f"out_dir={made}", says=["made with minutes=3.0", "overwrite=True"])
    refused("data/synthetic_podcast/prepare", "vocabulary=5", says=["vocabulary=5", "10 to"])


def test_two_at_once_make_it_once(tmp_path):
    both = [start("data/synthetic_podcast/prepare", f"out_dir={tmp_path}", "minutes=0.5", "electrodes=8", "subjects=1") for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and sum("already" in out for out in said) == 1 and complete(tmp_path)


# ---- bad input

def test_a_subject_without_the_file(tree, tmp_path):
    (tree / FIF.format(n=2)).unlink()
    refused("data/podcast/prepare", f"root={tree}", f"out_dir={tmp_path / 'a'}", "subjects=2", says=["sub-02_task-podcast_desc-highgamma", "it has sub-01"])
    with pytest.raises(ValueError, match="no sub-07, only sub-01, sub-02"):
        prepare(tree, tmp_path / "a", subjects=[7])
    (tree / FIF.format(n=2)).symlink_to("nowhere")
    with pytest.raises((OSError, ValueError), match="git-annex link without content"):
        prepare(tree, tmp_path / "a", subjects=[2])
    assert prepare(tree, tmp_path / "a")["recordings"] == ["sub-01"]  # nobody named: those who have it
    with pytest.raises((OSError, ValueError), match="nobody of sub-01, sub-02 has a file for signal=raw"):
        prepare(tree, tmp_path / "b", signal="raw")
    with pytest.raises((OSError, ValueError), match="holds no copy of ds005574"):
        prepare(tmp_path / "nothing", tmp_path / "b")


def test_no_electrode_left(tree, tmp_path):
    refused("data/podcast/prepare", f"root={tree}", f"out_dir={tmp_path / 'a'}", "subjects=1", "electrodes=RG",
            says=["electrodes=RG leaves nothing of sub-01", "LGA (", "DA (4)"])
    (tmp_path / "sig.csv").write_text("subject,elec\n1,QQ1\n")
    with pytest.raises(ValueError, match="leaves nothing of sub-01"):
        prepare(tree, tmp_path / "a", subjects=[1], electrodes=str(tmp_path / "sig.csv"))
    bad = pd.read_csv(tree / "sub-01/ieeg/sub-01_task-podcast_channels.tsv", sep="\t").set_index("status")["name"]["bad"]
    with pytest.raises(ValueError, match="all of them bad .bads=mark"):
        prepare(tree, tmp_path / "a", subjects=[1], electrodes=f"{bad}$")
    with pytest.raises((OSError, ValueError), match="columns subject and elec"):
        prepare(tree, tmp_path / "a", subjects=[1], electrodes=str(tmp_path / "none.csv"))
    (tmp_path / "sig.csv").write_text("subject,channel\n1,QQ1\n")
    with pytest.raises(ValueError, match="no column 'elec', only subject, channel"):
        prepare(tree, tmp_path / "a", subjects=[1], electrodes=str(tmp_path / "sig.csv"))
    (tmp_path / "sig.csv").write_text("subject,elec\n661,LGA1\n")
    with pytest.raises(ValueError, match="nobody is in both"):
        prepare(tree, tmp_path / "a", electrodes=str(tmp_path / "sig.csv"))
    with pytest.raises(ValueError, match="no regular expression"):
        podcast.Config(electrodes="LG[").check()


@pytest.mark.parametrize("where", [0, 300, 0.3, 0.999, "buffer"])
def test_a_torn_fif(tree, tmp_path, where):
    whole = (tree / FIF.format(n=1)).read_bytes()
    cut = {"buffer": len(whole) - 16 - 20 - 20, 0: 0, 300: 300}.get(where) if not isinstance(where, float) else int(where * len(whole))
    replace(tree, FIF.format(n=1), whole[:cut])
    with pytest.raises(ValueError, match="desc-highgamma_ieeg.fif is not a whole FIF file"):
        prepare(tree, tmp_path / "a", subjects=[1], features=[], audio_sfreq=0)
    assert not (tmp_path / "a/meta.yaml").exists()


@pytest.mark.parametrize("name,content,words", [
    ("stimuli/podcast_transcript.csv", "word,onset\na,1\n", "no column 'start', only word, onset"),
    ("stimuli/podcast_transcript.csv", "word,start,end\na,soon,2\n", "'start' holds no numbers"),
    ("stimuli/podcast_transcript.csv", "word,start,end\na,,\nb,n/a,nan\n", "no word has an onset"),
    ("stimuli/podcast_transcript.csv", "word,start,end\na,1,2\n", "different snapshots"),
    ("stimuli/gpt2-xl/transcript.tsv", "\tindex\tword\n0\t0\ta\n", "no column 'word_idx'"),
    ("stimuli/gpt2-xl/transcript.tsv", "\tword_idx\n0\t0\n", "shape .* has 1 tokens"),
    ("stimuli/gpt2-xl/features.hdf5", b"\x89HDF\r\n\x1a\n torn", "no whole HDF5"),
    ("stimuli/podcast.wav", b"RIFF", "no whole WAV"),
    ("participants.tsv", "who\nme\n", "no column 'participant_id'"),
    ("sub-01/ieeg/sub-01_task-podcast_channels.tsv", "name\ttype\nLGA1\tECOG\n", "no column 'status'"),
    ("sub-01/ieeg/sub-01_space-MNI152NLin2009aSym_electrodes.tsv", "name\tx\ty\nLGA1\t1\t2\n", "no column 'z'"),
    ("sub-01/ieeg/sub-01_space-MNI152NLin2009aSym_coordsystem.json", '{"iEEGCoordinateUnits": "m"}', "in nobody's head"),
    ("sub-01/ieeg/sub-01_space-MNI152NLin2009aSym_coordsystem.json", "{", "not JSON"),
    ("dataset_description.json", "{", "not JSON"),
])
def test_damaged_tables(tree, tmp_path, name, content, words):
    replace(tree, name, content)
    with pytest.raises(ValueError, match=words):
        prepare(tree, tmp_path / "a", subjects=[1])
    assert not complete(tmp_path / "a")


def test_missing_layers_features_and_parts_of_speech(tree, tmp_path):
    with pytest.raises(ValueError, match="no layer 7, only 0, 24"):
        prepare(tree, tmp_path / "a", layers=[7])
    with pytest.raises((OSError, ValueError), match="leave 'glove' out of features="):
        prepare(tree, tmp_path / "a", features=["glove"])
    (tmp_path / "pos.csv").write_text("word,start,pos\nelsewhere,3.1,noun\n")
    with pytest.raises(ValueError, match="of another recording"):
        prepare(tree, tmp_path / "a", pos=str(tmp_path / "pos.csv"))


def test_samples_that_are_no_numbers(tree, tmp_path):
    raw = mne.io.read_raw_fif(tree / FIF.format(n=1), preload=True, verbose="error")
    raw._data[3, 1000] = np.nan
    (tree / FIF.format(n=1)).unlink()
    raw.save(tree / FIF.format(n=1), verbose="error")
    with pytest.raises(ValueError, match=f"{raw.ch_names[3]} has samples that are no numbers between 0 and 30 s"):
        prepare(tree, tmp_path / "a", subjects=[1], features=[], audio_sfreq=0)


# ---- the raw EDF

def write_edf(path, names, data, sfreq):
    """EDF by hand, one-second records of 16-bit numbers in uV: data (C, T) in V."""
    field = lambda text, n: str(text).ljust(n).encode()
    per = lambda values, n: b"".join(field(v, n) for v in values)
    c, records = len(names), data.shape[1] // sfreq
    header = field(0, 8) + field("X", 80) + field("X", 80) + b"01.01.0100.00.00" + field(256 * (c + 1), 8) + field("", 44) + field(records, 8) + field(1, 8)
    header += field(c, 4) + per(names, 16) + per([""] * c, 80) + per(["uV"] * c, 8) + per([-3276.8] * c, 8) + per([3276.7] * c, 8)
    header += per([-32768] * c, 8) + per([32767] * c, 8) + per([""] * c, 80) + per([sfreq] * c, 8) + per([""] * c, 32)
    samples = np.round(data[:, :records * sfreq] * 1e7).astype("<i2").reshape(c, records, sfreq)
    path.write_bytes(header + samples.transpose(1, 0, 2).tobytes())


def test_the_recording_as_it_was_made(tree, tmp_path):
    data = np.random.default_rng(0).normal(size=(4, 512 * 20)) * 1e-4
    path = tree / "sub-02/ieeg/sub-02_task-podcast_ieeg.edf"
    write_edf(path, ["LGB1", "LF3", "LF2", "EKG1"], data, 512)
    prepare(tree, tmp_path / "a", signal="raw", features=[], audio_sfreq=0)
    read = Recording(tmp_path / "a/sub-02")
    names = [name for name in ["LGB1", "LF3", "LF2"] if name not in Recording(tmp_path / "a/sub-02").meta["bad_electrodes"]]
    assert read.names == names and len(read.signal) == 512 * 20 and read.meta["kind"] == "raw"
    np.testing.assert_allclose(read.signal[:, 0], data[0], atol=1e-7)
    path.write_bytes(path.read_bytes()[:-512 * 8 * 3])
    with pytest.raises(ValueError, match="not a whole EDF file"):
        prepare(tree, tmp_path / "b", signal="raw", features=[], audio_sfreq=0)


# ---- fetching

@pytest.fixture
def bucket(tree, monkeypatch):
    """The tree behind http, as S3 serves it; `server.cut` stops every answer after so many bytes, `server.sent` counts them."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            path = tree / self.path.lstrip("/")
            if not path.is_file():
                self.send_response(403)
                self.end_headers()
                return
            content, span = path.read_bytes(), self.headers.get("Range", "")
            if span and server.ranges:
                a, b = span.removeprefix("bytes=").split("-")
                part = content[int(a):int(b) + 1 if b else None]
            else:
                part = content
            self.send_response(206 if span and server.ranges else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
            self.end_headers()
            if body:
                part = part[:server.cut]
                server.sent[path.name] = server.sent.get(path.name, 0) + len(part)
                server.asked.append((path.name, span))
                self.wfile.write(part)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.cut, server.sent, server.asked, server.ranges = None, {}, [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetched(server, out, **options):
    podcast.main(podcast.Config(url=f"http://127.0.0.1:{server.server_port}", out_dir=str(out), **options))
    return read_set(out)


def test_what_is_fetched_is_what_a_local_copy_gives(tree, bucket, made, tmp_path, capsys):
    wide = np.random.default_rng(0).normal(size=(len(read_words(made, "tokens.csv")), 1000)).astype("f4")
    (tree / "stimuli/gpt2-xl/features.hdf5").unlink()
    with h5py.File(tree / "stimuli/gpt2-xl/features.hdf5", "w") as file:
        for n in range(16):
            file[f"layer-{n + 16}"] = wide + n
    meta = fetched(bucket, tmp_path / "a", subjects=[2])
    assert meta["recordings"] == ["sub-02"] and meta["synthetic"] and "files, 0.0" in capsys.readouterr().out
    assert not any("sub-01" in name for name in bucket.sent)                                           # nobody else's
    assert bucket.sent["features.hdf5"] < (tree / "stimuli/gpt2-xl/features.hdf5").stat().st_size / 4   # one layer of sixteen
    local = prepare(tree, tmp_path / "b", subjects=[2])
    assert local == meta
    for path in (p for p in (tmp_path / "b").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "a" / path.relative_to(tmp_path / "b")).read_bytes(), path.name
    asked = len(bucket.asked)
    fetched(bucket, tmp_path / "a", subjects=[2])
    fetched(bucket, tmp_path / "a", subjects=[2], overwrite=True)
    assert len(bucket.asked) == asked  # all of it is here
    with pytest.raises((OSError, ValueError), match="has no derivatives/ecogprep/sub-09"):
        fetched(bucket, tmp_path / "a", subjects=[9])
    assert read_set(tmp_path / "a")["recordings"] == ["sub-02"]


def test_a_broken_fetch_goes_on_where_it_stopped(tree, bucket, tmp_path):
    url, path = f"http://127.0.0.1:{bucket.server_port}/{FIF.format(n=2)}", tmp_path / "x.fif"
    content = (tree / FIF.format(n=2)).read_bytes()
    size, md5 = podcast.head(url)
    assert (size, md5) == (len(content), hashlib.md5(content).hexdigest()) and podcast.head(url + "x") is None
    bucket.cut = size // 3 + 1
    with pytest.raises(OSError, match="run the same command again"):
        podcast.fetch(url, path, size, md5, tries=1, pause=0)
    assert not path.exists() and (tmp_path / "x.fif.part").stat().st_size == bucket.cut
    podcast.fetch(url, path, size, md5, tries=3, pause=0)
    assert path.read_bytes() == content and bucket.sent[Path(url).name] == size  # not a byte twice
    path.unlink()
    (tmp_path / "x.fif.part").write_bytes(b"\0" * size)  # of another file
    with pytest.raises(OSError, match="came damaged"):
        podcast.fetch(url, path, size, md5, pause=0)
    assert not path.exists() and not (tmp_path / "x.fif.part").exists()
    bucket.cut, bucket.ranges = None, False  # a server that knows no ranges: from the start, and no layer alone
    (tmp_path / "x.fif.part").write_bytes(content[:1000])
    podcast.fetch(url, path, size, md5, pause=0)
    assert path.read_bytes() == content
    with pytest.raises(OSError, match="gpt2-xl/features.hdf5 cannot be read in parts"):
        fetched(bucket, tmp_path / "a", subjects=[2])


def test_nothing_is_fetched_unasked(tmp_path, monkeypatch):
    monkeypatch.delenv("PODCAST_ROOT", raising=False)
    with pytest.raises(ValueError, match="subjects=3 say"):
        podcast.main(podcast.Config(out_dir=str(tmp_path)))
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(OSError, match="cannot be reached .* give root= a local copy"):
        podcast.main(podcast.Config(out_dir=str(tmp_path), subjects=[3], url="http://127.0.0.1:9"))


def test_a_full_disk_is_told_before(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(podcast.shutil, "disk_usage", lambda path: os.statvfs_result([0] * 10) and type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="choose fewer subjects="):
        fetched(bucket, tmp_path / "a", subjects=[1])
    assert not bucket.sent


def test_the_description_tells_that_it_is_made_up(made):
    described = json.loads((made / "raw/dataset_description.json").read_text())
    assert described["Synthetic"] and read_set(made)["synthetic"] and "synthetic" in read_set(made)["source"]
