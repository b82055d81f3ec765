"""A training whose every update can be counted, on hosts of their own, while things go wrong there.

The servers are on the first host, a worker on each of the others. What is trained is `tally.py`'s.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tally import NUM_IMAGES, NUM_SHARDS

from asynception.hosts.ray_nodes import NodeOptions, RayNodes, wait_until

BATCH_SIZE = 8
STEP_S = 0.2
"""What a step is made to take, until the faults are over."""
DEADLINE_S = 400.0
TALLY = Path(__file__).with_name("tally.py")

SERVERS = NodeOptions(num_cpus=1, resources={"server": NUM_SHARDS})
WORKER = NodeOptions(num_cpus=1, resources={"worker": 1})
BOTH = NodeOptions(num_cpus=1, resources={"server": NUM_SHARDS, "worker": 1})
"""Of hosts that have servers as well, for standbys."""


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


class CountedRun:
    """One that goes on; `hurry` lets it come to its end."""

    def __init__(
        self, nodes: RayNodes, folder: Path, epochs: int, settings: Mapping[str, Any]
    ) -> None:
        """settings: over those of a run of `tally.py`."""
        self.nodes, self._folder, self._epochs = nodes, folder, epochs
        self.path = folder / "runs" / "counted"
        self._num_workers = len(nodes.hosts) - 1
        everything = {**self._settings(), **settings}
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
            "failure.worker_timeout_s": 5.0,
            "failure.server_timeout_s": 5.0,
            "network.attempt_s": 5.0,
            "network.backoff_s": 0.05,
        }

    def said(self) -> str:
        """What it has printed last."""
        self._output.flush()
        return (self._folder / "output.txt").read_text()[-4000:]

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = [json.loads(line) for line in text.split("\n")[:-1]]
        return [line for line in whole if line["kind"] == kind]

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
        pids: list[int] = []

        def found() -> bool:
            pids[:] = self.nodes.pids(host, "ray::WorkerProcess")
            return bool(pids)

        self.wait(found, f"worker on host {host}")
        return pids[-1]

    def server_pid(self, number: int) -> int:
        """Of one of the servers and standbys, counted through the hosts."""
        hosts = range(len(self.nodes.hosts))
        pids = [pid for host in hosts for pid in self.nodes.pids(host, "ray::ServerProcess")]
        return pids[number % len(pids)]

    def evaluator_pid(self) -> int:
        """Of the evaluator, wherever it is, once it is there."""
        pids: list[int] = []

        def found() -> bool:
            hosts = range(len(self.nodes.hosts))
            pids[:] = [p for h in hosts for p in self.nodes.pids(h, "ray::EvaluatorProcess")]
            return bool(pids)

        self.wait(found, "evaluator")
        return pids[-1]

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


def pause_of(run: CountedRun, until: Callable[[], object]) -> tuple[float, float]:
    """Until something holds again: the longest time without a step, and the time it took."""
    began_s = last_s = time.monotonic()
    samples, longest_s = run.samples(), 0.0

    def step() -> bool:
        nonlocal samples, last_s, longest_s
        now_s, now = time.monotonic(), run.samples()
        longest_s = max(longest_s, now_s - last_s)
        if now > samples:
            samples, last_s = now, now_s
        return bool(until())

    run.wait(step, "end of the fault")
    return longest_s, time.monotonic() - began_s
