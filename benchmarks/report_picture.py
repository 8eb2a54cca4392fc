"""docs/report.png, the report of `softdice score` on drawn cases in Chromium: `python -m benchmarks.report_picture`.

The cases are ellipsoids, an organ with lesions in it, of which the prediction misses some: no one's data. Needs
`softdice[all]`, and Chromium on the machine (tests/chromium.sh brings it).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import publish

SHAPE, SPACING = (96, 80, 40), (1.5, 1.5, 3.0)
CASES = 12
WIDTH, HEIGHT = 1100, 1370


def ellipsoid(centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return the voxels inside an ellipsoid, in voxels."""
    axes = np.ogrid[tuple(slice(side) for side in SHAPE)]
    return sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True)) <= 1


def case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an image, its labels (1 organ, 2 lesion) and a prediction that is shifted and lacks lesions."""
    middle, radii = np.array(SHAPE) / 2 + rng.uniform(-4, 4, 3), np.array((30, 24, 13)) * rng.uniform(0.85, 1.1, 3)
    labels, prediction = np.zeros((2, *SHAPE), np.uint8)
    labels[ellipsoid(middle, radii)] = 1
    prediction[ellipsoid(middle + rng.uniform(-1.5, 1.5, 3), radii * rng.uniform(0.94, 1.04, 3))] = 1
    for _ in range(rng.integers(1, 5)):
        centre, size = middle + radii * rng.uniform(-0.55, 0.55, 3), rng.uniform(2.5, 6.5) * np.array((1, 1, 0.6))
        labels[ellipsoid(centre, size)] = 2
        if rng.random() < 0.8:
            prediction[ellipsoid(centre + rng.uniform(-1, 1, 3), size * rng.uniform(0.8, 1.1))] = 2
    image = 60.0 * (labels > 0) - 25.0 * (labels == 2) + rng.normal(0, 9, SHAPE)
    return image.astype(np.int16), labels, prediction


def main() -> None:
    """Draw the cases, score them with the command, and keep what a browser shows at first."""
    import nibabel

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("report_picture: expected Chromium on this machine, got none. Run tests/chromium.sh.")
    rng = np.random.default_rng(7)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("images", "labels", "predictions"):
            (Path(folder) / name).mkdir()
        for number in range(CASES):
            for name, array in zip(("images", "labels", "predictions"), case(rng), strict=True):
                file = nibabel.Nifti1Image(array, np.diag((*SPACING, 1.0)))
                file.to_filename(Path(folder) / name / f"case_{number + 1:02d}.nii.gz")
        words = (
            "predictions labels --labels liver=1,tumour=2 --surface 2mm --lesions --images images --report report.html"
        )
        command = [sys.executable, "-m", "softdice", "score", *words.split()]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={WIDTH},{HEIGHT}",
        )
        picture = publish.DOCS / "report.png"
        page = (Path(folder) / "report.html").as_uri()
        subprocess.run([browser, *options, f"--screenshot={picture}", page], check=True, capture_output=True)


if __name__ == "__main__":
    main()
