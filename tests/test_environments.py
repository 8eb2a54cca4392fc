"""Machines that lack something: what serves there, and what is said."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import softdice
from softdice.backends import route
from softdice.losses.base import words

WITHOUT = """
import importlib.util, sys
found = importlib.util.find_spec
gone = sys.argv[1].split(",")
importlib.util.find_spec = lambda name, *rest: None if name in gone else found(name, *rest)
for name in gone:
    sys.modules[name] = None
"""
"""Packages named in the first argument are missing, as far as Python can see."""

LOSS = """
import torch, softdice
logits = torch.linspace(-3, 3, 3 * 20000).view(1, 3, 20000).requires_grad_()
loss = softdice.SoftDiceLoss(3, activation="softmax")(logits, torch.arange(20000).view(1, -1) % 3)
loss.backward()
print(f"{loss.item():.5f} {logits.grad.abs().sum().item():.4f}")
"""
"""Enough elements for the CPU kernel."""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def said(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 0, run.stderr
    return run.stdout


def here(code: str, **environment: str) -> str:
    """Return what the code prints in this process."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        exec(code, {})
    return printed.getvalue()


NOTICE = "softdice: compiling the CPU kernel for this machine (once; it is kept for the next process)\n"
DTYPES = "".join(
    LOSS.replace(".requires_grad_()", f".to(torch.{name}).requires_grad_()") for name in ("float32", "float16")
)
LONG_SUM = """
voxels = 2**22 + 1
input = torch.full((1, 1, voxels), 0.1)
with softdice.use_backend("cpu"):
    stats = softdice.overlap_statistics(input, torch.ones(1, voxels, dtype=torch.uint8), fields=("intersection",))
print(stats.intersection.double().item() / (voxels * torch.tensor(0.1).double().item()) - 1)
"""


@pytest.fixture(scope="module")
def generic(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], subprocess.CompletedProcess[str]]:
    """Return an environment with a processor without extensions and an empty cache, and a run that compiles in it."""
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    return environment, python(DTYPES + LONG_SUM, **environment)


Generic = tuple[dict[str, str], "subprocess.CompletedProcess[str]"]


def test_a_processor_without_any_extension(generic: Generic) -> None:
    """Numba's "generic" has no conversion of half precision: code that names one aborts the process."""
    numbers = [float(number) for number in said(generic[1]).split()[:4]]
    reference = [float(number) for number in here(DTYPES, SOFTDICE_BACKEND="reference").split()]
    assert numbers == pytest.approx(reference, rel=3e-3)


def test_a_long_sum_keeps_its_digits_with_few_lanes(generic: Generic) -> None:
    """The bound of `test_many_voxels_lose_no_accuracy`: fewer lanes must not mean longer sums in each."""
    assert abs(float(said(generic[1]).split()[4])) <= 2.4e-7


def test_what_compiles_says_so_and_what_waits_does_not(generic: Generic, tmp_path: Path) -> None:
    environment, first = generic
    assert first.stderr == NOTICE  # several kernels, one line
    assert python(DTYPES + LONG_SUM, **environment).stderr == ""
    forward = LOSS[: LOSS.index("loss.backward()")]
    assert python(forward, LOCAL_RANK="1", NUMBA_CACHE_DIR=str(tmp_path)).stderr == ""


def test_numba_that_may_not_compile() -> None:
    scores = "print(softdice.dice_score(torch.tensor([0, 1]), torch.tensor([1, 1]), 2).tolist())\n"
    by_name = f"""
import os, sys
os.environ["SOFTDICE_BACKEND"] = "cpu"
try:
    exec({LOSS!r})
except RuntimeError as error:
    print(error, file=sys.stderr)
del os.environ["SOFTDICE_BACKEND"]
"""
    info = "from softdice.cli import main; main()"
    run = python(LOSS + scores + by_name + info, "info", NUMBA_DISABLE_JIT="1")
    shown = said(run)
    expected = here(LOSS, SOFTDICE_BACKEND="reference") + here("import torch, softdice\n" + scores)
    assert shown.startswith(expected)
    assert "  cpu: not on this machine: NUMBA_DISABLE_JIT=1 keeps numba from compiling" in shown
    assert "to 'cpu'" not in shown
    assert "the 'cpu' backend serves, got a case that it does not: NUMBA_DISABLE_JIT=1" in run.stderr
    assert said(python(LOSS, NUMBA_DISABLE_JIT="0")).startswith("1.")
    assert python(LOSS).stderr == ""  # kept by the process before


def test_info_promises_what_there_is() -> None:
    shown = said(python(WITHOUT + "sys.argv[1:2] = ['info']\nfrom softdice.cli import main; main()", "numba"))
    assert "  auto: all inputs go to 'reference'\n" in shown or torch.cuda.is_available()
    assert "'cpu'" not in shown
    assert "cpu: not on this machine: numba is not installed" in shown


def test_without_torchmetrics() -> None:
    code = WITHOUT + (
        "import softdice, softdice.metrics\n"
        "from softdice import *\n"
        "from softdice.metrics import *\n"
        "assert SoftDiceLoss is softdice.SoftDiceLoss and surface_dice\n"
        "print(hasattr(softdice, 'DiceScore'), hasattr(softdice.metrics, 'SurfaceDice'))\n"
        "try:\n    softdice.JaccardScore\nexcept AttributeError as error:\n    print(error)\n"
        "from softdice import DiceScore\n"
    )
    run = python(code, "torchmetrics")
    text = "expected torchmetrics to be installed, got no such package. Run: pip install 'softdice[metrics]'"
    assert run.stdout.splitlines() == ["False False", f"softdice.JaccardScore: {text}"]
    assert run.stderr.splitlines()[-1] == f"ModuleNotFoundError: softdice.DiceScore: {text}"
    assert run.stderr.count("expected torchmetrics") == 1


HINT = """
import warnings, torch, softdice
def step(*shape, **dtype):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        logits = torch.zeros(*shape, requires_grad=True, **dtype)
        softdice.SoftDiceLoss(2, activation="softmax")(logits, torch.zeros(1, *shape[2:], dtype=torch.uint8)).backward()
    print(len(told), *(str(each.message) for each in told))
step(1, 2, 2**19 - 1)
step(1, 2, 2**19, dtype=torch.float64)
step(1, 2, 2**19)
step(1, 2, 2**19)
"""
"""One element less than a hint is worth; a dtype that has no kernel anyhow; 2^20 elements, twice."""


def test_a_large_input_without_numba_is_told_once() -> None:
    silent = ["0"] * 4
    hint = (
        "1 softdice: expected numba for an input of shape (1, 2, 524288) on the CPU, got no such package. Plain "
        "PyTorch serves it: the same numbers in more time and memory. Run: pip install numba"
    )
    assert said(python(WITHOUT + HINT, "numba")).splitlines() == ["0", "0", hint, "0"]
    assert here(HINT).splitlines() == silent
    assert said(python(HINT, NUMBA_DISABLE_JIT="1")).splitlines() == silent  # whoever sets it knows


@pytest.fixture(scope="module")
def commands() -> dict[str, tuple[int, str]]:
    """Return exit code and standard error of each command, run in one process that loses more and more packages."""
    gone = {"info": "typer,rich", "score": "typer,rich", "predict": "monai", "train": "lightning,matplotlib"}
    code = f"""
import contextlib, io, json
ended = {{}}
for command, names in {gone!r}.items():
    sys.argv[1:] = [names]
    exec({WITHOUT!r}, {{}})
    sys.argv[1:] = [command]
    from softdice.cli import main
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            main()
        except SystemExit as end:
            ended[command] = end.code, error.getvalue()
print(json.dumps(ended))
"""
    return {name: tuple(end) for name, end in json.loads(said(python("import sys\n" + code))).items()}


@pytest.mark.parametrize(
    "command, names, extra",
    [
        ("train", "typer, rich, lightning, monai, matplotlib", "train"),
        ("predict", "typer, rich, monai", "train"),
        ("score", "typer, rich", "score"),
        ("info", "typer, rich", "cli"),
    ],
)
def test_a_command_names_all_that_it_misses(
    command: str, names: str, extra: str, commands: dict[str, tuple[int, str]]
) -> None:
    caller = "softdice" if command == "info" else f"softdice {command}"
    advice = f"Run: pip install 'softdice[{extra}]'"
    assert commands[command] == (2, f"{caller}: expected {names} to be installed, got no such packages. {advice}\n")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def on_meta() -> dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], tuple[int, ...]]]:
    """Return, for each public name, a callable, its arguments on the meta device, and the shape of the result."""
    input, labels = meta(2, 3, 8, 9), meta(2, 8, 9, dtype=torch.long)
    stats = softdice.overlap_statistics(input, labels)
    loss = softdice.SoftDiceLoss(3, activation="softmax", class_weight=[1, 2, 3])
    found: dict[str, Any] = {
        "dice_score": (softdice.dice_score, (labels, labels, 3), (3,)),
        "overlap_statistics": (lambda *maps: softdice.overlap_statistics(*maps).focal, (input, labels), (2, 3)),
        "OverlapStatistics": ((stats + stats).pool().__getattr__, ("voxels",), (3,)),
        "DeepSupervision": (softdice.DeepSupervision(loss, [1, 0.5]), ([input, meta(2, 3, 4, 5)], labels), ()),
        "Upsampled": (softdice.Upsampled(loss), (input, meta(2, 16, 18, dtype=torch.long)), ()),
        "FusedHead": (softdice.FusedHead(torch.nn.Conv2d(3, 3, 1, device="meta"), loss), (input, labels), ()),
        "OverlapLoss": (softdice.OverlapLoss(softdice.indices.dice, 3, reduction="none"), (input, labels), (3,)),
    }
    for cls in softdice.losses.FAMILY:
        kept = {} if issubclass(cls, softdice.CrossEntropyLoss | softdice.FocalLoss) else {"absent": "skip"}
        found[cls.__name__] = cls(3, activation="softmax", class_weight=meta(3), **kept), (input, labels), ()
    found["soft_confusion"] = partial(softdice.soft_confusion, activation="softmax"), (input, labels), (2, 3, 3)
    found["voxel_cross_entropy"] = (
        partial(softdice.voxel_cross_entropy, activation="softmax"),
        (input, labels),
        (2, 8, 9),
    )
    found["dice_confidence"] = partial(softdice.dice_confidence, activation="softmax"), (input, labels), (2, 3)
    found["dice_threshold"] = softdice.dice_threshold, (input,), (2, 3)
    for cls in softdice.losses.BEYOND:
        found[cls.__name__] = cls(3, activation="softmax"), (input, labels), ()
    for cls in softdice.losses.MAPPED:
        found[cls.__name__] = partial(cls(3, activation="softmax"), voxel_map=input), (input, labels), ()
    for loss in softdice.losses.FAMILY:
        name = f"{words(loss)}_loss"
        call = partial(
            softdice.functional.FUNCTIONS[name],
            activation="sigmoid", voxel_weight=meta(2, 8, 9), class_weight=[1, 2, 3],
        )  # fmt: skip
        found[f"functional.{name}"] = call, (input, input), ()
    for room in (softdice.indices, softdice.costs):
        functions = {
            n: f for n, f in vars(room).items() if getattr(f, "__module__", "") == room.__name__ and n[0] != "_"
        }
        apart = {"focal", "log_power", "resolve", "refuse_logarithm", "boundary", "skeleton_recall"}
        for name in functions.keys() - apart:  # they make a cost or name one, or need a map
            given = (stats.pool(), (3,)) if room is softdice.indices else (meta(3), (3,))
            wide = name in ("generalized_dice", "cross_entropy", "focal_entropy")
            found[f"{room.__name__}.{name}"] = functions[name], given[:1], (1,) if wide else (3,)
    found["softdice.reductions.reduce"] = softdice.reductions.reduce, (meta(2, 3),), ()
    for name in softdice.metrics.DISTANCES:
        more = {"tolerance": 1.0} if name == "surface_dice" else {}
        call = partial(getattr(softdice.metrics, name), num_classes=3, classes=[1, 2], **more)
        found[name] = call, (labels, labels), (2, 2)
    for name in softdice.metrics.COMPONENTS:
        found[name] = partial(getattr(softdice.metrics, name), num_classes=3), (labels, labels), (2, 3)
    for name in softdice.metrics.LESIONS:
        metric = getattr(softdice.metrics, name)(num_classes=3, average="none")
        found[name] = metric.to("meta"), (labels, labels), (3,)
    for name in {*softdice.metrics.STREAMING, *softdice.metrics.SURFACES} - {
        "OverlapMetric",
        "SurfaceMetric",
        "CaseMetric",
    }:
        more = {"tolerance": 1.0} if name == "SurfaceDice" else {}
        metric = getattr(softdice.metrics, name)(num_classes=3, average="none", ignore_index=255, **more)
        found[name] = metric.to("meta"), (input, labels), (3,)
    for name in ("DiceScore", "JaccardScore"):  # classes that overlap
        metric = getattr(softdice, name)(3, threshold=0.5, pooling="sample", average="none").to("meta")
        found[f"{name} of masks"] = metric, (input, meta(2, 3, 8, 9, dtype=torch.bool)), (3,)
    hot = meta(2, 3, 8, 9, dtype=torch.bool)
    found["dice_score of one-hot maps"] = softdice.dice_score, (hot, hot, 3), (3,)
    return found


ON_META = on_meta()


@pytest.mark.parametrize("name", sorted(ON_META))
def test_meta_tensors_have_shapes_and_no_values(name: str) -> None:
    call, given, shape = ON_META[name]
    found = call.to("meta")(*given) if isinstance(call, torch.nn.Module) else call(*given)
    assert (found.is_meta, tuple(found.shape)) == (True, shape)


def test_no_public_name_is_left_out_of_meta_tensors() -> None:
    values = {"SystemConfig", "__version__", "costs", "functional", "indices", "reductions", "setup_system"}
    assert {*softdice.__all__, *softdice.metrics.__all__} - {*ON_META, *values} == {
        "CaseMetric", "OverlapMetric", "SurfaceMetric", "distance_map", "use_backend",
    }  # fmt: skip


def test_gradients_and_weights_of_meta_tensors() -> None:
    logits = meta(2, 3, 8, 200, 200).requires_grad_()
    weight = meta(2, 8, 200, 200)
    with torch.device("meta"):
        loss = softdice.SoftDiceLoss(3, activation="softmax", absent="skip", class_weight=[1, 2, 3])
    assert "device='meta'" in repr(loss)
    for labels in (weight.long(), weight, logits.detach()):
        value = loss(logits, labels, voxel_weight=weight)
        (gradient,) = torch.autograd.grad(value, logits)
        assert (value.is_meta, gradient.is_meta, gradient.shape) == (True, True, logits.shape)


def test_a_metric_elsewhere_refuses_meta_tensors() -> None:
    labels = meta(2, 8, 9, dtype=torch.long)
    for metric in (softdice.DiceScore(3), softdice.metrics.HausdorffDistance(3)):
        with pytest.raises(ValueError, match=r"\.update: expected input on cpu like metric, got meta\. Move it: "):
            metric.update(labels, labels)
    with pytest.raises(ValueError, match="dice_score: expected target on cpu like prediction, got meta"):
        softdice.dice_score(torch.zeros(2, 8, 9, dtype=torch.long), labels, 3)


def test_xpu_and_rocm_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(route, "_HAS_TRITON", True)
    words = "; ".join(route.automatic())
    assert "'triton'" not in words
    assert "ROCm inputs go to 'reference', since no kernel is checked there" in words
    assert "XPU inputs go to 'reference'" in words
    assert route.kernel_backends()["triton"] == "the kernels are not checked on ROCm"
