"""How many workers and servers a session is to have, as of the last order."""

from collections.abc import Callable
from dataclasses import replace

from asynception.orders import Order
from asynception.plan import RunPlan
from asynception.staff import Staff
from model.errors import InputError
from ps.layout import plan_layout

Lacks = Callable[[RunPlan], str | None]
"""What the cluster lacks for another plan in the place of the present one, in words."""


class Resized(Exception):
    """The run is to go on with other servers, from the checkpoint that was just written."""

    def __init__(self, num_servers: int) -> None:
        super().__init__(f"the run is to have {num_servers} servers")
        self.num_servers = num_servers


class Sizes:
    """Takes orders for a session. Workers come and go; for other servers it has to end."""

    def __init__(self, plan: RunPlan, staff: Staff, lacks: Lacks) -> None:
        self._plan, self._staff, self._lacks = plan, staff, lacks
        self.num_servers: int | None = None
        """That are ordered, and not there yet."""
        self.is_saving = False
        """Whether the checkpoint is being written from which these are to begin."""

    @property
    def is_complete(self) -> bool:
        """See `Scalable`: of servers there is nothing to see before the session ends."""
        return self.num_servers is not None or self._staff.is_complete

    @property
    def pending(self) -> str:
        """See `Scalable`."""
        if self.num_servers is None:
            return self._staff.pending
        return (
            f"{self._plan.config.scaling.num_servers} servers, to be {self.num_servers}: a "
            "checkpoint is written, and then all begin anew from it"
        )

    def scale(self, order: Order) -> None:
        """See `Scalable`."""
        if order.num_servers is not None:
            check_servers(self._plan, order.num_servers, self._lacks)
            self.num_servers = order.num_servers
        elif order.num_workers is not None:
            self._staff.scale(order.num_workers)

    def forget(self) -> None:
        """The servers stay as they are."""
        self.num_servers, self.is_saving = None, False


def check_servers(plan: RunPlan, num_servers: int, lacks: Lacks) -> None:
    """Raises InputError for a number of servers that a live run can't change to."""
    given, before = f"--num-servers {num_servers}", plan.config.scaling.num_servers
    if num_servers == before:
        raise InputError(f"{given}: the run has so many")
    lack = lacks(resized(plan, num_servers))
    if lack:
        raise InputError(f"{given}: {lack}; the run goes on with {before}")


def resized(plan: RunPlan, num_servers: int) -> RunPlan:
    """The plan with another number of servers. Raises InputError if the model can't be cut so."""
    model = plan.model
    scaling = model.config.scaling.model_copy(update={"num_servers": num_servers})
    layout = plan_layout(model.tensors.parameters, model.tensors.statistics, num_servers)
    config = model.config.model_copy(update={"scaling": scaling})
    return replace(plan, model=replace(model, config=config, layout=layout))
