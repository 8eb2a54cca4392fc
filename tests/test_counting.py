"""The counting loops: noise and runs, every byte, every order of the axes, remainders; against NumPy, bit for bit."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from softdice.metrics import counting
from softdice.metrics.counting import class_counts, pair_counts

KINDS = {
    "noise of two labels": (2, 1, 0.5),  # the counters of a byte pass 256 many times
    "noise of 118 labels": (118, 1, 0.2),
    "noise of all bytes": (256, 1, 0.2),  # beyond the table of bytes
    "runs": (118, 700, 0.001),
    "short runs": (30, 5, 0.1),
    "runs beside noise": (60, 1, 0.1),
}


def pair(kind: str, voxels: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels in runs of a length, of which a share differs."""
    labels, run, share = KINDS[kind]
    rng = np.random.default_rng(len(kind))
    t = np.repeat(rng.integers(0, labels, -(-voxels // run), np.uint8), run)[:voxels]
    if kind == "runs beside noise":
        t[voxels // 3 : voxels // 2] = 7
    return np.where(rng.random(voxels) < share, rng.integers(0, labels, voxels, np.uint8), t), t


def table(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The definition: how often each pair of bytes occurs."""
    return np.bincount(p.reshape(-1).astype(np.int64) * 256 + t.reshape(-1), minlength=1 << 16).reshape(256, 256)


def counted(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    found = np.zeros((256, 256), np.int64)
    labels_p, labels_t, times = pair_counts(p, t)
    found[labels_p, labels_t] = times
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("voxels", [0, 63, 1023, 1025, 300_001, 2_500_003])
def test_pairs_of_bytes(kind: str, voxels: int) -> None:
    p, t = pair(kind, voxels)
    assert np.array_equal(counted(p, t), table(p, t))


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_every_order_of_the_axes(numba: bool, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NIfTI files are read in Fortran order, and arrays from elsewhere in C order."""
    if numba:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(counting, "_kernels", lambda: None)
    for shape in ((70, 131, 66), (5, 40, 3, 67), (300, 513), (1, 2100, 1, 9)):
        p, t = (array.reshape(shape).astype(dtype) for array in pair("short runs", int(np.prod(shape))))
        expected = table(p, t)
        for order in list(permutations(range(len(shape))))[:8]:
            back = np.argsort(order)
            turned = np.ascontiguousarray(p.transpose(order)).transpose(back)
            assert np.array_equal(counted(turned, t), expected)
            assert np.array_equal(counted(t, turned), expected.T)
        assert np.array_equal(counted(p[::-1], t[::-1]), expected)
        assert np.array_equal(counted(p[..., ::2], t[..., ::2]), table(p[..., ::2], t[..., ::2]))


def test_arrays_of_many_blocks_in_unlike_orders() -> None:
    p, t = (array.reshape(129, 150, 140) for array in pair("runs beside noise", 129 * 150 * 140))
    expected = np.stack([np.diagonal(table(p, t)), table(p, t).sum(1), table(p, t).sum(0)])[:, :60]
    fortran = torch.from_numpy(np.asfortranarray(p))
    assert np.array_equal(class_counts(fortran, torch.from_numpy(t), 60).numpy(), expected)
    wide = torch.from_numpy(t.astype(np.int64))
    assert np.array_equal(class_counts(fortran, wide, 60).numpy(), expected)
    same = class_counts(fortran, torch.from_numpy(np.asfortranarray(t)), 60)
    assert np.array_equal(same.numpy(), expected)
    broadcast = torch.from_numpy(t[:1, :1]).expand(129, 150, 140)
    assert class_counts(broadcast, broadcast, 60)[0].sum() == t.size
