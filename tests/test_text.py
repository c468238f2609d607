"""Documents into token shards, and the prepare scripts of text: every document once, in any kind of
file, whatever was killed in between; odd files end in a sentence; the corpus does not leak."""

import gzip
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import input_error, run
from test_tokens import BYTES, ODD, offline, texts, write_headed  # noqa: F401 (a fixture)

import configurator
from data import InputError
from data import tokens as T
from data.fineweb import prepare as fineweb
from data.openwebtext import prepare as openwebtext
from data.pydocs import prepare as pydocs
from data.shakespeare import prepare as shakespeare
from data.text import prepare as mytext
from data.tokens import ENDOFTEXT, Tokenizer, Tokens, complete, tokenizer_state

# ---- documents into shards


def write_parquet(path, rows, column="text"):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(range(len(rows))), column: rows})
    pq.write_table(table, path, row_group_size=7)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": row}) + "\n" for row in rows]
    content = "".join(lines).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


@pytest.fixture
def corpus(tmp_path):
    """90 documents, and the same in every kind of file: {kind: folder}."""
    rows = texts(90)
    write_parquet(tmp_path / "parquet/a.parquet", rows[:60])
    write_parquet(tmp_path / "parquet/b.parquet", rows[60:])
    write_lines(tmp_path / "jsonl/a.jsonl", rows[:60])
    write_lines(tmp_path / "jsonl/b.jsonl.gz", rows[60:])
    (tmp_path / "text").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / f"text/{i:03d}.txt").write_text(row)
    return rows, {kind: tmp_path / kind for kind in ("parquet", "jsonl", "text")}


def make_shards(folder, root, workers=1, state=BYTES, **options):
    plan = T.Plan(val_fraction=0.2, shard_bytes=3000)
    sources = T.group_files(T.find_documents(root), plan)
    return T.write_shards(folder, sources, state, plan, workers=workers, **options)


def documents_of(folder, split):
    """The documents of a split, each of which must end with end-of-text."""
    text = Tokenizer(tokenizer_state(folder)).decode(Tokens(folder, split).tokens[:])
    assert text.endswith(ENDOFTEXT)
    return text.removesuffix(ENDOFTEXT).split(ENDOFTEXT)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text"])
def test_every_document_once_with_its_end(corpus, tmp_path, kind, capsys):
    rows, folders = corpus
    meta = make_shards(tmp_path / "out", folders[kind])
    train = documents_of(tmp_path / "out", "train")
    val = documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(rows) and 5 < len(val) < 40
    assert [row for row in rows if row in set(train)] == train  # in order
    assert (meta["documents"], meta["characters"]) == (90, sum(map(len, rows)))
    assert len(meta["splits"]["train"]["shards"]) > 3 and complete(tmp_path / "out")
    assert not (tmp_path / "out/unfinished").exists() and not list(tmp_path.glob("out/*.tmp*"))
    assert "GB are free" in capsys.readouterr().out  # first
    tokens = Tokens(tmp_path / "out", "train")
    across = len(tokens.tokens.parts[0]) - 3
    assert np.array_equal(tokens.windows([across], 6)[0], tokens.tokens[:][across : across + 6])


def test_workers_and_stops_do_not_show(corpus, tmp_path, monkeypatch):
    _, folders = corpus
    make_shards(tmp_path / "one", folders["parquet"])
    make_shards(tmp_path / "two", folders["parquet"], workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    tokenise = T._tokenise
    done = []

    def dies(folder, name, *rest):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(name)
        return tokenise(folder, name, *rest)

    three = tmp_path / "three"
    monkeypatch.setattr(T, "_tokenise", dies)
    with pytest.raises(KeyboardInterrupt):
        make_shards(three, folders["parquet"])
    input_error("no finished token dataset", Tokens, three, "train")
    with pytest.raises(InputError, match="begun with other files or other options"):
        make_shards(three, folders["jsonl"])
    first = list(done)
    done.clear()
    monkeypatch.setattr(T, "_tokenise", lambda *args: done.append(args[1]) or tokenise(*args))
    (three / "train_00000-00009.bin.tmp-7").write_bytes(b"torn")
    make_shards(three, folders["parquet"])
    assert done and not set(first) & set(done)
    assert files_of(three) == files_of(tmp_path / "one")
    make_shards(three, folders["text"], overwrite=True)
    assert files_of(three).keys() != files_of(tmp_path / "one").keys() and complete(three)


def test_odd_documents(tmp_path):
    """Marks, line ends, nulls and halves of characters in JSONL."""
    rows = texts(40)
    lines = [json.dumps({"text": row}) for row in rows]
    written = {
        "plain": "\n".join(lines),
        "mark and CRLF": "\ufeff" + "\r\n".join(lines),
        "blank lines": "\n\n" + "\n\n".join(lines),
        "unescaped": "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows),
        "null and empty": "\n".join([*lines, '{"text": null}', '{"text": ""}']),
    }
    metas = {}
    for name, content in written.items():
        (tmp_path / f"{name}.jsonl").write_text(content, newline="")
        metas[name] = make_shards(tmp_path / name, tmp_path / f"{name}.jsonl")
        for split in ("train", "val"):
            assert documents_of(tmp_path / name, split) == documents_of(tmp_path / "plain", split)
    assert metas["null and empty"]["documents_left_out_as_null_or_empty"] == 2
    odd = "\u2028 next\x85line \x00 " + ODD.replace(ENDOFTEXT, "")
    write_lines(tmp_path / "odd.jsonl", [odd, *rows])
    make_shards(tmp_path / "odd", tmp_path / "odd.jsonl")
    assert odd in documents_of(tmp_path / "odd", "train") + documents_of(tmp_path / "odd", "val")


def test_half_a_character_is_replaced_and_counted(tmp_path, capsys):
    write_lines(tmp_path / "half.jsonl", [f"broken \ud83d emoji {i}" for i in range(60)])
    T.write_dataset(tmp_path / "bytes", {"train": [[0]]}, BYTES)
    options = {"root": str(tmp_path / "half.jsonl"), "workers": 1, "val_fraction": 0.2}
    for i, tokenizer in enumerate(["char", str(tmp_path / "bytes")]):
        folder = tmp_path / f"out{i}"
        mytext.main(mytext.Config(**options, tokenizer=tokenizer, out_dir=str(folder)))
        assert documents_of(folder, "train")[0] == "broken \ufffd emoji 0"
        assert "60 documents with half a character replaced" in capsys.readouterr().out


TORN = gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:40]
DAMAGED = [
    ("torn.parquet", b"PAR1....", "torn.parquet is not a complete parquet file"),
    ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "bad.jsonl: the line at byte 14 .* is not JSON"),
    ("latin.jsonl", b'{"text": "caf\xe9"}\n', "the line at byte 0 .* is not JSON in UTF-8"),
    ("key.jsonl", b'{"body": "a"}\n', r"\({\"body\": \"a\"}\) has no 'text': give column="),
    ("number.jsonl", b'{"text": 3}\n', "has no text in 'text'"),
    ("latin.txt", b"one\ncaf\xe9", r"latin.txt is not UTF-8 text \(byte 7, line 2\)"),
    ("torn.jsonl.gz", TORN, "not a complete gzip file"),
    ("torn.txt.gz", b"no gzip", "torn.txt.gz is not a complete gzip file"),
    ("photo.png", b"\x89PNG", "holds no .parquet, .jsonl, .txt or .md files"),
]


@pytest.mark.parametrize("name, content, words", DAMAGED)
def test_sources_that_are_damaged(tmp_path, name, content, words):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    for workers in (1, 2) if name == "bad.jsonl" else (1,):
        input_error(words, make_shards, tmp_path / "out", tmp_path / "in", workers)


def test_empty_files_links_without_content_and_columns_of_parquet(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").touch()
    for i, row in enumerate(texts(40)):
        (tmp_path / f"in/b{i}.txt").write_text(row)
    assert make_shards(tmp_path / "out", tmp_path / "in")["documents"] == 40
    (tmp_path / "in/c.txt").symlink_to("../.git/annex/objects/c.txt")
    write_parquet(tmp_path / "a.parquet", ["a"] * 20, column="body")
    write_parquet(tmp_path / "b.parquet", [1] * 20)
    for name, words in (
        ("in", "c.txt is a git-annex link"),
        ("a.parquet", "no text column 'text', only {.*'body': 'string'}"),
        ("b.parquet", "no text column 'text'"),
    ):
        input_error(words, make_shards, tmp_path / "out", tmp_path / name)


def test_disk_and_strange_folders(corpus, tmp_path, monkeypatch):
    _, folders = corpus
    monkeypatch.setattr(T.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    input_error("1e-08 GB are free: make room", make_shards, tmp_path / "full", folders["text"])
    monkeypatch.undo()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.bin").write_bytes(b"mine")
    input_error("made elsewhere", make_shards, tmp_path / "mine", folders["text"])
    assert (tmp_path / "mine/train.bin").read_bytes() == b"mine"
    with open(tmp_path / "mine/.lock", "w") as lock:
        T.fcntl.flock(lock, T.fcntl.LOCK_EX)
        input_error("being made by another job", make_shards, tmp_path / "mine", folders["text"])


# ---- prepare scripts


NO_NETWORK = {"TIKTOKEN_CACHE_DIR": "/nowhere", "HF_HUB_OFFLINE": "1"}


def test_a_users_text_in_one_command(tmp_path):
    book = "\n".join(texts(200))
    (tmp_path / "book.txt").write_text(book)
    options = {"root": str(tmp_path / "book.txt"), "tokenizer": "char"}
    options |= {"out_dir": str(tmp_path / "d"), "workers": 1}
    words = [f"{key}={value}" for key, value in options.items()]
    out, _ = run("data/text/prepare", *words, "val_fraction=0.1", env=NO_NETWORK)
    assert "python train.py dataset=" in out
    meta = T.read_meta(tmp_path / "d")
    assert meta["validation"] == "the end of each document" and meta["synthetic"] is False
    [train] = documents_of(tmp_path / "d", "train")
    [val] = documents_of(tmp_path / "d", "val")
    assert train + val == book and train.endswith("\n") and 0.08 < len(val) / len(book) < 0.12
    input_error("made with val_fraction=0.1", checked, mytext, **options, val_fraction=0.2)
    (tmp_path / "book.txt").write_text(book[::-1])
    checked(mytext, **options, val_fraction=0.1)
    [train] = documents_of(tmp_path / "d", "train")
    assert book[::-1].startswith(train)


def checked(script, **options):
    config = script.Config(**options)
    configurator.check(config)
    script.main(config)


def test_bad_options_of_the_prepare_scripts(tmp_path, offline):  # noqa: F811
    (tmp_path / "book.txt").write_text("\n".join(texts(99)))
    book = str(tmp_path / "book.txt")
    array, empty = str(tmp_path / "array.json"), str(tmp_path / "empty.txt")
    (tmp_path / "array.json").write_text('[{"text": "a"}]')
    (tmp_path / "empty.txt").touch()
    for script, options, words in (
        (mytext, {}, "root= is missing"),
        (mytext, {"root": "/no/such"}, "root=/no/such does not exist"),
        (mytext, {"root": book}, "give its vocab.bpe with bpe=FILE"),
        (mytext, {"root": book, "val_fraction": 2.0}, "val_fraction"),
        (mytext, {"root": array, "tokenizer": "char"}, "array.json may be JSON or text: write"),
        (mytext, {"root": empty, "tokenizer": "char"}, "empty.txt has no text: give another"),
        (mytext, {"root": book, "bpe": "/no/file"}, "/no/file is missing"),
        (mytext, {"root": book, "bpe": book}, "book.txt is not GPT-2's BPE"),
        (mytext, {"root": book, "tokenizer": "/no/set"}, "/no/set does not exist"),
        (mytext, {"root": str(tmp_path), "files": "*.tex"}, r"holds no \*.tex files"),
        (fineweb, {}, "bpe=FILE"),
        (openwebtext, {"workers": -1}, "workers"),
        (shakespeare, {"root": "no/such/file"}, "no/such/file is missing"),
        (pydocs, {"vocab_size": 256}, "vocab_size=256: 256 bytes and end-of-text need 257"),
    ):
        input_error(words, checked, script, **options, out_dir=str(tmp_path / "out"))


def fake_hub(listed, write):
    """A stand-in for T.Hub that lists {name: bytes} and writes a file with `write(name, path)`."""

    class Hub(T.Hub):
        fetched = []

        def _ask(self, method, filename="", **_):
            if method == "dataset_info":
                siblings = [SimpleNamespace(rfilename=n, size=size) for n, size in listed.items()]
                return SimpleNamespace(sha="abc", siblings=siblings)
            self.folder.mkdir(exist_ok=True, parents=True)
            self.fetched.append(filename)
            path = self.folder / Path(filename).name
            write(filename, path)
            return str(path)

    return Hub


@pytest.fixture
def gpt2(monkeypatch):
    """A small tokenizer in the place of GPT-2's."""
    monkeypatch.setattr(T, "gpt2_encoding", lambda bpe="": T.encoding(BYTES))


def test_ready_made_shards(tmp_path, monkeypatch, gpt2):
    """fineweb prebuilt=2: fetched, checked, read with their headers."""

    def write(name, path):
        write_headed(path, np.arange(100) + 50 * ("train" in name))

    names = [f"finewebedu_train_{i:06d}.bin" for i in range(1, 100)]
    hub = fake_hub(dict.fromkeys([*names, "finewebedu_val_000000.bin", "README.md"], 1224), write)
    monkeypatch.setattr(T, "Hub", hub)
    fineweb.main(fineweb.Config(prebuilt=2, out_dir=str(tmp_path / "out")))
    assert complete(tmp_path / "out") and len(hub.fetched) == 3
    train, val = Tokens(tmp_path / "out", "train"), Tokens(tmp_path / "out", "val")
    assert np.array_equal(train.tokens[:], np.tile(np.arange(100) + 50, 2))
    assert np.array_equal(val.windows([90], 10)[0], np.arange(90, 100))


def test_large_sets_from_the_hub_and_from_a_local_copy(tmp_path, monkeypatch, gpt2):
    rows = texts(60)
    sizes = {}
    for i in range(3):
        name = f"sample/10BT/{i:03d}_train.parquet"
        write_parquet(tmp_path / "hub" / name, rows[20 * i : 20 * i + 20])
        sizes[name] = (tmp_path / "hub" / name).stat().st_size
    hub = fake_hub(sizes, lambda name, path: shutil.copy(tmp_path / "hub" / name, path))
    monkeypatch.setattr(T, "Hub", hub)
    monkeypatch.setattr(T.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))

    def make(script, name, **options):
        options |= {"out_dir": str(tmp_path / name), "val_fraction": 0.2, "workers": 1}
        script.main(script.Config(**options))

    make(openwebtext, "local", root=str(tmp_path / "hub"))
    for script, name in ((fineweb, "far"), (openwebtext, "other")):
        hub.fetched.clear()
        for _ in range(2):  # then it is there, and nothing is fetched again
            make(script, name)
        assert files_of(tmp_path / "local") == files_of(tmp_path / name)
        assert hub.fetched == list(sizes)  # one by one,
        assert not list((tmp_path / name / "download").iterdir())  # and removed
    make(fineweb, "some", files=2, keep=True)
    assert hub.fetched[3:] == list(sizes)[:2] and len(list(tmp_path.glob("some/download/*"))) == 2
    meta = T.read_meta(tmp_path / "some")
    assert meta["documents"] == 40 and "abc" in meta["source"]


def test_no_network_is_one_sentence(monkeypatch):
    hub = T.Hub.__new__(T.Hub)
    hub.repo = "nobody/nothing"
    input_error("nobody/nothing could not be fetched from .*root=PATH", hub._ask, "no_such_method")

    def no_route(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_route)
    with pytest.raises(InputError, match=r"cannot be reached \(no route to host\): .*root="):
        shakespeare.get_text("", Path("nowhere"))


def test_shakespeare_from_a_local_copy(tmp_path):
    text = "ROMEO:\nBut soft, what light through yonder window breaks?\n" * 20
    (tmp_path / "input.txt").write_text(text)
    shakespeare.main(shakespeare.Config(root=str(tmp_path), out_dir=str(tmp_path / "char")))
    train = Tokens(tmp_path / "char", "train")
    tokenizer = Tokenizer(tokenizer_state(tmp_path / "char"))
    assert tokenizer.decode([*train.tokens, *Tokens(tmp_path / "char", "val").tokens]) == text
    assert len(train) == int(0.9 * len(text)) and train.vocab_size == len(set(text)) + 1


# ---- data/pydocs

WORDS = ["neuron", "cortex", "sheet", "place", "token", "layer", "signal", "window", "subject"]
WORDS += ["electrode", "sentence", "meaning", "distance", "cluster", "region", "weight"]
SMALL = {"vocab_size": 300, "val_fraction": 0.2, "min_chars": 20}


@pytest.fixture
def modules(tmp_path):
    """80 modules whose docstrings borrow from one another, names changed; one does not parse."""
    rng = random.Random(0)

    def prose():
        return " ".join(rng.choice(WORDS) for _ in range(20)) + "."

    files = []
    paragraphs = []
    (tmp_path / "src").mkdir()
    for i in range(80):
        shared = rng.choice(paragraphs or [prose()])
        a, b, c = prose(), prose(), prose()
        paragraphs += [a, b, c]
        path = tmp_path / f"src/m{i}.py"
        path.write_text(
            f'"""{a}\n\n{shared}\n\n>>> print("code")\ncode\n"""\n'
            f'class C{i}:\n    """{b}\n\n    C{i}: {shared.capitalize()}\n    """\n'
            f'    def f(self):\n        """Args:\n            x_{i}: {c}\n\n'
            '        {placeholder}\n        """\n'
        )
        files.append((f"pkg.m{i}", path))
    torn = tmp_path / "src/torn.py"
    torn.write_text("def (:")
    return [*files, ("pkg.torn", torn)]


def test_the_corpus_does_not_depend_on_order_or_workers(modules, tmp_path):
    written = []
    for workers, files in ((1, modules), (2, modules[::-1])):
        documents, bad = pydocs.read(files, workers)
        assert [Path(path).name for path in bad] == ["torn.py"]
        folder = tmp_path / str(workers)
        pydocs.build(documents, folder, pydocs.Config(workers=workers, **SMALL))
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1] and len(written[0]) == 4


def test_no_text_repeats_within_or_across_splits(modules):
    documents, _ = pydocs.read(modules, 1)
    train, val = pydocs.split(pydocs.clean(documents), 0.2)
    assert len(train) > len(val) > 5
    assert not train.keys() & val.keys()
    seen = set()
    for name, text in (train | val).items():
        assert text.startswith(name + "\n") and "print" not in text and "placeholder" not in text
        for _, piece, words in pydocs.units(text):
            assert len(words) < pydocs.SHORT or words not in seen, piece
            seen.add(words)


def test_docstrings_come_in_source_order_and_what_does_not_parse_is_left_out(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Module."""\nadd_newdoc("a", """\nAttached text.\n""")\n'
        'def f():\n    "First."\n    class G:\n        "Within."\nclass H:\n    "Last."\n'
    )
    texts = []
    for units in pydocs.docstrings(path):
        texts += [piece for _, piece, _ in units]
    assert texts == ["Module.", "Attached text.", "First.", "Within.", "Last."]
    path.write_text('"""torn')
    (tmp_path / "deep.py").write_text("-" * 100_000 + "1")
    (tmp_path / ".#lock.py").symlink_to("nobody@nowhere")
    texts, bad = pydocs.read([(file.stem, file) for file in tmp_path.iterdir()], workers=1)
    assert not texts and len(bad) == 3


def test_what_is_installed_is_found(tmp_path, monkeypatch):
    (tmp_path / "a_copy").mkdir()
    (tmp_path / "a_copy/__init__.py").write_text('"""A package that nobody installed."""')
    monkeypatch.syspath_prepend(tmp_path)
    files, versions, missing = pydocs.sources("yaml a_copy not_a_package")
    paths = dict(files)
    assert missing == ["not_a_package"] and set(versions) == {"python", "PyYAML"}
    assert paths["yaml.loader"].name == "loader.py" and paths["yaml"].name == "__init__.py"
    assert {"json.decoder", "a_copy"} <= paths.keys()
    assert not any("test" in name.split(".") for name in paths)
    topics = pydocs.topics(paths[pydocs.TOPICS])
    assert "boolean" in topics[f"{pydocs.TOPICS}.booleans"].lower()


def test_what_is_there_is_left_alone(modules, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pydocs, "sources", lambda: (modules, {"python": "3"}, []))
    folder = tmp_path / "d"
    config = pydocs.Config(out_dir=str(folder), workers=1, **SMALL)
    pydocs.main(config)
    before = (folder / "meta.yaml").stat().st_mtime_ns
    pydocs.main(config)
    assert "already exists" in capsys.readouterr().out
    assert (folder / "meta.yaml").stat().st_mtime_ns == before
    input_error("overwrite=True", pydocs.main, pydocs.Config(out_dir=str(folder), seed=1, **SMALL))
    (folder / "val.bin").write_bytes(b"torn")
    pydocs.main(config)  # damage is repaired
    assert complete(folder)
