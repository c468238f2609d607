"""finetune.py: what is read, what is trained, what is scored."""

import json

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from helpers import ROOT, byte_tokenizer, input_error

import configurator
import finetune
import positions
from convert import export_gpt, load_lm
from data import InputError
from data.stimuli import read_task, write_tasks
from data.tokens import BYTE_OF, Tokenizer, state_of
from finetune import Config, Reader, encode, interval, pad, score, texts_of_step
from model import GPT, GPTConfig, lm_state, load_checkpoint, save_checkpoint

FAST = {"device": "cpu", "dtype": "float32", "batch_size": 8, "warmup_iters": 5}
FAST |= {"learning_rate": 3e-3, "dropout": 0.0, "resamples": 20, "log_interval": 20}


def tiny_lm(**options):
    shape = {"block_size": 32, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 16}
    sheets = {"bias": False, "sheet": True, "radius": 2, "windows": 3, "alpha": 1.0}
    return GPT(GPTConfig(**{**shape, **sheets, **options}), seed=3)


STATE = state_of(byte_tokenizer())
TOKENIZER = Tokenizer(STATE)


def save(path, **options):
    """A checkpoint of a tiny language model."""
    save_checkpoint(path, {**lm_state(tiny_lm(**options)), "tokenizer": STATE})
    return str(path)


def drawn_windows(lm, seed=0):
    return lm.draw_windows(torch.Generator().manual_seed(seed))


def sentences(n, rng, kind="classification", pairs=False):
    """Easy: the label is the first letter, early in the text; of pairs, whether both begin with the
    same letter; of a regression, half the number of a's."""
    rows = []
    for i in range(n):
        words = []
        for _ in range(2):
            words.append("".join(rng.choice(list("bcdefg"), rng.integers(2, 8))))
        a, b = rng.choice(list("xy"), 2)
        text, label = f"{a}{words[0]}{i}", a
        if pairs:
            text += f"\t{b}{words[1]}"
            label = "same" if a == b else "other"
        if kind == "regression":
            count = int(rng.integers(1, 9))
            text, label = "a" * count + text, count / 2
        split = ("train", "train", "val", "test")[4 * i // n]
        row = {"split": split, "label": label, "text": text, "group": i // 2, "kind": f"k{i % 2}"}
        rows.append(row)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    rng = np.random.default_rng(0)
    save(folder / "lm.pt")
    save(folder / "flat.pt", alpha=0.0)
    save(folder / "small.pt", vocab_size=200)
    frames = {
        "letter": sentences(400, rng),
        "same": sentences(80, rng, pairs=True),
        "count": sentences(400, rng, "regression"),
        "untested": sentences(80, rng).replace({"split": {"test": "val"}}),
        "unchosen": sentences(80, rng).replace({"split": {"val": "test"}}),
    }
    tasks = {}
    for name, frame in frames.items():
        kind = "regression" if name == "count" else "classification"
        tasks[name] = {"frame": frame, "kind": kind, "description": name, "labels": ["x", "y"]}
    tasks["same"]["labels"] = ["other", "same"]
    del tasks["count"]["labels"]
    write_tasks(folder / "tasks", tasks, synthetic=True)
    return folder


def fine_tune(given, out, **options):
    """A whole run in this process; its results and predictions."""
    paths = {"lm": str(given / "lm.pt"), "dataset": str(given / "tasks"), "out_dir": str(out)}
    config = Config(**{**FAST, **paths, "task": "letter", **options})
    configurator.check(config)
    finetune.main(config)
    results = pd.read_csv(out / "results.csv")
    return results, pd.read_csv(out / "predictions.csv", dtype={"prediction": str})


# ---- what is read


def test_a_padded_batch_is_each_text_alone_and_only_the_last_real_token_is_read():
    torch.manual_seed(0)
    model = Reader(tiny_lm(), 3, Config(dropout=0.0)).eval()
    rows = [[256, *range(n)] for n in (9, 2, 30)]
    idx, lengths = pad(rows, "cpu")
    together, spatial = model(idx, lengths, drawn_windows(model.lm))
    for row, out in zip(rows, together):
        single = torch.tensor([row])
        alone = model(single, torch.tensor([len(row)]))[0][0]
        by_hand = model.head(model.lm.trunk(single)[0][0, -1])
        assert torch.allclose(out, alone, atol=1e-6)
        assert torch.allclose(out, by_hand, atol=1e-6)
    changed = [rows[0][:-1] + [77], *rows[1:]]
    assert not torch.allclose(model(*pad(changed, "cpu"))[0][0], together[0], atol=1e-4)
    idx[1, 3:] = 123  # pads change nothing, the spatial loss neither
    again, spatial_again = model(idx, lengths, drawn_windows(model.lm))
    assert torch.allclose(again, together, atol=1e-6)
    assert torch.allclose(spatial, spatial_again, atol=1e-6)


def test_the_spatial_loss_is_that_of_the_texts_tokens():
    model = Reader(tiny_lm(), 2, Config(dropout=0.0)).eval()
    lm = model.lm
    rows = [[256, 1, 2, 3, 4, 5, 6], [256, 9, 8, 7]]
    windows = drawn_windows(lm, 1)
    names = positions.layer_names(2)
    taps = [lm(torch.tensor([row]), hidden=names).hidden for row in rows]
    naive = 0.0
    for sheet, name in enumerate(names):
        x = torch.cat([tap[name][0, 1:] for tap in taps])  # without the token that opens a text
        units = lm.unit_at_cell[sheet][lm.window_cells[windows[sheet]]]
        naive += positions.spatial_loss(x, units, lm.near)
    assert torch.allclose(model(*pad(rows, "cpu"), windows)[1], naive, atol=1e-5)


def test_texts_pairs_and_cuts():
    for text, size, expected in (
        ("ab", 32, ([256, 97, 98], 0)),
        ("ab\tc", 32, ([256, 97, 98, 256, 99], 0)),
        ("abcdef\tgh", 7, ([256, 97, 98, 99, 256, 103, 104], 3)),  # the longer, at its end
        ("abcdef", 4, ([256, 97, 98, 99], 3)),
    ):
        assert encode(TOKENIZER, text, size) == expected
    for text, size, words in (("a\tb\tc", 32, "3 tab"), ("ab\tc", 3, "block_size=3")):
        input_error(words, encode, TOKENIZER, text, size)


def test_texts_come_without_replacement_and_by_length():
    lengths = [i % 7 + 1 for i in range(40)]
    steps = [texts_of_step(step, 8, lengths, seed=5) for step in range(10)]
    for epoch in (steps[:5], steps[5:]):
        assert sorted(sum(epoch, [])) == list(range(40))
    assert steps[:5] != steps[5:]
    for step in steps:
        assert np.all(np.diff([lengths[i] for i in step]) >= 0)
    across = texts_of_step(2, 17, lengths, seed=5)  # a step that reaches into the second epoch
    assert len(across) == 17 and set(across) <= set(range(40))


# ---- what is trained


def of(table, **keys):
    """Rows of a table with these values."""
    for key, value in keys.items():
        table = table[table[key] == value]
    return table


def test_an_easy_task_is_learned_and_the_files_say_how_well(given, tmp_path, capsys):
    options = {"epochs": 4, "learning_rate": 1e-2, "alpha_scale": 0.5, "eval_interval": 20}
    table, predictions = fine_tune(given, tmp_path / "run", by="kind", **options)
    whole = of(table, split="test", part="all").set_index("metric")
    row = whole.loc["accuracy"]
    assert row.score > 0.9 and row.low > row.chance + 0.2
    assert row.n == 100 and row.data == "synthetic" and "majority" in row.beside
    test = of(predictions, split="test")
    y, guess = test.label, test.prediction
    assert np.isclose(row.score, sklearn.metrics.accuracy_score(y, guess))
    assert np.isclose(whole.score.matthews, sklearn.metrics.matthews_corrcoef(y, guess))
    assert np.isclose(whole.score.f1, sklearn.metrics.f1_score(y, guess, pos_label="y"))
    assert set(table.part) == {"all", "k0", "k1"}
    assert set(predictions.split) == {"val", "test"} and len(predictions) == 200
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files >= {"best.pt", "ckpt.pt", "config.yaml", "curves.png"}
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    best = max(log, key=lambda line: line.get("val_accuracy", -1))
    val = of(table, metric="accuracy", split="val").score.iloc[0]
    assert best["step"] == row.step and np.isclose(best["val_accuracy"], val)
    assert any("train_spatial" in line for line in log)
    assert "n = 100 texts in 50 groups" in capsys.readouterr().out
    model, _ = load_lm(tmp_path / "run")  # what comes out is a language model like any other
    assert model.config.alpha == 1
    assert torch.equal(model.unit_at_cell, tiny_lm().unit_at_cell)


def test_regression_learns_and_is_scored_on_the_labels_scale(given, tmp_path):
    table, predictions = fine_tune(given, tmp_path / "run", task="count", epochs=4)
    test = of(predictions, split="test").astype({"prediction": float, "label": float})
    pearson = of(table, metric="pearson", split="test").iloc[0]
    assert pearson.low > 0.5 and pearson.chance == 0
    assert np.isclose(pearson.score, np.corrcoef(test.label, test.prediction)[0, 1])
    assert abs(test.prediction.mean() - test.label.mean()) < 0.5


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(
    "mode, moved", [("head", ("nothing",)), ("last_k", ("transformer.h.1.", "transformer.ln_f"))]
)
def test_head_and_last_k_leave_the_rest_bit_for_bit(given, tmp_path, mode, moved):
    before = weights(given / "lm.pt")
    fine_tune(given, tmp_path / mode, task="same", mode=mode, max_iters=3, dropout=0.5)
    after = weights(tmp_path / mode / "ckpt.pt")
    for key, value in before.items():
        assert torch.equal(value, after[key]) != key.startswith(moved), key


def test_alpha_scale_weighs_the_spatial_loss(given, tmp_path):
    texts = read_task(given / "tasks", "letter").text[:50]
    rows = [encode(TOKENIZER, text, 32)[0] for text in texts]
    spatial = []
    for scale in (0.0, 30.0):
        fine_tune(given, tmp_path / str(scale), task="same", alpha_scale=scale, max_iters=15)
        lm = load_lm(tmp_path / str(scale) / "ckpt.pt")[0].eval()
        spatial.append(Reader(lm, 2, Config())(*pad(rows, "cpu"), drawn_windows(lm))[1].item())
    assert spatial[1] < spatial[0] - 0.1


def test_patience_ends_the_run_and_the_best_step_is_kept(given, tmp_path):
    options = {"learning_rate": 0.0, "eval_interval": 2, "patience": 2, "max_iters": 50}
    table, _ = fine_tune(given, tmp_path / "run", task="same", mode="head", **options)
    assert set(table.step) == {2}
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] == 6


def test_the_twin_forgets_and_runs_are_compared_in_pairs(given, tmp_path, capsys):
    twin = tmp_path / "twin"
    _, of_twin = fine_tune(given, twin, task="same", twin=True, max_iters=2)
    options = {"task": "same", "against": [str(twin)]}
    table, predictions = fine_tune(given, tmp_path / "run", max_iters=5, **options)
    accuracies = []
    for frame in (predictions, of_twin):
        test = of(frame, split="test")
        accuracies.append((test.label == test.prediction).mean())
    row = of(table, metric="accuracy difference").iloc[0]
    assert np.isclose(row.score, accuracies[0] - accuracies[1])
    assert row.low <= row.score <= row.high and row.chance == 0 and row.beside == str(twin)
    assert "minus that of" in capsys.readouterr().out
    forgotten, lm = weights(twin / "ckpt.pt"), weights(given / "lm.pt")
    assert torch.equal(forgotten["unit_at_cell"], lm["unit_at_cell"])
    matrix = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.allclose(forgotten[matrix], lm[matrix])


def test_intervals_draw_whole_groups():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    guess = np.where(np.repeat(rng.random(20), 20) < 0.7, y, 1 - y)  # right or wrong by document
    config = Config(resamples=200, seed=0)
    single = np.arange(400)
    low, high = interval("accuracy", y, guess, 2, single, config)
    wide_low, wide_high = interval("accuracy", y, guess, 2, single // 20, config)
    assert wide_high - wide_low > 2 * (high - low)
    assert interval("accuracy", y, guess, 2, single, config, other=guess) == (0, 0)
    p = (y == guess).mean()
    textbook = 2 * 1.96 * np.sqrt(p * (1 - p) / 400)  # of independent texts
    assert abs(high - low - textbook) < 0.02
    f1 = score("f1", np.array([0, 1, 2]), np.array([0, 1, 1]), 3)
    assert f1 == pytest.approx((1 + 2 / 3 + 0) / 3)
    zeros = np.zeros(9, int)  # a part without the other classes
    assert score("f1", zeros, zeros, 3) == 1
    assert interval("f1", zeros, zeros, 3, np.arange(9), config) == (1, 1)
    assert score("pearson", y, np.ones(400), 0) == 0


def test_a_hugging_face_gpt2_is_tuned_too(given, tmp_path):
    export_gpt(tiny_lm(sheet=False), tmp_path / "hf")
    ids = {**BYTE_OF, "<|endoftext|>": 256}
    (tmp_path / "hf/vocab.json").write_text(json.dumps(ids))
    (tmp_path / "hf/merges.txt").write_text("#version: 0.2\n")
    table, _ = fine_tune(given, tmp_path / "run", task="same", lm=str(tmp_path / "hf"), max_iters=2)
    assert len(table) == 6
    with pytest.raises(InputError, match="no positions"):
        fine_tune(given, tmp_path / "b", lm=str(tmp_path / "hf"), alpha_scale=1.0)


def test_long_texts_are_cut_and_counted_and_no_test_split_is_said(given, tmp_path, capsys):
    lm = save(tmp_path / "short.pt", block_size=8)
    fine_tune(given, tmp_path / "run", lm=lm, task="untested", max_iters=1)
    printed = capsys.readouterr().out
    texts = read_task(given / "tasks", "untested").text
    assert f"{(texts.str.len() > 7).sum()} of 80 texts are longer than the 8 tokens" in printed
    assert "on the data that chose it" in printed


# ---- bad input


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dataset": "glue"}, "data/glue/prepare.py"),
        ({"task": "unchosen"}, "unchosen.*'val'"),
        ({"metric": "pearson"}, "pearson.*accuracy"),
        ({"by": "genre"}, "by=genre.*kind"),
        ({"against": ["nosuch"]}, "against=nosuch"),
        ({"mode": "last_k", "k": 3}, "k=3.*2 blocks"),
        ({"lm": "flat.pt", "alpha_scale": 1.0}, "alpha_scale=1.0.*alpha=0"),
        ({"lm": "small.pt"}, "257 tokens but a model of 200"),
        ({"texts_per_step": 20}, "texts_per_step=20.*8 x 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 0.0}, "epochs"),
        ({"init_from": "resume"}, "ckpt.pt"),
    ],
)
def test_bad_input_is_one_sentence(given, tmp_path, options, words):
    if "lm" in options:
        options = {**options, "lm": str(given / options["lm"])}
    if options.get("dataset") == "glue" and (ROOT / "data/glue/meta.yaml").exists():
        pytest.skip("GLUE is there")
    input_error(words, fine_tune, given, tmp_path / "run", **options)


def test_another_mode_metric_labels_and_texts_are_refused(given, tmp_path):
    options = {"task": "same", "max_iters": 1}
    again = {**options, "init_from": "resume"}
    fine_tune(given, tmp_path / "b", **options)
    state = load_checkpoint(tmp_path / "b/ckpt.pt")
    state["task"]["labels"].reverse()
    (tmp_path / "c").mkdir()
    save_checkpoint(tmp_path / "c/ckpt.pt", state)
    for folder, more, words in (
        ("b", {**again, "mode": "head"}, "mode=full, not head"),
        ("b", {**again, "metric": "f1"}, "metric=, not f1"),
        ("c", again, "has other labels"),
        ("d", {"task": "letter", "against": [str(tmp_path / "b")]}, "other texts"),
    ):
        input_error(words, fine_tune, given, tmp_path / folder, **more)
