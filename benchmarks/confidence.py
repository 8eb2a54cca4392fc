"""Whether a confidence ranks masks, and which cut is best, on real data: `python -m benchmarks.confidence`.

For every data set, loss and seed a small network is trained for so many seconds of one thread, as `benchmarks.training`
does, with 40 % of the cases held out. On all of these the confidence of the argmax is ranked against its Dice
coefficient. One threshold is tuned on one half of them, and the cuts are compared on the other. A class of a case is
one observation; the background is none.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from scipy.stats import spearmanr
from torch import Tensor, nn

import softdice
from benchmarks import measure, training
from softdice.training.cases import Cases
from softdice.training.evaluate import WINDOW_OVERLAP, WINDOWS_AT_ONCE
from softdice.training.plan import choose_batch, choose_patch

HELD_OUT = 0.4
LOSSES = "ce", training.DEFAULT
GRID = np.arange(0.1, 0.91, 0.02)
"""Thresholds that are tried."""


class Observation(NamedTuple):
    """A class of a case: its Dice coefficients by the way to cut, what ranks it, and those of `GRID`."""

    dice: dict[str, float]
    confidence: dict[str, float]
    grid: np.ndarray


@torch.no_grad()
def observed(network: nn.Module, cases: Cases, number: int, patch: tuple[int, ...]) -> list[Observation]:
    """Return the observations of a case, one for each class that is in the reference or the prediction."""
    case = cases[number]
    image = torch.from_numpy(case.image)[None]
    logits = sliding_window_inference(image, patch, WINDOWS_AT_ONCE, network, WINDOW_OVERLAP, mode="gaussian")
    assert isinstance(logits, Tensor)
    p, labels = logits.softmax(1), logits.argmax(1)
    floored, published = (softdice.dice_confidence(p, labels, floor=floor)[0] for floor in (0.1, 0.0))
    thresholds, most = softdice.dice_threshold(p)[0], p.amax(1)[0]
    truth = torch.from_numpy(case.label)
    rows = []
    for c in range(1, p.shape[1]):
        true, mask = truth == c, labels[0] == c
        if not (true.any() or mask.any()):
            continue

        def dice(mask: Tensor, true: Tensor = true) -> float:
            return float(2 * (mask & true).sum() / (mask.sum() + true.sum()))

        inside = mask if mask.any() else torch.ones_like(mask)
        rows.append(
            Observation(
                {"argmax": dice(mask), "dice_threshold": dice(p[0, c] > thresholds[c])},
                {
                    "floor 0.1": float(floored[c].nan_to_num(0)),
                    "as published": float(published[c].nan_to_num(0)),
                    "mean p in the mask": float(p[0, c][inside].mean()),
                    "mean of the largest p": float(most.mean()),
                },
                np.array([dice(p[0, c] > cut) for cut in GRID]),
            )
        )
    return rows


def run(name: str, loss: str, seed: int, seconds: float, cases: Cases) -> dict[str, float]:
    """Train and observe once: rank correlations over all held-out cases, mean Dice over the second half."""
    order = np.random.default_rng([seed, 0]).permutation(len(cases)).tolist()
    held_out, inside = order[: round(HELD_OUT * len(order))], order[round(HELD_OUT * len(order)) :]
    patch = choose_patch([cases.shapes[number] for number in inside], training.DATA[name].patch, False)
    batch = choose_batch(patch, None, False)
    network, _ = training.trained(cases, inside, training.LOSSES[loss], patch, batch, seed, seconds)
    halves = [
        [row for number in half for row in observed(network, cases, number, patch)]
        for half in (held_out[::2], held_out[1::2])
    ]
    rows = halves[0] + halves[1]
    truth = [row.dice["argmax"] for row in rows]
    result = {
        f"rank: {rank}": float(spearmanr([row.confidence[rank] for row in rows], truth).statistic)
        for rank in rows[0].confidence
    }
    tuned = int(np.mean([row.grid for row in halves[0]], 0).argmax())
    test = halves[1]
    result |= {f"Dice: {cut}": float(np.mean([row.dice[cut] for row in test])) for cut in test[0].dice}
    result["Dice: tuned threshold"] = float(np.mean([row.grid[tuned] for row in test]))
    result["tuned threshold"] = float(GRID[tuned])
    return result


def main() -> None:
    """Print a table for each data set: mean over the seeds, and each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", nargs="+", default=[*LOSSES], choices=[*training.LOSSES])
    parser.add_argument("--data", nargs="+", default=["nuclei", "hippocampus"], choices=[*training.DATA])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=30)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(measure.machine(), f"{chosen.seconds:g} s", flush=True)
    for name in chosen.data:
        cases = training.read(name)
        for loss in chosen.loss:
            runs = [run(name, loss, seed, chosen.seconds, cases) for seed in chosen.seeds]
            print(f"\n{name}, {training.LOSSES[loss].title}, {len(cases)} cases")
            for key in runs[0]:
                values = [each[key] for each in runs]
                print(
                    f"  {key:30} {np.mean(values):7.4f}   " + " ".join(f"{value:7.4f}" for value in values), flush=True
                )


if __name__ == "__main__":
    main()
