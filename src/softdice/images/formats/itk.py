"""NRRD, 3D Slicer's segmentations in it, MetaImage and series of DICOM, through SimpleITK."""

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

_LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
"""ITK's axes point to the left, the back and the head of a patient; those of NIfTI to the right, front and head."""


def _read(path: Path, sitk: Any, *, reader: str) -> Image:
    path.open("rb").close()  # a missing file in the words of the system
    with _quiet():
        picture = sitk.ReadImage(str(path), imageIO=reader)
    told = {key: picture.GetMetaData(key) for key in picture.GetMetaDataKeys()}
    segments = [match[1] for key in told if (match := re.fullmatch(r"(Segment\d+)_LabelValue", key))]
    channels = picture.GetNumberOfComponentsPerPixel()
    layers = f"segments in {channels} layers, for they overlap. Export one label map, or one file per segment."
    return replace(
        _image(picture, sitk, placed=reader != "NrrdImageIO" or "NRRD_space" in told),
        names={int(told[f"{each}_LabelValue"]): told.get(f"{each}_Name", "") for each in segments},
        no_labels=layers if segments and channels > 1 else "",
    )


def _read_dicom(path: Path, sitk: Any) -> Image:
    """A file, or a folder that holds the slices of one series."""
    with _quiet():
        files = _series(path, sitk) if path.is_dir() else [str(path)]
        headers = [_dicom_header(file, sitk) for file in files]
        if headers[0].get("0008|0060") == "SEG":
            raise FileError("a DICOM segmentation, whose frames lie where its header says. Convert it to NIfTI or NRRD")
        other = None if path.is_dir() else next((each for each in path.parent.glob("*.dcm") if each != path), None)
        if other is not None and headers[0].get(_UID, "") == _dicom_header(str(other), sitk).get(_UID):
            raise FileError("one slice of a DICOM series. Give the folder that holds it, in a folder of cases")
        if headers[0].get("0028|0008", "1") not in ("", "0", "1"):
            raise FileError("expected a slice of DICOM, got several frames in a file. Convert it to NIfTI or NRRD")
        if not all(header.get(_PLACE) and header.get(_AXES) for header in headers):
            raise FileError("expected DICOM that says where it lies, got none, as of an X-ray. Convert it to PNG")
        if len(files) > 1:
            normal = np.cross(*np.reshape(_numbers(headers[0][_AXES]), (2, 3)))
            along = [float(_numbers(header[_PLACE]) @ normal) for header in headers]
            files, steps = [files[i] for i in np.argsort(along)], np.diff(np.sort(along))
            if steps.max() > steps.min() + 0.01 * steps.max():
                got = f"distances of {steps.min():.4g} to {steps.max():.4g} mm"
                raise FileError(f"expected slices at equal distances, got {got}. Is one missing?")
        picture = sitk.ReadImage(files if len(files) > 1 else files[0], imageIO="GDCMImageIO")
    return _image(picture, sitk, placed=True)


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split("\\"), float)


_UID, _PLACE, _AXES = "0020|000e", "0020|0032", "0020|0037"
"""Tags of DICOM: which series a file belongs to, where it lies, and where its rows and columns point."""


def _series(folder: Path, sitk: Any) -> list[str]:
    """The slices of the one series in a folder."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        raise FileError(
            f"expected one DICOM series in the folder, got {len(series)}. Put each into a folder of its own"
        )
    return list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0]))


def _dicom_header(file: str, sitk: Any) -> dict[str, str]:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}


def _image(picture: Any, sitk: Any, *, placed: bool) -> Image:
    ndim, channels = picture.GetDimension(), picture.GetNumberOfComponentsPerPixel()
    spatial, reverse = min(ndim, 3), [*range(ndim)][::-1]  # x is the last axis there
    array = sitk.GetArrayFromImage(picture).transpose([*reverse, ndim] if channels > 1 else reverse)
    array = np.array(array if array.ndim <= spatial + 1 else array.reshape(*array.shape[:spatial], -1), order="F")
    spacing, origin = picture.GetSpacing()[:spatial], picture.GetOrigin()[:spatial]
    direction = np.array(picture.GetDirection()).reshape(ndim, ndim)[:spatial, :spatial]
    affine = np.eye(4)
    affine[:spatial, :spatial], affine[:spatial, 3] = direction * spacing, origin
    header = spacing, origin, direction.ravel().tolist()
    return Image(array, spatial, _LPS_TO_RAS @ affine if placed else None, spacing, header)


@contextmanager
def _quiet() -> Iterator[None]:
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


_SITK = ("SimpleITK", "itk")
_NRRD, _META = partial(_read, reader="NrrdImageIO"), partial(_read, reader="MetaImageIO")
_NRRD_MAGIC, _META_MAGIC = ((0, b"NRRD"),), ((0, b"ObjectType"), (0, b"NDims"), (0, b"Comment"))

FORMATS = (
    Format((".nrrd",), _NRRD, _write, _SITK, magic=_NRRD_MAGIC),
    Format((".seg.nrrd",), _NRRD, None, _SITK, masks=".nrrd", magic=_NRRD_MAGIC),
    Format((".mha",), _META, _write, _SITK, magic=_META_MAGIC),
    Format((".mhd",), _META, None, _SITK, masks=".mha", magic=_META_MAGIC),
    Format((".dcm",), _read_dicom, None, _SITK, masks=".nrrd", magic=((128, b"DICM"),), folder=True),
)
