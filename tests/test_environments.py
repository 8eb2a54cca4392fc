"""Machines that lack something: what serves there, and what is said."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import softdice
from softdice.kernels import registry

WITHOUT = """
import importlib.util, sys
found = importlib.util.find_spec
gone = sys.argv[1].split(",")
importlib.util.find_spec = lambda name, *rest: None if name in gone else found(name, *rest)
for name in gone:
    sys.modules[name] = None
"""
"""Packages named in the first argument are missing, as far as Python can see."""

LOSS = """
import torch, softdice
logits = torch.linspace(-3, 3, 3 * 20000).view(1, 3, 20000).requires_grad_()
loss = softdice.SoftDiceLoss(3, activation="softmax")(logits, torch.arange(20000).view(1, -1) % 3)
loss.backward()
print(f"{loss.item():.5f} {logits.grad.abs().sum().item():.4f}")
"""
"""Enough elements for the CPU kernel."""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def said(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_processor_without_any_extension(tmp_path: Any) -> None:
    """Numba's "generic" has no conversion of half precision: code that names one aborts the process."""
    for dtype in ("float32", "float16"):
        code = LOSS.replace(".requires_grad_()", f".to(torch.{dtype}).requires_grad_()")
        generic = said(python(code, NUMBA_CPU_NAME="generic", NUMBA_CACHE_DIR=str(tmp_path))).split()
        reference = said(python(code, SOFTDICE_BACKEND="reference")).split()
        assert [float(number) for number in generic] == pytest.approx([float(number) for number in reference], rel=3e-3)


def test_a_long_sum_keeps_its_digits_with_few_lanes(tmp_path: Any) -> None:
    """The bound of `test_many_voxels_lose_no_accuracy`: fewer lanes must not mean longer sums in each."""
    code = """
import torch, softdice
voxels = 2**22 + 1
input = torch.full((1, 1, voxels), 0.1)
stats = softdice.overlap_statistics(input, torch.ones(1, voxels, dtype=torch.uint8), fields=("intersection",))
print(stats.intersection.double().item() / (voxels * torch.tensor(0.1).double().item()) - 1)
"""
    off = said(python(code, NUMBA_CPU_NAME="generic", NUMBA_CACHE_DIR=str(tmp_path), SOFTDICE_BACKEND="cpu"))
    assert abs(float(off)) <= 2.4e-7


def test_numba_that_may_not_compile() -> None:
    off = {"NUMBA_DISABLE_JIT": "1"}
    assert said(python(LOSS, **off)) == said(python(LOSS, SOFTDICE_BACKEND="reference"))
    code = "from softdice.cli import main; main()"
    shown = said(python(code, "info", **off))
    assert "  cpu: not on this machine: NUMBA_DISABLE_JIT=1 keeps numba from compiling" in shown
    assert "to 'cpu'" not in shown
    run = python(LOSS, SOFTDICE_BACKEND="cpu", **off)
    assert "the 'cpu' backend serves, got a case that it does not: NUMBA_DISABLE_JIT=1" in run.stderr
    assert said(python(LOSS, NUMBA_DISABLE_JIT="0")).startswith("1.")
    scores = (
        "import torch, softdice; print(softdice.dice_score(torch.tensor([0, 1]), torch.tensor([1, 1]), 2).tolist())"
    )
    assert said(python(scores, **off)) == said(python(scores))


def test_info_promises_what_there_is() -> None:
    shown = said(python(WITHOUT + "sys.argv[1:2] = ['info']\nfrom softdice.cli import main; main()", "numba"))
    assert "  auto: all inputs go to 'reference'\n" in shown or torch.cuda.is_available()
    assert "'cpu'" not in shown
    assert "cpu: not on this machine: numba is not installed" in shown


def test_without_torchmetrics() -> None:
    code = WITHOUT + (
        "import softdice, softdice.metrics\n"
        "from softdice import *\n"
        "from softdice.metrics import *\n"
        "assert SoftDiceLoss is softdice.SoftDiceLoss and surface_dice\n"
        "print(hasattr(softdice, 'DiceScore'), hasattr(softdice.metrics, 'SurfaceDice'))\n"
        "try:\n    softdice.JaccardScore\nexcept AttributeError as error:\n    print(error)\n"
        "from softdice import DiceScore\n"
    )
    run = python(code, "torchmetrics")
    text = "expected torchmetrics to be installed, got no such package. Run: pip install 'softdice[metrics]'"
    assert run.stdout.splitlines() == ["False False", f"softdice.JaccardScore: {text}"]
    assert run.stderr.splitlines()[-1] == f"ModuleNotFoundError: softdice.DiceScore: {text}"
    assert run.stderr.count("expected torchmetrics") == 1


@pytest.mark.parametrize(
    "command, names, extra",
    [
        ("train", "typer, rich, lightning, monai, matplotlib", "train"),
        ("predict", "typer, rich, monai", "train"),
        ("score", "typer, rich", "score"),
        ("info", "typer, rich", "cli"),
    ],
)
def test_a_command_names_all_that_it_misses(command: str, names: str, extra: str) -> None:
    code = WITHOUT + f"sys.argv[1:] = [{command!r}]\nfrom softdice.cli import main; main()"
    run = python(code, names.replace(" ", ""))
    assert run.returncode == 2
    caller = "softdice" if command == "info" else f"softdice {command}"
    advice = f"Run: pip install 'softdice[{extra}]'"
    assert run.stderr == f"{caller}: expected {names} to be installed, got no such packages. {advice}\n"


def test_meta_tensors_have_shapes_and_no_values() -> None:
    logits = torch.empty(2, 3, 8, 200, 200, device="meta", requires_grad=True)
    weight = torch.empty(2, 8, 200, 200, device="meta")
    for labels in (torch.empty(2, 8, 200, 200, dtype=torch.long, device="meta"), weight, logits.detach()):
        loss = softdice.SoftDiceLoss(3, activation="softmax", absent="skip", class_weight=[1, 2, 3]).to("meta")
        value = loss(logits, labels, voxel_weight=weight)
        assert (value.is_meta, value.shape) == (True, ())
        (gradient,) = torch.autograd.grad(value, logits)
        assert (gradient.is_meta, gradient.shape) == (True, logits.shape)
    loss = softdice.JaccardLoss(3, activation="none", reduction="none", pooling="sample")
    assert loss(logits, labels).shape == (2, 3)
    head = softdice.FusedHead(torch.nn.Conv2d(5, 3, 1, device="meta"), softdice.SoftDiceLoss(3, activation="softmax"))
    features = torch.empty(2, 5, 9, 9, device="meta")
    assert head(features, torch.empty(2, 9, 9, dtype=torch.long, device="meta")).shape == ()


def test_what_compiles_says_so_and_what_waits_does_not(tmp_path: Any) -> None:
    notice = "softdice: compiling the CPU kernel for this machine (once; it is kept for the next process)\n"
    places = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert python(LOSS, **places).stderr == notice  # both directions, one line
    assert python(LOSS, **places).stderr == ""
    other = {"NUMBA_CACHE_DIR": str(tmp_path / "other")}
    assert python(LOSS, LOCAL_RANK="1", **other).stderr == ""


def test_xpu_and_rocm_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry, "_HAS_TRITON", True)
    words = "; ".join(registry.automatic())
    assert "'triton'" not in words
    assert "ROCm inputs go to 'reference', since no kernel is checked there" in words
    assert "XPU inputs go to 'reference'" in words
    assert registry.kernel_backends()["triton"] == "the kernels are not checked on ROCm"
