"""Upsampled: the loss and the gradient of interpolate and loss, without the logits of full resolution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils._python_dispatch import TorchDispatchMode

import softdice
from softdice.head import interpolation
from softdice.losses.base import Loss
from softdice.statistics import OverlapStatistics

C = 5
SIZE = (19, 24)

Case = Callable[[], tuple[Loss, Tensor, dict[str, Any]]]


def logits(shape: tuple[int, ...] = (2, C, 5, 6), dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()


def labels(size: tuple[int, ...] = SIZE, batch: int = 2, classes: int = C) -> Tensor:
    return torch.randint(0, classes, (batch, *size), generator=torch.Generator().manual_seed(1))


def dense(kind: str) -> Tensor:
    values = torch.rand(2, C, *SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return values > 0.6 if kind == "hot" else values / values.sum(1, keepdim=True)


def voxel_weight() -> Tensor:
    values = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(3))
    return values * (values > 0.3)


def ignored(dtype: torch.dtype = torch.uint8) -> Tensor:
    target = labels().to(dtype)
    target[:, ::3] = 100
    return target


def dice(**more: Any) -> softdice.SoftDiceLoss:
    return softdice.SoftDiceLoss(C, activation="softmax", **more)


def dice_and_cross_entropy(classes: int = C) -> Loss:
    dice = softdice.SoftDiceLoss(classes, activation="softmax")
    return dice + 0.5 * softdice.CrossEntropyLoss(classes, activation="softmax")


CASES: dict[str, Case] = {
    "dice": lambda: (dice(), labels(), {}),
    "(B, 1, *S) labels of floats": lambda: (dice(), labels().unsqueeze(1).float(), {}),
    "a sum": lambda: (dice_and_cross_entropy(), labels(), {}),
    "ignore_index": lambda: (softdice.JaccardLoss(C, activation="softmax", ignore_index=100), ignored(), {}),
    "voxel weights": lambda: (
        softdice.FocalLoss(C, activation="softmax"), labels(), {"voxel_weight": voxel_weight()},
    ),
    "ignore_index and weights (B, 1, *S)": lambda: (
        dice(ignore_index=100), ignored(torch.int16), {"voxel_weight": voxel_weight().unsqueeze(1)},
    ),
    "regions": lambda: (
        softdice.TverskyLoss(C, activation="softmax", regions=((1, 2, 3), (1, 3), (3,))), labels(), {},
    ),
    "label smoothing, one number per sample": lambda: (
        softdice.MCCLoss(C, activation="softmax", label_smoothing=0.1, pooling="sample"), labels(), {},
    ),
    "sigmoid, multi-hot": lambda: (softdice.FocalTverskyLoss(C, activation="sigmoid"), dense("hot"), {}),
    "soft labels": lambda: (softdice.DiceSemimetricLoss(C, activation="softmax"), dense("soft"), {}),
    "over classes": lambda: (softdice.GeneralizedDiceLoss(C, activation="softmax", absent="skip"), labels(), {}),
    "merge": lambda: (dice(), labels(), {"merge": {0: (3, 4)}}),
    "weights of classes": lambda: (dice(class_weight=(1.0, 2.0, 0.5, 1.0, 3.0), classes=(1, 2, 4)), labels(), {}),
}  # fmt: skip


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of the largest element."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max() / theirs.abs().max())


def separate(loss: Loss, low: Tensor, target: Tensor, mode: str, align_corners: bool = False, **more: Any) -> Tensor:
    """The definition."""
    size = target.shape[target.ndim - low.ndim + 2 :]
    corners = None if mode == "nearest" else align_corners
    return loss(interpolate(low, size, mode=mode, align_corners=corners), target, **more)


def gradient(value: Tensor, low: Tensor) -> Tensor:
    return torch.autograd.grad(value, low)[0]


@pytest.fixture(params=["Numba", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What interpolates: the compiled loops, or what serves other devices and installations without Numba."""
    if request.param == "torch":
        monkeypatch.setattr(interpolation, "compiled_loops", lambda name: None)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A row or two in a chunk, so that every lane has several and low rows lie beside chunks of two lanes."""
    monkeypatch.setattr(interpolation, "CHUNK_ELEMENTS", 1)
    return


def test_by_hand() -> None:
    """Two low places, 0 and 4, for four voxels at -1/4, 1/4, 3/4, 5/4: logits 0, 1, 3, 4, the same in every row.

    sum of p = sigmoid: 0.5, 0.731059, 0.952574, 0.982014 = 3.165647 per row, of two rows 6.331293. The target is the
    right half, I = 2 (0.952574 + 0.982014) = 3.869176, T = 4: Dice = 2 I / (P + T) = 7.738352 / 10.331293 = 0.749021.
    """
    low = torch.tensor([[[[0.0, 4.0]]]], requires_grad=True)
    mask = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]])
    loss = softdice.SoftDiceLoss(1, activation="sigmoid", cost="one_minus", eps=0.0)
    assert softdice.Upsampled(loss)(low, mask).item() == pytest.approx(1 - 0.749021, abs=1e-6)


def test_a_line_by_hand() -> None:
    """The row of the image above, alone: the sums of one row in the place of two, and the same Dice."""
    low, mask = torch.tensor([[[0.0, 4.0]]]), torch.tensor([[0, 0, 1, 1]])
    loss = softdice.SoftDiceLoss(1, activation="sigmoid", cost="one_minus", eps=0.0)
    assert softdice.Upsampled(loss)(low, mask).item() == pytest.approx(1 - 0.749021, abs=1e-6)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("low_size", "size", "mode"),
    [((7,), (29,), "linear"), ((5, 6), (19, 24), "bilinear"), ((2, 3, 4), (5, 7, 11), "trilinear")],
)
def test_the_number_of_dimensions_chooses_the_mode(
    low_size: tuple[int, ...], size: tuple[int, ...], mode: str, align_corners: bool, loops: str, small_chunks: None
) -> None:
    low, target = logits((2, C, *low_size)), labels(size)
    expected = separate(dice(), low, target, mode, align_corners)
    for options in ({}, {"mode": mode}):
        value = softdice.Upsampled(dice(), align_corners=align_corners, **options)(low, target)
        torch.testing.assert_close(value, expected)
        assert apart(gradient(value, low), torch.autograd.grad(expected, low, retain_graph=True)[0]) < 1e-9
    nearest = softdice.Upsampled(dice(), mode="nearest")(low, target)
    torch.testing.assert_close(nearest, separate(dice(), low, target, "nearest"))


def test_a_line_has_weights_values_per_class_and_a_second_derivative() -> None:
    low, weight = logits((2, C, 7)), torch.rand(2, 29)
    soft = torch.rand(2, C, 29, dtype=torch.float64).softmax(1)
    value = softdice.Upsampled(dice())(low, soft, weight)
    expected = separate(dice(), low, soft, "linear", voxel_weight=weight)
    torch.testing.assert_close(value, expected)
    once, plain = (torch.autograd.grad(x, low, create_graph=True)[0].square().sum() for x in (value, expected))
    torch.testing.assert_close(gradient(once, low), gradient(plain, low))


@pytest.mark.parametrize("name", CASES)
def test_every_keyword(backend: str, name: str, loops: str, small_chunks: None) -> None:
    loss, target, more = CASES[name]()
    low = logits()
    value, expected = softdice.Upsampled(loss)(low, target, **more), separate(loss, low, target, "bilinear", **more)
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    assert apart(gradient(value, low), gradient(expected, low)) <= 1e-12


SHAPES = {
    "4 times": ((5, 6), (20, 24)),
    "2 and 8 times": ((5, 6), (10, 48)),
    "fractional": ((5, 6), (19, 23)),
    "of one size": ((5, 6), (5, 6)),
    "smaller": ((15, 16), (5, 7)),
    "of a single row": ((1, 6), (9, 24)),
    "of a single place": ((1, 1), (9, 7)),
    "to a single place": ((3, 4), (1, 1)),
    "volume, twice": ((3, 4, 5), (6, 8, 10)),
    "volume, fractional": ((3, 4, 5), (7, 13, 9)),
    "volume, smaller": ((6, 7, 8), (4, 3, 2)),
    "volume of a single plane": ((1, 4, 5), (4, 8, 10)),
}


@pytest.mark.parametrize("mode", ["linear", "nearest", "align_corners"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_factor(name: str, mode: str, loops: str, small_chunks: None) -> None:
    low_size, size = SHAPES[name]
    corners = mode == "align_corners"
    mode = mode if mode == "nearest" else {2: "bilinear", 3: "trilinear"}[len(size)]
    low, target, loss = logits((3, C, *low_size)), labels(size, 3), dice_and_cross_entropy()
    for batch in (3, 1):
        part, truth = low[:batch], target[:batch]
        value = softdice.Upsampled(loss, mode=mode, align_corners=corners)(part, truth)
        expected = separate(loss, part, truth, mode, corners)
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        assert apart(gradient(value, low), gradient(expected, low)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "out"), [(7, 50), (13, 101), (24, 97), (29, 58), (55, 171)])
def test_nearest_is_torchs_nearest(low: int, out: int, dtype: torch.dtype) -> None:
    """Where a place lies on the border of two outputs, it is decided as torch does, in the dtype of the logits."""
    places, mask = logits((1, 1, low, 4), dtype), labels((out, 4), 1, 2)
    loss = softdice.SoftDiceLoss(1, activation="sigmoid")
    value = softdice.Upsampled(loss, mode="nearest")(places, mask)
    expected = separate(loss, places, mask, "nearest")
    assert apart(gradient(value, places), gradient(expected, places)) <= 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("chunk_mib", [0.001, 0.05, 0.5, 32.0])
def test_result_does_not_depend_on_the_chunks(chunk_mib: float) -> None:
    low, target, loss = logits((3, C, 12, 13)), labels((50, 40), 3), dice_and_cross_entropy()
    value = softdice.Upsampled(loss, chunk_mib=chunk_mib)(low, target)
    expected = separate(loss, low, target, "bilinear")
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert apart(gradient(value, low), gradient(expected, low)) <= 1e-12


@pytest.mark.parametrize("rank", [2, 3])
def test_error_against_float64(rank: int) -> None:
    """No larger than that of the separate path in float32."""
    low_size, size, mode = ((16, 16), (64, 64), "bilinear") if rank == 2 else ((6, 7, 8), (24, 28, 32), "trilinear")
    low, target, loss = logits((2, C, *low_size), torch.float32), labels(size), dice_and_cross_entropy()
    exact_low = low.detach().double().requires_grad_()
    exact = separate(loss, exact_low, target, mode)
    truth = gradient(exact, exact_low)
    values = softdice.Upsampled(loss, mode=mode)(low, target), separate(loss, low, target, mode)
    errors = [(abs(v.item() / exact.item() - 1), apart(gradient(v, low).double(), truth)) for v in values]
    eps = torch.finfo(torch.float32).eps
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= max(2 * eps, theirs)


def test_gradcheck(backend: str, small_chunks: None) -> None:
    loss, target = dice_and_cross_entropy(3), labels((5, 7), 2, 3)
    upsampled = softdice.Upsampled(loss)
    low = logits((2, 3, 2, 3))
    assert torch.autograd.gradcheck(lambda x: upsampled(x, target), low)
    assert torch.autograd.gradgradcheck(lambda x: upsampled(x, target), low)


def test_gradcheck_of_a_volume(small_chunks: None) -> None:
    upsampled = softdice.Upsampled(dice_and_cross_entropy(2), mode="trilinear", align_corners=True)
    target = labels((4, 3, 5), 2, 2)
    assert torch.autograd.gradcheck(lambda x: upsampled(x, target), logits((2, 2, 2, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 3])
def test_half_precision(dtype: torch.dtype, rank: int, loops: str, small_chunks: None) -> None:
    """Interpolated in float32: as near to float32 as the gradient's own dtype allows, nearer than interpolate."""
    size, mode = ((18, 24), "bilinear") if rank == 2 else ((8, 9, 12), "trilinear")
    low = logits((2, C, *[n // 3 + 1 for n in size]), dtype)
    target, loss = labels(size), dice_and_cross_entropy()
    wide = low.detach().float().requires_grad_()
    exact, value = separate(loss, wide, target, mode), softdice.Upsampled(loss, mode=mode)(low, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    ours = gradient(1024 * value, low)  # 1024: float16 underflows
    assert ours.dtype == dtype
    assert apart(ours.float() / 1024, gradient(exact, wide)) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", ["channels last", "a slice", "expanded", "channels moved"])
@pytest.mark.parametrize("rank", [2, 3])
def test_strides(layout: str, rank: int, loops: str) -> None:
    size = (6, 7, 8)[:rank]
    values = logits((2, C, *size), torch.float32).detach()
    if layout == "channels last":
        values = values.to(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)
    elif layout == "a slice":
        values = values[:, :, 1:-1, ::2]
    elif layout == "expanded":
        values = values[:1].expand(2, *values.shape[1:])
    else:
        values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    low = values.requires_grad_()
    target, mode = labels((15, 16, 17)[:rank]), {2: "bilinear", 3: "trilinear"}[rank]
    value, expected = softdice.Upsampled(dice(), mode=mode)(low, target), separate(dice(), low, target, mode)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert apart(gradient(value, low), gradient(expected, low)) <= 1e-6


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64, torch.bool],
)
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    classes = 2 if dtype == torch.bool else C
    low, target = logits((2, classes, 5, 6)), labels(classes=classes)
    upsampled = softdice.Upsampled(softdice.SoftDiceLoss(classes, activation="softmax"))
    assert torch.equal(upsampled(low, target.to(dtype)), upsampled(low, target))


def test_ignored_voxels_have_no_gradient_even_of_a_nan() -> None:
    """Rows 0 to 3 lie beside low row 0 alone or beside 0 and 1; all that see row 0 are ignored."""
    low, target = logits((1, C, 4, 4), torch.float32).detach(), labels((16, 16), 1)
    target[:, :6] = 100
    low[:, :, 0] = torch.nan
    low.requires_grad_()
    value = softdice.Upsampled(dice(ignore_index=100))(low, target)
    assert value.isfinite()
    found = gradient(value, low)
    assert (found[:, :, 0] == 0).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("align_corners", [False, True])
def test_values_that_are_not_finite_spoil_what_they_spoil_in_interpolate(align_corners: bool, loops: str) -> None:
    """Whether inf or nan comes of them is a matter of rounding: of a share that is 0 or hardly above."""
    low = logits((1, 2, 4, 5), torch.float32).detach()
    low[0, 0, 1, 1], low[0, 1, 2, 3], low[0, 1, 0, 0] = torch.inf, -torch.inf, torch.nan
    options = (13, 15), "bilinear", align_corners
    made = interpolation.Interpolation(low.shape, *options, low.dtype, low.device, 1.0)
    found = made.logits([low], (slice(0, 1), slice(0, 13 * 15)), torch.empty(2 * 13 * 15))
    expected = interpolate(low, options[0], mode="bilinear", align_corners=align_corners).flatten(2)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert not expected.isfinite().all()
    torch.testing.assert_close(found[found.isfinite()], expected[expected.isfinite()])


@pytest.mark.parametrize("rank", [2, 3])
def test_bits_do_not_depend_on_threads_or_runs(rank: int, small_chunks: None) -> None:
    low_size, size, mode = ((9, 8), (70, 64), "bilinear") if rank == 2 else ((3, 4, 5), (13, 16, 20), "trilinear")
    low, target = logits((2, C, *low_size), torch.float32), labels(size)
    upsampled = softdice.Upsampled(dice_and_cross_entropy(), mode=mode)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8, 2):
            torch.set_num_threads(count)
            value = upsampled(low, target)
            results.append([value.detach(), gradient(value, low)])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Largest(TorchDispatchMode):
    """Notes the largest floating tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.untyped_storage().nbytes() > 8:
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "half"])
def test_nothing_of_full_resolution_is_allocated(layout: str, one_thread: None) -> None:
    """No operator, forward or backward, returns more than a twentieth of the upsampled logits, input's size aside."""
    low = logits((2, 40, 16, 16), torch.float32).detach()
    low = low.to(memory_format=torch.channels_last) if layout == "channels last" else low
    low = (low.half() if layout == "half" else low).requires_grad_()
    target = labels((256, 256), 2, 40)
    upsampled = softdice.Upsampled(dice_and_cross_entropy(40), chunk_mib=4.0)
    upsampled(low, target).backward()
    with Largest() as largest:
        upsampled(low, target).backward()
    assert low.numel() <= largest.numel <= 40 * target.numel() / 20
    with Largest() as largest:  # the test can fail
        separate(dice_and_cross_entropy(40), low.float(), target, "bilinear").backward()
    assert largest.numel >= 40 * target.numel()


@pytest.mark.parametrize("chunk_mib", [0.5, 5.0])
def test_chunks_stay_within_the_budget(chunk_mib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    whole = interpolation.Interpolation.logits

    def record(self: Any, inputs: Any, chunk: Any, memory: Tensor) -> Tensor:
        result = whole(self, inputs, chunk, memory)
        made.append(result.untyped_storage().nbytes())
        return result

    monkeypatch.setattr(interpolation.Interpolation, "logits", record)
    low, target = logits((2, 21, 16, 16), torch.float32), labels((64, 64), 2, 21)
    softdice.Upsampled(dice_and_cross_entropy(21), chunk_mib=chunk_mib)(low, target).backward()
    assert 2 * 8 * max(made) <= chunk_mib * 2**20
    assert sum(made) >= 2 * 4 * 21 * target.numel()  # every logit, forward and backward


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Conv2d(4, C, 1))


def test_after_the_last_convolution_as_one_head() -> None:
    """FusedHead around Upsampled: convolution, upsampling, loss."""
    image, target, loss = torch.randn(2, 1, 19, 24), labels(), dice_and_cross_entropy()
    model = network()
    plain = copy.deepcopy(model)
    head = softdice.FusedHead(model[2], softdice.Upsampled(loss))
    value = head(head.features(model, image), target)
    expected = separate(loss, plain(image), target, "bilinear")
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    value.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert apart(ours.grad, theirs.grad) <= 1e-5
    assert list(head.state_dict()) == ["weight", "bias"]


def test_after_a_linear_layer_as_one_head() -> None:
    features, layer = torch.randn(2, 5, 6, 4), nn.Linear(4, C)
    value = softdice.FusedHead(layer, softdice.Upsampled(dice()))(features, labels(), voxel_weight())
    expected = separate(dice(), layer(features).movedim(-1, 1), labels(), "bilinear", voxel_weight=voxel_weight())
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """The convolution runs in half precision, the interpolation and the statistics do not."""
    image, target, model = torch.randn(2, 1, 19, 24), labels(), network()
    head = softdice.FusedHead(model[2], softdice.Upsampled(dice()))
    with torch.autocast("cpu", dtype):
        low = model(image)
        value, inside = softdice.Upsampled(dice())(low, target), head(head.features(model, image), target)
    assert low.dtype == dtype
    assert value.item() == inside.item() == pytest.approx(separate(dice(), low.float(), target, "bilinear").item())


def test_group_adds_the_statistics_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks with the same voxels: all sums are twice as large."""
    monkeypatch.setattr(OverlapStatistics, "all_reduce", lambda self, group: self._with(2 * self._stack))
    loss, low = dice(group="world", eps=1.0), logits()
    value = softdice.Upsampled(loss)(low, labels())
    twice = softdice.Upsampled(dice(eps=1.0))(torch.cat([low, low]), torch.cat([labels(), labels()]))
    assert value.item() == pytest.approx(twice.item(), rel=1e-12)


def test_gradient_of_a_target_takes_the_separate_path() -> None:
    low, target = logits(), dense("soft").requires_grad_()
    loss = softdice.SquaredDiceLoss(C, activation="softmax")
    ours = torch.autograd.grad(softdice.Upsampled(loss)(low, target), (low, target))
    theirs = torch.autograd.grad(separate(loss, low, target, "bilinear"), (low, target))
    for mine, other in zip(ours, theirs, strict=True):
        assert apart(mine, other) <= 1e-12


def test_inputs_untouched_backward_twice_and_no_graph_without_gradients() -> None:
    low, target, upsampled = logits(), labels(), softdice.Upsampled(dice())
    before = low.detach().clone(), target.clone()
    value = upsampled(low, target)
    first = torch.autograd.grad(value, low, retain_graph=True)[0]
    assert torch.equal(first, gradient(value, low))
    assert torch.equal(before[0], low)
    assert torch.equal(before[1], target)
    assert not upsampled(low.detach(), target).requires_grad
    with torch.inference_mode():
        assert upsampled(low, target).item() == value.item()
    assert torch.equal(first, gradient(upsampled(low, target), low))  # no table of inference mode is left


def test_empty_batch() -> None:
    low = torch.zeros(0, C, 5, 6, requires_grad=True)
    value = softdice.Upsampled(dice())(low, labels()[:0])
    value.backward()
    assert value.item() == dice()(torch.zeros(0, C, *SIZE), labels()[:0]).item()
    assert low.grad is not None
    assert low.grad.shape == low.shape


def test_module() -> None:
    upsampled = softdice.Upsampled(dice(class_weight=(1.0, 2.0, 3.0, 4.0, 5.0)), mode="nearest")
    assert not upsampled.state_dict()
    assert "mode='nearest', align_corners=False" in repr(upsampled)
    again = copy.deepcopy(upsampled)
    assert torch.equal(again(logits(), labels()), upsampled(logits(), labels()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_compiles_around_it() -> None:
    low, target, upsampled = logits((2, C, 5, 6), torch.float32), labels(), softdice.Upsampled(dice())
    compiled = torch.compile(lambda x: 2 * upsampled(x.sin(), target), backend="aot_eager")
    ours, theirs = gradient(compiled(low), low), gradient(2 * upsampled(low.sin(), target), low)
    assert torch.equal(ours, theirs)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a loss of torch": (
        lambda: softdice.Upsampled(nn.CrossEntropyLoss()),  # type: ignore[arg-type]
        TypeError,
        "Upsampled: expected loss to be a loss of softdice that is a function of the statistics, or a sum of such, "
        "got CrossEntropyLoss",
    ),
    "an unknown mode": (
        lambda: softdice.Upsampled(dice(), mode="bicubic"),
        ValueError,
        "Upsampled: expected mode to be one of 'linear', 'bilinear', 'trilinear', 'nearest', got 'bicubic'",
    ),
    "corners of the nearest": (
        lambda: softdice.Upsampled(dice(), mode="nearest", align_corners=True),
        ValueError,
        "Upsampled: expected align_corners=False with mode='nearest', got True",
    ),
    "a volume": (
        lambda: softdice.Upsampled(dice(), mode="bilinear")(logits((2, C, 3, 4, 5)), labels((6, 8, 10))),
        ValueError,
        r"Upsampled: expected logits of shape (B, 5, h, w) for mode='bilinear', got (2, 5, 3, 4, 5). Choose",
    ),
    "four dimensions": (
        lambda: softdice.Upsampled(dice(), mode="nearest")(logits((2, C, 1, 2, 3, 4)), labels((2, 4, 6, 8))),
        ValueError,
        r"Upsampled: expected logits of shape (B, 5, w) or (B, 5, h, w) or (B, 5, d, h, w) for mode='nearest', got",
    ),
    "four dimensions, and no mode": (
        lambda: softdice.Upsampled(dice())(logits((2, C, 1, 2, 3, 4)), labels((2, 4, 6, 8))),
        ValueError,
        r"Upsampled: expected logits of shape (B, 5, w) or (B, 5, h, w) or (B, 5, d, h, w), got (2, 5, 1, 2, 3, 4)",
    ),
    "no dimension": (
        lambda: softdice.Upsampled(dice())(logits((2, C)), labels((1,))),
        ValueError,
        r"Upsampled: expected logits of shape (B, 5, w) or (B, 5, h, w) or (B, 5, d, h, w), got (2, 5)",
    ),
    "a line without a batch": (
        lambda: softdice.Upsampled(dice())(logits((2, C, 5)), labels((10,))[0]),
        ValueError,
        r"Upsampled: expected target (B, *S), (B, 1, *S) or (B, C, *S) with S = (W,), got (10,). Labels",
    ),
    "other classes": (
        lambda: softdice.Upsampled(dice())(logits((2, 4, 5, 6)), labels()),
        ValueError,
        r"Upsampled: expected logits of shape (B, 5, h, w) for mode='bilinear', got (2, 4, 5, 6)",
    ),
    "another batch": (
        lambda: softdice.Upsampled(dice())(logits(), labels(batch=3)),
        ValueError,
        r"Upsampled: expected target of shape (2, 19, 24), (2, 1, 19, 24) or (2, 5, 19, 24) for input (2, 5, 19, 24)",
    ),
    "labels without a batch": (
        lambda: softdice.Upsampled(dice())(logits(), labels()[0]),
        ValueError,
        r"Upsampled: expected target (B, *S), (B, 1, *S) or (B, C, *S) with S = (H, W), got (19, 24). Labels",
    ),
    "weights of another size": (
        lambda: softdice.Upsampled(dice())(logits(), labels(), torch.ones(2, 5, 6)),
        ValueError,
        r"Upsampled: expected voxel_weight of shape (2, 19, 24) or (2, 1, 19, 24), got (2, 5, 6)",
    ),
    "the order turned round": (
        lambda: softdice.Upsampled(dice())(labels(), logits()),
        TypeError,
        "Upsampled: expected logits of dtype float16, bfloat16, float32 or float64, got torch.int64. Pass the logits",
    ),
    "an array": (
        lambda: softdice.Upsampled(dice())(logits().detach().numpy(), labels()),  # type: ignore[arg-type]
        TypeError,
        "Upsampled: expected logits to be a Tensor, got ndarray",
    ),
    "a label outside": (
        lambda: softdice.Upsampled(dice())(logits(), labels(classes=7)),
        ValueError,
        f"Upsampled: expected target with labels in [0, 5), got 6 ({int((labels(classes=7) > 4).sum())} voxels)",
    ),
    "logits for probabilities": (
        lambda: softdice.Upsampled(softdice.SoftDiceLoss(C))(logits(), labels()),
        ValueError,
        "Upsampled: expected probabilities in [0, 1] in input (activation='none'), got",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, small_chunks: None) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)
