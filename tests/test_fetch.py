"""data/fetch.py: downloads are complete and can be resumed. Other tests use `serve`, too."""

import hashlib
import threading
from contextlib import contextmanager, nullcontext
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from data import InputError
from data import fetch as downloads

BODY = bytes(range(256)) * 100


@contextmanager
def serve(root):
    """Serve a folder as S3 does. Attributes: url; cut: bytes after which every response ends;
    ranges: whether they are supported; sent: {name: bytes}; asked: number of requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            path = root / (self.path.lstrip("/") or "index.html")
            server.asked += 1
            if not path.is_file():
                self.send_error(403)
                return
            content = part = path.read_bytes()
            span = self.headers.get("Range", "")
            partial = bool(span) and server.ranges
            if partial:
                first, last = span.removeprefix("bytes=").split("-")
                part = content[int(first) : int(last) + 1 if last else None]
            self.send_response(206 if partial else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
            self.end_headers()
            if body:
                part = part[: server.cut]
                server.sent[path.name] = server.sent.get(path.name, 0) + len(part)
                self.wfile.write(part)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.cut, server.sent, server.asked, server.ranges = None, {}, 0, True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote/a").write_bytes(BODY)
    with serve(tmp_path / "remote") as running:
        yield running


def test_a_broken_fetch_continues_where_it_stopped(server, tmp_path):
    file = downloads.look_up(f"{server.url}/a", tmp_path / "x")
    assert (file.size, file.checksum) == (len(BODY), hashlib.md5(BODY).hexdigest())
    server.cut = file.size // 3 + 1
    with pytest.raises(InputError, match="received .* bytes .* run the same command again"):
        downloads.fetch(file, tries=1, pause=0)
    part = tmp_path / "x.part"
    assert not file.path.exists() and part.stat().st_size == server.cut
    downloads.fetch(file, tries=3, pause=0)
    assert file.path.read_bytes() == BODY and server.sent["a"] == file.size  # no byte twice
    file.path.unlink()
    part.write_bytes(BODY)  # complete when the process was killed
    downloads.fetch(file, pause=0)
    assert file.path.read_bytes() == BODY and server.sent["a"] == file.size
    server.cut, server.ranges = None, False  # a server without ranges sends everything
    part.write_bytes(BODY[:1000])
    downloads.fetch(file, pause=0)
    assert file.path.read_bytes() == BODY


@pytest.mark.parametrize("checksum", ["", hashlib.sha1(b"another").hexdigest()])
def test_damage_and_other_versions_are_removed(server, tmp_path, checksum):
    file = downloads.look_up(f"{server.url}/a", tmp_path / "x", checksum)
    if not checksum:  # the server has one, and the part is of another file
        (tmp_path / "x.part").write_bytes(b"\0" * 1000)
    with pytest.raises(InputError, match="arrived damaged, or is another version"):
        downloads.fetch(file, pause=0)
    assert not file.path.exists() and not (tmp_path / "x.part").exists()


def test_missing_unreachable_and_too_large_files_are_reported(server, tmp_path, monkeypatch):
    assert downloads.look_up(f"{server.url}/none", tmp_path / "x") is None
    with pytest.raises(InputError, match="/none does not exist"):
        downloads.need(f"{server.url}/none", tmp_path / "x")
    with pytest.raises(InputError, match="cannot be reached .* give root= a local copy"):
        downloads.look_up("http://127.0.0.1:9/a", tmp_path / "x")
    response = nullcontext(SimpleNamespace(headers=Message()))
    monkeypatch.setattr(downloads, "request", lambda *_, **__: response)
    with pytest.raises(InputError, match="does not tell the file's size"):
        downloads.look_up(f"{server.url}/a", tmp_path / "x")
    monkeypatch.undo()
    files = [downloads.need(f"{server.url}/a", tmp_path / "x")]
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="choose fewer subjects="):
        downloads.download(files, tmp_path)
    monkeypatch.undo()
    downloads.download(files, tmp_path)
    downloads.download(files, tmp_path)  # skips it
    assert server.sent["a"] == len(BODY)
