"""A Ray that is kept for many runs, which then need not start one each, and runs that join it."""

import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from processes import EVENT_TIMEOUT_S, RUN_TIMEOUT_S, Command, TrainRun, wait_for

HOLDING = """
import os, time
from pathlib import Path

tests = os.getppid()
import ray

ray.init(
    address="local",
    num_cpus=os.cpu_count(),
    include_dashboard=False,
    object_store_memory=100 << 20,
)
Path("starting").write_text(ray.get_runtime_context().gcs_address)
Path("starting").rename("address")
while not Path("done").exists() and os.getppid() == tests:
    time.sleep(0.05)
ray.shutdown()
"""
"""Ends by itself when the tests that started it have been killed."""

TWO_NODES = """
import os, time
from pathlib import Path

tests = os.getppid()
from ray.cluster_utils import Cluster

more = {"include_dashboard": False, "object_store_memory": 80 << 20}
cluster = Cluster()
cluster.add_node(num_cpus=4, resources={"server": 4, "worker": 2}, **more)
other = cluster.add_node(num_cpus=1, resources={"server": 1}, **more)
cluster.wait_for_nodes()
Path("other").write_text(f"{other.node_id} {other.all_processes['raylet'][0].process.pid}")
Path("starting").write_text(cluster.address)
Path("starting").rename("address")
while not Path("done").exists() and os.getppid() == tests:
    time.sleep(0.05)
cluster.shutdown()
"""
"""The same of two nodes: workers have room on the first, and a server on the other one."""

ACTORS = (
    "ServerProcess",
    "WorkerProcess",
    "NodeWorkerProcess",
    "RankProcess",
    "EvaluatorProcess",
    "JournaledCoordinator",
)

MEMBERSHIP = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""For whoever may join a program's Ray."""


class Cluster(Command):
    """A program that keeps a Ray for others until it is told to end."""

    def __init__(self, folder: Path, program: str = HOLDING) -> None:
        super().__init__(folder, sys.executable, "-c", program, env=MEMBERSHIP)

    @property
    def address(self) -> str:
        """Of its GCS, once there is one."""
        path = self.folder / "address"
        wait_for(lambda: path.exists() or self.process.poll() is not None, RUN_TIMEOUT_S, "Ray")
        assert path.exists(), str(self.output)
        return path.read_text()

    def wait_until_idle(self) -> None:
        """Until no actor of ours lives in it: what runs that have ended left."""
        titles = [f"ray::{name}" for name in ACTORS]
        wait_for(lambda: not any(map(self.titled, titles)), EVENT_TIMEOUT_S, "end of all actors")

    def end(self) -> None:
        """Tell it to end; it must do so in peace."""
        (self.folder / "done").touch()
        assert self.wait().code == 0, str(self.output)


class JoinedRun(TrainRun):
    """A run in a cluster's Ray, whose processes are the cluster's."""

    def __init__(
        self, cluster: Cluster, folder: Path, recipe: Path, settings: Mapping[str, Any], **more: Any
    ) -> None:
        joined = {"ray.address": cluster.address, **settings}
        super().__init__(folder, recipe, joined, env=MEMBERSHIP, **more)
        self._cluster = cluster

    def titled(self, title: str) -> list[psutil.Process]:
        """The Ray workers whose process title begins so, oldest first."""
        return self._cluster.titled(title)
