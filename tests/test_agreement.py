"""Every kernel against the definition: value and gradient, on drawn problems and on rows of hard values.

A new statistic is drawn here from the day it is declared; what it should be is its term in `oracle.precise`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import BACKENDS, serving
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import softdice
from softdice.backends.cpu.walk import JOB
from softdice.statistics.declared import BUNDLES, FIELDS, MAPPED, NAMES

KERNELS = [name for name in BACKENDS if name != "reference"]

# --- which loop of the CPU kernel ran -----------------------------------------------------------------------------

DRIVER, PLAN = "softdice.backends.cpu.driver", "plan"
"""The function that settles which loop serves a pass: the test wraps it, and `path_of` reads what it returned."""

PATHS = {
    "softmax": {"labels", "own", "values", "union"},
    "sigmoid": {"labels", "values"},
    "none": {"labels", "values", "union"},
}
"""Every loop that there is for an activation; one that no example reached fails the test."""


def path_of(made: Any) -> str:
    return "union" if np.frombuffer(made.job, JOB)["unions"][0] else str(made.kind.target)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Yield the names of the loops that the test has run so far."""
    paths: set[str] = set()
    driver = importlib.import_module(DRIVER)
    plan = getattr(driver, PLAN)

    def record(*arguments: Any) -> Any:
        made = plan(*arguments)
        paths.add(path_of(made))
        return made

    monkeypatch.setattr(driver, PLAN, record)
    return paths


# --- drawn problems -----------------------------------------------------------------------------------------------

CLASSES = st.one_of(st.sampled_from([1, 2, 3, 4, 12, 13]), st.integers(5, 12), st.integers(13, 40), st.just(130))
SIZES = {1: (1, 1), 7: (7, 1), 511: (7, 73), 513: (27, 19), 9000: (90, 100)}
"""Voxels, and the same in two dimensions: less than a block of 512 voxels, one and a bit, more than a chunk of 8192."""

LEAN = (BUNDLES[0], FIELDS, NAMES)
"""The bundles that are drawn: the smallest, and those of everything. Each further one would compile a kernel for every
loop; the loops of all bundles are written by one generator, which `test_every_bundle` runs with each of them."""

LABEL_DTYPES = {
    torch.uint8: 256,
    torch.int8: 128,
    torch.int16: 1 << 15,
    torch.int32: 1 << 31,
    torch.int64: 1 << 31,
    torch.bool: 2,
}
INPUT_DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)
"""What kernels serve; float64 is tested on the definition in slices."""


@dataclass
class Problem:
    """Arguments of `overlap_statistics`, and the factors (F, B, K) of its sums in the loss."""

    input: Tensor
    target: Tensor
    keywords: dict[str, Any]
    mix: Tensor

    def __repr__(self) -> str:
        shape, strides = tuple(self.input.shape), self.input.stride()
        words = {key: f"{v.dtype}" if isinstance(v, Tensor) else v for key, v in self.keywords.items()}
        return f"{self.input.dtype}{shape} {strides}, {self.target.dtype}{tuple(self.target.shape)}, {words}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def run(self, backend: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the sums, (F, B, K), and dL/dinput in the layout of the input, both float64."""
        leaf = self.input.detach().to(dtype or self.input.dtype).requires_grad_()
        with serving(backend):
            stats = softdice.overlap_statistics(leaf, self.target, **self.keywords)
        sums = torch.stack([getattr(stats, name) for name in stats.fields])
        if not sums.requires_grad:  # the reference knows that these do not depend on the input
            return sums.double(), torch.zeros_like(leaf, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((sums * self.mix.to(sums.dtype)).sum(), leaf)
        assert gradient.dtype == leaf.dtype
        return sums.detach().double(), gradient.double()


def laid_out(draw: st.DrawFn, values: Tensor, flat: bool) -> Tensor:
    """Return the values (B, C, V) with one or two dimensions of space, in one of the layouts that occur."""
    B, C, V = values.shape
    layout = draw(st.sampled_from(["contiguous", "contiguous", "channels last", "sliced", "permuted"]))
    if not flat:
        values = values.view(B, C, *SIZES[V])
    if layout == "channels last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return values.repeat_interleave(2, -1)[..., ::2]
    if layout == "permuted":
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    return values


def hardened(draw: st.DrawFn, logits: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return logits (B, C, V) for which a careless kernel loses digits; exact in every dtype but the halves."""
    kind = draw(st.sampled_from(["100 apart", "200 apart", "offset 1e4", "offset 1e5", "minus infinity", "wide"]))
    if kind == "100 apart":
        return 100.0 * logits.sign()
    if kind == "200 apart":
        return 200.0 * (logits > 1) + logits
    if kind.startswith("offset"):
        return (logits * 16).round() / 16 + float(kind.split()[1])
    off = torch.rand(logits.shape, generator=generator) < 0.3
    if kind == "minus infinity" and labels is not None and logits.shape[1] > 1:
        true = labels.unsqueeze(1) == torch.arange(logits.shape[1]).view(1, -1, 1)
        none = ~true.any(1, keepdim=True)  # an ignored voxel
        return logits.masked_fill(off & ~true & ~none, -torch.inf)
    return 8 * logits


@st.composite
def problems(draw: st.DrawFn, activation: str, hard: bool = False, most_elements: int = 250_000) -> Problem:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    own = activation == "softmax" and draw(st.sampled_from([False, False, True]))  # loops of their own
    kind = "labels" if own else draw(st.sampled_from(["labels", "labels", "soft", "multi-hot"]))
    B, C = draw(st.integers(1, 3)), draw(st.sampled_from([13, 20, 40, 130]) if own else CLASSES)
    V = draw(st.sampled_from([size for size in SIZES if size * B * C <= most_elements]))
    keywords: dict[str, Any] = {
        "activation": activation,
        "fields": draw(st.one_of(*map(st.just, LEAN), st.sets(st.sampled_from(NAMES), min_size=12))),
        "gamma": draw(st.sampled_from([2.0, 0.0, 0.25, 0.5, 0.999, 1.0, 1.5, 3.7, 5.0])),
        "power": draw(st.sampled_from([1.0, 1.0, 1.5, 2.0, 3.0])),
        "label_smoothing": 0.0 if own else draw(st.sampled_from([0.0, 0.0, 0.1])),
    }
    keywords["fields"] = tuple(name for name in NAMES if name in keywords["fields"])

    # the target
    if kind == "labels":
        dtype = draw(st.sampled_from([d for d, most in LABEL_DTYPES.items() if most >= C]))
        target = torch.randint(0, max(C, 2), (B, V), generator=generator)
        allowed = [None, int(target[0, 0])]
        if dtype != torch.bool:
            allowed += [torch.iinfo(dtype).max, -1, 2**40]  # not every dtype holds the last two
        ignore = keywords["ignore_index"] = draw(st.sampled_from(allowed))
        if ignore is not None and torch.iinfo(torch.uint8 if dtype == torch.bool else dtype).max >= ignore >= 0:
            target = target.masked_fill(torch.rand(B, V, generator=generator) < 0.2, ignore)
        target = target.to(dtype)
    elif kind == "soft":
        target = torch.rand(B, C, V, generator=generator, dtype=torch.float64)
        target = target / target.sum(1, keepdim=True) if activation == "softmax" else target
        target = target.to(draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])))
    else:
        dtype = draw(st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64]))
        target = (torch.rand(B, C, V, generator=generator) < 0.4).to(dtype)
    if C == 1 and target.ndim == 3:
        target = target.squeeze(1)  # the mask of a single class, hard or soft

    # the input
    logits = 3 * torch.randn(B, C, V, generator=generator, dtype=torch.float64)
    hard_labels = kind == "labels" and not keywords["label_smoothing"]
    if hard:
        switchable = target.long() if hard_labels and activation == "softmax" else None
        logits = hardened(draw, logits, switchable, generator)
    if activation == "none":
        logits = logits.softmax(1) if C > 1 else logits.sigmoid()
    dtype = draw(st.sampled_from(INPUT_DTYPES))
    logits = logits.clamp(max=torch.finfo(dtype).max).to(dtype)
    if activation == "none":  # what a probability of 0 costs depends on the dtype
        logits = logits.clamp_min(4 * torch.finfo(dtype).tiny)
    if activation != "sigmoid" and C >= 2 and not own and draw(st.sampled_from([False, False, True])):
        most = C if hard else C - 1  # the union of all has p = 1 but for rounding
        region = st.lists(st.integers(0, C - 1), min_size=1, max_size=most, unique=True)
        keywords["regions"] = tuple(map(tuple, draw(st.lists(region, min_size=1, max_size=3))))
    K = len(keywords.get("regions", range(C)))

    # the weight
    weight = torch.rand(B, V, generator=generator, dtype=torch.float64)
    weight = weight * (weight > 0.3)
    weights = {
        "none": None,
        "double": weight,
        "float": weight.float(),
        "bool": weight > 0,
        "integer": (4 * weight).int(),
    }
    keywords["voxel_weight"] = weights[draw(st.sampled_from(["none", "none", *weights]))]

    # the map
    far = torch.randn(B, draw(st.sampled_from([1, K])), V, generator=generator, dtype=torch.float64)
    if not set(MAPPED).isdisjoint(keywords["fields"]):
        keywords["voxel_map"] = far.to(draw(st.sampled_from([torch.float32, torch.float64, torch.int8, torch.float16])))

    flat = draw(st.booleans())
    if not flat:
        for_space = (B, *SIZES[V])
        if keywords["voxel_weight"] is not None:
            keywords["voxel_weight"] = keywords["voxel_weight"].view(for_space)
        target = target.view(for_space) if target.ndim == 2 else target
        if "voxel_map" in keywords:
            keywords["voxel_map"] = keywords["voxel_map"].unflatten(2, SIZES[V])
    if target.ndim == 3 and C > 1 and kind != "labels":
        target = laid_out(draw, target, flat)
    mix = torch.randn(len(keywords["fields"]), B, K, generator=generator, dtype=torch.float64)
    return Problem(laid_out(draw, logits, flat), target, keywords, mix)


def assert_agreement(problem: Problem, kernel: str) -> None:
    """Assert that the kernel's error is at most twice that of eager code of the same dtype, and a few rounding errors.

    A sum below 1, a whole voxel, is compared relative to 1, a larger one relative to itself. The cross-entropy of a
    sigmoid is always compared relative to itself, since eager code keeps every digit of it. The gradient is compared
    relative to its maximum.
    """
    exact, slope = problem.run("reference", torch.float64)
    eager, eager_slope = problem.run("reference")
    found, found_slope = problem.run(kernel)
    dtype = problem.input.dtype
    tiny = 1e-12 if dtype == torch.float64 else 2e-6
    for name, *rows in zip(problem.keywords["fields"], exact, eager, found, strict=True):
        keeps_digits = name == "cross_entropy" and problem.keywords["activation"] == "sigmoid"
        least = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps  # e^x has all of its digits from there
        scale = rows[0].abs().clamp_min(least if keeps_digits else 1.0)
        allowed, error = (((row - rows[0]).abs() / scale).max() for row in rows[1:])
        assert error <= 2 * allowed + tiny, f"{name}: {error:.3g}, eager {allowed:.3g}"
    largest = slope.abs().max()
    if one_outcome(problem):  # p is 1 whatever the logits, and the gradient 0 but for rounding
        largest = problem.mix.abs().max()
    error, allowed = ((gradient - slope).abs().max() for gradient in (found_slope, eager_slope))
    step = torch.finfo(dtype).eps if dtype.itemsize == 2 else tiny
    assert error <= 2 * allowed + step * largest, f"gradient: {error / largest:.3g}, eager {allowed / largest:.3g}"


def one_outcome(problem: Problem) -> bool:
    C = problem.input.shape[1]
    regions = problem.keywords.get("regions", [[c] for c in range(C)])
    return problem.keywords["activation"] == "softmax" and all(len(region) == C for region in regions)


# --- the tests ----------------------------------------------------------------------------------------------------


def agree_on_drawn(
    kernel: str, activation: str, hard: bool, examples: int = 14, shrink: bool = True, **limits: Any
) -> None:
    phases = [phase for phase in Phase if shrink or phase == Phase.generate]

    @settings(max_examples=examples, phases=phases)
    @given(problem=problems(activation, hard, **limits))
    def every(problem: Problem) -> None:
        assert_agreement(problem, kernel)

    every()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_drawn_problems(kernel: str, activation: str, reached: set[str]) -> None:
    agree_on_drawn(kernel, activation, hard=False)
    assert reached == PATHS[activation], "draw what reaches each loop"


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_drawn_hard_values(kernel: str, activation: str, reached: set[str]) -> None:
    agree_on_drawn(kernel, activation, hard=True, shrink=False)
    assert reached == PATHS[activation], "draw what reaches each loop"


@pytest.mark.parametrize("number", range(len(BUNDLES)))
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_bundle(kernel: str, number: int) -> None:
    """The gradient is linear in the coefficients of the statistics: random ones show every loss on a bundle."""
    generator = torch.Generator().manual_seed(number)
    logits = 3 * torch.randn(2, 5, 9000, generator=generator)
    labels = torch.randint(0, 5, (2, 9000), generator=generator)
    keywords: dict[str, Any] = {"activation": "softmax", "fields": BUNDLES[number]}
    if number % 2:
        keywords["voxel_weight"] = torch.rand(2, 9000, generator=generator) * (labels > 0)
    if not set(MAPPED).isdisjoint(BUNDLES[number]):
        keywords["voxel_map"] = torch.randn(2, 1, 9000, generator=generator)
    mix = torch.randn(len(BUNDLES[number]), 2, 5, generator=generator, dtype=torch.float64)
    assert_agreement(Problem(logits, labels, keywords, mix), kernel)


# --- hard values, row by row, against as many digits as it takes --------------------------------------------------


@dataclass
class Row:
    """A sample: x (C, V), its labels (V,) and the settings of the pass."""

    name: str
    x: Sequence[Sequence[float]]
    labels: Sequence[int]
    keywords: dict[str, Any]
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)

    def input(self, dtype: torch.dtype) -> Tensor:
        return torch.tensor(np.array(self.x)).to(dtype).unsqueeze(0)


def voxels(*logits: Sequence[float]) -> list[list[float]]:
    """Return logits that are written voxel by voxel, as (C, V)."""
    return [list(row) for row in zip(*logits, strict=True)]


def softmax(
    name: str,
    logits: Sequence[Sequence[float]],
    labels: Sequence[int],
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
    **keywords: Any,
) -> Row:
    return Row(name, voxels(*logits), labels, {"activation": "softmax", **keywords}, dtypes)


def noise(C: int, V: int, spread: float, seed: int = 0) -> np.ndarray:
    """Return logits (V, C) that are multiples of 1/16, which survive an offset of 1e5 in float32."""
    return np.round(np.random.default_rng(seed).normal(0, spread, (V, C)) * 16) / 16


BOTH = (torch.float64, torch.float32)
HALVES = (*BOTH, torch.bfloat16, torch.float16)
GAMMAS = (0.0, 0.25, 0.5, 0.999, 1.0, 2.0, 5.0)
OFF = -np.inf


def hard_rows(classes: Sequence[int] = (2, 3, 4, 5, 12, 14)) -> list[Row]:
    rows = []
    for C in classes:
        for apart in (100.0, 200.0):
            logits = [[apart * (c == v % C) - apart * (c == (v + 1) % C) / 2 for c in range(C)] for v in range(6)]
            labels = [(v * 3) // 2 % C for v in range(6)]
            rows.append(softmax(f"{C} classes, {apart:g} apart", logits, labels, dtypes=HALVES))
            rows.append(softmax(f"{C} classes, {apart:g} apart, power 2", logits, labels, power=2.0))
        for offset, dtypes in ((1e4, BOTH[1:]), (-1e5, BOTH[1:]), (1e8, BOTH[:1])):
            logits = noise(C, 7, 2.0) + offset
            rows.append(softmax(f"{C} classes, offset {offset:g}", logits, [v % C for v in range(7)], dtypes=dtypes))
        off = noise(C, 4, 1.0)
        off[0, 0] = off[1, C - 1] = off[2, 0] = OFF
        labels = [C - 1, 0, C - 1, 0]
        rows.append(softmax(f"{C} classes, -inf", off, labels))
        rows.append(softmax(f"{C} classes, -inf, power 1.5", off, labels, power=1.5))
        rows.append(softmax(f"{C} classes, -inf, gamma 0.5", off, labels, gamma=0.5))
        if C > 2:
            rest = tuple(range(1, C - 1))
            rows.append(softmax(f"{C} classes, -inf in a union", off, labels, regions=((0, *rest), (*rest, C - 1))))
            rows.append(softmax(f"{C} classes, -inf is a region", off, labels, regions=((0,), rest, (C - 1,))))
    rows += [
        softmax("union that underflows", [[0, 200, 0]], [0], regions=((0, 2), (1,))),
        softmax("union that underflows, uneven", [[1, 130, -2, 0.5]], [2], regions=((0, 2, 3), (1,))),
        softmax("union that underflows, one of three", [[3, 150, -20, 140, 7]], [0], regions=((0, 2), (3, 1), (4,))),
        softmax(
            "unions that underflow and overlap", [[0, 200, -50, 90]], [2], regions=((0, 2), (2, 3), (0, 1, 2), (2,))
        ),
    ]
    for gamma in GAMMAS:
        wide, halves = noise(6, 12, 8.0, seed=1), ((0, 1, 2), (3, 4, 5))
        rows.append(softmax(f"unions, gamma {gamma}", wide, [v % 6 for v in range(12)], gamma=gamma, regions=halves))
        rows.append(Row(f"p above 1, gamma {gamma}", [[1 + 9e-6, 0.5], [9e-6, 0.5]], [0, 1], {"gamma": gamma}))
        summed = {"gamma": gamma, "regions": ((0, 1), (2,))}
        rows.append(Row(f"a sum of p above 1, gamma {gamma}", [[0.75], [0.250009], [9e-6]], [0], summed))
    for small, dtypes in ((1e-30, BOTH), (1e-100, BOTH[:1])):
        p = [[small, 0.25, small], [1 - small, 0.75, 1 - small]]
        rows.append(Row(f"p of {small:g}", p, [0, 1, 1], {}, dtypes))
        rows.append(Row(f"p of {small:g}, gamma 0.5", p, [0, 1, 1], {"gamma": 0.5}, dtypes))
        union = {"regions": ((0, 1), (2,))}
        rows.append(Row(f"union of p of {small:g}", [[small], [2 * small], [1 - small]], [0], union, dtypes))
    rows.append(Row("p of 0 in a union", [[0.0, 0.25], [0.5, 0.25], [0.5, 0.5]], [0, 1], {"regions": ((0, 1), (2,))}))
    for x, dtypes in ((10.0, HALVES), (15.0, BOTH), (18.0, BOTH), (30.0, BOTH), (80.0, BOTH[:1])):
        one = {"activation": "sigmoid"}
        rows.append(Row(f"sigmoid, right at {x:g}", [[x]], [1], one, dtypes))
        rows.append(Row(f"sigmoid, right at -{x:g}", [[-x]], [0], one, dtypes))
        rows.append(Row(f"sigmoid, three right at {x:g}", [[x], [-x], [-x]], [0], one, dtypes))
        rows.append(Row(f"sigmoid, wrong at {x:g}", [[x, -x]], [0, 1], one, dtypes))
    return rows


def hard_cases(backends: Sequence[str], one_dtype: bool = False, **rows: Any) -> list[Any]:
    """Yield a row, a backend and a dtype of the input; one_dtype: only float32, if the row has it."""
    chosen = []
    for row, backend in itertools.product(hard_rows(**rows), backends):
        narrowest = torch.float32 if torch.float32 in row.dtypes else row.dtypes[0]
        chosen += [
            pytest.param(row, backend, dtype, id=f"{row.name}-{backend}-{str(dtype)[6:]}")
            for dtype in ([narrowest] if one_dtype else row.dtypes)
        ]
    return chosen


@functools.cache
def precise(name: str, dtype: torch.dtype) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    (row,) = (row for row in hard_rows() if row.name == name)
    return oracle.precise(row.input(dtype)[0], torch.tensor(row.labels), **row.keywords)


def found(
    row: Row, backend: str, dtype: torch.dtype, fields: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return each statistic, (R,), and the gradient of its sum, (C, V)."""
    x = row.input(dtype).requires_grad_()
    target = torch.tensor(row.labels).unsqueeze(0)
    with serving(backend):
        stats = softdice.overlap_statistics(x, target, fields=fields, **row.keywords)
    values = {name: getattr(stats, name)[0] for name in fields}
    gradients = {
        name: torch.autograd.grad(value.sum(), x, retain_graph=True)[0][0]
        for name, value in values.items()
        if name not in ("target", "target_squared", "voxels", "labelled")
    }
    return {name: value.detach() for name, value in values.items()}, gradients


def assert_close(got: Any, exact: np.ndarray, scale: Any, tolerance: float, what: str) -> None:
    error = np.max(np.abs(got.detach().double().numpy() - exact) / scale)
    assert error <= tolerance, f"{what}: {error:.3g}, allowed {tolerance:.3g}, of {exact.tolist()}"  # a nan is not


@pytest.mark.parametrize(("row", "backend", "dtype"), hard_cases(BACKENDS))
def test_hard_values(row: Row, backend: str, dtype: torch.dtype) -> None:
    plain = row.keywords.keys() == {"activation"}  # other loops, where a class need not be visited
    for fields in (FIELDS, FIELDS[:3], ("cross_entropy",)) if plain else (FIELDS,):
        assert_hard_values(row, backend, dtype, fields)


def assert_hard_values(row: Row, backend: str, dtype: torch.dtype, fields: Sequence[str]) -> None:
    """Compare each statistic, and the gradient of each, relative to itself or to 1, as in `assert_agreement`."""
    values, gradients = precise(row.name, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6  # exp of a float32 near -100 has that much
    step = torch.finfo(dtype).eps if dtype.itemsize == 2 else tolerance
    got, slopes = found(row, backend, dtype, fields)
    for name in fields:
        keeps_digits = name == "cross_entropy" and row.keywords.get("activation") == "sigmoid"
        least = 1e-300 if keeps_digits else 1.0
        assert_close(got[name], values[name], np.maximum(np.abs(values[name]), least), tolerance, name)
        if name in slopes:
            scale = max(np.abs(gradients[name]).max(), least)
            assert_close(slopes[name], gradients[name], scale, step, f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_union_that_underflows_by_hand(backend: str) -> None:
    """-ln of e^0 + e^0 over e^0 + e^200 + e^0 is 200 - ln 2; each of the two equal classes takes half of the slope."""
    logits = torch.tensor([[[0.0], [200.0], [0.0]]], requires_grad=True)
    regions = ((0, 2), (1,))
    with serving(backend):
        loss = softdice.CrossEntropyLoss(3, activation="softmax", regions=regions)(logits, torch.tensor([[0]]))
    loss.backward()
    assert loss.item() == pytest.approx(200 - np.log(2), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([-0.5, 1.0, -0.5], abs=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_classes_that_underflow(backend: str) -> None:
    logits = torch.tensor([[[1.0, 3.0], [150.0, -140.0], [1.0, 2.0]]], requires_grad=True)
    loss = softdice.CrossEntropyLoss(3, activation="softmax")
    with serving(backend):
        value = loss(logits, torch.tensor([[0, 1]]), merge={0: (2,)})
    value.backward()
    assert value.item() == pytest.approx((149 - np.log(2) + 143 + np.log1p(np.exp(-1))) / 2, rel=1e-6)
    assert logits.grad is not None
    share = 1 / (1 + np.exp(-1)) / 2
    expected = [-0.25, share, 0.5, -0.5, -0.25, 0.5 - share]
    assert logits.grad.flatten().tolist() == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(
    ("backend", "gamma"),
    [("reference", gamma) for gamma in GAMMAS] + [("cpu", gamma) for gamma in GAMMAS],
)
def test_focal_of_unions_is_bounded(backend: str, gamma: float) -> None:
    """Where a union's p rounds above 1, among many voxels of which a few always do."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(1, 6, 30_000, generator=generator) * 10
    labels = torch.randint(0, 6, (1, 30_000), generator=generator)
    loss = softdice.FocalLoss(6, gamma=gamma, activation="softmax", regions=((0, 2, 4), (1, 3, 5)))
    gradients = []
    for which, x in (("reference", logits.double()), (backend, logits.clone())):
        with softdice.use_backend(which):
            loss(x.requires_grad_(), labels).backward()
        assert x.grad is not None
        gradients.append(x.grad.double())
    exact, gradient = gradients
    assert (gradient - exact).abs().max() <= 1e-4 * exact.abs().max()


# --- labels that 32 bits do not hold, unsigned labels, layouts ----------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("label", "ignore"), [(2**33 + 1, 2**40), (-(2**35), -(2**31) - 1), (2**32, -(2**50))])
def test_a_label_beyond_32_bits_is_out_of_range(backend: str, label: int, ignore: int) -> None:
    logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, label, 2, ignore]])
    with softdice.use_backend(backend), pytest.raises(ValueError, match=rf"got {label} \(1 voxels\)"):
        softdice.overlap_statistics(logits, labels, activation="softmax", ignore_index=ignore)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore", [2**31, 2**40, -(2**31) - 1, 2**63 - 1, -(2**63)])
def test_an_ignore_index_beyond_32_bits(backend: str, ignore: int) -> None:
    logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, ignore, 2, ignore]])
    with serving(backend):
        stats = softdice.overlap_statistics(logits, labels, activation="softmax", ignore_index=ignore)
    assert stats.target.tolist() == [[1, 0, 1]]
    assert stats.voxels.tolist() == [[2, 2, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_labels(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 3, 40, generator=generator), torch.randint(0, 3, (2, 40), generator=generator)
    labels[0, :9] = 40_000
    settings: dict[str, Any] = {"activation": "softmax", "ignore_index": 40_000}
    mix = torch.rand(len(FIELDS), 2, 3, generator=generator)
    expected = Problem(logits, labels, {"fields": FIELDS, **settings}, mix).run(backend)
    got = Problem(logits, labels.to(dtype), {"fields": FIELDS, **settings}, mix).run(backend)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 3, 6, 5), (1, 3, 6, 5), (1, 2, 1, 7), (2, 4, 3, 4, 5), (1, 4, 3, 4, 5), (1, 1, 6, 5)], ids=str
)
def test_a_gradient_is_laid_out_as_its_input(
    request: pytest.FixtureRequest, kernel: str, shape: tuple[int, ...], dtype: torch.dtype, dense: bool
) -> None:
    format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=format)
    if shape[0] == 1:  # as a single image becomes a batch: the step from one sample to the next is any number
        logits = logits[0].unsqueeze(0)
    target = torch.rand(shape, generator=generator) if dense else torch.zeros(shape[0], *shape[2:], dtype=torch.uint8)
    logits.requires_grad_()
    with serving(kernel):
        stats = softdice.overlap_statistics(logits, target, activation="sigmoid", fields=FIELDS[:2])
    (gradient,) = torch.autograd.grad(stats.intersection.sum(), logits)
    assert gradient.is_contiguous(memory_format=format)


# --- second derivatives of the definition -------------------------------------------------------------------------


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in hard_rows()])
def test_the_definition_can_be_differentiated_twice(row: Row) -> None:
    x = row.input(torch.float64).requires_grad_()
    with softdice.use_backend("reference"):
        stats = softdice.overlap_statistics(x, torch.tensor(row.labels).unsqueeze(0), **row.keywords)
    for name in ("intersection", "prediction_squared", "difference", "cross_entropy", "focal"):
        (first,) = torch.autograd.grad(getattr(stats, name).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * first.detach()).sum(), x, retain_graph=True, allow_unused=True)
        assert second is None or second.isfinite().all(), name
