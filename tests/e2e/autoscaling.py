"""A Ray head whose autoscaler starts raylets on this machine as nodes, and ends them when idle.

Ray's own `AutoscalingCluster` is no use: it begins with `ray stop`, which ends every Ray of this
machine, and reads a file that Ray's wheel lacks.
"""

import contextlib
import json
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
from processes import GONE_TIMEOUT_S, RUN_TIMEOUT_S, Command, wait_for
from ray.util import get_node_ip_address

NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
"""The variable by which a raylet gets its id."""
HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"
"""By which the provider knows the head."""
MEMORY_NUM_BYTES = 2 << 30
OBJECT_STORE_NUM_BYTES = 80 << 20
IDLE_S = 2

RAY = (sys.executable, "-m", "ray.scripts.scripts")


class AutoscaledRay(Command):
    """A head without a CPU, and up to `max_nodes` nodes with one each, which come and go."""

    def __init__(self, folder: Path, max_nodes: int) -> None:
        """folder: also Ray's temporary one, so its path must be short."""
        host, port = get_node_ip_address(), _free_port()
        self.address = f"{host}:{port}"
        self.membership = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        config = folder / "autoscaler.json"
        config.write_text(json.dumps(_config(self.address, max_nodes)))
        environment = {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_NODE_TYPE_NAME": HEAD_TYPE,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "PYTHONPATH": str(Path(__file__).parent),  # for the provider
            NODE_ID: HEAD_ID,
        }
        super().__init__(
            folder,
            *(*RAY, "start", "--head", "--block", f"--port={port}", f"--node-ip-address={host}"),
            *("--num-cpus=0", f"--memory={MEMORY_NUM_BYTES}", "--include-dashboard=false"),
            *(f"--object-store-memory={OBJECT_STORE_NUM_BYTES}", f"--temp-dir={folder}/ray"),
            *(f"--autoscaling-config={config}", f"--ray-client-server-port={_free_port()}"),
            "--disable-usage-stats",
            env={**environment, **self.membership},
        )
        wait_for(self._has_started, RUN_TIMEOUT_S, "Ray head")

    def _has_started(self) -> bool:
        assert self.process.poll() is None, str(self.output)
        return "Ray runtime started" in self.output.stdout + self.output.stderr

    def nodes(self) -> dict[int, str]:
        """By the process of its raylet, the id of each node but the head."""
        ids = {each.pid: _node_of(each) for each in self.processes()}
        return {pid: node for pid, node in ids.items() if node and node != HEAD_ID}

    def drain(self, node: str) -> None:
        """As before a node is taken away."""
        command = [*RAY, "drain-node", f"--address={self.address}", f"--node-id={node}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        drained = Command(self.folder / "drain", *command, env=self.membership).wait()
        assert drained.code == 0, str(drained)

    def end(self) -> None:
        """Kill all of it."""
        self.kill_all()
        self.wait_until_gone(GONE_TIMEOUT_S)


def _node_of(process: psutil.Process) -> str | None:
    """The id of the node whose raylet it is; None for others, and for those that have ended."""
    with contextlib.suppress(psutil.Error):
        return process.environ()[NODE_ID] if process.name() == "raylet" else None
    return None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _config(address: str, max_nodes: int) -> dict[str, Any]:
    """Of the autoscaler, as in the YAML file of `ray up`."""
    provider = {"module": "autoscaled_nodes.Provider", "gcs_address": address}
    # Nothing is to be installed, and of several nodes not only one is to be made.
    flags = ("disable_node_updaters", "disable_launch_config_check", "launch_multiple")
    resources = {"CPU": 1, "memory": MEMORY_NUM_BYTES}
    node = {**resources, "object_store_memory": OBJECT_STORE_NUM_BYTES}
    steps = ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        **{f"{step}_commands": [] for step in steps},
        "cluster_synced_files": [],
        "file_mounts": {},
        "cluster_name": "autoscaled",
        "max_workers": max_nodes,
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 100,
        "provider": {"type": "external", "head_node_id": HEAD_ID, **provider}
        | dict.fromkeys(flags, True),
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "node": {"resources": node, "node_config": {}, "max_workers": max_nodes},
        },
    }
