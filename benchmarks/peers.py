"""The losses that are compared: softmax, then Dice over the whole batch, from logits (B, C, *S) and labels (B, *S).

Every peer is given the settings that come closest to the seed's loss. A peer that is not installed is named as missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor

import softdice

Loss = Callable[[Tensor, Tensor], Tensor]


def seed(C: int) -> Loss:
    """The notebook's loop over classes, after a softmax, kept on the graph."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        prob = logits.softmax(1)
        total = torch.zeros((), dtype=logits.dtype)
        for c in range(C):
            target, pred = (labels == c).to(logits.dtype), prob[:, c]
            total = total - ((2 * (pred * target).sum() + 1e-5) / (pred.sum() + target.sum() + 1e-5)).log()
        return total / C

    return loss


def monai(C: int) -> Loss:
    """MONAI DiceLoss."""
    from monai.losses import DiceLoss

    dice = DiceLoss(softmax=True, to_onehot_y=True, batch=True)
    return lambda logits, labels: dice(logits, labels.unsqueeze(1))


def nnunet(C: int) -> Loss:
    """nnU-Net MemoryEfficientSoftDiceLoss."""
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = MemoryEfficientSoftDiceLoss(apply_nonlin=lambda x: x.softmax(1), batch_dice=True, do_bg=True, ddp=False)
    return lambda logits, labels: dice(logits, labels.unsqueeze(1))


def smp(C: int) -> Loss:
    """segmentation-models-pytorch DiceLoss(log_loss=True), its losses imported without the rest of the package."""
    name = "segmentation_models_pytorch"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"No module named {name!r}")
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package
    dice = importlib.import_module(f"{name}.losses.dice").DiceLoss("multiclass", log_loss=True)
    return lambda logits, labels: dice(logits, labels)


def kornia(C: int) -> Loss:
    """kornia dice_loss, "micro": 1 - mean(p of the true class), less work than a Dice per class."""
    from kornia.losses import dice_loss

    # It takes images only: a volume is shown to it as one long row.
    return lambda logits, labels: dice_loss(logits.flatten(2).unsqueeze(2), labels.flatten(1).unsqueeze(1), "micro")


def exacta(C: int) -> Loss:
    """exacta DiceLoss."""
    from exacta.losses import DiceLoss

    dice = DiceLoss(activation="softmax", batch_dice=True)
    return lambda logits, labels: dice(logits, labels.long())


def ours(C: int) -> Loss:
    """softdice.SoftDiceLoss."""
    return softdice.SoftDiceLoss(C, activation="softmax")


def ours_with_cross_entropy(C: int) -> Loss:
    """softdice: Dice + cross-entropy, one pass."""
    return softdice.SoftDiceLoss(C, activation="softmax") + softdice.CrossEntropyLoss(C, activation="softmax")


PEERS: dict[str, Callable[[int], Loss]] = {
    "seed's loop": seed,
    "MONAI": monai,
    "nnU-Net": nnunet,
    "smp": smp,
    "kornia micro": kornia,
    "exacta": exacta,
}


def available() -> tuple[dict[str, Callable[[int], Loss]], dict[str, str]]:
    """() -> the peers that this machine has, and why it lacks the others."""
    why = {name: _missing(make) for name, make in PEERS.items()}
    have = {name: make for name, make in PEERS.items() if why[name] is None}
    return have, {name: reason for name, reason in why.items() if reason is not None}


def _missing(make: Callable[[int], Loss]) -> str | None:
    try:
        make(2)
    except ImportError as problem:
        return str(problem)
    return None
