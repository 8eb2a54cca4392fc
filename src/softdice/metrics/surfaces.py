"""Distances between the boundaries of two masks, and scores of these distances.

A boundary is a set of elements on a grid, each with a weight. Two definitions are in use, with different results:

* "voxels": the voxels of the mask that share a face with a voxel outside of it (what lies beyond the image is outside);
  each weighs 1. As in MONAI and MedPy.
* "surface": the corners of voxels around which not all 8 voxels (4 in 2-D) are alike; each weighs the area (length) of
  the surface that marching cubes draw between these voxels. As in DeepMind's surface-distance.

The distance of an element is the Euclidean one to the nearest element of the other boundary, in the unit of `spacing`.
This file has the definition, in NumPy and SciPy; `surfaces_kernel` has compiled loops.

S are the 2 or 3 axes of a mask, a bool array (*S); X, Y, Z three axes, of which X has length 1 for a 2-D mask; N the
elements of a boundary. `spacing` is the size of a voxel along each axis S. The code of an element is a byte that says
which voxels around it are inside the mask, see `elements`.

Source: S. Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for radiotherapy", J. Medical
Internet Research 23, 2021 (surface elements, surface Dice); A. A. Taha and A. Hanbury, "Metrics for evaluating 3D
medical image segmentation", BMC Medical Imaging 15, 2015 (the distances).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import permutations, product
from typing import Any, Literal, NamedTuple

import numpy as np

from softdice import validation
from softdice.backends.route import compiled_loops

Definition = Literal["voxels", "surface"]
Direction = Literal["symmetric", "from_input", "from_target"]

DEFINITIONS: tuple[Definition, ...] = ("voxels", "surface")
DIRECTIONS: tuple[Direction, ...] = ("symmetric", "from_input", "from_target")

SLACK = 1e-6
"""A distance may exceed a tolerance by this share and still be within: headers round spacings to float32, where three
times 0.1 is not 0.3."""

_TRIANGLES = {
    0b00000001: ["111"],
    0b00000011: ["220", "220"],
    0b00000110: ["111", "111"],
    0b00000111: ["111", "222", "400"],
    0b00001111: ["400", "400"],
    0b00010110: ["111", "111", "111"],
    0b00010111: ["111", "111", "222", "222"],
    0b00011000: ["111", "111"],
    0b00011001: ["111", "022", "022"],
    0b00011011: ["111", "333", "022", "202"],
    0b00011110: ["111", "111", "222", "400"],
    0b00111100: ["220", "220", "220", "220"],
    0b01101001: ["111", "111", "111", "111"],
}
"""Codes of a corner, a bit for each of its 8 voxels that is inside (bit 7: the first along all axes, bit 0: the last),
and the triangles that marching cubes draw there. A triangle is written as its normal, in eighths of a voxel's face
along each axis. The table has one code of each kind: rotating or mirroring it, or exchanging inside and outside, gives
others with the same triangles."""

_NEARBY = 500
"""Places around an element that are searched one by one."""

_COMPARISONS = 16
"""Pairs of elements that are compared in the time that a distance transform takes per voxel."""

_ROUNDING = 1e-12
"""Share of a sum of weights that rounding may add to it."""


class SurfaceDistances(NamedTuple):
    """The distance of each element of the boundaries of a class to the other boundary, with weights.

    Args:
        input, target: distances of the elements of each mask, (N,) float64. If only one of the masks has a voxel, its
            distances are one inf; a mask without voxels has no element.
        input_weight, target_weight: (N,) float64, None if every element weighs 1.
    """

    input: np.ndarray
    target: np.ndarray
    input_weight: np.ndarray | None = None
    target_weight: np.ndarray | None = None

    def sides(self, direction: Direction) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield distances and weights of the input's boundary, of the target's, or of both in this order."""
        if direction != "from_target":
            yield self.input, self.input_weight
        if direction != "from_input":
            yield self.target, self.target_weight


# --- distances -> score


def hausdorff(distances: SurfaceDistances, percentile: float | None, direction: Direction = "symmetric") -> float:
    """Return the largest distance between two boundaries, or the larger of the percentiles of both directions.

    `distances`: from each element of either boundary to the other one. `percentile`: in [0, 100], or None for the
    largest. `direction` may choose one of the boundaries. inf if one of the masks is empty, nan if both are.
    """
    empty_score = _empty_score(distances, np.inf)
    if empty_score is not None:
        return empty_score
    return max(_quantile(*side, percentile) for side in distances.sides(direction))


def average(distances: SurfaceDistances, direction: Direction = "symmetric") -> float:
    """Return the weighted mean distance from each element of either boundary, or of one, to the other boundary.

    inf if one of the masks is empty, nan if both are.
    """
    empty_score = _empty_score(distances, np.inf)
    if empty_score is not None:
        return empty_score
    sides = tuple(distances.sides(direction))
    sums = [values.sum() if weight is None else weight @ values for values, weight in sides]
    return float(sum(sums) / sum(_total_weight(*side) for side in sides))


def surface_overlap(distances: SurfaceDistances, tolerance: float) -> float:
    """Return the share, by weight, of both boundaries that lies within the tolerance of the other, in [0, 1].

    `distances`: from each element of either boundary to the other boundary, in the unit of the tolerance, >= 0. 0 if
    one of the masks is empty, nan if both are.
    """
    empty_score = _empty_score(distances, 0.0)
    if empty_score is not None:
        return empty_score
    sides, within = tuple(distances.sides("symmetric")), 0.0
    for values, weight in sides:
        near = values <= tolerance * (1 + SLACK)  # file headers round spacings to float32
        within += _total_weight(values[near], weight if weight is None else weight[near])
    return within / sum(_total_weight(*side) for side in sides)


def _total_weight(values: np.ndarray, weight: np.ndarray | None) -> float:
    """Return the sum of the weights (N,), N for None; alike for whole and subset, so that a full share is exactly 1."""
    return float(values.size if weight is None else weight.sum())


def _empty_score(distances: SurfaceDistances, worst: float) -> float | None:
    """Return nan if both masks are empty, `worst` if one is, None if neither is. No other place decides this."""
    if distances.input.size and distances.target.size:
        return None
    return worst if distances.input.size or distances.target.size else np.nan


def _quantile(values: np.ndarray, weight: np.ndarray | None, percentile: float | None) -> float:
    """Return a percentile in [0, 100] of distances (N,), N > 0, with weights (N,) or None; the largest for None.

    Without weights it is interpolated linearly between order statistics; with weights it is the first distance at
    which the percentile of the total weight is reached.
    """
    if percentile is None:
        return float(values.max())
    if weight is None:
        rank = percentile / 100 * (values.size - 1)  # as np.quantile does, but without its 0.1 ms of overhead
        ranks_around = [math.floor(rank), math.ceil(rank)]
        low, high = np.partition(values, ranks_around)[ranks_around].tolist()
        return float(low + (rank - ranks_around[0]) * (high - low))
    order = np.argsort(values, kind="stable")
    weight_sums = np.cumsum(weight[order])
    first = int(np.searchsorted(weight_sums, percentile / 100 * weight_sums[-1] * (1 - _ROUNDING)))
    return float(values[order[min(first, values.size - 1)]])


# --- masks -> distances: the definition


def measured(
    input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...], definition: Definition
) -> SurfaceDistances:
    """Measure the distances between two masks (*S) with a margin of one voxel, by the compiled loops if Numba is there.

    An empty mask has no distances, and one inf stands for all those of a mask whose counterpart is empty. `definition`
    says what an element of a boundary is, as at the top of this file.
    """
    input_present, target_present = bool(input.any()), bool(target.any())
    if not (input_present and target_present):
        return SurfaceDistances(np.full(int(input_present), np.inf), np.full(int(target_present), np.inf))
    return (surface_distances if kernels() is None else compiled_distances)(input, target, spacing, definition)


def between(definition: Definition) -> Callable[[np.ndarray, np.ndarray, tuple[float, ...]], SurfaceDistances]:
    """Return the `distances.Compare` that measures by a definition; raise ValueError for an unknown one."""
    validation.choice("definition", definition, DEFINITIONS)
    return partial(measured, definition=definition)


def surface_distances(
    input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...], definition: Definition
) -> SurfaceDistances:
    """Measure the distances between two masks (*S), neither of them empty: the definition.

    Example:
        >>> one, two = np.zeros((2, 5, 5), bool)
        >>> one[2, 1], two[2, 4] = True, True
        >>> surface_distances(one, two, (1.0, 0.5), "voxels").input
        array([1.5])
    """
    ndimage = validation.package("surface distances", "scipy.ndimage", "metrics")
    codes = [elements(mask, definition, ndimage) for mask in (input, target)]
    boundaries = [(code != 0) & (code != 255) for code in codes]
    distances = [
        ndimage.distance_transform_edt(~other, sampling=spacing)[boundary]
        for boundary, other in (boundaries, boundaries[::-1])
    ]
    codes_N = [code[boundary] for code, boundary in zip(codes, boundaries, strict=True)]
    return _weighted(distances, codes_N, spacing, definition)


def _weighted(
    distances: Sequence[np.ndarray], codes_N: Sequence[np.ndarray], spacing: tuple[float, ...], definition: Definition
) -> SurfaceDistances:
    """Return the distances (N,) of the input's and of the target's elements with the weights of their codes (N,)."""
    if definition == "voxels":
        return SurfaceDistances(*distances)
    sizes = element_sizes(spacing)
    return SurfaceDistances(*distances, *(sizes[code_N] for code_N in codes_N))


def elements(mask: np.ndarray, definition: Definition, ndimage: Any) -> np.ndarray:
    """Return the code of each place of the grid of elements of a mask (*S), uint8; 0 and 255 are no element.

    For "voxels" the grid is the mask's, and the code is 1 on the boundary. For "surface" it has the corners of the
    voxels, (n + 1) along each axis, and the code has a bit for each voxel around a corner that is inside; the voxel
    that comes first along all axes has the highest bit. In 2-D the 4 voxels around a corner count twice, as two equal
    layers, so that codes have 8 bits there, too. `ndimage` is SciPy's module.
    """
    if definition == "voxels":
        return np.asarray(mask & ~ndimage.binary_erosion(mask), np.uint8)
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for bit, corner in enumerate(product((1, 0), repeat=mask.ndim)):
        code = 1 << bit if mask.ndim == 3 else 0b10001 << bit
        neighbour = tuple(slice(start, start + n + 1) for start, n in zip(corner, mask.shape, strict=True))
        codes += np.uint8(code) * padded[neighbour]
    return codes


@lru_cache(maxsize=64)
def element_sizes(spacing: tuple[float, ...]) -> np.ndarray:
    """Return the area (3-D) or length (2-D) of the surface at a corner for each code, (256,) float64, read-only.

    Marching cubes put the corners of a triangle into the middle of edges between a voxel inside and one outside.
    `_TRIANGLES` has the normal n of each triangle, whose length is its area for voxels of size 1; for voxels of size s
    the area is |(nx sy sz, ny sx sz, nz sx sy)|.

    Example:
        >>> element_sizes((2.0, 3.0))[[17 * 0b0011, 17 * 0b0101, 17 * 0b0001]].round(4)
        array([3.    , 2.    , 1.8028])
    """
    sizes = np.zeros(256)
    if len(spacing) == 2:
        first, second = spacing
        diagonal = math.hypot(first, second) / 2
        lengths = {0b0011: second, 0b0101: first, 0b0110: 2 * diagonal}
        for code in range(1, 15):  # bits of the 4 voxels; 15 - code is the code with inside and outside exchanged
            sizes[0b10001 * code] = lengths.get(min(code, 15 - code), diagonal)
    else:
        faces = math.prod(spacing) / np.array(spacing) / 8  # of a voxel, across each axis; normals are in eighths
        for code, triangles in _TRIANGLES.items():
            normals = np.array([[*map(int, triangle)] for triangle in triangles])
            for order, flips in product(permutations(range(3)), product((0, 1), repeat=3)):
                turned = _turned(code, order, flips)
                area = np.linalg.norm(normals[:, order] * faces, axis=1).sum()
                sizes[[turned, 255 - turned]] = area
    sizes.setflags(write=False)
    return sizes


def _turned(code: int, order: tuple[int, ...], flips: tuple[int, ...]) -> int:
    """Return the code of a corner with its axes in another order, and then mirrored where `flips` has 1.

    Bit 7 - (4 x + 2 y + z) of a code is 1 if the voxel at x, y, z in {0, 1} around the corner is inside the mask. Axis
    i of the result is axis `order[i]` of the code, as in `np.transpose`; `flips` has 0 or 1 for each of its axes.
    """
    turned = 0
    for bit in range(8):
        if code >> bit & 1:
            position = [(7 - bit) >> shift & 1 for shift in (2, 1, 0)]
            x, y, z = (position[axis] ^ flip for axis, flip in zip(order, flips, strict=True))
            turned |= 1 << (7 - (4 * x + 2 * y + z))
    return turned


def kernels() -> Any:
    """Return the compiled loops, or None without Numba."""
    return compiled_loops("softdice.metrics.surfaces_kernel")


def compiled_distances(
    input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...], definition: Definition
) -> SurfaceDistances:
    """Measure the distances between two masks (*S) with a margin of one voxel, neither empty, by the compiled loops."""
    input_boundary, target_boundary = _boundary(input, definition), _boundary(target, definition)
    input_distances, input_codes = _one_way(input_boundary, target_boundary, spacing)
    target_distances, target_codes = _one_way(target_boundary, input_boundary, spacing)
    return _weighted((input_distances, target_distances), (input_codes, target_codes), spacing, definition)


class _Boundary(NamedTuple):
    """The code of each place of the grid of elements, (X, Y, Z) uint8, and the number of elements."""

    codes: np.ndarray
    number: int


def _boundary(mask: np.ndarray, definition: Definition) -> _Boundary:
    """Return the boundary of a mask (*S) with a margin of one voxel, as codes of `elements`, by the compiled loops."""
    # along each axis the loops read both neighbours of a voxel, or with "surface" the next one
    layers, margin = mask.view(np.uint8), 2 if definition == "voxels" else 1
    if mask.ndim == 2:  # between equal layers there is no boundary
        layers = np.stack([layers] * (1 + margin))
    codes = np.empty([n - margin for n in layers.shape], np.uint8)
    write = kernels().boundary_voxels if definition == "voxels" else kernels().surface_elements
    return _Boundary(codes, write(layers, codes))


def _one_way(boundary: _Boundary, other: _Boundary, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Measure from each element of a boundary to the nearest element of the other one, which is not empty.

    `surfaces_kernel` describes the two stages: a search near each element, then, for the elements that remain, all
    pairs or a distance transform, whichever is faster.

    Returns:
        Distances, (N,) float64, and the codes of the same elements, (N,) uint8.
    """
    loops, N, M = kernels(), boundary.number, other.number
    sizes_XYZ = np.array([1.0] * (3 - len(spacing)) + list(spacing))
    distance_N, code_N, remaining = np.empty(N), np.empty(N, np.uint8), np.empty((N, 4), np.int64)
    remain = loops.near(boundary.codes, other.codes, *_steps(spacing), distance_N, code_N, remaining)
    if remain * M < _COMPARISONS * boundary.codes.size:  # all pairs are faster than a transform of the box
        positions = np.empty((3, M))
        loops.places(other.codes, positions)
        loops.compare(remaining[:remain], positions, sizes_XYZ, distance_N)
    else:
        square = np.empty(boundary.codes.shape)
        loops.squares(other.codes, sizes_XYZ, square)
        loops.look_up(remaining[:remain], square, sizes_XYZ[0], distance_N)
    return distance_N, code_N


@lru_cache(maxsize=64)
def _steps(spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return all steps (K, 3) int64 from a place to the `_NEARBY` ones around it, and their lengths (K,), ascending."""
    sizes = np.array([1.0] * (3 - len(spacing)) + list(spacing))
    volume = _NEARBY * math.prod(spacing)
    radius = math.sqrt(volume / math.pi) if len(spacing) == 2 else (0.75 * volume / math.pi) ** (1 / 3)
    farthest = [0] * (3 - len(spacing)) + [int(radius / size) for size in spacing]
    steps = np.array(list(product(*(range(-n, n + 1) for n in farthest))))
    lengths = np.sqrt((steps * sizes) ** 2 @ np.ones(3))
    order = [i for i in np.argsort(lengths, kind="stable") if lengths[i] <= radius]
    return steps[order], lengths[order]
