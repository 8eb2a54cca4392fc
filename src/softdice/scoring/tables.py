"""summaries -> tables for a terminal."""

from __future__ import annotations

import math

import numpy as np
from rich.table import Table as Grid

from softdice.scoring.summary import Comparison, Summary, Table


def class_table(title: str, table: Table, summary: Summary) -> Grid:
    """Per class and over all: mean over cases with its interval, pooled, IoU, and how many cases they rest on."""
    grid = _grid(title, "cases", "Dice", "95 % interval", "pooled", "IoU", "pooled IoU")
    for k, key in enumerate(table.keys):
        grid.add_row(
            table.label(key),
            str(summary.cases[k]),
            text(summary.dice[k]),
            interval(summary.dice_interval[:, k]),
            text(summary.pooled_dice[k]),
            text(summary.iou[k]),
            text(summary.pooled_iou[k]),
        )
    grid.add_section()
    grid.add_row(
        "all classes",
        str(len(table.cases)),
        text(summary.macro_dice),
        interval(summary.macro_interval),
        text(summary.micro_dice),
        text(summary.macro_iou),
        text(summary.micro_iou),
    )
    return grid


def comparison_table(title: str, table: Table, comparison: Comparison) -> Grid:
    """Per class and over all: paired difference of Dice with its interval and Wilcoxon's p."""
    grid = _grid(title, "pairs", "difference", "95 % interval", "Wilcoxon p")
    for k, key in enumerate(comparison.keys):
        grid.add_row(
            table.label(key),
            str(comparison.cases[k]),
            text(comparison.difference[k], "+.4f"),
            interval(comparison.interval[:, k], "+.4f"),
            text(comparison.p_value[k], ".3g"),
        )
    grid.add_section()
    grid.add_row(
        "all classes",
        "",
        text(comparison.macro_difference, "+.4f"),
        interval(comparison.macro_interval, "+.4f"),
        "",
    )
    return grid


def text(value: float, form: str = ".4f") -> str:
    """A number, or a dash for nan."""
    return "-" if math.isnan(value) else format(float(value), form)


def interval(bounds: np.ndarray, form: str = ".4f") -> str:
    """Two bounds, or a dash for nan."""
    return "-" if math.isnan(bounds[0]) else f"{bounds[0]:{form}} .. {bounds[1]:{form}}"


def _grid(title: str, *columns: str) -> Grid:
    grid = Grid(title=title, title_justify="left", title_style="bold")
    grid.add_column("class")
    for column in columns:
        grid.add_column(column, justify="right")
    return grid
