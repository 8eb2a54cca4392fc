"""torchmetrics classes that average scores of surfaces over cases, and their common part with those of lesions.

The state is a few int64 numbers per class: how many cases had a score, and the exact sum of their scores in fixed
point, as in `streaming`. Neither the order of the cases nor their split over ranks changes a bit of the result.

B is a case, K a class that is scored, S the 2 or 3 axes of an image.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from softdice import validation
from softdice.metrics import distances, surfaces
from softdice.metrics.counting import as_tensor
from softdice.metrics.distances import Compare
from softdice.metrics.streaming import (
    IntegerStates,
    check_channels,
    fixed_point_sum,
    from_fixed_point,
    largest_class,
    without_channel,
)
from softdice.metrics.surfaces import Definition, Direction, SurfaceDistances

Average = Literal["macro", "none"]


class CaseMetric(IntegerStates):
    """input, target, case by case -> the mean of a score of label maps over the cases; the base class of the metrics of
    surfaces and of lesions.

    Args:
        num_classes: C. With C = 1 label maps are masks and their one class is 1.
        spacing: size of a voxel along each axis, one number for all, or None for 1; `update` may get another one.
        average: over the classes. "macro": the mean of the class means, nan skipped; "none": one score per class.
        classes: the classes that count, None for all; `range(1, C)` leaves the background out.
        ignore_index: voxels where target has this label are in no class; that class is not scored.
        keep_scores: keep the score of each case and class for `sample_scores()`.

    `update(input, target, spacing=None)`: input (B, *S) integer labels, or (B, C, *S) floats, which are decided by
    their argmax; target (B, *S) or (B, 1, *S) integer labels. `compute()`: 0-d float64, for "none" (C,) or one per
    entry of `classes`. nan where no case had the class.

    Raises:
        ValueError: shapes that do not belong together, labels out of range, unknown words. TypeError: wrong types.
    """

    averages = ("macro", "none")
    penalty = math.inf
    """Score that replaces an infinite one: a class that only one of the maps of a case has."""

    score_sum: Tensor
    """Sum of the finite scores, (2, K) int64, see `fixed_point_sum`."""
    cases: Tensor
    """How many cases have a score that is not nan, (K,) int64."""
    infinite: Tensor
    """How many of these scores are infinite, (K,) int64."""
    compare: Compare
    """Compares the two masks of a class; `score` turns what it returns into a number."""

    @validation.public
    def __init__(
        self,
        num_classes: int,
        *,
        spacing: float | Sequence[float] | None = None,
        average: Average = "macro",
        classes: Sequence[int] | None = None,
        ignore_index: int | None = None,
        **kwargs: Any,  # those of `IntegerStates`
    ) -> None:
        super().__init__(average, ignore_index, **kwargs)
        self.num_classes, self.columns = num_classes, len(distances.scored(num_classes, classes))
        self.classes, self.spacing = None if classes is None else tuple(classes), validation.numbers_of(spacing)
        # sum of the finite scores in fixed point; how many scores are not nan; how many of these are inf
        for name, shape in (("score_sum", (2, self.columns)), ("cases", self.columns), ("infinite", self.columns)):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _add_settings(self, *settings: object) -> None:
        """Add the state `settings` of `IntegerStates`, from the settings of a subclass and the common ones."""
        common = (type(self).__qualname__, self.classes, self.ignore_index, self.spacing, self.keep_scores)
        super()._add_settings(*common, settings)

    @abstractmethod
    def score(self, comparison: Any, k: int) -> float:
        """Return the score of the k-th of the K classes in one case; `comparison` is what `compare` returned for it."""

    @validation.public
    def update(self, input: Tensor, target: Tensor, spacing: float | Sequence[float] | None = None) -> None:
        """Score a batch of labels (B, *S), or floats (B, C, *S) as input, and add it to the state.

        `spacing` is the spacing of all images of the batch; None for the metric's own. `penalty`, inf unless a subclass
        sets a number or nan, replaces an infinite score. Errors: see the class.
        """
        input, target = self._as_labels(input, target)
        validation.same_device(self.cases.device, "metric", input=input)
        score_BK = self.measure(input, target, self.spacing if spacing is None else spacing)
        score_BK = torch.where(score_BK.isinf(), self.penalty, score_BK)
        if self.keep_scores:
            self.kept.append(score_BK)
        self.cases += (~score_BK.isnan()).sum(0)
        self.infinite += score_BK.isinf().sum(0)
        self.score_sum = fixed_point_sum(self.score_sum, torch.nan_to_num(score_BK, 0.0, posinf=0.0))

    def measure(self, input: Tensor, target: Tensor, spacing: float | Sequence[float] | None) -> Tensor:
        """Return the score of each case and class, (B, K) float64, of two label maps (B, *S), which it checks."""
        options = (self.num_classes, spacing, self.compare, self.classes, self.ignore_index)
        return distances.measure(input, target, [self.score], *options)[0]

    def compute(self) -> Tensor:
        """Return the mean over all cases seen since the last reset, float64: (K,) for average="none", else 0-d."""
        value = from_fixed_point(self.score_sum) / self.cases  # 0 / 0 = nan if no case had the class
        value = torch.where(self.infinite > 0, math.inf, value)
        return value if self.average == "none" else value.nanmean()

    def _as_labels(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a user passed to `update` as label maps (B, *S), from floats (B, C, *S) by their argmax.

        Raises:
            TypeError: no Tensors. ValueError: floats with another number of channels, or a NaN at a voxel that counts.
                `measure` checks the rest.
        """
        input, target = as_tensor(input), as_tensor(target)
        validation.are_tensors(input=input, target=target)
        if input.is_floating_point() and self.num_classes > 1:
            check_channels(input, self.num_classes)
            input = largest_class(input, target, self.ignore_index)
        return without_channel(input, target)


class SurfaceMetric(CaseMetric):
    """input, target, case by case -> the mean of a surface score over the cases; the base class of those below.

    Args:
        definition: what the boundary is: the "voxels" of a class with a neighbour outside, or the elements of its
            "surface", weighted by their area.
        penalty: the distance of a class that only one of the two maps of a case has. inf: then the mean is inf, too; a
            number, such as the diagonal of the image; nan leaves such cases out. The surface Dice is 0 there.

    The others: `CaseMetric`.
    """

    higher_is_better: bool | None = False

    @validation.public
    def __init__(
        self, num_classes: int, *, definition: Definition = "voxels", penalty: float = math.inf, **options: Any
    ) -> None:
        super().__init__(num_classes, **options)
        penalty = validation.numbers_of(penalty)
        if not (isinstance(penalty, float) and (penalty == math.inf or math.isnan(penalty))):
            validation.number("penalty", penalty, 0)
        self.definition, self.penalty, self.compare = definition, penalty, surfaces.between(definition)

    def _add_settings(self, *settings: object) -> None:
        super()._add_settings(self.definition, self.penalty, *settings)


class HausdorffDistance(SurfaceMetric):
    """input, target, case by case -> the mean Hausdorff distance, or a percentile of it, in the unit of spacing.

    Args:
        percentile: None for the maximum, 95 for HD95.
        direction: "symmetric", or the distances "from_input" to the target or "from_target" to the input only.
        options: the keywords of `SurfaceMetric` and `CaseMetric`, such as definition, penalty and spacing.

    Example:
        >>> metric = HausdorffDistance(num_classes=1, spacing=2.0)
        >>> metric.update(torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 0]]]), torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 0]]]))
        >>> metric.update(torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 0]]]), torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0]]]))
        >>> metric.compute()
        tensor(3., dtype=torch.float64)

    Source: D. P. Huttenlocher et al., IEEE TPAMI 15, 1993.
    """

    @validation.public
    def __init__(
        self,
        num_classes: int,
        *,
        percentile: float | None = None,
        direction: Direction = "symmetric",
        **options: Any,  # those of `SurfaceMetric`
    ) -> None:
        super().__init__(num_classes, **options)
        validation.choice("direction", direction, surfaces.DIRECTIONS)
        self.percentile, self.direction = distances.checked_percentile(percentile), direction
        self._add_settings(self.percentile, direction)  # or a MetricCollection would share states of other settings

    def score(self, comparison: SurfaceDistances, k: int) -> float:
        """Return the score of the k-th class of one case, see `CaseMetric.score`."""
        return surfaces.hausdorff(comparison, self.percentile, self.direction)


class AverageSurfaceDistance(SurfaceMetric):
    """input, target, case by case -> the mean of the average surface distance, in the unit of spacing.

    Args:
        direction: "symmetric", or the distances "from_input" to the target or "from_target" to the input only.
        options: the keywords of `SurfaceMetric` and `CaseMetric`, such as definition, penalty and spacing.

    Example:
        >>> metric = AverageSurfaceDistance(num_classes=1)
        >>> metric(torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 0]]]), torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 0]]]))
        tensor(0.7500, dtype=torch.float64)

    Source: T. Heimann et al., IEEE Transactions on Medical Imaging 28, 2009.
    """

    @validation.public
    def __init__(self, num_classes: int, *, direction: Direction = "symmetric", **options: Any) -> None:
        super().__init__(num_classes, **options)
        validation.choice("direction", direction, surfaces.DIRECTIONS)
        self.direction = direction
        self._add_settings(direction)

    def score(self, comparison: SurfaceDistances, k: int) -> float:
        """Return the score of the k-th class of one case, see `CaseMetric.score`."""
        return surfaces.average(comparison, self.direction)


class SurfaceDice(SurfaceMetric):
    """input, target, case by case -> the mean surface Dice at a tolerance (NSD), in [0, 1].

    Args:
        tolerance: 0 or more, in the unit of spacing; one number, or one for each class that counts.
        options: the keywords of `SurfaceMetric` and `CaseMetric`, such as definition and spacing.

    Example:
        >>> metric = SurfaceDice(num_classes=1, tolerance=1.0)
        >>> metric(torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 0]]]), torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 0]]]))
        tensor(0.7500, dtype=torch.float64)

    Source: S. Nikolov et al., J. Medical Internet Research 23, 2021.
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    @validation.public
    def __init__(self, num_classes: int, *, tolerance: float | Sequence[float], **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.tolerance = distances.each_class("tolerance", tolerance, self.columns)
        self._add_settings(self.tolerance)

    def score(self, comparison: SurfaceDistances, k: int) -> float:
        """Return the score of the k-th class of one case, see `CaseMetric.score`."""
        return surfaces.surface_overlap(comparison, self.tolerance[k])
