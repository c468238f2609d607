"""telepath_questions.py: tables with chance, interval and n, jobs done once, the right samples."""

import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_telepath import FAST, Here, given  # noqa: F401 (a fixture)
from test_telepath import a_config as telepath_config

import telepath
import telepath_questions as Q
from configurator import check
from data import InputError


@pytest.fixture(autouse=True)
def not_rendered(monkeypatch):
    """Figures are drawn; to render them takes longer than to analyse."""

    def close(figure, path, title):
        assert "synthetic" in title
        plt.close(figure)
        path.touch()

    monkeypatch.setattr(Q, "save_figure", close)


def a_config(given, **options):  # noqa: F811
    files = {"dataset": str(given / "eeg"), "lm": str(given / "lm.pt")}
    few = {"max_iters": 1, "eval_trials": 12, "shuffles": 10}
    return Q.Config(**{**FAST, **files, **few, **options})


@pytest.mark.parametrize("analysis", ["frozen", "generalise", "architecture"])
def test_analyses(given, tmp_path, analysis):  # noqa: F811
    Q.main(a_config(given, analysis=analysis, out_dir=str(tmp_path)))
    table = pd.read_csv(tmp_path / "results.csv")
    assert (tmp_path / f"{analysis}.png").exists() and len(table) > 3
    assert table[["score", "chance", "low", "high", "n"]].notna().all().all()
    assert table.data.str.contains("synthetic").all()
    Q.main(a_config(given, analysis=analysis, out_dir=str(tmp_path)))  # all rows are there
    lines = (tmp_path / "results.part-0.jsonl").read_text().splitlines()
    assert len(lines) == len(table)


def test_slices_and_silenced_samples_are_those_named(given, tmp_path, monkeypatch):  # noqa: F811
    seen = []

    def top1(run, config, experiment, name, words=None, silenced=()):
        seen.append((experiment.trials.offsets / 50, list(silenced)))
        row = {"score": 0.0, "chance": 0.1, "low": 0.0, "high": 0.1, "n": 1, "shuffled": 0.1}
        return {**row, "set": name, "data": "made up, synthetic"}

    monkeypatch.setattr(Q, "fit", lambda *args: None)
    monkeypatch.setattr(Q, "top1", top1)
    Q.main(a_config(given, analysis="window", out_dir=str(tmp_path)))
    table = pd.read_csv(tmp_path / "results.csv")
    assert set(table.kind) == {"slice", "growing", "silenced"}
    for row, (seconds, silenced) in zip(table.itertuples(), seen):
        if row.kind == "silenced":
            seconds = seconds[silenced]
        assert np.allclose(seconds, np.arange(row.start, row.end - 1e-6, 0.02))


def test_a_job_that_was_cut_short_is_done_again(given, tmp_path, monkeypatch):  # noqa: F811
    done, real = [], Q.top1

    def top1(*args):
        done.append(args[3])
        return real(*args) if len(done) != 2 else 1 / 0

    monkeypatch.setattr(Q, "top1", top1)
    monkeypatch.setattr(Q, "fit", lambda *args: None)
    config = a_config(given, analysis="generalise", out_dir=str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        Q.main(config)
    (tmp_path / ".lock").unlink()
    Q.main(config)
    table = pd.read_csv(tmp_path / "results.csv")
    assert (table.groupby("trained").size() == 2).all() and len(done) == len(table) + 2


def test_rows_of_other_weights_or_recordings_are_not_reused(given):  # noqa: F811
    config = a_config(given)
    first = Q.content_of(config)
    assert Q.content_of(config) == first
    for file in (given / "lm.pt", next(given.glob("eeg/*/signal.f32"))):
        before = file.stat()
        os.utime(file, (1, 1))  # made again
        assert Q.content_of(config) != first
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_where_the_tokens_of_a_run_go(given, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(telepath, "report", lambda *args: None)
    options = {"max_iters": 90, "eval_interval": 45, "learning_rate": 3e-3, "expert_lr": 1e-2}
    telepath.main(telepath_config(given, out_dir=str(given / "run"), **options))
    options = {"analysis": "tokens", "init_from": str(given / "run"), "eval_trials": 40}
    Q.main(a_config(given, out_dir=str(tmp_path), **options))
    tables = {}
    for name in ("trajectory", "query_key", "logit_lens"):
        tables[name] = pd.read_csv(tmp_path / f"{name}.csv")
        assert (tmp_path / f"{name}.png").exists()
        assert tables[name].data.str.contains("synthetic").all()
    way, keys, lens = tables.values()
    assert set(way.step) == {0, 45, 90}
    first = way[way.token == 0].groupby("step").distance.mean()
    assert first[90] < first[0]  # towards the word
    assert (keys.p_corrected >= keys.p).all() and (keys.n == 40).all()
    whole_window = lens[(lens.layer == 0) & (lens.token == 0)].iloc[0]
    assert whole_window.score < whole_window.null_low
    assert (lens.low <= lens.score).all() and (lens.n == 40).all()


def test_drift_is_nothing_for_the_same_model(given):  # noqa: F811
    config = a_config(given)
    run = Here(config)
    _, experiment = Q.fresh(run, config)  # ranks have different jobs: nothing here may wait
    lm = experiment.model.lm
    neutral = Q.neutral_text(run, config, experiment, lm, n_texts=2, length=5)
    assert neutral.shape[0] == 2 and abs(Q.drift_on(neutral, lm, lm, config)["score"]) < 1e-6


def test_shuffled_words_are_the_null():
    own = np.arange(40) % 4
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(own) for _ in range(100)])
    row, nulls = Q.against_shuffled(np.eye(4)[own], own, shuffled)
    assert row["score"] == 1 and row["p"] == 1 / 101 and abs(nulls.mean()) < 1e-9


REFUSED = [
    ({"analysis": "tokens"}, "init_from=out/telepath"),
    ({"init_from": "out/telepath"}, "train new models"),
    ({"analysis": "frozen", "held_out_objects": 0.0}, "held_out_objects"),
    ({"minutes": 2.0}, "max_iters"),
]


def test_options_that_do_not_go_together():
    for options, words in REFUSED:
        with pytest.raises(InputError, match=words):
            check(Q.Config(**options))
