#!/usr/bin/env bash
# SimpleITK leaves the locale "C" behind when it writes a slice of DICOM with a place; Python then opens text as ASCII.
#
# Versions: SimpleITK 2.5.7, numpy 2.4.6, Linux, Python below 3.15 without its UTF-8 mode. A slice whose metadata name
# ImagePositionPatient or ImageOrientationPatient, as each slice of a series does, changes the locale of the whole
# process, and nothing puts it back; a picture without a place, and reading, leave it. From then on `open` and
# `Path.read_text` without an encoding fail on the first letter that is not ASCII, in code that has nothing to do with
# images. Pass encoding="utf-8", or keep `locale.setlocale(locale.LC_ALL)` before and set it after.
#
# Output seen:
#   without a place: C.UTF-8, text is read as utf-8
#   ImagePositionPatient: C, text is read as ascii
#   ImageOrientationPatient: C, text is read as ascii
#   read again: C.UTF-8, text is read as utf-8
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check SimpleITK==2.5.7 numpy==2.4.6
cat > "$folder/write.py" <<'PY'
import codecs
import locale
import sys

import numpy as np
import SimpleITK

path = f"{sys.argv[1]}/slice.dcm"


def show(what: str) -> None:
    with open(sys.argv[1] + "/text", "w") as file:
        encoding = codecs.lookup({"ANSI_X3.4-1968": "ascii"}.get(file.encoding, file.encoding)).name
    print(f"{what}: {locale.setlocale(locale.LC_ALL)}, text is read as {encoding}")
    locale.setlocale(locale.LC_ALL, "C.UTF-8")


locale.setlocale(locale.LC_ALL, "C.UTF-8")
for name, tag, value in (
    ("without a place", "", ""),
    ("ImagePositionPatient", "0020|0032", "0\\0\\1"),
    ("ImageOrientationPatient", "0020|0037", "1\\0\\0\\0\\1\\0"),
):
    picture = SimpleITK.GetImageFromArray(np.zeros((1, 4, 5), np.uint8))
    if tag:
        picture.SetMetaData(tag, value)
    SimpleITK.WriteImage(picture, path)
    show(name)
SimpleITK.ReadImage(path)
show("read again")
PY
env -u PYTHONUTF8 LC_ALL=C.UTF-8 "$folder/venv/bin/python" "$folder/write.py" "$folder" > "$folder/seen" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen"
