"""Kinds of folders, files and options that `softdice score` once misread, overwrote or let fail: one row a fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
nib = pytest.importorskip("nibabel")
PIL_Image = pytest.importorskip("PIL.Image")

from typer.testing import CliRunner, Result  # noqa: E402

from softdice.cli.app import app  # noqa: E402


def score(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["score", *map(str, arguments)], catch_exceptions=False)


def rows(*arguments: object) -> dict[object, dict]:
    """Label or name -> the row of the class in the only case."""
    result = score(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    (case,) = json.loads(result.stdout)["results"][0]["cases"]
    return {row["label"]: row for row in case["classes"]}


def refused(result: Result, *parts: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    said = " ".join(result.stderr.split())
    for part in parts:
        assert part in said
    assert "Traceback" not in result.output


def save(path: Path, array: np.ndarray) -> Path:
    """.npy, .png or NIfTI, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".png":
        PIL_Image.fromarray(array).save(path)
    else:
        nib.Nifti1Image(array, np.eye(4)).to_filename(path)
    return path


def dice(p: np.ndarray, t: np.ndarray) -> float:
    return 2 * (p & t).sum() / (p.sum() + t.sum())


def maps(seed: int, C: int = 4, shape: tuple[int, ...] = (9, 11)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    t = rng.integers(0, C, shape, np.uint8)
    return np.where(rng.random(shape) < 0.4, rng.integers(0, C, shape), t).astype(np.uint8), t


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Labels 0 to 4."""
    p, t = maps(0, 5)
    return save(tmp_path / "p" / "a.npy", p), save(tmp_path / "t" / "a.npy", t)


def test_an_ignored_label_is_no_class(pair: tuple[Path, Path]) -> None:
    """G4 and S2, as in `softdice.metrics`."""
    p, t = (np.load(path) for path in pair)
    found = rows(*pair, "--labels", "0,2,3", "--ignore", "0,3")
    keep = ~np.isin(t, (0, 3))
    assert list(found) == [2]
    assert found[2]["dice"] == pytest.approx(dice((p == 2) & keep, t == 2))


def test_labels_above_63_bits_keep_their_number(tmp_path: Path) -> None:
    """S26"""
    t = np.array([0, 2**63 + 9, 2**63 + 9, 7, 0], np.uint64)
    files = save(tmp_path / "p.npy", np.roll(t, 1)), save(tmp_path / "t.npy", t)
    assert {label: row["dice"] for label, row in rows(*files).items()} == {7: 0.0, 2**63 + 9: 0.5}
    assert list(rows(*files, "--labels", str(2**63 + 9), "--ignore", "7")) == [2**63 + 9]


# --- what a dataset.json says


def dataset(folder: Path, content: object, encoding: str = "utf-8") -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "dataset.json").write_text(text, encoding=encoding)
    return folder / "dataset.json"


@pytest.mark.parametrize(
    "labels, expected",
    [
        ({"background": 0, "kidney": 1, "cyst": 3, "ignore": 4}, {1: (1,), 3: (3,)}),
        ({"ignore": 2, "background": 0, "rest": 4}, {4: (4,)}),
        ({"background": 0, "all": [1, 2, 3], "core": [2, 3], "ignore": 4}, {"all": (1, 2, 3), "core": (2, 3)}),
        ({"background": [0], "core": 3, "both": [1, 3], "ignore": [2]}, {"core": (3,), "both": (1, 3)}),
        ({"0": "background", "1": "edge", "3": "ignore"}, {1: (1,)}),
    ],
)
@pytest.mark.parametrize("encoding, whole", [("utf-8", True), ("utf-8-sig", False)])
def test_ignore_and_regions_of_a_dataset(
    labels: dict, expected: dict, encoding: str, whole: bool, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """G1, S2, and a byte order mark (S32): classes and counts as nnU-Net's evaluation has them."""
    file = dataset(tmp_path, {"labels": labels, "name": "x"} if whole else labels, encoding)
    p, t = (np.load(path) for path in pair)
    found = rows(*pair, "--labels", file)
    void = next((int(k) if v == "ignore" else np.ravel(v)[0] for k, v in labels.items() if "ignore" in (k, v)))
    assert list(found) == list(expected)
    for key, inside in expected.items():
        in_p, in_t, keep = np.isin(p, inside), np.isin(t, inside), t != void
        assert found[key]["dice"] == pytest.approx(dice(in_p & keep, in_t & keep))
        assert found[key]["fp"] == (in_p & ~in_t & keep).sum()
    if any(isinstance(key, str) for key in expected):
        assert rows(*pair, "--regions", file) == found


def test_the_summary_of_nnunet_with_an_ignore_label(pair: tuple[Path, Path], tmp_path: Path) -> None:
    file = dataset(
        tmp_path, {"labels": {"background": 0, "a": 1, "b": [1, 2], "ignore": 3}, "regions_class_order": [2, 1]}
    )
    p, t = (np.load(path) for path in pair)
    content = json.loads(score(*pair, "--labels", file, "--format", "nnunet").stdout)
    keep = t != 3
    expected = {"1": (p == 1, t == 1), "(1, 2)": (np.isin(p, (1, 2)), np.isin(t, (1, 2)))}
    assert list(content["mean"]) == list(expected)
    for key, (in_p, in_t) in expected.items():
        assert content["mean"][key]["Dice"] == pytest.approx(dice(in_p & keep, in_t & keep))
        assert content["mean"][key]["TN"] == (~in_p & ~in_t & keep).sum()


@pytest.mark.parametrize(
    "content, said",
    [
        ({"labels": {"1": "cyst", "4": "cyst"}}, "expected names that differ, got 'cyst' twice"),
        ('{"cyst": 1, "cyst": 2}', "expected names that differ, got 'cyst' twice"),
        ({"cyst": 2, "tumour": 2}, "expected one name for each number, got '2' twice"),
        ({"labels": {"a": [1, 2], "b": 2}, "regions_class_order": [1]}, "class_order as regions, got 1 for 2: a, b"),
        ({"labels": {"a": 1, "ignore": [2, 3]}}, "expected one number for 'ignore', got [2, 3]"),
        ("[" * 100_000, "expected a JSON file with labels, got"),
        ("\ufeff{", "expected a JSON file with labels, got"),
    ],
)  # fmt: skip
def test_files_that_say_two_things(content: object, said: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """S12, S32"""
    refused(score(*pair, "--labels", dataset(tmp_path, content)), said)


@pytest.mark.parametrize(
    "options, said",
    [
        (("--labels", "cyst=1, cyst=3"), "--labels: expected names that differ, got 'cyst' twice"),
        (("--labels", "a=2,b=2"), "--labels: expected one name for each number, got '2' twice"),
        (("--regions", "x=1,2; y=3; x=4"), "--regions: expected names that differ, got 'x' twice"),
        (("--labels", ""), "--labels: expected numbers, name=number or a .json file, got ''"),
        (("--regions", " "), "--regions: expected name=labels or a .json file, got ' '"),
        (("--ignore", ""), "--ignore: expected whole numbers, got ''"),
    ],
)
def test_options_that_say_two_things_or_nothing(options: tuple[str, str], said: str, pair: tuple[Path, Path]) -> None:
    """S12, S32"""
    refused(score(*pair, *options), said)
