"""TIFF images and stacks through tifffile, turned as viewers show them; GeoTIFF as its map lies."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import FileError, Format, Image, Place, as_shown, complaints, native, without_alpha

MAGIC = (0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")

MIN_IS_WHITE, PALETTE = 0, 3
"""Values of the tag PhotometricInterpretation."""

FAX, JPEG = (2, 3, 4), (6, 7)
"""Values of the tag Compression. On a fax 0 is white for every program."""

_SCALE, _TIE, _MATRIX, _KEYS = 33550, 33922, 34264, 34735
GEOTIFF = _SCALE, _TIE, _MATRIX, _KEYS, 34736, 34737
"""Tags of GeoTIFF: size of a pixel, a pixel and its place, an affine instead of both, keys, and their long values."""

_RASTER_TYPE, _GEOGRAPHIC, _PROJECTED, _LINEAR_UNIT = 1025, 2048, 3072, 3076
_AT_CENTRE, _METRE, _USER_DEFINED = 2, 9001, 32767
"""Keys of GeoTIFF, and values of them."""

_MAP = "GeoTIFF"
"""Name of those tags in the header of an image."""


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
        header[_MAP] = [(t.code, t.dtype, t.count, t.value, True) for t in tags.values() if t.code in GEOTIFF]
        orientation = tags.valueof("Orientation", 1)
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
    colours = (palettes[0].reshape(3, -1) >> 8).T.astype(np.uint8) if palettes and page.photometric == PALETTE else None
    spatial = array.ndim - colour
    place = _map_place({tag[0]: tag[3] for tag in header[_MAP]}) if spatial == 2 else Place()
    if place.affine is None:  # programs of maps leave the tag alone
        array = np.ascontiguousarray(as_shown(array, orientation, rows=spatial - 2))
        if orientation in (5, 6, 7, 8) and {"XResolution", "YResolution"} <= {*header}:
            header["XResolution"], header["YResolution"] = header["YResolution"], header["XResolution"]
    return Image(array, spatial, place, header, palette=colours, no_labels=no_labels)


def _map_place(tags: dict[int, Any]) -> Place:
    """Return where a GeoTIFF lies: (row, column) to the coordinates of its map, at the centres of the pixels."""
    words = [int(word) for word in tags.get(_KEYS, ())]
    keys = {words[i]: words[i + 3] for i in range(4, len(words) - 3, 4) if words[i + 1] == 0}
    affine = np.eye(4)
    if _MATRIX in tags:
        affine[:] = np.reshape(tags[_MATRIX], (4, 4))[:, [1, 0, 2, 3]]
        affine[:, 2] = 0, 0, 1, 0
    elif _SCALE in tags and len(tags.get(_TIE, ())) == 6:
        (column, row, _, x, y, _), (width, height) = tags[_TIE], tags[_SCALE][:2]
        affine[:2] = [[0, width, 0, x - column * width], [-height, 0, 0, y + row * height]]
    else:
        return Place()
    if not (np.isfinite(affine).all() and np.linalg.matrix_rank(affine) == 4):
        raise FileError("damaged header: the scale or the place of its map is none")
    if keys.get(_RASTER_TYPE) != _AT_CENTRE:
        affine[:, 3] += (affine[:, 0] + affine[:, 1]) / 2
    code = keys.get(_PROJECTED, keys.get(_GEOGRAPHIC, 0))
    keys_text = "" if not words else f" {words[4:]} {tags.get(34736, '')} {tags.get(34737, '')}"
    name = f"EPSG:{code}" if code not in (0, _USER_DEFINED) else f"a coordinate system of its own{keys_text}"
    return Place("zyx", name, affine, 1000.0 if keys.get(_LINEAR_UNIT) == _METRE else math.nan)


def _check_pages(parts: Iterable[Any], page: Any, size: int) -> None:
    """Raise FileError if a page is missing, or its data are not all inside the file."""
    row_bytes = (page.imagewidth * page.samplesperpixel * page.bitspersample + 7) // 8
    for part in parts:
        if part is None:
            raise FileError("truncated: a page of the stack is missing")
        strips = list(zip(part.dataoffsets, part.databytecounts, strict=True))
        if not strips or any(start <= 0 or count <= 0 or start + count > size for start, count in strips):
            raise FileError("truncated or damaged: image data lies outside the file")
        plain = page.compression == 1 and not page.is_tiled
        if plain and sum(count for _, count in strips) < page.imagelength * row_bytes:
            raise FileError("truncated or damaged: fewer bytes than voxels")


def _reads_as_stored(page: Any) -> bool:
    """Return whether the writer reads its numbers back as they are, though the file says that 0 is white."""
    return page.software.startswith("tifffile") or page.description.startswith(('{"shape"', "ImageJ="))


def _no_labels(page: Any) -> str:
    if page.compression in JPEG:
        return "a TIFF compressed by JPEG, which changes them. Save masks without."
    if page.photometric == MIN_IS_WHITE and page.compression not in FAX and not _reads_as_stored(page):
        return "a TIFF that calls its smallest number white (MINISWHITE). Save it with 0 as black (MINISBLACK)."
    return ""


def _through_pillow(path: Path, page: Any, dtype: np.dtype) -> np.ndarray:
    """Read the pages by Pillow where tifffile would need imagecodecs; return numbers and axes as they are stored."""
    compression = getattr(page.compression, "name", page.compression)
    try:
        from PIL import ImageSequence
        from PIL.TiffImagePlugin import TiffImageFile

        with TiffImageFile(path) as file:
            array = np.stack([_unturned(each) for each in ImageSequence.Iterator(file)])
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


def _unturned(picture: Any) -> np.ndarray:
    """Return a page of Pillow as it is stored: Pillow turns it when it loads it, tifffile does not."""
    orientation = picture.getexif().get(274, 1)
    array = np.array(picture.convert("RGB") if picture.mode == "YCbCr" else picture)
    return as_shown(array, {6: 8, 8: 6}.get(orientation, orientation))


def _write(array: np.ndarray, like: Image, tifffile: Any) -> bytes:
    buffer = io.BytesIO()
    header = like.header if isinstance(like.header, dict) else {}
    options: dict[str, Any] = {"extratags": header.get(_MAP, ())}
    if {"XResolution", "YResolution"} <= set(header):
        options["resolution"] = header["XResolution"], header["YResolution"]
        options["resolutionunit"] = header.get("ResolutionUnit", 2)
    colour = array.ndim > like.spatial_ndim
    tifffile.imwrite(buffer, array, photometric="rgb" if colour else "minisblack", compression="zlib", **options)
    return buffer.getvalue()


FORMATS = (Format((".tif", ".tiff"), _read, _write, ("tifffile", "images"), magic=MAGIC),)
