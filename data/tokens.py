"""Text for language models as flat files of token ids, with the tokenizer that made them.

A dataset is a folder:
    train.bin, val.bin      token ids one after the other, raw uint16 (uint32 where the vocabulary is larger than 65,536)
    tokenizer.tiktoken      tiktoken's rank file: base64 of the token's bytes, a space, its rank, one token per line
    meta.yaml               format, vocab_size, dtype, tokenizer, splits (file, tokens, sha256) and whatever the maker adds;
                            written last, so a folder that has it is complete

`write_dataset` writes one, `Tokens` reads a split of it, `encoding` builds its tokenizer. A tokenizer travels (in checkpoints too)
as a `state`, a dict of plain types: {name, pattern, special_tokens: {text: id}, ranks: the text of the rank file}.
A character-level tokenizer is the same thing with the pattern `[\\s\\S]` and one rank per character.
"""
import base64, hashlib, os
from pathlib import Path

import numpy as np
import tiktoken
import yaml

FORMAT = "tokens-1"
ENDOFTEXT = "<|endoftext|>"
CHARACTERS = r"[\s\S]"  # the pattern of a character-level tokenizer


# ---- tokenizers

def encoding(state):
    """The tiktoken.Encoding of a tokenizer state. Raises ValueError when the state is not one."""
    try:
        lines = (line.split() for line in state["ranks"].splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        return tiktoken.Encoding(state["name"], pat_str=state["pattern"], mergeable_ranks=ranks, special_tokens=dict(state["special_tokens"]))
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"not a tokenizer state (name, pattern, special_tokens, ranks in tiktoken's format): {e!r}") from None


def state_of(enc):
    """The inverse of `encoding`: a tiktoken.Encoding as a dict of plain types."""
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    return {"name": enc.name, "pattern": enc._pat_str, "special_tokens": dict(enc._special_tokens),
            "ranks": "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)}


def character_state(text, name="characters"):
    """The state of a character-level tokenizer for `text`: its characters in code point order, then <|endoftext|>."""
    characters = sorted(set(text))
    return {"name": name, "pattern": CHARACTERS, "special_tokens": {ENDOFTEXT: len(characters)},
            "ranks": "".join(f"{base64.b64encode(c.encode()).decode()} {i}\n" for i, c in enumerate(characters))}


def gpt2_encoding():
    """GPT-2's byte-level BPE (50,257 tokens), from tiktoken's cache or from the network. Raises FileNotFoundError when neither has it."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # requests' errors are OSErrors; a download with a wrong checksum is a ValueError
        raise FileNotFoundError("GPT-2's BPE is neither in tiktoken's cache nor reachable: run once with network, or point "
                                f"TIKTOKEN_CACHE_DIR to a cache copied from another machine ({type(e).__name__})") from None


def encode(enc, text):
    """Token ids of plain `text`: special tokens spelled out in it get no meaning. Raises ValueError at a character that a
    character-level tokenizer does not have (tiktoken itself would panic)."""
    if enc._pat_str == CHARACTERS and (foreign := sorted(c for c in set(text) if c.encode() not in enc._mergeable_ranks)):
        raise ValueError(f"the tokenizer '{enc.name}' has no character {foreign[0]!r}: leave it out, or use a byte-level tokenizer")
    return enc.encode_ordinary(text)


def tokenizer_state(folder):
    """The state of a dataset's tokenizer. Raises FileNotFoundError or ValueError, in a sentence, when the dataset is missing or damaged."""
    meta = read_meta(folder)
    path = Path(folder) / meta["tokenizer"]["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing{_remedy(folder)}")
    return {key: meta["tokenizer"][key] for key in ("name", "pattern", "special_tokens")} | {"ranks": path.read_text(encoding="ascii")}


# ---- writing

def write_dataset(folder, splits, tokenizer, **meta):
    """Write a dataset, streaming, and return its meta. An older meta.yaml goes first and the new one comes last.
    splits: {"train": iterable of 1-D arrays (or lists) of ids, "val": ...}, written in this order; tokenizer: a state;
    meta: more keys for meta.yaml, plain types. Raises ValueError for an id outside the vocabulary or a split without tokens."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").unlink(missing_ok=True)
    vocab_size = encoding(tokenizer).n_vocab
    dtype = "uint16" if vocab_size <= 65536 else "uint32"
    written = {}
    for split, arrays in splits.items():
        path, tokens, digest = folder / f"{split}.bin", 0, hashlib.sha256()
        with _aside(path) as file:
            for ids in arrays:
                ids = np.asarray(ids)
                if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                    raise ValueError(f"{path}: token ids {ids.min()}..{ids.max()} do not fit the tokenizer's {vocab_size} tokens")
                block = ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
                file.write(block)
                digest.update(block)
                tokens += ids.size
            if not tokens:
                raise ValueError(f"{path}: the {split} split got no tokens; give it more text or a larger share")
        written[split] = {"file": path.name, "tokens": tokens, "sha256": digest.hexdigest()}
    with _aside(folder / "tokenizer.tiktoken") as file:
        file.write(tokenizer["ranks"].encode("ascii"))
    meta = {"format": FORMAT, "vocab_size": vocab_size, "dtype": dtype,
            "tokenizer": {key: tokenizer[key] for key in ("name", "pattern", "special_tokens")} | {"file": "tokenizer.tiktoken"},
            "splits": written} | meta
    with _aside(folder / "meta.yaml") as file:
        file.write(yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=1000).encode())
    return meta


class _aside:
    """`with _aside(path) as file`: writes path.tmp, and only when all went well flushes it to disk and gives it its name."""
    def __init__(self, path):
        self.path, self.tmp = path, path.with_name(path.name + ".tmp")

    def __enter__(self):
        self.file = open(self.tmp, "wb")
        return self.file

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if kind is None:
            os.replace(self.tmp, self.path)
        else:
            self.tmp.unlink(missing_ok=True)


# ---- reading

def read_meta(folder):
    """meta.yaml of a dataset as a dict. Raises FileNotFoundError when there is no (finished) dataset, ValueError when it is not one of ours."""
    folder = Path(folder)
    path = folder / "meta.yaml"
    if not path.is_file():
        what = "does not exist" if not folder.is_dir() else "holds no finished token dataset (no meta.yaml)"
        raise FileNotFoundError(f"{folder} {what}{_remedy(folder)}")
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{path} is not YAML{_remedy(folder)}") from None
    meta = meta if isinstance(meta, dict) else {}
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {meta.get('format')!r}, and this version reads {FORMAT!r}{_remedy(folder)}")
    keys = ["vocab_size", "dtype", "tokenizer.name", "tokenizer.pattern", "tokenizer.special_tokens", "tokenizer.file", "splits"]
    for key in keys + [f"splits.{split}.{key}" for split in meta.get("splits") or () for key in ("file", "tokens")]:
        value = meta
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            raise ValueError(f"{path} lacks the key '{key}'{_remedy(folder)}")
    return meta


class Tokens:
    """One split of a dataset.

    path: of the .bin file; meta: of the dataset; vocab_size; tokens: (N,) np.memmap, read-only.
    Raises FileNotFoundError when dataset, split or file is missing, ValueError when the file is empty or not as long as meta.yaml says."""

    def __init__(self, folder, split):
        self.meta = read_meta(folder)
        self.vocab_size = self.meta["vocab_size"]
        if split not in self.meta["splits"]:
            raise FileNotFoundError(f"{folder} has no split '{split}', only {', '.join(self.meta['splits'])}")
        entry, dtype = self.meta["splits"][split], np.dtype(self.meta["dtype"]).newbyteorder("<")
        self.path = Path(folder) / entry["file"]
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is missing{_remedy(folder)}")
        size, expected = self.path.stat().st_size, entry["tokens"] * dtype.itemsize
        if size == 0:
            raise ValueError(f"{self.path} is empty{_remedy(folder)}")
        if size != expected:
            raise ValueError(f"{self.path} is {size:,} bytes long where meta.yaml says {expected:,}{_remedy(folder)}")
        self.tokens = np.memmap(self.path, dtype, mode="r")

    def __len__(self):
        return len(self.tokens)

    def windows(self, starts, length):
        """int64 (len(starts), length): `length` tokens from each of `starts`, ids checked against vocab_size.
        Raises ValueError for a window that leaves the file or an id that is no token."""
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and not 0 <= starts.min() <= starts.max() <= len(self) - length:
            raise ValueError(f"{self.path}: windows of {length} tokens from {starts.min()} to {starts.max()} leave its {len(self)} tokens")
        ids = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(ids, starts):
            row[:] = self.tokens[start:start + length]
        if ids.size and ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            raise ValueError(f"{self.path}: token id {ids[row, column]} at offset {starts[row] + column} is outside the vocabulary of "
                             f"{self.vocab_size}{_remedy(self.path.parent, ' overwrite=True')}")
        return ids


def complete(folder):
    """Whether the folder holds a whole dataset: every file there and as long as meta.yaml says."""
    try:
        for split in read_meta(folder)["splits"]:
            Tokens(folder, split)
        tokenizer_state(folder)
    except (ValueError, OSError):
        return False
    return True


def _remedy(folder, option=""):
    """How to make the dataset, for the end of a sentence: `python data/NAME/prepare.py` where there is such a script (a variant of a
    dataset, data/NAME/VARIANT, is made by the script above it)."""
    folder = Path(folder)
    if (folder / "prepare.py").is_file():
        return f"; make it with: python {folder / 'prepare.py'}{option}"
    if (folder.parent / "prepare.py").is_file():
        return f"; make it with: python {folder.parent / 'prepare.py'}{option} (its --help says how to get '{folder.name}')"
    return ""
