"""Kinds of input that were once scored wrongly without a word: each is right now, or refused with what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import softdice
from softdice.metrics import counting
from softdice.metrics.formulas import dice_score

pytest.importorskip("torchmetrics")
from torchmetrics import MetricCollection

from softdice.metrics import (
    CentrelineDice,
    DiceScore,
    HausdorffDistance,
    JaccardScore,
    LesionDice,
    OverlapMetric,
    PanopticQuality,
    PrecisionScore,
    RecallScore,
    SurfaceDice,
    average_surface_distance,
    centreline_dice,
    hausdorff_distance,
    lesion_dice,
    panoptic_quality,
    surface_dice,
)

NAN = float("nan")
P = torch.tensor([[3, 0, 1, 2, 2, 1, 0, 3], [0, 0, 1, 1, 2, 2, 3, 3]])


def loops(p: Tensor, t: Tensor, C: int, ignore: int | None, masks: Tensor | None = None) -> list[float]:
    """The definition of Dice: keep what is not ignored, score each class that is not ignored."""
    keep, scores = t != ignore if ignore is not None else torch.ones_like(t, dtype=torch.bool), []
    for c in range(C):
        in_p, in_t = ((p == c) if masks is None else masks[:, c]) & keep, (t == c) & keep
        total = int(in_p.sum() + in_t.sum())
        scores.append(NAN if total == 0 or c == ignore else 2 * int((in_p & in_t).sum()) / total)
    return scores


@pytest.fixture(params=["numba", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(counting, "_kernels", lambda: None)


def wrapped(dtype: torch.dtype, void: int) -> Tensor:
    """Labels with a void of two voxels; numbers as the dtype holds them."""
    t = torch.tensor([[3, 0, 1, 2, 2, 1, 0, 3], [0, 1, 1, 1, 2, 2, 3, 3]]).numpy().astype(str(dtype)[6:])
    t[0, 1], t[1, 7] = void, void
    return torch.from_numpy(t)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("repeat", [1, 1 << 13], ids=["few voxels", "many voxels"])
@pytest.mark.parametrize(
    "dtype, stored, ignore",
    [
        (torch.uint8, 254, -2), (torch.int8, -1, 255), (torch.int8, -56, 200), (torch.int16, -1, 65535),
        (torch.uint16, 65535, -1), (torch.int32, -7, 2**32 - 7), (torch.uint64, 2**64 - 3, -3),
    ],
)  # fmt: skip
def test_an_ignored_number_that_the_dtype_cannot_hold_is_in_no_voxel(
    dtype: torch.dtype, stored: int, ignore: int, repeat: int
) -> None:
    """The strange labels are out of range, as they are without ignore_index."""
    t, p = wrapped(dtype, stored).repeat(1, repeat), P.repeat(1, repeat)
    small = p.to(torch.uint8) if dtype == torch.uint8 else p
    with pytest.raises(ValueError, match=rf"expected target with labels in \[0, 4\) or {ignore}, got {stored} \("):
        dice_score(small, t, 4, ignore_index=ignore)
    with pytest.raises(ValueError, match=rf"DiceScore.update: .* got {stored} \("):
        DiceScore(4, ignore_index=ignore).update(small, t)
    with pytest.raises(ValueError, match=rf"RecallScore.update: .* got {stored} \("):
        hot = torch.nn.functional.one_hot(p, 4).movedim(-1, 1)
        RecallScore(4, ignore_index=ignore, threshold=0.5).update(hot, t)
    wide = torch.tensor([[-9 if number == stored else number for number in row] for row in t.tolist()])
    expected = loops(p, wide, 4, -9)
    np.testing.assert_allclose(dice_score(small, t, 4, ignore_index=stored), expected)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("label", [-1 - 2**62, 2**62, -(2**63)])
def test_no_label_is_ignored_without_being_asked(label: int) -> None:
    with pytest.raises(ValueError, match=rf"got {label} \(1 voxels\)"):
        dice_score(torch.tensor([0, 1, 1]), torch.tensor([0, 1, label]), 2)
    assert dice_score(torch.tensor([0, 1, 1]), torch.tensor([0, 1, label]), 2, ignore_index=label).tolist() == [1, 1]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("ignore", [0, 1, 3, 77])
def test_classes_decided_one_by_one_leave_out_the_same_voxels(ignore: int) -> None:
    """False positives on kept voxels of other classes stay false positives."""
    generator = torch.Generator().manual_seed(ignore)
    t = torch.randint(0, 4, (3, 7, 5), generator=generator)
    t[0, :2] = ignore
    probabilities = torch.rand(3, 4, 7, 5, generator=generator)
    expected = loops(t, t, 4, ignore, probabilities > 0.4)
    for labels in (t, t[:, None], t.to(torch.uint8)):
        found = DiceScore(4, average="none", threshold=0.4, ignore_index=ignore)(probabilities, labels)
        np.testing.assert_allclose(found, expected)
    found = DiceScore(4, average="none", threshold=0.5, ignore_index=ignore)((probabilities > 0.4).long(), t)
    np.testing.assert_allclose(found, expected)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("ignore", [0, 2])
@pytest.mark.parametrize("average, pooling", [("none", "all"), ("macro", "all"), ("macro", "sample"), ("micro", "all")])
def test_an_ignored_class_is_not_scored(ignore: int, average: str, pooling: str) -> None:
    """The mean is that of the other classes."""
    t = torch.tensor([[0, 0, 1, 2, 2, 1], [2, 2, 2, 0, 1, 0]])
    p = torch.tensor([[0, 2, 1, 2, 1, 0], [2, 0, 1, 0, 1, 1]])
    others = [c for c in range(3) if c != ignore]
    for metric in (DiceScore, RecallScore, PrecisionScore, JaccardScore):
        found = metric(3, average=average, pooling=pooling, ignore_index=ignore)(p, t)  # type: ignore[arg-type]
        keep = [(p[b : b + 1][:, t[b] != ignore], t[b : b + 1][:, t[b] != ignore]) for b in range(2)]
        parts = keep if pooling == "sample" else [tuple(torch.cat(side, 1) for side in zip(*keep, strict=True))]
        expected = []
        for a, b in parts:
            one = metric(3, average=average, classes=others)  # type: ignore[arg-type]
            expected.append(one(a, b))
        value = torch.stack(expected).mean(0)
        np.testing.assert_allclose(found[others] if average == "none" else found, value)
        if average == "none":
            assert found[ignore].isnan()
    np.testing.assert_allclose(dice_score(p, t, 3, ignore_index=ignore), loops(p, t, 3, ignore))


def hot(labels: Tensor, C: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.nn.functional.one_hot(labels, C).movedim(-1, 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("C, shape", [(4, (2, 5, 6)), (2, (1, 9)), (3, (2, 3, 3, 3))])
def test_one_hot_masks_are_taken_as_classes(C: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Dimension 1 holds the classes, as everywhere else."""
    generator = torch.Generator().manual_seed(C)
    p, t = (torch.randint(0, C, shape, generator=generator) for _ in range(2))
    for ignore in (None, 0):
        expected = dice_score(p, t, C, ignore_index=ignore)
        np.testing.assert_allclose(dice_score(hot(p, C, dtype), hot(t, C, dtype), C, ignore_index=ignore), expected)
        metric = DiceScore(C, average="none", ignore_index=ignore)
        np.testing.assert_allclose(metric(hot(p, C, dtype), hot(t, C, dtype)), expected)


@pytest.mark.parametrize("threshold", [-np.inf, np.inf, np.nan, np.float32(-np.inf), torch.tensor(-torch.inf)])
def test_a_threshold_is_finite(threshold: Any) -> None:
    """Below -inf there is no logit: every voxel would be in every class."""
    with pytest.raises(ValueError, match=r"RecallScore: expected threshold to be a finite number, got (-?inf|nan)\. "):
        RecallScore(3, threshold=threshold)


def test_masks_of_overlapping_classes_need_a_threshold() -> None:
    """They are no label maps, and no one-hot ones either."""
    generator = torch.Generator().manual_seed(0)
    p, t = (torch.rand(2, 3, 8, generator=generator) > 0.4 for _ in range(2))
    for dtype in (torch.bool, torch.uint8, torch.int64):
        for score in (lambda a, b: dice_score(a, b, 3), DiceScore(3)):
            with pytest.raises(ValueError, match=r"one-hot along dimension 1, got only 0 and 1.*threshold=0.5"):
                score(p.to(dtype), t.to(dtype))
    each = [dice_score(p[:, c], t[:, c], 1).item() for c in range(3)]
    np.testing.assert_allclose(DiceScore(3, average="none", threshold=0.5)(p, t), each)
    void = t.to(torch.uint8).masked_fill(torch.rand(2, 3, 8, generator=generator) > 0.7, 255)
    with pytest.raises(ValueError, match="one-hot along dimension 1"):
        dice_score(p.to(torch.uint8), void, 3, ignore_index=255)


def test_label_maps_of_as_many_slices_as_classes_stay_label_maps() -> None:
    generator = torch.Generator().manual_seed(1)
    p, t = (torch.randint(0, 3, (2, 3, 4, 4), generator=generator) for _ in range(2))
    np.testing.assert_allclose(dice_score(p, t, 3), loops(p, t, 3, None))
    shallow = p.clamp(max=1), t.clamp(max=1)
    np.testing.assert_allclose(
        dice_score(*(a[:, :2] for a in shallow), 2), loops(*(a[:, :2] for a in shallow), 2, None)
    )
    deep = DiceScore(3, average="none")(*(a[:, None] for a in shallow))
    np.testing.assert_allclose(deep, loops(*shallow, 3, None))


A, B = np.array([[0, 1], [2, 1]]), [torch.tensor([0, 1]), torch.tensor([2, 1])]


@pytest.mark.parametrize(
    "score", [lambda p, t: dice_score(p, t, 3), DiceScore(3).update, RecallScore(3, threshold=0.5).update]
)
@pytest.mark.parametrize(
    "p, t, said",
    [
        (A.tolist(), torch.from_numpy(A), r"(prediction|input) to be a Tensor, got list. Wrap (prediction|input)"),
        (torch.from_numpy(A), A.astype("U1"), r"target to be a Tensor, got ndarray. Wrap target in torch.as_tensor."),
        (B, torch.from_numpy(A), r"(prediction|input) to be a Tensor, got list. Stack them with torch.stack."),
        (torch.from_numpy(A), tuple(B), r"target to be a Tensor, got tuple. Stack them with torch.stack."),
        (torch.from_numpy(A), None, r"target to be a Tensor, got NoneType. Wrap target in torch.as_tensor."),
    ],
)  # fmt: skip
def test_what_is_no_tensor_is_named(score: Callable[[object, object], object], p: object, t: object, said: str) -> None:
    """Lists of decollated batches, texts."""
    with pytest.raises(TypeError, match=said):
        score(p, t)


class Foreign:
    """An array of another library: all that it has is DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "kind",
    [
        np.asarray, np.asfortranarray, read_only, Foreign, lambda a: a.astype(">i2"), lambda a: a.astype(np.uint16),
        lambda a: np.flip(np.flip(a).copy()),
    ],
)  # fmt: skip
def test_arrays_of_other_libraries(kind: Callable[[np.ndarray], Any]) -> None:
    rng = np.random.default_rng(0)
    p, t = rng.integers(0, 3, (2, 2, 9, 10), np.uint8)
    one, other = torch.from_numpy(p), torch.from_numpy(t)
    scores = [
        lambda p, t: dice_score(p, t, 3), lambda p, t: DiceScore(3, pooling="sample")(p, t),
        lambda p, t: HausdorffDistance(3)(p, t),
        *(partial(each, num_classes=3) for each in (hausdorff_distance, average_surface_distance)),
        partial(surface_dice, num_classes=3, tolerance=1),
        *(partial(each, num_classes=3) for each in (lesion_dice, panoptic_quality, centreline_dice)),
    ]  # fmt: skip
    for score in scores:
        expected = score(one, other)
        for pair in ((kind(p), kind(t)), (kind(p), other), (one, kind(t))):
            found = score(*pair)
            assert isinstance(found, Tensor)
            np.testing.assert_array_equal(found, expected)


def test_dice_of_each_sample() -> None:
    """Sample 0: class 0 has 1 of 1 and 2, class 1 has 2 of 3 and 2, class 2 none. Sample 1: class 2 is missed."""
    p, t = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]]), torch.tensor([[0, 0, 1, 1], [0, 0, 2, 2]])
    expected = np.array([[2 / 3, 4 / 5, np.nan], [4 / 6, np.nan, 0]])
    np.testing.assert_allclose(dice_score(p, t, 3, pooling="sample"), expected, rtol=1e-15)
    expected[1] = [1, np.nan, np.nan]
    np.testing.assert_allclose(dice_score(p, t, 3, pooling="sample", ignore_index=2), expected, rtol=1e-15)
    np.testing.assert_allclose(dice_score(p, t, 3), [2 * 3 / 9, 0.8, 0], rtol=1e-15)
    hot = [torch.nn.functional.one_hot(each, 3).movedim(-1, 1) for each in (p, t)]
    np.testing.assert_array_equal(dice_score(*hot, 3, pooling="sample"), dice_score(p, t, 3, pooling="sample"))
    masks = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]])
    np.testing.assert_allclose(dice_score(*masks, 1, pooling="sample"), [[2 / 3]], rtol=1e-15)
    assert dice_score(p[:0], t[:0], 3, pooling="sample").shape == (0, 3)
    with pytest.raises(ValueError, match=r"dice_score: expected pooling to be one of 'all', 'sample', got 'case'"):
        dice_score(p, t, 3, pooling="case")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"dice_score: expected prediction and target of one shape \(B, \*S\), got \(2, 4\) a"
    ):
        dice_score(p, t[:1], 3, pooling="sample")


EVERY_METRIC: list[Callable[[], Any]] = [
    lambda: DiceScore(3), lambda: JaccardScore(3, pooling="sample"), lambda: RecallScore(3, pooling="sample"),
    lambda: HausdorffDistance(3), lambda: SurfaceDice(3, tolerance=1.0), lambda: PanopticQuality(3),
    lambda: LesionDice(3), lambda: CentrelineDice(3),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", EVERY_METRIC)
def test_a_change_of_dtype_leaves_the_counts(make: Callable[[], Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 16, 16), torch.randint(0, 3, (2, 16, 16))
    plain, cast, cast_before = make(), make(), make().set_dtype(dtype)
    for _ in range(2):
        plain.update(x, y)
        cast.update(x, y)
        cast_before.update(x, y)
        cast.set_dtype(dtype)
    assert {name: value.dtype for name, value in cast._defaults.items()} == dict.fromkeys(cast._defaults, torch.int64)
    for each in (cast, cast_before):
        assert all(torch.equal(getattr(each, name), getattr(plain, name)) for name in plain._defaults)
        assert each.compute() == plain.compute()
    cast.reset()
    assert cast(x, y) == make()(x, y)


@pytest.mark.parametrize("number", [1, 2])
def test_one_score_per_class_keeps_its_axis(number: int) -> None:
    labels = torch.zeros(2, 6, 6, dtype=torch.int64)
    labels[:, 1:4, 1:4] = 1
    classes = list(range(1, number + 1))
    options: dict[str, Any] = {"average": "none", "classes": classes}
    metrics = [
        DiceScore(3, **options), DiceScore(3, pooling="sample", **options), HausdorffDistance(3, **options),
        PanopticQuality(3, **options),
    ]  # fmt: skip
    for metric in metrics:
        assert metric(labels, labels).shape == (number,)
        assert metric.compute().shape == (number,)
        assert pickle.loads(pickle.dumps(metric)).compute().shape == (number,)
        assert MetricCollection({"m": metric}).compute()["m"].shape == (number,)
    assert DiceScore(1, average="none")(labels > 0, labels > 0).shape == (1,)
    assert DiceScore(3)(labels, labels).shape == ()


@pytest.mark.parametrize(
    "target", [torch.tensor([[0, 2, 1]]), torch.tensor([[[0, -1, 1]]]), torch.tensor([[0, 7, 1]]).to(torch.uint8)]
)
@pytest.mark.parametrize("metric", [DiceScore, JaccardScore])
def test_labels_outside_the_classes_are_refused_with_a_threshold(metric: type[OverlapMetric], target: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"update: expected target with labels in \[0, 2\)( or 9)?, got (2|-1|7) \(1 vox"
    ):
        metric(2, threshold=0.0, ignore_index=9).update(torch.randn(1, 2, 3), target)


def test_masks_whose_void_could_be_a_value_are_refused() -> None:
    for ignore in (0, 1):
        with pytest.raises(ValueError, match=f"expected an ignore_index that is no value of a mask, got {ignore}"):
            DiceScore(2, threshold=0.5, ignore_index=ignore).update(torch.rand(1, 2, 4), torch.ones(1, 2, 4).long())
    for wrong in (True, 1.0, "0"):
        with pytest.raises(TypeError, match="expected ignore_index to be an int or None"):
            DiceScore(2, ignore_index=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="dice_score: expected ignore_index to be an int or None"):
            dice_score(torch.zeros(2).long(), torch.zeros(2).long(), 2, ignore_index=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", [DiceScore, JaccardScore])
@pytest.mark.parametrize("average", ["macro", "micro"])
def test_mean_over_very_many_samples_at_once(metric: type[OverlapMetric], average: str) -> None:
    """The sum of their fractions does not fit 64 bits."""
    t = torch.zeros(36_000, 40, dtype=torch.uint8)
    p = t.clone()
    p[:, 39] = 1
    one = metric(2, average=average, pooling="sample", classes=[0])  # type: ignore[arg-type]
    single = metric(2, average=average, classes=[0])(p[:1], t[:1]).item()  # type: ignore[arg-type]
    assert single > 0.96
    assert len(t) * single > 2**15  # of 2^63, with 48 bits after the point
    assert one(p, t).item() == pytest.approx(single, abs=1e-12)


def test_metrics_say_their_settings() -> None:
    said = {
        "DiceScore(num_classes=3)": DiceScore(3),
        "DiceScore(num_classes=3, average='none', pooling='sample', classes=(1, 2), ignore_index=255)": DiceScore(
            3, average="none", pooling="sample", classes=[1, 2], ignore_index=255
        ),
        "RecallScore(num_classes=2, threshold=0.5)": RecallScore(2, threshold=0.5),
        "HausdorffDistance(num_classes=3, spacing=(1, 2.5), penalty=50.0, percentile=95)": HausdorffDistance(
            3, spacing=[1, 2.5], penalty=50.0, percentile=95
        ),
        "SurfaceDice(num_classes=2, classes=(1,), tolerance=(1.0,))": SurfaceDice(2, classes=[1], tolerance=1),
        "PanopticQuality(num_classes=1, quality='rq', objects='numbers')": PanopticQuality(
            1, quality="rq", objects="numbers"
        ),
        "LesionDice(num_classes=2, matching='BraTS-MET')": LesionDice(2, matching="BraTS-MET"),
        "CentrelineDice(num_classes=2, keep_scores=True)": CentrelineDice(2, keep_scores=True),
    }
    for text, metric in said.items():
        assert repr(metric) == text
        assert repr(pickle.loads(pickle.dumps(metric))) == text


def test_lazy_names_are_listed() -> None:
    assert {"DiceScore", "dice_score", "SoftDiceLoss", "metrics"} <= {*dir(softdice)}
    assert {"HausdorffDistance", "hausdorff_distance", "LesionDice", "lesion_dice"} <= {*dir(softdice.metrics)}


KEEPING: list[Callable[[], Any]] = [
    lambda: DiceScore(3, pooling="sample", keep_scores=True),
    lambda: RecallScore(3, pooling="sample", classes=[2, 1], average="none", keep_scores=True),
    lambda: JaccardScore(3, pooling="sample", average="micro", keep_scores=True),
    lambda: HausdorffDistance(3, classes=[1, 2], keep_scores=True, penalty=99.0),
    lambda: PanopticQuality(3, keep_scores=True),
]


@pytest.mark.parametrize("make", KEEPING)
def test_scores_of_the_samples_on_request(make: Callable[[], Any]) -> None:
    """Each is what a metric of that sample alone says, in the order in which they came."""
    rng = np.random.default_rng(1)
    p, t = torch.from_numpy(rng.integers(0, 3, (2, 5, 8, 9)))
    p[1][p[1] == 2] = 0
    metric = make()
    assert metric.sample_scores().shape[0] == 0
    metric.update(p[:2], t[:2])
    metric(p[2:], t[2:])
    metric.set_dtype(torch.float16)
    found = metric.sample_scores()
    for i in range(5):
        alone = make()
        alone.update(p[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone.sample_scores(), equal_nan=True, rtol=0, atol=0)
        if found.shape[1] == 1:
            assert found[i].item() == pytest.approx(alone.compute().item(), abs=2**-48)
    means = found.nanmean(0)
    expected = means if metric.average == "none" else means.nanmean()
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-12, atol=0)
    metric.reset()
    assert metric.sample_scores().numel() == 0


def test_scores_that_were_not_kept() -> None:
    with pytest.raises(ValueError, match=r"DiceScore: expected keep_scores with pooling='sample', got pooling='all'"):
        DiceScore(3, keep_scores=True)
    with pytest.raises(
        ValueError, match=r"expected a metric that keeps its scores.*Pass keep_scores=True to HausdorffD"
    ):
        HausdorffDistance(3).sample_scores()


def test_metrics_plot_themselves() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    x, y = torch.randn(2, 3, 16, 16), torch.randint(0, 3, (2, 16, 16))
    for metric in (DiceScore(3), DiceScore(3, average="none"), HausdorffDistance(3), PanopticQuality(3)):
        values = [metric(x, y), metric(x.flip(0), y)]
        for value in (None, values[0], values):
            figure, axes = metric.plot(value)
            assert axes.lines or axes.patches or axes.collections
            pyplot.close(figure)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiceScore(3, ignore_index=9),
        lambda: DiceScore(3, ignore_index=9, threshold=0.0),
        lambda: HausdorffDistance(3, ignore_index=9),
        lambda: PanopticQuality(3, ignore_index=9),
    ],
)
def test_nan_is_no_class(make: Callable[[], Any]) -> None:
    """An argmax takes nan for a class: a diverged network had a Dice of 1 where there is background only."""
    logits, target = torch.randn(2, 3, 8, 9), torch.arange(144).reshape(2, 8, 9) % 3
    target[1, 4:] = 9
    right = make()(logits, target)
    logits[1, :, 5] = torch.nan  # ignored there
    torch.testing.assert_close(make()(logits, target), right, equal_nan=True)
    logits[0, 2, 3, 4] = torch.nan
    for labels in (target, target[:, None]):
        with pytest.raises(ValueError, match=r"expected input without nan, got nan \(1 values\)\. A network that has"):
            make()(logits, labels)


def test_nan_in_masks_of_overlapping_classes() -> None:
    logits, masks = torch.zeros(1, 2, 4), torch.tensor([[[1, 0, 255, 1], [0, 0, 1, 1]]])
    logits[0, 0, 2] = torch.nan
    assert DiceScore(2, threshold=-1.0, ignore_index=255)(logits, masks) == pytest.approx((0.8 + 2 / 3) / 2)
    logits[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"DiceScore.update: expected input without nan, got nan \(1 values\)"):
        DiceScore(2, threshold=-1.0, ignore_index=255)(logits, masks)


def test_nan_in_a_class_that_is_not_scored() -> None:
    logits, masks = torch.zeros(1, 2, 4), torch.tensor([[[1, 0, 0, 1], [0, 0, 1, 1]]])
    logits[0, 0, 2] = torch.nan
    metric = DiceScore(2, threshold=-1.0, classes=(1,))
    assert metric(logits, masks) == pytest.approx(2 / 3)
    assert metric(logits, masks.bool()) == pytest.approx(2 / 3)


def test_a_target_of_floats_is_named_before_nan() -> None:
    logits = torch.full((1, 3, 4), torch.nan)
    for make in (lambda: DiceScore(3, ignore_index=255), lambda: HausdorffDistance(3, ignore_index=255)):
        with pytest.raises(TypeError, match="expected integer labels in target"):
            make()(logits.unsqueeze(-1), torch.zeros(1, 4, 1))


def test_masks_of_0_and_255_are_told_what_to_do() -> None:
    """`set ignore_index` would leave out all foreground."""
    mask = torch.tensor([[0, 255, 255, 0]])
    with pytest.raises(ValueError, match=r"got 255 \(2 voxels\)\. If 255 marks the class, pass prediction // 255\.$"):
        softdice.dice_score(mask, mask, 2)
    advice = "If 255 marks the class, pass target // 255; if it marks voxels to leave out, set ignore_index=255"
    for score in (lambda: softdice.dice_score(mask // 255, mask, 2), lambda: DiceScore(2)(mask // 255, mask)):
        with pytest.raises(ValueError, match=advice):
            score()
    assert softdice.dice_score(mask // 255, mask // 255, 2).tolist() == [1, 1]


@pytest.mark.parametrize("percentile", [0.95, 0.5, np.float64(0.99)])
def test_a_percentile_is_in_percent(percentile: float) -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    text = rf"expected percentile in percent, got {percentile}\. Pass {100 * percentile:g} for"
    with pytest.raises(ValueError, match=text):
        HausdorffDistance(2, percentile=percentile)
    with pytest.raises(ValueError, match=text):
        softdice.metrics.hausdorff_distance(labels, labels, num_classes=2, percentile=percentile)
