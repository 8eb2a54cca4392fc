"""`make dist`: the wheel and the sdist are built, hold what they should, and run where nothing else is installed.

Every environment that this needs is made under build/dist, from the standard library alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "dist"
DIST = ROOT / "dist"
NOT_IN_THE_SDIST = (".ci/", ".github/")
"""What only a repository has a use for."""

FENCE = re.compile(r"^(?<!-->\n)```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""A program of README; not one under `<!-- needs: ... -->`, which the tests run where every extra is."""
COMMAND = "import sys\nfrom softdice.cli import main\nsys.argv = ['softdice', *{!r}.split()]\nmain()\n"
PAIRS = """
import numpy as np, pathlib
for part in ("images", "labels", "masks"):
    pathlib.Path(part).mkdir()
    for number in range(3):
        array = np.eye(16, dtype=np.uint8) if part != "images" else np.random.default_rng(number).normal(size=(16, 16))
        np.save(f"{part}/{number}.npy", array)
"""

BARE = """
import importlib.util, softdice
for package in ("numba", "torchmetrics", "scipy", "PIL", "nibabel", "typer", "rich", "monai", "matplotlib"):
    assert importlib.util.find_spec(package) is None, package
from softdice import *
assert not hasattr(softdice, "DiceScore")
"""

SMOKE = {
    "lesions": """
import torch
from softdice.metrics import centreline_dice, lesion_dice
masks = torch.eye(5, dtype=torch.uint8)[None]
for score in (lesion_dice, centreline_dice):
    assert score(masks, masks, num_classes=1).item() == 1
""",
    "cpu": """
import torch, softdice
logits, labels = torch.randn(1, 3, 64, 64, 4), torch.randint(0, 3, (1, 64, 64, 4))
loss = softdice.SoftDiceLoss(3, activation="softmax")
with softdice.use_backend("cpu"):
    fast = loss(logits, labels)
with softdice.use_backend("reference"):
    assert torch.isclose(fast, loss(logits, labels))
""",
    "metrics": """
import torch, softdice
from softdice.metrics import hausdorff_distance
eye = torch.eye(8, dtype=torch.long)[None]
metric = softdice.DiceScore(num_classes=2)
metric.update(eye, eye)
assert metric.compute() == 1
assert hausdorff_distance(eye, eye, num_classes=2).max() == 0
""",
    "images": """
import nibabel, numpy as np, tifffile, PIL.Image
from softdice.images.files import read_image
array = np.arange(12, dtype=np.uint8).reshape(3, 4)
PIL.Image.fromarray(array).save("a.png")
tifffile.imwrite("a.tif", array)
nibabel.Nifti1Image(array[..., None], np.eye(4)).to_filename("a.nii.gz")
assert all(read_image(name).array.size == 12 for name in ("a.png", "a.tif", "a.nii.gz"))
""",
    "itk": """
import numpy as np, SimpleITK
from softdice.images.files import read_image
SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.ones((3, 4, 5), np.uint8)), "a.nrrd")
assert read_image("a.nrrd").array.size == 60
import highdicom.seg, pydicom.data
liver = pydicom.dcmread(pydicom.data.get_testdata_file("liver_1frame.dcm", download=False))
del liver.PerFrameFunctionalGroupsSequence[1:]  # it has one frame of three, and the places of all
liver.save_as("liver.dcm")
assert read_image("liver.dcm").array.sum() == 36233
""",
    "cli": COMMAND.format("check"),
    "score": PAIRS + COMMAND.format("score masks labels --report report.html"),
    "train": PAIRS + COMMAND.format("train . --out run --max-steps 2 --patch 16"),
    "all": """
import importlib, pkgutil, softdice
from softdice import *
from softdice.training.brain import brain_cases
for module in pkgutil.walk_packages(softdice.__path__, "softdice."):
    if not any(part in module.name for part in (".cuda", ".mmseg", "__main__")):  # Triton, MMSegmentation: of no extra
        importlib.import_module(module.name)
assert DiceScore is softdice.DiceScore and brain_cases(0.2)
""",
}
"""Extra -> a program that needs all of it."""


def step(text: str) -> None:
    print(f"{time.monotonic() - START:5.0f} s  {text}", flush=True)


def run(*command: object, cwd: Path = ROOT, show: bool = False, **environment: str) -> str:
    """Run a command and return what it printed; where it fails, exit with what it printed."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, text=True, env=os.environ | environment, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\ndist: expected exit code 0, got {done.returncode} from {' '.join(map(str, command))}")
    if show:
        print(done.stdout, end="")
    return done.stdout


def environment(
    name: str, *packages: object, over: str | None = None, constraints: Path = ROOT / "constraints.txt"
) -> Path:
    """Return the Python of a new environment with these packages; over: it sees the packages of that one, too."""
    python = bare(name)
    if over is not None:
        (site,) = site_packages(over)
        (mine,) = site_packages(name)
        (mine / "below.pth").write_text(f"{site}\n")
    options = ("-qq", "--no-compile", "-c", constraints)  # errors, and no warnings of pip about itself
    run(pip(), "-m", "pip", "--python", python, "install", *options, *packages)
    return python


def bare(name: str, with_pip: bool = False) -> Path:
    """Return the Python of a new environment without any package."""
    folder = WORK / name
    venv.create(folder, with_pip=with_pip, clear=True, symlinks=os.name != "nt")
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@cache
def pip() -> Path:
    """Return the Python of an environment whose pip installs into others: a pip in each would take minutes."""
    python = bare("pip", with_pip=True)
    run(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--upgrade", "pip")
    return python


def site_packages(name: str) -> list[Path]:
    return [
        path for path in (WORK / name).rglob("site-packages") if path.parent.name.lower().startswith(("python", "lib"))
    ]


def built() -> tuple[Path, Path]:
    """Build and return the sdist, and the wheel from the sdist."""
    shutil.rmtree(DIST, ignore_errors=True)
    tools = environment("tools", "build", "twine")
    run(tools, "-m", "build", "--outdir", DIST)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    run(tools, "-m", "twine", "check", "--strict", sdist, wheel, NO_COLOR="1")
    return sdist, wheel


def check_contents(sdist: Path) -> None:
    """Check that the sdist holds every file that git keeps, for `make test`, and that the changelog has the version."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    if (ROOT / ".git").exists():
        kept = run("git", "ls-files").splitlines()
        lost = [name for name in kept if name not in held and not name.startswith(NOT_IN_THE_SDIST)]
        if lost:
            sys.exit(
                f"dist: expected all that git keeps in the sdist, got none of {', '.join(lost)}. See pyproject.toml."
            )
    version = sdist.name.removeprefix("softdice-").removesuffix(".tar.gz")
    if not re.search(
        rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    ):
        sys.exit(f"dist: expected '## {version} (date)' in CHANGELOG.md, got none. Write what is new.")


def execute(python: Path, name: str, code: str) -> None:
    """Run a program in an empty folder."""
    folder = WORK / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "program.py").write_text(code)
    run(python, "program.py", cwd=folder, PYTHONPATH="", MPLBACKEND="agg")


def main() -> None:
    sdist, wheel = built()
    check_contents(sdist)
    step(f"built and checked: {sdist.name}, {wheel.name}")
    alone = environment("alone", wheel)
    execute(alone, "alone", BARE)
    readme = "\n".join(FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    execute(alone, "readme", "import warnings; warnings.simplefilter('error')\n" + readme)
    step("the wheel without extras: README's programs run")
    for extra, program in SMOKE.items():
        execute(environment(extra, f"{wheel}[{extra}]", over="alone"), extra, program)
        step(f"softdice[{extra}] runs")
        shutil.rmtree(WORK / extra)


START = time.monotonic()
if __name__ == "__main__":
    main()
