"""What a run or a prediction must not do to a user's files, and what it says about wrong input."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("monai")
pytest.importorskip("typer")

from commands import call, refused
from rich.console import Console

from softdice.cli.progress import Bar
from softdice.images.files import left_out, read_image
from softdice.training import (
    PredictionError,
    TrainConfig,
    TrainingError,
    channels,
    inference,
    pictures,
    plan,
    predict,
    run,
    train,
)
from softdice.training.cases import Case, Cases, read_folder
from softdice.training.checkpoint import load_checkpoint, save_checkpoint
from softdice.training.loss_names import loss_names, parse_loss
from softdice.training.module import Budget
from softdice.training.patches import Patches
from softdice.training.plan import StepPlan, fit

pytestmark = pytest.mark.usefixtures("one_thread")


def make_data(folder: Path, void: int | None = None, count: int = 5) -> Path:
    """Noisy squares; with void, rows 16 to 19 are of no class, and bright like the square."""
    for number in range(count):
        rng = np.random.default_rng(number)
        label = np.zeros((24, 24), np.int16)
        row, column = rng.integers(2, 5, 2)
        label[row : row + 10, column : column + 10] = 1
        bright = label.copy()
        if void is not None:
            label[16:20], bright[16:20] = void, 1
        for part, array in (("images", rng.normal(size=(24, 24)) + 4 * bright), ("labels", label)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            np.save(folder / part / f"{number}.npy", array)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def config(data: Path, out: Path, **change: Any) -> TrainConfig:
    return replace(TrainConfig(data=str(data), out=str(out), loss="dice", epochs=1, batch_size=2), **change)


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(config(data, out))
    return out / "model.ckpt"


# --- files of the user


def test_a_prediction_replaces_nothing_unasked(model: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.jpeg", "c.png"):
        Image.new("L", (24, 24), 9).save(tmp_path / "in" / name)
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "b.png").write_text("drawn by hand")  # where the mask of a JPEG goes
    (masks / "c.png").symlink_to(tmp_path / "nowhere")
    result = call("predict", model, tmp_path / "in", masks)
    refused(result, f"expected no file in the place of a mask, got 2, the first {masks / 'b.png'}", "--overwrite")
    assert sorted(path.name for path in masks.iterdir()) == ["b.png", "c.png"]
    assert (masks / "b.png").read_text() == "drawn by hand"
    assert call("predict", model, tmp_path / "in", masks, "--overwrite").exit_code == 0
    assert all(read_image(masks / f"{name}.png").shape == (24, 24) for name in "abc")
    refused(call("predict", model, tmp_path / "in", masks), "got 3, the first")


def test_how_sure_each_mask_is(model: Path, tmp_path: Path) -> None:
    """The table against the probabilities of the network, and the same masks as without it."""
    from softdice.training.channels import scaled
    from softdice.training.checkpoint import load_network
    from softdice.training.evaluate import logits_of

    (tmp_path / "in").mkdir()
    generator = np.random.default_rng(0)
    for name in "abc":
        np.save(tmp_path / "in" / f"{name}.npy", generator.random((24, 30)) * (name != "c"))
    (tmp_path / "in" / "d.npy").write_bytes(b"broken")
    table = tmp_path / "sure.csv"
    assert call("predict", model, tmp_path / "in", tmp_path / "out", "--confidence", table).exit_code == 1
    header, *rows = [line.split(",") for line in table.read_text().splitlines()]
    assert header == ["mask", "confidence", "label 1"]
    assert sorted(row[0] for row in rows) == ["a.npy", "b.npy", "c.npy"]
    sure = [float(row[1] or "inf") for row in rows]
    assert sure == sorted(sure)
    call("predict", model, tmp_path / "in", tmp_path / "again")
    content = load_checkpoint(model)
    network = load_network(content).eval()
    for name, mean, of_label in rows:
        assert mean == of_label  # one class beside the background
        mask = read_image(tmp_path / "out" / name).array
        assert np.array_equal(mask, read_image(tmp_path / "again" / name).array)
        array = scaled(read_image(tmp_path / "in" / name).array[None].astype(np.float32), True)
        p = logits_of(network, torch.from_numpy(array), content["data"]["patch"]).softmax(0)[1].numpy()
        p, mask = np.where(p > 0.1, p, 0), mask == 1
        expected = 2 * p[mask].sum() / (p.sum() + mask.sum()) if p.sum() + mask.sum() > 0 else None
        assert of_label == "" if expected is None else float(of_label) == pytest.approx(expected, abs=1e-4)
    refused(call("predict", model, tmp_path / "in", tmp_path / "new", "--confidence", table), f"the first {table}")
    assert not (tmp_path / "new").exists()


def test_one_broken_image_does_not_stop_the_others(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, shape in (("a", (24, 24)), ("c", (9, 9, 9)), ("d", (30, 20))):
        np.save(tmp_path / "in" / f"{name}.npy", np.zeros(shape))
    (tmp_path / "in" / "b.npy").write_bytes(b"broken")
    (tmp_path / "in" / "e.nii").write_bytes(b"")
    result = call("predict", model, tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.npy", "d.npy"]
    assert result.stdout == f"2 masks written to {tmp_path / 'out'}\n"
    first, *lines = result.stderr.splitlines()
    assert first == "Not predicted: 3 of 5"
    for name, line in zip(("b.npy", "c.npy", "e.nii"), lines, strict=True):
        assert str(tmp_path / "in" / name) in line
    with pytest.raises(PredictionError) as error:
        predict(model, tmp_path / "in" / "c.npy", tmp_path / "o" / "p")
    assert error.value.written == []
    assert not (tmp_path / "o").exists()


def test_an_image_without_a_finite_value_gets_no_mask(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, value in (("a", np.nan), ("b", 0.0), ("c", np.inf)):
        np.save(tmp_path / "in" / f"{name}.npy", np.full((24, 24), value))
    result = call("predict", model, tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.npy"]
    assert "Not predicted: 2 of 3" in result.stderr
    assert f"{tmp_path / 'in' / 'a.npy'}: expected finite values, got none. A mask" in result.stderr


def test_memory_that_is_short_fails_one_image(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softdice.training import inference

    right = inference.logits_of

    def short(network: torch.nn.Module, image: torch.Tensor, patch: Any) -> torch.Tensor:
        if image.shape[-1] == 40:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        return right(network, image, patch)

    monkeypatch.setattr(inference, "logits_of", short)
    (tmp_path / "in").mkdir()
    for name, width in (("a", 40), ("b", 24)):
        np.save(tmp_path / "in" / f"{name}.npy", np.zeros((24, width)))
    with pytest.raises(PredictionError, match=r"a\.npy: .*can't allocate memory") as error:
        predict(model, tmp_path / "in", tmp_path / "out")
    assert [path.name for path in error.value.written] == ["b.npy"]


# --- checkpoints


def test_a_flipped_bit_and_weights_that_are_no_numbers_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    path = tmp_path / "model.ckpt"
    first = next(iter(load_checkpoint(model)["weights"].values())).numpy().tobytes()
    for at in (content.index(first) + 2, content.index(first) + len(first) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        refused(call("predict", path, data / "images", tmp_path / "m"), "got a damaged file: the checksum of")
    for value in (math.nan, math.inf):
        stored = load_checkpoint(model)
        last = list(stored["weights"])[-1]
        stored["weights"][last] = torch.full_like(stored["weights"][last], value)
        save_checkpoint(path, stored)
        refused(call("predict", path, data / "images", tmp_path / "m"), "without finite weights")
    assert not (tmp_path / "m").exists()


def _without(part: str, key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[part].pop(key)


def _with(part: str, **change: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[part].update(change)


def _first_moment(content: dict[str, Any]) -> None:
    state = content["optimizer"]["state"][0]
    state["exp_avg"] = state["exp_avg"][:1]


BOTH: dict[str, Callable[[dict[str, Any]], object]] = {
    "no weights": lambda content: content["weights"].clear(),
    "weights that are a number": lambda content: content.update(weights=3),
    "a further key in network": _with("network", depth=3),
    "other filters": _with("network", filters=[4, 8, 16]),
    "filters that are words": _with("network", filters=["a"] * 3),
    "empty data": lambda content: content["data"].clear(),
    "another number of classes": _with("data", values=[0, 1, 2]),
    "values that are words": _with("data", values=["a", "b"]),
    "a patch of one axis": _with("data", patch=[24]),
    "a patch of zeros": _with("data", patch=[0, 0]),
    "settings that are a number": lambda content: content.update(settings=3),
    "a scaling that is a word": _with("data", joint="perhaps"),
    "a clipping that is a word": _with("data", clipped="perhaps"),
    "thresholds of another number of classes": lambda content: content.update(decision={"thresholds": [0.5]}),
    "a threshold of 1": lambda content: content.update(decision={"thresholds": [0.5, 1.0]}),
    "a decision that is a word": lambda content: content.update(decision="argmax"),
    "channels of another network": _with("data", channels=3),
}
RESUMED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no settings": lambda content: content["settings"].clear(),
    "no loss": _without("settings", "loss"),
    "a rate that is a word": _with("settings", lr="fast"),
    "a setting of nothing": _with("settings", colour=3),
    "no optimizer": lambda content: content["optimizer"].clear(),
    "no moments": lambda content: content["optimizer"]["state"].clear(),
    "a moment of another shape": _first_moment,
    "no history": lambda content: content["history"].clear(),
    "history of other columns": lambda content: content["history"][0].pop("val_dice_label 1"),
    "steps that are a word": lambda content: content.update(step="many"),
    "no names": _with("data", training=[], held_out=[]),
}


@pytest.mark.parametrize("name", [*BOTH, *RESUMED])
def test_content_that_does_not_fit_is_refused_in_a_line(name: str, model: Path, data: Path, tmp_path: Path) -> None:
    content = load_checkpoint(model)
    (BOTH | RESUMED)[name](content)
    save_checkpoint(tmp_path / "model.ckpt", content)
    said = f"{tmp_path / 'model.ckpt'}: expected a model that softdice train wrote, got one whose content does not fit"
    refused(call("train", "--out", tmp_path, "--resume", "--epochs", 2), said)
    if name in BOTH:
        refused(call("predict", tmp_path / "model.ckpt", data / "images", tmp_path / "m"), said)


def test_nothing_of_torch_precedes_the_line(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"format": "softdice-model"}, path, pickle_protocol=4)  # about which torch would warn
    with warnings.catch_warnings(), pytest.raises(TrainingError, match="expected a model that softdice train wrote"):
        warnings.simplefilter("error")
        load_checkpoint(path)
    torch.save([1], path, _use_new_zipfile_serialization=False)
    with pytest.raises(TrainingError, match="does not read as plain weights"):
        load_checkpoint(path)


# --- options


@pytest.mark.parametrize(
    "options, said",
    [
        (("--loss", "ce+inf*dice"), "expected a number from 1e-06 to 1e+06 before '*', got inf. Change --loss."),
        (("--loss", "nan*ce"), "before '*', got nan"),
        (("--loss", "-0.5*ce"), "before '*', got -0.5"),
        (("--loss", "dice+0*ce"), "before '*', got 0"),
        (("--loss", "1e-300*dice"), "before '*', got 1e-300"),
        (("--loss", "+".join(["ce"] * 17)), "expected a sum of at most 16 losses, got 17"),
        (("--loss", "x" * 5000), f"got '{'x' * 40}'"),
        (("--patch", 2**21), "patches of 2097152x2097152, which take more than"),
        (("--batch-size", 10**12), "got 1000000000000 patches of 24x24, which take more than"),
        (("--max-minutes", "inf"), "expected max_minutes to be a number above 0, got inf"),
    ],
)
def test_options_beyond_reason_are_told_before_the_first_step(
    options: tuple[object, ...], said: str, data: Path, tmp_path: Path
) -> None:
    refused(call("train", data, "--out", tmp_path / "o", *options), said)
    assert not (tmp_path / "o").exists()


def test_memory_that_is_short_ends_a_run_in_a_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: Any, key: tuple[int, int]) -> None:
        raise MemoryError("Unable to allocate 3. TiB")

    monkeypatch.setattr(Patches, "__getitem__", short)
    result = call("train", data, "--out", tmp_path / "o", "--loss", "dice", "--max-steps", 1)
    refused(result, "expected enough memory for a step, got: Unable to allocate 3. TiB. Lower --batch-size or --patch.")


# --- labels


def test_intensities_of_8_bits_are_no_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    stripes = np.repeat(np.arange(60), 4)[:, None].repeat(30, 1)  # 60 classes, four voxels thick
    for name in "ab":
        np.save(tmp_path / "images" / f"{name}.npy", rng.random((240, 30)))
        np.save(tmp_path / "labels" / f"{name}.npy", stripes)
    assert len(read_folder(tmp_path).values) == 60
    np.save(tmp_path / "labels" / "b.npy", rng.integers(100, 200, (240, 30)).astype(np.float32))
    with pytest.raises(
        TrainingError, match=r"b\.npy: expected a label map, got 100 values, and neighbours that differ"
    ):
        read_folder(tmp_path)


@pytest.mark.parametrize("void", [-1, 255, 1000])
def test_voxels_of_the_ignored_label_enter_neither_loss_nor_scores(void: int, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", void)
    result = call(
        "train", data, "--out", tmp_path / "o", "--loss", "dice+ce", "--epochs", 2, "--batch-size", 4, "--ignore", void
    )
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert [row["name"] for row in summary["classes"]] == ["label 0", "label 1"]
    assert summary["ignore"] == void
    assert summary["mean_dice"] > 0.9  # the bright rows, which the network takes for label 1, would halve it
    predict(tmp_path / "o" / "model.ckpt", data / "images", tmp_path / "masks")
    (name,) = summary["held_out"]
    truth, mask = (np.load(folder / f"{name}.npy") for folder in (data / "labels", tmp_path / "masks"))
    counted = truth != void
    ours, theirs = ((labels == 1) & counted for labels in (mask, truth))
    assert summary["held_out"][name][1] == pytest.approx(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))
    refused(call("train", "--out", tmp_path / "o", "--resume", "--ignore", 7), f"expected ignore {void}, with which")


def test_the_lowest_label_may_be_ignored_and_two_must_remain(tmp_path: Path) -> None:
    data = make_data(tmp_path, 5)
    cases = read_folder(data, ignore=0)
    assert cases.values == [1, 5]
    assert set(np.unique(cases[0].label)) == {0, 1, 255}
    assert cases.ignore_index == 255
    np.save(data / "labels" / "0.npy", np.full((24, 24), 3))
    assert read_folder(data, ignore=3).values == [0, 1, 5]
    for number in range(5):
        np.save(data / "labels" / f"{number}.npy", np.full((24, 24), 3))
    with pytest.raises(TrainingError, match="got only none beside 3, which is left out"):
        read_folder(data, ignore=3)


@pytest.mark.parametrize("name", sorted(loss_names()))
def test_a_batch_of_which_no_voxel_counts_moves_nothing(name: str) -> None:
    logits = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = parse_loss(name, 3, ignore_index=255)(logits, torch.full((2, 6, 6), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_no_patch_is_laid_around_a_voxel_that_does_not_count() -> None:
    label = np.zeros((64, 64), np.uint8)
    label[0, 0], label[32:, 32:] = 1, 255
    case = Case("a", np.zeros((1, 64, 64), np.float32), label)
    cases = Cases(["a"], [0, 1], ["a", "b"], 2, 1, [(64, 64)], lambda number: case, ignored=9)
    assert [found.tolist() for found in Patches(cases, [0], (8, 8), 0)._positions(0, case)] == [[[0, 0]]]


def test_a_class_that_no_training_image_has_is_named(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    (held_out,) = train(config(data, tmp_path / "a", max_steps=1))["held_out"]
    label = np.load(data / "labels" / f"{held_out}.npy")
    label[0, 0] = 7
    np.save(data / "labels" / f"{held_out}.npy", label)
    result = call("train", data, "--out", tmp_path / "b", "--loss", "dice", "--max-steps", 1)
    assert "No training image has a voxel of label 7: it cannot be learnt" in result.output
    assert result.output.count("No training image") == 1


# --- time


def test_width_is_given_before_batch_and_batch_before_patch() -> None:
    def chosen(left_s: float, patch: tuple[int, ...] = (256, 256), **fixed: bool) -> tuple[Any, ...]:
        fixed = {"fixed_patch": False, "fixed_batch": False, **fixed}
        return fit(StepPlan(patch, 2, step_s=0.8), False, left_s, lambda: 1.6, **fixed)[:3]

    assert chosen(1000) == ((256, 256), 2, 16)
    assert chosen(300) == ((256, 256), 2, 8)
    assert chosen(130) == ((256, 256), 1, 8)
    assert chosen(65) == ((128, 256), 1, 8)
    assert chosen(1) == ((128, 128), 1, 8)
    assert chosen(1, (40, 56, 16)) == ((32, 32, 16), 2, 8)
    assert chosen(1, fixed_patch=True) == ((256, 256), 1, 8)
    assert chosen(1, fixed_batch=True) == ((128, 128), 2, 8)


def test_an_epoch_is_a_part_of_a_pass_where_a_pass_is_too_long() -> None:
    budget = Budget(None, 120.0, 5000)
    assert budget.epoch_steps() == 5000  # nothing is known of the machine
    budget.step_s = 0.5
    assert budget.epoch_steps() == 20
    budget.reserve_s = 60
    assert budget.epoch_steps() == 10
    budget.step_s = 100
    assert budget.epoch_steps() == 1
    assert Budget(3, 120.0, 5000, step_s=0.5).epoch_steps() == 5000  # epochs that were asked for are whole
    assert Budget(None, 120.0, 7, step_s=0.5).epoch_steps() == 7


def test_the_end_of_a_run_is_kept_back_from_its_minutes_but_not_more_than_half() -> None:
    budget = Budget(None, 100.0, 10, elapsed_before_s=40.0)
    assert budget.fraction(0) == pytest.approx(0.4, abs=0.01)
    budget.reserve_s = 20
    assert budget.fraction(0) == pytest.approx(0.5, abs=0.01)
    budget.reserve_s = 1e6
    assert budget.fraction(0) == pytest.approx(0.8, abs=0.01)


def test_minutes_hold_several_validations_and_the_plan_is_told(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", count=10)  # five held out: fewer have no interval
    result = call("train", data, "--out", tmp_path / "o", "--loss", "dice", "--max-minutes", 0.2, "--val-fraction", 0.5)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["epochs_done"] >= 4
    assert summary["plan"].split(",")[0] in ("8 first filters", "16 first filters")
    assert f"Plan: {summary['plan']}\n" in result.output
    assert summary["elapsed_s"] < 12
    low, high = summary["mean_dice_95"]
    assert low <= summary["mean_dice"] <= high
    *_, held_out, written, look, following = result.stdout.splitlines()
    assert held_out.startswith(
        f"Held-out Dice {summary['mean_dice']:.4f} (95 % interval {low:.4f} to {high:.4f}) after"
    )
    assert held_out.endswith(f"{summary['steps_done']} steps in {summary['epochs_done']} epochs")
    assert written.startswith(f"Written to {tmp_path / 'o'}: model.ckpt")
    assert look == f"Look: {tmp_path / 'o' / 'overlays.png'}"
    assert following == f"Next: softdice predict {tmp_path / 'o' / 'model.ckpt'} NEW_IMAGES {tmp_path / 'o' / 'masks'}"


@pytest.mark.parametrize("alone_s, expected", [(0.5, 1), (2.0, 2)])
def test_one_thread_is_taken_where_it_is_faster_and_the_others_come_back(
    alone_s: float, expected: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "step_seconds", lambda *rest: alone_s if torch.get_num_threads() == 1 else 1.0)
    torch.set_num_threads(2)
    try:
        summary = train(config(data, tmp_path, max_minutes=1, max_steps=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert summary["device"] == f"CPU, {expected} threads"
    assert f"{expected} thread" in summary["plan"]


def test_too_little_time_is_told_before_the_start(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "step_seconds", lambda *rest: 1.0)
    result = call("train", data, "--out", tmp_path, "--loss", "dice", "--max-minutes", 0.05, "--max-steps", 1)
    assert "steps fit into 0.05 minutes, and fewer than 100 learn little. Give --max-minutes" in result.output


def test_a_run_whose_time_is_over_before_it_starts_leaves_a_model(data: Path, tmp_path: Path) -> None:
    summary = train(config(data, tmp_path, epochs=None, max_minutes=1e-4))
    assert (summary["steps_done"], summary["epochs_done"]) == (1, 1)
    assert load_checkpoint(tmp_path / "model.ckpt", resume=True)["step"] == 1
    again = train(TrainConfig(out=str(tmp_path), resume=True))  # nothing is left to do
    assert again["steps_done"] == 1


def test_a_log_gets_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("softdice.cli.progress.time.monotonic", lambda: now)
    with Bar(Console(force_terminal=False)) as bar:
        for step in range(101):
            now = 1000.0 + step
            bar.progress(step / 100, 1, 0.5, None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("%")[0].split()[-1] for line in lines] == ["0", "30", "60", "90", "100"]
    assert [line.split("%  ")[-1] for line in lines[1:]] == ["1:10 left", "0:40 left", "0:10 left", "0:00 left"]


def test_a_case_that_is_shown_is_predicted_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softdice.training import evaluate

    right, seen = evaluate.logits_of, []
    monkeypatch.setattr(evaluate, "logits_of", lambda *given: seen.append(1) or right(*given))
    summary = train(config(data, tmp_path, val_fraction=0.6, max_steps=1))
    assert len(summary["held_out"]) == 3
    assert len(seen) - 3 <= 3  # each once, and the cases of the only validation


def test_curves_of_one_epoch_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or b"")
    pictures.curves([{"epoch": 1, "loss": 0.9, "val_dice": 0.5, "val_dice_b": 0.5}], ["a", "b"])
    for axes in figures[0].axes:
        assert axes.get_xlim() == (0, 2)
        low, high = axes.get_ylim()
        assert low == 0
        assert high >= 0.9


# --- images of other kinds


@pytest.mark.parametrize(("factor", "offset"), [(1, 1e9), (1e-3, -1e6), (1e-40, 0), (1e36, 0)])
def test_intensities_that_float32_would_lose_are_scaled_alike(factor: float, offset: float, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 200, (24, 30)).astype(np.float64)
    expected = channels.normalise(array)
    moved = array * factor + offset
    np.testing.assert_allclose(channels.normalise(moved), expected, atol=1e-5)
    for name in "ab":  # kept in memory between reading and scaling
        for part, each in (("images", moved), ("labels", array > 100)):
            (tmp_path / part).mkdir(exist_ok=True)
            np.save(tmp_path / part / f"{name}.npy", each)
    np.testing.assert_allclose(read_folder(tmp_path)[1].image[0], expected, atol=1e-5)


def test_a_small_object_on_one_value_far_from_zero_is_not_lost() -> None:
    array = np.full((60, 60), 7.0)
    array[:2, :2] = 12  # 0.1 %: beyond the percentiles, which are equal
    np.testing.assert_allclose(channels.normalise(array + 1e9), channels.normalise(array), atol=1e-4)


def test_whole_numbers_far_from_zero_keep_their_differences_beside_missing_data(tmp_path: Path) -> None:
    array = np.array([[10**9, 10**9 + 1], [10**9 + 2, -1]], np.int32)
    np.save(tmp_path / "a.npy", array)
    reading = channels.read_channels({0: tmp_path / "a.npy"}, nodata=-1)
    assert np.diff(reading.array[0, 0]).tolist() == [1]
    assert np.isnan(reading.array[0, 1, 1])


@pytest.mark.parametrize("grey", [True, False])
def test_the_colours_of_a_palette_are_the_picture(grey: bool, tmp_path: Path) -> None:
    """A palette in another order, same colours, is the same picture."""
    from PIL import Image

    palette = np.array([[200, 20, 90], [0, 255, 30], [70, 70, 200]], np.uint8)
    palette[:, 1:] = palette[:, :1] if grey else palette[:, 1:]
    indices = np.random.default_rng(0).integers(0, 3, (8, 9)).astype(np.uint8)
    arrays = []
    for order, suffix in (([0, 1, 2], "png"), ([2, 0, 1], "bmp")):
        picture = Image.fromarray(np.argsort(order).astype(np.uint8)[indices])
        picture.putpalette(palette[order].tobytes())
        picture.save(tmp_path / f"a.{suffix}")
        arrays.append(channels.read_channels({0: tmp_path / f"a.{suffix}"}).array)
    colours = np.moveaxis(palette[indices], -1, 0)
    assert all(array.tolist() == colours[: 1 if grey else 3].tolist() for array in arrays)


@pytest.mark.parametrize("grey", [True, False])
@pytest.mark.parametrize("tagged", [True, False])
def test_missing_data_of_a_palette_are_indices_not_colours(grey: bool, tagged: bool, tmp_path: Path) -> None:
    """Index 2 is missing; components of the colours are 2, too."""
    tifffile = pytest.importorskip("tifffile")
    palette = np.tile(np.arange(256, dtype=np.uint16)[::-1], (3, 1))  # index 253 is (2, 2, 2)
    palette[1:, 253] = palette[1:, 253] if grey else [200, 9]
    indices = np.array([[2, 253, 7], [253, 2, 9]], np.uint8)
    extra = {"extratags": [(42113, "s", 0, "2", True)]} if tagged else {}
    tifffile.imwrite(tmp_path / "a.tif", indices, photometric="palette", colormap=palette * 256, **extra)
    array = channels.read_channels({0: tmp_path / "a.tif"}, nodata=None if tagged else 2).array
    colours = np.moveaxis(palette.T[indices], -1, 0)[: 1 if grey else 3]
    np.testing.assert_array_equal(array, np.where(indices == 2, np.nan, colours))


def test_no_colour_of_a_palette_is_advised_as_missing_data(tmp_path: Path) -> None:
    """`--nodata` names an index."""
    from PIL import Image

    for name in "ab":
        for part in ("images", "labels"):
            (tmp_path / part).mkdir(exist_ok=True)
            picture = Image.fromarray(np.repeat(np.arange(24, dtype=np.uint8) % 8, 24).reshape(24, 24))
            if part == "images":
                picture.putpalette(np.repeat(np.array([255, *range(7)], np.uint8), 3).tobytes())  # 0 is white
            picture.save(tmp_path / part / f"{name}.png")
    assert not [line for line in run._doubts(read_folder(tmp_path, foreground=False), [0]) if "--nodata" in line]


def test_images_of_bool_are_learnt(tmp_path: Path) -> None:
    for number in range(3):
        square = np.zeros((16, 16), bool)
        square[number + 2 : number + 9, 3:12] = True
        for part in ("images", "labels"):
            (tmp_path / part).mkdir(exist_ok=True)
            np.save(tmp_path / part / f"{number}.npy", square)
    train(config(tmp_path, tmp_path / "run", max_steps=1))
    assert len(predict(tmp_path / "run" / "model.ckpt", tmp_path / "images", tmp_path / "masks")) == 3


@pytest.mark.parametrize("axis", [0, 2])
def test_channels_where_no_format_has_them_are_told(axis: int, tmp_path: Path) -> None:
    for part, array in (("images", np.stack([np.eye(8)] * 3, axis)), ("labels", np.eye(8, dtype=np.uint8))):
        (tmp_path / part).mkdir()
        for name in "ab":
            np.save(tmp_path / part / f"{name}.npy", array)
    with pytest.raises(TrainingError, match="If one axis is that of channels: save colours as PNG"):
        read_folder(tmp_path)


# --- names, folders and files


def test_names_that_matplotlib_cannot_draw(tmp_path: Path) -> None:
    names = ["a$\\frac$", b"\xff".decode("utf-8", "surrogateescape"), "\u56fe"]
    image = np.zeros((1, 4, 4), np.float32)
    mask = np.eye(4, dtype=np.uint8)
    drawn = [pictures.Shown(name, 0.5, image, mask, mask) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.overlays(drawn, [], ["b", *names]).startswith(b"\x89PNG")
        row = {"epoch": 1, "loss": 0.9, "val_dice": 0.5, **{f"val_dice_{name}": 0.5 for name in names}}
        assert pictures.curves([row], ["b", *names]).startswith(b"\x89PNG")


def test_a_second_run_does_not_enter_the_folder_of_one_under_way(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")

    class Second:
        """Starts a run from within another one."""

        def line(self, text: str) -> None:
            if text.startswith("Run:"):
                message = "expected no other run in .*, got one that has not ended, or is still ending"
                with pytest.raises(TrainingError, match=message):
                    train(config(data, tmp_path, resume=True))
                lines.append(text)

        def progress(self, fraction: float, epoch: int, loss: float, dice: float | None) -> None:
            return

    lines: list[str] = []
    train(config(data, tmp_path, max_steps=1), Second())
    assert lines
    assert not list(tmp_path.glob("model.1.ckpt"))


def test_a_folder_is_free_after_a_run_whose_workers_live_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked worker holds a copy of the descriptor."""
    pytest.importorskip("fcntl")
    copies: list[int] = []
    plain = run.os.open

    def copied(path: Path, flags: int) -> int:
        descriptor = plain(path, flags)
        copies.append(run.os.dup(descriptor))
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(run.os, "open", copied)
        with run._locked(tmp_path):
            pass
    with run._locked(tmp_path):
        pass
    for copy in copies:
        run.os.close(copy)


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")

    def forbidden(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run.os, "open", forbidden)
    advice = "Permit it, or choose another --out"
    with pytest.raises(TrainingError, match=rf"to read .*, got Permission denied\. {advice}"), run._locked(tmp_path):
        pass


def test_a_run_is_resumed_with_its_patch_and_its_images_alone(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    settings = config(tmp_path / "data", tmp_path / "run", max_steps=1, patch=(16, 24))
    train(settings)
    again = replace(settings, resume=True)
    with pytest.raises(TrainingError, match=r"expected patch \(16, 24\), .* got \(24, 16\)"):
        train(replace(again, patch=(24, 16)))
    for part in ("images", "labels"):
        array = np.load(tmp_path / "data" / part / "3.npy")
        np.save(tmp_path / "data" / part / "3.npy", array[:20])
    with pytest.raises(TrainingError, match="other names, sizes, labels or channels"):
        train(again)


@pytest.mark.parametrize("others", ["\u00e9", "f"])
def test_a_run_of_an_earlier_release_with_accents_is_resumed_if_its_split_is_the_same(
    others: str, tmp_path: Path
) -> None:
    """It kept names as macOS writes them, e with an accent, which sorts before f; \u00e9 sorts after it."""
    make_data(tmp_path / "data")
    for path in sorted(tmp_path.glob("data/*/*.npy")):
        path.rename(path.with_stem(("\u00e9" if path.stem in "23" else others) + path.stem))
    settings = config(tmp_path / "data", tmp_path / "run", max_steps=1)
    train(settings)
    content = load_checkpoint(tmp_path / "run" / "model.ckpt")
    names = sorted(normalize("NFD", name) for part in ("training", "held_out") for name in content["data"][part])
    for part, numbers in zip(("held_out", "training"), ([4], [0, 1, 2, 3]), strict=True):
        content["data"][part] = [names[number] for number in numbers]
    save_checkpoint(tmp_path / "run" / "model.ckpt", content)
    again = replace(settings, resume=True, epochs=2, max_steps=2)
    if others == "f":
        with pytest.raises(TrainingError, match=r"the same names, which now sort in another order, .* another --out"):
            train(again)
    else:
        train(again)
        assert load_checkpoint(tmp_path / "run" / "model.ckpt")["step"] == 2


def test_images_that_lie_in_the_folder_of_masks_behind_links_are_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans" / "a.npy", np.eye(24))
    (tmp_path / "links" / "a.npy").symlink_to(tmp_path / "scans" / "a.npy")
    with pytest.raises(TrainingError, match="The masks would replace the images"):
        predict(model, tmp_path / "links", tmp_path / "scans", overwrite=True)


def test_a_table_that_cannot_be_written_is_told_before_the_masks(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", np.eye(24))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TrainingError, match="Choose another --confidence"):
        predict(model, tmp_path / "in", tmp_path / "masks", confidence=tmp_path / "file" / "sure.csv")
    assert not (tmp_path / "masks").exists()
    predict(model, tmp_path / "in", tmp_path / "masks", confidence=tmp_path / "new" / "sure.csv")
    assert (tmp_path / "new" / "sure.csv").exists()


# --- what is said before a run


@pytest.mark.parametrize("foreground", [None, True])
def test_labels_of_missing_data_are_named(foreground: bool | None, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    for number in range(3):
        for part, array in (("images", np.eye(16)), ("labels", np.eye(16, dtype=np.uint8))):
            (tmp_path / part).mkdir(exist_ok=True)
            if part == "labels":
                array[number, 5:] = 9
            tag = (42113, "s", 0, "9" if part == "labels" and number else "0", True)
            tifffile.imwrite(tmp_path / part / f"{number}.tif", array, extratags=[tag])
    said = "The label 9, which GDAL_NODATA names as missing data, is trained on."
    for ignore in (None, 9):
        cases = read_folder(tmp_path, foreground=foreground, ignore=ignore)
        doubts = [line for line in run._doubts(cases, [0, 1]) if line.startswith(said)]
        assert doubts == [f"{said} If it stands for voxels of no class, start again with --ignore 9."] * (
            ignore is None
        )


@pytest.mark.parametrize("values, void", [([-1, 0, 1], -1), ([0, 1, 255], 255), ([0, 255], None), ([0, 254], None)])
def test_labels_that_often_mean_no_class_are_named(values: list[int], void: int | None, tmp_path: Path) -> None:
    for name in "ab":
        for part, array in (("images", np.eye(24)), ("labels", np.repeat(np.resize(values, (24, 6)), 4, 1))):
            (tmp_path / part).mkdir(exist_ok=True)
            np.save(tmp_path / part / f"{name}.npy", array)
    advice = f"If it stands for voxels of no class, start again with --ignore {void}."
    doubts = [line for line in run._doubts(read_folder(tmp_path), [0]) if "no class" in line]
    assert doubts == [f"The label {void} is trained on. {advice}"] * (void is not None)
    assert not [line for line in run._doubts(read_folder(tmp_path, ignore=void), [0]) if "no class" in line]


def test_doubts_stay_short_and_a_label_to_ignore_that_is_nowhere_is_named(tmp_path: Path) -> None:
    make_data(tmp_path)
    label = np.repeat(np.arange(24)[:, None], 24, axis=1)
    np.save(tmp_path / "labels" / "4.npy", label)
    cases = read_folder(tmp_path, ignore=255, foreground=False)
    doubts = [*run._doubts(cases, [0, 1, 2, 3])]
    assert doubts[0] == "No label file has the value 255, which is to be left out."
    names = ", ".join(f"label {n}" for n in range(2, 10))
    assert doubts[1:] == [f"No training image has a voxel of {names}, ...: they cannot be learnt, and score 0."]
    (mapped,) = run._doubts(read_folder(tmp_path, ignore=1, foreground=False), [4])
    assert mapped.startswith("Labels mapped: 0 -> 0, 2 -> 1")


def test_a_folder_without_images_is_predicted_with_a_word_on_what_it_holds(model: Path, tmp_path: Path) -> None:
    (tmp_path / "scans" / "labels").mkdir(parents=True)
    (tmp_path / "scans" / "a.txt").write_text("no image")
    with pytest.raises(TrainingError, match=r"none\. It holds a\.txt, labels, which are not read"):
        predict(model, tmp_path / "scans", tmp_path / "masks")


def make_series(folder: Path, uids: list[str], heights: list[float]) -> Path:
    """A slice of DICOM of each of the series `uids`, at a height in mm."""
    pytest.importorskip("pydicom")
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir()
    for number, (uid, height) in enumerate(zip(uids, heights, strict=True)):
        part = sitk.GetImageFromArray(np.full((8, 8), number, np.int16)[None])
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        place = {"0020|0032": f"0\\0\\{height}", "0020|0037": "1\\0\\0\\0\\1\\0"}
        for key, value in {"0008|0060": "CT", "0020|000e": uid, **place}.items():
            part.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{number}.dcm"))
        writer.Execute(part)
    return folder


@pytest.mark.parametrize("one", [True, False])
def test_the_slices_of_a_dicom_series_are_one_image(one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_series(tmp_path / "scan", ["1.2.3" if one else f"1.2.3.{z}" for z in range(3)], [0, 1, 2])
    monkeypatch.chdir(folder)
    for path in (folder, Path()):
        assert [*inference._cases(path, by_channel=False)] == (["scan"] if one else ["0", "1", "2"])
    cases = inference._cases(folder, by_channel=False)
    with pytest.raises(TrainingError, match="The masks would replace the images"):
        inference._places(cases, folder, None, overwrite=False)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_channels_beside_a_file_with_an_accent_are_found(form: Literal["NFC", "NFD"], tmp_path: Path) -> None:
    paths = [tmp_path / normalize(form, f"caf\u00e9_{number:04}.npy") for number in range(3)]
    for path in paths:
        path.write_bytes(b"")
    assert inference._cases(paths[0], by_channel=True) == {"caf\u00e9": dict(enumerate(paths))}


def test_hidden_files_are_no_reason_why_a_folder_has_no_images(model: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for name, advice in ((".DS_Store", "Check the folder."), ("b.txt", r"It holds b\.txt, which are not read\.")):
        (tmp_path / "scans" / name).write_text("no image")
        with pytest.raises(TrainingError, match=f"got none. {advice}"):
            predict(model, tmp_path / "scans", tmp_path / "masks")


@pytest.mark.parametrize("other", ["a.npy", "b.nrrd", "series", "damaged.dcm"])
def test_images_beside_the_slices_of_a_series_are_not_passed_over(other: str, tmp_path: Path) -> None:
    slices = 1 if other == "damaged.dcm" else 2
    folder = make_series(tmp_path / "scans", ["1.2.3"] * slices, [0, 1][:slices])
    if other == "series":
        make_series(folder / other, ["1.2.4"] * 2, [0, 1])
    else:
        (folder / other).write_bytes(b"")
    assert [*inference._cases(folder, by_channel=False)] == [*"01"[:slices], other.split(".")[0]]


@pytest.mark.parametrize("uids, heights", [(["1.2.3"] * 4, [0, 1, 3, 4]), (["1.2.3"] * 3, [0, 0, 1])])
def test_a_series_that_makes_no_volume_is_told_as_one_image(
    uids: list[str], heights: list[float], model: Path, tmp_path: Path
) -> None:
    folder = make_series(tmp_path / "scan", uids, heights)
    with pytest.raises(PredictionError, match="expected slices at equal distances") as error:
        predict(model, folder, tmp_path / "masks")
    assert len(error.value.errors) == 1


@pytest.mark.parametrize("value", [np.finfo(np.float32).min, 16777218.0, -9999.0, 0.1])
def test_the_value_to_name_as_missing_data_is_the_one_in_the_images(value: float, tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(1e3 if value == 0.1 else 0, 1, (24, 24)).astype(np.float32)
    image[:4] = value
    for name in "ab":
        for part, array in (("images", image), ("labels", np.eye(24, dtype=np.uint8))):
            (tmp_path / part).mkdir(exist_ok=True)
            np.save(tmp_path / part / f"{name}.npy", array)
    (doubt,) = run._doubts(read_folder(tmp_path), [0])
    advised = float(doubt.split("--nodata ")[1].rstrip("."))
    assert not [*run._doubts(read_folder(tmp_path, nodata=advised), [0])]


def test_files_that_are_left_out_are_named_as_far_as_a_line_can(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{number:02}.txt").write_text("no image")
    assert left_out(tmp_path, []).endswith(": " + ", ".join(f"{n:02}.txt" for n in range(20)) + " and 5 more")


@pytest.mark.parametrize("option", [("--nodata", 0), ("--ignore-geometry",), ("--ignore", 255), ("--foreground",)])
def test_an_option_about_a_folder_is_not_passed_over_without_one(option: tuple[object, ...], tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    result = call("train", "--out", tmp_path / "run", "--max-steps", 1, *option)
    refused(result, f"expected a folder DATA with {option[0]}, got none.", "Give DATA")
