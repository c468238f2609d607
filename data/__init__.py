"""Data formats, reader and writer in one file each; one folder per dataset, with its prepare.py.

This file is what they all share: `InputError`, how files are written, and how YAML, tables and
pickles are read.
"""

import collections
import io
import os
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import yaml


class InputError(ValueError):
    """Bad input: one sentence that names the file or option, what is wrong, and the remedy.

    Scripts end with that sentence and exit status 2 (see configurator.configure); any other
    exception is a bug.
    """


# ---- writing


@contextmanager
def aside(path):
    """Open a temporary file beside `path` for bytes; it becomes `path` when the block ends well.

    A reader sees the old file or the new one, never half of one.
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
    """The path, once the file and its content are known to be there. Raises InputError if not.

    A dataset cloned with git-annex or git-lfs holds links and pointers until they are fetched.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        if "annex" in target:
            raise InputError(
                f"{path} is a git-annex link whose content is missing: "
                "fetch it with git annex get (or datalad get)"
            )
        raise InputError(
            f"{path} is a link to {target}, whose content is missing: fetch it, or copy it here"
        )
    if not path.exists():
        raise InputError(f"{path} is missing{remedy(path.parent)}")
    if path.is_file() and path.stat().st_size < 1024:
        head = path.read_bytes()
        if head.startswith(b"version https://git-lfs") or b"/annex/objects/" in head[:200]:
            raise InputError(
                f"{path} is a pointer whose content is missing: "
                "fetch it with git lfs pull or git annex get"
            )
    return path


class _PlainLoader(yaml.SafeLoader):
    """Plain values only. Aliases are refused: a few lines of them can outgrow any memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: an alias (*) repeats a value: write it out")
        return super().compose_node(parent, index)


# YAML 1.1 reads 1e-3 as text; the JSON spelling of numbers is what people type.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(text):
    """Plain values from YAML text: no objects, no aliases. Raises yaml.YAMLError."""
    return yaml.load(text, _PlainLoader)


def load_meta(folder, what, format, keys=()):
    """meta.yaml of a prepared dataset as a dict.

    what: the kind of dataset in words; format: what its `format` key must say; keys: other keys
    it needs. Raises InputError where there is no finished dataset or it is of another format.
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
    if not isinstance(meta, dict):
        meta = {}
    if meta.get("format") != format:
        raise InputError(
            f"{path} has the format {str(meta.get('format'))[:40]!r}, not {format!r}"
            f"{remedy(folder)}"
        )
    for key in keys:
        if meta.get(key) is None:
            raise InputError(f"{path} lacks the key '{key}'{remedy(folder)}")
    return meta


def read_table(path, **options):
    """pandas.read_csv(path, **options); words such as NA and null stay text. Raises InputError."""
    import pandas as pd

    check_content(path)
    try:
        return pd.read_csv(path, keep_default_na=False, **options)
    except ValueError as error:  # the errors of pandas and UnicodeDecodeError are ValueErrors
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} is not a CSV table ({reason}){remedy(Path(path).parent)}"
        ) from None


class PickledObject:
    """What an unpickled object of somebody else's class becomes: its attributes, nothing else."""


def read_pickle(path, allowed=()):
    """The object in a pickle file: plain types, and PickledObjects for class names in `allowed`.

    With `allowed`, torch tensors are read too, through weights_only=True. Raises InputError for a
    torn file and for one that asks for anything else, such as code.
    """
    import torch

    known = {}
    if allowed:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch.storage", "_load_from_bytes"): _load_storage,
        }

    class RestrictedUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if name in allowed:
                return PickledObject
            if (module, name) not in known:
                raise pickle.UnpicklingError(f"it wants {module}.{name}")
            return known[module, name]

    check_content(path)
    try:
        with open(path, "rb") as file:
            return RestrictedUnpickler(file).load()
    except Exception as error:  # a torn pickle raises nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise InputError(
            f"{path} cannot be read ({reason}): it is torn, or not what its name says"
        ) from None


def _load_storage(content):
    import torch

    return torch.load(io.BytesIO(content), weights_only=True)


def remedy(folder, option=""):
    """The end of a sentence: how to make the dataset, if a prepare.py is near it, else ''."""
    folder = Path(folder)
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "prepare.py").is_file():
            return f"; make it with: python {place / 'prepare.py'}{option}"
    return ""
