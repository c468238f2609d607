"""decode.py against plain versions of what it does, and against planted truth: leaks are caught."""

import copy
import dataclasses
import os
import shutil
from contextlib import closing
from types import SimpleNamespace

import mne
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.linear_model
import sklearn.metrics.pairwise
import torch
import torch.nn as nn
import yaml
from helpers import make_podcast
from test_benchmark_yaml import NEURAL_CONV
from torch.nn import functional as F

import decode
from configurator import InputError, Run, check, configure, key_seed
from data import montage, vectors
from data.podcast import benchmark_yaml, registry
from data.podcast.speech import Target
from decode import Config

PLANTED = {"sub-01 LGA1", "sub-01 LGA2", "sub-01 LGA3", "sub-02 LGA1", "sub-02 LGA2"}
FAST = {"lags": [-300.0, 300.0], "n_folds": 3, "n_shifts": 100, "pca": 6, "epochs": 3}
FAST |= {"min_count": 2, "save_models": False, "controls": ["mean", "unigram"], "device": "cpu"}
RIDGE = {"model": "ridge", "beside": [], "controls": []}


def make_config(podcast, out, **options):
    fast = copy.deepcopy(FAST)
    if "model" not in options:
        fast["model_params"] = {"num_models": 2, "conv_filters": 8}
    config = Config(**{**fast, "dataset": str(podcast), "out_dir": str(out), **options})
    check(config)
    return config


def prepared(podcast, out, **options):
    """(config, what main has when it begins to fit) in this process, its run closed."""
    config = make_config(podcast, out, **options)
    with closing(Run(config)) as run:
        podcast, montage = decode.load_podcast(run, config)
        target = decode.make_target(run, config, podcast)
        registry.call_setter(config, decode.SETTERS, montage, target)
        inputs = decode.make_inputs(run, config, montage)
        target, rows = decode.keep_words(target, inputs[""], config)
        seconds = inputs[""].width / montage.sfreq
        folds = decode.make_folds(config, target.start, target.labels, seconds)
        run.print(decode.describe(podcast, montage, target))
    for fold in folds:
        decode.fit_target(fold, target, config)
    facts = {"words": podcast.words, "montage": montage, "inputs": inputs}
    return config, SimpleNamespace(target=target, rows=rows, folds=folds, **facts)


def finished(podcast, out, figures=False, **options):
    """lags.csv of a whole run in this process, by (model, metric, lag)."""
    config = make_config(podcast, out, **options)
    with pytest.MonkeyPatch.context() as patch:
        if not figures:  # half of the time of a run that is this small
            patch.setattr(decode, "plot_lags", lambda *args: None)
        decode.main(config)
    return pd.read_csv(out / "lags.csv").set_index(["model", "metric", "lag"]).sort_index()


def windows_at(experiment, lag):
    return experiment.inputs[""].at(experiment.rows, lag)


def plain_fold(train, val, test, Y=None, n_shifts=0):
    shifts = np.random.default_rng(0).random(n_shifts)
    return decode.Fold(0, np.array(train), np.array(val), np.array(test), shifts, 2, Y)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ---- decoders


def member_of(ensemble, m):
    """Member m of an ensemble as one writes it down, with its weights."""
    first = [nn.Conv1d(7, 6, 3, bias=False), nn.ReLU(), nn.BatchNorm1d(6), nn.MaxPool1d(2, 2, 1)]
    second = [nn.Conv1d(6, 6, 2, bias=False), nn.ReLU(), nn.BatchNorm1d(6)]
    third = [nn.Conv1d(6, 6, 2), nn.BatchNorm1d(6), nn.ReLU(), nn.AdaptiveMaxPool1d(1)]
    head = [nn.Conv1d(6, 5, 1), nn.Flatten(), nn.LayerNorm(5), nn.Tanh()]
    ensembles = [ensemble.conv1, ensemble.conv2, ensemble.conv3, ensemble.head]
    for layers, of_all in zip((first, second, third, head), ensembles):
        for name, value in layers[0].state_dict().items():
            value.copy_(of_all.state_dict()[name].unflatten(0, (-1, len(value)))[m])
    return nn.Sequential(*first, *second, *third, *head)


@pytest.mark.parametrize("bins", [6, 9])
def test_an_ensemble_is_its_members(bins):
    torch.manual_seed(0)
    ensemble = decode.EnsemblePitomModel(3, 7, 5, conv_filters=6, dropout=0.0)
    members = [member_of(ensemble, m) for m in range(3)]
    x, y = torch.randn(4, 7, bins), torch.randn(4, 5)
    decode.loss_of(ensemble(x), y, "vectors", Config()).backward()  # of their mean
    F.mse_loss(torch.stack([member(x) for member in members]).mean(0), y).backward()
    for m, member in enumerate(members):
        rows = slice(6 * m, 6 * m + 6)
        assert torch.allclose(ensemble.conv1.weight.grad[rows], member[0].weight.grad, atol=1e-6)
        assert torch.allclose(ensemble.norms[1].running_mean[rows], member[6].running_mean)
        assert torch.allclose(ensemble.eval()(x)[:, m], member.eval()(x), atol=1e-5)


def test_a_member_has_the_published_number_of_parameters():
    member = decode.PitomModel(183, 50, conv_filters=128)
    assert sum(p.numel() for p in member.parameters()) == 143_254
    ensemble = decode.EnsemblePitomModel(10, 183, 50, 128, reg=0.35, reg_head=0.1)
    assert sum(p.numel() for p in ensemble.parameters()) == 10 * 143_254
    convolutions = [ensemble.conv1, ensemble.conv2, ensemble.conv3]
    expected = 0.35 * sum(c.weight.square().sum() for c in convolutions)
    expected = expected + 0.1 * ensemble.head.weight.square().sum()
    assert torch.isclose(ensemble.penalty(), expected)


def test_decoders_get_what_they_name():
    params = {"num_models": 2, "embedding_dim": 9, "input_channels": 7}  # the benchmark's own
    network = decode.build_network("ensemble_pitom_model", params, (7, 10), 9)
    assert network.num_models == 2 and network.conv1.in_channels == 7
    mlp = decode.build_network("foundation_mlp", {"layer_sizes": [70, 32, 9]}, (7, 10), 9)
    assert [p.shape[0] for p in mlp.parameters() if p.ndim == 2] == [32, 9]
    scalar = decode.Decoder("pitom_model", {}, (7, 10), 1, "number")
    assert not scalar.network.norm_output and scalar(torch.randn(3, 7, 10)).shape == (3, 1, 1)


def test_early_stopping_keeps_the_best_epoch(podcast, tmp_path):
    options = {"epochs": 30, "patience": 2, "learning_rate": 0.05, "batch_size": 64}
    config, experiment = prepared(podcast, tmp_path, **options)
    X = torch.as_tensor(windows_at(experiment, 300.0))
    arguments = "ensemble_pitom_model", X, experiment.target, experiment.folds[0], config
    decoder, val = decode.fit_decoder(*arguments)
    again, same_val = decode.fit_decoder(*arguments)
    assert decoder.best_epoch == again.best_epoch < 28 and np.array_equal(val, same_val)
    config.epochs = decoder.best_epoch  # training that ends there gives the same
    then, val_then = decode.fit_decoder(*arguments)
    assert then.best_epoch == decoder.best_epoch and np.allclose(val_then, val, atol=1e-6)


# ---- windows and targets


def test_windows_are_mne_epochs_and_published_bins(podcast, tmp_path):
    options = {"window": 0.25, "preprocess": "preprocess_neural_data", "subjects": ["1"]}
    params = {"num_average_samples": 4}
    _, experiment = prepared(podcast, tmp_path, preprocessor_params=params, **options)
    person = experiment.montage.people[0]
    recording, channels = person.recording, person.channels
    signal = recording.signal[:, channels].T.astype(float)
    info = mne.create_info(len(channels), recording.sfreq)
    raw = mne.io.RawArray(signal, info, first_samp=recording.first_sample, verbose="error")
    rows = experiment.rows[0] + recording.first_sample
    events = np.column_stack([rows, 0 * rows, 1 + 0 * rows])
    end = 0.3 + 0.125 - 1 / recording.sfreq
    epochs = mne.Epochs(raw, events, tmin=0.175, tmax=end, baseline=None, verbose="error")
    published = registry.preprocess_neural_data(epochs.get_data(verbose="error"), params)
    assert published.shape == (len(rows), 9, 8)
    assert np.allclose(windows_at(experiment, 300.0), published, rtol=1e-5)


def test_a_laplacian_takes_the_neighbours_on_the_shaft_away(podcast, tmp_path):
    mixing = montage.laplacian(["LGA1", "LGA2", "LGA3", "D1", "REF"])
    assert np.allclose(mixing[1], [-0.5, 1, -0.5, 0, 0])
    assert np.allclose(mixing[0], [1, -1, 0, 0, 0])
    assert np.allclose(mixing[3:], np.eye(5)[3:])
    options = {"reference": "laplacian", "channels": "LGA[23]", "subjects": ["1"]}
    _, experiment = prepared(podcast, tmp_path, **options)
    recording = experiment.montage.people[0].recording
    rows, edges = experiment.rows[0], np.round(np.linspace(0, 26, 11)).astype(int)
    offset = [experiment.inputs[""].first(0, 300.0)]
    plain = montage.lag_windows(recording.signal, np.arange(4), rows, offset, edges)[0]
    expected = plain[:, 1] - (plain[:, 0] + plain[:, 2]) / 2
    assert np.allclose(windows_at(experiment, 300.0)[:, 0], expected, atol=1e-9)


def test_spectra_are_the_log_power_of_every_electrode(podcast, tmp_path):
    _, experiment = prepared(podcast, tmp_path, represent="spectrum", spectrum_max=40.0)
    X = windows_at(experiment, 300.0)
    assert X.shape == (len(experiment.target.start), 14 * 4, 2) and np.isfinite(X).all()
    tone = np.sin(2 * np.pi * 39.4 * np.arange(26) / 128)[None, None]
    experiment.montage.samples = lambda first, width: tone
    power = experiment.montage.spectra(experiment.rows[:, :1], 26, 0.1, 64.0)
    assert power[0, :, 1].argmax() == 3  # of 9.8, 19.7, 29.5, 39.4 Hz and more


def test_windows_outside_or_in_bad_segments_are_left_out(podcast, tmp_path, capsys):
    config, experiment = prepared(podcast, tmp_path, lags=[-800.0, 900.0])
    n_outside = experiment.target.notes["with a window outside the recording or in a BAD segment"]
    printed = capsys.readouterr().out
    assert "1 without onset" in printed and f"{n_outside} with a window outside" in printed
    assert n_outside >= 4
    windows = experiment.inputs[""]
    for lag in config.lags:  # of which each has the same words
        assert windows.montage.inside(windows.first(experiment.rows, lag), windows.width).all()
    assert (np.diff(experiment.target.start) >= 0).all()
    assert len(windows.montage.names) == 14  # of two people side by side, bad ones left out
    shutil.copytree(podcast, tmp_path / "set")
    with open(tmp_path / "set/sub-02/meta.yaml", "a") as file:
        file.write("bad_spans: [[20.0, 30.0], [50.0, 50.0]]\n")
    _, whole = prepared(podcast, tmp_path / "a", lags=[300.0])
    _, experiment = prepared(tmp_path / "set", tmp_path / "b", lags=[300.0])
    begin, end = whole.target.start + 0.2, whole.target.start + 0.4  # of windows at 300 ms
    is_bad = (begin < 30) & (end > 20) | (begin < 50) & (end > 50)
    assert is_bad.sum() > 10
    assert np.array_equal(experiment.target.start, whole.target.start[~is_bad])


def hurt_copy(podcast, folder):
    """A copy of the podcast with a gap of NaN in sub-01's LGA4, and a constant LGB4."""
    shutil.copytree(podcast, folder)
    signal = np.memmap(folder / "sub-01/signal.f32", "<f4", "r+").reshape(-1, 10)
    signal[5000:5040, 3] = np.nan
    signal[:, 7] = 3e-6
    signal.flush()
    return folder


def test_an_electrode_with_missing_samples_is_named_and_left_out(podcast, tmp_path, capsys):
    hurt = hurt_copy(podcast, tmp_path / "hurt")
    _, whole = prepared(podcast, tmp_path / "a", reference="laplacian")
    _, experiment = prepared(hurt, tmp_path / "b", reference="laplacian")
    line = "left out, constant or with missing samples (NaN): sub-01 LGA4, sub-01 LGB4\n"
    assert line in capsys.readouterr().out
    gaps = ["sub-01 LGA4", "sub-01 LGB4"]
    assert experiment.montage.names == [n for n in whole.montage.names if n not in gaps]
    X = windows_at(experiment, 300.0)
    assert np.isfinite(X).all() and np.allclose(X[:, :2], windows_at(whole, 300.0)[:, :2])


def test_word_vectors_of_tokens_of_files_and_arbitrary(podcast, tmp_path):
    states = np.arange(10.0, dtype=np.float32).reshape(5, 2)
    words = vectors.mean_of_tokens(states, np.array([0, 2, 2, 3, 2]), range(4))
    assert np.allclose(words[[0, 2, 3]], [[0, 1], states[[1, 2, 4]].mean(0), [6, 7]])
    assert np.isnan(words[1]).all()
    lines = ["the 1 2\n", "do 0 2\n", "n't 4 0\n", "its 5 5\n"]
    odd = ["the a@b.org 9 9\n", ". . . 9 9\n", "it at 9 9\n"]
    texts = {"plain": lines, "sized": ["4 2\n", *lines], "odd": odd[:2] + lines + odd}
    for name, text in texts.items():
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(text))
        Y = vectors.look_up(["the", "don't", "it's", "zebra"], path)
        assert np.allclose(Y[:3], [[1, 2], [2, 1], [5, 5]]) and np.isnan(Y[3]).all(), name
    path.write_text("the 1 b\n")
    with pytest.raises(InputError, match="odd.txt is not a text file of word vectors"):
        vectors.look_up(["the"], path)
    _, everyone = prepared(podcast, tmp_path / "a", embedding=["arbitrary"])
    _, some = prepared(podcast, tmp_path / "b", embedding=["arbitrary"], channels="LGA")
    assert np.array_equal(everyone.target.values, some.target.values)
    assert len(np.unique(some.target.values, axis=0)) == 12  # a vector a word


class Letters:
    """A language model of letters behind a special token; its state is how many it has read."""

    width, max_length, device = 1, 22, "cpu"

    def encode(self, texts):
        return [[0, *map(ord, text)] for text in texts], 0

    def offsets(self, text):
        return [(0, 0)] + [(i, i + (letter != " ")) for i, letter in enumerate(text)]

    def pad(self, rows):
        ids = torch.tensor(rows)
        assert ids.shape[1] <= self.max_length
        return ids, ids >= 0

    def layers(self, asked):
        return asked

    def states(self, ids, real, layers):
        return {layers[0]: torch.arange(ids.shape[1])[None, :, None].float()}


def test_words_are_read_behind_half_a_context_or_more():
    words = ["ab", "c", "bac"] * 10
    lengths = np.array([len(word) for word in words])
    spoken = np.cumsum(lengths + 1) - (lengths - 1) / 2  # before a word's middle letter
    read = vectors.contextual_vectors(Letters(), words, 1)[:, 0]
    assert np.allclose(read[:6], spoken[:6]) and read.max() < Letters.max_length
    assert (read >= np.minimum(spoken, (Letters.max_length - 1) // 2 - 3)).all()


# ---- folds and leaks


@pytest.mark.parametrize("fold_type", ["sequential", "zero_shot"])
def test_no_test_window_touches_another(fold_type):
    rng = np.random.default_rng(0)
    start, labels = np.cumsum(rng.uniform(0.1, 0.4, 400)), rng.integers(0, 30, 400).astype(str)
    folds = decode.make_folds(Config(fold_type=fold_type, n_folds=4), start, labels, 0.3)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(400))
    for fold in folds:
        assert len(fold.train) > 10 and len(fold.val) > 10
        for a, b in ((fold.train, fold.test), (fold.val, fold.test), (fold.train, fold.val)):
            assert np.abs(start[a][:, None] - start[b]).min() >= 0.3
        if fold_type == "zero_shot":
            assert not set(labels[fold.test]) & set(labels[np.append(fold.train, fold.val)])


def test_what_is_fitted_does_not_depend_on_test_words(podcast, tmp_path):
    _, experiment = prepared(podcast, tmp_path, pca=3)
    fold, values = experiment.folds[0], experiment.target.values
    others = values.copy()
    others[fold.test] = np.random.default_rng(0).normal(size=others[fold.test].shape) * 9

    def moves(rows):
        before = vectors.project(values, rows, 3)[0]
        return not np.allclose(before[fold.train], vectors.project(others, rows, 3)[0][fold.train])

    assert not moves(fold.train)
    assert moves(np.arange(len(values)))  # the same check sees a PCA of all words
    X = windows_at(experiment, 300.0)
    decoder = decode.Decoder("ridge", {}, X.shape[1:], 3, "vectors")
    X = torch.as_tensor(X[fold.train])
    decoder.set_scale(X)
    z = (X - decoder.mean) / decoder.scale
    assert torch.allclose(z.mean((0, 2)), torch.zeros(14), atol=1e-4)
    assert torch.allclose(z.std((0, 2), unbiased=False), torch.ones(14), atol=1e-4)


# ---- scores


def test_auc_is_scikit_learns_with_ties_and_under_reorderings():
    rng = np.random.default_rng(0)
    scores, y = rng.integers(0, 8, (60, 5)).astype(float), rng.integers(0, 4, 60)
    orders = np.stack([np.arange(60), *[rng.permutation(60) for _ in range(3)]])
    auc = decode.word_auc(scores, y, orders)
    for p, order in enumerate(orders):
        for c in range(4):
            expected = sklearn.metrics.roc_auc_score(y[order] == c, scores[:, c])
            assert np.isclose(auc[p, c], expected, atol=1e-12)
    assert np.isnan(auc[:, 4]).all()  # a class that never comes


def test_word_scores_are_the_naive_ones():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 9, 90)
    Y, out = rng.normal(size=(90, 4)), rng.normal(size=(30, 2, 4))
    out += Y[60:, None]
    fold = plain_fold(range(40), range(40, 60), range(60, 90), Y)
    target = Target("vectors", Y, np.arange(90.0), labels)
    measure = decode.measure_of(out, fold.test, target, fold, Config(min_count=4))
    metrics = measure(np.ones(30, bool), decode.NO_SHIFTS)
    cosine = sklearn.metrics.pairwise.cosine_similarity
    cosines = (cosine(out[:, 0], Y) + cosine(out[:, 1], Y)) / 2
    kinds = sorted(set(labels[:40]) & set(labels[60:]))
    known = np.isin(labels[60:], kinds)
    S = np.stack([cosines[known, :40][:, labels[:40] == kind].mean(1) for kind in kinds], 1)
    right = np.searchsorted(kinds, labels[60:][known])
    soft = np.exp(S) / np.exp(S).sum(1, keepdims=True)
    n_heard = np.array([(labels[:40] == kind).sum() for kind in kinds])
    n_spoken = np.array([(labels[60:] == kind).sum() for kind in kinds])
    counted = np.flatnonzero(n_heard >= 4)
    auc = np.array([sklearn.metrics.roc_auc_score(right == c, soft[:, c]) for c in counted])
    top5 = sklearn.metrics.top_k_accuracy_score(right, S, k=5, labels=np.arange(len(kinds)))
    pairs = cosines[:, 60:]
    expected = {
        "auc": auc.mean(),
        "auc_train": np.average(auc, weights=n_heard[counted]),
        "auc_test": np.average(auc, weights=n_spoken[counted]),
        "top5": top5,
        "perplexity": np.exp(sklearn.metrics.log_loss(right, soft)),
        "two_afc": (np.diag(pairs)[:, None] > pairs).sum() / (30 * 29),
        "occ_top1": np.mean(pairs.argmax(1) == np.arange(30)),
        "cosine": np.trace(pairs) / 30,
    }
    for metric, value in expected.items():
        assert np.isclose(metrics[metric][0], value), metric
    some = measure(np.arange(30) < 20, decode.NO_SHIFTS)
    assert np.isclose(some["cosine"][0], np.diag(pairs)[:20].mean())


def test_ties_share_their_places():
    table = decode.rank_table(np.zeros((3, 40)))
    assert np.allclose(table["top1"], 1 / 40) and np.allclose(table["top10"], 10 / 40)
    table = decode.rank_table(np.array([[3.0, 2.0, 2.0, 1.0]]))
    assert np.allclose(table["top1"], [[1, 0, 0, 0]])
    labels = np.tile([f"w{i:02}" for i in range(40)], 30)
    Y = np.random.default_rng(0).normal(size=(1200, 4))
    fold = plain_fold(range(800), range(800, 1000), range(1000, 1200), Y)
    target = Target("vectors", Y, np.arange(1200.0), labels)
    scores = decode.most_frequent_words(target, fold, Config())
    assert np.isclose(scores.score["top1"], 1 / 40) and np.isclose(scores.score["top10"], 0.25)


def test_other_metrics_are_scikit_learns():
    rng = np.random.default_rng(2)
    logits, y = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    identity = np.arange(50)[None]
    metrics = decode.measure_classes(logits, y, ["a", "b", "c"], identity)
    p = torch.tensor(logits).softmax(1).numpy()
    predicted = logits.argmax(1)
    expected = {
        "roc_auc": sklearn.metrics.roc_auc_score(y, p, multi_class="ovr"),
        "f1": sklearn.metrics.f1_score(y, predicted, average="macro"),
        "accuracy": sklearn.metrics.accuracy_score(y, predicted),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(y, predicted),
        "cross_entropy": sklearn.metrics.log_loss(y, p),
    }
    for metric, value in expected.items():
        assert np.isclose(metrics[metric][0], value), metric
    two = decode.measure_classes(logits[:, :2], y % 2, ["no", "yes"], identity)
    auc = sklearn.metrics.roc_auc_score(y % 2, logits[:, 1] - logits[:, 0])
    precision = sklearn.metrics.precision_score(y % 2, logits[:, :2].argmax(1))
    assert np.isclose(two["roc_auc"][0], auc) and np.isclose(two["precision_yes"][0], precision)
    out, real = rng.normal(size=40), rng.normal(size=40)
    orders = decode.circular(np.array([0.3]), 40, 2)
    numbers = decode.measure_numbers(out, real, orders)
    assert np.isclose(numbers["r2"][0], sklearn.metrics.r2_score(real, out))
    assert np.isclose(numbers["corr"][1], np.corrcoef(out, real[orders[1]])[0, 1])


def test_shifts_are_circular_and_leave_the_neighbours_out():
    orders = decode.circular(np.random.default_rng(0).random(200), 50, 6)
    steps = orders[1:, 0]
    assert steps.min() >= 6 and steps.max() < 44
    assert (np.sort(orders, 1) == np.arange(50)).all() and (orders[0] == np.arange(50)).all()


def test_ridge_is_scikit_learns_with_the_alpha_that_validation_words_choose():
    rng = np.random.default_rng(3)
    x, noise = rng.normal(size=(80, 12)).astype(np.float32), rng.normal(size=(80, 3))
    y = (x[:, :3] * [1, 0.3, 0] + noise).astype(np.float32)
    fold = plain_fold(range(40), range(40, 60), range(60, 80), y)
    weights, offset, val = decode.fit_ridge(x, y, fold)
    test = x[60:] @ weights + offset
    for t in range(3):
        fits = {a: sklearn.linear_model.Ridge(a).fit(x[:40], y[:40, t]) for a in decode.ALPHAS}
        best = min(fits, key=lambda a: np.square(fits[a].predict(x[40:60]) - y[40:60, t]).mean())
        again = sklearn.linear_model.Ridge(best).fit(x[:60], y[:60, t])
        assert np.allclose(test[:, t], again.predict(x[60:]), atol=1e-3)
        assert np.allclose(val[:, t], fits[best].predict(x[40:60]), atol=1e-3)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_wide_logistic_regression_is_the_same_in_the_span_of_its_rows(n_classes):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 200)).astype(np.float32), rng.integers(0, n_classes, 60)
    fold = plain_fold(range(30), range(30, 45), range(45, 60), y)
    weights, offset, _ = decode.fit_logistic(x, np.eye(n_classes)[y], fold)
    log_p = scipy.special.log_softmax(x[45:] @ weights + offset, axis=1)
    distances = []
    for C in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        plain = sklearn.linear_model.LogisticRegression(
            C=C, max_iter=2000, tol=1e-8, class_weight="balanced"
        )
        plain.fit(x[:30], y[:30])
        distances.append(np.abs(plain.predict_log_proba(x[45:]) - log_p).max())
    assert min(distances) < 2e-2


def test_p_values_are_uniform_where_nothing_is_planted():
    """20 experiments of noise through ridge, folds, scorer and shifts."""
    p_values = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n, config = 240, Config(n_folds=3, n_shifts=199, min_count=3, pca=0)
        start, labels = np.cumsum(rng.uniform(0.2, 0.5, n)), rng.integers(0, 12, n).astype(str)
        noise = np.cumsum(rng.normal(size=(n, 6)), 0).astype(np.float32)  # slow, as brains are
        values = rng.normal(size=(12, 4))[labels.astype(int)].astype(np.float32)
        target = Target("vectors", values, start, labels)
        scores = []
        for fold in decode.make_folds(config, start, labels, 0.2):
            decode.fit_target(fold, target, config)
            X = torch.as_tensor(noise)
            decoder, _ = decode.fit_decoder("ridge", X, target, fold, config)
            fold.shifts = np.random.default_rng(key_seed(seed, fold.number)).random(199)
            out = decode.predict(decoder, X[fold.test])
            scores.append(decode.evaluate(out, target, fold, config).loc["auc"])
        mean = pd.concat(scores, axis=1).mean(axis=1)
        p_values.append(decode.p_value(mean.score, mean.drop(decode.FACTS).to_numpy()))
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.05, sorted(p_values)


def test_p_of_nan_is_nan():
    assert decode.p_value(0.9, np.linspace(0.4, 0.6, 99)) == 0.01
    assert decode.p_value(0.5, np.full(99, 0.5 - 1e-12)) == 1  # ties count
    p = decode.p_value(np.array([0.9, np.nan, 0.1]), np.full((50, 3), 0.5))
    assert np.isclose(p[0], 1 / 51) and np.isnan(p[1]) and p[2] == 1
    q = decode.fdr_q(p)
    assert np.isnan(q[1]) and np.isclose(q[0], 2 / 51)  # of two tests, not of three


# ---- whole runs


def test_it_finds_what_was_planted_and_nothing_else(podcast, tmp_path, capsys):
    options = {"lags": [-300.0, 300.0, 500.0], "n_folds": 2, "epochs": 24, "learning_rate": 1e-2}
    options |= {"n_shifts": 200, "controls": ["mean", "unigram", "preceding", "oracle"]}
    table = finished(podcast, tmp_path / "run", figures=True, **options)
    for model in ("ensemble_pitom_model", "ridge"):
        auc = table.loc[(model, "auc")]
        assert auc.score[300.0] > 0.75 and auc.p_max[300.0] < 0.05, (model, auc)
        assert (auc.p_max[[-300.0, 500.0]] > 0.05).all(), (model, auc)
    assert table.loc[("mean", "auc")].score.item() == 0.5
    assert table.loc[("oracle", "auc")].score.item() > 0.95
    assert abs(table.loc[("preceding", "auc")].score.item() - 0.5) < 0.1
    results = pd.read_csv(tmp_path / "run/results.csv")
    assert np.isfinite(results[["score", "chance", "low", "high", "n"]]).all(axis=None)
    assert results.data.str.contains("synthetic").all()
    assert (tmp_path / "run/lags.png").exists()
    printed = capsys.readouterr().out
    assert "the lag that each fold's validation words chose" in printed
    assert "too few" not in printed and printed.count("members") == 1
    assert "ensemble_pitom_model: an ensemble of 2 members" in printed


def test_predictions_do_not_depend_on_units_or_on_the_order_of_electrodes(podcast, tmp_path):
    config, experiment = prepared(podcast, tmp_path, model="ridge")
    X = torch.as_tensor(windows_at(experiment, 300.0))
    predictions = []
    for x in (X, 1e6 * X[:, torch.randperm(14)]):
        fold = experiment.folds[0]
        predictions.append(decode.fit_decoder("ridge", x, experiment.target, fold, config)[1])
    assert np.allclose(*predictions, atol=1e-3)


def test_a_stopped_run_goes_on_where_it_was_and_few_shifts_are_told(podcast, tmp_path, capsys):
    whole = finished(podcast, tmp_path, n_shifts=20, **RIDGE)
    assert "n_shifts=20 is too few" in capsys.readouterr().out
    files = list((tmp_path / "jobs").rglob("*.csv"))
    assert len(files) == 6
    files.pop().unlink()
    files.pop().write_bytes(b"")  # as after a full disk
    times = [path.stat().st_mtime_ns for path in files]
    pd.testing.assert_frame_equal(finished(podcast, tmp_path, n_shifts=20, **RIDGE), whole)
    assert [path.stat().st_mtime_ns for path in files] == times


def test_content_knows_words_and_signals(podcast, tmp_path):
    config, experiment = prepared(podcast, tmp_path)
    parts = config, experiment.inputs[""], experiment.target, experiment.rows
    first = decode.content_of(*parts)
    renamed = dataclasses.replace(experiment.target, labels=np.roll(experiment.target.labels, 1))
    assert decode.content_of(config, experiment.inputs[""], renamed, experiment.rows) != first
    signal = experiment.montage.people[0].recording.path / "signal.f32"
    before = signal.stat()
    os.utime(signal, (1, 1))  # made again
    assert decode.content_of(*parts) != first
    os.utime(signal, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert decode.content_of(*parts) == first
    experiment.montage.people[0].channels = experiment.montage.people[0].channels[1:]
    assert decode.content_of(*parts) != first


def test_a_target_of_classes_and_targets_of_numbers(podcast, tmp_path):
    (tmp_path / "mine.py").write_text(USER)
    options = {"lags": [300.0], "window": 0.4, "bins": 6}
    table = finished(podcast, tmp_path / "a", task="content", beside=["logistic"], **options)
    assert table.loc[("logistic", "roc_auc")].score.item() > 0.55  # the planted vectors say it
    for task in ("volume", f"{tmp_path}/mine.py:events"):
        out = tmp_path / task[-6:]
        table = finished(podcast, out, task=task, beside=["ridge"], **options)
        assert np.isfinite(table.score).all() and "corr" in table.index.unique("metric")
    assert table.loc[("ridge", "mse")].n.item() > 150  # events of the user's own
    _, experiment = prepared(podcast, tmp_path / "column", task=f"{tmp_path}/mine.py:column")
    assert experiment.target.kind == "number"


def test_targets_of_the_other_tasks(podcast, tmp_path):
    targets = {}
    for task in ("pos", "sentence_onset", "surprisal"):
        _, experiment = prepared(podcast, tmp_path / task, task=task)
        targets[task] = experiment.target
        words = experiment.words.set_index("start").loc[experiment.target.start]
        if task == "sentence_onset":
            is_onset = np.array(experiment.target.names)[experiment.target.values] == "onset"
            sentences = experiment.words.groupby("sentence").start.min()
            assert np.isin(words.index[is_onset], sentences).all()
            assert (words.index - sentences[words.sentence])[~is_onset].min() >= 0.5
    words = experiment.words.set_index("start")
    pos = targets["pos"]
    assert (np.array(pos.names)[pos.values] == words.pos[pos.start]).all()
    surprisal = targets["surprisal"]  # two tokens of probability .1 or .2 a word
    expected = -2 * np.log(0.1 * (1 + words.word_idx[surprisal.start] % 2))
    assert np.allclose(surprisal.values[:, 0], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"fold_type": "zero_shot", "loss": "cosine", "model": "pitom_model"},
        {"represent": "spectrum", "model": "foundation_mlp", "controls": ["oracle"]},
    ],
)
def test_options_run(podcast, tmp_path, options):
    table = finished(podcast, tmp_path, lags=[300.0], beside=[], **options)
    assert np.isfinite(table.score).all()


def test_saved_decoders_read_a_new_recording(podcast, tmp_path, capsys):
    other = make_podcast(tmp_path / "other")  # the same people
    signal = np.memmap(other / "sub-01/signal.f32", "<f4", "r+")
    signal += np.random.default_rng(5).normal(size=signal.shape) * 1e-7
    signal.flush()
    for name in ("sub-01", "sub-02"):
        edit(other / name / "meta.yaml", "sha256: ", "sha256: another")
    finished(podcast, tmp_path / "run", save_models=True, **RIDGE)
    apply = {"apply": str(tmp_path / "run"), "device": "cpu"}
    decode.main(configure(Config, [f"{k}={v}" for k, v in apply.items()] + [f"recording={other}"]))
    assert "3 decoders, at 300, 300, 300 ms" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "run/applied/scores.csv")
    assert {"onset", "norm_word", "best", "score worda"} <= set(table)
    assert (table.best == table.norm_word).mean() > 0.3  # of 12
    decode.main(Config(**apply, recording=str(podcast)))
    assert "trained on this very recording" in capsys.readouterr().out
    for unit in (1e6, 1e-6):
        signal *= unit
        signal.flush()
        with pytest.raises(
            InputError, match="not about 1 as in training: prepare it in the same unit"
        ):
            decode.main(Config(**apply, recording=str(other)))
        signal /= unit
    with pytest.raises(InputError, match="has no sub-02, whose electrodes"):
        decode.main(Config(**apply, recording=str(other / "sub-01")))
    edit(other / "sub-01/channels.csv", "LGA2,ecog,0.05,0.01,0.01,good", "LGA2,ecog,,,,bad")
    with pytest.raises(InputError, match="lacks good electrodes of sub-01 .*: LGA2"):
        decode.main(Config(**apply, recording=str(other)))
    with pytest.raises(InputError, match="holds no decoder"):
        decode.main(Config(apply=str(tmp_path), recording=str(other)))


# ---- a user's own files, and podcast-benchmark's

USER = """
import numpy as np
import torch
import registry

@registry.register_model_constructor()
def my_model(model_params):
    linear = torch.nn.Linear(model_params["input_channels"] * 2, model_params["embedding_dim"])
    return torch.nn.Sequential(torch.nn.Flatten(), linear)

@registry.register_data_preprocessor("halves")
def preprocess(data, preprocessor_params):
    open(__file__ + preprocessor_params["log"], "a").write("x")
    assert data.shape[2] == 51  # 0.4 s, as asked for below
    return np.stack([data[:, :, :25].mean(2), data[:, :, 25:].mean(2)], 2)

@registry.register_config_setter("wide")
def setter(experiment_config, raws, df_word, word_embeddings):
    assert len(raws) == 2 and raws[0].info["sfreq"] == 128
    assert len(df_word) == len(word_embeddings)
    n_channels = sum(len(raw.ch_names) for raw in raws)
    experiment_config.model_params["input_channels"] = n_channels
    experiment_config.data_params.window_width = 0.4
    return experiment_config

def wrong_model(p):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))

def no_model(p):
    return 3

def mixing(p):
    linear = torch.nn.LazyLinear(p["output_dim"])
    return torch.nn.Sequential(torch.nn.Flatten(), linear, torch.nn.Softmax(0))

def wrong_windows(data, params):
    return data.mean(0)

def wrong_target(words, params):
    return np.zeros(7)

def late(words, params):
    return np.where(words.word_idx > 180, "late", "early")

def column(words, params):
    return words[["word_idx"]].to_numpy(float)

def complex_windows(data, params):
    return np.fft.rfft(data)

def ragged(words, params):
    return [[1.0, 2.0]] * (len(words) - 1) + [[1.0]]

def text_starts(words, params):
    return events(words, params).astype({"start": str}).replace("5.0", "five")

def events(words, params):
    import pandas as pd
    return pd.DataFrame(dict(start=np.arange(5, 95, 0.5), target=np.tile([0.5, 1.5, 2.0], 60)))
"""


def test_a_users_model_preprocessor_and_setter_in_podcast_benchmarks_manner(podcast, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(USER)
    options = {"model": f"{file}:my_model", "preprocess": f"{file}:halves", "window": -1}
    options |= {"config_setter": f"{file}:wide", "preprocessor_params": {"log": ".log"}}
    options |= {"lags": [300.0], "beside": [], "epochs": 30, "learning_rate": 1e-2}
    table = finished(podcast, tmp_path / "run", **options)
    assert table.loc[(f"{file}:my_model", "auc")].score.item() > 0.75
    finished(podcast, tmp_path / "again", **options)
    assert (tmp_path / "mine.py.log").read_text() == "x"  # the windows came from the cache


def test_a_nested_yaml_of_podcast_benchmark_runs(podcast, tmp_path):
    (tmp_path / "conv.yml").write_text(NEURAL_CONV)
    argv = ["--config", str(tmp_path / "conv.yml"), "--training_params.batch_size=16"]
    argv += ["--training_params.epochs=1", "--data_params.subject_ids=[1,2]", "n_folds=2"]
    argv += ["model_params={conv_filters: 4, num_models: 2, embedding_dim: 4, reg: 0.35}", "pca=4"]
    argv += ["window=0.25", "preprocessor_params.num_average_samples=4", "beside=", "device=cpu"]
    argv += [f"dataset={podcast}", f"out_dir={tmp_path / 'run'}", "n_shifts=20", "min_count=2"]
    config = configure(Config, benchmark_yaml.command_line(argv))
    assert config.batch_size == 16 and config.subjects == ["1", "2"]
    decode.main(config)
    assert config.model_params["input_channels"] == 14  # of the setter
    resolved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert resolved["embedding"] == ["gpt2-xl"] and (tmp_path / "run/lags.png").exists()


# ---- bad input

BINS = {"preprocess": "preprocess_neural_data"}
REFUSED = [
    ({"task": "contnt"}, ["task=contnt: give embedding, content"]),
    ({"preprocess": "bins"}, ["preprocess=bins: give preprocess_neural_data"]),
    ({"config_setter": "neural"}, ["config_setter=neural: give neural_conv"]),
    ({"preprocessor_params": {"num_average_samples": 4}}, ["needs preprocess="]),
    ({**BINS, "preprocessor_params": {"num_avg": 13}}, ["no key 'num_avg'"]),
    (
        {**BINS, "preprocessor_params": {"num_average_samples": 0}},
        ["=0 does not divide 26 samples"],
    ),
    ({"layer": 3}, ["no layer-3", "layer-24"]),
    ({"embedding": ["nosuch.txt"]}, ["neither lm, static", "gpt2-xl"]),
    ({"electrodes": "no.csv"}, ["no.csv"]),
    ({"window": 0.01}, ["too few for 10 bins"]),
    ({"bins": 4}, ["[14, 4] inputs", "bins="]),
    ({"model_params": {"num_model": 2}}, ["num_model'", "num_models"]),
    ({"task": "mine.py:late"}, ["fold 0 are all 'late'"]),
    ({"word": "lemma"}, ["not a column", "norm_word"]),
    ({"min_count": 500}, ["fold 0", "min_count=500"]),
    ({"model": "ridge", "task": "surprisal", "beside": ["logistic"]}, ["is for classes"]),
    ({"n_folds": 1}, ["n_folds=1"]),
    ({"lags": [], "max_lag": -500.0}, ["no lag"]),
    ({"embedding": ["a", "b"]}, ["decoding has one target"]),
    ({"apply": "out/decode"}, ["recording="]),
    ({"untrained": 2}, ["foundation_model_preprocessing_fn"]),
    ({"dataset": "wordless"}, ["names no words"]),
    (
        {"dataset": "same", "embedding": ["arbitrary"]},
        ["are the same word, or have the same target"],
    ),
    ({"dataset": "same"}, ["are the same word, or have the same target"]),
    ({"model": "mine.py:wrong_model"}, ["returned shape (", "(words, 6)"]),
    ({"model": "mine.py:no_model"}, ["cannot read", "'int' object"]),
    ({"model": "mine.py:mixing"}, ["mixes the words of a batch"]),
    ({"model": "mine.py:nosuch"}, ["nosuch", "my_file.py:name"]),
    ({"preprocess": "mine.py:wrong_windows"}, ["returned float32 of shape (14, 26) for 219 words"]),
    ({"preprocess": "mine.py:complex_windows"}, ["returned complex", "real numbers"]),
    ({"task": "mine.py:wrong_target"}, ["returned what", "shape (7,) for 222 words"]),
    ({"task": "mine.py:ragged"}, ["returned what", "a target for each word"]),
    ({"task": "mine.py:text_starts"}, ["returned what", "five"]),
]


@pytest.fixture(scope="module")
def unfit(podcast, tmp_path_factory):
    """A folder of what REFUSED names."""
    folder = tmp_path_factory.mktemp("unfit")
    shutil.copytree(podcast, folder / "wordless")
    edit(folder / "wordless/meta.yaml", "words: words.csv\n", "")
    of_one_word(podcast, folder / "same")
    (folder / "mine.py").write_text(USER)
    return folder


@pytest.mark.parametrize("options, words", REFUSED)
def test_bad_input_is_refused_in_a_sentence(podcast, tmp_path, unfit, monkeypatch, options, words):
    monkeypatch.chdir(unfit)
    options = {"dataset": str(podcast), "lags": [300.0], "beside": [], "controls": [], **options}
    with pytest.raises(InputError) as error:
        finished(options.pop("dataset"), tmp_path, **options)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def of_one_word(podcast, folder):
    """A copy of the podcast whose every word is the same."""
    shutil.copytree(podcast, folder)
    words = pd.read_csv(podcast / "words.csv", keep_default_na=False)
    words.assign(norm_word="same").to_csv(folder / "words.csv", index=False)
    return folder


def test_a_transcript_of_ones_own_lacks_what_is_named(podcast, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(podcast, folder)
    for old, new, task, sentence in (
        ("content", "kind", "content", "set has no column 'content'"),
        ("sentence", "line", "sentence_onset", "set has no column 'sentence'"),
        (",0.02,", ",soon,", "embedding", "words.csv is not .*'soon'"),
        ("start", "begin", "embedding", "words.csv has no column 'start'"),
    ):
        edit(folder / "words.csv", old, new)
        with pytest.raises(InputError, match=sentence):
            prepared(folder, tmp_path / "run", task=task)
    (folder / "audio.f32").unlink()
    shutil.copy(podcast / "words.csv", folder)
    with pytest.raises(InputError, match="audio.f32 is missing"):
        prepared(folder, tmp_path / "run", task="volume")


def test_electrodes_by_table_with_any_of_a_persons_names(podcast, tmp_path):
    table = tmp_path / "sig.csv"
    table.write_text("subject,elec\n661,LGA2\nsub-02,LGB1\n2,LGA1\n1,nosuch\n")
    _, experiment = prepared(podcast, tmp_path / "run", electrodes=str(table))
    assert experiment.montage.names == ["sub-01 LGA2", "sub-02 LGA1", "sub-02 LGB1"]
