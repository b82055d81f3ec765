import gzip
import hashlib
import io
import json
import os
import pickle
import random
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from model.errors import InputError
from worker.data.fetch import FetchSettings
from worker.data.manifest import Manifest, ShardEntry
from worker.data.manifest_source import ManifestSource, open_manifest
from worker.data.source import ImageSource, LostShard, Sample, iterate_labels
from worker.data.webdataset import WebDatasetSource

NUM_CLASSES = 5


def tar_of(samples: list[tuple[str, bytes, list[Any]]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, image, labels in samples:
            for name, content in (
                (f"{key}.png", image),
                (f"{key}.json", json.dumps({"labels": labels}).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_set(folder: Path, num_shards: int = 4, suffix: str = ".tar") -> tuple[Path, Manifest]:
    """Shards of 1 to 5 samples with 0 to 3 labels each, and their manifest."""
    rng = random.Random(num_shards)
    entries, counts = [], np.zeros(NUM_CLASSES, np.int64)
    (folder / "shards").mkdir(parents=True)
    for number in range(num_shards):
        labels = [rng.sample(range(NUM_CLASSES), rng.randint(0, 3)) for _ in range(1 + number % 5)]
        images = [rng.randbytes(rng.randint(1, 3000)) for _ in labels]
        tar = tar_of(
            [
                (f"{number}-{i}", image, found)
                for i, (image, found) in enumerate(zip(images, labels, strict=True))
            ]
        )
        content = tar if suffix == ".tar" else gzip.compress(tar)
        name = f"shards/train-{number:05d}{suffix}"
        (folder / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append(ShardEntry(name, len(labels), len(content), digest))
        for found in labels:
            counts[found] += 1
    names = tuple(f"class {i}" for i in range(NUM_CLASSES))
    manifest = Manifest(tuple(entries), counts, 0, 3, names)
    path = folder / "train.manifest.json"
    path.write_text(manifest.to_json())
    return path, manifest


def in_place(path: Path) -> str:
    return str(path)


def by_file_url(path: Path) -> str:
    return f"file://{path}"


def in_memory(path: Path) -> str:
    memory = fsspec.filesystem("memory")
    root = f"/{path.parent.name}"
    for file in path.parent.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"{root}/{file.relative_to(path.parent)}", file.read_bytes())
    return f"memory:/{root}/{path.name}"


PLACES = [in_place, by_file_url, in_memory]


def settings_in(folder: Path, **changes: Any) -> FetchSettings:
    quick = {"cache_dir": str(folder / "cache"), "attempts": 2, "backoff_s": 1e-6}
    return FetchSettings(**quick | changes)


def opened(location: str, folder: Path, **changes: Any) -> ManifestSource:
    return open_manifest(location, settings_in(folder, **changes), "data.train")


def all_samples(source: ImageSource) -> list[list[Sample]]:
    return [[source.read(s, i) for i in range(n)] for s, n in enumerate(source.shard_sizes)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_a_manifest_gives_the_samples_of_its_shards(
    tmp_path: Path, suffix: str, place: Callable[[Path], str]
) -> None:
    path, manifest = write_set(tmp_path / f"set{suffix}", suffix=suffix)
    expected = WebDatasetSource([str(path.parent / shard.name) for shard in manifest.shards])
    source = opened(place(path), tmp_path)
    assert source.shard_sizes == expected.shard_sizes
    assert source.fetches == (place is not in_place)
    source.announce([3, 1])
    assert all_samples(source) == all_samples(expected)
    assert list(iterate_labels(source)) == list(iterate_labels(expected))
    assert all_samples(pickle.loads(pickle.dumps(source))) == all_samples(expected)
    assert (source.cached_shards is None) == (suffix == ".tar")
    assert (tmp_path / "cache").exists() == (place is not in_place)


@pytest.mark.parametrize("place", PLACES)
def test_what_the_manifest_knows_needs_no_shard(
    tmp_path: Path, place: Callable[[Path], str]
) -> None:
    path, manifest = write_set(tmp_path / "unread")
    for shard in manifest.shards:
        (path.parent / shard.name).unlink()
    source = opened(place(path), tmp_path)
    assert source.shard_sizes == (1, 2, 3, 4)
    assert source.class_names == manifest.class_names
    known = source.known_labels
    assert known.counts.tolist() == manifest.label_counts.tolist()
    assert (known.fewest, known.most) == (0, 3)
    assert len(pickle.dumps(source)) < 1000
    with pytest.raises(LostShard, match=r"shards/train-00002\.tar"):
        source.read(2, 0)


def test_threads_read_right_though_indices_and_files_come_and_go(tmp_path: Path) -> None:
    path, manifest = write_set(tmp_path / "set", num_shards=40)
    expected = all_samples(opened(str(path), tmp_path))
    limit_gb = max(shard.num_bytes for shard in manifest.shards) * 3 / 1e9
    source = ManifestSource(
        f"file://{path}", settings_in(tmp_path, cache_gb=limit_gb), "data.train", indexed_samples=1
    )

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(40):
            shard = rng.randrange(40)
            source.announce([rng.randrange(40)])
            index = rng.randrange(source.shard_sizes[shard])
            assert source.read(shard, index) == expected[shard][index]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_compressed_shards_that_were_dropped_are_decompressed_again(tmp_path: Path) -> None:
    path, _ = write_set(tmp_path / "set", num_shards=12, suffix=".tar.gz")
    source = ManifestSource(str(path), settings_in(tmp_path), "data.train", cached_shards=1)
    expected = all_samples(opened(str(path), tmp_path))
    for _ in range(2):
        assert all_samples(source) == expected


class Forgetful:
    """As a cache from which other threads drop all at once."""

    def get(self, key: int, make: Callable[[], Any]) -> Any:
        return make()


def test_compressed_shards_may_be_dropped_between_index_and_image(tmp_path: Path) -> None:
    path, _ = write_set(tmp_path / "set", suffix=".tar.gz")
    expected = all_samples(opened(str(path), tmp_path))
    source: Any = opened(str(path), tmp_path)
    source._decompressed = source._indices = Forgetful()
    assert all_samples(source) == expected


def rewrite(path: Path, tar: bytes, entry: ShardEntry) -> ShardEntry:
    """Put another tar in a shard's place, with the manifest's entry as it should be for it."""
    (path.parent / entry.name).write_bytes(tar)
    return ShardEntry(entry.name, entry.num_samples, len(tar), hashlib.sha256(tar).hexdigest())


TWO = [("a", b"image", [1]), ("b", b"image", [2, 3])]
SWAPS: dict[str, tuple[bytes, str]] = {
    "fewer samples": (tar_of(TWO[:1]), "holds 1 samples, and its manifest says 2"),
    "more samples": (tar_of([*TWO, ("c", b"", [])]), "holds 3 samples"),
    "cut off": (tar_of(TWO)[:-9000], "truncated or damaged"),
    "cut inside": (tar_of(TWO)[:700], "truncated or damaged"),
    "no tar": (b"<html>please log in</html>" * 40, "truncated or damaged"),
    "unknown class": (tar_of([TWO[0], ("b", b"", [5])]), "label 5, and its manifest counts 5"),
    "negative class": (tar_of([TWO[0], ("b", b"", [-1])]), "label -1"),
    "more labels": (tar_of([TWO[0], ("b", b"", [0, 1, 2, 3])]), "1 to 4 labels, .* 0 to 3"),
    "text label": (tar_of([TWO[0], ("b", b"", ["cat"])]), "text where a class id"),
}


@pytest.mark.parametrize("place", [in_place, by_file_url])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_shard_that_differs_from_its_manifest_is_lost_alone(
    tmp_path: Path, place: Callable[[Path], str], swap: str
) -> None:
    path, manifest = write_set(tmp_path / "set")
    expected = all_samples(opened(str(path), tmp_path))
    tar, said = SWAPS[swap]
    shards = list(manifest.shards)
    shards[1] = rewrite(path, tar, shards[1])
    changed = Manifest(tuple(shards), manifest.label_counts, 0, 3)
    path.write_text(changed.to_json())
    source = opened(place(path), tmp_path)
    for index in (0, 1, 0):
        with pytest.raises(LostShard, match=said) as caught:
            source.read(1, index)
        assert caught.value.name == "shards/train-00001.tar"
        assert str(caught.value).count("train-00001") == 1
        with pytest.raises(LostShard, match=said):
            source.labels(1, index)
    for shard in (0, 2, 3):
        assert source.read(shard, 0) == expected[shard][0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_size_is_lost(
    tmp_path: Path, place: Callable[[Path], str], change: int
) -> None:
    path, manifest = write_set(tmp_path / f"size{change}")
    shard = path.parent / manifest.shards[3].name
    os.truncate(shard, manifest.shards[3].num_bytes + change)
    with pytest.raises(LostShard, match="bytes"):
        opened(place(path), tmp_path).read(3, 0)


def test_a_damaged_gzip_is_lost(tmp_path: Path) -> None:
    path, manifest = write_set(tmp_path / "set", suffix=".tar.gz")
    content = bytearray((path.parent / manifest.shards[2].name).read_bytes())
    content[len(content) // 2] ^= 255
    (path.parent / manifest.shards[2].name).write_bytes(content)
    with pytest.raises(LostShard, match="train-00002"):
        opened(str(path), tmp_path).read(2, 0)


@pytest.mark.parametrize("base", [in_place, by_file_url])
def test_a_manifest_can_lie_away_from_its_shards(
    tmp_path: Path, base: Callable[[Path], str]
) -> None:
    path, manifest = write_set(tmp_path / "set")
    expected = all_samples(opened(str(path), tmp_path))
    moved = Manifest(manifest.shards, manifest.label_counts, 0, 3, base=base(path.parent))
    elsewhere = tmp_path / "elsewhere.manifest.json"
    elsewhere.write_text(moved.to_json())
    source = opened(str(elsewhere), tmp_path)
    assert source.fetches == (base is by_file_url)
    assert all_samples(source) == expected


def test_the_largest_shards_must_fit(tmp_path: Path) -> None:
    path, manifest = write_set(tmp_path / "set", num_shards=10)
    sizes = sorted(shard.num_bytes for shard in manifest.shards)
    source = opened(f"file://{path}", tmp_path, cache_gb=sum(sizes[-3:]) / 1e9)
    source.check_room(3)
    with pytest.raises(InputError, match=r"data\.fetch\.cache_gb=.* the 4 shards"):
        source.check_room(4)
    opened(str(path), tmp_path, cache_gb=1e-9).check_room(10)


@pytest.mark.parametrize(
    "url", ["s3://b/train-{0..9}.tar", "http://h/x.tar", "http://h/x.tar?x.manifest.json"]
)
def test_shards_at_urls_need_a_manifest(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match=r"data\.train=.*need a manifest.*asynception data index"):
        opened(url, tmp_path)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("{folder}/no.manifest.json", "can't be read"),
        ("file://{folder}/no.manifest.json", "can't be fetched: it does not exist"),
        ("memory://nothing/no.manifest.json", "can't be fetched: it does not exist"),
        ("{folder}/bad.manifest.json", "can't be used as a manifest"),
        ("file://{folder}/bad.manifest.json", "can't be used as a manifest"),
    ],
)
def test_a_manifest_that_can_not_be_had_is_named(tmp_path: Path, location: str, said: str) -> None:
    (tmp_path / "bad.manifest.json").write_text("{")
    where = location.format(folder=tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        opened(where, tmp_path)
    assert str(caught.value).startswith(f"data.train={where!r}")
    assert "\n" not in str(caught.value)
