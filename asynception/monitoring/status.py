"""What status.json says of a run. Times of day are seconds since 1970."""

import math
from typing import Any

from asynception.config import TrainConfig
from asynception.diagnosis import ShardTime, WorkerTime
from asynception.monitoring.measured import Span
from asynception.totals import PHASES, Progress, histograms, staleness_summary
from ps.messages import ReplicaStatus, ShardStatus


def progress_json(span: Span, config: TrainConfig, total_samples: int) -> dict[str, Any]:
    """How far the run is, how fast, and by which workers and shards, over `span`."""
    progress, totals = span.later.progress, span.totals
    rate = span.num_samples / span.seconds if span.seconds > 0 else math.nan
    left = max(0, total_samples - progress.num_consumed)
    return {
        "time_s": span.later.time_s,
        "window_s": span.seconds,
        "samples": progress.num_consumed,
        "total_samples": total_samples,
        "samples_per_s": rate,
        "left_s": left / rate if rate > 0 else None,
        "pushes": progress.totals.pushes,
        "loss": totals.mean_loss,
        "lr": totals.lr,
        "staleness": staleness_summary(totals.staleness),
        "num_workers": _num_wanted(progress, config),
        "workers": [_worker_json(each, span) for each in span.workers],
        "shards": [
            _shard_json(time, status, span)
            for time, status in zip(span.shards, span.later.reading.shards, strict=True)
        ],
        "lost_work": _lost_json(span),
    }


def _num_wanted(progress: Progress, config: TrainConfig) -> int:
    """Workers that the run is to have now."""
    return config.scaling.max_workers if progress.num_wanted is None else progress.num_wanted


def _worker_json(worker: WorkerTime, span: Span) -> dict[str, Any]:
    number = worker.worker
    staleness = histograms(span.totals.worker_staleness).get(number, {})
    summary = staleness_summary(staleness)
    spent_s = {name: getattr(worker, f"{name}_s") for name in PHASES}
    return {
        "worker": number,
        "alive": number in span.later.progress.silent_s,
        "silent_s": span.later.progress.silent_s.get(number),
        "pushes": worker.pushes,
        "samples_per_s": worker.samples / span.seconds if span.seconds > 0 else math.nan,
        "staleness_mean": summary["mean"] if staleness else None,
        "staleness_max": summary["max"] if staleness else None,
        "shares": {
            name: seconds / worker.total_s if worker.total_s else None
            for name, seconds in spent_s.items()
        },
    }


def _shard_json(time: ShardTime, status: ShardStatus, span: Span) -> dict[str, Any]:
    return {
        "shard": time.shard,
        "version": status.clocks.updates,
        "busy": time.busy,
        "queue": time.mean_queue,
        "gate_s": time.gate_s,
        "buffers": status.num_buffers,
        "pins": status.num_pins,
        "pushes": dict(status.pushes),
        "lanes": histograms(span.totals.shard_lanes).get(time.shard, {}),
        "standby": _standby_json(status.replica),
    }


def _standby_json(replica: ReplicaStatus | None) -> dict[str, Any] | None:
    """None for a run without replicas."""
    if replica is None:
        return None
    return {
        "state": replica.state,
        "num_behind": replica.num_behind,
        "waiting_s": replica.waiting_s,
    }


def _lost_json(span: Span) -> dict[str, Any]:
    """Over the whole run."""
    totals = span.later.progress.totals
    return {
        "receipts": dict(totals.outcomes),
        "dropped": totals.dropped,
        "corrupt_images": len(totals.corrupt),
        "samples_lost": sum(totals.lost.values()),
        "samples_returned": totals.samples_returned,
        "samples_twice": totals.samples_twice,
    }
