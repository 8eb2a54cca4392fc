"""`softdice info`: versions, devices, and which backend serves which."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex

import torch
import typer

from softdice.backends import route
from softdice.compat.nnunet_training import TRAINERS
from softdice.version import __version__

EXTRAS_OF_DEVELOPERS = ("dev", "docs")
COME_ALONG = ("triton", "jinja2", "pydicom")
"""Packages that this one uses where torch and highdicom bring them; no extra names them."""


def info(
    nnunet: bool = typer.Option(
        False, "--nnunet", help="Print only the line to export, so that nnU-Net finds the trainers of this package."
    ),
) -> None:
    """Show versions, devices, and which backend serves which device."""
    if nnunet:  # keep the folders that the variable lists already
        before = os.environ.get("nnUNet_extTrainer", "")  # noqa: SIM112 (nnU-Net's spelling)
        others = [path for path in before.split(os.pathsep) if path]
        paths = os.pathsep.join(dict.fromkeys([*others, str(TRAINERS)]))
        print(f"export nnUNet_extTrainer={shlex.quote(paths)}")
        return
    print(f"softdice {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    try:
        requirements = importlib.metadata.requires("softdice") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = ["numpy"]
        print("  not installed, but run from its source: the packages of the extras are not listed")
    for package in _packages(requirements):
        print(f"  {_version(package)}")
    print(f"CPU: {torch.get_num_threads()} threads")
    for device in range(torch.cuda.device_count()):
        print(f"CUDA {device}: {torch.cuda.get_device_name(device)}")
    print(f"Backend asked for: {route.asked()}")
    print(f"  auto: {'; '.join(route.automatic())}")
    print("  reference: any device")
    for backend, missing in route.kernel_backends().items():
        print(f"  {backend}: {'ready' if missing is None else 'not on this machine: ' + missing}")


def _packages(requirements: list[str]) -> list[str]:
    """Return the packages that users need beside torch, from the metadata's texts, as `typer>=0.12; extra == "cli"`."""
    names = []
    for requirement in requirements:
        extra = re.search(r"extra == ['\"](.+?)['\"]", requirement)
        if extra is None or extra[1] not in EXTRAS_OF_DEVELOPERS:
            names.append(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    return [name for name in dict.fromkeys([*names, *COME_ALONG]) if name not in ("torch", "softdice")]


def _version(package: str) -> str:
    """Return name and version of a package, the name as it spells itself, or "<package> not installed"."""
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"
    return f"{metadata['Name']} {metadata['Version']}"
