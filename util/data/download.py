"""Download files: resume, retry, and name a file only after its checksum matches."""

from __future__ import annotations

import os
import re
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.message import Message
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
MAX_BYTES = 2**33  # of any file
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


def fetch(path: Path, md5: str, urls: Sequence[str], max_bytes: int = MAX_BYTES) -> None:
    """Download a file from the first of `urls` that has the content with checksum `md5`.

    `path`.part holds the received bytes. This call, or one of a later process, resumes from there
    after a fault. `path` itself appears only complete and checked.

    Args:
        path: of the file.
        md5: of the content, in hexadecimal. Content with another checksum is refused.
        urls: https, http or file addresses. No redirection leaves https.
        max_bytes: upper limit of the file. Reception stops beyond the limit, and the received part
            is removed.

    Raises:
        DownloadError: no address works; the message has the reason for each.
        OSError: the file cannot be written.
    """
    faults = []
    for url in urls:
        try:
            _fetch_from(url, path, md5, max_bytes)
            return
        except DownloadError as error:
            faults.append(f"{url}: {error}")
    raise DownloadError("; ".join(faults))


def _fetch_from(url: str, path: Path, md5: str, max_bytes: int) -> None:
    """Download from one address; restart once if the checksum of the whole file is wrong."""
    part = path.with_name(f"{path.name}.part")
    for _ in range(2):  # the part may be of another file: then once more from the beginning
        _receive_all(url, part, max_bytes)
        actual = calculate_md5(part)
        if actual == md5:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
            return
        size = part.stat().st_size
        part.unlink()
    raise DownloadError(f"another file than expected: {size:,} bytes of md5 {actual}, not {md5}")


def _receive_all(url: str, part: Path, max_bytes: int) -> None:
    """Receive the rest of `part`; retry any number of times while new bytes arrive.

    Raises:
        DownloadError: too many attempts without new bytes.
    """
    largest, idle = _size(part), 0
    max_attempts = 1 if url.startswith("file:") else MAX_ATTEMPTS
    while True:
        try:
            _receive(url, part, max_bytes)
            return
        except _Interrupted as fault:
            idle = 1 if _size(part) > largest else idle + 1
            largest = max(largest, _size(part))
            if idle >= max_attempts:
                raise DownloadError(f"{fault}, tried {idle} times") from fault
            pause = PAUSE * 2 ** (idle - 1) if fault.pause is None else fault.pause
            print_line(f"{url}: {fault}; trying again in {pause:g} s")
            time.sleep(pause)


def _receive(url: str, part: Path, max_bytes: int) -> None:
    """Open one connection; append to `part`, or restart `part` if the server ignores ranges.

    Raises:
        _Interrupted: the file is not complete yet.
        DownloadError: another attempt would not help.
    """
    offset = _size(part)
    headers = {"User-Agent": "network-deconvolution"}
    headers |= {"Range": f"bytes={offset}-"} if offset else {}
    try:
        with _network_faults():
            response = build_opener(_StaySecure).open(
                Request(url, headers=headers), timeout=TIMEOUT
            )
    except HTTPError as error:  # 416: the part is complete already
        if error.headers.get("Content-Range") == f"bytes */{offset}":
            return
        part.unlink(missing_ok=True)
        raise _Interrupted("the file is shorter than the received part") from None
    with response:
        start, total = _read_extent(response.headers, offset)
        options = {"initial": start, "total": total, "unit": "B", "unit_scale": True}
        bar = progress_bar(None, url.rpartition("/")[2], **options)
        with bar, open(part, "ab" if start else "wb") as file:
            for chunk in _read_chunks(response):
                file.write(chunk)
                file.flush()  # the bytes survive a kill of this process
                bar.update(len(chunk))
                if file.tell() > max_bytes:
                    part.unlink()
                    raise DownloadError(f"more than {max_bytes:,} bytes arrive, another file")
    if total is not None and _size(part) < total:
        raise _Interrupted(f"the connection ended after {_size(part):,} of {total:,} bytes")


def _read_extent(headers: Message, offset: int) -> tuple[int, int | None]:
    """Return the offset of a response in the file, and the size of the file if announced.

    Raises:
        DownloadError: the response starts at another offset.
    """
    extent = headers.get("Content-Range")
    if extent is None:  # the whole file
        length = headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", extent)
    if not match or int(match[1]) != offset:
        raise DownloadError(f"asked for the bytes from {offset:,}, received {extent!r}")
    return offset, None if match[2] == "*" else int(match[2])


def _read_chunks(response: HTTPResponse) -> Iterator[bytes]:
    """Yield bytes as they arrive, so that a broken connection loses none."""
    while True:
        with _network_faults():
            chunk = response.read1(CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _network_faults() -> Iterator[None]:
    """Sort faults into transient and permanent ones; status 416 stays an HTTPError.

    Raises:
        _Interrupted: a transient fault.
        DownloadError: a permanent fault.
    """
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
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"the certificate is not valid: {reason.verify_message}") from error
        text = getattr(reason, "strerror", None) or " ".join(str(reason).split())
        raise _Interrupted(text or type(reason).__name__) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
