"""Whole files from afar through fsspec, with deadlines and retries.

A file is fetched whole because images of a shard are read in random order: one request a shard
instead of one an image. The deadlines are held here and not left to the drivers, which have
different ones or none: this thread watches the file grow while the driver writes it elsewhere
(asynchronous drivers, such as those of http, s3 and gs, in fsspec's event loop; others in a thread
of their own), and abandons it when time is up. An abandoned coroutine is cancelled. An abandoned
thread can't be ended: it stops at the next bytes that come, and what it writes is never used.
"""

import asyncio
import errno
import hashlib
import random as _random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations
from pydantic import Field, PositiveFloat, PositiveInt

from model.errors import InputError
from model.settings import Settings

T = TypeVar("T")
Clock = Callable[[], float]
"""Tells seconds."""

SETTING = "data.fetch"
"""What messages call the settings below."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_LONGEST_PAUSE_S = 60.0
_TICK_S = 0.5
_MAY_PASS = frozenset({408, 425, 429})
"""HTTP statuses below 500 that another attempt can change."""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class FetchSettings(Settings):
    """How shards are fetched from URLs, and kept."""

    cache_dir: str | None = None
    """Folder for fetched shards on each node, best on a local disk; ~ and $VARIABLES are expanded
    there. Without it, asynception/shards in $XDG_CACHE_HOME or else in ~/.cache."""
    cache_gb: PositiveFloat = 10.0
    """Shards kept there, in 10^9 bytes; those used longest ago go first. Each download under way
    takes room besides."""
    timeout_s: PositiveFloat = 120.0
    """Deadline of one attempt to fetch one file. All attempts together should take less than
    failure.worker_timeout_s."""
    stall_s: PositiveFloat = 60.0
    """An attempt also ends when no byte has arrived for so long."""
    attempts: PositiveInt = 4
    """Attempts to fetch one file, where another one may help."""
    backoff_s: PositiveFloat = 1.0
    """Pause after the first failed attempt; doubles with each one, up to 60 s, and is shortened at
    random by up to a half."""
    retry_lost_s: PositiveFloat = 600.0
    """A shard that could not be had is asked for again only after so long."""
    num_threads: PositiveInt = 4
    """Shards that each worker downloads ahead at a time."""
    verify: bool = True
    """Compare each fetched shard with the sha256 of its manifest; its size is always compared."""
    storage_options: dict[str, Any] = Field(default={})
    """Options of the fsspec driver, like {anon = true} or {endpoint_url = "http://..."} for s3.
    They are kept with the run: leave secrets to the driver's own files and variables."""

    @property
    def limit_bytes(self) -> int:
        """`cache_gb` in bytes."""
        return round(self.cache_gb * 1e9)


class FetchError(Exception):
    """A file could not be had, and why; `may_pass` where another attempt can help."""

    def __init__(self, reason: str, *, may_pass: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.may_pass = reason, may_pass


NewPart = Callable[[], AbstractContextManager[Path]]
"""Makes an empty file for one attempt to write to, and removes it if it is still there."""


def is_remote(path: str) -> bool:
    """Whether fsspec has to read it. A file:// URL counts: as a mounted folder worth caching."""
    return _URL.match(path) is not None


class RemoteFolder:
    """The files in a folder behind a URL. Methods may be called from several threads at once.

    beside: the URL of any file in the folder. The query of an http URL (a token) goes with every
    request.
    where: how messages name that URL.
    sleep, random: for the pauses between attempts; random gives numbers from 0 to 1.
    Raises InputError where no driver opens the URL.
    """

    def __init__(
        self,
        beside: str,
        settings: FetchSettings,
        where: str,
        *,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self._fs, self._beside = _open_filesystem(beside, settings.storage_options, where)
        self._is_http = _is_http(beside)
        self._settings = settings
        self._clock, self._sleep, self._random = clock, sleep, random
        self.url = _without_file(beside)
        """Of the folder, without a query: what it is known by."""
        self.name = file_name(beside)
        """Of the file in it."""

    def fetch(self, name: str, new_part: NewPart, accept: Callable[[Path], T], limit: int) -> T:
        """Fetch a file of at most `limit` bytes, and return what `accept` makes of it.

        Each attempt writes a file of its own, since an abandoned one may still be writing.
        `accept` may raise FetchError as well. Raises FetchError when no attempt is left, and
        InputError where there is no room to write.
        """
        for attempt in range(1, self._settings.attempts + 1):
            with new_part() as part:
                try:
                    self._transfer(self._path(name), part, limit)
                    return accept(part)
                except FetchError as error:
                    if not error.may_pass:
                        raise
                    reason = error.reason
            if attempt < self._settings.attempts:
                self._sleep(self._pause_s(attempt))
        raise FetchError(f"{reason}, in the last of {self._settings.attempts} attempts")

    def _path(self, name: str) -> str:
        """The file as its driver names it."""
        if not self._is_http:
            return self._beside.rpartition("/")[0] + "/" + name
        url = urlsplit(self._beside)
        folder = url.path.rpartition("/")[0]
        return urlunsplit(url._replace(path=f"{folder}/{quote(name)}", fragment=""))

    def _pause_s(self, attempt: int) -> float:
        longest = min(self._settings.backoff_s * 2.0 ** min(attempt - 1, 60), _LONGEST_PAUSE_S)
        return longest * (1 - self._random() / 2)

    def _transfer(self, path: str, part: Path, limit: int) -> None:
        """One attempt. Raises FetchError."""
        abandoned = threading.Event()

        def watch(size: int | None, value: int, **_: Any) -> None:
            if abandoned.is_set():
                raise FetchError("abandoned")
            if value > limit:
                raise FetchError(f"it has more than {limit} bytes", may_pass=True)

        future = self._start(path, part, Callback(hooks={"watch": watch}))
        try:
            self._wait(future, part)
        finally:
            abandoned.set()
            future.cancel()
        if future.cancelled():
            raise FetchError("its driver gave it up", may_pass=True)
        if (error := future.exception()) is not None:
            raise _as_fetch_error(error, part) from None

    def _start(self, path: str, part: Path, callback: Any) -> "Future[None]":
        # get_file keeps the server's answer, where open() makes a missing file of all of them.
        if self._fs.async_impl:
            coroutine = self._fs._get_file(path, str(part), callback=callback)
            return asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop)
        return _in_thread(lambda: self._fs.get_file(path, str(part), callback=callback))

    def _wait(self, future: "Future[None]", part: Path) -> None:
        """Until the future is done. Raises FetchError at a deadline."""
        timeout_s, stall_s = self._settings.timeout_s, self._settings.stall_s
        tick_s = min(timeout_s / 8, stall_s / 8, _TICK_S)
        start = moved = self._clock()
        num_bytes = 0
        while not wait([future], tick_s).done:
            now, grown = self._clock(), _size(part)
            if grown != num_bytes:
                num_bytes, moved = grown, now
            if now - start > timeout_s:
                raise FetchError(
                    f"timed out, with {num_bytes} bytes after {SETTING}.timeout_s={timeout_s:g}",
                    may_pass=True,
                )
            if now - moved > stall_s:
                raise FetchError(
                    f"timed out, with no byte for {SETTING}.stall_s={stall_s:g}", may_pass=True
                )


def check_bytes(path: Path, num_bytes: int, sha256: str | None) -> None:
    """Compare a fetched file with what it should be. Raises FetchError; another copy may do."""
    found = _size(path)
    if found != num_bytes:
        raise FetchError(f"it has {found} bytes, and its manifest says {num_bytes}", may_pass=True)
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise FetchError("its sha256 is not that of its manifest", may_pass=True)


def _size(path: Path) -> int:
    """In bytes; 0 where there is no file, which may have been taken away."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _open_filesystem(url: str, options: dict[str, Any], where: str) -> tuple[Any, str]:
    """The driver, and the file as it names it. Raises InputError.

    The instance is our own: fsspec otherwise keeps one for each thread, each with connections.
    """
    try:
        fs, path = url_to_fs(url, skip_instance_cache=True, **_with_defaults(url, options))
    except ImportError as error:
        package = _package(url, error)
        raise InputError(
            f"{where} needs the Python package {package}, which is not installed: "
            f"pip install {package}"
        ) from None
    except Exception as error:  # drivers raise what they like for options that they can't use
        raise InputError(
            f"{where} cannot be opened ({_text(error)}): check the URL and "
            f"{SETTING}.storage_options"
        ) from None
    return fs, path


def _with_defaults(url: str, options: dict[str, Any]) -> dict[str, Any]:
    """For http: bytes as they are stored, and no deadline but ours."""
    if not _is_http(url):
        return options
    try:
        from aiohttp import ClientTimeout
    except ImportError:
        return options  # which is then told of as a driver that is missing
    client = {
        "timeout": ClientTimeout(total=None),
        "auto_decompress": False,
        "headers": {"Accept-Encoding": "identity"},
        **options.get("client_kwargs", {}),
    }
    return {**options, "client_kwargs": client}


def _package(url: str, error: ImportError) -> str:
    """What to install for a URL's driver: s3fs, gcsfs, ..."""
    protocol = re.split("://|::", url)[0]
    driver = str(known_implementations.get(protocol, {}).get("class", "fsspec")).partition(".")[0]
    missing = getattr(error.__cause__, "name", None) or error.name
    return driver if driver != "fsspec" else str(missing or "aiohttp")


def _in_thread(call: Callable[[], object]) -> "Future[None]":
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            call()
        except BaseException as error:  # raised again where the future is waited for
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    return future


def _as_fetch_error(error: BaseException, part: Path) -> FetchError:
    """What a driver's error means. Any exception of a driver is a failed attempt.

    Raises InputError where it is our own disk that failed.
    """
    if isinstance(error, FetchError):
        return error
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        raise InputError(
            f"{SETTING}.cache_dir: nothing can be written to {part.parent} ({error.strerror}), so "
            f"no shard can be fetched: free some room, lower {SETTING}.cache_gb or name another "
            "folder"
        )
    status = _status(error)
    if status in (401, 403) or isinstance(error, PermissionError) or _says_forbidden(error):
        return FetchError(f"access is refused ({_text(error)}): check the credentials")
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return FetchError("it does not exist")
    final = status is not None and 300 <= status < 500 and status not in _MAY_PASS
    return FetchError(_text(error), may_pass=not final)


def _status(error: Exception) -> int | None:
    """The HTTP status, where the driver tells it: aiohttp, gcsfs and azure in this order."""
    found = (getattr(error, name, None) for name in ("status", "code", "status_code"))
    return next((value for value in found if type(value) is int and 100 <= value < 600), None)


def _says_forbidden(error: Exception) -> bool:
    """gcsfs makes of a 403 an OSError that only its text tells from others."""
    return isinstance(error, OSError) and str(error).startswith("Forbidden")


def _text(error: Exception) -> str:
    """On one line; without the URL, which may hold a token."""
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    text = f"{status} {message}" if type(status) is int else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}".rstrip(": ")


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _without_file(url: str) -> str:
    head, chain, rest = url.partition("::")
    if _is_http(url):
        head = urlunsplit(urlsplit(head)._replace(query="", fragment=""))
    return head.rpartition("/")[0] + chain + rest


def file_name(url: str) -> str:
    """The file that a URL leads to, without its folder."""
    if _is_http(url):
        return unquote(urlsplit(url).path.rpartition("/")[2])
    return url.partition("::")[0].rpartition("/")[2]
