import contextlib
import fcntl
import hashlib
import os
import random
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import InputError
from worker.data import shard_cache
from worker.data.fetch import FetchSettings, RemoteFolder
from worker.data.manifest import ShardEntry
from worker.data.shard_cache import ShardCache, cache_folder
from worker.data.source import LostShard

DEADLINE_S = 60.0
SET = "counted://bucket/set/x.manifest.json"


class CountedFileSystem(AbstractFileSystem):
    """Files in memory, with a count of the requests for each."""

    protocol = "counted"
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    on_get: ClassVar[Callable[[str], None]] = staticmethod(lambda name: None)

    def get_file(self, rpath: str, lpath: str, callback: Any = None, **_: Any) -> None:
        name = rpath.rpartition("/")[2]
        self.asked.append(name)
        type(self).on_get(name)
        if name not in self.files:
            raise ConnectionResetError(f"no {name}")
        Path(lpath).write_bytes(self.files[name])


fsspec.register_implementation("counted", CountedFileSystem)


class Ticks:
    """A clock that is never the same twice."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture(autouse=True)
def _no_files() -> Iterator[None]:
    yield
    wait_for_downloads()
    CountedFileSystem.on_get = staticmethod(lambda name: None)


def wait_for_downloads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("fetch"):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def shards_of(sizes: list[int], seed: int = 0) -> tuple[list[ShardEntry], list[bytes]]:
    rng = random.Random(seed)
    contents = [rng.randbytes(size) for size in sizes]
    entries = [
        ShardEntry(f"s-{i}.tar", 1, len(content), hashlib.sha256(content).hexdigest())
        for i, content in enumerate(contents)
    ]
    CountedFileSystem.files = {
        entry.name: content for entry, content in zip(entries, contents, strict=True)
    }
    CountedFileSystem.asked = []
    return entries, contents


def cache_in(folder: Path, limit_bytes: int = 10**9, url: str = SET, **changes: Any) -> ShardCache:
    wanted = FetchSettings(
        **{"cache_dir": str(folder), "cache_gb": limit_bytes / 1e9, "attempts": 2} | changes
    )
    remote = RemoteFolder(url, wanted, "data.train", sleep=lambda _: None)
    return ShardCache(remote, wanted, Ticks())


def read(cache: ShardCache, entry: ShardEntry) -> bytes:
    with cache.open(entry) as file:
        return file.read()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def kept_bytes(folder: Path) -> int:
    kept = 0
    for path in folder.iterdir():
        if path.name[32:33] == "-":
            with contextlib.suppress(FileNotFoundError):  # a damaged one goes without the lock
                kept += path.stat().st_size
    return kept


EVENTS = st.tuples(st.sampled_from(["read", "announce", "truncate", "remove"]), st.integers(0, 5))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
@given(st.lists(st.integers(1, 40), min_size=6, max_size=6), st.lists(EVENTS, max_size=25))
def test_whatever_happens_reads_are_right_and_the_limit_holds(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], events: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    entries, contents = shards_of(sizes)
    cache = cache_in(folder, limit_bytes=60)
    for event, shard in events:
        path = cache._path(entries[shard])
        if event == "announce":
            cache.announce(entries[shard:])
        elif event == "remove":
            path.unlink(missing_ok=True)
        elif event == "truncate":
            with cache._folder_locked():
                if path.exists():
                    os.truncate(path, path.stat().st_size // 2)
        elif event == "read":
            assert read(cache, entries[shard]) == contents[shard]
        with cache._folder_locked():
            assert kept_bytes(folder) <= 60
    wait_for_downloads()
    assert all(name[32] == "-" for name in names_in(folder))
    for entry, content in zip(entries, contents, strict=True):
        assert cache.fetch(entry).read_bytes() == content


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=6, max_size=6),
    st.integers(40, 120),
    st.lists(st.integers(0, 5), max_size=30),
)
def test_those_used_longest_ago_go_first_and_no_more_than_needed(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, reads: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    entries, _ = shards_of(sizes)
    cache = cache_in(folder, limit)
    expected: OrderedDict[int, None] = OrderedDict()
    num_fetched = 0
    for shard in reads:
        if shard not in expected:
            num_fetched += 1
            while sum(sizes[i] for i in expected) + sizes[shard] > limit:
                expected.popitem(last=False)
        expected[shard] = None
        expected.move_to_end(shard)
        read(cache, entries[shard])
        assert names_in(folder) == {cache._path(entries[i]).name for i in expected}
    assert len(CountedFileSystem.asked) == num_fetched


def test_many_threads_of_two_caches_read_right_within_the_limit(tmp_path: Path) -> None:
    entries, contents = shards_of([random.Random(1).randrange(1, 50_000) for _ in range(12)])
    caches = [cache_in(tmp_path, limit_bytes=150_000) for _ in range(2)]
    over: list[int] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(25):
            shard = rng.randrange(12)
            caches[number % 2].announce(entries[shard : shard + 3])
            assert read(caches[number % 2], entries[shard]) == contents[shard]
            with caches[0]._folder_locked():
                over.append(kept_bytes(tmp_path))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert max(over) <= 150_000
    assert max(over) > 75_000, "it kept next to nothing"


def test_those_who_want_the_same_shard_at_once_fetch_it_once(tmp_path: Path) -> None:
    entries, contents = shards_of([100])
    caches = [cache_in(tmp_path) for _ in range(8)]
    together = threading.Barrier(8)

    def work(cache: ShardCache) -> bytes:
        together.wait(DEADLINE_S)
        return read(cache, entries[0])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, caches)) == contents * 8
    assert CountedFileSystem.asked == ["s-0.tar"]


def test_those_who_waited_for_a_lost_shard_share_the_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, _ = shards_of([100])
    CountedFileSystem.files = {}
    all_wait, waiting = threading.Event(), set()

    def try_lock(descriptor: int) -> bool:
        got = unpatched(descriptor)
        if not got:
            waiting.add(threading.get_ident())
            if len(waiting) == 3:
                all_wait.set()
        return got

    unpatched = shard_cache._try_lock
    monkeypatch.setattr(shard_cache, "_try_lock", try_lock)
    CountedFileSystem.on_get = staticmethod(lambda name: None if all_wait.wait(DEADLINE_S) else 1)

    def work(cache: ShardCache) -> str:
        with pytest.raises(LostShard) as caught:
            read(cache, entries[0])
        return str(caught.value)

    with ThreadPoolExecutor(4) as pool:
        reasons = set(pool.map(work, [cache_in(tmp_path) for _ in range(4)]))
    assert len(reasons) == 1
    assert "s-0.tar: ConnectionResetError: no s-0.tar, in the last of 2 attempts" in reasons
    assert len(CountedFileSystem.asked) == 2
    assert names_in(tmp_path) == set()


def test_a_lost_shard_is_asked_for_again_after_a_while(tmp_path: Path) -> None:
    entries, contents = shards_of([100])
    content = CountedFileSystem.files.pop("s-0.tar")
    cache = cache_in(tmp_path, retry_lost_s=600.0)
    clock = cache._clock
    assert isinstance(clock, Ticks)
    for _ in range(5):
        with pytest.raises(LostShard):
            read(cache, entries[0])
    assert len(CountedFileSystem.asked) == 2
    CountedFileSystem.files["s-0.tar"] = content
    with pytest.raises(LostShard):
        read(cache, entries[0])
    clock.now += 600
    assert read(cache, entries[0]) == contents[0]


def test_announced_shards_come_in_their_order(tmp_path: Path) -> None:
    entries, _ = shards_of([10] * 9)
    cache = cache_in(tmp_path, num_threads=1)
    order = [4, 1, 8, 4, 1, 2]
    first, go_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        first.set()
        assert go_on.wait(DEADLINE_S)

    CountedFileSystem.on_get = staticmethod(hold)
    cache.announce([entries[0]])
    assert first.wait(DEADLINE_S)
    cache.announce([entries[i] for i in order])  # returns though the first one hangs
    go_on.set()
    wait_for_downloads()
    assert CountedFileSystem.asked == [f"s-{i}.tar" for i in (0, 4, 1, 8, 2)]


def test_failures_ahead_are_told_to_the_reader_and_stop_nothing(tmp_path: Path) -> None:
    entries, contents = shards_of([10] * 3)
    del CountedFileSystem.files["s-0.tar"]
    cache = cache_in(tmp_path, num_threads=1)
    cache.announce(entries)
    wait_for_downloads()
    assert Counter(CountedFileSystem.asked) == {"s-0.tar": 2, "s-1.tar": 1, "s-2.tar": 1}
    with pytest.raises(LostShard, match="ConnectionResetError"):
        read(cache, entries[0])
    assert [read(cache, entry) for entry in entries[1:]] == contents[1:]
    assert len(CountedFileSystem.asked) == 4


def test_leftovers_go_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    entries, contents = shards_of([10])
    cache = cache_in(tmp_path)
    key = cache._path(entries[0]).name[:32]
    others = {"notes.txt", "x.part", f"{'g' * 32}-s.tar", f"{'0' * 31}-s.tar"}
    left = {f"{key}.lock", f"{key}.abc.part", f"{'0' * 32}.abc.part", f"{'1' * 32}.lock"}
    alive = f"{'2' * 32}.abc.part"
    for name in others | left | {alive}:
        (tmp_path / name).write_bytes(b"")
    with (tmp_path / alive).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read(cache, entries[0]) == contents[0]
    assert names_in(tmp_path) == others | {alive, cache._path(entries[0]).name}


def test_nobody_waits_for_ever_for_one_who_hangs(tmp_path: Path) -> None:
    entries, contents = shards_of([10])
    cache = cache_in(tmp_path)
    cache._patience_s = 0.1
    lock = shard_cache._key_file(cache._path(entries[0]), "lock")
    with lock.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read(cache, entries[0]) == contents[0]
        assert lock.exists()


def test_sets_that_share_names_do_not_collide(tmp_path: Path) -> None:
    caches, expected, entries = [], [], []
    for seed, url in enumerate([SET, SET, SET.replace("set", "other")]):
        (entry,), (content,) = shards_of([100], seed=min(seed, 1))
        caches.append(cache_in(tmp_path, url=url))
        entries.append(entry)
        expected.append(content)
        assert read(caches[-1], entry) == content
    assert len(names_in(tmp_path)) == 3
    assert [read(c, e) for c, e in zip(caches, entries, strict=True)] == expected


def test_an_evicted_shard_stays_readable_where_it_is_open(tmp_path: Path) -> None:
    entries, contents = shards_of([100, 100])
    cache = cache_in(tmp_path, limit_bytes=100)
    with cache.open(entries[0]) as file:
        assert read(cache, entries[1]) == contents[1]
        assert not cache._path(entries[0]).exists()
        assert file.read() == contents[0]
    assert read(cache, entries[0]) == contents[0]


def test_wrong_bytes_are_never_kept_unless_that_is_wanted(tmp_path: Path) -> None:
    entries, _ = shards_of([100])
    CountedFileSystem.files["s-0.tar"] = bytes(100)
    with pytest.raises(LostShard, match="sha256"):
        read(cache_in(tmp_path), entries[0])
    assert names_in(tmp_path) == set()
    assert read(cache_in(tmp_path, verify=False), entries[0]) == bytes(100)


def test_a_rejected_shard_is_lost_and_later_fetched_anew(tmp_path: Path) -> None:
    entries, contents = shards_of([100])
    cache = cache_in(tmp_path)
    read(cache, entries[0])
    assert str(cache.reject(entries[0], "no tar")) == "s-0.tar: no tar"
    with pytest.raises(LostShard, match="no tar"):
        read(cache, entries[0])
    assert names_in(tmp_path) == set()
    assert isinstance(cache._clock, Ticks)
    cache._clock.now += 1000
    assert read(cache, entries[0]) == contents[0]


@given(st.integers(10, 10**13))
def test_the_limit_that_a_message_asks_for_is_enough(num_bytes: int) -> None:
    cache = ShardCache.__new__(ShardCache)
    cache._settings = FetchSettings(cache_gb=num_bytes * 0.9 / 1e9)
    with pytest.raises(InputError, match=r"data\.fetch\.cache_gb=.* of a window.*") as caught:
        cache.check_room(num_bytes, "a window")
    wanted = str(caught.value).split("set data.fetch.cache_gb=")[1].split(" ")[0]
    cache._settings = FetchSettings(cache_gb=float(wanted))
    cache.check_room(num_bytes, "a window")
    assert float(wanted) * 1e9 <= num_bytes * 1.0001 + 1e6


def test_a_shard_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    entries, _ = shards_of([100])
    with pytest.raises(InputError, match=r"cache_gb=9e-08 is less than the 1e-07 GB .*s-0\.tar"):
        read(cache_in(tmp_path, limit_bytes=90), entries[0])


def test_the_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(FetchSettings()) == tmp_path / "xdg/asynception/shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(FetchSettings()) == tmp_path / ".cache/asynception/shards"
    assert cache_folder(FetchSettings(cache_dir="~/x")) == tmp_path / "x"
    assert cache_folder(FetchSettings(cache_dir="$SCRATCH/x")) == tmp_path / "scratch/x"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"data\.fetch\.cache_dir: .*file"):
        cache_folder(FetchSettings(cache_dir=str(tmp_path / "file")))
