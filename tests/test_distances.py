"""Distances between surfaces: by hand, the compiled loops against the definition, and against other programs."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softdice.metrics import average_surface_distance, hausdorff_distance, surface_dice, surfaces
from softdice.metrics.surfaces import compiled_distances, element_sizes, surface_distances

ndimage = pytest.importorskip("scipy.ndimage")

DATA = Path(os.environ.get("SOFTDICE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
NAN, INF = float("nan"), float("inf")
DEFINITIONS = ("voxels", "surface")


@pytest.fixture(params=["numba", "scipy"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "scipy":
        monkeypatch.setattr(surfaces, "kernels", lambda: None)
    else:
        pytest.importorskip("numba")
    return request.param


def blobs(shape: tuple[int, ...], classes: int, seed: int, smooth: float = 2.0) -> np.ndarray:
    """Labels of smooth shapes."""
    fields = np.random.default_rng(seed).standard_normal((classes, *shape))
    return np.stack([ndimage.gaussian_filter(field, smooth) for field in fields]).argmax(0).astype(np.uint8)


def mask(*voxels: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    labels = torch.zeros(1, *shape, dtype=torch.uint8)
    for voxel in voxels:
        labels[0][voxel] = 1
    return labels


# --- by hand


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_two_voxels(definition: Any) -> None:
    """Each element of one is as far from the other as the voxels are apart: 3 x 1, 2 x 2 and 1 x 2, or less, where the
    corners of voxels face each other."""
    one, other = mask((1, 1, 1), shape=(4, 6, 7)), mask((2, 3, 3), shape=(4, 6, 7))
    options: dict[str, Any] = {"num_classes": 1, "spacing": (3.0, 2.0, 1.0), "definition": definition}
    # corners: those of one end where the other begins in x, and 1 away in y and z; the far ones are a voxel further
    far = (9 + 16 + 4) ** 0.5
    assert hausdorff_distance(one, other, **options).item() == pytest.approx(far, rel=1e-15)
    if definition == "voxels":
        assert average_surface_distance(one, other, **options).item() == pytest.approx(far, rel=1e-15)
    else:
        apart = [(x * x + y * y + z * z) ** 0.5 for x in (0, 3) for y in (2, 4) for z in (1, 2)]
        assert average_surface_distance(one, other, **options).item() == pytest.approx(np.mean(apart), rel=1e-15)


@pytest.mark.usefixtures("engine")
def test_a_shifted_square() -> None:
    """Of the 8 boundary pixels of each 3 x 3 square 4 lie on the boundary of the other, 4 are one pixel away."""
    one = mask(*((r, c) for r in (1, 2, 3) for c in (1, 2, 3)), shape=(6, 6))
    other = one.roll(1, 2)
    options: dict[str, Any] = {"num_classes": 1, "spacing": (2.0, 0.5)}
    assert hausdorff_distance(one, other, **options).item() == 0.5
    assert average_surface_distance(one, other, **options).item() == 0.25
    assert surface_dice(one, other, tolerance=0.4, **options).item() == 0.5
    assert surface_dice(one, other, tolerance=0.5, **options).item() == 1.0


@pytest.mark.usefixtures("engine")
def test_directions_and_percentiles_of_voxels() -> None:
    """A row of four pixels, of which the target has the first: 0, 1, 2 and 3 from the input, 0 from the target."""
    row, first = mask((1, 0), (1, 1), (1, 2), (1, 3), shape=(3, 5)), mask((1, 0), shape=(3, 5))

    def distance(direction: Any, percentile: float | None = None) -> float:
        return hausdorff_distance(row, first, num_classes=1, direction=direction, percentile=percentile).item()

    assert [distance(each) for each in ("symmetric", "from_input", "from_target")] == [3, 3, 0]
    assert [distance("symmetric", each) for each in (0, 50, 90, 100)] == pytest.approx([0, 1.5, 2.7, 3], rel=1e-15)
    means = [average_surface_distance(row, first, num_classes=1, direction=each).item() for each in ("symmetric",)]
    means += [average_surface_distance(row, first, num_classes=1, direction="from_input").item()]
    means += [average_surface_distance(row, first, num_classes=1, direction="from_target").item()]
    assert means == pytest.approx([6 / 5, 6 / 4, 0], rel=1e-15)


@pytest.mark.usefixtures("engine")
def test_lengths_weigh_the_corners_of_pixels() -> None:
    """Two pixels against the first of them: corners weigh half a diagonal, the two between the pixels their width."""
    two, one = mask((1, 1), (1, 2), shape=(4, 5)), mask((1, 1), shape=(4, 5))
    corner, between = 0.5 * 2**0.5, 1.0
    total, far = 8 * corner + 2 * between, 2 * corner
    options: dict[str, Any] = {"num_classes": 1, "definition": "surface"}
    assert average_surface_distance(two, one, **options).item() == pytest.approx(far / total, rel=1e-15)
    assert surface_dice(two, one, tolerance=0.9, **options).item() == pytest.approx(1 - far / total, rel=1e-15)
    within = 100 * (1 - far / (4 * corner + 2 * between))  # of the first boundary, in per cent
    found = [hausdorff_distance(two, one, percentile=p, **options).item() for p in (within - 0.1, within + 0.1)]
    assert found == [0, 1]


def test_areas_of_flat_and_of_pointed_surfaces() -> None:
    sizes = element_sizes((1.0, 2.0, 3.0))
    assert sizes[[0, 255]].tolist() == [0, 0]
    # 4 voxels of one face: the face itself, of the axis across which the voxels differ
    assert sizes[[0b00001111, 0b00110011, 0b01010101]].tolist() == pytest.approx([6, 3, 2], rel=1e-15)
    # one corner: a triangle through the middles of three edges
    legs = np.array([[-0.5, 1.0, 0], [-0.5, 0, 1.5]])
    assert sizes[0b1] == pytest.approx(np.linalg.norm(np.cross(*legs)) / 2, rel=1e-15)
    assert sizes[0b10000000] == sizes[0b01111111] == sizes[0b1]
    # an edge: a rectangle between the middles of edges
    assert sizes[0b11] == pytest.approx(3 * np.hypot(0.5, 1.0), rel=1e-15)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_empty_masks(definition: Any) -> None:
    """Labels: 0 in both, 1 in the input only, 2 in the target only, 3 in neither."""
    input, target = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]]), torch.tensor([[[0, 0, 2, 2], [0, 0, 2, 2]]])
    options: dict[str, Any] = {"num_classes": 4, "definition": definition}
    for direction in ("symmetric", "from_input", "from_target"):
        for percentile in (None, 95):
            found = hausdorff_distance(input, target, direction=direction, percentile=percentile, **options)
            np.testing.assert_array_equal(found, [[0, INF, INF, NAN]])
        found = average_surface_distance(input, target, direction=direction, **options)
        np.testing.assert_array_equal(found, [[0, INF, INF, NAN]])
    np.testing.assert_array_equal(surface_dice(input, target, tolerance=1, **options), [[1, 0, 0, NAN]])


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_what_is_ignored_is_in_no_class(definition: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    input, target = (torch.randint(0, 3, (2, 9, 10, 11), generator=generator) for _ in range(2))
    void = torch.rand(target.shape, generator=generator) < 0.2
    options: dict[str, Any] = {"num_classes": 4, "spacing": (1, 2, 3), "definition": definition}
    for score in (hausdorff_distance, average_surface_distance):
        expected = score(input.masked_fill(void, 3), target.masked_fill(void, 3), **options)
        assert expected[:, :3].isfinite().all()
        expected[:, 3] = NAN
        for ignore, classes in ((255, [0, 1, 2]), (-1, [0, 1, 2]), (3, None)):
            labels = target.masked_fill(void, ignore)
            wild = input.masked_fill(void, 77)  # whatever was predicted there
            found = score(wild, labels, ignore_index=ignore, classes=classes, **options)
            np.testing.assert_array_equal(found, expected[:, :3] if classes else expected)
    everything = torch.full_like(target, 255)
    assert surface_dice(input, everything, num_classes=3, tolerance=1, ignore_index=255).isnan().all()


# --- the compiled loops against the definition, and every form of label map


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("shape", [(12, 17, 70), (1, 9, 80), (31, 40), (1, 50), (90, 2, 3)])
def test_the_loops_are_the_definition(shape: tuple[int, ...], definition: Any) -> None:
    pytest.importorskip("numba")
    spacing = (0.7, 1.3, 2.5)[: len(shape)]
    for seed in range(6):
        p, t = (blobs(shape, 4, 2 * seed + i, smooth=1 + seed / 3) for i in range(2))
        for label in range(4):
            if not ((p == label).any() and (t == label).any()):
                continue
            expected = surface_distances(p == label, t == label, spacing, definition)
            found = compiled_distances(np.pad(p == label, 1), np.pad(t == label, 1), spacing, definition)
            assert (expected.input_weight is None) == (definition == "voxels")
            for one, other in zip(found, expected, strict=True):
                if other is not None:
                    np.testing.assert_allclose(one, other, rtol=1e-14, atol=0)


def test_far_apart_and_sparse() -> None:
    """Rows and layers without any element, distances of half the image."""
    pytest.importorskip("numba")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p, t = np.zeros((2, 12, 40, 35), bool)
        for each in (p, t):
            each[tuple(rng.integers(0, n, 3) for n in each.shape)] = True
        expected = surface_distances(p, t, (1.5, 0.3, 4.0), "voxels")
        found = compiled_distances(np.pad(p, 1), np.pad(t, 1), (1.5, 0.3, 4.0), "voxels")
        np.testing.assert_allclose(found.input, expected.input, rtol=1e-14)
        np.testing.assert_allclose(found.target, expected.target, rtol=1e-14)


@pytest.mark.usefixtures("engine")
def test_dtype_layout_and_threads_change_nothing() -> None:
    p, t = (torch.from_numpy(np.stack([blobs((14, 15, 16), 5, seed + i) for i in range(2)])) for seed in (0, 7))
    options: dict[str, Any] = {"num_classes": 5, "spacing": (1, 2, 3), "definition": "surface"}
    expected = average_surface_distance(p, t, **options)
    assert expected.shape == (2, 5)
    assert expected.dtype == torch.float64
    assert expected.isfinite().all()
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        torch.testing.assert_close(average_surface_distance(p.to(dtype), t, **options), expected, rtol=0, atol=0)
    turned = p.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    torch.testing.assert_close(average_surface_distance(turned, t, **options), expected, rtol=0, atol=0)
    torch.testing.assert_close(average_surface_distance(turned, turned.flip(2), **options),
                               average_surface_distance(p, p.flip(2), **options), rtol=0, atol=0)  # fmt: skip
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.testing.assert_close(average_surface_distance(p, t, **options), expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
    some = average_surface_distance(p, t, classes=[3, 1], **options)
    torch.testing.assert_close(some, expected[:, [3, 1]], rtol=0, atol=0)
    bools = [each == 1 for each in (p, t)]
    torch.testing.assert_close(average_surface_distance(*bools, **{**options, "num_classes": 1}), expected[:, [1]])
    hot = [torch.nn.functional.one_hot(each.long(), 5).movedim(-1, 1) for each in (p, t)]
    torch.testing.assert_close(average_surface_distance(*hot, **options), expected, rtol=0, atol=0)


@pytest.mark.usefixtures("engine")
def test_axes_of_length_1_do_not_count() -> None:
    """(B, 1, H, W) is what (B, H, W) is: as a volume of one slice every voxel of it would be boundary."""
    p, t = (torch.from_numpy(blobs((20, 21), 3, seed))[None] for seed in (1, 2))
    expected = hausdorff_distance(p, t, num_classes=3, spacing=(2, 3))
    assert expected.isfinite().all()
    for axis, spacing in ((1, (9, 2, 3)), (2, (2, 9, 3)), (3, (2, 3, 9))):
        found = hausdorff_distance(p.unsqueeze(axis), t.unsqueeze(axis), num_classes=3, spacing=spacing)
        np.testing.assert_array_equal(found, expected)
    volume = torch.from_numpy(blobs((8, 9, 10), 3, 3))[None, None]
    assert hausdorff_distance(volume, volume.flip(2), num_classes=3).shape == (1, 3)


def test_tolerances_that_rounding_alone_exceeds() -> None:
    """3 * 0.1 is above 0.3 in float64, and in float32, as NIfTI headers have it."""
    one, other = mask((0, 0), shape=(1, 5)), mask((0, 3), shape=(1, 5))
    for spacing in (0.1, float(np.float32(0.1))):
        assert surface_dice(one, other, num_classes=1, tolerance=0.3, spacing=spacing).item() == 1
        assert surface_dice(one, other, num_classes=1, tolerance=0.2999, spacing=spacing).item() == 0


def test_a_tolerance_for_each_class() -> None:
    p, t = torch.tensor([[[1, 1, 0, 2, 2, 0, 0]]]), torch.tensor([[[0, 1, 1, 0, 0, 2, 2]]])
    found = surface_dice(p, t, num_classes=3, classes=[1, 2], tolerance=[1, 1])
    assert found.tolist() == [[1.0, 0.5]]
    assert surface_dice(p, t, num_classes=3, classes=[1, 2], tolerance=[0, 2]).tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"percentile": 101}, r"hausdorff_distance: expected percentile in \[0, 100\], got 101\. Choose"),
        ({"percentile": "95"}, r"hausdorff_distance: expected percentile to be a number in \[0, 100\], got '95'\."),
        ({"spacing": (1, 2, 3)}, r"spacing of 2 positive numbers for images of shape \(4, 5\), got \(1, 2, 3\)\."),
        ({"spacing": 0}, r"expected spacing of 2 positive numbers for images of shape \(4, 5\), got 0\."),
        ({"spacing": (1, NAN)}, r"expected spacing of 2 positive numbers"),
        ({"definition": "edges"}, r"expected definition to be one of 'voxels', 'surface', got 'edges'\."),
        ({"direction": "both"}, r"expected direction to be one of 'symmetric', 'from_input', 'from_target', got"),
        ({"classes": [3]}, r"expected classes to be distinct class numbers in \[0, 3\), got 3\."),
        ({"num_classes": 0}, r"expected num_classes >= 1, got 0\."),
        ({"target": torch.zeros(1, 4, 6).long()}, r"expected target of shape \(1, 4, 5\), got \(1, 4, 6\)\."),
        ({"input": torch.zeros(1, 4, 5)}, r"expected integer labels in input, got torch.float32\."),
        ({"input": np.zeros((1, 4, 5))}, r"expected integer labels in input, got torch.float64\."),
        ({"input": np.ma.masked_equal(np.zeros((1, 4, 5), int), 0)}, r"without masked entries, got 20 of them\. Fill"),
        ({"input": [[[0]]]}, r"expected input to be a Tensor, got list\."),
        ({"spacing": "1"}, r"expected spacing of 2 positive numbers for images of shape \(4, 5\), got '1'\."),
        ({"spacing": np.ones((2, 1))}, r"expected spacing of 2 positive numbers"),
        ({"spacing": 1e-200}, r"got 1e-200\. Pass the size of a voxel along each axis, from 1e-50 to 1e\+50\."),
        ({"spacing": (1, 1e200)}, r"got \(1, 1e\+200\)\."),
        ({"spacing": True}, r"expected spacing of 2 positive numbers .* got True\."),
        ({"spacing": (1.0, np.True_)}, r"expected spacing of 2 positive numbers"),
        ({"classes": [False, True]}, r"expected classes to be a sequence of ints, got \[False, True\]\."),
        ({"classes": np.array([False, True])}, r"expected classes to be a sequence of ints"),
        ({"classes": torch.tensor([True])}, r"expected classes to be a sequence of ints"),
        ({"ignore_index": 1.5}, r"expected ignore_index to be an int or None, got 1\.5\."),
        ({"target": torch.full((1, 4, 5), 7)}, r"target with labels in \[0, 3\), got 7 \(20 voxels\)\. Raise"),
        ({"input": torch.full((1, 4, 5), -1)}, r"input with labels in \[0, 3\), got -1 \(20 voxels\)\."),
    ],
)  # fmt: skip
def test_mistakes(change: dict[str, Any], text: str) -> None:
    arguments = {"input": torch.zeros(1, 4, 5).long(), "target": torch.zeros(1, 4, 5).long(), "num_classes": 3}
    with pytest.raises((ValueError, TypeError), match=text):
        hausdorff_distance(**{**arguments, **change})


@pytest.mark.parametrize(
    "spacing, plain",
    [
        (np.array([1.0, 1, 3]), (1, 1, 3)), (np.array([1, 1, 3], np.int16), (1, 1, 3)), (np.int64(2), 2),
        (torch.tensor(2.0), 2), (torch.tensor([2]), (2,) * 3), (np.float32(0.5), 0.5), (np.array(2), 2),
        ([torch.tensor(1.0), np.float64(2), 3], (1, 2, 3)), (torch.tensor([1, 2, 3]), (1, 2, 3)),
    ],
)  # fmt: skip
def test_numbers_of_numpy_and_torch(spacing: Any, plain: Any) -> None:
    t = torch.zeros(1, 8, 8, 8, dtype=torch.uint8)
    t[0, 2:5, 2:5, 2:5] = 1
    p, options = t.roll(1, 3), {"num_classes": 2, "classes": [1]}
    if isinstance(spacing, Tensor) and spacing.shape == (1,):
        spacing = spacing.expand(3)
    for score, more, same in (
        (hausdorff_distance, {"percentile": np.float32(95)}, {"percentile": 95}),
        (average_surface_distance, {}, {}),
        (surface_dice, {"tolerance": torch.tensor(1.5)}, {"tolerance": 1.5}),
        (surface_dice, {"tolerance": np.array([1])}, {"tolerance": [1]}),
    ):
        found = score(p, t, spacing=spacing, **options, **more)  # type: ignore[operator]
        assert torch.equal(found, score(p, t, spacing=plain, **options, **same))  # type: ignore[operator]


def test_more_mistakes() -> None:
    with pytest.raises(ValueError, match=r"surface_dice: expected tolerance of 3 numbers, got 2\. Pass one number"):
        surface_dice(*torch.zeros(2, 1, 4, 5).long(), num_classes=3, tolerance=[1, 2])
    with pytest.raises(ValueError, match=r"surface_dice: expected tolerance >= 0, got -1\."):
        surface_dice(*torch.zeros(2, 1, 4, 5).long(), num_classes=3, tolerance=-1)
    for shape in ((4, 5), (1, 2, 3, 4, 5), (4,)):
        with pytest.raises(
            ValueError, match=r"average_surface_distance: expected input of shape \(B, \*S\) with 2 or 3"
        ):
            average_surface_distance(*torch.zeros(2, *shape).long(), num_classes=3)


# --- against other programs


def hot(labels: np.ndarray, classes: int) -> Tensor:
    return torch.from_numpy(np.stack([labels == c for c in range(classes)])[None]).float()


def agrees_with_monai(p: np.ndarray, t: np.ndarray, classes: int, spacing: tuple[float, ...], tolerance: float) -> int:
    """Within 1e-6; percentiles 1e-5, as MONAI interpolates in float32. Returns how many classes were compared."""
    monai = pytest.importorskip("monai.metrics")
    ours = torch.from_numpy(p)[None], torch.from_numpy(t)[None]
    theirs: dict[str, Any] = {"include_background": True, "spacing": spacing}
    options: dict[str, Any] = {"num_classes": classes, "spacing": spacing}
    pair = hot(p, classes), hot(t, classes)
    rows: list[tuple[Tensor, Tensor]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for percentile, direction in ((None, "symmetric"), (95, "symmetric"), (80, "from_input")):
            directed = {"percentile": percentile, "directed": direction != "symmetric"}
            rows.append((
                hausdorff_distance(*ours, percentile=percentile, direction=direction, **options),  # type: ignore[arg-type]
                monai.compute_hausdorff_distance(*pair, **directed, **theirs),
            ))  # fmt: skip
        mean, way = monai.compute_average_surface_distance, "from_input"
        rows.append((average_surface_distance(*ours, **options), mean(*pair, symmetric=True, **theirs)))
        rows.append((average_surface_distance(*ours, direction=way, **options), mean(*pair, **theirs)))
        for definition in DEFINITIONS:
            subvoxels = {"class_thresholds": [tolerance] * classes, "use_subvoxels": definition == "surface"}
            rows.append((
                surface_dice(*ours, tolerance=tolerance, definition=definition, **options),  # type: ignore[arg-type]
                monai.compute_surface_dice(*pair, **subvoxels, **theirs),
            ))  # fmt: skip
    for i, (found, expected) in enumerate(rows):
        percentile = i in (1, 2)
        if percentile:  # it interpolates between inf and inf, which is nan
            expected = torch.where(expected.isnan(), found.where(found.isinf(), NAN), expected)
        rtol = 1e-5 if percentile else 1e-6
        torch.testing.assert_close(found, expected.double(), rtol=rtol, atol=1e-6, equal_nan=True)
    return int(rows[0][0].isfinite().sum())


@pytest.mark.peers
def test_monai_on_random_pairs() -> None:
    """500 masks in 115 pairs, half of them in 2-D."""
    compared = 0
    for seed in range(115):
        rng = np.random.default_rng(seed)
        shape = tuple(rng.integers(8, 20, 2 + seed % 2).tolist())
        spacing = tuple(rng.uniform(0.5, 3, len(shape)).round(2).tolist())
        p, t = (blobs(shape, 5, 2 * seed + i, smooth=1.5) for i in range(2))
        compared += agrees_with_monai(p, t, 5, spacing, float(rng.uniform(0.5, 3)))
    assert compared > 500


def real(*parts: str) -> np.ndarray:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data not found: set SOFTDICE_DATA to a folder that holds {Path(*parts)}")
    return np.asarray(pytest.importorskip("nibabel").load(path).dataobj).astype(np.uint8)


@pytest.mark.peers
def test_monai_on_organs() -> None:
    p, t = (real("totalsegmentator", f"{name}.nii.gz") for name in ("example_seg_fast", "example_seg"))
    seen = sorted({*np.unique(p)} | {*np.unique(t)})
    compact = np.zeros(256, np.uint8)
    compact[seen] = np.arange(len(seen))
    assert agrees_with_monai(compact[p], compact[t], len(seen), (3.0, 3.0, 3.0), 3.0) > 35


def test_monai_on_an_organ_in_2_d() -> None:
    p, t = (real("totalsegmentator", f"{name}.nii.gz")[:, :, 15] for name in ("example_seg_fast", "example_seg"))
    assert agrees_with_monai(p % 8, t % 8, 8, (1.5, 0.8), 1.5) > 5


def test_medpy() -> None:
    """Its HD95 is of both directions together; the rest is the same."""
    binary = pytest.importorskip("medpy.metric.binary")
    for seed in range(10):
        p, t = (blobs((10, 12, 14), 2, 2 * seed + i) for i in range(2))
        spacing, ours = (0.8, 1.5, 2.0), (torch.from_numpy(p)[None], torch.from_numpy(t)[None])
        options: dict[str, Any] = {"num_classes": 1, "spacing": spacing}
        found = hausdorff_distance(*ours, **options).item()
        assert found == pytest.approx(binary.hd(p, t, spacing), rel=1e-12)
        ways = [
            average_surface_distance(*ours, direction=way, **options).item() for way in ("from_input", "from_target")
        ]
        assert ways == pytest.approx([binary.asd(p, t, spacing), binary.asd(t, p, spacing)], rel=1e-12)
        mean = average_surface_distance(*ours, **options).item()
        assert mean == pytest.approx(binary.assd(p, t, spacing), rel=1e-12)


@pytest.fixture
def deepmind(monkeypatch: pytest.MonkeyPatch) -> Any:
    """surface-distance, with the names that NumPy and SciPy have taken away since."""
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)
    monkeypatch.setattr(ndimage, "filters", ndimage, raising=False)
    monkeypatch.setattr(ndimage, "morphology", ndimage, raising=False)
    return pytest.importorskip("surface_distance", reason="surface-distance is not installed: run make test")


@pytest.mark.peers
def test_deepmind(deepmind: Any) -> None:
    """Surface Dice at two tolerances, robust Hausdorff, and the mean of each direction, of 500 masks in 180 pairs."""
    compared = 0
    for seed in range(180):
        rng = np.random.default_rng(seed)
        shape = tuple(rng.integers(8, 20, 2 + seed % 2).tolist())
        spacing = tuple(rng.uniform(0.5, 3, len(shape)).round(2).tolist())
        p, t = (blobs(shape, 3, 2 * seed + i, smooth=1.5) for i in range(2))
        ours = torch.from_numpy(p)[None], torch.from_numpy(t)[None]
        options: dict[str, Any] = {"num_classes": 3, "spacing": spacing, "definition": "surface"}
        found = [surface_dice(*ours, tolerance=tolerance, **options) for tolerance in (0.9, 2.1)]
        found += [hausdorff_distance(*ours, percentile=percentile, **options) for percentile in (None, 95, 77)]
        ways = ("from_target", "from_input")
        found += [average_surface_distance(*ours, direction=way, **options) for way in ways]  # type: ignore[arg-type]
        for label in range(3):
            if not ((p == label).any() and (t == label).any()):
                continue
            distances = deepmind.compute_surface_distances(t == label, p == label, spacing)
            expected = [deepmind.compute_surface_dice_at_tolerance(distances, tolerance) for tolerance in (0.9, 2.1)]
            expected += [deepmind.compute_robust_hausdorff(distances, percentile) for percentile in (100, 95, 77)]
            expected += deepmind.compute_average_surface_distance(distances)
            np.testing.assert_allclose([each[0, label] for each in found], expected, rtol=1e-9, atol=1e-12)
            compared += 1
    assert compared > 500


# --- the table of docs/distances.md


def monai_scores(p: np.ndarray, t: np.ndarray) -> list[object]:
    monai = pytest.importorskip("monai.metrics")
    pair: Any = [torch.from_numpy(each)[None, None].float() for each in (p, t)]
    values = [
        monai.compute_hausdorff_distance(*pair, include_background=True),
        monai.compute_hausdorff_distance(*pair, include_background=True, percentile=95),
        monai.compute_average_surface_distance(*pair, include_background=True, symmetric=True),
        monai.compute_surface_dice(*pair, [1.0], include_background=True),
    ]
    return [value.item() for value in values]


def medpy_scores(p: np.ndarray, t: np.ndarray) -> list[object]:
    binary = pytest.importorskip("medpy.metric.binary")
    return [*(_or_error(lambda f=f: f(p, t)) for f in (binary.hd, binary.hd95, binary.assd)), "-"]


def deepmind_scores(p: np.ndarray, t: np.ndarray) -> list[object]:
    module: Any = pytest.importorskip("surface_distance", reason="surface-distance is not installed: run make test")
    distances = module.compute_surface_distances(t, p, (1, 1, 1))
    means = module.compute_average_surface_distance(distances)
    values = [module.compute_robust_hausdorff(distances, percentile) for percentile in (100, 95)]
    return [*values, tuple(map(float, means)), module.compute_surface_dice_at_tolerance(distances, 1)]


def simpleitk_scores(p: np.ndarray, t: np.ndarray) -> list[object]:
    sitk: Any = pytest.importorskip("SimpleITK")
    filters = sitk.HausdorffDistanceImageFilter()
    images = [sitk.GetImageFromArray(each.astype(np.uint8)) for each in (p, t)]
    return [_or_error(lambda: filters.Execute(*images)), "-", "-", "-"]


def softdice_scores(p: np.ndarray, t: np.ndarray) -> list[object]:
    pair = [torch.from_numpy(each)[None] for each in (p, t)]
    values = [
        hausdorff_distance(*pair, num_classes=1),
        hausdorff_distance(*pair, num_classes=1, percentile=95),
        average_surface_distance(*pair, num_classes=1),
        surface_dice(*pair, num_classes=1, tolerance=1),
    ]
    return [value.item() for value in values]


def _or_error(call: Callable[[], object]) -> object:
    try:
        return call()
    except RuntimeError:
        return "error"


PROGRAMS = {
    "softdice": softdice_scores, "MONAI": monai_scores, "MedPy": medpy_scores, "DeepMind": deepmind_scores,
    "SimpleITK": simpleitk_scores,
}  # fmt: skip


@pytest.mark.usefixtures("deepmind")
def test_the_table_of_empty_masks() -> None:
    """docs/distances.md: what each program returns where both masks are empty, and where one is."""
    page = (Path(__file__).parents[1] / "docs" / "distances.md").read_text()
    full, none = np.zeros((2, 8, 8, 8), bool)
    full[2:5, 2:5, 2:5] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for program, scores in PROGRAMS.items():
            cells = []
            for both, one in zip(scores(none, none), scores(full, none), strict=True):
                cells += [str(each).replace("(", "").replace(")", "") for each in (both, one)]
            row = f"| {program} | {' | '.join(cells)} |".replace("0.0", "0")
            assert row in page, row


def panoptica_distances(p: np.ndarray, t: np.ndarray) -> tuple[float, float, float]:
    """HD95, mean distance and surface Dice of two masks, each taken as one object."""
    panoptica: Any = pytest.importorskip("panoptica", reason="panoptica is not installed: run make test")
    metric = panoptica.Metric
    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.UNMATCHED_INSTANCE,
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=0.1),
        instance_metrics=[metric.IOU, metric.HD95, metric.ASSD, metric.NSD],
        global_metrics=[],
    )
    found = evaluator.evaluate(p.astype(np.uint8), t.astype(np.uint8), verbose=False)["ungrouped"]
    return found.sq_hd95, found.sq_assd, found.sq_nsd


def test_the_table_of_other_numbers() -> None:
    """docs/distances.md, "Same name, other number": what each program returns, and what we do."""
    binary = pytest.importorskip("medpy.metric.binary")
    monai = pytest.importorskip("monai.metrics")
    sitk: Any = pytest.importorskip("SimpleITK")
    skimage = pytest.importorskip("skimage.metrics")
    torchmetrics: Any = pytest.importorskip("torchmetrics.functional.segmentation")
    p, t, whole, slab, moved = (np.zeros(shape, bool) for shape in [(12, 12)] * 3 + [(8, 8, 1)] * 2)
    t[1:10, 1:8], p[3:10, 3:6], whole[1:8, 1:8], slab[2:6, 2:6], moved[3:7, 2:6] = [True] * 5
    left, right = (np.pad(np.ones((3, 3), bool), ((2, 11), (columns, 29 - columns))) for columns in (2, 5))
    holed = whole.copy()
    holed[3:6, 3:6] = False

    def ours(score: Any, one: np.ndarray, other: np.ndarray, **options: Any) -> float:
        return float(score(one[None], other[None], num_classes=1, **options).item())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hd95, mean, share = panoptica_distances(p, t)
        assert binary.hd95(p, t) == hd95
        far = sitk.HausdorffDistanceImageFilter()
        far.Execute(*(sitk.GetImageFromArray(each.astype(np.uint8)) for each in (whole, holed)))
        assert far.GetHausdorffDistance() == skimage.hausdorff_distance(whole, holed)
        pair = [torch.from_numpy(np.stack([~each, each]))[None].float() for each in (slab, moved)]
        flat = binary.assd(slab, moved)
        masks = [torch.from_numpy(each)[None, None].long() for each in (right, left)]
        wide = torchmetrics.hausdorff_distance(*masks, num_classes=1, include_background=True).item()
        assert monai.compute_average_surface_distance(*pair, symmetric=True).item() == flat
    together = ours(hausdorff_distance, p, t, percentile=95)
    rows = [
        ("HD95", "MedPy, panoptica", hd95, together),
        ("mean distance", "panoptica", mean, ours(average_surface_distance, p, t)),
        ("surface Dice at 0.5", "panoptica", share, ours(surface_dice, p, t, tolerance=0.5)),
        (
            "Hausdorff distance",
            "SimpleITK, scikit-image",
            far.GetHausdorffDistance(),
            ours(hausdorff_distance, whole, holed),
        ),
        ("Hausdorff distance of a square", "torchmetrics", wide, ours(hausdorff_distance, right, left)),
        ("mean distance of a square", "MONAI, MedPy", flat, ours(average_surface_distance, slab, moved)),
    ]
    lines = (Path(__file__).parents[1] / "docs" / "distances.md").read_text(encoding="utf-8").splitlines()
    for score, programs, theirs, own in rows:
        (line,) = [line for line in lines if line.startswith(f"| {score}") and f"| {programs} |" in line]
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[4] == f"{theirs:.5g}", line
        assert cells[5] == f"{own:.5g}" != cells[4], line


# --- metrics that stream


def stream() -> list[tuple[Tensor, Tensor]]:
    """Ten cases of three classes; in one the input lacks a class, in one both do."""
    cases = [tuple(torch.from_numpy(blobs((9, 11), 3, 2 * seed + i)) for i in range(2)) for seed in range(10)]
    cases[3] = cases[3][0].clamp(max=1), cases[3][1]
    cases[7] = cases[7][0].clamp(max=1), cases[7][1].clamp(max=1)
    return cases


def test_streaming_is_the_mean_over_the_cases() -> None:
    pytest.importorskip("torchmetrics")
    from softdice.metrics import AverageSurfaceDistance, HausdorffDistance, SurfaceDice

    options: dict[str, Any] = {"spacing": (2, 0.5), "definition": "surface"}
    pairs: list[tuple[Any, Callable[..., Tensor], dict[str, Any]]] = [
        (HausdorffDistance, hausdorff_distance, {"percentile": 95}),
        (AverageSurfaceDistance, average_surface_distance, {"direction": "from_target"}),
        (SurfaceDice, surface_dice, {"tolerance": [1.0, 1.5, 2.0]}),
    ]
    for metric, function, own in pairs:
        each = torch.cat([function(p[None], t[None], num_classes=3, **options, **own) for p, t in stream()])
        for penalty in (INF, 100.0, NAN):
            expected = each.where(~each.isinf(), penalty).nanmean(0)
            streams = [metric(3, average=average, penalty=penalty, **options, **own) for average in ("none", "macro")]
            for one in streams:
                for p, t in stream():
                    one.update(p[None], t[None])
            torch.testing.assert_close(streams[0].compute(), expected, rtol=1e-13, atol=0)
            torch.testing.assert_close(streams[1].compute(), expected.nanmean(), rtol=1e-13, atol=0)
            assert metric is SurfaceDice or bool(expected.isinf().any()) == (penalty == INF)


def test_streaming_in_any_order_and_over_ranks() -> None:
    """Bit for bit; and batches of logits are what their argmax is."""
    pytest.importorskip("torchmetrics")
    from softdice.metrics import HausdorffDistance

    def metric() -> Any:
        return HausdorffDistance(3, average="none", penalty=50.0)

    whole, ranks = metric(), [metric(), metric()]
    for i, (p, t) in enumerate(stream()):
        logits = torch.nn.functional.one_hot(p.long(), 3).movedim(-1, 0)[None].float()
        whole.update(logits, t[None, None])
        ranks[i % 2].update(p[None], t[None])
    ranks[0]._reduce_states(ranks[1].metric_state)
    assert torch.equal(ranks[0].compute(), whole.compute())
    back, batch = metric(), [torch.stack(sides) for sides in zip(*stream()[::-1], strict=True)]
    back.update(*batch)
    assert torch.equal(back.compute(), whole.compute())


def test_each_case_may_have_its_own_spacing() -> None:
    pytest.importorskip("torchmetrics")
    from softdice.metrics import HausdorffDistance

    metric = HausdorffDistance(1, spacing=7.0)
    for spacing in (1.0, 3.0):
        metric.update(mask((0, 0), shape=(2, 4)), mask((0, 3), shape=(2, 4)), spacing=(1.0, spacing))
    assert metric.compute().item() == 6
    metric.update(mask((0, 0), shape=(2, 4)), mask((0, 1), shape=(2, 4)))
    assert metric.compute().item() == pytest.approx(19 / 3)


def test_a_collection_keeps_apart_what_differs() -> None:
    """One pixel against one pixel: every percentile agrees, and the average does."""
    torchmetrics = pytest.importorskip("torchmetrics")
    from softdice.metrics import AverageSurfaceDistance, HausdorffDistance

    metrics = {"hd": HausdorffDistance(1), "hd50": HausdorffDistance(1, percentile=50), "a": AverageSurfaceDistance(1)}
    collection = torchmetrics.MetricCollection(metrics)
    collection.update(mask((0, 0), shape=(2, 4)), mask((0, 3), shape=(2, 4)))
    collection.update(mask((0, 0), (0, 1), (0, 2), shape=(2, 4)), mask((0, 0), shape=(2, 4)))
    found = {name: value.item() for name, value in collection.compute().items()}
    assert found == {"hd": 2.5, "hd50": 2.0, "a": pytest.approx((3 + 0.75) / 2)}


def test_mistakes_in_a_stream() -> None:
    pytest.importorskip("torchmetrics")
    from softdice.metrics import HausdorffDistance, SurfaceDice

    with pytest.raises(
        ValueError, match=r"HausdorffDistance: expected average to be one of 'macro', 'none', got 'micro'"
    ):
        HausdorffDistance(3, average="micro")
    penalties: list[Any] = [-1, -INF, np.float32(-INF), torch.tensor(-INF)]
    for penalty in penalties:
        got = "-1" if penalty == -1 else "-inf"
        with pytest.raises(ValueError, match=rf"HausdorffDistance: expected penalty >= 0, got {got}"):
            HausdorffDistance(3, penalty=penalty)
        with pytest.raises(ValueError, match=rf"SurfaceDice: expected penalty >= 0, got {got}"):
            SurfaceDice(3, tolerance=1, penalty=penalty)
    with pytest.raises(ValueError, match=r"SurfaceDice: expected tolerance of 2 numbers, got 3"):
        SurfaceDice(3, classes=[1, 2], tolerance=[1, 2, 3])
    with pytest.raises(
        TypeError, match=r"HausdorffDistance.update: expected integer labels in input, got torch.float32"
    ):
        HausdorffDistance(1).update(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).long())
    with pytest.raises(
        ValueError, match=r"HausdorffDistance.update: expected input of shape \(B, 3, \*S\), got \(1, 4, 4\)"
    ):
        HausdorffDistance(3).update(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).long())


# --- softdice score --surface


def scored(*arguments: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON, and what was said beside it."""
    testing = pytest.importorskip("typer.testing")
    from softdice.cli.app import app

    words = ["score", *map(str, arguments), "--format", "json"]
    run = testing.CliRunner().invoke(app, words, catch_exceptions=False)
    return run.exit_code, json.loads(run.stdout) if run.stdout.startswith("{") else {}, run.stderr


def nifti(path: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> Path:
    nib = pytest.importorskip("nibabel")
    nib.save(nib.Nifti1Image(array.astype(np.int16), np.diag([*spacing, 1.0])), path)
    return path


def columns(result: dict[str, Any]) -> dict[int | str, list[float | None]]:
    rows = result["results"][0]["cases"][0]["classes"]
    return {row["label"]: [row[name] for name in ("hd95", "mean_distance", "surface_dice")] for row in rows}


@pytest.mark.parametrize("number", [lambda label: label, lambda label: label - 1000 * (label > 1)])
def test_the_command_measures_in_mm(tmp_path: Path, number: Callable[[int], int]) -> None:
    """Small labels, and labels that are no class numbers; one is in neither map's place, one is ignored."""
    p, t = (blobs((12, 13, 14), 5, seed) for seed in (1, 2))
    t[t == 4] = 3
    spacing = (0.5, 1.0, 2.0)
    renamed = [np.vectorize(number)(each.astype(np.int16)) for each in (p, t)]
    files = [nifti(tmp_path / f"{name}.nii.gz", each, spacing) for name, each in zip("pt", renamed, strict=True)]
    code, result, _ = scored(*files, "--surface", f"1mm,{number(2)}=3mm", "--ignore", number(3), "--ignore-geometry")
    assert code == 0
    pair = [torch.from_numpy(each)[None] for each in (p, t)]
    how: dict[str, Any] = {"num_classes": 5, "spacing": spacing, "ignore_index": 3, "classes": [1, 2, 4]}
    expected = torch.stack([
        hausdorff_distance(*pair, percentile=95, **how),
        average_surface_distance(*pair, **how),
        surface_dice(*pair, tolerance=[1, 3, 1], **how),
    ])[:, 0].T  # fmt: skip
    assert expected[2].tolist() == [INF, INF, 0]
    for label, row in zip((1, 2, 4), expected.tolist(), strict=True):
        found = columns(result)[number(label)]
        assert found == (["inf", "inf", 0] if label == 4 else pytest.approx(row, rel=1e-12))
    overall = result["results"][0]["overall"]
    finite = expected[:2, 0].mean().item()
    assert (overall["macro_hd95"], overall["hd95_infinite"]) == (pytest.approx(finite), 1)
    assert overall["macro_surface_dice"] == pytest.approx(expected[:, 2].mean().item())


def test_the_command_measures_regions(tmp_path: Path) -> None:
    p, t = (blobs((12, 13, 14), 4, seed) for seed in (1, 2))
    files = [nifti(tmp_path / f"{name}.nii.gz", each, (2, 1, 1)) for name, each in zip("pt", (p, t), strict=True)]
    code, result, _ = scored(*files, "--regions", "a=1,2; b=2,3", "--surface", "1mm,b=2mm")
    assert code == 0
    for name, labels, tolerance in (("a", (1, 2), 1.0), ("b", (2, 3), 2.0)):
        pair = [torch.from_numpy(np.isin(each, labels))[None] for each in (p, t)]
        how: dict[str, Any] = {"num_classes": 1, "spacing": (2, 1, 1)}
        expected = [
            hausdorff_distance(*pair, percentile=95, **how).item(),
            average_surface_distance(*pair, **how).item(),
            surface_dice(*pair, tolerance=tolerance, **how).item(),
        ]
        assert columns(result)[name] == pytest.approx(expected, rel=1e-12)


def test_the_command_on_pictures_in_pixels(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    p, t = np.zeros((2, 20, 30), np.uint8)
    p[5:10, 5:10] = t[5:10, 8:13] = 1
    for name, each in (("p", p), ("t", t)):
        image.fromarray(each).save(tmp_path / f"{name}.png")
    files = [tmp_path / "p.png", tmp_path / "t.png"]
    code, result, _ = scored(*files, "--surface", "3px", "--labels", "1,2")
    assert code == 0
    assert columns(result)[1][0] == 3
    assert columns(result)[1][2] == 1
    assert columns(result)[2] == [None] * 3
    code, result, _ = scored(*files, "--surface", "3px", "--labels", "1,2", "--empty", "1")
    assert columns(result)[2] == [0, 0, 1]
    code, result, said = scored(*files, "--surface", "3mm")
    assert code == 1
    assert "expected a file that says how large a voxel is, got none. Pass --surface 2px" in said


def test_the_command_gives_the_same_in_csv_after_a_stop_and_from_processes(tmp_path: Path) -> None:
    for side in ("p", "t"):
        (tmp_path / side).mkdir()
        for seed in range(3):
            nifti(tmp_path / side / f"{seed}.nii.gz", blobs((6, 7, 8), 3, seed + 9 * (side == "t")), (1, 1, 2))
    testing = pytest.importorskip("typer.testing")
    from softdice.cli.app import app
    from softdice.scoring import Case
    from softdice.scoring.journal import _from_record, _to_record

    texts = []
    for jobs in (1, 2):
        words = ["score", str(tmp_path / "p"), str(tmp_path / "t"), "--surface", "1mm", "--format", "csv"]
        texts.append(testing.CliRunner().invoke(app, [*words, "--jobs", str(jobs)], catch_exceptions=False).stdout)
    assert texts[0] == texts[1]
    assert texts[0].splitlines()[0].endswith(",n_ref,hd95,mean_distance,surface_dice")
    scores = np.array([[1.5, np.inf], [np.nan, 2.0], [0.25, 0.0]])
    case = Case("c", keys=(1, 2), counts=np.zeros((3, 2), np.int64), measured=scores)
    record = json.loads(json.dumps(_to_record("side", case)))
    np.testing.assert_array_equal(_from_record(record).measured, scores)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--surface", "2"], "--surface: expected a tolerance in mm or px, then class=tolerance"),
        (["--surface", "liver=1mm"], "--surface: expected one tolerance for all classes that are not named, and one"),
        (["--surface", "1mm,liver=1px"], "--surface: expected one tolerance for all classes that are not named, and"),
        (["--surface", "1mm,2mm"], "--surface: expected a tolerance in mm or px"),
        (["--surface", "1mm", "--soft"], "--surface: expected label maps or --threshold, got --soft"),
        (["--surface", "1mm,spleen=2mm", "--labels", "liver=1"], "--surface: expected a class that --labels or"),
        (["--metrics", "surface"], "--metrics: expected some of precision, recall, specificity, volume, got 'surface'"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(tmp_path: Path, options: list[str], message: str) -> None:
    file = nifti(tmp_path / "p.nii.gz", np.ones((2, 3, 4)), (1, 1, 1))
    code, _, said = scored(file, file, *options)
    assert code == 2
    assert message in " ".join(said.split())
