"""The command line: what it says, and with which exit code."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("monai")

from commands import call, refused

import softdice

pytestmark = pytest.mark.usefixtures("one_thread")


def save(folder: Path, part: str, name: str, array: object) -> Path:
    (folder / part).mkdir(parents=True, exist_ok=True)
    np.save(folder / part / f"{name}.npy", np.asarray(array))
    return folder / part / f"{name}.npy"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in "abc":
        save(tmp_path / "data", "images", name, np.random.default_rng(0).normal(size=(16, 16)))
        save(tmp_path / "data", "labels", name, np.eye(16, dtype=np.uint8))
    return tmp_path / "data"


def test_version_and_help() -> None:
    assert call("--version").output == f"softdice {softdice.__version__}\n"
    shown = call("--help").output
    for command in ("check", "info", "train", "predict"):
        assert f"  {command} " in shown
    options = call("train", "--help").output
    for option in (
        "loss", "epochs", "max-minutes", "batch-size", "patch", "lr", "val-fraction", "seed", "out", "resume",
        "devices", "precision",
    ):  # fmt: skip
        assert f"--{option} " in options
    assert "IMAGES" in call("predict", "--help").output.upper()


def test_the_help_of_score_is_in_groups() -> None:
    """Each option stands in one group, and the groups in the order in which people need them."""
    sections = re.split(r"^(\w[\w ]*):\n", call("score", "--help").output, flags=re.MULTILINE)[1:]
    groups = dict(zip(sections[::2], sections[1::2], strict=True))
    assert list(groups) == [
        "Arguments", "Labels", "Reading", "Scores", "Comparison", "Output", "Long runs", "Options",
    ]  # fmt: skip
    for group, options in (
        ("Labels", "labels regions ignore include-background"),
        ("Reading", "layout missing threshold soft scale round resample ignore-geometry transpose"),
        ("Scores", "metrics surface penalty lesions matching centreline instances empty"),
        ("Comparison", "confidence versus"),
        ("Output", "out format rows report images view overwrite"),
        ("Long runs", "jobs resume"),
    ):
        assert re.findall(r"^  --([\w-]+)", groups[group], flags=re.MULTILINE) == options.split()
    assert "--format [table|csv|json|nnunet]" in groups["Output"]
    assert groups["Options"].count("\n    softdice score predictions labels") == 3, "three examples"


@pytest.mark.parametrize(
    ("words", "offered"),
    [("score --format c", ["csv"]), ("score --layout ", ["files", "subfolders", "classes"]), ("inf", ["info"])],
)
def test_the_shell_completes_commands_and_choices(words: str, offered: list[str]) -> None:
    line = f"softdice {words}"
    environment = {"_SOFTDICE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['softdice']; from softdice.cli import main; main()"],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == offered, done.stderr


def test_train_and_predict(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call(
        "train", data, "--out", out, "--loss", "dice", "--epochs", 1, "--batch-size", 4, "--patch", "16", "--lr", 0.01
    )
    assert result.exit_code == 0, result.output
    for part in (
        "2 for training, 1 held out, 2-D",
        "patch 16x16",
        "epoch   1",
        "mean Dice",
        "label 1",
        f"Written to {out}",
    ):
        assert part in result.output
    assert "Labels mapped" not in result.output
    result = call("predict", out / "model.ckpt", data / "images", tmp_path / "masks")
    assert result.output == f"3 masks written to {tmp_path / 'masks'}\n"
    result = call("train", data, "--out", out, "--resume", "--seed", 3)
    refused(result, f"expected seed 42, with which the run in {out} was started, got 3")


def test_label_values_are_shown_mapped(data: Path, tmp_path: Path) -> None:
    for name in "abc":
        save(data, "labels", name, np.eye(16) * 255)
    result = call("train", data, "--out", tmp_path / "out", "--loss", "dice", "--max-steps", 1)
    assert "Labels mapped: 0 -> 0, 255 -> 1" in result.output


def test_missing_and_empty_folders(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(call("train", tmp_path / "none", "--out", out), f"expected a folder {tmp_path / 'none'}, got none")
    (tmp_path / "half" / "images").mkdir(parents=True)
    refused(call("train", tmp_path / "half", "--out", out), f"expected a folder {tmp_path / 'half' / 'labels'}")
    (tmp_path / "half" / "labels").mkdir()
    refused(call("train", tmp_path / "half", "--out", out), f"expected images in {tmp_path / 'half' / 'images'}")
    for part in ("images", "labels"):
        save(tmp_path / "half", part, "a", np.eye(4))
    refused(call("train", tmp_path / "half", "--out", out), "expected at least 2 pairs", "got 1")


def test_unpaired_names(data: Path, tmp_path: Path) -> None:
    save(data, "labels", "lonely", np.eye(4))
    refused(call("train", data, "--out", tmp_path / "o"), f"expected a partner in {data / 'images'}", "1: lonely.")


def test_an_image_that_cannot_be_read(data: Path, tmp_path: Path) -> None:
    path = data / "images" / "b.npy"
    path.write_bytes(path.read_bytes()[:200])
    refused(call("train", data, "--out", tmp_path / "o"), str(path))


def test_shapes_of_a_pair_differ(data: Path, tmp_path: Path) -> None:
    path = save(data, "images", "b", np.zeros((16, 17)))
    refused(call("train", data, "--out", tmp_path / "o"), f"got 16x17 for {path} and 16x16")


def test_dimensions_and_channels_differ_between_files(data: Path, tmp_path: Path) -> None:
    for part in ("images", "labels"):
        save(data, part, "b", np.zeros((16, 16, 4), np.uint8))
    refused(call("train", data, "--out", tmp_path / "o"), "b.npy: expected 2-D images only, got a 3-D one")


def test_one_class_only(data: Path, tmp_path: Path) -> None:
    for name in "abc":
        save(data, "labels", name, np.full((16, 16), 7))
    refused(call("train", data, "--out", tmp_path / "o"), "expected at least two label values", "got only 7")


def test_labels_that_are_not_whole(data: Path, tmp_path: Path) -> None:
    path = save(data, "labels", "c", np.eye(16) * 0.5)
    said = f"{path}: expected labels, got values that are not whole: 16 voxels", "such as 0.5"
    refused(call("train", data, "--out", tmp_path / "o"), *said)
    save(data, "labels", "c", np.full((16, 16), np.nan))
    refused(call("train", data, "--out", tmp_path / "o"), "got nan or infinity (256 voxels)")


def test_intensities_in_the_place_of_labels(data: Path, tmp_path: Path) -> None:
    for name in "abc":
        save(data, "images", name, np.zeros((20, 20)))
        save(data, "labels", name, np.arange(400).reshape(20, 20))
    refused(call("train", data, "--out", tmp_path / "o"), "expected at most 256 label values, got 400 so far")


def test_out_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(call("train", data, "--out", tmp_path / "file" / "out"), "expected to write to", "Not a directory")


@pytest.mark.parametrize(
    "option, value, part",
    [
        ("--loss", "dise", "expected a loss among"),
        ("--patch", "big", "expected a patch as 96 or 96x96x32, got 'big'. Change --patch."),
        ("--patch", "8x8x8", "expected a patch of 1 or 2 numbers for 2-D images, got 3"),
        ("--patch", "12", "multiples of 8, got 12"),
        ("--epochs", "0", "epochs"),
        ("--max-minutes", "-1", "max_minutes"),
        ("--val-fraction", "1", "a share in (0, 1), got 1.0"),
        ("--precision", "7", "one of 32-true, bf16-mixed"),
    ],
)
def test_options_out_of_range(option: str, value: str, part: str, data: Path, tmp_path: Path) -> None:
    refused(call("train", data, "--out", tmp_path / "o", option, value), part)


def test_checkpoints_that_are_not_ours(data: Path, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_text("nothing")
    refused(call("predict", tmp_path / "model.ckpt", data / "images", tmp_path / "m"), "expected a model that softdice")
    refused(call("predict", tmp_path / "none", data / "images", tmp_path / "m"), "expected a model at", "No such file")
    refused(call("train", data, "--out", tmp_path, "--resume"), "expected a model that softdice train wrote")


@pytest.mark.parametrize("package", ["lightning", "monai", "matplotlib", "nilearn"])
def test_a_missing_package_of_training_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what makes an import fail
    result = call("train", "--out", tmp_path)
    refused(result, f"softdice train: expected {package} to be installed", "Run: pip install 'softdice[train]'")


def test_without_typer_the_extra_is_named() -> None:
    hide = "import sys; sys.modules['typer'] = None; from softdice.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", hide, "--version"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "softdice: expected typer to be installed, got no such package. Run: pip install 'softdice[cli]'"
    ]


def test_python_dash_m() -> None:
    result = subprocess.run([sys.executable, "-m", "softdice", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"softdice {softdice.__version__}\n"


def test_info_prints_what_nnunet_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from softdice.compat.nnunet_training import TRAINERS

    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert call("info", "--nnunet").stdout == f"export nnUNet_extTrainer={TRAINERS}\n"
    monkeypatch.setenv("nnUNet_extTrainer", f"/my trainers:{TRAINERS}")
    assert call("info", "--nnunet").stdout == f"export nnUNet_extTrainer='/my trainers:{TRAINERS}'\n"


def test_info_lists_every_package_that_an_extra_brings() -> None:
    """Read from pyproject.toml here, and from the metadata of the installed package there."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\ndocs = ")[0]
    named = set(re.findall(r'"([\w-]+)(?:>=|==)', extras)) - {"softdice"}
    assert {"SimpleITK", "highdicom", "connected-components-3d", "scikit-image", "matplotlib", "typer"} <= named
    shown = call("info").stdout
    lines = {line.split()[0].lower().replace("_", "-"): line for line in shown.splitlines() if line.startswith("  ")}
    for name in (*named, "numpy", "pydicom", "triton"):
        try:
            state = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            state = "not installed"
        assert lines[name.lower()].endswith(f" {state}")
    assert not {"pytest", "mypy", "mkdocs-material"} & set(lines)
    assert shown.startswith(f"softdice {softdice.__version__}, torch {torch.__version__}, Python ")


def test_info_of_source_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    shown = call("info").stdout
    assert "not installed, but run from its source" in shown
    assert f"\n  numpy {np.__version__}\n" in shown
