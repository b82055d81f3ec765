"""What all-reduce needs besides processes: a rank's own state, and its way to the servers."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, RayTaskError
from torch import Tensor, nn

from asynception.coordinator import Coordinator
from asynception.ledger import BatchLeases, Ledger
from asynception.lost_ranks import precedence
from asynception.plan import plan_model
from asynception.process_group import Rendezvous, interface_of, open_store
from asynception.publishing import Publisher, read_published
from asynception.recipe import validate
from asynception.totals import Totals
from model.errors import InputError
from model.flat import FlatModule
from ps.client import ModelState
from ps.consistency import Async
from ps.layout import plan_layout
from ps.push import Push
from ps.retry import ShardUnavailable
from ps.rules import SGD, AdamW, Ema, RMSprop, Rule
from ps.schedule import Clocks, Exponential, Horizon
from ps.shard import Shard, ShardConfig, initial_state
from worker.allreduce import _LastGradient
from worker.gradient import GradientComputer
from worker.objective import create_objective
from worker.replica import Replica

HORIZON = Horizon(epoch_samples=20, num_workers=3)
SCHEDULE = Exponential(lr=0.1, decay=0.5, every=1.0, warmup=0.5)
EMA = Ema(decay=0.9, warmup=True)
RULES = (RMSprop(weight_decay=0.1), AdamW(weight_decay=0.1))


class Ticking:
    """A clock that sleep alone moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def flat_module() -> FlatModule:
    torch.manual_seed(0)
    return FlatModule(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)))


def shard_of(flat: FlatModule, rule: Rule) -> Shard:
    (ranges,) = plan_layout(flat.parameter_segments, flat.statistic_segments, 1).shards
    config = ShardConfig(ranges, rule, SCHEDULE, HORIZON, EMA, Async())
    return Shard(config, initial_state(rule, flat.parameters, flat.statistics))


def replica_of(rule: Rule, ema: Ema | None) -> Replica:
    return Replica(flat_module(), rule, SCHEDULE, HORIZON, ema)


@settings(deadline=None, max_examples=25)
@given(
    rule=st.sampled_from(RULES), counts=st.lists(st.integers(1, 9), max_size=6), half=st.booleans()
)
def test_a_replica_does_what_a_shard_does_bit_by_bit(rule, counts, half):
    """Also one that goes on from another's state, and one without an EMA."""
    flat = flat_module()
    shard, one, bare = shard_of(flat, rule), replica_of(rule, EMA), replica_of(rule, None)
    generator = torch.Generator().manual_seed(7)
    for step, count in enumerate(counts):
        gradient = torch.randn(flat.gradients.shape, generator=generator)
        delta = torch.randn(flat.statistics.shape, generator=generator)
        for replica in (one, bare):
            replica.flat.gradients.copy_(gradient)
            replica.apply(delta, count)
        shard.push(Push(0, 0, step, shard.version, count, gradient, delta))
        if half and step == len(counts) // 2:
            state = one.state({})
            one = replica_of(rule, EMA)
            one.load(state)
    expected, state = shard.capture(), one.state({0: {0: 3}})
    assert (state.clocks, state.last_sequences) == (expected.clocks, {0: {0: 3}})
    assert list(state.vectors) == list(expected.vectors)
    for name, vector in expected.vectors.items():
        assert torch.equal(state.vectors[name], vector), name
        if not name.startswith("ema"):
            assert torch.equal(bare._vectors()[name], vector), name


def test_a_state_is_a_copy_and_statistics_come_back():
    replica = replica_of(SGD(), EMA)
    state = replica.state({})
    before = {name: vector.clone() for name, vector in state.vectors.items()}
    replica.flat.statistics.add_(1)
    replica.restore_statistics()
    assert torch.equal(replica.flat.statistics, before["statistics"])
    replica.flat.gradients.fill_(1.0)
    replica.clocks = Clocks(1, 10)
    replica.apply(torch.ones_like(replica.flat.statistics), 4)
    assert replica.clocks == Clocks(2, 14)
    assert all(torch.equal(state.vectors[name], vector) for name, vector in before.items())


def test_a_slow_rank_holds_its_last_gradient_up():
    flat = flat_module()
    computer = GradientComputer(flat, create_objective("softmax", 5), None)
    clock = Ticking()
    flat.module.register_forward_hook(lambda *_: clock.sleep(2.0))
    last = _LastGradient(computer, clock, 3.0, clock.sleep)

    def backward() -> None:
        computer.begin()
        flat.module(torch.ones(2, 3, 3, 6)).sum().backward()
        clock.sleep(0.5)  # what comes after the last gradient

    last.start()
    backward()
    assert last.computed_s == 6.0
    assert clock() == 6.5
    backward()  # not started: a pass without images is not slow
    assert clock() == 9.0


LAYOUT = plan_layout(flat_module().parameter_segments, flat_module().statistic_segments, 2)


class FakeClient:
    """Answers of `read`, in turn; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)
        self.calls: list[str] = []
        self.loaded: list[ModelState] = []

    def load(self, state: ModelState) -> None:
        self.loaded.append(state)

    def cut(self, name: str, vectors: Sequence[str], wait_s: float) -> None:
        assert wait_s == 0
        self.calls.append("cut")

    def read(self, name: str) -> ModelState:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def release(self, name: str) -> None:
        self.calls.append("release")


def state_of(samples: int, skew: int = 0, vectors: Mapping[str, Tensor] | None = None) -> Any:
    return ModelState(Clocks(samples, samples), vectors or {}, {1: {0: 5}}, skew)


def refused(code: grpc.StatusCode) -> Exception:
    class Error(grpc.RpcError, grpc.Call):
        def code(self) -> grpc.StatusCode:
            return code

    Error.__abstractmethods__ = frozenset()
    return Error()


def test_a_state_is_read_again_until_all_shards_have_the_same():
    gone = refused(grpc.StatusCode.NOT_FOUND)
    client: Any = FakeClient(state_of(1, skew=4), gone, state_of(2))
    clock = Ticking()
    assert read_published(client, "name", (), clock, clock.sleep) == state_of(2)
    assert client.calls == ["cut", "release", "cut", "cut", "release"]


def test_a_state_that_never_settles_is_given_up():
    client: Any = FakeClient(*[state_of(1, skew=1)] * 10000)
    clock = Ticking()
    with pytest.raises(ShardUnavailable):
        read_published(client, "name", (), clock, clock.sleep)


def test_other_refusals_pass_through():
    client: Any = FakeClient(refused(grpc.StatusCode.UNAUTHENTICATED))
    with pytest.raises(grpc.RpcError):
        read_published(client, "name")


def test_publishing_is_due_at_marks_and_after_some_time():
    clock, told = Ticking(), []
    client: Any = FakeClient()
    publisher = Publisher(client, [10, 25], 5.0, told.append, 0, clock)
    assert not publisher.is_due(9)
    assert publisher.is_due(11)
    publisher.begin(state_of(11))
    pending = publisher._pending
    assert not publisher.is_due(11)
    assert pending is not None
    pending.result()
    assert not publisher.is_due(19)
    assert publisher.is_due(25)
    clock.sleep(5.0)
    assert publisher.is_due(12)
    publisher.finish(state_of(19))
    assert told == [11, 19]
    assert [state.clocks.samples for state in client.loaded] == [11, 19]


def test_what_went_wrong_with_publishing_comes_up_in_the_loop():
    client: Any = FakeClient()
    client.load = lambda state: (_ for _ in ()).throw(ShardUnavailable("gone"))
    publisher = Publisher(client, [10], 5.0, lambda samples: None, 0)
    publisher.begin(state_of(11))
    publisher._thread.shutdown()
    with pytest.raises(ShardUnavailable):
        publisher.is_due(11)


def test_the_group_meets_at_its_own_address_alone():
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(OSError, match=r"192\.0\.2\.77"):
        interface_of("192.0.2.77")
    store, address = open_store("127.0.0.1", 2, 5.0)
    port = int(address.rpartition(":")[2])
    with open("/proc/net/tcp") as table:
        bound = {line.split()[1] for line in table if line.split()[1].endswith(f":{port:04X}")}
    assert bound == {f"0100007F:{port:04X}"}
    store.set("key", "value")
    assert Rendezvous(address, 2, 5.0, use_gpu=True).backend == "cpu:gloo,cuda:nccl"


def task_error(cause: Exception) -> Any:
    return RayTaskError("train", "", cause).as_instanceof_cause()


def test_of_several_errors_the_one_that_tells_most_is_told():
    lost = task_error(RuntimeError("Connection closed by peer"))
    errors = [lost, task_error(KeyError("x")), ActorDiedError(), task_error(InputError("mend"))]
    assert sorted(errors, key=precedence) == errors[::-1]


def config_with(mode: str, **scaling: Any) -> Any:
    return validate(
        {
            "model": {"name": "xception", "width": 0.05, "middle_blocks": 0},
            "data": {"train": "a", "val": "b", "image_size": 32},
            "training": {"samples": 10},
            "consistency": {"mode": mode},
            "scaling": {"num_workers": 2, **scaling},
        }
    )


def test_the_mode_has_the_workers_optimizer_and_more_memory():
    config = config_with("allreduce")
    assert (config.reduces, config.trains_locally) == (True, False)
    assert config.server_rule == config.optimizer
    assert not config.consistency.admits(0), "a stray push changes nothing"
    layout = plan_model(config, 5).layout
    more = 7 * layout.num_parameters + 4 * layout.num_statistics  # one slot
    usual = plan_model(config_with("async"), 5).worker_num_bytes()
    assert plan_model(config, 5).worker_num_bytes() == usual + 4 * more


def test_the_coordinator_hears_of_idle_workers_and_of_states():
    clock = Ticking()
    coordinator = Coordinator(Ledger(8, 2, BatchLeases(2, 1)), Totals(), clock)
    coordinator.enlist(0)
    clock.sleep(9.0)
    coordinator.report(0, 0, [])
    coordinator.published(6)
    progress = coordinator.progress()
    assert (progress.silent_s, progress.num_published) == ({0: 0.0}, 6)
    assert progress.totals.pushes == 0


def test_bytes_of_a_ring_are_counted():
    from asynception.compare.traffic import num_bytes_moved

    run: Any = SimpleNamespace(result={"receipts": {"applied": 6, "accumulated": 6}})
    moved = []
    for mode in ("allreduce", "sync"):
        run.config = config_with(mode, num_servers=3)
        moved.append(num_bytes_moved(run, 100))
    assert moved[0] == moved[1] / 2 > 0, "(k - 1) / k of there and back, with k = 2"
