"""Whether a node can open the training set and decode what is in it."""

import time

from asynception.building import open_train
from asynception.config import TrainConfig
from asynception.doctor.finding import Verdict, fail, ok
from worker.data.decode import CorruptImage, open_image
from worker.data.source import LostShard

LIMIT_S = 60.0

IF_LATE = (
    "look at the disk or network behind data.train; sets without a manifest are read whole to begin"
    " with: asynception data index makes one"
)


def measure_dataset(config: TrainConfig) -> Verdict:
    """Reads the first sample of the first shard that has one."""
    started_s = time.perf_counter()
    source = open_train(config)
    shard = next(index for index, size in enumerate(source.shard_sizes) if size)
    opened_s = time.perf_counter() - started_s
    problem, size = None, (0, 0)
    try:
        image = open_image(source.read(shard, 0).image, config.data.max_pixels)
        image.rgb()
        size = (image.width, image.height)
    except (LostShard, CorruptImage) as error:
        problem = str(error)
    return judge_dataset(config.data.train, sum(source.shard_sizes), opened_s, size, problem)


def judge_dataset(
    path: str, num_samples: int, opened_s: float, size: tuple[int, int], problem: str | None
) -> Verdict:
    """size: width and height of the first image. problem: why there is none."""
    found = f"{num_samples:,} images, opened in {opened_s:.1f} s"
    if problem is not None:
        return fail(
            f"data.train = {path}: {found}, of which the first can't be had: {problem}",
            "asynception data check finds all such: get those files anew",
        )
    return ok(f"{found}; the first has {size[0]} x {size[1]} pixels")
