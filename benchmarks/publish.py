"""rows of a benchmark -> benchmarks/results/NAME.csv, and the table between two marks of a page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def keep(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows -> results/NAME.csv, numbers with six digits."""
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def show(table: str, page: Path, marks: tuple[str, str]) -> None:
    """A table -> the page, in the place of what stands between the marks."""
    begin, end = marks
    head, rest = page.read_text().split(begin, 1)
    page.write_text(f"{head}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}")
