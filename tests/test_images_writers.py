"""Files of the real writers, read as their writers' own readers say.

Packages that the environment of the other tests lacks come with `make test-formats`, where a missing one fails.
"""

from __future__ import annotations

import importlib
import json
import locale
import os
from collections.abc import Iterator
from contextlib import closing
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

from commands import refused, score  # noqa: E402
from test_images_faults import segmentation  # noqa: E402

from softdice.images.files import FileError, list_images, read_image  # noqa: E402
from softdice.images.labels import labels  # noqa: E402
from softdice.scoring.options import Options  # noqa: E402
from softdice.scoring.pair_scores import score_pair  # noqa: E402
from softdice.scoring.pairing import pair_files  # noqa: E402

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
    theirs_read = highdicom.seg.segread(str(path))
    with closing(theirs_read._db_con):  # highdicom leaves it open, and Python 3.13 warns
        volume = theirs_read.get_volume(combine_segments=kind != "FRACTIONAL")
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


MICROMETRES = {"z": 2.5, "y": 0.9, "x": 0.7}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ngff_zarr(version: str, tmp_path: Path) -> None:
    package("zarr")
    ngff = package("ngff_zarr")
    image = ngff.to_ngff_image(
        LABELS,
        ("z", "y", "x"),
        MICROMETRES,
        {"z": 5.0, "y": 0.0, "x": 1.0},
        axes_units=dict.fromkeys("zyx", "micrometer"),
    )
    ngff.to_ngff_zarr(str(tmp_path / "a.ome.zarr"), ngff.to_multiscales(image, [2]), version=version)
    theirs = ngff.from_ngff_zarr(str(tmp_path / "a.ome.zarr")).images[0]
    ours = read_image(tmp_path / "a.ome.zarr")
    assert np.array_equal(ours.array, np.asarray(theirs.data))
    assert ours.spacing_mm == pytest.approx((2.5e-3, 0.9e-3, 0.7e-3))
    assert ours.affine is not None
    assert (ours.affine @ [1, 2, 3, 1])[:3] == pytest.approx(np.array([1 + 3 * 0.7, 2 * 0.9, 5 + 2.5]) / 1000)


@pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning")  # a default of ome-zarr's own
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(version: str, tmp_path: Path) -> None:
    """An image of one channel with a label image inside, and that label image alone."""
    zarr, writer = package("zarr"), package("ome_zarr.writer")
    form = getattr(package("ome_zarr.format"), f"FormatV{version.replace('.', '')}")()
    root = zarr.open_group(str(tmp_path / "a.ome.zarr"), mode="w", zarr_format=form.zarr_format)
    how = {"scale_factors": [], "scale": MICROMETRES, "fmt": form}
    writer.write_image(LABELS[None] * 50, root, axes="czyx", **how | {"scale": {"c": 1.0, **MICROMETRES}})
    writer.write_labels(LABELS, root, "cells", axes="zyx", scaler=None, **how)
    image = read_image(tmp_path / "a.ome.zarr")
    assert image.array.shape == LABELS.shape
    assert "whose labels lie in its folder labels/: cells" in image.no_labels
    reader = package("ome_zarr.reader")
    (node,) = reader.Reader(package("ome_zarr.io").parse_url(str(tmp_path / "a.ome.zarr" / "labels" / "cells")))()
    ours = read_image(tmp_path / "a.ome.zarr" / "labels" / "cells")
    assert np.array_equal(ours.array, np.asarray(node.data[0]))
    assert np.array_equal(ours.array, LABELS)
    assert ours.spacing_mm is None  # the axes have no unit
    assert np.array_equal(ours.affine, image.affine)


@pytest.mark.parametrize("form", [2, 3])
def test_zarr(form: int, tmp_path: Path) -> None:
    zarr = package("zarr")
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=LABELS.shape, dtype=LABELS.dtype, chunks=(2, 3, 4), zarr_format=form
    )
    array[...] = LABELS
    assert np.array_equal(read_image(tmp_path / "a.zarr").array, LABELS)
    np.save(tmp_path / "a.npy", LABELS)
    assert (
        score_pair(tmp_path / "a.zarr", tmp_path / "a.npy", Options()).counts.tolist()
        == [[np.count_nonzero(k == LABELS) for k in (1, 2)]] * 3
    )
    for side in "pt":
        (tmp_path / side).mkdir()
        (tmp_path / "a.zarr").rename(tmp_path / side / "a.zarr") if side == "t" else np.save(
            tmp_path / "p/a.npy", LABELS
        )
    assert [pair.error for pair in pair_files(tmp_path / "p", tmp_path / "t")] == [""]
    assert list(list_images(tmp_path / "t")) == ["a"]
    zarr.open_group(str(tmp_path / "g.zarr"), mode="w", zarr_format=form).create_group("inner")
    with pytest.raises(ValueError, match="expected an array or OME-Zarr, got a group of inner"):
        read_image(tmp_path / "g.zarr")


CELLS = np.zeros((9, 12), np.uint8)
CELLS[1:4, 2:6], CELLS[5:8, 1:11] = 1, 7
"""Two rectangles of two categories."""


def coco(path: Path, annotations: list[dict[str, Any]], *, whole: bool = True) -> Path:
    """Annotations of two images, of which the second has none; as a data set, or as results."""
    images = [{"id": 5, "file_name": "left/a.jpg", "height": 9, "width": 12}]
    images += [{"id": 6, "file_name": "left/b.jpg", "height": 9, "width": 12}]
    categories = [{"id": 1, "name": "cell"}, {"id": 7, "name": "vessel"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content if whole else annotations))
    return path


def regions(mask: Any, form: str) -> list[dict[str, Any]]:
    """The rectangles of `CELLS` as polygons, as RLE, or as RLE that pycocotools compressed."""
    corners = {1: [2, 1, 6, 1, 6, 4, 2, 4], 7: [1, 5, 11, 5, 11, 8, 1, 8]}
    made = []
    for number, (label, polygon) in enumerate(corners.items()):
        runs = np.diff(np.flatnonzero(np.diff((label == CELLS).T.ravel(), prepend=0, append=0)), prepend=0).tolist()
        small = mask.encode(np.asfortranarray((label == CELLS).astype(np.uint8)))
        region = {
            "polygon": [polygon],
            "runs": {"size": [9, 12], "counts": [*runs, CELLS.size - sum(runs)]},
            "compressed": {"size": [9, 12], "counts": small["counts"].decode()},
        }[form]
        box = [polygon[0], polygon[1], polygon[2] - polygon[0], polygon[5] - polygon[1]]
        made.append({"id": number + 1, "image_id": 5, "category_id": label, "iscrowd": 0, "segmentation": region})
        made[-1] |= {"bbox": box, "area": int((label == CELLS).sum())}
    return made


def test_axes_of_the_oldest_ome_zarr(tmp_path: Path) -> None:
    """Versions 0.1 and 0.2 have the axes t, c, z, y, x, and do not name them."""
    group = package("zarr").open_group(str(tmp_path / "a.ome.zarr"), mode="w", zarr_format=2)
    group.create_array("0", shape=(1, 1, *LABELS.shape), dtype=LABELS.dtype)[0, 0] = LABELS
    group.attrs["multiscales"] = [{"version": "0.1", "datasets": [{"path": "0"}]}]
    image = read_image(tmp_path / "a.ome.zarr")
    assert image.place.axes == "zyx"
    assert np.array_equal(image.array, LABELS)
    group.attrs["multiscales"] = [{"axes": [], "datasets": [{}]}]
    with pytest.raises(FileError, match="'path' is missing"):
        read_image(tmp_path / "a.ome.zarr")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
@pytest.mark.parametrize("form", ["polygon", "runs", "compressed"])
def test_coco(form: str, tmp_path: Path) -> None:
    mask = package("pycocotools.mask")
    truth = coco(tmp_path / "t.json", regions(mask, form))
    theirs = package("pycocotools.coco").COCO(str(truth))
    for number, stem in ((5, "a"), (6, "b")):
        image = read_image(truth / str(number))
        expected = np.zeros_like(CELLS)
        for each in theirs.loadAnns(theirs.getAnnIds(number)):
            expected[theirs.annToMask(each) > 0] = each["category_id"]
        assert np.array_equal(image.array, expected)
        assert np.array_equal(image.array, CELLS if stem == "a" else CELLS * 0)
    assert read_image(truth / "5").names == {1: "cell", 7: "vessel"}


def test_coco_is_scored_as_a_folder_of_images(tmp_path: Path) -> None:
    mask = package("pycocotools.mask")
    annotations = regions(mask, "compressed")
    truth = coco(tmp_path / "t.json", annotations)
    results = coco(tmp_path / "p.json", [each | {"score": 0.9} for each in annotations[:1]], whole=False)
    (tmp_path / "masks").mkdir()
    for stem, array in (("a", CELLS), ("b", CELLS * 0)):
        PIL_Image.fromarray(array).save(tmp_path / "masks" / f"{stem}.png")
    for prediction, dice in ((results, [1, 0]), (tmp_path / "masks", [1, 1])):
        done = score(prediction, truth, "--format", "json", "--missing", "0", "--labels", "1,7")
        first, second = json.loads(done.stdout)["results"][0]["cases"]
        assert [row["dice"] for row in first["classes"]] == dice
        assert second["classes"][0]["n_ref"] == 0
    done = score(truth, tmp_path / "masks", "--format", "json")
    assert done.exit_code == 0
    assert [case["case"] for case in json.loads(done.stdout)["results"][0]["cases"]] == ["a", "b"]
    refused(score(truth, truth, "--layout", "classes"), "expected two folders, got a file of many images")
    refused(score(truth, tmp_path / "masks", "--out", truth), "--out: expected a file that is not read")


def test_coco_without_results_and_with_objects(tmp_path: Path) -> None:
    """An empty list of results is a prediction without masks; numbers are categories, and no objects."""
    truth = coco(tmp_path / "t.json", regions(package("pycocotools.mask"), "polygon"))
    (tmp_path / "p.json").write_text("[]")
    done = score(tmp_path / "p.json", truth, "--format", "json", "--missing", "0")
    assert json.loads(done.stdout)["results"][0]["overall"]["macro_dice"] == 0
    done = score(truth, truth, "--instances")
    assert done.exit_code == 1
    assert "--instances: expected a map of objects, got annotations by category. Draw each" in done.stderr


def test_coco_that_does_not_say_what_counts(tmp_path: Path) -> None:
    mask = package("pycocotools.mask")
    first, second = regions(mask, "compressed")
    both = coco(tmp_path / "a.json", [first, second | {"segmentation": first["segmentation"]}])
    assert "annotations of several categories that overlap in 12 pixels" in read_image(both / "5").no_labels
    for annotation, said in (
        (first | {"score": 0.3}, "expected annotations that all count, got scores down to 0.3. Leave out the low ones"),
        (first | {"segmentation": []}, "expected a segmentation and a category above 0"),
        (first | {"segmentation": {"size": [5, 5], "counts": [25]}}, "damaged: a segmentation of size"),
    ):
        path = coco(tmp_path / "b.json", [annotation])
        with pytest.raises(ValueError, match=said):
            read_image(path / "5")
        path.unlink()
    (tmp_path / "c.json").write_text('{"labels": {"liver": 1}}')
    refused(score(tmp_path / "c.json", both), "expected annotations of COCO, got JSON where 'annotations' is missing")
