"""Kinds of label files that were once misread or refused for a wrong reason: one row a fault.

Each row makes a prediction and a reference, and says what `softdice score` finds: the Dice of the labels, or parts of
the reason why it refuses.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
nib = pytest.importorskip("nibabel")
highdicom = pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")
tifffile = pytest.importorskip("tifffile")
PIL_Image = pytest.importorskip("PIL.Image")

from commands import score  # noqa: E402

from softdice.images.files import FileError, list_images, read_image, write_image  # noqa: E402

RNG = np.random.default_rng(5)
T = RNG.integers(0, 3, (10, 14), np.uint8)
P = np.where(RNG.random(T.shape) < 0.3, RNG.integers(0, 3, T.shape), T).astype(np.uint8)
VOLUME = RNG.integers(0, 3, (5, 6, 7), np.uint8)
INNER = np.where(np.arange(7) % 6 == 0, 0, VOLUME).astype(np.uint8)
"""Its first and last slices are empty: a DICOM SEG leaves them out."""

SHARES = RNG.random((5, 6, 7, 2), np.float32) / 2
MASK = T > 0
OTHER = P > 0


def dice(p: np.ndarray, t: np.ndarray) -> float:
    return 2 * (p & t).sum() / (p.sum() + t.sum())


def both(p: np.ndarray, t: np.ndarray) -> dict[int, float]:
    return {int(label): dice(p == label, t == label) for label in np.unique([p, t]) if label}


def save(path: Path, array: np.ndarray, **others: object) -> Path:
    """.npy, NIfTI, PNG, JPEG or, through tifffile, TIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.name.endswith((".nii", ".nii.gz")):
        nib.Nifti1Image(array, np.diag([2.0, 2, 3, 1])).to_filename(path)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, **others)
    else:
        PIL_Image.fromarray(array).save(path, **others)
    return path


def pillow(path: Path, array: np.ndarray, **others: object) -> Path:
    PIL_Image.fromarray(array).save(path, **others)
    return path


def palette(path: Path, array: np.ndarray, colours: str, **others: object) -> Path:
    """Index 0 is black; r, g, b, w, k are red, green, blue, white and black."""
    values = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), "w": (255, 255, 255), "k": (0, 0, 0)}
    picture = PIL_Image.fromarray(array).convert("P")
    picture.putpalette([0, 0, 0, *(value for letter in colours for value in values[letter])])
    picture.putdata(array.reshape(-1).tolist())
    picture.save(path, **others)
    return path


def scaled(path: Path, array: np.ndarray, dtype: type) -> Path:
    image = nib.Nifti1Image(array.astype(np.float64), np.eye(4))
    image.set_data_dtype(dtype)
    nib.save(image, path)
    return path


def flat(path: Path) -> None:
    """A NIfTI file with a row of its affine set to 0."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<4f", data, 312, 0, 0, 0, 0)
    path.write_bytes(data)


def turned(path: Path, array: np.ndarray, quaternion: tuple[float, float, float]) -> Path:
    image = nib.Nifti1Image(array, np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(np.eye(4), 1)
    data = bytearray(image.to_bytes())
    struct.pack_into("<fff", data, 256, *quaternion)
    path.write_bytes(bytes(data))
    return path


def with_alpha(colours: np.ndarray, alpha: object) -> np.ndarray:
    return np.concatenate([colours, np.broadcast_to(np.asarray(alpha, np.uint8), T.shape)[..., None]], -1)


def itk(path: Path, array: np.ndarray, names: tuple[str, ...] = (), *, layers: bool = False) -> Path:
    """(x, y, z) labels, or (x, y, z, layers), lying obliquely; as a segmentation of 3D Slicer where there are names."""
    picture = sitk.GetImageFromArray(array.transpose(2, 1, 0, *([3] if layers else [])), layers)
    picture.SetSpacing((1.5, 0.75, 3.0))
    picture.SetOrigin((-20.5, 4, 1 / 3))
    picture.SetDirection((0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, -1))
    for number, name in enumerate(names):
        picture.SetMetaData(f"Segment{number}_LabelValue", str(number + 1))
        picture.SetMetaData(f"Segment{number}_Name", name)
        picture.SetMetaData(f"Segment{number}_Layer", str(number if layers else 0))
    sitk.WriteImage(picture, str(path))
    return path


def renumbered(path: Path) -> object:
    """A layered segmentation whose second segment has the number of the first, as 3D Slicer writes it."""
    picture = sitk.ReadImage(str(path))
    picture.SetMetaData("Segment1_LabelValue", "1")
    return picture


def series(
    folder: Path, array: np.ndarray, *, without: tuple[int, ...] = (), uid: str = "1.2.3.4", start: int = 0
) -> Path:
    """(x, y, z) as slices of DICOM, lying as `itk` lays them."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = sitk.ReadImage(str(itk(folder / "whole.nrrd", array)))
    (folder / "whole.nrrd").unlink()
    writer, turn = sitk.ImageFileWriter(), whole.GetDirection()
    writer.KeepOriginalImageUIDOn()
    for z in set(range(array.shape[2])) - {*without}:
        page = whole[:, :, z]
        place = whole.TransformIndexToPhysicalPoint((0, 0, z))
        page.SetMetaData("0020|000e", uid)
        page.SetMetaData("0020|0037", "\\".join(str(turn[i]) for i in (0, 3, 6, 1, 4, 7)))
        page.SetMetaData("0020|0032", "\\".join(map(str, place)))
        writer.SetFileName(str(folder / f"{start + z}.dcm"))
        writer.Execute(page)
    return folder


def segmentation(path: Path, array: np.ndarray, kind: str = "BINARY", **others: object) -> Path:
    """(x, y, z) labels or (x, y, z, segments) as a DICOM SEG of highdicom, lying as `itk` lays them."""
    slices = [pydicom.Dataset() for _ in range(array.shape[2])]
    for z, each in enumerate(slices):
        each.Modality = "CT"
        each.StudyID = each.StudyDate = each.StudyTime = each.AccessionNumber = each.ReferringPhysicianName = ""
        each.PatientID = each.PatientName = each.PatientBirthDate = each.PatientSex = ""
        each.StudyInstanceUID, each.SeriesInstanceUID, each.FrameOfReferenceUID = "1.2.3", "1.2.4", "1.2.5"
        each.SOPClassUID, each.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", f"1.2.6.{z + 1}"
        each.Rows, each.Columns, each.PixelSpacing, each.SliceThickness = *array.shape[1::-1], [0.75, 1.5], 3
        each.ImagePositionPatient, each.ImageOrientationPatient = (
            [-20.5, 4, 0.333333 - 3 * z],
            [0.8, -0.6, 0, 0.6, 0.8, 0],
        )
    tissue, number = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue"), array.shape[3] if array.ndim > 3 else 2
    told = [highdicom.seg.SegmentDescription(k + 1, f"organ {k + 1}", tissue, tissue, "MANUAL") for k in range(number)]
    frames = np.moveaxis(array, (2, 1), (0, 1))
    made = highdicom.seg.Segmentation(slices, frames, kind, told, "1.2.3.7", 1, "1.2.3.8", 1, *"mm1s", **others)
    with contextlib.closing(made._db_con):  # highdicom leaves it open, and Python 3.13 warns
        made.save_as(path)
    return path


def altered(path: Path, change: Callable[[object], object]) -> None:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)


def lift(slice_: object) -> None:
    """Shift a slice along its columns by a tenth of its number, as of a tilted gantry."""
    way = np.array(slice_.ImageOrientationPatient[3:], float) * slice_.InstanceNumber / 10
    slice_.ImagePositionPatient = (np.array(slice_.ImagePositionPatient, float) + way).tolist()


def lzw(path: Path, array: np.ndarray) -> None:
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(path))
    writer.SetCompressor("LZW")
    writer.UseCompressionOn()
    writer.Execute(sitk.GetImageFromArray(array))


def appended(path: Path, pages: list[np.ndarray]) -> Path:
    for page in pages:
        tifffile.imwrite(path, page, append=True, photometric="minisblack")
    return path


PAIRS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], tuple[str, ...], object]] = {
    # name: prediction, reference, options, {label: Dice} or parts of the refusal
    "bool, tifffile": (
        lambda d: save(d / "p.tif", OTHER), lambda d: save(d / "t.tif", MASK), (), {1: dice(OTHER, MASK)}),
    "bool stack": (
        lambda d: save(d / "p.tif", VOLUME > 1), lambda d: save(d / "t.npy", VOLUME > 0), (),
        {1: dice(VOLUME > 1, VOLUME > 0)}),
    "fax by Pillow": (
        lambda d: pillow(d / "p.tif", OTHER, compression="group3"), lambda d: save(d / "t.tif", MASK), (),
        {1: dice(OTHER, MASK)}),
    "fax that calls 0 white": (
        lambda d: pillow(d / "p.tif", OTHER, compression="group4", tiffinfo={262: 0}),
        lambda d: save(d / "t.npy", MASK), (), {1: dice(OTHER, MASK)}),
    "labels, tifffile": (
        lambda d: save(d / "p.tif", P, photometric="miniswhite"), lambda d: save(d / "t.npy", T), (), both(P, T)),
    "16 bits, ImageJ": (
        lambda d: save(d / "p.tif", P.astype(np.uint16), photometric="miniswhite", imagej=True, software=""),
        lambda d: save(d / "t.npy", T), (), both(P, T)),
    "writer unknown": (
        lambda d: save(d / "p.tif", P, photometric="miniswhite", metadata=None, software=False),
        lambda d: save(d / "t.npy", T), (), ("p.tif: expected labels", "MINISWHITE")),
    "palettes in another order": (
        lambda d: palette(d / "p.png", P, "rg"), lambda d: palette(d / "t.png", T, "gr"), (),
        ("for label 1 as in", "t.png, got #ff0000", "one palette")),
    "another colour of one label": (
        lambda d: palette(d / "p.png", P, "rb"), lambda d: palette(d / "t.png", T, "rw"), (),
        ("expected #ffffff for label 2 as in", "got #0000ff")),
    "one palette": (
        lambda d: palette(d / "p.png", P, "rgw"), lambda d: palette(d / "t.png", T, "rg"), (), both(P, T)),
    "unused colours differ": (
        lambda d: palette(d / "p.png", P, "rgw"), lambda d: palette(d / "t.png", T, "rgb"), (), both(P, T)),
    "palettes that differ in alpha alone": (
        lambda d: palette(d / "p.png", P % 2, "k", transparency=b"\0\xff"),
        lambda d: palette(d / "t.png", 1 - T % 2, "k", transparency=b"\xff\0"), (),
        ("expected #000000ff for label 0 as in", "got #00000000")),
    "a palette with a background that is transparent": (
        lambda d: palette(d / "p.png", P, "rg", transparency=0), lambda d: palette(d / "t.png", T, "rg"), (),
        both(P, T)),
    "palette against grey": (
        lambda d: palette(d / "p.png", P, "wb"), lambda d: save(d / "t.png", T), (), both(P, T)),
    "palettes of TIFF": (
        lambda d: palette(d / "p.tif", P, "bg"), lambda d: palette(d / "t.png", T, "gb"), (), ("for label 1 as in",)),
    "palette of TIFF, the same": (
        lambda d: palette(d / "p.tif", P, "bg", compression="tiff_lzw"), lambda d: palette(d / "t.png", T, "bg"), (),
        both(P, T)),
    "grey and alpha": (
        lambda d: save(d / "p.png", with_alpha(np.zeros((*T.shape, 1), np.uint8), MASK * 200)),
        lambda d: save(d / "t.png", T), (), ("an alpha channel that is not constant", "Save the mask as grey values")),
    "colours and alpha, reference": (
        lambda d: save(d / "p.png", P), lambda d: save(d / "t.png", with_alpha(np.stack([T] * 3, -1), 255 - T)), (),
        ("t.png: expected labels, got an alpha channel",)),
    "alpha of TIFF": (
        lambda d: save(d / "p.tif", with_alpha(np.stack([P] * 3, -1), OTHER * 9), photometric="rgb"),
        lambda d: save(d / "t.npy", T), (), ("an alpha channel that is not constant",)),
    "alpha of a narrow TIFF stack": (
        lambda d: save(d / "p.tif", np.stack([VOLUME[..., :3], VOLUME[..., :3] * 0 + 7], -1), photometric="minisblack",
                       planarconfig="contig", extrasamples=["unassalpha"]),
        lambda d: save(d / "t.npy", VOLUME[..., :3]), (), {1: 1.0, 2: 1.0}),
    "alpha is constant": (
        lambda d: save(d / "p.png", with_alpha(np.stack([P] * 3, -1), 128)), lambda d: save(d / "t.npy", T), (),
        both(P, T)),
    "8 bits": (
        lambda d: save(d / "p.png", np.where(OTHER, 200, 30).astype(np.uint8)), lambda d: save(d / "t.npy", MASK),
        ("--threshold", "0.4"), ("--threshold: expected probabilities in [0, 1], got 30 to 200", "--scale")),
    "16 bits": (
        lambda d: save(d / "p.tif", np.where(OTHER, 60000, 9).astype(np.uint16), photometric="minisblack"),
        lambda d: save(d / "t.npy", MASK), ("--threshold", "0.5"), ("got 9 to 60000",)),
    "percent": (
        lambda d: save(d / "p.npy", OTHER * 98.5), lambda d: save(d / "t.npy", MASK), ("--soft",),
        ("--soft: expected probabilities in [0, 1], got 0.0 to 98.5",)),
    "8 bits, scaled": (
        lambda d: save(d / "p.png", np.where(OTHER, 103, 101).astype(np.uint8)), lambda d: save(d / "t.npy", MASK),
        ("--threshold", "0.4", "--scale", "255"), {1: dice(OTHER, MASK)}),
    "percent, scaled": (
        lambda d: save(d / "p.npy", OTHER * 100), lambda d: save(d / "t.npy", MASK), ("--soft", "--scale", "100"),
        {1: dice(OTHER, MASK)}),
    "beyond the scale": (
        lambda d: save(d / "p.npy", OTHER * 255), lambda d: save(d / "t.npy", MASK), ("--soft", "--scale", "100"),
        ("expected probabilities in [0, 100], got 0 to 255",)),
    "logits": (
        lambda d: save(d / "p.npy", np.where(OTHER, 0.7, -3.0)), lambda d: save(d / "t.npy", MASK),
        ("--threshold", "0.5"), ("got -3.0 to 0.7",)),
    ".mha against NIfTI": (
        lambda d: itk(d / "p.mha", VOLUME), lambda d: itk(d / "t.nii.gz", VOLUME), (), {1: 1.0, 2: 1.0}),
    ".mhd against .nrrd": (
        lambda d: itk(d / "p.mhd", VOLUME).with_suffix(".raw").touch(), lambda d: itk(d / "t.nrrd", VOLUME), (),
        {1: 1.0, 2: 1.0}),
    ".nrrd turned over, resampled": (
        lambda d: sitk.WriteImage(sitk.Flip(sitk.ReadImage(str(itk(d / "x.nrrd", VOLUME))), [True, False, True]),
                                  str(d / "p.mha")),
        lambda d: itk(d / "t.nrrd", VOLUME), ("--resample",), {1: 1.0, 2: 1.0}),
    ".nrrd turned over": (
        lambda d: sitk.WriteImage(sitk.Flip(sitk.ReadImage(str(itk(d / "x.nrrd", VOLUME))), [True, False, True]),
                                  str(d / "p.mha")),
        lambda d: itk(d / "t.nrrd", VOLUME), (), ("got RPS voxels elsewhere than the LPI voxels of t.nrrd",)),
    ".nrrd on another grid": (
        lambda d: save(d / "p.nii.gz", VOLUME), lambda d: itk(d / "t.nrrd", VOLUME), (),
        ("expected a grid that overlaps that of t.nrrd in space",)),
    "segmentation of 3D Slicer": (
        lambda d: itk(d / "p.seg.nrrd", VOLUME, ("liver", "cyst")), lambda d: itk(d / "t.mha", VOLUME), (),
        {1: 1.0, 2: 1.0}),
    "segments that overlap": (
        lambda d: itk(d / "p.seg.nrrd", np.stack([VOLUME > 0, (VOLUME > 1) * 2], -1).astype(np.uint8), ("a", "b"),
                      layers=True),
        lambda d: itk(d / "t.mha", VOLUME), (), ("got segments in 2 layers, for they overlap",)),
    "segments in layers that do not overlap": (
        lambda d: itk(d / "p.seg.nrrd", np.stack([VOLUME == 1, (VOLUME == 2) * 2], -1).astype(np.uint8), ("a", "b"),
                      layers=True),
        lambda d: itk(d / "t.mha", VOLUME), (), {1: 1.0, 2: 1.0}),
    "segments in layers that share a number": (
        lambda d: sitk.WriteImage(renumbered(itk(d / "p.seg.nrrd", np.stack([VOLUME == 1, VOLUME == 2], -1).astype(
            np.uint8), ("a", "b"), layers=True)), str(d / "p.seg.nrrd")),
        lambda d: itk(d / "t.mha", VOLUME), (), {1: 1.0, 2: 1.0}),
    "probabilities": (
        lambda d: itk(d / "p.nrrd", (VOLUME > 1) * np.float32(0.7)), lambda d: itk(d / "t.mha", VOLUME),
        ("--threshold", "0.6", "--labels", "2"), {2: 1.0}),
    "a quaternion slightly too long": (
        lambda d: turned(d / "p.nii", VOLUME, (0.0, 1.0004, 0.0)), lambda d: turned(d / "t.nii", VOLUME, (0, 1, 0)), (),
        {1: 1.0, 2: 1.0}),
    "far too long": (
        lambda d: turned(d / "p.nii", VOLUME, (0.9, 0.9, 0)), lambda d: turned(d / "t.nii", VOLUME, (0, 1, 0)), (),
        ("p.nii: damaged header: a quaternion of length 1.27279",)),
    "one slice against a picture": (
        lambda d: save(d / "p.nii.gz", P[:, None]), lambda d: save(d / "t.png", T), ("--ignore-geometry",), both(P, T)),
    "transposed": (
        lambda d: save(d / "p.nii", P.T[..., None]), lambda d: save(d / "t.png", T), ("--transpose",), both(P, T)),
    "to be transposed": (
        lambda d: save(d / "p.nii", P.T[..., None]), lambda d: save(d / "t.png", T), (),
        ("--transpose swaps its axes",)),
    "axis first": (lambda d: save(d / "p.npy", P[None]), lambda d: save(d / "t.npy", T[..., None]), (), both(P, T)),
    "NIfTI of two axes": (
        lambda d: save(d / "p.nii", P), lambda d: save(d / "t.nii.gz", T[..., None]), (), both(P, T)),
    "NIfTI of two axes, resampled": (
        lambda d: save(d / "p.nii", P[..., None]), lambda d: save(d / "t.nii.gz", T), ("--resample",), both(P, T)),
    "NIfTI of 16 bits, scaled": (
        lambda d: scaled(d / "p.nii", VOLUME * 7.0, np.int16), lambda d: save(d / "t.npy", VOLUME),
        ("--ignore-geometry",), ("at most ", "such as ", "stored with slope 0.000213", "Pass --round")),
    "rounded": (
        lambda d: scaled(d / "p.nii", VOLUME * 7.0, np.int16), lambda d: scaled(d / "t.nii", VOLUME * 7.0, np.int16),
        ("--round",), {7: 1.0, 14: 1.0}),
    "nearly whole, reference": (
        lambda d: save(d / "p.npy", T), lambda d: save(d / "t.npy", T * 0.9943), (),
        ("t.npy: expected labels", "at most 0.011 from a whole number, such as 1.9886", "Pass --round to round them.")),
    "too far to be rounded": (
        lambda d: save(d / "p.npy", T * 0.8), lambda d: save(d / "t.npy", T), ("--round",),
        ("at most 0.4 from a whole number", "--threshold 0.5 or --soft")),
    "pages": (
        lambda d: appended(d / "p.tif", [VOLUME[i] for i in range(5)]), lambda d: save(d / "t.npy", VOLUME), (),
        {1: 1.0, 2: 1.0}),
    "stacks": (
        lambda d: appended(d / "p.tif", [VOLUME[:2], VOLUME[2:4]]), lambda d: save(d / "t.npy", VOLUME[:4]), (),
        {1: 1.0, 2: 1.0}),
    "pages, compressed and not": (
        lambda d: (
            tifffile.imwrite(d / "p.tif", VOLUME[0], photometric="minisblack"),
            tifffile.imwrite(d / "p.tif", VOLUME[1], photometric="minisblack", append=True, compression="zlib")),
        lambda d: save(d / "t.npy", VOLUME[:2]), (), {1: 1.0, 2: 1.0}),
    "pages that differ": (
        lambda d: appended(d / "p.tif", [VOLUME[0], VOLUME[0].astype(np.uint16)]), lambda d: save(d / "t.npy", VOLUME),
        (), ("got 2 that differ: (6, 7) uint8, (6, 7) uint16",)),
    "above 63 bits, as a float": (
        lambda d: save(d / "p.npy", P * 2.0**63), lambda d: save(d / "t.npy", T),
        ("--labels", str(2**63)), ("got values from 0 to 18446744073709551616",)),
    "2 to the 63, as a float": (
        lambda d: save(d / "p.npy", OTHER * 2.0**63), lambda d: save(d / "t.npy", MASK * np.uint64(2**63)), (),
        {2**63: dice(OTHER, MASK)}),
    "LZW, 16 bits": (
        lambda d: pillow(d / "p.tif", P.astype(np.uint16), compression="tiff_lzw"), lambda d: save(d / "t.npy", T), (),
        both(P, T)),
    "LZW, signed": (
        lambda d: lzw(d / "p.tif", P.astype(np.int16) - 1),
        lambda d: save(d / "t.npy", T.astype(np.int8) - 1), (), {-1: dice(P == 0, T == 0), 1: dice(P == 2, T == 2)}),
    "group 4 in pages": (
        lambda d: PIL_Image.fromarray(VOLUME[0] > 0).save(
            d / "p.tif", compression="group4", save_all=True,
            append_images=[PIL_Image.fromarray(page > 0) for page in VOLUME[1:]]),
        lambda d: save(d / "t.npy", VOLUME > 0), (), {1: 1.0}),
    "lossy": (
        lambda d: pillow(d / "p.tif", P, compression="jpeg"), lambda d: save(d / "t.npy", T), (),
        ("a TIFF compressed by JPEG",)),
    "SEG without its empty slices": (
        lambda d: segmentation(d / "p.dcm", INNER), lambda d: itk(d / "t.nrrd", VOLUME), ("--resample",),
        both(INNER, VOLUME)),
    "SEG of labels, as the reference": (
        lambda d: itk(d / "p.mha", VOLUME), lambda d: segmentation(d / "t.dcm", INNER, "LABELMAP"), ("--resample",),
        both(VOLUME, INNER)),
    "SEG as the reference, resampled": (
        lambda d: sitk.WriteImage(sitk.Flip(sitk.ReadImage(str(itk(d / "x.nrrd", VOLUME))), [True, False, True]),
                                  str(d / "p.nrrd")),
        lambda d: segmentation(d / "t.dcm", INNER), ("--resample",), both(VOLUME, INNER)),
    "SEG beside SEG": (
        lambda d: segmentation(d / "p.dcm", VOLUME * (np.arange(7) < 2)),
        lambda d: segmentation(d / "t.dcm", VOLUME * (np.arange(7) > 4)), (), {1: 0.0, 2: 0.0}),
    "SEG of occupancies": (
        lambda d: segmentation(d / "p.dcm", SHARES[..., :1], "FRACTIONAL", fractional_type="OCCUPANCY"),
        lambda d: itk(d / "t.nrrd", VOLUME), ("--threshold", "0.25", "--labels", "2", "--resample"),
        {2: dice(np.rint(SHARES[..., 0] * 255) >= 64, VOLUME == 2)}),
    "SEG of probabilities taken for labels": (
        lambda d: segmentation(d / "p.dcm", SHARES[..., :1], "FRACTIONAL", fractional_type="PROBABILITY"),
        lambda d: itk(d / "t.nrrd", VOLUME), (), ("p.dcm: expected labels, got values that are not whole",)),
    "SEG of several probabilities": (
        lambda d: segmentation(d / "p.dcm", SHARES, "FRACTIONAL", fractional_type="PROBABILITY"),
        lambda d: itk(d / "t.nrrd", VOLUME), ("--soft", "--resample"),
        ("expected one label per voxel, got 2 channels",)),
    "SEG that overlaps itself": (
        lambda d: segmentation(d / "p.dcm", np.stack([VOLUME > 0, VOLUME > 1], -1)),
        lambda d: itk(d / "t.nrrd", VOLUME), (), ("segments overlap. Export one file per segment",)),
    "SEG in another place": (
        lambda d: segmentation(d / "p.dcm", VOLUME), lambda d: save(d / "t.nii", VOLUME), (),
        ("expected a grid that overlaps that of t.nii in space",)),
    "SEG of a segment that is not described": (
        lambda d: altered(segmentation(d / "p.dcm", VOLUME), lambda seg: seg.SegmentSequence.pop()),
        lambda d: itk(d / "t.nrrd", VOLUME), (), ("p.dcm: ",)),
    "SEG with a frame of no place": (
        lambda d: altered(segmentation(d / "p.dcm", VOLUME),
                          lambda seg: seg.PerFrameFunctionalGroupsSequence[3].pop("PlanePositionSequence")),
        lambda d: itk(d / "t.nrrd", VOLUME), (), ("p.dcm: ",)),
    "SEG with a frame beside the others": (
        lambda d: altered(segmentation(d / "p.dcm", VOLUME), lambda seg: setattr(
            seg.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence[0], "ImagePositionPatient", [0, 1, 2])),
        lambda d: itk(d / "t.nrrd", VOLUME), (), ("p.dcm: ",)),
    "SEG, cut off": (
        lambda d: segmentation(d / "p.dcm", VOLUME).write_bytes((d / "p.dcm").read_bytes()[:-20]),
        lambda d: itk(d / "t.nrrd", VOLUME), (), ("p.dcm: ",)),
    "gzip": (
        lambda d: (d / "p.nii").write_bytes(gzip.compress(nib.Nifti1Image(VOLUME, np.eye(4)).to_bytes())),
        lambda d: save(d / "t.nii", VOLUME), (), ("p.nii: compressed by gzip: name it .nii.gz",)),
    "gzip twice": (
        lambda d: (d / "p.nii.gz").write_bytes(
            gzip.compress(gzip.compress(nib.Nifti1Image(VOLUME, np.eye(4)).to_bytes()))),
        lambda d: save(d / "t.nii", VOLUME), (), ("p.nii.gz: compressed by gzip twice",)),
    "no gzip": (
        lambda d: (d / "p.nii.gz").write_bytes(nib.Nifti1Image(VOLUME, np.eye(4)).to_bytes()),
        lambda d: save(d / "t.nii", VOLUME), (), ("p.nii.gz: not compressed by gzip: name it .nii",)),
    "more than the gzip": (
        lambda d: (d / "p.nii.gz").write_bytes(
            gzip.compress(nib.Nifti1Image(VOLUME, np.eye(4)).to_bytes()) + b"from another"),
        lambda d: save(d / "t.nii", VOLUME), (), ("p.nii.gz: damaged: something follows the compressed data",)),
    "an affine that puts all slices into one place": (
        lambda d: flat(save(d / "p.nii", VOLUME)), lambda d: save(d / "t.nii", VOLUME), ("--resample",),
        ("p.nii: expected an affine that can be inverted, got a singular one. --ignore-geometry compares",)),
    "such an affine in the reference": (
        lambda d: save(d / "p.nii", VOLUME), lambda d: flat(save(d / "t.nii", VOLUME)), (),
        ("t.nii: expected an affine that can be inverted",)),
    "a picture": (
        lambda d: save(d / "x.png", P).rename(d / "p.tif"), lambda d: save(d / "t.npy", T), (),
        ("Its content is that of a .png file",)),
    "empty": (
        lambda d: (d / "p.npy").write_bytes(b""), lambda d: save(d / "t.npy", T), (), ("The file is empty",)),
    "a pointer": (
        lambda d: (d / "p.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        lambda d: save(d / "t.npy", T), (), ("not a PNG file. Its content is a pointer of Git LFS",)),
    "a web page": (
        lambda d: (d / "p.nii.gz").write_text("<!DOCTYPE html>"), lambda d: save(d / "t.npy", T), (),
        ("not compressed by gzip. Its content is HTML",)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair(name: str, tmp_path: Path) -> None:
    prediction, truth, options, expected = PAIRS[name]
    prediction(tmp_path)
    truth(tmp_path)
    p, t = (next(path for path in tmp_path.glob(f"{side}.*") if path.suffix != ".raw") for side in "pt")
    result = score(p, t, *options, "--format", "json")
    if isinstance(expected, dict):
        assert result.exit_code == 0, result.output
        (case,) = json.loads(result.stdout)["results"][0]["cases"]
        assert {row["label"]: row["dice"] for row in case["classes"]} == pytest.approx(expected, abs=1e-14)
    else:
        assert result.exit_code == 1, result.output
        for part in expected:  # type: ignore[attr-defined]
            assert part in result.stderr


@pytest.mark.parametrize("value", ["nan", "5", "inf", "-0.1", "1"])
def test_a_threshold_is_a_probability(value: str, tmp_path: Path) -> None:
    files = save(tmp_path / "p.npy", MASK * 0.5), save(tmp_path / "t.npy", MASK)
    result = score(*files, f"--threshold={value}")
    assert result.exit_code == 2
    assert "--threshold: expected a number from 0 to below 1, got" in result.stderr


@pytest.mark.parametrize(
    "options, said",
    [
        (("--soft", "--scale", "0"), "--scale: expected a number above 0, got 0.0"),
        (("--soft", "--scale", "nan"), "--scale: expected a number above 0, got nan"),
        (("--scale", "255"), "--scale: expected --threshold or --soft with it, got neither"),
    ],
)
def test_a_scale_that_is_none(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    files = save(tmp_path / "p.npy", MASK * 0.5), save(tmp_path / "t.npy", MASK)
    assert said in score(*files, *options).stderr


@pytest.mark.parametrize(
    "predictions, references",
    [
        (("a.nii.gz", "a.nii"), ("a.png",)),
        (("a.tif", "a.tiff"), ("a.tif",)),
        (("a.npy",), ("a.npy", "a.NPY")),
        (("a.nii", "a.nii.gz", "a.npz"), ("a.nii.gz",)),
    ],
)
def test_two_files_of_one_name_and_kind(
    predictions: tuple[str, ...], references: tuple[str, ...], tmp_path: Path
) -> None:
    for side, names in (("p", predictions), ("t", references)):
        for name in names:
            (tmp_path / side).mkdir(exist_ok=True)
            (tmp_path / side / name).touch()
    result = score(tmp_path / "p", tmp_path / "t")
    assert result.exit_code == 1
    assert "expected one file of this name, got a." in result.stderr


def test_a_label_has_one_colour_in_all_cases(tmp_path: Path) -> None:
    """In each pair the palettes agree, in the folder they do not."""
    for case, colours in (("a", "r"), ("b", "gb"), ("c", "rg")):
        for side in "pt":
            (tmp_path / side).mkdir(exist_ok=True)
            palette(tmp_path / side / f"{case}.png", T if case != "a" else T % 2, colours)
    for options in ((), ("--jobs", 2)):
        result = score(tmp_path / "p", tmp_path / "t", "--format", "json", *options)
        assert result.exit_code == 1
        assert [case["case"] for case in json.loads(result.stdout)["results"][0]["cases"]] == ["a", "c"]
        assert "b.png: expected #ff0000 for label 1 as in" in result.stderr


def test_a_quaternion_means_a_turn(tmp_path: Path) -> None:
    """W = 0, the axis as it is written, as SimpleITK reads it."""
    sitk = pytest.importorskip("SimpleITK")
    path = turned(tmp_path / "a.nii", VOLUME, (0.6, 0.8, 2e-3))
    affine = read_image(path).affine
    assert affine is not None
    expected = np.array(sitk.ReadImage(str(path)).GetDirection()).reshape(3, 3) * [[-1], [-1], [1]]
    assert affine[:3, :3] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("photometric, expected", [(1, [0, 1, 2, 15, 9, 4]), (0, [15, 14, 13, 0, 6, 11])])
def test_tiff_of_four_bits(photometric: int, expected: list[int], tmp_path: Path) -> None:
    """Numbers as they are stored, which Pillow stretches; where 0 is white, counted from the other end."""
    tags = {256: 6, 257: 1, 258: 4, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<I", 12) + b"\x01\x2f\x94\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(data)
    assert read_image(tmp_path / "a.tif").array.tolist() == [expected]


def palette_pages(path: Path, *pages: tuple[int, int]) -> Path:
    """Pages of 2 x 4 pixels with index 1: bits of an index, and the number of which its palette is made."""
    data = b"II*\0" + struct.pack("<I", 8)
    for number, (bits, value) in enumerate(pages):
        colours, pixels = struct.pack("<H", value) * 3 * 2**bits, bytes([255 // (2**bits - 1)]) * bits
        start = len(data) + 2 + 12 * 10 + 4  # behind the tags
        tags = {256: 4, 257: 2, 258: bits, 259: 1, 262: 3, 273: start + len(colours), 277: 1, 278: 2, 279: len(pixels)}
        entries = [struct.pack("<HHII", tag, 4, 1, content) for tag, content in tags.items()]
        entries.append(struct.pack("<HHII", 320, 3, 3 * 2**bits, start))
        end = start + len(colours) + len(pixels)
        data += struct.pack("<H", len(entries)) + b"".join(entries)
        data += struct.pack("<I", end if number + 1 < len(pages) else 0) + colours + pixels
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("pages", [((8, 5), (4, 5)), ((4, 5), (8, 5)), ((2, 9), (4, 9), (8, 9)), ((8, 5), (8, 6))])
def test_palettes_of_pages_that_differ(pages: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    """Palettes of 4, 16 and 256 colours differ, whatever the colours are."""
    image = read_image(palette_pages(tmp_path / "a.tif", *pages))
    assert image.array.tolist() == [[[1] * 4] * 2] * len(pages)
    assert image.no_labels == "pages of different palettes. Save all with one, or as grey values."
    same = read_image(palette_pages(tmp_path / "b.tif", pages[0], pages[0]))
    assert (same.no_labels, same.array.shape) == ("", (2, 2, 4))


def test_a_damaged_lzw_is_a_file_error(tmp_path: Path) -> None:
    data = bytearray(pillow(tmp_path / "a.tif", np.tile(P, (9, 9)), compression="tiff_lzw").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(FileError, match="damaged"):
        read_image(tmp_path / "a.tif")


# --- what `softdice train` reads


def data(folder: Path, labels: list[np.ndarray], suffix: str, save_label: Callable[..., object] = save) -> Path:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number, label in enumerate(labels):
        save(
            folder / "images" / f"{number}{'.png' if label.ndim == 2 else '.nii'}",
            label.astype(np.float32) if label.ndim == 3 else label,
        )
        save_label(folder / "labels" / f"{number}{suffix}", label)
    return folder


def placed(affine: np.ndarray) -> Callable[..., object]:
    return lambda path, array: nib.Nifti1Image(array, affine).to_filename(path)


SHIFTED = np.diag([2.0, 2, 3, 1])
SHIFTED[0, 3] = 4

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a photograph as labels": (lambda d: data(d, [T, P], ".jpeg"), "0.jpeg: expected labels, got a JPEG"),
    "mirrored": (
        lambda d: data(d, [VOLUME] * 2, ".nii", placed(np.diag([2.0, -2, 3, 1]))),
        "0.nii: expected the same orientation and affine, got RPS voxels elsewhere than the RAS voxels of 0.nii"),
    "shifted": (
        lambda d: data(d, [VOLUME] * 2, ".nii", placed(SHIFTED)), "RAS voxels elsewhere than the RAS voxels"),
    "only one says": (lambda d: data(d, [VOLUME] * 2, ".npy"), "only 0.nii says how its voxels lie in space"),
    "palettes in another order": (
        lambda d: data(d, [T, P], ".png", lambda *a: palette(*a, "rg" if a[0].name == "0.png" else "gr")),
        "1.png: expected #ff0000 for label 1 as in"),
    "colours and alpha": (
        lambda d: data(d, [T, P], ".png", lambda path, array: save(path, with_alpha(array[..., None], array))),
        "0.png: expected labels, got an alpha channel that is not constant"),
    "nearly whole values": (
        lambda d: data(d, [VOLUME] * 2, ".nii", lambda *a: placed(np.diag([2.0, 2, 3, 1]))(a[0], a[1] * 1.004)),
        "0.nii: expected labels, got values that are not whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_training_refuses_what_the_scorer_refuses(name: str, tmp_path: Path) -> None:
    from softdice.training.cases import read_folder

    make, said = REFUSED[name]
    make(tmp_path)
    with pytest.raises(FileError) as error:
        read_folder(tmp_path)
    assert said in str(error.value)


def test_training_on_request_and_on_wide_numbers(tmp_path: Path) -> None:
    """As in the scorer; more on request."""
    from softdice.training.cases import read_folder

    mirrored = data(
        tmp_path / "m", [VOLUME] * 2, ".nii", lambda *a: placed(np.diag([-2.0, 2, 3, 1]))(a[0], a[1] * 1.004)
    )
    assert (read_folder(mirrored, round=True, ignore_geometry=True)[1].label == VOLUME).all()
    wide = data(tmp_path / "w", [T, P], ".npy", lambda path, array: save(path, array[None] * np.uint64(2**63 - 5)))
    cases = read_folder(wide)
    assert cases.values == [0, 2**63 - 5, 2 * (2**63 - 5)]
    assert (cases[1].label == P).all()


# --- formats through SimpleITK


@pytest.mark.parametrize("suffix", [".nrrd", ".seg.nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_the_same_volume_as_in_nifti(suffix: str, dtype: type, tmp_path: Path) -> None:
    expected = read_image(itk(tmp_path / "a.nii", VOLUME.astype(dtype)))
    image = read_image(itk(tmp_path / f"a{suffix}", VOLUME.astype(dtype), ("liver", "cyst [b]")))
    assert image.array.dtype == dtype
    assert np.array_equal(image.array, expected.array)
    assert image.affine == pytest.approx(expected.affine, abs=1e-5)
    assert image.spacing_mm == pytest.approx(expected.spacing_mm)
    assert image.names == {1: "liver", 2: "cyst [b]"}
    mask = write_image(tmp_path / "mask", VOLUME > 0, image)
    assert mask.suffix == {".mhd": ".mha", ".seg.nrrd": ".nrrd"}.get(suffix, suffix)
    again = read_image(mask)
    assert np.array_equal(again.array, VOLUME > 0)
    assert np.array_equal(again.affine, image.affine)


def test_nrrd_of_two_axes_of_channels_and_without_a_place(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(T.T), str(tmp_path / "a.mha"))
    assert np.array_equal(read_image(tmp_path / "a.mha").array, T)
    itk(tmp_path / "c.nrrd", np.stack([VOLUME, VOLUME + 1], -1), layers=True)
    assert np.array_equal(read_image(tmp_path / "c.nrrd").array[..., 1], VOLUME + 1)
    head = b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 5 6 7\nencoding: raw\n\n"
    (tmp_path / "b.nrrd").write_bytes(head + VOLUME.tobytes("F"))
    image = read_image(tmp_path / "b.nrrd")
    assert np.array_equal(image.array, VOLUME)
    assert image.affine is None


def test_a_damaged_header_is_told_and_not_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = itk(tmp_path / "a.mha", VOLUME)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FileError, match=r"a\.mha: truncated or damaged: .*data not read completely"):
        read_image(path)
    path.write_bytes(b"x")
    with pytest.raises(FileError, match="truncated or damaged"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


def test_training_and_prediction_on_nrrd(tmp_path: Path) -> None:
    from softdice.training.cases import read_folder

    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
        for name in "ab":
            itk(tmp_path / part / f"{name}.{'nrrd' if part == 'images' else 'seg.nrrd'}", VOLUME)
    cases = read_folder(tmp_path)
    assert cases.shapes == [VOLUME.shape] * 2
    assert (cases[1].label == VOLUME[::-1, ::-1, ::-1]).all()  # LPI, which training brings to RAS


def test_int8_keeps_its_sign(tmp_path: Path) -> None:
    for image in (save(tmp_path / "a.nii", VOLUME), itk(tmp_path / "a.nrrd", VOLUME)):
        mask = write_image(tmp_path / "mask", VOLUME.astype(np.int8) - 1, read_image(image))
        assert read_image(mask).array.min() == -1


def test_a_missing_package_fails_its_own_case_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in "pt":
        (tmp_path / side).mkdir()
        itk(tmp_path / side / "a.mha", VOLUME)
        save(tmp_path / side / "b.npy", VOLUME)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    result = score(tmp_path / "p", tmp_path / "t")
    assert result.exit_code == 1
    assert "Not scored: 1 of 2" in result.stderr
    assert "pip install 'softdice[itk]'" in result.stderr


def test_a_series_of_dicom_is_one_image(tmp_path: Path) -> None:
    from softdice.training.cases import read_folder

    for name in "ab":
        series(tmp_path / "images" / name, VOLUME.astype(np.int16) - 1000, start=7)  # 7.dcm to 13.dcm, no alphabet
        series(tmp_path / "p" / name, VOLUME)
        (tmp_path / "labels").mkdir(exist_ok=True)
        itk(tmp_path / "labels" / f"{name}.seg.nrrd", VOLUME)
    image = read_image(tmp_path / "images" / "a")
    assert np.array_equal(image.array[..., ::-1], VOLUME.astype(np.int16) - 1000)  # upwards; `itk` has it downwards
    assert image.suffix == ".dcm"
    assert list(list_images(tmp_path / "images")) == ["a", "b"]
    mask = write_image(tmp_path / "mask", (image.array == -999).astype(np.uint8), image)
    result = score(tmp_path / "p", tmp_path / "labels", "--resample", "--format", "json")
    assert [case["classes"][0]["dice"] for case in json.loads(result.stdout)["results"][0]["cases"]] == [1.0, 1.0]
    (case,) = json.loads(
        score(mask, tmp_path / "labels" / "a.seg.nrrd", "--resample", "--labels", "1", "--format", "json").stdout
    )["results"][0]["cases"]
    assert case["classes"][0]["dice"] == 1.0
    cases = read_folder(tmp_path, ignore_geometry=True)
    assert cases.names == ["a", "b"]
    assert cases.shapes == [VOLUME.shape] * 2


def test_files_without_a_picture_inside_a_series_are_told(tmp_path: Path) -> None:
    for side in "pt":
        for name in "ab":
            series(tmp_path / side / name, VOLUME, start=3)
    first = tmp_path / "p" / "a"
    (first / "README.txt").write_text("x")
    (first / ".hidden").write_text("x")
    for name, kind in (
        ("report", pydicom.uid.BasicTextSRStorage),
        ("view.dcm", pydicom.uid.GrayscaleSoftcopyPresentationStateStorage),
    ):
        other = pydicom.dcmread(first / "3.dcm")
        for tag in ("PixelData", "Rows", "Columns"):
            delattr(other, tag)
        other.SOPClassUID = other.file_meta.MediaStorageSOPClassUID = kind
        other.save_as(first / name)
    result = score(tmp_path / "p", tmp_path / "t", "--format", "json")
    assert result.exit_code == 0
    assert result.stderr == f"Left out of {tmp_path / 'p'}: a/README.txt, a/report, a/view.dcm\n"
    assert {row["dice"] for case in json.loads(result.stdout)["results"][0]["cases"] for row in case["classes"]} == {
        1.0
    }


def test_a_damaged_file_inside_a_series_is_an_error_of_its_case_alone(tmp_path: Path) -> None:
    for side in "pt":
        for name in "ab":
            series(tmp_path / side / name, VOLUME, start=3)
    for number, rest in enumerate((b"", b"\2\0\0", b"\2\0\0\0UL\4\0\xff\xff", b"\xff" * 40)):
        (tmp_path / "p" / "a" / f"cut_{number}").write_bytes(bytes(128) + b"DICM" + rest)
    result = score(tmp_path / "p", tmp_path / "t", "--format", "json")
    assert result.exit_code == 1
    assert "Not scored: 1 of 2" in result.stderr
    assert "Traceback" not in result.stderr
    scored = {case["case"]: case["classes"] for case in json.loads(result.stdout)["results"][0]["cases"]}
    assert {row["dice"] for row in scored["b"]} == {1.0}


def test_segmentations_of_dicom_on_the_grid_of_their_series(tmp_path: Path) -> None:
    """A series runs along the normal of its slices, and so does a SEG: no resampling."""
    from softdice.training.cases import read_folder

    upwards = VOLUME[..., ::-1]
    for name in "ab":
        series(tmp_path / "images" / name, VOLUME)
        (tmp_path / "labels" / name).mkdir(parents=True)
        segmentation(tmp_path / "labels" / name / "any.dcm", INNER)  # a folder with one SEG is one image
    one = score(tmp_path / "labels" / "a" / "any.dcm", tmp_path / "images" / "a", "--format", "json")  # file and folder
    both_folders = score(tmp_path / "labels", tmp_path / "images", "--format", "json")
    (case,) = json.loads(one.stdout)["results"][0]["cases"]
    assert json.loads(both_folders.stdout)["results"][0]["cases"][1]["classes"] == case["classes"]
    assert {row["label"]: row["dice"] for row in case["classes"]} == both(INNER, VOLUME)
    assert [row["name"] for row in case["classes"]] == ["organ 1", "organ 2"]
    cases = read_folder(tmp_path)
    assert cases.shapes == [VOLUME.shape] * 2
    assert (cases[1].label == INNER[::-1, ::-1, ::-1]).all()  # LPI, which training brings to RAS
    assert (cases[1].image.argmax() == upwards[::-1, ::-1].argmax()).all()
    mask = write_image(tmp_path / "mask", INNER[..., 5:0:-1], read_image(tmp_path / "labels" / "a"))
    assert mask.suffix == ".nrrd"
    assert read_image(mask).affine == pytest.approx(read_image(tmp_path / "labels" / "a").affine)
    segmentation(tmp_path / "images" / "a" / "seg.dcm", INNER)
    with pytest.raises(FileError, match=r"a DICOM segmentation in a folder of its own, got seg\.dcm among 8 files"):
        read_image(tmp_path / "images" / "a")


def test_a_damaged_segmentation_is_a_file_error(tmp_path: Path) -> None:
    data = segmentation(tmp_path / "a.dcm", VOLUME).read_bytes()
    good = read_image(tmp_path / "a.dcm").array
    for length in (0, 200, 900, *range(1000, len(data) - 1, 641), len(data) - 4):
        (tmp_path / "a.dcm").write_bytes(data[:length])
        with pytest.raises(FileError):
            read_image(tmp_path / "a.dcm")
    rng = np.random.default_rng(1)
    for place in rng.integers(132, len(data), 60):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.dcm").write_bytes(damaged)
        with contextlib.suppress(FileError):
            assert read_image(tmp_path / "a.dcm").array.dtype == good.dtype


def test_series_of_dicom_that_are_refused(tmp_path: Path) -> None:
    series(tmp_path / "gap", VOLUME, without=(3,))
    with pytest.raises(FileError, match=r"expected slices at equal distances, got distances of 3 to 6 mm. Is one miss"):
        read_image(tmp_path / "gap")
    series(tmp_path / "two", VOLUME)
    with pytest.raises(FileError, match=r"1\.dcm: one slice of a DICOM series"):
        read_image(tmp_path / "two" / "1.dcm")
    series(tmp_path / "two", VOLUME, uid="1.2.3.5", start=50)
    with pytest.raises(FileError, match="expected one DICOM series in the folder, got 2"):
        read_image(tmp_path / "two")
    for name, change, said in (
        ("tilted", lift, "expected slices straight above each other, got slices shifted against each other"),
        (
            "wide",
            lambda each: setattr(each, "PixelSpacing", [1, 1 + each.InstanceNumber]),
            "expected slices of one size",
        ),
        ("flat", lambda each: setattr(each, "ImagePositionPatient", [0, 0, each.InstanceNumber // 2]), "Put each time"),
    ):
        for path in series(tmp_path / name, VOLUME).iterdir():
            altered(path, lambda each, z=int(path.stem): setattr(each, "InstanceNumber", z))
            altered(path, change)
        with pytest.raises(FileError, match=said):
            read_image(tmp_path / name)
    for path in series(tmp_path / "white", VOLUME).iterdir():
        altered(path, lambda each: setattr(each, "PhotometricInterpretation", "MONOCHROME1"))
    assert read_image(tmp_path / "white").no_labels.startswith("DICOM that calls its smallest number white")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.dcm").write_bytes(b"x" * 200)
    for path in (tmp_path / "bad", tmp_path / "bad" / "a.dcm"):
        with pytest.raises(FileError, match="bad"):
            read_image(path)


def dicom_series(folder: Path, array: np.ndarray, **tags: Callable[[object, int], object]) -> Path:
    """A series with tags of its own: {keyword: (slice, its number) -> value}, None for an empty one."""
    for path in series(folder, array).iterdir():
        for name, value in tags.items():
            number = int(path.stem)
            altered(path, lambda each, name=name, value=value, z=number: setattr(each, name, value(each, z)))
    return folder


def beside(each: object, columns_mm: float, rows_mm: float, normal_mm: float = 0) -> list[float]:
    """The place of a slice, moved within its plane, and along its normal."""
    row, column = np.reshape(each.ImageOrientationPatient, (2, 3)).astype(float)
    way = columns_mm * row + rows_mm * column + normal_mm * np.cross(row, column)
    return (np.array(each.ImagePositionPatient, float) + way).tolist()


@pytest.mark.parametrize(
    "place, said",
    [
        (lambda each, z: [1, 2, 3], "got distances of 0 to 0 mm. Put each time, or each copy of a slice, into"),
        (lambda each, z: beside(each, 5 * z, 0, 3 * z), "got distances of 0 to 0 mm. Put each time"),
        (lambda each, z: beside(each, 0, 25 * (z == 2)), "got slices shifted against each other"),
        (lambda each, z: beside(each, -30 * (2 < z < 5), 9), "got slices shifted against each other"),
    ],
)
def test_slices_that_lie_at_one_height_or_beside_the_others(place: Callable, said: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=said):
        read_image(dicom_series(tmp_path / "a", VOLUME, ImagePositionPatient=place))


@pytest.mark.parametrize("step", [0.4, 0.7, 1.0])
def test_places_of_slices_are_rounded(step: float, tmp_path: Path) -> None:
    """A decimal of a millimetre is large beside two slices that lie close to each other."""
    places = [np.round(np.array([-20.5, 4, 0.3]) + z * step * np.array([0.48, 0.64, 0.6]), 1).tolist() for z in (0, 1)]
    tags = {
        "ImageOrientationPatient": lambda each, z: [0.8, -0.6, 0, 0.36, 0.48, -0.8],
        "ImagePositionPatient": lambda each, z: places[z],
    }
    image = read_image(dicom_series(tmp_path / "a", VOLUME[..., :2], **tags))
    assert np.array_equal(image.array, VOLUME[..., :2])


@pytest.mark.parametrize(
    "sizes, size",
    [
        (lambda each, z: [0.73149999, 1.2] if z % 2 else [0.7315001, 1.2], (1.2, 0.7315)),  # a step of three decimals
        (lambda each, z: 0.9, (0.9, 0.9)),
        (lambda each, z: [0.6, 0.9] if z == 1 else None, (0.9, 0.6)),
        (lambda each, z: None if z == 0 else [0.6, 0.9], (0.9, 0.6)),
        (lambda each, z: None if z == 6 else [0.6, 0.9], (0.9, 0.6)),
    ],
)
def test_sizes_of_a_pixel_in_a_series(sizes: Callable, size: tuple[float, float], tmp_path: Path) -> None:
    """Rounded, as one number, or in some slices alone; they are (row, column) in the file, (x, y) in the image."""
    image = read_image(dicom_series(tmp_path / "a", VOLUME, PixelSpacing=sizes))
    assert np.linalg.norm(image.affine[:3, :3], axis=0) == pytest.approx((*size, 3), abs=1e-5)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("DX", "expected DICOM that says where it"),
        ("MR", "expected a slice of DICOM, got several frames in a file"),
    ],
)
def test_objects_of_dicom_that_are_no_slices(kind: str, said: str, tmp_path: Path) -> None:
    page = sitk.GetImageFromArray(VOLUME if kind == "MR" else P)
    page.SetMetaData("0008|0060", kind)
    sitk.WriteImage(page, str(tmp_path / "a.dcm"))
    with pytest.raises(FileError, match=said):
        read_image(tmp_path / "a.dcm")


def pages(path: Path, *arrays_and_kinds: tuple[np.ndarray, int]) -> Path:
    """A TIFF compressed by LZW, a page for each array; the number is its NewSubfileType: 1 a copy, 4 a mask."""
    pictures = []
    for array, kind in arrays_and_kinds:
        pictures.append(PIL_Image.fromarray(array))
        pictures[-1].encoderinfo = {"tiffinfo": {254: kind}}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], compression="tiff_lzw")
    return path


@pytest.mark.parametrize("mask", [None, np.ones_like(MASK), MASK])
def test_smaller_copies_and_masks_of_a_tiff_are_no_pages(mask: np.ndarray | None, tmp_path: Path) -> None:
    """As GDAL writes a Cloud Optimized GeoTIFF; a mask that hides pixels may be what is meant."""
    masks = [] if mask is None else [(mask, 4)]
    image = read_image(pages(tmp_path / "a.tif", (T, 0), *masks, (T[::2, ::2], 1), (T[::4, ::4], 1)))
    assert np.array_equal(image.array, T)
    assert bool(image.no_labels) == (mask is MASK)


@pytest.mark.parametrize("kinds", [(0, 1, 1), (1, 0, 0), (0, 0, 1, 1)])
def test_pages_of_full_size_are_no_copies(kinds: tuple[int, ...], tmp_path: Path) -> None:
    """Whatever they are called; a smaller one, and a mask, are still left out."""
    stack = np.stack([T + z for z in range(len(kinds))])
    beside = [(np.ones_like(MASK), 4), (T[:5], 1)]
    arrays_and_kinds = [*zip(stack, kinds, strict=True), *beside]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for array, kind in arrays_and_kinds:
            file.write(array, contiguous=False, subfiletype=kind, photometric="minisblack")
    assert np.array_equal(read_image(tmp_path / "a.tif").array, stack)
    assert np.array_equal(read_image(pages(tmp_path / "b.tif", *arrays_and_kinds)).array, stack)


@pytest.mark.parametrize("channels, dtype", [(1, np.uint8), (3, np.uint8), (1, np.uint16)])
def test_an_opaque_band_is_left_out_of_labels(channels: int, dtype: type, tmp_path: Path) -> None:
    """Alpha of 255 in a file that does not call it so: what tifffile writes by default for two bands."""
    options = {"photometric": "rgb" if channels == 3 else "minisblack", "planarconfig": "contig"}
    options["extrasamples"] = ["unspecified"]
    for side, mask in (("p", P), ("t", T)):
        bands = [mask.astype(dtype)] * channels
        save(tmp_path / f"{side}.tif", np.stack([*bands, np.full_like(bands[0], np.iinfo(dtype).max)], -1), **options)
    result = score(tmp_path / "p.tif", tmp_path / "t.tif", "--format", "json")
    (case,) = json.loads(result.stdout)["results"][0]["cases"]
    assert {row["label"]: row["dice"] for row in case["classes"]} == pytest.approx(both(P, T))
    save(tmp_path / "p.tif", np.stack([*bands, bands[0] * 0 + 9], -1), **options)
    result = score(tmp_path / "p.tif", tmp_path / "p.tif")
    assert f"expected one label per voxel, got {channels + 1} channels. Save the channel" in result.stderr


@pytest.mark.parametrize("bands, photometric", [(2, "minisblack"), (4, "minisblack"), (4, "rgb")])
def test_a_band_that_is_no_alpha_stays(bands: int, photometric: str, tmp_path: Path) -> None:
    """Near infrared is a band like the others; only what the file calls transparency is left out."""
    array = np.stack([T + 10 * band for band in range(bands)], -1).astype(np.uint8)
    for extra, channels in (("unspecified", bands), ("unassalpha", bands - 1), ("assocalpha", bands - 1)):
        others = (bands - 1 if photometric == "minisblack" else 1) - 1
        options = {
            "photometric": photometric,
            "planarconfig": "contig",
            "extrasamples": ["unspecified"] * others + [extra],
        }
        image = read_image(save(tmp_path / f"{extra}.tif", array, **options))
        assert np.array_equal(image.array.reshape(*T.shape, -1), array[..., :channels])


def test_blocks_that_gdal_leaves_out_are_told(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", T, photometric="minisblack", tile=(16, 16))
    with tifffile.TiffFile(path, mode="r+") as file:
        for name in ("TileOffsets", "TileByteCounts"):
            file.pages[0].tags[name].overwrite([0])
    with pytest.raises(FileError, match=r"truncated or sparse: .* rewrite it: gdal_translate -co SPARSE_OK=FALSE"):
        read_image(path)


@pytest.mark.parametrize(
    "text, number",
    [("255", 255), ("-1.0", -1), ("0.5", 0.5), ("-0.0", 0), ("18446744073709551615", 2**64 - 1),
     ("-" + "7" * 400, -np.inf), ("none", None)],
)  # fmt: skip
def test_nodata_of_gdal_is_read_with_all_digits(text: str, number: float | None, tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", T.astype(np.uint64), extratags=[(42113, "s", 0, text, True)])
    found = read_image(path).nodata
    assert (found, type(found)) == (number, type(number))


@pytest.mark.parametrize("text, name", [("1", "nodata"), ("1.0", "nodata"), ("0", ""), ("nan", ""), ("0.5", "")])
def test_nodata_of_the_reference_is_a_name(text: str, name: str, tmp_path: Path) -> None:
    for side, array in (("p", P), ("t", T)):
        save(tmp_path / f"{side}.tif", array, extratags=[(42113, "s", 0, text, True)])
    result = score(tmp_path / "p.tif", tmp_path / "t.tif", "--include-background", "--format", "json")
    (case,) = json.loads(result.stdout)["results"][0]["cases"]
    assert {row["label"]: row["name"] for row in case["classes"]} == {0: "", 1: name, 2: ""}


def test_nodata_of_a_prediction_names_no_class(tmp_path: Path) -> None:
    """The reference says what is missing: the nodata value of a prediction may be one of its classes."""
    for side, array, value in (("p", P, "2"), ("t", T, "1")):
        save(tmp_path / f"{side}.tif", array, extratags=[(42113, "s", 0, value, True)])
    result = score(tmp_path / "p.tif", tmp_path / "t.tif", "--format", "json")
    (case,) = json.loads(result.stdout)["results"][0]["cases"]
    assert [(row["label"], row["name"]) for row in case["classes"]] == [(1, "nodata"), (2, "")]


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_fourth_axis_of_one_frame(suffix: str, tmp_path: Path) -> None:
    three = sitk.ReadImage(str(itk(tmp_path / f"t{suffix}", VOLUME)))
    sitk.WriteImage(sitk.JoinSeries([three]), str(tmp_path / f"p{suffix}"))
    result = score(tmp_path / f"p{suffix}", tmp_path / f"t{suffix}", "--format", "json")
    assert json.loads(result.stdout)["results"][0]["overall"]["macro_dice"] == 1


LARGE = 720575940621039145
"""Number of a neuron, above 2^53: its neighbours are equal to it as float64."""


@pytest.mark.parametrize(
    "kinds, start",
    [
        *[(kinds, LARGE) for kinds in (("u8", "u8"), ("i8", "u8"), ("u8", "i8"), ("i8", "i8"))],
        (("u8", "u8"), 2**63 + 5),
    ],
)
def test_labels_of_64_bits_are_not_rounded(kinds: tuple[str, str], start: int, tmp_path: Path) -> None:
    """Two squares, one off by a pixel: its distance is 1, that of the other 0; as objects, PQ is (1/2 + 1) / 2."""
    ranks = np.zeros((2, 12, 14), np.int64)
    ranks[0, 2:5, 2:5], ranks[1, 2:5, 3:6], ranks[:, 7:10, 7:10] = 1, 1, 2
    for side, kind, rank in zip("pt", kinds, ranks, strict=True):
        save(tmp_path / f"{side}.npy", np.array([0, start, start + 1], kind)[rank])
    pair = tmp_path / "p.npy", tmp_path / "t.npy"
    result = score(*pair, "--surface", "1px", "--lesions", "--matching", ">=0.5", "--format", "json")
    (case,) = json.loads(result.stdout)["results"][0]["cases"]
    rows = {row["label"]: (row["hd95"], row["dice"], row["lesion_dice"]) for row in case["classes"]}
    assert rows == {start: (1, pytest.approx(2 / 3), pytest.approx(2 / 3)), start + 1: (0, 1, 1)}
    regions = "; ".join(f"r{i}={start + i},{start + 2 + i}" for i in range(2))
    for options in (("--regions", regions), ("--ignore", str(start))):
        (case,) = json.loads(score(*pair, *options, "--format", "json").stdout)["results"][0]["cases"]
        assert case["classes"][-1]["dice"] == 1
    result = score(*pair, "--instances", "--matching", ">=0.5", "--format", "json")
    (case,) = json.loads(result.stdout)["results"][0]["cases"]
    assert case["classes"][0]["pq"] == pytest.approx((1 / 2 + 1) / 2)


def test_an_empty_sform_leaves_the_qform(tmp_path: Path) -> None:
    """As ITK has it. Without a qform, too, nothing says how large a voxel is: the volume is unknown, and not 0."""
    affine = np.diag([2.0, 2, 3, 1])
    whole = nib.Nifti1Image(VOLUME, affine)
    whole.set_qform(affine, 1)
    nib.save(whole, tmp_path / "t.nii")
    data = bytearray((tmp_path / "t.nii").read_bytes())
    struct.pack_into("<12f", data, 280, *[0] * 12)
    (tmp_path / "p.nii").write_bytes(data)
    image = read_image(tmp_path / "p.nii")
    assert np.array_equal(image.affine, affine)
    write_image(tmp_path / "mask.nii", VOLUME, image)
    assert np.array_equal(read_image(tmp_path / "mask.nii").affine, affine)
    options = ("--metrics", "volume", "--surface", "1mm", "--format", "json")
    (case,) = json.loads(score(tmp_path / "p.nii", tmp_path / "t.nii", *options).stdout)["results"][0]["cases"]
    assert case["classes"][0]["ml_ref"] == pytest.approx((VOLUME == 1).sum() * 0.012)
    struct.pack_into("<h", data, 252, 0)
    (tmp_path / "p.nii").write_bytes(data)
    (case,) = json.loads(score(tmp_path / "p.nii", tmp_path / "p.nii", *options[:2], *options[4:]).stdout)["results"][
        0
    ]["cases"]
    assert case["classes"][0]["ml_ref"] is None


@pytest.mark.parametrize("size, place", [(0.02, 7e6), (0.25, -3e8)])
def test_a_sform_far_away_counts(size: float, place: float, tmp_path: Path) -> None:
    """The place of a tiny voxel is large beside it, which makes no axis empty."""
    sform = np.diag([size, size, size, 1])
    sform[:3, 3] = place
    image = nib.Nifti1Image(VOLUME, sform)
    image.set_qform(np.eye(4), 1)
    nib.save(image, tmp_path / "a.nii")
    assert np.array_equal(read_image(tmp_path / "a.nii").affine, np.float32(sform))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_sform_that_is_not_finite(number: float, tmp_path: Path) -> None:
    """Unused numbers are not read; those of a sform in use are a damage, whatever the qform says."""
    image = nib.Nifti1Image(VOLUME, np.eye(4))
    image.set_qform(np.diag([2.0, 2, 3, 1]), 1)
    data = bytearray(image.to_bytes())
    for code, first in ((0, 280), (2, 280), (2, 292)):  # an axis, or the place
        struct.pack_into("<h", data, 254, code)
        struct.pack_into("<12f", data, 280, *np.eye(4)[:3].ravel())
        struct.pack_into("<f", data, first, number)
        (tmp_path / "a.nii").write_bytes(data)
        if code:
            with pytest.raises(FileError, match="damaged header: the affine is not finite"):
                read_image(tmp_path / "a.nii")
        else:
            assert np.array_equal(read_image(tmp_path / "a.nii").affine, np.diag([2.0, 2, 3, 1]))
