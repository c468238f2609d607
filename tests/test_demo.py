"""The demo: stages that go on where they were, and a page that says what the scripts' own tables say and no more."""
import base64
import contextlib
import importlib
import io
import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from configurator import configure
from helpers import ROOT, make_dataset, make_eeg, make_podcast, make_sentences, start
from matplotlib.figure import Figure

import demo
from test_scripts import SCRIPTS

DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")  # a picture of one pixel

# a script that leaves what all of ours leave (without importing torch, so in no time); its starts stand in count.txt, a line each
STEP = """
import signal, sys, time
from dataclasses import asdict, dataclass, field
from pathlib import Path
sys.path.insert(0, {root!r})
import yaml
from configurator import configure, hash_options

@dataclass
class Config:
    size: int = 1                # a comment
    lm: str = ""
    names: list[str] = field(default_factory=lambda: ["a"])
    fails: str = ""
    waits: float = 0.0
    init_from: str = "scratch"
    overwrite: bool = False
    out_dir: str = "out/step"

def main(config):
    out, options = Path(config.out_dir), asdict(config)
    out.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: ((out / "saved").touch(), sys.exit(143)))
    (out / "config.yaml").write_text("# code: test" + chr(10) + yaml.safe_dump(options))
    (out / "ckpt.pt").touch()
    with open(out / "count.txt", "a") as f:
        f.write(" ".join(sys.argv[1:]) + chr(10))
    print("step 1 of 1", flush=True)
    time.sleep(config.waits)
    if config.fails:
        print("error:", config.fails, file=sys.stderr)
        sys.exit(2)
    (out / "results.csv").write_text("score,chance,low,high,n,options" + chr(10) + "0.5,0,0.4,0.6,3," + hash_options(options) + chr(10))

if __name__ == "__main__":
    main(configure(Config))
"""


@pytest.fixture
def steps(tmp_path):
    """Two stages of a tiny script, the second reads what the first left; write(first=…, second=…) sets their options."""
    (tmp_path / "step.py").write_text(STEP.format(root=str(ROOT)))

    def write(first="", second=""):
        stages = [dict(name="one", budget=60, run=[f"{tmp_path}/step.py out_dir={tmp_path}/a {first}"]),
                  dict(name="two", budget=0.001, run=[f"{tmp_path}/step.py lm={tmp_path}/a out_dir={tmp_path}/b {second}"])]
        (tmp_path / "stages.yaml").write_text(yaml.safe_dump(dict(stages=stages)))
    write()
    return tmp_path, write


def go(folder, capfd, status=0):
    """The demo in this process, its stages in theirs; what it printed."""
    with pytest.raises(SystemExit) as e:
        demo.main(configure(demo.Config, [f"{folder}/stages.yaml", f"out_dir={folder}/demo"]))
    assert e.value.code == status
    return capfd.readouterr().out


def jobs_of(folder):
    return [job for _, _, some in demo.read_stages(yaml.safe_load((folder / "stages.yaml").read_text())["stages"]) for job in some]


def starts(folder):
    return [(folder / name / "count.txt").read_text().splitlines() if (folder / name / "count.txt").exists() else [] for name in "ab"]


def test_what_is_finished_is_not_run_again_and_what_changed_is(steps, capfd):
    folder, write = steps
    out = go(folder, capfd)
    assert [len(s) for s in starts(folder)] == [1, 1] and "step 1 of 1" in out and "two: 0:0" in out and "over its budget of 0:00" in out
    assert "over its budget" in (folder / "demo/report.html").read_text()
    jobs = jobs_of(folder)
    assert all(job.finished(jobs) for job in jobs) and jobs[1].inputs(jobs) == [jobs[0]] and jobs[1].options["names"] == ["a"]
    out = go(folder, capfd)
    assert [len(s) for s in starts(folder)] == [1, 1] and out.count("finished before") == 2
    write(second="size=2")  # other options: this one alone, from the start
    jobs = jobs_of(folder)
    assert [job.finished(jobs) for job in jobs] == [True, False]
    go(folder, capfd)
    assert [len(s) for s in starts(folder)] == [1, 2] and starts(folder)[1][-1].endswith("size=2 overwrite=True")
    write(first="size=3", second="size=2")  # what it reads is another now
    go(folder, capfd)
    assert [len(s) for s in starts(folder)] == [2, 3]
    (folder / "b/results.csv").unlink()  # half done: go on
    go(folder, capfd)
    assert starts(folder)[1][-1].endswith("init_from=resume")


def test_results_of_other_options_do_not_count(steps):
    folder, _ = steps
    jobs = jobs_of(folder)
    job, out = jobs[0], folder / "a"
    out.mkdir()
    (out / "config.yaml").write_text(yaml.safe_dump({**job.options, "init_from": "resume"}))  # how it was started is no option of a result
    (out / "results.csv").write_text(f"score,options\n0.5,{demo.hash_options(job.options)}-abc\n")
    assert job.finished(jobs)
    (out / "results.csv").write_text(f"score,options\n0.5,{demo.hash_options(job.options)}\n0.5,other\n")
    assert not job.finished(jobs)
    (out / "results.csv").write_text(f"score,options\n0.5,{demo.hash_options(job.options)}\n")
    os.utime(out / "results.csv", (1, 1))  # from before the last start
    assert not job.finished(jobs)


def test_a_failing_stage_ends_with_its_own_sentence_and_status(steps, capfd):
    folder, write = steps
    write(second="fails='the <disk> is full'")
    out = go(folder, capfd, status=2)
    assert "error: the <disk> is full" in out and "two ended with status 2" in out and [len(s) for s in starts(folder)] == [1, 1]
    page = (folder / "demo/report.html").read_text()
    assert "the &lt;disk&gt; is full" in page and "<disk>" not in page and "Not finished" in page  # what the command was
    assert [json.loads(line)["status"] for line in (folder / "demo/stages.jsonl").read_text().splitlines()] == [0, 2]


def test_an_interrupted_demo_goes_on(steps, capfd):
    """Stopped by a signal, it lets the scripts save, and goes on with what they had begun."""
    folder, write = steps
    write(first="waits=60")
    process, end = start("demo", f"{folder}/stages.yaml", f"out_dir={folder}/demo"), time.time() + 60
    while not (folder / "a/count.txt").exists():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and (folder / "a/saved").exists() and "Traceback" not in err, err
    (folder / "a/config.yaml").write_text((folder / "a/config.yaml").read_text().replace("waits: 60.0", "waits: 0.0"))
    write()
    go(folder, capfd)
    assert [len(s) for s in starts(folder)] == [2, 1] and starts(folder)[0][-1].endswith("init_from=resume")


def test_bad_stages():
    for stage, says in ((dict(a=1), ["'stages'", "budget"]), (dict(name="a", budget=1, run=["nosuch.py x=1"]), ["no script nosuch.py"]),
                        (dict(name="a", budget=1, run=["train.py max_itters=1"]), ["max_itters", "max_iters"])):
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            demo.read_stages([stage])
        assert all(words in str(e.value) for words in says) and "\n" not in str(e.value)
    assert [name for name, _, _ in demo.read_stages(yaml.safe_load((ROOT / "config/demo.yaml").read_text())["stages"])][:2] == ["text", "train"]


# ---- the page, from tiny runs of the scripts themselves

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The demo's stages at the size of seconds, run in this process: (folder, stages)."""
    folder = tmp_path_factory.mktemp("tiny")
    data = dict(data=make_dataset(folder / "data"), sentences=make_sentences(folder / "sentences"), podcast=make_podcast(folder / "podcast"),
                eeg=make_eeg(folder / "eeg", words=8, channels=4), lm=folder / "train", stimuli=folder / "stimuli.csv", pairs=folder / "pairs",
                phrases=folder / "phrases")
    data["stimuli"].write_text("text,condition\n" + "".join(f"{2 * chr(97 + i)} {chr(65 + i)},{('sentences', 'nonwords')[i % 2]}\n" for i in range(20)))
    data["pairs"].mkdir()
    for name in "pq":
        (data["pairs"] / f"{name}.jsonl").write_text(f'{{"sentence_good": "ab{name}", "sentence_bad": "ba{name}"}}\n' * 4)
    data["phrases"].mkdir()
    phrases = ("".join(chr(97 + i // 5 ** k % 5) for k in range(4)) for i in range(90))
    (data["phrases"] / "stimuli.csv").write_text("text,group\n" + "".join(f"{text},{i // 2}\n" for i, text in enumerate(phrases)))
    (data["phrases"] / "meta.yaml").write_text("format: synthetic_brain-1\n")
    of = {s.name: " ".join(f"'{o.format(**data)}'" for o in s.options) for s in SCRIPTS}
    twin, both = f"{folder}/train_alpha0", f"{folder}/train,{folder}/train_alpha0"
    commands = [f"train.py {of['train']} max_iters=2 out_dir={folder}/train", f"train.py {of['train']} max_iters=2 alpha=0 out_dir={twin}",
                *(f"sample.py {of['sample']} lm={lm} prompt='a<b>' out_dir={folder}/sample{end}" for lm, end in ((folder / "train", ""), (twin, "_alpha0"))),
                f"topography.py {of['topography']} contrasts='sentences>nonwords' twin={twin} out_dir={folder}/topography",
                *(f"probe.py {of['probe']} lm={lm} probe=LDA train_sizes=[] baselines={base} out_dir={folder}/probe{end}" for lm, base, end in (
                    (folder / "train", "layer0,random_init", ""), (twin, "layer0", "_alpha0"))),
                *(f"warp.py {of['warp']} lm={lm} models={both} shuffled=False out_dir={out}" for lm, out in (
                    (folder / "train", folder / "warp"), (twin, folder / "warp_alpha0"))),
                *(f"{script}.py {of[script]} lm={lm} {more} out_dir={folder}/{script}{end}" for script, more in (
                    ("decode", "model=ridge 'model_params={}' beside=[] embedding=lm layer=1"), ("telepath", "max_iters=4"))
                  for lm, end in ((folder / "train", ""), (twin, "_alpha0")))]
    stages = [dict(name=f"stage <{i}>", budget=9, run=[command]) for i, command in enumerate(commands)]
    (folder / "stages.yaml").write_text(yaml.safe_dump(dict(stages=stages)))
    stages = demo.read_stages(yaml.safe_load((folder / "stages.yaml").read_text())["stages"])
    jobs = [job for _, _, some in stages for job in some]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(Figure, "savefig", lambda self, to, **_: to.write(DOT) if hasattr(to, "write") else Path(to).write_bytes(DOT))  # half of the time
        for job in jobs:
            module = importlib.import_module(job.script.stem)
            module.main(configure(module.Config, job.args))
            assert job.finished(jobs), job.command
    return folder, stages


def page(folder, status=0):
    with pytest.raises(SystemExit) as e:
        demo.main(configure(demo.Config, [f"{folder}/stages.yaml", f"out_dir={folder}/demo", "report_only=True"]))
    assert e.value.code == status
    return (folder / "demo/report.html").read_text()


def test_the_page_says_what_the_tables_say(tiny):
    folder, stages = tiny
    text = page(folder)
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', text) and "http" not in text and text.count("<figure>") == text.count("</figure>") == 14
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", text)[1:]:  # each: mark, null, command
        assert re.search(r'class="tag (synthetic|real)"', caption) and "Null" in caption and "<code>python " in caption, caption
    assert "stage &lt;0&gt;" in text and "stage <0>" not in text
    assert text.count("<pre>a&lt;b&gt;") == 2 and "<b>a" not in text
    table = pd.read_csv(folder / "demo/results.csv")
    assert {"score", "low", "high", "chance", "n"} <= set(table) and table.n.gt(0).all()
    losses = [pd.read_csv(folder / name / "results.csv").score.iloc[-1] for name in ("train", "train_alpha0")]
    mine = table[table.measure.str.startswith("validation loss")].set_index("model").score
    assert mine["topographic"] == pytest.approx(losses[0]) and mine["topographic - twin"] == pytest.approx(losses[0] - losses[1])
    assert f"{losses[0]:.3f}" in text
    heard = [pd.read_csv(folder / f"telepath{end}/results.csv") for end in ("", "_alpha0")]
    mine = table[table.measure.str.contains("other pictures")].set_index("model").score
    a, b = (t[(t.set == "trial") & (t.metric == "top1") & (t.control == "eeg")].score.iloc[0] for t in heard)
    assert mine["topographic - twin"] == pytest.approx(a - b)  # trials in pairs give the very difference of the scripts' own scores
    warped = [pd.read_csv(folder / f"warp{end}/results.csv").query("measure == 'difference of log10(1 + d_warp)'").score.iloc[0] for end in ("", "_alpha0")]
    mine = table[table.measure.str.startswith("d_warp")].set_index("model").score
    assert mine["log10 ratio, topographic over twin"] == pytest.approx(-sum(warped) / 2)
    assert {"(a)", "(b)", "(c)"} <= {str(q)[:3] for q in table.question}


def test_a_missing_stage_is_said_and_the_rest_is_shown(tiny):
    folder, stages = tiny
    picture = folder / "decode/lags.png"
    kept = picture.read_bytes()
    picture.unlink()
    try:
        text = page(folder)
    finally:
        picture.write_bytes(kept)
    assert "Not finished: <code>python decode.py" in text and ">Decoding</h2>" not in text and ">Telepathy</h2>" in text
    assert text.count("<figure>") == 12 and "word ROC-AUC in" not in text


def answer(low, high, **kwargs):
    return demo.Answer("q", "w", [(0.5, 0.4, 0.6)] * 2, ((low + high) / 2, low, high), 5, "tasks", 0.5, "chance", ("more", "less"), **kwargs)


def test_verdicts_follow_from_the_interval():
    assert answer(-0.1, 0.2).verdict() == answer(0, 0.2).verdict() == "no difference that one seed can show"
    assert answer(0.1, 0.2).verdict().startswith("more with topography, in this one pair")
    assert answer(-0.2, -0.1).verdict().startswith("less with topography")
    assert answer(-0.2, -0.1, log=True).gap() == "× 0.71 [0.63, 0.79]" and answer(0.1, 0.2, log=True, last=64).number(64) == "> 64"
    assert demo.minus("-0.000 [-0.010, +0.020]") == "0.000 [−0.010, +0.020]" and demo.minus("+0.0003 -0.00 to -10") == "+0.0003 0.00 to −10"
    assert demo.t_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.484, 2 + 2.484), abs=1e-3)
    score, low, high = demo.by_cluster([1, 1, 0, 0] * 5, [0, 0, 1, 1] * 5, 0)  # two objects, all or nothing
    assert (score, low, high) == (0.5, 0.0, 1.0)
    alone = demo.by_cluster([1, 0], ["one", "one"], 0)
    assert alone == (0.5, -math.inf, math.inf) and answer(float("nan"), float("nan")).verdict() == "too few for an interval"
    assert demo.unpaired((3, 2, 4), (1, 0.5, 1.5)) == pytest.approx((2, 2 - 1.118, 2 + 1.118), abs=1e-3)
