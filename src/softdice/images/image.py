"""The records of this room: where voxels lie, an image in memory, a file format."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


class FileError(ValueError):
    """Raised for a file that cannot be read or written as an image; the message is one line and says why."""


PATIENT = "patient"
"""The frame of medical images: to the right, the front and the head of a patient, in mm."""

MM = {"mm": 1.0, "um": 1e-3, "micron": 1e-3, "\u00b5m": 1e-3, "nm": 1e-6, "cm": 10.0, "m": 1e3, "meter": 1e3}
MM |= {"angstrom": 1e-7, "nanometer": 1e-6, "micrometer": 1e-3, "millimeter": 1.0, "centimeter": 10.0}
"""Units of length, as file formats write them, in mm."""


@dataclass(frozen=True)
class Place:
    """How the voxels of an image lie. Comparing, resampling, volumes and distances read nothing else.

    Args:
        axes: order of the axes of the array: "xyz" (columns, rows, slices), "zyx" (slices, rows, columns), another
            order of the three, such as "zxy", or "any", as the program that saved the array had them. For two axes
            "xyz" means columns before rows, and "zyx" rows before columns.
        frame: the space that `affine` maps to: `PATIENT`, the name of another space or of the coordinate system of a
            map, or "" where the file does not say. Then only the size of a voxel in `affine` has a meaning.
        affine: (4, 4), from voxel indices to coordinates in the frame; None where the file knows no size of a voxel.
        unit_mm: length of a unit of the frame in mm, nan where it is unknown or no length.
        partial: numbers of the axes along which the file omits empty slices: beyond its voxels all is 0.
    """

    axes: str = "zyx"
    frame: str = ""
    affine: np.ndarray | None = None
    unit_mm: float = 1.0
    partial: tuple[int, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Return the size of a voxel along three axes, None where the file does not say, or has an axis of size 0."""
        if self.affine is None or math.isnan(self.unit_mm):
            return None
        sizes = np.linalg.norm(self.affine[:3, :3], axis=0) * self.unit_mm
        return tuple(sizes.tolist()) if sizes.all() else None


@dataclass(frozen=True)
class Image:
    """An image in memory.

    Args:
        array: spatial axes first, in the order of `place.axes`; a channel axis last where `array.ndim > spatial_ndim`.
        spatial_ndim: number of spatial axes.
        place: how the voxels lie.
        header: what the writer of the format needs besides, as its module describes it; None where it needs nothing.
        suffix: of the file, lower case, `.nii.gz` in one piece; `files.read_image` sets it.
        palette: (n, 3) uint8, the colours of the indices in `array`; (n, 4) with alpha.
        scale: slope and intercept by which the voxels were stored; `array` has the values.
        names: {label: name}, from a table in the file.
        nodata: value of voxels without data, as the file names it, an int if it is whole; None where it names none.
        no_labels: the reason, in words, why the file cannot hold labels: the end of "expected labels, got "; "" where
            its reader knows no reason.
    """

    array: np.ndarray
    spatial_ndim: int
    place: Place = Place()
    header: object | None = None
    suffix: str = ""
    palette: np.ndarray | None = None
    scale: tuple[float, float] | None = None
    names: dict[int, str] = field(default_factory=dict)
    nodata: float | None = None
    no_labels: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the lengths of the spatial axes."""
        return self.array.shape[: self.spatial_ndim]

    @property
    def affine(self) -> np.ndarray | None:
        """Return the matrix (4, 4) from indices to `place.frame`, None where the file has no size of a voxel."""
        return self.place.affine

    @property
    def shown(self) -> np.ndarray:
        """Return the array, with the colours (..., 3) of a palette in the place of its indices."""
        return self.array if self.palette is None else np.take(self.palette[:, :3], self.array, axis=0, mode="clip")

    @property
    def placed(self) -> bool:
        """Return whether the file says where in a patient its voxels lie."""
        return self.place.frame == PATIENT

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Return the size of a voxel along the spatial axes, None where the file does not say."""
        sizes = self.place.spacing_mm
        return None if sizes is None else sizes[: self.spatial_ndim]


@dataclass(frozen=True)
class Format:
    """A file format. The rest of the package knows a format by this record alone.

    Args:
        suffixes: lower case.
        read: path and the imported module -> Image. It raises `FileError` where it sees that something is wrong, and
            whatever its library raises on a damaged file; `files.read_image` puts the path before either.
        write: array, the image that it is like, and the imported module -> content of the file; None where masks cannot
            be kept. The array has the spatial shape of that image, a channel axis may follow, and it raises likewise.
        package: the module that reads and writes it, imported when it is first needed, and the extra that brings it.
        masks: the suffix that a mask of such an image gets; "" for the image's own.
        magic: position and bytes by which such a file is known.
        folder: for a format of which a folder of files is one image (DICOM): path of such a folder -> names of the
            files in it that are no part of the image.
        store: such a file is itself a folder (zarr).
        beside: where such a file is only a header: suffixes of the files beside it that hold the voxels.
        entries: for a file that holds many images (COCO): its path, and the path of another such file that may know
            their names, or None -> {stem: path of an image}. That path is the path of the file / a name inside it.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Path, Any], Image]
    write: Callable[[np.ndarray, Image, Any], bytes] | None = None
    package: tuple[str, str] | None = None
    masks: str = ""
    magic: tuple[tuple[int, bytes], ...] = ()
    folder: Callable[[Path], list[str]] | None = None
    store: bool = False
    beside: tuple[str, ...] = ()
    entries: Callable[[Path, Path | None], dict[str, Path]] | None = None


class _Complaints(logging.Filter):
    """Filter for a logger: drops the records of the thread that made it; keeps their messages from `level` on."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level, self.thread, self.messages = level, threading.get_ident(), list[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the logger shows a record: True only for records of other threads."""
        if record.thread != self.thread:
            return True
        if record.levelno >= self.level:
            self.messages.append(record.getMessage())
        return False


@contextmanager
def complaints(logger: str, level: int) -> Iterator[list[str]]:
    """Yield a list that collects the messages of the logger of that name, from a level of `logging` on.

    Some libraries log a damage, such as a page that lies outside the file, where they should raise. The logger shows no
    record of this thread, of any level, while the block runs.
    """
    listener, source = _Complaints(level), logging.getLogger(logger)
    source.addFilter(listener)
    try:
        yield listener.messages
    finally:
        source.removeFilter(listener)


def without_alpha(array: np.ndarray) -> tuple[np.ndarray, str]:
    """Drop the alpha channel, which is the last one, of grey values (*S, 2) or colours (*S, 4).

    Returns:
        The array, (*S) or (*S, 3), and the reason for `Image.no_labels`: "" if alpha is constant.
    """
    alpha = array[..., -1]
    reason = "an alpha channel that is not constant. Save the mask as grey values without one."
    return array[..., 0] if array.shape[-1] == 2 else array[..., :3], reason if alpha.min() != alpha.max() else ""


def as_shown(array: np.ndarray, orientation: object, *, rows: int = 0) -> np.ndarray:
    """Return a view of a picture, transposed and flipped as viewers show it.

    Args:
        orientation: value of the tag Orientation of TIFF and EXIF; anything but 2 to 8 leaves the picture as it is.
        rows: number of the axis of the rows; the axis of the columns follows it.

    Example:
        >>> as_shown(np.array([[1, 2, 3], [4, 5, 6]]), 6).tolist()
        [[4, 1], [5, 2], [6, 3]]
    """
    array = array.swapaxes(rows, rows + 1) if orientation in (5, 6, 7, 8) else array
    array = np.flip(array, rows) if orientation in (3, 4, 7, 8) else array
    return np.flip(array, rows + 1) if orientation in (2, 3, 6, 7) else array


def native(array: np.ndarray) -> np.ndarray:
    """Return the same values in the byte order of this machine, in writable memory."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array if array.flags.writeable else array.copy(order="K")


def storable(array: np.ndarray) -> np.ndarray:
    """Return the same values in a dtype that medical formats can store: bool as uint8, float16 as float32 ..."""
    wider = {np.dtype(bool): np.uint8, np.dtype(np.float16): np.float32, np.dtype(np.longdouble): np.float64}
    return array.astype(wider.get(array.dtype, array.dtype))


DICOM = (128, b"DICM")
"""Position and bytes by which a file of DICOM is known, whatever its name."""


def is_dicom(path: Path) -> bool:
    """Return whether a path is a file of DICOM, by its first bytes; False for a hidden or unreadable file."""
    try:
        if path.name.startswith(".") or not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(132)[DICOM[0] :] == DICOM[1]
    except OSError:
        return False
