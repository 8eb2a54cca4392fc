"""pairs -> cases, one after another or in several processes; errors are cases too, and nothing done is lost.

A journal beside the output holds one line of JSON per finished case, so that a run that was stopped goes on from
there. Cases come in the order of the pairs whatever the number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.files import FileError
from softdice.scoring.cases import Case, score_pair
from softdice.scoring.classes import Options, ScoreError
from softdice.scoring.pairing import Pair


def run(pairs: Sequence[Pair], options: Options, *, jobs: int = 1) -> Generator[Case, None, None]:
    """pairs -> cases in the same order; a pair that cannot be scored is a case with its reason in `error`."""
    if jobs == 1 or len(pairs) < 2:
        for pair in pairs:
            yield _one(pair, options)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
    pool = ProcessPoolExecutor(min(jobs, len(pairs)), context, initializer=_worker)
    waiting: deque[Future[Case]] = deque()
    try:
        for pair in pairs:
            if len(waiting) > 4 * jobs:  # a window: memory does not grow with the folder
                yield waiting.popleft().result()
            waiting.append(pool.submit(_one, pair, options))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        advice = "Pass fewer --jobs; with --out, --resume goes on from here."
        raise ScoreError(f"score: a worker process ended, probably for want of memory. {advice}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _worker() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    torch.set_num_threads(1)


def _one(pair: Pair, options: Options) -> Case:
    failed = Case(pair.case, str(pair.prediction or ""), str(pair.truth or ""))
    if pair.error or pair.prediction is None or pair.truth is None:
        return replace(failed, error=pair.error)
    try:
        return score_pair(pair.prediction, pair.truth, options, pair.case)
    except (FileError, ScoreError, ModuleNotFoundError) as error:  # of one format: the others can be scored
        return replace(failed, error=str(error))
    except MemoryError:
        return replace(failed, error=f"{pair.prediction}: not enough memory")


class Journal:
    """The finished cases of a run, on disk: the first line says what the run is, each other line is a case."""

    def __init__(self, path: Path, options: Options, about: Sequence[str], *, resume: bool) -> None:
        self.path = path
        self._head = json.dumps({"softdice score": [*about, asdict(options)]}, sort_keys=True)
        self.done: dict[tuple[str, str], Case] = {}
        lines = self._lines() if resume and path.exists() else []
        if lines and lines[0] != self._head:
            advice = "Repeat the options of that run, or leave --resume out to start anew."
            raise ScoreError(f"--resume: expected the same folders and options as in {path}. {advice}")
        for line in lines[1:]:
            record = json.loads(line)
            if record["stamp"] == _stamp(record["prediction"], record["truth"]):
                self.done[record["side"], record["case"]] = _from_record(record)
        fresh = path.with_name(path.name + ".new")
        with fresh.open("w", encoding="utf-8") as self._file:
            self._file.write(self._head + "\n")
            for (side, _), case in self.done.items():
                self.add(side, case)
        os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")

    def _lines(self) -> list[str]:
        """Whole lines: a run that was killed may have left half of one."""
        text = self.path.read_text(encoding="utf-8")
        return text.split("\n")[:-1]

    def add(self, side: str, case: Case) -> None:
        """Keep a case; errors are not kept, so that they are tried again."""
        if not case.error:
            self._file.write(json.dumps(_to_record(side, case)) + "\n")
            self._file.flush()

    def close(self, *, finished: bool) -> None:
        """Close it; a run that is finished needs it no longer."""
        self._file.close()
        if finished:
            self.path.unlink()


def _stamp(*paths: str) -> list[list[int]]:
    """Size and time of files, to see whether one was changed between two runs."""
    stamps = []
    for path in map(Path, paths):
        stat = path.stat() if path.exists() else None
        stamps.append([stat.st_size, stat.st_mtime_ns] if stat else [])
    return stamps


def _to_record(side: str, case: Case) -> dict[str, Any]:
    record = {name: getattr(case, name) for name in ("case", "prediction", "truth", "keys", "voxels")}
    names, colours = ({str(key): value for key, value in each.items()} for each in (case.names, case.colours))
    stamp = _stamp(case.prediction, case.truth)
    return {**record, "side": side, "counts": case.counts.tolist(), "names": names, "colours": colours, "stamp": stamp}


def _from_record(record: dict[str, Any]) -> Case:
    names, colours = ({int(key): value for key, value in record[each].items()} for each in ("names", "colours"))
    return Case(
        record["case"],
        record["prediction"],
        record["truth"],
        tuple(record["keys"]),
        np.array(record["counts"]).reshape(3, len(record["keys"])),
        record["voxels"],
        names,
        colours,
    )
