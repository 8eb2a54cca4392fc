"""NRRD, 3D Slicer's segmentations in it, and MetaImage, through SimpleITK."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import FileError, Format, Image, storable

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
"""ITK's axes point to the left, the back and the head of a patient; those of NIfTI to the right, front and head."""


def _read(path: Path, sitk: Any, *, reader: str) -> Image:
    path.open("rb").close()  # a missing file in the words of the system
    with quiet():
        picture = sitk.ReadImage(str(path), imageIO=reader)
    told = {key: picture.GetMetaData(key) for key in picture.GetMetaDataKeys()}
    segments = [match[1] for key in told if (match := re.fullmatch(r"(Segment\d+)_LabelValue", key))]
    channels = picture.GetNumberOfComponentsPerPixel()
    layers = f"segments in {channels} layers, for they overlap. Export one label map, or one file per segment."
    return replace(
        image_of(picture, sitk, placed=reader != "NrrdImageIO" or "NRRD_space" in told),
        names={int(told[f"{each}_LabelValue"]): told.get(f"{each}_Name", "") for each in segments},
        no_labels=layers if segments and channels > 1 else "",
    )


def image_of(picture: Any, sitk: Any, *, placed: bool) -> Image:
    ndim, channels = picture.GetDimension(), picture.GetNumberOfComponentsPerPixel()
    spatial, reverse = min(ndim, 3), [*range(ndim)][::-1]  # x is the last axis there
    array = sitk.GetArrayFromImage(picture).transpose([*reverse, ndim] if channels > 1 else reverse)
    array = np.array(array if array.ndim <= spatial + 1 else array.reshape(*array.shape[:spatial], -1), order="F")
    spacing, origin = picture.GetSpacing()[:spatial], picture.GetOrigin()[:spatial]
    direction = np.array(picture.GetDirection()).reshape(ndim, ndim)[:spatial, :spatial]
    affine = np.eye(4)
    affine[:spatial, :spatial], affine[:spatial, 3] = direction * spacing, origin
    header = spacing, origin, direction.ravel().tolist()
    return Image(array, spatial, LPS_TO_RAS @ affine if placed else None, spacing, header)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what C++ code writes to standard error from the terminal, and tells it where reading fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except RuntimeError as error:
            file.seek(0)
            reason = " ".join(file.read().decode(errors="replace").split()) or str(error).strip().splitlines()[-1]
            raise FileError(f"truncated or damaged: {reason}") from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _write(array: np.ndarray, like: Image, sitk: Any) -> bytes:
    array = storable(array)
    axes, channels = [*range(like.spatial_ndim)][::-1], array.ndim > like.spatial_ndim
    picture = sitk.GetImageFromArray(array.transpose([*axes, like.spatial_ndim] if channels else axes), channels)
    grid: Any = like.header
    picture.SetSpacing(grid[0])
    picture.SetOrigin(grid[1])
    picture.SetDirection(grid[2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mask{like.suffix}"
        sitk.WriteImage(picture, str(path), useCompression=True)
        return path.read_bytes()


SITK = ("SimpleITK", "itk")
_NRRD, _META = partial(_read, reader="NrrdImageIO"), partial(_read, reader="MetaImageIO")
_NRRD_MAGIC, _META_MAGIC = ((0, b"NRRD"),), ((0, b"ObjectType"), (0, b"NDims"), (0, b"Comment"))

FORMATS = (
    Format((".nrrd",), _NRRD, _write, SITK, magic=_NRRD_MAGIC),
    Format((".seg.nrrd",), _NRRD, None, SITK, masks=".nrrd", magic=_NRRD_MAGIC),
    Format((".mha",), _META, _write, SITK, magic=_META_MAGIC),
    Format((".mhd",), _META, None, SITK, masks=".mha", magic=_META_MAGIC),
)
