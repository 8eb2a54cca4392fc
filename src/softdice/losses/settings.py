"""The keywords that losses share: each is declared once, checked once, and kept in the same attribute of every loss.

A new keyword is a line of `LossSettings`, its default in `DEFAULTS`, its check in `adopt`, and the place that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from torch import Tensor

from softdice import costs, reductions, validation
from softdice.costs import Cost
from softdice.losses.base import Loss
from softdice.parallel import groups
from softdice.statistics import check
from softdice.statistics.request import Pass


class LossSettings(TypedDict, total=False):
    """Keywords that every loss shares::

    ================= ============================================ ====================================================
    keyword           values (default first)                       meaning
    ================= ============================================ ====================================================
    activation        "none", "softmax", "sigmoid"                 what turns input into probabilities, in the pass
    cost              "neg_log" for SoftDiceLoss, else             score -> cost
                      "one_minus"; "log_cosh"; a callable
    pooling           "batch", "sample"                            add over the batch before the index, or not
    classes           None = all; a sequence of ints               the classes that enter the mean
    class_weight      None; (C,)                                   weighted mean: sum(w cost) / sum(w)
    absent            "count", "skip"                              a class with no target voxel in the pool: counted
                                                                   like any other, or left out
    ignore_index      None; int                                    voxels with this label enter no sum
    label_smoothing   0.0; [0, 1)                                  y' = (1 - e) y + e / K
    regions           None; tuples of class numbers                unions of classes in the place of the classes
    reduction         "mean", "sum", "none"                        "none": (C,) or, pooled per sample, (B, C)
    group             None; "world"; a ProcessGroup                the sums of all ranks together, before the index
    validate          True, False                                  check the ranges of labels and probabilities
    ================= ============================================ ====================================================
    """

    activation: Literal["none", "softmax", "sigmoid"]
    cost: str | Cost
    pooling: Literal["batch", "sample"]
    classes: Sequence[int] | None
    class_weight: Tensor | Sequence[float] | None
    absent: Literal["count", "skip"]
    ignore_index: int | None
    label_smoothing: float
    regions: Sequence[Sequence[int]] | None
    reduction: Literal["mean", "sum", "none"]
    group: Any
    validate: bool


DEFAULTS: dict[str, Any] = {
    "activation": "none",
    "cost": "one_minus",
    "pooling": "batch",
    "classes": None,
    "class_weight": None,
    "absent": "count",
    "ignore_index": None,
    "label_smoothing": 0.0,
    "regions": None,
    "reduction": "mean",
    "group": None,
    "validate": True,
}

_WORDS = {"pooling": reductions.POOLINGS, "absent": reductions.ABSENT, "reduction": reductions.REDUCTIONS}
_FOREIGN = {
    "smooth": "smooth is called eps here",
    "smooth_nr": "smooth_nr and smooth_dr are one eps here",
    "include_background": "include_background=False is classes=range(1, num_classes)",
    "weight": "weight is class_weight, a number for each class, or voxel_weight when the loss is called",
    "softmax": "softmax=True is activation='softmax'",
    "sigmoid": "sigmoid=True is activation='sigmoid'",
    "apply_nonlin": "apply_nonlin is activation='softmax' or 'sigmoid'",
    "batch_dice": "batch_dice=True is pooling='batch', False is 'sample'",
    "batch": "batch=True is pooling='batch', False is 'sample'",
    "mode": "mode is activation: 'softmax' for one label a voxel, 'sigmoid' for masks",
    "from_logits": "from_logits=True is activation='softmax' or 'sigmoid'",
}
"""A keyword of another library -> the advice for a user who passes it."""


def adopt(
    loss: Loss, num_classes: int, settings: Mapping[str, Any], takes: Sequence[str] = tuple(DEFAULTS)
) -> dict[str, Any]:
    """Check num_classes and the keywords that a user passed to a loss, set its attributes, return all settings.

    The attributes are those that `Loss` declares; the buffer `class_weight` holds the weights of `classes` alone. The
    settings that are returned, for `pass_of`, have the defaults filled in.

    takes: the keywords that the loss has a meaning for. Raise TypeError for any other keyword, and TypeError or
    ValueError, which name the keyword, for a value that does not fit.
    """
    if unknown := set(settings) - set(takes):
        advice = [_FOREIGN[name] for name in sorted(unknown) if name in _FOREIGN]  # keywords of other libraries
        useless = [name for name in sorted(unknown) if name in DEFAULTS]
        if useless:
            advice.append(f"this loss has no use for {', '.join(useless)}: leave it out")
        hint = f"{'; '.join(advice)}." if advice else "Correct the spelling."
        validation.fail(f"the keywords {', '.join(takes)}", ", ".join(sorted(unknown)), hint, TypeError)
    options: dict[str, Any] = {**DEFAULTS, **settings}
    for name, words in _WORDS.items():
        validation.choice(name, options[name], words)
    groups.check_group(options["group"], options["pooling"])
    loss.num_classes = validation.num_classes(num_classes)
    if num_classes == 1 and options["activation"] == "softmax":
        hint = "A softmax over one channel is 1 everywhere and cannot be trained: use 'sigmoid'."
        validation.fail("activation 'sigmoid' or 'none' for one class", "'softmax'", hint)
    regions = options["regions"] = validation.frozen_regions(options["regions"])
    columns = num_classes if regions is None else len(regions)
    classes, weight = options["classes"], options["class_weight"]
    loss.classes = None if classes is None else validation.class_numbers("classes", classes, columns)
    if weight is not None:
        weight = validation.class_weights(weight, columns, loss.classes)
    loss.register_buffer("class_weight", weight, persistent=False)
    loss.cost, loss.group = costs.resolve(options["cost"]), options["group"]
    loss.pooling, loss.absent, loss.reduction = options["pooling"], options["absent"], options["reduction"]
    return options


def pass_of(options: Mapping[str, Any], **changes: Any) -> Pass:
    """Return the pass for the settings that `adopt` returned, checked; `changes` are further fields of `Pass`.

    Raise TypeError or ValueError, which name the setting, for one out of its range.
    """
    common = {name: options[name] for name in ("activation", "ignore_index", "label_smoothing", "regions")}
    return check.pass_settings(Pass(**common, validate=bool(options["validate"]), **changes))
