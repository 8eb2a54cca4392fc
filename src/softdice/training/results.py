"""trained network -> scores of the held-out cases, curves, pictures and a summary in a folder."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softdice.training import pictures
from softdice.training.checkpoint import write_bytes
from softdice.training.evaluate import Scores, counts, label_image, mean_known, scores
from softdice.training.module import Segmenter
from softdice.version import __version__

SHOWN = 3
"""How many of the worst and of the best cases are drawn."""


def write_results(out: Path, module: Segmenter, held_out: Sequence[int], fixed: dict[str, Any]) -> dict[str, Any]:
    """Trained module -> scores of the held-out cases, pictures, summary."""
    cases = module.cases
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = module.network.to(device).eval()

    def predict(number: int) -> torch.Tensor:
        return label_image(network, torch.from_numpy(cases[number].image).to(device), module.patch).cpu()

    sums = torch.stack([counts(predict(n), torch.from_numpy(cases[n].label), len(cases.values)) for n in held_out])
    scored = scores([cases.names[number] for number in held_out], sums)
    of_case = np.array([mean_known(row[1:]) for row in scored.per_case])
    order = [int(n) for n in np.argsort(of_case, kind="stable") if not np.isnan(of_case[n])]
    count = min(SHOWN, (len(order) + 1) // 2)
    worst, best = order[:count], order[max(count, len(order) - count) :][::-1]

    def shown(position: int) -> pictures.Shown:
        number = held_out[position]
        case = cases[number]
        return pictures.Shown(case.name, of_case[position], case.image, case.label, predict(number).numpy())

    if order:
        picture = pictures.overlays([shown(n) for n in worst], [shown(n) for n in best], cases.class_names)
        write_bytes(out / "overlays.png", picture)
    write_bytes(out / "metrics.csv", history_csv(module.history))
    write_bytes(out / "curves.png", pictures.curves(module.history, cases.class_names))
    summary = _summary(module, scored, fixed)
    write_bytes(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _summary(module: Segmenter, scored: Scores, fixed: dict[str, Any]) -> dict[str, Any]:
    cases = module.cases
    return {
        "mean_dice": _number(scored.mean_dice),
        "mean_dice_is": "mean over held-out cases of each class's Dice (cases without the class left out), then over "
        "the classes but the first",
        "classes": [
            {
                "class": number,
                "label_value": value,
                "name": name,
                "dice": _number(scored.mean[number]),
                "dice_pooled": _number(scored.pooled[number]),
            }
            for number, (value, name) in enumerate(zip(cases.values, cases.class_names, strict=True))
        ],
        "held_out": {
            name: [_number(value) for value in row] for name, row in zip(scored.names, scored.per_case, strict=True)
        },
        "training_cases": len(module.training_numbers),
        "label_mapping": None if cases.mapping is None else {str(k): v for k, v in cases.mapping.items()},
        **fixed["settings"],
        "patch": list(module.patch),
        "batch_size": module.batch_size,
        "network": {"name": "monai DynUNet", **fixed["network"]},
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "epochs_done": module.epoch,
        "steps_done": module.step,
        "elapsed_s": round(module.history[-1]["elapsed_s"], 1) if module.history else 0.0,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "softdice": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "lightning", "monai", "numpy")},
        },
    }


def history_csv(history: Sequence[Mapping[str, float]]) -> bytes:
    """rows with equal keys -> CSV with a header."""
    text = io.StringIO()
    if history:
        writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    return text.getvalue().encode()


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else float(value)
