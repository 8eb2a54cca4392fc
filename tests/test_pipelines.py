"""nnU-Net's own commands on small data: both trainers find the same losses, and stock nnU-Net predicts with either.

And MONAI's trainer, and a decode head of MMSegmentation. `make test-pipelines` brings them with all that they need, in
an environment of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softdice

LACKING = [
    name
    for name in ("batchgeneratorsv2", "blosc2", "timm", "transformers", "ignite", "mmseg")
    if find_spec(name) is None
]

pytestmark = pytest.mark.skipif(
    bool(LACKING) and "SOFTDICE_REQUIRE_PIPELINES" not in os.environ,
    reason=f"no {', '.join(LACKING)}: make test-pipelines",
)

STOCK, OURS = "nnUNetTrainer", "nnUNetTrainerSoftDice"
LOG, FUSED = "nnUNetTrainerSoftDiceLogDice", "nnUNetTrainerSoftDiceFusedHead"
CASES, SHAPE, STEPS = 5, (20, 24, 22), 3

LABELS: dict[str, Any] = {"background": 0, "left": 1, "right": 2}
REGIONS: dict[str, Any] = {"background": 0, "whole": [1, 2], "right": 2}
DATA: dict[str, dict[str, Any]] = {
    "Dataset001_Labels": {"labels": LABELS},
    "Dataset002_Ignored": {"labels": {**LABELS, "ignore": 3}},
    "Dataset003_Regions": {"labels": REGIONS, "regions_class_order": [1, 2]},
}

TRAIN = f"""
import functools, json, os, random
import numpy, torch
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as Stock

def around(name, before=lambda self: None, after=lambda self, *given: None):
    method = getattr(Stock, name)
    @functools.wraps(method)
    def wrapped(self, *given, **keywords):
        before(self)
        result = method(self, *given, **keywords)
        after(self, *given)
        return result
    setattr(Stock, name, wrapped)

def short(self, *given):
    self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, {STEPS}, 2

def seed(self, *given):
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)

def write(name):
    def after(self, outputs):
        rows = [{{key: numpy.asarray(value).tolist() for key, value in row.items()}} for row in outputs]
        with open(os.path.join(self.output_folder, name), "w") as file:
            json.dump(rows, file)
    return after

if __name__ == "__main__":
    around("__init__", after=short)
    around("initialize", before=seed)
    around("on_train_start", after=seed)
    around("on_train_epoch_end", after=write("train.json"))
    around("on_validation_epoch_end", after=write("validation.json"))
    run_training_entry()
"""
"""nnU-Net's entry point, with few steps of one epoch, from the same seed; what the steps return is written down."""

STAND_IN = """
import sys, types

def anything(self, name):
    if name.startswith("__"):
        raise AttributeError(name)
    return sys.modules.get(f"{self.__name__}.{name}") or Class(name, (), {})

class Class(type):
    __getattr__ = anything

class Module(types.ModuleType):
    __path__ = []
    __getattr__ = anything

for part in ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms",
             ".transforms.functional", ".utils"):
    sys.modules[__name__ + part] = Module(__name__ + part)
"""
"""A torchvision that timm imports and does not use: torchvision has no build for some builds of torch."""


@cache
def torchvision_works() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


class Nnunet:
    """A folder with data, and nnU-Net's commands in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        paths = [str(Path(softdice.__file__).parent.parent)]
        if not torchvision_works():
            (home / "stand-in").mkdir()
            (home / "stand-in" / "torchvision.py").write_text(STAND_IN)
            paths.append(str(home / "stand-in"))
        folders = {f"nnUNet_{name}": str(home / name) for name in ("raw", "preprocessed", "results")}
        serial = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **folders, **serial}
        self.environment.pop("nnUNet_extTrainer", None)
        (home / "train.py").write_text(TRAIN)

    def run(self, *command: str, trainers: bool = False, **more: str) -> str:
        """Run a command of nnU-Net's, or a script; return what it prints. With `trainers` it finds ours, too."""
        if trainers:
            line = subprocess.run([tool("softdice"), "info", "--nnunet"], capture_output=True, text=True, check=True)
            name, value = line.stdout.removeprefix("export ").strip().split("=", 1)
            more[name] = value
        first = [sys.executable, command[0]] if command[0].endswith(".py") else [tool(command[0])]
        environment = {**self.environment, **more}
        done = subprocess.run([*first, *command[1:]], env=environment, cwd=self.home, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    @cache  # noqa: B019 - one object for all tests
    def trained(self, data: str, trainer: str) -> Path:
        """Return the folder of the first fold, after one epoch and the final validation."""
        words = (str(self.home / "train.py"), data, "3d_fullres", "0", "-tr", trainer, "-device", "cpu")
        self.run(*words, trainers=trainer != STOCK)
        return self.home / "results" / data / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"

    def steps(self, data: str, trainer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the losses of training, those of validation, and tp, fp, fn of validation."""
        training, validation = (
            json.loads((self.trained(data, trainer) / f"{name}.json").read_text()) for name in ("train", "validation")
        )
        losses = [np.array([row["loss"] for row in rows]) for rows in (training, validation)]
        counts = [[row[name] for name in ("tp_hard", "fp_hard", "fn_hard")] for row in validation]
        return losses[0], losses[1], np.array(counts)


def tool(name: str) -> str:
    """Return the path of a command of this environment."""
    return str(Path(sys.executable).parent / name)


def write_data(folder: Path, more: dict[str, Any]) -> None:
    """Write images of balls in two halves, in noise, in nnU-Net's layout."""
    import nibabel

    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for case in range(CASES):
        centre = np.array(SHAPE) / 2 + draw.uniform(-2, 2, 3)
        place = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
        inside = ((place - centre) ** 2).sum(-1) < 50
        labels = np.where(inside, 1 + (place[..., 0] > centre[0]), 0).astype(np.uint8)
        image = (labels * 2 + draw.normal(size=SHAPE)).astype(np.float32)
        if "ignore" in more["labels"]:
            labels[draw.random(SHAPE) < 0.3] = 3
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"ball_{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / "labelsTr" / f"ball_{case}.nii.gz")
    about = {"channel_names": {"0": "noise"}, "numTraining": CASES, "file_ending": ".nii.gz", **more}
    (folder / "dataset.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> Nnunet:
    """Return nnU-Net with its data planned and preprocessed, and with thin networks."""
    made = Nnunet(tmp_path_factory.mktemp("nnunet"))
    for name, more in DATA.items():
        write_data(made.home / "raw" / name, more)
    words = ("-c", "3d_fullres", "-np", "1", "-npfp", "1")
    made.run("nnUNetv2_plan_and_preprocess", "-d", *(name[7:10] for name in DATA), *words, nnUNet_n_proc_DA="1")
    for name in DATA:
        file = made.home / "preprocessed" / name / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        network = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [4 * 2**stage for stage in range(network["n_stages"])]
        assert network["n_stages"] > 2, "deep supervision wants more than one resolution"
        file.write_text(json.dumps(plans))
    return made


@pytest.mark.parametrize("trainer", [OURS, FUSED])
@pytest.mark.parametrize("data", DATA)
def test_every_step_has_the_stock_trainers_numbers(nnunet: Nnunet, data: str, trainer: str) -> None:
    expected, got = nnunet.steps(data, STOCK), nnunet.steps(data, trainer)
    assert len(expected[0]) == STEPS
    for losses, stock in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(losses, stock, rtol=1e-5, atol=1e-5)
    # an argmax between two classes that are nearly equal may fall to either side
    assert np.abs(got[2] - expected[2]).max() <= 2
    assert expected[2].sum() > 0


def test_log_dice_trains(nnunet: Nnunet) -> None:
    losses, *_ = nnunet.steps("Dataset002_Ignored", LOG)
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    stock, *_ = nnunet.steps("Dataset002_Ignored", STOCK)
    assert (losses > stock + 1).all()  # -ln D >= 1 - D, where stock has -D


def test_stock_nnunet_predicts_and_evaluates(nnunet: Nnunet) -> None:
    """With nothing exported: the checkpoints name nnU-Net's trainer, their weights are those of nnU-Net's network."""
    data, scores = "Dataset001_Labels", []
    raw = nnunet.home / "raw" / data
    for name in (STOCK, OURS, FUSED):
        own = json.loads((nnunet.trained(data, name) / "validation" / "summary.json").read_text())
        assert own["foreground_mean"]["n_ref"] > 0
        out = nnunet.home / f"predicted-{name}"
        words = ("-d", "1", "-c", "3d_fullres", "-f", "0", "-tr", name, "-device", "cpu", "-npp", "1", "-nps", "1")
        nnunet.run("nnUNetv2_predict", "-i", str(raw / "imagesTr"), "-o", str(out), *words, "--disable_tta")
        nnunet.run("nnUNetv2_evaluate_simple", str(raw / "labelsTr"), str(out), "-l", "1", "2", "-np", "1")
        scores.append(json.loads((out / "summary.json").read_text())["foreground_mean"]["Dice"])
    assert scores[1:] == pytest.approx([scores[0]] * 2, abs=0.01)


def test_checkpoints_name_a_trainer_that_nnunet_has(nnunet: Nnunet) -> None:
    import torch

    for data, trainer in (("Dataset001_Labels", OURS), ("Dataset001_Labels", FUSED), ("Dataset002_Ignored", LOG)):
        checkpoint = torch.load(nnunet.trained(data, trainer) / "checkpoint_final.pth", weights_only=False)
        assert checkpoint["trainer_name"] == STOCK


@pytest.mark.filterwarnings("ignore")  # MONAI's trainer asks for CUDA's autocast and scaler
@pytest.mark.parametrize("half", [False, True])
def test_monais_supervised_trainer(half: bool) -> None:
    """Images and labels are MetaTensors; `half`: the logits are of half precision, as under AMP."""
    import torch
    from monai.data import DataLoader, Dataset, MetaTensor
    from monai.engines import SupervisedTrainer
    from monai.losses import DiceCELoss
    from torch import Tensor, nn

    from softdice.compat import monai

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, image: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return self.layer(image)

    def losses(loss: nn.Module) -> list[float]:
        torch.manual_seed(0)
        images, labels = torch.randn(4, 1, 8, 8), torch.randint(0, 3, (4, 1, 8, 8)).float()
        pairs = zip(images, labels, strict=True)
        rows = [{"image": MetaTensor(image), "label": MetaTensor(label)} for image, label in pairs]
        network, found = Network(), []
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=2,
            train_data_loader=DataLoader(Dataset(rows), batch_size=2),
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), 0.5),
            loss_function=lambda x, y: found.append(loss(x, y)) or found[-1],
            amp=half,
        )
        trainer.run()
        return [value.item() for value in found]

    keywords: dict[str, Any] = {"to_onehot_y": True, "softmax": True}
    ours, theirs = losses(monai.DiceCELoss(**keywords)), losses(DiceCELoss(**keywords))
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, rel=2e-2 if half else 1e-5)  # theirs has a softmax of half precision


@pytest.fixture
def mmseg(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import MMSegmentation, with a stand-in for mmcv's compiled operators, which a plain head does not use."""
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    class Operators(ModuleType):
        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return None

    operators = Operators("mmcv._ext")
    operators.__spec__ = ModuleSpec("mmcv._ext", None)
    if find_spec("mmcv._ext") is None:
        monkeypatch.setitem(sys.modules, "mmcv._ext", operators)
    import mmseg.models  # noqa: F401 (registers the heads)
    from mmseg.registry import MODELS

    return MODELS


@pytest.mark.filterwarnings("ignore")  # of mmengine's and mmseg's age
def test_a_decode_head_of_mmsegmentation(mmseg: Any) -> None:
    import torch
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    import softdice.compat.mmseg  # noqa: F401 (registers the loss)

    def head(*losses: dict[str, Any], **more: Any) -> Any:
        torch.manual_seed(0)
        made = mmseg.build(
            {
                "type": "FCNHead", "in_channels": 6, "channels": 4, "num_classes": 5, "num_convs": 1, "in_index": 0,
                "concat_input": False, "dropout_ratio": 0, "norm_cfg": {"type": "BN"}, "loss_decode": [*losses], **more,
            }
        )  # fmt: skip
        torch.manual_seed(1)
        labels = torch.randint(0, 5, (2, 1, 24, 20))
        labels[0, :, :5] = more.get("ignore_index", 255)
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
        found = made.loss([torch.randn(2, 6, 12, 10)], samples, None)
        sum(value for name, value in found.items() if name.startswith("loss")).backward()
        return found, torch.cat([p.grad.flatten() for p in made.parameters()])

    entropy = {"type": "SoftdiceLoss", "losses": {"CrossEntropyLoss": {}}, "loss_weight": 2.0, "loss_name": "loss_ce"}
    theirs = {"type": "CrossEntropyLoss", "loss_weight": 2.0, "avg_non_ignore": True}
    sampled = {"sampler": {"type": "OHEMPixelSampler", "thresh": 0.3, "min_kept": 100}}
    for more in ({}, {"ignore_index": 3}):
        (ours, gradient), (stock, expected) = head(entropy, **more), head(theirs, **more)
        assert ours["loss_ce"].item() == pytest.approx(stock["loss_ce"].item(), rel=1e-5)
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()
    hard = head(entropy, **sampled)[0]["loss_ce"]
    assert hard > 1.01 * head(entropy)[0]["loss_ce"]  # the mean of the pixels that the sampler kept

    both = {"SoftDiceLoss": {"cost": "one_minus", "weight": 3.0}, "CrossEntropyLoss": {"weight": 0.5}}
    apart = [{"type": "SoftdiceLoss", "losses": {name: both[name]}, "loss_name": f"loss_{name}"} for name in both]
    together = head({"type": "SoftdiceLoss", "losses": both})[0]["loss_softdice"]
    found = head(*apart)[0]
    assert together.item() == pytest.approx(sum(found[f"loss_{name}"].item() for name in both), rel=1e-6)

    with pytest.raises(ValueError, match=r"SoftdiceLoss: expected a loss among losses to be one of .*'SoftDiceLoss'"):
        mmseg.build({"type": "SoftdiceLoss", "losses": {"DiceLoss": {}}})
    with pytest.raises(ValueError, match="expected losses by name"):
        mmseg.build({"type": "SoftdiceLoss", "losses": {}})
    with pytest.raises(TypeError, match="expected label to be a Tensor"):
        mmseg.build({"type": "SoftdiceLoss", "losses": both})(torch.zeros(1, 5, 2, 2), [0])
