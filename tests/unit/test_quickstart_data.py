"""The image set that ships with the quickstart, and the script that writes it."""

import importlib.util
import io
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
EMOJI = RECIPES / "data" / "emoji"
SCRIPT = RECIPES / "data" / "pack_emoji.py"


def load_script() -> Any:
    """The script as a module: `recipes` is no package."""
    spec = importlib.util.spec_from_file_location("pack_emoji", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


pack = load_script()


def members(shard: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            yield member.name, file.read()


@cache
def shipped(split: str) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """PNG and JSON by key, from all of a split's shards; a key may come once."""
    samples = {}
    for path in sorted(EMOJI.glob(f"{split}-*.tar.gz")):
        files = list(members(path.read_bytes()))
        for (png_name, png), (json_name, about) in zip(files[::2], files[1::2], strict=True):
            key = png_name.removesuffix(".png")
            assert json_name == f"{key}.json"
            assert key not in samples
            samples[key] = (png, json.loads(about))
    return samples


def label_names() -> list[str]:
    return (EMOJI / "labels.txt").read_text().splitlines()


# The shipped files


def test_the_set_is_small_and_says_what_it_is() -> None:
    files = [path for path in EMOJI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_500_000
    notice = (EMOJI / "NOTICE.md").read_text()
    texts = re.findall(r"licences/[\w.-]+\.txt", notice)
    assert sorted(texts) == sorted(f"licences/{path.name}" for path in EMOJI.glob("licences/*"))
    for package in (pack.PICTURES, pack.KEYWORDS, pack.NAMES):
        assert package.replace("@", " ") in notice
    train, val = len(shipped("train")), len(shipped("val"))
    assert f"{train + val:,} pictures" in notice
    assert f"{train:,} to train on, {val:,} held out, {len(label_names())} labels" in notice


def test_the_training_set_has_several_shards_of_almost_one_size() -> None:
    paths = sorted(EMOJI.glob("train-*.tar.gz"))
    assert [path.name for path in paths] == [f"train-{i:05d}.tar.gz" for i in range(4)]
    sizes = [sum(1 for _ in members(path.read_bytes())) // 2 for path in paths]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_sample_decodes_and_has_known_labels(split: str) -> None:
    num_labels = len(label_names())
    for key, (png, about) in shipped(split).items():
        image = Image.open(io.BytesIO(png))
        assert image.size == (64, 64)
        assert "transparency" not in image.info
        image.load()
        assert about["source"] == "google"
        assert about["licence"] == "Apache-2.0"
        labels = about["labels"]
        assert labels, key
        assert labels == sorted(set(labels))
        assert all(0 <= label < num_labels for label in labels)


def test_labels_are_in_the_order_of_their_training_images() -> None:
    names = label_names()
    assert len(set(names)) == len(names) == 200
    counts = Counter(i for _, about in shipped("train").values() for i in about["labels"])
    assert sorted(range(len(names)), key=lambda i: (-counts[i], names[i])) == list(range(200))


def test_no_picture_or_concept_is_on_both_sides() -> None:
    train, val = shipped("train"), shipped("val")
    assert not {png for png, _ in train.values()} & {png for png, _ in val.values()}
    assert not {pack.concept(key) for key in train} & {pack.concept(key) for key in val}
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.2


# The script


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("waving hand: medium-light skin tone", "waving hand medium light skin tone"),
        ("grinning_face :D :) XD g2g", "grinning face xd g2g"),
        ("Côte d’Ivoire", "cote ivoire"),
        ("the man in the box", "man box"),
        ("A b ☺ -", ""),
    ],
)
def test_words_of_a_text(text: str, words: str) -> None:
    assert pack.split_words(text) == frozenset(words.split())


@given(st.text())
def test_words_are_lower_case_long_enough_and_split_no_further(text: str) -> None:
    words = pack.split_words(text)
    assert pack.split_words(" ".join(words)) == words
    for word in words:
        assert len(word) > 1
        assert word == word.lower()
        assert word not in pack.STOP_WORDS
    assert pack.split_words(f"{text} {text}") == words


@pytest.mark.parametrize(
    "variants",
    [
        "👋 👋🏻 👋🏽 👋🏿",
        "🏃 🏃🏿 🏃‍♀️ 🏃🏽‍♂️ 🏃🏽‍♀️‍➡️ 🏃‍➡️",
        "🧑‍⚕️ 👨‍⚕️ 👩🏾‍⚕️",
        "🧑 👨 👩 👩🏻",
        "🕺 💃🏼",
        "🎅 🤶🏽 🧑‍🎄",
        "💏 💏🏽 👩‍❤️‍💋‍👨 👨🏻‍❤️‍💋‍👨🏿",
        "👫 👭 👬🏻 🧑‍🤝‍🧑 👩🏻‍🤝‍👨🏿 🧑🏻‍🤝‍🧑🏿",
        "🤝 🤝🏽 🫱🏻‍🫲🏿",
        "👪 👨‍👩‍👦 🧑‍🧑‍🧒",
        "☺️ ☺",
    ],
)
def test_variants_of_an_emoji_are_one_concept(variants: str) -> None:
    assert len({pack.concept(pack.code_points(emoji)) for emoji in variants.split()}) == 1


def test_other_emoji_are_other_concepts() -> None:
    text = "👋 🤚 🧑 🧒 🧓 👶 🧑‍⚕️ 🧑‍🚀 🏃 🚶 💏 💑 ➡️ ♀️ ♂️ 🏻 🏽 🇫🇷 🇩🇪 🎄 🎅"
    emoji = text.split()
    assert len({pack.concept(pack.code_points(e)) for e in emoji}) == len(emoji)


@given(st.lists(st.sampled_from(["1f44b", "1f9d1", "2764", *sorted(pack.MARKS)]), min_size=1))
def test_the_concept_of_a_concept_is_itself(points: list[str]) -> None:
    concept = pack.concept("-".join(points))
    assert concept
    assert pack.concept(concept) == concept


def test_the_split_holds_out_a_fixed_ninth() -> None:
    keys = [f"{i:x}" for i in range(9000)]
    held_out = [key for key in keys if pack.is_held_out(key)]
    assert 900 < len(held_out) < 1100
    assert held_out[:3] == ["0", "8", "9"]  # in every process, on every machine


def picture(key: str, *words: str) -> Any:
    return pack.Picture(key, frozenset(words), b"png of " + key.encode())


@given(st.permutations([("1", "a"), ("2", "a b"), ("3", "a b"), ("4", "c")]))
def test_of_equal_pictures_one_stays(rows: list[tuple[str, str]]) -> None:
    pngs = {"1": b"x", "2": b"x", "3": b"x", "4": b"y"}
    pictures = [pack.Picture(key, frozenset(words.split()), pngs[key]) for key, words in rows]
    assert [p.key for p in pack.drop_copies(pictures)] == ["2", "4"]


def test_labels_are_the_commonest_words_and_unlabelled_pictures_go() -> None:
    pictures = [picture("1", "b", "a"), picture("2", "b", "c"), picture("3", "d")]
    labels = pack.choose_labels(pictures, 3)
    assert labels == ["b", "a", "c"]
    samples = pack.label_samples(pictures, labels)
    assert {s.key: s.labels for s in samples} == {"1": (0, 1), "2": (0, 2)}
    assert {s.key: s.png for s in samples} == {"1": b"png of 1", "2": b"png of 2"}


@given(st.permutations([picture(f"{i}", "a") for i in range(6)]))
def test_the_order_of_samples_does_not_depend_on_the_order_of_pictures(pictures: Any) -> None:
    expected = pack.label_samples([picture(f"{i}", "a") for i in range(6)], ["a"])
    assert pack.label_samples(pictures, ["a"]) == expected


def test_equal_samples_give_equal_bytes_without_time_or_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = [pack.Sample("1f44b", b"one", (0, 2)), pack.Sample("1f44c", b"", (1,))]
    monkeypatch.setattr("time.time", lambda: 1.0)
    shard = pack.tar_bytes(samples)
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert pack.tar_bytes(samples) == shard
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}
    assert list(members(shard))[:2] == [
        ("1f44b.png", b"one"),
        ("1f44b.json", b'{"labels": [0, 2], "source": "google", "licence": "Apache-2.0"}'),
    ]


def test_skin_tones_have_the_words_of_their_emoji() -> None:
    tone = {"hexcode": "270C-1F3FB", "label": "victory hand: light skin tone"}
    names = [{"hexcode": "270C-FE0F", "label": "victory hand", "tags": ["V"], "skins": [tone]}]
    words = pack.words_of_emoji(names, {"✌": ["victory_hand", "peace"]})
    assert words == {
        "270c": {"victory", "hand", "peace"},
        "270c-1f3fb": {"victory", "hand", "peace", "light", "skin", "tone"},
    }


def encoded(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("side", [64, 72])
def test_pictures_are_laid_on_white(side: int) -> None:
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    image.paste((200, 30, 40, 255), (0, 0, side, side // 2))
    flat = Image.open(io.BytesIO(pack.flatten(encoded(image))))
    assert flat.size == (64, 64)
    rgb = flat.convert("RGB")
    assert rgb.getpixel((32, 10)) == (200, 30, 40)
    assert rgb.getpixel((32, 50)) == (255, 255, 255)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def package(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            add(tar, f"package/{name}", data)


def small_packages(folder: Path, keys: list[str]) -> None:
    """The three packages as npm would leave them, with one emoji for each key."""
    emoji = [chr(int(key, 16)) for key in keys]
    names = [{"hexcode": k.upper(), "label": f"thing {k}", "tags": ["stuff"]} for k in keys]
    words = {e: ["word"] for e in emoji}
    pictures = {
        f"img/google/64/{key}.png": encoded(Image.new("RGBA", (64, 64), (200, i, 0, 255)))
        for i, key in enumerate([*keys, "nameless"])
    }
    other = {"img/google/32/1f400.png": b"", "img/google/64/readme.txt": b""}
    package(folder / "emojibase-data-17.0.0.tgz", {"en/data.json": json.dumps(names).encode()})
    package(folder / "emojilib-4.0.3.tgz", {"dist/emoji-en-US.json": json.dumps(words).encode()})
    package(folder / "emoji-datasource-google-16.0.0.tgz", pictures | other)


def test_the_command_writes_the_set_from_packages_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # npm cannot be reached
    keys = [f"{i:x}" for i in range(0x1F400, 0x1F440)]
    small_packages(tmp_path, keys)
    for out in ("once", "twice"):
        arguments = ["--packages", str(tmp_path), "--out", str(tmp_path / out)]
        result = CliRunner().invoke(pack.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "once").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "twice").iterdir()}
    assert written["labels.txt"].startswith(b"stuff\nthing\nword\n")
    stored = {n for name, data in written.items() if "tar" in name for n, _ in members(data)}
    assert stored == {f"{key}{suffix}" for key in keys for suffix in (".png", ".json")}
