"""The LightningModule: one step, one schedule, one validation. Everything that must survive a kill is in `state()`.

In shapes B is a patch of a batch, C a class, and *S are the spatial axes of an image. A rank is one process of several.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from softdice.head import FusedHead
from softdice.losses import Loss
from softdice.metrics import formulas
from softdice.training.cases import Cases
from softdice.training.config import TrainingError, refusal
from softdice.training.evaluate import case_logits, count, mean_dice
from softdice.training.patches import Patches, epoch_keys
from softdice.training.plan import FINISH_S
from softdice.training.together import SilencedError

WEIGHT_DECAY = 1e-4
NO_CASE = -1
"""In the place of a case where the ranks cannot share them evenly: every rank must take part in the sum."""
WARM_UP = 0.02
"""Share of the run in which the learning rate rises."""
ROUNDS = 12
"""Epochs that a budget of time holds at least; where a pass over the data takes longer, an epoch is a part of one."""


class Reporter(Protocol):
    """Where a run tells how far it is; the command line draws a progress bar with it."""

    def line(self, text: str) -> None:
        """Say one line to the user."""
        return

    def progress(self, fraction: float, epoch: int, loss: float, dice: float | None) -> None:
        """Tell the share of the run that is done, epoch under way, its mean loss so far, last validation Dice."""
        return


class Silent(Reporter):
    """A `Reporter` that says nothing."""


@dataclass
class Budget:
    """How long a run lasts: until the first limit of epochs, seconds and steps is reached; None stands for no limit.

    Args:
        steps_per_epoch: of a whole pass over the training cases.
        elapsed_before_s: wall time of the run before it was resumed.
        reserve_s: kept back from `seconds` for the last validation, the scores of the held-out cases and the pictures.
        step_s: seconds that a step takes, None as long as that is not known.
        started: `time.monotonic()` when the run, or its resumed part, began.
    """

    epochs: int | None
    seconds: float | None
    steps_per_epoch: int
    steps: int | None = None
    elapsed_before_s: float = 0.0
    reserve_s: float = 0.0
    step_s: float | None = None
    started: float = field(default_factory=time.monotonic)

    def elapsed_s(self) -> float:
        """Return the wall time of this run over all its resumptions."""
        return self.elapsed_before_s + time.monotonic() - self.started

    def fraction(self, step: int) -> float:
        """Return the share of the run that is done after `step` steps, in [0, 1]: the largest share of any limit."""
        shares = [] if self.seconds is None else [self.elapsed_s() / self._training_s(self.seconds)]
        shares += [] if self.epochs is None else [step / (self.epochs * self.steps_per_epoch)]
        shares += [] if self.steps is None else [step / self.steps]
        return min(1.0, max(shares, default=0.0))

    def epoch_steps(self) -> int:
        """Return the steps of the next epoch: a pass, or fewer so that `ROUNDS` epochs fit, if only time counts."""
        if self.seconds is None or self.epochs is not None or self.step_s is None:
            return self.steps_per_epoch
        return max(1, min(self.steps_per_epoch, int(self._training_s(self.seconds) / ROUNDS / self.step_s)))

    def _training_s(self, seconds: float) -> float:
        """Return the part of `seconds` that is for training: all but `reserve_s`, and at least half."""
        return max(seconds - self.reserve_s, seconds / 2)


def learning_rate(highest: float, fraction: float) -> float:
    """Return the learning rate at a share of the run in [0, 1]: a short linear rise, then half a cosine down to 0.

    Example:
        >>> learning_rate(1.0, 0.02), round(learning_rate(1.0, 1.0), 9)
        (1.0, 0.0)
    """
    if fraction < WARM_UP:
        return highest * max(0.05, fraction / WARM_UP)
    return highest * 0.5 * (1 + math.cos(math.pi * (fraction - WARM_UP) / (1 - WARM_UP)))


class Segmenter(pl.LightningModule):
    """Network, loss and data of one run.

    Args:
        network: MONAI's DynUNet, (B, channels, *patch) float32 -> logits (B, C, *patch).
        loss: takes logits, and class numbers (B, *patch).
        training, validation: numbers of the cases for the patches, and of those predicted after each epoch.
        patch: voxels along each axis. batch_size: patches per step and rank.
        lr: highest learning rate. seed: of patches and augmentation.
        budget: how long the run lasts; this module tells it what steps and predictions take.
        fused_head: compute the last convolution and the loss chunk by chunk.
        held_out: numbers of the cases that are scored at the end.
        mirror: axes along which patches are mirrored, such as "x" or "none"; None: those that suit the cases.

    Attributes:
        epoch, step: complete ones over all resumptions. history: a row for each epoch.
        fixed: what stays the same in all checkpoints, "network", "data" and "settings".
        last_dice: mean validation Dice of the last epoch, None before.
        head: the fused head, or None. stored_optimizer: state of the optimizer in the checkpoint that is resumed.
        training_numbers, validation_numbers: the arguments `training` and `validation`. patches: the training data.
        rate: learning rate of the last step.
        loss_sum, loss_count: sum and number of the losses in this epoch. since: `time.monotonic()` at the start of its
            steps, then of its validation.
        sums, voxels_done: counts (3, C) of its validation so far, and the voxels predicted.
        end_voxels: voxels to predict after the last step: validation and held-out cases.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        cases: Cases,
        training: Sequence[int],
        validation: Sequence[int],
        *,
        patch: Sequence[int],
        batch_size: int,
        lr: float,
        seed: int,
        budget: Budget,
        reporter: Reporter,
        fused_head: bool = False,
        held_out: Sequence[int] = (),
        mirror: str | None = None,
    ) -> None:
        """Keep the arguments, which the class describes, and start before the first epoch."""
        super().__init__()
        self.network, self.loss, self.cases = network, loss, cases
        self.training_numbers, self.validation_numbers = list(training), list(validation)
        self.patch, self.batch_size, self.lr, self.seed = tuple(patch), batch_size, lr, seed
        self.budget, self.reporter = budget, reporter
        self.patches = Patches(cases, training, patch, seed, mirror)
        self.held_out = list(held_out)
        self.end_voxels = sum(math.prod(cases.shapes[number]) for number in [*validation, *held_out])
        self.head = FusedHead(cast(Any, network).output_block.conv.conv, cast(Any, loss)) if fused_head else None
        self.epoch = self.step = 0
        self.history: list[dict[str, float]] = []
        self.fixed: dict[str, Any] = {}
        self.stored_optimizer: dict[str, Any] | None = None
        self.last_dice: float | None = None

    # --- what a checkpoint keeps

    def state(self) -> dict[str, Any]:
        """Return the content of a checkpoint, on the device of the network; Lightning has set up the optimizer."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        return {
            **self.fixed,
            "weights": self.network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "elapsed_s": self.budget.elapsed_s(),
            "reserve_s": self.budget.reserve_s,
            "history": self.history,
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Continue after the last complete epoch of a checkpoint, whose `content` was verified with `resume=True`."""
        self.network.load_state_dict(content["weights"])
        self.stored_optimizer = content["optimizer"]
        self.epoch, self.step, self.history = content["epoch"], content["step"], list(content["history"])
        self.budget.elapsed_before_s = content["elapsed_s"]
        self.budget.reserve_s = content.get("reserve_s", 0.0)
        self.budget.step_s = content["elapsed_s"] / max(1, self.step)
        self.last_dice = self.history[-1]["val_dice"] if self.history else None

    # --- what Lightning calls

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW, with the state of a resumed run; `on_train_batch_start` sets its rate, so no scheduler does."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=WEIGHT_DECAY)
        if self.stored_optimizer is not None:
            optimizer.load_state_dict(self.stored_optimizer)
        return optimizer

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of this rank's share of the epoch's patches, in batches of images and class numbers."""
        ranks = self.trainer.world_size
        steps = self.trainer.strategy.broadcast(self.budget.epoch_steps())  # as rank 0 has it: clocks differ
        keys: Any = epoch_keys(self.epoch, steps * self.batch_size * ranks, self.trainer.global_rank, ranks)
        # On a CPU the network needs every core; beside a GPU the patches are made in processes of their own.
        workers = 0 if self.trainer.strategy.root_device.type == "cpu" else 4
        return DataLoader(self.patches, self.batch_size, sampler=keys, num_workers=workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return a loader of the numbers of this rank's share of the validation cases, padded with `NO_CASE`."""
        ranks = self.trainer.world_size
        padding = [NO_CASE] * (-len(self.validation_numbers) % ranks)
        numbers: Any = (self.validation_numbers + padding)[self.trainer.global_rank :: ranks]
        return DataLoader(numbers, batch_size=1)

    def on_train_epoch_start(self) -> None:
        """Empty the sums, and seed torch, so that a resumed epoch draws what it would have drawn."""
        torch.manual_seed(self.seed + self.epoch)
        self.loss_sum, self.loss_count = 0.0, 0
        self.since = time.monotonic()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate, the same on every rank."""
        self.rate = learning_rate(self.lr, self._fraction())
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        for group in optimizer.param_groups:
            group["lr"] = self.rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss, a scalar, of a batch: images (B, channels, *patch) float32, labels (B, *patch) uint8."""
        image, label = batch
        if self.head is not None:
            return self.head(self.head.features(self.network, image), label)
        return self.loss(self.network(image).float(), label)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step, report it, and end the epoch where the budget ends; raise TrainingError for a loss of nan."""
        self.step += 1
        loss = float(outputs["loss"])
        if not math.isfinite(loss):
            kind = TrainingError if self.trainer.is_global_zero else SilencedError  # rank 0 says it for all
            advice = f"Lower --lr (it was {self.lr:g}), or use --precision 32-true."
            error = kind(str(refusal("a finite loss", f"{loss} in epoch {self.epoch + 1}", advice)))
            error.other_settings = True  # a resumed run would fail again
            raise error
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        fraction = self._fraction()
        if fraction >= 1:
            self.trainer.should_stop = True  # ends the epoch here, with its validation and checkpoint
        self.reporter.progress(fraction, self.epoch + 1, self.loss_sum / self.loss_count, self.last_dice)

    def _fraction(self) -> float:
        """Return the share of the run that is done, as rank 0 has it: clocks differ, and ranks must stop together."""
        return float(self.trainer.strategy.broadcast(self.budget.fraction(self.step)))

    def on_validation_epoch_start(self) -> None:
        """Tell the budget what a step took, and empty the counts."""
        self.budget.step_s = (time.monotonic() - self.since) / max(1, self.loss_count)
        self.since, self.voxels_done = time.monotonic(), 0
        self.sums = torch.zeros(3, len(self.cases.values), dtype=torch.int64, device=self.device)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Predict a case and add its counts to `sums`.

        `batch` (1,) holds its number, or `NO_CASE` on a rank with fewer cases than the others.
        """
        if int(batch) == NO_CASE:
            return
        case = self.cases[int(batch)]
        self.voxels_done += case.label.size
        logits, true = case_logits(self.network, case, self.patch, self.device)
        self.sums += count(logits.argmax(0), true, self.cases)

    def on_validation_epoch_end(self) -> None:
        """Add a row to the history from the counts of all ranks, and tell the budget what the end will take."""
        dice = formulas.dice(self.trainer.strategy.reduce(self.sums, reduce_op="sum").cpu())
        self.last_dice = mean_dice(dice.numpy())
        voxel_s = (time.monotonic() - self.since) / max(1, self.voxels_done)
        self.budget.reserve_s = FINISH_S + voxel_s * self.end_voxels
        self.epoch += 1
        columns = [f"val_dice_{name}" for name in self.cases.class_names[1:]]
        self.history.append({
            "epoch": self.epoch, "step": self.step, "elapsed_s": round(self.budget.elapsed_s(), 3), "lr": self.rate,
            "loss": self.loss_sum / self.loss_count, "val_dice": self.last_dice,
            **dict(zip(columns, dice[1:].tolist(), strict=True)),
        })  # fmt: skip
        if self._fraction() >= 1:
            self.trainer.should_stop = True
