"""What learns most in equal time on a CPU, by loss and by recipe: `python -m benchmarks.training [--what recipes]`.

For every data set, variant, seed and budget: the network, patches, optimizer and learning rate of `softdice train`,
with 8 first filters, for so many seconds of one thread; then Dice on the held-out cases, predicted whole, whose time
does not count. A variant is another loss or, with `--what recipes`, another setting beside the loss. Seconds are those
of the processor, so that other programs on the machine take none of them. One seed means one split, one set of first
weights and one order of patches, whatever the variant. Reading and compiling are not counted.

    python -m benchmarks.training            # all losses that are not measured yet, in some 50 minutes of a core
    python -m benchmarks.training --data nuclei --variant ce neg_log --seed 0 --seconds 15
    python -m benchmarks.training --what recipes
    python -m benchmarks.training --show     # the table of what there is; nothing is measured

Each run ends with its row in results/training.csv; a run that has a row there, of this machine and budget, is not made
again (take the row out to repeat it), and several processes may measure side by side. When no row is missing for the
budgets asked for, the table goes between the marks in docs/training.md, and the picture of the losses beside it,
docs/training.png. The data are looked for in ../shared/data, or where SOFTDICE_DATA says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.transforms import Compose
from torch import Tensor, nn

import softdice
from benchmarks import measure, pictures, publish
from softdice.evaluation.averages import mean
from softdice.training.cases import Cases, read_folder
from softdice.training.config import DEFAULTS
from softdice.training.evaluate import case_logits, count, mean_dice, tabulated
from softdice.training.loss_names import parse_loss
from softdice.training.module import WEIGHT_DECAY, learning_rate
from softdice.training.patches import FOREGROUND_SHARE, Patches
from softdice.training.plan import MAX_LEVELS, NARROW, choose_batch, choose_network, choose_patch
from softdice.training.run import GRADIENT_NORM

Loss = Callable[[Tensor, Tensor], Tensor]

FOLDER = Path(os.environ.get("SOFTDICE_DATA", publish.ROOT.parent / "shared" / "data"))
PAGE, PLOT = publish.DOCS / "training.md", publish.DOCS / "training.png"
MARKS = {
    what: (f"<!-- benchmark: training {what} -->", f"<!-- end of benchmark: training {what} -->")
    for what in ("losses", "recipes")
}
SEEDS = (0, 1, 2)
SECONDS = {
    "losses": {"nuclei": (15, 60), "hippocampus": (60,), "chase_db1": (30,)},
    "recipes": {"nuclei": (60,), "hippocampus": (60,), "chase_db1": (60,)},
}
HELD_OUT = 0.2
KEY = ("data", "variant", "seed", "seconds", "machine")


class Data(NamedTuple):
    """Patch along each axis, None for what `softdice train` chooses; and what is never divided: name -> its subject."""

    patch: tuple[int, ...] | None
    subject: Callable[[str], str] = str


DATA = {
    "nuclei": Data((128, 128)),
    "hippocampus": Data(None),
    "chase_db1": Data((128, 128), lambda name: name[:-1]),  # two eyes of a child
}


class Recipe(NamedTuple):
    """What is set beside the loss; the defaults are the recipe that the others are compared with."""

    lr: float = 3e-3
    first_filters: int = NARROW[False]
    levels: int = MAX_LEVELS
    foreground: float = FOREGROUND_SHARE
    augmented: bool = True
    channels_last: bool | None = False
    """None: as the network is built."""
    batch: float = 1
    """Patches of a step, in those of `softdice train`."""


KEPT = Recipe(lr=DEFAULTS["lr"], channels_last=None)
"""That of `softdice train` where time is short."""


def monai(num_classes: int) -> Loss:
    """-> MONAI's Dice + cross-entropy, of labels (B, *S)."""
    from monai.losses import DiceCELoss

    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    return lambda logits, labels: loss(logits, labels[:, None])


def dice(cost: str) -> Callable[[int], Loss]:
    """Cost of a Dice coefficient -> the loss, as `softdice train` makes it."""
    return lambda num_classes: softdice.SoftDiceLoss(num_classes, activation="softmax", absent="skip", cost=cost)


def named(loss: str) -> Callable[[int], Loss]:
    """A loss by the name that `--loss` takes."""
    return lambda num_classes: parse_loss(loss, num_classes)


class Variant(NamedTuple):
    """How it is called in the table, the loss for so many classes, and the rest; `data`: where it differs at all."""

    title: str
    loss: Callable[[int], Loss]
    recipe: Recipe = KEPT
    data: tuple[str, ...] = tuple(DATA)


DEFAULT = DEFAULTS["loss"]
"""Is in both tables."""
LOSSES: dict[str, Variant] = {
    "neg_log": Variant("-ln Dice", dice("neg_log")),
    "one_minus": Variant("1 - Dice", dice("one_minus")),
    DEFAULT: Variant("-ln Dice + CE", named(DEFAULT)),
    "ce": Variant("CE", named("ce")),
    "focal_tversky": Variant("focal Tversky", named("focal_tversky")),
    "monai": Variant("MONAI DiceCELoss", monai),
}
PATCHED = ("chase_db1",)
"""Whose images are much larger than the patch."""
WHOLE = ("nuclei", "hippocampus")


def tried(title: str, data: tuple[str, ...] = WHOLE, **changed: Any) -> Variant:
    """What is changed of the first recipe -> the variant, under the loss that is the default."""
    return Variant(title, named(DEFAULT), Recipe(**changed), data)


RECIPES: dict[str, Variant] = {
    "start": tried("learning rate 0.003, 8 first filters, 5 levels", tuple(DATA)),
    "slow": tried("learning rate 0.001", lr=1e-3),
    "fast": tried("learning rate 0.01", lr=1e-2),
    "faster": tried("learning rate 0.03", lr=3e-2),
    "wide": tried("16 first filters", first_filters=16),
    "flat": tried("3 levels", levels=3),
    "plain": tried("no augmentation", augmented=False),
    "channels_last": tried("channels-last", channels_last=True),
    "half": tried("half the batch", batch=0.5),
    "anywhere": tried("patches anywhere", PATCHED, foreground=0.0),
    "foreground": tried("every patch on a class", PATCHED, foreground=1.0),
    DEFAULT: Variant("kept: learning rate 0.01, volumes channels-last", named(DEFAULT)),
}
VARIANTS = {"losses": LOSSES, "recipes": RECIPES}


def linked(name: str, folder: Path, most: int | None = None) -> Path:
    """Name of a data set -> the folder, filled with links to its images and labels as `softdice train` wants them."""
    source = FOLDER / name
    for part in ("images", "labels"):
        (folder / part).mkdir()
        ending = {"images": ".jpg", "labels": "_1stHO.png"}[part] if name == "chase_db1" else ""
        found = source.glob(f"*{ending}") if ending else (source / part).iterdir()
        for path in sorted(found)[:most]:  # of CHASE_DB1 the vessels that the first observer drew
            stem = path.name.removesuffix(ending) + path.suffix if ending else path.name
            (folder / part / stem).symlink_to(path.resolve())
    return folder


def read(name: str) -> Cases:
    """Name of a data set -> its cases, all in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        cases = read_folder(linked(name, Path(scratch)))
        cases.keep_bytes = 2**40
        for number in range(len(cases)):
            cases[number]
    return cases


def divided(
    names: Sequence[str], subject: Callable[[str], str], seed: int, share: float = HELD_OUT
) -> tuple[list[int], list[int]]:
    """Names of cases -> numbers for training and numbers held out: a share of the subjects, drawn by the seed."""
    subjects = sorted({subject(name) for name in names})
    drawn = np.random.default_rng([seed, 0]).permutation(len(subjects))[: max(1, round(share * len(subjects)))]
    held = {subjects[number] for number in drawn}
    inside = [subject(name) in held for name in names]
    return [n for n, held in enumerate(inside) if not held], [n for n, held in enumerate(inside) if held]


class Prepared(NamedTuple):
    """What a training consists of; `layout` is that of the images."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    patches: Patches
    layout: torch.memory_format


def prepared(cases: Cases, training: Sequence[int], recipe: Recipe, patch: tuple[int, ...], seed: int) -> Prepared:
    """Cases, recipe -> what is trained, and with what, before the first step."""
    softdice.setup_system(softdice.SystemConfig(seed=seed, deterministic_algorithms=True))
    plan = choose_network(patch, cases.channels, len(cases.values), False, recipe.first_filters)
    plan = replace(plan, strides=plan.strides[: recipe.levels], filters=plan.filters[: recipe.levels])
    last = torch.channels_last if plan.spatial_ndim == 2 else torch.channels_last_3d
    layout = {None: torch.preserve_format, False: torch.contiguous_format, True: last}[recipe.channels_last]
    network = plan.build().train().to(memory_format=layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=WEIGHT_DECAY)
    patches = Patches(cases, training, patch, seed)
    patches.foreground_share = recipe.foreground
    if not recipe.augmented:
        patches.augment = Compose([])
    return Prepared(network, optimizer, patches, layout)


def trained(
    cases: Cases,
    training: Sequence[int],
    variant: Variant,
    patch: tuple[int, ...],
    batch: int,
    seed: int,
    seconds: float,
) -> tuple[nn.Module, int]:
    """Cases, variant, budget -> the network, and how many steps it made in that time of the processor."""
    network, optimizer, patches, layout = prepared(cases, training, variant.recipe, patch, seed)
    loss = variant.loss(len(cases.values))
    logits = torch.zeros(batch, len(cases.values), *patch, requires_grad=True)
    loss(logits, torch.zeros(batch, *patch, dtype=torch.uint8)).backward()  # compiles
    steps, started = 0, time.process_time()
    while (spent := time.process_time() - started) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(variant.recipe.lr, spent / seconds)
        pairs = [patches[(0, steps * batch + number)] for number in range(batch)]
        image, label = (torch.stack(part) for part in zip(*pairs, strict=True))
        optimizer.zero_grad()
        loss(network(image.to(memory_format=layout)), label).backward()
        nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM)
        optimizer.step()
        steps += 1
    return network.eval(), steps


def run(name: str, cases: Cases, variant: str, seed: int, seconds: float) -> dict[str, Any]:
    """One training -> its row."""
    training, held_out = divided(cases.names, DATA[name].subject, seed)
    patch = choose_patch([cases.shapes[number] for number in training], DATA[name].patch, False)
    chosen = (LOSSES | RECIPES)[variant]
    batch = round(choose_batch(patch, None, False) * chosen.recipe.batch)
    network, steps = trained(cases, training, chosen, patch, batch, seed, seconds)
    pairs = (case_logits(network, cases[number], patch, torch.device("cpu")) for number in held_out)
    counts = [count(logits.argmax(0), true, cases) for logits, true in pairs]
    table = tabulated(cases, held_out, torch.stack(counts))
    return {
        "data": name,
        "variant": variant,
        "seed": seed,
        "seconds": seconds,
        "dice": mean_dice(mean(table.dice)),
        "steps": steps,
        "held_out": len(held_out),
        "training": len(training),
        "patch": "x".join(map(str, patch)),
        "batch": batch,
        "machine": measure.machine(),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """A row -> what makes it another measurement."""
    return tuple(row[name] for name in KEY)


def wanted(
    what: str,
    data: Sequence[str],
    variants: Sequence[str],
    seeds: Sequence[int],
    seconds: Mapping[str, Sequence[float]],
    machine: str,
) -> list[tuple[Any, ...]]:
    """A selection -> the keys of its rows, the short budgets first."""
    made = VARIANTS[what]
    return [
        (d, x, seed, s, machine)
        for d in data
        for s in sorted(seconds[d])
        for seed in seeds
        for x in variants
        if d in made[x].data
    ]


def spread(values: Sequence[float]) -> str:
    """Numbers of the seeds -> their mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def cell(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the seeds -> their Dice and mean steps."""
    return (
        f"{spread([r['dice'] for r in rows])}, {statistics.fmean(r['steps'] for r in rows):.0f} steps" if rows else ""
    )


def table(rows: Sequence[dict[str, Any]], what: str) -> str:
    """Rows of one machine -> Markdown: a row per variant, a column per data set and budget, the best of each bold."""
    columns = sorted(
        {(r["data"], r["seconds"]) for r in rows}, key=lambda column: ([*DATA].index(column[0]), column[1])
    )
    cells, best = {}, {}
    for column in columns:
        of = {x: [r for r in rows if (r["data"], r["seconds"], r["variant"]) == (*column, x)] for x in VARIANTS[what]}
        cells |= {(column, x): cell(found) for x, found in of.items()}
        best[column] = max(of, key=lambda x: statistics.fmean([r["dice"] for r in of[x]] or [-1.0]))
    seeds = len({row["seed"] for row in rows})
    option = "" if what == "losses" else f" --what {what}"
    lines = [
        f"`python -m benchmarks.training{option}` on {rows[0]['machine']}: Dice on held-out cases after so many "
        f"seconds of the processor, mean ± standard deviation of {seeds} seed{'s' * (seeds > 1)}, and steps done; of "
        "each column the highest mean is bold.",
        "",
        "| | " + " | ".join(f"{name}, {s:g} s" for name, s in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for x, variant in VARIANTS[what].items():
        shown = [f"**{cells[c, x]}**" if best[c] == x else cells[c, x] for c in columns]
        lines.append(f"| {variant.title} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Rows of one machine -> for each data set a point per seed, loss and budget, and a stroke for the mean."""
    from matplotlib.figure import Figure

    names = [name for name in DATA if any(row["data"] == name for row in rows)]
    seconds = sorted({row["seconds"] for row in rows})
    figure = Figure(figsize=(4 * len(names) + 1, 4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for place, s in enumerate(seconds):
            for line, x in enumerate(LOSSES):
                found = [r["dice"] for r in rows if (r["data"], r["seconds"], r["variant"]) == (name, s, x)]
                height = line + 0.3 * (place - (len(seconds) - 1) / 2)
                shade = pictures.colour(LOSSES[x].title)
                label = f"{s:g} s" if line == 0 else None
                axes.plot(
                    found, [height] * len(found), "os^dv"[place % 5], color=shade, markerfacecolor="none", label=label
                )
                if found:
                    axes.plot([statistics.fmean(found)], [height], "|", color=shade, markersize=16)
        axes.set_yticks(range(len(LOSSES)), [variant.title for variant in LOSSES.values()] if axes is panels[0] else [])
        axes.set(title=name, xlabel="Dice on held-out cases", ylim=(len(LOSSES) - 0.4, -0.6))
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(seconds))
    figure.savefig(file, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=VARIANTS, default="losses")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--variant", nargs="+", choices=LOSSES | RECIPES, help="default: all")
    parser.add_argument("--seed", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--seconds", nargs="+", type=float, help="of the processor, for training")
    parser.add_argument("--show", action="store_true", help="measure nothing, show what there is")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # the peers'
    machine = measure.machine()
    print(machine)
    seconds = {name: asked.seconds or SECONDS[asked.what][name] for name in DATA}
    variants = [x for x in VARIANTS[asked.what] if asked.variant is None or x in asked.variant]
    for name in asked.data if not asked.show else ():
        done = {key(row) for row in publish.kept("training")}
        missing = [k for k in wanted(asked.what, [name], variants, asked.seed, seconds, machine) if k not in done]
        cases = read(name) if missing else None
        for _, variant, seed, budget, _ in missing:
            assert cases is not None
            row = run(name, cases, variant, seed, budget)
            publish.add("training", row)
            print(
                f"{name:12} {budget:4g} s  seed {seed}  {row['dice']:.3f}  {row['steps']:5} steps  {variant}",
                flush=True,
            )
    shown = [
        row
        for row in publish.kept("training")
        if row["machine"] == machine
        and row["seconds"] in seconds[row["data"]]
        and row["variant"] in VARIANTS[asked.what]
    ]
    if not shown:
        print("Nothing is measured for these budgets on this machine.")
        return
    text = table(shown, asked.what)
    print(text)
    lacking = set(wanted(asked.what, list(DATA), list(VARIANTS[asked.what]), SEEDS, seconds, machine))
    lacking -= {key(row) for row in shown}
    if lacking:
        print(f"{PAGE.name} is left as it is: {len(lacking)} rows are missing.")
        return
    if asked.what == "losses":
        plot(shown, PLOT)
        text += f"\n\n![Held-out Dice by loss, data set and budget]({PLOT.name})"
    publish.show(text, PAGE, MARKS[asked.what])


if __name__ == "__main__":
    main()
