"""torchmetrics classes that count voxels batch by batch and score everything that was seen.

The state is a few int64 numbers per class, however many batches there are: voxel counts, and for `pooling="sample"`
the exact sum of the scores of the samples in fixed point. Integers add without rounding, so that neither the order of
the batches nor their split over ranks changes a bit of the result. A sync gathers a few hundred numbers, once.

B is a sample, C a class (in states and scores only the classes that count, or the one column of a "micro" average), S
the axes of an image. Counts are (3, ...) int64: voxels of both, of the prediction, of the target, see `formulas`.

Needs torchmetrics (`pip install 'softdice[metrics]'`); `softdice.dice_score` does not.
"""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial, wraps
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from softdice import validation
from softdice.metrics import counting
from softdice.metrics import formulas as scores
from softdice.metrics.counting import as_tensor

FRACTION_BITS = 48
"""Bits after the point in the sum of sample scores; each score is rounded once, by at most 2^-49."""

SAMPLES_PER_CARRY = 1 << 14
"""Samples whose fractions are added before the carry: their sum stays below 2^63."""

Average = Literal["macro", "micro", "weighted", "none"]
Pooling = Literal["all", "sample"]


def fixed_point_sum(total: Tensor, score_BC: Tensor) -> Tensor:
    """Return the sum in fixed point after finite scores (B, C) float64 of either sign are added to it.

    `total` is (2, C) int64: the whole part, and the fraction in [0, 1) in units of 2^-FRACTION_BITS.
    """
    for chunk_BC in score_BC.split(SAMPLES_PER_CARRY):  # so few fractions that their sum stays below 2^63
        whole_BC = chunk_BC.floor()
        fraction_BC = ((chunk_BC - whole_BC) * 2.0**FRACTION_BITS).round()
        total = total + torch.stack([whole_BC.long().sum(0), fraction_BC.long().sum(0)])
        carry = total[1] >> FRACTION_BITS
        total = torch.stack([total[0] + carry, total[1] - (carry << FRACTION_BITS)])
    return total


def from_fixed_point(total: Tensor) -> Tensor:
    """Return a sum of `fixed_point_sum`, (2, C) int64, as (C,) float64."""
    return total[0].double() + total[1].double() / 2.0**FRACTION_BITS


class IntegerStates(Metric):
    """Base class of metrics whose states are integers, and which return one score per class with `average="none"`.

    Args:
        average: over the classes, one of `averages`. ignore_index: label of the voxels that are left out.
        keep_scores: keep the scores of each sample, 8 bytes per sample and class, for `sample_scores`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = True
    plot_lower_bound = 0.0

    num_classes: int
    averages: ClassVar[tuple[str, ...]]
    columns: int
    """How many scores a sample has."""
    kept: Any
    """Scores (B, columns) of each batch, a list of Tensors; after a sync one Tensor."""
    settings: Tensor
    """Checksum of the settings, see `_add_settings`."""

    def __init__(self, average: str, ignore_index: int | None, *, keep_scores: bool = False, **kwargs: Any) -> None:
        """Check and keep the settings that all metrics have; `kwargs` are those of `torchmetrics.Metric`."""
        super().__init__(**kwargs)
        validation.choice("average", average, self.averages)
        counting.check_ignore_index(ignore_index)
        self.average, self.ignore_index, self.keep_scores = average, ignore_index, keep_scores
        if keep_scores:
            self.add_state("kept", [], dist_reduce_fx="cat")

    def _add_settings(self, *settings: object) -> None:
        """Add a state that differs between metrics with other settings; a subclass calls it once, with all of them.

        MetricCollection shares one state between metrics whose states agree after the first batch.
        """
        self.add_state("settings", torch.tensor(zlib.crc32(repr(settings).encode())), dist_reduce_fx="max")

    def sample_scores(self) -> Tensor:
        """Return the scores of the samples that this process has seen since the last reset, in their order.

        Returns:
            (N, C), or one column per entry of `classes`; float64. nan and inf as the functions of `softdice.metrics`
            return them; if the metric has a penalty, it replaces inf.

        Raises:
            ValueError: the metric was made without `keep_scores=True`.
        """
        if not self.keep_scores:
            advice = f"Pass keep_scores=True to {type(self).__name__}; with pooling='all' there are none."
            validation.fail("a metric that keeps its scores", "keep_scores=False", advice)
        kept = [self.kept] if isinstance(self.kept, Tensor) else self.kept
        return torch.cat(kept) if kept else torch.zeros(0, self.columns, dtype=torch.float64, device=self.device)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Return figure and axes of a value, or of a sequence of values, as torchmetrics draws them (matplotlib).

        Args:
            val: what `compute` or `forward` returned, or a list of such values; None for `compute()`. ax: axes.
        """
        return self._plot(val, ax)

    def extra_repr(self) -> str:
        """Return the settings that differ from their defaults, such as "num_classes=3, ignore_index=255".

        Settings are the keyword-only arguments of every class up to `IntegerStates`, kept as attributes of that name.
        """
        classes = [cls for cls in type(self).__mro__ if issubclass(cls, IntegerStates) and "__init__" in vars(cls)]
        shown = {}
        for cls in classes[::-1]:
            for name, parameter in signature(cls.__init__).parameters.items():
                value = getattr(self, name, None)
                if parameter.kind == parameter.KEYWORD_ONLY and repr(value) != repr(parameter.default):
                    shown[name] = value
        if shown.get("classes") == tuple(range(self.num_classes)):
            del shown["classes"]
        return ", ".join(f"{name}={value!r}" for name, value in {"num_classes": self.num_classes, **shown}.items())

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Move states and their defaults as torchmetrics does, but keep the dtype, which `set_dtype` would change.

        `fn` moves or casts a Tensor, as in `torch.nn.Module._apply`, which torch calls for `.to`, `.half` and the like.
        """
        before = {name: (default, getattr(self, name)) for name, default in self._defaults.items()}
        super()._apply(fn, exclude_state)
        for name, (default, state) in before.items():
            self._defaults[name] = _uncast(default, self._defaults[name])
            setattr(self, name, _uncast(state, getattr(self, name)))
        return self

    def _wrap_compute(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap `compute` as torchmetrics does, and restore the axis (C,) of a single class, which it drops."""
        wrapped = super()._wrap_compute(compute)

        @wraps(compute)
        def with_axis(*args: Any, **keywords: Any) -> Tensor:
            value = wrapped(*args, **keywords)
            return value.reshape(-1) if self.average == "none" else value

        return with_axis


def check_channels(input: Tensor, num_classes: int) -> None:
    """Raise ValueError unless the input has the shape (B, C, *S) with C = num_classes."""
    if input.dim() < 2 or input.shape[1] != num_classes:
        advice = "Set num_classes to the number of channels."
        validation.fail(f"input of shape (B, {num_classes}, *S)", tuple(input.shape), advice)


def check_nan(values: Tensor, target: Tensor, ignore_index: int | None) -> None:
    """Raise ValueError for a NaN where a voxel counts: an argmax would take it for a class, a threshold for outside.

    values: of classes (B, C, *S), or the largest of them (B, 1, *S). target: labels, or masks (B, C, *S); one that does
    not fit, or is of floats or on another device, passes, for the check that says so.
    """
    B, S = len(values), values.shape[2:]
    fits = target.shape == values.shape or tuple(target.shape) in ((B, *S), (B, 1, *S))
    if not fits or target.is_floating_point() or target.device != values.device:
        return
    nan = values.isnan()
    deferred = nan.is_cuda or nan.is_meta  # their values cannot be read here
    if not (deferred or nan.any()):
        return
    if ignore_index is not None:
        left_out = counting.ignored(target, ignore_index)
        nan = nan & ~(left_out if target.shape == values.shape else left_out.reshape(B, 1, *S))
    expected, advice = "input without nan", "A network that has diverged has no score; ignored voxels may hold nan."
    if deferred:
        torch._assert_async(~nan.any(), validation.message(expected, "nan", advice))
    elif nan.any():
        validation.fail(expected, f"nan ({int(nan.sum())} values)", advice)


def largest_class(input: Tensor, target: Tensor, ignore_index: int | None) -> Tensor:
    """Return the class of the largest value, (B, *S), of logits or probabilities (B, C, *S); refuse NaN as `check_nan`.

    One pass gives both; among equal values the first counts.
    """
    largest, labels = input.max(1)
    check_nan(largest.unsqueeze(1), target, ignore_index)
    return labels


def without_channel(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return two label maps as (B, *S) if one of them is (B, 1, *S) and the other (B, *S); else both as they are."""
    if input.shape[1:2] == (1,) and input.dim() > 2 and target.dim() == input.dim() - 1:
        input = input.squeeze(1)
    elif target.shape[1:2] == (1,) and target.dim() == input.dim() + 1:
        target = target.squeeze(1)
    return input, target


def _uncast(before: Any, after: Any) -> Any:
    """Return a state after a move to another device or dtype, with the dtype that it had before.

    `before` and `after` are Tensors, or lists of them of one length.
    """
    if isinstance(before, list):
        return [_uncast(*pair) for pair in zip(before, after, strict=True)]
    return after if after.dtype == before.dtype else before.to(after.device)


class OverlapMetric(IntegerStates):
    """input, target, batch by batch -> a score of everything seen; the base class of the metrics below.

    Args:
        num_classes: C. With C = 1 label maps are masks and their one class is 1.
        average: over the classes. "macro": plain mean, nan skipped; "weighted": by target volume; "micro": counts of
            all classes are added first; "none": one score per class.
        pooling: "all": counts of all samples are added before the score, one score of the whole data set; "sample":
            the mean over the samples of each sample's score, nan (class in neither map) skipped, as nnU-Net reports it.
        classes: the classes that count, None for all; `range(1, C)` leaves the background out.
        ignore_index: voxels where target has this label are left out, whatever the class; a class with this number is
            not scored: nan for "none", and left out of the means. Per-class masks of several classes mark a voxel that
            a class leaves out by this value, which must not be 0 or 1.
        threshold: None if classes exclude each other: the argmax of floating input is the label. A number if they may
            overlap: a voxel is in each class where `input > threshold`: 0.5 for probabilities, 0.0 for logits.
        keep_scores: keep the score of each sample and class for `sample_scores()`; needs pooling="sample".

    `update(input, target)`: input (B, *S) integer labels, or (B, C, *S) floats (with a threshold also per-class masks);
    target (B, *S) or (B, 1, *S) integer labels, with a threshold also (B, C, *S) masks. Input and target that are both
    one-hot (B, C, *S) are taken as that. `compute()`: 0-d float64, for "none" (C,) or one per entry of `classes`. nan
    where there was nothing to score.

    Raises:
        ValueError: shapes that do not belong together, labels out of range, nan where a voxel counts, unknown words.
        TypeError: wrong types.
    """

    averages = ("macro", "micro", "weighted", "none")
    plot_upper_bound = 1.0

    counts: Tensor
    """Counts (3, C) of all samples."""
    score_sum: Tensor
    """Sum of the scores of samples, (2, C) int64, see `fixed_point_sum`; with pooling="sample" only."""
    samples: Tensor
    """How many samples have a score that is not nan, (C,) int64; with pooling="sample" only."""

    @validation.public
    def __init__(
        self,
        num_classes: int,
        *,
        average: Average = "macro",
        pooling: Pooling = "all",
        classes: Sequence[int] | None = None,
        ignore_index: int | None = None,
        threshold: float | None = None,
        **kwargs: Any,  # those of `IntegerStates`
    ) -> None:
        super().__init__(average, ignore_index, **kwargs)
        self.num_classes = validation.num_classes(num_classes)
        validation.choice("pooling", pooling, ("all", "sample"))
        threshold = validation.numbers_of(threshold)
        if isinstance(threshold, float) and not math.isfinite(threshold):
            advice = "Pass 0.5 for probabilities, 0.0 for logits."
            validation.fail("threshold to be a finite number", repr(threshold), advice)
        if threshold is not None:
            validation.number("threshold", threshold, -math.inf)
        if self.keep_scores and pooling != "sample":
            advice = "Pass pooling='sample' too: with 'all' no sample has a score of its own."
            validation.fail("keep_scores with pooling='sample'", f"pooling={pooling!r}", advice)
        self.classes = (
            tuple(range(num_classes)) if classes is None else validation.class_numbers("classes", classes, num_classes)
        )
        self.pooling, self.threshold = pooling, threshold
        self.columns = 1 if average == "micro" else len(self.classes)
        self.add_state("counts", torch.zeros(3, len(self.classes), dtype=torch.int64), dist_reduce_fx="sum")
        settings_of_counts = self.classes, ignore_index, threshold, pooling
        if pooling == "all":  # metrics that count alike share their state, whatever score is made of the counts
            self._add_settings(settings_of_counts)
        else:
            self._add_settings(settings_of_counts, type(self).__qualname__, average == "micro", self.keep_scores)
            self.add_state("score_sum", torch.zeros(2, self.columns, dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state("samples", torch.zeros(self.columns, dtype=torch.int64), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def score(counts: Tensor) -> Tensor:
        """Return the score of counts (3, ...), (...) float64; the subclasses differ in this alone."""

    @validation.public
    def update(self, input: Tensor, target: Tensor) -> None:
        """Add the voxel counts of a batch to the state, and with pooling="sample" the score of each sample.

        Input is labels (B, *S), floats (B, C, *S), or with a threshold masks (B, C, *S). Target is labels (B, *S) or
        (B, 1, *S), or with a threshold masks (B, C, *S). Raise ValueError or TypeError for anything else.
        """
        count, input, target = self._as_labels(input, target)
        validation.same_device(self.counts.device, "metric", input=input, target=target)
        if len(input) == 0:
            return
        counts_3BC = torch.stack([count(i, t) for i, t in zip(input, target, strict=True)], 1)
        counts_3BC = counts_3BC[:, :, list(self.classes)]
        self.counts += counts_3BC.sum(1)
        if self.pooling == "sample":
            score_BC = self.score(counts_3BC.sum(2, keepdim=True) if self.average == "micro" else counts_3BC)
            if self.keep_scores:
                self.kept.append(score_BC)
            self.samples += (~score_BC.isnan()).sum(0)
            self.score_sum = fixed_point_sum(self.score_sum, score_BC.nan_to_num(0.0))

    def compute(self) -> Tensor:
        """Return the score of everything seen since the last reset, float64: (C,) for average="none", else 0-d."""
        if self.pooling == "sample":
            value = from_fixed_point(self.score_sum) / self.samples  # 0 / 0 = nan if no sample had a score
        else:
            value = self.score(self.counts.sum(1, keepdim=True) if self.average == "micro" else self.counts)
        if self.average == "none":
            return value
        if self.average == "weighted":
            weight = self.counts[2].double()
            return torch.where(weight > 0, value * weight, 0.0).sum() / weight.sum()  # an absent class may be nan
        return value.nanmean()

    def _as_labels(self, input: Tensor, target: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
        """Check what a user passed to `update`, and turn floats into labels by argmax, or into masks by threshold.

        Raise TypeError for no Tensors, ValueError for shapes that do not belong together or a missing threshold.

        Returns:
            count: function from input and target of one sample to its counts of voxels, (3, C) int64.
            input, target: a sample per row; label maps (B, *S), or with a threshold masks (B, C, *S); bool or integers.
        """
        C = self.num_classes
        input, target = as_tensor(input), as_tensor(target)
        validation.are_tensors(input=input, target=target)
        if self.threshold is None and not input.is_floating_point():
            return self._count_labels, *self._label_maps(input, target)
        check_channels(input, C)
        B, S = input.shape[0], tuple(input.shape[2:])
        shapes = [(B, *S), (B, 1, *S)] + ([(B, C, *S)] if self.threshold is not None and C > 1 else [])
        if tuple(target.shape) not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            advice = "Pass label maps; per-class masks need a threshold."
            validation.fail(f"target of shape {wanted}", tuple(target.shape), advice)
        if self.threshold is not None:
            masks = input
            if input.is_floating_point():
                scored = slice(None) if self.classes is None else list(self.classes)
                check_nan(
                    input[:, scored], target[:, scored] if target.shape == input.shape else target, self.ignore_index
                )
                masks = input > self.threshold
            target, void, unscored = self._target_masks(target, tuple(masks.shape))
            return partial(_mask_counts, void=void, unscored=unscored), masks, target
        if C == 1:
            advice = "Pass threshold=0.5 for probabilities, threshold=0.0 for logits."
            validation.fail("a threshold for floating input of one class", "None", advice)
        return self._count_labels, largest_class(input, target, self.ignore_index), target.reshape(B, *S)

    def _label_maps(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return integer labels, (B, *S), (B, 1, *S) or one-hot (B, C, *S), as label maps (B, *S) of one shape.

        The caller has sent logits, and masks with a threshold, elsewhere. Raise ValueError for maps of different
        shapes, and for masks of classes that overlap.
        """
        input, target = without_channel(input, target)
        if input.shape != target.shape or input.dim() == 0:
            advice = "Pass label maps of one shape (B, *S), or floats (B, C, *S) as input."
            validation.fail(f"target of shape {tuple(input.shape)}", tuple(target.shape), advice)
        return counting.label_maps(input, target, self.num_classes, self.ignore_index)

    def _count_labels(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the counts (3, C) of the label maps (*S) of one sample."""
        return scores.mask_counts(input, target, self.num_classes, self.ignore_index)

    def _target_masks(self, target: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int | None, int | None]:
        """Return a target as masks (B, C, *S), and what in them is left out.

        Args:
            target: label map (B, *S) or (B, 1, *S), or masks (B, C, *S); the caller has checked its shape.
            shape: of the masks, (B, C, *S).

        Returns:
            masks: integers: 1 inside the class, 0 outside, `void` where the voxel does not count.
            void: that third value; None if all voxels count.
            unscored: `ignore_index` of a label map, which is not scored where it is a class; None for masks.

        Raises:
            ValueError: a label outside [0, C), or an ignore_index of 0 or 1 with masks of several classes.
        """
        B, C, *S = shape
        if C == 1 or tuple(target.shape) == shape:
            if C > 1 and self.ignore_index in (0, 1):
                advice = "Write another number, such as 255, into the masks where a voxel is to be left out."
                validation.fail("an ignore_index that is no value of a mask", self.ignore_index, advice)
            return target.reshape(shape), self.ignore_index, None
        labels, void = target.reshape(B, 1, *S), 2
        left_out = counting.ignored(labels, self.ignore_index)
        counting.check_labels("target", labels, C, self.ignore_index, left_out)
        numbers = torch.arange(C, device=target.device).reshape(1, C, *[1] * len(S))
        masks = (labels.to(torch.int64) == numbers).to(torch.uint8)
        return masks.masked_fill(left_out, void), void, self.ignore_index


def _mask_counts(input: Tensor, target: Tensor, void: int | None, unscored: int | None) -> Tensor:
    """Return the counts (3, C) of the masks (C, *S) of one sample.

    Voxels where the target is `void` are not counted; the class `unscored` has counts of 0. Either may be None.
    """
    counts = [scores.mask_counts(i, t, 1, void) for i, t in zip(input, target, strict=True)]
    return torch.cat([torch.zeros_like(n) if c == unscored else n for c, n in enumerate(counts)], 1)


class DiceScore(OverlapMetric):
    """input, target, batch by batch -> the Dice coefficient, 2 both / (prediction + target), in [0, 1].

    Arguments: see `OverlapMetric`.

    Example:
        >>> metric = DiceScore(num_classes=2, average="none")
        >>> metric.update(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]))
        >>> metric.update(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 0, 1]]))
        >>> metric.compute()
        tensor([0.8889, 0.8571], dtype=torch.float64)

    Source: L. R. Dice, Ecology 26, 1945.
    """

    score = staticmethod(scores.dice)


class JaccardScore(OverlapMetric):
    """input, target, batch by batch -> intersection over union, both / (prediction + target - both), in [0, 1].

    Arguments: see `OverlapMetric`. Source: P. Jaccard, New Phytologist 11, 1912.

    Example:
        >>> metric = JaccardScore(num_classes=2, average="none")
        >>> metric(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]))
        tensor([0.5000, 0.6667], dtype=torch.float64)
    """

    score = staticmethod(scores.jaccard)


class PrecisionScore(OverlapMetric):
    """input, target, batch by batch -> precision, both / prediction, in [0, 1].

    Arguments: see `OverlapMetric`. 0 where nothing was predicted of a class that the target has.

    Example:
        >>> PrecisionScore(num_classes=2, average="none")(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]))
        tensor([1.0000, 0.6667], dtype=torch.float64)
    """

    score = staticmethod(scores.precision)


class RecallScore(OverlapMetric):
    """input, target, batch by batch -> recall (sensitivity), both / target, in [0, 1].

    Arguments: see `OverlapMetric`. 0 where a class was predicted that the target lacks.

    Example:
        >>> RecallScore(num_classes=2, average="none")(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    score = staticmethod(scores.recall)


class VolumeDifference(OverlapMetric):
    """input, target, batch by batch -> 2 (prediction - target) / (prediction + target), in [-2, 2], 0 is best.

    Arguments: see `OverlapMetric`. Above 0: too much was predicted.

    Example:
        >>> VolumeDifference(num_classes=2, average="none")(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]))
        tensor([-0.6667,  0.4000], dtype=torch.float64)
    """

    higher_is_better = None
    plot_lower_bound = -2.0
    plot_upper_bound = 2.0
    score = staticmethod(scores.volume_difference)
