"""Shards: read back by our reader and tarfile, deterministic, whole or not there at all."""

import hashlib
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynception.data.shard_writer import EncodedSample, ShardWriter, sample_num_bytes
from model.errors import InputError
from worker.data.manifest import Manifest
from worker.data.webdataset import WebDatasetSource

SAMPLE = ("a", b"image", ".jpg", [1, 0])
PARTS = st.text(st.characters(exclude_characters="./\0", exclude_categories=["Cs"]), min_size=1)
KEYS = st.lists(PARTS, min_size=1, max_size=3).map("/".join)
SAMPLES = st.lists(
    st.tuples(
        KEYS,
        st.binary(max_size=2000),
        st.sampled_from([".jpg", ".png"]),
        st.lists(st.integers(0, 9), unique=True, max_size=4),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda sample: sample[0],
)


def write(folder, samples, **settings):
    with ShardWriter(folder, "train", **settings) as writer:
        for sample in samples:
            writer.add(*sample)
    return writer.close()


@settings(max_examples=50, deadline=None)
@given(samples=SAMPLES, shard_num_bytes=st.integers(1, 20_000))
def test_shards_hold_the_samples_in_order_and_the_manifest_describes_them(
    samples, shard_num_bytes, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("set")
    manifest = write(folder, samples, shard_num_bytes=shard_num_bytes, num_classes=10)
    read = Manifest.from_json((folder / "train.manifest.json").read_bytes(), "it")
    assert read.to_json() == manifest.to_json()
    source = WebDatasetSource([str(folder / shard.name) for shard in manifest.shards])
    assert source.shard_sizes == tuple(shard.num_samples for shard in manifest.shards)
    found = [
        source.read(shard, index)
        for shard, size in enumerate(source.shard_sizes)
        for index in range(size)
    ]
    assert found == [(key, image, tuple(labels)) for key, image, _, labels in samples]
    for shard in manifest.shards:
        content = (folder / shard.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            shard.num_bytes,
            shard.sha256,
        )
    counts = [sum(i in labels for _, _, _, labels in samples) for i in range(10)]
    assert manifest.label_counts.tolist() == counts
    lengths = [len(labels) for _, _, _, labels in samples]
    assert (manifest.fewest_labels, manifest.most_labels) == (min(lengths), max(lengths))


def test_a_shard_grows_no_larger_than_asked_and_is_no_smaller_than_it_must_be(tmp_path):
    samples = [(f"{i:03d}", bytes(1000), ".jpg", [0]) for i in range(100)]
    manifest = write(tmp_path, samples, shard_num_bytes=40_960)
    # A sample takes 512 + 1024 + 512 + 512 bytes; 1024 end the archive.
    assert [shard.num_samples for shard in manifest.shards] == [15] * 6 + [10]
    assert all(shard.num_bytes <= 40_960 for shard in manifest.shards)


def test_the_bytes_depend_on_the_samples_alone(tmp_path):
    samples = [("ä/" + "x" * 150, b"1", ".png", [3, 1]), ("b", b"", ".jpg", [])]
    for name in "12":
        with ShardWriter(tmp_path / name, "train", num_classes=4) as writer:
            for key, image, suffix, labels in samples:
                extra = {"b": 1, "a": "é"} if name == "1" else {"a": "é", "b": 1}
                writer.add(key, image, suffix, labels, extra)
    for file in ("train-000000.tar", "train.manifest.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()
    with tarfile.open(tmp_path / "1" / "train-000000.tar") as tar:
        assert tar.getnames()[1] == "ä/" + "x" * 150 + ".json"
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}
        json = tar.extractfile(tar.getmembers()[1])
        assert json is not None
        assert json.read() == b'{"a":"\\u00e9","b":1,"labels":[3,1]}'


@settings(deadline=None)
@given(
    length=st.integers(90, 110) | st.integers(500, 530),
    letter=st.sampled_from("aä"),
    size=st.integers(0, 10**10),
    labels=st.lists(st.integers(0, 10**6), unique=True, max_size=80),
)
def test_a_sample_s_size_is_known_before_it_is_made(length, letter, size, labels):
    made = EncodedSample.of(letter * length, ".jpeg", size, labels, {})
    assert made.num_bytes == sample_num_bytes(letter * length, ".jpeg", size, labels)


def test_tarfile_writes_the_same_bytes(tmp_path):
    write(tmp_path, [SAMPLE])
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in [("a.jpg", b"image"), ("a.json", b'{"labels":[1,0]}')]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert (tmp_path / "train-000000.tar").read_bytes() == expected.getvalue()


def test_what_fails_leaves_neither_manifest_nor_part(tmp_path):
    writer = ShardWriter(tmp_path, "train")
    writer.add(*SAMPLE)
    writer.__exit__(KeyError, KeyError(), None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (("a", b"", ".jpg", [4]), "label 4, outside 0..3"),
        (("a", b"", ".jpg", [-1]), "label -1, outside"),
        (("a", b"", ".jpg", [1, 1]), "label twice"),
        (("a.b", b"", ".jpg", []), "no dot after the last /"),
        (("a/../b", b"", ".jpg", []), "no . or .."),
        (("/a", b"", ".jpg", []), "no empty part"),
        (("a", b"", "jpg", []), "suffix 'jpg'"),
        (("first", b"", ".png", []), "comes twice"),
    ],
)
def test_bad_samples_are_refused(sample, message, tmp_path):
    with ShardWriter(tmp_path, "train", num_classes=4) as writer:
        writer.add("first", b"", ".jpg", [3])
        with pytest.raises(InputError, match=message):
            writer.add(*sample)


def test_bad_settings_are_refused(tmp_path):
    write(tmp_path, [SAMPLE])
    with pytest.raises(InputError, match=r"already holds train-000000.tar"):
        ShardWriter(tmp_path, "train")
    with pytest.raises(InputError, match=r"split='\.\./x'"):
        ShardWriter(tmp_path, "../x")
    with pytest.raises(InputError, match="contradicts 2 class_names"):
        ShardWriter(tmp_path, "val", class_names=["a", "b"], num_classes=3)
    with pytest.raises(InputError, match="no sample of val"):
        ShardWriter(tmp_path, "val").close()
    assert ShardWriter(tmp_path, "train2") is not None
