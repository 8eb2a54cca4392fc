"""What a trained network leaves: scores of the held-out cases, curves, pictures and a summary."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import platform
from collections.abc import Mapping, Sequence
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
from softdice.training.checkpoint import load_checkpoint, save_checkpoint, write_bytes
from softdice.training.decision import Decision, cut, dice_by_threshold, dice_of, tuned
from softdice.training.evaluate import case_logits, count, mean_dice, tabulated
from softdice.training.module import Segmenter
from softdice.version import __version__

SHOWN = 3
"""How many of the worst and of the best cases are drawn."""


def write_results(out: Path, module: Segmenter, held_out: Sequence[int], fixed: dict[str, Any]) -> dict[str, Any]:
    """Write scores of the held-out cases, pictures and summary of a trained module; tell the model where to cut."""
    cases = module.cases
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = module.network.to(device).eval()
    sums: list[Tensor] = []
    of_case: list[float] = []
    drawn: dict[int, np.ndarray] = {}  # predictions of the worst and the best cases so far, by position
    by_threshold: list[np.ndarray] = []
    for position, which in enumerate(held_out):
        logits, true = case_logits(network, cases[which], module.patch, device)
        labels = logits.argmax(0)
        sums.append(count(labels, true, cases))
        by_threshold.append(dice_by_threshold(logits, true, cases.ignore_index))
        drawn[position] = labels.to(torch.uint8).cpu().numpy()
        of_case.append(mean_dice(tabulated(cases, [which], sums[-1][None]).dice[0]))
        order = [int(n) for n in np.argsort(of_case, kind="stable") if not np.isnan(of_case[n])]
        drawn = {n: drawn[n] for n in {*order[:SHOWN], *order[-SHOWN:]}}
    table = tabulated(cases, held_out, torch.stack(sums))

    def all_at_once(thresholds: Sequence[float]) -> list[float]:
        pairs = (case_logits(network, cases[which], module.patch, device) for which in held_out)
        return [float(dice_of(count(cut(logits, thresholds), true, cases))) for logits, true in pairs]

    decision = tuned(np.stack(by_threshold), all_at_once)
    model = load_checkpoint(out / "model.ckpt")
    save_checkpoint(out / "model.ckpt", model | {"decision": asdict(decision)})
    module.reporter.line(f"Masks are cut by {decision.text(cases.class_names)}")
    number_shown = min(SHOWN, (len(order) + 1) // 2)
    worst, best = order[:number_shown], order[max(number_shown, len(order) - number_shown) :][::-1]

    def shown(position: int) -> pictures.Shown:
        case = cases[held_out[position]]
        counted = True if cases.ignored is None else case.label != IGNORED
        truth, prediction = (np.where(counted, labels, 0) for labels in (case.label, drawn[position]))
        image = case.image if cases.joint else case.image[:1]  # channels of other units are no colours
        return pictures.Shown(case.name, of_case[position], image, truth, prediction, cases.axes)

    if order:
        picture = pictures.overlays([shown(n) for n in worst], [shown(n) for n in best], cases.class_names)
        write_bytes(out / "overlays.png", picture)
    write_bytes(out / "metrics.csv", history_csv(module.history))
    write_bytes(out / "curves.png", pictures.curves(module.history, cases.class_names))
    summary = _summary(module, table, decision, fixed)
    write_bytes(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _summary(module: Segmenter, table: Table, decision: Decision, fixed: dict[str, Any]) -> dict[str, Any]:
    cases, dice = module.cases, mean(table.dice)
    pooled = score(formulas.dice, table.counts.sum(0))
    untrained, on_gpu = cases.untrained(module.training_numbers), torch.cuda.is_available()
    return {
        "mean_dice": number(mean_dice(dice)),
        "mean_dice_95": number(intervals(table.dice[:, 1:])[1]),
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
        "patch": list(module.patch),
        "batch_size": module.batch_size,
        "plan": fixed["data"]["plan"] or None,
        "augmentation": fixed["data"]["augmentation"],
        "network": {"name": "monai DynUNet", **fixed["network"]},
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "epochs_done": module.epoch,
        "steps_done": module.step,
        "elapsed_s": round(module.history[-1]["elapsed_s"], 1) if module.history else 0.0,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "softdice": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "lightning", "monai", "numpy")},
        },
    }


def history_csv(history: Sequence[Mapping[str, float]]) -> bytes:
    """Return rows with equal keys as CSV with a header."""
    text = io.StringIO()
    if history:
        writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    return text.getvalue().encode()
