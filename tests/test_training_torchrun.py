"""softdice train under torchrun: the same numbers as one process, one set of files, one message."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("monai")

from torchrun import Ended, Scenario, series

from softdice.images.files import FileError
from softdice.training import TrainConfig, TrainingError, train
from softdice.training import run as runs
from softdice.training.checkpoint import load_checkpoint
from softdice.training.patches import Patches
from softdice.training.together import lost

FILES = ["curves.png", "metrics.csv", "model.ckpt", "overlays.png", "summary.json"]


def history(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with a brighter square."""
    folder = tmp_path_factory.mktemp("squares")
    for number in range(5):
        rng = np.random.default_rng(number)
        label = np.zeros((24, 24), np.uint8)
        row, column = rng.integers(2, 8, 2)
        label[row : row + 10, column : column + 10] = 1
        for part, array in (("images", rng.normal(size=(24, 24)) + 4 * label), ("labels", label)):
            (folder / part).mkdir(exist_ok=True)
            np.save(folder / part / f"{number}.npy", array)
    return folder


DAMAGED = "scan.npy: it is damaged"


def continue_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of the first scenario, in the folder of this one."""
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    if os.environ["RANK"] == "0":
        out.mkdir()
        (out / "model.ckpt").write_bytes((out.parent / "two" / "model.ckpt").read_bytes())


def damaged(*_: object, **__: object) -> None:
    raise FileError(DAMAGED)


def fail_while_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ["RANK"] == "1":
        monkeypatch.setattr(runs, "read_folder", damaged)


def fail_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ["RANK"] == "1":
        monkeypatch.setattr(Patches, "_start", damaged)


def be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ["RANK"] == "1":
        monkeypatch.setattr(Patches, "_start", lambda *_: os.kill(os.getpid(), signal.SIGKILL))


Launched = tuple[Path, dict[str, Ended], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def launched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """All scenarios: the folder of what they wrote, by name; how they ended; the launch, which the last one ends."""
    out = tmp_path_factory.mktemp("out")

    def scenario(name: str, *arguments: object, prepare: Any = None) -> Scenario:
        return Scenario(name, ("train", *arguments, "--out", out / name), prepare)

    ended, launch = series(
        tmp_path_factory.mktemp("said"),
        scenario("two", data, "--loss", "dice", "--epochs", 2, "--batch-size", 1),
        scenario("brain", "--batch-size", 1, "--max-steps", 1),
        scenario("resumed", data, "--resume", "--epochs", 3, prepare=continue_elsewhere),
        scenario("nowhere", "nowhere"),
        scenario("devices", "--devices", 3),
        scenario("reading", data, prepare=fail_while_reading),
        scenario("training", data, prepare=fail_in_a_step),
        scenario("killed", data, prepare=be_killed),
    )
    return out, ended, launch


@pytest.fixture(scope="module")
def run(launched: Launched) -> tuple[Path, Ended]:
    out, ended, _ = launched
    assert ended["two"].codes == [0, 0], ended["two"].stderr
    return out / "two", ended["two"]


def test_the_first_step_on_the_brain_is_that_of_one_process(launched: Launched, tmp_path: Path) -> None:
    train(TrainConfig(out=str(tmp_path), batch_size=2, max_steps=1))
    assert launched[1]["brain"].codes == [0, 0], launched[1]["brain"].stderr
    one, two = (float(history(out)[0]["loss"]) for out in (tmp_path, launched[0] / "brain"))
    assert two == pytest.approx(one, rel=1e-6)
    ours, theirs = (load_checkpoint(out / "model.ckpt") for out in (launched[0] / "brain", tmp_path))
    assert ours["step"] == theirs["step"] == 1
    # AdamW's first moment is a tenth of the gradient. A convolution rounds otherwise for a batch of another size.
    found, expected = (
        torch.cat([state["exp_avg"].flatten() for state in content["optimizer"]["state"].values()])
        for content in (ours, theirs)
    )
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_a_whole_run_learns_as_one_process_does(run: tuple[Path, Ended], data: Path, tmp_path: Path) -> None:
    summary = train(TrainConfig(data=str(data), out=str(tmp_path), loss="dice", epochs=2, batch_size=2))
    found = json.loads((run[0] / "summary.json").read_text())
    assert found["mean_dice"] == pytest.approx(summary["mean_dice"], abs=0.02)
    for name in ("epochs_done", "steps_done", "training_cases"):
        assert found[name] == summary[name]
    assert (found["devices"], found["batch_size"]) == (2, 1)
    first, other = (float(history(out)[0]["loss"]) for out in (run[0], tmp_path))
    assert first == pytest.approx(other, rel=1e-2)


def test_rank_0_alone_talks_and_writes(run: tuple[Path, Ended]) -> None:
    out, done = run
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert done.stdout.count("Written to") == done.stdout.count("Data: ") == 1
    assert "batch 1 on each of 2 devices" in done.stdout
    assert "Traceback" not in done.stderr


def test_it_ends_with_the_weights_of_devices_2(run: tuple[Path, Ended], data: Path, tmp_path: Path) -> None:
    command = ("train", data, "--out", tmp_path, "--loss", "dice", "--epochs", 2, "--batch-size", 1, "--devices", 2)
    done = subprocess.run(
        [sys.executable, "-m", "softdice", *map(str, command)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1
    ours, theirs = (load_checkpoint(out / "model.ckpt")["weights"] for out in (tmp_path, run[0]))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_it_goes_on_from_its_checkpoint_with_as_many_processes(launched: Launched) -> None:
    out, ended, _ = launched
    assert ended["resumed"].codes == [0, 0], ended["resumed"].stderr
    assert "Resumed after epoch 2" in ended["resumed"].stdout
    assert [row["epoch"] for row in history(out / "resumed")] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "softdice train: expected a folder nowhere, got none."),
        ("devices", "expected devices 2, as many processes as torchrun started, got 3. Leave --devices out."),
    ],
)
def test_an_error_of_all_ranks_is_told_once(name: str, message: str, launched: Launched) -> None:
    out, ended, _ = launched
    assert ended[name].stderr.count(message) == 1
    assert ended[name].codes[0] == 2
    assert not (out / name).exists()


@pytest.mark.parametrize("when", ["reading", "training"])
def test_an_error_of_one_rank_ends_all(when: str, launched: Launched) -> None:
    out, ended, _ = launched
    assert 2 in ended[when].codes
    assert DAMAGED in ended[when].stderr
    assert not (out / when).exists()
    if when == "reading":
        assert f"rank 1: {DAMAGED}" in ended[when].stderr
        assert ended[when].stderr.count("it is damaged") == 1


def test_a_rank_that_is_killed_ends_all(launched: Launched) -> None:
    out, _, launch = launched
    assert launch.returncode == 1
    assert "exitcode  : -9" in launch.stderr
    assert not list((out / "killed").glob("*"))  # nor the folder, where rank 0 was not killed itself


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux answers on all of 127.0.0.0/8 unasked")
def test_two_machines_that_share_no_folder(run: tuple[Path, Ended], data: Path, tmp_path: Path) -> None:
    """Two agents of torchrun on the loopback range, with the same data and folders of their own for the result."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "model.ckpt").write_bytes((run[0] / "model.ckpt").read_bytes())
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{door.getsockname()[1]}"
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "train")
    hosts = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous,
                "--local-addr", address, "-m", "softdice", "train", str(data), "--out", str(tmp_path / name),
                "--resume", "--epochs", "3",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for name, address in (("first", "127.0.0.1"), ("second", "127.0.0.2"))
    ]  # fmt: skip
    said = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)
    assert sum("Written to" in text for text in said) == 1  # rank 0, which may be on either
    written = [name for name in ("first", "second") if (tmp_path / name / "summary.json").exists()]
    assert len(written) == 1
    assert sorted(path.name for path in (tmp_path / written[0]).iterdir()) == FILES


def test_a_lost_process_is_told_in_one_line() -> None:
    problem = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1\nmore")
    told = lost(2, problem)
    assert isinstance(told, TrainingError)
    assert str(told).startswith("softdice train: expected 2 processes to go on together, got: [gloo/transport")
    assert lost(1, problem) is None
    assert lost(2, RuntimeError("sizes do not match")) is None


def test_another_number_of_processes_is_refused(run: tuple[Path, Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    from softdice.parallel.ranks import Ranks
    from softdice.training.together import devices

    stored = load_checkpoint(run[0] / "model.ckpt")
    assert devices(TrainConfig(), Ranks(1, 2, 2), stored) == 2
    with pytest.raises(TrainingError, match=r"expected 2 processes, with which the run in .* got 3 from torchrun"):
        devices(TrainConfig(), Ranks(1, 3, 3), stored)
