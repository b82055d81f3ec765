"""Shards behind a real HTTP server that can fail in the ways servers do."""

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest

from model.errors import InputError
from worker.data.fetch import FetchSettings
from worker.data.manifest import Manifest, ShardEntry
from worker.data.manifest_source import ManifestSource, open_manifest
from worker.data.source import LostShard

DEADLINE_S = 90.0
TOKEN = "a/b+c"
MANIFEST = "train.manifest.json"
SPAWN = multiprocessing.get_context("spawn")
pytestmark = pytest.mark.timeout(120)

Step = int | str
"""A status, or one of the ways to answer that `_Handler` knows."""


class Server(ThreadingHTTPServer):
    """Serves `files` to those who have the token; `steps` says how each file is answered first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.steps: dict[str, list[Step]] = {}
        self.asked: Counter[str] = Counter()
        self.half_sent = threading.Event()
        self.released = threading.Event()
        self.hung_up = threading.Event()
        """A client closed its connection while it was being answered."""

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/my%20sets/{name}?token={TOKEN}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        name = unquote(url.path).removeprefix("/my sets/")
        self.server.asked[name] += 1
        steps = self.server.steps.get(name, [])
        step = steps.pop(0) if steps else "whole"
        if parse_qs(url.query).get("token") != [TOKEN.replace("+", " ")]:
            step = 401
        elif step == "whole" and name not in self.server.files:
            step = 404
        try:
            self._answer(step, self.server.files.get(name, b""))
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()
        self.close_connection = True

    def _answer(self, step: Step, content: bytes) -> None:
        if isinstance(step, int):
            self.send_error(step)
        elif step == "silent":
            self.connection.settimeout(DEADLINE_S)
            if not self.connection.recv(1):
                self.server.hung_up.set()
        elif step == "close":
            self.connection.close()
        else:
            self.send_response(200)
            self._send(step, content)

    def _send(self, step: str, content: bytes) -> None:
        if step == "longer":
            content += b"more"
        elif step == "wrong":
            content = bytes(len(content))
        elif step == "encoded":
            self.send_header("Content-Encoding", "gzip")
        if step != "unmeasured":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2
        if step == "half":
            self.wfile.write(content[:half])
        elif step == "half, then silent":
            self.wfile.write(content[:half])
            self.server.half_sent.set()
            self.server.released.wait(DEADLINE_S)
        elif step == "trickle":
            for start in range(0, half, 9000):
                self.wfile.write(content[start : start + 9000])
                self.server.released.wait(0.05)
            self.wfile.write(content[half : half + 1] * 10**8)
        else:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.released.set()
        found.shutdown()
        thread.join()


def serve_set(server: Server, names: list[str], num_bytes: int = 20_000) -> list[bytes]:
    """A set of one image to a shard; returns the images."""
    rng = random.Random(0)
    images, entries = [], []
    for number, name in enumerate(names):
        images.append(rng.randbytes(num_bytes))
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for member, content in (("x.jpg", images[-1]), ("x.json", b'{"labels": [0]}')):
                info = tarfile.TarInfo(f"{number}/{member}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        shard = buffer.getvalue()
        if name.endswith("gz"):
            shard = gzip.compress(shard)
        server.files[name] = shard
        entries.append(ShardEntry(name, 1, len(shard), hashlib.sha256(shard).hexdigest()))
    manifest = Manifest(tuple(entries), np.array([len(names)]), 1, 1)
    server.files[MANIFEST] = manifest.to_json().encode()
    return images


def opened(url: str, folder: Path | str, **changes: Any) -> ManifestSource:
    quick = {"cache_dir": str(folder), "attempts": 3, "backoff_s": 0.001}
    return open_manifest(url, FetchSettings(**quick | changes), "data.train")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def kept_bytes(folder: Path) -> int:
    return sum(each.stat().st_size for each in os.scandir(folder) if each.name[32:33] == "-")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_names_and_tokens_and_stored_compression_survive_http(
    server: Server, tmp_path: Path
) -> None:
    names = ["a b/0#1?x=%20&.tar", "ü/1.tar", "2.tar.gz"]
    images = serve_set(server, names)
    server.steps = {"2.tar.gz": ["encoded"], "ü/1.tar": ["unmeasured"]}
    source = opened(server.url(MANIFEST), tmp_path)
    assert [source.read(shard, 0).image for shard in range(3)] == images
    assert [source.read(shard, 0).image for shard in range(3)] == images
    assert server.asked == Counter([*names, MANIFEST])


def test_connections_to_a_silent_server_are_closed(server: Server, tmp_path: Path) -> None:
    serve_set(server, ["0.tar"])
    server.steps = {"0.tar": ["silent"]}
    with pytest.raises(LostShard, match="stall_s"):
        opened(server.url(MANIFEST), tmp_path, stall_s=2.0, attempts=1).read(0, 0)
    assert server.hung_up.wait(DEADLINE_S), "the abandoned attempt went on"


PASSING: list[Step] = [500, 503, 429, "close", "half", "wrong", "longer", "silent"]


@pytest.mark.parametrize("step", [*PASSING, "half, then silent"])
def test_what_passes_is_got_over(server: Server, tmp_path: Path, step: Step) -> None:
    images = serve_set(server, ["0.tar", "1.tar"])
    server.steps = {"1.tar": [step, step], MANIFEST: [500, 503]}
    is_silent = "silent" in str(step)
    quick = {"stall_s": 0.3, "attempts": 20} if is_silent else {}
    source = opened(server.url(MANIFEST), tmp_path, **quick)
    source.announce([1, 0])
    assert [source.read(shard, 0).image for shard in (0, 1)] == images
    if not is_silent:  # else a busy machine counts as a silent server
        assert server.asked == {"0.tar": 1, "1.tar": 3, MANIFEST: 3}
    assert len(names_in(tmp_path)) == 2


@pytest.mark.parametrize(
    ("step", "num_asked", "said"),
    [
        (401, 1, "check the credentials"),
        (403, 1, "403 Forbidden.*check the credentials"),
        (404, 1, "does not exist"),
        (500, 3, "500 .*last of 3 attempts"),
        ("silent", 3, "no byte for data.fetch.stall_s=1, in the last of 3 attempts"),
        ("half, then silent", 3, "no byte for data.fetch.stall_s=1"),
        ("half", 3, "last of 3 attempts"),
        ("wrong", 3, "sha256"),
        ("longer", 3, "bytes"),
    ],
)
def test_a_shard_that_can_not_be_had_is_lost_with_its_reason_and_alone(
    server: Server, tmp_path: Path, step: Step, num_asked: int, said: str
) -> None:
    images = serve_set(server, ["0.tar", "1.tar"])
    server.steps = {"1.tar": [step] * 9}
    stall_s = 1.0 if "silent" in str(step) else DEADLINE_S
    source = opened(server.url(MANIFEST), tmp_path, stall_s=stall_s)
    source.announce([1])
    for _ in range(3):
        with pytest.raises(LostShard, match=said) as caught:
            source.read(1, 0)
        assert caught.value.name == "1.tar"
        assert TOKEN not in str(caught.value)
    wait_until(lambda: server.asked["1.tar"] >= num_asked)  # it may hear of them later
    assert server.asked["1.tar"] == num_asked
    assert source.read(0, 0).image == images[0]
    assert len(names_in(tmp_path)) == 1


def test_a_trickle_ends_at_the_deadline_and_its_connection_with_it(
    server: Server, tmp_path: Path
) -> None:
    images = serve_set(server, ["0.tar"], num_bytes=10_000_000)
    server.steps = {"0.tar": ["trickle"]}
    source = opened(server.url(MANIFEST), tmp_path, timeout_s=2.0, attempts=10)
    assert source.read(0, 0).image == images[0]
    assert server.asked["0.tar"] >= 2
    server.released.set()
    assert server.hung_up.wait(DEADLINE_S), "the abandoned attempt went on"


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([403], "403"),
        ([404], "does not exist"),
        ([500] * 3, "500"),
        (["silent"] * 3, "stall_s"),
        (["half"] * 3, "last of 3 attempts"),
        (["wrong"], "can't be used as a manifest"),
    ],
)
def test_a_manifest_that_can_not_be_had_is_an_input_error(
    server: Server, tmp_path: Path, steps: list[Step], said: str
) -> None:
    serve_set(server, ["0.tar"])
    server.steps = {MANIFEST: steps}
    stall_s = 0.3 if "silent" in steps else DEADLINE_S
    with pytest.raises(InputError, match=said) as caught:
        opened(server.url(MANIFEST), tmp_path, stall_s=stall_s)
    assert str(caught.value).startswith("data.train='http://127.0.0.1")
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with Server() as closed:
        url = closed.url(MANIFEST)
    with pytest.raises(InputError, match=r"can't be fetched: .*Cannot connect to host"):
        opened(url, tmp_path)


def read_at_random(
    url: str, folder: str, digests: list[str], seed: int, limit_gb: float, done: Event
) -> None:
    """In a process of its own, until its share is done."""
    source = opened(url, folder, cache_gb=limit_gb)
    rng = random.Random(seed)
    for _ in range(40):
        shard = rng.randrange(len(digests))
        source.announce([rng.randrange(len(digests)) for _ in range(3)])
        image = source.read(shard, 0).image
        assert hashlib.sha256(image).hexdigest() == digests[shard]
    done.set()


def test_processes_share_a_small_cache(server: Server, tmp_path: Path) -> None:
    names = [f"{i}.tar" for i in range(8)]
    images = serve_set(server, names)
    server.steps = {name: [500, "whole", "half", "whole", "wrong"] for name in names}
    limit = 4 * len(server.files["0.tar"])
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    done = [SPAWN.Event() for _ in range(2)]
    folder = str(tmp_path)
    processes = [
        SPAWN.Process(
            target=read_at_random,
            args=(server.url(MANIFEST), folder, digests, seed, limit / 1e9, done[seed]),
        )
        for seed in range(2)
    ]
    for process in processes:
        process.start()
    cache = opened(server.url(MANIFEST), folder)._shards
    while any(process.is_alive() for process in processes):
        with cache._folder_locked():
            assert kept_bytes(tmp_path) <= limit
        time.sleep(0.005)
    for process in processes:
        process.join(DEADLINE_S)
        assert process.exitcode == 0
    assert all(event.is_set() for event in done)


def read_once(url: str, folder: str) -> None:
    opened(url, folder).read(0, 0)


def test_a_process_killed_while_it_downloads_leaves_a_cache_that_works(
    server: Server, tmp_path: Path
) -> None:
    images = serve_set(server, ["0.tar", "1.tar"], num_bytes=300_000)
    server.steps = {"0.tar": ["half, then silent"]}
    process = SPAWN.Process(target=read_once, args=(server.url(MANIFEST), str(tmp_path)))
    process.start()
    assert server.half_sent.wait(DEADLINE_S)
    wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob("*.part")))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(DEADLINE_S)
    assert {name.partition(".")[2].rpartition(".")[2] for name in names_in(tmp_path)} == {
        "lock",
        "part",
    }
    source = opened(server.url(MANIFEST), tmp_path)
    assert source.read(1, 0).image == images[1], "another shard, past the leftovers"
    assert source.read(0, 0).image == images[0]
    assert [name[32] for name in names_in(tmp_path)] == ["-", "-"]


def test_one_waits_for_another_process_and_takes_over_when_it_is_killed(
    server: Server, tmp_path: Path
) -> None:
    images = serve_set(server, ["0.tar"])
    server.steps = {"0.tar": ["half, then silent"]}
    process = SPAWN.Process(target=read_once, args=(server.url(MANIFEST), str(tmp_path)))
    process.start()
    assert server.half_sent.wait(DEADLINE_S)
    source = opened(server.url(MANIFEST), tmp_path)
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(source.read(0, 0).image))
    reader.start()
    assert server.asked["0.tar"] == 1
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    reader.join(DEADLINE_S)
    process.join(DEADLINE_S)
    assert found == images
    assert server.asked["0.tar"] == 2


def test_json_of_a_manifest_is_what_is_served(server: Server, tmp_path: Path) -> None:
    serve_set(server, ["0.tar"])
    source = opened(server.url(MANIFEST), tmp_path)
    assert json.loads(source.manifest.to_json()) == json.loads(server.files[MANIFEST])
