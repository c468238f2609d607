"""FineWeb-Edu, educational web pages (Lozhkov et al. 2024), in GPT-2's BPE.

    python data/fineweb/prepare.py              # 28 GB of parquet files to 20 GB of tokens
    python data/fineweb/prepare.py files=1      # the first of the 14 files, 0.7 billion tokens
    python data/fineweb/prepare.py prebuilt=10  # or 10 of 99 shards of 100 million tokens
    python data/fineweb/prepare.py root=path/to/parquet     # from a local copy

The sample of 10 billion tokens for the large runs. Files are fetched and tokenised one by one;
after a stop the same command continues. A hash of its text assigns each document to a split.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data import already_made, folder_of, options_of
from data import tokens as T

EMBEDDED = False  # downloaded only when the user runs this
REPO = "HuggingFaceFW/fineweb-edu"  # ODC-By 1.0
PREBUILT = "kjj0/finewebedu10B-gpt2"  # the same sample, as modded-nanogpt uses it


@dataclass
class Config:
    files: int = 0  # how many of its parquet files; 0: all
    prebuilt: int = 0  # take this many ready-made shards of 100 million tokens instead
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


def fetch_prebuilt(folder, n_shards, state, **meta):
    """Download ready-made shards, which are read as they are, header included."""
    names = ["finewebedu_val_000000.bin"]
    names += [f"finewebedu_train_{i:06d}.bin" for i in range(1, n_shards + 1)]
    hub = T.Hub(PREBUILT, names, folder)
    for name, size in hub.files.items():
        print(f"{folder}: {name}, {size / 1e6:.0f} MB", flush=True)
        hub.fetch(name)
    source = f"{PREBUILT} {hub.revision}"
    T.write_meta(folder, T.find_token_files(folder), state, source=source, **meta)


def main(config):
    folder = folder_of(config, __file__)
    options = options_of(config, "bpe", "workers", "keep")
    if already_made(folder, options, T.complete, config.overwrite):
        return
    meta = {"options": options, "synthetic": False, "licence": "ODC-By 1.0"}
    if config.prebuilt:
        fetch_prebuilt(folder, config.prebuilt, T.state_of(T.gpt2_encoding(config.bpe)), **meta)
        return
    T.write_corpus(folder, config, REPO, "sample/10BT/*.parquet", 10e9, **meta)


if __name__ == "__main__":
    main(configure(Config))
