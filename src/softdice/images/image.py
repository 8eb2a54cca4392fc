"""What an image in memory is, and what a file format consists of."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


class FileError(ValueError):
    """A file that cannot be read or written as an image, and why, in one line."""


@dataclass(frozen=True)
class Image:
    """An image in memory.

    Args:
        array: spatial axes first, a channel axis last where `array.ndim > spatial_ndim`. Medical formats have
            (x, y, z), PNG, JPEG and TIFF rows before columns; .npy and .npz are taken as they are, every axis spatial.
        spatial_ndim: number of spatial axes.
        affine: (4, 4), from indices to the right, front and head of a patient; None where the file does not say.
        spacing: in the file's own unit (mm in medical formats), 1.0 where the file does not say.
        header: what the writer of the format needs beside.
        suffix: lower case, `.nii.gz` in one piece.
        palette: (n, 3) uint8, the colours of the indices; (n, 4) with alpha.
        scale: slope and intercept by which the voxels were stored.
        placed: whether the file itself says how its voxels lie in space; never without an affine.
        names: of labels, from a table in the file.
        no_labels: why the file cannot hold labels, where its reader knows that.
        partial: the file leaves out what holds nothing: beyond its slices all is 0.
    """

    array: np.ndarray
    spatial_ndim: int
    affine: np.ndarray | None = None
    spacing: tuple[float, ...] = ()
    header: object | None = None
    suffix: str = ""
    palette: np.ndarray | None = None
    scale: tuple[float, float] | None = None
    names: dict[int, str] = field(default_factory=dict)
    placed: bool = True
    no_labels: str = ""
    partial: bool = False

    def __post_init__(self) -> None:
        if not self.spacing:
            object.__setattr__(self, "spacing", (1.0,) * self.spatial_ndim)
        object.__setattr__(self, "placed", self.placed and self.affine is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the spatial axes."""
        return self.array.shape[: self.spatial_ndim]

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Spacing in mm, None where the file does not say how large a voxel is."""
        if self.affine is None:
            return None
        unit = getattr(self.header, "get_xyzt_units", lambda: ("mm", ""))()[0]
        factor = {"meter": 1e3, "micron": 1e-3}.get(unit, 1.0)
        return tuple(float(size) * factor for size in self.spacing)


@dataclass(frozen=True)
class Format:
    """A file format: all that the rest of the package knows of it.

    Args:
        suffixes: lower case.
        read: path and package -> Image. It raises `FileError` where it sees that something is wrong, and whatever its
            library raises on a damaged file.
        write: array, the image that it is like, and package -> content of the file; None where masks cannot be kept.
        package: the module that reads and writes it, imported when it is first needed, and the extra that brings it.
        masks: the suffix that a mask of such an image gets, where it is not its own.
        magic: position and bytes by which such a file is known.
        folder: a folder of such files is one image.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Path, Any], Image]
    write: Callable[[np.ndarray, Image, Any], bytes] | None = None
    package: tuple[str, str] | None = None
    masks: str = ""
    magic: tuple[tuple[int, bytes], ...] = ()
    folder: bool = False


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
    """What the logger says inside, at this level or above.

    It keeps what a library logs instead of raising it, such as a page that lies outside the file, from the terminal.
    """
    listener, source = _Complaints(level), logging.getLogger(logger)
    source.addFilter(listener)
    try:
        yield listener.messages
    finally:
        source.removeFilter(listener)


def without_alpha(array: np.ndarray) -> tuple[np.ndarray, str]:
    """(..., 2 or 4) -> grey values or (..., 3) colours, and why they are no labels where the alpha channel varies."""
    alpha = array[..., -1]
    reason = "an alpha channel that is not constant. Save the mask as grey values without one."
    return array[..., 0] if array.shape[-1] == 2 else array[..., :3], reason if alpha.min() != alpha.max() else ""


def native(array: np.ndarray) -> np.ndarray:
    """The same values in the byte order of this machine, in memory that may be written to."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array if array.flags.writeable else array.copy(order="K")


def storable(array: np.ndarray) -> np.ndarray:
    """The same values in a type that medical formats have."""
    wider = {np.dtype(bool): np.uint8, np.dtype(np.float16): np.float32, np.dtype(np.longdouble): np.float64}
    return array.astype(wider.get(array.dtype, array.dtype))
