"""Kinds of folders, files and options that `softdice score` once misread, overwrote or let fail: one row a fault."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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
