"""The package as a whole: what an import costs, which module may import which, and that nothing is missing here."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS, LONG, SLOW

import softdice
from softdice import internals
from softdice.backends import route

PACKAGE = Path(softdice.__file__).parent
OWN_MODULES, FOREIGN_MODULES = 47, 5
"""Bounds on the modules of this package, and on those of others than torch, that `import softdice` loads."""

ORDER = (
    "version", "interrupt", "internals", "validation", "statistics.declared", "statistics.request",
    "statistics.reference", "statistics.check", "statistics.sliced", "parallel", "backends", "statistics", "indices",
    "costs", "reductions", "losses", "functional", "head", "metrics", "decisions_kernel", "decisions",
    "reproducibility", "images", "compat", "evaluation", "scoring", "training", "cli", "__main__", "__init__",
)  # fmt: skip
"""A module or subpackage imports only from what stands before it; within a subpackage the order is free."""
APART = {"training": "scoring"}
"""Rooms that stand above another one and yet do not use it: what both need lies in a room below both."""

PUBLIC = (
    "SoftDiceLoss", "OverlapLoss", "OverlapStatistics", "overlap_statistics", "SystemConfig", "setup_system",
    "use_backend", "indices", "costs", "reductions", "functional", "JaccardLoss", "TverskyLoss", "FocalTverskyLoss",
    "GeneralizedDiceLoss", "MCCLoss", "SquaredDiceLoss", "DiceSemimetricLoss", "JaccardMetricLoss", "CrossEntropyLoss",
    "FocalLoss", "BoundaryLoss", "SkeletonRecallLoss", "distance_map", "soft_confusion", "WassersteinDiceLoss",
    "MultiClassMCCLoss", "ClDiceLoss",
)  # fmt: skip

EXTRAS = (
    "numba", "torchmetrics", "monai", "lightning", "pytorch_lightning", "nibabel", "PIL", "tifffile", "typer", "rich",
    "matplotlib", "nilearn", "scipy", "SimpleITK", "highdicom", "pydicom", "kornia", "nnunetv2", "pandas", "cc3d",
    "skimage",
)  # fmt: skip

IMPORT_SCRIPT = """
import json, sys
import torch
before = set(sys.modules)
import softdice
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def imported() -> list[str]:
    """Return the modules that `import softdice` brings after `import torch`."""
    run = subprocess.run([sys.executable, "-c", IMPORT_SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_import_is_cheap(imported: list[str]) -> None:
    """Counted, since a time depends on the machine and on who else uses it."""
    foreign = [name for name in imported if name.partition(".")[0] != "softdice"]
    assert len(imported) - len(foreign) <= OWN_MODULES, imported
    assert len(foreign) <= FOREIGN_MODULES, foreign


def test_import_brings_no_extra(imported: list[str]) -> None:
    brought = {name.partition(".")[0] for name in imported}
    assert "softdice" in brought
    assert brought.isdisjoint(EXTRAS)


def room(module: str) -> str:
    """Return the place of a module in ORDER: its own, or that of the folder that it is in."""
    while module not in ORDER and "." in module:
        module = module.rpartition(".")[0]
    return module


def group(path: Path) -> str:
    return room(".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"))


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(node: ast.AST) -> Iterator[str]:
    """Yield the softdice modules that the code imports, at the top or inside a function, but not for typing alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.split(".")[0] == "softdice")
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute here"
            if child.module == "softdice":
                yield from (f"softdice.{alias.name}" for alias in child.names)
            elif child.module is not None and child.module.startswith("softdice."):
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child)


def test_contributing_lists_the_rooms_in_their_order() -> None:
    text = (PACKAGE.parent.parent / "CONTRIBUTING.md").read_text()
    table = re.search(r"^\| room \| what it holds \|\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None, "CONTRIBUTING has no table of rooms"
    listed = re.findall(r"^\| `([a-z_]+)` \| .+ \|$", table.group(1), re.MULTILINE)
    rooms = dict.fromkeys(name.partition(".")[0] for name in ORDER if not name.startswith("__"))
    assert listed == [*rooms]


def test_every_module_has_a_place_in_the_order() -> None:
    unplaced = {group(path) for path in sources()} - set(ORDER)
    assert not unplaced, f"put {sorted(unplaced)} into ORDER, where they belong"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_above(path: Path) -> None:
    mine = ORDER.index(group(path))
    # the commands, and what trains, use the public names as everyone does
    public_is_above = mine > ORDER.index("reproducibility")
    for name in imports(ast.parse(path.read_text())):
        part = room(name.partition(".")[2])  # "" for a plain `import softdice`
        assert part != APART.get(group(path)), f"{path.name}: {name}"
        if part in ORDER:
            assert ORDER.index(part) < mine or (part == group(path) and path.parent != PACKAGE), f"{path.name}: {name}"
        else:
            assert public_is_above, f"{path.name} takes {part} from the package itself"
            assert part in [*softdice.__all__, ""]


def test_public_names() -> None:
    for name in PUBLIC:
        assert name in softdice.__all__
    for name in softdice.__all__:
        assert getattr(softdice, name) is not None
    assert softdice.__all__ == sorted(softdice.__all__)
    assert softdice.functional.soft_dice_loss.__module__ == "softdice.functional"


def test_torch_still_has_the_private_names_that_internals_uses() -> None:
    """Each of `softdice.internals`, on its own: a release of torch that takes one away fails here, by name."""
    assert internals.observed() is False
    with torch.profiler.profile():
        assert internals.observed() is True
    assert internals.active_transform() is None
    seen: list[object] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.extend((internals.active_transform(), type(internals.unwrapped(x)), internals.unwrapped(x) is x))
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    assert seen == ["a torch.func transform is active", torch.Tensor, False]
    with torch.autograd.forward_ad.dual_level():
        assert internals.active_transform() == "forward-mode differentiation is active"
    assert internals.tracing() is False
    x = torch.ones(2, requires_grad=True)
    with internals.below_autograd():
        assert not (x * 2).requires_grad
        with internals.recording():
            assert (x * 2).requires_grad


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").read_bytes() == b""


@pytest.mark.parametrize(
    "module",
    [
        "numba", "nibabel", "PIL", "tifffile", "torchmetrics", "lightning", "monai", "matplotlib", "nilearn", "typer",
        "rich", "scipy", "SimpleITK", "highdicom", "medpy", "nnunetv2.training.loss.dice", "kornia.losses", "cc3d",
        "skimage.morphology", "panoptica", "exacta",
    ],
)  # fmt: skip
def test_everything_that_tests_need_is_here(module: str) -> None:
    """`make test` installs all of it. Elsewhere a part that is missing may skip a test; here it fails, once."""
    importlib.import_module(module)


def test_every_kernel_that_this_machine_can_run_is_tested() -> None:
    missing = route.kernel_backends()
    for name in BACKENDS:
        assert name == "reference" or missing[name] is None, missing[name]
    assert set(route.NAMES) == {"auto", "reference", *missing}


def test_what_make_quick_leaves_out_is_there() -> None:
    files = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert {*SLOW, *LONG} <= files


def test_what_make_test_leaves_out_has_a_target() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    left_out = re.search(r'\$\(PYTEST\) -m "(not \w+(?: and not \w+)*)"', makefile)
    assert left_out is not None
    for marker in left_out[1].replace("not ", "").split(" and "):
        assert re.search(rf"^test-{marker}:.*(\n\t.*)*? -m {marker}\b", makefile, re.MULTILINE)
