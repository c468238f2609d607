"""What every script owes its user, one row a script: it goes on after any kill as if never stopped, gives the same on 1 and on 2 ranks, refuses bad
options and a used folder with one sentence. A new script adds a row to SCRIPTS."""
import importlib
import json
import shutil
import signal
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from configurator import configure
from helpers import make_dataset, make_eeg, make_podcast, make_sentences, refused, run, start


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
    Script("telepath", ["lm={lm}", "dataset={eeg}", "t_end=0.4", "prompt=T", "jitter=0.02", "patch=10", "width=16", "virtual=4", "encoder_layers=1",
                        "batch_size=2", "trials_per_step=8", "max_iters=12", "eval_interval=4", "save_interval=3", "log_interval=1", "warmup_iters=2",
                        "eval_trials=12", "shuffles=10", "max_new_tokens=2", "augment.pink=0.5", "synonyms=True", "device=cpu", "dtype=float32"],
           trains=True, wrong={"lm=out/nosuch": ["nosuch", "python train.py"], "dataset=nosuch": ["nosuch", "synthetic_eeg"], "augment.hum=1": ["hum", "pink"],
                               "stage=dpo": ["init_from=out/telepath"], "fusion=sum": ["fusion", "cross"], "t_start=90": ["empty"],
                               "encoder=pretrained": ["checkpoint="], "patch=99": ["patch=99"], "train=some": ["train", "lm_last_k"]}),
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
                  "loss=some": ["loss", "mse or cosine or infonce"]}),
    Script("warp", ["lm={lm}", "models=lm,lm~random", "planted_stimuli={phrases}", "layers=1", "dims=0,4,16", "seeds=1", "steps=3", "eval_interval=2",
                    "planted_units=12", "head_dims=4", "planted_components=4", "learning_rates=0.02", "draws=20", "fits_per_batch=1", "device=cpu"],
           wrong={"lm=out/nosuch": ["nosuch", "python train.py"], "layers=9": ["'9'", "0 to 2"], "dims=0,100000000": ["d=100000000"],
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
        assert x.keys() == y.keys() and all(np.isclose(x[k], y[k], rtol=1e-5 if i < 2 else 0.02) for k in x), (x, y)
    for k in state_a["model"]:
        assert (state_a["model"][k] - state_b["model"][k]).abs().max() < 0.02, k
    return True


@pytest.fixture(scope="session")
def whole(given, tmp_path_factory):
    """Each training script's run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    for script in TRAINING:
        run(script.name, *options(script, given, folder / script.name))
    return folder


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
    assert (tmp_path / "run/ckpt.pt").exists() and list((tmp_path / "run").glob("*.tmp"))
    refused(script.name, *given_options, says=["ckpt.pt", "init_from=resume"])  # and a used folder is refused
    run(script.name, *given_options, "init_from=resume")
    assert same(state(tmp_path / "run"), state(whole / script.name))  # bit for bit


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
    assert 5 <= torch.load(folder / "ckpt.pt", weights_only=True)["step"] < state(whole / script.name)[0]["step"]
    two = shutil.copytree(folder, tmp_path / "two")
    run(script.name, *options(script, given, folder), "init_from=resume")
    assert same(state(folder), state(whole / script.name))  # bit for bit
    run(script.name, *options(script, given, two), "init_from=resume", ranks=2)
    assert agree(state(two), state(whole / script.name))  # on another number of ranks


@pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.name)
def test_two_ranks_are_one(script, given, whole, tmp_path):
    run(script.name, *options(script, given, tmp_path / "run"), ranks=2)
    assert agree(state(tmp_path / "run"), state(whole / script.name))


@pytest.mark.parametrize("script", [s for s in SCRIPTS if not s.trains and s.name != "sample"], ids=lambda s: s.name)
def test_it_runs_and_runs_again(script, given, tmp_path):
    tables = []
    for _ in range(2):
        run(script.name, *options(script, given, tmp_path / "run"))
        tables.append((tmp_path / "run/results.csv").read_text())
    assert tables[0] == tables[1] and list((tmp_path / "run").glob("*.png"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_bad_options_are_refused(script, given, tmp_path):
    cases = {"sede=1": ["'sede'", "'seed'"], "seed=high": ["'seed'", "int"], "nosuch.yaml": ["nosuch.yaml"], **script.wrong}
    for i, (case, words) in enumerate(cases.items()):
        given_options = options(script, given, tmp_path / "run")
        if i in (0, 3):  # as the user sees it; the others by the sentence that they raise, without a process each
            refused(script.name, *given_options, case, says=words)
            continue
        module = importlib.import_module(script.name)
        with pytest.raises((ValueError, OSError)) as error:
            module.main(configure(module.Config, [*given_options, case]))
        assert all(word in str(error.value) for word in words), str(error.value)


def test_sample_writes_the_same_text_twice(given, tmp_path):
    script = next(s for s in SCRIPTS if s.name == "sample")
    texts = [run("sample", *options(script, given, tmp_path / str(i)))[0] for i in (0, 1)]
    assert texts[0] == texts[1] and texts[0].count("ab") == 2
    assert (tmp_path / "0/samples.txt").read_text() == (tmp_path / "1/samples.txt").read_text()
