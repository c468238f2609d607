"""data/tokens.py: token files and tokenizers; damage ends in a sentence."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import tokenizers
from helpers import byte_tokenizer, input_error

from data import InputError
from data import tokens as T
from data.tokens import Stream, Tokenizer, Tokens, complete, tokenizer_state, write_dataset

BYTES = {**T.state_of(byte_tokenizer()), "pattern": T.GPT2_PATTERN}  # a BPE without merges
WORDS = ["neuron", "cortex", "sheet", "place", "token", "layer", "signal", "window", "meaning"]
ODD = "They're 12.5 %  of\n\n    us;\t don't\r\n naïve Ωmega 脳 🧠 <|endoftext|> \x00"


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = " ".join(rng.choice(WORDS, rng.integers(5, 60)))
        rows.append(f"{i} {words}" + (" naïve 脳\n" if i % 3 else ""))
    return rows


# ---- our own folders


@pytest.fixture
def dataset(tmp_path):
    """A folder with a prepare.py, as in data/NAME: 100 tokens of a vocabulary of 6."""
    (tmp_path / "prepare.py").touch()
    ids = np.arange(100) % 5
    splits = {"train": [ids[:60], ids[60:90]], "val": [list(ids[90:])]}
    write_dataset(tmp_path, splits, T.character_state("abcde"), source="made up", synthetic=True)
    return tmp_path


def test_what_is_written_is_read(dataset, tmp_path):
    train = Tokens(dataset, "train")
    val = Tokens(dataset, "val")
    assert (len(train), len(val), train.vocab_size) == (90, 10, 6)
    assert np.array_equal(np.concatenate([train.tokens, val.tokens]), np.arange(100) % 5)
    windows = train.windows([0, 7, 82], 8)
    assert windows.dtype == np.int64
    assert np.array_equal(windows, (np.array([[0], [7], [82]]) + np.arange(8)) % 5)
    entry = train.meta["splits"]["train"]
    assert entry["sha256"] == hashlib.sha256((dataset / "train.bin").read_bytes()).hexdigest()
    assert train.meta["source"] == "made up" and complete(dataset)
    assert not list(dataset.glob("*.tmp*"))
    state = T.make_state("large", T.CHARACTERS, "YQ== 0\n", {T.ENDOFTEXT: 70_000})
    write_dataset(tmp_path / "large", {"train": [[0, 70_000]]}, state)  # takes four bytes
    assert T.read_meta(tmp_path / "large")["dtype"] == "uint32"
    assert Tokens(tmp_path / "large", "train").windows([0], 2).tolist() == [[0, 70_000]]


def test_a_text_in_the_ids_of_another_tokenizer(tmp_path):
    tokenizer = Tokenizer(BYTES)
    for other in (tokenizer, Tokenizer(T.learn_bpe(texts(40), 300, "bpe"))):
        ids = [[*other.encode(text), other.eot] for text in texts(3)]
        write_dataset(tmp_path / other.state["name"], {"val": ids}, other.state)
    expected = T.split_ids(tmp_path / "bytes", "val", tokenizer)
    assert np.array_equal(expected, Tokens(tmp_path / "bytes", "val").tokens)
    assert len(Tokens(tmp_path / "bpe", "val")) < len(expected)
    assert np.array_equal(T.split_ids(tmp_path / "bpe", "val", tokenizer), expected)


@pytest.mark.parametrize(
    "file, content, sentence",
    [
        ("train.bin", b"", "train.bin is 0 bytes long, .*; make it with: python .*prepare.py"),
        ("train.bin", bytes(100), "train.bin is 100 bytes long, not 180 as expected; make it"),
        ("train.bin", None, "train.bin is missing; make it with"),
        ("tokenizer.tiktoken", None, "tokenizer.tiktoken is missing; make it with"),
        ("tokenizer.tiktoken", b"", "tokenizer.tiktoken is damaged, or not a"),
        ("tokenizer.tiktoken", b"\x80\xff a\n", "tokenizer.tiktoken is damaged, or not a"),
        ("meta.yaml", None, r"no finished token dataset \(no meta.yaml\); make it with"),
        ("meta.yaml", b"format: tokens-9\n", "has the format 'tokens-9'"),
        ("meta.yaml", b"format: [tokens-1\n", "meta.yaml is not YAML"),
        ("meta.yaml", b"format: tokens-1\nvocab_size: 6\n", "lacks the key 'dtype'"),
        ("val.bin", b"version https://git-lfs.github.com/spec/v1\n", "a pointer whose content"),
    ],
)
def test_damage_is_named(dataset, file, content, sentence):
    (dataset / file).unlink()
    if content is not None:
        (dataset / file).write_bytes(content)
    assert not complete(dataset)
    with pytest.raises(InputError, match=sentence):
        Tokens(dataset, "train")
        Tokens(dataset, "val")
        tokenizer_state(dataset)


def test_ids_and_windows_are_checked(dataset):
    ids = np.memmap(dataset / "train.bin", "<u2", mode="r+")
    ids[41] = 6
    ids.flush()
    train = Tokens(dataset, "train")
    assert train.windows([0, 42], 41).shape == (2, 41)
    input_error("train.bin: token id 6 at offset 41 .*overwrite=True", train.windows, [0, 40], 10)
    for start in (-1, 81):
        input_error("exceed its 90 tokens", train.windows, [start], 10)
    input_error("no split 'test', only train, val", Tokens, dataset, "test")


def test_nothing_half_written_counts(tmp_path):
    def dies():
        yield [0, 1]
        raise RuntimeError("the machine went down")

    ab = T.character_state("ab")
    with pytest.raises(RuntimeError):
        write_dataset(tmp_path, {"train": dies()}, ab)
    assert list(tmp_path.iterdir()) == []
    input_error("do not fit", write_dataset, tmp_path, {"train": [[0, 3]]}, ab)
    with pytest.raises(InputError, match="the val split got no tokens"):
        write_dataset(tmp_path, {"train": [[0]], "val": []}, ab)
    assert not complete(tmp_path)


def test_a_stream_is_its_parts_in_one_array():
    stream = Stream([np.arange(0, 5), np.arange(5, 6), np.arange(6, 20)])
    whole = np.arange(20)
    assert len(stream) == 20 and np.array_equal(stream, whole)
    for start, stop in ((0, 20), (3, 9), (5, 6), (7, 7), (12, 3), (-4, None), (6, 100)):
        piece = slice(start, stop)
        assert np.array_equal(stream[piece], whole[piece]), piece


# ---- tokenizers


def test_a_tokenizer_travels_as_plain_text(dataset):
    tokenizer = Tokenizer(tokenizer_state(dataset))
    assert tokenizer.encode("badcab") == [1, 0, 3, 2, 0, 1] and tokenizer.n_vocab == 6
    assert tokenizer.decode([1, 0, 3]) == "bad" and tokenizer.eot == 5
    assert T.state_of(tokenizer.core) == tokenizer.state == tokenizer_state(dataset)
    input_error("'characters' does not have the character 'é'", tokenizer.encode, "abé")
    for state in ({"name": "torn"}, {**tokenizer.state, "ranks": "no base64\n"}, None):
        input_error("not a tokenizer state", Tokenizer, state)


def test_any_text_makes_the_round_trip():
    tokenizer = Tokenizer(BYTES)
    for text in (ODD, "", "\ufeff\u2028\x85"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == list(text.encode())  # <|endoftext|> is plain text, too
    half = "an \ud83d emoji"
    assert tokenizer.decode(tokenizer.encode(half)) == "an \ufffd emoji"
    assert tokenizer.decode([97, 200, 98, 256, 999]) == "a\ufffdb<|endoftext|>\ufffd"
    input_error(
        "not have the character '\ufffd'", Tokenizer(T.character_state("abc")).encode, "a\ud83d"
    )


def test_a_learned_bpe_encodes_as_tokenizers_does():
    corpus = texts(60)
    state = T.learn_bpe(corpus, 300, "small")
    assert state == T.learn_bpe(corpus, 300, "small")
    tokenizer = Tokenizer(state)
    assert tokenizer.n_vocab == 300 and tokenizer.eot == 299
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(corpus, 299, show_progress=False)
    rng = np.random.default_rng(0)
    points = [range(32, 127), rng.integers(128, 0xD800, 500), rng.integers(0xE000, 0x110000, 500)]
    anything = "".join(map(chr, rng.permutation(np.concatenate(points))))
    for text in (*texts(9, seed=1), ODD, anything, ""):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text).ids and tokenizer.decode(ids) == text
    input_error("yields .* tokens, not vocab_size=9999", T.learn_bpe, corpus, 9999, "large")


def small_merges():
    """A BPE of tokenizers, trained, and its merges as in vocab.bpe."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts(40), vocab_size=330, show_progress=False)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    return bpe, "\n".join(lines) + "\n"


def test_gpt2s_bpe_from_a_file(tmp_path, monkeypatch):
    bpe, merges = small_merges()
    ranks = T.ranks_of_merges(merges)
    contents = {"vocab.bpe": ("GPT2_MERGES", merges), "r50k_base.tiktoken": ("GPT2_RANKS", ranks)}
    for name, (constant, content) in contents.items():
        path = tmp_path / name
        path.write_text(content)
        input_error("is not GPT-2's BPE: its SHA-256", T.gpt2_encoding, path)
        monkeypatch.setattr(T, constant, hashlib.sha256(content.encode()).hexdigest())
        core = T.gpt2_encoding(path)
        for text in (*texts(5, seed=1), ODD):
            assert core.encode_ordinary(text) == bpe.encode(text).ids
        assert core.eot_token == 256 + len(merges.splitlines()) - 1
        assert T.state_of(core)["ranks"] == ranks
    crlf = merges.rstrip("\n").replace("\n", "\r\n")  # passed through another editor
    (tmp_path / "merges.txt").write_bytes(crlf.encode())
    assert T.state_of(T.gpt2_encoding(tmp_path / "merges.txt"))["ranks"] == ranks


# ---- folders of others


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(T.tiktoken, "get_encoding", refuse)


@pytest.fixture
def gpt2(monkeypatch):
    """A tokenizer in the place of GPT-2's, which may need the network."""
    monkeypatch.setattr(T.tiktoken, "get_encoding", lambda name: T.encoding(BYTES))


def write_headed(path, ids, length=None):
    head = np.zeros(256, "<i4")
    head[:3] = T.HEADER, 1, len(ids) if length is None else length
    path.write_bytes(head.tobytes() + np.asarray(ids, "<u2").tobytes())


def test_shards_with_a_header(tmp_path, gpt2):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, n) for n in (500, 300, 200)]
    for i, ids in enumerate(parts, 1):
        write_headed(tmp_path / f"fineweb_train_{i:06d}.bin", ids)
    write_headed(tmp_path / "fineweb_val_000000.bin", parts[2])
    train = Tokens(tmp_path, "train")
    assert np.array_equal(train.tokens[:], np.concatenate(parts)) and complete(tmp_path)
    assert len(Tokens(tmp_path, "val")) == 200
    write_headed(tmp_path / "fineweb_val_000000.bin", parts[2], length=201)
    input_error("1,424 bytes long, not 1,426", Tokens, tmp_path, "val")


@pytest.fixture
def nanogpt(tmp_path):
    """What nanoGPT's shakespeare_char leaves, its own prepare.py included, and the text of it."""
    text = "".join(texts(60))
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = np.array([stoi[character] for character in text], np.uint16)
    ids[:900].tofile(tmp_path / "train.bin")
    ids[900:].tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(stoi), "stoi": stoi}))
    (tmp_path / "prepare.py").write_text("import requests\n")
    return tmp_path, text


def test_nanogpts_folders(nanogpt, gpt2):
    folder, text = nanogpt
    train = Tokens(folder, "train")
    tokenizer = Tokenizer(tokenizer_state(folder))
    ids = [*train.tokens, *Tokens(folder, "val").tokens]
    assert tokenizer.decode(ids) == text and tokenizer.encode(text) == ids
    assert train.vocab_size == len(set(text)) == tokenizer.n_vocab and tokenizer.eot is None
    (folder / "meta.pkl").unlink()  # GPT-2's BPE then
    assert Tokens(folder, "train").vocab_size == 50257
    assert tokenizer_state(folder)["name"] == "bytes"
    np.fromfile(folder / "val.bin", "<u2").astype("<u4").tofile(folder / "train.bin")
    input_error("train.bin holds 32-bit numbers", Tokens, folder, "train")
    np.array([20240520, 2] + [0] * 300, "<i4").tofile(folder / "train.bin")
    input_error("train.bin has version 2 of llm.c's format", Tokens, folder, "train")
    (folder / "train.bin").write_bytes(b"odd")
    input_error("train.bin is 3 bytes long, not 2", Tokens, folder, "train")


def test_a_pickled_vocabulary_of_anything_else(nanogpt):
    folder, _ = nanogpt
    for content, sentence in (
        (b"torn", "meta.pkl cannot be read"),
        (pickle.dumps({"vocab_size": 5}), "is not nanoGPT's meta.pkl"),
        (pickle.dumps({"stoi": {"a": 1}}), "is not nanoGPT's meta.pkl"),
        (pickle.dumps({"stoi": {"ab": 0}}), "has 'ab', which is not a character"),
    ):
        (folder / "meta.pkl").write_bytes(content)
        input_error(sentence, Tokens, folder, "train")


def test_gpt2s_tokens_without_their_bpe(tmp_path, offline, monkeypatch):
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(bytes(100))
    input_error("put its vocab.bpe into the folder", tokenizer_state, tmp_path)
    _, merges = small_merges()
    (tmp_path / "vocab.bpe").write_text(merges)
    monkeypatch.setattr(T, "GPT2_MERGES", hashlib.sha256(merges.encode()).hexdigest())
    assert tokenizer_state(tmp_path)["ranks"] == T.ranks_of_merges(merges)


def test_an_unfinished_set_of_ours_is_nobody_elses(tmp_path):
    (tmp_path / "prepare.py").write_text("import x\nEMBEDDED = False\n")
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(bytes(100))
    input_error("no finished token dataset.*make it with", Tokens, tmp_path, "train")
