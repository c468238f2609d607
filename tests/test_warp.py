"""warp.py against dense algebra, scikit-learn and naive loops; it must find planted warps."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.spatial
import torch
from sklearn.linear_model import LinearRegression, Ridge
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

import warp as W
import warp_intrinsic
from configurator import InputError, configure
from convert import HiddenStates
from data.brainscore import prepare as brainscore
from data.stimuli import write_encoding
from data.tokens import Tokenizer, state_of
from model import GPT, GPTConfig, lm_state, save_checkpoint
from tests.helpers import byte_tokenizer, prepare
from tests.test_brain_data import tuckute
from warp import Config, FastfoodWrapper, Study

KINDS = ["fastfood", "fastfood_tensor", "dense"]
TOKENIZER = Tokenizer(state_of(byte_tokenizer()))


def net(seed=0, width=30):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 7))


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def matrix(w):
    """P (D, d - m), column by column."""
    theta0 = flat(p for p in w.model.parameters() if p.requires_grad)
    columns = []
    with torch.no_grad():
        for j in range(len(w.z)):
            w.z.zero_()
            w.z[j] = 1
            columns.append(flat(w.tensors().values()) - theta0)
        w.z.zero_()
    return torch.stack(columns, 1)


# ---- projections


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_matrix(kind):
    model = net()
    w = FastfoodWrapper(model, 40, [["0"], ["2"]], kind, seed=3)
    P = matrix(w)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        w.z.copy_(torch.randn(38, generator=generator))
        w.scales.copy_(torch.tensor([0.7, 1.3]))
    x = torch.randn(5, 20, generator=generator)
    w(x).square().sum().backward()
    z = w.z.detach().clone().requires_grad_()
    scales = w.scales.detach().clone().requires_grad_()
    sizes = [p.numel() for p in model.parameters()]
    in_layer = torch.tensor([0, 0, 1, 1]).repeat_interleave(torch.tensor(sizes))
    theta = flat(model.parameters()) + scales[in_layer] * (P @ z)
    pieces = {}
    for (name, p), part in zip(model.named_parameters(), theta.split(sizes)):
        pieces[name] = part.view(p.shape)
    functional_call(model, pieces, (x,)).square().sum().backward()
    assert torch.allclose(w.z.grad, z.grad, rtol=1e-3, atol=1e-3)
    assert torch.allclose(w.scales.grad, scales.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_have_norm_one_and_are_nested(kind):
    w = FastfoodWrapper(net(), 40, None, kind, seed=3)
    P = matrix(w)
    norm = P.norm(dim=0)
    if kind == "fastfood_tensor":  # of z, the biases of 7 and 30 see the first 8 and 32
        means = [norm[:8].mean(), norm[8:32].mean(), norm[32:].mean()]
        assert np.allclose(means, np.sqrt([4, 3, 2]), atol=0.1)
    else:
        assert torch.allclose(norm, torch.ones(40), atol=0.15)
    assert torch.allclose(matrix(w.start(10)), P[:, :10], atol=1e-6)  # capacity grows with d
    assert torch.equal(P, matrix(FastfoodWrapper(net(), 40, None, kind, seed=3)))
    assert not torch.allclose(P, matrix(FastfoodWrapper(net(), 40, None, kind, seed=4)))
    groups = [["0"], ["2"]]  # fits of largest d between the same powers of two share P
    fewer, more = (matrix(FastfoodWrapper(net(), d, groups, kind)) for d in (33, 40))
    assert torch.allclose(fewer, more[:, :31], atol=1e-6)


def test_fastfood_is_as_good_as_normal():
    w = FastfoodWrapper(nn.Linear(256, 256, bias=False), 32)
    P = matrix(w)
    entries = P[:, 0].numpy() * w.D**0.5
    assert scipy.stats.kstest(entries, "norm").statistic < 0.02
    off = P.T @ P - torch.eye(32)  # columns as far from orthogonal as normal ones are
    assert off.abs().max() < 5 * (2 / w.D) ** 0.5


# ---- the wrapper


def small_gpt(seed=0, scale=1.0, **options):
    sizes = {"block_size": 16, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**{**sizes, **options}), seed=seed).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(scale)  # untrained weights are nearly linear
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_no_warp_is_the_model_and_a_merged_one_a_copy(kind):
    model, idx = small_gpt(), torch.randint(0, 257, (3, 7))
    logits = model(idx).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    w = FastfoodWrapper(model, 50, [["transformer.h.0"], ["transformer.h.1"]], kind)
    assert torch.equal(w(idx).logits, logits)
    assert [name for name, _ in w.named_parameters()] == ["z", "scales"]
    assert w.z.numel() + w.scales.numel() == 50  # the scales are counted in d
    with torch.no_grad():
        w.z.normal_()
    assert not torch.equal(w(idx).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fresh = small_gpt(seed=5)
    fresh.load_state_dict(w.merge())
    assert torch.equal(fresh(idx).logits, w(idx).logits)


def test_tied_heads_stay_tied():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50, bias=False))
    model[1].weight = model[0].weight
    w = FastfoodWrapper(model, 20)
    with torch.no_grad():
        w.z.normal_()
    state = w.merge()
    assert w.D == 800 and torch.equal(state["0.weight"], state["1.weight"])
    idx = torch.randint(0, 50, (2, 5))
    logits = w(idx)
    model.load_state_dict(state)
    assert torch.allclose(model(idx), logits, atol=1e-6)


def test_evaluation_mode_and_buffers_are_kept():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    w, x = FastfoodWrapper(model, 10).train(), torch.randn(8, 1, 6, 6) + 3
    assert torch.equal(w(x), w(x))
    assert not model.training and model[1].running_mean.abs().max() == 0


def test_groups_are_whole_names():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("layer1", "layer10", "rest")})
    two_groups = [["layer1"], ["layer10"]]
    w = FastfoodWrapper(model, 12, two_groups)
    assert [group for *_, group in w.parts] == [0, 1, -1]
    wrong = [([["layer"]], 12, "layer1"), ([["layer1"], ["layer1"]], 12, "two groups")]
    wrong += [(two_groups, 2, "2 scales"), (None, 61, "60 parameters")]
    for groups, d, words in wrong:
        with pytest.raises(InputError, match=words):
            FastfoodWrapper(model, d, groups)


# ---- objectives


def make_study(n=90, p=12, units=5, seed=0, objective=W.RidgeReadout, n_folds=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)).astype(np.float32)
    y = x @ rng.standard_normal((p, units)) + rng.standard_normal((n, units))
    config = Config(head_dims=0, n_folds=n_folds)
    names = np.array([str(i) for i in range(n)])
    folds = W.make_folds(config, names, np.full(n, ""))
    meta = {"dataset": "made up", "synthetic": True}
    return torch.from_numpy(x), Study("", "", x, None, objective, y, names, folds, meta)


@pytest.mark.parametrize("p", [10, 60])
def test_ridge_is_that_of_scikit_learn(p):
    """With the penalty of each unit that predicts validation stimuli best."""
    x, study = make_study(p=p)
    fold = study.folds[0]
    f = [x[fold[part]] for part in W.PARTS]
    sd, mean = torch.std_mean(f[0], 0)
    train, val, test = (((part - mean) / sd).numpy() for part in f)
    config = Config(head_dims=0, alphas=[0.1, 1.0, 10.0, 100.0])
    fitted = [Ridge(alpha).fit(train, study.y[fold["train"]]) for alpha in config.alphas]
    errors = [((model.predict(val) - study.y[fold["val"]]) ** 2).mean(0) for model in fitted]
    predicted = W.RidgeReadout(config, study, fold, f[0]).test(*f)
    rows = np.concatenate([fold["train"], fold["val"]])
    for v, alpha in enumerate(np.array(config.alphas)[np.argmin(errors, axis=0)]):
        refitted = Ridge(alpha).fit(np.concatenate([train, val]), study.y[rows, v])
        assert np.allclose(predicted[:, v], refitted.predict(test), atol=1e-4)


def test_ols_does_not_predict_from_rounding():
    """Layer-normed features sum to 0: one direction of them is float32 noise."""
    x, study = make_study(p=10)
    f = torch.cat([x, 1e-7 * torch.randn(len(x), 1) - x.sum(1, keepdim=True)], 1)
    train, val, test = study.folds[0].values()
    readout = W.OLSReadout(Config(head_dims=0), study, study.folds[0], f[train])
    rows = np.concatenate([train, val])
    expected = LinearRegression().fit(x[rows], study.y[rows]).predict(x[test])
    assert np.allclose(readout.test(f[train], f[val], f[test]), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("reader", "kind"),
    [("text", W.RSA), ("module", W.CKA), ("module", W.RidgeReadout), ("module", W.SGDReadout)],
)
def test_gradients_are_those_of_the_loss_in_batches_too(reader, kind):
    """The model is run again on the way back, with its hooks and early ends."""
    torch.manual_seed(0)
    if reader == "text":
        lm = HiddenStates({"model": small_gpt(), "tokenizer": TOKENIZER})
        reader = W.TextReader(lm, ["0", "1"], "mean").requires_grad_(True)
        ids = torch.randint(0, 257, (90, 7))
        inputs = torch.stack([ids, torch.ones_like(ids), (ids % 5).clamp(max=1)], 1)
    else:
        reader = W.ModuleReader(net(), ["0", "1"], "mean")
        inputs = torch.randn(90, 20)
    _, study = make_study(objective=kind)
    fold = study.folds[0]
    rows = torch.as_tensor(fold["train"])
    gradients = []
    for size in (16, 1000):
        config = Config(head_dims=0, batch_size=size)
        objective = kind(config, study, fold, reader(inputs[rows]).detach())
        w = FastfoodWrapper(reader, 20, [["core.0"]] if inputs.dim() == 2 else None)
        objective.validate(*W.warped_features(config, w, inputs, fold, ("train", "val")))
        z = torch.linspace(-1, 1, len(w.z))
        with torch.no_grad():
            w.z.copy_(z)
        loss = W.gradients(config, w, objective, inputs, rows)
        params = [p for p in [w.z, w.scales, *objective.parameters] if len(p)]
        gradients.append((loss, torch.cat([p.grad.flatten() for p in params])))
    assert np.isclose(gradients[0][0], gradients[1][0], rtol=1e-4) and gradients[0][1].any()
    assert torch.allclose(gradients[0][1], gradients[1][1], rtol=5e-3, atol=1e-5)
    for j in range(3):
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                w.z.copy_(z)
                w.z[j] += step
                losses.append(float(objective.loss(w(inputs[rows]), rows.numpy())))
        assert np.isclose((losses[0] - losses[1]) / 2e-2, w.z.grad[j], rtol=0.05, atol=3e-4)


def test_cka_is_the_formula_and_distances_are_those_of_scipy():
    rng = np.random.default_rng(0)

    def gram(n, p):
        x = rng.standard_normal((n, p))
        return torch.from_numpy(x @ x.T)

    def naive(k, l):
        n, one = len(k), np.ones(len(k))
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
        middle = one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2))
        return (np.trace(k @ l) + middle - 2 / (n - 2) * one @ k @ l @ one) / (n * (n - 3))

    k, l = gram(20, 5), gram(20, 8)
    a, b = k.numpy(), l.numpy()
    assert np.isclose(W.CKA.similarity(k, l), naive(a, b) / np.sqrt(naive(a, a) * naive(b, b)))
    assert np.isclose(W.CKA.similarity(k, k), 1)
    of_noise = [float(W.CKA.similarity(gram(32, 20), gram(32, 20))) for _ in range(60)]
    assert abs(np.mean(of_noise)) < 0.04  # the biased one is near 0.4 here
    x = rng.standard_normal((10, 6))
    for rdm, metric, scale in (("correlation", "correlation", 1), ("euclidean", "sqeuclidean", 6)):
        expected = scipy.spatial.distance.cdist(x, x, metric) / scale
        assert np.allclose(W.RSA.compare(Config(rdm=rdm), torch.from_numpy(x)), expected)


def test_weighted_scores_are_those_of_the_resampled_set():
    rng = np.random.default_rng(0)
    y, rows = rng.standard_normal((30, 3)), rng.integers(0, 30, 30)
    p = y + rng.standard_normal((30, 3))
    weights = np.bincount(rows, minlength=30)[None].astype(float)
    ones = np.ones((1, 30))
    for metric in ("r", "r2"):
        resampled = W.unit_scores(metric, p[rows], y[rows], ones)
        assert np.allclose(W.unit_scores(metric, p, y, weights), resampled)
        volts = W.unit_scores(metric, 1e-6 * p + 3, 1e-6 * y + 3, ones)
        assert np.allclose(volts, W.unit_scores(metric, p, y, ones))
    expected = [np.corrcoef(p[:, v], y[:, v])[0, 1] for v in range(3)]
    assert np.allclose(W.unit_scores("r", p, y, ones)[0], expected)
    assert (W.unit_scores("r", np.ones((30, 3)), y, ones) == 0).all()  # constant: no NaN


# half of 40 groups are kept in a draw, and six of 8
@pytest.mark.parametrize(("kind", "n_groups"), [(W.RSA, 8), (W.CKA, 40)])
def test_draws_of_pairs_vary_as_scores_of_new_stimuli_do(kind, n_groups):
    rng = np.random.default_rng(0)
    to_f, to_y = rng.standard_normal((2, 6, 15))
    group = np.repeat(np.arange(n_groups), 80 // n_groups)
    config = Config(draws=40)
    scores = []
    spreads = []
    for _ in range(60):
        z = rng.standard_normal((n_groups, 6))[group] + rng.standard_normal((80, 6))
        f = torch.from_numpy(z @ to_f + 2 * rng.standard_normal((80, 15)))
        y = z @ to_y + 2 * rng.standard_normal((80, 15))
        study = Study("", "", [], None, kind, y, group, [{"test": np.arange(80)}])
        predicted = kind.compare(config, f).numpy()
        truth = kind.truth(config, study, np.arange(80))
        draws = W.resample(config, study, predicted, truth)
        scores.append(kind.score_all(config, predicted, truth))
        spreads.append(draws.std())
        assert np.isclose(draws.mean(), scores[-1])
    assert 0.75 < np.mean(spreads) / np.std(scores) < 1.33


# ---- data


def test_groups_are_tested_once_and_never_split():
    group = np.array([f"g{i // 3}" for i in range(90)])
    for n_folds in (0, 7):
        folds = W.make_folds(Config(n_folds=n_folds), group, np.full(90, ""))
        for fold in folds:
            parts = [set(group[rows]) for rows in fold.values()]
            assert sum(map(len, parts)) == 30 and not set.intersection(*parts)
        tested = np.concatenate([fold["test"] for fold in folds])
        assert len(tested) == len(set(tested)) == (90 if n_folds else 24)
    split = np.repeat(["train", "test"], [60, 30])
    (fold,) = W.make_folds(Config(), group, split)
    assert list(fold["test"]) == list(range(60, 90)) and len(fold["val"]) == 12
    batches = W.draw_batches(Config(exact=False, batch_size=25), np.arange(100, 160), draw=0)
    seen = [next(batches).numpy() for _ in range(8)]
    assert all(len(set(rows)) == 25 for rows in seen)  # none is twice in a batch
    assert set(np.concatenate(seen)) == set(range(100, 160))


def brain(folder, y, texts=None, **tables):
    """Write a made-up brain with responses y (P, V) and return its folder."""
    if texts is None:
        texts = [f"{'abcdefgh'[i % 8]}{i}" for i in range(len(y))]
    about = {"modality": "fMRI", "species": "human", "source": "made up", "synthetic": True}
    write_encoding(folder, pd.DataFrame({"text": texts}), y, **tables, **about)
    return folder


def test_noise_ceilings_are_the_planted_ones_and_units_of_low_ceiling_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    signal, R = rng.standard_normal((300, 40)), 3
    y = np.tile(signal, (R, 1)) + np.sqrt(R * 0.4 / 0.6) * rng.standard_normal((300 * R, 40))
    assert abs(W.noise_ceiling(y, np.tile(np.arange(300), R)).mean() - 0.6) < 0.02
    assert np.isnan(W.noise_ceiling(y[:300], np.arange(300))).all()
    y = rng.standard_normal((90, 4))
    y[:, 3] = 5  # a unit that never changes
    ceilings = pd.DataFrame({"ceiling": [0.4, "", 0.01, 0.9]})
    noisy = np.vstack([y + [0.1, 50, 0.1, 0] * rng.standard_normal((90, 4)) for _ in range(3)])
    presentations = pd.DataFrame({"stimulus": np.tile(np.arange(90), 3)})
    texts = [f"t{i}" for i in range(90)]
    brain(tmp_path / "published", y, texts, units=ceilings)
    brain(tmp_path / "repeats", noisy, texts, presentations=presentations)
    brain(tmp_path / "some", y, texts, units=pd.DataFrame({"ceiling": [0.4, 0.6, 0.01, ""]}))
    # only a constant unit of `some` has no ceiling, so the others' counts
    cases = [("published", [0, 1], 1.0), ("repeats", [0, 2], 0.99), ("some", [0, 1], 0.5**0.5)]
    for name, kept, ceiling in cases:
        study = W.read_brain(Config(reliable=0.3), name, W.Encoding(tmp_path / name), "")
        assert study.y.shape == (90, 2) and np.isclose(study.ceiling, ceiling, atol=0.01)
        expected = y[:, kept] / y[:, kept].std()
        assert np.allclose(study.y / study.y.std(), expected, atol=0.6)


def test_fits_are_kept_while_nothing_that_they_read_has_changed(tmp_path):
    _, study = make_study()
    lm = tmp_path / "lm.pt"
    lm.touch()
    config = Config(lm=str(lm), models=["lm", "gpt2"])

    run = SimpleNamespace(out=tmp_path)

    def files(study, **options):
        changed = replace(config, **options)
        cells = W.list_cells(changed, W.make_candidates(changed))
        return {W.fit_path(run, changed, study, cell, 0, 0.1).name for cell in cells}

    before = files(study)
    assert files(study, draws=7, reach=0.5) == before
    changes = {"stimuli": study.stimuli + 1, "pieces": ["a"], "y": study.y + 1}
    changes["folds"] = [{**study.folds[0], "val": study.folds[0]["val"][1:]}]
    for name, value in changes.items():
        assert not files(replace(study, **{name: value})) & before, name
    assert {name.split("-")[1] for name in files(study, shuffles=7) - before} == {"0"}
    os.utime(lm, (1, 1))  # trained again
    after = files(study)
    assert {name.split("-")[0] for name in after - before} == {"lm"}
    assert {name.split("-")[0] for name in after & before} == {"gpt2"}
    pictures = replace(study, kind="image", stimuli=[lm])
    first = pictures.content
    os.utime(lm, (2, 2))  # painted again
    assert replace(pictures).content != first
    states = set()
    for file in ("model.safetensors", "tokenizer.json", "best.pt"):
        (tmp_path / file).touch()
        states.add(W.make_candidates(Config(models=[str(tmp_path)]))[0].state)
    assert len(states) == 3  # a folder is known by all its files


# ---- d_warp


DIMS = [0, 9, 99, 999]


def curve(points, full=None):
    """Scores with little noise."""
    rng = np.random.default_rng(len(points))
    scores = np.vstack([[points], points + 0.01 * rng.standard_normal((200, len(points)))])
    curve = pd.DataFrame(scores, columns=DIMS)
    if full:
        curve[W.ALL] = full
    return curve


def test_d_warp_of_known_curves():
    for level, d in ((0.2, 0), (0.6, 99), (0.5, 10**1.5 - 1), (0.81, np.inf)):
        assert np.isclose(W.crossing(DIMS, [0.2, 0.4, 0.6, 0.8], level), d)
    assert np.isclose(W.crossing(DIMS, [0.2, 0.5, 0.3, 0.8], 0.4), 9)  # what falls is pooled
    curves = {"near": curve([0.5, 0.7, 0.8, 0.8], full=0.8)}
    curves |= {"far": curve([0.3, 0.4, 0.6, 0.8], full=0.8), "never": curve([0.1] * 4)}
    config = Config(dims=DIMS, common="highest", common_share=0.9)
    level, d_warp = W.measure_d_warp(config, curves)
    d, *draws = d_warp["near", "absolute"]
    d_far, *draws_far = d_warp["far", "absolute"]
    assert d < d_far < np.inf and W.interval(draws)[1] < W.interval(draws_far)[0]
    assert np.isclose(level, 0.72) and (d_warp["never", "absolute"] == np.inf).all()
    expected = W.crossing(DIMS, [0.5, 0.7, 0.8, 0.8], 0.5 + 0.9 * 0.3)
    assert np.isclose(d_warp["near", "relative"][0], expected)
    assert ("never", "relative") not in d_warp
    row = {"dataset": "x", "subject": "all", "model": "m", "control": "none", "d": 0}
    row |= {"measure": "d_warp absolute", "projection": "fastfood", "score": 9, "low": 9}
    table = W.make_table(Config(dims=DIMS[1:]), pd.DataFrame([{**row, "high": 999}]))
    assert table["d_warp absolute"].item() == "<= 9 [<= 9, > 999]"


def test_the_null_is_ridge_on_shuffled_responses():
    """Shuffles in closed form are those fitted one by one; signal beats them, noise does not."""
    x, study = make_study(n=60, n_folds=5)
    config = Config(head_dims=6, n_folds=5)
    null = W.null_scores(config, study, x, 40)
    for number in (0, 3):
        dealt = study.shuffled(number)
        predicted = []
        for fold in dealt.folds:
            f = [x[fold[part]] for part in W.PARTS]
            predicted.append(W.RidgeReadout(config, dealt, fold, f[0]).test(*f))
        predicted = W.join_folds(predicted)
        truth = W.join_folds([dealt.y[fold["test"]] for fold in dealt.folds])
        score = W.Objective.score_all(config, predicted, truth)
        if number:
            assert np.isclose(null[number - 1], score, atol=1e-4)
        else:
            assert W.p_value(score, null) == 1 / 41
    study.y[:] = np.random.default_rng(0).standard_normal(study.y.shape)
    null = W.null_scores(config, study, x, 200)
    assert W.p_value(null[0], null[1:]) > 0.05 and abs(null.mean()) < 0.05


# ---- models

OWN_MODELS = """
import torch, torch.nn as nn
def make():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3))
    return module, lambda files: torch.randn(len(files), 3, 8, 8, generator=torch.manual_seed(1))
def bare():
    return nn.Linear(2, 2)
def pixels():
    return nn.Sequential(nn.Identity()), lambda files: [[0.0, 1.0]] * len(files)
def nan():
    return nn.Sequential(nn.Identity()), lambda files: [[float("nan")]] * len(files)
def short():
    return nn.Sequential(nn.Linear(2, 2)), lambda files: torch.ones(3, 2)
def unused():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    module.forward = module["a"].forward
    return module, lambda files: torch.ones(len(files), 2)
"""


class CPURun:
    device = torch.device("cpu")

    def progress(total, desc):
        return tqdm(total=total, disable=True)


def stimuli(kind, items, pieces=None):
    return Study("", kind, items, pieces)


def candidate_of(model, *layers, **fields):
    return W.Candidate("c", str(model), layers, **fields)


def test_vision_and_own_models_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    rng = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (20, 20), dtype=np.uint8)).save(file)  # grey
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
    resnet = transformers.ResNetModel(transformers.ResNetConfig(**sizes, layer_type="basic"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "image_size": 16, "patch_size": 8}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes))
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    for name, model in (("resnet", resnet), ("vit", vit)):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    own_file = tmp_path / "own.py"
    own_file.write_text(OWN_MODELS)

    def load(model, layer, pool="mean"):
        study, candidate = stimuli("image", files), candidate_of(model, layer)
        return W.load_candidate(CPURun, Config(pool=pool), study, candidate, 0)

    block = "layers.1" if "layers.1" in dict(vit.named_modules()) else "encoder.layer.1"
    cases = [(tmp_path / "resnet", "encoder.stages.1", "flatten", 8 * 4)]
    cases += [(tmp_path / "vit", block, "first", 16), (f"{own_file}:make", "2", "mean", 5)]
    for model, layer, pool, width in cases:
        loaded = load(model, layer, pool)
        f = W.read_features(loaded.reader, loaded.inputs, range(4), 3)
        assert f.shape == (4, width) and torch.allclose(loaded.features, f, atol=1e-5)
        w = FastfoodWrapper(loaded.reader, 8)
        assert torch.allclose(w(loaded.inputs), f, atol=1e-5)
        assert not any(module.training for module in loaded.reader.modules())
    assert w.D == 3 * 5 * 9 + 5 + 10  # what lies above the layer is no part of theta
    loaded = load(f"{own_file}:pixels", "0")  # without parameters: linear scores only
    assert loaded.features.tolist() == [[0, 1]] * 4
    with pytest.raises(InputError, match="d=8 .* 0 parameters"):
        FastfoodWrapper(loaded.reader, 8)
    for model, layer, sentence in (
        (tmp_path / "vit", "layer9", "no layer 'layer9'"),
        ("lm", "1", "'c' is a language model"),
        (f"{own_file}:bare", "0", "must return"),
        (f"{own_file}:nan", "0", "features of 'c' are NaN"),
        (f"{own_file}:short", "0", r"\(3, 2\) for 4 stimuli"),
        (f"{own_file}:unused", "b", "does not use 'b'"),
    ):
        with pytest.raises(InputError, match=sentence):
            load(model, layer)


def test_texts_are_pooled_over_their_own_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 16}
    bert = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    bert.save_pretrained(tmp_path)
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    texts = ["a b", "c", "a b c b"]
    for pool in ("mean", "last"):
        study, candidate = stimuli("text", texts), candidate_of(tmp_path, "1")
        loaded = W.load_candidate(CPURun, Config(pool=pool), study, candidate, 0)
        f = W.read_features(loaded.reader, loaded.inputs, range(3), 2)
        for i, text in enumerate(texts):
            ids = [5 + "abc".index(word) for word in text.split()]
            states = bert(torch.tensor([[2, *ids, 3]]), output_hidden_states=True).hidden_states[1]
            states = states[0, 1 : 1 + len(ids)]
            expected = states.mean(0) if pool == "mean" else states[-1]
            assert torch.allclose(f[i], expected, atol=1e-5)
    # nor over their context
    lm = HiddenStates({"model": small_gpt(block_size=6), "tokenizer": TOKENIZER}, bos=True)
    reader = W.TextReader(lm, ["1"], "mean")
    inputs, n_cut = reader.encode(["ab cd", "xyz", "a b c d efg"], ["cd", "xyz", "efg"])
    ids, _, inside = inputs.unbind(1)
    pooled = [bytes(row[mask > 0].tolist()) for row, mask in zip(ids, inside)]
    assert pooled == [b"cd", b"xyz", b"efg"]
    assert n_cut == 1 and bytes(ids[2, 1:].tolist()) == b"d efg"  # too long: the beginning goes
    inputs, n_cut = reader.encode(["x" * 9 + "ab"], None)  # and without spaces, too
    assert n_cut == 1 and bytes(inputs[0, 0, 1:].tolist()) == b"xxxab"


# ---- the script


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny language model and phrases."""
    folder = tmp_path_factory.mktemp("warp")
    state = lm_state(small_gpt(seed=1, scale=4.0))
    save_checkpoint(folder / "lm.pt", {**state, "tokenizer": TOKENIZER.state})
    (folder / "phrases").mkdir()
    rng = np.random.default_rng(0)
    texts = sorted({"".join(rng.choice(list("abcdefgh"), 4)) for _ in range(160)})
    table = pd.DataFrame({"text": texts, "group": [text[:3] for text in texts]})
    table.to_csv(folder / "phrases/stimuli.csv", index=False)
    (folder / "phrases/meta.yaml").write_text("format: synthetic_brain-1\n")
    return folder


SWEEP = {"steps": 3, "learning_rates": 0.02, "dims": "0,4,16", "seeds": 1, "eval_interval": 2}
SWEEP |= {"shuffles": 19, "draws": 50, "shuffled": False, "device": "cpu"}


def options(tiny, out, **more):
    values = {"lm": tiny / "lm.pt", "planted_stimuli": tiny / "phrases", "models": "lm"}
    values |= {"layers": 2, "out_dir": out, **SWEEP, **more}
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture
def warp():
    """Run a script in this process, which is quicker, and restore signal handlers."""
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(*arguments, script=W):
        script.main(configure(script.Config, list(map(str, arguments))))

    yield call
    for number, handler in old.items():
        signal.signal(number, handler)


def table(folder, query="measure == 'score'"):
    return pd.read_csv(folder / "results.csv").query(query)


def test_a_warp_planted_in_k_columns_is_found_in_k_dimensions():
    """The oracle: a teacher inside the first 4 columns of P needs 4 dimensions, shuffles never."""
    model = small_gpt(seed=1, scale=10.0, block_size=8, vocab_size=12, n_layer=1, n_embd=8)
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 12, (160, 4)))
    inputs = torch.stack([ids, torch.ones_like(ids), torch.ones_like(ids)], 1)
    lm = HiddenStates({"model": model, "tokenizer": TOKENIZER})
    reader = W.TextReader(lm, ["1"], "last").requires_grad_(True)
    config = Config(head_dims=0, steps=40, eval_interval=20, dims=[0, 2, 4, 16])
    w = FastfoodWrapper(reader, 16, seed=(config.seed, 0))  # the P of the fits below
    with torch.no_grad():
        w.z[:4] = torch.randn(4, generator=torch.Generator().manual_seed(3))
        w.z *= 0.4 * w.norm / w.z.norm()
        f = w(inputs).double().numpy()
    y = (f - f.mean(0)) @ rng.standard_normal((f.shape[1], 16))
    y = y / y.std(0) + 0.3 * rng.standard_normal(y.shape)
    folds = W.make_folds(config, np.arange(160).astype(str), np.full(160, ""))
    study = Study("", "text", [], None, W.RidgeReadout, y, np.arange(160), folds)
    features = W.read_features(reader, inputs, range(160), 1000)
    loaded = W.Loaded(reader, inputs, features)

    def score(d, shuffle=0):
        dealt = study.shuffled(shuffle)
        cell = W.Cell(candidate_of("lm"), d, seed=0, weights=0, shuffles=1, shuffle=shuffle)
        fits = []
        for rate in (0.02, 0.05) if d else (0.0,):
            fits.append(W.run_fit(CPURun, config, dealt, cell, 0, rate, loaded))
        best = max(fits, key=lambda fit: fit["validation"])
        return W.Objective.score_all(config, best["evidence"], dealt.y[folds[0]["test"]])

    scores = [score(d) for d in config.dims]
    assert scores[0] < 0.85 and scores[2] > 0.93
    assert 1 < W.crossing(config.dims, scores, 0.93) <= 4
    assert score(16, shuffle=1) < 0.5


def test_candidates_lie_on_the_line_that_they_name(tiny):
    config = Config(lm=str(tiny / "lm.pt"), planted_warp=0.5, layers=["2"])
    study = stimuli("text", ["ab", "abc"])

    def theta(draw=0, **fields):
        loaded = W.load_candidate(CPURun, config, study, candidate_of("lm", "2", **fields), draw)
        return flat(p for p in loaded.reader.parameters() if p.requires_grad)

    lm, teacher, random = theta(), theta(toward="teacher"), theta(toward="random")
    assert torch.isclose((teacher - lm).norm(), 0.5 * lm.norm(), rtol=1e-3)
    assert torch.allclose(theta(toward="teacher", share=-1.0), 2 * lm - teacher, atol=1e-5)
    assert torch.allclose(theta(toward="random", share=0.25), lm.lerp(random, 0.25), atol=1e-5)
    assert not torch.equal(theta(draw=1, toward="random"), random)


def test_a_stopped_sweep_goes_on(tiny, tmp_path, warp, monkeypatch):
    """tests/test_scripts.py stops sweeps at their results, and shares them among ranks."""
    more = {"seeds": 2, "shuffled": True, "models": "lm,random"}
    run_fit = W.run_fit
    fits = []  # cell and learning rate

    def count_fit(run, config, study, cell, number, rate, loaded):
        fits.append((cell, rate))
        if len(fits) == 8:
            raise KeyboardInterrupt
        return run_fit(run, config, study, cell, number, rate, loaded)

    monkeypatch.setattr(W, "run_fit", count_fit)
    with pytest.raises(KeyboardInterrupt):
        warp(*options(tiny, tmp_path, **more))
    assert not (tmp_path / "results.csv").exists()
    stopped = fits[7]
    warp(*options(tiny, tmp_path, **more))
    assert fits[8] == stopped and len(fits) == len(set(fits)) + 1  # no other is made again
    rows = table(tmp_path, "n > 0")
    assert rows[["score", "chance", "low", "high", "n"]].notna().all().all()
    assert set(rows.control.dropna()) == {"none", "shuffled"} and rows.synthetic.all()
    assert (rows.query("d == 0 and measure == 'score'").p >= 1 / 21).all()
    for name in ("curves.png", "training.png", "table.csv"):
        assert (tmp_path / name).exists()
    # all parameters are fitted once, not for each draw of P
    full = {(cell.candidate.name, cell.seed) for cell, _ in fits if cell.d == W.ALL}
    assert full == {("lm", 0), ("random", 0), ("random", 1)}
    # other options of the analysis, and more draws, fit nothing again
    n_done = len(fits)
    other = {**more, "common_share": 0.5, "draws": 20, "learning_rates": "0.02,0.05"}
    warp(*options(tiny, tmp_path, **other))
    assert {rate for _, rate in fits[n_done:]} == {0.05}
    assert (table(tmp_path, "measure == 'd_warp absolute'").n == 20).all()


def test_fits_are_made_again_when_files_are_edited_or_torn(tiny, tmp_path, warp):
    file = tmp_path / "mine.py"
    more = {"models": f"{file}:make", "layers": 2, "head_dims": 4, "dims": 0, "full": False}
    argv = options(tiny, tmp_path / "out", **more)
    n_fits = []
    edited = OWN_MODELS.replace("manual_seed(1)", "manual_seed(2)")
    for code in (OWN_MODELS, OWN_MODELS + "# a comment", edited):
        file.write_text(code)
        warp(*argv)
        n_fits.append(len(list((tmp_path / "out/fits").iterdir())))
    assert n_fits == [1, 1, 2]
    assert len(table(tmp_path / "out")) == 1
    for path in (tmp_path / "out/fits").iterdir():
        path.write_bytes(path.read_bytes()[:200])  # torn: fitted again
    warp(*argv)
    readable = [W.read_fit(path) is not None for path in (tmp_path / "out/fits").iterdir()]
    assert sorted(readable) == [False, True]


@pytest.mark.parametrize(
    "more",
    [
        {"objective": "rsa", "rdm": "euclidean", "exact": False, "batch_size": 32},
        {"objective": "linear_first", "head": "pls", "layers": "1,2", "layer_groups": "blocks"},
        {"objective": "linear_first", "head": "sgd", "n_folds": 3, "projection": "dense"},
    ],
    ids=str,
)
def test_every_objective_runs(tiny, tmp_path, warp, more):
    warp(*options(tiny, tmp_path, **{"dims": "0,16", "full": False, "common": 0.5, **more}))
    fits = table(tmp_path)
    assert fits.score.between(-0.5, 1).all() and set(fits.d) == {0, 16}
    assert fits.n.iloc[0] > (100 if "n_folds" in more else 20)


def test_nan_is_no_score_and_a_rate_that_diverges_costs_that_rate(tiny, tmp_path, warp, capsys):
    x = np.eye(6)
    x[0, 1] = np.nan
    assert np.isnan(W.RSA.score(Config(), x, np.eye(6), np.ones((1, 6)))).all()
    assert W.RSA.score(Config(), np.ones((6, 6)), np.eye(6), np.ones((1, 6))) == 0
    assert np.isnan(W.p_value(np.nan, np.zeros(9))) and W.p_value(1.0, np.zeros(9)) == 0.1
    warp(*options(tiny, tmp_path, learning_rates="0.02,1e25", dims="0,16", full=False, common=0.5))
    assert "learning rate 1e+25 diverged" in capsys.readouterr().out
    assert table(tmp_path, "d == 16 and measure == 'score'").learning_rate.item() == 0.02


def test_every_person_of_words_and_brains_is_scored(tiny, tmp_path, warp, capsys):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 3)) + str(i) for i in range(60)]
    units = pd.DataFrame({"subject": np.repeat(["A", "B", "C", ""], 3)})  # no person "all of them"
    folder = brain(tmp_path / "words", rng.standard_normal((60, 12)), words, units=units)
    more = {"subject": "each", "dims": 0, "n_folds": 5, "full": False, "seeds": 1, "shuffles": 99}
    warp(*options(tiny, tmp_path / "out", dataset=folder, models="lm,random", **more))
    assert "reliable= uses published ceilings only" in capsys.readouterr().out
    rows = table(tmp_path / "out")
    assert len(rows) == 2 * 4 and set(rows.subject) == {"A", "B", "C", "mean"}
    assert (rows.n[rows.subject != "mean"] == 60).all() and rows.p.between(0.01, 1).all()
    assert not rows.p_people[rows.subject == "mean"].isna().any()


def test_a_published_set_goes_through_its_config(tiny, tmp_path, warp):
    path, _ = tuckute(tmp_path, n=60)
    prepare(brainscore, root=path, out_dir=tmp_path)
    argv = options(tiny, tmp_path / "out", dataset=tmp_path / "Tuckute2024", head_dims=4)
    warp("config/warp_tuckute.yaml", *argv)
    fits = table(tmp_path / "out")
    assert set(fits.d) == {0, 4, 16, fits.D.max()} and (fits.roi == "lang_LH_netw").all()
    assert (fits.ceiling == 1).all() and not fits.synthetic.any()  # one repeat: raw


def test_digits_reach_most_of_their_accuracy_in_few_dimensions(tmp_path, warp):
    argv = ["widths=50", "dims=20,80,320", "seeds=1", "steps=100", "learning_rates=0.1"]
    argv += ["projection=dense", "eval_interval=50", "draws=50", "device=cpu"]
    warp(*argv, f"out_dir={tmp_path}", script=warp_intrinsic)
    fits = table(tmp_path).sort_values("d")
    assert fits.D.iloc[-1] == 6310 and fits.score.iloc[-1] > 0.93 and fits.score.iloc[0] < 0.65
    assert fits.score[:3].is_monotonic_increasing and (fits.chance < 0.15).all()
    assert 60 < table(tmp_path, "measure == 'd_warp absolute'").score.item() < 320


def test_the_simulation_bends_functions(tmp_path, warp):
    argv = ["dims=0,4,60", "seeds=1", "steps=90", "learning_rates=0.1", "draws=50", "device=cpu"]
    warp("config/warp_simulation.yaml", *argv, f"out_dir={tmp_path}", script=warp_intrinsic)
    r2 = table(tmp_path).pivot(index="model", columns="d", values="score")
    assert len(r2) == 3 and r2[60].min() > 0.6 > r2[0].max() and (r2[60] > r2[4]).all()
    assert (tmp_path / "simulation.png").exists()


def test_bad_input_ends_with_a_sentence(tiny, tmp_path, warp):
    y = np.random.default_rng(0).standard_normal((120, 3))
    good = brain(tmp_path / "good", y)
    cases = [
        ({"layers": "attn"}, "layers=attn"),
        ({"pool": "flatten"}, "pool=flatten is for images"),
        ({"dataset": brain(tmp_path / "few", y[:20])}, "too few stimuli"),
        ({"dataset": good, "n_folds": 1}, "too few stimuli"),
        ({"dataset": brain(tmp_path / "one", y[:, :1]), "objective": "rsa"}, "needs 3 units"),
        ({"dataset": good, "roi": "V1"}, "roi=V1"),
        ({"dataset": good, "subject": "M15"}, "subject=M15"),
        ({"models": "nosuch.py:make"}, "nosuch.py"),
        ({"models": "[{model: lm, toward: far}]"}, "toward teacher or random, not 'far'"),
        ({"models": "[{model: lm, modle: 1}]"}, "'modle'; did you mean 'model'"),
        ({"models": "lm,lm"}, "two are called 'lm'"),
        ({"head_dims": 500}, "head_dims=500"),
        ({"layer_groups": "blockz"}, "blockz.*core.transformer"),
        ({"layer_groups": "blocks", "dims": "0,2"}, "d=2.*2 scales"),
        ({"full": False}, "common=highest.*full=False"),
        ({"objective": "rsa", "n_folds": 4}, "objective=rsa with n_folds: .* give n_folds=0"),
        ({"head": "lasso"}, "head must be ridge or ols or pls or sgd"),
        ({"learning_rates": "[]"}, "learning_rates"),
    ]
    for i, (more, sentence) in enumerate(cases):
        with pytest.raises(InputError, match=sentence):
            warp(*options(tiny, tmp_path / f"out{i}", **more))
