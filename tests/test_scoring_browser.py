"""The report in a real browser, driven by Playwright: sorting, filtering, dark, a phone, paper, pictures, no network.

`make test-browser` brings both, and fails where one is missing.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from softdice.evaluation.table import Table
from softdice.scoring import Options, compare, pair_files, run, summarise, tabulate
from softdice.scoring.report import to_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LACKING = [name for name, found in (("Chromium", BROWSER), ("Playwright", find_spec("playwright"))) if not found]

pytestmark = pytest.mark.skipif(
    bool(LACKING) and "SOFTDICE_REQUIRE_BROWSER" not in os.environ,
    reason=f"no {' and no '.join(LACKING)}: make test-browser",
)

QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=[f"--{word}" for word in QUIET])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page; in the end it has asked for nothing but itself, and no script of it has failed."""
    asked: list[str] = []
    contexts = []

    def open_(content: str, *, width: int = 1200, dark: bool = False) -> Any:
        file = tmp_path / "report.html"
        file.write_text(content, encoding="utf-8")
        size = {"width": width, "height": 900}
        contexts.append(chromium.new_context(viewport=size, color_scheme="dark" if dark else "light"))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(f"error: {error}"))
        page.goto(file.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert asked
    assert [url for url in asked if not url.startswith(("data:", (tmp_path / "report.html").as_uri()))] == []


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


ROWS = "rows => rows.filter(row => !row.hidden).map(row => row.cells[0].textContent)"


def test_sort_and_filter(opened: Callable[..., Any]) -> None:
    page = opened(report(13, 3))
    cases = page.locator("table").last

    def shown(*clicked: int) -> list[str]:
        for column in clicked:
            cases.locator("th [role=button]").nth(column).click()
        return cases.locator("tbody tr").evaluate_all(ROWS)

    mean = table(13, 3).dice.mean(1)
    order = [f"case {i}" for i in np.argsort(mean, kind="stable")]
    assert shown(1) == order
    assert cases.locator("th").nth(1).get_attribute("aria-sort") == "ascending"
    assert shown(1) == order[::-1]
    assert shown(0) == [f"case {i}" for i in range(13)]
    page.locator("input").fill("CASE 1")
    assert shown() == ["case 1", "case 10", "case 11", "case 12"]
    page.locator("input").fill("")
    assert len(shown()) == 13
    heading = cases.locator("th [role=button]").nth(1)
    for key in ("Enter", " "):
        heading.press(key)
        assert shown() == (order if key == "Enter" else order[::-1])


@pytest.mark.parametrize("classes", [3, 41])
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_out_of_sight(classes: int, width: int, opened: Callable[..., Any]) -> None:
    """The page itself never scrolls sideways, and boxes lie in their plots."""
    page = opened(report(6, classes), width=width)
    boxes = page.locator(".plot rect").evaluate_all(
        """boxes => boxes.map(box => {
        const inner = box.getBoundingClientRect(), outer = box.closest("svg").getBoundingClientRect();
        return inner.left >= outer.left - 1 && inner.right <= outer.right + 1 && outer.width > 150; })"""
    )
    assert boxes == [True] * 3 * classes
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".plot span").first.evaluate("one => getComputedStyle(one).fontSize") == "13px"


SHAPES = ("surface", "lesions")


def measured(cases: int, seed: int) -> Table:
    """A table of three classes with all that --surface and --lesions measure."""
    side = table(cases, 3, seed)
    side.metrics = SHAPES
    side.measured = np.random.default_rng(seed).uniform(0, 1, (cases, len(side.shapes), 3))
    side.measured[0, :2] = np.inf
    return side


def test_what_was_asked_for_is_in_sight(opened: Callable[..., Any]) -> None:
    """Three models, surfaces and lesions: at 1280 pixels no table of means is scrolled for what was asked for."""
    sides = {f"model {k}": measured(8, k) for k in range(3)}
    first, *others = sides.values()
    comparisons = [compare(first, other) for other in others]
    summaries = {name: summarise(side) for name, side in sides.items()}
    page = opened(to_html(sides, summaries, comparisons, Options(metrics=SHAPES), "labels"), width=1280)
    asked = {"Dice", "95 % interval", "HD95", "HD95 median", "HD95 inf", "mean distance", "surface Dice", "lesion Dice"}
    asked |= {"PQ", "SQ", "RQ (F1)"}
    edges = page.locator("table").evaluate_all(
        """tables => tables.map(one => Object.fromEntries([...one.querySelectorAll("th")].map(
        head => [head.textContent, head.getBoundingClientRect().right])))"""
    )
    seen = [heads for heads in edges if "HD95" in heads]
    assert len(seen) == 4  # of the models together, and of each
    for heads in seen:
        assert {*heads} >= asked - {"HD95 median"}
        assert max(right for name, right in heads.items() if name in asked) <= 1280
    assert page.locator("nav a").count() == page.locator("h2").count()
    page.locator("nav a").last.click()
    assert page.locator("h2").last.bounding_box()["y"] < 900


def test_heads_repeat_on_paper(opened: Callable[..., Any]) -> None:
    """Chromium repeats a head that is allowed to stand on every sheet and holds nothing that can not be drawn twice."""
    page = opened(report(60, 3), width=703)
    page.emulate_media(media="print")
    head = page.locator("thead").last
    assert head.evaluate("one => getComputedStyle(one).display") == "table-header-group"
    assert head.evaluate("one => getComputedStyle(one).breakInside") == "avoid"
    assert head.locator("button, input, svg").count() == 0


def test_dark_and_light(opened: Callable[..., Any]) -> None:
    for dark, (back, ink) in ((False, ((255, 255, 255), (26, 31, 38))), (True, ((20, 24, 29), (230, 234, 240)))):
        body = opened(report(2, 2), dark=dark).locator("body")
        said = body.evaluate("body => [getComputedStyle(body).backgroundColor, getComputedStyle(body).color]")
        assert said == [f"rgb{back}", f"rgb{ink}"]


@pytest.mark.parametrize("classes", [3, 41])
def test_paper(classes: int, opened: Callable[..., Any]) -> None:
    """The style of print, 186 mm wide: no table is wider, nothing scrolls, what only a screen needs is gone."""
    page = opened(report(5, classes), width=703)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 703
    edges = page.locator("table").evaluate_all("tables => tables.map(one => one.getBoundingClientRect().right)")
    assert max(edges) <= 703
    assert not page.locator("input").is_visible()
    assert page.locator(".scroll").first.evaluate("one => getComputedStyle(one).overflowX") == "visible"
    assert page.locator("body").evaluate("body => getComputedStyle(body).color") == "rgb(26, 31, 38)"  # dark on white
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    sheets = {tuple(map(float, box.split())) for box in re.findall(rb"/MediaBox \[([^]]+)\]", pdf)}
    assert sheets
    assert all(box[2:] == pytest.approx((595, 842), abs=1) for box in sheets)


@pytest.mark.parametrize("width", [400, 1200])
def test_pictures(width: int, opened: Callable[..., Any], tmp_path: Path) -> None:
    """They are drawn, with their true aspect ratio, and sides and bar lie inside."""
    for part, shift in (("p", 1), ("t", 0)):
        (tmp_path / part).mkdir()
        array = np.zeros((40, 40, 8), np.uint8)
        array[10:30, 12:20, 2:6] = 1
        array[10 - 8 * shift : 10, 12:20, 3] = 1  # 128 mm² of the axial plane, 80 of a sagittal one
        nibabel.Nifti1Image(array, np.diag([1.0, 2, 5, 1])).to_filename(tmp_path / part / "a.nii.gz")
    side = tabulate(run(pair_files(tmp_path / "p", tmp_path / "t"), Options()))
    page = opened(to_html({"p": side}, {"p": summarise(side)}, [], Options(), "t"), width=width)
    (picture,) = page.locator("figure img").all()
    assert picture.evaluate("image => image.complete && image.naturalWidth > 0")
    box, frame = picture.bounding_box(), page.locator(".view").bounding_box()
    assert frame["x"] <= box["x"]
    assert box["x"] + box["width"] <= frame["x"] + frame["width"] <= width
    assert box["width"] / box["height"] == pytest.approx(40 * 1 / (40 * 2), rel=0.02)  # axial: 40 mm by 80 mm
    marks = [mark.bounding_box() for mark in page.locator(".frame b, .frame i").all()]
    assert page.locator(".frame b").all_text_contents() == ["R", "L"]
    assert len(marks) == 3
    for mark in marks:
        assert box["x"] <= mark["x"]
        assert mark["x"] + mark["width"] <= box["x"] + box["width"] + 1
        assert box["y"] <= mark["y"] <= box["y"] + box["height"]
    assert page.locator(".plot").count() == 0  # one case
