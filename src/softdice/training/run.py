"""A run: from a configuration to a trained model, curves, pictures and a summary in a folder."""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from softdice.images.files import FileError, composed
from softdice.losses import StatisticsLoss
from softdice.parallel.ranks import LostRankError, Ranks
from softdice.reproducibility import SystemConfig, setup_system
from softdice.training.brain import brain_cases
from softdice.training.cases import Cases, read_folder, split
from softdice.training.checkpoint import load_checkpoint, made_folder, save_checkpoint, write_history
from softdice.training.config import (
    DEFAULT_EPOCHS,
    Interrupted,
    TrainConfig,
    TrainingError,
    all_settings,
    listed,
    no_memory,
    refusal,
    size,
)
from softdice.training.layout import check_out
from softdice.training.loss_names import parse_loss
from softdice.training.module import Budget, Reporter, Segmenter, Silent
from softdice.training.patches import AUGMENTATION, choose_mirror, mirrored_axes
from softdice.training.plan import (
    NetworkPlan,
    StepPlan,
    check_memory,
    choose_batch,
    choose_network,
    choose_patch,
    fit_to_minutes,
)
from softdice.training.results import write_results
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
        config: the settings that the user asks for; the data decide those that are None.
        reporter: told how far the run is.
        started: `time.monotonic()` from which the minutes of the budget count. None: now.

    Returns:
        What stands in summary.json; {} on all ranks but the first.

    Raises:
        TrainingError, FileError: something in the configuration, the data or on the disk that the user can put right.
        KeyboardInterrupt: stopped by hand; the checkpoint holds the last complete epoch.

    Edge cases: the classes' Dice is nan (null in summary.json) where no held-out case has or predicts the class.
    """
    started = time.monotonic() if started is None else started
    ranks = Ranks.here()
    reporter = reporter if reporter is not None and is_first(ranks) else Silent()
    saver = _Saver(Path(config.out))
    with ranks or nullcontext():
        try:
            with ExitStack() as stack:
                stack.callback(torch.set_num_threads, torch.get_num_threads())  # a plan may change it
                return _train(config, reporter, ranks, started, stack, saver)
        except SilencedError:
            return {}
        except KeyboardInterrupt as stop:
            raise Interrupted(saver.epochs or 0) from stop
        except (RuntimeError, MemoryError, TrainingError, FileError) as problem:
            error = _user_error(problem, 0 if ranks is None else ranks.count)
            if not isinstance(error, TrainingError):
                raise
            error.saved_epochs = saver.epochs
            raise error from problem.__cause__ if error is problem else problem


def _user_error(problem: Exception, ranks: int) -> Exception:
    """Return the TrainingError to raise for `problem`, which ended a run; `problem` itself if the user cannot mend it.

    A file, too little memory or a lost process can be mended. `ranks`: processes that torchrun started, 0 without it.
    """
    if isinstance(problem, FileError):
        return TrainingError(str(problem))
    if isinstance(problem, LostRankError):
        return lost(ranks, problem) or problem
    if isinstance(problem, TrainingError) or not no_memory(problem):
        return problem
    got = str(problem).splitlines()[0] if str(problem) else "too little"
    expected = "expected enough memory for a step"
    error = TrainingError(f"softdice train: {expected}, got: {got}. Lower --batch-size or --patch.")
    error.other_settings = True  # a resumed run would fail again
    return error


def _train(
    config: TrainConfig, reporter: Reporter, ranks: Ranks | None, started: float, stack: ExitStack, saver: _Saver
) -> dict[str, Any]:
    """Do one rank's part of a run, and return its summary, {} on all ranks but the first.

    Args:
        ranks: None without torchrun. started: `time.monotonic()` from which the minutes count.
        stack: the caller closes it when the run ends; an empty folder of the run is removed then.
        saver: writes a checkpoint after each epoch, and counts the epochs.

    Raises:
        TrainingError, FileError: as `train`. SilencedError: on the other ranks, where the first raises the error.
    """
    out = Path(config.out)
    first = is_first(ranks)

    def open_folder() -> dict[str, Any] | None:
        """Make the folder on the first rank; return the content of the checkpoint to resume from, or None."""
        if first:
            stack.enter_context(made_folder(out, "softdice train", "--out"))
            stack.enter_context(_locked(out))
            for half in (half for name in WRITTEN for half in out.glob(f".{name}.*")):
                half.unlink()  # a temporary file of a run that was killed
        path = out / "model.ckpt"
        reads = first or ranks is None  # torchrun's other ranks, maybe without the folder, get it from the first
        return load_checkpoint(path, resume=True) if reads and config.resume and path.exists() else None

    # 1. the checkpoint on every rank, and an untrained module of the same data
    stored = together(ranks, open_folder)
    stored = stored if ranks is None else ranks.from_first(stored)
    if config.resume and stored is None:
        reporter.line(f"No {out / 'model.ckpt'} to resume from: starting anew.")
    module = together(ranks, lambda: _prepare(config, stored, reporter, ranks, started))
    budget = module.budget
    alike(ranks, module.fixed["data"])
    # 2. go on from the checkpoint, or make room for new files; train what is left, and score
    if stored is not None:
        module.restore(stored)
    elif first:
        _keep_earlier(out, reporter)
    saver.epochs = module.epoch
    for line in _announcement(module):
        reporter.line(line)
    unfinished = module.step == 0 or (  # a run whose time is over before it starts makes a step, and leaves a model
        budget.fraction(module.step) < 1 and (budget.epochs is None or module.epoch < budget.epochs)
    )
    unfinished = unfinished if ranks is None else ranks.from_first(unfinished)  # clocks differ
    if unfinished:
        _fit(module, saver, ranks)
    if not first:
        return {}
    reporter.line(f"Scoring {len(module.held_out)} held-out cases.")
    return write_results(out, module)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other runs out of the folder `out` where the system has locks; raise TrainingError if one is in it.

    Raise it, too, where the folder cannot be read.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise refusal(f"to read {out}", error.strerror, "Permit it, or choose another --out.") from error
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                expected, got = f"no other run in {out}", "one that has not ended, or is still ending"
                raise refusal(expected, got, "Wait for it, or choose another --out.") from None
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_UN)  # forked workers, which may live on, hold the descriptor, too
        os.close(folder)


class _Data(NamedTuple):
    """Cases, the numbers of those for training and of those held out, and the augmentation of patches in words."""

    cases: Cases
    training: list[int]
    held_out: list[int]
    augmentation: str


def _prepare(
    config: TrainConfig, stored: dict[str, Any] | None, reporter: Reporter, ranks: Ranks | None, started: float
) -> Segmenter:
    """Read settings and data, plan the run, and return its untrained module.

    The module's `fixed` has "network", "data" and "settings" for its checkpoints.

    Args:
        stored: content of the checkpoint to resume from, whose plan is kept. None: a new run.
        started: `time.monotonic()` from which the minutes count.

    Raises:
        TrainingError, FileError: settings, data or plan cannot be used, or differ from those of the checkpoint.
    """
    # 1. settings, data and the length of the run
    settings = _settings(config, stored, ranks)
    setup_system(SystemConfig(seed=settings["seed"], deterministic_algorithms=True))
    data = _read(Path(config.out), settings)
    cases, devices_used = data.cases, settings["devices"]
    # earlier releases cut intensities off, and their checkpoints do not say it
    cases.clipped = stored is not None and stored["data"].get("clipped", True)
    epochs, minutes, steps = settings["epochs"], settings["max_minutes"], settings["max_steps"]
    epochs = epochs or (None if minutes or steps else DEFAULT_EPOCHS)
    # steps_per_epoch is 1 until `make` knows the batch size
    budget = Budget(epochs, None if minutes is None else minutes * 60, 1, steps, started=started)
    accelerator = torch.cuda.is_available()

    def network(plan: StepPlan) -> NetworkPlan:
        """Return the network of the checkpoint, or one for the plan."""
        if stored is not None:
            return NetworkPlan(**stored["network"])
        return choose_network(plan.patch, cases.channels, len(cases.values), accelerator, plan.first_filters)

    def make(plan: StepPlan) -> Segmenter:
        """Return an untrained module for a plan, and set the steps of the budget's epochs."""
        check_memory(plan, network(plan))
        loss = parse_loss(
            settings["loss"], len(cases.values), "world" if devices_used > 1 else None, cases.ignore_index
        )
        budget.steps_per_epoch = max(LEAST_STEPS, math.ceil(len(data.training) / (plan.batch_size * devices_used)))
        epoch_voxels = budget.steps_per_epoch * plan.batch_size * math.prod(plan.patch)
        return Segmenter(
            network(plan).build(), loss, cases, data.training, _validation_cases(cases, data.held_out, epoch_voxels),
            patch=plan.patch, batch_size=plan.batch_size, lr=settings["lr"], seed=settings["seed"], budget=budget,
            reporter=reporter, fused_head=settings["fused_head"], held_out=data.held_out, mirror=settings["mirror"],
        )  # fmt: skip

    # 2. patch and batch size: of the checkpoint, or as suits data and machine, or the minutes
    if stored is not None:
        plan = StepPlan(tuple(stored["data"]["patch"]), stored["data"]["batch_size"])
        why = stored["data"].get("plan", "")
    else:
        patch = choose_patch([cases.shapes[number] for number in data.training], settings["patch"], accelerator)
        plan, why = StepPlan(patch, choose_batch(patch, settings["batch_size"], accelerator)), ""
        if budget.seconds is not None and ranks is None and devices_used == 1:
            end_voxels = sum(math.prod(cases.shapes[number]) for number in data.held_out)
            plan, why = fit_to_minutes(make, plan, settings, budget, end_voxels, reporter.line)
    # 3. the module, and what its checkpoints say of it
    description = _describe(data, plan, why)
    if stored is not None:
        description["augmentation"] = stored["data"].get("augmentation", data.augmentation)
        _check_same_data(stored["data"], description, cases.spatial_ndim, config.out)
    settings |= {"patch": list(plan.patch), "batch_size": plan.batch_size}
    module = make(plan)
    module.fixed = {"network": asdict(network(plan)), "data": description, "settings": settings}
    return module


def _settings(config: TrainConfig, stored: dict[str, Any] | None, ranks: Ranks | None) -> dict[str, Any]:
    """Return the settings of a run, {name in `TrainConfig`: value}, with defaults; check them before data are read.

    `stored`: content of the checkpoint to resume from, or None. Raise TrainingError if it has other settings, if there
    are too few GPUs, or if the loss does not exist or does not work with the fused head.
    """
    config = replace(config, devices=devices(config, ranks, stored))
    settings = all_settings(config, None if stored is None else stored["settings"])
    per_machine, gpus = settings["devices"] if ranks is None else ranks.per_node, torch.cuda.device_count()
    if torch.cuda.is_available() and per_machine > gpus:
        expected = f"at most {gpus} processes on a machine with as many GPUs"
        raise refusal(expected, per_machine, "Start fewer.")
    loss = parse_loss(settings["loss"], 2)  # a wrong name is told before the data, and their classes, are read
    if settings["fused_head"] and not isinstance(loss, StatisticsLoss):
        expected = "a loss that is a function of sums over the voxels with --fused-head"
        raise refusal(expected, settings["loss"][:40], "Leave out --fused-head, or change --loss.")
    return settings


def _read(out: Path, settings: dict[str, Any]) -> _Data:
    """Read and split the data, and fill in the settings that the data decide, "ignore" and "mirror".

    Raise TrainingError if `out`, the folder of the run, is a folder of the data or if "mirror" names an axis that is
    not there, and TrainingError or FileError if the data cannot be read or do not belong together.
    """
    if settings["data"] is None:
        asked = [name for name in READING if settings[name] is not None and settings[name] is not False]
        if asked:
            expected = f"a folder DATA with --{asked[0].replace('_', '-')}"
            raise refusal(expected, "none", "Give DATA: the brain without it takes no such option.")
        cases = brain_cases(settings["val_fraction"])
    else:
        check_out(out, Path(settings["data"]))
        cases = read_folder(settings["data"], **{name: settings[name] for name in READING})
        settings["ignore"] = cases.ignored  # nnU-Net's dataset.json may name it
    training, held_out = split(cases, settings["val_fraction"], settings["seed"])
    why_not = ""
    if not settings["mirror"]:
        settings["mirror"], why_not = choose_mirror(cases, training)
    mirrored_axes(cases, settings["mirror"])  # raises if there are no such axes
    mirroring = f"mirrored along {', '.join(settings['mirror'])}" + " (left-right)" * (settings["mirror"] == "x")
    if settings["mirror"] == "none":
        mirroring = "not mirrored" + (f" ({why_not}; --mirror decides)" if why_not else "")
    return _Data(cases, training, held_out, f"{mirroring}, {AUGMENTATION}")


class _Saver(pl.Callback):
    """Writes model.ckpt and metrics.csv into `out` after every epoch.

    `epochs` is the number of complete epochs in the checkpoint, None before the run starts.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.epochs: int | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write both files on rank 0; raise TrainingError if the disk refuses."""
        if trainer.is_global_zero and isinstance(pl_module, Segmenter):
            save_checkpoint(self.out / "model.ckpt", pl_module.state())
            self.epochs = pl_module.epoch
            write_history(self.out, pl_module.history)


def _fit(module: Segmenter, saver: _Saver, ranks: Ranks | None) -> None:
    """Run Lightning's Trainer over the rest of the run.

    Raises:
        KeyboardInterrupt: Ctrl-C. TrainingError: the loss is not finite, the disk refuses, or a process is gone.
    """
    epochs, settings = module.budget.epochs, module.fixed["settings"]
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


def _keep_earlier(out: Path, reporter: Reporter) -> None:
    """Rename the files of an earlier run in `out` to model.1.ckpt and so on, by the next free number; report it."""
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


def _describe(data: _Data, plan: StepPlan, why: str) -> dict[str, Any]:
    """Return "data" of a checkpoint: what predictions need, and a resumed run compares.

    `why` is the reason for the plan in words, "" if there is no reason to tell.
    """
    cases = data.cases
    names = ("values", "class_names", "spatial_ndim", "channels", "joint", "by_channel", "clipped")
    return {
        **{name: getattr(cases, name) for name in names},
        "orientation": cases.axes,
        "patch": list(plan.patch),
        "batch_size": plan.batch_size,
        "training": [cases.names[number] for number in data.training],
        "held_out": [cases.names[number] for number in data.held_out],
        "shapes": [list(shape) for shape in cases.shapes],
        "plan": why,
        "augmentation": data.augmentation,
    }


def _check_same_data(before: dict[str, Any], now: dict[str, Any], spatial_ndim: int, out: str) -> None:
    """Raise TrainingError unless a run in the folder `out` is resumed with the data that it was started with.

    `before` and `now` are "data" of its checkpoint, maybe of an earlier release, and of a new one: names, labels, ...
    """
    if "orientation" not in before and spatial_ndim == 3:
        got = f"one in {out} of an earlier softdice, which took them as they were stored"
        raise refusal("a run that says how its volumes lie", got, "Start a new one with another --out.")
    lacking = {"plan": "", "joint": True, "by_channel": False, "clipped": True}  # in checkpoints of earlier releases
    lacking |= {name: now[name] for name in ("orientation", "augmentation", "shapes")}
    parts = "training", "held_out"  # earlier releases kept accents as the file system writes them
    before = {**lacking, **before} | {part: [composed(name) for name in before[part]] for part in parts}
    if before != now:
        expected = f"the data with which the run in {out} was started"
        advice = "Take another --out, or leave --resume out."
        names, names_now = (sorted(data["training"] + data["held_out"]) for data in (before, now))
        moved = names == names_now and any(before[part] != now[part] for part in parts)
        got = "the same names, which now sort in another order, and so another split" if moved else ""
        raise refusal(expected, got or "other names, sizes, labels or channels", advice)


def _validation_cases(cases: Cases, held_out: Sequence[int], epoch_voxels: int) -> list[int]:
    """Return the numbers of the held-out cases for the validation after each epoch, evenly spread.

    They are 1 to `VALIDATION_CASES`; together they have at most `VALIDATION_SHARE` of `epoch_voxels`, or are one case.
    """
    step = max(1, len(held_out) // VALIDATION_CASES)
    chosen: list[int] = []
    voxels = 0
    for number in held_out[step // 2 :: step][:VALIDATION_CASES]:
        voxels += math.prod(cases.shapes[number])
        if chosen and voxels > VALIDATION_SHARE * epoch_voxels:
            break
        chosen.append(number)
    return chosen


def _announcement(module: Segmenter) -> Iterator[str]:
    """Yield lines for the user before the first step: data, doubts about them, length, plan and augmentation."""
    cases, budget, settings, data = module.cases, module.budget, module.fixed["settings"], module.fixed["data"]
    source = "the ICBM152 brain of nilearn, axial slices" if settings["data"] is None else settings["data"]
    yield (
        f"Data: {source}: {len(module.training_numbers)} for training, {len(module.held_out)} held out, "
        f"{cases.spatial_ndim}-D, {cases.channels} channel{'s' * (cases.channels > 1)}, {len(cases.values)} classes"
    )
    yield from _doubts(cases, module.training_numbers)
    length = [f"{budget.epochs} epochs"] if budget.epochs is not None else []
    length += [f"{budget.seconds / 60:g} minutes"] if budget.seconds is not None else []
    length += [f"{budget.steps} steps"] if budget.steps is not None else []
    yield (
        f"Run: loss {settings['loss']}, patch {size(module.patch)}, batch {module.batch_size}"
        f"{'' if settings['devices'] == 1 else ' on each of ' + str(settings['devices']) + ' devices'}, "
        f"{budget.epoch_steps()} steps an epoch, at most {' or '.join(length)}, seed {settings['seed']}"
    )
    if data["plan"]:
        yield f"Plan: {data['plan']}"
    yield f"Augmentation: patches are {data['augmentation']}"
    if module.epoch:
        yield f"Resumed after epoch {module.epoch}, {budget.elapsed_before_s:.0f} s into the run"


def _doubts(cases: Cases, training: Sequence[int]) -> Iterator[str]:
    """Yield lines about surprises in the data.

    They are: files left out, mapped labels, labels that may stand for no class, classes without a voxel in the cases
    with the numbers `training`, empty images, and values of images that may stand for missing data.
    """
    yield from cases.left_out
    if cases.mapping is not None:
        yield f"Labels mapped: {listed([f'{value} -> {number}' for value, number in cases.mapping.items()], 12)}"
    if cases.present and cases.ignored not in (None, *set().union(*cases.present)):
        yield f"No label file has the value {cases.ignored}, which is to be left out."
    often_void = {value for value in cases.values if value < 0 or (value == 255 and len(cases.values) > 2)}
    for label in sorted(cases.void | often_void):
        reason = ", which GDAL_NODATA names as missing data," * (label in cases.void)
        advice = f"If it stands for voxels of no class, start again with --ignore {label}."
        yield f"The label {label}{reason} is trained on. {advice}"
    if untrained := [cases.class_names[number] for number in cases.untrained(training)]:
        them = "it cannot be learnt, and scores 0." if len(untrained) == 1 else "they cannot be learnt, and score 0."
        yield f"No training image has a voxel of {listed(untrained, MOST_NAMED)}: {them}"
    if cases.empty:
        named = [f"{name} ({problem})" for name, problem in cases.empty.items()]
        yield f"Images from which nothing can be learnt: {listed(named, MOST_NAMED)}"
    for value in sorted({value for value, _ in cases.lonely.values()})[:MOST_NAMED]:
        shares = {name: share for name, (other, share) in cases.lonely.items() if other == value}
        yield (
            f"The value {value:g} holds up to {max(shares.values()):.0%} of the voxels of {len(shares)} "
            f"image{'s' * (len(shares) > 1)} ({listed([*shares], 3)}) and lies far from all others. If it stands for "
            f"missing data, start again with --nodata {value:.17g}."  # every digit, so that it is found
        )
