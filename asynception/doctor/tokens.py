"""Whether a Ray cluster asks for a token: who may send it tasks, may run any program on it."""

import ipaddress
import os

import grpc

from asynception.doctor.finding import Verdict, fail, ok, warn

TIMEOUT_S = 5.0

_HARMLESS_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"

_MEND = "set RAY_AUTH_MODE=token with one RAY_AUTH_TOKEN on every node and here, before ray start"


def measure_token(gcs_address: str) -> Verdict:
    """Asks the head something harmless without a token."""
    tls = os.environ.get("RAY_USE_TLS") == "1"
    asks = False if tls else _asks_for_token(gcs_address)
    return judge_token(asks, tls, gcs_address.rpartition(":")[0].strip("[]"))


def _asks_for_token(address: str) -> bool:
    options = [("grpc.enable_http_proxy", 0)]  # as Ray's own channels
    with grpc.insecure_channel(address, options) as channel:
        try:
            channel.unary_unary(_HARMLESS_CALL, None, None)(b"", timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def judge_token(asks: bool, tls: bool, host: str) -> Verdict:
    """host: the head's address. tls: Ray then asks for certificates instead."""
    if tls:
        return ok(f"Ray at {host} talks TLS; a token was not looked for")
    if asks:
        return ok(f"Ray at {host} refuses calls without a token")
    found = f"Ray at {host} takes orders from whoever reaches its port"
    address = _address(host)
    if address is not None and address.is_loopback:
        return ok(f"{found}, which is this machine alone")
    if address is not None and address.is_global:
        return fail(f"{found}, and the address is public", f"close that port at once; {_MEND}")
    return warn(found, _MEND)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
