"""`softdice info`: versions, devices, and which backend serves which."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex

import torch
import typer

from softdice.backends import route
from softdice.compat.nnunet_training import TRAINERS
from softdice.version import __version__

PACKAGES = (
    "numpy", "numba", "triton", "torchmetrics", "lightning", "monai", "nibabel", "pillow", "tifffile", "nilearn",
    "scipy",
)  # fmt: skip


def info(
    nnunet: bool = typer.Option(
        False, "--nnunet", help="Print only the line to export, so that nnU-Net finds the trainers of this package."
    ),
) -> None:
    """Show versions, devices, and which backend serves which device."""
    if nnunet:
        before = os.environ.get("nnUNet_extTrainer", "")  # noqa: SIM112 (nnU-Net's spelling)
        others = [path for path in before.split(os.pathsep) if path]
        paths = os.pathsep.join(dict.fromkeys([*others, str(TRAINERS)]))
        print(f"export nnUNet_extTrainer={shlex.quote(paths)}")
        return
    print(f"softdice {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for package in PACKAGES:
        print(f"  {package} {_version(package)}")
    print(f"CPU: {torch.get_num_threads()} threads")
    for device in range(torch.cuda.device_count()):
        print(f"CUDA {device}: {torch.cuda.get_device_name(device)}")
    print(f"Backend asked for: {route.asked()}")
    print(f"  auto: {'; '.join(route.automatic())}")
    print("  reference: any device")
    for backend, missing in route.kernel_backends().items():
        print(f"  {backend}: {'ready' if missing is None else 'not on this machine: ' + missing}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
