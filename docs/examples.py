"""An extension of griffe for mkdocs.yml: the section "Example:" of docstrings is shown as code, as "Examples:" is."""

from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Rename the section before the docstring is parsed; a prompt that is not in it would be shown as a quotation."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
