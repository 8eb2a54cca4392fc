"""configuration -> trained model, curves, pictures and summary in a folder."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from softdice.distributed import LostRankError, Ranks
from softdice.reproducibility import SystemConfig, setup_system
from softdice.training.brain import brain_cases
from softdice.training.cases import Cases, read_folder, split
from softdice.training.checkpoint import load_checkpoint, save_checkpoint, write_bytes
from softdice.training.config import DEFAULT_EPOCHS, DEFAULTS, RUN_SETTINGS, TrainConfig, TrainingError, merge
from softdice.training.loss_names import parse_loss
from softdice.training.module import Budget, Reporter, Segmenter, Silent
from softdice.training.plan import NetworkPlan, choose_batch, choose_network, choose_patch
from softdice.training.results import history_csv, write_results
from softdice.training.together import LeftToTorchrun, ToldByFirstError, alike, devices, is_first, lost, together

LEAST_STEPS = 24
"""Steps of an epoch where the cases are few, so that validation and checkpoints do not outweigh the training."""
VALIDATION_CASES = 8
VALIDATION_SHARE = 0.25
"""Most voxels that are predicted after an epoch, as a share of those trained on in it."""
GRADIENT_NORM = 5.0
WRITTEN = ("model.ckpt", "metrics.csv", "curves.png", "overlays.png", "summary.json")


def train(config: TrainConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """configuration -> summary; writes model.ckpt, metrics.csv, curves.png, overlays.png and summary.json.

    A run that was killed goes on from its last complete epoch with `resume=True`. A run whose length is given in
    epochs then ends with the same bits as one that was never interrupted.

    Returns:
        What stands in summary.json; {} on all ranks but the first.

    Raises:
        TrainingError, FileError: something in the configuration, the data or on the disk that the user can put right.
        KeyboardInterrupt: stopped by hand; the checkpoint holds the last complete epoch.

    Edge cases: the classes' Dice is nan (null in summary.json) where no held-out case has or predicts the class.
    """
    budget = Budget(None, None, 1)  # the clock starts here
    ranks = Ranks.here()
    with ranks or nullcontext():
        try:
            return _train(config, reporter if reporter is not None and is_first(ranks) else Silent(), ranks, budget)
        except ToldByFirstError:
            return {}
        except LostRankError as problem:
            raise lost(0 if ranks is None else ranks.count, problem) or problem from problem


def _train(config: TrainConfig, reporter: Reporter, ranks: Ranks | None, budget: Budget) -> dict[str, Any]:
    """One rank's part of it; `ranks` is None where torchrun has no part in it."""
    out = Path(config.out)
    first = is_first(ranks)

    def open_folder() -> dict[str, Any] | None:
        if not first:
            return None if ranks is not None else _stored(config)
        _make_folder(out)
        return _stored(config)

    stored = together(ranks, open_folder)
    stored = stored if ranks is None else ranks.from_first(stored)  # other machines may not have the folder
    if config.resume and stored is None:
        reporter.line(f"No {out / 'model.ckpt'} to resume from: starting anew.")
    module, held_out, fixed = together(ranks, lambda: _prepare(config, stored, reporter, ranks, budget))
    alike(ranks, (fixed["data"], module.cases.shapes))
    settings, epochs = fixed["settings"], budget.epochs
    if stored is not None:
        module.restore(stored)
    elif first and (out / "model.ckpt").exists():
        _keep_earlier(out / "model.ckpt", reporter)
    _tell(reporter, module, held_out, settings)
    unfinished = budget.fraction(module.step) < 1 and (epochs is None or module.epoch < epochs)
    if unfinished if ranks is None else ranks.from_first(unfinished):  # clocks differ
        _fit(module, _Saver(out, fixed), epochs, settings, ranks)
    if not first:
        return {}
    reporter.line(f"Scoring {len(held_out)} held-out cases.")
    return write_results(out, module, held_out, fixed)


def _stored(config: TrainConfig) -> dict[str, Any] | None:
    """The checkpoint to resume from."""
    path = Path(config.out) / "model.ckpt"
    return load_checkpoint(path) if config.resume and path.exists() else None


def _prepare(
    config: TrainConfig, stored: dict[str, Any] | None, reporter: Reporter, ranks: Ranks | None, budget: Budget
) -> tuple[Segmenter, list[int], dict[str, Any]]:
    """What can go wrong before the first step -> module, held-out cases, the part of a checkpoint that stays."""
    config = replace(config, devices=devices(config, ranks, stored))
    if stored is not None:
        config = merge(config, stored["settings"])
    settings = {name: getattr(config, name) for name in RUN_SETTINGS}
    settings = {name: DEFAULTS.get(name) if value is None else value for name, value in settings.items()}
    accelerator = torch.cuda.is_available()
    per_node = settings["devices"] if ranks is None else ranks.per_node
    if accelerator and per_node > torch.cuda.device_count():
        raise TrainingError(
            f"softdice train: expected at most {torch.cuda.device_count()} processes on a machine with as many GPUs, "
            f"got {per_node}. Start fewer."
        )
    setup_system(SystemConfig(seed=settings["seed"], deterministic_algorithms=True))
    parse_loss(settings["loss"], 2)  # a wrong name is told before the data are read

    if config.data is None:
        cases = brain_cases(settings["val_fraction"])
    else:
        cases = read_folder(config.data, round=settings["round"], ignore_geometry=settings["ignore_geometry"])
    training, held_out = split(cases, settings["val_fraction"], settings["seed"])
    shapes = [cases.shapes[number] for number in training]
    patch = choose_patch(shapes, settings["patch"], accelerator)
    batch_size = choose_batch(patch, settings["batch_size"], accelerator)
    plan = choose_network(patch, cases.channels, len(cases.values), accelerator)
    if stored is not None:
        patch, batch_size = tuple(stored["data"]["patch"]), stored["data"]["batch_size"]
        plan = NetworkPlan(**stored["network"])
    data = _describe(cases, training, held_out, patch, batch_size)
    if stored is not None and stored["data"] != data:
        raise TrainingError(
            f"softdice train: expected the data with which the run in {config.out} was started, got other names, "
            "labels or channels. Take another --out, or leave --resume out."
        )
    budget.epochs = config.epochs or (None if config.max_minutes or config.max_steps else DEFAULT_EPOCHS)
    budget.seconds = None if config.max_minutes is None else config.max_minutes * 60
    budget.steps = config.max_steps
    count = settings["devices"]
    budget.steps_per_epoch = max(LEAST_STEPS, math.ceil(len(training) / (batch_size * count)))
    module = Segmenter(
        plan.build(), parse_loss(settings["loss"], len(cases.values), "world" if count > 1 else None), cases, training,
        _validation_cases(cases, held_out, budget.steps_per_epoch * batch_size * math.prod(patch)),
        patch=patch, batch_size=batch_size, lr=settings["lr"], seed=settings["seed"], budget=budget, reporter=reporter,
        fused_head=settings["fused_head"],
    )  # fmt: skip
    kept = {"patch": list(patch), "batch_size": batch_size}
    kept |= {name: getattr(config, name) for name in ("epochs", "max_minutes", "max_steps")}
    return module, held_out, {"network": plan.plain(), "data": data, "settings": {**settings, **kept}}


class _Saver(pl.Callback):
    """Writes model.ckpt and metrics.csv after every epoch."""

    def __init__(self, out: Path, fixed: dict[str, Any]) -> None:
        self.out, self.fixed = out, fixed

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and isinstance(pl_module, Segmenter):
            save_checkpoint(self.out / "model.ckpt", {**self.fixed, **pl_module.state()})
            write_bytes(self.out / "metrics.csv", history_csv(pl_module.history))


def _fit(module: Segmenter, saver: _Saver, epochs: int | None, settings: dict[str, Any], ranks: Ranks | None) -> None:
    """Lightning's Trainer over what is left of the run; Ctrl-C comes out as KeyboardInterrupt."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.filterwarnings("ignore", ".*does not have many workers", UserWarning)  # on purpose, see module.py
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # lightning 2.6 asks torch 2.13 the old way
        warnings.filterwarnings("ignore", ".*number of training batches", UserWarning)  # about logging, which is ours
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        callbacks: list[pl.Callback] = [saver] if ranks is None else [saver, LeftToTorchrun()]
        trainer = pl.Trainer(
            accelerator="auto", devices=settings["devices"] if ranks is None else ranks.per_node,
            num_nodes=1 if ranks is None else ranks.count // ranks.per_node, precision=settings["precision"],
            max_epochs=-1 if epochs is None else epochs - module.epoch, min_epochs=0, num_sanity_val_steps=0,
            gradient_clip_val=GRADIENT_NORM, use_distributed_sampler=False, default_root_dir=scratch, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        )  # fmt: skip
        try:
            trainer.fit(module)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stop
        except RuntimeError as problem:
            if (told := lost(settings["devices"], problem)) is not None:
                raise told from problem
            raise


def _make_folder(out: Path) -> None:
    """Make the folder and see that a file can be written there, before an hour has been spent.

    What a run that was killed was writing beside its place is removed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in WRITTEN:
            for half in out.glob(f".{name}.*"):
                half.unlink()
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"softdice")
    except OSError as error:
        raise TrainingError(
            f"softdice train: expected to write to {out}, got: {error.strerror or error}. Choose another --out."
        ) from error


def _keep_earlier(path: Path, reporter: Reporter) -> None:
    """An earlier model in the folder is renamed, not lost."""
    earlier = path.with_name("model.previous.ckpt")
    os.replace(path, earlier)
    reporter.line(f"The model that was in {path.parent} is now {earlier.name}.")


def _describe(
    cases: Cases, training: Sequence[int], held_out: Sequence[int], patch: Sequence[int], batch_size: int
) -> dict[str, Any]:
    """What a model needs to know of its data, and a resumed run compares."""
    return {
        "values": cases.values,
        "class_names": cases.class_names,
        "spatial_ndim": cases.spatial_ndim,
        "channels": cases.channels,
        "patch": list(patch),
        "batch_size": batch_size,
        "training": [cases.names[number] for number in training],
        "held_out": [cases.names[number] for number in held_out],
    }


def _validation_cases(cases: Cases, held_out: Sequence[int], epoch_voxels: int) -> list[int]:
    """A few held-out cases, evenly spread, that take a small part of an epoch's time; at least one."""
    step = max(1, len(held_out) // VALIDATION_CASES)
    chosen: list[int] = []
    voxels = 0
    for number in held_out[step // 2 :: step][:VALIDATION_CASES]:
        voxels += math.prod(cases.shapes[number])
        if chosen and voxels > VALIDATION_SHARE * epoch_voxels:
            break
        chosen.append(number)
    return chosen


def _tell(reporter: Reporter, module: Segmenter, held_out: Sequence[int], settings: dict[str, Any]) -> None:
    """What is about to be trained on what, in three lines."""
    cases, budget = module.cases, module.budget
    what = "the ICBM152 brain of nilearn, axial slices" if settings["data"] is None else settings["data"]
    reporter.line(
        f"Data: {what}: {len(module.training_numbers)} for training, {len(held_out)} held out, {cases.spatial_ndim}-D, "
        f"{cases.channels} channel{'s' if cases.channels > 1 else ''}, {len(cases.values)} classes"
    )
    if cases.mapping is not None:
        shown = [f"{value} -> {number}" for value, number in cases.mapping.items()]
        reporter.line(f"Labels mapped: {', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}")
    length = [f"{budget.epochs} epochs"] if budget.epochs is not None else []
    length += [f"{budget.seconds / 60:g} minutes"] if budget.seconds is not None else []
    length += [f"{budget.steps} steps"] if budget.steps is not None else []
    reporter.line(
        f"Run: loss {settings['loss']}, patch {'x'.join(map(str, module.patch))}, batch {module.batch_size}"
        f"{'' if settings['devices'] == 1 else ' on each of ' + str(settings['devices']) + ' devices'}, "
        f"{budget.steps_per_epoch} steps an epoch, at most {' or '.join(length)}, seed {settings['seed']}"
    )
    if module.epoch:
        reporter.line(f"Resumed after epoch {module.epoch}, {budget.elapsed_before_s:.0f} s into the run")
