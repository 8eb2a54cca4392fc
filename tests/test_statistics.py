"""overlap_statistics and OverlapStatistics: what every backend must hold to, whatever the shape, dtype and stride."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import softdice
from softdice.statistics.declared import FIELDS

ACTIVATIONS = ["none", "softmax", "sigmoid"]
WEIGHTS = (1.0, -0.7, 0.3, 0.9, -0.2, 0.5, 0.8, -0.4)  # one per field with a gradient, no two alike


def made(activation: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return an input of that shape, and labels with every class."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64)
    prob = {"none": logits.softmax(1), "softmax": logits, "sigmoid": logits}[activation]
    return prob.to(dtype), torch.randint(0, max(shape[1], 2), (shape[0], *shape[2:]), generator=generator)


def sums_and_gradient(input: Tensor, target: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Return all statistics, (10, B, C), and the gradient of a sum with a weight for each statistic and class."""
    leaf = input.detach().requires_grad_()
    stats = softdice.overlap_statistics(leaf, target, **keywords)
    fields = torch.stack([getattr(stats, name) for name in FIELDS])
    uneven = torch.tensor(WEIGHTS, dtype=fields.dtype).view(-1, 1, 1) * torch.arange(1.0, fields.shape[2] + 1)
    (fields[: len(WEIGHTS)] * uneven).sum().backward()
    assert leaf.grad is not None
    return fields.detach(), leaf.grad


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Compare gradients and sums relative to their largest value: an absolute bound would let anything pass."""
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = (actual.double() - expected.double()).abs().max()
    assert error <= relative * scale, f"error {error / scale:.3g} of the maximum, allowed {relative:.3g}"


# Shapes, dtypes, strides


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 5, 4), (1, 4, 3, 4, 5), (2, 2, 3, 2, 2, 3), (1, 1, 1), (3, 1, 4)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_spatial_dimensions_do_not_matter(backend: str, activation: str, shape: tuple[int, ...]) -> None:
    input, labels = made(activation, *shape, dtype=torch.float64)
    sums, gradient = sums_and_gradient(input, labels, activation=activation)
    flat_sums, flat_gradient = sums_and_gradient(input.flatten(2), labels.flatten(1), activation=activation)
    channel_sums, channel_gradient = sums_and_gradient(input, labels.unsqueeze(1), activation=activation)
    for other in (flat_sums, channel_sums):
        torch.testing.assert_close(other, sums, rtol=1e-12, atol=0)
    for other in (flat_gradient.view(shape), channel_gradient):
        assert_near(other, gradient, 1e-12)
    exact = oracle.statistics(input.flatten(2), labels.flatten(1), activation=activation)
    for row, name in zip(sums, FIELDS, strict=True):
        torch.testing.assert_close(row, torch.from_numpy(exact[name]), rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["channels_last", "transposed", "expanded", "sliced", "offset", "flipped"])
def test_strides_do_not_matter(backend: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(2, 3, 12, 10, generator=generator)
    labels = torch.randint(0, 3, (2, 12, 10), generator=generator)
    input, target = {
        "channels_last": lambda: (base.to(memory_format=torch.channels_last), labels),
        "transposed": lambda: (base.transpose(2, 3), labels.transpose(1, 2)),
        "expanded": lambda: (base[:1].expand(2, 3, 12, 10), labels[:1].expand(2, 12, 10)),
        "sliced": lambda: (base[:, :, ::2, 1::3], labels[:, ::2, 1::3]),
        "offset": lambda: (base[:, :, 1:, 2:], labels[:, 1:, 2:]),
        "flipped": lambda: (base.permute(0, 1, 3, 2), labels.flip(1).transpose(1, 2)),
    }[kind]()
    weight = torch.rand(2, 1, 10, 12, generator=generator).transpose(2, 3)[:, :, : input.shape[2], : input.shape[3]]
    if kind in ("transposed", "flipped"):
        weight = torch.rand(2, 10, 12, generator=generator)
    assert kind == "channels_last" or not (input.is_contiguous() and target.is_contiguous())
    keywords: dict[str, Any] = {"activation": "softmax", "voxel_weight": weight}
    sums, gradient = sums_and_gradient(input, target, **keywords)
    keywords["voxel_weight"] = weight.contiguous()
    plain_sums, plain_gradient = sums_and_gradient(input.contiguous(), target.contiguous(), **keywords)
    torch.testing.assert_close(sums, plain_sums, rtol=1e-6, atol=0)
    assert_near(gradient, plain_gradient, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_is_at_most_twice_that_of_eager(backend: str, activation: str, dtype: torch.dtype) -> None:
    input, labels = made(activation, 2, 5, 40, 40, dtype=dtype)
    names = [name for name in oracle.eager_statistics(input, labels, activation) if name != "cross_entropy"]

    def run(way: Any, tensor: Tensor) -> tuple[Tensor, Tensor]:
        leaf = tensor.detach().requires_grad_()
        fields = way(leaf)
        rows = torch.stack([fields[name].double() for name in names])
        (rows * torch.tensor(WEIGHTS[: len(names)]).view(-1, 1, 1)).sum().backward()
        assert leaf.grad is not None
        return rows.detach(), leaf.grad.double()

    def ours(tensor: Tensor) -> dict[str, Tensor]:
        stats = softdice.overlap_statistics(tensor, labels, activation=activation, fields=names)
        return {name: getattr(stats, name) for name in names}

    exact_sums, exact_gradient = run(lambda x: oracle.eager_statistics(x, labels, activation), input.double())
    eager_sums, eager_gradient = run(lambda x: oracle.eager_statistics(x, labels, activation), input)
    sums, gradient = run(ours, input)
    sum_slack = 1e-6 if dtype != torch.float64 else 1e-14
    slack = 4 * torch.finfo(dtype).eps  # two units in the last place: all there is where eager is the oracle itself
    for name, got, eager, exact in zip(names, sums, eager_sums, exact_sums, strict=True):
        error, allowed = (got - exact).abs().max(), 2 * (eager - exact).abs().max() + sum_slack * exact.abs().max()
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"
    error = (gradient - exact_gradient).abs().max()
    assert error <= 2 * (eager_gradient - exact_gradient).abs().max() + slack * exact_gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_dtypes(backend: str, dtype: torch.dtype) -> None:
    input, labels = made("softmax", 2, 3, 9, dtype=dtype)
    sums, gradient = sums_and_gradient(input, labels, activation="softmax")
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert gradient.shape == input.shape


def test_half_precision_sums_do_not_overflow(backend: str) -> None:
    ones = torch.ones(1, 1, 100_000, dtype=torch.float16)  # float16 ends at 65504
    stats = softdice.overlap_statistics(ones, torch.ones(1, 100_000, dtype=torch.uint8))
    assert stats.intersection.item() == stats.prediction.item() == stats.target.item() == 100_000


def test_many_voxels_lose_no_accuracy(backend: str) -> None:
    voxels = 2**24 + 2**20 + 1  # a float32 that counts by ones stops at 2^24
    input = torch.full((1, 1, 1), 0.1).expand(1, 1, voxels).contiguous()
    target = torch.ones(1, voxels, dtype=torch.uint8)
    stats = softdice.overlap_statistics(input, target, fields=("intersection", "prediction", "target"), validate=False)
    exact = voxels * torch.tensor(0.1).double().item()
    slack = 1e-6 if backend == "reference" else 2.4e-7  # the reference adds pairwise in float32, as the seed does
    assert abs(stats.target.double().item() / voxels - 1) <= 1.2e-7
    assert abs(stats.prediction.double().item() / exact - 1) <= slack
    assert abs(stats.intersection.double().item() / exact - 1) <= slack


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64],
)
def test_label_dtypes_give_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    input, labels = made("softmax", 2, 4, 50)
    labels[0, :7] = 100
    expected = sums_and_gradient(input, labels, activation="softmax", ignore_index=100)
    got = sums_and_gradient(input, labels.to(dtype), activation="softmax", ignore_index=100)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("classes", [1, 2])
def test_bool_labels(backend: str, classes: int) -> None:
    input, labels = made("sigmoid", 2, classes, 30)
    expected = sums_and_gradient(input, labels, activation="sigmoid")
    got = sums_and_gradient(input, labels.bool(), activation="sigmoid")
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_hot_targets_equal_labels(backend: str, activation: str, dtype: torch.dtype) -> None:
    input, labels = made(activation, 2, 3, 6, 5)
    one_hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).to(dtype)
    expected = sums_and_gradient(input, labels, activation=activation)
    got = sums_and_gradient(input, one_hot, activation=activation)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    assert_near(got[1], expected[1], 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_an_ignore_index_that_the_label_dtype_cannot_hold(backend: str, dtype: torch.dtype) -> None:
    other, number = {torch.uint8: (255, -1), torch.int8: (-1, 255)}[dtype]  # torch wraps one round to the other
    input, labels = made("softmax", 1, 2, 6)
    labels = labels.to(dtype)
    stats = softdice.overlap_statistics(input, labels, activation="softmax", ignore_index=number)
    assert stats.voxels[0, 0] == 6
    labels[0, 0] = other
    with pytest.raises(ValueError, match=rf"got {other} \(1 voxels\)"):
        softdice.overlap_statistics(input, labels, activation="softmax", ignore_index=number)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_more_classes_than_the_label_dtype_counts(backend: str, dtype: torch.dtype) -> None:
    input, _ = made("softmax", 1, 300, 4)
    labels = torch.tensor([[100, 127, 44, 0]])
    expected, got = (sums_and_gradient(input, y, activation="softmax") for y in (labels, labels.to(dtype)))
    assert torch.equal(got[0], expected[0])


# Invariants


def test_softmax_gradient_sums_to_zero_over_classes(backend: str) -> None:
    input, labels = made("softmax", 2, 6, 8, 8)
    _, gradient = sums_and_gradient(input, labels, activation="softmax")
    assert gradient.sum(1).abs().max() <= 1e-6 * gradient.abs().max()


def test_softmax_is_blind_to_a_constant(backend: str) -> None:
    input, labels = made("softmax", 2, 4, 8, 8, dtype=torch.float64)
    sums, gradient = sums_and_gradient(input, labels, activation="softmax")
    shift = 1000 * torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved_sums, moved_gradient = sums_and_gradient(input + shift, labels, activation="softmax")
    torch.testing.assert_close(moved_sums, sums, rtol=1e-10, atol=0)
    assert_near(moved_gradient, gradient, 1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_permuted_classes_permute_the_statistics(backend: str, activation: str) -> None:
    input, labels = made(activation, 2, 4, 50, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    place = torch.argsort(order)  # old class number -> new one
    stats = softdice.overlap_statistics(input, labels, activation=activation)
    moved = softdice.overlap_statistics(input[:, order], place[labels], activation=activation)
    for name in FIELDS:
        torch.testing.assert_close(getattr(moved, name), getattr(stats, name)[:, order], rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_halves_add_up(backend: str, axis: int) -> None:
    input, labels = made("softmax", 4, 3, 8, 10, dtype=torch.float64)
    whole = softdice.overlap_statistics(input, labels, activation="softmax").pool()
    halves = [
        softdice.overlap_statistics(x, y, activation="softmax").pool()
        for x, y in zip(input.chunk(2, axis), labels.chunk(2, max(axis - 1, 0)), strict=True)
    ]
    together = halves[0] + halves[1]
    for name in FIELDS:
        torch.testing.assert_close(getattr(together, name), getattr(whole, name), rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inputs_stay_and_runs_repeat(backend: str, activation: str) -> None:
    input, labels = made(activation, 2, 3, 40, 40)
    weight = torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(0))
    kept = input.clone(), labels.clone(), weight.clone()
    first = sums_and_gradient(input, labels, activation=activation, voxel_weight=weight)
    second = sums_and_gradient(input, labels, activation=activation, voxel_weight=weight)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for tensor, before in zip((input, labels, weight), kept, strict=True):
        assert torch.equal(tensor, before)


def test_backward_twice(backend: str) -> None:
    input, labels = made("softmax", 2, 3, 20)
    stats = softdice.overlap_statistics(input.requires_grad_(), labels, activation="softmax")
    score = (stats.intersection / (stats.prediction + stats.target)).sum()
    (first,) = torch.autograd.grad(score, input, retain_graph=True)
    (second,) = torch.autograd.grad(score, input)
    assert torch.equal(first, second)


def test_only_the_fields_asked_for(backend: str) -> None:
    input, labels = made("softmax", 2, 3, 20)
    everything = softdice.overlap_statistics(input, labels, activation="softmax")
    for name in FIELDS:
        one = softdice.overlap_statistics(input, labels, activation="softmax", fields=(name,))
        assert one.fields == (name,)
        torch.testing.assert_close(getattr(one, name), getattr(everything, name), rtol=1e-6, atol=0, msg=name)
    pair = softdice.overlap_statistics(input, labels, activation="softmax", fields=("target", "intersection", "target"))
    assert pair.fields == ("intersection", "target")
