"""segmentation_models_pytorch's overlap losses, their constructors and numbers, from one pass.

Write `from softdice.compat import smp` in the place of `segmentation_models_pytorch.losses`. Each class has the
arguments of the class of that name in smp 0.6.0; its docstring says what differs.

A call raises TypeError, ValueError, or smp's AssertionError, for tensors that do not fit.
Shape suffixes: N sample, as in smp, C class, V voxel; S space, any number of axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softdice import losses, validation
from softdice.compat import common
from softdice.statistics import OverlapStatistics, check
from softdice.statistics.reference import power

BINARY_MODE = "binary"
MULTICLASS_MODE = "multiclass"
MULTILABEL_MODE = "multilabel"
MODES = (BINARY_MODE, MULTICLASS_MODE, MULTILABEL_MODE)
"""One class; classes that exclude each other (target holds labels); classes that are decided one by one."""

# --- what all of them share


def flat(mode: str, y_pred: Tensor, y_true: Tensor) -> tuple[Tensor, Tensor]:
    """Return y_pred as (N, C, V), and y_true as labels (N, 1, V) ("multiclass") or values (N, C, V).

    mode: one of `MODES`. y_pred: (N, C, *S), with "binary" (N, *S), too. y_true: labels (N, *S), or values shaped as
    y_pred. Of one channel, or of labels, y_true may lack dimensions of 1 or have them elsewhere: the order of its
    voxels is the same then.

    Raises:
        TypeError: not two tensors. AssertionError: another N (as smp). ValueError: another shape.
    """
    y_pred, y_true = common.tensors(y_pred, y_true)
    if y_true.shape[0] != y_pred.shape[0]:
        got = f"{y_true.shape[0]} for {y_pred.shape[0]}"
        validation.fail("as many targets as predictions", got, "Match the batches.", AssertionError)
    channels = 1 if mode == BINARY_MODE else y_pred.shape[1]
    labels = mode == MULTICLASS_MODE
    space = y_pred.shape[2:] if labels else y_pred.shape[1:]
    squeezed, squeezed_space = ([size for size in shape if size != 1] for shape in (y_true.shape[1:], space))
    if y_true.shape[1:] != space and (squeezed != squeezed_space or not (labels or channels == 1)):
        advice = "Give (N, H, W) for binary and multiclass, (N, C, H, W) for multilabel."
        expected = f"target of {space.numel()} values per sample, {(y_pred.shape[0], *space)}"
        validation.fail(expected, tuple(y_true.shape), advice)
    if labels and channels == 1:
        advice = "A softmax over one channel is 1 everywhere: use mode='binary'."
        validation.fail("two channels or more with mode='multiclass'", "1", advice)
    voxels = y_pred.shape[1:].numel() // channels
    return y_pred.reshape(-1, channels, voxels), y_true.reshape(-1, 1 if labels else channels, voxels)


def _with_space(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (N, C) and labels (N,) or (N, 1) as (N, C, 1) and (N, 1); those with axes of space as they are."""
    return (logits.unsqueeze(2), labels.reshape(-1, 1)) if logits.ndim == 2 else (logits, labels)


class _SmpLoss(common.DropIn):
    """A loss of smp: its mode, ignore_index, whether y_pred holds logits, and the weights of the classes, or None."""

    mode: str
    from_logits: bool
    ignore_index: int | None
    class_weights: Any

    def __post_init__(self) -> None:
        """Keep class_weights as a buffer, float32 or None.

        Raise ValueError for an unknown mode, or for class_weights with mode "binary"; AssertionError, as smp, for
        classes with it.
        """
        validation.choice("mode", self.mode, MODES)
        for name, error in (("class_weights", ValueError), ("classes", AssertionError)):
            value = getattr(self, name, None)
            if value is not None and self.mode == BINARY_MODE:
                advice = f"There is one class: leave {name} out."
                validation.fail(f"no {name} with mode='binary'", value, advice, error)
        self.hold("class_weights", self.class_weights, persistent=False)

    def without_ignored(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (target, mask): values with 0 at the ignored ones, and a mask (N, C, V), True where a value counts.

        input: (N, C, V). target: labels (N, 1, V) or values (N, C, V). Labels stay as they are, with None for the mask:
        the pass itself leaves ignore_index out.
        """
        if self.ignore_index is None or target.shape != input.shape:
            return target, None
        keep = common.unlike(target, self.ignore_index)
        return torch.where(keep, target, 0), keep

    def statistics(self, input: Tensor, target: Tensor, keep: Tensor | None, **settings: Any) -> OverlapStatistics:
        """Return the statistics of the batch, (C,), for input (N, C, V), labels (N, 1, V) or values (N, C, V).

        keep: True where a value counts, (N, C, V), or None for all. settings: keywords of `common.sums`: fields,
        activation, and settings of the pass.
        """
        ignored = self.ignore_index if target.shape != input.shape else None
        return common.sums(input, target, keep, ignore_index=ignored, **settings).pool()

    def mean_over_classes(self, loss_C: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """Return the mean, 0-d, of the losses of `classes`, class numbers (None: all), weighted by class_weights."""
        indices = list(range(loss_C.shape[0])) if classes is None else [int(c) for c in classes]
        if self.class_weights is None:
            return loss_C[indices].mean()
        weights = self.class_weights.to(loss_C)[indices]
        return (loss_C[indices] * weights).sum() / weights.sum()


# --- overlap: Dice, Jaccard, Tversky, MCC


@common.declared
class _OverlapLoss(_SmpLoss):
    """The mean over `classes` of 1 - S, or -ln max(S, eps) with log_loss; 0 for an absent class.

    S = (I + smooth) / max(I + alpha FP + beta FN + smooth, eps)
    """

    mode: str
    classes: Sequence[int] | None = None
    log_loss: bool = False
    from_logits: bool = True
    smooth: float = 0.0
    ignore_index: int | None = None
    eps: float = 1e-7

    alpha = beta = 0.5

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """y_pred (N, C, *S), y_true labels (N, *S) or values (N, C, *S) -> loss, 0-d."""
        input, target = flat(self.mode, y_pred, y_true)
        # smp's tp is (sum p + sum y - sum abs(p - y)) / 2. For hard labels and p in [0, 1] sum p y is the same number.
        soft = not self.from_logits or target.is_floating_point()
        activation = "none" if not self.from_logits else "softmax" if self.mode == MULTICLASS_MODE else "sigmoid"
        fields = common.extent_fields(soft=soft)
        stats = self.statistics(input, *self.without_ignored(input, target), fields=fields, activation=activation)
        parts = common.extents(stats, soft=soft)
        score_C = common.tversky(*parts, self.alpha, self.beta, self.smooth, self.smooth, least=self.eps)
        loss_C = -score_C.clamp_min(self.eps).log() if self.log_loss else 1 - score_C
        return self.mean_over_classes(loss_C * (stats.target > 0), self.classes)


@common.declared
class DiceLoss(_OverlapLoss):
    """y_pred, y_true -> mean over classes of 1 - Dice (or -ln Dice), over the whole batch; an absent class costs 0.

    Shapes: y_pred (N, C, *S); y_true (N, *S) for binary and multiclass, (N, C, *S) for multilabel.

    Example:
        >>> loss = DiceLoss("multiclass")
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(0.1192)
    """

    class_weights: Sequence[float] | None = None


@common.declared
class JaccardLoss(_OverlapLoss):
    """y_pred, y_true -> mean over classes of 1 - Jaccard (or -ln Jaccard), over the batch; an absent class costs 0.

    Example:
        >>> loss = JaccardLoss("multiclass")
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(0.2130)
    """

    class_weights: Sequence[float] | None = None

    alpha = beta = 1.0


@common.declared
class TverskyLoss(_OverlapLoss):
    """y_pred, y_true -> (mean over classes of 1 - Tversky)^gamma: smp takes the power after the mean.

    `softdice.FocalTverskyLoss` takes it per class, as the paper does. A loss of 0 has a gradient of 0 with gamma < 1,
    too, where smp's is nan (an empty mask, a perfect prediction).

    Example:
        >>> loss = TverskyLoss("multiclass", alpha=0.3, beta=0.7, gamma=2.0)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(0.0142)
    """

    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 1.0
    class_weights: Sequence[float] | None = None

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """y_pred (N, C, *S), y_true labels (N, *S) or values (N, C, *S) -> loss, 0-d."""
        loss = super().forward(y_pred, y_true)
        return power(loss, self.gamma)


@common.declared
class MCCLoss(common.DropIn):
    """y_pred, y_true -> 1 - MCC of a single class over the batch, eps added to each of TP, TN, FP and FN.

    Shapes: y_pred (N, 1, *S) or (N, *S), probabilities; y_true likewise.

    Example:
        >>> loss = MCCLoss()
        >>> loss(torch.tensor([[[0.9, 0.2, 0.1, 0.8]]]), torch.tensor([[[1, 0, 0, 1]]]))
        tensor(0.3000)

    Source: K. Abhishek, G. Hamarneh, "Matthews correlation coefficient loss", ISBI 2021.
    """

    eps: float = 1e-5

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """probabilities (N, 1, *S) or (N, *S), zeros and ones likewise -> loss, 0-d."""
        fields = (*common.extent_fields(), "voxels")
        stats = common.sums(*flat(BINARY_MODE, y_pred, y_true), fields=fields).pool()
        tp, prediction, target = (extent.double() for extent in common.extents(stats))  # float32 overflows in products
        fp, fn, tn = prediction - tp, target - tp, stats.voxels - prediction - target + tp
        tp, fp, fn, tn = (count.sum() + self.eps for count in (tp, fp, fn, tn))
        mcc = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).sqrt()
        return (1 - mcc).to(stats.prediction)


# --- focal and cross-entropy


@common.declared
class FocalLoss(_SmpLoss):
    """y_pred, y_true -> mean focal loss; multiclass is one sigmoid per class against the rest, as in smp.

    Args:
        as segmentation_models_pytorch.losses.FocalLoss, with reduction "mean" or "sum" (others give maps of the
        voxels), without reduced_threshold (no sum over voxels holds it), with ignore_index for binary and multiclass
        (smp raises for multilabel). Targets are zeros and ones, or labels; normalized
        needs gamma >= 1.

    Example:
        >>> loss = FocalLoss("multiclass", gamma=0.0)
        >>> loss(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]]))
        tensor(0.6931)

    Source: T.-Y. Lin et al., ICCV 2017.
    """

    mode: str
    alpha: float | None = None
    gamma: float = 2.0
    ignore_index: int | None = None
    from_logits: bool = True
    eps: float = 1e-7
    reduction: str = "mean"
    normalized: bool = False
    reduced_threshold: float | None = None
    class_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is not supported, TypeError if gamma is no number."""
        super().__post_init__()
        validation.choice("reduction", self.reduction, ("mean", "sum"))
        if self.reduced_threshold is not None:
            advice = "Leave it out: it cuts voxel by voxel, which no sum over voxels holds."
            validation.fail("no reduced_threshold", self.reduced_threshold, advice)
        if self.ignore_index is not None and self.mode == MULTILABEL_MODE:
            advice = "smp fails for it too; use softdice.FocalLoss with voxel_weight."
            validation.fail("no ignore_index with mode='multilabel'", self.ignore_index, advice)
        validation.number("gamma", self.gamma, 1 if self.normalized else 0)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """y_pred (N, C, *S), y_true labels (N, *S), or zeros and ones (N, C, *S) -> loss, 0-d."""
        input, target = flat(self.mode, y_pred, y_true)
        if not self.from_logits:  # back to logits; smp takes ln p for "multiclass"
            input = input.clamp(self.eps, 1 - self.eps)
            input = input.log() if self.mode == MULTICLASS_MODE else (input / (1 - input)).log()
        target, keep = self.without_ignored(input, target)
        if target.shape == input.shape:
            check.hard(target)
        others = ("voxels", *(("difference",) if self.normalized else ()))
        settings: dict[str, Any] = {"gamma": self.gamma, "power": max(self.gamma, 1.0)}
        if self.alpha is None:
            fields = ("focal", *others)
            stats = self.statistics(input, target, keep, fields=fields, activation="sigmoid", **settings)
        else:
            if self.ignore_index is not None and keep is None:  # `balanced` gets no ignore_index
                keep = common.unlike(target, self.ignore_index)
            sides: dict[str, Any] = {"positive": self.alpha, "negative": 1 - self.alpha, "others": others}
            stats = common.balanced(input, target, keep, field="focal", **sides, **settings).pool()
        loss_C = stats.focal
        if self.normalized:  # by the sum of (1 - p_t)^gamma, for a hard label abs(p - y)^gamma: `power` of the pass
            loss_C = loss_C / stats.difference.clamp_min(1e-6)
        if self.reduction == "mean":
            loss_C = loss_C / stats.voxels.clamp_min(1)  # 0 where no voxel counts; smp's is nan
        return self.mean_over_classes(loss_C)


@common.declared
class SoftCrossEntropyLoss(common.DropIn):
    """y_pred, y_true -> cross-entropy with label smoothing; the mean counts ignored voxels, as in smp.

    Args:
        as segmentation_models_pytorch.losses.SoftCrossEntropyLoss, with reduction "mean" or "sum". smooth_factor None,
        its default, fails in smp; here it is 0.

    Shapes: y_pred (N, C, *S) or (N, C), classes in dimension `dim`; y_true (N, *S) or (N, 1, *S).

    Example:
        >>> loss = SoftCrossEntropyLoss(smooth_factor=0.0)
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(0.1269)
    """

    reduction: str = "mean"
    smooth_factor: float | None = None
    ignore_index: int | None = -100
    dim: int = 1

    def __post_init__(self) -> None:
        validation.choice("reduction", self.reduction, ("mean", "sum"))

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """logits (N, C, *S) or (N, C), with C at `dim`; labels (N, *S), (N, 1, *S) or (N,) -> loss, 0-d."""
        y_pred, y_true = common.tensors(y_pred, y_true)
        if y_true.ndim == y_pred.ndim:
            y_true = y_true.movedim(self.dim, 1)
        y_pred, y_true = _with_space(y_pred.movedim(self.dim, 1), y_true)
        settings: dict[str, Any] = {"ignore_index": self.ignore_index, "label_smoothing": self.smooth_factor or 0.0}
        stats = common.sums(y_pred, y_true, fields=("cross_entropy",), activation="softmax", **settings)
        total = stats.cross_entropy.sum()
        return total if self.reduction == "sum" else total / max(y_true.numel(), 1)


@common.declared
class LovaszLoss(common.DropIn):
    """y_pred, y_true -> Lovasz-Softmax of the classes present, or the hinge; one class at a time.

    Args:
        as segmentation_models_pytorch.losses.LovaszLoss; from_logits concerns nothing, there as here. For "binary" and
        "multilabel" all channels are ranked together.

    Shapes: y_pred (N, C, *S) or (N, C); y_true (N, *S) labels for "multiclass", else as many values as y_pred.

    Example:
        >>> loss = LovaszLoss("multiclass")
        >>> loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]))
        tensor(0.1192)
    """

    mode: str
    per_image: bool = False
    ignore_index: int | None = None
    from_logits: bool = True

    def __post_init__(self) -> None:
        validation.choice("mode", self.mode, MODES)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """logits (N, C, *S) or (N, C); labels (N, *S) or (N,) if "multiclass", else 0 or 1 per logit -> loss, 0-d."""
        y_pred, y_true = common.tensors(y_pred, y_true)
        shared: dict[str, Any] = {"pooling": "sample" if self.per_image else "batch", "ignore_index": self.ignore_index}
        if self.mode == MULTICLASS_MODE:
            y_pred, y_true = _with_space(y_pred, y_true)
            return losses.LovaszLoss(y_pred.shape[1], activation="softmax", absent="skip", **shared)(y_pred, y_true)
        hinge = losses.LovaszLoss(1, activation="sigmoid", **shared)
        return hinge(y_pred.reshape(len(y_pred), 1, -1), y_true.reshape(len(y_pred), -1))


class SoftBCEWithLogitsLoss(common.BinaryCrossEntropyLoss):
    """y_pred, y_true -> binary cross-entropy with label smoothing; the mean counts ignored values, as in smp.

    Args:
        as segmentation_models_pytorch.losses.SoftBCEWithLogitsLoss, without weight, with reduction "mean" or "sum".
        smooth_factor s makes the targets s and 1 - s of 0 and 1.

    Shapes: y_pred (N, C, *S) or (V,); y_true of the same shape, zeros and ones, values between, or ignore_index.

    Example:
        >>> loss = SoftBCEWithLogitsLoss(smooth_factor=0.1)
        >>> loss(torch.tensor([[[2.0, -2.0]]]), torch.tensor([[[1, 0]]]))
        tensor(0.3269)
    """

    @validation.public
    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        smooth_factor: float | None = None,
        pos_weight: Tensor | None = None,
    ) -> None:
        """Raise ValueError for a weight, or a reduction that gives a map."""
        validation.choice("reduction", reduction, ("mean", "sum"))
        if weight is not None:
            validation.fail("no weight", weight, "Use pos_weight, or softdice.CrossEntropyLoss with voxel_weight.")
        super().__init__(reduction=reduction, pos_weight=pos_weight)
        self.ignore_index, self.smooth_factor = ignore_index, smooth_factor

    @validation.public
    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """logits (N, C, *S) or (V,), one value in [0, 1] or ignore_index for each -> loss, 0-d."""
        y_pred, y_true = common.tensors(y_pred, y_true)
        if y_true.shape != y_pred.shape:
            validation.fail(f"target of shape {tuple(y_pred.shape)}", tuple(y_true.shape), "Give one value per logit.")
        if y_pred.ndim == 1:  # with a pos_weight for each logit, each is a channel; else a voxel
            axes = (1, -1) if self.pos_weight is not None and self.pos_weight.numel() > 1 else (1, 1, -1)
            y_pred, y_true = y_pred.reshape(axes), y_true.reshape(axes)
        keep = None
        if self.ignore_index is not None:
            keep = common.unlike(y_true, self.ignore_index)
            y_true = torch.where(keep, y_true, 0)
        if self.smooth_factor:
            y_true = (1 - y_true) * self.smooth_factor + y_true * (1 - self.smooth_factor)
        return self.from_statistics(self.statistics(y_pred, y_true, keep), y_pred, y_true)
