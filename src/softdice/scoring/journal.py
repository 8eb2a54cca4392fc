"""The journal of a run: a file beside its output that keeps finished cases, so that a stopped run can go on."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from softdice.evaluation.labels import ScoreError
from softdice.images.files import parts
from softdice.scoring.options import Options
from softdice.scoring.pair_scores import Case


class Journal:
    """Finished cases on disk: a line that describes the run, then a line of checksum and JSON for each case.

    `done` holds the cases of an earlier run, by side (the path of the predictions) and name of the case. A damaged line
    and a case whose files have changed are left out: such cases are scored again. `path`: of the file.
    """

    def __init__(self, path: Path, options: Options, folders: Sequence[str], *, resume: bool) -> None:
        """Open the file at `path` for a run that compares `folders`, predictions first and the reference last.

        With `resume` the cases of an earlier run are read into `done`; else an earlier journal is replaced. The rewrite
        is atomic (a temporary file, then a rename): a run that is killed here loses nothing.

        Raise ScoreError if `path` is a file of another kind, or if `resume` and its run had other folders or options.
        """
        self.path = path
        head = json.dumps({"softdice score": [*folders, asdict(options)]}, sort_keys=True)
        self.done: dict[tuple[str, str], Case] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if text and not text.startswith('{"softdice score"'):
            got = "a file of another kind, or a run whose first line is damaged"
            raise ScoreError(f"--out: expected no file at {path}, got {got}. Rename it.")
        lines = text.split("\n")[:-1] if resume else []  # a run that was killed may have left half of the last line
        if lines and lines[0] != head:
            advice = "Repeat the options of that run, or leave --resume out to start anew."
            raise ScoreError(f"--resume: expected the same folders and options as in {path}. {advice}")
        for line in lines[1:]:
            checksum, _, content = line.partition(" ")
            if checksum != _checksum(content):  # damaged, for example by a power cut
                continue
            record = json.loads(content)
            if record["stamp"] == _stamp(record["prediction"], record["truth"]):
                self.done[record["side"], record["case"]] = _from_record(record)
        new = path.with_name(path.name + ".new")
        with new.open("w", encoding="utf-8") as self._file:  # `add` writes to it
            self._file.write(head + "\n")
            for (side, _), case in self.done.items():
                self.add(side, case)
        os.replace(new, path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, side: str, case: Case) -> None:
        """Write a case of a side; one with an error is not written, so that it is tried again."""
        if not case.error:
            content = json.dumps(_to_record(side, case))
            self._file.write(f"{_checksum(content)} {content}\n")
            self._file.flush()

    def close(self, *, finished: bool) -> None:
        """Close the file, and remove it if the run has finished."""
        self._file.close()
        if finished:
            self.path.unlink()


def _checksum(content: str) -> str:
    """Return the CRC-32 of a line, in hexadecimal digits."""
    return f"{zlib.crc32(content.encode()):08x}"


def _stamp(*paths: str) -> list[list[int]]:
    """Return size in bytes and time in ns of the files at each path that is not "", to tell whether one has changed.

    An image in a collection, a file of many images, stands for that file.
    """
    stamps = []
    for path in filter(None, paths):
        files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else parts(Path(path))
        stats = [file.stat() for file in files if file.exists()]
        stamps.append([number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)])
    return stamps


_BY_LABEL = ("names", "unnamed", "colours")
"""Fields of a case that are dicts by label; JSON turns their keys into texts."""


def _to_record(side: str, case: Case) -> dict[str, Any]:
    """Return a case of a set of predictions as JSON takes it."""
    record = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(case).items()}
    return {**record, "side": side, "stamp": _stamp(case.prediction, case.truth)}


def _from_record(record: dict[str, Any]) -> Case:
    """Return the case of a record that `_to_record` made and JSON has read: lists to arrays, texts to label numbers."""
    fields = {name: value for name, value in record.items() if name not in ("side", "stamp")}
    fields |= {name: {int(label): value for label, value in record[name].items()} for name in _BY_LABEL}
    for name in ("counts", "measured"):
        fields[name] = np.array(record[name]).reshape(len(record[name]), len(record["keys"]))
    return Case(**{**fields, "keys": tuple(record["keys"])})
