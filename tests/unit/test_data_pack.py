"""Packing: the shards hold the listed samples, and nothing but plan and images decides on them."""

import os
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from asynception.data import pack as packing
from asynception.data.image_folders import list_image_folder
from asynception.data.listing import Listing, Row
from asynception.data.pack import pack
from asynception.data.pack_plan import PackSettings, make_plan
from asynception.data.shuffle import order_digest
from asynception.data.tables import list_table
from asynception.data.vocabulary import Vocabulary
from model.errors import InputError
from worker.data.image_folder import ImageFolderSource
from worker.data.manifest import Manifest
from worker.data.webdataset import WebDatasetSource

SMALL = PackSettings(shard_num_bytes=20_000, bucket_num_bytes=200)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """60 images in 3 classes, of unequal sizes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(60):
        path = root / "xyz"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (8 + number % 5, 30, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples(folder, split="train"):
    manifest = Manifest.from_json((folder / f"{split}.manifest.json").read_bytes(), split)
    source = WebDatasetSource([str(folder / shard.name) for shard in manifest.shards])
    return [
        source.read(shard, index)
        for shard, size in enumerate(source.shard_sizes)
        for index in range(size)
    ]


def test_a_packed_folder_holds_what_the_folder_holds_in_the_order_of_hashes(images, tmp_path):
    result = pack(list_image_folder(images, "train"), tmp_path, SMALL)
    source = ImageFolderSource(str(images))
    expected = [source.read(0, index) for index in range(60)]
    renamed = {key.removesuffix(".png"): (image, labels) for key, image, labels in expected}
    found = samples(tmp_path)
    assert {key: (image, labels) for key, image, labels in found} == renamed
    assert [key for key, _, _ in found] == sorted(renamed, key=lambda key: order_digest(key, 0))
    assert (tmp_path / "labels.txt").read_text() == "x\ny\nz\n"
    manifest = result.manifests["train"]
    assert manifest.class_names == source.class_names
    assert manifest.label_counts.tolist() == [20, 20, 20]
    assert len(manifest.shards) > 3
    assert all(shard.num_bytes <= 20_480 for shard in manifest.shards)
    names = {"labels.txt", "train.manifest.json", *(shard.name for shard in manifest.shards)}
    assert set(content(tmp_path)) == names


def test_neither_buckets_nor_the_order_of_a_list_change_a_byte(images, tmp_path):
    rows = [f"{path.relative_to(images)},{path.parent.name}" for path in images.glob("*/*")]
    tables = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for table, lines in zip(tables, (sorted(rows), sorted(rows, reverse=True)), strict=True):
        table.write_text("\n".join(["path,labels", *lines]))
    big = SMALL.model_copy(update={"bucket_num_bytes": 10**6})
    pack(list_table(tables[0], images), tmp_path / "1", SMALL)
    pack(list_table(tables[1], images), tmp_path / "2", big)
    first = content(tmp_path / "1")
    assert first == content(tmp_path / "2")
    other = SMALL.model_copy(update={"seed": 1})
    pack(list_table(tables[0], images), tmp_path / "3", other)
    assert first != content(tmp_path / "3")


def test_a_held_out_share_is_split_off(images, tmp_path):
    settings = SMALL.model_copy(update={"val_share": 0.2})
    result = pack(list_image_folder(images, "train"), tmp_path, settings)
    train, val = samples(tmp_path), samples(tmp_path, "val")
    assert len(train) + len(val) == len({sample.key for sample in train + val}) == 60
    assert 4 <= len(val) <= 20
    assert result.manifests["val"].num_samples == len(val)
    assert result.manifests["val"].class_names == ("x", "y", "z")


def stopped(images, out, settings=SMALL):
    """A pack that ends with its second shard, as if it had been killed."""

    def report(stage, done, total):
        if stage == "writing shards" and done > 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(list_image_folder(images, "train"), out, settings, report=report)


def test_a_changed_plan_is_refused(images, tmp_path):
    stopped(images, tmp_path)
    for change in ({"seed": 1}, {"shard_num_bytes": 30_000}, {"verify": True}):
        settings = SMALL.model_copy(update=change)
        with pytest.raises(InputError, match="unfinished pack of another plan"):
            pack(list_image_folder(images, "train"), tmp_path, settings)
    image = next(images.glob("*/*"))
    before = image.stat()
    os.utime(image, ns=(0, before.st_mtime_ns + 1))
    with pytest.raises(InputError, match="unfinished pack of another plan"):
        pack(list_image_folder(images, "train"), tmp_path, SMALL)
    os.utime(image, ns=(0, before.st_mtime_ns))
    pack(list_image_folder(images, "train"), tmp_path, SMALL)
    with pytest.raises(InputError, match="already holds"):
        pack(list_image_folder(images, "train"), tmp_path, SMALL)


def test_two_at_once_are_refused(images, tmp_path):
    def report(stage, done, total):
        with pytest.raises(InputError, match="another process packs into it"):
            pack(list_image_folder(images, "train"), tmp_path, SMALL)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pack(list_image_folder(images, "train"), tmp_path, SMALL, report=report)


@pytest.fixture
def damaged(images, tmp_path):
    """A copy with a truncated image, one that is none, and one that has too many pixels."""
    root = tmp_path / "damaged"
    for path in images.glob("*/*"):
        target = root / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for name, made in [("x/00.png", lambda data: data[: len(data) // 2]), ("y/01.png", len)]:
        target = root / name
        target.write_bytes(bytes(made(target.read_bytes())))
    Image.new("1", (3000, 3000)).save(root / "z" / "02.png")
    return root


def test_corrupt_images_are_left_out_and_counted(damaged, tmp_path):
    settings = SMALL.model_copy(
        update={"verify": True, "max_corrupt": 3, "max_pixels": 1_000_000, "val_share": 0.2}
    )
    result = pack(list_image_folder(damaged, "train"), tmp_path / "out", settings)
    assert {skipped.key for skipped in result.corrupt} == {"x/00", "y/01", "z/02"}
    assert result.left_out == {"corrupt images": 3}
    found = [*samples(tmp_path / "out"), *samples(tmp_path / "out", "val")]
    assert len(found) == 57
    for split, manifest in result.manifests.items():
        labels = Counter(i for s in samples(tmp_path / "out", split) for i in s.labels)
        assert manifest.label_counts.tolist() == [labels[i] for i in range(3)]


def test_too_many_corrupt_images_stop_it_and_it_goes_on_with_a_higher_limit(damaged, tmp_path):
    settings = SMALL.model_copy(update={"verify": True, "max_corrupt": 2, "max_pixels": 1_000_000})
    with pytest.raises(InputError, match="more than --max-corrupt=2"):
        pack(list_image_folder(damaged, "train"), tmp_path / "out", settings)
    more = settings.model_copy(update={"max_corrupt": 3})
    resumed = pack(list_image_folder(damaged, "train"), tmp_path / "out", more)
    assert resumed.num_resumed > 0
    pack(list_image_folder(damaged, "train"), tmp_path / "whole", more)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_image_that_changes_while_packing_is_refused(images, tmp_path, monkeypatch):
    planned = packing.make_plan

    def plan_then_change(*arguments):
        plan = planned(*arguments)
        image = tmp_path / "in" / "x" / "a.png"
        image.write_bytes(b"12345")
        return plan

    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "in" / "x" / "a.png").write_bytes(b"123")
    monkeypatch.setattr(packing, "make_plan", plan_then_change)
    with pytest.raises(InputError, match="had 3 bytes when packing began, and now 5"):
        pack(list_image_folder(tmp_path / "in", "train"), tmp_path / "out", SMALL)
    assert not list((tmp_path / "out").glob("*.part"))


def test_memory_does_not_grow_with_the_images(images, tmp_path):
    peaks = []
    for length in (2_500, 10_000):
        rows = (Row(f"{'0' * 60}{i}", "x/00.png", (i % 7,), i) for i in range(length))
        listing = Listing("list", str(images), rows, "ids")
        settings = PackSettings(bucket_num_bytes=10_000)
        folder = tmp_path / str(length)
        folder.mkdir()
        tracemalloc.start()
        plan = make_plan(listing, None, settings, folder, lambda stage, done, total: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert plan.splits[0].num_samples == length
    assert peaks[1] < 1.5 * peaks[0]  # 3 MB, mostly buffers of files; as objects, 4 MB more


def test_settings_without_effect_are_refused(images, tmp_path):
    listing = list_image_folder(images, "train")
    known = Vocabulary(("x", "y", "z"))
    for change, vocabulary, message in [
        ({"val_share": 0.1, "val_split": "train"}, None, "--val-split"),
        ({"min_count": 2}, known, "--min-count"),
        ({"num_classes": 9}, None, "--num-classes"),
        ({"split": "a/b"}, None, "split='a/b'"),
        ({"val_share": 1e-9}, None, "leaves no sample for val"),
        ({"min_count": 21}, None, "leaves no class"),
    ]:
        settings = SMALL.model_copy(update=change)
        with pytest.raises(InputError, match=message):
            pack(listing, tmp_path / "out", settings, vocabulary=vocabulary)
        listing = list_image_folder(images, "train")
        assert not (tmp_path / "out" / ".pack-train").exists()
