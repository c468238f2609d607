"""Decode Neuroprobe's binary tasks (arXiv 2509.21671) with the splits that its package fixes.

    python data/braintreebank/prepare.py root=PATH                                  # first, once
    python decode_neuroprobe.py                               # Laplacian-referenced spectrograms
    python decode_neuroprobe.py split=session                 # from another film of the same person
    python decode_neuroprobe.py task=speech subjects=sub_1_trial001
    python decode_neuroprobe.py config/decode_neuroprobe_encoder.yaml       # a pretrained encoder

15 tasks on the second after word onsets in films, 12 recordings. results.csv has a row per
recording, task and fold; leaderboard/ has a JSON file per task in the leaderboard's format. The
benchmark fixes windows and splits; validation windows choose the penalty or the epoch.
"""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy import stats

import decode
from configurator import InputError, Run, configure, key_seed
from data import file_hash, montage, path_state, read_table, write_aside
from data.montage import Montage, is_subject
from data.podcast.registry import files_in
from data.podcast.speech import Target
from data.recording import Recording, read_set


@dataclass
class Config:
    dataset: str = "braintreebank"  # name under data/, or a folder of data/braintreebank/prepare.py
    subjects: list[str] = field(default_factory=list)  # people or recordings to test; none: all
    task: str = "all"  # or one of the tasks
    # train on the same film, on another film of the same person, or on another person
    split: Literal["within", "session", "subject"] = "within"
    # ---- windows, as in decode.py
    window: float = 1.0  # s from the onset, as the benchmark has it
    represent: Literal["bins", "spectrum"] = "spectrum"  # bin means, or log power over time
    bins: int = 128  # per window
    spectrum_segment: float = 0.25  # s, Hann windows that overlap by half
    spectrum_max: float = 150.0  # Hz
    reference: Literal["none", "laplacian"] = "laplacian"  # minus the shaft's neighbours
    preprocess: str = ""  # instead: as in decode.py
    preprocessor_params: dict = field(default_factory=dict)
    # ---- decoder and training, as in decode.py
    model: str = "logistic"  # one of decode.DECODERS, or my_file.py:constructor(model_params)
    model_params: dict = field(default_factory=dict)
    batch_size: int = 32  # windows
    epochs: int = 60  # at most
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    patience: int = 10  # epochs without improvement on the validation windows
    # ---- run
    n_shifts: int = 1000  # circular shifts of the labels: the null
    out_dir: str = "out/neuroprobe"  # results.csv, leaderboard/; run again to continue
    seed: int = 1337
    device: str = "auto"  # cuda, mps, cpu

    POSITIVE = "window bins spectrum_segment spectrum_max batch_size epochs learning_rate n_shifts"


# Mean test ROC-AUC over all rows of the leaderboard's files, by split.
LEADERBOARD = {
    "linear on Laplacian-referenced spectrogram": (0.660, 0.648, 0.539),
    "linear on spectrogram": (0.630, 0.626, 0.528),
    "linear on raw voltage": (0.606, 0.576, 0.510),
    "BrainBERT, pretrained, frozen": (0.587, 0.581, 0.522),
    "BrainBERT, untrained, frozen": (0.585, 0.574, 0.527),
    "PopulationTransformer": (0.545, 0.566, 0.526),
}
SPLITS = {"within": "Within-Session", "session": "Cross-Session", "subject": "Cross-Subject"}


# ---- data


class Benchmark:
    """The prepared set: its recordings and tables of windows, opened when needed.

    recordings: {name: Recording}; sources: {test recording: training recording}; tasks: names.
    """

    def __init__(self, run, config):
        self.run, self.config = run, config
        self.folder = run.dataset(config.dataset)
        meta = read_set(self.folder)
        if "tasks" not in meta:
            raise InputError(f"{self.folder} has no tasks: data/braintreebank/prepare.py makes it")
        if config.task not in ["all", *meta["tasks"]]:
            raise InputError(f"task={config.task}: take all or one of {', '.join(meta['tasks'])}")
        self.tasks = meta["tasks"] if config.task == "all" else [config.task]
        self.recordings = {}
        for name in meta["recordings"]:
            if (self.folder / name / "neuroprobe.csv").is_file():
                self.recordings[name] = Recording(self.folder / name)
        self.sources = {}
        for name, recording in self.recordings.items():
            if config.subjects and not any(is_subject(s, recording) for s in config.subjects):
                continue
            source = self.source(name, meta["across_people"])
            if source:
                self.sources[name] = source
            else:
                run.print(f"split={config.split}: {name} is left out, with nothing to train on")
        if not self.sources:
            raise InputError(
                f"split={config.split} subjects={config.subjects}: no recording to test is left in "
                f"{self.folder}, which has {', '.join(self.recordings)}"
            )
        self.opened = {}  # {recording: its Windows}

    def source(self, name, across_people):
        """Return the name of the training recording, None if it is not prepared."""
        for other, recording in self.recordings.items():
            same_person = recording.subject == self.recordings[name].subject
            fits = {"within": other == name, "session": other != name and same_person}
            fits["subject"] = other == across_people and not same_person
            if fits[self.config.split]:
                return other
        return None

    def table(self, name, task):
        """Return a task's windows in a recording in order of time: onset, label, splits."""
        table = read_table(self.folder / name / "neuroprobe.csv")
        return table[table.task == task].sort_values("onset", kind="stable")

    def windows(self, name, onset):
        """Return windows (N, channels, ...) that begin at onsets, and the channels' regions."""
        recording = self.recordings[name]
        if name not in self.opened:
            if len(self.opened) > 1:
                self.opened.clear()  # keep a recording and its training recording only
            montage = Montage([(recording, np.flatnonzero(recording.good))], self.config.reference)
            if montage.gaps:
                self.run.print(f"left out, constant or with missing samples (NaN): {montage.gaps}")
            cache = self.run.out.parent / "cache"
            self.opened[name] = decode.make_windows(self.config, montage, cache)
        windows = self.opened[name]
        rows = windows.montage.rows(onset)
        if not windows.montage.inside(rows, windows.width).all():
            raise InputError(f"{name}: windows of {self.config.window} s end beyond the recording")
        names = pd.Series(windows.montage.names).str.partition(" ")[2]
        x = windows.at(rows, 500 * self.config.window)  # ms to the middle
        return x, recording.channels.set_index("name").region[names]

    def inputs(self, name, task):
        """Return windows (N, ...), their tables, and where this recording's own windows begin.

        The training recording comes first, where it is another one.
        """
        tables = []
        parts = []
        for recording in dict.fromkeys([self.sources[name], name]):
            tables.append(self.table(recording, task))
            parts.append(self.windows(recording, tables[-1].onset.to_numpy()))
        arrays = [x for x, regions in parts]
        if self.config.split == "subject" and not self.config.preprocess:
            arrays = means_of_regions(*parts)
        same = arrays[0].shape[1:] == arrays[-1].shape[1:]
        if self.config.split == "session" and not self.config.preprocess:
            same = parts[0][1].index.equals(parts[1][1].index)  # equal counts are not enough
        if not same or arrays[0].size == 0:
            raise InputError(
                f"split={self.config.split}: {self.sources[name]} and {name} have different "
                "contacts, or no region in common: set preprocess= to an encoder that maps all "
                "electrodes to the same features"
            )
        x = np.concatenate(arrays)
        return x, tables, len(x) - len(tables[-1])


def means_of_regions(one, other):
    """Average the windows of two people over the brain regions that both have: (N, regions, ...).

    Contacts have no counterpart in another person. one, other: (windows, regions of channels).
    """
    shared = sorted((set(one[1]) & set(other[1])) - {""})
    arrays = []
    for x, regions in (one, other):
        of_region = pd.get_dummies(regions)[shared].to_numpy(np.float32)  # (channels, regions)
        x = x.reshape(len(x), len(regions), -1)
        arrays.append(np.einsum("ncf,cr->nrf", x, of_region / of_region.sum(axis=0)))
    return arrays


def make_folds(tables, first, config):
    """Return the folds of a recording and task; `first`: its first row, see Benchmark.inputs."""
    table = tables[-1]
    onset = table.onset.to_numpy()
    gap = int(np.ceil(config.window / max(np.median(np.diff(onset)), 1e-3))) + 1
    columns = ["across"]
    if config.split == "within":
        columns = sorted(table.filter(like="within_"))
    y = np.array(pd.concat(tables).label, np.int64)
    folds = []
    for k, column in enumerate(columns):
        part = table[column].to_numpy()
        train = np.arange(first) if first else np.flatnonzero(part == "train")
        val, test = first + np.flatnonzero(part == "val"), first + np.flatnonzero(part == "test")
        shifts = np.random.default_rng(key_seed(config.seed, "shift", k)).random(config.n_shifts)
        folds.append(decode.Fold(k, train, val, test, shifts, gap, y))
    return folds


# ---- evaluate


def score_task(run, config, benchmark, name, task):
    """Score all folds of a recording and task, then write their rows of results.csv."""
    X, tables, first = benchmark.inputs(name, task)
    X = torch.as_tensor(X, device=run.device)
    rows = []
    for fold in make_folds(tables, first, config):
        target = Target("classes", fold.Y, fold.Y, fold.Y, ["0", "1"])
        decoder, _ = decode.fit_decoder(config.model, X, target, fold, config)
        scores = decode.evaluate(decode.predict(decoder, X[fold.test]), target, fold, config)
        scores = scores.loc[["roc_auc", "accuracy"]]
        train = decode.predict(decoder, X[fold.train]).mean(axis=1)
        identity = np.arange(len(train))[None]
        trained = decode.measure_classes(train, fold.Y[fold.train], target.names, identity)
        table = scores[decode.FACTS].assign(train_score=pd.DataFrame(trained).loc[0])
        table["p"] = decode.p_value(scores.score, scores.drop(columns=decode.FACTS).T.to_numpy())
        table["test_near_train"] = 0
        if not first:
            onset = tables[-1].onset.to_numpy()
            far = decode.embargo(fold.test, fold.train, onset, config.window)
            table["test_near_train"] = len(fold.test) - len(far)
        rows.append(table.assign(fold=fold.number).reset_index())
    keys = {"recording": name, "task": task, "split": config.split, "model": config.model}
    data = "BrainTreebank" + ", synthetic" * benchmark.recordings[name].synthetic
    decode.write_results(run, pd.concat(rows), data=data, **keys)


def write_leaderboard(folder, description, name, results):
    """Write a JSON file per task in the leaderboard's format; the user fills in the author."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, part in results.groupby("task", sort=False):
        evaluation = {}
        for (recording, fold), rows in part.groupby(["recording", "fold"]):
            person, trial = re.fullmatch(r"sub_(\d+)_trial(\d+)", recording).groups()
            scores = {"fold_idx": int(fold)}
            for row in rows.itertuples():
                scores[f"train_{row.metric}"] = float(row.train_score)
                scores[f"test_{row.metric}"] = float(row.score)
            second = {"time_bin_start": 0.0, "time_bin_end": 1.0, "folds": []}
            entry = {"population": {"one_second_after_onset": second}}
            entry = evaluation.setdefault(f"btbank{person}_{int(trial)}", entry)
            entry["population"]["one_second_after_onset"]["folds"].append(scores)
        content = {"model_name": name, "description": description, "author": ""}
        content |= {"organization": "", "organization_url": "", "timestamp": 0}
        content["evaluation_results"] = evaluation
        write_aside(folder / f"population_{task}.json", json.dumps(content, indent=2))


def report(run, config, results, n_expected):
    """Write leaderboard/ from the results so far, and print the closing lines."""
    inputs = config.preprocess or config.represent
    description = f"{config.model} on {inputs}, reference {config.reference}"
    folder = run.out / "leaderboard" / SPLITS[config.split]
    write_leaderboard(folder, f"decode_neuroprobe.py: {description}", run.out.name, results)
    auc = results[results.metric == "roc_auc"]
    each = auc.groupby(["recording", "task"], sort=False)[["score", "chance"]].mean()
    by_task = each.rename(columns={"chance": "shifted labels"}).groupby("task", sort=False).mean()
    run.print(f"mean test ROC-AUC over recordings:\n{by_task.round(3).to_string()}")
    by_recording = each.groupby("recording").score.mean()
    half = by_recording.sem() * stats.t.ppf(0.975, len(by_recording) - 1)  # nan for one recording
    run.print(
        f"{SPLITS[config.split]}, {description}: mean test ROC-AUC {by_recording.mean():.3f} "
        f"± {half:.3f} over recordings, shifted labels {each.chance.mean():.3f}, {len(each)} of "
        f"{n_expected} recordings x tasks, {auc.n.sum():,} test windows, of which "
        f"{auc.test_near_train.sum():,.0f} share samples with a training window (the benchmark's "
        "own splits)"
    )
    column = list(SPLITS).index(config.split)
    published = ", ".join(f"{model} {scores[column]:.3f}" for model, scores in LEADERBOARD.items())
    run.print(f"leaderboard, mean over all rows: {published}")
    run.print(f"{folder}: one JSON per task, add author and organization; {run.out}")


def main(config):
    run = Run(config)
    benchmark = Benchmark(run, config)
    states = [path_state(recording.path) for recording in benchmark.recordings.values()]
    content = states, files_in(config.preprocessor_params.values()), file_hash(montage.__file__)
    run.content = hashlib.sha256(repr(content).encode()).hexdigest()[:6]
    jobs = list(itertools.product(benchmark.sources, benchmark.tasks))
    rows = run.rows()
    done = set(zip(rows.recording, rows.task)) if len(rows) else set()
    todo = [job for job in run.share(jobs) if job not in done]
    bar = run.progress(len(todo), desc="recordings x tasks")
    for name, task in todo:
        score_task(run, config, benchmark, name, task)
        bar.update()
    bar.close()
    results = run.merge()
    if run.master:
        report(run, config, results, len(jobs))
    run.close()


if __name__ == "__main__":
    main(configure(Config))
