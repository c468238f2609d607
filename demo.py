"""The whole story on embedded data: train a topographic GPT and its twin, carry both through every experiment, write one page about what place changed.

    python demo.py                        # make demo: every stage that is not finished, then out/demo/report.html
    python demo.py report_only=True       # the page again, from what is there

Stages, their commands and their budgets stand in config/demo.yaml. A stage is finished when its script's own results.csv carries the hash of the options that
the stage asks for now, is younger than the results of the models it reads, and its figures are there; whatever else is done again, or gone on with.
"""
import base64
import codecs
import dataclasses
import importlib.util
import datetime
import html
import importlib.metadata
import io
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
import textwrap
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import yaml

from configurator import HERE, Run, aside, configure, hash_options, write_aside


@dataclass
class Config:
    stages: list[dict] = field(default_factory=list)  # what is run, in order: name, budget (s), run: commands side by side; none: those of config/demo.yaml
    report_only: bool = False              # run nothing, write the page from the results that are there
    out_dir: str = "out/demo"              # report.html, overview.png, results.csv (the answers), stages.jsonl (how long each took)
    seed: int = 1337                       # of the page's own bootstrap; the scripts have theirs in their settings


# ---- stages

@dataclass
class Job:
    """One command of a stage. options: resolved, as the script would; None for a prepare script. out: where it writes."""
    command: str
    script: Path
    args: list
    out: Path
    options: dict | None

    def inputs(self, jobs):
        """The jobs whose folders this one reads."""
        values = [v for value in (self.options or {}).values() for v in (value if isinstance(value, list) else [value])]
        return [job for job in jobs if job is not self and str(job.out) in map(str, values)]

    @property
    def result(self):
        """The file that the script writes last."""
        return self.out / ("samples.txt" if self.script.name == "sample.py" else "results.csv")

    def same_options(self):
        """Whether the folder was last started with the options of now: its config.yaml is the script's own resolved ones."""
        config = self.out / "config.yaml"
        return config.exists() and hash_options(yaml.safe_load(config.read_text()) or {}) == hash_options(self.options)

    def same_inputs(self, jobs):
        """Whether what this one reads is finished, and was so before this one was last started."""
        return all(job.finished(jobs) and job.result.stat().st_mtime <= (self.out / "config.yaml").stat().st_mtime for job in self.inputs(jobs))

    def finished(self, jobs):
        if self.options is None:
            return (self.out / "meta.yaml").exists()  # a dataset writes it last
        if not self.same_options() or not self.same_inputs(jobs):
            return False
        wanted, start = [self.result, *(self.out / name for name in figures(self))], (self.out / "config.yaml").stat().st_mtime
        if not all(file.exists() and file.stat().st_mtime >= start for file in wanted):
            return False
        return self.result.suffix != ".csv" or bool(pd.read_csv(self.result).options.astype(str).str.startswith(hash_options(self.options)).all())

    def start(self, jobs, threads):
        """Run it: go on with what it had begun, begin anew where its options or what it reads are others now."""
        args = list(self.args)
        if self.options is not None and (self.out / "config.yaml").exists():
            if (self.out / "ckpt.pt").exists():
                args.append("init_from=resume" if self.same_options() and self.same_inputs(jobs) else "overwrite=True")
            elif not self.same_inputs(jobs):
                shutil.rmtree(self.out)  # a sweep knows its rows by their options: those of other weights have to go
        return subprocess.Popen([sys.executable, str(self.script), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                env={"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"})


def read_stages(stages):
    """[(name, budget in s, [Job])] of a list of stages. Raises ValueError or FileNotFoundError with one sentence."""
    if wrong := [s for s in stages if not {"name", "budget", "run"} <= set(s) or not isinstance(s["run"], list)]:
        raise ValueError(f"option 'stages': each has a name, a budget and a list of commands to run, not {wrong[0]}")
    return [(s["name"], float(s["budget"]), [job_of(command) for command in s["run"]]) for s in stages]


def job_of(command):
    """A command line with its options resolved by the script's own Config."""
    name, *args = shlex.split(command)
    script = HERE / name
    if not script.is_file():
        raise FileNotFoundError(f"stages: there is no script {name} (of '{command}')")
    if script.name == "prepare.py":
        return Job(command, script, args, script.parent, None)
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = sys.modules.setdefault(script.stem, importlib.util.module_from_spec(spec))
    if not hasattr(module, "Config"):
        spec.loader.exec_module(module)
    config = module.Config
    options = dataclasses.asdict(configure(config, args))
    return Job(command, script, args, Path(options["out_dir"]), options)


def clock(seconds):
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Screen:
    """The jobs' lines as they come, and below them one line on how things stand: rewritten on a terminal, every 15 s elsewhere."""

    def __init__(self):
        self.live, self.last, self.lock = sys.stdout.isatty(), 0.0, threading.Lock()

    def line(self, text):
        with self.lock:
            print(("\r\x1b[K" if self.live else "") + text, flush=True)

    def status(self, text):
        if self.live:
            with self.lock:
                print("\r\x1b[K" + text[:shutil.get_terminal_size().columns - 1], end="", flush=True)
        elif time.time() - self.last >= 15:
            self.last = time.time()
            self.line(text)


def listen(process, name, screen, bars):
    """Pass a job's lines on; keep its progress bar's step, since two bars cannot share a line."""
    rest, decode = "", codecs.getincrementaldecoder("utf-8")("replace").decode
    while chunk := os.read(process.stdout.fileno(), 65536):
        *parts, rest = re.split(r"([\r\n])", rest + decode(chunk))
        for text in parts[::2]:
            if bar := re.search(r"\d+%\|.*\| *(\d+/\d+)", text):
                bars[name] = bar[1]
            elif text.strip():
                screen.line(f"{name}{text.rstrip()}")
        if bar := re.search(r"\d+%\|.*\| *(\d+/\d+)", rest):
            bars[name] = bar[1]
    if rest.strip() and not re.search(r"\d+%\|", rest):
        screen.line(f"{name}{rest.rstrip()}")


def run_stage(todo, jobs, screen, about):
    """Run the unfinished jobs of a stage side by side. about(bars, seconds): the line on how things stand. Returns the exit status, the first that is not 0."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    width = max(len(job.out.name) for job in todo)
    names = {job.out: f"{job.out.name:>{width}} │ " if len(todo) > 1 else "" for job in todo}
    bars, start, processes = {}, time.time(), []
    try:
        for job in todo:
            screen.line(f"{names[job.out]}$ python {job.command}")
            processes.append(job.start(jobs, max(1, cores // len(todo))))
        readers = [threading.Thread(target=listen, args=(p, names[job.out], screen, bars)) for p, job in zip(processes, todo)]
        for reader in readers:
            reader.start()
        while any(p.poll() is None for p in processes):
            if any(p.returncode for p in processes):
                break  # one has failed: the others save and end
            screen.status(about({name.strip(" │") or todo[0].out.name: step for name, step in bars.items()}, time.time() - start))
            time.sleep(0.2)
    finally:
        failed = next((p.returncode for p in processes if p.returncode), 0)
        for p in processes:
            if p.poll() is None:
                p.terminate()  # scripts that train save at the end of their step
        for p in processes:
            p.wait()
    for reader in readers:
        reader.join()
    return failed or next((p.returncode for p in processes if p.returncode), 0)


def run_stages(run, stages):
    """Every stage that is not finished, in order. Returns the exit status."""
    screen, begin, jobs = Screen(), time.time(), [job for _, _, some in stages for job in some]
    for number, (name, budget, some) in enumerate(stages, 1):
        todo = [job for job in some if not job.finished(jobs)]
        if not todo:
            screen.line(f"== {number}/{len(stages)} {name}: finished before")
            continue
        later = sum(b for _, b, others in stages[number:] if not all(job.finished(jobs) for job in others))
        screen.line(f"== {number}/{len(stages)} {name}: budget {clock(budget)}, {clock(time.time() - begin)} since the start, "
                    f"about {clock(budget + later)} to go")

        def about(bars, seconds, name=name, budget=budget, later=later):
            return f"   {name} {clock(seconds)} of {clock(budget)}" + "".join(f" | {k} {v}" for k, v in bars.items()) + \
                f" | about {clock(max(budget - seconds, 0) + later)} to go"
        start, status = time.time(), None
        try:
            status = run_stage(todo, jobs, screen, about)
        finally:
            seconds = time.time() - start
            with open(run.out / "stages.jsonl", "a") as f:
                f.write(json.dumps(dict(stage=name, budget=budget, seconds=round(seconds, 1), status=status, jobs=[job.command for job in todo])) + "\n")
        if status:
            screen.line(f"== {name} ended with status {status} after {clock(seconds)}: everything before it is kept; the same command goes on from here")
            return status if status > 0 else 128 - status
        screen.line(f"== {name}: {clock(seconds)}" + (f", over its budget of {clock(budget)}" if seconds > budget else ""))
    return 0


# ---- what the results say

QUESTIONS = ("Did units get a place at all?", "(a) What can be probed?", "(b) How far must the model be warped?", "(c) What can be decoded?",
             "What does place cost in language?", "What does place cost in grammar?")
BOTH = {"model": "topographic", "twin": "twin"}


@dataclass
class Answer:
    """One line of the table: a measure of both models with intervals, and their difference. words: what a positive and a negative difference mean."""
    question: str
    what: str
    models: list          # [(score, low, high)] of the topographic model and the twin
    difference: tuple     # (score, low, high)
    n: int                # what the difference's interval is over: so many
    over: str             # of these
    null: float           # what chance, or nothing, would give
    beside: str           # the null in words, with its numbers
    words: tuple = ("higher", "lower")
    paired: bool = True
    log: bool = False     # dimensions: models are drawn on a log axis, the difference is a log10 ratio
    last: float = math.inf  # dimensions: nothing beyond was tried

    def verdict(self):
        """What the interval allows to say, and no more."""
        _, low, high = self.difference
        if not math.isfinite(low + high):
            return "too few for an interval"
        if low <= 0 <= high:
            return "no difference that one seed can show"
        return f"{self.words[0] if low > 0 else self.words[1]} with topography, in this one pair"

    def of(self, k):
        return interval(self.models[k], self.number)

    def number(self, v):
        return (f"> {self.last:,.0f}" if v >= self.last else f"{v:,.0f}" if v >= 9.95 or v == 0 else f"{v:.1f}") if self.log else f"{v:.3f}"

    def gap(self):
        if not self.log:
            return interval(self.difference, "{:+.3f}".format)
        return "× " + interval([10 ** v for v in self.difference], lambda v: f"{v:,.0f}" if v >= 9.95 else f"{v:.2g}")


def interval(values, number):
    """score [low, high] in words; without an interval, the score alone."""
    score, low, high = values
    return minus(f"{number(score)} [{number(low)}, {number(high)}]" if math.isfinite(low + high) else number(score))


def minus(text):
    """Numbers as they are printed: a minus for the hyphen, none before zero."""
    return re.sub(r"[-+](?=0\.?0*(?![\d.]))", "", text).replace("-", "−")


@dataclass
class Figure:
    """One picture of the page and what must stand below it."""

    path: Path
    sentence: str         # what it shows
    null: str             # its chance level or null
    synthetic: bool
    job: Job


@dataclass
class Section:
    """One experiment of the page: words, answers, figures, tables."""

    title: str
    lead: str
    answers: list
    figures: list
    tables: list = field(default_factory=list)  # [(caption, header, rows)]
    texts: list = field(default_factory=list)  # [(who, text, job)]


def t_interval(x):
    """(mean, low, high): 95 % of the t distribution over the entries of x."""
    x = np.asarray(x, float)
    if len(x) < 2:
        return x.mean(), -math.inf, math.inf  # one says nothing about others
    half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def by_cluster(values, clusters, seed):
    """(mean, low, high) of trials: 95 % bootstrap over what they share (objects)."""
    if len(set(clusters)) < 2:
        return float(np.mean(values)), -math.inf, math.inf
    parts = pd.DataFrame({"v": np.asarray(values, float), "c": np.asarray(clusters)}).groupby("c").v.agg(["sum", "size"]).to_numpy(float)
    drawn = parts[np.random.default_rng(seed).integers(len(parts), size=(2000, len(parts)))].sum(1)
    return (float(np.mean(values)), *np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]))


def unpaired(a, b):
    """Difference of two (score, low, high) as of independent samples."""
    return a[0] - b[0], a[0] - b[0] - math.hypot(a[0] - a[1], b[2] - b[0]), a[0] - b[0] + math.hypot(a[2] - a[0], b[0] - b[1])


def triple(row):
    """(score, low, high) of a row of results."""
    return float(row.score), float(row.low), float(row.high)


def read(job):
    """The results table of a job."""
    return pd.read_csv(job.out / "results.csv", dtype={"options": str}, low_memory=False)


def synthetic(table):
    """Whether the rows say so themselves."""
    said = [table[c].astype(str).str.contains("synthetic").any() for c in ("data", "dataset") if c in table]
    return any(said) or "synthetic" in table and table.synthetic.astype(str).eq("True").any()


def figures(job):
    """The figures that a script leaves and the page shows, by file name."""
    if job.script.name == "probe.py":
        return [f"layers_{lm.replace('/', '-')}.png" for lm in job.options["lm"]]
    return {"train.py": ["loss.png", "sheets.png"], "topography.py": ["map_sentences_nonwords.png", "summary.png"], "decode.py": ["lags.png"],
            "telepath.py": ["results.png"], "warp.py": ["curves.png"]}.get(job.script.name, [])


def show_train(job, twin, seed):
    """The section on training, from both models' results."""
    a, b = (read(j) for j in (job, twin))
    a, b = (t[t.metric == "val_loss"].iloc[-1] for t in (a, b))
    answers = [Answer("What does place cost in language?", "validation loss, nats per token", [triple(a), triple(b)], unpaired(triple(a), triple(b)),
                      int(a.n), "tokens", float(a.chance), f"trigram model {a.chance:.3f}; intervals over documents, not paired, so wider than need be",
                      ("more loss", "less loss"), paired=False)]
    o = job.options
    lead = (f"Both read the same real text (docstrings of Python and its packages) in the same order, from the same random weights: {o['n_layer']} layers of "
            f"{o['n_embd']} units, {o['max_iters']:,} steps of {o['batch_size'] * o['block_size']:,} tokens. The topographic model pays "
            f"{o['alpha']:g} times the spatial loss of its sheets beside the next-word loss, the twin does not.")
    shown = [Figure(job.out / "loss.png", "Next-word loss over training, and the spatial loss of the sheets, of the topographic model.",
                    f"Null: n-gram models of the same text, drawn as lines; trigram {a.chance:.3f} nats.", False, job)]
    for j, who in ((job, "topographic model"), (twin, "twin")):
        shown.append(Figure(j.out / "sheets.png", f"The {who}: how strongly each unit follows the first principal component of its layer's responses to "
                            "validation text, on the layer's sheet, before and after training.",
                            "Null: Moran's I is near 0 where place means nothing.", False, j))
    return Section("Training", lead, answers, shown)


def show_sample(job, twin, seed):
    """The section on what both models write."""
    return Section("Writing", "What each makes of the same beginning, with the same random numbers. Nobody scored this.", [], [],
                   texts=[(who, (j.out / "samples.txt").read_text(), j) for j, who in ((job, "topographic"), (twin, "twin"))])


def show_topography(job, seed):
    """The section on the sheets: one job read both models."""
    table = read(job)
    mine = table[(table.measure == "moran") & (table.blur == 0)]
    sheets = mine[mine.sheet != "mean"].groupby(["model", "sheet"]).score.mean().unstack("sheet")
    labels = table[table.measure == "moran beside shuffled labels"].groupby("model").chance.mean()
    pairs = table[table.measure == "minimal pairs"].pivot(index="contrast", columns="model", values="score")
    n_pairs = int(table[(table.measure == "minimal pairs") & (table.model == "model")].n.sum())
    contrasts = mine.contrast.nunique()
    answers = [
        Answer("Did units get a place at all?", f"Moran's I of {contrasts} contrast maps", [t_interval(sheets.loc[m]) for m in BOTH],
               t_interval(sheets.loc["model"] - sheets.loc["twin"]), sheets.shape[1], "sheets", float(mine.chance.mean()),
               minus(f"shuffled positions {mine.chance.mean():.3f}; shuffled labels {labels['model']:.3f} and {labels['twin']:.3f}") +
               ": neighbours that are alike in all they do make any map smooth", ("smoother maps", "rougher maps")),
        Answer("What does place cost in grammar?", "minimal pairs, accuracy", [t_interval(pairs[m]) for m in BOTH], t_interval(pairs.model - pairs.twin),
               len(pairs), f"paradigms ({n_pairs:,} pairs)", 0.5, "chance 0.500", ("more pairs right", "fewer pairs right"))]
    rows = []
    for contrast in mine.contrast.unique():
        cells = [contrast.replace(">", " > ").replace("+", " + ")]
        for m in BOTH:
            one = mine[(mine.contrast == contrast) & (mine.model == m) & (mine.sheet == "mean")].iloc[-1]
            null = table[(table.measure == "moran beside shuffled labels") & (table.contrast == contrast) & (table.model == m)].iloc[-1]
            cells += [interval(triple(one), "{:.2f}".format), minus(f"{null.chance:.2f} ({null.low:.2f} to {null.high:.2f})")]
        rows.append(cells)
    lead = ("What lies on the sheets, unsmoothed. Moran's I says how alike neighbours are; whether a contrast is mapped beyond that, only the null of shuffled "
            "labels can say. Minimal pairs ask which of two sentences, one of them ungrammatical, is the likelier one.")
    made = synthetic(table)
    shown = [Figure(job.out / "map_sentences_nonwords.png", "Welch t of every unit for sentences against lists of non-words, topographic model and twin.",
                    minus(f"Null: Moran's I of shuffled positions {mine.chance.mean():.2f}, of shuffled labels {labels['model']:.2f}."), made, job),
             Figure(job.out / "summary.png", "Moran's I by contrast; how alike two units are over their distance; what the language mask prefers; what "
                    "silencing it costs.", "Nulls: shuffled positions and labels, random units, chance 0.5, all drawn.", made, job)]
    return Section("Topography", lead, answers, shown,
                   [("Moran's I of each contrast beside shuffled labels (mean, 95 %)",
                     ["contrast", "topographic", "shuffled labels", "twin", "shuffled labels"], rows)])


def show_probe(job, twin, seed):
    """The section on probing, paired over tasks."""
    tables, probe = [read(j) for j in (job, twin)], job.options["probe"][0]
    best = [t[(t.layer == "best") & (t.probe == probe)] for t in tables]
    real = [t[t.baseline.isna()].set_index("dataset") for t in best]
    fresh = best[0][best[0].baseline == "random_init"].set_index("dataset").score
    bags = [t[(t.baseline == "layer0") & (t.metric == "accuracy")].set_index("dataset").score for t in tables]
    gap = real[0].score - real[1].score
    answers = [Answer("(a) What can be probed?", f"accuracy of {probe} probes, mean of {len(gap)} tasks", [t_interval(t.score) for t in real], t_interval(gap),
                      len(gap), f"tasks ({int(real[0].n.median()):,} sentences each)", float(real[0].chance.mean()),
                      f"majority {real[0].chance.mean():.3f}; random weights {fresh.mean():.3f}", ("more can be probed", "less can be probed"))]
    rows = [[task.split("/")[-1].replace("_", " "), *(interval(triple(t.loc[task]), "{:.3f}".format) for t in real), minus(f"{gap[task]:+.3f}"),
             f"{fresh[task]:.3f}", *(f"{bag[task]:.3f}" for bag in bags), f"{real[0].chance[task]:.3f}"] for task in gap.index]
    lead = ("What a linear probe reads off the hidden states of sentences whose words it was not fitted on. The layer is chosen on validation folds; both "
            "models have the same folds. The difference is paired over tasks, so its interval is about tasks like these.")
    shown = [Figure(j.out / figures(j)[0], f"The {who}: accuracy of probes by layer, task by task, with 95 % intervals.",
                    "Nulls: the majority guess, the bag of embeddings" + " and random weights" * ("random_init" in j.options["baselines"]) + ", all drawn.",
                    synthetic(t), j) for j, t, who in ((job, tables[0], "topographic model"), (twin, tables[1], "twin"))]
    return Section("Probing", lead, answers, shown, [("Accuracy at the chosen layer; the bag is the mean of the token embeddings", [
        "task", "topographic", "twin", "difference", "random weights", "bag", "twin's bag", "majority"], rows)])


def show_warp(job, other, seed):
    """The section on d_warp: both models against a brain grown from each."""
    jobs, names, points, gaps, rows = [job, other], job.options["models"], [], [], []
    last = max(job.options["dims"])
    for j, grown in zip(jobs, BOTH.values()):
        table = read(j)
        reached = table[table.measure == "d_warp absolute"].set_index("model").loc[names]
        gap = table[(table.measure == "difference of log10(1 + d_warp)") & (table.model == f"{names[1]} - {names[0]}")].iloc[-1]
        linear = table[(table.measure == "score") & (table.d == 0)].groupby("model").score.mean()
        zero = table[(table.measure == "score") & (table.d == 0)].chance.mean()
        points.append(reached)
        gaps.append((-gap.score, -gap.high, -gap.low))  # topographic minus twin
        show = Answer("", "", [triple(r) for r in reached.itertuples()], gaps[-1], 0, "", 0, "", log=True, last=last)
        rows.append([f"grown from the {grown} model", show.of(0), show.of(1), show.gap(), *(f"{linear[name]:.3f}" for name in names), minus(f"{zero:.3f}")])
    mean = [tuple(10 ** np.mean([np.log10(1 + p[c].iloc[k]) for p in points]) - 1 for c in ("score", "low", "high")) for k in (0, 1)]
    censored = sum(int((p.state == "censored").sum()) for p in points)
    answers = [Answer("(b) How far must the model be warped?", "d_warp, dimensions, mean of two brains", mean, tuple(np.mean(gaps, 0)),
                      int(table[table.measure == "score"].n.iloc[0]), f"held-out phrases ({job.options['seeds']} seeds)", 0.0,
                      f"no warp: 0; cut at {last:,}" + f", {censored} of 4 did not get there" * bool(censored), ("further", "nearer"), log=True, last=last)]
    lead = ("All parameters move along d random directions until a linear readout predicts a planted brain nearly as well as the best fully warped model "
            f"does: the least such d is d_warp. A brain is {job.options['planted_warp']:g} of its norm away from the model that it was grown from, so there "
            "are two, one from each, and the answer is the mean over both (in log dimensions): who is at home in which brain falls out of it. Its interval is "
            "the mean of both brains' intervals, as if they erred alike, which is the wider assumption.")
    made = all(synthetic(read(j)) for j in jobs)
    shown = [Figure(j.out / "curves.png", f"Brain grown from the {grown} model: score over dimensions of the warp, d_warp with its interval, and d_warp "
                    "against the linear score.", f"Null: predictions dealt to other phrases, r = {row[-1]}; d = 0 is no warp at all.", made, j)
             for j, grown, row in zip(jobs, BOTH.values(), rows)]
    return Section("Warping", lead, answers, shown, [("d_warp in each brain, and the linear score without a warp",
                                                      ["brain", "topographic", "twin", "ratio", "r, d = 0", "twin's", "shuffled"], rows)])


def show_decode(job, twin, seed):
    """The section on decoding into each model's own embeddings, paired over folds."""
    tables, lag = [read(j) for j in (job, twin)], 300.0
    meta = HERE / "data" / job.options["dataset"] / "meta.yaml"
    if meta.exists():  # where its words were planted: chosen before any score
        lag = float((yaml.safe_load(meta.read_text()).get("planted") or {}).get("lag_ms", lag))
    model, parts, rows = job.options["model"], [], []
    for t in tables:
        at = t[(t.model == model) & (pd.to_numeric(t.lag, errors="coerce") == lag)]
        parts.append({m: at[(at.metric == m) & (at.fold != "mean")].sort_values("fold") for m in ("auc", "top1", "two_afc")})
    oracle = [t[(t.model == "oracle") & (t.fold == "mean") & (t.metric == "auc")].score.iloc[-1] if (t.model == "oracle").any() else math.nan for t in tables]
    a, b = (p["auc"] for p in parts)
    answers = [Answer("(c) What can be decoded?", f"word ROC-AUC in the model's own embeddings, {lag:g} ms", [t_interval(a.score), t_interval(b.score)],
                      t_interval(a.score.to_numpy() - b.score.to_numpy()), len(a), f"folds ({a.n.sum():,} words)", float(a.chance.mean()),
                      f"shifted words {a.chance.mean():.3f} and {b.chance.mean():.3f}; the true embedding {oracle[0]:.3f} and {oracle[1]:.3f}",
                      ("more can be decoded", "less can be decoded"))]
    for metric, said in (("auc", "word ROC-AUC"), ("top1", "top-1"), ("two_afc", "2AFC")):
        x, y = (p[metric] for p in parts)
        if len(x):
            show = Answer("", "", [t_interval(x.score), t_interval(y.score)], t_interval(x.score.to_numpy() - y.score.to_numpy()), 0, "", 0, "")
            rows.append([said, show.of(0), show.of(1), show.gap(), f"{x.chance.mean():.3f}", f"{y.chance.mean():.3f}"])
    lead = (f"{model.capitalize()} regression from intracranial recordings to what each model itself makes of the word in its context (layer "
            f"{job.options['layer']}); held-out words are recognised by it among all words. The two targets differ, so this asks whose space a brain is easier "
            f"to read into. Scores are at {lag:g} ms after onset, where words were planted; folds share training words, so their interval is a narrow one.")
    made = "synthetic" in str(tables[0].data.iloc[0])
    shown = [Figure(j.out / "lags.png", f"Into the {who}'s embeddings: how well a word is decoded, over the lag of the window from its onset.",
                    "Null: the words shifted in a circle (grey band); the controls without a brain are dotted.", made, j)
             for j, who in ((job, "topographic model"), (twin, "twin"))]
    return Section("Decoding", lead, answers, shown, [(f"At {lag:g} ms, over folds", [
        "measure", "topographic", "twin", "difference", "shifted words", "twin's"], rows)])


SAID = {"trial": "other pictures of known words", "object": "words never trained on", "subject": "a person never trained on", "subject_object": "neither"}


def show_telepath(job, twin, seed):
    """The section on EEG to words through each model, in pairs over what was shown."""
    tables, samples, rows, found = [read(j) for j in (job, twin)], [], [], {}
    for j in (job, twin):
        s = pd.read_csv(j.out / "samples.csv", keep_default_na=False, dtype=str)
        s["right"] = [(ranked + " ").startswith(word + " ") for ranked, word in zip(s.ranked, s.word)]
        samples.append(s)
    for name, said in SAID.items():
        s, t = (x[x.set == name] for x in samples)
        if not len(s):
            continue
        if list(s.word + s.image + s.subject) != list(t.word + t.image + t.subject):
            raise ValueError(f"{job.out} and {twin.out} were scored on other trials: run both with the same data and split")
        both = [t[(t.set == name) & (t.metric == "top1")].set_index("control") for t in tables]
        gap = by_cluster(s.right.to_numpy(float) - t.right.to_numpy(float), s.object, seed)
        found[name] = Answer("(c) What can be decoded?", f"EEG to words through the GPT, top-1: {said}", [triple(x.loc["eeg"]) for x in both], gap,
                             s.object.nunique(), f"objects ({len(s)} trials)", float(both[0].loc["eeg"].chance),
                             f"chance {both[0].loc['eeg'].chance:.3f}; shuffled EEG " + " and ".join(f"{x.loc['shuffled'].score:.3f}" for x in both),
                             ("more words are right", "fewer words are right"))
        a = found[name]
        rows.append([said, a.of(0), a.of(1), a.gap(), f"{a.null:.3f}", *(f"{x.loc['shuffled'].score:.3f}" for x in both), f"{a.n} {a.over}"])
    lead = (f"A frozen GPT reads EEG through experts of its own layers and says what was seen; {job.options['max_iters']:,} steps. Both models have the same "
            "encoder, trials, order and held-out words. Differences are paired trial by trial, their intervals over objects.")
    made = synthetic(tables[0])
    shown = [Figure(j.out / "results.png", f"Through the {who}: four evaluation sets, by who and what was seen in training.",
                    "Nulls: chance, shuffled EEG, an empty prefix and the most frequent word, all drawn.", made, j)
             for j, who in ((job, "topographic model"), (twin, "twin"))]
    return Section("Telepathy", lead, [found[name] for name in ("trial", "object") if name in found], shown,
                   [("Closed-set top-1", ["evaluation set", "topographic", "twin", "difference", "chance", "shuffled", "twin's", "n"], rows)])


SECTIONS = {"train.py": show_train, "sample.py": show_sample, "topography.py": show_topography, "probe.py": show_probe, "warp.py": show_warp,
            "decode.py": show_decode, "telepath.py": show_telepath}


# ---- the page

INK, ACCENT, TWIN = "#1c1e21", "#0b6e99", "#c8743a"


def draw_overview(answers):
    """A panel for each answer: both models with their intervals and the null, as PNG bytes."""
    columns = min(4, len(answers))
    rows = -(-len(answers) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.75 * rows), layout="constrained", squeeze=False)
    fig.get_layout_engine().set(hspace=0.12, wspace=0.06)
    for axis in axes.flat[len(answers):]:
        axis.set_visible(False)
    for axis, a in zip(axes.flat, answers):
        scale = (lambda v: np.log10(1 + np.asarray(v))) if a.log else np.asarray
        for k, color in enumerate((ACCENT, TWIN)):
            score, low, high = scale(a.models[k])
            axis.plot([k, k], [low, high], color=color, lw=5, alpha=0.35, solid_capstyle="round")
            axis.plot([k], [score], "o", color=color, ms=8)
        axis.axhline(scale(a.null), color="0.45", lw=0.9, ls=(0, (4, 3)))
        axis.set_xticks([0, 1], ["topographic", "twin"], fontsize=8.5)
        axis.set_xlim(-0.6, 1.6)
        axis.margins(y=0.15)
        if a.log:
            ticks = [d for d in (0, 1, 10, 100, 1000, 10000) if d <= 10 * max(m[2] for m in a.models)]
            axis.set_yticks(scale(ticks), [f"{d:,}" for d in ticks])
        axis.tick_params(axis="y", labelsize=8)
        axis.tick_params(length=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("0.75")
        axis.set_title("\n".join(textwrap.wrap(a.what, 34)), fontsize=9.5, color=INK)
        axis.set_xlabel(f"{'ratio' if a.log else 'difference'} {a.gap()}", fontsize=8.5, color="0.3")
    fig.supxlabel("bars: 95 % intervals; dashed: chance or null; one seed of each model", fontsize=8, color="0.45")
    picture = io.BytesIO()
    fig.savefig(picture, dpi=160, format="png")
    plt.close(fig)
    return picture.getvalue()


STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1c1e21; font: 17px/1.6 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "DejaVu Serif", serif; }
main { max-width: 66rem; margin: 0 auto; padding: 4rem 2rem 6rem; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .6rem; font-weight: 600; letter-spacing: -.01em; }
h2 { font-size: 1.4rem; margin: 4.5rem 0 .5rem; padding-top: 1.4rem; border-top: 1px solid #dcdfe3; font-weight: 600; }
p, ul { max-width: 44rem; }
nav a { margin-right: 1.1em; } a { color: #0b6e99; text-decoration: none; } a:hover { text-decoration: underline; }
nav, table, figcaption, .tag { font: .8rem/1.45 "Inter", "Helvetica Neue", "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; }
code { font: .74rem ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; background: #f4f5f6; padding: .1em .4em; border-radius: 3px; }
.wide { overflow-x: auto; margin: 1.2rem 0 1.8rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #5d6570; padding-bottom: .4rem; }
th { text-align: left; font-weight: 600; color: #5d6570; border-bottom: 1.5px solid #1c1e21; padding: .35rem .9rem .35rem 0; vertical-align: bottom; }
td { border-bottom: 1px solid #e6e8eb; padding: .5rem .9rem .5rem 0; vertical-align: top; }
th.n, td.n { text-align: right; white-space: nowrap; } th:last-child, td:last-child { padding-right: 0; }
td.q { font-weight: 600; min-width: 9rem; } td small { color: #5d6570; font-size: .74rem; display: block; }
.verdict { font-weight: 600; } .null { color: #5d6570; font-weight: 400; }
figure { margin: 2rem 0; } figure img { width: 100%; height: auto; display: block; }
figcaption { color: #3b424a; margin-top: .6rem; max-width: 52rem; }
.tag { display: inline-block; font-size: .68rem; letter-spacing: .04em; text-transform: uppercase; border-radius: 3px; padding: .05em .5em;
  margin-right: .5em; }
.synthetic { background: #fdf0e3; color: #9a4d12; } .real { background: #e6f2ee; color: #1d6650; }
.texts { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem; font-size: .85rem; }
pre { font: .85rem/1.5 Charter, Georgia, "DejaVu Serif", serif; white-space: pre-wrap; border-left: 3px solid #e6e8eb; padding-left: 1rem; }
.missing { background: #f4f5f6; padding: .8rem 1rem; border-radius: 4px; } .over { color: #9a4d12; }
"""


def cell(text):
    """Text as HTML."""
    return html.escape(str(text))


def html_table(caption, header, rows):
    """Numbers to the right, the rest to the left."""
    numeric = [all(re.match(r"^[+\-−×><]?\s?[\d.,]+", str(row[k])) and not re.search(r"[a-z]{3}", str(row[k])) for row in rows) for k in range(len(header))]
    mark = [' class="n"' if n else "" for n in numeric]
    head = "".join(f"<th{m}>{cell(h)}</th>" for h, m in zip(header, mark))
    body = "".join("<tr>" + "".join(f"<td{m}>{cell(v)}</td>" for v, m in zip(row, mark)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><caption>{cell(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_answers(answers):
    """The table of answers."""
    rows, before = [], None
    for a in answers:
        rows.append(f'<tr><td class="q">{cell(a.question) if a.question != before else ""}</td><td>{cell(a.what)}<small>{cell(a.beside)}</small></td>'
                    f'<td class="n">{stack(a.of(0))}</td><td class="n">{stack(a.of(1))}</td>'
                    f'<td class="n">{stack(a.gap())}</td><td>{a.n:,} {cell(a.over)}<small>{"paired" if a.paired else "not paired"}</small></td>'
                    f'<td class="{"verdict" if a.words[0] in a.verdict() or a.words[1] in a.verdict() else "null"}">{cell(a.verdict())}</td></tr>')
        before = a.question
    return ('<div class="wide"><table><caption>Score [95 % interval]; the small print is chance or null. Difference: topographic − twin (dimensions: their '
            'ratio).</caption><thead><tr><th>question</th><th>measure, beside its null</th><th class="n">topographic</th><th class="n">twin</th>'
            '<th class="n">difference</th><th>interval over</th><th>what one seed can say</th></tr></thead><tbody>' + "".join(rows) + "</tbody></table></div>")


def stack(text):
    """A number above its interval."""
    score, _, between = text.partition(" [")
    return f"{cell(score)}<small>{cell('[' + between) if between else 'no interval'}</small>"


def picture(data, words):
    """A PNG within the page."""
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="{html.escape(words, quote=True)}">'


def html_figure(f):
    """A picture with what must stand below it."""
    mark = '<span class="tag synthetic">synthetic</span>' if f.synthetic else '<span class="tag real">real text</span>'
    return (f"<figure>{picture(f.path.read_bytes(), f.sentence)}<figcaption>{mark}{cell(f.sentence)} {cell(f.null)} "
            f"<code>python {cell(f.job.command)}</code></figcaption></figure>")


def collect(stages, seed):
    """(sections, missing): what can be told from finished jobs, in the stages' order, and for each experiment that cannot, its unfinished commands."""
    jobs, sections, missing = [job for _, _, some in stages for job in some], [], []
    for name in dict.fromkeys(job.script.name for job in jobs if job.options is not None):
        mine = [job for job in jobs if job.script.name == name]
        unfinished = [job for job in mine if not job.finished(jobs)]
        if unfinished or name not in SECTIONS:
            missing.append((name, [job.command for job in unfinished]))
        else:
            sections.append(SECTIONS[name](*mine, seed))
    return sections, missing


def headline(answers):
    """One sentence a question, from its intervals."""
    said = []
    for question in dict.fromkeys(a.question for a in answers):
        verdicts = list(dict.fromkeys(a.verdict() for a in answers if a.question == question))
        said.append(f"<li><b>{cell(question)}</b> {cell('; '.join(v[0].upper() + v[1:] if i == 0 else v for i, v in enumerate(verdicts)))}.</li>")
    return f"<ul>{''.join(said)}</ul>"


def provenance(run, stages):
    """Versions, machine, and what every stage took beside its budget, over all attempts."""
    log = run.out / "stages.jsonl"
    tries = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    rows = []
    for name, budget, some in stages:
        took = [t["seconds"] for t in tries if t["stage"] == name]
        over = sum(took) > budget
        rows.append([name, clock(budget), clock(sum(took)) + (" over its budget" if over else "") if took else "not run by the demo", str(len(took)),
                     "; ".join(job.command for job in some)])
    made = []
    for _, _, some in stages:
        for job in some:
            path = job.out / "config.yaml"
            if job.options is not None and path.exists():
                facts = dict(line[2:].split(": ", 1) for line in path.read_text().splitlines() if line.startswith("# ") and ": " in line)
                made.append([str(job.out), *(facts.get(k, "") for k in ("code", "torch", "dtype", "device")), str(job.options.get("seed", ""))])
    cpu = next((line.split(":", 1)[1].strip() for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
                if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "numpy", "scipy", "scikit-learn", "himalaya", "mne", "matplotlib"))
    git = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip() or "not a git checkout"
    words = (f"{cores} cores ({cpu}), {platform.system()} {platform.machine()}, Python {platform.python_version()}; {versions}. Page written from {git} on "
             f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}.")
    return (f"<p>{cell(words)}</p>"
            + html_table("Stages: budget and time (min:s), over all attempts", ["stage", "budget", "took", "attempts", "commands"], rows)
            + (html_table("Runs", ["folder", "code", "torch", "precision", "device", "seed"], made) if made else ""))


def report(run, config, stages):
    """Write report.html, overview.png and results.csv from finished jobs. Returns the answers."""
    sections, missing = collect(stages, config.seed)
    answers = sorted((a for s in sections for a in s.answers), key=lambda a: QUESTIONS.index(a.question))
    (run.out / f"results.part-{run.rank}.jsonl").unlink(missing_ok=True)  # the page is a function of the scripts' results, and so is its table
    for a in answers:
        for k, name in enumerate(BOTH.values()):
            run.result(a.models[k][0], a.null, *a.models[k][1:], a.n, question=a.question, measure=a.what, model=name, paired=False)
        run.result(a.difference[0], 0.0, *a.difference[1:], a.n, question=a.question, measure=a.what, paired=a.paired,
                   model="log10 ratio, topographic over twin" if a.log else "topographic - twin")
    run.merge()
    parts = ["<h1>Did giving units a place change anything?</h1>",
             "<p>Two small GPT-2s read the same text. In one, every unit has a place on a cortical sheet, and neighbours are trained to respond alike; its "
             "twin has no such loss. Both then went through the same experiments. <b>There is one seed of each:</b> a difference below is one of these two "
             "models, and says nothing yet about topography in general. Brains and sentences marked synthetic were made up with a known truth and are no "
             f"evidence about people. With {len(answers)} intervals of 95 %, one that misses zero is no surprise.</p>"]
    if answers:
        overview = draw_overview(answers)
        with aside(run.out / "overview.png") as f:
            f.write(overview)
        told = ("Every measure of the table below: both models with 95 % intervals, and chance or null as a dashed line. Brains, EEG and probed sentences are "
                "synthetic, the text is real. ")
        parts += [headline(answers), f"<figure>{picture(overview, told)}<figcaption>{told}<code>python demo.py report_only=True</code></figcaption></figure>",
                  html_answers(answers)]
    links = [*((s.title.lower(), s.title) for s in sections), ("made", "How it was made")]
    parts.append("<nav>" + "".join(f'<a href="#{cell(to)}">{cell(title)}</a>' for to, title in links) + "</nav>")
    for s in sections:
        parts += [f'<h2 id="{cell(s.title.lower())}">{cell(s.title)}</h2><p>{cell(s.lead)}</p>',
                  *(html_table(*t) for t in s.tables), *map(html_figure, s.figures)]
        if s.texts:
            parts.append('<div class="texts">' + "".join(f"<div><b>{cell(who)}</b> <code>python {cell(job.command)}</code><pre>{cell(text)}</pre></div>"
                                                         for who, text, job in s.texts) + "</div>")
    for name, commands in missing:
        told = "Not finished: " + ", ".join(f"<code>python {cell(c)}</code>" for c in commands) + ". The same <code>make demo</code> goes on with it." \
            if commands else "This page has no section for it: its results stand in its folder."
        parts.append(f'<h2>{cell(name)}</h2><p class="missing">{told}</p>')
    parts.append(f'<h2 id="made">How it was made</h2>{provenance(run, stages)}')
    write_aside(run.out / "report.html", f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
                f"<title>nanoCortex: the demo</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n")
    return answers


def main(config):
    config.stages = config.stages or configure(Config, [str(HERE / "config/demo.yaml")]).stages
    stages = read_stages(config.stages)
    run = Run(config)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a closed terminal, too, ends the scripts in order
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    status = 0 if config.report_only else run_stages(run, stages)
    for a in report(run, config, stages):
        run.print(f"{a.question} {a.what}: {a.of(0)}, twin {a.of(1)}; {a.gap()} over {a.n:,} {a.over}: {a.verdict()}")
    run.print(f"the page: {run.out / 'report.html'}" + (", without what is not finished" if status else ""))
    run.close()
    sys.exit(status)


if __name__ == "__main__":
    main(configure(Config))
