"""The data formats and the prepare scripts: round trips, damage answered with a sentence, a corpus that is deterministic and does not leak."""
import random, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from data.pydocs import prepare as pydocs
from data.shakespeare import prepare as shakespeare
from data.tokens import Tokens, character_state, complete, encode, encoding, read_meta, state_of, tokenizer_state, write_dataset

ROOT = Path(__file__).resolve().parents[1]


# ---- data/tokens.py

@pytest.fixture
def dataset(tmp_path):
    """A folder with prepare.py beside the files, as in data/NAME: 100 tokens of a vocabulary of 6."""
    (tmp_path / "prepare.py").touch()
    ids = np.arange(100) % 5
    write_dataset(tmp_path, {"train": [ids[:60], ids[60:90]], "val": [list(ids[90:])]}, character_state("abcde"), source="made up", synthetic=True)
    return tmp_path


def test_tokens_round_trip(dataset):
    train, val = Tokens(dataset, "train"), Tokens(dataset, "val")
    assert (len(train), len(val), train.vocab_size) == (90, 10, 6)
    assert np.array_equal(np.concatenate([train.tokens, val.tokens]), np.arange(100) % 5)
    windows = train.windows([0, 7, 82], 8)
    assert windows.dtype == np.int64 and np.array_equal(windows, (np.array([[0], [7], [82]]) + np.arange(8)) % 5)
    assert train.meta["source"] == "made up" and train.meta["splits"]["val"]["tokens"] == 10
    assert complete(dataset) and not list(dataset.glob("*.tmp*"))


def test_large_vocabularies_take_four_bytes(tmp_path):
    state = {"name": "large", "pattern": r"[\s\S]", "special_tokens": {"<|endoftext|>": 70_000}, "ranks": "YQ== 0\n"}
    write_dataset(tmp_path, {"train": [[0, 70_000]]}, state)
    assert read_meta(tmp_path)["dtype"] == "uint32" and Tokens(tmp_path, "train").windows([0], 2).tolist() == [[0, 70_000]]


def test_tokenizer_travels_as_plain_text(dataset):
    enc = encoding(tokenizer_state(dataset))
    assert encode(enc, "badcab") == [1, 0, 3, 2, 0, 1] and enc.decode([1, 0, 3]) == "bad" and enc.eot_token == 5
    assert state_of(enc) == tokenizer_state(dataset)
    with pytest.raises(ValueError, match="no character 'é'"):
        encode(enc, "abé")
    with pytest.raises(ValueError, match="not a tokenizer state"):
        encoding({"name": "torn"})


@pytest.mark.parametrize("damage, error, sentence", [
    (lambda d: (d / "train.bin").write_bytes(b""), ValueError, "train.bin is empty; make it with: python .*prepare.py"),
    (lambda d: (d / "train.bin").write_bytes(bytes(100)), ValueError, "train.bin is 100 bytes long where meta.yaml says 180; make it with"),
    (lambda d: (d / "train.bin").unlink(), (FileNotFoundError, ValueError), "train.bin is missing; make it with"),
    (lambda d: (d / "meta.yaml").unlink(), (FileNotFoundError, ValueError), r"no finished token dataset \(no meta.yaml\); make it with"),
    (lambda d: (d / "meta.yaml").write_text("format: tokens-9\n"), ValueError, "has the format 'tokens-9'"),
    (lambda d: (d / "meta.yaml").write_text("format: [tokens-1\n"), ValueError, "meta.yaml is not YAML"),
    (lambda d: (d / "meta.yaml").write_text("format: tokens-1\nvocab_size: 6\n"), ValueError, "lacks the key 'dtype'"),
])
def test_damage_is_named(dataset, damage, error, sentence):
    damage(dataset)
    assert not complete(dataset)
    with pytest.raises(error, match=sentence):
        Tokens(dataset, "train")


def test_ids_and_windows_are_checked(dataset):
    ids = np.memmap(dataset / "train.bin", "<u2", mode="r+")
    ids[41] = 6
    ids.flush()
    train = Tokens(dataset, "train")
    assert train.windows([0, 42], 41).shape == (2, 41)
    with pytest.raises(ValueError, match="train.bin: token id 6 at offset 41 .*overwrite=True"):
        train.windows([0, 40], 10)
    for starts in ([-1], [81]):
        with pytest.raises(ValueError, match="leave its 90 tokens"):
            train.windows(starts, 10)
    with pytest.raises((FileNotFoundError, ValueError), match="no split 'test', only train, val"):
        Tokens(dataset, "test")
    with pytest.raises((FileNotFoundError, ValueError), match="does not exist"):
        Tokens(dataset / "nowhere" / "at all", "train")


def test_nothing_half_written_counts(tmp_path):
    def dies():
        yield [0, 1]
        raise RuntimeError("the machine went down")
    with pytest.raises(RuntimeError):
        write_dataset(tmp_path, {"train": dies()}, character_state("ab"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="do not fit"):
        write_dataset(tmp_path, {"train": [[0, 3]]}, character_state("ab"))
    with pytest.raises(ValueError, match="the val split got no tokens"):
        write_dataset(tmp_path, {"train": [[0]], "val": []}, character_state("ab"))
    assert not complete(tmp_path)


# ---- data/pydocs

WORDS = "neuron cortex sheet place token layer signal window subject electrode sentence meaning distance cluster region weight".split()


def prose(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n)) + "."


@pytest.fixture
def sources(tmp_path):
    """80 modules with docstrings, every fourth paragraph borrowed from another module with its names changed, and one that does not parse."""
    rng, files, paragraphs = random.Random(0), [], []
    for i in range(80):
        shared = rng.choice(paragraphs or [prose(rng, 20)])
        paragraphs += [prose(rng, 20) for _ in range(3)]
        body = f'"""{paragraphs[-1]}\n\n{shared}\n\n>>> print("code")\ncode\n"""\n'
        body += f'class C{i}:\n    """{paragraphs[-2]}\n\n    C{i}: {shared.capitalize()}\n    """\n'
        body += f'    def f(self):\n        """Args:\n            x_{i}: {paragraphs[-3]}\n\n        {{placeholder}}\n        """\n'
        path = tmp_path / "src" / f"m{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(body)
        files.append((f"pkg.m{i}", path))
    path.with_name("torn.py").write_text("def (:")
    return files + [("pkg.torn", path.with_name("torn.py"))]


CONFIG = dict(vocab_size=300, val_fraction=0.2, min_chars=20)


def test_corpus_does_not_depend_on_order_or_workers(sources, tmp_path):
    written = []
    for workers, files in ((1, sources), (2, sources[::-1])):
        texts, bad = pydocs.read(files, workers)
        assert [Path(b).name for b in bad] == ["torn.py"]
        pydocs.build(texts, tmp_path / str(workers), pydocs.Config(workers=workers, **CONFIG))
        written.append({p.name: p.read_bytes() for p in (tmp_path / str(workers)).iterdir()})
    assert written[0] == written[1] and len(written[0]) == 4


def test_nothing_is_said_twice_nor_on_both_sides(sources):
    texts, _ = pydocs.read(sources, 1)
    train, val = pydocs.split(pydocs.clean(texts), 0.2)
    assert len(train) > len(val) > 5 and not {n for n, _ in train} & {n for n, _ in val}
    said = {}
    for side, documents in (("train", train), ("val", val)):
        for name, text in documents:
            assert text.startswith(name + "\n") and "print" not in text and "placeholder" not in text
            for _, piece, words in pydocs.units(text):
                assert len(words) < pydocs.SHORT or words not in said, f"in {side} and {said[words]}: {piece}"
                said[words] = side


def test_docstrings_come_in_source_order(tmp_path):
    path = tmp_path / "m.py"
    path.write_text('"""Module."""\n'
                    'add_newdoc("a", """\nAttached text.\n""")\n'
                    'def f():\n    "First."\n    class G:\n        "Within."\nclass H:\n    "Last."\n')
    assert [" ".join(piece for _, piece, _ in d) for d in pydocs.docstrings(path)] == ["Module.", "Attached text.", "First.", "Within.", "Last."]


def test_tiktoken_encodes_as_tokenizers_does():
    text = "\n\n".join(t for name, t in sorted(pydocs.topics(next(p for n, p in pydocs.sources({})[0] if n == "pydoc_data.topics")).items())[:30])
    bpe = pydocs.learn_bpe([text], 800)
    assert bpe.to_str() == pydocs.learn_bpe([text], 800).to_str()
    enc = encoding(state_of(pydocs.tiktoken_of(bpe, "test")))
    assert enc.n_vocab == 800 and enc.eot_token == 799 and enc.decode([799]) == "<|endoftext|>"
    rng = random.Random(0)
    anything = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(3000))
    for sample in (text[:20_000], "They're 12.5 %  of\n\n    us;\t don't\r\n", "naïve Ωmega 脳 🧠 <|endoftext|> \x00", anything, ""):
        ids = encode(enc, sample)
        assert ids == bpe.encode(sample).ids and enc.decode(ids) == sample


def test_what_is_there_is_left_alone(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pydocs, "sources", lambda: (sources, {"python": "3"}, []))
    config = pydocs.Config(out_dir=str(tmp_path / "d"), workers=1, **CONFIG)
    pydocs.main(config)
    before = (tmp_path / "d" / "meta.yaml").stat().st_mtime_ns
    pydocs.main(config)
    assert "is there already" in capsys.readouterr().out and (tmp_path / "d" / "meta.yaml").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="overwrite=True"):
        pydocs.main(pydocs.Config(out_dir=config.out_dir, **CONFIG | {"seed": 1}))
    (tmp_path / "d" / "val.bin").write_bytes(b"torn")
    pydocs.main(config)  # damage is repaired
    assert complete(tmp_path / "d")


# ---- data/shakespeare

def test_shakespeare_from_a_local_copy(tmp_path):
    text = "ROMEO:\nBut soft, what light through yonder window breaks?\n" * 20
    (tmp_path / "input.txt").write_text(text)
    run = [sys.executable, str(ROOT / "data/shakespeare/prepare.py"), f"root={tmp_path}", f"out_dir={tmp_path / 'char'}"]
    assert "tokens" in subprocess.run(run, check=True, capture_output=True, text=True).stdout
    train, val, enc = Tokens(tmp_path / "char", "train"), Tokens(tmp_path / "char", "val"), encoding(tokenizer_state(tmp_path / "char"))
    assert len(train) == int(0.9 * len(text)) and enc.decode([*train.tokens, *val.tokens]) == text and train.vocab_size == len(set(text)) + 1
    assert "is there already" in subprocess.run(run, check=True, capture_output=True, text=True).stdout


def test_shakespeare_without_network_says_so(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(shakespeare.urllib.request, "urlopen", offline)
    with pytest.raises((FileNotFoundError, ValueError), match=r"not reachable \(no route to host\): .*root=PATH"):
        shakespeare.get_text()
    with pytest.raises((FileNotFoundError, ValueError), match="does not exist: root="):
        shakespeare.get_text("no/such/file")
