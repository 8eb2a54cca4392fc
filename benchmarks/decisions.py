"""How long the cut of the largest expected Dice takes, against RankSEG: `python -m benchmarks.decisions`.

Every turn begins with logits: softmax, thresholds, masks. RankSEG sorts by default, with `safe_screening` what its
bounds leave open; its rule, the reciprocal moment approximation, differs from ours, and the voxels that differ are
counted. The logits are smooth in space, as those of a network are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import softdice
from benchmarks import measure

SHAPES = (1, 14, 96, 96, 96), (8, 21, 256, 256)


def smooth_logits(shape: tuple[int, ...]) -> Tensor:
    """Noise of an eighth of the resolution, enlarged and made steep."""
    generator = torch.Generator().manual_seed(0)
    mode = "trilinear" if len(shape) == 5 else "bilinear"
    coarse = torch.randn(*shape[:2], *(n // 8 for n in shape[2:]), generator=generator)
    return 8 * torch.nn.functional.interpolate(coarse, size=shape[2:], mode=mode)


def softdice_masks(logits: Tensor) -> Tensor:
    """Masks (B, C, *S) of the largest expected Dice."""
    p = logits.softmax(1)
    return p > softdice.dice_threshold(p)[(..., *[None] * (p.ndim - 2))]


def rankseg_masks(logits: Tensor, screening: bool) -> Tensor:
    """The same by RankSEG."""
    from rankseg import RankSEG

    solver = RankSEG(metric="dice", output_mode="multilabel", solver="RMA", safe_screening=screening)
    return solver.predict(logits.softmax(1)) > 0


def main() -> None:
    """Print a row for each shape and number of threads."""
    print(measure.machine())
    turns = {
        "softmax alone": partial(torch.softmax, dim=1),
        "softdice": softdice_masks,
        "rankseg": partial(rankseg_masks, screening=False),
        "rankseg screened": partial(rankseg_masks, screening=True),
    }
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            logits = smooth_logits(shape)
            masks = {name: turn(logits) for name, turn in turns.items() if name != "softmax alone"}
            differ = int((masks["softdice"] != masks["rankseg"]).sum())
            times = measure.interleaved({name: partial(turn, logits) for name, turn in turns.items()}, logits, 30.0)
            ours = times["softdice"].median_ms
            row = (f"{name} {time.median_ms:.1f} ms ({time.median_ms / ours:.1f} x)" for name, time in times.items())
            print(shape, f"{threads} threads:", *row, f"voxels that differ: {differ} of {logits.numel()}", flush=True)


if __name__ == "__main__":
    main()
