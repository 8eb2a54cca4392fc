"""`softdice train`: options -> TrainConfig, progress, a table."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from softdice.cli.errors import one_line
from softdice.cli.progress import Bar, loading
from softdice.evaluation.text import shown
from softdice.parallel.ranks import Ranks
from softdice.training.config import DEFAULT_EPOCHS, DEFAULTS, OUT, PRECISIONS, TrainConfig, TrainingError

MOST_ROWS = 20


def _parse_patch(text: str | None) -> tuple[int, ...] | None:
    """Return the voxels along each axis of "96", "96x96x32" or "96,96,32"; raise TrainingError for other texts."""
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.lower().replace(",", "x").split("x"))
    except ValueError:
        raise TrainingError(
            f"softdice train: expected a patch as 96 or 96x96x32, got {text!r}. Change --patch."
        ) from None


def _option(help: str, *names: str, default: str = "", **settings: Any) -> Any:
    """Return an option of typer with `names` and `settings`; `default`: the key of `DEFAULTS` that the help shows."""
    return typer.Option(*names, help=f"{help} [default: {DEFAULTS[default]}]" if default else help, **settings)


EXAMPLES = """Examples:

\b
  softdice train DATA --out run --max-minutes 10
  softdice train DATA --out run --loss tversky+0.5*focal --epochs 50
  softdice train DATA --out run --resume
"""


def train(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Folder with images/ and labels/ of equal names, or nnU-Net's imagesTr/ and labelsTr/. Left out: the "
            "brain that nilearn carries.",
        ),
    ] = None,
    out: Annotated[Path, _option("Folder for the model, curves, pictures and summary.")] = Path(OUT),
    loss: Annotated[
        str | None, _option("A loss of this package by name, or a sum: dice, tversky+0.5*focal.", default="loss")
    ] = None,
    epochs: Annotated[
        int | None, _option(f"Most epochs [default: {DEFAULT_EPOCHS}, none with --max-minutes or --max-steps]")
    ] = None,
    max_minutes: Annotated[float | None, _option("Minutes that the whole run takes, over resumptions.")] = None,
    max_steps: Annotated[int | None, _option("Most steps, over resumptions.")] = None,
    batch_size: Annotated[int | None, _option("Patches per step and device [default: from the data]")] = None,
    patch: Annotated[
        str | None, _option("Voxels along each axis, multiples of 8: 96 or 96x96x32 [default: from the data]")
    ] = None,
    lr: Annotated[float | None, _option("Highest learning rate of AdamW.", default="lr")] = None,
    val_fraction: Annotated[float | None, _option("Share of the cases held out.", default="val_fraction")] = None,
    seed: Annotated[int | None, _option("Seed of the split, the weights and the patches.", default="seed")] = None,
    resume: Annotated[bool, _option("Go on with the run in --out from its last complete epoch.", "--resume")] = False,
    devices: Annotated[
        int | None, _option("How many GPUs, or processes without one. Not under torchrun.", default="devices")
    ] = None,
    fused_head: Annotated[
        bool, _option("Compute the last convolution and the loss chunk by chunk: saves memory.", "--fused-head")
    ] = False,
    round: Annotated[bool, _option("Round labels that are stored as nearly whole numbers.", "--round")] = False,
    ignore_geometry: Annotated[
        bool, _option("Image and label belong together whatever their affines say.", "--ignore-geometry")
    ] = False,
    ignore: Annotated[
        int | None, _option("Label of voxels to leave out of loss and scores, such as 255. It is no class.")
    ] = None,
    nodata: Annotated[
        float | None,
        _option("Value of the images that stands for missing data, beside the one that GDAL's tag names."),
    ] = None,
    foreground: Annotated[
        bool | None,
        _option(
            "Train all labels but 0 as one class, where each object has a number; --no-foreground: each is a class.",
            "--foreground/--no-foreground",
            show_default=False,
        ),
    ] = None,
    mirror: Annotated[
        str | None,
        _option(
            "Axes along which patches are mirrored; x is left-right [default: x for pictures whose labels allow it, "
            "none for volumes]",
            metavar="none|x|y|xy|...",
        ),
    ] = None,
    precision: Annotated[str | None, _option(f"One of {', '.join(PRECISIONS)}.", default="precision")] = None,
) -> None:
    """Train a segmentation network with a loss of this package on DATA.

    Writes model.ckpt, metrics.csv, curves.png, overlays.png and summary.json into --out; earlier ones get a number.
    """
    options = dict(locals())  # by the names of TrainConfig
    started = time.monotonic()
    console = Console()
    ranks = Ranks.here()
    # without torchrun, Lightning starts the other processes with this command, and their number in LOCAL_RANK
    first = (int(os.environ.get("LOCAL_RANK", "0")) if ranks is None else ranks.rank) == 0
    with one_line():
        try:
            settings = options | {"data": data and str(data), "out": str(out), "patch": _parse_patch(patch)}
            # None: not passed, so that a resumed run keeps the value of its first part
            settings |= {name: settings[name] or None for name in ("fused_head", "round", "ignore_geometry")}
            config = TrainConfig(**settings)
            if first:
                loading(console)
            from softdice.training import train as run

            with Bar(console) as bar:
                summary = run(config, bar, started=started)
        except KeyboardInterrupt as stop:
            if first:
                print(f"Stopped. {_following(options, getattr(stop, 'saved_epochs', 0))}", file=sys.stderr)
            raise typer.Exit(130) from None
        except TrainingError as error:
            if error.saved_epochs is None:  # nothing had begun
                raise
            following = _following(options, error.saved_epochs, other_settings=error.other_settings)
            raise TrainingError(f"{error} {following}") from error
        if summary:
            _show(console, summary, out)


def _following(options: dict[str, Any], saved_epochs: int, *, other_settings: bool = False) -> str:
    """Return a sentence on what a run that ended early has saved, and the command that resumes it or starts it again.

    Args:
        options: of `train`, by name. saved_epochs: complete ones in the checkpoint, 0 if the run had not begun.
        other_settings: resuming would fail again, so the command starts anew.
    """
    model = Path(options["out"]) / "model.ckpt"
    kept = saved_epochs > 0 or (options["resume"] and model.exists())
    epoch = f" epoch {saved_epochs}," if saved_epochs else ""
    saved = f"Saved:{epoch} in {model}." if kept else "Nothing was saved."
    resume = kept and not other_settings
    command = _command({**options, "resume": resume})
    if Ranks.here() is not None:  # how torchrun was called, only torchrun knows
        command = f"the same torchrun command {'with' if resume else 'without'} --resume"
    return f"{saved} {'To go on' if resume else 'Start again with'}: {command}"


def _command(options: dict[str, Any]) -> str:
    """Return the command line of `train` with these options, by name, quoted for a shell."""
    words = ["softdice", "train"]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [option] if value else ["--no-foreground"] * (name == "foreground")
        elif value is not None:
            words += [str(value)] if name == "data" else [option, str(value)]
    return shlex.join(words)


def _show(console: Console, summary: dict[str, Any], out: Path) -> None:
    """Print `summary`, the content of summary.json, as a short table, then the files in `out` and the next step."""
    table = Table(title=f"Dice on {len(summary['held_out'])} held-out cases", title_justify="left")
    table.add_column("class")
    table.add_column("mean over cases", justify="right")
    table.add_column("pooled", justify="right")
    classes = summary["classes"][1:]
    for row in classes[:MOST_ROWS]:
        unknown = "" if row["trained"] else ", in no training image"
        table.add_row(Text(shown(row["name"]) + unknown), _figure(row["dice"]), _figure(row["dice_pooled"]))
    if len(classes) > MOST_ROWS:
        table.add_row(f"... {len(classes) - MOST_ROWS} more in summary.json", "", "")
    table.add_section()
    table.add_row("mean Dice", _figure(summary["mean_dice"]), "")
    console.print(table)
    low, high = summary["mean_dice_95"]
    interval = "" if low is None else f" (95 % interval {_figure(low)} to {_figure(high)})"
    model, masks = (shlex.quote(str(path)) for path in (out / "model.ckpt", out / "masks"))
    files = "model.ckpt, metrics.csv, curves.png, overlays.png, summary.json"
    for line in (
        f"Held-out Dice {_figure(summary['mean_dice'])}{interval} after "
        f"{summary['steps_done']} steps in {summary['epochs_done']} epochs",
        f"Written to {out}: {files}",
        f"Look: {out / 'overlays.png'}",
        f"Next: softdice predict {model} NEW_IMAGES {masks}",
    ):
        console.print(shown(line), markup=False, highlight=False, soft_wrap=True)


def _figure(value: float | None) -> str:
    """Return a Dice coefficient as the table has it."""
    return "none" if value is None else f"{value:.4f}"
