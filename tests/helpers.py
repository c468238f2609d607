"""What several tests need: a tiny dataset in the real format, and scripts run as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import tiktoken

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
