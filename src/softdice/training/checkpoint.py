"""Write and read model.ckpt: tensors, numbers, words, lists and dicts, so that loading a file runs no code."""

from __future__ import annotations

import csv
import io
import math
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softdice.images.files import written_beside
from softdice.training.config import TrainConfig, TrainingError, refusal
from softdice.training.plan import NetworkPlan

FORMAT = "softdice-model"
VERSION = 1
KEYS = ("network", "weights", "optimizer", "epoch", "step", "elapsed_s", "history", "settings", "data")
"""What a checkpoint holds beside `format` and `version`; see docs/training.md."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically (a temporary file, then a rename); raise TrainingError if the disk refuses or is full."""
    try:
        with written_beside(path) as file:
            file.write(content)
    except OSError as error:
        raise TrainingError(
            f"softdice: expected to write {path}, got: {error.strerror or error}. Make room, or choose another place."
        ) from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table as CSV, each row as long as the header; raise TrainingError if the disk refuses."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_bytes(path, text.getvalue().encode())


@contextmanager
def made_folder(out: Path, caller: str, option: str) -> Iterator[None]:
    """Make the folder `out`, check that it can be written, and on exit remove it and its new parents if empty.

    `caller` is the command and `option` the one that names the folder, for the message.

    Raises:
        TrainingError: it cannot be made or written.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out) as file:
                file.write(b"softdice")
        except OSError as error:
            raise TrainingError(
                f"{caller}: expected to write to {out}, got: {error.strerror or error}. Choose another {option}."
            ) from error
        yield
    finally:
        for folder in made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def write_history(out: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write metrics.csv into the folder of a run; raise TrainingError if the disk refuses.

    `history` has a row, column -> number, for each epoch, and at least one.
    """
    write_csv(out / "metrics.csv", [*history[0]], (row.values() for row in history))


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; `content` has the keys `KEYS`, maybe more. Raise TrainingError if the disk refuses."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    write_bytes(path, buffer.getvalue())


def load_checkpoint(path: str | Path, *, resume: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU, read with `weights_only=True` and verified.

    Args:
        path: a file that `softdice train` wrote.
        resume: verify, too, what a run needs to go on and a prediction does not.

    Raises:
        TrainingError: no such file, one that `softdice train` did not write, or one that was damaged since.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about files that are refused here
            damaged = archive.testzip()
            file.seek(0)
            content = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(
            f"softdice: expected a model at {path}, got: {error.strerror or error}. Give the path of a model.ckpt."
        ) from error
    except Exception as error:  # a damaged zip or pickle surfaces as any of the errors there are
        raise _not_ours(path, "a file that torch does not read as plain weights") from error
    if damaged:
        raise _not_ours(path, f"a damaged file: the checksum of {damaged} is wrong")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _not_ours(path, "a file without the mark of one")
    if content.get("version") != VERSION:
        raise _not_ours(path, f"version {content.get('version')} where this softdice reads {VERSION}")
    if missing := [key for key in KEYS if key not in content]:
        raise _not_ours(path, f"a file without {', '.join(missing)}")
    try:
        _verify(content, resume)
    except Exception as error:  # content of any kind, put to its use: it fails in any way
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise _not_ours(path, f"one whose content does not fit together ({text[:200]})") from error
    return content


def load_network(content: dict[str, Any]) -> nn.Module:
    """Return the trained network, on the CPU, from the content of a checkpoint."""
    network = NetworkPlan(**content["network"]).build()
    network.load_state_dict(content["weights"])
    return network


def _verify(content: dict[str, Any], resume: bool) -> None:
    """Raise an exception unless the content of a checkpoint suits a prediction, and if `resume` a run that goes on.

    The exception is of any type, since the content may be anything: it is put to its use, and any use may fail.
    `content["data"]` says what the network was trained on: values and class_names of the labels, channels,
    spatial_ndim, patch (voxels), joint (channels scaled together), clipped (their intensities cut off), by_channel (a
    file for each), orientation, and the names of the cases in training and held_out. `content["decision"]`, which a
    finished run has, holds the thresholds. "history" has a row for each epoch; "reserve_s", which earlier releases did
    not write, is the seconds to keep back for the end of the run.
    """
    data, plan, network = content["data"], NetworkPlan(**content["network"]), load_network(content)
    _require("finite weights", all(bool(weight.isfinite().all()) for weight in network.state_dict().values()))
    sizes = len(data["class_names"]), data["channels"], data["spatial_ndim"], len(data["patch"])
    expected = plan.num_classes, plan.channels, plan.spatial_ndim, plan.spatial_ndim
    _require(f"classes, channels and axes {expected}", sizes == expected)
    _require(f"{plan.num_classes} label values", len(data["values"]) == plan.num_classes)
    flags = [data.get("joint", True), data.get("by_channel", False), data.get("clipped", True)]
    _require("how its channels are scaled", all(isinstance(flag, bool) for flag in flags))
    _require("how its volumes lie", isinstance(data.get("orientation", ""), str))
    thresholds = content.get("decision", {}).get("thresholds", [0.5] * plan.num_classes)
    _require("a threshold for each class", len(thresholds) == plan.num_classes)
    _require("thresholds in (0, 1)", all(0 < threshold < 1 for threshold in thresholds))
    _require("settings by name", isinstance(content["settings"], dict))
    _require("label values in order", data["values"] == sorted(map(int, data["values"])))
    total_strides = [math.prod(strides) for strides in zip(*plan.strides, strict=True)]  # of all levels, for each axis
    divided = all(n > 0 and n % stride == 0 for n, stride in zip(data["patch"], total_strides, strict=True))
    _require("a patch that the network can halve", divided)
    if not resume:
        return
    settings = content["settings"]
    TrainConfig(**{**settings, "patch": tuple(settings["patch"])})
    _require("its settings", all(settings.get(name) is not None for name in ("loss", "lr", "seed", "val_fraction")))
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.load_state_dict(content["optimizer"])
    for weight in network.parameters() if content["step"] > 0 else ():
        for average in (optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")):
            fits = average.shape == weight.shape and bool(average.isfinite().all())
            _require("the optimizer's moments of every weight", fits)
    columns = ["val_dice", *(f"val_dice_{name}" for name in data["class_names"][1:])]
    rows = [
        [float(row[name]) for name in ("epoch", "step", "elapsed_s", "loss", *columns)] for row in content["history"]
    ]
    seconds = min(float(content["elapsed_s"]), float(content.get("reserve_s", 0)))
    _require("a history of every epoch", len(rows) == content["epoch"])
    _require("times from 0 on", seconds >= 0)
    names = [*data["training"], *data["held_out"]]
    _require("names of the cases", bool(names) and all(isinstance(name, str) for name in names))


def _require(what: str, holds: bool) -> None:
    """Raise ValueError, "without " and `what` a checkpoint needs, unless the condition `holds`."""
    if not holds:
        raise ValueError(f"without {what}")


def _not_ours(path: Path, got: str) -> TrainingError:
    """Return the error that the file at `path` is no checkpoint of this package; `got` says what it is instead."""
    expected, advice = "a model that softdice train wrote", "Give the path of a model.ckpt."
    return refusal(expected, got, advice, path=path, command="softdice")
