"""The command line as the tests call it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from typer.testing import CliRunner, Result

from softdice.cli.app import app


def call(*arguments: object, **options: bool) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]


def score(*arguments: object) -> Result:
    return call("score", *arguments, catch_exceptions=False)


def journal_cases(out: Path) -> int:
    """Return how many cases stand in the journal beside `out`, below its first line. 0 where it is not there yet."""
    journal = out.with_name(f"{out.name}.partial")
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


def wait_for_cases(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Wait until the process has scored that many cases into `out`. Raise if it ends first, or takes two minutes."""
    until = time.monotonic() + 120
    while journal_cases(out) < count:
        assert process.poll() is None, "the process ended before it was to be stopped"
        assert time.monotonic() < until, "nothing was scored in two minutes"
        time.sleep(0.005)


def refused(result: Result, *parts: str, code: int = 2) -> None:
    """Assert that exit code, and a message that holds the parts. Code 2 prints one line; none prints a traceback."""
    assert result.exit_code == code, result.output
    assert code != 2 or len(result.stderr.splitlines()) == 1, result.stderr
    said = " ".join(result.stderr.split())
    for part in parts:
        assert part in said
    assert "Traceback" not in result.output
