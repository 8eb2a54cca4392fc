"""Several commands in one launch of torchrun: the imports of its processes cost more than what most tests look at.

`series` starts two processes that run this file. Each runs the commands one after the other, as `softdice` would run
them, in a process group of their own, and keeps in files what they said and how they ended.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed import TCPStore

RANKS = 2
KINDS = ("stdout", "stderr")


class Scenario(NamedTuple):
    """A command. Each rank first calls `prepare`, a function of a test file that finds the command in sys.argv."""

    name: str
    arguments: Sequence[object]
    prepare: Callable[[pytest.MonkeyPatch], None] | None = None


@dataclass
class Ended:
    """The exit codes of the ranks that lived to have one, and what all ranks said."""

    codes: list[int]
    stdout: str
    stderr: str


def launch(*program: object) -> subprocess.CompletedProcess[str]:
    """Run a file in two processes of torchrun."""
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS)
    command = [*map(str, (*start, *program))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        said = process.communicate(timeout=120)
    finally:
        process.terminate()  # torchrun then ends its processes
    return subprocess.CompletedProcess(command, process.returncode, *said)


def series(folder: Path, *scenarios: Scenario) -> tuple[dict[str, Ended], subprocess.CompletedProcess[str]]:
    """Run the scenarios in one launch. Return how each ended, by name, and the launch."""
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in scenarios]
    plan = [
        (store.port, name, [str(part) for part in arguments], prepare and (prepare.__module__, prepare.__name__))
        for store, (name, arguments, prepare) in zip(stores, scenarios, strict=True)
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    launched = launch(__file__, folder)

    def said(name: str, kind: str) -> list[str]:
        paths = (folder / f"{name}.{rank}.{kind}" for rank in range(RANKS))
        return [path.read_text() for path in paths if path.exists()]

    ended = {
        name: Ended(list(map(int, said(name, "code"))), *("".join(said(name, kind)) for kind in KINDS))
        for name, *_ in scenarios
    }
    return ended, launched


@contextmanager
def redirected(path: str) -> Iterator[None]:
    """Send what the process says into files, whichever library says it."""
    sys.stdout.flush()
    before = [os.dup(1), os.dup(2)]
    try:
        for number, kind in enumerate(KINDS, 1):
            with open(f"{path}.{kind}", "wb") as file:
                os.dup2(file.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        for number, old in enumerate(before, 1):
            os.dup2(old, number)
            os.close(old)


def on_a_rank(folder: Path) -> None:
    """Run the scenarios on this rank."""
    from softdice.cli import main

    rank = os.environ["RANK"]
    for port, name, arguments, prepare in json.loads((folder / "plan.json").read_text()):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # in torchrun's own the ranks met before
        sys.argv, path = ["softdice", *arguments], f"{folder / name}.{rank}"
        with redirected(path), pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as end:
            if prepare:
                getattr(importlib.import_module(prepare[0]), prepare[1])(monkeypatch)
            main()
        Path(f"{path}.code").write_text(str(end.value.code))


if __name__ == "__main__":
    on_a_rank(Path(sys.argv[1]))
