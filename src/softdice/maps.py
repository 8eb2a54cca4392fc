"""labels -> the maps that losses read beside them, (B, C, *S) or (B, *S); for a data loader, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from softdice import validation
from softdice.internals import untraced
from softdice.statistics import check


@validation.public
@untraced
def distance_map(target: Tensor, num_classes: int, *, spacing: Sequence[float] | None = None) -> Tensor:
    """labels -> signed distance of every voxel from the region of every class: the map of `softdice.BoundaryLoss`.

        m = distance to the nearest voxel of the class             outside of it
        m = one voxel - distance to the nearest voxel of another   inside: 0 at its border, negative further in

    Args:
        target: labels (B, *S) or (B, 1, *S), integers or bool.
        num_classes: C >= 1. With C = 1 the mask of the voxels with label 1.
        spacing: edge lengths of a voxel, one per dimension of S; distances have their unit, and "one voxel" is the
            shortest of them. None: 1 each.

    Returns:
        (B, C, *S), float32, on the device of target. A class that is absent, or everywhere, has a map of zeros.

    Raises:
        TypeError, ValueError: labels of another dtype or shape, a spacing of another length or not above 0.
        ModuleNotFoundError: scipy is not installed.

    Example:
        >>> distance_map(torch.tensor([[0, 0, 1, 1, 1, 0]]), 2)[0, 1]
        tensor([ 2.,  1.,  0., -1.,  0.,  1.])

    Source: H. Kervadec et al., "Boundary loss for highly unbalanced segmentation", MIDL 2019, and its published code.
    """
    ndimage = validation.package("softdice.distance_map", "scipy.ndimage", "metrics")
    labels_BS = _labels(target)
    count = validation.num_classes(num_classes)
    edges = (1.0,) * (labels_BS.ndim - 1) if spacing is None else tuple(float(edge) for edge in spacing)
    if len(edges) != labels_BS.ndim - 1 or not all(0 < edge < float("inf") for edge in edges):
        expected = f"spacing of {labels_BS.ndim - 1} numbers above 0"
        validation.fail(expected, repr(spacing), "Give the edge length of a voxel in each dimension.")
    result = np.zeros((labels_BS.shape[0], count, *labels_BS.shape[1:]), np.float32)
    for b, labels in enumerate(labels_BS):
        for c in range(count):
            inside = labels == (1 if count == 1 else c)
            if inside.any() and not inside.all():
                far = ndimage.distance_transform_edt(~inside, sampling=edges)
                deep = ndimage.distance_transform_edt(inside, sampling=edges)
                result[b, c] = np.where(inside, min(edges) - deep, far)
    return torch.from_numpy(result).to(target.device)


def _labels(target: Tensor) -> np.ndarray:
    """labels (B, *S) or (B, 1, *S) -> (B, *S)."""
    validation.are_tensors(target=target)
    if target.dtype not in check.LABEL_DTYPES:
        validation.fail("target of an integer dtype or bool", target.dtype, "Pass labels.", TypeError)
    if target.ndim < 2:
        validation.fail("target of shape (B, *S)", tuple(target.shape), "Add the missing dimension with unsqueeze.")
    labels = check.without_metadata(target).detach().cpu().numpy()
    return labels[:, 0] if labels.ndim > 2 and labels.shape[1] == 1 else labels
