"""logits, target -> the cross-entropy of each voxel, on a CPU (Numba).

Its gradient is that of the statistic, with a weight for each voxel.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdice.kernels.cpu.compiled import alive, borrowed, kernel, memory
from softdice.kernels.cpu.driver import job_of, plane_of
from softdice.kernels.cpu.kernel import logits_of, row_of, span_of, voxels_of
from softdice.kernels.cpu.loops import Kind, Rows, loops
from softdice.kernels.cpu.threads import share_out
from softdice.settings import Pass, Voxels


def cross_entropy(given: Voxels, settings: Pass) -> tuple[Tensor, bool]:
    """input (B, C, V), target -> the map (B, V), and whether all values were in range."""
    input, (kind, job) = given.input, job_of(given, settings)
    if kind.labels and settings.activation == "softmax" and not settings.label_smoothing:
        kind = kind._replace(target="own")  # no other class has a term
    wide = torch.float64 if kind.double else torch.float32
    result = torch.empty(input.shape[0], input.shape[2], dtype=wide)
    bad = np.zeros(input.shape[0] * int(job.chunks), np.int64)
    if input.numel():
        plane = plane_of(result, np.float64 if kind.double else np.float32)
        share_out(_terms(kind), (job, plane, bad), len(bad), input.numel())
    return result, not (settings.validate and any(bad.tolist()))


@cache
def _terms(kind: Kind) -> Any:
    """What a call needs -> the kernel."""
    R = np.float64 if kind.double else np.float32
    do = loops(kind)
    class_terms, own_terms, softmax = do.terms, do.own_terms, do.softmax
    SOFTMAX, LABELS, OWN = kind.activation == "softmax", kind.labels, kind.target == "own"

    @kernel(("terms", kind))
    def terms(job, result, bad, begin, end):
        """Tasks [begin, end) of the grid (sample, chunk): the terms of the voxels into result, values out of range."""
        job = borrowed(job)
        C, block, s, zero = job.C, job.block, job.scalars, np.uint64(0)
        scratch = (
            np.zeros((6, block), R),
            np.zeros(block, np.int32),
            np.ones(block, R),
            np.empty(C * block if SOFTMAX else zero, R),
            np.empty(zero if job.input.direct else C * block, R),
        )
        rows, t, w, e, xs = borrowed(scratch)
        y, out = rows[3], rows[5]
        known = Rows(w, t, rows[0], rows[1], rows[2], rows[4])
        x = memory(job.input.address, R) if job.input.direct else xs
        ys = memory(job.target.address, R) if not LABELS and job.target.direct else y
        found, unread = memory(result.address, R), rows[:1]
        for task in range(begin, end):
            b, start, stop = span_of(job, task)
            for v0 in range(start, stop, block):
                n = min(block, stop - v0)
                wrong = np.int64(voxels_of(job, LABELS, b, v0, n, t, w))
                xo, ld = logits_of(job.input, b, C, v0, n, xs, block)
                if SOFTMAX:
                    softmax(x, xo, ld, C, n, known, e, block, unread)
                for v in range(n):
                    out[v] = R(0)
                if OWN:
                    own_terms(x, xo, ld, e, block, known, n, s, out)
                for c in range(zero if OWN else C):
                    yo = zero if LABELS else row_of(job.target, b, c, v0, n, y)
                    wrong += class_terms(x, xo + c * ld, e, c * block, known, c, ys, yo, n, s, out)
                bad[task] += wrong
                for v in range(n):
                    found[b * result.per_sample + v0 + v] = out[v]
        alive(scratch)

    return terms
