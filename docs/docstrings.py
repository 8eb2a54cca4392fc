"""An extension of griffe for mkdocs.yml: docstrings as Markdown understands them, before they are parsed.

The section "Example:" becomes "Examples:", the name that is shown as code; any other prompt would be a quotation. A
table between lines of "=" becomes a Markdown table. Docstrings of modules are left out: the page has its own text.
"""

import re
from typing import Any

from griffe import Extension, Module, Object

BORDER = re.compile(r" *=+(?: +=+)+ *")


class Docstrings(Extension):
    """Rewrite the docstring of every object."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if isinstance(obj, Module):
            obj.docstring = None
        elif obj.docstring is not None:
            obj.docstring.value = with_tables(obj.docstring.value).replace("Example:\n", "Examples:\n")


def with_tables(text: str) -> str:
    """Return the text with Markdown tables in the place of those between two or three lines of "="."""
    lines, done = text.split("\n"), []
    while lines:
        line = lines.pop(0)
        if not BORDER.fullmatch(line):
            done.append(line)
            continue
        end = max(i for i, other in enumerate(lines) if BORDER.fullmatch(other))
        body, lines = lines[:end], lines[end + 1 :]
        done = ["\n".join(done).rstrip().removesuffix(":").removesuffix(":") + ":", "", *_table(line, body), ""]
    return "\n".join(done)


def _table(border: str, lines: list[str]) -> list[str]:
    """Return the lines of a Markdown table; a line whose first column is empty goes on with the row above it."""
    starts = [match.start() for match in re.finditer("=+", border)]
    columns = list(zip(starts, [*starts[1:], None], strict=True))
    head, rows = [""] * len(columns), []
    for line in lines:
        if BORDER.fullmatch(line):
            (head,) = rows
            rows = []
            continue
        cells = [re.sub(r"([|*<])", r"\\\1", line[start:stop].strip()) for start, stop in columns]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {more}".strip() for above, more in zip(rows[-1], cells, strict=True)]
    named = [[f"`{first}`", *rest] for first, *rest in rows]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(columns), *named)]
