"""Seeds and flags for a process whose random numbers repeat."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from softdice import validation
from softdice.parallel.groups import has_ranks


@dataclass
class SystemConfig:
    """Settings of a reproducible run.

    Args:
        seed: seed of every random number generator, in [0, 2^32).
        cudnn_benchmark_enabled: let cuDNN time its algorithms and pick the fastest (not reproducible).
        cudnn_deterministic: only deterministic cuDNN algorithms.
        deterministic_algorithms: `torch.use_deterministic_algorithms(True)`, and the cuBLAS workspace that it needs;
            an operation without a deterministic implementation then raises.
    """

    seed: int = 42
    cudnn_benchmark_enabled: bool = False
    cudnn_deterministic: bool = True
    deterministic_algorithms: bool = False


@dataclass(frozen=True)
class SystemState:
    """What `setup_system` set, and the parts a DataLoader takes.

    Attributes:
        seed: the seed of this process: the configured one plus the rank.
        rank: rank under torch.distributed, else 0.
        cuda_devices: how many CUDA devices were seeded.
        deterministic_algorithms, cudnn_benchmark, cudnn_deterministic: the flags in force now.
    """

    seed: int
    rank: int
    cuda_devices: int
    deterministic_algorithms: bool
    cudnn_benchmark: bool
    cudnn_deterministic: bool

    def generator(self) -> torch.Generator:
        """Return a fresh `torch.Generator` with this process's seed, for `DataLoader(generator=...)`."""
        return torch.Generator().manual_seed(self.seed)

    @staticmethod
    def worker_init_fn(worker_id: int) -> None:
        """Seed Python and NumPy in a worker from its seed of torch, for `DataLoader(worker_init_fn=...)`."""
        seed = torch.initial_seed() % 2**32
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the legacy generator is the one that transforms use

    def data_loader(self) -> dict[str, Any]:
        """Return generator and worker_init_fn as keywords: `DataLoader(dataset, **state.data_loader())`."""
        return {"generator": self.generator(), "worker_init_fn": self.worker_init_fn}


@validation.public
def setup_system(system_config: SystemConfig | type[SystemConfig] = SystemConfig) -> SystemState:
    """configuration -> seeded generators and cuDNN flags.

    Seeds Python, NumPy, torch and every CUDA device; sets the cuDNN flags on `torch.backends.cudnn`; with
    `deterministic_algorithms` calls `torch.use_deterministic_algorithms` and sets CUBLAS_WORKSPACE_CONFIG. Under
    torch.distributed the rank is added to the seed, so that ranks draw different numbers, each reproducibly.

    Args:
        system_config: a `SystemConfig`, or the class itself for its defaults.

    Returns:
        SystemState: what was set, with a `generator()` and a `worker_init_fn` for DataLoaders.

    Raises:
        TypeError, ValueError: no SystemConfig, or its seed is not an int in [0, 2^32).

    Edge cases: torch prints 10 digits afterwards, as in the notebook from which this package began. The environment
    variable for cuBLAS has to be set before the first CUDA call of the process.

    Example:
        >>> import torch, softdice
        >>> setup_system(SystemConfig(seed=1)).seed
        1
        >>> first = torch.rand(3)
        >>> _ = setup_system(SystemConfig(seed=1))
        >>> torch.equal(first, torch.rand(3))
        True
        >>> torch.set_printoptions(precision=4)
    """
    config = system_config() if isinstance(system_config, type) else system_config
    if not isinstance(config, SystemConfig):
        advice = "Write setup_system(SystemConfig(seed=42))."
        validation.fail("a SystemConfig", repr(config), advice, TypeError)
    seed, rank = config.seed, _rank()
    if isinstance(seed, bool) or not isinstance(seed, int):
        validation.fail("seed to be an int", repr(seed), "Pass a whole number.", TypeError)
    if not 0 <= seed < 2**32 - rank:
        validation.fail("seed in [0, 2^32)", seed, "NumPy takes no other.")
    seed += rank
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the legacy generator is the one that transforms use
    torch.manual_seed(seed)  # on every CUDA device, too
    torch.set_printoptions(precision=10)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark_enabled
    torch.backends.cudnn.deterministic = config.cudnn_deterministic
    if config.deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # not called where nothing changes: the call imports inductor, which takes seconds
    if config.deterministic_algorithms or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.deterministic_algorithms)
    return SystemState(
        seed=seed,
        rank=rank,
        cuda_devices=torch.cuda.device_count(),
        deterministic_algorithms=torch.are_deterministic_algorithms_enabled(),
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        cudnn_deterministic=torch.backends.cudnn.deterministic,
    )


def _rank() -> int:
    """Return the rank in the default process group; before there is one, the rank in torchrun's environment."""
    if has_ranks():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
