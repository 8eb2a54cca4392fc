"""softdice.compat.nnunet against the installed nnU-Net, on random configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.loss import compound_losses, dice
from nnunetv2.utilities.helpers import softmax_helper_dim1
from peers import Case, agree, cases, configurations
from torch import Tensor, nn

from softdice.compat import nnunet as ours
from softdice.compat import nnunet_training as training

flags = st.booleans()
nonlinearities = st.sampled_from([softmax_helper_dim1, nn.Softmax(1), torch.sigmoid, nn.Sigmoid(), torch.tanh, None])


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "batch_dice": draw(flags),
        "do_bg": draw(flags),
        "smooth": draw(st.sampled_from([0.0, 1e-5, 1.0])),
        "ddp": False,  # True needs a process group there
    }


def target_of(case: Case, kind: str) -> Tensor:
    if case.channels == 1 or kind == "one-hot":
        return case.one_hot
    return {"soft": case.soft, "map": case.labels[:, 0], "channel": case.labels, "float": case.labels.float()}[kind]


def with_background(case: Case, keywords: dict[str, Any]) -> dict[str, Any]:
    return {**keywords, "do_bg": keywords["do_bg"] or case.channels == 1}


kinds = st.sampled_from(["map", "channel", "float", "one-hot", "soft"])


@configurations
@given(
    case=cases(), keywords=options(), nonlin=nonlinearities, kind=kinds, masked=flags, clip=st.sampled_from([None, 2.0])
)
def test_dice(case: Case, keywords: dict[str, Any], nonlin: Any, kind: str, masked: bool, clip: float | None) -> None:
    keywords = {**with_background(case, keywords), "apply_nonlin": nonlin, "clip_tp": clip}
    mask = {"loss_mask": case.mask} if masked else {}
    agree(ours.SoftDiceLoss(**keywords), dice.SoftDiceLoss(**keywords), case.logits, target_of(case, kind), **mask)


@configurations
@given(case=cases(), keywords=options(), nonlin=nonlinearities, kind=kinds, masked=flags)
def test_memory_efficient_dice(case: Case, keywords: dict[str, Any], nonlin: Any, kind: str, masked: bool) -> None:
    keywords = {**with_background(case, keywords), "apply_nonlin": nonlin}
    mask = {"loss_mask": case.mask} if masked else {}
    agree(
        ours.MemoryEfficientSoftDiceLoss(**keywords),
        dice.MemoryEfficientSoftDiceLoss(**keywords),
        case.logits,
        target_of(case, kind),
        **mask,
    )


@configurations
@given(case=cases(least=2), keywords=options(), data=st.data(), efficient=flags, theirs=flags)
def test_dice_and_cross_entropy(
    case: Case, keywords: dict[str, Any], data: st.DataObject, efficient: bool, theirs: bool
) -> None:
    name = "MemoryEfficientSoftDiceLoss" if efficient else "SoftDiceLoss"
    weight = data.draw(st.sampled_from([None, [1.0, 0.5, 2.0, 3.0]]))
    entropy: dict[str, Any] = {
        "weight": None if weight is None else torch.tensor(weight[: case.channels], dtype=torch.float64),
        "reduction": data.draw(st.sampled_from(["mean", "mean", "sum"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.0, 0.1])),
    }
    ignored = data.draw(st.sampled_from([None, case.channels, 1]))
    if ignored is None and data.draw(flags):
        entropy["ignore_index"] = 0
    common = {
        "weight_ce": data.draw(st.sampled_from([0.0, 1.0, 0.3])),
        "weight_dice": data.draw(st.sampled_from([0.0, 1.0, 2.0])),
        "ignore_label": ignored,
    }
    target = case.labels if ignored is None else torch.where(case.mask.bool(), case.labels, ignored)
    agree(
        ours.DC_and_CE_loss(keywords, dict(entropy), dice_class=getattr(dice if theirs else ours, name), **common),
        compound_losses.DC_and_CE_loss(keywords, dict(entropy), dice_class=getattr(dice, name), **common),
        case.logits,
        target,
    )


@configurations
@given(case=cases(), keywords=options(), data=st.data(), ignore=flags, soft=flags)
def test_dice_and_binary_cross_entropy(
    case: Case, keywords: dict[str, Any], data: st.DataObject, ignore: bool, soft: bool
) -> None:
    positive = data.draw(st.sampled_from([None, 2.0, [0.5, 1.0, 2.0, 3.0]]))
    entropy: dict[str, Any] = {"reduction": data.draw(st.sampled_from(["mean", "sum"]))}
    if positive is not None:
        shape = (case.channels, *[1] * (case.logits.ndim - 2)) if isinstance(positive, list) else ()
        values = positive[: case.channels] if isinstance(positive, list) else positive
        entropy["pos_weight"] = torch.tensor(values, dtype=torch.float64).view(shape)
    keywords = with_background(case, keywords)
    target = case.soft if soft else case.one_hot
    if ignore:
        target = torch.cat([target, 1 - case.mask], 1)
        if not soft and data.draw(flags):
            target = target.bool()
    common = {"weight_ce": data.draw(st.sampled_from([0.0, 1.0])), "weight_dice": 0.7, "use_ignore_label": ignore}
    agree(
        ours.DC_and_BCE_loss(dict(entropy), keywords, **common),
        compound_losses.DC_and_BCE_loss(dict(entropy), keywords, **common),
        case.logits,
        target,
    )


def test_a_batch_of_nothing_but_ignored_voxels() -> None:
    loss = ours.DC_and_CE_loss({"smooth": 1.0}, {}, ignore_label=2)
    logits = torch.randn(1, 2, 4, requires_grad=True)
    value = loss(logits, torch.full((1, 1, 4), 2))
    assert value.item() == -1
    value.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_batch_dice_without_a_process_group_is_a_world_of_one() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.randint(0, 3, (2, 1, 5))
    alone = ours.SoftDiceLoss(nn.Softmax(1), batch_dice=True, ddp=True)(logits, labels)
    assert torch.equal(alone, ours.SoftDiceLoss(nn.Softmax(1), batch_dice=True, ddp=False)(logits, labels))


def _rank(rank: int, store: str) -> None:
    """One of two processes: the loss and the gradient of this rank's half, ours and theirs."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    logits, labels = torch.randn(2, 3, 5), torch.randint(0, 3, (2, 1, 5))
    for name in ("SoftDiceLoss", "MemoryEfficientSoftDiceLoss"):
        makes = (getattr(module, name)(softmax_helper_dim1, batch_dice=True, ddp=True) for module in (ours, dice))
        agree(*makes, logits, labels)
    torch.distributed.destroy_process_group()


@pytest.mark.peers
def test_batch_dice_over_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path / "store"),), nprocs=2)


LOGITS, LABELS = torch.zeros(1, 2, 3), torch.zeros(1, 1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ours.DC_and_CE_loss({}, {"size_average": True}), "ce_kwargs among weight, ignore_index"),
        (lambda: ours.DC_and_CE_loss({}, {"reduction": "none"}), "reduction to be one of 'mean', 'sum'"),
        (lambda: ours.DC_and_CE_loss({}, {}, dice_class=nn.Identity), "dice_class to be one of SoftDiceLoss"),
        (lambda: ours.DC_and_CE_loss({}, {})(LOGITS, LABELS[:, 0]), r"target of shape \(B, 1, \*S\)"),
        (lambda: ours.DC_and_CE_loss({}, {})(LOGITS, LABELS + 2), r"labels in \[0, 2\)"),
        (
            lambda: ours.DC_and_BCE_loss({"weight": torch.ones(3)}, {}),
            "bce_kwargs among pos_weight, reduction, got weight",
        ),
        (lambda: ours.DC_and_BCE_loss({"pos_weight": torch.ones(2, 3)}, {}), "pos_weight per class"),
        (lambda: ours.DC_and_BCE_loss({"pos_weight": torch.ones(2)}, {})(LOGITS, LOGITS), "pos_weight of shape"),
        (lambda: ours.DC_and_BCE_loss({}, {})(LOGITS, LABELS), r"target of shape \(1, 2, 3\)"),
    ],
)
def test_what_cannot_be_had_raises(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# --- the losses of a trainer


@configurations
@given(case=cases(least=2), keywords=options(), data=st.data(), regions=flags, ignored=flags, theirs=flags)
def test_what_a_trainer_takes_over(
    case: Case, keywords: dict[str, Any], data: st.DataObject, regions: bool, ignored: bool, theirs: bool
) -> None:
    """nnU-Net's loss, the drop-in loss made from it, and the sum of this package's losses that a FusedHead takes."""
    factors = {name: data.draw(st.sampled_from([1, 0.3])) for name in ("weight_ce", "weight_dice")}
    factors["dice_class"] = data.draw(st.sampled_from([dice.SoftDiceLoss, dice.MemoryEfficientSoftDiceLoss]))
    if regions:
        target = torch.cat([case.one_hot, 1 - case.mask], 1) if ignored else case.one_hot
        target = target.bool() if data.draw(flags) else target
        stock = compound_losses.DC_and_BCE_loss({}, keywords, use_ignore_label=ignored, **factors)
    else:
        weight = data.draw(st.sampled_from([None, [1.0, 0.5, 2.0, 3.0]]))
        entropy = {"weight": None if weight is None else torch.tensor(weight[: case.channels], dtype=torch.float64)}
        label = case.channels if ignored else None
        target = torch.where(case.mask.bool(), case.labels, case.channels) if ignored else case.labels
        stock = compound_losses.DC_and_CE_loss(keywords, entropy, ignore_label=label, **factors)
    taken = training.drop_in(stock)
    agree(taken, stock, case.logits, target)
    native = training.OfTargets(taken, training.native(taken, case.channels), taken.weight_dice)
    agree(native, stock, case.logits, target)


def test_a_compiled_part_is_taken_over() -> None:
    stock = compound_losses.DC_and_CE_loss({"ddp": False, "smooth": 0.5}, {}, dice_class=dice.SoftDiceLoss)
    stock.dc = torch.compile(stock.dc, backend="eager")
    assert training.drop_in(stock).dc.smooth == 0.5


def test_the_logarithm_of_dice_leaves_absent_classes_out() -> None:
    loss = ours.DC_and_CE_loss({"smooth": 0.0, "batch_dice": True, "do_bg": False}, {}, weight_ce=0)
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[[0, 1, 2, 2, 0]], [[0, 0, 0, 0, 0]]])
    value = training.native(loss, 4, cost="neg_log", absent="skip")(logits, labels)
    prob, true = logits.softmax(1), torch.nn.functional.one_hot(labels[:, 0], 4).movedim(-1, 1)
    score = 2 * (prob * true).sum((0, 2)) / (prob + true).sum((0, 2))
    torch.testing.assert_close(value, -score[1:3].log().mean())


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")  # nnU-Net's TopKLoss
def test_what_cannot_be_taken_over_raises() -> None:
    class DC_and_CE_loss(compound_losses.DC_and_CE_loss):  # noqa: N801 - a namesake
        pass

    for loss in (nn.Identity(), DC_and_CE_loss({}, {}), compound_losses.DC_and_topk_loss({}, {})):
        with pytest.raises(TypeError, match="expected a loss of nnU-Net's among DC_and_CE_loss, DC_and_BCE_loss"):
            training.drop_in(loss)
    for loss in (
        ours.DC_and_CE_loss({}, {"label_smoothing": 0.1}),
        ours.DC_and_CE_loss({"clip_tp": 1.0}, {}),
        ours.DC_and_BCE_loss({"pos_weight": torch.tensor(2.0)}, {}),
    ):
        with pytest.raises(ValueError, match="expected a loss of plain Dice and cross-entropy"):
            training.native(loss, 3)


def test_the_directory_of_trainers_is_safe_on_the_path() -> None:
    """nnU-Net puts it first on sys.path and imports what is there: one file, whose name nobody else has."""
    (file,) = training.TRAINERS.glob("[!_]*")
    assert file.name == "softdice_nnunet_trainers.py"


# --- counts


@pytest.mark.peers
@settings(max_examples=60)
@given(cases(), st.data())
def test_counts(case: Case, data: st.DataObject) -> None:
    """Soft and hard ones, with their gradients."""
    kinds = ["one-hot", "soft", "map", "channel", "float"]
    target = target_of(case, data.draw(st.sampled_from(kinds)))
    hard = data.draw(flags)
    axes = data.draw(st.sampled_from([None, tuple(range(2, case.logits.ndim)), (0, *range(2, case.logits.ndim))]))
    weight = torch.randn(case.channels)

    def found(function: Any) -> tuple[list[Tensor], Tensor]:
        logits = case.logits.detach().clone().requires_grad_()
        prob = (logits > 0).to(logits.dtype) + 0 * logits if hard else logits.sigmoid()
        counts = function(prob, target, axes, case.mask if data_mask else None)
        sum((count * weight).sum() * k for k, count in enumerate(counts, 1)).backward()
        return list(counts), logits.grad

    data_mask = data.draw(flags)
    (counts, gradient), (expected, theirs) = found(ours.get_tp_fp_fn_tn), found(dice.get_tp_fp_fn_tn)
    for count, value in zip(counts, expected, strict=True):
        torch.testing.assert_close(count.float(), value.float(), rtol=1e-4, atol=1e-4)
    assert (gradient - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_counts_that_no_sum_gives() -> None:
    prob, labels = torch.full((1, 2, 3, 4), 0.5), torch.zeros(1, 3, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"get_tp_fp_fn_tn: expected square=False, got True"):
        ours.get_tp_fp_fn_tn(prob, labels, square=True)
    for axes in ((), (2,), (0,), (1, 2, 3)):
        with pytest.raises(ValueError, match="expected axes of all of space"):
            ours.get_tp_fp_fn_tn(prob, labels, axes)
    ours.get_tp_fp_fn_tn(prob, labels, (-1, -2))
