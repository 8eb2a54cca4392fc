"""The command `softdice`. Nothing of the extras is imported before a command runs."""

from __future__ import annotations

import sys

from softdice import validation

EXTRAS = {"train": "train", "predict": "train", "score": "score"}
"""Command -> the extra that brings all of it; "cli" for the others."""


def main() -> None:
    """Run the command line; without the packages that it needs, say which extra brings them and exit with 2."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError:
        print(_missing(sys.argv[1] if len(sys.argv) > 1 else ""), file=sys.stderr)
        sys.exit(2)
    from softdice.cli.app import app

    try:
        app()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


def _missing(command: str) -> str:
    """Return the error about the missing packages of a command, "" if all are there; `command`: first word typed."""
    from softdice.training import PACKAGES

    caller = f"softdice {command}" if command in EXTRAS else "softdice"
    try:
        validation.packages(caller, ("typer", "rich", *PACKAGES.get(command, ())), EXTRAS.get(command, "cli"))
    except ModuleNotFoundError as error:
        return str(error)
    return ""
