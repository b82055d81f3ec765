"""A user's own data set: loaded by file, each kind of sample, one line for what is wrong."""

import logging
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from model.user_code import UserFunction, read_user_function
from worker.data.source import iterate_labels
from worker.data.transform import Transform
from worker.data.user_dataset import UserDatasetSource, is_user_dataset

PATH = "/nowhere/mine.py"

HEAD = """
import io
import numpy as np
import torch
from PIL import Image

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)

class Samples:
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()

"""
HEAD_LINES = HEAD.count("\n")
PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def function_of(body, setting="data.train"):
    return UserFunction(PATH, "make", HEAD + body, setting)


def source_of(body, split="train"):
    return UserDatasetSource(function_of(body), split)


def source_of_samples(*samples):
    return source_of(f"def make():\n    return Samples([{', '.join(samples)}])\n")


def refusal(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def labels_of(source):
    return list(iterate_labels(source))


@pytest.mark.parametrize(
    "image",
    [
        "PIXELS",
        "np.asfortranarray(PIXELS)",
        "Image.fromarray(PIXELS)",
        "Image.fromarray(PIXELS).convert('RGBA')",
        "Image.open(io.BytesIO(png(Image.fromarray(PIXELS))))",
        "torch.from_numpy(PIXELS).permute(2, 0, 1)",
        "png(Image.fromarray(PIXELS))",
        "bytearray(png(Image.fromarray(PIXELS)))",
        "memoryview(png(Image.fromarray(PIXELS)))",
    ],
)
def test_every_kind_of_image_shows_the_same(image):
    found = source_of_samples(f"({image}, 2)").read(0, 0)
    assert (found.key, found.labels) == ("mine.py[0]", (2,))
    if isinstance(found.image, bytes):
        decoded = Transform(5).decode(found.image)
        assert np.array_equal(decoded, Transform(5).decode(PIXELS))
    else:
        assert found.image.dtype == np.uint8
        assert found.image.flags.c_contiguous
        assert np.array_equal(found.image, PIXELS)


@pytest.mark.parametrize("image", ["PIXELS[:, :, 1]", "Image.fromarray(PIXELS[:, :, 1])"])
def test_grey_is_repeated_for_each_colour(image):
    found = source_of_samples(f"({image}, 2)").read(0, 0)
    assert np.array_equal(found.image, np.stack([PIXELS[:, :, 1]] * 3, axis=2))


def test_what_is_transparent_shows_white():
    image = "Image.new('RGBA', (3, 2), (9, 9, 9, 0))"
    found = source_of_samples(f"({image}, 2)").read(0, 0)
    assert (found.image == 255).all()


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("3", (3,)),
        ("np.int64(3)", (3,)),
        ("torch.tensor(3)", (3,)),
        ("[3, 1]", (3, 1)),
        ("(3, np.uint8(1), torch.tensor(3))", (3, 1)),
        ("np.array([], np.int32)", ()),
        ("[0, 1]", (0, 1)),
    ],
)
def test_labels_are_ids_each_once(label, expected):
    source = source_of_samples(f"(PIXELS, {label})")
    assert source.read(0, 0).labels == expected
    assert source.labels(0, 0) == expected


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ("(PIXELS, -1)", "the label -1, which is no class id"),
        ("(PIXELS, 2**31)", "the label 2147483648, which"),
        ("(PIXELS, True)", "the label True, which"),
        ("(PIXELS, 1.0)", r"the label 1\.0, which"),
        ("(PIXELS, 'cat')", "the label 'cat', which"),
        ("(PIXELS, torch.ones(3))", r"the label 1\.0, which"),
        ("(PIXELS, [0, 1, 0, 0])", "4 zeros and ones"),
        ("(PIXELS, {'boxes': []})", "the label {'boxes': "),
        ("(PIXELS,)", "is tuple of length 1 where"),
        ("PIXELS", r"is ndarray uint8 \(4, 6, 3\) where"),
        ("(PIXELS / 255, 1)", r"ndarray float64 \(4, 6, 3\) for an image"),
        ("(PIXELS.transpose(2, 0, 1), 1)", r"ndarray uint8 \(3, 4, 6\) for"),
        ("(PIXELS[:0], 1)", r"ndarray uint8 \(0, 6, 3\) for"),
        ("(PIXELS[0, 0], 1)", r"ndarray uint8 \(3,\) for"),
        ("(torch.rand(3, 4, 6), 1)", r"Tensor torch\.float32 \(3, 4, 6\) for"),
        ("(torch.from_numpy(PIXELS), 1)", r"Tensor torch\.uint8 \(4, 6, 3\) for"),
        ("('cat.png', 1)", "has str for an image"),
        ("(Image.new('F', (2, 2)), 1)", "an image of mode F"),
        ("(Image.new('I;16', (2, 2)), 1)", "an image of mode I;16"),
    ],
)
def test_a_wrong_sample_is_named(sample, reason):
    source = source_of_samples("(PIXELS, 0)", sample)
    source.read(0, 0)
    with pytest.raises(InputError, match=rf"^data\.train {PATH}:make: sample 1 .*{reason}"):
        source.read(0, 1)


def test_what_a_sample_raises_is_shown_with_its_index_and_line():
    body = (
        "class Broken(Samples):\n    def __getitem__(self, index):\n"
        "        raise RuntimeError('no\\nimage')\ndef make():\n    return Broken([0, 0])\n"
    )
    text = refusal(source_of(body).read, 0, 1)
    where = f"failed at line {HEAD_LINES + 3}"
    expected = f"data.train {PATH}:make: sample 1 {where}: RuntimeError: no image"
    assert text.startswith(expected)
    noise = "Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))"
    cut = f"Image.open(io.BytesIO(png({noise})[:2000]))"
    text = refusal(source_of_samples(f"({cut}, 0)").read, 0, 0)
    assert "the image of sample 0 failed: OSError: " in text
    assert source_of_samples("(b'damaged', 0)").read(0, 0).image == b"damaged"


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(2, 99), max_size=4, unique=True), min_size=1, max_size=30),
    st.sampled_from(["", "targets", "labels"]),
)
def test_listed_labels_equal_those_of_the_samples(rows, name):
    listed = f"\n    ds.{name} = {rows!r}" if name else ""
    body = f"def make():\n    ds = Samples([(PIXELS, row) for row in {rows!r}]){listed}\n"
    source = source_of(body + "    return ds\n")
    assert labels_of(source) == [tuple(row) for row in rows]
    assert [source.read(0, index).labels for index in range(len(rows))] == labels_of(source)


COUNTING = """
READ = []
class Counting(Samples):
    def __getitem__(self, index):
        READ.append(index)
        return PIXELS, self.samples[index]
def make():
    ds = Counting([i % 7 for i in range(1000)])
    ds.targets = {targets}
    return ds
"""
EXPECTED = [(i % 7,) for i in range(1000)]


@pytest.mark.parametrize(
    ("targets", "is_used"),
    [
        ("ds.samples", True),
        ("np.array(ds.samples)", True),
        ("torch.tensor(ds.samples)", True),
        ("[[i] for i in ds.samples]", True),
        ("ds.samples[:999]", False),
        ("[i + 1 for i in ds.samples]", False),  # of a target_transform
        ("[str(i) for i in ds.samples]", False),
        ("'x' * 1000", False),
        ("7", False),
        ("lambda: 7", False),
        ("None", False),
    ],
)
def test_samples_are_only_read_where_targets_are_not_their_labels(caplog, targets, is_used):
    function = function_of(COUNTING.format(targets=targets))
    source = UserDatasetSource(function, "train")
    read = function.load().__globals__["READ"]
    read.clear()
    with caplog.at_level(logging.WARNING):
        assert labels_of(source) == EXPECTED
    assert ("all 1000 samples are read" in caplog.text) == (not is_used)
    assert (len(read) < 100) == is_used
    num_read = len(read)
    assert labels_of(source) == EXPECTED
    assert len(read) == num_read, "labels are collected once"


def test_workers_read_no_labels_beforehand():
    function = function_of(COUNTING.format(targets="None"))
    source = UserDatasetSource(function, "train")
    read = function.load().__globals__["READ"]
    read.clear()
    source.read(0, 5)
    assert read == [5]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("Samples([(PIXELS, 0)] * len(CALLS))", "has 2 samples at a later call and had 1"),
        ("Samples([(PIXELS, len(CALLS))] * 9)", "gives sample 0 other labels"),
        (
            "Samples([(PIXELS, i * (i < 9 or len(CALLS) == 1)) for i in range(10)])",
            "gives sample 9 other labels",
        ),
        ("Growing([])", "has 2 samples at a later call and had 1"),
    ],
)
def test_samples_that_change_between_calls_are_refused(made, reason):
    growing = (
        "class Growing(Samples):\n    def __len__(self):\n"
        "        self.samples.append((PIXELS, 0))\n        return len(self.samples)\n"
    )
    make = f"CALLS = []\ndef make():\n    CALLS.append(0)\n    return {made}\n"
    assert reason in refusal(source_of(growing + make).labels, 0, 0)


@pytest.mark.parametrize("parameters", ["split", "split='val'", "*, split", "**settings"])
def test_the_split_is_given_to_a_function_that_takes_it(parameters):
    split = "settings['split']" if "settings" in parameters else "split"
    label = f"['val', 'train'].index({split})"
    body = f"def make({parameters}):\n    return Samples([(PIXELS, {label})])\n"
    assert labels_of(source_of(body, "train")) == [(1,)]
    assert labels_of(source_of(body, "val")) == [(0,)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def make():\n    return iter([])\n", "returned a list_iterator without __len__"),
        ("def make():\n    return {1, 2}\n", "returned a set without __getitem__"),
        ("def make():\n    return Samples([])\n", "returned an empty Dataset"),
        ("def make():\n    return Samples(3)\n", f"length failed at line {HEAD_LINES - 9}: Type"),
        ("def make():\n    return {}['gone']\n", f"failed at line {HEAD_LINES + 2}: KeyError"),
        ("import not_there_at_all\n", f"failed at line {HEAD_LINES + 1}: ModuleNotFoundError"),
        ("def make(:\n", "failed: SyntaxError"),
        (
            "def make(root):\n    pass\n",
            "but doesn't take that: missing a required argument: 'root'",
        ),
        ("def built():\n    pass\n", "defines no function 'make'"),
    ],
)
def test_what_is_no_data_set_is_refused(body, reason):
    assert reason in refusal(source_of, body)


def test_a_file_that_failed_is_not_remembered_as_loaded():
    before = set(sys.modules)
    for _ in range(2):
        assert "ValueError: once" in refusal(source_of, "raise ValueError('once')")
    assert {name for name in set(sys.modules) - before if "asynception" in name} == set()


def test_the_text_travels_and_not_the_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + "def make():\n    return Samples([(PIXELS, 5)])\n")
    source = UserDatasetSource(read_user_function(f"{path}:make", "data.train"), "train")
    sent = pickle.dumps(source)
    path.write_text("raise SystemError('changed since')")
    received = pickle.loads(sent)
    path.unlink()
    assert labels_of(received) == [(5,)]
    assert np.array_equal(received.read(0, 0).image, PIXELS)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("mine.py:make", True),
        ("mine.py", True),
        ("mine.py:", True),
        ("/a/mine.py:make/x.tar", False),
        ("/a/mine.pyc", False),
        ("s3://bucket/train-{00000..00006}.tar", False),
    ],
)
def test_files_of_python_are_known_by_their_names(path, expected):
    assert is_user_dataset(path) == expected


@pytest.mark.parametrize("value", ["mine.py", ":make", "mine.py:", "mine.py:a b"])
def test_a_setting_that_names_no_function_is_refused(value):
    text = refusal(read_user_function, value, "data.val")
    assert text.startswith(f"data.val = {value!r} names no function")


def test_a_missing_file_is_named(tmp_path):
    assert "absent.py" in refusal(read_user_function, f"{tmp_path}/absent.py:make", "data.val")


THREADED = """
import threading
MEETING = threading.Barrier(2)
class Threaded(Samples):
    thread_safe = {thread_safe}
    inside = 0
    most = 0
    def __getitem__(self, index):
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            if self.thread_safe is True:
                MEETING.wait(30)  # passes only while two threads are here
            for _ in range(3000):
                pass  # room for another thread to come in
            return PIXELS, index
        finally:
            self.inside -= 1
def make():
    global DATASET
    DATASET = Threaded(range(64))
    return DATASET
"""


@pytest.mark.parametrize("thread_safe", ["True", "False", "1"])
def test_samples_are_read_one_at_a_time_unless_the_data_set_allows_more(thread_safe):
    function = function_of(THREADED.format(thread_safe=thread_safe))
    source = UserDatasetSource(function, "train")
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda index: source.read(0, index).labels, range(64)))
    finally:
        sys.setswitchinterval(interval_s)
    assert found == [(index,) for index in range(64)]
    dataset = function.load().__globals__["DATASET"]
    assert (dataset.most > 1) == (thread_safe == "True")


def test_labels_are_collected_once_for_all_threads():
    function = function_of(COUNTING.format(targets="None"))
    source = UserDatasetSource(function, "train")
    read = function.load().__globals__["READ"]
    read.clear()
    start = threading.Barrier(4)

    def first(index):
        start.wait(30)
        return source.labels(0, index)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(first, range(4))) == EXPECTED[:4]
    assert len(read) < 1100
