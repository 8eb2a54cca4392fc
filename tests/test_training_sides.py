"""Left and right, missing data, turned photographs, numbered objects: what training must not learn wrongly."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("monai")
pytest.importorskip("typer")
pytest.importorskip("nibabel")
pytest.importorskip("tifffile")

import nibabel
import tifffile
from commands import call, refused
from PIL import Image
from typer.testing import CliRunner

from softdice.cli.app import app
from softdice.evaluation.colours import EXTRA, MISSED, RIGHT
from softdice.images.files import FileError, read_image
from softdice.training import TrainConfig, TrainingError, pictures, predict, run, train
from softdice.training.cases import Case, Cases, read_folder
from softdice.training.channels import lonely_value
from softdice.training.checkpoint import load_checkpoint, save_checkpoint
from softdice.training.patches import Patches, choose_mirror
from softdice.training.places import are_objects, exchanged, places

pytestmark = pytest.mark.usefixtures("one_thread")


def write_pairs(folder: Path, suffix: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Path:
    for number, pair in enumerate(pairs):
        for part, array in zip(("images", "labels"), pair, strict=True):
            (folder / part).mkdir(parents=True, exist_ok=True)
            path = folder / part / f"{number}{suffix}"
            if suffix == ".npy":
                np.save(path, array)
            elif suffix == ".png":
                Image.fromarray(array).save(path)
            else:
                nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return folder


# --- left and right


def discs(*centres: tuple[int, int, int], shape: tuple[int, int] = (32, 64)) -> np.ndarray:
    """Return a label map with a disc of radius 4 around (row, column) for each number."""
    label, (row, column) = np.zeros(shape, np.uint8), np.mgrid[: shape[0], : shape[1]]
    for number, r, c in centres:
        label[(row - r) ** 2 + (column - c) ** 2 <= 16] = number
    return label


SIDES: dict[str, tuple[list[np.ndarray], tuple[int, int] | None]] = {
    "always in this order, anywhere": ([discs((5, 12, c), (2, 14, c + 12)) for c in (6, 20, 40)], (5, 2)),
    "one in each image": ([discs((1, 16, 12)), discs((2, 16, 50)), discs((1, 9, 14)), discs((2, 9, 48))], (1, 2)),
    "in either order": ([discs((1, 16, a), (2, 16, 63 - a)) for a in (12, 51)], None),
    "one above the other": ([discs((1, 6, c), (2, 24, c + 10)) for c in (8, 40)], None),
    "one within the other": ([discs((1, 16, 31)) + (np.indices((32, 64))[1] == 31) * discs((1, 16, 31))], None),
    "one class on one side": ([discs((1, 16, c)) for c in (8, 12, 14)], None),
    "halves without a background": ([np.repeat([[3, 4]], 8, 0).repeat(8, 1)] * 2, (3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", SIDES)
def test_classes_that_exchange_places_are_seen(name: str) -> None:
    labels, expected = SIDES[name]
    assert exchanged([places(label) for label in labels], 1) == expected
    assert exchanged([places(label.T) for label in labels], 0) == expected


def test_a_picture_is_mirrored_unless_two_classes_exchange_places(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 99, (32, 64)).astype(np.uint8)
    folder = write_pairs(tmp_path, ".png", [(noise, discs((1, 12, c), (2, 12, c + 14))) for c in (8, 20, 30)])
    assert choose_mirror(read_folder(folder), [0, 1, 2])[0] == "none"
    result = call("train", folder, "--out", tmp_path / "a", "--loss", "ce", "--max-steps", 1, "--batch-size", 1)
    why = "label 1 lies left of label 2, and both would change places"
    assert f"not mirrored ({why}; --mirror decides)" in result.output
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["mirror"] == "none"
    again = call("train", "--out", tmp_path / "a", "--resume", "--max-steps", 2)
    assert again.exit_code == 0, again.output
    assert "not mirrored (label 1" in again.output
    refused(call("train", "--out", tmp_path / "a", "--resume", "--mirror", "x"), "expected mirror none, with which")
    result = call("train", folder, "--out", tmp_path / "b", "--loss", "ce", "--max-steps", 1, "--mirror", "xy")
    assert "Augmentation: patches are mirrored along x, y, turned by up to 15 degrees" in result.output
    for axes, said in (
        ("z", "axes of 2-D images, x, y, got z"),
        ("xx", "none, or axes among x, y and z"),
        ("q", "got q"),
    ):
        refused(call("train", folder, "--out", tmp_path / "c", "--loss", "ce", "--mirror", axes), said)


@pytest.mark.parametrize(
    ("axes", "mirror", "expected"),
    [
        ("zyx", None, []),
        ("zyx", "x", [2]),
        ("RAS", "x", [0]),
        ("RAS", "xz", [0, 2]),
        ("yx", None, [1]),
        ("yx", "y", [0]),
    ],
)
def test_the_axis_that_a_letter_names_is_mirrored(axes: str, mirror: str | None, expected: list[int]) -> None:
    ndim = 2 if axes == "yx" else 3
    shape = (8,) * ndim
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    case = Case("a", image, np.zeros(shape, np.uint8))
    cases = Cases(["a"], [0, 1], ["a", "b"], ndim, 1, [shape], lambda number: case, axes=axes)
    flips = Patches(cases, [0], shape, 0, mirror).augment.transforms[: len(expected)]
    kinds = [type(each).__name__ for each in Patches(cases, [0], shape, 0, mirror).augment.transforms]
    assert kinds.count("RandFlipd") == len(expected)
    for flip, axis in zip(flips, expected, strict=True):
        flip.prob = 1.0
        mirrored = flip({"image": image, "label": image})["image"]
        assert np.array_equal(np.asarray(mirrored), np.flip(image, axis + 1))


# --- orientation


def ball(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume with a ball, RAS, and a label of its front half."""
    rng, (x, y, z) = np.random.default_rng(number), np.mgrid[:20, :28, :12]
    cx, cy, cz = rng.integers(8, 12), rng.integers(10, 18), rng.integers(5, 7)
    inside = (x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < 24
    return (100 * inside + rng.integers(0, 20, x.shape)).astype(np.int16), np.uint8(inside & (y > cy))


AFFINE = np.array([[1.0, 0.05, 0, -20], [-0.05, 1, 0, 7], [0, 0, 2, 3], [0, 0, 0, 1]])


def stored_as(codes: str, array: np.ndarray) -> Any:
    """Return a volume that is RAS with its axes in another order, at the same place."""
    image = nibabel.Nifti1Image(array, AFFINE)
    orientation = nibabel.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(AFFINE), orientation))


def as_itk(path: Path, image: Any) -> Path:
    sitk = pytest.importorskip("SimpleITK")
    array, affine = np.asarray(image.dataobj), np.diag([-1, -1, 1, 1]) @ image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    picture = sitk.GetImageFromArray(array.T)
    picture.SetSpacing(spacing.tolist())
    picture.SetOrigin(affine[:3, 3].tolist())
    picture.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(picture, str(path))
    return path


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of RAS volumes, in which the front is labelled."""
    folder = tmp_path_factory.mktemp("volumes")
    for number in range(4):
        for part, array in zip(("images", "labels"), ball(number), strict=True):
            (folder / part).mkdir(exist_ok=True)
            nibabel.save(stored_as("RAS", array), folder / part / f"{number}.nii.gz")
    train(TrainConfig(data=str(folder), out=str(folder / "out"), loss="dice", max_steps=40, batch_size=2, seed=1))
    return folder / "out" / "model.ckpt"


@pytest.mark.parametrize("kind", ["LPS.nii.gz", "ASR.nii", "PIR.nii.gz", "SAL.nii", "RAS.nrrd", "LPS.mha", "IPL.nrrd"])
def test_a_volume_has_its_mask_whatever_the_order_in_which_it_is_stored(
    kind: str, volumes: Path, tmp_path: Path
) -> None:
    array, label = ball(9)
    nibabel.save(stored_as("RAS", array), tmp_path / "ras.nii.gz")
    codes, suffix = kind.split(".", 1)
    path = tmp_path / f"other.{suffix}"
    other = stored_as(codes, array)
    as_itk(path, other) if suffix in ("nrrd", "mha") else nibabel.save(other, path)
    (plain,) = predict(volumes, tmp_path / "ras.nii.gz", tmp_path / "a")
    (mask,) = predict(volumes, path, tmp_path / "b")
    image = read_image(mask)
    assert image.shape == other.shape
    np.testing.assert_allclose(image.affine, read_image(path).affine, atol=1e-6)
    assert image.affine is not None
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(image.array.astype(np.uint8), image.affine))
    expected = read_image(plain).array
    assert np.array_equal(np.asarray(turned.dataobj), expected)  # not one voxel differs
    assert (expected & label).sum() > 0.9 * label.sum()  # a mask of something
    assert expected.mean() < 0.1


def test_training_brings_volumes_and_labels_to_one_orientation(tmp_path: Path) -> None:
    pairs = (("RAS", "RAS"), ("LPS", "LPS"), ("ASR", "RAS"), ("RPI", "SAL"))
    for number, codes in enumerate(pairs):
        for part, array, code in zip(("images", "labels"), ball(3), codes, strict=True):
            (tmp_path / part).mkdir(exist_ok=True)
            nibabel.save(stored_as(code, array), tmp_path / part / f"{number}.nii.gz")
    cases = read_folder(tmp_path)
    assert cases.axes == "RAS"
    for number in range(4):
        assert np.array_equal(cases[number].label, ball(3)[1])
        assert np.array_equal(cases[number].image, cases[0].image)


def test_with_ignored_geometry_a_label_is_turned_as_its_image(tmp_path: Path) -> None:
    for number in range(2):
        for part, array in zip(("images", "labels"), ball(number), strict=True):
            (tmp_path / part).mkdir(exist_ok=True)
            image = stored_as("LPS", array)
            if part == "labels":
                image = nibabel.Nifti1Image(image.dataobj, np.eye(4))
            nibabel.save(image, tmp_path / part / f"{number}.nii.gz")
    with pytest.raises(FileError, match=r"got RAS voxels.* elsewhere than the LPS voxels"):
        read_folder(tmp_path)
    assert np.array_equal(read_folder(tmp_path, ignore_geometry=True)[1].label, ball(1)[1])


def test_volumes_with_and_without_a_place_are_not_mixed(volumes: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path, ".npy", [ball(0), ball(1)])
    for part, array in zip(("images", "labels"), ball(1), strict=True):
        (tmp_path / part / "1.npy").unlink()
        nibabel.save(stored_as("RAS", array), tmp_path / part / "1.nii")
    with pytest.raises(TrainingError, match=r"1\.nii: expected an image with its axes in the order z, y, x, as 0\.npy"):
        read_folder(tmp_path)
    result = call("predict", volumes, tmp_path / "images", tmp_path / "out")
    assert result.exit_code == 1
    assert (
        "0.npy: expected an image that says how its voxels lie in a patient, as those of the training" in result.stderr
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.nii"]


def test_a_model_that_does_not_say_how_its_volumes_lay_says_so(volumes: Path, tmp_path: Path) -> None:
    content = load_checkpoint(volumes)
    for name in ("orientation", "augmentation"):
        del content["data"][name]
    del content["settings"]["mirror"]
    save_checkpoint(tmp_path / "model.ckpt", content)
    nibabel.save(stored_as("LPS", ball(9)[0]), tmp_path / "a.nii")
    result = call("predict", tmp_path / "model.ckpt", tmp_path / "a.nii", tmp_path / "out")
    assert result.exit_code == 0
    assert "does not say how the volumes of its training lie: images are taken as they are stored" in result.stderr
    data = volumes.parent.parent
    refused(call("train", data, "--out", tmp_path, "--resume"), "which took them as they were stored. Start a new one")


def test_columns_and_rows_of_a_picture_do_not_depend_on_its_format(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    array = np.random.default_rng(0).integers(0, 255, (16, 24)).astype(np.uint8)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
        for name in "ab":
            sitk.WriteImage(
                sitk.GetImageFromArray(array // (1 if part == "images" else 128)), f"{tmp_path / part / name}.mha"
            )
    cases = read_folder(tmp_path)
    assert cases.axes == "yx"
    assert np.array_equal(cases[0].label, array // 128)
    assert choose_mirror(cases, [0, 1])[0] == "none"  # of a patient


# --- missing data


@pytest.mark.parametrize(("value", "dtype"), [(-9999.0, np.float32), (65535.0, np.uint16), (-3.4028235e38, np.float32)])
def test_what_the_tag_of_gdal_names_is_no_intensity(value: float, dtype: type, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for name in "ab":
        array = rng.integers(100, 200, (24, 24)).astype(dtype)
        array[:6] = dtype(value)
        words = f"{value:.17g}"
        tifffile.imwrite(tmp_path / "images" / f"{name}.tif", array, extratags=[(42113, "s", 0, words, True)])
        tifffile.imwrite(tmp_path / "labels" / f"{name}.tif", (array > 150).astype(np.uint8))
    cases = read_folder(tmp_path)
    assert cases.lonely == {}
    image = cases[1].image[0]
    assert (image[:6] == image.min()).all()
    assert image[6:].std() > 0.5  # -9999 would leave 0.01


def test_a_value_far_from_all_others_is_named_and_left_out_on_request(tmp_path: Path) -> None:
    rng, pairs = np.random.default_rng(0), []
    for _ in range(4):
        label = discs((1, *rng.integers(10, 22, 2)), shape=(32, 32))
        image = (label + rng.normal(0.3, 0.1, label.shape)).astype(np.float32)
        image[:5], label[:5] = -32768, 0
        pairs.append((image, label))
    data, out = write_pairs(tmp_path / "d", ".npy", pairs), tmp_path / "o"
    options = ("--loss", "dice", "--max-steps", 30, "--batch-size", 4)
    result = call("train", data, "--out", out, "--loss", "dice", "--max-steps", 1)
    assert (
        "The value -32768 holds up to 16% of the voxels of 4 images (0, 1, 2, ...) and lies far from" in result.output
    )
    assert "start again with --nodata -32768" in result.output
    result = call("train", data, "--out", out, *options, "--nodata", -32768)
    assert "lies far from" not in result.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mean_dice"] > 0.8
    predict(out / "model.ckpt", data / "images", tmp_path / "masks")
    (name,) = summary["held_out"]
    mask, label = np.load(tmp_path / "masks" / f"{name}.npy"), np.load(data / "labels" / f"{name}.npy")
    assert 2 * (mask & label).sum() / (mask.sum() + label.sum()) == pytest.approx(summary["mean_dice"])


@pytest.mark.parametrize(
    "image",
    [
        np.repeat([0, 255], 50),  # two values
        np.r_[np.zeros(50), np.linspace(1, 100, 50)],  # a background
        np.r_[-9999.0, np.linspace(0, 1, 99)],  # one voxel
        np.full(9, 3.0), np.full(9, np.nan),
    ],
)  # fmt: skip
def test_no_value_is_named_where_none_is_far(image: np.ndarray) -> None:
    assert lonely_value([image]) is None


# --- photographs that carry a turn


@pytest.mark.parametrize("tag", [3, 6, 8])
def test_masks_of_turned_photographs_lie_as_they_are_shown(tag: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = tag
    stored = {3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a, 1), 8: lambda a: np.rot90(a, -1)}[tag]
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number in range(5):
        mask = np.zeros((24, 32), np.uint8)
        mask[3:12, 3 + 2 * number : 14 + 2 * number] = 1
        picture = Image.fromarray(np.ascontiguousarray(stored(mask * 200 + 20)))
        picture.save(tmp_path / "images" / f"{number}.jpg", exif=exif, quality=95)
        Image.fromarray(mask).save(tmp_path / "labels" / f"{number}.png")
    config = TrainConfig(data=str(tmp_path), out=str(tmp_path / "o"), loss="dice", max_steps=24, batch_size=2)
    assert (train(config)["mean_dice"] or 0) > 0.9
    for path in predict(tmp_path / "o" / "model.ckpt", tmp_path / "images", tmp_path / "masks"):
        mask, label = (np.asarray(Image.open(folder / path.name)) for folder in (path.parent, tmp_path / "labels"))
        assert 2 * (mask & label).sum() / (mask.sum() + label.sum()) > 0.9


# --- numbered objects


def cells(count: int, seed: int, first: int = 1, order: str = "random") -> np.ndarray:
    """Return discs of radius 2 at random places of a grid, numbered from `first` in this order."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(100)[:count]
    chosen = np.sort(chosen) if order == "raster" else chosen
    label, (row, column) = np.zeros((80, 80), np.uint16), np.mgrid[:80, :80]
    for number, cell in enumerate(chosen, first):
        label[(row - 4 - 8 * (cell // 10)) ** 2 + (column - 4 - 8 * (cell % 10)) ** 2 <= 5] = number
    return label


OBJECTS: dict[str, tuple[list[np.ndarray], bool]] = {
    "numbered anyhow, from 1": ([cells(n, n) for n in (14, 40, 33)], True),
    "numbered in the order of their voxels": ([cells(n, n, order="raster") for n in (30, 30)], True),
    "numbered through all images": ([cells(20, n, 1 + 20 * n) for n in range(4)], True),
    "the same organs at the same places": ([cells(30, 1), cells(30, 1), cells(30, 1)], False),
    "five organs": ([cells(5, n) for n in range(4)], False),
    "layers": ([np.arange(1, 41).repeat(2)[:, None].repeat(80, 1)] * 2, False),
    "classes of many pieces": ([1 + cells(60, n).astype(int) % 12 for n in range(3)], False),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_numbers_of_objects_are_told_from_classes(name: str) -> None:
    labels, expected = OBJECTS[name]
    assert are_objects([places(label).without(0) for label in labels]) == expected


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, np.uint64])
def test_places_of_integers_of_any_type(dtype: type) -> None:
    extremes = [0, 1] if dtype is bool else [np.iinfo(dtype).min, 3, np.iinfo(dtype).max - 1]
    label = np.random.default_rng(0).choice(np.array(extremes, dtype), (7, 9))
    where = places(label)
    numbers, first = np.unique(label, return_index=True)
    assert np.array_equal(where.numbers, numbers)
    assert np.array_equal(where.first, first)
    for number, centre, deviation in zip(numbers, where.centre, where.deviation, strict=True):
        voxels = np.argwhere(label == number)
        np.testing.assert_allclose([centre, deviation], [voxels.mean(0), voxels.std(0)])


def test_instance_maps_are_refused_and_trained_as_one_class(tmp_path: Path) -> None:
    labels = [cells(20 + n, n) for n in range(4)]
    data, out = write_pairs(tmp_path, ".png", [(np.uint8(150 * (each > 0)), each) for each in labels]), tmp_path / "o"
    result = call("train", data, "--out", out, "--loss", "dice")
    refused(result, "expected a number for each class, got 23 so far, which seem to count objects", "--no-foreground")
    assert not out.exists()
    assert len(read_folder(data, foreground=False).values) == 24
    options = ("--loss", "dice", "--max-steps", 24, "--batch-size", 2, "--foreground")
    result = call("train", data, "--out", out, *options)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    assert [row["name"] for row in summary["classes"]] == ["background", "foreground"]
    assert summary["mean_dice"] > 0.8
    (mask, *_) = predict(out / "model.ckpt", data / "images", tmp_path / "masks")
    assert set(np.unique(read_image(mask).array)) == {0, 1}


def test_more_objects_than_classes_may_be_are_objects_too(tmp_path: Path) -> None:
    pairs = [(label, label) for label in (cells(100, n, 1 + 100 * n) for n in range(4))]
    data = write_pairs(tmp_path, ".npy", pairs)
    with pytest.raises(TrainingError, match=r"got 300 so far, which seem to count objects\. Pass --foreground"):
        read_folder(data)
    assert read_folder(data, foreground=True, ignore=1).values == [0, 2]


def test_places_belong_to_their_cases_where_one_volume_alone_may_hold_objects(tmp_path: Path) -> None:
    layers = np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None], (4, 24, 16))
    data = write_pairs(tmp_path, ".npy", [(layers, each) for each in (layers // 12, layers, layers // 12)])
    cases = read_folder(data)
    assert [*cases.places] == [1]
    assert choose_mirror(replace(cases, spatial_ndim=2), [0, 2]) == ("x", "")


def test_numbers_that_dataset_json_names_are_classes(tmp_path: Path) -> None:
    for number in range(2):
        for part in ("imagesTr", "labelsTr"):
            (tmp_path / part).mkdir(exist_ok=True)
            np.save(tmp_path / part / f"{number}.npy", cells(20, number, order="raster"))
    with pytest.raises(TrainingError, match="seem to count objects"):
        read_folder(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {f"organ {n}": n for n in range(21)}}))
    assert len(read_folder(tmp_path).values) == 21


# --- what a run that ends early says


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    pairs = [(discs((1, 16, c)) * 2.0 + rng.normal(size=(32, 64)), discs((1, 16, c))) for c in (12, 30, 50)]
    return write_pairs(tmp_path_factory.mktemp("some data"), ".npy", pairs)


def following(result: Any) -> str:
    """Return the command that a run that ended early tells."""
    return re.split(r"To go on: |Start again with: ", result.stderr.strip())[1]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_stopped_run_says_what_it_saved_and_the_whole_command(
    epoch: int, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Patches.__getitem__

    def stopped(self: Patches, key: tuple[int, int]) -> Any:
        if key[0] == epoch:
            raise KeyboardInterrupt
        return right(self, key)

    monkeypatch.setattr(Patches, "__getitem__", stopped)
    arguments = ["train", str(squares), "--out", str(tmp_path / "my run"), "--loss", "ce"]
    arguments += ["--epochs", "3", "--batch-size", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130, result.output
    saved = f"Saved: epoch {epoch}, in {tmp_path / 'my run' / 'model.ckpt'}. To go on:"
    assert result.stderr.startswith("Stopped. " + (saved if epoch else "Nothing was saved. Start again with:"))
    command = shlex.split(following(result))
    assert sorted(command) == sorted(["softdice", *arguments, *["--resume"] * (epoch > 0)])
    monkeypatch.setattr(Patches, "__getitem__", right)
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert len(load_checkpoint(tmp_path / "my run" / "model.ckpt")["history"]) == 3


def test_an_earlier_run_in_the_folder_is_not_what_was_saved(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("train", squares, "--out", tmp_path, "--loss", "ce", "--max-steps", 1, "--batch-size", 1).exit_code == 0

    def stopped(*rest: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "read_folder", stopped)
    result = call("train", squares, "--out", tmp_path, "--no-foreground", "--round")
    assert result.stderr.startswith("Stopped. Nothing was saved. Start again with: softdice train")
    assert "--round" in following(result)
    assert "--no-foreground" in following(result)
    result = call("train", "--out", tmp_path, "--resume", "--max-steps", 5)
    assert result.stderr.startswith(f"Stopped. Saved: in {tmp_path / 'model.ckpt'}. To go on: softdice train --out")
    words = ["softdice", "train", "--out", str(tmp_path), "--resume", "--max-steps", "5"]
    assert sorted(shlex.split(following(result))) == sorted(words)


def test_an_error_says_what_was_saved(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Patches.__getitem__
    problems: list[Exception] = [OSError(28, "No space left on device"), MemoryError("too much")]
    for problem, said in zip(problems, ("To go on: softdice train", "Start again with: softdice train"), strict=True):

        def failing(self: Patches, key: tuple[int, int], problem: Exception = problem) -> Any:
            if key[0] == 1:
                raise TrainingError(str(problem)) if isinstance(problem, OSError) else problem
            return right(self, key)

        monkeypatch.setattr(Patches, "__getitem__", failing)
        out = tmp_path / type(problem).__name__
        result = call("train", squares, "--out", out, "--loss", "ce", "--epochs", 2, "--batch-size", 1)
        refused(result, f"Saved: epoch 1, in {out / 'model.ckpt'}. {said}", "--epochs 2")
        assert ("--resume" in following(result)) == isinstance(problem, OSError)
    result = call("train", squares, "--out", tmp_path / "c", "--loss", "ce", "--lr", 1e30, "--batch-size", 1)
    refused(result, "expected a finite loss", "Nothing was saved. Start again with: softdice train")
    result = call("train", tmp_path / "nowhere", "--out", tmp_path / "d")
    assert "saved" not in result.stderr


def test_a_process_says_at_once_that_it_loads_and_ends_by_ctrl_c(squares: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "softdice", "train", str(squares), "--out", str(tmp_path / "o"), "--epochs", "9"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "Loading ...\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    # `python -m` ends by the signal where it came while `exec` ran a text, as in dataclasses; a shell calls both 130
    assert process.returncode in (130, -signal.SIGINT)
    assert stderr == (
        f"Stopped. Nothing was saved. Start again with: "
        f"{shlex.join(['softdice', 'train', str(squares), '--out', str(tmp_path / 'o'), '--epochs', '9'])}\n"
    )


# --- pictures


def test_pictures_mark_what_was_found_missed_and_invented(tmp_path: Path) -> None:
    image, truth, prediction = np.zeros((1, 4, 4), np.float32), np.zeros((4, 4), int), np.zeros((4, 4), int)
    truth[0], prediction[0, :2], prediction[1, 0], prediction[0, 3] = 1, 1, 1, 2
    marked = pictures._marked(image[0], truth, prediction) * 255
    for place, colour, share in (((0, 0), RIGHT, 0.35), ((0, 2), MISSED, 0.65), ((1, 0), EXTRA, 0.65)):
        assert marked[place] == pytest.approx(np.array(colour) * share)
    assert marked[3, 3].tolist() == [0, 0, 0]
    assert len({tuple(marked[place]) for place in ((0, 0), (0, 2), (0, 3), (1, 0))}) == 4
    shown = pictures.Shown("a", 0.5, image, truth, prediction)
    for cases in ([shown], [shown] * 3):
        (tmp_path / "o.png").write_bytes(pictures.overlays(cases, cases, ["a", "b", "c"]))
        assert read_image(tmp_path / "o.png").shape == (900, 1600)


def test_a_slice_of_a_patient_has_the_front_up_and_the_left_at_the_right() -> None:
    truth = np.zeros((4, 6, 3), int)
    truth[3, 5, 1] = 1  # right, front
    shown = pictures.Shown("a", 1.0, truth[None].astype(np.float32), truth, truth, "RAS")
    _, plane, _, where = pictures._plane(shown)
    assert (plane.shape, np.argwhere(plane).tolist(), where) == ((6, 4), [[0, 0]], ", slice 1 of 3")
    stack = pictures.Shown("a", 1.0, truth[None].astype(np.float32), truth, truth, "zyx")
    assert np.argwhere(pictures._plane(stack)[1]).tolist() == [[5, 1]]


def test_a_large_picture_is_thinned_out_before_it_is_drawn() -> None:
    image = np.zeros((3, 9, 3 * pictures.LONGEST_SIDE), np.float32)
    drawn = pictures._plane(pictures.Shown("a", 1.0, image, image[0].astype(int), image[0].astype(int)))
    assert [part.shape[:2] for part in drawn[:3]] == [(3, pictures.LONGEST_SIDE)] * 3
