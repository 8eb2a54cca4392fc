#!/usr/bin/env bash
# panoptica scores one file as 2 mm or 6 mm, depending on who read it: spacing and axes stand in opposite orders.
#
# Versions: panoptica 2.1.7, SimpleITK 2.5.7, nibabel 5.4.2. Voxels of 3 x 1 x 1 mm, a cube, and the same moved by two
# voxels along the first axis: the Hausdorff distance is 6 mm. An image of nibabel gives that. An image of SimpleITK, and
# a path, which panoptica opens with SimpleITK, give 2: SimpleITK names spacing in the order x, y, z and its array has z,
# y, x, and one of the two would have to be reversed. `voxelspacing=`, in the order of the array's axes, puts it right.
# The distance of the whole mask (`global_bin_hd`) counts voxels whoever read the file, and whatever `voxelspacing` says.
#
# Output seen:
#   nibabel image: HD 6.0, global 2.0
#   SimpleITK image: HD 2.0, global 2.0
#   path: HD 2.0, global 2.0
#   SimpleITK image, voxelspacing=(1, 1, 3): HD 6.0, global 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check panoptica==2.1.7 SimpleITK==2.5.7 nibabel==5.4.2
cat > "$folder/score.py" <<'PY'
import warnings

import nibabel
import numpy as np
import SimpleITK

warnings.simplefilter("ignore")
from panoptica import ConnectedComponentsInstanceApproximator, InputType, Metric, NaiveThresholdMatching, Panoptica_Evaluator

truth = np.zeros((20, 24, 28), np.uint8)
truth[5:15, 5:15, 5:15] = 1
for name, array in (("truth", truth), ("moved", np.roll(truth, 2, 0))):
    nibabel.save(nibabel.Nifti1Image(array, np.diag([3.0, 1, 1, 1])), f"{name}.nii.gz")
evaluator = Panoptica_Evaluator(
    expected_input=InputType.SEMANTIC,
    instance_approximator=ConnectedComponentsInstanceApproximator(),
    instance_matcher=NaiveThresholdMatching(matching_threshold=0.5),
    instance_metrics=[Metric.IOU, Metric.HD],
    global_metrics=[Metric.HD],
)
for what, read, settings in (
    ("nibabel image", nibabel.load, {}),
    ("SimpleITK image", SimpleITK.ReadImage, {}),
    ("path", str, {}),
    ("SimpleITK image, voxelspacing=(1, 1, 3)", SimpleITK.ReadImage, {"voxelspacing": (1, 1, 3)}),
):
    results = evaluator.evaluate(read("moved.nii.gz"), read("truth.nii.gz"), verbose=False, **settings)
    (result,) = results.values()
    print(f"{what}: HD {float(result.sq_hd)}, global {float(result.global_bin_hd)}")
PY
cd "$folder"
venv/bin/python score.py 2> errors > seen || { cat errors; exit 1; }
grep "HD" seen > lines
cat lines
cd - > /dev/null
diff <(sed -n 's/^#   //p' "$0") "$folder/lines"
