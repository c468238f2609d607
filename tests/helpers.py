"""What several tests need: a tiny dataset in the real format, and scripts run as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import tiktoken

from data import recording
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


def start(script, *options, ranks=1, patch="", env=None):
    """Start a script in a process of its own, under torchrun where ranks > 1; `patch` is Python run before it, in its process."""
    command = [str(ROOT / f"{script}.py")]
    if patch:
        command = ["-c", f"import runpy, sys; sys.argv[0] = {command[0]!r}; sys.path.insert(0, {str(ROOT)!r})\n{patch}\n"
                         f"runpy.run_path({command[0]!r}, run_name='__main__')"]
    elif ranks > 1:
        command = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={20000 + os.getpid() % 20000}", *command]
    return subprocess.Popen([sys.executable, *command, *map(str, options)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})})


def run(script, *options, status=0, **kwargs):
    """Run a script to its end; its output (stdout, stderr) once its exit status is the one expected."""
    process = start(script, *options, **kwargs)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


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
