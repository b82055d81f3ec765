"""How labels are distributed in a set of shards, in numbers and as a plot."""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asynception.data.shard_writer import count_array
from model.errors import InputError

_SHOWN = 10


@dataclass(frozen=True)
class LabelStats:
    """Counts of a set; `counts` has at least one class."""

    counts: NDArray[np.int64]
    """(num_classes,): samples of each class."""
    labels_per_sample: Mapping[int, int]
    """Samples with each number of labels."""
    class_names: tuple[str, ...] | None

    def name(self, class_id: int) -> str:
        return str(class_id) if self.class_names is None else self.class_names[class_id]

    def ranked(self) -> list[int]:
        """Class ids, the most frequent first; those of the same count by id."""
        order: list[int] = np.argsort(-self.counts, kind="stable").tolist()
        return order

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) of the set as a whole."""
        num_samples = sum(self.labels_per_sample.values())
        num_labels = int(self.counts.sum())
        percentiles = " ".join(
            f"p{share}={self._percentile(share)}" for share in (0, 5, 25, 50, 75, 95, 100)
        )
        return [
            ("samples", f"{num_samples:,}"),
            ("classes", f"{len(self.counts):,}"),
            ("labels", f"{num_labels:,}"),
            ("labels per sample", f"mean={num_labels / max(1, num_samples):.2f} {percentiles}"),
            ("samples without a label", f"{self.labels_per_sample.get(0, 0):,}"),
            ("classes without a sample", f"{int((self.counts == 0).sum()):,}"),
            ("share of labels, top 1 % of classes", f"{self._top_share(0.01):.1%}"),
            ("share of labels, top 10 % of classes", f"{self._top_share(0.1):.1%}"),
            ("share of labels, bottom half of classes", f"{1 - self._top_share(0.5):.1%}"),
        ]

    def extremes(self) -> list[tuple[str, int, str, int]]:
        """(which, class id, name, samples) of the ten most and the ten least frequent classes."""
        ranked = self.ranked()
        most, rest = ranked[:_SHOWN], ranked[_SHOWN:]
        shown = [("most frequent", each) for each in most]
        shown += [("least frequent", each) for each in rest[-_SHOWN:]]
        return [(which, each, self.name(each), int(self.counts[each])) for which, each in shown]

    def _percentile(self, percent: int) -> int:
        """The smallest number of labels that `percent` of samples don't exceed."""
        lengths = sorted(self.labels_per_sample)
        sums = np.cumsum([self.labels_per_sample[length] for length in lengths])
        place = int(np.searchsorted(sums, max(1, np.ceil(sums[-1] * percent / 100))))
        return lengths[place]

    def _top_share(self, share: float) -> float:
        """Of all labels, those of the most frequent classes; at least one class."""
        ranked = np.sort(self.counts)[::-1]
        return float(ranked[: max(1, round(share * len(ranked)))].sum() / max(1, ranked.sum()))


def label_stats(
    label_counts: Counter[int],
    labels_per_sample: Counter[int],
    class_names: tuple[str, ...] | None,
    num_classes: int | None,
) -> LabelStats:
    """Raises InputError for labels that the names or the number of classes don't cover."""
    limit = len(class_names) if class_names is not None else num_classes
    outside = [label for label in label_counts if label < 0 or (limit and label >= limit)]
    if outside:
        raise InputError(
            f"label {outside[0]} is outside the {limit or 'possible'} classes: `asynception data "
            "check` lists the samples"
        )
    if not sum(labels_per_sample.values()):
        raise InputError("no sample could be read: `asynception data check` says why")
    return LabelStats(count_array(label_counts, limit), labels_per_sample, class_names)


def write_csv(stats: LabelStats, path: Path) -> None:
    """A line for each class, the most frequent first: rank, label, name, samples."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rank", "label", "name", "samples"])
        for rank, class_id in enumerate(stats.ranked(), 1):
            writer.writerow([rank, class_id, stats.name(class_id), int(stats.counts[class_id])])


def write_plot(stats: LabelStats, path: Path) -> None:
    """Samples of each class over its rank, both logarithmic; the suffix says the format.

    Raises InputError without matplotlib, and for a suffix that it can't write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"--out={path}: plots need matplotlib: pip install matplotlib") from None
    counts = np.sort(stats.counts)[::-1]
    counts = counts[counts > 0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.loglog(np.arange(1, len(counts) + 1), counts, marker=".", markersize=3, linewidth=1)
    axes.set_xlabel("rank of the class")
    axes.set_ylabel("samples")
    missing = len(stats.counts) - len(counts)
    axes.set_title(f"{len(stats.counts):,} classes, {missing:,} without a sample")
    axes.grid(which="both", alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise InputError(f"--out={path}: can't be written as a plot ({error})") from None
