"""FusedHead as a module: whose parameters it has, how it takes features from a network, and what it refuses."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softdice
from softdice.head import FusedHead

C = 3


def softmax_dice(**more: Any) -> softdice.SoftDiceLoss:
    return softdice.SoftDiceLoss(C, activation="softmax", **more)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, C, 1))


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    image = torch.randn(2, 1, 16, 16, generator=draw)
    return image, (image[:, 0] > 0).long() + (image[:, 0] > 1).long()


def test_parameters_are_the_convolutions_own() -> None:
    model = network()
    keys = list(model.state_dict())
    head = FusedHead(model[2], softmax_dice(class_weight=(1.0, 2.0, 3.0)))
    assert head.weight is model[2].weight
    assert head.bias is model[2].bias
    assert list(head.state_dict()) == ["weight", "bias"]
    assert list(model.state_dict()) == keys
    model[2] = head  # in the network's place of the convolution
    assert list(model.state_dict()) == keys


def test_training_with_the_head_is_training_without() -> None:
    image, target = batch()
    plain, fused = network(), network()
    loss, head = softmax_dice(), FusedHead(fused[2], softmax_dice(), chunk_mib=0.01)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9) for model in (plain, fused)]
    first = last = 0.0
    for step in range(10):
        values = loss(plain(image), target), head(head.features(fused, image), target)
        first, last = (values[1].item() if step == 0 else first), values[1].item()
        assert last == pytest.approx(values[0].item(), rel=1e-5)
        for optimizer, value in zip(optimizers, values, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert last < 0.9 * first
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_features_leave_the_network_as_it_was() -> None:
    image, _ = batch()
    model = network()
    head = FusedHead(model[2], softmax_dice())
    logits = model(image)
    features = head.features(model, image)
    assert torch.equal(features, model[:2](image))
    assert torch.equal(model(image), logits)
    assert torch.equal(head.logits(features), logits)
    model[2] = head  # also where the head stands in the network itself
    assert torch.equal(head.features(model, image), features)


def test_features_restore_the_network_after_an_error() -> None:
    image, _ = batch()
    model = network()
    head = FusedHead(model[2], softmax_dice())
    with pytest.raises(RuntimeError, match="expected"):
        head.features(model, image.repeat(1, 2, 1, 1))
    assert model(image).shape == (2, C, 16, 16)


def test_features_keep_a_forward_that_someone_else_set() -> None:
    image, _ = batch()
    model = network()
    model[2].forward = lambda features: features.sum()  # type: ignore[method-assign]
    FusedHead(model[2], softmax_dice()).features(model, image)
    assert model(image).ndim == 0


class Softmaxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, image: Tensor) -> Tensor:
        return self.inner(image).softmax(1)


def test_features_refuse_a_network_that_goes_on_after_the_convolution() -> None:
    image, _ = batch()
    model = Softmaxed()
    message = r"FusedHead.features: expected a network that returns what its last convolution does, got 1 calls"
    with pytest.raises(ValueError, match=message):
        FusedHead(model.inner[2], softmax_dice()).features(model, image)


def test_features_refuse_another_network() -> None:
    image, _ = batch()
    with pytest.raises(ValueError, match=r"expected a network that holds the head's weight, got Sequential"):
        FusedHead(network()[2], softmax_dice()).features(network(), image)


def test_copies_and_files() -> None:
    image, target = batch()
    model = network()
    head = FusedHead(model[2], softmax_dice())
    both = copy.deepcopy(nn.ModuleList([model, head]))
    assert both[1].weight is both[0][2].weight is not head.weight
    stored = io.BytesIO()
    torch.save(head, stored)
    stored.seek(0)
    features = head.features(model, image)
    assert torch.equal(torch.load(stored, weights_only=False)(features, target), head(features, target))
    assert "4 features, 3 classes" in repr(head)


def test_dtype_moves_with_the_network() -> None:
    image, target = batch()
    model = network()
    head = FusedHead(model[2], softmax_dice())
    model.double()
    value = head(head.features(model, image.double()), target)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(softmax_dice()(model(image.double()), target).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_that_autocast_made_half(dtype: torch.dtype) -> None:
    """What a network hands on under autocast has autocast's dtype, the weight its own."""
    image, target = batch()
    model = network()
    head = FusedHead(model[2], softmax_dice())
    with torch.autocast("cpu", dtype):
        features = head.features(model, image)
        value, expected = head(features, target), softmax_dice()(model(image), target)
    assert features.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    value.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(TypeError, match=r"expected features of dtype torch.float32 like the weight, got torch"):
        head(features, target)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Conv2d(4, C, 3), ValueError, r"so kernel_size=1, got kernel_size=\(3, 3\)"),
        (nn.Conv3d(4, C, 1, stride=2), ValueError, r"so stride=1, got stride=\(2, 2, 2\)"),
        (nn.Conv2d(4, C, 1, padding=1), ValueError, r"so padding=0, got padding=\(1, 1\)"),
        (nn.Conv2d(6, C, 1, groups=3), ValueError, r"so groups=1, got groups=\(3,\)"),
        (nn.Conv2d(4, 5, 1), ValueError, r"expected a convolution with 3 output channels, as the loss has classes"),
        (nn.Sequential(nn.Conv2d(4, C, 1)), TypeError, r"or nn.Linear, got Sequential. Pass the layer itself"),
        (nn.ConvTranspose2d(4, C, 1), TypeError, r"or nn.Linear, got ConvTranspose2d"),
        (nn.LazyConv2d(C, 1), TypeError, r"expected a convolution with a shape, got a lazy one"),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(4, C, 1)),
            TypeError,
            r"expected a convolution with plain parameters, got a parametrized one",
        ),
    ],
)
def test_layers_that_are_refused(layer: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"FusedHead: expected .*{message}" if "expected" not in message else message):
        FusedHead(layer, softmax_dice())


def test_padding_by_name_adds_nothing() -> None:
    FusedHead(nn.Conv2d(4, C, 1, padding="same"), softmax_dice())


def test_other_settings_that_are_refused() -> None:
    conv = nn.Conv2d(4, C, 1)
    words = "FusedHead: expected loss to be a loss of softdice that is a function of the statistics, or a sum of such"
    with pytest.raises(TypeError, match=f"{words}, got LovaszLoss"):
        FusedHead(conv, softdice.LovaszLoss(C))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"{words}, got CrossEntropyLoss"):
        FusedHead(conv, nn.CrossEntropyLoss())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"FusedHead: expected chunk_mib >= 0.001, got 0"):
        FusedHead(conv, softmax_dice(), chunk_mib=0)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(2, C, 8, 8), ValueError, r"expected features of shape \(B, 4, H, W\), got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 4, 8), ValueError, r"expected features of shape \(B, 4, H, W\), got \(2, 4, 8\)"),
        (torch.zeros(2, 4, 8, 8).double(), TypeError, r"features of dtype torch.float32 like the weight, got torch.fl"),
        (torch.zeros(2, 4, 8, 8).long(), TypeError, r"features of dtype torch.float32 like the weight, got torch.int"),
        ([0.0], TypeError, r"expected features to be a Tensor, got list"),
    ],
)
def test_features_that_are_refused(features: Any, error: type[Exception], message: str) -> None:
    head = FusedHead(nn.Conv2d(4, C, 1), softmax_dice())
    with pytest.raises(error, match=message):
        head(features, torch.zeros(2, 8, 8, dtype=torch.long))


def test_channels_of_a_linear_layer_stand_last() -> None:
    head = FusedHead(nn.Linear(4, C), softmax_dice())
    with pytest.raises(ValueError, match=r"expected features of shape \(B, \*S, 4\), got \(2, 4, 8\)"):
        head(torch.zeros(2, 4, 8), torch.zeros(2, 8, dtype=torch.long))


def test_targets_are_checked_as_by_the_loss() -> None:
    head = FusedHead(nn.Conv2d(4, C, 1), softmax_dice(), chunk_mib=0.01)
    features = torch.zeros(2, 4, 64, 64)
    with pytest.raises(ValueError, match=r"FusedHead: expected target of shape \(2, 64, 64\), \(2, 1, 64, 64\) or"):
        head(features, torch.zeros(2, 8, 8))
    target = torch.zeros(2, 64, 64, dtype=torch.long)
    target[:, 20], target[:, 50] = C, 255
    with pytest.raises(ValueError, match=r"FusedHead: expected target with labels in \[0, 3\), got 3 \(256 voxels\)"):
        head(features, target)  # over all chunks
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"FusedHead: expected voxel_weight >= 0, got -1.0 \(8192 voxels\)"):
        head(features, target.clamp_max(1), -torch.ones(2, 64, 64))
    assert torch.get_num_threads() == threads


def test_a_monai_network() -> None:
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    model = BasicUNet(spatial_dims=2, in_channels=1, out_channels=C, features=(4, 4, 8, 8, 8, 4))
    image, target = torch.randn(2, 1, 32, 32), torch.randint(0, C, (2, 32, 32))
    head = FusedHead(model.final_conv, softmax_dice())
    value, expected = head(head.features(model, image), target), softmax_dice()(model(image), target)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
