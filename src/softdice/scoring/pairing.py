"""Find the files of two folders that belong together.

A stem is the name of a file without its suffix, with the path below the folder; it names the case. Files in formats
that `softdice.images` does not read are listed, too, to be reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from softdice.evaluation.labels import ScoreError
from softdice.images.files import SUFFIXES, composed, image_name, is_collection, is_store, list_entries, split_name
from softdice.images.formats import BY_SUFFIX
from softdice.images.image import Format, is_dicom

NOT_READ = (
    ".mnc", ".img", ".img.gz", ".gipl", ".gipl.gz", ".ima", ".vtk", ".vti", ".j2k", ".pgm", ".ppm", ".pbm", ".tga",
    ".exr", ".heic", ".avif", ".svs", ".ndpi", ".czi", ".lif", ".nd2", ".h5", ".hdf5", ".mat", ".b2nd",
    ".npy.gz",
)  # fmt: skip
"""Suffixes of formats that `softdice.images` does not read: such files are listed as not scored."""


@dataclass(frozen=True)
class Pair:
    """The files of a case, or folders of files; `error` is the reason why there is nothing to compare, else ""."""

    case: str
    prediction: Path | None
    truth: Path | None
    error: str = ""


INNER = "segmentations"
"""TotalSegmentator's folder between that of a case and the files of its classes; it is no part of the case's name."""


LAYOUTS = "files", "subfolders", "classes"


def check_layout(layout: str, label_options: Iterable[object]) -> None:
    """Raise ScoreError for a word that is no layout, and for "classes" with an option that names labels.

    `label_options` are the values of --labels, --regions, --ignore and --instances, None for one that is left out.
    """
    if layout not in LAYOUTS:
        raise ScoreError(f"--layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if layout == "classes" and any(option is not None for option in label_options):
        raise ScoreError(
            "--layout classes: expected no --labels, --regions, --ignore, --instances or nnunet: files are the classes."
        )


def pair_files(predictions: Path, truth: Path, layout: str = "files") -> list[Pair]:
    """Return the pairs of two files or of two folders, in the order of their names.

    Files belong together if their names without suffix are equal (`case.nii.gz`, `case.png`), apart from nnU-Net's
    `_0000`. If a name has files of several formats (nnU-Net leaves `case.npz` beside `case.nii.gz`), the one of the
    other side's format is taken. A file without partner, or in a format that is not read, becomes a pair with an error.
    A collection, a file that holds many images by name (COCO), counts as a folder. A store, a folder that is a file of
    a format (zarr), counts as a file, and so does a folder of slices of DICOM where the other path is a file.

    Args:
        layout: "files" pairs the files of the two folders, "subfolders" also the files below them, by their path; with
            "classes" a case is a folder, and a file in it is the mask of the class that it is named after.

    Raise ScoreError for a path that does not exist, a file against a folder, a folder without images, and two folders
    without a name in common.
    """
    for name, path in (("PREDICTIONS", predictions), ("LABELS", truth)):
        if not path.exists():
            raise ScoreError(f"{name}: expected a file or a folder, got {str(path)!r}, which does not exist.")
    sides = predictions, truth
    folders = [path for path in sides if (path.is_dir() and not is_store(path)) or is_collection(path)]
    if len(folders) == 1 and image_name(folders[0]) is None:  # a folder that is one image serves as a file
        raise ScoreError("PREDICTIONS and LABELS: expected two files or two folders, got one of each.")
    if len(folders) < 2:
        split = image_name(truth)
        return [Pair(composed(split[0] if split else truth.name), predictions, truth)]
    if layout != "files" and any(map(is_collection, folders)):
        raise ScoreError(f"--layout {layout}: expected two folders, got a file of many images. Leave the option out.")
    if layout == "classes":
        return _some_in_common(_pair_folders(predictions, truth), predictions, truth)
    prediction_files, truth_files = (
        {composed(stem): [path] for stem, path in list_entries(side, other).items()}  # `other` may know the names
        if is_collection(side)
        else _by_stem(side, deep=layout == "subfolders")
        for side, other in (sides, sides[::-1])
    )
    for path, files in zip(sides, (prediction_files, truth_files), strict=True):
        if not is_collection(path) and not any(map(_format, chain(*files.values()))):
            advice = "If they are in folders below it, see --layout."
            raise ScoreError(f"{path}: expected images ({', '.join(SUFFIXES)}), got none of them. {advice}")
    for stem in [stem for stem in prediction_files if stem not in truth_files]:  # one side with, one without _0000
        other = stem.removesuffix("_0000") if stem.endswith("_0000") else f"{stem}_0000"
        if other in truth_files and other not in prediction_files:
            prediction_files[other] = prediction_files.pop(stem)
    stems = sorted({*prediction_files, *truth_files})
    pairs = [_pair(stem, prediction_files.get(stem, []), truth_files.get(stem, [])) for stem in stems]
    return _some_in_common(pairs, predictions, truth)


def _some_in_common(pairs: list[Pair], predictions: Path, truth: Path) -> list[Pair]:
    """Return the pairs of two folders, or files of many images; raise ScoreError if there are none.

    Also raise it, with examples, if both sides have files but no name in common.
    """
    if not pairs:
        raise ScoreError(f"score: expected images in {predictions} and {truth}, got none. Check the files.")
    sides = [[path for path in side if path] for side in zip(*((p.prediction, p.truth) for p in pairs), strict=True)]
    if any(pair.prediction and pair.truth for pair in pairs) or not all(sides):
        return pairs
    examples = [
        f"{len(side)} in {root}, such as {side[0].relative_to(root)}"
        for side, root in zip(sides, (predictions, truth), strict=True)
    ]
    advice = "Rename one side so that the names without suffix agree, or see --layout for masks in folders."
    raise ScoreError(f"score: expected files of one name in both folders, got none: {' and '.join(examples)}. {advice}")


def case_files(folder: Path, *, deep: bool = False) -> dict[str, Path]:
    """Return the image of each case in a folder, `deep` also below it; nnU-Net's `_0000` is no part of its name."""
    return {
        stem.removesuffix("_0000"): files[0] for stem, files in _by_stem(folder, deep=deep).items() if _format(files[0])
    }


def case_folders(root: Path, read: list[Path], layout: str) -> dict[Path, list[Path]]:
    """Return the folders in which files may lie that no pair uses, each with its entries that are used.

    They are `root`, the path of the predictions or the reference, and unless `layout` is "files" those below it. An
    entry is used if it is one of them or of the paths `read`: the files of all pairs, with "classes" their folders,
    too. Return {} if `root` is a file, or a folder that is one image.
    """
    if not root.is_dir() or (root in read and layout != "classes"):
        return {}
    used: dict[Path, list[Path]] = {folder: [] for folder in ([root] if layout == "files" else _folders(root))}
    for path in read:
        if layout == "subfolders":
            used.pop(path, None)  # a folder that is one image, such as a series of slices
        if path.parent in used:
            used[path.parent].append(path)
    for folder in used:
        if folder.parent in used:
            used[folder.parent].append(folder)
    return used


def _pair_folders(predictions: Path, truth: Path) -> list[Pair]:
    """Pair the folders that hold images, each a case, by their path below the two; raise ScoreError if one has none."""
    sides = []
    for root in (predictions, truth):
        folders = [path for path in _folders(root) if any(_stem(path, name) for name in os.listdir(path))]
        if not folders:
            raise ScoreError(f"{root}: expected folders with a file per class, got none of them.")
        sides.append({_case_name(path.relative_to(root)): path for path in folders})
    pairs = []
    for name in sorted({*sides[0], *sides[1]}):
        p, t = (side.get(name) for side in sides)
        # "" is the name of the folder itself, where its files are the masks
        pairs.append(Pair(name or truth.name, p, t, "" if p and t else _lacking(p, t)))
    return pairs


def _lacking(prediction: Path | None, truth: Path | None) -> str:
    """Return the error of a case that lacks its prediction or its reference, and has the other one."""
    return f"{prediction or truth}: no {'prediction' if prediction is None else 'reference'} of this name"


def _folders(root: Path, parents: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a folder and all folders below it, in the order of their names, without hidden ones and zarr stores.

    Links are followed, but not back to one of the `parents`, real paths that the recursion passes.
    """
    real = os.path.realpath(root)
    if real in parents:
        return
    yield root
    for name in sorted(os.listdir(root)):
        if not name.startswith(".") and os.path.isdir(root / name) and not is_store(root / name):
            yield from _folders(root / name, (*parents, real))


def _case_name(path: Path) -> str:
    """Return the name of a case by the path of its folder, "" for the root itself."""
    return composed((path.parent if path.name == INNER else path).as_posix().removeprefix("."))


def _by_stem(root: Path, *, deep: bool = False) -> dict[str, list[Path]]:
    """Return the images of each stem in a folder, `deep` also in all folders below it.

    A folder that is one image, such as a series of slices, counts as a file. Files in a format that is not read are
    included only if their stem has no other.
    """
    by_stem: dict[str, list[Path]] = {}
    for folder in _folders(root) if deep else (root,):
        prefix = "" if folder == root else composed(f"{folder.relative_to(root).as_posix()}/")
        with os.scandir(folder) as scan:  # not folder.iterdir(): sorting paths makes each keep its parts in memory
            entries = list(scan)
        if folder != root and image_name(folder) is not None:  # a series of slices, which its parent lists as one image
            continue
        for name, path in ((_series_name(entry), entry.path) for entry in entries):
            if name is not None:
                by_stem.setdefault(prefix + name, []).append(Path(path))
        files = sorted(entry.name for entry in entries if _stem(folder, entry.name) and _is_file(entry))
        for file in sorted(files, key=lambda name: split_name(name) is None):  # what is not read comes last
            same_stem = by_stem.setdefault(prefix + _stem(folder, file), [])
            if not same_stem or split_name(file) is not None:
                same_stem.append(folder / file)
    return by_stem


def _stem(folder: Path, name: str) -> str:
    """Return a file's name without its suffix, "" if it is no image; one without a suffix is opened: is it DICOM?"""
    split = split_name(name)
    suffix = next((suffix for suffix in NOT_READ if name.lower().endswith(suffix)), "")
    if split or (suffix and not name.startswith(".")):
        return composed(split[0] if split else name[: -len(suffix)])
    return composed(name) if is_dicom(folder / name) else ""


def _series_name(entry: os.DirEntry[str]) -> str | None:
    """Return the stem of an entry that is a folder and one image, such as a series of slices; None for others."""
    try:
        split = image_name(entry.path) if entry.is_dir() and not entry.name.startswith(".") else None
    except OSError:  # a link to itself, or a folder that may not be read
        return None
    return composed(split[0]) if split else None


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file; a broken link counts too, as a case that fails when it is read."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _pair(stem: str, prediction_files: list[Path], truth_files: list[Path]) -> Pair:
    """Pair the files of a stem on both sides; a pair with an `error` if it is not clear which two belong together.

    If a side has several files, take the prediction and the reference that have the same format, if only two have.
    """
    p, t = next(iter(prediction_files), None), next(iter(truth_files), None)
    unread = [path for path in (*prediction_files, *truth_files) if not _format(path)]
    if unread:
        names = " and ".join(map(str, unread))
        return Pair(stem, p, t, f"{names}: expected a file ending in {', '.join(SUFFIXES)}. Convert it first.")
    if p is None or t is None:
        return Pair(stem, p, t, _lacking(p, t))
    same_format = [(p, t) for p in prediction_files for t in truth_files if _format(p) == _format(t)]
    if len(same_format) == 1:
        return Pair(stem, *same_format[0])
    if len(prediction_files) == len(truth_files) == 1:
        return Pair(stem, p, t)
    several = prediction_files if len(prediction_files) > 1 else truth_files
    names = ", ".join(path.name for path in several)
    return Pair(stem, p, t, f"{several[0].parent}: expected one file of this name, got {names}")


def _format(path: Path) -> Format | None:
    """Return the format of a file, None if it is not read."""
    name = split_name(path) or image_name(path)
    return BY_SUFFIX[name[1]] if name else None
