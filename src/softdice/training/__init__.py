"""images and labels -> a trained network, and masks: `softdice train` and `softdice predict` as functions.

Needs `pip install 'softdice[train]'`. Nothing is imported but what is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from softdice.training.config import TrainConfig, TrainingError

if TYPE_CHECKING:
    from softdice.training.inference import predict
    from softdice.training.run import train

_MODULES = {"predict": "inference", "train": "run"}

__all__ = ["TrainConfig", "TrainingError", "predict", "train"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"softdice.training.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package == "softdice":
            raise
        raise ModuleNotFoundError(
            f"softdice {name}: expected {package} to be installed, got no such package. "
            "Run: pip install 'softdice[train]'",
            name=error.name,
        ) from error
    return getattr(module, name)
