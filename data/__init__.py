"""Data formats, reader and writer in one file each; one folder per dataset, with its prepare.py.

This file is what they all share: `InputError`, how files are written, and how YAML, tables and
pickles are read.
"""

import codecs
import collections
import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml


class InputError(ValueError):
    """Bad input: one sentence that names the file or option, what is wrong, and the remedy.

    Scripts end with it and exit status 2 (configurator.configure); other exceptions are bugs.
    """


# ---- writing


@contextmanager
def aside(path):
    """Open a temporary file beside `path` for bytes, which becomes `path` when the block ends well:
    a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_aside(path, content):
    """Write text (as UTF-8) or bytes to a file through `aside`."""
    if isinstance(content, str):
        content = content.encode()
    with aside(path) as file:
        file.write(content)


def write_yaml(path, value):
    """Write plain values as YAML, keys in their own order."""
    write_aside(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000))


# ---- reading


def check_content(path):
    """The path, once the file and its content are there: datasets cloned with git-annex or git-lfs
    hold links and pointers until they are fetched. Raises InputError."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        link = "a git-annex link" if "annex" in target else f"a link to {target},"
        cure = "fetch it (git annex get, datalad get), or copy it here"
        raise InputError(f"{path} is {link} whose content is missing: {cure}")
    if not path.exists():
        raise InputError(f"{path} is missing{remedy(path.parent)}")
    if path.is_file() and path.stat().st_size < 1024:
        head = path.read_bytes()[:200]
        if head.startswith(b"version https://git-lfs") or b"/annex/objects/" in head:
            cure = "fetch it with git lfs pull or git annex get"
            raise InputError(f"{path} is a pointer whose content is missing: {cure}")
    return path


def file_hash(path, kind="sha256"):
    """The checksum of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def files_state(paths):
    """A hash of the names, sizes and times of large files, another one when any was changed."""
    state = []
    for path in map(Path, paths):
        about = path.stat()
        state.append([path.name, about.st_size, about.st_mtime_ns])
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def path_state(path):
    """files_state of a file, or of the files in a folder (no hidden ones); of neither: of none."""
    files = [Path(path), *sorted(Path(path).glob("[!.]*"))]
    return files_state(filter(Path.is_file, files))


class _PlainLoader(yaml.SafeLoader):
    """Plain values only, and no key twice: of two, YAML would silently take the last."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        names = collections.Counter(str(key.value) for key, _ in node.value)
        for name, count in names.most_common(1):
            if count > 1:
                raise yaml.YAMLError(f"the key '{name}' stands twice")
        return node


# YAML 1.1 reads 1e-3 as text; the JSON spelling of numbers is what people type.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
# It reads 010 as 8, 0x1f as 31 and 1:30 as 90. These stay text, of which int() makes 10 or nothing.
ODD_NUMBERS = re.compile(r"[-+]?(0[bx_0-9][_0-9a-fA-F]*$|[0-9_]+:)")
for first in "-+0123456789":
    _PlainLoader.yaml_implicit_resolvers[first].insert(0, ("tag:yaml.org,2002:str", ODD_NUMBERS))


def read_yaml(text):
    """Plain values from YAML text, no objects. Raises yaml.YAMLError."""
    return yaml.load(text, _PlainLoader)


def load_meta(folder, what, format, keys=()):
    """meta.yaml of a prepared dataset as a dict, which must have this format and these keys.

    what: the kind of dataset, in words. Raises InputError.
    """
    path = Path(folder) / "meta.yaml"
    if not path.parent.is_dir():
        raise InputError(f"{folder} does not exist{remedy(folder)}")
    if not path.is_file():
        raise InputError(f"{folder} holds no finished {what} (no meta.yaml){remedy(folder)}")
    try:
        meta = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{path} is not YAML{remedy(folder)}") from None
    meta = meta if isinstance(meta, dict) else {}
    missing = [key for key in keys if meta.get(key) is None]
    problem = ""
    if meta.get("format") != format:
        problem = f"has the format {str(meta.get('format'))[:40]!r}, not {format!r}"
    elif missing:
        problem = f"lacks the key '{missing[0]}'"
    if problem:
        raise InputError(f"{path} {problem}{remedy(folder)}")
    return meta


def read_text(path):
    """The text of a file: UTF-8, or the Windows bytes of an older table, which is said."""
    content = check_content(path).read_bytes()
    if b"\0" in content:
        raise InputError(f"{path} is no plain text (it has zero bytes): save it as UTF-8")
    try:
        return content.decode("utf-8-sig")  # spreadsheets like to write a byte order mark
    except UnicodeDecodeError as error:
        print(f"{path} is not UTF-8 (byte {error.start}): read as Latin-1", flush=True)
    return content.decode("cp1252", errors="replace")  # Latin-1 and Windows' quotation marks


def read_table(path, columns=(), **options):
    """pandas.read_csv of a file that must have `columns`; words such as NA and null stay text.
    Rows longer than the header are refused, but for a last field that is missing in all."""
    import pandas as pd

    text = io.StringIO(read_text(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # the header is too short
            table = pd.read_csv(text, keep_default_na=False, index_col=False, **options)
    except (ValueError, Warning) as error:  # the errors of pandas are ValueErrors
        reason = f"({' '.join(str(error).split())}){remedy(Path(path).parent)}"
        raise InputError(f"{path} is not a CSV table {reason}") from None
    table = table.rename(columns=str.strip)
    for name in columns:
        column(table, path, name)
    return table


def column(table, path, *names):
    """The first of these columns that a table has. Raises InputError without one, or with two."""
    for name in names:
        if f"{name}.1" in table:  # as pandas calls the second
            raise InputError(f"{path} has two columns '{name}': rename the wrong one")
        if name in table:
            return table[name]
    wanted, there = "' or '".join(names), ", ".join(map(str, table)) or "none"
    raise InputError(f"{path} has no column '{wanted}', only {there}: is it the right file?")


class PickledObject:
    """What an unpickled object of somebody else's class becomes: its attributes, nothing else."""


# what a pickle may call: it makes arrays, tensors and plain containers, and can run nothing
SAFE_IN_PICKLES = {
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": codecs.encode,  # protocol 2 writes bytes as text
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.multiarray._reconstruct": np._core.multiarray._reconstruct,
    "numpy.multiarray.scalar": np._core.multiarray.scalar,
    "numpy.numeric._frombuffer": np._core.numeric._frombuffer,  # protocol 5
}


def read_pickle(path, allowed=()):
    """The object in a pickle, or in a .npy that holds one: plain types and NumPy's arrays.

    allowed: names of classes whose objects become PickledObjects; torch's tensors are read beside
    them. Raises InputError for a torn file, and for one that holds code.
    """
    known = dict(SAFE_IN_PICKLES)
    if allowed:
        import torch

        known["torch._utils._rebuild_tensor_v2"] = torch._utils._rebuild_tensor_v2
        known["torch.storage._load_from_bytes"] = lambda content: torch.load(
            io.BytesIO(content), weights_only=True
        )

    class RestrictedUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if name in allowed:
                return PickledObject
            module = re.sub(r"^numpy\.(_core|core)\.", "numpy.", module)  # of NumPy 2 or 1
            if f"{module}.{name}" not in known:
                raise pickle.UnpicklingError(f"it wants {module}.{name}")
            return known[f"{module}.{name}"]

    check_content(path)
    try:
        with open(path, "rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
            file.seek(0)
            if is_npy:
                major, minor = np.lib.format.read_magic(file)
                getattr(np.lib.format, f"read_array_header_{major}_{minor}")(file)
            return RestrictedUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a torn pickle raises nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        problem = "it is torn, or not what its name says"
        raise InputError(f"{path} cannot be read ({reason}): {problem}") from None


def remedy(folder, option=""):
    """The end of a sentence: how to make the dataset, if a prepare.py is near it, else ''."""
    folder = Path(folder)
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "prepare.py").is_file():
            return f"; make it with: python {place / 'prepare.py'}{option}"
    return ""


# ---- what prepare scripts share


def folder_of(config, script, name=""):
    """Where a dataset goes: config.out_dir, or the folder of its script (or `name` in it)."""
    folder = Path(config.out_dir or os.path.relpath(Path(script).resolve().parent / name))
    for place in (folder, *folder.parents):
        if place.is_file():
            raise InputError(f"out_dir={folder}: {place} is a file: give a folder")
    return folder


def options_of(config, *others):
    """The options that decide what a dataset holds: all but out_dir, overwrite and `others`."""
    left_out = {"out_dir", "overwrite", *others}
    return {key: value for key, value in asdict(config).items() if key not in left_out}


def check_options(folder, made_with, options):
    """Refuse a dataset that was made with other options than these. Raises InputError."""
    made_with = made_with or {}
    changed = [key for key in options if made_with.get(key) != options[key]]
    if changed:
        before = ", ".join(f"{key}={made_with.get(key)}" for key in changed)
        cure = "give overwrite=True to make it again, or another out_dir"
        raise InputError(f"{folder} was made with {before}: {cure}")


def already_made(folder, options, is_complete, overwrite=False, **version):
    """Whether a dataset is there, made with these options and this version, which it says.

    is_complete: a format's `complete`; version: keys of meta.yaml, of which a change makes it
    again.
    """
    if overwrite or not is_complete(folder):
        return False
    path = Path(folder) / "meta.yaml"
    meta = read_yaml(path.read_text(encoding="utf-8")) if path.is_file() else {}
    check_options(folder, meta.get("options"), options)
    for key, value in version.items():
        if meta.get(key) != value:
            print(f"{folder} was made by another version of its sources: it is made again")
            return False
    print(f"{folder} is there already (overwrite=True makes it again)")
    return True


def embedded(name):
    """Folder of an embedded dataset under data/, made first, with a notice, if it is not there."""
    folder = Path(__file__).parent / name
    if not (folder / "meta.yaml").exists():
        print(f"data/{name} is not there: it is made first", flush=True)
        subprocess.run([sys.executable, str(folder / "prepare.py")], check=True)
    return folder
