"""One training step of nnU-Net with 118 classes and patches of 96^3: stock, with our loss, with the fused head.

    make test-pipelines                                   once: brings nnU-Net with all that it needs
    build/pipelines/bin/python -m benchmarks.pipelines    measures; writes results/pipelines.csv and docs/pipelines.md

The trainers are nnU-Net's own and those that `softdice info --nnunet` exports, made from plans as nnU-Net writes them
(a U-Net of six stages, 32 to 320 filters, deep supervision), each in a process of its own: network, loss, gradient and
optimizer step on random data, one step first, then the median of three, and the peak of the resident memory beyond what
stands before a step (weights, optimizer, data). The losses of the first step are compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, publish, summary

PAGE = publish.DOCS / "pipelines.md"
MARKS = "<!-- benchmark: pipelines -->", "<!-- end of benchmark: pipelines -->"
TRAINERS = {
    "nnUNetTrainer": "stock",
    "nnUNetTrainerSoftDice": "our loss",
    "nnUNetTrainerSoftDiceFusedHead": "fused head",
}
CLASSES, SIZE, STAGES, STEPS = 118, 96, 6, 3


def plans(size: int) -> dict[str, Any]:
    """Side of a patch -> what nnU-Net's planner would write."""
    resampling = {
        f"resampling_fn_{what}{suffix}": {"is_seg": what == "seg"} if suffix else "resample_data_or_seg_to_shape"
        for what in ("data", "seg", "probabilities")
        for suffix in ("", "_kwargs")
    }
    network = {
        "n_stages": STAGES,
        "features_per_stage": [min(320, 32 * 2**i) for i in range(STAGES)],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * STAGES,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (STAGES - 1),
        "n_conv_per_stage": [2] * STAGES,
        "n_conv_per_stage_decoder": [2] * (STAGES - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": "data",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [size] * 3,
        "median_image_size_in_voxels": [2.0 * size] * 3,
        "spacing": [1.0] * 3,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": network,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        **resampling,
    }
    return {
        "dataset_name": "Dataset001_Random",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0] * 3,
        "original_median_shape_after_transp": [2 * size] * 3,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "continue_training": False,
    }


def trainer_of(name: str, size: int) -> Any:
    """Name of a trainer -> it, ready for a step."""
    rooms = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer", "softdice.compat.nnunet_trainers.softdice_nnunet_trainers"
    stock, ours = map(import_module, rooms)
    labels = {"background": 0, **{f"organ {c}": c for c in range(1, CLASSES)}}
    dataset = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "numTraining": 1}
    made = plans(size)
    folder = Path(os.environ["nnUNet_preprocessed"], made["dataset_name"], "data")  # noqa: SIM112 - nnU-Net's spelling
    folder.mkdir(parents=True)
    (folder / "case.b2nd").touch()  # by its name nnU-Net knows the format
    torch.manual_seed(0)
    trainer = getattr(stock if hasattr(stock, name) else ours, name)(
        made, "3d_fullres", 0, dataset, torch.device("cpu")
    )
    trainer.initialize()
    trainer.network.train()
    return trainer


def step_of(name: str, size: int) -> dict[str, Any]:
    """Name of a trainer -> the loss of the first step, median time and peak memory of the next ones."""
    trainer = trainer_of(name, size)
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, CLASSES, (2, 1, *[max(1, size // 16)] * 3), generator=generator).float()
    sides = [size // 2**i for i in range(STAGES - 1)]
    batch = {
        "data": torch.randn(2, 1, *[size] * 3, generator=generator),
        "target": [torch.nn.functional.interpolate(coarse, (side,) * 3) for side in sides],
    }
    loss = float(trainer.train_step(batch)["loss"])
    trainer.optimizer.zero_grad(set_to_none=True)
    before, times = measure.reset_peak(), []
    for _ in range(STEPS):
        start = time.perf_counter()
        trainer.train_step(batch)
        times.append(time.perf_counter() - start)
    return {
        "loss": loss,
        "seconds": statistics.median(times),
        "grown_gib": (measure.resident(peak=True) - before) / 2**30,
    }


def apart(name: str, size: int) -> dict[str, Any]:
    """`step_of` in a process of its own."""
    with tempfile.TemporaryDirectory() as home:
        folders = {f"nnUNet_{part}": str(Path(home, part)) for part in ("raw", "preprocessed", "results")}
        paths = [str(publish.ROOT)]
        parts = import_module("tests.test_pipelines")  # whose environment this is
        if not parts.torchvision_works():
            Path(home, "torchvision.py").write_text(parts.STAND_IN)
            paths.append(home)
        environment = {**os.environ, **folders, "PYTHONPATH": os.pathsep.join(paths), "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.pipelines", "--step", name, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"trainer": name, **found}


def table(rows: list[dict[str, Any]], size: int) -> str:
    """rows -> Markdown."""
    lines = [
        f"`build/pipelines/bin/python -m benchmarks.pipelines` on {measure.machine()}: nnU-Net 2.8.1, "
        f"{CLASSES} classes, two patches of {size}³, float32; a whole training step.",
        "",
        "| trainer | | seconds a step | memory that a step adds | loss of the first step |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r['trainer']}` | {TRAINERS[r['trainer']]} | {r['seconds']:.1f} | {r['grown_gib']:.2f} GiB "
        f"| {r['loss']:.6f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["--step"]:
        measure.prepare_memory()
        print(json.dumps(step_of(sys.argv[2], int(sys.argv[3]))))
        return
    size = int(sys.argv[1]) if sys.argv[1:] else SIZE
    print(measure.machine())
    rows = []
    for name in TRAINERS:
        rows.append(apart(name, size))
        print(rows[-1], flush=True)
    if size == SIZE:
        publish.keep("pipelines", rows)
        publish.show(table(rows, size), PAGE, MARKS)
        summary.write()


if __name__ == "__main__":
    main()
