"""Time, memory and error of softdice and its peers: `make bench`, or `python -m benchmarks.losses [--eager | --quick]`.

softmax and a Dice over the batch, float32 logits, int64 labels (softdice with uint8 too), forward and backward; every
contender eager and under `torch.compile`. `benchmarks.measure` says how. Writes results/losses.csv, docs/losses.png
the table between the marks in docs/kernels.md and the summary in README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import softdice
from benchmarks import measure, peers, pictures, publish, summary
from benchmarks.peers import Loss

PAGE = publish.DOCS / "kernels.md"
MARKS = "<!-- benchmark: losses -->", "<!-- end of benchmark -->"
WORKLOADS = [(8, 3, 512, 512), (8, 12, 360, 480), (2, 14, 96, 96, 96), (1, 118, 80, 80, 80)]
QUICK = [(2, 3, 128, 128), (1, 14, 32, 32, 32)]
UNROLLED = 32  # the seed's loop is not compiled beyond so many classes: the compiler unrolls it for minutes


@dataclass
class Row:
    """One contender on one workload."""

    shape: str
    contender: str
    mode: str
    median_ms: float
    low_ms: float
    high_ms: float
    times_floor: float
    fresh_ms: float  # the floor where the gradient goes into fresh memory
    loss_error: float
    gradient_error: float
    forward_logits: float  # memory beyond the inputs, in multiples of the logits
    saved_logits: float
    backward_logits: float


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """shape (B, C, *S) -> logits with a gradient, labels (B, *S)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).requires_grad_()
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    return logits, labels.to(dtype)


def exact(name: str, make: Callable[[int], Loss]) -> Callable[[int], Loss]:
    """The float64 twin of a contender: softdice's is its definition, a peer's is itself."""

    def twin(C: int) -> Loss:
        loss = make(C)
        if not name.startswith("softdice"):
            return loss

        def reference(logits: Tensor, labels: Tensor) -> Tensor:
            with softdice.use_backend("reference"):
                return loss(logits, labels)

        return reference

    return twin


def contenders() -> tuple[dict[str, tuple[Callable[[int], Loss], torch.dtype]], dict[str, str]]:
    """() -> name -> (loss of C classes, label dtype), and the peers that are missing."""
    have, lack = peers.available()
    ours = {"softdice": (peers.ours, torch.int64), "softdice uint8": (peers.ours, torch.uint8)}
    return ours | {name: (make, torch.int64) for name, make in have.items()}, lack


def memory_of(name: str, shape: tuple[int, ...]) -> measure.Memory:
    """Peak memory, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.losses", "--memory-of", name, "--shape", json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return measure.Memory(*json.loads(done.stdout.splitlines()[-1]))


def run(shapes: list[tuple[int, ...]], budget_s: float, compile: bool) -> list[Row]:
    """workloads -> rows."""
    rows = []
    known, _ = contenders()
    for shape in shapes:
        losses: dict[tuple[str, str], tuple[Loss, Tensor]] = {}
        logits, labels = inputs(shape)
        by_dtype = {torch.int64: labels, torch.uint8: labels.to(torch.uint8)}
        for name, (make, dtype) in known.items():
            losses[name, "eager"] = (make(shape[1]), by_dtype[dtype])
            if compile and not (name == "seed's loop" and shape[1] > UNROLLED):
                losses[name, "compiled"] = (torch.compile(make(shape[1])), by_dtype[dtype])
        turns: dict[str, Callable[[], object]] = {"floor": measure.floor(logits), "fresh": measure.fresh(logits)}
        for (name, mode), (loss, target) in losses.items():
            turns[f"{name}|{mode}"] = partial(measure.step, loss, logits, target)
        times = measure.interleaved(turns, logits, budget_s)
        floor, fresh = times["floor"].median_ms, times["fresh"].median_ms
        print(f"\n{shape}: floor {floor:.1f} ms, {fresh:.1f} into fresh memory", flush=True)
        for (name, mode), (loss, target) in losses.items():
            time = times[f"{name}|{mode}"]
            off = measure.error(loss, exact(name, known[name][0])(shape[1]), logits, target)
            size = logits.numel() * logits.element_size()
            used = memory_of(name, shape) if mode == "eager" else measure.Memory(0, 0, 0)
            beyond = [value / size if mode == "eager" else float("nan") for value in used]
            row = Row(str(shape), name, mode, *time, time.median_ms / floor, fresh, *off, *beyond)
            rows.append(row)
            print(
                f"  {name:16} {mode:9} {row.median_ms:8.1f} ms ({row.low_ms:.1f} to {row.high_ms:.1f})  "
                f"{row.times_floor:6.2f} x floor  error {row.loss_error:.1e} / {row.gradient_error:.1e}  "
                f"memory {row.forward_logits:.2f} / {row.saved_logits:.2f} / {row.backward_logits:.2f} x logits",
                flush=True,
            )
        logits.grad = None
        torch._dynamo.reset()
    return rows


def label(contender: str) -> str:
    """Return how pages name a contender."""
    return contender.replace("seed's loop", "a loop over the classes")


def table(rows: list[Row], lack: dict[str, str]) -> str:
    """rows -> the Markdown table of the page on kernels."""
    command = "make bench" if any(row.mode == "compiled" for row in rows) else "python -m benchmarks.losses --eager"
    shapes = list(dict.fromkeys(row.shape for row in rows))
    modes = list(dict.fromkeys((row.contender, row.mode) for row in rows))
    found = {(row.shape, row.contender, row.mode): row for row in rows}
    lines = [
        f"`{command}` on {measure.machine()}; forward + backward, float32 logits, int64 labels unless said; "
        "time in multiples of the floor, peak memory beyond the inputs in multiples of the logits:",
        "",
        "| | " + " | ".join(f"`{shape}`" for shape in shapes) + " |",
        "|---" * (len(shapes) + 1) + "|",
    ]
    for name, mode in modes:
        cells = []
        for shape in shapes:
            row = found.get((shape, name, mode))
            if row is None:
                cells.append("not compiled")
            elif mode == "eager":
                cells.append(f"{row.times_floor:.2f}, memory {row.backward_logits:.2f}")
            else:
                cells.append(f"{row.times_floor:.2f}")
        head = f"**{name}**" if name.startswith("softdice") else label(name)
        lines.append(f"| {head}{' compiled' if mode == 'compiled' else ''} | " + " | ".join(cells) + " |")
    firsts = [next(row for row in rows if row.shape == shape) for shape in shapes]
    lines.append("| floor | " + " | ".join(f"{row.median_ms / row.times_floor:.1f} ms" for row in firsts) + " |")
    lines.append("| floor into fresh memory | " + " | ".join(f"{row.fresh_ms:.1f} ms" for row in firsts) + " |")
    if lack:
        lines += ["", "Missing on that machine: " + ", ".join(f"{name} ({why})" for name, why in lack.items()) + "."]
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Draw time and memory of each eager contender, workload by workload."""
    from matplotlib.figure import Figure

    names = [name for name in dict.fromkeys(row.contender for row in rows) if name != "softdice uint8"]
    shapes = list(dict.fromkeys(row.shape for row in rows))
    found = {(row.shape, row.contender): row for row in rows if row.mode == "eager"}
    groups = [f"logits {shape}" for shape in shapes]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    times = [[found[shape, name].median_ms for name in names] for shape in shapes]
    memory = [[found[shape, name].backward_logits for name in names] for shape in shapes]
    titles = [label(name) for name in names]
    pictures.dots(left, groups, titles, times, "time of a step, ms (log axis)")
    pictures.bars(right, groups, titles, memory, "peak memory beside the inputs, in multiples of the logits")
    figure.suptitle("A softmax and a Dice loss, forward and backward, on a CPU, eager")
    figure.savefig(path, dpi=110)


def write(rows: list[Row], lack: dict[str, str]) -> None:
    """rows -> results/losses.csv, docs/losses.png, the table of the page on kernels, README's summary."""
    publish.keep("losses", [asdict(row) for row in rows])
    plot(rows, publish.DOCS / "losses.png")
    publish.show(table(rows, lack), PAGE, MARKS)
    summary.write()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small workloads, eager only, nothing written")
    parser.add_argument("--eager", action="store_true", help="leave the compiled contenders out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peers'
    logging.getLogger("torch").setLevel(logging.ERROR)
    known, lack = contenders()
    if options.memory_of:
        measure.prepare_memory()
        shape = tuple(json.loads(options.shape))
        make, dtype = known[options.memory_of]
        print(json.dumps(measure.memory(make(shape[1]), *inputs(shape, dtype))))
        return
    print(measure.machine())
    for name, why in lack.items():
        print(f"missing: {name}: {why}")
    if options.quick:
        run(QUICK, 2.0, compile=False)
        return
    rows = run(WORKLOADS, 10.0, compile=not options.eager)
    write(rows, lack)
    print("\n" + table(rows, lack))


if __name__ == "__main__":
    main()
