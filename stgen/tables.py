"""Tables that users write: `.jsonl`, `.csv` with a header, or `.parquet`, in UTF-8, row by row."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stgen.config import require

Rows = Iterator[tuple[str, dict[str, Any]]]


def read_table(path: str | Path, argument: str) -> Rows:
    """The rows of a table, each with where it stands, such as "line 3", for messages.

    A value is what the row says; cells of a csv are texts. An empty cell, null, or in parquet NaN is None.

    Args:
        argument: what the caller calls `path`, for messages.
    Raises:
        ValueError: there is no such file, or a row is malformed; the message names the file and the line or row.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    require(path.suffix in readers, argument, str(path), f"a file name ending in {', '.join(readers)}")
    require(path.is_file(), argument, str(path), "a file that exists")
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_jsonl(path: Path) -> Rows:
    # utf-8-sig, here and for csv: some editors put a byte order mark at the start.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is {line.strip()[:80]!r}, allowed: one JSON object a line")
            yield f"line {number}", row


def _read_csv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            for name in header:
                require(header.count(name) == 1, "column", name, "each column once")
            for cells in reader:
                where = f"line {reader.line_num}"
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ValueError(f"{where} has {len(cells)} cells, allowed: {len(header)}, as the header")
                yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} is no CSV: {error}") from error


def _read_parquet(path: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("a parquet file needs pyarrow: pip install 'stgen[ray]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    # What pandas writes has NaN where nothing is.
                    empty = {name: None for name, v in row.items() if isinstance(v, float) and math.isnan(v)}
                    yield f"row {number}", row | empty
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"no parquet file: {error}") from error
