"""The settings of one pass over the voxels: one record, from the losses down to the kernels of each device."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

FIELDS = (
    "intersection",
    "prediction",
    "target",
    "prediction_squared",
    "target_squared",
    "difference",
    "cross_entropy",
    "focal",
    "voxels",
    "labelled",
)
"""Names of the statistics, in the order in which every backend returns those that are asked for."""

ACTIVATIONS = ("none", "softmax", "sigmoid")


@dataclass(frozen=True)
class Pass:
    """What one pass over the voxels has to know; losses that agree on it share the pass."""

    activation: str = "none"
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    regions: tuple[tuple[int, ...], ...] | None = None
    validate: bool = True
    gamma: float = 2.0
    power: float = 1.0
    fields: tuple[str, ...] = FIELDS

    text: str = field(init=False, repr=False, compare=False)
    """All but the regions in the form in which an operator takes them (the regions are a tensor there)."""

    def __post_init__(self) -> None:
        words = (
            f"{self.activation} {self.ignore_index} {self.label_smoothing} {self.validate} {self.gamma} {self.power}"
        )
        object.__setattr__(self, "text", f"{words} {' '.join(self.fields)}")


@lru_cache(maxsize=1024)
def decode(text: str) -> Pass:
    """`Pass.text` -> the settings, without the regions.

    Example:
        >>> decode(Pass(activation="softmax", ignore_index=255).text) == Pass(activation="softmax", ignore_index=255)
        True
    """
    activation, ignore_index, label_smoothing, validate, gamma, power, *fields = text.split()
    return Pass(
        activation=activation,
        ignore_index=None if ignore_index == "None" else int(ignore_index),
        label_smoothing=float(label_smoothing),
        validate=validate == "True",
        gamma=float(gamma),
        power=float(power),
        fields=tuple(fields),
    )
