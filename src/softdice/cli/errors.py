"""End a command with one line on standard error, and the exit code, for errors that the user can put right."""

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
    """Turn an error that the user can put right into one line on standard error and typer.Exit with 2.

    Ctrl-C exits with 130 after the line `interrupted`, a pipe whose reader is gone with 141. Other errors, which are
    faults of the program, pass.
    """
    try:
        with interrupt.heard():  # Ctrl-C raises KeyboardInterrupt inside
            yield
    except BrokenPipeError:  # the reader has ended, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes the buffer at exit, which must not fail
        raise typer.Exit(141) from None
    except (TrainingError, FileError, ScoreError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and "pip install" not in str(error):  # a fault of the program
            raise
        print(shown(" ".join(str(error).split())), file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise typer.Exit(130) from None
