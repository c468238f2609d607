"""train.py, init_pos.py, sample.py: what data a run sees, what it learns, how it stops and goes on,
how long it takes, and every bad input in one sentence."""

import csv
import json
import math
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, input_error, make_dataset
from test_model import SMALL, SixteenBit
from test_model import ids as any_ids

import configurator
import init_pos
import positions
import sample
import train
from configurator import configure
from data import InputError
from data.tokens import Tokens
from model import GPT, GPTConfig
from train import Config, Loader, lr_share, make_optimizers, ngram_losses, validation_starts

TINY = {"batch_size": 2, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "radius": 2}
TINY |= {"windows": 2, "max_iters": 4, "eval_interval": 2, "eval_batches": 3, "log_interval": 1}
TINY |= {"save_interval": 2, "warmup_iters": 1, "compile": False, "device": "cpu"}
TINY |= {"dtype": "float32", "baseline_tokens": 0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("tiny"))


FIGURES = {name: getattr(train, name) for name in ("plot_losses", "plot_sheets")}


@pytest.fixture(autouse=True)
def own_cache_one_thread_no_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)  # as in a process of the tests
    for name in FIGURES:  # they take longer than a tiny run
        monkeypatch.setattr(train, name, lambda *args: None)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run that is over."""
    return trained(dataset, tmp_path_factory.mktemp("whole") / "run")


def trained(dataset, out, **options):
    """Train in this process; the run's folder."""
    config = Config(**{**TINY, "dataset": str(dataset), "out_dir": str(out), **options})
    configurator.check(config)
    train.main(config)
    return out


def logged(folder, key):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def checkpoint(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)


def same_weights(a, b):
    """Do two checkpoints hold the same parameters and sheets, bit for bit?"""
    a, b = a["model"], b["model"]
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- data


def test_data_is_without_replacement(dataset):
    """The same on any number of ranks, and after a stop: tests/test_scripts.py."""
    run = SimpleNamespace(device=torch.device("cpu"), seed=7)  # what Loader needs of a Run
    tokens, config = Tokens(dataset, "train"), Config(**TINY)
    loader = Loader(run, tokens, config, 1)
    starts = [loader.start_of(window) for window in range(loader.n_windows)]
    assert len(set(starts)) == loader.n_windows  # each window once
    assert min(np.diff(sorted(starts))) == config.block_size  # and none overlaps
    next_epoch = [loader.start_of(loader.n_windows + i) for i in range(20)]
    assert next_epoch != starts[:20]
    idx, targets = loader.batch(0)
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    wanted = tokens.windows(starts[:2], config.block_size)
    assert np.array_equal(idx, wanted)


def test_validation_windows_are_fixed_and_apart(dataset):
    tokens = Tokens(dataset, "val")
    starts = validation_starts(tokens, Config(**TINY))
    assert len(starts) == 6 and min(np.diff(starts)) >= 16 and starts[-1] + 17 <= len(tokens)
    for eval_batches in (0, 10**6):
        everything = validation_starts(tokens, Config(**{**TINY, "eval_batches": eval_batches}))
        assert len(everything) == (len(tokens) - 1) // 16 // 2 * 2


def test_ngram_baselines_equal_a_naive_count():
    rng = np.random.default_rng(0)
    vocab_size, train_ids, val_ids = 5, rng.integers(0, 4, 300), rng.integers(0, 5, 60)
    starts = np.arange(0, 48, 8)

    def probability(word, context):  # Witten-Bell, by the definition
        k = len(context)
        lower = probability(word, context[1:]) if k else 1 / vocab_size
        followers = []
        for i in range(k, len(train_ids)):
            if tuple(train_ids[i - k : i]) == context:
                followers.append(train_ids[i])
        kinds = len(set(followers))
        if not kinds:
            return lower
        return (followers.count(word) + kinds * lower) / (len(followers) + kinds)

    losses = ngram_losses(train_ids, val_ids, starts, 8, vocab_size)
    assert list(losses) == ["unigram", "bigram", "trigram"]
    for k, loss in enumerate(losses.values()):
        naive = [probability(val_ids[t], tuple(val_ids[t - k : t])) for t in range(2, 49)]
        assert abs(loss + np.log(naive).mean()) < 1e-9


# ---- optimiser


def test_schedules():
    options = {**TINY, "max_iters": 100, "warmup_iters": 10}
    cosine = Config(**{**options, "schedule": "cosine", "min_lr": 0.1})
    assert lr_share(0, cosine) < lr_share(9, cosine) < lr_share(10, cosine) == 1
    assert abs(lr_share(55, cosine) - 0.55) < 1e-9 and abs(lr_share(100, cosine) - 0.1) < 1e-9
    wsd = Config(**{**options, "schedule": "wsd", "decay_iters": 20})
    assert lr_share(10, wsd) == lr_share(80, wsd) == 1 and lr_share(100, wsd) == 0
    assert abs(lr_share(90, wsd) - 0.5) < 1e-9


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16))
    adamw, muon = make_optimizers(model, Config(optimizer="muon"), torch.device("cpu"))
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[id(p)] for p in muon.param_groups[0]["params"]}
    matrices = {name for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    assert in_muon == matrices
    decayed, others = adamw.param_groups
    in_adamw = [names[id(p)] for p in [*decayed["params"], *others["params"]]]
    assert sorted([*in_muon, *in_adamw]) == sorted(names.values())
    assert others["weight_decay"] == 0 and all(p.dim() < 2 for p in others["params"])


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_muon_makes_the_updates_of_torchs_muon_in_full_precision(shape, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)  # torch's, made exact
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.clone())
    optimizer = train.Muon([ours], 0.02, 0.95, 0.1)
    oracle = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(10):
        grad = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        oracle.step()
    assert (ours - start).abs().max() > 0.01
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_float32_run_touches_no_16_bit_tensor(dataset, tmp_path):
    """A CPU without bfloat16 emulates it, a hundred times as slow: the main job would not end."""
    with SixteenBit() as mode:
        trained(dataset, tmp_path / "run", max_iters=1, optimizer="muon")
    assert not mode.operations


# ---- whole runs


def test_a_run_learns_and_its_twin_sees_the_same_data(dataset, tmp_path, monkeypatch):
    windows_read = {}
    real_batch = Loader.batch

    def spying_batch(self, micro):
        idx, targets = real_batch(self, micro)
        windows_read.setdefault(self.run.out.name, []).append(idx)
        return idx, targets

    monkeypatch.setattr(Loader, "batch", spying_batch)
    options = {"max_iters": 60, "eval_interval": 20, "save_interval": 60, "keep_interval": 40}
    options |= {"tokens_per_step": 128, "learning_rate": 0.01, "baseline_tokens": 10_000}
    twin = trained(dataset, tmp_path / "twin", alpha=0.0, **options)
    for name, plot in FIGURES.items():
        monkeypatch.setattr(train, name, plot)
    topo = trained(dataset, tmp_path / "topo", alpha=1.0, **options)
    assert torch.equal(torch.cat(windows_read["topo"]), torch.cat(windows_read["twin"]))
    losses, spatial = logged(topo, "val_task"), logged(topo, "val_spatial")
    assert losses[0] > math.log(257) - 0.5 and losses[-1] < losses[0] - 1
    assert losses[0] == logged(twin, "val_task")[0]  # the same weights
    assert spatial[0] == logged(twin, "val_spatial")[0]
    assert spatial[-1] < logged(twin, "val_spatial")[-1] - 0.1
    files = {path.name for path in topo.iterdir()}
    assert files >= {"config.yaml", "log.jsonl", "ckpt.pt", "best.pt", "ckpt-0000040.pt"}
    for name in ("loss.png", "sheets.png"):
        assert (topo / name).stat().st_size > 10_000
    (row,) = csv.DictReader((topo / "results.csv").open())
    assert float(row["low"]) < float(row["score"]) < float(row["high"])
    assert row["metric"] == "val_loss" and row["null"] == "trigram" and float(row["chance"]) > 0
    assert row["n"] == "96" and row["step"] == "60"


def test_the_rival_and_the_other_sheets_train(dataset, tmp_path):
    """spatial=weights, the residual tap, maximum and absolute, a mosaic of heads, one window,
    positions of a file."""
    rival = {"spatial": "weights", "tap": "residual"}
    other = {"accum": "maximum", "spatial_kind": "absolute", "activation_decay": 0.01}
    other |= {"n_head": 4, "head_loss": True, "attn_proj": True, "recompute": True}
    for name, sheet in (("a", rival), ("b", other), ("c", {"windows": "sheet"})):
        folder = trained(dataset, tmp_path / name, alpha=1.0, **sheet)
        assert np.isfinite(logged(folder, "train_total")).all()
        saved = checkpoint(folder)["model_args"]
        assert all(saved[key] == value for key, value in sheet.items() if key != "recompute")
    layout = np.tile(np.arange(16), (4, 1))
    positions.save_positions(str(tmp_path / "id.npz"), layout)
    folder = trained(dataset, tmp_path / "d", positions=str(tmp_path / "id.npz"), max_iters=1)
    assert torch.equal(checkpoint(folder)["model"]["unit_at_cell"], torch.tensor(layout))


def test_recomputed_blocks_have_the_same_gradients_and_keep_less():
    sheets = {"sheet": True, "radius": 2, "windows": 2, "alpha": 1.0}
    shape = GPTConfig(**{**SMALL, **sheets, "n_layer": 3, "dropout": 0.1})
    idx = any_ids(2, 33)
    kept, grads = [], []
    for again in (False, True):
        model = GPT(shape)
        if again:
            train.recompute_blocks(model)
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        torch.manual_seed(0)
        windows = model.draw_windows(torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(idx[:, :-1], idx[:, 1:], windows).loss
        loss.backward()
        kept.append(sum(sizes.values()))
        grads.append([p.grad for p in model.parameters()])
        assert model.eval().generate([[1, 2]], 3, temperature=0)  # as ever
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and kept[1] < 0.7 * kept[0]


def test_weights_of_another_run(dataset, whole, tmp_path):
    """Whatever the shape options say; and validation alone."""
    assert logged(whole, "muon_lr")[0] == logged(whole, "lr")[0] * 0.02 / 3e-3
    frozen = {"learning_rate": 0.0, "muon_lr": 0.0, "max_iters": 1, "n_layer": 1}
    b = trained(dataset, tmp_path / "b", init_from=str(whole), **frozen)
    assert same_weights(checkpoint(whole, "best.pt"), checkpoint(b))
    assert yaml.safe_load((b / "config.yaml").read_text())["n_layer"] == 2  # what it has
    trained(dataset, b, **{**frozen, "init_from": "resume", "max_iters": 2})
    assert checkpoint(b)["step"] == 2
    c = trained(dataset, tmp_path / "c", init_from=str(whole), eval_only=True)
    assert logged(c, "val_task")[-1] == logged(whole, "val_task")[-1]
    assert not (c / "ckpt.pt").exists() and (c / "results.csv").exists()


def test_a_loss_that_is_not_finite_stops_the_run(dataset, tmp_path, monkeypatch):
    real_step = train.train_step

    def poisoned_step(run, config, training):
        if training.step == 6:
            training.model.transformer.wte.weight.data.fill_(float("nan"))
        return real_step(run, config, training)

    monkeypatch.setattr(train, "train_step", poisoned_step)
    with pytest.raises(InputError, match="not finite at step 8.*ckpt.pt"):
        trained(dataset, tmp_path, max_iters=20, log_interval=10, save_interval=4, eval_interval=10)
    state = checkpoint(tmp_path)
    assert state["step"] == 4 and all(p.isfinite().all() for p in state["model"].values())


# ---- stopping and going on


def test_checkpoints_that_do_not_fit(dataset, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    other = shutil.copytree(dataset, tmp_path / "other")
    file = other / yaml.safe_load((dataset / "meta.yaml").read_text())["tokenizer"]["file"]
    first, second, *ranks = file.read_text().splitlines()
    swapped = [f"{second.split()[0]} 0", f"{first.split()[0]} 1", *ranks]
    file.write_text("\n".join(swapped) + "\n")
    resumed = {"init_from": "resume"}
    for data, out, options, words in (
        (dataset, run, {"n_layer": 3, **resumed}, "n_layer=2.*say 3"),
        (dataset, run, {"optimizer": "adamw", **resumed}, "optimizer=muon, the options say adamw"),
        (other, run, resumed, "ckpt.pt has another tokenizer"),
        (other, tmp_path / "b", {"init_from": str(whole)}, "tokenizer"),
    ):
        input_error(words, trained, data, out, **options)


def test_a_resumed_run_takes_the_learning_rates_of_its_options(dataset, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    still = {"learning_rate": 0.0, "muon_lr": 0.0, "weight_decay": 0.3}
    trained(dataset, run, **still, max_iters=6, init_from="resume")
    assert same_weights(checkpoint(run), checkpoint(whole)) and checkpoint(run)["step"] == 6
    adamw, muon = (saved["param_groups"] for saved in checkpoint(run)["optimizers"])
    assert [group["weight_decay"] for group in adamw + muon] == [0.3, 0.0, 0.3]


def test_starting_over_keeps_what_is_there_until_all_input_is_read(dataset, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.glob("*.*")}
    input_error("nosuchset", trained, "nosuchset", run, overwrite=True)
    assert {path.name: path.read_bytes() for path in run.glob("*.*")} == before
    trained(dataset, run, overwrite=True, init_from=str(run), eval_only=True)
    assert not list(run.glob("*.pt")) and logged(run, "step") == [0]
    assert "eval_only: true" in (run / "config.yaml").read_text()
    assert (run / "results.csv").read_bytes() != before["results.csv"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_on_a_gpu_resumes_bit_for_bit(dataset, tmp_path, dtype):
    options = {"alpha": 1.0, "dropout": 0.1, "tokens_per_step": 128, "max_iters": 12}
    options |= {"device": "cuda", "dtype": dtype, "deterministic": True}
    one = trained(dataset, tmp_path / "one", **options, keep_interval=6)
    (tmp_path / "two").mkdir()
    shutil.copy(one / "ckpt-0000006.pt", tmp_path / "two/ckpt.pt")
    two = trained(dataset, tmp_path / "two", **options, init_from="resume")
    torch.use_deterministic_algorithms(False)
    assert same_weights(checkpoint(one), checkpoint(two))
    assert checkpoint(one)["scaler"] == checkpoint(two)["scaler"]


# ---- time


class Clock:
    """Time that passes in training, and in validation at a third of its pace."""

    def __init__(self, monkeypatch, step_seconds):
        self.now = 1000.0
        real_step, real_evaluate = train.train_step, train.evaluate

        def slow_step(*args):
            self.now += step_seconds
            return real_step(*args)

        def slow_evaluate(run, config, data, model, n_batches=0):
            self.now += step_seconds / 3 * (n_batches or config.eval_batches)
            return real_evaluate(run, config, data, model, n_batches)

        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(train, "train_step", slow_step)
        monkeypatch.setattr(train, "evaluate", slow_evaluate)


def test_minutes_settle_the_steps_and_a_resumed_run_is_exact(
    dataset, tmp_path, monkeypatch, capsys
):
    clock = Clock(monkeypatch, 4.8)
    options = {"minutes": 8.0, "max_iters": Config.max_iters, "n_layer": 1, "optimizer": "adamw"}
    options |= {"warmup_iters": 20, "eval_interval": 250, "eval_batches": 48}
    options |= {"log_interval": 1000, "keep_interval": 40}
    whole = trained(dataset, tmp_path / "whole", **options)
    end = checkpoint(whole)
    n_steps = end["step"]
    assert 7 * 60 < clock.now - 1000 < 9 * 60
    text = capsys.readouterr().out
    assert f"minutes=8 allows max_iters={n_steps} on this machine" in text
    assert "a step takes 4.8 s:" in text
    assert yaml.safe_load((whole / "config.yaml").read_text())["max_iters"] == n_steps
    assert end["config"]["max_iters"] == n_steps
    assert "muon_lr" not in whole.joinpath("log.jsonl").read_text()  # with AdamW alone
    last_lr = end["optimizers"][0]["param_groups"][0]["lr"]
    assert 0 < last_lr < 0.03 * Config.learning_rate  # the schedule ends with the run
    # going on from step 40, told nothing, told again, or told otherwise
    for told, wanted in (("", n_steps), ("minutes=8", n_steps), ("max_iters=44", 44)):
        folder = tmp_path / f"again {told}"
        folder.mkdir()
        shutil.copy(whole / "ckpt-0000040.pt", folder / "ckpt.pt")
        words = [f"out_dir={folder}", "init_from=resume", "device=cpu", told]
        train.main(configure(Config, list(filter(None, words))))
        assert checkpoint(folder)["step"] == wanted
        assert wanted == 44 or same_weights(checkpoint(folder), end)
    assert "max_iters" not in capsys.readouterr().out.split("resumed with")[0]


def test_a_cpu_compiles_where_earlier_runs_say_that_it_pays(tmp_path, monkeypatch):
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16))
    facts = {"device": torch.device("cpu"), "dtype": torch.float32, "world": 1, "master": True}
    cpu = SimpleNamespace(**facts, reduce=lambda value, op: value, save_config=lambda: None)

    def chosen(state=None, **options):
        config = Config(compile="auto", **options)
        train.settle_options(cpu, config, model, state)
        return config.compile

    def record(compiled, seconds, began):
        steps = {"step_seconds": seconds, "durations": [seconds] * 10}
        training = SimpleNamespace(model=model, began=time.time() - began, **steps)
        train.record_timing(cpu, Config(compile=compiled), training)

    assert chosen() is False  # nothing is known
    record(False, 1.0, 10.0)
    assert chosen() is False
    record(True, 0.5, 5.0 + 60.0)  # ten steps, and a minute of compiling
    assert chosen(max_iters=1000) is True and chosen(max_iters=100) is False
    assert chosen(minutes=3.0) is True and chosen(minutes=1.0) is False
    assert chosen(max_iters=1000, batch_size=1) is False  # another shape
    for compiled in (True, False):  # a resumed run stays what it is
        assert chosen(state={"config": {"compile": compiled}}) is compiled
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    (tmp_path / "a file").write_text("")
    record(False, 1.0, 10.0)  # a home that cannot be written does not matter
    assert chosen(max_iters=1000) is False


def test_dry_run_reads_a_part_of_one_step_and_leaves_nothing(
    dataset, tmp_path, monkeypatch, capsys
):
    rows_read = []
    real_batch = Loader.batch

    def spying_batch(self, micro):
        rows_read.append(self.config.batch_size)
        return real_batch(self, micro)

    monkeypatch.setattr(Loader, "batch", spying_batch)
    out = tmp_path / "none"
    step = {"batch_size": 3, "block_size": 512, "tokens_per_step": 923_136}  # of which 2 rows fit
    trained(dataset, out, dry_run=True, compile="auto", n_layer=30, **step)
    text = capsys.readouterr().out
    assert all(word in text for word in ("parameters", "923,136", "memory", "disk", "time"))
    assert f"{30 * 12 * 16 * 16 + 30 * 32 + 16 + (320 + 512) * 16:,}" in text
    assert not out.exists() and sum(rows_read) < 20


# ---- bad input


BAD = [
    ({"tokens_per_step": 100}, "tokens_per_step=100 .*multiple"),
    ({"positions": "nofile"}, "nofile.npz is missing: make one with python init_pos.py"),
    ({"block_size": 30_000}, "block_size"),
    ({"positions": "none"}, "alpha"),
    ({"beta2": 1.0}, "beta2"),
    ({"vocab_size": 64}, "vocab_size"),
    ({"vocab_size": 10, "dry_run": True}, "vocab_size"),
    ({"spatial": "weights", "factor": 5.0}, "factor=5.*16 units"),
    ({"init_from": "out/nosuchrun"}, "nosuchrun"),
    ({"dtype": "float16"}, "dtype"),
]


@pytest.mark.parametrize("options, words", BAD)
def test_bad_input_is_one_sentence(dataset, tmp_path, options, words):
    input_error(words, trained, dataset, tmp_path / "run", **options)


# ---- the published configs


def test_the_published_runs_are_as_published():
    gpt2 = configure(Config, ["train_gpt2.yaml"])
    assert (gpt2.n_layer, gpt2.n_head, gpt2.n_embd, gpt2.alpha) == (12, 16, 784, 2.5)
    assert gpt2.tokens_per_step == 983_040 and gpt2.optimizer == "adamw"
    assert configure(Config, ["train_gpt2.yaml", "train_gpt2_notopo.yaml"]).alpha == 0
    assert configure(Config, ["train_gpt2.yaml", "windows=sheet"]).windows == "sheet"
    assert configure(Config, ["train_gpt2.yaml", "train_gpt2_resid.yaml"]).tap == "residual"
    for path in sorted(ROOT.glob("config/train*.yaml")):
        config = configure(Config, [str(path)])
        step = config.batch_size * config.block_size
        assert config.n_embd % config.n_head == 0 and config.tokens_per_step % step == 0
    preset = configure(init_pos.Config, ["init_pos.yaml"])
    assert (preset.scheme, preset.method, preset.radius) == ("swap", "window", 10)
    assert (preset.swap_windows, preset.swap_trials, preset.n_embd) == (50, 50, 784)


# ---- init_pos.py, sample.py


def laid_out(text_folder, tmp_path, **options):
    """Lay out a small model by the responses to a text."""
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 64, "radius": 3, "block_size": 32, "samples": 512}
    folders = {"positions_dir": str(tmp_path), "out_dir": str(tmp_path / "out")}
    text = {"init_data": str(text_folder), "device": "cpu", "dtype": "float32"}
    config = init_pos.Config(**{**tiny, **text, **folders, **options})
    configurator.check(config)
    init_pos.main(config)


@pytest.mark.parametrize("method", ["sheet", "window"])
def test_swaps_lower_the_loss_on_text_that_they_have_not_seen(dataset, tmp_path, method):
    laid_out(dataset, tmp_path, scheme="swap", name="a", method=method)
    layout = positions.load_positions(str(tmp_path / "a.npz"), 1, 64)
    assert (np.sort(layout, 1) == np.arange(64)).all()
    assert (tmp_path / "out/a.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert [row["layer"] for row in rows] == ["layer.0.attn", "layer.0.mlp"]
    for row in rows:
        assert row["n"] == "16" and float(row["low"]) <= float(row["score"]) <= float(row["high"])
        assert float(row["score"]) < float(row["chance"])


def test_other_layouts_and_a_trained_model(dataset, whole, tmp_path):
    laid_out(dataset, tmp_path, scheme="random", seed=3)
    random = positions.load_positions(str(tmp_path / "random-1x64.npz"), 1, 64)
    assert np.array_equal(random, positions.random_positions(1, 64, 3))
    laid_out(dataset, tmp_path, scheme="identity")
    identity = positions.load_positions(str(tmp_path / "identity-1x64.npz"), 1, 64)
    assert (identity == np.arange(64)).all()
    with pytest.raises(InputError, match="identity-1x64.npz already exists.*overwrite=True"):
        laid_out(dataset, tmp_path, scheme="identity")
    input_error("samples", laid_out, dataset, tmp_path, samples=1)
    laid_out(dataset, tmp_path, scheme="swap", lm=str(whole), radius=2)
    positions.load_positions(str(tmp_path / "swap-2x16.npz"), 2, 16)


def test_init_data_is_cut_on_first_use(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"init_data": "init-data", "samples": 300, "scheme": "identity"}
    laid_out(dataset, tmp_path, dataset=str(dataset), **options)
    meta = yaml.safe_load((tmp_path / "init-data/meta.yaml").read_text())
    assert meta["cut_from"] == str(dataset) and meta["synthetic"]
    input_error("init-data was cut from", laid_out, dataset, tmp_path, dataset="pydocs", **options)


def test_sample_writes_the_same_text_twice(whole, tmp_path, capsys):
    options = {"lm": str(whole), "device": "cpu", "dtype": "float32", "out_dir": str(tmp_path)}
    (tmp_path / "prompt.txt").write_text("ab")
    texts = []
    for prompt in ({"prompt": "ab"}, {"file": str(tmp_path / "prompt.txt")}):
        sample.main(sample.Config(**options, **prompt, num_samples=2, max_new_tokens=8))
        texts.append((tmp_path / "samples.txt").read_text())
        assert capsys.readouterr().out.count("ab") == 2
    assert texts[0] == texts[1] and texts[0].count("ab") == 2
