"""Folders, label values, intensities, patches: what reaches the network."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")

from monai.transforms import Compose

from softdice.evaluation.averages import mean
from softdice.evaluation.table import Table, score
from softdice.metrics.counting import class_counts
from softdice.metrics.formulas import dice
from softdice.training.brain import GAP, blocks, brain_cases
from softdice.training.cases import Case, Cases, read_folder, split
from softdice.training.channels import PERCENTILES, normalise
from softdice.training.config import TrainConfig, TrainingError, merge
from softdice.training.evaluate import logits_of, mean_dice
from softdice.training.module import Budget, learning_rate
from softdice.training.patches import Patches, epoch_keys
from softdice.training.plan import choose_batch, choose_network, choose_patch

DATA = Path(os.environ.get("SOFTDICE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def write_pair(folder: Path, name: str, image: np.ndarray, label: np.ndarray) -> None:
    for part, array in (("images", image), ("labels", label)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        np.save(folder / part / f"{name}.npy", array)


def some_cases(shape: tuple[int, ...], count: int = 3) -> Cases:
    def read(number: int) -> Case:
        label = np.zeros(shape, np.uint8)
        label[tuple(slice(n // 2, n // 2 + 2) for n in shape)] = 1
        return Case(str(number), np.full((1, *shape), number + 1, np.float32), label)

    return Cases([str(n) for n in range(count)], [0, 1], ["a", "b"], len(shape), 1, [shape] * count, read)


def test_label_values_are_mapped_to_classes_in_ascending_order(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", np.zeros((4, 4)), np.array([[-3, 7], [7, 250]]).repeat(2, 0).repeat(2, 1))
    write_pair(tmp_path, "b", np.ones((4, 4)), np.full((4, 4), 250.0))
    cases = read_folder(tmp_path)
    assert cases.values == [-3, 7, 250]
    assert cases.mapping == {-3: 0, 7: 1, 250: 2}
    assert cases[0].label[::2, ::2].tolist() == [[0, 1], [1, 2]]
    assert (cases[1].label == 2).all()


def test_values_that_are_the_classes_are_not_mapped(tmp_path: Path) -> None:
    for name in "ab":
        write_pair(tmp_path, name, np.zeros((4, 4)), np.eye(4, dtype=bool))
    assert read_folder(tmp_path).mapping is None


def test_a_grey_image_beside_rgb_ones_gets_their_channels(tmp_path: Path) -> None:
    from PIL import Image

    for name, mode in (("grey", "L"), ("rgb", "RGB"), ("transparent", "RGBA")):
        for part in ("images", "labels"):
            (tmp_path / part).mkdir(exist_ok=True)
        Image.new(mode, (5, 4), 7 if mode == "L" else (7, 8, 9, 10)[: len(mode)]).save(
            tmp_path / "images" / f"{name}.png"
        )
        # a label saved as RGB with equal channels is a label image all the same
        Image.fromarray(np.eye(4, 5, dtype=np.uint8)[..., None].repeat(3, 2)).save(tmp_path / "labels" / f"{name}.png")
    cases = read_folder(tmp_path)
    assert cases.channels == 3
    assert [cases[n].image.shape for n in range(3)] == [(3, 4, 5)] * 3
    assert [cases[n].label.sum() for n in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e4, -5e3), (1e-4, 3.0)])
def test_intensities_do_not_depend_on_the_files_scale(scale: float, offset: float) -> None:
    image = np.random.default_rng(0).random((20, 20))
    np.testing.assert_allclose(normalise(image * scale + offset), normalise(image), atol=2e-2 if scale < 1 else 1e-3)


def test_one_bright_voxel_and_nan_do_not_set_the_scale() -> None:
    image = np.random.default_rng(0).random((50, 50))
    spoiled = image.copy()
    spoiled[0, 0], spoiled[0, 1], spoiled[0, 2] = 1e9, np.nan, np.inf
    assert np.abs(normalise(spoiled)[1:] - normalise(image)[1:]).max() < 0.05
    assert (normalise(np.full((3, 3), 5)) == 0).all()
    assert (normalise(np.full((3, 3), np.nan)) == 0).all()


def test_an_object_smaller_than_the_percentiles_stands_out() -> None:
    """Nine bright voxels of 10 000, beyond the upper percentile: as bright as they are, not as bright as the noise."""
    image = np.random.default_rng(0).normal(10, 0.5, (100, 100))
    image[40:43, 40:43] = 60  # 100 standard deviations of the noise above its mean
    far = normalise(image)[40:43, 40:43]
    assert (far > 8 * normalise(image)[:30].max()).all()
    assert (normalise(image, clipped=True)[40:43, 40:43] < 4).all()  # as models of earlier releases saw it
    assert normalise(-image)[41, 41] < -25
    brighter = image.copy()
    brighter[41, 41] = 90
    assert normalise(brighter)[41, 41] > normalise(brighter)[40, 40]


def test_an_object_on_a_background_of_one_value_is_not_lost() -> None:
    """4 of 10 000 voxels are 7, the others 0: mean 0.0028, standard deviation 7 sqrt(0.0004 x 0.9996) = 0.13997."""
    image = np.zeros((100, 100))
    image[:2, :2] = 7
    np.testing.assert_allclose(normalise(image)[0, [0, 2]], [6.9972 / 0.13997, -0.0028 / 0.13997], rtol=1e-3)
    assert (normalise(image, clipped=True) == 0).all()


def test_the_split_is_drawn_by_the_seed_and_keeps_one_of_each() -> None:
    cases = some_cases((8, 8), 10)
    training, held_out = split(cases, 0.3, 1)
    assert len(held_out) == 3
    assert sorted(training + held_out) == list(range(10))
    assert split(cases, 0.3, 1) == (training, held_out)
    assert split(cases, 0.3, 2) != (training, held_out)
    two = some_cases((8, 8), 2)
    assert [len(part) for part in split(two, 0.99, 0)] == [1, 1]
    assert [len(part) for part in split(two, 0.01, 0)] == [1, 1]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_brain_slices_held_out_keep_their_distance(fraction: float) -> None:
    training, held_out = blocks(113, fraction)
    assert training
    assert held_out
    assert min(abs(a - b) for a in training for b in held_out) == GAP + 1


def test_the_brain_has_its_two_tissues_in_every_slice() -> None:
    pytest.importorskip("nilearn")
    cases = brain_cases(0.2)
    assert cases.split is not None
    training, held_out = cases.split
    assert len(training) > 60
    assert len(held_out) > 20
    for number in (training[0], held_out[-1]):
        case = cases[number]
        assert case.image.shape == (1, 233, 197)
        assert set(np.unique(case.label)) == {0, 1, 2}
        # front up: the skull is longer than wide, and white matter is brighter than grey, grey than the rest
        means = [case.image[0][case.label == n].mean() for n in range(3)]
        assert means == sorted(means)


def test_a_patch_depends_on_seed_epoch_and_number_only() -> None:
    cases = some_cases((20, 24))
    first, second = (Patches(cases, [0, 2], (16, 16), seed=5) for _ in range(2))
    wanted = first[(3, 7)]
    _ = second[(0, 1)], torch.rand(3), np.random.default_rng().random()
    again = second[(3, 7)]
    assert torch.equal(wanted[0], again[0])
    assert torch.equal(wanted[1], again[1])
    assert wanted[0].shape == (1, 16, 16)
    assert wanted[0].dtype == torch.float32
    assert wanted[1].dtype == torch.uint8
    assert not torch.equal(wanted[0], second[(4, 7)][0])
    assert not torch.equal(wanted[0], Patches(cases, [0, 2], (16, 16), seed=6)[(3, 7)][0])


def test_every_case_comes_once_before_one_comes_twice() -> None:
    cases = some_cases((8, 8), 4)
    seen: list[str] = []
    read = cases.read
    cases.read = lambda number: seen.append(str(number)) or read(number)  # type: ignore[func-returns-value]
    patches = Patches(cases, [0, 1, 3], (8, 8), seed=0)
    for number in range(6):
        patches[(0, number)]
    assert sorted(seen[:3]) == sorted(seen[3:]) == ["0", "1", "3"]


def test_a_small_image_is_centred_in_its_patch_and_a_large_one_cut() -> None:
    label = np.broadcast_to(np.arange(1, 101, dtype=np.uint8), (3, 100))  # says where a patch was cut
    case = Case("a", np.stack([label, label]).astype(np.float32), label)
    patches = Patches(Cases(["a"], [0, 4], ["a", "b"], 2, 2, [(3, 100)], lambda number: case), [0], (8, 4), seed=0)
    patches.augment = Compose([])
    firsts = set()
    for number in range(50):
        image, cut = patches[(0, number)]
        first = int(cut[2, 0])
        assert cut.tolist() == [[0] * 4] * 2 + [[*range(first, first + 4)]] * 3 + [[0] * 4] * 3
        assert (image == cut).all()
        assert image.shape == (2, 8, 4)
        firsts.add(first)
    assert len(firsts) > 20
    assert min(firsts) >= 1
    assert max(firsts) <= 97


def test_ranks_share_an_epoch_without_overlap() -> None:
    shares = [epoch_keys(2, 10, rank, 3) for rank in range(3)]
    assert sorted(key for share in shares for key in share) == [(2, number) for number in range(10)]


def test_the_plan_suits_the_images() -> None:
    assert choose_patch([(250, 250, 10)], None, False) == (128, 128, 16)
    assert choose_patch([(30, 30)], (64,), False) == (64, 64)
    with pytest.raises(TrainingError, match="expected a patch of 1 or 2 numbers"):
        choose_patch([(30, 30)], (8, 8, 8), False)
    assert choose_batch((320, 320), None, False) == 2
    assert choose_batch((8, 8), None, False) == 32
    assert choose_batch((8, 8), 3, False) == 3
    for patch in ((8, 8), (240, 208), (40, 56, 40), (8, 8, 8)):
        plan = choose_network(patch, 2, 3, False)
        network = plan.build()
        assert network(torch.zeros(1, 2, *patch)).shape == (1, 3, *patch)


def test_the_learning_rate_follows_the_budget_by_steps() -> None:
    budget = Budget(epochs=4, seconds=None, steps_per_epoch=10)
    assert [budget.fraction(step) for step in (0, 20, 40, 99)] == [0.0, 0.5, 1.0, 1.0]
    rates = [learning_rate(1.0, fraction) for fraction in np.linspace(0.02, 1, 50)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0
    assert rates[-1] < 1e-9


def test_time_counts_over_resumptions_and_the_shorter_budget_wins() -> None:
    budget = Budget(epochs=100, seconds=1000.0, steps_per_epoch=10, elapsed_before_s=900.0)
    assert 0.9 <= budget.fraction(0) < 0.95
    assert budget.fraction(999) == 0.999


def test_scores_are_means_over_cases_without_the_missing_and_pooled_sums() -> None:
    truth, prediction = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2])
    first = class_counts(prediction, truth, 4)
    assert first.tolist() == [[1, 1, 1, 0], [1, 2, 1, 0], [2, 1, 1, 0]]
    second = class_counts(torch.tensor([1]), torch.tensor([1]), 4)
    table = Table(tuple(range(4)), torch.stack([first, second]).numpy(), ["a", "b"])
    np.testing.assert_allclose(table.dice[0], [2 / 3, 2 / 3, 1, np.nan])
    np.testing.assert_allclose(mean(table.dice), [2 / 3, 5 / 6, 1, np.nan])
    np.testing.assert_allclose(score(dice, table.counts.sum(0)), [2 / 3, 4 / 5, 1, np.nan])
    assert mean_dice(mean(table.dice)) == pytest.approx((5 / 6 + 1) / 2)


def test_sliding_windows_cover_an_image_that_is_no_multiple_of_the_patch() -> None:
    class Brightness(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.zeros_like(image), image], 1)

    image = torch.randn(1, 37, 19)
    assert torch.equal(logits_of(Brightness(), image, (16, 24)).argmax(0), (image[0] > 0).long())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": 0}, "expected epochs to be a number above 0, got 0. Change --epochs."),
        ({"max_minutes": -1.0}, "expected max_minutes to be a number above 0, got -1.0. Change --max-minutes."),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": float("nan")}, "got nan. Change --lr."),
        ({"devices": 0}, "devices"),
        ({"val_fraction": 1.0}, "a share in (0, 1), got 1.0"),
        ({"seed": -1}, "a whole number in [0, 2^32), got -1"),
        ({"precision": "8"}, "one of 32-true, bf16-mixed, got 8"),
        ({"patch": (12, 16)}, "multiples of 8, got 12x16"),
    ],
)
def test_a_setting_out_of_range_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError) as error:
        TrainConfig(**change)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_resuming_takes_the_stored_settings_and_refuses_others() -> None:
    stored = {
        "data": "d", "loss": "dice", "batch_size": 4, "patch": [16, 16], "lr": 0.1, "val_fraction": 0.2, "seed": 7,
        "precision": "32-true", "devices": 1, "fused_head": False, "epochs": 5, "max_minutes": None,
    }  # fmt: skip
    merged = merge(TrainConfig(out="o", resume=True, epochs=9, patch=(16,), data="moved"), stored)
    assert (merged.seed, merged.patch, merged.epochs, merged.data, merged.loss) == (7, (16,), 9, "moved", "dice")
    with pytest.raises(TrainingError, match="expected seed 7, with which the run in o was started, got 8"):
        merge(TrainConfig(out="o", seed=8), stored)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"real data not at {DATA}: set SOFTDICE_DATA")
@pytest.mark.parametrize("name, ndim, channels", [("nuclei", 2, 3), ("hippocampus", 3, 1)])
def test_real_folders_are_read(name: str, ndim: int, channels: int, tmp_path: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
        for path in sorted((DATA / name / part).iterdir())[:6]:
            (tmp_path / part / path.name).symlink_to(path)
    cases = read_folder(tmp_path)
    assert (len(cases), cases.spatial_ndim, cases.channels) == (6, ndim, channels)
    assert cases.mapping is None
    for number in range(6):
        image = cases[number].image
        between = np.clip(image, *np.percentile(image, PERCENTILES))
        np.testing.assert_allclose([between.mean(), between.std()], [0, 1], atol=1e-3)
        assert cases[number].image.shape[1:] == cases[number].label.shape


def test_each_file_is_read_once_where_the_memory_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate("abc"):
        write_pair(tmp_path, name, np.arange(16.0).reshape(4, 4), np.eye(4, k=number, dtype=np.int64))
    read: list[str] = []
    for module in ("cases", "channels"):
        right = import_module(f"softdice.training.{module}").read_image
        counted = lambda path, right=right: read.append(f"{path.parent.name}/{path.name}") or right(path)  # noqa: E731
        monkeypatch.setattr(f"softdice.training.{module}.read_image", counted)
    files = [f"{part}/{name}.npy" for name in "abc" for part in ("images", "labels")]
    cases = read_folder(tmp_path)
    all_bytes = cases.keep_bytes + sum(a.nbytes + b.nbytes for a, b in cases.unscaled.values())
    for number in (2, 0, 1, 2, 1):
        assert cases[number].label.tolist() == np.eye(4, k=number).tolist()
    assert sorted(read) == sorted(files)
    assert not cases.unscaled
    assert cases.keep_bytes == all_bytes - 3 * 16 * (4 + 1)  # float32 and a class of one byte

    read.clear()
    monkeypatch.setattr("softdice.training.cases.memory_bytes", lambda: 2 * 16 * (4 + 8))  # one image and its label
    cases = read_folder(tmp_path)
    assert list(cases.unscaled) == [0]
    assert [cases[number].label.sum() for number in (1, 0, 1)] == [3, 4, 3]
    assert sorted(read) == sorted([*files, "images/b.npy", "labels/b.npy", "images/b.npy", "labels/b.npy"])
