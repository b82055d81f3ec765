"""A primary and its standby in one process, and a link between them that fails."""

import torch
from log_operations import config_of, facts, first_state_of, own, sent

from ps.operations import Enter, Expect, Fence
from ps.push import Push
from ps.receipts import ForgottenReceipt
from ps.replica import LinkDown
from ps.replicated import ReplicatedService

CHECK_EVERY = 2


def service_of(policy, loaded=True, **others):
    config = config_of(policy)
    service = ReplicatedService(config, allocate=torch.empty, check_every=CHECK_EVERY, **others)
    if loaded:
        service.load(first_state_of(config))
    return service


class NearLink:
    """Calls the standby. Calls are lost on the way, or on the way back, or arrive twice."""

    def __init__(self, standby, dice=None):
        self.standby, self.dice = standby, dice
        self.is_open, self.is_cut = True, False
        self.num_calls = 0

    def _carry(self, call):
        self.num_calls += 1
        if self.is_cut or not self.is_open or self._happens(0.2):
            raise LinkDown
        answer = call()
        if self._happens(0.1):
            answer = call()
        if self._happens(0.2):
            raise LinkDown
        return answer

    def _happens(self, chance):
        return self.dice is not None and self.dice.random() < chance

    def seed(self, order, image):
        self._carry(lambda: self.standby.seed(order, sent(self.standby.config, image)))

    def follow(self, order, operation):
        return self._carry(lambda: self.standby.follow(order, own(operation)))

    def complete(self, order):
        self._carry(lambda: self.standby.complete(order))

    def close(self):
        self.is_open = False


def pair_of(policy, dice=None):
    primary, standby = service_of(policy), service_of(policy, loaded=False)
    link = NearLink(standby, dice)
    primary.attach(1, lambda: link)
    return primary, standby, link


def tell(service, operation):
    """As a caller does; what the service answers."""
    match own(operation):
        case Push() as push:
            try:
                return service.push(push)
            except ForgottenReceipt:
                return "forgotten"
        case Fence(worker, incarnation):
            return service.fence(worker, incarnation)
        case Enter(worker, incarnation, clock):
            return service.enter(worker, incarnation, clock)
        case Expect(workers, number):
            return service.expect(workers, number)


def image_of(service):
    shard = service._shard or service._standby._shard
    return facts(shard.image())


def a_push(worker=0, sequence=0, value=1.0, incarnation=0):
    gradient, delta = torch.full((24,), value), torch.zeros(8)
    return Push(worker, incarnation, sequence, 0, 1, gradient, delta)
