"""Read, list and write images in all formats of `softdice.images.formats`.

A file is either read whole and verified as far as its format allows (checksums of gzip, PNG and zip; sizes elsewhere),
or refused with a `FileError` of one line. Nothing is guessed: palette indices stay indices, grey values of 1, 2 and 4
bits stay the numbers in the file, and a colour NIfTI is refused.

Formats without a checksum (.nii, .npy, uncompressed TIFF, JPEG) cannot tell a flipped bit among the voxels from data,
nor do the readers of NRRD and MetaImage.

An image is named by its stem, the name of its file without suffix; suffixes are lower case, as in `.nii.gz`. A store is
a folder that is a file of a format (zarr), a collection a file that holds many images (COCO).
"""

from __future__ import annotations

import io
import os
import tempfile
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from softdice.images.formats import BY_SUFFIX
from softdice.images.image import FileError, Format, Image, is_dicom
from softdice.validation import package

__all__ = [
    "SUFFIXES", "FileError", "Image", "image_name", "is_collection", "is_store", "left_out", "list_entries",
    "list_images", "read_image", "split_name", "stored", "write_image",
]  # fmt: skip

SUFFIXES = tuple(sorted(suffix for suffix, format in BY_SUFFIX.items() if format.entries is None))
"""Suffixes that `read_image` reads; files that hold many images are not among them."""

MOST_NAMED = 20
"""Files that a line names, at most."""

_FOREIGN = {
    (0, b"\x1f\x8b"): "compressed by gzip", (0, b"\x89HDF"): "HDF5", (0, b"<"): "HTML or XML",
    (0, b"version https://git-lfs"): "a pointer of Git LFS, to be fetched by git lfs pull",
}  # fmt: skip
"""Position and bytes in a file -> its content, in words, for files that often have a wrong suffix."""


def split_name(path: str | Path) -> tuple[str, str] | None:
    """Split a path, of a file that may not exist, into stem and suffix; None for an unknown suffix or a hidden file.

    Example:
        >>> split_name("labels/case_1.nii.gz"), split_name("a.b.PNG"), split_name("notes.txt")
        (('case_1', '.nii.gz'), ('a.b', '.png'), None)
    """
    name = Path(path).name
    endings = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix) and len(name) > len(suffix)]
    if not endings or name.startswith("."):
        return None
    suffix = max(endings, key=len)
    return name[: -len(suffix)], suffix


def image_name(path: str | Path) -> tuple[str, str] | None:
    """Return stem and suffix of an image on disk, or None if the path is no image.

    Beyond files that `split_name` knows, an image is a file of DICOM without a suffix, a folder that is one image (a
    store, or slices of DICOM), or an image in a collection. No file is read further than its first bytes.
    """
    path = Path(path)
    if is_collection(path.parent):
        return path.name, path.parent.suffix.lower()
    if not path.is_dir():
        return split_name(path) or ((path.name, ".dcm") if is_dicom(path) else None)
    if is_store(path):
        return split_name(path) or (path.name, ".zarr")
    listed = list(path.iterdir())  # a folder of slices, in a format whose `folder` is set
    suffixes = {name[1] for name in map(split_name, listed) if name and BY_SUFFIX[name[1]].folder}
    if not suffixes and any(split_name(each) is None and is_dicom(each) for each in listed):
        suffixes = {".dcm"}
    return (path.name, suffixes.pop()) if len(suffixes) == 1 else None


def composed(name: str) -> str:
    """Return a name in one form of Unicode, in which names are compared: macOS writes é as e with an accent.

    Example:
        >>> composed("e\u0301") == "\u00e9"
        True
    """
    return unicodedata.normalize("NFC", name)


def parts(path: Path) -> list[Path]:
    """Return the files that hold an image: `stored`, and where that is only a header, files that may be beside it."""
    path = stored(path)
    name = split_name(path)
    return [path, *(path.with_name(name[0] + suffix) for suffix in BY_SUFFIX[name[1]].beside)] if name else [path]


def stored(path: Path) -> Path:
    """Return the file on disk that holds an image: the path itself, or for an image in a collection the collection."""
    return path.parent if is_collection(path.parent) else path


def is_collection(path: Path) -> bool:
    """Return whether a path is a file that holds many images, such as the annotations of COCO."""
    format = BY_SUFFIX.get(path.suffix.lower())
    return format is not None and format.entries is not None and path.is_file()


def list_entries(path: Path, beside: Path | None = None) -> dict[str, Path]:
    """Return {stem: path} of the images in a collection; such a path is `path` / the name of the image inside it.

    `beside`: another file. It is read for the names of the images if it is a collection, too. Raise FileError if the
    file cannot be read, or has another content than its suffix says.
    """
    entries = BY_SUFFIX[path.suffix.lower()].entries
    assert entries is not None
    try:
        return entries(path, beside if beside is not None and is_collection(beside) else None)
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"list_images: {path}: {_one_line(error)}") from error


def is_store(path: Path) -> bool:
    """Return whether a path is a folder that is itself a file of a format, such as zarr."""
    name = split_name(path)
    if not path.is_dir() or (name and not BY_SUFFIX[name[1]].store):
        return False
    return name is not None or any((path / each).is_file() for each in (".zarray", ".zgroup", "zarr.json"))


def left_out(folder: Path, cases: Iterable[Path]) -> str:
    """Return a line that names entries of a folder that are not among the paths `cases`, "" if there are none.

    Hidden files are not named, nor files that hold the voxels of a header beside them. For a case that is a folder of
    a DICOM series the line also names the files without a picture inside it.
    """
    inside = [path for path in cases if path.parent == folder]
    used = {path.name for path in inside}
    names = [(name[0], BY_SUFFIX[name[1]].beside) for name in map(split_name, used) if name]
    voxels = {f"{stem}{suffix}".lower() for stem, suffixes in names for suffix in suffixes}
    listed = (name for name in os.listdir(folder) if not name.startswith("."))
    unread = sorted(name for name in listed if name not in used and name.lower() not in voxels)
    for path in sorted(path for path in inside if path.is_dir()):
        name = image_name(path)
        if name is not None and (others_in := BY_SUFFIX[name[1]].folder) is not None:
            unread += [f"{path.name}/{other}" for other in others_in(path)]
    more = f" and {len(unread) - MOST_NAMED} more" * (len(unread) > MOST_NAMED)
    return f"Left out of {folder}: {', '.join(unread[:MOST_NAMED])}{more}" if unread else ""


def list_images(folder: str | Path, *, nnunet: bool = False) -> dict[str, Path]:
    """Return {stem: path} of the images in a folder, sorted: files with a known suffix, subfolders that are one image.

    Args:
        nnunet: take `case_0000.nii.gz`, as nnU-Net names the first channel of an image, for `case`.

    Raises:
        FileError: not a folder, or two files of one stem (`a.png` beside `a.nii.gz`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"list_images: expected a folder, got {str(folder)!r}. Check the path.")
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = image_name(path)
        if name is None or not path.exists():  # a link may lead nowhere
            continue
        stem = composed(name[0].removesuffix("_0000") if nnunet else name[0])
        if stem in images:
            got = f"{images[stem].name} and {path.name}. Keep one of them."
            raise FileError(f"list_images: expected one file named {stem!r} in {folder}, got {got}")
        images[stem] = path
    return images


def read_image(path: str | Path) -> Image:
    """Read an image: bool, integers or floats in native byte order, in writable memory.

    Args:
        path: one that `image_name` does not answer with None.

    Raises:
        FileError: unknown suffix, missing, truncated, damaged (as far as the format can tell), or of a kind that has
            no single number per voxel (RGB-typed NIfTI, complex, structured, several arrays in one .npz).
        ModuleNotFoundError: the reader of this format is not installed; names the extra.
    """
    path = Path(path)
    name = image_name(path)
    if name is None:
        expected = f"a file ending in {', '.join(SUFFIXES)}"
        raise FileError(f"read_image: expected {expected}, got {path.name!r}. Convert the file first.")
    format = BY_SUFFIX[name[1]]
    module = _package(format)  # outside of the `try`: a missing package is no damaged file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a reader that warns about a file does not trust it; neither do we
            for about_code in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
                warnings.simplefilter("ignore", about_code)
            image = replace(format.read(path, module), suffix=name[1])
    except Exception as error:  # readers trust what they read: a flipped bit surfaces as any of the errors there are
        raise FileError(f"read_image: {path}: {_one_line(error)}{_content(path, format)}") from error
    if image.array.dtype.kind not in "buif":
        raise FileError(f"read_image: {path}: expected numbers, got voxels of type {image.array.dtype}")
    if image.array.ndim == 0 or image.array.size == 0:
        raise FileError(f"read_image: {path}: expected voxels, got an array of shape {image.array.shape}")
    return image


def mask_suffix(suffix: str) -> str:
    """Return the suffix of the file to write for a mask of an image with that suffix, such as ".png" for ".jpg"."""
    return BY_SUFFIX[suffix].masks or suffix


def write_image(path: str | Path, array: np.ndarray, like: Image) -> Path:
    """Write an array atomically as a file of the format and geometry of `like`; return its path.

    Args:
        path: its suffix is replaced by that of `like` where it differs; JPEG, which would change labels, becomes PNG.
        array: same spatial shape as `like`, a channel axis may follow.
        like: an image that `read_image` returned.

    Raises:
        FileError: other shape, a type that the format cannot hold (floats in PNG), or the disk refused.
    """
    path, array = Path(path), np.asarray(array)
    suffix = mask_suffix(like.suffix)
    name = split_name(path)
    if name is None or name[1] != suffix:
        path = path.with_name((path.name if name is None else name[0]) + suffix)
    if array.shape[: like.spatial_ndim] != like.shape:
        raise FileError(f"write_image: expected an array of shape {like.shape}, got {array.shape}. Resample it first.")
    format = BY_SUFFIX[suffix]
    module = _package(format)
    assert format.write is not None  # else its masks have another format
    try:
        content = format.write(array, replace(like, suffix=suffix), module)
        with written_beside(path) as file:
            file.write(content)
    except Exception as error:
        raise FileError(f"write_image: {path}: {_one_line(error)}") from error
    return path


@contextmanager
def written_beside(path: Path) -> Iterator[io.BufferedWriter]:
    """Write a file atomically: yield a temporary file in its folder, and rename it to `path` at the end.

    No reader ever sees half a file. If the block raises, the temporary file is removed and `path` stays as it was.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _one_line(error: BaseException) -> str:
    """Return the text of an error in one line, at most 300 characters; its type if it has none."""
    text = " ".join(str(error).split())
    text += " is missing" if isinstance(error, KeyError) else ""
    return text[:300] if text else type(error).__name__


def _content(path: Path, format: Format) -> str:
    """Return the end of an error that says what a file really is, such as ". Its content is that of a .png file".

    "" if its first bytes are right for `format`, the format of its suffix, or say nothing, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return ""
    if not head:
        return ". The file is empty"
    known = {magic: f"that of a {suffix} file" for suffix, each in BY_SUFFIX.items() for magic in each.magic} | _FOREIGN
    matches = [(start, word) for start, word in known if head[start:].startswith(word)]
    return f". Its content is {known[matches[0]]}" if matches and not set(matches) & set(format.magic) else ""


def _package(format: Format) -> ModuleType | None:
    """Import the package that reads a format, None if it needs none."""
    return None if format.package is None else package("softdice", *format.package)
