"""Text for language models as flat files of token ids, with the tokenizer that made them.

A dataset is a folder:
    train.bin, val.bin      token ids one after the other, raw uint16 (uint32 where the vocabulary is larger than 65,536)
    tokenizer.tiktoken      tiktoken's rank file: base64 of the token's bytes, a space, its rank, one token per line
    meta.yaml               format, vocab_size, dtype, tokenizer, splits (file, tokens, sha256) and whatever the maker adds;
                            written last, so a folder that has it is complete
A large split is `shards` instead of one file (file, tokens, sha256, and offset, the bytes of a header), read as one stream in their order.

Two foreign folders are read as they are, without meta.yaml: nanoGPT's (train.bin, val.bin and, for characters, meta.pkl), and shards with the
header of llm.c and modded-nanogpt (*train*.bin, *val*.bin: 256 int32, the first three 20240520, 1, the number of tokens; then uint16).

`write_dataset` writes one, `write_shards` makes one of any amount of documents, in parallel and resumable, `Tokens` reads a split, `encoding` builds
the tokenizer. A tokenizer travels (in checkpoints too) as a `state`, a dict of plain types: {name, pattern, special_tokens: {text: id},
ranks: the text of the rank file}. A character-level tokenizer is the same thing with the pattern `[\\s\\S]` and one rank per character.
"""
import base64, contextlib, fcntl, gzip, hashlib, json, multiprocessing, os, pickle, shutil
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tiktoken

from data import aside, load_meta, remedy, write_aside, write_yaml

FORMAT = "tokens-1"
ENDOFTEXT = "<|endoftext|>"
CHARACTERS = r"[\s\S]"  # the pattern of a character-level tokenizer
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # SHA-256 of vocab.bpe, which others call merges.txt
GPT2_RANKS = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of the same tokens as a rank file, r50k_base.tiktoken
HEADER, HEADER_BYTES = 20240520, 1024  # magic number and length of the header of llm.c's token files


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


def gpt2_encoding(bpe=""):
    """GPT-2's byte-level BPE (50,257 tokens): from the file `bpe` where one is given (vocab.bpe, merges.txt, or the rank file r50k_base.tiktoken;
    its checksum is verified), else from tiktoken's cache, else from the network. Raises FileNotFoundError when none has it, ValueError for another file."""
    if bpe:
        path = Path(bpe)
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}: bpe= wants GPT-2's vocab.bpe (merges.txt) or its rank file (r50k_base.tiktoken)")
        raw = path.read_bytes()
        text = raw.replace(b"\r\n", b"\n").rstrip(b"\n") + b"\n"
        digests = {hashlib.sha256(form).hexdigest() for form in (raw, text)}
        if not digests & {GPT2_MERGES, GPT2_RANKS}:
            raise ValueError(f"{path} is not GPT-2's BPE: its SHA-256 {hashlib.sha256(raw).hexdigest()[:12]}... is neither that of vocab.bpe nor that of "
                             "r50k_base.tiktoken; fetch it again")
        ranks = text.decode("ascii") if GPT2_RANKS in digests else ranks_of_merges(text.decode())
        return encoding({"name": "gpt2", "pattern": GPT2_PATTERN, "special_tokens": {ENDOFTEXT: ranks.count("\n")}, "ranks": ranks})
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # requests' errors are OSErrors; a download with a wrong checksum is a ValueError
        raise FileNotFoundError("GPT-2's BPE is neither in tiktoken's cache nor reachable: run once with network, point TIKTOKEN_CACHE_DIR to a "
                                f"cache copied from another machine, or give its vocab.bpe with bpe=FILE ({type(e).__name__})") from None


def ranks_of_merges(text):
    """The text of a rank file from the merges of a byte-level BPE in GPT-2's own form (vocab.bpe, merges.txt): the 256 bytes in GPT-2's order,
    then one token a line, in which printable bytes stand for themselves and the others for the characters 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    tokens = [bytes([b]) for b in printable + others] + [bytes(byte_of[c] for c in line.replace(" ", "")) for line in lines]
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def encode(enc, text):
    """Token ids of plain `text`: special tokens spelled out in it get no meaning. Raises ValueError at a character that a
    character-level tokenizer does not have (tiktoken itself would panic)."""
    if enc._pat_str == CHARACTERS and (foreign := sorted(c for c in set(text) if c.encode() not in enc._mergeable_ranks)):
        raise ValueError(f"the tokenizer '{enc.name}' has no character {foreign[0]!r}: leave it out, or use a byte-level tokenizer")
    return enc.encode_ordinary(text)


def tokenizer_state(folder):
    """The state of a dataset's tokenizer. Raises FileNotFoundError or ValueError, in a sentence, when the dataset is missing or damaged."""
    meta = read_meta(folder)
    if meta["tokenizer"]["file"] is False:
        return _foreign_tokenizer(Path(folder))
    path = Path(folder) / meta["tokenizer"]["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing{remedy(folder)}")
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
    dtype = _dtype(vocab_size)
    written = {}
    for split, arrays in splits.items():
        path, tokens, digest = folder / f"{split}.bin", 0, hashlib.sha256()
        with aside(path) as file:
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
    return write_meta(folder, written, tokenizer, **meta)


def write_meta(folder, splits, tokenizer, **meta):
    """Complete a dataset whose token files are there: tokenizer.tiktoken, then meta.yaml, which it returns. splits: as meta.yaml has them."""
    folder, vocab_size = Path(folder), encoding(tokenizer).n_vocab
    write_aside(folder / "tokenizer.tiktoken", tokenizer["ranks"])
    meta = {"format": FORMAT, "vocab_size": vocab_size, "dtype": _dtype(vocab_size),
            "tokenizer": {key: tokenizer[key] for key in ("name", "pattern", "special_tokens")} | {"file": "tokenizer.tiktoken"},
            "splits": splits} | meta
    write_yaml(folder / "meta.yaml", meta)
    return meta


def _dtype(vocab_size):
    return "uint16" if vocab_size <= 65536 else "uint32"


# ---- reading

def read_meta(folder):
    """meta.yaml of a dataset as a dict. Raises FileNotFoundError when there is no (finished) dataset, ValueError when it is not one of ours."""
    folder = Path(folder)
    path = folder / "meta.yaml"
    if not path.is_file() and (foreign := _foreign(folder)):
        return foreign
    meta = load_meta(folder, "token dataset", FORMAT)
    keys = ["vocab_size", "dtype", "tokenizer.name", "tokenizer.pattern", "tokenizer.special_tokens", "tokenizer.file", "splits"]
    for split, entry in (meta.get("splits") or {}).items():
        keys += [f"splits.{split}.{key}" for key in ("shards" if isinstance(entry, dict) and "shards" in entry else "file", "tokens")]
    for key in keys:
        value = meta
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            raise ValueError(f"{path} lacks the key '{key}'{remedy(folder)}")
    return meta


class Tokens:
    """One split of a dataset.

    path: of the .bin file (of the folder, where the split is in shards); meta: of the dataset; vocab_size; tokens: (N,) np.memmap, read-only, or a
    Stream of several. Raises FileNotFoundError when dataset, split or file is missing, ValueError when a file is empty or not as long as meta.yaml says."""

    def __init__(self, folder, split):
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.vocab_size = self.meta["vocab_size"]
        if split not in self.meta["splits"]:
            raise FileNotFoundError(f"{folder} has no split '{split}', only {', '.join(self.meta['splits'])}")
        entry, dtype = self.meta["splits"][split], np.dtype(self.meta["dtype"]).newbyteorder("<")
        self.files, parts = [], []
        for shard in entry.get("shards", [entry]):
            path, offset = self.folder / shard["file"], shard.get("offset", 0)
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing{remedy(folder)}")
            size, expected = path.stat().st_size, offset + shard["tokens"] * dtype.itemsize
            if size == 0:
                raise ValueError(f"{path} is empty{remedy(folder)}")
            if size != expected:
                raise ValueError(f"{path} is {size:,} bytes long where meta.yaml says {expected:,}{remedy(folder)}")
            self.files.append(path)
            parts.append(np.memmap(path, dtype, mode="r", offset=offset))
        self.path = self.files[0] if len(parts) == 1 else self.folder
        self.tokens = parts[0] if len(parts) == 1 else Stream(parts)

    def __len__(self):
        return len(self.tokens)

    def windows(self, starts, length):
        """int64 (len(starts), length): `length` tokens from each of `starts`, ids checked against vocab_size.
        Raises ValueError for a window that leaves the split or an id that is no token."""
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and not 0 <= starts.min() <= starts.max() <= len(self) - length:
            raise ValueError(f"{self.path}: windows of {length} tokens from {starts.min()} to {starts.max()} leave its {len(self)} tokens")
        ids = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(ids, starts):
            row[:] = self.tokens[start:start + length]
        if ids.size and ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            raise ValueError(f"{self.path}: token id {ids[row, column]} at offset {starts[row] + column} is outside the vocabulary of "
                             f"{self.vocab_size}{remedy(self.folder, ' overwrite=True')}")
        return ids


class Stream:
    """Several arrays read as one: len, slices, and arrays of indices (which a plain memmap takes as well)."""

    def __init__(self, parts):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self):
        return int(self.ends[-1])

    def __array__(self, dtype=None, copy=None):
        return np.concatenate(self.parts).astype(dtype or self.parts[0].dtype, copy=False)

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            pieces = []
            for k in range(np.searchsorted(self.ends, start, "right"), len(self.parts)):
                begin = self.ends[k] - len(self.parts[k])
                if begin >= stop:
                    break
                pieces.append(self.parts[k][max(start - begin, 0):stop - begin])
            return pieces[0] if len(pieces) == 1 else np.concatenate([self.parts[0][:0], *pieces])
        index = np.asarray(index)
        if index.size and not -len(self) <= index.min() <= index.max() < len(self):
            raise IndexError(f"index {index.min()}..{index.max()} in a stream of {len(self)} tokens")
        index = index % len(self)
        which = np.searchsorted(self.ends, index, "right")
        out = np.empty(index.shape, self.parts[0].dtype)
        for k in np.unique(which):
            out[which == k] = self.parts[k][index[which == k] - (self.ends[k] - len(self.parts[k]))]
        return out[()]


def complete(folder):
    """Whether the folder holds a whole dataset: every file there and as long as meta.yaml says."""
    try:
        for split in read_meta(folder)["splits"]:
            Tokens(folder, split)
        tokenizer_state(folder)
    except (ValueError, OSError):
        return False
    return True


def _foreign(folder):
    """meta.yaml's content for a nanoGPT folder or one of shards with a header; None for any other, an unfinished one of ours say.
    Raises ValueError for a token file that is damaged or of another tokenizer."""
    if (folder / "unfinished").is_dir() or (folder / "tokenizer.tiktoken").exists():
        return None
    for prepare in (folder / "prepare.py", folder.parent / "prepare.py"):
        if prepare.is_file() and "\nEMBEDDED = " in prepare.read_text(errors="replace"):
            return None
    splits = headed_shards(folder)
    if not {"train", "val"} <= splits.keys():
        return None
    characters = _meta_pkl(folder)
    return {"format": FORMAT, "vocab_size": len(characters) if characters else 50257, "dtype": "uint16", "source": f"{folder.name}, made elsewhere",
            "tokenizer": {"name": "characters" if characters else "gpt2", "pattern": CHARACTERS if characters else GPT2_PATTERN,
                          "special_tokens": {}, "file": False}, "splits": splits}


def headed_shards(folder):
    """Splits, as meta.yaml has them, of the token files in a folder: train.bin and val.bin, with or without a header, or *train*.bin and *val*.bin, which
    must have one. Raises ValueError for one that is not as long as its header says, or of another version."""
    splits = {}
    for split in ("train", "val"):
        whole = folder / f"{split}.bin"
        shards = []
        for path in [whole] if whole.is_file() else sorted(folder.glob(f"*{split}*.bin")):
            size, head = path.stat().st_size, np.fromfile(path, "<i4", 256)
            if len(head) == 256 and head[0] in (HEADER, 20240801) and head[1] in (1, 7):
                if head[0] != HEADER:
                    raise ValueError(f"{path} holds tokens of Llama 3: shards of GPT-2's tokens (header {HEADER}, version 1) are read")
                if size != HEADER_BYTES + 2 * int(head[2]):
                    raise ValueError(f"{path} is {size:,} bytes long where its header says {HEADER_BYTES + 2 * int(head[2]):,}: fetch it again")
                shards.append({"file": path.name, "tokens": int(head[2]), "offset": HEADER_BYTES})
            elif path == whole:
                if size % 2:
                    raise ValueError(f"{path} is {size:,} bytes long, no whole number of uint16 tokens: fetch or make it again")
                shards.append({"file": path.name, "tokens": size // 2})
        if shards:
            splits[split] = {"tokens": sum(shard["tokens"] for shard in shards), "shards": shards}
    return splits


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; a pickle that asks for anything else, code say, is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def _meta_pkl(folder):
    """{character: id} of nanoGPT's meta.pkl, {} where there is none. Raises ValueError for one that is not of characters, or holds code."""
    path = folder / "meta.pkl"
    if not path.is_file():
        return {}
    try:
        with open(path, "rb") as file:
            stoi = dict(_PlainUnpickler(file).load()["stoi"])
    except Exception as e:  # a torn pickle raises nearly anything
        raise ValueError(f"{path} is not nanoGPT's meta.pkl ({type(e).__name__}: {e}): make the dataset again") from None
    if not all(isinstance(c, str) and len(c) == 1 and isinstance(i, int) for c, i in stoi.items()) or sorted(stoi.values()) != list(range(len(stoi))):
        raise ValueError(f"{path} is not a vocabulary of characters: nanoGPT folders of characters and of GPT-2's BPE are read")
    return stoi


def _foreign_tokenizer(folder):
    characters = _meta_pkl(folder)
    if characters:
        ranks = "".join(f"{base64.b64encode(c.encode()).decode()} {i}\n" for c, i in sorted(characters.items(), key=lambda item: item[1]))
        return {"name": "characters", "pattern": CHARACTERS, "special_tokens": {}, "ranks": ranks}
    names = ("vocab.bpe", "merges.txt", "r50k_base.tiktoken", "gpt2.tiktoken")  # a copy beside the tokens serves where there is no network
    try:
        return state_of(gpt2_encoding(next((folder / name for name in names if (folder / name).is_file()), "")))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds GPT-2's tokens, whose BPE is neither in tiktoken's cache nor reachable: put its vocab.bpe into the folder, "
                                "or run once with network") from None


# ---- any amount of documents into shards

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".text": "text", ".md": "text"}
BYTES_PER_TOKEN = 4.5  # of English in GPT-2's BPE


def kind_of(path):
    """'parquet', 'jsonl' or 'text', which is also everything else; .gz does not count."""
    suffix = Path(str(path).removesuffix(".gz")).suffix.lower()
    return KINDS.get(suffix, "text")


def find_documents(root, pattern=""):
    """Files of documents (sorted Paths): root itself, or those under it that match the glob `pattern`; without one its parquet files, else its
    JSONL files, else its text files (.txt, .text, .md). Raises FileNotFoundError where there are none."""
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist: root= wants a text, JSONL or parquet file, or a folder of them")
    files = sorted(p for p in root.rglob(pattern or "*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts))
    if not pattern:
        known = [p for p in files if Path(str(p).removesuffix(".gz")).suffix.lower() in KINDS]
        files = next((found for kind in ("parquet", "jsonl", "text") if (found := [p for p in known if kind_of(p) == kind])), [])
    if not files:
        raise FileNotFoundError(f"{root} holds no {pattern or '.parquet, .jsonl, .txt or .md'} files: give another root=, or the kind of yours with files=")
    return files


def _parquet(path, column):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} wants pyarrow to be read: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as e:  # pyarrow's errors are either
        raise ValueError(f"{path} is not a whole parquet file ({' '.join(str(e).split())[:100]}): fetch it again") from None
    if column not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column '{column}', only {', '.join(file.schema_arrow.names)}: give column=")
    return file


def documents(path, start=0, stop=None, column="text"):
    """The texts of one file, in order: rows of a parquet file (of its row groups start to stop), lines of a JSONL file (those that begin in its bytes
    start to stop), or a text file as a whole. Raises ValueError, in a sentence, for what is not such a file."""
    kind = kind_of(path)
    if kind == "parquet":
        file = _parquet(path, column)
        groups = list(range(start, file.num_row_groups if stop is None else stop))
        for batch in file.iter_batches(1000, row_groups=groups, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text)
        return
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        try:
            if kind == "text":
                yield file.read().decode("utf-8-sig")
                return
            if start:  # the line that began before belongs to the piece before
                file.seek(start - 1)
                file.readline()
            while stop is None or file.tell() < stop:
                at, line = file.tell(), file.readline()
                if not line:
                    return
                if line.strip():
                    record = json.loads(line)
                    text = record.get(column) if isinstance(record, dict) else None
                    if not isinstance(text, str):
                        keys = ", ".join(map(str, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
                        raise ValueError(f"{path}: the line at byte {at} has no text in '{column}', only {keys}: give column=")
                    yield text
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text (byte {e.start}): convert it, or leave it out") from None
        except (gzip.BadGzipFile, EOFError):
            raise ValueError(f"{path} is not a whole gzip file: fetch it again") from None
        except json.JSONDecodeError:
            raise ValueError(f"{path}: the line at byte {at} is not JSON: one object a line, text in '{column}'") from None


def cut(files, shard_bytes, column="text"):
    """Pieces of about shard_bytes of text, each for one pair of shards: [[(path, start, stop), ...], ...] as documents() takes them."""
    pieces = []
    for path in files:
        kind, size = kind_of(path), Path(path).stat().st_size
        if kind == "parquet":
            file, start, held = _parquet(path, column), 0, 0
            at = file.schema_arrow.names.index(column)
            for group in range(file.num_row_groups):
                held += file.metadata.row_group(group).column(at).total_uncompressed_size
                if held >= shard_bytes or group == file.num_row_groups - 1:
                    pieces.append([(path, start, group + 1)])
                    start, held = group + 1, 0
        elif kind == "jsonl" and not str(path).endswith(".gz"):
            pieces += [[(path, start, min(size, start + shard_bytes))] for start in range(0, size, shard_bytes)]
        else:
            pieces.append([(path, 0, None)])
    return pieces


def group_files(files, shard_bytes):
    """Sources for write_shards from local files: each parquet or JSONL file by itself, text files together up to shard_bytes."""
    sources = []
    for path in files:
        size = path.stat().st_size
        if kind_of(path) == "text" and sources and sources[-1]["text"] and sources[-1]["bytes"] + size <= shard_bytes:
            sources[-1]["files"].append(str(path))
            sources[-1]["bytes"] += size
        else:
            sources.append({"files": [str(path)], "bytes": size, "text": kind_of(path) == "text"})
    return sources


def write_shards(folder, sources, tokenizer, *, column="text", val_fraction=0.0005, tail=False, shard_bytes=450_000_000, workers=0, tokens=0, fetch=None,
                 keep=True, overwrite=False, **meta):
    """Make a dataset of any amount of documents, end-of-text after each, and return its meta: a train and a val shard of every piece of text.

    Parallel over pieces; a kill at any moment costs the pieces at work, and the same call goes on. The result does not depend on the workers.
    sources: [{files: [name, ...], bytes}, ...] in order, fetch(name) giving the local path of one (None: names are paths), removed again unless `keep`.
    val_fraction: share of documents for validation, by a hash of their text, so that a repeated document is on one side only; tail: the end of
    each document instead, for few long ones. tokens: how many to expect, 0: estimated from the first documents.
    Raises OSError where the disk has not the room, ValueError for damaged sources, and for a folder begun with others."""
    from tqdm import tqdm
    folder, work = Path(folder), Path(folder) / "unfinished"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{folder} is being made by another job: wait for it, or give another out_dir=") from None
        if not overwrite and not work.is_dir() and any(folder.glob("*.bin")) and not (folder / "meta.yaml").is_file():
            raise FileExistsError(f"{folder} holds token files that were not made here: give another out_dir=, or overwrite=True to replace them")
        plan = hashlib.sha256(json.dumps([sources, column, val_fraction, tail, shard_bytes, tokenizer]).encode()).hexdigest()
        if overwrite or not work.is_dir():
            (folder / "meta.yaml").unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)
            for old in (*folder.glob("train*.bin*"), *folder.glob("val*.bin*")):
                old.unlink()
            work.mkdir()
            (work / "plan").write_text(plan)
        elif not (work / "plan").is_file() or (work / "plan").read_text() != plan:
            raise ValueError(f"{folder} was begun from other files or with other options: give those to go on, or overwrite=True to start again")
        for torn in folder.glob("*.tmp-*"):  # what a kill left
            torn.unlink()
        enc, total = encoding(tokenizer), sum(source["bytes"] for source in sources)
        itemsize = np.dtype(_dtype(enc.n_vocab)).itemsize
        tokens = tokens or _expect(sources, enc, column, fetch)
        there = sum(path.stat().st_size for path in folder.glob("*.bin"))
        passing = 0 if not fetch else total if keep else min(total, 3 * max(source["bytes"] for source in sources))  # files on their way
        need, free = max(0, tokens * itemsize - there) + passing, shutil.disk_usage(folder).free
        print(f"{folder}: {total / 1e9:.3g} GB in {sum(len(source['files']) for source in sources):,} files, about {tokens / 1e6:,.1f} M tokens; they take "
              f"{tokens * itemsize / 1e9:.3g} GB of disk, of which {there / 1e9:.3g} GB are there" + (
                  f", and files on their way {passing / 1e9:.3g} GB" if passing else "") + f"; {free / 1e9:.0f} GB are free", flush=True)
        if need > free:
            raise OSError(f"{folder} wants about {need / 1e9:.1f} GB more and its disk has {free / 1e9:.1f} GB free: make room, or give another out_dir=")
        workers = workers or os.cpu_count()
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _set_tokenizer, (tokenizer,)) if workers > 1 else None
        _set_tokenizer(tokenizer)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokens", dynamic_ncols=True, smoothing=0.1)
        waiting = deque()

        def finish(number, jobs, files):
            for job in jobs:
                if hasattr(job, "result"):
                    job.result()
                bar.update(sources[number]["bytes"] / len(jobs))
            _write_json(work / f"source-{number:05d}.json", len(jobs))
            for path in files if not keep else ():
                Path(path).unlink(missing_ok=True)

        try:
            for number, source in enumerate(sources):
                if (work / f"source-{number:05d}.json").is_file():
                    bar.update(source["bytes"])
                    continue
                files = [fetch(name) if fetch else name for name in source["files"]]
                pieces = cut(files, shard_bytes, column)
                if source.get("text"):
                    pieces = [[part for piece in pieces for part in piece]]
                jobs = []
                for i, piece in enumerate(pieces):
                    name, job = f"{number:05d}-{i:05d}", None
                    if not (work / f"{name}.json").is_file():
                        args = (folder, name, piece, column, val_fraction, tail)
                        job = pool.submit(_tokenise, *args) if pool else _tokenise(*args)
                    jobs.append(job)
                waiting.append((number, jobs, files))
                while len(waiting) > 1 and sum(hasattr(job, "done") and not job.done() for _, jobs, _ in waiting for job in jobs) > 2 * workers:
                    finish(*waiting.popleft())
            while waiting:
                finish(*waiting.popleft())
        except BrokenProcessPool:
            raise ValueError(f"{folder}: a worker was killed, for want of memory perhaps: run it again, which goes on, with a smaller workers=") from None
        except ValueError as e:  # from another process it comes with that one's traceback
            raise ValueError(str(e)) from None
        finally:
            bar.close()
            if pool:
                pool.shutdown(cancel_futures=True)
        splits, counts = {}, {"documents": 0, "characters": 0}
        for path in sorted(work.glob("[0-9]*-*.json")):
            record = json.loads(path.read_text())
            for split, shard in record["splits"].items():
                entry = splits.setdefault(split, {"tokens": 0, "shards": []})
                entry["tokens"] += shard["tokens"]
                entry["shards"].append(shard)
            counts = {key: n + record[key] for key, n in counts.items()}
        for split in ("train", "val"):
            if split not in splits:
                raise ValueError(f"{folder}: the {split} split got no tokens of {counts['documents']} documents; give it more text, or another val_fraction=")
        meta = write_meta(folder, {split: splits[split] for split in ("train", "val")}, tokenizer, **counts, **meta)
        shutil.rmtree(work)
        return meta


def _expect(sources, enc, column, fetch):
    """About how many tokens the sources hold, from the first megabyte of text."""
    if fetch:
        return round(sum(source["bytes"] for source in sources) / BYTES_PER_TOKEN)
    seen = made = 0
    for text in (text for source in sources for path in source["files"] for text in documents(path, column=column)):
        text = text[:1_000_000 - seen]
        seen, made = seen + len(text.encode()), made + len(encode(enc, text)) + 1
        if seen >= 1_000_000:
            break
    size = 0
    for path in (path for source in sources for path in source["files"]):
        if kind_of(path) == "parquet":
            file = _parquet(path, column).metadata
            at = next(i for i in range(file.num_columns) if file.schema.column(i).path.split(".")[0] == column)
            size += sum(file.row_group(group).column(at).total_uncompressed_size for group in range(file.num_row_groups))
        else:
            size += Path(path).stat().st_size * (3 if str(path).endswith(".gz") else 1)
    return round(size * made / max(1, seen))


def _set_tokenizer(state):
    global _encoder
    _encoder = encoding(state)


def _tokenise(folder, name, piece, column, val_fraction, tail):
    """One piece of text into its shards; the record of them is written last, so a piece that has one is done."""
    record = {"documents": 0, "characters": 0, "splits": {}}
    eot, dtype = _encoder._special_tokens.get(ENDOFTEXT), np.dtype(_dtype(_encoder.n_vocab)).newbyteorder("<")
    with contextlib.ExitStack() as stack:
        files = {}
        for path, start, stop in piece:
            for text in documents(path, start, stop, column):
                record["documents"] += 1
                record["characters"] += len(text)
                if tail:  # at the end of a line, where there is one
                    at = int(len(text) * (1 - val_fraction))
                    at = text.rfind("\n", 0, at) + 1 or at
                    sides = (("train", text[:at]), ("val", text[at:]))
                else:
                    place = int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big") / 2 ** 64
                    sides = (("val" if place < val_fraction else "train", text),)
                for split, part in sides:
                    if not part:
                        continue
                    if split not in files:
                        shard = {"file": f"{split}_{name}.bin", "tokens": 0}
                        files[split] = (shard, stack.enter_context(aside(folder / shard["file"])), hashlib.sha256())
                    shard, file, digest = files[split]
                    ids = np.array(encode(_encoder, part) + ([] if eot is None else [eot]), dtype)
                    shard["tokens"] += len(ids)
                    file.write(ids.tobytes())
                    digest.update(ids.tobytes())
    record["splits"] = {split: shard | {"sha256": digest.hexdigest()} for split, (shard, _, digest) in files.items() if shard["tokens"]}
    for split, (shard, _, _) in files.items():
        if split not in record["splits"]:
            (folder / shard["file"]).unlink()
    _write_json(folder / "unfinished" / f"{name}.json", record)


def _write_json(path, value):
    write_aside(path, json.dumps(value))


class Hub:
    """Files of a dataset on the Hugging Face hub: listed once, at one revision, then fetched one by one, resumed and verified by its client.

    files: [(name, bytes), ...] of those that `wanted(name)`; revision: the commit they are of. Raises FileNotFoundError without network or client."""

    def __init__(self, repo, wanted, folder, revision=None):
        self.repo, self.folder = repo, Path(folder)
        info = self._ask(lambda hub: hub.HfApi().dataset_info(repo, revision=revision, files_metadata=True))
        self.revision = info.sha
        self.files = [(f.rfilename, f.size or 0) for f in sorted(info.siblings, key=lambda f: f.rfilename) if wanted(f.rfilename)]
        if not self.files:
            raise FileNotFoundError(f"{repo} on the Hugging Face hub has no such files any more: give a local copy with root=PATH")

    def fetch(self, name):
        """Local path of a file."""
        return self._ask(lambda hub: hub.hf_hub_download(self.repo, name, repo_type="dataset", revision=self.revision, local_dir=self.folder))

    def _ask(self, what):
        try:
            import huggingface_hub
            return what(huggingface_hub)
        except Exception as e:  # the hub's client has many: no network, no such proxy, no disk
            raise FileNotFoundError(f"{self.repo} could not be had from the Hugging Face hub ({type(e).__name__}): go where there is network and run this "
                                    "again, which goes on, or give a local copy with root=PATH") from None
