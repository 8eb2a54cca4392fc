"""An error that the user can put right -> one line on standard error and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from softdice import interrupt
from softdice.evaluation.labels import ScoreError
from softdice.evaluation.text import shown
from softdice.images.image import FileError
from softdice.training.config import TrainingError


@contextmanager
def one_line(interrupted: str = "Stopped.") -> Iterator[None]:
    """Inside, what the user can put right ends the command with a line and 2, Ctrl-C with a line and 130."""
    try:
        with interrupt.heard():
            yield
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer must not end as an error
        raise typer.Exit(141) from None
    except (TrainingError, FileError, ScoreError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and "pip install" not in str(error):
            raise
        print(shown(" ".join(str(error).split())), file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise typer.Exit(130) from None
