"""data/stimuli.py: datasets are read as they were written, and bad input is refused."""

import json

import numpy as np
import pandas as pd
import pytest

from data import InputError, read_text
from data.stimuli import (
    Encoding,
    complete,
    complete_encoding,
    read_meta,
    read_pairs,
    read_task,
    write_encoding,
    write_tasks,
)
from tests.helpers import real


def table(**changes):
    columns = {
        "split": ["train"] * 4 + ["test"] * 2,
        "label": list("ababab"),
        "text": ["One, two", 'Say "x"', "None", "nan", "é\nf", "six"],
        "group": [0, 0, 1, 1, 2, 2],
        "extra": ["", "007", "NA", "3", "4", "5"],
    }
    return pd.DataFrame(columns | changes)


def task(frame, kind="classification", labels=("a", "b")):
    return {"t": {"frame": frame, "kind": kind, "labels": labels, "description": "made up"}}


BLIMP = {"sentence_good": "Mary can help herself.", "sentence_bad": "Mary can help himself."}
BLIMP |= {"one_prefix_prefix": "Mary can help", "UID": "anaphor_gender_agreement", "pairID": "0"}
BLIMP |= {"field": "morphology", "linguistics_term": "anaphor_agreement", "simple_LM_method": True}


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tasks_round_trip(tmp_path):
    frame = table()
    numbers = table(label=[0.5, 1, 2, -3e-3, 4, 0.1 + 0.2])
    tasks = task(frame[["extra", "text", "group", "split", "label"]])
    tasks["r"] = task(numbers, "regression")["t"]
    meta = write_tasks(tmp_path, tasks, {"u": [BLIMP | {"UID": "u"}]}, synthetic=True)
    read = read_task(tmp_path, "t")
    assert list(read) == ["split", "label", "text", "group", "extra", "y"]
    assert read["y"].tolist() == [0, 1, 0, 1, 0, 1] and read["y"].dtype == np.int64
    for column in frame:
        assert read[column].tolist() == frame[column].astype(str).tolist()
    assert read_task(tmp_path, "r")["y"].tolist() == numbers["label"].tolist()
    assert read_meta(tmp_path)["tasks"]["r"]["chance"] == 0
    entry = read_meta(tmp_path)["tasks"]["t"]
    assert entry == meta["tasks"]["t"] and entry["chance"] == 0.5
    assert entry["sizes"] == {"train": 4, "test": 2}
    assert complete(tmp_path) and not list(tmp_path.rglob("*.tmp*"))
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text().replace("six", "sax"))
    assert not complete(tmp_path)
    write_tasks(tmp_path, task(frame), {"v": [BLIMP]})
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["v.jsonl"]  # the old one went
    (tmp_path / "meta.yaml").unlink()  # somebody's own folder
    write_tasks(tmp_path, task(frame))
    assert (tmp_path / "pairs/v.jsonl").exists() and not read_meta(tmp_path)["pairs"]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"text": ["x", " ", "y", "z", "u", "v"]}, "t.csv, line 3: the text ' ' is empty"),
        ({"label": list("ababac")}, r"t.csv, line \d: the label 'c' is none of a, b"),
        ({"split": ["train"] * 5 + ["dev"]}, r"line \d: the split 'dev' is none of train, val"),
        ({"group": [0, 0, 1, 1, 1, 2]}, "the group '1' is in test and in train, but must stay"),
        ({"text": ["x", "w", "y", "z", "u", "x"]}, "the text 'x' is in test and in train"),
        ({"label": list("aaaaab")}, "have only the label 'a', but two are needed"),
    ],
)
def test_what_a_task_must_not_have(tmp_path, changes, sentence):
    write_tasks(tmp_path, task(table()))
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=sentence):
        write_tasks(tmp_path, task(table(**changes)))
    assert before == files_of(tmp_path)
    table(**changes).to_csv(tmp_path / "t.csv", index=False)  # and a reader finds it, too
    with pytest.raises(InputError, match=sentence):
        read_task(tmp_path, "t")


@pytest.mark.parametrize(
    "file, content, sentence",
    [
        ("t.csv", "split,label,text,group\ntrain,a,x,0\ntrain,b,y\n", "line 3: .*3 fields"),
        ("t.csv", 'split,label,text,group\ntrain,a,"x,0\n', "t.csv, line 2: not CSV"),
        ("t.csv", "split,label,text\n", "t.csv has no column 'group'"),
        ("t.csv", "split,label,text,text\n", "t.csv, line 1: the header names a column twice"),
        ("t.csv", "\0", "t.csv is no plain text"),
        ("t.csv", None, "t.csv is missing; make it with: python .*prepare.py"),
        ("meta.yaml", None, r"holds no finished stimuli \(no meta.yaml\); make it with"),
        ("meta.yaml", "format: tokens-1\n", "'tokens-1', not 'stimuli-1'; make it"),
        ("meta.yaml", "[torn", "meta.yaml is not YAML"),
        ("meta.yaml", "format: stimuli-1\ntasks: {t: {file: t.csv}}\n", "'t' lacks the key 'kind'"),
    ],
)
def test_damage_is_named(tmp_path, file, content, sentence):
    write_tasks(tmp_path, task(table()))
    (tmp_path / "prepare.py").touch()
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    assert not complete(tmp_path)
    with pytest.raises(InputError, match=sentence):
        read_task(tmp_path, "t")


def test_unknown_tasks_kinds_and_folders_are_named(tmp_path):
    write_tasks(tmp_path, task(table()))
    with pytest.raises(InputError, match="has no task 'tense', only t"):
        read_task(tmp_path, "tense")
    with pytest.raises(InputError, match="nowhere does not exist"):
        read_task(tmp_path / "nowhere", "t")
    cases = [
        (task(table().drop(columns="group")), "task 't' has no column 'group'"),
        (task(table(), "ranking"), "the kind 'ranking' is neither classification nor"),
    ]
    for label in ("high", "nan", "inf", ""):
        numbers = table(label=["1", label, "2", "3", "4", "5"])
        cases.append((task(numbers, "regression"), r"the label '\w*' is not a number"))
    for tasks, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            write_tasks(tmp_path, tasks)


def test_older_tables_are_read_as_latin_1(tmp_path, capsys):
    write_tasks(tmp_path, task(table()))
    content = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_bytes(content.encode("latin-1"))
    assert read_task(tmp_path, "t")["text"][4] == "é\nf"
    assert "t.csv is not UTF-8" in capsys.readouterr().out
    (tmp_path / "t.csv").write_bytes(content.encode("utf-8-sig"))
    assert read_task(tmp_path, "t")["text"][4] == "é\nf" and not capsys.readouterr().out
    (tmp_path / "quote.txt").write_bytes(b"\x93caf\xe9\x94")
    assert read_text(tmp_path / "quote.txt") == "“café”"


def test_blimp_files_are_read(tmp_path):
    two = json.dumps(BLIMP) + "\n" + json.dumps(BLIMP | {"pairID": "1"}) + "\n"
    (tmp_path / "a.jsonl").write_text(two)
    (tmp_path / "b.jsonl").write_text('{"sentence_good": "It is.", "sentence_bad": "It are."}')
    pairs = read_pairs(tmp_path)
    assert list(pairs) == ["anaphor_gender_agreement", "b"]
    assert pairs["anaphor_gender_agreement"][1]["pairID"] == "1"
    assert read_pairs(tmp_path / "a.jsonl")["anaphor_gender_agreement"][0] == BLIMP
    pairs = read_pairs(real("blimp"))
    assert len(pairs) == 8 and {len(members) for members in pairs.values()} == {1000}
    assert set(pairs) == {path.stem for path in real("blimp").iterdir()}


@pytest.mark.parametrize(
    "name, lines, sentence",
    [
        ("", [], "holds no minimal pairs .*make it with: python .*prepare.py"),
        ("none", [], "none is missing"),
        ("c.jsonl", [], "c.jsonl is missing"),
        ("", [BLIMP, "{torn"], "b.jsonl, line 2: JSONDecodeError"),
        ("", [BLIMP, {"sentence_good": "It is."}], "line 2: KeyError.'sentence_bad'"),
        ("", [BLIMP, BLIMP | {"sentence_good": " "}], "line 2: .*an empty sentence_good"),
        ("", [BLIMP, [1]], "line 2: .*a minimal pair is a JSON object"),
    ],
)
def test_what_holds_no_pairs_is_named(tmp_path, name, lines, sentence):
    (tmp_path / "prepare.py").touch()
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    if texts:
        (tmp_path / "b.jsonl").write_text("\n".join(texts))
    with pytest.raises(InputError, match=sentence):
        read_pairs(tmp_path / name)


ABOUT = {"modality": "fMRI", "species": "human", "source": "made up", "synthetic": True}


def test_responses_round_trip(tmp_path):
    y = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    stimuli = pd.DataFrame({"text": ["null", "b", "007"], "group": ["x", "x", "NA"]})
    presentations = pd.DataFrame({"stimulus": [0, 1, 2, 2, 1, 0]})
    units = pd.DataFrame({"roi": list("aabb"), "subject": list("mnmn"), "ceiling": [0.3, "", 1, 0]})
    write_encoding(tmp_path, stimuli, y, presentations, units, **ABOUT, labels=["x"])
    data = Encoding(tmp_path)
    assert data.inputs() == ["null", "b", "007"] and data.kind == "text"
    assert data.stimuli["group"].tolist() == ["x", "x", "NA"]
    assert np.array_equal(data.responses, y) and data.meta["labels"] == ["x"]
    assert data.presentations["repeat"].tolist() == [0, 0, 0, 1, 1, 1]
    assert data.units["ceiling"][0] == 0.3 and np.isnan(data.units["ceiling"][1])
    assert np.allclose(data.mean_responses()[1], (y[1] + y[4]) / 2)
    chosen = data.select_units(subject="n", roi="b")
    assert chosen.tolist() == [False, False, False, True]
    assert np.allclose(data.mean_responses(chosen)[:, 0], data.mean_responses()[:, 3])
    with pytest.raises(InputError, match="no units of roi=c: it has a, b"):
        data.select_units(roi="c")
    assert complete_encoding(tmp_path)
    with open(tmp_path / "responses.npy", "r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(np.nan).tobytes())
    assert not complete_encoding(tmp_path)
    with pytest.raises(InputError, match="unit 3 in presentation 5 is nan"):
        Encoding(tmp_path)
    (tmp_path / "responses.npy").write_bytes(b"torn")
    with pytest.raises(InputError, match="responses.npy is not a NumPy array"):
        Encoding(tmp_path)


def test_equal_texts_are_of_one_group_and_images_must_be_there(tmp_path):
    stimuli = pd.DataFrame({"text": ["One.", "two", "one", "T W O!", "six"]})
    write_encoding(tmp_path, stimuli, np.ones((5, 2)), **ABOUT)
    assert Encoding(tmp_path).stimuli["group"].tolist() == ["one", "two", "one", "two", "six"]
    stimuli.assign(group=list("abccd")).to_csv(tmp_path / "stimuli.csv", index=False)
    assert Encoding(tmp_path).stimuli["group"].tolist() == list("abccd")  # as given
    images = pd.DataFrame({"file": ["a.png", "a.png", "A.png"]})
    write_encoding(tmp_path, images, np.ones((3, 2)), **ABOUT)
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match="A.png is missing"):
        Encoding(tmp_path)
    (tmp_path / "A.png").touch()
    data = Encoding(tmp_path)
    assert data.inputs() == [tmp_path / name for name in images["file"]]
    assert data.stimuli["group"].tolist() == images["file"].tolist()


TORN = {"text": list("abc"), "group": list("ggh"), "split": ["train", "test", "test"]}


@pytest.mark.parametrize(
    "part, value, sentence",
    [
        ("stimuli", {"text": ["a", "", "c"]}, "line 3: the text '' is empty"),
        ("stimuli", {"word": list("abc")}, "no column 'text' or 'file', only word"),
        ("stimuli", TORN, "the group 'g' is in test and in train"),
        ("stimuli", TORN | {"split": ["dev"] * 3}, "the split 'dev' is none of"),
        ("stimuli", TORN | {"split": ["train", "train", ""]}, "the split '' is none of"),
        ("responses", np.full((3, 2), np.nan), "unit 0 in presentation 0 is nan"),
        ("responses", np.zeros((3, 2), int), "floats, 3 presentations x 2 units"),
        ("presentations", {"stimulus": [0, 1, 3]}, "stimulus .of 3. and repeat count from 0"),
        ("presentations", {"stimulus": [0, 1, 1]}, "1 were never presented"),
        ("presentations", {"stimulus": [0, 1, "x"]}, "count from 0"),
        ("units", {"ceiling": [0.5, 2]}, "between 0 and 1"),
        ("units", {"ceiling": [0.5, "high"]}, "between 0 and 1"),
    ],
)
def test_what_responses_must_not_have(tmp_path, part, value, sentence):
    parts = {"stimuli": pd.DataFrame({"text": list("abc")}), "responses": np.ones((3, 2))}
    parts[part] = value if part == "responses" else pd.DataFrame(value)
    with pytest.raises(InputError, match=sentence):
        write_encoding(tmp_path, **parts, **ABOUT)
    assert not list(tmp_path.iterdir())
