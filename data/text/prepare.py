"""Your own text for train.py: a text file, a folder of them, JSONL or parquet, of any size.

    python data/text/prepare.py root=books/      # then: python train.py dataset=text/books
    python data/text/prepare.py root=posts.jsonl column=body     # one JSON object a line
    python data/text/prepare.py root=paper/ files='*.tex' tokenizer=char
    python data/text/prepare.py root=notes.txt tokenizer=data/pydocs     # to go on from its model

Parallel and resumable. Of many documents, some are kept for validation as a whole (by a hash of
their text, so none is on both sides); of few text files, the end of each.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data import InputError, already_made, files_state, folder_of, options_of
from data import tokens as T

EMBEDDED = False  # it is the user's own
FEW = 100  # text files: fewer than this lend their ends to validation, not some of themselves


@dataclass
class Config:
    root: str = ""  # text, JSONL or parquet file, or a folder of them
    files: str = ""  # which of a folder's files, '*.tex' say; "": parquet, else JSONL, else text
    column: str = "text"  # where the text is in JSONL and parquet
    tokenizer: str = "gpt2"  # gpt2 (BPE), char, or a dataset folder whose tokenizer is taken
    bpe: str = ""  # GPT-2's vocab.bpe or rank file; "": tiktoken's cache, or by download
    val_fraction: float = 0.05  # for validation
    shard_mb: int = 450  # text per shard in megabytes
    workers: int = 0  # processes; 0: one per core
    name: str = ""  # of the dataset, data/text/NAME; "": that of root
    out_dir: str = ""  # a folder elsewhere
    synthetic: bool = False  # the text is made up: figures and tables will say so
    overwrite: bool = False  # make it again although it is there, or was begun otherwise

    POSITIVE = "shard_mb val_fraction"
    SHARES = "val_fraction"

    def check(self):
        if not self.root:
            raise InputError("root= is missing: give a file of text, or a folder of them")


def tokenizer_of(config, files, name):
    if config.tokenizer == "gpt2":
        return T.state_of(T.gpt2_encoding(config.bpe))
    if config.tokenizer != "char":
        return T.tokenizer_state(config.tokenizer)
    characters = set()
    for path in files:
        for text in T.documents(path, column=config.column):
            characters.update(T.replace_lone_surrogates(text or ""))
    if not characters:
        raise InputError(f"root={config.root} holds no text: give another file or folder")
    return T.character_state(characters, f"{name}-char")


def main(config):
    name = config.name or Path(config.root).resolve().name.split(".")[0] or "text"
    folder = folder_of(config, __file__, name)
    options = options_of(config, "bpe", "workers")
    files = T.find_documents(config.root, config.files)
    version = {"files": files_state(files)}
    if already_made(folder, options, T.complete, config.overwrite, **version):
        return
    tail = len(files) < FEW and all(T.kind_of(path) in ("text", "") for path in files)
    plan = T.Plan(config.column, config.val_fraction, tail, config.shard_mb * 1_000_000)
    T.write_shards(
        folder,
        T.group_files(files, plan),
        tokenizer_of(config, files, name),
        plan,
        workers=config.workers,
        overwrite=config.overwrite,
        options=options,
        source=f"local files ({name})",
        validation="the end of each document" if tail else "documents by a hash of their text",
        synthetic=config.synthetic,
        **version,
    )
    place = os.path.relpath(folder, Path(__file__).resolve().parents[2])
    print(f"python train.py dataset={folder if place.startswith('..') else place}")


if __name__ == "__main__":
    main(configure(Config))
