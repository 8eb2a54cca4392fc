#!/usr/bin/env bash
# Triton's interpreter runs, with the right sum, a kernel that Triton's compiler refuses: tests without a GPU are green.
#
# Versions: triton 3.9.0, torch 2.13.0. The accumulator begins as the Python number 0 and gets a float32 in the loop. With
# TRITON_INTERPRET=1 that is NumPy, where a name may change its type; the compiler gives a variable of a loop one type. It
# needs no GPU to say so, since `triton.compile` takes the target as an argument. So tests that only interpret kernels
# prove little about them: each should be compiled once, too.
#
# Output seen:
#   interpreted: 499500.0
#   compiled for sm_90: CompilationError, loop-carried variable total: int32, then fp32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 triton==3.9.0 numpy setuptools
cat > "$folder/kernel.py" <<'PY'
import re
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def sum_kernel(values, result, n, BLOCK: tl.constexpr):
    total = 0
    for first in range(0, n, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(values + place, mask=place < n, other=0.0))
    tl.store(result, total)


if sys.argv[1] == "interpret":
    values, result = torch.arange(1000, dtype=torch.float32), torch.zeros(1)
    sum_kernel[(1,)](values, result, 1000, BLOCK=128)
    print("interpreted:", result.item())
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"values": "*fp32", "result": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(sum_kernel, signature, {(3,): 128})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print("compiled for sm_90")
    except Exception as error:
        types = re.search(r"variable (\w+) has initial type (\w+) but is re-assigned to (\w+)", f"{error} {error.__cause__}")
        name, before, after = types.groups() if types else ("?", str(error)[-300:], "?")
        print(f"compiled for sm_90: {type(error).__name__}, loop-carried variable {name}: {before}, then {after}")
PY
cd "$folder"
{
    TRITON_INTERPRET=1 venv/bin/python kernel.py interpret
    venv/bin/python kernel.py compile
} 2> errors > seen || { cat errors; exit 1; }
cat seen
cd - > /dev/null
diff <(sed -n 's/^#   //p' "$0") "$folder/seen"
