"""Options by precedence and type, and what a run promises: results never without a chance level, keyed randomness, one job a folder."""
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
import yaml

import configurator
from configurator import Run, configure, key_seed


@dataclass
class Inner:
    depth: int = 2


@dataclass
class Config:
    out_dir: str = "out/x"      # where
    # ---- numbers
    seed: int = 1               # fixes all
    device: str = "cpu"         # here
    learning_rate: float = 1e-3
    lags: list[int] = field(default_factory=lambda: [0])
    top_k: int | None = 5
    on: bool = False
    kind: Literal["a", "b"] = "a"
    more: dict = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_precedence_and_types(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("learning_rate: 6e-4\nlags: [1, 2]\nseed: 3\nmore: {x: 1}\ninner: {depth: 4}\n")
    b.write_text("seed: 4\n")
    c = configure(Config, ["seed=5", str(a), "--lags=-100,0,100", str(b), "top_k=none", "on=true", "kind=b", "more.y=[1,2]", "inner.depth=1e1"])
    assert (c.seed, c.learning_rate, c.lags, c.top_k, c.on, c.kind) == (5, 6e-4, [-100, 0, 100], None, True, "b")
    assert c.more == {"x": 1, "y": [1, 2]} and c.inner.depth == 10
    assert configure(Config, []).seed == 1
    assert configure(Config, ["seed=983_040", "top_k=7"]).top_k == 7


@pytest.mark.parametrize("arg, words", [
    ("sede=1", ["unknown option 'sede'", "'seed'"]), ("seed=1.5", ["'seed'", "int", "1.5"]), ("seed=x", ["'seed'", "int"]), ("on=maybe", ["'on'", "bool"]),
    ("kind=c", ["'kind'", "a or b"]), ("learning_rate=fast", ["float"]), ("lags=a", ["list[int]"]), ("seed.x=1", ["'seed'", "no group"]),
    ("more=3", ["'more'", "dict"]), ("inner.wide=1", ["inner.wide"]), ("seed=true", ["'seed'"]), ("seed=inf", ["'seed'"]), ("nowhere.yaml", ["nowhere.yaml"])])
def test_bad_options_are_one_sentence(arg, words):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        configure(Config, [arg])
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words)


def test_numbers_have_a_range():
    @dataclass
    class Numbers:
        epochs: int = 3
        rate: float = 0.1
        share: float = 0.5
        start: float = 0.0
        lag: float = -1.0
        norm: float = float("inf")
        kinds: list[float] = field(default_factory=list)
        POSITIVE = "epochs rate"
        SHARES = "share"
        SIGNED = "start"

    configure(Numbers, ["epochs=1", "share=1", "start=-3", "lag=-4", "norm=inf"])
    for arg, words in (("epochs=0", "at least 1, not 0"), ("rate=0", "above 0"), ("share=1.1", "between 0 and 1"), ("norm=-1", "at least 0, not -1.0"),
                       ("rate=inf", "finite"), ("rate=nan", "must be float"), ("kinds=1,nan", "'kinds' must be")):
        with pytest.raises(ValueError, match=words):
            configure(Numbers, [arg])


def test_bad_yaml(tmp_path):
    for text, words in (("seed: [1", "not a YAML file"), ("- 1\n", "key: value"), ("seed: high\n", "must be int"),
                        ("!!python/object/apply:os.getcwd []", "YAML")):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            configure(Config, [str(path)])


def test_help_is_the_manual(capsys):
    with pytest.raises(SystemExit) as e:
        configure(Config, ["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and "---- numbers" in text and "seed=1" in text and "fixes all" in text


def test_every_config_file_is_valid():
    """Every config/*.yaml fits the script of its launch line, and so does every file that the line gives beside it."""
    import importlib
    for path in sorted((configurator.HERE / "config").glob("*.yaml")):
        if path.name == "demo.yaml":  # stages, no options: tests/test_demo.py
            continue
        launch = path.read_text().splitlines()[0]
        script = next(word for word in launch.split() if word.endswith(".py") and "/" not in word)
        given = [word for word in launch.split() if word.endswith(".yaml")]
        assert f"config/{path.name}" in given, launch
        configure(importlib.import_module(script[:-3]).Config, [str(configurator.HERE / f) for f in given])


def test_results_stand_beside_their_chance(tmp_path):
    def open_run(**options):
        return Run(configure(Config, [f"out_dir={tmp_path}", *(f"{k}={v}" for k, v in options.items())]))
    run = open_run()
    with pytest.raises(TypeError):
        run.result(0.5)
    for missing in ((0.7, np.nan, 0.6, 0.8, 100), (0.7, 0.5, np.nan, np.nan, 100), (0.7, 0.5, 0.8, 0.6, 100), (0.7, 0.5, 0.6, 0.8, 0)):
        with pytest.raises(ValueError, match="stands without"):
            run.result(*missing, lag=0)
    run.result(0.7, 0.5, 0.6, 0.8, 100, lag=0)
    with open(tmp_path / "results.part-0.jsonl", "a") as f:
        f.write('{"lag": 100, "sco')  # torn by a kill
    run.result(0.6, 0.5, np.float64(0.5), float("inf"), np.int64(100), note="no upper end", lag=200)  # keys in any order, and new ones
    assert list(run.merge().lag) == [0, 200]
    run.close()
    again = open_run()
    assert list(again.rows().lag) == [0, 200]  # skipped by a sweep that starts again
    again.result(0.8, 0.5, 0.6, 0.9, 100, lag=200, note="no upper end")
    assert list(again.merge().score) == [0.7, 0.8]  # the last one counts
    for p in (0.1, 0.2):
        again.result(0.7, 0.5, 0.6, 0.8, 100, lag=400, p_corrected=p, shuffled=p)
    assert again.rows().p_corrected.dropna().tolist() == [0.2]  # measured twice: the last counts
    again.close()
    other = open_run(learning_rate=0.1)
    assert len(other.rows()) == 0  # other options, other rows
    other.close()
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["learning_rate"] == 0.1 and configure(Config, [str(tmp_path / "config.yaml")]).learning_rate == 0.1


def test_array_workers_share_all_jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    dealt = []
    for task in (1, 2, 3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        run = Run(Config(out_dir=str(tmp_path)))
        for job in run.share(range(10)):
            dealt.append(job)
            run.result(job / 10, 0.5, 0, 1, 5, job=job)
        table = run.merge()
        run.close()
    assert sorted(dealt) == list(range(10)) and sorted(table.job) == list(range(10))


def test_one_job_a_folder(tmp_path):
    run = Run(Config(out_dir=str(tmp_path)))
    with pytest.raises(FileExistsError, match="in use"):
        Run(Config(out_dir=str(tmp_path)))
    run.close()
    Run(Config(out_dir=str(tmp_path))).close()


def test_log_rewinds_to_the_checkpoint(tmp_path):
    run = Run(Config(out_dir=str(tmp_path)))
    for step in (1, 2, 3):
        run.log(step, loss=1.0)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # torn by a kill
    run.rewind(2)
    assert [line[:9] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == ['{"step": ' for _ in range(2)]
    run.close()


def test_keys_decide_what_is_drawn(tmp_path):
    run = Run(Config(out_dir=str(tmp_path)))
    draws = [np.random.default_rng(key_seed(1, step, "data")).random() for step in range(100)]
    assert len(set(draws)) == 100 and abs(np.mean(draws) - 0.5) < 0.15
    assert run.generator(1, 2).initial_seed() == run.generator(1, 2).initial_seed() != run.generator(2, 1).initial_seed()
    run.close()


def test_datasets_are_found_or_named(tmp_path):
    run = Run(Config(out_dir=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"python data/shakespeare/prepare.py"):
        run.dataset("shakespeare/none")
    with pytest.raises(FileNotFoundError, match="pydocs"):
        run.dataset("nosuchset")
    run.close()
