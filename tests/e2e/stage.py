"""A folder in which the commands that pages show find all that they name, and small."""

import csv
import shlex
import shutil
from pathlib import Path

import h5py
import numpy as np
import pictures
import pyarrow
from click.testing import CliRunner
from documented import Trial
from pyarrow import parquet
from shown import ROOT

from asynception.cli import main
from model.keras_layers import keras_layers
from model.registry import create_model

SMALLER = {
    "width = 0.25": "width = 0.05",
    "middle_blocks = 2": "middle_blocks = 1",
    "image_size = 48": "image_size = 32",
    "batch_size = 32": "batch_size = 16",
    "epochs = 18": "epochs = 1",
    "every_epochs = 3": "every_epochs = 3\n\n[scaling]\nnum_workers = 1",
}
"""What the quickstart has, each once, and what stands there instead."""

NUM_TRAIN, NUM_VAL = 64, 16


class Stage:
    """The folder, in which commands are run one after the other, in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=_all_but_recipes)
        (folder / "deploy").symlink_to(ROOT / "deploy")
        quickstart = folder / "recipes" / "quickstart.toml"
        text = quickstart.read_text()
        for old, new in SMALLER.items():
            assert text.count(f"{old}\n") == 1, old
            text = text.replace(f"{old}\n", f"{new}\n")
        text = text.replace(".tar.gz", ".tar")
        quickstart.write_text(text)
        (folder / "recipe.toml").write_text(text.replace('"data/', '"recipes/data/'))
        for split, number in (("train", NUM_TRAIN), ("val", NUM_VAL)):
            examples = list(pictures.multilabel(number, seed=number))
            pictures.write_shards(folder / "recipes/data/emoji", split, examples, num_shards=1)

    def run(self, trial: Trial, **values: str) -> str:
        """What a command of ours says; values: of what its words have in braces."""
        program, *words = trial.words(**values)
        assert program == "asynception"
        result = CliRunner().invoke(main, words, catch_exceptions=False)
        assert result.exit_code in trial.codes, f"{shlex.join(words)}: {result.output}"
        return result.output


def _all_but_recipes(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not name.endswith(".toml")}


def write_images(folder: Path) -> None:
    """As a folder for each class, in lists, and as Open Images has them."""
    examples = list(pictures.single_label(24, seed=5))
    rows = []
    for index, (png, (label,)) in enumerate(examples):
        path = folder / "images" / f"class{label}" / f"{index}.png"
        for each in (path, folder / "train" / f"{index:04x}.jpg"):
            each.parent.mkdir(parents=True, exist_ok=True)
            each.write_bytes(png)
        rows.append((f"class{label}/{index}.png", f"class{label}|odd{index % 2}"))
    _write_csv(folder / "list.csv", ("path", "labels"), rows)
    table = {"path": [f"images/{path}" for path, _ in rows], "labels": [[i % 3] for i in range(24)]}
    parquet.write_table(pyarrow.table(table), folder / "list.parquet")
    marks = [(f"{index:04x}", "verification", f"/m/{index % 3}", 1) for index in range(24)]
    header = ("ImageID", "Source", "LabelName", "Confidence")
    _write_csv(folder / "train-annotations-human-imagelabels.csv", header, marks)
    classes = [(f"/m/{number}", f"Thing {number}") for number in range(3)]
    _write_csv(folder / "oidv7-class-descriptions.csv", ("LabelName", "DisplayName"), classes)


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_keras_xception(path: Path) -> None:
    """As Keras 3 writes weights: layers counted by class."""
    random, counts = np.random.default_rng(0), {}
    with h5py.File(path, "w") as file:
        for layer in keras_layers(create_model("xception", 1000)):
            index = counts.setdefault(layer.kind, 0)
            counts[layer.kind] += 1
            variables = file.create_group(f"layers/{layer.kind}{f'_{index}' if index else ''}/vars")
            for number, weight in enumerate(layer.weights):
                variables[str(number)] = random.standard_normal(weight.keras_shape, np.float32)
        file.create_group("layers/activation/vars")
        file.create_group("vars")
