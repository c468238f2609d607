"""Tiny Shakespeare: one megabyte of plays. The classic first test of a language model.

    python data/shakespeare/prepare.py                      # dataset=shakespeare/char
    python data/shakespeare/prepare.py tokenizer=gpt2       # dataset=shakespeare/gpt2
    python data/shakespeare/prepare.py root=input.txt       # a local copy, or any other text

The text comes from github.com/karpathy/char-rnn (public domain); the first 90 % of its characters
are for training, the rest for validation.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data import already_made, check_content, folder_of
from data import tokens as T
from data.fetch import download, need

EMBEDDED = False  # downloaded only when the user runs this
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass
class Config:
    tokenizer: Literal["char", "gpt2"] = "char"  # a token per character, or GPT-2's BPE
    root: str = ""  # a local copy of the text, or the folder with input.txt; "": download
    bpe: str = ""  # GPT-2's vocab.bpe or rank file; "": tiktoken's cache or a download
    out_dir: str = ""  # "": the folder named after the tokenizer, next to this script
    overwrite: bool = False  # make it again even if it exists


def get_text(root, folder):
    """Return the text and its source. Raises InputError."""
    if root:
        path = Path(root) / "input.txt" if Path(root).is_dir() else Path(root)
        source = f"local copy {path.name}"
    else:
        path = folder / "download/input.txt"
        source = URL
        download([need(URL, path)], folder)
    return T.decode_text(path, check_content(path).read_bytes()), source


def main(config):
    folder = folder_of(config, __file__, config.tokenizer)
    options = {"tokenizer": config.tokenizer}
    if already_made(folder, options, T.complete, config.overwrite):
        return
    text, source = get_text(config.root, folder)
    if config.tokenizer == "char":
        state = T.character_state(text, "shakespeare-char")
    else:
        state = T.state_of(T.gpt2_encoding(config.bpe))
    tokenizer = T.Tokenizer(state)
    cut = int(0.9 * len(text))
    meta = T.write_dataset(
        folder,
        {"train": [tokenizer.encode(text[:cut])], "val": [tokenizer.encode(text[cut:])]},
        state,
        source=source,
        corpus={"characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        options=options,
        synthetic=False,
    )
    for split, entry in meta["splits"].items():
        print(f"{folder}: {split} {entry['tokens']:,} tokens")


if __name__ == "__main__":
    main(configure(Config))
