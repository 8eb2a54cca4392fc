"""Check where results are to be written before any work, and write them: nothing that is not ours is replaced."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from softdice.evaluation.labels import ScoreError
from softdice.images.files import SUFFIXES, written_beside

FORMATS = {
    ".csv": "csv", ".json": "json", ".txt": "table", ".text": "table", ".log": "table", ".out": "table", "": "table",
    ".html": "report", ".htm": "report",
}  # fmt: skip
"""Suffix of a file -> its format."""

OTHER_SUFFIXES = (
    ".xlsx", ".xls", ".xlsm", ".ods", ".pdf", ".doc", ".docx", ".odt", ".pptx", ".parquet", ".feather", ".xml", ".yaml",
    ".yml", ".md", ".tex", ".zip", ".gz", ".tsv", ".db", ".svg", *SUFFIXES,
)  # fmt: skip
"""Suffixes of formats that are not written here; a file with one is refused whatever --format says."""

HEAD_BYTES = 65536
"""Bytes at the start of a file that are read to see whether it is a result."""


def format_of(out: Path | None, chosen: str | None) -> str:
    """Return "table", "csv", "json" or "nnunet": what --format says (`chosen`), else the suffix of --out.

    Raise ScoreError if the suffix belongs to another format, or if it is unknown and there is no --format.
    """
    if out is None:
        return chosen or "table"
    suffix = out.suffix.lower()
    format = FORMATS.get(suffix)
    if chosen is None:
        if format in (None, "report"):
            advice = "For a page in HTML pass --report." if format else "Or name the --format."
            raise ScoreError(f"--out: expected a file ending in .csv, .json or .txt, got {out.name!r}. {advice}")
        return str(format)
    wanted = {"table": ".txt", "nnunet": ".json"}.get(chosen, f".{chosen}")
    # --format allows any suffix that no other format has, written here (FORMATS) or not (OTHER_SUFFIXES): .dat, or none
    if suffix in OTHER_SUFFIXES or (format and suffix and format != FORMATS[wanted]):
        got = f"{out.name!r}. Rename it."
        raise ScoreError(f"--out: expected a file ending in {wanted} for --format {chosen}, got {got}")
    return chosen


def check_places(out: Path | None, report: Path | None, inputs: Iterable[Path], *, overwrite: bool = False) -> None:
    """Raise ScoreError if a result cannot or must not be written where --out and --report say.

    It refuses a folder, a place that does not exist or is not writable, a --report with another suffix than .html, one
    path for both, a file that is read (one of `inputs`), and, without `overwrite`, a file that no earlier run wrote.
    """
    paths = {option: path for option, path in (("--out", out), ("--report", report)) if path is not None}
    for option, path in paths.items():
        if path.is_dir():
            raise ScoreError(f"{option}: expected a file, got the folder {str(path)!r}. Name a file in it.")
        folder = path.parent if is_stream(path) else _real(path).parent
        if _real(path).is_symlink():
            raise ScoreError(f"{option}: expected a file, got a link that leads to itself, {str(path)!r}. Remove it.")
        if not path.parent.is_dir() or not folder.is_dir():
            raise ScoreError(
                f"{option}: expected a file in an existing folder, got {str(path)!r}. Make the folder first."
            )
        if not is_stream(path) and not os.access(folder, os.W_OK):
            raise ScoreError(f"{option}: expected a folder that can be written, got {str(folder)!r}. Choose another.")
    if report is not None and report.suffix and FORMATS.get(report.suffix.lower()) != "report":
        raise ScoreError(
            f"--report: expected a file ending in .html, got {report.name!r}. The report is a page in HTML."
        )
    if out is not None and report is not None and not is_stream(out) and _identity(out) == _identity(report):
        raise ScoreError(f"--report: expected another file than --out, got {str(report)!r} for both. Rename one.")
    existing = {_identity(path): option for option, path in paths.items() if path.exists()}
    for path in inputs if existing else ():
        if option := existing.get(_identity(path), ""):
            raise ScoreError(f"{option}: expected a file that is not read, got {str(path)!r}. Choose another name.")
    for option, path in paths.items():
        if path.is_file() and not (overwrite or is_stream(path) or is_result(path)):
            raise ScoreError(
                f"{option}: expected a new file or the result of an earlier run, got {str(path)!r}, which is neither. "
                "Choose another name, or pass --overwrite to replace it."
            )


def is_result(path: Path) -> bool:
    """Return whether a file is empty or begins like a report, JSON, table or CSV of an earlier run.

    False for nnU-Net's summary.json: ours does not differ from one that nnU-Net wrote.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES).decode("utf-8", "replace").replace("\0", "")  # csv of Python 3.10 raises for it
    if not head or 'name="generator" content="softdice' in head or head.startswith('{\n"softdice": "'):
        return True
    if "┏" in head and " 95 % interval " in head:  # the frame of a table
        return True
    headings, *rows = csv.reader(head.splitlines()[:2])
    first = int(headings[:1] == ["predictions"])  # 1 if column 0 names the predictions, as in a comparison
    # --rows pairs, --rows classes
    if headings[first : first + 3] in (["case", "label", "name"], ["label", "name", "cases"]):
        return True
    # --rows cases: the headings are "case" and names of classes, which can be any; the cells of the row are scores
    scores = [cell for row in rows for cell in row[first + 1 :]]
    return headings[first : first + 1] == ["case"] and bool(scores) and all(map(_is_score, scores))


def _is_score(cell: str) -> bool:
    """Return whether a cell of a CSV is empty or a number from 0 to 1."""
    try:
        return not cell or 0 <= float(cell) <= 1
    except ValueError:
        return False


def is_stream(path: Path) -> bool:
    """Return whether a path is written into rather than replaced: a device, a pipe, what /dev/stdout stands for."""
    # these names are links: if the output was redirected into a file, they lead to a regular file
    is_standard = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return is_standard or (path.exists() and not path.is_file())


def save(path: Path, text: Iterable[str]) -> None:
    """Write pieces of text into a stream, or atomically into a file; links are followed. Raise OSError if it fails."""
    # names of files may hold bytes that are no UTF-8, as surrogates, which must not raise here
    pieces = (piece.encode("utf-8", "backslashreplace") for piece in text)
    if is_stream(path):
        with path.open("ab", buffering=0) as stream:  # behind what the file of a shell's >> holds already
            for piece in pieces:
                stream.write(piece)
        return
    with written_beside(_real(path)) as file:
        file.writelines(pieces)


def _real(path: Path) -> Path:
    """Return the path with all links resolved."""
    return Path(os.path.realpath(path))


def _identity(path: Path) -> object:
    """Return a value that is equal for two names of one file: device and inode, or its real path if it is missing."""
    try:
        stat = path.stat()
    except OSError:
        return str(_real(path))
    return stat.st_dev, stat.st_ino
