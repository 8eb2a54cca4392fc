"""benchmarks/training.py and runs.py: that the losses are what they are called, and what is complete is published."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

pytest.importorskip("lightning")
pytest.importorskip("monai")

from softdice.training.cases import Case, Cases

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark_(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.training")


def test_its_losses_are_what_it_calls_them(benchmark_: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 5, generator=generator)
    labels = torch.randint(3, (2, 6, 5), generator=generator, dtype=torch.uint8)
    prob, true = logits.softmax(1), one_hot(labels.long(), 3).movedim(-1, 1).float()

    def dice(axes: tuple[int, ...]) -> torch.Tensor:
        return 2 * (prob * true).sum(axes) / (prob + true).sum(axes)

    pooled, of_sample, ce = dice((0, 2, 3)), dice((2, 3)), cross_entropy(logits, labels.long())
    i, p, t = ((x).sum((0, 2, 3)) for x in (prob * true, prob, true))
    alpha, beta, gamma = 0.3, 0.7, 0.75
    expected = {
        "neg_log": -pooled.log().mean(),
        "one_minus": 1 - pooled.mean(),
        "dice+ce": -pooled.log().mean() + ce,
        "ce": ce,
        "focal_tversky": ((1 - i / (i + alpha * (p - i) + beta * (t - i))) ** gamma).mean(),
        "monai": 1 - of_sample.mean() + ce,
    }
    assert list(expected) == list(benchmark_.LOSSES)
    for name, value in expected.items():
        torch.testing.assert_close(benchmark_.LOSSES[name].loss(3)(logits, labels), value, rtol=1e-3, atol=1e-4)


def test_its_recipes_are_what_it_calls_them(benchmark_: ModuleType) -> None:
    label = np.zeros((96, 96), np.uint8)
    label[70:90, 70:90] = 1
    image = np.random.default_rng(0).normal(size=(1, 96, 96)).astype(np.float32)
    cases = Cases(["a"], [0, 1], ["a", "b"], 2, 1, [(96, 96)], lambda number: Case("a", image, label))
    seen = {
        name: benchmark_.prepared(cases, [0], variant.recipe, (32, 32), 0)
        for name, variant in benchmark_.RECIPES.items()
    }
    weights = list(seen["start"].network.parameters())
    rates = [seen[name].optimizer.defaults["lr"] for name in ("slow", "start", "fast", "faster", "dice+ce")]
    assert rates == [1e-3, 3e-3, 1e-2, 3e-2, benchmark_.DEFAULTS["lr"]]
    assert next(seen["wide"].network.parameters()).shape[0] == 2 * weights[0].shape[0]
    assert len(list(seen["flat"].network.parameters())) < len(weights)
    shares = {name: seen[name].patches.foreground_share for name in ("anywhere", "start", "foreground")}
    assert shares == {"anywhere": 0.0, "start": 0.5, "foreground": 1.0}
    assert all(seen["foreground"].patches[0, number][1].any() for number in range(8))
    assert not all(seen["anywhere"].patches[0, number][1].any() for number in range(8))
    assert seen["start"].patches.augment.transforms
    assert not seen["plain"].patches.augment.transforms
    kernels = [p for p in seen["channels_last"].network.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_no_subject_is_on_both_sides(benchmark_: ModuleType) -> None:
    names = [f"Image_{number:02d}{eye}" for number in range(7) for eye in "LR"]
    subject = benchmark_.DATA["chase_db1"].subject
    drawn = set()
    for seed in benchmark_.SEEDS:
        training, held_out = benchmark_.divided(names, subject, seed)
        assert sorted(training + held_out) == list(range(14))
        assert len(held_out) == 2
        assert not {subject(names[n]) for n in training} & {subject(names[n]) for n in held_out}
        drawn.add(tuple(held_out))
    assert len(drawn) > 1


def test_a_row_is_measured_once_and_a_table_published_when_complete(
    benchmark_: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(number: int) -> Case:
        label = np.zeros((16, 16), np.uint8)
        label[4:10, 4:10] = 1
        return Case(str(number), 3.0 * label[None].astype(np.float32), label)

    page = tmp_path / "training.md"
    begin, end = benchmark_.MARKS["losses"]
    page.write_text(f"before\n{begin}\n{end}\nafter\n")
    cases = Cases(list("abcde"), [0, 1], ["a", "b"], 2, 1, [(16, 16)] * 5, read)
    settings = {"PAGE": page, "PLOT": tmp_path / "training.png", "read": lambda name: cases, "SEEDS": (0, 1)}
    settings |= {"DATA": {"nuclei": benchmark_.Data(None)}}
    losses = {name: benchmark_.LOSSES[name]._replace(data=("nuclei",)) for name in ("neg_log", "monai")}
    settings |= {"LOSSES": losses, "VARIANTS": {**benchmark_.VARIANTS, "losses": losses}}
    for name, value in settings.items():
        monkeypatch.setattr(benchmark_, name, value)
    monkeypatch.setattr(benchmark_.publish, "FOLDER", tmp_path)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["training", *arguments])
        benchmark_.main()
        return capsys.readouterr().out

    def rows() -> list[dict[str, object]]:
        return benchmark_.publish.kept("training")

    assert "Nothing is measured" in call("--show")
    assert "3 rows are missing" in call("--seconds", "0.1", "--seed", "1", "--variant", "monai")
    (first,) = rows()
    assert (first["seconds"], first["patch"], first["held_out"]) == (0.1, "16x16", 1)
    assert first["steps"] != 0
    assert "threads, torch" in str(first["machine"])
    assert f"{begin}\n{end}" in page.read_text()
    call("--seconds", "0.1", "--seed", "0", "1")
    assert len(rows()) == 4
    assert rows()[0] == first
    before, _, after = page.read_text().partition(begin)
    assert before == "before\n"
    assert "| -ln Dice | " in after
    assert "2 seeds" in after
    assert "](training.png)" in after
    assert (tmp_path / "training.png").stat().st_size > 0
    call("--seconds", "0.1")
    assert len(rows()) == 4


def test_whole_runs_are_measured_once_and_published_when_complete(
    benchmark_: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = importlib.import_module("benchmarks.runs")
    for part in ("images", "labels"):
        (tmp_path / "nuclei" / part).mkdir(parents=True)
        for number in range(6):
            array = np.zeros((16, 16), np.uint8)
            array[4:10, 4:10] = 1
            np.save(tmp_path / "nuclei" / part / f"{number}.npy", array)
    page = tmp_path / "training.md"
    page.write_text("\n".join(runs.MARKS))
    monkeypatch.setattr(benchmark_, "FOLDER", tmp_path)
    monkeypatch.setattr(runs.publish, "FOLDER", tmp_path)
    for name, value in {"PAGE": page, "SEEDS": (0, 1), "RUNS": {"nuclei": runs.Run(0.05, 5)}}.items():
        monkeypatch.setattr(runs, name, value)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["runs", *arguments])
        runs.main()
        return capsys.readouterr().out

    assert "1 runs are missing" in call("--seed", "1")
    assert page.read_text() == "\n".join(runs.MARKS)
    call("--seed", "0", "1")
    first, second = runs.publish.kept("runs")
    assert [(row["data"], row["seed"], row["minutes"], row["held_out"]) for row in (first, second)] == [
        ("nuclei", 1, 0.05, 1),
        ("nuclei", 0, 0.05, 1),
    ]
    assert first["steps"] > 0
    assert first["time_of_asked"] > 0.3
    assert "first filters" in first["plan"]
    assert "| nuclei | 0.05 | " in page.read_text()
    assert runs.publish.kept("nothing") == []


def test_the_eyes_of_chase_are_found_by_name(
    benchmark_: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chase_db1").mkdir()
    for name in ("Image_01L.jpg", "Image_01L_1stHO.png", "Image_01L_2ndHO.png", "README.md"):
        (tmp_path / "chase_db1" / name).write_text(name)
    monkeypatch.setattr(benchmark_, "FOLDER", tmp_path)
    (tmp_path / "data").mkdir()
    folder = benchmark_.linked("chase_db1", tmp_path / "data")
    assert (folder / "images" / "Image_01L.jpg").read_text() == "Image_01L.jpg"
    assert [path.name for path in (folder / "labels").iterdir()] == ["Image_01L.png"]
    assert (folder / "labels" / "Image_01L.png").read_text() == "Image_01L_1stHO.png"
