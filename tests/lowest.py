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
    "threads", "head_module", "metrics", "files", "images_faults", "images_place", "images_matrix", "images_writers",
    "cli", "training_step", "environments",
)  # fmt: skip
"""What meets other packages, and the core; not their numbers against peers, which the pinned versions have."""

CHOOSE = "-m uv pip compile -q --no-header --no-annotate --resolution lowest-direct --only-binary :all: --extra all"


def lines(versions: dict[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in versions.items())


def pinned_torch() -> str:
    """Return the version of torch in constraints.txt."""
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    return pinned[1]


def lowest() -> dict[str, str]:
    """Return, for each package that pyproject.toml names, the oldest release that it allows with this Python."""
    resolver = environment("resolver", "uv")

    def chosen(*options: str) -> dict[str, str]:
        text = run(resolver, *CHOOSE.split(), *options, "--python", resolver, ROOT / "pyproject.toml")
        return dict(line.split("==") for line in text.split())

    named, alone = chosen("--no-deps"), ROOT / "build" / "alone.txt"
    alone.write_text(lines(named))
    try:
        whole = chosen("--constraint", str(alone))
    except SystemExit:  # the oldest release of one package does not go with the oldest of another
        whole = chosen()
    found = {name: whole[name] for name in named}
    if os.environ.get("TORCH") != "floor":
        found["torch"] = pinned_torch()
    return found


def main() -> None:
    oldest = lowest()
    step("installing " + ", ".join(f"{name} {version}" for name, version in oldest.items()))
    path = ROOT / "build" / "floors.txt"
    path.write_text(lines(oldest))
    python = environment("lowest", "-e", f"{ROOT}[all]", "pytest", "hypothesis", "mpmath", constraints=path)
    step(f"Python {sys.version.partition(' ')[0]}: the tests")
    # what old releases warn of is not ours to mend
    words = [python, "-m", "pytest", "-q", "-W", "default", "--disable-warnings", "-p", "no:cacheprovider"]
    sys.exit(subprocess.run([*words, *(f"tests/test_{name}.py" for name in TESTS)], cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
