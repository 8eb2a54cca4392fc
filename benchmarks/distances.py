"""Time and memory of HD95 and surface Dice of all labels, against the programs that have them.

    python -m benchmarks.distances                 organs, ellipsoids; writes results/distances.csv, docs/distances.md
    python -m benchmarks.distances --size 256      another side of the ellipsoids
    python -m benchmarks.distances --picture       draws docs/distances.png and docs/lesions.png

Two pairs of label maps: 41 organs of a CT (122 x 101 x 30, `SOFTDICE_DATA`/totalsegmentator), 117 ellipsoids shifted by
two voxels. Peers take part where they are installed, on the real pair; only exacta runs on the ellipsoids, too: the
others want a mask of the whole image for each label. Each result is compared with ours first. Contenders take turns;
times are medians. MedPy has HD95 alone, of both directions together, SimpleITK the maximum of the distances to masks,
not to boundaries.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import publish
from benchmarks.measure import machine
from benchmarks.scores import organs, peak_mib
from softdice.metrics import centreline_dice, dice_score, lesion_dice, surfaces
from softdice.metrics.distances import measure

DATA = Path(os.environ.get("SOFTDICE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MARKS = "<!-- benchmark: distances -->", "<!-- end of benchmark -->"
CLASSES, SPACING, TOLERANCE = 118, 3.0, 3.0

Pair = tuple[Tensor, Tensor]
FORMULAS = (
    lambda found, _: surfaces.hausdorff(found, 95.0),
    lambda found, _: surfaces.surface_overlap(found, TOLERANCE),
)


def ours(input: Tensor, target: Tensor, definition: surfaces.Definition = "voxels") -> Tensor:
    """Dice, HD95 and surface Dice of every label but the background: (3, 117)."""
    found = measure(
        input[None],
        target[None],
        FORMULAS,
        CLASSES,
        SPACING,
        surfaces.between(definition),
        range(1, CLASSES),
        ignore_index=None,
    )
    return torch.cat([dice_score(input, target, CLASSES)[None, 1:], found[:, 0]])


def monai(input: Tensor, target: Tensor) -> Tensor:
    """HD95 and surface Dice by MONAI, of the labels that occur, one-hot."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    seen = [c for c in range(1, CLASSES) if bool((input == c).any() or (target == c).any())]
    hot = [torch.stack([labels == c for c in seen])[None].float() for labels in (input, target)]
    options = {"include_background": True, "spacing": SPACING}
    found = torch.full((2, CLASSES - 1), torch.nan)
    columns = [c - 1 for c in seen]
    found[:1, columns] = compute_hausdorff_distance(*hot, percentile=95, **options)
    found[1:, columns] = compute_surface_dice(*hot, [TOLERANCE] * len(seen), **options)
    return found


def exacta(input: Tensor, target: Tensor) -> Tensor:
    """The same by exacta, Dice included."""
    from exacta import functional

    options = {"num_classes": CLASSES, "include_background": False}
    rows = [
        functional.dice(input[None], target[None], **options),
        functional.hd95(input[None], target[None], spacing=SPACING, **options),
        functional.nsd(input[None], target[None], spacing=SPACING, tolerance=TOLERANCE, **options),
    ]
    return torch.cat(rows[1:])


def labels_of(input: Tensor, target: Tensor) -> list[int]:
    """Those that both maps hold."""
    return [c for c in range(1, CLASSES) if bool((input == c).any() and (target == c).any())]


def deepmind(input: Tensor, target: Tensor) -> Tensor:
    """HD95 and surface Dice by DeepMind's surface-distance, label by label: surface elements."""
    import surface_distance
    from scipy import ndimage

    for module, old, now in ((np, "Inf", np.inf), (ndimage, "filters", ndimage), (ndimage, "morphology", ndimage)):
        if not hasattr(module, old):  # names that NumPy and SciPy have taken away since
            setattr(module, old, now)
    found = torch.full((2, CLASSES - 1), torch.nan, dtype=torch.float64)
    for c in labels_of(input, target):
        masks = (target == c).numpy(), (input == c).numpy()
        distances = surface_distance.compute_surface_distances(*masks, (SPACING,) * input.dim())
        found[0, c - 1] = surface_distance.compute_robust_hausdorff(distances, 95)
        found[1, c - 1] = surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE)
    return found


def medpy(input: Tensor, target: Tensor) -> Tensor:
    """HD95 of both directions together, label by label."""
    from medpy.metric import binary

    found = torch.full((1, CLASSES - 1), torch.nan, dtype=torch.float64)
    for c in labels_of(input, target):
        found[0, c - 1] = binary.hd95((input == c).numpy(), (target == c).numpy(), (SPACING,) * input.dim())
    return found


def simpleitk(input: Tensor, target: Tensor) -> Tensor:
    """The maximum of distances to the masks, label by label."""
    import SimpleITK as sitk  # noqa: N813 - as its users call it

    images = [sitk.GetImageFromArray(labels.numpy()) for labels in (input, target)]
    for image in images:
        image.SetSpacing((SPACING,) * input.dim())
    filters, found = sitk.HausdorffDistanceImageFilter(), torch.full((1, CLASSES - 1), torch.nan, dtype=torch.float64)
    for c in labels_of(input, target):
        filters.Execute(*(image == c for image in images))
        found[0, c - 1] = filters.GetHausdorffDistance()
    return found


PEERS = {
    "monai": (monai, "monai"),
    "exacta": (exacta, "exacta"),
    "deepmind, surface": (deepmind, "surface_distance"),
    "medpy, HD95 only": (medpy, "medpy"),
    "simpleitk, HD only": (simpleitk, "SimpleITK"),
}


def check(name: str, pair: Pair) -> None:
    """What a peer says is what we say by its definition; SimpleITK's is never more than ours."""
    run, _ = PEERS[name]
    definition: surfaces.Definition = "surface" if name.startswith("deepmind") else "voxels"
    formulas = list(FORMULAS)
    if name.startswith("medpy"):
        formulas = [lambda found, _: np.percentile(np.concatenate(found[:2]), 95) if len(found.input) else np.nan]
    if name.startswith("simpleitk"):
        formulas = [lambda found, _: surfaces.hausdorff(found, None)]
    compare, numbers = surfaces.between(definition), range(1, CLASSES)
    expected = measure(*(each[None] for each in pair), formulas, CLASSES, SPACING, compare, numbers, None)[:, 0]
    found, known = run(*pair).double(), torch.tensor([c - 1 for c in labels_of(*pair)])
    if name.startswith("simpleitk"):
        assert bool((found[:, known] <= expected[:, known] + 1e-4).all())
    else:
        torch.testing.assert_close(found[:, known], expected[:, known], rtol=1e-5, atol=1e-5)


def real_pair() -> Pair | None:
    folder = DATA / "totalsegmentator"
    if not folder.exists():
        return None
    import nibabel

    files = (folder / f"{name}.nii.gz" for name in ("example_seg_fast", "example_seg"))
    arrays = (np.ascontiguousarray(np.asarray(nibabel.load(file).dataobj), np.uint8) for file in files)
    return tuple(map(torch.from_numpy, arrays))  # type: ignore[return-value]


def median_ms(contenders: dict[str, Callable[[Tensor, Tensor], object]], pair: Pair, rounds: int) -> dict[str, float]:
    """Contenders take turns, after one run each."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(*pair)
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(times)) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--picture", action="store_true")
    arguments = parser.parse_args()
    if arguments.picture:
        picture()
        lesions_picture()
        return
    warnings.simplefilter("ignore")
    print(machine())
    rows: list[tuple[str, str, float, float | str]] = []
    pair = real_pair()
    if pair is not None:
        peers = {name: run for name, (run, module) in PEERS.items() if find_spec(module)}
        for name in PEERS:
            print(f"{name}: not installed, left out" if name not in peers else f"{name}: takes part")
        for name in peers:
            check(name, pair)
        surface = {"softdice, surface": lambda *pair: ours(*pair, definition="surface")}
        times = median_ms({"softdice": ours, **surface, **peers}, pair, arguments.rounds)
        rows += [("organs 122x101x30", name, time_ms, "") for name, time_ms in times.items()]
    pair = organs(arguments.size)
    if find_spec("exacta"):
        check("exacta", organs(64))
        exacta(*organs(64))
        grown_mib = peak_mib(exacta, pair)
        rows.append((f"ellipsoids {arguments.size}^3", "exacta", *median_ms({"": exacta}, pair, 3).values(), grown_mib))
    for name, definition in (("softdice", "voxels"), ("softdice, surface", "surface")):

        def run(*pair: Tensor, definition: surfaces.Definition = definition) -> Tensor:  # type: ignore[assignment]
            return ours(*pair, definition=definition)

        run(*organs(64))
        grown_mib = peak_mib(run, pair)
        (time_ms,) = median_ms({name: run}, pair, 3).values()
        rows.append((f"ellipsoids {arguments.size}^3", name, time_ms, grown_mib))
    for where, name, time_ms, mib in rows:
        print(f"{where:<20} {name:<20} {time_ms:9.1f} ms" + (f", memory grew by {mib:.0f} MiB" if mib != "" else ""))
    if arguments.size == 512:
        names = ("maps", "contender", "time_ms", "grown_mib")
        publish.keep("distances", [dict(zip(names, row, strict=True)) for row in rows])
        publish.show(table(rows), publish.DOCS / "distances.md", MARKS)


def table(rows: list[tuple[str, str, float, float | str]]) -> str:
    lines = [f"`python -m benchmarks.distances` on {machine()}. Medians.", ""]
    lines += ["| label maps | program | ms | memory grew by, MiB |", "|---|---|---|---|"]
    lines += [f"| {a} | {b} | {t:.1f} | {m if m == '' else f'{m:.0f}'} |" for a, b, t, m in rows]
    return "\n".join(lines)


def picture() -> None:
    """A disc with a spike and the disc alone: the boundary of the first by either definition, and the scores."""
    from matplotlib import pyplot as plt
    from scipy import ndimage

    disc = sum(((axis - 9.5) / r) ** 2 for axis, r in zip(np.ogrid[:20, :20], (5.0, 7.0), strict=True)) <= 1
    spiked = disc.copy()
    spiked[10, 14:19] = True
    spacing = (2.0, 1.0)
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.5), sharey=True, layout="constrained")
    for axis, definition in zip(axes, surfaces.DEFINITIONS, strict=True):
        found = surfaces.surface_distances(spiked, disc, spacing, definition)
        codes = surfaces.elements(spiked, definition, ndimage)
        corner = 0.0 if definition == "voxels" else 0.5
        y, x = ((np.argwhere((codes != 0) & (codes != 255)) - corner) * spacing).T
        axis.imshow(spiked, cmap="Greys", vmax=5, extent=(-0.5, 19.5, 39, -1))
        weight = 1.0 if found.input_weight is None else found.input_weight
        dots = axis.scatter(x, y, 30 * weight, found.input, cmap="viridis", vmin=0, vmax=2)
        lengths = f"HD95 {surfaces.hausdorff(found, 95.0):.2f} mm, mean {surfaces.average(found):.2f} mm"
        title = f'"{definition}": {len(x)} elements\n{lengths}\nsurface Dice at 1 mm'
        axis.set(title=f"{title} {surfaces.surface_overlap(found, 1.0):.3f}", ylim=(32, 6), xlabel="mm")
    figure.colorbar(dots, ax=axes, label="distance to the disc without its spike, mm", shrink=0.7)
    figure.savefig(publish.DOCS / "distances.png", dpi=100)


def lesions_picture() -> None:
    """A lesion in two parts, one that was missed, an extra one, and a vessel without its branches; their scores."""
    from matplotlib import pyplot as plt
    from scipy import ndimage
    from skimage.morphology import skeletonize

    target, input = np.zeros((2, 22, 40), bool)
    target[3:10, 3:12], target[4:8, 14:17], target[17:18, 4:6] = True, True, True
    input[3:10, 4:12], input[16:18, 14:16] = True, True
    tube, broken = np.zeros((2, 22, 40), bool)
    broken[12:19, 1:39] = tube[12:19, 1:39] = True
    for start in (6, 16, 26):  # branches of one pixel
        tube[range(2, 12), range(start + 9, start - 1, -1)] = True
    tensors = [torch.from_numpy(each)[None] for each in (input, target, broken, tube)]
    options = {"num_classes": 1}
    by_overlap = lesion_dice(*tensors[:2], **options).item()
    by_rules = lesion_dice(*tensors[:2], matching="BraTS-MET", **options).item()
    line = centreline_dice(*tensors[2:], **options).item()
    dice = [dice_score(*pair, 1).item() for pair in (tensors[:2], tensors[2:])]
    around = ndimage.binary_dilation(target, ndimage.generate_binary_structure(2, 2))
    shown = [
        (target, input, None, f"by overlap: lesion Dice {by_overlap:.2f}\nDice {dice[0]:.2f}"),
        (target, input, around, f"BraTS-MET: lesion Dice {by_rules:.2f}\nDice {dice[0]:.2f}"),
        (tube, broken, None, f"centre lines: clDice {line:.3f}\nDice {dice[1]:.3f}"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, (true, found, reach, title) in zip(axes, shown, strict=True):
        image = np.ones((*true.shape, 3))
        if reach is not None:
            image[reach] = 0.88
        for where, colour in ((true & found, (0.45, 0.7, 0.5)), (true & ~found, (0.3, 0.5, 0.9)),
                              (found & ~true, (0.9, 0.5, 0.3))):  # fmt: skip
            image[where] = colour
        axis.imshow(image, interpolation="nearest")
        if true is tube:
            axis.scatter(
                *np.argwhere(skeletonize(true)).T[::-1], 6, "black", marker="s"
            )  # what is below stays in sight
        axis.set(title=title, xticks=[], yticks=[])
    axes[0].set_xlabel("green: in both, blue: missed, orange: extra")
    axes[1].set_xlabel("grey: how far the target reaches, dilated once")
    axes[2].set_xlabel("black: centre line of the target")
    figure.savefig(publish.DOCS / "lesions.png", dpi=100)


if __name__ == "__main__":
    main()
