"""statistics -> score in [0, 1], higher is better.

Every index is a plain function of `OverlapStatistics` (or of anything with the same fields), so a new one is a new
function; see the documentation page "Your own index". Shape suffixes: C class; a leading B is kept where it is there.
"""

from __future__ import annotations

from torch import Tensor

from softdice.statistics import OverlapStatistics


def dice(stats: OverlapStatistics, *, eps: float = 1e-5) -> Tensor:
    """statistics -> Dice coefficient per class.

        dice = (2 I + eps) / (P + T + eps)

    Args:
        stats: statistics with `intersection`, `prediction` and `target`, (B, C) or (C,).
        eps: smoothing, >= 0, in voxels; it stands once in the numerator and once in the denominator.

    Returns:
        The score, same shape as the statistics.

    Edge cases: a class that is neither predicted nor present scores 1 (0 / 0 = nan for eps = 0); a class that is
    present and not predicted, or predicted and not present, scores about eps / (number of voxels), close to 0.

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]])
        >>> stats = softdice.overlap_statistics(probabilities, labels)
        >>> softdice.indices.dice(stats.pool(), eps=0)
        tensor([0.8000, 0.6667])

    Source: L. R. Dice, "Measures of the amount of ecologic association between species", Ecology 26 (3), 1945,
    coincidence index; with probabilities, F. Milletari et al., "V-Net", 3DV 2016.
    """
    return (2 * stats.intersection + eps) / (stats.prediction + stats.target + eps)
