"""Lanes between two hosts: network namespaces joined by a link of 1, 10 and 25 Gbit/s.

Makes two namespaces and a veth pair whose ends `tc` limits, starts a server process in one and a
worker process in the other, and measures the tcp and grpc lanes beside plain sockets over the same
link, round by round. Both hosts share this machine's cores, so at the higher rates it is the
processors that limit. Needs root; everything is removed in the end, also after Ctrl-C. Prints one
line `RESULT {json}` for each row: GB/s are of float32 vectors whatever travels, x_link_pull and
x_link_push are shares of the link, of what travels, headers of TCP and IP not counted.

With --ray the trainer itself runs there, with a raylet on each host, and `what` names the lane that
it chose. A push's time is then all of it, the shard's update included.
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from measured_rows import Cell, Measured, Ratio, Row, over, row_of
from two_hosts_ends import LOOPS, PLAIN, Order, Servers
from two_hosts_ray import NODES, train_rows

from asynception.hosts.namespaces import Namespace, lacking, namespace, run
from asynception.hosts.network import rate_limit
from asynception.hosts.ray_nodes import ray_nodes

SERVER_ADDRESS, WORKER_ADDRESS = "192.0.2.1", "192.0.2.2"
"""Of a network that is nobody's (RFC 5737)."""
DEVICE = "wire0"
ENDS = Path(__file__).with_name("two_hosts_ends.py")
END_S = 10.0


@contextmanager
def hosts() -> Iterator[tuple[Namespace, Namespace]]:
    """A server's and a worker's host, joined."""
    with (
        namespace("asynception-server") as server,
        namespace("asynception-worker") as worker,
    ):
        near = ("ip", "link", "add", DEVICE, "netns", server.name, "type", "veth")
        run(*near, "peer", "name", DEVICE, "netns", worker.name)
        for host, address in ((server, SERVER_ADDRESS), (worker, WORKER_ADDRESS)):
            host.run("ip", "address", "add", f"{address}/30", "dev", DEVICE)
            host.run("ip", "link", "set", DEVICE, "up")
        yield server, worker


def limit(host: Namespace, gbit: float) -> None:
    """Let a host send so much per second."""
    host.run("tc", "qdisc", "replace", "dev", DEVICE, "root", *rate_limit(gbit))


@contextmanager
def servers(host: Namespace) -> Iterator[Servers]:
    """The process at the servers' end."""
    command = host.command([sys.executable, str(ENDS), "serve", SERVER_ADDRESS])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield Servers(**json.loads(process.stdout.readline()))
        finally:
            process.terminate()
            process.wait(END_S)


def work(host: Namespace, reachable: Servers, order: Order) -> list[dict[Cell, Measured]]:
    """Rounds that a worker measured. Raises CalledProcessError."""
    arguments = [json.dumps(vars(reachable)), json.dumps(vars(order))]
    command = host.command([sys.executable, str(ENDS), "work", *arguments])
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rounds = json.loads(done.stdout)
    return [{Cell(*each): figures for each, figures in round_} for round_ in rounds]


def rows_of(rounds: Sequence[Mapping[Cell, Measured]], gbit: float) -> Iterator[Row]:
    """Rows of one rate."""
    for cell in LOOPS:
        ratios: dict[str, Ratio] = {}
        for way in ("pull", "push"):
            ratios[f"x_link_{way}"] = _of_link(cell, f"{way}_gbps", gbit)
            ratios[f"x_plain_{way}"] = over(cell, PLAIN, f"{way}_gbps")
        same_lane = Cell(cell.what, "float32")
        if cell != same_lane:
            ratios["x_float32"] = over(cell, same_lane, "updates_per_s")
        row = row_of(cell, rounds, ratios)
        if row["rounds"]:
            yield {**row, "wire": row.pop("work"), "link_gbit": gbit, "hosts": 2}


def _of_link(cell: Cell, figure: str, gbit: float) -> Ratio:
    """Of what travels; figures are of float32 vectors."""
    travels = 0.5 if cell.work == "bfloat16" else 1.0
    return lambda round_: round_[cell][figure] * travels * 8 / gbit


def _train(rounds: int, seconds: float, rates: Sequence[float]) -> None:
    with tempfile.TemporaryDirectory() as folder, ray_nodes(NODES) as nodes:
        for gbit in rates:
            for host in nodes.hosts:
                host.limit(gbit)
            for row in train_rows(nodes, Path(folder), gbit, seconds, rounds):
                print("RESULT", json.dumps(row), flush=True)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="Of looping, for each figure.")
@click.option("--gbit", "rates", multiple=True, type=float, default=(1, 10, 25), show_default=True)
@click.option("--loops", default="", help="Only those whose name contains this: tcp, plain, ...")
@click.option("--ray", is_flag=True, help="The trainer's own actors, on a Ray node on each host.")
def main(rounds: int, seconds: float, rates: Sequence[float], loops: str, ray: bool) -> None:
    reason = lacking()
    if reason:
        raise click.ClickException(f"{reason}: nothing was measured")
    if ray:
        _train(rounds, seconds, rates)
        return
    signal.signal(signal.SIGTERM, _stop)
    with hosts() as (server, worker):
        for gbit in rates:
            for host in (server, worker):
                limit(host, gbit)
            with servers(server) as reachable:
                measured = work(worker, reachable, Order(rounds, seconds, loops))
            for row in rows_of(measured, gbit):
                print("RESULT", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
