"""How sure a mask is, and where to cut: against sums by hand, the sorted definition and the exact expectation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import softdice
from softdice import decisions
from softdice.backends import route

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def drawn(kind: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Probabilities (2, 3, 37, 41) of a kind that networks give, or that is hard to cut."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 37, 41, generator=generator, dtype=torch.float64)
    p = {
        "softmax": (4 * x).softmax(1),
        "haze": torch.where(x > 2, x.sigmoid(), 1e-3 * x.sigmoid()),
        "unsure": 0.5 * x.sigmoid(),
        "sure": (50 * x).sigmoid(),
        "few values": (x.sigmoid() * 4).round() / 4,
        "sparse": torch.where(x > 2.9, 0.9, 0.0),
    }[kind]
    return p.to(dtype)


def masks(p: Tensor, threshold: Tensor) -> Tensor:
    return p > threshold[..., None, None]


@pytest.fixture(params=["loops", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways that a threshold is computed; it is asserted that the one asked for ran."""
    assert route.cpu_missing() is None, "Numba should be here"
    other = {"loops": "_by_torch", "torch": "_by_loops"}[request.param]
    if request.param == "torch":
        monkeypatch.setattr(decisions, "compiled_loops", lambda module: None)
    monkeypatch.setattr(decisions, other, None)
    return request.param


def defined_threshold(p: torch.Tensor, present: bool) -> torch.Tensor:
    """Return E / 2 of the best mask, in float64 and not rounded: sort, and try every mask of the largest p."""
    ranked = p.flatten(2).double().sort(-1, descending=True).values
    number = torch.arange(1, ranked.shape[-1] + 1)
    expected = 2 * ranked.cumsum(-1) / (number + ranked.sum(-1, keepdim=True))
    empty = (ranked[..., 0] <= 0.5) & (not present)
    return (expected.amax(-1) / 2).masked_fill(empty, 1.0)


@pytest.mark.parametrize("present", [None, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["softmax", "haze", "unsure", "sure", "few values", "sparse"])
def test_every_voxel_as_the_sorted_definition_has_it(
    kind: str, dtype: torch.dtype, present: bool | None, way: str
) -> None:
    p = drawn(kind, dtype)
    threshold = softdice.dice_threshold(p, present=present)
    assert (threshold.dtype, threshold.shape) == (dtype, (2, 3))
    expected = defined_threshold(p, bool(present))
    assert torch.equal(masks(p, threshold), masks(p.double(), expected))


def test_by_hand(way: str) -> None:
    p = torch.tensor([[[0.9, 0.4, 0.3, 0.0], [0.4, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    # 0.9 / 2.6 = 0.346, (0.9 + 0.4) / 3.6 = 0.361, (0.9 + 0.4 + 0.3) / 4.6 = 0.348; nothing above 0.5 in the others
    assert softdice.dice_threshold(p).tolist()[0] == pytest.approx([1.3 / 3.6, 1, 1])
    # 0.4 / 1.8 = 0.222, 0.8 / 2.8 = 0.286
    assert softdice.dice_threshold(p, present=True).tolist()[0] == pytest.approx([1.3 / 3.6, 0.8 / 2.8, 0])
    only = softdice.dice_threshold(p, present=torch.tensor([False, True, False]))
    assert only.tolist()[0] == pytest.approx([1.3 / 3.6, 0.8 / 2.8, 1])
    assert masks(p.unsqueeze(-1), softdice.dice_threshold(p, present=True)).sum((2, 3)).tolist() == [[2, 2, 0]]


def test_the_threshold_of_dice_is_that_of_jaccard() -> None:
    """With the same mean in the place of the number of voxels; tried on every mask of the largest p."""
    p = drawn("softmax", torch.float64)[0, 1].flatten().sort(descending=True).values
    number, inside = torch.arange(1, len(p) + 1), p.cumsum(0)
    dice = 2 * inside / (number + p.sum())
    jaccard = inside / (number + p.sum() - inside)
    assert dice.argmax() == jaccard.argmax()
    assert (p > softdice.dice_threshold(p.view(1, 1, -1))).sum() == dice.argmax() + 1


@pytest.mark.parametrize("seed", range(4))
def test_near_the_largest_exact_expectation(seed: int) -> None:
    """Over all outcomes of eleven independent voxels; the mean in the denominator costs less than 0.02 of Dice."""
    p = torch.rand(11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
    outcomes = torch.tensor(list(product([0.0, 1.0], repeat=11)), dtype=torch.float64)
    chance = torch.where(outcomes > 0, p, 1 - p).prod(1)
    order = p.argsort(descending=True)

    def expected(mask: Tensor) -> float:
        size = mask.sum() + outcomes.sum(1)
        return float((chance * torch.where(size > 0, 2 * (outcomes * mask).sum(1) / size.clamp_min(1), 1.0)).sum())

    best = max(expected(torch.zeros(11, dtype=torch.float64).index_fill(0, order[:k], 1.0)) for k in range(1, 12))
    cut = expected((p > softdice.dice_threshold(p.view(1, 1, -1), present=True)[0, 0]).double())
    assert best - 0.02 < cut <= best + 1e-12


def test_the_layout_in_memory_changes_nothing(way: str) -> None:
    p = drawn("softmax", torch.float32)
    last = p.contiguous(memory_format=torch.channels_last)
    assert torch.equal(softdice.dice_threshold(p), softdice.dice_threshold(last))
    assert torch.equal(softdice.dice_threshold(p[:, :, ::2]), softdice.dice_threshold(p[:, :, ::2].clone()))


@pytest.mark.parametrize(
    ("p", "present", "expected"),
    [
        (torch.zeros(3, 4), None, "probabilities (B, C, *S)"),
        (torch.zeros(1, 3, 4, dtype=torch.int64), None, "of a floating dtype"),
        (torch.zeros(1, 3, 0, 4), None, "probabilities of at least one voxel, got (1, 3, 0, 4)"),
        (torch.full((1, 3, 4), 1.5), None, "probabilities in [0, 1]"),
        (torch.full((1, 3, 4), torch.nan), None, "probabilities in [0, 1]"),
        (torch.zeros(1, 3, 4), torch.ones(4, dtype=torch.bool), "present of shape (1, 3) or (3,), bool"),
        (torch.zeros(1, 3, 4), torch.ones(3), "present of shape (1, 3) or (3,), bool"),
    ],
)  # fmt: skip
def test_what_is_refused(p: Tensor, present: Tensor | None, expected: str, way: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        softdice.dice_threshold(p, present=present)
    assert str(error.value).startswith("dice_threshold: expected ")
    assert expected in str(error.value)


# --- confidence


def test_confidence_by_hand() -> None:
    p = torch.tensor([[[0.9, 0.6, 0.05, 0.3], [0.1, 0.4, 0.95, 0.7]]])
    labels = p.argmax(1)
    # class 0: p above 0.1 sum to 1.8, voxels 0 and 1; class 1: 2.05 (0.1 is not above 0.1), voxels 2 and 3
    expected = [2 * 1.5 / (1.8 + 2), 2 * 1.65 / (2.05 + 2)]
    assert softdice.dice_confidence(p, labels).tolist()[0] == pytest.approx(expected)
    one_hot = torch.nn.functional.one_hot(labels).movedim(-1, 1)
    assert softdice.dice_confidence(p, one_hot).tolist()[0] == pytest.approx(expected)
    published = [2 * 1.5 / (1.85 + 2), 2 * 1.65 / (2.15 + 2)]
    assert softdice.dice_confidence(p, labels, floor=0).tolist()[0] == pytest.approx(published)


@pytest.mark.parametrize(("activation", "C"), [("softmax", 4), ("sigmoid", 3), ("sigmoid", 1), ("none", 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confidence_is_the_soft_dice_of_the_mask(activation: str, C: int, dtype: torch.dtype) -> None:
    """Without a floor that is what the statistics pass gives; several slices of voxels."""
    x = 3 * torch.randn(2, C, 150, 160, generator=torch.Generator().manual_seed(1))
    p = x.softmax(1) if activation != "sigmoid" else x.sigmoid()
    input = (p if activation == "none" else x).to(dtype)
    mask = (p > 0.5) if activation == "sigmoid" else p.argmax(1)
    confidence = softdice.dice_confidence(input, mask, activation=activation, floor=0)
    stats = softdice.overlap_statistics(input, mask, activation=activation)
    expected = softdice.indices.dice(stats, eps=0)
    assert confidence.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(confidence, expected.to(confidence.dtype), rtol=2e-5)
    floored = torch.where(p.to(dtype) > 0.1, p.to(dtype), 0) if activation == "none" else torch.where(p > 0.1, p, 0)
    wanted = softdice.indices.dice(softdice.overlap_statistics(floored, mask), eps=0)
    got = softdice.dice_confidence(input, mask, activation=activation)
    assert torch.allclose(got, wanted.to(got.dtype), rtol=0.02 if dtype.itemsize == 2 else 1e-4)


def test_haze_no_longer_hides_a_small_object() -> None:
    """A sure small object in much haze, and an unsure one without: the floor ranks them as they are."""
    sure, unsure = torch.full((100, 100), 0.02), torch.zeros(100, 100)
    sure[:10, :10], unsure[:10, :10] = 0.98, 0.6
    p = torch.stack([sure, unsure]).unsqueeze(1)
    published = softdice.dice_confidence(p, (p > 0.5)[:, 0], floor=0)[:, 0]
    floored = softdice.dice_confidence(p, (p > 0.5)[:, 0])[:, 0]
    assert published[0] < published[1]
    assert floored.tolist() == pytest.approx([2 * 98 / 198, 2 * 60 / 160])


def test_a_class_of_nothing_is_nan() -> None:
    p = torch.tensor([[[0.95, 1.0], [0.05, 0.0]]])
    confidence = softdice.dice_confidence(p, p.argmax(1))
    assert confidence[0, 0] == pytest.approx(1.95 * 2 / 3.95)
    assert confidence[0, 1].isnan()
    assert not softdice.dice_confidence(p.requires_grad_(), p.argmax(1)).requires_grad


def test_confidence_refuses_what_is_no_mask() -> None:
    p = torch.full((1, 2, 4), 0.5)
    with pytest.raises(
        ValueError, match=r"dice_confidence: expected a mask of zeros and ones, got values such as 0\.5"
    ):
        softdice.dice_confidence(p, p)
    with pytest.raises(ValueError, match="dice_confidence: expected probabilities in"):
        softdice.dice_confidence(3 * p, p.argmax(1))
    with pytest.raises(ValueError, match=r"dice_confidence: expected floor in \[0, 1\)"):
        softdice.dice_confidence(p, p.argmax(1), floor=1)


def test_both_compile() -> None:
    """Compiled code may meet them; the loops stay outside of it."""
    p = drawn("softmax", torch.float32)
    assert torch.equal(torch.compile(softdice.dice_threshold, backend="eager")(p), softdice.dice_threshold(p))
    labels = p.argmax(1)
    compiled = torch.compile(softdice.dice_confidence, backend="eager")(p, labels)
    assert torch.allclose(compiled, softdice.dice_confidence(p, labels))


def test_numbers_are_rounded_down_to_their_dtype() -> None:
    values = torch.from_numpy(np.random.default_rng(0).random(1000))
    for dtype in DTYPES:
        rounded = decisions._rounded_down(values, dtype)
        assert (rounded.double() <= values).all()
        assert ((rounded.double() - values).abs() <= torch.finfo(dtype).eps * values + 1e-7).all()
    assert decisions._rounded_down(torch.zeros(2, dtype=torch.float64), torch.float16).tolist() == [0, 0]
