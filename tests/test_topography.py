"""topography.py against planted truth and naive oracles: a planted block is found, its ablation
hurts, sentence scores are those of transformers."""

import os
import shutil

import mne
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import transformers
from helpers import ROOT, byte_tokenizer, input_error, make_dataset
from test_model import small

import positions
import topography
from configurator import Run
from convert import HiddenStates, export_gpt
from data import InputError
from data.contrasts import find_contrasts, read_stimuli
from data.stimuli import read_pairs
from data.tokens import Tokenizer, learn_bpe, state_of, write_dataset
from model import lm_state, save_checkpoint
from topography import Config, Sheets

BLIMP = ROOT.parent / "shared/real/blimp"
TEXTS = ["the cat", "a", "dogs bark at night", "zebra", "the cats sleep"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A Run, for what measures."""
    out = str(tmp_path_factory.mktemp("plain"))
    plain = Run(Config(out_dir=out, device="cpu", dtype="float32"))
    yield plain
    plain.close()


class Letters:
    """A tokenizer of letters for a vocabulary of 100."""

    eot = 99

    def encode(self, text):
        return [ord(c) % 90 for c in text]


def letters_lm(model):
    return HiddenStates({"model": model, "tokenizer": Letters()}, bos=True, head=True)


def test_batched_responses_are_those_of_single_texts(plain):
    model = small(sheet=True, radius=2)
    names = positions.layer_names(2)
    responses = topography.unit_responses(plain, letters_lm(model), TEXTS, batch_tokens=24)
    for text, response in zip(TEXTS, responses):
        with torch.no_grad():
            hidden = model(torch.tensor([[99, *Letters().encode(text)]]), hidden=names).hidden
        naive = [hidden[name][0, 1:].mean(0).numpy() for name in names]  # the text's own tokens
        assert np.allclose(response, np.stack(naive), atol=1e-5)


def test_sentence_scores_equal_transformers(plain, tmp_path):
    model = small(gelu="tanh")
    export_gpt(model, tmp_path)
    reference = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    for net in (model, reference):
        lm = letters_lm(net)
        rows = lm.encode(TEXTS)[0]
        scores = topography.sentence_scores(plain, lm, rows, batch_tokens=24)
        for text, score in zip(TEXTS, scores):
            idx = torch.tensor([[99, *Letters().encode(text)]])
            with torch.no_grad():
                loss = reference(idx, labels=idx).loss.item()
            assert np.isclose(score, -loss * (idx.size(1) - 1), atol=1e-4)
            alone = topography.sentence_scores(plain, lm, lm.encode([text])[0])
            assert np.isclose(score, alone[0], atol=1e-4)  # whatever stands beside it


class MaskedLetters:
    """A BERT-like tokenizer of letters with [CLS] 98, [SEP] 97, [MASK] 96."""

    mask_token_id = 96
    all_special_ids = (96, 97, 98)
    eot = None

    def encode(self, text):
        return [98, *(ord(c) % 90 for c in text), 97]


def test_the_token_that_closes_a_text_is_not_scored(plain):
    """A decoder of BERT's kind has a tokenizer that writes one."""
    tokenizer = MaskedLetters()
    tokenizer.sep_token_id = 97
    lm = HiddenStates({"model": small(), "tokenizer": tokenizer}, head=True)
    rows = lm.encode(TEXTS)[0]
    scores = topography.sentence_scores(plain, lm, rows)
    open_scores = topography.sentence_scores(plain, lm, [row[:-1] for row in rows])
    assert np.allclose(scores, open_scores, atol=1e-4)


def test_a_masked_model_scores_each_token_masked_in_turn(plain):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=100, intermediate_size=16, **shape)
    bert = transformers.BertForMaskedLM(config).eval()
    lm = HiddenStates({"model": bert, "tokenizer": MaskedLetters()}, head=True)
    assert not lm.causal
    rows = lm.encode(["the cat", "ab"])[0]
    scores = topography.sentence_scores(plain, lm, rows, batch_tokens=32)
    for row, score in zip(rows, scores):
        naive = 0.0
        for i in range(1, len(row) - 1):
            masked = torch.tensor([[*row[:i], 96, *row[i + 1 :]]])
            with torch.no_grad():
                naive += bert(masked).logits[0, i].log_softmax(0)[row[i]].item()
        assert np.isclose(score, naive, atol=1e-4)


def of_uid(plain, pairs, n=0, block_size=64):
    """Scores of minimal pairs {UID: [(good, bad), ...]} by UID, and how many were too long."""
    lm = letters_lm(small(block_size=block_size))
    named = {}
    for uid, texts in pairs.items():
        named[uid] = [{"sentence_good": good, "sentence_bad": bad} for good, bad in texts]
    scores, n_long = topography.score_pairs(plain, lm, named, n, 2048)
    return scores.set_index("uid"), n_long


def test_ties_count_half_and_pairs_beyond_the_context_are_left_out_and_counted(plain):
    pair, reverse, tie = ("abc", "xyz"), ("xyz", "abc"), ("abc", "abc")
    scores, _ = of_uid(plain, {"one": [pair], "both": [pair, reverse, tie, tie]})
    assert scores.score.one in (0, 1)
    low, high = scipy.stats.binomtest(2, 4).proportion_ci(method="wilson")
    assert scores.loc["both", ["score", "n", "low", "high"]].tolist() == [0.5, 4, low, high]

    long = [("abcdefghij", "abcdefghik")]
    scores, n_long = of_uid(plain, {"short": [pair] * 3, "long": long}, block_size=8)
    assert scores.n.to_dict() == {"short": 3} and n_long == 1
    assert of_uid(plain, {"short": [pair] * 3}, n=2)[0].n.short == 2
    scores, n_long = of_uid(plain, {"long": long}, block_size=8)
    assert scores.empty and n_long == 1


def planted(rng, n=40, side=8):
    """Sheets of independent units, of which a 3 x 3 block of cells prefers the first n stimuli."""
    layout = rng.permutation(side * side)[None]
    cells = [side * i + j for i in range(2, 5) for j in range(3, 6)]
    units = layout[0][cells]
    x = rng.standard_normal((2 * n, 1, side * side))
    x[:n, 0, units] += 3.0
    return Sheets("model", None, layout, x), units, cells


def test_a_planted_block_is_found():
    rng = np.random.default_rng(0)
    sheets, units, cells = planted(rng)
    a = np.arange(40)
    b = np.arange(40, 80)
    t, p = topography.welch(sheets.x[a], sheets.x[b])
    oracle = scipy.stats.ttest_ind(sheets.x[a], sheets.x[b], equal_var=False)
    assert np.allclose(t, oracle.statistic) and np.allclose(p, oracle.pvalue)
    mask = mne.stats.fdr_correction(p, 0.05)[0] & (t > 0)
    assert set(units) <= set(np.flatnonzero(mask[0])) and mask.sum() <= 11
    maps = topography.on_sheet(t, sheets.layout)[0]
    assert np.allclose(maps, t[0][sheets.layout[0]].reshape(8, 8))
    labels = topography.clusters(maps, smallest=5, stop=4.0)
    assert labels.max() == 1 and set(np.flatnonzero(labels.ravel())) == set(cells)
    assert topography.clusters(maps, smallest=10, stop=4.0).max() == 0

    scores, half, null = topography.moran_of_contrast(sheets, a, b, rng, 200)
    assert null.mean() == pytest.approx(-1 / 63, abs=0.02)
    assert half[0] > 0 and scores[0] > null.max()
    labels = topography.shuffled_labels(sheets, a, b, rng, 40)
    assert scores[0] > labels.max()  # independent units: the map of nothing is rough
    _, _, null = topography.moran_of_contrast(sheets, a, b, rng, 20, fwhm=3.0)
    assert null.mean() > 0.4  # smoothing alone raises Moran's I: its null must be its own

    t, p = topography.welch(np.ones((5, 3)), np.ones((6, 3)))
    assert (t == 0).all() and (p == 1).all()


def test_the_mask_is_held_out_of_each_condition(plain, monkeypatch):
    """Rows a1 a2 a1 a2 ...: every other row of A would be all of a1, and all of a2 held out."""
    rng = np.random.default_rng(0)
    conditions = np.tile(["a1", "a2", "b1", "b2"], 20)
    x = rng.standard_normal((80, 1, 64))
    units = np.arange(6)
    localizer = find_contrasts(conditions, ["a1+a2>b1+b2"])["a1+a2>b1+b2"]
    fit = np.arange(80) // 4 % 2 == 0  # the first of each condition, the third, ...
    x[np.ix_(localizer.a[fit[localizer.a]], [0], units)] += 3.0  # nothing in the held-out rows
    results = []
    monkeypatch.setattr(plain, "result", lambda *row, **keys: results.append(row))
    sheets = Sheets("model", letters_lm(small(sheet=True, radius=2)), np.arange(64)[None], x)
    given = pd.Series(conditions)
    t, mask, profile = topography.language_mask(plain, Config(), sheets, given, localizer)
    wanted, _ = topography.welch(x[localizer.a[fit[localizer.a]]], x[localizer.b[fit[localizer.b]]])
    assert np.allclose(t, wanted, atol=1e-6) and mask[0, units].all()
    score, _, low, high, n = results[0]
    assert low < score < high and n == 40
    assert profile["count"].tolist() == [10] * 4
    held = (x - x.mean(0)) / x.std(0)
    wanted = held[~fit & (conditions == "a1")][:, mask].mean()
    assert profile["mean"]["a1"] == pytest.approx(wanted)


def test_silencing_the_units_that_matter_hurts():
    """Only 16 units of the first MLP tell anything; zeroing them, and no others, matters."""
    model = small(sheet=True, radius=2)
    mlp = model.transformer.h[0].mlp
    mlp.c_proj.weight.data[16:] = 0
    mlp.c_proj.bias.data[16:] = 0
    idx = torch.randint(0, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    whole = model(idx).logits

    def change(units):
        mask = np.zeros((4, 64), bool)
        mask[1, units] = True  # layer.0.mlp
        with topography.silenced(model, mask):
            return (model(idx).logits - whole).abs().mean().item()

    assert change(np.arange(16)) > 0.01
    assert change(np.arange(20, 36)) == 0
    assert torch.equal(model(idx).logits, whole)  # the hooks are gone


def test_geometry_and_the_jackknife():
    rng = np.random.default_rng(0)
    assert topography.effective_dimensionality(np.eye(10)) == pytest.approx(10)
    assert topography.effective_dimensionality(np.ones((10, 10))) == pytest.approx(1)
    smooth = np.add.outer(np.arange(12.0), np.arange(12.0))
    shuffled = [rng.permutation(smooth.ravel()).reshape(12, 12) for _ in range(6)]
    assert topography.smoothness(smooth) > 0.6
    assert topography.smoothness(shuffled[0]) < 0.2
    scattered = [topography.wiring_length(shuffled[0], other) for other in shuffled[1:]]
    assert topography.wiring_length(smooth, smooth) < 0.8 * np.mean(scattered)
    x = rng.normal(size=200)
    value, half = topography.jackknife(np.mean, x, parts=200)  # the standard error of a mean
    assert value == x.mean() and half == pytest.approx(1.96 * scipy.stats.sem(x))


def test_stimuli_in_the_known_layouts_and_bad_ones(tmp_path):
    path = tmp_path / "run1.csv"
    columns = {"text_column": "sentence,b", "condition_column": "a"}
    for text, options, rows in (
        (
            "stim1,stim2,stim3,stim4\n1,THE,CAT,S\n2,DAP,LIR,N\n",
            {},
            [["the cat", "S"], ["dap lir", "N"]],
        ),
        (
            "word,category,class\ndole,abstract,noun\nrun,concrete,verb\n",
            {},
            [["dole", "abstract noun"], ["run", "concrete verb"]],
        ),
        (
            "sentence,a,b\nhello there,x,y\nnull,x,z\n",
            columns,
            [["hello there y", "x"], ["null z", "x"]],
        ),
    ):
        path.write_text(text)
        for source in (tmp_path, path):
            assert read_stimuli(source, **options).to_numpy().tolist() == rows
    for text, words in (
        ("text,kind\na,b\n", "no column 'condition', only text, kind"),
        ("text,condition\n ,b\n", "line 2: the text is empty"),
    ):
        path.write_text(text)
        input_error(words, read_stimuli, path)
    input_error("no stimuli", read_stimuli, tmp_path / "none.csv")


def test_contrasts_without_names():
    contrasts = find_contrasts(["x"] * 5 + ["y"] * 4 + ["z"] * 4)
    assert list(contrasts) == ["x>y", "x>z", "y>z"]
    input_error("all stimuli have the condition x", find_contrasts, ["x"] * 5)
    input_error("on both sides", find_contrasts, ["x"] * 5 + ["y"] * 4, ["x>x+y"])


def test_only_data_that_says_so_is_called_synthetic(tmp_path):
    for text, name in (("synthetic: true", "mine, synthetic"), ("format: x", "mine")):
        (tmp_path / "meta.yaml").write_text(text)
        assert topography.called("mine", tmp_path) == name


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model with sheets and one without, stimuli of two conditions, pairs, text."""
    folder = tmp_path_factory.mktemp("topography")
    for name, sheet in (("sheets", True), ("flat", False)):
        model = small(sheet=sheet, radius=2, vocab_size=257)
        (folder / name).mkdir()
        tokenizer = state_of(byte_tokenizer())
        save_checkpoint(folder / name / "best.pt", {**lm_state(model), "tokenizer": tokenizer})
    make_dataset(folder / "data")
    rng = np.random.default_rng(0)
    lines = ["text,condition\n"]
    for condition, letters in (("one", "abcdefgh"), ("two", "stuvwxyz")):
        for _ in range(24):
            lines.append(f"{''.join(rng.choice(list(letters), 9))},{condition}\n")
    (folder / "s.csv").write_text("".join(lines))
    (folder / "pairs").mkdir()
    pairs = '{"sentence_good": "ab cd", "sentence_bad": "xq zz"}\n'
    pairs += '{"sentence_good": "a", "sentence_bad": "b"}\n'
    for uid in ("p1", "p2"):
        (folder / "pairs" / f"{uid}.jsonl").write_text(pairs)
    return folder


def run(given, out, **options):
    options = {"pairs": str(given / "pairs"), "stimuli": str(given / "s.csv"), **options}
    small_run = {"shuffles": 20, "ablate": [4], "val_batches": 1, "min_cluster": 2}
    machine = {"device": "cpu", "dtype": "float32", "dataset": str(given / "data")}
    topography.main(Config(out_dir=str(out), **small_run, **machine, **options))
    return pd.read_csv(out / "results.csv")


def test_a_whole_run(given, tmp_path):
    sheets = str(given / "sheets")
    table = run(given, tmp_path, lm=sheets, twin=sheets, fwhm=2.0)
    measures = {"moran", "moran beside shuffled labels", "minimal pairs", "selectivity"}
    measures |= {"ablation accuracy", "ablation val_loss", "smoothness", "wiring length"}
    measures |= {"effective dimensionality", "correlation at distance 1"}
    assert set(table.measure) == measures
    mean = table[(table.measure == "moran") & (table.sheet == "mean")]
    mean = mean.set_index(["model", "blur"])
    assert mean.score["model", 0.0] == mean.score["twin", 0.0]
    assert abs(mean.chance["model", 0.0]) < 0.1 and mean.chance["model", 2.0] > 0.3
    ablated = table[table.measure.str.startswith("ablation")]
    assert ablated.n.tolist() == [4, 16]  # pairs, windows of text
    assert (ablated.low < ablated.score).all() and (ablated.score < ablated.high).all()
    assert {"map_one_two.png", "summary.png"} <= {path.name for path in tmp_path.iterdir()}


def test_rows_of_other_models_stimuli_or_pairs_are_not_kept(given, tmp_path):
    data = shutil.copytree(given, tmp_path / "data")
    lm = str(data / "flat")
    run(data, tmp_path / "out", lm=lm)
    (data / "pairs/p1.jsonl").rename(data / "pairs/p3.jsonl")
    assert set(run(data, tmp_path / "out", lm=lm).contrast) == {"p2", "p3"}
    config = Config(lm=lm, sweep=[str(data / "sheets")], stimuli=str(data / "s.csv"))
    contents = {topography.content_of(config)}
    for file in ("flat/best.pt", "sheets/best.pt", "s.csv"):
        os.utime(data / file, (1, 1))  # made again
        contents.add(topography.content_of(config))
    assert len(contents) == 4


def test_without_sheets_there_are_pairs_only_and_without_pairs_nothing(given, tmp_path, capsys):
    table = run(given, tmp_path, lm=str(given / "flat"))
    assert set(table.measure) == {"minimal pairs"}
    assert "minimal pairs only" in capsys.readouterr().out
    with pytest.raises(InputError, match="nothing to do.*pairs=grammar"):
        run(given, tmp_path / "b", lm=str(given / "flat"), pairs="")


def test_text_is_read_in_the_models_own_tokens(plain, given, tmp_path):
    lm = topography.load_model(str(given / "sheets"), plain)
    config = Config(dataset=str(tmp_path), val_batches=1)
    text = "the cats sleep, " * 20
    state = learn_bpe([text], 265, "bpe")
    write_dataset(tmp_path, {"val": [Tokenizer(state).encode(text)]}, state)
    batches = topography.text_batches(plain, config, lm)
    assert batches[0][0].tolist() == list(text[:33].encode())
    write_dataset(tmp_path, {"val": [Tokenizer(state).encode(text[:20])]}, state)
    with pytest.raises(InputError, match="21 validation tokens, fewer than the 33"):
        topography.text_batches(plain, config, lm)


def test_runs_of_train_are_compared_at_their_losses(given, tmp_path):
    folders = []
    for alpha in (0.0, 0.5):
        folder = shutil.copytree(given / "sheets", tmp_path / f"alpha{alpha}")
        (folder / "config.yaml").write_text(f"alpha: {alpha}\nspatial: activations\n")
        (folder / "results.csv").write_text(f"metric,score\nval_loss,{4 + alpha}\n")
        folders.append(str(folder))
    table = run(given, tmp_path / "out", sweep=folders).set_index("model").loc[folders]
    assert table.val_loss.tolist() == [4.0, 4.5]
    assert table.spatial.tolist() == ["none", "activations"]
    assert table.score.nunique() == 1  # the same weights
    assert (tmp_path / "out/sweep.png").exists()
    results = tmp_path / "alpha0.0/results.csv"
    for text in ("metric,score\naccuracy,0.5\n", "measure,score\nmoran,0.5\n"):  # of other scripts
        results.write_text(text)
        sentence = "is not a finished run of train.py"
        input_error(sentence, run, given, tmp_path / "other", sweep=folders)


@pytest.mark.skipif(not BLIMP.is_dir(), reason="BLiMP's files are not beside the checkout")
def test_real_blimp_is_scored(plain, given):
    lm = topography.load_model(str(given / "flat"), plain)
    pairs = read_pairs(BLIMP)
    assert len(pairs) == 8
    scores, n_long = topography.score_pairs(plain, lm, pairs, 5, 2048)
    assert scores.n.sum() + n_long == 40
