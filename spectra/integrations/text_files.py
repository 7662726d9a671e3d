"""Text from files: plain text, or the column "text" of a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spectra.backend.errors import InputError, first_line

COLUMN = "text"
ROWS = (".jsonl", ".ndjson", ".csv", ".tsv")  # files with a row on each line
PARQUET = ".parquet"
TABLES = (*ROWS, PARQUET)
KINDS = "plain text in UTF-8, or .jsonl, .csv, .tsv or .parquet with a column 'text'"
BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # UTF-8's own is taken off as well
LONGEST_CELL = 2**31 - 1  # characters; csv's own limit is 131,072


def read_texts(files: Sequence[str | Path]) -> list[str]:
    """The text of each file; that of a table is its column "text", a row a line.

    Args:
        files: Paths of UTF-8 files, with or without a byte-order mark, or of tables (.jsonl, .ndjson, .csv, .tsv,
            .parquet).

    Returns:
        One string a file, in the order given.

    Raises:
        InputError: A file is missing, empty or not UTF-8, or a table has no column "text".
    """
    return [_text_of(Path(file)) for file in files]


def decoded(file: Path) -> str:
    """What a file holds, as text.

    Args:
        file: The path of a UTF-8 file, or of one in UTF-16 that begins with a byte-order mark.

    Returns:
        The text, with a line feed at the end of each line.

    Raises:
        InputError: The file is missing, empty or in another encoding.
    """
    refuse_no_file(file)
    try:
        with file.open("rb") as stream:
            encoding = BYTE_ORDER_MARKS.get(stream.read(2), "utf-8-sig")
        text = file.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"expected UTF-8 text, but byte {error.start} of {file} is not: convert the file first, "
            "for example with iconv -f latin1 -t utf-8"
        ) from None
    if not text.strip():
        raise InputError(f"expected text, but {file} is empty: give a file with text in it")
    return text


def refuse_no_file(file: Path) -> None:
    """Raise an InputError where there is no such file."""
    if file.is_dir():
        raise InputError(f"expected a text file, but {file} is a folder: name its files, such as {file / '*.txt'}")
    if not file.is_file():
        raise InputError(f"expected a text file, but there is no file {file}: check the path")


def rows_of(file: Path, text: str, *, expected: str) -> Iterator[tuple[int, Any]]:
    """The number and the content of each row of a .jsonl, .csv or .tsv file.

    Args:
        file: The path, whose ending says which of them it is.
        text: What the file holds.
        expected: What a message says that the file should hold.

    Yields:
        The number of the line, from 1, and what stands there: a dictionary for a row of a table.

    Raises:
        InputError: A line is not what the ending says.
    """
    ending = file.suffix.lower()
    if ending in (".csv", ".tsv"):
        before = csv.field_size_limit(LONGEST_CELL)
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if ending == ".tsv" else ",")
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{file} is no table ({error}): expected {expected}") from None
        finally:
            csv.field_size_limit(before)
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut inside a text
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"line {number} of {file} is no JSON ({error.msg}): expected {expected}") from None


def _text_of(file: Path) -> str:
    """The text of one file."""
    ending = file.suffix.lower()
    if ending not in TABLES:
        if file.is_file():
            _refuse_parquet(file)
        return decoded(file)
    cells = _parquet(file) if ending == PARQUET else _cells(file)
    text = "\n".join(cells)
    if not text.strip():
        raise InputError(f"expected text, but the column {COLUMN!r} of {file} is empty: give a file with text in it")
    return text


def _cells(file: Path) -> list[str]:
    """The column of text of a .jsonl, .csv or .tsv file."""
    expected = f"{KINDS}"
    cells = []
    for number, row in rows_of(file, decoded(file), expected=expected):
        if not isinstance(row, dict) or COLUMN not in row:
            raise _no_column(f"line {number} of {file}", list(row) if isinstance(row, dict) else [])
        cells.append(_cell(row[COLUMN], f"line {number} of {file}"))
    return cells


def _parquet(file: Path) -> list[str]:
    """The column of text of a Parquet file."""
    refuse_no_file(file)
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise InputError(f'{file} needs pyarrow: pip install "spectra-qat[qat]", or give {KINDS}') from None
    try:
        opened = parquet.ParquetFile(file)
        names = opened.schema_arrow.names
        if COLUMN not in names:
            raise _no_column(str(file), names)
        found = opened.read(columns=[COLUMN]).column(COLUMN).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read as Parquet ({first_line(error)}): expected {KINDS}") from None
    return [_cell(each, str(file)) for each in found]


def _cell(value: Any, place: str) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"expected text in {COLUMN!r} of {place}, got {type(value).__name__}: give {KINDS}")
    return value or ""


def _no_column(place: str, names: Sequence[str]) -> InputError:
    there = f", only {', '.join(map(str, names[:8]))}" if names else ""
    return InputError(f"{place} has no {COLUMN!r}{there}: expected {KINDS}")


def _refuse_parquet(file: Path) -> None:
    """Raise an InputError for a Parquet file by another name, which is not text."""
    with file.open("rb") as stream:
        if stream.read(4) == b"PAR1":
            raise InputError(f"{file} is a Parquet file: give it a name that ends in {PARQUET}")
