"""Each command of the README, of the data's readmes and of config/slurm can be typed: its script, its files and its options exist."""
import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import configurator
from configurator import configure

ROOT = configurator.HERE
DOCUMENTS = ["README.md", *sorted(str(p.relative_to(ROOT)) for pattern in ("docs/*.md", "data/*/readme.md", "config/slurm/*") for p in ROOT.glob(pattern))]
STARTS = ("python", "torchrun", "make", "streamlit", "srun", "sbatch")


def commands(document):
    """Every command of a document: what stands in its indented or fenced blocks, in `back quotes`, or, of a shell file, on its lines."""
    text = (ROOT / document).read_text()
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^(?: {4}|)(\S.*)$", text, re.M) if not document.endswith(".md") else \
        re.findall(r"^ {4}(\S.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text) + \
        [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    for line in lines:
        for part in re.split(r"&&|;|\|", line):
            words = shlex.split(part.replace("…", "").replace("'s ", " "), comments=True) if part.count('"') % 2 == 0 and part.count("'") % 2 == 0 else []
            while words and re.fullmatch(r"\w+=\S*", words[0]):  # OMP_NUM_THREADS=1 in front
                words = words[1:]
            if words and Path(words[0]).name in STARTS and len(words) > 1:
                yield words


@cache
def script(path):
    """The module of a script and what it makes of its command line before configure()."""
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", path), ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = re.search(r"configure\(Config, (\w+)\(sys\.argv\[1:\]\)\)", (ROOT / path).read_text())
    return module, getattr(module, before[1]) if before else list


def check(words):
    """Raise for a command that cannot be typed. Data and models that the user brings may be missing, files of ours may not."""
    name, *rest = [Path(words[0]).name, *words[1:]]
    if name in ("srun", "sbatch"):
        rest = [w for w in rest if not w.startswith("-")]
        return check(rest) if rest and Path(rest[0]).name in STARTS else None
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert rest[0] in targets, f"make has no {rest[0]}, only {targets}"
        return None
    if rest[:1] == ["-c"]:
        calls = [node for node in ast.walk(ast.parse(rest[1])) if isinstance(node, ast.Attribute)]
        assert all(hasattr(importlib.import_module(node.value.id), node.attr) for node in calls), rest[1]
        return None
    if name == "streamlit":
        rest = rest[1:2]  # run X.py
    at = next((i for i, word in enumerate(rest) if word.endswith(".py")), None)
    if at is None or rest[:1] == ["-m"]:
        return None  # no script of ours
    assert (ROOT / rest[at]).is_file(), f"there is no {rest[at]}"
    module, before = script(rest[at])
    options = [re.sub(r"\$\{?\w+\}?|[A-Z]{4,}", "0", word) for word in rest[at + 1:] if word not in ("--help", '"$@"', "$@", "$OPTIONS", "[OPTIONS]")]
    if not hasattr(module, "Config"):
        return None  # bench.py: names of claims, flags
    try:
        configure(module.Config, before(options))
    except (ValueError, OSError) as e:
        assert re.search("no config file|is no folder|is not there|does not exist|missing", str(e)), e
        brought = [w for w in options if re.search(r"\.ya?ml$|=.*/", w)]
        assert brought and not any(w.startswith("config/") for w in brought), e
    return None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_command_can_be_typed(document):
    found, wrong = list(commands(document)), []
    for words in found:
        try:
            check(words)
        except (AssertionError, ValueError, OSError, ImportError) as e:
            wrong.append(f"{' '.join(words)}: {e}")
    assert not wrong, "\n".join(wrong)
    assert found or document != "README.md"


def test_a_wrong_command_is_found():
    for words in (["python", "nosuch.py"], ["python", "train.py", "alhpa=1"], ["make", "dinner"], ["python", "train.py", "config/nosuch.yaml"],
                  ["python", "-c", "import model; model.nosuch()"], ["torchrun", "--standalone", "data/podcast/prepare.py", "subjekts=3"]):
        with pytest.raises((AssertionError, ValueError, OSError)):
            check(words)


def test_citation_names_the_project_and_its_sources():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"] == "nanoCortex" and citation["authors"] == [{"name": "The nanoCortex authors"}]
    assert citation["license"] in (ROOT / "LICENSE").read_text().splitlines()[0]
    credits = (ROOT / "README.md").read_text().split("## Credits")[1]
    for source in citation["references"]:
        first = source["authors"][0]["family-names"].replace("Karpathy", "karpathy")
        assert re.search(rf"{first}[^;]*{source['year']}" if source["type"] != "software" else first, credits, re.S), source["title"]


def test_shell_files_are_shell():
    files = sorted((ROOT / "config/slurm").glob("*"))
    assert files and all(subprocess.run(["bash", "-n", path]).returncode == 0 for path in files)
