import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.registry import known_implementations
from fsspec.spec import AbstractFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import InputError
from worker.data.fetch import FetchError, FetchSettings, RemoteFolder, check_bytes, is_remote

DEADLINE_S = 30.0
Step = bytes | Exception | Callable[[str, Any], None]


class ScriptedFileSystem(AbstractFileSystem):
    """Answers one request after the other with a step of its script."""

    protocol = "scripted"
    script: ClassVar[list[Step]] = []
    asked: ClassVar[list[str]] = []

    def get_file(self, rpath: str, lpath: str, callback: Any = None, **_: Any) -> None:
        self.asked.append(rpath)
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        if callable(step):
            step(lpath, callback)
            return
        Path(lpath).write_bytes(step)
        callback.relative_update(len(step))


fsspec.register_implementation("scripted", ScriptedFileSystem)


class Answer(Exception):
    """As aiohttp's ClientResponseError."""

    def __init__(self, status: int) -> None:
        super().__init__("https://host/shard?token=secret")
        self.status, self.message = status, "message"


def folder_of(script: list[Step], pauses: list[float], **changes: Any) -> RemoteFolder:
    ScriptedFileSystem.script = script
    ScriptedFileSystem.asked = []
    wanted = FetchSettings(**{"stall_s": DEADLINE_S, "timeout_s": DEADLINE_S} | changes)
    return RemoteFolder(
        "scripted://a/b/x.manifest.json", wanted, "data.train", sleep=pauses.append, random=float
    )


@pytest.fixture
def new_part(tmp_path: Path) -> Callable[[], Any]:
    numbers = iter(range(10**6))

    @contextmanager
    def make() -> Iterator[Path]:
        path = tmp_path / f"{next(numbers)}"
        path.touch()
        yield path
        path.unlink()

    return make


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("s3://bucket/x.manifest.json", True),
        ("gs://b/x", True),
        ("http://h/x", True),
        ("HTTPS://h/x", True),
        ("memory://x", True),
        ("file:///mnt/x", True),
        ("zip://x.tar::s3://b/x.zip", True),
        ("/data/x.tar", False),
        ("data/train-{0..9}.tar", False),
        ("x", False),
        ("C:/x", False),
        ("/odd/s3://x", False),
    ],
)
def test_urls_are_told_from_paths(path: str, remote: bool) -> None:
    assert is_remote(path) == remote


PASSING: list[Callable[[], Exception]] = [
    ConnectionResetError,
    TimeoutError,
    lambda: OSError(errno.EIO, "input/output error"),
    lambda: RuntimeError("what a driver may raise"),
    *[lambda status=status: Answer(status) for status in (408, 425, 429, 500, 502, 503, 504)],
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.sampled_from(PASSING), max_size=6),
    st.integers(1, 6),
    st.floats(0.01, 100),
    st.floats(0, 1),
)
def test_what_may_pass_is_tried_again_after_growing_pauses(
    new_part: Any,
    failures: list[Callable[[], Exception]],
    attempts: int,
    backoff_s: float,
    chance: float,
) -> None:
    pauses: list[float] = []
    script: list[Step] = [failure() for failure in failures]
    remote = folder_of([*script, b"content"], pauses, attempts=attempts, backoff_s=backoff_s)
    remote._random = lambda: chance
    if len(failures) < attempts:
        assert remote.fetch("c.tar", new_part, Path.read_bytes, 7) == b"content"
    else:
        with pytest.raises(FetchError, match=f"in the last of {attempts} attempts"):
            remote.fetch("c.tar", new_part, Path.read_bytes, 7)
    num_attempts = min(len(failures) + 1, attempts)
    assert ScriptedFileSystem.asked == ["a/b/c.tar"] * num_attempts
    longest = [min(backoff_s * 2**i, 60.0) for i in range(num_attempts - 1)]
    assert pauses == pytest.approx([pause * (1 - chance / 2) for pause in longest])


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (PermissionError("Access Denied"), "check the credentials"),
        (OSError("Forbidden: bucket/x\nno access"), "check the credentials"),
        (Answer(401), "check the credentials"),
        (Answer(403), "403 message"),
        (FileNotFoundError("x"), "does not exist"),
        (Answer(404), "does not exist"),
        (Answer(410), "does not exist"),
        (Answer(400), "400 message"),
        (Answer(416), "416 message"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    new_part: Any, failure: Exception, said: str
) -> None:
    pauses: list[float] = []
    remote = folder_of([failure, b"content"], pauses)
    with pytest.raises(FetchError) as caught:
        remote.fetch("c.tar", new_part, Path.read_bytes, 7)
    assert said in caught.value.reason
    assert "secret" not in caught.value.reason
    assert "\n" not in caught.value.reason
    assert (len(ScriptedFileSystem.asked), pauses) == (1, [])


def test_a_server_that_says_nothing_is_given_up_and_what_it_sends_later_is_not_used(
    new_part: Any,
) -> None:
    released, ended = threading.Event(), threading.Event()

    def silent(path: str, callback: Any) -> None:
        released.wait(DEADLINE_S)
        try:
            callback.relative_update(1)
        except FetchError:
            ended.set()

    # More attempts than needed, since a busy machine counts as a silent server.
    remote = folder_of([silent, *[b"content"] * 20], [], stall_s=0.05, attempts=21)
    assert remote.fetch("c.tar", new_part, Path.read_bytes, 7) == b"content"
    released.set()
    assert ended.wait(DEADLINE_S), "an abandoned thread went on"


@pytest.mark.parametrize("setting", ["timeout_s", "stall_s"])
def test_a_trickle_is_given_up_at_the_deadline_and_silence_before(
    new_part: Any, setting: str
) -> None:
    ended = threading.Event()

    def trickle(path: str, callback: Any) -> None:
        try:
            with open(path, "ab", buffering=0) as part:
                while True:
                    if setting == "timeout_s":
                        part.write(b"x")
                    callback.relative_update(0)
                    ended.wait(0.001)
        finally:
            ended.set()

    remote = folder_of([trickle], [], attempts=1, **{setting: 0.1})
    with pytest.raises(FetchError, match=f"timed out.*data.fetch.{setting}=0.1"):
        remote.fetch("c.tar", new_part, Path.read_bytes, 10**9)
    assert ended.wait(DEADLINE_S)


def test_a_file_without_end_is_given_up_at_its_limit(new_part: Any) -> None:
    sent = []

    def endless(path: str, callback: Any) -> None:
        while True:
            sent.append(1)
            callback.relative_update(1)

    remote = folder_of([endless] * 2, [], attempts=2)
    with pytest.raises(FetchError, match="more than 10 bytes"):
        remote.fetch("c.tar", new_part, Path.read_bytes, 10)
    assert len(sent) == 22


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_lost_shard(new_part: Any, code: int) -> None:
    remote = folder_of([OSError(code, "disk full")], [])
    with pytest.raises(InputError, match=r"data\.fetch\.cache_dir: .*disk full.*cache_gb"):
        remote.fetch("c.tar", new_part, Path.read_bytes, 10)


def test_bytes_are_compared_with_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    check_bytes(path, 3, sha256)
    check_bytes(path, 3, None)
    for num_bytes, digest, said in ((4, sha256, "3 bytes.*says 4"), (3, "0" * 64, "sha256")):
        with pytest.raises(FetchError, match=said) as caught:
            check_bytes(path, num_bytes, digest)
        assert caught.value.may_pass


def test_what_accept_refuses_is_fetched_anew(new_part: Any) -> None:
    def accept(part: Path) -> bytes:
        check_bytes(part, 4, None)
        return part.read_bytes()

    remote = folder_of([b"tor", b"toolong", b"torn"], [], attempts=3)
    assert remote.fetch("c.tar", new_part, accept, 7) == b"torn"


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"class": "lackingfs.core.LackingFileSystem", "err": "Install lackingfs"}
    monkeypatch.setitem(known_implementations, "lacking", lacking)
    with pytest.raises(InputError, match=r"data\.train needs .*pip install lackingfs"):
        RemoteFolder("lacking://bucket/x", FetchSettings(), "data.train")


@pytest.mark.parametrize("url", ["nothing-known://bucket/x", "http://host/x"])
def test_what_no_driver_opens_is_refused(url: str) -> None:
    options = FetchSettings(storage_options={"client_kwargs": 3})
    with pytest.raises(InputError, match=r"data\.train cannot be opened .*storage_options"):
        RemoteFolder(url, options, "data.train")


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("s3://b/c/x.json", "s3://b/c", "x.json"),
        ("https://h/c/x%20y.json?sig=a/b#c", "https://h/c", "x y.json"),
        ("zip://c/x.json::memory://a.zip", "zip://c::memory://a.zip", "x.json"),
    ],
)
def test_a_folder_is_known_without_its_token(
    url: str, folder: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.data.fetch.url_to_fs", lambda *_, **__: (None, url))
    remote = RemoteFolder(url, FetchSettings(), "data.train")
    assert (remote.url, remote.name) == (folder, name)
