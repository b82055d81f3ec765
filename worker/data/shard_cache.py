"""Fetched shards in a folder that all workers of a node share.

Processes may be killed at any moment and don't know of each other, so the folder's state is in
its files alone:

    KEY-NAME         a whole shard; it got there by a rename, and its mtime is its last use
    KEY.RANDOM.part  a download; flocked as long as its process lives
    KEY.lock         flocked by the one that fetches the shard, so that others wait for it
    .lock            flocked while files are moved in or out

The kernel lets go of the locks of a killed process. What it left is found unlocked, and removed.
KEY.lock only saves double work: a shard fetched twice at a time is whole all the same, so nobody
waits for it for ever.

Readers get the shard as an open file, which stays readable when the shard is evicted meanwhile.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from model.errors import InputError
from worker.data.fetch import SETTING, Clock, FetchError, FetchSettings, RemoteFolder, check_bytes
from worker.data.manifest import ShardEntry
from worker.data.source import LostShard

_WHOLE = re.compile(r"[0-9a-f]{32}-.*")
_LEFT = re.compile(r"[0-9a-f]{32}(\.lock|\..*\.part)")
_POLL_S = 0.05


class LostShards:
    """The shards that could not be had of late, so that their samples don't each wait again.

    clock: seconds.
    """

    def __init__(self, retry_s: float, clock: Clock = time.time) -> None:
        self._retry_s, self._clock = retry_s, clock
        self._lost: dict[str, tuple[float, str]] = {}

    def check(self, name: str) -> None:
        """Raises LostShard for a shard that was lost less than `retry_s` ago."""
        if self._lost and name in self._lost:
            since_s, reason = self._lost[name]
            if self._clock() - since_s < self._retry_s:
                raise LostShard(name, reason)

    def add(self, name: str, reason: str) -> LostShard:
        """Remember, and return, the error."""
        self._lost[name] = self._clock(), reason
        return LostShard(name, reason)


class _HolderFailed(Exception):
    """The one that was waited for could not fetch the shard."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Turn:
    """A lock file that is held, or that was waited for too long (None).

    The file goes before the lock does, so that none is left over; what is in it then is the
    failure of the one that held it, for those who waited. Without that, each of them would wait
    for a lost shard in turn.
    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self._path, self._descriptor = path, descriptor

    def failed(self, reason: str) -> None:
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.write(self._descriptor, reason.encode())

    def end(self) -> None:
        if self._descriptor is not None:
            if _is_at(self._path, self._descriptor):
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)


class ShardCache:
    """The shards of one remote folder, fetched when needed or announced.

    Methods may be called from several threads at once, and any number of processes may use the
    same folder, for different sets too. `open` and `fetch` block until the shard is there; they
    raise LostShard, and InputError where the cache itself can't be used.
    clock: seconds since the epoch.
    """

    def __init__(
        self, remote: RemoteFolder, settings: FetchSettings, clock: Clock = time.time
    ) -> None:
        self.folder = cache_folder(settings)
        self._remote = remote
        self._settings = settings
        self._clock = clock
        self._lost = LostShards(settings.retry_lost_s, clock)
        self._guard = threading.Lock()
        self._queue: OrderedDict[ShardEntry, None] = OrderedDict()
        self._paths: dict[str, Path] = {}
        self._num_running = 0
        self._patience_s = settings.attempts * (settings.timeout_s + 60) + 60

    def fetch(self, entry: ShardEntry) -> Path:
        """Where the shard lies. It may be evicted at any time: `open` is safe from that."""
        self.open(entry).close()
        return self._path(entry)

    def open(self, entry: ShardEntry) -> BinaryIO:
        """The whole shard."""
        path = self._path(entry)
        while (file := self._open_kept(path, entry)) is None:
            self._lost.check(entry.name)
            if (file := self._obtain(path, entry)) is not None:
                return file
        return file

    def announce(self, entries: Sequence[ShardEntry]) -> None:
        """Begin to fetch these, in this order, and return at once.

        What fails is told to whoever opens the shard.
        """
        with self._guard:
            self._queue.update((entry, None) for entry in entries)
            num_new = min(self._settings.num_threads - self._num_running, len(self._queue))
            self._num_running += num_new
        for _ in range(num_new):
            threading.Thread(target=self._work, name="fetch ahead", daemon=True).start()

    def reject(self, entry: ShardEntry, reason: str) -> LostShard:
        """The shard turned out to be no good: forget it, and return the error to raise."""
        self._path(entry).unlink(missing_ok=True)
        return self._lost.add(entry.name, reason)

    def check_room(self, num_bytes: int, what: str) -> None:
        """Raises InputError unless `what`, of `num_bytes`, fits."""
        if num_bytes > self._settings.limit_bytes:
            raise InputError(
                f"{SETTING}.cache_gb={self._settings.cache_gb:g} is less than the "
                f"{_gb(num_bytes)} GB of {what}, so that shards would be fetched over and over: "
                f"set {SETTING}.cache_gb={_gb(num_bytes)} or lower data.shuffle_window"
            )

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            # Whoever reads the shard is told.
            with contextlib.suppress(LostShard, InputError):
                self.open(entry).close()

    def _next(self) -> ShardEntry | None:
        with self._guard:
            if self._queue:
                return self._queue.popitem(last=False)[0]
            self._num_running -= 1
            return None

    def _path(self, entry: ShardEntry) -> Path:
        """Asked for at each read of a sample."""
        path = self._paths.get(entry.name)
        if path is None:
            path = self._paths[entry.name] = self._make_path(entry)
        return path

    def _make_path(self, entry: ShardEntry) -> Path:
        """Sets don't collide: the key is made of the URL and of what the manifest says."""
        about = [self._remote.url, entry.name, entry.num_bytes, entry.sha256]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", entry.name.rpartition("/")[2])[-100:]
        return self.folder / f"{key}-{readable}"

    def _open_kept(self, path: Path, entry: ShardEntry) -> BinaryIO | None:
        """The shard if it is there; its use is noted."""
        try:
            file = open(path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(self.folder, error) from None
        if os.fstat(file.fileno()).st_size != entry.num_bytes:  # the machine went down meanwhile
            file.close()
            path.unlink(missing_ok=True)
            return None
        self._note_use(file)
        return file

    def _note_use(self, file: BinaryIO) -> None:
        now_ns = int(self._clock() * 1e9)
        os.utime(file.fileno(), ns=(now_ns, now_ns))

    def _obtain(self, path: Path, entry: ShardEntry) -> BinaryIO | None:
        """Fetch the shard; None when someone else has done so."""
        if entry.num_bytes > self._settings.limit_bytes:
            self.check_room(entry.num_bytes, f"the shard {entry.name}")
        try:
            with self._turn(_key_file(path, "lock")) as turn:
                if path.exists():
                    return None
                self._lost.check(entry.name)
                try:
                    return self._download(path, entry)
                except FetchError as error:
                    turn.failed(error.reason)
                    raise self._lost.add(entry.name, error.reason) from None
        except _HolderFailed as failure:
            raise self._lost.add(entry.name, failure.reason) from None
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def _download(self, path: Path, entry: ShardEntry) -> BinaryIO:
        def accept(part: Path) -> BinaryIO:
            check_bytes(part, entry.num_bytes, entry.sha256 if self._settings.verify else None)
            return self._admit(part, path, entry.num_bytes)

        return self._remote.fetch(entry.name, lambda: self._new_part(path), accept, entry.num_bytes)

    @contextlib.contextmanager
    def _new_part(self, path: Path) -> Iterator[Path]:
        with self._folder_locked():  # nobody may find it before it is locked
            prefix = _key_file(path, "").name
            descriptor, name = tempfile.mkstemp(".part", prefix, self.folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
            os.close(descriptor)

    def _admit(self, part: Path, path: Path, num_bytes: int) -> BinaryIO:
        """Make room, and give the file its name; opened before it can be evicted."""
        with self._folder_locked():
            _remove_leftovers(self.folder)
            _evict(self.folder, self._settings.limit_bytes - num_bytes)
            file = part.open("rb")
            self._note_use(file)
            part.rename(path)
        return file

    @contextlib.contextmanager
    def _folder_locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _turn(self, lock: Path) -> Iterator[_Turn]:
        """Be the only one to fetch a shard, as far as patience goes. Raises _HolderFailed."""
        deadline = time.monotonic() + self._patience_s
        descriptor = _acquire(lock, deadline)
        turn = _Turn(lock, descriptor)
        try:
            yield turn
        finally:
            turn.end()


def cache_folder(settings: FetchSettings) -> Path:
    """The folder of the settings, made if there is none. Raises InputError."""
    if settings.cache_dir is not None:
        folder = Path(os.path.expanduser(os.path.expandvars(settings.cache_dir)))
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(base) / "asynception" / "shards"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder


def _acquire(lock: Path, deadline: float) -> int | None:
    """Its descriptor, locked; None at the deadline (of the monotonic clock)."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
            time.sleep(_POLL_S)
        if reason := os.pread(descriptor, 1 << 16, 0):
            os.close(descriptor)
            raise _HolderFailed(reason.decode())
        if _is_at(lock, descriptor):
            return descriptor
        os.close(descriptor)  # the holder removed it


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_leftovers(folder: Path) -> None:
    """The files of processes that were killed: those that should be locked and aren't."""
    for path in folder.iterdir():
        if _LEFT.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR)
                if _try_lock(descriptor) and _is_at(path, descriptor):
                    path.unlink()
                os.close(descriptor)


def _evict(folder: Path, limit_bytes: int) -> None:
    """Remove the shards used longest ago until the others take no more than `limit_bytes`."""
    kept: list[tuple[int, str, int]] = []
    for file in os.scandir(folder):
        if _WHOLE.fullmatch(file.name):
            with contextlib.suppress(FileNotFoundError):  # a damaged one goes without the lock
                kept.append((file.stat().st_mtime_ns, file.path, file.stat().st_size))
    num_bytes = sum(size for _, _, size in kept)
    for _, path, size in sorted(kept):
        if num_bytes <= limit_bytes:
            return
        Path(path).unlink(missing_ok=True)
        num_bytes -= size


def _key_file(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name[:32]}.{suffix}")


def _gb(num_bytes: int) -> str:
    """10^9 bytes, rounded up to 10^6 of them unless there are fewer."""
    unit = 10**6 if num_bytes > 10**6 else 1
    return f"{-(-num_bytes // unit) * unit / 1e9:.15g}"


def _unusable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"{SETTING}.cache_dir: {folder} can't be used for fetched shards ({error.strerror}): name "
        "a folder on each node that can be written to"
    )
