"""Counts, dice_score and the torchmetrics classes: against NumPy, by hand, in any order, over ranks, in collections."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softdice.metrics import counting
from softdice.metrics import formulas as scores
from softdice.metrics.counting import class_counts, pair_counts
from softdice.metrics.formulas import dice_score

pytest.importorskip("torchmetrics")
from softdice.metrics import (
    DiceScore,
    JaccardScore,
    OverlapMetric,
    PrecisionScore,
    RecallScore,
    VolumeDifference,
)

METRICS = (DiceScore, JaccardScore, PrecisionScore, RecallScore, VolumeDifference)


def slow_counts(p: np.ndarray, t: np.ndarray, C: int, ignore: int | None = None) -> np.ndarray:
    """The definition, class by class."""
    valid = np.ones(t.shape, bool) if ignore is None else t != ignore
    each = [(((p == c) & (t == c) & valid).sum(), ((p == c) & valid).sum(), ((t == c) & valid).sum()) for c in range(C)]
    return np.array(each).T


def blobs(shape: tuple[int, ...], C: int, seed: int, noise: float = 0.1) -> np.ndarray:
    """Labels with runs, as in segmentations, and some single voxels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(0, C, -(-math.prod(shape) // 23)), 23)[: math.prod(shape)]
    noisy = rng.random(labels.shape) < noise
    labels[noisy] = rng.integers(0, C, noisy.sum())
    return labels.reshape(shape)


@pytest.fixture(params=["numba", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(counting, "_kernels", lambda: None)
    else:
        pytest.importorskip("numba")
    return request.param


@pytest.mark.parametrize("shape", [(2, 60, 70, 81), (31, 37), (1_500_001,)])
@pytest.mark.parametrize("dtypes", [("uint8", "uint8"), ("uint8", "int64"), ("int16", "int32"), ("int64", "int64")])
def test_counts_equal_the_definition(engine: str, shape: tuple[int, ...], dtypes: tuple[str, str]) -> None:
    p, t = blobs(shape, 7, 1).astype(dtypes[0]), blobs(shape, 7, 2).astype(dtypes[1])
    t[..., :5] = 9
    counts = class_counts(torch.from_numpy(p), torch.from_numpy(t), 7, ignore_index=9)
    assert counts.dtype == torch.int64
    assert np.array_equal(counts.numpy(), slow_counts(p, t, 7, 9))


def test_counts_of_bool_and_of_any_layout(engine: str) -> None:
    p, t = blobs((70, 80, 90), 2, 3).astype(bool), blobs((70, 80, 90), 2, 4).astype(np.uint8)
    expected = slow_counts(p, t, 2)
    tp, tt = torch.from_numpy(p), torch.from_numpy(t)
    layouts = [
        (tp, tt),
        (tp.permute(2, 0, 1), tt.permute(2, 0, 1)),
        (tp.permute(2, 1, 0).contiguous().permute(2, 1, 0), tt),
        (tp.flip(0), tt.flip(0)),
        (tp.repeat_interleave(2, 0)[::2], tt),
    ]
    strange = torch.from_numpy((p * np.uint8(255)).view(bool))  # what Pillow makes of a picture of one bit
    layouts.append((strange, tt))
    layouts.append((strange, tt.to(torch.int32)))
    for a, b in layouts:
        assert np.array_equal(class_counts(a, b, 2).numpy(), expected)
    assert np.array_equal(class_counts(tp[:0], tt[:0], 2).numpy(), np.zeros((3, 2)))


def test_counts_do_not_depend_on_the_number_of_threads() -> None:
    p, t = (torch.from_numpy(blobs((5_000_000,), 40, seed).astype(np.uint8)) for seed in (5, 6))
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            seen.append(class_counts(p, t, 40))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@given(
    st.lists(st.tuples(st.integers(-3, 4), st.integers(-3, 4)), max_size=200),
    st.sampled_from([np.int8, np.int16, np.int64]),
    st.sampled_from([1, 1000, 10**9]),
)
@settings(max_examples=60, deadline=None)
def test_pairs_of_any_labels(pairs: list[tuple[int, int]], dtype: type, scale: int) -> None:
    scale = scale if np.iinfo(dtype).max > 4 * scale else 1
    p, t = (np.array([pair[i] * scale for pair in pairs], dtype) for i in (0, 1))
    expected: dict[tuple[int, int], int] = {}
    for a, b in pairs:
        expected[a * scale, b * scale] = expected.get((a * scale, b * scale), 0) + 1
    labels_p, labels_t, counts = pair_counts(p, t)
    got = {(int(a), int(b)): int(n) for a, b, n in zip(labels_p, labels_t, counts, strict=True)}
    assert got == expected


def test_pairs_of_many_labels(engine: str) -> None:
    rng = np.random.default_rng(0)
    for high, dtype in ((5000, np.int32), (200, np.uint8), (300, np.uint16), (200, np.int64)):
        p, t = rng.integers(0, high, (2, 100_000)).astype(dtype)
        labels_p, labels_t, counts = pair_counts(p, t)
        table = np.zeros((high, high), np.int64)
        np.add.at(table, (p, t), 1)
        assert np.array_equal(table[labels_p, labels_t], counts)
        assert counts.sum() == p.size


def test_dice_score_by_hand() -> None:
    p, t = torch.tensor([[0, 1, 1, 3]]), torch.tensor([[0, 0, 1, 1]])
    got = dice_score(p, t, 5)
    assert got.dtype == torch.float64
    assert torch.equal(got[[0, 1, 3]], torch.tensor([2 / 3, 0.5, 0.0], dtype=torch.float64))
    assert got[[2, 4]].isnan().all()
    assert torch.equal(dice_score(p, t, 4, ignore_index=0)[[1, 3]], torch.tensor([2 / 3, 0.0], dtype=torch.float64))
    assert dice_score(p == 1, t == 1, 1).tolist() == [0.5]
    with pytest.raises(
        ValueError, match=r"dice_score: expected prediction with labels in \[0, 3\), got 3 \(1 voxels\)"
    ):
        dice_score(p, t, 3)
    with pytest.raises(
        ValueError, match=r"dice_score: expected target with labels in \[0, 3\) or 9, got 4 \(2 voxels\)"
    ):
        dice_score(torch.zeros(3).long(), torch.tensor([4, 4, 9]), 3, ignore_index=9)
    with pytest.raises(ValueError, match=r"dice_score: expected target of shape \(1, 4\), got \(4,\)"):
        dice_score(p, t[0], 4)
    with pytest.raises(TypeError, match=r"dice_score: expected integer labels in prediction, got torch.float32"):
        dice_score(p.float(), t, 4)
    with pytest.raises(ValueError, match="num_classes >= 1"):
        dice_score(p, t, 0)


def test_dice_score_works_without_torchmetrics() -> None:
    code = (
        "import sys; sys.modules['torchmetrics'] = None; sys.modules['numba'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'numba' else find(name, *a)\n"
        "import torch; from softdice.metrics.formulas import dice_score\n"
        "print(dice_score(torch.tensor([0, 1]), torch.tensor([0, 1]), 2).tolist())\n"
        "from softdice.metrics import DiceScore"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[1.0, 1.0]\n"
    assert "Run: pip install 'softdice[metrics]'" in done.stderr


FORMULAS = {
    DiceScore: lambda tp, p, t: 2 * tp / (p + t),
    JaccardScore: lambda tp, p, t: tp / (p + t - tp),
    PrecisionScore: lambda tp, p, t: tp / p if p else 0.0,
    RecallScore: lambda tp, p, t: tp / t if t else 0.0,
    VolumeDifference: lambda tp, p, t: 2 * (p - t) / (p + t),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pooling", ["all", "sample"])
@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "none"])
def test_metrics_equal_a_plain_loop(metric: type[OverlapMetric], pooling: str, average: str) -> None:
    C, classes = 5, (1, 2, 4)
    p, t = (np.where(blobs((6, 9, 8), C, seed) == 3, 0, blobs((6, 9, 8), C, seed)) for seed in (7, 8))
    p[0][p[0] == 4] = 0
    t[:2][t[:2] == 4] = 0  # sample 0 has class 4 nowhere, sample 1 in the prediction only

    def score(counts: np.ndarray) -> list[float]:
        return [math.nan if a + b == 0 else FORMULAS[metric](tp, a, b) for tp, a, b in counts.T.tolist()]

    samples = np.stack([slow_counts(a, b, C)[:, classes] for a, b in zip(p, t, strict=True)])
    if average == "micro":
        samples = samples.sum(2, keepdims=True)
    table = np.array([score(sample) for sample in samples] if pooling == "sample" else [score(samples.sum(0))])
    per_class = np.nanmean(table, 0)
    expected = {
        "none": per_class,
        "micro": per_class[0],
        "macro": np.nanmean(per_class),
        "weighted": (per_class * samples.sum(0)[2]).sum() / samples.sum(0)[2].sum(),
    }[average]
    measure = metric(C, average=average, pooling=pooling, classes=classes)  # type: ignore[arg-type]
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        measure.update(torch.from_numpy(p[start:stop]), torch.from_numpy(t[start:stop]))
    np.testing.assert_allclose(measure.compute().numpy(), expected, rtol=0, atol=1e-13)
    before = measure.compute()
    measure._computed = None
    measure.update(torch.zeros(0, 9, 8).long(), torch.zeros(0, 9, 8).long())
    assert torch.equal(measure.compute(), before)


def test_absent_classes() -> None:
    p, t = torch.tensor([[1, 1, 0]]), torch.tensor([[2, 0, 0]])
    for metric in METRICS[:4]:
        value = metric(4, average="none")(p, t)
        assert value[1:3].tolist() == [0.0, 0.0]
        assert value[3].isnan()
    assert VolumeDifference(4, average="none")(p, t)[1:3].tolist() == [2.0, -2.0]
    empty = DiceScore(2, classes=[1], pooling="sample")
    assert empty(torch.zeros(2, 4).long(), torch.zeros(2, 4).long()).isnan()


@pytest.mark.parametrize("pooling", ["all", "sample"])
def test_order_and_split_do_not_change_a_bit(pooling: str) -> None:
    p, t = (torch.from_numpy(blobs((40, 50), 6, seed)) for seed in (1, 2))
    values = []
    for order in (torch.arange(40), torch.randperm(40, generator=torch.Generator().manual_seed(0))):
        for step in (1, 7, 40):
            metric = DiceScore(6, pooling=pooling)  # type: ignore[arg-type]
            for part in order.split(step):
                metric.update(p[part], t[part])
            values.append(metric.compute().item())
    assert len(set(values)) == 1


def test_state_is_small_and_counts_beyond_32_bits() -> None:
    metric = DiceScore(3, pooling="sample", average="none")
    size = sum(state.numel() for state in metric.metric_state.values())
    for _ in range(20):
        metric.update(torch.ones(2, 8).long(), torch.ones(2, 8).long())
    assert sum(state.numel() for state in metric.metric_state.values()) == size < 20
    metric.counts = metric.counts + 2**40
    pooled = DiceScore(2, average="none")
    pooled.counts = torch.tensor([[2**53 // 4 + 1, 0], [2**53 // 4 + 1, 1], [2**53 // 4 + 1, 1]])
    pooled._update_count = 1
    assert pooled.compute().tolist() == [1.0, 0.0]


def test_kinds_of_input_agree() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 6, 5, generator=generator)
    target = torch.randint(0, 3, (2, 6, 5), generator=generator)
    target[0, 0] = 255
    expected = DiceScore(3, average="none", ignore_index=255)(logits.argmax(1), target)

    def got(input: Tensor, labels: Tensor, **options: float) -> Tensor:
        return DiceScore(3, average="none", ignore_index=255, **options)(input, labels)  # type: ignore[arg-type]

    for labels in (target, target[:, None], target.to(torch.uint8), target.to(torch.int16)):
        assert torch.equal(got(logits, labels), expected)
        assert torch.equal(got(logits.softmax(1), labels), expected)
    assert torch.equal(got(logits.argmax(1, keepdim=True), target), expected)
    assert torch.equal(got(logits.argmax(1), target[:, None]), expected)
    assert torch.equal(got(logits.argmax(1, keepdim=True), target[:, None]), expected)

    masks = logits > 0.3
    hot = torch.stack([(target == c).long().masked_fill(target == 255, 255) for c in range(3)], 1)
    each = [scores.dice(class_counts(masks[:, c].long(), hot[:, c], 2, ignore_index=255))[1].item() for c in range(3)]
    for input in (logits, masks, masks.long()):
        for labels in (target, target[:, None], hot):
            assert got(input, labels, threshold=0.3).tolist() == each
    one = DiceScore(1, threshold=0.3, ignore_index=255)
    assert one(logits[:, :1], hot[:, 0]) == one(logits[:, :1], hot[:, :1]) == each[0]


def test_wrong_use_is_named() -> None:
    cases = [
        (3, {}, (2, 3, 4), (2, 5), r"target of shape \(2, 4\) or \(2, 1, 4\), got \(2, 5\)"),
        (3, {}, (2, 2, 4), (2, 4), r"input of shape \(B, 3, \*S\), got \(2, 2, 4\)"),
        (3, {}, (2, 3, 4), (2, 3, 4), r"target of shape \(2, 4\) or \(2, 1, 4\), got \(2, 3, 4\).*need a threshold"),
        (1, {}, (2, 1, 4), (2, 4), "a threshold for floating input of one class"),
    ]
    for C, options, input, target, message in cases:
        with pytest.raises(ValueError, match=message):
            DiceScore(C, **options).update(torch.zeros(input), torch.zeros(target).long())
    with pytest.raises(ValueError, match=r"DiceScore.update: expected target of shape \(2, 4\), got \(2, 5\)"):
        DiceScore(3).update(torch.zeros(2, 4).long(), torch.zeros(2, 5).long())
    with pytest.raises(ValueError, match="DiceScore: expected average to be one of 'macro'"):
        DiceScore(3, average="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="JaccardScore: expected pooling to be one of 'all', 'sample'"):
        JaccardScore(3, pooling="batch")  # type: ignore[arg-type]


def test_collection_shares_counts_but_not_between_metrics_that_count_differently() -> None:
    from torchmetrics import MetricCollection

    collection = MetricCollection(
        {
            "dice": DiceScore(2, average="none"),
            "iou": JaccardScore(2, average="none"),
            "masked": DiceScore(2, average="none", ignore_index=255),
            "sample": DiceScore(2, average="none", pooling="sample"),
        }
    )
    collection.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))  # nothing is ignored in the first batch
    assert sorted(map(sorted, collection.compute_groups.values())) == [["dice", "iou"], ["masked"], ["sample"]]
    p, t = torch.tensor([[0, 1, 1], [0, 0, 0]]), torch.tensor([[0, 0, 1], [1, 0, 0]])
    collection.update(p, t)
    single = DiceScore(2, average="none", ignore_index=255)
    single.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    single.update(p, t)
    values = collection.compute()
    assert torch.equal(values["masked"], single.compute())
    torch.testing.assert_close(values["iou"], values["dice"] / (2 - values["dice"]))
    collection.reset()
    assert collection["dice"].counts.sum() == 0


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    p, t = (torch.from_numpy(blobs((7, 40), 4, seed)) for seed in (1, 2))
    mine = [0, 1, 2, 3, 4] if rank == 0 else [5, 6]
    values = []
    for pooling in ("all", "sample"):
        metric = DiceScore(4, average="none", pooling=pooling)  # type: ignore[arg-type]
        for i in mine:
            metric.update(p[i : i + 1], t[i : i + 1])
        values.append(metric.compute())
    torch.save(values, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_with_unequal_shares_give_the_bits_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    p, t = (torch.from_numpy(blobs((7, 40), 4, seed)) for seed in (1, 2))
    for rank in (0, 1):
        for pooling, got in zip(("all", "sample"), torch.load(tmp_path / f"rank{rank}.pt"), strict=True):
            assert torch.equal(got, DiceScore(4, average="none", pooling=pooling)(p, t))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec.*", "ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"
)
def test_lightning_logs_it(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from torch.utils.data import DataLoader, TensorDataset

    p, t = (torch.from_numpy(blobs((6, 40), 3, seed)) for seed in (1, 2))

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.dice = DiceScore(3, pooling="sample")

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            self.dice(*batch)
            self.log("dice", self.dice, on_step=False, on_epoch=True)

    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    (logged,) = trainer.validate(Module(), DataLoader(TensorDataset(p, t), batch_size=4), verbose=False)
    expected = DiceScore(3, pooling="sample")(p, t)
    assert logged["dice"] == pytest.approx(expected.item(), abs=1e-7)  # Lightning logs float32
