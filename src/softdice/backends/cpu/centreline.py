"""Sums of soft skeletons and their gradient on a CPU, tile by tile (Numba).

With E_0 = p, E_(k+1) the erosion of E_k (the least of 3 in a row along each axis) and D the dilation (the largest of
3 x 3 x 3), d_k = relu(E_k - D(E_(k+1))) is what level k adds to the skeleton s:

    s_0 = d_0,    s_k = s_(k-1) + relu(d_k - s_(k-1) d_k),    k <= n

A tile of the skeleton needs E_k as far as n + 2 - k voxels around it, worked out anew for each tile; the gradient goes
the same way back, from values that the tile still holds, and is added to that of the whole. Tiles whose surroundings
overlap are done one after the other (in eight colours), so that nothing depends on the threads.

Where a least or largest value stands more than once, the first takes the gradient, and two axes with the same value
take half each: so do torch's max_pool3d and minimum, which the definition consists of. At the border of the volume an
index is held to it, which adds a value that is there already.

The skeletons of all labels are one map, since a skeleton lies within what it is of: a byte for each voxel.

Beside the gradient the pass holds, in numbers of a map of one class: 1 for ln sum exp x (of a softmax), 1/2 for the
labels, 1/4 for their skeletons (1 more while those are made), and a tile for each thread.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softdice.backends.cpu.arithmetic import ONE, ZERO, exp
from softdice.backends.cpu.compiler import each, jit, kernel
from softdice.backends.cpu.gradient_memory import gradient_like
from softdice.backends.cpu.intrinsics import alive, borrowed, reread, write
from softdice.parallel.threads import share_out
from softdice.statistics import check, sliced
from softdice.statistics.request import ACTIVATIONS, Request, equals, signed

TILE = (16, 16, 64)
"""Voxels of a tile, at least; twice the halo where that is more."""
U = np.uint64
_0, _1, _2 = U(0), U(1), U(2)
NONE, IGNORED = -1, -2
SOFTMAX, SIGMOID = ACTIVATIONS.index("softmax"), ACTIVATIONS.index("sigmoid")


class Work(NamedTuple):
    """What the kernels are called with."""

    input: np.uint64  # address
    per_sample: np.uint64
    per_class: np.uint64
    per_voxel: np.uint64
    log_sum: np.ndarray  # (B, V) of a softmax, else (0, 0)
    label: np.ndarray  # (B, V) the class of a voxel, NONE or IGNORED
    skeleton: np.ndarray  # (B, V) whether a voxel is on the skeleton of its class
    weight: np.ndarray  # (B, V) or (0, 0)
    shape: tuple[np.uint64, ...]  # D, H, W
    tile: tuple[np.uint64, ...]
    C: np.uint64
    levels: np.uint64  # n + 1
    activation: int  # its place in ACTIVATIONS
    weighted: bool
    flat: bool  # of two dimensions


class Box(NamedTuple):
    """A range of voxels: in each axis from, and up to."""

    z: np.uint64
    Z: np.uint64
    y: np.uint64
    Y: np.uint64
    x: np.uint64
    X: np.uint64


@each
def _down(i):
    return i - _1 if i > _0 else i


@each
def _up(i, size):
    return i + _1 if i + _1 < size else i


@each
def _low(i, by):
    return i - by if i > by else _0


@jit
def _around(box, by, shape):
    """Return a box enlarged by so many voxels on each side, within the volume."""
    D, H, W = shape
    return Box(
        _low(box.z, by), min(box.Z + by, D), _low(box.y, by), min(box.Y + by, H), _low(box.x, by), min(box.X + by, W)
    )


@jit
def _within(box, outer):
    """Return a box of the volume counted from the corner of another."""
    return Box(box.z - outer.z, box.Z - outer.z, box.y - outer.y, box.Y - outer.y, box.x - outer.x, box.X - outer.x)


HALF = np.float32(0.5)


@each
def least(a, b):
    """Return the smaller number."""
    return b if b < a else a


@each
def largest(a, b):
    """Return the larger number."""
    return b if b > a else a


@jit
def erode(E, here, there, box, ny, nx, nz):
    """Write the erosion of E at `here` to `there`, in the box. Sizes of the tile: nz, ny, nx."""
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
    """Write to rows the largest of 3 in x, one voxel beyond the box in y and z; to planes that of 3 x 3 in x and y, one
    beyond it in z."""
    for z in range(_low(box.z, _1), min(box.Z + _1, nz)):
        for y in range(_low(box.y, _1), min(box.Y + _1, ny)):
            row = (z * ny + y) * nx
            first, last = max(box.x, _1), min(box.X, nx - _1)
            for x in range(first, last):
                o = here + row + x
                rows[row + x] = largest(largest(E[o - _1], E[o]), E[o + _1])
            for x in range(box.x, box.X):
                if x < first or x >= last:
                    o = here + row
                    rows[row + x] = largest(largest(E[o + _down(x)], E[o + x]), E[o + _up(x, nx)])
        for y in range(box.y, box.Y):
            row, above, below = (z * ny + y) * nx, (z * ny + _down(y)) * nx, (z * ny + _up(y, ny)) * nx
            for x in range(box.x, box.X):
                planes[row + x] = largest(largest(rows[above + x], rows[row + x]), rows[below + x])


@jit
def level(E, here, box, ny, nx, nz, planes, s, d, k, size):
    """Write d_k and s_k in the box behind those of the levels before."""
    i = k * size
    for z in range(box.z, box.Z):
        for y in range(box.y, box.Y):
            row, before, after = (z * ny + y) * nx, (_down(z) * ny + y) * nx, (_up(z, nz) * ny + y) * nx
            for x in range(box.x, box.X):
                opened = largest(largest(planes[before + x], planes[row + x]), planes[after + x])
                rest = largest(E[here + row + x] - opened, ZERO)
                d[i] = rest
                if k == _0:
                    s[i] = rest
                else:
                    old = s[i - size]
                    s[i] = old + largest(rest - old * rest, ZERO)
                i += _1


@each
def first_least(E, a, b, c):
    first = b if E[b] < E[a] else a
    return c if E[c] < E[first] else first


@each
def first_largest(E, a, b, c):
    first = b if E[b] > E[a] else a
    return c if E[c] > E[first] else first


@jit
def undilate(E, here, box, ny, nx, nz, rows, planes, g, g_rows, g_planes, g_next):
    """Add to g_next, the gradient of E, what -g, that of the dilation in the box (numbered from its corner), gives."""
    z0, z1 = _low(box.z, _1), min(box.Z + _1, nz)
    y0, y1 = _low(box.y, _1), min(box.Y + _1, ny)
    for z in range(z0, z1):
        for y in range(y0, y1):
            for x in range(box.x, box.X):
                g_rows[(z * ny + y) * nx + x] = ZERO
                g_planes[(z * ny + y) * nx + x] = ZERO
    i = _0
    for z in range(box.z, box.Z):
        for y in range(box.y, box.Y):
            row, before, after = (z * ny + y) * nx, (_down(z) * ny + y) * nx, (_up(z, nz) * ny + y) * nx
            for x in range(box.x, box.X):
                if g[i] != ZERO:
                    g_planes[first_largest(planes, before + x, row + x, after + x)] -= g[i]
                i += _1
    for z in range(z0, z1):
        for y in range(box.y, box.Y):
            row, above, below = (z * ny + y) * nx, (z * ny + _down(y)) * nx, (z * ny + _up(y, ny)) * nx
            for x in range(box.x, box.X):
                if g_planes[row + x] != ZERO:
                    g_rows[first_largest(rows, above + x, row + x, below + x)] += g_planes[row + x]
    for z in range(z0, z1):
        for y in range(y0, y1):
            row = (z * ny + y) * nx
            for x in range(box.x, box.X):
                if g_rows[row + x] != ZERO:
                    o = here + row
                    source = first_largest(E, o + _down(x), o + x, o + _up(x, nx))
                    g_next[source - here] += g_rows[row + x]


@jit
def unerode(E, here, box, ny, nx, nz, flat, g_next, g):
    """Add to g, the gradient of E, what g_next, that of the erosion in the box, gives. flat: there is no axis z."""
    for z in range(box.z, box.Z):
        for y in range(box.y, box.Y):
            row = (z * ny + y) * nx
            before, after = here + (_down(z) * ny + y) * nx, here + (_up(z, nz) * ny + y) * nx
            above, below = here + (z * ny + _down(y)) * nx, here + (z * ny + _up(y, ny)) * nx
            for x in range(box.x, box.X):
                step = g_next[row + x]
                if step != ZERO:
                    o = here + row + x
                    in_y = first_least(E, above + x, o, below + x)
                    in_x = first_least(E, here + row + _down(x), o, here + row + _up(x, nx))
                    if flat:
                        share = HALF if E[in_y] == E[in_x] else (ONE if E[in_y] < E[in_x] else ZERO)
                        g[in_y - here] += step * share
                        g[in_x - here] += step * (ONE - share)
                    else:
                        in_z = first_least(E, before + x, o, after + x)
                        of_z = HALF if E[in_z] == E[in_y] else (ONE if E[in_z] < E[in_y] else ZERO)
                        both = least(E[in_z], E[in_y])
                        share = HALF if both == E[in_x] else (ONE if both < E[in_x] else ZERO)
                        g[in_z - here] += step * share * of_z
                        g[in_y - here] += step * share * (ONE - of_z)
                        g[in_x - here] += step * (ONE - share)


@jit
def place(work, colour, task):
    """Return sample, class and box of a task of a colour."""
    D, H, W = work.shape
    tz, ty, tx = work.tile
    nz, ny, nx = (D + tz - _1) // tz, (H + ty - _1) // ty, (W + tx - _1) // tx
    cz, cy, cx = (nz + _1 - colour[0]) // _2, (ny + _1 - colour[1]) // _2, (nx + _1 - colour[2]) // _2
    image, tile = task // (cz * cy * cx), task % (cz * cy * cx)
    z = (tile // (cy * cx) * _2 + colour[0]) * tz
    y = (tile // cx % cy * _2 + colour[1]) * ty
    x = (tile % cx * _2 + colour[2]) * tx
    box = Box(z, min(z + tz, D), y, min(y + ty, H), x, min(x + tx, W))
    return image // work.C, image % work.C, box


@jit
def load(work, b, c, outer, E):
    """Write the probabilities of class c in the box `outer` into E; 0 where a voxel is ignored."""
    _, H, W = work.shape
    i = _0
    for z in range(outer.z, outer.Z):
        for y in range(outer.y, outer.Y):
            row = (z * H + y) * W
            for x in range(outer.x, outer.X):
                v = row + x
                value = reread(work.input, b * work.per_sample + c * work.per_class + v * work.per_voxel)
                if work.activation == SOFTMAX:
                    value = exp(value - work.log_sum[b, v])
                elif work.activation == SIGMOID:
                    value = ONE / (ONE + exp(-value)) if value >= -np.float32(80) else exp(value)
                E[i] = value if work.label[b, v] != IGNORED else ZERO
                i += _1


@jit
def build(work, b, c, core, outer, scratch):
    """Write E of every level, and d and s of the core, numbered from its corner."""
    E, rows, planes, s, d = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
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
def memory_of(work, back):
    """Allocate a tile's E, rows, planes, s and d; for the gradient also rows, planes and two of E's size."""
    halo, levels = work.levels + _1, work.levels
    outer, core = _1, _1
    for axis in range(3):
        outer *= min(work.tile[axis] + _2 * halo, work.shape[axis])
        core *= min(work.tile[axis], work.shape[axis])
    more, less = outer if back else _0, core if back else _0
    return (
        np.empty(outer * (levels + _1), np.float32),
        np.empty(outer, np.float32),
        np.empty(outer, np.float32),
        np.empty(core * levels, np.float32),
        np.empty(core * levels, np.float32),
        np.empty(more, np.float32),
        np.empty(more, np.float32),
        np.empty(more, np.float32),
        np.empty(more, np.float32),
        np.empty(less, np.float32),
        np.empty(less, np.float32),
    )


@kernel("centreline forward")
def _sums(work, colour, slots, begin, end):
    """Write the four sums of the tasks [begin, end) of a colour into slots (tasks, 4)."""
    work, slots = borrowed(work), borrowed(slots)
    kept = memory_of(work, False)
    scratch = borrowed(kept)
    E, s = scratch[0], scratch[3]
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
                inner = ((z - outer.z) * ny + y - outer.y) * nx - outer.x
                for x in range(core.x, core.X):
                    v, p = row + x, np.float64(E[inner + x])
                    w = np.float64(work.weight[b, v]) if work.weighted else 1.0
                    label = np.int64(work.label[b, v])
                    slots[task, 1] += p - p  # a NaN must be seen
                    if label != IGNORED:
                        term = w * np.float64(s[i])
                        slots[task, 1] += term
                        if label == np.int64(c):
                            slots[task, 0] += term
                            if work.skeleton[b, v]:
                                slots[task, 2] += w * p
                                slots[task, 3] += w
                    i += _1
    alive(kept)


@kernel("centreline backward")
def _gradient(work, colour, coefs, result, strides, begin, end):
    """Add dL/dp of the tasks [begin, end) of a colour to result, an address with strides."""
    work, coefs = borrowed(work), borrowed(coefs)
    kept = memory_of(work, True)
    scratch = borrowed(kept)
    E, rows, planes, s, d = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    g_rows, g_planes, g, g_next, gs, gd = (
        scratch[5], scratch[6], scratch[7], scratch[8], scratch[9], scratch[10],
    )  # fmt: skip
    _, H, W = work.shape
    for task in range(begin, end):
        b, c, core = place(work, colour, task)
        a0, a1, a2 = coefs[0, b, c], coefs[1, b, c], coefs[2, b, c]
        if a0 == ZERO and a1 == ZERO and a2 == ZERO:
            continue
        outer = _around(core, work.levels + _1, work.shape)
        nz, ny, nx = outer.Z - outer.z, outer.Y - outer.y, outer.X - outer.x
        size = nz * ny * nx
        inner = _within(core, outer)
        voxels = build(work, b, c, core, outer, scratch)
        i = _0
        for z in range(core.z, core.Z):
            for y in range(core.y, core.Y):
                for x in range(core.x, core.X):
                    v = (z * H + y) * W + x
                    label = np.int64(work.label[b, v])
                    w = np.float32(work.weight[b, v]) if work.weighted else ONE
                    step = a1 + a0 if label == np.int64(c) else a1
                    gs[i] = ZERO if label == IGNORED else w * step
                    i += _1
        for j in range(size):
            g_next[j] = ZERO
        for level_down in range(_0, work.levels):
            k = work.levels - _1 - level_down
            here, there, at = k * size, (k + _1) * size, k * voxels
            for j in range(voxels):  # of the skeleton so far, and of what this level adds
                if k == _0:
                    gd[j] = gs[j] if d[j] > ZERO else ZERO
                else:
                    rest, old = d[at + j], s[at - voxels + j]
                    added = rest - old * rest > ZERO
                    gd[j] = gs[j] * (ONE - old) if added else ZERO
                    gs[j] = gs[j] * (ONE - rest) if added else gs[j]
            if level_down > _0:  # else planes are those of the last level
                dilate(E, there, inner, ny, nx, nz, rows, planes)
            undilate(E, there, inner, ny, nx, nz, rows, planes, gd, g_rows, g_planes, g_next)
            for j in range(size):
                g[j] = ZERO
            box = _within(_around(core, work.levels - k, work.shape), outer)
            unerode(E, here, box, ny, nx, nz, work.flat, g_next, g)
            i = _0
            for z in range(inner.z, inner.Z):
                for y in range(inner.y, inner.Y):
                    for x in range(inner.x, inner.X):
                        g[(z * ny + y) * nx + x] += gd[i]
                        i += _1
            g, g_next = g_next, g
        i = _0
        for z in range(outer.z, outer.Z):
            for y in range(outer.y, outer.Y):
                for x in range(outer.x, outer.X):
                    v = (z * H + y) * W + x
                    step, label = g_next[i], np.int64(work.label[b, v])
                    inside = core.z <= z < core.Z and core.y <= y < core.Y and core.x <= x < core.X
                    if inside and label == np.int64(c) and work.skeleton[b, v]:
                        step += a2 * (np.float32(work.weight[b, v]) if work.weighted else ONE)
                    if label != IGNORED:
                        place_of = b * strides[0] + c * strides[1] + v * strides[2]
                        write(result, place_of, reread(result, place_of) + step)
                    i += _1
    alive(kept)


@kernel("centreline labels")
def _shrink(labels, smaller, skeleton, shape, mark, begin, end):
    """Write to smaller, in planes [begin, end), the labels (B, V) whose six neighbours have the same label, else NONE.

    With mark: a voxel of labels that the dilation of smaller does not reach is on the skeleton.
    """
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
                if not mark:
                    whole = label >= 0
                    whole &= (labels[b, (z0 * H + y) * W + x] == label) & (labels[b, (z1 * H + y) * W + x] == label)
                    whole &= (labels[b, (z * H + y0) * W + x] == label) & (labels[b, (z * H + y1) * W + x] == label)
                    whole &= (labels[b, v - x + x0] == label) & (labels[b, v - x + x1] == label)
                    smaller[b, v] = label if whole else np.int16(NONE)
                elif label >= 0:
                    reached = False
                    for i in range(z0, z1 + _1):
                        for j in range(y0, y1 + _1):
                            for k in range(x0, x1 + _1):
                                reached |= smaller[b, (i * H + j) * W + k] == label
                    if not reached:
                        skeleton[b, v] = 1


def _work(request: Request, input: Tensor) -> tuple[Work, list[Any]]:
    """Return the work for a float32 input, and what has to live as long."""
    _, target, weight, _, _, s = request
    B, C, V = input.shape
    assert s.shape is not None
    shape = tuple(U(size) for size in ((1,) * (3 - len(s.shape)) + s.shape))
    label = torch.empty(B, V, dtype=torch.int16)
    first = 1 if C == 1 else 0
    for b in range(B):
        value = signed(target[b])
        label[b] = torch.where((value >= first) & (value < first + C), value, first + NONE).to(torch.int16) - first
        if s.ignore_index is not None:
            label[b][equals(target[b], s.ignore_index)] = IGNORED
        if weight is not None:
            label[b][~(weight[b] > 0)] = IGNORED
    skeleton = torch.zeros(B, V, dtype=torch.uint8)
    planes, numel = B * int(shape[0]), input.numel()
    larger, smaller, spare = label.numpy(), np.empty((B, V), np.int16), np.empty((B, V), np.int16)
    for _ in range(s.iterations + 1):
        for mark in (False, True):
            share_out(_shrink, (larger, smaller, skeleton.numpy(), shape, mark), planes, numel)
        larger, smaller, spare = smaller, spare, smaller
    del larger, smaller, spare
    log_sum = sliced.log_sum(input, s.activation)
    weights = torch.empty(0, 0, dtype=torch.float32) if weight is None else weight.float().contiguous()
    halo = s.iterations + 2
    per_sample, per_class, per_voxel = map(U, input.stride())
    work = Work(
        input=U(input.data_ptr()),
        per_sample=per_sample,
        per_class=per_class,
        per_voxel=per_voxel,
        log_sum=log_sum.numpy(),
        label=label.numpy(),
        skeleton=skeleton.numpy(),
        weight=weights.numpy(),
        shape=shape,
        tile=tuple(U(max(size, 2 * halo)) for size in TILE),
        C=U(C),
        levels=U(s.iterations + 1),
        activation=ACTIVATIONS.index(s.activation),
        weighted=weight is not None,
        flat=len(s.shape) == 2,
    )
    return work, [log_sum, input, label, skeleton, weights]


def _colours(work: Work, images: int) -> list[tuple[tuple[np.uint64, ...], int]]:
    """Return the colours, a tile's parity in each axis, each with the number of its tasks."""
    counts = [-(-int(size) // int(tile)) for size, tile in zip(work.shape, work.tile, strict=True)]
    colours = []
    for colour in product((0, 1), repeat=3):
        tiles = [(count + 1 - parity) // 2 for count, parity in zip(counts, colour, strict=True)]
        if all(tiles):
            colours.append((tuple(map(U, colour)), images * int(np.prod(tiles))))
    return colours


def forward(request: Request) -> Tensor:
    """Return the sums of skeletons (4, B, C) for labels (B, V)."""
    B, C, _ = request.input.shape
    if request.settings.validate:
        for voxels in sliced.slices(request.input):
            check.values(request.cut(slice(None), voxels))
    input = request.input.float()
    sums = torch.zeros(4, B, C, dtype=torch.float64)
    if input.numel():
        work, alive_ = _work(request, input)
        for colour, tasks in _colours(work, B * C):
            slots = np.zeros((tasks, 4))
            share_out(_sums, (work, colour, slots), tasks, input.numel())
            sums += torch.from_numpy(slots).view(B, C, -1, 4).sum(2).movedim(-1, 0)
        del alive_
    return sums.float()


def gradient(grad: Tensor, request: Request) -> Tensor:
    """Return dL/dinput for dL/dsums (4, B, C)."""
    B, C, _ = request.input.shape
    input = request.input.float()
    result = gradient_like(input)
    if input.numel():
        result.zero_()
        work, alive_ = _work(request, input)
        coefs = np.ascontiguousarray(grad.detach().float().numpy())
        for colour, tasks in _colours(work, B * C):
            arguments = work, colour, coefs, U(result.data_ptr()), tuple(U(step) for step in result.stride())
            share_out(_gradient, arguments, tasks, input.numel())
        log_sum = alive_[0]
        del work, arguments, alive_
        sliced.through_activation(result, input, log_sum, request.settings.activation)
    return result.to(request.input.dtype)
