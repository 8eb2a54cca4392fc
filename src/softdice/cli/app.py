"""The commands of `softdice`: a new one is an import and a line at the end of this file."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from softdice.cli.check import check
from softdice.cli.info import info
from softdice.cli.predict import predict
from softdice.cli.score import EXAMPLES, score
from softdice.cli.train import EXAMPLES as TRAIN_EXAMPLES
from softdice.cli.train import train
from softdice.version import __version__


class GroupedHelp(TyperCommand):
    """A command whose help lists the options group by group; the group is an option's `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the groups of options in the order in which each first occurs.

        click calls it with its Context and HelpFormatter.
        """
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            title = "Arguments" if parameter.param_type_name == "argument" else "Options"
            name_and_help = parameter.get_help_record(ctx)
            if name_and_help is not None:  # None for a hidden option
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or title, []).append(name_and_help)
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl(rows)


app = typer.Typer(
    name="softdice",
    help="The Dice coefficient and its family as losses and scores for PyTorch.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    """Print the version and exit, if --version was passed."""
    if requested:
        print(f"softdice {__version__}")
        raise typer.Exit


@app.callback()  # typer takes its docstring for the help of the program
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """The Dice coefficient and its family as losses and scores for PyTorch."""


app.command(short_help="Compute a known loss, and compare every backend with float64.")(check)
app.command()(info)
app.command(short_help="Train a network on a folder of images and labels.", epilog=TRAIN_EXAMPLES)(train)
app.command(short_help="Write a mask for every image, with a trained network.")(predict)
app.command(
    short_help="Score masks against labels, case by case and class by class.", cls=GroupedHelp, epilog=EXAMPLES
)(score)
