"""Whether a confidence ranks masks, and which cut is best, on real data: `python -m benchmarks.confidence`.

For every data set, loss and seed a small network is trained for so many seconds of one thread, as `benchmarks.training`
does, with 40 % of the cases held out. On all of these the confidence of the argmax is ranked against its Dice
coefficient; a class of a case is one observation, and the background is none. `softdice train`'s thresholds are tuned
on one half of them, and the ways to cut are compared on the other, by the mean Dice over cases and classes, where a
class that is neither there nor predicted counts as 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import softdice
from benchmarks import measure, training
from softdice.training.brain import brain_cases
from softdice.training.cases import Cases, split
from softdice.training.decision import cut, dice_by_threshold, dice_of, tuned
from softdice.training.evaluate import case_logits, count
from softdice.training.plan import choose_batch, choose_patch

HELD_OUT = 0.4
LOSSES = "ce", training.DEFAULT
BRAIN = "brain"
"""The slices of `softdice train` without data, whose blocks are held out."""


class Observation(NamedTuple):
    """A class of a case: the Dice coefficient of the argmax, and what ranks it."""

    dice: float
    confidence: dict[str, float]


class Held(NamedTuple):
    """A held-out case: observations, mean Dice by each threshold, and how any class numbers of it score."""

    rows: list[Observation]
    by_threshold: np.ndarray
    logits: Tensor
    score: Callable[[Tensor], float]


@torch.no_grad()
def observed(network: nn.Module, cases: Cases, number: int, patch: tuple[int, ...]) -> Held:
    """Return a case as the network sees it."""
    logits, true = case_logits(network, cases[number], patch, torch.device("cpu"))
    p, labels = logits[None].softmax(1), logits[None].argmax(1)
    floored, published = (softdice.dice_confidence(p, labels, floor=floor)[0] for floor in (0.1, 0.0))
    both, prediction, there = count(labels[0], true, cases).tolist()
    rows = []
    for c in range(1, p.shape[1]):
        if prediction[c] + there[c]:
            inside = labels[0] == c if prediction[c] else torch.ones_like(labels[0], dtype=torch.bool)
            confidence = {
                "floor 0.1": float(floored[c].nan_to_num(0)),
                "as published": float(published[c].nan_to_num(0)),
                "mean p in the mask": float(p[0, c][inside].mean()),
                "mean of the largest p": float(p.amax(1).mean()),
            }
            rows.append(Observation(2 * both[c] / (prediction[c] + there[c]), confidence))

    def score(labels: Tensor) -> float:
        return float(dice_of(count(labels, true, cases)))

    return Held(rows, dice_by_threshold(logits, true, cases.ignore_index), logits, score)


def by_expected_dice(logits: Tensor) -> Tensor:
    """Return class numbers with the thresholds of `softdice.dice_threshold`: the likeliest class above its own."""
    p = logits.softmax(0)
    above = p > softdice.dice_threshold(p[None])[0].view(-1, *[1] * (p.ndim - 1))
    above[0] = False
    return torch.where(above.any(0), torch.where(above, p, -1.0).argmax(0), 0)


def run(name: str, loss: str, seed: int, seconds: float, cases: Cases) -> dict[str, float]:
    """Train and observe once: rank correlations over all held-out cases, mean Dice over the second half."""
    if name == BRAIN:
        (inside, held_out), patch = split(cases, HELD_OUT, seed), None
    else:
        inside, held_out = training.divided(cases.names, training.DATA[name].subject, seed, HELD_OUT)
        patch = training.DATA[name].patch
    patch = choose_patch([cases.shapes[number] for number in inside], patch, False)
    batch = choose_batch(patch, None, False)
    network, _ = training.trained(cases, inside, training.LOSSES[loss], patch, batch, seed, seconds)
    held = [observed(network, cases, number, patch) for number in held_out]
    rows = [row for case in held for row in case.rows]
    truth = [row.dice for row in rows]
    result = {
        f"rank: {rank}": float(spearmanr([row.confidence[rank] for row in rows], truth).statistic)
        for rank in rows[0].confidence
    }
    first, second = held[::2], held[1::2]
    decision = tuned(
        np.stack([case.by_threshold for case in first]),
        lambda thresholds: [case.score(cut(case.logits, thresholds)) for case in first],
    )
    ways = {
        "argmax": cut,
        "tuned thresholds": lambda logits: cut(logits, decision.thresholds),
        "dice_threshold": by_expected_dice,
    }
    for way, by in ways.items():
        result[f"Dice: {way}"] = float(np.mean([case.score(by(case.logits)) for case in second]))
    names = cases.class_names[1:]
    return result | {f"threshold: {c}": t for c, t in zip(names, decision.thresholds[1:], strict=True)}


def main() -> None:
    """Print a table for each data set: mean over the seeds, and each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", nargs="+", default=[*LOSSES], choices=[*training.LOSSES])
    parser.add_argument("--data", nargs="+", default=["nuclei", "hippocampus"], choices=[*training.DATA, BRAIN])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=30)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(measure.machine(), f"{chosen.seconds:g} s", flush=True)
    for name in chosen.data:
        cases = brain_cases(HELD_OUT) if name == BRAIN else training.read(name)
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
