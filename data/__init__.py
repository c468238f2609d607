"""The data formats, writer and reader side by side, and one folder per dataset with its prepare.py. Here: how all of them write a file and read YAML."""
import os
from contextlib import contextmanager
from pathlib import Path

import yaml


@contextmanager
def aside(path):
    """Open a temporary file beside `path` for writing bytes; flushed, synced and renamed to `path` when the block ends well, so that a reader sees
    the old file or the new one, never a half."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk does not say which file it was
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_aside(path, content):
    """Write a file of text or bytes, aside."""
    with aside(path) as f:
        f.write(content.encode() if isinstance(content, str) else content)


def write_yaml(path, value):
    """Write plain values as YAML, aside, in their order."""
    write_aside(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000))


class _Plain(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for more than fits a memory
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: * repeats something: write it out")
        return super().compose_node(parent, index)


def read_yaml(text):
    """What a YAML text says: plain values, no objects, nothing repeated by reference. Raises yaml.YAMLError."""
    return yaml.load(text, _Plain)


def load_meta(folder, what, format, keys=()):
    """meta.yaml of a dataset, `what` in words, as a dict. Raises FileNotFoundError when there is no (finished) one, ValueError when it is of another
    format, or lacks one of `keys`."""
    path = Path(folder) / "meta.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} " + (f"holds no finished {what} (no meta.yaml)" if path.parent.is_dir() else "does not exist") + remedy(folder))
    try:
        meta = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{path} is not YAML{remedy(folder)}") from None
    meta = meta if isinstance(meta, dict) else {}
    if meta.get("format") != format:
        raise ValueError(f"{path} has the format {str(meta.get('format'))[:40]!r} where {format!r} is read{remedy(folder)}")
    for key in keys:
        if meta.get(key) is None:
            raise ValueError(f"{path} lacks the key '{key}'{remedy(folder)}")
    return meta


def read_table(path, **options):
    """pandas.read_csv(path, **options). Raises ValueError for what is no table, FileNotFoundError where there is none."""
    import pandas as pd
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing{remedy(Path(path).parent)}")
    try:
        return pd.read_csv(path, **{"keep_default_na": False, **options})
    except ValueError as e:  # pandas's errors and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not a CSV table ({' '.join(str(e).split())}){remedy(Path(path).parent)}") from None


def remedy(folder, option=""):
    """How to make a dataset, for the end of a sentence: its prepare.py, in the folder or above it (a variant or a part of it), where there is one."""
    folder = Path(folder)
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "prepare.py").is_file():
            return f"; make it with: python {place / 'prepare.py'}{option}"
    return ""
