#!/usr/bin/env bash
# Two programs, one pair of instance maps, one threshold below 1/2: StarDist counts two true positives, panoptica one.
#
# Versions: stardist 0.9.2, panoptica 2.1.7. Two objects in the reference, two in the prediction, on a line of 40 pixels;
# the first predicted object overlaps both references (intersection over union 13/31 and 11/33), the second the first
# reference alone (7/20). At a threshold of 0.3 StarDist assigns so that most pairs match (2), panoptica takes the best
# pair first and is left with one. From 1/2 on at most one pair can match an object, and the two agree. So a panoptic
# quality or an F1 "at 0.3" says nothing without the name of the program.
#
# Output seen:
#   0.3 StarDist tp fp fn 2 0 0
#   0.3 panoptica tp fp fn 1 1 1
#   0.5 StarDist tp fp fn 0 2 2
#   0.5 panoptica tp fp fn 0 2 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check stardist==0.9.2 panoptica==2.1.7
cat > "$folder/both.py" <<'PY'
import warnings

import numpy as np

warnings.simplefilter("ignore")
from panoptica import InputType, NaiveThresholdMatching, Panoptica_Evaluator
from stardist.matching import matching

truth, found = np.zeros((4, 40), np.uint16), np.zeros((4, 40), np.uint16)
truth[:, :20], truth[:, 20:] = 1, 2
found[:, 7:31], found[:, :7] = 1, 2
for threshold in (0.3, 0.5):
    by_stardist = matching(truth, found, thresh=threshold)
    print(threshold, "StarDist tp fp fn", by_stardist.tp, by_stardist.fp, by_stardist.fn)
    matcher = NaiveThresholdMatching(matching_threshold=threshold)
    evaluator = Panoptica_Evaluator(expected_input=InputType.UNMATCHED_INSTANCE, instance_matcher=matcher)
    (result,) = evaluator.evaluate(found, truth, verbose=False).values()
    print(threshold, "panoptica tp fp fn", int(result.tp), int(result.fp), int(result.fn))
PY
"$folder/venv/bin/python" "$folder/both.py" 2> "$folder/errors" > "$folder/seen" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") <(grep -E "tp fp fn" "$folder/seen")
