"""What can go wrong while a run goes on, and what that means for it."""


class TrainingFailed(RuntimeError):
    """The run can't go on; its last good checkpoint is whole."""


class Diverged(TrainingFailed):
    """The loss rose, or too many gradients held NaN or Inf."""

    def __init__(self, reason: str, checkpoint: str | None) -> None:
        """checkpoint: name of the last one from before that."""
        super().__init__(reason, checkpoint)  # what another process makes it of
        self.reason, self.checkpoint = reason, checkpoint

    def __str__(self) -> str:
        known = f"is {self.checkpoint}" if self.checkpoint else "can't be told"
        return f"diverged: {self.reason} (the last good checkpoint {known})"


class Stopped(Exception):
    """The run was told to stop, and has; its last checkpoint holds what it had done."""


class SessionLost(Exception):
    """A server or the coordinator is gone: the run must start again from a checkpoint."""

    what = "a server was lost"


class GroupLost(SessionLost):
    """A worker is gone without which the others can't go on: all start again together."""

    what = "the group of workers was lost"


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line it says; Ray's go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return f"{kind}: {lines[0]}" if lines else kind
