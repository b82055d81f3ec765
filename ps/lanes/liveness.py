"""How a call notices that the other host has vanished, without a word, while it waits.

A process that dies is told of by its kernel. A host that loses its power or its network is not: by
themselves, TCP and gRPC wait for it until the call's deadline, which must cover a whole transfer.
"""

import socket

PROBE_AFTER_S = 10
"""Without anything from the other side, it is asked whether it is there."""
ANSWER_S = 10
"""Without an answer, or without a sign that what was sent has arrived, it is taken for gone."""

_NUM_PROBES = 2


def channel_options() -> tuple[tuple[str, int], ...]:
    """Of a gRPC channel: its calls under way end with UNAVAILABLE."""
    return (
        ("grpc.keepalive_time_ms", 1000 * PROBE_AFTER_S),
        ("grpc.keepalive_timeout_ms", 1000 * ANSWER_S),  # TCP_USER_TIMEOUT is set to this, too
        ("grpc.http2.max_pings_without_data", 0),  # as many as it takes: a pull may wait for long
    )


def server_options() -> tuple[tuple[str, int], ...]:
    """Of a gRPC server, which takes frequent pings for an attack unless told that they are not."""
    return (("grpc.http2.min_ping_interval_without_data_ms", 1000 * PROBE_AFTER_S // 2),)


def watch(connection: socket.socket) -> None:
    """Have a TCP connection's calls end with ETIMEDOUT."""
    options = {
        "TCP_KEEPIDLE": PROBE_AFTER_S,
        "TCP_KEEPINTVL": max(1, ANSWER_S // _NUM_PROBES),
        "TCP_KEEPCNT": _NUM_PROBES,
        "TCP_USER_TIMEOUT": 1000 * (PROBE_AFTER_S + ANSWER_S),
    }
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # Linux has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
