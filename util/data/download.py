"""Download files: resume, retry, and name a file only after its checksum matches."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from torchvision.datasets.utils import calculate_md5

from util.console import print_line, progress_bar
from util.files import sync_folder

TIMEOUT = 30.0  # seconds of silence
MAX_ATTEMPTS = 5  # in a row without new bytes
PAUSE = 1.0  # seconds after the first such attempt, doubled after each further one
MAX_PAUSE = 60.0  # seconds that a server may ask for
CHUNK = 2**16  # bytes
MAX_BYTES = 2**32  # of any file; the largest, of STL-10, has 2,640,397,119
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # status codes worth another attempt


class DownloadError(RuntimeError):
    """Failed download; the message gives the reason."""


class _Interrupted(RuntimeError):
    """Transient fault; the server may ask for a pause in seconds."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _StaySecure(HTTPRedirectHandler):
    """Handler that refuses redirections from https to another scheme."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise DownloadError(f"redirected from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(path: Path, md5: str, urls: Sequence[str]) -> None:
    """Download a file from the first of `urls` that has the content with checksum `md5`.

    `path`.part holds the received bytes. This call, or one of a later process, resumes from there
    after a fault. `path` itself appears only complete and checked. No redirection leaves https.

    Raises:
        DownloadError: no address works; the message has the reason for each.
        OSError: the file cannot be written.
    """
    faults = []
    for url in urls:
        try:
            _fetch_from(url, path, md5)
            return
        except DownloadError as error:
            faults.append(f"{url}: {error}")
    raise DownloadError("; ".join(faults))


def _fetch_from(url: str, path: Path, md5: str) -> None:
    """Download from one address; restart once if the checksum of the whole file is wrong."""
    part = path.with_name(f"{path.name}.part")
    for _ in range(2):  # the part may be of another file: then once more from the beginning
        _receive_all(url, part)
        actual = calculate_md5(part)
        if actual == md5:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
            return
        size = _size(part)
        part.unlink()
    raise DownloadError(f"another file than expected: {size:,} bytes of md5 {actual}, not {md5}")


def _receive_all(url: str, part: Path) -> None:
    """Receive the rest of `part`; retry any number of times while new bytes arrive."""
    largest, idle = _size(part), 0
    max_attempts = 1 if url.startswith("file:") else MAX_ATTEMPTS
    while True:
        try:
            _receive(url, part)
            return
        except _Interrupted as fault:
            idle = 1 if _size(part) > largest else idle + 1
            largest = max(largest, _size(part))
            if idle >= max_attempts:
                raise DownloadError(f"{fault}, tried {idle} times") from fault
            pause = PAUSE * 2 ** (idle - 1) if fault.pause is None else fault.pause
            print_line(f"{url}: {fault}; trying again in {pause:g} s")
            time.sleep(pause)


def _receive(url: str, part: Path) -> None:
    """Open one connection; append to `part`, or restart `part` if the server ignores ranges.

    Raises:
        _Interrupted: the file is not complete yet.
        DownloadError: another attempt would not help.
    """
    offset = _size(part)
    headers = {"User-Agent": "network-deconvolution"}
    headers |= {"Range": f"bytes={offset}-"} if offset else {}
    try:
        response = _open(Request(url, headers=headers))
    except HTTPError as error:  # 416: the part is complete already
        if error.headers.get("Content-Range") == f"bytes */{offset}":
            return
        part.unlink(missing_ok=True)
        raise _Interrupted("the file is shorter than the received part") from None
    with response:
        extent = response.headers.get("Content-Range")  # None: the whole file arrives
        if extent and not extent.startswith(f"bytes {offset}-"):
            raise DownloadError(f"asked for the bytes from {offset:,}, received {extent!r}")
        start = offset if extent else 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        shape = {"initial": start, "total": total, "unit": "B", "unit_scale": True}
        bar = progress_bar(None, url.rpartition("/")[2], **shape)
        with bar, open(part, "ab" if start else "wb") as file:
            while chunk := _read_chunk(response):
                file.write(chunk)
                file.flush()  # the bytes survive a kill of this process
                bar.update(len(chunk))
                if file.tell() > MAX_BYTES:
                    part.unlink()
                    raise DownloadError(f"more than {MAX_BYTES:,} bytes arrive, another file")
    if total is not None and _size(part) < total:
        raise _Interrupted(f"the connection ended after {_size(part):,} of {total:,} bytes")


@contextmanager
def _network_faults() -> Iterator[None]:
    """Raise transient faults as _Interrupted, others as DownloadError; status 416 passes."""
    try:
        yield
    except HTTPError as error:
        reason = f"the server answers {error.code} {error.reason}"
        if error.code == 416:
            raise
        if error.code not in TRANSIENT:
            raise DownloadError(reason) from error
        retry_after = error.headers.get("Retry-After", "")
        pause = min(float(retry_after), MAX_PAUSE) if retry_after.isdecimal() else None
        raise _Interrupted(reason, pause) from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        text = getattr(reason, "strerror", None) or " ".join(str(reason).split())
        raise _Interrupted(text or type(reason).__name__) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@_network_faults()
def _open(request: Request) -> HTTPResponse:
    return build_opener(_StaySecure).open(request, timeout=TIMEOUT)


@_network_faults()
def _read_chunk(response: HTTPResponse) -> bytes:
    """Return bytes as soon as some arrive, so that a broken connection loses none."""
    return response.read1(CHUNK)
