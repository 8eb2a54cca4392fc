"""Which files belong together, how their channels are scaled, and what a folder of another layout is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("monai")
pytest.importorskip("typer")
pytest.importorskip("nibabel")

import nibabel
from commands import call, refused
from PIL import Image

from softdice.images.files import FileError, read_image
from softdice.training import TrainConfig, TrainingError, predict, train
from softdice.training.cases import read_folder
from softdice.training.channels import PERCENTILES, scaled
from softdice.training.checkpoint import load_checkpoint, save_checkpoint
from softdice.training.layout import find_layout

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (16, 16, 8)
JSON_2 = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
JSON_1 = {"modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "1": "lesion"}}


def volumes(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Two channels, the second a thousand times the first, and a label that is bright in both."""
    rng = np.random.default_rng(number)
    label = np.zeros(SHAPE, np.uint8)
    label[4:10, 4:12, 2:6] = 1
    image = rng.normal(size=(2, *SHAPE)) + 4 * label
    return (image * np.array([1, 1000])[:, None, None, None]).astype(np.float32), label


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def nnunet(folder: Path, declared: dict[str, Any] | None = JSON_2, count: int = 4) -> Path:
    """As nnU-Net keeps it: a file per channel."""
    for number in range(count):
        image, label = volumes(number)
        for channel in (0, 1):
            nifti(folder / "imagesTr" / f"case_{number}_{channel:04d}.nii.gz", image[channel])
        nifti(folder / "labelsTr" / f"case_{number}.nii.gz", label)
    if declared is not None:
        (folder / "dataset.json").write_text(json.dumps(declared))
    return folder


def one_file(folder: Path, count: int = 4) -> Path:
    """The same with the channels on a fourth axis."""
    for number in range(count):
        image, label = volumes(number)
        nifti(folder / "images" / f"{number}.nii.gz", np.moveaxis(image, 0, -1))
        nifti(folder / "labels" / f"{number}.nii.gz", label)
    return folder


def pictures(folder: Path, images: str, labels: str, name: str = "{}", label_name: str = "{}") -> Path:
    """Three pictures and their masks, under these names."""
    for number in "abc":
        for part, called in ((images, name), (labels, label_name)):
            path = folder / part / f"{called.format(number)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.eye(24, dtype=np.uint8)).save(path)
    return folder


# --- channels


def test_channels_of_volumes_are_scaled_each_by_itself(tmp_path: Path) -> None:
    cases = read_folder(one_file(tmp_path))
    assert not cases.joint
    image, stored = cases[0].image, volumes(0)[0]
    for channel in image:  # what lies between the percentiles sets the scale; the rest keeps its order
        between = np.clip(channel, *np.percentile(channel, PERCENTILES))
        np.testing.assert_allclose([between.mean(), between.std()], [0, 1], atol=1e-4)
    np.testing.assert_allclose(image[0], scaled(stored[:1], joint=True)[0], atol=1e-5)


def test_colours_of_a_picture_keep_their_proportions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        for part in ("images", "labels"):
            (tmp_path / part).mkdir(exist_ok=True)
        array = rng.integers(0, 40, (20, 20, 3)).astype(np.uint8) * np.array([5, 1, 0], np.uint8)
        Image.fromarray(array).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(np.eye(20, dtype=np.uint8)).save(tmp_path / "labels" / f"{name}.png")
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(tmp_path / "images" / "b.png")  # grey
    cases = read_folder(tmp_path)
    assert cases.joint
    red, green, blue = cases[0].image
    assert red.std() / green.std() == pytest.approx(5, rel=0.1)
    assert blue.std() == 0
    assert cases.empty == {}  # a picture without blue is one


def test_a_channel_that_only_some_images_have_is_refused(tmp_path: Path) -> None:
    folder = one_file(tmp_path)
    nifti(folder / "images" / "2.nii.gz", volumes(2)[0][0])
    with pytest.raises(TrainingError, match=r"2\.nii\.gz: expected 2 channels as in the other images, got 1"):
        read_folder(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of images of two channel files, and its data."""
    folder = nnunet(tmp_path_factory.mktemp("nnunet"))
    out = tmp_path_factory.mktemp("run")
    train(TrainConfig(data=str(folder), out=str(out), loss="dice", max_steps=1, batch_size=1))
    return out / "model.ckpt", folder


def test_a_prediction_scales_as_the_training_did(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softdice.training import inference

    checkpoint, folder = model
    right, seen = inference.logits_of, []
    monkeypatch.setattr(
        inference,
        "logits_of",
        lambda network, image, patch: seen.append(image.numpy()) or right(network, image, patch),
    )
    masks = predict(checkpoint, folder / "imagesTr", tmp_path / "masks")
    assert [path.name for path in masks] == [f"case_{number}.nii.gz" for number in range(4)]
    np.testing.assert_array_equal(read_image(masks[0]).affine, np.eye(4))
    cases = read_folder(folder)
    for number, image in enumerate(seen):
        np.testing.assert_array_equal(image, cases[number].image)
    (mask,) = predict(checkpoint, folder / "imagesTr" / "case_2_0001.nii.gz", tmp_path / "one")
    assert mask == tmp_path / "one" / "case_2.nii.gz"
    np.testing.assert_array_equal(seen.pop(), cases[2].image)
    content = load_checkpoint(checkpoint)  # one that was written when all channels were scaled together, and cut off
    del content["data"]["joint"], content["data"]["clipped"]
    save_checkpoint(tmp_path / "old.ckpt", content)
    predict(tmp_path / "old.ckpt", folder / "imagesTr", tmp_path / "old")
    np.testing.assert_array_equal(seen[4], scaled(volumes(0)[0], joint=True, clipped=True))


def test_an_image_without_one_of_its_channels_does_not_stop_the_others(
    model: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, channels in {"a": (0, 1), "b": (0,), "c": (1,)}.items():
        for channel in channels:
            nifti(tmp_path / "in" / f"{name}_{channel:04d}.nii.gz", volumes(0)[0][channel])
    nifti(tmp_path / "in" / "d.nii.gz", np.moveaxis(volumes(0)[0], 0, -1))  # both in one file
    result = call("predict", model[0], tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "d.nii.gz"]
    assert (
        "b_0000.nii.gz: expected a 3-D image with 2 channel(s), as in training, got a 3-D one with 1" in result.stderr
    )
    assert "c_0001.nii.gz: expected every channel from _0000 on, got c_0001.nii.gz. Add that of _0000." in result.stderr


def test_the_channel_without_a_finite_value_is_named(model: tuple[Path, Path], tmp_path: Path) -> None:
    for channel, value in ((0, 5.0), (1, np.nan)):  # a channel of one value has a mask, if another one says something
        nifti(tmp_path / "in" / f"a_{channel:04d}.nii.gz", np.full(SHAPE, value, np.float32))
    result = call("predict", model[0], tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 1
    assert "a_0000.nii.gz: expected finite values, got none in channel 1. A mask" in result.stderr


# --- nnU-Net


@pytest.mark.parametrize("declared", [JSON_1, JSON_2, None])
def test_a_dataset_of_nnunet_is_read(declared: dict[str, Any] | None, tmp_path: Path) -> None:
    cases = read_folder(nnunet(tmp_path, declared))
    assert cases.names == [f"case_{number}" for number in range(4)]
    assert (cases.channels, cases.by_channel, cases.joint) == (2, True, False)
    assert cases.class_names == (["label 0", "label 1"] if declared is None else ["background", "lesion"])
    np.testing.assert_allclose(cases[3].image, scaled(volumes(3)[0], joint=False))


def test_a_dataset_json_is_what_the_scorer_reads(tmp_path: Path) -> None:
    """With the mark that Windows writes; the names of both numbers are found."""
    folder = nnunet(tmp_path)
    text = json.dumps({"labels": {"background": 0, "lesion": 1}, "regions_class_order": [1]})
    (folder / "dataset.json").write_text(text, encoding="utf-8-sig")
    assert read_folder(folder).class_names == ["background", "lesion"]


def test_names_of_nnunet_reach_the_summary(model: tuple[Path, Path]) -> None:
    summary = json.loads((model[0].parent / "summary.json").read_text())
    assert [row["name"] for row in summary["classes"]] == ["background", "lesion"]


def test_the_label_that_dataset_json_ignores_is_left_out(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "rim": 1, "ignore": 7}
    folder = nnunet(tmp_path, {"labels": labels})
    label = volumes(0)[1]
    label[0, 0], label[0, 1] = 7, 2
    nifti(folder / "labelsTr" / "case_0.nii.gz", label)
    cases = read_folder(folder)
    assert (cases.values, cases.class_names, cases.ignored) == ([0, 1, 2], ["background", "rim", "core"], 7)
    assert read_folder(folder, ignore=2).values == [0, 1, 7]


def test_a_channel_ending_that_is_a_name_is_left_alone(tmp_path: Path) -> None:
    """As in the Medical Segmentation Decathlon: one file per image, a name may end in four digits."""
    for number in range(3):
        image, label = volumes(number)
        nifti(tmp_path / "imagesTr" / f"scan_{number:04d}.nii", np.moveaxis(image, 0, -1))
        nifti(tmp_path / "labelsTr" / f"scan_{number:04d}.nii", label)
    cases = read_folder(tmp_path)
    assert cases.names == ["scan_0000", "scan_0001", "scan_0002"]
    assert (cases.by_channel, cases.channels) == (False, 2)


def _shifted(folder: Path) -> None:
    nifti(folder / "imagesTr" / "case_1_0001.nii.gz", volumes(1)[0][1], np.diag([1, 1, 2.0, 1]))


def _smaller(folder: Path) -> None:
    nifti(folder / "imagesTr" / "case_1_0001.nii.gz", volumes(1)[0][1, :, :8])


def _twice(folder: Path) -> None:
    nifti(folder / "imagesTr" / "case_1.nii.gz", volumes(1)[0][0])


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda folder: (folder / "imagesTr" / "case_1_0001.nii.gz").unlink(), "case_1_0000.nii.gz: expected 2"),
        (lambda folder: (folder / "imagesTr" / "case_1_0000.nii.gz").unlink(), "Add that of _0000."),
        (lambda folder: (folder / "labelsTr" / "case_1.nii.gz").unlink(), "got none for 2: case_1_0000, case_1_0001."),
        (_shifted, "case_1_0001.nii.gz: expected the same orientation and affine"),
        (_smaller, "expected the shape of case_1_0000.nii.gz, 16x16x8, got 16x8x8. Resample it."),
        (_twice, "expected one file for channel 0 of case_1, got case_1.nii.gz and case_1_0000.nii.gz"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "json: expected a JSON file with labels, got"),
        (lambda folder: (folder / "dataset.json").write_text("[]"), "json: labels: expected an object of names"),
        (
            lambda folder: (folder / "dataset.json").write_text('{"labels": {"a": 0, "b": 1, "a": 2}}'),
            "dataset.json: expected names that differ, got 'a' twice.",
        ),
        (
            lambda folder: (folder / "dataset.json").write_text('{"labels": {"a": "b"}}'),
            "dataset.json: labels: expected",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_dataset_of_nnunet_is_told(
    spoil: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    spoil(nnunet(tmp_path))
    with pytest.raises((TrainingError, FileError)) as error:
        read_folder(tmp_path)
    assert said in str(error.value)


# --- hints


@pytest.mark.parametrize(
    "parts, said",
    [
        (("images", "masks"), "a folder D/labels, got none. If D/masks holds the labels, rename it to labels."),
        (("images", "ground truth"), "If D/ground truth holds the labels, rename it to labels."),
        (("train/images", "train/labels"), "D/train has images/ and labels/: give that folder as DATA."),
        (("Task/imagesTr", "Task/labelsTr"), "D/Task has imagesTr/ and labelsTr/: give that folder as DATA."),
        (("train/images", "train/masks"), "If D/train/masks holds the labels, rename it to labels."),
        (("images/train", "labels/train"), "images in D/images, got none. It holds train, which are not read."),
        (("imagesTr", "labels"), "expected a folder D/labelsTr, got none."),
        (("scans", "masks"), "D/images, got none. DATA holds images/ and labels/ with equal names"),
        (("scans", "masks"), "or nnU-Net's imagesTr/ and labelsTr/. There are masks, scans."),
    ],
)  # fmt: skip
def test_a_folder_of_another_name_is_told(parts: tuple[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as error:
        find_layout(pictures(tmp_path, *parts))
    assert said in str(error.value).replace(str(tmp_path), "D")


@pytest.mark.parametrize(
    "names, said",
    [
        (("{}", "{}_mask"), "Those in D/labels end in '_mask': rename them without it."),
        (("{}", "{}.seg"), "Those in D/labels end in '.seg'"),
        (("{}-image", "{}"), "Those in D/images end in '-image'"),
        (("1{}", "2{}"), "Names must be equal up to the suffix."),
        (("1{}", "2{}"), "none for 3: 1a, 1b, 1c (alone there: 2a, 2b, 2c)."),
    ],
)
def test_labels_with_a_longer_name_are_told(names: tuple[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as error:
        find_layout(pictures(tmp_path, "images", "labels", *names))
    assert said in str(error.value).replace(str(tmp_path), "D")
    assert ("rename" in str(error.value)) == ("end in" in said)


def test_an_accent_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    layout = find_layout(pictures(tmp_path, "images", "labels", "\u00e9{}", "e\u0301{}"))
    assert [*layout.images] == ["\u00e9a", "\u00e9b", "\u00e9c"]
    assert layout.labels["\u00e9a"].name == "e\u0301a.png"


def test_one_of_the_two_folders_is_not_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="Give the folder around it, "):
        find_layout(pictures(tmp_path, "images", "labels") / "images")
    monkeypatch.chdir(tmp_path / "labels")
    with pytest.raises(TrainingError, match="Give the folder around it, "):
        find_layout(Path())


def test_the_folder_of_training_images_comes_before_that_of_tests(tmp_path: Path) -> None:
    for part in ("test", "Training"):
        pictures(tmp_path / part, "images", "labels")
    with pytest.raises(TrainingError, match="Training has images/ and labels/: give that folder as DATA"):
        find_layout(tmp_path)


def test_images_and_masks_in_one_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as error:
        find_layout(pictures(tmp_path, ".", ".", "{}", "{}_mask"))
    assert (
        str(error.value)
        .replace(str(tmp_path), "D")
        .endswith(
            "D holds images and labels together: move the images to D/images, and the labels, which end in '_mask', to "
            "D/labels without that end, a_mask.png as a.png."
        )
    )


@pytest.mark.parametrize("name", ["images", "labels"])
def test_a_run_is_not_written_among_the_images(name: str, tmp_path: Path) -> None:
    folder = pictures(tmp_path, "images", "labels")
    result = call("train", folder, "--out", folder / name, "--loss", "dice")
    refused(result, "expected --out to be another folder than those of the images and labels, got")
    assert len(list((folder / name).iterdir())) == 3


# --- images that say nothing, classes that are nowhere


def test_images_of_one_value_are_named_and_an_unknown_class_is_marked(tmp_path: Path) -> None:
    folder = one_file(tmp_path / "data")
    settings = {"data": str(folder), "loss": "dice", "max_steps": 1, "batch_size": 1}
    (held_out,) = train(TrainConfig(out=str(tmp_path / "a"), **settings))["held_out"]
    label = volumes(int(held_out))[1]
    label[0, 0, 0] = 9
    nifti(folder / "labels" / f"{held_out}.nii.gz", label)
    others = [number for number in range(4) if str(number) != held_out]
    for number, channel, value in ((others[0], 1, 5), (others[1], 0, np.nan)):
        image = volumes(number)[0]
        image[channel] = value
        nifti(folder / "images" / f"{number}.nii.gz", np.moveaxis(image, 0, -1))
    result = call("train", folder, "--out", tmp_path / "b", "--loss", "dice", "--max-steps", 1, "--batch-size", 1)
    assert result.exit_code == 0, result.output
    named = sorted([f"{others[0]} (channel 1 is all 5)", f"{others[1]} (channel 0 has no finite value)"])
    assert f"Images from which nothing can be learnt: {', '.join(named)}\n" in result.stdout
    (marked,) = [line for line in result.stdout.splitlines() if "in no training image" in line]
    assert "label 9, in no training image" in marked
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert [row["trained"] for row in summary["classes"]] == [True, True, False]


def test_nothing_is_named_where_all_is_well(tmp_path: Path) -> None:
    cases = read_folder(one_file(tmp_path))
    assert (cases.empty, cases.untrained([0, 1])) == ({}, [])
