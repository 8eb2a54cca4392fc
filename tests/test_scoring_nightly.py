"""softdice score as who runs it every night sees it: infinite distances, penalties, few cases, several models."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("scipy")
nib = pytest.importorskip("nibabel")

from commands import refused, score  # noqa: E402

from softdice.evaluation.averages import intervals, quantiles  # noqa: E402

INF, NAN = float("inf"), float("nan")
SPACING = (1.0, 2.0, 3.0)


def saved(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    nib.Nifti1Image(array, np.diag([*SPACING, 1.0])).to_filename(path)
    return path


def cube(shift: int = 0) -> np.ndarray:
    """A cube of 4 voxels a side, shifted along the first axis: HD 1 mm for each voxel."""
    mask = np.zeros((16, 10, 8), np.uint8)
    mask[3 + shift : 7 + shift, 3:7, 2:6] = 1
    return mask


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., list[Path]]:
    """Shifts of each side, None for an empty prediction -> folders, the reference last."""

    def made(*sides: list[int | None]) -> list[Path]:
        for number, shifts in enumerate(sides):
            for case, shift in enumerate(shifts):
                array = cube() * 0 if shift is None else cube(shift)
                saved(tmp_path / f"side {number}" / f"case {case}.nii.gz", array)
                saved(tmp_path / "t" / f"case {case}.nii.gz", cube())
        return [*(tmp_path / f"side {number}" for number in range(len(sides))), tmp_path / "t"]

    return made


def result(*arguments: object) -> dict[str, Any]:
    done = score(*arguments, "--format", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout, parse_constant=lambda word: pytest.fail(word))


def test_distances_of_empty_predictions(folders: Callable[..., list[Path]], tmp_path: Path) -> None:
    """Shifts of 1, 2, 3, 4, 1 and two empty predictions: HD95 1, 1, 2, 3, 4, inf, inf."""
    p, t = folders([1, 2, None, 3, 4, None, 1])
    found = result(p, t, "--surface", "1mm")["results"][0]
    (row,) = found["classes"]
    assert row["hd95"] == pytest.approx(11 / 5)
    assert row["hd95_median"] == pytest.approx(3)
    assert row["hd95_quartiles"] == ["inf" if math.isinf(q) else pytest.approx(q) for q in (1.5, INF)]
    assert (row["hd95_infinite"], row["mean_distance_infinite"]) == (2, 2)
    assert found["overall"]["macro_hd95"] == pytest.approx(11 / 5)
    assert found["overall"]["hd95_infinite"] == 2
    assert [case["classes"][0]["hd95"] for case in found["cases"]].count("inf") == 2
    shown = score(p, t, "--surface", "1mm", "--report", tmp_path / "r.html").stdout
    assert "HD95 inf" in shown
    assert " 2.20 " in shown
    assert "1.50 .. inf" in shown
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    head = page[page.index("<thead>") : page.index("</thead>")]
    order = [head.index(f">{name}</span>") for name in ("Dice", "HD95", "HD95 inf", "surface Dice", "IoU")]
    assert order == sorted(order)
    rows = [
        *csv.DictReader(io.StringIO(score(p, t, "--surface", "1mm", "--format", "csv", "--rows", "classes").stdout))
    ]
    assert float(rows[0]["hd95"]) == pytest.approx(11 / 5)
    assert rows[0]["hd95_infinite"] == "2"
    summary = json.loads(score(p, t, "--surface", "1mm", "--format", "nnunet").stdout)
    assert summary["mean"]["1"]["hd95"] == pytest.approx(11 / 5)
    assert summary["mean"]["1"]["hd95_infinite"] == 2


@pytest.mark.parametrize(
    "penalty, unit, worst",
    [
        ("374", "mm", 374), ("12.5", "mm", 12.5), ("0", "mm", 0),
        ("diagonal", "mm", math.hypot(16, 20, 24)), ("diagonal", "px", math.hypot(16, 10, 8)), ("inf", "mm", INF),
    ],
)  # fmt: skip
def test_a_penalty_for_what_is_missed(
    penalty: str, unit: str, worst: float, folders: Callable[..., list[Path]]
) -> None:
    p, t = folders([2, None, 2])
    found = result(p, t, "--surface", f"1{unit}", "--penalty", penalty)["results"][0]
    each = [case["classes"][0]["hd95"] for case in found["cases"]]
    assert each == [2, "inf" if math.isinf(worst) else pytest.approx(worst), 2]
    assert found["classes"][0]["hd95"] == pytest.approx(2 if math.isinf(worst) else (4 + worst) / 3)
    assert found["classes"][0]["hd95_infinite"] == (1 if math.isinf(worst) else 0)
    assert [case["classes"][0]["surface_dice"] for case in found["cases"]][1] == 0
    named = result(p, t, "--surface", f"1{unit}", "--penalty", penalty, "--regions", "all=1,2")["results"][0]
    assert [case["classes"][0]["hd95"] for case in named["cases"]] == each


@pytest.mark.parametrize(
    "options, said",
    [
        (("--penalty", "374"), "--penalty: expected --surface with it, got none"),
        (("--surface", "1mm", "--penalty", "far"), "--penalty: expected a distance in the unit of --surface, diagonal"),
        (("--surface", "1mm", "--penalty", "-1"), "got '-1'. Example: 374"),
    ],
)
def test_penalties_that_are_none(options: tuple[str, ...], said: str, folders: Callable[..., list[Path]]) -> None:
    refused(score(*folders([1]), *options), said)


def test_pairs_of_distances_are_counted(folders: Callable[..., list[Path]]) -> None:
    """The first misses cases 0 and 1, the second 1, 2 and 3: 4 of 8 pairs are left, all with a difference of 1."""
    p, q, t = folders([None, None, 1, 2, 2, 2, 2, 3], [1, None, None, None, 1, 1, 1, 2])
    comparison = result(p, t, "--surface", "1mm", "--versus", q)["comparison"]
    (row,) = comparison["classes"]
    assert (row["cases"], row["hd95_cases"], row["hd95_infinite"]) == (8, 4, [2, 3])
    assert row["hd95_difference"] == pytest.approx(1)
    assert row["hd95_difference_95"] == [None, None]
    assert "surface_dice_infinite" not in row
    shown = score(p, t, "--surface", "1mm", "--versus", q).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("│ HD95: 1")]
    assert line.replace("│", " ").split() == ["HD95:", "1", "+1.00", "-", "4", "2", "+", "3", "0.125"]


@pytest.mark.parametrize("cases", [1, 2, 4, 5, 6])
def test_no_interval_of_fewer_than_five_cases(cases: int, folders: Callable[..., list[Path]]) -> None:
    p, t = folders([case % 3 for case in range(cases)])
    found = result(p, t)["results"][0]
    for interval in (found["classes"][0]["dice_95"], found["overall"]["macro_dice_95"]):
        assert (interval == [None, None]) == (cases < 5)
    assert ("95 % interval" in score(p, t).stdout) == (cases > 1)


def test_each_class_needs_five_cases_for_its_interval() -> None:
    values = np.array([[0.1, 0.2], [0.2, 0.3], [0.3, NAN], [0.5, 0.7], [0.4, NAN], [0.6, 0.1]])
    of_classes, of_all = intervals(values)
    assert np.isnan(of_classes).tolist() == [[False, True]] * 2
    assert not np.isnan(of_all).any()
    assert np.isnan(intervals(np.where(np.arange(6)[:, None] < 4, values, NAN))[1]).all()


def test_quantiles_of_infinite_distances() -> None:
    columns = np.array([[1, INF, INF], [2, 1, NAN], [3, 2, INF], [INF, 3, NAN], [INF, NAN, INF]])
    expected = [[2, 1.75, INF], [3, 2.5, INF], [INF, INF, INF]]
    np.testing.assert_array_equal(quantiles(columns, (0.25, 0.5, 0.75)), expected)


def test_one_case_has_no_interval_and_nothing_to_pool(folders: Callable[..., list[Path]], tmp_path: Path) -> None:
    p, t = folders([1])
    done = score(p, t, "--surface", "1mm", "--report", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    for text in (done.stdout, page[page.index("<h1>") : page.index("<footer>")]):
        for word in ("95 % interval", "pooled", "median", "quartiles", "SD"):
            assert word not in text
    assert "HD95" in done.stdout


@pytest.mark.parametrize("layout", ["files", "subfolders", "classes"])
def test_folders_without_one_common_name(layout: str, tmp_path: Path) -> None:
    for number in range(3):
        for side, name in (("p", f"{number}_pred"), ("t", f"{number}")):
            if layout == "classes":
                name += "/liver"
            (tmp_path / side / name).parent.mkdir(parents=True, exist_ok=True)
            saved(tmp_path / side / f"{name}.nii.gz", cube())
    for more in ((), ("--missing", "0")):
        done = score(tmp_path / "p", tmp_path / "t", "--layout", layout, *more)
        refused(done, "expected files of one name in both folders, got none: 3 in", "such as 0_pred", "such as 0")
        assert done.stdout == ""


def test_a_line_says_what_was_done(folders: Callable[..., list[Path]], tmp_path: Path) -> None:
    p, q, t = folders([0, 0, 0, 0, 0], [2, 2, 2, 2, 2])
    out, page = tmp_path / "scores.csv", tmp_path / "r.html"
    done = score(p, t, "--out", out, "--report", page)
    assert done.stderr.splitlines()[-1] == (
        f"5 cases, mean Dice 1.0000 (95 % interval 1.0000 .. 1.0000). Scores: {out}. Report: {page}."
    )
    done = score(p, t, "--versus", q, "--out", out)
    assert f"5 cases, mean Dice {p} 1.0000 (95 % interval 1.0000 .. 1.0000), {q} 0.5000 (" in done.stderr
    assert "cases, mean Dice" not in score(p, t).stderr


def test_several_models_have_one_table_first(folders: Callable[..., list[Path]], tmp_path: Path) -> None:
    """Dice 1/2 for a shift of 2, 3/4 for 1, 1 for none; best first, failures beside them."""
    p, q, r, t = folders([2] * 6, [0] * 5 + [None], [1] * 6)
    (r / "case 5.nii.gz").unlink()
    page = tmp_path / "r.html"
    done = score(p, t, "--versus", q, "--versus", r, "--surface", "1mm", "--report", page)
    assert done.exit_code == 1
    table = done.stdout[: done.stdout.index("└")].splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if line.startswith("│")]
    columns = [cell.strip() for cell in next(line for line in table if line.startswith("┃")).split("┃")[1:-1]]
    named = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["mean rank"] for row in named] == sorted(row["mean rank"] for row in named)
    by_name = {row["predictions"]: row for row in named}
    assert [by_name[str(side)]["Dice"] for side in (p, q, r)] == ["0.5000", "0.8333", "0.7500"]
    assert [by_name[str(side)]["HD95 inf"] for side in (p, q, r)] == ["0", "1", "0"]
    assert [by_name[str(side)]["not scored"] for side in (p, q, r)] == ["0", "0", "1"]
    assert columns.index("HD95") < columns.index("pooled Dice")
    text = page.read_text(encoding="utf-8")
    assert text.index("All predictions") < text.index("<table>")
    assert text.count("<tr>") > 3
    links = [part.partition("'")[0] for part in text.split("href='#")[1:]]
    assert links
    for link in links:
        assert f"<h2 id='{link}'>" in text
    assert "mean of the finite ones" in text
