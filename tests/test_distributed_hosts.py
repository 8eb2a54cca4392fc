"""Two hosts: two torchrun agents that know each other by addresses on the loopback range alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import softdice


def train(image: torch.Tensor, target: torch.Tensor, group: Any) -> dict[str, Any]:
    """Train for three steps; return the loss of each, and the parameters at the end."""
    torch.manual_seed(0)
    model: nn.Module = nn.Conv2d(1, 2, 3, padding=1)
    if group is not None:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = softdice.SoftDiceLoss(2, activation="softmax", group=group)
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(model(image), target)
        value.backward()
        optimizer.step()
        history.append(value.item())
    return {"losses": history, "weight": [p.flatten().tolist() for p in model.parameters()]}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return image, (image[:, 0] > 0.5).long()


def on_a_host(folder: str) -> None:
    """Run what torchrun starts on each host."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    image, target = batch()
    mine = slice(0, 2) if rank == 0 else slice(2, 3)
    found = train(image[mine], target[mine], "world")
    found["host"] = os.environ["GROUP_RANK"]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch 2.13 with gloo and DDP, without softdice too, now and then aborts at the interpreter's own end


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux answers on all of 127.0.0.0/8 unasked")
def test_two_hosts_equal_one_process(tmp_path: Path) -> None:
    port = str(free_port())
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    hosts = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port, "--local-addr", address,
                "--monitor-interval", "0.1",
                __file__, str(tmp_path),
            ],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node, address in enumerate(("127.0.0.1", "127.0.0.2"))
    ]  # fmt: skip
    said = [host.communicate(timeout=60)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)
    alone = train(*batch(), None)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert {run["host"] for run in found} == {"0", "1"}
    for run in found:
        assert run["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        for ours, theirs in zip(run["weight"], alone["weight"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


if __name__ == "__main__":
    on_a_host(sys.argv[1])
