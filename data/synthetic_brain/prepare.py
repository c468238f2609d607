"""Stimuli for a planted brain: phrases of a verb, a determiner and two nouns.

    python data/synthetic_brain/prepare.py
    python data/synthetic_brain/prepare.py stimuli=1000 out_dir=data/synthetic_brain1000

Each word is one token of data/pydocs. warp.py makes the responses: its teacher is your language
model, warped by a known amount. There are few words in many combinations: a readout finds what each
word adds, and the warp must find what words do together.
"""

import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import (
    InputError,
    already_made,
    embedded,
    file_hash,
    folder_of,
    load_meta,
    options_of,
    tokens,
    write_aside,
    write_yaml,
)

EMBEDDED = True  # made offline from data/pydocs: scripts may run this on first use
FORMAT = "synthetic_brain-1"
VERBS = "Return Set Get Create Convert Find Read Write"
DETERMINERS = "the a all this"
NOUNS = "data file list name array value string path"


@dataclass
class Config:
    out_dir: str = ""  # "": this folder
    pydocs: str = ""  # prepared data/pydocs; "": the one next to this folder (made if missing)
    stimuli: int = 400  # phrases
    seed: int = 0  # which combinations
    overwrite: bool = False  # replace an existing dataset


def phrases(encoding):
    """Return every combination of single-token words with two different nouns."""
    choices = []
    for before, words in (("", VERBS), (" ", DETERMINERS), (" ", NOUNS), (" ", NOUNS)):
        choices.append([w for w in words.split() if len(encoding.encode(before + w)) == 1])
    return [words for words in itertools.product(*choices) if words[2] != words[3]]


def is_complete(folder):
    try:
        meta = load_meta(folder, "phrases", FORMAT)
        return meta.get("sha256") == file_hash(folder / "stimuli.csv")
    except (InputError, OSError):
        return False


def main(config):
    folder = folder_of(config, __file__)
    options = options_of(config, "pydocs")
    if already_made(folder, options, is_complete, config.overwrite):
        return
    pydocs = Path(config.pydocs) if config.pydocs else embedded("pydocs")
    every = phrases(tokens.encoding(tokens.tokenizer_state(pydocs)))
    if len(every) < config.stimuli:
        problem = f"only {len(every)} phrases consist of single tokens of {pydocs}"
        raise InputError(f"stimuli={config.stimuli}: {problem}")
    sample = random.Random(config.seed).sample(every, config.stimuli)
    table = pd.DataFrame({"text": list(map(" ".join, sample))})
    table["group"] = [" ".join(words[2:]) for words in sample]  # the pair of nouns
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "stimuli.csv", table.to_csv(index=False, lineterminator="\n"))
    meta = {"format": FORMAT, "synthetic": True, "options": options, "stimuli": len(table)}
    write_yaml(folder / "meta.yaml", meta | {"sha256": file_hash(folder / "stimuli.csv")})
    print(f"{folder}: {len(table)} phrases, {table['group'].nunique()} pairs of nouns")


if __name__ == "__main__":
    main(configure(Config))
