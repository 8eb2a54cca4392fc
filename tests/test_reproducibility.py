"""setup_system: what it seeds, sets and returns, and that two trainings with one seed give the same bits."""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import softdice
from softdice import SystemConfig, setup_system
from softdice.reproducibility import SystemState


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()  # noqa: NPY002 - the generator that is seeded


def test_defaults_are_the_seeds() -> None:
    assert dataclasses.asdict(SystemConfig()) == {
        "seed": 42,
        "cudnn_benchmark_enabled": False,
        "cudnn_deterministic": True,
        "deterministic_algorithms": False,
    }


@pytest.mark.parametrize("config", [SystemConfig, SystemConfig()])
def test_a_class_or_an_instance(config: Any) -> None:
    state = setup_system(config)
    assert state == SystemState(
        seed=42,
        rank=0,
        cuda_devices=torch.cuda.device_count(),
        deterministic_algorithms=False,
        cudnn_benchmark=False,
        cudnn_deterministic=True,
    )
    first = drawn()
    setup_system()
    assert drawn() == first
    setup_system(SystemConfig(seed=43))
    assert all(a != b for a, b in zip(drawn(), first, strict=True))


@pytest.mark.parametrize("benchmark", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_flags_land_where_torch_reads_them(benchmark: bool, deterministic: bool) -> None:
    state = setup_system(SystemConfig(cudnn_benchmark_enabled=benchmark, cudnn_deterministic=deterministic))
    assert torch.backends.cudnn.benchmark is benchmark is state.cudnn_benchmark
    assert torch.backends.cudnn.deterministic is deterministic is state.cudnn_deterministic
    assert not hasattr(torch.backends, "cudnn_benchmark_enabled")  # what the notebook sets


def test_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    state = setup_system(SystemConfig(deterministic_algorithms=True))
    assert torch.are_deterministic_algorithms_enabled() is state.deterministic_algorithms is True
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    softdice.SoftDiceLoss(3, activation="softmax")(logits, torch.randint(0, 3, (2, 8, 8))).backward()
    assert setup_system(SystemConfig()).deterministic_algorithms is False
    assert torch.are_deterministic_algorithms_enabled() is False


def test_a_cublas_workspace_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    setup_system(SystemConfig(deterministic_algorithms=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_ranks_draw_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        state = setup_system(SystemConfig(seed=7))
        assert (state.rank, state.seed) == (rank, 7 + rank)
        draws.append(drawn())
    assert len(set(draws)) == 3
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # a process group goes before the variable
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    assert setup_system(SystemConfig(seed=7)).seed == 12


@pytest.mark.parametrize(
    "config, error, message",
    [
        (SystemConfig(seed=-1), ValueError, "setup_system: expected seed in [0, 2^32), got -1. NumPy takes no other."),
        (SystemConfig(seed=2**32), ValueError, "setup_system: expected seed in [0, 2^32), got 4294967296. "
         "NumPy takes no other."),
        (SystemConfig(seed=1.5), TypeError, "setup_system: expected seed to be an int, got 1.5. "
         "Pass a whole number."),
        (42, TypeError, "setup_system: expected a SystemConfig, got 42. Write setup_system(SystemConfig(seed=42))."),
    ],
)  # fmt: skip
def test_errors(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        setup_system(config)
    assert str(raised.value) == message


class Noise(torch.utils.data.Dataset[Tensor]):
    """A data set of which every item draws from all three generators, as an augmentation does."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), *drawn()], dtype=torch.float64)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loaders_repeat(workers: int) -> None:
    def epoch() -> Tensor:
        state = setup_system(SystemConfig(seed=3))
        loader = torch.utils.data.DataLoader(
            Noise(), batch_size=2, shuffle=True, num_workers=workers, **state.data_loader()
        )
        return torch.cat(list(loader))

    first, second = epoch(), epoch()
    assert torch.equal(first, second)
    assert first[:, 1:].unique().numel() == 18  # no two items, and no two workers, drew the same


def train(seed: int) -> list[Tensor]:
    """Train shortly, with random initialisation, order and dropout."""
    state = setup_system(SystemConfig(seed=seed))
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Dropout2d(0.2), torch.nn.Conv2d(4, 3, 1)
    )
    images = torch.rand(8, 1, 24, 24)
    labels = (images[:, 0] * 3).long().clamp_max(2)
    loss = softdice.SoftDiceLoss(3, activation="softmax") + 0.5 * softdice.SoftDiceLoss(
        3, activation="softmax", cost="one_minus"
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(images, labels)
    for _ in range(2):
        for image, label in torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, **state.data_loader()):
            optimizer.zero_grad()
            loss(network(image), label).backward()
            optimizer.step()
    return [weight.detach() for weight in network.parameters()]


def test_two_trainings_with_one_seed_give_the_same_bits(backend: str) -> None:
    first, second, other = train(1), train(1), train(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
