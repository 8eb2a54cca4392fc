"""A hook of mkdocs.yml: formulas between dollar signs become drawings (SVG) when the site is built.

A page needs no script, no font and no network for them, in a folder as on a server. They have the colour of the text.
"""

import html
import re
import warnings
import xml.etree.ElementTree as ElementTree

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of how it finds its font
    import ziamath

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
"""What pymdownx.arithmatex leaves of a formula."""
SIZE = 14.5
"""What the size of the text around is in units of the drawing, whose letters have 16."""

ziamath.config.svg2 = False  # outlines in place: names of symbols would clash on a page
ziamath.config.precision = 2


def on_page_content(text: str, **_: object) -> str:
    """Return the HTML of a page with drawings in the place of its formulas."""
    return FORMULA.sub(_drawing, text)


def _drawing(match: re.Match[str]) -> str:
    """Return one formula as an element of the same kind, with its source as the text that is read out."""
    source = html.unescape(match[2]).strip()
    formula = ziamath.Latex(source, size=16, color="currentColor", inline=match[1] == "span")
    drawing = formula.svgxml()
    height, below = float(drawing.get("height", 0)), formula.getyofst()
    drawing.set("style", f"height: {height / SIZE:.3f}em; vertical-align: {below / SIZE:.3f}em")
    for name in ("width", "height"):
        del drawing.attrib[name]
    label = html.escape(source, quote=True)
    picture = ElementTree.tostring(drawing, encoding="unicode")
    return f'<{match[1]} class="formula" role="img" aria-label="{label}">{picture}</{match[1]}>'
