"""Your own text for train.py: a text file, a folder of them, JSONL or parquet, of any size, in one command.

    python data/text/prepare.py root=books/                                 # .txt and .md files; then python train.py dataset=text/books
    python data/text/prepare.py root=posts.jsonl column=body                # one JSON object a line
    python data/text/prepare.py root=paper/ files='*.tex' tokenizer=char    # by characters
    python data/text/prepare.py root=notes.txt tokenizer=data/pydocs        # with another dataset's tokenizer, to go on from a model trained on it

Parallel and resumable. Of many documents, some are kept for validation as a whole (by a hash of their text, so none is on both sides); of few text
files, the end of each.
"""
import os, sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.tokens import character_state, complete, documents, find_documents, gpt2_encoding, group_files, kind_of, read_meta, state_of, tokenizer_state, \
    write_shards

EMBEDDED = False  # it is the user's own
FEW = 100  # text files: fewer than this lend their ends to validation, not some of themselves


@dataclass
class Config:
    root: str = ""                     # text, JSONL or parquet file, or a folder of them
    files: str = ""                    # which of a folder's files, '*.tex' say; "": parquet, else JSONL, else .txt, .text and .md
    column: str = "text"               # where the text is in JSONL and parquet
    tokenizer: str = "gpt2"            # gpt2 (BPE), char, or a dataset folder whose tokenizer is taken
    bpe: str = ""                      # GPT-2's vocab.bpe or rank file; "": tiktoken's cache, or by download
    val_fraction: float = 0.05         # for validation
    shard_mb: int = 450                # text per shard in megabytes
    workers: int = 0                   # processes; 0: one per core
    name: str = ""                     # of the dataset, data/text/NAME; "": that of root
    out_dir: str = ""                  # a folder elsewhere
    synthetic: bool = False            # the text is made up: figures and tables will say so
    overwrite: bool = False            # make it again although it is there, or was begun with other options

    def check(self):
        if not self.root:
            raise ValueError("root= is missing: give a text, JSONL or parquet file, or a folder of them")
        if not 0 < self.val_fraction < 1 or self.shard_mb < 1 or self.workers < 0:
            raise ValueError("val_fraction must be between 0 and 1, shard_mb at least 1, workers not negative")


def main(config):
    name = config.name or Path(config.root).resolve().name.split(".")[0] or "text"
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent)) / name
    options = {key: value for key, value in asdict(config).items() if key not in ("bpe", "workers", "out_dir", "overwrite")}
    if not config.overwrite and complete(folder):
        if read_meta(folder).get("options") != options:
            raise ValueError(f"{folder} was made with other options ({read_meta(folder).get('options')}): give overwrite=True, or another name=")
        print(f"{folder} is there already (overwrite=True makes it again)")
        return
    files = find_documents(config.root, config.files)
    if config.tokenizer == "char":
        characters = set()
        for path in files:
            for text in documents(path, column=config.column):
                characters |= set(text)
        state = character_state(characters, f"{name}-char")
    else:
        state = state_of(gpt2_encoding(config.bpe)) if config.tokenizer == "gpt2" else tokenizer_state(config.tokenizer)
    tail = len(files) < FEW and all(kind_of(path) == "text" for path in files)
    shard_bytes = config.shard_mb * 10 ** 6
    meta = write_shards(folder, group_files(files, shard_bytes), state, column=config.column, val_fraction=config.val_fraction, tail=tail,
                        shard_bytes=shard_bytes, workers=config.workers, overwrite=config.overwrite, options=options, source=f"local files ({name})",
                        validation="the end of each document" if tail else "documents by a hash of their text", synthetic=config.synthetic)
    print(f"{folder}: vocabulary of {meta['vocab_size']:,}; validation is {meta['validation']}; " + ", ".join(
        f"{split} {entry['tokens']:,} tokens" for split, entry in meta["splits"].items()))
    place = Path(os.path.relpath(folder, Path(__file__).resolve().parents[1]))
    print(f"python train.py dataset={folder if '..' in place.parts else place}")


if __name__ == "__main__":
    main(configure(Config))
