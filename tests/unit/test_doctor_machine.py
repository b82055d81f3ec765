"""What the doctor makes of figures about one machine."""

import os

import numpy as np
import pytest
from doctor_verdicts import gravity
from hypothesis import assume, given
from hypothesis import strategies as st

from asynception.doctor import container, gpu, gpu_probe
from asynception.doctor.apart import MeasureFailed, measure_apart
from asynception.doctor.congestion import judge_congestion, measure_congestion
from asynception.doctor.decoding import HEIGHT, WIDTH, judge_decoding, make_jpeg
from asynception.doctor.gpu import Gpus, _unhidden, judge_gpu, measure_gpu
from asynception.doctor.kernels import judge_kernels, measure_kernels
from asynception.doctor.malloc import judge_malloc
from asynception.doctor.memory import Memory, judge_memory, judge_object_store, read_memory
from asynception.doctor.ports import judge_any_port, judge_ports, measure_ports
from asynception.doctor.processor import judge_cores, judge_load
from asynception.doctor.shared_memory import judge_shared_memory, measure_shared_memory
from asynception.doctor.ulimits import (
    UNLIMITED,
    judge_locked_memory,
    judge_open_files,
    judge_threads,
)
from ps.lanes.gate import listen
from worker.data.decode import open_image

SIZES = st.integers(0, 1 << 45)
COUNTS = st.integers(1, 1 << 20)


@given(SIZES, st.none() | SIZES, SIZES, SIZES, SIZES)
def test_memory_fails_only_if_the_recipe_can_never_fit_and_never_improves_with_need(
    total, limit, available, needed, more
):
    most = total if limit is None else min(total, limit)
    memory = Memory(total, limit, min(available, most))
    verdict = judge_memory(memory, needed)
    assert gravity(verdict) <= gravity(judge_memory(memory, needed + more)) or needed == 0
    assert (verdict.level == "fail") == (needed > most)
    assert gravity(judge_memory(memory, 0)) == 0


def test_memory_of_this_machine_is_what_the_system_says():
    memory = read_memory()
    assert 0 < memory.available <= memory.most <= memory.total
    assert memory.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@given(SIZES, SIZES, SIZES)
def test_object_store_wants_dev_shm(size, free, wanted):
    assert judge_object_store(None, free, wanted).level == "fail"
    assert gravity(judge_object_store(size, free, wanted)) == (free < wanted)


@given(COUNTS, COUNTS, COUNTS)
def test_more_files_are_never_worse(soft, more, needed):
    few, many = (judge_open_files(n, UNLIMITED, needed) for n in (soft, soft + more))
    assert gravity(few) >= gravity(many)
    assert (few.level == "fail") == (soft < needed)
    assert gravity(judge_open_files(UNLIMITED, UNLIMITED, needed)) == 0


@given(COUNTS, st.none() | COUNTS, COUNTS)
def test_threads_are_bounded_by_the_tighter_limit(user, boxed, needed):
    verdict = judge_threads(user, boxed, needed)
    least = user if boxed is None else min(user, boxed)
    assert (verdict.level == "fail") == (least < needed)
    assert gravity(verdict) == gravity(judge_threads(least, None, needed))
    assert gravity(judge_threads(UNLIMITED, None, needed)) == 0


@given(COUNTS)
def test_locked_memory_matters_to_infiniband_alone(soft):
    assert gravity(judge_locked_memory(soft, has_rdma=False)) == 0
    assert gravity(judge_locked_memory(UNLIMITED, has_rdma=True)) == 0
    assert judge_locked_memory(1 << 16, has_rdma=True).level == "warn"


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 2), st.integers(1, 20), st.booleans())
def test_ports_fail_where_servers_find_none(free, more, per_server, num_servers, shared):
    few, many = (
        judge_ports((10000, 10099), n, per_server, num_servers, shared, None)
        for n in (free, free + more)
    )
    assert gravity(few) >= gravity(many)
    needed = per_server if shared else per_server * num_servers
    assert (few.level == "fail") == (free < needed)


def test_ports_that_any_program_may_get_are_warned_of():
    assert judge_ports((40000, 40009), 10, 2, 1, False, (32768, 60999)).level == "warn"
    assert judge_ports((10000, 10009), 10, 2, 1, False, (32768, 60999)).level == "ok"
    assert gravity(judge_any_port((32768, 60999))) == 0


def test_a_port_that_is_listened_at_is_not_free():
    with listen("127.0.0.1", None) as taken:
        port = taken.getsockname()[1]
        assert measure_ports("127.0.0.1", (port, port), 1, 1, False).level == "fail"
    assert measure_ports("127.0.0.1", (port, port), 1, 1, False).level in ("ok", "warn")


@given(st.integers(1, 256), st.integers(1, 256), st.none() | st.floats(0.1, 256), st.floats(0, 512))
def test_cores_fail_only_if_ray_could_not_count_enough(present, allowed, quota, wanted):
    assume(allowed <= present)
    verdict = judge_cores(present, allowed, quota, wanted)
    assert (verdict.level == "fail") == (wanted > present)
    tight = min(allowed, quota or 1e9) < present
    assert verdict.level != "ok" or not tight
    assert gravity(judge_cores(present, present, None, 0.0)) == 0


@given(st.floats(0, 100), st.floats(0.1, 100))
def test_load_warns_of_other_work(load, usable):
    assert gravity(judge_load(load, usable)) == (load > usable)


def test_congestion_control_paces_only_with_bbr():
    assert gravity(judge_congestion("cubic", ["reno", "cubic"])) == 0
    assert "=reno" in judge_congestion("bbr", ["reno", "bbr"]).mend
    assert gravity(judge_congestion("bbr2", ["bbr2"])) == 1
    assert gravity(measure_congestion()) <= 1


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_malloc_is_judged_by_what_it_does(first, again):
    assert gravity(judge_malloc(False, first, again)) == 1
    assert gravity(judge_malloc(True, first, again)) == (again > first / 2)


@pytest.mark.parametrize(
    ("error", "level"), [(0.0, "ok"), (1e-7, "ok"), (0.1, "fail"), (np.nan, "fail")]
)
def test_kernels_must_compute_the_update(error, level):
    verdict = judge_kernels(True, 1.0, error)
    assert gravity(verdict) >= 0
    assert verdict.level == level
    assert judge_kernels(False, 0.0, 0.0).level == "warn"


def test_the_kernel_here_computes_the_update(monkeypatch):
    assert measure_kernels().level == "ok"
    monkeypatch.setattr("asynception.doctor.kernels.apply_rule", lambda *arguments: None)
    assert measure_kernels().level == "fail"


@given(st.floats(0, 1e5), st.floats(0, 1e5))
def test_faster_decoding_is_never_worse(per_s, more):
    assert gravity(judge_decoding(per_s, 1)) >= gravity(judge_decoding(per_s + more, 1))
    assert judge_decoding(0.0, 1).level == "fail"


def test_the_jpeg_is_a_photograph_in_size():
    image = open_image(make_jpeg(), WIDTH * HEIGHT)
    assert (image.width, image.height) == (WIDTH, HEIGHT)
    assert 20_000 < len(make_jpeg()) < 200_000


def test_shared_memory_matters_as_far_as_the_recipe_uses_it(monkeypatch):
    assert measure_shared_memory("shm").level == "ok"
    levels = [judge_shared_memory("none", choice).level for choice in ("shm", "auto", "tcp")]
    assert levels == ["fail", "warn", "ok"]
    monkeypatch.setattr("asynception.doctor.shared_memory.segment_of", lambda vector: None)
    assert measure_shared_memory("shm").level == "fail"


GPUS = st.builds(
    Gpus,
    built_for=st.none() | st.just("13.0"),
    driver=st.none() | st.just("580.65"),
    device_nodes=st.integers(0, 8),
    gpus=st.lists(st.just("H100, 80 GB"), max_size=8),
    error=st.none() | st.just("no kernel image"),
)


@given(GPUS, st.integers(0, 8), st.none() | st.floats(0, 8))
def test_gpus_fail_if_wanted_and_not_usable_and_are_fine_if_there_is_none(seen, wanted, ray_gpus):
    verdict = judge_gpu(seen, wanted, ray_gpus)
    assert gravity(verdict) >= gravity(judge_gpu(seen, 0, ray_gpus))
    if seen.error or len(seen.gpus) < wanted:
        assert verdict.level == "fail"
    assert gravity(judge_gpu(Gpus(None, None, 0, [], None), 0, None)) == 0
    assert judge_gpu(Gpus(None, None, 1, [], None), 0, None).level == "warn"
    assert judge_gpu(Gpus("13.0", "580", 1, ["H100"], None), 1, 0.0).level == "warn"


def test_ray_hides_gpus_only_from_its_own_tasks():
    env = {"CUDA_VISIBLE_DEVICES": "", "HOME": "/"}
    assert _unhidden(env, by_ray=True) == {"HOME": "/"}
    assert _unhidden(env, by_ray=False) == env
    assert _unhidden({"CUDA_VISIBLE_DEVICES": "1"}, by_ray=True) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_the_gpus_of_this_machine_are_looked_at(monkeypatch):
    assert gravity(measure_gpu(0, None)) <= 1
    assert set(gpu_probe.probe()) == {"gpus", "error"}
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(
        gpu, "measure_apart", lambda *arguments: {"gpus": ["A", "A"], "error": None}
    )
    assert "2 x A" in measure_gpu(2, None).found
    assert measure_gpu(3, None).level == "fail"


def test_a_measuring_process_that_dies_or_hangs_is_told(tmp_path):
    script = tmp_path / "script.py"
    for text, said in (
        ("raise SystemExit('broken')", "code 1: broken"),
        ("", "code 0"),
        ("while True: pass", "did not end"),
    ):
        script.write_text(text)
        with pytest.raises(MeasureFailed, match=said):
            measure_apart(script, limit_s=1.0 if "while" in text else 30.0)
    script.write_text("print('noise')\nprint('[1, 2]')")
    assert measure_apart(script, 30.0) == [1, 2]


GROUPS_2 = "0::/pod/container\n"
GROUPS_1 = "4:memory:/pod\n2:cpu,cpuacct:/pod\n1:pids:/elsewhere\n0::/\n"


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_limits_of_version_2_are_the_least_on_the_way_up(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text(GROUPS_2)
    assert container.memory_limit(root, own) is None
    put(root / "pod", memory__max=1000, pids__max=7, cpu__max="150000 100000")
    put(root / "pod" / "container", memory__max="max", memory__current=10, pids__max="max")
    assert container.memory_limit(root, own) == 1000
    assert container.memory_used(root, own) == 10
    assert container.process_limit(root, own) == 7
    assert container.processor_limit(root, own) == 1.5
    put(root / "pod" / "container", memory__max=900, cpu__max="max 100000")
    assert container.memory_limit(root, own) == 900
    assert container.processor_limit(root, own) == 1.5


def test_limits_of_version_1_are_found_also_from_within_the_container(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text(GROUPS_1)
    put(root / "memory", memory__limit_in_bytes=5000, memory__usage_in_bytes=12)
    put(root / "memory" / "pod", memory__limit_in_bytes=9223372036854771712)
    put(root / "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    put(root / "pids", pids__max="max")
    assert container.memory_limit(root, own) == 5000
    assert container.memory_used(root, own) == 12
    assert container.processor_limit(root, own) is None
    assert container.process_limit(root, own) is None
    put(root / "cpu", cpu__cfs_quota_us=250000)
    assert container.processor_limit(root, own) == 2.5
