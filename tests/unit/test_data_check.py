"""Every kind of damage is found, named and counted, and nothing stops at it."""

import gzip
import io
import json
import tarfile

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from asynception.data import scan
from asynception.data.check import check_shards
from asynception.data.index import index_shards
from asynception.data.key_hashes import KeyHashes
from asynception.data.shard_set import find_shards
from asynception.data.shard_writer import ShardWriter
from asynception.data.vocabulary import Vocabulary
from model.errors import InputError
from worker.data.manifest import Manifest

NAMES = ("a", "b", "c", "d")


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 7, 3), number, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Three shards of five samples each, label i % 4."""
    with ShardWriter(tmp_path, "train", shard_num_bytes=13_000, class_names=NAMES) as writer:
        for number in range(15):
            writer.add(f"k{number:02d}", png(number), ".png", [number % 4])
    assert [shard.num_samples for shard in writer.close().shards] == [5, 5, 5]
    return tmp_path


def rewrite(path, change):
    """Write a shard anew from `change` of its (name, content) pairs."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def check(location, **options):
    result = check_shards(find_shards(str(location)), **options)
    assert len(result.problems) == min(sum(result.problem_counts.values()), 50)
    assert all("\n" not in problem.text for problem in result.problems)
    return +result.problem_counts, [problem.text for problem in result.problems], result


def test_what_was_written_is_clean(shards):
    for location in ("train.manifest.json", "", "train-*.tar", "train-{000000..000002}.tar"):
        counts, texts, result = check(shards / location if location else shards, max_pixels=100)
        assert (counts, texts) == ({}, [])
        assert (result.num_shards, result.num_samples) == (3, 15)
    assert check(shards / "train.manifest.json", sha256=True)[0] == {}


def test_each_damage_is_found_and_the_rest_still_read(shards):
    first, second, third = sorted(shards.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:5200])

    def change(members):
        edited = [(n, b"{" if n == "k05.json" else data) for n, data in members]
        edited = [(n, b'{"labels":[9,1]}' if n == "k06.json" else d) for n, d in edited]
        edited = [(n, b"not an image" if n == "k07.png" else d) for n, d in edited]
        edited = [(n, d) for n, d in edited if n != "k08.png"]
        return [*edited, ("k14.png", png(0)), ("k14.json", b'{"labels":["b"]}')]

    rewrite(second, change)
    rewrite(third, lambda members: [*members[2:], ("k12.jpg", b"")])
    counts, texts, result = check(shards / "train.manifest.json", max_pixels=100)
    assert counts == {
        scan.DAMAGED: 1,
        scan.INCOMPLETE: 4,
        scan.OUTSIDE: 1,
        scan.CORRUPT: 1,
        scan.REPEATED: 1,
        scan.DIFFERENT: 5,
    }
    for part in (
        "train-000000.tar: truncated or damaged",
        "sample 'k05' has a malformed .json",
        "sample 'k06' has the label 9, outside 0..3",
        "sample 'k07': ",
        "sample 'k08' has labels but no image",
        "sample 'k14' has the label 'b', a text where a class id is expected",
        "sample 'k12' has two images",
        "train-000001.tar: key 'k14' is also in train-000002.tar",
        "train-000000.tar: has 5200 bytes, and its manifest says",
    ):
        assert sum(part in text for text in texts) == 1, part
    assert result.num_shards == 3
    positions = [text[:16] for text in texts if "also in" not in text]
    assert positions == sorted(positions)


@pytest.mark.parametrize("num_bytes", [700, 2600, 4700, 5200, 10_000])
def test_a_cut_is_one_problem_wherever_it_is(shards, num_bytes):
    first = min(shards.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:num_bytes])
    counts, _, result = check(shards, max_pixels=100)
    assert counts == {scan.DAMAGED: 1}
    assert 10 <= result.num_samples <= 10 + num_bytes // 2048 + 1


def test_a_missing_and_an_unlisted_shard_are_told_of(shards):
    (shards / "train-000001.tar").rename(shards / "train-000007.tar")
    counts, texts, _ = check(shards / "train.manifest.json")
    assert counts == {scan.LOST: 1, scan.DIFFERENT: 1}
    assert "train-000001.tar: it can't be read (No such file or directory)" in texts
    assert any("train-000007.tar isn't listed" in text for text in texts)
    assert check(shards / "train-{000000..000002}.tar")[0] == {scan.LOST: 1}


def test_a_changed_byte_shows_in_the_hash_alone(shards):
    path = shards / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 1
    path.write_bytes(data)
    assert check(shards / "train.manifest.json")[0] == {}
    assert check(shards / "train.manifest.json", sha256=True)[0] == {scan.DIFFERENT: 1}
    assert check(shards / "train.manifest.json", max_pixels=100)[0] == {scan.CORRUPT: 1}


def test_a_manifest_with_wrong_sums_is_found(shards):
    path = shards / "train.manifest.json"
    values = json.loads(path.read_text())
    values.update(label_counts=[4, 4, 3, 4], most_labels=2)
    path.write_text(json.dumps(values))
    counts, texts, _ = check(path, vocabulary=Vocabulary(("a", "b", "c", "x")))
    assert counts == {scan.DIFFERENT: 3}
    assert any("such as 3 instead of 4 for label 2" in text for text in texts)


def test_the_limit_of_labels_comes_from_the_vocabulary_first(shards):
    location = shards / "train.manifest.json"
    assert check(location, num_classes=3)[0] == {scan.OUTSIDE: 3}
    assert scan.OUTSIDE not in check(location, vocabulary=Vocabulary(NAMES))[0]
    assert check(shards, vocabulary=Vocabulary(NAMES[:2]))[0] == {scan.OUTSIDE: 7}
    assert check(shards)[0] == {}


def test_large_images_count_as_corrupt(shards):
    assert check(shards, max_pixels=41)[0] == {scan.CORRUPT: 15}


def test_only_the_first_problems_are_kept(shards):
    result = check_shards(find_shards(str(shards)), max_pixels=1, max_problems=4)
    assert [p.text[:12] for p in result.problems] == ["train-000000"] * 4
    assert result.problem_counts.total() == 15


def test_compressed_shards_are_read(shards):
    path = shards / "train-000001.tar"
    (shards / "train-000001.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    counts, _, result = check(shards, max_pixels=100)
    assert (counts, result.num_samples) == ({}, 15)
    packed = shards / "train-000001.tar.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    counts, texts, _ = check(shards)
    assert counts == {scan.LOST: 1}
    assert "truncated or damaged" in texts[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63])), max_size=5))
def test_repeated_hashes_are_those_of_several_shards(sets):
    with KeyHashes() as hashes:
        for shard, numbers in enumerate(sets):
            hashes.add(shard, np.array(sorted(numbers), np.uint64))
        found = dict(hashes.repeated())
    expected = {
        number: tuple(i for i, numbers in enumerate(sets) if number in numbers)
        for number in set().union(*sets)
    }
    assert found == {number: places for number, places in expected.items() if len(places) > 1}


def test_an_index_is_the_manifest_that_was_written(shards):
    written = (shards / "train.manifest.json").read_bytes()
    (shards / "train.manifest.json").unlink()
    vocabulary = Vocabulary(NAMES)
    path, _ = index_shards(find_shards(f"{shards}/train-*.tar"), shards, vocabulary=vocabulary)
    assert path == shards / "train.manifest.json"
    assert path.read_bytes() == written
    above = shards.parent / "all.manifest.json"
    _, manifest = index_shards(find_shards(str(shards)), above, num_classes=4)
    assert manifest.shards[0].name == f"{shards.name}/train-000000.tar"
    assert check(above, sha256=True)[0] == {}
    with pytest.raises(InputError, match="lies neither beside nor above"):
        index_shards(find_shards(str(shards)), shards / "below")


def test_an_index_of_what_is_wrong_is_refused(shards):
    rewrite(shards / "train-000001.tar", lambda members: members[1:])
    with pytest.raises(InputError, match="sample 'k05' has labels but no image"):
        index_shards(find_shards(str(shards)), shards)
    (shards / "val-0.tar").write_bytes((shards / "train-000002.tar").read_bytes())
    with pytest.raises(InputError, match="names of shards don't begin alike"):
        index_shards(find_shards(str(shards)), shards)
    with pytest.raises(InputError, match="label 2, outside"):
        index_shards(find_shards(f"{shards}/val-0.tar"), shards, num_classes=2)


def test_remote_shards_are_indexed_and_checked(shards, tmp_path):
    remote = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        remote.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    out = tmp_path / "here"
    for location in ("memory://bucket/set", "memory://bucket/set/train-{000000..000002}.tar"):
        path, manifest = index_shards(find_shards(location), out, num_classes=4)
        local = Manifest.from_json((shards / "train.manifest.json").read_bytes(), "it")
        assert manifest.shards == local.shards
        assert check(path, sha256=True)[0] == {}
    remote.rm("/bucket/set/train-000001.tar")
    counts, texts, _ = check(path)
    assert counts == {scan.LOST: 1}
    assert "it does not exist" in texts[0]
    remote.rm("/bucket", recursive=True)
    with pytest.raises(InputError, match="memory://bucket/set"):
        find_shards("memory://bucket/set")


@pytest.mark.parametrize("location", ["nothing", "*.tar", "sub", "x.manifest.json"])
def test_a_place_without_shards_is_refused(location, tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(InputError, match=r"doesn't exist|no shard there|cannot be read"):
        find_shards(str(tmp_path / location))
