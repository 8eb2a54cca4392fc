"""torchmetrics classes that average scores of lesions and of centre lines over cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from softdice import validation
from softdice.metrics import lesions
from softdice.metrics.lesions import Challenge, Lesions, Neighbours, Objects, Quality, Reach, Rule
from softdice.metrics.surface_streaming import CaseMetric


class _LesionMetric(CaseMetric):
    """The base class of the scores of lesions; `rule` says what a lesion is, and which lesions match."""

    rule: Rule
    matching = property(lambda self: self.rule.matching)
    reach = property(lambda self: self.rule.reach)
    neighbours = property(lambda self: self.rule.neighbours)
    objects = property(lambda self: self.rule.objects)

    def measure(self, input: Tensor, target: Tensor, spacing: float | Sequence[float] | None) -> Tensor:
        """Return the score of each case and class, (B, K) float64, of two label maps (B, *S), which it checks."""
        options = (self.num_classes, spacing, self.classes, self.ignore_index)
        return self.rule.measure(input, target, [self.score], *options)[0]


class LesionDice(_LesionMetric):
    """input, target, case by case -> the mean of the lesion Dice, in [0, 1].

    Args:
        matching: IoU above which a lesion of the input and one of the target match, or a task of BraTS 2023 by name.
        reach: "above", or "at_least": lesions with an IoU of `matching` match, too.
        neighbours: voxels of a lesion touch by their "corners" or "faces".
        objects: a lesion is one of the "components" of a class, or, with num_classes=1, one of the "numbers" above 0.
        options: the keywords of `CaseMetric`: spacing, average, classes, ignore_index, keep_scores.

    Example:
        >>> import torch
        >>> metric = LesionDice(num_classes=1)
        >>> metric.update(torch.tensor([[[1, 1, 0, 0, 0, 1]] * 2]), torch.tensor([[[1, 1, 1, 0, 0, 0]] * 2]))
        >>> metric.update(torch.tensor([[[1, 1, 0]] * 2]), torch.tensor([[[1, 1, 0]] * 2]))
        >>> metric.compute()
        tensor(0.7000, dtype=torch.float64)

    Source: R. Saluja et al., "BraTS 2023 lesion-wise performance metrics for segmentation challenges", 2023.
    """

    plot_upper_bound = 1.0

    @validation.public
    def __init__(
        self,
        num_classes: int,
        *,
        matching: float | Challenge = 0.5,
        reach: Reach = "above",
        neighbours: Neighbours = "corners",
        objects: Objects = "components",
        **options: Any,  # those of `CaseMetric`
    ) -> None:
        super().__init__(num_classes, **options)
        self.rule = Rule(matching, reach, neighbours, objects)
        self._add_settings(self.rule)  # or a MetricCollection would share states of other settings

    def score(self, comparison: Lesions, k: int) -> float:
        """Return the score of the k-th class of one case, see `CaseMetric.score`."""
        return lesions.mean_dice(comparison)


class PanopticQuality(_LesionMetric):
    """input, target, case by case -> the mean of the panoptic quality, or of one of its factors, in [0, 1].

    Args:
        quality: "pq" panoptic, "sq" segmentation or "rq" recognition quality, or "ap", the average precision.
        matching: IoU above which a lesion of the input and one of the target match.
        reach, neighbours, objects: as in `LesionDice`: what an IoU of `matching` does, which voxels touch, what a
            lesion is. options: the keywords of `CaseMetric`: spacing, average, classes, ignore_index, keep_scores.

    Example:
        >>> import torch
        >>> metric = PanopticQuality(num_classes=1, quality="rq")
        >>> metric(torch.tensor([[[1, 1, 0, 0, 0, 1]] * 2]), torch.tensor([[[1, 1, 1, 0, 0, 0]] * 2]))
        tensor(0.6667, dtype=torch.float64)

    Source: A. Kirillov et al., "Panoptic segmentation", CVPR 2019.
    """

    plot_upper_bound = 1.0

    @validation.public
    def __init__(
        self,
        num_classes: int,
        *,
        quality: Quality = "pq",
        matching: float = 0.5,
        reach: Reach = "above",
        neighbours: Neighbours = "corners",
        objects: Objects = "components",
        **options: Any,  # those of `CaseMetric`
    ) -> None:
        super().__init__(num_classes, **options)
        validation.choice("quality", quality, lesions.QUALITIES)
        lesions.no_challenge(matching)
        self.quality, self.rule = quality, Rule(matching, reach, neighbours, objects)
        self._add_settings(quality, self.rule)  # or a MetricCollection would share states of other settings

    def score(self, comparison: Lesions, k: int) -> float:
        """Return the score of the k-th class of one case, see `CaseMetric.score`."""
        return lesions.quality_of(comparison, self.quality)


class CentrelineDice(CaseMetric):
    """input, target, case by case -> the mean of the centre-line Dice (clDice), in [0, 1].

    Arguments: num_classes, and the keywords spacing, average, classes, ignore_index and keep_scores of `CaseMetric`.

    Example:
        >>> import torch
        >>> metric = CentrelineDice(num_classes=1)
        >>> metric(torch.tensor([[[0] * 7, [1] * 7, [0] * 7]]), torch.tensor([[[0] * 7, [1] * 7, [0] * 7]]))
        tensor(1., dtype=torch.float64)

    Source: S. Shit et al., "clDice - a novel topology-preserving loss function for tubular structure segmentation",
    CVPR 2021.
    """

    plot_upper_bound = 1.0

    @validation.public
    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.compare = lesions.skeletons
        self._add_settings()

    def score(self, comparison: tuple[float, float], k: int) -> float:
        """Return the score of the k-th class of one case, see `CaseMetric.score`."""
        return lesions.harmonic(comparison)
