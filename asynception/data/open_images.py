"""Open Images' own files: image-level labels with confidence, and descriptions of classes.

https://storage.googleapis.com/openimages/web/download_v7.html
"""

import csv
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from asynception.data.listing import Listing, Row, image_row
from asynception.data.tables import csv_cells
from asynception.data.vocabulary import Vocabulary
from model.errors import InputError

COLUMNS = ("ImageID", "LabelName", "Confidence")


def list_open_images(
    labels: Path,
    classes: Path,
    images: Path,
    *,
    min_confidence: float = 0.5,
    vocabulary: Vocabulary | None = None,
) -> Listing:
    """One row for each label of at least `min_confidence`; images are IMAGEID.jpg in `images`.

    labels: CSV of ImageID, Source, LabelName, Confidence. classes: CSV of LabelName, DisplayName,
    with or without a header. Labels go by display name, or by LabelName (/m/01234) where the
    vocabulary has that. Raises InputError, also while the rows are read.
    """
    names = read_class_descriptions(classes)
    known = set(vocabulary.names) if vocabulary is not None else set()
    left_out: Counter[str] = Counter()

    def rows() -> Iterator[Row]:
        for line, (image, label, text) in csv_cells(labels, COLUMNS):
            where = f"{labels}: line {line}"
            if _confidence(where, text) < min_confidence:
                left_out[f"labels of confidence below {min_confidence:g}"] += 1
                continue
            name = label if label in known else names.get(label, label)
            yield image_row(where, f"{image}.jpg", (name,), line)

    return Listing(str(labels), str(images), rows(), "names", left_out=left_out)


def read_class_descriptions(path: Path) -> dict[str, str]:
    """LabelName to a name that no other class has.

    The LabelName is added where classes share a display name: "Turkey (/m/01jtm)".
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"{path}: can't be read as class descriptions ({error})") from None
    if any(len(row) < 2 or not row[1].strip() for row in rows) or not rows:
        raise InputError(
            f"{path}: isn't a CSV of LabelName,DisplayName: give Open Images' class descriptions"
        )
    shown = {row[0]: row[1].strip() for row in rows if row[0] != "LabelName"}
    times = Counter(shown.values())
    return {
        label: name if times[name] == 1 else f"{name} ({label})" for label, name in shown.items()
    }


def _confidence(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise InputError(f"{where} has the Confidence {text!r}, which is no number: mend it")
    return value
