"""Count the voxels of each class in two label maps: the one place where hard segmentations are compared.

With p and t the labels of a voxel, per class c:  both_c = #[p = c and t = c],  prediction_c = #[p = c],
target_c = #[t = c]. Dice, Jaccard, precision and recall are functions of these (`formulas`). Every label map is
read once, whatever the number of classes. On the CPU Numba counts, on `torch.get_num_threads()` threads; without
Numba, and on other devices, `torch.bincount` does. Counts are integers, and every implementation returns the same.

Arrays are split into pieces, one per task of a thread, and these into blocks that fit in cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdice.backends.route import compiled_loops
from softdice.internals import untraced
from softdice.parallel.threads import for_each
from softdice.statistics.request import equals
from softdice.validation import are_tensors, fail, message, same_device

CHUNK = 1 << 20
"""Bytes of a block, and voxels that torch converts at a time: 8 MiB as int64."""

ADVICE = "Raise num_classes, remap the labels, or set ignore_index."

_TASK = 1 << 20
"""Voxels that are worth a task: fewer cost more than they save, each task having tables of 576 KiB."""

_SIDE = 512
"""Voxels along the two fast axes of a block, where the two arrays have their axes in another order in memory."""


def _kernels() -> Any:
    """Return the compiled loops, or None without Numba."""
    return compiled_loops("softdice.metrics.counting_kernel")


def class_counts(
    prediction: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = None,
) -> Tensor:
    """Return the counts of each class, (3, C) int64: voxels of both maps, of the prediction, of the target.

    Args:
        prediction: bool or integer labels in [0, C), any shape, any strides.
        target: bool or integer labels of the same shape, on the same device, in [0, C) or `ignore_index`.
        num_classes: C.
        ignore_index: voxels where target has this label are not counted, whatever was predicted there; where it is one
            of the classes, that class has counts of 0: it is not scored.

    Raises:
        ValueError: shapes differ, or a label outside [0, C) (on the CPU; on other devices an assertion that needs no
            host sync fails).
        TypeError: an argument that is no Tensor, or labels that are not integers.

    Example:
        >>> class_counts(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), 3)
        tensor([[1, 1, 1],
                [1, 2, 1],
                [1, 1, 2]])
    """
    check_maps("prediction", prediction, target)
    same_device(prediction.device, "prediction", target=target)
    if prediction.is_meta:
        return prediction.new_empty((3, num_classes), dtype=torch.int64)
    prediction, target = prediction.detach(), target.detach()
    if prediction.device.type == "cpu" and _kernels() is not None:
        counts = torch.from_numpy(_counts_cpu(prediction.numpy(), target.numpy(), num_classes, ignore_index))
    else:
        counts = _counts_torch(prediction, target, num_classes, ignore_index)
    outside = counts[1:, num_classes].sum()  # both return a last column of labels outside [0, C)
    if counts.is_cuda:
        torch._assert_async(outside == 0, message(f"labels in [0, {num_classes})", "others", ADVICE))
    elif outside:
        left_out = ignored(target, ignore_index)
        check_labels("prediction", prediction, num_classes, None, left_out)
        check_labels("target", target, num_classes, ignore_index, left_out)
    if ignore_index is not None and 0 <= ignore_index < num_classes:
        counts[:, ignore_index] = 0
    return counts[:, :num_classes]


def check_maps(name: str, labels: Tensor, target: Tensor) -> None:
    """Raise TypeError or ValueError unless labels, an argument of that name, and target are integers of one shape."""
    maps = {name: labels, "target": target}
    are_tensors(**maps)
    for argument, values in maps.items():
        if values.is_floating_point() or values.is_complex():
            fail(f"integer labels in {argument}", values.dtype, "Convert with .long(), or take argmax.", TypeError)
    if labels.shape != target.shape:
        fail(f"target of shape {tuple(labels.shape)}", tuple(target.shape), "Bring both to the same shape.")


def check_ignore_index(ignore_index: object) -> None:
    """Raise TypeError if the value is neither an int nor None."""
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        fail("ignore_index to be an int or None", repr(ignore_index), "Pass the label to leave out.", TypeError)


def ignored(target: Tensor, ignore_index: int | None) -> Tensor:
    """Return a mask of the voxels that do not count: the one place that decides what ignore_index means.

    Labels are compared as numbers: no voxel has a label that its dtype cannot hold (-1 in uint8).
    """
    return torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else equals(target, ignore_index)


def check_labels(name: str, labels: Tensor, num_classes: int, ignore_index: int | None, left_out: Tensor) -> None:
    """Raise ValueError if a voxel that counts has a label outside [0, C); on CUDA assert it without a host sync.

    Meta tensors have no values and pass.
    """
    wide = labels.to(torch.int64)
    wrong = ((wide < 0) | (wide >= num_classes)) & ~left_out
    allowed = f"{name} with labels in [0, {num_classes})" + ("" if ignore_index is None else f" or {ignore_index}")
    if wrong.is_cuda or wrong.is_meta:
        torch._assert_async(~wrong.any(), message(allowed, "others", ADVICE))
    elif wrong.any():
        got = f"{labels[wrong][0].item()} ({int(wrong.sum())} voxels)"
        fail(allowed, got, ADVICE)


def label_maps(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return label maps; two arrays that are one-hot along dimension 1 become the numbers of their classes.

    Label maps whose dimension 1 happens to have C entries are returned as they are. Masks of several classes that are
    not one-hot raise ValueError if they cannot be label maps: bool, or more than two classes and no value above 1.

    Example:
        >>> hot = torch.tensor([[[1, 0], [0, 1], [0, 0]]])
        >>> label_maps(hot, hot, 3, None)[0]
        tensor([[0, 1]])
    """
    C = num_classes
    if C < 2 or target.dim() < 3 or target.shape != prediction.shape or target.shape[1] != C or not target.numel():
        return prediction, target
    if target.is_meta:  # no values show whether they are one-hot; the counts have one shape either way
        return prediction, target
    void = torch.zeros_like(target, dtype=torch.bool) if ignore_index in (0, 1) else ignored(target, ignore_index)
    inside = [prediction == 1, (target == 1) | void]
    if not ((inside[0] | (prediction == 0)).all() and (inside[1] | (target == 0)).all()):
        return prediction, target
    if all((mask.sum(1) == 1).all() for mask in inside) and not void.any():
        return tuple(mask.to(torch.uint8).argmax(1) for mask in inside)  # type: ignore[return-value]
    if C > 2 or torch.bool in (prediction.dtype, target.dtype):
        advice = "Pass threshold=0.5 to DiceScore for masks of classes that overlap, label maps as (B, 1, *S)."
        fail("label maps, or classes that are one-hot along dimension 1", "only 0 and 1 in both", advice)
    return prediction, target


def numbers_of(values: object) -> Any:
    """Return a number of NumPy or torch as Python's, and an array or a sequence of numbers as a tuple of those.

    Anything else is returned as it is, for the check that follows.

    Example:
        >>> numbers_of(np.float32(0.5)), numbers_of(torch.tensor([1, 2])), numbers_of([np.int64(3), 1.5])
        (0.5, (1, 2), (3, 1.5))
    """
    if isinstance(values, (Tensor, np.ndarray, np.generic)):
        values = values.tolist()
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes)):
        return tuple(map(numbers_of, values))
    return values


def as_tensor(array: Any) -> Any:
    """Return a tensor of an array of NumPy, or of anything that speaks DLPack, without a copy where torch allows it.

    Anything else is returned as it is, for the check that follows.

    Example:
        >>> as_tensor(np.array([[0, 1]], np.uint8))
        tensor([[0, 1]], dtype=torch.uint8)
    """
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ndarray) and array.dtype.kind in "biufc":
        array = np.asarray(array, array.dtype.newbyteorder("="))
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):  # torch takes neither
            array = array.copy()
        return torch.from_numpy(array)
    if hasattr(array, "__dlpack__") and not isinstance(array, (np.ndarray, np.generic)):
        return torch.from_dlpack(array)
    return array


@untraced
def pair_counts(prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return every pair of labels that occurs, as labels of the prediction and of the target, and how often; int64.

    For labels that are not known beforehand: any number of them, of any integer type, negative ones included; labels
    above 2^63 are returned as Python's ints. Arrays of bytes are read in place, others are mapped to bytes block by
    block; with more than 256 labels they are sorted instead.

    Example:
        >>> p, t, n = pair_counts(np.array([5, 5, -1]), np.array([5, 5, 300]))
        >>> p.tolist(), t.tolist(), n.tolist()
        ([-1, 5], [300, 5], [1, 2])
    """
    tables = [_byte_table(array) for array in (prediction, target)]
    if any(labels is None for labels, _ in tables):
        return _sorted_pairs(prediction, target)
    (labels_p, as_byte_p), (labels_t, as_byte_t) = tables
    table = _pair_table(prediction, target, as_byte_p, as_byte_t)
    p, t = np.nonzero(table)
    assert labels_p is not None
    assert labels_t is not None
    return labels_p[p], labels_t[t], table[p, t]


# --- CPU, Numba -------------------------------------------------------------------------------------------------------


@untraced
def _counts_cpu(prediction: np.ndarray, target: np.ndarray, num_classes: int, ignore_index: int | None) -> np.ndarray:
    """Return counts (3, C + 1), the last column of labels outside [0, C)."""
    is_bytes = all(array.dtype in (np.uint8, np.bool_) for array in (prediction, target))
    if is_bytes and num_classes <= 256 and prediction.size >= 1 << 16:
        table = _pair_table(prediction, target, _as_bytes, _as_bytes)
        if ignore_index is not None and 0 <= ignore_index < 256:  # as in `ignored`: a byte holds no other number
            table[:, ignore_index] = 0
        counts = np.zeros((3, num_classes + 1), np.int64)
        for row, sums in zip(counts, (np.diagonal(table), table.sum(1), table.sum(0)), strict=True):
            row[:num_classes] = sums[:num_classes]
            row[num_classes] = sums[num_classes:].sum()
        return counts
    limits = np.iinfo(np.uint8 if target.dtype == np.bool_ else target.dtype)
    skip = ignore_index is not None and limits.min <= ignore_index <= limits.max  # as in `ignored`
    left_out = np.uint64((ignore_index or 0) % 2**64).astype(np.int64)  # the loop reads labels above 2^63 like this

    def count(p: np.ndarray, t: np.ndarray) -> np.ndarray:
        counts = np.zeros((3, num_classes + 1), np.int64)
        for block in _blocks(p, t):
            flat = (_as_bytes(array) if array.dtype == np.bool_ else array for array in block)
            _kernels().count_labels(*flat, skip, left_out, counts)
        return counts

    return np.zeros((3, num_classes + 1), np.int64) + _summed(count, prediction, target)


def _pair_table(
    prediction: np.ndarray,
    target: np.ndarray,
    as_byte_p: Callable[[np.ndarray], np.ndarray],
    as_byte_t: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return how often each pair of bytes occurs, (256, 256) int64; two functions map blocks of the arrays to bytes."""
    kernels = _kernels()

    def count(p: np.ndarray, t: np.ndarray) -> np.ndarray:
        blocks = ((as_byte_p(p), as_byte_t(t)) for p, t in _blocks(p, t))
        if kernels is None:
            table = torch.zeros(1 << 16, dtype=torch.int64)
            for p, t in blocks:
                pairs = torch.from_numpy(p.astype(np.int64)).mul_(256).add_(torch.from_numpy(t))
                table += torch.bincount(pairs, minlength=1 << 16)
            return table.numpy().reshape(256, 256)
        tables = kernels.tables()
        for p, t in blocks:
            kernels.count_bytes(p, t, *tables)
        return np.asarray(kernels.total(*tables))

    return np.zeros((256, 256), np.int64) + _summed(count, prediction, target)


def _summed(count: Callable[[np.ndarray, np.ndarray], np.ndarray], prediction: np.ndarray, target: np.ndarray) -> Any:
    """Return the sum of `count` over all pieces, 0 without voxels; the order of integers does not matter."""
    total: Any = 0
    lock, pieces = threading.Lock(), list(_pieces(prediction, target))

    def add(piece: tuple[np.ndarray, np.ndarray]) -> None:
        nonlocal total
        counts = count(*piece)
        with lock:
            total = total + counts

    for_each(add, pieces, min(torch.get_num_threads(), len(pieces)))
    return total


def _pieces(prediction: np.ndarray, target: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield views of the same voxels of both arrays, a task each.

    They are flat if both arrays have their axes in one order in memory, whichever it is. Otherwise they are boxes with
    the axes permuted so that the target is contiguous along the last axis, and the prediction along the one before it.
    """
    if prediction.size == 0:
        return
    order = sorted(range(target.ndim), key=lambda axis: (-abs(target.strides[axis]), axis))
    p, t = prediction.transpose(order), target.transpose(order)
    if p.flags.c_contiguous and t.flags.c_contiguous:
        p, t = p.reshape(-1), t.reshape(-1)
    elif p.ndim > 1:
        along = min(range(p.ndim), key=lambda axis: (p.shape[axis] == 1, abs(p.strides[axis])))
        if along != p.ndim - 1:
            p, t = np.moveaxis(p, along, -2), np.moveaxis(t, along, -2)
    # about four tasks per thread, so that no thread ends long before the others
    voxels = max(_TASK, -(-p.size // (4 * torch.get_num_threads())))
    yield from _boxes(p, t, min(voxels, 1 << 30), p.size)


def _blocks(p: np.ndarray, t: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield flat blocks of a piece, at most 1 MiB each: views, or copies if the memory has another order."""
    for box in _boxes(p, t, CHUNK // max(p.itemsize, t.itemsize), _SIDE if p.ndim > 1 else p.size):
        yield _flat(box[0]), _flat(box[1])


def _boxes(p: np.ndarray, t: np.ndarray, voxels: int, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield views of boxes of at most `voxels` voxels, at most `side` along each of the last two axes."""
    sizes = list[int]()
    for axis in reversed(range(p.ndim)):
        sizes.insert(0, min(p.shape[axis], voxels, side if len(sizes) < 2 else voxels))
        voxels = max(1, voxels // sizes[0])
    for corner in product(*(range(0, n, size) for n, size in zip(p.shape, sizes, strict=True))):
        box = tuple(slice(at, at + size) for at, size in zip(corner, sizes, strict=True))
        yield p[box], t[box]


def _flat(box: np.ndarray) -> np.ndarray:
    """Return a box as one row: a view if it is contiguous, else a copy, by squares if its last axes are swapped."""
    if box.flags.c_contiguous:
        return box.reshape(-1)
    if box.ndim < 2 or abs(box.strides[-1]) <= abs(box.strides[-2]) or _kernels() is None:
        return np.ascontiguousarray(box).reshape(-1)
    rows = np.empty(box.shape, box.dtype)
    planes = box if box.ndim > 2 else box[None]
    for at in np.ndindex(planes.shape[:-3]):
        _kernels().gather(planes[at], rows.reshape(planes.shape)[at])
    return rows.reshape(-1)


def plain_bools(array: np.ndarray) -> np.ndarray:
    """Return an array in which True is the byte 1, as NumPy has it: some libraries write 255."""
    return array.view(np.uint8) != 0 if array.dtype == np.bool_ else array


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """Return an array of one byte per label as uint8."""
    return plain_bools(array).view(np.uint8)


def _byte_table(array: np.ndarray) -> tuple[np.ndarray | None, Callable[[np.ndarray], np.ndarray]]:
    """Return a table of labels, and a function that maps a block to their positions in it as bytes.

    (None, ...) if the array has more than 256 labels.
    """
    if array.dtype.itemsize == 1:
        labels = np.arange(256)
        return labels.astype(np.uint8).view(np.int8).astype(np.int64) if array.dtype == np.int8 else labels, _as_bytes
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low >= 0 and high < 256:
        return np.arange(256), lambda piece: piece.astype(np.uint8)
    if high - low < 1 << 20 and high < 2**63:
        present = np.zeros(high - low + 1, bool)
        for piece in _pieces(array, array):
            for block, _ in _blocks(*piece):
                present[block.astype(np.int64) - low] = True
        labels = np.flatnonzero(present) + low
        position = np.cumsum(present) - 1
        if len(labels) <= 256:
            return labels, lambda piece: position[piece.astype(np.int64) - low].astype(np.uint8)
    return None, _as_bytes


def _sorted_pairs(prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `pair_counts` does, by sorting."""
    labels_p, p = np.unique(prediction, return_inverse=True)
    labels_t, t = np.unique(target, return_inverse=True)
    pairs, counts = np.unique(p.reshape(-1) * len(labels_t) + t.reshape(-1), return_counts=True)
    both = labels_p[pairs // len(labels_t)], labels_t[pairs % len(labels_t)]
    dtype = object if max(labels_p[-1], labels_t[-1]) >= 2**63 else np.int64
    return both[0].astype(dtype), both[1].astype(dtype), counts.astype(np.int64)


# --- any device, torch ------------------------------------------------------------------------------------------------


def _counts_torch(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Return counts (3, C + 1), the last column of labels outside [0, C)."""
    C = num_classes
    outside, left_out = C, C + 1  # columns behind those of the classes
    counts = torch.zeros(3, C + 2, dtype=torch.int64, device=prediction.device)
    flat_p, flat_t = prediction.reshape(-1), target.reshape(-1)
    for start in range(0, flat_p.numel(), CHUNK):
        p, t = (flat[start : start + CHUNK].to(torch.int64) for flat in (flat_p, flat_t))
        ignored_V = ignored(flat_t[start : start + CHUNK], ignore_index)
        columns_p, columns_t = (
            torch.where((labels >= 0) & (labels < C), labels, outside).masked_fill(ignored_V, left_out)
            for labels in (p, t)
        )
        columns_both = columns_p.masked_fill(p != t, left_out)
        counts += torch.stack([torch.bincount(at, minlength=C + 2) for at in (columns_both, columns_p, columns_t)])
    return counts[:, : C + 1]
