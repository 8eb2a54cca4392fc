"""A map read in the same pass: its statistics on every backend, the losses on it, and the maps that softdice makes."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import softdice
from softdice.head import FusedHead
from softdice.statistics.declared import MAPPED

REGIONS = ((0, 1), (2,))


def case(
    C: int, V: int, *, dense: bool, per_class: bool, regions: Any = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, target, weight and map."""
    g = torch.Generator().manual_seed(C + V)
    x = torch.randn(2, C, V, generator=g, dtype=torch.float64).mul(3).to(dtype)
    y = torch.rand(2, C, V, generator=g).to(dtype) if dense else torch.randint(0, max(C, 2), (2, V), generator=g)
    columns = C if regions is None else len(regions)
    far = torch.randn(2, columns if per_class else 1, V, generator=g)
    return x, y, torch.randint(0, 3, (2, V), generator=g).float(), far


def by_hand(x: Tensor, y: Tensor, w: Tensor, far: Tensor, activation: str, regions: Any) -> Tensor:
    """Return the three sums that read the map, (3, B, K), in float64."""
    x, far, C = x.double(), far.double(), x.shape[1]
    p = {"softmax": x.softmax(1), "sigmoid": x.sigmoid()}.get(activation, x)
    if y.ndim == 2:
        y = torch.stack([(y == (1 if C == 1 else c)) for c in range(C)], 1)
    y = y.double()
    if regions is not None:
        p = torch.stack([p[:, list(region)].sum(1) for region in regions], 1)
        y = torch.stack([y[:, list(region)].amax(1) for region in regions], 1)
    terms = (far * p, far * p * y, far * y)
    return torch.stack([(term.expand_as(p) * w.double().unsqueeze(1)).sum(-1) for term in terms])


CASES = [
    ("softmax", 3, False, True, None),
    ("softmax", 14, False, False, None),
    ("softmax", 3, True, False, None),
    ("softmax", 3, False, False, REGIONS),
    ("softmax", 3, True, True, REGIONS),
    ("sigmoid", 1, True, True, None),
    ("sigmoid", 3, True, False, None),
]


@pytest.mark.parametrize(("activation", "C", "dense", "per_class", "regions"), CASES)
def test_statistics_of_a_map(backend: str, activation: str, C: int, dense: bool, per_class: bool, regions: Any) -> None:
    """Value and gradient against float64, over several blocks of voxels; a voxel without weight may hold anything."""
    x, y, w, far = case(C, 2600, dense=dense, per_class=per_class, regions=regions)
    exact_x = x.double().requires_grad_()
    exact = by_hand(exact_x, y, w, far, activation, regions)
    mix = torch.linspace(0.5, 1, exact.numel(), dtype=torch.float64).view(exact.shape)
    (exact_gradient,) = torch.autograd.grad((exact * mix).sum(), exact_x)
    hole = (w == 0).unsqueeze(1)
    x, far = x.masked_fill(hole, torch.nan).requires_grad_(), far.masked_fill(hole, torch.inf)
    stats = softdice.overlap_statistics(
        x, y, activation=activation, regions=regions, voxel_weight=w, voxel_map=far, fields=MAPPED
    )
    got = torch.stack([getattr(stats, name) for name in MAPPED])
    assert ((got.double() - exact).abs().amax() / exact.abs().amax()).item() < 3e-6
    (gradient,) = torch.autograd.grad((got * mix).sum(), x)
    scale = exact_gradient.abs().amax()
    assert ((gradient.double() - exact_gradient).abs().amax() / scale).item() < 3e-6
    assert bool((gradient[hole.expand_as(gradient)] == 0).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.float64, torch.int64, torch.uint16])
def test_a_map_of_any_dtype_and_strides_is_read_in_place(backend: str, dtype: torch.dtype) -> None:
    x, y, _, far = case(3, 1200, dense=False, per_class=True)
    far, x = far.abs().mul(4).round().to(dtype), x.requires_grad_()
    last = far.transpose(1, 2).contiguous().transpose(1, 2)  # channels last
    every = [softdice.BoundaryLoss(3, activation="softmax")(x, y, voxel_map=m) for m in (far, last)]
    exact_x = x.double().requires_grad_()
    exact = (far.double() * exact_x.softmax(1)).mean()
    (exact_gradient,) = torch.autograd.grad(exact, exact_x)
    for value in every:
        assert value.item() == pytest.approx(exact.item(), rel=2e-6)
        (gradient,) = torch.autograd.grad(value, x)
        assert ((gradient - exact_gradient).abs().max() / exact_gradient.abs().max()).item() < 3e-6


def test_losses_by_hand(backend: str) -> None:
    p, y = torch.tensor([[[0.75, 0.5, 0.25], [0.25, 0.5, 0.75]]]), torch.tensor([[0, 1, 1]])
    far = torch.tensor([[[-1.0, 2.0, 4.0], [1.0, -2.0, 0.0]]])
    each = softdice.BoundaryLoss(2, reduction="none")(p, y, voxel_map=far)
    torch.testing.assert_close(each, torch.tensor([(-0.75 + 1 + 1) / 3, (0.25 - 1) / 3]))
    skeleton = torch.tensor([[[1, 0, 1]]], dtype=torch.uint8)
    each = softdice.SkeletonRecallLoss(2, eps=0.0, reduction="none")(p, y, voxel_map=skeleton)
    torch.testing.assert_close(each, torch.tensor([0.25, 0.25]))
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert softdice.SkeletonRecallLoss(2)(p, y, voxel_map=nothing).item() == 0
    ignored = torch.full((1, 3), 255)
    assert softdice.BoundaryLoss(2, ignore_index=255)(p, ignored, voxel_map=far).item() == 0


def test_a_map_shares_the_pass_with_a_sum_a_head_and_a_function() -> None:
    x, y, w, _ = case(3, 64, dense=False, per_class=False)
    x, y, w = x.view(2, 3, 8, 8).requires_grad_(), y.view(2, 8, 8), w.view(2, 8, 8)
    far = softdice.distance_map(y, 3)
    dice, boundary = (made(3, activation="softmax") for made in (softdice.SoftDiceLoss, softdice.BoundaryLoss))
    both = dice + 0.01 * boundary
    expected = dice(x, y, w) + 0.01 * boundary(x, y, w, voxel_map=far)
    torch.testing.assert_close(both(x, y, w, voxel_map=far), expected)
    mean = (x.softmax(1) * far).mean()  # as the authors write it
    torch.testing.assert_close(softdice.functional.boundary_loss(x, y, voxel_map=far, activation="softmax"), mean)
    conv = torch.nn.Conv2d(4, 3, 1)
    features = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    head = FusedHead(conv, both, chunk_mib=0.001)  # several chunks
    torch.testing.assert_close(head(features, y, w, voxel_map=far), both(conv(features), y, w, voxel_map=far))
    small = softdice.Upsampled(both)(x[..., :4, :4], y, w, voxel_map=far)
    grown = torch.nn.functional.interpolate(x[..., :4, :4], size=(8, 8), mode="bilinear")
    torch.testing.assert_close(small, both(grown, y, w, voxel_map=far))


def test_a_map_in_a_sum_with_a_loss_of_another_pass() -> None:
    x, y, _, _ = case(3, 64, dense=False, per_class=False)
    x, y = x.view(2, 3, 8, 8), y.view(2, 8, 8)
    far = softdice.distance_map(y, 3)
    boundary, mcc = (made(3, activation="softmax") for made in (softdice.BoundaryLoss, softdice.MultiClassMCCLoss))
    both = boundary + 0.5 * mcc
    torch.testing.assert_close(both(x, y, voxel_map=far), boundary(x, y, voxel_map=far) + 0.5 * mcc(x, y))
    with pytest.raises(ValueError, match=r"MixedSumLoss: expected no voxel_map"):
        (2.0 * mcc)(x, y, voxel_map=far)


@pytest.mark.parametrize("loss", [softdice.BoundaryLoss, softdice.SkeletonRecallLoss])
def test_derivatives(loss: Any) -> None:
    x, y, w, far = case(3, 12, dense=False, per_class=True, dtype=torch.float64)
    x, far = x.requires_grad_(), far.double().abs()
    made = loss(3, activation="softmax")

    def value(x: Tensor, far: Tensor) -> Tensor:
        return made(x, y, w, voxel_map=far)

    assert torch.autograd.gradcheck(value, (x, far.requires_grad_()))  # of the map, too, by the definition
    assert torch.autograd.gradgradcheck(lambda x: value(x, far.detach()), (x,))
    found = torch.func.grad(value)(x.detach(), far.detach())
    torch.testing.assert_close(found, torch.autograd.grad(value(x, far.detach()), x)[0])


def test_compiled_without_a_break() -> None:
    x, y, _, far = case(3, 5000, dense=False, per_class=False)
    made = softdice.SoftDiceLoss(3, activation="softmax") + softdice.BoundaryLoss(3, activation="softmax")
    compiled = torch.compile(lambda x: made(x, y, voxel_map=far), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), made(x, y, voxel_map=far))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "voxel_map to be a Tensor, got NoneType"),
        (torch.zeros(2, 5), r"voxel_map of shape \(2, 4\), \(2, 1, 4\) or \(2, 3, 4\), got \(2, 5\)"),
        (torch.zeros(2, 2, 4), r"got \(2, 2, 4\)"),
        (torch.zeros(2, 4, dtype=torch.complex64), "a real dtype"),
        (torch.zeros(2, 4, device="meta"), r"voxel_map on cpu like input, got meta. .* voxel_map\.to\(input\.device\)"),
    ],
)
def test_wrong_maps(given: Any, expected: str) -> None:
    x, y = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=f"^BoundaryLoss: expected .*{expected}"):
        softdice.BoundaryLoss(3, activation="softmax")(x, y, voxel_map=given)


def test_a_map_that_nobody_reads_is_an_error() -> None:
    x, y = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="SoftDiceLoss: expected no voxel_map"):
        softdice.SoftDiceLoss(3, activation="softmax")(x, y, voxel_map=torch.zeros(2, 4))


def nearest(labels: np.ndarray, c: int, spacing: tuple[float, ...]) -> np.ndarray:
    """Return the signed distance, by comparing every voxel with every other."""
    places = np.argwhere(np.ones_like(labels, bool)) * np.array(spacing)
    inside = (labels == c).ravel()
    apart = np.sqrt(((places[:, None] - places[None]) ** 2).sum(-1))
    far, deep = apart[:, inside].min(1), apart[:, ~inside].min(1)
    return np.where(inside, min(spacing) - deep, far).reshape(labels.shape)


@pytest.mark.parametrize("spacing", [None, 2.0, (0.5, 2.0)])
def test_distance_map(spacing: Any) -> None:
    labels = torch.randint(0, 3, (2, 1, 6, 7), generator=torch.Generator().manual_seed(0))
    found = softdice.distance_map(labels, 4, spacing=spacing)
    assert found.shape == (2, 4, 6, 7)
    assert bool((found[:, 3] == 0).all())  # absent
    for b, c in product(range(2), range(3)):
        exact = nearest(labels[b, 0].numpy(), c, spacing if isinstance(spacing, tuple) else (spacing or 1.0,) * 2)
        np.testing.assert_allclose(found[b, c].numpy(), exact, atol=1e-5)


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), True, (None, 1.0), "ab"])
def test_distance_map_of_wrong_spacing(spacing: Any) -> None:
    with pytest.raises(ValueError, match=r"^distance_map: expected spacing of 2 positive numbers"):
        softdice.distance_map(torch.zeros(1, 3, 3, dtype=torch.int64), 2, spacing=spacing)


@pytest.mark.parametrize("spacing", [0.5, 1.0, 2.0])
def test_the_published_map_takes_off_one_whatever_the_spacing(spacing: float) -> None:
    """docs/losses.md: its code has -(distance - 1) inside of a class; ours takes off a voxel. 16 voxels deep: 8 mm."""
    ndimage = pytest.importorskip("scipy.ndimage")
    inside = np.zeros(40, bool)
    inside[4:36] = True
    far, deep = (ndimage.distance_transform_edt(mask, sampling=[spacing]) for mask in (~inside, inside))
    published = far * ~inside - (deep - 1) * inside
    ours = softdice.distance_map(torch.from_numpy(inside)[None].long(), 2, spacing=[spacing])[0, 1].numpy()
    np.testing.assert_allclose(ours - published, np.where(inside, spacing - 1, 0), atol=1e-6)
    if spacing == 0.5:
        assert (published[19], ours[19]) == (-7.0, -7.5)
