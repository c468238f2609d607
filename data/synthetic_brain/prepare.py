"""Stimuli for a planted brain: phrases of a verb, a determiner and two nouns, each word one token of data/pydocs.

    python data/synthetic_brain/prepare.py
    python data/synthetic_brain/prepare.py stimuli=1000 out_dir=data/synthetic_brain1000

What the brain answers is made by warp.py, which knows the language model: its teacher is that model, warped by a known amount. Few words in many
combinations: a readout finds what each word adds by itself, and the warp is for what they do together.
"""
import hashlib, itertools, os, random, subprocess, sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure, write_aside
from data import tokens

EMBEDDED = True  # made from data/pydocs, offline: scripts may start this on first use


@dataclass
class Config:
    out_dir: str = ""                # "": this folder
    pydocs: str = ""                 # prepared data/pydocs, "": the one beside this folder (made first where it is missing)
    stimuli: int = 400               # phrases
    seed: int = 0                    # which of all combinations
    overwrite: bool = False          # make it again although it is there


WORDS = ["Return Set Get Create Convert Find Read Write".split(), "the a all this".split(),
         "data file list name array value string path".split(), "data file list name array value string path".split()]


def phrases(enc):
    """Every combination of the words that are single tokens of the tokenizer, two different nouns."""
    single = [[w for w in words if len(enc.encode(" " * bool(i) + w)) == 1] for i, words in enumerate(WORDS)]
    return [words for words in itertools.product(*single) if words[2] != words[3]]


def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent))
    pydocs = Path(config.pydocs) if config.pydocs else Path(__file__).resolve().parents[1] / "pydocs"
    if not (pydocs / "meta.yaml").exists() and not config.pydocs:
        print("data/pydocs is not there: made first", flush=True)
        subprocess.run([sys.executable, str(pydocs / "prepare.py")], check=True)
    settings = {k: v for k, v in asdict(config).items() if k not in ("out_dir", "pydocs", "overwrite")}
    path, meta = folder / "stimuli.csv", folder / "meta.yaml"
    if meta.exists() and path.exists() and not config.overwrite:
        made = yaml.safe_load(meta.read_text())
        if made.get("options") == settings and made.get("sha256") == hashlib.sha256(path.read_bytes()).hexdigest():
            return print(f"{folder}: there already (overwrite=True makes it again)")
        if made.get("options") != settings:
            raise ValueError(f"{folder} was made with {made.get('options')}: give overwrite=True to make it again, or another out_dir")
    every = phrases(tokens.encoding(tokens.tokenizer_state(pydocs)))
    if len(every) < config.stimuli:
        raise ValueError(f"stimuli={config.stimuli}: there are only {len(every)} phrases of words that are single tokens of {pydocs}")
    chosen = random.Random(config.seed).sample(every, config.stimuli)
    table = pd.DataFrame([(" ".join(words), f"{words[2]} {words[3]}") for words in chosen], columns=["text", "group"])  # a pair of nouns is in one split
    folder.mkdir(parents=True, exist_ok=True)
    content = table.to_csv(index=False, lineterminator="\n")
    write_aside(path, content)
    write_aside(meta, yaml.safe_dump({"format": "synthetic_brain-1", "synthetic": True, "options": settings, "stimuli": len(table),
                                      "sha256": hashlib.sha256(content.encode()).hexdigest()}, sort_keys=False))
    print(f"{path}: {len(table)} phrases, {table.group.nunique()} pairs of nouns")


if __name__ == "__main__":
    main(configure(Config))
