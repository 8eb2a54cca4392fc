"""What `softdice train` reaches in minutes: `python -m benchmarks.runs [--data NAME ...] [--seed N ...] [--show]`.

Whole runs as a user starts them, with nothing given but the minutes and the seed: the machine as it is decides about
width, patch, batch and threads. Of each: Dice on the held-out cases, steps, validations, the time beside what was asked
for, and the plan. Rows go into results/runs.csv and are not measured again on the same machine; when none is missing,
the table goes between the marks in docs/training.md. Nothing else should run beside it: all twelve take 42 minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure, publish
from benchmarks.training import PAGE, SEEDS, linked, spread
from softdice.training import TrainConfig, train

MARKS = "<!-- benchmark: runs -->", "<!-- end of benchmark: runs -->"


class Run(NamedTuple):
    """Minutes, and how many images of the data set at most; of the brain all."""

    minutes: float
    most: int | None = None


RUNS = {"nuclei": Run(3, 60), "hippocampus": Run(5, 60), "chase_db1": Run(3), "brain": Run(3)}
KEY = ("data", "seed", "minutes", "machine")


def run(name: str, seed: int, minutes: float, machine: str) -> dict[str, Any]:
    """One run -> its row."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        folder.mkdir()
        data = None if name == "brain" else str(linked(name, folder, RUNS[name].most))
        started = time.monotonic()
        summary = train(
            TrainConfig(data=data, out=str(Path(scratch) / "out"), max_minutes=minutes, seed=seed), started=started
        )
        took_s = time.monotonic() - started
    return {
        "data": name,
        "seed": seed,
        "minutes": minutes,
        "dice": summary["mean_dice"],
        "steps": summary["steps_done"],
        "validations": summary["epochs_done"],
        "time_of_asked": took_s / (60 * minutes),
        "held_out": len(summary["held_out"]),
        "plan": summary["plan"],
        "machine": machine,
    }


def extent(values: Sequence[float], form: str = "g") -> str:
    """Numbers of the seeds -> the lowest to the highest."""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one machine -> Markdown."""
    lines = [
        f"`python -m benchmarks.runs` on {rows[0]['machine']}: Dice on held-out cases, mean ± standard deviation of "
        "the seeds, the rest lowest to highest; the plan is that of the first seed.",
        "",
        "| data | minutes | Dice | steps | validations | time / asked | plan |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RUNS:
        found = [row for row in rows if row["data"] == name]
        if found:
            columns = {c: [row[c] for row in found] for c in ("dice", "steps", "validations", "time_of_asked")}
            lines.append(
                f"| {name} | {found[0]['minutes']:g} | {spread(columns['dice'])} | {extent(columns['steps'])} | "
                f"{extent(columns['validations'])} | {extent(columns['time_of_asked'], '.2f')} | {found[0]['plan']} |"
            )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seed", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--minutes", type=float, help="of every run, for a trial: the page is then left as it is")
    parser.add_argument("--show", action="store_true", help="measure nothing, show what there is")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peers'
    machine = measure.machine()
    print(machine)
    minutes = {name: asked.minutes or chosen.minutes for name, chosen in RUNS.items()}

    def missing(data: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        done = {tuple(row[name] for name in KEY) for row in publish.kept("runs")}
        return [(d, seed) for d in data for seed in seeds if (d, seed, minutes[d], machine) not in done]

    for name, seed in () if asked.show else missing(asked.data, asked.seed):
        row = run(name, seed, minutes[name], machine)
        publish.add("runs", row)
        print(*(f"{column} {value}" for column, value in row.items() if column != "machine"), sep="  ", flush=True)
    shown = [
        row for row in publish.kept("runs") if row["machine"] == machine and row["minutes"] == minutes[row["data"]]
    ]
    if not shown:
        print("Nothing is measured for these minutes on this machine.")
        return
    text = table(shown)
    print(text)
    if lacking := missing(list(RUNS), SEEDS):
        print(f"{PAGE.name} is left as it is: {len(lacking)} runs are missing.")
    elif not asked.minutes:
        publish.show(text, PAGE, MARKS)


if __name__ == "__main__":
    main()
