"""softdice score on many cases, large images and without its optional packages."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

from softdice.cli.app import app
from softdice.evaluation.averages import intervals
from softdice.scoring import Options, pair_files, run, tabulate


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def masks(folder: Path, cases: int, side: int) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    for case in range(cases):
        for part in "pt":
            save(folder / part / f"case_{case}.npy", rng.integers(0, 3, (side, side), np.uint8))
    return folder / "p", folder / "t"


def traced_peak(work: object) -> int:
    assert callable(work)
    work()  # what is made once: imports, compiled loops
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_cases(tmp_path: Path) -> None:
    """Images of 1 MiB: had only one more of them been kept, the difference would show it."""
    few, many = (
        traced_peak(lambda pairs=pairs: tabulate(run(pairs, Options())))
        for pairs in (pair_files(*masks(tmp_path / str(n), n, 1024)) for n in (4, 24))
    )
    assert many - few < 1 << 19
    assert few > 2 << 20  # the pair at hand is seen


def test_memory_of_the_intervals_does_not_grow_with_the_number_of_cases() -> None:
    few, many = (traced_peak(lambda n=n: intervals(np.ones((n, 1)))) for n in (4_000, 20_000))
    assert many < 2 * few


@pytest.mark.parametrize(
    "option, package, name",
    [("--versus", "scipy", "scipy"), ("--resample", "scipy", "scipy"), ("--report", "PIL", "pillow")],
)
def test_a_missing_package_is_named_before_any_work(
    option: str, package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, out = masks(tmp_path, 2, 4), tmp_path / "out.csv"
    values = {"--versus": [folders[1]], "--report": [tmp_path / "r.html"], "--resample": []}[option]
    monkeypatch.setitem(sys.modules, package, None)
    command = ["score", *folders, option, *values, "--out", out]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 2
    assert result.stderr == (
        f"{option}: expected {name} to be installed, got no such package. Run: pip install 'softdice[score]'\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "t"]


def test_probabilities_of_several_classes_are_refused_with_advice(tmp_path: Path) -> None:
    nib = pytest.importorskip("nibabel")
    probabilities = np.random.default_rng(0).random((3, 4, 5, 6)).astype(np.float32)
    labels = probabilities.argmax(0).astype(np.uint8)
    np.savez(tmp_path / "p.npz", probabilities=probabilities)
    reference = save(tmp_path / "t.npy", labels)
    nib.Nifti1Image(np.moveaxis(probabilities, 0, -1), np.eye(4)).to_filename(tmp_path / "p.nii.gz")
    nib.Nifti1Image(labels, np.eye(4)).to_filename(tmp_path / "t.nii.gz")
    for files in ((tmp_path / "p.npz", reference), (tmp_path / "p.nii.gz", tmp_path / "t.nii.gz")):
        result = CliRunner().invoke(app, ["score", *map(str, files), "--soft"])
        assert result.exit_code == 1
        assert "one file per class" in result.stderr


def test_voxels_that_count_without_the_ignored(tmp_path: Path) -> None:
    """TN of the summary.json rests on them."""
    t = np.array([[0, 1, 2, 2], [9, 9, 1, 0]], np.uint8)
    pairs = pair_files(save(tmp_path / "p.npy", t % 3), save(tmp_path / "t.npy", t))
    assert next(run(pairs, Options(ignore=(9, 2, 9)))).voxels == 4
    assert next(run(pairs, Options())).voxels == 8
    save(tmp_path / "p.npy", t / 10)
    assert next(run(pairs, Options(ignore=(9, 2, 9), soft=True))).voxels == 4
