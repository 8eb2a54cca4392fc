"""README's two tables of "times faster", from the figures that other benchmarks keep: `python -m benchmarks.summary`.

Nothing is measured here. Each figure is a quotient of two that stand in results/ and, with their units, on the page
that a row links to.
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks import publish

README = publish.ROOT / "README.md"
STEP = "<!-- times: a step of the loss -->", "<!-- end of times: a step of the loss -->"
WORK = "<!-- times: whole tasks -->", "<!-- end of times: whole tasks -->"
PEERS = {
    "MONAI": "MONAI 1.6.1", "nnU-Net": "nnU-Net 2.8.1", "smp": "segmentation-models-pytorch 0.6.0",
    "exacta": "exacta 0.0.1a5", "kornia micro": "kornia 0.9.0 (computes less: no Dice for each class)",
    "seed's loop": "a loop over the classes in PyTorch",
}  # fmt: skip
"""Contender of `benchmarks.losses` -> what README calls it."""


def machine(page: str, begin: str) -> str:
    """Return the processor that the table of a page was measured on, as it stands in its first line."""
    text = (publish.ROOT / page).read_text().split(begin, 1)[1]
    found = re.search(r"` on ([^;:\n]+?(?:\+cpu))", text)
    if found is None:
        raise ValueError(f"summary: expected a processor in the first line after {begin!r} of {page}, got none.")
    return found[1]


def times(theirs: float, ours: float) -> str:
    """Return how many times faster we are, with two or three digits."""
    quotient = theirs / ours
    if quotient >= 1000:
        return f"{round(quotient, -2):.0f}"
    return f"{quotient:.0f}" if quotient >= 10 else f"{quotient:.1f}"


def step_table() -> str:
    """Return how many times faster than each peer a step of the loss is."""
    rows = publish.kept("losses")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))

    def fastest(shape: str, contender: str, *modes: str) -> float:
        return min(
            row["median_ms"]
            for row in rows
            if (row["shape"], row["contender"]) == (shape, contender) and row["mode"] in modes
        )

    def memory(contender: str) -> float:
        return max(row["backward_logits"] for row in rows if (row["contender"], row["mode"]) == (contender, "eager"))

    def span(*contenders: str, modes: tuple[str, ...] = ("eager",)) -> str:
        quotients = [
            fastest(shape, who, *modes) / fastest(shape, "softdice", *modes) for who in contenders for shape in shapes
        ]
        return f"{times(min(quotients), 1)} to {times(max(quotients), 1)}"

    either = ("eager", "compiled")

    where = machine("docs/kernels.md", "<!-- benchmark: losses -->")
    lines = [
        f"One step of the Dice loss on a CPU, for large inputs, is **{span('MONAI', 'nnU-Net')} times faster than "
        f"MONAI's and nnU-Net's** ({span('MONAI', 'nnU-Net', modes=either)} where torch.compile may help either side) "
        f"and **{span('smp')} times faster than segmentation-models-pytorch's** ({span('smp', modes=either)}), in a "
        "third to a fifth of the memory. For small inputs it is no faster, and no GPU has been measured "
        "([Limits](#limits)).",
        "",
        f"`make bench` on {where}. Logits of four sizes (B, C, ...) in float32, softmax and Dice, forward, backward. "
        "Plain: both eager. In brackets: each in its faster mode, eager or torch.compile. Memory: what a step holds "
        "beside its inputs, in multiples of the logits, at its worst; softdice's is "
        f"{memory('softdice'):.1f}, the gradient.",
        "",
        "| times faster than | " + " | ".join(f"`{shape}`" for shape in shapes) + " | its memory |",
        "|---" * (len(shapes) + 2) + "|",
    ]
    for contender, title in PEERS.items():
        cells = []
        for shape in shapes:
            eager = times(fastest(shape, contender, "eager"), fastest(shape, "softdice", "eager"))
            both = times(*(fastest(shape, who, "eager", "compiled") for who in (contender, "softdice")))
            cells.append(f"**{eager}** ({both})")
        lines.append(f"| {title} | {' | '.join(cells)} | {memory(contender):.1f} |")
    return "\n".join(lines)


def work_table() -> str:
    """Return how many times faster whole tasks are, each with its command."""

    def one(name: str, **where: Any) -> dict[str, Any]:
        (row,) = (r for r in publish.kept(name) if all(r[column] == value for column, value in where.items()))
        return row

    trainers = {name: one("pipelines", trainer=f"nnUNetTrainer{name}") for name in ("", "SoftDiceFusedHead")}
    upsampled = {
        path: one("upsampled", case="150 classes, 128 x 128 to 512 x 512", path=path) for path in ("monai", "fused")
    }
    organs = "organs 122x101x30"
    voxels, surface = (one("distances", maps=organs, contender=f"softdice{form}") for form in ("", ", surface"))
    rows = [
        (
            "a training step of nnU-Net 2.8.1 with the fused head (`nnUNetTrainerSoftDiceFusedHead`), 118 classes, two "
            "patches of 96³", "its own trainer",
            f"{trainers['']['seconds']:.1f} s, {trainers['']['grown_gib']:.1f} GiB",
            f"{trainers['SoftDiceFusedHead']['seconds']:.1f} s, {trainers['SoftDiceFusedHead']['grown_gib']:.1f} GiB",
            times(trainers[""]["seconds"], trainers["SoftDiceFusedHead"]["seconds"]), "pipelines",
        ),
        (
            "upsampling 150 classes from 128² to 512², Dice and cross-entropy, batch 2",
            "`F.interpolate`, then torch's and MONAI's losses",
            f"{upsampled['monai']['time_ms']:.0f} ms, {upsampled['monai']['peak_mib']:.0f} MiB",
            f"{upsampled['fused']['time_ms']:.0f} ms, {upsampled['fused']['peak_mib']:.0f} MiB",
            times(upsampled["monai"]["time_ms"], upsampled["fused"]["time_ms"]), "upsampled",
        ),
    ]  # fmt: skip
    for contender, what, title, ours in (
        ("monai", "HD95 and surface Dice of all organs", "MONAI 1.6.1", voxels),
        ("deepmind, surface", "the same, weighted by surface area", "DeepMind surface-distance 0.1", surface),
        ("medpy, HD95 only", "HD95 alone", "MedPy 0.5.2", voxels),
    ):
        theirs = one("distances", maps=organs, contender=contender)["time_ms"]
        rows.append(
            (f"{what}, 122 x 101 x 30", title, f"{theirs:.0f} ms", f"{ours['time_ms']:.0f} ms",
             times(theirs, ours["time_ms"]), "distances")
        )  # fmt: skip
    for contender, title in (
        ("torchmetrics DiceScore (one-hot)", "torchmetrics 1.9.0 `DiceScore`"),
        ("MONAI DiceHelper", "MONAI 1.6.1 `DiceHelper`"),
    ):
        row = one("scores", maps="organs", contender=contender)
        rows.append(
            (f"Dice of 117 classes, {row['side_voxels']}³", title, f"{row['time_ms']:.0f} ms",
             f"{row['softdice_ms']:.1f} ms", times(row["time_ms"], row["softdice_ms"]), "scores")
        )  # fmt: skip
    lines = [
        f"On {machine('docs/distances.md', '<!-- benchmark: distances -->')}; each row by its command.",
        "",
        "| task | compared with | its time | softdice's | times faster | command |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row[:4])} | **{row[4]}** | `python -m benchmarks.{row[5]}` |" for row in rows]
    return "\n".join(lines)


def write() -> None:
    """Write both tables into README."""
    publish.show(step_table(), README, STEP)
    publish.show(work_table(), README, WORK)


if __name__ == "__main__":
    write()
