"""Options by precedence and type; what a Run promises: scores with their chance level, one job a
folder, keyed randomness, rows known by options, code and content."""

import importlib
import sys
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
from helpers import input_error, sentence_of

import configurator
from configurator import InputError, Run, check_keys, configure, key_seed, load_function


@dataclass
class Config:
    out_dir: str = "out/x"  # where
    # ---- numbers
    seed: int = 1  # fixes all
    device: str = "cpu"  # here
    learning_rate: float = 1e-3
    lags: list[int] = field(default_factory=lambda: [0])
    bands: list[list[float]] = field(default_factory=list)
    subjects: list[str] = field(default_factory=list)
    top_k: int | None = 5
    on: bool = False
    kind: Literal["a", "b"] = "a"
    compile: Literal["auto", True, False] = "auto"
    more: dict = field(default_factory=dict)
    text: str = ""
    models: list[dict | str] = field(default_factory=list)

    RENAMED = {"nearby": "kind"}


def open_run(folder, **options):
    return Run(Config(out_dir=str(folder), **options))


@pytest.fixture
def run(tmp_path):
    run = open_run(tmp_path)
    yield run
    run.close()


def test_precedence_and_types(tmp_path):
    a = tmp_path / "a.yaml"
    b = tmp_path / "b.yaml"
    a.write_text("learning_rate: 6e-4\nlags: [1, 2]\nseed: 3\nmore: {x: 1, rate: 1e-3}\n")
    b.write_text("seed: 4\n")
    words = ["seed=5", str(a), "--lags=-100,0,100", str(b), "top_k=none", "on=true", "kind=b"]
    c = configure(Config, [*words, "more.y=[1,2]", "bands=[[4,8],[70,150]]", "compile=false"])
    assert (c.seed, c.learning_rate, c.lags, c.top_k) == (5, 6e-4, [-100, 0, 100], None)
    assert (c.on, c.kind, c.compile) == (True, "b", False)
    assert c.more == {"x": 1, "rate": 1e-3, "y": [1, 2]}
    assert c.bands == [[4, 8], [70, 150]]
    assert configure(Config, []).seed == 1
    c = configure(Config, ["seed=983_040", "top_k=1e1"])
    assert (c.seed, c.top_k) == (983_040, 10)
    b.write_text("seed: 010\nlags: [010, -08, +3, 1_0]\nlearning_rate: 08.5\n")
    for words in ([str(b)], ["seed=010", "lags=010,-08,+3,1_0", "learning_rate=08.5"]):
        c = configure(Config, words)  # decimal, where YAML would read 010 as 8
        assert (c.seed, c.lags, c.learning_rate) == (10, [10, -8, 3, 10], 8.5)
    assert configure(Config, ["learning_rate=.5E1"]).learning_rate == 5


def test_of_steps_and_minutes_the_one_given_later_counts(tmp_path):
    @dataclass
    class Length:
        max_iters: int = 1000
        minutes: float = 0.0

    steps = tmp_path / "steps.yaml"
    steps.write_text("max_iters: 5\n")
    both = tmp_path / "config.yaml"  # as a run leaves it: what the minutes came to
    both.write_text("max_iters: 5\nminutes: 2\n")
    for words, minutes in (
        ([steps, "minutes=2"], 2),
        ([both], 0),
        ([both, "minutes=3"], 3),
        ([both, "max_iters=7"], 0),
        (["minutes=2", "max_iters=7"], 0),
    ):
        assert configure(Length, list(map(str, words))).minutes == minutes


def test_strings_stay_as_they_are_typed(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("subjects: [01, null, 1e5]\ntext: 007\n")
    for given in ([str(path)], ["subjects=01,null,1e5", "text=007"], ["subjects=[01, null, 1e5]"]):
        assert configure(Config, given).subjects == ["01", "null", "1e5"]
    assert configure(Config, [str(path)]).text == "007"
    names = ["01", "007", "1e5", "no", {"name": "01", "at": 2}, "null", "1:30"]
    path.write_text("models: [01, 007, 1e5, no, {name: 01, at: 2}, null, 1:30]\n")
    for given in ([str(path)], [path.read_text().replace(": ", "=", 1).strip()]):
        assert configure(Config, given).models == names
    path.write_text("text:\n")
    assert configure(Config, [str(path)]).text == ""


BAD = [
    ("sede=1", "unknown option 'sede'; did you mean 'seed'"),
    ("nearby=1", "'nearby' is now called 'kind'"),
    ("seed=1.5", "'seed' must be int, not '1.5'"),
    ("seed=1:30", "'seed' must be int, not '1:30'"),
    ("seed=0x10", "'seed' must be int"),
    ("lags=1,1:30", r"'lags' must be list\[int\]"),
    ("seed=true", "'seed' must be int"),
    ("seed=inf", "'seed' must be int"),
    ("seed=nan", "'seed' must be int"),
    ("top_k=1e99", "'top_k' must be below"),
    ("top_k=x", r"'top_k' must be int \| None"),
    ("on=2", "'on' must be bool"),
    ("kind=[]", "'kind' must be a or b"),
    ("learning_rate=fast", "'learning_rate' must be float"),
    ("learning_rate=true", "'learning_rate' must be float"),
    ("lags=[[1]]", r"'lags' must be list\[int\]"),
    ("lags={a: 1}", r"'lags' must be list\[int\]"),
    ("seed.x=1", "'seed' takes no keys"),
    ("more=[1]", "'more' must be dict"),
    ("more.a=@x", "'more.a' is not YAML: quote"),
    ("text=caf\udce9", "has bytes that are not UTF-8"),
    ("nowhere.yaml", "config file 'nowhere.yaml' is neither"),
]
BAD_FILES = [
    ("seed: [1", "not a YAML file"),
    ("seed: 1\nmore: {a: 1, a: 2}\n", "the key 'a' occurs twice"),
    ("- 1\n", "key: value"),
    ("seed: high\n", "must be int"),
    ("text: {a: 1}\n", "must be str"),
    ("!!python/object/apply:os.getcwd []", "YAML"),
]


def test_bad_options_are_one_sentence(tmp_path):
    cases = list(BAD)
    for i, (content, words) in enumerate(BAD_FILES):
        (tmp_path / f"{i}.yaml").write_text(content)
        cases.append((f"{tmp_path}/{i}.yaml", words))
    for argument, words in cases:
        input_error(words, configure, Config, [argument])


def test_numbers_have_a_range():
    @dataclass
    class Numbers:
        epochs: int = 3
        rate: float = 0.1
        share: float = 0.5
        start: float = 0.0
        lag: float = -1.0
        norm: float = float("inf")
        kinds: list[float] = field(default_factory=lambda: [1.0])

        POSITIVE = "epochs rate kinds"
        SHARES = "share"
        SIGNED = "start"

    configure(Numbers, ["epochs=1", "share=1", "start=-3", "lag=-4", "norm=inf"])
    for argument, words in (
        ("epochs=0", "above 0, not 0"),
        ("rate=0", "above 0"),
        ("share=1.1", "between 0 and 1"),
        ("norm=-1", "at least 0, not -1.0"),
        ("rate=inf", "finite"),
        ("rate=nan", "must be float"),
        ("kinds=", "at least one"),
        ("kinds=1,nan", "'kinds' must be"),
    ):
        input_error(words, configure, Numbers, [argument])


def test_keys_of_dictionary_options_are_checked():
    keys = ["hidden", "layers"]
    check_keys({"hidden": 8}, keys, "model_params")
    sentence = "'model_params' has no key 'hiden'; did you mean 'hidden'"
    input_error(sentence, check_keys, {"hiden": 8}, keys, "model_params")


def test_functions_of_a_users_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def build():\n    return 7\n")
    assert load_function(f"{path}:build", "model")() == 7
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "notes.txt").write_text("not Python at all\n")
    for spec, words in (
        (f"{path}:bild", "bild"),
        (f"{path}", "my_file.py:name"),
        (f"{tmp_path}/none.py:build", "none.py"),
        (f"{tmp_path}/broken.py:build", "SyntaxError"),
        (f"{tmp_path}/notes.txt:build", "SyntaxError"),
    ):
        input_error(words, load_function, spec, "model")


def test_rows_are_known_by_what_a_users_file_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = "import my_shapes\n\n\ndef build():\n    return my_shapes.n\n"
    (tmp_path / "mine.py").write_text(source)
    hashes = []
    for n in (7, 7, 8):
        (tmp_path / "my_shapes.py").write_text(f"n = {n}\n")
        sys.modules.pop("my_shapes", None)
        assert load_function(f"{tmp_path}/mine.py:build", "model")() == n
        hashes.append(configurator.hash_code(Config))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_users_files_are_all_that_it_imports_from_its_folder(tmp_path):
    (tmp_path / "pk").mkdir()
    contents = {
        "mine.py": "import os\nimport torch.nn\n\ndef build():\n    from pk.deep import n\n",
        "pk/__init__.py": "",
        "pk/deep.py": "from . import deeper\nfrom .. import beside\nimport mine\n",
        "pk/deeper.py": "",
        "beside.py": "",
        "another.py": "",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    files = configurator.user_files(tmp_path / "mine.py")
    names = {str(path.relative_to(tmp_path.resolve())) for path in files}
    assert names == set(contents) - {"another.py"}


def test_help_is_the_manual(capsys):
    with pytest.raises(SystemExit) as status:
        configure(Config, ["--help"])
    text = capsys.readouterr().out
    assert status.value.code == 0
    assert all(words in text for words in ("---- numbers", "seed=1", "fixes all"))


def test_bad_input_and_a_full_disk_end_in_one_sentence(capsys):
    for error in (InputError("a.csv: no column\nword"), OSError(28, "No space left", "b.pt")):
        sentence_of(error, capsys)
    with pytest.raises(SystemExit) as status:  # Ctrl-C in a prepare script
        configurator._print_one_sentence(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert status.value.code == 130 and not capsys.readouterr().err
    configurator._print_one_sentence(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capsys.readouterr().err


def test_every_config_file_is_valid():
    """Every config/*.yaml fits the script of its launch line, with the files beside it."""
    for path in sorted(configurator.HERE.glob("config/*.yaml")):
        if path.name == "demo.yaml":  # stages, no options: tests/test_demo.py
            continue
        words = path.read_text().splitlines()[0].split()
        script = next(word for word in words if word.endswith(".py") and "/" not in word)
        files = [word for word in words if word.endswith(".yaml")]
        assert f"config/{path.name}" in files, words
        module = importlib.import_module(script.removesuffix(".py"))
        configure(module.Config, [str(configurator.HERE / file) for file in files])


def test_a_score_needs_chance_interval_and_n(run):
    for chance, low, high, n in (
        (np.nan, 0.6, 0.8, 100),
        (0.5, np.nan, np.nan, 100),
        (0.5, 0.8, 0.6, 100),
        (0.5, 0.6, 0.8, 0),
    ):
        with pytest.raises(ValueError, match="lacks a chance level"):
            run.result(0.7, chance, low, high, n, lag=0)
    run.result(np.nan, np.nan, np.nan, np.nan, 0, lag=0)  # a score that does not exist


def test_a_sweep_goes_on_where_it_was(tmp_path, capsys):
    run = open_run(tmp_path)
    run.result(0.7, 0.5, 0.6, 0.8, 100, lag=0)
    with open(tmp_path / "results.part-0.jsonl", "a") as file:
        file.write('\n{"lag": 100, "sco')  # torn by a kill
    run.result(0.6, 0.5, np.float64(0.5), float("inf"), np.int64(100), note="new key", lag=200)
    assert list(run.merge().lag) == [0, 200]
    run.close()
    capsys.readouterr()
    again = open_run(tmp_path)
    assert list(again.rows().lag) == [0, 200]
    assert "2 rows of an earlier run are reused" in capsys.readouterr().out
    again.result(0.8, 0.5, 0.6, 0.9, 100, lag=200, note="new key")
    assert list(again.merge().score) == [0.7, 0.8]  # the last one counts
    for p in (0.1, 0.2):
        again.result(0.7, 0.5, 0.6, 0.8, 100, lag=400, p_corrected=p, shuffled=p)
    assert again.rows().p_corrected.dropna().tolist() == [0.2]  # measured twice
    again.close()
    other = open_run(tmp_path, learning_rate=0.1)
    assert len(other.rows()) == 0
    other.content = "other weights"
    assert len(other.rows()) == 0
    other.close()
    assert configure(Config, [str(tmp_path / "config.yaml")]).learning_rate == 0.1


SCRIPT = """
from dataclasses import dataclass
from configurator import Run
@dataclass
class Config:
    out_dir: str = ""
    seed: int = 0
    device: str = "cpu"
def decoder():
    return 1
"""


def test_rows_of_an_edited_script_are_not_reused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    script = tmp_path / "user_script.py"
    counts = []
    for source in (SCRIPT, "# a comment" + SCRIPT, SCRIPT.replace("return 1", "return 2")):
        script.write_text(source)
        module = importlib.reload(importlib.import_module("user_script"))
        run = Run(module.Config(out_dir=str(tmp_path / "out")))
        counts.append(len(run.rows()))
        run.result(0.7, 0.5, 0.6, 0.8, 100, lag=0)
        run.close()
    assert counts == [0, 1, 0]
    monkeypatch.setattr(configurator, "HERE", tmp_path)
    hashes = set()
    for name in ("", "model.py", "convert.py"):  # every script reads weights and states with these
        if name:
            (tmp_path / name).write_text(f"name = '{name}'")
        module = importlib.reload(module)
        configurator.configure(module.Config, [])
        hashes.add(configurator.hash_code(module.Config))
        script.write_text("edited = 'while it runs'" + SCRIPT)  # counts from the next run on
        hashes.add(configurator.hash_code(module.Config))
        script.write_text(SCRIPT)
    assert len(hashes) == 3


def test_one_job_a_folder_on_a_device_that_is_there(tmp_path):
    run = open_run(tmp_path)
    input_error("in use", open_run, tmp_path)
    run.close()
    open_run(tmp_path).close()
    (tmp_path / "file").write_text("")
    input_error("out_dir=.*cannot be created", open_run, tmp_path / "file" / "out")
    for device in ("tpu", "cuda:99x"):
        input_error("device", open_run, tmp_path / device, device=device)


def test_log_rewinds_to_the_checkpoint(run, tmp_path):
    for step in (1, 2, 3):
        run.log(step, loss=1.0)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    run.rewind(2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [line[:10] for line in lines] == ['{"step": 1', '{"step": 2']


def test_keys_decide_what_is_drawn(run):
    draws = [np.random.default_rng(key_seed(1, step, "data")).random() for step in range(100)]
    assert len(set(draws)) == 100 and abs(np.mean(draws) - 0.5) < 0.15
    seed = run.generator(1, 2).initial_seed()
    assert seed == run.generator(1, 2).initial_seed()
    assert seed != run.generator(2, 1).initial_seed()


def test_datasets_are_found_or_named(run):
    input_error(r"python data/shakespeare/prepare.py", run.dataset, "shakespeare/none")
    input_error("pydocs", run.dataset, "nosuchset")


def test_auto_precision_is_the_quicker_one(tmp_path, monkeypatch):
    """Some CPUs have bfloat16 and are half as quick in it as in float32."""
    for pays in (True, False):
        monkeypatch.setattr(configurator, "bfloat16_pays", lambda pays=pays: pays)
        run = open_run(tmp_path)
        assert str(run.dtype) == ("torch.bfloat16" if pays else "torch.float32")
        run.close()
    input_error("float32 or bfloat16", configurator.choose_dtype, "float16", run.device)


def test_files_beside_results_are_of_the_same_options(tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/mine.npz").touch()  # of the user's own
    for seed, kept in ((1, set()), (1, {"a__b.npz"}), (2, set())):
        run = open_run(tmp_path, seed=seed)
        run.own_folder("predictions", "*__*.npz")
        folder = run.out / "predictions"
        assert {path.name for path in folder.glob("*.npz")} == {"mine.npz", *kept}
        (folder / "a__b.npz").touch()
        run.close()


def test_a_users_file_does_not_get_anothers_neighbour(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_neighbour", raising=False)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my_neighbour.py").write_text(f"name = '{name}'\n")
        (tmp_path / name / "mine.py").write_text(
            "import my_neighbour\n\n\ndef get():\n    return my_neighbour.name\n"
        )
    assert load_function(f"{tmp_path}/a/mine.py:get", "model")() == "a"
    with pytest.raises(InputError, match="b/my_neighbour.py has the same name as .*neighbour.py"):
        load_function(f"{tmp_path}/b/mine.py:get", "model")


def test_a_job_that_slurm_puts_back_resumes(tmp_path, monkeypatch):
    @dataclass
    class Training(Config):
        init_from: str = "scratch"

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(configurator.Run, "load", lambda run, name: {})
    run = Run(Training(out_dir=str(tmp_path)))
    (tmp_path / "ckpt.pt").touch()
    run.close()
    for restarts, job in (("0", "7"), ("1", "8")):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        monkeypatch.setenv("SLURM_JOB_ID", job)
        input_error("ckpt.pt already exists", Run, Training(out_dir=str(tmp_path)))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = Run(Training(out_dir=str(tmp_path)))
    assert run.config.init_from == "resume"
    run.close()
