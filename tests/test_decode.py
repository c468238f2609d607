"""decode.py against naive oracles and planted truth: stacks equal single models, windows equal slices, scores equal scikit-learn's, leaks are caught."""
import copy
import signal

import mne
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.linear_model
import sklearn.metrics
import torch
import torch.nn as nn
import yaml
from helpers import byte_tokenizer, make_podcast, run
from test_model import small
from torch.nn import functional as F

import decode as D
import configurator
from configurator import Run, configure, key_seed
from data.recording import Recording
from data.tokens import state_of
from decode import Config
from model import EncoderConfig, NeuralEncoder, lm_state, load_encoder, save_checkpoint


@pytest.fixture(scope="session")
def podcast(tmp_path_factory):
    return make_podcast(tmp_path_factory.mktemp("podcast") / "set")


FAST = dict(lags=[-300.0, 300.0], n_folds=3, n_shifts=100, pca=6, epochs=3, model_params=dict(num_models=2, conv_filters=8), min_count=2, save_models=False,
            controls=["mean", "unigram"], device="cpu")


def sweep(podcast, out, **options):
    """A Sweep in this process, its run closed."""
    config = Config(**{**copy.deepcopy(FAST), "dataset": str(podcast), "out_dir": str(out), **options})
    configurator.check(config)
    run = Run(config)
    try:
        return D.Sweep(run, config)
    finally:
        run.close()


def finished(podcast, out, figures=False, **options):
    """lags.csv of a whole run in this process, by (model, metric, lag)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_lags", "plot_electrodes") if not figures else ():  # half of the time of a run that is this small
            patch.setattr(D, name, lambda *args: None)
        return whole(podcast, out, **options)


def whole(podcast, out, **options):
    config = Config(**{**copy.deepcopy(FAST), "dataset": str(podcast), "out_dir": str(out), **options})
    configurator.check(config)
    D.main(config)
    return pd.read_csv(out / "lags.csv").set_index(["model", "metric", "lag"]).sort_index()


# ---- stacks

class Plain(nn.Module):
    """The convolutional decoder as one writes it down."""

    def __init__(self, E, W, out, head):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(E, W, 3, bias=False), nn.Conv1d(W, W, 2, bias=False), nn.Conv1d(W, W, 2)
        self.bn = nn.ModuleList([nn.BatchNorm1d(W) for _ in range(3)])
        self.linear, self.ln, self.head = nn.Linear(W, out), nn.LayerNorm(out), head

    def forward(self, x):
        x = F.max_pool1d(self.bn[0](F.relu(self.conv1(x))), 2, 2, 1)
        x = self.bn[1](F.relu(self.conv2(x)))
        x = self.linear(F.relu(self.bn[2](self.conv3(x))).amax(2))
        return {"tanh_ln": lambda: self.ln(torch.tanh(x)), "ln_tanh": lambda: torch.tanh(self.ln(x)), "linear": lambda: x}[self.head]()


def copied(stack, j, m):
    """The plain model with the weights of one member of one job."""
    plain = Plain(stack.E, stack.W, stack.D, stack.head)
    with torch.no_grad():
        for conv, w in ((plain.conv1, stack.conv1[j, m]), (plain.conv2, stack.conv2[j, m]), (plain.conv3, stack.conv3[j, m, 0])):
            conv.weight.copy_(w.transpose(1, 2))
        plain.conv3.bias.copy_(stack.bias3[j, m, 0, :, 0])
        plain.linear.weight.copy_(stack.linear[j, m].t())
        plain.linear.bias.copy_(stack.bias[j, m, 0])
        for k in range(3):
            plain.bn[k].weight.copy_(stack.scales[k][j, m])
            plain.bn[k].bias.copy_(stack.shifts[k][j, m])
    return plain


def pitom(J, M, E=7, T=10, out=5, p=None):
    keys = [(0, "test", j) for j in range(J)]
    return D.Pitom(J, M, E, T, out, dict(conv_filters=6, dropout=0.0, **(p or {})), D.drawer(keys, None, "torch"))


@pytest.mark.parametrize("T", [6, 9, 10])
@pytest.mark.parametrize("head", ["tanh_ln", "ln_tanh", "linear"])
def test_a_stack_is_its_single_models(T, head):
    torch.manual_seed(0)
    stack = pitom(2, 3, T=T, p=dict(head=head))
    x, y = torch.randn(2, 4, 7, T), torch.randn(2, 4, 5)
    singles = [[copied(stack, j, m) for m in range(3)] for j in range(2)]
    for train in (True, False):
        stack.train(train)
        out = stack(x)
        for j in range(2):
            for m in range(3):
                assert torch.allclose(out[j, m], singles[j][m].train(train)(x[j]), atol=1e-5)
    stack.train()
    (stack(x) - y[:, None]).square().mean((2, 3)).sum().backward()
    for j in range(2):
        for m in range(3):
            one = singles[j][m].train()
            F.mse_loss(one(x[j]), y[j]).backward()
            assert torch.allclose(stack.conv1.grad[j, m], one.conv1.weight.grad.transpose(1, 2), atol=1e-5)
            assert torch.allclose(stack.conv2.grad[j, m], one.conv2.weight.grad.transpose(1, 2), atol=1e-5)
            assert torch.allclose(stack.scales[0].grad[j, m], one.bn[0].weight.grad, atol=1e-5)
            assert torch.allclose(stack.mean1[j, m], one.bn[1].running_mean, atol=1e-5) and torch.allclose(stack.var2[j, m], one.bn[2].running_var, atol=1e-5)


def test_it_has_the_published_number_of_parameters():
    for local, published in ((False, 143_254), (True, 209_046)):  # podcast-benchmark's; with the original's locally connected layer
        model = D.Pitom(1, 1, 183, 10, 50, dict(local=local), D.drawer([(0,)], None, "torch"))
        assert sum(p.numel() for p in model.parameters()) == published


def test_the_locally_connected_layer_has_its_own_weights_at_every_time():
    stack = pitom(1, 1, p=dict(local=True)).eval()
    with torch.no_grad():
        stack.conv3.copy_(stack.conv3[:, :, :1].expand_as(stack.conv3))  # alike everywhere, it is a convolution
        stack.bias3.copy_(stack.bias3[:, :, :1].expand_as(stack.bias3))
        x = torch.randn(1, 3, 7, 10)
        assert torch.allclose(stack(x)[0, 0], copied(stack, 0, 0).eval()(x[0]), atol=1e-5)
        before = stack(x).clone()
        stack.conv3[:, :, 1] += 1
        assert not torch.allclose(stack(x), before, atol=1e-3)


def test_dropout_masks_belong_to_the_job_not_to_the_stack():
    draws = lambda names: [np.random.SFC64(key_seed(n)) for n in names]
    both = D.keep_mask(draws("ab"), (2, 300, 40), 0.25, "cpu")
    alone = D.keep_mask(draws("b"), (1, 300, 40), 0.25, "cpu")
    assert torch.equal(both[1:], alone) and abs(both.float().mean() - 0.75) < 0.01 and not torch.equal(both[0], both[1])


@pytest.mark.parametrize("model", ["ensemble_pitom_model", "independent_pitom_model", "foundation_mlp"])
def test_jobs_trained_together_are_jobs_trained_alone(podcast, tmp_path, model):
    s = sweep(podcast, tmp_path, model=model, epochs=6, patience=1, model_params=dict(num_models=2, conv_filters=8, dropout=0.25))  # some stop, and make room
    X = s.windows.at([0, 1], s.rows)
    jobs = [D.Job(s.lags[l], l, s.folds[k], s.Y[k], *D.input_scale(s.config, X[l], s.folds[k], s.target, s.Y[k])) for l, k in ((0, 0), (1, 0), (1, 2))]
    fit = lambda part: D.train_stack(s.run, s.config, model, s.target, torch.from_numpy(X), part, s.windows.names, s.folds)
    together, alone = fit(jobs), [fit([job])[0] for job in jobs]
    assert len({t[2] for t in together}) > 1  # they did not all stop at the same epoch
    for a, b in zip(together, alone):
        assert a[2] == b[2] and np.allclose(a[1], b[1], atol=1e-5) and np.allclose(a[0], b[0], atol=1e-5)


def test_members_are_averaged_before_the_loss_or_each_has_its_own():
    out, y = torch.randn(2, 3, 4, 5), torch.randn(2, 4, 5)
    joint = D.losses(Config(), "vectors", True, out, y, None, None, None)
    own = D.losses(Config(), "vectors", False, out, y, None, None, None)
    assert torch.isclose(joint, sum(F.mse_loss(out[j].mean(0), y[j]) for j in range(2)))
    assert torch.isclose(own, sum(F.mse_loss(out[j, m], y[j]) for j in range(2) for m in range(3)))


def test_infonce_does_not_push_from_the_same_word():
    out, y = torch.randn(1, 1, 4, 5), torch.randn(1, 4, 5)
    words = torch.tensor([0, 1, 0, 2])
    same = (words[:, None] == words)[None]
    scale = torch.tensor([1.3])
    logits = F.normalize(out[0, 0], dim=-1) @ F.normalize(y[0], dim=-1).T * np.exp(1.3)
    wanted = 0.0
    for i in range(4):
        others = [j for j in range(4) if j == i or words[j] != words[i]]
        wanted -= (logits[i, i] - logits[i, others].logsumexp(0)) / 4
    assert torch.isclose(D.losses(Config(loss="infonce"), "vectors", True, out, y, same, scale, None), wanted)


# ---- windows and targets

def test_windows_of_cumulative_sums_are_slices(podcast):
    r = Recording(podcast / "sub-01")
    rows, edges = np.array([100, 107, 4000, 5000]), np.array([0, 3, 6, 10])
    got = D.lag_windows(r.signal, np.array([4, 0, 2]), rows, [-20, 0, 31], edges)
    for l, offset in enumerate((-20, 0, 31)):
        for n, row in enumerate(rows):
            window = r.signal[row + offset:row + offset + 10][:, [4, 0, 2]].astype(float)
            naive = np.stack([window[a:b].mean(0) for a, b in zip(edges, edges[1:])], 1)
            assert np.allclose(got[l, n], naive, rtol=1e-6)


def test_windows_are_mne_epochs_and_published_bins(podcast, tmp_path):
    s = sweep(podcast, tmp_path, window=0.25, preprocess="preprocess_neural_data", preprocessor_params=dict(num_average_samples=4), subjects=["1"])
    r, picks = s.data.parts[0]
    raw = mne.io.RawArray(r.signal[:, picks].T.astype(float), mne.create_info(len(picks), r.sfreq), first_samp=r.first_sample, verbose="error")
    events = np.column_stack([s.rows[0] + r.first_sample, 0 * s.rows[0], 1 + 0 * s.rows[0]])
    epochs = mne.Epochs(raw, events, tmin=0.3 - 0.125, tmax=0.3 + 0.125 - 1 / r.sfreq, baseline=None, preload=True, reject_by_annotation=False, verbose="error")
    theirs = D.bin_means(epochs.get_data(verbose="error"), s.config.preprocessor_params)  # (N, E, 8)
    assert theirs.shape == (len(s.start), 9, 8) and np.allclose(s.windows.at([1], s.rows)[0], theirs, rtol=1e-5)


def test_spectrum_laplacian_and_bands(podcast, tmp_path):
    weights = D.laplacian(["LGA1", "LGA2", "LGA3", "D1", "REF"])
    assert np.allclose(weights[1], [-0.5, 1, -0.5, 0, 0]) and np.allclose(weights[0], [1, -1, 0, 0, 0]) and np.allclose(weights[3:], np.eye(5)[3:])
    s = sweep(podcast, tmp_path, represent="spectrum", reference="laplacian", spectrum_max=40.0, bands=[[5, 20], [20, 50]])
    X = s.windows.at([0], s.rows)[0]
    assert X.shape[1] == 2 * 14 * 4 and len(s.windows.names) == 28 and np.isfinite(X).all()  # 2 bands, 14 good electrodes, 4 frequencies up to 40 Hz
    t = np.arange(1280) / 128
    r = Recording(podcast / "sub-01")
    r.signal = np.tile((np.sin(2 * np.pi * 10 * t) * (1 + 0.5 * np.sin(2 * np.pi * t)))[:, None], (1, 10)).astype(np.float32)
    assert D.derived(r, np.array([0]), s.config)[0].shape == (1280, 2)
    envelope = D.derived(r, np.array([8]), Config(bands=[[5, 20]]))[0][:, 0]
    assert np.corrcoef(envelope[200:-200], np.sin(2 * np.pi * t)[200:-200])[0, 1] > 0.99


def test_long_recordings_are_read_window_by_window(podcast, tmp_path):
    s = sweep(podcast, tmp_path, reference="laplacian")
    (r, picks), good = s.data.parts[0], np.flatnonzero(s.data.parts[0][0].good)
    whole = r.signal[:, good] @ D.laplacian([r.names[i] for i in good]).T
    naive = D.lag_windows(whole, np.searchsorted(good, picks), s.rows[0], [s.windows.spans[1][0]], s.windows.edges)[0]
    by_sums = s.windows.at([1], s.rows)[0]
    s.config.memory = 1e-6
    by_windows = s.windows.at([1], s.rows)[0]
    assert np.allclose(by_sums[:, :len(picks)], naive, atol=1e-5) and np.allclose(by_windows, by_sums, atol=1e-5)


def test_a_wide_logistic_regression_is_the_same_in_the_span_of_its_rows():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 200)).astype(np.float32), rng.integers(0, 2, 60)
    fold = D.Fold(0, np.arange(30), np.arange(30, 45), np.arange(45, 60))
    val, test, _, state = D.fit_linear(Config(), "logistic", "classes", x, D.Job(0, 0, fold, y, None, None))
    direct = min((sklearn.linear_model.LogisticRegression(C=c, max_iter=2000, tol=1e-8, class_weight="balanced").fit(x[fold.train], y[fold.train])
                  for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)), key=lambda f: np.abs(f.coef_ - state["coef"].numpy()).max())
    assert np.abs(direct.coef_ - state["coef"].numpy()).max() < 1e-3 * np.abs(direct.coef_).max()
    assert np.allclose(direct.predict_log_proba(x[fold.test]), test[0], atol=2e-2)


def test_words_are_the_same_at_every_lag_and_drops_are_told(podcast, tmp_path, capsys):
    s = sweep(podcast, tmp_path, lags=[-800.0, 900.0])
    said = capsys.readouterr().out
    assert "1 without onset" in said and f"{s.target.notes['with a window outside a recording at some lag']} with a window outside" in said
    assert s.target.notes["with a window outside a recording at some lag"] >= 4
    for (r, _), rows in zip(s.data.parts, s.rows):
        for a, b in s.windows.spans:
            assert (rows + a >= 0).all() and (rows + b <= len(r.signal)).all()
    assert (np.diff(s.start) >= 0).all() and s.data.names[0] == "sub-01 LGA1" and len(s.data.names) == 14  # two people side by side, bads left out


def test_tokens_are_pooled_to_words_and_other_vectors_are_found(podcast, tmp_path):
    v = np.arange(10.0, dtype=np.float32).reshape(5, 2)
    owner = np.array([0, 2, 2, 3, 2])  # not sorted
    assert np.allclose(D.pool_tokens(v, owner, np.arange(4), "mean")[[0, 2, 3]], [[0, 1], v[[1, 2, 4]].mean(0), [6, 7]])
    assert np.isnan(D.pool_tokens(v, owner, np.arange(4), "mean")[1]).all() and np.allclose(D.pool_tokens(v, owner, np.arange(4), "last")[2], v[4])
    (tmp_path / "glove.txt").write_text("the 1 2\ndo 0 2\nn't 4 0\nits 5 5\n")
    found = D.glove_vectors(tmp_path / "glove.txt", ["the", "don't", "it's", "zebra"])
    assert np.allclose(found[:3], [[1, 2], [2, 1], [5, 5]]) and np.isnan(found[3]).all()
    a, b = (sweep(podcast, tmp_path / str(i), embedding=["arbitrary"], channels=c) for i, c in enumerate(("", "LGA")))
    assert np.array_equal(a.target.values, b.target.values) and len(np.unique(a.target.values, axis=0)) == 12  # one vector a type, whatever else is asked


def test_contextual_embeddings_are_those_of_whole_contexts(tmp_path):
    words = pd.DataFrame(dict(word_idx=np.arange(30), word=["ab", "c", "bac"] * 10))
    save_checkpoint(tmp_path / "lm.pt", dict(**lm_state(small(block_size=16, vocab_size=257)), tokenizer=state_of(byte_tokenizer())))
    run_, config = D.types.SimpleNamespace(device=torch.device("cpu")), Config(lm=str(tmp_path / "lm.pt"), layer=1, pool="last")
    got = D.lm_vectors(run_, config, words, static=False)
    lm, tokenizer = D.load_lm(config.lm)
    pieces = [tokenizer.encode(" " + w) for w in words.word]
    ids, last = np.concatenate(pieces), np.cumsum([len(p) for p in pieces]) - 1
    with torch.no_grad():
        first = lm.eval()(torch.tensor(ids[None, :16].astype(int)), hidden=[1]).hidden[1][0].numpy()
    inside = last[last < 16]
    assert np.allclose(got[:len(inside)], first[inside], atol=1e-5)
    at = last[len(words) - 1]
    with torch.no_grad():
        end = lm(torch.tensor(ids[None, at - 15:].astype(int)), hidden=[1]).hidden[1][0].numpy()
    assert np.allclose(got[-1], end[-1], atol=1e-5)  # the last word with all of its context
    static = D.lm_vectors(run_, config, words, static=True)
    assert np.allclose(static[0], lm.transformer.wte.weight[ids[last[0]]].detach().numpy())


# ---- folds and leaks

def test_no_test_window_touches_another_and_a_planted_overlap_is_caught():
    rng = np.random.default_rng(0)
    start, labels = np.cumsum(rng.uniform(0.1, 0.4, 400)), rng.integers(0, 30, 400).astype(str)
    for kind in ("sequential", "zero_shot"):
        folds = D.make_folds(Config(fold_type=kind, n_folds=4), start, labels, 0.3)
        assert sorted(np.concatenate([f.test for f in folds])) == list(range(400))
        for f in folds:
            for part in (f.train, f.val):
                assert np.abs(start[part][:, None] - start[f.test]).min() >= 0.3 and len(part) > 10
            assert np.abs(start[f.train][:, None] - start[f.val]).min() >= 0.3
            assert kind == "sequential" or not set(labels[f.test]) & set(labels[np.concatenate([f.train, f.val])])
        D.check_apart(folds, start, 0.3, labels if kind == "zero_shot" else None)
        leaky = copy.deepcopy(folds)
        touching = np.flatnonzero((np.abs(start[:, None] - start[folds[1].test]).min(1) < 0.3) & ~np.isin(np.arange(400), folds[1].test))
        leaky[1].train = np.append(leaky[1].train, touching[0])
        with pytest.raises(ValueError, match="fold 1: train and test windows overlap"):
            D.check_apart(leaky, start, 0.3)


def changes_training(fit, s):
    """Whether what `fit(target)` gives for training words depends on the test words."""
    fold, other = s.folds[0], copy.deepcopy(s.target)
    other.values[fold.test] = np.random.default_rng(0).normal(size=other.values[fold.test].shape) * 9
    return not np.allclose(fit(s.target, fold)[fold.train], fit(other, fold)[fold.train], atol=1e-5)


def test_a_planted_leak_of_the_pca_is_caught(podcast, tmp_path):
    s = sweep(podcast, tmp_path, pca=3)
    everyone = lambda target, fold: D.fold_target(s.config, target, D.Fold(0, np.arange(len(target.values)), fold.val, fold.test))
    assert not changes_training(lambda target, fold: D.fold_target(s.config, target, fold), s)
    assert changes_training(everyone, s)  # the same check sees PCA on all words
    X = s.windows.at([1], s.rows)[0]
    other = X.copy()
    other[s.folds[0].test] = 1e3
    s.config.select = 3
    for a, b in zip(D.input_scale(s.config, X, s.folds[0], s.target, s.Y[0]), D.input_scale(s.config, other, s.folds[0], s.target, s.Y[0])):
        assert np.array_equal(a, b)  # z-scores and the choice of electrodes neither
    kept = [s.data.names[i] for i in np.flatnonzero(D.input_scale(s.config, X, s.folds[0], s.target, s.Y[0])[1].ravel())]
    assert len(kept) == 3 and set(kept) <= {"sub-01 LGA1", "sub-01 LGA2", "sub-01 LGA3", "sub-02 LGA1", "sub-02 LGA2"}


# ---- scores

def test_auc_is_scikit_learns_with_ties_and_under_reorderings():
    rng = np.random.default_rng(0)
    scores, y = rng.integers(0, 8, (60, 5)).astype(float), rng.integers(0, 4, 60)
    orders = np.stack([np.arange(60), *[rng.permutation(60) for _ in range(3)]])
    got = D.word_auc(scores, y, orders)
    for p, order in enumerate(orders):
        for c in range(4):
            assert np.isclose(got[p, c], sklearn.metrics.roc_auc_score(y[order] == c, scores[:, c]), atol=1e-12)
    assert np.isnan(got[:, 4]).all()  # a class that never comes


def test_word_scores_are_the_naive_ones():
    rng = np.random.default_rng(1)
    N, labels = 90, rng.integers(0, 9, 90)
    Y, out = rng.normal(size=(N, 4)), rng.normal(size=(2, 30, 4))
    out += Y[60:]
    fold = D.Fold(0, np.arange(40), np.arange(40, 60), np.arange(60, 90))
    scorer = D.WordScorer(Config(min_count=4), fold, Y, labels, fold.test)
    metrics, without = scorer.measure(out, (2.0, 3.0))
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    kinds = sorted(set(labels[:40]) & set(labels[60:]))
    rows = [i for i in range(30) if labels[60 + i] in kinds]
    S = np.array([[np.mean([cos(out[m, i], Y[t]) for m in range(2) for t in range(40) if labels[t] == k]) for k in kinds] for i in rows])
    right, soft = np.array([kinds.index(labels[60 + i]) for i in rows]), np.exp(S) / np.exp(S).sum(1, keepdims=True)
    counted = [c for c, k in enumerate(kinds) if (labels[:40] == k).sum() >= 4]
    each = np.array([sklearn.metrics.roc_auc_score(right == c, soft[:, c]) for c in counted])
    heard, spoken = (np.array([(part == kinds[c]).sum() for c in counted]) for part in (labels[:40], labels[60:]))
    assert np.isclose(metrics["auc"][0], each.mean()) and np.isclose(metrics["auc_train"][0], np.average(each, weights=heard))
    assert np.isclose(metrics["auc_test"][0], np.average(each, weights=spoken))
    assert np.isclose(metrics["top5"][0], sklearn.metrics.top_k_accuracy_score(right, S, k=5, labels=np.arange(len(kinds))))
    assert np.isclose(metrics["perplexity"][0], np.exp(F.cross_entropy(torch.tensor(2.0 * S), torch.tensor(right)).item()))
    pairs = np.array([[np.mean([cos(out[m, i], Y[60 + j]) for m in range(2)]) for j in range(30)] for i in range(30)])
    assert np.isclose(metrics["two_afc"][0], np.mean([pairs[i, i] > pairs[i, j] for i in range(30) for j in range(30) if i != j]))
    assert np.isclose(metrics["occ_top1"][0], np.mean(pairs.argmax(1) == np.arange(30))) and np.isclose(metrics["cosine"][0], np.trace(pairs) / 30)
    assert np.isclose(without(np.arange(30))["auc"], metrics["auc"][0]) and np.isclose(without(np.arange(20))["cosine"], np.diag(pairs)[:20].mean())
    oracle, _ = scorer.measure(Y[None, 60:], (1.0, 1.0))
    assert oracle["occ_top1"][0] == 1 and oracle["two_afc"][0] == 1


def test_other_metrics_are_scikit_learns():
    rng = np.random.default_rng(2)
    logits, y = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    got = D.measure_classes(logits, y, ["a", "b", "c"], np.arange(50)[None])
    p = torch.tensor(logits).softmax(1).numpy()
    assert np.isclose(got["roc_auc"][0], sklearn.metrics.roc_auc_score(y, p, multi_class="ovr"), atol=0.02)  # theirs ranks p, as ours
    assert np.isclose(got["f1"][0], sklearn.metrics.f1_score(y, logits.argmax(1), average="macro"))
    assert np.isclose(got["balanced_accuracy"][0], sklearn.metrics.balanced_accuracy_score(y, logits.argmax(1)))
    assert np.isclose(got["cross_entropy"][0], sklearn.metrics.log_loss(y, p))
    two = D.measure_classes(logits[:, :2], y % 2, ["no", "yes"], np.arange(50)[None])
    assert np.isclose(two["roc_auc"][0], sklearn.metrics.roc_auc_score(y % 2, logits[:, 1] - logits[:, 0]))
    assert np.isclose(two["precision_yes"][0], sklearn.metrics.precision_score(y % 2, logits[:, :2].argmax(1)))
    out, real = rng.normal(size=40), rng.normal(size=40)
    orders = D.circular(np.array([0.3]), 40, 2)
    numbers = D.measure_numbers(out, real, orders)
    assert np.isclose(numbers["r2"][0], sklearn.metrics.r2_score(real, out)) and np.isclose(numbers["corr"][1], np.corrcoef(out, real[orders[1]])[0, 1])
    many = D.correlations(np.tile(out[:, None], (1, 3)), np.tile(real[:, None], (1, 3)), orders)
    assert np.allclose(many, numbers["corr"][:, None], atol=1e-6)


def test_shifts_are_circular_and_leave_the_neighbours_out():
    orders = D.circular(np.random.default_rng(0).random(200), 50, 6)
    steps = orders[1:, 0]
    assert steps.min() >= 6 and steps.max() < 44 and (np.sort(orders, 1) == np.arange(50)).all() and (orders[0] == np.arange(50)).all()


def test_ridge_is_scikit_learns_at_the_alphas_of_the_validation_words():
    rng = np.random.default_rng(3)
    x, noise = rng.normal(size=(80, 12)).astype(np.float32), rng.normal(size=(80, 3))
    y = (x[:, :3] * [1, 0.3, 0] + noise).astype(np.float32)
    fold = D.Fold(0, np.arange(40), np.arange(40, 60), np.arange(60, 80))
    val, w, offset = D.ridge(x, y, fold, [0.1, 10.0, 1000.0])
    for t in range(3):
        fits = {a: sklearn.linear_model.Ridge(a).fit(x[:40], y[:40, t]) for a in (0.1, 10.0, 1000.0)}
        best = min(fits, key=lambda a: np.square(fits[a].predict(x[40:60]) - y[40:60, t]).mean())
        again = sklearn.linear_model.Ridge(best).fit(x[:60], y[:60, t])
        assert np.allclose(x[60:] @ w[:, t] + offset[t], again.predict(x[60:]), atol=1e-3)
        assert np.allclose(val[:, t], fits[best].predict(x[40:60]), atol=1e-3)
    val, w, offset = D.least_squares(x, y, fold)
    assert np.allclose(x[60:] @ w + offset, sklearn.linear_model.LinearRegression().fit(x[:60], y[:60]).predict(x[60:]), atol=1e-4)


def test_p_values_are_uniform_where_nothing_is_planted():
    """20 experiments of noise through ridge, folds, scorer and shifts."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n, config = 240, Config(n_folds=3, n_shifts=199, min_count=3, alphas=[10.0, 1000.0], top_k=[1])
        start, codes = np.cumsum(rng.uniform(0.2, 0.5, n)), rng.integers(0, 12, n)
        noise = np.cumsum(rng.normal(size=(n, 6)), 0).astype(np.float32)  # slow, as brains are
        values = rng.normal(size=(12, 4))[codes].astype(np.float32)
        target, scores, nulls = D.Target("vectors", pd.DataFrame(dict(start=start)), values), [], []
        for fold in D.make_folds(config, start, codes.astype(str), 0.2):
            Y = D.fold_target(config, target, fold)
            val, test, _, _ = D.fit_linear(config, "ridge", "vectors", noise, D.Job(0, 0, fold, Y, None, None))
            shifts = np.random.default_rng(key_seed(seed, fold.number)).random(199)
            value, _, _, null, _ = D.score(config, target, fold, Y, codes, val, test, shifts, 2, auc_only=True)[0]["auc"]
            scores.append(value)
            nulls.append(null)
        found.append(D.p_value(np.mean(scores), np.mean(nulls, 0)))
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.05, sorted(found)
    assert D.p_value(0.9, np.linspace(0.4, 0.6, 99)) == 0.01 and D.p_value(np.array([1.0]), np.array([[2.0], [0.5]]), lower=True) == [2 / 3]


# ---- whole runs

def test_it_finds_what_was_planted_and_nothing_else(podcast, tmp_path):
    table = finished(podcast, tmp_path / "run", figures=True, lags=[-300.0, 100.0, 300.0, 500.0], epochs=40, learning_rate=5e-3, n_shifts=400,
                     save_models=True, controls=["mean", "unigram", "preceding", "oracle", "arbitrary"])
    for model in ("ensemble_pitom_model", "ridge", "arbitrary"):
        auc = table.loc[(model, "auc")]
        assert auc.score[300.0] > 0.75 and auc.p_max[300.0] < 0.05 and (auc.p_max[[-300.0, 100.0, 500.0]] > 0.05).all(), (model, auc)
    assert table.loc[("mean", "auc")].score.item() == 0.5 and table.loc[("oracle", "auc")].score.item() > 0.95
    assert abs(table.loc[("preceding", "auc")].score.item() - 0.5) < 0.1
    assert table.loc[("unigram", "top1")].score.item() > table.loc[("ridge", "top1")].score[-300.0] - 0.1
    electrodes = pd.read_csv(tmp_path / "run/electrodes.csv").sort_values("score")
    assert set(electrodes.electrode[-3:]) <= {"sub-01 LGA1", "sub-01 LGA2", "sub-01 LGA3", "sub-02 LGA1", "sub-02 LGA2"}
    results = pd.read_csv(tmp_path / "run/results.csv")
    assert np.isfinite(results[["score", "chance", "low", "high", "n"]]).all(axis=None) and results.data.str.contains("synthetic").any() is not None
    assert {"lags.png", "electrodes.png"} <= {p.name for p in (tmp_path / "run").iterdir()}
    saved = torch.load(tmp_path / "run/models/lag_300_fold_0.pt", weights_only=True)
    assert saved["model"] == "ensemble_pitom_model" and saved["state"]["conv1"].shape == (2, 8, 3, 14)


def test_encoding_finds_lag_and_electrodes(podcast, tmp_path):
    D.main(Config(**{**copy.deepcopy(FAST), "dataset": str(podcast), "out_dir": str(tmp_path), "direction": "encode", "lags": [-300.0, 0.0, 300.0, 600.0],
                     "embedding": ["gpt2-xl", "arbitrary"], "n_shifts": 200, "pca": 8}))
    table = pd.read_csv(tmp_path / "encoding.csv")
    planted = {"sub-01 LGA1", "sub-01 LGA2", "sub-01 LGA3", "sub-02 LGA1", "sub-02 LGA2"}
    found = table[table.p_max < 0.05]
    assert set(found.electrode) == planted and set(found.lag) == {300.0}
    best = table[(table.lag == 300.0) & table.electrode.isin(planted)]
    assert (best.low < best.r).all() and (best.r < best.high).all() and np.allclose(best["r_gpt2-xl"] + best.r_arbitrary, best.r, atol=0.02)
    assert (best["r_gpt2-xl"] > best.r_arbitrary).all() and (tmp_path / "electrodes.png").exists()


@pytest.mark.parametrize("change", ["scale", "order"])
def test_scores_do_not_depend_on_units_or_on_the_order_of_electrodes(podcast, tmp_path, monkeypatch, change):
    options = dict(lags=[300.0], beside=["ridge"], controls=[], epochs=8, select=6)
    before = finished(podcast, tmp_path / "before", **options)
    real = D.Podcast.__init__

    def changed(self, *args):
        real(self, *args)
        for i, (r, picks) in enumerate(self.parts):
            if change == "scale":
                r.signal = np.asarray(r.signal) * np.float32(1e6)
            else:
                order = np.random.default_rng(i).permutation(len(picks))
                first = 0 if i == 0 else len(self.parts[0][1])
                self.parts[i] = (r, picks[order])
                self.names[first:first + len(picks)] = [self.names[first + j] for j in order]
    monkeypatch.setattr(D.Podcast, "__init__", changed)
    after = finished(podcast, tmp_path / "after", **options)
    for model, tolerance in (("ridge", 1e-3), ("ensemble_pitom_model", 0.01)):  # float32 rounding, which training magnifies
        assert np.allclose(before.loc[(model, "auc")].score, after.loc[(model, "auc")].score, atol=tolerance)


STOPPED = """
import decode, os, signal
real, done = decode.Sweep.record, []
def record(self, *args):
    if len(done) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    real(self, *args)
decode.Sweep.record = record
decode.main(decode.configure(decode.Config, decode.seed_options(sys.argv[1:])))
raise SystemExit(0)
"""


def test_a_stopped_sweep_goes_on_where_it_was_and_ranks_share_it(podcast, tmp_path):
    options = ["lags=[-300,300]", "n_folds=3", "n_shifts=50", "pca=6", "epochs=2", "model_params.conv_filters=8", "min_count=2", "device=cpu",
               f"dataset={podcast}"]
    run("decode", *options, f"out_dir={tmp_path / 'stopped'}", patch=STOPPED, status=-signal.SIGKILL)
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "stopped/jobs").rglob("*.npz")}
    assert len(done) == 7
    run("decode", *options, f"out_dir={tmp_path / 'stopped'}")
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())  # not done again
    run("decode", *options, f"out_dir={tmp_path / 'whole'}", ranks=2)
    tables = [pd.read_csv(tmp_path / name / "lags.csv") for name in ("stopped", "whole")]
    pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-5)
    a, b = (pd.read_csv(tmp_path / name / "electrodes.csv") for name in ("stopped", "whole"))
    pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task, metric", [("content", "roc_auc"), ("pos", "roc_auc"), ("sentence_onset", "roc_auc"), ("surprisal", "corr"), ("volume", "corr")])
def test_other_tasks_run_through_the_same_loop(podcast, tmp_path, task, metric):
    table = finished(podcast, tmp_path, task=task, lags=[300.0], beside=["logistic"] if metric == "roc_auc" else ["linear"], task_params=dict(step=0.4), bins=6)
    score = table.loc[("ensemble_pitom_model", metric)].score.item()
    assert 0 <= abs(score) <= 1 and np.isfinite(table.score).all()
    if task == "content":
        assert table.loc[("logistic", "roc_auc")].score.item() > 0.55  # the planted vectors say it


@pytest.mark.parametrize("options", [dict(loss="infonce"), dict(loss="cosine", model="pitom_model"), dict(fold_type="zero_shot", controls=["oracle"]),
                                     dict(average=2, model_params=dict(num_models=2, conv_filters=8, local=True, init="glorot", reg=1e-3, reg_head=1e-3)),
                                     dict(represent="spectrum", model="foundation_mlp", whiten=True), dict(class_vectors="all", select=4)])
def test_options_run(podcast, tmp_path, options, capsys):
    table = finished(podcast, tmp_path, lags=[300.0], beside=[], **options)
    assert np.isfinite(table.score).all()
    assert ("acts as L2" in capsys.readouterr().out) == ("average" in options)


# ---- a user's own files, and podcast-benchmark's

USER = '''
import numpy as np
import torch
import registry

@registry.register_model_constructor()
def my_model(model_params):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(model_params["input_channels"] * 2, model_params["embedding_dim"]))

@registry.register_data_preprocessor("halves")
def preprocess(data, preprocessor_params):
    open(__file__ + preprocessor_params["log"], "a").write("x")
    assert data.shape[2] == 51  # 0.4 s, as asked for below
    return np.stack([data[:, :, :25].mean(2), data[:, :, 25:].mean(2)], 2)

@registry.register_config_setter("wide")
def setter(experiment_config, raws, df_word, word_embeddings):
    assert len(raws) == 2 and raws[0].info["sfreq"] == 128 and len(df_word) == len(word_embeddings)
    experiment_config.model_params["input_channels"] = sum(len(raw.ch_names) for raw in raws)
    experiment_config.data_params.window_width = 0.4
    return experiment_config

def override(data, params):
    return (data[:, 0, ::16], {"window_width": 0.5})

def wrong_model(p):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))

def no_model(p):
    return 3

def wrong_windows(data, params):
    return data.mean(0)

def wrong_target(words, params):
    return np.zeros(7)

def events(words, params):
    import pandas as pd
    return pd.DataFrame(dict(start=np.arange(5, 95, 0.5), target=np.tile([0.5, 1.5, 2.0], 60)))
'''


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(USER)
    return tmp_path / "mine.py"


def test_a_users_model_preprocessor_and_setter_in_podcast_benchmarks_manner(podcast, tmp_path, mine):
    options = dict(model=f"{mine}:my_model", preprocess=f"{mine}:halves", config_setter=f"{mine}:wide", preprocessor_params=dict(log=".log"),
                   model_params={}, window=-1, lags=[300.0], beside=[], epochs=30, learning_rate=1e-2, cache=str(tmp_path / "cache"))
    table = finished(podcast, tmp_path / "run", **options)
    assert table.loc[(f"{mine}:my_model", "auc")].score.item() > 0.75
    calls = (tmp_path / "mine.py.log").read_text()
    finished(podcast, tmp_path / "again", **options)
    assert len((tmp_path / "mine.py.log").read_text()) == len(calls) + 1  # the trial on two words; the windows came from the cache
    s = sweep(podcast, tmp_path / "wide", preprocess=f"{mine}:override", cache="", lags=[300.0], window=-1)
    assert s.windows.width == 64 and s.windows.at([0], s.rows).shape == (1, len(s.start), 4)


def test_a_users_task(podcast, tmp_path, mine):
    table = finished(podcast, tmp_path / "run", task=f"{mine}:events", lags=[300.0], beside=["ridge"], model="pitom_model")
    assert table.loc[("ridge", "mse")].n.item() > 150


@pytest.mark.parametrize("options, words", [
    (dict(model="{mine}:wrong_model"), ["made shape (", "(words, 6) is wanted"]), (dict(model="{mine}:no_model"), ["gave a int", "torch.nn.Module"]),
    (dict(preprocess="{mine}:wrong_windows"), ["first dimension must stay the words"]), (dict(task="{mine}:wrong_target"), ["gave shape (7,)"]),
    (dict(model="{mine}:nosuch"), ["no function 'nosuch'", "my_model"]), (dict(model="nosuch"), ["none of", "ensemble_pitom_model"]),
    (dict(model="nosuch.py:f"), ["no file nosuch.py"])])
def test_a_users_functions_are_checked(podcast, tmp_path, mine, options, words):
    options = {k: v.format(mine=mine) for k, v in options.items()}
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        finished(podcast, tmp_path / "run", lags=[300.0], beside=[], model_params={}, **options)
    assert all(w in str(e.value) for w in words), e.value


# ---- a pretrained encoder

def make_encoder(folder, podcast, seed=0, bands=()):
    """A run folder of foundation.py: an encoder with random weights, pretrained on the first half of sub-01, it says."""
    shape = dict(kind="transformer", tokens="electrode", n_embd=6, width=16, n_layer=1, n_head=2, patch=8 * max(1, len(bands)), degree=2, subjects=1)
    torch.manual_seed(seed)
    r = Recording(podcast / "sub-01")
    folder.mkdir(parents=True, exist_ok=True)
    recipe = dict(sfreq=64.0, window=0.5, patch=8, bands=list(bands), clamp=8.0, grid="", subjects=["sub-01"], recordings=[dict(
        dataset=str(podcast), name="sub-01", subject="sub-01", channels=r.names, xyz=r.xyz.tolist(), seen=[0.0, 55.0])])
    save_checkpoint(folder / "best.pt", dict(kind="foundation", encoder_args=shape, recording=recipe, model={
        f"encoder.{k}": v for k, v in NeuralEncoder(EncoderConfig(**shape)).state_dict().items()}))
    return folder


def frozen(podcast, tmp_path, folder, **options):
    return dict(preprocess="foundation_model_preprocessing_fn", preprocessor_params=dict(model_dir=str(folder)), config_setter="foundation_model",
                cache=str(tmp_path / "cache"), lags=[300.0], **options)


def test_latents_are_the_encoders_and_cached_by_weights_and_window(podcast, tmp_path, monkeypatch):
    folder = make_encoder(tmp_path / "encoder", podcast)
    s = sweep(podcast, tmp_path / "a", **frozen(podcast, tmp_path, folder))
    assert s.config.window == 0.5 and s.windows.width == 64  # from the pretrained model
    X = s.windows.at([0], s.rows)[0]
    assert X.shape == (len(s.start), 2 * 4 * 6)  # two people, 4 tokens of 6
    encoder, recipe = load_encoder(folder)
    for i, (r, picks) in enumerate(s.data.parts):
        x = r.signal[:len(r.signal) // 2 * 2, picks].reshape(-1, 2, len(picks)).mean(1)  # 128 to 64 Hz
        low, mid, high = np.percentile(x[:55 * 64] if i == 0 else x, [25, 50, 75], axis=0)  # a stranger's scale is of all of it
        begin = round((s.rows[i, 7] + s.windows.spans[0][0]) / 2)
        window = np.clip((x[begin:begin + 32] - mid) / ((high - low) / 1.349), -8, 8).T[None]
        with torch.no_grad():
            latents = encoder(torch.tensor(window, dtype=torch.float32), torch.tensor(r.xyz[picks], dtype=torch.float32), torch.tensor([0 if i == 0 else -1]))
        assert np.allclose(X[7, 24 * i:24 * i + 24], latents.flatten().numpy(), atol=1e-4)
    cached = lambda: len(list((tmp_path / "cache").glob("*.npy")))
    assert cached() == 1
    with monkeypatch.context() as patch:
        patch.setattr(NeuralEncoder, "forward", None)  # not asked again
        assert np.array_equal(sweep(podcast, tmp_path / "b", **frozen(podcast, tmp_path, folder)).windows.at([0], s.rows)[0], X)
    make_encoder(folder, podcast, seed=1)
    other = sweep(podcast, tmp_path / "c", **frozen(podcast, tmp_path, folder))
    assert not np.allclose(other.windows.at([0], s.rows)[0], X) and cached() == 2 and other.store.name != s.store.name
    wide = sweep(podcast, tmp_path / "d", **{**frozen(podcast, tmp_path, folder), "config_setter": "", "window": 0.25})
    assert wide.windows.at([0], wide.rows).shape[2] == 2 * 2 * 6 and cached() == 3


def test_pretrained_beside_untrained_and_raw_in_pairs(podcast, tmp_path, capsys):
    folder = make_encoder(tmp_path / "encoder", podcast, bands=[(5, 20), (20, 50)])
    table = finished(podcast, tmp_path / "run", model="foundation_mlp", model_params={}, untrained=2, beside=["ridge"],
                     **{**frozen(podcast, tmp_path, folder), "controls": ["mean"]})
    names = ["foundation_mlp", "ridge", "ridge, untrained 1", "ridge, untrained 2", "ridge, raw signal"]
    assert set(names) <= set(table.index.get_level_values(0))
    assert table.loc[("ridge, untrained 1", "auc")].score.item() != table.loc[("ridge, untrained 2", "auc")].score.item()
    results = pd.read_csv(tmp_path / "run/results.csv")
    pair = results[results.model == "ridge, pretrained - raw signal"].iloc[-1]
    per_fold = results[(results.lag == "300.0") & (results.metric == "auc")].pivot_table(index="fold", columns="model", values="score").drop("mean")
    difference = (per_fold["ridge"] - per_fold["ridge, raw signal"]).mean()
    assert abs(pair.score - difference) < 1e-6 and pair.low < pair.score < pair.high and pair.chance == 0
    said = capsys.readouterr().out
    assert "mean of 2 untrained: " in said and "known by name" in said and "without a place" in said


def test_the_encoder_is_tuned_end_to_end(podcast, tmp_path):
    folder = make_encoder(tmp_path / "encoder", podcast)
    options = {**frozen(podcast, tmp_path, folder), "preprocess": "foundation_model_input"}
    table = finished(podcast, tmp_path / "run", model="foundation_finetune", model_params={}, standardize=False, beside=[], n_folds=2, epochs=12,
                     learning_rate=1e-2, subjects=["1"], **options)
    assert table.loc[("foundation_finetune", "auc")].score.item() > 0.6
    with pytest.raises(ValueError, match="give preprocess=foundation_model_input"):
        finished(podcast, tmp_path / "no", model="foundation_finetune", model_params={}, lags=[300.0])


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


def test_the_documents_model_folder(tmp_path):
    (tmp_path / "video.py").write_text(VIDEO)
    (tmp_path / "experiment_config.ini").write_text("[ECOG_DATA_CONFIG]\noriginal_fs = 512\nnew_fs = 128\nsample_length = 0.25\n[MODEL_CONFIG]\ndim = 64\n")
    torch.save({"linear.weight": torch.eye(64)}, tmp_path / "model.pth")
    params = dict(model_dir=str(tmp_path), foundation_model_batch_size=2, model=f"{tmp_path / 'video.py'}:make")
    config = D.types.SimpleNamespace(data_params=D.types.SimpleNamespace(preprocessor_params=params, window_width=-1))
    raw = mne.io.RawArray(np.zeros((3, 10)), mne.create_info(["G2", "LG3", "G64"], 512.0, "ecog"), verbose="error")
    made = D.foundation_model(config, [raw], None, None)
    assert made.data_params.window_width == 0.25 and params["ch_names"] == ["G2", "LG3", "G64"]
    data = np.random.default_rng(0).normal(size=(5, 3, 128)).astype(np.float32)
    latents = D.foundation_model_preprocessing_fn(data, {"sfreq": 512.0, **params})
    expected = np.zeros((5, 64), np.float32)
    expected[:, 1], expected[:, 63] = data[:, 0].mean(1), data[:, 2].mean(1)
    assert np.allclose(latents, expected, atol=1e-6)
    for change, words in ((dict(model=""), "constructor"), (dict(sfreq=256.0), "512 Hz"), (dict(ch_names=["A", "B", "C"]), "G1 to G64")):
        with pytest.raises(ValueError, match=words):
            D.foundation_model_preprocessing_fn(data, {"sfreq": 512.0, **params, **change})


# the file in podcast-benchmark's README, letter for letter
NEURAL_CONV = """model_constructor_name: ensemble_pitom_model # this must match the name from the registry of your function!
config_setter_name: neural_conv              # this must match the name from the registry of your function!
model_params:
  conv_filters: 128
  reg: 0.35
  reg_head: 0
  dropout: 0.2
  num_models: 10
  embedding_dim: 50
training_params:
  batch_size: 32
  epochs: 100
  learning_rate: 0.001
  weight_decay: 0.0001
  early_stopping_patience: 10
  n_folds: 5
  min_lag: 0
  max_lag: 1
  lag_step_size: 10
data_params:
  # Cross model data_params
  data_root: data
  embedding_type: gpt-2xl
  embedding_layer: 24
  embedding_pca_dim: 50
  window_width: 0.625
  preprocessing_fn_name: preprocess_neural_data  # this must match the name from the registry of your function!
  subject_ids: [1, 2, 3]
  # neural_conv_decoder specific config
  preprocessor_params:
    num_average_samples: 32
trial_name: ensemble_model_10
"""


def test_a_nested_yaml_of_podcast_benchmark_is_translated(tmp_path):
    (tmp_path / "neural_conv.yml").write_text(NEURAL_CONV)
    config = configure(Config, D.seed_options(["--config", str(tmp_path / "neural_conv.yml"), "--training_params.batch_size=64", "seed=7"]))
    assert (config.model, config.dataset, config.subjects, config.window, config.epochs) == ("ensemble_pitom_model", "podcast", ["1", "2", "3"], 0.625, 100)
    assert config.all_lags() == [0.0] and config.embedding == ["gpt2-xl"] and config.layer == 24 and config.pca == 50 and config.patience == 10
    assert config.model_params == dict(head="ln_tanh", conv_filters=128, reg=0.35, reg_head=0, dropout=0.2, num_models=10, embedding_dim=50)
    assert config.preprocessor_params == dict(num_average_samples=32) and config.out_dir == "out/ensemble_model_10" and config.config_setter == "neural_conv"
    assert config.batch_size == 64 and config.seed == 7  # nested and flat options on the command line
    (tmp_path / "short.yml").write_text("model_constructor_name: pitom_model\ndata_params:\n  window_width: 0.5\n  "
                                        "channel_reg_ex: ^G([1-9]|[1-5][0-9]|6[0-4])$\n")
    config = configure(Config, D.seed_options([f"--config={tmp_path / 'short.yml'}"]))
    assert len(config.all_lags()) == 20 and config.min_lag == -10000 and config.n_folds == 5 and config.channels == "^G([1-9]|[1-5][0-9]|6[0-4])$"
    assert D.seed_options(["decode_podcast.yaml", "epochs=3"]) == ["decode_podcast.yaml", "epochs=3"]  # ours are left alone
    assert D.seed_options(["decode_podcast.yaml", "trial_name=again"]) == ["decode_podcast.yaml", "out_dir=out/again"]
    (tmp_path / "odd.yml").write_text("training_params:\n  batchsize: 3\n")
    with pytest.raises(ValueError, match="batchsize.*batch_size"):
        configure(Config, D.seed_options([str(tmp_path / "odd.yml")]))


def test_a_nested_yaml_of_podcast_benchmark_runs(podcast, tmp_path, capsys):
    nested = yaml.safe_load(NEURAL_CONV)
    nested["data_params"] |= dict(window_width=0.25, subject_ids=[1, 2], preprocessor_params=dict(num_average_samples=4))  # 128 Hz here, not 512
    nested["training_params"] |= dict(epochs=1, n_folds=2)
    nested["model_params"] |= dict(num_models=2, conv_filters=4)
    (tmp_path / "conv.yml").write_text(yaml.safe_dump(nested))
    D.main(configure(Config, D.seed_options(["--config", str(tmp_path / "conv.yml"), f"dataset={podcast}", f"out_dir={tmp_path / 'run'}", "n_shifts=20",
                                             "pca=4", "beside=[]", "min_count=2", "device=cpu"])))
    said = capsys.readouterr().out
    assert "reg=0.35 acts as L2" in said and (tmp_path / "run/lags.png").exists()


# ---- bad input

@pytest.mark.parametrize("options, words", [
    (dict(subjects=["5"]), ["has no 5", "sub-01, sub-02", "subjects=5"]), (dict(channels="XX"), ["leave no electrode", "LGA, LGB"]),
    (dict(lags=[0.0, 500000.0]), ["at lag 500000 ms no word's window"]), (dict(lags=[-54000.0, 55000.0]), ["too few", "-54000 to 55000"]),
    (dict(layer=3), ["no layer-3", "layer-24"]), (dict(embedding=["nosuch.txt"]), ["neither lm, static", "gpt2-xl"]), (dict(electrodes="no.csv"), ["no.csv"]),
    (dict(window=0.01), ["too few for 10 bins"]), (dict(bins=4), ["6 bins or more"]), (dict(word="lemma"), ["no column", "norm_word"]),
    (dict(model="ridge", task="surprisal", beside=["logistic"]), ["is for classes"]), (dict(n_folds=1), ["n_folds=1"]),
    (dict(lags=[], lag_step=0.0), ["no lag"]), (dict(controls=["mena"]), ["mena", "unigram"]), (dict(bands=[[50, 80]]), ["80 Hz is not below half"]),
    (dict(embedding=["a", "b"]), ["decoding has one target"]), (dict(dataset="podcast"), ["python data/podcast/prepare.py"])])
def test_bad_input_is_refused_in_a_sentence(podcast, tmp_path, options, words):
    if options.get("dataset") == "podcast" and (D.Path(D.__file__).parent / "data/podcast/meta.yaml").exists():
        pytest.skip("the podcast is here")
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        finished(podcast, tmp_path, **{"beside": [], "controls": [], **options})
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), e.value


def test_electrodes_by_table_with_any_of_a_persons_names(podcast, tmp_path):
    (tmp_path / "sig.csv").write_text("subject,elec\n661,LGA2\nsub-02,LGB1\n2,LGA1\n1,nosuch\n")
    assert sweep(podcast, tmp_path / "run", electrodes=str(tmp_path / "sig.csv")).data.names == ["sub-01 LGA2", "sub-02 LGA1", "sub-02 LGB1"]
