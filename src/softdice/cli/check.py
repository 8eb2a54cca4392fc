"""`softdice check`: a loss with a known value, then every backend against float64.

Shape suffixes: B sample, C class, V voxel.
"""

from __future__ import annotations

import torch
import typer
from torch import Tensor

from softdice import SoftDiceLoss, SystemConfig, setup_system, use_backend
from softdice.backends import route, selftest
from softdice.statistics.request import Pass, Request

TOLERANCE = 2.4e-7
"""Two units in the last place of a float32 near the loss, which is 1.87."""


def seed_case() -> tuple[Tensor, Tensor]:
    """Return what the known loss is of: probabilities (1, 3, 224, 224), and labels 0 to 2 (1, 224, 224) in float32."""
    setup_system(SystemConfig(seed=42))
    ground_truth = torch.zeros(1, 224, 224)
    ground_truth[:, :50, :50] = 1
    ground_truth[:, 50:100, 50:100] = 2
    prediction = torch.zeros(1, 3, 224, 224).uniform_().softmax(dim=1)
    return prediction, ground_truth


def loss_on(backend: str, prediction: Tensor, ground_truth: Tensor) -> float:
    """Return the known loss, for the tensors of `seed_case`, on a backend that this machine has."""
    device = route.device_of(backend)
    with use_backend(backend):
        return SoftDiceLoss(num_classes=3)(prediction.to(device), ground_truth.to(device)).item()


def trials(device: torch.device) -> list[tuple[str, str | None]]:
    """Run the self-test of Triton's kernels on a device: return ("dtype activation", problem or None) for each kind.

    Only dtypes and shapes of these requests matter: the self-test makes its own values.
    """
    input_BCV, outcomes = torch.zeros(1, 3, 8, device=device), []
    labels_BV, target_BCV = torch.zeros(1, 8, dtype=torch.long, device=device), torch.zeros_like(input_BCV)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for activation, target in (("softmax", labels_BV), ("sigmoid", target_BCV), ("none", labels_BV)):
            request = Request(input_BCV.to(dtype), target, settings=Pass(activation=activation))
            outcomes.append((f"{str(dtype).removeprefix('torch.')} {activation}", selftest.problem(request)))
    return outcomes


def check() -> None:
    """Compute a known loss, compare every backend with float64, try Triton's kernels. Exits with 1 if one is off."""
    prediction, ground_truth = seed_case()
    losses = {"reference": loss_on("reference", prediction, ground_truth)}
    exact = loss_on("reference", prediction.double(), ground_truth)
    print(f"Loss: {losses['reference']}")
    print(f"float64: {exact}")
    for backend, missing in route.kernel_backends().items():
        if missing is None:
            losses[backend] = loss_on(backend, prediction, ground_truth)
        else:
            print(f"{backend}: not on this machine: {missing}")
    failed = False
    for backend, loss in losses.items():
        right = abs(loss - exact) <= TOLERANCE
        failed |= not right
        distance = f"distance to float64 {abs(loss - exact):.2e}"
        print(f"{backend + ' float32':18} {loss!s:20} {distance}  {'ok' if right else 'OFF'}")
    if route.triton_missing() is None:
        for kind, problem in trials(route.device_of("triton")):
            failed |= problem is not None
            print(f"triton trial of {kind:17} {'ok' if problem is None else 'OFF: ' + problem}")
    if failed:
        print(f"check: expected every backend within {TOLERANCE} of float64, got one that is off. Please report it.")
        raise typer.Exit(1)
