"""Hosts joined by a switch, and what can go wrong with a link.

The switch is a bridge in a namespace of its own, so no device appears among the machine's. A host's
link is a veth pair: `DEVICE` on the host, a port of the bridge at the other end. `tc` shapes what
leaves either end.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from asynception.hosts import delay
from asynception.hosts.namespaces import Namespace, mounts_as_before, namespace, run, sweep

DEVICE, BRIDGE = "wire0", "switch0"
SUBNET = "192.0.2"
"""Of a network that is nobody's (RFC 5737)."""
MAX_HOSTS = 250

ETHERNET_GBIT = 100
"""Rate of a link that only loses packets: no limit on any machine of today."""


@dataclass(frozen=True)
class Host:
    """A namespace with an address, and its link."""

    namespace: Namespace
    address: str
    switch: Namespace
    port: str
    """The bridge's end of the link."""

    @property
    def _ends(self) -> tuple[tuple[Namespace, str], ...]:
        return (self.namespace, DEVICE), (self.switch, self.port)

    def cut(self) -> None:
        """Lose every packet, both ways, without a word to either side."""
        self._shape("blackhole")

    @contextmanager
    def delayed(self, delay_s: float) -> Iterator[None]:
        """Have each packet take so much longer, both ways, for the length of the block."""
        line, joint = (f"{self.port}{end}" for end in ("line", "join"))
        self.switch.run("ip", "link", "add", line, "type", "veth", "peer", "name", joint)
        self.switch.run("ip", "link", "set", line, "up")
        ends = ("-m", delay.__name__, self.port, line, str(delay_s))
        command = self.switch.command([sys.executable, *ends])
        carrying = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        try:
            assert carrying.stdout is not None
            carrying.stdout.readline()
            self.switch.run("ip", "link", "set", self.port, "nomaster")
            self.switch.run("ip", "link", "set", joint, "master", BRIDGE, "up")
            yield
        finally:
            carrying.kill()
            carrying.communicate()
            self.switch.run("ip", "link", "delete", line)
            self.switch.run("ip", "link", "set", self.port, "master", BRIDGE)

    def mend(self) -> None:
        """A link without limits again."""
        for where, device in self._ends:
            where.run("tc", "qdisc", "replace", "dev", device, "root", "pfifo", "limit", "1000")

    def limit(self, gbit: float) -> None:
        """Let so much per second pass each way."""
        self._shape(*rate_limit(gbit))

    def slow(self, mbit: float, queue_ms: float) -> None:
        """Let little pass, behind a queue in which a packet waits up to `queue_ms`."""
        rate = ("rate", f"{mbit:g}mbit", "burst", "8kb", "latency", f"{queue_ms:g}ms")
        self._shape("tbf", *rate)

    def lose(self, share: float) -> None:
        """Lose this share of the packets, both ways, each by chance.

        By a filter that sends them to a class without an exit, since not every kernel has netem.
        """
        assert 0 < share < 1
        limit = round(share * 2**32)
        # Classic BPF: a random number; below the limit it matches, and else it doesn't.
        program = f"4,32 0 0 {2**32 - 4096 + 56},53 1 0 {limit},6 0 0 {2**32 - 1},6 0 0 0"
        self._shape("htb", "default", "1", handle=True)
        for where, device in self._ends:
            for number in (1, 2):
                rate = ("htb", "rate", f"{ETHERNET_GBIT}gbit", "quantum", "60000")
                child = ("dev", device, "parent", "1:", "classid", f"1:{number}")
                where.run("tc", "class", "add", *child, *rate)
            where.run("tc", "qdisc", "add", "dev", device, "parent", "1:2", "blackhole")
            root = ("dev", device, "parent", "1:", "protocol", "all", "prio", "1")
            where.run("tc", "filter", "add", *root, "bpf", "bytecode", program, "flowid", "1:2")

    def _shape(self, *discipline: str, handle: bool = False) -> None:
        self.mend()
        named = ("handle", "1:") if handle else ()
        for where, device in self._ends:
            where.run("tc", "qdisc", "replace", "dev", device, "root", *named, *discipline)


def rate_limit(gbit: float) -> tuple[str, ...]:
    """A discipline of `tc`: so much per second, in bursts of half a millisecond."""
    burst_num_bytes = max(256 * 1024, int(gbit * 1e9 / 8 * 0.5e-3))
    return "tbf", "rate", f"{gbit:g}gbit", "burst", f"{burst_num_bytes}b", "limit", "64mb"


@contextmanager
def network(num_hosts: int) -> Iterator[Sequence[Host]]:
    """Hosts at one switch; behind the block they are gone, with all processes in them.

    Also removes what a killed program left behind, at its start. Raises CalledProcessError.
    """
    assert 0 < num_hosts <= MAX_HOSTS
    sweep()
    with ExitStack() as stack:
        stack.enter_context(mounts_as_before())
        switch = stack.enter_context(namespace("switch"))
        switch.run("ip", "link", "add", BRIDGE, "type", "bridge")
        switch.run("ip", "link", "set", BRIDGE, "up")
        yield [_join(stack, switch, number) for number in range(num_hosts)]


def _join(stack: ExitStack, switch: Namespace, number: int) -> Host:
    made = stack.enter_context(namespace(f"host{number}"))
    host = Host(made, f"{SUBNET}.{number + 1}", switch, f"port{number}")
    near = ("ip", "link", "add", DEVICE, "netns", made.name, "type", "veth")
    run(*near, "peer", "name", host.port, "netns", switch.name)
    switch.run("ip", "link", "set", host.port, "master", BRIDGE, "up")
    made.run("ip", "address", "add", f"{host.address}/24", "dev", DEVICE)
    made.run("ip", "link", "set", DEVICE, "up")
    return host
