"""torch.jit.trace, which torch has deprecated: losses are traced by their definition, scores are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import softdice
from softdice import metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?` is deprecated"),  # FutureWarning from torch 2.15 on
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # each check of ours: it is none in the trace
]


class Trained(nn.Module):
    """A network with its loss."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.network, self.criterion = nn.Conv2d(2, 3, 1), criterion

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = self.criterion(self.network(image), labels)
        return value


@pytest.mark.parametrize(
    "loss", [softdice.SoftDiceLoss, softdice.MultiClassMCCLoss, softdice.ClDiceLoss, softdice.TopKCrossEntropyLoss,
             softdice.LovaszLoss],
    ids=lambda loss: loss.__name__,
)  # fmt: skip
def test_a_network_with_a_loss_of_each_kind_of_pass(loss: Callable[..., nn.Module]) -> None:
    """Of a size that the CPU kernel serves in eager code; torch's own check of the trace is on.

    Slopes are compared with the definition's, which serves a trace: where the values of a skeleton are nearly equal,
    the kernel may send a slope another way.
    """
    trained = Trained(loss(3, activation="softmax"))
    image, labels = torch.randn(2, 2, 64, 64), torch.randint(0, 3, (2, 64, 64))
    whole = torch.jit.trace(trained, (image, labels))
    for _ in range(2):
        traced = whole(image, labels)
        torch.testing.assert_close(traced, trained(image, labels))
        with softdice.use_backend("reference"):
            defined = trained(image, labels)
        slopes = [torch.autograd.grad(value, trained.network.weight)[0] for value in (traced, defined)]
        assert (slopes[0] - slopes[1]).abs().max() <= 1e-5 * slopes[1].abs().max()
        image, labels = torch.randn(2, 2, 64, 64), torch.randint(0, 3, (2, 64, 64))  # other values of the same sizes


def test_a_backend_that_is_named_says_why_it_cannot_be_traced() -> None:
    loss, logits, labels = softdice.SoftDiceLoss(2), torch.full((1, 2, 9), 0.5), torch.zeros(1, 9, dtype=torch.long)
    with softdice.use_backend("cpu"), pytest.raises(RuntimeError, match=r"it does not: torch\.jit\.trace is active"):
        torch.jit.trace(loss, (logits, labels))


@pytest.mark.parametrize(
    "name, call",
    [
        ("dice_score", lambda p, y: softdice.dice_score(p, y, 3)),
        ("hausdorff_distance", lambda p, y: metrics.hausdorff_distance(p, y, num_classes=3)),
        ("lesion_dice", lambda p, y: metrics.lesion_dice(p, y, num_classes=3)),
        ("distance_map", lambda p, y: softdice.distance_map(y, 3)),
    ],
)
def test_a_result_that_would_be_a_constant_is_refused(name: str, call: Callable[[Tensor, Tensor], Tensor]) -> None:
    labels = torch.randint(0, 3, (2, 8, 9))
    with pytest.raises(
        RuntimeError, match=rf"^{name}: expected .*, got a trace \(torch\.jit\.trace\), which would keep"
    ):
        torch.jit.trace(call, (labels, labels))
