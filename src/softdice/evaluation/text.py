"""Names from folders and files as text that is safe to show, and numbers as JSON has them."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

import numpy as np

_DIRECTION_MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Invisible signs that change the direction of the text after them."""


def shown(text: str) -> str:
    """Return a name with escapes in the place of control characters and of bytes that are no UTF-8.

    Example:
        >>> print(shown("a\\x1b[2Jb\\nc"), shown("caf\\u00e9"), shown(b"\\xff.png".decode("utf-8", "surrogateescape")))
        a\\x1b[2Jb\\x0ac café \\xff.png
    """
    if text.isprintable():
        return text
    return "".join(
        _escape(ord(c)) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _DIRECTION_MARKS else c
        for c in text
    )


def _escape(code: int) -> str:
    """Return the escape of a character by its code; a surrogate, by which Python stands for a byte, gives the byte."""
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def number(value: Any) -> Any:
    """Return a value as JSON holds it, all its parts too: None for nan, "inf" for inf, lists for arrays and tuples."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: number(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [number(part) for part in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else "inf"
