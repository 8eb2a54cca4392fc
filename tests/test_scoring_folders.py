"""Scores of folders in Python, and results that pandas takes."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
nib = pytest.importorskip("nibabel")

from commands import score  # noqa: E402

from softdice.scoring import ScoreError, score_folders  # noqa: E402


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Six cases of two classes; the first lacks a prediction of class 2, the second has class 2 in neither."""
    rng = np.random.default_rng(0)
    for case in range(6):
        t = np.zeros((9, 8, 7), np.uint8)
        t[1:4, 1:6, 1:5], t[6:8, 2:6, 2:4] = 1, 2
        if case == 1:
            t[t == 2] = 0
        p = np.where(rng.random(t.shape) < 0.1, 0, t).astype(np.uint8)
        if case == 0:
            p[p == 2] = 0
        for side, array in (("p", p), ("t", t)):
            (tmp_path / side).mkdir(exist_ok=True)
            nib.Nifti1Image(array, np.diag([1.0, 1, 2, 1])).to_filename(tmp_path / side / f"case {case}.nii.gz")
    return tmp_path / "p", tmp_path / "t"


def test_the_rows_are_those_of_the_command(folders: tuple[Path, Path]) -> None:
    found = score_folders(*folders, labels={"liver": 1, "tumour": 2}, metrics=["precision"], surface="1mm")
    options = ("--labels", "liver=1,tumour=2", "--metrics", "precision", "--surface", "1mm")
    content = json.loads(score(*folders, *options, "--format", "json").stdout)["results"][0]
    expected = [{"case": case["case"], **row} for case in content["cases"] for row in case["classes"]]
    words = {None: math.nan, "inf": math.inf}
    assert len(found) == 12
    for row, other in zip(found, expected, strict=True):
        assert list(row) == list(other)
        for key, value in other.items():
            assert row[key] == pytest.approx(words.get(value, value), nan_ok=True)
    assert [row["hd95"] for row in found].count(math.inf) == 1
    assert math.isnan(found[3]["dice"])
    assert found.overall["macro_dice"] == content["overall"]["macro_dice"]
    assert [row["name"] for row in found.classes] == ["liver", "tumour"]
    assert [row["dice_95_low"] for row in found.classes] == [row["dice_95"][0] for row in content["classes"]]
    assert found.errors == []


def test_numbers_and_dicts_stand_for_texts(folders: tuple[Path, Path]) -> None:
    pairs = [
        ({"labels": [1, 2]}, {"labels": "1,2"}),
        ({"regions": {"whole": [1, 2], "core": [2]}}, {"regions": "whole=1,2; core=2"}),
        ({"ignore": 2}, {"ignore": "2"}),
        ({"ignore": [2, 9], "labels": (1,)}, {"ignore": "2,9", "labels": "1"}),
        ({"surface": "1mm", "penalty": 20.5}, {"surface": "1mm", "penalty": "20.5"}),
        ({"surface": "1mm", "penalty": 1e16}, {"surface": "1mm", "penalty": "10000000000000000"}),
        ({"labels": np.array([1, 2]), "ignore": {9}}, {"labels": "1,2", "ignore": "9"}),
        (
            {"lesions": True, "matching": np.float32(0.25), "empty": 1},
            {"lesions": True, "matching": "0.25", "empty": "1"},
        ),
        ({"missing": 0, "empty": math.nan}, {"missing": "0"}),
        ({"labels": {"liver": [1], "tumour": np.uint8(2)}}, {"labels": "liver=1,tumour=2"}),
        ({"surface": np.array("1mm").item(), "penalty": np.array(20.5)}, {"surface": "1mm", "penalty": "20.5"}),
    ]
    for plain, text in pairs:
        one, other = score_folders(*folders, **plain), score_folders(str(folders[0]), str(folders[1]), **text)  # type: ignore[arg-type]
        assert repr([*one]) == repr([*other])
        assert one
    with pytest.raises(ScoreError, match=r"--labels: expected numbers, name=number or a \.json file"):
        score_folders(*folders, labels="liver")
    for wrong, text in (
        ({"labels": {"both": [1, 2], "core": 2}}, "labels: expected one number for each name, got several for 'both'"),
        ({"surface": 2}, "--surface: expected a tolerance in mm or px"),
        ({"layout": "folders"}, "--layout: expected one of files, subfolders, classes, got 'folders'"),
        ({"layout": "classes", "labels": [1]}, "--layout classes: expected no --labels"),
        ({"jobs": 0}, "jobs: expected at least 1 process, got 0"),
    ):
        with pytest.raises(ScoreError, match=text):
            score_folders(*folders, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="does not exist"):
        score_folders(folders[0] / "no", folders[1])


def test_what_is_not_scored_is_told(folders: tuple[Path, Path]) -> None:
    (folders[0] / "case 3.nii.gz").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"score_folders: 1 of 6 cases were not scored, see .errors: .*case 3.nii.gz"):
        found = score_folders(*folders)
    assert len(found.errors) == 1
    assert {row["case"] for row in found} == {f"case {i}" for i in (0, 1, 2, 4, 5)}


def test_a_tolerance_of_a_class_that_is_nowhere_is_told(folders: tuple[Path, Path]) -> None:
    said = "--surface: no class is named 'livre' or '7': that tolerance was not used."
    with pytest.warns(UserWarning, match=said):
        score_folders(*folders, surface="1mm,livre=2mm,7=3mm,2=1mm")
    assert said in " ".join(score(*folders, "--surface", "1mm,livre=2mm,7=3mm,2=1mm").stderr.split())
    assert "--surface" not in score(*folders, "--surface", "1mm,2=1mm").stderr


def test_pandas_takes_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    found = score_folders(*folders, surface="1mm")
    frame = pandas.DataFrame(found)
    assert frame.groupby("label")["dice"].mean().tolist() == pytest.approx([row["dice"] for row in found.classes])
    assert frame["hd95"].dtype == np.float64
    assert len(pandas.DataFrame(found.classes)) == 2
    options = ("--surface", "1mm", "--labels", "a=1,b=2")
    for rows in ("pairs", "classes", "cases"):
        text = score(*folders, *options, "--format", "json", "--rows", rows).stdout
        flat = pandas.read_json(io.StringIO(text))
        table = pandas.read_csv(io.StringIO(score(*folders, *options, "--format", "csv", "--rows", rows).stdout))
        pandas.testing.assert_frame_equal(flat, table, check_dtype=False)
    out = tmp_path / "rows.json"
    score(*folders, "--versus", folders[1], "--rows", "pairs", "--out", out)
    both = pandas.read_json(out)
    assert both["predictions"].unique().tolist() == [str(each) for each in folders]
    assert len(both) == 24


def test_files_of_many_images_without_any(tmp_path: Path) -> None:
    empty = tmp_path / "a.json", tmp_path / "b.json"
    for path in empty:
        path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(ScoreError, match=r"^score: expected images in .*a\.json and .*b\.json, got none\."):
        score_folders(*empty)
