import functools
import http.server
import io
import multiprocessing
import os
import socket
import struct
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from iopath.common.file_io import PathHandler

from detkit.utils import remote_files
from detkit.utils.download import DownloadError
from detkit.utils.errors import ConfigError, MissingFileError, MissingPackageError
from detkit.utils.file_io import PathManager, read_file
from detkit.utils.image_file import BadImageError, read_image_bytes
from detkit.utils.remote_files import is_address, join_address, read_address, relocated, stem_of


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder, and counts what was asked for."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.asked = []
        self.failures = 0
        self.hangs_up = False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        if self.server.hangs_up:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            # Closed without waiting, the socket is reset.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            return
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DETKIT_OFFLINE", raising=False)
    monkeypatch.delenv("DETKIT_REMOTE_CACHE_GB", raising=False)
    monkeypatch.setattr(remote_files, "SCHEMES", ("https", "http"))
    monkeypatch.setattr(remote_files, "_WAITS", (0.0, 0.0))
    return tmp_path / "cache" / "remote"


@pytest.fixture
def served(tmp_path):
    (tmp_path / "served").mkdir()
    return tmp_path / "served"


@pytest.fixture
def server(served):
    server = Server(served)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def write_archive(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def copies(cache):
    return sorted(p for p in cache.glob("??/*") if p.is_file())


def test_a_file_is_fetched_once(server, served, cache):
    (served / "a.bin").write_bytes(b"content")
    for _ in range(2):
        assert read_address(f"{server.url}/a.bin") == b"content"
    assert server.asked == ["/a.bin"]
    assert len(copies(cache)) == 1


def test_a_store_of_fsspec_is_read(cache):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/a.bin", b"content")
    assert read_file("memory://bucket/a.bin") == b"content"
    store.rm("/bucket/a.bin")
    assert read_file("memory://bucket/a.bin") == b"content"
    with pytest.raises(DownloadError, match="memory://bucket/gone: FileNotFoundError"):
        read_address("memory://bucket/gone")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_files_in_archives(kind, server, served, cache):
    pytest.importorskip("fsspec")
    path = write_archive(served / f"a.{kind}", {"x/1.bin": b"one", "x/2.bin": b"two"})
    for source in (f"{server.url}/a.{kind}", str(path)):
        assert read_address(f"{kind}://x/1.bin::{source}") == b"one"
        assert read_address(f"{kind}://x/2.bin::{source}") == b"two"
        with pytest.raises(DownloadError, match="gone.bin"):
            read_address(f"{kind}://x/gone.bin::{source}")
    assert server.asked == [f"/a.{kind}"]


def test_a_damaged_archive_is_a_bad_image(served):
    pytest.importorskip("fsspec")
    (served / "a.zip").write_bytes(b"no zip")
    with pytest.raises(BadImageError, match=r"image file zip://1.jpg.* cannot be read: .*BadZip"):
        read_image_bytes(f"zip://1.jpg::{served}/a.zip")


def test_files_of_archives_are_bounded(served, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setattr(remote_files, "_MAX_BYTES", 100)
    path = write_archive(served / "a.zip", {"small": b"0" * 100, "large": b"0" * 101})
    assert len(read_address(f"zip://small::{path}")) == 100
    with pytest.raises(DownloadError, match="more than 100 bytes"):
        read_address(f"zip://large::{path}")


def test_a_missing_file_is_not_asked_for_again(server):
    with pytest.raises(BadImageError, match="404"):
        read_image_bytes(f"{server.url}/gone.jpg")
    assert len(server.asked) == 1


def test_a_failing_server_is_asked_three_times(server, served):
    (served / "a").write_bytes(b"content")
    server.failures = 2
    assert read_address(f"{server.url}/a") == b"content"
    server.failures = 3
    with pytest.raises(DownloadError, match="503"):
        read_address(f"{server.url}/a?again")
    assert len(server.asked) == 6


def test_a_server_that_hangs_up_is_a_bad_image(server):
    server.hangs_up = True
    with pytest.raises(
        BadImageError, match=r"a\.jpg\?\.\.\. cannot be read: .*Connection"
    ) as caught:
        read_image_bytes(f"{server.url}/a.jpg?signature=secret")
    assert "secret" not in str(caught.value)
    assert len(server.asked) == 3


def test_messages_leave_out_signatures(server, served, cache, monkeypatch):
    pytest.importorskip("fsspec")
    (served / "a.zip").write_bytes(b"no zip")
    with pytest.raises(BadImageError, match="BadZip") as caught:
        read_image_bytes(f"zip://a.jpg::{server.url}/a.zip?signature=secret")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    with pytest.raises(ConfigError, match="DETKIT_OFFLINE is set") as caught:
        read_image_bytes(f"{server.url}/b?signature=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", ["sftp://me:secret@host/a", "zip://a::https://secret@host/b"])
def test_an_address_with_a_password_is_refused(address):
    with pytest.raises(ConfigError, match=r"\.\.\.@host/. has a user or password") as caught:
        read_address(address)
    assert "secret" not in str(caught.value)


def test_copies_used_longest_ago_make_room(server, served, cache, monkeypatch):
    monkeypatch.setenv("DETKIT_REMOTE_CACHE_GB", "4e-6")  # 4000 bytes
    outside = served.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"0" * 5000)
    cache.mkdir(parents=True)
    (cache / "zz").symlink_to(outside)
    for k in range(5):
        (served / str(k)).write_bytes(bytes([k]) * 1000)
    for k in (0, 1, 2, 3, 0, 4):
        read_address(f"{server.url}/{k}")
        time.sleep(0.01)
    for k in (0, 4, 3):
        read_address(f"{server.url}/{k}")
    assert len(server.asked) == 5
    read_address(f"{server.url}/1")
    assert len(server.asked) == 6
    assert sum(p.stat().st_size for p in copies(cache) if p.parent.name != "zz") <= 4000
    assert (outside / "kept").is_file()


def test_a_file_larger_than_the_cache(server, served, cache, monkeypatch):
    pytest.importorskip("fsspec").filesystem("memory").pipe("/b/large", b"0" * 2000)
    monkeypatch.setenv("DETKIT_REMOTE_CACHE_GB", "1e-6")
    (served / "large").write_bytes(b"0" * 2000)
    with pytest.raises(DownloadError, match="sends more than 1000 bytes"):
        read_address(f"{server.url}/large")
    with pytest.raises(DownloadError, match="has 2000 bytes"):
        read_address("memory://b/large")
    assert copies(cache) == []


@pytest.mark.parametrize("value", ["", "none", "0", "-1", "nan", "inf"])
def test_a_wrong_size_of_the_cache(value, server, monkeypatch):
    monkeypatch.setenv("DETKIT_REMOTE_CACHE_GB", value)
    with pytest.raises(ConfigError, match="DETKIT_REMOTE_CACHE_GB must be a number above 0"):
        read_address(f"{server.url}/a")


def _read_all(urls, answers):
    answers.put([len(read_address(url)) for url in urls])


def test_processes_share_a_small_cache(server, served, cache, monkeypatch):
    monkeypatch.setenv("DETKIT_REMOTE_CACHE_GB", "5e-6")
    for k in range(12):
        (served / str(k)).write_bytes(bytes([k]) * 1000)
    urls = [f"{server.url}/{k % 12}" for k in range(36)]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=_read_all, args=(urls[k:] + urls[:k], answers)) for k in (0, 1, 5)
    ]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [[1000] * 36] * 3
    for process in processes:
        process.join(60)
    assert sum(p.stat().st_size for p in copies(cache)) <= 5000
    assert not list(cache.rglob("*.tmp"))


def test_an_open_archive_is_not_shared_with_a_forked_process(served):
    pytest.importorskip("fsspec")
    files = {f"{k}": os.urandom(3000) for k in range(20)}
    path = write_archive(served / "a.zip", files)
    read_address(f"zip://0::{path}")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    urls = [f"zip://{k}::{path}" for k in range(20)] * 20
    processes = [context.Process(target=_read_all, args=(urls, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [[3000] * 400] * 2
    for process in processes:
        process.join(60)


def test_offline_reads_copies_alone(server, served, monkeypatch):
    pytest.importorskip("fsspec")
    for name in ("a", "b"):
        (served / name).write_bytes(b"content")
    read_address(f"{server.url}/a")
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    assert read_address(f"{server.url}/a") == b"content"
    path = write_archive(served / "a.zip", {"a": b"local"})
    assert read_address(f"zip://a::{path}") == b"local"
    # Not a bad image: ON_BAD_IMAGE must not skip a whole data set.
    with pytest.raises(ConfigError, match="DETKIT_OFFLINE is set"):
        read_image_bytes(f"{server.url}/b")
    assert server.asked == ["/a"]


def test_only_https_is_fetched(monkeypatch, served):
    pytest.importorskip("fsspec")
    monkeypatch.undo()
    for address in ("http://x.org/a.jpg", "zip://a.jpg::ftp://x.org/a.zip"):
        with pytest.raises(ConfigError, match="is not fetched: only https is"):
            read_file(address)


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("zip://a.jpg", ConfigError, "need a file's address such as"),
        ("s3://b/a.jpg::file:///etc/passwd", ConfigError, "need a file's address such as"),
        ("zip://a::zip://b::/data/c.zip", ConfigError, "need a file's address such as"),
        ("zip://a::/nowhere/c.zip", MissingFileError, "archive /nowhere/c.zip does not exist"),
        ("nothing://b/a.jpg", ConfigError, "nothing"),
    ],
)
def test_addresses_that_cannot_be_read(address, error, message):
    pytest.importorskip("fsspec")
    with pytest.raises(error, match=message):
        read_address(address)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'detkit-vision\[remote\]'"):
        read_image_bytes("s3://bucket/a.jpg")


def test_a_handler_of_the_user_goes_first(monkeypatch):
    class Mine(PathHandler):
        def _get_supported_prefixes(self):
            return ["mine://"]

        def _open(self, path, mode="r", buffering=-1, **kwargs):
            return io.BytesIO(path.encode())

    monkeypatch.setattr(PathManager, "_path_handlers", dict(PathManager._path_handlers))
    PathManager.register_handler(Mine())
    assert read_file("mine://a") == b"mine://a"


def test_addresses_are_told_from_paths():
    assert all(map(is_address, ("s3://b/a", "https://x.org/a", "zip://a::/data/b.zip")))
    assert not any(map(is_address, ("a/b", "/data/s3://b", "C:\\data", "a::b", "")))


@pytest.mark.parametrize(
    ("folder", "name", "address"),
    [
        ("s3://b", "a 1#.jpg", "s3://b/a 1#.jpg"),
        ("https://x.org/d/", "e/a 1#?.jpg", "https://x.org/d/e/a%201%23%3F.jpg"),
        ("zip://::/data/a.zip", "x/1.jpg", "zip://x/1.jpg::/data/a.zip"),
        ("zip://train::s3://b/a.zip", "1.jpg", "zip://train/1.jpg::s3://b/a.zip"),
    ],
)
def test_names_are_joined_to_folders(folder, name, address):
    assert join_address(folder, name) == address


@pytest.mark.parametrize(
    "name", ["x/a.b.jpg", "https://x.org/y/a.b.jpg", "zip://y/a.b.jpg::/data/c.zip", "a.b.jpg"]
)
def test_pictures_are_called_like_the_file_in_an_archive(name):
    assert stem_of(name) == "a.b"


def test_local_archives_are_relocated():
    def place(path):
        return f"/root/{path}"

    assert relocated("a::b", place) == "/root/a::b"
    assert relocated("zip://x::a.zip", place) == "zip://x::/root/a.zip"
    assert relocated("zip://x::s3://b/a.zip", place) == "zip://x::s3://b/a.zip"
    assert relocated("s3://b", place) == "s3://b"
    assert Path(relocated("a", place)) == Path("/root/a")
