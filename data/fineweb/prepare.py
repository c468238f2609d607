"""FineWeb-Edu, web pages of educational worth (Lozhkov et al. 2024), in GPT-2's BPE.

    python data/fineweb/prepare.py              # 28 GB of parquet files to 20 GB of tokens
    python data/fineweb/prepare.py files=1      # the first of the 14 files, 0.7 billion tokens
    python data/fineweb/prepare.py prebuilt=10  # or ready-made shards of 100 million tokens, of 99
    python data/fineweb/prepare.py root=path/to/parquet     # from a local copy

The sample of 10 billion tokens that large runs here read. Files are fetched and tokenised one by
one; a stop at any moment costs little: the same command goes on. A document's side is decided by a
hash of its text, so none is on both.
"""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data import InputError
from data import tokens as T

HERE = Path(__file__).resolve().parent
EMBEDDED = False  # downloaded, so only on the user's own command
REPO = "HuggingFaceFW/fineweb-edu"  # ODC-By 1.0
PREBUILT = "kjj0/finewebedu10B-gpt2"  # the same sample as modded-nanogpt reads it
TOKENS = {"sample-10BT": 10e9, "sample-100BT": 100e9, "sample-350BT": 350e9}


@dataclass
class Config:
    subset: Literal["sample-10BT", "sample-100BT", "sample-350BT"] = "sample-10BT"
    files: int = 0  # only so many of its parquet files; 0: all
    prebuilt: int = 0  # take so many ready-made shards of 100 million tokens instead; 0: none
    root: str = ""  # a local copy, parquet or JSONL with a column text; "": the Hugging Face hub
    bpe: str = ""  # GPT-2's vocab.bpe or rank file; "": tiktoken's cache, or by download
    val_fraction: float = 0.0005  # of the documents, for validation
    shard_mb: int = 450  # text per shard in megabytes; also what a stop can cost per worker
    workers: int = 0  # processes; 0: one per core
    keep: bool = False  # keep the downloaded parquet files
    out_dir: str = ""  # "": this folder
    overwrite: bool = False  # make it again although it is there, or was begun otherwise

    POSITIVE = "shard_mb"

    def check(self):
        if not 0 < self.val_fraction < 1:
            raise InputError(f"val_fraction={self.val_fraction} must lie between 0 and 1")
        if self.prebuilt > 99:
            raise InputError(f"prebuilt={self.prebuilt}: there are 99 ready-made shards")


def fetch_prebuilt(folder, n_shards, state, **meta):
    """Ready-made shards, header and all; read as they are."""
    names = ["finewebedu_val_000000.bin"]
    names += [f"finewebedu_train_{i:06d}.bin" for i in range(1, n_shards + 1)]
    hub = T.Hub(PREBUILT, names, folder)
    for name, size in hub.files.items():
        print(f"{folder}: {name}, {size / 1e6:.0f} MB", flush=True)
        hub.fetch(name)
    source = f"{PREBUILT} {hub.revision}"
    T.write_meta(folder, T.find_token_files(folder), state, source=source, **meta)


def main(config):
    folder = Path(config.out_dir or os.path.relpath(HERE))
    options = asdict(config)
    for plumbing in ("bpe", "workers", "keep", "out_dir", "overwrite"):
        del options[plumbing]
    if not config.overwrite and T.already_made(folder, options):
        return
    state = T.state_of(T.gpt2_encoding(config.bpe))
    meta = {"options": options, "synthetic": False, "licence": "ODC-By 1.0"}
    if config.prebuilt:
        fetch_prebuilt(folder, config.prebuilt, state, **meta)
        return
    plan = T.Plan(val_fraction=config.val_fraction, shard_bytes=config.shard_mb * 1_000_000)
    if config.root:
        hub = None
        meta["source"] = "local copy"
        sources = T.group_files(T.find_documents(config.root)[: config.files or None], plan)
    else:
        pattern = f"sample/{config.subset.removeprefix('sample-')}/*.parquet"
        hub = T.Hub(REPO, [pattern], folder / "download", config.keep)
        meta["source"] = f"{REPO} {config.subset} {hub.revision}"
        sources = hub.sources(TOKENS[config.subset], config.files)
    T.write_shards(folder, sources, state, plan, hub, config.workers, config.overwrite, **meta)


if __name__ == "__main__":
    main(configure(Config))
