"""What every script owes its user, one row a script: it goes on after any kill as if never stopped, gives the same on 1 and on 2 ranks, refuses bad
options and a used folder with one sentence. A new script adds a row to SCRIPTS."""
import dataclasses
import gc
import importlib
import json
import shutil
import signal
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import ends_in_a_sentence, make_dataset, make_eeg, make_podcast, make_sentences, refused, run, sentence_of, start

import configurator
from configurator import configure, key_seed


@dataclass
class Script:
    name: str
    options: list                 # a run of seconds; {data} is the tiny dataset, {lm} a tiny trained language model
    trains: bool = False          # writes ckpt.pt and resumes from it
    wrong: dict = field(default_factory=dict)  # options of its own that it must refuse: {option: words of the sentence}


SCRIPTS = [
    Script("train", ["dataset={data}", "batch_size=2", "block_size=16", "n_layer=2", "n_head=2", "n_embd=16", "radius=2", "windows=2", "alpha=1", "dropout=0.1",
                     "tokens_per_step=128", "max_iters=12", "eval_interval=4", "eval_batches=4", "save_interval=3", "log_interval=1", "warmup_iters=2",
                     "compile=False", "device=cpu", "dtype=float32", "baseline_tokens=0"],
           trains=True, wrong={"optimizer=sgd": ["optimizer", "adamw or muon"]}),
    Script("finetune", ["lm={lm}", "dataset={sentences}", "task=letter", "batch_size=2", "texts_per_step=8", "alpha_scale=0.5", "dropout=0.1",
                        "max_iters=12", "eval_interval=4", "save_interval=3", "log_interval=1", "warmup_iters=2", "patience=0", "resamples=10",
                        "device=cpu", "dtype=float32"],
           trains=True, wrong={"lm=out/nosuch": ["nosuch", "python train.py"], "task=nosuch": ["nosuch", "letter"],
                               "mode=some": ["mode", "full or head or last_k"], "dataset=nosuch": ["nosuch"],
                               "init_from=gpt2": ["init_from", "lm or resume"]}),
    Script("telepath", ["lm={lm}", "dataset={eeg}", "t_end=0.4", "prompt=T", "jitter=0.02", "patch=10", "width=16", "encoder_layers=1",
                        "batch_size=2", "trials_per_step=8", "max_iters=12", "eval_interval=4", "save_interval=3", "log_interval=1", "warmup_iters=2",
                        "eval_trials=12", "shuffles=10", "max_new_tokens=2", "augment=pink", "augment_share=0.5", "synonyms=True", "device=cpu",
                        "dtype=float32"],
           trains=True, wrong={"lm=out/nosuch": ["nosuch", "python train.py"], "dataset=nosuch": ["nosuch", "synthetic_eeg"], "augment=hum": ["hum", "pink"],
                               "stage=dpo": ["init_from=out/telepath"], "fusion=sum": ["fusion", "cross"], "t_start=90": ["empty"],
                               "encoder=pretrained": ["pretrained:out/foundation"], "patch=99": ["patch=99"], "train=some": ["train", "encoder+expert"]}),
    Script("foundation", ["dataset={podcast}", "width=16", "n_embd=8", "n_layer=1", "n_head=2", "degree=1", "decoder_width=16", "decoder_layers=1",
                          "dropout=0.1", "batch_size=2", "windows_per_step=8", "max_iters=12", "eval_interval=4", "save_interval=3", "log_interval=1",
                          "warmup_iters=2", "eval_windows=12", "bootstraps=10", "device=cpu", "dtype=float32"],
           trains=True, wrong={"dataset=nosuch": ["nosuch", "synthetic_podcast"], "window=60": ["window=60", "110.0 s"], "mask_ratio=1": ["mask_ratio=1"],
                               "patch=5": ["patch=5", "does not divide"], "masks=some": ["masks", "random, tube, span"], "grid=8x8": ["grid=8x8", "G1"],
                               "subjects=9": ["subjects", "nobody"], "channels=XX": ["channels=XX"], "sfreq=512": ["512", "128 Hz"],
                               "bands=[[70,90]]": ["90 Hz"]}),
    Script("sample", ["lm={lm}", "prompt=ab", "max_new_tokens=8", "num_samples=2", "device=cpu"],
           wrong={"lm=out/nosuch": ["nosuch", "python train.py"], "file=nosuch.txt": ["nosuch.txt"]}),
    Script("topography", ["lm={lm}", "stimuli={stimuli}", "pairs={pairs}", "dataset={data}", "shuffles=10", "ablate=[2]", "random_sets=1", "val_batches=1",
                          "device=cpu"],
           wrong={"lm=out/nosuch": ["nosuch", "python train.py"], "stimuli=nosuch": ["nosuch"], "contrasts=a>q": ["'q'", "there are a, b"],
                  "contrasts=a": ["A>B"], "pairs=nosuch": ["nosuch"], "sweep=nosuch": ["nosuch", "results.csv"]}),
    Script("probe", ["lm={lm}", "dataset={sentences}/letter", "n_folds=4", "train_sizes=[40]", "probe=[LDA, Logistic, SingleLayer]", "cache={data}/states",
                     "device=cpu"],
           wrong={"lm=out/nosuch": ["nosuch", "python train.py"], "dataset=nosuch.json": ["nosuch.json", "get_data.py"],
                  "layers=[9]": ["no layer 9", "0 (embeddings) to 2"]}),  # more in tests/test_probe.py
    Script("decode", ["dataset={podcast}", "lags=[-300,300]", "n_folds=3", "n_shifts=20", "pca=4", "epochs=2", "min_count=2", "device=cpu",
                      "model_params.conv_filters=4", "model_params.num_models=2"],
           wrong={"subjects=7": ["has no 7", "sub-01, sub-02"], "channels=XX": ["no electrode", "LGA"], "model=nosuch": ["nosuch", "ridge"],
                  "dataset=nosuch": ["nosuch"], "task=nosuch.py:f": ["nosuch.py"], "lags=[90000,300000]": ["at lag 300000 ms"],
                  "loss=some": ["loss", "mse", "cosine"], "controls=mena": ["mena", "mean"]}),
    Script("decode_encoding", ["dataset={podcast}", "lags=[-300,300]", "n_folds=3", "n_shifts=20", "pca=4", "device=cpu"],
           wrong={"embedding=": ["embedding"], "channels=XX": ["no electrode", "LGA"], "dataset=nosuch": ["nosuch"]}),
    Script("warp", ["lm={lm}", "models=lm,random", "planted_stimuli={phrases}", "layers=1", "dims=0,4,16", "seeds=1", "steps=3", "eval_interval=2",
                    "head_dims=4", "learning_rates=0.02", "draws=20", "shuffles=19", "device=cpu"],
           wrong={"lm=out/nosuch": ["nosuch", "python train.py"], "layers=9": ["no layer 9", "0 (embeddings) to 2"], "dims=0,100000000": ["d=100000000"],
                  "objective=some": ["objective", "linear or linear_first or rsa or cka"]}),
    Script("init_pos", ["scheme=swap", "n_layer=1", "n_head=2", "n_embd=16", "radius=2", "init_data={data}", "samples=512", "block_size=16", "device=cpu",
                        "positions_dir={data}/positions", "overwrite=True"],
           wrong={"n_embd=18": ["n_embd=18", "square"], "samples=100000": ["samples=100000", "init_data="], "radius=9": ["radius=9"]}),
]
TRAINING = [s for s in SCRIPTS if s.trains]


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    make_dataset(folder / "data")
    train = next(s for s in SCRIPTS if s.name == "train")
    run("train", *[o.format(data=folder / "data") for o in train.options], "max_iters=2", f"out_dir={folder / 'lm'}")
    (folder / "stimuli.csv").write_text("text,condition\n" + "".join(f"{2 * chr(97 + i)} {chr(65 + i)},{'ab'[i % 2]}\n" for i in range(20)))
    (folder / "pairs.jsonl").write_text('{"sentence_good": "ab", "sentence_bad": "ba"}\n')
    make_sentences(folder / "sentences")
    make_podcast(folder / "podcast")
    make_eeg(folder / "eeg", words=8, channels=4)
    (folder / "phrases").mkdir()
    phrases = ("".join(chr(97 + i // 5 ** k % 5) for k in range(4)) for i in range(90))
    (folder / "phrases/stimuli.csv").write_text("text,group\n" + "".join(f"{text},{i // 2}\n" for i, text in enumerate(phrases)))
    (folder / "phrases/meta.yaml").write_text("format: synthetic_brain-1\n")
    return dict(data=folder / "data", lm=folder / "lm", sentences=folder / "sentences", stimuli=folder / "stimuli.csv", pairs=folder / "pairs.jsonl",
                podcast=folder / "podcast", eeg=folder / "eeg", phrases=folder / "phrases")


def options(script, given, out):
    return [o.format(**given) for o in script.options] + [f"out_dir={out}"]


def state(folder):
    """Everything a checkpoint holds, without the options, and the log without its clocks."""
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    saved.pop("config")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return saved, [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]


def same(a, b):
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def agree(a, b):
    """The same work up to float summation order: equal to rounding in the first step, which adaptive optimisers then magnify step by step."""
    (state_a, log_a), (state_b, log_b) = a, b
    assert (state_a["step"], state_a.get("cursor")) == (state_b["step"], state_b.get("cursor"))
    for i, (x, y) in enumerate(zip(log_a, log_b, strict=True)):
        assert x.keys() == y.keys() and all(np.isclose(x[k], y[k], rtol=1e-5 if i < 2 else 0.06) for k in x), (x, y)
    for k in state_a["model"]:
        assert (state_a["model"][k] - state_b["model"][k]).abs().max() < 0.02, k
    return True


@pytest.fixture(scope="session")
def whole(given, tmp_path_factory):
    """The folder of a training script's run that was never stopped, made when first asked for."""
    folder = tmp_path_factory.mktemp("whole")

    def of(script):
        if not (folder / script.name).exists():
            run(script.name, *options(script, given, folder / script.name))
        return folder / script.name
    return of


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


@pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.name)
def test_killed_while_saving_and_resumed(script, given, whole, tmp_path):
    given_options = options(script, given, tmp_path / "run")
    run(script.name, *given_options, patch=KILLED_WHILE_SAVING, status=-signal.SIGKILL)
    assert (tmp_path / "run/ckpt.pt").exists() and list((tmp_path / "run").glob("*.tmp*"))
    refused(script.name, *given_options, says=["ckpt.pt", "init_from=resume"])  # and a used folder is refused
    run(script.name, *given_options, "init_from=resume")
    assert same(state(tmp_path / "run"), state(whole(script)))  # bit for bit


# steps slow enough for a signal to come between two of them
SLOW = """
import time, torch
real = torch.optim.AdamW.step
torch.optim.AdamW.step = lambda *args, **kwargs: (time.sleep(0.2), real(*args, **kwargs))[1]
"""


@pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.name)
def test_stopped_by_a_signal_and_resumed(script, given, whole, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "run/log.jsonl"
    process = start(script.name, *options(script, given, folder), patch=SLOW)
    while not (log.exists() and '"step": 5,' in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert 5 <= torch.load(folder / "ckpt.pt", weights_only=True)["step"] < state(whole(script))[0]["step"]
    two = shutil.copytree(folder, tmp_path / "two")
    run(script.name, *options(script, given, folder), "init_from=resume")
    assert same(state(folder), state(whole(script)))  # bit for bit
    run(script.name, *options(script, given, two), "init_from=resume", ranks=2)
    assert agree(state(two), state(whole(script)))  # on another number of ranks


@pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.name)
def test_two_ranks_are_one(script, given, whole, tmp_path):
    run(script.name, *options(script, given, tmp_path / "run"), ranks=2)
    assert agree(state(tmp_path / "run"), state(whole(script)))


# the second rank dies in step 8 of the first launch
A_RANK_DIES = """
import os, signal, torch
steps, real = [], torch.optim.AdamW.step
def step(self, *args, **kwargs):
    steps.append(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(steps) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)
torch.optim.AdamW.step = step
"""


@pytest.mark.parametrize("script", TRAINING[:1], ids=lambda s: s.name)
def test_two_ranks_of_which_one_dies_are_one(script, given, whole, tmp_path):
    """The launcher starts them again, and they go on from the last checkpoint, not from the first step."""
    run(script.name, *options(script, given, tmp_path / "run"), ranks=2, restarts=1, patch=A_RANK_DIES)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["init_from"] == "resume"
    assert agree(state(tmp_path / "run"), state(whole(script)))


def called(script, *given_options):
    """Run a script to its end in this process, with one thread as in a process of its own."""
    torch.set_num_threads(1)
    module = importlib.import_module(script.name)
    module.main(configure(module.Config, list(given_options)))


def let_go():
    """End a run that raised in this process: the frames of its error and its signal handlers hold the Run, and that the lock of its folder."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    gc.collect()


@pytest.fixture
def full_disk(monkeypatch):
    """From full_disk() on, what the shared files write finds no room: really, on Linux's device that is always full."""
    def fill(*modules):
        for module in modules:
            monkeypatch.setattr(module, "open", lambda path, mode="r", **more: open("/dev/full" if mode[0] in "wa" else path, mode, **more), raising=False)
    return fill


@pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.name)
def test_a_disk_that_is_full_costs_no_checkpoint(script, given, whole, tmp_path, monkeypatch, capsys, full_disk):
    import data
    real, saves = configurator.Run.save, []

    def save(self, name, state):
        saves.append(name)
        if saves.count("ckpt.pt") == 3:
            full_disk(data)
        real(self, name, state)
    monkeypatch.setattr(configurator.Run, "save", save)
    given_options = options(script, given, tmp_path)
    ends_in_a_sentence(lambda: called(script, *given_options), capsys, ["ckpt.pt could not be written (No space left on device)", "init_from=resume"])
    saved = sorted(p.name for p in tmp_path.glob("*.pt*"))
    assert "ckpt.pt" in saved and not any("tmp" in name for name in saved)
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 6
    monkeypatch.undo()
    let_go()
    called(script, *given_options, "init_from=resume")
    assert same(state(tmp_path), state(whole(script)))  # bit for bit


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
    """results.csv by its keys, in any order of rows, and its numbers, rounded to what another order of summation may change."""
    found = pd.read_csv(folder / "results.csv")
    numbers = [c for c in found if c in ("score", "chance", "low", "high", "p", "p_holm") or found[c].dtype.kind == "f"]
    return found.sort_values([c for c in found if c not in numbers] + ["score"], ignore_index=True)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if not s.trains and s.name != "sample"], ids=lambda s: s.name)
def test_a_sweep_that_is_stopped_anywhere_is_one_that_was_not(script, given, tmp_path, monkeypatch, capsys, full_disk):
    """Stopped by a full disk at one random row, killed within another, then finished by two ranks."""
    called(script, *options(script, given, tmp_path / "whole"))
    want = table(tmp_path / "whole")
    assert list((tmp_path / "whole").glob("*.png"))
    rng = np.random.default_rng(key_seed(script.name))
    stops, rows, real = rng.integers(1, max(2, len(want) // 2), 2), [], configurator.Run.result

    def result(self, *args, **keys):
        rows.append(1)
        if len(rows) == stops[0]:
            full_disk(configurator)
        real(self, *args, **keys)
    monkeypatch.setattr(configurator.Run, "result", result)
    given_options = options(script, given, tmp_path / "run")
    ends_in_a_sentence(lambda: called(script, *given_options), capsys, ["could not be written (No space left on device): make room"])
    monkeypatch.undo()
    let_go()
    run(script.name, *given_options, patch=KILLED_IN_A_ROW.replace("LAST", str(stops[1])), status=-signal.SIGKILL)
    run(script.name, *given_options, ranks=2)
    pd.testing.assert_frame_equal(table(tmp_path / "run"), want, rtol=1e-4, atol=1e-5)


def fields(Config):
    kinds = typing.get_type_hints(Config)
    return [(f, kinds[f.name]) for f in dataclasses.fields(Config)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_no_option_takes_a_wrong_type_or_range(script, tmp_path, capsys):
    """Every option of the script, from the command line and from a file."""
    Config, path = importlib.import_module(script.name).Config, tmp_path / "options.yaml"
    bomb = "\n".join(f"  {chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(12))
    for option, kind in fields(Config):
        wrong = {int: ["x", "1.5", "true", "nan", "[1]"], float: ["x", "true", "nan", "[1]"], bool: ["maybe", "2", "[]"], dict: ["3", "[1]"]}.get(kind, [])
        if typing.get_origin(kind) is typing.Literal:
            wrong = ["nosuch", "[]"]
        elif typing.get_origin(kind) is list and kind.__args__[0] in (int, float):
            wrong = ["[x]", "[[1]]", "[nan]", "{a: 1}"]
        elif typing.get_origin(kind) not in (list, None) and kind.__args__[0] in (int, float):
            wrong = ["x", "[1]"]
        number = option.default if isinstance(option.default, (int, float)) and kind in (int, float) else None
        if number is not None:
            wrong += ["0"] * (option.name in getattr(Config, "POSITIVE", "").split()) + ["1.5"] * (option.name in getattr(Config, "SHARES", "").split())
            wrong += ["-1"] * (number >= 0 and option.name not in getattr(Config, "SIGNED", "").split()) + ["inf"] * (number != float("inf"))
        for value in wrong:
            ends_in_a_sentence(lambda: configure(Config, [f"{option.name}={value}"]), capsys, [option.name])  # noqa: B023
        for value in ("{a: {b: 1}}", "!!python/object/apply:os.getcwd []", f"\n  a: &a [x, x, x, x, x, x, x, x, x]\n{bomb}"):
            if kind is not dict or value[0] != "{":
                path.write_text(f"{option.name}: {value}\n")
                ends_in_a_sentence(lambda: configure(Config, [str(path)]), capsys)


def damaged(path, how):
    content = path.read_bytes()
    path.write_bytes({"torn": content[:len(content) // 2], "empty": b"", "foreign": b"\x80\x02PK\x00 no such file\n\xff" * 9}[how])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_no_damaged_file_ends_in_a_traceback(script, given, tmp_path, monkeypatch, capsys):
    """Each file that the script is given, in turn: half of it, nothing, or something else. It is refused in a sentence, or can be done without."""
    keys = [key for key in given if any(f"{{{key}}}" in o for o in script.options)]
    hows, refusals, number = ("torn", "empty", "foreign"), 0, 0
    for key in keys:
        files = sorted(p.relative_to(given[key].parent) for p in ([given[key]] if given[key].is_file() else given[key].rglob("*")) if p.is_file())
        files = [f for f in files if f.suffix in (".pt", ".yaml", ".csv", ".bin", ".tiktoken", ".jsonl", ".f32") and "config.yaml" != f.name
                 and "states" not in f.parts and "sub-02" not in f.parts and "sub-03" not in f.parts and "positions" not in f.parts]
        if key == "lm":
            files = [f for f in files if f.name == "best.pt"]
        for file in files:
            for how in hows if file.suffix in (".pt", ".npz") else [hows[number % 3]]:
                copy = tmp_path / str(number)
                number += 1
                shutil.copytree(given[key], copy / key) if given[key].is_dir() else shutil.copy(given[key], copy.mkdir() or copy / key)
                target = copy / key / Path(*file.parts[1:]) if given[key].is_dir() else copy / key
                damaged(target, how)
                here = {**given, key: copy / key}
                try:
                    called(script, *options(script, here, copy / "out"))
                except Exception as e:
                    error = e
                else:
                    continue
                refusals += 1
                said = sentence_of(error, capsys)
                assert target.name in said or str(copy) in said, said
    assert refusals >= 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_bad_options_are_refused(script, given, tmp_path, capsys):
    cases = {"sede=1": ["'sede'", "'seed'"], "seed=high": ["'seed'", "int"], "nosuch.yaml": ["nosuch.yaml"], **script.wrong}
    for i, (case, words) in enumerate(cases.items()):
        given_options = options(script, given, tmp_path / str(i))
        if i == 0:  # as the user sees it; the others by the sentence that they raise, without a process each
            refused(script.name, *given_options, case, says=words)
        else:
            ends_in_a_sentence(lambda: called(script, *given_options, case), capsys, words)  # noqa: B023


def test_sample_writes_the_same_text_twice(given, tmp_path):
    script = next(s for s in SCRIPTS if s.name == "sample")
    texts = [run("sample", *options(script, given, tmp_path / str(i)))[0] for i in (0, 1)]
    assert texts[0] == texts[1] and texts[0].count("ab") == 2
    assert (tmp_path / "0/samples.txt").read_text() == (tmp_path / "1/samples.txt").read_text()
