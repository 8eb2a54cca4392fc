"""The commands of `softdice`: a new one is an import and a line at the end of this file."""

from __future__ import annotations

import typer

from softdice.cli.check import check
from softdice.cli.info import info
from softdice.cli.predict import predict
from softdice.cli.score import score
from softdice.cli.train import train
from softdice.version import __version__

app = typer.Typer(
    name="softdice",
    help="The Dice coefficient and its family as losses and scores for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    """Print the version and exit, if --version was passed."""
    if requested:
        print(f"softdice {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """The Dice coefficient and its family as losses and scores for PyTorch."""


app.command()(check)
app.command()(info)
app.command()(train)
app.command()(predict)
app.command()(score)
