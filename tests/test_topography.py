"""topography.py against planted truth and naive oracles: a planted block is found, its ablation hurts, sentence scores are Hugging Face's."""
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from helpers import byte_tokenizer, make_dataset
from test_model import small

import positions
import topography as T
from data.stimuli import read_pairs
from data.tokens import state_of
from model import Tokenizer, lm_state, save_checkpoint
from topography import Config


class Plain:
    """What the measuring functions need of a Run."""
    device = torch.device("cpu")

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


class Letters:
    """A tokenizer of lower-case letters and blanks for a vocabulary of 100."""
    eot = 99

    def encode(self, text):
        return [ord(c) % 90 for c in text]


TEXTS = ["the cat", "a", "dogs bark at night", "zebra", "the cats sleep"]


def test_batched_responses_are_those_of_single_texts():
    model = small(sheet=True, radius=2)
    names = positions.layer_names(2)
    got = T.responses(Plain(), model, Letters(), TEXTS, batch_tokens=24)
    for text, found in zip(TEXTS, got):
        with torch.no_grad():
            hidden = model(torch.tensor([[99] + Letters().encode(text)]), hidden=names).hidden
        naive = np.stack([hidden[name][0, 1:].mean(0).numpy() for name in names])  # the text's own tokens
        assert np.allclose(found, naive, atol=1e-5)


def test_sentence_scores_equal_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(gelu="tanh")
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ours = T.sentence_logprobs(Plain(), model, Letters(), TEXTS, batch_tokens=24)
    for text, score in zip(TEXTS, ours):
        idx = torch.tensor([[99] + Letters().encode(text)])
        with torch.no_grad():
            n = idx.size(1) - 1
            assert np.isclose(score, -theirs(idx, labels=idx).loss.item() * n, atol=1e-4)
    assert np.allclose(T.sentence_logprobs(Plain(), theirs, Letters(), TEXTS, 24, size=32), ours, atol=1e-4)  # any causal LM


def test_batches_hold_every_text_once_within_the_budget():
    rows = [[0] * n for n in np.random.default_rng(0).integers(1, 30, 200)]
    batches = list(T.length_batches(rows, 64))
    assert sorted(i for b in batches for i in b) == list(range(200))
    assert all(len(b) * max(len(rows[i]) for i in b) <= 64 for b in batches)


def planted(rng, n=40, side=8, block=9, strength=3.0):
    """Responses (2n, 1, C) of a random layout whose units in a 3 x 3 block of cells prefer the first n stimuli; the layout, the block's units."""
    layout = rng.permutation(side * side)[None]
    cells = [side * i + j for i in range(2, 5) for j in range(3, 6)]
    units = layout[0][cells]
    x = rng.standard_normal((2 * n, 1, side * side))
    x[:n, 0, units] += strength
    return x, layout, units, cells


def test_a_planted_block_is_mask_and_cluster():
    rng = np.random.default_rng(0)
    x, layout, units, cells = planted(rng)
    t, p = T.welch(x[:40], x[40:])
    oracle = [scipy.stats.ttest_ind(x[:40, 0, u], x[40:, 0, u], equal_var=False) for u in range(64)]
    assert np.allclose(t[0], [o.statistic for o in oracle]) and np.allclose(p[0], [o.pvalue for o in oracle])
    import mne
    mask = mne.stats.fdr_correction(p, 0.05)[0] & (t > 0)
    assert set(units) <= set(np.flatnonzero(mask[0])) and mask.sum() <= 11
    maps = T.on_sheet(t, layout)[0]
    assert np.allclose(maps, t[0][layout[0]].reshape(8, 8))
    labels = T.clusters(maps, smallest=5, stop=4.0)
    assert labels.max() == 1 and set(np.flatnonzero(labels.ravel())) == set(cells)
    assert T.clusters(maps, smallest=10, stop=4.0).max() == 0
    scores, low, high, null = T.moran_of_contrast(x, np.arange(40), np.arange(40, 80), layout, rng, 200)
    assert null.mean() == pytest.approx(-1 / 63, abs=0.02) and low[0] < scores[0] < high[0] and scores[0] > null.max()
    labels = T.shuffled_labels(x, np.arange(40), np.arange(40, 80), layout, rng, 40)
    assert scores[0] > labels.max()  # independent units but for the block: a map of nothing is rough
    blurred, _, _, blurred_null = T.moran_of_contrast(x, np.arange(40), np.arange(40, 80), layout, rng, 20, fwhm=3.0)
    assert blurred_null.mean() > 0.4  # smoothing alone raises Moran's I: its null must be its own


def test_welch_of_constant_units_is_nothing():
    t, p = T.welch(np.ones((5, 3)), np.ones((6, 3)))
    assert (t == 0).all() and (p == 1).all()


def test_silencing_the_units_that_matter_hurts():
    """Only the first layer's MLP tells the last token; zeroing its planted units, and not as many others, changes what is predicted."""
    model = small(sheet=True, radius=2)
    with torch.no_grad():
        planted_units = torch.arange(0, 16)
        model.transformer.h[0].mlp.c_proj.weight[16:] = 0
        model.transformer.h[0].mlp.c_proj.bias[16:] = 0
    idx = torch.randint(0, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    whole = model(idx).logits

    def change(units):
        mask = np.zeros((4, 64), bool)
        mask[1, units] = True  # layer.0.mlp
        with T.silenced(model, mask):
            return (model(idx).logits - whole).abs().mean().item()
    assert change(planted_units.numpy()) > 0.01 and change(np.arange(20, 36)) == 0
    assert torch.equal(model(idx).logits, whole)  # the hooks are gone


def test_geometry():
    rng = np.random.default_rng(0)
    assert T.effective_dimensionality(np.eye(10)) == pytest.approx(10) and T.effective_dimensionality(np.ones((10, 10))) == pytest.approx(1)
    smooth = np.add.outer(np.arange(12.0), np.arange(12.0))
    shuffled = rng.permutation(smooth.ravel()).reshape(12, 12)
    assert T.smoothness(smooth) > 0.6 > 0.2 > T.smoothness(shuffled)
    scattered = [T.wiring_length(shuffled, rng.permutation(shuffled.ravel()).reshape(12, 12)) for _ in range(5)]
    assert T.wiring_length(smooth, smooth) < 0.8 * np.mean(scattered)
    score, low, high, n = T.paradigm_accuracy(np.array([1.0, 2, 3, 0]), np.array([0.0, 1, 3, 1]))
    assert (score, n) == (0.625, 4) and 0 < low < score < high < 1


def test_stimuli_in_the_known_layouts(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/run1.csv").write_text("stim1,stim2,stim3,stim4\n1,THE,CAT,S\n2,DAP,LIR,N\n")
    assert T.read_stimuli(tmp_path / "f").values.tolist() == [["the cat", "S"], ["dap lir", "N"]]
    (tmp_path / "m.csv").write_text("word,category,class\ndole,abstract,noun\nrun,concrete,verb\n")
    assert T.read_stimuli(tmp_path / "m.csv").condition.tolist() == ["abstract noun", "concrete verb"]
    (tmp_path / "o.csv").write_text("sentence,a,b\nhello there,x,y\nnull,x,z\n")
    assert T.read_stimuli(tmp_path / "o.csv", "sentence", "a,b").values.tolist() == [["hello there", "x y"], ["null", "x z"]]
    assert T.read_stimuli(tmp_path / "o.csv", "sentence,b", "a").values.tolist() == [["hello there y", "x"], ["null z", "x"]]
    for text, words in (("text,kind\na,b\n", "no column 'condition', only text, kind"), ("text,condition\n ,b\n", "line 2: the text is empty")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            T.read_stimuli(tmp_path / "bad.csv")
    with pytest.raises((OSError, ValueError), match="no stimuli"):
        T.read_stimuli(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="condition 'q'.*there are x"):
        T.find_contrasts(Config(contrasts=["q>x"]), ["x"] * 5)
    with pytest.raises(ValueError, match="A>B"):
        Config(contrasts=["nouns"]).check()


def test_weight_loss_is_topoloss():
    topoloss = pytest.importorskip("topoloss")
    net = torch.nn.Sequential(torch.nn.Linear(20, 144, bias=False))
    for factor in (3.0, 4.0, 5.5):
        theirs = topoloss.TopoLoss(losses=[topoloss.LaplacianPyramid.from_layer(model=net, layer=net[0], factor_h=factor, factor_w=factor, scale=1.0)])
        order = torch.randperm(144)
        shuffled = torch.empty_like(net[0].weight)
        shuffled[order] = net[0].weight.detach()  # unit order[c] sits at cell c
        assert positions.weight_loss(shuffled, order, factor).item() == pytest.approx(theirs.compute(model=net).item(), abs=1e-6)
    model = small(sheet=True, radius=2, spatial="weights", alpha=0.5)
    idx = torch.randint(0, 100, (2, 9))
    out = model(idx[:, :-1], idx[:, 1:], model.draw_windows(torch.Generator()))
    assert out.spatial.item() == pytest.approx(model.weight_loss().item()) and out.loss.item() == pytest.approx((out.task + 0.5 * out.spatial).item())
    out.loss.backward()
    with pytest.raises(ValueError, match="spatial=weights"):
        small(sheet=True, radius=2, spatial="weights", head_loss=True)


def test_a_whole_run(tmp_path):
    model = small(sheet=True, radius=2, vocab_size=257)
    save_checkpoint(tmp_path / "best.pt", {**lm_state(model), "tokenizer": state_of(byte_tokenizer())})
    make_dataset(tmp_path / "data")
    rng = np.random.default_rng(0)
    texts = [("".join(rng.choice(list("abcdefgh" if k == "one" else "stuvwxyz"), 9)), k) for k in ("one", "two") for _ in range(24)]
    pd.DataFrame(texts, columns=["text", "condition"]).to_csv(tmp_path / "s.csv", index=False)
    (tmp_path / "pairs").mkdir()
    for uid in ("p1", "p2"):
        (tmp_path / "pairs" / f"{uid}.jsonl").write_text('{"sentence_good": "ab cd", "sentence_bad": "xq zz"}\n{"sentence_good": "a", "sentence_bad": "b"}\n')
    assert list(read_pairs(tmp_path / "pairs")) == ["p1", "p2"]
    T.main(Config(lm=str(tmp_path), twin=str(tmp_path), stimuli=str(tmp_path / "s.csv"), pairs=str(tmp_path / "pairs"), dataset=str(tmp_path / "data"),
                  out_dir=str(tmp_path / "out"), shuffles=20, ablate=[4], random_sets=2, val_batches=1, min_cluster=2, device="cpu", dtype="float32", fwhm=2.0))
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert {"moran", "minimal pairs", "selectivity", "ablation accuracy", "ablation val_loss", "smoothness", "wiring length", "effective dimensionality"} \
        <= set(table.measure)
    mean = table[(table.measure == "moran") & (table.sheet == "mean")].set_index(["model", "blur"])
    assert mean.loc[("model", 0.0), "score"] == mean.loc[("twin", 0.0), "score"]
    assert abs(mean.loc[("model", 0.0), "chance"]) < 0.1 < 0.3 < mean.loc[("model", 2.0), "chance"]
    assert {"map_one_two.png", "summary.png"} <= {f.name for f in (tmp_path / "out").iterdir()}


def test_the_tokenizer_of_a_checkpoint_begins_a_text():
    tokenizer = Tokenizer(state_of(byte_tokenizer()))
    assert T.begin(tokenizer, "ab", 2) == [256, 97]
