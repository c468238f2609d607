"""foundation.py: what is hidden is not seen, baselines against oracles, recordings of any kind."""

import math
import shutil

import mne
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge

import foundation
from configurator import InputError, Run, configure
from data.recording import write_recording, write_set
from foundation import Config, Corpus, build, draw_mask
from model import load_checkpoint, load_encoder

TINY = [
    *["sfreq=32", "window=0.5", "patch=4", "width=16", "n_embd=8", "n_layer=2", "n_head=2"],
    *["degree=1", "decoder_width=16", "decoder_layers=1", "batch_size=4", "max_iters=6"],
    *["eval_interval=3", "save_interval=3", "log_interval=1", "warmup_iters=2", "eval_windows=5"],
    *["bootstraps=20", "alphas=[10,1000]", "device=cpu"],
]
KINDS = ("random", "tube", "span")


def corpus_of(folder, out, *options):
    config = configure(Config, [*TINY, f"dataset={folder}", f"out_dir={out}", *options])
    run = Run(config)
    return Corpus(run, config), run, config


def results_of(folder, out, *options):
    foundation.main(configure(Config, [*TINY, f"dataset={folder}", f"out_dir={out}", *options]))
    return pd.read_csv(out / "results.csv")


def make_set(folder, signal, channels, **meta):
    """A dataset of one recording at 64 Hz, prepared as data/recording.py has it."""
    meta = {"sfreq": 64, "unit": "V", "subject": "01", "source": "test", "synthetic": True, **meta}
    write_recording(folder / "01", signal, channels, pd.DataFrame({"onset": [1.0]}), **meta)
    write_set(folder, ["01"], synthetic=True)
    return folder


def on_a_grid(n):
    places = {"x": 0.01 * (np.arange(n) % 8), "y": 0.01 * (np.arange(n) // 8), "z": 0.05}
    return pd.DataFrame({"name": [f"E{i}" for i in range(n)], **places})


def awake(model):
    """The model with weights where it begins with zeros."""
    for name in ("readout", "latent_readout"):
        torch.nn.init.normal_(getattr(model, name))
    return model.eval()


# ---- masks and model


def test_masks_hide_what_they_should():
    rng = np.random.default_rng(0)
    random, tube, span = (draw_mask(kind, (3, 40, 8), 0.75, rng) for kind in KINDS)
    assert (random.sum((1, 2)) == 80).all() and (random[0] != random[1]).any()
    assert (tube == tube[:, :, :1]).all() and (tube[:, :, 0].sum(1) == 10).all()
    assert (span == span[:, :1]).all() and (span[:, 0].sum(1) == 2).all()
    hidden_edges = np.abs(np.diff(np.pad(~span[:, 0], ((0, 0), (1, 1))).astype(int))).sum(1)
    assert (hidden_edges == 2).all()  # in one piece
    for kind in KINDS:  # something is always visible, and something hidden
        for ratio in (0.01, 0.99):
            mask = draw_mask(kind, (5, 2, 2), ratio, rng)
            assert mask.any((1, 2)).all() and not mask.all((1, 2)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_is_not_seen(podcast, tmp_path, kind):
    corpus, run, config = corpus_of(podcast, tmp_path)
    model = awake(build(config, corpus))
    source = corpus.sources[0]
    batch = corpus.masked(source, [40, 80], kind, np.random.default_rng(0))
    hidden = ~batch.visible.repeat_interleave(config.patch, 2)
    other = batch._replace(x=torch.where(hidden, 7.0, batch.x))
    with torch.no_grad():
        (losses, guess), (other_losses, other_guess) = model(*batch), model(*other)
    assert torch.equal(guess, other_guess) and guess.std() > 0.1
    assert (losses != other_losses).all()  # they know the truth
    expected = (guess.flatten(2) - batch.x)[hidden].square().mean()
    assert torch.isclose(losses[0], expected, rtol=1e-5)


def test_a_missing_electrode_is_a_masked_one(podcast, tmp_path):
    corpus, _, config = corpus_of(podcast, tmp_path)
    model = awake(build(config, corpus))
    batch = corpus.masked(corpus.sources[0], [40, 80], "tube", np.random.default_rng(0))
    visible = torch.ones_like(batch.visible)
    visible[:, 2] = False
    gone = batch.xyz.clone()
    gone[2] = math.nan
    with torch.no_grad():
        masked = model.latents(batch.x, visible, batch.xyz, batch.subject)
        absent = model.encoder(batch.x, gone, batch.subject)
    assert torch.allclose(masked, absent, atol=1e-5)


# ---- baselines


def test_ridge_is_ridge(podcast, tmp_path):
    (source,) = corpus_of(podcast, tmp_path, "subjects=2")[0].sources
    x = source.centred(source.cut(source.starts["train"])).astype(float)
    visible = draw_mask("random", (3, *x.shape[1:3]), 0.75, np.random.default_rng(0))
    guess = foundation.ridge(x[:3], visible, foundation.gram_matrix(source), 30.0)
    for window, mask, guessed in zip(x[:3], visible, guess):
        seen = np.repeat(mask.ravel(), x.shape[3])
        flat = x.reshape(len(x), -1)
        oracle = Ridge(alpha=30.0, fit_intercept=False).fit(flat[:, seen], flat[:, ~seen])
        expected = oracle.predict(window.ravel()[None, seen])[0]
        assert np.allclose(guessed.ravel()[~seen], expected, atol=1e-6)


def test_interpolation_and_neighbours_by_hand():
    x = np.array([[1.0, 9, 9, 4], [2, 9, 6, 9], [8, 8, 8, 8]]).reshape(1, 3, 4, 1)
    visible = np.array([[True, False, False, True], [True, False, True, False], [False] * 4])[None]
    filled = foundation.interpolate(x, visible, 1)[0, :, :, 0]
    assert np.allclose(filled, [[1, 2, 3, 4], [2, 4, 6, 6], [0, 0, 0, 0]])
    xyz = np.array([[0.0, 0, 0], [1, 0, 0], [1.5, 0, 0]])
    near = [foundation.neighbours(x, visible, xyz, k)[0, 2, :, 0] for k in (1, 2)]
    assert np.allclose(near, [[2, 0, 6, 4], [1.5, 0, 6, 4]])


# ---- recordings


def test_clean_training_time_alone_sets_the_scale(podcast, tmp_path):
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(64 * 100, 4)).astype("f4")
    spoilt = signal.copy()
    spoilt[64 * 20 : 64 * 25] = 1e3  # an artefact that is marked, before the
    spoilt[64 * 70 :] *= 50  # time of validation and test
    bad = [[10.0 + 20, 10.0 + 25]]  # on the clock of a recording that begins at 10 s
    sources = []
    for name, x in (("a", signal), ("b", spoilt)):
        folder = make_set(tmp_path / name, x, on_a_grid(4), first_sample=640, bad_spans=bad)
        sources.append(corpus_of(folder, tmp_path / f"out_{name}")[0].sources[0])
    for key in ("centre", "scale", "mean"):
        assert np.array_equal(getattr(sources[0], key), getattr(sources[1], key))
    source = sources[1]
    train, val, test = (source.starts[split] for split in ("train", "val", "test"))
    assert not ((train > 20 * 32 - 16) & (train < 25 * 32)).any()
    assert {20 * 32 - 17, 25 * 32} <= set(train)  # next to it
    assert train.max() + 16 <= 70 * 32 and val.min() >= 70 * 32 + 16
    assert (np.diff(val) == 16).all() and test.min() >= val.max() + 2 * 16
    assert np.abs(source.cut(test)).max() <= 8


def test_no_window_holds_the_seam_of_two_epochs(tmp_path):
    signal = np.repeat(np.arange(100.0), 70)[:, None] + np.arange(3)  # 70 samples at 64 Hz each
    signal += np.random.default_rng(0).normal(size=(7000, 3)) / 1e3
    folder = make_set(tmp_path / "set", signal, on_a_grid(3), epoch_samples=70)
    (source,) = corpus_of(folder, tmp_path / "out")[0].sources
    for starts in source.starts.values():
        windows = source.signal[starts[:, None] + np.arange(16), 0, 0]
        assert len(starts) > 5 and (np.ptp(windows, axis=1) < 0.1).all()


def test_channels_that_say_nothing_are_left_out_and_short_recordings_too(tmp_path, capsys):
    signal = np.random.default_rng(0).normal(size=(3000, 20))
    signal[:, 4], signal[5, 6] = 0.3, np.nan  # flat, and with a NaN: nobody marked them
    channels = on_a_grid(20)
    channels.loc[9, "x"] = np.nan
    channels.loc[[11], "status"] = "bad"
    channels["status"] = channels["status"].fillna("good")
    long = make_set(tmp_path / "long", signal, channels)
    short = make_set(tmp_path / "short", signal[:100], channels)
    corpus, _, _ = corpus_of(f"{long},{short}", tmp_path / "out")
    assert [len(source.names) for source in corpus.sources] == [16]
    assert corpus.sources[0].left_out == ["E4", "E6"]
    assert "shorten window=0.5" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"01 has 1\.6 s"):
        corpus_of(short, tmp_path / "no")


def test_who_and_what_is_asked_for_must_be_there(podcast, tmp_path):
    for asked, words in (
        ("subjects=1,7", "subjects=7: nobody"),
        ("channels=LG[A", "not a regular"),
    ):
        with pytest.raises(InputError, match=words):
            corpus_of(podcast, tmp_path, asked)


def test_files_that_mne_reads(tmp_path, capsys):
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, channels in (("07", ["Fz.", "Cz..", "Pz", "Oz", "X1"]), ("08", ["A", "B"])):
        info = mne.create_info(channels, 100.0, "eeg")
        raw = mne.io.RawArray(rng.normal(size=(len(channels), 6000)) * 1e-5, info, verbose="error")
        raw.set_annotations(mne.Annotations([20.0], [5.0], ["BAD_jump"]))
        raw.save(folder / f"sub-{name}_raw.fif", verbose="error")
    with pytest.raises(InputError, match="give montage="):
        corpus_of(folder, tmp_path / "a")
    options = ["montage=standard_1020", "masks=span,tube", "bands=[[4,8],[10,20]]"]
    corpus, run, config = corpus_of(folder, tmp_path / "b", *options)
    (source,) = corpus.sources
    assert source.names == ["Fz", "Cz", "Pz", "Oz"] and source.person == "07"
    assert "sub-08_raw.fif" in capsys.readouterr().out  # named: it has no places
    assert not ((source.starts["train"] > 20 * 32 - 16) & (source.starts["train"] < 25 * 32)).any()
    assert build(config, corpus).encoder.config.patch == 8  # two bands side by side
    made = tmp_path / "b/recordings/sub-07_raw.fif"
    before = (made / "signal.f32").stat().st_mtime_ns
    assert foundation.find_recordings(run, folder) == [made]
    assert (made / "signal.f32").stat().st_mtime_ns == before  # made once


# ---- a run


def test_a_run_and_its_checkpoint(podcast, tmp_path):
    noise = np.random.default_rng(0).normal(size=(3000, 12))
    eeg = make_set(tmp_path / "eeg", noise, on_a_grid(12))
    table = results_of(f"{podcast},{eeg}", tmp_path / "run")
    assert set(table.method) == {"encoder", "ridge", "neighbours", "interpolation"}
    assert set(table["mask"]) == {"random", "tube"} and (table.n == 15).all()
    assert table.data.str.contains("synthetic").all() and (table.low <= table.high).all()
    r2 = table[table.metric == "r2"].set_index(["mask", "method"]).score
    pairs = table[table.metric == "r2 - ridge"].set_index("mask").score
    for kind in ("random", "tube"):
        assert pairs[kind] == pytest.approx(r2[kind, "encoder"] - r2[kind, "ridge"])
    for name in ("loss.png", "reconstruction.png"):
        assert (tmp_path / "run" / name).exists()
    encoder, recipe = load_encoder(tmp_path / "run")
    assert [len(known["channels"]) for known in recipe["recordings"]] == [9, 5, 12]
    assert sorted(recipe["subjects"]) == ["01", "sub-01", "sub-02"]
    x, xyz = torch.randn(2, 63, 16), torch.randn(63, 3) * 0.05  # another montage
    with torch.no_grad():
        assert encoder(x, xyz, torch.tensor([0, -1])).shape == (2, 4, 8)


def test_a_run_goes_on_only_as_it_was_and_one_block_says_nothing(tmp_path, monkeypatch):
    for name in ("plot_curves", "plot_reconstruction"):
        monkeypatch.setattr(foundation, name, lambda *args: None)
    noise = np.random.default_rng(0).normal(size=(3000, 4))
    given = make_set(tmp_path / "eeg", noise, on_a_grid(4)), tmp_path / "run", "block=1000"
    table = results_of(*given)
    assert (table.low == -math.inf).all() and (table.high == math.inf).all()
    with pytest.raises(InputError, match="has decoder_width=16, not 32"):
        results_of(*given, "init_from=resume", "decoder_width=32")
    shutil.rmtree(tmp_path / "eeg")
    make_set(tmp_path / "eeg", 2 * noise, on_a_grid(4))
    with pytest.raises(InputError, match="other recordings"):
        results_of(*given, "init_from=resume")


def test_minutes_settle_the_number_of_steps(podcast, tmp_path, monkeypatch):
    monkeypatch.setattr(foundation, "report", lambda *args: None)
    options = [option for option in TINY if not option.startswith("max_iters")]
    options += [f"dataset={podcast}", f"out_dir={tmp_path}", "eval_interval=100"]
    foundation.main(configure(Config, [*options, "minutes=0.02"]))
    n_steps = load_checkpoint(tmp_path / "ckpt.pt")["config"]["max_iters"]
    assert 1 < n_steps < 10**5
    assert f"max_iters: {n_steps}\n" in (tmp_path / "config.yaml").read_text()
    for minutes, expected in ((0.02, n_steps), (0.03, foundation.UNSETTLED)):
        config = configure(Config, [*options, "init_from=resume", f"minutes={minutes}"])
        run = Run(config)
        corpus = Corpus(run, config)
        foundation.Training(run, config, corpus, build(config, corpus))
        assert config.max_iters == expected
        run.close()


def test_it_sees_what_ridge_cannot(tmp_path):
    """One electrode carries a number, the other one its size."""
    rng = np.random.default_rng(0)
    number = np.repeat(rng.normal(size=(64 * 200 // 16, 1)), 16, axis=0)  # new every 0.25 s
    signal = np.concatenate([number, np.abs(number)], axis=1)
    signal += 0.1 * rng.normal(size=signal.shape)
    folder = make_set(tmp_path / "set", signal, on_a_grid(2))
    options = ["masks=tube", "max_iters=120", "eval_interval=120", "eval_windows=0", "width=32"]
    options += ["decoder_width=32", "batch_size=16", "warmup_iters=20", "learning_rate=0.01"]
    table = results_of(folder, tmp_path / "run", *options)
    assert table[table.metric == "r2 - ridge"].low.item() > 0.1


def test_what_is_not_like_the_training_time_cannot_make_it_diverge(tmp_path):
    """Units, drift and heavy tails of real EEG."""
    signal = np.random.default_rng(0).standard_t(1.5, size=(64 * 100, 6)).cumsum(0)
    signal[64 * 70 :] *= 1e3
    folder = make_set(tmp_path / "set", signal, on_a_grid(6))
    options = ["max_iters=12", "learning_rate=0.1", "eval_interval=12"]
    table = results_of(folder, tmp_path / "run", *options)
    assert np.isfinite(table[table.metric == "r2"].score).all()
