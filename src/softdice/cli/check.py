"""`softdice check`: the seed's check, then every backend against float64."""

from __future__ import annotations

import torch
import typer
from torch import Tensor

from softdice import SoftDiceLoss, SystemConfig, setup_system, use_backend
from softdice.backends import route, selftest
from softdice.statistics.request import Pass, Request

SEED_LOSS = 1.8738912343978882
"""Loss that the seed document prints, a float32."""

TOLERANCE = 2.4e-7
"""Two units in the last place of a float32 near the loss."""


def seed_case() -> tuple[Tensor, Tensor]:
    """Return the probabilities (1, 3, 224, 224) and the label map (1, 224, 224) of the seed's check."""
    setup_system(SystemConfig(seed=42))
    ground_truth = torch.zeros(1, 224, 224)
    ground_truth[:, :50, :50] = 1
    ground_truth[:, 50:100, 50:100] = 2
    prediction = torch.zeros(1, 3, 224, 224).uniform_().softmax(dim=1)
    return prediction, ground_truth


def loss_on(backend: str, prediction: Tensor, ground_truth: Tensor) -> float:
    """Return the loss of the seed's check on a backend."""
    device = route.device_of(backend)
    with use_backend(backend):
        return SoftDiceLoss(num_classes=3)(prediction.to(device), ground_truth.to(device)).item()


def trials(device: torch.device) -> list[tuple[str, str | None]]:
    """Try the passes of losses with Triton's kernels on a device: return the name of each and what fails, or None."""
    input, outcomes = torch.zeros(1, 3, 8, device=device), []
    labels, values = torch.zeros(1, 8, dtype=torch.long, device=device), torch.zeros_like(input)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for activation, target in (("softmax", labels), ("sigmoid", values), ("none", labels)):
            settings = Pass(activation=activation)
            kind = f"{str(dtype).removeprefix('torch.')} {activation}"
            outcomes.append((kind, selftest.problem(Request(input.to(dtype), target, settings=settings))))
    return outcomes


def check() -> None:
    """Repeat the seed's check, compare every backend with float64, try Triton's kernels. Exits with 1 if one is off."""
    prediction, ground_truth = seed_case()
    loss = loss_on("reference", prediction, ground_truth)
    exact = loss_on("reference", prediction.double(), ground_truth)
    print(f"Loss: {loss}")
    print(f"float64: {exact}")
    rows = [("reference float32", abs(loss - exact), f"{loss}")]
    for backend, missing in route.kernel_backends().items():
        if missing is not None:
            print(f"{backend}: not on this machine: {missing}")
            continue
        value = loss_on(backend, prediction, ground_truth)
        rows.append((f"{backend} float32", abs(value - exact), f"{value}"))
    failed = False
    for name, distance, shown in rows:
        right = distance <= TOLERANCE
        failed |= not right
        print(f"{name:18} {shown:20} distance to float64 {distance:.2e}  {'ok' if right else 'OFF'}")
    if route.triton_missing() is None:
        for kind, problem in trials(route.device_of("triton")):
            failed |= problem is not None
            print(f"triton trial of {kind:17} {'ok' if problem is None else 'OFF: ' + problem}")
    if failed:
        print(f"check: expected every backend within {TOLERANCE} of float64, got one that is off. Please report it.")
        raise typer.Exit(1)
