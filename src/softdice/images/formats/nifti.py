"""NIfTI-1 and NIfTI-2 through nibabel, compressed or not."""

from __future__ import annotations

import gzip
import io
import logging
import re
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import FileError, Format, Image, complaints, native, storable

_HARMLESS = ("pixdim", "bitpix", "not divisible by 16")
"""Words of nibabel's complaints about headers that many programs write."""

GZIP = b"\x1f\x8b"

MAGIC = (344, b"n+1"), (4, b"n+2"), (344, b"ni1"), (4, b"ni2"), (0, GZIP)

MAX_QUATERNION = 1.01
"""Longest (b, c, d) that counts as rounding."""


def _read(path: Path, nibabel: Any) -> Image:
    data = path.read_bytes()
    named, compressed = path.suffix.lower() == ".gz", data.startswith(GZIP)
    if compressed and not named:
        raise FileError("compressed by gzip: name it .nii.gz")
    if named and not compressed:
        plain = any(data[position:].startswith(word) for position, word in MAGIC)
        raise FileError("not compressed by gzip" + (": name it .nii" if plain else ""))
    if compressed:
        try:
            data = gzip.decompress(data)  # to the end, so that its checksum is verified
        except gzip.BadGzipFile as error:
            if "Not a gzipped file" in str(error):
                raise FileError("damaged: something follows the compressed data") from None
            raise
    sizes = {struct.unpack(order + "i", data[:4])[0] for order in "<>"} if len(data) >= 4 else set()
    header_class = nibabel.Nifti2Header if 540 in sizes else nibabel.Nifti1Header if 348 in sizes else None
    if header_class is None:
        raise FileError("compressed by gzip twice" if data.startswith(GZIP) else "not a NIfTI file")
    with complaints("nibabel.global", logging.WARNING) as messages:
        header = header_class.from_fileobj(io.BytesIO(data))
    for message in messages:  # repaired by nibabel; only a repair that changes nothing we use is let through
        if not any(harmless in message for harmless in _HARMLESS):
            raise FileError(f"damaged header: {message.partition(';')[0]}")
    dtype, shape, offset = header.get_data_dtype(), header.get_data_shape(), int(header["vox_offset"])
    if dtype.kind not in "iuf":
        raise FileError(f"expected one number per voxel, got the NIfTI type {header.get_value_label('datatype')}")
    if min(shape, default=0) < 1 or offset < header.single_vox_offset:
        raise FileError(f"damaged header: shape {tuple(shape)}, voxels at byte {offset}")
    end = offset + dtype.itemsize * int(np.prod([int(n) for n in shape], dtype=object))
    if len(data) < end:
        raise FileError(f"truncated: the header promises {end} bytes, there are {len(data)}")
    if data[end:].strip(b"\0"):
        raise FileError(f"damaged: the header promises {end} bytes, there are {len(data)}")
    array = native(np.frombuffer(data, dtype, (end - offset) // dtype.itemsize, offset).reshape(shape, order="F"))
    (slope, intercept), scale = header.get_slope_inter(), None
    if slope is not None and (slope, intercept) != (1.0, 0.0):
        if not np.isfinite([slope, intercept]).all():
            raise FileError(f"damaged header: values are scaled by {slope} and {intercept}")
        scale = float(slope), float(intercept)
        array = array * np.float64(slope) + np.float64(intercept)
    _shorten_quaternion(header)
    affine, zooms = header.get_best_affine(), header.get_zooms()
    if not (np.abs(affine) < 1e9).all():
        raise FileError("damaged header: the affine is not finite, or points out of this world")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim > 3:
        array = array.reshape(*array.shape[:3], -1)
    spatial = min(array.ndim, 3)
    return Image(
        array,
        spatial,
        affine,
        tuple(float(z) for z in zooms[:spatial]),
        header,
        scale=scale,
        names=_label_names(header),
        placed=bool(header["sform_code"] > 0 or header["qform_code"] > 0),
    )


def _shorten_quaternion(header: Any) -> None:
    """A quaternion that rounding left a little too long means a turn by 180 degrees (w = 0), as ITK reads it."""
    names = ("quatern_b", "quatern_c", "quatern_d")
    length = float(np.linalg.norm([float(header[name]) for name in names]))
    if header["qform_code"] > 0 and header["sform_code"] == 0 and length > MAX_QUATERNION:
        raise FileError(f"damaged header: a quaternion of length {length:.6g}, which should be at most 1")
    if length > 1:
        for name in names:
            header[name] /= length


def _label_names(header: Any) -> dict[int, str]:
    """header -> {label: name} from a label table (Caret XML) in an extension; {} where there is none."""
    names: dict[int, str] = {}
    for extension in header.extensions:
        content = extension.get_content()
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        if "<Label " not in text:
            continue
        try:
            root = ElementTree.fromstring(text.rstrip("\0 \r\n\t"))
        except ElementTree.ParseError:
            continue  # names are a courtesy; the labels are in the voxels
        for label in root.iter("Label"):
            key = label.get("Key", "")
            if re.fullmatch(r"-?\d+", key):
                names[int(key)] = (label.text or "").strip()
    return {label: name for label, name in names.items() if name}


def _write(array: np.ndarray, like: Image, nibabel: Any) -> bytes:
    array = storable(array)
    header: Any = like.header
    wide = array.dtype.kind in "iu" and array.dtype.itemsize == 8
    if wide and (array.size == 0 or (abs(array).max() < 2**31)):
        array = array.astype(np.int32)  # few programs read 64-bit integers
    image_class = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    fresh = header.copy()
    fresh.extensions.clear()
    fresh.set_data_dtype(array.dtype)
    fresh.set_slope_inter(1, 0)
    fresh["cal_min"] = fresh["cal_max"] = 0
    content = image_class(array, like.affine, fresh).to_bytes()
    return gzip.compress(content, 6, mtime=0) if like.suffix == ".nii.gz" else content


FORMATS = (Format((".nii.gz", ".nii"), _read, _write, ("nibabel", "images"), magic=MAGIC),)
