"""Tables of (path, labels): CSV, TSV and Parquet files, read row by row."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asynception.data.listing import LabelKind, Listing, image_row
from model.errors import InputError

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
_BATCH_ROWS = 4096


def list_table(
    table: Path,
    images: Path | None = None,
    *,
    path_column: str = "path",
    labels_column: str = "labels",
    separator: str = "|",
    label_kind: LabelKind = "auto",
) -> Listing:
    """The rows of a table; those that name one image are taken together.

    images: folder that paths are relative to; the table's own where None.
    separator: between the labels of a text cell; lists of a Parquet file need none.
    Raises InputError, also while the rows are read, for what isn't such a table.
    """
    columns = (path_column, labels_column)
    pairs: Iterator[tuple[int, tuple[Any, ...]]]
    if table.suffix.lower() == ".parquet":
        pairs = _parquet_cells(table, columns)
    else:
        pairs = csv_cells(table, columns, "\t" if table.suffix.lower() == ".tsv" else ",")
    rows = (
        image_row(f"{table}: row {line}", path, _labels(table, line, cell, separator), line)
        for line, (path, cell) in pairs
    )
    return Listing(str(table), str(images or table.parent), rows, label_kind)


def csv_cells(
    table: Path, columns: tuple[str, ...], delimiter: str = ","
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, the cells of `columns`) of each row. Raises InputError."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            places = _places(table, columns, next(reader, []))
            for row in reader:
                if row:
                    yield reader.line_num, _cells(table, reader.line_num, row, places)
    except UnicodeDecodeError as error:
        raise InputError(f"{table}: isn't UTF-8 text ({error}): convert it") from None
    except csv.Error as error:
        raise InputError(f"{table}: line {reader.line_num} isn't CSV ({error}): mend it") from None
    except OSError as error:
        raise InputError(f"{table}: cannot be read ({error.strerror})") from None


def _places(table: Path, columns: tuple[str, ...], header: list[str]) -> list[int]:
    for column in columns:
        if column not in header:
            raise InputError(
                f"{table}: has no column {column!r}, its first line has "
                f"{', '.join(map(repr, header)) or 'nothing'}: name the columns of paths and labels"
            )
    return [header.index(column) for column in columns]


def _cells(table: Path, line: int, row: list[str], places: list[int]) -> tuple[str, ...]:
    if len(row) <= max(places):
        raise InputError(
            f"{table}: line {line} has {len(row)} columns, too few for its header: mend it"
        )
    return tuple(row[place] for place in places)


def _parquet_cells(table: Path, columns: tuple[str, str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{table}: reading Parquet needs pyarrow: pip install pyarrow") from None
    line = 0
    try:
        with parquet.ParquetFile(table) as file:
            _places(table, columns, file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns)):
                cells = [batch.column(name).to_pylist() for name in columns]
                for path, labels in zip(*cells, strict=True):
                    line += 1
                    if not isinstance(path, str):
                        raise InputError(f"{table}: row {line} has the path {path!r}: give a text")
                    yield line, (path, labels)
    except pyarrow.ArrowException as error:
        raise InputError(f"{table}: isn't a whole Parquet file ({error}): make it anew") from None
    except OSError as error:
        raise InputError(f"{table}: cannot be read ({error})") from None


def _labels(table: Path, line: int, cell: Any, separator: str) -> tuple[str | int, ...]:
    if cell is None:
        return ()
    if isinstance(cell, str):
        return tuple(part for text in cell.split(separator) if (part := text.strip()))
    labels = cell if isinstance(cell, list) else [cell]
    for label in labels:
        if type(label) not in (str, int):
            raise InputError(
                f"{table}: row {line} has the label {label!r}, no text and no integer: mend it"
            )
    return tuple(labels)
