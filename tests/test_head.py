"""FusedHead: the loss and the gradients of the separate path, without the logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softdice
from softdice.head import FusedHead, chunked, product
from softdice.losses.base import Loss

K, C, SHAPE = 6, 5, (9, 10, 11)
CLOSE = 1e-6

Case = Callable[[], tuple[Loss, Tensor, dict[str, Any]]]


def labels(batch: int = 2, classes: int = C) -> Tensor:
    return torch.randint(0, classes, (batch, *SHAPE), generator=torch.Generator().manual_seed(1))


def dense(kind: str) -> Tensor:
    values = torch.rand(2, C, *SHAPE, generator=torch.Generator().manual_seed(2))
    return values > 0.6 if kind == "hot" else values / values.sum(1, keepdim=True)


def voxel_weight() -> Tensor:
    values = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    return values * (values > 0.3)


def ignored() -> Tensor:
    target = labels().to(torch.uint8)
    target[:, ::3] = 255
    return target


CASES: dict[str, Case] = {
    "dice": lambda: (softdice.SoftDiceLoss(C, activation="softmax"), labels(), {}),
    "dice on a mask (B, 1, *S) of floats": lambda: (
        softdice.SoftDiceLoss(C, activation="softmax"),
        labels().unsqueeze(1).float(),
        {},
    ),
    "a sum": lambda: (
        softdice.SoftDiceLoss(C, activation="softmax") + 0.5 * softdice.CrossEntropyLoss(C, activation="softmax"),
        labels(),
        {},
    ),
    "ignore_index": lambda: (softdice.JaccardLoss(C, activation="softmax", ignore_index=255), ignored(), {}),
    "voxel weights": lambda: (
        softdice.FocalLoss(C, activation="softmax"),
        labels(),
        {"voxel_weight": voxel_weight()},
    ),
    "regions": lambda: (
        softdice.TverskyLoss(C, activation="softmax", regions=((1, 2, 3), (1, 3), (3,))),
        labels(),
        {},
    ),
    "label smoothing, one number per sample": lambda: (
        softdice.MCCLoss(C, activation="softmax", label_smoothing=0.1, pooling="sample"),
        labels(),
        {},
    ),
    "sigmoid, multi-hot": lambda: (softdice.FocalTverskyLoss(C, activation="sigmoid"), dense("hot"), {}),
    "soft labels": lambda: (softdice.DiceSemimetricLoss(C, activation="softmax"), dense("soft"), {}),
    "over classes": lambda: (softdice.GeneralizedDiceLoss(C, activation="softmax", absent="skip"), labels(), {}),
    "merge": lambda: (softdice.SoftDiceLoss(C, activation="softmax"), labels(), {"merge": {0: (3, 4)}}),
}


def gradients(value: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, wanted))


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, in units of the largest element."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max() / theirs.abs().max())


def layer_and_features(dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[nn.Conv3d, Tensor]:
    torch.manual_seed(0)
    return nn.Conv3d(K, C, 1).to(dtype), torch.randn(batch, K, *SHAPE, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("chunk_mib", [0.03, 32.0])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_separate_path(backend: str, name: str, chunk_mib: float) -> None:
    loss, target, more = CASES[name]()
    conv, features = layer_and_features()
    wanted = [features, conv.weight, conv.bias]
    expected = loss(conv(features), target, **more)
    value = FusedHead(conv, loss, chunk_mib=chunk_mib)(features, target, **more)
    assert value.item() == pytest.approx(expected.item(), rel=CLOSE)
    exact_conv, exact_features = copy.deepcopy(conv).double(), features.detach().double().requires_grad_()
    exact = gradients(
        loss(exact_conv(exact_features), target, **more), [exact_features, exact_conv.weight, exact_conv.bias]
    )
    ours, theirs = gradients(value, wanted), gradients(expected, wanted)
    assert apart(ours[0], theirs[0]) <= CLOSE
    for mine, other, truth in zip(ours, theirs, exact, strict=True):  # sums over voxels: rounding on both paths
        assert apart(mine.double(), truth) <= max(CLOSE, 2 * apart(other.double(), truth))


@pytest.mark.parametrize("chunk_mib", [0.001, 0.01, 0.1, 1.0, 8.0])
def test_result_does_not_depend_on_the_chunks(chunk_mib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "ELEMENTS", 1 << 30)  # the budget alone decides
    loss, target, _ = CASES["a sum"]()
    conv, features = layer_and_features(torch.float64)
    wanted = [features, conv.weight, conv.bias]
    whole = FusedHead(conv, loss)(features, target)
    parts = FusedHead(conv, loss, chunk_mib=chunk_mib)(features, target)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    for ours, theirs in zip(gradients(parts, wanted), gradients(whole, wanted), strict=True):
        assert apart(ours, theirs) <= 1e-12


@pytest.mark.parametrize("chunk_mib", [0.05, 0.5, 5.0])
def test_chunks_stay_within_the_budget(chunk_mib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    multiply = product._product

    def record(*arguments: Any) -> Tensor:
        made.append(arguments[-1].untyped_storage().nbytes())
        return multiply(*arguments)

    monkeypatch.setattr(product, "_product", record)
    loss = softdice.SoftDiceLoss(100, activation="softmax")
    head = FusedHead(nn.Conv2d(3, 100, 1), loss, chunk_mib=chunk_mib)
    head(torch.randn(3, 3, 64, 64), torch.randint(0, 100, (3, 64, 64))).backward()
    assert 2 * chunked.LANES * max(made) <= chunk_mib * 2**20
    assert sum(made) >= 2 * 4 * 3 * 100 * 64 * 64  # every logit, forward and backward


def test_gradcheck(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "ELEMENTS", 24)
    torch.manual_seed(0)
    loss = softdice.SoftDiceLoss(3, activation="softmax") + softdice.CrossEntropyLoss(3, activation="softmax")
    target = torch.randint(0, 3, (2, 3, 4))

    def run(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        conv = nn.Conv2d(2, 3, 1).double()
        head = FusedHead(conv, loss, chunk_mib=0.001)
        return torch.func.functional_call(head, {"weight": weight, "bias": bias}, (features, target))

    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 2, 3, 4), (3, 2, 1, 1), (3,))]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs])
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d", "Linear"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 5])
def test_kinds_of_layer(kind: str, bias: bool, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "ELEMENTS", 256)  # several chunks of several samples
    torch.manual_seed(0)
    linear = kind == "Linear"
    rank = 2 if linear else int(kind[4])
    layer = nn.Linear(K, C, bias=bias) if linear else getattr(nn, kind)(K, C, 1, bias=bias)
    space = (4, 5, 6)[:rank]
    features = torch.randn((batch, *space, K) if linear else (batch, K, *space), requires_grad=True)
    target = torch.randint(0, C, (batch, *space))
    loss = softdice.SoftDiceLoss(C, activation="softmax")
    head = FusedHead(layer, loss)
    assert list(head.state_dict()) == list(layer.state_dict())
    logits = layer(features).movedim(-1, 1) if linear else layer(features)
    assert torch.equal(head.logits(features), logits)
    expected, value = loss(logits, target), head(features, target)
    wanted = [features, *layer.parameters()]
    for ours, theirs in zip(gradients(value, wanted), gradients(expected, wanted), strict=True):
        assert apart(ours, theirs) <= CLOSE


@pytest.mark.parametrize("layout", ["channels last", "a slice", "expanded"])
def test_strides(layout: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, K, 24, 24)
    if layout == "channels last":
        features = features.to(memory_format=torch.channels_last)
    features = features[:, :, 2:-2, ::2] if layout == "a slice" else features
    features = features[:1].expand(2, -1, -1, -1) if layout == "expanded" else features
    features = features.requires_grad_()
    conv, loss = nn.Conv2d(K, C, 1), softdice.SoftDiceLoss(C, activation="softmax")
    target = torch.randint(0, C, (2, *features.shape[2:]))
    wanted = [features, conv.weight]
    (ours, _), (theirs, _) = (
        gradients(FusedHead(conv, loss)(features, target), wanted),
        gradients(loss(conv(features), target), wanted),
    )
    assert apart(ours, theirs) <= CLOSE


@pytest.mark.parametrize("frozen", [("features",), ("weight", "bias"), ("features", "weight"), ("bias",)])
def test_gradients_only_where_they_are_needed(frozen: tuple[str, ...]) -> None:
    loss, target, _ = CASES["dice"]()
    conv, features = layer_and_features()
    named = {"features": features, "weight": conv.weight, "bias": conv.bias}
    for name in frozen:
        named[name].requires_grad_(False)
    FusedHead(conv, loss)(features, target).backward()
    assert {name for name, value in named.items() if value.grad is None} == set(frozen)


def test_no_graph_without_gradients() -> None:
    loss, target, _ = CASES["dice"]()
    conv, features = layer_and_features()
    with torch.no_grad():
        assert not FusedHead(conv, loss)(features, target).requires_grad
    with torch.inference_mode():
        value = FusedHead(conv, loss)(features, target)
    assert value.item() == pytest.approx(loss(conv(features), target).item(), rel=CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    loss, target, _ = CASES["dice"]()
    conv, features = layer_and_features()
    wanted = [features, conv.weight, conv.bias]
    exact = gradients(loss(conv(features), target), wanted)
    with torch.autocast("cpu", dtype):
        expected = loss(conv(features), target)
        value = FusedHead(conv, loss)(features, target)
        inside = gradients(1024 * FusedHead(conv, loss)(features, target), wanted)  # 1024: float16 underflows
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    for ours, theirs, truth in zip(inside, gradients(1024 * expected, wanted), exact, strict=True):
        assert ours.dtype == torch.float32
        assert apart(ours / 1024, truth) <= 2 * apart(theirs / 1024, truth) + 1e-3


def test_half_precision_throughout() -> None:
    loss, target, _ = CASES["dice"]()
    conv, features = layer_and_features(torch.bfloat16)
    value, expected = FusedHead(conv, loss)(features, target), loss(conv(features), target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    (ours,), (theirs,) = gradients(value, [features]), gradients(expected, [features])
    assert apart(ours, theirs) <= 0.02


def test_bits_do_not_depend_on_threads_or_runs() -> None:
    loss, target, _ = CASES["dice"]()
    conv, features = layer_and_features()
    head = FusedHead(conv, loss, chunk_mib=0.2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            value = head(features, target)
            results.append([value.detach(), *gradients(value, [features, conv.weight, conv.bias])])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_backward_twice_and_inputs_untouched() -> None:
    loss, target, _ = CASES["dice"]()
    conv, features = layer_and_features()
    before = [value.detach().clone() for value in (features, conv.weight, conv.bias, target)]
    value = FusedHead(conv, loss)(features, target)
    first = torch.autograd.grad(value, features, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, features)[0])
    after = (features, conv.weight, conv.bias, target)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_gradient_of_a_target_takes_the_separate_path() -> None:
    conv, features = layer_and_features()
    target = dense("soft").requires_grad_()
    loss = softdice.SquaredDiceLoss(C, activation="softmax")
    (ours,) = gradients(FusedHead(conv, loss)(features, target), [target])
    (theirs,) = gradients(loss(conv(features), target), [target])
    assert apart(ours, theirs) <= CLOSE


def test_empty_batch() -> None:
    conv, _ = layer_and_features()
    features = torch.zeros(0, K, *SHAPE, requires_grad=True)
    loss = softdice.SoftDiceLoss(C, activation="softmax")
    value = FusedHead(conv, loss)(features, labels()[:0])
    value.backward()
    assert value.item() == loss(conv(features), labels()[:0]).item()
    assert features.grad is not None
    assert features.grad.shape == features.shape
    assert not conv.weight.grad.any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_compiles_around_the_head() -> None:
    loss, target, _ = CASES["dice"]()
    conv, features = layer_and_features()
    head = FusedHead(conv, loss)
    compiled = torch.compile(lambda f: 2 * head(f, target), backend="aot_eager")
    (ours,), (theirs,) = gradients(compiled(features), [features]), gradients(2 * head(features, target), [features])
    assert torch.equal(ours, theirs)
