"""The file formats. Each module of this folder declares one family as `FORMATS`; nothing else lists them."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from softdice.images.image import Format

BY_SUFFIX: dict[str, Format] = {
    suffix: format
    for module in pkgutil.iter_modules(__path__)
    for format in import_module(f"{__name__}.{module.name}").FORMATS
    for suffix in format.suffixes
}
"""Suffix -> format."""
