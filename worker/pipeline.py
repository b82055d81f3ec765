"""When a worker pulls, computes and pushes: in turn, or side by side."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from model.settings import Settings
from ps.client import ParameterClient
from ps.lanes.lane import LaneName
from ps.shard import Receipt
from ps.snapshot import Pulled
from worker.early import ShardsReady
from worker.exchange import Exchange, Outgoing, ended
from worker.gradient import GradientComputer
from worker.holdings import Holdings, PulledVectors
from worker.host_vectors import HostVectors, arrived
from worker.rounds import Rounds


class PipelineSettings(Settings):
    """Unless set otherwise, a worker pulls, computes and pushes in turn (Chen et al. 2016,
    Algorithm 1)."""

    overlap: bool = False
    """Push the last gradient and pull the next parameters while a gradient is computed. Gradients
    then come from parameters without the worker's own last push: their staleness grows by one of
    each worker's pushes. For workers that don't wait for one another."""
    early_push: bool = False
    """Push each shard its part of a gradient as soon as backpropagation has finished it, the last
    layers' first: for several servers. Without training.clip_norm, which needs the whole gradient,
    and for workers that don't wait for one another: a shard then doesn't know whether another's
    part is finite."""


class Pipeline:
    """The pulls and pushes of one worker.

    For each push `enter`, `open`, the gradient's computation, `hand_over`, and later `settle`.
    waits: keep to `Rounds`: pull only what is newer than what the last push was for.
    """

    def __init__(
        self,
        worker: int,
        incarnation: int,
        computer: GradientComputer,
        client: ParameterClient,
        settings: PipelineSettings,
        waits: bool,
        pulled: PulledVectors,
        beat: Callable[[], object],
    ) -> None:
        """pulled: what was pulled last, as it was when work on it began. beat: called now and then
        while this waits for shards."""
        assert not (waits and (settings.overlap or settings.early_push))
        self._overlap, self._beat = settings.overlap, beat
        self._rounds = Rounds(len(client.layout.shards)) if waits else None
        self._vectors = HostVectors(computer, overlap=settings.overlap)
        self._exchange = Exchange(worker, incarnation, client, self._vectors)
        self.holdings = Holdings(self._vectors, self._exchange, pulled)
        self._early = ShardsReady(computer.flat, client.layout) if settings.early_push else None
        self._pulling: list[Future[Pulled]] | None = None
        self._pulled: Sequence[Pulled] = ()

    def enter(self) -> Sequence[int]:
        """Put pulled parameters into the model; returns the versions that a push is to name.

        By shard. Raises ShardUnavailable.
        """
        at_least = self._rounds.at_least if self._rounds else None
        pulling = self._pulling or self._exchange.start_pull(at_least, arrived)
        self._pulled = ended(pulling, self._beat)
        self.holdings.end()
        copied = self._vectors.to_device()
        # Behind the last push in each shard's chain of calls, so its update can be seen.
        self._pulling = self._exchange.start_pull(None, copied) if self._overlap else None
        self._vectors.turn()
        versions = [each.version for each in self._pulled]
        return self._rounds.begin(versions) if self._rounds else versions

    def open(self, sequence: int, versions: Sequence[int], num_samples: int) -> Outgoing:
        """The push of the gradient that is to be computed from these versions.

        num_samples: of its first batch; with `early_push` it has no other.
        """
        self.holdings.begin(self._pulled)
        outgoing = Outgoing(sequence, versions, num_samples, self._vectors.mailbox)
        if self._early is not None:
            self._early.arm(lambda shard: self._exchange.start_push(outgoing, shard))
        return outgoing

    def hand_over(self, outgoing: Outgoing) -> None:
        """Push what is left of a gradient that is complete. Wait with `settle`."""
        if self._early is not None:
            self._early.disarm()
        self._exchange.start_rest(outgoing)

    def settle(self, outgoing: Outgoing) -> Sequence[Receipt]:
        """The receipts of a push, once all are there. Raises ShardUnavailable."""
        receipts = outgoing.receipts(self._beat)
        if self._rounds:
            self._rounds.end(receipts)
        return receipts

    @property
    def lanes(self) -> Sequence[LaneName]:
        """The lane that each shard is reached by now."""
        return self._exchange.lanes

    def close(self) -> None:
        """Nothing more will be pulled or pushed."""
        self._exchange.close()
