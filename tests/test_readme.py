"""README: its figures are the benchmarks', its lines for other libraries hold, nothing in it is a placeholder."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softdice.metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
METRICS = {name: getattr(softdice.metrics, name) for name in softdice.metrics.__all__}
DIFF = re.compile(r"^- (from [^\n]+)\n\+ (from [^\n]+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def summary() -> Any:
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("benchmarks.summary")
    finally:
        sys.path.remove(str(ROOT))


@pytest.mark.parametrize("part", ["step", "work"])
def test_the_figures_are_those_of_the_benchmarks(summary: Any, part: str) -> None:
    """`python -m benchmarks.summary` was run after the last measurement."""
    begin, end = getattr(summary, part.upper())
    assert README.split(begin)[1].split(end)[0].strip() == getattr(summary, f"{part}_table")()


def test_a_quotient_by_hand(summary: Any) -> None:
    """MONAI 265.698 ms, softdice 38.6766 ms: 6.87; a loop 15136.6 ms, 79.1936 ms: 191.1."""
    assert (summary.times(265.698, 38.6766), summary.times(15136.6, 79.1936)) == ("6.9", "191")


def test_every_library_has_its_line_and_its_place_on_the_page() -> None:
    migrating = (ROOT / "docs" / "migrating.md").read_text()
    places = [re.search(rf"^## {name}$", migrating, re.MULTILINE) for name in (
        "MONAI", "nnU-Net", "segmentation_models_pytorch", "torchmetrics", "MedPy",
    )]  # fmt: skip
    assert None not in places
    assert len(DIFF.findall(README)) == len(places)
    assert "docs/migrating.md" in README


@pytest.mark.parametrize(("theirs", "ours"), DIFF.findall(README))
def test_the_new_import_has_what_the_old_one_had(theirs: str, ours: str) -> None:
    exec(ours, names := {})
    old, new = (line.rpartition(" ")[2] for line in (theirs, ours))
    assert callable(names[new])
    assert old == new or (old, new) == ("hd95", "hausdorff_distance")
    library = theirs.split()[1].partition(".")[0]
    if library != "segmentation_models_pytorch":  # it needs torchvision, which is not here; peers.py has its losses
        exec(theirs, {})


def test_no_placeholder_and_no_name_that_is_not_ours() -> None:
    """The package is on no index: `pip install softdice` would bring whatever someone else puts there."""
    assert "OWNER" not in (ROOT / "pyproject.toml").read_text()
    pages = [*(ROOT / "docs").rglob("*.md")]
    texts = [ROOT / "README.md", *pages, ROOT / "examples" / "soft_dice_loss.md"]
    wrong = [text.name for text in texts if re.search(r"pip install (?:-\S+ )*['\"]?softdice", text.read_text())]
    assert wrong == []


def rows(library: str) -> list[tuple[str, str]]:
    section = (ROOT / "docs" / "migrating.md").read_text().split(f"\n## {library}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| [^`|]+ \| `([^`]+)` \| `([^`]+)` \|$", section, re.MULTILINE)


@pytest.mark.filterwarnings("ignore:DiceScore metric currently defaults to:UserWarning")  # it did; micro says so still
@pytest.mark.parametrize(("theirs", "ours"), rows("torchmetrics"))
def test_torchmetrics_row(theirs: str, ours: str) -> None:
    import torchmetrics.segmentation

    generator = torch.Generator().manual_seed(0)
    prediction, labels = torch.randint(3, (2, 4, 12, 14), generator=generator)
    for each in (prediction, labels):
        each[0][each[0] == 2] = 1  # the first sample lacks a class
    words = {"C": 3}
    peer = eval(theirs.replace(")", ', input_format="index")'), {**vars(torchmetrics.segmentation), **words})
    metric = eval(ours, {**METRICS, **words})
    for each in (peer, metric):
        each.update(prediction, labels)
    torch.testing.assert_close(metric.compute().float(), peer.compute(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("theirs", "ours"), rows("MedPy"))
def test_medpy_row(theirs: str, ours: str) -> None:
    from medpy.metric import binary

    prediction, label = np.zeros((2, 20, 24, 12), bool)
    label[5:15, 6:18, 3:9] = prediction[6:16, 6:18, 3:10] = prediction[2, 2, 2] = True
    names = {"prediction": prediction, "label": label, "spacing": (0.7, 0.7, 3.0)}
    expected = eval(theirs, {**vars(binary), **names})
    assert eval(ours, {**METRICS, **names}).item() == pytest.approx(expected, rel=1e-9)


def test_both_tables_have_rows() -> None:
    assert (len(rows("torchmetrics")), len(rows("MedPy"))) == (8, 4)


def test_every_program_has_a_colour_of_its_own(summary: Any) -> None:
    pictures = importlib.import_module("benchmarks.pictures")
    losses = importlib.import_module("benchmarks.losses")
    contenders = {row["contender"] for row in summary.publish.kept("losses")} - {"softdice uint8"}
    assert len({pictures.colour(losses.label(name)) for name in contenders}) == len(contenders) == 7
    assert pictures.colour("conv + MONAI DiceLoss") == pictures.colour("MONAI") != pictures.colour("FusedHead")
    assert pictures.colour("interpolate + SoftDiceLoss") == pictures.colour("softdice")
