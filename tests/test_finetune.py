"""finetune.py: what is read, what is trained, what is scored; and the datasets made for it."""
import json

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from helpers import ROOT, byte_tokenizer

import finetune
import positions
import configurator
from configurator import Run
from data.stimuli import read_task, write_tasks
from data.tokens import state_of
from convert import export_gpt, load_lm
from data.tokens import Tokenizer
from finetune import Config, Reader, Task, encode, interval, pad, score, texts_of_step
from model import GPT, GPTConfig, lm_state, save_checkpoint

FAST = dict(device="cpu", dtype="float32", batch_size=8, warmup_iters=5, learning_rate=3e-3, dropout=0.0, resamples=20, log_interval=20)


def tiny_lm(alpha=1.0, **options):
    return GPT(GPTConfig(**{**dict(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=16, bias=False, sheet=True, radius=2, windows=3, alpha=alpha),
                            **options}), seed=3)


def tokenizer():
    return Tokenizer(state_of(byte_tokenizer()))


def sentences(n, rng, kind="classification", pairs=False):
    """Easy: the label is the first letter, early in the text; of pairs, whether they begin with the same letter; of a regression, how many a's."""
    rows = []
    for i in range(n):
        words = ["".join(rng.choice(list("bcdefg"), rng.integers(2, 8))) for _ in range(2)]
        a, b = rng.choice(list("xy"), 2)
        text = f"{a}{words[0]}{i}" + (f"\t{b}{words[1]}" if pairs else "")
        label = "same" if a == b else "other"
        if not pairs:
            label = a
        if kind == "regression":
            text, label = "a" * (k := int(rng.integers(1, 9))) + text, k / 2
        rows.append(dict(split="train" if i < n // 2 else "val" if i < 3 * n // 4 else "test", label=label, text=text, group=i // 2, kind=f"k{i % 2}"))
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("finetune"), np.random.default_rng(0)
    save_checkpoint(folder / "lm.pt", dict(**lm_state(tiny_lm()), tokenizer=state_of(byte_tokenizer())))
    save_checkpoint(folder / "flat.pt", dict(**lm_state(tiny_lm(alpha=0.0)), tokenizer=state_of(byte_tokenizer())))
    write_tasks(folder / "tasks", {
        "letter": dict(frame=sentences(400, rng), kind="classification", labels=["x", "y"], description="first letter"),
        "same": dict(frame=sentences(80, rng, pairs=True), kind="classification", labels=["other", "same"], description="same first letter"),
        "count": dict(frame=sentences(400, rng, "regression"), kind="regression", description="how many"),
        "untested": dict(frame=sentences(80, rng).replace({"split": {"test": "val"}}), kind="classification", labels=["x", "y"], description="no test"),
        "unchosen": dict(frame=sentences(80, rng).replace({"split": {"val": "test"}}), kind="classification", labels=["x", "y"], description="no val"),
    }, synthetic=True)
    return folder


def fine_tune(given, out, **options):
    """A whole run in this process; its results and predictions."""
    config = Config(**{**FAST, "lm": str(given / "lm.pt"), "dataset": str(given / "tasks"), "task": "letter", "out_dir": str(out), **options})
    configurator.check(config)
    finetune.main(config)
    return pd.read_csv(out / "results.csv"), pd.read_csv(out / "predictions.csv", dtype={"prediction": str})


# ---- what is read

def test_a_padded_batch_is_each_text_alone_and_only_the_last_real_token_is_read():
    torch.manual_seed(0)
    model = Reader(tiny_lm(), 3, Config(dropout=0.0)).eval()
    rows = [[256, *range(n)] for n in (9, 2, 30)]
    together, spatial = model(*pad(rows, "cpu"), model.lm.draw_windows(torch.Generator().manual_seed(0)))
    for row, out in zip(rows, together):
        alone = model(torch.tensor([row]), torch.tensor([len(row)]))[0][0]
        by_hand = model.head(model.lm.trunk(torch.tensor([row]))[0][0, -1])
        assert torch.allclose(out, alone, atol=1e-6) and torch.allclose(out, by_hand, atol=1e-6)
    changed = [rows[0][:-1] + [77], *rows[1:]]
    assert not torch.allclose(model(*pad(changed, "cpu"))[0][0], together[0], atol=1e-4)
    idx, lengths = pad(rows, "cpu")
    idx[1, 3:] = 123  # what stands in the pads is nobody's business, the spatial loss's neither
    again, spatial_again = model(idx, lengths, model.lm.draw_windows(torch.Generator().manual_seed(0)))
    assert torch.allclose(again, together, atol=1e-6) and torch.allclose(spatial, spatial_again, atol=1e-6)


def test_the_spatial_loss_is_that_of_the_texts_tokens():
    model = Reader(tiny_lm(), 2, Config(dropout=0.0)).eval()
    lm, rows = model.lm, [[256, 1, 2, 3, 4, 5, 6], [256, 9, 8, 7]]
    windows = lm.draw_windows(torch.Generator().manual_seed(1))
    names = positions.layer_names(2)
    taps = [lm(torch.tensor([row]), hidden=names).hidden for row in rows]
    naive = 0.0
    for sheet, name in enumerate(names):
        x = torch.cat([tap[name][0, 1:] for tap in taps])  # the tokens of both texts without the one that opens them
        naive += positions.spatial_loss(x, lm.unit_at_cell[sheet][lm.window_cells[windows[sheet]]], lm.near)
    assert torch.allclose(model(*pad(rows, "cpu"), windows)[1], naive, atol=1e-5)


def test_texts_pairs_and_cuts():
    t = tokenizer()
    assert encode(t, "ab", 32) == ([256, 97, 98], 0)
    assert encode(t, "ab\tc", 32) == ([256, 97, 98, 256, 99], 0)
    assert encode(t, "abcdef\tgh", 7) == ([256, 97, 98, 99, 256, 103, 104], 3)  # the longer part, at its end
    assert encode(t, "abcdef", 4) == ([256, 97, 98, 99], 3)
    with pytest.raises(ValueError, match="3 parts"):
        encode(t, "a\tb\tc", 32)
    with pytest.raises(ValueError, match="block_size=3"):
        encode(t, "ab\tc", 3)


def test_texts_come_without_replacement_and_by_length():
    lengths = [i % 7 + 1 for i in range(40)]
    steps = [texts_of_step(step, 8, lengths, seed=5) for step in range(10)]
    assert sorted(sum(steps[:5], [])) == sorted(sum(steps[5:], [])) == list(range(40))
    assert steps[:5] != steps[5:]
    for step in steps:
        assert np.all(np.diff([lengths[i] for i in step]) >= 0)
    across = texts_of_step(2, 17, lengths, seed=5)  # a step that reaches into the second epoch
    assert len(across) == 17
    assert set(texts_of_step(0, 34, lengths, 5)) | set(across[:0]) <= set(range(40))


# ---- what is trained

def test_an_easy_task_is_learned_and_the_files_say_how_well(given, tmp_path, capsys):
    table, said = fine_tune(given, tmp_path / "run", epochs=4, learning_rate=1e-2, alpha_scale=0.5, by="kind", eval_interval=20)
    row = table[(table.metric == "accuracy") & (table.split == "test") & (table.part == "all")].iloc[0]
    assert row.score > 0.9 and row.low > row.chance + 0.2 and row.n == 100 and row.data == "synthetic" and "majority" in row.beside
    test = said[said.split == "test"]
    for metric, value in dict(accuracy=sklearn.metrics.accuracy_score(test.label, test.prediction),
                              matthews=sklearn.metrics.matthews_corrcoef(test.label, test.prediction),
                              f1=sklearn.metrics.f1_score(test.label, test.prediction, pos_label="y")).items():
        assert np.isclose(table[(table.metric == metric) & (table.split == "test") & (table.part == "all")].score.item(), value)
    assert set(table.part) == {"all", "k0", "k1"} and set(said.split) == {"val", "test"} and len(said) == 200
    assert {"best.pt", "ckpt.pt", "config.yaml", "log.jsonl", "curves.png"} <= {f.name for f in (tmp_path / "run").iterdir()}
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    best = max((line for line in log if "val_accuracy" in line), key=lambda line: line["val_accuracy"])
    assert best["step"] == row.step and np.isclose(best["val_accuracy"], table[(table.metric == "accuracy") & (table.split == "val")].score.iloc[0])
    assert any("train_spatial" in line for line in log)
    assert "n = 100 texts in 50 groups" in capsys.readouterr().out
    model, _ = load_lm(tmp_path / "run")  # what comes out is a language model like any other
    assert model.config.alpha == 1 and torch.equal(model.unit_at_cell, tiny_lm().unit_at_cell)


def test_regression_learns_and_is_scored_on_the_labels_scale(given, tmp_path):
    table, said = fine_tune(given, tmp_path / "run", task="count", epochs=6)
    test = said[said.split == "test"].astype(dict(prediction=float, label=float))
    pearson = table[(table.metric == "pearson") & (table.split == "test")].iloc[0]
    assert pearson.low > 0.5 and pearson.chance == 0 and np.isclose(pearson.score, np.corrcoef(test.label, test.prediction)[0, 1])
    assert abs(test.prediction.mean() - test.label.mean()) < 0.5


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def test_head_and_last_k_leave_the_rest_bit_for_bit(given, tmp_path):
    before = weights(given / "lm.pt")
    for mode, moved in (("head", ()), ("last_k", ("transformer.h.1.", "transformer.ln_f"))):
        fine_tune(given, tmp_path / mode, mode=mode, max_iters=3, dropout=0.5)
        after = weights(tmp_path / mode / "ckpt.pt")
        assert {k for k in before if not torch.equal(before[k], after[k])} == {k for k in before if k.startswith(moved)} - {"unit_at_cell"} if moved else \
            all(torch.equal(before[k], after[k]) for k in before)


def test_alpha_scale_weighs_the_spatial_loss(given, tmp_path):
    spatial = {}
    for scale in (0.0, 30.0):
        fine_tune(given, tmp_path / str(scale), alpha_scale=scale, max_iters=40)
        lm = load_lm(tmp_path / str(scale) / "ckpt.pt")[0].eval()
        rows = [encode(tokenizer(), text, 32)[0] for text in read_task(given / "tasks", "letter").text[:50]]
        spatial[scale] = Reader(lm, 2, Config())(*pad(rows, "cpu"), lm.draw_windows(torch.Generator().manual_seed(0)))[1].item()
    assert spatial[30.0] < spatial[0.0] - 0.1


def test_patience_ends_the_run_and_the_best_step_is_kept(given, tmp_path):
    table, _ = fine_tune(given, tmp_path / "run", mode="head", learning_rate=0.0, eval_interval=2, patience=2, max_iters=50)
    assert set(table.step) == {2} and torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] == 6


def test_the_twin_forgets_and_runs_are_compared_in_pairs(given, tmp_path, capsys):
    _, theirs = fine_tune(given, tmp_path / "twin", twin=True, max_iters=2)
    options = dict(epochs=4, against=[str(tmp_path / "twin")])
    table, mine = fine_tune(given, tmp_path / "run", **options)
    a, b = (f[f.split == "test"] for f in (mine, theirs))
    row = table[table.metric == "accuracy difference"].iloc[0]
    assert np.isclose(row.score, (a.label == a.prediction).mean() - (b.label == b.prediction).mean()) and row.low <= row.score <= row.high
    assert row.chance == 0 and row.beside == str(tmp_path / "twin") and "minus that of" in capsys.readouterr().out
    twin, lm, matrix = weights(tmp_path / "twin/ckpt.pt"), weights(given / "lm.pt"), "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(twin["unit_at_cell"], lm["unit_at_cell"]) and not torch.allclose(twin[matrix], lm[matrix])


def test_intervals_draw_whole_groups():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    guess = np.where(np.repeat(rng.random(20), 20) < 0.7, y, 1 - y)  # right or wrong by the document
    low, high = interval("accuracy", y, guess, np.arange(400), Config(resamples=500, seed=0))
    wide = interval("accuracy", y, guess, np.repeat(np.arange(20), 20), Config(resamples=500, seed=0))
    assert wide[1] - wide[0] > 2 * (high - low)
    assert interval("accuracy", y, guess, np.arange(400), Config(resamples=50, seed=0), other=guess) == (0, 0)
    p = (y == guess).mean()
    assert abs((high - low) - 2 * 1.96 * np.sqrt(p * (1 - p) / 400)) < 0.02  # independent texts: the textbook's width
    assert score("f1", np.array([0, 1, 2]), np.array([0, 1, 1])) == pytest.approx((1 + 2 / 3 + 0) / 3) and score("pearson", y, np.ones(400)) == 0


def test_a_hugging_face_gpt2_is_tuned_too(given, tmp_path):
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]  # GPT-2's spelling of the 256 bytes
    export_gpt(tiny_lm(sheet=False), tmp_path / "hf")
    (tmp_path / "hf/vocab.json").write_text(json.dumps({name: i for i, name in enumerate([*names, "<|endoftext|>"])}))
    (tmp_path / "hf/merges.txt").write_text("#version: 0.2\n")
    table, _ = fine_tune(given, tmp_path / "run", lm=str(tmp_path / "hf"), max_iters=2)
    assert len(table) == 6
    with pytest.raises(ValueError, match="no positions"):
        fine_tune(given, tmp_path / "b", lm=str(tmp_path / "hf"), alpha_scale=1.0)


# ---- bad input

@pytest.mark.parametrize("options, words", [
    ({"task": "nosuch"}, ["nosuch", "letter"]), ({"dataset": "nosuch"}, ["nosuch"]), ({"dataset": "glue"}, ["data/glue/prepare.py"]),
    ({"task": "unchosen"}, ["unchosen", "'val'"]), ({"metric": "pearson"}, ["pearson", "accuracy"]), ({"by": "genre"}, ["by=genre", "kind"]),
    ({"against": ["nosuch"]}, ["against=nosuch"]), ({"mode": "last_k", "k": 3}, ["k=3", "2 blocks"]), ({"lm": "out/nosuch"}, ["out/nosuch", "python train.py"]),
    ({"lm": "flat.pt", "alpha_scale": 1.0}, ["alpha_scale=1.0", "alpha=0"]), ({"texts_per_step": 20}, ["texts_per_step=20", "8 x 1"]),
    ({"batch_size": 0}, ["batch_size"]), ({"epochs": 0.0}, ["epochs"]), ({"init_from": "resume"}, ["ckpt.pt"])])
def test_bad_input_is_one_sentence(given, tmp_path, options, words):
    if options.get("lm") == "flat.pt":
        options = {**options, "lm": str(given / "flat.pt")}
    if options.get("dataset") == "glue" and (ROOT / "data/glue/meta.yaml").exists():
        pytest.skip("GLUE is there")
    with pytest.raises((ValueError, OSError)) as e:
        fine_tune(given, tmp_path / "run", **options)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), e.value


def test_labels_of_one_class_foreign_tokenizers_other_resumes_and_other_texts(given, tmp_path):
    one = read_task(given / "tasks", "letter").drop(columns="y").assign(label="x")
    with pytest.raises(ValueError, match="one label 'x'"):
        write_tasks(tmp_path / "one", {"letter": dict(frame=one, kind="classification", labels=["x", "y"], description="")})
    save_checkpoint(tmp_path / "small.pt", dict(**lm_state(tiny_lm(vocab_size=200)), tokenizer=state_of(byte_tokenizer())))
    with pytest.raises(ValueError, match="257 tokens and a model of 200"):
        fine_tune(given, tmp_path / "a", lm=str(tmp_path / "small.pt"))
    fine_tune(given, tmp_path / "b", max_iters=1)
    with pytest.raises((OSError, ValueError), match="init_from=resume"):
        fine_tune(given, tmp_path / "b", max_iters=1)
    with pytest.raises(ValueError, match="mode=full, the options say head"):
        fine_tune(given, tmp_path / "b", max_iters=1, mode="head", init_from="resume")
    with pytest.raises(ValueError, match="other texts"):
        fine_tune(given, tmp_path / "c", task="same", against=[str(tmp_path / "b")])


def test_long_texts_are_cut_and_counted_and_no_test_split_is_said(given, tmp_path, capsys):
    save_checkpoint(tmp_path / "short.pt", dict(**lm_state(tiny_lm(block_size=8)), tokenizer=state_of(byte_tokenizer())))
    fine_tune(given, tmp_path / "run", lm=str(tmp_path / "short.pt"), task="untested", max_iters=1)
    said = capsys.readouterr().out
    long = sum(len(text) > 7 for text in read_task(given / "tasks", "untested").text)
    assert f"{long} of 80 texts are longer than the 8 tokens" in said and "the very data that chose" in said


def test_a_task_in_tokens(given, tmp_path):
    run = Run(Config(out_dir=str(tmp_path), device="cpu"))
    task = Task(Config(dataset=str(given / "tasks"), task="count"), run, tokenizer(), 32)
    train = task.splits["train"]
    assert abs(train.targets.mean()) < 1e-6
    assert abs(train.targets.std(correction=0) - 1) < 1e-6
    assert task.baseline == "mean guess"
    predictions = task.predictions(train.targets[:, None].double())
    assert np.allclose(predictions, train.table.y.to_numpy(), atol=1e-6)
    run.close()
