"""The Triton backend without a GPU: its kernels under Triton's interpreter, and who is served by them.

Triton reads TRITON_INTERPRET when it is imported, so the tests that run kernels stand in interpreted_triton.py and
get a process of their own. A machine with Linux and no triton fails here, once.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import softdice
from softdice.backends import route
from softdice.statistics.request import Pass, Request

INTERPRETED = Path(__file__).with_name("interpreted_triton.py")


@pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
def test_triton_is_here() -> None:
    importlib.import_module("triton")


@pytest.mark.skipif(not route._HAS_TRITON, reason="no triton: test_triton_is_here fails where it should be there")
def test_the_kernels_under_the_interpreter() -> None:
    """A representative set; `make test-triton` runs the rest."""
    command = [sys.executable, "-m", "pytest", str(INTERPRETED), "-q", "-m", "not triton", "-p", "no:cacheprovider"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 60
    assert "skipped" not in run.stdout


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with softdice.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 was not set"):
        softdice.overlap_statistics(torch.rand(1, 2, 4), torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_needs_a_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=INTERPRETED.parent.parent)
    assert run.returncode == 1
    assert "expected a CUDA device, got none" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_reason_why_it_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    missing = route.kernel_backends()["triton"]
    assert missing is not None
    assert "no CUDA device" in missing or "not installed" in missing
    monkeypatch.setattr(route, "_HAS_TRITON", False)
    missing = route.kernel_backends()["triton"]
    assert missing is not None
    assert "not installed" in missing


def test_assertions_on_a_device_carry_the_message() -> None:
    """The path of CUDA tensors, which a CPU tensor can take: what is asserted, and the text."""
    cuda = pytest.importorskip("softdice.backends.cuda.driver")
    settings = Pass(activation="softmax", fields=("target",))
    request = Request(torch.rand(1, 2, 4), torch.zeros(1, 4, dtype=torch.long), settings=settings)
    cuda.assert_in_range(torch.zeros(3, 4, dtype=torch.int32), request)
    bad = torch.zeros(3, 4, dtype=torch.int32)
    bad[1, 0] = 5
    with pytest.raises(RuntimeError, match=r"softdice: expected target with labels in \[0, 2\), got values outside"):
        cuda.assert_in_range(bad, request)
    bad[1, 0], bad[2, 2] = 0, 1
    cuda.assert_in_range(bad, request)  # logits have no range
    with pytest.raises(RuntimeError, match="probabilities in"):
        cuda.assert_in_range(bad, request._replace(settings=replace(settings, activation="none")))
