"""`softdice predict`: a trained model -> masks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from softdice.cli.errors import one_line
from softdice.cli.progress import drawn
from softdice.evaluation.text import shown


def predict(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A model.ckpt that softdice train wrote.")],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the masks; not that of the images.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that lie where masks are to be written.")
    ] = False,
    decide: Annotated[
        str | None,
        typer.Option(
            metavar="tuned|argmax",
            help="Cut by the thresholds that softdice train found on its held-out cases, or take the likeliest class "
            "[default: tuned, of a model that has them]",
        ),
    ] = None,
    confidence: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a CSV file of how sure each mask is, the least sure first."),
    ] = None,
) -> None:
    """Write a mask for every image, in its format and geometry, with the label values of the training data.

    Exit code 0: all written; 1: some images have no mask, they are listed at the end; 2: wrong usage.
    """
    console = Console()
    with one_line():
        errors: list[str] = []
        lines: list[str] = []
        with drawn(console) as bar:
            task = bar.add_task("loading", total=None)  # the imports below take seconds
            from softdice.images.files import is_store, left_out, list_images
            from softdice.training import predict as run
            from softdice.training.inference import PredictionError

            def progress(done: int, total: int, name: str) -> None:
                """Draw how many of all images are done, and the name of the last one."""
                bar.update(task, completed=done, total=total, description=escape(shown(name)))

            try:
                written = run(
                    checkpoint, images, out, overwrite=overwrite, decide=decide, confidence=confidence,
                    progress=progress, line=lines.append,
                )  # fmt: skip
            except PredictionError as problem:
                written, errors = problem.written, problem.errors
        for line in lines:
            print(shown(line), file=sys.stderr)
        masks = f"{len(written)} mask{'s' * (len(written) != 1)}"
        console.print(f"{masks} written to {out}", markup=False, highlight=False, soft_wrap=True)
        others = left_out(images, list_images(images).values()) if images.is_dir() and not is_store(images) else ""
        if others:
            print(shown(others), file=sys.stderr)
        if errors:
            reasons = (shown(" ".join(error.split())) for error in errors)
            print(
                f"Not predicted: {len(errors)} of {len(written) + len(errors)}", *reasons, sep="\n  ", file=sys.stderr
            )
            raise typer.Exit(1)
