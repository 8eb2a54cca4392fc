"""Kinds of folders, files and options that `softdice score` once misread, overwrote or let fail: one row a fault."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

pytest.importorskip("typer")
nib = pytest.importorskip("nibabel")
PIL_Image = pytest.importorskip("PIL.Image")

from commands import refused, score, wait_for_cases  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from softdice.cli.app import app  # noqa: E402
from softdice.images.files import list_images  # noqa: E402


def rows(*arguments: object) -> dict[object, dict]:
    """Label or name -> the row of the class in the only case."""
    result = score(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    (case,) = json.loads(result.stdout)["results"][0]["cases"]
    return {row["label"]: row for row in case["classes"]}


def save(path: Path, array: np.ndarray) -> Path:
    """.npy, .png or NIfTI, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".png":
        PIL_Image.fromarray(array).save(path)
    else:
        nib.Nifti1Image(array, np.eye(4)).to_filename(path)
    return path


def dice(p: np.ndarray, t: np.ndarray) -> float:
    return 2 * (p & t).sum() / (p.sum() + t.sum())


def maps(seed: int, C: int = 4, shape: tuple[int, ...] = (9, 11)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    t = rng.integers(0, C, shape, np.uint8)
    return np.where(rng.random(shape) < 0.4, rng.integers(0, C, shape), t).astype(np.uint8), t


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Labels 0 to 4."""
    p, t = maps(0, 5)
    return save(tmp_path / "p" / "a.npy", p), save(tmp_path / "t" / "a.npy", t)


def test_an_ignored_label_is_no_class(pair: tuple[Path, Path]) -> None:
    """As in `softdice.metrics`."""
    p, t = (np.load(path) for path in pair)
    found = rows(*pair, "--labels", "0,2,3", "--ignore", "0,3")
    keep = ~np.isin(t, (0, 3))
    assert list(found) == [2]
    assert found[2]["dice"] == pytest.approx(dice((p == 2) & keep, t == 2))


def test_labels_above_63_bits_keep_their_number(tmp_path: Path) -> None:
    t = np.array([0, 2**63 + 9, 2**63 + 9, 7, 0], np.uint64)
    files = save(tmp_path / "p.npy", np.roll(t, 1)), save(tmp_path / "t.npy", t)
    assert {label: row["dice"] for label, row in rows(*files).items()} == {7: 0.0, 2**63 + 9: 0.5}
    assert list(rows(*files, "--labels", str(2**63 + 9), "--ignore", "7")) == [2**63 + 9]
    with_low = np.where(t == 0, np.uint64(2**63), t)  # no small number among them
    files = save(tmp_path / "p.npy", np.roll(with_low[:3], 1)), save(tmp_path / "t.npy", with_low[:3])
    assert {label: row["dice"] for label, row in rows(*files).items()} == {2**63: 0.0, 2**63 + 9: 0.5}


# --- what a dataset.json says


def dataset(folder: Path, content: object, encoding: str = "utf-8") -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "dataset.json").write_text(text, encoding=encoding)
    return folder / "dataset.json"


@pytest.mark.parametrize(
    "labels, expected",
    [
        ({"background": 0, "kidney": 1, "cyst": 3, "ignore": 4}, {1: (1,), 3: (3,)}),
        ({"ignore": 2, "background": 0, "rest": 4}, {4: (4,)}),
        ({"background": 0, "all": [1, 2, 3], "core": [2, 3], "ignore": 4}, {"all": (1, 2, 3), "core": (2, 3)}),
        ({"background": [0], "core": 3, "both": [1, 3], "ignore": [2]}, {"core": (3,), "both": (1, 3)}),
        ({"0": "background", "1": "edge", "3": "ignore"}, {1: (1,)}),
    ],
)
@pytest.mark.parametrize("encoding, whole", [("utf-8", True), ("utf-8-sig", False)])
def test_ignore_and_regions_of_a_dataset(
    labels: dict, expected: dict, encoding: str, whole: bool, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A byte order mark, too; classes and counts as nnU-Net's evaluation has them."""
    file = dataset(tmp_path, {"labels": labels, "name": "x"} if whole else labels, encoding)
    p, t = (np.load(path) for path in pair)
    found = rows(*pair, "--labels", file)
    void = next((int(k) if v == "ignore" else np.ravel(v)[0] for k, v in labels.items() if "ignore" in (k, v)))
    assert list(found) == list(expected)
    for key, inside in expected.items():
        in_p, in_t, keep = np.isin(p, inside), np.isin(t, inside), t != void
        assert found[key]["dice"] == pytest.approx(dice(in_p & keep, in_t & keep))
        assert found[key]["fp"] == (in_p & ~in_t & keep).sum()
    if any(isinstance(key, str) for key in expected):
        assert rows(*pair, "--regions", file) == found


def test_the_summary_of_nnunet_with_an_ignore_label(pair: tuple[Path, Path], tmp_path: Path) -> None:
    file = dataset(
        tmp_path, {"labels": {"background": 0, "a": 1, "b": [1, 2], "ignore": 3}, "regions_class_order": [2, 1]}
    )
    p, t = (np.load(path) for path in pair)
    content = json.loads(score(*pair, "--labels", file, "--format", "nnunet").stdout)
    keep = t != 3
    expected = {"1": (p == 1, t == 1), "(1, 2)": (np.isin(p, (1, 2)), np.isin(t, (1, 2)))}
    assert list(content["mean"]) == list(expected)
    for key, (in_p, in_t) in expected.items():
        assert content["mean"][key]["Dice"] == pytest.approx(dice(in_p & keep, in_t & keep))
        assert content["mean"][key]["TN"] == (~in_p & ~in_t & keep).sum()


@pytest.mark.parametrize(
    "content, said",
    [
        ({"labels": {"1": "cyst", "4": "cyst"}}, "expected names that differ, got 'cyst' twice"),
        ('{"cyst": 1, "cyst": 2}', "expected names that differ, got 'cyst' twice"),
        ({"cyst": 2, "tumour": 2}, "expected one name for each number, got '2' twice"),
        ({"labels": {"a": [1, 2], "b": 2}, "regions_class_order": [1]}, "class_order as regions, got 1 for 2: a, b"),
        ({"labels": {"a": 1, "ignore": [2, 3]}}, "expected one number for 'ignore', got [2, 3]"),
        ("[" * 100_000, "expected a JSON file with labels, got"),
        ("\ufeff{", "expected a JSON file with labels, got"),
    ],
)  # fmt: skip
def test_files_that_say_two_things(content: object, said: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    refused(score(*pair, "--labels", dataset(tmp_path, content)), said)


@pytest.mark.parametrize(
    "options, said",
    [
        (("--labels", "cyst=1, cyst=3"), "--labels: expected names that differ, got 'cyst' twice"),
        (("--labels", "a=2,b=2"), "--labels: expected one name for each number, got '2' twice"),
        (("--regions", "x=1,2; y=3; x=4"), "--regions: expected names that differ, got 'x' twice"),
        (("--labels", "a=1;b=2"), "--labels: expected numbers, name=number or a .json file, got 'a=1;b=2'"),
        (("--labels", "a=1 b=2"), "got 'a=1 b=2'. Example: 1,2,5"),
        (("--regions", "a=1,b=2"), "--regions: expected name=labels or a .json file, got 'a=1,b=2'"),
        (("--regions", "a=1,2 b = 3"), "got 'a=1,2 b = 3'. Example: whole=1,2,4; core=1,4"),
        (("--labels", ""), "--labels: expected numbers, name=number or a .json file, got ''"),
        (("--regions", " "), "--regions: expected name=labels or a .json file, got ' '"),
        (("--ignore", ""), "--ignore: expected whole numbers, got ''"),
    ],
)
def test_options_that_say_two_things_or_nothing(options: tuple[str, str], said: str, pair: tuple[Path, Path]) -> None:
    refused(score(*pair, *options), said)


# --- nothing is overwritten or lost


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for case in range(4):
        for part, array in zip("pt", maps(case), strict=True):
            save(tmp_path / part / f"case_{case}.npy", array)
    return tmp_path / "p", tmp_path / "t"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "options, said",
    [
        (("--out", "p/case_2.npy"), "--out: expected a file ending in .csv, .json or .txt, got 'case_2.npy'"),
        (("--out", "p/case_2.npy", "--format", "csv"), "--out: expected a file ending in .csv for --format csv"),
        (("--out", "link.csv"), "--out: expected a file that is not read, got"),
        (("--report", "hard.html"), "--report: expected a file that is not read, got"),
        (("--out", "labels.json", "--labels", "labels.json"), "expected a file that is not read, got 'labels.json'"),
        (("--out", "x.txt", "--report", "x.txt"), "--report: expected a file ending in .html, got 'x.txt'"),
        (("--out", "x", "--report", "./x"), "--report: expected another file than --out, got 'x' for both"),
        (("--out", "p"), "--out: expected a file, got the folder 'p'"),
        (("--report", "t"), "--report: expected a file, got the folder 't'"),
        (("--report", "none/r.html"), "--report: expected a file in an existing folder"),
        (("--out", "dangling.csv"), "--out: expected a file in an existing folder"),
        (("--out", "loop.csv"), "--out: expected a file, got a link that leads to itself, 'loop.csv'"),
        (("--out", "o.xlsx"), "ending in .csv, .json or .txt, got 'o.xlsx'. Or name the --format."),
        (("--out", "o.html"), "got 'o.html'. For a page in HTML pass --report."),
        (("--out", "o.ods", "--format", "csv"), "--out: expected a file ending in .csv for --format csv, got 'o.ods'"),
        (("--out", "o.csv", "--format", "nnunet"), "--out: expected a file ending in .json for --format nnunet"),
        (("--report", "r.pdf"), "--report: expected a file ending in .html, got 'r.pdf'"),
    ],
)  # fmt: skip
def test_places_that_are_taken_or_cannot_be_written(
    options: tuple[str, ...], said: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work, and every file is as it was."""
    monkeypatch.chdir(folders[0].parent)
    Path("link.csv").symlink_to("t/case_1.npy")
    os.link("t/case_3.npy", "hard.html")
    Path("dangling.csv").symlink_to("nowhere/x.csv")
    Path("loop.csv").symlink_to("pool.csv")
    Path("pool.csv").symlink_to("loop.csv")
    Path("labels.json").write_text('{"a": 1}')
    before = snapshot(Path())
    refused(score("p", "t", *options), said)
    assert snapshot(Path()) == before


RESULTS = {
    "pairs.csv": (),
    "classes.csv": ("--rows", "classes"),
    "cases.csv": ("--rows", "cases"),
    "one.json": (),
    "table.txt": (),
    "both.csv": ("--versus",),
    "both_cases.csv": ("--rows", "cases", "--versus"),
    "both.txt": ("--versus",),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_replaced_and_what_is_none_is_not(
    name: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    for path in folders[0].iterdir():
        save(tmp_path / "q" / path.name, np.load(path))
    options = [*RESULTS[name], *(["q"] if "--versus" in RESULTS[name] else [])]
    assert score("p", "t", *options, "--out", name, "--report", "r.html").exit_code == 0
    first = Path(name).read_text()
    Path(name).write_text(first + "\nof last night")
    assert score("p", "t", *options, "--out", name, "--report", "r.html").exit_code == 0
    assert Path(name).read_text() == first
    for taken, option in ((name, "--out"), ("r.html", "--report")):
        kept = Path(taken).read_bytes()
        for foreign in FOREIGN:
            Path(taken).write_bytes(foreign)
            again = score("p", "t", *options, "--out", name, "--report", "r.html")
            refused(again, f"{option}: expected a new file or the result of an earlier run, got {taken!r}")
            assert Path(taken).read_bytes() == foreign
            assert not Path(f"{name}.partial").exists()
        Path(taken).write_bytes(kept)
    Path(name).write_bytes(FOREIGN[0])
    assert score("p", "t", *options, "--out", name, "--report", "r.html", "--overwrite").exit_code == 0
    assert Path(name).read_text() == first


FOREIGN = (
    b"patient,age\n1,64\n",
    b"case,age,dose\ncase_0,64,0.5\n",
    b"case,note\n",
    b"case\n",
    b'{"subject": 7}',
    b"<html><title>softdice is good</title></html>",
    b"what I saw on Monday: 95 % interval of Dice\n",
    b"\n",
    b"\xff\xfe\0\0",
)


def test_a_summary_of_nnunet_is_not_replaced(folders: tuple[Path, Path], tmp_path: Path) -> None:
    options = (*folders, "--format", "nnunet", "--out", tmp_path / "summary.json")
    assert score(*options).exit_code == 0
    refused(score(*options), "summary.json", "--overwrite")  # nnU-Net's own begins with the same words
    assert score(*options, "--overwrite").exit_code == 0


@contextlib.contextmanager
def standard_output(file: TextIO) -> Iterator[None]:
    """Send what this process writes to its standard output into a file."""
    before = os.dup(1)
    os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def test_devices_and_links_are_written_into(folders: tuple[Path, Path], tmp_path: Path) -> None:
    expected = score(*folders, "--format", "csv").stdout
    target = tmp_path / "kept.csv"
    target.write_text(expected.splitlines()[0])
    for name, whole in (("link.csv", target), ("new.csv", tmp_path / "fresh.csv")):
        (tmp_path / name).symlink_to(whole)
        assert score(*folders, "--out", tmp_path / name).exit_code == 0
        assert (tmp_path / name).is_symlink()
        assert whole.read_text() == expected
    os.mkfifo(tmp_path / "pipe")
    command = (*folders, "--format", "csv", "--out")
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit((tmp_path / "pipe").read_text)
        assert score(*command, tmp_path / "pipe").exit_code == 0
        assert read.result() == expected
    assert (tmp_path / "pipe").is_fifo()
    with (tmp_path / "redirected").open("a") as file:
        file.write("before\n")
        file.flush()
        with standard_output(file):
            assert score(*command, "/dev/stdout").exit_code == 0
    done = subprocess.run(
        [sys.executable, "-m", "softdice", "score", *map(str, command), "/dev/stdout"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == expected
    assert (tmp_path / "redirected").read_text() == "before\n" + expected
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"deadbeef {}\n", b"\xff\xfe{]\n", b"null\n[1\n"])
@pytest.mark.parametrize("place", [1, 3])
def test_a_damaged_line_of_a_stopped_run_is_lost_alone(
    damage: bytes, place: int, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from softdice.scoring import Options, pair_files, run
    from softdice.scoring.journal import Journal

    out, path = tmp_path / "o.csv", tmp_path / "o.csv.partial"
    about = [str(folder.resolve()) for folder in folders]
    journal = Journal(path, Options(), about, resume=False)
    for case in run(pair_files(*folders), Options()):
        journal.add(str(folders[0]), case)
    journal.close(finished=False)
    lines = path.read_bytes().splitlines(keepends=True)
    flipped = lines[2].replace(b'"voxels": 99', b'"voxels": 98')
    assert flipped != lines[2]
    path.write_bytes(b"".join([*lines[:2], flipped, *lines[3:place], damage, *lines[max(place, 3) :]]))
    again = Journal(path, Options(), about, resume=True)
    assert sorted(case for _, case in again.done) == ["case_0", "case_2", "case_3"]
    again.close(finished=False)
    assert score(*folders, "--out", out, "--resume").exit_code == 0
    assert out.read_text() == score(*folders, "--format", "csv").stdout


def test_a_file_of_another_kind_in_the_place_of_the_journal(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for text in ("a download\n", "a download", '\0\0oftdice score": [1]}\n'):
        (tmp_path / "o.csv.partial").write_text(text)
        for resume in ((), ("--resume",)):
            done = score(*folders, "--out", tmp_path / "o.csv", *resume)
            refused(
                done, "expected no file at", "o.csv.partial, got a file of another kind, or a run whose first line is"
            )
        assert (tmp_path / "o.csv.partial").read_text() == text


QUICK = {"NUMBA_DISABLE_JIT": "1"}
"""For processes that score a few voxels: loading Numba takes a third of their time."""

KILLING = """
import os, sys
from pathlib import Path
from softdice.scoring import runner
def deadly(prediction, truth, options, case, score=runner.score_pair):
    if case == "case_2" and (sys.argv[-1] == "always" or not Path("once").exists()):
        Path("once").touch()
        os.kill(os.getpid(), 9)
    return score(prediction, truth, options, case)
runner.score_pair = deadly
if __name__ == "__main__":
    from softdice.cli.app import app
    sys.exit(app(["score", "p", "t", "--jobs", "2", "--format", "csv"]))
"""


@pytest.mark.parametrize("when", ["once", "always"])
def test_a_worker_that_is_killed_loses_its_own_case_at_most(when: str, folders: tuple[Path, Path]) -> None:
    script = folders[0].parent / "main.py"
    script.write_text(KILLING)
    done = subprocess.run(
        [sys.executable, script, when], capture_output=True, text=True, cwd=script.parent, check=False,
        env=os.environ | QUICK,
    )  # fmt: skip
    lines = score(*folders, "--format", "csv").stdout.splitlines()
    if when == "once":
        assert (done.returncode, done.stdout.splitlines()) == (0, lines)
    else:
        assert done.returncode == 1
        assert done.stdout.splitlines() == [line for line in lines if not line.startswith("case_2")]
        assert "Not scored: 1 of 4" in done.stderr
        assert "case_2.npy: the process that scored it was killed" in done.stderr


def test_workers_that_are_killed_between_two_cases(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from softdice.scoring import Options, pair_files, run

    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    for case in range(4, 16):
        for folder, array in zip(folders, maps(case), strict=True):
            save(folder / f"case_{case}.npy", array)
    pairs = pair_files(*folders)
    cases = run(pairs, Options(), jobs=2)
    found = [next(cases)]
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    found += cases
    assert [(case.case, case.error, case.counts.tolist()) for case in found] == [
        (case.case, "", case.counts.tolist()) for case in run(pairs, Options())
    ]


def running(group: int) -> list[str]:
    listed = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(group)], capture_output=True, text=True, check=False)
    return [line for line in listed.stdout.splitlines() if " Z" not in line]


def test_a_parent_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    large = save(tmp_path / "large.npy", np.zeros((1000, 3000), np.float64))
    for part in "pt":
        (tmp_path / part).mkdir()
        for case in range(60):
            os.link(large, tmp_path / part / f"case_{case}.npy")
    out = tmp_path / "o.csv"
    command = [sys.executable, "-m", "softdice", "score", tmp_path / "p", tmp_path / "t", "--jobs", "2", "--out", out]
    process = subprocess.Popen(
        [str(part) for part in command], start_new_session=True, stderr=subprocess.DEVNULL, text=True
    )
    wait_for_cases(process, out, 1)
    assert len(running(process.pid)) >= 3
    process.kill()
    process.wait()
    waited = time.monotonic() + 20
    while (left := running(process.pid)) and time.monotonic() < waited:
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize("how, after_s", [("-m", 0.3), ("-m", 2.5), ("script", 0.8), ("script", 1.6)])
def test_ctrl_c_in_the_first_seconds(how: str, after_s: float, folders: tuple[Path, Path]) -> None:
    """To all processes, as a terminal sends it."""
    start = [sys.executable, "-m", "softdice"]
    if how == "script":  # what an installer writes
        script = folders[0].parent / "softdice"
        script.write_text(
            "import sys\nfrom softdice.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
        )
        start = [sys.executable, str(script)]
    large = save(folders[0].parent / "large.npy", np.zeros((700, 900)))
    for case in range(4, 40):
        for folder in folders:
            os.link(large, folder / f"case_{case}.npy")
    command = [*start, "score", *map(str, folders), "--jobs", "2", "--format", "csv"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):  # it was done before
        os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert said == "" or re.fullmatch(r"Stopped(\.| after \d+ of 40: these are the scores so far\.)\n", said)
    # `python -m` ends by the signal where it came while `exec` ran a text, as in dataclasses; a shell calls both 130
    assert process.returncode in ((130, -signal.SIGINT) if said else (0, -signal.SIGINT))


def test_a_library_keeps_its_own_ctrl_c() -> None:
    code = "import signal; old = signal.getsignal(2); import softdice; print(signal.getsignal(2) is old)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_pipe_that_is_closed(folders: tuple[Path, Path]) -> None:
    for case in range(4, 300):
        for folder, array in zip(folders, maps(case), strict=True):
            save(folder / f"case_{case}.npy", array)
    softdice = f"{sys.executable} -m softdice score {folders[0]} {folders[1]} --format csv"
    run = ["bash", "-c", f"{softdice} | head -2; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 2
    assert (done.returncode, done.stderr) == (141, "")
    closed = subprocess.run(["bash", "-c", f"{softdice} >&-"], capture_output=True, text=True, check=False)
    assert closed.returncode == 2
    assert closed.stderr == "score: expected a standard output, got a closed one. Pass --out.\n"


STRANGE = {
    "brackets [/b]": "brackets [/b]", ":heart: [red]": ":heart: [red]", "a\x1b[2Jb": r"a\x1b[2Jb",
    "two\nlines": r"two\x0alines", "back\u202ewards": r"back\u202ewards", "=1+1": "=1+1", "@home": "@home",
    "café 图": "café 图",
    b"by\xfftes".decode("utf-8", "surrogateescape"): r"by\xfftes",
}  # fmt: skip


@pytest.mark.parametrize("name", list(STRANGE), ids=list(map(ascii, STRANGE)))
def test_names_are_shown_as_they_are_and_harmless(name: str, tmp_path: Path) -> None:
    """As a file, a folder and a class, in every output."""
    p, t = maps(1, 2)
    sides = tmp_path / f"p {name}", tmp_path / "t"
    file = name.replace("/", "")
    for folder, array in zip(sides, (p, t), strict=True):
        save(folder / f"{file}.npy", array)
        (folder / f"{file}2.npy").write_bytes(b"" if folder == sides[0] else (sides[1] / f"{file}.npy").read_bytes())
    out, report = tmp_path / "o.csv", tmp_path / "r.html"
    labels = f"{name}=1" if name.isprintable() and "=" not in name else "1"
    done = score(*sides, "--labels", labels, "--out", out, "--report", report)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()[1:-1]
    shown = STRANGE[name].replace("/", "")
    assert f"{shown}2.npy: " in line
    assert line.strip().isprintable()
    (row,) = csv.DictReader(io.StringIO(out.read_text(encoding="utf-8"), newline=""))
    quote = "'" if name[0] in "=+-@" else ""
    assert row["case"] == quote + shown
    page = report.read_text(encoding="utf-8")
    assert f"<td>{escape(shown)}</td>" in page
    table = score(*sides, "--labels", labels).stdout
    assert "".join(f"/p {STRANGE[name]}".split()) in "".join(table.split())  # a long title is folded
    if labels != "1":
        assert f"1 {STRANGE[name]} " in table
        assert row["name"] == quote + STRANGE[name]


def test_a_link_to_itself_or_to_nothing_is_one_failed_case(folders: tuple[Path, Path]) -> None:
    for name in ("loop", "lost"):
        (folders[0] / f"{name}.npy").symlink_to("loop.npy" if name == "loop" else "nothing.npy")
        save(folders[1] / f"{name}.npy", maps(0)[1])
    done = score(*folders, "--format", "csv")
    refused(done, "Not scored: 2 of 6", "loop.npy: ", "lost.npy: ", code=1)
    assert done.stdout.count("\n") == 13


@pytest.mark.parametrize("width", [40, 50, 60, 80, 200])
def test_a_narrow_terminal_cuts_no_number(width: int, folders: tuple[Path, Path]) -> None:
    from rich.console import Console

    from softdice.scoring import Options, compare, pair_files, run, summarise, tabulate
    from softdice.scoring.text_tables import class_grid, comparison_grid, terminal

    names = {1: "left kidney with a name that is very long indeed", 2: "b", 3: "c"}
    table = tabulate(run(pair_files(*folders), Options()), names=names)
    for grid in (class_grid(table, summarise(table)), comparison_grid(table, compare(table, table))):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(terminal("title", grid, width))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        left_out = " ".join(text.partition("Too narrow for: ")[2].split()).strip(".").split(", ")
        assert {40: left_out[0] != "", 200: left_out[0] == ""}.get(width, True)
        for column, heading in enumerate(grid.columns):
            for row in (*grid.rows, grid.total) if heading not in left_out and column else ():
                assert f" {row[column]} " in text


# --- labels that cannot be meant, and files that are not read


def masks(seed: int, *values: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of labels 0 ... k, the prediction a little off; mapped to other numbers by `values`."""
    t = np.zeros((24, 30), np.int64)
    for k in range(1, len(values)):
        t[6 * k - 4 : 6 * k + 1, 3 + seed : 20] = k
    return np.array(values)[np.roll(t, 1, 1)], t


@pytest.mark.parametrize(
    "values, advice",
    [
        ((0, 255), "--regions 'mask=1,255'"),
        ((0, 200), "--regions 'mask=1,200'"),
        ((0, 64), "--regions 'mask=1,64'"),
        ((0, 32767), "--regions 'mask=1,32767'"),
        ((0, -1), "--regions 'mask=1,-1'"),
        ((0, 127, 254), "--regions 'class 1=1,127; class 2=2,254'"),
        ((0, 85, 170, 255), "class 3=3,255'"),
        ((0, 63, 127, 191), "class 2=2,127"),
    ],
)
@pytest.mark.parametrize("named", [(), ("--labels", "1,2,3"), ("--labels", "a=1", "--ignore", "9")])
@pytest.mark.parametrize("turned", [False, True])
def test_scales_that_cannot_match(
    values: tuple[int, ...], advice: str, named: tuple[str, ...], turned: bool, tmp_path: Path
) -> None:
    files = [save(tmp_path / f"{side}.npy", array) for side, array in zip("pt", masks(1, *values), strict=True)]
    held = [" and ".join(map(str, each)) for each in (values, range(len(values)))]
    if turned:
        files, held = files[::-1], held[::-1]
    said = f"{files[0]}: holds {held[0]}, but {files[1].name} holds {held[1]}. If both mean the same, pass"
    refused(score(*files, *named), said, advice, code=1)
    meant = "; ".join(f"c{k}={k},{value}" for k, value in enumerate(values) if k)
    assert all(row["dice"] > 0.5 for row in rows(*files, "--regions", meant).values())
    both = ",".join(str(label) for label in {*values, *range(len(values))} - {0})
    assert all(row["dice"] == 0 for row in rows(*files, "--labels", both).values())


@pytest.mark.parametrize("values", [(0, 2), (0, 3), (0, 12), (0, 2, 1), (0, 11, 13), (0, 1, 255), (0, 40, 41)])
def test_labels_that_are_merely_wrong_are_scored(values: tuple[int, ...], tmp_path: Path) -> None:
    files = [save(tmp_path / f"{side}.npy", array) for side, array in zip("pt", masks(1, *values), strict=True)]
    assert set(rows(*files)) == {*values, *range(len(values))} - {0}


def image(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:96, :80]
    if kind == "noise":
        return rng.integers(0, 256, (96, 80), np.uint8)
    if kind == "smooth":
        return np.uint8(120 + 60 * np.sin(x / 3) * np.cos(y / 3) + rng.normal(0, 3, x.shape))
    if kind == "volume":
        return np.int16(rng.normal(300, 80, (12, 20, 16)))
    disc = PIL_Image.fromarray(np.uint8((x - 40) ** 2 + (y - 50) ** 2 < 800) * np.uint8(255))
    if kind == "jpeg":
        buffer = io.BytesIO()
        disc.save(buffer, "JPEG", quality=40)
        return np.asarray(PIL_Image.open(buffer))
    return np.asarray(
        disc.resize((61, 77), PIL_Image.Resampling.LANCZOS).resize((80, 96), PIL_Image.Resampling.BICUBIC)
    )


@pytest.mark.parametrize("kind", ["noise", "smooth", "volume", "jpeg", "resized"])
@pytest.mark.parametrize("options", [(), ("--labels", "1")])
def test_images_in_the_place_of_masks(kind: str, options: tuple[str, ...], tmp_path: Path) -> None:
    """On either side, and on both."""
    grey = image(kind)
    mask = np.uint8(grey > np.median(grey)) * np.uint8(255 if kind in ("jpeg", "resized") else 1)
    files = [save(tmp_path / f"{name}.npy", array) for name, array in (("grey", grey), ("mask", mask))]
    for pair in (files, files[::-1], [files[0]] * 2) if kind not in ("jpeg", "resized") else (files, files[::-1]):
        done = score(*pair, *options)
        refused(
            done, "grey.npy: expected labels, got", "most of them different from the next voxel. An image, or a", code=1
        )


def test_many_labels_are_no_image(tmp_path: Path) -> None:
    """Organs, and cells counted through; and what options name is what it is."""
    cells = np.kron(np.arange(1, 301).reshape(15, 20), np.ones((5, 6), np.int64))
    few = np.where(cells < 4, cells, 0)
    files = save(tmp_path / "p.npy", cells), save(tmp_path / "t.npy", few)
    assert len(rows(*files)) == 300
    organ = np.where(cells < 90, 1, 0)
    specks = organ.copy()
    specks.flat[7:8000:1100] = np.arange(40, 48)
    assert len(rows(save(tmp_path / "p.npy", specks), save(tmp_path / "t.npy", organ))) == 9
    noise = save(tmp_path / "n.npy", image("noise"))
    assert len(rows(noise, noise, "--labels", ",".join(map(str, range(1, 256))))) == 255


@pytest.mark.parametrize(
    "options, said",
    [
        (("--labels", "1,2"), "4 (24 voxels in 2 cases), 3 (3 voxels in 1 case)."),
        (("--labels", "1,2", "--ignore", "4"), "3 (3 voxels in 1 case)."),
        (("--regions", "x=1,2; y=3"), "4 (24 voxels in 2 cases)."),
        (("--labels", "dataset.json"), "4 (24 voxels in 2 cases)."),
        (("--labels", "2", "--soft"), "1 (28 voxels in 2 cases), 4 (24 voxels in 2 cases), 3 (3 voxels in 1 case)."),
        (("--labels", "1,2,3,4"), ""),
        (("--ignore", "4"), ""),
        ((), ""),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_what_the_reference_holds_and_no_option_names(
    options: tuple[str, ...], said: str, resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once, with counts."""
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path, {"background": 0, "a": 1, "rest": [2, 3]})
    t = np.zeros((8, 9), np.uint8)
    t[1:3, 1:8], t[4:6, 2:8], t[7, :3] = 1, 4, 3
    for case, truth in (("a", t), ("b", np.where(t == 3, 0, t))):
        save(tmp_path / "t" / f"{case}.npy", truth)
        save(tmp_path / "p" / f"{case}.npy", np.uint8(truth == 1) if "--soft" in options else truth)
    if resumed:
        from softdice.scoring.journal import Journal

        close = Journal.close
        monkeypatch.setattr(Journal, "close", lambda self, *, finished: close(self, finished=False))
        score("p", "t", *options, "--out", "o.json")
        options = (*options, "--resume")
    done = score("p", "t", *options, "--out", "o.json", "--report", "r.html")
    line = f"The reference holds labels that no option names, and which are not scored: {said}" if said else ""
    assert (done.exit_code, done.stderr.splitlines()[:-1]) == (0, [line] if said else [])
    assert bool(json.loads(Path("o.json").read_text())["unnamed_labels"]) == bool(said)
    assert line in Path("r.html").read_text()


@pytest.mark.parametrize(
    "extra, listed",
    [
        (("p/b.mnc", "t/b.mnc"), ["p/b.mnc and t/b.mnc: expected a file ending in"]),
        (("p/c.png", "t/c.czi"), ["t/c.czi: expected a file ending in"]),
        (("p/d.gipl",), ["p/d.gipl: expected"]),
        (("t/e.tga", "p/e.heic", "p/f.gipl.gz"), ["p/e.heic and t/e.tga: expected", "p/f.gipl.gz: expected"]),
        (("p/case_1.tga", "t/case_1.dcm", "p/notes.md", "p/plans.json", "p/.d.bmp", "t/x.pkl", "t/Thumbs.db"), []),
    ],
)
def test_files_that_are_not_read_are_not_passed_over(
    extra: tuple[str, ...], listed: list[str], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders[0].parent)
    for name in extra:
        Path(name).write_bytes(b"x")
    done = score("p", "t", "--format", "csv")
    assert done.exit_code == (1 if listed else 0)
    assert done.stdout == score("p", "t", "--format", "csv").stdout
    assert done.stdout.count("\n") == 13
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Left out of")]
    if not listed:
        assert done.stderr.splitlines() == [
            "Left out of p: case_1.tga, notes.md, plans.json",
            "Left out of t: Thumbs.db, case_1.dcm, x.pkl",
        ]
    assert lines[:1] == ([f"Not scored: {len(listed)} of {4 + len(listed)}"] if listed else [])
    for line, part in zip(lines[1:], listed, strict=True):
        assert part in line


# --- where voxels lie


def placed(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    nib.Nifti1Image(array, affine).to_filename(path)
    return path


def grid(spacing: tuple[float, ...], origin: tuple[float, ...], turn: float = 0.0) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine[:3, :3] = rotation @ affine[:3, :3]
    affine[:3, 3] = origin
    return affine


@pytest.mark.parametrize(
    "coarse, fine, shape",
    [
        (grid((3, 3, 3), (1, 1, 1)), grid((1, 1, 1), (0, 0, 0)), (18, 15, 12)),
        (grid((2, 4, 5), (0, 2, 7)), grid((0.7, 1.1, 1.3), (0.05, 0.2, 5.1)), (20, 21, 25)),
        (grid((2.5, 2, 3), (0, 0, 0)), grid((1, 1.3, 1.1), (-4.03, -3.02, -5.01)), (30, 20, 22)),
        (grid((2, 3, 2), (3, -2, 0), 0.4), grid((1, 1.2, 0.9), (-3.1, 1.1, 0.3), -0.2), (17, 19, 13)),
        (grid((-2, 3, -2), (9, -2, 7)), grid((1, -1.2, 0.9), (-1.1, 9.1, -0.7)), (14, 13, 12)),
    ],
)
def test_resampled_probabilities_are_those_of_simpleitk(
    coarse: np.ndarray, fine: np.ndarray, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Up to the faces of the outermost voxels, 0 beyond them."""
    sitk = pytest.importorskip("SimpleITK")
    p = np.random.default_rng(3).uniform(0.2, 1, (6, 5, 4)).astype(np.float32)
    files = placed(tmp_path / "p.nii", p, coarse), placed(tmp_path / "t.nii", np.ones(shape, np.uint8), fine)
    image, onto = (sitk.ReadImage(str(path)) for path in files)
    expected = sitk.GetArrayFromImage(sitk.Resample(image, onto, sitk.Transform(), sitk.sitkLinear, 0.0)).T
    assert rows(*files, "--resample", "--soft")[1]["n_pred"] == pytest.approx(expected.sum(), rel=1e-5)
    for threshold in (0.3, 0.55, 0.7):
        found = rows(*files, "--resample", "--threshold", threshold)[1]["n_pred"]
        assert found == ((expected > threshold) & (np.abs(expected - threshold) > 1e-6)).sum()


IDENTITY = grid((1, 1, 1), (0, 0, 0))


@pytest.mark.parametrize(
    "affine, other, shape",
    [
        (IDENTITY, grid((-0.7, -0.7, 3), (140, 120, -300)), (12, 10, 8)),
        (grid((-1, -1, 1), (0, 0, 0)), grid((1, 1, 2), (31, 40, 50)), (12, 10, 8)),
        (grid((1, 1, 1), (0, 0, 30)), grid((1, 1, 1), (0, 0, 0), 0.8), (12, 10, 8)),
        (IDENTITY, grid((0.5, 0.5, 2), (100, 0, 0)), (30, 30, 9)),
    ],
)
def test_grids_that_do_not_overlap(
    affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...], tmp_path: Path
) -> None:
    p, t = np.zeros((12, 10, 8), np.uint8), np.zeros(shape, np.uint8)
    p[3:9, 2:8, 1:6], t[3:9, 2:8, 1:6] = 1, 1
    files = placed(tmp_path / "p.nii.gz", p, affine), placed(tmp_path / "t.nii.gz", t, other)
    same = shape == p.shape
    lost = "Was its affine lost? Then --ignore-geometry compares as is." if same else "Check the affines."
    said = "expected a grid that overlaps that of t.nii.gz in space, got one beside it. " + lost
    refused(score(*files, "--resample"), said, code=1)
    if same:
        refused(score(*files), said, code=1)
        assert rows(*files, "--ignore-geometry")[1]["dice"] == 1.0


def test_grids_that_touch_at_an_edge_are_resampled(tmp_path: Path) -> None:
    p = np.ones((4, 4, 4), np.uint8)
    for shift in (3, -3):
        files = placed(tmp_path / "p.nii", p, IDENTITY), placed(tmp_path / "t.nii", p, grid((1, 1, 1), (shift, 0, 0)))
        assert rows(*files, "--resample")[1]["tp"] == 16
        assert rows(*files, "--resample")[1]["dice"] == pytest.approx(2 * 16 / (16 + 64))


@pytest.mark.parametrize("options", [(), ("--resample",)])
def test_a_header_that_says_nothing_of_its_place(options: tuple[str, ...], tmp_path: Path) -> None:
    array = np.eye(6, dtype=np.uint8)[..., None] * np.ones(3, np.uint8)
    silent = nib.Nifti1Image(array, None)
    silent.header.set_zooms((0.8, 0.8, 3))
    silent.to_filename(tmp_path / "silent.nii.gz")
    spoken = placed(tmp_path / "spoken.nii.gz", array, grid((0.8, 0.8, 3), (20, -10, 5)))
    for pair in ((tmp_path / "silent.nii.gz", spoken), (spoken, tmp_path / "silent.nii.gz")):
        said = "only spoken.nii.gz says how its voxels lie in space. Pass --ignore-geometry if their axes agree."
        refused(score(*pair, *options), said, code=1)
        assert rows(*pair, "--ignore-geometry")[1]["dice"] == 1.0
    both = tmp_path / "silent.nii.gz"
    assert rows(both, both, *options)[1]["dice"] == 1.0


@pytest.mark.parametrize("shape", [(9, 9), (7, 12)])
def test_a_transposed_pair_can_be_said_to_be_one(shape: tuple[int, int], tmp_path: Path) -> None:
    p, t = maps(6, 3, shape)
    files = placed(tmp_path / "p.nii.gz", p.T.copy(), IDENTITY), save(tmp_path / "t.png", t)
    refused(score(*files), "--transpose", code=1)
    found = rows(*files, "--transpose")
    for label in (1, 2):
        assert found[label]["dice"] == pytest.approx(dice(p == label, t == label))
    volume = save(tmp_path / "v.npy", np.zeros((3, 3, 3, 3), np.uint8))
    refused(score(volume, volume, "--transpose"), "--transpose: expected an image of 2 or 3 axes, got shape", code=1)
    refused(score(*files, "--transpose", "--resample"), "expected --resample or --transpose, got both")


# --- two sets of predictions


def test_scores_without_a_partner_are_counted(tmp_path: Path) -> None:
    """Class 1 is painted into empty references by the first, class 2 by the second."""
    full, empty = np.ones((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    cases = {"a": (full, empty, empty), "b": (full, empty, empty), "c": (full, full, full), "d": (2 * full, full, full)}
    cases["e"] = (empty, 2 * full, empty)
    for case, arrays in cases.items():
        for folder, array in zip("pqt", arrays, strict=True):
            save(tmp_path / folder / f"{case}.npy", array)
    options = (tmp_path / "p", tmp_path / "t", "--versus", tmp_path / "q")
    content = json.loads(score(*options, "--format", "json").stdout)["comparison"]["classes"]
    assert [(row["label"], row["cases"], row["cases_alone"]) for row in content] == [(1, 2, [2, 0]), (2, 0, [1, 1])]
    assert content[0]["difference"] == -0.5
    shown = score(*options).stdout
    assert re.search(r"│ 1 +│ +2 │ +2 \+ 0 │ +-0.5000 ", shown)
    said = (
        "Not compared: 3 scores of the first and 1 of the second, which are in their means. The other side has no score"
    )
    assert said in shown
    score(*options, "--out", tmp_path / "o.json", "--report", tmp_path / "r.html")
    assert said in (tmp_path / "r.html").read_text()
    assert (
        "Not compared" not in score(tmp_path / "p", tmp_path / "t", "--versus", tmp_path / "t", "--labels", "3").stdout
    )


@pytest.mark.parametrize(
    "p, expected",
    [
        ([0.02], [0.02]),
        ([0.5, 0.001, 0.04, 0.03], [0.5, 0.004, 0.09, 0.09]),
        ([0.2, np.nan, 0.15, 0.9], [0.45, np.nan, 0.45, 0.9]),
        ([0.8, 0.7], [1.0, 1.0]),
        ([np.nan], [np.nan]),
        ([], []),
    ],
)
def test_holm(p: list[float], expected: list[float]) -> None:
    from softdice.scoring.comparison import holm

    assert holm(np.array(p)) == pytest.approx(np.array(expected), nan_ok=True)


def test_cases_that_differ_most(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    means = {}
    for case in range(14):
        t = rng.integers(0, 4, (12, 12), np.uint8)
        p, q = (np.where(rng.random(t.shape) < rng.random() / 2, 1, t).astype(np.uint8) for _ in range(2))
        for folder, array in zip("pqt", (p, q, t), strict=True):
            save(tmp_path / folder / f"case {case}.npy", array)
        each = {c: dice(p == c, t == c) - dice(q == c, t == c) for c in (1, 2, 3)}
        most = max(each, key=lambda c: abs(each[c]))
        means[f"case {case}"] = (sum(each.values()) / 3, most, each[most])
    options = (tmp_path / "p", tmp_path / "t", "--versus", tmp_path / "q")
    content = json.loads(score(*options, "--format", "json").stdout)["comparison"]
    order = sorted(means, key=lambda case: -abs(means[case][0]))
    assert [row["case"] for row in content["most_different"]] == order[:12]
    for row in content["most_different"]:
        found = row["difference"], row["label"], row["class_difference"]
        assert found == pytest.approx(means[row["case"]])
    lines = score(*options).stdout.partition("Cases that differ most:\n")[2].splitlines()
    first, label, largest = means[order[0]]
    assert lines[0] == f"  {order[0]}: {first:+.4f}, most in {label} {largest:+.4f}"
    assert len(lines) == 5


def test_more_than_two_are_ranked(tmp_path: Path) -> None:
    """Class 1: 0.5, 1, 1 in one case; class 2 is in no reference, and painted by the second alone."""
    t = np.array([[1, 1, 1, 1], [0, 0, 0, 0]])
    sides = {"p": np.array([[1, 1, 0, 0], [1, 1, 0, 0]]), "q": t + 2 * (np.arange(8) == 7).reshape(2, 4), "r": t}
    for case in "ab":
        save(tmp_path / "t" / f"{case}.npy", t)
        for name, array in sides.items():
            save(tmp_path / name / f"{case}.npy", array if case == "a" else t)
    options = (tmp_path / "p", tmp_path / "t", "--versus", tmp_path / "q", "--versus", tmp_path / "r")
    content = json.loads(score(*options, "--format", "json").stdout)
    # case a: class 1 ranks 3, 1.5, 1.5 and class 2 ranks 1.5, 3, 1.5; case b: class 1 ranks 2, 2, 2
    expected = {"r": 5 / 3, "p": 6.5 / 3, "q": 6.5 / 3}
    assert {Path(name).name: rank for name, rank in content["mean_ranks"].items()} == pytest.approx(expected)
    assert [Path(row["predictions"]).name for row in content["comparisons"]] == ["q", "r"]
    assert [row["classes"][0]["difference"] for row in content["comparisons"]] == [-0.25, -0.25]
    assert content["comparisons"][0] == content["comparison"]
    two = json.loads(score(*options[:4], "--format", "json").stdout)
    assert two["comparison"] == content["comparison"]
    assert "mean_ranks" not in two
    shown = score(*options, "--report", tmp_path / "r.html").stdout
    assert f"Mean rank (1 is best, of 3 scores): {tmp_path / 'r'} 1.67, " in shown
    assert f"{tmp_path / 'p'} minus {tmp_path / 'r'}" in " ".join(shown.split())
    page = (tmp_path / "r.html").read_text()
    assert "Mean rank (1 is best, of 3 scores): r 1.67, p 2.17, q 2.17." in page
    assert page.index(">p and q</h2>") < page.index(">p and r</h2>")
    refused(score(*options, "--versus", tmp_path / "q"), "--versus: expected other predictions than", "got the same")


# --- names in the files


def tabled(path: Path, array: np.ndarray, names: dict[int, str]) -> Path:
    """NIfTI with a Caret label table."""
    labels = "".join(f'<Label Key="{key}" Red="1" Green="0" Blue="0">{name}</Label>' for key, name in names.items())
    image = nib.Nifti1Image(array, np.eye(4))
    text = f"<CaretExtension><VolumeInformation><LabelTable>{labels}</LabelTable></VolumeInformation></CaretExtension>"
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, text.encode()))
    image.to_filename(path)
    return path


@pytest.mark.parametrize(
    "p, t, said",
    [
        ({1: "aorta", 2: "vein"}, {1: "vein", 2: "aorta"}, "label 1 is 'aorta', but 'vein' in t.nii.gz. Bring both to"),
        ({1: "aorta", 2: "portal vein"}, {1: "Aorta", 2: "cava"}, "label 2 is 'portal vein', but 'cava' in t.nii.gz"),
        ({0: "background", 1: "aorta", 2: "portal_vein"}, {0: "???", 1: "Aorta ", 2: "Portal Vein"}, ""),
        ({1: "aorta", 7: "colon"}, {1: "aorta", 7: "lung", 2: "x"}, ""),
        ({}, {1: "vein"}, ""),
    ],
)
def test_tables_of_labels_that_disagree(p: dict[int, str], t: dict[int, str], said: str, tmp_path: Path) -> None:
    arrays = maps(4, 3, (5, 6, 3))
    files = [tabled(tmp_path / f"{s}.nii.gz", a, n) for s, a, n in zip("pt", arrays, (p, t), strict=True)]
    if said:
        refused(score(*files), said, code=1)
        assert rows(*files, "--labels", "1,2")[1]["name"] == t[1]
    else:
        assert rows(*files)[1]["name"] == t[1].strip()


def test_the_line_of_usage_names_its_arguments() -> None:
    for command, names in (("score", "PREDICTIONS LABELS"), ("predict", "CHECKPOINT IMAGES OUT")):
        said = CliRunner().invoke(app, [command, "--help"]).stdout
        assert f"[OPTIONS] {names}" in re.sub("[{}]", "", said.splitlines()[0])  # braces are typer's


# --- what people expect of a scorer


@pytest.fixture
def volumes(tmp_path: Path) -> tuple[Path, Path]:
    """Class 3 is in one reference of four, and painted into two empty ones; the last case has no prediction."""
    for case in range(4):
        p, t = maps(case, 4, (6, 5, 4))
        t[t == 3] = 3 if case == 1 else 0
        p[p == 3] = 3 if case < 3 else 0
        placed_at = np.diag([0.5, 0.8, 2.5, 1])
        placed(tmp_path / "t" / f"{case}.nii.gz", t, placed_at)
        if case < 3:
            placed(tmp_path / "p" / f"{case}.nii.gz", p, placed_at)
    return tmp_path / "p", tmp_path / "t"


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def expected(folders: tuple[Path, Path], missing: str) -> dict[str, np.ndarray]:
    """Metric -> (cases, classes), by hand."""
    cases = [0, 1, 2, 3] if missing == "0" else [0, 1, 2]
    found: dict[str, list] = {}
    for case in cases:
        t = read(folders[1] / f"{case}.nii.gz")
        p = read(folders[0] / f"{case}.nii.gz") if case < 3 else np.zeros_like(t)
        for c in (1, 2, 3):
            tp, fp, fn = ((a & b).sum() for a, b in ((p == c, t == c), (p == c, t != c), (p != c, t == c)))
            tn = t.size - tp - fp - fn
            nothing = tp + fp + fn == 0
            row = {
                "dice": np.nan if nothing else 2 * tp / (2 * tp + fp + fn),
                "precision": np.nan if nothing else tp / max(tp + fp, 1),
                "recall": np.nan if nothing else tp / max(tp + fn, 1),
                "specificity": tn / (tn + fp),
                "ml_pred": (tp + fp) / 1000,
                "ml_ref": (tp + fn) / 1000,
                "volume_difference": np.nan if nothing else 2 * (fp - fn) / (2 * tp + fp + fn),
            }
            for name, value in row.items():
                found.setdefault(name, []).append(value)
    return {name: np.array(values).reshape(len(cases), 3) for name, values in found.items()}


@pytest.mark.parametrize("empty", ["nan", "1"])
@pytest.mark.parametrize("missing", ["skip", "0"])
def test_metrics_statistics_and_policies(empty: str, missing: str, volumes: tuple[Path, Path]) -> None:
    options = ("--metrics", "volume,precision,recall,specificity", "--empty", empty, "--missing", missing)
    done = score(*volumes, *options, "--format", "json")
    said = "Without a prediction, scored as an empty one: 1 of 4" if missing == "0" else "3.nii.gz: no prediction"
    assert said in done.stderr
    assert done.exit_code == (0 if missing == "0" else 1)
    (results,) = json.loads(done.stdout)["results"]
    by_hand = expected(volumes, missing)
    if empty == "1":
        by_hand |= {n: np.nan_to_num(by_hand[n], nan=1.0) for n in ("dice", "precision", "recall")}
    number = lambda value: np.nan if value is None else value  # noqa: E731
    for name, values in by_hand.items():
        each = [[number(row[name]) for row in case["classes"]] for case in results["cases"]]
        assert np.array(each) == pytest.approx(values, nan_ok=True), name
        means = [number(row[name]) for row in results["classes"]]
        assert means == pytest.approx(np.nanmean(values, 0), nan_ok=True), name
    for k, row in enumerate(results["classes"]):
        column = by_hand["dice"][:, k][~np.isnan(by_hand["dice"][:, k])]
        assert row["dice_median"] == pytest.approx(np.median(column))
        assert row["dice_quartiles"] == pytest.approx(np.quantile(column, (0.25, 0.75)))
        assert number(row["dice_sd"]) == pytest.approx(column.std(ddof=1) if column.size > 1 else np.nan, nan_ok=True)
    assert results["classes"][2]["empty_references"] == (3 if missing == "0" else 2)
    assert results["classes"][2]["predicted_in_empty"] == 2
    assert results["overall"]["macro_precision"] == pytest.approx(np.nanmean(np.nanmean(by_hand["precision"], 0)))
    text = score(*volumes, *options).stdout
    for heading in ("SD", "median", "quartiles", "precision", "recall", "specificity", "reference ml", "in empty"):
        assert f" {heading} " in text
    assert f" {results['classes'][0]['dice_sd']:.4f} " in text
    assert f" 2 of {results['classes'][2]['empty_references']} " in text


def test_rows_of_a_csv(volumes: tuple[Path, Path], tmp_path: Path) -> None:
    def table(*options: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(score(*volumes, "--labels", "a=1,=b=2,3", *options).stdout)))

    content = json.loads(score(*volumes, "--labels", "a=1,=b=2,3", "--format", "json").stdout)["results"][0]
    classes = table("--format", "csv", "--rows", "classes")
    assert [row["name"] for row in classes] == ["a", "'=b", ""]
    for row, one in zip(classes, content["classes"], strict=True):
        assert float(row["dice_sd"] or "nan") == pytest.approx(one["dice_sd"] or np.nan, nan_ok=True)
        assert float(row["dice_quartiles_high"]) == one["dice_quartiles"][1]
        assert (row["dice_95_low"], one["dice_95"][0]) == ("", None)  # three cases
    cases = table("--format", "csv", "--rows", "cases")
    assert list(cases[0]) == ["case", "1 a", "2 =b", "3"]
    for row, one in zip(cases, content["cases"], strict=True):
        assert [row[k] for k in list(row)[1:]] == ["" if c["dice"] is None else str(c["dice"]) for c in one["classes"]]
    out = tmp_path / "two.csv"
    score(*volumes, "--versus", volumes[1], "--out", out, "--rows", "classes")
    both = list(csv.DictReader(io.StringIO(out.read_text(encoding="utf-8"))))
    assert [row["predictions"] for row in both] == [str(volumes[0])] * 3 + [str(volumes[1])] * 3
    refused(
        score(*volumes, "--rows", "classes"), "--rows: expected one of pairs, classes, cases, with --format csv or json"
    )


@pytest.mark.parametrize(
    "options, said",
    [
        (("--empty", "0"), "--empty: expected nan or 1, got '0'."),
        (("--missing", "1"), "--missing: expected skip or 0, got '1'."),
        (("--metrics", "recall,f1"), "--metrics: expected some of precision, recall, specificity, volume, got"),
        (("--layout", "deep"), "--layout: expected one of files, subfolders, classes, got 'deep'."),
        (("--layout", "classes", "--labels", "1"), "--layout classes: expected no --labels"),
    ],
)  # fmt: skip
def test_policies_that_are_none(options: tuple[str, ...], said: str, volumes: tuple[Path, Path]) -> None:
    refused(score(*volumes, *options), said)


@pytest.mark.parametrize("options", [(), ("--soft",), ("--threshold", "0.5")])
def test_a_missing_prediction_counts_for_the_classes_of_its_reference(options: tuple[str, ...], tmp_path: Path) -> None:
    for case in "ab":
        save(tmp_path / "t" / f"{case}.npy", np.array([0, 1, 1]))
    save(tmp_path / "p" / "a.npy", np.array([0.0, 1, 1]))
    done = score(
        tmp_path / "p", tmp_path / "t", *options, "--missing", "0", "--format", "json", "--report", tmp_path / "r.html"
    )
    assert done.exit_code == 0
    assert json.loads(done.stdout)["results"][0]["classes"][0]["dice"] == 0.5
    page = (tmp_path / "r.html").read_text()
    assert (page.count("<figure>"), page.count("<img ")) == (1, 1)  # of b: a is right


def test_subfolders(tmp_path: Path) -> None:
    names = ("x/1/seg", "x/2/seg", "y/1/seg", "top")
    for case, name in enumerate(names):
        for part, array in zip("pt", maps(case), strict=True):
            save(tmp_path / part / f"{name}.npy", array)
    save(tmp_path / "p" / "y/2/lone.npy", np.eye(3))
    (tmp_path / "p" / "x/back").symlink_to("..")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "t" / "y" / "1").rename(tmp_path / "elsewhere" / "1")
    (tmp_path / "t" / "y" / "1").symlink_to(tmp_path / "elsewhere" / "1")
    sides = tmp_path / "p", tmp_path / "t"
    done = score(*sides, "--layout", "subfolders", "--format", "csv")
    assert {line.partition(",")[0] for line in done.stdout.splitlines()[1:]} == set(names)
    refused(done, "Not scored: 1 of 5", "y/2/lone.npy: no reference of this name", code=1)
    assert score(*sides, "--format", "csv").stdout.count("\n") == 4
    single = score(*(side / "x/2/seg.npy" for side in sides), "--format", "csv").stdout.splitlines()
    assert [line.partition(",")[2] for line in done.stdout.splitlines() if line.startswith("x/2/seg,")] == [
        line.partition(",")[2] for line in single[1:]
    ]


@pytest.mark.parametrize("inner", ["", "segmentations/"])
@pytest.mark.parametrize("top", [1, 255])
def test_a_file_per_class(inner: str, top: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    organs = {"liver": 1, "spleen": 2, "kidney left": 3}
    for case in range(3):
        for part, array in zip("pt", maps(case), strict=True):
            save(Path(f"whole {part}/{case}.npy"), array)
            for name, label in organs.items():
                save(
                    Path(part, f"s{case}", inner if part == "t" else "", f"{name}.npy"),
                    (array == label) * np.uint8(top),
                )
    save(Path("t/s0", inner, "preview.png"), np.zeros((4, 4, 3), np.uint8))
    save(Path("p/s0/more.npy"), np.zeros((9, 11), np.uint8))
    by_file = json.loads(score("p", "t", "--layout", "classes", "--format", "json", "--report", "r.html").stdout)
    labels = ",".join(f"{name}={label}" for name, label in sorted(organs.items()))
    by_label = json.loads(score("whole p", "whole t", "--labels", labels, "--format", "json").stdout)
    for one, other in zip(by_file["results"][0]["cases"], by_label["results"][0]["cases"], strict=True):
        rows = [{**row, "label": row["name"]} for row in other["classes"]]
        assert one["classes"] == rows
    assert Path("r.html").read_text().count("<img ") == 3
    assert score("p/s1", f"t/s1/{inner}", "--layout", "classes").exit_code == 0
    Path("p/s1/liver.npy").unlink()
    done = score("p", "t", "--layout", "classes", "--format", "csv")
    refused(done, "p/s1: expected a file for each class of t/s1", "got none for 'liver'. --missing 0 counts", code=1)
    counted = score("p", "t", "--layout", "classes", "--format", "csv", "--missing", "0")
    assert counted.exit_code == 0
    assert re.search(r"^s1,liver,liver,0.0,0.0,0,0,\d+,0,", counted.stdout, re.M)
    save(Path("p/s2/liver.npy"), maps(2)[0])
    refused(
        score("p", "t", "--layout", "classes"),
        "liver.npy: expected a mask of one class, got the labels 1, 2, 3",
        code=1,
    )
    refused(score("p", "t", "--layout", "classes", "--out", "p/s0/more.npy"), "--out: expected", code=2)


@pytest.mark.parametrize("layout", ["files", "subfolders", "classes"])
def test_names_in_both_forms_of_unicode_are_one(layout: str, tmp_path: Path) -> None:
    """macOS writes é as two characters, other systems as one; a terminal shows the same."""
    p, t = maps(3)
    for side, form, array in (("p", "NFD", p), ("t", "NFC", t)):
        name = unicodedata.normalize(form, "Hüfte é")
        parts = {"files": [], "subfolders": [name], "classes": [name, "segmentations"]}[layout]
        save(tmp_path.joinpath(side, *parts, f"{name}.npy"), array if layout != "classes" else array == 1)
    done = score(tmp_path / "p", tmp_path / "t", "--layout", layout, "--missing", "0", "--format", "json")
    (case,) = json.loads(done.stdout)["results"][0]["cases"]
    assert case["classes"][0]["dice"] == pytest.approx(dice(p == 1, t == 1))
    assert list(list_images(tmp_path / "t")) == list(list_images(tmp_path / "p"))


@pytest.mark.parametrize("header, voxels", [("a.mhd", "a.raw"), ("a.nhdr", "a.raw"), ("a.hdr", "a.img")])
def test_voxels_beside_a_header_are_scored_again_where_they_changed(header: str, voxels: str, tmp_path: Path) -> None:
    from softdice.scoring import Options
    from softdice.scoring.journal import Journal
    from softdice.scoring.pair_scores import score_pair

    sitk = pytest.importorskip("SimpleITK")
    array = np.zeros((5, 6, 7), np.uint8)
    array[1:3, 1:3, 1:3] = 1
    for side in "pt":
        (tmp_path / side).mkdir()
        sitk.WriteImage(
            sitk.GetImageFromArray(array),
            str(tmp_path / side / header),
            imageIO={".hdr": "NiftiImageIO"}.get(header[1:], ""),
        )
    case = score_pair(tmp_path / "p" / header, tmp_path / "t" / header, Options(), "a")
    about = [str(tmp_path / side) for side in "pt"]
    journal = Journal(tmp_path / "o.partial", Options(), about, resume=False)
    journal.add("p", case)
    journal.close(finished=False)
    for kept in (1, 0):
        again = Journal(tmp_path / "o.partial", Options(), about, resume=True)
        assert len(again.done) == kept
        again.close(finished=False)
        (tmp_path / "p" / voxels).write_bytes(np.zeros((5, 6, 7), np.uint8).tobytes())
        os.utime(tmp_path / "p" / voxels, ns=(0, 0))
