#!/usr/bin/env bash
# torchmetrics' Hausdorff distance of an image that is wider than high is a wrong number, without a warning.
#
# Versions: torchmetrics 1.9.0, torch 2.13.0, SciPy 1.17.1. A square of 3 x 3 pixels is moved to the right by 3, 10 and 20 columns,
# so the distance is 3, 10 and 20. In an image of 32 x 32 pixels torchmetrics says so; in the same image cut to its upper 16 rows,
# where nothing of the squares is lost, it says 11.7, 18.0 and 12.6: a larger shift may even score better. `distance_transform` writes
# the distance of the pixel (row, column) to position row * height + column. Its other engine, SciPy, which the metric cannot be told
# to use, is right. Public reports (Lightning-AI/torchmetrics#3300) name the error that images higher than wide end in, and say that wide
# ones work. Pad images to a square before this metric.
#
# Output seen:
#   32 x 32: 3.0 10.0 20.0
#   16 x 32: 11.7 18.0 12.6
#   16 x 32, distances to a column by torch and SciPy: 7.5 31.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check torchmetrics==1.9.0 torch==2.13.0 scipy==1.17.1 setuptools
cat > "$folder/wide.py" <<'PY'
import torch
from torchmetrics.functional.segmentation import hausdorff_distance
from torchmetrics.functional.segmentation.utils import distance_transform

for rows in (32, 16):
    reference = torch.zeros(1, 1, rows, 32, dtype=torch.long)
    reference[..., 2:5, 2:5] = 1
    moved = (reference.roll(shift, 3) for shift in (3, 10, 20))
    distances = [hausdorff_distance(mask, reference, num_classes=1, include_background=True).item() for mask in moved]
    print(f"{rows} x 32:", *(f"{distance:.1f}" for distance in distances))
column = torch.ones(16, 32)
column[:, 0] = 0  # so the pixels of the last column are 31 away from it
by_engine = [float(distance_transform(column, engine=engine)[:, 31].mean()) for engine in ("pytorch", "scipy")]
print("16 x 32, distances to a column by torch and SciPy:", *(f"{distance:.1f}" for distance in by_engine))
PY
"$folder/venv/bin/python" "$folder/wide.py" 2> "$folder/errors" > "$folder/seen" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen"
