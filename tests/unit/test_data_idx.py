"""Idx files: read as they were written, and whatever is damaged is refused and named."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model.errors import InputError
from worker.data.idx import FASHION_MNIST_CLASSES, IdxSource, is_idx
from worker.data.source import iterate_labels
from worker.data.summary import summarize
from worker.data.transform import Transform

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""


def idx_bytes(values):
    magic = struct.pack(">HBB", 0, 8, values.ndim)
    return magic + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write(path, values):
    content = idx_bytes(values)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


IMAGES = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
LABELS = np.array([3, 0, 7, 3, 1], np.uint8)


def write_pair(folder, *, images=IMAGES, labels=LABELS, suffix="", labels_suffix=""):
    write(folder / f"train-labels-idx1-ubyte{labels_suffix}", labels)
    return write(folder / f"train-images-idx3-ubyte{suffix}", images)


def refusal(path):
    with pytest.raises(InputError) as caught:
        IdxSource(str(path))
    text = str(caught.value)
    assert "\n" not in text
    return text


@settings(max_examples=40, deadline=None)
@given(
    images=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6)),
    seed=st.integers(0, 2**32 - 1),
    suffixes=st.tuples(st.sampled_from(["", ".gz"]), st.sampled_from(["", ".gz"])),
)
def test_what_was_written_is_read(tmp_path_factory, images, seed, suffixes):
    folder = tmp_path_factory.mktemp("idx")
    labels = np.random.default_rng(seed).integers(0, 256, len(images), np.uint8)
    path = write_pair(
        folder, images=images, labels=labels, suffix=suffixes[0], labels_suffix=suffixes[1]
    )
    source = IdxSource(path)
    assert source.shard_sizes == (len(images),)
    for read in (source, pickle.loads(pickle.dumps(source))):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            sample = read.read(0, index)
            assert sample.image.dtype == np.uint8
            assert np.array_equal(sample.image, np.stack([image] * 3, axis=2))
            assert sample.labels == (label,) == read.labels(0, index)
    known = source.known_labels
    assert known.counts.tolist() == np.bincount(labels).tolist()
    assert (known.fewest, known.most) == (1, 1)
    assert summarize(source, None).label_counts.tolist() == known.counts.tolist()


def test_a_batch_is_decoded_from_its_pixels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 9), np.uint8)
    source = IdxSource(write_pair(tmp_path, images=images, labels=LABELS[:2]))
    decoded = Transform(9).decode(source.read(0, 1).image)
    assert np.array_equal(decoded, np.stack([images[1]] * 3))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/train-images-idx3-ubyte", True),
        ("t10k-images-idx3-ubyte.gz", True),
        ("emnist-letters-test-images-idx3-ubyte.gz", True),
        ("train-images.idx3-ubyte", True),
        ("train-labels-idx1-ubyte.gz", True),
        ("/a/train-images-idx3-ubyte/0001.tar", False),
        ("train-images-idx3-ubyte.tar.gz", False),
        ("train-{00000..00006}.tar", False),
    ],
)
def test_idx_files_are_known_by_their_names(path, expected):
    assert is_idx(path) == expected


def test_names_with_dots_find_their_labels(tmp_path):
    write(tmp_path / "t10k-labels.idx1-ubyte", LABELS)
    source = IdxSource(write(tmp_path / "t10k-images.idx3-ubyte", IMAGES))
    assert tuple(iterate_labels(source)) == tuple((label,) for label in LABELS)


def test_a_missing_file_is_named(tmp_path):
    path = write(tmp_path / "train-images-idx3-ubyte.gz", IMAGES)
    assert f"put {tmp_path}/train-labels-idx1-ubyte or" in refusal(path)
    write(tmp_path / "train-labels-idx1-ubyte", LABELS)
    os.unlink(path)
    assert "train-images-idx3-ubyte.gz: cannot be read" in refusal(path)
    assert "t10k-images-idx3-ubyte: does not exist" in refusal(tmp_path / "t10k-images-idx3-ubyte")


def test_the_labels_in_place_of_the_images_are_refused(tmp_path):
    write_pair(tmp_path)
    assert "name one like train-images" in refusal(tmp_path / "train-labels-idx1-ubyte")


def test_counts_that_differ_are_refused(tmp_path):
    text = refusal(write_pair(tmp_path, labels=LABELS[:4]))
    assert "5 images" in text
    assert "4 labels" in text


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3)])
def test_files_without_a_pixel_are_refused(tmp_path, shape):
    images = np.zeros(shape, np.uint8)
    assert " x ".join(map(str, shape)) in refusal(
        write_pair(tmp_path, images=images, labels=LABELS[: shape[0]])
    )


def test_another_kind_of_values_is_refused(tmp_path):
    path = write_pair(tmp_path)
    write(tmp_path / "train-labels-idx1-ubyte", IMAGES)
    assert "starts with 0x00000803 where" in refusal(path)
    write_pair(tmp_path, images=LABELS)
    assert "starts with 0x00000801 where" in refusal(path)
    Path(path).write_bytes(b"")
    assert "starts with 0x where" in refusal(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_cut_anywhere_is_refused(tmp_path, suffix):
    path = Path(write_pair(tmp_path, suffix=suffix))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert path.name in refusal(path)
    path.write_bytes(content)
    IdxSource(str(path))


def test_what_gzip_finds_damaged_or_longer_than_its_head_says_is_refused(tmp_path):
    path = Path(write_pair(tmp_path, suffix=".gz"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # of the checksum
    path.write_bytes(content)
    assert "damaged" in refusal(path)
    path.write_bytes(idx_bytes(IMAGES))
    assert "damaged" in refusal(path)
    path.write_bytes(gzip.compress(idx_bytes(IMAGES) + b"\0"))
    assert "goes on after the 60 values" in refusal(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_head_that_announces_more_than_the_file_can_hold_takes_no_memory(tmp_path, suffix):
    path = Path(write_pair(tmp_path, suffix=suffix))
    head = struct.pack(">4I", 0x803, 2**20, 2**10, 2**10)
    content = head + IMAGES.tobytes()
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert "too short for the 1099511627776 values" in refusal(path)


def test_only_fashion_mnist_has_names_of_classes(tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    assert IdxSource(write_pair(folder)).class_names is None


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs the package dataset-fashion-mnist")
@pytest.mark.parametrize(("split", "num_samples"), [("train", 60_000), ("t10k", 10_000)])
def test_fashion_mnist_is_read_as_debian_has_it(split, num_samples):
    source = IdxSource(str(FASHION_MNIST / f"{split}-images-idx3-ubyte.gz"))
    assert source.shard_sizes == (num_samples,)
    assert source.class_names == FASHION_MNIST_CLASSES
    assert source.known_labels.counts.tolist() == [num_samples // 10] * 10
    assert source.read(0, num_samples - 1).image.shape == (28, 28, 3)
