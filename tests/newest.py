"""`make test-newest`: the newest releases of everything, in an environment of their own, and the test suite there.

torch is the one of constraints.txt, unless TORCH=newest is in the environment. The libraries that losses and scores are
compared with stay as pinned: their numbers are what those tests are about. Warnings are errors, as in `make test`.
Arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys

from distribution import ROOT, environment, pip, run, step
from lowest import lines, pinned_torch

LEFT_OUT = ("scoring_browser", "pipelines")
"""Tests with targets and environments of their own."""

WORDS = ("-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def main() -> None:
    path = ROOT / "build" / "newest.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("" if os.environ.get("TORCH") == "newest" else lines({"torch": pinned_torch()}))
    step("installing the newest releases")
    python = environment("newest", "-e", f"{ROOT}[dev]", constraints=path)
    peers = ROOT / "constraints-peers.txt"
    run(pip(), "-m", "pip", "--python", python, "install", "-qq", "--no-compile", "--no-deps", "-r", peers)
    run(python, "-m", "softdice", "info", show=True)
    step("the tests")
    words = [python, "-m", "pytest", *WORDS, "-m", "not peers and not triton"]
    words += [f"--ignore=tests/test_{name}.py" for name in LEFT_OUT]
    sys.exit(subprocess.run([*words, *sys.argv[1:]], cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
