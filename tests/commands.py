"""The command line as the tests call it."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from softdice.cli.app import app


def call(*arguments: object, **options: bool) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]


def score(*arguments: object) -> Result:
    return call("score", *arguments, catch_exceptions=False)


def refused(result: Result, *parts: str, code: int = 2) -> None:
    """Assert that exit code, and a message that holds the parts. Code 2 prints one line; none prints a traceback."""
    assert result.exit_code == code, result.output
    assert code != 2 or len(result.stderr.splitlines()) == 1, result.stderr
    said = " ".join(result.stderr.split())
    for part in parts:
        assert part in said
    assert "Traceback" not in result.output
