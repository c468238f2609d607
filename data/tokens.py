"""Text for language models as flat files of token ids, with the tokenizer that made them.

A dataset is a folder:
    train.bin, val.bin      consecutive token ids, raw uint16 (uint32 if the vocabulary is larger
                            than 65,536)
    tokenizer.tiktoken      tiktoken's rank file: one token per line, base64 bytes and rank
    meta.yaml               format, vocab_size, dtype, tokenizer, splits (file, tokens, sha256) and
                            what prepare.py adds; written last, so a folder with it is complete
A large split has `shards` instead (a list of file, tokens, sha256), read in order as one stream;
their `offset` is the length of a header in bytes.

Folders made elsewhere work as they are: nanoGPT's (train.bin, val.bin and, for characters,
meta.pkl), and shards with the header of llm.c and modded-nanogpt (*train*.bin, *val*.bin: 256
int32, starting with 20240520, 1 and the number of tokens; then uint16).

Datasets and checkpoints store a tokenizer as its state, a dict of plain types: name, pattern,
special_tokens ({text: id}) and ranks (the text of the rank file). A character-level tokenizer has
the pattern `[\\s\\S]` and a rank for each character.
"""

import base64
import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from operator import attrgetter
from pathlib import Path

import numpy as np
import tiktoken

from data import (
    InputError,
    aside,
    check_content,
    load_meta,
    read_pickle,
    remedy,
    write_aside,
    write_yaml,
)

FORMAT = "tokens-1"
ENDOFTEXT = "<|endoftext|>"
CHARACTERS = r"[\s\S]"  # the pattern of a character-level tokenizer
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# SHA-256 of GPT-2's BPE as vocab.bpe (merges.txt), and as the rank file r50k_base.tiktoken
GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_RANKS = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
HEADER = 20240520  # magic number of llm.c's token files
HEADER_32 = 20240801  # the same for 32-bit tokens
HEADER_BYTES = 1024

# How GPT-2's files spell bytes: printable ones as themselves, the others as U+0100 and up
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted(set(range(256)) - set(PRINTABLE))
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


# ---- tokenizers


class Tokenizer:
    """Text to token ids and back.

    state: what it was made from; core: the tiktoken.Encoding; n_vocab: vocabulary size, including
    special tokens; special: {text: id}; eot: the id of <|endoftext|>, or None; characters: all that
    a character-level tokenizer can encode, or None if it has all 256 bytes.
    """

    def __init__(self, state):
        self.state = state
        self.core = encoding(state)
        self.n_vocab = self.core.n_vocab
        self.special = dict(state["special_tokens"])
        self.eot = self.special.get(ENDOFTEXT)
        self.characters = None
        ranks = ranks_of(state)
        if any(bytes([byte]) not in ranks for byte in range(256)):
            self.characters = {token.decode(errors="ignore") for token in ranks}

    def encode(self, text):
        """Return a list of token ids; '<|endoftext|>' in the text is plain text."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """Return encode's ids as a uint32 array. Raises InputError for an unknown character."""
        text = replace_lone_surrogates(text)
        if self.characters is not None and not self.characters.issuperset(text):
            missing = min(set(text) - self.characters)
            name = f"the tokenizer '{self.state['name']}'"
            cure = "remove it from the text, or use a byte-level tokenizer"
            raise InputError(f"{name} does not have the character {missing!r}: {cure}")
        return self.core.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        """Return the text of token ids. Unknown ids and partial characters become U+FFFD."""
        pieces = []
        for i in map(int, ids):
            try:
                pieces.append(self.core.decode_single_token_bytes(i))
            except KeyError:
                pieces.append("\ufffd".encode())
        return b"".join(pieces).decode(errors="replace")


def replace_lone_surrogates(text):
    """Replace each half of a surrogate pair, which has no UTF-8 form, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def encoding(state):
    """Return the tiktoken.Encoding of a tokenizer state. Raises InputError for anything else."""
    try:
        return tiktoken.Encoding(
            state["name"],
            pat_str=state["pattern"],
            mergeable_ranks=ranks_of(state),
            special_tokens=dict(state["special_tokens"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        keys = "name, pattern, special_tokens, ranks"
        raise InputError(f"not a tokenizer state ({keys}): {error!r}") from None


def state_of(core):
    """Return the state of a tiktoken.Encoding."""
    ranks = rank_file(core._mergeable_ranks)
    return make_state(core.name, core._pat_str, ranks, dict(core._special_tokens))


def make_state(name, pattern, ranks, special_tokens):
    return {"name": name, "pattern": pattern, "special_tokens": special_tokens, "ranks": ranks}


def ranks_of(state):
    """Return {token bytes: rank}."""
    ranks = {}
    for line in state["ranks"].splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    return ranks


def rank_file(ranks):
    """Return the text of tiktoken's rank file for {token bytes: rank}."""
    lines = []
    for token in sorted(ranks, key=ranks.get):
        lines.append(f"{base64.b64encode(token).decode()} {ranks[token]}\n")
    return "".join(lines)


# ---- character-level tokenizers


def character_state(text, name="characters"):
    """Return a tokenizer state: the characters of `text` in code point order, then end-of-text."""
    characters = sorted(set(text))
    ranks = {character.encode(): i for i, character in enumerate(characters)}
    return make_state(name, CHARACTERS, rank_file(ranks), {ENDOFTEXT: len(characters)})


def nanogpt_characters(path):
    """Return the tokenizer state of nanoGPT's meta.pkl. Raises InputError."""
    pickled = read_pickle(path)
    ids = pickled.get("stoi") if isinstance(pickled, dict) else None
    if not isinstance(ids, dict) or set(ids.values()) != set(range(len(ids))):
        raise InputError(f"{path} is not nanoGPT's meta.pkl: make the dataset again")
    for character in ids:
        if not isinstance(character, str) or len(character) != 1:
            cure = "make the dataset again"
            raise InputError(f"{path} has {character!r}, which is not a character: {cure}")
    ranks = {character.encode(): i for character, i in ids.items()}
    return make_state("characters", CHARACTERS, rank_file(ranks), {})


# ---- byte-level BPE


def gpt2_encoding(bpe=""):
    """Return GPT-2's byte-level BPE as a tiktoken.Encoding.

    From the file `bpe` (vocab.bpe, merges.txt or r50k_base.tiktoken, checksum verified), else from
    tiktoken's cache, else from the network.
    """
    if bpe:
        return encoding(_gpt2_state(Path(bpe)))
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network; a download with a wrong checksum
        cure = "run once with network access, point TIKTOKEN_CACHE_DIR to a cache copied from "
        cure += "another machine, or give its vocab.bpe with bpe=FILE"
        problem = f"neither in tiktoken's cache nor reachable ({type(error).__name__})"
        raise InputError(f"GPT-2's BPE is {problem}: {cure}") from None


def _gpt2_state(path):
    raw = check_content(path).read_bytes()
    text = raw.replace(b"\r\n", b"\n").rstrip(b"\n") + b"\n"  # undo what editors do to line ends
    digests = {hashlib.sha256(raw).hexdigest(), hashlib.sha256(text).hexdigest()}
    if GPT2_RANKS in digests:
        ranks = text.decode()
    elif GPT2_MERGES in digests:
        ranks = ranks_of_merges(text.decode())
    else:
        problem = "its SHA-256 matches neither vocab.bpe (merges.txt) nor r50k_base.tiktoken"
        raise InputError(f"{path} is not GPT-2's BPE: {problem}; fetch it again")
    return make_state("gpt2", GPT2_PATTERN, ranks, {ENDOFTEXT: ranks.count("\n")})


def ranks_of_merges(text):
    """Turn the text of vocab.bpe (merges.txt) into a rank file: 256 bytes, then the merges."""
    tokens = [bytes([byte]) for byte in BYTE_OF.values()]
    for line in text.split("\n"):
        if line and not line.startswith("#version"):
            tokens.append(bytes_of(line.replace(" ", "")))
    return rank_file(dict(zip(tokens, range(len(tokens)))))


def bytes_of(spelled):
    """Return a token's bytes from the spelling in GPT-2's files. Raises KeyError for any other."""
    return bytes(BYTE_OF[character] for character in spelled)


def learn_bpe(texts, vocab_size, name):
    """Learn a byte-level BPE from a list of texts, with <|endoftext|> last; return its state."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size - 1, show_progress=False, length=len(texts))
    vocabulary = bpe.get_vocab()
    if len(vocabulary) < vocab_size - 1:
        sizes = f"only {len(vocabulary) + 1} tokens, not vocab_size={vocab_size}"
        raise InputError(f"the text yields {sizes}: give a smaller vocab_size or more text")
    ranks = rank_file({bytes_of(spelled): rank for spelled, rank in vocabulary.items()})
    return make_state(name, GPT2_PATTERN, ranks, {ENDOFTEXT: len(vocabulary)})


# ---- writing


class TokenFile:
    """A token file written through `aside`, with its number of tokens and checksum so far."""

    def __init__(self, file, name, vocab_size):
        self.file = file
        self.name = name
        self.dtype = np.dtype(dtype_of(vocab_size)).newbyteorder("<")
        self.tokens = 0
        self.digest = hashlib.sha256()

    def write(self, ids):
        block = np.asarray(ids).astype(self.dtype).tobytes()
        self.file.write(block)
        self.digest.update(block)
        self.tokens += len(ids)

    def entry(self):
        """Return its entry in meta.yaml."""
        return {"file": self.name, "tokens": self.tokens, "sha256": self.digest.hexdigest()}


def dtype_of(vocab_size):
    return "uint16" if vocab_size <= 65536 else "uint32"


def write_dataset(folder, splits, tokenizer, **meta):
    """Write a dataset from streams of ids and return its meta; removes an older meta.yaml first.

    splits: {"train": iterable of 1-D arrays (or lists) of ids, "val": ...}; tokenizer: a state;
    meta: more keys for meta.yaml, plain types.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").unlink(missing_ok=True)
    vocab_size = encoding(tokenizer).n_vocab
    entries = {}
    for split, arrays in splits.items():
        path = folder / f"{split}.bin"
        with aside(path) as file:
            writer = TokenFile(file, path.name, vocab_size)
            for ids in map(np.asarray, arrays):
                if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                    span = f"{ids.min()} to {ids.max()}"
                    raise InputError(f"{path}: ids {span} do not fit {vocab_size} tokens")
                writer.write(ids)
            if not writer.tokens:
                cure = "give it more text or a larger share"
                raise InputError(f"{path}: the {split} split got no tokens; {cure}")
        entries[split] = writer.entry()
    return write_meta(folder, entries, tokenizer, **meta)


def write_meta(folder, splits, tokenizer, **meta):
    """Write meta.yaml and the tokenizer next to finished token files; return the meta.

    splits: as in meta.yaml.
    """
    folder = Path(folder)
    vocab_size = encoding(tokenizer).n_vocab
    description = {**tokenizer, "file": "tokenizer.tiktoken"}
    write_aside(folder / "tokenizer.tiktoken", description.pop("ranks"))
    meta = {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "dtype": dtype_of(vocab_size),
        "tokenizer": description,
        "splits": splits,
        **meta,
    }
    write_yaml(folder / "meta.yaml", meta)
    return meta


# ---- reading


def read_meta(folder):
    """Return meta.yaml of a dataset, or its equal for one made elsewhere. Raises InputError."""
    folder = Path(folder)
    if not (folder / "meta.yaml").is_file():
        meta = _foreign_meta(folder)
        if meta:
            return meta
    keys = ("vocab_size", "dtype", "tokenizer", "splits")
    return load_meta(folder, "token dataset", FORMAT, keys)


def tokenizer_state(folder):
    """Return the state of a dataset's tokenizer. Raises InputError if it is missing."""
    folder = Path(folder)
    state = dict(read_meta(folder)["tokenizer"])
    file = state.pop("file")
    if file is False:
        return _foreign_tokenizer(folder)
    path = check_content(folder / file)
    try:
        state["ranks"] = path.read_text(encoding="ascii")
        is_valid = bool(ranks_of(state))
    except ValueError:
        is_valid = False
    if not is_valid:
        raise InputError(f"{path} is damaged, or not a rank file of tiktoken{remedy(folder)}")
    return state


class Tokens:
    """One split of a dataset. Raises InputError if a file is missing or has the wrong length.

    path: the .bin file, or the folder of a split in shards; tokens: (N,) a read-only np.memmap, or
    a Stream of several.
    """

    def __init__(self, folder, split):
        self.path = self.folder = Path(folder)
        self.meta = read_meta(folder)
        self.vocab_size = self.meta["vocab_size"]
        splits = self.meta["splits"]
        if split not in splits:
            raise InputError(f"{folder} has no split '{split}', only {', '.join(splits)}")
        parts = list(map(self._open, splits[split].get("shards", [splits[split]])))
        self.tokens = Stream(parts)
        if len(parts) == 1:
            self.path = Path(parts[0].filename)
            self.tokens = parts[0]

    def _open(self, shard):
        path = check_content(self.folder / shard["file"])
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        offset = shard.get("offset", 0)
        size = path.stat().st_size
        expected = offset + shard["tokens"] * dtype.itemsize
        if size != expected or not size:
            problem = f"is {size:,} bytes long, not {expected:,} as expected"
            raise InputError(f"{path} {problem}{remedy(self.folder)}")
        return np.memmap(path, dtype, mode="r", offset=offset)

    def __len__(self):
        return len(self.tokens)

    def windows(self, starts, length):
        """Return `length` tokens from each start: (len(starts), length) int64."""
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and not 0 <= starts.min() <= starts.max() <= len(self) - length:
            span = f"windows of {length} tokens that start at {starts.min()} to {starts.max()}"
            raise InputError(f"{self.path}: {span} exceed its {len(self)} tokens")
        ids = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(ids, starts):
            row[:] = self.tokens[start : start + length]
        if ids.size and ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            token = f"token id {ids[row, column]} at offset {starts[row] + column}"
            cure = remedy(self.folder, " overwrite=True")
            vocabulary = f"the vocabulary of {self.vocab_size} tokens"
            raise InputError(f"{self.path}: {token} is outside {vocabulary}{cure}")
        return ids


def split_ids(folder, split, tokenizer):
    """Return a split's text as ids (N,) int64 of `tokenizer`, re-encoded if its ids differ."""
    tokens = Tokens(folder, split)
    ids = tokens.windows([0], len(tokens))[0]
    state = tokenizer_state(folder)
    if state["ranks"] == tokenizer.state["ranks"]:
        return ids
    end = [] if tokenizer.eot is None else [tokenizer.eot]
    ids_of_texts = []
    for text in Tokenizer(state).decode(ids).removesuffix(ENDOFTEXT).split(ENDOFTEXT):
        ids_of_texts += tokenizer.encode(text) + end
    return np.array(ids_of_texts, np.int64)


class Stream:
    """Several arrays that read as one: len, slices (step 1), conversion to one array."""

    def __init__(self, parts):
        self.parts = parts
        lengths = list(map(len, parts))
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths

    def __len__(self):
        return int(self.ends[-1])

    def __array__(self, dtype=None, copy=None):
        return np.concatenate(self.parts).astype(dtype or self.parts[0].dtype, copy=False)

    def __getitem__(self, index):
        start, stop, _ = index.indices(len(self))
        pieces = [self.parts[0][:0]]
        for part, begin, end in zip(self.parts, self.begins, self.ends):
            if begin < stop and start < end:
                pieces.append(part[max(start - begin, 0) : stop - begin])
        return np.concatenate(pieces)


def complete(folder):
    """Return whether a dataset is complete: all files exist and are as long as meta.yaml says."""
    try:
        for split in read_meta(folder)["splits"]:
            Tokens(folder, split)
        tokenizer_state(folder)
    except (InputError, OSError):
        return False
    return True


# ---- folders made elsewhere


def _foreign_meta(folder):
    """Return the meta.yaml that nanoGPT's or llm.c's token files lack; None for other folders."""
    if (folder / "unfinished").is_dir() or (folder / "tokenizer.tiktoken").exists():
        return None  # one of ours, unfinished
    for prepare in (folder / "prepare.py", folder.parent / "prepare.py"):
        if prepare.is_file() and "\nEMBEDDED = " in prepare.read_text(errors="replace"):
            return None
    splits = find_token_files(folder)
    if not {"train", "val"} <= splits.keys():
        return None
    vocab_size = 50257
    if (folder / "meta.pkl").is_file():
        vocab_size = len(ranks_of(nanogpt_characters(folder / "meta.pkl")))
    return {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "dtype": "uint16",
        "source": f"{folder.name}, made elsewhere",
        "tokenizer": {"file": False},
        "splits": splits,
    }


def find_token_files(folder):
    """Return the splits, as in meta.yaml, of token files without one.

    Those are train.bin and val.bin, with or without llm.c's header, or *train*.bin and *val*.bin
    with it.
    """
    splits = {}
    for split in ("train", "val"):
        bare = folder / f"{split}.bin"
        paths = [bare] if bare.is_file() else sorted(folder.glob(f"*{split}*.bin"))
        shards = list(filter(None, map(_read_header, paths)))
        if bare.is_file() and not shards:
            ids = np.fromfile(bare, "<u2", 8192)
            if ids[::2].any() and len(ids) > 1 and not ids[1::2].any():
                raise InputError(f"{bare} holds 32-bit numbers: write its tokens as uint16")
            shards = [{"file": bare.name, "tokens": bare.stat().st_size // 2}]
        if shards:
            n_tokens = sum(shard["tokens"] for shard in shards)
            splits[split] = {"tokens": n_tokens, "shards": shards}
    return splits


def _read_header(path):
    """Return the entry in meta.yaml of a token file with llm.c's header; None for other files."""
    head = np.fromfile(path, "<i4", 256)
    if len(head) < 256 or head[0] not in (HEADER, HEADER_32):
        return None
    if head[0] == HEADER_32 or head[1] != 1:
        version = f"version {head[1]} of llm.c's format, which holds Llama's tokens or is newer"
        raise InputError(f"{path} has {version}: write GPT-2's tokens as uint16, version 1")
    return {"file": path.name, "tokens": int(head[2]), "offset": HEADER_BYTES}


def _foreign_tokenizer(folder):
    if (folder / "meta.pkl").is_file():
        return nanogpt_characters(folder / "meta.pkl")
    for name in ("vocab.bpe", "merges.txt", "r50k_base.tiktoken", "gpt2.tiktoken"):
        if (folder / name).is_file():
            return state_of(gpt2_encoding(folder / name))
    try:
        return state_of(gpt2_encoding())
    except InputError:
        problem = "neither in tiktoken's cache nor reachable"
        cure = "put its vocab.bpe into the folder, or run once with network access"
        raise InputError(f"{folder} has GPT-2's tokens, whose BPE is {problem}: {cure}") from None


# ---- documents

ENDINGS = {
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".ndjson"),
    "text": (".txt", ".text", ".md"),
}


def kind_of(path):
    """Return 'parquet', 'jsonl' or 'text' by the file's ending, ignoring .gz; else ''."""
    name = str(path).lower().removesuffix(".gz")
    for kind, endings in ENDINGS.items():
        if name.endswith(endings):
            return kind
    return ""


def find_documents(root, pattern=""):
    """Return sorted files of documents: root itself, or those under it that match a glob.

    Without a pattern: parquet files, else JSONL, else text. Ignores hidden files. Raises InputError
    if none are left.
    """
    root = Path(root)
    if root.name.lower().endswith(".json") and root.is_file():
        cure = "write one object per line to a .jsonl, or name it .txt to train on it as it is"
        raise InputError(f"root={root} may be JSON or text: {cure}")
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise InputError(f"root={root} does not exist: give a file of text, or a folder of them")
    files = defaultdict(list)
    for path in sorted(root.rglob(pattern or "*")):
        is_hidden = "/." in f"/{path.relative_to(root)}"
        if not path.is_dir() and not is_hidden:
            files["any" if pattern else kind_of(path)].append(path)
    for kind in ("any", *ENDINGS):
        if files[kind]:
            return files[kind]
    wanted = pattern or ".parquet, .jsonl, .txt or .md"
    cure = "give another root=, or a pattern for your files with files="
    raise InputError(f"root={root} holds no {wanted} files: {cure}")


def documents(path, start=0, stop=None, column="text"):
    """Yield the texts of a file in order, None for null.

    start, stop: row groups of a parquet file; bytes in which a line of JSONL begins.
    """
    if kind_of(path) == "parquet":
        yield from _parquet_texts(path, start, stop, column)
        return
    open_file = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_file(check_content(path), "rb") as file:
            if kind_of(path) == "jsonl":
                yield from _json_texts(path, file, start, stop, column)
            else:
                yield decode_text(path, file.read())
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError(f"{path} is not a complete gzip file: fetch it again") from None


def decode_text(path, raw):
    """Decode a file's bytes as UTF-8, without a byte order mark. Raises InputError."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problem = f"is not UTF-8 text (byte {error.start}, line {line})"
        raise InputError(f"{path} {problem}: convert it to UTF-8, or leave it out") from None


def _json_texts(path, file, start, stop, column):
    if start:  # a line that begins earlier belongs to the previous piece
        file.seek(start - 1)
        file.readline()
    while stop is None or file.tell() < stop:
        at = file.tell()
        line = file.readline()
        if not line:
            return
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
            problem = f"has no text in '{column}': give column="
        except (KeyError, TypeError):
            text = 0
            problem = f"has no '{column}': give column="
        except (ValueError, RecursionError):
            text = 0
            problem = f"is not JSON in UTF-8: write one object per line, with text in '{column}'"
        if not isinstance(text, str | None):
            excerpt = line[:60].decode(errors="replace").strip()
            raise InputError(f"{path}: the line at byte {at} ({excerpt}) {problem}")
        yield text


def _parquet_texts(path, start, stop, column):
    file = _open_parquet(path, column)
    groups = range(file.num_row_groups)[start:stop]
    for batch in file.iter_batches(1000, row_groups=list(groups), columns=[column]):
        yield from batch.column(0).to_pylist()


def _open_parquet(path, column):
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(check_content(path))
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:100]
        problem = f"is not a complete parquet file ({reason})"
        raise InputError(f"{path} {problem}: fetch it again") from None
    columns = {field.name: str(field.type) for field in file.schema_arrow}
    if "string" not in columns.get(column, ""):
        raise InputError(f"{path} has no text column '{column}', only {columns}: give column=")
    return file


def _group_bytes(path, column):
    """Return the bytes of text in each row group of a parquet file."""
    file = _open_parquet(path, column)
    number = file.schema_arrow.names.index(column)
    groups = range(file.num_row_groups)
    return [file.metadata.row_group(i).column(number).total_uncompressed_size for i in groups]


# ---- from any number of documents to shards


@dataclass
class Source:
    """Files that are fetched and tokenised together."""

    files: list  # paths, or names on the hub
    bytes: int  # approximate size of their text


@dataclass
class Plan:
    """How documents become shards; with sources and tokenizer it settles what the shards hold."""

    column: str = "text"  # of JSONL and parquet files
    val_fraction: float = 0.0005  # of documents, by a hash of their text: no text on both sides
    tail: bool = False  # validate on the end of each document instead, for a few long ones
    shard_bytes: int = 450_000_000  # text per shard


def group_files(files, plan):
    """Group local files into Sources: text files up to shard_bytes, others one by one."""
    sources = []
    room = 0
    for path in files:
        size = check_content(path).stat().st_size
        is_text = kind_of(path) in ("text", "")
        if kind_of(path) == "parquet":
            size = sum(_group_bytes(path, plan.column))  # refuses a wrong column= before any work
        elif str(path).endswith(".gz"):
            size *= 3
        if is_text and sources and size <= room:
            sources[-1].files.append(str(path))
            sources[-1].bytes += size
            room -= size
        else:
            sources.append(Source([str(path)], size))
            room = plan.shard_bytes - size if is_text else 0
    return sources


def write_shards(folder, sources, tokenizer, plan, hub=None, workers=0, overwrite=False, **meta):
    """Make a dataset of documents, each followed by end-of-text, and return its meta.

    Every piece of text gives a train and a val shard, in parallel. After a kill the same call
    resumes with the unfinished pieces; the result depends on neither kills nor workers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is being made by another job: wait for it") from None
        plan_hash = hashlib.sha256(repr([sources, plan, tokenizer]).encode()).hexdigest()
        work = _begin(folder, plan_hash, overwrite)
        _check_disk(folder, sources, tokenizer, hub)
        _tokenise_all(folder, sources, tokenizer, plan, hub, workers or os.cpu_count())
        splits, counts = _collect(work)
        for split, entry in splits.items():
            if not entry["tokens"]:
                cure = "give more text, or another val_fraction="
                raise InputError(f"{folder}: the {split} split got no tokens: {cure}")
        meta = write_meta(folder, splits, tokenizer, **counts, **meta)
        shutil.rmtree(work)
    for name, n in counts.items():
        print(f"{folder}: {n:,} {name.replace('_', ' ')}")
    for split, entry in splits.items():
        print(f"{folder}: {split} {entry['tokens']:,} tokens in {len(entry['shards'])} shards")
    return meta


def write_corpus(folder, config, repo, pattern, n_tokens, **meta):
    """Write the shards of a corpus in GPT-2's BPE, from the hub or a local copy.

    config: root, files, keep, bpe, shard_mb, val_fraction, workers, overwrite.
    """
    plan = Plan(val_fraction=config.val_fraction, shard_bytes=config.shard_mb * 1_000_000)
    state = state_of(gpt2_encoding(config.bpe))
    hub = None
    meta["source"] = "local copy"
    if config.root:
        sources = group_files(find_documents(config.root)[: config.files or None], plan)
    else:
        hub = Hub(repo, [pattern], folder / "download", config.keep)
        meta["source"] = f"{repo} {pattern} {hub.revision}"
        sources = hub.sources(n_tokens, config.files)
    return write_shards(folder, sources, state, plan, hub, config.workers, config.overwrite, **meta)


def _begin(folder, plan_hash, overwrite):
    """Return the folder that records finished pieces: new, or as an earlier call left it."""
    work = folder / "unfinished"
    plan_file = work / "plan"
    is_ours = work.is_dir() or (folder / "meta.yaml").is_file()
    if not overwrite and not is_ours and any(folder.glob("*.bin")):
        cure = "give another out_dir=, or overwrite=True to replace them"
        raise InputError(f"{folder} holds token files that were made elsewhere: {cure}")
    if overwrite or not plan_file.is_file():
        (folder / "meta.yaml").unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        for old in (*folder.glob("train*.bin*"), *folder.glob("val*.bin*")):
            old.unlink()
        work.mkdir()
        write_aside(plan_file, plan_hash)
    elif plan_file.read_text() != plan_hash:
        cure = "give the same ones to resume, or overwrite=True to start over"
        raise InputError(f"{folder} was begun with other files or other options: {cure}")
    for leftover in folder.glob("*.tmp-*"):  # from a kill
        leftover.unlink()
    return work


def _check_disk(folder, sources, tokenizer, hub):
    """Print how much disk space the shards need. Raises InputError if there is too little."""
    tokenizer = Tokenizer(tokenizer)
    n_bytes = sum(source.bytes for source in sources)
    n_tokens = n_bytes / (4.5 if tokenizer.characters is None else 1)  # of English in GPT-2's BPE
    written = sum(path.stat().st_size for path in folder.glob("*.bin"))
    need = max(0, n_tokens * np.dtype(dtype_of(tokenizer.n_vocab)).itemsize - written)
    if hub:
        need += hub.bytes_on_disk()
    free = shutil.disk_usage(folder).free
    estimate = f"{folder}: {n_bytes / 1e9:.3g} GB of text need about {need / 1e9:.3g} GB of disk"
    estimate += f", {free / 1e9:.3g} GB are free"
    print(estimate, flush=True)
    if need > free:
        raise InputError(f"{estimate}: make room, or give another out_dir=")


def _tokenise_all(folder, sources, tokenizer, plan, hub, workers):
    """Tokenise every unfinished piece of every source, while later sources are fetched."""
    from tqdm import tqdm

    if workers > 1:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    else:
        pool = ThreadPoolExecutor(1)
    bar = tqdm(total=sum(source.bytes for source in sources), unit="B", unit_scale=True)
    work = folder / "unfinished"
    pending = deque()  # the arguments of _finish for each source at work
    try:
        for number, source in enumerate(sources):
            record = work / f"source-{number:05d}"
            if record.is_file():
                bar.update(source.bytes)
                continue
            files = [hub.fetch(name) for name in source.files] if hub else source.files
            jobs = []
            for i, piece in enumerate(cut(files, plan)):
                name = f"{number:05d}-{i:05d}"
                if not (work / f"{name}.json").is_file():
                    jobs.append(pool.submit(_tokenise, folder, name, piece, plan, tokenizer))
            used_up = [] if hub is None or hub.keep else files
            pending.append((jobs, record, used_up, source.bytes))
            while sum(len(jobs) for jobs, *_ in pending) > 2 * workers:
                _finish(*pending.popleft(), bar)
        while pending:
            _finish(*pending.popleft(), bar)
    except BrokenProcessPool:
        cure = "run the same line again with a smaller workers= to resume"
        problem = "a worker was killed, perhaps for lack of memory"
        raise InputError(f"{folder}: {problem}: {cure}") from None
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def _finish(jobs, record, used_up, n_bytes, bar):
    """Wait for the pieces of a source, write its record, remove its files."""
    for job in jobs:
        job.result()
        bar.update(n_bytes / len(jobs))
    write_aside(record, "done")
    for path in used_up:
        Path(path).unlink(missing_ok=True)


def cut(files, plan):
    """Cut files into pieces of about shard_bytes: [[(path, start, stop), ...], ...]."""
    path = files[0]
    if kind_of(path) == "jsonl" and not str(path).endswith(".gz"):
        size = Path(path).stat().st_size
        starts = range(0, size, plan.shard_bytes)
        return [[(path, start, min(size, start + plan.shard_bytes))] for start in starts]
    if kind_of(path) != "parquet":
        return [[(path, 0, None) for path in files]]
    pieces = []
    start = size = 0
    for group, n_bytes in enumerate(_group_bytes(path, plan.column), 1):
        size += n_bytes
        if size >= plan.shard_bytes:
            pieces.append([(path, start, group)])
            start, size = group, 0
    return pieces + [[(path, start, None)]] if size else pieces


def _tokenise(folder, name, piece, plan, tokenizer):
    """Write the shards of a piece of text, then its record: a piece with a record is done."""
    tokenizer = Tokenizer(tokenizer)
    end = [] if tokenizer.eot is None else [tokenizer.eot]
    counts = Counter()
    shards = {}
    with ExitStack() as stack:
        for split in ("train", "val"):
            path = folder / f"{split}_{name}.bin"
            file = stack.enter_context(aside(path))
            shards[split] = TokenFile(file, path.name, tokenizer.n_vocab)
        for path, start, stop in piece:
            for document in documents(path, start, stop, plan.column):
                if not document:
                    counts["documents_left_out_as_null_or_empty"] += 1
                    continue
                text = replace_lone_surrogates(document)
                counts["documents"] += 1
                counts["characters"] += len(text)
                counts["documents_with_half_a_character_replaced"] += text != document
                for split, part in _sides(text, plan):
                    if part:
                        shards[split].write(tokenizer.encode_array(part))
                        shards[split].write(end)
    splits = {}
    for split, shard in shards.items():
        if shard.tokens:
            splits[split] = shard.entry()
        else:
            (folder / shard.name).unlink()
    record = {"counts": counts, "splits": splits}
    write_aside(folder / "unfinished" / f"{name}.json", json.dumps(record))


def _sides(text, plan):
    """Split a document: [(split, its part of the text), ...]."""
    if plan.tail:
        middle = int(len(text) * (1 - plan.val_fraction))
        middle = text.rfind("\n", 0, middle) + 1 or middle  # after a line, if there is one
        return [("train", text[:middle]), ("val", text[middle:])]
    digest = hashlib.sha256(text.encode()).digest()
    number = int.from_bytes(digest[:8], "big") / 2**64  # in 0..1
    return [("val" if number < plan.val_fraction else "train", text)]


def _collect(work):
    """Return (splits as in meta.yaml, counts) from the records of all pieces."""
    splits = {"train": {"tokens": 0, "shards": []}, "val": {"tokens": 0, "shards": []}}
    counts = Counter()
    for path in sorted(work.glob("*.json")):
        record = json.loads(path.read_text())
        counts.update(record["counts"])
        for split, shard in record["splits"].items():
            splits[split]["tokens"] += shard["tokens"]
            splits[split]["shards"].append(shard)
    return splits, dict(+counts)  # those above 0


class Hub:
    """Files of a dataset on the Hugging Face hub, listed once, at one revision (commit).

    files: {name: bytes} of those that match one of `patterns`; keep: keep them once tokenised.
    """

    def __init__(self, repo, patterns, folder, keep=False):
        self.repo = repo
        self.folder = Path(folder)
        self.keep = keep
        info = self._ask("dataset_info", files_metadata=True)
        self.revision = info.sha
        self.files = {}
        for file in sorted(info.siblings, key=attrgetter("rfilename")):
            if any(fnmatch(file.rfilename, pattern) for pattern in patterns):
                self.files[file.rfilename] = file.size or 0
        if not self.files:
            raise InputError(f"{repo} on the hub has no {', '.join(patterns)}: give root=PATH")

    def sources(self, tokens, n_files=0):
        """Return Sources for the first n_files (0: all); tokens: the total over all files."""
        text_bytes = round(4.5 * tokens / len(self.files))
        names = list(self.files)[: n_files or None]
        return [Source([name], text_bytes) for name in names]

    def bytes_on_disk(self):
        """Return the bytes of all files if they are kept, else of the few at work."""
        sizes = self.files.values()
        return sum(sizes) if self.keep else 3 * max(sizes)

    def fetch(self, name):
        """Download a file and return its local path."""
        options = {"filename": name, "revision": self.revision, "local_dir": self.folder}
        return self._ask("hf_hub_download", repo_type="dataset", **options)

    def _ask(self, method, **options):
        from huggingface_hub import HfApi

        try:
            return getattr(HfApi(), method)(self.repo, **options)
        except Exception as error:  # the client raises many: no network, no disk space
            cure = "run it again with network access to resume, or give a copy with root=PATH"
            problem = f"could not be fetched from the Hugging Face hub ({type(error).__name__})"
            raise InputError(f"{self.repo} {problem}: {cure}") from None
