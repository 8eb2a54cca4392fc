"""One training step: the fused head has the loss and the gradients of the network followed by the loss."""

from __future__ import annotations

import pytest
import torch

from softdice.training.brain import brain_cases
from softdice.training.loss_names import parse_loss
from softdice.training.module import Budget, Segmenter, Silent
from softdice.training.plan import choose_network


def segmenter(fused_head: bool) -> Segmenter:
    torch.manual_seed(0)
    network = choose_network((32, 32), 1, 3, accelerator=False).build()
    cases = brain_cases(0.2)
    return Segmenter(
        network, parse_loss("dice+ce", 3), cases, [0], [1], patch=(32, 32), batch_size=2, lr=1e-3, seed=0,
        budget=Budget(1, None, 1), reporter=Silent(), fused_head=fused_head,
    )  # fmt: skip


def test_fused_head_trains_the_same_network() -> None:
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(2, 1, 32, 32, generator=generator), torch.randint(0, 3, (2, 32, 32), generator=generator)
    results = []
    for fused_head in (False, True):
        module = segmenter(fused_head)
        loss = module.training_step(batch, 0)
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in module.network.named_parameters() if p.grad is not None}))
    (separate, expected), (fused, found) = results
    assert fused == pytest.approx(separate, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name


def test_several_devices_share_one_loss() -> None:
    loss = parse_loss("dice+0.5*ce", 3, "world")
    assert loss.group == "world"
