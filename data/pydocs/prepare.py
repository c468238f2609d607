"""The English in a Python installation, as tokens: docstrings of the standard library and of this
project's dependencies, and the language reference behind `help()`.

    python data/pydocs/prepare.py
    python data/pydocs/prepare.py vocab_size=8192 out_dir=data/pydocs8k

Nothing is downloaded or imported: sources are parsed. Each module, and each topic of the reference,
is a document; documents are split as a whole; a byte-level BPE is learned on the training split.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sys
import sysconfig
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure
from data import InputError, already_made, folder_of, options_of
from data import tokens as T

EMBEDDED = True  # made from what is installed: scripts may run this on first use

# The project's dependencies, and theirs that have pages of prose. (plotly and altair are generated
# from a schema and repeat a few thousand sentences a hundred thousand times.)
PACKAGES = """
torch transformers numpy scipy sklearn pandas mne mne_bids himalaya matplotlib mpl_toolkits h5py
streamlit wandb tiktoken tokenizers yaml tqdm sympy mpmath networkx huggingface_hub fontTools
narwhals pyarrow PIL joblib fsspec pydantic packaging jinja2 click attr dateutil pooch filelock rich
requests urllib3 pyparsing watchdog contourpy platformdirs setuptools _pytest
"""
# folders with noise, or with copies of other packages
LEFT_OUT = """
test tests idle_test _vendor _vendored vendored site-packages dist-packages _bundled __pycache__
"""
TOPICS = "pydoc_data.topics"  # the module with the language reference


@dataclass
class Config:
    out_dir: str = ""  # "": this folder
    vocab_size: int = 4096  # tokens of the BPE, <|endoftext|> included; at least 257
    val_fraction: float = 0.025  # share of the documents for validation
    seed: int = 0  # of the split
    min_chars: int = 200  # shorter documents are left out
    workers: int = 0  # parsing processes; 0: one per core
    overwrite: bool = False  # make it again even if it exists

    POSITIVE = SHARES = "val_fraction"

    def check(self):
        if self.vocab_size < 257:
            raise InputError(f"vocab_size={self.vocab_size}: 256 bytes and end-of-text need 257")


# ---- sources


def sources(packages=PACKAGES):
    """Return [(module, path)], {distribution: version} and the names of missing packages."""
    files = modules(Path(sysconfig.get_path("stdlib")), "")
    versions = {"python": platform.python_version()}
    distributions = importlib.metadata.packages_distributions()
    missing = []
    for package in packages.split():
        spec = importlib.util.find_spec(package)  # does not import a top-level package
        if spec is None or not spec.submodule_search_locations:
            missing.append(package)
            continue
        for distribution in distributions.get(package, [])[:1]:  # a copied package has none
            versions[distribution] = importlib.metadata.version(distribution)
        for folder in spec.submodule_search_locations:
            files |= modules(Path(folder), package)
    return sorted(files.items()), versions, missing


def modules(root, package):
    """Return {module: path} of a package's Python sources ('': the standard library)."""
    paths = {}
    left_out = LEFT_OUT.split()
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in left_out and s.isidentifier()]
        parts = [package, *Path(folder).relative_to(root).parts]
        for file in files:
            if file.endswith(".py"):
                last = [] if file == "__init__.py" else [file[:-3]]
                paths[".".join(parts + last).removeprefix(".")] = Path(folder, file)
    return paths


def docstrings(path):
    """Return a source file's docstrings in order, each as `units`; None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return None  # OSError: a dangling link
    return [units(text) for text in documentation(tree)]


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NESTING = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try, ast.With)


def documentation(node):
    """Yield the docstrings of a module, class or function and of everything in it."""
    if isinstance(node, DOCUMENTED):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in node.body + getattr(node, "orelse", []):
        if isinstance(child, NESTING):
            yield from documentation(child)
        elif isinstance(child, (ast.Expr, ast.Assign)) and isinstance(child.value, ast.Call):
            yield from attached(child.value)


def attached(call):
    """Yield what compiled packages attach by add_newdoc(..., "...") or add_docstr(..., "...")."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name.endswith(("add_docstr", "add_newdoc", "add_docstr_all")):
        for node in ast.walk(call):
            # single lines are names
            if isinstance(node, ast.Constant) and "\n" in str(node.value):
                yield inspect.cleandoc(node.value)


def topics(path):
    """Return {name: text} of the language reference, from the source of pydoc_data.topics."""
    for node in ast.parse(Path(path).read_bytes()).body:
        if isinstance(node, ast.Assign):
            texts = ast.literal_eval(node.value)
            return {f"{TOPICS}.{name}": text for name, text in texts.items()}
    raise InputError(f"{path} lacks the topics of help(): reinstall this Python")


def read(files, workers=0):
    """Return {document: [docstrings as units]} of [(module, path)], and the unparsable files."""
    from tqdm import tqdm

    texts = {}
    bad = []
    paths = [path for _, path in files]
    # syntax trees have no cycles: without the garbage collector a third faster
    with ProcessPoolExecutor(workers or os.cpu_count(), initializer=gc.disable) as pool:
        parsed = pool.map(docstrings, paths, chunksize=16)
        for (name, path), content in tqdm(zip(files, parsed), "parse", len(files), leave=False):
            if content is None:
                bad.append(str(path))
            elif name == TOPICS:
                for topic, text in topics(path).items():
                    texts[topic] = [units(text)]
            elif content:
                texts[name] = content
    return texts, bad


# ---- cleaning

CODE = re.compile(
    r"(?m)^[ \t]*```[^`]*```[ \t]*\n?"  # fenced blocks,
    r"|^[ \t]*(?:>>>|In \[\d+\]:).*(?:\n[ \t]*\S.*)*\n?"  # sessions to the end of the paragraph,
    r"|^[ \t]*(?:\{\w+\}|%\(\w+\)s)[ \t]*\n?"  # and placeholders for decorators are not English
)
HEADING = re.compile(  # of a section, if nothing else is in the piece
    r"[^\n]{1,60}\n[-=~^*]{3,}|[^\n]{1,40}:{1,2}|\.\. \w+::[^\n]*"
)
NAME = re.compile(r"\w*(?:[\d_]|\w[A-Z])\w*")
SHORT = 32  # characters of a fingerprint: shorter pieces ("Returns self.") may be repeated


def fingerprint(text):
    """Return the words of a text without names, numbers, case and punctuation, which are equal for
    texts that say the same; '' if no prose is left."""
    return " ".join(re.findall(r"[a-z]{2,}", NAME.sub(" ", text).lower()))


def units(text):
    """Split a docstring into [(separator before, piece, fingerprint)]. Pieces are the items of its
    paragraphs (a line and the lines indented below it), without code."""
    pieces = []
    text = text.encode("utf-8", "replace").decode()  # lone surrogates are not text
    for paragraph in re.split(r"\n\s*\n", CODE.sub("", text).strip("\n")):
        lines = paragraph.split("\n")
        depth = [len(line) - len(line.lstrip()) for line in lines] + [0]
        starts = [0]
        for i in range(1, len(lines)):
            if depth[i] < depth[i - 1] or depth[i] < depth[i + 1]:
                starts.append(i)
        for start, end in zip(starts, starts[1:] + [len(lines)]):
            piece = "\n".join(line.rstrip() for line in lines[start:end])
            words = fingerprint(piece)
            if words:
                pieces.append(("\n" if start else "\n\n", piece, words))
    return pieces


def clean(texts, min_chars=200):
    """Join {name: [docstrings as units]} to {name: text}, sorted by name, without repeating a whole
    docstring or a piece longer than SHORT. Texts under min_chars are left out."""
    seen = set()
    documents = {}
    for name in sorted(texts):
        kept = [name]
        for docstring in texts[name]:
            whole = "whole " + " ".join(words for _, _, words in docstring)
            if whole not in seen:
                seen.add(whole)
                text = unseen(docstring, seen)
                if text:
                    kept.append(text)
        text = "\n\n".join(kept) + "\n"
        if len(text) >= min_chars:
            documents[name] = text
    return documents


def unseen(docstring, seen):
    """Return the text of a docstring's pieces that are not in `seen`, and add them to it."""
    pieces = []
    for separator, piece, words in docstring:
        if len(words) < SHORT or words not in seen:
            pieces.append((separator, piece))
        if len(words) >= SHORT:
            seen.add(words)
    headings = [bool(HEADING.fullmatch(piece.strip())) for _, piece in pieces] + [True]
    text = ""
    for i, (separator, piece) in enumerate(pieces):
        if not (headings[i] and headings[i + 1]):  # a heading without its section
            text += separator + piece
    return text.strip("\n")


# ---- split, tokens

LARGE = 50_000  # characters: larger documents would be a tenth of validation, so they train


def split(documents, val_fraction, seed=0):
    """Split {name: text} into train and val by a hash of the name, whatever else is installed."""
    train = {}
    val = {}
    for name, text in documents.items():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        side = val if place < val_fraction and len(text) < LARGE else train
        side[name] = text
    return train, val


def token_arrays(texts, tokenizer, workers):
    """Yield the ids of each text, closed by <|endoftext|>."""
    for i in range(0, len(texts), 256):
        part = texts[i : i + 256]
        for ids in tokenizer.core.encode_ordinary_batch(part, num_threads=workers):
            yield [*ids, tokenizer.eot]


def build(texts, folder, config, **meta):
    """Write the dataset of {name: [docstrings as units]}; returns its meta."""
    workers = config.workers or os.cpu_count()
    documents = clean(texts, config.min_chars)
    train, val = split(documents, config.val_fraction, config.seed)
    if not train or not val:
        problem = f"cannot be split with val_fraction={config.val_fraction}"
        cure = "give a larger val_fraction or a smaller min_chars"
        raise InputError(f"{len(documents)} documents {problem}: {cure}")
    text = "".join(documents.values())
    state = T.learn_bpe(list(train.values()), config.vocab_size, f"pydocs-{config.vocab_size}")
    tokenizer = T.Tokenizer(state)
    splits = {}
    for name, part in (("train", train), ("val", val)):
        splits[name] = token_arrays(list(part.values()), tokenizer, workers)
    return T.write_dataset(
        folder,
        splits,
        state,
        documents={"train": len(train), "val": len(val)},
        corpus={
            "characters": len(text),
            "words": len(text.split()),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
        options=options_of(config, "workers"),
        synthetic=False,
        **meta,
    )


def main(config):
    folder = folder_of(config, __file__)
    if already_made(folder, options_of(config, "workers"), T.complete, config.overwrite):
        return
    print(f"making {folder}: a minute or two", flush=True)
    files, versions, missing = sources()
    if missing:
        print(f"not installed: {', '.join(missing)}")
    texts, bad = read(files, config.workers)
    if bad:
        print(f"{len(bad)} files do not parse: {', '.join(bad[:3])}")
    source = "docstrings of what is installed, and pydoc_data.topics"
    meta = build(texts, folder, config, source=source, versions=versions, missing=missing)
    print(f"{folder}: {meta['corpus']['words']:,} words")
    for name, entry in meta["splits"].items():
        n_documents = meta["documents"][name]
        print(f"{folder}: {name} {entry['tokens']:,} tokens in {n_documents:,} documents")


if __name__ == "__main__":
    main(configure(Config))
