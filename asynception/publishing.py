"""States that a group of workers sends to the servers, and their way back out of there."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import grpc

from asynception.config import TrainConfig
from ps.client import ModelState, ParameterClient
from ps.retry import ShardUnavailable, code_of

READ_TIMEOUT_S = 60.0
"""For a state that is the same at all servers: longer than it takes to publish one."""

RETRY_PAUSE_S = 0.05


def read_published(
    client: ParameterClient,
    name: str,
    vectors: Sequence[str] = (),
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> ModelState:
    """The state that was published last, never a mix of two; only the named vectors, if given.

    name: of the cut that this takes. Raises ShardUnavailable.
    """
    deadline_s = clock() + READ_TIMEOUT_S
    while clock() < deadline_s:
        try:
            client.cut(name, vectors, wait_s=0)
            state = client.read(name)
        except grpc.RpcError as error:
            # A state that arrives between the two takes the cut away.
            if code_of(error) is not grpc.StatusCode.NOT_FOUND:
                raise
        else:
            client.release(name)
            if state.version_skew == 0:
                return state
        sleep(RETRY_PAUSE_S)
    raise ShardUnavailable(f"no whole state was published within {READ_TIMEOUT_S:.0f} s")


class Publisher:
    """Sends states to the servers beside the training, one at a time.

    A state is due `every_s` seconds after the last one was begun, and whenever the run's samples
    pass a multiple of one of `marks`; while one is under way, the next one waits.
    """

    def __init__(
        self,
        client: ParameterClient,
        marks: Sequence[int],
        every_s: float,
        published: Callable[[int], None],
        start_samples: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """published: told the samples of each state that has arrived, in a thread of its own."""
        self._client, self._marks, self._every_s = client, marks, every_s
        self._published, self._clock = published, clock
        self._samples, self._begun_s = start_samples, clock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._pending: Future[None] | None = None

    def is_due(self, samples: int) -> bool:
        """Whether to publish a state with so many samples now; it is then to be begun.

        Raises what went wrong with the last one.
        """
        if self._pending is not None and self._pending.done():
            pending, self._pending = self._pending, None
            pending.result()
        passed = any(samples // mark > self._samples // mark for mark in self._marks)
        due = passed or self._clock() - self._begun_s >= self._every_s
        return due and self._pending is None

    def begin(self, state: ModelState) -> None:
        """Send a state, which must stay as it is; none may be under way."""
        assert self._pending is None
        self._samples, self._begun_s = state.clocks.samples, self._clock()
        self._pending = self._thread.submit(self._send, state)

    def finish(self, state: ModelState) -> None:
        """Send the last state, after the one under way; returns once it has arrived."""
        if self._pending is not None:
            self._pending.result()
        self._send(state)
        self._thread.shutdown()

    def _send(self, state: ModelState) -> None:
        self._client.load(state)
        self._published(state.clocks.samples)


def read_state(
    config: TrainConfig,
    client: ParameterClient,
    name: str,
    vectors: Sequence[str],
    wait_s: float,
) -> ModelState:
    """Cut the servers' state (see `ParameterClient.cut`) and fetch that; raises ShardUnavailable.

    A state that workers published is taken as it stands.
    """
    if config.reduces:
        return read_published(client, name, vectors)
    client.cut(name, vectors, wait_s)
    state = client.read(name)
    client.release(name)
    return state
