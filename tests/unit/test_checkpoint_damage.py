"""Checkpoints that are damaged, or of something else, are refused by name."""

import json
import re
import shutil
from pathlib import Path

import pytest
from checkpoint_states import LAYOUT, RULES, random_state, read, refusal, same, segments
from hypothesis import given, settings
from hypothesis import strategies as st

import ps.checkpoint as checkpoint
from model.errors import InputError
from ps.checkpoint import (
    METADATA,
    ModelLayout,
    read_metadata,
    write_checkpoint,
)


def damaged_copies(path: Path, folder: Path, data: st.DataObject) -> Path:
    copied = Path(shutil.copytree(path, folder / "damaged"))
    file = data.draw(st.sampled_from(sorted(copied.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "truncate", "remove", "append"])):
        case "flip":
            content[place] ^= data.draw(st.integers(1, 255))
        case "truncate":
            del content[place:]
        case "append":
            content.append(data.draw(st.integers(0, 255)))
        case "remove":
            file.unlink()
            return copied
    file.write_bytes(content)
    return copied


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damage_of_any_byte_of_any_file_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("checkpoints")
    state, extra = random_state(), {"wall_s": 12.5, "names": ["a", "b"]}
    path = damaged_copies(write_checkpoint(folder, state, LAYOUT, extra), folder, data)
    try:
        result = read(path)
    except InputError:
        assert re.match(rf"checkpoint {re.escape(str(path))}( |: )", refusal(read, path))
    else:  # white space between JSON's tokens
        assert same(result.state, state)
        assert result.extra == extra


def test_damage_is_told_by_file(tmp_path):
    path = write_checkpoint(tmp_path, random_state(), LAYOUT, {})
    for file in ("model.safetensors", "ema.safetensors", "slot.momentum.safetensors"):
        whole = (path / file).read_bytes()
        (path / file).write_bytes(whole[:-1] + b"\x7f")
        damaged = f"checkpoint {path}: {file} is damaged (its checksum differs)"
        assert refusal(read, path) == damaged
        (path / file).write_bytes(whole[:100])
        assert refusal(read, path) == damaged
        (path / file).unlink()
        assert refusal(read, path).startswith(f"checkpoint {path}: {file} can't be read: ")
        (path / file).write_bytes(whole)
    assert read(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"format": ', b"\xff\xfe", b"{}"])
def test_metadata_that_are_none(tmp_path, content):
    path = write_checkpoint(tmp_path, random_state(), LAYOUT, {})
    (path / METADATA).write_bytes(content)
    assert refusal(read_metadata, path).startswith(f"checkpoint {path}")
    assert refusal(read, path).startswith(f"checkpoint {path}")


def test_metadata_vouch_for_themselves(tmp_path):
    path = write_checkpoint(tmp_path, random_state(), LAYOUT, {"wall_s": 1.0})
    text = (path / METADATA).read_text()
    (path / METADATA).write_text(text.replace('"updates": 7', '"updates": 9'))
    assert refusal(read, path).endswith("metadata.json is damaged (its checksum differs)")
    (path / METADATA).write_text(json.dumps(json.loads(text), indent=4))
    assert read(path).state.clocks.updates == 7, "its layout doesn't matter"


@pytest.mark.parametrize("other", [0, 2, "1", None])
def test_another_format_is_refused(tmp_path, other):
    path = write_checkpoint(tmp_path, random_state(), LAYOUT, {})
    metadata = json.loads((path / METADATA).read_text())
    (path / METADATA).write_text(json.dumps(metadata | {"format": other}))
    assert refusal(read, path) == (
        f"checkpoint {path} has format {other!r}; this version reads {checkpoint.FORMAT}"
    )


@pytest.mark.parametrize("wrote", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("reads", RULES, ids=lambda rule: rule.name)
def test_another_optimizer_is_refused(tmp_path, wrote, reads):
    path = write_checkpoint(tmp_path, random_state(rule=wrote), LAYOUT, {})
    if reads == wrote:
        assert same(read(path, reads).state, random_state(rule=wrote))
    else:
        text = refusal(read, path, reads)
        assert text.startswith(f"checkpoint {path} holds ")
        assert text.endswith("resume with the optimizer.name that wrote it")


@pytest.mark.parametrize(
    ("weights", "statistics", "culprit"),
    [
        ([(3, 4), (), (0, 2), (17,), (2, 2, 2, 2)], [(5,), (20,)], "'weight.5'"),
        ([(3, 4), (), (0, 2), (17,), (2, 2, 2, 2), (40,), (1,)], [(5,), (20,)], "'weight.6'"),
        ([(4, 3), (), (0, 2), (17,), (2, 2, 2, 2), (40,)], [(5,), (20,)], "'weight.0' has shape"),
        ([(3, 4), (), (0, 2), (17,), (2, 2, 2, 2), (40,)], [(5,)], "'bn.1'"),
        ([(3, 4), (), (0, 2), (17,), (2, 2, 2, 2), (40,)], [(5,), (21,)], "'bn.1' has shape"),
    ],
)
def test_another_model_is_refused(tmp_path, weights, statistics, culprit):
    path = write_checkpoint(tmp_path, random_state(), LAYOUT, {})
    other = ModelLayout(segments("weight", weights), segments("bn", statistics))
    text = refusal(read, path, RULES[1], other)
    assert text.startswith(f"checkpoint {path} is of another model: ")
    assert culprit in text
