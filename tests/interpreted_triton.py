"""The Triton kernels on CPU tensors, in a process with TRITON_INTERPRET=1.

`make test` runs a representative set, through tests/test_triton.py; `make test-triton` runs the rest, the marked ones.

Each test asserts that the kernels were launched. Shapes are small and odd; tiles are those of the table, so that most
of them are partly empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import test_agreement
import torch
import typer
from test_agreement import hard_cases
from test_kernels import case, operator_arguments, sums_and_gradient
from torch import Tensor

import softdice
from softdice.backends import route, selftest
from softdice.backends.cuda import declared, launch
from softdice.backends.cuda import driver as cuda
from softdice.statistics.declared import FIELDS, NAMES
from softdice.statistics.request import Request


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the names of the kernels that the test launches; assert that there is one."""
    names: list[str] = []
    start = cuda._start

    def record(kernel: Any, *rest: Any) -> None:
        names.append(kernel.__name__)
        start(kernel, *rest)

    monkeypatch.setattr(cuda, "_start", record)
    assert cuda.INTERPRETED
    assert not torch.are_deterministic_algorithms_enabled()  # no test leaves the mode on (conftest.py)
    with softdice.use_backend("triton"):
        yield names
    assert names


def exact(input: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    with softdice.use_backend("reference"):
        return sums_and_gradient(input.double(), target, **options)


def assert_agreement(input: Tensor, target: Tensor, tolerance: float, **options: Any) -> None:
    """Compare statistics relative to themselves, the gradient relative to its maximum (that of dL/dp where it is 0)."""
    sums, gradient = sums_and_gradient(input, target, **options)
    exact_sums, exact_gradient = exact(input, target, **options)
    assert ((sums - exact_sums).abs() <= tolerance * exact_sums.abs()).all()
    scale = exact_gradient.abs().max() if input.shape[1] > 1 or options["activation"] != "softmax" else 1.0
    assert (gradient.double() - exact_gradient).abs().max() <= tolerance * scale


def beyond(*values: Any) -> Any:
    """Return a parameter that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.triton)


def every_sixth(cases: list[Any]) -> list[Any]:
    """Mark the other cases as beyond the representative set."""
    others = (case._replace(marks=[pytest.mark.triton]) if n % 6 else case for n, case in enumerate(cases))
    return list(others)


class TestAgreement:
    @pytest.mark.parametrize("examples", [3, beyond(20)])
    @pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
    def test_drawn_problems(self, activation: str, examples: int) -> None:
        limits = {"shrink": False, "most_elements": 1500}
        test_agreement.agree_on_drawn("triton", activation, hard=False, examples=examples, **limits)

    @pytest.mark.parametrize("examples", [4, beyond(24)])
    @pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
    def test_drawn_hard_values(self, activation: str, examples: int) -> None:
        limits = {"shrink": False, "most_elements": 1000}
        test_agreement.agree_on_drawn("triton", activation, hard=True, examples=examples, **limits)

    @pytest.mark.parametrize(
        ("row", "backend", "dtype"), every_sixth(hard_cases(["triton"], one_dtype=True, classes=(3, 14)))
    )
    def test_hard_values(self, row: Any, backend: str, dtype: torch.dtype) -> None:
        fields = ("intersection", "difference", "cross_entropy", "focal")
        test_agreement.assert_hard_values(row, backend, dtype, fields)

    @pytest.mark.parametrize("C", [130, beyond(1024)])
    @pytest.mark.parametrize(
        ("activation", "dense", "options"),
        [
            ("softmax", False, {"ignore_index": 3}),
            ("softmax", True, {"label_smoothing": 0.1}),
            ("softmax", False, {"regions": ((0, 1, 70), (129,), tuple(range(100)))}),
            ("sigmoid", False, {}),
        ],
    )
    def test_more_classes_than_a_tile_holds(self, C: int, activation: str, dense: bool, options: Any) -> None:
        input, target = case(C, activation, dense, B=1, S=(19,), dtype=torch.float32)
        assert_agreement(input, target, 2e-6, activation=activation, **options)

    @pytest.mark.triton
    def test_more_regions_than_a_launch_takes(self, launches: list[str]) -> None:
        regions = tuple((r % 5, 5 + r % 3) for r in range(cuda.REGIONS + 3))
        assert_agreement(*case(8, "softmax", False, S=(9,)), 1e-12, activation="softmax", regions=regions)
        assert launches == ["forward_kernel"] * 2 + ["backward_kernel"] * 2

    @pytest.mark.parametrize("fields", [("intersection", "prediction", "target"), ("difference",), ("voxels", "focal")])
    def test_only_the_statistics_asked_for(self, fields: tuple[str, ...]) -> None:
        assert_agreement(*case(5, "softmax", False), 1e-12, activation="softmax", fields=fields)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("C", [1, 4, beyond(20)])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_half_precision(self, dtype: torch.dtype, C: int, channels_last: bool) -> None:
        input, target = case(C, "sigmoid", False, S=(9, 33), dtype=dtype)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        sums, gradient = sums_and_gradient(input, target, activation="sigmoid")
        exact_sums, exact_gradient = exact(input, target, activation="sigmoid")
        assert gradient.dtype == dtype
        assert gradient.stride() == input.stride()
        assert ((sums - exact_sums).abs() <= 2e-6 * exact_sums.abs()).all()
        rounded = exact_gradient.to(dtype).double()
        step = torch.finfo(dtype).eps * exact_gradient.abs() + torch.finfo(dtype).smallest_normal
        assert ((gradient.double() - rounded).abs() <= step).all()

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64])
    def test_labels_are_read_as_they_are(self, dtype: torch.dtype) -> None:
        input, target = case(2, "softmax", False, dtype=torch.float32)
        expected = sums_and_gradient(input, target, activation="softmax")
        found = sums_and_gradient(input, target.to(dtype), activation="softmax")
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])

    def test_labels_beyond_32_bits(self) -> None:
        input, target = case(3, "softmax", False)
        far = target.masked_fill(target == 2, 2**40)
        expected = sums_and_gradient(input, target, activation="softmax", ignore_index=2)
        found = sums_and_gradient(input, far, activation="softmax", ignore_index=2**40)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
    @pytest.mark.parametrize("ignored", [2**40, 2**40 + 1, -1, 2**32 - 1, -(2**32) + 1])
    def test_a_label_to_ignore_that_no_label_is(self, dtype: torch.dtype, ignored: int) -> None:
        """Its lower 32 bits may be those of a label; the labels themselves may be as large."""
        input, target = case(3, "softmax", False, B=1, S=(40,), dtype=torch.float32)
        options = {"activation": "softmax", "ignore_index": ignored, "fields": ("target", "prediction")}
        assert_agreement(input, target.to(dtype), 2e-6, **options)

    @pytest.mark.parametrize("label", [2**40, 2**32 + 1, -(2**32), -1, 3])
    def test_a_label_out_of_range_is_seen_in_all_its_bits(self, label: int) -> None:
        input, target = case(3, "softmax", False, B=1, S=(40,), dtype=torch.float32)
        target[0, 7] = label
        with pytest.raises(ValueError, match=rf"got {label} \(1 voxels\)"):
            softdice.overlap_statistics(input, target, activation="softmax")

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32])
    def test_values_and_weights_of_any_dtype(self, dtype: torch.dtype) -> None:
        input, target = case(3, "sigmoid", True, dtype=torch.float32)
        target = (target > 0.5).to(dtype) if dtype in (torch.bool, torch.uint8) else target.to(dtype)
        weight = (torch.rand(2, 5, 70) > 0.3).to(dtype)
        assert_agreement(input, target, 2e-6, activation="sigmoid", voxel_weight=weight)

    def test_any_strides(self) -> None:
        input, target = case(3, "softmax", False, S=(6, 14))
        views = {
            "sliced": input[..., ::2],
            "expanded": input[:1].expand(2, -1, -1, -1)[..., ::2],
            "transposed": input.transpose(2, 3).contiguous().transpose(2, 3)[..., ::2],
            "reversed classes last": input.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)[..., ::2],
        }
        weight = torch.rand(2, 1, 1, dtype=torch.float64).expand(2, 6, 7)
        for view in views.values():
            assert_agreement(view, target[..., ::2], 1e-12, activation="softmax", voxel_weight=weight)

    def test_every_program_walks_several_tiles(self) -> None:
        tile = launch.tile(2, 0, 4, 3).voxels
        V = tile * launch.PER_PROCESSOR * 2 + 77
        programs, steps = launch.grid(1, V, tile, launch.PER_PROCESSOR)
        assert programs > 1
        assert steps == launch.TILES
        assert_agreement(*case(2, "softmax", False, B=1, S=(V,), dtype=torch.float32), 2e-6, activation="softmax")

    @pytest.mark.triton
    def test_counts_beyond_the_whole_numbers_of_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(launch.BY_CLASS, (1, 4), launch.Tile(1 << 16))  # tiles so large for the interpreter's sake
        V = 2**24 + 2
        stats = softdice.overlap_statistics(
            torch.ones(1, 1, 1).expand(1, 1, V), torch.ones(1, V, dtype=torch.bool), fields=("target",), validate=False
        )
        assert stats.target.item() == V


class TestInvariants:
    def test_softmax_gradient(self) -> None:
        input, target = case(5, "softmax", False)
        target[0, :2] = 9
        options = {"activation": "softmax", "ignore_index": 9}
        sums, gradient = sums_and_gradient(input, target, **options)
        assert gradient.sum(1).abs().max() <= 1e-14 * gradient.abs().max()
        assert (gradient[0, :, :2] == 0).all()
        shifted_sums, shifted = sums_and_gradient(input + torch.randn(2, 1, 5, 70), target, **options)
        assert torch.allclose(shifted_sums, sums, rtol=1e-13, atol=0)
        assert (shifted - gradient).abs().max() <= 1e-13 * gradient.abs().max()

    @pytest.mark.triton
    def test_classes_change_places(self) -> None:
        input, target = case(4, "softmax", False)
        order = torch.tensor([2, 0, 3, 1])
        stats = softdice.overlap_statistics(input, target, activation="softmax")
        moved = softdice.overlap_statistics(input[:, order], order.argsort()[target], activation="softmax")
        for name in FIELDS:
            assert torch.allclose(getattr(moved, name), getattr(stats, name)[:, order], rtol=1e-13, atol=0)

    @pytest.mark.triton
    def test_halves_add_up(self) -> None:
        input, target = case(3, "sigmoid", True)
        whole = softdice.overlap_statistics(input, target, activation="sigmoid")
        parts = [
            softdice.overlap_statistics(input[..., half], target[..., half], activation="sigmoid")
            for half in (slice(None, 31), slice(31, None))
        ]
        for name in FIELDS:
            assert torch.allclose(getattr(parts[0] + parts[1], name), getattr(whole, name), rtol=1e-13, atol=0)

    def test_same_bits_again_and_inputs_untouched(self) -> None:
        torch.use_deterministic_algorithms(True)
        input, target = case(3, "softmax", False, B=1, S=(9000,), dtype=torch.float32)
        loss = softdice.SoftDiceLoss(3, activation="softmax") + softdice.CrossEntropyLoss(3, activation="softmax")
        before = input.clone(), target.clone()
        input.requires_grad_()
        value = loss(input, target)
        (first,) = torch.autograd.grad(value, input, retain_graph=True)
        (second,) = torch.autograd.grad(value, input)
        assert torch.equal(first, second)
        assert torch.equal(loss(input, target), value)
        assert torch.equal(input, before[0])
        assert torch.equal(target, before[1])

    def test_a_sure_network(self) -> None:
        """Where p is nearly 1 the products of q cancel; what is left must not be noise."""
        input, target = case(4, "softmax", False, dtype=torch.float32)
        sure = torch.nn.functional.one_hot(target, 4).movedim(-1, 1) * 12.0 + input.clamp(-1, 1)
        _, gradient = sums_and_gradient(sure, target, activation="softmax", fields=FIELDS[:3])
        _, exact_gradient = exact(sure, target, activation="softmax", fields=FIELDS[:3])
        assert (gradient - exact_gradient).abs().max() <= 2e-6 * exact_gradient.abs().max()

    def test_nan(self) -> None:
        input, target = case(3, "softmax", False, dtype=torch.float32)
        input[0, 1, 2, 3] = torch.nan
        loss = softdice.SoftDiceLoss(3, activation="softmax", ignore_index=9)
        assert loss(input, target).isnan()
        target[0, 2, 3] = 9
        leaf = input.requires_grad_()
        loss(leaf, target).backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[0, :, 2, 3] == 0).all()

    @pytest.mark.parametrize("place", ["input", beyond("target"), beyond("map")])
    @pytest.mark.parametrize(
        ("C", "activation", "dense", "regions"),
        [
            (3, "none", False, None),
            (3, "none", True, None),
            (3, "none", False, ((0, 1), (1, 2))),
            (3, "none", True, ((0, 1), (1, 2))),
            (1, "none", False, None),
            (3, "sigmoid", False, None),
            (3, "sigmoid", True, None),
            beyond(3, "softmax", False, None),
            (3, "softmax", True, None),
            (3, "softmax", True, ((0, 1), (2,))),
            beyond(200, "softmax", False, None),
            beyond(200, "softmax", False, ((0, 150), (3,))),
            beyond(200, "none", True, ((0, 100), (100,))),
        ],
    )
    def test_a_nan_reaches_all_that_it_reaches_by_the_definition(
        self, C: int, activation: str, dense: bool, regions: Any, place: str
    ) -> None:
        """The NaN stands at one voxel and, in input, at one class, which is in every region: the reference adds regions
        by a product with 0 and 1, which spreads a NaN to the regions without it."""
        input, target = case(C, activation, dense, B=1, S=(9,), dtype=torch.float32)
        options: dict[str, Any] = {"activation": activation, "regions": regions, "validate": False, "gamma": 1.5}
        options |= {"label_smoothing": 0.1} if C == 3 and not dense else {}
        options |= {"fields": NAMES, "voxel_map": torch.rand(1, 9)}
        hit = {"input": input[0, C // 2], "target": target[0].flatten(0, -2) if dense else None, "map": None}[place]
        hit = options["voxel_map"] if place == "map" else hit
        if hit is None:  # a label map holds no NaN
            target[0, 4] = C // 2
            hit = input[0, C // 2]
        hit[..., 4] = torch.nan
        sums, gradient = sums_and_gradient(input, target, **options)
        exact_sums, exact_gradient = exact(input, target, **options)
        assert exact_sums.isnan().any()
        assert torch.equal(sums.isnan(), exact_sums.isnan())
        assert torch.equal(gradient.isnan(), exact_gradient.isnan())

    def test_a_network_that_has_diverged_has_no_finite_loss(self) -> None:
        input, target = case(3, "none", False, B=1, S=(9,), dtype=torch.float32)
        for c in range(3):
            diverged = input.clone()
            diverged[0, c, 4], target[0, 4] = torch.nan, c
            assert softdice.CrossEntropyLoss(3, validate=False)(diverged, target).isnan()
            assert softdice.FocalLoss(3, validate=False)(diverged, target).isnan()

    @pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0)])
    def test_nothing_to_add(self, shape: tuple[int, ...]) -> None:
        softdice.overlap_statistics(*case(2, "softmax", False), activation="softmax")  # one launch
        input = torch.zeros(shape, requires_grad=True)
        stats = softdice.overlap_statistics(
            input, torch.zeros(shape[0], shape[2], dtype=torch.long), activation="softmax"
        )
        assert stats.prediction.shape == shape[:2]
        stats.prediction.sum().backward()
        assert input.grad is not None
        assert input.grad.shape == shape


class TestOperators:
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of opcheck
    @pytest.mark.triton
    @pytest.mark.parametrize(
        ("dense", "activation", "unions"),
        [(False, "softmax", False), (True, "softmax", True), (True, "sigmoid", False)],
    )
    def test_opcheck(self, dense: bool, activation: str, unions: bool) -> None:
        softdice.overlap_statistics(*case(3, "softmax", False), activation="softmax")  # defines the operators
        arguments = operator_arguments(dense, activation, unions)
        torch.library.opcheck(torch.ops.softdice.statistics.default, (*arguments, "triton"))
        grad = torch.rand(len(FIELDS), 2, 2 if unions else 3, dtype=torch.float64, requires_grad=True)
        torch.library.opcheck(torch.ops.softdice.statistics_backward.default, (grad, *arguments, "triton"))

    def test_the_backward_pass_stays_with_the_backend(self, launches: list[str]) -> None:
        input, target = case(3, "softmax", False)
        input.requires_grad_()
        value = softdice.SoftDiceLoss(3, activation="softmax")(input, target)
        with softdice.use_backend("reference"):
            value.backward()
        assert launches == ["forward_kernel", "backward_kernel"]

    def test_an_expanded_gradient(self) -> None:
        input, target = case(3, "softmax", False)
        input.requires_grad_()
        stats = softdice.overlap_statistics(input, target, activation="softmax", fields=("intersection",))
        (found,) = torch.autograd.grad(stats.intersection.sum(), input)
        with softdice.use_backend("reference"):
            stats = softdice.overlap_statistics(input, target, activation="softmax", fields=("intersection",))
            (expected,) = torch.autograd.grad(stats.intersection.sum(), input)
        assert (found - expected).abs().max() <= 1e-14 * expected.abs().max()

    @pytest.mark.triton
    def test_second_derivatives_come_from_the_reference(self) -> None:
        input, target = case(3, "softmax", True, S=(4,), B=1)
        loss = softdice.SoftDiceLoss(3, activation="softmax")
        assert torch.autograd.gradgradcheck(lambda x: loss(x, target), input.requires_grad_())

    def test_two_losses_are_one_pass(self, launches: list[str]) -> None:
        input, target = case(3, "softmax", False)
        loss = softdice.SoftDiceLoss(3, activation="softmax") + softdice.CrossEntropyLoss(3, activation="softmax")
        loss(input, target)
        assert launches == ["forward_kernel"]

    def test_fused_head(self) -> None:
        """Its chunks come from several threads; the interpreter takes one at a time."""
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(2, 4, 9, 11, generator=generator, dtype=torch.float64, requires_grad=True)
        target = torch.randint(0, 3, (2, 9, 11), generator=generator)
        conv = torch.nn.Conv2d(4, 3, 1).double()
        loss = softdice.SoftDiceLoss(3, activation="softmax")
        head = softdice.FusedHead(conv, loss)
        (found,) = torch.autograd.grad(head(features, target), features)
        with softdice.use_backend("reference"):
            (expected,) = torch.autograd.grad(loss(conv(features), target), features)
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()

    @pytest.mark.parametrize("bad", ["label", beyond("probability"), "weight", beyond("dense")])
    @pytest.mark.parametrize("unions", [False, beyond(True)])
    def test_values_out_of_range(self, bad: str, unions: bool) -> None:
        input, target = case(3, "none", bad == "dense", S=(40, 40), dtype=torch.float32)
        weight = torch.ones(2, 40, 40)
        if bad == "label":
            target[1, 3, 3] = 3
        elif bad == "probability":
            input[1, 2, 3, 3] = 1.5
        elif bad == "weight":
            weight[0, 0, 0] = -1
        else:
            target[0, 0, 0, 0] = -0.5
        expected = {"label": "got 3 ", "probability": "got 1.5 ", "weight": "got -1.0 ", "dense": "got -0.5 "}[bad]
        options: dict[str, Any] = {"voxel_weight": weight, "regions": ((0, 1), (2,)) if unions else None}
        with pytest.raises(ValueError, match=expected):
            softdice.overlap_statistics(input, target, **options)
        softdice.overlap_statistics(input, target, **options, validate=False)

    @pytest.mark.triton
    def test_half_precision_logits_under_autocast_and_a_scaler(self, launches: list[str]) -> None:
        """float16 logits are not cast; gradients below its range come back when the loss is scaled."""
        input, target = case(2, "softmax", False, B=1, S=(40_000,), dtype=torch.float16)
        loss = softdice.SoftDiceLoss(2, activation="softmax")
        gradients = []
        for factor in (1.0, 2.0**16):
            leaf = input.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = loss(leaf, target)
            assert value.dtype == torch.float32
            (value * factor).backward()
            assert leaf.grad is not None
            assert leaf.grad.dtype == torch.float16
            gradients.append(leaf.grad.double() / factor)
        wide = input.double().requires_grad_()
        with softdice.use_backend("reference"):
            loss(wide, target).backward()
        assert wide.grad is not None
        error = [(gradient - wide.grad).abs().max() / wide.grad.abs().max() for gradient in gradients]
        assert error[1] <= 1e-3 < error[0]
        assert set(launches) == {"forward_kernel", "backward_kernel"}


class TestChoice:
    def test_what_the_kernels_do_not_serve_is_refused(self) -> None:
        input, target = case(3, "softmax", True, dtype=torch.float32)
        with pytest.raises(RuntimeError, match=r"'triton' backend serves.*requires a gradient"):
            softdice.overlap_statistics(input, target.clone().requires_grad_(), activation="softmax")
        with softdice.use_backend("auto"):  # the interpreter is for checking, never chosen for a CPU tensor
            labels = torch.zeros(1, route.SMALL_NUMEL, dtype=torch.long)
            assert route.choose(Request(torch.zeros(1, 2, route.SMALL_NUMEL), labels)) == "cpu"
        softdice.overlap_statistics(input, target, activation="softmax")


class TestTrial:
    """Under "auto" the first pass of a kind on a device is tried; here CPU tensors stand in for a GPU's."""

    @pytest.fixture(autouse=True)
    def chosen(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def chosen(request: Request) -> str:  # the end of `route.choose` on a GPU
            named = route.asked() == "triton"
            return "triton" if named or not selftest.failed(request) else "reference"

        monkeypatch.setattr(route, "choose", chosen)
        monkeypatch.setattr(selftest, "_outcomes", {})
        monkeypatch.setattr(selftest, "_failed", [])
        for name, few in (("VOXELS", 150), ("PROGRAMS", 1), ("TILES", 2)):  # the interpreter is slow
            monkeypatch.setattr(selftest, name, few)
        with softdice.use_backend("auto"):
            yield

    @pytest.mark.parametrize(
        "dtype", [torch.float32, beyond(torch.float64), beyond(torch.float16), beyond(torch.bfloat16)]
    )
    @pytest.mark.parametrize("activation, dense", [("softmax", False), ("sigmoid", True), ("none", False)])
    def test_the_right_kernels_pass_once(
        self, dtype: torch.dtype, activation: str, dense: bool, launches: list[str]
    ) -> None:
        input, target = case(3, activation, dense, dtype=dtype)
        options: dict[str, Any] = {} if dense else {"ignore_index": 255}
        weight = torch.ones(target.shape[0], *input.shape[2:])
        for _ in range(2):
            softdice.overlap_statistics(input, target, activation=activation, voxel_weight=weight, **options)
        assert launches == ["forward_kernel", "backward_kernel"] + 2 * ["forward_kernel"]  # all statistics, both ways
        assert list(selftest._outcomes.values()) == [None]

    def test_channels_last_regions_and_a_head(self) -> None:
        input, target = case(5, "softmax", False, dtype=torch.float32)
        softdice.overlap_statistics(
            input.contiguous(memory_format=torch.channels_last), target, activation="softmax", regions=((0, 1), (3,))
        )
        loss = softdice.SoftDiceLoss(3, activation="softmax")
        softdice.FusedHead(torch.nn.Conv1d(4, 3, 1), loss)(torch.randn(2, 4, 9), torch.zeros(2, 9, dtype=torch.long))
        assert list(selftest._outcomes.values()) == [None, None]

    @pytest.mark.parametrize("fault", ["sums", "slopes", "does not compile", "nan"])
    def test_wrong_kernels_are_left_for_the_reference(self, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
        input, target = case(3, "softmax", False, dtype=torch.float32)
        right = sums_and_gradient(input, target, activation="softmax")
        real_terms, real_slopes = declared.terms, declared.slopes
        plus = "plus(sums, FIRST, w, p, q, a, b, t, m)"
        of_slopes = "slopes(coefficients, p, q, a, b, t, m)"
        broken = {
            "sums": (real_terms, {"PLUS": declared._jit(plus, "return sums")}),
            "does not compile": (real_terms, {"PLUS": declared._jit(plus, "return tl.no_such_thing(p)")}),
            "slopes": (real_slopes, {"SLOPES": declared._jit(of_slopes, "return p, q")}),
            "nan": (real_slopes, {"SLOPES": declared._jit(of_slopes, "return p * float('nan'), p")}),
        }
        real, change = broken[fault]
        monkeypatch.setattr(declared, real.__name__, lambda *given: real(*given) | change)
        monkeypatch.setattr(selftest, "_outcomes", {})
        with pytest.warns(
            RuntimeWarning, match="softdice: expected Triton's kernels to agree with the reference on cpu"
        ):
            ours = sums_and_gradient(input, target, activation="softmax")
        (found,) = selftest._outcomes.values()
        assert found is not None
        assert ("an error of Triton" in found and "no_such_thing" in found) == (fault == "does not compile")
        again = sums_and_gradient(
            input, target, activation="softmax"
        )  # without a second warning, which would be an error
        for a, b, c in zip(right, ours, again, strict=True):
            assert torch.equal(b, c)
            assert (a - b).abs().max() <= 1e-5 * a.abs().max()

    def test_an_error_of_ours_is_not_called_one_of_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        input, target = case(3, "softmax", False, dtype=torch.float32)
        softdice.overlap_statistics(input, target, activation="softmax")
        monkeypatch.setattr(selftest, "_outcomes", {})
        monkeypatch.setattr(declared, "terms", lambda *_: {}["no such term"])
        with pytest.warns(RuntimeWarning, match="got an error of softdice: KeyError: 'no such term'"):
            softdice.overlap_statistics(input, target, activation="softmax")

    @pytest.mark.triton
    def test_softdice_check_shows_it(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        from softdice.cli.check import check

        monkeypatch.setattr(route, "kernel_backends", dict)  # the whole image takes the interpreter a minute
        check()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("triton trial")]
        assert len(lines) == 9
        assert all(line.endswith(" ok") for line in lines)
        real = declared.terms
        wrong = {"PLUS": declared._jit("plus(sums, FIRST, w, p, q, a, b, t, m)", "return sums")}
        monkeypatch.setattr(declared, "terms", lambda *given: real(*given) | wrong)
        monkeypatch.setattr(selftest, "_outcomes", {})
        with (
            pytest.warns(RuntimeWarning, match="Please report what `softdice check` prints"),
            pytest.raises(typer.Exit),
        ):
            check()
        assert "triton trial of float32 softmax   OFF: statistics or a gradient that are off" in capsys.readouterr().out

    def test_a_backend_by_name_is_not_tried(self) -> None:
        with softdice.use_backend("triton"):
            softdice.overlap_statistics(*case(3, "softmax", False), activation="softmax")
        assert selftest._outcomes == {}

    def test_nothing_is_tried_while_a_graph_is_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        input, target = case(3, "softmax", False, dtype=torch.float32)
        monkeypatch.setattr(selftest, "_capturing", lambda device: True)
        softdice.overlap_statistics(input, target, activation="softmax")
        assert selftest._outcomes == {}
        monkeypatch.setattr(selftest, "_capturing", lambda device: False)
        softdice.overlap_statistics(input, target, activation="softmax")
        assert list(selftest._outcomes.values()) == [None]

    def test_compiled_code_knows_what_failed_before(self, launches: list[str]) -> None:
        input, target = case(3, "softmax", False, dtype=torch.float32)

        def intersection(x: Tensor) -> Tensor:
            return softdice.overlap_statistics(x, target, activation="softmax", fields=("intersection",)).intersection

        right = intersection(input)
        launches.clear()
        compiled = torch.compile(intersection, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(input), right)
        assert launches == ["forward_kernel"]
        selftest._failed.append("statistics that are off by 1")
        torch.testing.assert_close(compiled(input), right)
        assert launches == ["forward_kernel"]
