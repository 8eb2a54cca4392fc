"""two files or two folders -> pairs of files that belong together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from softdice.images.files import SUFFIXES, split_name
from softdice.images.formats import BY_SUFFIX
from softdice.images.image import Format
from softdice.scoring.classes import ScoreError


@dataclass(frozen=True)
class Pair:
    """A case: the files to compare, or the reason why there is nothing to compare."""

    case: str
    prediction: Path | None
    truth: Path | None
    error: str = ""


def pair_files(predictions: Path, truth: Path) -> list[Pair]:
    """two files, or two folders -> pairs in the order of their names.

    Files of two folders belong together when their names without suffix are equal (`case.nii.gz`, `case.png`), or equal
    but for nnU-Net's `_0000`. Where one name has files of several types (nnU-Net leaves `case.npz` beside
    `case.nii.gz`), the one of the other side's type is taken. What finds no partner is a pair with an error.

    Raises:
        ScoreError: a path does not exist, a file against a folder, or no image at all in a folder.
    """
    for name, path in (("PREDICTIONS", predictions), ("LABELS", truth)):
        if not path.exists():
            raise ScoreError(f"{name}: expected a file or a folder, got {str(path)!r}, which does not exist.")
    if predictions.is_dir() != truth.is_dir():
        raise ScoreError("PREDICTIONS and LABELS: expected two files or two folders, got one of each.")
    if not predictions.is_dir():
        split = split_name(truth)
        return [Pair(split[0] if split else truth.name, predictions, truth)]
    found = [_by_stem(predictions), _by_stem(truth)]
    for path, files in zip((predictions, truth), found, strict=True):
        if not files:
            raise ScoreError(f"{path}: expected images ({', '.join(SUFFIXES)}), got none of them.")
    predicted, truths = found
    for stem in [stem for stem in predicted if stem not in truths]:
        other = stem.removesuffix("_0000") if stem.endswith("_0000") else f"{stem}_0000"
        if other in truths and other not in predicted:
            predicted[other] = predicted.pop(stem)
    return [_pair(stem, predicted.get(stem, []), truths.get(stem, [])) for stem in sorted({*predicted, *truths})]


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    with os.scandir(folder) as entries:  # not sorted(folder.iterdir()): paths that were compared keep their parts
        files = sorted(entry.name for entry in entries if split_name(entry.name) is not None and entry.is_file())
    for file in files:
        name = split_name(file)
        assert name is not None
        found.setdefault(name[0], []).append(folder / file)
    return found


def _pair(stem: str, predicted: list[Path], truths: list[Path]) -> Pair:
    if not predicted or not truths:
        lone, side = (predicted[0], "reference") if predicted else (truths[0], "prediction")
        reason = f"{lone}: no {side} of this name"
        return Pair(stem, lone if predicted else None, None if predicted else lone, reason)
    common = [(p, t) for p in predicted for t in truths if _format(p) == _format(t)]
    if len(common) == 1:
        return Pair(stem, *common[0])
    if len(predicted) == len(truths) == 1:
        return Pair(stem, predicted[0], truths[0])
    several = predicted if len(predicted) > 1 else truths
    names = ", ".join(path.name for path in several)
    return Pair(stem, predicted[0], truths[0], f"{several[0].parent}: expected one file of this name, got {names}")


def _format(path: Path) -> Format:
    name = split_name(path)
    assert name is not None  # what a folder is listed for
    return BY_SUFFIX[name[1]]
