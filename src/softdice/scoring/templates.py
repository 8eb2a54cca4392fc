"""The HTML templates of this folder, which escape every text that they show."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from itertools import count
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined  # torch brings jinja2
from markupsafe import Markup, escape

from softdice.evaluation.text import shown


def render(name: str, **values: Any) -> Markup:
    """Return the HTML of a template, whose file in this folder is `name`; `values`: its variables, all of them."""
    return Markup(_environment().get_template(name).render(values))


@cache
def _environment() -> Environment:
    """Return what the templates share: every text is made safe to show and escaped, a missing value is an error."""
    environment = Environment(
        loader=FunctionLoader(lambda name: files("softdice.scoring").joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: shown(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": _breakable, "with_contents": _with_contents}
    return environment


def _breakable(text: str) -> Markup:
    """Return a name that a browser may break behind an underscore, or an interval that it keeps on one line."""
    return Markup(escape(shown(text)).replace("_", Markup("_<wbr>")).replace(" .. ", Markup("&nbsp;.. ")))


def _with_contents(body: Markup) -> Markup:
    """Return the HTML of a page's body with a table of contents that links to its <h2> headings."""
    headings = re.findall(r"<h2>(.*?)</h2>", body)
    links = "".join(f"<li><a href='#part{i}'>{heading}</a></li>" for i, heading in enumerate(headings, 1))
    numbers = count(1)
    with_ids = re.sub(r"<h2>", lambda _: f"<h2 id='part{next(numbers)}'>", body)
    return Markup(f"<nav aria-label='Contents'><ul>{links}</ul></nav>\n{with_ids}")
