"""A training whose every update can be counted, on hosts of their own, while things go wrong there.

The driver is on the first host, a worker on each of the others. What is trained is `tally.py`'s.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leftovers import actors, lane_sockets
from safetensors.torch import load_file
from server_roles import Pair, pairs
from tally import NUM_IMAGES, NUM_SHARDS

from asynception.hosts.ray_nodes import NodeOptions, RayNodes, wait_until
from model.flat import Segment
from ps.checkpoint import ModelLayout, list_checkpoints, read_checkpoint

BATCH_SIZE = 8
STEP_S = 0.2
"""What a step is made to take, until the faults are over."""
DEADLINE_S = 400.0
TALLY = Path(__file__).with_name("tally.py")

SERVERS = NodeOptions(num_cpus=1, resources={"server": NUM_SHARDS})
WORKER = NodeOptions(num_cpus=1, resources={"worker": 1})
BOTH = NodeOptions(num_cpus=1, resources={"server": NUM_SHARDS, "worker": 1})
"""Of hosts that have servers as well."""
NOBODY = NodeOptions(num_cpus=1)
"""Of a host with the driver and the coordinator alone."""

SHORT_TIMEOUTS = {
    "failure.worker_timeout_s": 5.0,
    "failure.server_timeout_s": 5.0,
    "network.attempt_s": 5.0,
    "network.backoff_s": 0.05,
}
"""In place of a minute or more."""

GONE_S = 60.0
"""For processes that were killed, at the other end of a Ray cluster, to be gone."""

LAYOUT = ModelLayout((Segment("tally", (NUM_SHARDS * NUM_IMAGES,), 0, False),), ())


@dataclass(frozen=True)
class Counts:
    """What became of all pushes of a run. Updates are a shard's."""

    acknowledged: int
    """Updates that a worker was told of, by its receipt."""
    refused: int
    """Pushes of lives that were over (fenced), or dropped otherwise, as far as they were told."""
    lost: int
    """Images' work that is missing in the parameters of a shard, or was not asked for."""
    doubled: int
    """Images' work that a shard took more often than the run's data have it."""
    declared: int
    """Of `doubled`, what the run itself says in samples_twice."""
    declared_lost: int
    """Of `lost`, what the run itself says in updates_lost, whose batches are all of one size."""


class CountedRun:
    """One that goes on; `hurry` lets it come to its end."""

    def __init__(
        self, nodes: RayNodes, folder: Path, epochs: int, settings: Mapping[str, Any]
    ) -> None:
        """settings: over those of a run of `tally.py`."""
        self.nodes, self._folder, self._epochs = nodes, folder, epochs
        self._num_workers = len(nodes.hosts) - 1
        everything = {**self._settings(), **settings}
        self.path = Path(everything["run.storage_path"]) / "counted"
        elsewhere = everything.get("checkpoint.path")
        self.checkpoint_folder = (
            Path(elsewhere) / "counted" if elsewhere else self.path / "checkpoints"
        )
        self._num_servers = NUM_SHARDS * (1 + int(everything["scaling.replicas"]))
        options = [f"--{key}={value}" for key, value in everything.items()]
        recipe = folder / "recipe.toml"
        recipe.write_text("")
        command = [sys.executable, "-m", "asynception", "train", str(recipe), *options]
        self._output = (folder / "output.txt").open("w+")
        self.process = subprocess.Popen(
            nodes.command(0, command),
            env=nodes.environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "run.name": "counted",
            "run.storage_path": self._folder / "runs",
            "run.log_every_s": 0.1,
            "ray.address": self.nodes.address,
            "model.factory": f"{TALLY}:build",
            "model.pause_s": STEP_S,
            "model.hurry": self._folder / "hurry",
            "data.train": f"{TALLY}:images",
            "data.val": f"{TALLY}:images",
            "data.image_size": 8,
            "data.batch_size": BATCH_SIZE,
            "data.lease_batches": 2,
            "training.objective": "softmax",
            "training.epochs": self._epochs,
            "optimizer.name": "sgd",
            "schedule.kind": "constant",
            "schedule.lr": 1.0,
            "evaluation.every_epochs": 1,
            "scaling.num_workers": self._num_workers,
            "scaling.num_servers": NUM_SHARDS,
            "scaling.resources_per_server": '{"server" = 1}',
            "scaling.resources_per_worker": '{"CPU" = 1, "worker" = 1}',
        }

    def said(self) -> str:
        """What it has printed last."""
        return self._said()[-4000:]

    def _said(self) -> str:
        return (self._folder / "output.txt").read_text()

    def said_times(self, text: str) -> int:
        """How often it has printed that; metrics.jsonl has a gap where the disk is full."""
        return self._said().count(text)

    def shown(self) -> int:
        """Samples that it was trained on, as it has printed last."""
        points = re.findall(r"  ([\d,]+)/[\d,]+ samples", self._said())
        return int(points[-1].replace(",", "")) if points else 0

    def num_checkpoints(self) -> int:
        """That seem whole."""
        return len(list_checkpoints(self.checkpoint_folder))

    def check_checkpoints(self) -> None:
        """Read all that are there. Raises InputError for a damaged one."""
        for path in list_checkpoints(self.checkpoint_folder):
            read_checkpoint(path, LAYOUT, ())

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl; not of what a full disk has cut off."""
        path = self.path / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        found = []
        for line in text.split("\n")[:-1]:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [line for line in found if line["kind"] == kind]

    def num_events(self, text: str) -> int:
        """How many have been told of so."""
        return sum(text in event["text"] for event in self.lines("event"))

    def wait(self, condition: Callable[[], object], what: str) -> float:
        """Until then; returns the seconds. Raises TimeoutError, also if the run ends."""

        def holds() -> bool:
            if self.process.poll() is not None:
                raise TimeoutError(f"the run ended before there was {what}: {self.said()}")
            return bool(condition())

        try:
            return wait_until(holds, DEADLINE_S, what)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.said()}") from None

    def samples(self) -> int:
        """Trained on so far."""
        points = self.lines("train")
        return int(points[-1]["samples"]) if points else 0

    def is_whole(self) -> bool:
        """Whether all workers have a process, as of a point since the last death."""
        points = self.lines("train")
        if not points or points[-1]["workers"] < self._num_workers:
            return False
        deaths = [e["time_s"] for e in self.lines("event") if "died after" in e["text"]]
        return not deaths or points[-1]["time_s"] > deaths[-1]

    def wait_for_steps(self, num_steps: int) -> float:
        """Until so many more are done."""
        goal = self.samples() + num_steps * BATCH_SIZE
        return self.wait(lambda: self.samples() >= goal, f"step {goal // BATCH_SIZE}")

    def worker_pid(self, host: int) -> int:
        """Of the worker on a host, once it is there."""
        return self._newest("ray::WorkerProcess", [host])

    def pid(self, title: str) -> int:
        """Of a process, wherever it is, once it is there."""
        return self._newest(title, range(len(self.nodes.hosts)))

    def _newest(self, title: str, hosts: Sequence[int]) -> int:
        pids: list[int] = []

        def found() -> bool:
            pids[:] = [pid for host in hosts for pid in self.nodes.pids(host, title)]
            return bool(pids)

        self.wait(found, title)
        return pids[-1]

    def server_pairs(self) -> list[Pair]:
        """A primary and its standby for each shard, once there are."""
        found: list[Pair] = []

        def all_there() -> bool:
            found[:] = pairs(self.nodes)
            return len(found) == NUM_SHARDS

        self.wait(all_there, "standby of each server")
        return found

    def check_nothing_is_left_over(self) -> None:
        """Only what the run needs is there, once that which it doesn't is gone: Ray's kill takes
        its time. Raises TimeoutError."""
        wanted = {
            "ray::WorkerProcess": self._num_workers,
            "ray::ServerProcess": self._num_servers,
            "ray::JournaledCoordinator": 1,
        }

        def alone() -> bool:
            there = actors(self.nodes)
            evaluators = there.pop("ray::EvaluatorProcess", 0)
            return (
                there == wanted
                and evaluators <= 1
                and lane_sockets(self.nodes) == self._num_servers
            )

        self._wait_for_end(alone)

    def _wait_for_end(self, condition: Callable[[], object]) -> None:
        try:
            wait_until(condition, GONE_S, "end of what is left over")
        except TimeoutError as error:
            there = f"{actors(self.nodes)}, {lane_sockets(self.nodes)} sockets"
            raise TimeoutError(f"{error}: {there}: {self.said()}") from None

    def check_nothing_is_left(self) -> None:
        """The run has ended, and nothing of it is there. Raises TimeoutError."""
        self._wait_for_end(lambda: not actors(self.nodes) and not lane_sockets(self.nodes))

    def finish(self) -> Counts:
        """Let it come to its end, and count. Raises RuntimeError if it fails."""
        (self._folder / "hurry").touch()
        try:
            code = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the run doesn't end: {self.said()}") from None
        if code:
            raise RuntimeError(f"the run ended with {code}: {self.said()}")
        result = json.loads((self.path / "result.json").read_text())
        if result["samples"] != self._epochs * NUM_IMAGES:
            raise RuntimeError(f"{result['samples']} samples instead of all: {self.said()}")
        tensors = load_file(Path(result["checkpoint"]) / "model.safetensors")
        applied = -tensors["tally"].reshape(NUM_SHARDS, NUM_IMAGES)
        extra = (applied - self._epochs).long()
        return Counts(
            acknowledged=result["receipts"]["applied"],
            refused=sum(result["receipts"].values()) - result["receipts"]["applied"],
            lost=int(-extra.clamp(max=0).sum()),
            doubled=int(extra.clamp(min=0).sum()),
            declared=result["data"]["samples_twice"],
            declared_lost=BATCH_SIZE * sum(result["updates_lost"].values()),
        )

    def kill(self) -> None:
        """End it, if it hasn't."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._output.close()


@contextmanager
def counted_run(
    nodes: RayNodes, folder: Path, epochs: int, settings: Mapping[str, Any]
) -> Iterator[CountedRun]:
    """A run in which all workers are at work."""
    folder.mkdir(parents=True)
    run = CountedRun(nodes, folder, epochs, settings)
    try:
        run.wait(lambda: run.is_whole() and run.samples() > 0, "training")
        yield run
    finally:
        run.kill()


class Since:
    """What a fault costs a run, from when this is made on."""

    def __init__(self, run: CountedRun) -> None:
        self._run = run
        self._num_before = max(0, len(run.lines("train")) - 1)
        self._began_s, self._spared_s = time.monotonic(), 0.0

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until it is got over, or until the next thing is to be done."""
        self._run.wait(condition, "end of the fault")

    def mend(self, host: int, condition: Callable[[], object]) -> None:
        """Let a host that was cut off return, and wait until it is got over. If that took so long
        that Ray has given the node up, which then ends by itself, it is started again."""
        nodes = self._run.nodes
        nodes.hosts[host].mend()
        self.until(lambda: condition() or not nodes.is_up(host))
        if not nodes.is_up(host):
            self.restart(host)
            self.until(condition)

    def restart(self, host: int) -> None:
        """Let a host come back. What Ray takes for it doesn't count."""
        began_s = time.monotonic()
        self._run.nodes.restart(host)
        self._spared_s += time.monotonic() - began_s

    @property
    def times(self) -> tuple[float, float]:
        """The longest time without a step that the run has noted, and the time since the start."""
        points = self._run.lines("train")[self._num_before :]
        longest_s, last, last_s = 0.0, points[0]["samples"], points[0]["time_s"]
        for point in points[1:]:
            longest_s = max(longest_s, point["time_s"] - last_s)
            if point["samples"] > last:
                last_s = point["time_s"]
            last = point["samples"]
        return longest_s, time.monotonic() - self._began_s - self._spared_s
