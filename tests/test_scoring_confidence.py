"""softdice score --confidence: by hand, in every output, and with files that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
PIL_Image = pytest.importorskip("PIL.Image")
pytest.importorskip("scipy")

from commands import call, refused, score  # noqa: E402

from softdice.evaluation.table import Table  # noqa: E402
from softdice.scoring.confidence import Ranking, charts, rankings, read_confidence  # noqa: E402


def ranking(confidence: list[float], dice: list[float]) -> Ranking:
    return Ranking("", [f"m{i}" for i in range(len(dice))], np.array(confidence), np.array(dice))


def test_risk_and_coverage_by_hand() -> None:
    """Four masks, the surest first, of Dice 0.8, 1, 0.6, 0.4: what the first n lack, and their rank correlation."""
    four = ranking([0.9, 0.8, 0.7, 0.6], [0.8, 1.0, 0.6, 0.4])
    np.testing.assert_allclose(four.risk, [0.2, 0.1, 0.2, 0.3])
    np.testing.assert_allclose(four.best_risk, [0.0, 0.1, 0.2, 0.3])
    row = four.row()
    assert row["rank_correlation"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert row["risk_coverage_area"] == pytest.approx(0.2)
    assert row["risk_coverage_area_random"] == pytest.approx(0.3)
    assert row["risk_coverage_area_best"] == pytest.approx(0.15)
    assert four.line().startswith("Confidence: rank correlation 0.80 with the Dice of 4 masks")
    assert four.line().endswith("Mean Dice of the surest 2: 0.9000, of all: 0.7000.")


@pytest.mark.parametrize(("confidence", "dice"), [([0.9, 0.8], [0.5, 0.6]), ([0.5] * 4, [0.1, 0.2, 0.3, 0.4])])
def test_an_order_that_says_nothing(confidence: list[float], dice: list[float]) -> None:
    """Two masks, or equally sure ones, have no rank correlation; JSON has null."""
    assert math.isnan(ranking(confidence, dice).correlation)
    assert ranking(confidence, dice).row()["rank_correlation"] is None
    reason = "2 masks, for it takes 3" if len(dice) == 2 else "4 masks, for their confidence is equal"
    assert f"Confidence: no rank correlation with the Dice of {reason}. Mean Dice" in ranking(confidence, dice).line()
    assert "<circle" in charts(ranking(confidence, dice))


def test_a_class_without_a_column_and_masks_without_a_number() -> None:
    """Masks without a confidence, without a score or without a row are left out, of each class by itself."""
    counts = np.zeros((4, 3, 2), np.int64)
    counts[:, :, 0] = [[1, 1, 1], [1, 2, 2], [0, 0, 0], [1, 1, 3]]  # Dice 1, 0.5, none, 0.5
    counts[0, :, 1] = [1, 2, 2]
    names = [f"{name}.png" for name in "abcd"]
    table = Table((1, 2), counts, list("abcd"), [f"in/{name}" for name in names])
    rows = {
        "a.png": {"confidence": 0.7, "label 1": 0.9},
        "b.png": {"confidence": 0.9, "label 1": math.nan},
        "c.png": {"confidence": 0.8, "label 1": 0.8},
    }
    mean, first = rankings(table, rows)
    assert (mean.name, mean.masks, mean.dice.tolist()) == ("", ["b.png", "a.png"], [0.5, 0.75])
    assert (first.name, first.masks, first.dice.tolist()) == ("1", ["a.png"], [1.0])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return predictions that lack more and more rows of a square, its labels, and a confidence in the right order."""
    rows = ["mask,confidence,label 1"]
    for number in range(5):
        truth = np.zeros((20, 20), np.uint8)
        truth[4:14, 4:14] = 1
        mask = truth.copy()
        mask[4 : 4 + 2 * number] = 0
        for folder, array in (("p", mask), ("t", truth)):
            (tmp_path / folder).mkdir(exist_ok=True)
            PIL_Image.fromarray(array).save(tmp_path / folder / f"case{number}.png")
        rows.append(f"case{number}.png,{0.9 - number / 10},{0.9 - number / 10}")
    (tmp_path / "sure.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "p", tmp_path / "t", tmp_path / "sure.csv"


def test_every_output_says_it(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A perfect order: a line for people, a list in JSON, two charts with every mask in the report."""
    p, t, sure = folders
    out, page = tmp_path / "scores.json", tmp_path / "report.html"
    result = score(p, t, "--confidence", sure, "--out", out, "--report", page)
    assert "Confidence: rank correlation 1.00 with the Dice of 5 masks" in result.stderr
    mean, first = json.loads(out.read_text())["confidence"]
    assert (mean["name"], mean["masks"], mean["rank_correlation"]) == ("mean", 5, pytest.approx(1))
    assert mean["risk_coverage_area"] == pytest.approx(mean["risk_coverage_area_best"])
    assert mean["risk_coverage_area"] < mean["risk_coverage_area_random"]
    assert first["name"] == "1"
    html = page.read_text()
    assert "How sure and how right" in html
    assert all(f"<title>case{number}.png: confidence" in html for number in range(5))
    assert html.count("<polyline") == 3
    assert "How sure" not in (score(p, t, "--report", page, "--overwrite"), page.read_text())[1]


def test_several_predictions(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The confidence is that of the first predictions."""
    p, t, sure = folders
    result = score(t, t, "--versus", p, "--confidence", sure, "--format", "json")
    assert json.loads(result.stdout)["confidence"][0]["rank_correlation"] is None  # all are perfect


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("", "got no rows"),
        ("case,dice\na,1\n", "got case, dice"),
        ("mask,confidence\nother.png,0.5\n", "got 'other.png' first"),
        ("mask,confidence\ncase0.png,high\n", "could not convert string to float: 'high'"),
        ("mask,confidence\ncase0.png,0.5\ncase1.png,0.4\ncase0.png,0.3\n", "got 2 times 'case0.png'"),
        ("mask,confidence\ncase0.png,inf\n", "got inf"),
        ("mask;confidence\ncase0.png;0,5\n", "got mask;confidence. Pass"),
        (None, "No such file"),
        ("caf\xe9".encode("latin-1"), "expected a CSV file"),
    ],
)
def test_files_that_do_not_fit(
    content: str | bytes | None, got: str, folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """They are refused before anything is scored, and nothing is written."""
    p, t, sure = folders
    sure.unlink()
    if content is not None:
        sure.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = call("score", p, t, "--confidence", sure, "--out", tmp_path / "scores.csv")
    refused(result, "--confidence: expected", got)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["p", "t"] + ["sure.csv"] * (content is not None))


def test_empty_rows_are_no_rows(folders: tuple[Path, Path, Path]) -> None:
    """A spreadsheet leaves them behind."""
    p, t, sure = folders
    columns = sure.read_text().splitlines()[0].count(",")
    before = call("score", p, t, "--confidence", sure, "--format", "json").stdout
    with sure.open("a") as file:
        file.write(2 * f"{',' * columns}\n")
    result = call("score", p, t, "--confidence", sure, "--format", "json")
    assert (result.exit_code, result.stdout) == (0, before)


def test_a_row_is_about_one_mask(folders: tuple[Path, Path, Path]) -> None:
    """Of two masks of one name in two folders, a row does not say which."""
    p, t, sure = folders
    for side in (p, t):
        (side / "more").mkdir()
        (side / "more" / "case0.png").write_bytes((side / "case0.png").read_bytes())
    result = call("score", p, t, "--layout", "subfolders", "--confidence", sure)
    refused(result, "--confidence: expected names that differ in PREDICTIONS, got 2 times 'case0.png'")


def test_the_confidence_is_not_overwritten(folders: tuple[Path, Path, Path]) -> None:
    """--out on the file that is read is refused."""
    p, t, sure = folders
    before = sure.read_bytes()
    assert call("score", p, t, "--confidence", sure, "--out", sure, "--overwrite").exit_code == 2
    assert sure.read_bytes() == before


def test_a_spreadsheet_program_may_have_saved_it(folders: tuple[Path, Path, Path]) -> None:
    """A mark at the beginning of the file and other line ends are read, too."""
    p, _, sure = folders
    sure.write_bytes(b"\xef\xbb\xbf" + sure.read_bytes().replace(b"\n", b"\r\n"))
    assert read_confidence(sure, [p / "case0.png"])["case4.png"]["confidence"] == 0.5
