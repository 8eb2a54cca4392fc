"""Time and memory of the hard Dice coefficient of many classes, against the peers and against reading the arrays.

    python -m benchmarks.scores            117 classes, 512 x 512 x 512 uint8; writes results/scores.csv, docs/scores.md
    python -m benchmarks.scores --size 256

Two pairs of label maps: "organs" (117 ellipsoids on a background, the prediction shifted by two voxels: labels in runs,
as segmentations have them) and "noise" (every voxel drawn by itself: the worst case). Peers that cannot take the full
size in memory run on a smaller one; then ours is timed on that too and the ratio is of the same size. Each result is
first compared with ours. Ours and reading take turns, and their times are medians; against the peers, and where the
prediction lies in Fortran order (as NIfTI files are read), times are the best of the repetitions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import Tensor

from benchmarks import publish
from benchmarks.measure import machine
from softdice.metrics.formulas import dice_score

MARKS = "<!-- benchmark: scores -->", "<!-- end of benchmark -->"
NAMES = ("maps", "contender", "side_voxels", "time_ms", "softdice_ms", "softdice_grown_mib")

CLASSES = 118  # with the background


def organs(size: int) -> tuple[Tensor, Tensor]:
    """Label maps of 117 ellipsoids, and the same shifted by two voxels."""
    rng = np.random.default_rng(0)
    target = np.zeros((size, size, size), np.uint8)
    for label in range(1, CLASSES):
        radius = rng.uniform(0.02, 0.12, 3) * size
        centre = rng.uniform(0.12, 0.88, 3) * size
        box = [slice(max(0, int(c - r)), int(c + r) + 1) for c, r in zip(centre, radius, strict=True)]
        axes = np.ogrid[tuple(box)]
        inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radius, strict=True)) <= 1
        target[tuple(box)][inside[tuple(slice(n) for n in target[tuple(box)].shape)]] = label
    return torch.from_numpy(np.roll(target, 2, (0, 1, 2))), torch.from_numpy(target)


def noise(size: int) -> tuple[Tensor, Tensor]:
    """Label maps without any structure, a fifth of the voxels different."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, CLASSES, (size, size, size), np.uint8)
    prediction = target.copy()
    wrong = rng.random(target.shape, np.float32) < 0.2
    prediction[wrong] = rng.integers(0, CLASSES, int(wrong.sum()), np.uint8)
    return torch.from_numpy(prediction), torch.from_numpy(target)


@njit(nogil=True)
def _exclusive_or(words: np.ndarray) -> np.uint64:
    result = np.uint64(0)
    for i in range(words.size):
        result ^= words[i]
    return result


def read(prediction: Tensor, target: Tensor) -> None:
    """Every byte of both arrays, once, with the same number of threads: nothing that looks at them can be faster."""
    threads = torch.get_num_threads()
    parts = [
        part for t in (prediction, target) for part in np.array_split(t.numpy().reshape(-1).view(np.uint64), threads)
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_exclusive_or, parts))


def copy(prediction: Tensor, target: Tensor) -> None:
    """Both arrays copied by torch, for scale."""
    prediction.clone()
    target.clone()


def ours(prediction: Tensor, target: Tensor) -> Tensor:
    return dice_score(prediction, target, CLASSES)


def numpy_loop(prediction: Tensor, target: Tensor) -> Tensor:
    p, t = prediction.numpy(), target.numpy()
    scores = []
    for label in range(CLASSES):
        in_p, in_t = p == label, t == label
        total = np.count_nonzero(in_p) + np.count_nonzero(in_t)
        scores.append(2 * np.count_nonzero(in_p & in_t) / total if total else np.nan)
    return torch.tensor(scores)


def monai_metric(prediction: Tensor, target: Tensor) -> Tensor:
    from monai.metrics import DiceHelper

    measure = DiceHelper(num_classes=CLASSES, include_background=True, reduction="none", get_not_nans=False)
    return measure(prediction[None, None], target[None, None])[0]


def torchmetrics_dice(prediction: Tensor, target: Tensor) -> Tensor:
    from torchmetrics.segmentation import DiceScore

    metric = DiceScore(CLASSES, average="none", input_format="index")
    return metric(prediction[None].long(), target[None].long())


def torchmetrics_f1(prediction: Tensor, target: Tensor) -> Tensor:
    from torchmetrics.functional.classification import multiclass_f1_score

    return multiclass_f1_score(prediction.reshape(-1), target.reshape(-1), CLASSES, average="none", validate_args=False)


def exacta_dice(prediction: Tensor, target: Tensor) -> Tensor:
    from exacta import functional

    return functional.dice(prediction[None], target[None], num_classes=CLASSES, include_background=True)[0]


def best_ms(run: Callable[[Tensor, Tensor], object], pair: tuple[Tensor, Tensor], repeat: int) -> float:
    """Best of some repetitions; `run` has run before."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run(*pair)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def peak_mib(run: Callable[[Tensor, Tensor], object], pair: tuple[Tensor, Tensor]) -> float:
    """Memory of the process beyond what it held before, at its peak (Linux: the kernel's own high-water mark)."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the mark back
    before = status("VmRSS")
    run(*pair)
    return (status("VmHWM") - before) / 1024


def table(rows: list[tuple[str, str, int, float, float, float | str]]) -> str:
    """rows -> Markdown."""
    lines = [
        f"`python -m benchmarks.scores` on {machine()}: {CLASSES - 1} classes and background, uint8.",
        "",
        "| label maps | side | | ms | softdice, ms | its memory grew by, MiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {side} | {who} | {time_ms:.1f} | {our_ms:.1f} | {mib if mib == '' else f'{mib:.0f}'} |"
        for name, who, side, time_ms, our_ms, mib in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    ours(*organs(64))  # compiled before memory is looked at
    print(f"{CLASSES - 1} classes and background, {arguments.size}^3 uint8, {torch.get_num_threads()} threads")
    rows = []
    for name, make in (("organs", organs), ("noise", noise)):
        pair = make(arguments.size)
        grown_mib = peak_mib(ours, pair)
        read(*pair)
        turns = [[best_ms(run, pair, 1) for run in (ours, read, copy)] for _ in range(4 * arguments.repeat)]
        time_ms, read_ms, copy_ms = np.median(turns, 0)
        rows += [
            (name, "softdice", arguments.size, time_ms, time_ms, grown_mib),
            (name, "reading both arrays", arguments.size, read_ms, time_ms, ""),
            (name, "copying both arrays", arguments.size, copy_ms, time_ms, ""),
        ]
        print(
            f"\n{name}: softdice {time_ms:.1f} ms; reading both {read_ms:.1f} ms, {time_ms / read_ms:.1f} x;", end=" "
        )
        print(f"copying both {copy_ms:.1f} ms; peak memory grew by {grown_mib:.0f} MiB")
        turned = pair[0].permute(2, 1, 0).contiguous().permute(2, 1, 0)
        grown_mib, turned_ms = peak_mib(ours, (turned, pair[1])), best_ms(ours, (turned, pair[1]), arguments.repeat)
        print(f"  prediction in Fortran order: softdice {turned_ms:.1f} ms; peak memory grew by {grown_mib:.0f} MiB")
        rows.append((name, "softdice, prediction in Fortran order", arguments.size, turned_ms, turned_ms, grown_mib))
        del turned
        for label, peer, part in (
            ("NumPy, class by class", numpy_loop, 2),
            ("MONAI DiceHelper", monai_metric, 4),
            ("exacta", exacta_dice, 2),
            ("torchmetrics F1 (bincount)", torchmetrics_f1, 2),
            ("torchmetrics DiceScore (one-hot)", torchmetrics_dice, 4),
        ):
            size = arguments.size // part
            small = make(size)
            expected, got = ours(*small), peer(*small).double().reshape(-1)
            known = ~expected.isnan()
            torch.testing.assert_close(got[known], expected[known], rtol=0, atol=1e-6)
            peer_ms, our_ms = best_ms(peer, small, arguments.repeat if size > 128 else 1), best_ms(ours, small, 5)
            rows.append((name, label, size, peer_ms, our_ms, ""))
            print(f"  {label:<34} {size}^3: {peer_ms:9.1f} ms, softdice {our_ms:7.1f} ms, {peer_ms / our_ms:7.1f} x")
    if arguments.size == 512:
        publish.keep("scores", [dict(zip(NAMES, row, strict=True)) for row in rows])
        publish.show(table(rows), publish.DOCS / "scores.md", MARKS)


if __name__ == "__main__":
    main()
