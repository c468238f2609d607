"""Downloads over https: told before they start, continued where they stopped, checked at the end.

    files = [look_up(url, path), ...]            # RemoteFile with its size, or None
    download(files, folder)                      # free disk first, then file by file

`RemoteReader` reads parts of a remote file, such as one layer out of an HDF5 file of gigabytes.
"""

import hashlib
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

from data import InputError

NETWORK_ERRORS = (OSError, http.client.HTTPException)  # the errors of urllib are OSErrors


@dataclass
class RemoteFile:
    """A file to fetch: where it is, where it goes, its bytes, and its md5 ('' where unknown)."""

    url: str
    path: Path
    size: int
    md5: str = ""


def request(url, start=None, stop=None, method="GET"):
    """The answer to a request for the bytes [start, stop) of a URL, or for all of it."""
    headers = {}
    if start is not None:
        last = "" if stop is None else stop - 1
        headers["Range"] = f"bytes={start}-{last}"
    return urllib.request.urlopen(
        urllib.request.Request(url, headers=headers, method=method), timeout=60
    )


def reason_of(error):
    """What went wrong, in words, for a message."""
    return getattr(error, "reason", error)


def look_up(url, path):
    """RemoteFile of a URL, None where there is none. InputError where it cannot be reached."""
    try:
        with request(url, method="HEAD") as response:
            size = int(response.headers["Content-Length"])
            etag = response.headers.get("ETag", "").strip('"')
    except urllib.error.HTTPError as error:
        if error.code in (403, 404):  # 403: a bucket that has no such file
            return None
        raise InputError(f"{url} cannot be reached (HTTP {error.code})") from None
    except NETWORK_ERRORS as error:
        raise InputError(
            f"{url} cannot be reached ({reason_of(error)}): try again with a network connection, "
            "or give root= a local copy"
        ) from None
    is_md5 = re.fullmatch("[0-9a-f]{32}", etag)  # the tag of a file uploaded in parts is not
    return RemoteFile(url, Path(path), size, etag if is_md5 else "")


def download(files, folder, *, times=2.1, remedy="choose fewer subjects=", then=None):
    """Fetch RemoteFiles one by one, with a progress bar.

    folder: where they go; times: disk that is needed in the end, in sizes of the download;
    remedy: how to need less; then(path): what to do with each file once it is whole.
    """
    if not files:
        return
    size = sum(file.size for file in files)
    free = shutil.disk_usage(folder).free
    print(f"{len(files)} files, {size / 1e9:.2f} GB, into {folder} ({free / 1e9:.0f} GB free)")
    if times * size > free:
        raise InputError(
            f"{folder} has {free / 1e9:.1f} GB free where about {times * size / 1e9:.1f} GB are "
            f"needed: {remedy}, or use a larger disk"
        )
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as progress:
        for file in files:
            progress.set_description(file.path.name)
            fetch(file, progress)
            if then is not None:
                then(file.path)


def fetch(file, progress=None, tries=5, pause=1.0):
    """Fetch one RemoteFile, continuing PATH.part where an earlier attempt left off.

    The file gets its name when its size and md5 are right. Raises InputError otherwise.
    """
    part = file.path.with_name(f"{file.path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if progress is not None:
        progress.update(_size(part))
    reason = "the connection was cut"
    for attempt in range(tries):
        if _size(part) > file.size:  # of another version
            part.unlink()
        if _size(part) == file.size:
            break
        time.sleep(pause * (2**attempt - 1))
        try:
            _append(file.url, part, progress)
        except NETWORK_ERRORS as error:
            reason = reason_of(error)
    if _size(part) != file.size:
        raise InputError(
            f"{file.url}: {_size(part):,} of {file.size:,} bytes came ({reason}); "
            "run the same command again to continue"
        )
    if file.md5:
        with open(part, "rb") as content:
            md5 = hashlib.file_digest(content, "md5").hexdigest()
        if md5 != file.md5:
            part.unlink()
            raise InputError(
                f"{file.url} came damaged (md5 {md5} where the server says {file.md5}) and was "
                "removed: run the same command again"
            )
    os.replace(part, file.path)


def _append(url, part, progress):
    """Append what is missing of a URL to a file."""
    start = _size(part) or None
    with request(url, start) as response, open(part, "ab") as file:
        if start and response.status != 206:  # a server without ranges sends everything again
            file.truncate(0)
        while block := response.read(1 << 20):
            file.write(block)
            if progress is not None:
                progress.update(len(block))


def _size(path):
    return path.stat().st_size if path.exists() else 0


class RemoteReader(io.RawIOBase):
    """A RemoteFile as a read-only file object that fetches the bytes that are asked for."""

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
            raise OSError(f"{len(content):,} bytes came where {count:,} were asked for")
        buffer[:count] = content
        self.position += count
        return count
