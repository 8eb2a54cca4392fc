"""rows of a benchmark -> benchmarks/results/NAME.csv and back, and the table between two marks of a page."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softdice.images.files import written_beside

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def keep(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows -> results/NAME.csv, numbers with six digits."""
    FOLDER.mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    with written_beside(FOLDER / f"{name}.csv") as file:
        file.write(text.getvalue().encode())


def add(name: str, row: dict[str, Any]) -> None:
    """A row -> at the end of results/NAME.csv; another process may do so, too."""
    FOLDER.mkdir(exist_ok=True)
    folder = os.open(FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keep(name, [*kept(name), row])
    finally:
        os.close(folder)


def kept(name: str) -> list[dict[str, Any]]:
    """results/NAME.csv -> its rows, numbers as numbers; none where there is no file."""
    path = FOLDER / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{column: _number(text) for column, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> int | float | str:
    if text.isdecimal():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def show(table: str, page: Path, marks: tuple[str, str]) -> None:
    """A table -> the page, in the place of what stands between the marks."""
    begin, end = marks
    head, rest = page.read_text().split(begin, 1)
    page.write_text(f"{head}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}")
