"""The last convolution and the loss: peak memory and time, fused and one after the other, and with MONAI's loss.

    python -m benchmarks.head           all of it, into benchmarks/results/head.csv and docs/head.png
    python -m benchmarks.head --quick   fewer classes and repetitions

K = 32 features on 96^3 voxels, float32, forward and backward. Needs the extras of `softdice[train]`.

Memory: peak resident memory during a step, less what is resident before it with features, weight and their gradients
in place (Linux: VmHWM, reset before each step, less VmRSS). It is measured in a process of its own in which every block
over 64 KiB is given back to the system when freed, so that nothing hides in the allocator. Time: the best of several
steps, the paths taking turns.
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
from torch import Tensor, nn

import softdice
from benchmarks import pictures, publish
from softdice.head import FusedHead

FEATURES, SIDE = 32, 96
HUGE_CLASSES, HUGE_SIDE = 1000, 128
NAMES = {"monai": "conv + MONAI DiceLoss", "separate": "conv + SoftDiceLoss", "fused": "FusedHead"}


def setup(classes: int, side: int) -> tuple[Tensor, Tensor, dict[str, Callable[[], Tensor]]]:
    """Classes, side -> features, labels, and for each path what computes its loss."""
    from monai.losses import DiceLoss

    torch.manual_seed(0)
    conv = nn.Conv3d(FEATURES, classes, kernel_size=1)
    features = torch.randn(1, FEATURES, side, side, side, requires_grad=True)
    labels = torch.randint(classes, (1, side, side, side))
    loss, peer = softdice.SoftDiceLoss(classes, activation="softmax"), DiceLoss(softmax=True, to_onehot_y=True)
    head = FusedHead(conv, loss)
    paths: dict[str, Callable[[], Tensor]] = {
        "monai": lambda: peer(conv(features), labels.unsqueeze(1)),
        "separate": lambda: loss(conv(features), labels),
        "fused": lambda: head(features, labels),
    }
    return features, labels, paths


def status_mib(field: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def peak_mib(features: Tensor, path: Callable[[], Tensor]) -> float:
    """One step -> MiB beyond features, weight and their gradients."""
    path().backward()  # compiles, and makes the gradients
    gc.collect()
    before = status_mib("VmRSS")
    features.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    path().backward()
    return status_mib("VmHWM") - before


def memory(jobs: list[tuple[int, int, str]]) -> list[float]:
    """(classes, side, path) -> peak MiB of each; runs in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.head", "--memory", json.dumps(jobs)],
        env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    return [float(line) for line in run.stdout.splitlines() if line]


def times_ms(classes: int, repetitions: int) -> dict[str, float]:
    """Classes -> the best time of a step on each path."""
    features, _, paths = setup(classes, SIDE)
    best = dict.fromkeys(paths, float("inf"))
    for repetition in range(repetitions + 1):
        for name, path in paths.items():
            features.grad = None
            start = time.perf_counter()
            path().backward()
            elapsed = 1000 * (time.perf_counter() - start)
            best[name] = best[name] if repetition == 0 else min(best[name], elapsed)
    return best


def huge() -> dict[str, Any]:
    """One step with 1000 classes on 128^3 voxels, where the logits alone are 8 GB."""
    torch.manual_seed(0)
    conv = nn.Conv3d(FEATURES, HUGE_CLASSES, kernel_size=1)
    features = torch.randn(1, FEATURES, HUGE_SIDE, HUGE_SIDE, HUGE_SIDE, requires_grad=True)
    labels = torch.randint(HUGE_CLASSES, (1, HUGE_SIDE, HUGE_SIDE, HUGE_SIDE))
    head = FusedHead(conv, softdice.SoftDiceLoss(HUGE_CLASSES, activation="softmax"))
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    head(features, labels).backward()
    return {"time_ms": 1000 * (time.perf_counter() - start), "process_mib": status_mib("VmHWM")}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw peak memory against classes, and the time of a step where it was taken."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    classes = sorted({row["classes"] for row in rows})
    marks = {"monai": ("o", 0.94), "separate": ("s", 1.06), "fused": ("o", 1.0)}  # equal figures stand side by side
    for name, title in NAMES.items():
        sign, aside = marks[name]
        shade = pictures.colour(title)
        heights = [row["peak_mib"] for row in rows if row["path"] == name]
        left.plot([c * aside for c in classes], heights, sign, color=shade, label=title,
                  markerfacecolor="white" if name == "separate" else shade)  # fmt: skip
    left.plot(classes, [c * SIDE**3 * 4 / 2**20 for c in classes], "k:", label="the logits themselves")
    left.set(xscale="log", yscale="log", xlabel="classes (log axis)")
    left.set_ylabel("peak memory of a step beside gradients, MiB (log axis)", fontsize=9)
    left.set_xticks(classes, [str(c) for c in classes])
    left.minorticks_off()
    left.set_ylim(1, None)
    left.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8)
    timed = sorted({row["classes"] for row in rows if row["time_ms"]})
    order = ["fused", "separate", "monai"]
    times = [[next(r["time_ms"] for r in rows if (r["classes"], r["path"]) == (c, n)) for n in order] for c in timed]
    groups = [f"{c} classes" for c in timed]
    pictures.dots(right, groups, [NAMES[name] for name in order], times, "time of a step, ms (log axis)")
    figure.suptitle(f"The last convolution ({FEATURES} features) and the Dice loss on {SIDE}³ voxels, float32, CPU")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer classes and repetitions")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--huge", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.memory:
        for classes, side, path in json.loads(chosen.memory):
            features, _, paths = setup(classes, side)
            print(peak_mib(features, paths[path]), flush=True)
            del features, paths
            gc.collect()
        return
    if chosen.huge:
        print(json.dumps(huge()))
        return

    classes = (2, 14, 118) if chosen.quick else (2, 4, 8, 14, 32, 64, 118)
    timed = {c: times_ms(c, 2 if chosen.quick else 5) for c in (14, 118)}
    jobs = [(c, SIDE, name) for c in classes for name in NAMES]
    rows = [
        {
            "classes": c, "voxels": side**3, "features": FEATURES, "path": name, "peak_mib": round(peak, 1),
            "peak_of_logits": round(peak / (c * side**3 * 4 / 2**20), 4),
            "time_ms": round(timed[c][name], 1) if c in timed else "",
        }
        for (c, side, name), peak in zip(jobs, memory(jobs), strict=True)
    ]  # fmt: skip
    publish.keep("head", rows)
    plot(rows, publish.DOCS / "head.png")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items() if name not in ("voxels", "features")))
    for c, best in timed.items():
        ratios = ", ".join(f"{best['fused'] / best[name]:.2f} x {NAMES[name]}" for name in ("separate", "monai"))
        print(f"{c} classes: fused takes {ratios}")
    run = [sys.executable, "-m", "benchmarks.head", "--huge"]
    result = json.loads(subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(
        f"{HUGE_CLASSES} classes on {HUGE_SIDE}^3: a step in {result['time_ms'] / 1000:.1f} s, the whole process in "
        f"{result['process_mib'] / 1024:.2f} GiB (the logits would be {HUGE_CLASSES * HUGE_SIDE**3 * 4 / 2**30:.1f})"
    )


if __name__ == "__main__":
    main()
