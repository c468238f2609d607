"""Tiny Shakespeare: one megabyte of plays, by characters or in GPT-2's BPE. The classic first test of a language model.

    python data/shakespeare/prepare.py                          # data/shakespeare/char,  dataset=shakespeare/char
    python data/shakespeare/prepare.py tokenizer=gpt2           # data/shakespeare/gpt2,  dataset=shakespeare/gpt2
    python data/shakespeare/prepare.py root=input.txt           # from a local copy of the text (any text will do)

The text comes from github.com/karpathy/char-rnn (public domain); the first 90 % of its characters are for training, the rest for validation.
"""
import hashlib, http.client, os, sys, urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.tokens import character_state, complete, encode, encoding, gpt2_encoding, read_meta, state_of, write_dataset

EMBEDDED = False  # downloaded, so only on the user's own command
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394  # bytes


@dataclass
class Config:
    tokenizer: Literal["char", "gpt2"] = "char"  # char: one token per character; gpt2: byte-level BPE of 50,257 tokens
    root: str = ""                               # a local copy of the text, or the folder with input.txt; "": download
    bpe: str = ""                                # GPT-2's vocab.bpe or rank file; "": tiktoken's cache, or by download
    out_dir: str = ""                            # "": the folder named like the tokenizer, beside this script
    overwrite: bool = False                      # make it again although it is there


def get_text(root=""):
    """(text, where it came from). Raises FileNotFoundError without the file or the network, ValueError when it is not UTF-8 text or not whole."""
    if root:
        path = Path(root) / "input.txt" if Path(root).is_dir() else Path(root)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: root= wants a local copy of {URL}")
        raw, source = path.read_bytes(), f"local copy {path.name}"
    else:
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                raw, source = response.read(), URL
        except (OSError, http.client.HTTPException) as e:  # urllib's errors are OSErrors
            raise FileNotFoundError(f"{URL} is not reachable ({getattr(e, 'reason', e)}): fetch it elsewhere and give root=PATH") from None
        if len(raw) != SIZE:
            raise ValueError(f"{URL} gave {len(raw):,} bytes where {SIZE:,} were expected: try again, or give a local copy with root=PATH")
    try:
        return raw.decode("utf-8"), source
    except UnicodeDecodeError as e:
        raise ValueError(f"{source} is not UTF-8 text (byte {e.start}): give another file with root=PATH") from None


def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent)) / config.tokenizer
    if not config.overwrite and complete(folder):
        made_with = read_meta(folder).get("options", {}).get("tokenizer")
        if made_with != config.tokenizer:
            raise ValueError(f"{folder} was made with tokenizer={made_with}: give overwrite=True to make it again, or another out_dir")
        print(f"{folder} is there already (overwrite=True makes it again)")
        return
    text, source = get_text(config.root)
    state = character_state(text, "shakespeare-char") if config.tokenizer == "char" else state_of(gpt2_encoding(config.bpe))
    enc, cut = encoding(state), int(0.9 * len(text))
    meta = write_dataset(folder, {"train": [encode(enc, text[:cut])], "val": [encode(enc, text[cut:])]}, state, source=source,
                         corpus={"characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
                         options={"tokenizer": config.tokenizer}, synthetic=False)
    size = {name: f"{entry['tokens']:,} tokens" for name, entry in meta["splits"].items()}
    print(f"{folder}: vocabulary of {meta['vocab_size']:,}; train {size['train']}, val {size['val']}")


if __name__ == "__main__":
    main(configure(Config))
