"""At home in its ecosystem: other people's data, checkpoints and positions read, models written for others, large runs sharded, logged and resumed."""
import base64
import collections
import gzip
import hashlib
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, byte_tokenizer, make_dataset, run

import model as M
import positions
import train
import configurator
from configurator import Run
from data import tokens as T
from data.fineweb import prepare as fineweb
from data.openwebtext import prepare as openwebtext
from data.text import prepare as own
from data.tokens import Stream, Tokens, complete, encoding, gpt2_encoding, state_of, tokenizer_state, write_shards
from model import GPT, GPTConfig, Tokenizer, export_lm, load_lm, lm_state, save_checkpoint
from test_train import TINY

BYTES = {**state_of(byte_tokenizer()), "pattern": T.GPT2_PATTERN}  # a BPE without merges, of any text
WORDS = "neuron cortex sheet place token layer signal window subject electrode sentence meaning".split()


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(5, 60))) + (" naïve 脳\n" if i % 3 else "") for i in range(n)]


def small_bpe():
    """GPT-2's kind of tokenizer, small: (trained tokenizers object, its merges as in vocab.bpe)."""
    from tokenizers import ByteLevelBPETokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts(40), vocab_size=330, special_tokens=[], show_progress=False)
    merges = [" ".join(m) if isinstance(m, (list, tuple)) else m for m in json.loads(bpe.to_str())["model"]["merges"]]
    return bpe, "#version: 0.2\n" + "\n".join(merges) + "\n"


# ---- shards

def test_a_stream_is_its_parts_in_one_array():
    parts = [np.arange(0, 5), np.arange(5, 6), np.arange(6, 20)]
    stream, whole = Stream(parts), np.arange(20)
    assert len(stream) == 20 and np.array_equal(stream, whole)
    for a, b, step in ((0, 20, 1), (3, 9, 1), (5, 6, 1), (7, 7, 1), (12, 3, 1), (-4, None, 1), (1, 19, 3), (0, 5, 1), (6, 100, 1)):
        assert np.array_equal(stream[a:b:step], whole[a:b:step]), (a, b, step)
    index = np.array([[0, 5, 19], [6, -1, 4]])
    assert np.array_equal(stream[index], whole[index]) and stream[5] == 5
    with pytest.raises(IndexError):
        stream[20]


def parquet(path, rows, group=7, column="text"):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": list(range(len(rows))), column: rows}), path, row_group_size=group)


@pytest.fixture
def corpus(tmp_path):
    """The same 90 documents in every form: {kind: folder}."""
    rows, folders = texts(90), {kind: tmp_path / kind for kind in ("parquet", "jsonl", "text")}
    for folder in folders.values():
        folder.mkdir()
    parquet(folders["parquet"] / "a.parquet", rows[:60])
    parquet(folders["parquet"] / "b.parquet", rows[60:])
    lines = [json.dumps({"text": row}) + "\n" for row in rows]
    (folders["jsonl"] / "a.jsonl").write_text("".join(lines[:60]))
    with gzip.open(folders["jsonl"] / "b.jsonl.gz", "wt") as f:
        f.write("\n".join(lines[60:]))  # with empty lines
    for i, row in enumerate(rows):
        (folders["text"] / f"{i:03d}.txt").write_text(row)
    return rows, folders


def shards(folder, root, **options):
    files = T.find_documents(root)
    options = dict(val_fraction=0.2, shard_bytes=3000, workers=1) | options
    return write_shards(folder, T.group_files(files, options["shard_bytes"]), BYTES, **options)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text"])
def test_every_document_once_with_its_end(corpus, tmp_path, kind):
    rows, folders = corpus
    meta = shards(tmp_path / "out", folders[kind])
    train, val = Tokens(tmp_path / "out", "train"), Tokens(tmp_path / "out", "val")
    enc = encoding(tokenizer_state(tmp_path / "out"))
    said = [enc.decode(split[:].tolist()).split("<|endoftext|>") for split in (train.tokens, val.tokens)]
    assert said[0].pop() == "" and said[1].pop() == ""  # each document ends with it
    assert sorted(said[0] + said[1]) == sorted(rows) and 5 < len(said[1]) < 40
    assert [r for r in rows if r in set(said[0])] == said[0]  # in order
    assert len(train.files) > 3 and complete(tmp_path / "out") and meta["documents"] == 90 and meta["characters"] == sum(map(len, rows))
    assert not (tmp_path / "out/unfinished").exists() and not list((tmp_path / "out").glob("*.tmp*"))
    for entry in meta["splits"].values():
        assert all(hashlib.sha256((tmp_path / "out" / s["file"]).read_bytes()).hexdigest() == s["sha256"] for s in entry["shards"])
    across = next(i for i in range(len(train)) if i == len(train.tokens.parts[0]) - 3)
    assert np.array_equal(train.windows([across], 6)[0], train.tokens[:][across:across + 6])


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".bin", ".yaml")}


def test_workers_and_stops_do_not_show(corpus, tmp_path, monkeypatch):
    rows, folders = corpus
    shards(tmp_path / "one", folders["parquet"])
    shards(tmp_path / "two", folders["parquet"], workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    made, real = [], T._tokenise

    def dies(folder, name, *args):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(name)
        return real(folder, name, *args)
    monkeypatch.setattr(T, "_tokenise", dies)
    with pytest.raises(KeyboardInterrupt):
        shards(tmp_path / "three", folders["parquet"])
    assert not complete(tmp_path / "three")
    with pytest.raises((FileNotFoundError, ValueError), match="no finished token dataset"):
        Tokens(tmp_path / "three", "train")
    with pytest.raises(ValueError, match="begun from other files or with other options.*overwrite=True"):
        shards(tmp_path / "three", folders["jsonl"])
    first, made[:] = list(made), []
    (tmp_path / "three/train_00000-00009.bin.tmp-7").write_bytes(b"torn")
    monkeypatch.setattr(T, "_tokenise", lambda *args: (made.append(args[1]), real(*args)))
    shards(tmp_path / "three", folders["parquet"])
    assert not set(first) & set(made) and files_of(tmp_path / "three") == files_of(tmp_path / "one")
    shards(tmp_path / "three", folders["jsonl"], overwrite=True)
    assert files_of(tmp_path / "three").keys() != files_of(tmp_path / "one").keys() and complete(tmp_path / "three")


def test_killed_in_the_middle_it_goes_on(tmp_path):
    """The prepare script itself, killed as hard as can be."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(3000)))
    T.write_dataset(tmp_path / "tok", {"train": [[0]]}, BYTES)
    options = [f"root={tmp_path / 'in'}", f"tokenizer={tmp_path / 'tok'}", "shard_mb=1", "workers=2"]
    slow = f"import runpy, sys, time; sys.path.insert(0, {str(ROOT)!r}); import data.tokens as T; T._write_json = (lambda real: lambda *a: (real(*a), "\
           f"time.sleep(3)))(T._write_json); sys.argv[0] = {str(ROOT / 'data/text/prepare.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", slow, *options, f"out_dir={tmp_path / 'out'}", "workers=1"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    while not list((tmp_path / "out/unfinished").glob("*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    prepare("text", *options, f"out_dir={tmp_path / 'out'}")
    prepare("text", *options, f"out_dir={tmp_path / 'other'}")
    assert {k: v for k, v in files_of(tmp_path / "out").items() if k != "meta.yaml"} == {
        k: v for k, v in files_of(tmp_path / "other").items() if k != "meta.yaml"}


def prepare(name, *options, status=0):
    done = subprocess.run([sys.executable, str(ROOT / f"data/{name}/prepare.py"), *map(str, options)], capture_output=True, text=True,
                          env={**os.environ, "TIKTOKEN_CACHE_DIR": "/nowhere", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.mark.parametrize("content, words, workers", [
    ("torn.parquet", "torn.parquet is not a whole parquet file", 1), ("other.parquet", "has no column 'text', only id, body: give column=", 1),
    ("bad.jsonl", "bad.jsonl: the line at byte 14 is not JSON", 1), ("bad.jsonl", "bad.jsonl: the line at byte 14 is not JSON", 2),
    ("key.jsonl", "has no text in 'text', only body: give column=", 1), ("latin.txt", "latin.txt is not UTF-8 text", 1),
    ("torn.jsonl.gz", "torn.jsonl.gz is not a whole gzip file", 1), ("nothing", "holds no .parquet", 1)])
def test_sources_that_are_damaged(tmp_path, content, words, workers):
    root = tmp_path / "in"
    root.mkdir()
    if content == "other.parquet":
        parquet(root / content, ["a"] * 20, column="body")
    elif content != "nothing":
        (root / content).write_bytes({"torn.parquet": b"PAR1....", "bad.jsonl": b'{"text": "a"}\n{"text"\n', "key.jsonl": b'{"body": "a"}\n',
                                      "latin.txt": b"caf\xe9", "torn.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 99)[:40]}[content])
    with pytest.raises((ValueError, FileNotFoundError), match=words) as e:
        shards(tmp_path / "out", root, workers=workers)
    assert "\n" not in str(e.value)


def test_disk_and_strange_folders(corpus, tmp_path, monkeypatch, capsys):
    rows, folders = corpus
    shards(tmp_path / "out", folders["text"])
    assert "GB are free" in capsys.readouterr().out  # said first
    monkeypatch.setattr(T.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(OSError, match="its disk has 0.0 GB free: make room"):
        shards(tmp_path / "full", folders["text"])
    monkeypatch.undo()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.bin").write_bytes(b"mine")
    with pytest.raises((OSError, ValueError), match="not made here"):
        shards(tmp_path / "mine", folders["text"])
    assert (tmp_path / "mine/train.bin").read_bytes() == b"mine"


# ---- prepare scripts

def test_ones_own_text_in_one_command(tmp_path):
    book = "\n".join(texts(200))
    (tmp_path / "book.txt").write_text(book)
    options = f"root={tmp_path / 'book.txt'}", "tokenizer=char", f"out_dir={tmp_path / 'd'}", "val_fraction=0.1"
    out = prepare("text", *options, "workers=1")
    assert "the end of each document" in out and "python train.py dataset=" in out
    enc, said = encoding(tokenizer_state(tmp_path / "d")), []
    for split in ("train", "val"):
        said.append(enc.decode(Tokens(tmp_path / "d", split).tokens[:].tolist()).removesuffix("<|endoftext|>"))
    assert "".join(said) == book and 0.08 < len(said[1]) / len(book) < 0.12 and said[0].endswith("\n")
    err = prepare("text", *options, "val_fraction=0.2", status=2)
    assert err.startswith("error: ") and "other options" in err and "Traceback" not in err
    train.main(train.Config(**{**TINY, "dataset": str(tmp_path / "d"), "max_iters": 2, "out_dir": str(tmp_path / "run")}))


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(T.tiktoken, "get_encoding", refuse)


def test_bad_options_of_the_prepare_scripts(tmp_path, offline, capsys):
    book = tmp_path / "book.txt"
    book.write_text("\n".join(texts(99)))
    (tmp_path / "out").mkdir()
    for script, options, words in ((own, dict(), "root= is missing"), (own, dict(root="/no/such"), "/no/such does not exist"),
                                   (own, dict(root=book), "give its vocab.bpe with bpe=FILE"), (own, dict(root=book, val_fraction=2), "val_fraction"),
                                   (own, dict(root=book, bpe="/no/file"), "there is no /no/file"), (own, dict(root=book, bpe=book), "is not GPT-2's BPE"),
                                   (own, dict(root=book, tokenizer="/no/set"), "/no/set does not exist"), (own, dict(root=book, files="*.tex"), "bpe=FILE"),
                                   (own, dict(root=tmp_path, files="*.tex"), "holds no *.tex files"), (fineweb, dict(), "bpe=FILE"),
                                   (fineweb, dict(prebuilt=100), "prebuilt"), (openwebtext, dict(workers=-1), "workers")):
        with pytest.raises((ValueError, OSError)) as e:
            config = script.Config(**{k: str(v) if isinstance(v, Path) else v for k, v in options.items()}, out_dir=str(tmp_path / "out"))
            configurator.check(config)
            script.main(config)
        assert words in str(e.value) and "\n" not in str(e.value), e.value


def test_ready_made_shards(tmp_path, monkeypatch):
    """fineweb prebuilt=2: fetched, checked, read with their headers."""
    monkeypatch.setattr(fineweb, "gpt2_encoding", lambda bpe: encoding(BYTES))

    class Hub:
        revision = "abc"

        def __init__(self, repo, wanted, folder):
            self.folder = folder
            self.files = [(n, 1224) for n in (*(f"finewebedu_train_{i:06d}.bin" for i in range(1, 100)), "finewebedu_val_000000.bin") if wanted(n)]

        def fetch(self, name):
            self.folder.mkdir(exist_ok=True)
            headed(self.folder / name, np.arange(100) + 50 * ("train" in name))
    monkeypatch.setattr(fineweb, "Hub", Hub)
    fineweb.main(fineweb.Config(prebuilt=2, out_dir=str(tmp_path / "out")))
    assert complete(tmp_path / "out") and np.array_equal(Tokens(tmp_path / "out", "train").tokens[:], np.tile(np.arange(100) + 50, 2))
    assert np.array_equal(Tokens(tmp_path / "out", "val").windows([90], 10)[0], np.arange(90, 100))


@pytest.mark.parametrize("script", [fineweb, openwebtext])
def test_large_sets_from_a_local_copy(tmp_path, script, monkeypatch):
    """main() of the prepare scripts with a small tokenizer in GPT-2's place; the hub answered by a folder."""
    monkeypatch.setattr(script, "gpt2_encoding", lambda bpe: encoding(BYTES))
    rows = texts(60)
    (tmp_path / "hub/sample/10BT").mkdir(parents=True)
    names = [f"sample/10BT/{i:03d}_train.parquet" for i in range(3)]
    for i, path in enumerate(names):
        parquet(tmp_path / "hub" / path, rows[20 * i:20 * i + 20])
    options = dict(val_fraction=0.2, workers=1)
    script.main(script.Config(root=str(tmp_path / "hub"), out_dir=str(tmp_path / "local"), **options))

    class Hub:
        revision, fetched = "abc", []

        def __init__(self, repo, wanted, folder, revision=None):
            self.folder = folder
            self.files = [(n, (tmp_path / "hub" / n).stat().st_size) for n in names if wanted(n)]

        def fetch(self, n):
            self.fetched.append(n)
            self.folder.mkdir(exist_ok=True)
            return shutil.copy(tmp_path / "hub" / n, self.folder / Path(n).name)
    monkeypatch.setattr(script, "Hub", Hub)
    script.main(script.Config(out_dir=str(tmp_path / "far"), **options))
    local, far = files_of(tmp_path / "local"), files_of(tmp_path / "far")
    assert {k: v for k, v in local.items() if k != "meta.yaml"} == {k: v for k, v in far.items() if k != "meta.yaml"}
    assert Hub.fetched == names and not list((tmp_path / "far/download").iterdir())  # fetched one by one, and removed
    script.main(script.Config(out_dir=str(tmp_path / "far"), **options))  # is there: nothing is fetched again
    assert Hub.fetched == names
    script.main(script.Config(out_dir=str(tmp_path / "some"), files=2, **options))
    assert Hub.fetched == names + names[:2] and yaml.safe_load((tmp_path / "some/meta.yaml").read_text())["documents"] == 40


def test_no_network_is_one_sentence(tmp_path):
    hub = T.Hub.__new__(T.Hub)
    hub.repo = "nobody/nothing"
    with pytest.raises((FileNotFoundError, ValueError), match="nobody/nothing could not be had from the Hugging Face hub .*root=PATH"):
        hub._ask(lambda client: client.no_such_function())


# ---- GPT-2's BPE

def test_bpe_from_a_file(tmp_path, monkeypatch):
    bpe, merges = small_bpe()
    ranks = T.ranks_of_merges(merges)
    for name, content, constant in (("vocab.bpe", merges, "GPT2_MERGES"), ("r50k_base.tiktoken", ranks, "GPT2_RANKS")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="is not GPT-2's BPE: its SHA-256"):
            gpt2_encoding(str(tmp_path / name))
        monkeypatch.setattr(T, constant, hashlib.sha256(content.encode()).hexdigest())
        enc = gpt2_encoding(str(tmp_path / name))
        for text in (*texts(5, seed=1), "They're 12.5 %  of\n\n  us;\t don't", "\x00\xff ☃"):
            assert enc.encode_ordinary(text) == bpe.encode(text).ids
        assert enc.eot_token == 256 + len(merges.splitlines()) - 1 and state_of(enc)["ranks"] == ranks
    (tmp_path / "merges.txt").write_bytes(merges.rstrip("\n").replace("\n", "\r\n").encode())  # passed through another editor
    assert state_of(gpt2_encoding(str(tmp_path / "merges.txt")))["ranks"] == ranks


# ---- folders of others

def headed(path, ids, magic=20240520, version=1, length=None):
    head = np.zeros(256, "<i4")
    head[:3] = magic, version, len(ids) if length is None else length
    path.write_bytes(head.tobytes() + np.asarray(ids, "<u2").tobytes())


@pytest.fixture
def gpt2(monkeypatch):
    """A tokenizer in the place of GPT-2's, which has the network to itself."""
    monkeypatch.setattr(T, "gpt2_encoding", lambda bpe="": encoding(BYTES))


def test_shards_with_a_header(tmp_path, gpt2):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, n) for n in (500, 300, 200)]
    for i, ids in enumerate(parts):
        headed(tmp_path / f"fineweb_train_{i + 1:06d}.bin", ids)
    headed(tmp_path / "fineweb_val_000000.bin", parts[2])
    data = Tokens(tmp_path, "train")
    assert len(data) == 1000 and np.array_equal(data.tokens[:], np.concatenate(parts)) and len(Tokens(tmp_path, "val")) == 200
    train.main(train.Config(**{**TINY, "dataset": str(tmp_path), "vocab_size": 50304, "max_iters": 1, "out_dir": str(tmp_path / "run")}))
    for kwargs, words in ((dict(length=201), "bytes long where its header says"), (dict(magic=20240801, version=7), "Llama 3")):
        headed(tmp_path / "fineweb_val_000000.bin", parts[2], **kwargs)
        with pytest.raises(ValueError, match=words):
            Tokens(tmp_path, "val")


def nanogpt_folder(folder, text, keep=0.9):
    """What nanoGPT's shakespeare_char leaves: train.bin, val.bin, meta.pkl and its own prepare.py."""
    folder.mkdir(parents=True, exist_ok=True)
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    ids, n = np.array([stoi[c] for c in text], np.uint16), int(keep * len(text))
    ids[:n].tofile(folder / "train.bin")
    ids[n:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}))
    (folder / "prepare.py").write_text("import requests\n")
    return folder


def test_nanogpt_folders(tmp_path, gpt2):
    text = "".join(texts(100))
    folder = nanogpt_folder(tmp_path / "nanoGPT/data/char", text)
    data, enc = Tokens(folder, "train"), encoding(tokenizer_state(folder))
    assert enc.decode([*data.tokens[:], *Tokens(folder, "val").tokens[:]]) == text and data.vocab_size == len(set(text)) == enc.n_vocab
    assert T.encode(enc, "naïve 脳") == [sorted(set(text)).index(c) for c in "naïve 脳"]
    train.main(train.Config(**{**TINY, "dataset": str(folder), "max_iters": 2, "out_dir": str(tmp_path / "run")}))
    assert load_lm(str(tmp_path / "run"))[1].decode([0, 1]) == "".join(sorted(set(text))[:2])

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    for content, words in ((pickle.dumps({"stoi": Hostile()}), "it wants posix.mkdir"), (b"torn", "meta.pkl is not nanoGPT's"),
                           (pickle.dumps({"vocab_size": 5}), "is not nanoGPT's meta.pkl"),
                           (pickle.dumps({"stoi": {"ab": 0}}), "not a vocabulary of characters")):
        (folder / "meta.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            Tokens(folder, "train")
    assert not (tmp_path / "owned").exists()
    (folder / "meta.pkl").unlink()  # GPT-2's BPE then
    assert Tokens(folder, "train").vocab_size == 50257 and tokenizer_state(folder)["name"] == "bytes"
    (folder / "train.bin").write_bytes(b"odd")
    with pytest.raises(ValueError, match="no whole number of uint16"):
        Tokens(folder, "train")


def test_gpt2_tokens_without_their_bpe(tmp_path, offline, monkeypatch):
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(bytes(100))
    with pytest.raises((FileNotFoundError, ValueError), match="put its vocab.bpe into the folder"):
        tokenizer_state(tmp_path)
    _, merges = small_bpe()
    (tmp_path / "vocab.bpe").write_text(merges)
    monkeypatch.setattr(T, "GPT2_MERGES", hashlib.sha256(merges.encode()).hexdigest())
    assert tokenizer_state(tmp_path)["ranks"] == T.ranks_of_merges(merges)


def test_an_unfinished_set_of_ours_is_nobody_elses(tmp_path):
    (tmp_path / "prepare.py").write_text("import x\nEMBEDDED = False\n")
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(bytes(100))
    with pytest.raises((FileNotFoundError, ValueError), match="no finished token dataset.*make it with"):
        Tokens(tmp_path, "train")


# ---- checkpoints of others

def nanogpt_checkpoint(path, ours, prefix="_orig_mod.", old=False, **args):
    """What nanoGPT's train.py saves of a model with our weights: names, the tied head and, in old versions, the causal mask as a buffer."""
    state = {f"{prefix}{k}": v for k, v in ours.state_dict().items() if k != "unit_at_cell"}
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    if old:
        for i in range(ours.config.n_layer):
            state[f"{prefix}transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    c = ours.config
    args = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size, bias=c.bias, vocab_size=c.vocab_size, dropout=0.0) | args
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "optimizer": {}, "model_args": args, "iter_num": 70, "best_val_loss": torch.tensor(1.5),
                "config": {"dataset": "char"}}, path)
    return path


def ours(vocab, **options):
    model = GPT(GPTConfig(**{**dict(block_size=32, vocab_size=vocab, n_layer=2, n_head=4, n_embd=64, bias=False), **options})).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    return model


def ids(vocab):
    return torch.randint(0, vocab, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias, old, prefix", [(False, False, "_orig_mod."), (True, True, ""), (True, False, "module.")])
def test_nanogpt_checkpoints(tmp_path, bias, old, prefix):
    text = "".join(texts(20))
    folder = nanogpt_folder(tmp_path / "data/char", text)
    mine = ours(len(set(text)), bias=bias)
    nanogpt_checkpoint(tmp_path / "out-char/ckpt.pt", mine, prefix, old)
    model, tokenizer = load_lm(str(tmp_path / "out-char"))
    assert torch.equal(model.eval()(ids(20)).logits, mine(ids(20)).logits) and model.config.bias == bias
    assert tokenizer.encode("naïve 脳") == T.encode(encoding(tokenizer_state(folder)), "naïve 脳")
    assert tokenizer.decode(tokenizer.encode("naïve 脳")) == "naïve 脳"
    (tmp_path / "data/char/meta.pkl").rename(tmp_path / "out-char/meta.pkl")  # or beside it
    assert load_lm(str(tmp_path / "out-char/ckpt.pt"))[1].encode("a") == tokenizer.encode("a")
    (tmp_path / "out-char/meta.pkl").unlink()
    with pytest.raises(ValueError, match="copy nanoGPT's data/char/meta.pkl beside it"):
        load_lm(str(tmp_path / "out-char"))


def test_go_on_from_a_nanogpt_checkpoint(tmp_path):
    text = "".join(texts(100))
    folder = nanogpt_folder(tmp_path / "data/char", text)
    mine = ours(len(set(text)))
    nanogpt_checkpoint(tmp_path / "out-char/ckpt.pt", mine)
    options = {**TINY, "dataset": str(folder), "max_iters": 1, "learning_rate": 0.0, "muon_lr": 0.0}  # which no weight survives changed
    train.main(train.Config(**options, init_from=str(tmp_path / "out-char"), out_dir=str(tmp_path / "run")))
    saved = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert all(torch.equal(saved["model"][k], v) for k, v in mine.state_dict().items()) and saved["model_args"]["sheet"]
    with pytest.raises(ValueError, match="no state to resume: give init_from="):
        train.main(train.Config(**options, init_from="resume", out_dir=str(tmp_path / "out-char")))


def test_checkpoints_of_something_else(tmp_path):
    mine = ours(30)
    for change, words in ((lambda s: s["model"].update({"_orig_mod.lm_head.weight": torch.zeros(30, 64)}), "a head of its own"),
                          (lambda s: s["model"].update({"_orig_mod.transformer.h.0.attn.rope": torch.zeros(3)}), "attn.rope' is more than it has"),
                          (lambda s: s["model"].pop("_orig_mod.transformer.h.1.mlp.c_fc.weight"), "mlp.c_fc.weight' is missing"),
                          (lambda s: s["model_args"].pop("n_head"), "of no GPT-2")):
        path = nanogpt_checkpoint(tmp_path / "x/ckpt.pt", mine)
        (tmp_path / "x/meta.pkl").write_bytes(pickle.dumps({"stoi": {chr(97 + i): i for i in range(26)}}))
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
        with pytest.raises(ValueError, match=words):
            load_lm(str(path))


# ---- TopoLM

class LayerPositions:
    """Pickles as TopoLM's class of that name does, module and all."""


LayerPositions.__module__ = "positions"


@pytest.fixture
def topolm(monkeypatch):
    """Writes position files in the published format: a pickled dataclass with torch tensors in it."""
    monkeypatch.setattr(positions, "LayerPositions", LayerPositions, raising=False)

    def write(folder, coordinates, radius=3):
        folder.mkdir(parents=True, exist_ok=True)
        for name, at in zip(positions.layer_names(len(coordinates) // 2), coordinates):
            layer = LayerPositions()
            side = int(len(at) ** 0.5)
            cells = positions.window_cells(side, radius)
            masks = torch.zeros(len(cells), len(at), dtype=torch.int64)
            layer.__dict__.update(name=name, coordinates=torch.as_tensor(at, dtype=torch.float32), neighborhoods_per_batch=5,
                                  neighborhood_indices=masks.scatter_(1, torch.as_tensor(cells), 1))
            (folder / f"{name}.pkl").write_bytes(pickle.dumps(layer, protocol=4))
        return folder
    return write


def grid(rows):
    """Coordinates (C, 2) of each unit under unit_at_cell."""
    side = int(rows.shape[-1] ** 0.5)
    cell = np.argsort(rows, -1)
    return np.stack(np.divmod(cell, side), -1)


def test_positions_of_topolm(tmp_path, topolm, capsys):
    rows = positions.random_positions(2, 64, seed=3)
    folder = topolm(tmp_path / "gpt2-positions-3-5", grid(rows))
    assert np.array_equal(positions.load_positions(str(folder), 2, 64), rows) and capsys.readouterr().err == ""
    assert positions.read_layer_pickles(folder)[1] == dict(radius=3, windows=5)
    with pytest.raises(ValueError, match="is for 2 layers x 64 units, the model has 3"):
        positions.load_positions(str(folder), 3, 64)
    broken = grid(rows)  # several units on one cell, as the published swap-optimised files have them
    broken[1, :10] = broken[1, 10:20]
    topolm(folder, broken)
    loaded = positions.load_positions(str(folder), 2, 64)
    said = capsys.readouterr().err
    assert "1 of 4 position files are no permutations" in said and "layer.0.mlp 64 units share 54 cells" in said
    assert all(np.array_equal(np.sort(row), np.arange(64)) for row in loaded) and np.array_equal(loaded[[0, 2, 3]], rows[[0, 2, 3]])
    way = lambda row: np.linalg.norm(grid(row) - broken[1], axis=-1).sum()
    assert way(loaded[1]) <= way(rows[1]) + 1e-6  # no other placement is nearer; the undamaged one is one of them
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no position files"):
        positions.load_positions(str(tmp_path / "empty"), 2, 64)


def test_position_pickles_hold_no_code(tmp_path, topolm):
    folder = topolm(tmp_path / "p", grid(positions.random_positions(1, 64)))

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    class Nested:  # code in the bytes that torch would load by itself
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Hostile()),)
    whole = (folder / "layer.0.attn.pkl").read_bytes()
    for content in (pickle.dumps(Hostile()), pickle.dumps({"coordinates": Nested()}), pickle.dumps(collections.Counter()), whole[:len(whole) // 2], b""):
        (folder / "layer.0.attn.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="layer.0.attn.pkl cannot be read"):
            positions.load_positions(str(folder), 1, 64)
    assert not (tmp_path / "owned").exists()
    (folder / "layer.0.attn.pkl").write_bytes(pickle.dumps({"coordinates": 1}))
    with pytest.raises(ValueError, match="holds no coordinates"):
        positions.load_positions(str(folder), 1, 64)


@pytest.mark.parametrize("resid", [None, True])
def test_checkpoints_of_topolm(tmp_path, topolm, monkeypatch, capsys, resid):
    monkeypatch.setattr(M, "foreign_tokenizer", lambda *_: BYTES)
    mine, rows = ours(257), positions.random_positions(2, 64, seed=5)
    args = dict(alpha=2.5, accum="mean", activation_decay=0.0, head_loss=False, **({} if resid is None else {"with_resid": resid}))
    for number in (9, 311):
        nanogpt_checkpoint(tmp_path / f"run/ckpt-{number}.pt", mine if number == 311 else ours(257, n_layer=1), **args)
    model, _ = load_lm(str(tmp_path / "run"))
    assert not model.config.sheet and "no positions" in capsys.readouterr().err
    topolm(tmp_path / "run/gpt2-positions-3-5", grid(rows))
    model, _ = load_lm(str(tmp_path / "run"))  # the last of them
    c = model.config
    assert torch.equal(model.eval()(ids(257)).logits, mine(ids(257)).logits) and np.array_equal(model.unit_at_cell, rows)
    assert (c.sheet, c.alpha, c.radius, c.windows, c.tap) == (True, 2.5, 3, 5, "residual" if resid else "sublayer")
    make_dataset(tmp_path / "data")
    train.main(train.Config(**{**TINY, "dataset": str(tmp_path / "data"), "max_iters": 1}, init_from=str(tmp_path / "run"), out_dir=str(tmp_path / "a")))
    saved = torch.load(tmp_path / "a/ckpt.pt", weights_only=True)
    assert np.array_equal(saved["model"]["unit_at_cell"], rows)
    train.main(train.Config(**{**TINY, "dataset": str(tmp_path / "data"), "max_iters": 1, "n_head": 4, "n_embd": 64},  # its positions for a new model
                            positions=str(tmp_path / "run/gpt2-positions-3-5"), out_dir=str(tmp_path / "b")))
    assert np.array_equal(torch.load(tmp_path / "b/ckpt.pt", weights_only=True)["model"]["unit_at_cell"], rows)


# ---- Hugging Face

@pytest.mark.parametrize("shape", [dict(n_layer=3, n_head=5, n_embd=40, n_positions=24), dict(n_layer=1, n_head=1, n_embd=16, n_positions=8)])
def test_gpt2_of_any_size(tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=90, **shape)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")  # in several files, as the large ones come
    model, idx = GPT.from_pretrained(str(tmp_path)).eval(), torch.randint(0, 90, (2, 8))
    with torch.no_grad():
        assert torch.allclose(model(idx).logits, theirs(idx).logits, atol=1e-5)


def exported(tmp_path, tokenizer, **options):
    mine = ours(encoding(tokenizer).n_vocab + 3, sheet=True, radius=3, alpha=0.5, norm=2.0, **options)
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run/best.pt", {**lm_state(mine), "tokenizer": tokenizer})
    (tmp_path / "run/results.csv").write_text("score,chance\n3.7,3.8\n")
    export_lm(str(tmp_path / "run"), str(tmp_path / "hf"))
    return mine


@pytest.mark.parametrize("kind", ["bpe", "bytes", "characters"])
def test_our_models_open_elsewhere(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    bpe, merges = small_bpe()
    ranks = T.ranks_of_merges(merges)
    state = {"bpe": dict(name="small", pattern=T.GPT2_PATTERN, special_tokens={"<|endoftext|>": len(ranks.splitlines())}, ranks=ranks), "bytes": BYTES,
             "characters": T.character_state("".join(texts(99)), "chars")}[kind]
    mine = exported(tmp_path, state)
    files = {p.name for p in (tmp_path / "hf").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "nanocortex.json"} <= files
    assert not any(f.endswith((".bin", ".pt")) for f in files)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    idx = ids(257 if kind == "bytes" else 20)
    with torch.no_grad():
        assert torch.allclose(theirs(idx).logits, mine(idx).logits, atol=1e-5)
    fast, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(state)
    for text in (*texts(9, seed=2), "cortex", "", *(() if kind == "characters" else ("They're 12.5 %  of\n\n us;\t don't\n", "☃ \x00 naïve  脳🧠"))):
        assert fast.encode(text, add_special_tokens=False) == tokenizer.encode(text) and fast.decode(fast.encode(text)) == text
    assert fast.eos_token_id == tokenizer.eot == theirs.config.eos_token_id
    card = (tmp_path / "hf/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "topography" in front["tags"] and "3.7,3.8" in card and "0.5" in card
    back, reader = load_lm(str(tmp_path / "hf"))  # and comes home with its sheets
    assert back.config == mine.config and all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), mine.state_dict().values(), strict=True))
    assert reader.state == state
    with torch.no_grad():
        theirs.transformer.h[0].mlp.c_fc.bias += 1  # trained on elsewhere: biases of its own
        theirs.save_pretrained(tmp_path / "hf")
        assert torch.allclose(load_lm(str(tmp_path / "hf"))[0].eval()(idx).logits, theirs(idx).logits, atol=1e-5)


def test_models_without_a_hugging_face_form(tmp_path):
    for options in (dict(head_loss=True), dict(attn_proj=True)):
        with pytest.raises(ValueError, match="no Hugging Face GPT-2 form"):
            ours(30, **options).save_pretrained(tmp_path)
    state = {**BYTES, "ranks": BYTES["ranks"] + base64.b64encode(b"abc").decode() + " 256\n", "special_tokens": {}}
    with pytest.raises(ValueError, match="not made by merging two others"):
        Tokenizer(state).save_pretrained(tmp_path)


# ---- large models

def test_recomputed_blocks_have_the_same_gradients_and_keep_less():
    kept, grads = [], []
    for again in (False, True):
        net = ours(257, sheet=True, radius=3, windows=2, alpha=1.0, dropout=0.1).train()
        if again:
            train.recompute_blocks(net)
        sizes = {}
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.update({t.data_ptr(): t.numel()}), t)[1], lambda t: t):
            out = net(ids(257), ids(257), net.draw_windows(torch.Generator().manual_seed(0)))
        out.loss.backward()
        kept.append(sum(sizes.values()))
        grads.append([p.grad for p in net.parameters()])
        assert net.eval().generate([[1, 2]], 3, temperature=0)  # and without gradients as ever
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and kept[1] < 0.5 * kept[0]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("tiny"))


RUN = ["batch_size=2", "block_size=16", "n_layer=2", "n_head=2", "n_embd=16", "radius=2", "windows=2", "alpha=1", "dropout=0.1", "tokens_per_step=128",
       "max_iters=6", "eval_interval=3", "eval_batches=3", "save_interval=3", "log_interval=1", "warmup_iters=2", "compile=False", "device=cpu",
       "dtype=float32", "baseline_tokens=0", "optimizer=adamw"]


# ---- wandb

def wandb_records(file):
    """What an offline run wrote: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; checksum, length, kind, data)."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.slow  # wandb takes its time to start and to end
def test_wandb_offline_keeps_its_run(given, tmp_path):
    pytest.importorskip("wandb")
    options = [f"dataset={given}", *RUN, f"out_dir={tmp_path / 'run'}", "wandb_log=True"]
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB__DISABLE_STATS": "true"}
    run("train", *options, "max_iters=3", env=env)
    name = (tmp_path / "run/wandb_id.txt").read_text()
    run("train", *options, "init_from=resume", env=env)
    assert (tmp_path / "run/wandb_id.txt").read_text() == name
    files = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2  # both of the one id: wandb sync makes them one run
    steps, config, figures = [], {}, set()
    for file in files:
        for record in wandb_records(file):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            steps += [int(row["_step"])] if "train_task" in row else []
            figures |= {key.split("/")[0] for key in row if key.endswith("/_type")}
    assert config["n_embd"] == 16 and config["dataset"] == str(given)
    assert steps == [1, 2, 3, 4, 5, 6] and figures == {"loss", "sheets"}


def test_wandb_without_a_key_is_one_sentence(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def keyless(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")
    monkeypatch.setattr(wandb, "init", keyless)
    with pytest.raises(ValueError, match="No API key configured. Use .* WANDB_MODE=offline"):
        Run(train.Config(**TINY, wandb_log=True, out_dir=str(tmp_path)))
