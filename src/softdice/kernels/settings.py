"""The settings of one pass, as the operators hand them to the kernels of each device."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """What the operators of `softdice.kernels.ops` pass on, in their order."""

    fields: list[str]
    activation: str
    ignore_index: int | None
    label_smoothing: float
    gamma: float
    power: float
