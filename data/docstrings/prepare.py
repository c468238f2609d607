"""Which library area a docstring comes from: paragraphs of prose out of data/pydocs, eight areas, balanced.

    python data/docstrings/prepare.py
    python data/docstrings/prepare.py train=1000 out_dir=data/docstrings1000

A package's name never stands in the text, and whatever looks like code is masked. Test paragraphs are of documents that data/pydocs keeps for
validation: a language model trained on it has not seen them.
"""
import hashlib, os, re, subprocess, sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data import tokens
from data.stimuli import complete, read_meta, write_tasks

EMBEDDED = True  # made from data/pydocs, offline: scripts may start this on first use

# Top-level packages of each area. What fits none (terminals, dates, file watching) is left out, and so is neuroscience, of which
# validation has too little.
AREAS = {
    "arrays and numerics": "numpy scipy mpmath h5py contourpy",
    "statistics and learning": "sklearn himalaya joblib",
    "tables": "pandas narwhals pyarrow",
    "algebra and graphs": "sympy networkx",
    "plots and pictures": "matplotlib mpl_toolkits PIL fontTools",
    "deep learning": "torch transformers tokenizers tiktoken",
    "web and network": "streamlit wandb huggingface_hub requests urllib3 http urllib email asyncio socket socketserver ssl ftplib smtplib imaplib xmlrpc "
                       "jinja2 fsspec pooch",
    "the language and its tools": "pydoc_data typing functools importlib inspect ast warnings unittest doctest logging contextlib collections dataclasses "
                                  "types enum abc pickle argparse optparse pdb pydoc idlelib lib2to3 distutils setuptools packaging _pytest pydantic attr "
                                  "click pyparsing",
}
AREA_OF = {package: area for area, packages in AREAS.items() for package in packages.split()}
# What packages call themselves: a paragraph with one of these is dropped, whatever its area.
NAMES = re.compile(r"torch|numpy|scipy|\bnp\b|sklearn|scikit|pandas|\bpd\b|narwhals|arrow|polars|sympy|networkx|matplotlib|pyplot|mpl|\bplt\b|pillow|\bpil\b|"
                   r"fonttools|hugging ?face|transformers|streamlit|wandb|weights (?:&|and) biases|\bw&b\b|urllib|requests|jinja|mpmath|himalaya|joblib|"
                   r"fsspec|pooch|h5py|hdf5|contourpy|tiktoken|asyncio|python|idle\b|setuptools|distutils|pytest|pydantic|\battrs\b|\bclick\b|pyparsing|\bmne\b",
                   re.I)
# A double-backticked or quoted-as-code span, a role, a call, a dotted, underscored or camel-cased name, a path, an option: code, and no prose.
CODE = re.compile(r"(?::[\w:]+:)?`+[^`]*`+_{0,2}|(?!\(?(?:e\.g|i\.e)\.)\S*(?:\w\(|\w\.\w|_|[a-z][A-Z]|[=<>{}\[\]\\/|@#$%^*~]|--)\S*")
MASK = "_"


@dataclass
class Config:
    out_dir: str = ""                # "": this folder
    pydocs: str = ""                 # prepared data/pydocs, "": the one beside this folder (made first where it is missing)
    train: int = 400                 # paragraphs of each area
    val: int = 50                    # of each area, out of other documents
    test: int = 50                   # at most so many of each area, out of the documents that pydocs holds out
    min_words: int = 12              # of a paragraph
    max_words: int = 60              # of a paragraph
    overwrite: bool = False          # make it again although it is there


def documents(folder, split):
    """(module name, text) of every document of a token dataset's split: they end with <|endoftext|>, their first line is the name."""
    enc = tokens.encoding(tokens.tokenizer_state(folder))
    ids = tokens.Tokens(folder, split).tokens
    ends = np.flatnonzero(ids == enc.eot_token)
    for start, end in zip([0, *ends[:-1] + 1], ends):
        name, _, text = enc.decode(ids[start:end].tolist()).partition("\n")
        yield name, text


def prose(paragraph, min_words=12, max_words=60):
    """The paragraph as one line with its code masked; None where it is no prose, or says a package's name."""
    lines = paragraph.split("\n")
    if len({len(line) - len(line.lstrip()) for line in lines}) != 1:  # a list, or a section with its heading
        return None
    text = " ".join(paragraph.split())
    if NAMES.search(text):
        return None
    masked = CODE.sub(lambda code: MASK + code[0][-1] * (code[0][-1] in ".,;:"), text).split()  # the sentence keeps its own mark
    text = " ".join(masked)
    plain = sum(bool(re.fullmatch(r"[(\"']?[A-Za-z][a-z'’-]*[)\"']?[.,;:!?]*", word)) for word in masked)
    if not min_words <= len(masked) <= max_words or plain < 0.8 * len(masked) or not (text[0].isupper() and text.endswith(".")):
        return None
    return text


def key(*words):
    """A number that shuffles: the same for the same words, everywhere."""
    return hashlib.sha256(":".join(words).encode()).digest()


def make(pydocs, config):
    """DataFrame of the task: split, label, text, group (the document) and module."""
    rows, seen = [], set()
    for split in ("val", "train"):
        for name, text in documents(pydocs, split):
            area = AREA_OF.get(name.split(".")[0])
            if not area:
                continue
            part = "test" if split == "val" else "val" if key("part", name)[0] < 40 else "train"  # of pydocs' training documents a sixth
            for paragraph in re.split(r"\n\s*\n", text):
                line = prose(paragraph, config.min_words, config.max_words) if paragraph.strip() else None
                if line and line not in seen:
                    seen.add(line)
                    rows.append((part, area, line, name))
    table = pd.DataFrame(rows, columns=["split", "label", "text", "group"])
    found = table.groupby(["split", "label"]).size().unstack(fill_value=0).reindex(columns=list(AREAS), fill_value=0)
    parts = []
    for part, wanted in (("train", config.train), ("val", config.val), ("test", config.test)):
        least = int(found.loc[part].min()) if part in found.index else 0
        if least < (wanted if part != "test" else 20):
            poor = found.loc[part].idxmin() if part in found.index else "every area"
            raise ValueError(f"{pydocs} has {least} paragraphs of '{poor}' for the {part} split, {wanted} are asked for: give a smaller {part}=, or prepare "
                             "data/pydocs with everything of requirements.txt installed (and a larger val_fraction= for more test text)")
        for area in AREAS:  # balanced
            here = table[(table.split == part) & (table.label == area)]
            parts.append(here.loc[sorted(here.index, key=lambda i: key(table.text[i]))[:min(wanted, least)]])
    table = pd.concat(parts)
    return table.loc[sorted(table.index, key=lambda i: key("order", table.text[i]))].reset_index(drop=True)


def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent))
    pydocs = Path(config.pydocs) if config.pydocs else Path(__file__).resolve().parents[1] / "pydocs"
    if not (pydocs / "meta.yaml").exists() and not config.pydocs:
        print("data/pydocs is not there: made first", flush=True)
        subprocess.run([sys.executable, str(pydocs / "prepare.py")], check=True)
    settings = {k: v for k, v in asdict(config).items() if k not in ("out_dir", "pydocs", "overwrite")}
    wanted = {"options": settings, "pydocs": tokens.read_meta(pydocs)["splits"]["val"]["sha256"],
              "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    if not config.overwrite and complete(folder):
        if {k: read_meta(folder).get(k) for k in wanted} == wanted:
            print(f"{folder} is there already (overwrite=True makes it again)")
            return
        if read_meta(folder).get("options") != settings:
            raise ValueError(f"{folder} was made with {read_meta(folder).get('options')}: give overwrite=True to make it again, or another out_dir")
        print(f"{folder} is of another version of data/pydocs or of this script: making it again")
    table = make(pydocs, config)
    meta = write_tasks(folder, {"area": dict(frame=table, kind="classification", labels=list(AREAS), description="which area of libraries a paragraph of a "
                                             "docstring comes from")},
                       synthetic=False, source="docstrings of data/pydocs, package names left out and code masked",
                       seen="train and val paragraphs are of data/pydocs' training documents, test paragraphs of its validation documents: a language model "
                            "trained on data/pydocs has read the former (without labels) and not the latter", **wanted)
    sizes, groups = meta["tasks"]["area"]["sizes"], table.groupby("split").group.nunique()
    print(f"{folder}: {len(AREAS)} areas; " + ", ".join(f"{split} {n:,} paragraphs of {groups[split]} documents" for split, n in sizes.items()))


if __name__ == "__main__":
    main(configure(Config))
