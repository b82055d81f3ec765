"""Write the quickstart's image set, `recipes/data/emoji`: about 3,600 emoji with their words.

    python recipes/data/pack_emoji.py --packages /tmp/emoji-packages

Takes about a minute and 80 MB of download with `npm`; packages already in the folder are reused.
The pictures are Google's Noto Emoji, the words come from two MIT-licensed lists:
`emoji/NOTICE.md` has the licences. The same packages, Pillow and zlib give the same bytes.

The set has several labels an image with a long tail, as JFT has. Alike pictures of one concept,
such as an emoji in five skin tones, are on one side of the split: with a split by picture a
network that remembers the training images would look as if it had learned something.
"""

import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image

PICTURES = "emoji-datasource-google@16.0.0"
KEYWORDS = "emojilib@4.0.3"
NAMES = "emojibase-data@17.0.0"

SOURCE = "google"
LICENCE = "Apache-2.0"

NUM_LABELS = 200
NUM_TRAIN_SHARDS = 4
VAL_ONE_IN = 9
IMAGE_SIZE = 64
NUM_COLOURS = 48
"""Colours a picture keeps: with the full range the set would take 13 MB, not 4."""

STOP_WORDS = frozenset(
    re.findall(r"\w+", "an and at by for from in is it no not of oh on or the to with you")
)

VARIATION_SELECTOR = "fe0f"
SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
JOINER, FEMALE, MALE, RIGHTWARDS = "200d", "2640", "2642", "27a1"
MARKS = frozenset([VARIATION_SELECTOR, *SKIN_TONES, JOINER, FEMALE, MALE, RIGHTWARDS])
"""Code points that vary an emoji and leave what it shows."""

SAME_PERSON = {
    "1f468": "1f9d1",  # man, woman: adult
    "1f469": "1f9d1",
    "1f466": "1f9d2",  # boy, girl: child
    "1f467": "1f9d2",
    "1f474": "1f9d3",  # old man, old woman: older adult
    "1f475": "1f9d3",
    "1f478": "1f934",  # princess: prince
    "1f483": "1f57a",  # woman dancing: man dancing
    "1f936": "1f385",  # Mrs. Claus: Santa Claus
    "1f9d1-1f384": "1f385",  # Mx Claus
    "1f46c": "1f46b",  # two men, two women, two people holding hands
    "1f46d": "1f46b",
    "1f9d1-1f91d-1f9d1": "1f46b",
    "1f9d1-2764-1f48b-1f9d1": "1f48f",  # kiss
    "1f9d1-2764-1f9d1": "1f491",  # couple with heart
    "1faf1-1faf2": "1f91d",  # handshake
    "1f9d1-1f9d1-1f9d2": "1f46a",  # family
}
"""Code points that differ from another concept's in gender, or in how they are written, only."""


@dataclass(frozen=True)
class Picture:
    """One emoji picture: its code points in hexadecimal joined by '-', its words, its PNG."""

    key: str
    words: frozenset[str]
    png: bytes


@dataclass(frozen=True)
class Sample:
    """What goes into a shard: a key, a PNG and the ids of its labels, ascending."""

    key: str
    png: bytes
    labels: tuple[int, ...]


def split_words(text: str) -> frozenset[str]:
    """Lower-case words of `text`, without accents, stop words and words of one letter."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    words = re.findall(r"[^\W_]+", plain.lower())
    return frozenset(word for word in words if len(word) > 1 and word not in STOP_WORDS)


def code_points(emoji: str) -> str:
    """The emoji's code points as a picture's file name has them: '1f44b-1f3fb'."""
    return "-".join(f"{ord(character):04x}" for character in emoji)


def without_selector(key: str) -> str:
    """The key without variation selectors, in which the packages differ."""
    return "-".join(p for p in key.lower().split("-") if p != VARIATION_SELECTOR)


def concept(key: str) -> str:
    """The key of what a picture shows, whatever its skin tone, gender or direction."""
    points = key.split("-")
    kept = [SAME_PERSON.get(p, p) for p in points if p not in MARKS] or points
    joined = "-".join(kept)
    return SAME_PERSON.get(joined, joined)


def by_hash(key: str) -> bytes:
    """A sort key that shuffles the same way every time."""
    return hashlib.sha256(key.encode()).digest()


def is_held_out(concept_key: str) -> bool:
    """Whether a concept is in the validation split: a hash, so the others don't matter."""
    return int.from_bytes(by_hash(concept_key)[:8], "big") % VAL_ONE_IN == 0


def drop_copies(pictures: Iterable[Picture]) -> list[Picture]:
    """Each PNG once, by key; of equal ones, that with the most words.

    Norway's flag is Bouvet Island's too: as two concepts they could be on both sides.
    """
    by_png: dict[bytes, Picture] = {}
    for picture in sorted(pictures, key=lambda p: (-len(p.words), p.key)):
        by_png.setdefault(picture.png, picture)
    return sorted(by_png.values(), key=lambda p: p.key)


def choose_labels(pictures: Iterable[Picture], num_labels: int) -> list[str]:
    """The commonest words, most frequent first, equals by the alphabet."""
    counts = Counter(word for picture in pictures for word in picture.words)
    return sorted(counts, key=lambda word: (-counts[word], word))[:num_labels]


def label_samples(pictures: Iterable[Picture], labels: Sequence[str]) -> list[Sample]:
    """The pictures that carry at least one of `labels`, with the ids of those they carry.

    In the order of a hash: read in sequence, neighbours don't show the same thing.
    """
    ids = {label: i for i, label in enumerate(labels)}
    samples = (
        Sample(p.key, p.png, tuple(sorted(ids[w] for w in p.words if w in ids)))
        for p in sorted(pictures, key=lambda picture: by_hash(picture.key))
    )
    return [sample for sample in samples if sample.labels]


def flatten(png: bytes) -> bytes:
    """The picture on white as an opaque PNG of 64 x 64 pixels with a small palette."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    opaque = Image.alpha_composite(white, picture).convert("RGB")
    if opaque.size != (IMAGE_SIZE, IMAGE_SIZE):
        opaque = opaque.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    opaque.quantize(NUM_COLOURS).save(out, "PNG", optimize=True)
    return out.getvalue()


def tar_bytes(samples: Iterable[Sample]) -> bytes:
    """A gzipped WebDataset shard: KEY.png, then KEY.json, with no trace of when or who."""
    out = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=out, filename="", mode="wb", compresslevel=9, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for sample in samples:
            about = {"labels": list(sample.labels), "source": SOURCE, "licence": LICENCE}
            add_member(tar, f"{sample.key}.png", sample.png)
            add_member(tar, f"{sample.key}.json", json.dumps(about).encode())
    return out.getvalue()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file whose header depends on its name and size only."""
    info = tarfile.TarInfo(name)  # mtime, uid and gid 0, no owner's name, mode 0644
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def words_of_emoji(
    names: Iterable[Mapping[str, Any]], keywords: Mapping[str, list[str]]
) -> dict[str, frozenset[str]]:
    """Words by key without selectors, from emojibase's entries and emojilib's keywords.

    A skin tone has a name of its own and the tags and keywords of its emoji.
    """
    by_key = {without_selector(code_points(emoji)): words for emoji, words in keywords.items()}
    words: dict[str, frozenset[str]] = {}
    for entry in names:
        key = without_selector(entry["hexcode"])
        shared = [*entry.get("tags", []), *by_key.get(key, [])]
        for variant in [entry, *entry.get("skins", [])]:
            text = " ".join([variant["label"], *shared])
            words[without_selector(variant["hexcode"])] = split_words(text)
    return words


def fetch(package: str, folder: Path) -> Path:
    """The package's archive in `folder`, fetched with npm unless it is there."""
    name, version = package.rsplit("@", 1)
    archive = folder / f"{name}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True)
    return archive


def read_json(archive: Path, member: str) -> Any:
    """A JSON file out of a package's archive."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None
        return json.load(file)


def read_pngs(archive: Path, folder: str) -> dict[str, bytes]:
    """The PNG files of one folder of a package's archive, by their names without the suffix."""
    pngs = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if path.parent == Path("package", folder) and path.suffix == ".png":
                file = tar.extractfile(member)
                assert file is not None
                pngs[path.stem] = file.read()
    return pngs


def read_pictures(packages: Path) -> list[Picture]:
    """The pictures that have words, each once, out of the three packages' archives."""
    names = read_json(fetch(NAMES, packages), "en/data.json")
    keywords = read_json(fetch(KEYWORDS, packages), "dist/emoji-en-US.json")
    words = words_of_emoji(names, keywords)
    pngs = read_pngs(fetch(PICTURES, packages), f"img/google/{IMAGE_SIZE}")
    return drop_copies(
        Picture(key, words[without_selector(key)], flatten(png))
        for key, png in pngs.items()
        if without_selector(key) in words
    )


def write_dataset(pictures: Sequence[Picture], out: Path) -> None:
    """Split the pictures and write `labels.txt` and the shards into the folder `out`."""
    train_pictures = [p for p in pictures if not is_held_out(concept(p.key))]
    val_pictures = [p for p in pictures if is_held_out(concept(p.key))]
    labels = choose_labels(train_pictures, NUM_LABELS)
    train = label_samples(train_pictures, labels)
    val = label_samples(val_pictures, labels)
    out.mkdir(parents=True, exist_ok=True)
    (out / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    for i in range(NUM_TRAIN_SHARDS):
        shard = tar_bytes(train[i::NUM_TRAIN_SHARDS])
        (out / f"train-{i:05d}.tar.gz").write_bytes(shard)
    (out / "val-00000.tar.gz").write_bytes(tar_bytes(val))
    click.echo(f"{out}: {len(train)} training and {len(val)} held-out images, {len(labels)} labels")


@click.command()
@click.option(
    "--packages",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the npm packages' archives; those missing are fetched into it.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "emoji",
    show_default=True,
    help="Folder to write the shards and labels.txt to.",
)
def main(packages: Path, out: Path) -> None:
    """Write the quickstart's emoji as WebDataset shards."""
    packages.mkdir(parents=True, exist_ok=True)
    write_dataset(read_pictures(packages), out)


if __name__ == "__main__":
    main()
