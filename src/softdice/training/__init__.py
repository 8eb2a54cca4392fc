"""images and labels -> a trained network, and masks: `softdice train` and `softdice predict` as functions.

Needs `pip install 'softdice[train]'`. Nothing is imported but what is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from softdice import validation
from softdice.training.config import TrainConfig, TrainingError

if TYPE_CHECKING:
    from softdice.training.inference import PredictionError, predict
    from softdice.training.run import train

_MODULES = {"PredictionError": "inference", "predict": "inference", "train": "run"}
PACKAGES = {"predict": ("monai",), "train": ("lightning", "monai", "matplotlib")}

__all__ = ["PredictionError", "TrainConfig", "TrainingError", "predict", "train"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    validation.packages(f"softdice {name}", PACKAGES.get(name, ()), "train")
    return getattr(import_module(f"softdice.training.{_MODULES[name]}"), name)
