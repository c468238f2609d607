"""The English that a Python installation carries, as tokens: docstrings of the standard library and of this project's dependencies,
and the language reference behind `help()`. Nothing is downloaded and nothing is imported: sources are parsed.

    python data/pydocs/prepare.py
    python data/pydocs/prepare.py vocab_size=8192 out_dir=data/pydocs8k

One document is one module (or one topic of the reference); the split is by document; a byte-level BPE is learned on the training part.
"""
import ast, gc, hashlib, importlib.metadata, importlib.util, inspect, os, platform, re, sys, sysconfig, time, warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's shared files
from configurator import configure
from data.tokens import ENDOFTEXT, complete, read_meta, state_of, write_dataset

EMBEDDED = True  # made from what is installed: scripts may start this on first use

# Where the docstrings come from: import name → distribution. The project's dependencies, and of what they pull in whatever has pages of
# prose (plotly's and altair's classes are generated from a schema: a few thousand sentences a hundred thousand times).
PACKAGES = {
    "torch": "torch", "transformers": "transformers", "numpy": "numpy", "scipy": "scipy", "sklearn": "scikit-learn", "pandas": "pandas",
    "mne": "mne", "mne_bids": "mne-bids", "himalaya": "himalaya", "matplotlib": "matplotlib", "mpl_toolkits": "matplotlib", "h5py": "h5py",
    "streamlit": "streamlit", "wandb": "wandb", "tiktoken": "tiktoken", "tokenizers": "tokenizers", "yaml": "PyYAML", "tqdm": "tqdm",
    "sympy": "sympy", "mpmath": "mpmath", "networkx": "networkx", "huggingface_hub": "huggingface_hub", "fontTools": "fonttools",
    "narwhals": "narwhals", "pyarrow": "pyarrow", "PIL": "pillow", "joblib": "joblib", "fsspec": "fsspec", "pydantic": "pydantic",
    "packaging": "packaging", "jinja2": "Jinja2", "click": "click", "attr": "attrs", "dateutil": "python-dateutil", "pooch": "pooch",
    "filelock": "filelock", "rich": "rich", "requests": "requests", "urllib3": "urllib3", "pyparsing": "pyparsing", "watchdog": "watchdog",
    "contourpy": "contourpy", "platformdirs": "platformdirs", "setuptools": "setuptools", "_pytest": "pytest",
}
LEFT_OUT = {"test", "tests", "idle_test", "_vendor", "_vendored", "vendored", "site-packages", "dist-packages", "_bundled",
            "__pycache__"}  # folders: noise, or seen elsewhere


@dataclass
class Config:
    out_dir: str = ""                # "": this folder
    vocab_size: int = 4096           # tokens of the BPE, <|endoftext|> included; at least 257
    val_fraction: float = 0.025      # share of the documents that is kept for validation
    seed: int = 0                    # another seed, another split
    min_chars: int = 200             # shorter documents are left out
    workers: int = 0                 # processes that parse; 0: one per core
    overwrite: bool = False          # make it again although it is there

    def check(self):
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size} cannot hold the 256 bytes and {ENDOFTEXT}: give 257 or more")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must lie between 0 and 1")


# ---- sources

def sources(packages=PACKAGES):
    """What is installed: ([(module name, path)] in order of name, {package: version}, [packages that are not installed])."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found, versions, missing = modules(stdlib, ""), {"python": platform.python_version()}, []
    for package, distribution in packages.items():
        spec = importlib.util.find_spec(package)  # of a top-level name: finds, does not import
        if spec is None or not spec.submodule_search_locations:
            missing.append(package)
            continue
        versions[distribution] = importlib.metadata.version(distribution)
        for folder in spec.submodule_search_locations:
            found |= modules(Path(folder), package)
    return sorted(found.items()), versions, missing


def modules(root, name):
    """{module name: path} of the Python sources under the folder of package `name` ('' for the standard library itself)."""
    found = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in LEFT_OUT and s.isidentifier()]
        parts = ([name] if name else []) + list(Path(folder).relative_to(root).parts)
        for file in files:
            if file.endswith(".py"):
                found[".".join(parts + ([] if file == "__init__.py" else [file[:-3]]))] = Path(folder, file)
    return found


def docstrings(path):
    """The docstrings of one source file in source order, each as its `units`; None when the file does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):
        return None
    return [units(text) for text in documentation(tree)]


def documentation(node):
    """The documentation in a module, class or function and in what it holds. What compiled packages attach by a call,
    add_newdoc(..., "...") or add_docstr(..., "..."), counts too."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
        yield text
    for child in node.body + getattr(node, "orelse", []):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try, ast.With)):
            yield from documentation(child)
        elif isinstance(child, (ast.Expr, ast.Assign)) and isinstance(call := child.value, ast.Call):
            if getattr(call.func, "attr", getattr(call.func, "id", "")).endswith(("add_docstr", "add_newdoc", "add_docstr_all")):
                yield from (inspect.cleandoc(text.value) for text in ast.walk(call) if isinstance(text, ast.Constant)
                            and isinstance(text.value, str) and "\n" in text.value)  # the other strings are names


def topics(path):
    """{name: text} of the language reference, from the source of pydoc_data.topics."""
    for node in ast.parse(Path(path).read_bytes()).body:
        if isinstance(node, ast.Assign):
            return {f"pydoc_data.topics.{name}": text for name, text in ast.literal_eval(node.value).items()}
    raise ValueError(f"{path} does not assign the topics of help(): this Python's standard library is damaged")


def read(files, workers=0):
    """{document name: [docstrings as units]} of [(module name, path)], parsed in parallel, and the list of files that do not parse."""
    texts, bad = {}, []
    with ProcessPoolExecutor(workers or os.cpu_count(), initializer=gc.disable) as pool:  # syntax trees have no cycles: a third faster
        parsed = pool.map(docstrings, [path for _, path in files], chunksize=16)
        for (name, path), found in tqdm(zip(files, parsed), "parse", len(files), unit="file", leave=False, disable=None):
            if found is None:
                bad.append(str(path))
            elif name == "pydoc_data.topics":
                texts |= {topic: [units(text)] for topic, text in topics(path).items()}
            elif found:
                texts[name] = found
    return texts, bad


# ---- cleaning

CODE = re.compile(r"(?m)^[ \t]*```[^`]*```[ \t]*\n?"                          # fenced blocks,
                  r"|^[ \t]*(?:>>>|In \[\d+\]:).*(?:\n[ \t]*\S.*)*\n?"         # interpreter sessions to the end of the paragraph,
                  r"|^[ \t]*(?:\{\w+\}|%\(\w+\)s)[ \t]*\n?")                  # and what a decorator would have filled in: not English
HEADING = re.compile(r"[^\n]{1,60}\n[-=~^*]{3,}|[^\n]{1,40}:{1,2}|\.\. \w+::[^\n]*")  # of a section, when it stands alone
NAME = re.compile(r"\w*(?:[\d_]|\w[A-Z])\w*")
SHORT = 32  # characters of a fingerprint: what is shorter (headings, "Returns self.") may be said again inside a longer docstring


def fingerprint(text):
    """The words of `text` without names, numbers, case and punctuation: equal for texts that say the same, '' when no prose is left."""
    return " ".join(re.findall(r"[a-z]{2,}", NAME.sub(" ", text).lower()))


def units(text):
    """A docstring cut into the pieces that are compared, [(separator before it, piece, its fingerprint)]: paragraphs, and within a
    paragraph the items (a line and what is indented below it). Code is left out, and pieces without a word."""
    cut = []
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no text
    for paragraph in re.split(r"\n\s*\n", CODE.sub("", text).strip("\n")):
        lines = paragraph.split("\n")
        depth = [len(line) - len(line.lstrip()) for line in lines] + [0]
        starts = [i for i in range(len(lines)) if i == 0 or depth[i] < depth[i - 1] or depth[i] < depth[i + 1]]
        for i, j in zip(starts, starts[1:] + [len(lines)]):
            piece = "\n".join(line.rstrip() for line in lines[i:j])
            if words := fingerprint(piece):
                cut.append(("\n" if i else "\n\n", piece, words))
    return cut


def clean(texts, min_chars=200):
    """{name: [docstrings as units]} → [(name, text)] in order of name, with nothing said twice: a docstring whose fingerprint came before is
    dropped, and so is a piece of one that is not SHORT. A text opens with its name; texts under min_chars are left out."""
    seen, documents = set(), []

    def new(words):
        return words not in seen and not seen.add(words)

    for name in sorted(texts):
        kept = []
        for docstring in texts[name]:
            if not new("whole " + " ".join(words for _, _, words in docstring)):
                continue
            pieces = [(separator, piece) for separator, piece, words in docstring if len(words) < SHORT or new(words)]
            headings = [bool(HEADING.fullmatch(piece.strip())) for _, piece in pieces] + [True]
            text = "".join(separator + piece for (separator, piece), heading, next_heading in zip(pieces, headings, headings[1:])
                           if not (heading and next_heading))  # a heading whose section is gone
            if text:
                kept.append(text.strip("\n"))
        text = "\n\n".join([name] + kept) + "\n"
        if len(text) >= min_chars:
            documents.append((name, text))
    return documents


# ---- split, tokenizer

LARGE = 50_000  # characters: a document that would be a tenth of validation by itself is for training


def split(documents, val_fraction, seed=0):
    """[(name, text)] → (train, val), by a hash of the name: a document stays on its side whatever else is installed."""
    def held_out(name, text):
        return len(text) < LARGE and int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64 < val_fraction
    return [d for d in documents if not held_out(*d)], [d for d in documents if held_out(*d)]


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # how GPT-2 cuts text before merging


def learn_bpe(texts, vocab_size, progress=False):
    """A byte-level BPE learned with Hugging Face's `tokenizers`: vocab_size - 1 tokens, all 256 bytes among them. Deterministic.
    Raises ValueError when the texts do not hold that many."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size - 1, min_frequency=2, show_progress=progress,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()), length=len(texts))
    if bpe.get_vocab_size() < vocab_size - 1:
        raise ValueError(f"the text yields {bpe.get_vocab_size() + 1} tokens and not vocab_size={vocab_size}: give a smaller vocab_size or more text")
    return bpe


def tiktoken_of(bpe, name):
    """The same BPE as a tiktoken.Encoding with equal ids, and <|endoftext|> as the last one. (`tokenizers` spells each byte as a
    printable character: the printable ones as themselves, the others as U+0100 and up, in order.)"""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(printable)))}
    ranks = {bytes(byte[c] for c in token): rank for token, rank in bpe.get_vocab().items()}
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={ENDOFTEXT: len(ranks)})


def token_arrays(documents, enc, workers):
    """The ids of document after document, each closed by <|endoftext|>."""
    for i in tqdm(range(0, len(documents), 256), "encode", leave=False, disable=None):
        for ids in enc.encode_ordinary_batch([text for _, text in documents[i:i + 256]], num_threads=workers):
            yield ids + [enc.eot_token]


# ---- main

@contextmanager
def stage(name):
    started = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


def settings(config):
    """The options that make a difference to the dataset."""
    return {key: value for key, value in asdict(config).items() if key not in ("out_dir", "workers", "overwrite")}


def build(texts, folder, config, **meta):
    """Clean, split, learn, encode, write: {name: [docstrings as units]} becomes a dataset in `folder`. Returns its meta."""
    workers = config.workers or os.cpu_count()
    with stage("clean"):
        documents = clean(texts, config.min_chars)
        train, val = split(documents, config.val_fraction, config.seed)
        if not train or not val:
            raise ValueError(f"{len(documents)} documents cannot be split with val_fraction={config.val_fraction}: "
                             "give a larger val_fraction or a smaller min_chars")
        text = "".join(text for _, text in documents)
        corpus = {"characters": len(text), "words": len(text.split()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    with stage("learn the BPE"):
        enc = tiktoken_of(learn_bpe([text for _, text in train], config.vocab_size), f"pydocs-{config.vocab_size}")
    with stage("encode and write"):
        return write_dataset(folder, {"train": token_arrays(train, enc, workers), "val": token_arrays(val, enc, workers)}, state_of(enc),
                             documents={"train": len(train), "val": len(val)}, corpus=corpus, options=settings(config), synthetic=False, **meta)


def main(config):
    folder = Path(config.out_dir) if config.out_dir else Path(os.path.relpath(Path(__file__).resolve().parent))
    if not config.overwrite and complete(folder):
        made_with = read_meta(folder).get("options")
        if made_with != settings(config):
            raise ValueError(f"{folder} was made with {made_with}: give overwrite=True to make it again, or another out_dir")
        print(f"{folder} is there already (overwrite=True makes it again)")
        return
    print(f"making {folder}: a minute or two")
    files, versions, missing = sources()
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    with stage(f"parse {len(files):,} files"):
        texts, bad = read(files, config.workers)
    if bad:
        print(f"{len(bad)} files do not parse with Python {versions['python']}, left out: {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''}")
    meta = build(texts, folder, config, source="docstrings of what is installed, and pydoc_data.topics", versions=versions, missing=missing)
    size = {name: f"{entry['tokens']:,} tokens in {meta['documents'][name]:,} documents" for name, entry in meta["splits"].items()}
    print(f"{folder}: {meta['corpus']['words']:,} words; train {size['train']}, val {size['val']}")


if __name__ == "__main__":
    main(configure(Config))
