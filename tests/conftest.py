"""Fixtures that all tests share: the backends, and a process left as it was found."""

# ruff: noqa: E402
from __future__ import annotations

import locale
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
"""Read when torch is loaded: its threads sleep while they wait. By default they spin, and two processes on two cores,
which is what `pytest -n 2` starts, then hold each other up many times over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import softdice
from softdice.backends import route
from softdice.statistics.request import Request

BACKENDS = ["reference", "cpu"]
"""Every backend that this environment must have. A test with the `backend` fixture runs once on each of them; one that
is missing fails there, it is not skipped."""

SLOW = (
    "cli", "compat_migrating", "compat_monai", "compat_monai_published", "compat_nnunet", "compat_smp", "compiled_cold",
    "distances",
    "distributed", "distributed_dtensor", "distributed_hosts", "docs", "environments", "examples", "notebook",
    "pipelines", "reproducibility", "scoring", "scoring_browser", "scoring_faults", "scoring_long", "scoring_peers",
    "scoring_report", "scoring_torchrun", "training_benchmark", "training_data", "training_faults", "training_layout",
    "training_run", "training_sides", "training_step", "training_torchrun", "triton", "triton_compile",
)  # fmt: skip
"""What `make quick` leaves out: peers, training, scoring, documentation, and what starts processes. Names of test files
without `test_`."""

SLOW_WORDS = ("compiles", "opcheck", "ranks", "without_torchmetrics")
"""And single tests elsewhere, by a word in their names."""

LONG = (
    "training_torchrun", "scoring_faults", "triton", "environments", "agreement", "scoring_torchrun", "training_faults",
    "training_run", "training_sides", "notebook", "distributed", "distributed_dtensor", "scoring",
)  # fmt: skip
"""Files that take longest, which begin first: not last, on one of two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name, apart = file_of(item), {mark.name for mark in item.iter_markers()} & {"peers", "triton"}
        if name in SLOW or apart or any(word in item.name for word in SLOW_WORDS):
            item.add_marker("slow")
    items.sort(key=lambda item: LONG.index(name) if (name := file_of(item)) in LONG else len(LONG))


def file_of(item: pytest.Item) -> str:
    """Return the name of its file, without `test_`."""
    return item.path.stem.removeprefix("test_")


MOST_KERNELS = 180
"""Kernels that the tests may compile, in all their processes but those they start: each takes half a second or more."""

_kernels: list[str] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Count what was compiled; with `-n`, each worker tells the process that started it."""
    compiler = sys.modules.get("softdice.backends.cpu.compiler")
    _kernels.extend(compiler.compiled if compiler else ())
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernels"] = list(_kernels)
    elif len(_kernels) > MOST_KERNELS:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect a worker's count."""
    _kernels.extend(getattr(node, "workeroutput", {}).get("kernels", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many kernels were compiled."""
    most = f"; MOST_KERNELS in tests/conftest.py allows {MOST_KERNELS}" if len(_kernels) > MOST_KERNELS else ""
    terminalreporter.write_line(f"kernels compiled: {len(_kernels)} ({len(set(_kernels))} different){most}")


settings.register_profile(
    "softdice",
    deadline=None,  # the first call on a backend may compile
    derandomize=True,  # the same examples in every run
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("softdice")


@contextmanager
def serving(backend: str) -> Iterator[None]:
    """Make a backend serve inputs of any size, and assert afterwards that it did.

    "cpu" has no kernels for float64; the definition in slices serves that.
    """
    ran: list[tuple[str, bool]] = []
    choose: Callable[..., str] = route.choose

    def record(request: Request) -> str:
        ran.append((choose(request), request.input.dtype == torch.float64))
        return ran[-1][0]

    with pytest.MonkeyPatch.context() as patch, softdice.use_backend("auto" if backend == "cpu" else backend):
        patch.setattr(route, "choose", record)
        patch.setattr(route, "SMALL_NUMEL", 0)
        yield
    served = {("cpu", False), ("sliced", True)} if backend == "cpu" else {(backend, False), (backend, True)}
    assert set(ran) <= served, f"asked for {backend}, ran {ran}"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the name of a backend that serves every pass of the test, see `serving`."""
    with serving(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run on one thread: with a few hundred numbers a second thread only waits, long if another process is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LOCALE = locale.setlocale(locale.LC_ALL)
"""ITK leaves the locale "C" behind where it writes DICOM, as tests do; Python then opens text as ASCII."""


@pytest.fixture(autouse=True)
def _process_as_found() -> Iterator[None]:
    """Put back what `setup_system` and libraries set; each test draws the same numbers, whatever ran before it."""
    locale.setlocale(locale.LC_ALL, LOCALE)  # what a fixture of the module may have left
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    locale.setlocale(locale.LC_ALL, LOCALE)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
    torch.set_printoptions(profile="default")
    torch.set_rng_state(state)
