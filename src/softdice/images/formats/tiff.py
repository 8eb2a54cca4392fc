"""TIFF images and stacks through tifffile, turned as viewers show them; GeoTIFF as its map lies.

`_read` and `_write` are called as `Format.read` and `Format.write`; `tifffile` is the module. A series is its object
for pages of one shape and dtype, `page` one of its TiffPages; the first page stands for a whole stack. `Image.header`
is {name of a tag: value}, and under `_MAP` the tags of GeoTIFF as tifffile's writer takes them: (code, dtype, count,
value, True).
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import FileError, Format, Image, Place, as_shown, complaints, native, without_alpha

MAGIC = (0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")

MIN_IS_WHITE, PALETTE = 0, 3
"""Values of the tag PhotometricInterpretation."""

_TRANSPARENCY, _COPY = 4, 1
"""Bits of the tag NewSubfileType: a mask of what is transparent, and a smaller copy."""

_NO_ALPHA = 0
"""Value of the tag ExtraSamples of a channel that is not transparency, such as near infrared."""

FAX, JPEG = (2, 3, 4), (6, 7)
"""Values of the tag Compression. On a fax 0 is white for every program."""

_SCALE, _TIE, _MATRIX, _KEYS = 33550, 33922, 34264, 34735
GEOTIFF = _SCALE, _TIE, _MATRIX, _KEYS, 34736, 34737
"""Tags of GeoTIFF: size of a pixel, a pixel and its place, an affine instead of both, keys, and their long values."""

_NODATA = 42113
"""Tag of GDAL: the value of voxels without data, as text."""

_RASTER_TYPE, _GEOGRAPHIC, _PROJECTED, _LINEAR_UNIT = 1025, 2048, 3072, 3076
_AT_CENTRE, _METRE, _USER_DEFINED = 2, 9001, 32767
"""Keys of GeoTIFF, and values of them."""

_MAP = "GeoTIFF"
"""Name of those tags in the header of an image."""


def _read(path: Path, tifffile: Any) -> Image:
    """Read an image or a stack; raise FileError also for a damage that tifffile logs and does not raise."""
    with complaints("tifffile", logging.ERROR) as messages:
        image = _stack(path, tifffile)
    if messages:
        raise FileError(f"truncated or damaged: {messages[0]}")
    return image


def _stack(path: Path, tifffile: Any) -> Image:
    """Read an image (rows, columns), or a stack with axes before them; colours (RGB, or RGBA less alpha) come last.

    Raise FileError for images that differ, channels, a truncated file, an unknown compression, or a damaged GeoTIFF.
    """
    # 1. check the pages, and read voxels and tags
    with tifffile.TiffFile(path) as file:
        masks = [series for series in file.series if series.keyframe.subfiletype & _TRANSPARENCY]
        # one stack; several series where pages were appended to the file one by one
        all_series = [series for series in file.series if series not in masks] or file.series
        whole = next((each for each in all_series if not each.keyframe.subfiletype & _COPY), all_series[0]).keyframe
        all_series = [each for each in all_series if not _is_smaller_copy(each.keyframe, whole)]
        axes, page = all_series[0].axes, all_series[0].keyframe
        has_colours = axes.endswith("S")
        if len({(series.shape, series.dtype, series.axes, series.keyframe.photometric) for series in all_series}) != 1:
            got = ", ".join(f"{series.shape} {series.dtype}" for series in all_series[:4])
            raise FileError(f"expected one image or stack, got {len(all_series)} that differ: {got}")
        if "C" in axes or axes.find("S") not in (-1, len(axes) - 1):
            raise FileError(f"expected grey values or colours, got channels on the axes {axes}")
        for series in all_series:
            _check_pages(series.pages, series.keyframe, path.stat().st_size)
        arrays = _arrays(path, all_series)
        of_pages = len(arrays) > 1 and arrays[0].ndim - has_colours == 2  # stack pages; join stacks at their first axis
        array = native(arrays[0] if len(arrays) == 1 else np.stack(arrays) if of_pages else np.concatenate(arrays))
        tags, no_labels_reason = page.tags, _no_labels_reason(page)
        header = {name: tags[name].value for name in ("XResolution", "YResolution", "ResolutionUnit") if name in tags}
        header[_MAP] = [(t.code, t.dtype, t.count, t.value, True) for t in tags.values() if t.code in GEOTIFF]
        nodata = _number(str(tags.valueof(_NODATA, "")).strip("\0 "))
        orientation = tags.valueof("Orientation", 1)
        tags_of_pages = [getattr(each, "tags", {}) for series in all_series for each in series.pages]
        if not all(_arrays(path, [mask])[0].all() for mask in masks if mask not in all_series):
            no_labels_reason = "a mask of transparency that hides pixels. Save the mask as grey values without one."
        palettes = [np.asarray(each["ColorMap"].value) for each in tags_of_pages if "ColorMap" in each]
    if not all(np.array_equal(palette, palettes[0]) for palette in palettes):  # lengths may differ, too
        no_labels_reason = "pages of different palettes. Save all with one, or as grey values."
    # 2. grey values with 0 as black, colours without alpha, and the palette in 8 bits
    if page.photometric == MIN_IS_WHITE and not _reads_as_stored(page):  # tifffile and ImageJ ignore the tag
        array = _inverted(array, page.bitspersample)
    if has_colours and array.shape[-1] in (2, 4) and page.extrasamples[-1:] != (_NO_ALPHA,):
        has_colours = array.shape[-1] == 4
        array, alpha_reason = without_alpha(array)
        no_labels_reason = no_labels_reason or alpha_reason
    colours = (palettes[0].reshape(3, -1) >> 8).T.astype(np.uint8) if palettes and page.photometric == PALETTE else None
    # 3. lay rows and columns as a map, or as viewers show them
    spatial = array.ndim - has_colours
    place = _map_place({tag[0]: tag[3] for tag in header[_MAP]}) if spatial == 2 else Place()
    if place.affine is None:  # GIS programs ignore the tag Orientation
        array = np.ascontiguousarray(as_shown(array, orientation, rows=spatial - 2))
        if orientation in (5, 6, 7, 8) and {"XResolution", "YResolution"} <= {*header}:
            header["XResolution"], header["YResolution"] = header["YResolution"], header["XResolution"]
    return Image(array, spatial, place, header, palette=colours, nodata=nodata, no_labels=no_labels_reason)


def _number(text: str) -> float | None:
    """Return the number in a text, an int if it is whole, so that 64 bits keep their digits; None if it is none."""
    if whole := re.fullmatch(r"(-?\d{1,20})(\.0*)?", text):
        return int(whole[1])
    try:
        return float(text)
    except ValueError:
        return None


def _is_smaller_copy(page: Any, whole: Any) -> bool:
    """Return whether a page says that it is a smaller copy, and has fewer pixels than `whole`, a page of full size.

    Some programs set that bit on pages of full size, too.
    """
    size, full_size = (each.imagelength * each.imagewidth for each in (page, whole))
    return bool(page.subfiletype & _COPY and size < full_size)


def _arrays(path: Path, all_series: list[Any]) -> list[np.ndarray]:
    """Return an array for each series, all of one shape and dtype; by Pillow where tifffile would need imagecodecs."""
    try:
        return [series.asarray() for series in all_series]
    except (ValueError, RuntimeError, ImportError) as error:
        if not (isinstance(error, ImportError) or any(word in str(error) for word in ("imagecodecs", "COMPRESSION"))):
            raise
    first = all_series[0]
    numbers = [page.index for series in all_series for page in series.pages]
    pages = _through_pillow(path, first.keyframe, first.dtype, numbers)
    return list(pages.reshape(len(all_series), *first.shape))


def _inverted(array: np.ndarray, bits: int) -> np.ndarray:
    """Return 2^bits - 1 minus integers of so many bits, or the negation of bool; raise FileError for floats."""
    if array.dtype.kind not in "bu":
        raise FileError(f"expected whole numbers where the smallest is white, got {array.dtype}")
    return ~array if array.dtype.kind == "b" else array.dtype.type(2**bits - 1) - array


def _map_place(tags: dict[int, Any]) -> Place:
    """Return the place of a GeoTIFF by its tags {code: value}, `Place()` without any.

    The affine goes from (row, column) of a pixel's centre to (x, y) of the map. Raise FileError if it is singular.
    """
    words = [int(word) for word in tags.get(_KEYS, ())]  # a head of 4 words, then 4 of each key: key, tag, count, value
    keys = {words[i]: words[i + 3] for i in range(4, len(words) - 3, 4) if words[i + 1] == 0}
    affine = np.eye(4)
    if _MATRIX in tags:
        affine[:] = np.reshape(tags[_MATRIX], (4, 4))[:, [1, 0, 2, 3]]  # the tag maps (column, row)
        affine[:, 2] = 0, 0, 1, 0
    elif _SCALE in tags and len(tags.get(_TIE, ())) == 6:
        # the tag _TIE says that the pixel (column, row) lies at (x, y); y grows upwards, rows downwards
        (column, row, _, x, y, _), (width, height) = tags[_TIE], tags[_SCALE][:2]
        affine[:2] = [[0, width, 0, x - column * width], [-height, 0, 0, y + row * height]]
    else:
        return Place()
    if not (np.isfinite(affine).all() and np.linalg.matrix_rank(affine) == 4):
        raise FileError("damaged header: the scale or the place of its map is none")
    if keys.get(_RASTER_TYPE) != _AT_CENTRE:  # from the corner of a pixel to its centre
        affine[:, 3] += (affine[:, 0] + affine[:, 1]) / 2
    code = keys.get(_PROJECTED, keys.get(_GEOGRAPHIC, 0))
    keys_text = "" if not words else f" {words[4:]} {tags.get(34736, '')} {tags.get(34737, '')}"  # long values
    name = f"EPSG:{code}" if code not in (0, _USER_DEFINED) else f"a coordinate system of its own{keys_text}"
    return Place("zyx", name, affine, 1000.0 if keys.get(_LINEAR_UNIT) == _METRE else math.nan)


def _check_pages(pages: Iterable[Any], page: Any, file_bytes: int) -> None:
    """Raise FileError if a page of a series is missing (None), or its data are not all inside the file.

    `page` is the series' keyframe, whose width and dtype all pages have; `file_bytes` is the length of the file.
    """
    row_bytes = (page.imagewidth * page.samplesperpixel * page.bitspersample + 7) // 8
    for each in pages:
        if each is None:
            raise FileError("truncated: a page of the stack is missing")
        if not all(each.databytecounts):
            advice = "If GDAL left empty blocks out (SPARSE_OK), rewrite it: gdal_translate -co SPARSE_OK=FALSE"
            raise FileError(f"truncated or sparse: parts of the image are not in the file. {advice}")
        strips = list(zip(each.dataoffsets, each.databytecounts, strict=True))
        if not strips or any(start <= 0 or count <= 0 or start + count > file_bytes for start, count in strips):
            raise FileError("truncated or damaged: image data lies outside the file")
        plain = page.compression == 1 and not page.is_tiled
        if plain and sum(count for _, count in strips) < page.imagelength * row_bytes:
            raise FileError("truncated or damaged: fewer bytes than voxels")


def _reads_as_stored(page: Any) -> bool:
    """Return whether tifffile or ImageJ wrote a page: they ignore what the file says about 0 as white or black."""
    return page.software.startswith("tifffile") or page.description.startswith(('{"shape"', "ImageJ="))


def _no_labels_reason(page: Any) -> str:
    """Return why a page cannot hold labels: the end of "expected labels, got "; "" if it can."""
    if page.compression in JPEG:
        return "a TIFF compressed by JPEG, which changes them. Save masks without."
    # only on a fax do all programs take 0 for white; tifffile and ImageJ ignore the tag in what they wrote
    if page.photometric == MIN_IS_WHITE and page.compression not in FAX and not _reads_as_stored(page):
        return "a TIFF that calls its smallest number white (MINISWHITE). Save it with 0 as black (MINISBLACK)."
    return ""


def _through_pillow(path: Path, page: Any, dtype: np.dtype, numbers: list[int]) -> np.ndarray:
    """Read the pages of these numbers, from 0 on, by Pillow, where tifffile would need imagecodecs.

    Return (pages, rows, columns), or with colours last, of this dtype, with numbers and axes as they are stored: what
    tifffile would return. Pillow inverts grey values of up to 8 bits where the smallest is white, and stretches 2 and 4
    bits to 0..255: this undoes both. `page` is the first page. Raise FileError if Pillow does not know the compression.
    """
    compression = getattr(page.compression, "name", page.compression)
    try:
        from PIL.TiffImagePlugin import TiffImageFile

        with TiffImageFile(path) as file:
            pages = []
            for number in numbers:
                file.seek(number)
                pages.append(_unturned(file))
            array = np.stack(pages)
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
        array = array // array.dtype.type(255 // (2**page.bitspersample - 1))
    return array


def _unturned(picture: Any) -> np.ndarray:
    """Return the array of a page, as it is stored: undo the turn by Orientation that Pillow makes when it loads it."""
    from PIL.ExifTags import Base

    orientation = picture.getexif().get(Base.Orientation, 1)
    array = np.array(picture.convert("RGB") if picture.mode == "YCbCr" else picture)
    return as_shown(array, {6: 8, 8: 6}.get(orientation, orientation))  # 6 and 8 undo each other, the others themselves


def _write(array: np.ndarray, like: Image, tifffile: Any) -> bytes:
    """Return the content of a compressed TIFF, with the resolution and the map of `like` if that was a TIFF, too."""
    buffer = io.BytesIO()
    header = like.header if isinstance(like.header, dict) else {}
    options: dict[str, Any] = {"extratags": header.get(_MAP, ())}
    if {"XResolution", "YResolution"} <= set(header):
        options["resolution"] = header["XResolution"], header["YResolution"]
        options["resolutionunit"] = header.get("ResolutionUnit", 2)
    has_colours = array.ndim > like.spatial_ndim
    tifffile.imwrite(buffer, array, photometric="rgb" if has_colours else "minisblack", compression="zlib", **options)
    return buffer.getvalue()


FORMATS = (Format((".tif", ".tiff"), _read, _write, ("tifffile", "images"), magic=MAGIC),)
