"""Matching of numbered objects beside panoptica and StarDist: `python -m benchmarks.instances`.

1000 ellipses that touch and overlap in 2048 x 2048 pixels, some of them missed, numbered at random; panoptic quality
and its counts from an IoU of 0.5 on. One process, in turn. StarDist is measured where its `matching` can be imported.
Writes the table between the marks in docs/distances.md.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import measure, publish
from softdice.metrics.lesions import Rule, quality_of

PAGE = publish.DOCS / "distances.md"
MARKS = "<!-- benchmark: instances -->", "<!-- end of benchmark: instances -->"
OBJECTS, SIDE, TURNS = 1000, 2048, 7

Counts = tuple[float, ...]
"""Pairs, extra, missed, and PQ."""


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """-> prediction, reference, int32."""
    rng = np.random.default_rng(seed)
    columns = int(np.ceil(np.sqrt(OBJECTS)))
    step = SIDE // columns
    p, t = np.zeros((2, SIDE, SIDE), np.int32)
    y, x = np.mgrid[:step, :step]
    numbers = rng.permutation(OBJECTS) + 1, rng.permutation(OBJECTS) + 1
    for i, (number_p, number_t) in enumerate(zip(*numbers, strict=True)):
        corner = step * (i // columns), step * (i % columns)
        place = tuple(slice(at, at + step) for at in corner)
        middle, radii = step / 2 + rng.uniform(-3, 3, 2), rng.uniform(0.35, 0.55, 2) * step
        for shift, array, number in ((0, t, number_t), (6, p, number_p)):
            cy, cx = middle + rng.uniform(-shift, shift, 2)
            if shift == 0 or rng.random() < 0.9:
                array[place][((y - cy) / radii[0]) ** 2 + ((x - cx) / radii[1]) ** 2 < 1] = number
    return p, t


def contenders() -> dict[str, Callable[[np.ndarray, np.ndarray], Counts]]:
    """Name -> prediction, reference -> counts."""
    import panoptica

    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.UNMATCHED_INSTANCE,
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=0.5),
        instance_metrics=[panoptica.Metric.IOU],
        global_metrics=[],
    )

    def ours(p: np.ndarray, t: np.ndarray) -> Counts:
        objects = Rule(0.5, "at_least", objects="numbers").match(p, t)
        return len(objects.iou), objects.extra, objects.missed, quality_of(objects, "pq")

    def of_panoptica(p: np.ndarray, t: np.ndarray) -> Counts:
        with contextlib.redirect_stdout(io.StringIO()):
            result = evaluator.evaluate(p, t, verbose=False)["ungrouped"]
            return result.tp, result.fp, result.fn, result.pq

    programs = {"softdice": ours, "panoptica": of_panoptica}
    with contextlib.suppress(ImportError):
        from stardist.matching import matching

        def of_stardist(p: np.ndarray, t: np.ndarray) -> Counts:
            result: Any = matching(t, p, thresh=0.5)
            return result.tp, result.fp, result.fn, result.panoptic_quality

        programs["StarDist"] = of_stardist
    return programs


def main() -> None:
    """The command line."""
    warnings.filterwarnings("ignore")  # the peers'
    p, t = scene()
    programs = contenders()
    counts = {name: program(p, t) for name, program in programs.items()}  # the first call compiles
    for each in counts.values():
        np.testing.assert_allclose(each, counts["softdice"], rtol=1e-6)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(TURNS):
        for name, program in programs.items():
            start = time.perf_counter()
            program(p, t)
            times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(each) for name, each in times.items()}
    pairs, extra, missed, pq = counts["softdice"]
    lines = [
        f"`python -m benchmarks.instances` on {measure.machine()}: {OBJECTS} objects in {SIDE} x {SIDE} pixels, "
        f"of which each program finds {pairs} pairs, {missed} missed, {extra} extra, and a panoptic quality of "
        f"{pq:.4f}. Medians.",
        "",
        "| program | ms | softdice is faster by |",
        "|---|---|---|",
        *(f"| {name} | {ms:.0f} | {ms / medians['softdice']:.1f} |" for name, ms in medians.items()),
    ]
    publish.show("\n".join(lines), PAGE, MARKS)


if __name__ == "__main__":
    main()
