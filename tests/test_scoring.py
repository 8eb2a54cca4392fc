"""softdice score: pairs, geometry, labels, options, statistics, formats, errors, interruption."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
nib = pytest.importorskip("nibabel")
PIL_Image = pytest.importorskip("PIL.Image")

from commands import journal_cases, score, wait_for_cases  # noqa: E402

from softdice.evaluation.averages import RESAMPLES, intervals  # noqa: E402
from softdice.evaluation.labels import parse_labels, parse_regions  # noqa: E402
from softdice.evaluation.table import Table  # noqa: E402
from softdice.scoring import Options, ScoreError, compare, pair_files, run, summarise, tabulate  # noqa: E402
from softdice.scoring.report import to_html  # noqa: E402

DATA = Path(os.environ.get("SOFTDICE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def real(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data not found: set SOFTDICE_DATA to a folder that holds {Path(*parts)}")
    return path


def json_of(*arguments: object) -> dict:
    result = score(*arguments, "--format", "json")
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    nib.Nifti1Image(array, np.diag([2.0, 2, 3, 1]) if affine is None else affine).to_filename(path)
    return path


def maps(seed: int, shape: tuple[int, ...] = (6, 7, 8), C: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    t = rng.integers(0, C, shape, np.uint8)
    return np.where(rng.random(shape) < 0.3, rng.integers(0, C, shape), t).astype(np.uint8), t


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for case in range(5):
        p, t = maps(case)
        nifti(tmp_path / "p" / f"case_{case}.nii.gz", p)
        nifti(tmp_path / "t" / f"case_{case}.nii.gz", t)
    return tmp_path / "p", tmp_path / "t"


def dice(p: np.ndarray, t: np.ndarray) -> float:
    return 2 * (p & t).sum() / (p.sum() + t.sum())


def test_every_number_of_a_folder(folders: tuple[Path, Path]) -> None:
    content = json_of(*folders)
    (results,) = content["results"]
    each = np.array([[dice(maps(case)[0] == c, maps(case)[1] == c) for c in (1, 2, 3)] for case in range(5)])
    for case, row in zip(results["cases"], each, strict=True):
        assert [entry["dice"] for entry in case["classes"]] == pytest.approx(row, abs=1e-14)
        entry, (p, t) = case["classes"][1], maps(int(case["case"][-1]))
        tp, n_pred, n_ref = ((p == 2) & (t == 2)).sum(), (p == 2).sum(), (t == 2).sum()
        assert [entry[k] for k in ("tp", "fp", "fn", "n_pred", "n_ref")] == [tp, n_pred - tp, n_ref - tp, n_pred, n_ref]
        assert entry["iou"] == pytest.approx(tp / (n_pred + n_ref - tp), abs=1e-14)
    every = [np.stack([maps(case)[side] for case in range(5)]) for side in (0, 1)]
    for c, entry in zip((1, 2, 3), results["classes"], strict=True):
        assert entry["dice"] == pytest.approx(each[:, c - 1].mean(), abs=1e-14)
        assert entry["pooled_dice"] == pytest.approx(dice(every[0] == c, every[1] == c), abs=1e-14)
        assert entry["cases"] == 5
        assert entry["dice_95"][0] < entry["dice"] < entry["dice_95"][1]
    assert results["overall"]["macro_dice"] == pytest.approx(each.mean(), abs=1e-14)
    tp = sum(((every[0] == c) & (every[1] == c)).sum() for c in (1, 2, 3))
    total = sum((side != 0).sum() for side in every)
    assert results["overall"]["pooled_dice"] == pytest.approx(2 * tp / total, abs=1e-14)


def test_real_maps() -> None:
    folder = real("totalsegmentator")
    (results,) = json_of(folder / "example_seg_fast.nii.gz", folder / "example_seg.nii.gz")["results"]
    assert round(results["overall"]["macro_dice"], 6) == 0.901996
    assert round(results["overall"]["pooled_dice"], 6) == 0.963557
    assert results["classes"][0]["name"] == "spleen"
    assert len(results["classes"]) == 41


def test_two_observers_of_the_retina(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    eyes = sorted(path.name[:9] for path in real("chase_db1").glob("*_1stHO.png"))
    assert len(eyes) == 14
    for eye in eyes:
        shutil.copy(real("chase_db1") / f"{eye}_2ndHO.png", tmp_path / "a" / f"{eye}.png")
        shutil.copy(real("chase_db1") / f"{eye}_1stHO.png", tmp_path / "b" / f"{eye}.png")
    (results,) = json_of(tmp_path / "a", tmp_path / "b")["results"]
    read = [
        [np.asarray(PIL_Image.open(tmp_path / side / f"{eye}.png").convert("L")) > 0 for eye in eyes] for side in "ab"
    ]
    expected = [dice(p, t) for p, t in zip(*read, strict=True)]
    assert [case["classes"][0]["dice"] for case in results["cases"]] == pytest.approx(expected, abs=1e-12)
    assert 0.7391 <= min(expected) < results["overall"]["macro_dice"] < max(expected) <= 0.8268


def test_pairing_by_name(tmp_path: Path) -> None:
    for name in ("p/a.nii.gz", "p/a.npz", "p/b_0000.png", "p/c.tif", "p/lone.png", "p/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("t/a.nii", "t/b.png", "t/c.npy", "t/d.npy", "t/e.npy", "t/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "p/e.tif").touch()
    pairs = {pair.case: pair for pair in pair_files(tmp_path / "p", tmp_path / "t")}
    found = {case: (pair.prediction.name, pair.truth.name) for case, pair in pairs.items() if not pair.error}  # type: ignore[union-attr]
    assert found == {"a": ("a.nii.gz", "a.nii"), "b": ("b_0000.png", "b.png"), "c": ("c.tif", "c.npy")}
    assert pairs["lone"].error.endswith("lone.png: no reference of this name")
    assert pairs["d"].error.endswith("d.npy: no prediction of this name")
    assert "expected one file of this name, got e.npy, e.png" in pairs["e"].error
    for bad, message in (
        ((tmp_path / "none", tmp_path), "does not exist"),
        ((tmp_path, tmp_path / "t/a.nii"), "one of each"),
    ):
        with pytest.raises(ScoreError, match=message):
            pair_files(*bad)


def test_geometry(tmp_path: Path) -> None:
    p, t = maps(1)
    affine = np.array([[2.0, 0, 0, -7], [0, 2, 0, 5], [0, 0, 3, 1], [0, 0, 0, 1]])
    flipped = affine.copy()
    flipped[0] = [-2, 0, 0, -7 + 2 * (p.shape[0] - 1)]
    reference = nifti(tmp_path / "t.nii.gz", t, affine)
    straight, turned = nifti(tmp_path / "p.nii.gz", p, affine), nifti(tmp_path / "f.nii.gz", p[::-1].copy(), flipped)
    expected = json_of(straight, reference)["results"][0]["classes"]
    assert json_of(turned, reference, "--resample")["results"][0]["classes"] == expected
    assert json_of(straight, reference, "--resample")["results"][0]["classes"] == expected
    failed = score(turned, reference)
    assert failed.exit_code == 1
    assert (
        "expected the same orientation and affine, got LAS voxels elsewhere than the RAS voxels of t.nii.gz"
        in failed.stderr
    )
    blind = json_of(turned, reference, "--ignore-geometry")["results"][0]["classes"]
    assert blind[0]["dice"] == pytest.approx(dice(p[::-1] == 1, t == 1))
    nearly = nifti(tmp_path / "n.nii.gz", p, affine + 1e-3 * np.eye(4, k=3))
    assert json_of(nearly, reference)["results"][0]["classes"] == expected
    transposed = p.transpose(2, 0, 1).copy()
    nifti(tmp_path / "x.nii.gz", transposed, affine[:, [2, 0, 1, 3]])
    assert json_of(tmp_path / "x.nii.gz", reference, "--resample")["results"][0]["classes"] == expected
    assert "expected shape (6, 7, 8) as in t.nii.gz, got (8, 6, 7)" in score(tmp_path / "x.nii.gz", reference).stderr
    np.save(tmp_path / "p.npy", p)
    assert "only t.nii.gz says how its voxels lie in space" in score(tmp_path / "p.npy", reference).stderr
    assert json_of(tmp_path / "p.npy", reference, "--ignore-geometry")["results"][0]["classes"] == expected


def test_labels_regions_ignore_background(tmp_path: Path) -> None:
    p, t = maps(2)
    files = nifti(tmp_path / "p.nii.gz", p), nifti(tmp_path / "t.nii.gz", t.astype(np.float32))

    def classes(*options: object) -> dict:
        return {entry["label"]: entry for entry in json_of(*files, *options)["results"][0]["classes"]}

    assert list(classes()) == [1, 2, 3]
    assert list(classes("--include-background")) == [0, 1, 2, 3]
    assert list(classes("--labels", "3,9")) == [3, 9]
    assert classes("--labels", "3,9")[9]["dice"] is None
    assert classes("--labels", "x=3,y=1")[1]["name"] == "y"
    union = classes("--regions", "both=1,2; three=3")
    assert list(union) == ["both", "three"]
    assert union["both"]["dice"] == pytest.approx(dice(np.isin(p, (1, 2)), np.isin(t, (1, 2))))
    valid = t != 2
    assert classes("--ignore", "2")[1]["dice"] == pytest.approx(dice((p == 1) & valid, (t == 1) & valid))
    assert list(classes("--ignore", "2")) == [1, 3]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "all": [1, 2, 3]}}))
    assert list(classes("--labels", tmp_path / "dataset.json")) == ["liver", "all"]
    (tmp_path / "old.json").write_text(json.dumps({"labels": {"0": "background", "2": "tumour"}}))
    assert classes("--labels", tmp_path / "old.json")[2]["name"] == "tumour"


def test_probabilities(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    p, t = rng.random((20, 30)).astype(np.float32), (rng.random((20, 30)) < 0.4).astype(np.uint8)
    np.save(tmp_path / "p.npy", p)
    np.save(tmp_path / "t.npy", t)
    files = tmp_path / "p.npy", tmp_path / "t.npy"
    assert "got values that are not whole: 600 voxels" in score(*files).stderr
    assert "For probabilities pass --threshold 0.5 or --soft" in score(*files).stderr
    cut = json_of(*files, "--threshold", 0.3)["results"][0]["cases"][0]["classes"][0]
    assert cut["dice"] == pytest.approx(dice(p > 0.3, t == 1), abs=1e-14)
    soft = json_of(*files, "--soft")["results"][0]["cases"][0]["classes"][0]
    exact = p.astype(np.float64)
    assert soft["dice"] == pytest.approx(2 * (exact * t).sum() / (exact.sum() + t.sum()), abs=1e-12)
    np.save(tmp_path / "t.npy", t * 5)
    assert "expected labels 0 and 1, got 5 too" in score(*files, "--soft").stderr
    again = json_of(*files, "--soft", "--labels", "5")["results"][0]["cases"][0]["classes"][0]
    assert (again["label"], again["dice"]) == (5, soft["dice"])
    np.save(tmp_path / "p.npy", p * 3)
    assert "--soft: expected probabilities in [0, 1]" in score(*files, "--soft", "--labels", "5").stderr


def test_masks_that_are_no_labels(tmp_path: Path) -> None:
    mask = maps(3, (9, 9), 2)[0]
    np.save(tmp_path / "t.npy", mask)
    PIL_Image.fromarray(mask * 255).save(tmp_path / "scale.png")
    assert "holds 0 and 255, but t.npy holds 0 and 1" in score(tmp_path / "scale.png", tmp_path / "t.npy").stderr
    same = json_of(tmp_path / "scale.png", tmp_path / "t.npy", "--regions", "mask=1,255")
    assert same["results"][0]["overall"]["macro_dice"] == 1.0
    PIL_Image.fromarray(np.stack([mask] * 3, -1)).save(tmp_path / "grey.png")
    assert json_of(tmp_path / "grey.png", tmp_path / "t.npy")["results"][0]["overall"]["macro_dice"] == 1.0
    PIL_Image.fromarray(np.stack([mask, mask, 1 - mask], -1)).save(tmp_path / "colour.png")
    assert "expected one label per voxel, got 3 channels" in score(tmp_path / "colour.png", tmp_path / "t.npy").stderr
    PIL_Image.fromarray(mask).save(tmp_path / "lossy.jpg")
    assert "got a JPEG, which changes them" in score(tmp_path / "lossy.jpg", tmp_path / "t.npy").stderr


def test_comparison_of_two_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from scipy.stats import wilcoxon

    for case in range(5):
        p, t = maps(case)
        nifti(tmp_path / "q" / f"case_{case}.nii.gz", np.where(np.arange(8) < 3 + case % 3, t, p).astype(np.uint8))
    content = json_of(*folders, "--versus", tmp_path / "q")
    first, second = (
        np.array([[entry["dice"] for entry in case["classes"]] for case in side["cases"]])
        for side in content["results"]
    )
    for k, entry in enumerate(content["comparison"]["classes"]):
        difference = (first - second)[:, k]
        assert entry["difference"] == pytest.approx(difference.mean(), abs=1e-14)
        assert entry["p_wilcoxon"] == pytest.approx(wilcoxon(difference).pvalue)
        assert entry["difference_95"][0] <= entry["difference"] <= entry["difference_95"][1]
    pairs = pair_files(*folders)
    table = tabulate(run(pairs, Options()))
    same = compare(table, table)
    assert same.p_value.tolist() == [1.0] * 3
    assert same.difference.tolist() == [0.0] * 3
    assert "Wilcoxon p" in score(*folders, "--versus", tmp_path / "q").stdout


def test_bootstrap_intervals() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.7, 0.1, (400, 2))
    values[rng.random((400, 2)) < 0.3] = np.nan
    interval, macro = intervals(values)
    for k in range(2):
        column = values[~np.isnan(values[:, k]), k]
        half = 1.96 * column.std() / np.sqrt(column.size)
        assert interval[:, k] == pytest.approx([column.mean() - half, column.mean() + half], abs=0.15 * half)
    assert macro[0] < np.nanmean(values, 0).mean() < macro[1]
    assert np.array_equal(intervals(values)[0], interval)
    assert np.isnan(intervals(values[:1])[0]).all()
    assert np.isnan(intervals(np.full((3, 1), np.nan))[0]).all()
    assert RESAMPLES >= 1000


def test_absent_classes_are_skipped_and_counted(tmp_path: Path) -> None:
    for case, (p, t) in {"a": (1, 1), "b": (0, 0), "c": (1, 0), "d": (0, 1)}.items():
        nifti(tmp_path / "p" / f"{case}.nii", np.full((2, 2, 2), p, np.uint8))
        nifti(tmp_path / "t" / f"{case}.nii", np.full((2, 2, 2), t, np.uint8))
    (results,) = json_of(tmp_path / "p", tmp_path / "t")["results"]
    assert [case["classes"][0]["dice"] for case in results["cases"]] == [1.0, None, 0.0, 0.0]
    assert (results["classes"][0]["cases"], results["classes"][0]["dice"]) == (3, pytest.approx(1 / 3))


def test_formats_files_and_processes_agree(folders: tuple[Path, Path], tmp_path: Path) -> None:
    text = score(*folders, "--format", "csv").stdout
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 15
    content = json_of(*folders)
    assert float(rows[4]["dice"]) == content["results"][0]["cases"][1]["classes"][1]["dice"]
    out = tmp_path / "scores.csv"
    result = score(*folders, "--out", out, "--jobs", 2, "--report", tmp_path / "r.html")
    assert (result.exit_code, result.stdout) == (0, "")
    assert out.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "r.html", "scores.csv", "t"]
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 5
    assert not re.search(r"(src|href)='?\"?(https?:|//|/)", page)
    assert "all classes" in score(*folders).stdout
    assert set(json.loads(score(*folders, "--format", "nnunet").stdout)) == {
        "foreground_mean",
        "mean",
        "metric_per_case",
    }


def test_report_escapes_what_comes_from_files() -> None:
    table = Table(("<b>x</b>",), np.array([[[1], [2], [3]]]), ["<script>"], ["a"], ["b"], [9], {}, ["<i>bad</i>"])
    page = to_html({"<u>p</u>": table}, {"<u>p</u>": summarise(table)}, None, Options(), "<s>t</s>")
    for tag in ("<b>x", "<script>\u003c", "<i>bad", "<u>p", "<s>t"):
        assert tag not in page
    assert page.count("<script>") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (("--format", "xml"), "--format: expected one of table, csv, json, nnunet, got 'xml'"),
        (("--resume",), "--resume: expected --out"),
        (("--labels", "a,b"), "--labels: expected numbers, name=number or a .json file, got 'a'"),
        (("--regions", "1,2"), "--regions: expected name=labels"),
        (("--ignore", "x"), "--ignore: expected whole numbers, got 'x'"),
        (("--soft", "--threshold", "0.5"), "expected --soft or --threshold, got both"),
        (("--resample", "--ignore-geometry"), "expected --resample or --ignore-geometry, got both"),
        (("--soft", "--labels", "1,2"), "expected one class, got several"),
        (("--out", "none/out.csv"), "--out: expected a file in an existing folder"),
        (("--versus", "none"), "which does not exist"),
        (("--jobs", "0"), "Invalid value for '--jobs'"),
    ],
)
def test_wrong_usage_is_2(folders: tuple[Path, Path], options: tuple[str, ...], message: str) -> None:
    result = score(*folders, *options)
    assert result.exit_code == 2
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def test_label_files_that_are_no_label_files(tmp_path: Path) -> None:
    for text in ("[1, 2]", "{}", '{"labels": {"a": 1.5}}', "{"):
        (tmp_path / "x.json").write_text(text)
        for parse in (parse_labels, parse_regions):
            with pytest.raises(ScoreError, match="expected"):
                parse(str(tmp_path / "x.json"))


@pytest.mark.parametrize("name", ["background", "Background", "unlabelled"])
def test_label_0_of_a_file_is_no_region_whatever_its_name(name: str, tmp_path: Path) -> None:
    """It would be one more class in the mean, and nearly perfect."""
    for content in ({name: 0, "whole": [1, 2]}, {"labels": {"0": name, "1": "core"}}):
        (tmp_path / "x.json").write_text(json.dumps(content))
        assert {*parse_regions(str(tmp_path / "x.json")).values()} in ({(1, 2)}, {(1,)})


def test_damaged_files_are_listed_and_the_rest_is_scored(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Two thirds of the files of every format with a checksum damaged at random: what is scored is scored right."""
    rng = random.Random(0)
    good = {entry["case"]: entry["classes"] for entry in json_of(*folders)["results"][0]["cases"]}
    data = (folders[0] / "case_0.nii.gz").read_bytes()
    for case in range(40):
        damaged = bytearray(data)
        damaged[rng.randrange(10, len(data))] ^= 1 << rng.randrange(8)
        content = bytes(damaged) if case % 2 else data[: rng.randrange(len(data))]
        (folders[0] / f"bad_{case}.nii.gz").write_bytes(content)
        shutil.copy(folders[1] / "case_0.nii.gz", folders[1] / f"bad_{case}.nii.gz")
    result = score(*folders, "--format", "json")
    assert result.exit_code == 1
    assert "Not scored: 40 of 45" in result.stderr
    content = json.loads(result.stdout)
    assert len(content["errors"]) == 40
    assert {entry["case"]: entry["classes"] for entry in content["results"][0]["cases"]} == good


def test_interrupted_and_resumed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Ctrl-C in the middle of a real process: finished cases are kept, and the rest follows with --resume."""
    for case in range(5, 400):
        for folder in folders:
            shutil.copy(folder / f"case_{case % 5}.nii.gz", folder / f"case_{case}.nii.gz")
    out, partial = tmp_path / "out.csv", tmp_path / "out.csv.partial"
    command = [sys.executable, "-m", "softdice", "score", *map(str, folders), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_cases(process, out, 5)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode in (130, -signal.SIGINT), stderr  # as in tests/test_scoring_faults.py
    match = re.search(r"Stopped after (\d+) of 400. The same command with --resume goes on", stderr)
    assert match is not None
    assert not out.exists()
    kept = journal_cases(out)
    assert kept == int(match[1])
    assert 5 <= kept < 400
    assert score(*folders, "--out", out, "--resume", "--labels", "1").exit_code == 2  # other options, other run
    assert journal_cases(out) == kept
    nifti(folders[0] / "case_0.nii.gz", maps(0)[1])  # changed since: must be scored again
    with partial.open("a") as file:
        file.write('{"case": "half')  # killed while it wrote
    assert score(*folders, "--out", out, "--resume").exit_code == 0
    assert not partial.exists()
    assert out.read_text() == score(*folders, "--format", "csv").stdout
    assert "case_0,1,,1.0,1.0" in out.read_text()
