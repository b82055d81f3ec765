"""Writes checkpoints beside the training, and keeps the newest ones."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray.exceptions import RayActorError

from asynception.plan import RunPlan
from asynception.publishing import read_state
from asynception.totals import Totals
from ps.checkpoint_store import Folder, Saved, prune_checkpoints, write_checkpoint
from ps.client import ModelState, ParameterClient, ShardUnavailable
from ps.shard import Outcome

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why something was not done."""

    reason: str
    is_of_the_session: bool = False
    """Whether other servers may do it, from the last checkpoint."""


class Saver:
    """One checkpoint at a time, in a thread of its own. What fails leaves the old ones whole."""

    def __init__(
        self,
        plan: RunPlan,
        folder: Folder,
        client: ParameterClient,
        coordinator: Any,
        start: ModelState,
        before: Totals,
    ) -> None:
        """`start`: what was loaded into the servers; `before`: what was counted up to there."""
        self._plan, self._client, self._coordinator = plan, client, coordinator
        self._start, self._before = start, before
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: Future[Saved] | None = None
        self.spared: Callable[[], Collection[str]] = lambda: ()
        """Names of checkpoints to keep, however old, if a run may go back to them."""
        self.num_unauthenticated = 0
        """Calls to the servers without the run's token, as of the last checkpoint."""
        self.num_uncompensated = 0
        """Pushes that delay compensation had nothing to correct by, in the same way."""
        self.took_s = 0.0
        """Seconds that the last checkpoint took, which has been written."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is under way, or its outcome not yet collected."""
        return self._pending is not None

    def begin(self, wall_s: float, wait_s: float) -> None:
        """Start a checkpoint. `wall_s`: seconds that the run has taken so far; `wait_s`: see
        `ParameterClient.cut`."""
        assert not self.busy
        self._pending = self._thread.submit(self._save, wall_s, wait_s)

    def outcome(self, wait: bool = False) -> Saved | Failure | None:
        """The checkpoint begun last, once, or why it failed; None while it goes on."""
        if self._pending is None or not (wait or self._pending.done()):
            return None
        pending, self._pending = self._pending, None
        try:
            return pending.result()
        except (RayActorError, ShardUnavailable, grpc.RpcError) as error:
            return Failure(f"checkpoint given up: {error}", is_of_the_session=True)
        except OSError as error:
            return Failure(f"checkpoint failed, the earlier ones are whole: {error}")

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _save(self, wall_s: float, wait_s: float) -> Saved:
        start_s = time.monotonic()
        state = read_state(self._plan.config, self._client, "checkpoint", (), wait_s)
        asked = self._coordinator.at_cut.remote(state.last_sequences, state.newest_sequences)
        position, progress = ray.get(asked)
        progress.totals.outcomes = self._outcomes(state, progress.totals.outcomes)
        config = self._plan.config
        extra = {
            "position": position.to_json(),
            "totals": progress.totals.to_json(),
            "wall_s": wall_s,
            "model": config.model.model_dump(mode="json"),
            "num_classes": self._plan.train.num_classes,
        }
        path = write_checkpoint(self._folder, state, self._plan.model.tensors, extra)
        spared = self.spared() if config.training.on_divergence != "warn" else ()
        try:
            prune_checkpoints(self._folder, config.checkpoint.num_to_keep, spared)
        except OSError as error:
            _log.warning("old checkpoints can't be deleted: %s", error)
        self.took_s = time.monotonic() - start_s
        return path

    def _outcomes(self, state: ModelState, reported: Counter[str]) -> Counter[str]:
        """Receipts by the shards' own count: workers that died reported only some of theirs.

        As of the cut for what was applied (a lower bound with three or more servers whose versions
        differ there), as of now for the rest.
        """
        outcomes = Counter[str]()
        shards = self._client.describe()
        self.num_unauthenticated = sum(shard.unauthenticated for shard in shards)
        self.num_uncompensated = sum(shard.num_uncompensated for shard in shards)
        for shard in shards:
            outcomes.update(shard.pushes)
        num_updates = state.clocks.updates - self._start.clocks.updates
        skew = state.version_skew - self._start.version_skew
        applied = num_updates * len(self._client.shards) + skew
        if self._plan.config.reduces:
            outcomes = self._group_outcomes(state, reported, applied)
        outcomes[Outcome.APPLIED.value] = applied
        return self._before.outcomes + outcomes

    def _group_outcomes(
        self, state: ModelState, reported: Counter[str], applied: int
    ) -> Counter[str]:
        """The same of workers that push nothing: by the batches that are in the state."""
        outcomes = reported - self._before.outcomes
        lives = state.last_sequences.values()
        num_batches = sum(sequence + 1 for life in lives for sequence in life.values())
        rest = num_batches * len(self._client.shards) - applied
        accumulated = max(0, rest - outcomes[Outcome.NOT_FINITE.value])
        outcomes[Outcome.ACCUMULATED.value] = accumulated
        return outcomes
