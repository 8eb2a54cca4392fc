"""Every format that holds a volume against every other, and pictures likewise: one pair of label maps, one result.

The volumes lie obliquely, with voxels of three sizes, in files of several units. Where axes stand in reversed order
the pair is refused, and `--transpose`, as the refusal says, gives the same result.
"""

from __future__ import annotations

import locale
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

nib = pytest.importorskip("nibabel")
pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")
tifffile = pytest.importorskip("tifffile")
PIL_Image = pytest.importorskip("PIL.Image")

from test_images_faults import segmentation, series  # noqa: E402

from softdice.images.files import FileError  # noqa: E402
from softdice.metrics import hausdorff_distance  # noqa: E402
from softdice.scoring.options import Options  # noqa: E402
from softdice.scoring.pair_scores import score_pair  # noqa: E402

SPACING = (1.5, 0.75, 3.0)
TURN = np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1.0]])  # in LPS, rows of a patient
AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = np.diag([-1, -1, 1]) @ TURN * SPACING, (20.5, -4, 1 / 3)  # RAS

Save = Callable[[Path, np.ndarray], Path]


@pytest.fixture(autouse=True)
def same_locale() -> Iterator[None]:
    """ITK leaves the locale "C" behind where it writes DICOM, as tests do here; Python then opens text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def picture_of(array: np.ndarray, mm: float = 1.0) -> object:
    """(x, y) or (x, y, z) labels as SimpleITK has them, lengths divided by `mm`."""
    picture, n = sitk.GetImageFromArray(array.T), array.ndim
    picture.SetSpacing([size / mm for size in SPACING[:n]])
    picture.SetOrigin([place / mm for place in (-20.5, 4, 1 / 3)[:n]])
    picture.SetDirection(TURN[:n, :n].ravel().tolist())
    return picture


def by_itk(suffix: str, mm: float = 1.0, edit: tuple[bytes, bytes] = (b"", b"")) -> Save:
    """Write by SimpleITK; `edit` adds to the header what it cannot say."""

    def save(folder: Path, array: np.ndarray) -> Path:
        path = folder / f"a{suffix}"
        sitk.WriteImage(picture_of(array, mm), str(path))
        path.write_bytes(path.read_bytes().replace(*edit, 1) if edit[0] else path.read_bytes())
        return path

    return save


def by_nibabel(suffix: str, kind: str, unit: str = "mm", mm: float = 1.0) -> Save:
    def save(folder: Path, array: np.ndarray) -> Path:
        affine = AFFINE.copy()
        if array.ndim == 2:
            affine[2, 3] = 0  # as SimpleITK has it
        affine[:3] /= mm
        image = getattr(nib, kind)(array, affine)
        if kind != "MGHImage":
            image.header.set_xyzt_units(unit)
        nib.save(image, folder / f"a{suffix}")
        return folder / f"a{suffix}"

    return save


def slicer(folder: Path, array: np.ndarray) -> Path:
    """A segmentation of 3D Slicer, cropped to its segments."""
    inside = np.argwhere(array)
    low, high = inside.min(0), inside.max(0) + 1
    whole = picture_of(array)
    part = whole[low[0] : high[0], low[1] : high[1], low[2] : high[2]]  # type: ignore[index]
    for number in range(2):
        part.SetMetaData(f"Segment{number}_LabelValue", str(number + 1))
    sitk.WriteImage(part, str(folder / "a.seg.nrrd"))
    return folder / "a.seg.nrrd"


def placed_dicom(save: Callable[..., Path], name: str) -> Save:
    """The helpers of `test_images_faults` lay slices downwards: here they run along their normal."""

    def write(folder: Path, array: np.ndarray) -> Path:
        path = save(folder / name, array)
        for each in path.iterdir() if path.is_dir() else [path]:
            data = pydicom.dcmread(each)
            parts = data.get("PerFrameFunctionalGroupsSequence")
            for item in [part.PlanePositionSequence[0] for part in parts] if parts else [data]:
                x, y, z = item.ImagePositionPatient
                item.ImagePositionPatient = [x, y, round(2 / 3 - z, 6)]  # mirrored at a height of 1/3
            data.save_as(each)
        return path

    return write


VOLUMES: dict[str, Save] = {
    ".nii": by_nibabel(".nii", "Nifti1Image"),
    ".nii.gz, version 2": by_nibabel(".nii.gz", "Nifti2Image"),
    ".nii in micrometres": by_nibabel(".nii", "Nifti1Image", "micron", 1e-3),
    ".nii by SimpleITK": by_itk(".nii"),
    ".hdr and .img": by_nibabel(".img", "Nifti1Pair"),
    ".mgz": by_nibabel(".mgz", "MGHImage"),
    ".nrrd": by_itk(".nrrd"),
    ".nrrd in micrometres": by_itk(".nrrd", 1e-3, (b"\nkinds:", b'\nspace units: "um" "um" "um"\nkinds:')),
    ".nhdr": by_itk(".nhdr"),
    ".seg.nrrd": slicer,
    ".mha": by_itk(".mha"),
    ".mhd in cm": by_itk(".mhd", 10, (b"ElementType", b"DistanceUnits = cm\nElementType")),
    "DICOM, a series": placed_dicom(series, "case"),
    "DICOM, SEG": placed_dicom(segmentation, "a.dcm"),
    ".tif": lambda d, a: tifffile.imwrite(d / "a.tif", a.T, photometric="minisblack") or d / "a.tif",
    ".npy": lambda d, a: np.save(d / "a.npy", a.T) or d / "a.npy",
}
"""Format -> how a volume (x, y, z) is written in it; stacks and arrays have (z, y, x)."""

ALONE = ("OME-Zarr", "OME-Zarr in micrometres")
"""Formats that lie in a space of their own, in which they have lengths."""


def ome(unit: str, mm: float) -> Save:
    """OME-Zarr 0.4 as its specification has it: metadata beside an array."""

    def save(folder: Path, array: np.ndarray) -> Path:
        import zarr

        root = zarr.open_group(str(folder / "a.ome.zarr"), mode="w", zarr_format=2)
        root.create_array("0", shape=array.T.shape, dtype=array.dtype)[...] = array.T
        axes = [{"name": name, "type": "space", "unit": unit} for name in "zyx"]
        steps = [{"type": "scale", "scale": [size / mm for size in SPACING[::-1]]}]
        data = [{"path": "0", "coordinateTransformations": steps}]
        root.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": data}]
        return folder / "a.ome.zarr"

    return save


if find_spec("zarr"):  # with make test-formats
    VOLUMES |= {"OME-Zarr": ome("millimeter", 1.0), "OME-Zarr in micrometres": ome("micrometer", 1e-3)}

PICTURES: dict[str, Save] = {
    ".nii": by_nibabel(".nii", "Nifti1Image"),
    ".nrrd": by_itk(".nrrd"),
    ".mha": by_itk(".mha"),
    **{
        suffix: lambda d, a, suffix=suffix: (  # type: ignore[misc]
            PIL_Image.fromarray(a.T.copy()).save(d / f"a{suffix}", **{"lossless": True} if suffix == ".webp" else {})
            or d / f"a{suffix}"
        )
        for suffix in (".png", ".bmp", ".gif", ".webp", ".jp2", ".tif")
    },
    ".npy": lambda d, a: np.save(d / "a.npy", a.T) or d / "a.npy",
}

ROWS_FIRST = (".tif", ".npy", ".png", ".bmp", ".gif", ".webp", ".jp2")


def pair_of(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two label maps that differ; a border of 0 on all sides but in 2-D, so that slices can be left out."""
    rng = np.random.default_rng(11)
    inside = tuple(slice(1, -1) for _ in shape)
    p, t = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    t[inside] = rng.integers(0, 3, t[inside].shape)
    p[inside] = np.where(rng.random(t[inside].shape) < 0.5, rng.integers(0, 3, t[inside].shape), t[inside])
    return p, t


@pytest.mark.parametrize(
    "formats, shape",
    [(VOLUMES, (6, 7, 8)), (VOLUMES, (7, 7, 7)), (PICTURES, (9, 7)), (PICTURES, (8, 8))],
    ids=["volumes", "cubes", "oblong", "square"],
)
def test_every_format_against_every_other(formats: dict[str, Save], shape: tuple[int, ...], tmp_path: Path) -> None:
    p, t = pair_of(shape)
    labels, spacing = (1, 2), SPACING[: len(shape)]
    dice = [2 * ((p == k) & (t == k)).sum() / ((p == k).sum() + (t == k).sum()) for k in labels]
    tensors = torch.from_numpy(p)[None], torch.from_numpy(t)[None]
    how = {"num_classes": 3, "classes": labels, "percentile": 95.0}
    hd95 = {mm: hausdorff_distance(*tensors, spacing=mm, **how).flatten().tolist() for mm in (spacing, 1.0)}
    files: dict[str, list[Path]] = {}
    for number, (name, save) in enumerate(formats.items()):
        for side, array in (("p", p), ("t", t)):
            folder = tmp_path / f"{number}{side}"
            folder.mkdir()
            files.setdefault(name, []).append(save(folder, array))
            files[name][-1] = files[name][-1].with_suffix(".hdr") if name.startswith(".hdr") else files[name][-1]
    for a, (prediction, _) in files.items():
        for b, (_, truth) in files.items():
            rows = [name in (*ROWS_FIRST, *ALONE) for name in (a, b)]
            unit = "px" if rows[1] and b not in ALONE else "mm"
            options = Options(labels=labels, metrics=("surface",), surface={"": 1.0}, surface_unit=unit)
            if rows[0] != rows[1]:
                cropped = {a, b} & {".seg.nrrd", "DICOM, SEG"}
                said = "leaves out empty parts of its image: export it on the whole grid" if cropped else "--transpose"
                with pytest.raises((FileError, ValueError), match=said):
                    score_pair(prediction, truth, options)
                if cropped:
                    continue
                options = Options(
                    labels=labels, metrics=("surface",), surface={"": 1.0}, surface_unit=unit, transpose=True
                )
            case = score_pair(prediction, truth, options)
            inside, n_p, n_t = case.counts
            assert (2 * inside / (n_p + n_t)).tolist() == pytest.approx(dice), (a, b)
            if len(shape) == 3 and unit == "mm":
                assert case.voxel_ml == pytest.approx(np.prod(SPACING) / 1000, rel=1e-5), (a, b)
            expected = hd95[1.0 if unit == "px" else spacing]
            assert case.measured[0].tolist() == pytest.approx(expected, rel=1e-5), (a, b)
