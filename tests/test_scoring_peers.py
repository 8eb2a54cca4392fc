"""Scores against SimpleITK, MONAI, torchmetrics, MedPy and nnU-Net, and what each of them says of empty masks."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from softdice.metrics import formulas as scores
from softdice.metrics.counting import class_counts
from softdice.metrics.formulas import dice_score

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning:monai", "ignore:.*pkg_resources.*"
)

NUMPY = tuple(map(int, np.__version__.split(".")[:2]))
REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SOFTDICE_DATA", REPOSITORY.parent / "shared" / "data"))


def real(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data not found: set SOFTDICE_DATA to a folder that holds {Path(*parts)}")
    return path


def sitk_counts(p: np.ndarray, t: np.ndarray, C: int) -> tuple[np.ndarray, np.ndarray]:
    """Dice, and 2 (prediction - target) / (prediction + target), per class."""
    sitk = pytest.importorskip("SimpleITK")
    measure = sitk.LabelOverlapMeasuresImageFilter()
    images = [sitk.GetImageFromArray(np.ascontiguousarray(array).astype(np.int32)) for array in (t, p)]
    measure.Execute(*images)
    dice, volume = np.full(C, np.nan), np.full(C, np.nan)
    for c in range(1, C):
        if (p == c).any() or (t == c).any():
            dice[c] = measure.GetDiceCoefficient(c)
            volume[c] = -measure.GetVolumeSimilarity(c)
    return dice, volume


def medpy_dice(p: np.ndarray, t: np.ndarray, C: int) -> np.ndarray:
    dc = pytest.importorskip("medpy.metric.binary").dc
    return np.array([dc(p == c, t == c) if (p == c).any() or (t == c).any() else np.nan for c in range(C)])


def one_hot(labels: np.ndarray, C: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(labels.astype(np.int64)), C).movedim(-1, 0)[None]


def monai_dice(p: np.ndarray, t: np.ndarray, C: int) -> np.ndarray:
    metrics = pytest.importorskip("monai.metrics")
    return metrics.compute_dice(one_hot(p, C), one_hot(t, C), ignore_empty=False).numpy()[0].astype(float)


def torchmetrics_dice(p: np.ndarray, t: np.ndarray, C: int) -> np.ndarray:
    functional = pytest.importorskip("torchmetrics.functional.segmentation")
    return functional.dice_score(one_hot(p, C), one_hot(t, C), C, average="none").numpy()[0].astype(float)


def cases() -> list[tuple[str, Callable[[], tuple[np.ndarray, np.ndarray, int]]]]:
    def random(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
        rng = np.random.default_rng(seed)
        p, t = (np.repeat(rng.integers(0, 6, (9, 12, 4)), 5, 2) for _ in range(2))
        p = np.where(rng.random(p.shape) < 0.5, t, p)
        return p, t, 6

    def nifti(*parts: str) -> Callable[[], tuple[np.ndarray, np.ndarray, int]]:
        def load() -> tuple[np.ndarray, np.ndarray, int]:
            from softdice.images.files import read_image

            p, t = (read_image(real(*parts[:1], name)).array.astype(np.uint8) for name in parts[1:])
            labels, numbers = np.unique(np.stack([p, t]), return_inverse=True)  # only those that occur
            return *numbers.reshape(2, *p.shape).astype(np.uint8), len(labels)

        return load

    return [
        ("random 0", lambda: random(0)),
        ("random 1", lambda: random(1)),
        ("CT, 41 organs", nifti("totalsegmentator", "example_seg_fast.nii.gz", "example_seg.nii.gz")),
        ("retina", nifti("chase_db1", "Image_02L_2ndHO.png", "Image_02L_1stHO.png")),
        ("cord", nifti("spinal_cord/t2", "t2_seg-deepseg_sc-3d.nii.gz", "t2_seg-manual.nii.gz")),
    ]


@pytest.mark.parametrize("name, load", cases(), ids=[name for name, _ in cases()])
def test_agreement_with_the_peers(name: str, load: Callable[[], tuple[np.ndarray, np.ndarray, int]]) -> None:
    """MONAI and torchmetrics compute in float32, so they are compared as such; the two others to 1e-12."""
    p, t, C = load()
    tensors = torch.from_numpy(np.ascontiguousarray(p)), torch.from_numpy(np.ascontiguousarray(t))
    ours, counts = dice_score(*tensors, C).numpy(), class_counts(*tensors, C)
    dice, volume = sitk_counts(p, t, C)
    np.testing.assert_allclose(ours[1:], dice[1:], rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.volume_difference(counts).numpy()[1:], volume[1:], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours, medpy_dice(p, t, C), rtol=0, atol=1e-12)
    defined = (t.reshape(-1) == np.arange(C)[:, None]).any(1)
    np.testing.assert_allclose(ours[defined], monai_dice(p, t, C)[defined], rtol=0, atol=2e-7)
    np.testing.assert_allclose(ours, torchmetrics_dice(p, t, C), rtol=0, atol=2e-7)


def test_counts_equal_those_of_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    p, t, C = cases()[0][1]()
    both, predicted, target = class_counts(torch.from_numpy(p), torch.from_numpy(t), C)
    stats = classification.multiclass_stat_scores(torch.from_numpy(p), torch.from_numpy(t), C, average="none")
    assert torch.equal(stats[:, 0], both)
    assert torch.equal(stats[:, 1], predicted - both)
    assert torch.equal(stats[:, 3], target - both)
    assert torch.equal(stats[:, 4], target)


def _table() -> dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], float, float]]:
    """Who -> score of masks (p, t), value where both are empty, value where only the target is empty."""

    def ours(p: np.ndarray, t: np.ndarray) -> float:
        return dice_score(torch.from_numpy(p), torch.from_numpy(t), 1).item()

    def medpy(p: np.ndarray, t: np.ndarray) -> float:
        with np.errstate(invalid="ignore"):
            return float(pytest.importorskip("medpy.metric.binary").dc(p, t))

    def monai(p: np.ndarray, t: np.ndarray) -> float:
        metrics = pytest.importorskip("monai.metrics")
        return float(metrics.compute_dice(torch.from_numpy(p)[None, None], torch.from_numpy(t)[None, None])[0, 0])

    def torchmetrics(p: np.ndarray, t: np.ndarray) -> float:
        functional = pytest.importorskip("torchmetrics.functional.segmentation")
        return float(functional.dice_score(one_hot(p, 2), one_hot(t, 2), 2, average="none", include_background=False))

    def sitk(p: np.ndarray, t: np.ndarray) -> float:
        itk = pytest.importorskip("SimpleITK")
        measure = itk.LabelOverlapMeasuresImageFilter()
        measure.Execute(*(itk.GetImageFromArray(array.astype(np.uint8)) for array in (t, p)))
        return float(measure.GetDiceCoefficient(1))

    nan = math.nan
    return {
        "softdice": (ours, nan, 0.0),
        "MedPy": (medpy, nan, 0.0) if NUMPY >= (2, 3) else (medpy, 1.0, 0.0),
        "MONAI": (monai, nan, nan),
        "torchmetrics": (torchmetrics, nan, 0.0),
        "SimpleITK": (sitk, 0.0, 0.0),
    }


@pytest.mark.parametrize("who", list(_table()))
def test_what_each_says_of_empty_masks(who: str) -> None:
    """The table of docs/scores.md, run."""
    measure, both_empty, target_empty = _table()[who]
    nothing, something = np.zeros((4, 5), np.int64), np.eye(4, 5, dtype=np.int64)
    assert measure(something, something) == 1.0
    np.testing.assert_equal(measure(nothing, nothing), both_empty)
    np.testing.assert_equal(measure(something, nothing), target_empty)


def test_the_table_of_the_documentation_is_the_one_that_is_run() -> None:
    lines = (REPOSITORY / "docs" / "scores.md").read_text(encoding="utf-8").splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]]
        for line in lines
        if line.count("|") == 4
    }
    for who, (_, both_empty, target_empty) in _table().items():
        both_empty = math.nan if who == "MedPy" else both_empty  # with NumPy 2.3 or newer, as the page says
        assert cells[who] == ["nan" if math.isnan(value) else f"{value:g}" for value in (both_empty, target_empty)]


def test_summary_json_equals_that_of_nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("skimage", "skimage.io", "blosc2"):  # imported by its other readers, which are not used here
        monkeypatch.setitem(sys.modules, name, MagicMock())
    evaluation = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions", exc_type=ImportError)
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    from softdice.scoring import Options, pair_files, run, tabulate
    from softdice.scoring.formats import to_nnunet

    sitk = pytest.importorskip("SimpleITK")
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        for case in range(3):
            p, t, _ = cases()[0][1]() if case else cases()[1][1]()
            array = (p if side == "a" else t).astype(np.uint8)
            array[array == case + 1] = 0
            sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / side / f"case_{case}.nii.gz"))
    for labels in ((1, 2, 3, 4, 5), [(1, 2), (3, 4)]):
        regions = None if isinstance(labels, tuple) else {"one": (1, 2), "two": (3, 4)}
        options = Options(labels=labels if isinstance(labels, tuple) else None, regions=regions)
        pairs = pair_files(tmp_path / "a", tmp_path / "b")
        keys = tuple(regions) if regions else options.labels
        ours = json.loads("".join(to_nnunet(tabulate(run(pairs, options), keys), options)))
        theirs = [
            evaluation.compute_metrics(str(pair.truth), str(pair.prediction), SimpleITKIO(), list(labels))
            for pair in pairs
        ]  # its function for folders starts processes, and then does to these what follows
        found = {key: [case["metrics"][key] for case in theirs] for key in labels}
        mean = {
            str(key): {name: _nanmean([row[name] for row in rows]) for name in rows[0]} for key, rows in found.items()
        }
        foreground = {name: float(np.mean([row[name] for row in mean.values()])) for name in next(iter(mean.values()))}
        for case in theirs:
            case["metrics"] = {str(key): row for key, row in case["metrics"].items()}
        _same(ours, {"metric_per_case": theirs, "mean": mean, "foreground_mean": foreground})


def _nanmean(values: list[float]) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan


def _same(ours: object, theirs: object) -> None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key, value in ours.items():
            _same(value, theirs[key])
    elif isinstance(ours, list) and isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            _same(a, b)
    elif isinstance(ours, str):
        assert ours == theirs
    else:
        np.testing.assert_allclose(float(ours), float(theirs), rtol=0, atol=1e-12)  # type: ignore[arg-type]


def _means() -> dict[tuple[str, str], float]:
    """Program and setting -> the mean of two samples of two classes; of none where no class is there to score."""
    metrics = pytest.importorskip("monai.metrics")
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    from softdice.metrics import DiceScore

    p = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 2]]])
    t = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 0], [0, 0, 2, 0]]])
    np.testing.assert_allclose(
        dice_score(p, t, 3, pooling="sample")[:, 1:], [[1, math.nan], [0.5, 0]], rtol=1e-15, equal_nan=True
    )

    def hot(labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()

    def monai(p: torch.Tensor, t: torch.Tensor) -> float:
        metric = metrics.DiceMetric(include_background=False, reduction="mean")
        metric(hot(p), hot(t))
        return float(metric.aggregate())

    def torchmetrics(average: str) -> float:
        options = {"aggregation_level": "samplewise", "average": average, "input_format": "index"}
        metric = segmentation.DiceScore(3, include_background=False, **options)
        metric.update(p, t)
        return float(metric.compute())

    def ours(average: str) -> float:
        return float(DiceScore(3, classes=[1, 2], pooling="sample", average=average)(p, t))

    none = torch.zeros_like(t)
    return {
        ("softdice", '`DiceScore(pooling="sample")`'): ours("macro"),
        ("MONAI", '`DiceMetric(reduction="mean")`'): monai(p, t),
        ("torchmetrics", '`DiceScore(aggregation_level="samplewise", average="macro")`'): torchmetrics("macro"),
        ("softdice", '`DiceScore(pooling="sample", average="weighted")`'): ours("weighted"),
        ("torchmetrics", '`DiceScore(aggregation_level="samplewise", average="weighted")`'): torchmetrics("weighted"),
        ("MONAI", "`DiceMetric().aggregate()` where no class was there to score"): monai(none, none),
        ("softdice", "`DiceScore().compute()` there"): float(DiceScore(3, classes=[1, 2])(none, none)),
    }


def test_the_means_of_the_documentation() -> None:
    """docs/scores.md, "Means in another order", run."""
    lines = (REPOSITORY / "docs" / "scores.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    said = {(row[0], row[1]): row[3] for row in rows if len(row) == 4}
    for key, value in _means().items():
        assert said[key] == ("nan" if math.isnan(value) else f"{value:.4g}"), key


def test_steps_that_change_masks() -> None:
    """docs/scores.md: labels resampled on their own grid, and a mask that is cleaned in place."""
    sitk = pytest.importorskip("SimpleITK")
    transforms = pytest.importorskip("monai.transforms")
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[3:10, 3:10, 3:10], labels[14, 14, 14], labels[16:18, 5:7, 5] = 1, 2, 3
    image = sitk.GetImageFromArray(labels)
    found = {
        name: sitk.GetArrayFromImage(sitk.Resample(image, image, sitk.Transform(), getattr(sitk, name), 0))
        for name in ("sitkLabelGaussian", "sitkNearestNeighbor")
    }
    assert np.unique(found["sitkLabelGaussian"]).tolist() == [0, 1]
    np.testing.assert_array_equal(found["sitkNearestNeighbor"], labels)
    mask = (labels[None] > 0).astype(np.float32)
    before = mask.copy()
    transforms.KeepLargestConnectedComponent(applied_labels=[1])(mask)
    assert mask.sum() < before.sum()
