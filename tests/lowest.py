"""`make test-lowest`: the oldest releases that pyproject.toml allows, in an environment of their own, and tests there.

torch is the one of constraints.txt, unless TORCH=floor is in the environment: not every machine can have an old one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from distribution import ROOT, environment, step

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

FLOOR = re.compile(r"([\w-]+)>=([\w.]+)")
NOT_FOR_USERS = ("docs", "dev")
TESTS = (
    "statistics", "losses", "loss_objects", "indices", "reference", "validation", "kernels", "threads", "head_module",
    "metrics", "files", "images_faults", "cli", "training_step", "environments",
)  # fmt: skip
"""What meets other packages, and the core; not their numbers against peers, which the pinned versions have."""


def floors() -> dict[str, str]:
    """() -> package: the oldest release that users may have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(extras[extra] for extra in extras if extra not in NOT_FOR_USERS)]
    found = dict(match.groups() for names in lists for name in names if (match := FLOOR.match(name)))
    if os.environ.get("TORCH") != "floor":
        pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        assert pinned is not None
        found["torch"] = pinned[1]
    return found


def main() -> None:
    oldest = floors()
    step("installing " + ", ".join(f"{name} {version}" for name, version in oldest.items()))
    path = ROOT / "build" / "floors.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{name}=={version}\n" for name, version in oldest.items()))
    python = environment("lowest", "-e", f"{ROOT}[all]", "pytest", "hypothesis", "mpmath", constraints=path)
    step(f"Python {sys.version.partition(' ')[0]}: the tests")
    # what old releases warn of is not ours to mend
    words = [python, "-m", "pytest", "-q", "-W", "default", "--disable-warnings", "-p", "no:cacheprovider"]
    sys.exit(subprocess.run([*words, *(f"tests/test_{name}.py" for name in TESTS)], cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
