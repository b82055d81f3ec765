"""A line that delays: `python -m asynception.hosts.delay ONE OTHER SECONDS` carries frames between
two network devices, each way, that much later. For kernels without netem. Needs root.

Frames travel with their virtio header, so that checksums and segments that a virtual device has
left to the next one stay so.
"""

import heapq
import selectors
import socket
import sys
import time

PACKET_IGNORE_OUTGOING, PACKET_VNET_HDR = 23, 15
"""Options of packet sockets that Python has no names for."""

SOL_PACKET, ETH_P_ALL = 263, 3
FRAME_NUM_BYTES = 1 << 17
"""More than any segment, of which a virtual device may hand over several as one."""

READY = "ready"
"""Printed once frames are carried."""


def carry(one: str, other: str, delay_s: float) -> None:
    """For ever. What comes while the far device's queue is full is lost, as on any line."""
    near, far = (_opened(device) for device in (one, other))
    across = {near: far, far: near}
    selector = selectors.DefaultSelector()
    for end in across:
        selector.register(end, selectors.EVENT_READ)
    print(READY, flush=True)
    waiting: list[tuple[float, int, socket.socket, bytes]] = []
    count = 0
    while True:
        timeout_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for key, _ in selector.select(timeout_s):
            assert isinstance(key.fileobj, socket.socket)
            frame = key.fileobj.recv(FRAME_NUM_BYTES)
            count += 1  # of two that leave at once, the first to come goes first
            leaves_s = time.monotonic() + delay_s
            heapq.heappush(waiting, (leaves_s, count, across[key.fileobj], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(waiting)
            _sent(end, frame)


def _opened(device: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    end.bind((device, ETH_P_ALL))
    return end


def _sent(end: socket.socket, frame: bytes) -> None:
    try:
        end.send(frame)
    except OSError:
        return  # the device is down, or full


if __name__ == "__main__":
    carry(sys.argv[1], sys.argv[2], float(sys.argv[3]))
