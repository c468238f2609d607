"""Data formats (one file each, reader and writer) and datasets (one folder each, with prepare.py).

This file holds what they share: `InputError`, safe writing, and readers of YAML, tables and
pickles.
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

    Scripts print it and exit with status 2 (configurator.configure); other exceptions are bugs.
    """


# ---- writing


@contextmanager
def aside(path):
    """Open a temporary binary file that replaces `path` if the block succeeds.

    Readers see the old file or the new one, never half a file.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_aside(path, content):
    """Write text (as UTF-8) or bytes to a file with `aside`."""
    if isinstance(content, str):
        content = content.encode()
    with aside(path) as file:
        file.write(content)


def write_yaml(path, value):
    """Write plain values as YAML, keys in the given order."""
    write_aside(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000))


# ---- reading


def check_content(path):
    """Return the path. Raises InputError if the file or its content is missing.

    Datasets cloned with git-annex or git-lfs hold links and pointers until they are fetched.
    """
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
    """Return the checksum of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def files_state(paths):
    """Return a hash of the names, sizes and times of large files, to notice when any changes."""
    state = []
    for path in map(Path, paths):
        stat = path.stat()
        state.append([path.name, stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def path_state(path):
    """Return files_state of a file, of a folder's files (not hidden ones), or of nothing."""
    files = [Path(path), *sorted(Path(path).glob("[!.]*"))]
    return files_state(filter(Path.is_file, files))


class _PlainLoader(yaml.SafeLoader):
    """Load plain values only, and refuse duplicate keys: YAML would silently take the last."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        names = collections.Counter(str(key.value) for key, _ in node.value)
        for name, count in names.most_common(1):
            if count > 1:
                raise yaml.YAMLError(f"the key '{name}' occurs twice")
        return node


# YAML 1.1 reads 1e-3 as text, but people type numbers as in JSON.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
# YAML reads 010 as 8, 0x1f as 31, 1:30 as 90. As text, int() takes 010 for 10 and refuses the rest.
ODD_NUMBERS = re.compile(r"[-+]?(0[bx_0-9][_0-9a-fA-F]*$|[0-9_]+:)")
for first in "-+0123456789":
    _PlainLoader.yaml_implicit_resolvers[first].insert(0, ("tag:yaml.org,2002:str", ODD_NUMBERS))


def read_yaml(text):
    """Return plain values (no objects) from YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, _PlainLoader)


def load_meta(folder, what, format, keys=()):
    """Return meta.yaml of a prepared dataset as a dict.

    what: the kind of dataset, in words. Raises InputError unless it has this format and these keys.
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
    """Return the text of a file in UTF-8 or, with a notice, in the Windows code of older tables."""
    content = check_content(path).read_bytes()
    if b"\0" in content:
        raise InputError(f"{path} is not plain text (it has zero bytes): save it as UTF-8")
    try:
        return content.decode("utf-8-sig")  # spreadsheets may write a byte order mark
    except UnicodeDecodeError as error:
        print(f"{path} is not UTF-8 (byte {error.start}): read as Latin-1", flush=True)
    return content.decode("cp1252", errors="replace")  # Latin-1 and Windows' quotation marks


def read_table(path, columns=(), **options):
    """Read a CSV file with pandas. Raises InputError unless it has `columns`.

    Words such as NA and null stay text. Rows longer than the header are refused, unless their last
    field is always empty.
    """
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
    """Return the first of the columns `names` in a table. Raises InputError for none, or twins."""
    for name in names:
        if f"{name}.1" in table:  # what pandas calls the second
            raise InputError(f"{path} has two columns '{name}': rename the wrong one")
        if name in table:
            return table[name]
    wanted = "' or '".join(names)
    existing = ", ".join(map(str, table)) or "none"
    raise InputError(f"{path} has no column '{wanted}', only {existing}: is it the right file?")


class PickledObject:
    """Stand-in for an unpickled object of a foreign class: its attributes, nothing else."""


# what a pickle may call: functions that make arrays, tensors and plain containers
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
    """Return the object in a pickle, or a .npy with a pickle: plain types and NumPy arrays.

    allowed: names of classes whose objects become PickledObjects; with it torch's tensors are read,
    too. Raises InputError for damaged files, and for those that would run code.
    """
    callables = dict(SAFE_IN_PICKLES)
    if allowed:
        import torch

        callables["torch._utils._rebuild_tensor_v2"] = torch._utils._rebuild_tensor_v2
        callables["torch.storage._load_from_bytes"] = lambda content: torch.load(
            io.BytesIO(content), weights_only=True
        )

    class RestrictedUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if name in allowed:
                return PickledObject
            module = re.sub(r"^numpy\.(_core|core)\.", "numpy.", module)  # in NumPy 2 or 1
            if f"{module}.{name}" not in callables:
                raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
            return callables[f"{module}.{name}"]

    check_content(path)
    try:
        with open(path, "rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
            file.seek(0)
            if is_npy:
                major, minor = np.lib.format.read_magic(file)
                getattr(np.lib.format, f"read_array_header_{major}_{minor}")(file)
            return RestrictedUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        problem = "it is damaged, or not what its name says; copy it again"
        raise InputError(f"{path} cannot be read ({reason}): {problem}") from None


def remedy(folder, option=""):
    """Return the end of an error: how to make the dataset if a prepare.py is near it, else ''."""
    folder = Path(folder)
    for parent in (folder, folder.parent, folder.parent.parent):
        if (parent / "prepare.py").is_file():
            return f"; make it with: python {parent / 'prepare.py'}{option}"
    return ""


# ---- what prepare scripts share


def folder_of(config, script, name=""):
    """Return a dataset's folder: config.out_dir, or the folder of its script (or `name` in it)."""
    folder = Path(config.out_dir or os.path.relpath(Path(script).resolve().parent / name))
    for parent in (folder, *folder.parents):
        if parent.is_file():
            raise InputError(f"out_dir={folder}: {parent} is a file: give a folder")
    return folder


def options_of(config, *others):
    """Return the options that decide a dataset's content: no out_dir, overwrite or `others`."""
    omitted = {"out_dir", "overwrite", *others}
    return {key: value for key, value in asdict(config).items() if key not in omitted}


def check_options(folder, made_with, options):
    """Raise InputError if a dataset was made with other options."""
    made_with = made_with or {}
    changed = [key for key in options if made_with.get(key) != options[key]]
    if changed:
        before = ", ".join(f"{key}={made_with.get(key)}" for key in changed)
        cure = "give overwrite=True to make it again, or another out_dir"
        raise InputError(f"{folder} was made with {before}: {cure}")


def already_made(folder, options, is_complete, overwrite=False, **version):
    """Return whether a dataset exists with these options and this version, and print it.

    is_complete: a format's `complete`. version: values in meta.yaml; a dataset with other values is
    made again.
    """
    if overwrite or not is_complete(folder):
        return False
    path = Path(folder) / "meta.yaml"
    meta = read_yaml(path.read_text(encoding="utf-8")) if path.is_file() else {}
    check_options(folder, meta.get("options"), options)
    for key, value in version.items():
        if meta.get(key) != value:
            print(f"{folder} was made from another version of its sources: making it again")
            return False
    print(f"{folder} already exists (overwrite=True makes it again)")
    return True


def embedded(name):
    """Return the folder of an embedded dataset under data/; make it first if it is missing."""
    folder = Path(__file__).parent / name
    if not (folder / "meta.yaml").exists():
        print(f"data/{name} does not exist yet: making it", flush=True)
        subprocess.run([sys.executable, str(folder / "prepare.py")], check=True)
    return folder
