"""Downloads over https: announced beforehand, resumed after a stop, and checked at the end.

files = [look_up(url, path), ...]            # RemoteFile with its size, or None
download(files, folder)                      # checks the disk, then fetches file by file
"""

import http.client
import io
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import InputError, file_hash

NETWORK_ERRORS = (OSError, http.client.HTTPException)  # the errors of urllib are OSErrors


@dataclass
class RemoteFile:
    """A file to fetch: its URL, local path, size in bytes, and md5 or sha1 ('': unknown)."""

    url: str
    path: Path
    size: int
    checksum: str = ""


def request(url, start=None, stop=None, method="GET"):
    """Request the bytes [start, stop) of a URL, or all of it; returns the response."""
    message = urllib.request.Request(url, method=method)
    if start is not None:
        message.add_header("Range", f"bytes={start}-{'' if stop is None else stop - 1}")
    return urllib.request.urlopen(message, timeout=60)


def unreachable(url, error):
    """Return the InputError for a network error."""
    reason = getattr(error, "reason", error)
    cure = "try again with a network connection, or give root= a local copy"
    return InputError(f"{url} cannot be reached ({reason}): {cure}")


def look_up(url, path, checksum=""):
    """Return the RemoteFile of a URL, None if it does not exist. Raises InputError offline."""
    try:
        with request(url, method="HEAD") as response:
            size = response.headers["Content-Length"]
            etag = response.headers.get("ETag", "").strip('"')
        if not size:
            raise OSError("the server does not tell the file's size")
    except NETWORK_ERRORS as error:
        if getattr(error, "code", 0) in (403, 404):  # 403: a bucket without this file
            return None
        raise unreachable(url, error) from None
    is_md5 = re.fullmatch("[0-9a-f]{32}", etag)  # the tag of a file uploaded in parts is none
    return RemoteFile(url, Path(path), int(size), checksum or (etag if is_md5 else ""))


def need(url, path, checksum=""):
    """Return the RemoteFile of a URL. Raises InputError if it does not exist."""
    file = look_up(url, path, checksum)
    if file is None:
        raise InputError(f"{url} does not exist: give root= a local copy, or another url=")
    return file


def download(files, folder, times=2.1):
    """Fetch RemoteFiles one by one, skipping complete ones. times: disk space that the dataset
    needs in the end, as a multiple of the download."""
    files = [file for file in files if size_of(file.path) != file.size]
    if not files:
        return
    size = sum(file.size for file in files)
    Path(folder).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    print(f"{len(files)} files, {size / 1e9:.2f} GB, into {folder} ({free / 1e9:.0f} GB free)")
    if times * size > free:
        raise InputError(
            f"{folder} has {free / 1e9:.1f} GB free, but about {times * size / 1e9:.1f} GB are "
            f"needed: choose fewer subjects=, or use a larger disk"
        )
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as progress:
        for file in files:
            progress.set_description(file.path.name)
            fetch(file, progress)


def fetch(file, progress=None, tries=5, pause=1.0):
    """Fetch one RemoteFile, continuing an earlier PATH.part, which is renamed once size and
    checksum are right. Raises InputError otherwise."""
    part = file.path.with_name(f"{file.path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    progress = progress or tqdm(disable=True)
    progress.update(size_of(part))
    reason = "the connection was cut"
    for attempt in range(tries):
        if size_of(part) > file.size:  # of another version
            part.unlink()
        if size_of(part) == file.size:
            break
        time.sleep(pause * (2**attempt - 1))
        try:
            _append(file.url, part, progress)
        except NETWORK_ERRORS as error:
            reason = getattr(error, "reason", error)
    if size_of(part) != file.size:
        received = f"received {size_of(part):,} of {file.size:,} bytes ({reason})"
        cure = "run the same command again to continue, or give root= a local copy"
        raise InputError(f"{file.url}: {received}; {cure}")
    kind = "md5" if len(file.checksum) == 32 else "sha1"
    if file.checksum and file_hash(part, kind) != file.checksum:
        part.unlink()
        raise InputError(
            f"{file.url} arrived damaged, or is another version ({kind} differs), and was removed: "
            "run the same command again, or give root= a local copy"
        )
    os.replace(part, file.path)


def _append(url, part, progress):
    """Append the missing bytes of a URL to a file."""
    start = size_of(part) or None
    with request(url, start) as response, open(part, "ab") as file:
        if start and response.status != 206:  # a server without ranges sends everything
            file.truncate(0)
        while block := response.read(1 << 20):
            file.write(block)
            progress.update(len(block))


def size_of(path):
    return path.stat().st_size if path.exists() else 0


class RemoteReader(io.RawIOBase):
    """A read-only file object that fetches only the requested bytes of a RemoteFile."""

    def __init__(self, file):
        self.file = file
        self.position = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=0):
        self.position = offset + (0, self.position, self.file.size)[whence]
        return self.position

    def readinto(self, buffer):
        count = min(len(buffer), self.file.size - self.position)
        if count <= 0:
            return 0
        with request(self.file.url, self.position, self.position + count) as response:
            content = response.read()
        if response.status != 206 or len(content) != count:
            raise OSError(f"received {len(content):,} of {count:,} requested bytes")
        buffer[:count] = content
        self.position += count
        return count
