"""Upsampling and loss together, chunk by chunk, so that logits of full size never exist.

The work on a chunk is in `softdice.head.chunked` and `softdice.head.interpolation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from softdice import validation
from softdice.head.chunked import check_loss, loss_value
from softdice.head.interpolation import Interpolation
from softdice.losses.base import StatisticsLoss
from softdice.statistics import check

CHUNK_MIB = 48.0
"""Budget for the upsampled logits of the chunks under way, and their gradient: for each of eight threads eight rows of
512 voxels and 150 classes."""

RANKS = {"linear": (1,), "bilinear": (2,), "trilinear": (3,), "nearest": (1, 2, 3)}
"""Numbers of spatial dimensions that each mode is for."""
BY_RANK = {1: "linear", 2: "bilinear", 3: "trilinear"}
"""The mode for a number of spatial dimensions, where the user names none."""


class Upsampled(nn.Module):
    """logits of low resolution, target -> loss of the upsampled logits, without ever holding these.

        Upsampled(loss)(logits, target) = loss(interpolate(logits, size), target)

    with the same gradient, where interpolate is that of `torch.nn.functional` and size the spatial shape of target.
    Memory beside the logits and their gradient is `chunk_mib` at most, whatever the number of classes.

    Args:
        loss: any loss of this package that is a function of the statistics, or a sum of such. (The sum goes
            inside: `Upsampled(a + b)`.)
        mode: None: "linear" for (B, C, w), "bilinear" for images, "trilinear" for volumes. Or one of these, which then
            refuses other shapes; or "nearest", for all of them.
        align_corners: as for interpolate; False with "nearest".
        chunk_mib: MiB for the upsampled logits of the chunks under way and their gradient, but at least one row of
            voxels each. Neither loss nor gradient depends on it beyond rounding.

    Shapes: logits (B, C, w), (B, C, h, w) or (B, C, d, h, w), float16, bfloat16, float32 or float64, any
    strides; target and voxel_weight as the loss takes them for an input (B, C, *S). Any factor will do, fractional or
    below 1.

    Returns (when called): what the loss returns. Half precision is interpolated in float32, so it is nearer to the
    exact value than interpolate in half precision.

    Raises:
        TypeError, ValueError: a loss, shapes or values that do not fit, naming them.

    Edge cases: as the loss's; an empty batch has a gradient of 0. A second derivative, or the gradient of a target or
    voxel_weight, takes the separate path, with the memory that it costs. A network that calls interpolate with a
    fractional scale_factor (not a size) gets slightly other logits from it: pass recompute_scale_factor=True there.

    Example:
        >>> import torch, softdice
        >>> from torch.nn.functional import interpolate
        >>> loss = softdice.SoftDiceLoss(3, activation="softmax")
        >>> logits, labels = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 32, 32))
        >>> separate = loss(interpolate(logits, (32, 32), mode="bilinear"), labels)
        >>> torch.allclose(softdice.Upsampled(loss)(logits, labels), separate)
        True

    Source: as for `FusedHead`, the recomputation of logits after E. Wijmans et al., "Cut your losses in
    large-vocabulary language models", ICLR 2025, here with an interpolation in the place of the product.
    """

    @validation.public
    def __init__(
        self,
        loss: StatisticsLoss,
        *,
        mode: str | None = None,
        align_corners: bool = False,
        chunk_mib: float = CHUNK_MIB,
    ) -> None:
        """Raise TypeError or ValueError for arguments that do not fit; shapes are checked in a call."""
        super().__init__()
        check_loss(loss)
        if mode is not None:
            validation.choice("mode", mode, RANKS)
        if align_corners and mode == "nearest":
            validation.fail("align_corners=False with mode='nearest'", align_corners, "Leave it out.")
        validation.number("chunk_mib", chunk_mib, 0.001)
        self.loss = loss
        self.mode = mode
        self.align_corners = bool(align_corners)
        self.chunk_mib = float(chunk_mib)

    @property
    def num_classes(self) -> int:
        """The number of classes of the loss."""
        return self.loss.num_classes

    @validation.public
    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        voxel_weight: Tensor | None = None,
        *,
        voxel_map: Tensor | None = None,
        merge: Mapping[int, Sequence[int]] | None = None,
    ) -> Tensor:
        """logits (B, C, *s); target, of space *S, and the rest as in a call of the loss itself -> loss."""
        logits, size, mode = self._checked(logits, target)
        settings, counted = self.loss.merged(merge, logits)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # one number, expanded: it has the shape, dtype and device of the upsampled logits, and no memory of theirs
        outline = logits.new_zeros((), dtype=dtype).expand(*logits.shape[:2], *size)
        request = check.request(outline, target, voxel_weight, settings, self.num_classes, voxel_map)
        if len(size) == 1:  # a line is an image of one row
            logits, size, mode = logits.unsqueeze(2), (1, *size), mode.replace("linear", "bilinear")
        layer = Interpolation(logits.shape, size, mode, self.align_corners, dtype, logits.device, self.chunk_mib)
        return loss_value(self.loss, layer, request, counted, logits)

    def _checked(self, logits: Tensor, target: Tensor) -> tuple[Tensor, tuple[int, ...], str]:
        """Return the logits (B, C, *s) as a plain tensor, the spatial shape *S of target, and the mode's word.

        Raise TypeError for no tensor, a DTensor or another dtype, ValueError for shapes that do not fit the loss or the
        mode. *S may be larger or smaller than *s.
        """
        validation.are_tensors("Pass the logits first, the target second.", logits=logits, target=target)
        for value in (logits, target):
            if check.is_dtensor(value):
                advice = "Pass the local parts, to a loss with group."
                validation.fail("plain tensors", "a DTensor", advice, TypeError)
        if logits.dtype not in check.INPUT_DTYPES:
            advice = "Pass the logits first, the target second."
            validation.fail("logits of dtype float16, bfloat16, float32 or float64", logits.dtype, advice, TypeError)
        rank, C = logits.ndim - 2, self.num_classes
        mode = self.mode or BY_RANK.get(rank)
        ranks = tuple(BY_RANK) if mode is None else RANKS[mode]
        if mode is None or rank not in ranks or logits.shape[1] != C or 0 in logits.shape[2:]:
            shapes = [f"(B, {C}, {', '.join('dhw'[3 - n :])})" for n in ranks]
            advice = "Choose the mode by the number of dimensions, and num_classes by the channels, which stand second."
            expected = f"logits of shape {' or '.join(shapes)}{'' if mode is None else f' for mode={mode!r}'}"
            validation.fail(expected, tuple(logits.shape), advice)
        if target.ndim not in (rank + 1, rank + 2) or 0 in target.shape[target.ndim - rank :]:
            S = {1: "(W,)", 2: "(H, W)", 3: "(D, H, W)"}[rank]
            advice = "Labels have no channel dimension, per-class values have one channel per class."
            validation.fail(f"target (B, *S), (B, 1, *S) or (B, C, *S) with S = {S}", tuple(target.shape), advice)
        return check.without_metadata(logits), tuple(target.shape[target.ndim - rank :]), mode

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, align_corners={self.align_corners}, chunk_mib={self.chunk_mib:g}"
