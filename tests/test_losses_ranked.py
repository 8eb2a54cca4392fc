"""Losses that go by the rank of a voxel: the map of the cross-entropy, top-k, hard examples, Lovasz; sums with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import smp_losses
from torch import Tensor
from torch.nn.functional import cross_entropy

import softdice
from softdice import LovaszLoss, OHEMCrossEntropyLoss, TopKCrossEntropyLoss, voxel_cross_entropy
from softdice.compat import nnunet
from softdice.losses.base import MixedSumLoss, SumLoss
from softdice.training import TrainConfig, train
from softdice.training.config import TrainingError
from softdice.training.loss_names import parse_loss

# Two classes, three voxels
PROBABILITY = torch.tensor([[[0.9, 0.2, 0.5], [0.1, 0.8, 0.5]]], dtype=torch.float64)
LABELS = torch.tensor([[0, 1, 1]])


def problem(*shape: int, seed: int = 0, ignored: int | None = None) -> tuple[Tensor, Tensor]:
    """Return logits (B, C, V) and labels (B, V); the last class is absent."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, max(shape[1] - 1, 2), (shape[0], *shape[2:]), generator=generator)
    if ignored is not None:
        labels[:, ::5] = ignored
    return 1.5 * torch.randn(shape, generator=generator), labels


def outcome(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return value and gradient in float64; the gradient of a map in a direction in which its entries differ."""
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    direction = (
        torch.linspace(-1, 2, value.numel()).to(value).view(value.shape) if value.ndim else torch.ones_like(value)
    )
    (value * direction).sum().backward()
    assert leaf.grad is not None
    return value.detach().double(), leaf.grad.double()


def assert_same(ours: Any, exact: Any, logits: Tensor, tolerance: float = 1e-5) -> None:
    """Compare value and gradient within the tolerance of their maxima; float64 exactly."""
    (value, gradient), (expected, slope) = outcome(ours, logits), outcome(exact, logits.double())
    assert value.shape == expected.shape
    assert float(slope.abs().max()) > 0
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    torch.testing.assert_close(gradient, slope, rtol=0, atol=tolerance * float(slope.abs().max()))


# --- the map


def test_the_map_by_hand(backend: str) -> None:
    found = voxel_cross_entropy(PROBABILITY, torch.tensor([[0, 0, 255]]), ignore_index=255)
    assert found.tolist() == [pytest.approx([-math.log(0.9), -math.log(0.2), 0.0])]
    # y = (0.9, 0.1) at the first voxel: -0.9 ln 0.9 - 0.1 ln 0.1
    smooth = voxel_cross_entropy(PROBABILITY, LABELS, label_smoothing=0.2)
    assert smooth[0, 0].item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))


@pytest.mark.parametrize(
    ("keywords", "ignored"), [({}, None), ({"ignore_index": 255}, 255), ({"label_smoothing": 0.1}, None)]
)
@pytest.mark.parametrize("classes", [3, 14])
def test_the_map_is_torchs(backend: str, classes: int, keywords: dict[str, Any], ignored: int | None) -> None:
    logits, labels = problem(2, classes, 3, 700, ignored=ignored)
    assert_same(
        lambda x: voxel_cross_entropy(x, labels, activation="softmax", **keywords),
        lambda x: cross_entropy(x, labels, reduction="none", **keywords),
        logits,
    )


def test_the_map_of_masks_and_of_soft_labels(backend: str) -> None:
    logits, _ = problem(2, 3, 900)
    soft = problem(2, 3, 900, seed=1)[0].softmax(1)
    assert_same(
        lambda x: voxel_cross_entropy(x, soft, activation="softmax"),
        lambda x: cross_entropy(x, soft.double(), reduction="none"),
        logits,
    )
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    assert_same(
        lambda x: voxel_cross_entropy(x, soft, activation="sigmoid"),
        lambda x: binary(x, soft.double(), reduction="none").sum(1),
        logits,
    )


def test_the_map_of_half_precision_and_strided_logits(backend: str) -> None:
    logits, labels = problem(2, 3, 40, 30)
    for x in (logits.bfloat16(), logits.transpose(2, 3).contiguous().transpose(2, 3), logits.double()):
        found = voxel_cross_entropy(x, labels, activation="softmax")
        expected = cross_entropy(x.double(), labels, reduction="none")
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_nan_stays_at_its_voxel(backend: str) -> None:
    logits, labels = problem(1, 3, 2000)
    logits[0, 1, 7] = logits[0, 0, 9] = math.nan
    labels[0, 9] = 255
    leaf = logits.requires_grad_()
    found = voxel_cross_entropy(leaf, labels, activation="softmax", ignore_index=255)
    assert found.isnan().nonzero().tolist() == [[0, 7]]
    found[0, 8:].sum().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad[:, :, :8] == 0).all() | leaf.grad[:, :, 7].isnan().all())
    assert bool((leaf.grad[:, :, 9] == 0).all())


def test_mistakes(backend: str) -> None:
    logits, labels = problem(2, 3, 900)
    for call in (
        lambda y: voxel_cross_entropy(logits, y, activation="softmax"),
        lambda y: LovaszLoss(3, activation="softmax")(logits, y),
        lambda y: TopKCrossEntropyLoss(3, activation="softmax")(logits, y),
    ):
        with pytest.raises(ValueError, match=r"expected target with labels in \[0, 3\), got 7 \(1 voxels\)"):
            call(labels.index_put((torch.tensor(0), torch.tensor(5)), torch.tensor(7)))
    with pytest.raises(ValueError, match=r"^voxel_cross_entropy: expected probabilities in \[0, 1\]"):
        voxel_cross_entropy(logits, labels)
    with pytest.raises(ValueError, match=r"^LovaszLoss: expected zeros and ones in target, got 0\.5 "):
        LovaszLoss(3)(logits.softmax(1), torch.full_like(logits, 0.5))
    with pytest.raises(ValueError, match=r"^LovaszLoss: expected zeros and ones in voxel_weight, got 2\.0 "):
        LovaszLoss(3)(logits.softmax(1), labels, torch.full((2, 900), 2.0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TopKCrossEntropyLoss(3, 0.0), r"TopKCrossEntropyLoss: expected k in \(0, 1\], or a number of voxels"),
        (lambda: TopKCrossEntropyLoss(3, 1.5), r"expected k in \[0, 1\], got 1\.5"),
        (lambda: TopKCrossEntropyLoss(3, 0), r"expected k >= 1, got 0"),
        (lambda: TopKCrossEntropyLoss(1), "expected activation='sigmoid' for a single class, got 'none'"),
        (lambda: OHEMCrossEntropyLoss(3, 1.0), r"OHEMCrossEntropyLoss: expected threshold in \[0, 1\), got 1\.0"),
        (lambda: OHEMCrossEntropyLoss(3, min_kept=-1), "expected min_kept to be an int >= 0, got -1"),
        (lambda: LovaszLoss(3, absent="present"), "LovaszLoss: expected absent to be one of 'count', 'skip'"),  # type: ignore[arg-type]
        (lambda: LovaszLoss(1, activation="softmax"), "expected activation 'sigmoid' or 'none' for one class"),
    ],
)
def test_settings_that_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# --- the largest


def top_k(logits: Tensor, labels: Tensor, count: int, **keywords: Any) -> Tensor:
    entropy = cross_entropy(logits, labels, reduction="none", **keywords)
    return entropy.flatten().sort(descending=True).values[:count].mean()


def test_top_k_by_hand(backend: str) -> None:
    # E = -ln 0.9, -ln 0.8, -ln 0.5: the two largest
    expected = -(math.log(0.8) + math.log(0.5)) / 2
    for k in (2, 0.7):  # 0.7 * 3 = 2.1
        assert TopKCrossEntropyLoss(2, k)(PROBABILITY, LABELS).item() == pytest.approx(expected)
    assert TopKCrossEntropyLoss(2, 2, reduction="sum")(PROBABILITY, LABELS).item() == pytest.approx(2 * expected)
    assert TopKCrossEntropyLoss(2, 0.01)(PROBABILITY, LABELS).item() == pytest.approx(-math.log(0.5))
    assert TopKCrossEntropyLoss(2, 99)(PROBABILITY, LABELS).item() == pytest.approx(-math.log(0.9 * 0.8 * 0.5) / 3)
    weighted = TopKCrossEntropyLoss(2, 1)(PROBABILITY, LABELS, torch.tensor([[10.0, 1.0, 0.0]]))
    assert weighted.item() == pytest.approx(-10 * math.log(0.9))


def test_top_k_is_nnu_nets(backend: str) -> None:
    from nnunetv2.training.loss.robust_ce_loss import TopKLoss

    logits, labels = problem(2, 4, 30, 41, ignored=255)
    with pytest.warns(UserWarning, match="reduce"):  # theirs, of torch's old arguments
        theirs = TopKLoss(ignore_index=255, k=10)
    for ours in (
        lambda x: TopKCrossEntropyLoss(4, 0.1, activation="softmax", ignore_index=255)(x, labels),
        lambda x: nnunet.TopKLoss(ignore_index=255)(x, labels.unsqueeze(1)),
        lambda x: top_k(x, labels, 246, ignore_index=255),
    ):
        assert_same(ours, lambda x: theirs(x, labels.unsqueeze(1)), logits)


def test_top_k_per_sample(backend: str) -> None:
    logits, labels = problem(2, 3, 1000)
    assert_same(
        lambda x: TopKCrossEntropyLoss(3, 0.29, activation="softmax", pooling="sample")(x, labels),
        lambda x: (top_k(x[:1], labels[:1], 290) + top_k(x[1:], labels[1:], 290)) / 2,
        logits,
    )


def test_of_equal_voxels_as_many_as_are_wanted(backend: str) -> None:
    logits = torch.zeros(1, 2, 4000).requires_grad_()
    value = TopKCrossEntropyLoss(2, 0.25, activation="softmax")(logits, torch.zeros(1, 4000, dtype=torch.long))
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    assert int((logits.grad[0, 0] != 0).sum()) == 1000
    logits.data[0, 0, 5] = math.nan
    assert TopKCrossEntropyLoss(2, 0.25, activation="softmax")(logits, torch.zeros(1, 4000)).isnan()


@pytest.mark.parametrize("options", [{}, {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"label_smoothing": 0.1}])
def test_the_drop_in_classes_of_nnu_net(backend: str, options: dict[str, Any]) -> None:
    from nnunetv2.training.loss import compound_losses

    logits, labels = problem(2, 4, 30, 41, ignored=7)
    arguments: Any = ({"batch_dice": True, "ddp": False}, {"k": 20, **options}, 0.5, 2, 7)
    with pytest.warns(UserWarning, match="reduce"):
        theirs = compound_losses.DC_and_topk_loss(*copy.deepcopy(arguments))
    if "weight" in options:
        theirs.ce.weight = theirs.ce.weight.double()
    ours = nnunet.DC_and_topk_loss(*arguments)
    assert_same(lambda x: ours(x, labels.unsqueeze(1)), lambda x: theirs(x, labels.unsqueeze(1)), logits)


# --- hard examples


def mmseg_ohem(logits: Tensor, labels: Tensor, threshold: float, min_kept: int, ignored: int) -> Tensor:
    """Return the sum of the losses that MMSegmentation keeps: p of the true class below the larger of two bounds."""
    kept, counted = min_kept * len(labels), labels != ignored
    p = logits.softmax(1).gather(1, torch.where(counted, labels, 0).unsqueeze(1)).squeeze(1)
    ranked = p[counted].sort().values
    bound = max(ranked[min(kept, len(ranked) - 1)].item(), threshold)
    return (cross_entropy(logits, labels, reduction="none", ignore_index=ignored) * (counted & (p < bound))).sum()


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 0), (0.7, 100), (0.001, 300), (0.0, 5000), (0.3, 1)])
def test_hard_examples_are_mmsegs(backend: str, threshold: float, min_kept: int) -> None:
    logits, labels = problem(2, 4, 30, 41, ignored=255)
    settings: dict[str, Any] = {"activation": "softmax", "ignore_index": 255, "reduction": "sum"}
    loss = OHEMCrossEntropyLoss(4, threshold, min_kept, **settings)
    assert_same(
        lambda x: loss(x, labels),
        lambda x: mmseg_ohem(x, labels, threshold, min_kept, 255) if threshold or min_kept else x.sum() * 0,
        logits,
    )


def test_hard_examples_by_hand(backend: str) -> None:
    # p of the true class: 0.9, 0.8, 0.5
    assert OHEMCrossEntropyLoss(2, 0.7, 0)(PROBABILITY, LABELS).item() == pytest.approx(-math.log(0.5))
    assert OHEMCrossEntropyLoss(2, 0.3, 2)(PROBABILITY, LABELS).item() == pytest.approx(-math.log(0.5 * 0.8) / 2)
    assert OHEMCrossEntropyLoss(2, 0.3, 0)(PROBABILITY, LABELS).item() == 0
    nothing = OHEMCrossEntropyLoss(2, ignore_index=255)(PROBABILITY, torch.full((1, 3), 255))
    assert nothing.item() == 0


# --- Lovasz


def jaccard_steps(of_class: Tensor) -> Tensor:
    """Return the steps of the authors' algorithm 1."""
    union = of_class.sum() + (1 - of_class).cumsum(0)
    jaccard = 1 - (of_class.sum() - of_class.cumsum(0)) / union
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


def authors(
    values: Tensor, labels: Tensor, *, hinge: bool = False, classes: str = "all", ignored: int | None = None
) -> Tensor:
    """Return the authors' loss of probabilities, or the hinge of logits, class by class."""
    counted = labels != ignored if ignored is not None else torch.ones_like(labels, dtype=torch.bool)
    found = []
    for c in range(values.shape[1]):
        value, of_class = values[:, c][counted], (labels[counted] == c).to(values.dtype)
        if classes == "present" and of_class.sum() == 0:
            continue
        errors = 1 - value * (2 * of_class - 1) if hinge else (of_class - value).abs()
        ranked, order = errors.sort(descending=True, stable=True)
        found.append(ranked.relu() @ jaccard_steps(of_class[order]))
    return torch.stack(found).mean()


def test_lovasz_by_hand(backend: str) -> None:
    # class 0: errors 0.5 and 0.2 of the others, 0.1 of its voxel. J after each: 1 - 1/2, 1 - 1/3, 1
    zero = 0.5 * (1 / 2) + 0.2 * (2 / 3 - 1 / 2) + 0.1 * (1 - 2 / 3)
    # class 1: errors 0.5 and 0.2 of its voxels, 0.1 of the other. J after each: 1 - 1/2, 1 - 0/2, 1
    one = 0.5 * (1 / 2) + 0.2 * (1 - 1 / 2)
    assert LovaszLoss(2, reduction="none")(PROBABILITY, LABELS).tolist() == pytest.approx([zero, one])
    assert LovaszLoss(2, classes=(1,))(PROBABILITY, LABELS).item() == pytest.approx(one)
    weighted = LovaszLoss(2, class_weight=[3.0, 1.0])(PROBABILITY, LABELS)
    assert weighted.item() == pytest.approx((3 * zero + one) / 4)


def test_lovasz_of_zeros_and_ones_is_the_jaccard_loss(backend: str) -> None:
    labels = problem(2, 3, 800)[1]
    guess = torch.nn.functional.one_hot(problem(2, 3, 800, seed=1)[1], 3).movedim(-1, 1).float()
    found = LovaszLoss(3, classes=(0, 1), reduction="none")(guess, labels)
    jaccard = softdice.JaccardLoss(3, eps=0.0, classes=(0, 1), reduction="none")(guess, labels)
    torch.testing.assert_close(found, jaccard)


@pytest.mark.parametrize("ignored", [None, 255])
@pytest.mark.parametrize(("absent", "classes"), [("count", "all"), ("skip", "present")])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_lovasz_is_the_authors(backend: str, activation: Any, absent: Any, classes: str, ignored: int | None) -> None:
    logits, labels = problem(2, 4, 6, 97, ignored=ignored)  # so few that float32 has the order of float64
    loss = LovaszLoss(4, activation=activation, absent=absent, ignore_index=ignored)
    hinge = activation == "sigmoid"
    exact = lambda x: authors(x if hinge else x.softmax(1), labels, hinge=hinge, classes=classes, ignored=ignored)  # noqa: E731
    assert_same(lambda x: loss(x, labels), exact, logits)
    assert_same(lambda x: loss(x, labels), exact, logits.double())


def test_lovasz_per_sample_is_smps(backend: str) -> None:
    """Theirs computes in float32 only: its steps, 1e-4 to 1e-2, are differences of numbers up to 1, each 6e-8 off."""
    theirs = smp_losses().lovasz.LovaszLoss
    logits, labels = problem(2, 3, 20, 30, ignored=255)
    labels[0][labels[0] == 1] = 0  # present in one sample only
    for per_image, pooling in ((False, "batch"), (True, "sample")):
        settings: Any = {"pooling": pooling, "ignore_index": 255, "absent": "skip"}
        ours = LovaszLoss(3, activation="softmax", **settings)
        their = theirs("multiclass", per_image=per_image, ignore_index=255)
        assert_same(lambda x, loss=ours: loss(x, labels), lambda x, loss=their: loss(x.float(), labels), logits, 1e-4)
        mask = torch.where(labels == 255, 255, (labels == 0).long())
        hinge = LovaszLoss(1, activation="sigmoid", **{**settings, "absent": "count"})
        their = theirs("binary", per_image=per_image, ignore_index=255)
        assert_same(
            lambda x, loss=hinge, y=mask: loss(x, y),
            lambda x, loss=their, y=mask: loss(x[:, 0].float(), y),
            logits[:, :1],
            1e-3,
        )


def test_equal_errors(backend: str) -> None:
    """Coarse probabilities: every order of equal errors has the same value; the first goes first in the gradient."""
    logits, labels = problem(2, 3, 1500)
    coarse = (logits.softmax(1) * 8).round() / 8
    assert_same(lambda p: LovaszLoss(3)(p, labels), lambda p: authors(p, labels), coarse)


def test_lovasz_on_a_large_problem(backend: str) -> None:
    """More voxels than one run of keys; float32 errors change places with their neighbours, by about 1 / voxels."""
    logits, labels = problem(2, 3, 30_000)
    loss = LovaszLoss(3, activation="softmax", absent="skip")
    for x, tolerance in ((logits, 1e-3), (logits.double(), 1e-5)):
        assert_same(lambda x: loss(x, labels), lambda x: authors(x.softmax(1), labels, classes="present"), x, tolerance)


def test_lovasz_voxels_left_out_and_masks(backend: str) -> None:
    logits, labels = problem(2, 3, 700)
    weight = torch.ones(2, 700)
    weight[:, ::3] = 0
    ignored = torch.where(weight > 0, labels, 255)
    expected = outcome(lambda x: LovaszLoss(3, activation="softmax", ignore_index=255)(x, ignored), logits)
    broken = torch.where(weight.unsqueeze(1) > 0, logits, math.nan)
    one_hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    for target in (labels, one_hot):
        found = outcome(lambda x, y=target: LovaszLoss(3, activation="softmax")(x, y, weight), broken)
        torch.testing.assert_close(found, expected)


def test_nothing_counts(backend: str) -> None:
    logits, labels = problem(2, 3, 700)
    for loss in (LovaszLoss(3, activation="softmax", ignore_index=255),
                 TopKCrossEntropyLoss(3, activation="softmax", ignore_index=255)):  # fmt: skip
        value, gradient = outcome(lambda x, loss=loss: loss(x, torch.full_like(labels, 255)), logits)
        assert value.item() == 0
        assert not gradient.any()
        for empty in (torch.zeros(0, 3, 5), torch.zeros(2, 3, 0)):
            leaf = empty.requires_grad_()
            loss(leaf, torch.zeros(len(empty), empty.shape[2], dtype=torch.long)).backward()
            assert leaf.grad is not None
            assert leaf.grad.shape == leaf.shape


def test_a_graph_twice_and_layouts(backend: str) -> None:
    logits, labels = problem(2, 3, 40, 30)
    expected = outcome(lambda x: LovaszLoss(3, activation="softmax")(x, labels), logits)[1]
    for x in (logits, logits.contiguous(memory_format=torch.channels_last), logits.bfloat16()):
        leaf = x.detach().clone().requires_grad_()
        value = LovaszLoss(3, activation="softmax")(leaf, labels)
        first, again = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, again)
        assert first.dtype == x.dtype
        tolerance = 1e-4 if x.dtype == torch.float32 else 0.05  # of bfloat16 logits other ranks
        scale = float(expected.abs().max())
        torch.testing.assert_close(first.double(), expected, rtol=0, atol=tolerance * scale)


# --- sums, training, memory


def test_sums_share_a_pass_where_they_can() -> None:
    logits, labels = problem(2, 3, 700)
    dice, entropy = (make(3, activation="softmax") for make in (softdice.SoftDiceLoss, softdice.CrossEntropyLoss))
    lovasz, top = LovaszLoss(3, activation="softmax"), TopKCrossEntropyLoss(3, activation="softmax")
    total = dice + 0.5 * lovasz + 2 * (entropy + top)
    assert isinstance(total, MixedSumLoss)
    assert [type(loss) for _, loss in total.parts] == [SumLoss, LovaszLoss, TopKCrossEntropyLoss]
    expected = [float(loss(logits, labels)) for loss in (dice, lovasz, entropy, top)]
    for loss in (total, copy.deepcopy(total), sum([dice, 0.5 * lovasz, 2 * entropy, 2 * top])):
        found = float(loss(logits, labels))  # type: ignore[operator]
        assert found == pytest.approx(sum(w * v for w, v in zip((1, 0.5, 2, 2), expected, strict=True)))
    assert isinstance(dice + entropy, SumLoss)
    assert float((lovasz * 2)(logits, labels)) == pytest.approx(2 * expected[1])
    with pytest.raises(ValueError, match="expected losses that agree on num_classes"):
        dice + LovaszLoss(4)
    deep = softdice.DeepSupervision(softdice.SoftDiceLoss(3, activation="softmax", ignore_index=1) + lovasz, (1, 0.5))
    assert deep([logits, logits[..., ::2]], labels.float()).isfinite()


def test_the_commands_know_them() -> None:
    loss = parse_loss("dice+0.5*lovasz+topk+ohem", 3, group="world", ignore_index=255)
    assert isinstance(loss, MixedSumLoss)
    assert (loss.weights, loss.ignore_index) == ((1, 0.5, 1, 1), 255)
    assert [term.settings.activation for term in loss.terms] == ["softmax"] * 4  # type: ignore[union-attr]


def test_the_fused_head_of_the_command_says_what_it_takes(tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "run"), loss="dice+lovasz", fused_head=True)
    words = "expected a loss that is a function of sums over the voxels with --fused-head, got dice"
    with pytest.raises(TrainingError, match=words):
        train(config)


def test_compiled_and_transformed() -> None:
    logits, labels = problem(2, 3, 2000)
    loss = softdice.SoftDiceLoss(3, activation="softmax") + LovaszLoss(3, activation="softmax")
    loss = loss + TopKCrossEntropyLoss(3, activation="softmax")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))
    gradient = torch.func.grad(lambda x: loss(x, labels))(logits)
    torch.testing.assert_close(gradient, outcome(lambda x: loss(x, labels), logits)[1].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "loss", [LovaszLoss(14, activation="softmax"), TopKCrossEntropyLoss(14, activation="softmax"),
             OHEMCrossEntropyLoss(14, activation="softmax", min_kept=100)], ids=lambda loss: type(loss).__name__
)  # fmt: skip
def test_memory_is_the_gradient_and_two_class_maps(loss: softdice.losses.Loss) -> None:
    pytest.importorskip("numba", reason="the CPU kernel needs numba")
    logits, labels = problem(2, 14, 40_000)
    loss(logits.requires_grad_(), labels).backward()  # what is compiled and kept
    logits.grad = None
    peak = _peak_bytes(lambda: loss(logits, labels).backward())
    class_map = 2 * 40_000 * 4
    assert peak <= (14 + 2) * class_map + (1 << 20)  # and what does not grow with the voxels


def _peak_bytes(work: Callable[[], None]) -> int:
    """Return the most bytes that torch and NumPy held at a time beyond what they held before, by their own counts."""
    import tracemalloc

    from torch.profiler import ProfilerActivity, profile

    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            work()
        numpy_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = most = 0
    for event in sorted(
        (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        most = max(most, held)
    return most + numpy_peak


@pytest.mark.parametrize(
    "loss",
    [
        softdice.OHEMCrossEntropyLoss(3, min_kept=3, activation="softmax", ignore_index=255),
        softdice.TopKCrossEntropyLoss(3, activation="softmax", ignore_index=255),
        softdice.LovaszLoss(3, activation="softmax", ignore_index=255),
    ],
)
def test_labels_of_any_form_give_the_same_number(loss: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(2, 3, 8, 8, generator=generator), torch.randint(0, 3, (2, 8, 8), generator=generator)
    labels[0, 0] = 255
    expected = loss(logits, labels)
    for form in (labels.float(), labels.to(torch.uint8), labels.unsqueeze(1), labels.to(torch.uint16)):
        assert torch.equal(loss(logits, form), expected)
