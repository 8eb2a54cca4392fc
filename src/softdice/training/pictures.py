"""numbers and labels -> pictures: curves.png and overlays.png."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
"""M. Okabe, K. Ito, "Color Universal Design", 2008, without the black, which pictures are full of."""
OPACITY = 0.55
MOST_NAMED = 7


@dataclass(frozen=True)
class Shown:
    """One held-out case for the picture: `image` (channels, *S), `truth` and `prediction` (*S), its mean Dice."""

    name: str
    dice: float
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def curves(history: Sequence[dict[str, float]], class_names: Sequence[str]) -> bytes:
    """history of a run -> PNG: the loss and the validation Dice per class, by epoch."""
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
            right.plot(epochs, column, color=COLOURS[number % len(COLOURS)], label=name, **mark)
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
    """held-out cases -> PNG: a row per case with image, truth and prediction side by side.

    Of a volume, the slice along its last axis that has most labelled voxels is shown.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [("worst", case) for case in worst] + [("best", case) for case in best]
    slices = [_slices(case) for _, case in rows]
    ratio = float(np.mean([image.shape[0] / image.shape[1] for image, _, _, _ in slices]))
    figure = Figure(figsize=(9, 0.8 + len(rows) * (2.9 * ratio + 0.35)), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for line, (kind, case), (image, truth, prediction, where) in zip(grid, rows, slices, strict=True):
        titles = (f"{kind}: {case.name}{where}", "truth", f"prediction, mean Dice {case.dice:.3f}")
        for axes, labels, title in zip(line, (None, truth, prediction), titles, strict=True):
            axes.imshow(image, cmap="gray", interpolation="nearest")
            if labels is not None:
                axes.imshow(_colours(labels), interpolation="nearest")
            axes.set_title(title, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    foreground = list(enumerate(class_names))[1:]
    shown = foreground[:MOST_NAMED]
    handles: Any = [Patch(color=COLOURS[(number - 1) % len(COLOURS)], label=name) for number, name in shown]
    more: Any = {}
    if len(shown) < len(foreground):
        more["title"] = f"first {len(shown)} of {len(foreground)} classes; colours repeat"
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), **more)
    return _png(figure)


def _slices(case: Shown) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """case -> image (rows, columns) or with RGB in [0, 1], truth, prediction, and which slice it is."""
    image, truth, prediction, where = case.image, case.truth, case.prediction, ""
    if truth.ndim == 3:
        labelled = ((truth > 0).sum((0, 1)) + (prediction > 0).sum((0, 1))).argmax()
        where = f", slice {labelled} of {truth.shape[2]}"
        # Volumes have x first and grow to the back: turned, x runs to the right and the front is up.
        image, truth, prediction = (np.rot90(a[..., labelled], axes=(-2, -1)) for a in (image, truth, prediction))
    grey = image[0] if image.shape[0] != 3 else np.moveaxis(image, 0, -1)
    low, high = float(grey.min()), float(grey.max())
    return (grey - low) / ((high - low) or 1.0), truth, prediction, where


def _colours(labels: np.ndarray) -> np.ndarray:
    """(rows, columns) class numbers -> RGBA; the first class is transparent."""
    from matplotlib.colors import to_rgba

    table = np.array([to_rgba(colour, OPACITY) for colour in COLOURS])
    coloured = table[(labels.astype(int) - 1) % len(COLOURS)]
    coloured[labels == 0] = 0
    return coloured


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
