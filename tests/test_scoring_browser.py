"""The report in a real browser: sorting, filtering, dark, a phone, paper. `make test-browser` fails without one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softdice.scoring import Options, compare, summarise
from softdice.scoring.report import to_html
from softdice.scoring.summary import Table

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None and "SOFTDICE_REQUIRE_BROWSER" not in os.environ, reason="no Chromium: apt-get install chromium"
)

WRAPPER = """<!DOCTYPE html><iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{page}"></iframe>
<pre></pre>
<script>document.querySelector("iframe").onload = event => {{
  const view = event.target.contentWindow, page = view.document;
  const say = () => {{ {script} }};
  document.querySelector("pre").textContent = JSON.stringify(say());
}};</script>"""
"""A frame has the width that it is given; a window may not be as narrow as a phone."""


def chromium(*arguments: str) -> str:
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def browsed(page: str, script: str, folder: Path, *, width: int = 1200, dark: bool = False) -> Any:
    """What the script returns; `view` and `page` are the window and the document."""
    file = folder / "wrapper.html"
    file.write_text(WRAPPER.format(width=width, page=escape(page), script=script), encoding="utf-8")
    colours = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dumped = chromium(colours, "--virtual-time-budget=5000", "--dump-dom", file.as_uri())
    found = re.search(r"<pre>(.+)</pre>", dumped, re.DOTALL)
    assert found is not None, dumped[-2000:]
    return json.loads(unescape(found[1]))


def table(cases: int, classes: int, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    both = rng.integers(0, 100, (cases, classes))
    counts = np.stack([both, both + rng.integers(0, 90, both.shape), both + rng.integers(0, 90, both.shape)], 1)
    counts[:, 0, classes // 2] = 0
    names = {k: f"organ_{k}_with_a_name_that_is_long" for k in range(1, classes + 1)}
    keys = tuple(range(1, classes + 1))
    labels = [f"case {i}" for i in range(cases)]
    return Table(keys, counts, labels, ["p"] * cases, ["t"] * cases, [1000] * cases, names, [], {}, [0.001] * cases)


def report(cases: int, classes: int) -> str:
    sides = {"run a": table(cases, classes), "run b": table(cases, classes, 1)}
    comparison = compare(*sides.values())
    return to_html(sides, {name: summarise(each) for name, each in sides.items()}, [comparison], Options(), "labels")


ROWS = """const rows = () => [...last.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[0].textContent);
const tables = [...page.querySelectorAll("table")], last = tables[tables.length - 1];"""


def test_sort_and_filter(tmp_path: Path) -> None:
    script = (
        ROWS
        + """const heads = last.querySelectorAll("th button"), found = {};
        heads[1].click(); found.up = rows(); heads[1].click(); found.down = rows();
        heads[0].click(); found.name = rows();
        const field = page.querySelector("input"); field.value = "CASE 1"; field.dispatchEvent(new view.Event("input"));
        found.filtered = rows(); return found;"""
    )
    found = browsed(report(13, 3), script, tmp_path)
    mean = table(13, 3).dice.mean(1)
    order = [f"case {i}" for i in np.argsort(mean, kind="stable")]
    assert found["up"] == order
    assert found["down"] == order[::-1]
    assert found["name"] == [f"case {i}" for i in range(13)]
    assert found["filtered"] == ["case 1", "case 10", "case 11", "case 12"]


@pytest.mark.parametrize("classes", [3, 41])
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_out_of_sight(classes: int, width: int, tmp_path: Path) -> None:
    """The page itself never scrolls sideways, boxes lie in their plots, and nothing was fetched."""
    script = """const plots = [...page.querySelectorAll(".plot rect")].map(box => {
        const inner = box.getBoundingClientRect(), outer = box.closest("svg").getBoundingClientRect();
        return inner.left >= outer.left - 1 && inner.right <= outer.right + 1 && outer.width > 150; });
      const fetched = view.performance.getEntriesByType("resource").filter(each => !each.name.startsWith("data:"));
      return { wide: page.documentElement.scrollWidth, boxes: plots.length, inside: plots.every(Boolean),
        fetched: fetched.length, size: view.getComputedStyle(page.querySelector(".plot span")).fontSize };"""
    found = browsed(report(6, classes), script, tmp_path, width=width)
    assert found == {"wide": width, "boxes": 3 * classes, "inside": True, "fetched": 0, "size": "13px"}


def test_dark_and_light(tmp_path: Path) -> None:
    script = "const style = view.getComputedStyle(page.body); return [style.backgroundColor, style.color];"
    for dark, (back, ink) in ((False, ((255, 255, 255), (26, 31, 38))), (True, ((20, 24, 29), (230, 234, 240)))):
        assert browsed(report(2, 2), script, tmp_path, dark=dark) == [f"rgb{back}", f"rgb{ink}"]


@pytest.mark.parametrize("classes", [3, 41])
def test_paper(classes: int, tmp_path: Path) -> None:
    """The style of print, 186 mm wide: no table is wider, nothing scrolls, what only a screen needs is gone."""
    page = report(5, classes).replace("@media print", "@media all").replace("@media (max-width", "@media (max-height")
    script = """const seen = element => view.getComputedStyle(element).display !== "none";
      return { wide: page.documentElement.scrollWidth, tables: [...page.querySelectorAll("table")].every(
        table => table.getBoundingClientRect().right <= view.innerWidth), field: seen(page.querySelector("input")),
        scroll: view.getComputedStyle(page.querySelector(".scroll")).overflowX };"""
    found = browsed(page, script, tmp_path, width=703)
    assert found == {"wide": 703, "tables": True, "field": False, "scroll": "visible"}
    (tmp_path / "r.html").write_text(report(5, classes), encoding="utf-8")
    chromium(f"--print-to-pdf={tmp_path / 'r.pdf'}", (tmp_path / "r.html").as_uri())
    pdf = (tmp_path / "r.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    sheets = {tuple(map(float, box.split())) for box in re.findall(rb"/MediaBox \[([^]]+)\]", pdf)}
    assert all(box[2:] == pytest.approx((595, 842), abs=1) for box in sheets)
