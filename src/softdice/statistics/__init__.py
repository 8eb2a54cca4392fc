"""logits, target -> statistics: the only stage that sees voxels.

Stages: declared (each statistic, once), request (what a pass works on), check (what a user passes -> a request),
reference (the definition), sliced (the definition, in bounded memory), api (the public functions).
"""

from softdice.statistics.api import OverlapStatistics, measure, overlap_statistics, soft_confusion, voxel_cross_entropy

__all__ = ["OverlapStatistics", "measure", "overlap_statistics", "soft_confusion", "voxel_cross_entropy"]
