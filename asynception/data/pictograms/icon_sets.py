"""Icons of four sets with their names, tags and categories."""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from asynception.data.pictograms.concepts import icon_concept
from asynception.data.pictograms.packages import LUCIDE, MDI, PHOSPHOR, TABLER, PackageFiles
from asynception.data.pictograms.picture import Drawing, Picture
from asynception.data.pictograms.words import split_words

PHOSPHOR_WEIGHTS = ("regular", "fill", "duotone")
"""Three of six: thin, light and bold differ from regular in the width of their lines only."""


def read_mdi(files: Mapping[str, PackageFiles]) -> Iterator[Picture]:
    """Material Design Icons; a variant has the concept of the icon that it was made from."""
    package = files[MDI.name]
    icons = package.json("meta.json")
    drawings = _stems(package.read(r"svg/[^/]+\.svg"))
    names = {icon["id"]: icon["name"] for icon in icons}
    for icon in icons:
        name = icon["name"]
        base = names.get(icon.get("baseIconId"), name)
        words = split_words([name, *icon["aliases"], *icon["tags"]])
        yield _picture("mdi", MDI.licence, name, icon_concept(base), words, drawings[name])


def read_tabler(files: Mapping[str, PackageFiles]) -> Iterator[Picture]:
    """Tabler's icons, outlined and filled."""
    package = files[TABLER.name]
    icons = package.json("icons.json")
    for style in ("outline", "filled"):
        for name, svg in _stems(package.read(rf"icons/{style}/[^/]+\.svg")).items():
            icon = icons[name]
            words = split_words([name, icon["category"], *map(str, icon["tags"])])
            key = f"{style}-{name}"
            yield _picture("tabler", TABLER.licence, key, icon_concept(name), words, svg)


def read_phosphor(files: Mapping[str, PackageFiles]) -> Iterator[Picture]:
    """Phosphor's icons in three weights."""
    package = files[PHOSPHOR.name]
    types, icons = package.text("dist/types.d.ts"), package.text("dist/icons.d.ts")
    words = phosphor_words(types, icons)
    for weight in PHOSPHOR_WEIGHTS:
        for stem, svg in _stems(package.read(rf"assets/{weight}/[^/]+\.svg")).items():
            name = stem.removesuffix(f"-{weight}")
            key, concept = f"{weight}-{name}", icon_concept(name)
            yield _picture("phosphor", PHOSPHOR.licence, key, concept, words[name], svg)


def phosphor_words(types: str, icons: str) -> dict[str, frozenset[str]]:
    """The words of each icon out of the package's declarations in TypeScript.

    types: declares the enums of categories. icons: declares the type of the list of icons.
    """
    categories = {
        f"{enum}.{member}": value
        for enum, body in re.findall(r"enum (\w+) \{(.*?)\}", types, re.DOTALL)
        for member, value in re.findall(r'(\w+) = "([^"]+)"', body)
    }
    words = {}
    for block in re.split(r"\},\s*\{\s", icons):
        names = re.findall(r'\bname: "([^"]+)"', block)  # its own, then perhaps an alias
        tags = re.search(r"tags: readonly \[(.*?)\];", block, re.DOTALL)
        assert names
        assert tags
        found = re.findall(r'"([^"]+)"', tags[1])
        kinds = re.findall(r"\b((?:Icon|Figma)Category\.\w+)", block)
        texts = [tag for tag in found if not tag.startswith("*")]  # "*new*" is no tag
        words[names[0]] = split_words([*names, *texts, *(categories[kind] for kind in kinds)])
    return words


def read_lucide(files: Mapping[str, PackageFiles]) -> Iterator[Picture]:
    """Lucide's icons; other files of the package repeat them under former names."""
    package = files[LUCIDE.name]
    drawings = _stems(package.read(r"icons/[^/]+\.svg"))
    for name, tags in package.json("tags.json").items():
        words = split_words([name, *tags])
        yield _picture("lucide", LUCIDE.licence, name, icon_concept(name), words, drawings[name])


def _stems(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files by their names without folders and suffix."""
    return {PurePosixPath(path).stem: content for path, content in files.items()}


def _picture(
    source: str, licence: str, name: str, concept: str, words: frozenset[str], svg: bytes
) -> Picture:
    return Picture(f"{source}-{name}", source, licence, concept, words, Drawing(svg, is_svg=True))
