"""Shared by several tests: tiny datasets in the real formats, and scripts run as by a user."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiktoken
import torch

import configurator
from data import InputError, recording
from data.recording import write_recording, write_set
from data.stimuli import write_tasks
from data.tokens import state_of, write_dataset
from model import EncoderConfig, NeuralEncoder, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def real(name):
    """Return a folder of real files, or skip the test if it does not exist."""
    folder = ROOT.parent / "shared/real" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return folder


# ---- datasets


def byte_tokenizer():
    """Return a tokenizer of the 256 bytes and <|endoftext|> (256)."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )


def make_dataset(folder, train=20_000, val=4_000, seed=0):
    """Write a dataset of predictable bytes: each token likely precedes its successor."""
    rng = np.random.default_rng(seed)
    likely = rng.random(train + val) < 0.8
    steps = np.where(likely, 1, rng.integers(0, 32, train + val))
    ids = (np.cumsum(steps) % 32 + 64).astype(np.uint16)
    splits = {"train": [ids[:train]], "val": [ids[train:]]}
    write_dataset(folder, splits, state_of(byte_tokenizer()), synthetic=True)
    return folder


def make_sentences(folder, n=120, seed=0):
    """Write a task of labelled texts, in which the label is the first letter."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label = "xy"[int(rng.integers(2))]
        text = f"{label}{'abcdefgh'[: int(rng.integers(2, 9))]}{i}"
        split = ("train", "train", "val", "test")[i % 4]
        rows.append({"split": split, "label": label, "text": text, "group": i})
    task = {"frame": pd.DataFrame(rows), "kind": "classification", "labels": ["x", "y"]}
    write_tasks(folder, {"letter": {**task, "description": "first letter"}}, synthetic=True)
    return folder


def make_podcast(folder, gain=2.0, seconds=110, sfreq=128.0, seed=0, noise_words=False):
    """Write a tiny prepared podcast (as data/podcast/prepare.py does) of two people.

    Three of 10 and two of 6 electrodes carry a word's vector for 0.1 s, 0.3 s after its onset.
    Awkward cases: a bad channel, a first sample, an unknown onset, words beyond both ends.
    noise_words: electrodes carry the same number for all words.
    """
    rng = np.random.default_rng(seed)
    inside = 0.3 + np.cumsum(rng.uniform(0.25, 0.6, 2 * seconds))
    onset = np.sort(np.concatenate([[0.02, seconds + 5], inside]))
    onset = onset[(onset < seconds) | (onset > seconds + 4)]
    n_words = len(onset)
    frequencies = 1 / np.arange(2, 14)
    kinds = rng.choice(12, n_words, p=frequencies / frequencies.sum())
    vectors = rng.normal(size=(12, 8))[kinds] + 0.3 * rng.normal(size=(n_words, 8))
    words = podcast_words(onset, kinds)
    folder.mkdir(parents=True)
    words.to_csv(folder / "words.csv", index=False)
    tokens = pd.DataFrame({"word_idx": np.repeat(np.arange(n_words), 2), "token_id": 0})
    true_prob = 0.1 * (1 + tokens.word_idx % 2)
    tokens = tokens.assign(token="x", true_prob=true_prob, rank=1, entropy=1.0)
    tokens.to_csv(folder / "tokens.csv", index=False)
    features = np.repeat(vectors, 2, axis=0)  # two tokens, whose mean is the vector
    features += np.tile([[1.0], [-1.0]], (n_words, 8))
    features.astype("<f4").tofile(folder / "gpt2-xl_layer-24.f32")
    np.abs(rng.normal(size=10 * seconds)).astype("<f4").tofile(folder / "audio.f32")
    events = words[words.start.notna()].rename(columns={"start": "onset"})
    events = events[["onset", "word", "norm_word", "word_idx"]]
    for number, n_channels, n_carriers, first in ((1, 10, 3, 64), (2, 6, 2, 0)):
        signal = rng.normal(size=(round(seconds * sfreq), n_channels))
        for i in np.flatnonzero(words.start.notna()):
            start = round((onset[i] + 0.25) * sfreq) - first
            if 0 <= start < len(signal) - 20:
                carried = 1.0 if noise_words else vectors[i, number : number + n_carriers]
                signal[start : start + round(0.1 * sfreq), :n_carriers] += gain * carried
        channels = podcast_channels(n_channels)
        facts = {"sfreq": sfreq, "unit": "V", "subject": f"sub-0{number}", "first_sample": first}
        facts |= {"source": "test", "synthetic": True, "nyu_id": str(660 + number)}
        write_recording(folder / f"sub-0{number}", 1e-6 * (3 + signal), channels, events, **facts)
    shape = {"shape": [2 * n_words, 8], "dtype": "float32"}
    write_set(
        folder,
        ["sub-01", "sub-02"],
        synthetic=True,
        words="words.csv",
        tokens={"gpt2-xl": "tokens.csv"},
        features={"gpt2-xl": {"layer-24": "gpt2-xl_layer-24.f32"}},
        arrays={"gpt2-xl_layer-24.f32": shape},
        audio={"file": "audio.f32", "sfreq": 10, "samples": 10 * seconds},
        planted={"lag_ms": 300.0, "kernel_ms": 100, "volume_lag_ms": 0.0},
    )
    return folder


def podcast_words(onset, kinds):
    """Return the table of words of make_podcast."""
    letters = ["abcdefghijkl"[kind] for kind in kinds]
    words = pd.DataFrame({"word_idx": np.arange(len(onset))})
    words["word"] = [f"Word{letter}," for letter in letters]
    words["start"] = onset
    words["end"] = onset + 0.2
    words["norm_word"] = [f"word{letter}" for letter in letters]
    words["sentence"] = np.arange(len(onset)) // 7
    words["pos"] = np.array(["noun", "verb", "other"])[kinds % 3]
    words["content"] = np.array(["function", "content"])[kinds % 2]
    words.loc[5, ["start", "end"]] = np.nan
    return words


def podcast_channels(n_channels):
    """Return the table of channels of make_podcast; the last channel is bad."""
    names = []
    for i in range(n_channels):
        names.append(f"LG{'AB'[i // 4 % 2]}{i % 4 + 1}" if i < 8 else f"D{i}")
    channels = pd.DataFrame({"name": names, "type": "ecog", "x": 0.05, "z": 0.01})
    channels = channels.assign(y=0.01 * np.arange(n_channels), status="good")
    channels.loc[n_channels - 1, "status"] = "bad"
    return channels


def make_eeg(  # noqa: PLR0913
    folder,
    subjects=3,
    words=12,
    images=6,
    repeats=2,
    channels=8,
    sfreq=50.0,
    gain=3.0,
    grouped=True,
    changes=None,
    seed=0,
):
    """Write EEG of people who see two pictures per second.

    Each word has its own topography and latency. A block shows one picture of every word;
    grouped=False deals pictures to blocks at random. changes(name, arguments): edits the arguments
    of write_recording.
    """
    rng = np.random.default_rng(seed)
    topography = rng.normal(size=(words, channels))
    xyz = rng.normal(size=(channels, 3))
    xyz *= 0.1 / np.linalg.norm(xyz, axis=1, keepdims=True)
    channel_table = pd.DataFrame(xyz, columns=["x", "y", "z"])
    channel_table.insert(0, "name", [f"E{c}" for c in range(channels)])
    names = []
    for s in range(subjects):
        rows = []
        onset = 2.0
        for block in range(images * repeats):
            for i in rng.permutation(words):
                image = block % images if grouped else int(rng.integers(images))
                name = f"{chr(97 + i)}w"
                row = {"onset": onset, "duration": 0.1, "object": f"{name}1", "word": name}
                row |= {"synonyms": f"{name}x", "image": f"{name}_{image}", "number": i}
                rows.append({**row, "block": block, "target": 0})
                onset += 0.5
            onset += 1.0
        signal = rng.normal(size=(int((onset + 2) * sfreq), channels))
        events = pd.DataFrame(rows)
        for row in events.itertuples():
            start = round(row.onset * sfreq) + 5 + row.number % 10
            signal[start : start + 5] += gain * topography[row.number]
        arguments = {"signal": (1e-5 * signal).astype("f4"), "channels": channel_table.copy()}
        arguments |= {"events": events.drop(columns="number"), "sfreq": sfreq, "unit": "V"}
        arguments |= {"subject": f"{s + 1:02d}", "source": "a test", "synthetic": True}
        names.append(f"sub-{s + 1:02d}")
        if changes:
            changes(names[-1], arguments)
        recording.write_recording(folder / names[-1], **arguments)
    recording.write_set(folder, names, synthetic=True)
    return folder


def save_encoder(folder, recipe, seed=0, **shape):
    """Write best.pt, as foundation.py does, of an encoder with random weights; return it."""
    torch.manual_seed(seed)
    encoder = NeuralEncoder(EncoderConfig(**shape))
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state = {"kind": "foundation", "encoder_args": vars(encoder.config), "recording": recipe}
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "best.pt", {**state, "model": weights})
    return encoder


# ---- scripts


def prepare(module, **options):
    """Run a prepare script in this process; options may be Paths."""
    for key, value in options.items():
        options[key] = str(value) if isinstance(value, Path) else value
    config = module.Config(**options)
    configurator.check(config)
    module.main(config)


def start(script, *options, ranks=1, restarts=0, patch="", env=None):
    """Start a script in a new process, under torchrun if ranks > 1.

    patch: Python code to run in its processes before the script.
    """
    file = str(ROOT / f"{script}.py")
    command = [file]
    if patch:
        before = f"import runpy, sys; sys.argv[0] = {file!r}; sys.path.insert(0, {str(ROOT)!r})"
        command = ["-c", f"{before}\n{patch}\nrunpy.run_path({file!r}, run_name='__main__')"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        if restarts:
            launcher += ["--standalone", f"--max-restarts={restarts}"]
        else:
            launcher.append(f"--master_port={20000 + os.getpid() % 20000}")
        if patch:
            launcher += ["--no-python", sys.executable]
        command = [*launcher, *command]
    return subprocess.Popen(
        [sys.executable, *command, *map(str, options)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})},
    )


def run(script, *options, status=0, **kwargs):
    """Run a script to its end, check its exit status, and return stdout and stderr."""
    process = start(script, *options, **kwargs)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def sentence_of(error, capsys):
    """Return what a user sees of an exception, which must be one sentence and exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        configurator._print_one_sentence(type(error), error, error.__traceback__)
    sentence = capsys.readouterr().err
    assert end.value.code == 2 and sentence.startswith("error: "), sentence
    assert sentence.count("\n") == 1, sentence
    return sentence


def input_error(words, call, *args, **options):
    """Check that `call` raises an InputError of one line that matches the pattern `words`.

    `refused` does the same for a whole script as the user starts it.
    """
    try:
        call(*args, **options)
    except InputError as error:  # do not keep it: its frames may hold the lock of a folder
        sentence = str(error)
    else:
        pytest.fail(f"no InputError: {words}")
    assert re.search(words, sentence) and "\n" not in sentence, sentence


def ends_in_a_sentence(call, capsys, says=()):
    """Check that the user sees an exception of `call` as one sentence with all of `says`."""
    with pytest.raises(Exception) as error:  # noqa: B017 (of any kind)
        call()
    sentence = sentence_of(error.value, capsys)
    for words in says:
        assert words in sentence, sentence


def refused(script, *options, says, **kwargs):
    """Check that a script ends with status 2 and one sentence on stderr with all of `says`."""
    _, err = run(script, *options, status=2, **kwargs)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err and len(lines) == 1, err
    for words in says:
        assert words in lines[0], lines[0]
    return lines[0]
