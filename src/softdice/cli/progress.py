"""Progress of a run: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress
from rich.console import Console

LOG_S = 30.0
"""Seconds between two lines in a log."""


def loading(console: Console) -> None:
    """Print a line before the imports that take seconds."""
    console.print("Loading ...", markup=False, highlight=False)


def drawn(console: Console, *columns: progress.ProgressColumn) -> progress.Progress:
    """Return a progress bar that disappears when it ends; one that prints nothing if `console` is no terminal.

    The oldest rich ends a disabled bar with an empty line, unless its console is quiet.
    """
    shown = console.is_terminal
    shown_on = console if shown else Console(quiet=True)
    return progress.Progress(*columns, console=shown_on, transient=True, disable=not shown)


class Bar:
    """A `softdice.training.module.Reporter` that draws; used as a context, inside which the bar is on the screen."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = drawn(
            console, progress.TextColumn("{task.description}"), progress.BarColumn(),
            progress.TextColumn("{task.percentage:3.0f} %"), progress.TimeElapsedColumn(),
            progress.TextColumn("left"), progress.TimeRemainingColumn(),
        )  # fmt: skip
        self.task: progress.TaskID | None = None  # the bar's line, from the first progress on
        self.first: tuple[float, float] | None = None  # time in s and share done at the first progress
        self.written = 0.0  # time in s of the last line in a log, like `first` of `time.monotonic`

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def line(self, text: str) -> None:
        """Print one line, above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, fraction: float, epoch: int, loss: float, dice: float | None) -> None:
        """Draw the progress on a terminal; elsewhere print a line of it, at the first call, each LOG_S and at the end.

        Args:
            fraction: share of the training that is done, from 0 to 1. epoch: the one under way, from 1.
            loss: mean of the epoch so far. dice: of the last validation, None before the first.
        """
        text = f"epoch {epoch:3d}  loss {loss:7.4f}  validation Dice {'     -' if dice is None else f'{dice:.4f}'}"
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task(text, total=1.0)
            self.bar.update(self.task, completed=fraction, description=text)
            return
        now = time.monotonic()
        since, done = self.first = self.first or (now, fraction)
        if fraction >= 1 or now - self.written >= LOG_S or since == now:
            self.written = now
            left_s = (now - since) * (1 - fraction) / (fraction - done) if fraction > done else None
            left = "" if left_s is None else f"  {round(left_s) // 60}:{round(left_s) % 60:02d} left"
            self.line(f"{text}  {100 * fraction:3.0f} %{left}")
