"""Your own text for train.py: text files, JSONL or parquet, of any size.

    python data/text/prepare.py root=books/      # then: python train.py dataset=text/books
    python data/text/prepare.py root=posts.jsonl column=body     # one JSON object a line
    python data/text/prepare.py root=paper/ files='*.tex' tokenizer=char
    python data/text/prepare.py root=notes.txt tokenizer=data/pydocs  # to continue its model

Parallel and resumable. Validation takes whole documents (by a hash of their text, so none is in
both splits) or, of fewer than 100 text files, the end of each.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data import InputError, already_made, files_state, folder_of, options_of
from data import tokens as T

EMBEDDED = False  # the user's own
FEW = 100  # of fewer text files, validation takes the ends


@dataclass
class Config:
    root: str = ""  # text, JSONL or parquet file, or a folder of them
    files: str = ""  # pattern such as '*.tex'; "": a folder's parquet, else JSONL, else text files
    column: str = "text"  # with the text, in JSONL and parquet
    tokenizer: str = "gpt2"  # gpt2 (BPE), char, or the folder of a dataset with the tokenizer
    bpe: str = ""  # GPT-2's vocab.bpe or rank file; "": tiktoken's cache or a download
    val_fraction: float = 0.05  # share for validation
    shard_mb: int = 450  # text per shard in megabytes
    workers: int = 0  # processes; 0: one per core
    name: str = ""  # NAME of the dataset data/text/NAME; "": that of root
    out_dir: str = ""  # "": data/text/NAME
    synthetic: bool = False  # whether figures and tables must say so
    overwrite: bool = False  # make it again, even if it exists or was started with other options

    POSITIVE = "shard_mb val_fraction"
    SHARES = "val_fraction"

    def check(self):
        if not self.root:
            raise InputError("root= is missing: give a text file, or a folder of them")


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
        raise InputError(f"root={config.root} has no text: give another file or folder")
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
    print(f"python train.py dataset={folder}")


if __name__ == "__main__":
    main(configure(Config))
