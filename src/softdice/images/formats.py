"""path -> Image, Image -> bytes: one reader and one writer per file format, used through `softdice.images.files`.

A reader raises `FileError` where it sees that something is wrong, and whatever its library raises on a damaged file;
`softdice.images.files` turns both into one line that names the file.
"""

from __future__ import annotations

import gzip
import io
import logging
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_HARMLESS = ("pixdim", "bitpix", "not divisible by 16")
"""Words of nibabel's complaints about headers that many programs write."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class FileError(ValueError):
    """A file that cannot be read or written as an image, and why, in one line."""


@dataclass(frozen=True)
class Image:
    """An image in memory: spatial axes first, a channel axis last where `array.ndim > spatial_ndim`.

    NIfTI keeps its axis order (x, y, z); PNG, JPEG and TIFF have rows before columns; .npy and .npz are taken as they
    are, every axis spatial. `affine` (4, 4) and `header` come from NIfTI only; `spacing` is in the file's own unit
    (mm in NIfTI), 1.0 where the file says nothing. `suffix` is lower case, `.nii.gz` in one piece.
    """

    array: np.ndarray
    spatial_ndim: int
    affine: np.ndarray | None
    spacing: tuple[float, ...]
    header: object | None
    suffix: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the spatial axes."""
        return self.array.shape[: self.spatial_ndim]


class _Complaints(logging.Filter):
    """Keeps what a library logs instead of raising it, such as a page that lies outside the file, from the terminal."""

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
def _complaints(logger: str, level: int) -> Iterator[list[str]]:
    """What the logger says inside, at this level or above."""
    listener, source = _Complaints(level), logging.getLogger(logger)
    source.addFilter(listener)
    try:
        yield listener.messages
    finally:
        source.removeFilter(listener)


def _native(array: np.ndarray) -> np.ndarray:
    """The same values in the byte order of this machine, in memory that may be written to."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array if array.flags.writeable else array.copy(order="K")


# --- NIfTI ------------------------------------------------------------------------------------------------------------


def _read_nifti(path: Path, suffix: str, nibabel: Any) -> Image:
    data = path.read_bytes()
    if suffix == ".nii.gz":
        data = gzip.decompress(data)  # to the end, so that its checksum is verified
    sizes = {struct.unpack(order + "i", data[:4])[0] for order in "<>"} if len(data) >= 4 else set()
    header_class = nibabel.Nifti2Header if 540 in sizes else nibabel.Nifti1Header if 348 in sizes else None
    if header_class is None:
        raise FileError("not a NIfTI file")
    with _complaints("nibabel.global", logging.WARNING) as messages:
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
    array = _native(np.frombuffer(data, dtype, (end - offset) // dtype.itemsize, offset).reshape(shape, order="F"))
    slope, intercept = header.get_slope_inter()
    if slope is not None and (slope, intercept) != (1.0, 0.0):
        if not np.isfinite([slope, intercept]).all():
            raise FileError(f"damaged header: values are scaled by {slope} and {intercept}")
        array = array * np.float64(slope) + np.float64(intercept)
    affine, zooms = header.get_best_affine(), header.get_zooms()
    if not (np.abs(affine) < 1e9).all():
        raise FileError("damaged header: the affine is not finite, or points out of this world")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim > 3:
        array = array.reshape(*array.shape[:3], -1)
    spatial = min(array.ndim, 3)
    return Image(array, spatial, affine, tuple(float(z) for z in zooms[:spatial]), header, suffix)


def _write_nifti(array: np.ndarray, like: Image, nibabel: Any) -> bytes:
    storable = {"b": np.uint8, "e": np.float32, "g": np.float64}
    array = array.astype(storable.get(array.dtype.kind if array.dtype.kind == "b" else array.dtype.char, array.dtype))
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


# --- PNG and JPEG -----------------------------------------------------------------------------------------------------


def _verified_png(path: Path) -> tuple[bytes, int, int]:
    """path -> its bytes, bits per sample and colour type, every chunk's checksum verified."""
    data = path.read_bytes()
    if not data.startswith(_PNG_SIGNATURE):
        raise FileError("not a PNG file")
    position, kinds = len(_PNG_SIGNATURE), list[bytes]()
    while position < len(data) and kinds[-1:] != [b"IEND"]:
        if position + 12 > len(data):
            raise FileError("truncated")
        (length,) = struct.unpack_from(">I", data, position)
        if position + 12 + length > len(data):
            raise FileError("truncated")
        chunk = data[position + 4 : position + 8 + length]
        if zlib.crc32(chunk) != struct.unpack_from(">I", data, position + 8 + length)[0]:
            raise FileError("damaged: a checksum does not fit")
        kinds.append(chunk[:4])
        position += 12 + length
    if kinds[:1] != [b"IHDR"] or kinds[-1:] != [b"IEND"] or b"IDAT" not in kinds:
        raise FileError("truncated")
    if b"acTL" in kinds:
        raise FileError("expected one picture, got an animation")
    return data, data[24], data[25]


def _read_png(path: Path, suffix: str, pil: Any) -> Image:
    from PIL.PngImagePlugin import PngImageFile

    data, bits, colour = _verified_png(path)
    # Opened by its class: a whole-slide mask is larger than what PIL.Image.open takes for an attack.
    with PngImageFile(io.BytesIO(data)) as picture:
        if bits == 16 and colour != 0:
            raise FileError("expected grey values or 8-bit colour, got 16-bit colour")
        array = _picture_array(picture)
    if colour == 0 and bits in (2, 4):
        array = array // np.uint8(255 // (2**bits - 1))  # the reader stretches them to 0..255; these are labels
    return _plain(array, 2, suffix)


def _read_jpeg(path: Path, suffix: str, pil: Any) -> Image:
    from PIL.JpegImagePlugin import JpegImageFile

    with JpegImageFile(str(path)) as picture:
        return _plain(_picture_array(picture), 2, suffix)


def _picture_array(picture: Any) -> np.ndarray:
    """picture -> (H, W) grey values or palette indices, (H, W, 3) colours; an alpha channel is left out."""
    if picture.mode in ("LA", "RGBA", "CMYK"):
        picture = picture.convert("L" if picture.mode == "LA" else "RGB")
    if picture.mode not in ("1", "L", "P", "I", "I;16", "RGB"):
        raise FileError(f"expected grey, palette or colour, got a picture of mode {picture.mode}")
    array = np.array(picture)
    return array.view(np.uint8) != 0 if picture.mode == "1" else array  # its True is the byte 255, which is no bool


def _write_png(array: np.ndarray, like: Image, pil: Any) -> bytes:
    if array.dtype.kind in "iu" and array.dtype not in (np.uint8, np.uint16):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 65535:
            raise FileError(f"expected values in 0..65535 for PNG, got {low}..{high}")
        array = array.astype(np.uint8 if high < 256 else np.uint16)
    if array.dtype not in (np.bool_, np.uint8, np.uint16) or array.ndim > 3:
        raise FileError(f"expected bool or unsigned integers for PNG, got {array.dtype} of shape {array.shape}")
    buffer = io.BytesIO()
    pil.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


# --- TIFF -------------------------------------------------------------------------------------------------------------


def _read_tiff(path: Path, suffix: str, tifffile: Any) -> Image:
    with _complaints("tifffile", logging.ERROR) as messages:
        image = _tiff_stack(path, suffix, tifffile)
    if messages:
        raise FileError(f"truncated or damaged: {messages[0]}")
    return image


def _tiff_stack(path: Path, suffix: str, tifffile: Any) -> Image:
    size = path.stat().st_size
    with tifffile.TiffFile(path) as file:
        if len(file.series) != 1:
            raise FileError(f"expected one image or stack, got {len(file.series)} of different kinds")
        series = file.series[0]
        axes, page = series.axes, series.keyframe
        for part in series.pages:
            if part is None:
                raise FileError("truncated: a page of the stack is missing")
            segments = list(zip(part.dataoffsets, part.databytecounts, strict=True))
            if not segments or any(start <= 0 or count <= 0 or start + count > size for start, count in segments):
                raise FileError("truncated or damaged: image data lies outside the file")
            if (
                page.compression == 1
                and not page.is_tiled
                and sum(count for _, count in segments)
                < (page.imagelength * ((page.imagewidth * page.samplesperpixel * page.bitspersample + 7) // 8))
            ):
                raise FileError("truncated or damaged: fewer bytes than voxels")
        if "C" in axes or axes.find("S") not in (-1, len(axes) - 1):
            raise FileError(f"expected grey values or colours, got channels on the axes {axes}")
        try:
            array = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            compression = getattr(page.compression, "name", page.compression)
            raise FileError(f"compressed by {compression}. Run: pip install imagecodecs") from error
        tags = page.tags
        header = {name: tags[name].value for name in ("XResolution", "YResolution", "ResolutionUnit") if name in tags}
    if page.photometric == 0:  # MINISWHITE: 0 is white, the other way round than everywhere else
        array = ~array if array.dtype.kind == "b" else np.iinfo(array.dtype).max - array
    if axes.endswith("S") and array.shape[-1] == 4:
        array = array[..., :3]
    return _plain(_native(array), array.ndim - axes.endswith("S"), suffix, header)


def _write_tiff(array: np.ndarray, like: Image, tifffile: Any) -> bytes:
    buffer = io.BytesIO()
    header = like.header if isinstance(like.header, dict) else {}
    known = {}
    if {"XResolution", "YResolution"} <= set(header):
        known = {"resolution": (header["XResolution"], header["YResolution"])}
        known["resolutionunit"] = header.get("ResolutionUnit", 2)
    colour = array.ndim > like.spatial_ndim
    tifffile.imwrite(buffer, array, photometric="rgb" if colour else "minisblack", compression="zlib", **known)
    return buffer.getvalue()


# --- NumPy ------------------------------------------------------------------------------------------------------------


def _read_npy(path: Path, suffix: str, _: Any) -> Image:
    with path.open("rb") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise FileError("damaged: there is more in the file than its header says")
    return _plain(_native(array), array.ndim, suffix)


def _read_npz(path: Path, suffix: str, _: Any) -> Image:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != 1:
            raise FileError(f"expected one array in the archive, got {len(names)}: {', '.join(names[:8])}")
        with archive.open(names[0]) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):  # also what makes zipfile verify the checksum
                raise FileError("damaged: there is more in the file than its header says")
    return _plain(_native(array), array.ndim, suffix)


def _write_numpy(array: np.ndarray, like: Image, _: Any) -> bytes:
    buffer = io.BytesIO()
    if like.suffix == ".npz":
        np.savez_compressed(buffer, array)
    else:
        np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _plain(array: np.ndarray, spatial_ndim: int, suffix: str, header: object | None = None) -> Image:
    return Image(array, spatial_ndim, None, (1.0,) * spatial_ndim, header, suffix)


READERS: dict[str, Callable[[Path, str, Any], Image]] = {
    ".nii.gz": _read_nifti, ".nii": _read_nifti, ".png": _read_png, ".jpg": _read_jpeg, ".jpeg": _read_jpeg,
    ".tif": _read_tiff, ".tiff": _read_tiff, ".npy": _read_npy, ".npz": _read_npz,
}  # fmt: skip
WRITERS: dict[str, Callable[[np.ndarray, Image, Any], bytes]] = {
    ".nii.gz": _write_nifti, ".nii": _write_nifti, ".png": _write_png, ".tif": _write_tiff, ".tiff": _write_tiff,
    ".npy": _write_numpy, ".npz": _write_numpy,
}  # fmt: skip
