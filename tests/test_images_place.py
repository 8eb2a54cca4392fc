"""How files say their voxels lie: units, orders of axes, orientation tags, maps, cropped segmentations, DICOM.

Every pair here once gave a wrong number without a word, or advice that led to one.
"""

from __future__ import annotations

import json
import locale
from collections.abc import Callable, Iterator
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

from commands import call, score  # noqa: E402
from test_images_faults import segmentation, series  # noqa: E402

from softdice.images.files import FileError, image_name, left_out, list_images, read_image, write_image  # noqa: E402
from softdice.images.formats.stores import _place  # noqa: E402

RNG = np.random.default_rng(7)
FLAT = np.zeros((12, 12), np.uint8)
FLAT[1:5, 2:11] = 1  # not its own transpose
BOX = np.zeros((8, 8, 8), np.uint8)
BOX[1:3, 2:6, 3:8] = 1
LABELS = RNG.integers(0, 3, (5, 6, 7), np.uint8)


@pytest.fixture(autouse=True)
def same_locale() -> Iterator[None]:
    """ITK leaves the locale "C" behind where it writes DICOM, as tests do here; Python then opens text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def rows_of(*arguments: object) -> list[dict[str, float]]:
    """Arguments of `softdice score` -> the classes of its only case."""
    result = score(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    (case,) = json.loads(result.stdout)["results"][0]["cases"]
    return case["classes"]


def dice_of(*arguments: object) -> float:
    (row,) = rows_of(*arguments)
    return row["dice"]


def refusal(*arguments: object) -> str:
    result = score(*arguments)
    assert result.exit_code == 1, result.output
    return " ".join(result.stderr.split())


# --- units


def nifti(path: Path, array: np.ndarray, size: float, unit: str = "mm", shift: float = 0.0) -> Path:
    image = nib.Nifti1Image(array, np.array([[size, 0, 0, shift], [0, size, 0, 0], [0, 0, size, 0], [0, 0, 0, 1]]))
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def nrrd(path: Path, array: np.ndarray, fields: str, space: str = "left-posterior-superior") -> Path:
    head = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: {' '.join(map(str, array.shape))}\nencoding: raw\n"
    head += f"space: {space}\n" if space else ""
    path.write_bytes(f"{head}{fields}\n".encode() + array.tobytes("F"))
    return path


def meta(path: Path, array: np.ndarray, size: float, unit: str) -> Path:
    head = (
        f"ObjectType = Image\nNDims = 3\nDimSize = {' '.join(map(str, array.shape))}\nElementSpacing = {size} {size} "
    )
    head += f"{size}\nDistanceUnits = {unit}\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    path.write_bytes(head.encode() + array.tobytes("F"))
    return path


def directions(size: float, unit: str) -> str:
    units = f"space units: {' '.join([chr(34) + unit + chr(34)] * 3)}\n" if unit else ""
    return f"space directions: ({size},0,0) (0,{size},0) (0,0,{size})\nspace origin: (0,0,0)\n{units}"


IN_MM: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "NIfTI in m": lambda d, a: nifti(d / "a.nii", a, 0.004, "meter"),
    "NIfTI in micrometres": lambda d, a: nifti(d / "a.nii.gz", a, 4000, "micron"),
    "NRRD in cm": lambda d, a: nrrd(d / "a.nrrd", a, directions(0.4, "cm")),
    "NRRD in nm": lambda d, a: nrrd(d / "a.nrrd", a, directions(4e6, "nm")),
    "NRRD without a unit": lambda d, a: nrrd(d / "a.nrrd", a, directions(4, "")),
    "MetaImage in micrometres": lambda d, a: meta(d / "a.mha", a, 4000, "um"),
    "MetaImage in cm": lambda d, a: meta(d / "a.mha", a, 0.4, "cm"),
    "MetaImage of no unit": lambda d, a: meta(d / "a.mha", a, 4, "?"),
}  # fmt: skip
"""A voxel of 4 mm, said in other units."""


@pytest.mark.parametrize("name", IN_MM)
def test_lengths_are_in_mm_whatever_the_unit(name: str, tmp_path: Path) -> None:
    """BOX has 40 voxels of 0.064 ml; moved by 1 voxel along x, every surface voxel is at most 4 mm away."""
    for side, array in (("p", np.roll(BOX, 1, 0)), ("t", BOX)):
        (tmp_path / side).mkdir()
        IN_MM[name](tmp_path / side, array)
    p, t = (next((tmp_path / side).iterdir()) for side in "pt")
    (row,) = rows_of(p, t, "--surface", "4mm", "--metrics", "volume")
    assert row["ml_ref"] == pytest.approx(40 * 0.064, rel=1e-6)
    assert row["hd95"] == pytest.approx(4, rel=1e-6)
    assert row["surface_dice"] == 1
    assert row["dice"] == 0.5
    assert read_image(p).spacing_mm == pytest.approx((4, 4, 4), rel=1e-6)
    mask = write_image(tmp_path / "mask", BOX, read_image(p))
    assert read_image(mask).spacing_mm == pytest.approx((4, 4, 4), rel=1e-6)
    assert dice_of(mask, t) == 1


def test_a_unit_that_is_no_length(tmp_path: Path) -> None:
    paths = [nrrd(tmp_path / f"{n}.nrrd", BOX, directions(4, "furlong")) for n in "pt"]
    assert dice_of(*paths) == 1
    assert "expected a file that says how large a voxel is, got none" in refusal(*paths, "--surface", "2mm")
    other = nrrd(tmp_path / "u.nrrd", BOX, directions(4, "mm"))
    assert "it lies in left-posterior-superior" not in refusal(paths[0], other)
    assert "and u.nrrd in patient. Pass --ignore-geometry if their axes agree" in refusal(paths[0], other)


def test_one_grid_in_two_units_and_two_grids_in_one_number(tmp_path: Path) -> None:
    mm, um, wrong = (
        nifti(tmp_path / "mm.nii", BOX, 0.5),
        nifti(tmp_path / "um.nii", BOX, 500, "micron"),
        nifti(tmp_path / "wrong.nii", BOX, 500),
    )
    for pair in ((mm, um), (um, mm)):
        assert dice_of(*pair) == dice_of(*pair, "--resample") == 1
    assert "RAS voxels of 0.5 x 0.5 x 0.5 mm elsewhere than the RAS voxels of 500 x 500 x 500 mm" in refusal(um, wrong)
    assert "Is the unit of length of one wrong? Then correct its header" in refusal(wrong, mm)


# --- orders of axes


def test_columns_first_against_rows_first_is_transposed_on_request(tmp_path: Path) -> None:
    """A square picture, as SimpleITK writes it in its formats and Pillow, tifffile and NumPy in theirs."""
    for suffix in (".nrrd", ".mha", ".nii.gz"):
        sitk.WriteImage(sitk.GetImageFromArray(FLAT), str(tmp_path / f"p{suffix}"))
    PIL_Image.fromarray(FLAT).save(tmp_path / "t.png")
    tifffile.imwrite(tmp_path / "t.tif", FLAT)
    np.save(tmp_path / "t.npy", FLAT)
    medical = [tmp_path / f"p{suffix}" for suffix in (".nrrd", ".mha", ".nii.gz")]
    for t in (tmp_path / "t.png", tmp_path / "t.tif"):
        for p in medical:
            for pair in ((p, t), (t, p)):
                assert "--transpose" in (said := refusal(*pair))
                assert "--ignore-geometry" not in said
                assert dice_of(*pair, "--transpose") == 1
        assert dice_of(tmp_path / "t.npy", t) == 1  # of pictures, arrays have rows first
    for p in medical:
        said = refusal(tmp_path / "t.npy", p)
        assert "If t.npy was saved in the order (x, y), as nibabel has it, pass --ignore-geometry." in said
        assert "If in the reversed order, as SimpleITK has it: Pass --transpose" in said
        assert dice_of(tmp_path / "t.npy", p, "--transpose") == 1
        assert all(dice_of(p, other) == 1 for other in medical)


def test_cubes_against_stacks(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "t.tif", BOX, photometric="minisblack")
    plain = nrrd(tmp_path / "plain.nrrd", BOX.T, "spacings: 1 1 2\n", space="")
    for p in (nifti(tmp_path / "p.nii", BOX.T, 1), plain, meta(tmp_path / "p.mha", BOX.T, 1, "mm")):
        assert "--transpose" in (said := refusal(p, tmp_path / "t.tif"))
        assert "--ignore-geometry" not in said
        assert "its first axis is that of the columns, not of the slices as there" in said
        assert "its first axis is that of the slices, not of the columns as there" in refusal(tmp_path / "t.tif", p)
        assert dice_of(p, tmp_path / "t.tif", "--transpose") == 1
    np.save(tmp_path / "t.npy", BOX)
    assert "neither it nor t.npy says how" in refusal(plain, tmp_path / "t.npy")
    assert dice_of(plain, tmp_path / "t.npy", "--transpose") == 1
    assert dice_of(plain, nrrd(tmp_path / "q.nrrd", BOX.T, "spacings: 1 1 2\n", space="")) == 1
    other = nrrd(tmp_path / "r.nrrd", BOX.T, "spacings: 1 1 3\n", space="")
    assert "its voxels have another size than those of r.nrrd" in refusal(plain, other)


@pytest.mark.parametrize(("names", "order"), [("xyz", "xyz"), ("zxy", "zxy"), ("yx", "zyx"), ("xz", "xyz")])
def test_axes_of_an_ome_zarr_are_those_that_a_place_documents(names: str, order: str) -> None:
    """Voxels of 1, 2 and 3 mm along the axes as they stand in the file, the first voxel at 10, 20 and 30 mm."""
    sizes = np.arange(1.0, len(names) + 1)
    place = _place([{"name": name, "unit": "centimeter"} for name in names], sizes / 10, sizes)
    assert place.axes == order
    assert place.spacing_mm is not None
    assert place.spacing_mm[: len(names)] == pytest.approx(sizes)
    assert place.affine is not None
    assert [place.affine["xyz".index(name), 3] for name in names] == pytest.approx(10 * sizes)
    assert abs(np.linalg.det(place.affine)) == pytest.approx(sizes.prod())


def test_a_shape_that_is_no_palindrome_says_the_order(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "t.tif", LABELS.T, photometric="minisblack")
    nib.Nifti1Image(LABELS, np.eye(4)).to_filename(tmp_path / "p.nii")
    assert "--transpose swaps its axes" in refusal(tmp_path / "p.nii", tmp_path / "t.tif")
    assert [row["dice"] for row in rows_of(tmp_path / "p.nii", tmp_path / "t.tif", "--transpose")] == [1, 1]
    np.save(tmp_path / "t.npy", LABELS)
    assert "Pass --ignore-geometry if their axes agree" in refusal(tmp_path / "p.nii", tmp_path / "t.npy")


@pytest.mark.parametrize("square", [True, False])
def test_training_refuses_pictures_with_labels_in_columns(square: bool, tmp_path: Path) -> None:
    from softdice.training.cases import read_folder

    array = FLAT if square else FLAT[:9]
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for name in "ab":
        PIL_Image.fromarray(array).save(tmp_path / "images" / f"{name}.png")
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "labels" / f"{name}.mha"))
    with pytest.raises(ValueError, match="Their axes stand in reversed order: save both in one format") as error:
        read_folder(tmp_path)
    assert "--ignore-geometry" not in str(error.value)
    assert "Resample" not in str(error.value)


def test_a_mask_lies_as_its_image_though_that_says_nothing(tmp_path: Path) -> None:
    for name, fields, space in (
        ("none", "", ""), ("sizes", "spacings: 1 2 3\n", ""), ("scanner", directions(2, ""), "scanner-xyz"),
        ("unnamed", f"space dimension: 3\n{directions(3, '')}", ""),
    ):  # fmt: skip
        image = read_image(nrrd(tmp_path / f"{name}.nrrd", LABELS, fields, space))
        again = read_image(write_image(tmp_path / f"{name}_mask", LABELS, image))
        assert again.place.frame == image.place.frame != "patient"
        assert again.spacing_mm == image.spacing_mm
        assert (image.spacing_mm is None) == (name == "none")


# --- tags that turn a picture


def shown(stored: np.ndarray, tag: int) -> np.ndarray:
    """What a viewer shows: Pillow's rule."""
    from PIL import ImageOps

    picture = PIL_Image.fromarray(stored)
    picture.getexif()[274] = tag
    return np.array(ImageOps.exif_transpose(picture))


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_is_applied_by_every_format_alike(tag: int, tmp_path: Path) -> None:
    array = RNG.integers(0, 4, (10, 13), np.uint8)
    expected, exif = shown(array, tag), PIL_Image.Exif()
    exif[274] = tag
    for name, options in {
        "plain.tif": {"tiffinfo": {274: tag}},
        "lzw.tif": {"tiffinfo": {274: tag}, "compression": "tiff_lzw"},
        "packbits.tif": {"tiffinfo": {274: tag}, "compression": "packbits"},
        "a.png": {"exif": exif},
        "a.webp": {"exif": exif, "lossless": True},
    }.items():
        PIL_Image.fromarray(array).save(tmp_path / name, **options)
        image = read_image(tmp_path / name)
        picture = image.array if image.array.ndim == 2 else image.array[..., 0]
        assert np.array_equal(picture, expected), name
        mask = write_image(tmp_path / f"{name}_mask", picture, image)
        assert np.array_equal(read_image(mask).array, expected), name  # as it is shown, without the tag
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([array, array + 1]), extratags=[(274, "H", 1, tag, True)])
    assert np.array_equal(read_image(tmp_path / "stack.tif").array, np.stack([expected, expected + 1]))
    PIL_Image.fromarray(array * 60).save(tmp_path / "a.jpg", exif=exif, quality=100)
    assert np.abs(read_image(tmp_path / "a.jpg").array.astype(int) - expected * 60).max() < 12


def test_resolution_turns_with_the_picture(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", FLAT, resolution=(20, 40), extratags=[(274, "H", 1, 6, True)])
    header = read_image(tmp_path / "a.tif").header
    assert isinstance(header, dict)
    assert (header["XResolution"][0], header["YResolution"][0]) == (40, 20)


# --- maps


def geotiff(
    path: Path, array: np.ndarray, corner: tuple[float, float], pixel: float, epsg: int = 32633, point: int = 1
) -> Path:
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, point, 3072, 0, 1, epsg)
    place = [(33550, 12, 3, (pixel, pixel, 0.0), True), (33922, 12, 6, (0, 0, 0, *corner, 0.0), True)]
    tifffile.imwrite(path, array, extratags=[*place, (34735, 3, len(keys), keys, True)])
    return path


def test_maps_are_compared_by_place(tmp_path: Path) -> None:
    whole = geotiff(tmp_path / "t.tif", FLAT, (600.0, 9000.0), 10.0)
    moved = geotiff(tmp_path / "p.tif", np.roll(FLAT, -2, 1), (620.0, 9000.0), 10.0)  # two columns to the east
    assert "pixels elsewhere than the pixels of t.tif" in refusal(moved, whole)
    assert dice_of(moved, whole, "--resample") == 1
    fine = geotiff(tmp_path / "fine.tif", FLAT.repeat(2, 0).repeat(2, 1), (600.0, 9000.0), 5.0)
    assert dice_of(fine, whole, "--resample") == 1
    centres = geotiff(tmp_path / "centres.tif", FLAT, (605.0, 8995.0), 10.0, point=2)  # of the corner pixel
    assert dice_of(centres, whole) == 1
    far = geotiff(tmp_path / "far.tif", FLAT, (900600.0, 9000.0), 10.0)
    assert "expected a grid that overlaps that of t.tif in space" in refusal(far, whole)
    other = geotiff(tmp_path / "other.tif", FLAT, (600.0, 9000.0), 10.0, epsg=3857)
    assert "it lies in EPSG:3857, and t.tif in EPSG:32633" in refusal(other, whole)
    matrix = (0.0, 10.0, 0, 600.0, -10.0, 0.0, 0, 9000.0, 0, 0, 0, 0, 0, 0, 0, 1.0)  # x by rows, y by columns
    keys = (1, 1, 0, 2, 1025, 0, 1, 1, 3072, 0, 1, 32633)
    tags = [(34264, 12, 16, matrix, True), (34735, 3, len(keys), keys, True)]
    tifffile.imwrite(tmp_path / "matrix.tif", FLAT.T, extratags=tags)
    assert dice_of(tmp_path / "matrix.tif", whole, "--resample") == 1
    assert read_image(whole).spacing_mm is None  # the file names no unit


def test_a_mask_of_a_map_lies_on_it_and_a_picture_has_no_place(tmp_path: Path) -> None:
    path = geotiff(tmp_path / "t.tif", FLAT, (600.0, 9000.0), 10.0)
    mask = write_image(tmp_path / "mask", FLAT, read_image(path))
    assert np.array_equal(read_image(mask).affine, read_image(path).affine)
    assert read_image(mask).place.frame == "EPSG:32633"
    PIL_Image.fromarray(FLAT).save(tmp_path / "p.png")
    assert dice_of(tmp_path / "p.png", path) == 1
    said = refusal(nifti(tmp_path / "p.nii", FLAT.T[..., None].copy(), 1), path)
    assert "it lies in patient, and t.tif in EPSG:32633, and its first axis is that of the columns" in said
    assert "--transpose" in said
    assert "--ignore-geometry" not in said


# --- segmentations that hold less than their scene


def slicer(path: Path, array: np.ndarray, start: tuple[int, int, int] = (0, 0, 0)) -> Path:
    """A segmentation of 3D Slicer cropped to its segments, voxels of 2 mm."""
    picture = sitk.GetImageFromArray(array.T)
    picture.SetSpacing((2.0, 2.0, 2.0))
    picture.SetOrigin(tuple(2.0 * n for n in start))
    for number, label in enumerate(np.unique(array[array > 0])):
        picture.SetMetaData(f"Segment{number}_LabelValue", str(label))
        picture.SetMetaData(f"Segment{number}_Name", f"part {label}")
    picture.SetMetaData("Segmentation_ReferenceImageExtentOffset", " ".join(map(str, start)))
    sitk.WriteImage(picture, str(path))
    return path


def test_beyond_a_cropped_segmentation_there_is_nothing(tmp_path: Path) -> None:
    """40 voxels, found all, and 10 more that lie outside the crop: 2 * 40 / (40 + 50)."""
    cropped = slicer(tmp_path / "t.seg.nrrd", BOX[1:3, 2:6, 3:8], (1, 2, 3))
    prediction = BOX.copy()
    prediction[6, :5, 0], prediction[7, 3:, 7] = 1, 1
    whole = sitk.GetImageFromArray(prediction.T)
    whole.SetSpacing((2.0, 2.0, 2.0))
    sitk.WriteImage(whole, str(tmp_path / "p.nii.gz"))
    for options in ((), ("--resample",)):
        assert dice_of(tmp_path / "p.nii.gz", cropped, *options) == pytest.approx(80 / 90)
        assert dice_of(cropped, tmp_path / "p.nii.gz", *options) == pytest.approx(80 / 90)
    apart = slicer(tmp_path / "q.seg.nrrd", np.ones((2, 2, 1), np.uint8), (6, 0, 0))
    assert dice_of(apart, cropped) == 0  # each is empty where the other is not
    both = slicer(tmp_path / "r.seg.nrrd", BOX[:, :4], (0, 0, 0))
    assert dice_of(both, cropped) == pytest.approx(2 * 20 / (20 + 40))


# --- DICOM and its neighbours


def test_files_beside_dicom_that_are_no_slices_of_it(tmp_path: Path) -> None:
    for side in "pt":
        series(tmp_path / side / "case", LABELS)
        (tmp_path / side / "case" / "._0.dcm").write_bytes(b"\0\5\x16\7" + bytes(200))
        report = pydicom.dcmread(tmp_path / side / "case" / "0.dcm")
        for name in ("Rows", "Columns", "PixelData"):
            delattr(report, name)
        report.SOPClassUID, report.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", "1.2.9"
        report.save_as(tmp_path / side / "case" / "report.dcm")
    assert [row["dice"] for row in rows_of(tmp_path / "p", tmp_path / "t")] == [1, 1]
    with pytest.raises(FileError, match=r"expected DICOM with a picture, got Basic Text SR Storage"):
        read_image(tmp_path / "p" / "case" / "report.dcm")
    seg = segmentation(tmp_path / "seg.dcm", LABELS)
    (tmp_path / "._seg.dcm").write_bytes(b"\0\5\x16\7" + bytes(200))
    assert read_image(seg).shape == LABELS.shape


def test_slices_are_known_by_their_series_whatever_their_names(tmp_path: Path) -> None:
    series(tmp_path / "a", LABELS)
    for path in list((tmp_path / "a").iterdir()):
        path.rename(path.with_name(f"1.2.840.{path.stem}"))  # no suffix of ours
    assert image_name(tmp_path / "a") == ("a", ".dcm")
    assert list(list_images(tmp_path)) == ["a"]
    assert read_image(tmp_path / "a").shape == LABELS.shape
    with pytest.raises(FileError, match=r"1\.2\.840\.3: one slice of a DICOM series"):
        read_image(tmp_path / "a" / "1.2.840.3")
    series(tmp_path / "b", LABELS[:, :, :1], uid="1.2.3.6")
    (tmp_path / "b" / "0.dcm").rename(tmp_path / "a" / "other.DCM")
    with pytest.raises(FileError, match="expected one DICOM series in the folder, got 2"):
        read_image(tmp_path / "a")
    assert read_image(tmp_path / "a" / "other.DCM").shape == (5, 6, 1)  # alone in its series


def test_slices_that_are_not_parallel_or_cut_off(tmp_path: Path) -> None:
    series(tmp_path / "a", LABELS)
    slice_ = pydicom.dcmread(tmp_path / "a" / "2.dcm")
    slice_.ImageOrientationPatient = [1, 0, 0, 0, 0, 1]
    slice_.save_as(tmp_path / "a" / "2.dcm")
    with pytest.raises(FileError, match="expected parallel slices, got several orientations"):
        read_image(tmp_path / "a")
    (tmp_path / "a" / "2.dcm").write_bytes(b"")
    with pytest.raises(FileError, match=r"2\.dcm: not a DICOM file, or cut off"):
        read_image(tmp_path / "a")


def altered(path: Path, change: Callable[..., object]) -> Path:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
    return path


def without_spacing(dataset: object) -> None:
    del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices  # type: ignore[attr-defined]


def test_frames_of_a_segmentation_and_their_places(tmp_path: Path) -> None:
    """Slices are 3 mm thick; with labels in every third, their frames are 9 mm apart."""
    whole = segmentation(tmp_path / "whole.dcm", LABELS)
    with pytest.raises(FileError, match="damaged: expected a place for each frame, got 13 frames and the places of 14"):
        read_image(altered(whole, lambda seg: setattr(seg, "NumberOfFrames", 13)))
    sparse = np.where(np.arange(7) % 3 == 0, LABELS, 0).astype(np.uint8)
    path = segmentation(tmp_path / "sparse.dcm", sparse)
    assert read_image(path).spacing_mm == pytest.approx((1.5, 0.75, 3))
    with pytest.raises(FileError, match="expected SpacingBetweenSlices, got none, and slices 9 mm apart that are 3 mm"):
        read_image(altered(path, without_spacing))
    dense = altered(segmentation(tmp_path / "dense.dcm", LABELS), without_spacing)
    assert read_image(dense).spacing_mm == pytest.approx((1.5, 0.75, 3))
    one = np.where(np.arange(7) == 4, LABELS, 0).astype(np.uint8)
    alone = read_image(altered(segmentation(tmp_path / "one.dcm", one), without_spacing))
    assert alone.spacing_mm == pytest.approx((1.5, 0.75, 3))  # highdicom takes 1 mm


def test_a_segmentation_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    segread = highdicom.seg.segread
    monkeypatch.setattr(highdicom.seg, "segread", lambda path: kept.append(segread(path)) or kept[-1])
    read_image(segmentation(tmp_path / "a.dcm", LABELS))
    with pytest.raises(Exception, match="closed"):
        kept[0].get_volume()  # type: ignore[attr-defined]


# --- messages


def test_contours_of_radiotherapy_say_what_they_are(tmp_path: Path) -> None:
    def to_contours(dataset: object) -> None:
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"  # type: ignore[attr-defined]
        del dataset.Rows, dataset.PixelData  # type: ignore[attr-defined]

    path = altered(series(tmp_path, LABELS[..., :1]) / "0.dcm", to_contours)
    with pytest.raises(FileError, match=r"got contours of structures \(RTSTRUCT\)\. Draw them on the grid of their"):
        read_image(path)


def test_a_compression_of_nrrd_that_is_not_read(tmp_path: Path) -> None:
    nrrd(tmp_path / "a.nrrd", LABELS, directions(1, ""))
    data = (tmp_path / "a.nrrd").read_bytes().replace(b"encoding: raw", b"encoding: bzip2")
    (tmp_path / "a.nrrd").write_bytes(data)
    with pytest.raises(FileError, match=r"compressed by bzip2, which SimpleITK does not read\. Run: unu save"):
        read_image(tmp_path / "a.nrrd")


def test_no_message_has_an_address(tmp_path: Path) -> None:
    whole = segmentation(tmp_path / "a.dcm", LABELS)
    altered(whole, lambda seg: setattr(seg, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"))
    series(tmp_path / "b", LABELS[..., :1])
    path = tmp_path / "b" / "0.dcm"
    path.write_bytes(path.read_bytes()[:-36])  # all of its 30 voxels, and some of what says so
    for each in (whole, path):
        with pytest.raises(FileError) as error:
            read_image(each)
        assert "0x" not in str(error.value)


def test_a_segmentation_that_is_not_read_says_how_to_rewrite_it(tmp_path: Path) -> None:
    big_endian = pydicom.dcmread(segmentation(tmp_path / "a.dcm", LABELS))
    big_endian.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.2"
    pydicom.dcmwrite(tmp_path / "b.dcm", big_endian, little_endian=False, implicit_vr=False)
    deflated = altered(segmentation(tmp_path / "c.dcm", LABELS), lambda seg: setattr(
        seg.file_meta, "TransferSyntaxUID", "1.2.840.10008.1.2.1.99"))  # fmt: skip
    assert read_image(deflated).shape == LABELS.shape
    odd = altered(
        segmentation(tmp_path / "d.dcm", LABELS),
        lambda seg: setattr(
            seg.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence[0], "ImagePositionPatient", [0, 1, 2]
        ),
    )
    for path in (tmp_path / "b.dcm", odd):
        with pytest.raises(FileError, match=r"a DICOM segmentation that highdicom does not read: .*dcmconv \+te, or"):
            read_image(path)


def test_labels_that_are_nearly_whole_are_not_called_whole(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", FLAT + 1e-12)
    np.save(tmp_path / "t.npy", FLAT)
    assert "such as 1.000000000001. Pass --round" in refusal(tmp_path / "p.npy", tmp_path / "t.npy")


# --- what is left out


def test_every_name_that_is_left_out_is_told(tmp_path: Path) -> None:
    for side in "pt":
        (tmp_path / side / "old").mkdir(parents=True)
        PIL_Image.fromarray(FLAT).save(tmp_path / side / "a.png")
    sitk.WriteImage(sitk.GetImageFromArray(FLAT), str(tmp_path / "p" / "b.mhd"))  # with b.raw
    (tmp_path / "p" / "notes.txt").touch()
    (tmp_path / "p" / ".hidden").touch()
    assert left_out(tmp_path / "p", list_images(tmp_path / "p").values()) == (
        f"Left out of {tmp_path / 'p'}: notes.txt, old"
    )
    result = score(tmp_path / "p", tmp_path / "t")
    assert f"Left out of {tmp_path / 'p'}: notes.txt, old" in result.stderr
    assert f"Left out of {tmp_path / 't'}: old" in result.stderr
    result = score(tmp_path / "p", tmp_path / "t", "--layout", "subfolders")
    assert f"Left out of {tmp_path / 'p'}: notes.txt\n" in result.stderr


def test_what_a_folder_of_classes_leaves_out_is_told(tmp_path: Path) -> None:
    for side in "pt":
        for case in ("a", "b"):
            folder = tmp_path / side / case / "segmentations"
            folder.mkdir(parents=True)
            for name in ("liver", "spleen"):
                nifti(folder / f"{name}.nii", BOX, 1)
            (folder.parent / "ct.txt").touch()
        PIL_Image.fromarray(FLAT).save(folder / "view.png")
    result = score(tmp_path / "p", tmp_path / "t", "--layout", "classes")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        line
        for side in "pt"
        for line in (
            f"Left out of {tmp_path / side / 'a'}: ct.txt",
            f"Left out of {tmp_path / side / 'b'}: ct.txt",
            f"Left out of {tmp_path / side / 'b' / 'segmentations'}: view.png",
        )
    ]


def test_classes_of_a_case_on_two_grids_are_refused(tmp_path: Path) -> None:
    """Volumes would be those of the grid that was read last."""
    for side in "pt":
        for name, size in (("liver", 1), ("spleen", 2)):
            (tmp_path / side / "a").mkdir(parents=True, exist_ok=True)
            nifti(tmp_path / side / "a" / f"{name}.nii", BOX, size)
    result = score(tmp_path / "p", tmp_path / "t", "--layout", "classes")
    assert result.exit_code == 1
    assert "spleen.nii: expected the grid of the other classes of" in result.stderr
    assert "Save all masks of a case on one grid." in result.stderr


def test_training_and_prediction_tell_what_they_leave_out(tmp_path: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
        for name in "abc":
            PIL_Image.fromarray(FLAT).save(tmp_path / part / f"{name}.png")
    (tmp_path / "labels" / "classes.json").write_text("{}")
    (tmp_path / "images" / "d.h5").touch()
    told = call("train", tmp_path, "--out", tmp_path / "run", "--max-steps", 1, "--patch", "16")
    assert f"Left out of {tmp_path / 'images'}: d.h5" in told.output
    assert f"Left out of {tmp_path / 'labels'}: classes.json" in told.output
    told = call("predict", tmp_path / "run" / "model.ckpt", tmp_path / "images", tmp_path / "masks")
    assert f"Left out of {tmp_path / 'images'}: d.h5" in told.stderr
