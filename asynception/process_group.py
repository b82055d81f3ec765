"""How the workers of a run find one another and form a torch.distributed process group."""

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from worker.node import NodeRanks

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of a network interface, which is bytes 20 to 24 of the answer."""

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Rendezvous:
    """Where and how a group meets."""

    address: str
    """HOST:PORT of the store that rank 0 keeps."""
    num_ranks: int
    timeout_s: float
    """For forming the group, and for each of its collectives."""
    use_gpu: bool

    @property
    def backend(self) -> str:
        """Tensors on the host go by gloo, so that what ranks tell each other holds up no GPU."""
        return "cpu:gloo,cuda:nccl" if self.use_gpu else "gloo"

    @property
    def timeout(self) -> timedelta:
        """`timeout_s`, as torch has it."""
        return timedelta(seconds=self.timeout_s)


def open_store(host: str, num_ranks: int, timeout_s: float) -> tuple[TCPStore, str]:
    """Rank 0's store on a free port of `host` and no other address; returns its HOST:PORT too.

    The store lives as long as the object does.
    """
    listening = socket.create_server((host, 0), backlog=num_ranks)
    port = listening.getsockname()[1]
    store = TCPStore(
        host,
        port,
        num_ranks,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return store, f"{host}:{port}"


@contextmanager
def joined(
    rendezvous: Rendezvous, rank: int, host: str, store: Store | None
) -> Iterator[dist.ProcessGroup]:
    """The group, for the length of the block, once all ranks are there.

    host: this rank's own address, at which the others reach it, unless GLOO_SOCKET_IFNAME or
    NCCL_SOCKET_IFNAME says otherwise. store: of rank 0 alone, what `open_store` gave.
    Raises RuntimeError if some rank doesn't come in time.
    """
    for variable in _INTERFACES:
        os.environ.setdefault(variable, interface_of(host))
    if store is None:
        store_host, _, port = rendezvous.address.rpartition(":")
        store = TCPStore(
            store_host,
            int(port),
            rendezvous.num_ranks,
            is_master=False,
            timeout=rendezvous.timeout,
            wait_for_workers=False,
        )
    dist.init_process_group(
        rendezvous.backend,
        store=store,
        rank=rank,
        world_size=rendezvous.num_ranks,
        timeout=rendezvous.timeout,
    )
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


@contextmanager
def joined_on_node(
    rendezvous: Rendezvous, rank: int, host: str, store: Store | None
) -> Iterator[NodeRanks]:
    """The processes of one worker, once all are there; see `joined`.

    host: an address of this node alone, such as loopback, whatever interface is set for others.
    """
    os.environ.update(dict.fromkeys(_INTERFACES, interface_of(host)))
    with joined(rendezvous, rank, host, store) as group:
        leases_group = dist.new_group(backend="gloo", timeout=rendezvous.timeout)
        assert leases_group is not None
        yield NodeRanks(group, leases_group)


def interface_of(host: str) -> str:
    """The name of the network interface that has this IPv4 address. Raises OSError for none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(control, _SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == host:
                return name
    raise OSError(f"no network interface of this host has the address {host}")
