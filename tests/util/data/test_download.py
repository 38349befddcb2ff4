"""Downloads from a server on this machine that fails in every way that servers do."""

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request

import numpy as np
import pytest

from tests.pairwise import loop_over
from util.data import download
from util.data.download import DownloadError, fetch

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
fork = multiprocessing.get_context("fork")


class Server(ThreadingHTTPServer):
    """Answers one request after the other as `plan` says, the last for ever.

    Attributes:
        asked: the Range of each request, None without one.
    """

    daemon_threads = True
    plan = ("good",)

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked, self.held = [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/file.bin"


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        plan, asked = self.server.plan, self.server.asked
        how = plan[min(len(asked), len(plan) - 1)]
        asked.append(self.headers["Range"])
        start = 0
        if self.headers["Range"] and how != "knows no ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if isinstance(how, int):
            self.tell(how, {"Retry-After": "0"} if how == 503 else {})
        elif start >= len(CONTENT):
            self.tell(416, {"Content-Range": f"bytes */{len(CONTENT)}"})
        else:
            self.send(how, start)

    def send(self, how, start):
        content = CONTENT[::-1] if how == "other file" else CONTENT
        more = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        length = len(content) - start + {"says more": 500, "says less": -500}.get(how, 0)
        if how == "other range":
            more = {"Content-Range": f"bytes 7-{len(content) - 1}/{len(content)}"}
        more = (more if start else {}) | {"Content-Length": length}
        self.tell(206 if start else 200, {} if how in ("tells no length", "never ends") else more)
        part = content[start:]
        self.wfile.write(part[: {"drops": 100_000, "stalls": 1000}.get(how, len(part))])
        self.wfile.flush()
        while how == "never ends":
            try:
                self.wfile.write(content)
            except OSError:  # nobody listens any longer
                return
        if how == "stalls":
            self.server.held.wait(20)

    def tell(self, code, headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.001)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.held.set()
    server.shutdown()
    server.server_close()


def follow(server, plan, monkeypatch):
    """Start a plan from its first answer; a stall takes half a second."""
    server.plan, server.asked = plan, []
    monkeypatch.setattr(download, "TIMEOUT", 0.5 if "stalls" in plan else 30)


@loop_over(
    ("plan", "requests"),
    [
        (["good"], 1),
        (["tells no length"], 1),
        (["drops"], 3),
        (["stalls", "stalls", "good"], 3),
        (["knows no ranges"], 1),
        (["drops", "knows no ranges"], 2),
        ([503, 503, "drops", 503, 500, 429, "good"], 7),
        (["says more", "good"], 2),  # 416: there is nothing behind what has come
        (["says less", "good"], 2),
        (["drops", "other file", "good"], 3),
    ],
)
def test_a_download_survives(server, tmp_path, monkeypatch, plan, requests):
    follow(server, plan, monkeypatch)
    fetch(tmp_path / "file.bin", MD5, [server.url])
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]
    assert len(server.asked) == requests
    (tmp_path / "file.bin").unlink()


@loop_over(
    ("plan", "told", "requests"),
    [
        ([404], "the server answers 404 Not Found", 1),
        ([503], "the server answers 503 Service Unavailable, tried 5 times", 5),
        (["stalls", 503], "503 Service Unavailable, tried 5 times", 5),
        (["other file"], "another file than expected: 300,000 bytes of md5", 2),
        (["says less"], "another file than expected: 299,500 bytes of md5", 2),
        (
            ["drops", "other range"],
            "asked for the bytes from 100,000, received 'bytes 7-",
            2,
        ),
    ],
)
def test_a_download_is_given_up(server, tmp_path, monkeypatch, plan, told, requests):
    follow(server, plan, monkeypatch)
    with pytest.raises(DownloadError) as caught:
        fetch(tmp_path / "file.bin", MD5, [server.url])
    assert told in str(caught.value) and server.url in str(caught.value)
    assert not (tmp_path / "file.bin").exists()
    assert len(server.asked) == requests
    (tmp_path / "file.bin.part").unlink(missing_ok=True)


@pytest.mark.parametrize("plan", [["never ends"], ["drops", "never ends"]], ids=str)
def test_a_server_that_never_ends_fills_no_disk(server, tmp_path, monkeypatch, plan):
    server.plan = plan
    monkeypatch.setattr(download, "MAX_BYTES", 1_000_000)
    with pytest.raises(DownloadError, match="more than 1,000,000 bytes arrive, another file"):
        fetch(tmp_path / "file.bin", MD5, [server.url])
    assert not list(tmp_path.iterdir()) and len(server.asked) == len(plan)
    server.plan = ["good"]
    monkeypatch.setattr(download, "MAX_BYTES", len(CONTENT))
    fetch(tmp_path / "file.bin", MD5, [server.url])


def test_attempts_are_further_and_further_apart(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.plan = [500, 503, 500, "drops", 500, "good"]
    fetch(tmp_path / "file.bin", MD5, [server.url])
    assert [pause / download.PAUSE for pause in pauses] == [1, 0, 4, 1, 2]  # 503 asked for 0


def test_a_server_that_is_not_there_is_told_and_the_next_address_tried(server, tmp_path):
    nobody = "http://127.0.0.1:9/file.bin"
    fetch(tmp_path / "file.bin", MD5, [nobody, server.url])
    with pytest.raises(DownloadError, match="127.0.0.1:9/file.bin: Connection refused, tried 5"):
        fetch(tmp_path / "other.bin", MD5, [nobody])


def test_a_mirror_may_be_a_folder(tmp_path):
    (tmp_path / "mirror file").write_bytes(CONTENT)
    fetch(tmp_path / "file.bin", MD5, [(tmp_path / "mirror file").as_uri()])
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="No such file or directory, tried 1 times"):
        fetch(tmp_path / "file.bin", MD5, [(tmp_path / "nothing").as_uri()])


def test_no_redirection_leads_out_of_https():
    def follow(before, after):
        answer = download._StaySecure().redirect_request
        return answer(Request(before), None, 302, "Found", {}, after)

    with pytest.raises(DownloadError, match="redirected from https to http://host/file"):
        follow("https://host/file", "http://host/file")
    assert follow("https://host/file", "https://other/file").full_url == "https://other/file"
    assert follow("http://host/file", "http://other/file").full_url == "http://other/file"


def test_a_disk_that_takes_no_more_is_no_fault_of_the_network(server, tmp_path):
    (tmp_path / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        fetch(tmp_path / "file.bin", MD5, [server.url])
    assert len(server.asked) == 1


def test_a_killed_download_goes_on_where_it_was(server, tmp_path):
    server.plan = ["stalls", "good"]
    part = tmp_path / "file.bin.part"
    process = fork.Process(target=fetch, args=(tmp_path / "file.bin", MD5, [server.url]))
    process.start()
    while not (part.exists() and part.stat().st_size == 1000):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    fetch(tmp_path / "file.bin", MD5, [server.url])
    assert server.asked == [None, "bytes=1000-"]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
