"""Files of the real writers, read as their writers' own readers say.

Packages that the environment of the other tests lacks come with `make test-formats`, where a missing one fails.
"""

from __future__ import annotations

import importlib
import locale
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

nib = pytest.importorskip("nibabel")
highdicom = pytest.importorskip("highdicom")
pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")
tifffile = pytest.importorskip("tifffile")
PIL_Image = pytest.importorskip("PIL.Image")

from test_images_faults import segmentation  # noqa: E402

from softdice.images.files import read_image  # noqa: E402
from softdice.images.labels import labels  # noqa: E402

LABELS = np.random.default_rng(3).integers(0, 3, (5, 6, 7), np.uint8)
LPS = np.diag([-1.0, -1, 1, 1])


@pytest.fixture(autouse=True)
def same_locale() -> Iterator[None]:
    """ITK leaves the locale "C" behind where it writes DICOM, as tests do here; Python then opens text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def package(name: str) -> Any:
    """A package that only `make test-formats` brings."""
    if os.environ.get("SOFTDICE_REQUIRE_FORMATS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} comes with make test-formats")


def lps_affine(picture: Any) -> np.ndarray:
    """Of a picture of SimpleITK."""
    n = picture.GetDimension()
    affine = np.eye(4)
    affine[:n, :n] = np.reshape(picture.GetDirection(), (n, n)) * picture.GetSpacing()
    affine[:n, 3] = picture.GetOrigin()
    return affine


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float64])
def test_simpleitk(suffix: str, dtype: type, tmp_path: Path) -> None:
    picture = sitk.GetImageFromArray(LABELS.astype(dtype))
    picture.SetSpacing((0.7, 0.9, 2.5))
    picture.SetOrigin((11, -4, 6.5))
    picture.SetDirection((0, 0.6, -0.8, 1, 0, 0, 0, -0.8, -0.6))
    sitk.WriteImage(picture, str(tmp_path / f"a{suffix}"))
    image, theirs = read_image(tmp_path / f"a{suffix}"), sitk.ReadImage(str(tmp_path / f"a{suffix}"))
    assert np.array_equal(image.array, sitk.GetArrayFromImage(theirs).T)
    assert image.affine == pytest.approx(LPS @ lps_affine(theirs), abs=1e-4)


@pytest.mark.parametrize("kind, suffix", [("Nifti1Pair", ".img"), ("Nifti2Pair", ".img"), ("MGHImage", ".mgh")])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_nibabel(kind: str, suffix: str, dtype: type, tmp_path: Path) -> None:
    affine = np.array([[0, 0, 2.5, 3], [-0.7, 0, 0, 4], [0, 0.9, 0, -5], [0, 0, 0, 1]])
    nib.save(getattr(nib, kind)(LABELS.astype(dtype), affine), tmp_path / f"a{suffix}")
    path = tmp_path / f"a{suffix}"  # nibabel leaves an MGH that it loads open
    theirs = nib.MGHImage.from_bytes(path.read_bytes()) if suffix == ".mgh" else nib.load(path)
    image = read_image(tmp_path / ("a.hdr" if suffix == ".img" else f"a{suffix}"))
    assert np.array_equal(image.array, np.asarray(theirs.dataobj))
    assert image.array.dtype == dtype
    assert image.affine == pytest.approx(theirs.affine, abs=1e-6)
    assert image.placed


def test_analyze_is_refused(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(LABELS, np.eye(4)), tmp_path / "a.img")
    with pytest.raises(ValueError, match=r"expected NIfTI, got Analyze 7\.5, which does not say left from right"):
        read_image(tmp_path / "a.hdr")
    (tmp_path / "b.hdr").write_bytes((tmp_path / "a.hdr").read_bytes()[:344] + b"ni1\0")
    with pytest.raises(ValueError, match=r"expected the voxels in b\.img beside it, got no such file"):
        read_image(tmp_path / "b.hdr")


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
def test_highdicom(kind: str, tmp_path: Path) -> None:
    array = LABELS if kind != "FRACTIONAL" else (LABELS[..., None] > 1) * np.float32(0.5)
    others = {"fractional_type": "PROBABILITY"} if kind == "FRACTIONAL" else {}
    path = segmentation(tmp_path / "a.dcm", array, kind, **others)
    volume = highdicom.seg.segread(str(path)).get_volume(combine_segments=kind != "FRACTIONAL")
    theirs = np.asarray(volume.array).reshape(volume.array.shape[:3])  # (slices, rows, columns)
    image = read_image(path)
    assert sorted(np.unique(image.array)) == sorted(np.unique(theirs))
    for index in np.argwhere(theirs)[::5]:  # each voxel at its place in the patient
        place = LPS @ volume.affine @ [*index, 1]
        x, y, z, _ = np.rint(np.linalg.inv(image.affine) @ place).astype(int)
        assert image.array[x, y, z] == theirs[tuple(index)]


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"bigtiff": True}, {"imagej": True, "metadata": {"axes": "ZYX"}}],
)
def test_tifffile(options: dict[str, Any], tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", LABELS, **({} if "imagej" in options else {"photometric": "minisblack"}) | options
    )
    assert np.array_equal(read_image(tmp_path / "a.tif").array, tifffile.imread(tmp_path / "a.tif"))


def test_pillow(tmp_path: Path) -> None:
    """Numbers of grey pictures, and what Pillow itself reads as grey."""
    array = (LABELS[0] * 100).astype(np.uint8)
    for name, options in {
        "a.bmp": {}, "a.gif": {}, "a.webp": {"lossless": True}, "a.jp2": {}, "a.png": {}, "a.tif": {},
    }.items():  # fmt: skip
        PIL_Image.fromarray(array).save(tmp_path / name, **options)
        with PIL_Image.open(tmp_path / name) as picture:
            theirs = np.array(picture.convert("L"))
        assert np.array_equal(labels(tmp_path / name, read_image(tmp_path / name)), theirs), name
    colours = PIL_Image.fromarray(LABELS[0]).convert("P")
    colours.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 255])
    colours.putdata(LABELS[0].ravel().tolist())
    for name in ("p.bmp", "p.gif", "p.png"):
        colours.save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert np.array_equal(image.array, LABELS[0]), name
        assert image.palette is not None
        assert image.palette[1:3, :3].tolist() == [[200, 0, 0], [0, 0, 255]]
    wide = LABELS[0].astype(np.uint16) * 1000
    PIL_Image.fromarray(wide).save(tmp_path / "wide.jp2")
    assert np.array_equal(read_image(tmp_path / "wide.jp2").array, wide)


@pytest.mark.parametrize("name, options", [("a.webp", {"quality": 60}), ("a.jp2", {"irreversible": True})])
def test_lossy_pictures_are_images_and_no_labels(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    PIL_Image.fromarray(np.stack([LABELS[0] * 90] * 3, -1)).save(tmp_path / name, **options)
    image = read_image(tmp_path / name)
    assert image.shape == (6, 7)
    with pytest.raises(ValueError, match=rf"expected labels, got a lossy {name[1:]}, which changes them"):
        labels(tmp_path / name, image)


def test_an_animation_is_refused(tmp_path: Path) -> None:
    pictures = [PIL_Image.fromarray(LABELS[i] * 100) for i in range(3)]
    for name in ("a.gif", "a.webp"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
        with pytest.raises(ValueError, match="expected one picture, got an animation of 3"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("encoding", ["raw", "gzip", "ascii"])
@pytest.mark.parametrize("space", ["left-posterior-superior", "right-anterior-superior", "LAS"])
def test_pynrrd(encoding: str, space: str, tmp_path: Path) -> None:
    nrrd = package("nrrd")
    directions = np.array([[0.7, 0, 0], [0, 0, 0.9], [0, -2.5, 0]])
    header = {"space": space, "space directions": directions, "space origin": [1, 2, 3], "encoding": encoding}
    for suffix in (".nrrd", ".nhdr"):
        nrrd.write(str(tmp_path / f"a{suffix}"), LABELS, header, detached_header=suffix == ".nhdr")
        image, (theirs, said) = read_image(tmp_path / f"a{suffix}"), nrrd.read(str(tmp_path / f"a{suffix}"))
        assert np.array_equal(image.array, theirs)
        signs = {"left-posterior-superior": (-1, -1, 1), "LAS": (-1, 1, 1)}.get(space, (1, 1, 1))
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = said["space directions"].T, said["space origin"]
        assert image.affine == pytest.approx(np.diag([*signs, 1]) @ affine)


def test_slicerio(tmp_path: Path) -> None:
    slicerio = package("slicerio")
    affine = np.array([[0.7, 0, 0, 1], [0, 0.9, 0, 2], [0, 0, 2.5, 3], [0, 0, 0, 1]])
    made = slicerio.create_segmentation(LABELS.shape, affine)
    for label, name in ((1, "liver"), (2, "cyst")):
        slicerio.add_segment(made, label == LABELS, {"id": name, "name": name})
    slicerio.write_segmentation(str(tmp_path / "a.seg.nrrd"), made)
    image, theirs = read_image(tmp_path / "a.seg.nrrd"), slicerio.read_segmentation(str(tmp_path / "a.seg.nrrd"))
    assert image.names == {1: "liver", 2: "cyst"}
    for label, name in image.names.items():
        assert np.array_equal(
            image.array == label, slicerio.segment_mask(theirs, slicerio.segment_from_name(theirs, name))
        )
    assert image.affine == pytest.approx(LPS @ theirs["ijkToLPS"])
    slicerio.add_segment(made, LABELS > 0, {"id": "both", "name": "both"})  # in a layer of its own, as number 1
    slicerio.write_segmentation(str(tmp_path / "b.seg.nrrd"), made)
    assert "in 2 layers, for they overlap" in read_image(tmp_path / "b.seg.nrrd").no_labels
    parted = slicerio.read_segmentation(str(tmp_path / "b.seg.nrrd"))
    layer = parted["voxels"][1]
    layer[LABELS > 0] = 0
    layer[0, 0, 0] = 1
    parted["voxels"][0][0, 0, 0] = 0
    slicerio.write_segmentation(str(tmp_path / "c.seg.nrrd"), parted)
    image = read_image(tmp_path / "c.seg.nrrd")
    assert image.names == {1: "liver", 2: "cyst", 3: "both"}  # two are number 1 in their layers
    expected = LABELS.copy()
    expected[0, 0, 0] = 3
    assert np.array_equal(image.array, expected)
