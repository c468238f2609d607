"""foundation.py: what is hidden stays hidden, order and absence of electrodes, the baselines against oracles, recordings of any kind, the checkpoint."""
import math

import mne
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge

import foundation
from configurator import Run, configure
from data.recording import Recording, encoder_input, places, resampled, robust_scale, write_recording, write_set
from foundation import Config, Corpus, build, draw_mask
from helpers import make_podcast
from model import EncoderConfig, NeuralEncoder, load_encoder, save_checkpoint

TINY = ["window=0.5", "sfreq=32", "width=16", "n_embd=8", "n_layer=2", "n_head=2", "degree=1", "decoder_width=16", "decoder_layers=1", "batch_size=4",
        "max_iters=6", "eval_interval=3", "save_interval=3", "log_interval=1", "warmup_iters=2", "eval_windows=5", "bootstraps=20", "alphas=[10,1000]",
        "device=cpu"]


@pytest.fixture(scope="module")
def podcast(tmp_path_factory):
    return make_podcast(tmp_path_factory.mktemp("foundation") / "podcast")


def corpus_of(folder, out, *options):
    config = configure(Config, [*TINY, f"dataset={folder}", f"out_dir={out}", *options])
    run = Run(config)
    return Corpus(run, config), run, config


def encoder(n_embd=8, **options):
    torch.manual_seed(0)
    model = NeuralEncoder(EncoderConfig(**{**dict(kind="transformer", tokens="electrode", n_embd=n_embd, width=16, n_layer=2, n_head=2, patch=4, degree=2,
                                                  subjects=2, reach=True), **options})).eval()
    with torch.no_grad():
        for p in model.blocks.parameters():  # far from the near-nothing that blocks begin with
            p.mul_(10 if p.dim() == 2 else 1)
    return model


def montage(n, B=3, T=16):
    torch.manual_seed(1)
    return torch.randn(B, n, T), torch.randn(n, 3) * 0.03, torch.tensor([0, 1, -1])


def test_latents_do_not_know_the_order_of_electrodes():
    model, (x, xyz, subject) = encoder(), montage(9)
    order = torch.randperm(9)
    with torch.no_grad():
        assert torch.allclose(model(x, xyz, subject), model(x[:, order], xyz[order], subject), atol=1e-5)
        assert not torch.allclose(model(x, xyz, subject), model(x[:, order], xyz, subject), atol=1e-3)


@pytest.mark.parametrize("reach", [True, False])
def test_one_token_alone(reach):
    torch.manual_seed(0)
    encoder = NeuralEncoder(EncoderConfig(kind="transformer", tokens="electrode", reach=reach, n_embd=16, width=16, n_head=2, patch=10))
    x, subject = torch.randn(2, 1, 10), torch.zeros(2, dtype=torch.long)
    xyz = torch.tensor([[[math.nan] * 3], [[0.01] * 3]])  # the first recording has no electrode of known place
    n = encoder(x, xyz, subject)
    n[1].sum().backward()
    assert torch.isfinite(n).all() and all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_reach_looks_at_what_is_near():
    model, (x, _, subject) = encoder(), montage(2)
    far = torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.0, 0.0]])
    with torch.no_grad():
        def felt(places):  # by the first electrode, when the second says something else
            tokens = [model.tokenize(torch.cat([x[:, :1], other], 1), places, subject) for other in (x[:, 1:], -3 * x[:, 1:])]
            h = [model.think(*t, model.spots(places, 4)) for t in tokens]
            return (h[0] - h[1])[:, :4].abs().max()
        assert felt(far) < 1e-6 < 1e-4 < felt(far / 20)


def test_a_missing_electrode_is_a_masked_one(podcast, tmp_path):
    corpus, _, config = corpus_of(podcast, tmp_path)
    model = build(config, corpus).eval()
    x, xyz, subject, visible, _ = corpus.batch(0, 0)
    visible[:] = True
    visible[:, 2] = False
    gone = xyz.clone()
    gone[:, 2] = math.nan
    with torch.no_grad():
        h, index, meant, _, present = model.encode(x, xyz, subject, visible & xyz.isfinite().all(-1)[..., None])
        P = visible.size(2)
        whole = torch.zeros(len(x), visible[0].numel(), h.size(2)).scatter(1, index[..., None].expand_as(h), h * meant[..., None])
        masked = model.encoder.read(whole, visible.flatten(1) & present, P)
        absent = model.encoder(torch.where(gone.isfinite().all(-1)[..., None], x, math.nan), gone, subject)
        keep = [c for c in range(x.size(1)) if c != 2]
        shorter = model.encoder(x[:, keep], xyz[:, keep], subject)
    assert torch.allclose(masked, absent, atol=1e-5) and torch.allclose(absent, shorter, atol=1e-5)


def test_what_is_hidden_is_not_seen(podcast, tmp_path):
    corpus, _, config = corpus_of(podcast, tmp_path)
    model = build(config, corpus).eval()
    torch.nn.init.normal_(model.head.weight)
    for kind in ("random", "tube", "span"):
        rng = np.random.default_rng(0)
        windows = [corpus.sources[r].cut([40], corpus.W, config)[0] for r in (0, 1)]
        batch = corpus.together(windows, [0, 1], kind, rng)
        hidden = np.repeat(~batch[3].numpy(), config.patch, axis=2)
        changed = [np.where(hidden[i, :len(w)], 7.0, w).astype(np.float32) for i, w in enumerate(windows)]
        other = corpus.together(changed, [0, 1], kind, np.random.default_rng(0))
        with torch.no_grad():
            a, b = model(*batch), model(*other)
            assert torch.equal(a[2], b[2]) and torch.allclose(a[1], b[1], atol=1e-5)
            (h, _, meant, *_), (g, *_) = model.encode(*batch[:4]), model.encode(*other[:4])
            assert torch.equal(h[meant], g[meant])
        assert (a[0] != b[0]).all()  # the losses, which know the truth, differ


def test_a_montage_is_not_changed_by_a_larger_one_beside_it(podcast, tmp_path):
    corpus, _, config = corpus_of(podcast, tmp_path)
    model = build(config, corpus).eval()
    torch.nn.init.normal_(model.head.weight)
    windows = [corpus.sources[r].cut([40], corpus.W, config)[0] for r in (0, 1)]
    assert len(windows[0]) == 9 and len(windows[1]) == 5  # of 10 and 6 one is bad
    rng = np.random.default_rng(3)
    together = corpus.together(windows, [0, 1], "tube", rng)
    alone = tuple(t[1:2, :5] if t.dim() > 1 else t[1:] for t in together)
    with torch.no_grad():
        (_, made, _, asked), (_, single, _, meant) = model(*together), model(*alone)
    assert torch.allclose(made[1][asked[1]], single[0][meant[0]], atol=1e-5)


def test_masks_hide_what_they_should():
    rng, channels = np.random.default_rng(0), np.array([40, 13])
    random, tube, span = (draw_mask(kind, channels, 40, 8, 0.75, rng) for kind in ("random", "tube", "span"))
    assert not any(mask[1, 13:].any() for mask in (random, tube, span))  # channels that are not there
    assert random[0].sum() == 80 and random[1].sum() == 26
    assert (tube == tube[:, :, :1]).all() and tube[:, :, 0].sum(1).tolist() == [10, 3]
    assert (span[0] == span[0, :1]).all() and span[0, 0].sum() == 2 and np.abs(np.diff(span[0, 0].astype(int))).sum() <= 2
    assert draw_mask("tube", np.array([1]), 1, 4, 0.75, rng).sum() == 0  # nothing else to see


def test_training_time_alone_sets_the_scale(podcast, tmp_path):
    corpus, _, config = corpus_of(podcast, tmp_path / "a")
    source = corpus.sources[0]
    (a, b), (c, d), (e, f) = (source.spans[k] for k in ("train", "val", "test"))
    assert a < b <= c - corpus.W and d <= e - corpus.W and e < f  # a window at least between them
    rec, later = Recording(podcast / "sub-01"), round(b * 128 / 32)
    signal = np.array(rec.signal)
    signal[later:] = 50
    write_recording(tmp_path / "set/sub-01", signal, rec.channels, rec.events, sfreq=rec.sfreq, unit="V", subject="sub-01", source="test", synthetic=True)
    write_set(tmp_path / "set", ["sub-01"], synthetic=True)
    other = corpus_of(tmp_path / "set", tmp_path / "b")[0].sources[0]
    for key in ("centre", "scale", "mean"):
        assert np.array_equal(getattr(source, key), getattr(other, key))
    assert abs(source.cut(range(0, b - corpus.W, corpus.W), corpus.W, config)).max() <= config.clamp


def test_ridge_is_ridge(podcast, tmp_path):
    corpus, _, config = corpus_of(podcast, tmp_path)
    source, (gram, n) = corpus.sources[1], corpus.grams[1]
    begin, end = source.spans["train"]
    x = foundation.centred(source.cut(np.arange(begin, end - corpus.W + 1), corpus.W, config), source, config).reshape(n, -1)
    hidden = np.random.default_rng(0).random(x.shape[1]) < 0.75
    window = np.random.default_rng(1).normal(size=x.shape[1])
    oracle = Ridge(alpha=30.0, fit_intercept=False).fit(x[:, ~hidden].astype(float), x[:, hidden]).predict(window[None, ~hidden])[0]
    assert np.allclose(foundation.ridge(gram, window, hidden, 30.0), oracle, atol=1e-6)


def test_with_all_its_terms_the_linear_guess_is_the_conditional_mean(podcast, tmp_path):
    corpus, run, _ = corpus_of(podcast, tmp_path)
    source, (gram, n) = corpus.sources[1], corpus.grams[1]
    field = foundation.Field(source, gram, n, 25, run.device)  # of 5 x 5 electrodes
    hidden = np.repeat(np.random.default_rng(0).random(len(gram) // 4) < 0.75, 4)
    window = np.random.default_rng(1).normal(size=len(gram)).astype(np.float32)
    guess = field.guess(torch.from_numpy(window)[None], torch.from_numpy(~hidden)[None])[0].numpy()
    oracle = foundation.ridge(gram, window.astype(float), hidden, 0.003 * np.trace(gram) / len(gram))
    assert np.allclose(guess[hidden], oracle, atol=1e-4)
    few = foundation.Field(source, gram, n, 2, run.device).covariance
    assert 0 < (few - field.covariance).abs().max() and torch.linalg.matrix_rank(few.reshape(5, 16, 5, 16).transpose(1, 2).reshape(25, 256)) <= 3


def test_interpolation_and_neighbours_by_hand():
    x = np.array([[[1.0, 9.0, 9.0, 4.0]], [[2.0, 9.0, 6.0, 9.0]], [[8.0, 8.0, 8.0, 8.0]]])  # (C, F, T)
    visible = np.array([[True, False, False, True], [True, False, True, False], [False] * 4])
    made = foundation.interpolate(x, np.broadcast_to(visible[:, None], x.shape))
    assert np.allclose(made[:, 0], [[1, 2, 3, 4], [2, 4, 6, 6], [0, 0, 0, 0]])
    order = np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0]])
    assert np.allclose(foundation.neighbours(x, visible, order, 1)[2, 0], [2, 0, 6, 4])
    assert np.allclose(foundation.neighbours(x, visible, order, 2)[2, 0], [1.5, 0, 6, 4])


def test_block_means_bands_and_the_layout_of_a_patch():
    t = np.arange(4000) / 200
    signal = np.stack([3 * np.sin(2 * np.pi * 10 * t), 2 * np.sin(2 * np.pi * 40 * t)], 1)
    recipe = dict(sfreq=50.0, bands=[], patch=5, clamp=8.0)
    assert np.allclose(resampled(signal, 200, recipe)[:, :, 0], signal.reshape(-1, 4, 2).mean(1), atol=1e-6)
    uneven = resampled(signal, 200, {**recipe, "sfreq": 30.0}, [1])
    assert uneven.shape == (600, 1, 1) and np.isclose(uneven[1, 0, 0], signal[7:13, 1].mean(), atol=1e-6)
    y = resampled(signal, 200, {**recipe, "bands": [[8, 12], [30, 50]]})[100:-100]
    assert np.allclose(y.mean(0), [[3, 0], [0, 2]], atol=0.05)
    with pytest.raises(ValueError, match="100 Hz is not below"):
        resampled(signal, 200, {**recipe, "bands": [[8, 100]]})
    with pytest.raises(ValueError, match="more than the 200 Hz"):
        resampled(signal, 200, {**recipe, "sfreq": 400})
    windows = np.random.default_rng(0).normal(size=(3, 12, 2, 2))  # two patches, two samples more
    centre, scale = robust_scale(windows.reshape(-1, 2, 2))
    x = encoder_input(windows, recipe, centre, scale)
    assert x.shape == (3, 2, 20) and np.allclose(x[1, 0, 15:], (windows[1, 5:10, 0, 1] - centre[0, 1]) / scale[0, 1], atol=1e-6)
    assert np.allclose(places(["G1", "G10", "A1", "G2"], np.zeros((4, 3)), [True, True, True, False], "8x8")[:2], [[0, 0, 0], [0.01, 0.01, 0]])
    assert np.isnan(places(["G1", "G10", "A1", "G2"], np.zeros((4, 3)), [True, True, True, False], "8x8")[2:]).all()


def test_files_that_mne_reads(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    info = mne.create_info(["Fz", "Cz", "Pz", "Oz", "X1"], 100.0, "eeg")
    raw = mne.io.RawArray(np.random.default_rng(0).normal(size=(5, 6000)) * 1e-5, info, verbose="error")
    raw.save(folder / "sub-07_raw.fif", verbose="error")
    with pytest.raises(ValueError, match="give montage="):
        corpus_of(folder, tmp_path / "a")
    corpus, run, config = corpus_of(folder, tmp_path / "b", "montage=standard_1020", "masks=span,tube", "bands=[[4,8],[10,20]]")
    source = corpus.sources[0]
    assert source.names == ["Fz", "Cz", "Pz", "Oz"] and source.person == "07" and corpus.F == 2 and corpus.recipe["subjects"] == ["07"]
    assert build(config, corpus).encoder.config.patch == 8
    made = tmp_path / "b/recordings/sub-07_raw.fif/signal.f32"
    before = made.stat().st_mtime_ns
    assert foundation.converted(run, folder) == [made.parent] and made.stat().st_mtime_ns == before  # made once


def test_a_run_and_its_checkpoint(podcast, tmp_path):
    channels = pd.DataFrame(dict(name=[f"E{i}" for i in range(40)], x=0.01 * (np.arange(40) % 8), y=0.01 * (np.arange(40) // 8), z=0.05))
    signal = np.random.default_rng(0).normal(size=(3000, 40))
    signal[:, 4], signal[5, 6] = 0.3, np.nan  # flat, and with a nan: nobody marked them
    write_recording(tmp_path / "eeg/01", signal, channels, pd.DataFrame(dict(onset=[1.0])), sfreq=100, unit="V", subject="01", source="test", synthetic=True)
    write_set(tmp_path / "eeg", ["01"], synthetic=True)
    foundation.main(configure(Config, [*TINY, f"dataset={podcast},{tmp_path / 'eeg'}", f"out_dir={tmp_path / 'run'}"]))
    table = pd.read_csv(tmp_path / "run/results.csv")
    assert set(table.method) == {"encoder", "ridge", "linear guess", "neighbours", "interpolation"} and set(table["mask"]) == {"random", "tube"}
    assert table.data.str.contains("synthetic").all() and (table.low <= table.high).all() and (table.n == 15).all()
    whole = table[table.metric == "r2"].set_index(["mask", "method"]).score
    paired = table[table.metric == "r2 - ridge"].set_index("mask").score
    assert all(np.isclose(whole[kind, "encoder"] - whole[kind, "ridge"], paired[kind]) for kind in ("random", "tube"))
    assert all((tmp_path / "run" / name).exists() for name in ("loss.png", "reconstruction.png", "best.pt"))
    encoder, recipe = load_encoder(tmp_path / "run")
    assert [len(r["channels"]) for r in recipe["recordings"]] == [9, 5, 38] and sorted(recipe["subjects"]) == ["01", "sub-01", "sub-02"]
    x, xyz = torch.randn(2, 63, 16), torch.randn(63, 3) * 0.05  # 40 electrodes' checkpoint, 63 electrodes
    with torch.no_grad():
        assert encoder(x, xyz, torch.tensor([0, -1])).shape == (2, 4, 8)
    save_checkpoint(tmp_path / "other.pt", dict(kind="telepath"))
    with pytest.raises(ValueError, match="no foundation model"):
        load_encoder(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="python foundation.py"):
        load_encoder(tmp_path / "nowhere")
