"""What several tests need: a tiny dataset in the real format, and scripts run as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiktoken

import configurator
from data import recording
from data.recording import write_recording, write_set
from data.stimuli import write_tasks
from data.tokens import state_of, write_dataset

ROOT = Path(__file__).resolve().parents[1]


def byte_tokenizer():
    """A tokenizer of the 256 bytes and <|endoftext|> (256)."""
    ranks = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})


def make_dataset(folder, train=20_000, val=4_000, seed=0):
    """A dataset of predictable bytes: each token is likely to be followed by its successor."""
    rng = np.random.default_rng(seed)
    steps = np.where(rng.random(train + val) < 0.8, 1, rng.integers(0, 32, train + val))
    ids = (np.cumsum(steps) % 32 + 64).astype(np.uint16)
    write_dataset(folder, {"train": [ids[:train]], "val": [ids[train:]]}, state_of(byte_tokenizer()), synthetic=True)
    return folder


def make_sentences(folder, n=120, seed=0):
    """A task of labelled texts: the label is the first letter."""
    rng = np.random.default_rng(seed)
    rows = [dict(split=("train", "train", "val", "test")[i % 4], label=(a := "xy"[int(rng.integers(2))]),
                 text=f"{a}{'abcdefgh'[:int(rng.integers(2, 9))]}{i}", group=i) for i in range(n)]
    write_tasks(folder, {"letter": dict(frame=pd.DataFrame(rows), kind="classification", labels=["x", "y"], description="first letter")}, synthetic=True)
    return folder


def make_podcast(folder, gain=2.0, seconds=110, sfreq=128.0, seed=0, noise_words=False):
    """A tiny prepared podcast (data/podcast/prepare.py's layout): two people, 10 and 6 electrodes, of which three and two carry a word's vector for
    0.1 s, 0.3 s after its onset. The awkward cases: a bad channel, a first sample, an onset that nobody knows, words beyond both ends."""
    rng = np.random.default_rng(seed)
    onset = np.sort(np.concatenate([[0.02, seconds + 5], 0.3 + np.cumsum(rng.uniform(0.25, 0.6, 2 * seconds))]))
    onset = onset[(onset < seconds) | (onset > seconds + 4)]
    kinds = rng.choice(12, len(onset), p=(1 / np.arange(2, 14)) / (1 / np.arange(2, 14)).sum())
    vectors = rng.normal(size=(12, 8))[kinds] + 0.3 * rng.normal(size=(len(onset), 8))
    words = pd.DataFrame(dict(word_idx=np.arange(len(onset)), word=[f"Word{'abcdefghijkl'[k]}," for k in kinds], start=onset, end=onset + 0.2,
                              norm_word=[f"word{'abcdefghijkl'[k]}" for k in kinds], sentence=np.arange(len(onset)) // 7,
                              pos=[("noun", "verb", "other")[k % 3] for k in kinds], content=["content" if k % 2 else "function" for k in kinds]))
    words.loc[5, ["start", "end"]] = np.nan
    folder.mkdir(parents=True)
    words.to_csv(folder / "words.csv", index=False)
    tokens = pd.DataFrame(dict(word_idx=np.repeat(np.arange(len(onset)), 2), token_id=0, token="x", true_prob=0.1, rank=1, entropy=1.0))
    tokens.to_csv(folder / "tokens.csv", index=False)
    (np.repeat(vectors, 2, 0) + np.tile([[1.0], [-1.0]], (len(onset), 8))).astype("<f4").tofile(folder / "gpt2-xl_layer-24.f32")  # their mean is the vector
    np.abs(rng.normal(size=10 * seconds)).astype("<f4").tofile(folder / "audio.f32")
    for number, (channels, carry, first) in enumerate(((10, 3, 64), (6, 2, 0)), 1):
        signal = rng.normal(size=(round(seconds * sfreq), channels))
        for i in np.flatnonzero(words.start.notna()):
            a = round((onset[i] + 0.25) * sfreq) - first
            if 0 <= a < len(signal) - 20:
                signal[a:a + round(0.1 * sfreq), :carry] += gain * (vectors[i, number:number + carry] if not noise_words else 1.0)
        table = pd.DataFrame(dict(name=[f"LG{'AB'[i // 4 % 2]}{i % 4 + 1}" if i < 8 else f"D{i}" for i in range(channels)], type="ecog", x=0.05,
                                  y=0.01 * np.arange(channels), z=0.01, status="good"))
        table.loc[channels - 1, "status"] = "bad"
        events = words[words.start.notna()].rename(columns=dict(start="onset"))[["onset", "word", "norm_word", "word_idx"]]
        write_recording(folder / f"sub-0{number}", 1e-6 * (3 + signal), table, events, sfreq=sfreq, unit="V", subject=f"sub-0{number}", first_sample=first,
                        source="test", synthetic=True, nyu_id=str(660 + number))
    write_set(folder, ["sub-01", "sub-02"], synthetic=True, words="words.csv", tokens={"gpt2-xl": "tokens.csv"},
              features={"gpt2-xl": {"layer-24": "gpt2-xl_layer-24.f32"}}, arrays={"gpt2-xl_layer-24.f32": {"shape": [2 * len(onset), 8], "dtype": "float32"}},
              audio={"file": "audio.f32", "sfreq": 10, "samples": 10 * seconds}, planted=dict(lag_ms=300.0, kernel_ms=100, volume_lag_ms=0.0))
    return folder


def start(script, *options, ranks=1, restarts=0, patch="", env=None):
    """Start a script in a process of its own, under torchrun where ranks > 1; `patch` is Python run before it, in its processes."""
    command = [str(ROOT / f"{script}.py")]
    if patch:
        command = ["-c", f"import runpy, sys; sys.argv[0] = {command[0]!r}; sys.path.insert(0, {str(ROOT)!r})\n{patch}\n"
                         f"runpy.run_path({command[0]!r}, run_name='__main__')"]
    if ranks > 1:
        where = ["--standalone", f"--max-restarts={restarts}"] if restarts else [f"--master_port={20000 + os.getpid() % 20000}"]
        command = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *where, *(["--no-python", sys.executable] if patch else []), *command]
    return subprocess.Popen([sys.executable, *command, *map(str, options)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})})


def run(script, *options, status=0, **kwargs):
    """Run a script to its end; its output (stdout, stderr) once its exit status is the one expected."""
    process = start(script, *options, **kwargs)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def sentence_of(error, capsys):
    """What the user gets of an exception raised in this process, which must be one sentence and exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        configurator._print_one_sentence(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert status.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def ends_in_a_sentence(call, capsys, says=()):
    """`call` must raise what the user gets as one sentence that holds all of `says`, with exit status 2."""
    with pytest.raises(Exception) as error:  # noqa: B017 (any: what becomes of it is the test)
        call()
    said = sentence_of(error.value, capsys)
    for words in says:
        assert words in said, said


def refused(script, *options, says, **kwargs):
    """The script must end with status 2 and one sentence on stderr that holds all of `says`."""
    _, err = run(script, *options, status=2, **kwargs)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err and len(lines) == 1, err
    for words in says:
        assert words in lines[0], lines[0]
    return lines[0]


def make_eeg(folder, subjects=3, words=12, images=6, repeats=2, channels=8, sfreq=50.0, gain=3.0, grouped=True, changes=None, seed=0):
    """EEG of people who see pictures: each word has a topography and a latency of its own, half a second from picture to picture. A block shows one
    picture of every word; grouped=False deals pictures to blocks at random. changes(name, given): edits what is written of a recording."""
    rng = np.random.default_rng(seed)
    names, topography = [f"{chr(97 + i)}w" for i in range(words)], rng.normal(size=(words, channels))
    xyz = rng.normal(size=(channels, 3))
    xyz *= 0.1 / np.linalg.norm(xyz, axis=1, keepdims=True)
    for s in range(subjects):
        rows, at = [], 2.0
        for block in range(images * repeats):
            for i in rng.permutation(words):
                image = block % images if grouped else int(rng.integers(images))
                rows.append(dict(onset=at, duration=0.1, object=f"{names[i]}1", word=names[i], synonyms=f"{names[i]}x", image=f"{names[i]}_{image}",
                                 block=block, target=0))
                at += 0.5
            at += 1.0
        signal = rng.normal(size=(int((at + 2) * sfreq), channels))
        for row in rows:
            i, start = names.index(row["word"]), round(row["onset"] * sfreq)
            signal[start + 5 + i % 10:start + 10 + i % 10] += gain * topography[i]
        places = pd.DataFrame(dict(name=[f"E{c}" for c in range(channels)], x=xyz[:, 0], y=xyz[:, 1], z=xyz[:, 2]))
        given = dict(signal=(1e-5 * signal).astype("f4"), channels=places, events=pd.DataFrame(rows), sfreq=sfreq, unit="V",
                     subject=f"{s + 1:02d}", source="a test", synthetic=True)
        if changes:
            changes(f"sub-{s + 1:02d}", given)
        recording.write_recording(folder / f"sub-{s + 1:02d}", **given)
    recording.write_set(folder, [f"sub-{s + 1:02d}" for s in range(subjects)], synthetic=True)
    return folder
