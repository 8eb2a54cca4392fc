"""softdice score under torchrun: the cases shared out, one result, the bytes of a single process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("nibabel")

from commands import score, wait_for_cases
from torchrun import Ended, Scenario, series

from softdice.scoring import runner

CASES, MANY = 7, 600


def write(folder: Path, count: int = CASES) -> tuple[Path, Path]:
    """Masks that agree in part."""
    for case in range(CASES):
        rng = np.random.default_rng(case)
        truth = rng.integers(0, 4, (9, 8, 7), np.uint8)
        mask = np.where(rng.random(truth.shape) < 0.3, 0, truth).astype(np.uint8)
        for name, array in (("p", mask), ("t", truth)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / name / f"case_{case}.npy", array)
    for case in range(CASES, count):
        for name in "pt":
            shutil.copy(folder / name / f"case_{case % CASES}.npy", folder / name / f"case_{case}.npy")
    return folder / "p", folder / "t"


def damage(folders: tuple[Path, Path]) -> None:
    """A file that cannot be read, one of another shape, one without a partner: with 7 cases, on both ranks."""
    (folders[0] / "case_1.npy").write_bytes(b"no array")
    np.save(folders[0] / "case_4.npy", np.zeros((2, 2), np.uint8))
    (folders[1] / "case_6.npy").unlink()


def die_at_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ["RANK"] == "1":
        monkeypatch.setattr(runner, "_scored", lambda *_: os._exit(9))


class Launched(NamedTuple):
    """What all tests look at: folders by name, the run that was stopped, how the others ended, and their launch."""

    folders: dict[str, tuple[Path, Path]]
    out: Path
    stopped: subprocess.CompletedProcess[str]
    journal: str
    ended: dict[str, Ended]
    launch: subprocess.CompletedProcess[str]


def interrupt(folders: tuple[Path, Path], out: Path) -> subprocess.CompletedProcess[str]:
    """Start torchrun, and send what Ctrl-C sends when five cases are scored."""
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "softdice")
    command = [*map(str, (*start, "score", *folders, "--out", out))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_cases(process, out, 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: torchrun and all that it started
    stderr = process.communicate(timeout=60)[1]
    return subprocess.CompletedProcess(command, process.returncode, "", stderr)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    out = tmp_path_factory.mktemp("out")
    folders = {name: write(tmp_path_factory.mktemp(name)) for name in ("whole", "damaged")}
    folders["many"] = write(tmp_path_factory.mktemp("many"), MANY)
    damage(folders["damaged"])
    shutil.copytree(folders["whole"][1], out / "other")
    stopped = interrupt(folders["many"], out / "many.csv")
    assert not (out / "many.csv").exists()
    journal = (out / "many.csv.partial").read_text()
    ended, launch = series(
        tmp_path_factory.mktemp("said"),
        Scenario("csv", ("score", *folders["damaged"], "--out", out / "two.csv")),
        Scenario("json", ("score", *folders["damaged"], "--out", out / "two.json", "--jobs", 2)),
        Scenario("versus", ("score", *folders["whole"], "--versus", out / "other", "--format", "json")),
        Scenario("usage", ("score", folders["whole"][0], folders["whole"][1] / "nowhere")),
        Scenario("resumed", ("score", *folders["many"], "--out", out / "many.csv", "--resume")),
        Scenario("dies", ("score", *folders["whole"], "--out", out / "dies.csv"), die_at_a_case),
    )
    return Launched(folders, out, stopped, journal, ended, launch)


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_the_result_has_the_bytes_of_one_process_and_lists_the_same_errors(suffix: str, launched: Launched) -> None:
    one, done = launched.out / f"one.{suffix}", launched.ended[suffix]
    expected = score(*launched.folders["damaged"], "--out", one)
    assert (launched.out / f"two.{suffix}").read_bytes() == one.read_bytes()
    assert expected.exit_code == 1
    assert done.codes == [1, 0]
    assert "Not scored: 3 of 7" in expected.stderr
    assert done.stderr == expected.stderr.replace(f"one.{suffix}", f"two.{suffix}")  # once
    assert done.stdout == ""
    assert not any((launched.out / f"{name}.{suffix}.partial").exists() for name in ("one", "two"))


def test_two_sides_to_standard_output(launched: Launched) -> None:
    done = launched.ended["versus"]
    assert done.codes == [0, 0], done.stderr
    arguments = (*launched.folders["whole"], "--versus", launched.out / "other", "--format", "json")
    assert done.stdout == score(*arguments).stdout


def test_wrong_usage_is_told_once(launched: Launched) -> None:
    done = launched.ended["usage"]
    assert done.stderr.count("LABELS: expected a file or a folder") == 1
    assert done.codes[0] == 2


def test_interrupted_and_resumed(launched: Launched) -> None:
    assert launched.stopped.returncode != 0
    stderr = launched.stopped.stderr
    match = re.search(rf"Stopped after (\d+) of {MANY}. The same command with --resume goes on", stderr)
    assert match is not None, stderr
    assert 5 <= launched.journal.count("\n") - 1 == int(match[1]) < MANY
    done = launched.ended["resumed"]
    assert done.codes == [0, 0], done.stderr
    assert not (launched.out / "many.csv.partial").exists()
    assert (launched.out / "many.csv").read_text() == score(*launched.folders["many"], "--format", "csv").stdout


def test_a_process_that_dies_ends_the_others(launched: Launched) -> None:
    assert launched.launch.returncode == 1
    assert "exitcode  : 9" in launched.launch.stderr
    assert not (launched.out / "dies.csv").exists()
