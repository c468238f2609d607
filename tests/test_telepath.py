"""telepath.py: splits that do not leak, augmentations that are what they say, losses and scores against naive oracles, what learns and what does not."""
import json
import math
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import byte_tokenizer, make_eeg
from torch.nn import functional as F

import telepath as T
from configurator import check
from data.tokens import character_state, state_of
from model import EncoderConfig, GPT, GPTConfig, NeuralEncoder, Tokenizer, lm_state, load_checkpoint, save_checkpoint

FAST = dict(device="cpu", dtype="float32", t_end=0.4, baseline=0.0, jitter=0.0, patch=5, width=16, virtual=8, encoder_layers=1, batch_size=8, warmup_iters=5,
            max_iters=40, eval_interval=20, log_interval=10, save_interval=20, shuffles=40, eval_trials=60, max_new_tokens=3, num_workers=0)


def tiny_lm():
    torch.manual_seed(0)
    lm = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32, bias=False), seed=3)
    with torch.no_grad():  # an untrained one whose every token and layer matters
        for name, p in lm.named_parameters():
            p.mul_(10 if "wte" in name else 5 if p.dim() == 2 else 1)
    return lm


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("telepath")
    make_eeg(folder / "eeg")
    save_checkpoint(folder / "lm.pt", dict(**lm_state(tiny_lm()), tokenizer=state_of(byte_tokenizer())))
    return folder


def a_config(given, **options):
    return T.Config(**{**FAST, "dataset": str(given / "eeg"), "lm": str(given / "lm.pt"), **options})


class Here:
    """A Run without a folder."""

    def __init__(self, config):
        self.config, self.seed, self.rank, self.world, self.master, self.stopped = config, config.seed, 0, 1, True, 0
        self.device, self.dtype, self.scaler = torch.device("cpu"), torch.float32, torch.amp.GradScaler("cpu", enabled=False)
        self.autocast = nullcontext

    def print(self, *words):
        pass

    log = progress = None


def everything(given, **options):
    """config, run, trials, sets, manifest, model, text, space of a run that has not begun."""
    config = a_config(given, **options)
    run = Here(config)
    trials, sets, manifest = T.prepare(config, config.dataset)
    torch.manual_seed(0)
    model, tokenizer, _ = T.build(config, trials, run)
    return config, run, trials, sets, manifest, model, T.Text(tokenizer, trials, set(manifest["held_out_words"]), config), \
        T.WordSpace(model.lm.transformer.wte.weight)


# ---- splits

@pytest.mark.parametrize("grouped", [True, False])
def test_splits_share_nothing(tmp_path, grouped):
    make_eeg(tmp_path / "eeg", subjects=4, images=8, repeats=3, grouped=grouped)
    config = T.Config(dataset=str(tmp_path / "eeg"), t_end=0.8, widen=0.1, jitter=0.02)
    trials = T.Trials(tmp_path / "eeg", config)
    sets, manifest = T.split(trials, config)
    assert all(len(sets[name]) for name in ("train", "val", *T.SETS))
    table = trials.table
    words, people, images = ({name: set(table[column].iloc[ids]) for name, ids in sets.items()} for column in ("word", "subject", "image"))
    assert not words["train"] & (words["object"] | words["subject_object"]) and words["trial"] <= words["train"] and words["val"] <= words["train"]
    assert not people["train"] & (people["subject"] | people["subject_object"]) and people["trial"] | people["object"] <= people["train"]
    for name in ("val", *T.SETS):
        assert not images["train"] & images[name], name  # all repeats of a picture are on one side
        assert name == "val" or not images["val"] & images[name]
    spare = round(config.jitter * trials.sfreq)
    read = {name: {(r, a + o) for r, a in zip(trials.recording[ids], trials.at[ids]) for o in range(min(trials.offsets[0], *trials.before, 0) - spare,
                                                                                                trials.offsets[-1] + spare + 1)} for name, ids in sets.items()}
    for name in T.SETS:
        assert not read["train"] & read[name] and not read["val"] & read[name], name  # and no raw sample
    assert not read["train"] & read["val"]
    assert len(set().union(*map(set, sets.values()))) == sum(map(len, sets.values()))
    again, twin = T.split(trials, config)[1], T.split(trials, replace(config, split_seed=1))[1]
    assert again == manifest and twin["hash"] != manifest["hash"] and json.loads(json.dumps(manifest)) == manifest


def test_a_minute_is_a_block_where_none_is_named(tmp_path):
    make_eeg(tmp_path / "eeg", changes=lambda name, given: given.update(events=given["events"].assign(block="")))
    trials = T.Trials(tmp_path / "eeg", T.Config(t_end=0.4))
    assert (trials.table.groupby("recording").block.nunique() > 1).all()  # converters leave the column empty


def test_what_counts_as_seen_was_in_training(tmp_path):
    def rare(name, given):  # most words have pictures in one part only, and of one person all blocks may be held out
        events = given["events"]
        events["word"] = events["image"] = events["object"] = [f"{w}{'abcdef'[b % 6]}" for w, b in zip(events.word, events.block)]
        if name == "sub-04":
            given["events"] = events[events.block == 0]

    make_eeg(tmp_path / "eeg", subjects=4, changes=rare)
    for seed in range(4):
        config = T.Config(t_end=0.4, jitter=0.0, split_seed=seed)
        trials = T.Trials(tmp_path / "eeg", config)
        try:
            sets, _ = T.split(trials, config)
        except ValueError as e:
            assert "leaves no trial" in str(e)
            continue
        table = trials.table
        words, people = ({name: set(table[column].iloc[ids]) for name, ids in sets.items()} for column in ("word", "subject"))
        assert words["val"] | words["trial"] | words["subject"] <= words["train"] and people["val"] | people["trial"] | people["object"] <= people["train"]


def test_words_of_one_picture_have_nothing_to_validate_on(tmp_path):
    make_eeg(tmp_path / "eeg", changes=lambda name, given: given.update(events=given["events"].assign(image=given["events"].object)))
    with pytest.raises(ValueError, match="every word has one picture"):
        T.split(T.Trials(tmp_path / "eeg", T.Config(t_end=0.4)), T.Config(t_end=0.4))


def test_trials_change_places_where_there_are_others():
    table = pd.DataFrame(dict(recording=[0] * 30 + [1] * 12 + [2] * 3, block=["a"] * 20 + list("bbbccdefgh") + list("abcdefghijkl") + list("abc")))
    assert T.strata(table).tolist() == ["0/a"] * 20 + ["0"] * 10 + ["1"] * 12 + ["all"] * 3


def test_absent_channels_have_no_scale_of_their_own(tmp_path):
    def fewer(name, given):
        given.update(signal=given["signal"][:, :3], channels=given["channels"][:3]) if name == "sub-01" else None

    make_eeg(tmp_path / "eeg", changes=fewer)
    config = T.Config(dataset=str(tmp_path / "eeg"), t_end=0.4, jitter=0.0, baseline=0.0, held_out_subjects=0.0)
    trials = T.prepare(config, tmp_path / "eeg")[0]
    assert (trials.scale < 1e-4).all()  # V: they size the blinks
    trials.learn(np.concatenate([np.flatnonzero(trials.recording == 1)[:40], np.flatnonzero(trials.recording == 2)[:1]]))
    assert np.isfinite(trials.white).all() and (trials.scale < 1e-4).all()  # one trial shows no noise: the mean of the others'


def test_windows_are_those_of_the_signal(given):
    trials = T.Trials(given / "eeg", a_config(given, t_start=0.1, t_end=0.3, baseline=0.1, widen=0.04))
    x = trials.cut(np.array([5, 40]), np.array([0, 3]))
    assert x.shape == (2, 8, 14)  # 0.06 to 0.34 s at 50 Hz: widened on both sides
    for i, (k, shift) in enumerate([(5, 0), (40, 3)]):
        rec, at = trials.recordings[trials.recording[k]], trials.at[k] + shift
        signal = np.asarray(rec.signal)
        assert np.allclose(x[i], (signal[at + 3:at + 17] - signal[at - 5:at].mean(0)).T, atol=1e-10)


def test_noise_is_learned_from_training_alone(tmp_path):
    def spoil(name, given):  # loud evaluation blocks
        given["signal"] = given["signal"].copy()
        if loud:
            for at in given["events"].onset[given["events"].block.isin(test_blocks)]:
                given["signal"][int(at * 50):int(at * 50) + 25] *= 50

    learned, loud, test_blocks = [], False, []
    for loud in (False, True):
        make_eeg(tmp_path / f"eeg{loud}", changes=spoil)
        config = T.Config(dataset=str(tmp_path / f"eeg{loud}"), t_end=0.4, jitter=0.0, baseline=0.0)
        if not loud:
            trials, sets, _ = T.prepare(config, config.dataset)
            test_blocks = sorted({int(b) for name in T.SETS for b in trials.table.block.iloc[sets[name]]})
            x, xyz, subject = trials.batch(sets["train"])
            x = (x - x.mean(0)).transpose(1, 2).flatten(0, 1).numpy()
            assert np.abs(np.cov(x.T) - np.eye(8)).max() < 0.25  # white
            assert set(subject.tolist()) == {0, 1} and set(trials.batch(sets["subject"])[2].tolist()) == {-1}
            assert np.allclose(trials.xyz[0], xyz[0], equal_nan=True)
        else:
            trials = T.Trials(tmp_path / "eegTrue", config)
            trials.learn(sets["train"])
        learned.append(trials.white)
    assert np.array_equal(*learned)


# ---- augmentation

def windows(n=60, seconds=4.0, sfreq=250.0, seed=0):
    rng = np.random.default_rng(seed)
    xyz = rng.normal(size=(32, 3))
    xyz = (0.1 * xyz / np.linalg.norm(xyz, axis=1, keepdims=True)).astype("f4")
    xyz[:, 2] = np.abs(xyz[:, 2])
    return np.zeros((n, 32, int(seconds * sfreq))), rng, np.full((n, 32), 1e-5), np.repeat(xyz[None], n, 0), sfreq


def power(x, sfreq):
    return np.fft.rfftfreq(x.shape[2], 1 / sfreq), np.square(np.abs(np.fft.rfft(x * np.hanning(x.shape[2])))).mean((0, 1))


def test_pink_noise_falls_as_one_over_f():
    x, rng, scale, xyz, sfreq = windows()
    f, p = power(T.pink(x, rng, scale, xyz, sfreq, 1.0), sfreq)
    band = (f > 1) & (f < 80)
    assert abs(np.polyfit(np.log(f[band]), np.log(p[band]), 1)[0] + 1) < 0.15
    out = T.pink(x, rng, scale, xyz, sfreq, 1.0)
    assert np.allclose(out.std(2), 1e-5, rtol=0.01)
    r, d = np.mean([np.corrcoef(o) for o in out], 0), np.linalg.norm(xyz[0][:, None] - xyz[0], axis=-1)
    assert r[(d > 0) & (d < 0.04)].mean() > 0.5 > 0.3 > abs(r[d > 0.15].mean())  # shared by neighbours


def test_line_noise_has_its_peaks():
    x, rng, scale, xyz, sfreq = windows()
    f, p = power(T.line(x, rng, scale, xyz, sfreq, 1.0, hz=50.0), sfreq)
    assert abs(f[p.argmax()] - 50) < 0.5 and p[(f > 99) & (f < 101)].max() > 100 * np.median(p)
    assert p[(f > 45) & (f < 55)].sum() > 0.8 * p.sum()
    assert abs(f[power(T.line(x, rng, scale, xyz, sfreq, 1.0, hz=60.0), sfreq)[1].argmax()] - 60) < 0.5


def test_blinks_are_in_front_and_muscles_at_the_edge():
    x, rng, scale, xyz, sfreq = windows()
    front, back = xyz[0, :, 1] > 0.06, xyz[0, :, 1] < -0.03
    size = np.abs(T.blink(x, rng, scale, xyz, sfreq, 1.0)).max(2).mean(0)
    assert size[front].mean() > 10 * size[back].mean() and 3e-5 < size.max() < 2e-4
    f, p = power(T.blink(x, rng, scale, xyz, sfreq, 1.0), sfreq)
    assert p[f < 6].sum() > 0.95 * p.sum()
    out = T.muscle(x, rng, scale, xyz, sfreq, 1.0)
    f, p = power(out, sfreq)
    assert p[(f > 19) & (f < 101)].sum() > 0.9 * p.sum()
    rms, edge = np.sqrt(np.square(out).mean((0, 2))), (np.abs(xyz[0, :, 0]) > 0.06) & (xyz[0, :, 2] < 0.05)
    assert rms[edge].mean() > 3 * rms[xyz[0, :, 2] > 0.09].mean()


def test_drifts_pops_absences_references_and_gains():
    x, rng, scale, xyz, sfreq = windows()
    f, p = power(T.drift(x, rng, scale, xyz, sfreq, 1.0), sfreq)
    assert p[f < 2].sum() > 0.9 * p.sum()
    jumped = np.abs(T.pop(x, rng, scale, xyz, sfreq, 1.0)).max(2) > 0
    assert (jumped.sum(1) == 1).all() and len(set(jumped.argmax(1))) > 10
    y = rng.normal(size=x.shape)
    places = xyz.copy()
    out = T.drop(y, rng, scale, places, sfreq, 1.0)
    gone = np.isnan(places[..., 0])
    assert 0.1 < gone.mean() < 0.3 and (out[gone] == 0).all() and np.array_equal(out[~gone], y[~gone])
    moved = y - T.reference(y, rng, scale, xyz, sfreq, 1.0)
    assert np.allclose(moved, moved[:, :1]) and np.abs(moved).max() > 0.1  # the same for all electrodes
    ratio = T.gain(y, rng, scale, xyz, sfreq, 1.0) / y
    assert np.allclose(ratio, ratio[:, :1, :1]) and ratio.min() > 0.6 and ratio.max() < 1.65 and ratio.std() > 0.1


ALL = {name: 0.5 for name in T.AUGMENT}


def test_any_workers_and_ranks_make_the_same_batches(given):
    config, run, trials, sets, _, _, text, _ = everything(given, augment=ALL, jitter=0.04, synonyms=True)
    plain = T.Loader(run, trials, text, sets["train"], config, 2)
    batches = [plain.next() for _ in range(8)]
    for workers in (1, 4):
        loader = T.Loader(run, trials, text, sets["train"], replace(config, num_workers=workers), 2)
        assert all(same(a, loader.next()) for a in batches)
    ranks = [T.Loader(run, trials, text, sets["train"], config, 2, rank=r, world=2) for r in (0, 1)]
    assert all(same(batches[i], ranks[i % 2].next()) for i in range(8))
    later = T.Loader(run, trials, text, sets["train"], config, 2, step=2)  # and a resumed run goes on with the right one
    assert same(batches[4], later.next())
    ids = np.concatenate([plain.ids(s, m) for s in range(30) for m in (0, 1)])
    assert (np.abs(np.bincount(trials.subject[ids]) / len(ids) - 0.5) < 0.01).all()  # subjects in equal parts
    assert not torch.equal(batches[0][0], T.Loader(Here(replace(config, seed=1)), trials, text, sets["train"], config, 2).next()[0])


def same(a, b):
    return all(np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind == "f") for x, y in zip(a, b, strict=True))


def test_synonyms_are_other_texts_of_the_same_trials(given):
    config, run, trials, sets, manifest, _, text, _ = everything(given, synonyms=True)
    said = [w for s in range(40) for w in T.Loader(run, trials, text, sets["train"], config, 1).make(s, 0)[3]]
    share = np.mean([w.endswith("x") for w in said])
    assert 0.4 < share < 0.6  # balanced, whatever the number of synonyms
    held = set(manifest["held_out_words"])
    assert not held & {n for w in set(trials.table.word.iloc[sets["train"]]) for n in text.trained[w]}
    assert T.Text(text.tokenizer, trials, {"awx"}, config).trained["aw"] == ["aw"]  # a synonym that is a held-out word is not trained on
    trials.table["synonyms"] = "ax| bw,Bw|the bw|c_w"
    assert T.Text(text.tokenizer, trials, {"bw"}, config).trained["aw"] == ["aw", "ax", "c w"]  # however it is spelled


# ---- text and losses

def test_packed_names_are_separate_passes(given):
    config, run, trials, sets, _, model, text, _ = everything(given)
    names = ["wa", "wbcde", "w"]
    rows = [[text.name(w) for w in names]]
    idx, position, mask, target = text.pack(rows)
    n = model.prefix(*trials.batch(sets["val"][:2]))
    x = model.eval().trunk(n, idx.expand(2, -1), position, mask)[:, len(text.prompt) - 1:]
    got = T.log_probs(F.linear(x, model.lm.transformer.wte.weight), target.expand(2, -1, -1)).sum(-1)
    for k, tokens in enumerate(rows[0]):
        row = torch.tensor([text.prompt + tokens])
        logits = F.linear(model.trunk(n, row.expand(2, -1)), model.lm.transformer.wte.weight).log_softmax(-1)[:, len(text.prompt) - 1:]
        right = logits.gather(2, torch.tensor(tokens + [text.stop]).expand(2, -1)[..., None])[..., 0]
        assert torch.allclose(got[:, k], right.sum(1), atol=1e-4)
    scores, empty = T.rank(run, model, text, trials, sets["val"][:5], trials.words[:7], batch_size=2, chunk=3)
    whole, same_empty = T.rank(run, model, text, trials, sets["val"][:5], trials.words[:7], batch_size=5, chunk=64)
    assert scores.shape == (5, 7) and np.allclose(scores, whole, atol=1e-4) and np.allclose(empty, same_empty, atol=1e-4)


def test_loss_counts_word_and_stop_alone(given):
    text = everything(given)[6]
    _, _, _, target = text.pack([[text.name("wa")], [text.name("wabc")]])
    assert target.tolist() == [[[32, 119, 97, 256, -1, -1]], [[32, 119, 97, 98, 99, 256]]]
    logits = torch.zeros(2, 6, 257)
    assert torch.allclose(T.log_probs(logits, target).sum(-1)[:, 0], -torch.tensor([4, 6]) * math.log(257))


def test_preferences_begin_at_ln_2_and_learn():
    policy = torch.tensor([[-3.0, -2.0], [-1.0, -4.0]], requires_grad=True)
    loss, margin = T.dpo_loss(policy, policy.detach(), 0.1)
    assert abs(loss.item() - math.log(2)) < 1e-6 and margin.abs().max() == 0
    loss.backward()
    assert (policy.grad[:, 0] < 0).all() and (policy.grad[:, 1] > 0).all()
    by_hand = -math.log(1 / (1 + math.exp(-0.1 * ((-2 - -3) - (-5 - -2)))))
    assert abs(T.dpo_loss(torch.tensor([[-2.0, -5.0]]), torch.tensor([[-3.0, -2.0]]), 0.1)[0].item() - by_hand) < 1e-6


def test_negatives_are_unlike_the_word():
    rng = np.random.default_rng(0)
    similarity, allowed = np.linspace(-1, 1, 9)[None].repeat(9, 0), np.arange(1, 9)
    similarity[0, 8] = np.inf  # a synonym
    drawn = np.concatenate([T.sample_negatives(rng, np.zeros(50, int), similarity, allowed, 0.5, 0.2) for _ in range(40)])
    counts = np.bincount(drawn, minlength=9)
    assert counts[0] == 0 and counts[5:].sum() == 0 and (np.diff(counts[1:5]) < 0).all()  # below the median, the less like the likelier
    assert np.isclose(counts[1] / counts[2], math.exp(0.25 / 0.2), rtol=0.25)
    assert 8 not in T.sample_negatives(rng, np.zeros(200, int), similarity, allowed, 1.0, 5.0)  # a synonym never, whatever the quantile
    with pytest.raises(ValueError, match="no synonyms of each other"):
        T.sample_negatives(rng, np.zeros(2, int), similarity, np.array([0, 8]), 0.5, 0.2)


@pytest.mark.parametrize("train", ["encoder", "encoder+expert", "all", "lm_last_k"])
def test_only_what_is_named_learns(given, train):
    config, run, trials, sets, _, model, text, space = everything(given, train=train, k=1, synonyms=True, trials_per_step=16, max_iters=2)
    before = {k: v.clone() for k, v in model.named_parameters()}
    T.fit(run, model, text, trials, sets["train"], config, 2, space, alone=True)
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    allowed = {"encoder": ("encoder.", "bon", "eon"), "encoder+expert": ("encoder.", "bon", "eon", "experts."), "all": ("",),
               "lm_last_k": ("encoder.", "bon", "eon", "experts.", "lm.transformer.h.1.", "lm.transformer.ln_f")}[train]
    assert moved == {k for k, v in model.named_parameters() if v.requires_grad} and all(k.startswith(allowed) for k in moved)
    assert all(any(k.startswith(a) for k in moved) for a in allowed)


def test_bfloat16_follows_float32(given):
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        config, run, trials, sets, _, model, text, space = everything(given, dropout=0.0, learning_rate=3e-3, expert_lr=1e-2, eval_interval=20)
        run.autocast = partial(torch.autocast, "cpu", dtype, enabled=dtype is torch.bfloat16)
        words = sorted(set(trials.table.word.iloc[sets["train"]]))
        validate, losses = partial(T.validate, run, model, text, trials, sets["val"], config, words), []
        T.fit(run, model, text, trials, sets["train"], config, 60, space, alone=True, at=lambda step, v=validate, to=losses: to.append(v()["val_rank_loss"]))
        curves.append(losses)
    assert np.allclose(*curves, rtol=0.03) and curves[0][-1] < curves[0][0] - 0.15


def test_float16_scales_and_skips_what_overflows(given):
    config, run, trials, sets, _, model, text, space = everything(given, dropout=0.0, learning_rate=3e-3, expert_lr=1e-2)
    run.autocast, run.scaler = partial(torch.autocast, "cpu", torch.float16), torch.amp.GradScaler("cpu", init_scale=2.0 ** 40, growth_interval=1000)
    steps, real = [], torch.optim.AdamW.step
    words, before = sorted(set(trials.table.word.iloc[sets["train"]])), {k: v.clone() for k, v in model.named_parameters()}
    first = T.validate(run, model, text, trials, sets["val"], config, words)
    try:
        torch.optim.AdamW.step = lambda self, *args, **kw: (steps.append(1), real(self, *args, **kw))[1]
        T.fit(run, model, text, trials, sets["train"], config, 60, space, alone=True)
    finally:
        torch.optim.AdamW.step = real
    assert 0 < 60 - len(steps) == math.log2(2.0 ** 40 / run.scaler.get_scale()) < 40  # each overflow halves the scale and costs a step
    assert all(v.isfinite().all() for v in model.parameters()) and all(torch.equal(v, before[k]) for k, v in model.named_parameters() if not v.requires_grad)
    assert T.validate(run, model, text, trials, sets["val"], config, words)["val_rank_loss"] < first["val_rank_loss"] - 0.05


# ---- what counts as right

PAIRS = [("dog", "dog", True), ("Dog", "dog", True), ("a dog", "dog", True), ("The dogs", "dog", True), ("dog.", "dog", True), ("hot dog", "dog", True),
         ("dogma", "dog", False), ("elephant", "ant", False), ("ants", "ant", True), ("plants", "ant", False), ("cat", "dog", False), ("", "dog", False),
         ("balance beam", "balance_beam", True), ("balance-beam", "balance beam", True), ("beam", "balance_beam", False), ("calf", "calf1", True),
         ("calves", "calf", True), ("knives", "knife", True), ("children", "child", True), ("mice", "mouse", True), ("berries", "berry", True),
         ("boxes", "box", True), ("dishes", "dish", True), ("glass", "glass", True), ("glasses", "glasses", True), ("bus", "bus", True), ("buses", "bus", True),
         ("lens", "lens", True), ("tie", "tie", True), ("ties", "tie", True), ("gas", "gas", True), ("cactus", "cactus", True), ("cacti", "cactus", True),
         ("DOG\nand a cat", "dog", True), ("cat\ndog", "dog", False), ("an apple", "apple", True), ("an", "an", True), ("the", "dog", False),
         ("octopus", "octopus", True), ("indices", "index", True), ("classes", "class", True), ("ﬁle", "file", True), ("dog's", "dog", True), ("potatoes",
         "potato", True), ("axis", "axis", True), ("heroes of a dog", "dog", True), ("brownies", "brownie", True), ("movies", "movie", True),
         ("7", "7", True)]


@pytest.mark.parametrize("answer, word, right", PAIRS, ids=str)
def test_flexible_accuracy(answer, word, right):
    assert T.flexible(answer, word) == right
    assert not T.naive(answer, word) or right  # exact is never more than flexible


def test_synonyms_count_and_naive_is_the_very_text():
    assert T.flexible("a vessel", "container", ["vessel", "box"]) and not T.flexible("vessels", "container") and T.flexible("boxes", "container", ["box"])
    assert T.naive(" dog ", "dog") and not T.naive("Dog", "dog")
    assert T.naive("balance beam", "balance_beam")  # as the model was taught to spell it


def test_word_space():
    torch.manual_seed(0)
    wte = torch.randn(100, 12) + 3 * torch.randn(12)
    wte[1] = wte[2] + 0.3 * torch.randn(12)
    space = T.WordSpace(wte)
    names = space.names([[1], [2], [3], [1, 2]])
    assert torch.allclose(names.norm(dim=1), torch.ones(4)) and names[0] @ names[1] > 0.8 > names[0] @ names[2] and names[3] @ names[0] > 0.8
    cosine = space.names([[i] for i in range(100)])
    cosine = cosine @ cosine.t()
    assert abs((cosine.sum() - 100) / 9900) < 0.05  # pairs at random are unlike; raw, they all lean to one side
    assert (F.normalize(wte, dim=1) @ F.normalize(wte, dim=1).t()).mean() > 0.5
    torch.manual_seed(1)
    assert torch.equal(T.WordSpace(wte).names([[1], [2], [3], [1, 2]]), names) and torch.equal(T.WordSpace(wte).axes, space.axes)  # whatever was drawn before
    wte[1] += 1
    assert torch.equal(space.names([[1], [2], [3], [1, 2]]), names)  # a fixed measure of an embedding that learns


def test_scores():
    scores = np.array([[3.0, 1, 2], [1, 1, 1], [5, 5, 0]])
    assert np.allclose(T.top_k(scores, 1), [[1, 0, 0], [1 / 3] * 3, [.5, .5, 0]]) and np.allclose(T.top_k(scores, 2), [[1, 0, 1], [2 / 3] * 3, [1, 1, 0]])
    assert np.allclose(T.place(scores), [[0, 1, .5], [.5] * 3, [.25, .25, 1]])  # who says nothing gets what chance gets
    mean, low, high = T.over_objects(np.array([1.0] * 10 + [0.0] * 10), np.repeat([0, 1], 10), 200, 0)
    assert (mean, low, high) == (0.5, 0.0, 1.0)  # two objects, not twenty trials
    right = np.eye(6)
    each, p = T.permuted(right, np.array([0, 0, 0, 1, 1, 1]), 300, 0)
    assert np.allclose(each, 1 / 3) and p < 0.1  # 1 of 36 orders
    each, p = T.permuted(np.kron(np.eye(2), np.ones((3, 3))), np.array([0, 0, 0, 1, 1, 1]), 20, 0)
    assert np.allclose(each, 1) and p == 1  # what a block gives away is no knowledge


# ---- whole runs

@pytest.fixture(scope="module")
def whole(given):
    out = given / "run"
    T.main(a_config(given, out_dir=str(out), max_iters=180, eval_interval=90, learning_rate=3e-3, expert_lr=1e-2))
    return out


def test_it_reads_what_is_there(given, whole):
    table = pd.read_csv(whole / "results.csv")
    main = table[(table.metric == "top1") & (table.control == "eeg")].set_index("set")
    shuffled = table[(table.metric == "top1") & (table.control == "shuffled")].set_index("set")
    assert set(main.index) == set(T.SETS) and main.score["trial"] > 3 * main.chance["trial"] and main.low["trial"] > shuffled.high["trial"]
    assert set(table.control) == {"eeg", "shuffled", "empty", "majority"} and table.data.str.contains("synthetic").all()
    exact, flexible = (table[(table.metric == f"{m} accuracy") & (table.control == "eeg")].set_index("set").score for m in ("naive", "flexible"))
    assert (exact <= flexible).all() and {"similarity", "similarity rank", "top5", "top1 by likelihood", "top1 by pmi per token"} <= set(table.metric)
    for name in ("results", "curves", "prefix_way", "query_key", "logit_lens"):
        assert (whole / f"{name}.png").exists()
    way = pd.read_csv(whole / "trajectory.csv")
    assert set(way.step) == {0, 90, 180} and way[(way.token == 0) & (way.step == 180)].distance.mean() < way[(way.token == 0) & (way.step == 0)].distance.mean()
    lens = pd.read_csv(whole / "logit_lens.csv")
    assert lens[(lens.layer == 0) & (lens.token == 0)].place.iloc[0] < lens.null_low.min() and (lens.low <= lens.place).all() and (lens.n == 40).all()
    likeness = pd.read_csv(whole / "query_key.csv")
    assert (likeness.p_corrected >= likeness.p).all() and (likeness.n == 40).all()
    assert all(pd.read_csv(whole / f"{name}.csv").data.str.contains("synthetic").all() for name in ("samples", "trajectory", "query_key", "logit_lens"))
    rows = table.set_index(["set", "metric", "control"])
    assert rows.score["object", "top5", "majority"] == 0 and rows.score["trial", "similarity rank", "eeg"] < rows.low["trial", "similarity rank", "shuffled"]
    assert json.loads((whole / "splits.json").read_text())["hash"]


def test_preferences_after_supervision(given, whole):
    out = given / "dpo"
    T.main(a_config(given, out_dir=str(out), stage="dpo", init_from=str(whole), max_iters=20, learning_rate=1e-3, batch_size=16, log_interval=1))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in log if "train_loss" in line]
    assert abs(losses[0] - math.log(2)) < 1e-5 and losses[-1] < losses[0] and any(line.get("train_margin", 0) > 0 for line in log)


def test_another_split_is_refused(given, whole):
    with pytest.raises(ValueError, match="trained on another split"):  # it knows words and people that this one holds out
        T.main(a_config(given, out_dir=str(given / "leak"), stage="dpo", init_from=str(whole), split_seed=1))


def test_resume_is_exact_where_everything_learns(given, monkeypatch):
    monkeypatch.setattr(T, "report", lambda *args: None)
    options = dict(train="all", fusion="prefix", core_lr=1e-2, max_iters=4, save_interval=2, eval_interval=4, eval_trials=6)
    go, step = T.Loader.next, iter(range(100))
    T.main(a_config(given, out_dir=str(given / "all"), **options))
    monkeypatch.setattr(T.Loader, "next", lambda self: go(self) if next(step) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        T.main(a_config(given, out_dir=str(given / "half"), **options))
    monkeypatch.setattr(T.Loader, "next", go)
    (given / "half" / ".lock").unlink()
    torch.randn(5)
    T.main(a_config(given, out_dir=str(given / "half"), init_from="resume", **options))
    whole, half = (load_checkpoint(given / name / "ckpt.pt") for name in ("all", "half"))
    assert all(torch.equal(v, half["model"][k]) for k, v in whole["model"].items()) and torch.equal(whole["wte"], half["wte"])
    preferences = dict(out_dir=str(given / "dpo_prefix"), stage="dpo", max_iters=1, eval_trials=6)  # its shape is its parent's, and so it is resumed
    T.main(a_config(given, init_from=str(given / "all"), **preferences))
    T.main(a_config(given, init_from="resume", **preferences))
    with pytest.raises(ValueError, match="trained with train=all, the options say encoder"):
        T.main(a_config(given, init_from="resume", **{**options, "train": "encoder", "out_dir": str(given / "all")}))


def test_pretrained_encoder(given, whole, capsys):
    T.main(a_config(given, out_dir=str(given / "pre"), encoder="pretrained", checkpoint=str(whole), max_iters=1))
    assert "100.0% of the encoder's weights are pretrained" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no encoder"):
        T.main(a_config(given, out_dir=str(given / "pre2"), encoder="pretrained", checkpoint=str(given / "lm.pt")))


def test_an_encoder_of_40_electrodes_loads_for_63(given, tmp_path, capsys):
    def nameless(_, made):
        made["channels"].loc[[3, 7], ["x", "y", "z"]] = np.nan  # nobody says where, but pretraining knows E3 and E7
    make_eeg(tmp_path / "eeg", channels=63, changes=nameless, words=8, images=4)
    shape = EncoderConfig(kind="transformer", tokens="electrode", n_embd=24, width=16, n_layer=1, n_head=2, patch=5, subjects=7)
    theirs, place = NeuralEncoder(shape), np.random.default_rng(1).normal(size=(40, 3)) * 0.05
    recipe = dict(sfreq=25.0, window=0.4, patch=5, bands=[], clamp=8.0, grid="", subjects=["x"], recordings=[dict(
        dataset="elsewhere", name="x", subject="x", channels=[f"E{i}" for i in range(40)], xyz=place.tolist(), seen=[0.0, 1.0])])
    checkpoint = dict(kind="foundation", encoder_args=asdict(shape), recording=recipe, model={f"encoder.{k}": v for k, v in theirs.state_dict().items()})
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    config = a_config(given, dataset=str(tmp_path / "eeg"), encoder=f"pretrained:{tmp_path}", max_iters=1, out_dir=str(tmp_path / "run"), whole=False)
    config.check()
    T.main(config)
    said = capsys.readouterr().out
    assert "40 known by name, 23 by position only, 0 without a place" in said and "25 Hz, these are 50 Hz" in said
    assert "new: net.output.bias, net.output.weight, net.subject_token" in said  # of another width, for other people
    trials = T.prepare(config, config.dataset)[0]
    assert np.allclose(trials.xyz[0, [3, 7]], place[[3, 7]], atol=1e-6) and np.isfinite(trials.xyz).all()
    model = T.build(config, trials, Here(config))[0]
    assert torch.equal(model.encoder.blocks[0].mlp.c_fc.weight, theirs.blocks[0].mlp.c_fc.weight)
    share = sum(v.numel() for k, v in model.encoder.state_dict().items() if not k.startswith(("net.output", "net.subject"))) / sum(
        v.numel() for v in model.encoder.state_dict().values())
    assert f"{share:.1%} of the encoder's weights" in said
    save_checkpoint(tmp_path / "bands.pt", {**checkpoint, "recording": {**recipe, "bands": [[4, 8], [8, 12]]}})
    with pytest.raises(ValueError, match="2 bands side by side"):
        T.Trials(tmp_path / "eeg", replace(config, encoder=f"pretrained:{tmp_path / 'bands.pt'}"))


@pytest.mark.parametrize("analysis", list(T.ANALYSES))
def test_analyses(given, tmp_path, analysis):
    options = dict(analysis=analysis, analysis_iters=2, eval_trials=12, shuffles=10, out_dir=str(tmp_path))
    T.main(a_config(given, **options))
    table = pd.read_csv(tmp_path / "results.csv")
    assert (tmp_path / f"{analysis}.png").exists() and len(table) > 3 and table[["score", "chance", "low", "high", "n"]].notna().all().all()
    T.main(a_config(given, **options))  # all rows are there: nothing is done again
    assert len((tmp_path / "results.part-0.jsonl").read_text().splitlines()) == len(table)


def test_a_job_that_was_cut_short_is_done_again(given, tmp_path, monkeypatch):
    options, made = dict(analysis="generalise", analysis_iters=1, eval_trials=6, shuffles=5, out_dir=str(tmp_path)), []
    real = T.Bench.top1

    def top1(self, name, **keys):
        made.append(name)
        return real(self, name, **keys) if len(made) != 2 else 1 / 0

    monkeypatch.setattr(T.Bench, "top1", top1)
    monkeypatch.setattr(T.Bench, "fit", lambda self, ids: None)
    with pytest.raises(ZeroDivisionError):
        T.main(a_config(given, **options))
    (tmp_path / ".lock").unlink()
    T.main(a_config(given, **options))
    table = pd.read_csv(tmp_path / "results.csv")
    assert (table.groupby("trained").size() == 2).all() and len(made) == len(table) + 2


def test_silenced_samples_are_those_named(given, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(T.Bench, "fit", lambda self: None)
    monkeypatch.setattr(T.Bench, "top1", lambda self, name, occlude=None, **keys: seen.append((self, occlude, keys)) or dict(
        score=0.0, chance=0.1, low=0.0, high=0.1, n=1, shuffled=0.1, data="x", **keys))
    T.main(a_config(given, analysis="window", widen=0.1, out_dir=str(tmp_path)))
    assert {keys["kind"] for _, _, keys in seen} == {"window", "growing", "occluded"}
    for bench, occlude, keys in seen:
        if keys["kind"] == "occluded":
            assert np.allclose(bench.trials.offsets[occlude] / 50, np.arange(keys["start"], keys["end"] - 1e-6, 0.02))
        else:
            assert np.allclose(bench.trials.offsets[[0, -1]] / 50, [keys["start"], keys["end"] - 0.02])  # before the picture is before the picture


def test_jobs_of_a_sweep_wait_for_nobody(given):
    config = a_config(given, analysis_iters=1)
    run = Here(config)  # ranks have different numbers of jobs: a barrier in one (Run.dataset, there is none here) would be met by no other's
    bench = T.Bench(run, config)
    bench.fit()
    assert bench.top1("trial")["n"] > 0


def test_many_names_fit_beside_gated_attention(given):
    _, run, trials, sets, _, model, text, _ = everything(given, fusion="cross")
    scores, empty = T.rank(run, model, text, trials, sets["val"][:2], trials.words * 4)  # more than the block holds
    assert scores.shape == (2, 48) and np.allclose(scores[:, :12], scores[:, 36:], atol=1e-4)


# ---- bad input

@pytest.mark.parametrize("options, words", [
    (dict(width=100), "multiple of 32"), (dict(augment=dict(pink="x")), "augment.pink"), (dict(jitter=-0.1), "jitter"), (dict(num_workers=-1), "num_workers"),
    (dict(temperature=0.0), "temperature"), (dict(held_out_objects=2.0), "held_out_objects"), (dict(encoder="conv", tokens="electrode"), "encoder=transformer"),
    (dict(fusion="cross", train="encoder"), "never reads EEG"), (dict(fusion="cross", text_positions="after_prefix"), "before the text"),
    (dict(analysis="window", stage="dpo", init_from="x"), "leave out stage="), (dict(analysis="frozen", held_out_objects=0.0), "never trained on")], ids=str)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(ValueError, match=words):
        check(T.Config(**options))


def broken(tmp_path, changes, **options):
    make_eeg(tmp_path / "eeg", changes=lambda name, given: changes(given) if name == "sub-02" else None)
    return T.Trials(tmp_path / "eeg", T.Config(**{**dict(t_end=0.4), **options}))


def no_place(given):
    given["channels"].loc[2, ["x", "y", "z"]] = np.nan


def no_word(given):
    given["events"]["word"] = ""


def with_nan(given):
    given["signal"][100, 3] = np.nan


def flat(given):
    given["signal"][:, 3] = 1e-6


@pytest.mark.parametrize("changes, words", [(no_place, "channel E2 .* has no position"), (no_word, "subject 02 has no events with a word"),
                                            (with_nan, "channel E3 holds nan"), (flat, "channel E3 is flat")])
def test_eeg_that_cannot_be_used(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        broken(tmp_path, changes)


@pytest.mark.parametrize("changes", [with_nan, flat])
def test_bad_channels_may_be_dropped(tmp_path, changes):
    trials = broken(tmp_path, changes, bad_channels="drop")
    assert np.isnan(trials.xyz[1, 3]).all() and np.isfinite(np.delete(trials.xyz[1], 3, 0)).all()
    config = trials.config
    sets, _ = T.split(trials, config)
    trials.learn(sets["train"])
    x, xyz, _ = trials.batch(np.flatnonzero(trials.recording == 1)[:4])
    assert x.isfinite().all() and (x[:, 3] == 0).all() and xyz[:, 3].isnan().all()


def test_windows_outside(tmp_path):
    make_eeg(tmp_path / "eeg")
    with pytest.raises(ValueError, match="lies outside the recording"):
        T.Trials(tmp_path / "eeg", T.Config(t_start=1000.0, t_end=1001.0))
    with pytest.raises(ValueError, match="has no sample at 50 Hz"):
        T.Trials(tmp_path / "eeg", T.Config(t_end=0.004))
    assert T.Trials(tmp_path / "eeg", T.Config(t_end=4.0)).outside > 0  # some do: they are counted and left out
    make_eeg(tmp_path / "epochs", changes=lambda name, given: given.update(epoch_tmin=-0.1, epoch_samples=30))
    assert T.Trials(tmp_path / "epochs", T.Config(t_end=0.5, jitter=0.0)).outside == 0
    with pytest.raises(ValueError, match="holds epochs of -0.1 to 0.5 s"):
        T.Trials(tmp_path / "epochs", T.Config(t_end=0.52, jitter=0.0))
    with pytest.raises(ValueError, match="is empty"):
        T.Config(t_start=0.5, t_end=0.2).check()


def test_names_and_tokenizers(given, tmp_path, whole):
    config, run, trials, sets, manifest, model, text, _ = everything(given)
    trials.words = ["", *trials.words]
    with pytest.raises(ValueError, match="object name '' has no tokens"):
        T.Text(text.tokenizer, trials, set(), config)
    with pytest.raises(ValueError, match="does not know"):
        T.Text(Tokenizer(character_state("abc T h e<|endoftext|>")), T.Trials(given / "eeg", config), set(), replace(config, prompt="The", stop="a"))
    with pytest.raises(ValueError, match="one or more, and one, are needed"):
        T.Text(text.tokenizer, T.Trials(given / "eeg", config), set(), replace(config, stop="ab"))
    other = character_state("".join(map(chr, range(32, 127))))
    save_checkpoint(tmp_path / "other.pt", dict(**lm_state(tiny_lm()), tokenizer=other))
    with pytest.raises(ValueError, match="another tokenizer than lm="):
        T.main(a_config(given, lm=str(tmp_path / "other.pt"), init_from=str(whole), out_dir=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="no run of telepath.py"):
        T.main(a_config(given, init_from=str(given / "lm.pt"), out_dir=str(tmp_path / "out2")))


def test_half_precision_run_on_cpu(given, tmp_path):
    T.main(a_config(given, out_dir=str(tmp_path), dtype="bfloat16", max_iters=2, eval_interval=2, fusion="cross"))
    assert pd.read_csv(tmp_path / "results.csv").score.notna().all() and not (tmp_path / "query_key.png").exists()
