"""PNG and JPEG through Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import FileError, Format, Image

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


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


def _read_png(path: Path, pil: Any) -> Image:
    from PIL.PngImagePlugin import PngImageFile

    data, bits, colour = _verified_png(path)
    # Opened by its class: a whole-slide mask is larger than what PIL.Image.open takes for an attack.
    with PngImageFile(io.BytesIO(data)) as picture:
        if bits == 16 and colour != 0:
            raise FileError("expected grey values or 8-bit colour, got 16-bit colour")
        array = _picture_array(picture)
    if colour == 0 and bits in (2, 4):
        array = array // np.uint8(255 // (2**bits - 1))  # the reader stretches them to 0..255; these are labels
    return Image(array, 2)


def _read_jpeg(path: Path, pil: Any) -> Image:
    from PIL.JpegImagePlugin import JpegImageFile

    with JpegImageFile(str(path)) as picture:
        return Image(_picture_array(picture), 2, no_labels="a JPEG, which changes them. Save masks as PNG.")


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


FORMATS = (
    Format((".png",), _read_png, _write_png, ("PIL.Image", "images")),
    Format((".jpg", ".jpeg"), _read_jpeg, None, ("PIL.Image", "images"), masks=".png"),
)
