"""PNG, JPEG, BMP, GIF, WebP and JPEG 2000 through Pillow, turned as viewers show them.

Readers and writers are called as `Format.read` and `Format.write`; `pil` is the module PIL.Image. Arrays are (H, W), or
(H, W, channels). A `picture` is Pillow's object, opened by the class of its format: PIL.Image.open refuses pictures as
large as a whole-slide mask as a decompression bomb.
"""

from __future__ import annotations

import io
import zlib
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import FileError, Format, Image, as_shown, without_alpha

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_GREY, _PALETTE, _WITH_ALPHA = 0, 3, (4, 6)
"""Values of a PNG's colour type."""


def _verified_png(path: Path) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the bytes of a PNG and {kind: content} of its first chunk of each kind, after checking every checksum.

    Raise FileError if the file is no PNG, damaged, truncated or an animation.
    """
    data = path.read_bytes()
    if not data.startswith(_PNG_SIGNATURE):
        raise FileError("not a PNG file")
    position, chunks = len(_PNG_SIGNATURE), dict[bytes, bytes]()
    while position < len(data) and b"IEND" not in chunks:  # a chunk: length, kind, content, checksum
        length = int.from_bytes(data[position : position + 4], "big")
        if position + 12 + length > len(data):
            raise FileError("truncated")
        chunk = data[position + 4 : position + 8 + length]
        if zlib.crc32(chunk) != int.from_bytes(data[position + 8 + length : position + 12 + length], "big"):
            raise FileError("damaged: a checksum does not fit")
        chunks.setdefault(chunk[:4], chunk[4:])
        position += 12 + length
    if list(chunks)[:1] != [b"IHDR"] or not {b"IDAT", b"IEND"} <= set(chunks):
        raise FileError("truncated")
    if b"acTL" in chunks:
        raise FileError("expected one picture, got an animation")
    return data, chunks


def _read_png(path: Path, pil: Any) -> Image:
    """Read grey values as they are stored, palette indices with their palette (RGBA), or colours without alpha.

    Raise FileError for colours of 16 bits, an animation, and a damaged or truncated file.
    """
    from PIL.PngImagePlugin import PngImageFile

    data, chunks = _verified_png(path)
    bits, colour = chunks[b"IHDR"][8:10]
    if bits == 16 and colour != _GREY:
        raise FileError("expected grey values or 8-bit colour, got 16-bit colour")
    with PngImageFile(io.BytesIO(data)) as picture:
        array = _picture_array(picture)
    if colour == _GREY and bits in (2, 4):
        array = array // np.uint8(255 // (2**bits - 1))  # the reader stretches them to 0..255; these are labels
    if colour == _PALETTE:
        palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
        alpha = np.frombuffer(chunks.get(b"tRNS", b"")[: len(palette)].ljust(len(palette), b"\xff"), np.uint8)
        return Image(array, 2, palette=np.column_stack([palette, alpha]))
    if colour in _WITH_ALPHA:
        array, no_labels_reason = without_alpha(array)
        return Image(array, 2, no_labels=no_labels_reason)
    return Image(array, 2)


def _read_jpeg(path: Path, pil: Any) -> Image:
    """Read grey values or colours, which cannot be labels."""
    from PIL.JpegImagePlugin import JpegImageFile

    with JpegImageFile(str(path)) as picture:
        array = _picture_array(picture, "RGB" if picture.mode == "CMYK" else "")
    return Image(array, 2, no_labels="a JPEG, which changes them. Save masks as PNG.")


def _read_other(path: Path, pil: Any, *, kind: str) -> Image:
    """Read a picture by Pillow's plugin `kind`, "Bmp", "Gif", "WebP" or "Jpeg2K"; raise FileError for an animation."""
    data, colours = path.read_bytes(), None
    with getattr(import_module(f"PIL.{kind}ImagePlugin"), _CLASSES[kind])(io.BytesIO(data)) as picture:
        if getattr(picture, "n_frames", 1) != 1:
            raise FileError(f"expected one picture, got an animation of {picture.n_frames}")
        array = _picture_array(picture)
        if picture.mode == "P":
            colours = np.array(picture.getpalette("RGBA"), np.uint8).reshape(-1, 4)
    lossy = {"WebP": _is_lossy_webp, "Jpeg2K": _is_lossy_jpeg2000}.get(kind, lambda data: False)(data)
    no_labels_reason = f"a lossy {path.suffix}, which changes them. Save masks as PNG." if lossy else ""
    if kind == "Gif" and colours is not None:
        used = colours[np.unique(array), :3]
        if (used == used[:, :1]).all():  # grey values: GIF keeps them as a palette of those that occur
            return Image(colours[array, 0], 2)
    if colours is None and array.ndim == 3 and array.shape[-1] in (2, 4):
        array, alpha_reason = without_alpha(array)
        no_labels_reason = no_labels_reason or alpha_reason
    return Image(array, 2, palette=colours, no_labels=no_labels_reason)


def _is_lossy_webp(data: bytes) -> bool:
    """Return whether a WebP has a chunk of a lossy picture ("VP8 "); `data` are the bytes of its file."""
    position, kinds = 12, set[bytes]()
    while position + 8 <= len(data):
        kinds.add(data[position : position + 4])
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
    return b"VP8 " in kinds


def _is_lossy_jpeg2000(data: bytes) -> bool:
    """Return whether the coding style (COD) in the bytes of a JPEG 2000 file names the irreversible (9-7) wavelet."""
    start = data.find(b"\xff\x52")
    return start >= 0 and data[start + 13 : start + 14] == b"\0"


_CLASSES = {"Bmp": "BmpImageFile", "Gif": "GifImageFile", "WebP": "WebPImageFile", "Jpeg2K": "Jpeg2KImageFile"}


def _picture_array(picture: Any, colour_space: str = "") -> np.ndarray:
    """Return grey values or palette indices (H, W), or colours (H, W, channels), as viewers show the picture.

    `colour_space` is the mode of Pillow to convert it to, such as "RGB", or "" for its own. Raise FileError unless it
    is grey, palette, RGB or RGBA then.
    """
    from PIL.ExifTags import Base

    shown = picture.convert(colour_space) if colour_space else picture
    if shown.mode not in ("1", "L", "P", "I", "I;16", "LA", "RGB", "RGBA"):
        raise FileError(f"expected grey, palette or colour, got a picture of mode {shown.mode}")
    array = np.array(shown)
    array = array.view(np.uint8) != 0 if shown.mode == "1" else array  # its True is the byte 255, which is no bool
    return np.ascontiguousarray(as_shown(array, picture.getexif().get(Base.Orientation)))


def _write_png(array: np.ndarray, like: Image, pil: Any) -> bytes:
    """Return the content of a PNG of bool, 8 or 16 bits; raise FileError for values that these do not hold."""
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


_PIL = ("PIL.Image", "images")
_JPEG2000 = ((0, b"\0\0\0\x0cjP"), (0, b"\xff\x4f\xff\x51"))


def _other(suffix: str, kind: str, *magic: tuple[int, bytes]) -> Format:
    return Format((suffix,), partial(_read_other, kind=kind), None, _PIL, masks=".png", magic=magic)


FORMATS = (
    Format((".png",), _read_png, _write_png, _PIL, magic=((0, _PNG_SIGNATURE),)),
    Format((".jpg", ".jpeg"), _read_jpeg, None, _PIL, masks=".png", magic=((0, b"\xff\xd8\xff"),)),
    _other(".bmp", "Bmp", (0, b"BM")),
    _other(".gif", "Gif", (0, b"GIF8")),
    _other(".webp", "WebP", (8, b"WEBP")),
    _other(".jp2", "Jpeg2K", *_JPEG2000),
)
