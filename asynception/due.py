"""When a run's evaluations and checkpoints are due."""

from collections.abc import Callable

from asynception.plan import RunPlan


class Due:
    """Tells when evaluations and checkpoints are due, but for those of the run's very end.

    Once all samples are in, a run is evaluated and saved however long ago that was done last; a
    state that is the same as this one is not to be worked on twice.
    """

    def __init__(self, plan: RunPlan, consumed: int, clock: Callable[[], float]) -> None:
        checkpoint = plan.config.checkpoint
        self._clock, self._total = clock, plan.total_samples
        self._eval_every = plan.samples_of(plan.config.evaluation.every_epochs)
        every_epochs = checkpoint.every_epochs
        self._save_every = plan.samples_of(every_epochs) if every_epochs else None
        self._save_every_s = checkpoint.every_s
        self._evaluated = self._saved = consumed
        self._saved_s = clock()

    def evaluation(self, consumed: int) -> bool:
        """Whether one is due; if so, it is taken as begun."""
        due = consumed // self._eval_every > self._evaluated // self._eval_every
        due = due and consumed < self._total
        if due:
            self._evaluated = consumed
        return due

    def checkpoint(self, consumed: int) -> bool:
        """Whether one is due; if so, it is taken as begun."""
        every, every_s = self._save_every, self._save_every_s
        due = every is not None and consumed // every > self._saved // every
        due = due or (every_s is not None and self._clock() - self._saved_s >= every_s)
        due = due and consumed < self._total
        if due:
            self._saved, self._saved_s = consumed, self._clock()
        return due
