"""What all pictures of the documentation share: one colour for softdice, one for each peer, and two forms of plot.

`python -m benchmarks.pictures` draws those of docs/ again, from the figures that are kept in results/.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks import publish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "softdice": "#0072B2", "MONAI": "#D55E00", "nnU-Net": "#009E73", "smp": "#CC79A7", "kornia": "#E69F00",
    "exacta": "#56B4E9", "a loop": "#000000", "torch": "#777777",
}  # fmt: skip
"""A colour for each program, which reads alike in all pictures and can be told apart by colour-blind readers."""


def colour(title: str) -> str:
    """Return the colour of the program that a title names."""
    return next((shade for name, shade in COLOURS.items() if name in title), COLOURS["softdice"])


def places(groups: Sequence[str], rows: int) -> list[list[float]]:
    """Return the height of each row of each group, from the top down, with room for a row between two groups."""
    return [[group * (rows + 1) + row for row in range(rows)] for group in range(len(groups))]


def dots(
    axes: Axes, groups: Sequence[str], titles: Sequence[str], values: Sequence[Sequence[float]], unit: str
) -> None:
    """Draw values[group][row] as dots on a log axis, a line for each, with its number beside it.

    A row that is a weaker form of softdice, every one of its colour but the first, is a ring.
    """
    first = next(title for title in titles if colour(title) == COLOURS["softdice"])
    for heights, numbers in zip(places(groups, len(titles)), values, strict=True):
        for title, height, number in zip(titles, heights, numbers, strict=True):
            ring = colour(title) == COLOURS["softdice"] and title != first
            fill = "white" if ring else colour(title)
            axes.plot([number], [height], "o", markersize=8, markerfacecolor=fill, markeredgecolor=colour(title))
            axes.annotate(f"{number:.3g}" if number < 1000 else f"{number:.0f}", (number, height), (8, 0),
                          textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.2, high * 2)  # room for the numbers
    _label(axes, groups, titles, unit)


def bars(
    axes: Axes, groups: Sequence[str], titles: Sequence[str], values: Sequence[Sequence[float]], unit: str
) -> None:
    """Draw values[group][row] as bars from zero, with their numbers at the end."""
    first = next(title for title in titles if colour(title) == COLOURS["softdice"])
    for heights, numbers in zip(places(groups, len(titles)), values, strict=True):
        for title, height, number in zip(titles, heights, numbers, strict=True):
            ring = colour(title) == COLOURS["softdice"] and title != first
            fill = "white" if ring else colour(title)
            bar = axes.barh([height], [number], 0.8, facecolor=fill, edgecolor=colour(title))
            axes.bar_label(bar, fmt="%.2f", padding=3, fontsize=8)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
    _label(axes, groups, titles, unit)


def _label(axes: Axes, groups: Sequence[str], titles: Sequence[str], unit: str) -> None:
    """Name every row by its program, and every group above its rows."""
    heights = places(groups, len(titles))
    axes.set_yticks([height for rows in heights for height in rows], [*titles] * len(groups), fontsize=8)
    axes.set_ylim(heights[-1][-1] + 0.8, -1.8)
    for rows, group in zip(heights, groups, strict=True):
        axes.text(0.0, rows[0] - 0.9, f" {group}", transform=axes.get_yaxis_transform(), fontsize=9, weight="bold",
                  va="center")  # fmt: skip
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def main() -> None:
    """Draw the pictures of docs/ from the figures of results/."""
    from benchmarks import head, losses, upsampled

    head.plot(publish.kept("head"), publish.DOCS / "head.png")
    upsampled.plot(publish.kept("upsampled"), publish.DOCS / "upsampled.png")
    losses.plot([losses.Row(**row) for row in publish.kept("losses")], publish.DOCS / "losses.png")


if __name__ == "__main__":
    main()
