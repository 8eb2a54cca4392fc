"""Maps in which each number is an object: by hand, against a definition, against panoptica, and on the command line."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softdice.metrics import lesion_dice, lesions, panoptic_quality
from softdice.metrics.instances import object_overlaps
from softdice.metrics.lesions import Rule

DATA = Path(os.environ.get("SOFTDICE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
QUALITIES = ("pq", "sq", "rq", "ap")
NAN = float("nan")

# Two objects of 4 and 2 pixels, which touch, against one of 5 that is split otherwise, and one that is missed.
INPUT = np.array([[7, 7, 7, 7, 9, 9, 0, 0, 0]])
TARGET = np.array([[3, 3, 3, 3, 3, 9, 0, 5, 5]])


def of(score: Any, input: np.ndarray, target: np.ndarray, **options: Any) -> float:
    return float(score(input[None], target[None], num_classes=1, objects="numbers", **options).item())


def test_objects_by_hand() -> None:
    """7 and 3 share 4 of 5, 9 and 9 share 1 of 2; 5 is missed. Above 1/2 only the first is a pair, and 9 is extra."""
    found = {quality: of(panoptic_quality, INPUT, TARGET, quality=quality) for quality in QUALITIES}
    assert found == {"pq": 0.8 / (1 + 1.5), "sq": 0.8, "rq": 1 / 2.5, "ap": 1 / 4}
    found = {quality: of(panoptic_quality, INPUT, TARGET, quality=quality, reach="at_least") for quality in QUALITIES}
    assert found == {"pq": 1.3 / 2.5, "sq": 0.65, "rq": 2 / 2.5, "ap": 2 / 3}
    assert of(lesion_dice, INPUT, TARGET) == pytest.approx((8 / 9) / 4, rel=1e-15)
    # what number an object has does not matter, what class it would be neither
    assert of(panoptic_quality, INPUT * 1000 + (INPUT > 0), TARGET) == 0.8 / 2.5
    # the same maps as one class: 6 connected pixels against 6 and 2
    assert panoptic_quality(np.int64(INPUT > 0)[None], np.int64(TARGET > 0)[None], num_classes=1).item() == 1 / 1.5


def test_nothing_and_one_side_only() -> None:
    none, one = np.zeros((3, 4), np.uint16), np.full((3, 4), 65535, np.uint16)
    for quality in QUALITIES:
        assert np.isnan(of(panoptic_quality, none, none, quality=quality))
        assert of(panoptic_quality, none, one, quality=quality) == of(panoptic_quality, one, none, quality=quality) == 0
        assert of(panoptic_quality, one, one, quality=quality) == 1
    assert np.isnan(of(lesion_dice, none, none))
    assert panoptic_quality(none[None][:0], none[None][:0], num_classes=1, objects="numbers").shape == (0, 1)


def scene(seed: int, dtype: type = np.int32, shape: tuple[int, ...] = (40, 50)) -> tuple[np.ndarray, np.ndarray]:
    """Objects that touch: cells of a Voronoi diagram of random points, some of them empty, others split or merged."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (40, len(shape))) * shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)[..., None, :]
    t = np.linalg.norm(grid - points, axis=-1).argmin(-1) + 1
    moved = points + rng.normal(0, 1.0, points.shape)
    p = np.linalg.norm(grid - moved, axis=-1).argmin(-1) + 1
    p, t = rng.permutation(np.arange(41))[p], t * 7
    p[np.isin(p, rng.integers(1, 41, 6))] = 0
    p[np.isin(p, rng.integers(1, 41, 4))] = 1  # merged
    t[np.isin(t, 7 * rng.integers(1, 41, 6))] = 0
    return p.astype(dtype), t.astype(dtype)


def by_definition(p: np.ndarray, t: np.ndarray, threshold: float, reach: str) -> tuple[list[float], int, int]:
    """Every pair of objects, mask by mask, the largest IoU first."""
    numbers = [[n for n in np.unique(each).tolist() if n] for each in (p, t)]
    pairs = []
    for i in numbers[0]:
        for j in numbers[1]:
            both, either = ((p == i) & (t == j)).sum(), ((p == i) | (t == j)).sum()
            if both and (both / either >= threshold if reach == "at_least" else both / either > threshold):
                pairs.append((both / either, i, j))
    taken: list[tuple[float, int, int]] = []
    for pair in sorted(pairs, key=lambda pair: -pair[0]):
        if all(pair[1] != one[1] and pair[2] != one[2] for one in taken):
            taken.append(pair)
    return [pair[0] for pair in taken], len(numbers[1]) - len(taken), len(numbers[0]) - len(taken)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint16, np.int64, np.uint64, ">i4"])
def test_matching_is_the_definition(dtype: Any) -> None:
    for seed in range(4):
        p, t = scene(seed, np.int64)
        p, t = (p % 256).astype(dtype), (t % 256).astype(dtype)
        for threshold, reach in ((0.5, "above"), (0.5, "at_least"), (0.8, "above"), (0.6, "at_least")):
            iou, missed, extra = by_definition(p, t, threshold, reach)
            found = Rule(threshold, reach, objects="numbers").match(p, np.asfortranarray(t))  # type: ignore[arg-type]
            assert sorted(found.iou) == pytest.approx(sorted(iou), rel=1e-15)
            assert (found.missed, found.extra) == (missed, extra)
            assert iou


def test_very_large_numbers_and_many_objects() -> None:
    rng = np.random.default_rng(0)
    p, t = scene(1, np.int64)
    expected = object_overlaps(p, t)
    wide = rng.permutation(10**6)[:300].astype(np.uint64) * np.uint64(10**13)
    wide[0] = 0
    sizes_p, sizes_t, shared = object_overlaps(wide[p], wide[t])
    assert sorted(sizes_p[1:]) == sorted(size for size in expected[0][1:] if size)
    assert sorted(sizes_t[1:]) == sorted(size for size in expected[1][1:] if size)
    assert sorted(shared.voxels) == sorted(expected[2].voxels)
    every = np.arange(1, 90001).reshape(300, 300)  # each pixel an object: too many for a table of pairs
    found = Rule(objects="numbers").match(every, every[::-1, ::-1].copy())
    assert (len(found.iou), found.missed, found.extra) == (90000, 0, 0)


def test_what_is_ignored_is_no_object() -> None:
    p, t = scene(2)
    void = np.random.default_rng(0).random(t.shape) < 0.2
    found = of(panoptic_quality, p, np.where(void, 255, t), ignore_index=255)
    assert found == of(panoptic_quality, np.where(void, 0, p), np.where(void, 0, t))
    assert of(panoptic_quality, p, np.where(void, -1, t), ignore_index=-1) == found
    assert of(lesion_dice, p, np.where(void, -1, t), ignore_index=-1) > 0


@pytest.mark.parametrize(
    "change, text",
    [
        ({"num_classes": 3}, r"expected num_classes=1 and no classes with objects='numbers', got num_classes=3, cl"),
        ({"classes": [0]}, r"expected num_classes=1 and no classes with objects='numbers', got num_classes=1, cl"),
        ({"neighbours": "faces"}, r"expected a number as matching and no neighbours with objects='numbers', got match"),
        ({"objects": "cells"}, r"panoptic_quality: expected objects to be one of 'components', 'numbers', got 'cells'"),
        ({"input": np.full((1, 3, 9), -2)}, r"expected input of shape|expected target of shape"),
        ({"input": -INPUT[None]}, r"expected objects numbered from 1 on in input, got -9\. 0 is the background"),
        ({"target": INPUT[None] / 2}, r"panoptic_quality: expected integer labels in target, got torch.float64"),
    ],
)
def test_mistakes(change: dict[str, Any], text: str) -> None:
    arguments = {"input": INPUT[None], "target": TARGET[None], "num_classes": 1, "objects": "numbers"}
    with pytest.raises((ValueError, TypeError), match=text):
        panoptic_quality(**{**arguments, **change})
    if "neighbours" not in change:
        return
    with pytest.raises(ValueError, match="expected a number as matching"):
        lesion_dice(**{**arguments, "matching": "BraTS-MET"})


def test_streaming_is_the_mean_over_the_cases() -> None:
    pytest.importorskip("torchmetrics")
    from softdice.metrics import LesionDice, PanopticQuality

    options: dict[str, Any] = {"objects": "numbers", "reach": "at_least"}
    metrics = {PanopticQuality(1, **options): panoptic_quality, LesionDice(1, **options): lesion_dice}
    for metric, function in metrics.items():
        each = []
        for seed in (0, 1):
            pair: list[Tensor] = [torch.from_numpy(one)[None] for one in scene(seed)]
            metric.update(*pair)
            each.append(function(*pair, num_classes=1, **options).item())
        assert metric.compute().item() == pytest.approx(np.mean(each), rel=1e-12)


# --- against panoptica


def panoptica_counts(p: np.ndarray, t: np.ndarray, threshold: float) -> list[float]:
    panoptica: Any = pytest.importorskip("panoptica", reason="panoptica is not installed: run make test")
    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.UNMATCHED_INSTANCE,
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=threshold),
        instance_metrics=[panoptica.Metric.IOU],
        global_metrics=[],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluator.evaluate(p, t, verbose=False)["ungrouped"]
        return [result.tp, result.fp, result.fn, result.pq, result.sq, result.rq]


def our_counts(p: np.ndarray, t: np.ndarray, threshold: float) -> list[float]:
    found = Rule(threshold, "at_least", objects="numbers").match(p, t)
    return [len(found.iou), found.extra, found.missed, *(lesions.quality_of(found, q) for q in ("pq", "sq", "rq"))]


THRESHOLDS = (0.2, 0.4, 0.5, 0.6, 0.75, 0.9)


@pytest.mark.parametrize("shape", [(40, 50), (14, 15, 16)])
def test_panoptica_on_objects_that_touch(shape: tuple[int, ...]) -> None:
    between = 0
    for seed in range(10):
        p, t = scene(seed, np.uint16, shape)
        for threshold in THRESHOLDS:
            ours, theirs = our_counts(p, t, threshold), panoptica_counts(p, t, threshold)
            assert ours == pytest.approx(theirs, rel=1e-12, nan_ok=True)
            between += 0 < ours[3] < 1
    assert between > 30


def nuclei(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Connected parts of real masks, against those of the masks one pixel further and smaller, numbered otherwise."""
    ndimage = pytest.importorskip("scipy.ndimage")
    image = pytest.importorskip("PIL.Image")
    folder = DATA / "nuclei" / "labels"
    if not folder.exists():
        pytest.skip("real data not found: set SOFTDICE_DATA to a folder that holds nuclei")
    pairs = []
    for file in sorted(folder.glob("*.png"))[:count]:
        mask = np.asarray(image.open(file)) > 0
        t = ndimage.label(mask)[0].astype(np.uint16)
        p = ndimage.label(ndimage.binary_erosion(np.roll(mask, 1, 1)))[0][::-1]
        p = np.where(p, p.max() + 1 - p, 0)[::-1].astype(np.uint16)
        pairs.append((p, t))
    return pairs


def test_panoptica_on_nuclei() -> None:
    between = 0
    for p, t in nuclei(25):
        for threshold in THRESHOLDS:
            ours = our_counts(p, t, threshold)
            assert ours == pytest.approx(panoptica_counts(p, t, threshold), rel=1e-12, nan_ok=True)
            between += 0 < ours[3] < 1
    assert between > 60


# --- softdice score --instances


def command(*arguments: object) -> Any:
    pytest.importorskip("typer.testing")
    from commands import score

    return score(*arguments)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for side in "pt":
        (tmp_path / side).mkdir()
    for seed in range(5):
        for side, array in zip("pt", scene(seed, np.uint16), strict=True):
            np.save(tmp_path / side / f"{seed}.npy", array)
    return tmp_path / "p", tmp_path / "t"


def test_the_command_gives_what_the_functions_give(folders: tuple[Path, Path], tmp_path: Path) -> None:
    done = command(*folders, "--instances", "--surface", "1px", "--format", "json", "--report", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    for seed, case in enumerate(content["results"][0]["cases"]):
        p, t = scene(seed, np.uint16)
        (row,) = case["classes"]
        found = Rule(objects="numbers").match(p, t)
        assert row["label"] == "objects"
        assert [row[name] for name in ("matched", "missed", "extra")] == [len(found.iou), found.missed, found.extra]
        for column, quality, options in (
            ("pq", "pq", {}), ("sq", "sq", {}), ("rq", "rq", {}),
            ("ap50", "ap", {"reach": "at_least"}), ("ap75", "ap", {"reach": "at_least", "matching": 0.75}),
            ("ap90", "ap", {"reach": "at_least", "matching": 0.9}),
        ):  # fmt: skip
            assert row[column] == pytest.approx(of(panoptic_quality, p, t, quality=quality, **options), rel=1e-15)
        assert row["dice"] == 2 * ((p > 0) & (t > 0)).sum() / ((p > 0).sum() + (t > 0).sum())
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 5
    assert ">PQ</span>" in page
    assert "AP 0.75" in command(*folders, "--instances").stdout
    loose = json.loads(command(*folders, "--instances", "--matching", ">=0.3", "--format", "json").stdout)
    rows = [case["classes"][0] for case in loose["results"][0]["cases"]]
    for seed, row in enumerate(rows):
        expected = of(panoptic_quality, *scene(seed, np.uint16), matching=0.3, reach="at_least")
        assert row["pq"] == pytest.approx(expected, rel=1e-15)


def test_the_command_leaves_out_what_is_ignored(folders: tuple[Path, Path]) -> None:
    ignored = scene(0, np.uint16)[1].max()
    rows = json.loads(command(*folders, "--instances", "--ignore", ignored, "--format", "json").stdout)["results"][0]
    p, t = scene(0, np.uint16)
    expected = of(panoptic_quality, p, t, ignore_index=int(ignored))
    assert rows["cases"][0]["classes"][0]["pq"] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    "options, said",
    [
        (("--labels", "1"), "--instances: expected no --labels, got both"),
        (("--regions", "a=1,2"), "--instances: expected no --regions, got both"),
        (("--lesions",), "--instances: expected no --lesions, got both"),
        (("--soft",), "--instances: expected label maps or --threshold, got --soft"),
        (("--threshold", "0.5"), "--instances: expected no --threshold, got both"),
        (("--matching", "BraTS-MET"), "--matching: expected an overlap (IoU) with --instances, got 'BraTS-MET'"),
        (("--layout", "classes"), "--layout classes: expected no --labels, --regions, --ignore, --instances"),
    ],
)
def test_what_the_command_refuses(options: tuple[str, ...], said: str, folders: tuple[Path, Path]) -> None:
    from commands import refused

    refused(command(*folders, "--instances", *options), said)


def test_objects_that_are_taken_for_classes_are_doubted(folders: tuple[Path, Path], tmp_path: Path) -> None:
    said = "In 4 cases most labels of the reference have another number in the prediction. If each number is an object"
    done = command(*folders, "--report", tmp_path / "r.html")
    assert said in done.stderr
    assert said in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert (
        json.loads(command(*folders, "--format", "json").stdout)["renumbered_cases"] == 4
    )  # in one half of them has no partner
    for options in (("--instances",), ("--labels", "7,14"), ("--regions", "a=7,14")):
        assert "other numbers" not in command(*folders, *options).stderr
    # classes that are merely wrong, and objects that keep their numbers
    rng = np.random.default_rng(0)
    for seed in range(5):
        t = scene(seed, np.uint16)[1]
        np.save(folders[0] / f"{seed}.npy", np.where(rng.random(t.shape) < 0.2, 0, t))
    assert "other numbers" not in command(*folders).stderr
