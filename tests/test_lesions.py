"""Lesions and centre lines: by hand, against a definition in scipy.ndimage, and against other programs."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softdice.metrics import centreline_dice, lesion_dice, lesions, panoptic_quality
from softdice.metrics.lesions import CHALLENGES

ndimage = pytest.importorskip("scipy.ndimage")
pytest.importorskip("cc3d")
morphology = pytest.importorskip("skimage.morphology")

DATA = Path(os.environ.get("SOFTDICE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
NAN = float("nan")
QUALITIES = ("pq", "sq", "rq")


def drawn(*rows: str) -> Tensor:
    """Rows of digits, a dot for 0 -> labels (1, H, W)."""
    return torch.tensor([[[0 if sign == "." else int(sign) for sign in row] for row in rows]], dtype=torch.uint8)


def blobs(shape: tuple[int, ...], seed: int, share: float = 0.7, smooth: float = 1.0) -> np.ndarray:
    """A mask of a few to a few dozen lesions."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), smooth)
    return field > np.quantile(field, share)


def pair_of_blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks alike in part, in 2-D and 3-D."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(10, 26, 2 + seed % 2).tolist())
    common, own = ndimage.gaussian_filter(rng.standard_normal((3, *shape)), [0, *[1.0] * len(shape)])[[0, 1]]
    first, second = common, common + rng.uniform(0, 1) * own
    return first > np.quantile(first, rng.uniform(0.6, 0.9)), second > np.quantile(second, rng.uniform(0.6, 0.9))


def scores(p: np.ndarray, t: np.ndarray, **options: Any) -> list[float]:
    """Lesion Dice, and the three qualities."""
    pair = torch.from_numpy(p)[None], torch.from_numpy(t)[None]
    found = [lesion_dice(*pair, num_classes=1, **options).item()]
    return found + [panoptic_quality(*pair, num_classes=1, quality=each, **options).item() for each in QUALITIES]  # type: ignore[arg-type]


# --- by hand

INPUT = drawn(
    "11...1",
    "11....",
    ".....1",
    "..1...",
)
TARGET = drawn(
    "111...",
    "111...",
    "......",
    "..1...",
)
"""Input: a square of 4, 3 single pixels. Target: 6 pixels of which the square is 4, and 1 that was found."""


def test_matching_by_overlap() -> None:
    """IoU 4/6 and 1, Dice 8/10 and 1; two of the input are extra."""
    options: dict[str, Any] = {"num_classes": 1}
    assert lesion_dice(INPUT, TARGET, **options).item() == pytest.approx(1.8 / 4, rel=1e-15)
    found = [panoptic_quality(INPUT, TARGET, quality=each, **options).item() for each in QUALITIES]  # type: ignore[arg-type]
    assert found == pytest.approx([(5 / 3) / 3, (5 / 3) / 2, 2 / 3], rel=1e-15)
    # at a threshold that the square does not reach it is extra, and its target missed
    assert lesion_dice(INPUT, TARGET, matching=0.7, **options).item() == pytest.approx(1 / 5, rel=1e-15)
    found = [panoptic_quality(INPUT, TARGET, quality=each, matching=0.7, **options).item() for each in QUALITIES]  # type: ignore[arg-type]
    assert found == pytest.approx([1 / 3, 1, 1 / 3], rel=1e-15)
    # an IoU that is exactly the threshold is enough for "at_least", not for "above"
    for matching, reach, dice in ((4 / 6, "at_least", 1.8 / 4), (4 / 6, "above", 1 / 5), (0.66, "above", 1.8 / 4)):
        found = lesion_dice(INPUT, TARGET, matching=matching, reach=reach, **options).item()
        assert found == pytest.approx(dice, rel=1e-15)
    # what is missed counts as what is extra
    assert lesion_dice(TARGET, INPUT, **options).item() == pytest.approx(1.8 / 4, rel=1e-15)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_half_of_the_union_is_no_match(size: int) -> None:
    """IoU n / 2n = 1/2. The paper asks for more than that, panoptica for at least that."""
    input, target = drawn("1" * size + "." * 12), drawn("1" * 2 * size + "." * (12 - size))
    options: dict[str, Any] = {"num_classes": 1, "matching": 0.5}
    for quality in QUALITIES:
        assert panoptic_quality(input, target, quality=quality, **options).item() == 0
    expected = {"pq": 0.5, "sq": 0.5, "rq": 1.0}
    for quality in QUALITIES:
        found = panoptic_quality(input, target, quality=quality, reach="at_least", **options).item()  # type: ignore[arg-type]
        assert found == expected[quality]
    assert lesion_dice(input, target, **options).item() == 0
    assert lesion_dice(input, target, reach="at_least", **options).item() == pytest.approx(2 / 3, rel=1e-15)
    # one voxel more is more than half
    more = drawn("1" * (size + 1) + "." * (11))
    assert panoptic_quality(more[..., :12], target[..., :12], **options).item() == pytest.approx(
        (size + 1) / (2 * size), rel=1e-15
    )


def test_average_precision_of_objects() -> None:
    """Of 2 pairs and 2 lesions without partner: 2 / 4."""
    assert panoptic_quality(INPUT, TARGET, num_classes=1, quality="ap").item() == 0.5
    assert panoptic_quality(INPUT, TARGET, num_classes=1, quality="ap", matching=0.7).item() == 0.2


def test_each_lesion_has_one_partner() -> None:
    """One of the target, two of the input inside it: the larger is its partner, though both reach the threshold."""
    input, target = drawn("111.11", "......"), drawn("111111", "......")
    assert lesion_dice(input, target, num_classes=1, matching=0.3).item() == pytest.approx((6 / 9) / 2, rel=1e-15)
    assert panoptic_quality(input, target, num_classes=1, matching=0.3).item() == pytest.approx(0.5 / 1.5, rel=1e-15)


def test_voxels_touch_by_corners_or_faces() -> None:
    """A diagonal: one lesion by corners, three by faces."""
    diagonal, middle = drawn("1..", ".1.", "..1"), drawn("...", ".1.", "...")
    assert lesion_dice(diagonal, middle, num_classes=1).item() == 0  # IoU 1/3
    assert lesion_dice(diagonal, middle, num_classes=1, neighbours="faces").item() == pytest.approx(1 / 3, rel=1e-15)
    cube = torch.zeros(1, 2, 2, 2, dtype=torch.uint8)
    cube[0, 0, 0, 0] = cube[0, 1, 1, 1] = 1
    one = cube.clone()
    one[0, 0, 0, 0] = 0
    assert lesion_dice(cube, one, num_classes=1, matching=0.4).item() == pytest.approx(2 / 3, rel=1e-15)
    assert lesion_dice(cube, one, num_classes=1, matching=0.4, neighbours="faces").item() == 0.5


def cuboid(shape: tuple[int, int, int], *boxes: tuple[slice, slice, slice]) -> Tensor:
    labels = torch.zeros(1, *shape, dtype=torch.uint8)
    for box in boxes:
        labels[0][box] = 1
    return labels


def test_the_rules_of_brats() -> None:
    """Target: A of 4 x 4 x 4 = 64 voxels, a fragment of 8 that a gap of 2 parts from it, one of 27 far away.

    Dilated once, as for meningioma, A and the fragment touch by their faces: one lesion of 72. The small one does not
    count: it is no larger than 50. Input: half of A (32), a lesion beside A that A reaches when dilated (4 voxels), one
    that touches the small one (not extra), one that touches nothing (extra).
    """
    all_of = slice(None)
    first, fragment = (slice(0, 4), slice(0, 4), slice(0, 4)), (slice(6, 8), slice(0, 2), slice(0, 2))
    small, shape = (slice(20, 23), slice(0, 3), slice(0, 3)), (40, 12, 12)
    target = cuboid(shape, first, fragment, small)
    half, beside = (slice(0, 2), slice(0, 4), slice(0, 4)), (slice(3, 4), slice(4, 5), slice(0, 4))
    nothing = (slice(30, 31), slice(5, 6), all_of)
    input = cuboid(shape, half, beside, (slice(21, 22), slice(1, 2), slice(1, 2)), nothing)
    dice = 2 * 32 / (72 + 32 + 4)
    options: dict[str, Any] = {"num_classes": 1, "matching": "BraTS-MEN"}
    assert lesion_dice(input, target, **options).item() == pytest.approx(dice / 2, rel=1e-15)
    # metastases count from 3 voxels on: the small one is found by a voxel of its 27
    options["matching"] = "BraTS-MET"
    assert lesion_dice(input, target, **options).item() == pytest.approx((dice + 2 / 28) / 3, rel=1e-15)
    # voxels of 2 mm^3: the small one has 54 mm^3, and counts for meningioma, too
    options = {"num_classes": 1, "matching": "BraTS-MEN", "spacing": (2.0, 1.0, 1.0)}
    assert lesion_dice(input, target, **options).item() == pytest.approx((dice + 2 / 28) / 3, rel=1e-15)
    # nothing that counts: nan; nothing that counts but what is extra: 0
    alone = cuboid(shape, small)
    assert math.isnan(lesion_dice(torch.zeros_like(alone), alone, num_classes=1, matching="BraTS-GLI").item())
    assert lesion_dice(input, alone, num_classes=1, matching="BraTS-MEN").item() == 0


def test_a_centre_line() -> None:
    """Lines of one pixel are their own skeletons: 5 of 5 lie in the target, 5 of 7 in the input."""
    input, target = drawn(".......", "11111..", "......."), drawn(".......", "1111111", ".......")
    expected = 2 * (5 / 7) / (1 + 5 / 7)
    assert centreline_dice(input, target, num_classes=1).item() == pytest.approx(expected, rel=1e-15)
    assert centreline_dice(target, input, num_classes=1).item() == pytest.approx(expected, rel=1e-15)
    volumes = [
        each[:, :, None].expand(-1, 3, 3, 7) * drawn("...", ".1.", "...")[..., None]
        for each in (input[:, 1:2], target[:, 1:2])
    ]
    assert centreline_dice(*volumes, num_classes=1).item() == pytest.approx(expected, rel=1e-15)
    # a cube of 2 x 2 x 2, of which scikit-image leaves nothing
    cube = cuboid((4, 4, 4), (slice(1, 3), slice(1, 3), slice(1, 3)))
    assert centreline_dice(cube, cube, num_classes=1).item() == 1
    assert centreline_dice(cube, torch.zeros_like(cube), num_classes=1).item() == 0
    # apart
    assert centreline_dice(drawn("11", "..", ".."), drawn("..", "..", "11"), num_classes=1).item() == 0


def tube(width: tuple[int, int], length: int, at: tuple[int, int], axis: int) -> Tensor:
    """A straight vessel along an axis, in a volume that holds two of them."""
    mask = torch.zeros(1, 24, 24, 44, dtype=torch.uint8)
    mask[0, at[0] : at[0] + width[0], at[1] : at[1] + width[1], 4 : 4 + length] = 1
    return mask.movedim(3, axis)


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("width", [(4, 4), (2, 2), (6, 6), (2, 4), (4, 6), (3, 4), (4, 3)])
def test_a_vessel_of_any_width_has_a_centre_line(width: tuple[int, int], axis: int) -> None:
    """A vessel of 3 x 3 voxels was found, another one missed: about half of the centre line of both is found."""
    found, missed = tube((3, 3), 32, (4, 4), axis), tube(width, 32, (13, 13), axis)
    both = found | missed
    vanishes = not np.asarray(morphology.skeletonize(missed[0].numpy())).any()
    assert vanishes or width[0] != width[1]  # else the test is about nothing
    line = lesions.centre_line(missed[0].numpy() != 0)
    length = int(line.sum())
    assert 32 - 2 * max(width) <= length <= 32
    assert not (line & (missed[0].numpy() == 0)).any()
    assert len(np.unique(np.argwhere(line)[:, axis - 1])) == length  # one voxel in every cross section
    of_found = int(np.count_nonzero(morphology.skeletonize(found[0].numpy())))
    share = of_found / (of_found + length)
    expected = 2 * share / (1 + share)
    assert centreline_dice(found, both, num_classes=1).item() == pytest.approx(expected, rel=1e-15)
    assert centreline_dice(both, found, num_classes=1).item() == pytest.approx(expected, rel=1e-15)
    assert expected == pytest.approx(2 / 3, abs=0.04)
    assert centreline_dice(found, missed, num_classes=1).item() == 0
    assert centreline_dice(missed, missed, num_classes=1).item() == 1


def test_every_component_has_a_centre_line() -> None:
    """Tubes at any angle, discs, blobs and single voxels; where scikit-image draws a line it stays as it is."""
    rng = np.random.default_rng(0)
    z, y, x = np.mgrid[:24, :24, :40]
    lost = 0
    for seed in range(60):
        radius, centre, slope = rng.uniform(0.5, 4), rng.uniform(8, 16, 2), rng.uniform(-0.3, 0.3, 2) * (seed % 2)
        middle = centre[:, None, None, None] + slope[:, None, None, None] * (x - 20)[None]
        mask = ((z - middle[0]) ** 2 + (y - middle[1]) ** 2 <= radius**2) & (x > 5) & (x < 35)
        mask |= blobs(mask.shape, seed, 0.99)
        if seed % 3 == 0:
            mask = mask[:, :, 20]
        theirs, line = np.asarray(morphology.skeletonize(mask)) > 0, lesions.centre_line(mask)
        numbers, count = ndimage.label(mask, np.ones([3] * mask.ndim))
        assert set(np.unique(numbers[line])) - {0} == set(range(1, count + 1))
        drawn_by_both = np.isin(numbers, numbers[theirs])
        np.testing.assert_array_equal(line & drawn_by_both, theirs)
        assert not (line & ~mask).any()
        lost += count - len(set(np.unique(numbers[theirs])) - {0})
    assert lost > 10


EVERY: list[tuple[Any, dict[str, Any]]] = [
    (lesion_dice, {}), (lesion_dice, {"matching": "BraTS-MET"}), (centreline_dice, {}),
    *((panoptic_quality, {"quality": each}) for each in QUALITIES),
]  # fmt: skip


@pytest.mark.parametrize("score, options", EVERY)
def test_empty_masks(score: Any, options: dict[str, Any]) -> None:
    """Labels: 0 in both, 1 in the input only, 2 in the target only, 3 in neither, 4 in both and apart."""
    input = torch.tensor([[[0] * 9, [1] * 4 + [0, 4, 4, 4, 4], [0] * 9, [0] * 9, [0] * 9, [0] * 9]])
    target = torch.tensor([[[0] * 9, [2] * 4 + [0] * 5, [0] * 9, [0] * 9, [0] * 9, [0] * 5 + [4] * 4]])
    found = score(input, target, num_classes=5, **options)
    assert found.dtype == torch.float64
    assert found[0, 0] > 0.8
    np.testing.assert_array_equal(found[:, 1:], [[0, 0, NAN, 0]])
    np.testing.assert_array_equal(score(input, target, num_classes=5, classes=[3, 1], **options), [[NAN, 0]])


@pytest.mark.parametrize("score, options", EVERY)
def test_what_is_ignored_is_in_no_class(score: Any, options: dict[str, Any]) -> None:
    t = torch.from_numpy(np.stack([blobs((9, 10, 11), seed, 0.93) for seed in (0, 1)])).long()
    p = t | torch.from_numpy(np.stack([blobs((9, 10, 11), seed, 0.97) for seed in (5, 6)]))
    void = torch.rand(t.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    expected = score(p.masked_fill(void, 0), t.masked_fill(void, 0), num_classes=2, classes=[1], **options)
    wild, labels = p.masked_fill(void, 7), t.masked_fill(void, 255)
    found = score(wild, labels, num_classes=2, classes=[1], ignore_index=255, spacing=1.0, **options)
    np.testing.assert_array_equal(found, expected)
    assert ((found > 0) & (found < 1)).any()
    assert score(p, torch.full_like(t, 255), num_classes=2, ignore_index=255, **options).isnan().all()


# --- the definition, lesion by lesion, in scipy.ndimage


def by_overlap(p: np.ndarray, t: np.ndarray, threshold: float, corners: bool) -> list[float]:
    around = ndimage.generate_binary_structure(p.ndim, p.ndim if corners else 1)
    (found, n), (true, m) = ndimage.label(p, around), ndimage.label(t, around)
    pairs = []
    for i in range(1, n + 1):
        for j in np.unique(true[(found == i) & (true > 0)]):
            both, either = ((found == i) & (true == j)).sum(), ((found == i) | (true == j)).sum()
            pairs.append((both / either, i, int(j), 2 * both / ((found == i).sum() + (true == j).sum())))
    taken: list[tuple[float, int, int, float]] = []
    for pair in sorted(pairs, key=lambda pair: -pair[0]):
        if pair[0] > threshold and all(pair[1] != one[1] and pair[2] != one[2] for one in taken):
            taken.append(pair)
    if not taken:
        return [0.0] * 4 if n + m else [NAN] * 4
    iou, f1 = sum(pair[0] for pair in taken), 2 * len(taken) / (n + m)
    dice = sum(pair[3] for pair in taken) / (n + m - len(taken))
    return [dice, iou / len(taken) * f1, iou / len(taken), f1]


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_overlap_is_the_definition(threshold: float) -> None:
    """Above an IoU of 0.5 no lesion has two candidates, so that order does not matter."""
    for seed in range(40):
        p, t = pair_of_blobs(seed)
        neighbours = ("faces", "corners")[seed // 2 % 2]
        found = scores(p, t, matching=threshold, neighbours=neighbours)
        assert found == pytest.approx(by_overlap(p, t, threshold, neighbours == "corners"), rel=1e-13)


def by_brats(p: np.ndarray, t: np.ndarray, spacing: tuple[float, ...], dilations: int, volume: float) -> float:
    """Every step on whole images, a lesion of the target at a time."""
    corners, dilated = (ndimage.generate_binary_structure(p.ndim, each) for each in (p.ndim, 2))
    found, n = ndimage.label(p, corners)
    extents, m = ndimage.label(ndimage.binary_dilation(t, dilated, iterations=dilations), corners)
    each, touched = [], set()
    for j in range(1, m + 1):
        lesion = t & (extents == j)
        reach = ndimage.binary_dilation(lesion, dilated, iterations=dilations)
        parts = set(np.unique(found[reach]).tolist()) - {0}
        touched |= parts
        if lesion.sum() * np.prod(spacing) > volume:
            one = np.isin(found, list(parts))
            each.append(2 * (one & lesion).sum() / (one.sum() + lesion.sum()))
    number = len(each) + n - len(touched)
    return sum(each) / number if number else NAN


def test_brats_is_the_definition() -> None:
    compared = []
    for seed in range(30):
        shape = (14, 15, 16) if seed % 3 else (30, 31)
        # small and far apart, so that not all of them melt into one
        p, t = (blobs(shape, seed // 2 + i, 0.985, 0.6) for i in (0, 900 * (seed % 2) + 1))
        t |= blobs(shape, seed // 2, 0.99, 0.6)
        spacing = tuple(np.random.default_rng(seed).uniform(0.5, 3, len(shape)).round(1).tolist())
        for challenge, rule in CHALLENGES.items():
            expected = by_brats(p, t, spacing, *rule)
            pair = torch.from_numpy(p)[None], torch.from_numpy(t)[None]
            found = lesion_dice(*pair, num_classes=1, matching=challenge, spacing=spacing).item()  # type: ignore[arg-type]
            assert found == pytest.approx(expected, rel=1e-13, nan_ok=True)
            compared.append(found)
    assert len({round(value, 9) for value in compared if 0 < value < 1}) > 40
    assert any(map(math.isnan, compared))


def test_centre_lines_are_those_of_the_whole_image() -> None:
    """Boxes around a class do not change its skeleton."""
    between = 0
    for seed in range(12):
        p, t = pair_of_blobs(seed)
        p[:], t[:] = ndimage.binary_opening(p), ndimage.binary_opening(t)
        lines = [lesions.centre_line(mask) for mask in (p, t)]
        shares = [line[other].sum() / line.sum() for line, other in zip(lines, (t, p), strict=True)]
        expected = 2 * shares[0] * shares[1] / (shares[0] + shares[1])
        found = centreline_dice(torch.from_numpy(p)[None], torch.from_numpy(t)[None], num_classes=1).item()
        assert found == pytest.approx(expected, rel=1e-13)
        between += 0 < found < 1
    assert between > 6


# --- streaming


def test_streaming_is_the_mean_over_the_cases() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics import MetricCollection

    from softdice.metrics import CentrelineDice, LesionDice, PanopticQuality

    pairs = [tuple(torch.from_numpy(each)[None].long() for each in pair_of_blobs(seed)) for seed in (1, 3, 4)]
    options: dict[str, Any] = {"num_classes": 2, "classes": [1]}
    metrics = MetricCollection({
        "dice": LesionDice(**options), "brats": LesionDice(matching="BraTS-MET", **options),
        "loose": LesionDice(matching=0.1, neighbours="faces", **options), "pq": PanopticQuality(**options),
        "rq": PanopticQuality(quality="rq", **options), "line": CentrelineDice(**options),
    })  # fmt: skip
    for pair in pairs:
        metrics.update(*pair)
    metrics = pickle.loads(pickle.dumps(metrics))
    functions = {
        "dice": (lesion_dice, {}), "brats": (lesion_dice, {"matching": "BraTS-MET"}),
        "loose": (lesion_dice, {"matching": 0.1, "neighbours": "faces"}), "pq": (panoptic_quality, {}),
        "rq": (panoptic_quality, {"quality": "rq"}), "line": (centreline_dice, {}),
    }  # fmt: skip
    for name, value in metrics.compute().items():
        function, own = functions[name]
        expected = np.mean([function(*pair, **options, **own).item() for pair in pairs])  # type: ignore[operator]
        assert value.item() == pytest.approx(expected, rel=1e-12)
        assert 0 < expected < 1
    empty = torch.zeros(1, 4, 4).long()
    assert LesionDice(2, classes=[1])(empty, empty).isnan()
    with pytest.raises(ValueError, match=r"PanopticQuality: expected quality to be one of 'pq', .*'ap', got 'f1'"):
        PanopticQuality(2, quality="f1")  # type: ignore[arg-type]


# --- mistakes


@pytest.mark.parametrize(
    "score, change, text",
    [
        (lesion_dice, {"matching": 0, "reach": "at_least"}, r"lesion_dice: expected matching above 0 with reach='at"),
        (lesion_dice, {"matching": 1}, r"lesion_dice: expected matching below 1 with reach='above', got 1\. Pass an"),
        (panoptic_quality, {"reach": "more"}, r"panoptic_quality: expected reach to be one of 'above', 'at_least'"),
        (lesion_dice, {"matching": 1.5}, r"lesion_dice: expected matching in \[0, 1\], got 1\.5\."),
        (lesion_dice, {"matching": "BraTS"}, r"expected matching to be one of 'BraTS-GLI', .*, got 'BraTS'"),
        (lesion_dice, {"matching": None}, r"expected matching to be a number in \[0, 1\], got None\."),
        (lesion_dice, {"neighbours": 26}, r"expected neighbours to be one of 'corners', 'faces', got 26\."),
        (lesion_dice, {"matching": "BraTS-MET", "neighbours": "faces"}, r"expected neighbours 'corners' with match"),
        (lesion_dice, {"spacing": (1, 2, 3)}, r"lesion_dice: expected spacing of 2 positive numbers"),
        (panoptic_quality, {"quality": "f1"}, r"panoptic_quality: expected quality to be one of 'pq', 'sq', 'rq'"),
        (panoptic_quality, {"matching": "BraTS-MET"}, r"panoptic_quality: expected matching to be a number in"),
        (centreline_dice, {"input": torch.zeros(1, 4, 5)}, r"centreline_dice: expected integer labels in input"),
        (centreline_dice, {"target": torch.full((1, 4, 5), 7)}, r"target with labels in \[0, 3\), got 7 \(20 voxels\)"),
    ],
)  # fmt: skip
def test_mistakes(score: Any, change: dict[str, Any], text: str) -> None:
    arguments = {"input": torch.zeros(1, 4, 5).long(), "target": torch.zeros(1, 4, 5).long(), "num_classes": 3}
    with pytest.raises((ValueError, TypeError), match=text):
        score(**{**arguments, **change})


@pytest.mark.parametrize(
    "score, package, name",
    [(lesion_dice, "connected-components-3d", "cc3d"), (centreline_dice, "scikit-image", "skimage")],
)
def test_what_is_not_installed_is_named(score: Any, package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name, *(each for each in sys.modules if each.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)  # what makes an import fail
    with pytest.raises(ModuleNotFoundError) as error:
        score(*torch.ones(2, 1, 3, 3).long(), num_classes=1)
    advice = "to be installed, got no such package. Run: pip install 'softdice[lesions]'"
    assert str(error.value) == f"{score.__name__}: expected {package} {advice}"


# --- the command


def saved(path: Path, labels: np.ndarray, spacing: tuple[float, ...] = (1, 1, 1)) -> None:
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(exist_ok=True)
    nibabel.Nifti1Image(labels.astype(np.uint8), np.diag([*spacing, 1.0])).to_filename(path)


def command(*words: object) -> tuple[int, str, str]:
    testing = pytest.importorskip("typer.testing")
    from softdice.cli.app import app

    run = testing.CliRunner().invoke(app, ["score", *map(str, words)], catch_exceptions=False)
    return run.exit_code, run.stdout, run.stderr


COLUMNS = ("hd95", "mean_distance", "surface_dice", "lesion_dice", "pq", "sq", "rq", "centreline_dice")


def cases(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Three cases of two labels, of which the last lacks one; predictions in p and, the labels turned about, in q."""
    pairs = []
    for seed in range(3):
        both = blobs((12, 13, 14), seed, 0.85).astype(np.uint8)
        p, t = (both + blobs((12, 13, 14), seed + 20 + i, 0.95) for i in range(2))
        p, t = (np.minimum(each, 2 if seed < 2 else 1) for each in (p, t))
        saved(folder / "p" / f"{seed}.nii.gz", p, (1, 2, 3))
        saved(folder / "q" / f"{seed}.nii.gz", p[::-1], (1, 2, 3))
        saved(folder / "t" / f"{seed}.nii.gz", t, (1, 2, 3))
        pairs.append((torch.from_numpy(p)[None], torch.from_numpy(t)[None]))
    return pairs


def test_the_command_gives_what_the_functions_give(tmp_path: Path) -> None:
    pairs = cases(tmp_path)
    options = ("--lesions", "--centreline", "--surface", "1mm", "--matching", "BraTS-MET")
    code, out, _ = command(tmp_path / "p", tmp_path / "t", *options, "--format", "json")
    assert code == 0
    result = json.loads(out)["results"][0]
    how: dict[str, Any] = {"num_classes": 3, "classes": [1, 2], "spacing": (1, 2, 3)}
    for (p, t), case in zip(pairs, result["cases"], strict=True):
        expected = {
            "lesion_dice": lesion_dice(p, t, matching="BraTS-MET", **how),
            "centreline_dice": centreline_dice(p, t, **how),
            **{each: panoptic_quality(p, t, quality=each, **how) for each in QUALITIES},  # type: ignore[arg-type]
        }
        for k, row in enumerate(case["classes"]):
            for name, values in expected.items():
                value = values[0, k].item()
                assert row[name] == (None if math.isnan(value) else value)
    assert result["classes"][0]["lesion_dice"] == pytest.approx(
        np.mean([case["classes"][0]["lesion_dice"] for case in result["cases"]])
    )


def test_every_output_has_the_columns(tmp_path: Path) -> None:
    """Table, CSV, nnU-Net's layout, the comparison, and the report with its plots."""
    cases(tmp_path)
    asked = ("--lesions", "--centreline", "--surface", "1mm")
    sides = (tmp_path / "p", tmp_path / "t")
    texts = {kind: command(*sides, *asked, "--format", kind)[1] for kind in ("table", "csv", "nnunet")}
    assert texts["csv"].splitlines()[0].endswith(",n_ref," + ",".join(COLUMNS))
    summary = json.loads(texts["nnunet"])
    first = {line.split(",")[1]: line.split(",") for line in texts["csv"].splitlines()[1:3]}
    for label, row in first.items():
        mine = summary["metric_per_case"][0]["metrics"][label]
        assert [mine[name] for name in COLUMNS] == [float(cell) for cell in row[-len(COLUMNS) :]]
        assert set(COLUMNS) <= {*summary["mean"][label]} & {*summary["foreground_mean"]}
    report = tmp_path / "page.html"
    code, out, _ = command(*sides, *asked, "--versus", tmp_path / "q", "--report", report, "--format", "json")
    assert code == 0
    row = json.loads(out)["comparison"]["classes"][0]
    sides_dice = [side["classes"][0]["lesion_dice"] for side in json.loads(out)["results"]]
    assert row["lesion_dice_difference"] == pytest.approx(sides_dice[0] - sides_dice[1])
    assert row["lesion_dice_cases"] == 3
    assert {f"{name}_p_holm" for name in COLUMNS} <= {*row}
    page = report.read_text()
    for heading in ("HD95", "mean distance", "surface Dice", "lesion Dice", "PQ", "SQ", "RQ (F1)", "centre-line Dice"):
        assert heading in texts["table"]
        assert page.count(f"<summary>{heading} of the cases, by class</summary>") == 2
        assert page.count(f"<summary>{heading}: differences of the cases, by class</summary>") == 1


def test_lengths_in_plots() -> None:
    """From 0 to the highest whisker, whatever is beyond; the worst first; a class that is inf in all cases."""
    from softdice.scoring.plots import box_plots

    values = np.array([[1.0, np.inf, np.nan], [2.0, np.inf, np.nan], [3.0, np.inf, np.nan], [np.inf, np.inf, np.nan]])
    page = box_plots(["a", "b", "c"], values, "mm", longest=None)
    assert "1 ▸" in page
    assert "inf in 4" in page
    assert "in no case" in page
    assert re.findall(r"text-anchor='\w+'>([\d.]+)</text></svg>", page)[-1] == "4"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--matching", "0.5"], "--matching: expected --lesions or --instances with it, got neither"),
        (["--lesions", "--matching", "1"], "--matching: expected an overlap (IoU) below 1 that pairs exceed"),
        (["--lesions", "--matching", ">=0"], "--matching: expected an overlap (IoU) below 1 that pairs exceed"),
        (["--lesions", "--matching", "BraTS"], "got 'BraTS'. Example: 0.5"),
        (["--lesions", "--soft"], "--lesions: expected label maps or --threshold, got --soft"),
        (["--metrics", "lesions"], "--metrics: expected some of precision, recall, specificity, volume, got 'lesions'"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(tmp_path: Path, options: list[str], message: str) -> None:
    saved(tmp_path / "p.nii.gz", np.ones((2, 3, 4)))
    code, _, said = command(tmp_path / "p.nii.gz", tmp_path / "p.nii.gz", *options)
    assert code == 2
    assert message in " ".join(said.split())


def test_pictures_have_no_volume_for_the_rules_of_brats(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for side in ("p", "t"):
        (tmp_path / side).mkdir()
        image.fromarray(np.eye(9, dtype=np.uint8)).save(tmp_path / side / "a.png")
    code, out, _ = command(tmp_path / "p", tmp_path / "t", "--lesions", "--centreline", "--format", "csv")
    assert code == 0
    assert out.splitlines()[1].endswith(",1.0,1.0,1.0,1.0,1.0")
    code, _, said = command(tmp_path / "p", tmp_path / "t", "--lesions", "--matching", "BraTS-MET")
    assert code == 1
    assert "--matching: expected a file that says how large a voxel is, got none. Pass an overlap" in said


# --- the table of docs/distances.md


def test_the_table_of_empty_masks() -> None:
    """What each program returns where both masks are empty, and where one is."""
    page = (Path(__file__).parents[1] / "docs" / "distances.md").read_text()
    full, none = np.zeros((2, 8, 8, 8), bool)
    full[2:5, 2:5, 2:5] = True
    sides = [tuple(torch.from_numpy(each)[None] for each in pair) for pair in ((none, none), (full, none))]
    ours = [[*scores(*pair), centreline_dice(*tensors, num_classes=1).item()]
            for pair, tensors in zip(((none, none), (full, none)), sides, strict=True)]  # fmt: skip
    assert _row("softdice", ours) in page
    pytest.importorskip("panoptica", reason="panoptica is not installed: run make test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [panoptica_scores(*pair, threshold=0.5, centreline=True) for pair in ((none, none), (full, none))]
    assert _row("panoptica", theirs) in page


def _row(program: str, values: list[list[float]]) -> str:
    cells = [f"{value:g}" for pair in zip(*values, strict=True) for value in pair]
    return f"| {program} | {' | '.join(cells)} |"


# --- against panoptica


def panoptica_scores(p: np.ndarray, t: np.ndarray, threshold: float, *, centreline: bool = False) -> list[float]:
    """Mean Dice of pairs times the F1 of the detection, and the three qualities."""
    panoptica: Any = pytest.importorskip("panoptica", reason="panoptica is not installed: run make test")
    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=threshold),
        instance_metrics=[panoptica.Metric.DSC, panoptica.Metric.IOU],
        global_metrics=[panoptica.Metric.clDSC] if centreline else [],
    )
    result = evaluator.evaluate(p.astype(np.uint8), t.astype(np.uint8), verbose=False)["ungrouped"]
    found = [result.pq_dsc, result.pq, result.sq, result.rq]
    return [*found, result.global_bin_cldsc] if centreline else found


def agrees_with_panoptica(p: np.ndarray, t: np.ndarray, threshold: float) -> list[float]:
    """panoptica takes corners in 3-D and faces in 2-D. Its means are of pairs only; ours count the others, too."""
    neighbours = "faces" if p.ndim == 2 else "corners"
    ours = scores(p, t, matching=threshold, neighbours=neighbours, reach="at_least")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dice, *theirs = panoptica_scores(p, t, threshold)
    assert ours[1:] == pytest.approx(theirs, rel=1e-12, nan_ok=True)
    f1 = ours[3]
    # TP / (TP + FP + FN) = f / (2 - f), where f is the F1 score
    assert ours[0] * (2 - f1) == pytest.approx(dice, rel=1e-12, nan_ok=True)
    return ours


@pytest.mark.peers
def test_panoptica_on_random_pairs() -> None:
    """500 pairs, half of them in 2-D."""
    between = 0
    for seed in range(500):
        found = agrees_with_panoptica(*pair_of_blobs(seed), threshold=(0.5, 0.7, 0.5, 0.6)[seed % 4])
        between += 0 < found[1] < 1
    assert between > 300


def test_panoptica_on_real_pairs() -> None:
    nibabel = pytest.importorskip("nibabel")
    folder = DATA / "totalsegmentator"
    if not folder.exists():
        pytest.skip("real data not found: set SOFTDICE_DATA to a folder that holds totalsegmentator")
    arrays = (nibabel.load(folder / f"{name}.nii.gz").dataobj for name in ("example_seg_fast", "example_seg"))
    p, t = (np.asarray(array).astype(np.uint8) for array in arrays)
    compared = [agrees_with_panoptica(p == c, t == c, 0.5) for c in np.unique(t) if c]
    assert len(compared) > 35
    assert sum(0 < found[1] < 1 for found in compared) > 20
