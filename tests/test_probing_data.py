"""data/probing/get_data.py on small files in the layouts of their makers, and over a server that
breaks off."""

import io
import json
import tarfile
import zipfile
from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from data import InputError
from data.labelled_texts import LabelledTexts
from data.probing import get_data
from data.probing.get_data import BRYSBAERT, HUB, SENTEVAL, SETS, Config
from data.stimuli import write_tasks
from tests.helpers import real
from tests.helpers import run as run_script
from tests.test_fetch import serve

SEED_KEYS = [  # of the first schema, in their order
    *("data", "name", "link", "topic", "task", "size", "average length", "multiple", "type"),
    *("n_categories", "labels", "language"),
]


def run(folder, root="", sets=(), **options):
    get_data.main(Config(str(folder), list(sets or SETS), str(root), **options))


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def pairs_of(uid):
    lines = ""
    for i in (1, 2):
        pair = {"sentence_good": f"Cats {i} sleep.", "sentence_bad": f"Cats {i} sleeps."}
        lines += json.dumps({**pair, "UID": uid, "linguistics_term": "subject_verb"}) + "\n"
    return lines


# two raw labels for each set of the hub, and what becomes of them
HUB_LABELS = {
    "amazon_polarity": ([0, 1], [0, 1]),
    "app_reviews": ([1, 5], [0.0, 1.0]),
    "humor": ([True, False], [1, 0]),
    "dutch_social": (["neg", "pos"], [0.0, 1.0]),
    "hate_speech18": ([0, 1], [0, 1]),
    "liar": ([5, 3], [0.0, 1.0]),
    "humicroedit": ([0.0, 1.5], [0.0, 0.5]),
    "sst": ([0.25, 0.75], [0.25, 0.75]),
    "tweets_hate_speech": ([0, 1], [0, 1]),
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder of local copies of every set but the grammar."""
    root = tmp_path_factory.mktemp("copies")
    train = 'sentence\tlabel\na "fine" film \t1\na dull film \t0\n'
    dev = "sentence\tlabel\nso-so \t0\n"
    write_zip(root / "SST-2.zip", {"SST-2/train.tsv": train, "SST-2/dev.tsv": dev})
    train = "gj04\t1\t\tHe left.\ngj04\t0\t*\tLeft he has.\nbroken line\n"
    dev = "gj04\t1\t\tShe left.\n"
    write_zip(root / "CoLA.zip", {"CoLA/train.tsv": train, "CoLA/dev.tsv": dev})
    (root / "data/probing").mkdir(parents=True)
    for task in SENTEVAL:
        lines = f"tr\t10\tOne {task} .\nva\t2\tTwo .\nte\t2\tThree .\n"
        (root / f"data/probing/{task}.txt").write_text(lines)
    uids = {f"blimp-master/data/{uid}.jsonl": pairs_of(uid) for uid in ("agr", "bind")}
    write_zip(root / "blimp-master.zip", {**uids, "blimp-master/README.md": "x"})
    words = "Word\tBigram\tConc.M\tConc.SD\nroadsweeper\t0\t4.85\t0.37\nidea\t0\t1.5\t1\n"
    (root / BRYSBAERT).write_text(words)
    files = {"../evil.txt": "x", "/tmp/evil.txt": "x"}
    for split in ("train", "test"):
        files[f"ethics/commonsense/cm_{split}.csv"] = (
            'label,input,is_short,edited\n0,"I fed the cat, twice.",True,False\n'
            f'1,I kicked the cat.,True,False\n1,"A long {split} story.",False,False\n'
        )
    write_tar(root / "ethics.tar", files)
    for name, about in HUB.items():
        for split in about["splits"]:
            texts = [f"first {split} <cats/>", f"second {split} <cats/>"]
            frame = pd.DataFrame({about["text"]: texts, about["label"]: HUB_LABELS[name][0]})
            frame["edit"] = "dogs"
            if name == "hate_speech18":
                frame.loc[2] = ["a relation", 2, ""]
            folder = root / name / about["config"] / split
            folder.mkdir(parents=True)
            frame.to_parquet(folder / "0000.parquet")
    return root


def read(folder, name):
    """(content, {text: label}) of a data-json file, which must hold the schema."""
    content = json.loads((folder / f"{name}.json").read_text())
    assert list(content)[: len(SEED_KEYS)] == SEED_KEYS
    sentences = content["data"]["sentences"]
    labels = content["data"]["labels"]
    assert list(sentences) == list(labels) == [str(i) for i in range(content["size"])]
    return content, dict(zip(sentences.values(), labels.values()))


@pytest.fixture(scope="module")
def made(copies, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    run(folder, copies, [name for name in SETS if name != "grammar"])
    return folder


def test_texts_and_labels(made):
    expected = {
        "sst2": {'a "fine" film': 1, "a dull film": 0, "so-so": 0},
        "cola": {"He left.": 1, "Left he has.": 0, "She left.": 1},
        "senteval_tree_depth": {"One tree_depth .": 1, "Two .": 0, "Three .": 0},
        "concreteness": {"roadsweeper": 0.9625, "idea": 0.125},
        "ethics": {"I fed the cat, twice.": 0, "I kicked the cat.": 1},
    }
    for name, (_, labels) in HUB_LABELS.items():
        noun = "dogs" if name == "humicroedit" else "<cats/>"  # the funny word is put in
        expected[name] = {}
        for split, place in product(HUB[name]["splits"], (0, 1)):
            expected[name][f"{['first', 'second'][place]} {split} {noun}"] = labels[place]
    for name, labels in expected.items():
        assert read(made, name)[1] == labels, name


def test_what_the_files_say_about_themselves(made):
    sst2, _ = read(made, "sst2")
    assert sst2["labels"] == {"0": "Negative", "1": "Positive"} and sst2["n_categories"] == 2
    assert sorted(sst2["data"]["splits"].values()) == ["test", "train", "train"]
    depth, _ = read(made, "senteval_tree_depth")
    assert depth["labels"] == {"0": "2", "1": "10"} and depth["type"] == "Ordinal"
    assert set(depth["data"]["splits"].values()) == {"train", "val", "test"}
    assert len(list(made.glob("senteval_*.json"))) == 10
    concreteness, _ = read(made, "concreteness")
    assert (concreteness["task"], concreteness["n_categories"]) == ("Regression", "inf")
    assert read(made, "dutch_social")[0]["language"] == "Nl"
    assert read(made, "ethics")[0]["size"] == 4  # the short ones of both files
    assert not list(made.glob("**/evil*"))
    pairs, labels = read(made, "blimp_agr")  # minimal pairs stay together
    assert pairs["topic"] == "subject verb" and labels["Cats 1 sleep."] == 1
    groups = dict(zip(pairs["data"]["sentences"].values(), pairs["data"]["groups"].values()))
    assert groups["Cats 1 sleep."] == groups["Cats 1 sleeps."] != groups["Cats 2 sleep."]


def test_probe_reads_what_is_written(made):
    cola = LabelledTexts(made / "cola.json")
    assert cola.kind == "binary" and sorted(cola.split) == ["test", "train", "train"]
    assert dict(cola[i] for i in range(3)) == {"He left.": 1, "Left he has.": 0, "She left.": 1}
    assert LabelledTexts(made / "concreteness.json").kind == "regression"
    assert len(set(LabelledTexts(made / "blimp_agr.json").groups)) == 2
    assert LabelledTexts(made / "senteval_past_present.json").label_names == ["2", "10"]


def test_grammar_is_exported_offline(tmp_path, capsys, monkeypatch):
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(400)], "split": "train"})
    frame = frame.assign(label=["original", "shifted"] * 200, group=frame.index // 2)
    frame.loc[350:, "split"] = "val"
    task = {"frame": frame, "kind": "classification", "labels": ["original", "shifted"]}
    tasks = {name: {**task, "description": name} for name in ("bigram_shift", "tense")}
    write_tasks(tmp_path / "grammar", tasks, synthetic=True)  # a small one in its place
    monkeypatch.setattr(get_data, "HERE", tmp_path / "probing")
    run(tmp_path, sets=["grammar"], max_texts=100)
    content, labels = read(tmp_path, "grammar_bigram_shift")
    assert content["synthetic"] and content["size"] == 100
    assert sorted(labels.values()) == [0] * 50 + [1] * 50
    groups = pd.Series(content["data"]["groups"]).value_counts()
    assert (groups == 2).all()  # both twins, or none
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    capsys.readouterr()
    run(tmp_path, sets=["grammar"], max_texts=100)
    assert "already exists" in capsys.readouterr().out
    (tmp_path / "grammar_tense.json").write_text("{}")  # not what was written: made again
    run(tmp_path, sets=["grammar"], max_texts=100)
    assert "already exists" not in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}


def test_a_missing_set_stops_no_other(copies, tmp_path):
    (tmp_path / "CoLA.zip").write_bytes((copies / "CoLA.zip").read_bytes())
    (tmp_path / "SST-2.zip").write_bytes((copies / "SST-2.zip").read_bytes()[:-30])
    options = ["-data_save_path", tmp_path / "out", f"root={tmp_path}", "sets=sst2,cola,ethics"]
    said, error = run_script("data/probing/get_data", *options, status=2)
    assert "error: sst2, ethics failed" in error and "root=" in error
    assert "SST-2.zip is broken" in said and "nor ethics.tar" in said
    assert "published file has 9,594" in said and read(tmp_path / "out", "cola")


def test_options(capsys):
    with pytest.raises(InputError, match="'nosuch', only grammar"):
        Config(sets=["nosuch"]).check()
    with pytest.raises(InputError, match="root=nosuch is not a folder"):
        Config(root="nosuch").check()
    with pytest.raises(SystemExit, match="2"):
        get_data.arguments(["-data_save_path"])
    assert "needs a folder" in capsys.readouterr().err
    # the folder may be given in three spellings
    for spelling in (["-data_save_path", "a/b"], ["--data_save_path", "a/b"], ["a/b"]):
        assert get_data.arguments([*spelling, "seed=1"]) == ["seed=1", "data_save_path=a/b"]
    rest = ["some.yaml", "--help", "data_save_path=a"]
    assert get_data.arguments(rest) == rest


@pytest.mark.parametrize(
    "name, content, words",
    [
        (BRYSBAERT, b"Wort\tM\na\t1\n", "no column 'Word', only Wort, M"),
        (BRYSBAERT, b"Word\tConc.M\na\t9\nb\t1\n", "the label '2.0' is not a number from 0 to 1"),
        (BRYSBAERT, b"Word\tConc.M\na\tx\nb\t1\nc\t2\n", "the label 'nan' is not a number"),
        (BRYSBAERT, b"Word\tConc.M\na\t2\nb\t2\n", "have the same label"),
        (BRYSBAERT, b"\xff\xfe", "is not UTF-8 text"),
        ("sentence_length.txt", b"xx\t1\tA text.\n", "does not begin with tr, va or te"),
        ("sst/train/0.parquet", b"torn", "0.parquet is broken"),
        ("sources.yaml", b"", "has no Concreteness"),
    ],
)
def test_foreign_files(tmp_path, capsys, name, content, words):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
    sets = {"sentence_length.txt": "senteval", "sst/train/0.parquet": "sst"}
    with pytest.raises(InputError, match="failed"):
        run(tmp_path / "out", tmp_path, [sets.get(name, "concreteness")])
    assert words in capsys.readouterr().out


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    member = tarfile.TarInfo("ethics/commonsense/cm_train.csv")
    member.type = tarfile.SYMTYPE
    member.linkname = "/etc/passwd"
    with tarfile.open(tmp_path / "ethics.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(InputError, match="link or a folder"):
        list(get_data.ethics(tmp_path))


def test_files_as_their_makers_publish_them(tmp_path):
    for name in ("cola", "concreteness", "blimp"):
        run(tmp_path, real(name), [name], max_texts=0)
    cola, labels = read(tmp_path, "cola")
    assert cola["size"] == 9_594 and labels["The sailors rode the breeze clear of the rocks."] == 1
    assert read(tmp_path, "concreteness")[0]["size"] > 39_900
    assert read(tmp_path, "blimp_passive_1")[0]["size"] == 2_000


def test_a_download_is_noted_and_not_asked_for_again(tmp_path, monkeypatch, capsys):
    """data/fetch.py continues and checks it; GitHub's archives have no length and come at once."""
    remote = tmp_path / "remote"
    (remote / "archive").mkdir(parents=True)
    for name in ("file.zip", "archive/master.zip"):
        (remote / name).write_bytes(name.encode() * 100)
    notes = {}
    with serve(remote) as server:
        for name in ("file.zip", "archive/master.zip"):
            path = tmp_path / "downloads" / Path(name).name
            get_data.download(f"{server.url}/{name}", path, notes)
            asked = server.asked
            get_data.download(f"{server.url}/{name}", path, notes)
            assert server.asked == asked and path.read_bytes() == name.encode() * 100
        path.write_bytes(b"other")  # of another version: fetched anew
        get_data.download(f"{server.url}/archive/master.zip", path, notes)
        assert path.read_bytes() == b"archive/master.zip" * 100
        for name in ("none.zip", "archive/none.zip"):
            with pytest.raises(InputError, match="root="):
                get_data.download(f"{server.url}/{name}", tmp_path / "none.zip", notes)
    nowhere = "http://127.0.0.1:9/"
    urls = {"sst2": {"SST-2.zip": nowhere}, "cola": {"CoLA.zip": nowhere}}
    monkeypatch.setattr(get_data, "URLS", urls)
    with pytest.raises(InputError, match="sst2, cola failed .* root="):
        run(tmp_path, sets=["sst2", "cola"])
    assert capsys.readouterr().out.count("cannot be reached") == 2
    assert not list(tmp_path.glob("*.json"))
