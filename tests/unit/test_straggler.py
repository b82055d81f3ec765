"""A worker that is slow on purpose does the same, later."""

import pytest
import torch
from test_gradient import OBJECTIVE, batch_of, tiny_model

from model.flat import FlatModule
from worker.gradient import GradientComputer
from worker.straggler import Straggler


class Time:
    """A clock that computing moves by 3 s a reading, and sleeping by what is slept."""

    def __init__(self):
        self.now_s = 0.0
        self.slept_s = []

    def clock(self):
        self.now_s += 3.0
        return self.now_s

    def sleep(self, seconds):
        self.slept_s.append(seconds)


@pytest.mark.parametrize("factor", [1.0, 20.0])
def test_each_gradient_is_the_same_and_takes_factor_times_as_long(factor):
    plain = GradientComputer(FlatModule(tiny_model()), OBJECTIVE, clip_norm=1.0)
    time = Time()
    slow = Straggler(
        FlatModule(tiny_model()),
        OBJECTIVE,
        1.0,
        factor=factor,
        clock=time.clock,
        sleep=time.sleep,
    )
    for seed in range(2):
        batch = batch_of(4, seed)
        assert slow.compute(batch) == plain.compute(batch)
        torch.testing.assert_close(slow.flat.gradients, plain.flat.gradients, rtol=0, atol=0)
        torch.testing.assert_close(slow.statistics_delta, plain.statistics_delta, rtol=0, atol=0)
    # 3 s of computing, and the rest asleep.
    assert time.slept_s == [3.0 * (factor - 1)] * 2
