"""Which of a run's servers is a primary, and which its standby: told by who has connected to whom.

A primary sends its standby what that is to carry out; a standby calls nobody.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from asynception.hosts.ray_nodes import RayNodes

TITLE = "ray::ServerProcess"


@dataclass(frozen=True)
class Server:
    """A server's process."""

    pid: int
    host: int


@dataclass(frozen=True)
class Pair:
    """Both servers of a shard."""

    primary: Server
    standby: Server


def pairs(nodes: RayNodes) -> list[Pair]:
    """All that are there, in no order that means anything."""
    hosts = range(len(nodes.hosts))
    servers = {pid: Server(pid, host) for host in hosts for pid in nodes.pids(host, TITLE)}
    listening = {
        local: pid for host in hosts for local, _, pid in _sockets(nodes, host, "listening")
    }
    found = {
        (pid, listening[peer])
        for host in hosts
        for _, peer, pid in _sockets(nodes, host, "established")
        if peer in listening
    }
    return [
        Pair(servers[near], servers[far])
        for near, far in sorted(found)
        if near != far and near in servers and far in servers
    ]


def _sockets(nodes: RayNodes, host: int, state: str) -> Iterator[tuple[str, str, int]]:
    """Of TCP on a host: local address, peer, and a process that has it."""
    said = nodes.hosts[host].namespace.run("ss", "-tnpH", "state", state)
    for line in said.splitlines():
        _, _, local, peer, *rest = line.split()
        for pid in re.findall(r"pid=(\d+)", " ".join(rest)):
            yield local, peer, int(pid)
