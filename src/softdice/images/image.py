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
MM |= {"nanometer": 1e-6, "micrometer": 1e-3, "millimeter": 1.0, "centimeter": 10.0}
"""Units of length, as file formats write them, in mm."""


@dataclass(frozen=True)
class Place:
    """How the voxels of an image lie. Comparing, resampling, volumes and distances read nothing else.

    Args:
        axes: order of the axes of the array: "xyz" (columns, rows, slices), "zyx" (slices, rows, columns), or "any", as
            the program that saved the array had them.
        frame: where `affine` leads to: `PATIENT`, the name of another space or of the coordinate system of a map, or ""
            where the file does not say. Then `affine` knows the size of a voxel alone.
        affine: (4, 4), from indices to the frame; None where the file knows no size of a voxel.
        unit_mm: length of a unit of the frame in mm, nan where it is unknown or no length.
        partial: axes along which the file leaves out what holds nothing: beyond its voxels all is 0.
    """

    axes: str = "zyx"
    frame: str = ""
    affine: np.ndarray | None = None
    unit_mm: float = 1.0
    partial: tuple[int, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Size of a voxel along three axes, None where the file does not say."""
        if self.affine is None or math.isnan(self.unit_mm):
            return None
        return tuple((np.linalg.norm(self.affine[:3, :3], axis=0) * self.unit_mm).tolist())


@dataclass(frozen=True)
class Image:
    """An image in memory.

    Args:
        array: spatial axes first, in the order of `place.axes`; a channel axis last where `array.ndim > spatial_ndim`.
        spatial_ndim: number of spatial axes.
        place: how the voxels lie.
        header: what the writer of the format needs beside.
        suffix: lower case, `.nii.gz` in one piece.
        palette: (n, 3) uint8, the colours of the indices; (n, 4) with alpha.
        scale: slope and intercept by which the voxels were stored.
        names: of labels, from a table in the file.
        no_labels: why the file cannot hold labels, where its reader knows that.
    """

    array: np.ndarray
    spatial_ndim: int
    place: Place = Place()
    header: object | None = None
    suffix: str = ""
    palette: np.ndarray | None = None
    scale: tuple[float, float] | None = None
    names: dict[int, str] = field(default_factory=dict)
    no_labels: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the spatial axes."""
        return self.array.shape[: self.spatial_ndim]

    @property
    def affine(self) -> np.ndarray | None:
        """(4, 4), from indices to `place.frame`."""
        return self.place.affine

    @property
    def placed(self) -> bool:
        """Whether the file says where in a patient its voxels lie."""
        return self.place.frame == PATIENT

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Size of a voxel along the spatial axes, None where the file does not say."""
        sizes = self.place.spacing_mm
        return None if sizes is None else sizes[: self.spatial_ndim]


@dataclass(frozen=True)
class Format:
    """A file format. The rest of the package knows a format by this record alone.

    Args:
        suffixes: lower case.
        read: path and package -> Image. It raises `FileError` where it sees that something is wrong, and whatever its
            library raises on a damaged file.
        write: array, the image that it is like, and package -> content of the file; None where masks cannot be kept.
        package: the module that reads and writes it, imported when it is first needed, and the extra that brings it.
        masks: the suffix that a mask of such an image gets, where it is not its own.
        magic: position and bytes by which such a file is known.
        folder: of a format whose files make one image together: a folder of them -> names of its other files.
        store: such a file is itself a folder.
        beside: suffixes of files that hold the voxels of such a file.
        entries: of a file that holds many images: path, and one beside it that may know their names -> {stem: path of
            an image, which is the path of the file and the name in it}.
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
    def __init__(self, level: int) -> None:
        super().__init__()
        self.level, self.thread, self.messages = level, threading.get_ident(), list[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self.thread:
            return True
        if record.levelno >= self.level:
            self.messages.append(record.getMessage())
        return False


@contextmanager
def complaints(logger: str, level: int) -> Iterator[list[str]]:
    """Collect what the logger says inside, at this level or above, and keep it from the terminal.

    Some libraries log a damage, such as a page that lies outside the file, where they should raise.
    """
    listener, source = _Complaints(level), logging.getLogger(logger)
    source.addFilter(listener)
    try:
        yield listener.messages
    finally:
        source.removeFilter(listener)


def without_alpha(array: np.ndarray) -> tuple[np.ndarray, str]:
    """Drop the alpha channel of (..., 2 or 4), and say why the rest cannot be labels ("" where alpha is constant)."""
    alpha = array[..., -1]
    reason = "an alpha channel that is not constant. Save the mask as grey values without one."
    return array[..., 0] if array.shape[-1] == 2 else array[..., :3], reason if alpha.min() != alpha.max() else ""


def as_shown(array: np.ndarray, orientation: object, *, rows: int = 0) -> np.ndarray:
    """Turn a picture as viewers do, by the tag Orientation of TIFF and EXIF; anything but 2 to 8 leaves it as it is.

    Args:
        rows: number of the axis of the rows; the next one is that of the columns.

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
    """Return the same values in a dtype that medical formats can store."""
    wider = {np.dtype(bool): np.uint8, np.dtype(np.float16): np.float32, np.dtype(np.longdouble): np.float64}
    return array.astype(wider.get(array.dtype, array.dtype))


DICOM = (128, b"DICM")
"""Position and bytes by which a file of DICOM is known, whatever its name."""


def is_dicom(path: Path) -> bool:
    """Return whether a file holds DICOM, by its first bytes. Hidden files count as none."""
    try:
        if path.name.startswith(".") or not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(132)[DICOM[0] :] == DICOM[1]
    except OSError:
        return False
