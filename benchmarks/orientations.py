"""Whether masks depend on how a volume is stored: `python -m benchmarks.orientations [--steps N]`, about 2 minutes.

A model is trained on hippocampus volumes as they are (RAS), and predicts its held-out ones stored as LPS, as ASR, as
.nrrd and as .mha. Printed for each way: how many voxels of the masks, turned back, differ from those of the volumes as
they are.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from benchmarks.runs import RUNS
from benchmarks.training import linked
from softdice.training import TrainConfig, predict, train

STORED = "RAS"
TURNED, SUFFIXES = ("LPS", "ASR"), (".nrrd", ".mha")
SUFFIX = ".nii.gz"


def turned(image: Any, codes: str) -> Any:
    """Return a nibabel image with its axes in another order, such as "LPS"; its voxels stay where they lie."""
    to = nibabel.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), to))


def store(source: Path, folder: Path, way: str) -> None:
    """Write the volume at `source` into a folder in one of the ways."""
    if way in SUFFIXES:
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(source)), str(folder / source.name.replace(SUFFIX, way)))
    else:
        nibabel.save(turned(nibabel.load(source), way), folder / source.name)


def read(mask: Path) -> np.ndarray:
    """Return the label values of a mask, (X, Y, Z), in the order of `STORED`."""
    if mask.suffix in SUFFIXES:
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(mask))).T  # ITK keeps the order of the file
    return np.asarray(turned(nibabel.load(mask), STORED).dataobj)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # fields of NIfTI that .mha cannot hold
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "data").mkdir()
        data = linked("hippocampus", scratch / "data", RUNS["hippocampus"].most)
        summary = train(TrainConfig(data=str(data), out=str(scratch / "run"), max_steps=steps, seed=0))
        print(f"held-out Dice {summary['mean_dice']:.3f} after {steps} steps")
        masks: dict[str, list[np.ndarray]] = {}
        for way in (STORED, *TURNED, *SUFFIXES):
            images = scratch / f"images-{way}"
            images.mkdir()
            for case in summary["held_out"]:
                store(data / "images" / f"{case}{SUFFIX}", images, way)
            paths = predict(scratch / "run" / "model.ckpt", images, scratch / f"masks-{way}")
            masks[way] = [read(path) for path in sorted(paths)]
            different = sum(int((a != b).sum()) for a, b in zip(masks[way], masks[STORED], strict=True))
            voxels = sum(mask.size for mask in masks[way])
            print(f"{way}: {different} of {voxels} voxels of {len(paths)} masks differ", flush=True)


if __name__ == "__main__":
    main()
