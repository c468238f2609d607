"""FineWeb-Edu, web pages of educational worth (Lozhkov et al. 2024), in GPT-2's BPE: the 10-billion-token sample that large runs here read.

    python data/fineweb/prepare.py                          # 28 GB of parquet files, fetched and tokenised one by one, to 20 GB of tokens
    python data/fineweb/prepare.py files=1                  # the first of the 14 files only, 0.7 billion tokens
    python data/fineweb/prepare.py prebuilt=10              # or ready-made shards, 100 million tokens each, 99 of them: no tokenising
    python data/fineweb/prepare.py root=path/to/parquet     # from a local copy

A stop at any moment costs little: the same command goes on. A document's side is decided by a hash of its text, so none is on both.
"""
import os, sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.tokens import Hub, complete, find_documents, gpt2_encoding, group_files, headed_shards, read_meta, state_of, write_meta, write_shards

EMBEDDED = False  # downloaded, so only on the user's own command
REPO = "HuggingFaceFW/fineweb-edu"  # ODC-By 1.0
PREBUILT = "kjj0/finewebedu10B-gpt2"  # the same sample as modded-nanogpt reads it


@dataclass
class Config:
    subset: Literal["sample-10BT", "sample-100BT", "sample-350BT"] = "sample-10BT"  # of FineWeb-Edu
    files: int = 0                     # only so many of its parquet files; 0: all
    prebuilt: int = 0                  # take so many ready-made shards of 100 million tokens instead (10B sample); 0: tokenise here
    root: str = ""                     # a local copy, parquet or JSONL with a column text; "": the Hugging Face hub
    bpe: str = ""                      # GPT-2's vocab.bpe or rank file; "": tiktoken's cache, or by download
    val_fraction: float = 0.0005       # of the documents, for validation
    shard_mb: int = 450                # text per shard in megabytes (100 million tokens); also what a stop can cost per worker
    workers: int = 0                   # processes; 0: one per core
    keep: bool = False                 # keep the downloaded parquet files
    out_dir: str = ""                  # "": this folder
    overwrite: bool = False            # make it again although it is there, or was begun with other options

    def check(self):
        if not 0 < self.val_fraction < 1 or self.shard_mb < 1 or min(self.files, self.prebuilt, self.workers) < 0 or self.prebuilt > 99:
            raise ValueError("val_fraction must be between 0 and 1, shard_mb at least 1, files and workers not negative, prebuilt 0 to 99")


def prebuilt(folder, config, state, **meta):
    """Ready-made shards, header and all; read as they are."""
    names = ["finewebedu_val_000000.bin", *(f"finewebedu_train_{i:06d}.bin" for i in range(1, config.prebuilt + 1))]
    hub = Hub(PREBUILT, lambda name: name in names, folder)
    print(f"{folder}: {len(hub.files)} shards, {sum(size for _, size in hub.files) / 1e9:.1f} GB", flush=True)
    for name, _ in hub.files:
        hub.fetch(name)
    return write_meta(folder, headed_shards(folder), state, source=f"{PREBUILT} {hub.revision}", **meta)


def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent))
    options = {key: value for key, value in asdict(config).items() if key not in ("bpe", "workers", "keep", "out_dir", "overwrite")}
    if not config.overwrite and complete(folder):
        if read_meta(folder).get("options") != options:
            raise ValueError(f"{folder} was made with other options ({read_meta(folder).get('options')}): give overwrite=True, or another out_dir=")
        print(f"{folder} is there already (overwrite=True makes it again)")
        return
    state = state_of(gpt2_encoding(config.bpe))
    meta = {"options": options, "synthetic": False, "licence": "ODC-By 1.0"}
    if config.prebuilt:
        meta = prebuilt(folder, config, state, **meta)
    else:
        shard_bytes = config.shard_mb * 10 ** 6
        if config.root:
            sources, fetch, tokens, meta["source"] = group_files(find_documents(config.root)[:config.files or None], shard_bytes), None, 0, "local copy"
        else:
            hub = Hub(REPO, lambda name: name.startswith(f"sample/{config.subset.removeprefix('sample-')}/") and name.endswith(".parquet"), folder / "download")
            part = hub.files[:config.files or None]
            tokens = {"10BT": 10, "100BT": 100, "350BT": 350}[config.subset.removeprefix("sample-")] * 1e9 * len(part) / len(hub.files)
            sources, fetch, meta["source"] = [{"files": [name], "bytes": size} for name, size in part], hub.fetch, f"{REPO} {config.subset} {hub.revision}"
        meta = write_shards(folder, sources, state, val_fraction=config.val_fraction, shard_bytes=shard_bytes, workers=config.workers, tokens=int(tokens),
                            fetch=fetch, keep=config.keep or bool(config.root), overwrite=config.overwrite, **meta)
    print(f"{folder}: " + ", ".join(f"{split} {entry['tokens']:,} tokens in {len(entry['shards'])} shards" for split, entry in meta["splits"].items()))


if __name__ == "__main__":
    main(configure(Config))
