"""Arrays as NumPy saves them: .npy, and .npz with one array. Every axis is spatial.

Readers and writers are called as `Format.read` and `Format.write`; they need no package.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.image import FileError, Format, Image, Place, native


def _read_npy(path: Path, _: Any) -> Image:
    with path.open("rb") as file:
        return _one_array(file)


def _read_npz(path: Path, _: Any) -> Image:
    """Read an archive of one array; raise FileError for one of several."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != 1:
            raise FileError(f"expected one array in the archive, got {len(names)}: {', '.join(names[:8])}")
        with archive.open(names[0]) as file:
            return _one_array(file)


def _one_array(file: Any) -> Image:
    """Read the array of a binary file, which is open; raise FileError if anything follows it."""
    array = np.lib.format.read_array(file, allow_pickle=False)
    if file.read(1):  # also what makes zipfile verify the checksum
        raise FileError("damaged: there is more in the file than its header says")
    return Image(native(array), array.ndim, Place("any"))


def _write_numpy(array: np.ndarray, like: Image, _: Any) -> bytes:
    """Return the content of a .npz if `like.suffix` is that, else of a .npy."""
    buffer = io.BytesIO()
    if like.suffix == ".npz":
        np.savez_compressed(buffer, array)
    else:
        np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


FORMATS = (
    Format((".npy",), _read_npy, _write_numpy, magic=((0, b"\x93NUMPY"),)),
    Format((".npz",), _read_npz, _write_numpy, magic=((0, b"PK\3\4"),)),
)
