"""The examples run, their loss falls, and each is short and one line away from the loss that it replaces."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {"plain_pytorch": 25, "monai_unet": 8, "lightning_module": 2, "fused_head": 8, "upsampled": 20}
"""What `main` of each is given here."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_example(name: str) -> None:
    history = load(name).main(SHORT[name])
    assert sum(history[-3:]) < 0.9 * sum(history[:3])


@pytest.mark.parametrize("name", SHORT)
def test_example_is_short_and_one_line_away(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) < 80
    old = [number for number, line in enumerate(lines) if line.strip().startswith("# ") and "Loss" in line]
    assert len(old) == 1
    new = lines[old[0] + 1]
    assert "softdice" in new or "SoftDiceLoss" in new
