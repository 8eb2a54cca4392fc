"""The last 1x1 convolution and the loss together, chunk by chunk, so that the logits never exist.

The work on a chunk is in `softdice.head.chunked` and `softdice.head.product`.

Shapes: B sample, K feature, C class, V voxel, *S space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softdice import validation
from softdice.head.chunked import Grid, check_loss, loss_value
from softdice.head.product import Product, autocasts, product_dtype
from softdice.head.upsampled import Upsampled
from softdice.losses.base import StatisticsLoss
from softdice.statistics import check

CHUNK_MIB = 32.0
"""Budget for the logits of a chunk and their gradient together."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FusedHead(nn.Module):
    """features, target -> loss of conv(features), without ever holding conv(features).

        FusedHead(conv, loss)(features, target) = loss(conv(features), target)

    with the same gradients, for features, weight and bias. The memory beside features and gradients is `chunk_mib`,
    whatever the number of classes.

    Args:
        conv: nn.Conv1d, nn.Conv2d or nn.Conv3d with kernel 1, stride 1, no padding and one group; or nn.Linear. Its
            parameters become the head's own, under the same names: `state_dict` has the keys `weight` and `bias`, and
            an optimizer or a network that holds the convolution goes on sharing them.
        loss: any loss of this package that is a function of the statistics, or a sum of such, with num_classes equal to
            the channels that conv makes; or `softdice.Upsampled` around one: target is then of a higher resolution than
            features, and the logits of the features' resolution exist, none of the target's.
        chunk_mib: MiB for the logits of one chunk of voxels and their gradient together. The loss and the gradients do
            not depend on it beyond rounding.

    Shapes: features (B, K, *S) for a convolution, (B, *S, K) for nn.Linear; target and voxel_weight as the loss takes
    them for an input (B, C, *S).

    Returns (when called): what the loss returns. Under autocast the product is computed in the autocast dtype, the
    statistics in float32.

    Raises:
        TypeError, ValueError: a module, a loss, shapes or values that do not fit, naming them.

    Edge cases: as the loss's; an empty batch has gradients of 0. A second derivative, or the gradient of a target or
    voxel_weight, takes the separate path, with the memory that it costs.

    Example:
        >>> import torch, softdice
        >>> from softdice.head import FusedHead
        >>> conv = torch.nn.Conv2d(8, 3, kernel_size=1)
        >>> loss = softdice.SoftDiceLoss(3, activation="softmax")
        >>> head = FusedHead(conv, loss)
        >>> features, labels = torch.randn(2, 8, 16, 16), torch.randint(3, (2, 16, 16))
        >>> torch.allclose(head(features, labels), loss(conv(features), labels))
        True
        >>> torch.equal(head.logits(features), conv(features))
        True

    Source: the recomputation of logits, after E. Wijmans et al., "Cut your losses in large-vocabulary language
    models", ICLR 2025; two passes, since overlap losses couple all voxels.
    """

    weight: Tensor
    bias: Tensor | None

    @validation.public
    def __init__(self, conv: nn.Module, loss: StatisticsLoss | Upsampled, *, chunk_mib: float = CHUNK_MIB) -> None:
        """Take over the parameters of the convolution; raise TypeError or ValueError as the class says."""
        super().__init__()
        _check_module(conv)
        check_loss(loss, Upsampled)
        validation.number("chunk_mib", chunk_mib, 0.001)
        weight: Any = conv.weight
        if weight.shape[0] != loss.num_classes:
            expected = f"a convolution with {loss.num_classes} output channels, as the loss has classes"
            validation.fail(expected, weight.shape[0], "Make num_classes of the loss the number of channels.")
        self.register_parameter("weight", weight)
        self.register_parameter("bias", conv.bias)  # type: ignore[arg-type]
        self.loss = loss
        self.chunk_mib = float(chunk_mib)

    @validation.public
    def forward(
        self,
        features: Tensor,
        target: Tensor,
        voxel_weight: Tensor | None = None,
        *,
        voxel_map: Tensor | None = None,
        merge: Mapping[int, Sequence[int]] | None = None,
    ) -> Tensor:
        """features (B, K, *S), or (B, *S, K) for nn.Linear; the rest as in a call of the loss itself -> loss, 0-d."""
        features_BKS = self._checked(features)
        if isinstance(self.loss, Upsampled):
            return self.loss(self.logits(features), target, voxel_weight, voxel_map=voxel_map, merge=merge)
        settings, counted = self.loss.merged(merge, features_BKS)  # counted: the classes that enter the mean
        B, C = len(features), self.weight.shape[0]
        dtype = product_dtype(features)
        # one number, expanded: it has the shape, dtype and device of the logits, and no memory of theirs
        outline = features.new_zeros((), dtype=dtype).expand(B, C, *features_BKS.shape[2:])
        request = check.request(outline, target, voxel_weight, settings, C, voxel_map)
        features_BKV = features_BKS.flatten(2)
        V = features_BKV.shape[2]
        product = Product((B, C, V), dtype, Grid.of(B, C, V, dtype, features.device, self.chunk_mib))
        inputs = (features_BKV, self.weight.reshape(C, -1), self.bias)
        return loss_value(self.loss, product, request, counted, *inputs)

    def logits(self, features: Tensor) -> Tensor:
        """features -> logits (B, C, *S), for inference: what the convolution returns, with channels second.

        `head.loss(head.logits(features), target)` is the loss on the separate path.
        """
        if self.weight.ndim == 2:
            return nn.functional.linear(features, self.weight, self.bias).movedim(-1, 1)
        convolution = getattr(nn.functional, f"conv{self.weight.ndim - 2}d")
        return convolution(features, self.weight, self.bias)

    @validation.public
    def features(self, network: nn.Module, *inputs: Any) -> Tensor:
        """Run a network that ends in this head's convolution; return the features that enter the convolution.

        The network keeps its `state_dict` and its forward method. For this one call its last convolution (or the head,
        put in its place) returns its input. Raise ValueError for a network without it, or that does not end in it.

        Example:
            >>> import torch, softdice
            >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 1))
            >>> head = FusedHead(network[-1], softdice.SoftDiceLoss(3, activation="softmax"))
            >>> head.features(network, torch.zeros(2, 1, 10, 10)).shape
            torch.Size([2, 8, 8, 8])
        """
        with _without_last_layer(network, self.weight) as layer_inputs:
            result = network(*inputs)
        if len(layer_inputs) != 1 or result is not layer_inputs[0]:
            calls = len(layer_inputs)
            got = f"{calls} calls of the convolution, and another result" if calls else "no call of the convolution"
            advice = "Compute the features yourself and call the head with them."
            validation.fail("a network that returns what its last convolution does", got, advice)
        return result

    def _checked(self, features: Tensor) -> Tensor:
        """Return the features of a call as (B, K, *S); those of a linear layer are passed as (B, *S, K).

        Raise TypeError for no tensor or a dtype other than the weight's (autocast allows one, except for float64), and
        ValueError for a shape or device that does not fit the weight.
        """
        validation.are_tensors("Pass the features first, the target second.", features=features)
        K = self.weight.shape[1]
        linear = self.weight.ndim == 2
        channel_axis = -1 if linear else 1
        rank = features.ndim if linear else self.weight.ndim
        if features.ndim < 3 or features.ndim != rank or features.shape[channel_axis] != K:
            shape = f"(B, *S, {K})" if linear else f"(B, {K}, {', '.join('DHW'[5 - rank :])})"
            advice = "Pass what enters the last layer, not what it returns."
            validation.fail(f"features of shape {shape}", tuple(features.shape), advice)
        if features.device != self.weight.device:
            advice = "Move one of them with .to(device)."
            validation.fail(f"features on {self.weight.device} like the weight", features.device, advice)
        is_double = torch.float64 in (features.dtype, self.weight.dtype)  # which autocast leaves alone
        autocast_converts = autocasts(features.device.type) and not is_double
        if features.dtype not in check.INPUT_DTYPES or not (autocast_converts or features.dtype == self.weight.dtype):
            advice = "Convert one of them, or use torch.autocast."
            validation.fail(f"features of dtype {self.weight.dtype} like the weight", features.dtype, advice, TypeError)
        return features.movedim(-1, 1) if linear else features

    def extra_repr(self) -> str:
        C, K = self.weight.shape[:2]
        return f"{K} features, {C} classes, bias={self.bias is not None}, chunk_mib={self.chunk_mib:g}"


def _check_module(conv: nn.Module) -> None:
    """Raise unless a user's layer is a product over channels with plain parameters.

    TypeError for another class, parametrized or lazy parameters; ValueError for kernel, stride, padding or groups.
    """
    expected = "nn.Conv1d, nn.Conv2d, nn.Conv3d with kernel 1, or nn.Linear"
    if not isinstance(conv, (*_CONVOLUTIONS, nn.Linear)):
        advice = "Pass the layer itself, not the block that contains it."
        validation.fail(expected, type(conv).__name__, advice, TypeError)
    if not all(isinstance(p, nn.Parameter) for p in (conv.weight, conv.bias) if p is not None):
        advice = "Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)."
        validation.fail("a convolution with plain parameters", "a parametrized one", advice, TypeError)
    if nn.parameter.is_lazy(conv.weight):
        advice = "Run the network once, so that the layer learns its number of features."
        validation.fail("a convolution with a shape", "a lazy one", advice, TypeError)
    if isinstance(conv, nn.Linear):
        return
    layer: Any = conv
    padding = layer.padding if isinstance(layer.padding, tuple) else ()  # "same" and "valid" pad nothing here
    for name, values, required in (
        ("kernel_size", layer.kernel_size, 1), ("stride", layer.stride, 1), ("padding", padding, 0),
        ("groups", (layer.groups,), 1),
    ):  # fmt: skip
        if any(value != required for value in values):
            advice = "Only a product over channels can be computed chunk by chunk."
            validation.fail(f"{expected}, so {name}={required}", f"{name}={values}", advice)


@contextmanager
def _without_last_layer(network: nn.Module, weight: Tensor) -> Iterator[list[Tensor]]:
    """Let the layers whose weight is that very tensor return their input inside the block; yield a list of the inputs.

    Each call of such a layer adds its input to the list. Raise ValueError if no layer has the weight.
    """
    layers = [layer for layer in network.modules() if getattr(layer, "weight", None) is weight]
    if not layers:
        advice = "Pass the network whose convolution the head was made from."
        validation.fail("a network that holds the head's weight", type(network).__name__, advice)
    inputs: list[Tensor] = []

    def forward_input(value: Tensor) -> Tensor:
        """Return the input of the layer, and note it."""
        inputs.append(value)
        return value

    originals = [layer.__dict__.get("forward") for layer in layers]  # what a user set on the instance, if anything
    for layer in layers:
        layer.__dict__["forward"] = forward_input
    try:
        yield inputs
    finally:
        for layer, forward in zip(layers, originals, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward
