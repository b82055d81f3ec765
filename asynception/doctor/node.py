"""The checks of one node, in the order in which they are carried out."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from asynception.doctor import dataset, gpu, malloc
from asynception.doctor.congestion import measure_congestion
from asynception.doctor.decoding import measure_decoding
from asynception.doctor.finding import Finding, Verdict
from asynception.doctor.kernels import measure_kernels
from asynception.doctor.memory import measure_memory, measure_object_store
from asynception.doctor.needs import THREADS_PER_PROCESS, Needs
from asynception.doctor.ports import measure_ports
from asynception.doctor.processor import measure_cores, measure_load
from asynception.doctor.shared_memory import measure_shared_memory
from asynception.doctor.strangers import measure_strangers
from asynception.doctor.timed import HERE, Check, carry_out
from asynception.doctor.ulimits import (
    THREADS_WITHOUT_RECIPE,
    measure_locked_memory,
    measure_open_files,
    measure_threads,
)
from asynception.doctor.versions import measure_versions
from ps.lanes.lane import LaneSettings


@dataclass(frozen=True)
class Place:
    """A node of a cluster, or the machine that a run would have to itself."""

    host: str = "127.0.0.1"
    """The address that servers would bind to."""
    name: str = HERE
    num_nodes: int = 1
    in_cluster: bool = False
    ray_gpus: float | None = None
    """GPUs that the node gave to Ray; None where there is no Ray yet."""

    @property
    def alone(self) -> bool:
        """Whether all of a run's processes would be here."""
        return self.num_nodes == 1


def node_checks(needs: Needs | None, place: Place) -> list[Check]:
    """Without a recipe, only what every run needs."""
    cpus, gpus = _reserved(needs, place)
    num_workers = needs.config.scaling.max_workers if needs else 0
    choice = needs.config.lanes.choice if needs else "auto"
    checks = [
        Check("versions", measure_versions),
        Check("own packages", measure_strangers),
        Check("cores", partial(measure_cores, cpus)),
        Check("load", measure_load),
        Check("update kernels", measure_kernels, limit_s=60.0),
        Check("GPU", partial(gpu.measure_gpu, gpus, place.ray_gpus), limit_s=gpu.LIMIT_S + 5),
        Check("memory", partial(measure_memory, _memory(needs, place))),
        Check("shared memory", partial(measure_shared_memory, choice)),
        Check("/dev/shm", partial(measure_object_store, place.in_cluster)),
        Check("open files", partial(measure_open_files, num_workers)),
        Check("threads", partial(measure_threads, _threads(needs, place))),
        Check("locked memory", measure_locked_memory),
        Check("ports", partial(_ports, needs, place)),
        Check("congestion control", measure_congestion),
        Check("malloc", malloc.measure_malloc, limit_s=malloc.LIMIT_S + 5),
        Check("decoding", measure_decoding),
    ]
    if needs is not None:
        read = partial(dataset.measure_dataset, needs.config)
        checks.append(Check("training set", read, dataset.LIMIT_S, dataset.IF_LATE))
    return checks


def examine(needs: Needs | None, place: Place) -> Iterator[Finding]:
    """One finding after another."""
    for check in node_checks(needs, place):
        yield carry_out(check, place.name)


def time_limit_s(needs: Needs | None, place: Place) -> float:
    """What `examine` takes at most."""
    return sum(check.limit_s for check in node_checks(needs, place))


def _reserved(needs: Needs | None, place: Place) -> tuple[float, int]:
    """CPUs and GPUs that must be here; what a cluster must have in all is another check."""
    if needs is None or not place.alone:
        return 0.0, 0
    return needs.resources.get("CPU", 0.0), int(needs.resources.get("GPU", 0.0))


def _memory(needs: Needs | None, place: Place) -> int:
    if needs is None:
        return 0
    return needs.all_num_bytes if place.alone else needs.largest_num_bytes


def _threads(needs: Needs | None, place: Place) -> int:
    """At most: of a cluster's nodes, one may get all of a run's processes."""
    return THREADS_PER_PROCESS * needs.num_processes if needs else THREADS_WITHOUT_RECIPE


def _ports(needs: Needs | None, place: Place) -> Verdict:
    lanes = needs.config.lanes if needs else LaneSettings()
    per_server = 1 if lanes.choice == "grpc" else 2
    num_servers = len(needs.server_num_bytes) if needs else 1
    return measure_ports(
        place.host, lanes.port_range, per_server, num_servers, shared=not place.alone
    )
