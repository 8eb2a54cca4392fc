"""benchmarks/training.py: that its losses are what it calls them, and that it publishes what is complete."""

from __future__ import annotations

import csv
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
        torch.testing.assert_close(benchmark_.LOSSES[name][1](3)(logits, labels), value, rtol=1e-3, atol=1e-4)


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
    page.write_text(f"before\n{benchmark_.MARKS[0]}\n{benchmark_.MARKS[1]}\nafter\n")
    cases = Cases(list("abcde"), [0, 1], ["a", "b"], 2, 1, [(16, 16)] * 5, read)
    settings = {"PAGE": page, "PLOT": tmp_path / "training.png", "read": lambda name: cases, "SEEDS": (0, 1)}
    settings |= {"DATA": {"nuclei": benchmark_.Data(None)}}
    settings |= {"LOSSES": {name: benchmark_.LOSSES[name] for name in ("neg_log", "monai")}}
    for name, value in settings.items():
        monkeypatch.setattr(benchmark_, name, value)
    monkeypatch.setattr(benchmark_.publish, "FOLDER", tmp_path)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["training", *arguments])
        benchmark_.main()
        return capsys.readouterr().out

    def rows() -> list[dict[str, str]]:
        with (tmp_path / "training.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    assert "Nothing is measured" in call("--show")
    assert "3 rows are missing" in call("--seconds", "0.1", "--seed", "1", "--loss", "monai")
    (first,) = rows()
    assert (first["seconds"], first["patch"], first["held_out"]) == ("0.1", "16x16", "1")
    assert int(first["steps"]) > 0
    assert "threads, torch" in first["machine"]
    assert benchmark_.MARKS[0] + "\n" + benchmark_.MARKS[1] in page.read_text()
    call("--seconds", "0.1", "--seed", "0", "1")
    assert len(rows()) == 4
    assert rows()[0] == first
    before, _, after = page.read_text().partition(benchmark_.MARKS[0])
    assert before == "before\n"
    assert "| -ln Dice | " in after
    assert "2 seeds" in after
    assert "](training.png)" in after
    assert (tmp_path / "training.png").stat().st_size > 0
    call("--seconds", "0.1")
    assert len(rows()) == 4
