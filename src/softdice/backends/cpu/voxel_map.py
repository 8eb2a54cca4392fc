"""The body of a map: the cross-entropy of each voxel of a block (Numba). The sums' body makes its gradient.

Legend. job, block: the records JOB and BLOCK of `softdice.backends.cpu.walk`; at_job, at_block: their addresses. A row
is the address of block.n float32: block.x and block.e logits (or probabilities) and exponentials of class 0, with
block.x_stride and block.row_stride bytes from class to class; block.m the largest logit, block.y the target of class c,
block.zeros. job.C: classes; job.result: the PLANE of the map. bad: how many values are out of range, int64.
"""

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
from softdice.backends.cpu.walk import block_at, block_body, first_of, job_at, row_at


@cache
def forward(kind: Kind) -> np.uint64:
    """Return the address of the body that writes the map (B, V) float32, the job's result, whose voxels lie side by
    side. kind.target: "values" (by class), "labels" (compared with each class), or "own": there only the class of a
    voxel's label has a term, and no value needs a check, since labels were checked when they were read."""
    own_loop, values = kind.target == "own", kind.target == "values"
    class_terms: Any = None if own_loop else loops.class_terms(kind)
    own_terms: Any = loops.own_terms(kind) if own_loop else None

    @block_body(kind)
    def terms(at_job, at_block):
        """Write the map of a block; return bad, the number of targets and probabilities out of range."""
        job, block = job_at(at_job), block_at(at_block)
        bad, out = np.int64(0), first_of(job.result, block)
        fill(out, block.n, ZERO)
        if own_loop:
            own_terms(job, block, out)
        else:
            for c in range(job.C):
                y = row_at(job.target, c, block, block.y) if values else block.zeros  # not read with labels
                x, e = block.x + c * block.x_stride, block.e + c * block.row_stride
                bad += class_terms(x, e, block.m, y, block.zeros, c, job, block, out)  # zeros: it reads no voxel_map
        return bad

    return terms
