"""telepath.py: splits that do not leak, augmentations, losses and scores, what learns."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import byte_tokenizer, make_eeg, save_encoder
from torch.nn import functional as F

import telepath as T
from configurator import check
from data import InputError
from data.tokens import state_of
from model import GPT, GPTConfig, lm_state, save_checkpoint
from telepath import load_checkpoint

FAST = {"device": "cpu", "dtype": "float32", "t_end": 0.4, "baseline": 0.0, "jitter": 0.0}
FAST |= {"patch": 5, "width": 16, "encoder_layers": 1, "batch_size": 8, "warmup_iters": 5}
FAST |= {"max_iters": 40, "eval_interval": 20, "log_interval": 10, "save_interval": 20}
FAST |= {"shuffles": 40, "eval_trials": 60, "max_new_tokens": 3, "num_workers": 0}


def tiny_lm():
    torch.manual_seed(0)
    shape = {"block_size": 64, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 32}
    lm = GPT(GPTConfig(**shape, bias=False), seed=3)
    with torch.no_grad():  # an untrained one whose every token and layer matters
        for name, p in lm.named_parameters():
            if "wte" in name or p.dim() == 2:
                p.mul_(10 if "wte" in name else 5)
    return lm


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("telepath")
    make_eeg(folder / "eeg")
    tokenizer = state_of(byte_tokenizer())
    save_checkpoint(folder / "lm.pt", {**lm_state(tiny_lm()), "tokenizer": tokenizer})
    return folder


def a_config(given, **options):
    files = {"dataset": str(given / "eeg"), "lm": str(given / "lm.pt")}
    config = T.Config(**{**FAST, **files, **options})
    config.given = set(options)  # the others are as if they stood in no file and no command
    return config


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """One run draws its figure, `whole`, which is there before this."""
    monkeypatch.setattr(T, "plot_results", lambda *args: None)


class Here:
    """A Run without a folder."""

    rank, world, master, stopped = 0, 1, False, 0
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, config):
        self.config, self.seed = config, config.seed
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.autocast = nullcontext
        self.print = self.save = self.save_config = lambda *args: None

    def log(self, step, **numbers):
        self.logged = numbers

    def reduce(self, value, op="sum"):
        return value


def prepared(given, **options):
    """config, run and experiment of a run that has not begun."""
    config = a_config(given, **options)
    run = Here(config)
    return config, run, T.Experiment(run, config, config.dataset)


def trained(run, config, experiment, n_steps):
    """Gradient norms of a few steps, and the Training."""
    training = T.Training(run, config, experiment, experiment.sets["train"])
    norms = []
    for _ in range(n_steps):
        for batch in training.batches():
            training.backward(T.supervised_loss(run, config, experiment, batch)["loss"])
        norms.append(training.update())
    return norms, training


def trials_of(folder, change=None, config=T.Config(t_end=0.4), **options):  # noqa: B008
    make_eeg(folder / "eeg", changes=change, **options)
    return T.Trials(folder / "eeg", config)


# ---- splits


@pytest.mark.parametrize("grouped", [True, False])
def test_splits_share_nothing(tmp_path, grouped):
    config = T.Config(t_end=0.9, jitter=0.02)
    shape = {"subjects": 4, "images": 8, "repeats": 3, "grouped": grouped}
    trials = trials_of(tmp_path, None, config, **shape)
    sets, manifest = T.split(trials, config)
    words, people, images, samples = {}, {}, {}, {}
    reach = np.arange(trials.reach[0], trials.reach[1] + 1)
    for name in ("train", "val", *T.SETS):
        table = trials.table.iloc[sets[name]]
        assert len(table)
        words[name], people[name] = set(table.word), set(table.subject)
        images[name] = set(table.image)
        samples[name] = set()
        for recording, row in zip(table.recording, table.row):
            samples[name] |= {(recording, at) for at in row + reach}
    assert not words["train"] & (words["object"] | words["subject_object"])
    assert words["trial"] | words["val"] <= words["train"]
    assert not people["train"] & (people["subject"] | people["subject_object"])
    assert people["trial"] | people["object"] <= people["train"]
    sides = [("train", name) for name in ("val", *T.SETS)] + [("val", name) for name in T.SETS]
    for a, b in sides:
        assert not images[a] & images[b]  # all repeats of a picture are on one side
        assert not samples[a] & samples[b]  # and no raw sample is on two
    assert T.split(trials, config)[1] == manifest == json.loads(json.dumps(manifest))
    assert T.split(trials, replace(config, split_seed=1))[1]["hash"] != manifest["hash"]


def test_a_word_is_held_out_in_all_spellings(tmp_path):
    spellings = {"01": str, "02": str.capitalize, "03": lambda word: word + "s"}

    def change(name, given):
        words = given["events"]["word"].str[0] + "oom"
        given["events"]["word"] = words.map(spellings[name[-2:]])

    trials = trials_of(tmp_path, change)
    assert len(trials.words) == 12
    for seed in range(3):
        config = T.Config(t_end=0.4, held_out_subjects=0.0, split_seed=seed)
        sets, manifest = T.split(trials, config)
        objects = trials.table.object.to_numpy()
        held = set(objects[sets["object"]])
        assert len(held) == len(manifest["held_out_words"]) == 2
        assert not held & set(objects[sets["train"]])


def test_words_stay_as_they_are_typed_and_a_minute_is_a_block(tmp_path):
    codes = [f"{i:03d}" for i in range(9)] + ["NA", "null", "1e5"]

    def change(name, given):
        numbers = given["events"]["word"].str[0].map(ord) - ord("a")
        given["events"] = given["events"].assign(word=np.array(codes)[numbers], block="")

    trials = trials_of(tmp_path, change, subjects=1)
    assert trials.words == sorted(codes)
    assert (trials.table.groupby("recording").block.nunique() > 1).all()


def test_what_counts_as_seen_was_in_training(tmp_path):
    def rare(name, given):  # most words have pictures in one part only
        events = given["events"]
        for column in ("word", "image", "object"):
            events[column] = events["word"] + events["block"].mod(6).map(dict(enumerate("abcdef")))
        if name == "sub-04":  # all blocks of one person may be held out
            given["events"] = events[events.block == 0]

    trials = trials_of(tmp_path, rare, subjects=4)
    for seed in range(4):
        try:
            sets, _ = T.split(trials, T.Config(t_end=0.4, jitter=0.0, split_seed=seed))
        except InputError as error:
            assert "leaves no" in str(error)
            continue
        seen = {name: trials.table.iloc[ids] for name, ids in sets.items()}
        for name in ("val", "trial", "subject"):
            assert set(seen[name].word) <= set(seen["train"].word)
        for name in ("val", "trial", "object"):
            assert set(seen[name].subject) <= set(seen["train"].subject)


def test_trials_change_places_where_there_are_others():
    blocks = ["a"] * 20 + list("bbbccdefgh") + list("abcdefghijkl") + list("abc")
    table = pd.DataFrame({"recording": [0] * 30 + [1] * 12 + [2] * 3, "block": blocks})
    assert T.strata(table).tolist() == ["0/a"] * 20 + ["0"] * 10 + ["1"] * 12 + ["all"] * 3


# ---- windows


def test_windows_are_those_of_the_signal(given):
    trials = T.Trials(given / "eeg", a_config(given, t_start=0.06, t_end=0.34, baseline=0.1))
    x = trials.cut(np.array([5, 40]), np.array([0, 3]))
    assert x.shape == (2, 8, 14)  # 50 Hz
    for i, (trial, late) in enumerate([(5, 0), (40, 3)]):
        signal = np.asarray(trials.recordings[trials.recording[trial]].signal)
        row = trials.row[trial] + late
        expected = signal[row + 3 : row + 17] - signal[row - 5 : row].mean(0)
        assert np.allclose(x[i], expected.T, atol=1e-10)


def test_noise_is_learned_from_training_alone_and_dead_channels_are_left_out(tmp_path):
    def dead(name, given):
        given["signal"][100, 3] = np.nan
        given["signal"][:, 5] = 1e-6

    config = T.Config(t_end=0.4, jitter=0.0, baseline=0.0)
    trials = trials_of(tmp_path, dead, config)
    assert trials.notes[0] == "sub-01: E3, E5 flat or with nan, left out"
    sets, manifest = T.split(trials, config)
    trials.learn(sets["train"], manifest["held_out_subjects"])
    x, xyz, subject = trials.batch(sets["train"])
    assert x.isfinite().all() and (x[:, [3, 5]] == 0).all() and xyz[:, [3, 5]].isnan().all()
    x = (x - x.mean(0))[:, [0, 1, 2, 4, 6, 7]].transpose(1, 2).flatten(0, 1).numpy()
    assert np.abs(np.cov(x.T) - np.eye(6)).max() < 0.25  # white
    assert set(subject.tolist()) == {0, 1}
    assert set(trials.batch(sets["subject"])[2].tolist()) == {-1}
    loud = np.concatenate([sets[name] for name in T.SETS])
    rows = trials.row[loud, None] + trials.offsets
    white = trials.white.copy()
    for number, rec in enumerate(trials.recordings):
        rec.signal = np.array(rec.signal)
        rec.signal[rows[trials.recording[loud] == number]] *= 50
    trials.learn(sets["train"], ())
    assert np.array_equal(trials.white, white)


def test_people_with_other_channels(tmp_path):
    def fewer(name, given):
        if name == "sub-01":
            given.update(signal=given["signal"][:, 2:5], channels=given["channels"][2:5])

    config = T.Config(t_end=0.4, jitter=0.0, baseline=0.0, held_out_subjects=0.0)
    trials = trials_of(tmp_path, fewer, config)
    trials.learn(np.flatnonzero(trials.recording == 1)[:40], ())  # the others take its noise
    names = list(dict.fromkeys(trials.recordings[0].names + trials.recordings[1].names))
    order = [names.index(name) for name in trials.recordings[1].names]
    assert np.array_equal(trials.white[1], trials.white[2])
    assert (trials.white[0][3:] == 0).all() and trials.white[0][:3, :3].diagonal().all()
    rest = trials.xyz[1][order]
    assert np.allclose(rest, trials.recordings[1].xyz) and np.isnan(trials.xyz[0][3:]).all()


def no_place(name, given):
    if name == "sub-02":
        given["channels"].loc[2, ["x", "y", "z"]] = np.nan


def no_word(name, given):
    if name == "sub-02":
        given["events"]["word"] = ""


def one_picture(name, given):
    given["events"]["image"] = given["events"]["object"]


def epochs(name, given):
    given.update(epoch_tmin=-0.1, epoch_samples=30)


UNUSABLE = [
    (no_place, {}, "channel E2 has no position"),
    (no_word, {}, "subject 02 has no events with a word"),
    (one_picture, {}, "every word has only one picture"),
    (None, {"t_end": 0.004}, "no sample at 50 Hz"),
    (epochs, {"t_end": 0.52, "jitter": 0.0}, "lies inside the recording or epoch"),
]


def test_eeg_that_cannot_be_used_and_trials_at_the_edge(tmp_path):
    for i, (change, options, words) in enumerate(UNUSABLE):
        config = T.Config(**{"t_end": 0.4, **options})
        with pytest.raises(InputError, match=words):
            T.split(trials_of(tmp_path / str(i), change, config, words=4, images=4), config)
    few = {"subjects": 1, "words": 4, "images": 2}
    edge = trials_of(tmp_path / "edge", None, T.Config(t_end=4.0), **few)
    assert "trials outside" in edge.notes[0]

    def bad(name, given):  # from half a second after the third picture on, in the window's reach
        given.update(bad_spans=[[3.5, 3.6]], first_sample=0)

    clear = trials_of(tmp_path / "bad", bad, T.Config(t_end=0.6, jitter=0.0, baseline=0.0), **few)
    onsets = clear.table.onset.to_numpy()
    assert "2 trials outside or BAD" in clear.notes[0] and onsets[:3].tolist() == [2.0, 2.5, 5.0]
    fits = T.Config(t_end=0.5, jitter=0.0)
    assert not trials_of(tmp_path / "epochs", epochs, fits, **few).notes


# ---- augmentation

SFREQ = 250.0
XYZ = np.random.default_rng(0).normal(size=(32, 3))
XYZ = 0.1 * XYZ / np.linalg.norm(XYZ, axis=1, keepdims=True)
XYZ[:, 2] = np.abs(XYZ[:, 2])


def noise(function, sfreq=SFREQ):
    """What an augmentation adds to silent windows of 4 s: (40, 32, T)."""
    rng = np.random.default_rng(1)
    x = np.zeros((40, 32, int(4 * sfreq)))
    return np.stack([function(window, rng, np.full(32, 1e-5), XYZ, sfreq) for window in x])


def power(x):
    spectrum = np.fft.rfft(x * np.hanning(x.shape[2]))
    return np.fft.rfftfreq(x.shape[2], 1 / SFREQ), np.square(np.abs(spectrum)).mean((0, 1))


def test_noise_has_its_spectrum():
    out = noise(T.pink)
    f, p = power(out)
    band = (f > 1) & (f < 80)
    assert abs(np.polyfit(np.log(f[band]), np.log(p[band]), 1)[0] + 1) < 0.15  # 1 / f
    assert np.allclose(out.std(2), 1e-5, rtol=0.01)
    r = np.mean([np.corrcoef(o) for o in out], axis=0)
    distance = np.linalg.norm(XYZ[:, None] - XYZ, axis=-1)
    near = (distance > 0) & (distance < 0.04)
    assert r[near].mean() > 0.5 > 0.3 > abs(r[distance > 0.15].mean())  # shared by neighbours
    bands = {T.blink: (0, 6, 0.95), T.muscle: (19, 101, 0.9), T.drift: (0, 2, 0.9)}
    for function, (low, high, share) in bands.items():
        f, p = power(noise(function))
        assert p[(f >= low) & (f < high)].sum() > share * p.sum(), function
    f, p = power(noise(T.line))
    for peak in (50, 60):
        assert p[np.abs(f - peak) < 1].max() > 100 * np.median(p)
    assert (noise(T.line, sfreq=80.0) == 0).all()  # above the Nyquist frequency


def test_noise_is_in_its_places():
    size = np.abs(noise(T.blink)).max(2).mean(0)
    assert size[XYZ[:, 1] > 0.06].mean() > 10 * size[XYZ[:, 1] < -0.03].mean()
    assert 3e-5 < size.max() < 2e-4
    rms = np.sqrt(np.square(noise(T.muscle)).mean((0, 2)))
    edge = (np.abs(XYZ[:, 0]) > 0.06) & (XYZ[:, 2] < 0.05)
    assert rms[edge].mean() > 3 * rms[XYZ[:, 2] > 0.09].mean()
    jumped = np.abs(noise(T.pop)).max(2) > 0
    assert (jumped.sum(1) == 1).all() and len(set(jumped.argmax(1))) > 10
    rng = np.random.default_rng(2)
    y = rng.normal(size=(32, 100))
    moved = y - T.reference(y, rng, None, XYZ, SFREQ)
    assert np.allclose(moved, moved[:1]) and np.abs(moved).max() > 0.1  # alike everywhere
    ratios = [T.gain(y, rng, None, XYZ, SFREQ) / y for _ in range(60)]
    assert np.allclose(ratios[0], ratios[0][0, 0]) and np.std(ratios) > 0.1
    assert np.min(ratios) > 0.6 and np.max(ratios) < 1.65


def test_augmentations_are_of_a_share_of_trials_and_of_what_is_there():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(200, 32, 100)).astype("f4")
    xyz = np.repeat(XYZ[None].astype("f4"), 200, 0)
    xyz[:, 3], y[:, 3] = np.nan, 0
    scale = np.ones((200, 32))
    config = T.Config(augment=["drop"], augment_share=0.5)
    x, places = T.augmented(y.copy(), xyz, scale, rng, SFREQ, config)
    gone = np.isnan(places[..., 0])
    changed = gone.sum(1) > 1
    assert 0.4 < changed.mean() < 0.6 and 0.1 < gone[changed].mean() < 0.3
    assert (x[gone] == 0).all() and np.array_equal(x[~gone], y[~gone])
    config = T.Config(augment=list(T.AUGMENT), augment_share=1.0)
    x, places = T.augmented(y.copy(), xyz, scale, rng, SFREQ, config)
    assert np.isfinite(x).all() and (x[np.isnan(places[..., 0])] == 0).all()
    assert (x != y).mean() > 0.9


# ---- batches


def batches(config, experiment, n_steps=2):
    """The micro-batches of a few steps."""
    training = T.Training(Here(config), config, experiment, experiment.sets["train"])
    return [batch for _ in range(n_steps) for batch in training.batches()]


def test_any_number_of_workers_makes_the_same_batches(given):  # ranks: tests/test_scripts.py
    options = {"augment": list(T.AUGMENT), "augment_share": 0.5, "synonyms": True}
    config, _, experiment = prepared(given, jitter=0.04, trials_per_step=16, **options)
    plain = batches(config, experiment)
    assert len(plain) == 4
    for a, b in zip(plain, batches(replace(config, num_workers=4), experiment)):
        for x, y in zip([*a.inputs, a.target, a.word], [*b.inputs, b.target, b.word]):
            assert np.array_equal(x, y, equal_nan=x.is_floating_point())
    other = batches(replace(config, seed=1), experiment, 1)
    assert not torch.equal(plain[0].inputs[0], other[0].inputs[0])


def test_people_take_turns_and_see_every_trial_once_an_epoch(given):
    config, run, experiment = prepared(given)
    training = T.Training(run, config, experiment, experiment.sets["train"])
    least = min(len(ids) for ids in training.by_person)
    n_batches = 2 * least // config.batch_size
    drawn = np.concatenate([T.draw_trials(training, number) for number in range(n_batches)])
    assert len(set(np.bincount(experiment.trials.subject[drawn]))) == 1
    assert len(set(drawn)) == len(drawn)


def test_synonyms_are_other_texts_of_the_same_trials(given):
    config, _, experiment = prepared(given, synonyms=True)
    text, trials = experiment.text, experiment.trials
    last = [batch.target[:, 0, 3] for batch in batches(config, experiment, n_steps=20)]
    assert 0.4 < (torch.cat(last) == ord("x")).float().mean() < 0.6
    assert T.Text(text.tokenizer, trials, {"awx"}, config).trained["aw"] == ["aw"]
    trials.table["synonyms"] = "ax|bw|Bw|the bw|c w"
    text = T.Text(text.tokenizer, trials, {"bw"}, config)
    assert text.trained["aw"] == ["aw", "ax", "c w"]  # no held-out word in any spelling


# ---- text and losses


@pytest.mark.parametrize("fusion", ["expert", "cross"])
def test_packed_names_are_separate_passes(given, fusion):
    """Of the prompt, one name and <|endoftext|>, whose log-probability alone counts."""
    _, run, experiment = prepared(given, fusion=fusion)
    text, model, ids = experiment.text, experiment.model.eval(), experiment.sets["val"][:5]
    names = ("wa", "wbcde", "w")
    text.ids |= {name: text.tokenizer.encode(" " + name) for name in names}
    idx, position, mask, target = text.pack([names])
    n = model.prefix(*experiment.trials.batch(ids[:2]))
    head = model.lm.transformer.wte.weight
    x = model.trunk(n, idx.expand(2, -1), position, mask)[:, text.start :]
    packed = T.log_probs(F.linear(x, head), target.expand(2, -1, -1)).sum(-1)
    for k, name in enumerate(names):
        row = torch.tensor([text.prompt + text.ids[name]]).expand(2, -1)
        logits = F.linear(model.trunk(n, row), head).log_softmax(-1)[:, text.start :]
        wanted = torch.tensor([*text.ids[name], text.stop]).expand(2, -1)[..., None]
        assert torch.allclose(packed[:, k], logits.gather(2, wanted).sum((1, 2)), atol=1e-4)
    words = experiment.trials.words * 4  # more than the block holds
    scores, empty = T.score_names(run, experiment, ids, words)
    one, same_empty = T.score_names(run, experiment, ids[3:4], words[2:3])
    assert np.allclose(scores[3, 2::12], one, atol=1e-4)
    assert scores.shape == (5, 48) and np.allclose(empty[2], same_empty, atol=1e-4)


def test_preferences_grow_with_the_margin(given):
    config, run, experiment = prepared(given, stage="dpo", dropout=0.0)
    training = T.Training(run, config, experiment, experiment.sets["train"])
    batch = next(training.batches())

    def scores():
        logits, _ = experiment.model(*batch.inputs, start=experiment.text.start)
        return T.log_probs(logits, batch.target).sum(-1)

    before = scores()
    with torch.no_grad():
        experiment.model.encoder.net.output.weight.neg_()
    gained = scores() - before
    margin = 0.1 * (gained[:, 0] - gained[:, 1])
    losses = T.preference_loss(run, config, experiment, batch, training.reference)
    by_hand = (1 + (-margin).exp()).log().mean()
    assert abs(margin).max() > 1e-3 and torch.isclose(losses["loss"], by_hand, atol=1e-6)
    assert losses["preferred"] == (margin > 0).float().mean()


def test_negatives_are_unlike_the_word(given):
    experiment = prepared(given)[2]
    words = experiment.train_words
    experiment.text.synonyms[words[0]] = [words[1].upper()]
    shares = experiment.negatives
    assert np.allclose(shares.sum(1), 1) and (shares.diagonal() == 0).all()
    assert shares[0, 1] == shares[1, 0] == 0  # a synonym
    similarity = (experiment.train_points @ experiment.train_points.T).numpy()
    last = similarity[-1, :-1]
    assert ((shares[-1, :-1] > 0) == (last <= np.median(last))).all()
    i, j = np.argsort(last)[:2]
    expected = math.exp((last[j] - last[i]) / T.NEGATIVES_TAU)
    assert np.isclose(shares[-1, i] / shares[-1, j], expected, rtol=1e-4)
    experiment.text.synonyms[words[0]] = words
    del experiment.negatives
    with pytest.raises(InputError, match=f"no training word differs from '{words[0]}'"):
        experiment.negatives  # noqa: B018 (made when it is read)


@pytest.mark.parametrize("encoder", T.ENCODERS)
def test_silent_trials_leave_gradients_finite(given, encoder, monkeypatch):
    monkeypatch.setattr(T, "SILENT", 0.9)  # whose token may equal the embedding's mean
    config, run, experiment = prepared(given, encoder=encoder, seed=1, patch=10)
    assert max(trained(run, config, experiment, 2)[0]) < 1e3


LEARN = {"encoder": {"encoder", "bon", "eon"}}
LEARN["encoder+expert"] = LEARN["encoder"] | {"experts"}
LEARN["all"] = LEARN["encoder+expert"] | {"lm"}


@pytest.mark.parametrize("train", LEARN)
def test_only_what_is_named_learns(given, train):
    config, run, experiment = prepared(given, train=train, synonyms=True, trials_per_step=16)
    before = {name: p.clone() for name, p in experiment.model.named_parameters()}
    trained(run, config, experiment, 2)
    moved, learns = set(), set()
    for name, p in experiment.model.named_parameters():
        moved |= {name.split(".")[0]} if not torch.equal(p, before[name]) else set()
        learns |= {name.split(".")[0]} if p.requires_grad else set()
    assert moved == learns == LEARN[train]


def validation_curve(given, dtype):
    rates = {"learning_rate": 1e-2, "expert_lr": 1e-2, "max_iters": 24}
    config, run, experiment = prepared(given, dropout=0.0, **rates)
    run.autocast = lambda: torch.autocast("cpu", dtype, enabled=dtype is not torch.float32)
    if dtype is torch.float16:
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    training = trained(run, config, experiment, 0)[1]
    losses = []
    for n_steps in (0, 24):
        trained(run, config, experiment, n_steps)
        T.validate(run, config, experiment, training)
        losses.append(run.logged["val_rank_loss"])
    assert all(p.isfinite().all() for p in experiment.model.parameters())
    return losses, run.scaler.get_scale()


def test_half_precision_follows_float32(given):
    (first, last), _ = validation_curve(given, torch.float32)
    assert last < first - 0.02
    assert np.allclose([first, last], validation_curve(given, torch.bfloat16)[0], rtol=0.01)
    (_, last_16), scale = validation_curve(given, torch.float16)  # steps that overflow are skipped
    assert scale < 2.0**20 and last_16 < first - 0.02


# ---- what counts as right


PAIRS = """dog=dog Dog=dog a_dog=dog The_dogs=dog dog.=dog hot_dog=dog ants=ant calf=calf
calves=calf knives=knife children=child mice=mouse berries=berry boxes=box dishes=dish
glass=glass buses=bus glasses=glasses bus=bus lens=lens lenses=lens tie=tie ties=tie gas=gas
gases=gas cactus=cactus cacti=cactus an_apple=apple an=an octopus=octopus indices=index
classes=class ﬁle=file dog's=dog potatoes=potato axis=axis heroes_of_a_dog=dog brownies=brownie
movies=movie 7=7 leaves=leaf balance_beam=balance_beam balance-beam=balance_beam shoes=shoe
scissors=scissors"""
WRONG = "dogma=dog elephant=ant plants=ant cat=dog the=dog beam=balance_beam =dog vessels=container"
SAME = """apple/Apple/apples ice_cream/Ice-creams/icecream bus/buses gas/gases lens/lenses man/men
taxi/taxis ski/skis iris/irises mouse/mice café/cafe/Cafés octopus/octopuses glass/glasses"""
DIFFERENT = "princess prince 007 7 gas bra brass dress ant elephant glass glove bus ski sky tie toe"


def test_flexible_accuracy_and_one_word_in_many_spellings():
    for line, right in ((PAIRS, True), (WRONG, False)):
        for pair in line.split():
            answer, word = pair.split("=")
            assert T.flexible(answer.replace("_", " "), word) == right, pair
    assert T.flexible("DOG\nand a cat", "dog") and not T.flexible("cat\ndog", "dog")
    assert T.flexible("a vessel", "container", ["vessel", "box"])
    assert T.flexible("boxes", "container", ["box"])
    text = SimpleNamespace(synonyms={"dog": [], "balance beam": []})
    exact, flexible = T.right_answers(text, ["dog", "balance beam"], ["dog", "Dog", "balance beam"])
    assert exact.tolist() == [[1, 0], [0, 0], [0, 1]]  # as the model was taught to spell it
    assert flexible.tolist() == [[1, 0], [1, 0], [0, 1]]
    for words in SAME.split():
        assert len(set(map(T.same_word, words.split("/")))) == 1, words
    assert len(set(map(T.same_word, DIFFERENT.split()))) == len(DIFFERENT.split())


def test_word_space():
    torch.manual_seed(0)
    wte = torch.randn(100, 12) + 3 * torch.randn(12)
    wte[1] = wte[2] + 0.3 * torch.randn(12)
    space = T.WordSpace(wte)
    names = space.names([[1], [2], [3], [1, 2]])
    assert torch.allclose(names.norm(dim=1), torch.ones(4))
    assert names[0] @ names[1] > 0.8 > names[0] @ names[2] and names[3] @ names[0] > 0.8
    cosines = space.names([[i] for i in range(100)])
    assert abs(((cosines @ cosines.T).sum() - 100) / 9900) < 0.05  # unlike; raw, they lean
    assert torch.equal(T.WordSpace(wte).axes, space.axes)
    assert (space.clean(space.mean) == 0).all()  # no direction, and nothing divided by nothing
    wte[1] += 1
    assert torch.equal(space.names([[1], [2], [3], [1, 2]]), names)  # fixed while wte learns


def test_scores():
    scores = np.array([[3.0, 1, 2], [1, 1, 1], [5, 5, 0]])
    assert np.allclose(T.top_k(scores, 1), [[1, 0, 0], [1 / 3] * 3, [0.5, 0.5, 0]])
    assert np.allclose(T.top_k(scores, 2), [[1, 0, 1], [2 / 3] * 3, [1, 1, 0]])
    assert np.allclose(T.place(scores), [[0, 1, 0.5], [0.5] * 3, [0.25, 0.25, 1]])
    of_two_objects = T.measured([1] * 10 + [0] * 10, 0.1, np.repeat([0, 1], 10), T.Config())
    assert of_two_objects == {"score": 0.5, "chance": 0.1, "low": 0.0, "high": 1.0, "n": 20}
    blocks = np.array([0, 0, 0, 1, 1, 1])
    expected, p = T.permuted(np.eye(6), blocks, 300, 0)
    assert np.allclose(expected, 1 / 3) and p < 0.1  # 1 of 36 orders
    of_one = T.measured([1, 0], 0.1, ["a", "a"], T.Config())
    assert (of_one["low"], of_one["high"]) == (-math.inf, math.inf)  # nothing known of others
    assert math.isnan(T.permuted(np.full((6, 6), math.nan), blocks, 20, 0)[1])
    expected, p = T.permuted(np.kron(np.eye(2), np.ones((3, 3))), blocks, 20, 0)
    assert np.allclose(expected, 1) and p == 1  # what a block gives away is no knowledge


# ---- whole runs


@pytest.fixture(scope="module")
def whole(given):
    options = {"max_iters": 180, "eval_interval": 90, "learning_rate": 3e-3, "expert_lr": 1e-2}
    T.main(a_config(given, out_dir=str(given / "run"), **options))
    return given / "run"


def test_it_reads_what_is_there(whole):
    table = pd.read_csv(whole / "results.csv")
    assert table.data.str.contains("synthetic").all()
    assert set(table.control) == {"eeg", "shuffled", "empty", "majority"}
    rows = table.set_index(["set", "metric", "control"])
    assert {name for name, _, _ in rows.index} == set(T.SETS)
    top1, shuffled = rows.loc["trial", "top1", "eeg"], rows.loc["trial", "top1", "shuffled"]
    assert top1.score > 3 * top1.chance and top1.low > shuffled.high
    search = rows.loc["trial", "said by search", "eeg"]
    assert search.chance == 1 / 12 and search.low > search.chance
    for name in T.SETS:
        exact = rows.loc[name, "naive accuracy", "eeg"].score
        assert exact <= rows.loc[name, "flexible accuracy", "eeg"].score
    assert {"similarity", "similarity rank", "top5", "top1 by pmi per token"} <= set(table.metric)
    assert rows.loc["object", "top5", "majority"].score == 0
    samples = pd.read_csv(whole / "samples.csv", keep_default_na=False, dtype=str)
    assert set(samples.set) == set(T.SETS) and samples.search.isin(samples.word).mean() > 0.9
    assert (whole / "results.png").exists()
    assert set(load_checkpoint(whole / "ckpt.pt")["tokens"]) == {0, 90, 180}
    assert json.loads((whole / "splits.json").read_text())["hash"]


def test_preferences_after_supervision(given, whole):
    options = {"stage": "dpo", "init_from": str(whole), "log_interval": 1, "eval_trials": 6}
    config = a_config(given, out_dir=str(given / "dpo"), max_iters=12, **options)
    config.t_end, config.patch, config.lm, config.baseline = 0.6, 10, "out/train", 0.1
    T.main(config)
    written = (given / "dpo/config.yaml").read_text()
    assert "t_end: 0.4\n" in written and "patch: 5\n" in written and "lm.pt\n" in written
    assert "baseline: 0.0\n" in written
    for key, value in (("fusion", "prefix"), ("patch", 10), ("split_seed", 1)):
        with pytest.raises(InputError, match=f"has {key}=.*, not {value}"):
            T.main(a_config(given, out_dir=str(given / "other"), **options, **{key: value}))
    lines = (given / "dpo" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in lines if "train_loss" in line]
    places = [json.loads(line)["val_place"] for line in lines if "val_place" in line]
    assert load_checkpoint(given / "dpo/best.pt")["best"] == min(places)
    assert abs(losses[0] - math.log(2)) < 1e-5 and losses[-1] < losses[0]
    make_eeg(given / "others", subjects=4)
    options["dataset"] = str(given / "others")
    with pytest.raises(InputError, match="trained on another split"):
        T.main(a_config(given, out_dir=str(given / "leak"), **options))


def test_names_too_long_to_be_said_are_counted(given, whole, tmp_path, capsys):
    few = {"max_new_tokens": 2, "max_iters": 0, "eval_trials": 4}
    T.main(a_config(given, out_dir=str(tmp_path), init_from=str(whole), **few))
    assert "12 of 12 names are longer than max_new_tokens=2" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "results.csv")
    assert (table.unsayable == 12).all()
    rows = table[(table.metric == "top1 by pmi per token") & (table.set == "trial")]
    assert (rows.n == 4).all() and (rows.chance == 1 / 10).all()  # of a set's words, not of four


def test_a_resumed_run_keeps_its_word_space_and_its_options(given, tmp_path, monkeypatch):
    """tests/test_scripts.py compares its weights with a run that never stopped."""
    monkeypatch.setattr(T, "report", lambda *args: None)
    options = {"train": "all", "expert_lr": 1e-2, "eval_trials": 6, "out_dir": str(tmp_path)}
    T.main(a_config(given, max_iters=2, **options))
    before = load_checkpoint(tmp_path / "ckpt.pt")
    options["init_from"] = "resume"
    T.main(a_config(given, max_iters=3, **options))
    after = load_checkpoint(tmp_path / "ckpt.pt")
    assert not torch.equal(before["wte"], before["model"]["lm.transformer.wte.weight"])
    assert torch.equal(before["wte"], after["wte"]) and set(after["tokens"]) == {0, 2, 3}
    with pytest.raises(InputError, match="has train=all, not encoder"):
        T.main(a_config(given, **options | {"train": "encoder"}))


def test_minutes_settle_the_number_of_steps(given, tmp_path, monkeypatch):
    monkeypatch.setattr(T, "report", lambda *args: None)
    T.main(a_config(given, out_dir=str(tmp_path), minutes=0.005, max_iters=10**6, eval_trials=6))
    n_steps = load_checkpoint(tmp_path / "ckpt.pt")["config"]["max_iters"]
    assert 1 < n_steps < 10**5
    assert f"max_iters: {n_steps}\n" in (tmp_path / "config.yaml").read_text()


def test_a_resumed_run_keeps_its_minutes_and_counts_its_own_steps(given, monkeypatch):
    config, run, experiment = prepared(given)
    training = T.Training(run, config, experiment, experiment.sets["train"])
    state = {"step": 100, "best": 1.0, "config": {"minutes": 6.0, "max_iters": 700}, "tokens": {}}
    state |= {"optimizer": training.optimizer.state_dict(), "scaler": {}, "reference": {}}
    for minutes, expected in ((6.0, 700), (9.0, T.UNSETTLED), (0.0, 800)):
        config.minutes, config.max_iters = minutes, 800
        training.resume(state)
        assert config.max_iters == expected
    config.minutes, config.max_iters = 10.0, T.UNSETTLED  # stopped before they were settled
    run.start = 0.0
    training.first_step = 100
    for step in range(101, 130):
        training.step = step
        monkeypatch.setattr(T.time, "time", lambda: 2.0 * training.step - 200)  # s, 2 a step
        T.settle(run, config, training)
    assert config.max_iters == 100 + 300


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is_planted(given, tmp_path):
    p = []
    for seed in range(10):
        make_eeg(tmp_path / f"eeg{seed}", gain=0.0, subjects=4, seed=seed)
        options = {"dataset": str(tmp_path / f"eeg{seed}"), "out_dir": str(tmp_path / str(seed))}
        T.main(a_config(given, seed=seed, max_iters=60, shuffles=200, **options))
        table = pd.read_csv(tmp_path / str(seed) / "results.csv")
        p += table[(table.metric == "top1") & (table.control == "eeg")].p.tolist()
    assert len(p) == 40 and sum(value <= 0.05 for value in p) <= 5  # binomial, 95 %


# ---- pretrained encoders


def test_an_encoder_that_saw_held_out_trials_is_refused(given, whole, tmp_path):
    options = {"encoder": f"pretrained:{whole}", "out_dir": str(tmp_path)}
    with pytest.raises(InputError, match="held out here"):
        T.main(a_config(given, split_seed=1, **options))
    with pytest.raises(InputError, match="has no encoder"):
        T.main(a_config(given, **{**options, "encoder": f"pretrained:{given / 'lm.pt'}"}))
    experiment = prepared(given, encoder=f"pretrained:{whole}")[2]  # on its own split
    weights = load_checkpoint(whole / "best.pt")["model"]
    mixed = experiment.model.encoder.state_dict()["net.embed.weight"]
    assert torch.equal(mixed, weights["encoder.net.embed.weight"])


def foundation_checkpoint(folder, dataset, bands=(), patch=5, degree=3):
    """An encoder of 40 electrodes as foundation.py writes it."""
    place = np.random.default_rng(1).normal(size=(40, 3)) * 0.05
    recording = {"dataset": dataset, "name": "sub-01", "xyz": place.tolist()}
    recording["channels"] = [f"E{i}" for i in range(40)]
    recipe = {"sfreq": 25.0, "bands": list(bands), "grid": "", "recordings": [recording]}
    shape = {"tokens": "electrode", "n_embd": 24, "width": 16, "n_layer": 1, "n_head": 2}
    return save_encoder(folder, recipe, **shape, patch=patch, degree=degree, subjects=7), place


def test_an_encoder_of_40_electrodes_loads_for_63(given, tmp_path):
    def nameless(_, given):  # nobody says where E3 and E7 are, but pretraining knows them
        given["channels"].loc[[3, 7], ["x", "y", "z"]] = np.nan

    make_eeg(tmp_path / "eeg", channels=63, changes=nameless, words=8, images=4)
    encoder, place = foundation_checkpoint(tmp_path, "elsewhere")
    options = {"dataset": str(tmp_path / "eeg"), "encoder": f"pretrained:{tmp_path}"}
    experiment = prepared(given, **options)[2]
    notes = experiment.trials.notes[0]
    assert "40 channels matched by name, 23 by position, 0 without a place" in notes
    assert "pretrained at 25 Hz, read at 50 Hz" in notes
    assert np.allclose(experiment.trials.xyz[0, [3, 7]], place[[3, 7]], atol=1e-6)
    weights = experiment.model.encoder.state_dict()
    for name in ("net.blocks.0.mlp.c_fc.weight", "net.place"):
        assert torch.equal(weights[name], encoder.state_dict()[name])
    foundation_checkpoint(tmp_path, "elsewhere", patch=2, degree=1)
    small = prepared(given, **options)[2].model.encoder  # beside its token for the whole window
    assert sum(p.numel() for p in small.net.parameters()) < small.whole.weight.numel()
    foundation_checkpoint(tmp_path, "data/eeg")
    with pytest.raises(InputError, match="saw EEG of eeg that is held out here"):
        prepared(given, **options)
    make_eeg(tmp_path / "other", words=8, images=4)  # by way of a run on other people
    there = {"dataset": str(tmp_path / "other"), "out_dir": str(tmp_path / "by"), "max_iters": 1}
    T.main(a_config(given, encoder=f"pretrained:{tmp_path}", **there))
    with pytest.raises(InputError, match="saw EEG of eeg that is held out here"):
        prepared(given, encoder=f"pretrained:{tmp_path / 'by'}")
    foundation_checkpoint(tmp_path, "elsewhere", [[4, 8], [8, 12]])
    with pytest.raises(InputError, match="pretrained on bands"):
        prepared(given, **options)


# ---- bad input


REFUSED = [  # more in tests/test_scripts.py
    ({"encoder": "some"}, "encoder must be .*transformer"),
    ({"fusion": "cross", "train": "encoder"}, "gates shut"),
    ({"prompt": ""}, "prompt= is empty"),
    ({"max_new_tokens": 99}, "do not fit.*shorten prompt= or max_new_tokens="),
    ({"init_from": "lm.pt"}, "is not from telepath.py"),
    ({"dataset": "long"}, "shorten the name 'long.*long' in .*long"),
]


def test_bad_input_is_a_sentence(given, monkeypatch):
    def change(name, given):
        given["events"]["word"] = given["events"].word.replace("aw", 40 * "long")

    make_eeg(given / "long", changes=change)
    monkeypatch.chdir(given)
    for options, words in REFUSED:
        with pytest.raises(InputError, match=words):
            check(a_config(given, **options))
            prepared(given, **options)
