"""Other libraries' losses as they are installed, random cases for them, and the comparison."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKENDS, serving
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor


def smp_losses() -> Any:
    """Import the folder of smp's losses as a package of its own: smp itself needs torchvision, its losses do not."""
    name = "smp_losses_alone"
    if name not in sys.modules:
        found = importlib.util.find_spec("segmentation_models_pytorch")
        assert found is not None, "segmentation_models_pytorch is not installed: run make test"
        assert found.submodule_search_locations is not None
        package = types.ModuleType(name)
        package.__path__ = [str(Path(found.submodule_search_locations[0]) / "losses")]
        sys.modules[name] = package
        for part in ("dice", "jaccard", "tversky", "focal", "soft_ce", "soft_bce", "mcc", "lovasz"):
            importlib.import_module(f"{name}.{part}")
    return sys.modules[name]


def configurations(test: Any) -> Any:
    """Mark a test that draws options for another library's loss: `make test-peers` runs it."""
    return pytest.mark.peers(settings(max_examples=200)(test))


@dataclass
class Case:
    """A random problem: logits, and the targets that fit them."""

    logits: Tensor  # (B, C, *S)
    labels: Tensor  # (B, 1, *S)
    one_hot: Tensor  # (B, C, *S), of the labels; of a single class the mask of ones
    soft: Tensor  # (B, C, *S), in [0, 1]
    mask: Tensor  # (B, 1, *S), zeros and ones

    @property
    def channels(self) -> int:
        return self.logits.shape[1]


@st.composite
def cases(draw: st.DrawFn, least: int = 1, most: int = 4) -> Case:
    samples, channels = draw(st.integers(1, 3)), draw(st.integers(least, most))
    space = draw(st.sampled_from([(4,), (7,), (2, 3), (3, 4), (2, 2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    logits = 2 * torch.randn(samples, channels, *space, dtype=torch.float64, generator=generator)
    top = max(channels, 2)
    labels = torch.randint(0, draw(st.integers(1, top)), (samples, 1, *space), generator=generator)
    classes = torch.arange(channels).view(1, -1, *[1] * len(space)) if channels > 1 else torch.tensor(1)
    soft = torch.rand(samples, channels, *space, dtype=torch.float64, generator=generator)
    mask = (torch.rand(samples, 1, *space, generator=generator) > 0.3).double()
    return Case(logits, labels, (labels == classes).double(), soft, mask)


def agree(ours: Any, theirs: Any, logits: Tensor, *rest: Tensor, **keywords: Tensor) -> None:
    """Assert the same loss within 1e-5, and gradients within 1e-5 of their maximum; one case in fifty on a kernel.

    The formulas are compared, and do not depend on the backend; each kind of pass would compile for seconds.
    """
    drawn = int(logits.flatten()[0].item() * 1000)
    kernels = [name for name in BACKENDS if name != "reference"]
    backend = "reference" if drawn % 50 else kernels[drawn // 50 % len(kernels)]
    results = []
    for loss in (ours, theirs):
        x = logits.clone().requires_grad_()
        with serving(backend):
            value = loss(x, *(tensor.clone() for tensor in rest), **keywords)
        if isinstance(value, Tensor) and value.requires_grad:
            # a random direction, so that reduction="none" is compared element by element too
            value.double().mul(
                torch.linspace(1, 2, value.numel(), dtype=torch.float64).view(value.shape)
            ).sum().backward()
        results.append((torch.as_tensor(value).detach().double(), torch.zeros_like(x) if x.grad is None else x.grad))
    (value, gradient), (expected, theirs_gradient) = results
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    if bool(expected.isfinite().all()):
        scale = theirs_gradient.abs().max().item()
        torch.testing.assert_close(gradient, theirs_gradient, rtol=0, atol=1e-5 * scale + 1e-8)
