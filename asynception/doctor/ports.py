"""Ports that servers may listen at."""

import errno
import socket
from pathlib import Path

from asynception.doctor.finding import Verdict, fail, ok, warn

PortRange = tuple[int, int]

_LOCAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def measure_ports(
    host: str, port_range: PortRange | None, per_server: int, num_servers: int, shared: bool
) -> Verdict:
    """Binds every port of the range for a moment, at the address that servers bind to.

    per_server: ports of a server. shared: whether other nodes may take some of the servers.
    """
    if port_range is None:
        with _bound(host, 0):
            return judge_any_port(_local_ports())
    free = 0
    for port in range(port_range[0], port_range[1] + 1):
        try:
            _bound(host, port).close()
            free += 1
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    return judge_ports(port_range, free, per_server, num_servers, shared, _local_ports())


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def _local_ports() -> PortRange | None:
    try:
        first, last = map(int, _LOCAL_PORTS.read_text().split())
    except (OSError, ValueError):
        return None
    return first, last


def judge_any_port(local: PortRange | None) -> Verdict:
    """Without lanes.port_range. A firewall between nodes shows in the check of their links."""
    return ok(f"any free port{f' of {local[0]}-{local[1]}' if local else ''}")


def judge_ports(
    port_range: PortRange,
    free: int,
    per_server: int,
    num_servers: int,
    shared: bool,
    local: PortRange | None,
) -> Verdict:
    """local: the ports that the system hands out itself, to any program's connections."""
    first, last = port_range
    needed = per_server * num_servers
    found = f"{free} of {last - first + 1} ports {first}-{last} are free; servers take {needed}"
    mend = "set a wider lanes.port_range above 1023, or end what listens there"
    if free < per_server or (free < needed and not shared):
        return fail(found, mend)
    if free < needed:
        return warn(f"{found} if all run on this node", mend)
    if local is not None and first <= local[1] and local[0] <= last:
        return warn(
            f"{found}; the system hands out {local[0]}-{local[1]} to connections of any program",
            "set a lanes.port_range outside of those",
        )
    return ok(found)
