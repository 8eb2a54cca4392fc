"""Memory of large gradients: used again when it is free, and only then."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import softdice
from softdice.backends.cpu import gradient_memory as memory

pytest.importorskip("numba", reason="the CPU kernel needs numba")
pytestmark = pytest.mark.skipif(not memory._ABLE, reason="the system has no MADV_FREE")

SHAPE = (2, 5, 1024, 1024)  # 40 MiB


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    gc.collect()
    memory.forget()
    yield
    gc.collect()
    memory.forget()


@pytest.fixture(scope="module")
def case() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randint(0, 5, (2, 1024, 1024), generator=generator)


def gradient(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    with softdice.use_backend("cpu"):
        softdice.SoftDiceLoss(5, activation="softmax")(logits, labels).backward()
    assert logits.grad is not None
    return logits.grad


def test_the_next_gradient_lies_where_the_freed_one_lay(case: tuple[Tensor, Tensor]) -> None:
    first = gradient(*case)
    place, expected = first.data_ptr(), first.clone()
    del first
    again = gradient(*case)
    assert again.data_ptr() == place
    assert torch.equal(again, expected)


def test_a_gradient_that_is_alive_is_left_alone(case: tuple[Tensor, Tensor]) -> None:
    first = gradient(*case)
    kept, tail = first.clone(), first[1:, :, 5:]  # a view keeps the memory alive
    del first
    other = gradient(-case[0], case[1])
    assert torch.equal(tail, kept[1:, :, 5:])
    assert not torch.equal(other, kept)


def test_the_two_largest_pieces_are_kept(case: tuple[Tensor, Tensor]) -> None:
    parts = [(case[0][:, :, :size], case[1][:, :size]) for size in (900, 1024, 600)]
    alive = [gradient(*part) for part in parts]
    places = [found.data_ptr() for found in alive]
    del alive
    assert sorted(map(len, memory._idle)) == [part[0].numel() * 4 for part in parts[:2]]
    smaller, larger = gradient(*parts[2]), gradient(*parts[1])
    assert [smaller.data_ptr(), larger.data_ptr()] == places[:2]


def test_gradients_freed_by_many_threads_share_no_memory() -> None:
    leaf = torch.empty(1, 1, (memory.SMALLEST >> 2) + 1)
    torn = []

    def work(number: int) -> None:
        for _ in range(200):
            found = memory.gradient_like(leaf)
            found[..., ::4096] = number
            time.sleep(0)
            torn.append(bool((found[..., ::4096] != number).any()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(torn) == 800
    assert not any(torn)
    assert len(memory._idle) <= memory.PIECES


def test_layout_of_the_logits(case: tuple[Tensor, Tensor]) -> None:
    logits = case[0].contiguous(memory_format=torch.channels_last)
    found = gradient(logits, case[1])
    assert found.stride() == logits.stride()
    expected = gradient(*case)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_gradient_is_a_tensor_like_any_other(case: tuple[Tensor, Tensor]) -> None:
    found = gradient(*case)
    assert not found._is_view()
    assert found.untyped_storage().nbytes() == found.numel() * 4
    assert torch.equal(found.double().float(), found)
    found.mul_(2)
    found.share_memory_()


def test_it_can_be_switched_off(case: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SOFTDICE_REUSE_GRADIENT", "0")
    found = gradient(*case)
    del found
    assert not memory._idle
