"""Convert tables of words and brain responses, one file per person, to stimuli with responses.

    python data/words_brains/prepare.py root=path/to/pereira2018 modality=fMRI   # one table each
    python data/words_brains/prepare.py root=path/to/ucl_scaled.txt modality=EEG # a single table
    python data/words_brains/prepare.py root=path/to/pereira2018 people=M15,M10  # some people
    python warp.py dataset=words_brains/pereira2018

A row is `word v0 v1 ...`, the form of CogniVal's fMRI, EEG and eye-tracking sources (Hollenstein et
al. 2019). Your own tables work as well; readme.md says what is read and what is refused.
"""

import csv
import hashlib
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, folder_of, options_of, read_text
from data.assembly import without_gaps
from data.stimuli import complete_encoding, print_sizes, to_number, word_key, write_encoding

EMBEDDED = False  # needs tables of yours
SUFFIXES = (".txt", ".tsv", ".csv")
MISSING = {"", "na", "n/a", "nan", "null", "none"}  # ways to write a missing response


@dataclass
class Config:
    root: str = ""  # one table, or a folder with one table per person
    people: list[str] = field(
        default_factory=list
    )  # which, by the part of the file name that differs
    words: Literal["same", "shared"] = "same"  # must everybody have the same words?
    missing: Literal["units", "presentations"] = "units"  # what to drop if a response is missing
    modality: str = "unknown"  # fMRI, EEG, MEG ...: a label of results
    synthetic: bool = False  # label tables and figures as made up
    out_dir: str = ""  # "": a folder here, named like root
    overwrite: bool = False  # replace an existing dataset

    def check(self):
        if not self.root or not Path(self.root).exists():
            root = self.root or "(nothing)"
            raise InputError(f"root={root} does not exist: give a table, or a folder of tables")


# ---- reading


def find_tables(root, people):
    """Return {person: path} of the chosen tables, or of the only one."""
    paths = [root]
    if root.is_dir():
        paths = sorted(path for path in root.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"root={root} holds no table ({', '.join(SUFFIXES)})")
    tables = dict(zip(person_names(paths), paths))
    for person in people:
        if person not in tables:
            raise InputError(f"root={root} has no table of {person}, only of {', '.join(tables)}")
    return {person: tables[person] for person in people or tables}


def person_names(paths):
    """Return the parts of file names that differ: M03, M15 for targets_M03.txt, targets_M15.txt."""
    stems = pd.Series([path.stem for path in paths])
    pieces = stems.str.split(r"[_\-. ]+", expand=True, regex=True).fillna("")
    varying = pieces.loc[:, pieces.nunique() > 1]
    names = varying.agg("_".join, axis=1).str.strip("_") if len(paths) > 1 else stems
    return names.where(~names.duplicated(keep=False) & (names != ""), stems).tolist()


def read_table(path):
    """Read a DataFrame of responses, words (the index) x units, NaN where missing."""
    rows = {}
    separator = None  # any white space
    for line, text in enumerate(re.split("\r\n?|\n", read_text(path)), 1):
        if text.strip() and not rows:
            separator = next((mark for mark in "\t;," if mark in text), None)
        if text.strip():
            rows[line] = split_fields(text, separator)
    header = None
    if rows and is_header(next(iter(rows.values())), path):
        header = rows.pop(next(iter(rows)))
    if not rows:
        raise InputError(f"{path} holds no words")
    first_line, first_row = next(iter(rows.items()))
    values = []
    for line, fields in rows.items():
        if len(fields) != len(first_row) or len(fields) < 2:
            sizes = f"{len(fields)} fields, but {len(first_row)} in line {first_line}"
            cure = "a row is a word and its responses; words with spaces need tabs or commas"
            raise InputError(f"{path}, line {line}: {sizes}; {cure}")
        if not fields[0]:
            raise InputError(f"{path}, line {line}: the first column, the word, is empty")
        values.append(parse_responses(fields[1:], f"{path}, line {line}"))
    words = [unicodedata.normalize("NFC", fields[0]) for fields in rows.values()]
    return pd.DataFrame(values, words, column_names(header, len(first_row) - 1, path))


def split_fields(text, separator):
    """Return the fields of a line; tables with semicolons have decimal commas."""
    fields = next(csv.reader([text], delimiter=separator)) if separator else text.split()
    word, *others = [field.strip().strip('"') for field in fields]
    if separator == ";":
        others = [field.replace(",", ".") for field in others]
    return [word, *others]


def is_header(fields, path):
    """Return whether the first line names columns. Raises InputError if that is unclear."""
    counts = []
    for name in fields[1:]:
        if name.isdecimal():
            counts.append(int(name))
        elif np.isfinite(to_number(name)) or name.lower() in MISSING:
            return False
    if len(counts) < len(fields) - 1 or fields[0].lower() in ("", "word"):
        return True
    if len(counts) > 1 and counts == sorted(set(counts)):
        cure = "begin a header with 'word', or begin with a row that does not count up"
        raise InputError(f"{path}: '{' '.join(fields[:4])}' may be a header or a row: {cure}")
    return False


def parse_responses(fields, place):
    """Return the numbers in a row, NaN where a response is missing."""
    values = list(map(to_number, fields))
    for text, value in zip(fields, values):
        if np.isnan(value) and text.lower() not in MISSING:
            cure = "the word comes first, then only responses (with decimal points)"
            raise InputError(f"{place}: the response '{text}' is not a number: {cure}")
    return values


def column_names(header, n_columns, path):
    """Return the names of the response columns, or number them if the header does not fit."""
    if header and len(header) == n_columns + 1:
        return header[1:]
    if header and len(header) == n_columns and header[0].lower() != "word":
        return header  # the words' column has no name
    if header:
        sizes = f"the header has {len(header)} fields and every row has {n_columns + 1}"
        print(f"{path}: {sizes}, so columns are numbered instead", flush=True)
    return [f"v{i}" for i in range(n_columns)]


# ---- several people as one set


def combine(tables, config):
    """Join all tables: rows (word, repeat) in the order of the first, columns (person, column)."""
    frames = {}
    for person, table in tables.items():
        repeat = table.index.to_series().groupby(table.index).cumcount()
        frames[person] = table.set_axis(pd.MultiIndex.from_arrays([table.index, repeat]))
    joined = pd.concat(frames, axis=1, join="inner")
    for person, frame in frames.items():
        check_words(person, frame, joined.index, list(tables), config.words)
    return joined


def check_words(person, frame, shared, people, words):
    """Report or refuse the rows of one person's table that other tables lack."""
    extra = frame.index.difference(shared, sort=False)
    names = ", ".join(people)
    if len(shared) < 2:
        raise InputError(f"the tables of {names} share {len(shared)} rows, but 2 are needed")
    if len(extra) and words == "shared":
        print(f"{person}: {len(extra)} of {len(frame)} rows left out because others lack them")
    elif len(extra):
        word, repeat = extra[0]
        problem = f"'{word}' is in the table of {person} but not in all others"
        if repeat:
            problem = f"'{word}' has more rows in the table of {person} than in others"
        cure = f"words=shared for the {len(shared)} rows that all have"
        raise InputError(f"{problem}: give {cure}, or people= for some of {names}")


def leave_out(frame, config):
    """Drop gaps, copied rows and units that never vary; return the frame and a report."""
    rows, columns, left_out = without_gaps(frame.to_numpy(), config.missing, f"root={config.root}")
    frame = frame.loc[rows, columns]
    numbered = frame.set_axis(range(frame.shape[1]), axis=1)
    copies = numbered.assign(word=frame.index.get_level_values(0)).duplicated().to_numpy()
    frame = frame[~copies]
    if copies.any():
        left_out.append(f"{copies.sum():,} rows identical to another row of their word")
    constant = np.ptp(frame.to_numpy(), axis=0) == 0
    if constant.any():
        left_out.append(f"{constant.sum():,} units that never vary")
    if constant.all():
        raise InputError(f"root={config.root}: no unit varies over its {len(frame)} rows")
    return frame.loc[:, ~constant], left_out


def main(config):
    root = Path(config.root)
    name = root.stem if root.is_file() else root.resolve().name
    folder = folder_of(config, __file__, name)
    paths = find_tables(root, config.people)
    contents = hashlib.sha256()
    for path in paths.values():
        contents.update(path.read_bytes())
    options = options_of(config, "root")
    options |= {"people": list(paths), "tables": contents.hexdigest()[:16]}
    if already_made(folder, options, complete_encoding, config.overwrite):
        return

    tables = {person: read_table(path) for person, path in paths.items()}
    frame, left_out = leave_out(combine(tables, config), config)
    stimulus, words = pd.factorize(frame.index.get_level_values(0))
    stimuli = pd.DataFrame({"text": words, "group": words.map(word_key)})
    meta = write_encoding(
        folder,
        stimuli,
        frame.to_numpy(),
        pd.DataFrame({"stimulus": stimulus}),
        frame.columns.to_frame(index=False, name=["subject", "column"]),
        modality=config.modality,
        species="human",
        source=f"{name} ({len(paths)} tables of words)",
        synthetic=config.synthetic,
        left_out=left_out,
        options=options,
    )
    print_sizes(folder, meta)
    print(f"people: {', '.join(paths)}; {stimuli['group'].nunique():,} groups of words")


if __name__ == "__main__":
    main(configure(Config))
