"""gRPC over the simulated network: the real stubs call, the real handlers answer.

Messages are copied when they are taken from a sender's iterator, a piece at a time, while others go
on; a call is handled in a thread of the server's party.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import grpc

from asynception.simulate.network import Network
from asynception.simulate.world import Party, Signal, World
from ps.lanes.lane import Refused

TRACED = ("Cut", "Read", "Release", "Load")
"""Methods whose calls have a line in the trace, which says if they come late or a second time."""


class _Aborted(Exception):
    """A handler ended its call."""


@dataclass
class _Context:
    """The part of grpc.ServicerContext that handlers use."""

    time_remaining: Callable[[], float]
    """Seconds until the caller gives up."""
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""

    def abort(self, code: grpc.StatusCode, reason: str) -> NoReturn:
        self.code, self.reason = code, reason
        raise _Aborted


@dataclass(frozen=True)
class _Details:
    method: str
    invocation_metadata: tuple[()] = ()


class Endpoint:
    """Where handlers are registered: the part of grpc.Server that this takes."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self._generic: list[Any] = []
        self.open_calls: list[_Call] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        self._generic += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """gRPC's faster way to the same handlers, which are registered the other way too."""

    def handler(self, method: str) -> Any:
        """The RpcMethodHandler of a method."""
        found = (each.service(cast(Any, _Details(method))) for each in self._generic)
        return next(handler for handler in found if handler is not None)


@dataclass(eq=False)
class _Call:
    """One call under way: what its caller sent, and, once it has ended, what came of it."""

    caller: Party
    endpoint: Endpoint
    method: str
    sent: list[bytes]
    deadline_s: float
    """When its caller gives it up."""
    ended: Signal
    answer: list[bytes] = field(default_factory=list)
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    num_arrivals: int = 0

    def end(self, answer: list[bytes], code: grpc.StatusCode, reason: str) -> None:
        if not self.ended.is_set:
            self.answer, self.code, self.reason = answer, code, reason
            self.ended.set()

    def arrived(self, now_s: float) -> str:
        """It is to be carried out; how, if not for the first time, and in time."""
        self.num_arrivals += 1
        return ", late" * (now_s >= self.deadline_s) + ", again" * (self.num_arrivals > 1)


class Wires:
    """All endpoints by address, and the calls between parties."""

    def __init__(self, world: World, network: Network) -> None:
        self.world, self.network = world, network
        self._endpoints: dict[str, Endpoint] = {}
        self.slow: Mapping[str, float] = {}
        """By method, how long each message of a stream may take besides."""
        self.once: frozenset[str] = frozenset()
        """Methods whose calls never arrive twice, or after they were given up."""

    def _slow_s(self, method: str) -> float:
        """Of a message of this method."""
        most_s = self.slow.get(method, 0.0)
        return self.world.random.uniform(0, most_s) if most_s else 0.0

    def listen(self, address: str, endpoint: Endpoint) -> None:
        """Answer calls to an address from now on."""
        self._endpoints[address] = endpoint
        endpoint.party.at_death.append(lambda: self._break_off(endpoint))

    def channel(self, address: str, options: object = None) -> "Channel":
        """In place of grpc.insecure_channel."""
        return Channel(self, address)

    def call(
        self, address: str, method: str, messages: Iterable[bytes], timeout_s: float
    ) -> list[bytes]:
        """The answer's messages. Raises Refused."""
        world, caller = self.world, self.world.party
        deadline_s = world.now_s + timeout_s
        sent: list[bytes] = []
        for message in messages:
            sent.append(bytes(message))
            world.pause(self.network.gap_s() + self._slow_s(method))
        endpoint = self._endpoints[address]
        call = _Call(caller, endpoint, method, sent, deadline_s, Signal(world))
        self._send(call)
        if self.network.repeats() and method not in self.once:
            self._send(call)
        if not call.ended.wait(max(0.0, deadline_s - world.now_s)):
            raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time")
        if call.code is not grpc.StatusCode.OK:
            raise Refused(call.code, call.reason)
        return call.answer

    def _send(self, call: _Call) -> None:
        endpoint, is_once = call.endpoint, call.method in self.once
        delay_s = self.network.delay_s(call.caller, endpoint.party)
        at_s = self.world.now_s + (delay_s or 0.0)
        if delay_s is None or (is_once and at_s >= call.deadline_s):
            return
        if not endpoint.party.alive:
            refuse = (grpc.StatusCode.UNAVAILABLE, "connection refused")
            self.world.call_at(at_s, call.caller, lambda: call.end([], *refuse))
            return

        def handle() -> None:
            if not is_once or self.world.now_s < call.deadline_s:  # it may have been frozen
                self._handle(call)

        self.world.spawn(endpoint.party, handle, at_s)
        endpoint.open_calls.append(call)

    def _break_off(self, endpoint: Endpoint) -> None:
        """Connections to a dead process are reset, or say nothing any more."""
        for call in endpoint.open_calls:
            if not call.ended.is_set and self.world.random.random() < 0.7:
                call.end([], grpc.StatusCode.UNAVAILABLE, "connection reset")
        endpoint.open_calls.clear()

    def _handle(self, call: _Call) -> None:
        endpoint, caller, method = call.endpoint, call.caller, call.method
        context = _Context(lambda: call.deadline_s - self.world.now_s)
        if method.endswith(TRACED):
            how = call.arrived(self.world.now_s)
            self.world.note(f"{endpoint.party.name} {method} from {caller.name}{how}")
        try:
            answer = list(self._answers(endpoint.handler(method), call.sent, context))
        except _Aborted:
            answer = []
        delay_s = self.network.delay_s(endpoint.party, caller)
        if call in endpoint.open_calls:
            endpoint.open_calls.remove(call)
        if delay_s is None:
            return
        at_s = self.world.now_s + delay_s
        self.world.call_at(at_s, caller, lambda: call.end(answer, context.code, context.reason))

    def _answers(self, handler: Any, sent: list[bytes], context: _Context) -> Iterator[bytes]:
        decode = handler.request_deserializer or (lambda message: message)
        encode = handler.response_serializer or (lambda message: message)
        if handler.stream_unary:
            yield encode(handler.stream_unary(self.paced(sent), context))
        elif handler.unary_stream:
            for message in handler.unary_stream(decode(sent[0]), context):
                yield bytes(encode(message))
                self.world.pause(self.network.gap_s())
        else:
            yield encode(handler.unary_unary(decode(sent[0]), context))

    def paced(self, messages: list[bytes]) -> Iterator[bytes]:
        """The messages, with time between them."""
        for message in messages:
            yield message
            self.world.pause(self.network.gap_s())


class Channel:
    """The part of grpc.Channel that stubs use."""

    def __init__(self, wires: Wires, address: str) -> None:
        self._wires, self._address = wires, address

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **_: object,
    ) -> Callable[..., Any]:
        def call(request: Any, timeout: float, metadata: object) -> Any:
            sent = [request_serializer(request)]
            return response_deserializer(self._wires.call(self._address, method, sent, timeout)[0])

        return call

    def unary_stream(self, method: str, *_: object) -> Callable[..., Any]:
        def call(request: bytes, timeout: float, metadata: object) -> Iterator[bytes]:
            return self._wires.paced(self._wires.call(self._address, method, [request], timeout))

        return call

    def stream_unary(self, method: str, *_: object) -> Callable[..., Any]:
        def call(messages: Iterator[bytes], timeout: float, metadata: object) -> bytes:
            return self._wires.call(self._address, method, messages, timeout)[0]

        return call

    def close(self) -> None:
        """Nothing more is called."""
