"""The set as shards: pictures rendered, copies dropped, labels chosen, concepts split."""

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from asynception.data.pictograms.concepts import by_hash, is_held_out
from asynception.data.pictograms.emoji_sets import read_fluent_3d, read_fluent_flat, read_google
from asynception.data.pictograms.icon_sets import (
    read_lucide,
    read_mdi,
    read_phosphor,
    read_tabler,
)
from asynception.data.pictograms.notice import notice
from asynception.data.pictograms.packages import PACKAGES, Package, PackageFiles, fetch_packages
from asynception.data.pictograms.picture import Picture
from asynception.data.pictograms.rendering import check_renderer, render_all
from asynception.data.pictograms.words import singulars
from asynception.data.shard_writer import ShardWriter
from model.errors import InputError
from model.settings import Settings
from worker.data.manifest import SUFFIX as MANIFEST_SUFFIX
from worker.data.manifest import Manifest

READERS = (
    read_mdi,
    read_tabler,
    read_phosphor,
    read_lucide,
    read_google,
    read_fluent_3d,
    read_fluent_flat,
)


class PictogramSettings(Settings):
    """What the set depends on besides its packages."""

    size: int = Field(default=64, ge=8, le=1024)
    """Pixels of an image's edge."""
    min_count: int = Field(default=5, ge=1)
    """Training images that carry a word at least, for it to be a label."""
    val_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the concepts that is held out."""
    shard_num_bytes: int = Field(default=16_000_000, ge=1)
    """A shard is closed before it grows larger."""


class Rendered(NamedTuple):
    """A picture and its PNG."""

    picture: Picture
    png: bytes


@dataclass(frozen=True)
class Built:
    """What a build has written."""

    num_labels: int
    num_images: Mapping[str, int]
    """By source."""
    train: Manifest
    val: Manifest


def build(
    out: Path,
    archives: Path,
    settings: PictogramSettings,
    *,
    num_workers: int = 1,
    packages: tuple[Package, ...] = PACKAGES,
    report: Callable[[str], None] = lambda _: None,
) -> Built:
    """Build the set into the folder `out`, from the packages in the folder `archives`.

    An interrupted build leaves no manifest in `out`. Raises InputError for an `out` that isn't
    empty, for what `fetch_packages` refuses, without resvg_py, and if a split would be empty.
    """
    check_renderer()
    _check_empty(out)
    files = fetch_packages(packages, archives, report)
    rendered = drop_copies(_render(files, settings.size, num_workers, report))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as unfinished:
        built = _write(rendered, Path(unfinished), settings)
        (Path(unfinished) / "NOTICE.md").write_text(notice(packages), encoding="utf-8")
        for path in sorted(Path(unfinished).iterdir(), key=_manifests_last):
            path.replace(out / path.name)
    return built


def drop_copies(rendered: Iterable[Rendered]) -> list[Rendered]:
    """Each PNG once, by key; of equal ones, that with the most words.

    Norway's flag is Bouvet Island's too: as two concepts they could be on both sides.
    """
    by_png: dict[bytes, Rendered] = {}
    for one in sorted(rendered, key=lambda r: (-len(r.picture.words), r.picture.key)):
        by_png.setdefault(one.png, one)
    return sorted(by_png.values(), key=lambda r: r.picture.key)


def fold_plurals(rendered: Sequence[Rendered]) -> list[Rendered]:
    """With singulars in place of plurals, where the set has both."""
    singular = singulars(itertools.chain.from_iterable(r.picture.words for r in rendered))

    def fold(picture: Picture) -> Picture:
        return replace(picture, words=frozenset(singular.get(w, w) for w in picture.words))

    return [Rendered(fold(picture), png) for picture, png in rendered]


def choose_labels(word_sets: Iterable[frozenset[str]], min_count: int) -> list[str]:
    """Words that at least `min_count` sets hold, most frequent first, equals by the alphabet."""
    counts = Counter(itertools.chain.from_iterable(word_sets))
    frequent = (word for word, count in counts.items() if count >= min_count)
    return sorted(frequent, key=lambda word: (-counts[word], word))


def _render(
    files: Mapping[str, PackageFiles], size: int, num_workers: int, report: Callable[[str], None]
) -> Iterator[Rendered]:
    pictures = [picture for read in READERS for picture in read(files)]
    report(f"rendering {len(pictures):,} pictures")
    drawings = [picture.drawing for picture in pictures]
    return itertools.starmap(
        Rendered, zip(pictures, render_all(drawings, size, num_workers), strict=True)
    )


def _write(rendered: Sequence[Rendered], folder: Path, settings: PictogramSettings) -> Built:
    folded = fold_plurals(rendered)
    train = [r for r in folded if not is_held_out(r.picture.concept, settings.val_share)]
    val = [r for r in folded if is_held_out(r.picture.concept, settings.val_share)]
    labels = choose_labels((r.picture.words for r in train), settings.min_count)
    if not labels:
        raise InputError(
            f"--min-count {settings.min_count}: no word is carried by so many training images, so "
            "there is no label: lower it"
        )
    if not any(not r.picture.words.isdisjoint(labels) for r in val):
        raise InputError(
            f"--val-share {settings.val_share}: no image is held out, so nothing can be evaluated: "
            "raise it"
        )
    text = "".join(f"{label}\n" for label in labels)
    (folder / "labels.txt").write_text(text, encoding="utf-8")
    kept: Counter[str] = Counter()
    manifests = [
        _write_split(name, split, labels, folder, settings.shard_num_bytes, kept)
        for name, split in (("train", train), ("val", val))
    ]
    return Built(len(labels), kept, *manifests)


def _write_split(
    name: str,
    rendered: Sequence[Rendered],
    labels: Sequence[str],
    folder: Path,
    shard_num_bytes: int,
    kept: Counter[str],
) -> Manifest:
    """Write those that carry a label, and count them by source into `kept`.

    In the order of a hash: read in sequence, neighbours don't show the same thing.
    """
    ids = {label: i for i, label in enumerate(labels)}
    with ShardWriter(folder, name, shard_num_bytes=shard_num_bytes, class_names=labels) as writer:
        for picture, png in sorted(rendered, key=lambda r: by_hash(r.picture.key)):
            carried = sorted(ids[word] for word in picture.words if word in ids)
            if carried:
                extra = {"source": picture.source, "licence": picture.licence}
                writer.add(picture.key, png, ".png", carried, extra)
                kept[picture.source] += 1
        return writer.close()


def _check_empty(out: Path) -> None:
    try:
        if not out.exists() or not any(out.iterdir()):
            return
    except OSError as error:
        raise InputError(
            f"--out {out}: can't be written to ({error.strerror}), so nothing is built: name "
            "another folder"
        ) from None
    raise InputError(
        f"--out {out}: isn't empty, and what is there could be taken for the set's: name another "
        "folder, or empty this one"
    )


def _manifests_last(path: Path) -> tuple[bool, str]:
    """A sort key: where there is a manifest, its shards are."""
    return path.name.endswith(MANIFEST_SUFFIX), path.name
