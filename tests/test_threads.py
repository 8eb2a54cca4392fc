"""Threads of the CPU kernel: torch's own, or Python's, and errors in either."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from softdice.parallel import threads

pytest.importorskip("numba", reason="the CPU kernel needs numba")


@pytest.fixture(params=["torch", "python"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("torch runs on something other than GNU OpenMP here")
    return str(request.param)


def test_torch_brings_gnu_openmp_where_its_wheel_says_so() -> None:
    bundled = list(Path(torch.__file__).with_name("lib").glob("libgomp*"))
    if sys.platform != "linux" or not bundled:
        pytest.skip("torch brings no GNU OpenMP here")
    assert threads._openmp() is not None


def test_once_in_each_thread(engine: str) -> None:
    seen: list[int] = []
    everybody = threading.Barrier(3, timeout=30)

    def work() -> None:
        seen.append(threading.get_native_id())
        everybody.wait()

    threads.in_threads(work, 3)
    assert len(set(seen)) == 3
    assert threading.get_native_id() in seen


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_in_any_thread_is_raised_here(engine: str, kind: type[BaseException]) -> None:
    here = threading.get_native_id()
    everybody = threading.Barrier(2, timeout=30)

    def work() -> None:
        everybody.wait()
        if threading.get_native_id() != here:
            raise kind("elsewhere")

    with pytest.raises(kind, match="elsewhere"):
        threads.in_threads(work, 2)


def test_tasks_are_done_once_each(engine: str) -> None:
    done: list[int] = []

    def kernel(begin: int, end: int) -> None:
        done.extend(range(int(begin), int(end)))

    threads.share_out(kernel, (), 37, threads.ALONE_NUMEL)
    assert sorted(done) == list(range(37))
