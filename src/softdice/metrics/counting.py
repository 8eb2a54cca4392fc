"""Count the voxels of each class in two label maps: the one place where hard segmentations are compared.

With p and t the labels of a voxel, per class c:  both_c = #[p = c and t = c],  prediction_c = #[p = c],
target_c = #[t = c]. Dice, Jaccard, precision and recall are functions of these (`formulas`). Every label map is
read once, whatever the number of classes. On the CPU Numba counts, on `torch.get_num_threads()` threads; without
Numba, and on other devices, `torch.bincount` does. Counts are integers, and every implementation returns the same.

Arrays are split into pieces, one per task of a thread, and these into blocks that fit in cache. C is the number of
classes, V voxels, S the axes of an image. `prediction` and `target`, or in a piece or block `p` and `t`, are label maps
of one shape, whose axes may lie in memory in any order. `left_out` is a bool mask of the voxels that do not count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdice.backends.route import compiled_loops
from softdice.internals import untraced
from softdice.parallel.threads import for_each
from softdice.statistics.check import labels_advice
from softdice.statistics.request import equals
from softdice.validation import are_tensors, fail, message, same_device

CHUNK = 1 << 20
"""Bytes of a block, and voxels that torch converts at a time: 8 MiB as int64."""

ADVICE = "Raise num_classes, remap the labels, or set ignore_index."

_TASK = 1 << 20
"""Voxels that are worth a task: fewer cost more than they save, each task having tables of 576 KiB."""

_MANY = 1 << 16
"""From this many voxels on a table of all pairs of bytes, which has as many entries, pays."""

_RANGE = 1 << 20
"""Labels that spread over less than this are looked up in a table; others are sorted."""

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
        ValueError: shapes differ, or a label is outside [0, C); on CUDA an assertion fails later, without a host sync.
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
    outside = counts[1:, num_classes].sum()  # the last column counts labels outside [0, C)
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
    """Raise TypeError unless both maps are Tensors of bool or integers; raise ValueError unless they have one shape.

    `name` is what the caller's argument `labels` is called, for the message.
    """
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
    """Return a bool mask of the target's shape, True where voxels do not count: the one place that decides this.

    Labels are compared as numbers: no voxel has a label that its dtype cannot hold (-1 in uint8).
    """
    return torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else equals(target, ignore_index)


def check_labels(name: str, labels: Tensor, num_classes: int, ignore_index: int | None, left_out: Tensor) -> None:
    """Raise ValueError if a voxel that counts has a label outside [0, C); on CUDA assert it without a host sync.

    Args:
        name: what the caller's argument is called, for the message.
        labels: bool or integers, any shape; a meta tensor has no values and passes.
        ignore_index: named in the message as one more allowed label; None for none. Only `left_out` decides.
        left_out: bool mask of the same shape, True where a voxel does not count, whatever its label.
    """
    wide = labels.to(torch.int64)
    wrong = ((wide < 0) | (wide >= num_classes)) & ~left_out
    allowed = f"{name} with labels in [0, {num_classes})" + ("" if ignore_index is None else f" or {ignore_index}")
    if wrong.is_cuda or wrong.is_meta:
        torch._assert_async(~wrong.any(), message(allowed, "others", ADVICE))
    elif wrong.any():
        value = labels[wrong][0].item()
        fail(allowed, f"{value} ({int(wrong.sum())} voxels)", labels_advice(name, ignore_index, value))


def label_maps(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return two label maps; if both arrays are one-hot (B, C, *S), the maps (B, *S), int64, that they stand for.

    Label maps whose dimension 1 happens to have C entries are returned as they are, and so are shapes that differ,
    for the check that follows.

    Args:
        prediction, target: bool or integers, on one device.

    Raises:
        ValueError: both hold only 0 and 1 (the target also `ignore_index`) and are not one-hot, as masks of classes
            that overlap. Integers with C = 2 are returned: label maps of two classes hold nothing else.

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
    # void: where a target mask holds ignore_index and so does not count; 0 and 1 are a mask's usual values
    void = torch.zeros_like(target, dtype=torch.bool) if ignore_index in (0, 1) else ignored(target, ignore_index)
    prediction_mask, target_mask = prediction == 1, (target == 1) | void
    if not ((prediction_mask | (prediction == 0)).all() and (target_mask | (target == 0)).all()):
        return prediction, target
    if not void.any() and all((mask.sum(1) == 1).all() for mask in (prediction_mask, target_mask)):
        return prediction_mask.to(torch.uint8).argmax(1), target_mask.to(torch.uint8).argmax(1)
    if C > 2 or torch.bool in (prediction.dtype, target.dtype):
        advice = "Pass threshold=0.5 to DiceScore for masks of classes that overlap, label maps as (B, 1, *S)."
        fail("label maps, or classes that are one-hot along dimension 1", "only 0 and 1 in both", advice)
    return prediction, target


def as_tensor(array: Any) -> Any:
    """Return what a user passed as a tensor: an array of NumPy or of DLPack, without a copy where torch allows it.

    Anything else is returned as it is, for the check that follows.

    Example:
        >>> as_tensor(np.array([[0, 1]], np.uint8))
        tensor([[0, 1]], dtype=torch.uint8)
    """
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        advice = "Fill it, such as by array.filled(255), and in a target name that label as ignore_index."
        fail("arrays without masked entries", f"{np.ma.count_masked(array)} of them", advice)
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
    """Count every pair of labels that two arrays of one shape have at one place.

    Labels need not be known beforehand: any number of them, of bool or any integer type, negative ones included. Arrays
    of bytes are read in place, others are mapped to bytes block by block; with more than 256 labels they are sorted.

    Returns:
        Labels of the prediction, labels of the target, and voxels, (P,) each, for the P pairs that occur, sorted;
        int64, Python's ints where a label is above 2^63.

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
    """Return how many voxels have each class in both maps, the prediction, the target: (3, C + 1) int64, by Numba.

    The last column counts labels outside [0, C). Large arrays of bytes are counted in a table of all pairs of labels,
    others label by label. Both arrays are bool or integers of one shape, as `class_counts` has checked.
    """
    is_bytes = all(array.dtype in (np.uint8, np.bool_) for array in (prediction, target))
    if is_bytes and num_classes <= 256 and prediction.size >= _MANY:
        table = _pair_table(prediction, target, _as_bytes, _as_bytes)
        if ignore_index is not None and 0 <= ignore_index < 256:  # no byte equals another number
            table[:, ignore_index] = 0
        counts = np.zeros((3, num_classes + 1), np.int64)
        for row, sums in zip(counts, (np.diagonal(table), table.sum(1), table.sum(0)), strict=True):
            row[:num_classes] = sums[:num_classes]
            row[num_classes] = sums[num_classes:].sum()
        return counts
    limits = np.iinfo(np.uint8 if target.dtype == np.bool_ else target.dtype)
    skip = ignore_index is not None and limits.min <= ignore_index <= limits.max  # else no label equals it
    ignored_label = np.uint64((ignore_index or 0) % 2**64).astype(np.int64)  # the loop reads uint64 as int64

    def count(p: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Return the counts of one piece."""
        counts = np.zeros((3, num_classes + 1), np.int64)
        for block in _blocks(p, t):
            flat = (_as_bytes(array) if array.dtype == np.bool_ else array for array in block)
            _kernels().count_labels(*flat, skip, ignored_label, counts)
        return counts

    return np.zeros((3, num_classes + 1), np.int64) + _summed(count, prediction, target)


def _pair_table(
    prediction: np.ndarray,
    target: np.ndarray,
    as_byte_p: Callable[[np.ndarray], np.ndarray],
    as_byte_t: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return how often each pair of bytes occurs, (256, 256) int64: row prediction, column target.

    `as_byte_p` and `as_byte_t` turn the labels (V,) of a block of the prediction and of the target into uint8 (V,).
    """
    kernels = _kernels()

    def count(p: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Return the table of one piece."""
        byte_blocks = ((as_byte_p(block_p), as_byte_t(block_t)) for block_p, block_t in _blocks(p, t))
        if kernels is None:
            table = torch.zeros(1 << 16, dtype=torch.int64)
            for bytes_p, bytes_t in byte_blocks:
                pairs = torch.from_numpy(bytes_p.astype(np.int64)).mul_(256).add_(torch.from_numpy(bytes_t))
                table += torch.bincount(pairs, minlength=1 << 16)
            return table.numpy().reshape(256, 256)
        tables = kernels.tables()
        for bytes_p, bytes_t in byte_blocks:
            kernels.count_bytes(bytes_p, bytes_t, *tables)
        return np.asarray(kernels.total(*tables))

    return np.zeros((256, 256), np.int64) + _summed(count, prediction, target)


def _summed(count: Callable[[np.ndarray, np.ndarray], np.ndarray], prediction: np.ndarray, target: np.ndarray) -> Any:
    """Return the sum of what `count` returns for each piece of both arrays, on all threads; 0 without voxels.

    `count` returns an array of integers, which the order of the additions does not change.
    """
    total: Any = 0
    lock, pieces = threading.Lock(), list(_pieces(prediction, target))

    def add(piece: tuple[np.ndarray, np.ndarray]) -> None:
        """Count one piece and add its counts to `total`, on a thread of the pool."""
        nonlocal total
        counts = count(*piece)
        with lock:
            total = total + counts

    for_each(add, pieces, min(torch.get_num_threads(), len(pieces)))
    return total


def _pieces(prediction: np.ndarray, target: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split two arrays of one shape into tasks: yield views of the same voxels of the prediction and of the target.

    If both arrays have the same order of axes in memory, without gaps, the views are flat, (V,). Otherwise they are
    boxes, with axes permuted so that the target is contiguous along the last axis and the prediction along the one
    before it.
    """
    if prediction.size == 0:
        return
    order = sorted(range(target.ndim), key=lambda axis: (-abs(target.strides[axis]), axis))
    p, t = prediction.transpose(order), target.transpose(order)
    if p.flags.c_contiguous and t.flags.c_contiguous:
        p, t = p.reshape(-1), t.reshape(-1)
    elif p.ndim > 1:
        # an axis of length 1 is never the fastest, whatever its stride says
        fastest = min(range(p.ndim), key=lambda axis: (p.shape[axis] == 1, abs(p.strides[axis])))
        if fastest != p.ndim - 1:
            p, t = np.moveaxis(p, fastest, -2), np.moveaxis(t, fastest, -2)
    # about four tasks per thread, so that no thread ends long before the others; the kernel counts to 2^32
    voxels = max(_TASK, -(-p.size // (4 * torch.get_num_threads())))
    yield from _boxes(p, t, min(voxels, 1 << 30), p.size)


def _blocks(p: np.ndarray, t: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks (V,) of a piece, at most 1 MiB each: views, or copies if the memory has another order."""
    for box_p, box_t in _boxes(p, t, CHUNK // max(p.itemsize, t.itemsize), _SIDE if p.ndim > 1 else p.size):
        yield _flat(box_p), _flat(box_t)


def _boxes(p: np.ndarray, t: np.ndarray, voxels: int, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split two arrays of one shape, not empty, into boxes: yield views of the same box of both.

    A box has at most `voxels` voxels, and at most `side` along each of the last two axes, so that it is long along
    both: one array is contiguous along the last axis, the other along the one before it.
    """
    sizes = list[int]()
    for axis in reversed(range(p.ndim)):
        sizes.insert(0, min(p.shape[axis], voxels, side if len(sizes) < 2 else voxels))
        voxels = max(1, voxels // sizes[0])
    for corner in product(*(range(0, n, size) for n, size in zip(p.shape, sizes, strict=True))):
        box = tuple(slice(start, start + size) for start, size in zip(corner, sizes, strict=True))
        yield p[box], t[box]


def _flat(box: np.ndarray) -> np.ndarray:
    """Return a box (*S) as (V,), its last axis fastest: a view if it is contiguous, else a copy.

    A box is a part of a label map, of any strides. Where its last axis is slower in memory than the one before,
    `gather` copies it in squares that fit in cache; without Numba, NumPy does.
    """
    last_is_slow = box.ndim > 1 and abs(box.strides[-1]) > abs(box.strides[-2])
    if box.flags.c_contiguous or not last_is_slow or _kernels() is None:
        return np.ascontiguousarray(box).reshape(-1)
    source = box if box.ndim > 2 else box[None]
    copied = np.empty(source.shape, source.dtype)
    for outer in np.ndindex(source.shape[:-3]):  # `gather` takes three axes
        _kernels().gather(source[outer], copied[outer])
    return copied.reshape(-1)


def plain_bools(array: np.ndarray) -> np.ndarray:
    """Return an array in which True is the byte 1, as NumPy has it: some libraries write 255."""
    return array.view(np.uint8) != 0 if array.dtype == np.bool_ else array


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """Return labels of one byte, bool, int8 or uint8, as uint8 of the same bits."""
    return plain_bools(array).view(np.uint8)


def _byte_table(array: np.ndarray) -> tuple[np.ndarray | None, Callable[[np.ndarray], np.ndarray]]:
    """List the labels of an array of bool or integers, so that a byte can stand for each.

    Returns:
        labels: up to 256 numbers, (n,) int64, which hold all labels of the array; None if these are more.
        position: function from a block (V,) of the array to the positions of its labels in `labels`, uint8 (V,).
    """
    if array.dtype.itemsize == 1:
        labels = np.arange(256)  # the byte itself is the position; as int8, bytes from 128 on are negative
        return labels.astype(np.uint8).view(np.int8).astype(np.int64) if array.dtype == np.int8 else labels, _as_bytes
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low >= 0 and high < 256:
        return np.arange(256), lambda piece: piece.astype(np.uint8)
    if high - low < _RANGE and high < 2**63:
        present = np.zeros(high - low + 1, bool)  # which labels occur
        for piece in _pieces(array, array):
            for block, _ in _blocks(*piece):
                present[block.astype(np.int64) - low] = True
        labels = np.flatnonzero(present) + low
        position = np.cumsum(present) - 1
        if len(labels) <= 256:
            return labels, lambda piece: position[piece.astype(np.int64) - low].astype(np.uint8)
    return None, _as_bytes


def _sorted_pairs(prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count every pair of labels by sorting: return labels of prediction and target, and voxels, (P,) each, P > 0."""
    labels_p, p = np.unique(prediction, return_inverse=True)
    labels_t, t = np.unique(target, return_inverse=True)
    m = len(labels_t)
    pairs, voxels = np.unique(p.reshape(-1) * m + t.reshape(-1), return_counts=True)
    dtype = object if max(labels_p[-1], labels_t[-1]) >= 2**63 else np.int64
    return labels_p[pairs // m].astype(dtype), labels_t[pairs % m].astype(dtype), voxels.astype(np.int64)


# --- any device, torch ------------------------------------------------------------------------------------------------


def _counts_torch(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Return how many voxels have each class in both maps, the prediction, the target: (3, C + 1) int64, by torch.

    The last column counts labels outside [0, C). Both tensors are bool or integers of one shape, on one device.
    """
    C = num_classes
    outside, left_out = C, C + 1  # two columns after the classes: labels outside [0, C), voxels that do not count
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
        columns = columns_both, columns_p, columns_t
        counts += torch.stack([torch.bincount(column_V, minlength=C + 2) for column_V in columns])
    return counts[:, : C + 1]
