"""The body of a map: the cross-entropy of each voxel of a block (Numba). Its gradient is that of the sum, weighted."""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from softdice.backends.cpu import loops
from softdice.backends.cpu.arithmetic import ZERO
from softdice.backends.cpu.loops import Kind
from softdice.backends.cpu.softmax import fill
from softdice.backends.cpu.walk import block_at, block_body, job_at, row_at

U = np.uint64


@cache
def forward(kind: Kind) -> np.uint64:
    """Return the body that writes the map (B, V), the job's result."""
    apart, values = kind.target == "own", kind.target == "values"
    class_terms: Any = None if apart else loops.class_terms(kind)
    own_terms: Any = loops.own_terms(kind) if apart else None

    @block_body(kind)
    def terms(at_job, at_block):
        job, k = job_at(at_job), block_at(at_block)
        bad, out = np.int64(0), job.result.address + k.b * job.result.per_sample + k.v0 * U(4)
        fill(out, k.n, ZERO)
        if apart:
            own_terms(job, k, out)
        else:
            for c in range(job.C):
                y = row_at(job.target, c, k, k.y) if values else k.zero
                bad += class_terms(k.x + c * k.ld, k.e + c * k.row, k.m, y, k.zero, c, job, k, out)
        return bad

    return terms
