"""data/glue, labelled, localizer, docstrings: right labels, and no text or group in two splits."""

import numpy as np
import pandas as pd
import pytest

from data import InputError
from data.docstrings import prepare as docstrings
from data.glue import prepare as glue
from data.labelled import prepare as labelled
from data.localizer import prepare as localizer
from data.stimuli import read_meta, read_task
from data.tokens import state_of, write_dataset
from tests.helpers import byte_tokenizer, prepare, real

# ---- GLUE


def write_tsv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header.replace(",", "\t")] if header else []
    for row in rows:
        lines.append("\t".join(map(str, row)))
    encoding = "utf-8-sig" if "MRPC" in str(path) else "utf-8"
    path.write_text("\n".join(lines) + "\n", encoding=encoding)


def sentence(*number):
    """A sentence of its own for each number."""
    words = np.random.default_rng(number).choice(["the", "cat", "sees", '"', "'tis"], 5)
    return f"{' '.join(words)} {'-'.join(map(str, number))}."


def write_glue(root):
    """A few rows of each of GLUE's nine layouts: official TSV files, two as the hub has them."""
    for s, (split, n) in enumerate({"train": 60, "dev": 20}.items()):
        one = [sentence(s, i) for i in range(n)]
        two = [sentence(s, i, 2) for i in range(n)]
        y = np.arange(n) % 2
        entails = [glue.ENTAILS[label] for label in y]
        acceptable = zip(["gj04"] * n, y, ["*"] * n, one)
        scores = np.arange(n) % 6 / 1.2
        write_tsv(root / f"CoLA/{split}.tsv", "", acceptable)
        write_tsv(root / f"SST-2/{split}.tsv", "sentence,label", zip(one, y))
        header = "Quality,#1 ID,#1 String,#2 String"
        write_tsv(root / f"MRPC/{split}.tsv", header, zip(y, y, one, two))
        rows = [*zip(y, one, two, y), (7, "How?")]  # the last is a broken line
        write_tsv(root / f"QQP/{split}.tsv", "id,question1,question2,is_duplicate", rows)
        write_tsv(root / f"STS-B/{split}.tsv", "sentence1,sentence2,score", zip(one, two, scores))
        header = "index,question,sentence,label"
        write_tsv(root / f"QNLI/{split}.tsv", header, zip(y, one, two, entails))
        table = pd.DataFrame({"sentence1": one, "sentence2": two, "label": y})
        part = "validation" if split == "dev" else split
        for name in ("rte", "wnli"):
            (root / name).mkdir(exist_ok=True)
            table.to_parquet(root / name / f"{part}-00000-of-00001.parquet")
    names = ["entailment", "neutral", "contradiction"]
    for k, (part, n) in enumerate({"train": 60, "dev_matched": 20, "dev_mismatched": 20}.items()):
        rows = [[i, sentence(9, k, i // 3), sentence(9, k, i, 1), names[i % 3]] for i in range(n)]
        write_tsv(root / "MNLI" / f"{part}.tsv", "index,sentence1,sentence2,gold_label", rows)
    dev = (root / "SST-2/dev.tsv").read_text().split("\n")
    with open(root / "SST-2/train.tsv", "a") as file:
        file.write("\n".join(dev[1:4]) + "\n")  # sentences of the development set in training


@pytest.fixture(scope="module")
def glue_folders(tmp_path_factory):
    """(root of the files, the dataset made of them in two steps)."""
    folder = tmp_path_factory.mktemp("glue")
    write_glue(folder / "files")
    options = {"root": folder / "files", "out_dir": folder / "glue", "val": 6}
    prepare(glue, **options, tasks=["cola", "mnli"])
    prepare(glue, **options)  # the rest is added
    return folder / "files", folder / "glue"


def test_glue_as_it_is_handed_out(glue_folders, capsys):
    root, folder = glue_folders
    meta = read_meta(folder)
    assert list(meta["tasks"]) == list(glue.GLUE)
    for name, entry in meta["tasks"].items():
        sizes = entry["sizes"]
        texts = read_task(folder, name)["text"]
        assert sizes["test"] == (40 if name == "mnli" else 20) and 1 <= sizes["val"] <= 6, name
        assert sum(sizes.values()) == sizes["test"] + 60, name
        assert entry["kind"] == ("regression" if name == "stsb" else "classification")
        assert set(texts.str.count("\t")) == {0 if name in ("cola", "sst2") else 1}
    mnli = read_task(folder, "mnli")
    assert set(mnli["set"][mnli["split"] == "test"]) == {"matched", "mismatched"}
    assert mnli[mnli["split"] != "test"].groupby("group")["split"].nunique().max() == 1
    for name in ("cola", "rte"):
        table = read_task(folder, name).set_index("text")
        text = " ".join(sentence(0, 3).split())
        if name == "rte":
            text += "\t" + " ".join(sentence(0, 3, 2).split())
        assert table["y"][text] == 1
    scores = read_task(folder, "stsb").set_index("text")["y"]
    assert scores.loc[scores.index.str.contains(" 0-4.\t")].tolist() == [4 / 1.2]
    prepare(glue, root=root, out_dir=folder, val=6)
    assert "already" in capsys.readouterr().out


def test_what_glue_leaves_out_is_counted(glue_folders, tmp_path, capsys):
    root, _ = glue_folders
    prepare(glue, root=root, out_dir=tmp_path, tasks=["sst2", "qqp"])
    sst2, qqp = capsys.readouterr().out.split("\n")[:2]
    assert "3 training texts" in sst2 and "0 texts that are broken" in sst2
    assert "0 training texts" in qqp and "2 texts that are broken" in qqp


def test_hidden_labels_and_scores_that_are_no_numbers_are_counted(tmp_path, capsys):
    rows = [["gj04", i % 2, "", sentence(i)] for i in range(60)]
    write_tsv(tmp_path / "CoLA/train.tsv", "", rows)
    write_tsv(tmp_path / "CoLA/dev.tsv", "", [["gj04", -1, "", sentence(i, 1)] for i in range(20)])
    for k, split in enumerate(("train", "dev")):
        scores = ["nan" if i % 10 == 4 else i % 5 for i in range(60)]
        rows = [[sentence(k, i), sentence(k, i, 2), scores[i]] for i in range(60)]
        write_tsv(tmp_path / f"STS-B/{split}.tsv", "sentence1,sentence2,score", rows)
    prepare(glue, root=tmp_path, out_dir=tmp_path / "out", tasks=["cola", "stsb"])
    cola, stsb = capsys.readouterr().out.split("\n")[:2]
    assert "20 texts that are broken or have unknown labels" in cola
    assert "test" not in read_meta(tmp_path / "out")["tasks"]["cola"]["sizes"]
    assert "12 texts that are broken" in stsb
    assert np.isfinite(read_task(tmp_path / "out", "stsb")["y"]).all()


def test_what_is_no_glue_is_named(tmp_path):
    (tmp_path / "RTE").mkdir()
    for file, sentence in (
        ("none", "has neither RTE/train.tsv nor rte/train-.*parquet"),
        ("train.tsv", "nor rte/validation"),
        ("dev.tsv", "no column 'sentence2', only index"),
    ):
        (tmp_path / "RTE" / file).write_text("index\tsentence1\tlabel\n0\ta\tentailment\n")
        with pytest.raises(InputError, match=sentence):
            prepare(glue, root=tmp_path, tasks=["rte"], out_dir=tmp_path / "x")
    with pytest.raises(InputError, match="is not a folder"):
        prepare(glue, root=tmp_path / "none")


def test_cola_as_its_authors_release_it(tmp_path):
    for part, n in {"in_domain_train": 60, "in_domain_dev": 10, "out_of_domain_dev": 6}.items():
        rows = [["gj04", i % 2, "*" * (1 - i % 2), f"{part} {i}."] for i in range(n)]
        write_tsv(tmp_path / f"{part}.tsv", "", rows)
    prepare(glue, root=tmp_path, out_dir=tmp_path / "out", tasks=["cola"])
    table = read_task(tmp_path / "out", "cola")
    sets = table[table["split"] == "test"]["set"].value_counts()
    assert sets.to_dict() == {"in_domain": 10, "out_of_domain": 6}
    prepare(glue, root=real("cola"), out_dir=tmp_path / "real", tasks=["cola"])
    sizes = read_meta(tmp_path / "real")["tasks"]["cola"]["sizes"]
    assert sizes == {"train": 7680, "val": 853, "test": 1043}  # 18 of 8,551 are in both


RATED = "Word\tConc.M\tDom_Pos\n" + "".join(
    f"{word}\t{i / 10}\t{'Noun' if i % 2 else '#N/A'}\n"
    for i, word in enumerate(["null", "NA", "007", "Ice-cream", "ice cream", *"abcdefghijklmno"])
)


def test_ratings_are_a_regression_and_words_stay_words(tmp_path, capsys):
    path = tmp_path / "rated.txt"
    path.write_text(RATED.replace("\n", "\r\n") + "nothing\t\tNoun\r\n")
    options = {"text": "Word", "label": "Conc.M", "by": "Dom_Pos", "out_dir": tmp_path / "out"}
    prepare(labelled, root=path, **options)
    table = read_task(tmp_path / "out", "label")
    assert table["text"][:3].tolist() == ["null", "NA", "007"] and len(table) == 20
    assert table["y"].tolist() == [i / 10 for i in range(20)]
    assert table["group"][3] == table["group"][4]
    assert set(table["split"]) == {"train", "val", "test"}
    assert "1 rows left out" in capsys.readouterr().out
    conditions = pd.read_csv(tmp_path / "out/conditions.csv", keep_default_na=False)
    counts = conditions["condition"].value_counts().to_dict()
    assert counts == {"low #N/A": 3, "low Noun": 2, "high Noun": 3, "high #N/A": 2}
    path.write_text(RATED.replace("null\t0.0", "null\t0.7"))
    for said in ("another version of its sources", "already exists"):
        prepare(labelled, root=path, **options)
        assert said in capsys.readouterr().out
    assert read_task(tmp_path / "out", "label")["y"][0] == 0.7


def test_classes_with_few_texts_are_left_out(tmp_path):
    path = tmp_path / "classes.csv"
    rows = [f"word{i},{'animal' if i % 2 else 'food'}\n" for i in range(40)] + ["x,car\n"]
    path.write_text("text,label\n" + "".join(rows))
    prepare(labelled, root=path, out_dir=tmp_path / "out")
    assert read_meta(tmp_path / "out")["tasks"]["label"]["labels"] == ["animal", "food"]
    assert set(read_task(tmp_path / "out", "label")["label"]) == {"animal", "food"}
    binary = tmp_path / "binary.csv"
    binary.write_text("text,label\n" + "".join(f"word{i},{i % 2}\n" for i in range(40)))
    prepare(labelled, root=binary, out_dir=tmp_path / "binary")
    assert read_meta(tmp_path / "binary")["tasks"]["label"]["labels"] == ["0", "1"]
    for options, sentence in (
        ({"text": "Word"}, "no column 'Word', only text, label"),
        ({"root": tmp_path / "none.csv"}, "does not exist: give a table"),
        ({"val": 0.6, "test": 0.5}, "val=0.6"),
        ({"out_dir": path / "set"}, "classes.csv is a file: give a folder"),
    ):
        with pytest.raises(InputError, match=sentence):
            prepare(labelled, **{"root": path, "out_dir": tmp_path / "x", **options})


def test_real_ratings_and_concepts(tmp_path):
    path = real("concreteness") / "Concreteness_ratings_Brysbaert_et_al_BRM.txt"
    prepare(labelled, root=path, text="Word", label="Conc.M", out_dir=tmp_path / "words")
    table = read_task(tmp_path / "words", "label")
    assert len(table) == 39_954 and {"null", "true", "none"} <= set(table["text"])
    path = real("things_concepts") / "things_concepts.tsv"
    label = "Top-down Category (WordNet)"
    prepare(labelled, root=path, text="Word", label=label, out_dir=tmp_path / "things")
    table = read_task(tmp_path / "things", "label")
    assert len(table) == 944 and table["label"].value_counts()["animal"] == 131


WORDS = ["user", "file", "child", "dog", "window", "garden", "reader", "office", "letter", "model"]


def test_localizer_conditions_share_their_words():
    sentences = set()
    for a, b, c in zip(np.repeat(WORDS, 10), WORDS * 10, np.roll(WORDS * 10, 3)):
        sentences.add(("the", str(a), "saw", "every", b, "in", "a", str(c)))
    table = localizer.make(sentences, 30, 0)
    assert table.equals(localizer.make(sentences, 30, 0))
    assert not table.equals(localizer.make(sentences, 30, 1))
    kinds = table.groupby("condition")["text"].apply(list)
    assert sorted(" ".join(kinds["sentences"]).split()) == sorted(" ".join(kinds["words"]).split())
    real = {"saw", *WORDS, *localizer.FUNCTION}
    for words in localizer.LISTS.values():
        real |= set(words.split())
    assert not real & set(" ".join(kinds["nonwords"]).split())
    for spoken, jabberwocky in zip(kinds["sentences"], kinds["jabberwocky"]):
        kept = [word for word in jabberwocky.split() if word in real]
        assert kept == [word for word in spoken.split() if word in localizer.FUNCTION]
    assert [len(kinds[kind]) for kind in localizer.LISTS] == [40] * 4


def document(package, number, rng):
    """A module's docstring in bytes: six sentences with code, one with a package's name, a list."""
    paragraphs = [f"{package}.m{number}"]
    for digit in rng.integers(0, 10, 6):
        tail = " ".join(rng.choice(list("klmnop"), 6))
        paragraphs.append(
            f"The value of `some_code(x)` number is returned to whoever asks for it in module "
            f"{'abcdefghij'[digit]}{digit}, {tail}."
        )
    paragraphs.append(f"This one says {package} and goes, as every one that says such a name must.")
    paragraphs.append("Parameters\n----------\nx : int\n    The argument.")
    return [*byte_tokenizer().encode_ordinary("\n\n".join(paragraphs) + "\n"), 256]


def test_docstrings_of_a_small_corpus(tmp_path, capsys):
    """Areas are balanced, documents apart, names and code out, test is what pydocs holds out."""
    rng = np.random.default_rng(1)
    packages = [names.split()[0] for names in docstrings.AREAS.values()]
    packages[-1] = "setuptools"
    splits = {"train": [], "val": []}
    for package in packages:
        splits["train"] += [document(package, i, rng) for i in range(20)]
        splits["val"] += [document(package, 100 + i, rng) for i in range(4)]
    write_dataset(tmp_path / "pydocs", splits, state_of(byte_tokenizer()), synthetic=True)
    options = {"pydocs": tmp_path / "pydocs", "val": 5, "test": 20}
    prepare(docstrings, **options, train=20, out_dir=tmp_path / "doc")
    assert "8 areas" in capsys.readouterr().out
    table = read_task(tmp_path / "doc", "area")
    counts = table.groupby(["label", "split"]).size().unstack()
    assert (counts[["train", "val", "test"]] == [20, 5, 20]).all().all()
    assert table.groupby("group")["split"].nunique().max() == 1
    for module in table["group"][table["split"] == "test"]:
        assert int(module.split(".m")[1]) >= 100
    assert not table["text"].str.contains("|".join(packages) + "|some_code|Parameters").any()
    assert table["text"].str.contains("value of _ number").all()
    assert "validation documents" in read_meta(tmp_path / "doc")["seen"]
    with pytest.raises(InputError, match="smaller train="):
        prepare(docstrings, **options, train=1000, out_dir=tmp_path / "x")
