"""Every row of the page on migrating, executed: their loss, ours, and the drop-in class, on the same data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import monai.losses
import nnunetv2.training.loss.compound_losses
import nnunetv2.training.loss.dice
import pytest
import torch
from peers import smp_losses
from torch import Tensor

import softdice
import softdice.compat.monai
import softdice.compat.nnunet
import softdice.compat.smp

PAGE = Path(__file__).parent.parent / "docs" / "migrating.md"
C = 3


class _Plus:
    """The loss `1 + loss`, for losses of other libraries."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def __call__(self, *tensors: Tensor) -> Tensor:
        return 1 + self.loss(*tensors)


def theirs_of(library: str) -> dict[str, Any]:
    if library == "MONAI":
        return vars(monai.losses)
    if library == "nnU-Net":
        names = {"softmax": torch.nn.Softmax(1), "sigmoid": torch.sigmoid}
        return {**vars(nnunetv2.training.loss.dice), **vars(nnunetv2.training.loss.compound_losses), **names}
    smp = smp_losses()
    parts = (smp.dice, smp.jaccard, smp.tversky, smp.focal, smp.soft_ce, smp.soft_bce, smp.lovasz)
    return {name: value for part in parts for name, value in vars(part).items()}


def rows() -> list[tuple[str, str, str, str]]:
    found, library = [], ""
    for line in PAGE.read_text().splitlines():
        if match := re.match(r"\| (\S+) \| softdice \| same on \|", line):
            library = match[1]
        elif match := re.match(r"\| `(.+?)` \| `(.+?)` \| (\w+) \|$", line):
            found.append((library, match[1], match[2], match[3]))
    return found


def test_the_page_has_its_rows() -> None:
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows()) == len(table) > 30
    assert {library for library, *_ in rows()} == {"MONAI", "nnU-Net", "smp"}


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")  # nnU-Net's TopKLoss
@pytest.mark.parametrize(("library", "theirs", "ours", "kind"), rows())
def test_row(library: str, theirs: str, ours: str, kind: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, C, 3, 4, dtype=torch.float64)
    labels = torch.arange(24).remainder(C).view(2, 1, 3, 4)[:, :, torch.randperm(3)]
    if "=255" in theirs:
        labels = torch.where(torch.rand(labels.shape) > 0.2, labels, 255)
    logits = logits.float() if theirs.startswith("Lovasz") else logits  # smp's computes in float32 only
    masks = (torch.rand(2, C, 3, 4) > 0.5).double()
    weight = (torch.rand(2, 1, 3, 4) > 0.3).double()
    target = {"labels": labels, "masks": masks, "soft": torch.rand(2, C, 3, 4).double(), "weighted": masks}[kind]
    extra = (weight,) if kind == "weighted" else ()
    peer = eval(theirs.removeprefix("1 + "), {**theirs_of(library)})
    peer = _Plus(peer) if theirs.startswith("1 + ") else peer
    loss = eval(ours, {**vars(softdice), "C": C})
    seen = target[:, 0] if library == "smp" and kind == "labels" else target
    expected = peer(logits, seen, *extra)
    torch.testing.assert_close(loss(logits, target, *extra), expected, rtol=1e-4, atol=1e-5, check_dtype=False)
    words = {**theirs_of(library), **vars(getattr(softdice.compat, library.lower().replace("-", "")))}
    drop_in = eval(theirs.removeprefix("1 + "), words)
    assert type(drop_in).__module__.startswith("softdice.compat")
    drop_in = _Plus(drop_in) if theirs.startswith("1 + ") else drop_in
    torch.testing.assert_close(drop_in(logits, seen, *extra), expected, rtol=1e-5, atol=1e-6, check_dtype=False)
