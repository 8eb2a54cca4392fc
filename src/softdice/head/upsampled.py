"""logits of low resolution, target -> loss: the upsampling and the loss together, chunk by chunk.

What happens to a chunk is in `softdice.head.chunked` and `softdice.head.interpolation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from softdice import validation
from softdice.head.chunked import statistics
from softdice.head.interpolation import Interpolation
from softdice.losses.base import StatisticsLoss
from softdice.statistics import check

CHUNK_MIB = 48.0
"""Budget for the upsampled logits of the chunks under way and their gradient together: for each of eight threads eight
rows of 512 voxels and 150 classes."""

RANKS = {"bilinear": (2,), "trilinear": (3,), "nearest": (2, 3)}
"""Modes, and the spatial dimensions that each is for."""


class Upsampled(nn.Module):
    """logits of low resolution, target -> loss of the upsampled logits, without ever holding these.

        Upsampled(loss)(logits, target) = loss(interpolate(logits, size), target)

    with the same gradient, where interpolate is that of `torch.nn.functional` and size the spatial shape of target.
    Memory beside the logits and their gradient is `chunk_mib` at most, whatever the number of classes.

    Args:
        loss: any loss of this package that is a function of the statistics, or a sum of such. (The sum goes
            inside: `Upsampled(a + b)`.)
        mode: "bilinear" for images, "trilinear" for volumes, "nearest" for both.
        align_corners: as for interpolate; False with "nearest".
        chunk_mib: MiB for the upsampled logits of the chunks under way and their gradient, but at least one row of
            voxels each. Neither loss nor gradient depends on it beyond rounding.

    Shapes: logits (B, C, h, w) or (B, C, d, h, w), float16, bfloat16, float32 or float64, any strides; target and
    voxel_weight as the loss takes them for an input (B, C, *S). Any factor will do, fractional or below 1.

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
        self, loss: StatisticsLoss, *, mode: str = "bilinear", align_corners: bool = False, chunk_mib: float = CHUNK_MIB
    ) -> None:
        super().__init__()
        if not isinstance(loss, StatisticsLoss):
            advice = "Use softdice.OverlapLoss for an index of your own."
            expected = "loss to be a loss of softdice that is a function of the statistics, or a sum of such"
            validation.fail(expected, type(loss).__name__, advice, TypeError)
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
        """The loss's."""
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
        """logits, target -> loss. voxel_weight, voxel_map and merge as when the loss itself is called."""
        logits, size = self._checked(logits, target)
        settings, counted = self.loss.merged(merge, logits)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        made = Interpolation(
            logits.shape, size, self.mode, self.align_corners, dtype, logits.device, self.chunk_mib
        )  # fmt: skip
        # has the upsampled logits' shape, dtype and device, and one element of memory
        outline = logits.new_zeros((), dtype=dtype).expand(*logits.shape[:2], *size)
        request = check.request(outline, target, voxel_weight, settings, self.num_classes, voxel_map)
        stats = statistics(made, request, logits)
        if self.loss.group is not None:
            stats = stats.pool().all_reduce(self.loss.group)
        return self.loss.from_statistics(stats, counted)

    def _checked(self, logits: Tensor, target: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Logits of the right kind, and the spatial shape of target."""
        validation.are_tensors("Pass the logits first, the target second.", logits=logits, target=target)
        for value in (logits, target):
            if check.is_dtensor(value):
                advice = "Pass the local parts, to a loss with group."
                validation.fail("plain tensors", "a DTensor", advice, TypeError)
        if logits.dtype not in check.INPUT_DTYPES:
            advice = "Pass the logits first, the target second."
            validation.fail("logits of dtype float16, bfloat16, float32 or float64", logits.dtype, advice, TypeError)
        rank, C = logits.ndim - 2, self.num_classes
        if rank not in RANKS[self.mode] or logits.shape[1] != C or 0 in logits.shape[2:]:
            shapes = [f"(B, {C}, {'d, ' if n == 3 else ''}h, w)" for n in RANKS[self.mode]]
            advice = (
                "Choose the mode for the number of dimensions, and num_classes for the channels, which stand second."
            )
            expected = f"logits of shape {' or '.join(shapes)} for mode={self.mode!r}"
            validation.fail(expected, tuple(logits.shape), advice)
        if target.ndim not in (rank + 1, rank + 2) or 0 in target.shape[target.ndim - rank :]:
            S = "(D, H, W)" if rank == 3 else "(H, W)"
            advice = "Labels have no channel dimension, per-class values have one channel per class."
            validation.fail(f"target (B, *S), (B, 1, *S) or (B, C, *S) with S = {S}", tuple(target.shape), advice)
        return check.without_metadata(logits), tuple(target.shape[target.ndim - rank :])

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, align_corners={self.align_corners}, chunk_mib={self.chunk_mib:g}"
