"""Cases without data: axial slices of the ICBM152 brain that nilearn carries in its package. No network access.

The image is the T1 template; a voxel's class is the largest of the grey matter map, the white matter map and what they
leave over. The template is one average brain, so that neighbouring slices resemble each other: slices are dealt out in
blocks along the head, and the slices between a block for training and a held-out block are used for neither.

Source: V. S. Fonov et al., "Unbiased average age-appropriate atlases for pediatric studies", NeuroImage 54 (1), 2011.
"""

from __future__ import annotations

import numpy as np

from softdice import validation
from softdice.training.cases import Case, Cases
from softdice.training.channels import normalise

PERIOD = 24
"""Slices, 1 mm apart, from one block of held-out ones to the next."""
GAP = 3
"""Slices on either side of such a block that are used for nothing."""
LEAST_TISSUE = 0.005
"""Share of the slice that grey matter and white matter must each fill."""


def brain_cases(val_fraction: float) -> Cases:
    """Return the axial slices as 2-D cases, pixels of 1 mm, the front of the head up, with a split by `blocks`.

    `val_fraction` is the share of the slices to hold out, in (0, 1). Raise ModuleNotFoundError without nilearn.
    """
    validation.package("softdice train", "nilearn", "train")
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    image, grey, white = (
        np.rot90(np.asarray(load(resolution=1).dataobj, np.float32))
        for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    )
    label = np.argmax(np.stack([1 - grey - white, grey, white]), axis=0).astype(np.uint8)
    tissue = np.stack([(label == number).mean((0, 1)) for number in (1, 2)])
    slices = np.flatnonzero((tissue >= LEAST_TISSUE).all(0)).tolist()
    names = [f"z{z:03d}" for z in slices]

    def read(number: int) -> Case:
        """Return a slice by its position among those with enough tissue."""
        z = slices[number]
        return Case(names[number], normalise(image[:, :, z], clipped=cases.clipped)[None], label[:, :, z].copy())

    cases = Cases(
        names=names,
        values=[0, 1, 2],
        class_names=["background", "grey matter", "white matter"],
        spatial_ndim=2,
        channels=1,
        shapes=[label.shape[:2]] * len(slices),
        read=read,
        split=blocks(len(slices), val_fraction),
        keep_bytes=2**30,
    )
    return cases


def blocks(count: int, val_fraction: float) -> tuple[list[int], list[int]]:
    """Return which of the slices 0 to `count` - 1 are for training and which are held out.

    In every `PERIOD` slices one block is held out, a share of `val_fraction` (1 to 17 slices). `GAP` slices on either
    side of it are left out, and the rest is for training.

    Example:
        >>> training, held_out = blocks(24, 0.25)
        >>> held_out
        [9, 10, 11, 12, 13, 14]
        >>> max(n for n in training if n < 9), min(n for n in training if n > 14)
        (5, 18)
    """
    held = min(max(1, round(PERIOD * val_fraction)), PERIOD - 2 * GAP - 1)
    first = (PERIOD - held) // 2
    position = np.arange(count) % PERIOD
    held_out = (position >= first) & (position < first + held)
    training = (position < first - GAP) | (position >= first + held + GAP)
    return np.flatnonzero(training).tolist(), np.flatnonzero(held_out).tolist()
