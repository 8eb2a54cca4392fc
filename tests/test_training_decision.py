"""Thresholds of a trained model: by hand, beside a slow twin, and through train and predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")
pytest.importorskip("monai")
pytest.importorskip("typer")

from commands import call, refused

from softdice.images.files import read_image
from softdice.training import TrainConfig, predict, train
from softdice.training import decision as decision_module
from softdice.training.cases import read_folder
from softdice.training.checkpoint import load_checkpoint, load_network, save_checkpoint
from softdice.training.decision import ARGMAX, FROM_ARGMAX, GRID, cut, dice_by_threshold, tuned
from softdice.training.evaluate import logits_of

AT = {float(threshold): position for position, threshold in enumerate(GRID)}


def log_odds(*probabilities: float) -> Tensor:
    """Return (2, V) of voxels in the second class with these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([torch.zeros_like(p), (p / (1 - p)).log()]).float()


def slow_dice(logits: Tensor, true: Tensor, thresholds: list[float], ignore_index: int | None = None) -> float:
    """Return the mean Dice of a case by its definition, 1 for a class that nobody has."""
    labels, dice = cut(logits, thresholds), []
    counted = torch.ones_like(true, dtype=torch.bool) if ignore_index is None else true != ignore_index
    for c in range(1, len(logits)):
        mask, there = (labels == c) & counted, (true == c) & counted
        total = int(mask.sum() + there.sum())
        dice.append(2 * int((mask & there).sum()) / total if total else 1.0)
    return float(np.mean(dice))


def test_the_grid_begins_with_the_argmax() -> None:
    """The middle of the grid is the argmax itself, and the nearest of equally good thresholds is taken first."""
    assert GRID[FROM_ARGMAX[0]] == ARGMAX
    assert np.all(np.diff(np.abs(GRID[FROM_ARGMAX] - ARGMAX)) >= -1e-12)


def test_one_class_by_hand() -> None:
    """Of p = 0.9, 0.45, 0.3, 0.2 the first two are true: at 0.5 one is found, at 0.4 both, at 0.25 one too many."""
    dice = dice_by_threshold(log_odds(0.9, 0.45, 0.3, 0.2), torch.tensor([1, 1, 0, 0]))
    assert dice.shape == (2, len(GRID))
    for threshold, value in {0.5: 2 / 3, 0.4: 1.0, 0.35: 1.0, 0.25: 4 / 5, 0.15: 4 / 6}.items():
        assert dice[1, AT[threshold]] == pytest.approx(value)
    assert set(dice[0]) == {dice[1, AT[0.5]]}  # the background stays with the argmax


def test_a_class_that_is_not_there() -> None:
    """An empty class that stays empty counts as 1, an invented one as 0."""
    dice = dice_by_threshold(log_odds(0.3, 0.2), torch.tensor([0, 0]))[1]
    assert dice[AT[0.5]] == dice[AT[0.35]] == 1
    assert dice[AT[0.25]] == dice[AT[0.1]] == 0


def test_voxels_left_out() -> None:
    """Voxels of the ignored number change nothing."""
    with_them = dice_by_threshold(log_odds(0.9, 0.45, 0.3, 0.99), torch.tensor([1, 1, 0, 7]), 7)
    without = dice_by_threshold(log_odds(0.9, 0.45, 0.3), torch.tensor([1, 1, 0]))
    np.testing.assert_array_equal(with_them, without)


@pytest.mark.parametrize(("classes", "shape"), [(2, (40,)), (3, (6, 7)), (7, (5, 4, 3))])
@pytest.mark.parametrize("ignore_index", [None, -1])
def test_agrees_with_its_slow_twin(
    classes: int, shape: tuple[int, ...], ignore_index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass, slice by slice, gives what cutting and counting again for each class and threshold gives."""
    monkeypatch.setattr(decision_module, "SLICE", 13)
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(classes, *shape, generator=generator)
    true = torch.randint(-1 if ignore_index == -1 else 0, classes - 1, shape, generator=generator)  # the last is absent
    dice = dice_by_threshold(logits, true, ignore_index)
    for c in range(1, classes):
        for position, threshold in enumerate(GRID.tolist()):
            thresholds = [threshold if other == c else ARGMAX for other in range(classes)]
            assert dice[c, position] == pytest.approx(slow_dice(logits, true, thresholds, ignore_index), abs=1e-12)


def test_cutting() -> None:
    """A class takes what is above its threshold; all at 0.5, or none, is the argmax."""
    logits = log_odds(0.9, 0.45, 0.41, 0.39)
    assert cut(logits, [0.5, 0.4]).tolist() == [1, 1, 1, 0]
    assert cut(logits, [0.5, 0.95]).tolist() == [0, 0, 0, 0]
    assert cut(logits, [ARGMAX, ARGMAX]).tolist() == cut(logits, None).tolist() == [1, 0, 0, 0]
    drawn = torch.randn(5, 30)
    lift = torch.tensor([[1.0], [0.25], [4.0], [1.0], [9.0]]).log()
    assert torch.equal(cut(drawn, [0.5, 0.8, 0.2, 0.5, 0.1]), (drawn + lift).argmax(0))
    three = torch.tensor([[0.5], [0.3], [0.2]]).log()
    assert cut(three, [0.5, 0.3, 0.5]).tolist() == [1]  # 0.3 * 0.7 / 0.3 = 0.7 > 0.5
    assert cut(three, [0.5, 0.5, 0.25]).tolist() == [2]  # 0.2 * 3 = 0.6 > 0.5
    assert cut(three, [0.5, 0.3, 0.25]).tolist() == [1]


def table(*of_cases: dict[float, float], classes: int = 1, base: float = 0.8) -> np.ndarray:
    """Return (N, 1 + classes, G): `base`, and at some thresholds of each class but the first so much more."""
    dice = np.full((len(of_cases), 1 + classes, len(GRID)), base)
    for case, gains in zip(dice, of_cases, strict=True):
        for threshold, gain in gains.items():
            case[1:, AT[threshold]] += gain
    return dice


def not_asked(thresholds: Sequence[float]) -> list[float]:
    """Fail: with one class there is nothing to try together."""
    raise AssertionError(thresholds)


def test_a_gain_that_every_case_has() -> None:
    """All cases agree on 0.4: it is taken, with the mean and the standard error of the gains."""
    decision = tuned(table(*({0.4: gain} for gain in (0.01, 0.02, 0.03, 0.04))), not_asked)
    assert decision.thresholds == [ARGMAX, 0.4]
    assert decision.gains == pytest.approx([0, 0.025])
    assert decision.errors == pytest.approx([0, math.sqrt((0.015**2 + 0.005**2) * 2 / 3 / 4)])
    assert decision.text(["background", "disc"]) == "tuned thresholds: disc 0.4 (mean Dice +0.0250 +- 0.0065)"


def test_a_gain_within_its_error_is_none() -> None:
    """One case gains much, at a threshold that all others lose by: the class stays with the argmax."""
    decision = tuned(table({0.4: 0.5}, {0.4: -0.01}, {0.4: -0.01}, {0.4: -0.01}, {0.4: -0.01}), not_asked)
    assert decision.thresholds == [ARGMAX, ARGMAX]
    assert decision.gains[1] < decision.errors[1]
    assert decision.text(["background", "disc"]).startswith("argmax")


def test_each_case_is_cut_by_the_others() -> None:
    """Every case has its own best threshold: chosen by the others it gains nothing, where a common choice seems to."""
    decision = tuned(table(*({threshold: 0.1} for threshold in (0.3, 0.35, 0.4, 0.45))), not_asked)
    assert decision.gains == [0, 0]
    assert decision.thresholds == [ARGMAX, ARGMAX]


def test_nothing_to_gain_and_few_cases() -> None:
    """Equal thresholds leave the argmax; so do too few cases to tell a gain from chance."""
    assert tuned(table({}, {}, {}, {}, {}), not_asked).thresholds == [ARGMAX, ARGMAX]
    assert tuned(table({0.4: 0.1}, {0.4: 0.1}, {0.4: 0.1}), not_asked).thresholds == [ARGMAX, ARGMAX]


def test_classes_together() -> None:
    """Two classes that gain alone are both taken where they gain together, and else the one that gains more."""
    dice = table(*({0.4: 0.1} for _ in range(4)), classes=2)
    dice[:, 2, AT[0.6]] = 0.95
    assert tuned(dice, lambda thresholds: [0.9, 0.91, 0.9, 0.91]).thresholds == [ARGMAX, 0.4, 0.6]
    asked: list[Sequence[float]] = []

    def worse(thresholds: Sequence[float]) -> list[float]:
        asked.append(thresholds)
        return [0.7, 0.7, 0.8, 0.8]

    assert tuned(dice, worse).thresholds == [ARGMAX, ARGMAX, 0.6]
    assert asked == [[ARGMAX, 0.4, 0.6]]


# --- through train and predict


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of eight discs with a blurred border, of which half of the labels hold a wider one."""
    folder = tmp_path_factory.mktemp("data")
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for number in range(8):
        rng = np.random.default_rng(number)
        row, column = rng.uniform(10, 14, 2)
        distance = np.hypot(*(np.mgrid[:24, :24] - np.array([row, column])[:, None, None]))
        np.save(folder / "images" / f"{number}.npy", (6 - distance + rng.normal(size=(24, 24))).astype(np.float32))
        np.save(folder / "labels" / f"{number}.npy", 7 * (distance < 5 + 2 * (number % 2)).astype(np.int16))
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    settings = {"loss": "ce", "epochs": 2, "batch_size": 2, "val_fraction": 0.5}
    return out / "model.ckpt", train(TrainConfig(data=str(data), out=str(out), **settings))


def masks(model: Path, data: Path, out: Path, **options: Any) -> np.ndarray:
    return np.stack([read_image(path).array for path in predict(model, data / "images", out, **options)])


@pytest.mark.usefixtures("one_thread")
def test_a_run_tunes_on_its_held_out_cases(run: tuple[Path, dict[str, Any]], data: Path) -> None:
    """What the model and the summary hold is what the slow twin finds for the network and the held-out cases."""
    model, summary = run
    content, cases = load_checkpoint(model), read_folder(data)
    network, patch = load_network(content).eval(), content["data"]["patch"]
    dice = np.ones((4, 2, len(GRID)))
    for row, name in zip(dice, content["data"]["held_out"], strict=True):
        case = cases[cases.names.index(name)]
        logits = logits_of(network, torch.from_numpy(case.image), patch)
        row[1] = [slow_dice(logits, torch.from_numpy(case.label), [ARGMAX, threshold]) for threshold in GRID]
    decision = tuned(dice, not_asked)
    for key, column in (("threshold", "thresholds"), ("threshold_gain", "gains"), ("threshold_gain_error", "errors")):
        assert content["decision"][column] == pytest.approx(getattr(decision, column))
        assert [row[key] for row in summary["classes"]] == content["decision"][column]


@pytest.mark.usefixtures("one_thread")
def test_masks_by_thresholds_and_by_argmax(run: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    """A model with a low threshold gives more of the class, and says so; `--decide argmax` takes no notice of it."""
    content = load_checkpoint(run[0])
    content["decision"] = {"thresholds": [ARGMAX, 0.1], "gains": [0.0, 0.02], "errors": [0.0, 0.01]}
    save_checkpoint(tmp_path / "moved.ckpt", content)
    told: list[str] = []
    moved = masks(tmp_path / "moved.ckpt", data, tmp_path / "moved", line=told.append)
    name = content["data"]["class_names"][1]
    assert told == [f"Masks are cut by tuned thresholds: {name} 0.1 (mean Dice +0.0200 +- 0.0100)."]
    plain = masks(tmp_path / "moved.ckpt", data, tmp_path / "plain", decide="argmax", line=told.append)
    assert len(told) == 1
    assert np.all(moved >= plain)
    assert (moved > plain).any()
    assert {*np.unique(moved)} == {0, 7}
    del content["decision"]
    save_checkpoint(tmp_path / "earlier.ckpt", content)
    np.testing.assert_array_equal(masks(tmp_path / "earlier.ckpt", data, tmp_path / "earlier"), plain)


@pytest.mark.usefixtures("one_thread")
def test_thresholds_that_are_not_there(run: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    """A model of an unfinished run has none: asked for, that is an error; so is another word."""
    content = load_checkpoint(run[0])
    del content["decision"]
    save_checkpoint(tmp_path / "earlier.ckpt", content)
    words = ["predict", tmp_path / "earlier.ckpt", data / "images", tmp_path / "masks", "--decide"]
    refused(call(*words, "tuned"), "expected a model with tuned thresholds", "Leave out --decide")
    refused(call(*words, "rank"), "expected decide to be tuned or argmax, got rank")
    assert not (tmp_path / "masks").exists()
