"""Losses by name: "dice", "dice+ce", "tversky+0.5*focal"."""

from __future__ import annotations

import inspect
from typing import Any

import softdice
from softdice.losses import MAPPED, Loss
from softdice.losses.base import words
from softdice.training.config import refusal

SHORT = {"soft_dice": "dice", "cross_entropy": "ce", "top_k_cross_entropy": "topk", "ohem_cross_entropy": "ohem"}
"""Names that are shorter than the class's."""
MOST_TERMS = 16
"""Losses of a sum; more are a slip of the keyboard."""
FACTORS = 1e-6, 1e6
"""Factors that float32 still tells apart from 0 and infinity once it is multiplied by a loss."""


def loss_names() -> dict[str, type[Loss]]:
    """Return {name: class} of every public loss that needs no more than the number of classes.

    Example:
        >>> loss_names()["dice"].__name__
        'SoftDiceLoss'
    """
    names: dict[str, type[Loss]] = {}
    for public in (name for name in softdice.__all__ if name.endswith("Loss")):
        loss = getattr(softdice, public)
        parameters = list(inspect.signature(loss).parameters.values())
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if needed == ["num_classes"] and loss not in MAPPED:  # those need a `voxel_map`, too
            names[SHORT.get(words(loss), words(loss))] = loss
    return dict(sorted(names.items()))


def parse_loss(text: str, num_classes: int, group: str | None = None, ignore_index: int | None = None) -> Loss:
    """Return the loss of logits and a label map for a name, or a weighted sum of names.

    A class of which a batch of patches has no voxel is left out of the mean (`absent="skip"`): its -ln Dice, the
    cost of "dice", would be up to 28 and outweigh all others. Voxels whose label is `ignore_index` are left out.

    Args:
        text: such as "dice" or "tversky+0.5*focal", in any case, with - for _.
        group: "world" adds the statistics of all ranks; a loss without statistics stays local to each rank. None: no
            sum over ranks.

    Raises:
        TrainingError: a name that is no loss (the message lists all), a bad factor before "*", or too many terms.

    Example:
        >>> type(parse_loss("dice", 3)).__name__
        'SoftDiceLoss'
    """
    names = loss_names()
    full = {long: names[short] for long, short in SHORT.items() if short in names} | names
    shared: dict[str, Any] = {
        "activation": "softmax", "absent": "skip", "group": group, "validate": False, "ignore_index": ignore_index,
    }  # fmt: skip
    advice = "Change --loss."
    total: Loss | None = None
    parts = text.replace(" ", "").split("+")
    if len(parts) > MOST_TERMS:
        raise refusal(f"a sum of at most {MOST_TERMS} losses", len(parts), advice)
    for part in parts:
        weight, _, name = part.rpartition("*")
        key = name.lower().replace("-", "_")
        if key not in full:
            expected = f"a loss among {', '.join(names)}, or a sum of them as dice+0.5*ce"
            raise refusal(expected, repr(name[:40]), advice)
        try:
            factor = float(weight or 1)
        except ValueError:
            raise refusal("a number before '*'", repr(weight[:40]), advice) from None
        if not FACTORS[0] <= factor <= FACTORS[1]:  # nan neither
            expected = f"a number from {FACTORS[0]:g} to {FACTORS[1]:g} before '*'"
            raise refusal(expected, weight[:40], advice)
        settings = {name: value for name, value in shared.items() if name in full[key].TAKES}
        term: Loss = full[key](num_classes, **settings)
        term = term if factor == 1 else factor * term
        total = term if total is None else total + term
    assert total is not None  # split never gives an empty list
    return total
