"""OpenWebText, an open copy of GPT-2's training text (Gokaslan & Cohen 2019), in GPT-2's BPE.

    python data/openwebtext/prepare.py              # 24 GB of parquet files to 18 GB of tokens
    python data/openwebtext/prepare.py files=8      # the first tenth
    python data/openwebtext/prepare.py root=path/to/parquet     # from a local copy, or JSONL

8 million pages, 9 billion tokens. Files are fetched and tokenised one by one; after a stop the same
command continues. A hash of its text assigns each document to a split.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data import already_made, folder_of, options_of
from data import tokens as T

EMBEDDED = False  # downloaded only when the user runs this
REPO = "Skylion007/openwebtext"  # CC0


@dataclass
class Config:
    files: int = 0  # how many of its parquet files; 0: all
    root: str = ""  # a local copy, parquet or JSONL with a column text; "": the Hugging Face hub
    bpe: str = ""  # GPT-2's vocab.bpe or rank file; "": tiktoken's cache or a download
    val_fraction: float = 0.0005  # of the documents, for validation
    shard_mb: int = 450  # text per shard in megabytes; also what a stop can cost per worker
    workers: int = 0  # processes; 0: one per core
    keep: bool = False  # keep the downloaded parquet files
    out_dir: str = ""  # "": this folder
    overwrite: bool = False  # make it again, even if it exists or was started with other options

    POSITIVE = "shard_mb val_fraction"
    SHARES = "val_fraction"


def main(config):
    folder = folder_of(config, __file__)
    options = options_of(config, "bpe", "workers", "keep")
    if already_made(folder, options, T.complete, config.overwrite):
        return
    meta = {"options": options, "synthetic": False}
    T.write_corpus(folder, config, REPO, "*train*.parquet", 9.04e9, **meta)


if __name__ == "__main__":
    main(configure(Config))
