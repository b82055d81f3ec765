import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from worker.data.manifest import Manifest, ShardEntry

NAMES = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters="/"), min_size=1, max_size=12
).filter(lambda name: name not in (".", ".."))


@st.composite
def manifests(draw: Any) -> Manifest:
    names = draw(st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=5))
    paths = sorted({"/".join(parts) for parts in names})
    sizes = draw(st.lists(st.integers(0, 9), min_size=len(paths), max_size=len(paths)))
    numbers, digests = st.integers(0, 2**40), st.binary(min_size=32, max_size=32)
    shards = tuple(
        ShardEntry(path, size, draw(numbers), draw(digests).hex())
        for path, size in zip(paths, sizes, strict=True)
    )
    num_classes = draw(st.integers(1, 5))
    labels = [draw(st.sets(st.integers(0, num_classes - 1))) for _ in range(sum(sizes))]
    return Manifest(
        shards,
        np.array([sum(i in found for found in labels) for i in range(num_classes)], np.int64),
        min(map(len, labels), default=0),
        max(map(len, labels), default=0),
        draw(st.none() | st.just(tuple(f"class {i}" for i in range(num_classes)))),
        draw(st.none() | st.sampled_from(["s3://bucket/set", "/data/set"])),
    )


def values_of(manifest: Manifest) -> dict[str, Any]:
    found = vars(manifest) | {"label_counts": manifest.label_counts.tolist()}
    return found | {"num_samples": manifest.num_samples, "num_bytes": manifest.num_bytes}


@given(manifests())
def test_what_is_written_is_read_again(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json(), "train.manifest.json")
    assert values_of(again) == values_of(manifest)
    assert again.label_counts.dtype == np.int64
    assert again.to_json() == manifest.to_json()


VALID: dict[str, Any] = {
    "format": 1,
    "num_samples": 3,
    "fewest_labels": 0,
    "most_labels": 2,
    "label_counts": [2, 1],
    "class_names": ["cat", "dog"],
    "base": "s3://bucket/folder",
    "shards": [["a/0.tar", 1, 10240, "0" * 64], ["a/1.tar", 2, 10240, "f" * 64]],
}


def entry(**changes: Any) -> dict[str, Any]:
    fields = {"name": "a/0.tar", "num_samples": 1, "num_bytes": 9, "sha256": "0" * 64} | changes
    return {"shards": [list(fields.values()), VALID["shards"][1]]}


def refusal(text: str | bytes) -> str:
    with pytest.raises(InputError) as caught:
        Manifest.from_json(text, "data.train='x'")
    message = str(caught.value)
    assert message.startswith("data.train='x'")
    assert "data index" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format is 2"),
        ({"num_samples": 4}, "num_samples is 4"),
        ({"shards": []}, "0 shards"),
        ({"shards": VALID["shards"][:1] * 2}, "twice"),
        ({"label_counts": [2, -1]}, "-1"),
        ({"label_counts": [2, 1.5]}, "1.5"),
        ({"label_counts": [2, "1"]}, "'1'"),
        ({"label_counts": [2, True]}, "True"),
        ({"label_counts": [2, 2**63]}, "label_counts"),
        ({"label_counts": [4, 1]}, "can't be those"),
        ({"label_counts": [[2], [1]]}, "[2]"),
        ({"label_counts": {"0": 2}}, "list"),
        ({"fewest_labels": 2, "most_labels": 2}, "can't be those"),
        ({"fewest_labels": None}, "fewest_labels is None"),
        ({"class_names": ["cat"]}, "1 class_names"),
        ({"class_names": "ab"}, "class_names"),
        ({"class_names": [0, 1]}, "class_names"),
        ({"base": "bucket/folder"}, "base"),
        ({"base": 3}, "base"),
        (entry(name="/etc/passwd"), "/etc/passwd"),
        (entry(name="a/../../0.tar"), "a/../../0.tar"),
        (entry(name=""), "''"),
        (entry(name="a\0.tar"), "x00"),
        (entry(name="\ud800.tar"), "ud800"),
        (entry(name=7), "7"),
        (entry(num_samples=-1), "-1"),
        (entry(num_bytes=True), "True"),
        (entry(num_bytes=1e9), "1000000000.0"),
        (entry(sha256="0" * 63), "sha256"),
        (entry(sha256="0" * 64 + "\n"), "sha256"),
        (entry(sha256=None), "sha256"),
        ({"shards": [["0.tar", 3]]}, "unpack"),
        ({"shards": None}, "None"),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    Manifest.from_json(json.dumps(VALID), "x")
    assert said in refusal(json.dumps(VALID | changes))


@pytest.mark.parametrize("name", sorted(VALID.keys() - {"base"}))
def test_a_part_that_is_missing_is_named(name: str) -> None:
    assert repr(name) in refusal(json.dumps({k: v for k, v in VALID.items() if k != name}))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "null", '"format"', "[" * 100_000, b"\xff\xfe\xfd", "NaN"]
)
def test_what_is_no_object_is_refused(text: str | bytes) -> None:
    refusal(text)


@given(st.data())
def test_no_cut_of_the_file_passes_for_a_whole_one(data: st.DataObject) -> None:
    text = json.dumps(VALID)
    refusal(text[: data.draw(st.integers(0, len(text) - 1))])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=8,
)


@given(st.sampled_from(sorted(VALID)), JSON)
def test_whatever_stands_in_a_field_is_read_or_refused(name: str, value: Any) -> None:
    text = json.dumps(VALID | {name: value})
    try:
        manifest = Manifest.from_json(text, "data.train='x'")
    except InputError:
        refusal(text)
    else:
        assert manifest.num_samples == sum(shard.num_samples for shard in manifest.shards)
        assert manifest.label_counts.min() >= 0
