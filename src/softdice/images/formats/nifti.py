"""NIfTI-1 and NIfTI-2, compressed or not, in one file or in two, and FreeSurfer's MGH, through nibabel.

Readers and writers are called as `Format.read` and `Format.write`; `nibabel` is the module. Arrays have their axes in
the order x, y, z, a channel axis may follow. `header` is nibabel's object, which `Image.header` keeps for the writer.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import re
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import MM, PATIENT, FileError, Format, Image, Place, complaints, native, storable

_HARMLESS = ("pixdim", "bitpix", "not divisible by 16")
"""Words of nibabel's complaints about headers that many programs write."""

GZIP = b"\x1f\x8b"

MAGIC = (344, b"n+1"), (4, b"n+2"), (344, b"ni1"), (4, b"ni2"), (0, GZIP)
MGH = 0, b"\0\0\0\1\0\0"

MAX_QUATERNION = 1.01
"""Longest (b, c, d) that counts as rounding."""

_FARTHEST = 1e9
"""Millimetres: no number in the affine of a body is as large."""


def _unpacked(path: Path, plain: str, zipped: str) -> bytes:
    """Return the content of a file, decompressed if its name ends in the suffix `zipped`, such as ".nii.gz".

    Raise FileError if only one of content and name is compressed, and BadGzipFile or EOFError for a damage. `plain`,
    such as ".nii", is the suffix to advise for a file that is not compressed.
    """
    data, compressed = path.read_bytes(), path.name.lower().endswith(zipped)
    if data.startswith(GZIP) and not compressed:
        raise FileError(f"compressed by gzip: name it {zipped}")
    if compressed and not data.startswith(GZIP):
        is_plain = any(data[position:].startswith(word) for position, word in (*MAGIC[:4], MGH))  # all but gzip's
        raise FileError("not compressed by gzip" + (f": name it {plain}" if is_plain else ""))
    if not compressed:
        return data
    try:
        return gzip.decompress(data)  # to the end, so that its checksum is verified
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" in str(error):
            raise FileError("damaged: something follows the compressed data") from None
        raise


def _read(path: Path, nibabel: Any) -> Image:
    data = _unpacked(path, ".nii", ".nii.gz")
    return _image(data, data, nibabel)


def _read_pair(path: Path, nibabel: Any) -> Image:
    """Read a header (.hdr) with its voxels beside it (.img); raise FileError for Analyze, and without voxels."""
    data = path.read_bytes()
    if data[:4] in (struct.pack("<i", 348), struct.pack(">i", 348)) and not data[344:].startswith(b"ni1"):
        advice = "Convert it to NIfTI with a program that knows which side is left, and look at the result"
        raise FileError(f"expected NIfTI, got Analyze 7.5, which does not say left from right. {advice}")
    names = [name for name in os.listdir(path.parent) if name.lower() == f"{path.stem}.img".lower()]
    voxels = path.with_suffix(".img").name
    if not names:
        raise FileError(f"expected the voxels in {voxels} beside it, got no such file. Copy both")
    return _image(data, path.with_name(voxels if voxels in names else names[0]).read_bytes(), nibabel)


def _image(head: bytes, data: bytes, nibabel: Any) -> Image:
    """Return an image from the decompressed contents of the file of its header and of the file of its voxels.

    For a single file `head` and `data` are the same object. Raise FileError for a damaged header, a truncated file, or
    voxels that are not one real number each.
    """
    header = _header(head, head is data, nibabel)
    array = _voxels(header, data, header.single_vox_offset if head is data else 0)
    (slope, intercept), scale = header.get_slope_inter(), None
    if slope is not None and (slope, intercept) != (1.0, 0.0):
        if not np.isfinite([slope, intercept]).all():
            raise FileError(f"damaged header: values are scaled by {slope} and {intercept}")
        scale = float(slope), float(intercept)
        array = array * np.float64(slope) + np.float64(intercept)
    axes = header.get_sform()[:3, :3]  # without the place, which may be 1e8 times as large
    both_forms = header["qform_code"] > 0 and header["sform_code"] > 0
    if both_forms and np.isfinite(axes).all() and np.linalg.matrix_rank(axes) < 3:
        header["sform_code"] = 0  # an empty sform says nothing: ITK reads the qform, too
    _shorten_quaternion(header)
    affine = _checked_affine(header.get_best_affine())
    affine[:3] *= MM.get(header.get_xyzt_units()[0], 1.0)
    array, in_patient = _channels_last(array), header["sform_code"] > 0 or header["qform_code"] > 0
    place = Place("xyz", PATIENT if in_patient else "", affine)
    return Image(array, min(array.ndim, 3), place, header, scale=scale, names=_label_names(header))


def _header(head: bytes, single: bool, nibabel: Any) -> Any:
    """Return nibabel's header from the first bytes of a single file, or of a pair if not `single`.

    Raise FileError if they are no NIfTI header, or one that nibabel had to repair in a field that is used here.
    """
    sizes = {struct.unpack(order + "i", head[:4])[0] for order in "<>"} if len(head) >= 4 else set()
    version = {348: 1, 540: 2}.get(next(iter(sizes & {348, 540}), 0))  # the size of a header says its version
    if version is None:
        raise FileError("compressed by gzip twice" if head.startswith(GZIP) else "not a NIfTI file")
    module = nibabel.nifti2 if version == 2 else nibabel.nifti1
    with complaints("nibabel.global", logging.WARNING) as messages:
        header = getattr(module, f"Nifti{version}{'' if single else 'Pair'}Header").from_fileobj(io.BytesIO(head))
    for message in messages:  # each reports a repair
        if not any(harmless in message for harmless in _HARMLESS):
            raise FileError(f"damaged header: {message.partition(';')[0]}")
    return header


def _voxels(header: Any, data: bytes, lowest_offset: int) -> np.ndarray:
    """Return the voxels in the bytes of a file, in native byte order, without slope and intercept applied.

    `lowest_offset` is the first byte at which voxels may begin: behind the header of a single file, else 0. Raise
    FileError if a voxel is not one real number, or the header promises another number of bytes than there are.
    """
    dtype, shape, offset = header.get_data_dtype(), header.get_data_shape(), int(header["vox_offset"])
    if dtype.kind not in "iuf":
        raise FileError(f"expected one number per voxel, got the NIfTI type {header.get_value_label('datatype')}")
    if min(shape, default=0) < 1 or offset < lowest_offset:
        raise FileError(f"damaged header: shape {tuple(shape)}, voxels at byte {offset}")
    end = offset + dtype.itemsize * int(np.prod([int(n) for n in shape], dtype=object))  # an int64 may overflow
    if len(data) < end:
        raise FileError(f"truncated: the header promises {end} bytes, there are {len(data)}")
    if data[end:].strip(b"\0"):
        raise FileError(f"damaged: the header promises {end} bytes, there are {len(data)}")
    return native(np.frombuffer(data, dtype, (end - offset) // dtype.itemsize, offset).reshape(shape, order="F"))


def _checked_affine(affine: np.ndarray) -> np.ndarray:
    """Return an affine (4, 4); raise FileError if a number in it is not finite, or is `_FARTHEST` or more."""
    if not (np.abs(affine) < _FARTHEST).all():
        raise FileError("damaged header: the affine is not finite, or points out of this world")
    return affine


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Merge the axes beyond three into one channel axis, and drop it if its length is 1."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array.reshape(*array.shape[:3], -1) if array.ndim > 3 else array


def _shorten_quaternion(header: Any) -> None:
    """Shorten the quaternion (b, c, d) of a nibabel header to length 1, in place, if rounding has made it longer.

    The rotation is then a turn by 180 degrees (a = 0), as ITK reads it, too. Raise FileError for one longer than
    `MAX_QUATERNION` if the affine depends on it.
    """
    names = ("quatern_b", "quatern_c", "quatern_d")
    length = float(np.linalg.norm([float(header[name]) for name in names]))
    if header["qform_code"] > 0 and header["sform_code"] == 0 and length > MAX_QUATERNION:
        raise FileError(f"damaged header: a quaternion of length {length:.6g}, which should be at most 1")
    if length > 1:
        for name in names:
            header[name] /= length


def _label_names(header: Any) -> dict[int, str]:
    """Return {label: name} from a label table (Caret XML) in an extension of the header, {} if there is none."""
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
    """Return the content of a single NIfTI file with the header of `like`, compressed if its suffix says so.

    `array`: (*S), or (*S, channels), of any real dtype. 64-bit integers become int32 where all of them fit.
    """
    array = storable(array)
    header: Any = like.header
    if array.dtype in (np.int64, np.uint64) and array.min(initial=0) >= -(2**31) and array.max(initial=0) < 2**31:
        array = array.astype(np.int32)  # few programs read 64-bit integers
    image_class = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    fresh = image_class.header_class(header.binaryblock, header.endianness, check=False)  # without its extensions
    fresh.set_data_dtype(array.dtype)
    fresh.set_slope_inter(1, 0)
    fresh["cal_min"] = fresh["cal_max"] = 0  # the range of grey that a viewer shows: the image's hides labels
    content = image_class(array, header.get_best_affine(), fresh).to_bytes()
    return gzip.compress(content, 6, mtime=0) if like.suffix == ".nii.gz" else content


def _read_mgh(path: Path, nibabel: Any) -> Image:
    """Read a .mgh, or a compressed .mgz; raise FileError if the name is wrong about compression, or for a damage."""
    image = nibabel.MGHImage.from_bytes(_unpacked(path, ".mgh", ".mgz"))
    header = image.header
    array = _channels_last(native(np.asarray(image.dataobj)))
    affine = _checked_affine(np.array(image.affine, np.float64))
    return Image(array, min(array.ndim, 3), Place("xyz", PATIENT if header["goodRASFlag"] == 1 else "", affine), header)


def _write_mgh(array: np.ndarray, like: Image, nibabel: Any) -> bytes:
    """Return the content of a .mgh or .mgz with the header of `like`, floats as float32; FileError above 32 bits."""
    array = storable(array)
    if array.dtype.kind in "iu" and array.dtype not in (np.uint8, np.int16, np.int32):
        low, high = int(array.min()), int(array.max())
        if low < -(2**31) or high >= 2**31:
            raise FileError(f"expected values of 32 bits for MGH, got {low}..{high}")
        array = array.astype(np.int32)
    header: Any = like.header
    fresh = header.copy()
    fresh.set_data_dtype(array.dtype if array.dtype.kind in "iu" else np.float32)
    content = nibabel.MGHImage(array, header.get_affine(), fresh).to_bytes()
    return gzip.compress(content, 6, mtime=0) if like.suffix == ".mgz" else content


FORMATS = (
    Format((".nii.gz", ".nii"), _read, _write, ("nibabel", "images"), magic=MAGIC),
    Format((".hdr",), _read_pair, None, ("nibabel", "images"), masks=".nii.gz", magic=MAGIC[2:4], beside=(".img",)),
    Format((".mgz", ".mgh"), _read_mgh, _write_mgh, ("nibabel", "images"), magic=(MGH, (0, GZIP))),
)
