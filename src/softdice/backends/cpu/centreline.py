"""Sums of soft skeletons (of clDice) and their gradient on a CPU, tile by tile (Numba).

With E_0 = p, E_(k+1) the erosion of E_k (the least of 3 in a row along each axis) and D the dilation (the largest of
3 x 3 x 3), d_k = relu(E_k - D(E_(k+1))) is what level k adds to the skeleton s:

    s_0 = d_0,    s_k = s_(k-1) + relu(d_k - s_(k-1) d_k),    k <= n

A tile of the skeleton needs E_k as far as n + 2 - k voxels around it, worked out anew for each tile; the gradient goes
the same way back, from values that the tile still holds, and is added to the gradient of all. Tiles whose surroundings
overlap are done one after the other (in eight colours), so that nothing depends on the threads.

Where a least or largest value stands more than once, the first takes the gradient, and two axes with the same value
take half each: so do torch's max_pool3d and minimum, which the definition consists of. At the border a voxel stands for
its neighbour outside of the volume, which changes no least or largest value.

The skeletons of all labels are one map, since a skeleton lies within its class: a byte for each voxel.

Beside the gradient the pass holds, in numbers of a map of one class: 1 for ln sum exp x (of a softmax), 1/2 for the
labels, 1/4 for their skeletons (1 more while those are made), and a tile for each thread.

Legend. B sample, C class, V voxel; D, H, W the sides of the volume, D = 1 for an image. Indices and counts are uint64,
arrays of a tile float32 and flat:

    work          the tensors and settings of a request (`Work`): input, address of logits or probabilities (B, C, V)
                  float32, its strides in elements; log_sum, ln sum e^x; label (int16: class number, NONE or IGNORED),
                  weight (if weighted), skeleton (uint8), (B, V) each; shape (D, H, W); tile, its sides; levels = n + 1
    scratch       a thread's arrays for a tile (`Scratch`). Arrays are `borrowed`: without reference counts, which
                  threads would contend for; `alive` keeps their owner until there
    core          a tile, a box of the volume of `voxels` voxels. s and d are (levels, voxels), g_s and g_d (voxels)
    outer         core with levels + 1 voxels around it, as far as the volume goes, of sides nz, ny, nx. E is
                  (levels + 1, nz ny nx), rows, planes and their gradients (nz ny nx)
    inner, box    core, or a part of outer, counted from outer's corner: planes z to Z without Z, and so on
    here, there   where E_k and E_(k+1) begin in E
    g_...         dL/d...; g_here and g_there of E_k and E_(k+1), (nz ny nx)
    task, colour  one tile of one class of one sample; the parity of its tile, 0 or 1, along z, y and x
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from softdice.backends.cpu.arithmetic import ONE, ZERO, exp
from softdice.backends.cpu.compiler import each, jit, kernel
from softdice.backends.cpu.gradient_memory import gradient_like
from softdice.backends.cpu.intrinsics import alive, borrowed, reread, write
from softdice.backends.cpu.softmax import larger
from softdice.parallel.threads import share_out
from softdice.statistics import check, sliced
from softdice.statistics.request import ACTIVATIONS, Request, equals, signed

TILE = (16, 16, 64)
"""Voxels of a tile, at least; twice the halo where that is more."""
U = np.uint64
_0, _1, _2 = U(0), U(1), U(2)
NONE, IGNORED = -1, -2  # in a map of class numbers: a voxel of no class, a voxel that does not count
HALF = np.float32(0.5)
SOFTMAX, SIGMOID = ACTIVATIONS.index("softmax"), ACTIVATIONS.index("sigmoid")


class Work(NamedTuple):
    """What the kernels are called with: the tensors of a request, and its settings."""

    input: np.uint64  # address of (B, C, V) float32
    strides: tuple[np.uint64, ...]  # its, by sample, class and voxel, in elements
    log_sum: np.ndarray  # (B, V) float32 ln sum_c exp x_c of a softmax, else (0, 0)
    label: np.ndarray  # (B, V) int16 the class of a voxel from 0 on, NONE or IGNORED
    skeleton: np.ndarray  # (B, V) uint8 whether a voxel is on the skeleton of its class
    weight: np.ndarray  # (B, V) float32, or (0, 0) without weights
    shape: tuple[np.uint64, ...]  # D, H, W
    tile: tuple[np.uint64, ...]  # sides of a tile, along D, H, W
    C: np.uint64
    levels: np.uint64  # n + 1
    activation: int  # its place in ACTIVATIONS
    weighted: bool
    flat: bool  # an image: there is no axis z


class Scratch(NamedTuple):
    """A thread's memory for one tile, large enough for any; what begins with g_ is empty in a forward pass."""

    E: np.ndarray
    rows: np.ndarray  # the largest of 3 along x, see `dilate`
    planes: np.ndarray  # the largest of 3 x 3 along x and y
    s: np.ndarray
    d: np.ndarray
    g_rows: np.ndarray
    g_planes: np.ndarray
    g_here: np.ndarray
    g_there: np.ndarray
    g_s: np.ndarray
    g_d: np.ndarray


class Box(NamedTuple):
    """A range of voxels: along each axis from the small letter up to the large one, without it."""

    z: np.uint64
    Z: np.uint64
    y: np.uint64
    Y: np.uint64
    x: np.uint64
    X: np.uint64


@each
def _down(i):
    """Return the neighbour below along an axis, held to the border."""
    return i - _1 if i > _0 else i


@each
def _up(i, size):
    """Return the neighbour above along an axis of `size` voxels, held to the border."""
    return i + _1 if i + _1 < size else i


@each
def _low(i, by):
    """Return i - by, at least 0."""
    return i - by if i > by else _0


@jit
def _around(box, by, shape):
    """Return a box of the volume enlarged by `by` voxels on each side, cut at the volume's border. shape: D, H, W."""
    D, H, W = shape
    return Box(
        _low(box.z, by), min(box.Z + by, D), _low(box.y, by), min(box.Y + by, H), _low(box.x, by), min(box.X + by, W)
    )


@jit
def _within(box, outer):
    """Return a box of the volume counted from the corner of another, which holds it."""
    return Box(box.z - outer.z, box.Z - outer.z, box.y - outer.y, box.Y - outer.y, box.x - outer.x, box.X - outer.x)


@each
def least(a, b):
    """Return the smaller number, the first of two equal ones."""
    return b if b < a else a


@jit
def erode(E, here, there, box, ny, nx, nz):
    """Write E_(k+1), the erosion of E_k, in `box`: the least of a voxel and its neighbours that share a face. The
    caller has written E_k one voxel further. The two ends of a row lack a neighbour: they have a loop of their own, so
    that LLVM vectorises the other."""
    for z in range(box.z, box.Z):
        for y in range(box.y, box.Y):
            row = (z * ny + y) * nx
            o, to = here + row, there + row
            before, after = here + (_down(z) * ny + y) * nx, here + (_up(z, nz) * ny + y) * nx
            above, below = here + (z * ny + _down(y)) * nx, here + (z * ny + _up(y, ny)) * nx
            first, last = max(box.x, _1), min(box.X, nx - _1)
            for x in range(first, last):
                a = least(least(E[before + x], E[after + x]), least(E[above + x], E[below + x]))
                E[to + x] = least(least(a, E[o + x]), least(E[o + x - _1], E[o + x + _1]))
            for x in range(box.x, box.X):
                if x < first or x >= last:
                    a = least(least(E[before + x], E[after + x]), least(E[above + x], E[below + x]))
                    E[to + x] = least(least(a, E[o + x]), least(E[o + _down(x)], E[o + _up(x, nx)]))


@jit
def dilate(E, here, box, ny, nx, nz, rows, planes):
    """Write two of the three steps of the dilation of the E at `here`; `level` takes the third, along z.
    rows: the largest of 3 along x, written in `box` and one voxel around it in y and z. planes: the largest of 3 x 3
    along x and y, written in the box and one voxel around it in z. The caller has written E one voxel further."""
    for z in range(_low(box.z, _1), min(box.Z + _1, nz)):
        for y in range(_low(box.y, _1), min(box.Y + _1, ny)):
            row = (z * ny + y) * nx
            first, last = max(box.x, _1), min(box.X, nx - _1)
            for x in range(first, last):
                o = here + row + x
                rows[row + x] = larger(larger(E[o - _1], E[o]), E[o + _1])
            for x in range(box.x, box.X):
                if x < first or x >= last:
                    o = here + row
                    rows[row + x] = larger(larger(E[o + _down(x)], E[o + x]), E[o + _up(x, nx)])
        for y in range(box.y, box.Y):
            row, above, below = (z * ny + y) * nx, (z * ny + _down(y)) * nx, (z * ny + _up(y, ny)) * nx
            for x in range(box.x, box.X):
                planes[row + x] = larger(larger(rows[above + x], rows[row + x]), rows[below + x])


@jit
def level(E, here, box, ny, nx, nz, planes, s, d, k, voxels):
    """Write d_k and s_k of the core, which is `box`, to s and d; `dilate` has written planes of E_(k+1)."""
    i = k * voxels
    for z in range(box.z, box.Z):
        for y in range(box.y, box.Y):
            row, before, after = (z * ny + y) * nx, (_down(z) * ny + y) * nx, (_up(z, nz) * ny + y) * nx
            for x in range(box.x, box.X):
                opened = larger(larger(planes[before + x], planes[row + x]), planes[after + x])
                added = larger(E[here + row + x] - opened, ZERO)  # d_k = relu(E_k - D(E_(k+1)))
                d[i] = added
                if k == _0:
                    s[i] = added
                else:  # s_k = s_(k-1) + relu(d_k - s_(k-1) d_k)
                    s_before = s[i - voxels]
                    s[i] = s_before + larger(added - s_before * added, ZERO)
                i += _1


@each
def first_least(E, a, b, c):
    """Return which of three indices into E has the least value, the first of equal ones: it takes the gradient."""
    first = b if E[b] < E[a] else a
    return c if E[c] < E[first] else first


@each
def first_largest(E, a, b, c):
    """Return which of three indices into E has the largest value, the first of equal ones: it takes the gradient."""
    first = b if E[b] > E[a] else a
    return c if E[c] > E[first] else first


@jit
def undilate(E, here, box, ny, nx, nz, rows, planes, g_d, g_rows, g_planes, g_here):
    """Add to g_here the gradient that E, at `here`, gets through its dilation D in the core, `box`. dL/dD is -g_d, as
    d = relu(E - D); it goes to the largest of 3 along z, then y, then x. `dilate` has written rows and planes of E."""
    z0, z1 = _low(box.z, _1), min(box.Z + _1, nz)
    y0, y1 = _low(box.y, _1), min(box.Y + _1, ny)
    for z in range(z0, z1):
        for y in range(y0, y1):
            for x in range(box.x, box.X):
                g_rows[(z * ny + y) * nx + x] = ZERO
                g_planes[(z * ny + y) * nx + x] = ZERO
    i = _0
    for z in range(box.z, box.Z):  # along z: -g_d to the largest of 3 planes
        for y in range(box.y, box.Y):
            row, before, after = (z * ny + y) * nx, (_down(z) * ny + y) * nx, (_up(z, nz) * ny + y) * nx
            for x in range(box.x, box.X):
                if g_d[i] != ZERO:
                    g_planes[first_largest(planes, before + x, row + x, after + x)] -= g_d[i]
                i += _1
    for z in range(z0, z1):  # along y: on to the largest of 3 rows
        for y in range(box.y, box.Y):
            row, above, below = (z * ny + y) * nx, (z * ny + _down(y)) * nx, (z * ny + _up(y, ny)) * nx
            for x in range(box.x, box.X):
                if g_planes[row + x] != ZERO:
                    g_rows[first_largest(rows, above + x, row + x, below + x)] += g_planes[row + x]
    for z in range(z0, z1):  # along x: on to the largest of 3 voxels
        for y in range(y0, y1):
            row = (z * ny + y) * nx
            for x in range(box.x, box.X):
                if g_rows[row + x] != ZERO:
                    o = here + row
                    source = first_largest(E, o + _down(x), o + x, o + _up(x, nx))
                    g_here[source - here] += g_rows[row + x]


@jit
def unerode(E, here, box, ny, nx, nz, flat, g_there, g_here):
    """Add to g_here, dL/dE_k, the part of g_there, dL/dE_(k+1), that goes through the erosion in `box`. here: where E_k
    begins in E. flat: bool, an image, without the axis z. Each axis has its least of three voxels. The least of the
    axes takes the gradient, and equal ones share it in halves, as in the definition: minimum(minimum(z, y), x)."""
    for z in range(box.z, box.Z):
        for y in range(box.y, box.Y):
            row = (z * ny + y) * nx
            before, after = here + (_down(z) * ny + y) * nx, here + (_up(z, nz) * ny + y) * nx
            above, below = here + (z * ny + _down(y)) * nx, here + (z * ny + _up(y, ny)) * nx
            for x in range(box.x, box.X):
                g = g_there[row + x]
                if g != ZERO:
                    o = here + row + x
                    in_y = first_least(E, above + x, o, below + x)
                    in_x = first_least(E, here + row + _down(x), o, here + row + _up(x, nx))
                    if flat:
                        share_y = HALF if E[in_y] == E[in_x] else (ONE if E[in_y] < E[in_x] else ZERO)
                        g_here[in_y - here] += g * share_y
                        g_here[in_x - here] += g * (ONE - share_y)
                    else:
                        in_z = first_least(E, before + x, o, after + x)
                        z_of_zy = HALF if E[in_z] == E[in_y] else (ONE if E[in_z] < E[in_y] else ZERO)
                        least_zy = least(E[in_z], E[in_y])
                        share_zy = HALF if least_zy == E[in_x] else (ONE if least_zy < E[in_x] else ZERO)
                        g_here[in_z - here] += g * share_zy * z_of_zy
                        g_here[in_y - here] += g * share_zy * (ONE - z_of_zy)
                        g_here[in_x - here] += g * (ONE - share_zy)


@jit
def place(work, colour, task):
    """Return sample, class and core (a Box) of a task, by its number among the tasks of a colour.
    Numbers run over the tiles first, then over the classes, then over the samples."""
    D, H, W = work.shape
    tz, ty, tx = work.tile
    all_z, all_y, all_x = (D + tz - _1) // tz, (H + ty - _1) // ty, (W + tx - _1) // tx  # tiles along each axis
    cz, cy, cx = (all_z + _1 - colour[0]) // _2, (all_y + _1 - colour[1]) // _2, (all_x + _1 - colour[2]) // _2
    class_map, tile = task // (cz * cy * cx), task % (cz * cy * cx)  # one of the B C pairs of sample and class
    z = (tile // (cy * cx) * _2 + colour[0]) * tz
    y = (tile // cx % cy * _2 + colour[1]) * ty
    x = (tile % cx * _2 + colour[2]) * tx
    box = Box(z, min(z + tz, D), y, min(y + ty, H), x, min(x + tx, W))
    return class_map // work.C, class_map % work.C, box


@jit
def load(work, b, c, outer, E):
    """Write E_0 = p of sample b and class c to E, for the voxels of the box `outer`; 0 where a voxel is ignored.
    p is e^(x - log_sum) of a softmax, 1 / (1 + e^-x) of a sigmoid, else the input itself."""
    _, H, W = work.shape
    i = _0
    for z in range(outer.z, outer.Z):
        for y in range(outer.y, outer.Y):
            row = (z * H + y) * W
            for x in range(outer.x, outer.X):
                v = row + x
                value = reread(work.input, b * work.strides[0] + c * work.strides[1] + v * work.strides[2])
                if work.activation == SOFTMAX:
                    value = exp(value - work.log_sum[b, v])
                elif work.activation == SIGMOID:  # e^x below -80, where e^-x overflows float32
                    value = ONE / (ONE + exp(-value)) if value >= -np.float32(80) else exp(value)
                E[i] = value if work.label[b, v] != IGNORED else ZERO
                i += _1


@jit
def build(work, b, c, core, outer, scratch):
    """Write E of every level, and d and s of the core, of sample b and class c; return how many voxels the core has."""
    E, rows, planes, s, d = scratch.E, scratch.rows, scratch.planes, scratch.s, scratch.d
    nz, ny, nx = outer.Z - outer.z, outer.Y - outer.y, outer.X - outer.x
    size = nz * ny * nx
    inner = _within(core, outer)
    voxels = (core.Z - core.z) * (core.Y - core.y) * (core.X - core.x)
    load(work, b, c, outer, E)
    for k in range(_0, work.levels):
        box = _within(_around(core, work.levels - k, work.shape), outer)
        erode(E, k * size, (k + _1) * size, box, ny, nx, nz)
        dilate(E, (k + _1) * size, inner, ny, nx, nz, rows, planes)
        level(E, k * size, inner, ny, nx, nz, planes, s, d, k, voxels)
    return voxels


@jit
def allocate(work, backward):
    """Return a new `Scratch` with room for any tile, its arrays in the order of the fields; the caller keeps it alive.
    backward: bool, whether with the arrays of gradients."""
    levels, outer, voxels = work.levels, _1, _1
    for axis in range(3):
        outer *= min(work.tile[axis] + _2 * (levels + _1), work.shape[axis])
        voxels *= min(work.tile[axis], work.shape[axis])
    n, m = outer if backward else _0, voxels if backward else _0
    return Scratch(
        np.empty(outer * (levels + _1), np.float32), np.empty(outer, np.float32), np.empty(outer, np.float32),
        np.empty(voxels * levels, np.float32), np.empty(voxels * levels, np.float32),
        np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32),
        np.empty(m, np.float32), np.empty(m, np.float32),
    )  # fmt: skip


@kernel("centreline forward")
def _sums(work, colour, slots, begin, end):
    """Write four sums for each of the tasks [begin, end) of a colour to slots, (tasks, 4) float64 zeros:
    sum w S(p) y, sum w S(p), sum w S(y) p, sum w S(y), with S the skeleton and y 1 where the label is the class."""
    work, slots = borrowed(work), borrowed(slots)
    owner = allocate(work, False)
    scratch = borrowed(owner)
    E, s = scratch.E, scratch.s
    _, H, W = work.shape
    for task in range(begin, end):
        b, c, core = place(work, colour, task)
        outer = _around(core, work.levels + _1, work.shape)
        ny, nx = outer.Y - outer.y, outer.X - outer.x
        voxels = build(work, b, c, core, outer, scratch)
        i = (work.levels - _1) * voxels
        for z in range(core.z, core.Z):
            for y in range(core.y, core.Y):
                row = (z * H + y) * W
                row_in_E = ((z - outer.z) * ny + y - outer.y) * nx - outer.x
                for x in range(core.x, core.X):
                    v, p = row + x, np.float64(E[row_in_E + x])
                    w = np.float64(work.weight[b, v]) if work.weighted else 1.0
                    label = np.int64(work.label[b, v])
                    slots[task, 1] += p - p  # 0; NaN of a NaN, which the comparisons of the skeleton may have dropped
                    if label != IGNORED:
                        term = w * np.float64(s[i])
                        slots[task, 1] += term
                        if label == np.int64(c):
                            slots[task, 0] += term
                            if work.skeleton[b, v]:
                                slots[task, 2] += w * p
                                slots[task, 3] += w
                    i += _1
    alive(owner)


@jit
def seed(work, b, c, core, coef_y, coef, g_s):
    """Write dL/ds of the finished skeleton to g_s: w (coef + coef_y [y = c]), 0 where a voxel is ignored.
    coef_y, coef: dL/d(sum w S(p) y) and dL/d(sum w S(p)) of sample b and class c, float32."""
    _, H, W = work.shape
    i = _0
    for z in range(core.z, core.Z):
        for y in range(core.y, core.Y):
            for x in range(core.x, core.X):
                v = (z * H + y) * W + x
                label = np.int64(work.label[b, v])
                w = np.float32(work.weight[b, v]) if work.weighted else ONE
                step = coef + coef_y if label == np.int64(c) else coef
                g_s[i] = ZERO if label == IGNORED else w * step
                i += _1


@jit
def unlevel(s, d, k, voxels, g_s, g_d):
    """Write dL/dd_k to g_d, and replace dL/ds_k in g_s by dL/ds_(k-1).
    ds_k/dd_k = 1 - s_(k-1) and ds_k/ds_(k-1) = 1 - d_k where level k adds something, 0 and 1 elsewhere."""
    at = k * voxels
    for i in range(voxels):
        if k == _0:
            g_d[i] = g_s[i] if d[i] > ZERO else ZERO
        else:
            added, s_before = d[at + i], s[at - voxels + i]
            counts = added - s_before * added > ZERO
            g_d[i] = g_s[i] * (ONE - s_before) if counts else ZERO
            g_s[i] = g_s[i] * (ONE - added) if counts else g_s[i]


@jit
def store(work, b, c, core, outer, coef, g, result, strides):
    """Add the gradient of one tile to dL/dp, except at ignored voxels: g, which is dL/dE_0 in the box `outer`. A voxel
    of the core on the skeleton of class c also gets coef w, with coef = dL/d(sum w S(y) p), float32.
    result, strides: address of dL/dp (B, C, V) float32, strides in elements."""
    _, H, W = work.shape
    i = _0
    for z in range(outer.z, outer.Z):
        for y in range(outer.y, outer.Y):
            for x in range(outer.x, outer.X):
                v = (z * H + y) * W + x
                step, label = g[i], np.int64(work.label[b, v])
                in_core = core.z <= z < core.Z and core.y <= y < core.Y and core.x <= x < core.X
                if in_core and label == np.int64(c) and work.skeleton[b, v]:
                    step += coef * (np.float32(work.weight[b, v]) if work.weighted else ONE)
                if label != IGNORED:
                    element = b * strides[0] + c * strides[1] + v * strides[2]
                    write(result, element, reread(result, element) + step)
                i += _1


@kernel("centreline backward")
def _gradient(work, colour, coefs, result, strides, begin, end):
    """Add dL/dp of the tasks [begin, end) of a colour to result, the address of dL/dp (B, C, V) float32.
    coefs: dL/dsums (4, B, C) float32, of sum w S(p) y, sum w S(p), sum w S(y) p, and sum w S(y), which is constant.
    strides: of dL/dp, in elements."""
    work, coefs = borrowed(work), borrowed(coefs)
    owner = allocate(work, True)
    scratch = borrowed(owner)
    E, rows, planes, s, d = scratch.E, scratch.rows, scratch.planes, scratch.s, scratch.d
    g_rows, g_planes, g_s, g_d = scratch.g_rows, scratch.g_planes, scratch.g_s, scratch.g_d
    g_here, g_there = scratch.g_here, scratch.g_there
    for task in range(begin, end):
        b, c, core = place(work, colour, task)
        coef_y, coef, coef_p = coefs[0, b, c], coefs[1, b, c], coefs[2, b, c]
        if coef_y == ZERO and coef == ZERO and coef_p == ZERO:
            continue
        outer = _around(core, work.levels + _1, work.shape)
        nz, ny, nx = outer.Z - outer.z, outer.Y - outer.y, outer.X - outer.x
        size = nz * ny * nx
        inner = _within(core, outer)
        # 1. E, d and s of all levels once more; the gradient of the finished skeleton, and 0 for the last E
        voxels = build(work, b, c, core, outer, scratch)
        seed(work, b, c, core, coef_y, coef, g_s)
        for j in range(size):
            g_there[j] = ZERO
        for level_down in range(_0, work.levels):
            k = work.levels - _1 - level_down
            here, there = k * size, (k + _1) * size
            unlevel(s, d, k, voxels, g_s, g_d)  # 2. dL/dd_k
            if level_down > _0:  # 3. dL/dE_(k+1) through D; `build` has left the planes of the last level
                dilate(E, there, inner, ny, nx, nz, rows, planes)
            undilate(E, there, inner, ny, nx, nz, rows, planes, g_d, g_rows, g_planes, g_there)
            for j in range(size):
                g_here[j] = ZERO
            box = _within(_around(core, work.levels - k, work.shape), outer)  # 4. dL/dE_k through the erosion and d_k
            unerode(E, here, box, ny, nx, nz, work.flat, g_there, g_here)
            i = _0
            for z in range(inner.z, inner.Z):
                for y in range(inner.y, inner.Y):
                    for x in range(inner.x, inner.X):
                        g_here[(z * ny + y) * nx + x] += g_d[i]
                        i += _1
            g_here, g_there = g_there, g_here  # E_k is the E_(k+1) of the next turn
        store(work, b, c, core, outer, coef_p, g_there, result, strides)
    alive(owner)


@kernel("centreline erosion")
def _erode_labels(labels, smaller, shape, begin, end):
    """Erode all labels at once: write a voxel's label to smaller if its six neighbours have it, too, else NONE.
    labels, smaller: (B, V) int16. shape: (D, H, W). begin, end: range of the planes, B D in all samples together."""
    D, H, W = shape
    for plane in range(begin, end):
        b, z = plane // D, plane % D
        z0, z1 = _down(z), _up(z, D)
        for y in range(_0, H):
            y0, y1 = _down(y), _up(y, H)
            for x in range(_0, W):
                x0, x1 = _down(x), _up(x, W)
                v = (z * H + y) * W + x
                label = labels[b, v]
                inside = label >= 0
                inside &= (labels[b, (z0 * H + y) * W + x] == label) & (labels[b, (z1 * H + y) * W + x] == label)
                inside &= (labels[b, (z * H + y0) * W + x] == label) & (labels[b, (z * H + y1) * W + x] == label)
                inside &= (labels[b, v - x + x0] == label) & (labels[b, v - x + x1] == label)
                smaller[b, v] = label if inside else np.int16(NONE)


@kernel("centreline skeleton")
def _mark_skeletons(labels, smaller, skeleton, shape, begin, end):
    """Add one level to the skeletons of all labels: set skeleton, (B, V) uint8, to 1 at a voxel that has a label, if no
    voxel of the 3 x 3 x 3 around it has this label in `smaller`, the erosion of labels; both (B, V) int16.
    shape: (D, H, W). begin, end: range of the planes, B D in all samples together."""
    D, H, W = shape
    for plane in range(begin, end):
        b, z = plane // D, plane % D
        for y in range(_0, H):
            for x in range(_0, W):
                v = (z * H + y) * W + x
                label, reached = labels[b, v], False
                if label >= 0:
                    for i in range(_down(z), _up(z, D) + _1):
                        for j in range(_down(y), _up(y, H) + _1):
                            for k in range(_down(x), _up(x, W) + _1):
                                reached |= smaller[b, (i * H + j) * W + k] == label
                    if not reached:
                        skeleton[b, v] = 1


def _class_numbers(target: Tensor, weight: Tensor | None, C: int, ignore_index: int | None) -> Tensor:
    """Return a label map (B, V) as int16: class numbers in [0, C), NONE for another label, or IGNORED: the label is
    ignore_index, or the weight (B, V) is not above 0. With one class, label 1 is class 0, and label 0 NONE."""
    numbers = torch.empty(target.shape, dtype=torch.int16)
    first = 1 if C == 1 else 0
    for b, labels in enumerate(target):  # one at a time, so that only its copies are held
        value = signed(labels)
        value = value.to(torch.int16) if value.dtype == torch.int8 else value  # which cannot hold `first + C`
        numbers[b] = torch.where((value >= first) & (value < first + C), value.to(torch.int16) - first, NONE)
        if ignore_index is not None:
            numbers[b][equals(labels, ignore_index)] = IGNORED
        if weight is not None:
            numbers[b][~(weight[b] > 0)] = IGNORED
    return numbers


def _label_skeletons(label: np.ndarray, shape: tuple[np.uint64, ...], levels: int, numel: int) -> np.ndarray:
    """Return whether a voxel is on the skeleton of its class, (B, V) uint8, for class numbers (B, V) int16.
    shape: D, H, W. numel: elements of the whole pass, which decide on the number of threads."""
    skeleton = np.zeros(label.shape, np.uint8)
    eroded, memory = label, (np.empty_like(label), np.empty_like(label))
    for level in range(levels):
        smaller = memory[level % 2]
        share_out(_erode_labels, (eroded, smaller, shape), len(label) * int(shape[0]), numel)
        share_out(_mark_skeletons, (eroded, smaller, skeleton, shape), len(label) * int(shape[0]), numel)
        eroded = smaller
    return skeleton


def _work(request: Request, input: Tensor) -> Work:
    """Return what the kernels are called with. input: the request's as float32, which the caller keeps alive.
    A tile has two halos along each axis at least, so that tiles of one colour change no voxel in common."""
    s, weight = request.settings, request.weight
    assert s.shape is not None  # a request for skeletons has one
    shape = tuple(U(size) for size in ((1,) * (3 - len(s.shape)) + s.shape))
    label = _class_numbers(request.target, weight, input.shape[1], s.ignore_index).numpy()
    halo = s.iterations + 2  # voxels around a tile that its skeleton depends on
    return Work(
        input=U(input.data_ptr()), strides=tuple(map(U, input.stride())),
        log_sum=sliced.log_sum(input, s.activation).numpy(),
        label=label, skeleton=_label_skeletons(label, shape, s.iterations + 1, input.numel()),
        weight=np.empty((0, 0), np.float32) if weight is None else weight.float().contiguous().numpy(),
        shape=shape, tile=tuple(U(max(size, 2 * halo)) for size in TILE), C=U(input.shape[1]),
        levels=U(s.iterations + 1), activation=ACTIVATIONS.index(s.activation),
        weighted=weight is not None, flat=len(s.shape) == 2,
    )  # fmt: skip


def _colours(work: Work, images: int) -> list[tuple[tuple[np.uint64, ...], int]]:
    """Return (colour, number of its tasks) for each colour that occurs; a colour is a tile's parity along each axis.
    images: B C. Tiles of one colour are at least a tile apart, so that their surroundings do not overlap."""
    counts = [-(-int(size) // int(tile)) for size, tile in zip(work.shape, work.tile, strict=True)]
    colours = []
    for colour in product((0, 1), repeat=3):
        tiles = [(count + 1 - parity) // 2 for count, parity in zip(counts, colour, strict=True)]
        if all(tiles):
            colours.append((tuple(map(U, colour)), images * int(np.prod(tiles))))
    return colours


def forward(request: Request) -> Tensor:
    """Return sum w S(p) y, sum w S(p), sum w S(y) p and sum w S(y), (4, B, C) float32, with S the skeleton.
    Raise ValueError, with `validate`, for a label, probability or weight that is out of range."""
    B, C, _ = request.input.shape
    if request.settings.validate:
        for voxels in sliced.slices(request.input):
            check.values(request.cut(slice(None), voxels))
    input = request.input.float()
    sums = torch.zeros(4, B, C, dtype=torch.float64)
    if input.numel():
        work = _work(request, input)
        for colour, tasks in _colours(work, B * C):
            slots = np.zeros((tasks, 4))
            share_out(_sums, (work, colour, slots), tasks, input.numel())
            sums += torch.from_numpy(slots).view(B, C, -1, 4).sum(2).movedim(-1, 0)
    return sums.float()


def gradient(grad: Tensor, request: Request) -> Tensor:
    """Return dL/dinput (B, C, V), of the input's dtype, for grad = dL/d(the four sums of skeletons), (4, B, C)."""
    B, C, _ = request.input.shape
    input = request.input.float()
    result = gradient_like(input)  # dL/dp, until `through_activation` makes dL/dinput of it
    if input.numel():
        result.zero_()
        work = _work(request, input)
        coefs = np.ascontiguousarray(grad.detach().float().numpy())
        for colour, tasks in _colours(work, B * C):
            arguments = work, colour, coefs, U(result.data_ptr()), tuple(U(step) for step in result.stride())
            share_out(_gradient, arguments, tasks, input.numel())
        log_sum_BV = torch.from_numpy(work.log_sum)
        del work, arguments  # labels and their skeletons
        sliced.through_activation(result, input, log_sum_BV, request.settings.activation)
    return result.to(request.input.dtype)
