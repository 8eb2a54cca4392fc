"""PNG and JPEG through Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import FileError, Format, Image, without_alpha

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _verified_png(path: Path) -> tuple[bytes, dict[bytes, bytes]]:
    """path -> its bytes, and the first chunk of each kind, every chunk's checksum verified."""
    data = path.read_bytes()
    if not data.startswith(_PNG_SIGNATURE):
        raise FileError("not a PNG file")
    position, chunks = len(_PNG_SIGNATURE), dict[bytes, bytes]()
    while position < len(data) and b"IEND" not in chunks:
        if position + 12 > len(data):
            raise FileError("truncated")
        (length,) = struct.unpack_from(">I", data, position)
        if position + 12 + length > len(data):
            raise FileError("truncated")
        chunk = data[position + 4 : position + 8 + length]
        if zlib.crc32(chunk) != struct.unpack_from(">I", data, position + 8 + length)[0]:
            raise FileError("damaged: a checksum does not fit")
        chunks.setdefault(chunk[:4], chunk[4:])
        position += 12 + length
    if list(chunks)[:1] != [b"IHDR"] or not {b"IDAT", b"IEND"} <= set(chunks):
        raise FileError("truncated")
    if b"acTL" in chunks:
        raise FileError("expected one picture, got an animation")
    return data, chunks


def _read_png(path: Path, pil: Any) -> Image:
    from PIL.PngImagePlugin import PngImageFile

    data, chunks = _verified_png(path)
    bits, colour = chunks[b"IHDR"][8:10]
    if bits == 16 and colour != 0:
        raise FileError("expected grey values or 8-bit colour, got 16-bit colour")
    # Opened by its class: a whole-slide mask is larger than what PIL.Image.open takes for an attack.
    with PngImageFile(io.BytesIO(data)) as picture:
        array = _picture_array(picture)
    if colour == 0 and bits in (2, 4):
        array = array // np.uint8(255 // (2**bits - 1))  # the reader stretches them to 0..255; these are labels
    if colour == 3:
        palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
        alpha = np.frombuffer(chunks.get(b"tRNS", b"")[: len(palette)].ljust(len(palette), b"\xff"), np.uint8)
        return Image(array, 2, palette=np.column_stack([palette, alpha]))
    if colour in (4, 6):
        array, no_labels = without_alpha(array)
        return Image(array, 2, no_labels=no_labels)
    return Image(array, 2)


def _read_jpeg(path: Path, pil: Any) -> Image:
    from PIL.JpegImagePlugin import JpegImageFile

    with JpegImageFile(str(path)) as picture:
        array = _picture_array(picture.convert("RGB") if picture.mode == "CMYK" else picture)
    return Image(array, 2, no_labels="a JPEG, which changes them. Save masks as PNG.")


def _picture_array(picture: Any) -> np.ndarray:
    """picture -> (H, W) grey values or palette indices, (H, W, channels) colours."""
    if picture.mode not in ("1", "L", "P", "I", "I;16", "LA", "RGB", "RGBA"):
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
    Format((".png",), _read_png, _write_png, ("PIL.Image", "images"), magic=((0, _PNG_SIGNATURE),)),
    Format((".jpg", ".jpeg"), _read_jpeg, None, ("PIL.Image", "images"), masks=".png", magic=((0, b"\xff\xd8\xff"),)),
)
