"""Upsampling and the loss: error, peak memory and time, fused and one after the other, and with MONAI's loss.

    python -m benchmarks.upsampled           all of it, into benchmarks/results/upsampled.csv and docs/upsampled.png
    python -m benchmarks.upsampled --quick   fewer repetitions

Dice and cross-entropy, float32, forward and backward, from logits of low resolution to labels of full resolution. Needs
the extras of `softdice[train]`.

Error: of the loss relative to float64, and of the gradient relative to its largest element, on the first sample.
Memory: peak beyond logits and gradient, both of low resolution, measured as in `benchmarks.head`; in multiples of the
full-resolution logits. Time: the best of several steps, the paths taking turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import softdice
from benchmarks import pictures, publish
from benchmarks.head import peak_mib

Shapes = tuple[tuple[int, ...], tuple[int, ...], str]

CASES: dict[str, Shapes] = {
    "150 classes, 128 x 128 to 512 x 512": ((2, 150, 128, 128), (512, 512), "bilinear"),
    "21 classes, 64 x 64 to 512 x 512": ((8, 21, 64, 64), (512, 512), "bilinear"),
    "14 classes, 48^3 to 96^3": ((1, 14, 48, 48, 48), (96, 96, 96), "trilinear"),
}
NAMES = {
    "monai": "interpolate + cross_entropy + MONAI DiceLoss",
    "separate": "interpolate + SoftDiceLoss + CrossEntropyLoss",
    "fused": "Upsampled(SoftDiceLoss + CrossEntropyLoss)",
}


def setup(case: Shapes) -> tuple[Tensor, Tensor, dict[str, Callable[[Tensor, Tensor], Tensor]]]:
    """Shapes -> low logits, labels, and for each path what computes its loss."""
    from monai.losses import DiceLoss

    shape, size, mode = case
    torch.manual_seed(0)
    logits, labels = torch.randn(shape, requires_grad=True), torch.randint(shape[1], (shape[0], *size))
    loss = softdice.SoftDiceLoss(shape[1], activation="softmax", cost="one_minus")
    loss = loss + softdice.CrossEntropyLoss(shape[1], activation="softmax")
    peer, upsampled = DiceLoss(softmax=True, to_onehot_y=True, batch=True), softdice.Upsampled(loss, mode=mode)

    def monai(x: Tensor, y: Tensor) -> Tensor:
        full = interpolate(x, size, mode=mode)
        return cross_entropy(full, y) + peer(full, y.unsqueeze(1))

    paths = {"monai": monai, "separate": lambda x, y: loss(interpolate(x, size, mode=mode), y), "fused": upsampled}
    return logits, labels, paths


def errors(case: Shapes) -> dict[str, tuple[float, float]]:
    """Shapes -> of each path of ours the error of the loss and of the gradient."""
    shape, *rest = case
    logits, labels, paths = setup(((1, *shape[1:]), *rest))
    exact_logits = logits.detach().double().requires_grad_()
    exact = paths["separate"](exact_logits, labels)
    (truth,) = torch.autograd.grad(exact, exact_logits)
    found = {}
    for name in ("separate", "fused"):
        value = paths[name](logits, labels)
        (grad,) = torch.autograd.grad(value, logits)
        found[name] = abs(value.item() / exact.item() - 1), float((grad - truth).abs().max() / truth.abs().max())
    return found


def times_ms(case: Shapes, repetitions: int) -> dict[str, float]:
    """Shapes -> the best time of a step on each path."""
    logits, labels, paths = setup(case)
    best = dict.fromkeys(paths, float("inf"))
    for repetition in range(repetitions + 1):
        for name, path in paths.items():
            logits.grad = None
            start = time.perf_counter()
            path(logits, labels).backward()
            elapsed = 1000 * (time.perf_counter() - start)
            best[name] = best[name] if repetition == 0 else min(best[name], elapsed)
    return best


def memory_mib(case: str) -> dict[str, float]:
    """Name of a case -> peak MiB of each path; runs in a process of its own."""
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "SOFTDICE_REUSE_GRADIENT": "0"}
    environment = {**os.environ, **given_back}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.upsampled", "--memory", case],
        env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    return json.loads(run.stdout)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw peak memory and time of a step, of each path and case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    order = ["fused", "separate", "monai"]
    titles = [NAMES[name].replace(" + ", "\n+ ", 1) for name in order]
    panels = {"peak_mib": "peak memory of a step, MiB", "time_ms": "time of a step, ms"}
    for axis, (column, what) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        values = [[next(r[column] for r in rows if (r["case"], r["path"]) == (c, n)) for n in order] for c in CASES]
        pictures.dots(axis, list(CASES), titles, values, f"{what} (log axis)")
    figure.suptitle("Upsampling, Dice and cross-entropy, forward and backward, float32, CPU")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.memory:
        logits, labels, paths = setup(CASES[chosen.memory])
        peaks = {}
        for name, path in paths.items():
            peaks[name] = peak_mib(logits, lambda path=path: path(logits, labels))  # type: ignore[misc]
            gc.collect()
        print(json.dumps(peaks))
        return
    rows: list[dict[str, Any]] = []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, case in CASES.items():
        shape, size, _ = case
        full_mib = 4 * shape[0] * shape[1] * torch.Size(size).numel() / 2**20
        found, best, peaks = errors(case), times_ms(case, 2 if chosen.quick else 5), memory_mib(name)
        print(f"\n{name}, batch {shape[0]}: {full_mib:.0f} MiB of logits at full resolution")
        for path, title in NAMES.items():
            loss_error, gradient_error = found.get(path, ("", ""))
            rows.append(
                {
                    "case": name, "path": path, "time_ms": round(best[path], 1), "peak_mib": round(peaks[path], 1),
                    "peak_of_logits": round(peaks[path] / full_mib, 4),
                    "loss_error": loss_error, "gradient_error": gradient_error,
                }
            )  # fmt: skip
            error = f", error of loss {loss_error:.1e}, of gradient {gradient_error:.1e}" if path in found else ""
            print(
                f"  {best[path]:7.0f} ms, {peaks[path]:7.1f} MiB = {peaks[path] / full_mib:.3f} of them{error}: {title}"
            )
        ratios = ", ".join(f"{best['fused'] / best[path]:.2f} x {NAMES[path]}" for path in ("separate", "monai"))
        print(f"  fused takes {ratios}")
    publish.keep("upsampled", rows)
    plot(rows, publish.DOCS / "upsampled.png")


if __name__ == "__main__":
    main()
