"""Write the results of a trained network: scores of the held-out cases, curves, pictures and a summary."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdice.evaluation.averages import intervals, mean
from softdice.evaluation.table import Table, score
from softdice.evaluation.text import number
from softdice.metrics import formulas
from softdice.training import pictures
from softdice.training.cases import IGNORED
from softdice.training.checkpoint import load_checkpoint, save_checkpoint, write_bytes, write_history
from softdice.training.decision import Decision, cut, dice_by_threshold, dice_of, tuned
from softdice.training.evaluate import case_logits, count, default_device, mean_dice, tabulated
from softdice.training.module import Segmenter
from softdice.version import __version__

SHOWN = 3
"""How many of the worst and of the best cases are drawn."""


def write_results(out: Path, module: Segmenter) -> dict[str, Any]:
    """Score the held-out cases, add thresholds to model.ckpt, and write metrics, pictures and summary beside it.

    Return the content of summary.json. Raise TrainingError if the disk refuses a file.

    Args:
        out: folder of the run, with its checkpoint. module: trained; its network is moved to `default_device`.
    """
    # 1. predict each held-out case: its counts, its Dice by threshold, and the class numbers of those to be drawn
    cases, held_out, device = module.cases, module.held_out, default_device()
    network = module.network.to(device).eval()
    counts: list[Tensor] = []
    case_dice: list[float] = []
    by_threshold: list[np.ndarray] = []
    drawn: dict[int, np.ndarray] = {}  # position in held_out -> prediction, of the worst and the best cases so far
    for position, which in enumerate(held_out):
        logits, true = case_logits(network, cases[which], module.patch, device)
        labels = logits.argmax(0)
        counts.append(count(labels, true, cases))
        by_threshold.append(dice_by_threshold(logits, true, cases.ignore_index))
        drawn[position] = labels.to(torch.uint8).cpu().numpy()
        case_dice.append(mean_dice(tabulated(cases, [which], counts[-1][None]).dice[0]))
        # positions of the cases that have a score, the worst first
        order = [int(n) for n in np.argsort(case_dice, kind="stable") if not np.isnan(case_dice[n])]
        drawn = {n: drawn[n] for n in {*order[:SHOWN], *order[-SHOWN:]}}
    table = tabulated(cases, held_out, torch.stack(counts))

    # 2. thresholds, which the checkpoint keeps
    def dice_of_cases(thresholds: Sequence[float]) -> list[float]:
        """Return the mean Dice of each held-out case, cut with these thresholds; their logits are predicted again."""
        pairs = (case_logits(network, cases[which], module.patch, device) for which in held_out)
        return [float(dice_of(count(cut(logits, thresholds), true, cases))) for logits, true in pairs]

    decision = tuned(np.stack(by_threshold), dice_of_cases)
    model = load_checkpoint(out / "model.ckpt")
    save_checkpoint(out / "model.ckpt", model | {"decision": asdict(decision)})
    module.reporter.line(f"Masks are cut by {decision.text(cases.class_names)}")

    # 3. pictures, curves and summary
    def shown(position: int) -> pictures.Shown:
        """Return a held-out case as it is drawn: voxels that are left out look like background."""
        case = cases[held_out[position]]
        counted = True if cases.ignored is None else case.label != IGNORED
        truth, prediction = (np.where(counted, labels, 0) for labels in (case.label, drawn[position]))
        image = case.image if cases.joint else case.image[:1]  # channels of other units are no colours
        return pictures.Shown(case.name, case_dice[position], image, truth, prediction, cases.axes)

    if order:
        number_shown = min(SHOWN, (len(order) + 1) // 2)
        worst, best = order[:number_shown], order[max(number_shown, len(order) - number_shown) :][::-1]
        picture = pictures.overlays([shown(n) for n in worst], [shown(n) for n in best], cases.class_names)
        write_bytes(out / "overlays.png", picture)
    write_history(out, module.history)
    write_bytes(out / "curves.png", pictures.curves(module.history, cases.class_names))
    summary = _summary(module, table, decision)
    write_bytes(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _summary(module: Segmenter, table: Table, decision: Decision) -> dict[str, Any]:
    """Return the content of summary.json, whose top level has the settings of the run, too.

    `table`: Dice (N, C) and counts (N, 3, C) of the N held-out cases, for the label maps of the argmax. `decision`: a
    threshold for each class, its gain in Dice over the argmax, and the standard error. `module.fixed`: what the
    checkpoint says of the run; "plan" there tells in words how the minutes decided the plan, "" if they did not.
    """
    cases, fixed, dice = module.cases, module.fixed, mean(table.dice)
    pooled = score(formulas.dice, table.counts.sum(0))
    untrained, on_gpu = cases.untrained(module.training_numbers), torch.cuda.is_available()
    return {
        "mean_dice": number(mean_dice(dice)),
        "mean_dice_95": number(intervals(table.dice[:, 1:])[1]),  # 95 % interval of the mean over classes
        "mean_dice_is": "mean over held-out cases of each class's Dice (cases without the class left out), then over "
        "the classes but the first; of the argmax",
        "classes": [
            {"class": k, "label_value": cases.values[k], "name": name}
            | {"dice": number(dice[k]), "dice_pooled": number(pooled[k]), "trained": k not in untrained}
            | {"threshold": decision.thresholds[k]}
            | {"threshold_gain": decision.gains[k], "threshold_gain_error": decision.errors[k]}
            for k, name in enumerate(cases.class_names)
        ],
        "held_out": dict(zip(table.cases, number(table.dice), strict=True)),
        "training_cases": len(module.training_numbers),
        "label_mapping": None if cases.mapping is None else {str(k): v for k, v in cases.mapping.items()},
        **fixed["settings"],
        "plan": fixed["data"]["plan"] or None,
        "augmentation": fixed["data"]["augmentation"],
        "network": {"name": "monai DynUNet", **fixed["network"]},
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "epochs_done": module.epoch,
        "steps_done": module.step,
        "elapsed_s": round(module.history[-1]["elapsed_s"], 1),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "softdice": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "lightning", "monai", "numpy")},
        },
    }
