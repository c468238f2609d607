"""Which library area does a docstring come from? Paragraphs of data/pydocs from eight areas.

    python data/docstrings/prepare.py
    python data/docstrings/prepare.py train=1000 out_dir=data/docstrings1000

The text never contains a package's name, and anything that looks like code is masked. Test
paragraphs come from the validation documents of data/pydocs, which a language model trained on it
has not seen.
"""

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import InputError, already_made, embedded, file_hash, folder_of, options_of, tokens
from data.stimuli import complete, write_tasks

EMBEDDED = True  # made from data/pydocs, offline: scripts may start this on first use

# Top-level packages of each area. Packages that fit none (terminals, dates, file watching) are left
# out, as is neuroscience, which is too rare in the validation documents.
AREAS = {
    "arrays and numerics": "numpy scipy mpmath h5py contourpy",
    "statistics and learning": "sklearn himalaya joblib",
    "tables": "pandas narwhals pyarrow",
    "algebra and graphs": "sympy networkx",
    "plots and pictures": "matplotlib mpl_toolkits PIL fontTools",
    "deep learning": "torch transformers tokenizers tiktoken",
    "web and network": "streamlit wandb huggingface_hub requests urllib3 http urllib email asyncio "
    "socket socketserver ssl ftplib smtplib imaplib xmlrpc jinja2 fsspec pooch",
    "the language and its tools": "pydoc_data typing functools importlib inspect ast warnings "
    "unittest doctest logging contextlib collections dataclasses types enum abc pickle argparse "
    "optparse pdb pydoc idlelib lib2to3 distutils setuptools packaging _pytest pydantic attr click "
    "pyparsing",
}
# Names of packages: a paragraph that contains one is dropped, whatever its area.
NAMES = re.compile(
    r"torch|numpy|scipy|\bnp\b|sklearn|scikit|pandas|\bpd\b|narwhals|arrow|polars|sympy|networkx|"
    r"matplotlib|pyplot|mpl|\bplt\b|pillow|\bpil\b|fonttools|hugging ?face|transformers|streamlit|"
    r"wandb|weights (?:&|and) biases|\bw&b\b|urllib|requests|jinja|mpmath|himalaya|joblib|fsspec|"
    r"pooch|h5py|hdf5|contourpy|tiktoken|asyncio|python|idle\b|setuptools|distutils|pytest|"
    r"pydantic|\battrs\b|\bclick\b|pyparsing|\bmne\b",
    re.I,
)
# Code: a span in backticks, a role, a call, a dotted, underscored or camel-cased name, a path, an
# option.
CODE = re.compile(
    r"(?::[\w:]+:)?`+[^`]*`+_{0,2}|"
    r"(?!\(?(?:e\.g|i\.e)\.)\S*(?:\w\(|\w\.\w|_|[a-z][A-Z]|[=<>{}\[\]\\/|@#$%^*~]|--)\S*"
)
PLAIN_WORD = re.compile(r"[(\"']?[A-Za-z][a-z'’-]*[)\"']?[.,;:!?]*")
MASK = "_"


@dataclass
class Config:
    out_dir: str = ""  # "": this folder
    pydocs: str = ""  # prepared data/pydocs; "": data/pydocs itself (made if missing)
    train: int = 400  # paragraphs per area
    val: int = 50  # per area, from other documents
    test: int = 50  # at most, per area, from the documents that pydocs holds out
    min_words: int = 12  # per paragraph
    max_words: int = 60  # per paragraph
    overwrite: bool = False  # rebuild an existing dataset


def documents(folder, split):
    """Yield (module name, text) for every document of a token dataset; line 1 is the name."""
    encoding = tokens.encoding(tokens.tokenizer_state(folder))
    ids = tokens.Tokens(folder, split).tokens
    start = 0
    for end in np.flatnonzero(ids == encoding.eot_token):
        name, _, text = encoding.decode(ids[start:end].tolist()).partition("\n")
        yield name, text
        start = end + 1


def mask(code):
    """Return the mask for a match of CODE, keeping the punctuation that follows the code."""
    last = code[0][-1]
    return MASK + last if last in ".,;:" else MASK


def prose(paragraph, min_words=12, max_words=60):
    """Return the paragraph on one line, code masked; None if it is not prose or names a package."""
    indents = {len(line) - len(line.lstrip()) for line in paragraph.split("\n")}
    text = " ".join(paragraph.split())
    if len(indents) != 1 or NAMES.search(text):  # several: a list, or a section with its heading
        return None
    words = CODE.sub(mask, text).split()
    n_plain = sum(bool(PLAIN_WORD.fullmatch(word)) for word in words)
    if not min_words <= len(words) <= max_words or n_plain < 0.8 * len(words):
        return None
    text = " ".join(words)
    return text if text[0].isupper() and text.endswith(".") else None


def key(*words):
    """Return a sort key that shuffles words in the same way on every machine."""
    return hashlib.sha256(":".join(words).encode()).digest()


def find_paragraphs(pydocs, config):
    """Return all paragraphs in a DataFrame: split, label, text, group (the document)."""
    area_of = {}
    for area, packages in AREAS.items():
        area_of |= dict.fromkeys(packages.split(), area)
    rows = {}
    for half in ("val", "train"):
        for name, text in documents(pydocs, half):
            area = area_of.get(name.split(".")[0])
            if area is None:
                continue
            split = "test"
            if half == "train":  # a sixth of its documents are our validation split
                split = "val" if key("part", name)[0] < 40 else "train"
            for paragraph in re.split(r"\n\s*\n", text):
                line = prose(paragraph, config.min_words, config.max_words)
                if line:
                    rows.setdefault(line, (split, area, line, name))
    return pd.DataFrame(rows.values(), columns=["split", "label", "text", "group"])


def balance(table, config, pydocs):
    """Balance the areas within each split, and shuffle the paragraphs."""
    counts = pd.crosstab(table["split"], table["label"])
    counts = counts.reindex(index=["train", "val", "test"], columns=list(AREAS), fill_value=0)
    table = table.assign(key=[key(text) for text in table["text"]]).sort_values("key")
    parts = []
    for split in counts.index:
        wanted = getattr(config, split)
        fewest = int(counts.loc[split].min())
        if fewest < (20 if split == "test" else wanted):
            raise InputError(
                f"{pydocs} has {fewest} paragraphs of '{counts.loc[split].idxmin()}' for {split}, "
                f"too few for {split}={wanted}: set a smaller {split}=, or prepare data/pydocs "
                "with all of requirements.txt installed"
            )
        part = table[table["split"] == split].groupby("label")
        parts.append(part.head(min(wanted, fewest)))
    table = pd.concat(parts)
    order = sorted(table.index, key=lambda i: key("order", table["text"][i]))
    return table.loc[order].drop(columns="key").reset_index(drop=True)


def main(config):
    folder = folder_of(config, __file__)
    pydocs = Path(config.pydocs) if config.pydocs else embedded("pydocs")
    options = options_of(config, "pydocs")
    held_out = tokens.read_meta(pydocs)["splits"]["val"]["sha256"]
    version = {"pydocs": held_out, "code": file_hash(__file__)}
    if already_made(folder, options, complete, config.overwrite, **version):
        return
    table = balance(find_paragraphs(pydocs, config), config, pydocs)
    task = {
        "frame": table,
        "kind": "classification",
        "labels": list(AREAS),
        "description": "which area of libraries a paragraph of a docstring comes from",
    }
    meta = write_tasks(
        folder,
        {"area": task},
        synthetic=False,
        source="docstrings of data/pydocs without package names, code masked",
        seen="train and val paragraphs come from the training documents of data/pydocs, test "
        "paragraphs from its validation documents: a language model trained on data/pydocs has "
        "read the former (without labels) but not the latter",
        options=options,
        **version,
    )
    print(f"{folder}: {len(AREAS)} areas")
    for split, size in meta["tasks"]["area"]["sizes"].items():
        n_documents = table["group"][table["split"] == split].nunique()
        print(f"{split}: {size:,} paragraphs from {n_documents} documents")


if __name__ == "__main__":
    main(configure(Config))
