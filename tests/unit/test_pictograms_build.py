"""The pictogram set built from tiny packages in the layouts of the real ones."""

import base64
import dataclasses
import hashlib
import io
import json
import sys
import tarfile
from collections import Counter, defaultdict

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from asynception.data.pictograms import building, packages
from asynception.data.pictograms.building import PictogramSettings, Rendered, build, drop_copies
from asynception.data.pictograms.command import pictograms
from asynception.data.pictograms.concepts import is_held_out
from asynception.data.pictograms.picture import Drawing, Picture
from asynception.data.pictograms.rendering import render
from model.errors import InputError
from worker.data.manifest import Manifest

SETTINGS = PictogramSettings(min_count=2, val_share=0.3, shard_num_bytes=20_000)
NOUNS = [f"{noun}{letter}" for letter in "bcdf" for noun in ("bell", "cat", "tree", "shoe", "moon")]
EMOJI = ("1f44b", "1f44c", "1f680", "1f468-200d-1f680", "1f469-200d-1f680")
FLAG = "1f1f3-1f1f4"
ALL_EMOJI = (*EMOJI, FLAG)
TONES = ("", "-1f3fb", "-1f3ff")
BASE = next(
    noun for noun in NOUNS if is_held_out(f"icon:{noun}", 0.3) != is_held_out("icon:strange", 0.3)
)
"""What `strange` is made from: by its own name it would be on the other side of the split."""


def shape(*seed):
    """The body of an SVG that differs with `seed`."""
    x, y, width, height = hashlib.sha256(repr(seed).encode()).digest()[:4]
    return f'<rect x="{x / 16}" y="{y / 16}" width="{1 + width / 30}" height="{1 + height / 30}"/>'


def svg(*seed):
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">{shape(*seed)}</svg>'


def image(suffix, size, *seed):
    colour = tuple(hashlib.sha256(repr(seed).encode()).digest()[:4])
    out = io.BytesIO()
    Image.new("RGBA", (size, size), colour).save(out, suffix, lossless=True)
    return out.getvalue()


def mdi():
    names = [f"{noun}{end}" for noun in NOUNS for end in ("", "-outline", "-off")]
    icons = [
        {"id": n, "baseIconId": n, "name": n, "aliases": [f"old-{n}"], "tags": ["Home / Sky"]}
        for n in names
    ]
    made_from = {"id": "?", "baseIconId": BASE, "name": "strange", "aliases": [], "tags": ["Sky"]}
    files = {f"svg/{name}.svg": svg("mdi", name) for name in [*names, "strange"]}
    return {"meta.json": json.dumps([*icons, made_from]), **files}


def tabler():
    icons = {n: {"name": n, "category": "Arrows", "tags": ["arrow", n, 24]} for n in NOUNS}
    files = {
        f"icons/{s}/{n}.svg": svg("tabler", s, n) for s in ("outline", "filled") for n in NOUNS
    }
    return {"icons.json": json.dumps(icons), "categories/outline/Arrows/x.svg": svg("no"), **files}


def phosphor():
    block = 'readonly name: "{0}";\r\n readonly categories: readonly [IconCategory.MAP];\r\n {1}'
    tags = 'readonly tags: readonly ["*new*", "sky blue"];\r\n'
    icons = "}, {\r\n".join(block.format(noun, tags) for noun in NOUNS)
    files = {
        f"assets/{weight}/{noun}{end}.svg": svg("phosphor", weight, noun)
        for weight, end in (("regular", ""), ("fill", "-fill"), ("duotone", "-duotone"))
        for noun in NOUNS
    }
    types = 'export declare enum IconCategory {\r\n MAP = "maps & travel"\r\n}'
    thin = {f"assets/thin/{NOUNS[0]}-thin.svg": svg("thin")}
    return {"dist/types.d.ts": types, "dist/icons.d.ts": f"[{{\r\n{icons}}}];", **files, **thin}


def lucide():
    files = {f"icons/{noun}.svg": svg("lucide", noun) for noun in [*NOUNS, "former-name"]}
    return {"tags.json": json.dumps({noun: ["sky", "font size"] for noun in NOUNS}), **files}


def emoji_files(folder, suffix, size, selector=""):
    return {
        f"{folder}/{one}{tone}{selector}.{suffix}": image(suffix.upper(), size, folder, one, tone)
        for one in EMOJI
        for tone in TONES
    }


def fluent_3d():
    flag = {f"assets/{FLAG}.webp": image("WEBP", 256, "other flag")}
    return {**emoji_files("assets", "webp", 256, "_fe0f"), **flag}


def fluent_flat():
    names = {f"{one}{tone}": f"emoji-{i}-{tone}" for i, one in enumerate(EMOJI) for tone in TONES}
    body = {n: {"body": f'<g fill="#0f0">{shape("flat", n)}</g>'} for n in names.values()}
    icons = {"icons": body, "width": 32, "height": 32}
    return {"icons.json": json.dumps(icons), "chars.json": json.dumps(names)}


def emojibase():
    entries = [
        {
            "label": f"thing {i}",
            "hexcode": one.upper(),
            "tags": ["sky"],
            "group": 1,
            "skins": [{"label": "thing skin tone", "hexcode": one + tone} for tone in TONES[1:]],
        }
        for i, one in enumerate(ALL_EMOJI)
    ]
    groups = {"groups": {"1": "people-body"}, "subgroups": {}}
    return {"en/data.json": json.dumps(entries), "meta/groups.json": json.dumps(groups)}


CONTENTS = {
    packages.MDI: mdi(),
    packages.TABLER: tabler(),
    packages.PHOSPHOR: phosphor(),
    packages.LUCIDE: lucide(),
    packages.GOOGLE: {
        **emoji_files("img/google/64", "png", 64),
        f"img/google/64/{FLAG}.png": image("PNG", 64, "flag"),
    },
    packages.FLUENT_3D: fluent_3d(),
    packages.FLUENT_FLAT: fluent_flat(),
    packages.EMOJILIB: {"dist/emoji-en-US.json": json.dumps({"👋": ["hello_world"]})},
    packages.EMOJIBASE: emojibase(),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, packages): the archives, and their list with the hashes they have."""
    folder = tmp_path_factory.mktemp("archives")
    pinned = []
    for package, files in CONTENTS.items():
        with tarfile.open(folder / package.archive_name, "w:gz") as tar:
            for name, content in files.items():
                data = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        digest = hashlib.sha512((folder / package.archive_name).read_bytes()).digest()
        integrity = f"sha512-{base64.b64encode(digest).decode()}"
        pinned.append(dataclasses.replace(package, integrity=integrity))
    return folder, tuple(pinned)


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "set"
    return out, build(out, tiny[0], SETTINGS, packages=tiny[1])


def samples_of(out, split):
    """(key, what its JSON says, its PNG) in the order of the shards, as the manifest names them."""
    manifest = Manifest.from_json((out / f"{split}.manifest.json").read_text(), split)
    for shard in manifest.shards:
        with tarfile.open(out / shard.name) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        for (image_name, png), (json_name, text) in zip(members[::2], members[1::2], strict=True):
            assert image_name.removesuffix(".png") == json_name.removesuffix(".json")
            yield json_name.removesuffix(".json"), json.loads(text), png


def test_two_builds_give_the_same_bytes_with_any_number_of_processes(tiny, built, tmp_path):
    build(tmp_path / "again", tiny[0], SETTINGS, packages=tiny[1], num_workers=2)
    first, second = (
        {path.name: path.read_bytes() for path in out.iterdir()}
        for out in (built[0], tmp_path / "again")
    )
    assert first == second
    assert {"train-000001.tar", "val-000000.tar", "labels.txt", "NOTICE.md"} < set(first)


def test_every_picture_with_a_label_is_there_with_its_source_and_licence(built):
    out, summary = built
    found = [*samples_of(out, "train"), *samples_of(out, "val")]
    assert Counter(about["source"] for _, about, _ in found) == summary.num_images
    assert summary.num_images == {
        "mdi": 3 * len(NOUNS) + 1,
        "tabler": 2 * len(NOUNS),
        "phosphor": 3 * len(NOUNS),
        "lucide": len(NOUNS),
        "google": len(EMOJI) * len(TONES) + 1,
        "fluent3d": len(EMOJI) * len(TONES),
        "fluent-emoji-flat": len(EMOJI) * len(TONES),
    }
    licences = {about["source"]: about["licence"] for _, about, _ in found}
    assert licences["mdi"] == licences["google"] == "Apache-2.0"
    assert licences["lucide"] == "ISC"
    for key, about, png in found:
        assert key.startswith(about["source"] + "-")
        with Image.open(io.BytesIO(png)) as picture:
            assert (picture.format, picture.size) == ("PNG", (64, 64))
            assert (picture.mode == "L") == (about["source"] in "mdi tabler phosphor lucide")


def test_the_pictures_of_a_concept_are_on_one_side(built):
    sides = defaultdict(set)
    for split in ("train", "val"):
        for key, *_ in samples_of(built[0], split):
            noun = next((noun for noun in NOUNS if noun in key), None)
            point = next((one[-5:] for one in ALL_EMOJI if one[-5:] in key), None)
            sides[noun or point or BASE].add(split)
    assert all(len(found) == 1 for found in sides.values()), sides
    assert {split for found in sides.values() for split in found} == {"train", "val"}


def test_labels_are_the_frequent_words_of_the_training_images_by_frequency(built):
    out, summary = built
    labels = (out / "labels.txt").read_text().splitlines()
    counts = Counter(i for _, about, _ in samples_of(out, "train") for i in about["labels"])
    order = [(-counts[i], label) for i, label in enumerate(labels)]
    assert order == sorted(order)
    assert min(counts[i] for i in range(len(labels))) >= SETTINGS.min_count
    assert len(labels) == summary.num_labels == len(set(labels))
    assert {"sky", "arrow", "people", "body", "skin", "maps", "outline", "blue"} <= set(labels)
    assert not {"arrows", "new", "24", "thin", "strange"} & set(labels)
    for split, manifest in (("train", summary.train), ("val", summary.val)):
        carried = Counter(i for _, about, _ in samples_of(out, split) for i in about["labels"])
        assert manifest.class_names == tuple(labels)
        np.testing.assert_array_equal(
            manifest.label_counts, [carried[i] for i in range(len(labels))]
        )
        for _, about, _ in samples_of(out, split):
            assert about["labels"] == sorted(set(about["labels"])) != []


def test_the_notice_names_every_package_with_version_and_licence(built):
    text = (built[0] / "NOTICE.md").read_text()
    for package in CONTENTS:
        assert f"| {package.name} {package.version} |" in text
        assert package.copyright in text
        assert f"## {package.licence}" in text or package.licence == "Apache-2.0"


def test_of_equal_pictures_the_one_with_the_most_words_is_kept():
    def rendered(key, words, png):
        drawing = Drawing(b"", is_svg=True)
        return Rendered(Picture(key, "s", "MIT", key, frozenset(words), drawing), png)

    one, two, three = rendered("a", "x", b"1"), rendered("b", "xy", b"1"), rendered("c", "yz", b"1")
    other = rendered("d", "x", b"2")
    assert drop_copies([three, other, one, two]) == [two, other]


def test_pictures_are_laid_on_white_and_gray_only_where_they_have_no_colours():
    def pixels(drawing, size):
        with Image.open(io.BytesIO(render(drawing, size))) as picture:
            return picture.mode, np.asarray(picture)

    frame = svg().replace(shape(), '<rect width="12" height="24"{}/>')
    mode, black = pixels(Drawing(frame.format("").encode(), is_svg=True), 16)
    assert mode == "L"
    np.testing.assert_array_equal(black, np.repeat([[0] * 8 + [255] * 8], 16, axis=0))
    mode, red = pixels(Drawing(frame.format(' fill="#f00"').encode(), is_svg=True), 16)
    assert mode == "RGB"
    assert red[0, 0].tolist() == [255, 0, 0]
    clear = io.BytesIO()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(clear, "PNG")
    mode, white = pixels(Drawing(clear.getvalue(), is_svg=False), 16)
    assert mode == "L"
    assert white.shape == (16, 16)
    assert (white == 255).all()


def test_a_folder_in_use_is_refused_and_left_as_it_is(tiny, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match=r"--out .*: isn't empty"):
        build(tmp_path, tiny[0], SETTINGS, packages=tiny[1])
    with pytest.raises(InputError, match=r"--out .*mine: can't be written to"):
        build(tmp_path / "mine", tiny[0], SETTINGS, packages=tiny[1])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"min_count": 10_000}, "--min-count 10000: no word"), ({"val_share": 1e-9}, "--val-share")],
)
def test_a_set_without_labels_or_held_out_images_is_refused(tiny, tmp_path, changes, message):
    settings = SETTINGS.model_copy(update=changes)
    with pytest.raises(InputError, match=message):
        build(tmp_path / "out", tiny[0], settings, packages=tiny[1])
    assert list((tmp_path / "out").iterdir()) == []


def test_without_the_renderer_one_line_says_how_to_get_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"resvg_py is missing.*`pip install resvg-py`"):
        build(tmp_path / "out", tiny[0], SETTINGS, packages=tiny[1])
    assert not (tmp_path / "out").exists()


def test_the_command_builds_with_its_options_and_tells_the_counts(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "build", lambda *a, **k: build(*a, **k, packages=tiny[1]))
    arguments = ["--out", tmp_path / "set", "--packages", tiny[0], "--size", 16, "--min-count", 2]
    arguments += ["--val-share", 0.3, "--num-workers", 1]
    result = CliRunner().invoke(pictograms, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    _, about, png = next(samples_of(tmp_path / "set", "val"))
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size == (16, 16)
    assert f"{about['source']} " in result.output
    assert "held-out images" in result.output
