"""Pictures of a run: curves.png and overlays.png. In shapes *S are the spatial axes of a case."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softdice.evaluation.colours import EXTRA, MISSED, RIGHT
from softdice.evaluation.text import shown
from softdice.images.orientation import RAS

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
"""Lines of the classes. M. Okabe, K. Ito, "Color Universal Design", 2008, without the black, which is the mean's."""
MARKS = (
    ("found", RIGHT, 0.35),
    ("missed", MISSED, 0.65),
    ("invented", EXTRA, 0.65),
    ("of another class", (204, 121, 167), 0.65),
)
"""Words for a voxel in the legend, its RGB, and the opacity of that over the image: as in the report of scores."""
DIMMED = 0.6
"""Brightness of voxels without a label, so that the marks stand out in a bright image, too."""
BRIGHTEST = 5
"""Standard deviations from the mean at which a picture is white, or black: brighter voxels do not darken the rest."""
SCREEN_INCHES, DPI = (16, 9), 100
LONGEST_SIDE = 2000
"""Pixels along a side of a picture, at most about twice as many: larger ones are thinned out to save memory."""
MOST_NAMED = 7
"""Classes with a line of their own, or in a legend."""


@dataclass(frozen=True)
class Shown:
    """One held-out case for the picture: `image` (channels, *S) scaled, its mean Dice as `dice`.

    `truth` and `prediction` are class numbers (*S). `axes` says what the axes S mean: "RAS", or letters such as "zyx".
    """

    name: str
    dice: float
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    axes: str = "yx"


def curves(history: Sequence[dict[str, float]], class_names: Sequence[str]) -> bytes:
    """Return a PNG of a run by epoch: the loss, and the validation Dice of the first classes but the background.

    `history` is that of `Segmenter`, a row for each epoch; `class_names` are of all classes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    mark: Any = {"marker": "o", "markersize": 3} if len(history) <= 30 else {}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["loss"] for row in history], color=COLOURS[4], **mark)
    left.set(xlabel="epoch", ylabel="loss (mean over the epoch)", title="Training loss")
    for number, name in enumerate(class_names[1:]):
        if number < MOST_NAMED:
            column = [row[f"val_dice_{name}"] for row in history]
            right.plot(epochs, column, color=COLOURS[number % len(COLOURS)], label=_plain(name), **mark)
    if len(class_names) > 2:
        every = "mean" if len(class_names) - 1 <= MOST_NAMED else f"mean of {len(class_names) - 1} classes"
        right.plot(epochs, [row["val_dice"] for row in history], color="black", linestyle="--", label=every, **mark)
    right.set(xlabel="epoch", ylabel="Dice", title="Dice on a part of the held-out cases, pooled")
    right.set_ylim(0, 1)
    right.legend(loc="lower right")
    left.set_ylim(bottom=min(0, left.get_ylim()[0]))
    for axes in (left, right):
        axes.set_xlim(0, max(epochs, default=0) + 1)  # of one epoch, matplotlib would choose 0.945 to 1.055
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _png(figure)


def overlays(worst: Sequence[Shown], best: Sequence[Shown], class_names: Sequence[str]) -> bytes:
    """Return a PNG of the size of a screen: a row of the worst cases and one of the best, marked as in the report.

    A volume is shown by its slice with most labelled voxels; a patient is seen from the feet, front up. One of the rows
    may lack cases, not both. `class_names` are those of all classes.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [(kind, cases) for kind, cases in (("worst", worst), ("best", best)) if cases]
    figure = Figure(figsize=SCREEN_INCHES, layout="constrained")
    grid = figure.subplots(len(rows), max(len(cases) for _, cases in rows), squeeze=False)
    for line, (kind, cases) in zip(grid, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, case in zip(line, cases, strict=False):
            image, truth, prediction, where = _plane(case)
            axes.imshow(_marked(image, truth, prediction), interpolation="nearest")
            axes.set_title(f"{kind}: {_plain(case.name)}{where}, mean Dice {case.dice:.3f}", fontsize=10)
            for x, side in ((0.02, "R"), (0.98, "L")) if case.axes == RAS else ():
                axes.text(x, 0.5, side, color="white", transform=axes.transAxes, ha="center", va="center")
    marks = MARKS if len(class_names) > 2 else MARKS[:3]
    handles: Any = [Patch(color=np.array(colour) / 255, label=label) for label, colour, _ in marks]
    classes = ", ".join(class_names[1 : 1 + MOST_NAMED]) + ", ..." * (len(class_names) > 1 + MOST_NAMED)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), title=f"classes: {_plain(classes)}")
    return _png(figure)


def _plane(case: Shown) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Return the plane of a case to draw: image, truth, prediction, and words for the slice, "" for a 2-D case.

    The image is (rows, columns), or RGB (rows, columns, 3), in [0, 1]; the others are class numbers (rows, columns). A
    volume gives the slice with most labelled voxels, across z.
    """
    image, truth, prediction, where = case.image, case.truth, case.prediction, ""
    if truth.ndim == 3:
        axis = 0 if case.axes == "zyx" else 2  # across the slices
        others = tuple(other for other in range(3) if other != axis)
        labelled = int(((truth > 0).sum(others) + (prediction > 0).sum(others)).argmax())
        where = f", slice {labelled} of {truth.shape[axis]}"
        # an image has its channels before the three axes
        image, truth, prediction = (np.take(a, labelled, a.ndim - 3 + axis) for a in (image, truth, prediction))
        if axis == 2:  # the axes are x, y: to rows and columns
            image, truth, prediction = (np.rot90(a, axes=(-2, -1)) for a in (image, truth, prediction))
        if case.axes == RAS:  # the patient's left is at the right, as in the report
            image, truth, prediction = (a[..., ::-1] for a in (image, truth, prediction))
    step = max(1, max(truth.shape) // LONGEST_SIDE)
    image, truth, prediction = (a[..., ::step, ::step] for a in (image, truth, prediction))
    shown = np.clip(image[0] if image.shape[0] != 3 else np.moveaxis(image, 0, -1), -BRIGHTEST, BRIGHTEST)
    low, high = float(shown.min()), float(shown.max())
    return (shown - low) / ((high - low) or 1.0), truth, prediction, where


def _marked(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return an image as RGB (rows, columns, 3) in [0, 1] with `MARKS` in their colours; arguments from `_plane`."""
    plain = np.array(image if image.ndim == 3 else np.repeat(image[..., None], 3, 2), np.float64)
    colours = DIMMED * plain
    labelled, marked, same = truth > 0, prediction > 0, truth == prediction
    masks = labelled & same, labelled & ~marked, marked & ~labelled, labelled & marked & ~same
    for mask, (_, colour, share) in zip(masks, MARKS, strict=True):
        colours[mask] = (1 - share) * plain[mask] + share * np.array(colour) / 255
    return colours


def _plain(name: str) -> str:
    """Return a name of a case or a class as matplotlib shows it: a dollar starts no formula, escapes for odd bytes."""
    return shown(name).replace("$", r"\$")


def _png(figure: Any) -> bytes:
    """Return a figure of matplotlib as a PNG; letters that its font lacks become boxes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
