"""examples/soft_dice_loss.md -> the same with outputs, examples/soft_dice_loss.ipynb. `make notebook` runs this.

The text is edited and reviewed; the notebook is the text with what it prints and draws.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")  # else jupyter_core warns that its folders will move

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

TEXT = Path(__file__).parent.parent / "examples" / "soft_dice_loss.md"
NOTEBOOK = TEXT.with_suffix(".ipynb")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_LINES = (
    "import warnings; warnings.simplefilter('error')",
    "warnings.filterwarnings('ignore', category=PendingDeprecationWarning, module='ipykernel')",  # at its own shutdown
)
WARNINGS_ARE_ERRORS = f"--IPKernelApp.exec_lines={list(_LINES)}"

_COMPILING = re.compile(r"(softdice: compiling the CPU kernel [^\n]*\n)+")


def written() -> NotebookNode:
    """Return the text as a notebook without outputs."""
    notebook = nbformat.v4.new_notebook(cells=jupytext.read(TEXT).cells, metadata=METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"  # jupytext draws them at random
    return notebook


def executed() -> NotebookNode:
    """Return the notebook with outputs, run in an empty folder, with warnings as errors and no settings of the user."""
    notebook = written()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=200,
            startup_timeout=100,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=[WARNINGS_ARE_ERRORS],
            resources={"metadata": {"path": folder}},
        ).execute(env={**os.environ, "IPYTHONDIR": folder, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    notebook.metadata = METADATA  # without the versions of Python that happened to run it
    for cell in notebook.cells:
        if "outputs" in cell:  # what a machine says once, when it compiles the kernel, is no part of the notebook
            cell.outputs = [output for output in cell.outputs if not _COMPILING.fullmatch(output.get("text", ""))]
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
