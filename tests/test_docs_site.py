"""The built site: examples are code, tables are tables, formulas are drawn, and no page needs the network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import softdice

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


def page(site: Path, name: str) -> str:
    return (site / name / "index.html").read_text()


def test_examples_are_code_and_tables_are_tables(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"<blockquote>\s*<blockquote>", text), path
        assert "=====" not in text, path
    text = page(site, "api")
    assert (
        text.count("Examples:</span>") == len(re.findall(r'Examples:</span></p>\s*<div class="highlight">', text)) > 60
    )
    assert "&gt;&gt;&gt;" in text
    assert not re.search(r"<p>[^<]*&gt;&gt;&gt;", text)


def test_every_public_name_has_one_entry(site: Path) -> None:
    anchors = re.findall(r'<h3 id="(softdice\.[\w.]+)"', page(site, "api"))
    names = [anchor.rpartition(".")[2] for anchor in anchors]
    rooms = {"costs", "functional", "indices", "reductions"}
    assert set(softdice.__all__) - rooms - {"__version__"} <= set(names)
    assert len(anchors) == len(set(anchors))


def test_rows_of_losses_lead_to_their_entries(site: Path) -> None:
    api = page(site, "api")
    for table in re.findall(r"<table>.*?</table>", page(site, "losses"), re.DOTALL)[:2]:
        rows = re.findall(r"<tr>\s*<td>(.*?)</td>", table, re.DOTALL)
        for cell in rows:
            anchor = re.match(r'<a href="\.\./api/#([^"]+)"><code>', cell)
            assert anchor is not None, cell
            assert f'id="{anchor[1]}"' in api


def test_formulas_are_drawn(site: Path) -> None:
    for name in ("mathematics", "losses"):
        text = page(site, name)
        assert text.count('class="formula"') == len(re.findall(r'class="formula"[^>]*><svg ', text)) > 20
    assert not any('class="arithmatex"' in path.read_text() for path in site.rglob("*.html"))


class Fetched(HTMLParser):
    """Addresses that a browser fetches with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named: dict[str, Any] = dict(attrs)
        if tag in ("script", "img", "iframe") or (tag == "link" and "stylesheet" in (named.get("rel") or "")):
            self.addresses += [named[name] for name in ("src", "href") if named.get(name)]


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        parser = Fetched()
        parser.feed(path.read_text())
        assert parser.addresses, path
        assert not [address for address in parser.addresses if re.match(r"(?:\w+:)?//", address)], path


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_table_by_hand() -> None:
    """With a head, a row over two lines, a sign of Markdown; and without a head, indented."""
    text = "Words::\n\n==== =====\nname value\n==== =====\na_b  1 | 2\n     and 3\nc    4*5*6\n==== =====\nEnd."
    assert hook("docstrings").with_tables(text) == (
        "Words:\n\n| name | value |\n| --- | --- |\n| `a_b` | 1 \\| 2 and 3 |\n| `c` | 4\\*5\\*6 |\n\nEnd."
    )
    assert hook("docstrings").with_tables("The fields are\n\n    == ==\n    a  b\n    == ==") == (
        "The fields are:\n\n|  |  |\n| --- | --- |\n| `a` | b |\n"
    )


def test_a_formula_keeps_its_text_and_the_colour_around() -> None:
    drawn = hook("formulas").on_page_content('<p><span class="arithmatex">\\(a &lt; b\\)</span></p>')
    assert drawn.startswith('<p><span class="formula" role="img" aria-label="a &lt; b"><svg ')
    assert "currentColor" in drawn
    assert hook("formulas").on_page_content("<p>5 dollars</p>") == "<p>5 dollars</p>"
