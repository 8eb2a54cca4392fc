"""NRRD, 3D Slicer's segmentations in it, and MetaImage, through SimpleITK.

Readers and writers are called as `Format.read` and `Format.write`; `sitk` is the module. A picture is an image of
SimpleITK, whose arrays have their axes in reversed order (z, y, x, channels). `Image.header` is (spacing, origin,
direction) as its setters take them: sequences of numbers in mm, or in the file's unit where that is unknown, to left,
back and head.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import MM, PATIENT, FileError, Format, Image, Place, storable

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
"""ITK's axes point to left, back and head of a patient (LPS), those of NIfTI to right, front and head (RAS)."""


def _read_nrrd(path: Path, sitk: Any) -> Image:
    """Read a .nrrd, .seg.nrrd or .nhdr; raise FileError for bzip2."""
    fields = _nrrd_header(path)
    if fields.get("encoding", "raw").lower() in ("bzip2", "bz2"):
        advice = f"Run: unu save -f nrrd -e gzip -i {path.name} -o OTHER.nrrd"
        raise FileError(f"compressed by bzip2, which SimpleITK does not read. {advice}")
    picture, metadata = _opened(path, sitk, "NrrdImageIO")
    space, flat = metadata.get("NRRD_space", ""), picture.GetDimension() == 2
    # Two and four axes have no space with a name: those that SimpleITK writes lie as its other files do.
    unnamed = (flat and "space directions" in fields) or fields.get("space dimension") == "4"
    frame = PATIENT if space in _ANATOMICAL or unnamed else space
    units = re.findall(r'"([^"]*)"', fields.get("space units", fields.get("units", "")))
    sizes = any(field in fields for field in ("space directions", "spacings"))
    return _segmented(image_of(picture, sitk, frame, units[: 2 if flat else 3], sizes=sizes), metadata)


_ANATOMICAL = "left-posterior-superior", "left-posterior-superior-time"
"""Spaces of NRRD; ITK brings right-anterior-superior and left-anterior-superior to the first."""


def _nrrd_header(path: Path) -> dict[str, str]:
    """Return {name: value} of the fields in the header of a NRRD file, names in lower case."""
    with path.open("rb") as file:
        head = file.read(1 << 20).replace(b"\r\n", b"\n").partition(b"\n\n")[0].decode("latin-1")
    fields = re.findall(r"(?m)^([^:#\n]+): (.*)$", head)
    return {name.strip().lower(): value.strip() for name, value in fields}


def _segmented(image: Image, metadata: dict[str, str]) -> Image:
    """Return an image as a label map of the segments of 3D Slicer that its header lists, with their names.

    Such a file holds only the part of the scene around its segments. It may have them in several layers, each a
    channel: these become one label map, or if segments overlap, `no_labels` is set. Where layers use one value for two
    segments, labels are 1, 2 ... in the order of the list. An image without segments is returned as it is.

    Args:
        metadata: {name: value} of the header's fields; segment 0 has "Segment0_LabelValue", "Segment0_Name" and
            "Segment0_Layer".
    """
    segments = [match[1] for key in metadata if (match := re.fullmatch(r"(Segment\d+)_LabelValue", key))]
    if not segments:
        return image
    segments.sort(key=lambda segment: int(segment.removeprefix("Segment")))
    values = [int(metadata[f"{segment}_LabelValue"]) for segment in segments]
    labels = values if len({*values}) == len(values) else [*range(1, len(values) + 1)]
    names = {label: metadata.get(f"{segment}_Name", "") for segment, label in zip(segments, labels, strict=True)}
    image = replace(image, names=names, place=replace(image.place, partial=(0, 1, 2)))
    if image.array.ndim == image.spatial_ndim:
        return image
    layers = [int(metadata.get(f"{segment}_Layer", "0")) for segment in segments]
    masks = [image.array[..., layer] == value for layer, value in zip(layers, values, strict=True)]
    if np.sum(masks, 0, np.int32).max() > 1:
        advice = "Export one label map, or one file per segment."
        return replace(image, no_labels=f"segments in {image.array.shape[-1]} layers, for they overlap. {advice}")
    label_map = np.zeros(image.shape, np.min_scalar_type(max(labels)))
    for mask, label in zip(masks, labels, strict=True):
        label_map[mask] = label
    return replace(image, array=label_map)


def _read_meta(path: Path, sitk: Any) -> Image:
    """Read a .mha or .mhd, which always lies in a patient."""
    picture, metadata = _opened(path, sitk, "MetaImageIO")
    units = [metadata.get("ITK_VoxelUnits", "")] * min(picture.GetDimension(), 3)
    return _segmented(image_of(picture, sitk, PATIENT, units), metadata)


def _opened(path: Path, sitk: Any, reader: str) -> tuple[Any, dict[str, str]]:
    """Return the picture in a file, read by ITK's reader of that name, and {name: value} of its header's fields.

    Raise FileError if ITK cannot read it, OSError if it is missing.
    """
    path.open("rb").close()  # the system's message for a missing file is clearer than ITK's
    with quiet():
        picture = sitk.ReadImage(str(path), imageIO=reader)
    return picture, {key: picture.GetMetaData(key) for key in picture.GetMetaDataKeys()}


def image_of(picture: Any, sitk: Any, frame: str, units: Sequence[str] = (), *, sizes: bool = True) -> Image:
    """Return a picture as an image (x, y, z), or (x, y); axes beyond three are merged into channels.

    Args:
        frame: the space of the voxels: `PATIENT`, another name, or "" where the file does not say.
        units: of the axes of that frame, as the file writes them; mm where it says nothing. The image is in mm, or
            where axes differ or a unit is unknown, in the numbers of the file.
        sizes: whether the file knows the size of a voxel. Without it and without a frame there is no affine.
    """
    ndim, channels = picture.GetDimension(), picture.GetNumberOfComponentsPerPixel()
    spatial, reverse = min(ndim, 3), [*range(ndim)][::-1]
    array = sitk.GetArrayFromImage(picture).transpose([*reverse, ndim] if channels > 1 else reverse)
    array = np.array(array if array.ndim <= spatial + 1 else array.reshape(*array.shape[:spatial], -1), order="F")
    array = array[..., 0] if array.ndim > spatial and array.shape[-1] == 1 else array  # one frame of a fourth axis
    factors = {MM.get(unit, math.nan) for unit in units if unit not in ("", "?")} or {1.0}
    unit_mm = factors.pop() if len(factors) == 1 else math.nan
    unit_is_known = not math.isnan(unit_mm)
    scale = unit_mm if unit_is_known else 1.0
    spacing, origin = ([n * scale for n in each[:spatial]] for each in (picture.GetSpacing(), picture.GetOrigin()))
    direction = np.array(picture.GetDirection()).reshape(ndim, ndim)[:spatial, :spatial]
    affine = np.eye(4)
    affine[:spatial, :spatial], affine[:spatial, 3] = direction * spacing, origin
    header = spacing, origin, direction.ravel().tolist()
    frame = frame if unit_is_known or not frame else f"{frame} in {', '.join(units)}"
    # the last argument, the unit in mm: 1 after the scaling above, else unknown
    place = Place("xyz", frame, LPS_TO_RAS @ affine if sizes or frame else None, 1.0 if unit_is_known else math.nan)
    return Image(array, spatial, place, header)


@contextmanager
def quiet() -> Iterator[None]:
    """Redirect file descriptor 2 while the block runs, so that messages of C++ code do not reach the terminal.

    If the block raises RuntimeError, as SimpleITK does where reading fails, raise FileError with these messages.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        terminal = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except RuntimeError as error:
            file.seek(0)
            reason = " ".join(file.read().decode(errors="replace").split()) or str(error).strip().splitlines()[-1]
            reason = re.sub(r"\(?0x[0-9a-f]+\)?", "", reason)  # an address in memory, which differs between runs
            raise FileError(f"truncated or damaged: {reason}") from error
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _write(array: np.ndarray, like: Image, sitk: Any) -> bytes:
    """Return the content of a .nrrd or .mha, by the suffix of `like`, with the place of `like`.

    `array`: (x, y, z) or (x, y), of any real dtype; channels may follow.
    """
    array = storable(array)
    axes, channels = [*range(like.spatial_ndim)][::-1], array.ndim > like.spatial_ndim
    picture = sitk.GetImageFromArray(array.transpose([*axes, like.spatial_ndim] if channels else axes), channels)
    setters = picture.SetSpacing, picture.SetOrigin, picture.SetDirection
    header: Any = like.header
    for setter, values in zip(setters, header, strict=True):
        setter(values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mask{like.suffix}"
        sitk.WriteImage(picture, str(path), useCompression=True)
        content = path.read_bytes()
    if like.suffix == ".mha" or like.placed:
        return content
    # SimpleITK puts every NRRD into a patient. Write the space of `like` instead, or without an affine no space at all.
    head, end, voxels = content.partition(b"\n\n")
    lines = [line for line in head.split(b"\n") if like.affine is not None or not line.startswith(b"space")]
    space = f"space: {like.place.frame}" if like.place.frame else f"space dimension: {like.spatial_ndim}"
    return b"\n".join(space.encode() if line.startswith(b"space: ") else line for line in lines) + end + voxels


SITK = ("SimpleITK", "itk")
_NRRD_MAGIC, _META_MAGIC = ((0, b"NRRD"),), ((0, b"ObjectType"), (0, b"NDims"), (0, b"Comment"))

FORMATS = (
    Format((".nrrd",), _read_nrrd, _write, SITK, magic=_NRRD_MAGIC),
    Format((".seg.nrrd",), _read_nrrd, None, SITK, masks=".nrrd", magic=_NRRD_MAGIC),
    Format((".nhdr",), _read_nrrd, None, SITK, masks=".nrrd", magic=_NRRD_MAGIC, beside=(".raw", ".raw.gz")),
    Format((".mha",), _read_meta, _write, SITK, magic=_META_MAGIC),
    Format((".mhd",), _read_meta, None, SITK, masks=".mha", magic=_META_MAGIC, beside=(".raw", ".zraw")),
)
