"""TIFF images and stacks through tifffile."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import FileError, Format, Image, complaints, native, without_alpha

MAGIC = (0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")

MIN_IS_WHITE, PALETTE = 0, 3
"""Values of the tag PhotometricInterpretation."""

FAX, JPEG = (2, 3, 4), (6, 7)
"""Values of the tag Compression. On a fax 0 is white for every program."""


def _read(path: Path, tifffile: Any) -> Image:
    with complaints("tifffile", logging.ERROR) as messages:
        image = _stack(path, tifffile)
    if messages:
        raise FileError(f"truncated or damaged: {messages[0]}")
    return image


def _stack(path: Path, tifffile: Any) -> Image:
    with tifffile.TiffFile(path) as file:
        several = file.series  # one stack; more than one where pages were appended to the file one by one
        axes, page = several[0].axes, several[0].keyframe
        colour = axes.endswith("S")
        if len({(series.shape, series.dtype, series.axes, series.keyframe.photometric) for series in several}) != 1:
            got = ", ".join(f"{series.shape} {series.dtype}" for series in several[:4])
            raise FileError(f"expected one image or stack, got {len(several)} that differ: {got}")
        if "C" in axes or axes.find("S") not in (-1, len(axes) - 1):
            raise FileError(f"expected grey values or colours, got channels on the axes {axes}")
        parts = [part for series in several for part in series.pages]
        for series in several:
            _check_pages(series.pages, series.keyframe, path.stat().st_size)
        try:
            arrays = [series.asarray() for series in several]
        except (ValueError, RuntimeError, ImportError) as error:
            if not isinstance(error, ImportError) and not any(
                word in str(error) for word in ("imagecodecs", "COMPRESSION")
            ):
                raise
            arrays = list(_through_pillow(path, page, several[0].dtype).reshape(len(several), *several[0].shape))
        stack = len(arrays) > 1 and arrays[0].ndim - colour == 2
        array = native(arrays[0] if len(arrays) == 1 else np.stack(arrays) if stack else np.concatenate(arrays))
        tags, no_labels = page.tags, _no_labels(page)
        header = {name: tags[name].value for name in ("XResolution", "YResolution", "ResolutionUnit") if name in tags}
        palettes = [
            np.asarray(part.tags["ColorMap"].value) for part in parts if "ColorMap" in getattr(part, "tags", ())
        ]
    if any((palette != palettes[0]).any() for palette in palettes):
        no_labels = "pages of different palettes. Save all with one, or as grey values."
    if page.photometric == MIN_IS_WHITE and not _reads_as_stored(page):
        if array.dtype.kind not in "bu":
            raise FileError(f"expected whole numbers where the smallest is white, got {array.dtype}")
        array = ~array if array.dtype.kind == "b" else array.dtype.type(2**page.bitspersample - 1) - array
    if colour and array.shape[-1] in (2, 4):
        colour = array.shape[-1] == 4
        array, varies = without_alpha(array)
        no_labels = no_labels or varies
    known = (palettes[0].reshape(3, -1) >> 8).T.astype(np.uint8) if palettes and page.photometric == PALETTE else None
    return Image(array, array.ndim - colour, header=header, palette=known, no_labels=no_labels)


def _check_pages(parts: Iterable[Any], page: Any, size: int) -> None:
    """Raises where a page is missing, or its data are not all inside the file."""
    row_bytes = (page.imagewidth * page.samplesperpixel * page.bitspersample + 7) // 8
    for part in parts:
        if part is None:
            raise FileError("truncated: a page of the stack is missing")
        segments = list(zip(part.dataoffsets, part.databytecounts, strict=True))
        if not segments or any(start <= 0 or count <= 0 or start + count > size for start, count in segments):
            raise FileError("truncated or damaged: image data lies outside the file")
        plain = page.compression == 1 and not page.is_tiled
        if plain and sum(count for _, count in segments) < page.imagelength * row_bytes:
            raise FileError("truncated or damaged: fewer bytes than voxels")


def _reads_as_stored(page: Any) -> bool:
    """Whether the program that wrote it reads back the numbers in the file, though it says that 0 is white."""
    return page.software.startswith("tifffile") or page.description.startswith(('{"shape"', "ImageJ="))


def _no_labels(page: Any) -> str:
    if page.compression in JPEG:
        return "a TIFF compressed by JPEG, which changes them. Save masks without."
    if page.photometric == MIN_IS_WHITE and page.compression not in FAX and not _reads_as_stored(page):
        return "a TIFF that calls its smallest number white (MINISWHITE). Save it with 0 as black (MINISBLACK)."
    return ""


def _through_pillow(path: Path, page: Any, dtype: np.dtype) -> np.ndarray:
    """Compressions that tifffile needs imagecodecs for: pages, numbers as they are stored."""
    compression = getattr(page.compression, "name", page.compression)
    try:
        from PIL import ImageSequence
        from PIL.TiffImagePlugin import TiffImageFile

        with TiffImageFile(path) as file:
            pages = (each.convert("RGB") if each.mode == "YCbCr" else each for each in ImageSequence.Iterator(file))
            array = np.stack([np.array(picture) for picture in pages])
            inverted = page.photometric == MIN_IS_WHITE and file.mode in ("1", "L")
    except (ImportError, SyntaxError, OSError, ValueError, KeyError) as error:
        if "decoder error" in str(error):
            raise FileError("truncated or damaged: it cannot be decompressed") from error
        raise FileError(f"compressed by {compression}. Run: pip install imagecodecs") from error
    if (array.astype(dtype) != array).any():
        raise FileError(f"compressed by {compression}. Run: pip install imagecodecs")
    array = array.astype(dtype)  # Pillow holds int16 as int32
    if array.dtype.kind == "b":
        array = array.view(np.uint8) != 0  # its True is the byte 255, which is no bool
        return ~array if inverted else array
    array = np.iinfo(array.dtype).max - array if inverted else array
    if page.bitspersample in (2, 4) and page.photometric != PALETTE:
        array = array // array.dtype.type(255 // (2**page.bitspersample - 1))  # Pillow stretches them to 0..255
    return array


def _write(array: np.ndarray, like: Image, tifffile: Any) -> bytes:
    buffer = io.BytesIO()
    header = like.header if isinstance(like.header, dict) else {}
    known = {}
    if {"XResolution", "YResolution"} <= set(header):
        known = {"resolution": (header["XResolution"], header["YResolution"])}
        known["resolutionunit"] = header.get("ResolutionUnit", 2)
    colour = array.ndim > like.spatial_ndim
    tifffile.imwrite(buffer, array, photometric="rgb" if colour else "minisblack", compression="zlib", **known)
    return buffer.getvalue()


FORMATS = (Format((".tif", ".tiff"), _read, _write, ("tifffile", "images"), magic=MAGIC),)
