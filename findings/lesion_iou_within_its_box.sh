#!/usr/bin/env bash
# lesion-metrics takes the IoU of a lesion within its bounding box: a prediction that is the whole image scores 1.
#
# Versions: lesion-metrics 0.1.12, scikit-image 0.26.0, numpy 2.4.6. `iou_per_lesion` cuts the prediction to the box of the
# lesion before it compares them, so what was predicted outside of the box costs nothing. A square lesion of 3 x 3 pixels
# and a bar of 3 x 13 over it have an IoU of 9/39; the function says 1, and 9/39 if the two are exchanged. A prediction of
# all 400 pixels (IoU 9/400) finds the lesion at every threshold: `ltpr(..., iou_threshold=0.9)` is 1.
#
# Output seen:
#   bar: jaccard 0.231, of the lesion 1.000, exchanged 0.231
#   whole image: jaccard 0.022, of the lesion 1.000, found at 0.9: 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check lesion-metrics==0.1.12 scikit-image==0.26.0 numpy==2.4.6
cat > "$folder/lesion.py" <<'PY'
import numpy as np
from lesion_metrics.metrics import iou_per_lesion, jaccard, ltpr

lesion, bar, whole = np.zeros((3, 20, 20), np.uint8)
lesion[4:7, 4:7] = bar[4:7, 4:17] = whole[:] = 1
(of_lesion,), (exchanged,) = iou_per_lesion(lesion, bar), iou_per_lesion(bar, lesion)
print(f"bar: jaccard {jaccard(bar, lesion):.3f}, of the lesion {of_lesion:.3f}, exchanged {exchanged:.3f}")
(of_lesion,), found = iou_per_lesion(lesion, whole), ltpr(whole, lesion, iou_threshold=0.9)
print(f"whole image: jaccard {jaccard(whole, lesion):.3f}, of the lesion {of_lesion:.3f}, found at 0.9: {found}")
PY
"$folder/venv/bin/python" "$folder/lesion.py" 2> "$folder/errors" > "$folder/seen" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen"
