"""Each command of the README, docs, readmes and config/slurm can be typed: its script, its files
and its options exist."""

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
DOCUMENTS = ["README.md"]
for pattern in ("docs/*.md", "data/*/readme.md", "config/slurm/*"):
    DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
STARTS = ("python", "torchrun", "make", "streamlit", "srun", "sbatch")
PLACEHOLDERS = ("--help", '"$@"', "$@", "$OPTIONS", "[OPTIONS]")


def code_lines(document):
    """Lines of indented and fenced blocks, and `back quotes`; of a shell file, all lines."""
    text = (ROOT / document).read_text().replace("\\\n", " ")
    if not document.endswith(".md"):
        return text.splitlines()
    lines = re.findall(r"^ {4}(\S.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        lines += block.splitlines()
    return lines


def commands(document):
    """Every command of a document, as a list of words."""
    for line in code_lines(document):
        for part in re.split(r"&&|;|\|", line):
            part = part.replace("…", "").replace("'s ", " ")
            if part.count('"') % 2 or part.count("'") % 2:
                continue
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\w+=\S*", words[0]):  # OMP_NUM_THREADS=1 in front
                words = words[1:]
            if len(words) > 1 and Path(words[0]).name in STARTS:
                yield words


@cache
def script(path):
    """The module of a script, and what it makes of its command line before configure()."""
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", path), ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = re.search(r"configure\(Config, (\w+)\(sys\.argv\[1:\]\)\)", (ROOT / path).read_text())
    return module, getattr(module, before[1]) if before else list


def check(words):
    """Raise for a command that cannot be typed.

    Data and models that the user brings may be missing, files of ours may not.
    """
    name, *rest = [Path(words[0]).name, *words[1:]]
    if name in ("srun", "sbatch"):
        rest = [word for word in rest if not word.startswith("-")]
        if rest and Path(rest[0]).name in STARTS:
            check(rest)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert rest[0] in targets, f"make has no {rest[0]}, only {targets}"
    elif rest[0] != "-m":
        scripts = [word for word in rest if word.endswith(".py")]
        if scripts:
            options = rest[rest.index(scripts[0]) + 1 :]
            check_script(scripts[0], [] if name == "streamlit" else options)


def check_script(path, options):
    """The script must exist and take the options."""
    assert (ROOT / path).is_file(), f"there is no {path}"
    module, before = script(path)
    options = [word for word in options if word not in PLACEHOLDERS]
    options = [re.sub(r"\$\{?\w+\}?|[A-Z]{4,}", "0", word) for word in options]
    if not hasattr(module, "Config"):
        return
    try:
        configure(module.Config, before(options))
    except (ValueError, OSError) as error:
        missing = "is neither here|is not a folder|is not there|does not exist|missing|No such file"
        assert re.search(missing, str(error)), error
        ours = [word for word in options if word.startswith("config/")]
        assert all((ROOT / word).is_file() for word in ours), error
        brought = [word for word in options if re.search(r"\.ya?ml$|=.*/|\.py:", word)]
        assert len(brought) > len(ours), error


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_command_can_be_typed(document):
    wrong = []
    found = list(commands(document))
    for words in found:
        try:
            check(words)
        except (AssertionError, ValueError, OSError, ImportError) as error:
            wrong.append(f"{' '.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)
    assert found or document != "README.md"


def test_citation_names_the_project_and_its_sources():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"] == "nanoCortex"
    assert citation["authors"] == [{"name": "The nanoCortex authors"}]
    assert citation["license"] in (ROOT / "LICENSE").read_text().splitlines()[0]
    credits = (ROOT / "README.md").read_text().split("## Credits")[1]
    for source in citation["references"]:
        first = source["authors"][0]["family-names"].replace("Karpathy", "karpathy")
        year = "" if source["type"] == "software" else f"[^;]*{source['year']}"
        assert re.search(first + year, credits, re.S), source["title"]


def test_shell_files_are_shell():
    files = sorted((ROOT / "config/slurm").glob("*"))
    assert files
    for path in files:
        subprocess.run(["bash", "-n", path], check=True)
