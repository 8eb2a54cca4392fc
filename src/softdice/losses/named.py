"""The named overlap losses: each gives `softdice.losses.overlap.OverlapLoss` its index and its cost.

Shapes, keywords, returns and errors are those of `OverlapLoss` and `LossSettings`; a docstring here says the rest. An
`__init__` checks its own numbers (TypeError, ValueError) and hands the index to `OverlapLoss` with them filled in.
The losses over voxels, cross-entropy and focal, are in `softdice.losses.voxelwise`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from softdice import costs, indices, validation
from softdice.losses.overlap import Index, OverlapLoss
from softdice.losses.settings import LossSettings
from softdice.losses.voxelwise import refuse_cost

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "DiceSemimetricLoss",
    "ExponentialLogarithmicLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "JaccardMetricLoss",
    "MCCLoss",
    "NoiseRobustDiceLoss",
    "SoftDiceLoss",
    "SquaredDiceLoss",
    "TverskyLoss",
]


class SoftDiceLoss(OverlapLoss):
    """input, target -> mean over classes of -ln Dice.

        loss = mean_c -ln( (2 I_c + eps) / (P_c + T_c + eps) ),    I = sum p y, P = sum p, T = sum y over all voxels

    Args:
        num_classes: channels of `input`.
        eps: smoothing in voxels, >= 0.
        settings: activation, classes, class_weight, ignore_index and others, the keywords of
            `softdice.losses.LossSettings`; `cost` is "neg_log" here.

    Logits need `activation`. `help(softdice.overlap_statistics)` says which input and target a call takes.

    Edge cases: a class neither present nor predicted costs 0 (its Dice is eps / eps = 1); a class predicted on n
    voxels and not present costs ln((n + eps) / eps), about 28 for 10^7 voxels: see `absent="skip"`.

    Example:
        >>> import torch, softdice
        >>> loss = softdice.SoftDiceLoss(num_classes=3, eps=1e-5)
        >>> prediction = torch.full((1, 3, 4, 4), 1 / 3, requires_grad=True)
        >>> ground_truth = torch.zeros(1, 4, 4)
        >>> ground_truth[:, :2], ground_truth[:, 2] = 1, 2
        >>> loss(prediction, ground_truth)
        tensor(1.1406, grad_fn=<MeanBackward0>)

    Source: L. R. Dice, Ecology 26 (3), 1945; F. Milletari et al., "V-Net", 3DV 2016; the logarithm, K. C. L. Wong et
    al., MICCAI 2018, eq. 2.
    """

    def __init__(self, num_classes: int, eps: float = 1e-5, **settings: Unpack[LossSettings]) -> None:
        self.eps = eps
        settings.setdefault("cost", "neg_log")
        super().__init__(_smoothed(indices.dice, eps), num_classes, **settings)


class JaccardLoss(OverlapLoss):
    """input, target -> mean over classes of 1 - Jaccard.

        loss = mean_c 1 - (I_c + eps) / (P_c + T_c - I_c + eps),    I = sum p y, P = sum p, T = sum y over all voxels

    Args:
        num_classes: channels of `input`.
        eps: smoothing in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`.

    Example:
        >>> import torch, softdice
        >>> softdice.JaccardLoss(2, eps=0.0)(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]]))
        tensor(0.4167)

    Source: `softdice.indices.jaccard`.
    """

    def __init__(self, num_classes: int, eps: float = 1e-5, **settings: Unpack[LossSettings]) -> None:
        super().__init__(_smoothed(indices.jaccard, eps), num_classes, **settings)


class TverskyLoss(OverlapLoss):
    """input, target -> mean over classes of 1 - Tversky.

        loss = mean_c 1 - (I_c + eps) / (I_c + alpha (P_c - I_c) + beta (T_c - I_c) + eps)
        I = sum p y, P = sum p, T = sum y over all voxels

    Args:
        num_classes: channels of `input`.
        alpha: price of a false positive, >= 0. beta: price of a false negative, >= 0. Not both 0.
        eps: smoothing in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`.

    Example:
        >>> import torch, softdice
        >>> loss = softdice.TverskyLoss(2, alpha=0.2, beta=0.8, eps=0.0)
        >>> loss(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]]))
        tensor(0.2677)

    Source: `softdice.indices.tversky`.
    """

    def __init__(
        self,
        num_classes: int,
        alpha: float = 0.3,
        beta: float = 0.7,
        eps: float = 1e-5,
        **settings: Unpack[LossSettings],
    ) -> None:
        super().__init__(_tversky(alpha, beta, eps), num_classes, **settings)


class FocalTverskyLoss(OverlapLoss):
    """input, target -> mean over classes of (1 - Tversky)^gamma.

        loss = mean_c (1 - tversky_c)^gamma
        tversky_c = (I_c + eps) / (I_c + alpha (P_c - I_c) + beta (T_c - I_c) + eps)
        I = sum p y, P = sum p, T = sum y over all voxels

    The power is taken per class, before the mean: taken after it, it would only rescale the loss.

    Args:
        num_classes: channels of `input`.
        alpha: price of a false positive, >= 0. beta: price of a false negative, >= 0. Not both 0.
        gamma: the exponent, > 0; 0.75 is the paper's, which writes it 1 / gamma with gamma = 4/3.
        eps: smoothing in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`, without `cost`, which is the power.

    Example:
        >>> import torch, softdice
        >>> loss = softdice.FocalTverskyLoss(2, alpha=0.5, beta=0.5, gamma=0.5, eps=0.0)
        >>> loss(torch.tensor([[[0.75, 0.0], [0.25, 1.0]]]), torch.tensor([[0, 1]]))
        tensor(0.3556)

    Source: N. Abraham, N. M. Khan, "A novel focal Tversky loss function with improved attention U-Net for lesion
    segmentation", ISBI 2019, eq. 4.
    """

    def __init__(
        self,
        num_classes: int,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 0.75,
        eps: float = 1e-5,
        **settings: Unpack[LossSettings],
    ) -> None:
        refuse_cost(settings, "(1 - score)^gamma")
        validation.exponent("gamma", gamma)
        settings["cost"] = costs.focal(gamma)
        super().__init__(_tversky(alpha, beta, eps), num_classes, **settings)


class GeneralizedDiceLoss(OverlapLoss):
    """input, target -> 1 - generalized Dice: one coefficient over all classes, rare classes weighted up.

        loss = 1 - (2 sum_c v_c I_c + eps) / (sum_c v_c (P_c + T_c) + eps)
        I = sum p y, P = sum p, T = sum y over all voxels;    v_c = 1 / T_c^2, divided by the sum of these over c

    Args:
        num_classes: channels of `input`.
        weighting: "square" (1 / T^2), "simple" (1 / T) or "uniform". An absent class takes the weight of the rarest
            class that is present.
        eps: smoothing in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`; `class_weight` multiplies the weights, and
            reduction="none" gives (1,) or (B, 1).

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.5, 1.0, 1.0], [0.5, 0.0, 0.0]]]), torch.tensor([[1, 0, 0]])
        >>> softdice.GeneralizedDiceLoss(2, eps=0.0)(probabilities, labels)
        tensor(0.2381)

    Source: `softdice.indices.generalized_dice`.
    """

    def __init__(
        self,
        num_classes: int,
        weighting: Literal["square", "simple", "uniform"] = "square",
        eps: float = 1e-5,
        **settings: Unpack[LossSettings],
    ) -> None:
        validation.choice("weighting", weighting, ("square", "simple", "uniform"))
        super().__init__(_smoothed(indices.generalized_dice, eps, weighting=weighting), num_classes, **settings)


class MCCLoss(OverlapLoss):
    """input, target -> mean over classes of 1 - Matthews correlation coefficient; in [0, 2].

    Args:
        num_classes: channels of `input`; each class is scored against the rest.
        eps: smoothing in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`; cost="neg_log" is refused, since the score may be
            negative.

    Example:
        >>> import torch, softdice
        >>> probabilities = torch.tensor([[[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]])
        >>> softdice.MCCLoss(2, eps=0.0)(probabilities, torch.tensor([[1, 0, 0, 1]]))
        tensor(0.4226)

    Source: `softdice.indices.mcc`.
    """

    def __init__(self, num_classes: int, eps: float = 1e-5, **settings: Unpack[LossSettings]) -> None:
        costs.refuse_logarithm(settings.get("cost", "one_minus"))
        super().__init__(_smoothed(indices.mcc, eps), num_classes, **settings)


class SquaredDiceLoss(OverlapLoss):
    """input, target -> mean over classes of 1 - Dice with squares in the denominator (V-Net).

        loss = mean_c 1 - (2 I_c + eps) / (Q_c + R_c + eps),    I = sum p y, Q = sum p^2, R = sum y^2 over all voxels

    Args:
        num_classes: channels of `input`.
        eps: smoothing in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`.

    Example:
        >>> import torch, softdice
        >>> softdice.SquaredDiceLoss(2, eps=0.0)(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]]))
        tensor(0.1556)

    Source: `softdice.indices.squared_dice`.
    """

    def __init__(self, num_classes: int, eps: float = 1e-5, **settings: Unpack[LossSettings]) -> None:
        super().__init__(_smoothed(indices.squared_dice, eps), num_classes, **settings)


class DiceSemimetricLoss(OverlapLoss):
    """input, target -> mean over classes of D / (P + T): Dice on hard labels, 0 exactly at p = y on soft ones.

        form "sum":  loss = mean_c D_c / (P_c + T_c + eps)        "product":  mean_c D_c / (2 I_c + D_c + eps)
        D = sum abs(p - y), I = sum p y, P = sum p, T = sum y over all voxels

    Args:
        num_classes: channels of `input`.
        form: "sum" or "product", of the denominator.
        eps: smoothing in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`.

    Example:
        >>> import torch, softdice
        >>> soft = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]])
        >>> softdice.DiceSemimetricLoss(2)(soft, soft)
        tensor(0.)

    Source: `softdice.indices.dice_semimetric`.
    """

    def __init__(
        self,
        num_classes: int,
        form: Literal["sum", "product"] = "sum",
        eps: float = 1e-5,
        **settings: Unpack[LossSettings],
    ) -> None:
        validation.choice("form", form, ("sum", "product"))
        super().__init__(_smoothed(indices.dice_semimetric, eps, form=form), num_classes, **settings)


class JaccardMetricLoss(OverlapLoss):
    """input, target -> mean over classes of 2 D / (P + T + D): Jaccard on hard labels, 0 exactly at p = y on soft.

        form "sum":  loss = mean_c 2 D_c / (P_c + T_c + D_c + eps)        "product":  mean_c D_c / (I_c + D_c + eps)
        D = sum abs(p - y), I = sum p y, P = sum p, T = sum y over all voxels

    Args:
        num_classes: channels of `input`.
        form: "sum" or "product", of the denominator.
        eps: smoothing in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`.

    Example:
        >>> import torch, softdice
        >>> softdice.JaccardMetricLoss(2, eps=0.0)(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]]))
        tensor(0.4167)

    Source: `softdice.indices.jaccard_metric`.
    """

    def __init__(
        self,
        num_classes: int,
        form: Literal["sum", "product"] = "sum",
        eps: float = 1e-5,
        **settings: Unpack[LossSettings],
    ) -> None:
        validation.choice("form", form, ("sum", "product"))
        super().__init__(_smoothed(indices.jaccard_metric, eps, form=form), num_classes, **settings)


class NoiseRobustDiceLoss(OverlapLoss):
    """input, target -> mean over classes of D / (Q + R) with D = sum abs(p - y)^power.

        loss = mean_c D_c / (Q_c + R_c + eps),    Q = sum p^2, R = sum y^2 over all voxels

    Args:
        num_classes: channels of `input`.
        power: exponent in [1, 2]: 2 is SquaredDiceLoss, towards 1 wrong labels weigh less.
        eps: smoothing of the denominator, in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`; cost="neg_log" is refused, since the score may be
            negative.

    Example:
        >>> import torch, softdice
        >>> probabilities, labels = torch.tensor([[[0.75, 1.0], [0.25, 0.0]]]), torch.tensor([[0, 1]])
        >>> softdice.NoiseRobustDiceLoss(2, eps=0.0)(probabilities, labels)
        tensor(0.7489)

    Source: `softdice.indices.noise_robust_dice`.
    """

    def __init__(
        self, num_classes: int, power: float = 1.5, eps: float = 1e-5, **settings: Unpack[LossSettings]
    ) -> None:
        validation.number("power", power, 1, 2)
        costs.refuse_logarithm(settings.get("cost", "one_minus"))
        super().__init__(_smoothed(indices.noise_robust_dice, eps), num_classes, power=power, **settings)


class ExponentialLogarithmicLoss(OverlapLoss):
    """input, target -> mean over classes of (-ln Dice)^gamma: the overlap term of the exponential logarithmic loss.

        loss = mean_c ( -ln( (2 I_c + eps) / (P_c + T_c + eps) ) )^gamma,    I = sum p y, P = sum p, T = sum y

    The paper's whole loss is `0.8 * ExponentialLogarithmicLoss(C) + 0.2 * CrossEntropyLoss(C, class_weight=...)` with
    one more exponent, on the cross-entropy of each voxel, which the statistics cannot give.

    Args:
        num_classes: channels of `input`.
        gamma: the exponent, > 0; 1 is SoftDiceLoss.
        eps: smoothing in voxels, >= 0.
        settings: the keywords of `softdice.losses.LossSettings`, without `cost`, which is the power of the logarithm.

    Example:
        >>> import torch, softdice
        >>> loss = softdice.ExponentialLogarithmicLoss(2, gamma=0.5, eps=0.0)
        >>> loss(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[1, 0]]))
        tensor(0.5546)

    Source: K. C. L. Wong et al., "3D segmentation with exponential logarithmic loss for highly unbalanced object
    sizes", MICCAI 2018, eq. 2.
    """

    def __init__(
        self, num_classes: int, gamma: float = 0.3, eps: float = 1e-5, **settings: Unpack[LossSettings]
    ) -> None:
        validation.exponent("gamma", gamma)
        refuse_cost(settings, "(-ln score)^gamma")
        settings["cost"] = costs.log_power(gamma)
        super().__init__(_smoothed(indices.dice, eps), num_classes, **settings)


def _smoothed(index: Index, eps: float, **keywords: Any) -> partial[Tensor]:
    """Return the index with its smoothing `eps`, in voxels, and the other keywords filled in.

    Raise TypeError or ValueError unless eps is a number >= 0.
    """
    validation.number("eps", eps, 0)
    return partial(index, **keywords, eps=eps)


def _tversky(alpha: float, beta: float, eps: float) -> partial[Tensor]:
    """Return the Tversky index with its numbers filled in, from a user.

    Raise TypeError or ValueError for one that is no number >= 0, ValueError if alpha and beta are both 0.
    """
    validation.number("alpha", alpha, 0)
    validation.number("beta", beta, 0)
    if alpha == beta == 0:
        validation.fail("alpha or beta above 0", "both 0", "With both 0 nothing costs anything.")
    return _smoothed(indices.tversky, eps, alpha=alpha, beta=beta)
