"""what is written, and where: names that are safe to show, files that take nobody's place."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from softdice.images.files import SUFFIXES, written_beside
from softdice.scoring.classes import ScoreError

KINDS = {
    ".csv": "csv", ".json": "json", ".txt": "table", ".text": "table", ".log": "table", ".out": "table", "": "table",
    ".html": "report", ".htm": "report",
}  # fmt: skip
"""Suffix -> what is written into such a file."""

OTHER_KINDS = (
    ".xlsx", ".xls", ".xlsm", ".ods", ".pdf", ".doc", ".docx", ".odt", ".pptx", ".parquet", ".feather", ".xml", ".yaml",
    ".yml", ".md", ".tex", ".zip", ".gz", ".tsv", ".db", ".svg", *SUFFIXES,
)  # fmt: skip
"""Suffixes that promise what is not written here, whatever the format is that was asked for."""

BEGIN = 65536
"""Bytes that tell what a file is."""

_TURNING = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Invisible signs that turn the direction of what follows them."""


def shown(text: str) -> str:
    """A name from a folder or file -> the same; what a terminal would obey, and bytes that are no text, as escapes.

    Example:
        >>> print(shown("a\\x1b[2Jb\\nc"), shown("caf\\u00e9"), shown(b"\\xff.png".decode("utf-8", "surrogateescape")))
        a\\x1b[2Jb\\x0ac café \\xff.png
    """
    if text.isprintable():
        return text
    return "".join(
        _escape(ord(c)) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _TURNING else c for c in text
    )


def _escape(code: int) -> str:
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # a byte, as file names hold them
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def kind_of(out: Path | None, asked: str | None) -> str:
    """--out and --format -> the format; refuses a file whose suffix promises another."""
    if out is None:
        return asked or "table"
    suffix = out.suffix.lower()
    kind = KINDS.get(suffix)
    wanted = {"table": ".txt", "nnunet": ".json"}.get(asked or "", f".{asked}")
    if asked is None and kind in (None, "report"):
        advice = "For a page in HTML pass --report." if kind else "Or name the --format."
        raise ScoreError(f"--out: expected a file ending in .csv, .json or .txt, got {out.name!r}. {advice}")
    other = suffix in OTHER_KINDS or (kind and suffix and kind != KINDS.get(wanted))
    if asked is not None and other:
        raise ScoreError(
            f"--out: expected a file ending in {wanted} for --format {asked}, got {out.name!r}. Rename it."
        )
    return asked or str(kind)


def check_places(out: Path | None, report: Path | None, inputs: Iterable[Path], *, overwrite: bool = False) -> None:
    """Before any work: refuses places that cannot be written, each other's, those of inputs and of what is not ours.

    Raises:
        ScoreError: a folder, no folder around it, another kind of file, a file that is read or, without `overwrite`,
            one that is no result of an earlier run.
    """
    places = {option: path for option, path in (("--out", out), ("--report", report)) if path is not None}
    for option, path in places.items():
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
    if report is not None and report.suffix and KINDS.get(report.suffix.lower()) != "report":
        raise ScoreError(
            f"--report: expected a file ending in .html, got {report.name!r}. The report is a page in HTML."
        )
    if out is not None and report is not None and not is_stream(out) and _identity(out) == _identity(report):
        raise ScoreError(f"--report: expected another file than --out, got {str(report)!r} for both. Rename one.")
    read = {_identity(path): option for option, path in places.items() if path.exists()}
    for path in inputs if read else ():
        if _identity(path) in read:
            option = read[_identity(path)]
            raise ScoreError(f"{option}: expected a file that is not read, got {str(path)!r}. Choose another name.")
    for option, path in places.items():
        if path.is_file() and not (overwrite or is_stream(path) or is_result(path)):
            raise ScoreError(
                f"{option}: expected a new file or the result of an earlier run, got {str(path)!r}, which is neither. "
                "Choose another name, or pass --overwrite to replace it."
            )


def is_result(path: Path) -> bool:
    """Whether a file is empty or begins as what is written here begins.

    Not so nnU-Net's summary.json: nothing tells ours from one that nnU-Net wrote.
    """
    with path.open("rb") as file:
        begin = file.read(BEGIN).decode("utf-8", "replace")
    if not begin or 'name="generator" content="softdice' in begin or begin.startswith('{\n"softdice": "'):
        return True
    if "┏" in begin and " 95 % interval " in begin:
        return True
    heading, *rows = csv.reader(begin.splitlines()[:2])
    side = heading[:1] == ["predictions"]
    if heading[side : side + 3] in (["case", "label", "name"], ["label", "name", "cases"]):
        return True
    scores = [cell for row in rows for cell in row[side + 1 :]]  # a column per class, under names that can be any
    return heading[side : side + 1] == ["case"] and bool(scores) and all(map(_is_score, scores))


def _is_score(cell: str) -> bool:
    try:
        return not cell or 0 <= float(cell) <= 1
    except ValueError:
        return False


def is_stream(path: Path) -> bool:
    """Whether it is written into rather than replaced: a device, a pipe, what /dev/stdout stands for."""
    named = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))  # a file, where output goes into one
    return named or (path.exists() and not path.is_file())


def save(path: Path, text: Iterable[str]) -> None:
    """pieces of text -> file, replaced at once where it is one; a link keeps pointing to it."""
    pieces = (piece.encode("utf-8", "backslashreplace") for piece in text)
    if is_stream(path):
        with path.open("ab", buffering=0) as stream:  # after what a shell's >> has there
            for piece in pieces:
                stream.write(piece)
        return
    with written_beside(_real(path)) as file:
        file.writelines(pieces)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _identity(path: Path) -> object:
    """Equal for two names of one file."""
    try:
        stat = path.stat()
    except OSError:
        return str(_real(path))
    return stat.st_dev, stat.st_ino
