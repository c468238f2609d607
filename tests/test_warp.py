"""warp.py against dense algebra, scikit-learn and naive loops; planted warps are found, shuffled responses never reach the score."""
import csv
import signal

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats
import torch
import torch.nn as nn
import yaml
from helpers import byte_tokenizer, refused, run
from test_brain_data import make, tuckute
from torch.func import functional_call

import warp as W
from configurator import configure
from data.stimuli import write_encoding
from data.tokens import state_of
from model import GPT, GPTConfig, lm_state, save_checkpoint
from warp import Config, FastfoodWrapper, Objective, Study

KINDS = ["fastfood", "fastfood_tensor", "srht", "onehot", "dense", "sparse"]


class Here:
    device = torch.device("cpu")


def net(seed=0, width=30):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 7))


def matrix(w):
    """P (D, d - m), column by column."""
    columns = []
    with torch.no_grad():
        for j in range(w.z.numel()):
            w.z.zero_()
            w.z[j] = 1
            columns.append(torch.cat([t.flatten() for t in w.tensors()]) - w.theta0)
        w.z.zero_()
    return torch.stack(columns, 1)


# ---- projections

@pytest.mark.parametrize("n", [1, 2, 8, 32, 128, 1024])
def test_the_transform_is_the_dense_one(n):
    x = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(n))
    dense = torch.tensor(scipy.linalg.hadamard(n), dtype=torch.float32)
    for largest in (2, 16, 64):
        assert torch.allclose(W.fwht(x, largest), dense @ x, atol=1e-3)
    assert torch.allclose(W.fwht(W.fwht(x)), n * x, rtol=1e-4, atol=1e-3)  # symmetric, its own inverse up to n


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_matrix(kind):
    model = net()
    w = FastfoodWrapper(model, 40, [["0"], ["2"]], kind, seed=3)
    P, sizes = matrix(w), [sum(p.numel() for p in layer.parameters()) for layer in (model[0], model[2])]
    x, generator = torch.randn(5, 20), torch.Generator().manual_seed(1)
    with torch.no_grad():
        w.z.copy_(torch.randn(38, generator=generator))
        w.scales.copy_(torch.tensor([0.7, 1.3]))
    w(x).square().sum().backward()
    z, scales = w.z.detach().clone().requires_grad_(), w.scales.detach().clone().requires_grad_()
    theta = w.theta0 + torch.cat([scales[i].expand(size) for i, size in enumerate(sizes)]) * (P @ z)  # layer 0 comes first
    pieces = dict(zip(w.names, (t.view(shape) for t, shape in zip(theta.split(w.sizes), w.shapes))))
    functional_call(model, pieces, (x,)).square().sum().backward()
    assert torch.allclose(w.z.grad, z.grad, rtol=1e-3, atol=1e-3) and torch.allclose(w.scales.grad, scales.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_have_norm_one_and_are_nested(kind):
    P = matrix(FastfoodWrapper(net(), 40, None, kind, seed=3))
    norm = P.norm(dim=0)
    if kind == "fastfood_tensor":  # a transform for each of 4 tensors; of z, the biases of 7 and 30 see the first 8 and 32
        assert np.allclose([norm[:8].mean(), norm[8:32].mean(), norm[32:].mean()], np.sqrt([4, 3, 2]), atol=0.1)
    else:
        assert torch.allclose(norm, torch.ones(40), atol=0.1)
    if kind in ("dense", "fastfood", "srht"):
        few = FastfoodWrapper(net(), 10, None, kind, seed=3, n=64)
        assert torch.allclose(matrix(few), P[:, :10], atol=1e-6)  # capacity grows with d by construction
    if kind in ("srht", "onehot"):
        Q = matrix(FastfoodWrapper(nn.Linear(64, 64, bias=False), 40, None, kind))  # whole blocks: orthogonal, exactly
        assert torch.allclose(Q.t() @ Q, torch.eye(40), atol=1e-5)
    assert not torch.allclose(P, matrix(FastfoodWrapper(net(), 40, None, kind, seed=4)))
    assert torch.equal(P, matrix(FastfoodWrapper(net(), 40, None, kind, seed=3)))


def test_fastfood_is_as_good_as_normal():
    w = FastfoodWrapper(nn.Linear(256, 256, bias=False), 32, None, "fastfood", seed=0)
    P = matrix(w)
    assert abs(P.mean()) < 1e-4 and scipy.stats.kstest(P[:, 0].numpy() * w.D ** 0.5, "norm").statistic < 0.02
    r = P.t() @ P - torch.eye(32)  # columns as far from orthogonal as normal ones are, about D^-1/2
    assert r.abs().max() < 5 * (2 / w.D) ** 0.5


# ---- the wrapper

def small_gpt(seed=0, **options):
    return GPT(GPTConfig(**{**dict(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16, bias=True), **options}), seed=seed).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_no_warp_is_the_model_exactly(kind):
    model, idx = small_gpt(), torch.randint(0, 257, (3, 7))
    want, before = model(idx).logits, {k: v.clone() for k, v in model.state_dict().items()}
    w = FastfoodWrapper(model, 50, [["transformer.h.0"], ["transformer.h.1"]], kind)
    assert torch.equal(w(idx).logits, want) and torch.equal(model(idx).logits, want)
    assert [name for name, _ in w.named_parameters()] == ["z", "scales"] and not w.state_dict().keys() - {"z", "scales"}
    assert w.z.numel() + w.scales.numel() == 50  # the scales are counted in d
    with torch.no_grad():
        w.z.normal_()
    assert not torch.equal(w(idx).logits, want)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing was written into the model
    fresh = small_gpt(seed=5)
    fresh.load_state_dict(w.merge())
    assert torch.equal(fresh(idx).logits, w(idx).logits)


def test_tied_heads_stay_tied():
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    w, idx = FastfoodWrapper(model, 20), torch.randint(0, 50, (2, 5))
    assert "lm_head.weight" not in w.names and w.D == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        w.z.normal_()
    state = w.merge()
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]) and not torch.equal(state["lm_head.weight"], model.lm_head.weight)
    want = w(idx).logits
    model.load_state_dict(state)
    assert torch.allclose(model(idx).logits, want, atol=1e-6)


def test_evaluation_mode_and_buffers_are_kept():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    w, x = FastfoodWrapper(model, 10).train(), torch.randn(8, 1, 6, 6) + 3
    first = w(x)
    assert torch.equal(first, w(x)) and not model.training and model[1].running_mean.abs().max() == 0
    w.double()
    assert w(x.double()).dtype == torch.float64 and model[1].running_mean.dtype == torch.float64


def test_groups_are_whole_names():
    model = nn.ModuleDict({"layer1": nn.Linear(4, 4), "layer10": nn.Linear(4, 4), "rest": nn.Linear(4, 4)})
    given = [["layer1"], ["layer10"]]
    w = FastfoodWrapper(model, 12, given)
    assert given == [["layer1"], ["layer10"]] and [(b - a, g) for a, b, g, _ in w.segments] == [(20, 0), (20, 1), (20, 2)]
    for groups, d, words in (([["layer"]], 12, "layer1"), ([["layer1"], ["layer1"]], 12, "two groups"), (given, 2, "2 scales"), (None, 61, "60 parameters")):
        with pytest.raises(ValueError, match=words):
            FastfoodWrapper(model, d, groups)


@pytest.mark.parametrize("kind", ["fastfood", "onehot", "dense"])
def test_fits_side_by_side_are_the_fits_alone(kind):
    def wrapper():
        return FastfoodWrapper(W.Reader(small_gpt(), ["1"], "mean", True), 32, None, kind, seed=2)

    inputs, dims = (torch.randint(0, 257, (3, 7)), torch.ones(3, 7, dtype=torch.bool)), [8, 32, 32]
    together = wrapper().start(3, dims)
    with torch.no_grad():
        together.z.normal_(generator=torch.Generator().manual_seed(0))
    got = together(*inputs)
    got.square().sum().backward()
    for k, d in enumerate(dims):
        alone, z = wrapper(), together.z[k].detach().clone()
        if kind == "onehot" and d < 32:
            z = z[torch.arange(32) % d] / (32 / d) ** 0.5
        else:
            z[d:] = 0
        with torch.no_grad():
            alone.z.copy_(z)
        out = alone(*inputs)
        assert torch.allclose(got[k], out, atol=1e-4)
        out.square().sum().backward()
        if kind != "onehot":
            assert torch.allclose(together.z.grad[k, :d], alone.z.grad[:d], rtol=1e-3, atol=1e-3) and not together.z.grad[k, d:].any()


# ---- objectives

def make_study(n=90, p=12, units=5, seed=0, groups=False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)).astype(np.float32)
    y = x @ rng.standard_normal((p, units)) + rng.standard_normal((n, units))
    group = np.repeat(np.arange(n // 3), 3) if groups else np.arange(n)
    rows = dict(train=np.arange(n // 3 * 2), val=np.arange(n // 3 * 2, n // 6 * 5), test=np.arange(n // 6 * 5, n))
    return torch.from_numpy(x), Study("vector", x, y, rows, group, None, dict(dataset="made up", synthetic=True))


def test_ridge_is_that_of_scikit_learn():
    from sklearn.linear_model import Ridge, RidgeCV
    alphas = [0.1, 1.0, 10.0, 100.0]
    for n, p in ((40, 10), (20, 50)):
        rng = np.random.default_rng(n)
        x, y = rng.standard_normal((n, p)), rng.standard_normal((n, 6)) + 3
        y[:, :3] += x[:, :3] * 4
        w, b, alpha = W.ridge(torch.from_numpy(x)[None], torch.from_numpy(y), alphas)
        theirs = RidgeCV(alphas, alpha_per_target=True).fit(x, y)  # leave one out
        assert np.array_equal(alpha[0], theirs.alpha_)
        assert np.allclose(w[0].T, theirs.coef_, atol=1e-6) and np.allclose(b[0], theirs.intercept_, atol=1e-6)
        w, b, _ = W.ridge(torch.from_numpy(x)[None], torch.from_numpy(y), torch.full((1, 6), 3.0))
        assert np.allclose(w[0].T, Ridge(3.0).fit(x, y).coef_, atol=1e-6)


def test_penalties_are_chosen_on_left_out_groups():
    from sklearn.linear_model import Ridge
    rng, alphas = np.random.default_rng(0), [0.01, 1.0, 30.0]
    group = np.repeat(np.arange(10), [1, 2, 3, 4, 5, 6, 1, 2, 3, 4])
    x = np.repeat(rng.standard_normal((10, 8)), np.bincount(group), 0) + 0.1 * rng.standard_normal((31, 8))
    y = x @ rng.standard_normal((8, 4)) + rng.standard_normal((10, 4))[group]
    naive = [np.mean(np.concatenate([(y[group == g] - Ridge(a).fit(x[group != g], y[group != g]).predict(x[group == g])) ** 2 for g in range(10)]), 0)
             for a in alphas]
    assert np.array_equal(W.ridge(torch.from_numpy(x)[None], torch.from_numpy(y), alphas, group)[2][0], np.array(alphas)[np.argmin(naive, 0)])


def test_no_warp_is_ridge_and_the_gradient_that_of_the_refitted_loss():
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    x, study = make_study()
    config = Config(head_dims=0, batch_size=1000, eval_interval=1)
    model = nn.Linear(12, 12)
    with torch.no_grad():
        model.weight.copy_(torch.eye(12))
        model.bias.zero_()
    train, test = study.rows["train"], study.rows["test"]
    objective = Objective(config, study, W.features(model, (x,), train, 1000))
    w = FastfoodWrapper(model, 9, copies=1)
    shown = W.fit(Here, config, w, objective, (x,), [9], [0.01], 0, 0)[0][1]
    sd = x[train].std(0, unbiased=True).numpy() / x[train].numpy().std(0)
    theirs = make_pipeline(StandardScaler(), RidgeCV(np.array(config.alphas), alpha_per_target=True)).fit(x[train].numpy() / 1, study.y[train])
    assert np.allclose(shown, theirs.predict(x[test].numpy()), atol=0.05) and np.allclose(sd, sd[0])
    objective.alpha = torch.full((1, 5), 2.0, dtype=torch.float64)

    def refitted(z):
        with torch.no_grad():
            w.z.copy_(z)
            f = w(x[train])
            objective.solve(f, train)
            return float(objective.loss(f, train))

    z = 0.3 * torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        w.z.copy_(z)
    _, grads = W.gradients(w, objective, (x,), train, [w.z], None, 1000, lambda f: objective.solve(f, train))
    for j in range(3):
        e = torch.zeros(1, 9)
        e[0, j] = 1e-2
        assert np.isclose((refitted(z + e) - refitted(z - e)) / 2e-2, grads[0][0, j], rtol=0.05, atol=2e-4)


@pytest.mark.parametrize("options", [dict(), dict(objective="rsa"), dict(objective="rsa", rdm="euclidean"), dict(objective="cka"), dict(head="sgd")])
def test_two_passes_are_one(options):
    x, study = make_study()
    config, model = Config(head_dims=0, **options), nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 6))
    train = study.rows["train"]
    objective = Objective(config, study, W.features(model, (x,), train, 1000))
    w = FastfoodWrapper(model, 20, [["0"]]).start(2, [10, 20])
    with torch.no_grad():
        w.z.normal_()
    head = [torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)] if objective.kind == "sgd" else None
    solve = (lambda f: objective.solve(f, train)) if objective.kind == "ridge" else (lambda f: None)
    params = [w.z, w.scales, *(head or [])]
    one, two = (W.gradients(w, objective, (x,), train, params, head, size, solve) for size in (1000, 7))
    assert torch.allclose(one[0], two[0], rtol=1e-4)
    assert all(torch.allclose(a, b, rtol=2e-3, atol=1e-5) for a, b in zip(one[1], two[1]))


def test_cka_is_the_formula_and_debiased():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 5)), rng.standard_normal((20, 8))

    def naive(x, y):
        n, one = len(x), np.ones(len(x))

        def hsic(a, b):
            k, l = a @ a.T, b @ b.T
            k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
            return (np.trace(k @ l) + one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ l @ one) / (n * (n - 3))
        return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))

    k, l = (W.gram(torch.from_numpy(v)) for v in (x, y))
    assert np.isclose(W.cka(k, l), naive(x, y)) and np.isclose(W.cka(k, k), 1)
    found = [float(W.cka(*(W.gram(torch.from_numpy(rng.standard_normal((32, 20)))) for _ in range(2)))) for _ in range(60)]
    assert abs(np.mean(found)) < 0.04  # the biased one is near 0.4 here


def test_only_what_is_fitted_is_shuffled():
    _, study = make_study()
    study.brain_rdm = W.distances(torch.from_numpy(study.y), "euclidean").numpy()
    config = Config(objective="rsa", rdm="crossnobis")
    true, shuffled = (Objective(config, study, torch.zeros(60, 1), rng) for rng in (None, np.random.default_rng(0)))
    assert np.array_equal(true.truth("test"), shuffled.truth("test")) and not np.array_equal(true.truth("train"), shuffled.truth("train"))
    assert np.allclose(np.sort(true.truth("train"), None), np.sort(shuffled.truth("train"), None))  # the distances of the same stimuli, elsewhere
    assert torch.allclose(W.distances(shuffled.y.double(), "euclidean").float()[:60, :60], shuffled.target[:60, :60], atol=1e-4)


def test_no_stimulus_is_twice_in_a_batch(monkeypatch):
    x, study = make_study()
    config, seen, real = Config(objective="cka", exact=False, batch_size=25, eval_interval=100), [], W.gradients
    monkeypatch.setattr(W, "gradients", lambda w, o, i, rows, *rest: (seen.append(rows), real(w, o, i, rows, *rest))[1])
    model = nn.Linear(12, 6)
    objective = Objective(config, study, W.features(model, (x,), study.rows["train"], 1000))
    W.fit(Here, config, FastfoodWrapper(model, 9, copies=1), objective, (x,), [9], [0.01], 0, 8)
    assert len(seen) == 8 and all(len(set(rows)) == 25 for rows in seen) and len(set(np.concatenate(seen))) == 60


def test_distances_are_those_of_scipy_and_soft_ranks_nearly_ranks():
    x = np.random.default_rng(0).standard_normal((10, 6))
    square = scipy.spatial.distance.squareform
    assert np.allclose(W.distances(torch.from_numpy(x), "correlation"), square(scipy.spatial.distance.pdist(x, "correlation")))
    assert np.allclose(W.distances(torch.from_numpy(x), "euclidean"), square(scipy.spatial.distance.pdist(x, "sqeuclidean")) / 6)
    v = torch.from_numpy(x[0])
    assert np.allclose(W.soft_ranks(v, 1e-4), scipy.stats.rankdata(x[0]), atol=1e-3)
    config = Config(objective="rsa", compare="spearman")
    a, b = (W.distances(torch.from_numpy(np.random.default_rng(s).standard_normal((12, 4)).cumsum(0)), "euclidean").numpy() for s in (1, 2))
    assert np.isclose(W.scores("rsa", config, a, b)[0], scipy.stats.spearmanr(W.upper(a), W.upper(b))[0])


def test_crossnobis_has_no_bias():
    rng, config = np.random.default_rng(0), Config(objective="rsa", rdm="crossnobis")
    stimulus = np.tile(np.arange(16), 4)
    y = 3 * rng.standard_normal((64, 50))  # noise alone: no two stimuli differ
    study = Study("text", None, None, dict(test=np.arange(16)), np.arange(16), None, {})
    W.pair_targets(config, study, y, stimulus)
    assert abs(W.upper(study.brain_rdm).mean()) < 0.1 and study.brain_rdm.shape == (16, 16)
    repeats = y.reshape(4, 16, 50) / pd.DataFrame(y).groupby(stimulus).var(ddof=1).to_numpy().mean(0) ** 0.5
    naive = np.mean([(repeats[a, 2] - repeats[a, 5]) @ (repeats[b, 2] - repeats[b, 5]) / 50 for a in range(4) for b in range(4) if a != b])
    assert np.isclose(study.brain_rdm[2, 5], naive)


def test_the_noise_ceiling_is_the_planted_one():
    rng = np.random.default_rng(0)
    signal, R = rng.standard_normal((300, 40)), 3
    y = np.tile(signal, (R, 1)) + np.sqrt(R * 0.4 / 0.6) * rng.standard_normal((300 * R, 40))
    assert abs(W.noise_ceiling(y, np.tile(np.arange(300), R)).mean() - 0.6) < 0.02
    assert W.noise_ceiling(y[:300], np.arange(300)) is None


def test_units_of_low_ceiling_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.standard_normal((90, 3))
    write_encoding(tmp_path / "published", pd.DataFrame(dict(text=[f"t{i}" for i in range(90)])), y, units=pd.DataFrame(dict(ceiling=[0.4, "", 0.01])),
                   modality="fMRI", species="human", source="made up", synthetic=True)
    write_encoding(tmp_path / "repeats", pd.DataFrame(dict(text=[f"t{i}" for i in range(90)])), np.vstack([y + [0.1, 50, 0.1] * rng.standard_normal((90, 3))
                                                                                                      for _ in range(3)]),
                   pd.DataFrame(dict(stimulus=np.tile(np.arange(90), 3))), modality="fMRI", species="human", source="made up", synthetic=True)
    Here.dataset = staticmethod(lambda name: name)
    for name, kept in (("published", [0, 1]), ("repeats", [0, 2])):
        study = W.read_study(Here, Config(dataset=tmp_path / name, reliable=0.3))
        assert study.y.shape == (90, 2) and np.allclose(study.y / study.y.std(), y[:, kept] / y[:, kept].std(), atol=0.6), name
        assert np.isclose(study.y[study.rows["train"]].std(0).mean(), 1)


def test_weighted_scores_are_those_of_the_resampled_set():
    rng = np.random.default_rng(0)
    y, at = rng.standard_normal((30, 3)), rng.integers(0, 30, 30)
    p = y + rng.standard_normal((30, 3))
    weights = np.bincount(at, minlength=30)[None]
    for metric in ("r", "r2"):
        config = Config(metric=metric)
        assert np.isclose(W.scores("ridge", config, p, y, weights)[0], W.scores("ridge", config, p[at], y[at])[0])
    assert np.isclose(W.scores("ridge", Config(), p, y)[0], np.median([np.corrcoef(p[:, v], y[:, v])[0, 1] for v in range(3)]))
    assert np.isclose(W.scores("ridge", config, 1e-6 * p + 3, 1e-6 * y + 3)[0], W.scores("ridge", config, p, y)[0])  # volts
    assert W.scores("ridge", Config(), np.ones((30, 3)), y)[0] == 0  # a constant prediction is no correlation, and no NaN


# ---- d_warp

def test_d_warp_of_known_curves():
    dims = [0, 9, 99, 999]
    assert W.crossing(dims, [0.2, 0.4, 0.6, 0.8], 0.2) == 0 and np.isclose(W.crossing(dims, [0.2, 0.4, 0.6, 0.8], 0.6), 99)
    assert np.isclose(W.crossing(dims, [0.2, 0.4, 0.6, 0.8], 0.5), 10 ** 1.5 - 1) and W.crossing(dims, [0.2, 0.4, 0.6, 0.8], 0.81) == np.inf
    assert np.isclose(W.crossing(dims, [0.2, 0.5, 0.3, 0.8], 0.4), 9)  # isotonic: what falls is pooled
    rng, B = np.random.default_rng(0), 200
    point = {"near": np.array([[0.5, 0.7, 0.8, 0.8]] * 3), "far": np.array([[0.3, 0.4, 0.6, 0.8]] * 3), "never": np.array([[0.1, 0.1, 0.1, 0.1]] * 3)}
    drawn = {m: p[:, :, None] + 0.01 * rng.standard_normal((3, 4, B)) for m, p in point.items()}
    full = {m: np.full(3, 0.8) for m in ("near", "far")}
    rest = full, {m: f[:, None] + np.zeros((3, B)) for m, f in full.items()}, Config(common="highest", common_share=0.9), rng.integers(0, 3, (B, 3))
    found = W.measure_d_warp(dims, point, drawn, *rest)
    assert found["near"]["absolute"] < found["far"]["absolute"] < np.inf == found["never"]["absolute"]
    assert W.interval(found["near"]["absolute draws"])[1] < W.interval(found["far"]["absolute draws"])[0]
    assert W.interval(found["never"]["absolute draws"])[0] == np.inf and found["far"]["p"] < 0.01 and found["near"]["auc"] > found["far"]["auc"]
    assert np.isclose(found["near"]["relative"], W.crossing(dims, point["near"][0], 0.5 + 0.9 * 0.3))
    found = W.measure_d_warp(dims[1:], {m: p[:, 1:] for m, p in point.items()}, {m: p[:, 1:] for m, p in drawn.items()}, *rest)
    assert np.isclose(found["far"]["relative"], W.crossing(dims, point["far"][0], 0.9 * 0.8))  # without d = 0: the share of the full score, as published


# ---- models

OWN = "import torch.nn as nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())\n"


def test_hugging_face_and_own_models_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    from PIL import Image
    rng = np.random.default_rng(0)
    files = []
    for i in range(4):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 255, (20, 20), dtype=np.uint8)).save(files[-1])  # grey: converted
    vit = transformers.ViTModel(transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16,
                                                       patch_size=8))
    resnet = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"))
    vit.save_pretrained(tmp_path / "vit")
    resnet.save_pretrained(tmp_path / "resnet")
    (tmp_path / "own.py").write_text(OWN.replace("nn.ReLU()", "nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3)"))
    study = Study("image", files, None, {}, None, None, {})
    for spec, layer, pool, width in ((tmp_path / "vit", "2", "mean", 16), (tmp_path / "vit", "0", "first", 16), (tmp_path / "resnet", "1", "mean", 4),
                                     (tmp_path / "resnet", "encoder.stages.1", "flatten", 8 * 4), (f"{tmp_path / 'own.py'}:make", "2", "mean", 5)):
        config = Config(layers=[layer], pool=pool, image_size=16)
        reader, inputs, about = W.build(Here, config, str(spec), study, 0)
        f = W.features(reader, inputs, range(4), 3)
        assert f.shape == (4, width) and about["architecture"]
        w = FastfoodWrapper(reader, 8)
        assert torch.equal(w(*inputs), reader(*inputs)) and not any(m.training for m in reader.modules())
        if ".py:" in str(spec):
            assert w.D == 3 * 5 * 9 + 5 + 10  # what lies above the layer is no part of theta
            want = reader.core[:3](inputs[0]).mean((2, 3))
            assert torch.allclose(f, want, atol=1e-6)
        if layer == "2" and pool == "mean" and "vit" in str(spec):
            assert torch.allclose(f, vit.eval()(inputs[0], output_hidden_states=True).hidden_states[2].mean(1), atol=1e-5)
    with pytest.raises(ValueError, match="no layer 'layer9'; there are 0 to 2, embeddings"):
        W.build(Here, Config(layers=["layer9"]), str(tmp_path / "vit"), study, 0)


def test_texts_are_pooled_over_their_own_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]))
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                                                          max_position_embeddings=16)).eval()
    bert.save_pretrained(tmp_path / "bert")
    transformers.BertTokenizer(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    texts = ["a b", "c", "a b c b"]
    for pool, pick in (("mean", lambda h, n: h[1:1 + n].mean(0)), ("last", lambda h, n: h[n])):
        reader, inputs, about = W.build(Here, Config(layers=["1"], pool=pool), str(tmp_path / "bert"), Study("text", texts, None, {}, None, None, {}), 0)
        assert about["training_task"] == "masked language modelling"
        for i, text in enumerate(texts):
            n = len(text.split())
            ids = torch.tensor([[2, *(5 + "abc".index(w) for w in text.split()), 3]])
            want = pick(bert(ids, output_hidden_states=True).hidden_states[1][0], n)
            assert torch.allclose(reader(*(t[i:i + 1] for t in inputs))[0], want, atol=1e-5)


def test_what_is_read_before_a_stimulus_is_not_pooled():
    class Letters:
        eot = 0

        def encode(self, text):
            return [ord(c) for c in text]

    ids, mask = W.our_tokens(Letters(), ["ab cd", "xyz", "abcdefgh"], 6, [2, 0, 7])
    assert [[chr(i) for i in row[own]] for row, own in zip(ids, mask)] == [[" ", "c", "d"], ["x", "y", "z"], ["h"]]
    assert ids[2].tolist() == [0, *map(ord, "defgh")]  # too long: the beginning goes


# ---- the script

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny language model, phrases, and options of a sweep of seconds."""
    folder = tmp_path_factory.mktemp("warp")
    model = small_gpt(seed=1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)  # untrained weights are nearly linear
    save_checkpoint(folder / "lm.pt", dict(**lm_state(model), tokenizer=state_of(byte_tokenizer())))
    (folder / "phrases").mkdir()
    rng = np.random.default_rng(0)
    texts = sorted({"".join(rng.choice(list("abcdefgh"), 4)) for _ in range(160)})
    with open(folder / "phrases/stimuli.csv", "w", newline="") as f:
        csv.writer(f).writerows([["text", "group"], *([t, t[:3]] for t in texts)])
    (folder / "phrases/meta.yaml").write_text("format: synthetic_brain-1\n")
    return folder


def options(made, out, **more):
    given = dict(lm=made / "lm.pt", planted_stimuli=made / "phrases", models="lm", layers=2, head_dims=8, planted_components=8, planted_units=20,
                 dims="0,4,16,64", seeds=1, steps=60, learning_rates="0.02,0.06", draws=50, device="cpu", baselines=False,
                 shuffled=False, fits_per_batch=8, out_dir=out) | more
    return [f"{k}={v}" for k, v in given.items()]


@pytest.fixture
def warp():
    """A run of the script in this process, which is quicker; signals are given back."""
    old = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield lambda *given: W.main(configure(Config, [str(g) for g in given]))
    for number, handler in old.items():
        signal.signal(number, handler)


def table(folder):
    return pd.read_csv(folder / "results.csv")


def planted(alpha, k=0, n=160, noise=0.3):
    """A tiny GPT as reader, its stimuli, the responses of its warped self (in the first k columns of P, or anywhere), and the P."""
    model = small_gpt(seed=1, block_size=4, vocab_size=12, n_layer=1, n_embd=8, bias=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(10)  # untrained weights are nearly linear
    reader, rng = W.Reader(model, ["1"], "last", True).eval(), np.random.default_rng(0)
    inputs = (torch.from_numpy(rng.integers(0, 12, (n, 4))), torch.ones(n, 4, dtype=torch.bool))
    w, other = FastfoodWrapper(reader, 64, seed=0), FastfoodWrapper(reader, 800, projection="dense", seed=9)
    wanted = w if k else other
    with torch.no_grad():
        wanted.z[:k or 800] = torch.randn(k or 800, generator=torch.Generator().manual_seed(3))
        wanted.z *= alpha * w.theta0.norm() / wanted.z.norm()
        f = wanted(*inputs).double().numpy()
        wanted.z.zero_()
    y = (f - f.mean(0)) @ rng.standard_normal((f.shape[1], 16))
    y = y / y.std(0) + noise * rng.standard_normal(y.shape)
    rows = dict(train=np.arange(n * 5 // 8), val=np.arange(n * 5 // 8, n * 3 // 4), test=np.arange(n * 3 // 4, n))
    return reader, inputs, Study("text", None, y, rows, np.arange(n), None, {}), w


def curve(reader, inputs, study, w, dims, shuffle=None, steps=80, rates=(0.03, 0.1)):
    """Test scores over dims, the rate chosen on validation."""
    config = Config(head_dims=0, eval_interval=20)
    f0 = W.features(reader, inputs, study.rows["train"], 1000)
    objective, truth = Objective(config, study, f0, shuffle), Objective(config, study, f0).truth("test")
    jobs = [(d, rate) for d in dims if d for rate in rates]
    fits = W.fit(Here, config, w, objective, inputs, [d for d, _ in jobs], [r for _, r in jobs], 0, steps)
    best = {d: max((f for f, (e, _) in zip(fits, jobs) if e == d), key=lambda f: f[0]) for d in dims if d}
    best[0] = W.fit(Here, config, w, objective, inputs, [w.d], [0.0], 0, 0)[0]
    return [W.scores("ridge", config, best[d][1], truth)[0] for d in dims]


def test_a_warp_planted_in_k_columns_is_found_in_k_dimensions():
    dims = [0, 2, 4, 64]
    reader, inputs, study, w = planted(0.4, k=4)
    found = curve(reader, inputs, study, w, dims)
    assert found[0] < 0.8 and found[2] > 0.93 and 2 < W.crossing(dims, found, 0.9) <= 4, found
    never = curve(reader, inputs, study, w, dims, np.random.default_rng(0))
    assert max(never) < 0.5 and W.crossing(dims, never, 0.9) == np.inf, never


def test_d_warp_rises_with_the_planted_warp():
    dims, found = [0, 4, 16, 64], []
    for alpha in (0, 0.25, 0.6):
        found.append(W.crossing(dims, curve(*planted(alpha), dims), 0.9))
    assert found[0] == 0 < found[1] < found[2], found


def test_candidates_lie_on_the_line_that_they_name(made):
    config, study = Config(lm=str(made / "lm.pt"), planted_warp=0.5), Study("text", ["ab", "abc"], None, {}, None, None, {})

    def theta(spec, seed=0):
        return torch.cat([p.detach().flatten() for p in W.build(Here, config, spec, study, seed)[0].parameters() if p.requires_grad])

    lm, teacher, random = theta("lm"), theta("teacher"), theta("lm~random")
    assert torch.isclose((teacher - lm).norm(), 0.5 * lm.norm(), rtol=1e-3) and torch.equal(theta("lm@0"), teacher) and torch.equal(theta("lm@1"), lm)
    assert torch.allclose(theta("lm@2") - lm, lm - teacher, atol=1e-5)
    assert torch.allclose(theta("teacher~0.25"), teacher.lerp(theta("teacher~random"), 0.25), atol=1e-5)
    assert not torch.equal(theta("lm~random", 1), random)
    config.seed = 7  # draws all of it anew
    assert not torch.equal(theta("lm~random"), random) and not torch.equal(theta("teacher"), teacher)


SWEEP = dict(steps=3, learning_rates="0.02", dims="0,4,16", seeds=2, fits_per_batch=1, eval_interval=2)
# dies when its third fit is done
KILLED = """
import os, signal
import configurator
real, done = configurator.Run.result, []
def result(self, *args, **keys):
    real(self, *args, **keys)
    done.append(1)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
configurator.Run.result = result
"""


def test_a_stopped_sweep_goes_on_and_two_ranks_are_one(made, tmp_path):
    more = dict(SWEEP, shuffled=True, baselines=True)
    run("warp", *options(made, tmp_path / "whole", **more))
    run("warp", *options(made, tmp_path / "killed", **more), patch=KILLED, status=-signal.SIGKILL)
    assert not (tmp_path / "killed/results.csv").exists()
    run("warp", *options(made, tmp_path / "killed", **more))
    run("warp", *options(made, tmp_path / "two", **more), ranks=2)
    keys, want = ["measure", "model", "d", "seed", "control", "objective"], table(tmp_path / "whole")
    for name in ("killed", "two"):
        got = table(tmp_path / name)
        both = want.merge(got, on=keys)
        assert len(got) == len(want) == len(both) and np.allclose(both.score_x, both.score_y, atol=1e-4), name
    assert len(list((tmp_path / "two").glob("results.part-*.jsonl"))) == 2
    assert {"architecture", "layer", "training_task", "pretraining_data", "dataset", "roi", "species", "modality", "objective", "d", "seed", "score", "ceiling",
            "normalised", "chance", "low", "high", "n"} <= set(want)
    assert want[["score", "chance", "low", "high", "n"]].notna().all().all() and set(want.control.dropna()) == {"none", "shuffled"}
    assert {p.name for p in (tmp_path / "whole").glob("*.png")} == {"curves.png", "training.png"}
    assert {"ols", "pls", "ridge"} <= set(want.objective)


def test_what_no_fit_depends_on_fits_nothing_again(made, tmp_path, warp, monkeypatch):
    fits, seeds, real, wrap = [], [], W.fit, W.FastfoodWrapper
    monkeypatch.setattr(W, "fit", lambda *given: (fits.append(given[5]), real(*given))[1])
    monkeypatch.setattr(W, "FastfoodWrapper", lambda *given, **keys: (seeds.append(given[4:]), wrap(*given, **keys))[1])
    more = dict(SWEEP, seeds=1, dims="0,16")
    warp(*options(made, tmp_path, **more))
    assert len(fits) == 3 and ((1337, 0),) in seeds  # d = 0, 16 and all; P is drawn from the seed
    warp(*options(made, tmp_path, **more | dict(common="lowest", common_share=0.5, reach=0.5, draws=20), about="{training_task: reading}"))
    assert len(fits) == 3
    rows = table(tmp_path)
    assert (rows.query("measure == 'score'").training_task == "reading").all() and (rows.query("measure == 'd_warp absolute'").n == 20).all() and len(
        rows.query("measure == 'd_warp absolute'")) == 1  # nothing of the earlier options is left in the table
    warp(*options(made, tmp_path, **more | dict(seeds=2)))
    assert len(fits) == 6  # those of the second draw


@pytest.mark.parametrize("more", [
    dict(objective="rsa"), dict(objective="rsa", compare="spearman", rdm="crossnobis"), dict(objective="cka", exact=False, batch_size=32), dict(head="sgd"),
    dict(objective="linear_first", head_fit="pls", layers="1,2", layer_groups="blocks", projection="onehot")],
                         ids=lambda m: "-".join(map(str, m.values())))
def test_every_objective_runs(made, tmp_path, warp, more):
    warp(*options(made, tmp_path, **dict(SWEEP, seeds=1, dims="0,16", full=False, common=0.5), **more))
    rows = table(tmp_path)
    fits = rows[rows.measure == "score"]
    assert fits.score.between(-0.5, 1).all() and (fits.score > 0.1).any() and set(fits.d) == {0, 16}


def test_digits_reach_most_of_their_accuracy_in_few_dimensions(tmp_path, warp):
    warp("task=classification", "dataset=digits", "models=mlp:50", "dims=20,80,320", "seeds=1", "steps=200", "learning_rates=0.1", "projection=dense",
        "common=lowest", "common_share=0.9", "eval_interval=50", "draws=50", f"out_dir={tmp_path}", "device=cpu", "batch_size=2000", "fits_per_batch=1")
    rows = table(tmp_path)
    fits = rows[rows.measure == "score"].sort_values("d")
    assert fits.D.iloc[0] == 6310 and fits.score.iloc[-1] > 0.95 and fits.score.iloc[0] < 0.6 and fits.score.is_monotonic_increasing
    assert 80 < rows.query("measure == 'd_warp absolute'").score.item() < 320 and (fits.chance < 0.12).all()


def test_sentences_and_image_folders_are_classified(made, tmp_path, warp):
    from helpers import make_sentences
    from PIL import Image
    make_sentences(tmp_path / "sentences")
    common = dict(task="classification", full=False, common=0.6, **dict(SWEEP, seeds=1, dims="0,16"))
    warp(*options(made, tmp_path / "text", dataset=tmp_path / "sentences", sentences="letter", **common))
    rng = np.random.default_rng(0)
    for name, shade in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray((shade + rng.integers(0, 40, (8, 8, 3))).astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "own.py").write_text(OWN)
    image = dict(dataset=tmp_path / "images", models=f"{tmp_path / 'own.py'}:make", layers="1", pool="mean", image_size=8)
    warp(*options(made, tmp_path / "image", **image, **common))
    make("digits", out_dir=tmp_path / "digits")  # a prepared set of images
    warp(*options(made, tmp_path / "prepared", **image | dict(dataset=tmp_path / "digits", samples=200), **common | dict(common=0.2)))
    for name in ("text", "image", "prepared"):
        fits = table(tmp_path / name).query("measure == 'score'")
        assert len(fits) == 2 and fits.score.between(0, 1).all() and (fits.objective == "classification").all()


def test_a_published_set_goes_through_its_config(made, tmp_path, warp):
    path, _ = tuckute(tmp_path, n=60)
    make("brainscore", root=path, out_dir=tmp_path)
    warp("config/warp_tuckute.yaml", f"dataset={tmp_path / 'Tuckute2024'}", f"models={made / 'lm.pt'}", "layers=2", "head_dims=4", "dims=0,5,16", "seeds=1",
         "steps=3", "eval_interval=2", "learning_rates=0.02", "draws=20", "fits_per_batch=1", "device=cpu", f"out_dir={tmp_path / 'out'}")
    rows = table(tmp_path / "out")
    fits = rows.query("measure == 'score'")
    assert set(fits.d) == {0, 5, 16, fits.D.iloc[0]} and (fits.roi == "lang_LH_netw").all() and (fits.species == "human").all() and not fits.synthetic.any()
    assert fits.score.between(-1, 1).all() and (fits.ceiling == 1).all()  # one repeat, no published ceiling: raw
    assert set(rows.query("measure == 'baseline'").objective) == {"ols", "pls", "ridge"} and (tmp_path / "out/curves.png").exists()


def test_the_simulation_bends_functions(tmp_path, warp):
    warp("config/warp_simulation.yaml", "dims=0,4,60", "seeds=1", "steps=120", "learning_rates=0.1", f"out_dir={tmp_path}", "device=cpu", "draws=50")
    r2 = table(tmp_path).query("measure == 'score'").pivot(index="model", columns="d", values="score")
    assert len(r2) == 3 and r2[60].min() > 0.6 > r2[0].max() and (r2[60] > r2[4]).all() and (tmp_path / "simulation.png").exists()
    x = W.read_functions(Config()).stimuli[-1000:]
    with np.load(next((tmp_path / "fits").rglob("x%C2%B2-none-0-fastfood-0.npz"))) as f:  # the candidate is its function
        assert np.abs(f["evidence"] - x ** 2)[abs(x) < 1].mean() < 0.1


def test_bad_input_ends_with_a_sentence(made, tmp_path, warp):
    def brain(name, n=120, nan=False, group=None):
        folder, rng = tmp_path / name, np.random.default_rng(0)
        stimuli = pd.DataFrame(dict(text=[f"{'abcdefgh'[i % 8]}{i}" for i in range(n)]))
        if group:
            stimuli["group"] = group
        y = rng.standard_normal((n, 3))
        write_encoding(folder, stimuli, y, modality="fMRI", species="human", source="made up", synthetic=True)
        if nan:
            y = y.astype("<f4")
            y[7, 1] = np.nan
            np.save(folder / "responses.npy", y)
        return folder

    good, out = brain("good"), tmp_path / "out"
    cases = [(dict(dims=10 ** 9), ["d=1000000000", "parameters"]),
             (dict(layers="7"), ["no layer '7'", "0 to 2", "layer.0.attn"]),
             (dict(dataset=brain("nan", nan=True)), ["responses.npy", "unit 1", "presentation 7", "nan"]),
             (dict(dataset=brain("few", n=20)), ["too few stimuli", "train"]),
             (dict(dataset=brain("one", group="all")), ["too few stimuli", "1 groups"]),
             (dict(dataset=good, roi="V1"), ["roi=V1"]),
             (dict(dataset=tmp_path / "nosuch"), ["nosuch"]),
             (dict(models="lm~far"), ["lm~far", "~random"]),
             (dict(models="out/nosuch"), ["nosuch", "python train.py"]),
             (dict(models="nosuch.py:make"), ["nosuch.py"]),
             (dict(head_dims=500), ["head_dims=500"]),
             (dict(layer_groups="blockz"), ["blockz", "core.transformer"]),
             (dict(layer_groups="blocks", dims="0,2"), ["d=2", "2 scales"]),
             (dict(full=False), ["common=highest", "full=False"]),
             (dict(planted_k=16), ["planted_k=16", "dims"]),
             (dict(task="simulation", full=False, common=0.9), ["'lm' is no function", "x²"]),
             (dict(learning_rates="[]"), ["learning_rates"]),
             (dict(dataset=good, objective="rsa", rdm="crossnobis"), ["crossnobis", "twice"])]
    for i, (more, says) in enumerate(cases):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            warp(*options(made, out / str(i), **dict(SWEEP, seeds=1) | more))
        assert all(words in str(error.value) for words in says), str(error.value)
    meta = yaml.safe_load((good / "meta.yaml").read_text())
    (good / "meta.yaml").write_text(yaml.safe_dump(meta | {"format": "encoding-9"}))
    refused("warp", *options(made, out, dataset=good), says=["encoding-9", "meta.yaml"])
