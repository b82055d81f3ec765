"""The gRPC server around one shard: control messages, the bytes of vectors, and the token."""

import hmac
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from protos import parameter_server_pb2 as pb
from protos import parameter_server_pb2_grpc as pb_grpc
from ps.answering import answering
from ps.lanes.grpc import bytes_handlers
from ps.messages import status_message, worker_clock_messages
from ps.service import ShardService

TOKEN_KEY = "asynception-token"
"""Metadata that carries the run's token."""

SPARE_THREADS = 8
"""Calls that are served besides one for each worker: trainer, evaluator, waiting cuts."""


class _ControlServicer(pb_grpc.ParameterServerServicer):
    def __init__(self, service: ShardService) -> None:
        self._service = service

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Status:
        with answering(context):
            return status_message(self._service.status())

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
            self._service.expect(frozenset(request.workers))
        return pb.ExpectReply()

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseReply:
        self._service.release(request.name)
        return pb.ReleaseReply()


class _TokenInterceptor(grpc.ServerInterceptor):
    """Answers UNAUTHENTICATED to every call without the run's token, before reading it."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._refusal = grpc.unary_unary_rpc_method_handler(self._refuse)

    @staticmethod
    def _refuse(request: bytes, context: grpc.ServicerContext) -> None:
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
    """Serves one shard on an ephemeral port of `host` until `stop`."""

    def __init__(self, service: ShardService, host: str, token: str, num_workers: int) -> None:
        """Binds to `host` alone, not to all addresses. Raises RuntimeError if it can't."""
        assert token, "an empty token would let in callers without one"
        self._server = grpc.server(
            ThreadPoolExecutor(num_workers + SPARE_THREADS, thread_name_prefix="shard"),
            interceptors=[_TokenInterceptor(token)],
            options=[("grpc.so_reuseport", 0)],
        )
        pb_grpc.add_ParameterServerServicer_to_server(_ControlServicer(service), self._server)
        self._server.add_generic_rpc_handlers((bytes_handlers(service),))
        authority = f"[{host}]" if ":" in host else host
        port = self._server.add_insecure_port(f"{authority}:0")
        self.address = f"{authority}:{port}"

    def start(self) -> None:
        """Begin to serve."""
        self._server.start()

    def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new calls; end running ones after `grace_s` seconds. Blocks until done."""
        self._server.stop(grace_s).wait()
