"""The classes of the losses -> src/softdice/functional.pyi, the types of their functions. `make format` runs this."""

from __future__ import annotations

import inspect
from pathlib import Path
from textwrap import fill

from softdice import functional

INDENT = " " * 4
STUB = Path(functional.__file__).with_suffix(".pyi")
HEAD = """# Written by tests/functional_stub.py from the classes of the losses.
# fmt: off
from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from typing_extensions import Unpack

from softdice.losses import LossSettings
from softdice.losses.masks import *  # noqa: F403

"""


def declarations() -> str:
    """-> what the stub has to hold."""
    text = HEAD
    for name, function in functional.FUNCTIONS.items():
        _, _, weight, *own = [
            f"**{p.name}: {p.annotation}, "
            if p.kind is p.VAR_KEYWORD
            else f"{p.name}: {p.annotation} = {p.default!r}, ".replace(f" = {p.empty!r}", "")
            for p in inspect.signature(function).parameters.values()
        ]
        whole = " ".join(text.strip().replace(" ", "\0") for text in own)  # a line ends between two parameters
        rest = fill(whole, 120, initial_indent=INDENT, subsequent_indent=INDENT).replace("\0", " ").replace("'", '"')
        text += f"def {name}(\n    input: Tensor, target: Tensor, *, {weight.strip()}\n{rest}\n) -> Tensor:\n"
        text += f'    """{str(function.__doc__).splitlines()[0]}"""\n\n'
    return text.rstrip() + "\n"


if __name__ == "__main__":
    STUB.write_text(declarations())
