"""Every public loss and metric under torch.compile, each as the first call in a process.

One process imports torch and softdice and calls nothing; each case runs in a fork of it, so that Numba, SciPy and our
modules that are imported late are met by the compiler first of all. Prints name -> what went wrong, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import softdice
from softdice import losses, metrics

Case = partial[None]
FULL_GRAPH = (*losses.FAMILY, *losses.MAPPED, *losses.BEYOND)
LABELS_3D = (2, 8, 9, 10)
"""With three classes more than 4096 logits: the Numba kernel's."""


def same(compiled: Any, eager: Any) -> None:
    torch.testing.assert_close(compiled, eager, equal_nan=True)


def train(criterion: nn.Module, head: bool, fullgraph: bool, options: Callable[[], dict[str, Tensor]] = dict) -> None:
    """A step of a network and a loss in one compiled function, its loss and gradients against those of eager code."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Conv3d(2, 4 if head else 3, 1)
    image = torch.randn(2, 2, *LABELS_3D[1:], generator=generator)
    labels = torch.randint(0, 3, LABELS_3D, generator=generator)
    others = options()

    def step(image: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = criterion(network(image), labels, **others)
        return loss

    parameters = [*network.parameters(), *criterion.parameters()]
    compiled = torch.compile(step, fullgraph=fullgraph, backend="aot_eager")(image, labels)
    slopes = torch.autograd.grad(compiled, parameters)
    eager = step(image, labels)
    same(compiled, eager)
    same(slopes, torch.autograd.grad(eager, parameters))


def label_maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 3, LABELS_3D, generator=generator), torch.randint(0, 3, LABELS_3D, generator=generator)


def score(function: Callable[[Tensor, Tensor], Any]) -> None:
    """A score of label maps in compiled code."""
    maps = label_maps()
    same(torch.compile(function, backend="eager")(*maps), function(*maps))


def validate(name: str) -> None:
    """A validation step as Lightning has it: a network, a metric that is updated, in one compiled function."""
    network, (labels, _) = nn.Conv3d(2, 3, 1), label_maps()
    image = torch.randn(2, 2, *LABELS_3D[1:], generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (True, False):
        metric = getattr(metrics, name)(num_classes=3, **KEYWORDS.get(name, {}))

        def step(image: Tensor, labels: Tensor, metric: Any = metric) -> Tensor:
            logits = network(image)
            metric.update(logits.argmax(1), labels)
            mean: Tensor = logits.mean()
            return mean

        with torch.no_grad():
            (torch.compile(step, backend="eager") if compiled else step)(image, labels)
        results.append(metric.compute())
    same(*results)


def score_by_name(name: str) -> None:
    score(lambda p, y: getattr(metrics, name)(p, y, num_classes=3, **KEYWORDS.get(name, {})))


def bytes_score(p: Tensor, y: Tensor) -> Tensor:
    return softdice.dice_score(p.to(torch.uint8), y.to(torch.uint8), 3)


def in_pyramid(loss: nn.Module) -> nn.Module:
    """A network's output at two resolutions, each with its loss."""
    deep = softdice.DeepSupervision(loss, weights=(1.0, 0.5))

    class Pyramid(nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            value: Tensor = deep([logits, logits[:, :, ::2, ::2, ::2]], labels)
            return value

    return Pyramid()


def one_after_another() -> None:
    """The compiler limits how often one code object is compiled anew: each class has a forward of its own."""
    logits, (labels, _) = torch.randn(LABELS_3D[0], 3, *LABELS_3D[1:], requires_grad=True), label_maps()
    for make in (*losses.FAMILY, *losses.BEYOND):
        loss = make(3, activation="softmax")
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, labels)
        same(value, loss(logits, labels))
        value.backward()


def cases() -> dict[str, Case]:
    """Return what runs, by name; the names of losses and metrics are those of the package."""
    dice = softdice.SoftDiceLoss(3, activation="softmax")
    maps: dict[Any, Callable[[], dict[str, Tensor]]] = {
        softdice.BoundaryLoss: lambda: {"voxel_map": softdice.distance_map(label_maps()[0], 3)},
        softdice.SkeletonRecallLoss: lambda: {"voxel_map": label_maps()[0] > 1},
    }
    every: dict[str, Case] = {
        loss.__name__: partial(train, loss(3, activation="softmax"), False, True, maps.get(loss, dict))
        for loss in FULL_GRAPH
    }
    own = softdice.OverlapLoss(lambda s: (s.intersection + 1) / (s.target + 1), 3, activation="softmax")
    every |= {
        "OverlapLoss": partial(train, own, False, True),
        "a sum": partial(train, dice + 0.5 * softdice.CrossEntropyLoss(3, activation="softmax"), False, True),
        "a function": partial(train, Function(), False, True),
        "DeepSupervision": partial(train, in_pyramid(dice), False, True),
        "FusedHead": partial(train, softdice.FusedHead(nn.Conv3d(4, 3, 1), dice), True, False),
        "Upsampled": partial(train, Doubled(softdice.Upsampled(dice, mode="trilinear")), False, False),
        "one after another": partial(one_after_another),
        "dice of bytes": partial(score, bytes_score),
        "distance_map": partial(score, lambda p, y: softdice.distance_map(y, 3)),
        "soft_confusion": partial(score, lambda p, y: softdice.soft_confusion(masks(p), y)),
    }
    for name in sorted({*metrics.__all__} - BASES, reverse=True):  # functions first
        every[name] = partial(validate if name[0].isupper() else score_by_name, name)
    return every


BASES = {"OverlapMetric", "CaseMetric", "SurfaceMetric"}
"""No metrics by themselves."""

KEYWORDS: dict[str, dict[str, Any]] = {"surface_dice": {"tolerance": 1.0}, "SurfaceDice": {"tolerance": 1.0}}


class Function(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = softdice.functional.jaccard_loss(logits, labels, activation="softmax")
        return value


class Doubled(nn.Module):
    """Labels of twice the size of the logits."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        for axis in (1, 2, 3):
            labels = labels.repeat_interleave(2, axis)
        value: Tensor = self.loss(logits, labels)
        return value


def masks(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels, 3).movedim(-1, 1).float()


def fork(case: Case) -> str:
    """Run a case in a process of its own; return what it raised, or ""."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            try:
                case()
            except BaseException:  # noqa: BLE001 - told to the process that forked
                pipe.write(traceback.format_exc()[-3000:] or "an error")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    return said or (f"the process ended with {status}" if status else "")


def main() -> None:
    torch.set_num_threads(1)  # and none is started before the last fork
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(1, requires_grad=True))  # imports the compiler, not us
    warm = {"numba", "torchmetrics", "cc3d", "skimage"} & set(sys.modules)
    assert not warm, f"expected nothing that our modules import late, got {warm}"
    ended = {}
    for name, case in cases().items():
        if case.func is validate:
            import torchmetrics  # noqa: F401 - who has made a metric has it
        ended[name] = fork(case)
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
