"""Scores of label maps from counts of voxels: hard Dice, Jaccard, precision, recall and volume difference.

Counts are (3, ...) int64: voxels of both, of the prediction, of the target (`counting.class_counts`). Dice,
Jaccard, precision and recall share one rule for absent classes: nan where prediction and target are both empty (there
is nothing to score), 0 where one of them is. Results are float64.

Source: L. R. Dice, "Measures of the amount of ecologic association between species", Ecology 26, 1945; P. Jaccard,
"The distribution of the flora in the alpine zone", New Phytologist 11, 1912.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from softdice import validation
from softdice.metrics.counting import as_tensor, check_ignore_index, class_counts, label_maps


@validation.public
def dice_score(
    prediction: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    pooling: Literal["all", "sample"] = "all",
    ignore_index: int | None = None,
) -> Tensor:
    """labels, labels -> the Dice coefficient of each class, (C,), or of each sample and class, (B, C)

        dice_c = 2 #[p = c and t = c] / (#[p = c] + #[t = c])

    over all voxels of all samples, or of each sample. Maps are read once, whatever C is, and nothing is copied.

    Args:
        prediction: bool or integer labels in [0, C), any shape; (B, *S) for "sample". For logits pass
            `logits.argmax(1)`. Where prediction and target are one-hot (B, C, *S), they are taken as that. A Tensor, an
            array of NumPy, or anything that speaks DLPack.
        target: bool or integer labels of the same shape, in [0, C) or `ignore_index`.
        num_classes: C. With C = 1 the maps are masks and their one class is 1.
        pooling: "all": the voxels of all samples are added first; "sample": each sample has scores of its own.
        ignore_index: voxels where target has this label are left out, and it is not scored where it is a class.

    Returns:
        (C,), with pooling="sample" (B, C), float64 in [0, 1]; higher is better. nan: the class is in neither, or it is
        `ignore_index`; 0: in one of the two only.

    Raises:
        ValueError: shapes differ, a label is out of range, or masks (B, C, *S) are not one-hot. TypeError: no arrays,
            or labels that are not integers.

    Example:
        >>> import torch
        >>> dice_score(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]), num_classes=3)
        tensor([0.6667, 0.8000,    nan], dtype=torch.float64)

    Source: L. R. Dice, Ecology 26, 1945.
    """
    validation.choice("pooling", pooling, ("all", "sample"))
    prediction, target = as_tensor(prediction), as_tensor(target)
    validation.are_tensors(prediction=prediction, target=target)
    prediction, target = label_maps(prediction, target, num_classes, ignore_index)
    if pooling == "all":
        return dice(mask_counts(prediction, target, num_classes, ignore_index))
    if prediction.dim() == 0 or prediction.shape != target.shape:
        advice = "Pass label maps of one shape, the samples along the first axis."
        validation.fail(
            "prediction and target of one shape (B, *S)", f"{tuple(prediction.shape)} and {tuple(target.shape)}", advice
        )
    counts = [mask_counts(p, t, num_classes, ignore_index) for p, t in zip(prediction, target, strict=True)]
    return dice(torch.stack(counts, 1) if counts else prediction.new_zeros((3, 0, num_classes), dtype=torch.int64))


def mask_counts(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Return the counts (3, C) of two label maps; with C = 1 those of label 1, the only class of a mask."""
    C = validation.num_classes(num_classes)
    check_ignore_index(ignore_index)
    counts = class_counts(prediction, target, max(C, 2), ignore_index=ignore_index)
    return counts[:, 1:] if C == 1 else counts


def dice(counts: Tensor) -> Tensor:
    """Return 2 both / (prediction + target) of counts (3, ...), (...) float64 in [0, 1].

    Example:
        >>> dice(torch.tensor([[2, 0, 0], [3, 4, 0], [2, 0, 0]]))
        tensor([0.8000, 0.0000,    nan], dtype=torch.float64)
    """
    both, prediction, target = counts.double()
    return 2 * both / (prediction + target)


def jaccard(counts: Tensor) -> Tensor:
    """Return both / (prediction + target - both) of counts (3, ...), the intersection over the union, in [0, 1]."""
    both, prediction, target = counts.double()
    return both / (prediction + target - both)


def precision(counts: Tensor) -> Tensor:
    """Return both / prediction of counts (3, ...), the share of the predicted voxels that are right, in [0, 1].

    0 where nothing was predicted although the target has the class.
    """
    both, prediction, target = counts.double()
    return both / torch.where((prediction == 0) & (target > 0), 1.0, prediction)


def recall(counts: Tensor) -> Tensor:
    """Return both / target of counts (3, ...), the share of the target's voxels that were predicted, in [0, 1].

    0 where the target lacks a class that was predicted.
    """
    both, prediction, target = counts.double()
    return both / torch.where((target == 0) & (prediction > 0), 1.0, target)


def specificity(counts: Tensor, voxels: Tensor) -> Tensor:
    """Return the share of the voxels without a class that were predicted without it, of counts (3, ...).

    `voxels` (...) is the number of all voxels that count. In [0, 1]; nan where every voxel of the target has the class.

    Example:
        >>> specificity(torch.tensor([[2], [4], [3]]), torch.tensor([10]))
        tensor([0.7143], dtype=torch.float64)
    """
    both, prediction, target = counts.double()
    return (voxels - prediction - target + both) / (voxels - target)


def volume_difference(counts: Tensor) -> Tensor:
    """Return 2 (prediction - target) / (prediction + target) of counts (3, ...), in [-2, 2]; 0 is best.

    Above 0 too much was predicted, below 0 too little; 2 and -2 where only one of the two has the class, nan where
    neither does. Relative to the mean of both volumes, so that an empty target gives no infinity.
    """
    _, prediction, target = counts.double()
    return 2 * (prediction - target) / (prediction + target)
