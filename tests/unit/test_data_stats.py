"""Numbers of a label distribution against their definitions, the plot, and the commands."""

import csv
from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from asynception.data.cli import data
from asynception.data.shard_writer import ShardWriter
from asynception.data.stats import label_stats, write_csv, write_plot
from model.errors import InputError

SAMPLES = st.lists(st.sets(st.integers(0, 30), max_size=8), min_size=1, max_size=60)


def stats_of(samples, num_classes=31, names=None):
    counts = Counter(label for labels in samples for label in labels)
    return label_stats(counts, Counter(map(len, samples)), names, num_classes)


@given(SAMPLES)
def test_numbers_are_those_of_all_samples(samples):
    rows = dict(stats_of(samples).rows())
    lengths = [len(labels) for labels in samples]
    counts = np.bincount([i for labels in samples for i in labels], minlength=31)
    assert rows["samples"] == str(len(samples))
    assert rows["labels"] == str(sum(lengths))
    assert rows["classes without a sample"] == str((counts == 0).sum())
    assert rows["samples without a label"] == str(lengths.count(0))
    shares = (0, 5, 25, 50, 75, 95, 100)
    expected = np.percentile(lengths, shares, method="inverted_cdf")
    percentiles = " ".join(f"p{s}={n:.0f}" for s, n in zip(shares, expected, strict=True))
    assert rows["labels per sample"] == f"mean={np.mean(lengths):.2f} {percentiles}"
    top = np.sort(counts)[::-1][:3].sum() / max(1, counts.sum())
    assert rows["share of labels, top 10 % of classes"] == f"{top:.1%}"


@given(SAMPLES)
def test_extremes_are_the_ends_of_the_ranking(samples):
    stats = stats_of(samples)
    shown = stats.extremes()
    counts = sorted(stats.counts.tolist(), reverse=True)
    assert [count for _, _, _, count in shown] == counts[:10] + counts[-10:]
    assert all(stats.counts[class_id] == count for _, class_id, _, count in shown)
    assert len({class_id for _, class_id, _, _ in shown}) == 20


def test_the_table_of_classes(tmp_path):
    write_csv(stats_of([{0, 2}, {2}], 3, ("a", "b,c", "d")), tmp_path / "stats.csv")
    with open(tmp_path / "stats.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["rank", "label", "name", "samples"],
        ["1", "2", "d", "2"],
        ["2", "0", "a", "1"],
        ["3", "1", "b,c", "0"],
    ]


def test_the_plot_is_an_image(tmp_path):
    write_plot(stats_of([{0, 2}, {2}], 3), tmp_path / "stats.png")
    with Image.open(tmp_path / "stats.png") as image:
        assert image.size == (1050, 675)
        assert len(image.getcolors(10**6)) > 10
    with pytest.raises(InputError, match="can't be written as a plot"):
        write_plot(stats_of([{0}]), tmp_path / "stats.nothing")


def test_labels_that_names_do_not_cover_are_refused():
    with pytest.raises(InputError, match="label 5 is outside the 3 classes"):
        stats_of([{5}], names=("a", "b", "c"))
    with pytest.raises(InputError, match="no sample could be read"):
        stats_of([])


def run(*arguments):
    return CliRunner().invoke(data, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return tmp_path


def test_the_commands_from_a_folder_to_its_statistics(folder):
    packed = run("pack", folder / "in", "--out", folder / "out", "--verify")
    assert packed.exit_code == 0, packed.output
    assert "3 samples, 2 classes, 1 shards" in packed.output
    manifest = folder / "out" / "train.manifest.json"
    before = manifest.read_bytes()
    labels = folder / "out" / "labels.txt"
    indexed = run("index", folder / "out", "--out", folder / "out", "--labels", labels)
    assert indexed.exit_code == 0, indexed.output
    assert manifest.read_bytes() == before
    checked = run("check", manifest, "--decode", "--sha256", "--labels", labels)
    assert checked.exit_code == 0, checked.output
    outputs = ("--out", folder / "stats.png", "--csv", folder / "stats.csv")
    described = run("stats", manifest, *outputs)
    assert described.exit_code == 0, described.output
    assert "most frequent" in described.output
    assert (folder / "stats.csv").read_text().splitlines()[1] == "1,0,a,2"


def test_check_says_with_its_exit_code_whether_anything_is_wrong(folder):
    with ShardWriter(folder / "set", "train") as writer:
        for number in range(5):
            writer.add(f"k{number}", b"no image", ".jpg", [number])
    clean = run("check", folder / "set")
    assert (clean.exit_code, "problems  0" in clean.output) == (0, True)
    wrong = run("check", folder / "set", "--decode", "--num-classes", 3, "--max-lines", 4)
    assert wrong.exit_code == 1
    assert wrong.output.count("train-000000.tar: sample") == 4
    assert "... and 3 more" in wrong.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "nothing", "--out", "out"], "neither a folder nor a table"),
        (["pack", "--out", "out"], "SOURCE is missing"),
        (["pack", "--out", "out", "--open-images", "x.csv"], "needs --classes and --images"),
        (["pack", ".", "--out", "out", "--shard-mb", "0"], "--shard-mb=0"),
        (["check", "nothing"], "nothing: doesn't exist"),
        (["check", "{in}/in", "--labels", "nothing.txt"], "no shard there"),
    ],
)
def test_bad_usage_is_an_input_error(arguments, message, folder):
    result = run(*(argument.replace("{in}", str(folder)) for argument in arguments))
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
