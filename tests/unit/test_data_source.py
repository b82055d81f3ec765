import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import InputError
from worker.data.image_folder import ImageFolderSource
from worker.data.open import open_source
from worker.data.source import ImageSource, Sample, iterate_labels
from worker.data.webdataset import WebDatasetSource

IMAGE = b"any bytes: sources do not decode"


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tar_bytes(members)
    path.write_bytes(content if path.suffix == ".tar" else gzip.compress(content))
    return str(path)


def labelled(*labels: object) -> bytes:
    return json.dumps({"labels": list(labels), "source": "test"}).encode()


def write_files(root: Path, files: Mapping[str, bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def all_samples(source: ImageSource) -> list[list[Sample]]:
    return [[source.read(s, i) for i in range(n)] for s, n in enumerate(source.shard_sizes)]


SHARDS: list[dict[str, bytes]] = [
    {
        "b/1.png": b"first",
        "b/1.json": labelled(3, 1, 3),
        "./a.seg.txt": b"ignored",
        "./a.json": labelled(),
        "./a.JPG": b"second" * 200,
        ".png": b"ignored",
        "._1.png": b"ignored",
        "README": b"ignored",
    },
    {"x.cls": b"7\n", "x.webp": b"", "y.json": b'{"label": 2}', "y.cls": b"2", "y.bmp": b"third"},
]
EXPECTED = [
    [Sample("b/1", b"first", (3, 1)), Sample("a", b"second" * 200, ())],
    [Sample("x", b"", (7,)), Sample("y", b"third", (2,))],
]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_plain_and_compressed_shards_give_the_same_samples(tmp_path: Path, suffix: str) -> None:
    paths = [write_tar(tmp_path / f"s-{i}{suffix}", shard) for i, shard in enumerate(SHARDS)]
    source = WebDatasetSource(paths)
    assert source.shard_sizes == (2, 2)
    assert all_samples(source) == EXPECTED
    assert list(iterate_labels(source)) == [(3, 1), (), (7,), (2,)]
    assert all_samples(pickle.loads(pickle.dumps(source))) == EXPECTED


def test_a_folder_of_tars_equals_class_folders(tmp_path: Path) -> None:
    images = {f"{name}/{i}": f"{name} {i}".encode() for name in ("ant", "bee") for i in range(3)}
    shard = {f"{key}.png": image for key, image in images.items()} | {
        f"{key}.cls": str(int(key.startswith("bee"))).encode() for key in images
    }
    tars = open_source(str(Path(write_tar(tmp_path / "tars" / "t-0.tar.gz", shard)).parent))
    folders = open_source(
        write_files(tmp_path / "folders", {f"{key}.png": image for key, image in images.items()})
    )
    from_folders = [s._replace(key=s.key.removesuffix(".png")) for s in all_samples(folders)[0]]
    assert from_folders == all_samples(tars)[0]
    assert folders.class_names == ("ant", "bee")
    assert tars.class_names is None


def test_class_folders_are_sorted_and_read_at_any_depth(tmp_path: Path) -> None:
    files = {"b/2.png": b"1", "b/1/3.JPEG": b"2", "b/notes.txt": b"", "B/1.webp": b"3"}
    root = write_files(tmp_path / "root", files)
    write_files(tmp_path / "elsewhere", {"4.png": b"4"})
    (tmp_path / "root" / "b" / "link").symlink_to(tmp_path / "elsewhere")
    source = ImageFolderSource(root)
    assert source.class_names == ("B", "b")
    assert all_samples(source) == [
        [
            Sample("B/1.webp", b"3", (0,)),
            Sample("b/2.png", b"1", (1,)),
            Sample("b/1/3.JPEG", b"2", (1,)),
            Sample("b/link/4.png", b"4", (1,)),
        ]
    ]


def test_only_so_many_decompressed_shards_are_kept(tmp_path: Path) -> None:
    paths = [
        write_tar(tmp_path / f"s{i}.tgz", {"k.png": b"%d" % i, "k.cls": b"0"}) for i in range(3)
    ]
    source = WebDatasetSource(paths, cached_shards=2)
    assert source.cached_shards == 2
    assert [source.read(i, 0).image for i in (0, 1, 2)] == [b"0", b"1", b"2"]
    for path in paths:
        Path(path).unlink()
    assert [source.read(i, 0).image for i in (1, 2)] == [b"1", b"2"]
    with pytest.raises(InputError, match=r"s0\.tgz: cannot be read"):
        source.read(0, 0)


def test_plain_tars_need_no_cache(tmp_path: Path) -> None:
    source = WebDatasetSource([write_tar(tmp_path / "s.tar", SHARDS[0])])
    assert source.cached_shards is None


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("train-{08..10}.tar", ["08", "09", "10"]),
        ("train-0{8..9}.tar", ["08", "09"]),
        ("{train..val}-08.tar", None),
        ("train-*.tar", ["08", "09", "10"]),
        ("train-0?.tar", ["08", "09"]),
        ("train-09.tar", ["09"]),
        ("[t]rain-{09..09}.tar", None),
    ],
)
def test_patterns_name_shards_in_order(
    tmp_path: Path, pattern: str, keys: list[str] | None
) -> None:
    for number in ("08", "09", "10"):
        write_tar(tmp_path / f"train-{number}.tar", {f"{number}.png": b"", f"{number}.cls": b"1"})
    if keys is None:
        with pytest.raises(InputError):
            open_source(str(tmp_path / pattern))
        return
    source = open_source(str(tmp_path / pattern))
    assert [shard[0].key for shard in all_samples(source)] == keys


PathError = tuple[Callable[[Path], object], str, str]
PATH_ERRORS: list[PathError] = [
    (lambda root: None, "nowhere", "does not exist"),
    (lambda root: None, "no-*.tar", "matches no file"),
    (lambda root: write_tar(root / "a-0.tar", SHARDS[0]), "a-{0..1}.tar", r"a-1\.tar.*not exist"),
    (lambda root: write_tar(root / "a-0.tar", SHARDS[0]), "a-{1..0}.tar", "matches no file"),
    (lambda root: write_files(root, {"a.zip": b""}), "a.zip", r"a\.zip, which is no shard"),
    (lambda root: (root / "empty").mkdir(), "empty", "empty folder"),
    (lambda root: write_files(root, {"d/a.txt": b""}), "d", "neither tars nor class folders"),
    (lambda root: write_files(root, {"d/a/x.txt": b""}), "d", "without images"),
    (lambda root: write_files(root, {"d/train/a/x.png": b""}), "d", "holds splits.*d/train"),
    (lambda root: write_tar(root / "none.tar", {"README": b""}), "none.tar", "no samples"),
    (
        lambda root: [write_tar(root / f"d/{n}-0.tgz", SHARDS[0]) for n in ("train", "val")],
        "d",
        r"several splits \(train-, val-\).*d/train-\*",
    ),
]


@pytest.mark.parametrize(("prepare", "name", "message"), PATH_ERRORS)
def test_useless_paths_are_refused(
    tmp_path: Path, prepare: Callable[[Path], object], name: str, message: str
) -> None:
    prepare(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        open_source(str(tmp_path / name), setting="data.train")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_class_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no class folders"):
        ImageFolderSource(str(tmp_path))
    source = ImageFolderSource(write_files(tmp_path, {"a/1.png": IMAGE}))
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(InputError, match=r"a/1\.png: cannot be read"):
        source.read(0, 0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"k.png": IMAGE}, "'k' lacks a label file"),
        ({"k.json": labelled(1)}, "'k' has labels but no image"),
        ({"k.png": IMAGE, "k.jpg": IMAGE, "k.cls": b"1"}, "'k' has two images"),
        ({"d/k.png": IMAGE, "d/k.json": b"{"}, "'d/k' has a malformed"),
        ({"k.png": IMAGE, "k.json": b"\xff\xfe\xfa"}, "'k' has a malformed"),
        ({"k.png": IMAGE, "k.json": b"[" * 100_000}, "'k' has a malformed"),
        ({"k.png": IMAGE, "k.json": b"[1]"}, "'k' has a .json that is not an object"),
        ({"k.png": IMAGE, "k.json": b'{"label": 1}'}, "'k' lacks a `labels` list"),
        ({"k.png": IMAGE, "k.json": b'{"labels": 1}'}, "'k' has labels 1, not a list"),
        ({"k.png": IMAGE, "k.json": labelled(1, "cat")}, "the label 'cat', a text"),
        ({"k.png": IMAGE, "k.json": labelled(True)}, "the label True, which is no class id"),
        ({"k.png": IMAGE, "k.json": labelled(1.0)}, r"the label 1\.0, which is no class id"),
        ({"k.png": IMAGE, "k.json": labelled(2**63)}, "the label 9223372036854775808"),
        ({"k.png": IMAGE, "k.cls": b"cat"}, "'cat' in its .cls"),
        ({"k.png": IMAGE, "k.cls": b"9" * 5000}, "9999... in its .cls"),
    ],
)
def test_bad_samples_are_refused_by_file_and_key(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    path = write_tar(tmp_path / "s.tar", SHARDS[0] | members)
    with pytest.raises(InputError, match=message) as caught:
        WebDatasetSource([path])
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".tar", ".tar.gz"]))
def test_a_truncated_shard_is_refused(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    content = tar_bytes({"k.png": IMAGE * 40, "k.json": labelled(1), "l.png": b"", "l.cls": b"1"})
    # Headers and rounded contents; without one block of zeros after them the tar has no end.
    end = 4 * 512 + 1536 + 512 + 512 + 512
    if suffix == ".tar.gz":
        content = gzip.compress(content)
        end = len(content)
    path = tmp_path / f"s{suffix}"
    path.write_bytes(content[: data.draw(st.integers(0, end - 1))])
    with pytest.raises(InputError, match="truncated or damaged") as caught:
        WebDatasetSource([str(path)])
    assert str(path) in str(caught.value)
    path.write_bytes(content[:end])
    assert WebDatasetSource([str(path)]).shard_sizes == (2,)


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    content = bytearray(tar_bytes({f"{i}.png": IMAGE for i in range(3)}))
    content[1024:1034] = b"\xff" * 10  # the second header
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"s\.tar: truncated or damaged"):
        WebDatasetSource([str(tmp_path / "s.tar")])


def test_a_shard_cut_after_opening_is_refused(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {"k.png": IMAGE, "k.cls": b"0"}))
    source = WebDatasetSource([str(path)])
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(InputError, match=r"s\.tar: truncated"):
        source.read(0, 0)


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_a_shard_that_cannot_be_opened_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        WebDatasetSource([str(tmp_path / name)])
