"""Files of class weights and of subsets, and the settings that name them."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asynception.building import build_map_definition, build_objective
from asynception.config import TrainConfig
from asynception.recipe import validate
from model.errors import InputError
from worker.class_weights import read_class_weights, read_classes
from worker.data.labels import LabelLists
from worker.ranking import MeanAveragePrecision

NUM_CLASSES = 5
same_folder = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50
)


def write(folder: Path, content: str | bytes, name: str = "file.txt") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def message(call, *arguments, **settings) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    return text


@same_folder
@given(
    st.dictionaries(st.integers(0, 4), st.floats(0, 2.0**127, width=32), min_size=1),
    st.sampled_from(["\n", "\r\n", "\n\n", " # why\n# a note, with 1,2\n"]),
    st.sampled_from(["{},{}", " {} ,\t{} "]),
    st.booleans(),
)
def test_weights_are_read_as_written(tmp_path, weights, end, form, mark) -> None:
    lines = [form.format(class_id, weight) + end for class_id, weight in weights.items()]
    path = write(tmp_path, ("\ufeff" if mark else "") + "".join(lines))
    if not any(weights.values()):
        assert "weighs every class 0" in message(read_class_weights, path, 5, setting="a.b")
        return
    found = read_class_weights(path, 5, setting="a.b")
    assert found.dtype == torch.float32
    assert found.tolist() == [weights.get(i, 0.0) for i in range(5)]


@same_folder
@given(st.sets(st.integers(0, 4), min_size=1).flatmap(lambda ids: st.permutations(sorted(ids))))
def test_a_subset_is_read_in_rising_order(tmp_path, ids) -> None:
    path = write(tmp_path, "# ids\n" + "".join(f"{i} \n\n" for i in ids))
    found = read_classes(path, 5, setting="a.b")
    assert (found.dtype, found.tolist()) == (torch.int64, sorted(ids))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("0,1\nrose,2", "line 2: 'rose,2' names no class: start with an id, 0 to 4"),
        ("0,1\n\n# x\n1.0,2", "line 4: '1.0,2' names no class"),
        ("0,x", "line 1: '0,x' ends in no number"),
        ("0,1,2", "line 1: '0,1,2' ends in no number"),
        ("0,", "line 1: '0,' ends in no number"),
        ("0.5", "line 1: '0.5' is not of the form class,weight"),
        ("0 1", "line 1: '0 1' is not of the form class,weight"),
        ("0,-1", "line 1: '0,-1' has a weight that is negative, not finite or too large"),
        ("0,nan", "line 1: '0,nan' has a weight that is"),
        ("0,inf", "line 1: '0,inf' has a weight that is"),
        ("0,1e39", "line 1: '0,1e39' has a weight that is"),
        ("5,1", "line 1: '5,1' is about no class of the model: ids go from 0 to 4"),
        ("-1,1", "line 1: '-1,1' is about no class"),
        ("0,1\n3,1\n0,1", "line 3: '0,1' gives class 0 a second weight"),
        ("0,0\n1,0", " weighs every class 0, so nothing would count"),
        ("0,1e-60", " weighs every class 0, so nothing would count"),
        ("", " is empty: give it a line for each class that counts"),
        ("# 0,1\n \n", " is empty: "),
        ("x" * 10_000, "line 1: '" + "x" * 40 + "...' is not of the form"),
        ("0,\x1b[1m\u2028", "line 1: '0,\\x1b[1m' ends in no number"),
        (b"0,1\n\xff", " is not UTF-8 text: name a text file"),
    ],
)
def test_weights_that_are_none(tmp_path, content, expected) -> None:
    path = write(tmp_path, content)
    text = message(read_class_weights, path, NUM_CLASSES, setting="a.b")
    assert text.startswith(f"a.b={path!r}")
    assert expected in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("0\nrose", "line 2: 'rose' names no class"),
        ("0,1", "line 1: '0,1' names no class"),
        ("5", "line 1: '5' is about no class of the model"),
        ("-1", "line 1: '-1' is about no class of the model"),
        ("0\n1\n0", "line 3: '0' names class 0 a second time"),
        ("#", " is empty: "),
        (b"\xff", " is not UTF-8 text"),
    ],
)
def test_subsets_that_are_none(tmp_path, content, expected) -> None:
    path = write(tmp_path, content)
    text = message(read_classes, path, NUM_CLASSES, setting="a.b")
    assert text.startswith(f"a.b={path!r}")
    assert expected in text


@pytest.mark.parametrize("read", [read_class_weights, read_classes])
def test_files_that_cannot_be_read(tmp_path, read) -> None:
    missing = str(tmp_path / "missing")
    assert message(read, missing, 5, setting="a.b") == (
        f"a.b={missing!r} can't be read (No such file or directory): name a text file"
    )
    assert "(Is a directory)" in message(read, str(tmp_path), 5, setting="a.b")
    assert "name a text file" in message(read, "a\0b", 5, setting="a.b")


def test_a_complete_file_names_every_class(tmp_path) -> None:
    path = write(tmp_path, "0,1\n1,0\n3,1\n4,1")
    text = message(read_class_weights, path, NUM_CLASSES, setting="a.b", complete=True)
    assert text.startswith(f"a.b={path!r} has no line for class 2: give each of the 5 classes")
    path = write(tmp_path, "0,1\n1,0\n3,1\n4,1\n2,2")
    found = read_class_weights(path, NUM_CLASSES, setting="a.b", complete=True)
    assert found.tolist() == [1, 0, 2, 1, 1]


def config(training: dict[str, object], evaluation: dict[str, object]) -> TrainConfig:
    return validate(
        {
            "data": {"train": "/a", "val": "/b"},
            "training": {"epochs": 1, **training},
            "evaluation": evaluation,
        }
    )


def test_without_files_all_classes_weigh_the_same() -> None:
    plain = config({}, {"map_k": 7})
    definition = build_map_definition(plain, NUM_CLASSES)
    assert (definition.k, definition.weights, definition.classes) == (7, None, None)
    assert definition.class_weights(NUM_CLASSES).tolist() == [1.0] * NUM_CLASSES
    logits, labels = torch.randn(1, NUM_CLASSES), LabelLists.from_lists([[1]])
    expected = torch.nn.functional.softplus(logits).sum() - logits[0, 1]
    loss = build_objective(plain, NUM_CLASSES).loss(logits, labels)
    torch.testing.assert_close(loss, expected)


def test_files_reach_the_loss_and_the_measure(tmp_path) -> None:
    label_weights = write(tmp_path, "0,1\n1,0\n2,3\n3,0\n4,0", "label_weights")
    class_weights = write(tmp_path, "0,1\n1,2\n3,4", "class_weights")
    classes = write(tmp_path, "0\n1\n4", "classes")
    full = config(
        {"label_weights": label_weights}, {"class_weights": class_weights, "classes": classes}
    )
    logits = torch.tensor([[3.0, 2.0, -1.0, 9.0, 8.0]])
    loss = build_objective(full, NUM_CLASSES).loss(logits, LabelLists.from_lists([[0, 1, 2]]))
    expected = torch.nn.functional.softplus(torch.tensor([-3.0, 1.0])) @ torch.tensor([1.0, 3.0])
    torch.testing.assert_close(loss, expected)
    definition = build_map_definition(full, NUM_CLASSES)
    assert definition.class_weights(NUM_CLASSES).tolist() == [1, 2, 0, 0, 0]
    metric = MeanAveragePrecision(definition)
    metric.update(logits, LabelLists.from_lists([[0, 1, 2, 3]]))
    # Ranked 4, 0, 1: class 0 (weight 1) is a hit at rank 2, class 1 (weight 2) at rank 3.
    assert metric.compute() == {"map@100": pytest.approx((1 * 1 / 2 + 2 * 2 / 3) / 3)}


def test_settings_that_do_not_go_together_are_refused(tmp_path) -> None:
    class_weights = write(tmp_path, "0,1\n1,0", "class_weights")
    classes = write(tmp_path, "1\n4", "classes")
    both = config({}, {"class_weights": class_weights, "classes": classes})
    text = message(build_map_definition, both, NUM_CLASSES)
    assert text.startswith(f"evaluation.class_weights={class_weights!r} weighs every class of")
    for name in ("class_weights", "classes"):
        softmax = config({"objective": "softmax"}, {name: classes})
        text = message(build_map_definition, softmax, NUM_CLASSES)
        assert text.startswith(f"evaluation.{name}={classes!r} is for MAP@k and has no effect")
    text = message(config, {"objective": "softmax", "label_weights": "w"}, {})
    assert text == (
        "training.label_weights = 'w' has no effect with objective softmax; remove it or choose "
        "multilabel"
    )


@pytest.mark.parametrize("section", ["training", "evaluation"])
def test_errors_name_the_setting(tmp_path, section) -> None:
    path = write(tmp_path, "9,1")
    if section == "training":
        text = message(build_objective, config({"label_weights": path}, {}), NUM_CLASSES)
        assert text.startswith(f"training.label_weights={path!r}, line 1: '9,1' is about no class")
        return
    for name in ("class_weights", "classes"):
        text = message(build_map_definition, config({}, {name: path}), NUM_CLASSES)
        assert text.startswith(f"evaluation.{name}={path!r}, line 1: '9,1' ")


def test_label_weights_are_complete(tmp_path) -> None:
    """A class forgotten there would never be trained, and nothing would say so."""
    path = write(tmp_path, "0,1\n1,1\n2,1\n3,1")
    text = message(build_objective, config({"label_weights": path}, {}), NUM_CLASSES)
    assert text.startswith(f"training.label_weights={path!r} has no line for class 4")
