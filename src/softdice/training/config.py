"""What a person asks of a training, and what a bad answer looks like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, Any] = {
    "loss": "dice+ce",
    "lr": 1e-2,
    "val_fraction": 0.2,
    "seed": 42,
    "devices": 1,
    "precision": "32-true",
    "fused_head": False,
    "round": False,
    "ignore_geometry": False,
}
"""Settings that do not depend on the data. Patch and batch size do: `softdice.training.plan`."""

DEFAULT_EPOCHS = 100
"""Epochs of a run without a limit of epochs, minutes or steps."""

OUT = "softdice-run"

PRECISIONS = ("32-true", "bf16-mixed")

MIRRORS = ("x", "y", "z", "xy", "xz", "yz", "xyz")
"""Axes along which patches may be mirrored: x from left to right, y and z the others."""


class TrainingError(ValueError):
    """Something that the person who asked for a training or a prediction can put right, in one line.

    Attributes:
        saved_epochs: complete epochs in the checkpoint of the run that it ended, None where it ended none.
        other_settings: True if a resumed run would fail again: the user has to start anew with other settings.
    """

    saved_epochs: int | None = None
    other_settings = False


def refusal(
    expected: str, got: object, advice: str = "", *, path: object = None, command: str = "softdice train"
) -> TrainingError:
    """Return the error "command: path: expected ..., got .... Advice." for the caller to raise.

    `path`: of the file that the error is about, None if there is no such file.
    """
    where = command if path is None else f"{command}: {path}"
    return TrainingError(f"{where}: expected {expected}, got {got}. {advice}".rstrip())


class Interrupted(KeyboardInterrupt):
    """A run was stopped by hand; `saved_epochs` complete epochs are in its checkpoint."""

    def __init__(self, saved_epochs: int) -> None:
        super().__init__()
        self.saved_epochs = saved_epochs


def no_memory(error: BaseException) -> bool:
    """Return whether an error of numpy or torch says that there is not enough memory."""
    message = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or any(
        text in message for text in ("OutOfMemoryError", "can't allocate memory", "not enough memory")
    )


def size(shape: Sequence[int]) -> str:
    """Return a shape as messages have it, "96x96x32"."""
    return "x".join(map(str, shape))


def listed(names: Sequence[str], most: int) -> str:
    """Return the first `most` names separated by commas, with dots where there are more."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def unread(folder: Path) -> str:
    """Return advice on a folder without images: what it holds instead, without hidden files."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return f"It holds {listed(names, 5)}, which are not read." if names else "Check the folder."


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; None means the default, or on resuming what the run was started with.

    Args:
        data: folder with `images/` and `labels/`; None trains on the brain that nilearn carries.
        out: folder for the model, the curves, the pictures and the summary.
        loss: a loss of this package by name, or a sum: "dice", "dice+ce", "tversky+0.5*focal".
        epochs: passes over the data, > 0. None: 100, or as many as fit into `max_minutes` and `max_steps`.
        max_minutes: budget in minutes of wall time for reading and training, over all resumptions, > 0.
        max_steps: most steps over all resumptions, > 0; the last epoch then ends early.
        batch_size: patches per step and device, > 0.
        patch: voxels along each axis, multiples of 8; one number stands for all axes.
        lr: highest learning rate of AdamW, > 0.
        val_fraction: share of the cases that is held out, in (0, 1).
        seed: of the split, the network's first weights, the patches and their augmentation, in [0, 2^32).
        resume: go on with the run in `out` from its last complete epoch; starts one where there is none.
        devices: how many GPUs of this machine or, without a GPU, processes, > 0. None under torchrun: as many processes
            as it started, on all machines together.
        precision: "32-true" or "bf16-mixed".
        fused_head: compute the last convolution and the loss chunk by chunk (`softdice.FusedHead`): the memory of the
            loss then does not depend on the number of classes.
        round: round labels that are stored as nearly whole numbers.
        ignore_geometry: image and label belong together by position, whatever their affines say.
        ignore: label value of voxels that are left out: they enter neither the loss nor any score, and it is no class.
        nodata: value of the images that stands for missing data, as what the tag of GDAL names does.
        foreground: train all label values but 0 as one class; False: each value is a class though it looks like the
            number of an object.
        mirror: axes along which training images are mirrored, "x" (left-right), "xy", ..., or "none". None: "x" for
            pictures unless two classes would change places, "none" for volumes.

    Raises:
        TrainingError: a value out of its range.
    """

    data: str | None = None
    out: str = OUT
    loss: str | None = None
    epochs: int | None = None
    max_minutes: float | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    patch: tuple[int, ...] | None = None
    lr: float | None = None
    val_fraction: float | None = None
    seed: int | None = None
    resume: bool = False
    devices: int | None = None
    precision: str | None = None
    fused_head: bool | None = None
    round: bool | None = None
    ignore_geometry: bool | None = None
    ignore: int | None = None
    nodata: float | None = None
    foreground: bool | None = None
    mirror: str | None = None

    def __post_init__(self) -> None:
        """Raise TrainingError for the first value that is out of its range."""
        for name in ("epochs", "max_minutes", "max_steps", "batch_size", "lr", "devices"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise _wrong(name, "a number above 0", value)
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise _wrong("val_fraction", "a share in (0, 1)", self.val_fraction)
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise _wrong("seed", "a whole number in [0, 2^32)", self.seed)
        if self.precision is not None and self.precision not in PRECISIONS:
            raise _wrong("precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        if self.mirror not in (None, "none", *MIRRORS):
            raise _wrong("mirror", "none, or axes among x, y and z as in xy", self.mirror)
        if self.patch is not None and (not self.patch or any(n < 8 or n % 8 for n in self.patch)):
            raise _wrong("patch", "multiples of 8", size(self.patch))


def _wrong(name: str, expected: str, got: object) -> TrainingError:
    """Return the error about a field of `TrainConfig`."""
    return refusal(f"{name} to be {expected}", got, f"Change --{name.replace('_', '-')}.")


LENGTH = ("epochs", "max_minutes", "max_steps")
"""Settings that decide how long a run lasts: they may change when it is resumed."""

RUN_SETTINGS = tuple(field.name for field in fields(TrainConfig) if field.name not in ("out", "resume", *LENGTH))
"""Settings that decide the weights: they stay what they were when a run is resumed. The data may have moved."""


def merge(config: TrainConfig, stored: dict[str, Any]) -> TrainConfig:
    """Return the settings of a resumed run: each from `config`, or from `stored` where it is None there.

    `stored` is "settings" of its checkpoint, by the names of `TrainConfig`; settings that it lacks have the default.

    Raises:
        TrainingError: a setting that decides the weights is not None and differs from the stored one.
    """
    merged = {field.name: getattr(config, field.name) for field in fields(config)}
    for name in (*RUN_SETTINGS, *LENGTH):
        before = stored.get(name, DEFAULTS.get(name))
        before = tuple(before) if isinstance(before, list) else before
        if merged[name] is None:
            merged[name] = before
        asked = merged[name]
        if name == "patch" and before and len(asked) == 1:
            asked *= len(before)  # (16,) is 16x16
        if asked != before and name not in ("data", *LENGTH):  # the data may have moved: `train` compares their names
            expected = f"{name.replace('_', '-')} {before}, with which the run in {config.out} was started"
            raise refusal(expected, merged[name], "Leave the option out, or take another --out.")
    return TrainConfig(**merged)


def all_settings(config: TrainConfig, stored: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings of a run by the names of `TrainConfig`, with defaults; what the data decide stays None.

    `stored`: "settings" of the checkpoint that is resumed; they replace what is None. None for a new run.
    """
    config = config if stored is None else merge(config, stored)
    settings = {name: getattr(config, name) for name in (*RUN_SETTINGS, *LENGTH)}
    return settings | {name: value for name, value in DEFAULTS.items() if settings[name] is None}
