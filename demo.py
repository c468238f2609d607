"""What changes when the units of a language model get a place? The whole story on one page.

    python demo.py                    # make demo: runs what is not finished, then writes the page
    python demo.py minutes=40         # train longer
    python demo.py report_only=True   # write the page again from existing results

A topographic GPT and its twin without topography go through every experiment on embedded data.
config/demo.yaml lists the stages and what the page says about them. A measurement at the start sets
training times and the size of experiments, so that the demo ends in time on any machine.
"""

import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import scipy.stats
import torch
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from configurator import HERE, InputError, Run, configure
from data import aside, write_aside
from model import GPT, GPTConfig


@dataclass
class Config:
    stages: list[dict] = field(default_factory=list)  # see config/demo.yaml
    sections: dict = field(default_factory=dict)  # what the page says about each script
    minutes: float = 0.0  # for everything; 0: 10 if the machine is faster in bfloat16, else 17
    report_only: bool = False  # run nothing; write the page from existing results
    out_dir: str = "out/demo"  # report.html, overview.png, results.csv (the answers), logs/
    seed: int = 1337  # for the page's own bootstrap; the scripts have theirs
    dtype: str = "auto"  # for the models that train: bfloat16 where it is faster; float32

    def check(self):
        for stage in self.stages:
            if not {"name", "seconds", "run"} <= set(stage) or not isinstance(stage["run"], list):
                raise InputError(
                    f"option 'stages': give each a name, seconds and a list to run, not {stage}"
                )


# ---- the plan


@dataclass
class Job:
    """One command of a stage."""

    words: list  # script and options
    out: Path  # the folder it writes to
    inputs: list  # jobs whose folders it reads
    pictures: dict  # {file pattern: caption}

    @property
    def command(self):
        return shlex.join(self.words)  # quoted for the shell

    @property
    def script(self):
        return Path(self.words[0]).name

    @property
    def result(self):
        """Return the file that the script writes last."""
        last = {"prepare.py": "meta.yaml", "sample.py": "samples.txt"}
        return self.out / last.get(self.script, "results.csv")

    def is_current(self):
        """Return whether its last start had this command and came after its inputs finished."""
        config = self.out / "config.yaml"
        if not config.exists():
            return self.script == "prepare.py"
        command = re.search(r"^# command: (.*)$", config.read_text(), re.M)[1]
        command = re.sub(r" (init_from=resume|overwrite=True)$", "", command)
        if command != " ".join([self.script, *self.words[1:]]):
            return False
        for job in self.inputs:
            if not job.is_finished() or modified(job.result) > modified(config):
                return False
        return True

    def is_finished(self):
        """Return whether the results and pictures of exactly this command exist."""
        if not self.result.exists() or not self.is_current():
            return False
        started = self.out / "config.yaml"
        if started.exists() and modified(self.result) < modified(started):
            return False
        return all(any(self.out.glob(pattern)) for pattern in self.pictures)


def modified(path):
    """Return when a file was written, in seconds."""
    return path.stat().st_mtime


@dataclass
class Stage:
    """Jobs that run in parallel, and the seconds that they should take."""

    name: str
    seconds: float
    jobs: list


def measure(run):
    """Return how slow this machine is, relative to the seconds in config/demo.yaml.

    Times a training step in float32 on half of the cores, the share of each of two parallel jobs.
    machine.json keeps the result, so that a continued demo follows the same plan.
    """
    file = run.out / "machine.json"
    if not file.exists():
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // 2))
        model = GPT(GPTConfig(block_size=128, vocab_size=4096, n_layer=4, n_head=4, n_embd=256))
        idx = torch.randint(4096, (16, 128))
        durations = []
        for _ in range(5):
            start = time.time()
            model(idx, idx).loss.backward()
            durations.append(time.time() - start)
        torch.set_num_threads(threads)
        slowness = float(np.median(durations[1:])) / REFERENCE
        write_aside(file, json.dumps({"slowness": round(slowness, 2)}))
    return json.loads(file.read_text())["slowness"]


REFERENCE = 0.57  # seconds of that step on the reference machine
STEPPING = 0.85  # share of a training run's time for steps; the rest is start-up and validation


def make_stages(run, config):
    """Return the stages for this machine, and a sentence on how they were chosen.

    A stage takes its `seconds` times the slowness of the machine. Its `share` of the remaining
    minutes goes into its commands as {minutes}, or as {steps}, which are the same for both models
    (a step takes `step` seconds on the reference machine, `step_float32` in float32). If less than
    half of the time remains, commands get the options `small` and take about half as long.
    """
    slowness = step_slowness = measure(run)
    limit = config.minutes or (17 if run.dtype is torch.float32 else 10)
    fixed = slowness * sum(stage["seconds"] for stage in config.stages) / 60
    small = fixed > limit / 2
    if small:
        slowness /= 2
        fixed /= 2
    remaining = max(limit - fixed, limit / 4)
    stages, jobs = [], []
    for stage in config.stages:
        minutes = round(remaining * stage.get("share", 0), 1)
        step = stage.get("step", 1)
        if run.dtype is torch.float32:
            step = stage.get("step_float32", step)
        steps = round(60 * minutes * STEPPING / (step * step_slowness))
        fields = {"minutes": minutes, "steps": steps, "dtype": str(run.dtype).split(".")[-1]}
        first = len(jobs)
        for command in stage["run"]:
            command = command.format(**fields)
            if small:
                command += f" {stage.get('small', '')}"
            jobs.append(make_job(config, command, jobs))
        seconds = slowness * stage["seconds"] + 60 * minutes
        stages.append(Stage(stage["name"], seconds, jobs[first:]))
    sentence = f"This machine had {remaining:.1f} minutes for training"
    if small:
        sentence += ", and the other experiments are smaller than on a faster one"
    return stages, sentence + "."


def make_job(config, command, earlier):
    """Return the Job of a command line. Raises InputError if its script does not exist."""
    words = shlex.split(command)
    script = HERE / words[0]
    if not script.is_file():
        raise InputError(f"stages: no script {words[0]} exists: correct '{command}'")
    out = script.parent
    for word in words:
        if word.startswith("out_dir="):
            out = Path(word.removeprefix("out_dir="))
    values = re.split(r"[=,\s\[\]]+", command)
    inputs = [job for job in earlier if str(job.out) in values]
    return Job(words, out, inputs, config.sections.get(script.name, {}).get("pictures", {}))


# ---- running


def start(job, threads, log):
    """Resume a job, or start it over if its command or its inputs have changed."""
    words = list(job.words)
    if (job.out / "ckpt.pt").exists():
        words.append("init_from=resume" if job.is_current() else "overwrite=True")
    elif (job.out / "config.yaml").exists() and not job.is_current():
        shutil.rmtree(job.out)  # its rows of results may come from other weights
    return subprocess.Popen(
        [sys.executable, str(HERE / words[0]), *words[1:]],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # an interrupt reaches only the demo, which ends its jobs
    )


class Log:
    """The log of a job in logs/NAME.log, printed line by line without progress bars."""

    def __init__(self, run, job):
        folder = run.out / "logs"
        folder.mkdir(exist_ok=True)
        path = folder / f"{job.out.name}.log"
        self.run, self.name, self.rest = run, job.out.name, ""
        self.writer = path.open("w")
        self.reader = path.open(errors="replace")

    def pass_on(self, end=""):
        *lines, self.rest = re.split(r"[\r\n]", self.rest + self.reader.read() + end)
        for line in lines:
            if line.strip() and not re.search(r"\d%\|", line):
                self.run.print(f"{self.name} | {line}")


def run_jobs(run, jobs, update):
    """Run jobs in parallel, and call update() meanwhile.

    Returns 0, or the exit status of the first job that fails, which ends the others.
    """
    logs, processes = [], []
    statuses = [None]
    try:
        for job in jobs:
            run.print(f"$ python {job.command}")
            logs.append(Log(run, job))
            threads = max(1, torch.get_num_threads() // len(jobs))
            processes.append(start(job, threads, logs[-1].writer))
        while None in statuses and not any(statuses):
            time.sleep(0.2)
            statuses = [process.poll() for process in processes]
            for log in logs:
                log.pass_on()
            update()
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # training scripts finish their step and save
        for process, log in zip(processes, logs):
            process.wait()
            log.pass_on("\n")
    return next((status for status in statuses if status), 0)


def run_stages(run, stages):
    """Run the unfinished jobs, stage by stage. Returns the exit status."""
    todo = []
    for stage in stages:
        jobs = [job for job in stage.jobs if not job.is_finished()]
        if jobs:
            todo.append(Stage(stage.name, stage.seconds, jobs))
    total = sum(stage.seconds for stage in todo)
    run.print(f"{len(todo)} of {len(stages)} stages to go, about {total / 60:.0f} minutes in all")
    bar = run.progress(round(total), desc="demo")
    completed = 0  # seconds
    for stage in todo:
        begin = time.time()
        run.print(f"== {stage.name}: about {stage.seconds / 60:.1f} minutes")

        def update(begin=begin, completed=completed, planned=stage.seconds):
            bar.update(round(completed + min(time.time() - begin, planned)) - bar.n)

        status = run_jobs(run, stage.jobs, update)
        if status:
            run.print(
                f"== {stage.name} ended with status {status}: finished jobs are kept, and the same "
                "command continues from here"
            )
            return status if status > 0 else 128 - status
        completed += stage.seconds
    bar.close()
    return 0


# ---- the results
#
# Each experiment becomes a table of rows: model (topographic, twin, or a control), what (a task, a
# sheet, a fold ...), score, low, high, chance, n. Answers compare the two models over its rows.

NAMES = ("topographic", "twin")
QUESTIONS = {  # question: what a positive and what a negative difference mean
    "Did units get a place at all?": ("smoother maps", "rougher maps"),
    "What can be probed?": ("more can be probed", "less can be probed"),
    "How far must the model be warped?": ("further", "nearer"),
    "What can be decoded?": ("more can be decoded", "less can be decoded"),
    "What does place cost in language?": ("more loss", "less loss"),
    "What does place cost in grammar?": ("more pairs right", "fewer pairs right"),
}


@dataclass
class Answer:
    """One measure for both models and their difference, each as (score, low, high), 95 %."""

    question: str
    measure: str
    models: list  # the topographic model, the twin
    difference: tuple
    n: int
    over: str  # what n and the interval count
    chance: float
    null: str  # chance and controls as text

    def verdict(self):
        """Return what the interval allows one to conclude, and no more."""
        _, low, high = self.difference
        if not math.isfinite(low + high):
            return "too few for an interval"
        if low <= 0 <= high:
            return "no difference that one seed can show"
        words = QUESTIONS[self.question][0 if low > 0 else 1]
        return f"{words} with topography, in this one pair"


def compare(question, measure, rows, over, difference=None):
    """Return the Answer of a table: paired over its rows unless a difference is given."""
    means = rows.groupby("model", sort=False).score.mean()
    a, b = (rows[rows.model == name].set_index("what") for name in NAMES)
    if difference is None:
        difference = mean_interval(a.score - b.score)
    chance = float(a.chance.mean())
    nulls = [f"chance {chance:.3f}"]
    for name, mean in means.drop(list(NAMES)).items():
        nulls.append(f"{name} {mean:.3f}")
    models = [score_interval(a), score_interval(b)]
    n = len(a) if len(a) > 1 else int(a.n.iloc[0])
    return Answer(question, measure, models, difference, n, over, chance, "; ".join(nulls))


def score_interval(rows):
    """Return (score, low, high) of a single row, or the mean and its interval over several."""
    if len(rows) > 1:
        return mean_interval(rows.score)
    return tuple(rows[["score", "low", "high"]].iloc[0].astype(float))


def mean_interval(values):
    """Return (mean, low, high): the 95 % interval of the t distribution."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), -math.inf, math.inf
    return (values.mean(), *scipy.stats.ttest_1samp(values, 0).confidence_interval())


def group_interval(values, groups, seed):
    """Return (mean, low, high) of trials: a 95 % bootstrap interval over their groups."""
    mean = float(np.mean(values))
    parts = pd.Series(np.asarray(values)).groupby(np.asarray(groups)).agg(["sum", "size"])
    if len(parts) < 2:
        return mean, -math.inf, math.inf

    def ratio(sums, sizes, axis):
        return sums.sum(axis) / sizes.sum(axis)

    options = {"paired": True, "method": "percentile", "n_resamples": 2000, "rng": seed}
    result = scipy.stats.bootstrap(tuple(parts.to_numpy(float).T), ratio, **options)
    return (mean, *result.confidence_interval)


def unpaired(a, b):
    """Return the difference (score, low, high) of two scores of independent samples."""
    difference = a[0] - b[0]
    below = math.hypot(a[0] - a[1], b[2] - b[0])
    above = math.hypot(a[2] - a[0], b[0] - b[1])
    return difference, difference - below, difference + above


def rows_of(jobs, query, what, kind="", main=""):
    """Read rows of both models' results.csv; a `kind` other than `main` names a control."""
    parts = []
    for job, name in zip(jobs, NAMES):
        part = pd.read_csv(job.result, low_memory=False).query(query)
        model = pd.Series(name, part.index)
        if kind:
            control = part[kind].fillna("")
            model = model.where(control == main, control + f", {name}")
        parts.append(part.assign(model=model, what=part[what].astype(str)))
    return pd.concat(parts)


def show_train(jobs, config):
    """Return a table of losses and its Answers, as every show_ function does for its script."""
    rows = rows_of(jobs, "metric == 'val_loss'", "metric").drop_duplicates("model", keep="last")
    difference = unpaired(*rows[["score", "low", "high"]].to_numpy())
    question = "What does place cost in language?"
    measure = "validation loss, nats per token (chance: trigram model)"
    return rows, [compare(question, measure, rows, "tokens, not paired", difference)]


def show_init_pos(jobs, config):
    """Return the spatial losses of the layouts, and no Answer."""
    rows = rows_of(jobs, "score == score", "layer")
    return rows.assign(model="swapped"), []


def show_topography(jobs, config):
    """Return Moran's I of the contrast maps, and minimal pairs."""
    table = pd.read_csv(jobs[0].result).query("blur == 0")
    table["model"] = table.model.replace("model", "topographic")
    table["what"] = table.contrast
    moran = table[table.measure == "moran"]
    labels = table[table.measure == "moran beside shuffled labels"]
    labels = labels.assign(score=labels.chance, model="shuffled labels, " + labels.model)
    pairs = table[table.measure == "minimal pairs"]
    sheets = moran[moran.sheet != "mean"].groupby(["model", "sheet"])[["score", "chance"]].mean()
    sheets = pd.concat([sheets.reset_index().rename(columns={"sheet": "what"}), labels])
    measure = "Moran's I of contrast maps (chance: shuffled positions)"
    answers = [
        compare("Did units get a place at all?", measure, sheets, "sheets"),
        compare("What does place cost in grammar?", "minimal pairs", pairs, "paradigms"),
    ]
    return pd.concat([moran[moran.sheet == "mean"], labels, pairs]), answers


def show_probe(jobs, config):
    """Return the accuracies of probes by task."""
    query = "metric == 'accuracy' and (layer == 'best' or baseline == 'layer0')"
    rows = rows_of(jobs, query, "dataset", "baseline")
    rows["model"] = rows.model.replace({"random_init, topographic": "random weights"})
    rows["model"] = rows.model.str.replace("layer0", "bag of embeddings")
    measure = "accuracy of linear probes (chance: majority)"
    return rows, [compare("What can be probed?", measure, rows, "tasks")]


def show_warp(jobs, config):
    """Return d_warp of both brains, and their mean."""
    parts, differences = [], []
    for job, brain in zip(jobs, NAMES):
        table = pd.read_csv(job.result)
        part = table[table.measure == "d_warp absolute"].head(2)
        parts.append(part.assign(model=NAMES, what=f"brain grown from the {brain} model"))
        row = table[table.measure == "difference of log10(1 + d_warp)"].iloc[0]
        differences.append([-row.score, -row.high, -row.low])  # the row is twin minus topographic
    rows = pd.concat(parts)
    values = ["score", "low", "high"]
    rows = rows.assign(chance=0.0, **np.log10(1 + rows[values].astype(float)))
    mean = rows.groupby("model", sort=False)[[*values, "chance", "n"]].mean().reset_index()
    mean["what"] = "mean of both brains"
    measure = "log10(1 + d_warp), mean of two brains (chance: no warp)"
    difference = tuple(np.mean(differences, 0))
    question = "How far must the model be warped?"
    answer = compare(question, measure, mean, "draws of seeds and phrases", difference)
    return pd.concat([rows, mean]), [answer]


def show_decode(jobs, config):
    """Return the word AUC at the lag where words were planted."""
    query = "metric == 'auc' and fold != 'mean' and (lag == '300.0' or model == 'oracle')"
    rows = rows_of(jobs, query, "fold", "model", "ridge")
    measure = "word ROC-AUC at 300 ms, where words were planted (chance: shifted words)"
    return rows, [compare("What can be decoded?", measure, rows, "folds")]


def show_telepath(jobs, config):
    """Return the top-1 accuracy of EEG to words, by evaluation set."""
    rows = rows_of(jobs, "metric == 'top1'", "set", "control", "eeg")
    samples = []
    for job in jobs:
        table = pd.read_csv(job.out / "samples.csv", keep_default_na=False, dtype=str)
        samples.append(table.assign(right=table.ranked.str.split(" ").str[0] == table.word))
    pairs = samples[0].assign(difference=1.0 * samples[0].right - samples[1].right)
    answers = []
    for name in ("trial", "object"):
        part = pairs[pairs.set == name]
        difference = group_interval(part.difference, part.object, config.seed)
        measure = f"EEG to words, top-1, set {name}"
        set_rows = rows[rows.set == name]
        question = "What can be decoded?"
        answers.append(compare(question, measure, set_rows, "trials of some objects", difference))
    return rows, answers


def show_foundation(jobs, config):
    """Return R² of hidden patches, and no Answer."""
    rows = rows_of(jobs, "metric == 'r2' and set == 'test'", "mask")
    return rows.assign(model=rows.method), []


SHOW = {
    "train.py": show_train,
    "init_pos.py": show_init_pos,
    "topography.py": show_topography,
    "probe.py": show_probe,
    "warp.py": show_warp,
    "decode.py": show_decode,
    "telepath.py": show_telepath,
    "foundation.py": show_foundation,
}


# ---- the page


def show(score, low, high):
    """Format a score with its interval, if it has one."""
    if not math.isfinite(low + high):
        return f"{score:.3f}"
    return f"{score:.3f} [{low:.3f}, {high:.3f}]"


def html_table(table):
    """Return a DataFrame as HTML that the template does not escape."""
    return Markup(table.to_html(index=False, border=0, na_rep="", float_format="{:.3f}".format))


def side_by_side(rows):
    """Lay rows of results out as an HTML table: a line per `what`, a column per model."""
    rows = rows.assign(shown=list(map(show, rows.score, rows.low, rows.high)))
    rows["what"] = pd.Categorical(rows.what, rows.what.unique())  # keeps their order
    models = list(dict.fromkeys(rows.model))
    table = rows.pivot_table("shown", "what", "model", "first", observed=True)[models]
    facts = rows.groupby("what", observed=True)[["chance", "n"]].first()
    return html_table(table.join(facts.astype({"n": int})).reset_index(names="score [95 %]"))


def describe(run, config, jobs):
    """Return a script's section for the template, and its Answers."""
    script = jobs[0].script
    text = config.sections[script]
    options = [yaml.safe_load((job.out / "config.yaml").read_text()) for job in jobs]
    section = {"title": text["title"], "lead": text["lead"].format(*options)}
    section |= {"data": "real text", "table": "", "texts": [], "pictures": []}
    answers = []
    if script == "sample.py":
        section["texts"] = [(name, job.result.read_text()) for name, job in zip(NAMES, jobs)]
    if script in SHOW:
        rows, answers = SHOW[script](jobs, config)
        section["table"] = side_by_side(rows)
        sources = rows.filter(["data", "dataset"]).to_string()
        if "synthetic" in sources or rows.get("synthetic", pd.Series(False)).any():
            section["data"] = "synthetic"
    for job in jobs:
        for pattern, caption in job.pictures.items():
            for path in sorted(job.out.glob(pattern)):
                section["pictures"].append((job, os.path.relpath(path, run.out), caption))
    return section, answers


def draw_overview(answers, path):
    """Plot a panel per answer: both models with their intervals, and the null."""
    columns = min(4, len(answers))
    n_rows = math.ceil(len(answers) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * n_rows), layout="constrained")
    for i, answer in enumerate(answers):
        axis = figure.add_subplot(n_rows, columns, i + 1)
        score, low, high = np.array(answer.models).T
        error = np.nan_to_num([score - low, high - score], posinf=0)
        axis.errorbar(NAMES, score, yerr=error, fmt="o", capsize=4)
        axis.axhline(answer.chance, color="0.5", ls="--")
        axis.margins(x=0.5)
        axis.set_title(answer.measure, fontsize=7, wrap=True)
        axis.set_xlabel(f"difference {show(*answer.difference)}", fontsize=8)
    title = (
        "95 % intervals; dashed: chance or null; one seed per model; all but the text is synthetic"
    )
    figure.suptitle(title, fontsize=9)
    with aside(path) as file:
        figure.savefig(file, dpi=140, format="png")


def report_answers(run, answers):
    """Write results.csv and overview.png. Returns the table of answers for the page."""
    (run.out / "results.part-0.jsonl").unlink(missing_ok=True)  # drop rows of earlier pages
    lines = []
    for answer in answers:
        line = {"question": answer.question, "measure": answer.measure}
        for name, values in zip([*NAMES, "difference"], [*answer.models, answer.difference]):
            score, low, high = map(float, values)
            chance = 0.0 if name == "difference" else answer.chance
            keys = {"question": answer.question, "measure": answer.measure, "model": name}
            run.result(score, chance, low, high, answer.n, **keys)
            line[name] = show(score, low, high)
        line |= {"n": f"{answer.n:,} {answer.over}", "chance and controls": answer.null}
        lines.append({**line, "what one seed can say": answer.verdict()})
    run.merge()
    if answers:
        draw_overview(answers, run.out / "overview.png")
    return pd.DataFrame(lines)


def report(run, config, stages, plan):
    """Write report.html, overview.png and results.csv from the finished jobs."""
    by_script = {}
    for stage in stages:
        for job in stage.jobs:
            by_script.setdefault(job.script, []).append(job)
    sections, answers, missing = [], [], []
    for script, jobs in by_script.items():
        unfinished = [job for job in jobs if not job.is_finished()]
        missing += unfinished
        if script in config.sections and not unfinished:
            section, section_answers = describe(run, config, jobs)
            sections.append(section)
            answers += section_answers
    answers.sort(key=lambda answer: list(QUESTIONS).index(answer.question))
    verdicts = {}
    for answer in answers:
        verdicts.setdefault(answer.question, []).append(answer.verdict())
    table = report_answers(run, answers)
    run.print(table.to_string(index=False))
    page = jinja2.Environment(autoescape=True).from_string((HERE / "config/demo.html").read_text())
    html = page.render(
        plan=plan,
        answers=answers,
        answers_table=html_table(table),
        verdicts=verdicts,
        sections=sections,
        missing=missing,
        machine=f"{platform.platform()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, {time.strftime('%F %H:%M %Z')}",
        stages=stages,
    )
    write_aside(run.out / "report.html", html)


def main(config):
    run = Run(config)
    signal.signal(
        signal.SIGHUP, signal.getsignal(signal.SIGTERM)
    )  # also stop when the terminal closes
    stages, plan = make_stages(run, config)
    status = 0
    if not config.report_only:
        status = run_stages(run, stages)
    report(run, config, stages, plan)
    run.print(f"the page: {run.out / 'report.html'}")
    run.close()
    sys.exit(status)


if __name__ == "__main__":
    main(configure(Config, [str(HERE / "config/demo.yaml"), *sys.argv[1:]]))
