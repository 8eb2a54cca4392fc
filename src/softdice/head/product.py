"""The last 1x1 convolution, a product over channels, and its adjoint: a `LinearMap`.

    x = W f + b,    df = W^T g,  dW = sum g f^T,  db = sum g

Shape suffixes: B sample, K feature, C class, V voxel; m samples and n voxels of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdice.head.chunked import Chunk, Grid


class Product(NamedTuple):
    """The product of features (B, K, V) with a weight (C, K), plus a bias (C,) or None: its `inputs`. A `LinearMap`.

    shape: (B, C, V) of the logits. dtype: of the logits, in which the product is computed. grid: the size of a chunk.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    grid: Grid

    def logits(self, inputs: Sequence[Any], chunk: Chunk, memory: Tensor) -> Tensor:
        """Return W f + b of a chunk, (m, C, n), a view of the flat `memory`, which has room for it."""
        (features, weight, bias), (samples, voxels) = inputs, chunk
        bias_C1 = None if bias is None else bias.to(self.dtype).unsqueeze(1)
        return _product(weight.to(self.dtype), bias_C1, features[samples, :, voxels].to(self.dtype), memory)

    def adjoint(self, inputs: Sequence[Any], needed: Sequence[bool]) -> _Adjoint:
        """Return the adjoint for one backward pass; `needed` says which inputs need a gradient."""
        return _Adjoint(inputs, needed, self.dtype)

    def whole(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return all logits, (B, C, V)."""
        logits = torch.einsum("ck,bkv->bcv", weight.to(self.dtype), features.to(self.dtype))
        return logits if bias is None else logits + bias.to(self.dtype).view(1, -1, 1)


class _Adjoint:
    """The gradients df, dW and db, each if `needed` says so. Chunks write df, each its voxels; lanes sum dW and db."""

    def __init__(self, inputs: Sequence[Any], needed: Sequence[bool], dtype: torch.dtype) -> None:
        self.features, self.weight, self.bias = inputs
        self.needed, self.dtype = needed, dtype
        self.d_features = torch.empty_like(self.features) if needed[0] else None

    def lane(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
        """Return zeros for the dW (C, K) and db (C,) of a lane, float64; they do not depend on its chunks."""
        shape = self.weight.shape
        return tuple(self.weight.new_zeros(size, dtype=torch.float64) for size in (shape, shape[:1]))

    def add(self, sums: tuple[Tensor, Tensor], chunk: Chunk, grad_mCn: Tensor) -> None:
        """Write df of a chunk, for dL/dlogits g = `grad_mCn`, and add its part to `sums`, the dW and db of its lane."""
        d_weight, d_bias = sums
        samples, voxels = chunk
        if self.d_features is not None:
            _to_features(self.weight.to(self.dtype), grad_mCn, self.d_features[samples, :, voxels])
        if self.needed[1]:
            f_mKn = self.features[samples, :, voxels].to(self.dtype)
            d_weight += grad_mCn[0] @ f_mKn[0].T if len(f_mKn) == 1 else (grad_mCn @ f_mKn.transpose(1, 2)).sum(0)
        if self.needed[2]:
            d_bias += grad_mCn.sum((0, 2))

    def result(self, lanes: list[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, ...]:
        """Return df, dW and db, each None if it is not needed; `lanes` holds the sums (dW, db) of each lane."""
        d_weight, d_bias = (sum(parts) for parts in zip(*lanes, strict=True))
        return (
            self.d_features,
            d_weight.to(self.weight.dtype) if self.needed[1] else None,
            d_bias.to(self.bias.dtype) if self.needed[2] else None,
        )


def autocasts(device: str) -> bool:
    """Return whether autocast is on for a type of device; some, such as meta, have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def product_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype that a convolution would compute in: autocast's where it is on, else that of the features."""
    device = features.device.type
    if features.dtype != torch.float64 and autocasts(device):
        return torch.get_autocast_dtype(device)
    return features.dtype


def _product(weight_CK: Tensor, bias_C1: Tensor | None, chunk_mKn: Tensor, memory: Tensor) -> Tensor:
    """Return W f + b of the features of a chunk, contiguous (m, C, n), written to the start of the flat `memory`.

    All tensors have one dtype. A single sample is a matrix, whose product is faster than a batch of one.
    """
    m, _, n = chunk_mKn.shape
    C = weight_CK.shape[0]
    logits_mCn = memory[: m * C * n].view(m, C, n)
    weight_mCK = weight_CK.expand(m, -1, -1)
    if bias_C1 is None:
        if m == 1:
            torch.mm(weight_CK, chunk_mKn[0], out=logits_mCn[0])
        else:
            torch.bmm(weight_mCK, chunk_mKn, out=logits_mCn)
    elif m == 1:
        torch.addmm(bias_C1, weight_CK, chunk_mKn[0], out=logits_mCn[0])
    else:
        torch.baddbmm(bias_C1.unsqueeze(0), weight_mCK, chunk_mKn, out=logits_mCn)
    return logits_mCn


def _to_features(weight_CK: Tensor, grad_mCn: Tensor, out_mKn: Tensor) -> None:
    """Write df = W^T g of a chunk to `out_mKn`, a view of all df; the weight has the dtype of g."""
    m = len(grad_mCn)
    if out_mKn.dtype != grad_mCn.dtype:  # under autocast the features keep their own dtype
        out_mKn.copy_(weight_CK.T @ grad_mCn)
    elif m == 1:
        torch.mm(weight_CK.T, grad_mCn[0], out=out_mKn[0])
    else:
        torch.bmm(weight_CK.T.expand(m, -1, -1), grad_mCn, out=out_mKn)
