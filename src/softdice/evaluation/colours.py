"""The colours of right and wrong pixels, alike in the report of scores and in the overlays of a training."""

from __future__ import annotations

RIGHT, EXTRA, MISSED, OTHER = (201, 208, 216), (230, 159, 0), (64, 156, 255), (58, 64, 72)
"""Red, green and blue of pixels in both, predicted in error, missed, and of other classes; colour-blind safe."""
