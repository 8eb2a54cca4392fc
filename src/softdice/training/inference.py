"""Predict masks of images by a model, in their format and geometry. C is a class, *S are the axes of an image."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softdice.decisions import dice_confidence
from softdice.evaluation.averages import mean
from softdice.evaluation.text import shown
from softdice.images.files import (
    FileError,
    Image,
    composed,
    image_name,
    is_store,
    list_images,
    mask_suffix,
    read_image,
    write_image,
)
from softdice.images.formats.dicom import is_one_series
from softdice.images.orientation import lies, turned_back
from softdice.training.channels import Files, Reading, channel_files, fits_among, read_channels, scaled
from softdice.training.checkpoint import load_checkpoint, load_network, made_folder, write_csv
from softdice.training.config import TrainingError, no_memory, refusal, unread
from softdice.training.decision import ARGMAX, Decision, cut
from softdice.training.evaluate import default_device, logits_of

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
        images: an image, or a folder of them; any file of an image that has one file per channel.
        out: folder for the masks, made where there is none; not the folder of the images.
        overwrite: replace files that lie where masks are to be written, whoever wrote them.
        decide: "argmax" takes the likeliest class of each voxel; "tuned" cuts at the thresholds that the training found
            on its held-out cases (0.5, as the argmax, where they gain nothing). None: "tuned" if the model has them.
        confidence: path of a CSV file to write, a row for each mask, the least sure first. Its columns are the name,
            the mean of `softdice.dice_confidence` over the classes but the first, and the confidence of each of them.
            The cell is empty for a class that is in neither mask nor probabilities; masks without any come last.
        progress: called with the number of images done, their total and the name of the image just done.
        line: called with what a person should know of the model before the first image.

    Raises:
        TrainingError, FileError: `checkpoint` is no model of this package, or has no thresholds to be "tuned"; there
            are no images; `out` is their folder, or holds a file in the place of a mask.
        PredictionError: some images have no mask: of another dimension or number of channels than the model was trained
            on, without a finite value, too large for the memory, or files that cannot be read or written. All others
            have one.
    """
    content = load_checkpoint(checkpoint)
    model = _Model(content, _thresholds(content, decide, checkpoint))
    cases = _cases(Path(images), model.data.get("by_channel", False))
    table = None if confidence is None else Path(confidence)
    places = _places(cases, Path(out), table, overwrite)
    if model.data["spatial_ndim"] == 3 and model.orientation is None:
        line(
            f"{checkpoint} does not say how the volumes of its training lie: images are taken as they are stored, and "
            "right only where they are stored as those. Train again to be sure."
        )
    if model.thresholds is not None and {*model.thresholds} != {ARGMAX}:
        line(f"Masks are cut by {Decision(**content['decision']).text(model.data['class_names'])}.")
    written: list[Path] = []
    errors: list[str] = []
    confidence_of_masks: dict[str, list[float]] = {}  # file name of a mask -> confidence of each class
    table_folder = nullcontext() if table is None else made_folder(table.parent, COMMAND, "--confidence")
    with made_folder(Path(out), COMMAND, "OUT"), table_folder:
        for files, place in zip(cases.values(), places, strict=True):
            path = files[min(files)]
            try:
                image, mask, confidences = model.predict(path, files, how_sure=table is not None)
                written.append(write_image(place, mask, image))
                confidence_of_masks[written[-1].name] = confidences
            except Exception as error:
                if not (isinstance(error, (TrainingError, FileError, ModuleNotFoundError)) or no_memory(error)):
                    raise
                errors.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            progress(len(written) + len(errors), len(cases), path.name)
        if table is not None:
            _write_confidence(table, confidence_of_masks, model.data["values"])
    if errors:
        raise PredictionError(written, errors)
    return written


def _cases(images: Path, by_channel: bool) -> dict[str, Files]:
    """Return the images to predict, {name of the mask without suffix: files}; raise TrainingError if there are none.

    Args:
        images: an image, which may be a folder of slices, or a folder of images.
        by_channel: an image is one file per channel; the other channels of a single file lie beside it.
    """
    several = images.is_dir() and not is_store(images) and not _is_series(images)
    if several:
        listed = list_images(images)
    else:  # named as `list_images` names it
        listed = {composed((image_name(images.absolute()) or (images.name, ""))[0]): images}
    if not listed or not images.exists():
        advice = unread(images) if several else "Check the path."
        raise refusal(f"images in {images}", "none", advice, command=COMMAND)
    if not by_channel:
        return {stem: {0: path} for stem, path in listed.items()}
    beside = {} if several else channel_files(list_images(images.parent))
    return {name: beside.get(name, files) for name, files in channel_files(listed).items()}


def _is_series(folder: Path) -> bool:
    """Return whether a folder is one image, the slices of a DICOM series and no other images.

    It may be a series that makes no volume: reading it then says why.
    """
    paths = list_images(folder).values()
    if len(paths) < 2 or any(path.is_dir() or (image_name(path) or ("", ""))[1] != ".dcm" for path in paths):
        return False
    if is_one_series(folder):
        return True
    try:  # slices of no named series
        read_image(folder)
    except FileError:
        return False
    return True


def _places(cases: Mapping[str, Files], out: Path, table: Path | None, overwrite: bool) -> list[Path]:
    """Return the path in `out` of the mask of each image, in the order of `cases`, {name of the mask: files}.

    Raise TrainingError if `out` is the folder of the images, or if without `overwrite` a file lies at one of the paths
    or at `table`, the path of the CSV file of confidences, None without one.
    """
    paths = [files[min(files)] for files in cases.values()]
    real = [path.resolve() for files in cases.values() for path in files.values()]  # a folder, for a DICOM series
    if out.resolve() in (paths[0].parent.resolve(), *real, *(path.parent for path in real)):
        expected = "OUT to be another folder than that of the images"
        raise refusal(expected, f"{out} for both", "The masks would replace the images.", command=COMMAND)
    suffixes = [(image_name(path) or ("", ""))[1] for path in paths]
    places = [out / (name + (suffix and mask_suffix(suffix))) for name, suffix in zip(cases, suffixes, strict=True)]
    taken = [place for place in (*places, *([] if table is None else [table])) if os.path.lexists(place)]
    if taken and not overwrite:
        advice = "Choose another OUT, or pass --overwrite to replace them."
        got = f"{len(taken)}, the first {taken[0]}"
        raise refusal("no file in the place of a mask", got, advice, command=COMMAND)
    return places


class _Model:
    """A trained network on its device, and what its checkpoint says of the images that it takes.

    Attributes:
        data: what the network was trained on, `content["data"]` as `softdice.training.checkpoint` describes it.
        settings: of its training. network: in mode eval, on `device`.
        thresholds: where to cut each of the C classes; None for the argmax.
        orientation: what the axes of its images mean, "RAS" or such as "zyx"; None where the checkpoint does not say.
        joint, clipped: channels are scaled together, and their intensities cut off, as they were for every model whose
            checkpoint does not say.
    """

    def __init__(self, content: dict[str, Any], thresholds: list[float] | None) -> None:
        self.data, self.settings, self.thresholds = content["data"], content["settings"], thresholds
        self.orientation, self.joint = self.data.get("orientation"), self.data.get("joint", True)
        self.clipped = self.data.get("clipped", True)
        self.device = default_device()
        self.network = load_network(content).to(self.device).eval()

    def predict(self, path: Path, files: Files, how_sure: bool) -> tuple[Image, np.ndarray, list[float]]:
        """Predict an image. `files` are all of its files, by channel; `path`, the first of them, is for messages.

        Returns:
            The first file as stored; label values (*S) on its grid; if `how_sure` the confidence of each of the C
            classes, the background first, nan for a class that is nowhere, else [].

        Raises:
            TrainingError: another dimension, number of channels or order of axes than the model has, or no finite
                value. FileError: it cannot be read.
        """
        reading = self._read(path, files)
        image = scaled(reading.array, self.joint, self.data["channels"], clipped=self.clipped)
        logits = logits_of(self.network, torch.from_numpy(image).to(self.device), self.data["patch"])
        labels, confidences = cut(logits, self.thresholds), []
        if how_sure:
            confidences = dice_confidence(logits[None].float(), labels[None], activation="softmax")[0].tolist()
        values = np.array(self.data["values"], object)  # as they are, above 2^63 too
        mask = values.astype(_mask_type(values))[labels.cpu().numpy()]
        return reading.stored, turned_back(mask, reading.turn), confidences

    def _read(self, path: Path, files: Files) -> Reading:
        """Read an image from `files`, {channel number: file}; `path`, the first of them, is for messages.

        Raise FileError if a file cannot be read, TrainingError unless dimension, channels, axes and values suit.
        """
        reading = read_channels(
            files,
            as_stored=self.orientation is None,
            ignore_geometry=bool(self.settings.get("ignore_geometry")),
            nodata=self.settings.get("nodata"),
        )
        ndim, channels = len(reading.shape), len(reading.array)
        if ndim != self.data["spatial_ndim"] or not fits_among(channels, self.data["channels"], self.joint):
            expected = f"a {self.data['spatial_ndim']}-D image with {self.data['channels']} channel(s), as in training"
            advice = "Convert it, or take another model."
            raise refusal(expected, f"a {ndim}-D one with {channels}", advice, path=path, command=COMMAND)
        if self.orientation not in (None, reading.axes):
            expected, got = f"an image {lies(self.orientation)}, as those of the training", f"one {lies(reading.axes)}"
            raise refusal(expected, got, "Save it in the format of those.", path=path, command=COMMAND)
        for number, channel in enumerate([reading.array] if self.joint else reading.array):
            if not np.isfinite(channel).any():
                where = "" if self.joint else f" in channel {number}"
                advice = "A mask of it would mean nothing; look at the file."
                raise refusal("finite values", f"none{where}", advice, path=path, command=COMMAND)
        return reading


def _thresholds(content: dict[str, Any], decide: str | None, checkpoint: str | Path) -> list[float] | None:
    """Return the threshold of each of the C classes, None for the argmax, by `content` of the file `checkpoint`.

    `decide`: "argmax"; "tuned"; or None for "tuned" if the checkpoint has thresholds, else "argmax". Raise
    TrainingError for another word, and for "tuned" without thresholds.
    """
    if decide not in (None, "tuned", "argmax"):
        raise refusal("decide to be tuned or argmax", decide, "Change --decide.", command=COMMAND)
    if decide == "tuned" and "decision" not in content:
        got = f"{checkpoint}, whose run did not end or is of an earlier softdice"
        advice = "Leave out --decide, or finish the run with softdice train --resume."
        raise refusal("a model with tuned thresholds", got, advice, command=COMMAND)
    return None if decide == "argmax" else content.get("decision", {}).get("thresholds")


def _write_confidence(path: Path, confidences: dict[str, list[float]], values: list[int]) -> None:
    """Write a CSV file with a row for each mask, the least sure first, masks without any class last.

    Raise TrainingError if the disk refuses.

    Args:
        confidences: file name of a mask -> confidence of each class. values: label value of each class.
    """
    rows = [(float(mean(np.array(by_class[1:]))), name, by_class[1:]) for name, by_class in confidences.items()]
    rows.sort(key=lambda row: (math.isnan(row[0]), *row[:2]))
    cells = ([shown(name), *(f"{n:.6f}".replace("nan", "") for n in (m, *by_class))] for m, name, by_class in rows)
    write_csv(path, ["mask", "confidence", *(f"label {value}" for value in values[1:])], cells)


def _mask_type(values: np.ndarray) -> type[np.generic]:
    """Return the smallest type that image formats share and that holds all values, (C,) of Python's int."""
    for dtype in (np.uint8, np.uint16, np.int16, np.int32, np.int64):
        limits = np.iinfo(dtype)
        if limits.min <= values.min() and values.max() <= limits.max:
            return dtype
    return np.uint64
