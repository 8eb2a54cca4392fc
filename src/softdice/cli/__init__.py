"""The command `softdice`. Nothing of the extras is imported before a command runs."""

from __future__ import annotations

import sys

from softdice import interrupt


def main() -> None:
    """Run the command line; without the packages that it needs, say which extra brings them and exit with 2."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"softdice: expected {error.name} to be installed, got no such package. Run: pip install 'softdice[cli]'",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    from softdice.cli.app import app

    interrupt.loud()
    try:
        app()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
