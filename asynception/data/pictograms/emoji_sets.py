"""Emoji of three drawers, with the words of two lists."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from asynception.data.pictograms.concepts import VARIATION_SELECTOR, emoji_concept
from asynception.data.pictograms.packages import (
    EMOJIBASE,
    EMOJILIB,
    FLUENT_3D,
    FLUENT_FLAT,
    GOOGLE,
    PackageFiles,
)
from asynception.data.pictograms.picture import Drawing, Picture
from asynception.data.pictograms.words import split_words

_FLAG_OF_A_PLACE = re.compile(r"1f1[ef].-1f1[ef].|1f3f4-e00.*")
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'


def read_google(files: Mapping[str, PackageFiles]) -> Iterator[Picture]:
    """Google's Noto Emoji, PNG of 64 x 64 pixels."""
    drawings = _by_code_points(files[GOOGLE.name].read(r"img/google/64/[^/]+\.png"))
    yield from _pictures("google", GOOGLE.licence, drawings, files)


def read_fluent_3d(files: Mapping[str, PackageFiles]) -> Iterator[Picture]:
    """Microsoft's Fluent Emoji in 3D, WebP of 256 x 256 pixels.

    Without the flags of places: Microsoft draws none, and the package doesn't say whose it has.
    """
    found = _by_code_points(files[FLUENT_3D.name].read(r"assets/[^/]+\.webp"))
    drawings = {k: v for k, v in found.items() if not _FLAG_OF_A_PLACE.fullmatch(k)}
    yield from _pictures("fluent3d", FLUENT_3D.licence, drawings, files)


def read_fluent_flat(files: Mapping[str, PackageFiles]) -> Iterator[Picture]:
    """Microsoft's flat Fluent Emoji, SVG bodies in a JSON file; chars.json has their characters."""
    package = files[FLUENT_FLAT.name]
    icons, chars = package.json("icons.json"), package.json("chars.json")
    size = {"width": icons["width"], "height": icons["height"]}
    drawings = {
        without_selectors(char): Drawing(
            _SVG.format(**{**size, **icons["icons"][name]}).encode(), is_svg=True
        )
        for char, name in sorted(chars.items())
        if name in icons["icons"]
    }
    yield from _pictures("fluent-emoji-flat", FLUENT_FLAT.licence, drawings, files)


def emoji_words(
    entries: Iterable[Mapping[str, Any]],
    groups: Mapping[str, Mapping[str, str]],
    keywords: Mapping[str, Iterable[str]],
) -> dict[str, frozenset[str]]:
    """Words by code points, without selectors.

    entries, groups: emojibase's. keywords: emojilib's, by emoji. A skin tone has a name of its own
    and everything else of its emoji.
    """
    by_code_points = {
        without_selectors("-".join(f"{ord(c):04x}" for c in emoji)): words
        for emoji, words in keywords.items()
    }
    words: dict[str, frozenset[str]] = {}
    for entry in entries:
        kept = by_code_points.get(without_selectors(entry["hexcode"]), ())
        shared = [*entry.get("tags", ()), *kept, *_groups_of(entry, groups)]
        for variant in [entry, *entry.get("skins", ())]:
            words[without_selectors(variant["hexcode"])] = split_words([variant["label"], *shared])
    return words


def without_selectors(code_points: str) -> str:
    """Code points as '0023-20e3': lower case, four digits at least, no variation selectors.

    In these the packages differ.
    """
    points = re.split("[-_]", code_points.lower())
    return "-".join(p.zfill(4) for p in points if p != VARIATION_SELECTOR)


def _groups_of(entry: Mapping[str, Any], groups: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The names of the entry's group and subgroup, as 'people-body' and 'hand-fingers-open'."""
    for kind in ("group", "subgroup"):
        if kind in entry:
            yield groups[f"{kind}s"][str(entry[kind])]


def _by_code_points(images: Mapping[str, bytes]) -> dict[str, Drawing]:
    return {
        without_selectors(PurePosixPath(path).stem): Drawing(content, is_svg=False)
        for path, content in images.items()
    }


def _pictures(
    source: str,
    licence: str,
    drawings: Mapping[str, Drawing],
    files: Mapping[str, PackageFiles],
) -> Iterator[Picture]:
    """Those of the drawings for whose emoji there are words."""
    emojibase = files[EMOJIBASE.name]
    words = emoji_words(
        emojibase.json("en/data.json"),
        emojibase.json("meta/groups.json"),
        files[EMOJILIB.name].json("dist/emoji-en-US.json"),
    )
    for code_points, drawing in drawings.items():
        if code_points in words:
            concept = emoji_concept(code_points)
            key = f"{source}-{code_points}"
            yield Picture(key, source, licence, concept, words[code_points], drawing)
