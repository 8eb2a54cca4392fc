#!/usr/bin/env bash
# highdicom keeps the frames of an image in an SQLite database in memory and never closes it; Python 3.13 warns.
#
# Versions: highdicom 0.28.2, pydicom 3.0.2, Python 3.13. The image is one that pydicom brings. An object of `segread` has
# no `close`, and to leave it as a context manager leaves the database open; when the object is collected, Python 3.13 gives
# a ResourceWarning, which is an error where warnings are. softdice closes the database itself (`_read_segmentation` in images/formats/dicom.py).
#
# Output seen:
#   close: False
#   ResourceWarning: unclosed database
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.13}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check highdicom==0.28.2 pydicom==3.0.2
cat > "$folder/read.py" <<'PY'
import gc
import warnings

import highdicom
import pydicom.data

path = pydicom.data.get_testdata_file("liver_1frame.dcm", download=False)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    segmentation = highdicom.seg.segread(path)
print("close:", hasattr(segmentation, "close"))
with segmentation:
    pass
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    del segmentation
    gc.collect()
for warning in caught:
    print(f"{warning.category.__name__}: {' '.join(str(warning.message).split()[:2])}")
PY
"$folder/venv/bin/python" "$folder/read.py" 2> "$folder/errors" > "$folder/seen" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen"
