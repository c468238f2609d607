"""train.py's own parts: what data a run sees, schedules, baselines, optimisers, and every bad input in one sentence."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import make_dataset, refused

import positions
import train
import configurator
from configurator import Run
from data.tokens import Tokens
from train import Config, Loader, lr_share, make_optimizers, ngram_losses, validation_starts

TINY = dict(batch_size=2, block_size=16, n_layer=2, n_head=2, n_embd=16, radius=2, windows=2, max_iters=4, eval_interval=2, eval_batches=3, log_interval=1,
            save_interval=2, warmup_iters=1, compile=False, device="cpu", dtype="float32", baseline_tokens=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("tiny"))


class Rank:
    """What Loader needs of a Run."""
    device, seed = torch.device("cpu"), 7

    def __init__(self, rank=0, world=1):
        self.rank, self.world = rank, world


def read(loader, n):
    return [loader.next()[0] for _ in range(n)]


def test_data_is_without_replacement_and_the_same_for_any_ranks(dataset):
    tokens, config = Tokens(dataset, "train"), Config(**TINY)
    one = Loader(Rank(), tokens, config, 4, 0)
    seen = read(one, 4 * 160)  # more than an epoch
    starts = [one._start(k) for k in range(one.n)]
    assert len(set(starts)) == one.n and min(np.diff(sorted(starts))) == config.block_size  # each window once, none overlaps
    two = [Loader(Rank(r, 2), tokens, config, 4, 0) for r in (0, 1)]
    dealt = [loader.next()[0] for _ in range(40) for loader in two]
    assert all(torch.equal(a, b) for a, b in zip(seen, dealt))
    later = read(Loader(Rank(), tokens, config, 4, 8 * config.batch_size), 4)  # a cursor at micro-batch 8
    assert all(torch.equal(a, b) for a, b in zip(seen[8:], later))
    idx, targets = Loader(Rank(), tokens, config, 1, 0).next()
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    other = Loader(Rank(), tokens, config, 4, one.n)  # the next epoch has another order and offset
    assert [other._start(one.n + k) for k in range(20)] != starts[:20]


def test_validation_windows_are_fixed_and_apart(dataset):
    tokens = Tokens(dataset, "val")
    starts = validation_starts(tokens, Config(**TINY))
    assert len(starts) == 6 and min(np.diff(starts)) >= 16 and starts[-1] + 17 <= len(tokens)
    everything = validation_starts(tokens, Config(**{**TINY, "eval_batches": 0}))
    assert len(everything) == (len(tokens) - 1) // 16 // 2 * 2
    assert len(validation_starts(tokens, Config(**{**TINY, "eval_batches": 10 ** 6}))) == len(everything)


def test_ngram_baselines_equal_a_naive_count():
    rng = np.random.default_rng(0)
    V, train_ids, val = 5, rng.integers(0, 4, 300), rng.integers(0, 5, 60)
    starts = np.arange(0, 48, 8)

    def p(w, context):  # Witten-Bell, by the definition
        k = len(context)
        lower = 1 / V if k == 0 else None
        follow = [train_ids[i] for i in range(k, len(train_ids)) if tuple(train_ids[i - k:i]) == context]
        if k:
            lower = p(w, context[1:])
        if not follow:
            return lower
        return (follow.count(w) + len(set(follow)) * lower) / (len(follow) + len(set(follow)))
    targets = [s + i for s in starts for i in range(1, 9) if s + i >= 2]
    naive = [-np.mean([math.log(p(val[t], tuple(val[t - k:t]))) for t in targets]) for k in range(3)]
    got = ngram_losses(train_ids, val, starts, 8, V)
    assert np.allclose(list(got.values()), naive, atol=1e-9) and list(got) == ["unigram", "bigram", "trigram"]


def test_schedules():
    cosine = Config(**{**TINY, "schedule": "cosine", "max_iters": 100, "warmup_iters": 10, "min_lr": 0.1})
    assert lr_share(0, cosine) < lr_share(9, cosine) < lr_share(10, cosine) == 1
    assert abs(lr_share(55, cosine) - 0.55) < 1e-9 and abs(lr_share(100, cosine) - 0.1) < 1e-9
    wsd = Config(**{**TINY, "schedule": "wsd", "max_iters": 100, "warmup_iters": 10, "decay_iters": 20, "min_lr": 0.0})
    assert lr_share(10, wsd) == lr_share(80, wsd) == 1 and abs(lr_share(90, wsd) - 0.5) < 1e-9 and lr_share(100, wsd) == 0


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16))
    adamw, muon = make_optimizers(model, Config(optimizer="muon"), torch.device("cpu"))
    named = {id(p): name for name, p in model.named_parameters()}
    in_muon = {named[id(p)] for g in muon.param_groups for p in g["params"]}
    assert in_muon == {n for n, p in model.named_parameters() if ".h." in n and p.dim() == 2}
    in_adamw = [named[id(p)] for g in adamw.param_groups for p in g["params"]]
    assert sorted([*in_muon, *in_adamw]) == sorted(named.values())
    assert all(p.dim() < 2 for g in adamw.param_groups if g["weight_decay"] == 0 for p in g["params"])


def logged(folder, key):
    return [line[key] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if key in line]


def test_a_run_learns_and_its_twin_sees_the_same_data(dataset, tmp_path, monkeypatch):
    """Whole runs in this process: alpha > 0 lowers the spatial loss, alpha = 0 starts from the same weights and reads the same windows."""
    seen = {}

    def spying(self, at, real=Loader._read):
        seen.setdefault(str(self.run.out), []).append(at)
        return real(self, at)
    monkeypatch.setattr(Loader, "_read", spying)
    options = {**TINY, "dataset": str(dataset), "max_iters": 60, "eval_interval": 20, "save_interval": 60, "tokens_per_step": 128, "learning_rate": 0.01,
               "baseline_tokens": 10_000, "keep_interval": 40}
    for alpha, name in ((1.0, "topo"), (0.0, "twin")):
        train.main(Config(**{**options, "alpha": alpha, "out_dir": str(tmp_path / name)}))
    topo, twin = tmp_path / "topo", tmp_path / "twin"
    first, second = (seen[str(f)][:240] for f in (topo, twin))
    assert first == second == list(range(0, 480, 2))
    val = logged(topo, "val_task")
    assert val[0] > math.log(257) - 0.5 and val[-1] < val[0] - 1
    assert logged(topo, "val_task")[0] == logged(twin, "val_task")[0] and logged(topo, "val_spatial")[0] == logged(twin, "val_spatial")[0]
    assert logged(topo, "val_spatial")[-1] < logged(twin, "val_spatial")[-1] - 0.1
    files = {f.name for f in topo.iterdir()}
    assert {"config.yaml", "log.jsonl", "ckpt.pt", "best.pt", "ckpt-0000040.pt", "results.csv", "loss.png", "sheets.png"} <= files
    header, row = (topo / "results.csv").read_text().splitlines()
    row = dict(zip(header.split(","), row.split(",")))
    assert float(row["low"]) < float(row["score"]) < float(row["high"]) and row["null"] == "trigram" and float(row["chance"]) > 0


def test_a_layout_from_a_file_is_the_models(dataset, tmp_path):
    layout = positions.identity_positions(2, 16)
    positions.save_positions(str(tmp_path / "id.npz"), layout)
    train.main(Config(**{**TINY, "dataset": str(dataset), "positions": str(tmp_path / "id.npz"), "max_iters": 1, "out_dir": str(tmp_path / "run")}))
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert torch.equal(state["model"]["unit_at_cell"], torch.tensor(layout))


def test_init_from_another_checkpoint(dataset, tmp_path):
    options = {**TINY, "dataset": str(dataset), "max_iters": 1}
    train.main(Config(**options, out_dir=str(tmp_path / "a")))
    train.main(Config(**{**options, "n_layer": 1, "learning_rate": 0.0, "muon_lr": 0.0}, init_from=str(tmp_path / "a"), out_dir=str(tmp_path / "b")))
    a, b = (torch.load(tmp_path / f / "ckpt.pt", weights_only=True)["model"] for f in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_dry_run_says_what_it_takes_and_leaves_nothing(dataset, tmp_path, capsys):
    train.main(Config(**{**TINY, "dataset": str(dataset), "dry_run": True}, out_dir=str(tmp_path / "none")))
    text = capsys.readouterr().out
    assert all(word in text for word in ("parameters", "tokens per step", "memory", "disk", "time")) and not (tmp_path / "none").exists()


def test_a_loss_that_is_not_finite_stops_the_run(dataset, tmp_path, monkeypatch):
    real = train.make_optimizers

    def poisoned(model, *args):
        optimizers = real(model, *args)
        step = optimizers[0].step

        def bad(*args, **kwargs):
            poisoned.steps += 1
            if poisoned.steps == 6:
                model.transformer.wte.weight.data.fill_(float("nan"))
            return step(*args, **kwargs)
        optimizers[0].step = bad
        return optimizers
    poisoned.steps = 0
    monkeypatch.setattr(train, "make_optimizers", poisoned)
    with pytest.raises(ValueError, match="not finite at step 7.*ckpt.pt"):
        train.main(Config(**{**TINY, "dataset": str(dataset), "max_iters": 20, "log_interval": 10, "save_interval": 4, "eval_interval": 10},
                          out_dir=str(tmp_path)))
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())


def damaged(dataset, tmp_path, how):
    folder = shutil.copytree(dataset, tmp_path / how)
    if how == "empty":
        (folder / "train.bin").write_bytes(b"")
    elif how == "truncated":
        (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-10])
    elif how == "outside":
        ids = np.fromfile(folder / "train.bin", np.uint16)
        ids[:] = 999
        ids.tofile(folder / "train.bin")
    return folder


@pytest.mark.parametrize("options, words", [
    ({"dataset": "nosuch"}, ["nosuch", "prepare"]), ({"dataset": "empty"}, ["train.bin", "empty"]), ({"dataset": "truncated"}, ["val.bin"]),
    ({"dataset": "outside"}, ["999", "vocabulary"]), ({"n_embd": 18}, ["n_embd=18", "square", "positions=none"]), ({"n_head": 3}, ["n_head=3"]),
    ({"radius": 4}, ["radius=4"]), ({"tokens_per_step": 100}, ["tokens_per_step=100", "multiple"]), ({"positions": "nofile"}, ["nofile", "init_pos.py"]),
    ({"block_size": 30_000}, ["block_size"]), ({"positions": "none"}, ["alpha"]), ({"batch_size": 0}, ["batch_size"]), ({"vocab_size": 64}, ["vocab_size"]),
    ({"init_from": "resume"}, ["ckpt.pt", "python train.py"]), ({"init_from": "out/nosuchrun"}, ["nosuchrun"]), ({"device": "tpu"}, ["device"]),
    ({"dtype": "float16"}, ["dtype"]), ({"head_loss": True}, ["head_loss"])])
def test_bad_input_is_one_sentence(dataset, tmp_path, options, words):
    name = options.get("dataset", "")
    if name in ("empty", "truncated", "outside"):
        options = {"dataset": str(damaged(dataset, tmp_path, name))}
    with pytest.raises((ValueError, OSError)) as e:
        config = Config(**{**TINY, "dataset": str(dataset), "out_dir": str(tmp_path / "run"), **options})
        configurator.check(config)
        train.main(config)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), e.value


def test_checkpoints_that_do_not_fit(dataset, tmp_path):
    config = {**TINY, "dataset": str(dataset), "max_iters": 1, "out_dir": str(tmp_path / "run")}
    train.main(Config(**config))
    with pytest.raises(ValueError, match="n_layer=2.*say 3"):
        train.main(Config(**{**config, "n_layer": 3, "init_from": "resume"}))
    meta = yaml.safe_load((dataset / "meta.yaml").read_text())
    other = shutil.copytree(dataset, tmp_path / "other")
    ranks = (other / meta["tokenizer"]["file"]).read_text().splitlines()
    (other / meta["tokenizer"]["file"]).write_text("\n".join([ranks[1].split()[0] + " 0", ranks[0].split()[0] + " 1", *ranks[2:]]) + "\n")
    with pytest.raises(ValueError, match="tokenizer"):
        train.main(Config(**{**config, "dataset": str(other), "init_from": str(tmp_path / "run"), "out_dir": str(tmp_path / "b")}))


def test_the_sentence_reaches_the_user(dataset, tmp_path):
    """The whole way once: process, stderr, exit status 2."""
    assert refused("train", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", "n_embd=18", "n_head=2", "device=cpu", says=["n_embd=18", "square"])
    assert refused("train", "learning_rat=1", says=["learning_rat", "'learning_rate'"])


def test_run_is_made_for_scripts(tmp_path):
    """Run refuses a used folder, and overwrite clears it."""
    (tmp_path / "ckpt.pt").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises((OSError, ValueError), match="init_from=resume"):
        Run(Config(out_dir=str(tmp_path), device="cpu"))
    Run(Config(out_dir=str(tmp_path), device="cpu", overwrite=True)).close()
    assert not (tmp_path / "ckpt.pt").exists() and (tmp_path / "notes.txt").exists()


def exact_newton_schulz(grad, ns_coefficients, ns_steps, eps):
    """torch's orthogonalisation in float64 instead of bfloat16."""
    a, b, c = ns_coefficients
    x = grad.double()
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(grad.dtype)


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_muon_makes_the_updates_of_torchs_muon_in_full_precision(shape, monkeypatch):
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", exact_newton_schulz)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = train.Muon([ours], 0.02, 0.95, 0.1), torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(10):
        grad = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - start).abs().max() > 0.01
    assert torch.allclose(ours, theirs, atol=1e-4)


class SixteenBit(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers every operation that takes or gives a 16-bit float."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if torch.is_tensor(value) and value.dtype in (torch.bfloat16, torch.float16):
                self.seen.add(str(function))
        return out


def test_a_float32_step_touches_no_16_bit_tensor():
    """A CPU without bfloat16 emulates it, a hundred times as slow: one hidden cast and the main job does not end."""
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16, sheet=True, radius=2, windows=2, alpha=0.1))
    optimizers = make_optimizers(model, Config(), torch.device("cpu"), torch.float32)
    idx = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    with SixteenBit() as mode:
        model(idx[:, :-1], idx[:, 1:], model.draw_windows(torch.Generator().manual_seed(0))).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert len(optimizers) == 2 and not mode.seen
