"""A run: from a configuration to a trained model, curves, pictures and a summary in a folder."""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch

from softdice.images.files import FileError
from softdice.losses import StatisticsLoss
from softdice.parallel.ranks import LostRankError, Ranks
from softdice.reproducibility import SystemConfig, setup_system
from softdice.training.brain import brain_cases
from softdice.training.cases import Cases, memory_bytes, read_folder, split
from softdice.training.checkpoint import load_checkpoint, made_folder, save_checkpoint, write_bytes
from softdice.training.config import (
    DEFAULT_EPOCHS,
    DEFAULTS,
    RUN_SETTINGS,
    Interrupted,
    TrainConfig,
    TrainingError,
    merge,
    no_memory,
    refusal,
)
from softdice.training.layout import check_out
from softdice.training.loss_names import parse_loss
from softdice.training.module import Budget, Reporter, Segmenter, Silent
from softdice.training.patches import AUGMENTATION, choose_mirror, mirrored_axes
from softdice.training.plan import NetworkPlan, check_memory, choose_batch, choose_network, choose_patch, fit_to_minutes
from softdice.training.results import history_csv, write_results
from softdice.training.together import LeftToTorchrun, SilencedError, alike, devices, is_first, lost, together

LEAST_STEPS = 24
"""Steps of an epoch where the cases are few, so that validation and checkpoints do not outweigh the training."""
VALIDATION_CASES = 8
VALIDATION_SHARE = 0.25
"""Most voxels that are predicted after an epoch, as a share of those trained on in it."""
READING = ("round", "ignore_geometry", "ignore", "nodata", "foreground")
"""Settings of `read_folder`."""
GRADIENT_NORM = 5.0
MOST_NAMED = 8
"""Images that a line names."""
WRITTEN = ("model.ckpt", "metrics.csv", "curves.png", "overlays.png", "summary.json")


def train(config: TrainConfig, reporter: Reporter | None = None, *, started: float | None = None) -> dict[str, Any]:
    """Train a network; write model.ckpt, metrics.csv, curves.png, overlays.png, summary.json; return the summary.

    A run that was killed goes on from its last complete epoch with `resume=True`. A run whose length is given in
    epochs then ends with the same bits as one that was never interrupted. Files of an earlier run in the folder are
    kept, with a number in their names.

    Args:
        config: what is asked for; what is None there follows from the data.
        reporter: told how far the run is.
        started: `time.monotonic()` from which the minutes of the budget count. None: now.

    Returns:
        What stands in summary.json; {} on all ranks but the first.

    Raises:
        TrainingError, FileError: something in the configuration, the data or on the disk that the user can put right.
        KeyboardInterrupt: stopped by hand; the checkpoint holds the last complete epoch.

    Edge cases: the classes' Dice is nan (null in summary.json) where no held-out case has or predicts the class.
    """
    budget = Budget(None, None, 1)  # the clock starts here
    budget.started = budget.started if started is None else started
    ranks = Ranks.here()
    reporter = reporter if reporter is not None and is_first(ranks) else Silent()
    saver = _Saver(Path(config.out))
    with ranks or nullcontext():
        try:
            with ExitStack() as stack:
                stack.callback(torch.set_num_threads, torch.get_num_threads())  # a plan may change it
                return _train(config, reporter, ranks, budget, stack, saver)
        except SilencedError:
            return {}
        except KeyboardInterrupt as stop:
            raise Interrupted(saver.epochs or 0) from stop
        except (RuntimeError, MemoryError, TrainingError, FileError) as problem:
            error = _one_line(problem, 0 if ranks is None else ranks.count)
            if not isinstance(error, TrainingError):
                raise
            error.saved_epochs = saver.epochs
            raise error from problem.__cause__ if error is problem else problem


def _one_line(problem: Exception, ranks: int) -> Exception:
    """Return the TrainingError for something that ended a run, or the problem itself where the user cannot mend it."""
    if isinstance(problem, FileError):
        return TrainingError(str(problem))
    if isinstance(problem, LostRankError):
        return lost(ranks, problem) or problem
    if isinstance(problem, TrainingError) or not no_memory(problem):
        return problem
    got = str(problem).splitlines()[0] if str(problem) else "too little"
    expected = "expected enough memory for a step"
    error = TrainingError(f"softdice train: {expected}, got: {got}. Lower --batch-size or --patch.")
    error.other_settings = True
    return error


def _train(
    config: TrainConfig, reporter: Reporter, ranks: Ranks | None, budget: Budget, stack: ExitStack, saver: _Saver
) -> dict[str, Any]:
    """Do one rank's part of a run; `ranks` is None where torchrun has no part in it."""
    out = Path(config.out)
    first = is_first(ranks)

    def open_folder() -> dict[str, Any] | None:
        if not first:
            return None if ranks is not None else _stored(config)
        stack.enter_context(made_folder(out, "softdice train", "--out"))
        _remove_halves(out)
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
    elif first:
        _keep_earlier(out, reporter)
    saver.fixed, saver.epochs = fixed, module.epoch
    _tell(reporter, module, held_out, settings, fixed["data"])
    unfinished = module.step == 0 or (  # a run whose time is over before it starts makes a step, and leaves a model
        budget.fraction(module.step) < 1 and (epochs is None or module.epoch < epochs)
    )
    if unfinished if ranks is None else ranks.from_first(unfinished):  # clocks differ
        _fit(module, saver, epochs, settings, ranks)
    if not first:
        return {}
    reporter.line(f"Scoring {len(held_out)} held-out cases.")
    return write_results(out, module, held_out, fixed)


def _stored(config: TrainConfig) -> dict[str, Any] | None:
    """Return the checkpoint to resume from."""
    path = Path(config.out) / "model.ckpt"
    return load_checkpoint(path, resume=True) if config.resume and path.exists() else None


def _prepare(
    config: TrainConfig, stored: dict[str, Any] | None, reporter: Reporter, ranks: Ranks | None, budget: Budget
) -> tuple[Segmenter, list[int], dict[str, Any]]:
    """Return module, held-out cases, and what stays of a checkpoint: all that can go wrong before the first step."""
    config = replace(config, devices=devices(config, ranks, stored))
    config = config if stored is None else merge(config, stored["settings"])
    settings = {name: getattr(config, name) for name in RUN_SETTINGS}
    settings = {name: DEFAULTS.get(name) if value is None else value for name, value in settings.items()}
    accelerator = torch.cuda.is_available()
    per_node = settings["devices"] if ranks is None else ranks.per_node
    if accelerator and per_node > torch.cuda.device_count():
        expected = f"at most {torch.cuda.device_count()} processes on a machine with as many GPUs"
        raise refusal(expected, per_node, "Start fewer.")
    setup_system(SystemConfig(seed=settings["seed"], deterministic_algorithms=True))
    loss = parse_loss(settings["loss"], 2)  # a wrong name is told before the data are read
    if settings["fused_head"] and not isinstance(loss, StatisticsLoss):
        expected = "a loss that is a function of sums over the voxels with --fused-head"
        raise refusal(expected, settings["loss"][:40], "Leave out --fused-head, or change --loss.")

    if config.data is None:
        cases = brain_cases(settings["val_fraction"])
    else:
        check_out(Path(config.out), Path(config.data))
        cases = read_folder(config.data, **{name: settings[name] for name in READING})
        settings["ignore"] = cases.ignored  # nnU-Net's dataset.json may name it
    training, held_out = split(cases, settings["val_fraction"], settings["seed"])
    mirror, why_not = (settings["mirror"], "") if settings["mirror"] else choose_mirror(cases, training)
    settings["mirror"] = mirror
    augmentation = f"{_mirroring(cases, mirror, why_not)}, {AUGMENTATION}"
    count = settings["devices"]
    budget.epochs = config.epochs or (None if config.max_minutes or config.max_steps else DEFAULT_EPOCHS)
    budget.seconds = None if config.max_minutes is None else config.max_minutes * 60
    budget.steps = config.max_steps

    def network(patch: tuple[int, ...], first: int | None) -> NetworkPlan:
        if stored is not None:
            return NetworkPlan(**stored["network"])
        return choose_network(patch, cases.channels, len(cases.values), accelerator, first)

    def make(patch: tuple[int, ...], batch_size: int, first: int | None) -> Segmenter:
        plan = network(patch, first)
        memory = torch.cuda.get_device_properties(0).total_memory if accelerator else memory_bytes()
        check_memory(patch, batch_size, plan, memory)
        loss = parse_loss(settings["loss"], len(cases.values), "world" if count > 1 else None, cases.ignore_index)
        budget.steps_per_epoch = max(LEAST_STEPS, math.ceil(len(training) / (batch_size * count)))
        return Segmenter(
            plan.build(), loss, cases, training,
            _validation_cases(cases, held_out, budget.steps_per_epoch * batch_size * math.prod(patch)),
            patch=patch, batch_size=batch_size, lr=settings["lr"], seed=settings["seed"], budget=budget,
            reporter=reporter, fused_head=settings["fused_head"], held_out=held_out, mirror=mirror,
        )  # fmt: skip

    first, why = None, ""
    if stored is not None:
        patch, batch_size = tuple(stored["data"]["patch"]), stored["data"]["batch_size"]
        why = stored["data"].get("plan", "")
    else:
        patch = choose_patch([cases.shapes[number] for number in training], settings["patch"], accelerator)
        batch_size = choose_batch(patch, settings["batch_size"], accelerator)
        if budget.seconds is not None and ranks is None and count == 1:
            end_voxels = sum(math.prod(cases.shapes[number]) for number in held_out)
            patch, batch_size, first, why = fit_to_minutes(
                make, patch, batch_size, settings, budget, end_voxels, reporter.line
            )
    data = _describe(cases, training, held_out, patch, batch_size) | {"plan": why, "augmentation": augmentation}
    if stored is not None:
        data["augmentation"] = stored["data"].get("augmentation", augmentation)
        _check_same_data(stored["data"], data, cases.spatial_ndim, config.out)
    module = make(patch, batch_size, first)
    kept = {"patch": list(patch), "batch_size": batch_size}
    kept |= {name: getattr(config, name) for name in ("epochs", "max_minutes", "max_steps")}
    return module, held_out, {"network": asdict(network(patch, first)), "data": data, "settings": {**settings, **kept}}


class _Saver(pl.Callback):
    """Writes model.ckpt and metrics.csv after every epoch; `epochs` are in the file, None before a run starts."""

    def __init__(self, out: Path) -> None:
        self.out, self.epochs = out, cast("int | None", None)
        self.fixed: dict[str, Any] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and isinstance(pl_module, Segmenter):
            save_checkpoint(self.out / "model.ckpt", {**self.fixed, **pl_module.state()})
            self.epochs = pl_module.epoch
            write_bytes(self.out / "metrics.csv", history_csv(pl_module.history))


def _fit(module: Segmenter, saver: _Saver, epochs: int | None, settings: dict[str, Any], ranks: Ranks | None) -> None:
    """Run Lightning's Trainer over what is left of the run; Ctrl-C comes out as KeyboardInterrupt."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.filterwarnings("ignore", ".*does not have many workers", UserWarning)  # on purpose, see module.py
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # lightning 2.6 asks torch 2.13 the old way
        warnings.filterwarnings("ignore", ".*number of training batches", UserWarning)  # about logging, which is ours
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        callbacks: list[pl.Callback] = [saver] if ranks is None else [saver, LeftToTorchrun()]
        trainer = pl.Trainer(
            accelerator="auto", devices=settings["devices"] if ranks is None else ranks.per_node,
            num_nodes=1 if ranks is None else ranks.count // ranks.per_node, precision=settings["precision"],
            reload_dataloaders_every_n_epochs=1,  # the next epoch may have fewer steps
            max_epochs=-1 if epochs is None else epochs - module.epoch, min_epochs=0, num_sanity_val_steps=0,
            gradient_clip_val=GRADIENT_NORM, use_distributed_sampler=False, default_root_dir=scratch, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        )  # fmt: skip
        try:
            trainer.fit(module)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stop
        except RuntimeError as problem:
            if (error := lost(settings["devices"], problem)) is not None:
                raise error from problem
            raise


def _remove_halves(out: Path) -> None:
    """Remove what a run that was killed was writing beside its place."""
    for name in WRITTEN:
        for half in out.glob(f".{name}.*"):
            half.unlink()


def _keep_earlier(out: Path, reporter: Reporter) -> None:
    """Give a number, the next above all that are there, to whatever lies where a new run will write."""
    earlier = [out / name for name in WRITTEN if os.path.lexists(out / name)]
    if not earlier:
        return
    stems = "|".join(Path(name).stem for name in WRITTEN)
    matches = (re.fullmatch(rf"(?:{stems})\.(\d+)\.\w+", path.name) for path in out.iterdir())
    number = max((int(match[1]) for match in matches if match), default=0) + 1
    kept = [path.with_name(f"{path.stem}.{number}{path.suffix}") for path in earlier]
    for path, place in zip(earlier, kept, strict=True):
        os.replace(path, place)
    reporter.line(f"Kept of an earlier run in {out}: {', '.join(place.name for place in kept)}")


def _describe(
    cases: Cases, training: Sequence[int], held_out: Sequence[int], patch: Sequence[int], batch_size: int
) -> dict[str, Any]:
    """Return what a model needs to know of its data, and a resumed run compares."""
    said = ("values", "class_names", "spatial_ndim", "channels", "joint", "by_channel")
    return {
        **{name: getattr(cases, name) for name in said},
        "orientation": cases.axes,
        "patch": list(patch),
        "batch_size": batch_size,
        "training": [cases.names[number] for number in training],
        "held_out": [cases.names[number] for number in held_out],
    }


def _check_same_data(before: dict[str, Any], now: dict[str, Any], spatial_ndim: int, out: str) -> None:
    """Raise TrainingError unless a run is resumed with the data that it was started with."""
    if "orientation" not in before and spatial_ndim == 3:
        got = f"one in {out} of an earlier softdice, which took them as they were stored"
        raise refusal("a run that says how its volumes lie", got, "Start a new one with another --out.")
    lacking = {"plan": "", "joint": True, "by_channel": False}  # in checkpoints of earlier releases
    lacking |= {name: now[name] for name in ("orientation", "augmentation")}
    if {**lacking, **before} != now:
        expected = f"the data with which the run in {out} was started"
        advice = "Take another --out, or leave --resume out."
        raise refusal(expected, "other names, labels or channels", advice)


def _validation_cases(cases: Cases, held_out: Sequence[int], epoch_voxels: int) -> list[int]:
    """Return a few held-out cases, evenly spread, that take a small part of an epoch's time; at least one."""
    step = max(1, len(held_out) // VALIDATION_CASES)
    chosen: list[int] = []
    voxels = 0
    for number in held_out[step // 2 :: step][:VALIDATION_CASES]:
        voxels += math.prod(cases.shapes[number])
        if chosen and voxels > VALIDATION_SHARE * epoch_voxels:
            break
        chosen.append(number)
    return chosen


def _mirroring(cases: Cases, mirror: str, why_not: str) -> str:
    """Say along which axes patches are mirrored, or why along none."""
    mirrored_axes(cases, mirror)  # that there are such axes
    if mirror == "none":
        return "not mirrored" + (f" ({why_not}; --mirror decides)" if why_not else "")
    return f"mirrored along {', '.join(mirror)}" + " (left-right)" * (mirror == "x")


def _tell(
    reporter: Reporter, module: Segmenter, held_out: Sequence[int], settings: dict[str, Any], data: dict[str, Any]
) -> None:
    """Say what is about to be trained on what."""
    cases, budget = module.cases, module.budget
    what = "the ICBM152 brain of nilearn, axial slices" if settings["data"] is None else settings["data"]
    reporter.line(
        f"Data: {what}: {len(module.training_numbers)} for training, {len(held_out)} held out, {cases.spatial_ndim}-D, "
        f"{cases.channels} channel{'s' if cases.channels > 1 else ''}, {len(cases.values)} classes"
    )
    for line in cases.left_out:
        reporter.line(line)
    if cases.mapping is not None:
        shown = [f"{value} -> {number}" for value, number in cases.mapping.items()]
        reporter.line(f"Labels mapped: {', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}")
    for number in cases.untrained(module.training_numbers):
        reporter.line(
            f"No training image has a voxel of {cases.class_names[number]}: it cannot be learnt, and scores 0."
        )
    if cases.empty:
        named = [f"{name} ({problem})" for name, problem in cases.empty.items()]
        more = ", ..." if len(named) > MOST_NAMED else ""
        reporter.line(f"Images from which nothing can be learnt: {', '.join(named[:MOST_NAMED])}{more}")
    for value in sorted({value for value, _ in cases.lonely.values()}):
        shares = {name: share for name, (other, share) in cases.lonely.items() if other == value}
        reporter.line(
            f"The value {value:g} holds up to {max(shares.values()):.0%} of the voxels of {len(shares)} "
            f"image{'s' * (len(shares) > 1)} ({', '.join([*shares][:3])}{', ...' if len(shares) > 3 else ''}) and lies "
            f"far from all others. If it stands for missing data, start again with --nodata {value:g}."
        )
    length = [f"{budget.epochs} epochs"] if budget.epochs is not None else []
    length += [f"{budget.seconds / 60:g} minutes"] if budget.seconds is not None else []
    length += [f"{budget.steps} steps"] if budget.steps is not None else []
    reporter.line(
        f"Run: loss {settings['loss']}, patch {'x'.join(map(str, module.patch))}, batch {module.batch_size}"
        f"{'' if settings['devices'] == 1 else ' on each of ' + str(settings['devices']) + ' devices'}, "
        f"{budget.epoch_steps()} steps an epoch, at most {' or '.join(length)}, seed {settings['seed']}"
    )
    if data["plan"]:
        reporter.line(f"Plan: {data['plan']}")
    reporter.line(f"Augmentation: patches are {data['augmentation']}")
    if module.epoch:
        reporter.line(f"Resumed after epoch {module.epoch}, {budget.elapsed_before_s:.0f} s into the run")
