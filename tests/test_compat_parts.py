"""softdice.compat beyond the numbers: parts that are replaced, what is saved, lists, shapes, batches of nothing."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import monai.losses
import nnunetv2.training.loss.compound_losses as theirs
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1
from peers import agree, smp_losses
from torch import Tensor, nn

import softdice
from softdice.backends import op
from softdice.compat import monai as m
from softdice.compat import nnunet as n
from softdice.compat import smp as s

B, C, SPACE = 2, 3, (4, 5)


def logits(**more: Any) -> Tensor:
    return torch.randn(B, C, *SPACE, generator=torch.Generator().manual_seed(7), dtype=torch.float64, **more)


def labels() -> Tensor:
    """Return labels (B, 1, *S) with every class."""
    return torch.randint(0, C, (B, 1, *SPACE), generator=torch.Generator().manual_seed(8))


def hot() -> Tensor:
    return nn.functional.one_hot(labels()[:, 0], C).movedim(-1, 1).double()


class Constant(nn.Module):
    """A loss that a user wrote."""

    def forward(self, input: Tensor, target: Tensor, **_: Any) -> Tensor:
        return 7 + 0 * input.sum()


# --- whatever stands in a part is called ---------------------------------------------------------------------------

REPLACED: list[tuple[Callable[[], Any], str, float, Callable[[], Tensor]]] = [
    (lambda: m.DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=0.0), "cross_entropy", 7.0, labels),
    (lambda: m.DiceCELoss(to_onehot_y=True, softmax=True, lambda_ce=0.0), "dice", 7.0, labels),
    (lambda: m.DiceFocalLoss(sigmoid=True, lambda_dice=0.0), "focal", 7.0, hot),
    (lambda: m.DiceFocalLoss(sigmoid=True, lambda_focal=0.0), "dice", 7.0, hot),
    (lambda: m.GeneralizedDiceFocalLoss(sigmoid=True, lambda_focal=0.0), "generalized_dice", 7.0, hot),
    (lambda: n.DC_and_CE_loss({}, {}, weight_dice=0), "ce", 7.0, labels),
    (lambda: n.DC_and_CE_loss({}, {}, weight_ce=0, ignore_label=2), "dc", 7.0, labels),
    (lambda: n.DC_and_BCE_loss({}, {}, weight_dice=0), "ce", 7.0, hot),
    (lambda: n.DC_and_BCE_loss({}, {}, weight_ce=0), "dc", 7.0, hot),
]


@pytest.mark.parametrize(("make", "part", "value", "target"), REPLACED)
def test_a_part_that_is_replaced_is_called(
    make: Callable[[], Any], part: str, value: float, target: Callable[[], Tensor]
) -> None:
    loss = make()
    setattr(loss, part, Constant())
    assert loss(logits(), target()).item() == pytest.approx(value)


def test_a_part_in_a_compiled_module_still_shares_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = n.DC_and_CE_loss({}, {})
    loss.dc = torch.compile(loss.dc, backend="eager")  # as nnU-Net's trainer does
    passes = []
    monkeypatch.setattr(n.common, "sums", lambda *a, sums=n.common.sums, **k: passes.append(1) or sums(*a, **k))
    torch.testing.assert_close(loss(logits(), labels()), n.DC_and_CE_loss({}, {})(logits(), labels()))
    assert len(passes) == 2


ONE_PASS = [
    (lambda: m.FocalLoss(to_onehot_y=True, alpha=0.3), labels),
    (lambda: m.FocalLoss(to_onehot_y=True, alpha=[0.3, 0.6], include_background=False, ignore_index=1), labels),
    (lambda: s.FocalLoss("multiclass", alpha=0.3), labels),
    (lambda: s.FocalLoss("multilabel", alpha=0.3, normalized=True), hot),
    (lambda: n.DC_and_BCE_loss({"pos_weight": torch.tensor([[[1.0]], [[2.0]], [[3.0]]])}, {}), hot),
]


@pytest.mark.parametrize(("make", "target"), ONE_PASS)
def test_weights_of_the_two_sides_cost_no_second_pass(
    make: Callable[[], Any], target: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a label map is read as it is: no target of one channel per class is made of it."""
    passes: list[tuple[int, ...]] = []
    measure = m.common.measure
    monkeypatch.setattr(m.common, "measure", lambda *args: passes.append(tuple(args[1].shape[:2])) or measure(*args))
    make()(logits(), target())
    assert passes == [tuple(target().shape[:2])]


def test_a_hook_on_a_part_runs() -> None:
    seen = []
    loss = n.DC_and_CE_loss({}, {})
    loss.ce.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(loss(logits(), labels()), n.DC_and_CE_loss({}, {})(logits(), labels()))
    assert seen == [1]


def test_methods_of_a_subclass_are_called() -> None:
    class Doubled(m.DiceCELoss):
        def ce(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().ce(input, target)

    keywords = {"to_onehot_y": True, "softmax": True}
    twice = m.DiceCELoss(lambda_ce=2.0, **keywords)(logits(), labels())
    torch.testing.assert_close(Doubled(**keywords)(logits(), labels()), twice)


def test_options_set_later_are_used() -> None:
    loss = m.DiceLoss(sigmoid=True)
    loss.squared_pred, loss.batch, loss.reduction = True, True, "sum"
    peer = monai.losses.DiceLoss(sigmoid=True, squared_pred=True, batch=True, reduction="sum")
    agree(loss, peer, logits(), hot())


# --- constructors --------------------------------------------------------------------------------------------------


def theirs_of(module: Any) -> dict[str, Any]:
    if module is m:
        return vars(monai.losses)
    if module is n:
        return {**vars(theirs), "DeepSupervisionWrapper": DeepSupervisionWrapper}
    parts = (part for part in vars(smp_losses()).values() if inspect.ismodule(part))
    return {name: value for part in parts for name, value in vars(part).items()}


@pytest.mark.parametrize("module", [m, n, s], ids=lambda module: module.__name__)
def test_constructors_have_the_originals_arguments(module: Any) -> None:
    names = [name for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")]
    own = [name for name in names if getattr(module, name).__module__ == module.__name__]
    assert len(own) >= 6
    for name in own:
        ours, peers = (
            [
                (p.name, p.kind, getattr(p.default, "__name__", p.default))
                for p in inspect.signature(cls).parameters.values()
            ]
            for cls in (getattr(module, name), theirs_of(module)[name])
        )
        assert ours == peers, name


# --- only the thing itself is taken for ours ------------------------------------------------------------------------


def test_a_namesake_of_their_nonlinearity_is_called() -> None:
    def cooler(x: Tensor) -> Tensor:
        return torch.softmax(x / 3, 1)

    cooler.__name__ = softmax_helper_dim1.__name__
    theirs_too = MemoryEfficientSoftDiceLoss(cooler, ddp=False)
    agree(n.MemoryEfficientSoftDiceLoss(cooler, ddp=False), theirs_too, logits(), labels())


def test_a_namesake_of_their_dice_is_refused() -> None:
    class SoftDiceLoss(Constant):
        pass

    with pytest.raises(ValueError, match=r"DC_and_CE_loss: expected dice_class to be one of SoftDiceLoss"):
        n.DC_and_CE_loss({}, {}, dice_class=SoftDiceLoss)


# --- what is saved, copied and compiled -----------------------------------------------------------------------------

SAVED = [
    (m.DiceLoss(weight=[1.0, 2.0, 3.0]), monai.losses.DiceLoss(weight=[1.0, 2.0, 3.0])),
    (m.FocalLoss(weight=[1.0, 2.0, 3.0]), monai.losses.FocalLoss(weight=[1.0, 2.0, 3.0])),
    (m.DiceCELoss(weight=torch.ones(3)), monai.losses.DiceCELoss(weight=torch.ones(3))),
    (m.DiceFocalLoss(weight=[1.0, 2.0, 3.0]), monai.losses.DiceFocalLoss(weight=[1.0, 2.0, 3.0])),
    (
        n.DC_and_CE_loss({}, {"weight": torch.ones(3)}),
        theirs.DC_and_CE_loss({}, {"weight": torch.ones(3)}),
    ),
    (
        n.DC_and_BCE_loss({"pos_weight": torch.ones(3, 1, 1)}, {}),
        theirs.DC_and_BCE_loss({"pos_weight": torch.ones(3, 1, 1)}, {}),
    ),
]


@pytest.mark.parametrize(("ours", "peer"), SAVED)
def test_their_state_is_ours(ours: nn.Module, peer: nn.Module) -> None:
    assert set(ours.state_dict()) == set(peer.state_dict())
    ours.load_state_dict({name: value + 1 for name, value in peer.state_dict().items()}, strict=True)
    assert ours.state_dict()


@pytest.mark.parametrize("make", [row[0] for row in REPLACED])
def test_a_drop_in_loss_is_pickled_copied_and_torchs(make: Callable[[], Any]) -> None:
    loss = make()
    target = labels() if isinstance(loss, (m.DiceCELoss, n.DC_and_CE_loss)) else hot()
    for again in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(again(logits(), target), loss(logits(), target))
    assert isinstance(loss, torch.nn.modules.loss._Loss)
    assert "reduction" in vars(loss)


def test_compiles_whole() -> None:
    for loss, target in (
        (m.DiceLoss(softmax=True, weight=[1.0, 2.0, 3.0]), hot()),
        (m.DiceCELoss(softmax=True, weight=torch.ones(3)), hot()),
        (n.DC_and_CE_loss({}, {}), labels()),
        (n.DC_and_BCE_loss({}, {}), hot()),
    ):
        whole = torch.compile(loss, fullgraph=True, backend="eager")
        torch.testing.assert_close(whole(logits(), target), loss(logits(), target))


def test_a_module_as_activation() -> None:
    loss = m.DiceLoss(other_act=nn.Sigmoid())
    torch.testing.assert_close(loss(logits(), hot()), m.DiceLoss(sigmoid=True)(logits(), hot()))
    assert list(dict(loss.named_children())) == ["other_act"]


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "peer"),
    [
        (m.FocalLoss(to_onehot_y=True), monai.losses.FocalLoss(to_onehot_y=True)),
        (m.FocalLoss(to_onehot_y=True, alpha=0.3), monai.losses.FocalLoss(to_onehot_y=True, alpha=0.3)),
        (m.DiceFocalLoss(to_onehot_y=True, sigmoid=True), monai.losses.DiceFocalLoss(to_onehot_y=True, sigmoid=True)),
        (
            m.GeneralizedDiceFocalLoss(to_onehot_y=True, softmax=True),
            monai.losses.GeneralizedDiceFocalLoss(to_onehot_y=True, softmax=True),
        ),
        (s.FocalLoss("multiclass", alpha=0.3), smp_losses().focal.FocalLoss("multiclass", alpha=0.3)),
    ],
)
def test_float_label_maps(ours: Any, peer: Any) -> None:
    target = labels()[:, 0] if isinstance(ours, s.FocalLoss) else labels()
    assert target.max() == 2
    agree(ours, peer, logits(), target.float())


@pytest.mark.parametrize("name", ["DiceLoss", "JaccardLoss", "TverskyLoss", "FocalLoss"])
def test_masks_that_were_not_transposed_are_refused(name: str) -> None:
    scores = torch.zeros(2, 4, 3, 5)
    wrong = [("multilabel", scores, torch.zeros(2, 3, 5, 4)), ("multiclass", scores, torch.zeros(2, 5, 3))]
    wrong += [("binary", scores[:, :1], torch.zeros(2, 5, 3)), ("multilabel", scores, torch.zeros(2, 60))]
    for mode, x, y in wrong:
        with pytest.raises(ValueError, match=rf"{name}: expected target of \d+ values per sample, \(2,"):
            getattr(s, name)(mode)(x, y)
    same = torch.ones(2, 1, 3, 5)
    values = {getattr(s, name)("binary")(scores[:, :1], y).item() for y in (same, same[:, 0], same.movedim(1, -1))}
    assert len(values) == 1


@pytest.mark.parametrize(
    "loss",
    [
        m.DiceLoss(), m.MaskedDiceLoss(), m.GeneralizedDiceLoss(), m.TverskyLoss(), m.FocalLoss(), m.MCCLoss(),
        m.DiceCELoss(), m.DiceFocalLoss(), m.GeneralizedDiceFocalLoss(), n.SoftDiceLoss(), n.RobustCrossEntropyLoss(),
        n.DC_and_CE_loss({}, {}), n.DC_and_BCE_loss({}, {}), s.DiceLoss("binary"), s.TverskyLoss("multilabel"),
        s.FocalLoss("multiclass"), s.SoftCrossEntropyLoss(), s.SoftBCEWithLogitsLoss(), s.MCCLoss(),
    ],
    ids=lambda loss: f"{type(loss).__module__}-{type(loss).__name__}",
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:No mask value")
def test_lists_are_named(loss: nn.Module) -> None:
    words = f"{type(loss).__name__}: expected input to be a Tensor, got tuple.*DeepSupervision"
    with pytest.raises(TypeError, match=words):
        loss((logits(), logits()[..., ::2]), [labels(), labels()[..., ::2]])
    with pytest.raises(TypeError, match="expected target to be a Tensor, got list"):
        loss(logits(), [labels()])


# --- deep supervision around them -----------------------------------------------------------------------------------


def test_deep_supervision_around_a_drop_in_loss() -> None:
    outputs, targets = [logits(), logits()[..., ::2, ::2]], [labels(), labels()[..., ::2, ::2]]
    ours, peer = n.DC_and_CE_loss({"ddp": False}, {}), theirs.DC_and_CE_loss({"ddp": False}, {})
    expected = DeepSupervisionWrapper(peer, (1.0, 0.5))(outputs, targets)
    torch.testing.assert_close(n.DeepSupervisionWrapper(ours, (1.0, 0.5))(outputs, targets), expected)
    torch.testing.assert_close(softdice.DeepSupervision(ours, (1.0, 0.5))(outputs, targets), expected / 1.5)


def test_deep_supervision_wrapper_leaves_out_weights_of_zero() -> None:
    loss = n.DeepSupervisionWrapper(n.SoftDiceLoss(nn.Softmax(1)), (0, 2.0))
    outputs, targets = [logits() * torch.nan, logits()], [labels(), labels()]
    torch.testing.assert_close(loss(outputs, targets), 2 * n.SoftDiceLoss(nn.Softmax(1))(logits(), labels()))
    with pytest.raises(AssertionError, match="DeepSupervisionWrapper: expected lists of tensors, got Tensor"):
        loss(logits(), labels())
    with pytest.raises(AssertionError, match="weight_factors that are not all 0"):
        n.DeepSupervisionWrapper(loss, (0, 0))


@pytest.mark.parametrize("mode", ["exp", "same", "two"])
@pytest.mark.parametrize("weights", [None, [0.3, 0.2, 0.1], [1.0]])
def test_monais_deep_supervision(mode: str, weights: list[float] | None) -> None:
    outputs = [logits(), logits()[..., ::2, ::2], logits()[..., 1:3, 2:4]]
    keywords = {"to_onehot_y": True, "softmax": True}
    ours = m.DeepSupervisionLoss(m.DiceCELoss(**keywords), mode, weights)
    peer = monai.losses.DeepSupervisionLoss(monai.losses.DiceCELoss(**keywords), mode, weights)
    torch.testing.assert_close(ours(outputs, labels().float()), peer(outputs, labels().float()), check_dtype=False)
    torch.testing.assert_close(ours(outputs[0], labels()), peer(outputs[0], labels()), check_dtype=False)


def test_monais_masked_loss() -> None:
    mask = (torch.arange(20).view(1, 1, *SPACE) % 3 > 0).double()
    for wrapped in ("DiceLoss", "FocalLoss"):
        ours = m.MaskedLoss(getattr(m, wrapped), include_background=False)
        peer = monai.losses.MaskedLoss(getattr(monai.losses, wrapped), include_background=False)
        agree(ours, peer, logits().sigmoid(), hot(), mask)
    for wrong in ([], None, "DiceLoss", {"loss": 1}):
        with pytest.raises(ValueError, match="MaskedLoss: expected loss to be callable, got"):
            m.MaskedLoss(wrong)
    with pytest.raises(ValueError, match="MaskedLoss: expected mask of shape"):
        ours(logits(), hot(), mask.expand(1, C, *SPACE))


# --- batches of nothing ---------------------------------------------------------------------------------------------

NOTHING: list[tuple[nn.Module, str]] = [
    (m.DiceLoss(softmax=True), "values"),
    (m.GeneralizedDiceLoss(softmax=True), "values"),
    (m.TverskyLoss(sigmoid=True), "values"),
    (m.FocalLoss(), "values"),
    (m.DiceCELoss(softmax=True), "values"),
    (m.DiceFocalLoss(sigmoid=True), "values"),
    (m.GeneralizedDiceFocalLoss(sigmoid=True), "values"),
    (n.SoftDiceLoss(nn.Softmax(1)), "labels"),
    (n.DC_and_CE_loss({}, {}, ignore_label=9), "labels"),
    (n.DC_and_BCE_loss({}, {}), "values"),
    (s.DiceLoss("multilabel"), "values"),
    (s.TverskyLoss("multiclass", gamma=0.5), "labels"),
    (s.FocalLoss("multiclass"), "labels"),
    (s.FocalLoss("multilabel", alpha=0.2, normalized=True), "values"),
    (s.SoftCrossEntropyLoss(smooth_factor=0.1), "labels"),
    (s.SoftBCEWithLogitsLoss(), "values"),
]


@pytest.mark.parametrize(("loss", "kind"), NOTHING, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_an_empty_batch_costs_nothing(backend: str, loss: nn.Module, kind: str) -> None:
    x = logits()[:0].requires_grad_()
    value = loss(x, (hot() if kind == "values" else labels())[:0])
    assert value.shape == ()
    assert 0 <= value.item() < 1e-100
    value.backward()


@pytest.mark.parametrize("gamma", [0.3, 0.75, 1.5])
@pytest.mark.parametrize("mode", ["multilabel", "multiclass"])
def test_tversky_of_smp_has_a_gradient_everywhere(gamma: float, mode: str) -> None:
    loss = s.TverskyLoss(mode, gamma=gamma, smooth=0.0)
    sure = (200 * hot() - 100).float()
    perfect = hot() if mode == "multilabel" else labels()[:, 0]
    nothing = perfect * 0 if mode == "multilabel" else perfect * 0 + 255
    loss_of_nothing = s.TverskyLoss(mode, gamma=gamma, ignore_index=None if mode == "multilabel" else 255)
    for own, x, y in ((loss, sure, perfect), (loss_of_nothing, logits(), nothing)):
        leaf = x.clone().requires_grad_()
        value = own(leaf, y)
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("loss", [s.FocalLoss("multiclass", ignore_index=255), s.FocalLoss("binary", ignore_index=255)])
def test_focal_of_smp_where_every_voxel_is_ignored(loss: Any) -> None:
    x = logits() if loss.mode == "multiclass" else logits()[:, :1]
    x.requires_grad_()
    value = loss(x, torch.full((B, *SPACE), 255))
    value.backward()
    assert value.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


# --- the classes that have no file of their own ---------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_monais_mcc(reduction: str, batch: bool, background: bool) -> None:
    keywords = {"reduction": reduction, "batch": batch, "include_background": background, "softmax": True}
    agree(m.MCCLoss(**keywords), monai.losses.MCCLoss(**keywords), logits(), hot())
    keywords |= {"to_onehot_y": True, "smooth_nr": 0.1}
    agree(m.MCCLoss(**keywords), monai.losses.MCCLoss(**keywords), logits(), labels())


def test_monais_mcc_of_a_right_prediction() -> None:
    keywords = {"include_background": True, "smooth_dr": 0.0}
    assert m.MCCLoss(**keywords)(hot(), hot()).item() == monai.losses.MCCLoss(**keywords)(hot(), hot()).item() == 0


@pytest.mark.parametrize("keywords", [{}, {"weight": torch.tensor([1.0, 0.5, 2.0])}, {"ignore_index": 1},
    {"label_smoothing": 0.2, "reduction": "sum"}, {"reduction": "none"}])  # fmt: skip
def test_nnunets_cross_entropy(keywords: dict[str, Any]) -> None:
    ours = n.RobustCrossEntropyLoss(**keywords)
    peer = RobustCrossEntropyLoss(**keywords).double()
    for target in (labels(), labels()[:, 0], labels().float()):
        agree(ours.double(), peer, logits(), target)


@pytest.mark.parametrize("shape", [(B, 1, *SPACE), (B, *SPACE)])
def test_smps_mcc(shape: tuple[int, ...]) -> None:
    x, y = logits()[:, :1].sigmoid().view(shape), (labels() == 1).double().view(shape)
    mcc = smp_losses().mcc.MCCLoss
    if len(shape) == 4:
        agree(s.MCCLoss(eps=1e-3), mcc(eps=1e-3), x, y)
    else:
        torch.testing.assert_close(s.MCCLoss()(x, y), mcc()(x, y))


@pytest.mark.parametrize("ignored", [None, 255, 0])
@pytest.mark.parametrize("smooth", [None, 0.0, 0.2])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_smps_binary_cross_entropy(ignored: int | None, smooth: float | None, weighted: bool, reduction: str) -> None:
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64).view(3, 1, 1) if weighted else None
    keywords = {"ignore_index": ignored, "smooth_factor": smooth, "pos_weight": weight, "reduction": reduction}
    target = hot()
    if ignored == 255:
        target[:, :2, 1:3] = 255
    peer = smp_losses().soft_bce.SoftBCEWithLogitsLoss(**keywords)
    agree(s.SoftBCEWithLogitsLoss(**keywords), peer, logits(), target)


def test_smps_binary_cross_entropy_refuses() -> None:
    with pytest.raises(ValueError, match="SoftBCEWithLogitsLoss: expected no weight"):
        s.SoftBCEWithLogitsLoss(weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"SoftBCEWithLogitsLoss: expected target of shape \(2, 3, 4, 5\)"):
        s.SoftBCEWithLogitsLoss()(logits(), labels())


@pytest.mark.parametrize(
    "loss",
    [
        s.SoftBCEWithLogitsLoss(ignore_index=-255),
        s.DiceLoss("binary", ignore_index=-255),
        s.FocalLoss("binary", alpha=0.25, ignore_index=-255),
        s.TverskyLoss("binary", ignore_index=-255),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_an_ignored_number_that_the_dtype_cannot_hold_is_none_of_its_values(loss: nn.Module) -> None:
    """torch compares uint8 1 with -255 wrapped round, as equal: every voxel of the mask would be left out."""
    target = (labels() > 0).to(torch.uint8)
    input = logits()[:, :1]
    assert loss(input, target) == loss(input, target.long())
    assert loss(input, target) != loss(input, torch.zeros_like(target))


def test_voxels_of_half_logits_are_counted_exactly() -> None:
    x, y = torch.zeros(1, 1, 70_001, dtype=torch.float16), torch.ones(1, 1, 70_001)  # more than float16 can hold
    value = m.FocalLoss(alpha=0.25, gamma=1.0)(x, y)
    assert value.item() == pytest.approx(0.25 * 0.5 * math.log(2), rel=1e-6)


# --- MONAI's way of working -----------------------------------------------------------------------------------------


def test_a_bundle_names_the_class_in_its_configuration() -> None:
    options = {"to_onehot_y": True, "softmax": True, "weight": "$torch.tensor([1.0, 2.0, 0.5])"}
    made = [
        ConfigParser({"loss": {"_target_": f"{module}.DiceCELoss", **options}}).get_parsed_content("loss")
        for module in ("softdice.compat.monai", "monai.losses")
    ]
    assert isinstance(made[0], m.DiceCELoss)
    agree(made[0], made[1].double(), logits(), labels())


def test_meta_tensors_take_the_fast_path(backend: str) -> None:
    plain, meta = logits().requires_grad_(), MetaTensor(logits()).requires_grad_()
    loss = m.DiceFocalLoss(to_onehot_y=True, sigmoid=True, alpha=0.4)
    expected, got = loss(plain, labels()), loss(meta, MetaTensor(labels()))
    torch.testing.assert_close(got, expected, check_dtype=False)
    expected.backward()
    got.backward()
    torch.testing.assert_close(meta.grad.as_subclass(Tensor), plain.grad)


def test_meta_tensors_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = op.run

    def look(request: Any, *rest: Any) -> Tensor:
        assert type(request.input) is type(request.target) is Tensor
        seen.extend((request.input.data_ptr(), request.target.data_ptr()))
        return run(request, *rest)

    monkeypatch.setattr(op, "run", look)
    x, y = MetaTensor(logits()), MetaTensor(labels())
    m.DeepSupervisionLoss(m.DiceCELoss(to_onehot_y=True, softmax=True))([x], y)
    assert seen == [x.data_ptr(), y.data_ptr()]


def test_autocast_trains_with_half_logits() -> None:
    network = nn.Conv2d(2, C, 1)
    image = torch.randn(B, 2, *SPACE)
    with torch.autocast("cpu", torch.bfloat16):
        scores = network(image)
        loss = m.DiceCELoss(to_onehot_y=True, softmax=True)(scores, labels())
    assert (scores.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    loss.backward()
    peer = monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)(scores.detach().float(), labels())
    torch.testing.assert_close(loss.detach(), peer)
    assert network.weight.grad.abs().max() > 0


@pytest.mark.parametrize("wrong", [C, 255, -1])
def test_labels_that_are_no_class_are_refused_by_maps_too(wrong: int) -> None:
    """They were in no class, and the voxels counted as right where nothing was predicted."""
    y = labels()
    y[0, 0, 1, 1:3] = wrong
    options: list[dict[str, Any]] = [{"reduction": "none"}, {"use_softmax": True, "include_background": False}]
    for option in options:
        with pytest.raises(
            ValueError, match=rf"FocalLoss: expected target with labels in \[0, 3\), got {wrong} \(2 vox"
        ):
            m.FocalLoss(to_onehot_y=True, **option)(logits(), y)
        ours, others = (
            module.FocalLoss(to_onehot_y=True, ignore_index=wrong, **option)(logits(), y)
            for module in (m, monai.losses)
        )
        torch.testing.assert_close(ours.float(), others)  # MONAI computes in float32
    weight = torch.ones(B, C, *SPACE)
    with pytest.raises(ValueError, match=rf"SoftDiceLoss: expected target with labels in \[0, 3\), got {wrong}"):
        n.SoftDiceLoss(torch.sigmoid)(logits(), y, weight)


def test_a_mask_for_each_class_fits_labels_of_both_shapes() -> None:
    loss, weight = n.SoftDiceLoss(torch.sigmoid), (hot().roll(1, 3) > 0)
    whole, flat = loss(logits(), labels(), weight), loss(logits(), labels()[:, 0], weight)
    assert torch.equal(whole, flat)
    torch.testing.assert_close(whole, loss(logits(), hot(), weight))


def test_masks_of_0_and_255_get_advice_that_helps() -> None:
    for loss in (s.FocalLoss("binary"), m.FocalLoss()):
        x, y = logits()[:, :1], (labels() > 0).float()
        with pytest.raises(ValueError, match=r"FocalLoss: expected a target of zeros and ones.* Pass target > 0 for a"):
            loss(x, y * 255)
        assert torch.equal(loss(x, (y * 255 > 0).float()), loss(x, y))


def test_a_label_is_any_number_where_every_class_has_the_weight_0() -> None:
    loss, y = n.SoftDiceLoss(torch.sigmoid), labels()
    weight = torch.ones(B, C, *SPACE)
    weight[0, :, 0] = 0
    expected = loss(logits(), y, weight)
    y[0, :, 0] = 255
    assert torch.equal(loss(logits(), y, weight), expected)
    weight[0, 1, 0, 0] = 1
    with pytest.raises(ValueError, match=r"SoftDiceLoss: expected target with labels in \[0, 3\), got 255"):
        loss(logits(), y, weight)


@pytest.mark.parametrize("softmax", [True, False])
def test_a_map_of_sure_logits_has_a_finite_gradient_for_exponents_below_1(softmax: bool) -> None:
    x = logits().mul_(200).requires_grad_()
    m.FocalLoss(gamma=0.5, use_softmax=softmax, to_onehot_y=True, reduction="none")(x, labels()).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_a_module_of_ones_own_beside_a_single_class_gets_the_target_as_it_is() -> None:
    ours = m.DiceFocalLoss(to_onehot_y=True, sigmoid=True)
    theirs = monai.losses.DiceFocalLoss(to_onehot_y=True, sigmoid=True)
    for loss in (ours, theirs):
        loss.dice = torch.nn.L1Loss()
    x, y = logits()[:, :1], (labels() > 0).float()
    with pytest.warns(UserWarning, match="single channel prediction"):
        torch.testing.assert_close(ours(x, y), theirs(x, y))
