"""torch.compile as the first use in a fresh process, and many losses compiled in one."""

from __future__ import annotations

import subprocess
import sys

import pytest

COLD = """
import torch, softdice
from softdice import metrics
torch.manual_seed(0)
p, y = torch.randint(0, 3, (2, 8, 9, 10)), torch.randint(0, 3, (2, 8, 9, 10))
bytes_p, bytes_y = p.to(torch.uint8), y.to(torch.uint8)
metric = metrics.JaccardScore(3)
calls = {
    "dice": lambda p, y: softdice.dice_score(p, y, 3),
    "dice of bytes": lambda p, y: softdice.dice_score(p.to(torch.uint8), y.to(torch.uint8), 3),
    "a metric": lambda p, y: metric(p, y),
    "hausdorff": lambda p, y: metrics.hausdorff_distance(p, y, num_classes=3),
    "surface": lambda p, y: metrics.average_surface_distance(p, y, num_classes=3),
    "surface dice": lambda p, y: metrics.surface_dice(p, y, num_classes=3, tolerance=1.0),
    "lesions": lambda p, y: metrics.lesion_dice(p, y, num_classes=3),
    "panoptic": lambda p, y: metrics.panoptic_quality(p, y, num_classes=3),
    "centre line": lambda p, y: metrics.centreline_dice(p, y, num_classes=3),
    "map": lambda p, y: softdice.distance_map(y, 3).sum((0, 2, 3, 4)),
}
name = NAME
compiled = torch.compile(calls[name], backend="eager")(p, y)
torch.testing.assert_close(compiled, calls[name](p, y), equal_nan=True)
"""

LOSSES = """
import torch, softdice
softdice.use_backend("auto")
logits, labels = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randint(0, 3, (2, 8, 8))
names = ["SoftDiceLoss", "JaccardLoss", "TverskyLoss", "FocalTverskyLoss", "GeneralizedDiceLoss", "MCCLoss",
         "SquaredDiceLoss", "NoiseRobustDiceLoss", "ExponentialLogarithmicLoss", "DiceSemimetricLoss",
         "JaccardMetricLoss", "CrossEntropyLoss", "FocalLoss", "WassersteinDiceLoss", "MultiClassMCCLoss"]
for name in names:
    loss = getattr(softdice, name)(3, activation="softmax")
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, labels)
    torch.testing.assert_close(value, loss(logits, labels))
    value.backward()
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "name",
    ["dice", "dice of bytes", "a metric", "hausdorff", "surface", "surface dice", "lesions", "panoptic", "centre line",
     "map"],
)  # fmt: skip
def test_a_score_compiled_first_of_all(name: str) -> None:
    """Cold: the compiler must not trace into what Numba compiles, SciPy or NumPy."""
    run(COLD.replace("NAME", repr(name)))


def test_fifteen_losses_compiled_in_one_process() -> None:
    """Each class has a forward of its own, since the compiler limits how often one code object is compiled anew."""
    run(LOSSES)
