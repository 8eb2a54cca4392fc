"""The notebook runs from top to bottom without a warning, and gives the numbers that stand in it."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import notebook_outputs as notebook
import numpy as np
import pytest
from nbformat import NotebookNode
from PIL import Image

NUMBER = re.compile(r"[-+]?\b\d+(?:\.\d+)?(?:e[-+]?\d+)?\b")
ROUNDING = 1e-6
"""Of numbers that do not hang on training, relative: another order of a float32 sum, and no more."""
TRAINED = 0.04
"""Of a Dice after training, absolute: rounding that differs between processors grows from step to step."""


@pytest.fixture(scope="module")
def kept() -> NotebookNode:
    return nbformat.read(notebook.NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def run() -> NotebookNode:
    return notebook.executed()


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.get("outputs", ()) if output.output_type == "stream")


def pictures(cell: NotebookNode) -> list[str]:
    shown = (output.data for output in cell.get("outputs", ()) if output.output_type == "display_data")
    return [data["image/png"] for data in shown]


def differences(before: str, after: str, trained: bool = False) -> list[str]:
    """Yield what differs: text between the numbers, and numbers further apart than rounding explains."""
    if NUMBER.sub("#", before) != NUMBER.sub("#", after):
        return [f"{before!r} became {after!r}"]
    found = []
    for old, new in zip(NUMBER.findall(before), NUMBER.findall(after), strict=True):
        mantissa, _, exponent = old.partition("e")
        digits = len(mantissa.partition(".")[2])
        last = 10.0 ** (int(exponent or 0) - digits) if digits else 0.0
        if abs(float(new) - float(old)) > max(
            1.01 * last, TRAINED if trained and digits else ROUNDING * abs(float(old))
        ):
            found.append(f"{old} became {new}")
    return found


def test_the_text_is_that_of_the_notebook(kept: NotebookNode) -> None:
    """`make notebook` was run after the last change."""
    text = notebook.written()
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.cell_type, cell.source) for cell in text.cells
    ]


def test_the_notebook_gives_its_numbers(kept: NotebookNode, run: NotebookNode) -> None:
    wrong = {
        cell.source: found
        for before, cell in zip(kept.cells, run.cells, strict=True)
        if (found := differences(printed(before), printed(cell), "trained" in cell.metadata.get("tags", ())))
    }
    assert wrong == {}
    assert [len(pictures(cell)) for cell in run.cells] == [len(pictures(cell)) for cell in kept.cells]


def test_the_check_has_the_documents_bits(kept: NotebookNode, run: NotebookNode) -> None:
    for cells in (kept.cells, run.cells):
        assert (
            sum("Loss: 1.8738912343978882\n" in printed(cell) for cell in cells) == 2
        )  # softdice's and the document's


def test_nothing_goes_to_stderr(kept: NotebookNode, run: NotebookNode) -> None:
    outputs = [output for cells in (kept.cells, run.cells) for cell in cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}


def test_a_number_that_differs_is_found() -> None:
    assert differences("Loss: 1.8738912343978882", "Loss: 1.8738911151885986") == []
    assert differences("Loss: 1.8738912343978882", "Loss: 1.8738812343978882") != []
    assert differences("Dice 0.87, 616 pixels", "Dice 0.88, 616 pixels") == []
    assert differences("Dice 0.87, 616 pixels", "Dice 0.89, 616 pixels") == ["0.87 became 0.89"]
    assert differences("Dice 0.87, 616 pixels", "Dice 0.87, 617 pixels") == ["616 became 617"]
    assert differences("slope 2.50e-05", "slope 2.53e-05") == ["2.50e-05 became 2.53e-05"]
    assert differences("Dice 0.87, 40 images", "Dice 0.84, 40 images", trained=True) == []
    assert differences("Dice 0.87, 40 images", "Dice 0.82, 41 images", trained=True) == [
        "0.87 became 0.82",
        "40 became 41",
    ]
    assert differences("benchmark True", "benchmark False") != []


def test_it_is_small(kept: NotebookNode) -> None:
    assert len(kept.cells) <= 40
    assert notebook.NOTEBOOK.stat().st_size <= 2_000_000


def test_pictures_stand_on_white(kept: NotebookNode) -> None:
    """Opaque, so that their dark lettering can be read on a dark page."""
    drawn = [picture for cell in kept.cells for picture in pictures(cell)]
    assert len(drawn) == 7
    for picture in drawn:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGBA"))
        assert (pixels[..., 3] == 255).all()
        assert (pixels[0] == 255).all()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Numba is there, all else is missing; what pip would be asked for, from the folder of examples."""
    asked: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name != "numba" else object())
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    return asked


def install() -> None:
    first = next(cell for cell in notebook.written().cells if cell.cell_type == "code")
    exec(first.source, {})


def test_the_first_cell_installs_what_is_missing(commands: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "src" / "softdice").mkdir(parents=True)
    install()
    assert commands == [[sys.executable, "-m", "pip", "install", "--quiet", str(tmp_path), "matplotlib"]]


def test_outside_a_copy_no_name_is_installed(commands: list[list[str]]) -> None:
    """The name is on no index: whoever claims it there would be installed."""
    with pytest.raises(SystemExit, match=r"^softdice is not installed\. Run this notebook in a copy"):
        install()
    assert commands == []
