"""probe.py against naive oracles and scikit-learn, on models of a few thousand weights; null and truth on a stub whose states are made by rule."""
import json
import types
import weakref

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import byte_tokenizer, refused
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import probe
from configurator import configure
from data.tokens import state_of
from model import GPT, GPTConfig, Tokenizer, lm_state, save_checkpoint
from probe import LMModel, MultiStepOpt, NLPDataset, PoolToken, SingleStepOpt, best_thresholds, evaluator, run_exp

TOKENIZER = Tokenizer(state_of(byte_tokenizer()))
TEXTS = ["a", "bc d", "the cat sat on the mat", "to be, or not", "xyz" * 5, "ab"]


def gpt(**options):
    return GPT(GPTConfig(**{**dict(block_size=64, vocab_size=257, n_layer=3, n_head=2, n_embd=16), **options}))


def models(side="right"):
    """Our GPT, a causal and a masked model of transformers."""
    torch.manual_seed(0)
    shape = dict(vocab_size=257, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)
    theirs = dict(ours=gpt(), gpt2=GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=3, n_head=2)),
                  bert=BertForMaskedLM(BertConfig(**shape)))
    for model in theirs.values():  # weights large enough for positions and neighbours to matter
        for p in model.parameters():
            p.data.mul_(4) if p.dim() > 1 else None
    return {name: LMModel(dict(model=model, tokenizer=TOKENIZER, name=name), padding_side=side) for name, model in theirs.items()}


# ---- models and the one pass

@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_texts_one_by_one(side):
    for name, lm in models(side).items():
        together, mask = lm(TEXTS)["hidden_states"], lm(TEXTS)["attention_mask"].bool()
        assert lm.causal == (name != "bert") and len(together) == lm.n_layer + 1 and lm.blocks is not None
        assert not mask.all() and mask[0, -1 if lm.padding_side == "left" else 0]
        for i, text in enumerate(TEXTS):
            alone = lm([text])["hidden_states"]
            for a, b in zip(together, alone):
                assert torch.allclose(a[i][mask[i]], b[0], atol=1e-4), (name, side, text)


def test_hooks_hear_what_transformers_says():
    for name, lm in models().items():
        if name == "ours":
            continue
        ids, real = lm.pad(lm.encode(TEXTS)[0])
        said = lm.model(input_ids=ids, attention_mask=real.long(), output_hidden_states=True).hidden_states
        for a, b in zip(lm.run(ids, real, keep=True)["hidden_states"], said, strict=True):
            assert torch.allclose(a[real], b[real], atol=1e-4)


def naive_pool(states, mask, layer, q):
    """One text at a time."""
    rows = []
    for i in range(len(mask)):
        tokens = states[layer][i][mask[i]]
        how = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "min": lambda x: x.amin(0)}.get(q, lambda x: x[int(np.round(q * (len(x) - 1)))])
        rows.append(how(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_pass_is_pooling_afterwards(side, tmp_path):
    for name, lm in models(side).items():
        states = probe.pooled_states(lm, TEXTS, [0, 1, 3], ["0.0", "0.25", "1.0", "mean", "max", "min"], tmp_path / name, batch_tokens=24)
        out = lm(TEXTS)
        for k, layer in enumerate([0, 1, 3]):
            for p, array in states.arrays.items():
                wanted = naive_pool(out["hidden_states"], out["attention_mask"].bool(), layer, p if p in probe.REDUCE else float(p))
                assert np.abs(array[:, k] - wanted.numpy()).max() < 1e-4, (name, layer, p)


def test_nothing_is_computed_twice_and_an_interrupted_pass_goes_on(tmp_path, monkeypatch):
    lm, seen = models()["ours"], []
    run = lm.run

    def counted(ids, *args, **kwargs):
        seen.append(len(ids))
        if sum(seen) > 3 and fail:
            raise KeyboardInterrupt
        return run(ids, *args, **kwargs)
    monkeypatch.setattr(lm, "run", counted)
    fail = True
    with pytest.raises(KeyboardInterrupt):
        probe.pooled_states(lm, TEXTS, [0, 3], ["1.0"], tmp_path, batch_tokens=8)
    flags = next(tmp_path.glob("*/1.0.done")).read_bytes()
    done = sum(flags)
    assert 0 < done < len(TEXTS)
    fail = False
    seen.clear()
    first = probe.pooled_states(lm, TEXTS, [0, 3], ["1.0"], tmp_path, batch_tokens=8)
    assert sum(seen) == len(TEXTS) - done
    seen.clear()
    again = probe.pooled_states(lm, TEXTS, [0, 3], ["1.0"], tmp_path)
    assert not seen and np.array_equal(first.arrays["1.0"], again.arrays["1.0"])
    probe.pooled_states(lm, TEXTS, [0, 3], ["1.0", "mean"], tmp_path)  # another pooling: one pass for it alone
    assert sum(seen) == len(TEXTS) and len(list(tmp_path.glob("*/*.npy"))) == 3
    out = lm(TEXTS)
    assert np.abs(first.arrays["1.0"][:, 1] - naive_pool(out["hidden_states"], out["attention_mask"].bool(), 3, 1.0).numpy()).max() < 1e-4
    with torch.no_grad():
        lm.model.transformer.wte.weight += 1
    seen.clear()
    probe.pooled_states(lm, TEXTS, [0, 3], ["1.0"], tmp_path)  # other weights, other cache
    assert sum(seen) == len(TEXTS)


def test_hidden_states_are_never_held(tmp_path):
    """While the pass takes a layer, the layers before the last one are gone."""
    lm, alive, most = models()["gpt2"], [], []
    run = lm.run

    def watched(ids, real, layers=(), take=None, keep=False):
        def wrapped(i, x):
            take(i, x)
            most.append(sum(r() is not None for r in alive))
            alive.append(weakref.ref(x))
        return run(ids, real, layers, wrapped, keep)
    lm.run = watched
    with torch.no_grad():
        probe.pooled_states(lm, TEXTS * 3, [0, 1, 2, 3], ["1.0", "mean"], tmp_path, batch_tokens=24)
    assert len(most) > 12 and max(most) <= 2, most


def test_the_model_stops_at_the_deepest_layer_asked_for(tmp_path):
    lm, heard = models()["gpt2"], []
    lm.blocks[2].register_forward_pre_hook(lambda *a: heard.append(1))
    probe.pooled_states(lm, TEXTS, [0, 2], ["1.0"], tmp_path)
    assert not heard


def test_long_texts_are_cut_counted_and_said(tmp_path):
    lm, said = LMModel(dict(model=gpt(block_size=8), tokenizer=TOKENIZER)), []
    states = probe.pooled_states(lm, TEXTS, [3], ["1.0"], tmp_path, say=said.append)
    assert states.truncated == 3 and "3 of 6 texts are longer than its 8 tokens" in said[0] and states.lengths.max() == 8


def test_begin_with_end_of_text_is_context_and_never_pooled():
    lm = LMModel(dict(model=gpt(), tokenizer=TOKENIZER), bos=True)
    out = lm(TEXTS)
    assert out["attention_mask"].sum(1).tolist() == [len(t) for t in TEXTS] and (out["input_ids"][:, 0] == TOKENIZER.eot).all()


# ---- PoolToken

def outputs(lengths=(1, 3, 5), n_layer=4, H=3, side="right"):
    g, T = torch.Generator().manual_seed(0), max(lengths)
    mask = torch.stack([torch.arange(T) < n if side == "right" else torch.arange(T) >= T - n for n in lengths])
    return {"hidden_states": tuple(torch.randn(len(lengths), T, H, generator=g) for _ in range(n_layer + 1)), "attention_mask": mask.long()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_pool_selects_as_resolved(side):
    out = outputs(side=side)
    states, mask = out["hidden_states"], out["attention_mask"].bool()
    last = torch.stack([states[4][i][mask[i]][-1] for i in range(3)])
    assert torch.equal(PoolToken()(out), last) and torch.equal(PoolToken(4, 1.0)(out), last)  # -1: the last layer, the last token
    assert torch.equal(PoolToken(-2, 0)(out), naive_pool(states, mask, 3, 0.0))
    inner = [naive_pool(states, mask, i, 1.0) for i in (1, 2, 3)]  # 'all': without the first and the last
    assert torch.equal(PoolToken("all", layer_method="extend")(out), torch.cat(inner, 1))
    assert torch.allclose(PoolToken("all", layer_method="mean")(out), torch.stack(inner).mean(0))
    assert torch.equal(PoolToken([0, 4], 0.5, "max")(out), torch.maximum(naive_pool(states, mask, 0, 0.5), naive_pool(states, mask, 4, 0.5)))
    assert torch.allclose(PoolToken(2, "all", None, "mean")(out), naive_pool(states, mask, 2, "mean"), atol=1e-6)
    x, index = PoolToken(2, "all", None, "concat").pool(out)
    assert index.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2] and torch.equal(x, states[2][mask])
    x, index = PoolToken([1, 2], 1.0, "concat").pool(out)
    assert index.tolist() == [0, 0, 1, 1, 2, 2] and torch.equal(x[::2], inner[0]) and torch.equal(x[1::2], inner[1])
    x, index = PoolToken([1, 2], [0, 1.0], "extend", "concat").pool(out)
    assert x.shape == (5, 6) and index.tolist() == [0, 1, 1, 2, 2]  # the text of one token counts once
    assert len(PoolToken(1, [0, 1.0], None, "concat", dedupe=False)(out)) == 6
    assert torch.allclose(PoolToken(1, [0, 0.1, 1.0], None, "mean")(out)[2], (states[1][2][mask[2]][[0, 4]]).mean(0))


def test_pool_of_one_text_keeps_its_shape():
    assert PoolToken()(outputs((4,))).shape == (1, 3)


def test_the_cache_pools_as_the_outputs_do(tmp_path):
    lm = models()["ours"]
    data = NLPDataset(dict(name="x", data=dict(sentences=TEXTS, labels=[0, 1] * 3)))
    for pooler in (PoolToken(), PoolToken([1, 2], [0, 0.5, 1.0], "mean", "mean"), PoolToken("all", [0, 1.0], "extend", "concat"),
                   PoolToken(2, "all", None, "max"), PoolToken([0, 3], [0, 1.0], "concat", "extend"), PoolToken(1, "all", None, "concat")):
        x, index = pooler.pool(lm(TEXTS))
        for cache in (None, tmp_path):
            X, y = data.load_embeds_into_memory(lm, pooler, cache, batch_tokens=24)
            assert np.abs(X - x.numpy()).max() < 1e-4 and np.array_equal(data.index, index) and np.array_equal(y, data.y[index])
            assert np.array_equal(data.row_groups, data.groups[index])


def test_pool_refuses():
    for wrong, says in ((dict(layer=[1, 2], quantile=[0, 1], layer_method="concat", quantile_method="concat"), "both concat"),
                        (dict(layer=[1, 2]), "layer_method"), (dict(quantile=2.0), "between 0 and 1"),
                        (dict(layer_method="sum"), "layer_method"), (dict(layer="last"), "'all'")):
        with pytest.raises(ValueError, match=says):
            PoolToken(**wrong)
    with pytest.raises(ValueError, match="no layer 9"):
        PoolToken(9)(outputs())


# ---- data

def test_the_schema_in_lists_and_dicts():
    lists = dict(name="x", task="Classification", labels={"0": "no", "1": "yes"}, data=dict(sentences=["a", "b", "A "], labels=[0, 1, 0]))
    dicts = {**lists, "data": dict(sentences={"0": "a", "1": "b", "2": "A "}, labels={"0": 0, "1": 1, "2": 0})}
    for data in map(NLPDataset, (lists, dicts)):
        assert len(data) == 3 and data[1] == ("b", 1) and data.kind == "binary" and data.label_names == ["no", "yes"]
        assert data.groups[0] == data.groups[2] != data.groups[1]  # equal texts stay together
    rated = NLPDataset({**lists, "task": "Regression", "data": dict(sentences=["a", "b", "c"], labels=[1, 3, 5.0])})
    assert rated.kind == "regression" and rated.y.tolist() == [0, 0.5, 1]
    assert NLPDataset({**lists, "task": "Regression", "data": dict(sentences=["a", "b"], labels=[.2, .9])}, force_classification=True).y.tolist() == [0, 1]


def test_bad_data_is_refused(tmp_path):
    good = dict(name="x", data=dict(sentences=["a", "b"], labels=[0, 1]))
    (tmp_path / "broken.json").write_text(json.dumps(good)[:-9])
    with pytest.raises(ValueError, match="broken.json is not JSON"):
        NLPDataset(tmp_path / "broken.json")
    for data, says in ((dict(sentences=["a", " "], labels=[0, 1]), "sentence 1 is empty"),
                       (dict(sentences=["a", "b"], labels=[1, 1]), "all 2 labels are the same"),
                       (dict(sentences=["a"], labels=[0, 1]), "1 sentences and 2 labels"), (dict(sentences=["a"]), "no data: sentences and labels")):
        with pytest.raises(ValueError, match=says):
            NLPDataset({**good, "data": data})
    with pytest.raises((OSError, ValueError), match="get_data.py"):
        NLPDataset(tmp_path / "none.json")
    with pytest.raises(ValueError, match="text 1 of 2 is empty"):
        models()["ours"].encode(["a", ""])


def toy(n=120, seed=0, groups=3):
    rng = np.random.default_rng(seed)
    data = NLPDataset(dict(name="toy", synthetic=True, data=dict(sentences=[f"{i} {rng.integers(1e6)}" for i in range(n)], labels=(np.arange(n) % 2).tolist())))
    data.groups = np.arange(n) // groups
    return data


def test_groups_never_split_and_labels_spread_evenly():
    data = toy()
    for seed in range(3):
        folds = probe.folds_of(data, data.y, 5, seed)
        assert all(len(set(folds[data.groups == g])) == 1 for g in set(data.groups)) and set(folds) == set(range(5))
        assert max(abs(data.y[folds == f].mean() - 0.5) for f in range(5)) < 0.1
        y = probe.shuffled(data, data.y, np.random.default_rng(seed))
        assert sorted(y) == sorted(data.y) and not np.array_equal(y, data.y)


# ---- probes against scikit-learn

def sites(G=3, n=90, H=12, K=2, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n)
    X = rng.normal(size=(G, n, H)) * rng.uniform(0.2, 5, (G, 1, H)) + rng.normal(size=(G, 1, H)) * 3
    X += 0.8 * np.eye(K, H)[y] * np.arange(1, G + 1)[:, None, None]
    return torch.from_numpy(X.astype(np.float32)), y


@pytest.mark.parametrize("K", [2, 4])
def test_lda_is_scikit_learns_at_every_site(K):
    X, y = sites(K=K)
    Y = nn.functional.one_hot(torch.as_tensor(y), K).float()
    for s, (W, b) in zip((0.05, 0.5), probe.lda(probe.moments(X, Y), (0.05, 0.5))):
        for g in range(len(X)):
            theirs = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)).fit(X[g], y)
            ours = (X[g] @ W[g] + b[g]).double()
            p = torch.cat([1 - ours.sigmoid(), ours.sigmoid()], 1) if K == 2 else ours.softmax(1)
            assert np.abs(p.numpy() - theirs.predict_proba(X[g])).max() < 1e-3


def test_ridge_is_scikit_learns_and_folds_add_up():
    X, _ = sites()
    Y = torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    parts = [probe.moments(X[:, i::3], Y[i::3]) for i in range(3)]
    for alpha, (W, b) in zip((0.1, 30.0), probe.ridge(probe.add(parts), (0.1, 30.0))):
        for g in range(len(X)):
            theirs = make_pipeline(StandardScaler(), Ridge(alpha)).fit(X[g], Y).predict(X[g])
            assert np.abs((X[g] @ W[g] + b[g]).numpy() - theirs).max() < 1e-3


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("C", [0.01, 1.0])
def test_logistic_is_scikit_learns_at_every_site(K, C):
    X, y = sites(K=K)
    Z = (X - X.mean(1, keepdim=True)) / X.std(1, correction=0, keepdim=True)
    Y = nn.functional.one_hot(torch.as_tensor(y), K).float()
    W, b = probe.logistic(Z, Y if K > 2 else Y[:, 1:], C, tol=1e-5)
    for g in range(len(X)):
        theirs = LogisticRegression(C=C, tol=1e-7, max_iter=5000).fit(Z[g], y)
        out = (Z[g] @ W[g] + b[g]).double()
        p = torch.cat([1 - out.sigmoid(), out.sigmoid()], 1) if K == 2 else out.softmax(1)
        assert np.abs(p.numpy() - theirs.predict_proba(Z[g])).max() < 2e-3


def test_torch_probes_of_all_sites_are_each_alone():
    X, y = sites(n=80)
    X = (X - X.mean(1, keepdim=True)) / X.std(1, correction=0, keepdim=True)
    for make in (probe.SingleLayer, probe.DoubleLayer, probe.GatedLayer):
        def several(G, make=make):
            found = []
            for _ in range(G):
                torch.manual_seed(5)
                found.append(make(12))
                found[-1].max_epoch, found[-1].min_steps, found[-1].batch_size = 4, 0, 16
            return found
        y_t = torch.as_tensor(y)
        together = probe.train_multistep(several(3), X[:, :60], y_t[:60], X[:, 60:], y_t[60:], "binary", 0)
        for g in range(3):
            alone = probe.train_multistep(several(1), X[g:g + 1, :60], y_t[:60], X[g:g + 1, 60:], y_t[60:], "binary", 0)
            assert all(torch.allclose(together[k][g], alone[k][0], atol=1e-4) for k in alone)


def test_attention_pooling_looks_only_at_real_tokens():
    torch.manual_seed(0)
    pool, x, mask = probe.AttentionPool(4), torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    out = pool(x, mask)
    x[1, 2:] = 99
    assert torch.equal(out, pool(x, mask))


# ---- measures

def test_thresholds_are_the_best_there_are():
    rng = np.random.default_rng(0)
    for seed in range(20):
        y, score = rng.integers(0, 2, 25), rng.normal(size=(2, 25)).round(seed % 3)  # with ties
        found = best_thresholds(y, score)
        for g in range(2):
            cuts = [*np.unique(score[g]) - 1e-9, np.inf]
            assert ((score[g] >= found["accuracy"][g]) == y).mean() == max(((score[g] >= c) == y).mean() for c in cuts)
            assert np.isclose(f1_score(y, score[g] >= found["f1"][g], zero_division=0), max(f1_score(y, score[g] >= c, zero_division=0) for c in cuts))


def test_a_constant_answer_scores_as_the_majority():
    y = np.array([1] * 70 + [0] * 30)
    for value in (0.0, 0.7):
        found = evaluator(y, np.full(100, value), "binary", best_thresholds(y, np.full(100, value)))
        chance = probe.constants(y, y, "binary")
        assert found["accuracy"] == chance["accuracy"] == 0.7 and found["auc"] == 0.5 and found["mcc"] == 0
        assert np.isclose(found["f1"], chance["f1"]) and found["balanced_accuracy"] == 0.5
    assert evaluator(y, np.tile([0.9, 0.1], (100, 1)), "multi")["accuracy"] == 0.3


def test_measures_are_scikit_learns():
    rng = np.random.default_rng(0)
    y, score = rng.integers(0, 2, 60), rng.random((3, 60)).round(2)
    found = evaluator(y, score)
    for g in range(3):
        said = score[g] >= 0.5
        assert np.isclose(found["auc"][g], roc_auc_score(y, score[g])) and np.isclose(found["mcc"][g], matthews_corrcoef(y, said))
        assert np.isclose(found["f1"][g], f1_score(y, said)) and np.isclose(found["mse"][g], np.square(score[g] - y).mean())
    value = rng.normal(size=60)
    assert np.isclose(evaluator(value, score, "regression")["pearson"][1], scipy.stats.pearsonr(value, score[1])[0])


def test_a_fold_without_one_of_the_classes_is_at_chance():
    found = evaluator(np.ones(10, int), np.random.default_rng(0).random((1, 10)))
    assert found["auc"] == 0.5 and np.isclose(found["balanced_accuracy"], found["accuracy"])


def test_other_texts_or_weights_are_no_results_to_go_on_with(tmp_path):
    stub_run(tmp_path, Stub(1), stub_data(60))
    stub_run(tmp_path, Stub(1), stub_data(60))  # the same again is
    with pytest.raises(ValueError, match="other weights, texts or labels"):
        stub_run(tmp_path, Stub(1), stub_data(80))
    other = Stub(1)
    other.weight.data += 1
    with pytest.raises(ValueError, match="other weights, texts or labels"):
        stub_run(tmp_path, other, stub_data(60))


def test_the_first_texts_are_the_first_of_each_part():
    data = toy(120)
    data.split = np.repeat(["train", "val", "test"], 40)
    part = data.first(30)
    assert len(part) == 30 and [int((part.split == name).sum()) for name in ("train", "val", "test")] == [10, 10, 10]


def test_holm():
    assert np.allclose(probe.holm([0.01, 0.04, 0.03, 0.5]), [0.04, 0.09, 0.09, 0.5])


def test_the_code_of_noise_is_no_shorter_than_uniform_and_that_of_a_rule_is():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    X = torch.from_numpy(rng.normal(size=(2, 400, 8)).astype(np.float32))
    X[1, :, 3] += torch.as_tensor(6.0 * y)
    bits = probe.online_code(X, y, np.arange(400), "binary", 2, 0).sum(1)
    assert bits[0] > 0.98 * 400 and bits[1] < 0.4 * 400


# ---- null and truth, on a stub whose hidden states are made by rule

class Stub(nn.Module):
    """States are noise, drawn for each text; what is planted is added to one layer alone. Text: 'NUMBER LABEL'."""

    def __init__(self, layer=None, n_layer=4, H=12, seed=0):
        super().__init__()
        self.layer, self.n_layer, self.H, self.seed, self.weight = layer, n_layer, H, seed, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, output_hidden_states=True):
        states = torch.empty(self.n_layer + 1, *input_ids.shape, self.H)
        for i, row in enumerate(input_ids.tolist()):
            states[:, i] = torch.randn(self.n_layer + 1, 1, self.H, generator=torch.Generator().manual_seed(1000 * self.seed + row[0]))
            if self.layer is not None:
                states[self.layer, i, :, 2] += 3.0 * row[1]
        return types.SimpleNamespace(hidden_states=tuple(states))


class Numbers:
    eot = None

    def encode(self, text):
        return list(map(int, text.split()))


def stub_data(n=200, seed=0):
    y = np.random.default_rng(seed).permutation(np.arange(n) % 2)
    return NLPDataset(dict(name="numbers", synthetic=True, data=dict(sentences=[f"{i} {v}" for i, v in enumerate(y)], labels=y.tolist())))


def stub_run(tmp_path, stub, data, **options):
    return run_exp([data], [dict(model=stub, tokenizer=Numbers(), name="stub")], logs_folder=tmp_path / "out", cache=str(tmp_path / "cache"), device="cpu",
                   **{**dict(quantiles=["1.0"], baselines=[], train_sizes=[], keep_predictions=False), **options})


def test_a_planted_feature_is_found_at_its_layer_and_nowhere_else(tmp_path):
    table = stub_run(tmp_path, Stub(layer=2), stub_data(), classifiers=["LDA", "Logistic"])
    for name in ("LDA", "Logistic"):
        auc = table[(table.probe == name) & (table.metric == "auc") & (table.baseline == "")].set_index("layer")
        assert auc.loc[2, "p_holm"] < 0.001 and auc.loc[2, "score"] > 0.9
        assert (auc.drop(2).p_holm > 0.05).all() and (auc.drop(2).score < 0.65).all()
        best = table[(table.probe == name) & (table.layer == "best")].iloc[0]
        assert best.score > 0.85 and best.chance == 0.5


def test_nothing_is_found_in_shuffled_labels(tmp_path):
    """20 seeds: p-values of one site are uniform, and the family-wise corrected ones find something no more often than they may."""
    p, smallest = [], []
    for seed in range(20):
        data = stub_data(120)
        data.y = probe.shuffled(data, data.y, np.random.default_rng(seed))
        found = measured(Stub(layer=2, seed=seed), data, tmp_path)
        p.append(found[2][3])
        smallest.append(probe.holm([f[3] for f in found]).min())
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.05, sorted(p)
    assert np.mean(np.array(smallest) < 0.05) <= 0.15 and np.median(smallest) > 0.05


def measured(stub, data, tmp_path, probe_name="LDA"):
    """corrected_t of the AUC at each layer, without the files of a run."""
    lm = LMModel(dict(model=stub, tokenizer=Numbers(), name="stub"))
    config = probe.Config(cache=str(tmp_path), n_folds=5)
    run = types.SimpleNamespace(progress=lambda *a, **k: types.SimpleNamespace(update=lambda n: None, close=lambda: None), print=print)
    here = probe.Sites(lm, data, [PoolToken(i, 1.0) for i in range(lm.n_layer + 1)], config, run, "")
    found = probe.measure(here, probe_name, data.y, config, 2)
    return [probe.corrected_t(found[i]["test"]["auc"], 0.5, found[i]["ratio"], found[i]["n_test"]) for i in range(lm.n_layer + 1)]


def test_permutations_give_p_and_a_family_wise_one(tmp_path):
    table = stub_run(tmp_path, Stub(layer=1, n_layer=2), stub_data(80), permutations=19)
    auc = table[(table.metric == "auc")].set_index("layer")
    assert auc.loc[1, "p"] == auc.loc[1, "p_holm"] == 0.05 and auc.loc[2, "p_holm"] >= auc.loc[2, "p"] > 0.05


# ---- the seed's examples, as printed there

def test_the_examples_of_the_document_run(tmp_path):
    space = {}
    exec("from probe import *", space)
    exec('''
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
''', space)
    table = stub_run(tmp_path, Stub(layer=2, n_layer=2), stub_data(), classifiers=[space["LDA"], space["SingleLayer"]], quantiles=[],
                     poolers=[PoolToken(1), PoolToken(2), PoolToken([1, 2], layer_method="extend"), PoolToken([1, 2], layer_method="concat")])
    score = table[(table.metric == "accuracy") & (table.baseline == "") & (table.layer != "best")].set_index(["probe", "layer", "layer_method"]).score
    for name in ("LDA", "SingleLayer"):
        assert score[name, 2, ""] > 0.75 > 0.65 > score[name, 1, ""] and score[name, "1-2", "extend"] > 0.65
    log = json.loads((tmp_path / "out/logs/stub__numbers__LDA.json").read_text())["experiment_0"]
    assert log.keys() == {"metadata", "expdata", "data"} and len(log["data"]["Accuracy"]) == len(log["data"]["F1"]) == 5
    assert set(log["expdata"]) == {"model", "classifier", "layer", "quantile", "layer_method", "quantile_method", "attention"}
    own = space["SingleLayer"](3).fit(np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2, np.zeros((4, 3)), np.arange(4) % 2)
    assert isinstance(own, MultiStepOpt) and own.predict(np.zeros((2, 3))).shape == (2, 1) and issubclass(space["LDA"], SingleStepOpt)


def test_every_probe_finds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(probe.AttentionPool, "min_steps", 60)
    table = stub_run(tmp_path, Stub(layer=1, n_layer=1), stub_data(), classifiers=list(probe.PROBES), n_folds=4)
    score = table[(table.metric == "accuracy") & (table.baseline == "")].set_index(["layer", "probe"]).score
    assert set(score[1].index) == set(probe.PROBES) and (score[1] > 0.7).all() and (score[0] < 0.7).all(), score.to_dict()


def test_baselines_stand_beside_the_score_and_the_app_gets_its_files(tmp_path):
    table = stub_run(tmp_path, Stub(layer=2, n_layer=2), stub_data(), keep_predictions=True, baselines=probe.BASELINES, train_sizes=[60])
    main = table[(table.metric == "accuracy") & (table.baseline == "") & (table.layer == 2)]
    assert {"majority", "layer0", "random_init", "control"} <= set(table.baseline) and {"compression", "selectivity"} <= set(table.metric)
    assert table[["score", "chance", "low", "high", "n"]].notna().all().all() and table[table.baseline != ""].p.isna().all()
    assert sorted(main.n_train) == [60, 160]
    kept = np.load(tmp_path / "out/predictions/stub__numbers__LDA__2__1.0.npz")
    assert sorted(kept["index"]) == list(range(200)) and roc_auc_score(kept["y"], kept["score"]) > 0.9 and kept["threshold"].shape == ()
    xy = np.load(tmp_path / "out/projections/stub__numbers__2__1.0.npz")
    assert xy["xy"].shape == (200, 2) and xy["explained"].sum() < 1
    assert (tmp_path / "out/texts/numbers.csv").exists() and list((tmp_path / "out").glob("layers_*.png"))


# ---- the command

@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_checkpoint(folder / "best.pt", {**lm_state(gpt(block_size=16)), "tokenizer": TOKENIZER.state})
    return folder


def write_json(path, texts, labels):
    path.write_text(json.dumps(dict(name="mine", task="Classification", data=dict(sentences=texts, labels=labels))))
    return path


def test_bad_input_ends_in_one_sentence(lm_folder, tmp_path):
    good = write_json(tmp_path / "good.json", [f"{'xy'[i % 2]} text {i}" for i in range(30)], [i % 2 for i in range(30)])
    base = [f"lm={lm_folder}", f"out_dir={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", "device=cpu"]
    refused("probe", *base, f"dataset={good}", "layers=[9]", says=["no layer 9", "0 (embeddings) to 3"])  # as a user sees it; the others in this process
    broken = tmp_path / "broken.json"
    broken.write_text(good.read_text()[:40])
    for data, more, says in (
            (write_json(tmp_path / "empty.json", ["a", ""], [0, 1]), [], ["empty.json", "sentence 1 is empty"]),
            (write_json(tmp_path / "one.json", ["a", "b"], [1, 1]), [], ["one.json", "all 2 labels are the same"]),
            (broken, [], ["broken.json", "is not JSON"]),
            (good, ["poolers=[{layer: [1, 2], layer_method: concat, quantile: [0, 1.0], quantile_method: concat}]"], ["both concat"]),
            (good, ["poolers=[{layer: 9}]"], ["no layer 9"]), (good, ["quantiles=last"], ["'last'", "mean, max or min"]),
            (good, ["probe=SVM"], ["'SVM'", "LDA, Ridge"]), (good, ["n_folds=16"], ["a label has 15 texts", "n_folds"])):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            probe.main(configure(probe.Config, [*base, f"dataset={data}", *more]))
        assert all(words in str(error.value) for words in says), error.value


def test_a_sweep_started_again_skips_what_it_has(lm_folder, tmp_path, monkeypatch):
    data = write_json(tmp_path / "good.json", [f"{'xy'[i % 2]} text {i} which is long" for i in range(40)], [i % 2 for i in range(40)])
    config = lambda: probe.Config(lm=[str(lm_folder)], dataset=[str(data)], out_dir=str(tmp_path / "out"), cache=str(tmp_path / "cache"), device="cpu",
                                  probe=["LDA"], train_sizes=[], n_folds=4)
    first = probe.experiment(config())
    monkeypatch.setattr(probe, "nested", None)  # and would fail, were it called
    monkeypatch.setattr(probe, "_fill", None)
    again = probe.experiment(config())
    assert first.equals(again) and len(first) > 50
