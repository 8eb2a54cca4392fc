"""`softdice predict`: a trained model -> masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from softdice.cli.errors import one_line
from softdice.scoring.writing import shown


def predict(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A model.ckpt that softdice train wrote.")],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the masks; not that of the images.")],
) -> None:
    """Write a mask for every image, in its format and geometry, with the label values of the training data."""
    console = Console()
    with one_line():
        from softdice.training import predict as run

        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("predicting", total=None)
            written = run(
                checkpoint,
                images,
                out,
                progress=lambda done, total, name: bar.update(
                    task, completed=done, total=total, description=escape(shown(name))
                ),
            )
        masks = f"{len(written)} mask{'' if len(written) == 1 else 's'}"
        console.print(f"{masks} written to {out}", markup=False, highlight=False, soft_wrap=True)
