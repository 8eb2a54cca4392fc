"""torch.compile as the first use in a process: every public loss in a training step, every metric in validation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_cold import cases

SCRIPT = Path(__file__).parent / "compiled_cold.py"


@pytest.fixture(scope="module")
def ended() -> dict[str, str]:
    """Return what each case raised, "" if nothing: one process imports torch, and each case runs in a fork of it."""
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", cases())
def test_compiled_first_of_all(name: str, ended: dict[str, str]) -> None:
    """The compiler must not trace into what Numba compiles, SciPy or NumPy; the numbers are those of eager code."""
    assert not ended[name], ended[name]
