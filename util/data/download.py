"""Files from the network: resumed, retried, and given their name once their checksum is right."""

from __future__ import annotations

import os
import re
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from torchvision.datasets.utils import calculate_md5

from util.console import print_line, progress_bar
from util.files import sync_folder

TIMEOUT = 30.0  # seconds that a silent server is given
PATIENCE = 5  # attempts in a row that bring nothing
PAUSE = 1.0  # seconds after the first of them; twice as long after each further one
LONGEST_PAUSE = 60.0  # seconds that a server may ask for
CHUNK = 2**16  # bytes
LARGEST = 2**33  # bytes of any file
BUSY = {408, 425, 429, 500, 502, 503, 504}  # answers that may be others a little later


class DownloadError(RuntimeError):
    """A file that cannot be had from an address; the message says why."""


class _Interrupted(RuntimeError):
    """What may go better the next time, in `pause` seconds if the server says so."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _StaySecure(HTTPRedirectHandler):
    """Follows no redirection from https to anything else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise DownloadError(f"it leads from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(path: Path, md5: str, urls: Sequence[str], most: int = LARGEST) -> None:
    """Bring the file with this checksum to `path`, from the first of `urls` that gives it.

    What has come so far is in `path`.part, where this call goes on after a fault, and a later one
    after the end of this process. `path` appears whole and checked, or not at all.

    Args:
        md5: of the content, in hexadecimal. It decides, not the address: somebody on the way, or
            the owner of a mirror, cannot make another file of the same one.
        urls: https, http or file. None is replaced by one that is less secure.
        most: bytes that the file can have. A server that sends more, as one can that does not tell
            how many, is not listened to any longer, and what it sent is removed.

    Raises:
        DownloadError: none gives it; says why, for each.
        OSError: it cannot be written.
    """
    faults = []
    for url in urls:
        try:
            _fetch_from(url, path, md5, most)
            return
        except DownloadError as error:
            faults.append(f"{url}: {error}")
    raise DownloadError("; ".join(faults))


def _fetch_from(url: str, path: Path, md5: str, most: int) -> None:
    part = path.with_name(f"{path.name}.part")
    for _ in range(2):  # parts need not be of one file: once more, then from its beginning
        _complete(url, part, most)
        found = calculate_md5(part)
        if found == md5:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
            return
        size = part.stat().st_size
        part.unlink()
    raise DownloadError(f"another file than expected: {size:,} bytes of md5 {found}, not {md5}")


def _complete(url: str, part: Path, limit: int) -> None:
    """Get what `part` lacks. Connections may break as often as they like while bytes come."""
    most, idle = _size(part), 0
    patience = 1 if url.startswith("file:") else PATIENCE
    while True:
        try:
            _receive(url, part, limit)
            return
        except _Interrupted as fault:
            idle = 1 if _size(part) > most else idle + 1
            most = max(most, _size(part))
            if idle >= patience:
                raise DownloadError(f"{fault}, tried {idle} times") from fault
            pause = PAUSE * 2 ** (idle - 1) if fault.pause is None else fault.pause
            print_line(f"{url}: {fault}; trying again in {pause:g} s")
            time.sleep(pause)


def _receive(url: str, part: Path, limit: int) -> None:
    """One connection: append to `part`, or begin it anew where the server knows no ranges.

    Raises:
        _Interrupted: it is not complete yet.
        DownloadError: trying again would not help.
    """
    begun = _size(part)
    headers = {"User-Agent": "network-deconvolution"}
    headers |= {"Range": f"bytes={begun}-"} if begun else {}
    try:
        with _network_faults():
            answer = build_opener(_StaySecure).open(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:  # 416: there is nothing behind what has come
        if error.headers.get("Content-Range") == f"bytes */{begun}":
            return
        part.unlink(missing_ok=True)
        raise _Interrupted("it is shorter than what had come") from None
    with answer:
        start, total = _read_extent(answer.headers, begun)
        shown = {"initial": start, "total": total, "unit": "B", "unit_scale": True}
        bar = progress_bar(None, url.rpartition("/")[2], **shown)
        with bar, open(part, "ab" if start else "wb") as file:
            for chunk in _chunks(answer):
                file.write(chunk)
                file.flush()  # to the system, which keeps it when this process is killed
                bar.update(len(chunk))
                if file.tell() > limit:
                    part.unlink()
                    raise DownloadError(f"it sends more than {limit:,} bytes, another file")
    if total is not None and _size(part) < total:
        raise _Interrupted(f"the connection ended after {_size(part):,} of {total:,} bytes")


def _read_extent(headers: Message, begun: int) -> tuple[int, int | None]:
    """The place of an answer's first byte in the file, and the bytes of the file, if told."""
    extent = headers.get("Content-Range")
    if extent is None:  # the whole file
        length = headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", extent)
    if not found or int(found[1]) != begun:
        raise DownloadError(f"asked for the bytes from {begun:,}, it sends {extent!r}")
    return begun, None if found[2] == "*" else int(found[2])


def _chunks(answer) -> Iterator[bytes]:
    """What comes, as it comes: nothing is lost when the next piece does not."""
    while True:
        with _network_faults():
            chunk = answer.read1(CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _network_faults() -> Iterator[None]:
    """Tell faults that may pass from those that will not. Status 416 stays an HTTPError."""
    try:
        yield
    except HTTPError as error:
        reason = f"the server answers {error.code} {error.reason}"
        if error.code == 416:
            raise
        if error.code not in BUSY:
            raise DownloadError(reason) from error
        asked = error.headers.get("Retry-After", "")
        pause = min(float(asked), LONGEST_PAUSE) if asked.isdecimal() else None
        raise _Interrupted(reason, pause) from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"its certificate is not valid: {reason.verify_message}") from error
        text = getattr(reason, "strerror", None) or " ".join(str(reason).split())
        raise _Interrupted(text or type(reason).__name__) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
