#!/usr/bin/env bash
# seg-metrics gives a prediction with nothing in it a Hausdorff distance of 0, the best that there is.
#
# Versions: seg-metrics 1.2.8, numpy 2.4.6. The reference is a cube of 10 voxels. Moved by 2 voxels it scores a Hausdorff
# distance of 2, and so does its HD95. An empty prediction has a Dice of 0 and distances of 0, so that the mean HD95 of a
# data set falls with each case that is missed altogether. A log line says what becomes of precision and recall, not of
# the distances. For a label that neither has, the volume similarity is 1, where a perfect prediction has 0. Other
# programs give inf or nan there, or raise (docs/distances.md). Score such cases as missed before a mean is taken.
#
# Output seen:
#   the same: dice 1.0 hd 0.0 hd95 0.0 vs 0.0
#   moved by 2: dice 0.8 hd 2.0 hd95 2.0 vs 0.0
#   nothing: dice 0.0 hd 0.0 hd95 0.0 vs -2.0
#   in neither: dice 1.0 hd 0.0 hd95 0.0 vs 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check seg-metrics==1.2.8 numpy==2.4.6
cat > "$folder/score.py" <<'PY'
import numpy as np
from seg_metrics.seg_metrics import write_metrics

truth = np.zeros((20, 20, 20), np.uint8)
truth[5:15, 5:15, 5:15] = 1
empty = np.zeros_like(truth)
names = ["dice", "hd", "hd95", "vs"]
for what, reference, prediction in (
    ("the same", truth, truth),
    ("moved by 2", truth, np.roll(truth, 2, 0)),
    ("nothing", truth, empty),
    ("in neither", empty, empty),
):
    (row,) = write_metrics(labels=[1], gdth_img=reference, pred_img=prediction, csv_file=None, metrics=names)
    print(f"{what}:", *(f"{name} {round(float(row[name][0]), 3)}" for name in names))
PY
"$folder/venv/bin/python" "$folder/score.py" 2> "$folder/errors" > "$folder/seen" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") <(grep "hd95" "$folder/seen")
