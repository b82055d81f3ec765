"""The part of Ray that a session uses, in virtual time: actors, references, deaths."""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from asynception.simulate.network import Network
from asynception.simulate.waiting import Future
from asynception.simulate.world import Party, World

NOTICE_S = 0.5
"""Within so long Ray notices that a process is dead."""

NODE = "node"
"""The option of an actor, and then a belonging of its party, that says where it is."""

RETURN_S = 5.0
"""Within so long it has started an actor again that is to return."""


class Ref(Future[Any]):
    """What a call to an actor will return."""

    def fail(self, error: Exception) -> None:
        """End with an error, unless it has ended."""
        if not self.ended.is_set:
            self._error = error
            self.ended.set()


@dataclass
class _Call:
    """Of an actor's method."""

    name: str
    arguments: Sequence[Any]
    ref: Ref
    caller: Party


class Handle:
    """An actor: calls to it are `handle.method.remote(...)`."""

    def __init__(self, ray: "SimulatedRay", party: Party, make: Callable[[Party], Any]) -> None:
        self.ray, self.party, self.make = ray, party, make
        self.instance = make(party)
        self.believed_dead = self.returns = False
        """returns: with `max_restarts` and `max_task_retries` of its options; else it dies once."""
        self.zombie_until_s = 0.0
        self.begins_s = 0.0
        self.calls: list[_Call] = []

    def __getattr__(self, name: str) -> "_Method":
        return _Method(self, name)


class _Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *arguments: Any) -> Ref:
        return self._handle.ray.call(self._handle, self._name, arguments)


class ActorClass:
    """As `ray.remote(Class)`. `make` is called in the new party, whose methods named in `quick`
    never wait."""

    def __init__(
        self,
        ray: "SimulatedRay",
        kind: str,
        make: Callable[..., Any],
        quick: Sequence[str] = (),
        returns: bool = False,
    ) -> None:
        self._ray, self._kind, self._make, self._quick = ray, kind, make, quick
        self._returns, self._node = returns, ""

    def options(self, **given: Any) -> "ActorClass":
        placed = copy.copy(self)
        placed._node = given.get(NODE, "")
        return placed

    def remote(self, *arguments: Any) -> Handle:
        handle = self._ray.start(self._kind, self._make, arguments, self._quick, self._node)
        handle.returns = self._returns
        return handle


class SimulatedRay:
    """In place of the module. Calls from one process to one actor arrive in their order."""

    def __init__(self, world: World, network: Network, driver: Party) -> None:
        self.world, self.network, self.driver = world, network, driver
        self.handles: list[Handle] = []
        self.fallible: tuple[str, ...] = ("lease", "report")
        """Methods whose calls may be lost."""
        self.num_returns = 0
        """How often an actor was started again."""
        self.room_again_s = 0.0
        """Until then there is no room for workers, and those that are started begin then."""
        self.draining: Collection[str] = frozenset()
        """Nodes that will soon be gone."""
        self.joins_s: Sequence[float] = ()
        """When each place of a worker has a node of its own; all are on one if empty."""
        self._arrivals: dict[tuple[str, str], float] = {}
        self._numbers: dict[str, int] = {}
        self._quick: dict[Handle, Sequence[str]] = {}

    @property
    def node(self) -> str:
        """The node of all workers' places; empty while there is no room."""
        return "" if self.world.now_s < self.room_again_s else "node"

    def node_of(self, worker: int) -> str:
        """The node of a worker's place; empty while there is none."""
        if not self.joins_s:
            return self.node
        is_there = self.node and self.world.now_s >= self.joins_s[worker]
        return f"node-{worker}" if is_there else ""

    def start(
        self,
        kind: str,
        make: Callable[..., Any],
        arguments: Sequence[Any],
        quick: Sequence[str],
        node: str = "",
    ) -> Handle:
        """A new actor in a process of its own."""
        party = self._party(kind)
        party.belongings[NODE] = node
        handle = Handle(self, party, lambda party: make(party, *arguments))
        self._quick[handle] = quick
        if kind == "worker":
            handle.begins_s = self.room_again_s
        self.handles.append(handle)
        party.at_death.append(lambda: self._bury(handle))
        return handle

    def _party(self, kind: str) -> Party:
        number = self._numbers[kind] = self._numbers.get(kind, -1) + 1
        return Party(f"{kind}-{number}")

    def alive(self, kind: str) -> list[Handle]:
        """Actors of a kind that nobody has killed."""
        found = [each for each in self.handles if each.party.name.startswith(f"{kind}-")]
        return [each for each in found if each.party.alive and not each.believed_dead]

    def call(self, handle: Handle, name: str, arguments: Sequence[Any]) -> Ref:
        """Send a call on its way."""
        call = _Call(name, arguments, Ref(), self.world.party)
        if handle.believed_dead or not (handle.party.alive or handle.returns):
            self._fail_later(call.ref)
            return call.ref
        if name == "ready":
            self._tell_of(handle, call.ref)
            return call.ref
        handle.calls.append(call)
        if handle.party.alive:
            self._send(handle, call)
        return call.ref

    def _send(self, handle: Handle, call: _Call) -> None:
        world, name, caller = self.world, call.name, call.caller
        delay_s = self.network.delay_s(caller, handle.party)
        if delay_s is None and name in self.fallible:
            return
        key = (caller.name, handle.party.name)
        at_s = max(self._arrivals.get(key, 0.0), world.now_s + (delay_s or 0.01), handle.begins_s)
        self._arrivals[key] = at_s

        def perform() -> None:
            self._perform(handle, call)

        if name in self._quick[handle]:
            world.call_at(at_s, handle.party, perform)
        else:
            world.spawn(handle.party, perform, at_s)

    def _tell_of(self, handle: Handle, ref: Ref) -> None:
        """That a process is there, once it is; without a message, so that no dice are thrown."""
        if handle.begins_s <= self.world.now_s:
            ref.run(lambda: None)
        else:
            self.world.call_at(handle.begins_s, self.driver, lambda: ref.run(lambda: None))

    def _perform(self, handle: Handle, call: _Call) -> None:
        name, arguments, ref, caller = call.name, call.arguments, call.ref, call.caller
        outcome: Future[Any] = Future()
        outcome.run(lambda: getattr(handle.instance, name)(*arguments))
        error = outcome.exception()
        if isinstance(error, AssertionError):
            raise error
        if error is not None:
            error = _carried(RayTaskError(name, str(error), error))
        delay_s = self.network.delay_s(handle.party, caller)
        if delay_s is None and name in self.fallible:
            return

        def end() -> None:
            if error is not None:
                ref.fail(error)
            elif not ref.done():
                ref.run(outcome.result)

        self.world.call_at(self.world.now_s + (delay_s or 0.01), caller, end)

    def _fail_later(self, ref: Ref) -> None:
        at_s = self.world.now_s + self.world.random.uniform(0, NOTICE_S)
        self.world.call_at(at_s, self.driver, lambda: ref.fail(RayActorError()))

    def _bury(self, handle: Handle) -> None:
        if handle.returns:
            at_s = self.world.now_s + self.world.random.uniform(0, RETURN_S)
            self.world.call_at(at_s, self.driver, lambda: self._return(handle))
            return
        for call in handle.calls:
            self._fail_later(call.ref)

    def _return(self, handle: Handle) -> None:
        """Start an actor again; calls without an answer are made again, in any order."""
        if not handle.returns:  # killed meanwhile
            self._bury(handle)
            return
        self.num_returns += 1
        handle.party = self._party(handle.party.name.rpartition("-")[0])
        handle.party.at_death.append(lambda: self._bury(handle))
        handle.instance = handle.make(handle.party)
        handle.calls = [each for each in handle.calls if not each.ref.done()]
        again = [each for each in handle.calls if each.caller.alive]
        self.world.random.shuffle(again)
        for call in again:
            self._send(handle, call)

    def declare_dead(self, handle: Handle, zombie_s: float) -> None:
        """Take a process for dead that goes on for so long, cut off from Ray alone."""
        self.world.note(f"{handle.party.name} is taken for dead")
        handle.believed_dead = True
        handle.zombie_until_s = self.world.now_s + zombie_s
        self._bury(handle)
        end_s = handle.zombie_until_s
        self.world.call_at(end_s, self.driver, lambda: self.world.kill(handle.party))

    def get(self, refs: Any, timeout: float | None = None) -> Any:
        """As ray.get."""
        if isinstance(refs, list):
            return [self.get(ref, timeout) for ref in refs]
        if not refs.ended.wait(timeout):
            raise GetTimeoutError
        return refs.result()

    def wait(self, refs: Sequence[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        """As ray.wait for one of them."""
        ready = [ref for ref in refs if ref.done()]
        if not ready:
            waiting = self.world.waiting()
            for ref in refs:
                ref.ended.watch(waiting)
            self.world.pause(timeout)
            ready = [ref for ref in refs if ref.done()]
        return ready[:1], [ref for ref in refs if ref not in ready[:1]]

    def kill(self, handle: Handle) -> None:
        """As ray.kill, for good: it doesn't reach one that is cut off."""
        handle.returns = False
        if self.world.now_s >= handle.zombie_until_s:
            self.world.kill(handle.party)


def _carried(error: RayTaskError) -> Exception:
    """What arrives in another process: errors that can't be pickled are of another kind there."""
    arrived: RayError = RayError.from_bytes(error.to_bytes())
    return arrived.as_instanceof_cause() if isinstance(arrived, RayTaskError) else arrived


class SimulatedRoom:
    """Places of workers, all on one node, or each on a node of its own, as of `WorkerRoom`."""

    def __init__(self, ray: SimulatedRay, num_workers: int) -> None:
        self._ray = ray
        self.comes_and_goes = bool(ray.joins_s)
        self._held = self.wanted = frozenset(range(num_workers))

    def nodes(self) -> dict[int, str]:
        return {worker: self._ray.node_of(worker) for worker in self._held}

    def want(self, workers: Collection[int]) -> None:
        self.wanted = frozenset(workers)
        self._held |= self.wanted

    def release(self, worker: int) -> None:
        assert worker in self._held, "room is given back once"
        self._held -= {worker} if self.comes_and_goes else set()

    def move(self, worker: int) -> None:
        """The next node in this place is another one, which has the same name."""
        self._ray.draining = frozenset(self._ray.draining) - {f"node-{worker}"}
