"""The part of Ray that a session uses, in virtual time: actors, references, deaths."""

from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from asynception.simulate.network import Network
from asynception.simulate.waiting import Future
from asynception.simulate.world import Party, World

NOTICE_S = 0.5
"""Within so long Ray notices that a process is dead."""


class Ref(Future[Any]):
    """What a call to an actor will return."""

    def fail(self, error: Exception) -> None:
        """End with an error, unless it has ended."""
        if not self.ended.is_set:
            self._error = error
            self.ended.set()


class Handle:
    """An actor: calls to it are `handle.method.remote(...)`."""

    def __init__(self, ray: "SimulatedRay", party: Party, instance: Any) -> None:
        self.ray, self.party, self.instance = ray, party, instance
        self.believed_dead = False
        self.zombie_until_s = 0.0
        self.refs: list[Ref] = []

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
    ) -> None:
        self._ray, self._kind, self._make, self._quick = ray, kind, make, quick

    def options(self, **_: Any) -> "ActorClass":
        return self

    def remote(self, *arguments: Any) -> Handle:
        return self._ray.start(self._kind, self._make, arguments, self._quick)


class SimulatedRay:
    """In place of the module. Calls from one process to one actor arrive in their order."""

    def __init__(self, world: World, network: Network, driver: Party) -> None:
        self.world, self.network, self.driver = world, network, driver
        self.handles: list[Handle] = []
        self.fallible: tuple[str, ...] = ("lease", "report")
        """Methods whose calls may be lost."""
        self._arrivals: dict[tuple[str, str], float] = {}
        self._numbers: dict[str, int] = {}
        self._quick: dict[Handle, Sequence[str]] = {}

    def start(
        self,
        kind: str,
        make: Callable[..., Any],
        arguments: Sequence[Any],
        quick: Sequence[str],
    ) -> Handle:
        """A new actor in a process of its own."""
        number = self._numbers[kind] = self._numbers.get(kind, -1) + 1
        party = Party(f"{kind}-{number}")
        handle = Handle(self, party, make(party, *arguments))
        self._quick[handle] = quick
        self.handles.append(handle)
        party.at_death.append(lambda: self._bury(handle))
        return handle

    def alive(self, kind: str) -> list[Handle]:
        """Actors of a kind that nobody has killed."""
        found = [each for each in self.handles if each.party.name.startswith(f"{kind}-")]
        return [each for each in found if each.party.alive and not each.believed_dead]

    def call(self, handle: Handle, name: str, arguments: Sequence[Any]) -> Ref:
        """Send a call on its way."""
        world, caller, ref = self.world, self.world.party, Ref()
        if handle.believed_dead or not handle.party.alive:
            self._fail_later(ref)
            return ref
        handle.refs.append(ref)
        delay_s = self.network.delay_s(caller, handle.party)
        if delay_s is None and name in self.fallible:
            return ref
        key = (caller.name, handle.party.name)
        at_s = max(self._arrivals.get(key, 0.0), world.now_s + (delay_s or 0.01))
        self._arrivals[key] = at_s

        def perform() -> None:
            self._perform(handle, name, arguments, ref, caller)

        if name in self._quick[handle]:
            world.call_at(at_s, handle.party, perform)
        else:
            world.spawn(handle.party, perform, at_s)
        return ref

    def _perform(
        self, handle: Handle, name: str, arguments: Sequence[Any], ref: Ref, caller: Party
    ) -> None:
        outcome: Future[Any] = Future()
        outcome.run(lambda: getattr(handle.instance, name)(*arguments))
        error = outcome.exception()
        if isinstance(error, AssertionError):
            raise error
        if error is not None:
            error = RayTaskError(name, str(error), error).as_instanceof_cause()
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
        for ref in handle.refs:
            self._fail_later(ref)

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
        """As ray.kill: it doesn't reach one that is cut off."""
        if self.world.now_s >= handle.zombie_until_s:
            self.world.kill(handle.party)
