"""two masks -> how far their boundaries lie apart, and the scores that are made of these distances.

A boundary is a set of elements on a grid, each with a weight. Two definitions are in use, and they give other numbers:

* "voxels": the voxels of the mask that share a face with a voxel outside of it (what lies beyond the image is outside);
  each weighs 1. As in MONAI and MedPy.
* "surface": the corners of voxels around which not all 8 voxels (4 in 2-D) are alike; each weighs the area (length) of
  the surface that marching cubes draw between these voxels. As in DeepMind's surface-distance.

The distance of an element is the Euclidean one to the nearest element of the other boundary, in the unit of `spacing`.
Here stands the definition, in NumPy and SciPy; `surfaces_kernel` has the same loops compiled.

Source: S. Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for radiotherapy", J. Medical
Internet Research 23, 2021 (surface elements, surface Dice); A. A. Taha and A. Hanbury, "Metrics for evaluating 3D
medical image segmentation", BMC Medical Imaging 15, 2015 (the distances).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
"""A distance that is above a tolerance by no more than this share of it counts as within: headers round spacings to
float32, and three times 0.1 is not 0.3 there."""


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
"""Which of 8 voxels are inside (bit 7: the first along all axes, bit 0: the last) -> the triangles between them, by the
normal of each, in eighths of a voxel's face along each axis. Of each kind one: turned, mirrored, or with inside and
outside exchanged, triangles are the same."""


_AROUND = 500
"""Places around an element that are looked at one by one."""

_WORTH = 16
"""Pairs of elements that are compared in the time that a voxel of a distance transform takes."""


class SurfaceDistances(NamedTuple):
    """Of one class: the distance of each element of a boundary to the other boundary, (N,) float64.

    Weights are None where every element weighs 1. Where only one of the two masks has a voxel, the distances of its
    elements are inf; a mask without voxels has no element.
    """

    input: np.ndarray
    target: np.ndarray
    input_weight: np.ndarray | None = None
    target_weight: np.ndarray | None = None

    @classmethod
    def absent(cls, in_input: bool, in_target: bool) -> SurfaceDistances:
        """Of a class that one of the two masks lacks, or both."""
        return cls(*(np.full(int(there), np.inf) for there in (in_input, in_target)))

    def sides(self, direction: Direction) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Distances and weights, of one boundary or of both."""
        if direction != "from_target":
            yield self.input, self.input_weight
        if direction != "from_input":
            yield self.target, self.target_weight


# --- distances -> score


def hausdorff(distances: SurfaceDistances, percentile: float | None, direction: Direction = "symmetric") -> float:
    """distances -> the largest, or a percentile: the larger of the two directions."""
    return _judged(distances, np.inf, lambda: max(_quantile(*side, percentile) for side in distances.sides(direction)))


def average(distances: SurfaceDistances, direction: Direction = "symmetric") -> float:
    """distances -> their weighted mean, over the elements of both boundaries or of one."""

    def mean() -> float:
        sums = [values.sum() if weight is None else weight @ values for values, weight in sides]
        return sum(sums) / sum(_size(*side) for side in sides)

    sides = tuple(distances.sides(direction))
    return _judged(distances, np.inf, mean)


def surface_overlap(distances: SurfaceDistances, tolerance: float) -> float:
    """distances -> the share of both boundaries that lies within the tolerance of the other, in [0, 1]."""

    def share() -> float:
        near = [(values <= tolerance * (1 + SLACK), values, weight) for values, weight in sides]
        within = sum(_size(values[at], weight if weight is None else weight[at]) for at, values, weight in near)
        return within / sum(_size(*side) for side in sides)

    sides = tuple(distances.sides("symmetric"))
    return _judged(distances, 0.0, share)


def _size(values: np.ndarray, weight: np.ndarray | None) -> float:
    """How much elements weigh together; summed alike for all and for a part, so that a share of 1 is exactly 1."""
    return float(values.size if weight is None else weight.sum())


def _judged(distances: SurfaceDistances, worst: float, score: Callable[[], float]) -> float:
    """The one place that says what empty masks score: nan where both are empty, the worst where one of them is."""
    if distances.input.size == 0 or distances.target.size == 0:
        return worst if distances.input.size or distances.target.size else np.nan
    return float(score())


def _quantile(values: np.ndarray, weight: np.ndarray | None, percentile: float | None) -> float:
    """Of voxels linear interpolation between order statistics; of areas the first distance that reaches the share."""
    if percentile is None:
        return float(values.max())
    if weight is None:
        position = percentile / 100 * (values.size - 1)  # as np.quantile, which needs 0.1 ms of its own
        around = [math.floor(position), math.ceil(position)]
        low, high = np.partition(values, around)[around].tolist()
        return float(low + (position - around[0]) * (high - low))
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order])
    first = int(np.searchsorted(reached, percentile / 100 * reached[-1] * (1 - 1e-12)))
    return float(values[order[min(first, values.size - 1)]])


# --- masks -> distances: the definition


def measured(
    input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...], definition: Definition
) -> SurfaceDistances:
    """mask, mask -> distances, of masks within a margin of one voxel outside; by the compiled loops where they are."""
    there = bool(input.any()), bool(target.any())
    if not all(there):
        return SurfaceDistances.absent(*there)
    return (surface_distances if kernels() is None else compiled_distances)(input, target, spacing, definition)


def between(definition: Definition) -> Callable[[np.ndarray, np.ndarray, tuple[float, ...]], SurfaceDistances]:
    """definition -> masks, masks, spacing -> distances."""
    validation.choice("definition", definition, DEFINITIONS)
    return partial(measured, definition=definition)


def surface_distances(
    input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...], definition: Definition
) -> SurfaceDistances:
    """mask, mask -> distances; bool arrays (*S) of 2 or 3 axes.

    Example:
        >>> one, two = np.zeros((2, 5, 5), bool)
        >>> one[2, 1], two[2, 4] = True, True
        >>> surface_distances(one, two, (1.0, 0.5), "voxels").input
        array([1.5])
    """
    if not (input.any() and target.any()):
        return SurfaceDistances.absent(bool(input.any()), bool(target.any()))
    ndimage = validation.package("surface distances", "scipy.ndimage", "metrics")
    codes = [elements(mask, definition, ndimage) for mask in (input, target)]
    there = [(code != 0) & (code != 255) for code in codes]
    far = [ndimage.distance_transform_edt(~other, sampling=spacing)[own] for own, other in (there, there[::-1])]
    if definition == "voxels":
        return SurfaceDistances(*far)
    sizes = element_sizes(spacing)
    return SurfaceDistances(*far, *(sizes[code[own]] for code, own in zip(codes, there, strict=True)))


def elements(mask: np.ndarray, definition: Definition, ndimage: Any) -> np.ndarray:
    """mask -> uint8 on the grid of the elements: 0 and 255 where there is none.

    Voxels: 1 on the boundary. Surface: on the corners of the voxels, (n + 1) along each axis, a bit for each voxel
    around a corner; the one that comes first along all axes has the highest. In 2-D there are 4, and each counts as if
    it stood in both of two layers.
    """
    if definition == "voxels":
        return np.asarray(mask & ~ndimage.binary_erosion(mask), np.uint8)
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for bit, corner in enumerate(product((1, 0), repeat=mask.ndim)):
        code = 1 << bit if mask.ndim == 3 else 17 << bit
        codes += np.uint8(code) * padded[tuple(slice(at, at + n + 1) for at, n in zip(corner, mask.shape, strict=True))]
    return codes


@lru_cache(maxsize=64)
def element_sizes(spacing: tuple[float, ...]) -> np.ndarray:
    """spacing -> area (3-D) or length (2-D) of the surface at a corner, for each of its 256 codes.

    Marching cubes put the corners of triangles into the middle of edges between voxels of which one is inside. A
    triangle is its normal, as long as its area is large: with axes stretched by s its area is |(nx sy sz, ny sx sz,
    nz sx sy)|.

    Example:
        >>> element_sizes((2.0, 3.0))[[17 * 0b0011, 17 * 0b0101, 17 * 0b0001]].round(4)
        array([3.    , 2.    , 1.8028])
    """
    sizes = np.zeros(256)
    if len(spacing) == 2:
        first, second = spacing
        diagonal = math.hypot(first, second) / 2
        lengths = {0b0011: second, 0b0101: first, 0b0110: 2 * diagonal}
        for code in range(1, 15):
            sizes[17 * code] = lengths.get(min(code, 15 - code), diagonal)
    else:
        faces = math.prod(spacing) / np.array(spacing) / 8
        for code, triangles in _TRIANGLES.items():
            normals = np.array([[*map(int, triangle)] for triangle in triangles])
            for turn, mirror in product(permutations(range(3)), product((0, 1), repeat=3)):
                turned = _turned(code, turn, mirror)
                area = np.linalg.norm(normals[:, turn] * faces, axis=1).sum()
                sizes[[turned, 255 - turned]] = area
    sizes.setflags(write=False)
    return sizes


def _turned(code: int, turn: tuple[int, ...], mirror: tuple[int, ...]) -> int:
    """code of a corner -> the same after the axes were exchanged and mirrored."""
    turned = 0
    for bit in range(8):
        if code >> bit & 1:
            place = [(7 - bit) >> shift & 1 for shift in (2, 1, 0)]
            x, y, z = (place[axis] ^ flip for axis, flip in zip(turn, mirror, strict=True))
            turned |= 1 << (7 - (4 * x + 2 * y + z))
    return turned


def kernels() -> Any:
    """The compiled loops, None where Numba is not installed."""
    return compiled_loops("softdice.metrics.surfaces_kernel")


def compiled_distances(
    input: np.ndarray, target: np.ndarray, spacing: tuple[float, ...], definition: Definition
) -> SurfaceDistances:
    """The same as `surface_distances` from the compiled loops, of masks within a margin of one voxel outside."""
    loops, flat, voxels = kernels(), len(spacing) == 2, definition == "voxels"
    sizes = np.array([1.0] * flat + list(spacing))
    sides, counts = [], []
    for mask in (input, target):
        layers = mask.view(np.uint8)
        if flat:  # a layer between others like it: all that its voxels know of the missing axis
            layers = np.stack([layers] * (2 + voxels))
        codes = np.empty([n - (2 if voxels else 1) for n in layers.shape], np.uint8)
        counts.append((loops.boundary_voxels if voxels else loops.surface_elements)(layers, codes))
        sides.append(codes)
    steps, reach = _steps(spacing)
    found = []
    for own, other, count, others in zip(sides, sides[::-1], counts, counts[::-1], strict=True):
        far, code, left = np.empty(count), np.empty(count, np.uint8), np.empty((count, 4), np.int64)
        left = left[: loops.near(own, other, steps, reach, far, code, left)]
        if len(left) * others < _WORTH * own.size:
            places = np.empty((3, others))
            loops.places(other, places)
            loops.compare(left, places, sizes, far)
        else:
            square = np.empty(own.shape)
            loops.squares(other, sizes, square)
            loops.look_up(left, square, sizes[0], far)
        found.append((far, code))
    (far_i, code_i), (far_t, code_t) = found
    if voxels:
        return SurfaceDistances(far_i, far_t)
    weights = element_sizes(spacing)
    return SurfaceDistances(far_i, far_t, weights[code_i], weights[code_t])


@lru_cache(maxsize=64)
def _steps(spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """spacing -> all steps from a voxel within some radius, (K, 3), and their lengths, (K,), ascending."""
    sizes = np.array([1.0] * (3 - len(spacing)) + list(spacing))
    volume = _AROUND * math.prod(spacing)
    radius = math.sqrt(volume / math.pi) if len(spacing) == 2 else (0.75 * volume / math.pi) ** (1 / 3)
    most = [0] * (3 - len(spacing)) + [int(radius / size) for size in spacing]
    steps = np.array(list(product(*(range(-n, n + 1) for n in most))))
    lengths = np.sqrt((steps * sizes) ** 2 @ np.ones(3))
    order = [i for i in np.argsort(lengths, kind="stable") if lengths[i] <= radius]
    return steps[order], lengths[order]
