"""Whole runs on tiny images: what is written, that it repeats, and that a killed run goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("monai")

from softdice.images.files import read_image
from softdice.training import TrainConfig, TrainingError, channels, predict, train
from softdice.training.checkpoint import load_checkpoint, save_checkpoint
from softdice.training.loss_names import loss_names, parse_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def make_data(
    folder: Path, *, shape: tuple[int, ...] = (24, 24), count: int = 5, values: tuple[int, ...] = (0, 1)
) -> Path:
    """Noise with a brighter square or cube: learnt in a few steps."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        label = np.zeros(shape, np.int16)
        corner = rng.integers(2, 8, len(shape))
        label[tuple(slice(c, c + 10) for c in corner)] = 1
        np.save(folder / "images" / f"{number}.npy", rng.normal(size=shape).astype(np.float32) + 4 * label)
        np.save(folder / "labels" / f"{number}.npy", np.array(values, np.int16)[label])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "squares", values=(3, 200))


def config(data: Path, out: Path, **change: Any) -> TrainConfig:
    return replace(TrainConfig(data=str(data), out=str(out), loss="dice", epochs=2, batch_size=2), **change)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    return out, train(config(data, out))


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = (load_checkpoint(path / "model.ckpt") for path in (a, b))
    assert ours["epoch"] == theirs["epoch"]
    for name, tensor in ours["weights"].items():
        assert torch.equal(tensor, theirs["weights"][name]), name
    for number, state in ours["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, theirs["optimizer"]["state"][number][name]), (number, name)


def test_a_run_learns_and_writes_its_files(run: tuple[Path, dict[str, Any]]) -> None:
    out, summary = run
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png", "metrics.csv", "model.ckpt", "overlays.png", "summary.json",
    ]  # fmt: skip
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["mean_dice"] > 0.9
    assert [row["label_value"] for row in summary["classes"]] == [3, 200]
    assert summary["label_mapping"] == {"3": 0, "200": 1}
    assert (summary["training_cases"], len(summary["held_out"])) == (4, 1)
    assert (summary["seed"], summary["loss"], summary["epochs_done"]) == (42, "dice", 2)
    assert summary["versions"]["torch"] == torch.__version__
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[1]["val_dice"]) == pytest.approx(float(rows[1]["val_dice_label 200"]))
    for picture in ("curves.png", "overlays.png"):
        assert read_image(out / picture).array.std() > 5


def test_the_summary_can_be_had_from_the_masks_again(
    run: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    out, summary = run
    predict(out / "model.ckpt", data / "images", tmp_path)
    (name,) = summary["held_out"]
    truth, mask = (np.load(folder / f"{name}.npy") == 200 for folder in (data / "labels", tmp_path))
    dice = 2 * (truth & mask).sum() / (truth.sum() + mask.sum())
    assert summary["held_out"][name][1] == pytest.approx(dice)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    run: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    out, summary = run
    torch.rand(5)  # the state of the process is of no importance
    again = train(config(data, tmp_path / "again"))
    assert_same_weights(out, tmp_path / "again")
    assert again["held_out"] == summary["held_out"]
    train(config(data, tmp_path / "other", seed=43, epochs=1))
    with pytest.raises(AssertionError):
        assert_same_weights(out, tmp_path / "other")


def test_a_killed_run_goes_on_and_ends_with_the_bits_of_an_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = ["--loss", "dice", "--epochs", "4", "--batch-size", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "softdice", "train", str(data), "--out", str(killed), *settings],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 120
    while not (killed / "model.ckpt").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = load_checkpoint(killed / "model.ckpt")["epoch"]
    assert 1 <= done < 4
    (killed / ".metrics.csv.half").write_text("epoch,st")  # as if it had been killed while it wrote
    assert not (killed / "summary.json").exists()
    resumed = train(TrainConfig(out=str(killed), resume=True))  # everything else is in the checkpoint
    uninterrupted = train(config(data, whole, epochs=4))
    assert_same_weights(whole, killed)
    assert resumed["held_out"] == uninterrupted["held_out"]
    assert [row["epoch"] for row in load_checkpoint(killed / "model.ckpt")["history"]] == [1, 2, 3, 4]
    assert not list(killed.glob(".*")), "a file written beside was left behind"


def test_a_run_that_an_earlier_release_started_keeps_its_intensities(
    run: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = load_checkpoint(run[0] / "model.ckpt", resume=True)
    del content["data"]["clipped"]
    save_checkpoint(tmp_path / "model.ckpt", content)
    clippings: list[bool] = []
    right = channels.normalise

    def recorded(array: np.ndarray, *, clipped: bool = False) -> np.ndarray:
        clippings.append(clipped)
        return right(array, clipped=clipped)

    monkeypatch.setattr(channels, "normalise", recorded)
    train(TrainConfig(out=str(tmp_path), resume=True))
    assert clippings
    assert all(clippings)


def test_resuming_a_finished_run_trains_no_more(run: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    out, summary = run
    (tmp_path / "model.ckpt").write_bytes((out / "model.ckpt").read_bytes())
    assert train(TrainConfig(out=str(tmp_path), resume=True)) == summary
    assert_same_weights(out, tmp_path)


def test_resuming_on_other_data_is_refused(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    other = make_data(tmp_path / "other", values=(0, 9))
    with pytest.raises(TrainingError, match=r"expected the data with which the run in .* was started"):
        train(TrainConfig(data=str(other), out=str(run[0]), resume=True))


def test_files_of_earlier_runs_are_numbered_and_none_is_replaced(data: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("mine")  # no run wrote it
    (tmp_path / "model.7.ckpt").write_text("an old one")
    kept = {}
    for number in (9, 10):
        train(config(data, tmp_path, epochs=1, max_steps=1, seed=number))
        kept |= {f"{name}.{number}": (tmp_path / name).read_bytes() for name in ("model.ckpt", "curves.png")}
    train(config(data, tmp_path, epochs=1, max_steps=1))
    assert (tmp_path / "summary.8.json").read_text() == "mine"
    assert (tmp_path / "model.7.ckpt").read_text() == "an old one"
    assert load_checkpoint(tmp_path / "model.ckpt")["settings"]["seed"] == 42
    for name, content in kept.items():
        stem, suffix, number = name.split(".")
        assert (tmp_path / f"{stem}.{number}.{suffix}").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 17


def test_a_start_that_fails_leaves_what_was_there(data: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.ckpt").write_text("precious")
    for out in (tmp_path / "a" / "b", tmp_path / "old"):
        with pytest.raises(TrainingError, match="expected a folder"):
            train(config(tmp_path / "nowhere", out))
    with pytest.raises(TrainingError, match="expected a finite loss"):
        train(config(data, tmp_path / "a" / "b", lr=1e30))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model.ckpt", "old"]
    assert (tmp_path / "old" / "model.ckpt").read_text() == "precious"


def test_minutes_end_a_run_within_an_epoch(data: Path, tmp_path: Path) -> None:
    summary = train(config(data, tmp_path, epochs=None, max_minutes=0.01))
    assert summary["epochs_done"] >= 1
    assert summary["steps_done"] < 24 * 100
    assert train(TrainConfig(out=str(tmp_path), resume=True))["steps_done"] == summary["steps_done"]


def test_volumes_of_different_shapes(tmp_path: Path) -> None:
    data = make_data(tmp_path / "cubes", shape=(24, 20, 19), count=3)
    np.save(data / "images" / "0.npy", np.load(data / "images" / "0.npy")[:, :18])
    np.save(data / "labels" / "0.npy", np.load(data / "labels" / "0.npy")[:, :18])
    summary = train(config(data, tmp_path / "out", epochs=1, patch=(16, 16, 16)))
    assert summary["mean_dice"] > 0.5
    assert summary["network"]["spatial_ndim"] == 3


def test_a_loss_that_is_no_number_ends_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"expected a finite loss, got .* Lower --lr"):
        train(config(data, tmp_path, lr=1e30))


def test_a_full_disk_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("softdice.training.checkpoint.written_beside", full)
    with pytest.raises(TrainingError, match=r"expected to write .*model.ckpt, got: No space left on device"):
        train(config(data, tmp_path, epochs=1))


def test_ctrl_c_keeps_the_last_epoch(data: Path, tmp_path: Path) -> None:
    class Stop:
        def line(self, text: str) -> None:
            pass

        def progress(self, fraction: float, epoch: int, loss: float, dice: float | None) -> None:
            if epoch == 2:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path, epochs=3), Stop())
    finally:
        signal.signal(signal.SIGINT, before)
    assert load_checkpoint(tmp_path / "model.ckpt")["epoch"] == 1


def test_losses_are_found_by_name() -> None:
    names = loss_names()
    assert "dice" in names
    assert type(parse_loss("soft-dice", 2)).__name__ == "SoftDiceLoss"
    assert parse_loss("dice + 0.5*dice", 2).weights == (1.0, 0.5)
    with pytest.raises(TrainingError, match=f"expected a loss among {', '.join(names)}.* got 'nonsense'"):
        parse_loss("dice+nonsense", 2)
    with pytest.raises(TrainingError, match=r"expected a number before '\*', got 'x'"):
        parse_loss("x*dice", 2)


@pytest.mark.parametrize("name", sorted(loss_names()))
def test_every_loss_trains_also_where_a_class_is_absent(name: str) -> None:
    logits = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = (torch.arange(72).view(2, 6, 6) % 2).to(torch.uint8)
    loss = parse_loss(name, 3)(logits, labels)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


# --- predictions


def write_as(path: Path, suffix: str, array: np.ndarray) -> tuple[Path, Any]:
    """array -> file with a geometry that can be recognised again."""
    path = path.with_name(path.name + suffix)
    if suffix.startswith(".nii"):
        import nibabel

        affine = np.array([[-1.5, 0.1, 0, 3], [0, 2.0, 0, 4], [0.1, 0, 2.5, 5], [0, 0, 0, 1]])
        nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), affine), path)
        return path, affine
    if suffix in (".tif", ".tiff"):
        import tifffile

        tifffile.imwrite(path, array.astype(np.uint16))
    elif suffix == ".npz":
        np.savez(path, array)
    elif suffix == ".npy":
        np.save(path, array)
    else:
        from PIL import Image

        Image.fromarray(array.astype(np.uint8)).save(path)
    return path, None


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".png", ".jpg", ".tif", ".npy", ".npz"])
def test_a_mask_has_the_format_and_geometry_of_its_image(
    suffix: str, run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    array = np.full((24, 30), 40)
    array[5:15, 6:16] = 200
    path, affine = write_as(tmp_path / "in" / "case.one", suffix, array)
    (written,) = predict(run[0] / "model.ckpt", tmp_path / "in", tmp_path / "out")
    assert written.name == "case.one" + {".jpg": ".png"}.get(suffix, suffix)
    image, mask = read_image(path), read_image(written)
    assert mask.shape == image.shape == (24, 30)
    assert mask.array.dtype == np.uint8
    assert set(np.unique(mask.array)) == {3, 200}
    assert 2 * (mask.array[5:15, 6:16] == 200).sum() / (100 + (mask.array == 200).sum()) > 0.9
    if affine is not None:
        assert mask.affine is not None
        np.testing.assert_allclose(mask.affine, affine, atol=1e-6)
        np.testing.assert_allclose(mask.spacing_mm, image.spacing_mm)


def test_predictions_refuse_what_does_not_fit(run: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    model = run[0] / "model.ckpt"
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "volume.npy", np.zeros((8, 8, 8)))
    rgb, _ = write_as(tmp_path / "rgb", ".png", np.zeros((8, 8, 3)))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("not a model")
    for arguments, message in (
        ((model, tmp_path / "empty", tmp_path / "o"), "expected images in .*empty, got none"),
        ((model, tmp_path / "none", tmp_path / "o"), "expected images in .*none, got none"),
        ((model, tmp_path / "volume.npy", tmp_path / "o"), r"a 2-D image with 1 channel\(s\).* got a 3-D one with 1"),
        ((model, rgb, tmp_path / "o"), "got a 2-D one with 3"),
        ((model, data / "images", data / "images"), "another folder than that of the images"),
        ((model, rgb, rgb / "below"), "expected to write to .*, got: Not a directory"),
        ((tmp_path / "none.ckpt", rgb, tmp_path / "o"), "expected a model at .*none.ckpt, got: No such file"),
        ((tmp_path / "other.ckpt", rgb, tmp_path / "o"), "expected a model that softdice train wrote, got a file with"),
        ((tmp_path / "text.ckpt", rgb, tmp_path / "o"), "got a file that torch does not read as plain weights"),
    ):
        with pytest.raises(TrainingError, match=message):
            predict(*arguments)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": "softdice-model", "version": 1, "weights": Trap()}, tmp_path / "model.ckpt")
    with pytest.raises(TrainingError, match="expected a model that softdice train wrote"):
        load_checkpoint(tmp_path / "model.ckpt")
    assert not (tmp_path / "ran").exists()


def test_truncated_and_newer_checkpoints_are_refused(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    content = (run[0] / "model.ckpt").read_bytes()
    path = tmp_path / "model.ckpt"
    for size in (0, 3, 100, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:size])
        with pytest.raises(TrainingError, match="expected a model that softdice train wrote"):
            load_checkpoint(path)
    torch.save({"format": "softdice-model", "version": 99}, path)
    with pytest.raises(TrainingError, match="got version 99 where this softdice reads 1"):
        load_checkpoint(path)
