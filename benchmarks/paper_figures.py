"""Figures 9 and 10 of the Xception paper in kind: small trainings, one plot.

Figure 9 trains Xception with and without residual connections, figure 10 with no activation, ReLU
and ELU between a separable convolution's two parts. Here each variant trains on pictograms with
the same data, budget, schedule and seeds, synchronously, so that staleness plays no part. Runs that
are there already aren't trained again, and the points behind the plot are written beside it.

    python benchmarks/paper_figures.py --data FOLDER --out docs/paper_figures
"""

import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

VARIANTS: Mapping[str, Sequence[str]] = {
    "residual": (),
    "no residual": ("--model.residual", "false"),
    "ReLU": ("--model.separable_activation", "relu"),
    "ELU": ("--model.separable_activation", "elu"),
}
FIGURES: Mapping[str, Mapping[str, str]] = {
    "Figure 9: residual connections": {"residual": "with", "no residual": "without"},
    "Figure 10: between depthwise and pointwise": {
        "residual": "nothing",
        "ReLU": "ReLU",
        "ELU": "ELU",
    },
}
"""For each figure, the variants in it and what they are called there."""

Points = Mapping[tuple[str, int], Sequence[tuple[int, float]]]
"""By variant and seed, (samples, EMA MAP@100)."""


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder of shards.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Files' name, no end.")
@click.option("--runs", default="runs", show_default=True, type=click.Path(path_type=Path))
@click.option("--recipe", default="recipes/pictograms.toml", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=4.0, show_default=True)
@click.option("--middle-blocks", default=4, show_default=True)
def main(
    data: Path, out: Path, runs: Path, recipe: str, seeds: int, epochs: float, middle_blocks: int
) -> None:
    settings = (
        *("--data.train", f"{data}/train-*.tar*", "--data.val", f"{data}/val-*.tar*"),
        *("--model.middle_blocks", str(middle_blocks), "--consistency.mode", "sync"),
        *("--training.epochs", str(epochs), "--schedule.length", str(epochs)),
        *("--evaluation.every_epochs", "0.5", "--run.storage_path", str(runs)),
        *("--checkpoint.every_s", "none"),
    )
    points = {}
    for seed in range(seeds):
        for variant, changes in VARIANTS.items():
            name = f"{Path(out).name}-{variant.replace(' ', '-')}-{seed}"
            if not (runs / name / "result.json").is_file():
                own = ("--run.name", name, "--training.seed", str(seed))
                _train(recipe, (*settings, *changes, *own))
            points[variant, seed] = list(_evaluations(runs / name / "metrics.jsonl"))
    _write(points, out.with_suffix(".csv"))
    _draw(points, out.with_suffix(".png"))
    for variant in VARIANTS:
        finals = [points[variant, seed][-1][1] for seed in range(seeds)]
        mean, least, most = statistics.mean(finals), min(finals), max(finals)
        click.echo(f"{variant}: EMA MAP@100 {mean:.4f} ({least:.4f} to {most:.4f})")


def _train(recipe: str, settings: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "asynception", "train", recipe, *settings], check=True)


def _evaluations(path: Path) -> Iterator[tuple[int, float]]:
    for line in path.read_text().splitlines():
        point = json.loads(line)
        if point["kind"] == "eval":
            yield point["samples"], point["metrics"]["map@100"]


def _write(points: Points, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("variant", "seed", "samples", "ema_map@100"))
        for (variant, seed), values in points.items():
            writer.writerows((variant, seed, samples, f"{value:.5f}") for samples, value in values)


def _draw(points: Points, path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(FIGURES), figsize=(11, 4.2), sharey=True)
    for axis, (title, names) in zip(axes, FIGURES.items(), strict=True):
        axis.set_title(title)
        axis.set_xlabel("images trained on, thousands")
        axis.grid(alpha=0.3)
        for colour, (variant, name) in enumerate(names.items()):
            curves = [values for (each, _), values in points.items() if each == variant]
            _draw_mean(axis, curves, name, f"C{colour}")
        axis.legend()
    axes[0].set_ylabel("EMA MAP@100 on held-out pictograms")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _draw_mean(
    axis: Axes, curves: Sequence[Sequence[tuple[int, float]]], name: str, colour: str
) -> None:
    """The mean over seeds, and the band from the least to the most."""
    columns = list(zip(*curves, strict=True))
    thousands = [statistics.mean(samples for samples, _ in column) / 1e3 for column in columns]
    values = [[value for _, value in column] for column in columns]
    axis.plot(thousands, [statistics.mean(each) for each in values], color=colour, label=name)
    axis.fill_between(
        thousands, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2, lw=0
    )


if __name__ == "__main__":
    main()
