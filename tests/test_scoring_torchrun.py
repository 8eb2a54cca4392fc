"""softdice score under torchrun: the cases shared out, one result, the bytes of a single process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("nibabel")

from commands import score

CASES = 7


def command(*arguments: object, program: tuple[object, ...] = ("-m", "softdice", "score")) -> list[str]:
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    return [*map(str, (*start, *program, *arguments))]


def torchrun(*arguments: object, **more: Any) -> Any:
    return subprocess.run(command(*arguments, **more), capture_output=True, text=True, timeout=120)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Masks that agree in part; the last two cases have no labels of the same shape, or none at all."""
    for case in range(CASES):
        rng = np.random.default_rng(case)
        truth = rng.integers(0, 4, (9, 8, 7), np.uint8)
        mask = np.where(rng.random(truth.shape) < 0.3, 0, truth).astype(np.uint8)
        for name, array in (("p", mask), ("t", truth)):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"case_{case}.npy", array)
    return tmp_path / "p", tmp_path / "t"


def damage(folders: tuple[Path, Path]) -> None:
    """A file that cannot be read, one of another shape, one without a partner: with 7 cases, on both ranks."""
    (folders[0] / "case_1.npy").write_bytes(b"no array")
    np.save(folders[0] / "case_4.npy", np.zeros((2, 2), np.uint8))
    (folders[1] / "case_6.npy").unlink()


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_the_result_has_the_bytes_of_one_process_and_lists_the_same_errors(
    suffix: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    damage(folders)
    one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    expected = score(*folders, "--out", one)
    jobs = ("--jobs", 2) if suffix == "json" else ()
    done = torchrun(*folders, "--out", two, *jobs)
    assert two.read_bytes() == one.read_bytes()
    assert expected.exit_code == 1
    assert done.returncode == 1
    assert "Not scored: 3 of 7" in expected.stderr
    said = expected.stderr.replace(str(one), str(two))
    assert said in done.stderr  # once, and beside it what torchrun says of the exit code 1
    assert done.stderr.count("Not scored") == 1
    assert done.stdout == ""
    assert not list(tmp_path.glob("*.partial"))


def test_two_sides_to_standard_output(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    arguments = (*folders, "--versus", other, "--format", "json")
    done = torchrun(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == score(*arguments).stdout


def test_wrong_usage_is_told_once(folders: tuple[Path, Path]) -> None:
    done = torchrun(folders[0], folders[1] / "nowhere")
    assert done.stderr.count("LABELS: expected a file or a folder") == 1
    assert "exitcode  : 2" in done.stderr


def test_interrupted_and_resumed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    count = 600
    for case in range(CASES, count):
        for folder in folders:
            shutil.copy(folder / f"case_{case % CASES}.npy", folder / f"case_{case}.npy")
    out, partial = tmp_path / "out.csv", tmp_path / "out.csv.partial"
    process = subprocess.Popen(
        command(*folders, "--out", out), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    waited = time.monotonic() + 60
    while (not partial.exists() or partial.read_bytes().count(b"\n") < 5) and time.monotonic() < waited:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: torchrun and all that it started
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    match = re.search(rf"Stopped after (\d+) of {count}. The same command with --resume goes on", stderr)
    assert match is not None, stderr
    assert not out.exists()
    assert 5 <= partial.read_text().count("\n") - 1 == int(match[1]) < count
    done = torchrun(*folders, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert not partial.exists()
    assert out.read_text() == score(*folders, "--format", "csv").stdout


DYING = """
import os, sys
from softdice.scoring import runner

def dies(*_):
    os._exit(9)

if os.environ["RANK"] == "1":
    runner._one = dies
sys.argv[0:1] = ["softdice", "score"]
from softdice.cli import main
main()
"""


def test_a_process_that_dies_ends_the_others(folders: tuple[Path, Path], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(DYING)
    done = torchrun(*folders, "--out", tmp_path / "out.csv", program=(program,))
    assert done.returncode == 1
    assert "exitcode  : 9" in done.stderr
    assert not (tmp_path / "out.csv").exists()
