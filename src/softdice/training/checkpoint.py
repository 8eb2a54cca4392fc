"""run -> model.ckpt, and back: tensors, numbers, words, lists and dicts, nothing that could run code."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from softdice.images.files import written_beside
from softdice.training.config import TrainingError

FORMAT = "softdice-model"
VERSION = 1
KEYS = ("network", "weights", "optimizer", "epoch", "step", "elapsed_s", "history", "settings", "data")
"""What a checkpoint holds beside `format` and `version`; see docs/training.md."""


def write_bytes(path: Path, content: bytes) -> None:
    """bytes -> file, written beside and renamed.

    Raises:
        TrainingError: the disk is full or the folder cannot be written.
    """
    try:
        with written_beside(path) as file:
            file.write(content)
    except OSError as error:
        raise TrainingError(
            f"softdice: expected to write {path}, got: {error.strerror or error}. Make room, or choose another place."
        ) from error


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """content with the keys `KEYS` -> file."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **{key: content[key] for key in KEYS}}, buffer)
    write_bytes(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """file -> content, on the CPU, read with `weights_only=True`.

    Raises:
        TrainingError: no such file, or not one that `softdice train` wrote.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(
            f"softdice: expected a model at {path}, got: {error.strerror or error}. Give the path of a model.ckpt."
        ) from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError, KeyError, TypeError,
            AttributeError, IndexError, UnicodeDecodeError, OverflowError) as error:  # fmt: skip
        raise _not_ours(path, "a file that torch does not read as plain weights") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _not_ours(path, "a file without the mark of one")
    if content.get("version") != VERSION:
        raise _not_ours(path, f"version {content.get('version')} where this softdice reads {VERSION}")
    if missing := [key for key in KEYS if key not in content]:
        raise _not_ours(path, f"a file without {', '.join(missing)}")
    return content


def _not_ours(path: Path, got: str) -> TrainingError:
    return TrainingError(
        f"softdice: {path}: expected a model that softdice train wrote, got {got}. Give the path of a model.ckpt."
    )
