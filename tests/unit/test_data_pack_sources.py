"""What folders, tables and Open Images' files list, and how their labels become ids."""

import random

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from asynception.data.image_folders import list_image_folder
from asynception.data.listing import key_of
from asynception.data.open_images import list_open_images
from asynception.data.pack import pack
from asynception.data.pack_plan import PackSettings
from asynception.data.tables import list_table
from asynception.data.vocabulary import Vocabulary
from model.errors import InputError
from worker.data.webdataset import WebDatasetSource

SETTINGS = PackSettings(keep_unlabelled=True)
PARTS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)


def images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def packed(listing, out, settings=SETTINGS, vocabulary=None):
    """(labels by image, manifest, result)."""
    result = pack(listing, out, settings, vocabulary=vocabulary)
    manifest = result.manifests["train"]
    source = WebDatasetSource([str(out / shard.name) for shard in manifest.shards])
    found = [source.read(s, i) for s, n in enumerate(source.shard_sizes) for i in range(n)]
    return {sample.image.decode(): sample.labels for sample in found}, manifest, result


@given(a=st.lists(PARTS, min_size=1, max_size=3), b=st.lists(PARTS, min_size=1, max_size=3))
def test_keys_are_as_different_as_paths_and_survive_a_reader(a, b):
    paths = [
        "/".join(["r", *(part for part in parts if part not in (".", ".."))]) + ".jpg"
        for parts in (a, b)
    ]
    keys = [key_of(path) for path in paths]
    assert (keys[0] == keys[1]) == (paths[0] == paths[1])
    assert "." not in keys[0].rpartition("/")[2]


def test_keys_stay_readable():
    assert key_of("cat/00.jpg") == "cat/00"
    assert key_of("/data/v1.0/a.b.jpg") == "data/v1.0/a%2Eb"
    assert key_of("../x/./y/../50%.png") == "%2E%2E/x/50%25"


def test_a_table_s_rows_of_one_image_are_taken_together(tmp_path):
    images(tmp_path, "a.jpg", "b/c.png", "d.jpg")
    table = tmp_path / "list.csv"
    table.write_text(
        '\ufeffid,file,tags\n1,a.jpg,red | round\n2,b/c.png,"red"\n3,a.jpg,small|red\n4,d.jpg,\n',
        encoding="utf-8",
    )
    listing = list_table(table, path_column="file", labels_column="tags")
    found, manifest, _ = packed(listing, tmp_path / "out")
    assert manifest.class_names == ("red", "round", "small")
    assert manifest.label_counts.tolist() == [2, 1, 1]
    assert found == {"a.jpg": (0, 1, 2), "b/c.png": (0,), "d.jpg": ()}
    assert (tmp_path / "out" / "labels.txt").read_text() == "red\nround\nsmall\n"


@pytest.mark.parametrize(
    "labels",
    [
        pyarrow.array([["x", "y"], ["y"], None]),
        pyarrow.array(["x|y", "y", None]),
        pyarrow.array(["x|y", "y", None]).dictionary_encode(),
    ],
)
def test_parquet_holds_lists_or_texts(labels, tmp_path):
    images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    table = pyarrow.table({"path": ["a.jpg", "b.jpg", "c.jpg"], "labels": labels})
    parquet.write_table(table, tmp_path / "list.parquet")
    found, manifest, _ = packed(list_table(tmp_path / "list.parquet"), tmp_path / "out")
    assert manifest.class_names == ("y", "x")
    assert found == {"a.jpg": (0, 1), "b.jpg": (0,), "c.jpg": ()}


def test_ids_stay_what_they_are(tmp_path):
    images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.csv").write_text("path,labels\na.jpg,7|0\nb.jpg,3\n")
    ids = pyarrow.table({"path": ["a.jpg", "b.jpg"], "labels": [[7, 0], [3]]})
    parquet.write_table(ids, tmp_path / "list.parquet")
    for name, kind in [("list.csv", "ids"), ("list.parquet", "auto")]:
        listing = list_table(tmp_path / name, label_kind=kind)
        found, manifest, _ = packed(listing, tmp_path / f"{name}.out")
        assert found == {"a.jpg": (0, 7), "b.jpg": (3,)}
        assert len(manifest.label_counts) == 8
        assert manifest.class_names is None
        assert not (tmp_path / f"{name}.out" / "labels.txt").exists()
    with pytest.raises(InputError, match="label '7', a number: say with --label-kind"):
        packed(list_table(tmp_path / "list.csv"), tmp_path / "auto")
    found, manifest, _ = packed(
        list_table(tmp_path / "list.csv", label_kind="names"), tmp_path / "n"
    )
    assert manifest.class_names == ("0", "3", "7")


def test_a_vocabulary_is_kept_to(tmp_path):
    images(tmp_path, "a.jpg", "b.jpg")
    table = tmp_path / "list.csv"
    table.write_text("path,labels\na.jpg,red|green\nb.jpg,blue\n")
    vocabulary = Vocabulary(("green", "none", "red"))
    with pytest.raises(InputError, match=r"b\.jpg \(line 3\) has the label 'blue'"):
        packed(list_table(table), tmp_path / "1", vocabulary=vocabulary)
    settings = PackSettings(unknown_labels="drop")
    found, manifest, result = packed(list_table(table), tmp_path / "2", settings, vocabulary)
    assert found == {"a.jpg": (0, 2)}
    assert manifest.label_counts.tolist() == [1, 0, 1]
    assert result.left_out == {"labels outside the vocabulary": 1, "images without a label": 1}
    other = PackSettings(split="val")
    with pytest.raises(InputError, match="is the vocabulary of other shards"):
        pack(list_table(table), tmp_path / "2", other)


def test_rare_labels_are_dropped_and_counted(tmp_path):
    names = [f"{i}.jpg" for i in range(6)]
    images(tmp_path, *names)
    rows = [
        f"{name},{'|'.join(['all', 'two' if i < 2 else f'own{i}'])}" for i, name in enumerate(names)
    ]
    random.Random(0).shuffle(rows)
    (tmp_path / "list.csv").write_text("path,labels\n" + "\n".join(rows))
    settings = PackSettings(min_count=2)
    found, manifest, result = packed(list_table(tmp_path / "list.csv"), tmp_path / "out", settings)
    assert manifest.class_names == ("all", "two")
    assert found == {name: (0, 1) if i < 2 else (0,) for i, name in enumerate(names)}
    assert result.left_out == {"labels of too few samples": 4}


def test_open_images_files(tmp_path):
    images(tmp_path, "images/aa.jpg", "images/bb.jpg")
    (tmp_path / "classes.csv").write_text(
        'LabelName,DisplayName\n/m/1,Cat\n/m/2,Turkey\n/m/3,Turkey\n/m/4,"Jay, blue"\n'
    )
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "ImageID,Source,LabelName,Confidence\naa,verification,/m/1,1\naa,crowdsource,/m/1,1.0\n"
        "aa,machine,/m/2,0.4\naa,verification,/m/3,0.5\nbb,verification,/m/1,1\n"
        "bb,verification,/m/4,0\nbb,machine,/m/9,0.9\ncc,machine,/m/1,0.9\n"
    )

    def listing(vocabulary=None):
        files = (labels, tmp_path / "classes.csv", tmp_path / "images")
        return list_open_images(*files, vocabulary=vocabulary)

    with pytest.raises(InputError, match=r"cc\.jpg: listed by .*, but no such file"):
        packed(listing(), tmp_path / "0")
    settings = PackSettings(max_missing=1)
    found, manifest, result = packed(listing(), tmp_path / "1", settings)
    assert manifest.class_names == ("Cat", "/m/9", "Turkey (/m/3)")
    assert found == {"images/aa.jpg": (0, 2), "images/bb.jpg": (0, 1)}
    assert result.left_out == {
        "images that aren't there": 1,
        "labels of confidence below 0.5": 2,
    }
    by_mid = Vocabulary(("/m/9", "/m/3", "/m/1"))
    found, manifest, _ = packed(listing(by_mid), tmp_path / "2", settings, by_mid)
    assert found == {"images/aa.jpg": (1, 2), "images/bb.jpg": (0, 2)}


def test_a_folder_of_splits_is_read_by_split(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    images(root, "train/b/1.jpg", "train/a/x/2.png", "train/a/notes.txt", "val/a/3.jpg")
    found, manifest, result = packed(list_image_folder(root, "train"), out)
    assert found == {"train/b/1.jpg": (1,), "train/a/x/2.png": (0,)}
    assert manifest.class_names == ("a", "b")
    assert result.left_out == {"files that aren't images": 1}
    with pytest.raises(InputError, match="--split='test' isn't among the splits"):
        list_image_folder(root, "test")
    vocabulary = Vocabulary.read(out / "labels.txt")
    settings = PackSettings(split="val")
    pack(list_image_folder(root, "val"), out, settings, vocabulary=vocabulary)
    assert (out / "val.manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,labels\na.jpg,x\n", "has no column 'path', its first line has 'file', 'labels'"),
        ("", "has no column 'path', its first line has nothing"),
        ("path,labels\na.jpg\n", "line 2 has 1 columns"),
        ("path,labels\na.txt,x\n", r"'a\.txt' doesn't end in"),
        ("path,labels\ns3://b/a.jpg,x\n", "is no path of a file"),
        ('path,labels\na.jpg,"x\n', "isn't CSV"),
        ("path,labels\na.jpg,x\na.png,y\n", "would both have the key 'a'"),
        ("path,labels\nmissing.jpg,x\n", "no such file"),
        (b"path,labels\n\xff.jpg,x\n", "isn't UTF-8"),
        ("path,labels\n", "leaves no"),
    ],
)
def test_bad_tables_are_refused_in_one_line(text, message, tmp_path):
    images(tmp_path, "a.jpg", "a.png")
    table = tmp_path / "list.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as error:
        packed(list_table(table), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / ".pack-train").exists()


@pytest.mark.parametrize("label", ["red", "-1", "1.5", "12345678901", "²"])
def test_texts_where_ids_are_expected_are_refused(label, tmp_path):
    images(tmp_path, "a.jpg")
    (tmp_path / "list.csv").write_text(f"path,labels\na.jpg,{label}\n", encoding="utf-8")
    with pytest.raises(InputError, match="no class id: number classes from 0"):
        packed(list_table(tmp_path / "list.csv", label_kind="ids"), tmp_path / "out")


def test_ids_outside_the_classes_are_refused(tmp_path):
    images(tmp_path, "a.jpg")
    (tmp_path / "list.csv").write_text("path,labels\na.jpg,4\n")
    listing = list_table(tmp_path / "list.csv", label_kind="ids")
    with pytest.raises(InputError, match=r"label '4', outside 0\.\.3"):
        packed(listing, tmp_path / "out", PackSettings(num_classes=4))


def test_a_damaged_parquet_is_refused(tmp_path):
    (tmp_path / "list.parquet").write_bytes(b"PAR1nothing")
    with pytest.raises(InputError, match="isn't a whole Parquet file"):
        packed(list_table(tmp_path / "list.parquet"), tmp_path / "out")


@pytest.mark.parametrize("text", ["a\n\nb\n", "a\nb\na\n", "", "a\n \n"])
def test_bad_vocabularies_are_refused(text, tmp_path):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(InputError, match=r"labels\.txt: line"):
        Vocabulary.read(tmp_path / "labels.txt")


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1).filter(
            str.strip
        ),
        min_size=1,
        unique=True,
    )
)
def test_vocabularies_read_as_they_were_written(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("v") / "labels.txt"
    vocabulary = Vocabulary.checked(names, "it")
    path.write_bytes(vocabulary.to_text())
    assert Vocabulary.read(path) == vocabulary
