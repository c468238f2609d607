"""data/words_brains: tables of words and responses in all the forms that people use."""

import numpy as np
import pandas as pd
import pytest

from data import InputError
from data.stimuli import Encoding
from data.words_brains import prepare as words_brains
from tests.helpers import prepare, real

ROWS = "nan 0.5 -1\nnull 0.25 2\n007 1e-3 3\nApple 1 4\n"
QUOTED = '"v0" "v1"\n"nan" 0.5 -1\n"null" 0.25 2\n"007" 1e-3 3\n"Apple" 1 4\n'


def read(tmp_path, content, name="table.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return words_brains.read_table(path)


def make(tmp_path, tables, **options):
    """Prepare tables {file name: content} and return their Encoding."""
    folder = tmp_path / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tables.items():
        (folder / name).write_text(content)
    prepare(words_brains, root=folder, out_dir=tmp_path / "out", **options)
    return Encoding(tmp_path / "out")


NAMED = "word v0 v1\n" + ROWS


@pytest.mark.parametrize(
    "content",
    [
        NAMED,
        NAMED.replace(" ", "\t"),
        NAMED.replace(" ", ",").replace("\n", "\r\n"),
        "v0 v1\n" + ROWS,  # no name for the column of words
        "word 12 40\n" + ROWS,  # numbers of voxels
        ROWS,
        QUOTED,
        "\ufeffword v0 v1\n\n" + ROWS.replace(" ", "   "),
        NAMED.replace("\n", "\r"),
        NAMED.replace(" ", ";").replace(".", ","),
        ",0,1\n" + ROWS.replace(" ", ","),
    ],
)
def test_words_stay_words_in_every_layout(tmp_path, content):
    table = read(tmp_path, content)
    assert table.index.tolist() == ["nan", "null", "007", "Apple"]
    assert table.to_numpy().tolist() == [[0.5, -1], [0.25, 2], [0.001, 3], [1, 4]]


def test_headers_that_do_not_fit_and_words_of_several_words(tmp_path, capsys):
    for n_fields, header in ((2, "word v0"), (4, "word v0 v1 v2"), (5, "word v0 v1 v2 v3")):
        table = read(tmp_path, f"{header}\n{ROWS}")
        assert table.columns.tolist() == ["v0", "v1"] and len(table) == 4
        out = capsys.readouterr().out
        assert f"the header has {n_fields} fields and every row has 3" in out
    assert read(tmp_path, "bread 5 3 9\nring 1 2 2\n").index.tolist() == ["bread", "ring"]
    assert read(tmp_path, "word\tv0\nice cream\t1.5\nTV\t2\n").index[0] == "ice cream"
    assert read(tmp_path, 'word,v0\n"yes, sir",0.1\nno,2\n').index[0] == "yes, sir"
    assert read(tmp_path, "word,v0\ncafe\u0301,0.1\n").index[0] == "café"


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("word v0 v1\na 1.5 2\nice cream 1 2\n", "line 3: 4 fields, but 3 in line 2"),
        ("word v0 v1\na 1.5 2\nb 1\n", "line 3: 2 fields"),
        ("word v0\na 1.5\nb high\n", "line 3: the response 'high' is not a number"),
        ("word v0\na 1,5\n", "line 2: .*'1,5' is not a number.*decimal points"),
        ("id,word,v0\n0,a,1.5\n", "'a' is not a number.*the word comes first"),
        ("waa 3 7 12\nb 4 4 4\n", "'waa 3 7 12' may be a header or a row: begin a header with"),
        ("word\tv0\n\t1.5\n", "line 2: the first column, the word, is empty"),
        ("word v0 v1\n", "holds no words"),
        ("", "holds no words"),
        (b"\xff\xfew\x00o\x00", "zero bytes"),
    ],
)
def test_what_is_no_table_is_refused_with_the_line(tmp_path, content, sentence):
    with pytest.raises(InputError, match=sentence):
        read(tmp_path, content)


def table(words, seed, n_units=3):
    values = np.random.default_rng(seed).normal(size=(len(words), n_units))
    columns = [f"v{i}" for i in range(n_units)]
    return pd.DataFrame(values, list(words), columns).to_csv(sep=" ", index_label="word")


WORDS = ["Apple", "apple", "it's", "its", "bread", "ring"]


def test_people_share_words_and_keep_their_units(tmp_path, capsys):
    tables = {
        "scaled_targets_M03.txt": table(WORDS, 0),
        "scaled_targets_M15.txt": table(WORDS[::-1], 1, n_units=2),  # in another order
    }
    data = make(tmp_path, tables, modality="fMRI")
    out = capsys.readouterr().out
    assert "6 stimuli, 6 presentations, 5 units" in out and "M03, M15; 4 groups of words" in out
    assert data.units.subject.unique().tolist() == ["M03", "M15"]
    assert data.meta["modality"] == "fMRI" and data.stimuli.text.tolist() == WORDS
    assert data.stimuli.group.tolist() == ["apple", "apple", "its", "its", "bread", "ring"]
    m15 = data.mean_responses(data.select_units(subject="M15"))
    source = words_brains.read_table(tmp_path / "tables/scaled_targets_M15.txt")
    assert np.allclose(m15, source.loc[WORDS], atol=1e-6)
    assert data.units.column.tolist() == ["v0", "v1", "v2", "v0", "v1"]
    with pytest.raises(InputError, match="no units of subject=M1: it has M03, M15"):
        data.select_units(subject="M1")


def test_one_person_of_a_folder(tmp_path, capsys):
    tables = {"a_1.txt": table(WORDS, 0), "a_2.txt": table(WORDS, 1)}
    assert set(make(tmp_path, tables, people=["2"]).units.subject) == {"2"}
    make(tmp_path, tables, people=["2"])
    assert "there already" in capsys.readouterr().out
    for people, tables_now, sentence in (
        ([], tables, "made with people=.*overwrite=True"),
        (["2"], {"a_2.txt": table(WORDS, 5)}, "made with tables="),  # other numbers
        (["3"], tables, "no table of 3, only of 1, 2"),
    ):
        with pytest.raises(InputError, match=sentence):
            make(tmp_path, tables_now, people=people)


def test_different_words_are_refused_or_counted(tmp_path, capsys):
    tables = {"a_1.txt": table(WORDS, 0), "a_2.txt": table([*WORDS[1:], "salt"], 1)}
    with pytest.raises(InputError, match="'Apple' .* table of 1 but not.*words=shared for the 5"):
        make(tmp_path, tables)
    data = make(tmp_path, tables, words="shared")
    assert data.stimuli.text.tolist() == WORDS[1:]
    assert "1: 1 of 6 rows left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="share 0 rows"):
        make(tmp_path / "x", {"a_2.txt": table("xyz", 1), "a_1.txt": table(WORDS, 0)})


def test_a_repeated_word_is_presented_again(tmp_path):
    words = ["bread", "ring", "bread"]
    data = make(tmp_path, {"a_1.txt": table(words, 0), "a_2.txt": table(words, 1)})
    assert data.presentations.to_numpy().tolist() == [[0, 0], [1, 0], [0, 1]]
    assert data.stimuli.text.tolist() == ["bread", "ring"]
    uneven = {"a_2.txt": table(["bread", "ring"], 1)}
    with pytest.raises(InputError, match="'bread' has more rows in the table of 1.*words=shared"):
        make(tmp_path, uneven, overwrite=True)
    assert len(make(tmp_path, uneven, words="shared", overwrite=True).responses) == 2


def test_gaps_copies_and_constants_are_left_out_and_counted(tmp_path):
    content = "word v0 v1 v2 v3\na 1.5 0 NA 1\nb 2 0 1 3\nb 2 0 1 3\nc 3 0 1 nan\nd 4 0 2 5\n"
    data = make(tmp_path, {"t.txt": content})
    assert data.stimuli.text.tolist() == list("abcd") and data.units.column.tolist() == ["v0"]
    copies = "1 rows identical to another row of their word"
    assert data.meta["left_out"] == ["2 units with gaps", copies, "1 units that never vary"]
    data = make(tmp_path, {}, missing="presentations", overwrite=True)
    assert data.stimuli.text.tolist() == ["b", "d"] and len(data.responses) == 2
    assert data.units.column.tolist() == ["v0", "v2", "v3"]
    with pytest.raises(InputError, match="no unit varies over its 2 rows"):
        make(tmp_path, {"t.txt": "word v0\na 1\nb 1\n"}, overwrite=True)
    with pytest.raises(InputError, match="is 1e.39, not a finite float32"):
        make(tmp_path, {"t.txt": "word v0\na 1e39\nb 1\n"}, overwrite=True)


@pytest.mark.parametrize(
    "name, people, words, groups, units",
    [
        ("pereira2018", 5, 180, 180, 5000),
        ("mitchell2008", 3, 60, 60, 3000),
        ("alice", 27, 588, 587, 136),
        ("eeg/ucl_scaled.txt", 1, 711, 711, 34),
        ("eeg/n400_scaled.txt", 1, 140, 140, 130),
    ],
)
def test_real_tables(tmp_path, name, people, words, groups, units):
    prepare(words_brains, root=real("words_brains") / name, out_dir=tmp_path)
    data = Encoding(tmp_path)
    assert data.units.subject.nunique() == people and data.responses.shape == (words, units)
    assert len(data.stimuli) == words and data.stimuli.group.nunique() == groups
