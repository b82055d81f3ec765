"""The server around one shard: control messages over gRPC, the token, and all lanes."""

import hmac
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from protos import parameter_server_pb2 as pb
from protos import parameter_server_pb2_grpc as pb_grpc
from ps.answering import DecodingInterceptor, answering
from ps.lanes import liveness
from ps.lanes.gate import Gate, listen, ports_taken
from ps.lanes.grpc import bytes_handlers
from ps.lanes.lane import LaneSettings
from ps.messages import status_message, worker_clock_messages
from ps.service import ShardService
from ps.tls import Identity

TOKEN_KEY = "asynception-token"
"""Metadata that carries the run's token."""

SPARE_THREADS = 8
"""Calls that are served besides one for each worker: trainer, evaluator, waiting cuts."""

CONNECTIONS_PER_CALLER = 4
"""Two for a worker in a lane, and as many of a life before it that have yet to be noticed dead."""


class _ControlServicer(pb_grpc.ParameterServerServicer):
    def __init__(self, service: ShardService, gate: Gate, doorman: "_TokenInterceptor") -> None:
        self._service, self._gate, self._doorman = service, gate, doorman

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Status:
        with answering(context):
            status = status_message(self._service.status())
        status.unauthenticated = self._doorman.num_refused
        return status

    def Fence(self, request: pb.FenceRequest, context: grpc.ServicerContext) -> pb.FenceReply:
        with answering(context):
            sequences = self._service.fence(request.worker, request.incarnation)
        (clock,) = worker_clock_messages({request.worker: sequences})
        return pb.FenceReply(clock=clock)

    def Cut(self, request: pb.CutRequest, context: grpc.ServicerContext) -> pb.Status:
        known = self._service.config.vector_numels()
        unknown = sorted(set(request.vectors) - set(known))
        if unknown:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no vectors named {unknown}")
        if not 0 <= request.wait_s <= threading.TIMEOUT_MAX:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"wait_s = {request.wait_s}")
        names = list(request.vectors) or None
        with answering(context):
            self._service.cut(request.name, request.version, request.wait_s, names)
            return status_message(self._service.status())

    def Expect(self, request: pb.ExpectRequest, context: grpc.ServicerContext) -> pb.ExpectReply:
        with answering(context):
            self._service.expect(frozenset(request.workers), request.number)
        return pb.ExpectReply()

    def Enter(self, request: pb.EnterRequest, context: grpc.ServicerContext) -> pb.EnterReply:
        clock = request.clock if request.HasField("clock") else None
        with answering(context):
            entered = self._service.enter(request.worker, request.incarnation, clock)
        return pb.EnterReply(clock=entered)

    def OpenLane(
        self, request: pb.OpenLaneRequest, context: grpc.ServicerContext
    ) -> pb.OpenLaneReply:
        with answering(context):
            return self._gate.offer()

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseReply:
        self._service.release(request.name)
        return pb.ReleaseReply()


class _TokenInterceptor(grpc.ServerInterceptor):
    """Answers UNAUTHENTICATED to every call without the run's token, before reading it."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self.num_refused = 0
        """Calls, about: they are counted without a lock."""
        # As of a stream, which a handler reads if it likes: for a single message gRPC would wait,
        # with a thread, for as long as the caller doesn't send it.
        self._refusal = grpc.stream_stream_rpc_method_handler(self._refuse)

    def _refuse(self, unread: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self.num_refused += 1
        context.abort(grpc.StatusCode.UNAUTHENTICATED, f"metadata {TOKEN_KEY} missing or wrong")

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        given = dict(handler_call_details.invocation_metadata).get(TOKEN_KEY, "")
        if hmac.compare_digest(str(given).encode(), self._token):
            return continuation(handler_call_details)
        return self._refusal


class ShardServer:
    """Serves one shard at `host` until `stop`."""

    def __init__(
        self,
        service: ShardService,
        host: str,
        token: str,
        num_workers: int,
        lanes: LaneSettings | None = None,
        identity: Identity | None = None,
        more: Callable[[grpc.Server], None] = lambda server: None,
    ) -> None:
        """Binds to `host` alone, not to all addresses.

        lanes: the defaults unless given, which are any free ports and all lanes.
        identity: with it, gRPC and the tcp lane are encrypted, and callers must have one too.
        more: adds what else is to be served behind the same token.
        Raises InputError if the ports of the range are taken, RuntimeError or OSError if the
        address is not of this machine.
        """
        assert token, "an empty token would let in callers without one"
        lanes = lanes or LaneSettings()
        num_callers = num_workers + SPARE_THREADS
        max_connections = CONNECTIONS_PER_CALLER * num_callers
        context = identity.server_context() if identity else None
        self._gate = Gate(service, host, lanes, max_connections, context)
        doorman = _TokenInterceptor(token)
        self._server = grpc.server(
            ThreadPoolExecutor(num_callers, thread_name_prefix="shard"),
            interceptors=[doorman, DecodingInterceptor()],
            options=[("grpc.so_reuseport", 0), *liveness.server_options()],
        )
        pb_grpc.add_ParameterServerServicer_to_server(
            _ControlServicer(service, self._gate, doorman), self._server
        )
        self._server.add_generic_rpc_handlers((bytes_handlers(service),))
        more(self._server)
        authority = f"[{host}]" if ":" in host else host
        credentials = identity.server_credentials() if identity else None
        port = _bind(self._server, host, authority, lanes.port_range, credentials)
        self.address = f"{authority}:{port}"

    def start(self) -> None:
        """Begin to serve."""
        self._server.start()
        self._gate.start()

    def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new calls; end running ones after `grace_s` seconds. Blocks until done."""
        self._server.stop(grace_s).wait()
        self._gate.stop()


def _bind(
    server: grpc.Server,
    host: str,
    authority: str,
    port_range: tuple[int, int] | None,
    credentials: grpc.ServerCredentials | None,
) -> int:
    """Let gRPC listen at a free port. Raises InputError if the range has none, RuntimeError."""

    def add(port: int) -> int:
        if credentials is None:
            return server.add_insecure_port(f"{authority}:{port}")
        return server.add_secure_port(f"{authority}:{port}", credentials)

    if port_range is None:
        return add(0)
    first, last = port_range
    while first <= last:
        with listen(host, (first, last)) as probe:  # gRPC itself logs every port that is taken
            port = probe.getsockname()[1]
        try:
            return add(port)
        except RuntimeError:  # another server was quicker
            first = port + 1
    raise ports_taken(host, port_range)
