"""Time, bandwidth, memory and error on a GPU: `make bench-gpu`, or `python -m benchmarks.gpu [--quick]`.

Softmax and a Dice over the batch, bfloat16 and float32 logits, int64 labels (softdice with uint8 too), forward and
backward; every contender eager and under `torch.compile`; and Dice + cross-entropy beside nnU-Net's, with its Dice
compiled as nnU-Net's trainer does it. Beside our eager steps stands what `benchmarks.gpu_model` predicts for the card.

Time: CUDA events around each step, medians over rounds in which all contenders take turns in shuffled order; before
each step a buffer larger than the L2 cache is written, outside the timed part, so that no contender finds its inputs
there. Bandwidth: 3 S + 2 L bytes for S bytes of logits and L of labels, which is the least that a step can move, over
the time; beside it that of a device copy, measured in the same run. Memory: `torch.cuda.max_memory_allocated` beyond
the inputs. Error: as in `benchmarks.measure`. Writes results/gpu.csv, docs/gpu.png and the table in docs/kernels.md.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import isnan, nan
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import gpu_model, losses, measure, peers, pictures, publish
from benchmarks.peers import Loss

DOCUMENT = publish.DOCS / "kernels.md"
MARKS = "<!-- benchmark: gpu -->", "<!-- end of benchmark -->"
SHAPES = [(4, 2, 2048, 2048), (8, 4, 1024, 1024), (2, 14, 108, 108, 108), (1, 118, 68, 68, 68)]
QUICK = [(2, 4, 256, 256)]
DTYPES = (torch.bfloat16, torch.float32)
FLUSH_BYTES = 1 << 28
ROUNDS = 30
DEVICE = "cuda"


@dataclass
class Row:
    """One contender on one workload."""

    shape: str
    dtype: str
    contender: str
    mode: str
    median_ms: float
    low_ms: float
    high_ms: float
    gb_per_s: float
    of_copy: float  # bandwidth / that of a device copy
    loss_error: float
    gradient_error: float
    peak_logits: float  # memory beyond the inputs, in multiples of the logits
    predicted_ms: float  # nan where the model has no such card or contender


def nnunet_with_cross_entropy(C: int, compiled: bool) -> Loss:
    """nnU-Net DC_and_CE_loss; compiled as its trainer does it: `loss.dc = torch.compile(loss.dc)`."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    settings = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(settings, {}, dice_class=MemoryEfficientSoftDiceLoss)
    if compiled:
        loss.dc = torch.compile(loss.dc)
    return lambda logits, labels: loss(logits, labels.unsqueeze(1))


Contender = tuple[Callable[[int], Loss], torch.dtype]


def contenders() -> dict[tuple[str, str], Contender]:
    """() -> (name, mode) -> (loss of C classes, label dtype)."""
    have, lack = peers.available()
    known: dict[tuple[str, str], Contender] = {}
    for name, dtype in (("softdice", torch.int64), ("softdice uint8", torch.uint8)):
        known[name, "eager"] = (peers.ours, dtype)
    known["softdice", "compiled"] = (_compiled(peers.ours), torch.int64)
    known["softdice Dice + CE", "eager"] = (peers.ours_with_cross_entropy, torch.int64)
    for name, make in have.items():
        known[name, "eager"] = (make, torch.int64)
        known[name, "compiled"] = (_compiled(make), torch.int64)
    if "nnU-Net" in have:
        for mode in ("eager", "compiled"):
            make = partial(nnunet_with_cross_entropy, compiled=mode == "compiled")
            known["nnU-Net Dice + CE", mode] = (make, torch.int64)
    for name, why in lack.items():
        print(f"missing: {name}: {why}")
    return known


def _compiled(make: Callable[[int], Loss]) -> Callable[[int], Loss]:
    return lambda C: torch.compile(make(C))


def event_ms(function: Callable[[], object], flush: Tensor) -> float:
    """Milliseconds on the device, with nothing of the inputs in its cache."""
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = function()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end)


def interleaved(turns: dict[str, Callable[[], object]], logits: Tensor) -> dict[str, measure.Time]:
    """name -> function, taking turns in shuffled order -> times."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=logits.device)
    taken: dict[str, list[float]] = {name: [] for name in turns}
    shuffle = random.Random(0).sample
    for turn in range(ROUNDS + 3):
        for name, function in shuffle(list(turns.items()), len(turns)):
            logits.grad = None
            elapsed_ms = event_ms(function, flush)
            if turn >= 3:
                taken[name].append(elapsed_ms)
    return {name: measure._summary([value / 1e3 for value in values]) for name, values in taken.items()}


def peak_bytes(loss: Loss, logits: Tensor, labels: Tensor) -> int:
    """Most memory allocated during a step beyond what was there before it."""
    logits.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    measure.step(loss, logits, labels)
    peak = torch.cuda.max_memory_allocated() - before
    logits.grad = None
    return peak


def twin(name: str, C: int) -> Loss:
    """The same loss for float64 logits: softdice's by its definition, a peer's by itself, never compiled."""
    if name == "nnU-Net Dice + CE":
        return nnunet_with_cross_entropy(C, compiled=False)
    if name.startswith("softdice"):
        return losses.exact("softdice", peers.ours_with_cross_entropy if "CE" in name else peers.ours)(C)
    return peers.PEERS[name](C)


def prediction_ms(name: str, mode: str, loss: Loss, logits: Tensor, label: torch.dtype) -> float:
    """Return what the model says of a step on the device at hand; nan for compiled steps, peers and unknown cards."""
    if mode != "eager" or not name.startswith("softdice"):
        return nan
    device = torch.cuda.get_device_name()
    predicted = gpu_model.predicted_ms(loss, tuple(logits.shape), logits.dtype, label, device)
    return nan if predicted is None else predicted


def run(shapes: list[tuple[int, ...]], dtypes: tuple[torch.dtype, ...], compile: bool) -> list[Row]:
    """workloads -> rows."""
    rows: list[Row] = []
    known = {key: value for key, value in contenders().items() if compile or key[1] == "eager"}
    for shape in shapes:
        for dtype in dtypes:
            rows += workload(shape, dtype, known)
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    return rows


def workload(shape: tuple[int, ...], dtype: torch.dtype, known: dict[tuple[str, str], Contender]) -> list[Row]:
    """One shape and dtype -> a row for each contender."""
    C = shape[1]
    wide, labels = losses.inputs(shape)
    logits = wide.detach().to(DEVICE, dtype).requires_grad_()
    by_dtype = {torch.int64: labels.to(DEVICE), torch.uint8: labels.to(DEVICE, torch.uint8)}
    ready: dict[tuple[str, str], tuple[Loss, Tensor]] = {}
    for (name, mode), (make, label) in known.items():
        if not (name == "seed's loop" and (mode == "compiled" and losses.UNROLLED < C)):
            ready[name, mode] = (make(C), by_dtype[label])
    turns: dict[str, Callable[[], object]] = {"copy": logits.detach().clone}
    for (name, mode), (loss, target) in ready.items():
        turns[f"{name}|{mode}"] = partial(measure.step, loss, logits, target)
    times = interleaved(turns, logits)
    size = logits.numel() * logits.element_size()
    copy_gb_per_s = 2 * size / times["copy"].median_ms / 1e6
    print(f"\n{shape} {dtype}: copy {copy_gb_per_s:.0f} GB/s", flush=True)
    rows = []
    for (name, mode), (loss, target) in ready.items():
        time = times[f"{name}|{mode}"]
        speed = (3 * size + 2 * target.numel() * target.element_size()) / time.median_ms / 1e6
        off = measure.error(loss, twin(name, C), logits, target)
        peak = peak_bytes(loss, logits, target) / size
        predicted = prediction_ms(name, mode, loss, logits, target.dtype)
        row = Row(
            str(shape), str(dtype).removeprefix("torch."), name, mode, *time, speed, speed / copy_gb_per_s, *off, peak,
            predicted,
        )  # fmt: skip
        rows.append(row)
        print(
            f"  {name:20} {mode:9} {row.median_ms:8.3f} ms ({row.low_ms:.3f} to {row.high_ms:.3f}){beside(row)}  "
            f"{speed:7.0f} GB/s = {row.of_copy:.2f} x copy  error {row.loss_error:.1e} / {row.gradient_error:.1e}  "
            f"memory {peak:.2f} x logits",
            flush=True,
        )
    return rows


def beside(row: Row) -> str:
    """Return the prediction in brackets, or nothing where there is none."""
    return "" if isnan(row.predicted_ms) else f" (predicted {row.predicted_ms:.3f})"


def table(rows: list[Row]) -> str:
    """rows -> the Markdown table of docs/kernels.md."""
    columns = list(dict.fromkeys((row.shape, row.dtype) for row in rows))
    found = {(row.shape, row.dtype, row.contender, row.mode): row for row in rows}
    lines = [
        f"`make bench-gpu` on {torch.cuda.get_device_name()}, torch {torch.__version__}; forward + backward, "
        "milliseconds (and [predicted](gpu_model.md) ones), bandwidth in multiples of a device copy's, peak memory "
        "beyond the inputs in multiples of the logits:",
        "",
        "| | " + " | ".join(f"`{shape}` {dtype}" for shape, dtype in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, mode in dict.fromkeys((row.contender, row.mode) for row in rows):
        cells = []
        for column in columns:
            row = found.get((*column, name, mode))
            figures = row and f"{row.median_ms:.3f}{beside(row)}, {row.of_copy:.2f}, {row.peak_logits:.2f}"
            cells.append(figures or "not run")
        label = f"**{name}**" if name.startswith("softdice") else name
        lines.append(f"| {label}{' compiled' if mode == 'compiled' else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Draw the share of the copy's bandwidth on each workload, the better mode of each contender."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((row.shape, row.dtype) for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    best = [
        [
            max((r.of_copy for r in rows if (r.shape, r.dtype) == c and r.contender == name), default=0.0)
            for name in names
        ]
        for c in columns
    ]
    figure = Figure(figsize=(10, 1 + 0.2 * (len(names) + 1) * len(columns)), layout="constrained")
    axis = figure.subplots()
    groups = [f"logits {shape}, {dtype}" for shape, dtype in columns]
    titles = [losses.label(name) for name in names]
    pictures.bars(axis, groups, titles, best, "(3 S + 2 L) / time / bandwidth of a copy")
    figure.savefig(path, dpi=110)


def write(rows: list[Row]) -> None:
    """rows -> results/gpu.csv, docs/gpu.png, the table in docs/kernels.md."""
    publish.keep("gpu", [asdict(row) for row in rows])
    plot(rows, publish.DOCS / "gpu.png")
    publish.show(table(rows), DOCUMENT, MARKS)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small workload, eager only, nothing written")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: expected a CUDA device, got none. Run it on a machine with a GPU and a CUDA torch.")
    warnings.filterwarnings("ignore")  # the peers'
    logging.getLogger("torch").setLevel(logging.ERROR)
    rows = run(QUICK if options.quick else SHAPES, DTYPES, compile=not options.quick)
    if not options.quick:
        write(rows)
        print("\n" + table(rows))


if __name__ == "__main__":
    main()
