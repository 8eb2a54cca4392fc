"""`make test-lowest`: the oldest releases that pyproject.toml allows, in an environment of their own, and tests there.

The oldest that this Python can have without compiling them: newer ones for a newer Python. torch is the one of
constraints.txt, unless TORCH=floor is in the environment: not every machine can have an old one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from distribution import ROOT, environment, run, step

TESTS = (
    "statistics", "losses", "loss_objects", "functional", "edge_cases", "indices", "reference", "validation", "kernels",
    "threads", "head_module", "metrics", "files", "images_faults", "cli", "training_step", "environments",
)  # fmt: skip
"""What meets other packages, and the core; not their numbers against peers, which the pinned versions have."""

CHOOSE = "-m uv pip compile -q --no-header --no-annotate --resolution lowest-direct --only-binary :all: --extra all"


def lowest() -> str:
    """() -> the oldest releases that users of this Python may have, "name==version" line by line."""
    tools, torch = environment("resolver", "uv"), ROOT / "build" / "torch.txt"
    pinned = re.search(r"^torch==.+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    torch.write_text("" if os.environ.get("TORCH") == "floor" else pinned[0])
    return run(tools, *CHOOSE.split(), "--python", tools, "--constraint", torch, ROOT / "pyproject.toml")


def main() -> None:
    oldest = lowest()
    named = re.findall(r'"([\w-]+)>=', (ROOT / "pyproject.toml").read_text(encoding="utf-8").lower())
    step("installing " + ", ".join(line for line in oldest.split() if line.partition("==")[0] in named))
    path = ROOT / "build" / "floors.txt"
    path.write_text(oldest)
    python = environment("lowest", "-e", f"{ROOT}[all]", "pytest", "hypothesis", "mpmath", constraints=path)
    step(f"Python {sys.version.partition(' ')[0]}: the tests")
    # what old releases warn of is not ours to mend
    words = [python, "-m", "pytest", "-q", "-W", "default", "--disable-warnings", "-p", "no:cacheprovider"]
    sys.exit(subprocess.run([*words, *(f"tests/test_{name}.py" for name in TESTS)], cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
