"""End all ranks, the processes that torchrun starts, when one of them fails, with one message."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl

from softdice.images.files import FileError
from softdice.parallel.ranks import LostRankError, Ranks
from softdice.training.config import TrainConfig, TrainingError, refusal

T = TypeVar("T")
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "expected every rank of the group")
"""Words of errors that torch raises in a process once another one is gone."""


class SilencedError(TrainingError):
    """Ends a rank above 0 without a message: rank 0 raises the error of the run, so that it is printed once."""


def is_first(ranks: Ranks | None) -> bool:
    """Return whether this is the process that talks and writes; Lightning starts the others with the same command."""
    return (int(os.environ.get("LOCAL_RANK", "0")) if ranks is None else ranks.rank) == 0


def together(ranks: Ranks | None, prepare: Callable[[], T]) -> T:
    """Call `prepare` on every rank and return its result; if it fails on one rank, end all. `ranks`: None for a single.

    If any rank raised TrainingError, FileError or ModuleNotFoundError, rank 0 raises TrainingError with the message of
    the first of them, and the others raise SilencedError. Alone, `prepare` raises its error itself.
    """
    if ranks is None:
        return prepare()
    result: Any = None
    problem: Exception | None = None
    try:
        result = prepare()
    except (TrainingError, FileError, ModuleNotFoundError) as error:
        problem = error
    _end_all(ranks, "" if problem is None else str(problem))
    return result


def alike(ranks: Ranks | None, description: object) -> None:
    """Raise TrainingError on rank 0, SilencedError on the others, unless all have one `description` of their data.

    Pickle sends it to all ranks.
    """
    if ranks is None:
        return
    same = description == ranks.from_first(description)
    expected, got = "the same data as on the first machine", "other names, labels or shapes"
    _end_all(ranks, "" if same else str(refusal(expected, got, "Give every machine the same DATA.")))


def _end_all(ranks: Ranks, problem: str) -> None:
    """Raise on every rank if any has a `problem`, a message, "" for no problem: TrainingError on rank 0.

    Its message is the first problem. The other ranks raise SilencedError.
    """
    problems = ranks.gather(problem)
    for rank, text in enumerate(problems):
        if text and ranks.rank == 0:
            raise TrainingError(text if rank == 0 else f"rank {rank}: {text}")
        if text:
            raise SilencedError(text)


def devices(config: TrainConfig, ranks: Ranks | None, stored: dict[str, Any] | None) -> int | None:
    """Return the number of devices of a run: under torchrun that of its processes, else `config.devices`, maybe None.

    None stands for the stored number or the default. `stored` is the content of the checkpoint to resume, or None.

    Raises:
        TrainingError: torchrun started another number than asked for, or than the run to be resumed had.
    """
    if ranks is None:
        return config.devices
    if config.devices not in (None, ranks.count):
        expected = f"devices {ranks.count}, as many processes as torchrun started"
        raise refusal(expected, config.devices, "Leave --devices out.")
    before = ranks.count if stored is None else stored["settings"].get("devices", 1)
    if before != ranks.count:
        expected = f"{before} processes, with which the run in {config.out} was started"
        raise refusal(expected, f"{ranks.count} from torchrun", "Start as many, or take another --out.")
    return ranks.count


class LeftToTorchrun(pl.Callback):
    """Lets SIGTERM end this process at once. Lightning's handler would first wait for the ranks that torchrun ended."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put back the system's handler."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def lost(ranks: int, problem: RuntimeError) -> TrainingError | None:
    """Return the error to show if `problem`, in a step of `ranks` processes, says that one is gone; else None."""
    text = str(problem).splitlines()[0] if str(problem) else ""
    if ranks == 1 or not (isinstance(problem, LostRankError) or any(words in text for words in LOST)):
        return None
    advice = "One of them has ended: its own message says why."
    return TrainingError(f"softdice train: expected {ranks} processes to go on together, got: {text}. {advice}")
