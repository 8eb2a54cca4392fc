"""TIFF images and stacks through tifffile."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import FileError, Format, Image, complaints, native


def _read(path: Path, tifffile: Any) -> Image:
    with complaints("tifffile", logging.ERROR) as messages:
        image = _stack(path, tifffile)
    if messages:
        raise FileError(f"truncated or damaged: {messages[0]}")
    return image


def _stack(path: Path, tifffile: Any) -> Image:
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
    return Image(native(array), array.ndim - axes.endswith("S"), header=header)


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


FORMATS = (Format((".tif", ".tiff"), _read, _write, ("tifffile", "images")),)
