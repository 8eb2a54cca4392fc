"""Masks of images by a model, in their format and geometry."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from softdice.decisions import dice_confidence
from softdice.evaluation.averages import mean
from softdice.evaluation.text import shown
from softdice.images.files import (
    FileError,
    Image,
    image_name,
    is_store,
    list_images,
    mask_suffix,
    write_image,
    written_beside,
)  # fmt: skip
from softdice.images.orientation import lies, turned_back
from softdice.training.channels import Files, channel_files, read_channels, scaled
from softdice.training.checkpoint import load_checkpoint, load_network, made_folder
from softdice.training.config import TrainingError, no_memory, refusal
from softdice.training.decision import ARGMAX, Decision, cut
from softdice.training.evaluate import logits_of

COMMAND = "softdice predict"


class PredictionError(TrainingError):
    """Some images have no mask. `written`: paths of the masks of the others; `errors`: a line for each that failed."""

    def __init__(self, written: list[Path], errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.written, self.errors = written, errors


def predict(
    checkpoint: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    decide: str | None = None,
    confidence: str | Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    line: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write a mask for each image by a trained model, and return their paths.

    Volumes are turned as those of the training were. A mask has the type, the shape and the geometry of its image
    (JPEG, which would change labels, gives PNG) and the label values of the training data. It does not depend on the
    other images of the folder. A model that was trained on images of one file per channel (`case_0000`, `case_0001`)
    takes such, and names the mask `case`.

    Args:
        checkpoint: what `softdice.training.train` wrote.
        images: an image, or a folder of them. Of an image in files per channel any one.
        out: folder for the masks, made where there is none; not the folder of the images.
        overwrite: replace files that lie where masks are to be written, whoever wrote them.
        decide: "argmax", the likeliest class of each voxel; "tuned", with the thresholds that the training found on its
            held-out cases, which are those of the argmax where they gain nothing. None: "tuned", of a model that has
            them.
        confidence: a CSV file to be written, with a row for each mask, the least sure first: its name, the mean of
            `softdice.dice_confidence` over the classes but the first, and that of each of these. A class that neither
            the mask nor the probabilities hold has an empty cell; masks of nothing come last.
        progress: called with the number of images done, their total and the name of the image just done.
        line: called with what a person should know of the model before the first image.

    Raises:
        TrainingError, FileError: not a model of ours; one without thresholds where they are asked for; no images; a
            file in the place of a mask.
        PredictionError: some images have no mask: of another dimension or number of channels than the model was trained
            on, without a finite value, too large for the memory, or files that cannot be read or written. All others
            have one.
    """
    content = load_checkpoint(checkpoint)
    thresholds = _thresholds(content, decide, checkpoint)
    images, out = Path(images), Path(out)
    several = images.is_dir() and not is_store(images)
    listed = list_images(images) if several else {(image_name(images) or (images.name, ""))[0]: images}
    if not listed or not images.exists():
        raise refusal(f"images in {images}", "none", "Check the path.", command=COMMAND)
    by_channel = content["data"].get("by_channel", False)
    cases = channel_files(listed) if by_channel else {stem: {0: path} for stem, path in listed.items()}
    if by_channel and not several:  # the other channels lie beside it
        beside = channel_files(list_images(images.parent))
        cases = {name: beside.get(name, files) for name, files in cases.items()}
    paths = [files[min(files)] for files in cases.values()]
    if out.resolve() == paths[0].parent.resolve():
        expected = "OUT to be another folder than that of the images"
        raise refusal(expected, f"{out} for both", "The masks would replace the images.", command=COMMAND)
    suffixes = [(image_name(path) or ("", ""))[1] for path in paths]
    places = [out / (name + (suffix and mask_suffix(suffix))) for name, suffix in zip(cases, suffixes, strict=True)]
    table = None if confidence is None else Path(confidence)
    taken = [place for place in (*places, *([] if table is None else [table])) if os.path.lexists(place)]
    if taken and not overwrite:
        advice = "Choose another OUT, or pass --overwrite to replace them."
        got = f"{len(taken)}, the first {taken[0]}"
        raise refusal("no file in the place of a mask", got, advice, command=COMMAND)
    if content["data"]["spatial_ndim"] == 3 and "orientation" not in content["data"]:
        line(
            f"{checkpoint} does not say how the volumes of its training lie: images are taken as they are stored, and "
            "right only where they are stored as those. Train again to be sure."
        )
    if thresholds is not None and {*thresholds} != {ARGMAX}:
        decision = Decision(**content["decision"])
        line(f"Masks are cut by {decision.text(content['data']['class_names'])}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_network(content).to(device).eval()
    written: list[Path] = []
    errors: list[str] = []
    sure: dict[str, list[float]] = {}
    with made_folder(out, COMMAND, "OUT"):
        for number, (path, files, place) in enumerate(zip(paths, cases.values(), places, strict=True)):
            try:
                image, mask, by_class = _prediction_of(
                    network, path, files, content, device, thresholds, table is not None
                )
                written.append(write_image(place, mask, image))
                sure[written[-1].name] = by_class
            except Exception as error:
                if not (isinstance(error, (TrainingError, FileError, ModuleNotFoundError)) or no_memory(error)):
                    raise
                errors.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            progress(number + 1, len(paths), path.name)
    if table is not None:
        _write_confidence(table, sure, content["data"]["values"])
    if errors:
        raise PredictionError(written, errors)
    return written


def _prediction_of(
    network: nn.Module,
    path: Path,
    files: Files,
    content: dict[str, Any],
    device: torch.device,
    thresholds: list[float] | None,
    how_sure: bool,
) -> tuple[Image, np.ndarray, list[float]]:
    """Return an image's first file as stored, label values on its grid, and the confidence of each class.

    Args:
        content: a model's checkpoint.
        thresholds: one for each of the C classes; None for the argmax.
        how_sure: give the C confidences, of the background first, nan for a class that is nowhere; else [].

    Raises:
        TrainingError, FileError: not an image like those of the training, or one that cannot be read.
    """
    data, settings = content["data"], content["settings"]
    orientation = data.get("orientation")
    options = {"ignore_geometry": bool(settings.get("ignore_geometry")), "nodata": settings.get("nodata")}
    reading = read_channels(files, as_stored=orientation is None, **options)
    image, array = reading.stored, reading.array
    joint = data.get("joint", True)  # as every model was scaled whose checkpoint does not say
    grey = array.shape[0] == 1 and joint
    if image.spatial_ndim != data["spatial_ndim"] or not (grey or array.shape[0] == data["channels"]):
        expected = f"a {data['spatial_ndim']}-D image with {data['channels']} channel(s), as in training"
        got = f"a {image.spatial_ndim}-D one with {array.shape[0]}"
        raise refusal(expected, got, "Convert it, or take another model.", path=path, command=COMMAND)
    if orientation not in (None, reading.axes):
        expected, got = f"an image {lies(orientation)}, as those of the training", f"one {lies(reading.axes)}"
        raise refusal(expected, got, "Save it in the format of those.", path=path, command=COMMAND)
    lacking = [number for number, channel in enumerate([array] if joint else array) if not np.isfinite(channel).any()]
    if lacking:
        where = "" if joint else f" in channel {lacking[0]}"
        advice = "A mask of it would mean nothing; look at the file."
        raise refusal("finite values", f"none{where}", advice, path=path, command=COMMAND)
    array = scaled(np.broadcast_to(array, (data["channels"], *array.shape[1:])), joint)
    logits = logits_of(network, torch.from_numpy(array).to(device), data["patch"])
    labels, by_class = cut(logits, thresholds), []
    if how_sure:
        by_class = dice_confidence(logits[None].float(), labels[None], activation="softmax")[0].tolist()
    values = np.array(data["values"], object)  # as they are, above 2^63 too
    return image, turned_back(values.astype(_mask_type(values))[labels.cpu().numpy()], reading.turn), by_class


def _thresholds(content: dict[str, Any], decide: str | None, checkpoint: str | Path) -> list[float] | None:
    """Return where to cut each class, None for the argmax."""
    if decide not in (None, "tuned", "argmax"):
        raise refusal("decide to be tuned or argmax", decide, "Change --decide.", command=COMMAND)
    if decide == "tuned" and "decision" not in content:
        got = f"{checkpoint}, whose run did not end or is of an earlier softdice"
        advice = "Leave out --decide, or finish the run with softdice train --resume."
        raise refusal("a model with tuned thresholds", got, advice, command=COMMAND)
    return None if decide == "argmax" else content.get("decision", {}).get("thresholds")


def _write_confidence(path: Path, sure: dict[str, list[float]], values: list[int]) -> None:
    """Write a row for each mask, the least sure first: the mean over the classes but the first, and each of these."""
    rows = {name: [float(mean(np.array(by_class[1:]))), *by_class[1:]] for name, by_class in sure.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["mask", "confidence", *(f"label {value}" for value in values[1:])])
    for name, numbers in sorted(rows.items(), key=lambda row: (math.isnan(row[1][0]), row[1][0], row[0])):
        writer.writerow([shown(name), *("" if math.isnan(number) else f"{number:.6f}" for number in numbers)])
    with written_beside(path) as file:
        file.write(text.getvalue().encode())


def _mask_type(values: np.ndarray) -> type[np.generic]:
    """Return the smallest type that image formats share and that holds all values."""
    for dtype in (np.uint8, np.uint16, np.int16, np.int32, np.int64):
        limits = np.iinfo(dtype)
        if limits.min <= values.min() and values.max() <= limits.max:
            return dtype
    return np.uint64
