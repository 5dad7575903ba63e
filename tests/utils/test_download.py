import hashlib
import http.server
import io
import multiprocessing
import re
import socket
import sys
import threading
from pathlib import Path

import pytest

from detkit.utils import download
from detkit.utils.download import DownloadError, cache_path, fetch, is_offline
from detkit.utils.errors import UserError

CONTENT = bytes(range(256)) * 100
HTTP = ("http",)


class Server(http.server.ThreadingHTTPServer):
    """Serves /weights.pth, /slow/..., /short/... (ends too early) and /away (redirects to https)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.may_answer = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/slow/"):
            self.server.may_answer.wait(20)
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/weights.pth")
            self.end_headers()
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:100] if self.path.startswith("/short/") else CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.delenv("DETKIT_OFFLINE", raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_sockets(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def place_of(server):
    return f"127.0.0.1_{server.server_port}"


def files(folder):
    return sorted(
        str(p.relative_to(folder))
        for p in Path(folder).rglob("*")
        if p.is_file() and p.suffix != ".lock"
    )


def test_file_is_fetched_once(server, tmp_path):
    path = fetch(f"{server.url}/a/weights.pth", schemes=HTTP)
    assert path == tmp_path / place_of(server) / "a" / "weights.pth"
    assert path.read_bytes() == CONTENT
    assert fetch(f"{server.url}/a/weights.pth", schemes=HTTP) == path
    assert server.asked == ["/a/weights.pth"]
    assert files(tmp_path) == [f"{place_of(server)}/a/weights.pth"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(is_terminal, server, tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", screen)
    fetch(f"{server.url}/weights.pth", tmp_path / "a.pth", schemes=HTTP)
    assert ("/25.6k" in screen.getvalue()) == is_terminal


def test_place_may_be_given(server, tmp_path):
    assert (
        fetch(f"{server.url}/w.pth", tmp_path / "x" / "y.pth", schemes=HTTP)
        == tmp_path / "x" / "y.pth"
    )
    assert files(tmp_path) == ["x/y.pth"]


def test_right_hash_passes_and_wrong_hash_leaves_nothing(server, tmp_path):
    right = hashlib.sha256(CONTENT).hexdigest()
    fetch(f"{server.url}/right.pth", sha256=right[:8], schemes=HTTP)
    with pytest.raises(
        OSError, match=rf"wrong\.pth has sha256 {right}, expected one that starts with 0000"
    ):
        fetch(f"{server.url}/wrong.pth", sha256="0000", schemes=HTTP)
    assert files(tmp_path) == [f"{place_of(server)}/right.pth"]


def test_download_that_is_cut_short_leaves_nothing(server, tmp_path):
    with pytest.raises(OSError, match=f"100 of {len(CONTENT)} bytes|IncompleteRead"):
        fetch(f"{server.url}/short/w.pth", schemes=HTTP)
    assert files(tmp_path) == []


def test_stream_without_end_is_ended(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_MAX_BYTES", len(CONTENT) - 1)
    with pytest.raises(DownloadError, match=rf"w\.pth sends more than {len(CONTENT) - 1} bytes"):
        fetch(f"{server.url}/w.pth", schemes=HTTP)
    assert files(tmp_path) == []
    monkeypatch.setattr(download, "_MAX_BYTES", len(CONTENT))
    fetch(f"{server.url}/w.pth", schemes=HTTP)


def test_missing_file_is_an_error(server, tmp_path):
    with pytest.raises(OSError, match="404"):
        fetch(f"{server.url}/gone", schemes=HTTP)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"SSH-2.0-x\r\n", id="another-protocol"),
        pytest.param(b"HTTP/1.1 200 " + b"a" * 70_000 + b"\r\n\r\n", id="endless-line"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", id="many-headers"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: three\r\n\r\nabc", id="length-in-words"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", id="bad-chunk"),
        pytest.param(b"", id="nothing"),
    ],
)  # fmt: skip
def test_answer_that_is_no_file_is_a_users_error(tmp_path, answer):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=_answer_once, args=(listening, answer))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/w.pth"
        with pytest.raises(DownloadError, match=r"/w\.pth: \S"):
            fetch(url, tmp_path / "w.pth", schemes=HTTP)
        thread.join()
    assert files(tmp_path) == []


def _answer_once(listening, answer):
    connection, _ = listening.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(answer)


def test_spaces_and_letters_of_an_address_are_quoted(server, tmp_path):
    fetch(f"{server.url}/my größe\r\nX: y/w.pth", tmp_path / "w.pth", schemes=HTTP)
    assert server.asked == ["/my%20gr%C3%B6%C3%9Fe%0D%0AX:%20y/w.pth"]


@pytest.mark.parametrize("url", ["https://[::1/w.pth", "http://127.0.0.1:abc/w.pth"])
def test_what_is_no_address_is_a_users_error(tmp_path, url):
    with pytest.raises(UserError, match=r"Invalid IPv6 URL|nonnumeric port"):
        fetch(url, tmp_path / "w.pth", schemes=("http", "https"))


def test_host_named_like_a_folder_of_detectron2_has_a_place_of_its_own():
    ours = cache_path("https://dl.fbaipublicfiles.com/detectron2/x/w.pkl")
    assert cache_path("https://detectron2/x/w.pkl") != ours


def test_redirect_to_another_scheme_is_not_followed(server):
    with pytest.raises(
        OSError, match=r"/away redirects to ftp://127\.0\.0\.1/weights\.pth: only http is followed"
    ):
        fetch(f"{server.url}/away", schemes=HTTP)


def test_server_that_is_not_there_is_an_error(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        fetch(f"http://127.0.0.1:{port}/w.pth", schemes=HTTP)


def _fetch_in_process(url, place, queue):
    queue.put(fetch(url, Path(place), schemes=HTTP).read_bytes() == CONTENT)


def test_two_processes_ask_at_once_and_one_downloads(server, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (f"{server.url}/slow/w.pth", str(tmp_path / "w.pth"), queue)
    processes = [context.Process(target=_fetch_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    server.may_answer.set()
    assert [queue.get(timeout=30) for _ in processes] == [True, True]
    for process in processes:
        process.join()
    assert server.asked == ["/slow/w.pth"]
    assert files(tmp_path) == ["w.pth"]


def test_offline_opens_no_socket_and_names_the_place(no_sockets, monkeypatch, tmp_path):
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    place = re.escape(str(tmp_path / "x.org" / "models" / "w.pth"))
    with pytest.raises(
        OSError, match=rf"DETKIT_OFFLINE is set: download https://x\.org/models/w\.pth .*{place}$"
    ):
        fetch("https://x.org/models/w.pth")


def test_offline_takes_what_is_there(no_sockets, monkeypatch, tmp_path):
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    (tmp_path / "x.org").mkdir()
    (tmp_path / "x.org" / "w.pth").write_bytes(b"weights")
    assert fetch("https://x.org/w.pth").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("value", "offline"), [("1", True), ("yes", True), ("0", False), ("", False)]
)
def test_values_of_the_variable(monkeypatch, value, offline):
    monkeypatch.setenv("DETKIT_OFFLINE", value)
    assert is_offline() == offline


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://x.org/w.pth", r"http://x\.org/w\.pth is not fetched: only https is"),
        ("file:///etc/passwd", "is not fetched"),
        ("https://x.org/", "names no file"),
        ("https://x.org/a/../../../w.pth", "leads out of the cache"),
        ("https://../w.pth", "leads out of the cache"),
        ("https://dl.fbaipublicfiles.com/../w.pth", "leads out of the cache"),
        ("https://x.org/w\0.pth", "leads out of the cache"),
    ],
)
def test_addresses_that_are_refused(no_sockets, url, message):
    with pytest.raises(ValueError, match=message):
        fetch(url)


def test_cache_is_where_detectron2_has_it(monkeypatch):
    monkeypatch.delenv("FVCORE_CACHE", raising=False)
    assert (
        cache_path("https://dl.fbaipublicfiles.com/detectron2/a/b.pkl")
        == Path("~/.torch/iopath_cache/detectron2/a/b.pkl").expanduser()
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://alice.example/model_final.pth", "https://mallory.example/model_final.pth"),
        ("https://drive.example/uc?id=AAA", "https://drive.example/uc?id=BBB"),
        ("https://drive.example/uc?id=AAA", "https://drive.example/uc"),
        ("https://x.example/w.pth", "https://x.example:8443/w.pth"),
        (
            "https://mallory.example/detectron2/a/b.pkl",
            "https://dl.fbaipublicfiles.com/detectron2/a/b.pkl",
        ),
    ],
)
def test_different_addresses_have_different_places(one, other):
    assert cache_path(one) != cache_path(other)


def test_ending_survives_a_query():
    assert cache_path("https://x.example/w.safetensors?download=1").suffix == ".safetensors"


def test_scheme_is_refused_although_a_file_is_there(no_sockets, tmp_path):
    place = cache_path("http://x.org/w.pth")
    place.parent.mkdir(parents=True)
    place.write_bytes(b"weights")
    with pytest.raises(ValueError, match="only https is"):
        fetch("http://x.org/w.pth")
