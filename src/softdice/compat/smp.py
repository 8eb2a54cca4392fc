"""The losses of segmentation_models_pytorch (smp.losses), their constructors and numbers, from one pass.

`from softdice.compat import smp` in the place of `segmentation_models_pytorch.losses`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softdice import validation
from softdice.compat.common import hard, one_by_one, per_class, sums
from softdice.statistics import OverlapStatistics

BINARY_MODE = "binary"
MULTICLASS_MODE = "multiclass"
MULTILABEL_MODE = "multilabel"
MODES = (BINARY_MODE, MULTICLASS_MODE, MULTILABEL_MODE)


class _ModeLoss(nn.Module):
    """What smp's losses share: the mode, and per-class weights."""

    class_weights: Tensor | None

    @validation.public
    def __init__(self, mode: str, from_logits: bool, ignore_index: int | None, class_weights: Sequence[float] | None):
        super().__init__()
        validation.choice("mode", mode, MODES)
        if class_weights is not None and mode == BINARY_MODE:
            advice = "There is one class: leave class_weights out."
            validation.fail("no class_weights with mode='binary'", class_weights, advice)
        self.mode, self.from_logits, self.ignore_index = mode, from_logits, ignore_index
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def flat(self, y_pred: Tensor, y_true: Tensor) -> tuple[Tensor, Tensor]:
        """y_pred, y_true as the mode has them -> (B, C, V) and labels (B, V) or values (B, C, V)."""
        B, C = y_pred.shape[0], y_pred.shape[1]
        if y_true.shape[0] != B:
            got = f"{y_true.shape[0]} for {B}"
            validation.fail("as many targets as predictions", got, "Match the batches.", AssertionError)
        channels = 1 if self.mode == BINARY_MODE else C
        y_pred = y_pred.reshape(B, channels, -1)
        per_class_values = self.mode == MULTILABEL_MODE or channels == 1
        voxels = y_pred.shape[2] * (channels if per_class_values else 1)
        if y_true[:1].numel() != voxels:
            advice = "Give (N, H, W) for binary and multiclass, (N, C, H, W) for multilabel."
            validation.fail(f"target of {voxels} values per sample", tuple(y_true.shape), advice)
        if self.mode == MULTICLASS_MODE and channels == 1:
            advice = "A softmax over one channel is 1 everywhere: use mode='binary'."
            validation.fail("two channels or more with mode='multiclass'", "1", advice)
        return y_pred, y_true.reshape(B, channels, -1) if per_class_values else y_true.reshape(B, -1)

    def mean_over_classes(self, loss: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """loss (C,) -> its mean, weighted by class_weights."""
        chosen = list(range(loss.shape[0])) if classes is None else list(classes)
        if self.class_weights is None:
            return loss[chosen].mean()
        weights = self.class_weights.to(loss)[chosen]
        return (loss[chosen] * weights).sum() / weights.sum()


class _OverlapModeLoss(_ModeLoss):
    """1 - S or -ln max(S, eps) with S = (I + smooth) / max(I + alpha FP + beta FN + smooth, eps), absent classes 0."""

    @validation.public
    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None,
        log_loss: bool,
        from_logits: bool,
        smooth: float,
        ignore_index: int | None,
        eps: float,
        class_weights: Sequence[float] | None,
        alpha: float,
        beta: float,
    ) -> None:
        super().__init__(mode, from_logits, ignore_index, class_weights)
        if classes is not None and mode == BINARY_MODE:
            advice = "There is one class: leave classes out."
            validation.fail("no classes with mode='binary'", classes, advice, AssertionError)
        self.classes = None if classes is None else [int(c) for c in classes]
        self.log_loss, self.smooth, self.eps = log_loss, smooth, eps
        self.alpha, self.beta = alpha, beta

    @validation.public
    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """y_pred, y_true -> loss."""
        stats, hard_truth = self._statistics(y_pred, y_true)
        predicted, truth = stats.prediction, stats.target
        overlap = stats.intersection if hard_truth else (predicted + truth - stats.difference) / 2
        extent = overlap + self.alpha * (predicted - overlap) + self.beta * (truth - overlap) + self.smooth
        score = (overlap + self.smooth) / extent.clamp_min(self.eps)
        loss = -score.clamp_min(self.eps).log() if self.log_loss else 1 - score
        return self.mean_over_classes(loss * (truth > 0), self.classes)

    def _statistics(self, y_pred: Tensor, y_true: Tensor) -> tuple[OverlapStatistics, bool]:
        """y_pred, y_true -> pooled statistics, and whether the overlap is the product (labels) or from the norms."""
        input, target = self.flat(y_pred, y_true)
        hard_truth = self.from_logits and not target.is_floating_point()
        fields = ("prediction", "target", "intersection" if hard_truth else "difference")
        activation = "none" if not self.from_logits else "softmax" if self.mode == MULTICLASS_MODE else "sigmoid"
        if target.ndim == 2 or self.ignore_index is None:
            stats = sums(
                input,
                target,
                fields=fields,
                activation=activation,
                ignore_index=self.ignore_index if target.ndim == 2 else None,
            )
            return stats.pool(), hard_truth
        keep = target != self.ignore_index  # one channel of a voxel may count and another not
        channels = input.shape[1]
        scores, truth = one_by_one(input, torch.where(keep, target, 0))
        stats = sums(scores, truth, keep.flatten(0, 1).unsqueeze(1), fields=fields, activation=activation)
        return per_class(stats, channels).pool(), hard_truth


class DiceLoss(_OverlapModeLoss):
    """y_pred, y_true -> mean over classes of 1 - Dice (or -ln Dice), over the whole batch; an absent class costs 0.

    Args:
        as segmentation_models_pytorch.losses.DiceLoss.

    Shapes: y_pred (N, C, *S); y_true (N, *S) for binary and multiclass, (N, C, *S) for multilabel.

    Example:
        >>> loss = DiceLoss("multiclass")
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(0.1192)

    Source: segmentation_models_pytorch 0.6.0, losses/dice.py.
    """

    @validation.public
    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights, 0.5, 0.5)


class JaccardLoss(_OverlapModeLoss):
    """y_pred, y_true -> mean over classes of 1 - Jaccard (or -ln Jaccard), over the batch; an absent class costs 0.

    Args:
        as segmentation_models_pytorch.losses.JaccardLoss.

    Example:
        >>> loss = JaccardLoss("multiclass")
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(0.2130)
    """

    @validation.public
    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights, 1.0, 1.0)


class TverskyLoss(_OverlapModeLoss):
    """y_pred, y_true -> (mean over classes of 1 - Tversky)^gamma: smp takes the power after the mean.

    `softdice.FocalTverskyLoss` takes it per class, as the paper does.

    Args:
        as segmentation_models_pytorch.losses.TverskyLoss; alpha prices false positives, beta false negatives.

    Example:
        >>> loss = TverskyLoss("multiclass", alpha=0.3, beta=0.7, gamma=2.0)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(0.0142)
    """

    @validation.public
    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights, alpha, beta)
        self.gamma = gamma

    @validation.public
    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """y_pred, y_true -> loss."""
        return super().forward(y_pred, y_true) ** self.gamma


class FocalLoss(_ModeLoss):
    """y_pred, y_true -> mean focal loss; multiclass is one sigmoid per class against the rest, as in smp.

    Args:
        as segmentation_models_pytorch.losses.FocalLoss, with reduction "mean" or "sum" (others give maps of the
        voxels), without reduced_threshold (no sum over voxels holds it), with ignore_index for binary and multiclass
        (smp raises for multilabel). Targets are zeros and ones, or labels. An alpha costs a mask per channel;
        normalized needs gamma >= 1.

    Example:
        >>> loss = FocalLoss("multiclass", gamma=0.0)
        >>> loss(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]]))
        tensor(0.6931)

    Source: T.-Y. Lin et al., ICCV 2017; segmentation_models_pytorch 0.6.0, losses/focal.py.
    """

    @validation.public
    def __init__(
        self,
        mode: str,
        alpha: float | None = None,
        gamma: float = 2.0,
        ignore_index: int | None = None,
        from_logits: bool = True,
        eps: float = 1e-7,
        reduction: str = "mean",
        normalized: bool = False,
        reduced_threshold: float | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mode, from_logits, ignore_index, class_weights)
        validation.choice("reduction", reduction, ("mean", "sum"))
        if reduced_threshold is not None:
            advice = "Leave it out: it cuts voxel by voxel, which no sum over voxels holds."
            validation.fail("no reduced_threshold", reduced_threshold, advice)
        if ignore_index is not None and mode == MULTILABEL_MODE:
            advice = "smp fails for it too; use softdice.FocalLoss with voxel_weight."
            validation.fail("no ignore_index with mode='multilabel'", ignore_index, advice)
        validation.number("gamma", gamma, 1 if normalized else 0)
        self.alpha, self.gamma, self.eps = alpha, gamma, eps
        self.reduction, self.normalized = reduction, normalized

    @validation.public
    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """y_pred, y_true -> loss."""
        if not self.from_logits:
            y_pred = y_pred.clamp(self.eps, 1 - self.eps)
            y_pred = y_pred.log() if self.mode == MULTICLASS_MODE else (y_pred / (1 - y_pred)).log()
        if self.mode == BINARY_MODE:
            y_pred, y_true = y_pred.reshape(1, 1, -1), y_true.reshape(1, 1, -1)
        input, target = self.flat(y_pred, y_true)
        keep = None
        if self.ignore_index is not None and self.mode == BINARY_MODE:
            keep = target != self.ignore_index
            target = torch.where(keep, target, 0)
        hard(target)
        fields = ("focal", "difference", "voxels") if self.normalized else ("focal", "voxels")
        stats = sums(
            input,
            target,
            keep,
            fields=fields,
            activation="sigmoid",
            ignore_index=self.ignore_index if target.ndim == 2 else None,
            gamma=self.gamma,
            power=max(self.gamma, 1.0),
        ).pool()
        loss = stats.focal if self.alpha is None else self._balanced(input, target, keep)
        if self.normalized:  # (1 - p_t)^gamma of a hard label is abs(p - y)^gamma
            loss = loss / stats.difference.clamp_min(1e-6)
        if self.reduction == "mean":
            loss = loss / stats.voxels
        return self.mean_over_classes(loss)

    def _balanced(self, input: Tensor, target: Tensor, keep: Tensor | None) -> Tensor:
        """Focal sums with alpha for voxels in the class and 1 - alpha for the others, (C,)."""
        assert self.alpha is not None
        scores, truth = one_by_one(input, target)
        balance = torch.where(truth > 0, self.alpha, 1 - self.alpha)
        if target.ndim == 2 and self.ignore_index is not None:
            keep = (target != self.ignore_index).unsqueeze(1).expand(input.shape)
        if keep is not None:
            balance = balance * keep.flatten(0, 1).unsqueeze(1)
        stats = sums(scores, truth, balance, fields=("focal",), activation="sigmoid", gamma=self.gamma)
        return per_class(stats, input.shape[1]).pool().focal


class SoftCrossEntropyLoss(nn.Module):
    """y_pred, y_true -> cross-entropy with label smoothing; the mean counts ignored voxels, as in smp.

    Args:
        as segmentation_models_pytorch.losses.SoftCrossEntropyLoss, with reduction "mean" or "sum". smooth_factor None,
        its default, fails in smp; here it is 0.

    Shapes: y_pred (N, C, *S), classes in dimension `dim`; y_true (N, *S) or (N, 1, *S).

    Example:
        >>> loss = SoftCrossEntropyLoss(smooth_factor=0.0)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(0.1269)
    """

    @validation.public
    def __init__(
        self,
        reduction: str = "mean",
        smooth_factor: float | None = None,
        ignore_index: int | None = -100,
        dim: int = 1,
    ) -> None:
        super().__init__()
        validation.choice("reduction", reduction, ("mean", "sum"))
        self.reduction, self.ignore_index, self.dim = reduction, ignore_index, dim
        self.smooth_factor = 0.0 if smooth_factor is None else smooth_factor

    @validation.public
    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """y_pred, y_true -> loss."""
        y_pred = y_pred.movedim(self.dim, 1)
        if y_true.ndim == y_pred.ndim:
            y_true = y_true.movedim(self.dim, 1)
        stats = sums(
            y_pred,
            y_true,
            fields=("cross_entropy",),
            activation="softmax",
            ignore_index=self.ignore_index,
            label_smoothing=self.smooth_factor,
        )
        total = stats.cross_entropy.sum()
        return total if self.reduction == "sum" else total / y_true.numel()
