"""OpenWebText, an open reproduction of the text that GPT-2 was trained on (Gokaslan & Cohen 2019): 8 million pages, 9 billion tokens of GPT-2's BPE.

    python data/openwebtext/prepare.py                          # 24 GB of parquet files, fetched and tokenised one by one, to 18 GB of tokens
    python data/openwebtext/prepare.py files=8                  # the first tenth
    python data/openwebtext/prepare.py root=path/to/parquet     # from a local copy: parquet, or JSONL with a text

A stop at any moment costs little: the same command goes on. A document's side is decided by a hash of its text, so none is on both.
"""
import os, sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.tokens import Hub, complete, find_documents, gpt2_encoding, group_files, read_meta, state_of, write_shards

EMBEDDED = False  # downloaded, so only on the user's own command
REPO, TOKENS = "Skylion007/openwebtext", 9_040_000_000  # CC0


@dataclass
class Config:
    files: int = 0                     # only so many of its parquet files; 0: all
    root: str = ""                     # a local copy, parquet or JSONL with a column text; "": the Hugging Face hub
    bpe: str = ""                      # GPT-2's vocab.bpe or rank file; "": tiktoken's cache, or by download
    val_fraction: float = 0.0005       # of the documents, for validation
    shard_mb: int = 450                # text per shard in megabytes (100 million tokens); also what a stop can cost per worker
    workers: int = 0                   # processes; 0: one per core
    keep: bool = False                 # keep the downloaded parquet files
    out_dir: str = ""                  # "": this folder
    overwrite: bool = False            # make it again although it is there, or was begun with other options

    def check(self):
        if not 0 < self.val_fraction < 1 or self.shard_mb < 1 or min(self.files, self.workers) < 0:
            raise ValueError("val_fraction must be between 0 and 1, shard_mb at least 1, files and workers not negative")


def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent))
    options = {key: value for key, value in asdict(config).items() if key not in ("bpe", "workers", "keep", "out_dir", "overwrite")}
    if not config.overwrite and complete(folder):
        if read_meta(folder).get("options") != options:
            raise ValueError(f"{folder} was made with other options ({read_meta(folder).get('options')}): give overwrite=True, or another out_dir=")
        print(f"{folder} is there already (overwrite=True makes it again)")
        return
    state, shard_bytes = state_of(gpt2_encoding(config.bpe)), config.shard_mb * 10 ** 6
    if config.root:
        sources, fetch, tokens, source = group_files(find_documents(config.root)[:config.files or None], shard_bytes), None, 0, "local copy"
    else:
        hub = Hub(REPO, lambda name: name.endswith(".parquet") and "train" in name, folder / "download")
        part = hub.files[:config.files or None]
        sources, fetch, tokens, source = [{"files": [name], "bytes": size} for name, size in part], hub.fetch, TOKENS * len(part) // len(hub.files), \
            f"{REPO} {hub.revision}"
    meta = write_shards(folder, sources, state, val_fraction=config.val_fraction, shard_bytes=shard_bytes, workers=config.workers, tokens=tokens, fetch=fetch,
                        keep=config.keep or bool(config.root), overwrite=config.overwrite, options=options, source=source, synthetic=False)
    print(f"{folder}: " + ", ".join(f"{split} {entry['tokens']:,} tokens in {len(entry['shards'])} shards" for split, entry in meta["splits"].items()))


if __name__ == "__main__":
    main(configure(Config))
