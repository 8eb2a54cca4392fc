"""From what size on the CPU kernel is worth its machinery: `python -m benchmarks.small`.

One forward and backward step of SoftDiceLoss on the reference and on the kernel, interleaved, for growing inputs. The
size where the two cross is `softdice.backends.route.SMALL_NUMEL`.
"""

from __future__ import annotations

from functools import partial

import softdice
from benchmarks import measure
from benchmarks.losses import inputs
from softdice.backends import route


def step_on(backend: str, *arguments: object) -> object:
    """One step with a backend in force."""
    with softdice.use_backend(backend):
        return measure.step(*arguments)  # type: ignore[arg-type]


def main() -> None:
    """Print a line per size."""
    print(f"{measure.machine()}; SMALL_NUMEL = {route.SMALL_NUMEL}")
    for C in (2, 14, 118):
        for exponent in range(8, 19):
            voxels = max(1, 2**exponent // C)
            logits, labels = inputs((1, C, voxels))
            loss = softdice.SoftDiceLoss(C, activation="softmax")
            turns = {name: partial(step_on, name, loss, logits, labels) for name in ("reference", "cpu")}
            times = measure.interleaved(turns, logits, 1.0)
            ratio = times["reference"].median_ms / times["cpu"].median_ms
            print(
                f"C = {C:3}, {logits.numel():7} elements: reference {times['reference'].median_ms:.3f} ms, "
                f"cpu {times['cpu'].median_ms:.3f} ms, ratio {ratio:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
