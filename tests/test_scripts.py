"""What every script owes its user, one row of SCRIPTS each.

It continues after any kill as if never stopped, gives the same on 1 and on 2 ranks, and refuses bad
options, damaged files and a used folder with one sentence. A new script adds a row.
"""

import gc
import importlib
import json
import math
import shutil
import signal
import time
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import (
    ends_in_a_sentence,
    make_dataset,
    make_eeg,
    make_podcast,
    make_sentences,
    refused,
    run,
    sentence_of,
    start,
)

import configurator
import data
from configurator import configure, key_seed


@dataclass
class Script:
    name: str
    options: str  # a run of seconds; {data} is the tiny dataset, {lm} a tiny language model
    trains: bool = False  # writes ckpt.pt and resumes from it
    wrong: dict = field(default_factory=dict)  # {option that it refuses: words of the sentence}


SCRIPTS = [
    Script(
        "train",
        "dataset={data} batch_size=2 block_size=16 n_layer=2 n_head=2 n_embd=16 radius=2 windows=2 "
        "alpha=1 dropout=0.1 tokens_per_step=128 max_iters=12 eval_interval=4 eval_batches=4 "
        "save_interval=3 log_interval=1 warmup_iters=2 compile=False device=cpu dtype=float32 "
        "baseline_tokens=0",
        trains=True,
        wrong={"optimizer=sgd": ["optimizer", "adamw or muon"]},
    ),
    Script(
        "finetune",
        "lm={lm} dataset={sentences} task=letter batch_size=2 texts_per_step=8 alpha_scale=0.5 "
        "dropout=0.1 max_iters=12 eval_interval=4 save_interval=3 log_interval=1 warmup_iters=2 "
        "patience=0 resamples=10 device=cpu dtype=float32",
        trains=True,
        wrong={
            "task=nosuch": ["nosuch", "letter"],
            "mode=some": ["mode", "full or head or last_k"],
            "init_from=gpt2": ["init_from", "lm or resume"],
        },
    ),
    Script(
        "telepath",
        "lm={lm} dataset={eeg} t_end=0.4 prompt=T jitter=0.02 patch=10 width=16 encoder_layers=1 "
        "batch_size=2 trials_per_step=8 max_iters=12 eval_interval=4 save_interval=3 "
        "log_interval=1 warmup_iters=2 eval_trials=12 shuffles=10 max_new_tokens=2 augment=pink "
        "augment_share=0.5 synonyms=True device=cpu dtype=float32",
        trains=True,
        wrong={
            "dataset=nosuch": ["nosuch", "synthetic_eeg"],
            "augment=hum": ["hum", "pink"],
            "stage=dpo": ["init_from=out/telepath"],
            "fusion=sum": ["fusion", "cross"],
            "t_start=90": ["later than t_start"],
            "encoder=pretrained": ["pretrained:out/foundation"],
            "patch=99": ["patch=99"],
            "train=some": ["train", "encoder+expert"],
        },
    ),
    Script(
        "foundation",
        "dataset={podcast} width=16 n_embd=8 n_layer=1 n_head=2 degree=1 decoder_width=16 "
        "decoder_layers=1 dropout=0.1 batch_size=2 windows_per_step=8 max_iters=12 "
        "eval_interval=4 save_interval=3 log_interval=1 warmup_iters=2 eval_windows=12 "
        "bootstraps=10 device=cpu dtype=float32",
        trains=True,
        wrong={
            "dataset=nosuch": ["nosuch", "synthetic_podcast"],
            "window=60": ["window=60", "110.0 s"],
            "mask_ratio=1": ["mask_ratio=1"],
            "patch=5": ["patch=5", "does not divide"],
            "masks=some": ["masks", "random, tube, span"],
            "grid=8x8": ["grid=8x8", "G1"],
            "subjects=9": ["subjects", "nobody"],
            "channels=XX": ["channels=XX"],
            "sfreq=512": ["512", "128 Hz"],
            "bands=[[70,90]]": ["90 Hz"],
        },
    ),
    Script(
        "sample",
        "lm={lm} prompt=ab max_new_tokens=8 num_samples=2 device=cpu",
        wrong={"file=nosuch.txt": ["nosuch.txt"]},
    ),
    Script(
        "topography",
        "lm={lm} stimuli={stimuli} pairs={pairs} dataset={data} shuffles=10 ablate=[2] "
        "random_sets=1 val_batches=1 device=cpu",
        wrong={
            "stimuli=nosuch": ["nosuch"],
            "contrasts=a>q": ["'q'", "conditions: a, b"],
            "contrasts=a": ["A>B"],
            "pairs=nosuch": ["nosuch"],
            "sweep=nosuch": ["nosuch", "results.csv"],
        },
    ),
    Script(
        "probe",
        "lm={lm} dataset={sentences}/letter n_folds=4 train_sizes=[40] "
        "probe=[LDA,Logistic] cache={sentences}/states device=cpu",
        wrong={  # more in tests/test_probe.py
            "dataset=nosuch.json": ["nosuch.json", "get_data.py"],
            "layers=[9]": ["no layer 9", "0 (embeddings) to 2"],
        },
    ),
    Script(
        "decode",
        "dataset={podcast} lags=[-300,300] n_folds=3 n_shifts=20 pca=4 epochs=2 min_count=2 "
        "device=cpu model_params.conv_filters=4 model_params.num_models=2",
        wrong={
            "subjects=7": ["has no 7", "sub-01, sub-02"],
            "channels=XX": ["no electrode", "LGA"],
            "model=nosuch": ["nosuch", "ridge"],
            "task=nosuch.py:f": ["nosuch.py"],
            "lags=[90000,300000]": ["300000 ms", "too few"],
            "loss=some": ["loss", "mse", "cosine"],
            "controls=mena": ["mena", "mean"],
        },
    ),
    Script(
        "decode_encoding",
        "dataset={podcast} lags=[-300,300] n_folds=3 n_shifts=20 pca=4 device=cpu",
        wrong={"embedding=": ["embedding"], "channels=XX": ["no electrode", "LGA"]},
    ),
    Script(
        "warp",
        "lm={lm} models=lm,random planted_stimuli={phrases} layers=1 dims=0,4,16 seeds=1 steps=3 "
        "eval_interval=2 head_dims=4 learning_rates=0.02 draws=20 shuffles=19 device=cpu",
        wrong={
            "layers=9": ["no layer 9", "0 (embeddings) to 2"],
            "dims=0,100000000": ["d=100000000"],
            "objective=some": ["objective", "linear or linear_first or rsa or cka"],
        },
    ),
    Script(
        "init_pos",
        "scheme=swap n_layer=1 n_head=2 n_embd=16 radius=2 init_data={data} samples=512 "
        "block_size=16 device=cpu positions_dir={data}/positions overwrite=True",
        wrong={
            "n_embd=18": ["n_embd=18", "square"],
            "samples=100000": ["samples=100000", "init_data="],
            "radius=9": ["radius=9"],
        },
    ),
]
TRAINING = [script for script in SCRIPTS if script.trains]
ONE_AND_SLOW = [TRAINING[0], *[pytest.param(s, marks=pytest.mark.slow) for s in TRAINING[1:]]]
SWEEPS = [script for script in SCRIPTS if not script.trains and script.name != "sample"]


def each(scripts):
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.name)


def script_called(name):
    return next(script for script in SCRIPTS if script.name == name)


def options(script, given, out):
    return [option.format(**given) for option in script.options.split()] + [f"out_dir={out}"]


def make_given(folder):
    """What the options of SCRIPTS name, as {name: path}."""
    folder.mkdir(exist_ok=True)
    given = {
        "data": make_dataset(folder / "data"),
        "sentences": make_sentences(folder / "sentences"),
        "podcast": make_podcast(folder / "podcast"),
        "eeg": make_eeg(folder / "eeg", words=8, channels=4),
        "lm": folder / "lm",
        "stimuli": folder / "stimuli.csv",
        "pairs": folder / "pairs.jsonl",
        "phrases": folder / "phrases",
    }
    lines = [f"{2 * chr(97 + i)} {chr(65 + i)},{'ab'[i % 2]}\n" for i in range(20)]
    given["stimuli"].write_text("text,condition\n" + "".join(lines))
    given["pairs"].write_text('{"sentence_good": "ab", "sentence_bad": "ba"}\n')
    given["phrases"].mkdir()
    lines = ["text,group\n"]
    for i in range(90):
        phrase = "".join(chr(97 + i // 5**k % 5) for k in range(4))
        lines.append(f"{phrase},{i // 2}\n")
    (given["phrases"] / "stimuli.csv").write_text("".join(lines))
    (given["phrases"] / "meta.yaml").write_text("format: synthetic_brain-1\n")
    return given


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    given = make_given(tmp_path_factory.mktemp("given"))
    run("train", *options(script_called("train"), given, given["lm"]), "max_iters=2")
    return given


# ---- training scripts: stopped anywhere, on any number of ranks


def state(folder):
    """Everything a checkpoint holds, without the options, and the log without its clocks."""
    saved = torch.load(folder / "ckpt.pt", map_location="cpu", weights_only=True)
    saved.pop("config")
    log = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        numbers.pop("seconds")
        numbers.pop("tokens_per_s", None)
        log.append(numbers)
    return saved, log


def same(a, b):
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_agree(a, b):
    """The same work up to the order of summation, whose rounding optimisers magnify."""
    state_a, log_a = a
    state_b, log_b = b
    assert state_a["step"] == state_b["step"]
    assert state_a.get("cursor") == state_b.get("cursor")
    for i, (x, y) in enumerate(zip(log_a, log_b, strict=True)):
        assert x.keys() == y.keys()
        for key in x:
            assert math.isclose(x[key], y[key], rel_tol=1e-5 if i < 2 else 0.06), (x, y)
    for key, value in state_a["model"].items():
        assert (value - state_b["model"][key]).abs().max() < 0.02, key


@pytest.fixture(scope="session")
def whole(given, tmp_path_factory):
    """whole(script): the folder of a run that was never stopped, made when first asked for."""
    folder = tmp_path_factory.mktemp("whole")

    def make(script):
        if not (folder / script.name).exists():
            run(script.name, *options(script, given, folder / script.name))
        return folder / script.name

    return make


def call(script, *arguments):
    """Run a script to its end in this process, with one thread as in a process of its own."""
    torch.set_num_threads(1)
    module = importlib.import_module(script.name)
    module.main(configure(module.Config, list(arguments)))


def let_go():
    """Give up the Run of a call that raised: error frames and signal handlers hold its lock."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()


# the third checkpoint is half written when the process is killed
KILLED_WHILE_SAVING = """
import os, signal, torch
saves, real = [], torch.save
def save(state, f):
    real(state, f)
    saves.append(1)
    if len(saves) == 3:
        f.truncate(f.tell() // 2)
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""


@each(TRAINING)
def test_killed_while_saving_and_resumed(script, given, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = options(script, given, folder)
    run(script.name, *arguments, patch=KILLED_WHILE_SAVING, status=-signal.SIGKILL)
    assert (folder / "ckpt.pt").exists() and list(folder.glob("*.tmp*"))
    says = ["ckpt.pt", "init_from=resume"]  # a used folder
    ends_in_a_sentence(lambda: call(script, *arguments), capsys, says)
    let_go()
    call(script, f"out_dir={folder}", "init_from=resume", "device=cpu")  # all else as it was
    assert same(state(folder), state(whole(script)))


# steps slow enough for a signal to come between two of them
SLOW = """
import time, torch
real = torch.optim.AdamW.step
torch.optim.AdamW.step = lambda *args, **kwargs: (time.sleep(0.2), real(*args, **kwargs))[1]
"""


@pytest.mark.parametrize("script", ONE_AND_SLOW, ids=lambda script: script.name)
def test_stopped_by_a_signal_and_resumed(script, given, whole, tmp_path):
    """On as many ranks, bit for bit, and on two."""
    folder = tmp_path / "run"
    log = folder / "log.jsonl"
    process = start(script.name, *options(script, given, folder), patch=SLOW)
    while not (log.exists() and '"step": 5,' in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    wanted = state(whole(script))
    assert 5 <= state(folder)[0]["step"] < wanted[0]["step"]
    two = shutil.copytree(folder, tmp_path / "two")
    run(script.name, *options(script, given, folder), "init_from=resume")
    assert same(state(folder), wanted)
    run(script.name, *options(script, given, two), "init_from=resume", ranks=2)
    assert_agree(state(two), wanted)


@each(TRAINING)
def test_two_ranks_are_one(script, given, whole, tmp_path):
    run(script.name, *options(script, given, tmp_path / "run"), ranks=2)
    assert_agree(state(tmp_path / "run"), state(whole(script)))


# the second rank dies in step 8 of the first launch
A_RANK_DIES = """
import os, signal, torch
steps, real = [], torch.optim.AdamW.step
def step(self, *args, **kwargs):
    steps.append(1)
    first_launch = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if os.environ["RANK"] == "1" and first_launch and len(steps) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)
torch.optim.AdamW.step = step
"""


@each(TRAINING[:1])
def test_two_ranks_of_which_one_dies_are_one(script, given, whole, tmp_path):
    """The launcher starts them again, and they continue from the last checkpoint."""
    folder = tmp_path / "run"
    run(script.name, *options(script, given, folder), ranks=2, restarts=1, patch=A_RANK_DIES)
    saved = torch.load(folder / "ckpt.pt", map_location="cpu", weights_only=True)
    assert saved["config"]["init_from"] == "resume"
    options_of_run = yaml.safe_load((folder / "config.yaml").read_text())
    assert options_of_run["init_from"] in ("scratch", "lm")  # it runs the same experiment again
    assert_agree(state(folder), state(whole(script)))


# ---- a full disk, and sweeps


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(modules): what they write from now on goes to a device that is always full."""

    def open_full(path, mode="r", **more):
        return open("/dev/full" if mode[0] in "wa" else path, mode, **more)

    def fill(*modules):
        for module in modules:
            monkeypatch.setattr(module, "open", open_full, raising=False)

    return fill


@each(TRAINING)
def test_a_disk_that_is_full_costs_no_checkpoint(
    script, given, whole, tmp_path, monkeypatch, capsys, full_disk
):
    real = configurator.Run.save
    saves = []

    def save(self, name, state):
        saves.append(name)
        if saves.count("ckpt.pt") == 3:
            full_disk(data)
        real(self, name, state)

    monkeypatch.setattr(configurator.Run, "save", save)
    arguments = options(script, given, tmp_path)
    says = ["ckpt.pt could not be written (No space left on device)", "init_from=resume"]
    ends_in_a_sentence(lambda: call(script, *arguments), capsys, says)
    assert not list(tmp_path.glob("*tmp*"))
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 6
    monkeypatch.undo()
    let_go()
    call(script, *arguments, "init_from=resume")
    assert same(state(tmp_path), state(whole(script)))


# killed with a row of the results half written
KILLED_IN_A_ROW = """
import configurator, os, signal
real, rows = configurator.Run.result, []
def result(self, *args, **keys):
    real(self, *args, **keys)
    rows.append(1)
    if len(rows) == LAST:
        part = self.out / f"results.part-{self.rank}.jsonl"
        os.truncate(part, part.stat().st_size - 9)
        os.kill(os.getpid(), signal.SIGKILL)
configurator.Run.result = result
"""


def table(folder):
    """results.csv in an order of its own."""
    rows = pd.read_csv(folder / "results.csv")
    measured = {"score", "chance", "low", "high", "p", "p_holm"}
    keys = [column for column in rows.select_dtypes(exclude="float") if column not in measured]
    return rows.sort_values([*keys, "score"], ignore_index=True)


@each(SWEEPS)
def test_a_sweep_that_is_stopped_anywhere_is_one_that_was_not(
    script, given, tmp_path, monkeypatch, capsys, full_disk
):
    """Stopped by a full disk at one random row, killed within another, finished by two ranks."""
    call(script, *options(script, given, tmp_path / "whole"))
    wanted = table(tmp_path / "whole")
    assert list((tmp_path / "whole").glob("*.png"))
    rng = np.random.default_rng(key_seed(script.name))
    stops = rng.integers(1, max(2, len(wanted) // 2), 2)
    real = configurator.Run.result
    rows = []

    def result(self, *args, **keys):
        rows.append(1)
        if len(rows) == stops[0]:
            full_disk(configurator)
        real(self, *args, **keys)

    monkeypatch.setattr(configurator.Run, "result", result)
    arguments = options(script, given, tmp_path / "run")
    says = ["could not be written (No space left on device): make room"]
    ends_in_a_sentence(lambda: call(script, *arguments), capsys, says)
    monkeypatch.undo()
    let_go()
    patch = KILLED_IN_A_ROW.replace("LAST", str(stops[1]))
    run(script.name, *arguments, patch=patch, status=-signal.SIGKILL)
    run(script.name, *arguments, ranks=2)
    pd.testing.assert_frame_equal(table(tmp_path / "run"), wanted, rtol=1e-4, atol=1e-5)


def test_a_folder_belongs_to_one_script(given, whole, capsys):
    folder = whole(script_called("train"))
    before = (folder / "config.yaml").read_bytes()
    arguments = options(script_called("topography"), given, folder)
    ends_in_a_sentence(lambda: call(script_called("topography"), *arguments), capsys, ["train.py"])
    let_go()
    assert (folder / "config.yaml").read_bytes() == before


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@each(TRAINING)
def test_training_on_a_gpu_is_training_on_the_cpu(script, given, tmp_path):
    """Without dropout, whose random numbers differ; products are TF32."""
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        call(script, *options(script, given, folder), "dropout=0", f"device={device}")
    call(
        script,
        *options(script, given, tmp_path / "own"),
        *["dropout=0", "device=cuda", "dtype=auto"],
    )
    wanted = state(tmp_path / "cpu")[1]
    for folder, rel in (("cuda", 0.05), ("own", 0.2)):
        for numbers, on_cpu in zip(state(tmp_path / folder)[1], wanted, strict=True):
            for key in numbers:
                if "loss" in key or "task" in key or "grad" in key:
                    assert numbers[key] == pytest.approx(on_cpu[key], rel=rel), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@each(SWEEPS)
def test_a_sweep_on_a_gpu_is_one_on_the_cpu(script, given, tmp_path):
    arguments = options(script, given, tmp_path / "cpu")
    if hasattr(importlib.import_module(script.name).Config, "dtype"):
        arguments.append("dtype=float32")
    call(script, *arguments)
    wanted = table(tmp_path / "cpu").drop(columns="options")
    call(script, *arguments, f"out_dir={tmp_path / 'gpu'}", "device=cuda")
    rows = table(tmp_path / "gpu").drop(columns="options")
    # one item of few may lie on the other side by rounding
    pd.testing.assert_frame_equal(rows, wanted, rtol=0.1, atol=0.1)
    call(script, *options(script, given, tmp_path / "own"), "device=cuda")
    assert len(table(tmp_path / "own")) == len(wanted)


# ---- bad input


def files_to_damage(name, path):
    """The files of one input of SCRIPTS that a script reads, a checkpoint by its best.pt."""
    if name == "lm":
        return [path / "best.pt"]
    files = []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        folders = {"states", "sub-02", "sub-03", "positions"} & set(file.parts)
        read = file.suffix in (".pt", ".yaml", ".csv", ".bin", ".tiktoken", ".jsonl", ".f32")
        if read and not folders and file.name != "config.yaml":
            files.append(file)
    return files


def damage(file, how):
    content = file.read_bytes()
    if how == "torn":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.write_bytes(b"\x80\x02PK\x00 no such file\n\xff" * 9)


@each(SCRIPTS)
def test_no_damaged_file_ends_in_a_traceback(script, given, tmp_path, capsys):
    """Each file that is read, in turn, half of it, nothing, or something else: it is refused in a
    sentence, or the script can do without."""
    ways = ("torn", "empty", "foreign")
    cases = []
    for name, path in given.items():
        if f"{{{name}}}" not in script.options:
            continue
        for file in files_to_damage(name, path):
            some = ways if file.suffix == ".pt" else [ways[len(cases) % 3]]
            cases += [(name, path, file, how) for how in some]
    n_refused = 0
    for number, (name, path, file, how) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        copy = folder / name
        if path.is_dir():
            shutil.copytree(path, copy)
            target = copy / file.relative_to(path)
        else:
            target = shutil.copy(path, copy)
        damage(target, how)
        try:
            call(script, *options(script, {**given, name: copy}, folder / "out"))
        except Exception as error:
            sentence = sentence_of(error, capsys)
            assert target.name in sentence or str(copy) in sentence, sentence
            n_refused += 1
    assert n_refused >= 2


@each(SCRIPTS)
def test_bad_options_are_refused(script, given, tmp_path, capsys):
    """One as the user sees it, the others by the error that they raise in this process."""
    if script is SCRIPTS[0]:
        arguments = options(script, given, tmp_path / "process")
        refused(script.name, *arguments, "sede=1", says=["'sede'", "'seed'"])
    cases = {"sede=1": ["'sede'", "'seed'"], "seed=high": ["'seed'", "int"]}
    cases["nosuch.yaml"] = ["nosuch.yaml"]
    if "lm={lm}" in script.options:
        cases["lm=out/nosuch"] = ["nosuch", "python train.py"]
    if "dataset={" in script.options:
        cases["dataset=nosuch"] = ["nosuch"]
    cases |= script.wrong
    for i, (case, says) in enumerate(cases.items()):
        arguments = [*options(script, given, tmp_path / str(i)), case]
        ends_in_a_sentence(lambda: call(script, *arguments), capsys, says)  # noqa: B023
