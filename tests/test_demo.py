"""The demo: a plan that fits the machine, stages that continue, a page that tells what is there."""

import importlib
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import ROOT, ends_in_a_sentence, start
from test_scripts import SCRIPTS, make_given

import demo
from configurator import Run, configure

DEMO = yaml.safe_load((ROOT / "config/demo.yaml").read_text())

# a script that leaves what ours leave, without torch; its starts stand in count.txt, a line each
STEP = """
import signal, sys, time
from pathlib import Path

options = dict(argument.split("=", 1) for argument in sys.argv[1:])
out = Path(options["out_dir"])
out.mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: ((out / "saved").touch(), sys.exit(143)))
(out / "config.yaml").write_text(f"# command: step.py {' '.join(sys.argv[1:])}" + chr(10))
(out / "ckpt.pt").touch()
with open(out / "count.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + chr(10))
print("step 1 of 1", flush=True)
time.sleep(float(options.get("waits", 0)))
if "fails" in options:
    print("error:", options["fails"], file=sys.stderr)
    sys.exit(2)
(out / "results.csv").write_text("score" + chr(10) + "0.5" + chr(10))
"""


@pytest.fixture
def steps(tmp_path):
    """Two stages of a tiny script, the second reads what the first leaves. write() sets options."""
    (tmp_path / "step.py").write_text(STEP)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/machine.json").write_text('{"slowness": 1.0}')

    def write(first="", second=""):
        one = f"{tmp_path}/step.py out_dir={tmp_path}/a {first}"
        two = f"{tmp_path}/step.py lm={tmp_path}/a out_dir={tmp_path}/b {second}"
        stages = [
            {"name": "one", "seconds": 60, "run": [one]},
            {"name": "two", "seconds": 1, "run": [two]},
        ]
        (tmp_path / "stages.yaml").write_text(yaml.safe_dump({"stages": stages}))

    write()
    return tmp_path, write


def go(folder, capfd, status=0):
    """The demo in this process, its jobs in theirs. Returns what it printed."""
    config = configure(demo.Config, [f"{folder}/stages.yaml", f"out_dir={folder}/demo"])
    with pytest.raises(SystemExit) as end:
        demo.main(config)
    assert end.value.code == status
    return capfd.readouterr().out


def starts(folder):
    """The options of every start of both scripts."""
    counts = []
    for name in "ab":
        file = folder / name / "count.txt"
        counts.append(file.read_text().splitlines() if file.exists() else [])
    return counts


def n_starts(folder):
    return [len(options) for options in starts(folder)]


# ---- running


def test_what_is_finished_is_not_run_again_and_what_changed_is(steps, capfd):
    folder, write = steps
    out = go(folder, capfd)
    assert n_starts(folder) == [1, 1]
    assert "a | step 1 of 1" in out and "about 1 minutes in all" in out
    assert "0 of 2 stages to go" in go(folder, capfd)
    assert n_starts(folder) == [1, 1]
    write(second="size=2")  # other options: this one alone, from the start
    go(folder, capfd)
    assert n_starts(folder) == [1, 2]
    assert starts(folder)[1][-1].endswith("size=2 overwrite=True")
    write(first="size=3", second="size=2")  # what it reads is another now
    go(folder, capfd)
    assert n_starts(folder) == [2, 3]
    (folder / "b/results.csv").unlink()  # half done
    go(folder, capfd)
    assert starts(folder)[1][-1].endswith("init_from=resume")
    (folder / "b/config.yaml").write_text("# command: step.py by hand\n")
    os.utime(folder / "b/results.csv")
    go(folder, capfd)
    assert n_starts(folder) == [2, 5]


def test_a_failing_stage_ends_with_its_sentence_and_status(steps, capfd):
    folder, write = steps
    write(second="'fails=the <disk> is full'")
    out = go(folder, capfd, status=2)
    assert "error: the <disk> is full" in out and "two ended with status 2" in out
    page = (folder / "demo/report.html").read_text()
    assert "fails=the &lt;disk&gt; is full" in page and "<disk>" not in page
    assert "Not finished" in page


def test_an_interrupted_demo_continues(steps, capfd):
    """Stopped by a signal, it lets the scripts save, and resumes what they had begun."""
    folder, write = steps
    write(first="waits=60")
    process = start("demo", f"{folder}/stages.yaml", f"out_dir={folder}/demo")
    end = time.time() + 60
    while not (folder / "a/count.txt").exists():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err, err
    assert (folder / "a/saved").exists()
    config = folder / "a/config.yaml"
    config.write_text(config.read_text().replace(" waits=60", ""))
    write()
    go(folder, capfd)
    assert n_starts(folder) == [2, 1]
    assert starts(folder)[0][-1].endswith("init_from=resume")


# ---- the plan


@pytest.fixture
def plan(tmp_path):
    """plan(slowness, **options): the stages of config/demo.yaml on such a machine."""

    def make(slowness, **options):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()
        (out / "machine.json").write_text(json.dumps({"slowness": slowness}))
        config = replace(demo.Config(**DEMO), out_dir=str(out), **options)
        return demo.make_stages(Run(config), config)

    return make


def total_minutes(stages):
    return sum(stage.seconds for stage in stages) / 60


def test_the_plan_fits_the_machine(plan):
    for slowness in (0.3, 0.6, 1.0, 1.5, 2.0):
        stages, sentence = plan(slowness, dtype="float32")
        assert total_minutes(stages) == pytest.approx(17, abs=0.3)
        assert ("smaller" in sentence) == any("max_texts=1000" in j.command for j in stages[4].jobs)
    assert total_minutes(plan(1.0, dtype="bfloat16")[0]) == pytest.approx(10, abs=0.3)
    assert total_minutes(plan(1.0, minutes=40)[0]) == pytest.approx(40, abs=0.3)
    fast, slow = (plan(slowness, dtype="float32")[0] for slowness in (0.5, 3.0))
    assert fast[1].seconds > slow[1].seconds  # training gets less
    assert "dtype=float32" in fast[1].jobs[0].command
    ours, twin = (re.search(r"max_iters=\d+", job.command)[0] for job in fast[1].jobs)
    assert ours == twin  # what is compared was trained for as long


def test_the_machine_is_measured_once(tmp_path):
    run = Run(demo.Config(out_dir=str(tmp_path)))
    slowness = demo.measure(run)
    assert slowness > 0 and demo.measure(run) == slowness


def test_every_command_of_the_demo_can_be_typed(plan):
    """With the options of a fast machine and of a slow one."""
    for stage in plan(0.5)[0] + plan(2.0)[0]:
        for job in stage.jobs:
            if job.script != "prepare.py":
                Config = importlib.import_module(job.script[:-3]).Config
                assert configure(Config, job.words[1:]).out_dir == str(job.out)


def test_bad_stages_end_in_a_sentence(steps, capsys):
    folder, _ = steps

    def main(stage):
        options = [f"stages={json.dumps([stage])}", f"out_dir={folder}/demo"]
        demo.main(configure(demo.Config, options))

    ends_in_a_sentence(lambda: main({"a": 1}), capsys, ["'stages'", "seconds"])
    stage = {"name": "a", "seconds": 1, "run": ["nosuch.py x=1"]}
    ends_in_a_sentence(lambda: main(stage), capsys, ["no script nosuch.py"])


# ---- the page, from tiny runs of the scripts themselves


def tiny_commands(folder):
    """The commands of the tiny runs, without the options of SCRIPTS: each model's through all."""
    commands = [
        f"train max_iters=2 out_dir={folder}/train",
        f"train alpha=0 max_iters=2 out_dir={folder}/train_alpha0",
        f"topography contrasts='sentences>nonwords' twin={folder}/train_alpha0 "
        f"out_dir={folder}/topography",
        f"init_pos out_dir={folder}/init_pos",
        f"foundation out_dir={folder}/foundation",
    ]
    for end, baselines in (("", "layer0,random_init"), ("_alpha0", "layer0")):
        lm = f"lm={folder}/train{end}"
        commands += [
            f"sample {lm} prompt=a<b> out_dir={folder}/sample{end}",
            f"probe {lm} probe=LDA train_sizes= baselines={baselines} out_dir={folder}/probe{end}",
            f"decode {lm} embedding=lm layer=1 model=ridge model_params={{}} beside= lags=300 "
            f"out_dir={folder}/decode{end}",
            f"telepath {lm} max_iters=4 out_dir={folder}/telepath{end}",
            f"warp {lm} models={folder}/train,{folder}/train_alpha0 shuffled=False "
            f"out_dir={folder}/warp{end}",
        ]
    return commands


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A demo folder whose stages were run in this process at the size of seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    given = make_given(folder / "given") | {"lm": folder / "train", "pairs": folder / "pairs"}
    stimuli = given["stimuli"].read_text()
    stimuli = stimuli.replace(",a\n", ",sentences\n").replace(",b\n", ",nonwords\n")
    given["stimuli"].write_text(stimuli)
    given["pairs"].mkdir()
    for name in "pq":
        pair = f'{{"sentence_good": "ab{name}", "sentence_bad": "ba{name}"}}\n'
        (given["pairs"] / f"{name}.jsonl").write_text(pair * 4)
    options = {script.name: script.options.format(**given) for script in SCRIPTS}
    stages = []
    for i, command in enumerate(tiny_commands(folder)):
        name, rest = command.split(" ", 1)
        whole = f"{name}.py {options[name]} {rest}".replace("{", "{{").replace("}", "}}")
        stages.append({"name": f"stage <{i}>", "seconds": 9, "run": [whole]})
    text = yaml.safe_dump({"stages": stages, "sections": DEMO["sections"]})
    (folder / "stages.yaml").write_text(text)
    (folder / "demo").mkdir()
    (folder / "demo/machine.json").write_text('{"slowness": 1.0}')
    config = configure(demo.Config, [f"{folder}/stages.yaml", f"out_dir={folder}/demo"])
    config.minutes = 99  # the options as they are
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for stage in demo.make_stages(Run(config), config)[0]:
            job = stage.jobs[0]
            patch.setattr(sys, "argv", job.words)
            module = importlib.import_module(job.script[:-3])
            module.main(configure(module.Config))
            assert job.is_finished(), job.command
    return folder


def page(folder):
    options = [f"{folder}/stages.yaml", f"out_dir={folder}/demo", "report_only=True", "minutes=99"]
    with pytest.raises(SystemExit) as end:
        demo.main(configure(demo.Config, options))
    assert end.value.code == 0
    return (folder / "demo/report.html").read_text()


def test_the_page_says_what_the_tables_say(tiny):
    text = page(tiny)
    for path in re.findall(r'src="(.*?)"', text):  # relative, and there
        assert (tiny / "demo" / path).exists() and not path.startswith("/"), path
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S)
    assert len(captions) == 17
    for caption in captions[1:]:  # its null, its data and its command
        assert "Null" in caption and "<code>python " in caption, caption
        assert "<mark>synthetic" in caption or "<mark>real text" in caption, caption
    assert "stage &lt;0&gt;" in text and "stage <0>" not in text
    assert text.count("<pre>a&lt;b&gt;") == 2
    for words in ("<h2>Recordings alone", "<th>encoder</th>", "<h2>Placing", "<th>swapped</th>"):
        assert words in text
    table = pd.read_csv(tiny / "demo/results.csv")
    assert {"score", "low", "high", "chance", "n"} <= set(table) and table.n.gt(0).all()
    assert table.question.nunique() == 6
    losses, scores = [], []
    for end in ("", "_alpha0"):
        losses.append(pd.read_csv(tiny / f"train{end}/results.csv").score.iloc[-1])
        rows = pd.read_csv(tiny / f"telepath{end}/results.csv")
        rows = rows.query("set == 'trial' and metric == 'top1' and control == 'eeg'")
        scores.append(rows.score.iloc[0])
    answer = table[table.measure.str.startswith("validation loss")].set_index("model").score
    assert answer["topographic"] == pytest.approx(losses[0]) and f"{losses[0]:.3f}" in text
    assert answer["difference"] == pytest.approx(losses[0] - losses[1])
    answer = table[table.measure.str.contains("set trial")].set_index("model").score
    assert answer["difference"] == pytest.approx(scores[0] - scores[1])


def test_a_missing_picture_is_said_and_the_rest_is_shown(tiny):
    picture = tiny / "decode/lags.png"
    kept = picture.read_bytes()
    picture.unlink()
    text = page(tiny)
    picture.write_bytes(kept)
    os.utime(picture)
    assert "Not finished: <code>python decode.py" in text
    assert "<h2>Decoding" not in text and "<h2>Telepathy" in text


def test_warps_of_two_brains_are_averaged(tmp_path):
    """As warp.py writes them: d_warp of each model, and how far the second is from the first."""
    jobs = []
    for name, distances, gap in (("a", (9, 99), 1.0), ("b", (99, 99), 0.0)):
        rows = []
        for model, d in zip(("topo", "twin"), distances):
            row = {"measure": "d_warp absolute", "model": model, "score": d, "low": d, "high": d}
            rows.append({**row, "n": 50})
        rows.append({"measure": "difference of log10(1 + d_warp)", "score": gap})
        rows[-1] |= {"model": "twin - topo", "low": gap - 0.1, "high": gap + 0.2}
        folder = tmp_path / name
        folder.mkdir()
        pd.DataFrame(rows).to_csv(folder / "results.csv")
        jobs.append(demo.Job(["warp.py"], folder, [], {}))
    rows, [answer] = demo.show_warp(jobs, None)
    assert answer.models == [(1.5, 1.5, 1.5), (2, 2, 2)]
    assert answer.difference == pytest.approx((-0.5, -0.7, -0.4))
    assert "nearer with topography" in answer.verdict()
    assert len(rows) == 6


def test_verdicts_follow_from_the_interval():
    for low, high, verdict in (
        (-0.1, 0.2, "no difference that one seed can show"),
        (0, 0.2, "no difference that one seed can show"),
        (0.1, 0.2, "more can be probed with topography, in this one pair"),
        (-0.2, -0.1, "less can be probed with topography, in this one pair"),
        (-math.inf, math.inf, "too few for an interval"),
    ):
        facts = ["What can be probed?", "m", [(0.5, 0.4, 0.6)] * 2, ((low + high) / 2, low, high)]
        assert demo.Answer(*facts, 5, "tasks", 0.5, "chance").verdict() == verdict


def test_intervals():
    assert demo.mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.484, 2 + 2.484), abs=1e-3)
    groups = np.repeat([0, 1], 2)  # two objects, all or nothing
    drawn = demo.group_interval(np.tile([1, 1, 0, 0], 5), np.tile(groups, 5), 0)
    assert drawn == (0.5, 0.0, 1.0)
    assert demo.group_interval([1, 0], ["one", "one"], 0) == (0.5, -math.inf, math.inf)
    gap = demo.unpaired((3, 2, 4), (1, 0.5, 1.5))
    assert gap == pytest.approx((2, 2 - 1.118, 2 + 1.118), abs=1e-3)
