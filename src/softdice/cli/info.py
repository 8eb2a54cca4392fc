"""`softdice info`: versions, devices, and which backend serves which."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from softdice.kernels import registry
from softdice.version import __version__

PACKAGES = (
    "numpy", "numba", "triton", "torchmetrics", "lightning", "monai", "nibabel", "pillow", "tifffile", "nilearn",
    "scipy",
)  # fmt: skip


def info() -> None:
    """Show versions, devices, and which backend serves which device."""
    print(f"softdice {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for package in PACKAGES:
        print(f"  {package} {_version(package)}")
    print(f"CPU: {torch.get_num_threads()} threads")
    for device in range(torch.cuda.device_count()):
        print(f"CUDA {device}: {torch.cuda.get_device_name(device)}")
    print(f"Backend asked for: {registry.asked()}")
    print(f"  auto: {'; '.join(registry.automatic())}")
    print("  reference: any device")
    for backend, missing in registry.kernel_backends().items():
        print(f"  {backend}: {'ready' if missing is None else 'not on this machine: ' + missing}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
